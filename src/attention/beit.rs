//! `attention.beit`: BEiT's self-attention (arXiv 2106.08254): biases on q and v only, additive position logits.
//!
//! `[Q K V] = x W_qkvᵀ + [q_bias, 0, v_bias]`, per head `O = softmax(s Q Kᵀ + A) V`, `y = O W_projᵀ + b_proj`, `s = d^{−1/2}`. A is the
//! layer's own [`RelativeTable`], a bias from outside (one for all blocks of a model), or the sum of both; it is not scaled. A bias on
//! k would shift whole rows of scores, which the softmax does not see.
//!
//! The width h·d of the heads together may differ from the width of the tokens.
//!
//! Backward: the projections as linear layers; in between [`kernel::attention`](crate::kernel::attention); `dA = Σ_batch dS`.

use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::{self as core, Bias, Gradients, Groups, Operand, Sizes};
use crate::kernel::{elementwise, reduce};
use crate::linalg::{ColumnsMut, Epilogue, Mat, MatMut, gemm};
use crate::nn::beit_rel_pos::{RelativeTable, window};
use crate::nn::{Init, Layout, Linear, Names, Param, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

use super::window::qk_scale;

/// Which biases the projection to q, k and v has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Biases {
    /// None.
    None,
    /// `q_bias` and `v_bias`.
    QueryValue,
    /// `qkv.bias`, as in a plain ViT.
    All,
}

/// What the layer is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width of the tokens.
    pub dim: usize,
    /// Heads h.
    pub num_heads: usize,
    /// Width d of a head; `None` is `dim / num_heads`, which must be whole.
    pub head_dim: Option<usize>,
    /// Biases of the projection.
    pub biases: Biases,
    /// The factor on the scores; `None` is `d^{−1/2}`.
    pub scale: Option<f64>,
    /// The grid of the layer's own relative table, if it has one.
    pub window: Option<[usize; 2]>,
    /// Initialisation of `proj.weight`.
    pub proj_init: Init,
}

impl Settings {
    /// The usual: own q and v biases, default head width and scale, no table.
    pub fn new(dim: usize, num_heads: usize) -> Self {
        Settings { dim, num_heads, head_dim: None, biases: Biases::QueryValue, scale: None, window: None, proj_init: Init::NORMAL_02 }
    }

    /// From the keys `dim`, `num_heads`, `head_dim`, `qkv_bias`, `qk_scale`, `rel_pos_bias`, `window_h`, `window_w`.
    pub fn from_config(config: &Config) -> Result<Self> {
        Ok(Settings {
            head_dim: config.get("head_dim").map(|_| config.positive("head_dim")).transpose()?,
            biases: if config.bool_or("qkv_bias", false)? { Biases::QueryValue } else { Biases::None },
            scale: qk_scale(config)?,
            window: if config.bool_or("rel_pos_bias", false)? { Some(window(config)?) } else { None },
            ..Settings::new(config.positive("dim")?, config.positive("num_heads")?)
        })
    }

    /// The width d of a head.
    fn width(&self) -> Result<usize> {
        match self.head_dim {
            Some(d) => Ok(d),
            None if self.num_heads > 0 && self.dim > 0 && self.dim.is_multiple_of(self.num_heads) => Ok(self.dim / self.num_heads),
            None => {
                let message = format!("expected a divisor of the width {} (or `head_dim`), found {}", self.dim, self.num_heads);
                Err(Error::config("num_heads", message))
            }
        }
    }

    /// What the forward pass for `[b, n, dim]` costs.
    pub fn cost(&self, b: usize, n: usize) -> Result<Cost> {
        let (c, h, inner) = (self.dim, self.num_heads, self.num_heads * self.width()?);
        // qkv and proj; scores and weighted values. Kept: qkv, the concatenated heads, y; maximum and sum per row and head.
        Ok(Cost { flops: 2 * b * n * (4 * c * inner + 2 * n * inner), activation_bytes: 4 * b * n * (4 * inner + c + 2 * h) })
    }
}

/// The attention, with parameters `qkv`, `q_bias`, `v_bias`, `relative_position_bias_table`, `proj`.
#[derive(Clone, Debug)]
pub struct BeitAttention {
    qkv: Linear,
    /// `q_bias` and `v_bias`.
    biases: Option<[Param; 2]>,
    table: Option<RelativeTable>,
    proj: Linear,
    heads: usize,
    width: usize,
    scale: f64,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    qkv: Tensor<T>,
    out: Tensor<T>,
    stats: Tensor<T>,
}

impl BeitAttention {
    /// Registers the parameters.
    pub fn new(mut names: Names, settings: Settings) -> Result<Self> {
        let Settings { dim, num_heads: heads, biases, scale, window, proj_init, .. } = settings;
        let width = settings.width()?;
        let inner = heads * width;
        let qkv = Linear::new(names.at("qkv"), dim, 3 * inner, biases == Biases::All, Init::NORMAL_02);
        let biases = (biases == Biases::QueryValue).then(|| ["q_bias", "v_bias"].map(|name| names.param(name, [inner], Init::ZEROS)));
        let table = window.map(|window| RelativeTable::new(&mut names, window, heads)).transpose()?;
        let proj = Linear::new(names.at("proj"), inner, dim, true, proj_init);
        Ok(BeitAttention { qkv, biases, table, proj, heads, width, scale: scale.unwrap_or_else(|| 1.0 / (width as f64).sqrt()) })
    }

    fn sizes<T: Float>(&self, x: &Tensor<T>) -> Result<Sizes> {
        let [batch, n, c] = x.dims("input of an attention")?;
        if c != self.qkv.inputs() || self.table.is_some_and(|table| table.tokens() != n) {
            let tokens = self.table.map_or("tokens".into(), |table| table.tokens().to_string());
            return Err(Error::shape("input of an attention", format!("[batch, {tokens}, {}]", self.qkv.inputs()), x.shape()));
        }
        Ok(Sizes { batch, heads: self.heads, dim: self.width, value_dim: self.width, queries: n, keys: n, scale: self.scale })
    }

    fn operands<'a, T: Float>(&self, qkv: &'a Tensor<T>) -> [Operand<'a, T>; 3] {
        let inner = self.heads * self.width;
        [0, 1, 2].map(|i| Operand { data: qkv.data(), stride: 3 * inner, offset: i * inner })
    }

    /// The logits A `[h, N, N]`: `outer` and the layer's own table.
    fn bias<T: Float>(&self, p: &Params<T>, outer: Option<&Tensor<T>>, n: usize) -> Result<Option<Tensor<T>>> {
        if let Some(outer) = outer {
            outer.expect_shape("relative position bias", [self.heads, n, n])?;
        }
        Ok(match (self.table, outer) {
            (None, outer) => outer.cloned(),
            (Some(table), None) => Some(table.dense(p)),
            (Some(table), Some(outer)) => {
                let mut sum = outer.clone();
                table.add_to(p, &mut sum);
                Some(sum)
            }
        })
    }

    fn project<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<Tensor<T>> {
        let Some([q_bias, v_bias]) = self.biases else { return self.qkv.forward(p, x) };
        let (inner, c) = (self.heads * self.width, self.qkv.inputs());
        let mut bias = Tensor::zeros([3 * inner]);
        bias.data_mut()[..inner].copy_from_slice(p.get(q_bias));
        bias.data_mut()[2 * inner..].copy_from_slice(p.get(v_bias));
        let (rows, mut qkv) = (x.shape().rows_cols().0, Tensor::scratch(x.shape().with_last(3 * inner)));
        gemm(
            Mat::new(x.data(), rows, c),
            Mat::new(p.get(self.qkv.weight()), 3 * inner, c).t(),
            MatMut::new(qkv.data_mut(), rows, 3 * inner),
            Epilogue { bias: Some(bias.data()), ..Epilogue::default() },
        );
        Ok(qkv)
    }

    /// `y`, plus `residual`; `outer` `[h, N, N]` is added to the scores.
    pub fn forward<T: Float>(
        &self,
        p: &Params<T>,
        x: &Tensor<T>,
        outer: Option<&Tensor<T>>,
        residual: Option<&Tensor<T>>,
    ) -> Result<(Tensor<T>, Saved<T>)> {
        let sizes = self.sizes(x)?;
        let n = sizes.queries;
        let bias = self.bias(p, outer, n)?;
        let qkv = self.project(p, x)?;
        let mut out = Tensor::scratch([sizes.batch, n, self.heads * self.width]);
        let mut stats = Tensor::scratch([sizes.batch, sizes.heads, n, 2]);
        let [q, k, v] = self.operands(&qkv);
        let view = bias.as_ref().map(|bias| Bias { data: bias.data(), side: n });
        core::forward(out.data_mut(), stats.data_mut(), q, k, v, view, &Groups::all(n, n), sizes);
        drop(bias);
        let y = self.proj.forward_onto(p, &out, residual)?;
        Ok((y, Saved { qkv, out, stats }))
    }

    /// `dx`; the gradient of `outer` is added to `d_outer`.
    #[allow(clippy::too_many_arguments)]
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: Saved<T>,
        outer: Option<&Tensor<T>>,
        d_outer: Option<&mut Tensor<T>>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let sizes = self.sizes(x)?;
        let (n, inner) = (sizes.queries, self.heads * self.width);
        let Saved { qkv, out, stats } = saved;
        let d_out = self.proj.backward(p, g, &out, dy)?;
        let mut d_qkv = Tensor::zeros(qkv.shape());
        let bias = self.bias(p, outer, n)?;
        let mut d_bias = bias.as_ref().map(|bias| Tensor::zeros(bias.shape()));
        let [q, k, v] = self.operands(&qkv);
        let (dq, rest) = ColumnsMut::new(d_qkv.data_mut(), 3 * inner).split_at(inner);
        let (dk, dv) = rest.split_at(inner);
        core::backward(
            Gradients { q: dq, k: dk, v: dv, bias: d_bias.as_mut().map(Tensor::data_mut) },
            d_out.data(),
            out.data(),
            stats.data(),
            q,
            k,
            v,
            bias.as_ref().map(|bias| Bias { data: bias.data(), side: n }),
            &Groups::all(n, n),
            sizes,
        );
        drop((d_out, out, stats, qkv, bias));
        if let Some(d_bias) = d_bias {
            if let Some(table) = self.table {
                table.backward(g, &d_bias);
            }
            if let Some(d_outer) = d_outer {
                elementwise::add(d_outer.data_mut(), d_bias.data());
            }
        }
        if let Some([q_bias, v_bias]) = self.biases {
            let mut sums = Tensor::zeros([3 * inner]);
            reduce::add_column_sums(sums.data_mut(), d_qkv.data());
            elementwise::add(g.get_mut(q_bias), &sums.data()[..inner]);
            elementwise::add(g.get_mut(v_bias), &sums.data()[2 * inner..]);
        }
        self.qkv.backward(p, g, x, &d_qkv)
    }
}

/// Beyond so many tokens the dense bias of all heads is no sensible thing to hold.
const MOST_BENCH_TOKENS: usize = 4096;

/// `attention.beit`.
pub struct Beit;

/// Random keys of [`Settings::from_config`], but `rel_pos_bias`.
pub fn sample_settings(rng: &mut Rng, config: &mut Config) {
    // A norm over one channel is constant: blocks need at least two.
    let (heads, width) = (rng.between(1, 4), rng.between(2, 5));
    config.set("num_heads", heads).set("qkv_bias", rng.chance(0.7));
    if rng.chance(0.3) {
        config.set("dim", rng.between(2, 9)).set("head_dim", rng.between(1, 5));
    } else {
        config.set("dim", heads * width);
    }
    if rng.chance(0.3) {
        config.set("qk_scale", if rng.chance(0.2) { 0.0 } else { rng.range(0.2, 1.0) });
    }
}

/// The inputs of an operation with a window: `x` and sometimes `rel_pos_bias`.
pub fn draw_inputs(config: &Config, draw: &mut Draw) -> Result<()> {
    let tokens = match config.bool("rel_pos_bias")? {
        true => 1 + window(config)?.iter().product::<usize>(),
        false => draw.size("tokens", 1, 20),
    };
    let (batch, heads) = (draw.size("batch", 1, 3), config.positive("num_heads")?);
    draw.normal("x", [batch, tokens, config.positive("dim")?]);
    if draw.size("outer_bias", 0, 1) == 1 {
        draw.normal("rel_pos_bias", [heads, tokens, tokens]);
    }
    Ok(())
}

impl Operation for Beit {
    const NAME: &'static str = "attention.beit";
    const PAPER: &'static str = "2106.08254 BEiT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_settings(rng, &mut config);
        config.set("rel_pos_bias", rng.chance(0.7)).set("window_h", rng.between(1, 4)).set("window_w", rng.between(1, 5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_inputs(config, draw)
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        Settings::from_config(config)?.cost(b, n).map(Some)
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        let side = size.side().filter(|_| size.tokens <= MOST_BENCH_TOKENS)?;
        let config = Benchmark::new(size).set("qkv_bias", true).set("rel_pos_bias", true);
        Some(config.set("window_h", side).set("window_w", side).size("outer_bias", 0))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config())?;
        let (layer, layout) = Layout::build(|names| BeitAttention::new(names.here(), settings))?;
        run_with_outer_bias(
            run,
            &layout,
            |p, x, outer| layer.forward(p, x, outer, None),
            |p, g, x, saved, outer, d_outer, dy| layer.backward(p, g, x, saved, outer, d_outer, dy),
        )
    }
}

/// The whole of an operation with an input `x`, an optional input `rel_pos_bias` and an output `y`.
pub fn run_with_outer_bias<T: Float, S>(
    run: &mut Run<T>,
    layout: &std::sync::Arc<Layout>,
    forward: impl FnOnce(&Params<T>, &Tensor<T>, Option<&Tensor<T>>) -> Result<(Tensor<T>, S)>,
    backward: impl FnOnce(
        &Params<T>,
        &mut Params<T>,
        &Tensor<T>,
        S,
        Option<&Tensor<T>>,
        Option<&mut Tensor<T>>,
        &Tensor<T>,
    ) -> Result<Tensor<T>>,
) -> Result<()> {
    let p = run.params(layout)?;
    let x = run.input("x")?;
    let outer = if run.has_input("rel_pos_bias") { Some(run.input("rel_pos_bias")?) } else { None };
    let (y, saved) = forward(&p, &x, outer.as_ref())?;
    run.output("y", &y);
    if run.backward() {
        let mut g = run.zero_grads(&p);
        let mut d_outer = outer.as_ref().map(|outer| Tensor::zeros(outer.shape()));
        let dy = run.cotangent("y", y.shape())?;
        let dx = backward(&p, &mut g, &x, saved, outer.as_ref(), d_outer.as_mut(), &dy)?;
        run.grad_input("x", &dx);
        if let Some(d_outer) = d_outer {
            run.grad_input("rel_pos_bias", &d_outer);
        }
        run.grad_params(&g);
    }
    Ok(())
}
