//! `karat verify`: runs golden cases or judges somebody else's results.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::json;

use super::{Outcome, say};
use crate::case::{self, Case, Dtype, Report, Stock, Verdict, judge, verify_case};
use crate::error::{Error, Result};

/// Check golden cases: one line per case and precision, then a summary
#[derive(Args)]
#[command(
    after_help = "Examples:\n  karat verify fixtures/cases\n  karat verify case.safetensors --actual my_results.npz\n  karat verify attention.window:b2,h3,w7,d32,shift3@17"
)]
pub struct Verify {
    /// Golden cases, folders to search for them, or problems such as attention.window:h3,w7@17
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Run in one precision only [default: both]
    #[arg(long, conflicts_with = "actual")]
    dtype: Option<Precision>,
    /// Judge these results for the one case, instead of karat's own: a safetensors or npz file with tensors `output.y`, `grad.input.x`, …
    #[arg(long, value_name = "FILE")]
    actual: Option<PathBuf>,
    /// Operations that this karat lacks do not count as failed
    #[arg(long)]
    allow_unsupported: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Precision {
    F64,
    F32,
}

impl Verify {
    pub(super) fn run(&self, out: &mut dyn Write) -> Result<Outcome> {
        let files = cases(&self.paths)?;
        let mut tally = Tally::default();
        let mut all = Vec::new();
        if self.actual.is_some() && files.len() != 1 {
            return Err(Error::usage(format!("--actual judges results for one case; {} were given", files.len())));
        }
        for file in &files {
            let case = case::open(file)?;
            for report in self.reports(&case)? {
                let name = file.display().to_string();
                tally.add(&report);
                if self.json {
                    all.push(report.to_json(&name));
                    continue;
                }
                say(out, report.line(&name))?;
                for line in report.details() {
                    say(out, line)?;
                }
            }
        }
        let Tally { passed, failed, unsupported } = tally;
        if self.json {
            say(out, json!({ "passed": passed, "failed": failed, "unsupported": unsupported, "reports": all }))?;
        } else {
            say(out, format!("{passed} passed, {failed} failed, {unsupported} unsupported"))?;
        }
        let good = failed == 0 && (unsupported == 0 || self.allow_unsupported);
        Ok(if good { Outcome::Good } else { Outcome::CheckFailed })
    }

    fn reports(&self, case: &Case) -> Result<Vec<Report>> {
        if let Some(file) = &self.actual {
            return Ok(vec![judge(case, &Stock::read(file)?)?]);
        }
        let dtypes: &[Dtype] = match self.dtype {
            None => &Dtype::ALL,
            Some(Precision::F64) => &[Dtype::F64],
            Some(Precision::F32) => &[Dtype::F32],
        };
        Ok(dtypes.iter().map(|&dtype| verify_case(case, dtype)).collect())
    }
}

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    unsupported: usize,
}

impl Tally {
    fn add(&mut self, report: &Report) {
        match report.verdict {
            Verdict::Ok => self.passed += 1,
            Verdict::Fail => self.failed += 1,
            Verdict::Unsupported => self.unsupported += 1,
        }
    }
}

/// The files among `paths`, and all `.safetensors` files below the folders among them, in order of name.
pub(super) fn cases(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.exists() && path.to_str().is_some_and(case::looks_like_problem) {
            files.push(path.clone());
            continue;
        }
        if !fs::metadata(path).map_err(|e| Error::io(path, e))?.is_dir() {
            files.push(path.clone());
            continue;
        }
        let before = files.len();
        walk(path, &mut files)?;
        if files.len() == before {
            return Err(Error::usage(format!("{}: no .safetensors file in this folder", path.display())));
        }
    }
    Ok(files)
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let io = |e| Error::io(folder, e);
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        entries.push((entry.path(), entry.file_type().map_err(io)?.is_dir()));
    }
    entries.sort();
    for (path, is_folder) in entries {
        // Links to folders are not followed: they may lead back here.
        if is_folder {
            walk(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    Ok(())
}
