//! Labelled images: the built-in set, image folders, IDX (MNIST, Fashion-MNIST) and CIFAR; augmentation; batches; npy files.
//!
//! A [`Dataset`] knows its images by index and decodes them on access; [`transform::Transform`] turns one into the floats
//! of a network's input; a [`loader::Loader`] makes batches, each a function of (seed, epoch, step) alone.
//!
//! Images are 8-bit, grey or RGB, rows first: `[height, width, channels]`.

pub mod augment;
mod cifar;
#[cfg(feature = "cli")]
mod decode;
mod folder;
mod idx;
pub mod imagenet;
pub mod loader;
pub mod npy;
mod pillow;
mod resample;
pub mod transform;

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

pub use loader::{Loader, LoaderOptions};
pub use transform::Transform;

/// No image may have more pixels than this (2²⁷): a few bytes of header must not reserve the machine's memory.
pub const MAX_PIXELS: usize = 1 << 27;

/// No IDX or CIFAR file may hold more bytes than this, unpacked (4 GiB).
pub const MAX_FILE_BYTES: u64 = 1 << 32;

/// Training or test images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Images to train on.
    Train,
    /// Images held out.
    Test,
}

/// One decoded image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image<'a> {
    /// Rows, at least 1.
    pub height: usize,
    /// Columns, at least 1.
    pub width: usize,
    /// 1 (grey) or 3 (red, green, blue).
    pub channels: usize,
    /// `[height, width, channels]`.
    pub pixels: Cow<'a, [u8]>,
}

/// What [`Dataset::open`] is to do.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Which part of the data.
    pub split: Split,
    /// Leave out files that cannot be read, instead of failing. Image folders are then decoded once, whole, on opening, so that
    /// no bad file is met later.
    pub skip_bad: bool,
}

/// The files that [`Dataset::open`] left out, each with the error that names it.
#[derive(Debug, Default)]
pub struct Skipped {
    /// In the order of the data set.
    pub files: Vec<(PathBuf, Error)>,
}

impl Skipped {
    /// How many files were left out.
    pub fn count(&self) -> usize {
        self.files.len()
    }
}

/// A labelled set of images.
#[derive(Clone, Debug)]
pub struct Dataset {
    pub(crate) name: String,
    pub(crate) class_names: Vec<String>,
    pub(crate) labels: Vec<u32>,
    pub(crate) store: Store,
    pub(crate) held_out: bool,
}

/// Where the pixels are.
#[derive(Clone, Debug)]
pub(crate) enum Store {
    /// All in memory, of one size: `[images, height, width, channels]`.
    Memory { height: usize, width: usize, channels: usize, pixels: Vec<u8> },
    /// In files, decoded on access.
    Files(Vec<PathBuf>),
}

impl Dataset {
    /// The images inside the program: the first 600 training and the first 100 test images of each of the ten classes of
    /// Fashion-MNIST, 28×28, grey.
    ///
    /// Xiao, Rasul, Vollgraf, *Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms*, 2017.
    ///
    /// # Errors
    /// None in a program built from an undamaged source tree.
    pub fn builtin(split: Split) -> Result<Dataset> {
        let (images, labels): (&[u8], &[u8]) = match split {
            Split::Train => (
                include_bytes!("../../fixtures/fashion-mnist/train-images-idx3-ubyte.gz"),
                include_bytes!("../../fixtures/fashion-mnist/train-labels-idx1-ubyte.gz"),
            ),
            Split::Test => (
                include_bytes!("../../fixtures/fashion-mnist/t10k-images-idx3-ubyte.gz"),
                include_bytes!("../../fixtures/fashion-mnist/t10k-labels-idx1-ubyte.gz"),
            ),
        };
        let path = Path::new("built-in Fashion-MNIST");
        let images = idx::read_images(path, flate2::read::MultiGzDecoder::new(images))?;
        let labels = idx::read_labels(path, flate2::read::MultiGzDecoder::new(labels))?;
        idx::dataset("fashion-mnist (built-in subset)".into(), path, images, path, labels, Some(idx::fashion_names()))
    }

    /// Opens the folder `path`, which holds one of:
    ///
    /// - **IDX files** as MNIST and Fashion-MNIST have them: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
    ///   `t10k-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`, plain or `.gz`. A file `classes.txt` (one name per line) names the classes.
    /// - **CIFAR-10** (`data_batch_*.bin`, `test_batch.bin`, `batches.meta.txt`) or **CIFAR-100** (`train.bin`, `test.bin`,
    ///   `fine_label_names.txt`; the fine labels), binary version.
    /// - **PNG and JPEG images** (feature `cli`): one sub-folder per class, in the order of their names; or images directly in the
    ///   folder, which are then one class. Sub-folders `train` and `test` (or `val`, `validation`, `valid`) are the
    ///   splits, if they exist; if not, the
    ///   same images serve as both, and [`Dataset::held_out`] says so. Other files and hidden ones are ignored. Images are
    ///   decoded on access; opening checks only that each file begins as a PNG or JPEG does (see [`OpenOptions::skip_bad`]).
    ///
    /// Returns the data set, never empty, and what was left out under `skip_bad`.
    ///
    /// # Errors
    /// One line that names the file or folder and what was expected.
    pub fn open(path: impl AsRef<Path>, options: OpenOptions) -> Result<(Dataset, Skipped)> {
        let path = path.as_ref();
        let meta = fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if !meta.is_dir() {
            return Err(Error::format(path, "expected a folder of images, IDX files or CIFAR files"));
        }
        if idx::is_idx(path) {
            return Ok((idx::open(path, options.split)?, Skipped::default()));
        }
        if cifar::is_cifar(path) {
            return cifar::open(path, options);
        }
        folder::open(path, options)
    }

    /// What to call the set: the name of its folder.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The number of images, at least 1.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are no images (never, for a data set that opened).
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The classes; a label is an index into them.
    pub fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// The class of image `index`.
    ///
    /// # Panics
    /// If `index` is not below [`Dataset::len`].
    pub fn label(&self, index: usize) -> usize {
        self.labels[index] as usize
    }

    /// The first images of each class, `limit` in all: one of each class after another until there are enough. In the order of the set.
    ///
    /// # Errors
    /// Unless `limit` is 1 to the number of images.
    pub fn balanced(&self, limit: usize) -> Result<Dataset> {
        self.drawn(limit, 0)
    }

    /// Like [`balanced`](Self::balanced), but each class leaves its first `draw` such shares out; after its last image comes its first.
    ///
    /// # Errors
    /// As [`balanced`](Self::balanced).
    pub fn drawn(&self, limit: usize, draw: u64) -> Result<Dataset> {
        if limit == 0 || limit > self.len() {
            return Err(Error::config("limit", format!("{limit}, expected 1 to {}, the images of `{}`", self.len(), self.name)));
        }
        let mut available = vec![0; self.class_names.len()];
        self.labels.iter().for_each(|&label| available[label as usize] += 1);
        let mut quota = vec![0usize; available.len()];
        let mut left = limit;
        while left > 0 {
            for (quota, available) in quota.iter_mut().zip(&available) {
                if left > 0 && *quota < *available {
                    (*quota, left) = (*quota + 1, left - 1);
                }
            }
        }
        let mut seen = vec![0; available.len()];
        let chosen: Vec<usize> = (0..self.len())
            .filter(|&i| {
                let class = self.label(i);
                let (rank, all, quota) = (seen[class], available[class], quota[class]);
                seen[class] += 1;
                // draw · quota modulo all, where the product may be large.
                let start = (u128::from(draw) * quota as u128 % all as u128) as usize;
                (rank + all - start) % all < quota
            })
            .collect();
        let store = match &self.store {
            &Store::Memory { height, width, channels, ref pixels } => {
                let size = height * width * channels;
                let pixels = chosen.iter().flat_map(|i| &pixels[i * size..(i + 1) * size]).copied().collect();
                Store::Memory { height, width, channels, pixels }
            }
            Store::Files(files) => Store::Files(chosen.iter().map(|&i| files[i].clone()).collect()),
        };
        let labels = chosen.iter().map(|&i| self.labels[i]).collect();
        let (name, class_names) = (self.name.clone(), self.class_names.clone());
        Ok(Dataset { name, class_names, labels, store, held_out: self.held_out })
    }

    /// False if the same images serve for training and test (an image folder without `train` and `test`).
    pub fn held_out(&self) -> bool {
        self.held_out
    }

    /// The file of image `index`, if it has one of its own.
    pub fn file(&self, index: usize) -> Option<&Path> {
        match &self.store {
            Store::Memory { .. } => None,
            Store::Files(files) => files.get(index).map(PathBuf::as_path),
        }
    }

    /// Image `index`, decoded.
    ///
    /// # Errors
    /// If `index` is out of range or its file cannot be decoded.
    pub fn image(&self, index: usize) -> Result<Image<'_>> {
        if index >= self.len() {
            return Err(Error::value("image index", format!("{index}, expected less than {}", self.len())));
        }
        match &self.store {
            Store::Memory { height, width, channels, pixels } => {
                let size = height * width * channels;
                let pixels = Cow::Borrowed(&pixels[index * size..(index + 1) * size]);
                Ok(Image { height: *height, width: *width, channels: *channels, pixels })
            }
            Store::Files(files) => read_image(&files[index]),
        }
    }
}

/// Decodes a PNG or JPEG file, of an animated PNG the default image. Alpha is dropped, 16 bits are rounded to 8, CMYK becomes RGB; the orientation in EXIF is ignored.
///
/// # Errors
/// If the file cannot be read, is neither PNG nor JPEG, is damaged or cut short, or has more than [`MAX_PIXELS`] pixels.
#[cfg(feature = "cli")]
pub fn read_image(path: impl AsRef<Path>) -> Result<Image<'static>> {
    decode::read(path.as_ref())
}

#[cfg(not(feature = "cli"))]
fn read_image(path: &Path) -> Result<Image<'static>> {
    Err(Error::format(path, folder::NO_DECODER))
}

/// The last component of `path`, to call a data set by.
fn folder_name(path: &Path) -> String {
    let full = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    full.file_name().map_or_else(|| full.display().to_string(), |n| n.to_string_lossy().into_owned())
}

/// The names in a text file, one per line; `None` if there is no such file.
fn read_names(path: &Path) -> Result<Option<Vec<String>>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let names: Vec<String> = text.lines().map(str::trim).filter(|l| !l.is_empty()).map(String::from).collect();
    if names.is_empty() {
        return Err(Error::format(path, "expected class names, one per line; found none"));
    }
    Ok(Some(names))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many of each class as possible, the first ones, the pixels with their labels.
    #[test]
    fn balanced_subsets() {
        let data = Dataset::builtin(Split::Test).unwrap();
        let some = data.balanced(23).unwrap();
        let counts: Vec<usize> = (0..10).map(|class| (0..23).filter(|&i| some.label(i) == class).count()).collect();
        assert_eq!(counts, [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]);
        let first: Vec<usize> = (0..data.len()).filter(|&i| data.label(i) == 4).take(2).collect();
        let got: Vec<usize> = (0..23).filter(|&i| some.label(i) == 4).collect();
        for (a, b) in first.into_iter().zip(got) {
            assert_eq!(data.image(a).unwrap(), some.image(b).unwrap());
        }
        assert_eq!(data.balanced(1000).unwrap().labels, data.labels);
        // Draws of 40 of each 100: from 0, from 40, and from 80, which goes on with the first 20.
        let fours = |data: &Dataset| (0..data.len()).filter(|&i| data.label(i) == 4).collect::<Vec<_>>();
        let all = fours(&data);
        for (draw, ranks) in [(0, (0..40).collect::<Vec<_>>()), (1, (40..80).collect()), (2, (0..20).chain(80..100).collect())] {
            let part = data.drawn(400, draw).unwrap();
            assert_eq!(part.len(), 400);
            for (rank, i) in ranks.into_iter().zip(fours(&part)) {
                assert_eq!(part.image(i).unwrap(), data.image(all[rank]).unwrap(), "draw {draw}");
            }
        }
        assert!(data.balanced(1001).unwrap_err().to_string().contains("1 to 1000") && data.balanced(0).is_err());
    }

    #[test]
    fn builtin_is_balanced_and_real() {
        for (split, per_class) in [(Split::Train, 600), (Split::Test, 100)] {
            let data = Dataset::builtin(split).unwrap();
            assert_eq!(data.len(), 10 * per_class);
            for class in 0..10 {
                assert_eq!((0..data.len()).filter(|&i| data.label(i) == class).count(), per_class);
            }
            assert_eq!(data.class_names()[0], "T-shirt/top");
            assert_eq!(data.class_names()[9], "Ankle boot");
            assert!(data.held_out());
            let image = data.image(data.len() - 1).unwrap();
            assert_eq!((image.height, image.width, image.channels, image.pixels.len()), (28, 28, 1, 784));
            assert!(data.image(data.len()).unwrap_err().to_string().contains("expected less than"));
        }
        // The first training image of Fashion-MNIST is an ankle boot; its pixel sum pins the pixels.
        let data = Dataset::builtin(Split::Train).unwrap();
        assert_eq!(data.label(0), 9);
        assert_eq!(data.image(0).unwrap().pixels.iter().map(|&p| u32::from(p)).sum::<u32>(), 76247);
    }
}
