//! The learning rate of each step.

use std::f64::consts::PI;

/// What a milestone multiplies the rate by.
const DROP: f64 = 0.1;

/// Linear warm-up, then half a cosine down to `floor` (Loshchilov & Hutter, *SGDR*, 1608.03983, without restarts), or a constant that a
/// tenth is left of at each milestone.
///
/// With `s` counted from 0: `lr(s) = peak (s+1)/W` for `s < W`, else `floor + (peak − floor)(1 + cos(π (s−W)/(N−W)))/2`, or with
/// milestones `max(floor, peak · 0.1^|{m ≤ s}|)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// The largest rate.
    pub peak: f64,
    /// What the rate falls to.
    pub floor: f64,
    /// W: steps of warm-up.
    pub warmup: u64,
    /// N: all steps.
    pub steps: u64,
    /// Steps at which the rate falls to a tenth; a cosine if there are none.
    pub milestones: Vec<u64>,
}

impl Schedule {
    /// The rate of step `step`, counted from 0; `floor` after the last one.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        if step >= self.steps {
            return self.floor;
        }
        if !self.milestones.is_empty() {
            let passed = self.milestones.iter().filter(|&&milestone| milestone <= step).count();
            return (0..passed).fold(self.peak, |rate, _| rate * DROP).max(self.floor);
        }
        let progress = (step - self.warmup) as f64 / (self.steps - self.warmup) as f64;
        // `libm`, so that every machine trains with the same rate.
        self.floor + (self.peak - self.floor) * 0.5 * (1.0 + libm::cos(PI * progress))
    }
}
