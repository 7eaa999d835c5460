//! CIFAR-10 and CIFAR-100, binary version: records of label byte(s) and 3072 bytes, a 32×32 plane each of red, green and blue.
//!
//! Krizhevsky, *Learning multiple layers of features from tiny images*, 2009.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Dataset, MAX_FILE_BYTES, OpenOptions, Skipped, Split, Store, folder_name, read_names};
use crate::{Error, Result};

const SIDE: usize = 32;
const PLANE: usize = SIDE * SIDE;

/// The two sets differ in their label bytes, their classes and the names of their files.
struct Layout {
    /// Bytes before the pixels; the last of them is the label (CIFAR-100 has the coarse label before it).
    label_bytes: usize,
    classes: usize,
    names: &'static str,
}

const CIFAR10: Layout = Layout { label_bytes: 1, classes: 10, names: "batches.meta.txt" };
const CIFAR100: Layout = Layout { label_bytes: 2, classes: 100, names: "fine_label_names.txt" };

/// The files of a split, sorted by name.
fn files(folder: &Path, split: Split) -> Option<(Layout, Vec<PathBuf>)> {
    let existing = |name: &str| Some(folder.join(name)).filter(|p| p.is_file());
    let mut batches: Vec<PathBuf> = match split {
        Split::Train => fs::read_dir(folder).ok()?.flatten().map(|e| e.path()).filter(|p| is_batch(p)).collect(),
        Split::Test => existing("test_batch.bin").into_iter().collect(),
    };
    if !batches.is_empty() {
        batches.sort();
        return Some((CIFAR10, batches));
    }
    let name = if split == Split::Train { "train.bin" } else { "test.bin" };
    existing(name).map(|p| (CIFAR100, vec![p]))
}

/// `data_batch_*.bin`.
fn is_batch(path: &Path) -> bool {
    let name = path.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
    name.starts_with("data_batch_") && name.ends_with(".bin") && path.is_file()
}

/// Whether the folder holds CIFAR, also in the version for Python (which [`open`] refuses).
pub(super) fn is_cifar(folder: &Path) -> bool {
    files(folder, Split::Train).is_some() || files(folder, Split::Test).is_some() || is_pickled(folder)
}

fn is_pickled(folder: &Path) -> bool {
    folder.join("data_batch_1").is_file() || folder.join("test_batch").is_file()
}

/// Opens one split of CIFAR-10 or CIFAR-100.
pub(super) fn open(folder: &Path, options: OpenOptions) -> Result<(Dataset, Skipped)> {
    let Some((layout, paths)) = files(folder, options.split) else {
        let message = match options.split {
            _ if is_pickled(folder) => "this is CIFAR's Python version, expected the binary version (data_batch_1.bin, …)",
            Split::Train => "no training images: expected data_batch_*.bin (CIFAR-10) or train.bin (CIFAR-100)",
            Split::Test => "no test images: expected test_batch.bin (CIFAR-10) or test.bin (CIFAR-100)",
        };
        return Err(Error::format(folder, message));
    };
    let names_path = folder.join(layout.names);
    let class_names = read_names(&names_path)?.unwrap_or_else(|| (0..layout.classes).map(|i| i.to_string()).collect());
    if class_names.len() != layout.classes {
        return Err(Error::format(names_path, format!("{} class names, expected {}", class_names.len(), layout.classes)));
    }
    let (mut labels, mut pixels, mut skipped) = (Vec::new(), Vec::new(), Skipped::default());
    for path in paths {
        match read(&path, &layout) {
            Ok((l, p)) => {
                labels.extend(l);
                pixels.extend(p);
            }
            Err(e) if options.skip_bad => skipped.files.push((path, e)),
            Err(e) => return Err(e),
        }
    }
    if labels.is_empty() {
        return Err(Error::format(folder, format!("none of {} CIFAR files could be read; {}", skipped.count(), skipped.files[0].1)));
    }
    let store = Store::Memory { height: SIDE, width: SIDE, channels: 3, pixels };
    Ok((Dataset { name: folder_name(folder), class_names, labels, store, held_out: true }, skipped))
}

/// One file: labels, and pixels `[images, 32, 32, 3]`.
fn read(path: &Path, layout: &Layout) -> Result<(Vec<u32>, Vec<u8>)> {
    let record = layout.label_bytes + 3 * PLANE;
    let size = fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
    if size == 0 || size % record as u64 != 0 || size > MAX_FILE_BYTES {
        let message =
            format!("{size} bytes, expected a positive multiple of {record} (CIFAR-{}), at most {MAX_FILE_BYTES}", layout.classes);
        return Err(Error::format(path, message));
    }
    let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
    let count = bytes.len() / record;
    let (mut labels, mut pixels) = (Vec::with_capacity(count), Vec::with_capacity(count * 3 * PLANE));
    for (i, image) in bytes.chunks_exact(record).enumerate() {
        let (label, planes) = image.split_at(layout.label_bytes);
        let label = label[layout.label_bytes - 1];
        if usize::from(label) >= layout.classes {
            return Err(Error::format(path, format!("image {i} has label {label}, expected less than {}", layout.classes)));
        }
        labels.push(u32::from(label));
        pixels.extend((0..PLANE).flat_map(|p| [planes[p], planes[PLANE + p], planes[2 * PLANE + p]]));
    }
    Ok((labels, pixels))
}
