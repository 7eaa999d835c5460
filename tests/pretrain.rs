//! The program's promise: a run that is killed, by a real kill, goes on and ends in the same files; then probe and pictures work.
#![cfg(feature = "cli")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::Duration;

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
