//! `karat bench attention`: what every attention mechanism costs in time and memory as the number of tokens grows.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::{Value as Json, json};

use super::{Outcome, Report, Times, say};
use crate::case::{self, BenchSize, Op, Prepared, Problem};
use crate::cli::progress;
use crate::error::{Error, Result};
use crate::fs::write_atomic;
use crate::linalg::counted;
use crate::plot::{Chart, Series, charts_svg};
use crate::simd::{self, peak};

/// Measure the attention mechanisms, forward and backward, as the number of tokens grows
#[derive(Args)]
#[command(
    after_help = "Examples:\n  karat bench attention --svg attention.svg\n  karat bench attention attention.xca attention.softmax --tokens 196,784\n  \
                  karat bench attention attention.window:w7,h4,d32,height=56,width=56,b2@1"
)]
pub struct Attention {
    /// Mechanisms, or problems, which have sizes of their own [default: every mechanism]
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Numbers of tokens N, squares
    #[arg(long, value_delimiter = ',', default_value = "196,784,3136,12544", value_name = "N,…")]
    tokens: Vec<usize>,
    /// Width C
    #[arg(long, default_value_t = 384, value_name = "C")]
    dim: usize,
    /// Heads
    #[arg(long, default_value_t = 8, value_name = "H")]
    heads: usize,
    /// What to run
    #[arg(long, default_value = "both")]
    mode: Mode,
    /// Time per mechanism and size; at least three runs unless they take ten times as long
    #[arg(long, default_value_t = 0.5, value_name = "SECONDS")]
    seconds: f64,
    #[command(flatten)]
    report: Report,
    /// Draw time and memory against the number of tokens
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Mode {
    Forward,
    Backward,
    Both,
}

/// One mechanism at one size.
struct Point {
    name: String,
    tokens: usize,
    forward: Times,
    backward: Times,
    forward_flops: u64,
    backward_flops: u64,
    activation_bytes: Option<usize>,
    peak_bytes: usize,
}

impl Attention {
    pub(super) fn run(&self, out: &mut dyn Write) -> Result<Outcome> {
        if !(self.seconds >= 0.0 && self.seconds <= 600.0) {
            return Err(Error::usage(format!("--seconds {}: expected 0 to 600", self.seconds)));
        }
        let threads = rayon::current_num_threads();
        let peak = peak::fma_flops() * threads as f64;
        let jobs = self.jobs()?;
        if self.report.talks() {
            let machine = format!("back end {}, {threads} threads, {:.0} GFLOP/s at most", simd::isa().name(), peak / 1e9);
            say(out, format!("{machine}; one image, width {}, {} heads", self.dim, self.heads))?;
            let columns =
                format!("{:>8}{:>14}{:>14}{:>10}{:>9}{:>10}", "tokens", "forward ms", "backward ms", "GFLOP/s", "of peak", "peak MB");
            say(out, format!("{:<30}{columns}", "mechanism"))?;
        }
        let bar = progress(jobs.len() as u64, "measuring");
        let mut points = Vec::new();
        for (name, tokens, prepared) in jobs {
            bar.set_message(format!("{name} {tokens}"));
            let point = self.measure(name, tokens, &prepared()?)?;
            bar.inc(1);
            if self.report.talks() {
                bar.suspend(|| say(out, self.line(&point, peak)))?;
            }
            points.push(point);
        }
        bar.finish_and_clear();
        let exponents = self.exponents(&points);
        if self.report.talks() && !exponents.is_empty() {
            say(out, "\ntime ~ Nᵉ and peak memory ~ Nᵉ, fitted from 784 tokens on (from the first size on if that leaves one):")?;
            for (name, [time, memory]) in &exponents {
                say(out, format!("{name:<30}{time:>8.2}{memory:>8.2}"))?;
            }
        }
        if let Some(path) = &self.svg {
            write_atomic(path, charts_svg(&self.charts(&points)).as_bytes())?;
        }
        let rows: Vec<Json> = points.iter().map(|point| self.json(point, peak)).collect();
        let fitted: BTreeMap<&str, Json> =
            exponents.iter().map(|(name, [time, memory])| (name.as_str(), json!({ "time": time, "memory": memory }))).collect();
        let json = json!({
            "isa": simd::isa().name(), "threads": threads, "peak_gflops": peak / 1e9, "dim": self.dim, "heads": self.heads,
            "points": rows, "exponents": fitted,
        });
        self.report.finish(out, &json)
    }

    /// What to measure: name, tokens, and how to prepare it when its turn comes.
    #[allow(clippy::type_complexity)]
    fn jobs(&self) -> Result<Vec<(String, usize, Box<dyn Fn() -> Result<Prepared> + '_>)>> {
        let mut jobs: Vec<(String, usize, Box<dyn Fn() -> Result<Prepared>>)> = Vec::new();
        let mut chosen: Vec<&'static Op> = Vec::new();
        for name in &self.names {
            if name.contains([':', '@']) {
                let problem: Problem = name.parse()?;
                let (op, case) = (case::find(&problem.op)?, problem.case()?);
                let tokens = case.tensors.get("input.x").map_or(0, |x| x.shape().get(1).copied().unwrap_or(0));
                jobs.push((name.clone(), tokens, Box::new(move || Prepared::of_case(op, &case))));
            } else {
                chosen.push(case::find(name)?);
            }
        }
        if self.names.is_empty() {
            chosen = case::operations().iter().filter(|op| op.name.starts_with("attention.")).collect();
        }
        for op in chosen {
            let mut any = false;
            for &tokens in &self.tokens {
                let size = BenchSize { tokens, dim: self.dim, heads: self.heads };
                if let Some(benchmark) = (op.bench)(size) {
                    any = true;
                    jobs.push((op.name.into(), tokens, Box::new(move || Prepared::new(op, &benchmark, 0))));
                }
            }
            if !any && !self.names.is_empty() {
                return Err(Error::usage(format!("{}: cannot be measured at --tokens {:?}", op.name, self.tokens)));
            }
        }
        Ok(jobs)
    }

    fn measure(&self, name: String, tokens: usize, prepared: &Prepared) -> Result<Point> {
        let backward = self.mode != Mode::Forward;
        // Fills caches, pools and page tables, and counts.
        let (first, flops) = counted(|| prepared.run(backward));
        let first = first?;
        let activation_bytes = prepared.cost()?.map(|cost| cost.activation_bytes);
        let (forward_flops, backward_flops) = (first.forward_flops, flops - first.forward_flops);
        let (forward, backward_times) = Default::default();
        let mut point = Point {
            name,
            tokens,
            forward,
            backward: backward_times,
            forward_flops,
            backward_flops,
            activation_bytes,
            peak_bytes: first.peak_bytes,
        };
        let start = std::time::Instant::now();
        // Three runs at least, but of one that takes long a single one.
        let enough = |runs: usize, spent: f64| spent >= self.seconds && (runs >= 3 || runs >= 1 && spent >= 10.0 * self.seconds);
        while !enough(point.forward.0.len(), start.elapsed().as_secs_f64()) {
            let passes = prepared.run(backward)?;
            point.forward.0.push(passes.forward);
            point.backward.0.push(passes.backward);
        }
        Ok(point)
    }

    /// Seconds and operations of what was asked for.
    fn total(&self, point: &Point) -> (f64, u64) {
        match self.mode {
            Mode::Forward => (point.forward.median(), point.forward_flops),
            Mode::Backward => (point.backward.median(), point.backward_flops),
            Mode::Both => (point.forward.median() + point.backward.median(), point.forward_flops + point.backward_flops),
        }
    }

    fn line(&self, point: &Point, peak: f64) -> String {
        let (seconds, flops) = self.total(point);
        let rate = flops as f64 / seconds;
        let [forward, backward] = [&point.forward, &point.backward].map(|times| times.median() * 1e3);
        format!(
            "{:<30}{:>8}{forward:>14.3}{backward:>14.3}{:>10.1}{:>9.3}{:>10.1}",
            point.name,
            point.tokens,
            rate / 1e9,
            rate / peak,
            point.peak_bytes as f64 / 1e6
        )
    }

    fn json(&self, point: &Point, peak: f64) -> Json {
        let (seconds, flops) = self.total(point);
        json!({
            "name": point.name, "tokens": point.tokens, "forward_seconds": point.forward.0, "backward_seconds": point.backward.0,
            "forward_flops": point.forward_flops, "backward_flops": point.backward_flops, "gflops": flops as f64 / seconds / 1e9,
            "fraction_of_peak": flops as f64 / seconds / peak, "activation_bytes": point.activation_bytes, "peak_bytes": point.peak_bytes,
        })
    }

    /// Per mechanism the exponents of time and memory.
    fn exponents(&self, points: &[Point]) -> Vec<(String, [f64; 2])> {
        let mut fitted = Vec::new();
        for of_one in points.chunk_by(|a, b| a.name == b.name) {
            let large: Vec<&Point> = of_one.iter().filter(|p| p.tokens >= 784).collect();
            let used = if large.len() >= 2 { large } else { of_one.iter().collect() };
            let time = slope(used.iter().map(|p| (p.tokens as f64, self.total(p).0)));
            let memory = slope(used.iter().map(|p| (p.tokens as f64, p.peak_bytes as f64)));
            if let (Some(time), Some(memory)) = (time, memory) {
                fitted.push((of_one[0].name.clone(), [time, memory]));
            }
        }
        fitted.sort_by(|a, b| a.1[0].total_cmp(&b.1[0]));
        fitted
    }

    fn charts(&self, points: &[Point]) -> [Chart; 2] {
        let what = match self.mode {
            Mode::Forward => "forward",
            Mode::Backward => "backward",
            Mode::Both => "forward and backward",
        };
        let chart = |title: String, y_label: &str, value: &dyn Fn(&Point) -> f64| {
            let mut series: Vec<Series> = (points.chunk_by(|a, b| a.name == b.name))
                .map(|of_one| Series {
                    name: of_one[0].name.trim_start_matches("attention.").into(),
                    points: of_one.iter().map(|p| (p.tokens as f64, value(p))).collect(),
                })
                .collect();
            // The legend in the order of the right ends of the lines.
            let last = |s: &Series| s.points.last().map_or(0.0, |p| p.1);
            series.sort_by(|a, b| last(b).total_cmp(&last(a)));
            Chart { title, x_label: "tokens N".into(), y_label: y_label.into(), log_x: true, log_y: true, series }
        };
        let size = format!("one image, C = {}, {} heads", self.dim, self.heads);
        [
            chart(format!("Time, {what}: {size}"), "milliseconds", &|p| self.total(p).0 * 1e3),
            chart(format!("Peak memory, {what}: {size}"), "MB", &|p| p.peak_bytes as f64 / 1e6),
        ]
    }
}

/// The slope of the straight line that fits the logarithms best; `None` for fewer than two abscissae.
fn slope(points: impl Iterator<Item = (f64, f64)>) -> Option<f64> {
    let logs: Vec<(f64, f64)> = points.map(|(x, y)| (x.ln(), y.ln())).collect();
    let n = logs.len() as f64;
    let [mean_x, mean_y] = [logs.iter().map(|p| p.0).sum::<f64>() / n, logs.iter().map(|p| p.1).sum::<f64>() / n];
    let square: f64 = logs.iter().map(|p| (p.0 - mean_x).powi(2)).sum();
    let product: f64 = logs.iter().map(|p| (p.0 - mean_x) * (p.1 - mean_y)).sum();
    (square > 1e-9).then(|| product / square)
}

#[cfg(test)]
mod tests {
    use super::slope;

    #[test]
    fn powers_have_their_exponent() {
        assert!((slope([1.0, 4.0, 9.0, 100.0].into_iter().map(|x: f64| (x, 3.0 * x.powf(1.5)))).unwrap() - 1.5).abs() < 1e-12);
        assert!(slope([(784.0, 1.0)].into_iter()).is_none());
    }
}
