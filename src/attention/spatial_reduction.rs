//! `attention.spatial_reduction`: every token attends to a pooled map (PVT, arXiv 2102.12122; UM-MAE, 2205.10063), and
//! `attention.gsa`: the same over visible tokens only (Twins in GreenMIM, 2205.13515).
//!
//! `q = x W_qᵀ + b`. The keys come from z: in mode `avgpool` (UM-MAE, the default, for every r) `z = LN(W_sr mean(cell) + b)`; in mode
//! `conv` (PVT v1, Twins) `z = LN(conv(x))`, an r×r convolution of stride r, and `z = x` for r = 1. `[K V] = z W_kvᵀ + b`, per head
//! `O = softmax(Q Kᵀ/√d) V`, `y = O W_projᵀ + b`. Cells of r×r tokens; incomplete ones are dropped. Among visible tokens, a cell
//! exists if it holds at least one, and the missing ones count as zeros.
//!
//! Backward: `dx = dq W_q + (what flows through z)`: `dz = [dK dV] W_kv`, the norm, then `dp = dc W_sr` spread over the cell by `1/r²`, or
//! the rows of the convolution put back in place.

use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::{self as core, Gradients, Groups, Operand, Sizes};
use crate::linalg::ColumnsMut;
use crate::nn::{CellConv, Cells, Init, LayerNorm, Layout, Linear, Names, Params, Stats, xavier};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

use super::window::{coordinates, draw_coords};

/// How the keys' map shrinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Mean, 1×1 convolution, norm: UM-MAE.
    AvgPool,
    /// A convolution of stride r and a norm, nothing for r = 1: PVT v1, Twins.
    Conv,
}

impl Mode {
    /// `"avgpool"` or `"conv"`.
    pub fn from_config(config: &Config) -> Result<Self> {
        Ok(if config.choice("mode", &["avgpool", "conv"])? == "conv" { Mode::Conv } else { Mode::AvgPool })
    }
}

/// What the layer is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width C.
    pub dim: usize,
    /// Heads h, a divisor of C.
    pub num_heads: usize,
    /// The reduction r.
    pub sr_ratio: usize,
    /// The kind of reduction.
    pub mode: Mode,
    /// `q` and `kv` have biases.
    pub qkv_bias: bool,
    /// ε of the norm.
    pub norm_eps: f64,
}

#[derive(Clone, Debug)]
enum Reduce {
    None,
    Pool(Linear, LayerNorm),
    Conv(CellConv, LayerNorm),
}

/// Attention to a reduced map with parameters `q`, `kv`, `sr`, `norm`, `proj`.
#[derive(Clone, Debug)]
pub struct SpatialReduction {
    q: Linear,
    kv: Linear,
    reduce: Reduce,
    proj: Linear,
    dim: usize,
    heads: usize,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    q: Tensor<T>,
    kv: Tensor<T>,
    /// What went into the norm, and its statistics.
    reduced: Option<(Tensor<T>, Stats<T>)>,
    out: Tensor<T>,
    stats: Tensor<T>,
}

impl SpatialReduction {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: Settings, init: fn(usize, usize) -> Init) -> Result<Self> {
        let Settings { dim, num_heads, sr_ratio, mode, qkv_bias, norm_eps } = settings;
        if num_heads == 0 || dim == 0 || !dim.is_multiple_of(num_heads) {
            return Err(Error::config("num_heads", format!("expected a divisor of the width {dim}, found {num_heads}")));
        }
        if sr_ratio == 0 {
            return Err(Error::config("sr_ratio", "expected a positive integer, found 0"));
        }
        let q = Linear::new(names.at("q"), dim, dim, qkv_bias, init(dim, dim));
        let kv = Linear::new(names.at("kv"), dim, 2 * dim, qkv_bias, init(dim, 2 * dim));
        let he = |side: usize| Init::Normal((2.0 / (side * side * dim) as f64).sqrt());
        let reduce = match mode {
            Mode::AvgPool => {
                let sr = Linear::shaped(&mut names.at("sr"), [dim, dim, 1, 1].into(), dim, dim, true, he(1));
                Reduce::Pool(sr, LayerNorm::new(names.at("norm"), dim, norm_eps))
            }
            Mode::Conv if sr_ratio > 1 => {
                let sr = CellConv::new(names.at("sr"), dim, dim, sr_ratio, he(sr_ratio))?;
                Reduce::Conv(sr, LayerNorm::new(names.at("norm"), dim, norm_eps))
            }
            Mode::Conv => Reduce::None,
        };
        let proj = Linear::new(names.at("proj"), dim, dim, true, init(dim, dim));
        Ok(SpatialReduction { q, kv, reduce, proj, dim, heads: num_heads })
    }

    /// The cost for `b` images of `n` tokens in `cells` cells (the tokens themselves where nothing is reduced).
    pub fn cost(settings: Settings, b: usize, n: usize, cells: usize) -> Cost {
        let Settings { dim: c, num_heads: h, sr_ratio: r, mode, .. } = settings;
        let reduces = mode == Mode::AvgPool || r > 1;
        let reduction = match mode {
            Mode::AvgPool => cells * c * c,
            Mode::Conv if reduces => cells * r * r * c * c,
            Mode::Conv => 0,
        };
        // q and proj on all tokens, kv on the cells; scores and weighted values.
        let flops = 2 * b * (2 * n * c * c + 2 * cells * c * c + reduction + 2 * n * cells * c);
        // q, the attention's output, y, maximum and sum per head; kv; what goes into the norm, and its statistics.
        let kept = n * (3 * c + 2 * h) + cells * (2 * c + if reduces { c + 2 } else { 0 });
        Cost { flops, activation_bytes: 4 * b * kept }
    }

    fn sizes<T: Float>(&self, x: &Tensor<T>, keys: usize) -> Result<Sizes> {
        let [batch, queries, c] = x.dims("input of an attention")?;
        if c != self.dim {
            return Err(Error::shape("input of an attention", format!("[batch, tokens, {}]", self.dim), x.shape()));
        }
        let dim = self.dim / self.heads;
        Ok(Sizes { batch, heads: self.heads, dim, value_dim: dim, queries, keys, scale: 1.0 / (dim as f64).sqrt() })
    }

    fn operands<'a, T: Float>(&self, q: &'a Tensor<T>, kv: &'a Tensor<T>) -> [Operand<'a, T>; 3] {
        let of_kv = |part: usize| Operand { data: kv.data(), stride: 2 * self.dim, offset: part * self.dim };
        [Operand { data: q.data(), stride: self.dim, offset: 0 }, of_kv(0), of_kv(1)]
    }

    /// `proj(attention(x))`, plus `residual`; `cells` are those of the reduction.
    pub fn forward<T: Float>(
        &self,
        p: &Params<T>,
        x: &Tensor<T>,
        cells: &Cells,
        residual: Option<&Tensor<T>>,
    ) -> Result<(Tensor<T>, Saved<T>)> {
        let q = self.q.forward(p, x)?;
        let (kv, reduced) = match &self.reduce {
            Reduce::None => (self.kv.forward(p, x)?, None),
            Reduce::Pool(sr, norm) => self.keys(p, sr.forward(p, &cells.mean(x)?)?, norm)?,
            Reduce::Conv(sr, norm) => self.keys(p, sr.forward(p, x, cells)?, norm)?,
        };
        let sizes = self.sizes(x, kv.shape()[1])?;
        let mut out = Tensor::scratch(x.shape());
        let mut stats = Tensor::scratch([sizes.batch, sizes.heads, sizes.queries, 2]);
        let [query, key, value] = self.operands(&q, &kv);
        core::forward(out.data_mut(), stats.data_mut(), query, key, value, None, &Groups::all(sizes.queries, sizes.keys), sizes);
        let y = self.proj.forward_onto(p, &out, residual)?;
        Ok((y, Saved { q, kv, reduced, out, stats }))
    }

    /// Norm and `kv` of the reduced map.
    #[allow(clippy::type_complexity)]
    fn keys<T: Float>(&self, p: &Params<T>, reduced: Tensor<T>, norm: &LayerNorm) -> Result<(Tensor<T>, Option<(Tensor<T>, Stats<T>)>)> {
        let (z, stats) = norm.forward(p, &reduced)?;
        Ok((self.kv.forward(p, &z)?, Some((reduced, stats))))
    }

    /// `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: Saved<T>,
        cells: &Cells,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let Saved { q, kv, reduced, out, stats } = saved;
        let sizes = self.sizes(x, kv.shape()[1])?;
        let d_out = self.proj.backward(p, g, &out, dy)?;
        let (mut dq, mut d_kv) = (Tensor::zeros(q.shape()), Tensor::zeros(kv.shape()));
        let [query, key, value] = self.operands(&q, &kv);
        let (dk, dv) = ColumnsMut::new(d_kv.data_mut(), 2 * self.dim).split_at(self.dim);
        core::backward(
            Gradients { q: ColumnsMut::new(dq.data_mut(), self.dim), k: dk, v: dv, bias: None },
            d_out.data(),
            out.data(),
            stats.data(),
            query,
            key,
            value,
            None,
            &Groups::all(sizes.queries, sizes.keys),
            sizes,
        );
        drop((d_out, out, q, kv));
        let mut dx = self.q.backward(p, g, x, &dq)?;
        drop(dq);
        match (&self.reduce, reduced) {
            (Reduce::Pool(sr, norm), Some((reduced, stats))) => {
                let d = self.keys_backward(p, g, norm, &reduced, &stats, &d_kv)?;
                let d_mean = sr.backward(p, g, &cells.mean(x)?, &d)?;
                cells.mean_backward(&mut dx, &d_mean)?;
            }
            (Reduce::Conv(sr, norm), Some((reduced, stats))) => {
                let d = self.keys_backward(p, g, norm, &reduced, &stats, &d_kv)?;
                sr.backward_onto(p, g, x, cells, &d, &mut dx)?;
            }
            _ => crate::kernel::elementwise::add(dx.data_mut(), self.kv.backward(p, g, x, &d_kv)?.data()),
        }
        Ok(dx)
    }

    /// Backward of [`keys`](Self::keys).
    fn keys_backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        norm: &LayerNorm,
        reduced: &Tensor<T>,
        stats: &Stats<T>,
        d_kv: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let dz = self.kv.backward(p, g, &norm.again(p, reduced, stats), d_kv)?;
        norm.backward(p, g, reduced, stats, &dz, None)
    }
}

/// An error unless cells of `side` fit into the map.
pub fn check_reduction(map: [usize; 2], side: usize) -> Result<()> {
    if side == 0 || side > map[0] || side > map[1] {
        return Err(Error::config(
            "sr_ratio",
            format!("expected from 1 to the shorter side of the {}×{} map, found {side}", map[0], map[1]),
        ));
    }
    Ok(())
}

/// The settings of `attention.spatial_reduction`.
pub fn settings(config: &Config) -> Result<Settings> {
    Ok(Settings {
        dim: config.positive("dim")?,
        num_heads: config.usize_or("num_heads", 8)?,
        sr_ratio: config.usize_or("sr_ratio", 1)?,
        mode: if config.get("mode").is_none() { Mode::AvgPool } else { Mode::from_config(config)? },
        qkv_bias: config.bool_or("qkv_bias", true)?,
        norm_eps: config.f64_or("ln_eps", 1e-5)?,
    })
}

/// The settings and map of an operation over a whole map `[B, H·W, C]`, checked against `x`.
fn map_input<T: Float>(run: &Run<T>) -> Result<([usize; 2], Tensor<T>)> {
    let config = run.config();
    let map @ [height, width] = [config.positive("height")?, config.positive("width")?];
    let x = run.input("x")?;
    let [_, tokens, c] = x.dims("input `x`")?;
    if height.checked_mul(width) != Some(tokens) || c != config.positive("dim")? {
        return Err(Error::shape("input `x`", format!("[batch, {height}·{width}, {}]", config.positive("dim")?), x.shape()));
    }
    Ok((map, x))
}

/// `attention.spatial_reduction`.
pub struct SpatialReductionAttention;

impl Operation for SpatialReductionAttention {
    const NAME: &'static str = "attention.spatial_reduction";
    const PAPER: &'static str = "2102.12122 PVT";

    fn sample(rng: &mut Rng) -> Config {
        let (heads, ratio) = (rng.between(1, 3), rng.between(1, 4));
        // A norm over one channel is constant: the keys would not depend on x.
        let width = rng.between(if heads == 1 { 2 } else { 1 }, 4);
        let mut config = Config::default();
        config.set("dim", heads * width).set("num_heads", heads).set("sr_ratio", ratio);
        config.set("mode", rng.pick(&["avgpool", "conv"])).set("qkv_bias", rng.chance(0.7)).set("ln_eps", 1e-5);
        config.set("height", rng.between(ratio, 9)).set("width", rng.between(ratio, 9));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let batch = draw.size("batch", 1, 3);
        draw.normal("x", [batch, config.positive("height")? * config.positive("width")?, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let (settings, [b, n, _]) = (settings(config)?, inputs.dims("x")?);
        let r = settings.sr_ratio;
        let cells = config.positive("height")? / r * (config.positive("width")? / r);
        Ok(Some(SpatialReduction::cost(settings, b, n, cells)))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        // As in PVT, where 56², 28² and 14² tokens meet ratios of 8, 4 and 2: some 7×7 keys, whatever the map.
        let side = size.side()?;
        let bench = Benchmark::new(size).set("height", side).set("width", side).set("sr_ratio", (side / 7).max(1));
        Some(bench.set("mode", "avgpool").set("qkv_bias", true).set("ln_eps", 1e-5))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = settings(run.config())?;
        let (map, x) = map_input(run)?;
        check_reduction(map, settings.sr_ratio)?;
        let cells = Cells::dense(map, settings.sr_ratio);
        let (layer, layout) = Layout::build(|names| SpatialReduction::new(names, settings, xavier))?;
        run.unary(&layout, |p, x| layer.forward(p, x, &cells, None), |p, g, saved, dy| layer.backward(p, g, &x, saved, &cells, dy))
    }
}

/// A map, the positions of its visible tokens, and these.
pub type VisibleInput<T> = ([usize; 2], Vec<[usize; 2]>, Tensor<T>);

/// The visible tokens of an operation with inputs `x` `[B, N, C]` and `coords` `[N, 2]` on a `height × width` map; an error unless they are
/// as many different places on the map.
pub fn visible_input<T: Float>(run: &Run<T>) -> Result<VisibleInput<T>> {
    let config = run.config();
    let map = [config.positive("height")?, config.positive("width")?];
    let coords = coordinates(run.ints("coords")?)?;
    let x = run.input("x")?;
    let [batch, _, _] = x.dims("input `x`")?;
    x.expect_shape("input `x`", [batch, coords.len(), config.positive("dim")?])?;
    let mut sorted = coords.clone();
    sorted.sort_unstable();
    if sorted.windows(2).any(|pair| pair[0] == pair[1]) || coords.iter().any(|at| at[0] >= map[0] || at[1] >= map[1]) {
        return Err(Error::value("input `coords`", format!("expected different positions on the {}×{} map", map[0], map[1])));
    }
    Ok((map, coords, x))
}

/// Random `x` and `coords` for an operation on visible tokens.
pub fn draw_visible(config: &Config, draw: &mut Draw) -> Result<()> {
    let batch = draw.size("batch", 1, 3);
    let tokens = draw_coords(draw, config.positive("height")?, config.positive("width")?)?;
    draw.normal("x", [batch, tokens, config.positive("dim")?]);
    Ok(())
}

/// The settings of `attention.gsa`.
fn gsa_settings(config: &Config) -> Result<Settings> {
    Ok(Settings {
        dim: config.positive("dim")?,
        num_heads: config.positive("num_heads")?,
        sr_ratio: config.positive("sr_ratio")?,
        mode: Mode::Conv,
        qkv_bias: config.bool("qkv_bias")?,
        norm_eps: config.f64("norm_eps")?,
    })
}

/// `attention.gsa`.
pub struct Gsa;

impl Operation for Gsa {
    const NAME: &'static str = "attention.gsa";
    const PAPER: &'static str = "2205.13515 GreenMIM";

    fn sample(rng: &mut Rng) -> Config {
        let (heads, width, ratio) = (rng.between(1, 3), rng.between(2, 4), rng.between(1, 4));
        let mut config = Config::default();
        config.set("dim", heads * width).set("num_heads", heads).set("sr_ratio", ratio).set("qkv_bias", rng.chance(0.7));
        config.set("height", rng.between(ratio, 9)).set("width", rng.between(ratio, 9)).set("norm_eps", 1e-6);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_visible(config, draw)
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let (settings, [b, n, _]) = (gsa_settings(config)?, inputs.dims("x")?);
        let map = [config.positive("height")?, config.positive("width")?];
        let cells = match settings.sr_ratio {
            1 => n,
            r => Cells::visible(&coordinates(inputs.ints("coords")?)?, map, r).count(),
        };
        Ok(Some(SpatialReduction::cost(settings, b, n, cells)))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        // A quarter of the tokens is visible; ratios as in Twins, which has PVT's, up to 8: the convolution has C²r² weights.
        let side = size.side()?;
        let bench = Benchmark::new(size).set("height", side).set("width", side).set("sr_ratio", (side / 7).clamp(1, 8));
        Some(bench.set("qkv_bias", true).set("norm_eps", 1e-6).size("visible", size.tokens / 4))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = gsa_settings(run.config())?;
        let (map, coords, x) = visible_input(run)?;
        check_reduction(map, settings.sr_ratio)?;
        let cells = Cells::visible(&coords, map, settings.sr_ratio);
        let (layer, layout) = Layout::build(|names| SpatialReduction::new(names, settings, xavier))?;
        run.unary(&layout, |p, x| layer.forward(p, x, &cells, None), |p, g, saved, dy| layer.backward(p, g, &x, saved, &cells, dy))
    }
}
