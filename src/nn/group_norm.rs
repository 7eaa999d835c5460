//! `nn.group_norm`: GroupNorm (arXiv 1803.08494) of channels-last maps.
//!
//! Per image and group of `C/G` channels, over those channels and all pixels (`D` numbers): `y = γ x̂ + β`, `x̂ = (x − μ) r`,
//! `r = 1/√(v + ε)`, biased variance. With `h = γ dy`: `dx = r (h − mean(h) − x̂ mean(h x̂))`, `dγ = Σ dy x̂`, `dβ = Σ dy`.

use super::maps::{channels_first, channels_last};
use super::param::{Init, Layout, Names, Param, Params};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::channel_norm::{self, Rows};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// GroupNorm over maps or tokens `[B, …, C]`: `weight` γ and `bias` β, `[C]`.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    weight: Param,
    bias: Param,
    groups: usize,
    channels: usize,
    eps: f64,
}

/// μ and r of every image and channel, `[2, B, C]`.
pub type Stats<T> = Tensor<T>;

impl GroupNorm {
    /// Registers `weight` (ones) and `bias` (zeros).
    pub fn new(mut names: Names, groups: usize, channels: usize, eps: f64) -> Result<Self> {
        if groups == 0 || channels == 0 || !channels.is_multiple_of(groups) {
            return Err(Error::config("num_groups", format!("expected a divisor of {channels} channels, found {groups}")));
        }
        let (weight, bias) = (names.param("weight", [channels], Init::ONES), names.param("bias", [channels], Init::ZEROS));
        Ok(GroupNorm { weight, bias, groups, channels, eps })
    }

    /// Bytes of the statistics of `batch` images.
    pub fn saved_bytes(&self, batch: usize) -> usize {
        4 * 2 * batch * self.channels
    }

    fn rows<T: Float>(&self, x: &Tensor<T>) -> Result<Rows> {
        let shape = x.shape();
        match shape[..] {
            [images, .., channels] if channels == self.channels && shape.len() > 2 => {
                Ok(Rows { images, rows: shape[1..shape.len() - 1].iter().product(), channels })
            }
            _ => Err(Error::shape("input of a group norm", format!("[batch, …, {}] (channels last)", self.channels), shape)),
        }
    }

    /// The normalised map and its statistics.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, Stats<T>)> {
        let rows = self.rows(x)?;
        let of_group = self.channels / self.groups;
        let mut stats = Tensor::scratch([2, rows.images, self.channels]);
        let (means, inverses) = stats.data_mut().split_at_mut(rows.images * self.channels);
        channel_norm::moments(means, inverses, x.data(), rows);
        for (mean, squares) in means.chunks_exact_mut(of_group).zip(inverses.chunks_exact_mut(of_group)) {
            let (mut mu, mut total) = (mean[0], squares[0]);
            for c in 1..of_group {
                channel_norm::merge((&mut mu, &mut total, c * rows.rows), (mean[c], squares[c], rows.rows));
            }
            mean.fill(mu);
            squares.fill(T::ONE / (total / T::of(of_group * rows.rows) + T::from_f64(self.eps)).root());
        }
        Ok((self.again(p, x, &stats), stats))
    }

    /// The output of an earlier call, from its statistics.
    pub fn again<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, stats: &Stats<T>) -> Tensor<T> {
        let of_image = x.shape()[1..x.shape().len() - 1].iter().product();
        let rows = Rows { images: x.shape()[0], rows: of_image, channels: self.channels };
        let (mean, r) = stats.data().split_at(rows.images * self.channels);
        let scale = Tensor::from_fn([r.len()], |i| r[i] * p.get(self.weight)[i % self.channels]);
        let mut y = Tensor::scratch(x.shape());
        channel_norm::normalize(y.data_mut(), x.data(), mean, scale.data(), p.get(self.bias), rows, false);
        y
    }

    /// All gradients; returns `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        stats: &Stats<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let rows = self.rows(x)?;
        dy.expect_shape("gradient of a group norm", x.shape())?;
        let (c, of_group, len) = (self.channels, self.channels / self.groups, rows.images * self.channels);
        let (mean, r) = stats.data().split_at(len);
        let (mut sum, mut sum_x) = (Tensor::scratch([len]), Tensor::scratch([len]));
        channel_norm::sums(sum.data_mut(), sum_x.data_mut(), x.data(), dy.data(), mean, rows);
        for (s, &r) in sum_x.data_mut().iter_mut().zip(r) {
            *s *= r;
        }
        let (sum, sum_x, gamma) = (sum.data(), sum_x.data(), p.get(self.weight));
        for (param, part) in [(self.bias, sum), (self.weight, sum_x)] {
            for of_image in part.chunks_exact(c) {
                g.get_mut(param).iter_mut().zip(of_image).for_each(|(d, &s)| *d += s);
            }
        }
        let (mut a, mut b, mut d) = (Tensor::scratch([len]), Tensor::scratch([len]), Tensor::scratch([len]));
        let (fa, fb, fd) = (a.data_mut(), b.data_mut(), d.data_mut());
        let count = T::of(of_group * rows.rows);
        for first in (0..len).step_by(of_group) {
            let (mut mean_h, mut mean_hx) = (T::ZERO, T::ZERO);
            for i in first..first + of_group {
                mean_h = gamma[i % c].fused(sum[i], mean_h);
                mean_hx = gamma[i % c].fused(sum_x[i], mean_hx);
            }
            for i in first..first + of_group {
                (fa[i], fb[i], fd[i]) = (gamma[i % c] * r[i], r[i] * (mean_h / count), r[i] * r[i] * (mean_hx / count));
            }
        }
        let mut dx = Tensor::scratch(x.shape());
        channel_norm::gradient(dx.data_mut(), x.data(), dy.data(), mean, [a.data(), b.data(), d.data()], rows);
        Ok(dx)
    }
}

/// `nn.group_norm`.
pub struct GroupNormOp;

impl Operation for GroupNormOp {
    const NAME: &'static str = "nn.group_norm";
    const PAPER: &'static str = "2303.01494 Context cluster";

    fn sample(rng: &mut Rng) -> Config {
        let (groups, width) = (rng.between(1, 4), rng.between(1, 5));
        let mut config = Config::default();
        config.set("num_groups", groups).set("num_channels", groups * width).set("eps", 1e-5);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let batch = draw.size("batch", 1, 3);
        let shape = [batch, config.positive("num_channels")?, draw.rng.between(1, 6), draw.rng.between(2, 6)];
        draw.normal("x", shape);
        Ok(())
    }

    fn cost(_: &Config, shapes: &Shapes) -> Result<Option<Cost>> {
        let [b, c, h, w] = shapes.dims("x")?;
        Ok(Some(Cost { flops: 0, activation_bytes: 4 * (2 * b * c * h * w + 2 * b * c) }))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (groups, channels, eps) = (config.usize_or("num_groups", 1)?, config.positive("num_channels")?, config.f64_or("eps", 1e-5)?);
        let (norm, layout) = Layout::build(|names| GroupNorm::new(names.here(), groups, channels, eps))?;
        run.unary(
            &layout,
            |p, x| {
                let x = channels_last(x)?;
                let (y, stats) = norm.forward(p, &x)?;
                Ok((channels_first(&y)?, (x, stats)))
            },
            |p, g, (x, stats), dy| channels_first(&norm.backward(p, g, &x, &stats, &channels_last(dy)?)?),
        )
    }
}
