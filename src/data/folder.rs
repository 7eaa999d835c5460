//! Folders of PNG and JPEG images: one sub-folder per class, or one class.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::{Dataset, OpenOptions, Skipped, Split, Store, folder_name, read_image};
use crate::{Error, Result};

/// What is said about image files without the feature that decodes them.
pub(super) const NO_DECODER: &str = "PNG and JPEG images need karat's feature `cli`; without it, expected IDX or CIFAR files";

/// Deeper nesting than this can only be a link to a folder above.
const MAX_DEPTH: usize = 16;

/// Opens a folder of images. See [`Dataset::open`].
pub(super) fn open(root: &Path, options: OpenOptions) -> Result<(Dataset, Skipped)> {
    let (train, test) = splits(root)?;
    let held_out = train.is_some() && test.is_some();
    let missing =
        |name: &str, beside: &Path| Err(Error::format(root.join(name), format!("missing: expected it beside {}", beside.display())));
    let (folder, classes_from) = match (options.split, train, test) {
        (_, None, None) => (root.to_path_buf(), None),
        (Split::Train, Some(train), _) => (train, None),
        // Both splits number the classes alike, also when one of them lacks a class.
        (Split::Test, train, Some(test)) => (test, train),
        (Split::Train, None, Some(test)) => return missing("train", &test),
        (Split::Test, Some(train), None) => return missing("test", &train),
    };
    let (direct, sub_folders) = list(&folder)?;
    let mut classes = Vec::new();
    for path in sub_folders {
        let mut files = Vec::new();
        walk(&path, 1, &mut files)?;
        classes.push((folder_name_of_class(&path), path, files));
    }
    let nested: usize = classes.iter().map(|(_, _, files)| files.len()).sum();
    if direct.is_empty() && nested == 0 {
        let expected = "expected sub-folders (one per class) with PNG or JPEG images, or images, or IDX or CIFAR files";
        return Err(Error::format(&folder, format!("holds no images: {expected}")));
    }
    let (class_names, files, labels) = if !direct.is_empty() {
        if nested > 0 {
            return Err(Error::format(&folder, "holds both images and sub-folders with images: expected one or the other"));
        }
        let count = direct.len();
        (vec![folder_name(&folder)], direct, vec![0; count])
    } else {
        label(&folder, classes, classes_from.as_deref())?
    };
    check(&folder, files, labels, options.skip_bad).map(|(files, labels, skipped)| {
        let data = Dataset { name: folder_name(root), class_names, labels, store: Store::Files(files), held_out };
        (data, skipped)
    })
}

/// The sub-folders that hold the training and the test images. `train` alone among other names is a class (the vehicle).
fn splits(root: &Path) -> Result<(Option<PathBuf>, Option<PathBuf>)> {
    const TEST: [&str; 4] = ["test", "val", "validation", "valid"];
    let sub = |name: &str| Some(root.join(name)).filter(|p| p.is_dir());
    let (train, test) = (sub("train"), TEST.into_iter().find_map(sub));
    if train.is_some() && test.is_some() {
        return Ok((train, test));
    }
    let folders = list(root)?.1;
    let all_splits = folders.iter().all(|f| f.file_name().is_some_and(|n| n == "train" || TEST.iter().any(|t| n == *t)));
    Ok(if all_splits { (train, test) } else { (None, None) })
}

/// A class: its name, its folder, its images.
type Class = (String, PathBuf, Vec<PathBuf>);

/// Class names, files, and the label of each file. The names are those of `classes_from` if there is one, else those of the
/// sub-folders themselves.
fn label(folder: &Path, classes: Vec<Class>, classes_from: Option<&Path>) -> Result<(Vec<String>, Vec<PathBuf>, Vec<u32>)> {
    let names: Vec<String> = match classes_from {
        Some(train) => list(train)?.1.iter().map(|p| folder_name_of_class(p)).collect(),
        None => classes.iter().map(|(name, _, _)| name.clone()).collect(),
    };
    let (mut files, mut labels) = (Vec::new(), Vec::new());
    for (name, path, found) in classes {
        if found.is_empty() {
            return Err(Error::format(path, "holds no PNG or JPEG images: expected at least one in each class"));
        }
        let Some(class) = names.iter().position(|n| *n == name) else {
            let message = format!("class `{name}` is not among the classes of {}", classes_from.unwrap_or(folder).display());
            return Err(Error::format(path, message));
        };
        labels.resize(labels.len() + found.len(), class as u32);
        files.extend(found);
    }
    Ok((names, files, labels))
}

fn folder_name_of_class(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The images and the sub-folders of a folder, each sorted by name; hidden entries and other files are left out.
fn list(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut images, mut folders) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        if path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b".")) {
            continue;
        }
        // Follows links; a dangling one is reported if it is called an image.
        let is_image = path.extension().is_some_and(|e| ["png", "jpg", "jpeg"].iter().any(|known| e.eq_ignore_ascii_case(known)));
        if path.is_dir() {
            folders.push(path);
        } else if is_image {
            images.push(path);
        }
    }
    images.sort();
    folders.sort();
    Ok((images, folders))
}

/// All images below a folder.
fn walk(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(Error::format(folder, format!("nested deeper than {MAX_DEPTH} folders: expected no link to a folder above")));
    }
    let (images, folders) = list(folder)?;
    files.extend(images);
    folders.iter().try_for_each(|f| walk(f, depth + 1, files))
}

/// Looks at every file once: at its first bytes, or all of it under `skip_bad`.
fn check(folder: &Path, files: Vec<PathBuf>, labels: Vec<u32>, skip_bad: bool) -> Result<(Vec<PathBuf>, Vec<u32>, Skipped)> {
    if !cfg!(feature = "cli") {
        return Err(Error::format(folder, NO_DECODER));
    }
    if !skip_bad {
        return match files.par_iter().find_map_first(|path| check_signature(path).err()) {
            Some(e) => Err(e),
            None => Ok((files, labels, Skipped::default())),
        };
    }
    let errors: Vec<Option<Error>> = files.par_iter().map(|path| check_signature(path).and_then(|()| read_image(path)).err()).collect();
    let (mut good, mut good_labels, mut skipped) = (Vec::new(), Vec::new(), Skipped::default());
    for ((path, label), error) in files.into_iter().zip(labels).zip(errors) {
        match error {
            Some(e) => skipped.files.push((path, e)),
            None => {
                good.push(path);
                good_labels.push(label);
            }
        }
    }
    if good.is_empty() {
        return Err(Error::format(folder, format!("none of {} images could be read; {}", skipped.count(), skipped.files[0].1)));
    }
    Ok((good, good_labels, skipped))
}

/// Whether the file begins as a PNG or JPEG does.
fn check_signature(path: &Path) -> Result<()> {
    let meta = fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !meta.is_file() {
        return Err(Error::format(path, "expected a PNG or JPEG file; this is not a plain file"));
    }
    if meta.len() == 0 {
        return Err(Error::format(path, "empty file, expected a PNG or JPEG image"));
    }
    let mut start = Vec::with_capacity(8);
    File::open(path).and_then(|f| f.take(8).read_to_end(&mut start)).map_err(|e| Error::io(path, e))?;
    if start.starts_with(b"\x89PNG\r\n\x1a\n") || start.starts_with(b"\xff\xd8\xff") {
        return Ok(());
    }
    Err(Error::format(path, "neither a PNG nor a JPEG image: expected one of their signatures in the first bytes"))
}
