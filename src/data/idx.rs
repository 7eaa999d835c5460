//! IDX files, the format of MNIST and Fashion-MNIST: big-endian magic number and dimensions, then bytes. Plain or gzip.
//!
//! LeCun, Cortes, Burges, *The MNIST database of handwritten digits*, 1998.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use byteorder::{BigEndian, ReadBytesExt};
use flate2::read::MultiGzDecoder;

use super::{Dataset, MAX_FILE_BYTES, MAX_PIXELS, Split, Store, folder_name, read_names};
use crate::{Error, Result};

/// Unsigned bytes (8) in three dimensions.
const IMAGES: u32 = 0x0803;
/// Unsigned bytes (8) in one dimension.
const LABELS: u32 = 0x0801;

/// Images of one size: `[count, height, width]`.
pub(super) struct Images {
    pub count: usize,
    pub height: usize,
    pub width: usize,
    pub pixels: Vec<u8>,
}

/// The file of a split: `images-idx3` or `labels-idx1`; both `-` and `.` are in use before `idx`.
fn find(folder: &Path, split: Split, stem: &str, kind: &str) -> Option<PathBuf> {
    let prefix = match split {
        Split::Train => "train",
        Split::Test => "t10k",
    };
    ["-", "."]
        .iter()
        .flat_map(|dot| ["", ".gz"].map(|gz| folder.join(format!("{prefix}-{stem}{dot}{kind}-ubyte{gz}"))))
        .find(|path| path.is_file())
}

/// Whether the folder holds at least one IDX file.
pub(super) fn is_idx(folder: &Path) -> bool {
    [Split::Train, Split::Test]
        .into_iter()
        .any(|split| find(folder, split, "images", "idx3").is_some() || find(folder, split, "labels", "idx1").is_some())
}

/// Opens one split of a folder of IDX files.
pub(super) fn open(folder: &Path, split: Split) -> Result<Dataset> {
    let prefix = if split == Split::Train { "train" } else { "t10k" };
    let missing =
        |name: String| Error::format(folder.join(&name), format!("missing: expected {name} or {name}.gz beside the other IDX files"));
    let images_path = find(folder, split, "images", "idx3").ok_or_else(|| missing(format!("{prefix}-images-idx3-ubyte")))?;
    let labels_path = find(folder, split, "labels", "idx1").ok_or_else(|| missing(format!("{prefix}-labels-idx1-ubyte")))?;
    let images = read_images(&images_path, unpacked(&images_path)?)?;
    let labels = read_labels(&labels_path, unpacked(&labels_path)?)?;
    let names = match read_names(&folder.join("classes.txt"))? {
        // The files do not say whose they are; the name of the folder is only trusted for the names of the classes.
        None if folder_name(folder).to_lowercase().contains("fashion") => Some(fashion_names()),
        names => names,
    };
    dataset(folder_name(folder), &images_path, images, &labels_path, labels, names)
}

/// The ten classes of Fashion-MNIST.
pub(super) fn fashion_names() -> Vec<String> {
    include_str!("../../fixtures/fashion-mnist/classes.txt").lines().map(String::from).collect()
}

/// The file, through gzip if it is called `.gz`.
fn unpacked(path: &Path) -> Result<Box<dyn Read>> {
    let file = BufReader::new(File::open(path).map_err(|e| Error::io(path, e))?);
    Ok(if path.extension().is_some_and(|e| e == "gz") { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) })
}

/// Reads `[count, height, width]` bytes.
pub(super) fn read_images(path: &Path, mut from: impl Read) -> Result<Images> {
    let [count, height, width] = read_header(path, &mut from, IMAGES)?;
    if count == 0 || height == 0 || width == 0 || height * width > MAX_PIXELS as u64 {
        return Err(Error::format(
            path,
            format!("header says {count} images of {height}×{width} pixels, expected at least one image of 1 to {MAX_PIXELS} pixels"),
        ));
    }
    let pixels = read_body(path, from, u128::from(count) * u128::from(height * width))?;
    Ok(Images { count: count as usize, height: height as usize, width: width as usize, pixels })
}

/// Reads `[count]` labels.
pub(super) fn read_labels(path: &Path, mut from: impl Read) -> Result<Vec<u8>> {
    let [count] = read_header(path, &mut from, LABELS)?;
    read_body(path, from, u128::from(count))
}

/// Reads the magic number and `N` dimensions.
fn read_header<const N: usize>(path: &Path, from: &mut impl Read, magic: u32) -> Result<[u64; N]> {
    let mut next = || from.read_u32::<BigEndian>().map_err(|e| broken(path, "in the header", e));
    let found = next()?;
    if found != magic {
        let kind = if magic == IMAGES { "images" } else { "labels" };
        return Err(Error::format(path, format!("expected IDX {kind}, magic number {magic:#010x}; found {found:#010x}")));
    }
    let mut dims = [0; N];
    for dim in &mut dims {
        *dim = u64::from(next()?);
    }
    Ok(dims)
}

/// Reads exactly `size` bytes and the end of the file. The buffer grows with what is really there, not with what the header says.
fn read_body(path: &Path, from: impl Read, size: u128) -> Result<Vec<u8>> {
    if size > u128::from(MAX_FILE_BYTES) {
        return Err(Error::format(path, format!("header says {size} bytes of data, expected at most {MAX_FILE_BYTES}")));
    }
    let mut body = Vec::new();
    // One byte more than wanted: it shows surplus data, and makes gzip check its checksum.
    from.take(size as u64 + 1).read_to_end(&mut body).map_err(|e| broken(path, &format!("after {} of {size} bytes", body.len()), e))?;
    match (body.len() as u128).cmp(&size) {
        std::cmp::Ordering::Equal => Ok(body),
        std::cmp::Ordering::Less => Err(Error::format(path, format!("cut short: header says {size} bytes of data, found {}", body.len()))),
        std::cmp::Ordering::Greater => Err(Error::format(path, format!("header says {size} bytes of data, found more"))),
    }
}

/// Running out of data and damaged gzip are the file's fault, not the system's.
fn broken(path: &Path, place: &str, e: std::io::Error) -> Error {
    use std::io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    match e.kind() {
        UnexpectedEof => Error::format(path, format!("cut short {place}: expected a whole IDX file")),
        InvalidData | InvalidInput => Error::format(path, format!("damaged {place}: {e}; expected a whole gzip file")),
        _ => Error::io(path, e),
    }
}

/// Puts images and labels together. Without names the classes are called by their numbers, at least ten.
pub(super) fn dataset(
    name: String,
    images_path: &Path,
    images: Images,
    labels_path: &Path,
    labels: Vec<u8>,
    names: Option<Vec<String>>,
) -> Result<Dataset> {
    if labels.len() != images.count {
        let message = format!("{} labels, expected {}: one per image in {}", labels.len(), images.count, images_path.display());
        return Err(Error::format(labels_path, message));
    }
    let highest = labels.iter().copied().max().map_or(0, usize::from);
    let class_names = names.unwrap_or_else(|| (0..=highest.max(9)).map(|i| i.to_string()).collect());
    if highest >= class_names.len() {
        return Err(Error::format(
            labels_path,
            format!("label {highest}, expected less than {}: the number of class names", class_names.len()),
        ));
    }
    Ok(Dataset {
        name,
        class_names,
        labels: labels.into_iter().map(u32::from).collect(),
        store: Store::Memory { height: images.height, width: images.width, channels: 1, pixels: images.pixels },
        held_out: true,
    })
}
