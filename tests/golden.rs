//! Every registered operation meets every golden case that there is for it, in both precisions, and has at least one.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use karat::case::{Case, Dtype, Verdict, operations, verify_case};
use rayon::prelude::*;

/// All golden cases below `fixtures/cases`, in order of name.
fn fixtures() -> Vec<PathBuf> {
    fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
        let Ok(entries) = fs::read_dir(folder) else { return };
        for path in entries.map(|entry| entry.expect("a readable folder").path()) {
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "safetensors") {
                files.push(path);
            }
        }
    }
    let mut files = Vec::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/cases"), &mut files);
    files.sort();
    files
}

#[test]
fn every_case_is_met_in_both_precisions() {
    let registered: BTreeSet<&str> = operations().iter().map(|op| op.name).collect();
    let check = |path: &PathBuf| -> Vec<String> {
        let case = Case::read(path).unwrap_or_else(|e| panic!("{e}"));
        if !registered.contains(case.op.as_str()) {
            return Vec::new();
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let failed = Dtype::ALL.map(|dtype| verify_case(&case, dtype)).into_iter().filter(|report| report.verdict != Verdict::Ok);
        failed.map(|report| [vec![report.line(&name)], report.details()].concat().join("\n")).collect()
    };
    let failures: Vec<String> = fixtures().par_iter().flat_map_iter(check).collect();
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn every_operation_has_a_case() {
    let covered: BTreeSet<String> = fixtures().iter().map(|path| Case::read(path).unwrap_or_else(|e| panic!("{e}")).op).collect();
    let bare: Vec<&str> = operations().iter().map(|op| op.name).filter(|name| !covered.contains(*name)).collect();
    assert!(bare.is_empty(), "operations without a golden case: {}", bare.join(", "));
}

#[test]
fn names_are_unique_and_papers_named() {
    let names: BTreeSet<&str> = operations().iter().map(|op| op.name).collect();
    assert_eq!(names.len(), operations().len(), "a name is registered twice");
    for op in operations() {
        assert!(op.name.contains('.') && !op.paper.is_empty(), "{}: {}", op.name, op.paper);
    }
}
