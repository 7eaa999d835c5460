//! `karat bench`: measures, in one run and by turns, so that ratios hold on a busy machine.

mod attention;
mod gemm;
mod mim;
mod model;
mod peak;
mod report;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Subcommand;
use serde_json::Value as Json;

use super::{Outcome, say};
use crate::error::{Error, Result};
use crate::fs::write_atomic;

/// Measure this machine and karat on it
#[derive(Subcommand)]
#[command(arg_required_else_help = false, after_help = "Example: karat bench gemm --json -")]
pub enum Bench {
    Peak(peak::Peak),
    Gemm(gemm::Gemm),
    Attention(attention::Attention),
    Mim(mim::Mim),
    Model(model::BenchModel),
    Report(report::BenchReport),
}

impl Bench {
    pub(super) fn run(&self, out: &mut dyn Write, threads: Option<u16>) -> Result<Outcome> {
        match self {
            Bench::Peak(command) => command.run(out),
            Bench::Gemm(command) => command.run(out, threads),
            Bench::Attention(command) => command.run(out),
            Bench::Mim(command) => command.run(out),
            Bench::Model(command) => command.run(out),
            Bench::Report(command) => command.run(out, threads),
        }
    }
}

/// Where JSON goes: `-` is standard output, which then carries nothing else.
#[derive(clap::Args)]
struct Report {
    /// Write JSON to this file, or to standard output instead of the table (`-`)
    #[arg(long, value_name = "FILE|-")]
    json: Option<PathBuf>,
}

impl Report {
    /// Whether lines for people may be printed.
    fn talks(&self) -> bool {
        self.json.as_deref() != Some(Path::new("-"))
    }

    fn finish(&self, out: &mut dyn Write, json: &Json) -> Result<Outcome> {
        match &self.json {
            Some(path) if self.talks() => {
                let text = serde_json::to_string_pretty(json).map_err(|e| Error::format(path, e.to_string()))?;
                write_atomic(path, (text + "\n").as_bytes())?;
            }
            Some(_) => say(out, json)?,
            None => {}
        }
        Ok(Outcome::Good)
    }
}

/// Seconds of several runs of one thing, in the order of the runs.
#[derive(Clone, Debug, Default)]
struct Times(Vec<f64>);

impl Times {
    /// Runs and times.
    fn time(&mut self, work: impl FnOnce()) {
        let start = Instant::now();
        work();
        self.0.push(start.elapsed().as_secs_f64());
    }

    /// The shortest run: what the code can do.
    fn best(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// The median run: what it does on this machine.
    fn median(&self) -> f64 {
        median(self.0.clone())
    }

    /// The median of how many times faster `self` is than `other` in the same turn.
    fn speedup_over(&self, other: &Times) -> f64 {
        median(other.0.iter().zip(&self.0).map(|(other, own)| other / own).collect())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => 0.5 * (values[n / 2 - 1] + values[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(vec![]).is_nan());
        let (fast, slow) = (Times(vec![1.0, 2.0, 1.0]), Times(vec![3.0, 4.0, 2.0]));
        assert_eq!((fast.best(), fast.median(), fast.speedup_over(&slow)), (1.0, 1.0, 2.0));
    }
}
