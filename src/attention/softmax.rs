//! `attention.softmax`: multi-head self-attention (ViT, arXiv 2010.11929).
//!
//! `[Q K V] = x W_qkvᵀ + b`, per head `O = softmax(Q Kᵀ/√d) V`, `y = O W_projᵀ + b`. Optionally q and k pass a LayerNorm over the d
//! channels of each head first (`q_norm`, `k_norm`, shared by all heads).
//!
//! Backward: the projections as linear layers; in between [`kernel::attention`](crate::kernel::attention).

use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::{self as core, Bias, Gradients, Groups, Operand, Sizes};
use crate::linalg::ColumnsMut;
use crate::nn::{Init, LayerNorm, Layout, Linear, Names, Params, Stats};
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
    /// `proj` has a bias.
    pub proj_bias: bool,
    /// ε of `q_norm` and `k_norm`, if there are any.
    pub qk_norm: Option<f64>,
    /// The factor on the scores; `None` is `d^{−1/2}`.
    pub scale: Option<f64>,
}

impl Settings {
    /// The usual: biases, no norms, default scale.
    pub fn new(dim: usize, num_heads: usize) -> Self {
        Settings { dim, num_heads, qkv_bias: true, proj_bias: true, qk_norm: None, scale: None }
    }
}

/// Multi-head self-attention with parameters `qkv`, `proj` (and `q_norm`, `k_norm`), over any grouping of the tokens.
#[derive(Clone, Debug)]
pub struct Attention {
    qkv: Linear,
    qk_norm: Option<(LayerNorm, LayerNorm)>,
    proj: Linear,
    heads: usize,
    dim: usize,
    scale: f64,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    qkv: Tensor<T>,
    /// q and k after their norms, `[rows, 2C]`, and the statistics of both.
    normed: Option<(Tensor<T>, [Stats<T>; 2])>,
    out: Tensor<T>,
    stats: Tensor<T>,
}

impl Attention {
    /// Registers the parameters.
    pub fn new(mut names: Names, settings: Settings, init: fn(usize, usize) -> Init) -> Result<Self> {
        let Settings { dim, num_heads, qkv_bias, proj_bias, qk_norm, scale } = settings;
        if num_heads == 0 || dim == 0 || !dim.is_multiple_of(num_heads) {
            return Err(Error::config("num_heads", format!("expected a divisor of the width {dim}, found {num_heads}")));
        }
        let width = dim / num_heads;
        let qkv = Linear::new(names.at("qkv"), dim, 3 * dim, qkv_bias, init(dim, 3 * dim));
        let qk_norm = qk_norm.map(|eps| (LayerNorm::new(names.at("q_norm"), width, eps), LayerNorm::new(names.at("k_norm"), width, eps)));
        let proj = Linear::new(names.at("proj"), dim, dim, proj_bias, init(dim, dim));
        Ok(Attention { qkv, qk_norm, proj, heads: num_heads, dim, scale: scale.unwrap_or_else(|| 1.0 / (width as f64).sqrt()) })
    }

    /// The cost for `b` images of `n` tokens over `groups`.
    pub fn cost(settings: Settings, b: usize, n: usize, groups: &Groups) -> Cost {
        let (c, h, all) = (settings.dim, settings.num_heads, n + groups.zero_tokens);
        // qkv and proj; scores and weighted values: 2 C per pair.
        let flops = 2 * b * (3 * all * c * c + n * c * c + 2 * groups.pairs() * c);
        // qkv, maximum and sum per row and head, with norms q and k again and their statistics; the attention's output and y.
        let norms = if settings.qk_norm.is_some() { 2 * c + 4 * h } else { 0 };
        Cost { flops, activation_bytes: 4 * b * (all * (3 * c + 2 * h + norms) + n * 2 * c) }
    }

    /// The number of heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    fn sizes<T: Float>(&self, x: &Tensor<T>) -> Result<Sizes> {
        let [batch, n, c] = x.dims("input of an attention")?;
        if c != self.dim {
            return Err(Error::shape("input of an attention", format!("[batch, tokens, {}]", self.dim), x.shape()));
        }
        let dim = self.dim / self.heads;
        Ok(Sizes { batch, heads: self.heads, dim, value_dim: dim, queries: n, keys: n, scale: self.scale })
    }

    /// q, k and v as the core reads them.
    fn operands<'a, T: Float>(&self, qkv: &'a Tensor<T>, normed: Option<&'a Tensor<T>>) -> [Operand<'a, T>; 3] {
        let part = |i: usize| Operand { data: qkv.data(), stride: 3 * self.dim, offset: i * self.dim };
        match normed {
            None => [part(0), part(1), part(2)],
            Some(normed) => {
                let of = |i: usize| Operand { data: normed.data(), stride: 2 * self.dim, offset: i * self.dim };
                [of(0), of(1), part(2)]
            }
        }
    }

    /// `proj(attention(x))` over `groups`, with additive logits `bias` `[h, side, side]`, plus `residual`.
    pub fn forward<T: Float>(
        &self,
        p: &Params<T>,
        x: &Tensor<T>,
        groups: &Groups,
        bias: Option<Bias<T>>,
        residual: Option<&Tensor<T>>,
    ) -> Result<(Tensor<T>, Saved<T>)> {
        self.sizes(x)?;
        let extended = with_zero_tokens(x, groups.zero_tokens)?;
        let sizes = self.sizes(&extended)?;
        let qkv = self.qkv.forward(p, &extended)?;
        let normed = match &self.qk_norm {
            None => None,
            Some((q_norm, k_norm)) => Some(self.norm_qk(p, &qkv, q_norm, k_norm)?),
        };
        let mut out = Tensor::scratch(extended.shape());
        drop(extended);
        let mut stats = Tensor::scratch([sizes.batch, sizes.heads, sizes.queries, 2]);
        let [q, k, v] = self.operands(&qkv, normed.as_ref().map(|n| &n.0));
        core::forward(out.data_mut(), stats.data_mut(), q, k, v, bias, groups, sizes);
        let out = without_zero_tokens(out, groups.zero_tokens)?;
        let y = self.proj.forward_onto(p, &out, residual)?;
        Ok((y, Saved { qkv, normed, out, stats }))
    }

    /// `dx`; `d_bias` `[h, side, side]` is added to.
    #[allow(clippy::too_many_arguments)]
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: Saved<T>,
        groups: &Groups,
        bias: Option<(Bias<T>, &mut [T])>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        self.sizes(x)?;
        let extended = with_zero_tokens(x, groups.zero_tokens)?;
        let sizes = self.sizes(&extended)?;
        let Saved { qkv, normed, out, stats } = saved;
        let d_out = self.proj.backward(p, g, &out, dy)?;
        let [out, d_out] = [with_zero_tokens(&out, groups.zero_tokens)?, with_zero_tokens(&d_out, groups.zero_tokens)?];
        let mut d_qkv = Tensor::zeros(qkv.shape());
        let (bias, d_bias) = bias.unzip();
        let [q, k, v] = self.operands(&qkv, normed.as_ref().map(|n| &n.0));
        let (dq, rest) = ColumnsMut::new(d_qkv.data_mut(), 3 * self.dim).split_at(self.dim);
        let (dk, dv) = rest.split_at(self.dim);
        core::backward(
            Gradients { q: dq, k: dk, v: dv, bias: d_bias },
            d_out.data(),
            out.data(),
            stats.data(),
            q,
            k,
            v,
            bias,
            groups,
            sizes,
        );
        drop((d_out, out));
        if let (Some((q_norm, k_norm)), Some((_, stats))) = (&self.qk_norm, &normed) {
            for (part, (norm, stats)) in [q_norm, k_norm].into_iter().zip(stats).enumerate() {
                let (raw, d) = (self.heads_of(&qkv, part), self.heads_of(&d_qkv, part));
                let dx = norm.backward(p, g, &raw, stats, &d, None)?;
                self.put_heads(&mut d_qkv, &dx, part, 3 * self.dim);
            }
        }
        drop(qkv);
        without_zero_tokens(self.qkv.backward(p, g, &extended, &d_qkv)?, groups.zero_tokens)
    }

    /// Part 0 (q) or 1 (k) of `[rows, 3C]` as rows of one head each.
    fn heads_of<T: Float>(&self, qkv: &Tensor<T>, part: usize) -> Tensor<T> {
        let rows = qkv.shape().rows_cols().0;
        let mut out = Tensor::scratch([rows * self.heads, self.dim / self.heads]);
        for (to, from) in out.data_mut().chunks_exact_mut(self.dim).zip(qkv.data().chunks_exact(3 * self.dim)) {
            to.copy_from_slice(&from[part * self.dim..(part + 1) * self.dim]);
        }
        out
    }

    fn put_heads<T: Float>(&self, target: &mut Tensor<T>, heads: &Tensor<T>, part: usize, stride: usize) {
        for (to, from) in target.data_mut().chunks_exact_mut(stride).zip(heads.data().chunks_exact(self.dim)) {
            to[part * self.dim..(part + 1) * self.dim].copy_from_slice(from);
        }
    }

    fn norm_qk<T: Float>(
        &self,
        p: &Params<T>,
        qkv: &Tensor<T>,
        q_norm: &LayerNorm,
        k_norm: &LayerNorm,
    ) -> Result<(Tensor<T>, [Stats<T>; 2])> {
        let (q, q_stats) = q_norm.forward(p, &self.heads_of(qkv, 0))?;
        let (k, k_stats) = k_norm.forward(p, &self.heads_of(qkv, 1))?;
        let mut normed = Tensor::scratch(qkv.shape().with_last(2 * self.dim));
        self.put_heads(&mut normed, &q, 0, 2 * self.dim);
        self.put_heads(&mut normed, &k, 1, 2 * self.dim);
        Ok((normed, [q_stats, k_stats]))
    }
}

/// `[B, N, C]` → `[B, N + extra, C]`, the new tokens zero.
fn with_zero_tokens<T: Float>(x: &Tensor<T>, extra: usize) -> Result<Tensor<T>> {
    let [batch, n, c] = x.dims("tokens")?;
    if extra == 0 {
        return Ok(x.clone());
    }
    let mut y = Tensor::zeros([batch, n + extra, c]);
    for (to, from) in y.data_mut().chunks_exact_mut((n + extra) * c).zip(x.data().chunks_exact(n * c)) {
        to[..n * c].copy_from_slice(from);
    }
    Ok(y)
}

/// The adjoint of [`with_zero_tokens`].
fn without_zero_tokens<T: Float>(x: Tensor<T>, extra: usize) -> Result<Tensor<T>> {
    let [batch, n, c] = x.dims("tokens")?;
    if extra == 0 {
        return Ok(x);
    }
    let mut y = Tensor::scratch([batch, n - extra, c]);
    for (to, from) in y.data_mut().chunks_exact_mut((n - extra) * c).zip(x.data().chunks_exact(n * c)) {
        to.copy_from_slice(&from[..(n - extra) * c]);
    }
    Ok(y)
}

/// The settings of `attention.softmax`.
fn settings(config: &Config) -> Result<Settings> {
    Ok(Settings {
        dim: config.usize("dim")?,
        num_heads: config.usize("num_heads")?,
        qkv_bias: config.bool("qkv_bias")?,
        proj_bias: config.bool("proj_bias")?,
        qk_norm: if config.bool("qk_norm")? { Some(config.f64("norm_eps")?) } else { None },
        scale: None,
    })
}

/// `attention.softmax`.
pub struct SoftmaxAttention;

impl Operation for SoftmaxAttention {
    const NAME: &'static str = "attention.softmax";
    const PAPER: &'static str = "2010.11929 ViT";

    fn sample(rng: &mut Rng) -> Config {
        let (heads, width) = (rng.between(1, 4), rng.between(1, 7));
        let mut config = Config::default();
        config.set("dim", heads * width).set("num_heads", heads).set("qkv_bias", rng.chance(0.7)).set("proj_bias", rng.chance(0.7));
        // A norm over one channel is constant: width 1 would leave nothing to differentiate.
        config.set("qk_norm", width > 1 && rng.chance(0.5)).set("norm_eps", 1e-6);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, tokens) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 20));
        draw.normal("x", [batch, tokens, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        Ok(Some(Attention::cost(settings(config)?, b, n, &Groups::all(n, n))))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        Some(Benchmark::new(size).set("qkv_bias", true).set("proj_bias", true).set("qk_norm", false))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (layer, layout) = Layout::build(|names| Attention::new(names.here(), settings(config)?, crate::nn::normal_02))?;
        let x = run.input("x")?;
        let [_, tokens, _] = x.dims("x")?;
        let groups = Groups::all(tokens, tokens);
        run.unary(
            &layout,
            |p, x| layer.forward(p, x, &groups, None, None),
            |p, g, saved, dy| layer.backward(p, g, &x, saved, &groups, None, dy),
        )
    }
}
