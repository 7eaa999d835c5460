//! The program's promise: a run that is killed, by a real kill, goes on and ends in the same files; then probe and pictures work.
#![cfg(feature = "cli")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::Duration;

use karat::data::Split;
use karat::mim::methods::{self, METHODS};
use karat::nn::Objective;
use karat::tokenizer::image::{TOKENIZER, Training, read_config};
use karat::train::{Checkpoint, TrainConfig, Trainer, saved_config};

fn karat() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_karat"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn pretrain(folder: &Path) -> Command {
    let mut command = karat();
    command.args(["pretrain", "--steps", "24", "--batch", "8", "--save-every", "3", "--seed", "7", "--out"]).arg(folder);
    command
}

fn good(output: Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout).unwrap()
}

fn bad(output: Output) -> String {
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), error.lines().count()), (Some(2), 1), "{error}");
    error
}

#[test]
fn killed_resumed_probed_and_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let (straight, killed) = (folder.path().join("straight"), folder.path().join("killed"));
    good(pretrain(&straight).args(["--threads", "1"]).output().unwrap());
    for name in ["config.toml", "metrics.jsonl", "loss.svg", "reconstruction.png", "checkpoint.safetensors", "state.safetensors"] {
        assert!(fs::metadata(straight.join(name)).unwrap().len() > 0, "{name}");
    }

    let mut child = pretrain(&killed).spawn().unwrap();
    while !killed.join("state.safetensors").exists() && child.try_wait().unwrap().is_none() {
        sleep(Duration::from_millis(1));
    }
    sleep(Duration::from_millis(15));
    let _ = child.kill();
    child.wait().unwrap();
    for _ in 0..2 {
        // Killed again; the second time perhaps in the middle of writing.
        let mut child = karat().arg("pretrain").arg("--resume").arg(&killed).spawn().unwrap();
        sleep(Duration::from_millis(25));
        let _ = child.kill();
        child.wait().unwrap();
    }
    good(karat().arg("pretrain").arg("--resume").arg(&killed).args(["--threads", "3"]).output().unwrap());
    for name in ["checkpoint.safetensors", "state.safetensors", "config.toml", "reconstruction.png", "loss.svg"] {
        assert!(fs::read(straight.join(name)).unwrap() == fs::read(killed.join(name)).unwrap(), "{name} differs");
    }
    assert!(fs::read_dir(&killed).unwrap().all(|e| !e.unwrap().file_name().to_string_lossy().ends_with(".tmp")));
    let lines = |path: &Path| fs::read_to_string(path.join("metrics.jsonl")).unwrap().lines().count();
    assert_eq!((lines(&straight), lines(&killed)), (24, 24));

    // A finished run is not trained over.
    assert!(bad(pretrain(&straight).output().unwrap()).contains("--resume"));
    let both = karat().arg("pretrain").arg("--resume").arg(&straight).args(["--seed", "1"]).output().unwrap();
    assert!(bad(both).contains("--seed"));

    let image = straight.join("reconstruction.png");
    let drawn = folder.path().join("drawn.png");
    good(karat().arg("reconstruct").arg("--from").arg(&straight).arg(&image).arg(&image).arg("-o").arg(&drawn).output().unwrap());
    assert!(fs::read(&drawn).unwrap().starts_with(b"\x89PNG"));

    // Ten images of each of two classes, as a folder of files: every test image in its own colour.
    let data = folder.path().join("data");
    for (split, class, grey) in [("train", "dark", 20), ("train", "light", 220), ("test", "dark", 30), ("test", "light", 200)] {
        let of_class = data.join(split).join(class);
        fs::create_dir_all(&of_class).unwrap();
        for i in 0..10u8 {
            image::GrayImage::from_pixel(20, 16, image::Luma([grey + i])).save(of_class.join(format!("{i}.png"))).unwrap();
        }
    }
    let table = good(karat().arg("probe").arg("--from").arg(&straight).arg("--data").arg(&data).output().unwrap());
    for kind in ["pre-trained network", "untrained network", "pixels"] {
        let line = table.lines().find(|line| line.starts_with(kind)).unwrap();
        assert!(line.contains("100.0 %"), "{table}");
    }

    // A damaged checkpoint is one line, and the file is named.
    let checkpoint = straight.join("checkpoint.safetensors");
    let mut bytes = fs::read(&checkpoint).unwrap();
    let at = bytes.len() - 5;
    bytes[at] ^= 4;
    fs::write(&checkpoint, bytes).unwrap();
    assert!(bad(karat().arg("probe").arg("--from").arg(&straight).output().unwrap()).contains("checkpoint.safetensors: tensor `"));
}

fn run_config(folder: &Path) -> TrainConfig {
    saved_config(&Checkpoint::open(folder.join("state.safetensors")).unwrap()).unwrap()
}

/// A run that stopped after two steps.
fn stop(objective: &dyn Objective, config: TrainConfig, folder: &Path) {
    let data = config.open_data(Split::Train).unwrap().0;
    let mut trainer = Trainer::new(objective, &data, config).unwrap();
    trainer.step().unwrap();
    trainer.step().unwrap();
    fs::create_dir_all(folder).unwrap();
    trainer.save(folder).unwrap();
}

fn same(a: &Path, b: &Path, files: &[&str]) {
    for name in files {
        assert!(fs::read(a.join(name)).unwrap() == fs::read(b.join(name)).unwrap(), "{}: {name} differs", a.display());
    }
}

/// Every method trains the small networks that it serves, and a run that stopped ends in the same bits; so does its tokenizer.
#[test]
fn every_method_trains_and_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    const FILES: [&str; 4] = ["checkpoint.safetensors", "state.safetensors", "config.toml", "reconstruction.png"];

    let (tokenizer, stopped) = (at("tokenizer"), at("tokenizer stopped"));
    let small = ["--steps", "3", "--batch", "4", "--codes", "16", "--width", "4", "--out"];
    let said = good(karat().args(["tokenizer", "train"]).args(small).arg(&tokenizer).output().unwrap());
    assert!(said.contains("codes in use"), "{said}");
    let config = run_config(&tokenizer);
    let training = Training::new(&read_config(&tokenizer).unwrap(), 3, config.normalization()).unwrap();
    stop(&training, config, &stopped);
    fs::copy(tokenizer.join(TOKENIZER), stopped.join(TOKENIZER)).unwrap();
    good(karat().args(["tokenizer", "train", "--threads", "1", "--resume"]).arg(&stopped).output().unwrap());
    same(&tokenizer, &stopped, &FILES);
    same(&tokenizer, &stopped, &["codebook.json"]);

    let drops = at("drops.toml");
    fs::write(&drops, "drop_path = 0.4\njitter = 0.4\nmilestones = [0.5]\n").unwrap();
    for (method, network) in METHODS.iter().flat_map(|m| m.networks.iter().map(move |n| (m, n))).filter(|(_, n)| n.name.ends_with("_micro"))
    {
        let (straight, stopped) =
            (at(&format!("{} {}", method.name, network.name)), at(&format!("{} {} stopped", method.name, network.name)));
        let mut command = karat();
        command.args(["pretrain", "--method", method.name, "--model", network.name, "--steps", "3", "--batch", "4", "--save-every", "3"]);
        if method.tokens {
            command.arg("--tokenizer").arg(&tokenizer);
        }
        if ["simmim", "a2mim", "beit"].contains(&method.name) {
            command.arg("--config").arg(&drops);
        }
        good(command.arg("--out").arg(&straight).output().unwrap());
        let config = run_config(&straight);
        let (tokenizer, normalization) = (config.tokenizer.as_ref().map(Path::new), config.normalization());
        let objective = methods::build_run(method.name, network.name, 32, None, config.drop_path, tokenizer, normalization).unwrap();
        stop(&*objective, config, &stopped);
        good(karat().args(["pretrain", "--threads", "1", "--resume"]).arg(&stopped).output().unwrap());
        same(&straight, &stopped, &FILES);
    }
    let lonely = karat().args(["pretrain", "--method", "beit", "--out"]).arg(at("lonely")).output().unwrap();
    assert!(bad(lonely).contains("karat tokenizer train"));
    let other = karat().args(["pretrain", "--method", "mae", "--model", "pvt_micro", "--out"]).arg(at("other")).output().unwrap();
    assert!(bad(other).contains("it serves vit_micro"));
}

/// A run's config.toml reproduces it; options override it; what the file gets wrong is named.
#[test]
fn configuration_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let steps = ["--steps", "2", "--batch", "4"];
    good(karat().args(["pretrain", "--model", "swin_nano", "--seed", "5"]).args(steps).arg("--out").arg(at("one")).output().unwrap());
    let from = |file: &Path| {
        let mut command = karat();
        command.arg("pretrain").arg("--config").arg(file);
        command
    };
    let file = at("one").join("config.toml");
    good(from(&file).arg("--out").arg(at("two")).output().unwrap());
    same(&at("one"), &at("two"), &["checkpoint.safetensors", "config.toml", "reconstruction.png"]);
    good(from(&file).args(["--method", "mae", "--seed", "6", "--out"]).arg(at("three")).output().unwrap());
    let config = run_config(&at("three"));
    assert_eq!((config.method.as_str(), config.model.as_str(), config.seed, config.batch), ("mae", "vit_micro", 6, 4));
    for (text, word) in [("batch = \"many\"", "batch"), ("colour = 3", "colour"), ("model = \"vit_micro\"", "swin_nano"), ("[", "bad.toml")]
    {
        fs::write(at("bad.toml"), text).unwrap();
        let error = bad(from(&at("bad.toml")).output().unwrap());
        assert!(error.contains("bad.toml") && error.contains(word), "{error}");
    }
    assert!(bad(from(&at("nowhere.toml")).output().unwrap()).contains("nowhere.toml"));
}

/// The recipes are whole: each is read and its network built, and only then the images (or the tokenizer) turn out to be missing.
#[test]
fn recipes_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/recipes");
    let mut methods = std::collections::BTreeSet::new();
    for entry in fs::read_dir(recipes).unwrap() {
        let path = entry.unwrap().path();
        let output = karat().current_dir(&folder).arg("pretrain").arg("--config").arg(&path).output().unwrap();
        let error = bad(output);
        assert!(error.starts_with("karat: imagenet: ") || error.starts_with("karat: runs/tokenizer/"), "{}: {error}", path.display());
        let text = fs::read_to_string(&path).unwrap();
        methods.extend(METHODS.iter().filter(|m| text.contains(&format!("method = \"{}\"", m.name))).map(|m| m.name));
    }
    assert_eq!(methods.len(), METHODS.len(), "{methods:?}");
}

/// Writes four training and four test images of each of `classes` shades.
fn shades(data: &Path, classes: u8) {
    for (split, brighter) in [("train", 0), ("test", 8)] {
        for class in 0..classes {
            let of_class = data.join(split).join(class.to_string());
            fs::create_dir_all(&of_class).unwrap();
            let grey = 10 + brighter + class * (220 / classes);
            for i in 0..4u8 {
                image::GrayImage::from_fn(16, 16, |x, y| image::Luma([grey + (i + 1) * ((x + y) % 3) as u8]))
                    .save(of_class.join(format!("{i}.png")))
                    .unwrap();
            }
        }
    }
}

/// A run's analyses and comparison: charts, numbers, one line per run.
#[test]
fn analysed_and_compared() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let data = at("data");
    shades(&data, 2);
    let mut runs = Vec::new();
    for (method, model) in [("greenmim", "swin_nano"), ("a2mim", "resnet_micro")] {
        let run = at(method);
        let mut command = karat();
        command.args(["pretrain", "--method", method, "--model", model, "--steps", "2", "--data"]).arg(&data);
        good(command.arg("--out").arg(&run).output().unwrap());
        // The default batch is larger than the folder.
        assert!(fs::read_to_string(run.join("config.toml")).unwrap().contains("batch = 8\n"));
        runs.push(run);
    }
    let json = |path: &Path| -> serde_json::Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let sampled = ["--images", "2", "--pairs", "1", "--contexts", "1", "--grid", "4"];
    good(karat().args(["analyze", "interactions", "--from"]).arg(&runs[0]).args(sampled).output().unwrap());
    let strength: Vec<f64> =
        json(&runs[0].join("interactions.json"))["strength"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    assert!(strength.len() == 13 && (strength.iter().sum::<f64>() / 13.0 - 1.0).abs() < 1e-9, "{strength:?}");
    for (run, sides) in runs.iter().zip([&[16, 8][..], &[8, 4, 2]]) {
        good(karat().args(["analyze", "fourier", "--images", "2", "--from"]).arg(run).output().unwrap());
        let maps = json(&run.join("fourier.json"))["maps"].clone();
        let found: Vec<u64> = maps.as_array().unwrap().iter().map(|map| map["side"].as_u64().unwrap()).collect();
        assert_eq!(found, sides);
        assert!(fs::read_to_string(run.join("fourier.svg")).unwrap().contains("stages.1"));
    }
    good(karat().arg("probe").arg("--from").arg(&runs[0]).output().unwrap());
    let chart = at("compare.svg");
    let table = good(karat().arg("compare").args(&runs).arg("-o").arg(&chart).output().unwrap());
    let row = |word: &str| table.lines().find(|line| line.contains(word)).unwrap().to_string();
    assert!(row("swin_nano").ends_with('%') && !row("resnet_micro").ends_with('%'), "{table}");
    assert!(fs::read_to_string(&chart).unwrap().contains("greenmim"));
    let error = bad(karat().arg("compare").arg(&data).arg("-o").arg(&chart).output().unwrap());
    assert!(error.contains("checkpoint.safetensors"), "{error}");
    let error =
        bad(karat().args(["analyze", "interactions", "--grid", "5", "--from"]).arg(&runs[0]).args(["--images", "1"]).output().unwrap());
    assert!(error.contains("`grid`"), "{error}");
}

/// Fine-tuning against training from scratch: what `karat finetune` finds with the first seed, runs of one network with the same
/// baseline, figures that follow from the accuracies, and what is no run of pre-training or has no classifier is refused.
#[test]
fn transferred() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let data = at("data");
    shades(&data, 10);
    let start = |method: &str, model: &str, seed: &str| {
        let run = at(&format!("{method}{seed}"));
        let mut command = karat();
        command.args(["pretrain", "--method", method, "--model", model, "--seed", seed, "--steps", "2", "--batch", "4", "--data"]);
        good(command.arg(&data).arg("--out").arg(&run).output().unwrap());
        run
    };
    let runs = [start("a2mim", "resnet_micro", "0"), start("a2mim", "resnet_micro", "1")];
    let settings = ["--steps", "8", "--batch", "5", "--lr", "0.003", "--layer-decay", "0.9"];
    let table = good(karat().args(["transfer", "--labels", "20", "--seeds", "2"]).args(settings).args(&runs).output().unwrap());
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("resnet_micro")).collect();
    assert!(rows.len() == 2 && rows.iter().all(|row| row.contains("a2mim") && row.matches('±').count() == 3), "{table}");

    let json = |path: &Path| -> serde_json::Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let found: Vec<serde_json::Value> = runs.iter().map(|run| json(&run.join("transfer.json"))).collect();
    assert_eq!(found[0]["scratch"], found[1]["scratch"]);
    assert_ne!(found[0]["finetuned"]["seeds"], found[0]["scratch"]["seeds"]);
    let seeds = |part: &str| -> Vec<f64> { found[0][part]["seeds"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect() };
    let (scratch, tuned, difference) = (seeds("scratch"), seeds("finetuned"), seeds("difference"));
    assert!(tuned.len() == 2 && (0..2).all(|s| (tuned[s] - scratch[s] - difference[s]).abs() < 1e-12), "{}", found[0]);
    assert!((found[0]["finetuned"]["mean"].as_f64().unwrap() - (tuned[0] + tuned[1]) / 2.0).abs() < 1e-12);

    let classifier = at("classifier");
    let mut command = karat();
    command.args(["finetune", "--limit", "20", "--seed", "0"]).args(settings).arg("--from").arg(&runs[0]);
    good(command.arg("--out").arg(&classifier).output().unwrap());
    let metrics = fs::read_to_string(classifier.join("metrics.jsonl")).unwrap();
    let last: serde_json::Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    assert_eq!(last["top1"].as_f64().unwrap(), tuned[0], "{metrics}");
    let compared = good(karat().args(["compare", "--json"]).arg(&runs[0]).arg("-o").arg(at("compare.svg")).output().unwrap());
    let compared: serde_json::Value = serde_json::from_str(&compared).unwrap();
    assert_eq!(compared[0]["finetune_accuracy"], found[0]["finetuned"]["mean"]);

    let refused = |run: &Path, labels: &str| bad(karat().args(["transfer", "--labels", labels]).arg(&runs[0]).arg(run).output().unwrap());
    assert!(refused(&data, "20").contains("checkpoint.safetensors"));
    assert!(refused(&classifier, "20").contains("expected one of pre-training"));
    let error = refused(&start("greenmim", "swin_nano", "0"), "20");
    assert!(error.contains("swin_nano") && error.contains("classifier"), "{error}");
    let error = refused(&runs[1], "41");
    assert!(error.contains("1 to 40"), "{error}");

    // Another classifier for the same weights, and one that they do not fit.
    let run = start("mae", "vit_micro", "0");
    let another =
        |model: &str| karat().args(["transfer", "--labels", "20", "--seeds", "1", "--steps", "2", "--model", model]).arg(&run).output();
    good(another("hpvit_micro").unwrap());
    assert_eq!(json(&run.join("transfer.json"))["classifier"], "hpvit_micro");
    let error = bad(another("cait_micro").unwrap());
    assert!(error.contains("cait_micro"), "{error}");
}
