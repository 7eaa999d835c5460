//! Drop path, or stochastic depth (Huang et al., arXiv 1603.09382): in training, the residual branch of an image is left out with
//! probability `rate`: `y_i = x_i + f_i δ_i / (1 − rate)`, `δ_i ∈ {0, 1}` per image.
//!
//! `δ` is drawn from counters (seed, step, layer, image): the backward pass, and a block that is run again, draw the same.

use rayon::prelude::*;

use super::{Names, Params, Pass};
use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::tensor::random::{Purpose, Rng};
use crate::tensor::{Float, Tensor};

/// The drop path of one residual branch.
#[derive(Clone, Copy, Debug)]
pub struct DropPath {
    rate: f64,
    stream: u64,
}

impl DropPath {
    /// Drops with probability `rate`, from a random stream of its own.
    ///
    /// # Errors
    /// Unless 0 ≤ `rate` < 1.
    pub fn new(names: &mut Names, rate: f64) -> Result<Self> {
        if !(0.0..1.0).contains(&rate) {
            return Err(Error::config("drop_path_rate", format!("expected at least 0 and less than 1, found {rate}")));
        }
        Ok(DropPath { rate, stream: names.stream() })
    }

    /// The rate of block `index` of `depth` when it grows linearly from 0 to `last`.
    pub fn linear(last: f64, index: usize, depth: usize) -> f64 {
        if depth > 1 { last * index as f64 / (depth - 1) as f64 } else { 0.0 }
    }

    /// `δ_i / (1 − rate)` for each image; `None` outside training.
    fn factors<T: Float>(&self, p: &Params<T>, batch: usize) -> Option<Vec<T>> {
        let Pass::Train { key, .. } = p.pass() else { return None };
        let keep = T::from_f64(1.0 / (1.0 - self.rate));
        let draw = |i| {
            let mut rng = Rng::new(key.seed ^ self.stream.wrapping_mul(0x9E37_79B9_7F4A_7C15), Purpose::DropPath, key.step, i as u64);
            if rng.uniform() < self.rate { T::ZERO } else { keep }
        };
        (self.rate > 0.0).then(|| (0..batch).map(draw).collect())
    }

    /// `x + drop(f)`, where `branch(Some(x))` is `x + f` and `branch(None)` is `f`.
    pub fn residual<T: Float, S>(
        &self,
        p: &Params<T>,
        x: &Tensor<T>,
        branch: impl FnOnce(Option<&Tensor<T>>) -> Result<(Tensor<T>, S)>,
    ) -> Result<(Tensor<T>, S)> {
        let Some(factors) = self.factors(p, x.shape()[0]) else { return branch(Some(x)) };
        let (mut y, saved) = branch(None)?;
        x.expect_shape("residual stream", y.shape())?;
        scale_images(&mut y, &factors);
        elementwise::add(y.data_mut(), x.data());
        Ok((y, saved))
    }

    /// `drop(f)`, for a branch, or the gradient of its output.
    pub fn apply<T: Float>(&self, p: &Params<T>, mut f: Tensor<T>) -> Tensor<T> {
        if let Some(factors) = self.factors(p, f.shape()[0]) {
            scale_images(&mut f, &factors);
        }
        f
    }

    /// `branch(df)` with the gradient of the branch's output, from that of the sum. `drop` is linear, and its own transpose.
    pub fn backward<T: Float, R>(&self, p: &Params<T>, dy: &Tensor<T>, branch: impl FnOnce(&Tensor<T>) -> R) -> R {
        match self.factors(p, dy.shape()[0]) {
            None => branch(dy),
            Some(factors) => {
                let mut df = dy.clone();
                scale_images(&mut df, &factors);
                branch(&df)
            }
        }
    }
}

fn scale_images<T: Float>(x: &mut Tensor<T>, factors: &[T]) {
    let len = (x.data().len() / factors.len().max(1)).max(1);
    x.data_mut().par_chunks_mut(len).zip(factors).for_each(|(x, &factor)| x.iter_mut().for_each(|x| *x *= factor));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Layout, StepKey};

    /// Off outside training; in training whole images are dropped at the rate and the mean is kept; forward and backward draw the same.
    #[test]
    fn drops_whole_images() {
        let (drop, layout) = Layout::build(|names| DropPath::new(names, 0.25)).unwrap();
        let p = Params::<f64>::zeros(&layout);
        let x = Tensor::from_fn([4000, 2], |i| i as f64);
        let f = || Ok((Tensor::from_fn([4000, 2], |_| 3.0), ()));
        let with = |residual: Option<&Tensor<f64>>| {
            let (mut f, s) = f()?;
            if let Some(x) = residual {
                elementwise::add(f.data_mut(), x.data());
            }
            Ok((f, s))
        };
        let plain = drop.residual(&p, &x, with).unwrap().0;
        assert!(plain.data().iter().zip(x.data()).all(|(y, x)| *y == x + 3.0));
        let p = p.run_as(Pass::Train { key: StepKey { seed: 3, step: 9 }, recompute: false });
        let y = drop.residual(&p, &x, with).unwrap().0;
        let kept: Vec<bool> = y.data().chunks(2).zip(x.data().chunks(2)).map(|(y, x)| y[0] != x[0]).collect();
        let share = kept.iter().filter(|k| **k).count() as f64 / 4000.0;
        assert!((share - 0.75).abs() < 0.03, "{share} kept");
        let d = drop.backward(&p, &Tensor::from_fn([4000, 2], |_| 1.0), Tensor::clone);
        for (i, kept) in kept.iter().enumerate() {
            let factor = if *kept { 1.0 / 0.75 } else { 0.0 };
            assert_eq!(d.data()[2 * i..2 * i + 2], [factor; 2]);
            assert_eq!(y.data()[2 * i], x.data()[2 * i] + 3.0 * factor);
        }
        let other = p.run_as(Pass::Train { key: StepKey { seed: 3, step: 10 }, recompute: false });
        assert_ne!(drop.apply(&other, y.clone()).data(), drop.apply(&p, y).data());
        assert!(Layout::build(|names| DropPath::new(names, 1.0)).unwrap_err().to_string().contains("drop_path_rate"));
    }
}
