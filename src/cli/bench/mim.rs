//! `karat bench mim`: GreenMIM's claim, measured: what a training step costs against SimMIM on the same Swin.

use std::io::Write;
use std::time::Instant;

use clap::Args;
use serde_json::json;

use super::{Outcome, Report, say};
use crate::error::{Error, Result};
use crate::mim::{MaskedModel, methods};
use crate::nn::{Batch, Params, StepKey};
use crate::simd;
use crate::tensor::random::{Purpose, Rng};
use crate::tensor::{Tensor, pool};
use crate::train::Optimizer;

/// Measure a full training step of GreenMIM against SimMIM: time and memory
#[derive(Args)]
#[command(after_help = "Example: karat bench mim --json -\n\n\
    One process, the three networks by turns, after one warm-up step each: forward, backward, AdamW. `activations` is the peak of a\n\
    step beyond parameters, gradients and moments, as the pool counts it; `peak` includes them.")]
pub struct Mim {
    /// The network
    #[arg(long, default_value = "swin_base", value_name = "NAME")]
    model: String,
    /// Images per step
    #[arg(long, default_value_t = 4, value_name = "B")]
    batch: usize,
    /// Measured steps of each
    #[arg(long, default_value_t = 3, value_name = "N")]
    repeat: usize,
    #[command(flatten)]
    report: Report,
}

/// Method and image size; the first is what the others are measured against.
const RUNS: [(&str, usize); 3] = [("greenmim", 224), ("simmim", 224), ("simmim", 192)];

struct Candidate {
    objective: Box<dyn MaskedModel>,
    images: Tensor<f32>,
    seconds: Vec<f64>,
    /// Bytes beyond the state, and with it.
    peak: [usize; 2],
}

impl Mim {
    pub(super) fn run(&self, out: &mut dyn Write) -> Result<Outcome> {
        if self.batch == 0 || self.repeat == 0 {
            return Err(Error::usage("--batch and --repeat: expected at least 1"));
        }
        let mut candidates = Vec::new();
        for (method, size) in RUNS {
            let objective = methods::build(method, &self.model, size, None)?;
            let mut rng = Rng::new(0, Purpose::Case, 0, size as u64);
            let images = Tensor::from_fn([self.batch, 3, size, size], |_| rng.normal() as f32);
            candidates.push(Candidate { objective, images, seconds: Vec::new(), peak: [0; 2] });
        }
        for turn in 0..=self.repeat {
            for candidate in &mut candidates {
                candidate.step(turn)?;
            }
        }
        let green = (median(&candidates[0].seconds), candidates[0].peak);
        if self.report.talks() {
            say(
                out,
                format!("{}, batch {}, back end {}, {} threads", self.model, self.batch, simd::isa().name(), rayon::current_num_threads()),
            )?;
            say(
                out,
                format!("{:<14}{:>12}{:>18}{:>14}{:>14}{:>16}", "", "s per step", "activations MB", "peak MB", "time ratio", "activations"),
            )?;
        }
        let mut rows = Vec::new();
        for ((method, size), c) in RUNS.iter().zip(&candidates) {
            let seconds = median(&c.seconds);
            let (ratio, saved) = (seconds / green.0, 1.0 - green.1[0] as f64 / c.peak[0] as f64);
            if self.report.talks() {
                let mb = |bytes: usize| bytes as f64 / 1e6;
                let name = format!("{method} {size}");
                say(
                    out,
                    format!(
                        "{name:<14}{seconds:>12.3}{:>18.0}{:>14.0}{ratio:>13.2}×{:>15.1}%",
                        mb(c.peak[0]),
                        mb(c.peak[1]),
                        -100.0 * saved
                    ),
                )?;
            }
            rows.push(json!({
                "method": method, "image_size": size, "seconds": c.seconds, "seconds_per_step": seconds,
                "activation_bytes": c.peak[0], "peak_bytes": c.peak[1], "time_ratio": ratio, "memory_saved_by_greenmim": saved,
            }));
        }
        let threads = rayon::current_num_threads();
        self.report
            .finish(out, &json!({ "model": self.model, "batch": self.batch, "threads": threads, "isa": simd::isa().name(), "runs": rows }))
    }
}

impl Candidate {
    /// One run of two steps from fresh parameters, the second measured; turn 0 only warms up.
    fn step(&mut self, turn: usize) -> Result<()> {
        let layout = self.objective.layout();
        let mut params = Params::<f32>::init(layout, 0);
        let mut grads = Params::zeros(layout);
        let mut optimizer = Optimizer::new(&params, (0.9, 0.95), 0.05);
        let state = pool::stats().live_bytes;
        pool::reset_peak();
        for step in 0..2 {
            let start = Instant::now();
            grads.flat_mut().fill(0.0);
            let key = StepKey { seed: 0, step: (2 * turn + step) as u64 };
            let batch = Batch { images: &self.images, labels: &[], second: None, key };
            self.objective.loss(&params, Some(&mut grads), batch)?;
            optimizer.step(&mut params, &grads, 1e-4, step as u64 + 1, 1.0);
            if step == 1 && turn > 0 {
                self.seconds.push(start.elapsed().as_secs_f64());
                let peak = pool::stats().peak_bytes;
                self.peak = [self.peak[0].max(peak - state), self.peak[1].max(peak)];
            }
        }
        Ok(())
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
