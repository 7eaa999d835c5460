//! `attention.token_transformer`: the one-headed attention between T2T-ViT's soft splits (arXiv 2101.11986).
//!
//! `[Q|K|V] = x W_qkvᵀ (+ b)`, `A = softmax_rows(s Q Kᵀ)`, `y = V + (A V) W_projᵀ + b_proj`. The output is E wide, the input is not,
//! so the skip is V; `s = dim^{−1/2}` with the width of the *input*, although q and k have E columns.
//!
//! Backward: `dO = dY W_proj`, `dV = dY + Aᵀ dO`, and dQ, dK as in [`kernel::attention`](crate::kernel::attention), which never holds
//! the N×N scores.

use super::window::qk_scale;
use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::{self as core, Gradients, Groups, Operand, Sizes};
use crate::kernel::rows;
use crate::linalg::{ColumnsMut, Mat};
use crate::nn::{Init, Layout, Linear, Names, Params, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// What the layer is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width of the input.
    pub dim: usize,
    /// Width E of q, k, v and the output.
    pub in_dim: usize,
    /// `qkv` has a bias.
    pub qkv_bias: bool,
    /// The factor on the scores; `None` is `dim^{−1/2}`.
    pub scale: Option<f64>,
}

impl Settings {
    /// From the keys `dim`, `in_dim`, `num_heads`, `qkv_bias`, `qk_scale`.
    pub fn from_config(config: &Config) -> Result<Self> {
        let heads = config.usize_or("num_heads", 1)?;
        if heads != 1 {
            return Err(Error::config("num_heads", format!("expected 1, found {heads}: a token transformer has one head")));
        }
        Ok(Settings {
            dim: config.positive("dim")?,
            in_dim: config.positive("in_dim")?,
            qkv_bias: config.bool_or("qkv_bias", false)?,
            scale: qk_scale(config)?,
        })
    }
}

/// Attention with one head and a skip from v, with parameters `qkv` and `proj`.
#[derive(Clone, Debug)]
pub struct TokenAttention {
    qkv: Linear,
    proj: Linear,
    dim: usize,
    width: usize,
    scale: f64,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    qkv: Tensor<T>,
    out: Tensor<T>,
    stats: Tensor<T>,
}

impl TokenAttention {
    /// Registers the parameters.
    pub fn new(mut names: Names, settings: Settings, init: fn(usize, usize) -> Init) -> Self {
        let Settings { dim, in_dim, qkv_bias, scale } = settings;
        let qkv = Linear::new(names.at("qkv"), dim, 3 * in_dim, qkv_bias, init(dim, 3 * in_dim));
        let proj = Linear::new(names.at("proj"), in_dim, in_dim, true, init(in_dim, in_dim));
        TokenAttention { qkv, proj, dim, width: in_dim, scale: scale.unwrap_or_else(|| 1.0 / (dim as f64).sqrt()) }
    }

    /// The linear layer that makes q, k and v.
    pub fn qkv(&self) -> &Linear {
        &self.qkv
    }

    fn sizes<T: Float>(&self, qkv: &Tensor<T>) -> Result<Sizes> {
        let [batch, n, _] = qkv.dims("qkv")?;
        Ok(Sizes { batch, heads: 1, dim: self.width, value_dim: self.width, queries: n, keys: n, scale: self.scale })
    }

    fn operands<'a, T: Float>(&self, qkv: &'a Tensor<T>) -> [Operand<'a, T>; 3] {
        [0, 1, 2].map(|i| Operand { data: qkv.data(), stride: 3 * self.width, offset: i * self.width })
    }

    /// `[B, N, dim]` → `[B, N, E]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let [_, _, dim] = x.dims("input of a token transformer")?;
        if dim != self.dim {
            return Err(Error::shape("input of a token transformer", format!("[batch, tokens, {}]", self.dim), x.shape()));
        }
        self.forward_qkv(p, self.qkv.forward(p, x)?)
    }

    /// The rest of [`forward`](Self::forward), from `[Q|K|V]`.
    pub fn forward_qkv<T: Float>(&self, p: &Params<T>, qkv: Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let (sizes, e) = (self.sizes(&qkv)?, self.width);
        let (mut out, mut stats) = (Tensor::scratch(qkv.shape().with_last(e)), Tensor::scratch([sizes.batch, 1, sizes.queries, 2]));
        let [q, k, v] = self.operands(&qkv);
        core::forward(out.data_mut(), stats.data_mut(), q, k, v, None, &Groups::all(sizes.queries, sizes.keys), sizes);
        let skip = Mat::strided(&qkv.data()[(2 * e).min(qkv.data().len())..], sizes.batch * sizes.queries, e, 3 * e, 1);
        let y = self.proj.forward_onto_rows(p, &out, Some(skip))?;
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
        let d_qkv = self.backward_qkv(p, g, saved, dy)?;
        self.qkv.backward(p, g, x, &d_qkv)
    }

    /// The gradient of `[Q|K|V]`.
    pub fn backward_qkv<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let Saved { qkv, out, stats } = saved;
        let (sizes, e) = (self.sizes(&qkv)?, self.width);
        dy.expect_shape("gradient of a token transformer", out.shape())?;
        let d_out = self.proj.backward(p, g, &out, dy)?;
        let mut d_qkv = Tensor::zeros(qkv.shape());
        let (dq, rest) = ColumnsMut::new(d_qkv.data_mut(), 3 * e).split_at(e);
        let (dk, dv) = rest.split_at(e);
        let grads = Gradients { q: dq, k: dk, v: dv, bias: None };
        let [q, k, v] = self.operands(&qkv);
        let groups = Groups::all(sizes.queries, sizes.keys);
        core::backward(grads, d_out.data(), out.data(), stats.data(), q, k, v, None, &groups, sizes);
        rows::add_to_columns(d_qkv.data_mut(), 3 * e, 2 * e, dy.data(), e);
        Ok(d_qkv)
    }

    /// What [`forward_qkv`](Self::forward_qkv) costs.
    pub fn cost_qkv(&self, b: usize, n: usize) -> Cost {
        let e = self.width;
        // Scores and weighted values: 2 E per pair of tokens; proj: E² per token. Kept: the attention's output, y, two statistics.
        Cost { flops: 2 * b * n * (2 * n * e + e * e), activation_bytes: 4 * b * n * (2 * e + 2) }
    }

    /// What [`forward`](Self::forward) costs.
    pub fn cost(&self, b: usize, n: usize) -> Cost {
        let qkv = 3 * self.width;
        self.cost_qkv(b, n) + Cost { flops: 2 * b * n * self.dim * qkv, activation_bytes: 4 * b * n * qkv }
    }
}

/// Random `dim`, `in_dim`, `num_heads`, `qkv_bias`, `qk_scale`.
pub fn sample_settings(rng: &mut Rng, config: &mut Config) {
    config.set("dim", rng.between(2, 12)).set("in_dim", rng.between(2, 9)).set("num_heads", 1).set("qkv_bias", rng.chance(0.5));
    config.set("qk_scale", if rng.chance(0.3) { serde_json::json!(rng.range(0.2, 1.0)) } else { serde_json::Value::Null });
}

/// `attention.token_transformer`.
pub struct TokenTransformer;

impl Operation for TokenTransformer {
    const NAME: &'static str = "attention.token_transformer";
    const PAPER: &'static str = "2101.11986 T2T-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_settings(rng, &mut config);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, tokens) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 20));
        draw.normal("x", [batch, tokens, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, n, _], settings) = (inputs.dims("x")?, Settings::from_config(config)?);
        let (layer, _) = Layout::build(|names| Ok(TokenAttention::new(names.here(), settings, normal_02)))?;
        Ok(Some(layer.cost(b, n)))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        Some(
            Benchmark::new(size)
                .set("in_dim", size.dim)
                .set("num_heads", 1)
                .set("qkv_bias", false)
                .set("qk_scale", serde_json::Value::Null),
        )
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (x, settings) = (run.input("x")?, Settings::from_config(run.config())?);
        let (layer, layout) = Layout::build(|names| Ok(TokenAttention::new(names.here(), settings, normal_02)))?;
        run.unary(&layout, |p, x| layer.forward(p, x), |p, g, saved, dy| layer.backward(p, g, &x, saved, dy))
    }
}
