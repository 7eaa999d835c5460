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

/// A stretch of the flat store whose parameters are treated alike.
struct Run {
    range: Range<usize>,
    decay: bool,
    /// The factor on the learning rate.
    rate: f64,
}

/// The longest runs.
fn runs(layout: &Layout, rate: impl Fn(&Entry) -> f64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for entry in layout.params() {
        let (start, end) = (entry.param.offset(), entry.param.offset() + entry.param.numel());
        let (decay, rate) = (decays(entry), rate(entry));
        match runs.last_mut() {
            // The padding between two parameters is zero in every buffer and stays so: a run may span it.
            Some(run) if run.decay == decay && run.rate == rate => run.range.end = end,
            _ => runs.push(Run { range: start..end, decay, rate }),
        }
    }
    runs
}

/// The flat store cut into the longest runs of equal decay: `(range, whether it decays)`.
pub fn decay_runs(layout: &Layout) -> Vec<(Range<usize>, bool)> {
    runs(layout, |_| 1.0).into_iter().map(|run| (run.range, run.decay)).collect()
}

/// The AdamW optimizer: its moments and how often it has stepped.
pub struct Optimizer {
    runs: Vec<Run>,
    pub(crate) m: Params<f32>,
    pub(crate) v: Params<f32>,
    betas: (f64, f64),
    weight_decay: f64,
}

impl Optimizer {
    /// An optimizer whose moments are zero.
    pub fn new(params: &Params<f32>, betas: (f64, f64), weight_decay: f64) -> Self {
        Self::with_rates(params, betas, weight_decay, |_| 1.0)
    }

    /// The same, with a factor on the learning rate of each parameter.
    pub fn with_rates(params: &Params<f32>, betas: (f64, f64), weight_decay: f64, rate: impl Fn(&Entry) -> f64) -> Self {
        let layout = params.layout();
        Optimizer { runs: runs(layout, rate), m: Params::zeros(layout), v: Params::zeros(layout), betas, weight_decay }
    }

    /// Steps `params` along `grad_scale · grads`; `step` counts from 1.
    pub fn step(&mut self, params: &mut Params<f32>, grads: &Params<f32>, lr: f64, step: u64, grad_scale: f64) {
        for Run { range, decay, rate } in &self.runs {
            let weight_decay = if *decay { self.weight_decay } else { 0.0 };
            let adamw = AdamW { lr: lr * rate, betas: self.betas, eps: 1e-8, weight_decay, step, grad_scale };
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
