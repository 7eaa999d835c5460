//! The program's promises: exit codes, one line about what is wrong, the commands' output.
#![cfg(feature = "cli")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use karat::case::{Case, Config, Tensors, Value, operations};
use karat::tensor::{IntTensor, Tensor};

fn karat(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_karat")).args(args).env_remove("KARAT_SIMD").output().expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Runs the program; it has to exit with `code`. Returns its standard output.
fn exits(code: i32, args: &[&str]) -> String {
    let output = karat(args);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// Runs the program; it has to exit with 2, print nothing but one line of complaint that has `words` in it.
fn complains(args: &[&str], words: &[&str]) {
    let output = karat(args);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {}{said}", text(&output.stdout));
    assert!(said.starts_with("karat: ") && said.lines().count() == 1 && said.ends_with('\n'), "{args:?}: {said}");
    assert!(words.iter().all(|word| said.contains(word)), "{args:?}: {said}");
}

fn path(folder: &Path, name: &str) -> String {
    folder.join(name).to_str().expect("a UTF-8 path").to_string()
}

/// A case of an operation that no karat has.
fn stranger() -> Case {
    let mut tensors = Tensors::new();
    let x = Tensor::from_fn([3, 4], |i| i as f64 - 5.25);
    let y = Tensor::from_fn([3, 4], |i| 2.0 * i as f64 - 10.5);
    tensors.insert("input.x".into(), Value::Float(x));
    tensors.insert("output.y".into(), Value::Float(y));
    tensors.insert("output.index".into(), Value::Int(IntTensor::vector([4, 1])));
    Case { op: "test.stranger".into(), config: Config::default(), source: "by hand".into(), zero_grads: Vec::new(), tensors }
}

#[test]
fn unreadable_cases_exit_with_2_and_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let whole = path(folder.path(), "whole.safetensors");
    stranger().write(&whole).unwrap();
    let bytes = fs::read(&whole).unwrap();
    let put = |name: &str, bytes: &[u8]| {
        let path = path(folder.path(), name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let replace = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect("the text is in the header");
        [&bytes[..at], to.as_bytes(), &bytes[at + to.len()..]].concat()
    };
    complains(&["verify", &path(folder.path(), "no_such_file")], &["no_such_file"]);
    for len in [0, 7, 8, 60, bytes.len() - 1] {
        complains(&["verify", &put("truncated", &bytes[..len])], &["truncated: "]);
    }
    complains(&["verify", &put("prefix", &replace("output.y", "outptu.y"))], &["prefix: ", "`outptu.y`"]);
    complains(&["verify", &put("version", &replace(r#""karat.case":"1""#, r#""karat.case":"7""#))], &["version: ", "version `7`"]);
    complains(&["verify", &put("config", &replace(r#""config":"{}""#, r#""config":"[]""#))], &["config: ", "JSON object"]);
    complains(&["verify", &put("shape", &replace("[3,4]", "[9,4]"))], &["shape: "]);
    complains(&["case", "show", &put("text", b"just a text, not a case")], &["text: "]);
    let empty = path(folder.path(), "empty");
    fs::create_dir(&empty).unwrap();
    complains(&["verify", &empty], &["empty", ".safetensors"]);
    complains(&["verify", &whole, "--actual", &put("actual", &bytes[..20])], &["actual: "]);
    complains(&["verify", &whole, &whole, "--actual", &whole], &["one case"]);
}

#[test]
fn flipped_bits_never_crash_the_program() {
    let folder = tempfile::tempdir().unwrap();
    let file = path(folder.path(), "flipped.safetensors");
    stranger().write(&file).unwrap();
    let bytes = fs::read(&file).unwrap();
    for position in (0..bytes.len()).step_by(11) {
        let mut flipped = bytes.clone();
        flipped[position] ^= 1 << (position % 8);
        fs::write(&file, &flipped).unwrap();
        let output = karat(&["verify", &file]);
        let code = output.status.code();
        assert!(matches!(code, Some(1 | 2)), "byte {position}: {code:?}");
        assert_eq!(text(&output.stderr).lines().count(), usize::from(code == Some(2)), "{}", text(&output.stderr));
    }
}

#[test]
fn bad_usage_exits_with_2_and_one_line() {
    complains(&[], &["subcommand"]);
    complains(&["case"], &["subcommand"]);
    complains(&["verfy"], &["verfy"]);
    complains(&["verify"], &["PATH"]);
    complains(&["verify", ".", "--dtype", "f16"], &["f16", "f64"]);
    complains(&["verify", ".", "--dtype", "f64", "--actual", "x"], &["--actual"]);
    complains(&["list", "--threads", "0"], &["--threads"]);
    complains(&["case", "new", "no.such", "-o", "x"], &["no.such"]);
    complains(&["case", "new", "no.such", "--size", "batch", "-o", "x"], &["NAME=VALUE"]);
    complains(&["case", "new", "no.such", "--size", "batch=-1", "-o", "x"], &["`-1`"]);
    complains(&["case", "new", "no.such"], &["--output"]);
    let output = Command::new(env!("CARGO_BIN_EXE_karat")).arg("list").env("KARAT_SIMD", "mmx").output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr).lines().count()), (Some(2), 1), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("mmx"));
}

#[test]
fn every_command_has_help_with_an_example() {
    let judging = [&["verify"][..], &["case"], &["case", "new"], &["case", "show"], &["list"], &[]];
    let networks = [&["predict"][..], &["eval"], &["features"], &["finetune"], &["bench", "model"]];
    let training =
        [&["pretrain"][..], &["tokenizer", "train"], &["analyze", "interactions"], &["analyze", "fourier"], &["compare"], &["transfer"]];
    for command in judging.into_iter().chain(networks).chain(training) {
        let help = exits(0, &[command, &["--help"]].concat());
        assert!(help.contains("Example") && help.contains("karat "), "{command:?}: {help}");
    }
    assert!(exits(0, &["--version"]).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn operations_that_karat_lacks_fail_unless_allowed() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("sub")).unwrap();
    stranger().write(folder.path().join("sub/b.safetensors")).unwrap();
    stranger().write(folder.path().join("a.safetensors")).unwrap();
    let here = folder.path().to_str().unwrap();
    let said = exits(1, &["verify", here]);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 5, "{said}");
    assert!(
        lines[0].starts_with("unsupported")
            && lines[0].contains("f64 ")
            && lines[0].contains("test.stranger")
            && lines[0].contains("a.safetensors")
    );
    assert!(lines[3].contains("f32 ") && lines[3].contains("b.safetensors"));
    assert_eq!(lines[4], "0 passed, 0 failed, 4 unsupported");
    let said = exits(0, &["verify", here, "--allow-unsupported", "--dtype", "f32", "--threads", "2"]);
    assert!(said.ends_with("0 passed, 0 failed, 2 unsupported\n"), "{said}");
    let json: serde_json::Value = serde_json::from_str(&exits(1, &["verify", here, "--json"])).unwrap();
    assert_eq!((&json["unsupported"], json["reports"].as_array().unwrap().len()), (&4.into(), 4));
}

#[test]
fn results_of_others_are_judged() {
    let folder = tempfile::tempdir().unwrap();
    let case = path(folder.path(), "case.safetensors");
    stranger().write(&case).unwrap();
    let said = exits(0, &["verify", &case, "--actual", &case]);
    assert!(said.starts_with("ok ") && said.ends_with("1 passed, 0 failed, 0 unsupported\n"), "{said}");

    let mut wrong = stranger();
    if let Some(Value::Float(y)) = wrong.tensors.get_mut("output.y") {
        y.data_mut().iter_mut().for_each(|y| *y *= 3f64.sqrt());
    }
    let actual = path(folder.path(), "actual.safetensors");
    wrong.write(&actual).unwrap();
    let said = exits(1, &["verify", &case, "--actual", &actual]);
    assert!(said.starts_with("FAIL") && said.contains("output.y") && said.contains("√(size of axis 0)"), "{said}");
    assert!(said.ends_with("0 passed, 1 failed, 0 unsupported\n"), "{said}");
}

#[test]
fn a_case_is_shown() {
    let folder = tempfile::tempdir().unwrap();
    let case = path(folder.path(), "case.safetensors");
    stranger().write(&case).unwrap();
    let said = exits(0, &["case", "show", &case]);
    for words in ["test.stranger", "by hand", "input.x", "[3, 4]", "output.index", "1 to 4"] {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn listed_operations_make_cases_that_pass() {
    let listed = exits(0, &["list", "ops"]);
    assert_eq!(listed.lines().count(), operations().len() + 2, "one line each, a head and a foot");
    let json: serde_json::Value = serde_json::from_str(&exits(0, &["list", "--json"])).unwrap();
    assert_eq!(json.as_array().unwrap().len(), operations().len());
    let folder = tempfile::tempdir().unwrap();
    for op in operations().iter().step_by(8) {
        assert!(listed.contains(op.name) && listed.contains(op.paper));
        let file = path(folder.path(), &format!("{}.safetensors", op.name));
        exits(0, &["case", "new", op.name, "--seed", "11", "-o", &file]);
        let first = fs::read(&file).unwrap();
        exits(0, &["case", "new", op.name, "--seed", "11", "-o", &file]);
        assert_eq!(first, fs::read(&file).unwrap(), "{}: the seed decides the case", op.name);
        exits(0, &["verify", &file, "--dtype", "f64"]);
        complains(&["case", "new", op.name, "--config", "[]", "-o", &file], &["JSON object"]);
    }
}

#[test]
fn a_report_has_a_table_and_two_pictures() {
    let folder = tempfile::tempdir().expect("a folder");
    let to = folder.path().join("report");
    let to = to.to_str().expect("UTF-8");
    let said = exits(0, &["bench", "report", "xcit_micro", "coc_micro", "--batch", "2", "--repeat", "1", "--out", to]);
    let written = |name: &str| std::fs::read_to_string(folder.path().join("report").join(name)).expect(name);
    assert_eq!(written("report.md"), said);
    let rows: Vec<&str> = said.lines().skip(2).collect();
    assert!(rows.len() == 2 && rows[0].starts_with("| xcit_micro | 2 |") && rows[1].starts_with("| coc_micro | 2 |"), "{said}");
    assert!(rows.iter().all(|row| row.matches(" | ").count() == 7 && !row.contains("NaN")), "{said}");
    let json: serde_json::Value = serde_json::from_str(&written("report.json")).expect("JSON");
    assert!(json[1][1]["mode"] == "train" && json[1][1]["images_per_second"].as_f64().is_some_and(|rate| rate > 0.0), "{json}");
    assert!(["speed.svg", "memory.svg"].iter().all(|name| written(name).contains(">xcit_micro</text>")));
    let wrong = karat(&["bench", "report", "vit_nowhere", "--out", to]);
    assert!(wrong.status.code() == Some(2) && text(&wrong.stderr).contains("vit_nowhere"), "{}", text(&wrong.stderr));
}
