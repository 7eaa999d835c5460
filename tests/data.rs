//! The promises of `karat::data` on files: what is good opens, what is bad is refused with one line that names the file.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use karat::data::{Dataset, OpenOptions, Skipped, Split};

fn open(path: &Path, split: Split) -> karat::Result<Dataset> {
    Dataset::open(path, OpenOptions { split, skip_bad: false }).map(|(data, skipped)| {
        assert_eq!(skipped.count(), 0);
        data
    })
}

fn open_skipping(path: &Path) -> karat::Result<(Dataset, Skipped)> {
    Dataset::open(path, OpenOptions { split: Split::Train, skip_bad: true })
}

/// Refused, in one line that contains every one of `expected`.
fn refused<T>(result: karat::Result<T>, expected: &[&str]) {
    let error = result.err().expect("must be refused").to_string();
    assert!(!error.contains('\n'), "{error}");
    for part in expected {
        assert!(error.contains(part), "`{error}` does not contain `{part}`");
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn idx(magic: u32, dims: &[u32], body: &[u8]) -> Vec<u8> {
    let mut bytes = magic.to_be_bytes().to_vec();
    dims.iter().for_each(|d| bytes.extend_from_slice(&d.to_be_bytes()));
    bytes.extend_from_slice(body);
    bytes
}

const IMAGES: &str = "train-images-idx3-ubyte";
const LABELS: &str = "train-labels-idx1-ubyte";

/// A folder with three training images of 2×3 pixels.
fn small_idx() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (images, labels) = (dir.path().join(IMAGES), dir.path().join(LABELS));
    fs::write(&images, idx(0x803, &[3, 2, 3], &(0..18).collect::<Vec<u8>>())).unwrap();
    fs::write(&labels, idx(0x801, &[3], &[4, 0, 9])).unwrap();
    (dir, images, labels)
}

/// The files that the program carries, opened from their folder, give the same data set; plain and gzip are the same.
#[test]
fn fixture_folder_equals_builtin() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/fashion-mnist");
    let plain = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&source).unwrap().map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "gz")) {
        let mut bytes = Vec::new();
        flate2::read::GzDecoder::new(fs::File::open(&entry).unwrap()).read_to_end(&mut bytes).unwrap();
        fs::write(plain.path().join(entry.file_stem().unwrap()), bytes).unwrap();
    }
    for split in [Split::Train, Split::Test] {
        let builtin = Dataset::builtin(split).unwrap();
        let (packed, unpacked) = (open(&source, split).unwrap(), open(plain.path(), split).unwrap());
        assert_eq!(packed.class_names(), builtin.class_names());
        assert_eq!(unpacked.class_names()[3], "3");
        assert_eq!((packed.len(), unpacked.len()), (builtin.len(), builtin.len()));
        for i in (0..builtin.len()).step_by(37) {
            assert_eq!(packed.image(i).unwrap(), builtin.image(i).unwrap());
            assert_eq!(unpacked.image(i).unwrap(), builtin.image(i).unwrap());
            assert_eq!((packed.label(i), unpacked.label(i)), (builtin.label(i), builtin.label(i)));
        }
    }
}

#[test]
fn idx_that_is_good() {
    let (dir, images, labels) = small_idx();
    let data = open(dir.path(), Split::Train).unwrap();
    let image = data.image(1).unwrap();
    assert_eq!((image.height, image.width, image.channels, &*image.pixels), (2, 3, 1, &[6, 7, 8, 9, 10, 11][..]));
    assert_eq!((data.label(0), data.label(2), data.class_names().len()), (4, 9, 10));
    // The other spelling in use, and classes with names.
    fs::rename(images, dir.path().join("train-images.idx3-ubyte")).unwrap();
    fs::rename(labels, dir.path().join("train-labels.idx1-ubyte")).unwrap();
    fs::write(dir.path().join("classes.txt"), "a\nb\nc\nd\ne\nf\ng\nh\ni\nlast one\n").unwrap();
    assert_eq!(open(dir.path(), Split::Train).unwrap().class_names()[9], "last one");
}

#[test]
fn idx_that_is_bad() {
    let (dir, images, labels) = small_idx();
    let path = dir.path();
    refused(open(path, Split::Test), &["t10k-images-idx3-ubyte", "missing", ".gz"]);

    let write = |bytes: Vec<u8>| fs::write(&images, bytes).unwrap();
    let body: Vec<u8> = (0..18).collect();
    write(vec![]);
    refused(open(path, Split::Train), &[IMAGES, "cut short in the header"]);
    write(idx(0x801, &[3, 2, 3], &body));
    refused(open(path, Split::Train), &[IMAGES, "magic number 0x00000803", "found 0x00000801"]);
    write(idx(0x803, &[3, 2, 3], &body[..17]));
    refused(open(path, Split::Train), &[IMAGES, "cut short", "18 bytes", "found 17"]);
    write(idx(0x803, &[2, 2, 3], &body));
    refused(open(path, Split::Train), &[IMAGES, "12 bytes", "found more"]);
    write(idx(0x803, &[2, 3, 3], &body));
    refused(open(path, Split::Train), &[LABELS, "3 labels, expected 2", IMAGES]);
    write(idx(0x803, &[0, 2, 3], &[]));
    refused(open(path, Split::Train), &[IMAGES, "0 images"]);
    // Headers that promise more than there is memory, in one image or in many.
    write(idx(0x803, &[u32::MAX, u32::MAX, u32::MAX], &body));
    refused(open(path, Split::Train), &[IMAGES, "4294967295×4294967295"]);
    write(idx(0x803, &[u32::MAX, 28, 28], &body));
    refused(open(path, Split::Train), &[IMAGES, "at most 4294967296"]);
    write(idx(0x803, &[5_000_000, 28, 28], &body));
    refused(open(path, Split::Train), &[IMAGES, "cut short", "found 18"]);

    write(idx(0x803, &[3, 2, 3], &body));
    fs::write(path.join("classes.txt"), "only\ntwo\n").unwrap();
    refused(open(path, Split::Train), &[LABELS, "label 9, expected less than 2"]);
    fs::write(path.join("classes.txt"), "\n").unwrap();
    refused(open(path, Split::Train), &["classes.txt", "found none"]);
    fs::remove_file(path.join("classes.txt")).unwrap();
    fs::remove_file(&labels).unwrap();
    refused(open(path, Split::Train), &[LABELS, "missing"]);
}

/// Every cut and every flipped byte of the packed data is noticed.
#[test]
fn idx_gz_that_is_bad() {
    let (dir, images, _) = small_idx();
    let packed = gzip(&fs::read(&images).unwrap());
    fs::remove_file(&images).unwrap();
    let path = dir.path().join(format!("{IMAGES}.gz"));
    fs::write(&path, &packed).unwrap();
    assert_eq!(open(dir.path(), Split::Train).unwrap().len(), 3);
    for cut in 0..packed.len() {
        fs::write(&path, &packed[..cut]).unwrap();
        refused(open(dir.path(), Split::Train), &["train-images-idx3-ubyte.gz"]);
    }
    // Left out, as no part of the data: flags, time and system (3 to 9), and the last byte before the 8 of checksum and length, whose
    // high bits are padding.
    let padding = packed.len() - 9;
    for at in (0..3).chain(10..padding).chain(padding + 1..packed.len()) {
        let mut bytes = packed.clone();
        bytes[at] ^= 0x10;
        fs::write(&path, bytes).unwrap();
        refused(open(dir.path(), Split::Train), &["train-images-idx3-ubyte.gz"]);
    }
    fs::write(&path, b"this is no gzip file at all").unwrap();
    refused(open(dir.path(), Split::Train), &["train-images-idx3-ubyte.gz", "gzip"]);
}

/// One CIFAR record: label bytes, then planes of one value each.
fn record(labels: &[u8], rgb: [u8; 3]) -> Vec<u8> {
    labels.iter().copied().chain(rgb.into_iter().flat_map(|v| [v; 1024])).collect()
}

#[test]
fn cifar10() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    fs::write(path.join("data_batch_2.bin"), record(&[7], [40, 50, 60])).unwrap();
    fs::write(path.join("data_batch_1.bin"), [record(&[9], [1, 2, 3]), record(&[0], [4, 5, 6])].concat()).unwrap();
    refused(open(path, Split::Test), &["test_batch.bin"]);
    let data = open(path, Split::Train).unwrap();
    assert_eq!((0..3).map(|i| data.label(i)).collect::<Vec<_>>(), [9, 0, 7]);
    let image = data.image(2).unwrap();
    assert_eq!((image.height, image.width, image.channels), (32, 32, 3));
    assert!(image.pixels.chunks(3).all(|p| p == [40, 50, 60]));
    assert_eq!(data.class_names()[9], "9");
    fs::write(path.join("batches.meta.txt"), "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n").unwrap();
    assert_eq!(open(path, Split::Train).unwrap().class_names()[9], "truck");

    fs::write(path.join("data_batch_2.bin"), &record(&[7], [0; 3])[..3072]).unwrap();
    refused(open(path, Split::Train), &["data_batch_2.bin", "3072 bytes", "multiple of 3073"]);
    let (data, skipped) = open_skipping(path).unwrap();
    assert_eq!((data.len(), skipped.count()), (2, 1));
    assert!(skipped.files[0].0.ends_with("data_batch_2.bin"));
    fs::write(path.join("data_batch_2.bin"), record(&[10], [0; 3])).unwrap();
    refused(open(path, Split::Train), &["data_batch_2.bin", "label 10", "less than 10"]);
    fs::write(path.join("data_batch_1.bin"), b"").unwrap();
    refused(open_skipping(path), &["none of 2", "data_batch_1.bin"]);
    fs::write(path.join("batches.meta.txt"), "one\n").unwrap();
    refused(open(path, Split::Train), &["batches.meta.txt", "1 class names, expected 10"]);
}

#[test]
fn cifar100_and_the_python_version() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("train.bin"), [record(&[3, 99], [1, 2, 3]), record(&[0, 5], [4, 5, 6])].concat()).unwrap();
    fs::write(dir.path().join("test.bin"), record(&[3, 98], [7, 8, 9])).unwrap();
    let (train, test) = (open(dir.path(), Split::Train).unwrap(), open(dir.path(), Split::Test).unwrap());
    assert_eq!((train.label(0), train.label(1), test.label(0), test.class_names().len()), (99, 5, 98, 100));
    assert_eq!(train.image(1).unwrap().pixels[..3], [4, 5, 6]);

    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("data_batch_1"), b"pickle").unwrap();
    refused(open(dir.path(), Split::Train), &["Python version", "data_batch_1.bin"]);
}

#[test]
fn no_folder() {
    let dir = tempfile::tempdir().unwrap();
    refused(open(&dir.path().join("nowhere"), Split::Train), &["nowhere"]);
    refused(open(dir.path(), Split::Train), &[&dir.path().display().to_string(), "no images", "one per class"]);
    let file = dir.path().join("file.png");
    fs::write(&file, b"x").unwrap();
    refused(open(&file, Split::Train), &["file.png", "expected a folder"]);
}

#[cfg(not(feature = "cli"))]
#[test]
fn images_need_the_feature() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.png"), b"\x89PNG\r\n\x1a\n").unwrap();
    refused(open(dir.path(), Split::Train), &["feature `cli`"]);
    refused(open_skipping(dir.path()), &["feature `cli`"]);
}

#[cfg(feature = "cli")]
mod images {
    use super::*;
    use karat::data::read_image;

    /// A picture whose top left pixel is `level`.
    fn save(path: PathBuf, level: u8) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let pixel = |x: u32, y: u32| image::Rgb([level + x as u8, level + y as u8, level]);
        image::RgbImage::from_fn(12, 10, pixel).save(path).unwrap();
    }

    fn names(data: &Dataset) -> Vec<String> {
        (0..data.len()).map(|i| data.file(i).unwrap().file_name().unwrap().to_str().unwrap().into()).collect()
    }

    #[test]
    fn classes_are_sub_folders() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        save(path.join("dog/b.png"), 20);
        save(path.join("dog/a.JPG"), 10);
        save(path.join("cat/deep/er/c.jpeg"), 30);
        save(path.join("train/locomotive.png"), 40);
        fs::write(path.join("dog/notes.txt"), "not an image").unwrap();
        fs::write(path.join("dog/._a.jpg"), "not an image either").unwrap();
        let data = open(path, Split::Train).unwrap();
        assert_eq!(data.class_names(), ["cat", "dog", "train"]);
        assert_eq!(names(&data), ["c.jpeg", "a.JPG", "b.png", "locomotive.png"]);
        assert_eq!((0..4).map(|i| data.label(i)).collect::<Vec<_>>(), [0, 1, 1, 2]);
        assert!(!data.held_out());
        let image = data.image(2).unwrap();
        assert_eq!((image.height, image.width, image.channels, &image.pixels[..3]), (10, 12, 3, &[20, 20, 20][..]));
        assert!(data.image(0).unwrap().pixels[0].abs_diff(30) < 8, "JPEG is close");
        assert_eq!(open(path, Split::Test).unwrap().len(), 4);
        fs::create_dir(path.join("empty")).unwrap();
        refused(open(path, Split::Train), &["empty", "at least one in each class"]);
    }

    #[test]
    fn splits_share_their_classes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        for class in ["ant", "bee", "cow"] {
            save(path.join(format!("train/{class}/1.png")), 1);
        }
        refused(open(path, Split::Test), &["test", "missing", "train"]);
        save(path.join("val/cow/2.png"), 2);
        let test = open(path, Split::Test).unwrap();
        assert_eq!((test.len(), test.label(0), test.class_names().len(), test.held_out()), (1, 2, 3, true));
        assert_eq!(open(path, Split::Train).unwrap().len(), 3);
        save(path.join("val/yak/2.png"), 2);
        refused(open(path, Split::Test), &["yak", "not among the classes", "train"]);
        fs::remove_dir_all(path.join("train")).unwrap();
        refused(open(path, Split::Train), &["train", "missing", "val"]);
    }

    #[test]
    fn flat_folder_is_one_class() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path().join("2.png"), 2);
        save(dir.path().join("1.png"), 1);
        fs::create_dir(dir.path().join("thumbnails")).unwrap();
        let data = open(dir.path(), Split::Train).unwrap();
        assert_eq!((names(&data), data.label(1), data.class_names().len()), (vec!["1.png".into(), "2.png".into()], 0, 1));
        save(dir.path().join("thumbnails/1.png"), 1);
        refused(open(dir.path(), Split::Train), &["both images and sub-folders"]);
    }

    #[cfg(unix)]
    #[test]
    fn links_in_a_circle() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path().join("class/1.png"), 1);
        std::os::unix::fs::symlink(dir.path(), dir.path().join("class/up")).unwrap();
        refused(open(dir.path(), Split::Train), &["class", "link"]);
    }

    /// Bad files: refused by name, on opening or on access; left out, with their names, under `skip_bad`.
    #[test]
    fn bad_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        save(path.join("a/good.png"), 1);
        save(path.join("a/good.jpg"), 1);
        let (png, jpg) = (fs::read(path.join("a/good.png")).unwrap(), fs::read(path.join("a/good.jpg")).unwrap());
        let flip = |bytes: &[u8], at: usize| {
            let mut bytes = bytes.to_vec();
            bytes[at] ^= 0xFF;
            bytes
        };
        let on_opening: [(&str, Vec<u8>, &str); 3] = [
            ("zero.png", vec![], "empty file"),
            ("text.jpg", b"not a picture".to_vec(), "neither a PNG nor a JPEG"),
            ("signature.png", flip(&png, 0), "neither a PNG nor a JPEG"),
        ];
        // The middle of a PNG is compressed data under a checksum.
        let on_access: [(&str, Vec<u8>, &str); 4] = [
            ("cut.png", png[..png.len() / 2].to_vec(), "not a readable"),
            ("flipped.png", flip(&png, png.len() / 2), "not a readable"),
            ("cut.jpg", jpg[..jpg.len() - 3].to_vec(), "cut short"),
            ("head.jpg", jpg[..4].to_vec(), "not a readable"),
        ];
        for (name, bytes, expected) in &on_opening {
            fs::write(path.join("a").join(name), bytes).unwrap();
            refused(open(path, Split::Train), &[name, expected]);
            fs::remove_file(path.join("a").join(name)).unwrap();
        }
        for (name, bytes, expected) in &on_access {
            fs::write(path.join("a").join(name), bytes).unwrap();
            let data = open(path, Split::Train).unwrap();
            let index = names(&data).iter().position(|n| n == name).unwrap();
            refused(data.image(index), &[name, expected]);
            refused(read_image(path.join("a").join(name)), &[name]);
        }
        for (name, bytes, _) in &on_opening {
            fs::write(path.join("a").join(name), bytes).unwrap();
        }
        fs::create_dir(path.join("a/folder.png")).unwrap();
        let (data, skipped) = open_skipping(path).unwrap();
        assert_eq!(names(&data), ["good.jpg", "good.png"]);
        let left_out: Vec<_> = skipped.files.iter().map(|(p, _)| p.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(left_out, ["cut.jpg", "cut.png", "flipped.png", "head.jpg", "signature.png", "text.jpg", "zero.png"]);
        for (path, error) in &skipped.files {
            assert!(error.to_string().contains(path.to_str().unwrap()));
        }
        fs::remove_file(path.join("a/good.png")).unwrap();
        fs::remove_file(path.join("a/good.jpg")).unwrap();
        refused(open_skipping(path), &["none of 7", "cut.jpg"]);
    }

    /// A CMYK JPEG of one colour, made with Pillow: `Image.new("RGB", (8, 8), (200, 100, 50)).convert("CMYK").save("cmyk.jpg", quality=95)`.
    #[test]
    fn cmyk_becomes_rgb() {
        let image = read_image(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/jpeg/cmyk.jpg")).unwrap();
        assert_eq!((image.height, image.width, image.channels), (8, 8, 3));
        for pixel in image.pixels.chunks(3) {
            assert!(pixel.iter().zip([200u8, 100, 50]).all(|(p, want)| p.abs_diff(want) <= 2), "{pixel:?}");
        }
    }

    /// Misnamed files are read for what they are.
    #[test]
    fn contents_decide() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path().join("1.png"), 9);
        fs::rename(dir.path().join("1.png"), dir.path().join("1.jpg")).unwrap();
        assert_eq!(open(dir.path(), Split::Train).unwrap().image(0).unwrap().pixels[0], 9);
    }
}
