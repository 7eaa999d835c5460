//! `attention.talking_heads`: self-attention whose heads are mixed before and after the softmax (CaiT, arXiv 2103.17239; Shazeer et al.,
//! arXiv 2003.02436).
//!
//! `[Q K V] = x W_qkvᵀ + b`, `S_a = d^{−1/2} Q_a K_aᵀ`, `L_i = Σ_j W_ij S_j + w_i` (`proj_l`), `A_i = softmax_keys L_i`,
//! `R_i = Σ_j U_ij A_j + u_i` (`proj_w`), `O_a = R_a V_a`, `y = O W_projᵀ + b_proj`. Rows of R need not sum to 1.
//!
//! Backward: the projections as linear layers; in between [`kernel::talking_heads`](crate::kernel::talking_heads). The gradient of
//! `proj_l.bias` is zero: it shifts whole rows, which the softmax does not see.

use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::talking_heads::{self as core, Mixing, MixingMut, Sizes};
use crate::nn::{Init, Layout, Linear, Names, Params, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// What the layer is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width C.
    pub dim: usize,
    /// Heads h, a divisor of C.
    pub num_heads: usize,
    /// `qkv` has a bias.
    pub qkv_bias: bool,
}

impl Settings {
    /// From the keys `dim`, `num_heads`, `qkv_bias`.
    pub fn from_config(config: &Config) -> Result<Self> {
        Ok(Settings {
            dim: config.positive("dim")?,
            num_heads: config.positive("num_heads")?,
            qkv_bias: config.bool_or("qkv_bias", false)?,
        })
    }

    fn sizes(&self, batch: usize, tokens: usize) -> Sizes {
        Sizes { batch, tokens, heads: self.num_heads, dim: self.dim / self.num_heads }
    }

    /// What the forward pass for `[b, n, C]` costs.
    pub fn cost(&self, b: usize, n: usize) -> Cost {
        let (c, h) = (self.dim, self.num_heads);
        // qkv and proj: 4 C² per token. Kept: qkv, the concatenated heads, y; maximum and sum per row and head.
        let flops = 2 * b * n * 4 * c * c + self.sizes(b, n).flops();
        Cost { flops, activation_bytes: 4 * b * n * (5 * c + 2 * h) }
    }
}

/// Talking-heads attention with parameters `qkv`, `proj_l`, `proj_w`, `proj`.
#[derive(Clone, Debug)]
pub struct TalkingHeads {
    qkv: Linear,
    before: Linear,
    after: Linear,
    proj: Linear,
    settings: Settings,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    qkv: Tensor<T>,
    out: Tensor<T>,
    stats: Tensor<T>,
}

impl TalkingHeads {
    /// Registers the parameters.
    pub fn new(mut names: Names, settings: Settings, init: fn(usize, usize) -> Init) -> Result<Self> {
        let Settings { dim, num_heads: h, qkv_bias } = settings;
        if h == 0 || dim == 0 || !dim.is_multiple_of(h) {
            return Err(Error::config("num_heads", format!("expected a divisor of the width {dim}, found {h}")));
        }
        let qkv = Linear::new(names.at("qkv"), dim, 3 * dim, qkv_bias, init(dim, 3 * dim));
        let [before, after] = ["proj_l", "proj_w"].map(|name| Linear::new(names.at(name), h, h, true, init(h, h)));
        let proj = Linear::new(names.at("proj"), dim, dim, true, init(dim, dim));
        Ok(TalkingHeads { qkv, before, after, proj, settings })
    }

    fn sizes<T: Float>(&self, x: &Tensor<T>) -> Result<Sizes> {
        match x.dims("input of an attention")? {
            [b, n, c] if c == self.settings.dim => Ok(self.settings.sizes(b, n)),
            _ => Err(Error::shape("input of an attention", format!("[batch, tokens, {}]", self.settings.dim), x.shape())),
        }
    }

    fn mixing<'a, T: Float>(&self, p: &'a Params<T>) -> Mixing<'a, T> {
        let after_bias = self.after.bias().map_or(&[][..], |bias| p.get(bias));
        Mixing { before: p.get(self.before.weight()), after: p.get(self.after.weight()), after_bias }
    }

    /// `y`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let sizes = self.sizes(x)?;
        let qkv = self.qkv.forward(p, x)?;
        let mut out = Tensor::scratch(x.shape());
        let mut stats = Tensor::scratch([sizes.batch, sizes.tokens, sizes.heads, 2]);
        core::forward(out.data_mut(), stats.data_mut(), qkv.data(), self.mixing(p), sizes);
        let y = self.proj.forward(p, &out)?;
        Ok((y, Saved { qkv, out, stats }))
    }

    /// `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: Saved<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let sizes = self.sizes(x)?;
        let Saved { qkv, out, stats } = saved;
        let d_out = self.proj.backward(p, g, &out, dy)?;
        drop(out);
        let mut d_qkv = Tensor::scratch(qkv.shape());
        let h = sizes.heads;
        let mut sums = Tensor::zeros([2 * h * h + h]);
        let (before, rest) = sums.data_mut().split_at_mut(h * h);
        let (after, after_bias) = rest.split_at_mut(h * h);
        let grads = MixingMut { before, after, after_bias };
        core::backward(d_qkv.data_mut(), grads, d_out.data(), qkv.data(), stats.data(), self.mixing(p), sizes);
        drop((qkv, d_out, stats));
        let parts = [Some(self.before.weight()), Some(self.after.weight()), self.after.bias()];
        let mut from = sums.data();
        for param in parts.into_iter().flatten() {
            let (part, rest) = from.split_at(param.numel());
            g.get_mut(param).iter_mut().zip(part).for_each(|(total, &x)| *total += x);
            from = rest;
        }
        self.qkv.backward(p, g, x, &d_qkv)
    }
}

/// `attention.talking_heads`.
pub struct TalkingHeadsAttention;

impl Operation for TalkingHeadsAttention {
    const NAME: &'static str = "attention.talking_heads";
    const PAPER: &'static str = "2103.17239 CaiT";

    fn sample(rng: &mut Rng) -> Config {
        let (heads, width) = (rng.between(1, 9), rng.between(1, 5));
        let mut config = Config::default();
        config.set("dim", heads * width).set("num_heads", heads).set("qkv_bias", rng.chance(0.7));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let most = if draw.rng.chance(0.1) { 70 } else { 20 };
        let (batch, tokens) = (draw.size("batch", 1, 3), draw.size("tokens", 1, most));
        draw.normal("x", [batch, tokens, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        Ok(Some(Settings::from_config(config)?.cost(b, n)))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        Some(Benchmark::new(size).set("qkv_bias", true))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config())?;
        let (layer, layout) = Layout::build(|names| TalkingHeads::new(names.here(), settings, normal_02))?;
        let x = run.input("x")?;
        run.unary(&layout, |p, x| layer.forward(p, x), |p, g, saved, dy| layer.backward(p, g, &x, saved, dy))
    }
}
