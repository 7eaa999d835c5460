//! The promises of the commands that use trained weights: `predict`, `eval` and `features`.
#![cfg(feature = "cli")]

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use image::{DynamicImage, ImageFormat, Luma, Rgb, RgbImage, Rgba};
use karat::data::read_image;
use karat::model::zoo::Model;
use karat::nn::{Checkpoint, Named, Params, write_tensors};
use karat::tensor::Tensor;
use karat::tensor::random::{Purpose, Rng};
use serde_json::{Value, json};

const MODEL: &str = "vit_micro";

fn karat(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_karat")).args(args).output().expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Runs the program, which must succeed: standard output, and standard error without the progress that a slow machine shows.
fn good(args: &[&str]) -> (String, String) {
    let output = karat(args);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
    let progress = |line: &&str| line.ends_with(" left");
    (text(&output.stdout), text(&output.stderr).lines().filter(|line| !progress(line)).map(|line| format!("{line}\n")).collect())
}

/// Runs the program, which must refuse with one line that has `words` in it.
fn complains(args: &[&str], words: &[&str]) {
    let output = karat(args);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {}{said}", text(&output.stdout));
    assert!(said.starts_with("karat: ") && said.lines().count() == 1, "{args:?}: {said}");
    assert!(words.iter().all(|word| said.contains(word)), "{args:?}: expected {words:?} in {said}");
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_string()
    }

    fn put(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.path(name);
        fs::create_dir_all(Path::new(&path).parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Weights drawn at random: file and parameters.
    fn weights(&self, model: &str, classes: usize) -> (String, Params<f32>) {
        let path = self.path(&format!("{model}-{classes}.safetensors"));
        let params = save(Path::new(&path), model, classes, &[]);
        (path, params)
    }
}

fn save(path: &Path, model: &str, classes: usize, metadata: &[(&str, String)]) -> Params<f32> {
    let built = Model::named(model, classes, None).unwrap().build().unwrap();
    let mut params = Params::init(&built.layout, 3);
    // Far from uniform predictions.
    params.flat_mut().iter_mut().for_each(|x| *x *= 3.0);
    let tensors: Vec<Named<f32>> = built.layout.params().iter().map(|e| (e.name.clone(), params.tensor(e.param))).collect();
    write_tensors(path, &tensors, metadata).unwrap();
    params
}

fn noise(height: u32, width: u32, seed: u64) -> RgbImage {
    let mut rng = Rng::new(seed, Purpose::Case, 0, 0);
    RgbImage::from_fn(width, height, |_, _| Rgb([0; 3].map(|_: u8| rng.next_u32() as u8)))
}

fn encode(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn png(image: RgbImage) -> Vec<u8> {
    encode(&image.into(), ImageFormat::Png)
}

/// Logits of one image, from the parts of the library.
fn logits(params: &Params<f32>, classes: usize, image: &str) -> Vec<f32> {
    let model = Model::named(MODEL, classes, None).unwrap();
    let transform = model.variant.eval.transform().unwrap();
    let mut x = Tensor::zeros([1, 3, model.size, model.size]);
    transform.apply(&read_image(image).unwrap(), &mut Rng::new(0, Purpose::Case, 0, 0), x.data_mut()).unwrap();
    model.build().unwrap().network.infer(params, &x).unwrap()[0].data().to_vec()
}

fn best(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap()
}

/// Lines `number name` of ImageNet's classes.
fn imagenet() -> Vec<(String, String)> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/imagenet-classes.txt")).unwrap();
    text.lines().map(|line| line.split_once(' ').unwrap()).map(|(a, b)| (a.into(), b.into())).collect()
}

/// Predictions are the network's, in the order of the arguments, whatever the batch and the threads.
#[test]
fn predictions() {
    let folder = Folder::new();
    let (weights, params) = folder.weights(MODEL, 1000);
    let images: Vec<String> =
        [(40, 31), (32, 32), (7, 90)].iter().map(|&(h, w)| folder.put(&format!("{h}.png"), &png(noise(h, w, h.into())))).collect();
    let args = |extra: &[&str]| -> String {
        let mut args = vec!["predict", "--model", MODEL, "--weights", &weights];
        args.extend(images.iter().map(String::as_str));
        args.extend(extra);
        let (said, warned) = good(&args);
        assert!(warned.is_empty(), "{warned}");
        said
    };
    let said = args(&["--json", "--top", "3"]);
    assert_eq!(said, args(&["--json", "--top", "3", "--batch", "1", "--threads", "1"]));
    assert_eq!(said, args(&["--json", "--top", "3", "--batch", "2", "--threads", "3"]));
    let found: Value = serde_json::from_str(&said).unwrap();
    let names = imagenet();
    for (image, found) in images.iter().zip(found.as_array().unwrap()) {
        assert_eq!(found["image"], image.as_str());
        let z = logits(&params, 1000, image);
        let sum: f64 = z.iter().map(|&z| f64::from(z).exp()).sum();
        let mut order: Vec<usize> = (0..1000).collect();
        order.sort_by(|&a, &b| z[b].total_cmp(&z[a]));
        let top = found["top"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        for (&class, entry) in order.iter().zip(top) {
            assert_eq!((&entry["class"], entry["name"].as_str()), (&json!(class), Some(names[class].1.as_str())));
            let want = f64::from(z[class]).exp() / sum;
            assert!((entry["probability"].as_f64().unwrap() / want - 1.0).abs() < 1e-9, "{entry} {want}");
        }
    }
    let table = args(&["--batch", "2"]);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!((lines.len(), lines[0], lines[6]), (18, images[0].as_str(), images[1].as_str()));
    assert!(lines[1].ends_with(found[0]["top"][0]["name"].as_str().unwrap()) && lines[1].contains(" %  "), "{table}");
}

#[test]
fn weights_that_do_not_fit() {
    let folder = Folder::new();
    let image = folder.put("a.png", &png(noise(9, 9, 1)));
    let (weights, _) = folder.weights(MODEL, 3);
    let predict = |more: &[&str], words: &[&str]| complains(&[&["predict", &image][..], more].concat(), words);
    let with = |file: &str, words: &[&str]| predict(&["--model", MODEL, "--weights", file], words);
    predict(&[], &["--model", "--from"]);
    predict(&["--model", MODEL], &["no weights", "--weights"]);
    predict(&["--weights", &weights], &["--model"]);
    predict(&["--model", "vit_mikro", "--weights", &weights], &["vit_mikro", "vit_micro"]);
    with(&folder.path("none.safetensors"), &["none.safetensors"]);
    with(&folder.path(""), &["folder", "--from"]);
    with(&folder.put("w.txt", b"these are no weights at all"), &["w.txt", "safetensors"]);
    with(&folder.put("empty", b""), &["empty", "0 bytes"]);
    // As `torch.save` writes now, and before version 1.6.
    with(&folder.put("a.pth", b"PK\x03\x04\0\0\x08\x08\0\0\0\0\0\0archive/data.pkl"), &["a.pth", "PyTorch", "reference/convert.py"]);
    with(&folder.put("b.pth", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M"), &["b.pth", "PyTorch", "reference/convert.py"]);
    let whole = fs::read(&weights).unwrap();
    with(&folder.put("cut", &whole[..whole.len() - 3]), &["cut", "cut short"]);
    with(&weights, &["wrong shape", "head.weight", "[3, 144]", "[1000, 144]", "--classes"]);
    predict(&["--model", MODEL, "--weights", &weights, "--classes", "0"], &["--classes"]);
    let (other, _) = folder.weights("deit_micro_distilled", 1000);
    with(&other, &["not the weights of `vit_micro`", "unexpected", "dist_token"]);
    predict(&["--model", MODEL, "--weights", &weights, "--new-head"], &["--new-head", "predicts nothing"]);
    predict(&["--model", MODEL, "--weights", &weights, "--classes", "3", "--image-size", "0"], &["size"]);
    predict(&["--model", MODEL, "--weights", &weights, "--classes", "3", "--image-size", "33"], &["33"]);
    predict(&["--model", MODEL, "--weights", &weights, "--top", "0"], &["--top"]);
    predict(&["--model", MODEL, "--weights", &weights, "--batch", "0"], &["--batch"]);
    // A network of three classes has no names for them, and no fifth.
    let (said, _) = good(&["predict", "--model", MODEL, "--weights", &weights, "--classes", "3", &image]);
    assert!(said.lines().count() == 4 && said.contains("class 2"), "{said}");
}

/// A PNG chunk.
fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let body = [kind, data].concat();
    let mut crc = flate2::Crc::new();
    crc.update(&body);
    [&(data.len() as u32).to_be_bytes()[..], &body, &crc.sum().to_be_bytes()].concat()
}

/// The PNG as the first of two frames; the second one is black.
fn animated(bytes: &[u8], height: u32, width: u32) -> Vec<u8> {
    let control = |number: u32| {
        let numbers = [number, width, height, 0, 0].map(u32::to_be_bytes).concat();
        chunk(b"fcTL", &[&numbers[..], &[0, 1, 0, 10, 0, 0]].concat())
    };
    let black = png(RgbImage::new(width, height));
    let data_of = |bytes: &[u8]| -> Vec<u8> {
        let at = bytes.windows(4).position(|w| w == b"IDAT").unwrap();
        let length = u32::from_be_bytes(bytes[at - 4..at].try_into().unwrap()) as usize;
        bytes[at + 4..at + 4 + length].to_vec()
    };
    let at = bytes.windows(4).position(|w| w == b"IDAT").unwrap() - 4;
    let second = chunk(b"fdAT", &[&2u32.to_be_bytes()[..], &data_of(&black)].concat());
    let head = [chunk(b"acTL", &[2u32, 0].map(u32::to_be_bytes).concat()), control(0)].concat();
    let end = bytes.len() - 12;
    [&bytes[..at], &head, &bytes[at..end], &control(1), &second, &bytes[end..]].concat()
}

/// Every kind of pixel becomes the same RGB: the predictions are equal.
#[test]
fn images_of_every_kind() {
    let folder = Folder::new();
    let (weights, _) = folder.weights(MODEL, 1000);
    let predict = |image: &str| {
        let said = good(&["predict", "--json", "--model", MODEL, "--weights", &weights, image]).0;
        serde_json::from_str::<Value>(&said).unwrap()[0]["top"].clone()
    };
    let (height, width) = (21, 34);
    let rgb = noise(height, width, 5);
    let plain = png(rgb.clone());
    let want = predict(&folder.put("rgb.png", &plain));
    let same = |name: &str, bytes: &[u8]| assert_eq!(predict(&folder.put(name, bytes)), want, "{name}");
    let rgba = image::RgbaImage::from_fn(width, height, |x, y| {
        let Rgb([r, g, b]) = *rgb.get_pixel(x, y);
        Rgba([r, g, b, (x * 7) as u8])
    });
    same("rgba.png", &encode(&rgba.into(), ImageFormat::Png));
    let wide = image::ImageBuffer::<Rgb<u16>, _>::from_fn(width, height, |x, y| Rgb(rgb.get_pixel(x, y).0.map(|v| u16::from(v) * 257)));
    same("16-bit.png", &encode(&wide.into(), ImageFormat::Png));
    same("animated.png", &animated(&plain, height, width));
    same("misnamed.jpg", &plain);

    let level = |x: u32, y: u32| (x * 7 + y * 3) as u8;
    let grey = image::GrayImage::from_fn(width, height, |x, y| Luma([level(x, y)]));
    let triple = RgbImage::from_fn(width, height, |x, y| Rgb([level(x, y); 3]));
    let want = predict(&folder.put("triple.png", &png(triple)));
    assert_eq!(predict(&folder.put("grey.png", &encode(&grey.clone().into(), ImageFormat::Png))), want);
    let grey16 = image::ImageBuffer::<Luma<u16>, _>::from_fn(width, height, |x, y| Luma([u16::from(level(x, y)) * 257]));
    assert_eq!(predict(&folder.put("grey16.png", &encode(&grey16.into(), ImageFormat::Png))), want);
    // JPEG: grey, and CMYK, whose one colour survives the conversion.
    predict(&folder.put("grey.jpg", &encode(&grey.into(), ImageFormat::Jpeg)));
    let cmyk = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/jpeg/cmyk.jpg");
    assert_eq!(predict(cmyk.to_str().unwrap()).as_array().unwrap().len(), 5);
}

/// Every bad image is refused by one line that names it, also behind good ones.
#[test]
fn images_that_are_none() {
    let folder = Folder::new();
    let (weights, _) = folder.weights(MODEL, 1000);
    let good_image = folder.put("good.png", &png(noise(9, 12, 1)));
    let refused = |image: &str, words: &[&str]| {
        let name = Path::new(image).file_name().unwrap().to_str().unwrap();
        complains(&["predict", "--json", "--model", MODEL, "--weights", &weights, &good_image, image], &[&[name][..], words].concat());
    };
    let whole = png(noise(40, 40, 2));
    let mut huge = whole.clone();
    huge.splice(8..33, chunk(b"IHDR", &[&[100_000u32, 100_000].map(u32::to_be_bytes).concat()[..], &[8, 2, 0, 0, 0]].concat()));
    refused(&folder.put("huge.png", &huge), &["100000×100000", "pixels"]);
    let jpeg = encode(&noise(40, 40, 2).into(), ImageFormat::Jpeg);
    let mut huge = jpeg.clone();
    let at = huge.windows(2).position(|w| w == [0xff, 0xc0]).unwrap() + 5;
    huge[at..at + 4].fill(0xff);
    refused(&folder.put("huge.jpg", &huge), &["65535×65535", "pixels"]);
    refused(&folder.put("zero.png", b""), &["empty file"]);
    refused(&folder.put("cut.png", &whole[..whole.len() / 2]), &["not a readable PNG"]);
    refused(&folder.put("cut.jpg", &jpeg[..jpeg.len() / 2]), &["cut short"]);
    refused(&folder.put("text.png", b"A picture is worth a thousand words."), &["neither a PNG nor a JPEG"]);
    refused(&folder.put("moving.gif", b"GIF89a\x01\0\x01\0\0\0\0;"), &["GIF", "PNG", "JPEG"]);
    refused(&folder.put("moving.png", b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0\0\0\0\0\0\0"), &["WEBP", "PNG", "JPEG"]);
    refused(&folder.path("missing.png"), &[]);
    fs::create_dir(folder.path("folder.png")).unwrap();
    refused(&folder.path("folder.png"), &["a folder"]);
}

/// A data set of image folders: the logits' own best class for the first image of each folder, another one for the second.
fn labelled(folder: &Folder, names: &[String], images: &[Vec<u8>]) -> String {
    for (i, (name, image)) in names.iter().zip(images).enumerate() {
        folder.put(&format!("data/{name}/{i}.png"), image);
    }
    folder.path("data")
}

#[test]
fn accuracy_with_imagenet_folders() {
    let folder = Folder::new();
    let (weights, params) = folder.weights(MODEL, 1000);
    let classes = imagenet();
    let images: Vec<Vec<u8>> = (0..3).map(|i| png(noise(33, 35 + i, 40 + u64::from(i)))).collect();
    let ranked: Vec<Vec<usize>> = images
        .iter()
        .map(|bytes| {
            let z = logits(&params, 1000, &folder.put("probe.png", bytes));
            let mut order: Vec<usize> = (0..1000).collect();
            order.sort_by(|&a, &b| z[b].total_cmp(&z[a]));
            order
        })
        .collect();
    // The first image has the label of its best class, the second of its third, the third of its last.
    let truth = [ranked[0][0], ranked[1][2], ranked[2][999]];
    let names: Vec<String> = truth.iter().map(|&class| classes[class].0.clone()).collect();
    let data = labelled(&folder, &names, &images);
    let (json, svg, matrix) = (folder.path("eval.json"), folder.path("confusion.svg"), folder.path("confusion.png"));
    let base = ["eval", "--model", MODEL, "--weights", &weights, "--data", &data];
    let (said, _) = good(&[&base[..], &["--json", &json, "--confusion", &svg, "--batch", "2"]].concat());
    assert!(said.contains("top-1    33.33 %") && said.contains("top-5    66.67 %") && said.contains("3 images"), "{said}");
    let figures: Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
    assert!((figures["top1"].as_f64().unwrap() - 1.0 / 3.0).abs() < 1e-12 && figures["images"] == 3, "{figures}");
    assert!(
        figures["peak_bytes"].as_u64().unwrap() > 4 * params.flat().len() as u64 && figures["images_per_second"].as_f64().unwrap() > 0.0
    );
    let by_class = figures["by_class"].as_array().unwrap();
    let first = by_class.iter().find(|entry| entry["class"] == truth[0]).unwrap();
    assert!(by_class.len() == 3 && first["top1"] == 1.0 && first["name"] == classes[truth[0]].1.as_str(), "{figures}");
    let drawn = fs::read_to_string(svg).unwrap();
    assert!(truth.iter().all(|&class| drawn.contains(&classes[class].1)), "{drawn}");
    good(&[&base[..], &["--confusion", &matrix]].concat());
    assert!(image::open(matrix).unwrap().width() > 100);

    complains(&["eval", "--model", MODEL, "--weights", &weights], &["--data"]);
    complains(&[&base[..], &["--confusion", "a.gif"]].concat(), &["--confusion", ".svg or .png"]);
    fs::rename(format!("{data}/{}", names[0]), format!("{data}/n99999999")).unwrap();
    complains(&base, &["3 classes", "1000", "n01440764"]);
    folder.put(&format!("data/{}/bad.png", names[1]), b"no image");
    complains(&base, &["bad.png"]);
}

fn predicted_from(checkpoint: &Path, images: &[String]) -> Value {
    let said = good(&["predict", "--json", "--from", checkpoint.to_str().unwrap(), &images[0], &images[1]]).0;
    serde_json::from_str(&said).unwrap()
}

/// A fine-tuning run knows its network, size, classes and data; classes are matched by name.
#[test]
fn runs() {
    let folder = Folder::new();
    let images: Vec<Vec<u8>> = (0..2).map(|i| png(noise(30, 41, 70 + i))).collect();
    let names = ["zebra", "ant"].map(String::from);
    let data = labelled(&folder, &names, &images);
    let config = json!({
        "method": "classification", "model": MODEL, "image_size": 32, "class_names": ["newt", "zebra", "ant"], "data": data,
        "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "lr": 0.001,
    });
    let run = PathBuf::from(folder.path("run"));
    fs::create_dir(&run).unwrap();
    let checkpoint = run.join("checkpoint.safetensors");
    let put = |config: &Value| save(&checkpoint, MODEL, 3, &[("karat", "0".into()), ("config", config.to_string())]);
    let params = put(&config);
    let from = run.to_str().unwrap();
    let images: Vec<String> = (0..2).map(|i| format!("{data}/{}/{i}.png", names[i])).collect();

    let said = good(&["predict", "--json", "--from", from, &images[0], &images[1]]).0;
    let found: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(found[0]["top"].as_array().unwrap().len(), 3);
    // The run's own normalisation: (x − 0.5) / 0.25.
    let model = Model::named(MODEL, 3, None).unwrap();
    let norm = karat::data::transform::Normalization { mean: [0.5; 3], std: [0.25; 3] };
    let transform = karat::data::Transform::evaluation(32, 3, 32, norm).unwrap();
    let mut right = 0;
    for (i, image) in images.iter().enumerate() {
        let mut x = Tensor::zeros([1, 3, 32, 32]);
        transform.apply(&read_image(image).unwrap(), &mut Rng::new(0, Purpose::Case, 0, 0), x.data_mut()).unwrap();
        let class = best(model.build().unwrap().network.infer(&params, &x).unwrap()[0].data());
        assert_eq!(found[i]["top"][0]["name"], ["newt", "zebra", "ant"][class]);
        right += usize::from(class == 1 + i);
    }
    let said = good(&["eval", "--from", from]).0;
    assert!(said.contains(&format!("top-1   {:6.2} %", 50.0 * right as f64)) && said.contains("2 images"), "{said}");

    // A checkpoint by its own name is as good as the folder.
    let best = run.join("best.safetensors");
    fs::copy(&checkpoint, &best).unwrap();
    assert_eq!(predicted_from(&best, &images), found);

    folder.put("data/yak/2.png", &png(noise(9, 9, 1)));
    complains(&["eval", "--from", from], &["`yak`"]);
    complains(&["predict", "--from", from, "--model", MODEL, &images[0]], &["--model", "--from"]);
    complains(&["predict", "--from", &folder.path("no_run"), &images[0]], &["no_run"]);
    let without = |key: &str, value: Value| {
        let mut config = config.clone();
        config[key] = value;
        put(&config);
    };
    without("class_names", Value::Null);
    complains(&["predict", "--from", from, &images[0]], &["class_names", "fine-tuning run"]);
    without("class_names", json!(["a", 7]));
    complains(&["predict", "--from", from, &images[0]], &["class_names", "strings"]);
    without("model", json!("no_such"));
    complains(&["predict", "--from", from, &images[0]], &["no_such"]);
    without("class_names", json!(["a", "b"]));
    complains(&["predict", "--from", from, &images[0]], &["head.weight"]);
    without("mean", json!([1, 2]));
    complains(&["predict", "--from", from, &images[0]], &["mean", "three"]);
    save(&checkpoint, MODEL, 3, &[]);
    complains(&["predict", "--from", from, &images[0]], &["config"]);
}

/// Features are the network's, batched along the first axis, whatever the batches.
#[test]
fn features() {
    let folder = Folder::new();
    let (weights, params) = folder.weights(MODEL, 5);
    let images: Vec<String> = (0..3).map(|i| folder.put(&format!("{i}.png"), &png(noise(20 + i, 33, u64::from(i))))).collect();
    let base = ["features", "--model", MODEL, "--weights", &weights, &images[0], &images[1], &images[2]];
    let run = |name: &str, more: &[&str]| {
        let path = folder.path(name);
        let output = good(&[&base[..], &["-o", &path], more].concat());
        (path, output.1)
    };
    let (file, warned) = run("a.safetensors", &["--classes", "5", "--batch", "2"]);
    assert!(warned.is_empty(), "{warned}");
    let (again, _) = run("b.safetensors", &["--classes", "5", "--threads", "1"]);
    assert!(fs::read(&file).unwrap() == fs::read(again).unwrap());
    let found = Checkpoint::open(&file).unwrap();
    let pooled = found.tensor("pooled").unwrap();
    assert_eq!((pooled.shape().to_vec(), found.tensor("tokens").unwrap().shape().to_vec()), (vec![3, 144], vec![3, 65, 144]));
    let scores = found.tensor("logits").unwrap();
    for (image, row) in images.iter().zip(scores.data().chunks_exact(5)) {
        assert_eq!(row, logits(&params, 5, image));
    }
    assert_eq!(serde_json::from_str::<Vec<String>>(found.meta("images").unwrap()).unwrap(), images);
    let (npy, _) = run("pooled.npy", &["--classes", "5"]);
    let array = karat::data::npy::read(npy).unwrap();
    assert!(array.shape == [3, 144] && array.data == karat::data::npy::Data::F32(pooled.data().to_vec()));

    // Without the classifier, another number of classes is no obstacle; another size has its positions resized.
    let (file, warned) = run("c.safetensors", &["--new-head", "--image-size", "48"]);
    assert!(warned.contains("pos_embed") && warned.contains("head.weight"), "{warned}");
    let found = Checkpoint::open(file).unwrap();
    assert!(!found.names().contains(&"logits".to_string()));
    assert_eq!(found.tensor("tokens").unwrap().shape().to_vec(), [3, 145, 144]);
    complains(&[&base[..], &["-o", "a.csv"]].concat(), &["a.csv", ".npy"]);
    complains(&base, &["--output"]);
    let before = fs::read_dir(folder.path("")).unwrap().count();
    complains(&[&base[..], &["--classes", "5", "-o", &folder.path("no/such/a.npy")]].concat(), &["a.npy"]);
    assert_eq!(fs::read_dir(folder.path("")).unwrap().count(), before);
}
