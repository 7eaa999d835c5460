//! `nn.batchnorm2d`: BatchNorm over all axes but the last (arXiv 1502.03167).
//!
//! `y = γ (x − μ) r + β`, `r = 1/√(v + ε)`. Training takes mean and **biased** variance of the `n` rows and moves the running ones:
//! `m ← (1 − a) m + a μ`, `v ← (1 − a) v + a v n/(n − 1)`; evaluation takes the running ones.
//!
//! With `x̂ = (x − μ) r`: `dγ = Σ dy x̂`, `dβ = Σ dy`; `dx = γ r (dy − dβ/n − x̂ dγ/n)` in training, `γ r dy` in evaluation.
//!
//! A published state also holds `num_batches_tracked`: it takes no part.

use super::maps::{channels_first, channels_last};
use super::param::{Init, Layout, Names, Param, Params};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::channel_norm::{self, Rows};
use crate::tensor::random::Rng;
use crate::tensor::{Buffer, Float, Tensor};

/// BatchNorm over the last axis: `weight` γ, `bias` β, buffers `running_mean`, `running_var`, all `[C]`.
#[derive(Clone, Debug)]
pub struct BatchNorm2d {
    weight: Param,
    bias: Param,
    running: [Param; 2],
    channels: usize,
    eps: f64,
    momentum: f64,
}

/// What the backward pass needs, beside the input.
pub struct Saved<T: Float> {
    mean: Tensor<T>,
    r: Tensor<T>,
    /// The running statistics after the call, in training.
    updates: Updates<T>,
    training: bool,
}

/// New values of buffers, for [`Run::after_buffers`] or [`Params::update`].
pub type Updates<T> = Vec<(Param, Tensor<T>)>;

impl<T: Float> Saved<T> {
    /// Of a call that had no backward pass to think of.
    pub(super) fn empty() -> Self {
        Saved { mean: Tensor::zeros([0]), r: Tensor::zeros([0]), updates: Vec::new(), training: false }
    }

    /// Takes the running statistics after the call: none in evaluation.
    pub fn take_updates(&mut self) -> Updates<T> {
        std::mem::take(&mut self.updates)
    }
}

impl BatchNorm2d {
    /// Registers `weight` (ones), `bias` (zeros), `running_mean` (zeros) and `running_var` (ones).
    pub fn new(mut names: Names, channels: usize, eps: f64, momentum: f64) -> Self {
        let (weight, bias) = (names.param("weight", [channels], Init::ONES), names.param("bias", [channels], Init::ZEROS));
        let running = [names.buffer("running_mean", [channels], Init::ZEROS), names.buffer("running_var", [channels], Init::ONES)];
        BatchNorm2d { weight, bias, running, channels, eps, momentum }
    }

    /// Bytes that [`forward`](Self::forward) keeps beside `x` and `y`.
    pub fn saved_bytes(&self, training: bool) -> usize {
        4 * self.channels * if training { 4 } else { 2 }
    }

    /// Evaluation as `y = s x + t`: s and t.
    pub(super) fn affine<T: Float>(&self, p: &Params<T>) -> (Buffer<T>, Buffer<T>) {
        let ([mean, var], [gamma, beta]) = (self.running.map(|b| p.buffer(b)), [self.weight, self.bias].map(|w| p.get(w)));
        let (mut s, mut t) = (Buffer::scratch(self.channels), Buffer::scratch(self.channels));
        for c in 0..self.channels {
            s[c] = gamma[c] * (T::ONE / (var[c] + T::from_f64(self.eps)).root());
            t[c] = beta[c] - mean[c] * s[c];
        }
        (s, t)
    }

    fn rows<T: Float>(&self, x: &Tensor<T>) -> Result<Rows> {
        let (rows, channels) = x.shape().rows_cols();
        if channels != self.channels {
            return Err(Error::shape("input of a batch norm", format!("[…, {}] (channels last)", self.channels), x.shape()));
        }
        Ok(Rows { images: 1, rows, channels })
    }

    /// The normalised map.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, training: bool) -> Result<(Tensor<T>, Saved<T>)> {
        let saved = self.statistics(p, x, training)?;
        Ok((self.again(p, x, &saved, false), saved))
    }

    /// `max(BN(x), 0)` in one pass. For its gradient, zero `dy` where the output is not positive and go [`backward`](Self::backward).
    pub fn forward_relu<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, training: bool) -> Result<(Tensor<T>, Saved<T>)> {
        let saved = self.statistics(p, x, training)?;
        Ok((self.again(p, x, &saved, true), saved))
    }

    /// The output of an earlier call, from what it saved: cheaper than keeping it.
    pub fn again<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, saved: &Saved<T>, relu: bool) -> Tensor<T> {
        let rows = Rows { images: 1, rows: x.shape().rows_cols().0, channels: self.channels };
        let scale = Tensor::from_fn([self.channels], |c| p.get(self.weight)[c] * saved.r.data()[c]);
        let mut y = Tensor::scratch(x.shape());
        channel_norm::normalize(y.data_mut(), x.data(), saved.mean.data(), scale.data(), p.get(self.bias), rows, relu);
        y
    }

    fn statistics<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, training: bool) -> Result<Saved<T>> {
        let rows = self.rows(x)?;
        let (eps, c) = (T::from_f64(self.eps), self.channels);
        let [running_mean, running_var] = self.running.map(|b| p.buffer(b));
        let inverse = |v: T| T::ONE / (v + eps).root();
        if !training {
            let (mean, r) = (Tensor::from_fn([c], |i| running_mean[i]), Tensor::from_fn([c], |i| inverse(running_var[i])));
            return Ok(Saved { mean, r, updates: Vec::new(), training });
        }
        let n = rows.rows;
        if n < 2 {
            return Err(Error::shape("input of a batch norm in training", "more than one value per channel", x.shape()));
        }
        let (mut mean, mut squares) = (Tensor::scratch([c]), Tensor::scratch([c]));
        channel_norm::moments(mean.data_mut(), squares.data_mut(), x.data(), rows);
        let move_to = |old: T, new: T| T::from_f64(1.0 - self.momentum) * old + T::from_f64(self.momentum) * new;
        let new_mean = Tensor::from_fn([c], |i| move_to(running_mean[i], mean.data()[i]));
        let new_var = Tensor::from_fn([c], |i| move_to(running_var[i], squares.data()[i] / T::of(n - 1)));
        let r = Tensor::from_fn([c], |i| inverse(squares.data()[i] / T::of(n)));
        Ok(Saved { mean, r, updates: vec![(self.running[0], new_mean), (self.running[1], new_var)], training })
    }

    /// All gradients; returns `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: &Saved<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let rows = self.rows(x)?;
        dy.expect_shape("gradient of a batch norm", x.shape())?;
        let (c, gamma, r) = (self.channels, p.get(self.weight), saved.r.data());
        let (mut sum, mut sum_d) = (Tensor::scratch([c]), Tensor::scratch([c]));
        channel_norm::sums(sum.data_mut(), sum_d.data_mut(), x.data(), dy.data(), saved.mean.data(), rows);
        let (sum, sum_d) = (sum.data(), sum_d.data());
        g.get_mut(self.bias).iter_mut().zip(sum).for_each(|(d, &s)| *d += s);
        for (i, d) in g.get_mut(self.weight).iter_mut().enumerate() {
            *d += sum_d[i] * r[i];
        }
        let n = T::of(rows.rows.max(1));
        let part = |on: bool, f: &dyn Fn(usize) -> T| Tensor::from_fn([c], |i| if on { f(i) } else { T::ZERO });
        let scale = part(true, &|i| gamma[i] * r[i]);
        let mean_g = part(saved.training, &|i| gamma[i] * r[i] * (sum[i] / n));
        let mean_gx = part(saved.training, &|i| gamma[i] * r[i] * (r[i] * r[i] * (sum_d[i] / n)));
        let mut dx = Tensor::scratch(x.shape());
        let factors = [scale.data(), mean_g.data(), mean_gx.data()];
        channel_norm::gradient(dx.data_mut(), x.data(), dy.data(), saved.mean.data(), factors, rows);
        Ok(dx)
    }
}

/// `nn.batchnorm2d`.
pub struct BatchNorm2dOp;

impl Operation for BatchNorm2dOp {
    const NAME: &'static str = "nn.batchnorm2d";
    const PAPER: &'static str = "1502.03167 Batch normalization";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("training", rng.chance(0.6)).set("eps", 1e-5).set("momentum", rng.range(0.0, 1.0));
        config
    }

    fn inputs(_: &Config, draw: &mut Draw) -> Result<()> {
        let batch = draw.size("batch", 1, 3);
        let shape = [batch, draw.rng.between(1, 20), draw.rng.between(2, 6), draw.rng.between(3, 6)];
        draw.normal("x", shape);
        Ok(())
    }

    fn cost(config: &Config, shapes: &Shapes) -> Result<Option<Cost>> {
        let [b, c, h, w] = shapes.dims("x")?;
        let saved = if config.bool("training")? { 4 * c } else { 2 * c };
        Ok(Some(Cost { flops: 0, activation_bytes: 4 * (2 * b * c * h * w + saved) }))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (training, eps, momentum) = (config.bool("training")?, config.f64_or("eps", 1e-5)?, config.f64_or("momentum", 0.1)?);
        let [_, channels, _, _] = run.input("x")?.dims("input `x`")?;
        let (norm, layout) = Layout::build(|names| Ok(BatchNorm2d::new(names.here(), channels, eps, momentum)))?;
        let mut updates = Vec::new();
        run.unary(
            &layout,
            |p, x| {
                let x = channels_last(x)?;
                let (y, mut saved) = norm.forward(p, &x, training)?;
                updates = saved.take_updates();
                Ok((channels_first(&y)?, (x, saved)))
            },
            |p, g, (x, saved), dy| channels_first(&norm.backward(p, g, &x, &saved, &channels_last(dy)?)?),
        )?;
        run.after_buffers(&layout, updates);
        Ok(())
    }
}
