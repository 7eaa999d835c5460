//! Mixup and cutmix: each image of a batch takes part of another, image `B − 1 − i` for image i, and as much of its label.
//!
//! - mixup (Zhang et al., arXiv 1710.09412): `x_i ← λ x_i + (1 − λ) x_{B−1−i}`, λ ~ Beta(α, α);
//! - cutmix (Yun et al., arXiv 1905.04899): a box of `√(1 − λ)` of each side around a random pixel, cut off at the border, comes from
//!   `x_{B−1−i}`; λ becomes the exact part of the image that is left.
//!
//! One λ, and one box, per batch; where both are on, a coin decides.

use std::ops::Range;

use rayon::prelude::*;

use crate::Result;
use crate::nn::StepKey;
use crate::tensor::Tensor;
use crate::tensor::random::{Purpose, Rng};

/// How batches are mixed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mixing {
    /// α of mixup; 0 for none.
    pub mixup: f64,
    /// α of cutmix; 0 for none.
    pub cutmix: f64,
}

/// How one batch is mixed.
#[derive(Clone, Debug, PartialEq)]
pub enum Mix {
    /// Not at all.
    Nothing,
    /// With this part λ of each image itself.
    Blend(f64),
    /// A box from the other image.
    Paste {
        /// Its rows.
        rows: Range<usize>,
        /// Its columns.
        columns: Range<usize>,
        /// Side of the images.
        side: usize,
    },
}

impl Mixing {
    /// What the step `key` does to images of `side` pixels.
    pub fn draw(&self, side: usize, key: StepKey) -> Mix {
        let mut rng = Rng::new(key.seed, Purpose::Mix, key.step, 0);
        let paste = match (self.mixup > 0.0, self.cutmix > 0.0) {
            (false, false) => return Mix::Nothing,
            (true, true) => rng.chance(0.5),
            (_, cutmix) => cutmix,
        };
        let lambda = beta(if paste { self.cutmix } else { self.mixup }, &mut rng);
        if !paste {
            return Mix::Blend(lambda);
        }
        let length = ((1.0 - lambda).sqrt() * side as f64) as usize;
        let mut span = || {
            let center = rng.below(side.max(1));
            center.saturating_sub(length / 2)..(center + length / 2).min(side)
        };
        Mix::Paste { rows: span(), columns: span(), side }
    }
}

impl Mix {
    /// λ: the part of each image that is its own, and the weight of its own label.
    pub fn own(&self) -> f64 {
        match self {
            Mix::Nothing => 1.0,
            Mix::Blend(lambda) => *lambda,
            Mix::Paste { rows, columns, side } => 1.0 - (rows.len() * columns.len()) as f64 / (side * side).max(1) as f64,
        }
    }

    /// A mixed copy of `images` `[B, C, S, S]`; `None` if nothing is mixed.
    ///
    /// # Errors
    /// Unless the images have four axes.
    pub fn apply(&self, images: &Tensor<f32>) -> Result<Option<Tensor<f32>>> {
        let [b, c, h, w] = images.dims("images")?;
        let len = c * h * w;
        if *self == Mix::Nothing || len == 0 {
            return Ok(None);
        }
        let mut mixed = images.clone();
        mixed.data_mut().par_chunks_mut(len).enumerate().for_each(|(i, x)| {
            let other = &images.data()[(b - 1 - i) * len..(b - i) * len];
            match self {
                Mix::Nothing => {}
                Mix::Blend(lambda) => {
                    let (own, rest) = (*lambda as f32, (1.0 - lambda) as f32);
                    x.iter_mut().zip(other).for_each(|(x, y)| *x = own * *x + rest * y);
                }
                Mix::Paste { rows, columns, .. } => {
                    for (x, y) in x.chunks_exact_mut(h * w).zip(other.chunks_exact(h * w)) {
                        for row in rows.clone() {
                            let line = row * w + columns.start..row * w + columns.end;
                            x[line.clone()].copy_from_slice(&y[line]);
                        }
                    }
                }
            }
        });
        Ok(Some(mixed))
    }
}

/// Beta(α, α): `g / (g + g′)` of two Gamma(α) variates.
fn beta(alpha: f64, rng: &mut Rng) -> f64 {
    let (x, y) = (gamma(alpha, rng), gamma(alpha, rng));
    // Tiny α: both round to 0, and nearly all of Beta's weight is at its ends.
    if x + y > 0.0 { x / (x + y) } else { f64::from(rng.chance(0.5)) }
}

/// Gamma(α) by rejection from a cubed normal (Marsaglia & Tsang, *A simple method for generating gamma variables*, 2000).
fn gamma(alpha: f64, rng: &mut Rng) -> f64 {
    if alpha < 1.0 {
        let power = libm::pow(1.0 - rng.uniform(), 1.0 / alpha);
        return gamma(alpha + 1.0, rng) * power;
    }
    let d = alpha - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = rng.normal();
        let v = (1.0 + c * x).powi(3);
        if v > 0.0 && libm::log(1.0 - rng.uniform()) < 0.5 * x * x + d - d * v + d * libm::log(v) {
            return d * v;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean 1/2 and variance 1/(4 (2α + 1)).
    #[test]
    fn beta_moments() {
        for alpha in [0.1, 0.8, 1.0, 3.0] {
            let mut rng = Rng::new(4, Purpose::Mix, 0, 0);
            let n = 20_000;
            let draws: Vec<f64> = (0..n).map(|_| beta(alpha, &mut rng)).collect();
            let mean = draws.iter().sum::<f64>() / f64::from(n);
            let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / f64::from(n);
            let expected = 1.0 / (4.0 * (2.0 * alpha + 1.0));
            assert!((mean - 0.5).abs() < 0.012 && (variance / expected - 1.0).abs() < 0.04, "{alpha}: {mean} {variance} {expected}");
        }
        let mut rng = Rng::new(4, Purpose::Mix, 0, 0);
        assert!((0..100).map(|_| beta(1e-6, &mut rng)).all(|x| (0.0..=1.0).contains(&x)));
    }
}
