//! `karat bench gemm`: matrix products of ViT shapes against the FMA peak and against `matrixmultiply`.

use std::io::Write;

use clap::Args;
use rayon::prelude::*;
use serde_json::json;

use super::{Outcome, Report, Times, say};
use crate::error::{Error, Result};
use crate::linalg::{Epilogue, Mat, MatMut, gemm, reference_gemm_f32};
use crate::simd::{self, peak};

/// `(m, k, n)`: MLP, projections and windows of ViT and Swin at 224 pixels, and one square.
pub const SHAPES: [(usize, usize, usize); 6] =
    [(1568, 384, 1536), (1568, 1536, 384), (6272, 96, 384), (392, 192, 576), (1576, 768, 3072), (1024, 1024, 1024)];

/// Measure f32 matrix products: GFLOP/s, fraction of the FMA peak, ratio to `matrixmultiply`
#[derive(Args)]
#[command(after_help = "Example: karat bench gemm --threads 1 --json -\n\n\
    `peak` is the FMA peak of one core, measured in the same run, times the threads. Runs alternate (karat, matrixmultiply, karat, …);\n\
    `ratio` is the median over turns, GFLOP/s and `of peak` are those of the best run, and the median run in brackets.")]
pub struct Gemm {
    /// Seconds to measure each shape for, at least five turns
    #[arg(long, default_value_t = 1.0, value_name = "S")]
    seconds: f64,
    #[command(flatten)]
    report: Report,
}

impl Gemm {
    /// `threads` is what `--threads` says, and the size of the global pool if it says nothing.
    pub(super) fn run(&self, out: &mut dyn Write, threads: Option<u16>) -> Result<Outcome> {
        if !(self.seconds >= 0.0 && self.seconds <= 600.0) {
            return Err(Error::usage(format!("--seconds {}: expected 0 to 600", self.seconds)));
        }
        let threads = threads.map_or_else(rayon::current_num_threads, usize::from);
        let pools = Pools { one: pool(1)?, all: pool(threads)?, threads };
        let talks = self.report.talks();
        if talks {
            say(out, format!("back end {}, {threads} threads", simd::isa().name()))?;
            let speedup = if threads > 1 { "  speed-up over 1 thread" } else { "" };
            say(out, format!("{:<17}{:>19}{:>16}{:>24}{speedup}", "m × k × n", "GFLOP/s", "of peak", "ratio to matrixmultiply"))?;
        }
        let mut shapes = Vec::new();
        for shape in SHAPES {
            let measured = measure(shape, &pools, self.seconds);
            if talks {
                say(out, measured.line(threads))?;
            }
            shapes.push(measured.to_json(threads));
        }
        self.report.finish(out, &json!({ "isa": simd::isa().name(), "threads": threads, "shapes": shapes }))
    }
}

struct Pools {
    one: rayon::ThreadPool,
    all: rayon::ThreadPool,
    threads: usize,
}

fn pool(threads: usize) -> Result<rayon::ThreadPool> {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|e| Error::usage(format!("--threads {threads}: {e}")))
}

struct Measured {
    shape: (usize, usize, usize),
    /// Of one core, in flops per second.
    peak: f64,
    karat: Times,
    reference: Times,
    single: Times,
}

fn measure((m, k, n): (usize, usize, usize), pools: &Pools, seconds: f64) -> Measured {
    let fill = |len: usize, period: usize| -> Vec<f32> { (0..len).map(|i| ((i * 7) % period) as f32 / period as f32 - 0.5).collect() };
    let (a, b) = (fill(m * k, 1009), fill(k * n, 911));
    let (mut c, mut d) = (vec![0.0f32; m * n], vec![0.0f32; m * n]);
    let ours = |c: &mut [f32]| gemm(Mat::new(&a, m, k), Mat::new(&b, k, n), MatMut::new(c, m, n), Epilogue::default());
    // matrixmultiply runs on one thread: with more, each takes its share of the rows.
    let rows = m.div_ceil(pools.threads);
    let theirs = |d: &mut [f32]| {
        let part = |(d, a): (&mut [f32], &[f32])| {
            let rows = d.len() / n;
            reference_gemm_f32(Mat::new(a, rows, k), Mat::new(&b, k, n), MatMut::new(d, rows, n));
        };
        d.par_chunks_mut(rows * n).zip(a.par_chunks(rows * k)).for_each(part);
    };
    let mut found = Measured {
        shape: (m, k, n),
        peak: peak::fma_flops(),
        karat: Times::default(),
        reference: Times::default(),
        single: Times::default(),
    };
    let mut turn = |found: &mut Measured| {
        pools.all.install(|| found.karat.time(|| ours(&mut c)));
        pools.all.install(|| found.reference.time(|| theirs(&mut d)));
        if pools.threads > 1 {
            pools.one.install(|| found.single.time(|| ours(&mut c)));
        }
    };
    // Fills caches, pools and page tables.
    turn(&mut found);
    (found.karat, found.reference, found.single) = Default::default();
    let start = std::time::Instant::now();
    while found.karat.0.len() < 5 || start.elapsed().as_secs_f64() < seconds {
        turn(&mut found);
        // The clock changes with heat and neighbours: the peak is looked at again and again.
        if found.karat.0.len().is_multiple_of(16) {
            found.peak = found.peak.max(peak::fma_flops());
        }
    }
    found
}

impl Measured {
    fn flops(&self) -> f64 {
        let (m, k, n) = self.shape;
        2.0 * (m * k * n) as f64
    }

    fn line(&self, threads: usize) -> String {
        let (m, k, n) = self.shape;
        let peak = self.peak * threads as f64;
        let [best, usual] = [self.karat.best(), self.karat.median()].map(|seconds| self.flops() / seconds);
        let speedup = if threads > 1 { format!("{:>25.2}", self.karat.speedup_over(&self.single)) } else { String::new() };
        let ratio = self.karat.speedup_over(&self.reference);
        format!(
            "{:<17}{:>10.1} ({:>6.1}){:>8.3} ({:.3}){ratio:>24.3}{speedup}",
            format!("{m} × {k} × {n}"),
            best / 1e9,
            usual / 1e9,
            best / peak,
            usual / peak
        )
    }

    fn to_json(&self, threads: usize) -> serde_json::Value {
        let (m, k, n) = self.shape;
        let (flops, peak) = (self.flops(), self.peak * threads as f64);
        let mut json = json!({
            "m": m, "k": k, "n": n, "turns": self.karat.0.len(), "peak_gflops": peak / 1e9,
            "gflops": flops / self.karat.best() / 1e9, "gflops_median": flops / self.karat.median() / 1e9,
            "matrixmultiply_gflops": flops / self.reference.best() / 1e9, "matrixmultiply_gflops_median": flops / self.reference.median() / 1e9,
            "fraction_of_peak": flops / self.karat.best() / peak, "fraction_of_peak_median": flops / self.karat.median() / peak,
            "ratio_to_matrixmultiply": self.karat.speedup_over(&self.reference),
            "ratio_to_matrixmultiply_best": self.reference.best() / self.karat.best(),
        });
        if threads > 1 {
            json["speedup_over_one_thread"] = json!(self.karat.speedup_over(&self.single));
        }
        json
    }
}
