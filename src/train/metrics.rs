//! `metrics.jsonl`: one JSON object per optimizer step, and one per evaluation.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::evaluation::Accuracy;
use crate::{Error, Result};

/// The file's name.
pub const METRICS: &str = "metrics.jsonl";

/// What one optimizer step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    /// All steps of the run.
    pub steps: u64,
    /// The pass over the data that the step belongs to, counted from 0.
    pub epoch: u64,
    /// The loss before the step.
    pub loss: f64,
    /// The learning rate.
    pub lr: f64,
    /// The norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Images in the batch.
    pub images: usize,
    /// How long the step took.
    pub seconds: f64,
}

impl StepReport {
    /// Images per second.
    pub fn images_per_second(&self) -> f64 {
        self.images as f64 / self.seconds.max(1e-9)
    }
}

/// The file, open for appending.
pub(crate) struct Metrics {
    path: PathBuf,
    file: BufWriter<File>,
}

/// What a line reports of its step.
enum Line {
    Loss(f64),
    Accuracy([f64; 2]),
}

/// The step and loss of each line of `path` that has one, up to the first line that is not whole (a crash may have torn the last one).
pub fn read(path: &Path) -> Result<Vec<(u64, f64)>> {
    let text = fs::read(path).map_err(|e| Error::io(path, e))?;
    Ok(whole_lines(&text).filter_map(|(_, step, line)| if let Line::Loss(loss) = line { Some((step, loss)) } else { None }).collect())
}

/// The step and the accuracies, top-1 and top-5, of each evaluation in `path`.
pub fn read_accuracies(path: &Path) -> Result<Vec<(u64, [f64; 2])>> {
    let text = fs::read(path).map_err(|e| Error::io(path, e))?;
    Ok(whole_lines(&text).filter_map(|(_, step, line)| if let Line::Accuracy(top) = line { Some((step, top)) } else { None }).collect())
}

fn whole_lines(text: &[u8]) -> impl Iterator<Item = (&[u8], u64, Line)> {
    text.split_inclusive(|&b| b == b'\n').map_while(|line| {
        let value: Value = serde_json::from_slice(line.strip_suffix(b"\n")?).ok()?;
        let what = match value["loss"].as_f64() {
            Some(loss) => Line::Loss(loss),
            None => Line::Accuracy([value["top1"].as_f64()?, value["top5"].as_f64()?]),
        };
        Some((line, value["step"].as_u64()?, what))
    })
}

impl Metrics {
    /// Opens the file in `folder` and cuts off what lies beyond `step`: a resumed run writes those lines again.
    pub fn open(folder: &Path, step: u64) -> Result<Self> {
        let path = folder.join(METRICS);
        let old = if path.exists() { fs::read(&path).map_err(|e| Error::io(&path, e))? } else { Vec::new() };
        let keep: usize = whole_lines(&old).take_while(|&(_, s, _)| s <= step).map(|(line, ..)| line.len()).sum();
        if keep < old.len() {
            crate::fs::write_atomic(&path, &old[..keep])?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(|e| Error::io(&path, e))?;
        Ok(Metrics { path, file: BufWriter::new(file) })
    }

    pub fn push(&mut self, r: &StepReport) -> Result<()> {
        writeln!(
            self.file,
            "{{\"step\":{},\"epoch\":{},\"loss\":{},\"lr\":{:e},\"grad_norm\":{},\"images_per_second\":{}}}",
            r.step,
            r.epoch,
            r.loss as f32,
            r.lr,
            r.grad_norm as f32,
            r.images_per_second() as f32
        )
        .map_err(|e| Error::io(&self.path, e))
    }

    /// The accuracy on the test images after `step` steps.
    pub fn push_accuracy(&mut self, step: u64, epoch: u64, accuracy: &Accuracy) -> Result<()> {
        let (top1, top5) = accuracy.fractions();
        let line = format!("{{\"step\":{step},\"epoch\":{epoch},\"top1\":{top1},\"top5\":{top5},\"images\":{}}}", accuracy.images);
        writeln!(self.file, "{line}").map_err(|e| Error::io(&self.path, e))
    }

    /// Everything up to here is on the disk: called before the state that refers to it is.
    pub fn flush(&mut self) -> Result<()> {
        self.file.flush().and_then(|()| self.file.get_ref().sync_data()).map_err(|e| Error::io(&self.path, e))
    }
}
