//! AdamW over the flat parameter store: which parameters decay, and clipping.

use std::ops::Range;

use crate::kernel::optim::AdamW;
use crate::kernel::reduce;
use crate::nn::{Entry, Layout, Params};

/// Tables and tokens that published recipes leave out of weight decay; a name counts if it contains one of these.
const NO_DECAY: [&str; 3] = ["relative_position_bias_table", "pos_embed", "token"];

/// Whether weight decay applies: not to vectors (norms, biases), not to position tables and tokens.
pub fn decays(entry: &Entry) -> bool {
    entry.param.shape().len() > 1 && !NO_DECAY.iter().any(|part| entry.name.contains(part))
}

/// The flat store cut into the longest runs that are treated alike: `(range, whether it decays)`.
pub fn decay_runs(layout: &Layout) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    for entry in layout.params() {
        let (start, end) = (entry.param.offset(), entry.param.offset() + entry.param.numel());
        match runs.last_mut() {
            // The padding between two parameters is zero in every buffer and stays so: a run may span it.
            Some((range, decay)) if *decay == decays(entry) => range.end = end,
            _ => runs.push((start..end, decays(entry))),
        }
    }
    runs
}

/// The AdamW optimizer: its moments and how often it has stepped.
pub struct Optimizer {
    runs: Vec<(Range<usize>, bool)>,
    pub(crate) m: Params<f32>,
    pub(crate) v: Params<f32>,
    betas: (f64, f64),
    weight_decay: f64,
}

impl Optimizer {
    /// An optimizer whose moments are zero.
    pub fn new(params: &Params<f32>, betas: (f64, f64), weight_decay: f64) -> Self {
        let layout = params.layout();
        Optimizer { runs: decay_runs(layout), m: Params::zeros(layout), v: Params::zeros(layout), betas, weight_decay }
    }

    /// Steps `params` along `grad_scale · grads`; `step` counts from 1.
    pub fn step(&mut self, params: &mut Params<f32>, grads: &Params<f32>, lr: f64, step: u64, grad_scale: f64) {
        for (range, decay) in &self.runs {
            let weight_decay = if *decay { self.weight_decay } else { 0.0 };
            let adamw = AdamW { lr, betas: self.betas, eps: 1e-8, weight_decay, step, grad_scale };
            let r = range.clone();
            adamw.step(
                &mut params.flat_mut()[r.clone()],
                &mut self.m.flat_mut()[r.clone()],
                &mut self.v.flat_mut()[r.clone()],
                &grads.flat()[r],
            );
        }
    }
}

/// The global norm of the gradient, and the factor that brings it to at most `clip` (0: no clipping).
pub fn clip(grads: &Params<f32>, clip: f64) -> (f64, f64) {
    let norm = reduce::dot(grads.flat(), grads.flat()).sqrt();
    (norm, if clip > 0.0 && norm > clip { clip / norm } else { 1.0 })
}
