//! `karat bench model`: images per second of a whole network, in inference and in training.

use std::io::Write;
use std::time::Instant;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::{Outcome, Report, median, say};
use crate::error::{Error, Result};
use crate::linalg::counted;
use crate::model::zoo::Model;
use crate::nn::{Batch, Objective, Params, Pass, StepKey};
use crate::simd::{self, peak};
use crate::tensor::random::{Purpose, Rng};
use crate::tensor::{Tensor, pool};
use crate::train::{Classification, FineTune, Optimizer};

/// Measure a network: images per second, GFLOP/s, fraction of the FMA peak, memory
#[derive(Args)]
#[command(after_help = "Example: karat bench model deit_small_patch16_224 --mode train --batch 8 --json -\n\n\
    A training step is forward, cross-entropy, backward and AdamW. One step more, not reported, warms up. `gflops` counts the products that\n\
    karat does (see `karat list models` for the papers' counts); memory is the process's largest resident set.")]
pub struct BenchModel {
    /// The network (`karat list models`)
    name: String,
    /// What to measure
    #[arg(long, default_value = "infer")]
    mode: Mode,
    /// Images per step
    #[arg(long, default_value_t = 8, value_name = "B")]
    batch: usize,
    /// Measured steps
    #[arg(long, default_value_t = 5, value_name = "R")]
    repeat: usize,
    /// Side of the images in pixels [default: as published]
    #[arg(long, value_name = "N")]
    image_size: Option<usize>,
    /// Run each block again in the backward pass, instead of keeping what it needs
    #[arg(long)]
    recompute: bool,
    #[command(flatten)]
    report: Report,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    Infer,
    Train,
}

impl BenchModel {
    pub(super) fn run(&self, out: &mut dyn Write) -> Result<Outcome> {
        const CLASSES: usize = 1000;
        if self.batch == 0 || self.repeat == 0 {
            return Err(Error::usage("--batch and --repeat: expected at least 1"));
        }
        let empty = peak_resident();
        let model = Model::named(&self.name, CLASSES, self.image_size)?;
        let class_names = (0..CLASSES).map(|class| class.to_string()).collect();
        let classifier = Classification::new(&model, &FineTune { class_names, ..FineTune::default() })?;
        let mut params = Params::<f32>::init(classifier.layout(), 0);
        if self.mode == Mode::Infer {
            params = params.packing();
        }
        let mut rng = Rng::new(0, Purpose::Case, 0, 0);
        let images = Tensor::from_fn([self.batch, 3, model.size, model.size], |_| rng.normal() as f32);
        let labels: Vec<usize> = (0..self.batch).map(|i| i * 37 % CLASSES).collect();
        let mut training =
            (self.mode == Mode::Train).then(|| (Params::<f32>::zeros(classifier.layout()), Optimizer::new(&params, (0.9, 0.999), 0.05)));
        let mut step = |step: u64| -> Result<()> {
            let Some((grads, optimizer)) = &mut training else {
                return classifier.logits(&params, &images).map(drop);
            };
            grads.flat_mut().fill(0.0);
            let key = StepKey { seed: 0, step };
            let pass = Pass::Train { key, recompute: self.recompute };
            let batch = Batch { images: &images, second: None, labels: &labels, key };
            let loss = classifier.loss(&params.run_as(pass), Some(grads), batch)?;
            optimizer.step(&mut params, grads, 1e-4, step + 1, 1.0);
            params.update(&loss.updates);
            Ok(())
        };
        let (warm, flops) = counted(|| step(0));
        warm?;
        let mut seconds = Vec::with_capacity(self.repeat);
        for i in 0..self.repeat {
            let start = Instant::now();
            step(i as u64 + 1)?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        let threads = rayon::current_num_threads();
        let time = median(seconds.clone());
        let (rate, gflops) = (self.batch as f64 / time, flops as f64 / time / 1e9);
        let fraction = gflops * 1e9 / (peak::fma_flops() * threads as f64);
        let (resident, activations) = (peak_resident(), pool::stats().peak_bytes);
        let mode = if self.mode == Mode::Train { "train" } else { "infer" };
        if self.report.talks() {
            let megabytes = resident.map_or("unknown".into(), |bytes| format!("{:.0} MB", bytes as f64 / 1e6));
            say(
                out,
                format!(
                    "{} {mode}, batch {}, {} pixels, back end {}, {threads} threads: {rate:.2} images/s, {gflops:.0} GFLOP/s, {:.0} % of \
                     the FMA peak, {megabytes} resident",
                    model.variant.name,
                    self.batch,
                    model.size,
                    simd::isa().name(),
                    100.0 * fraction
                ),
            )?;
        }
        self.report.finish(
            out,
            &json!({
                "name": model.variant.name, "mode": mode, "batch": self.batch, "image_size": model.size, "threads": threads,
                "simd": simd::isa().name(), "recompute": self.recompute, "seconds": seconds, "images_per_second": rate, "gflops": gflops,
                "fraction_of_peak": fraction, "peak_rss_bytes": resident, "base_rss_bytes": empty, "peak_pool_bytes": activations,
            }),
        )
    }
}

/// The largest resident set that this process has had, where the system tells.
fn peak_resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? * 1024)
}
