//! `attention.dilated`: multi-scale dilated attention (DilateFormer, arXiv 2302.01791): consecutive groups of heads attend to `k × k`
//! neighbours, each group at its own distance; and `attention.dilate_global`, ordinary attention on a map, which the late stages use.
//!
//! `[Q K V] = x W_qkvᵀ + b` (a 1×1 convolution), per head the attention of [`kernel::dilated`](crate::kernel::dilated), in which zero
//! padding takes part in the softmax, `y = O W_projᵀ + b`. Time and memory are linear in the number of positions.
//!
//! The authors overwrite their input in place, which breaks training in plain float32; the mathematics does not need it.
//!
//! Backward: the projections as linear layers; in between the probabilities are computed again from q and k.

use super::softmax::{self, Attention};
use super::window::qk_scale;
use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::{Groups, Operand};
use crate::kernel::dilated::{self as core, Sizes};
use crate::linalg::ColumnsMut;
use crate::nn::{Layout, Linear, Names, Params, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The most rows of a neighbourhood.
const MOST: usize = 63;

/// What the layer is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Width C.
    pub dim: usize,
    /// Heads h, a divisor of C and a multiple of the number of dilations.
    pub num_heads: usize,
    /// `qkv` has a bias.
    pub qkv_bias: bool,
    /// Side k of the neighbourhood.
    pub kernel_size: usize,
    /// The distance between neighbours, for each of equally many consecutive heads.
    pub dilation: Vec<usize>,
    /// The factor on the scores; `None` is `d^{−1/2}`.
    pub scale: Option<f64>,
}

/// Multi-scale dilated attention with parameters `qkv` and `proj`, on `[B, H, W, C]`.
#[derive(Clone, Debug)]
pub struct Dilated {
    qkv: Linear,
    proj: Linear,
    settings: Settings,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    qkv: Tensor<T>,
    out: Tensor<T>,
}

/// An error unless a neighbourhood of `kernel × kernel` positions `dilation` apart has a middle.
pub fn check_neighbourhood(kernel: usize, dilation: usize) -> Result<()> {
    if kernel == 0 || kernel > MOST {
        return Err(Error::config("kernel_size", format!("expected 1 to {MOST}, found {kernel}")));
    }
    if dilation == 0 || dilation > 1 << 30 || !(dilation * (kernel - 1)).is_multiple_of(2) {
        return Err(Error::config(
            "dilation",
            format!("expected a positive distance r with r (k − 1) even for kernel_size k = {kernel}, found {dilation}"),
        ));
    }
    Ok(())
}

impl Settings {
    /// From a configuration, with the sheet's defaults.
    pub fn from_config(config: &Config) -> Result<Self> {
        Ok(Settings {
            dim: config.positive("dim")?,
            num_heads: config.usize_or("num_heads", 8)?,
            qkv_bias: config.bool_or("qkv_bias", false)?,
            kernel_size: config.usize_or("kernel_size", 3)?,
            dilation: if config.get("dilation").is_none() { vec![1, 2, 3] } else { config.usizes("dilation")? },
            scale: qk_scale(config)?,
        })
    }

    /// What a forward pass on `positions` in all costs.
    pub fn cost(&self, positions: usize) -> Cost {
        let (c, slots) = (self.dim, self.kernel_size * self.kernel_size);
        // qkv and proj: 4 C² per position; scores and weighted values: 2 k² C. Kept: qkv, the attention's output, y.
        Cost { flops: 2 * positions * (4 * c * c + 2 * slots * c), activation_bytes: 4 * positions * 5 * c }
    }
}

impl Dilated {
    /// Registers the parameters.
    pub fn new(mut names: Names, settings: Settings) -> Result<Self> {
        let Settings { dim, num_heads, qkv_bias, kernel_size, ref dilation, .. } = settings;
        if num_heads == 0 || dim == 0 || !dim.is_multiple_of(num_heads) {
            return Err(Error::config("num_heads", format!("expected a divisor of the width {dim}, found {num_heads}")));
        }
        if dilation.is_empty() || !num_heads.is_multiple_of(dilation.len()) {
            return Err(Error::config(
                "dilation",
                format!("expected a list whose length divides the {num_heads} heads, found {dilation:?}"),
            ));
        }
        dilation.iter().try_for_each(|&r| check_neighbourhood(kernel_size, r))?;
        let qkv = Linear::pointwise(names.at("qkv"), dim, 3 * dim, qkv_bias);
        let proj = Linear::new(names.at("proj"), dim, dim, true, normal_02(dim, dim));
        Ok(Dilated { qkv, proj, settings })
    }

    fn sizes<T: Float>(&self, x: &Tensor<T>) -> Result<Sizes<'_>> {
        let [batch, height, width, c] = x.dims("input of a dilated attention")?;
        let Settings { dim, num_heads, kernel_size, ref dilation, scale, .. } = self.settings;
        if c != dim {
            return Err(Error::shape("input of a dilated attention", format!("[batch, height, width, {dim}]"), x.shape()));
        }
        let width_of_head = dim / num_heads;
        Ok(Sizes {
            batch,
            map: [height, width],
            heads: num_heads,
            dim: width_of_head,
            kernel: kernel_size,
            dilations: dilation,
            scale: scale.unwrap_or_else(|| 1.0 / (width_of_head as f64).sqrt()),
        })
    }

    fn operands<'a, T: Float>(&self, qkv: &'a Tensor<T>) -> [Operand<'a, T>; 3] {
        let dim = self.settings.dim;
        [0, 1, 2].map(|part| Operand { data: qkv.data(), stride: 3 * dim, offset: part * dim })
    }

    /// `proj(attention(x))`, plus `residual`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, residual: Option<&Tensor<T>>) -> Result<(Tensor<T>, Saved<T>)> {
        let sizes = self.sizes(x)?;
        let qkv = self.qkv.forward(p, x)?;
        let [q, k, v] = self.operands(&qkv);
        let mut out = Tensor::scratch(x.shape());
        core::forward(out.data_mut(), q, k, v, sizes);
        let y = self.proj.forward_onto(p, &out, residual)?;
        Ok((y, Saved { qkv, out }))
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
        let (sizes, dim) = (self.sizes(x)?, self.settings.dim);
        let Saved { qkv, out } = saved;
        let d_out = self.proj.backward(p, g, &out, dy)?;
        drop(out);
        let [q, k, v] = self.operands(&qkv);
        let mut d_qkv = Tensor::scratch(qkv.shape());
        let (dq, rest) = ColumnsMut::new(d_qkv.data_mut(), 3 * dim).split_at(dim);
        let (dk, dv) = rest.split_at(dim);
        core::backward([dq, dk, dv], d_out.data(), q, k, v, sizes);
        drop((d_out, qkv));
        self.qkv.backward(p, g, x, &d_qkv)
    }
}

/// A random `kernel_size`.
pub fn draw_kernel(rng: &mut Rng) -> usize {
    [1, 2, 3, 3, 3, 4, 5][rng.below(7)]
}

/// A random distance that suits a neighbourhood of `kernel` rows.
pub fn draw_distance(rng: &mut Rng, kernel: usize) -> usize {
    if kernel % 2 == 1 { rng.between(1, 4) } else { 2 * rng.between(1, 2) }
}

/// Random `dim`, `num_heads`, `qkv_bias`, `kernel_size`, `dilation` and, sometimes, `qk_scale`; every head is at least `least` wide.
pub fn sample_settings(rng: &mut Rng, config: &mut Config, least: usize) {
    let (kernel, dilations) = (draw_kernel(rng), rng.between(1, 3));
    let heads = dilations * rng.between(1, 2);
    let distances: Vec<usize> = (0..dilations).map(|_| draw_distance(rng, kernel)).collect();
    config.set("dim", heads * rng.between(least, 5)).set("num_heads", heads).set("qkv_bias", rng.chance(0.7));
    config.set("kernel_size", kernel).set("dilation", distances);
}

/// A random optional `qk_scale`: 0 means the default.
pub fn sample_scale(rng: &mut Rng, config: &mut Config) {
    if rng.chance(0.3) {
        config.set("qk_scale", if rng.chance(0.3) { 0.0 } else { rng.range(0.2, 1.0) });
    }
}

/// The input `x` `[batch, height, width, dim]`.
fn draw_map(config: &Config, draw: &mut Draw) -> Result<()> {
    let (batch, height, width) = (draw.size("batch", 1, 3), draw.size("height", 1, 8), draw.size("width", 1, 8));
    draw.normal("x", [batch, height, width, config.positive("dim")?]);
    Ok(())
}

/// A benchmark on a square map.
fn bench_map(size: BenchSize) -> Option<Benchmark> {
    let side = size.side()?;
    Some(Benchmark::new(size).set("qkv_bias", true).size("height", side).size("width", side))
}

/// `attention.dilated`.
pub struct DilatedAttention;

impl Operation for DilatedAttention {
    const NAME: &'static str = "attention.dilated";
    const PAPER: &'static str = "2302.01791 DilateFormer";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_settings(rng, &mut config, 1);
        sample_scale(rng, &mut config);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_map(config, draw)
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, h, w, _] = inputs.dims("x")?;
        Ok(Some(Settings::from_config(config)?.cost(b * h * w)))
    }

    /// The paper's three dilations where they divide the heads, else fewer.
    fn bench(size: BenchSize) -> Option<Benchmark> {
        let count = (1..=3).rev().find(|n| size.heads.is_multiple_of(*n))?;
        Some(bench_map(size)?.set("kernel_size", 3).set("dilation", (1..=count).collect::<Vec<_>>()))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config())?;
        let (layer, layout) = Layout::build(|names| Dilated::new(names.here(), settings))?;
        let x = run.input("x")?;
        run.unary(&layout, |p, x| layer.forward(p, x, None), |p, g, saved, dy| layer.backward(p, g, &x, saved, dy))
    }
}

/// The settings of the global attention of late stages.
pub fn global_settings(config: &Config) -> Result<softmax::Settings> {
    Ok(softmax::Settings {
        qkv_bias: config.bool_or("qkv_bias", false)?,
        scale: qk_scale(config)?,
        ..softmax::Settings::new(config.positive("dim")?, config.usize_or("num_heads", 8)?)
    })
}

/// `attention.dilate_global`.
pub struct GlobalAttention;

impl Operation for GlobalAttention {
    const NAME: &'static str = "attention.dilate_global";
    const PAPER: &'static str = "2302.01791 DilateFormer";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let heads = rng.between(1, 4);
        config.set("dim", heads * rng.between(1, 5)).set("num_heads", heads).set("qkv_bias", rng.chance(0.7));
        sample_scale(rng, &mut config);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_map(config, draw)
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, height, width, c] = inputs.dims("x")?;
        let (n, heads) = (height * width, config.usize_or("num_heads", 8)?);
        // As attention.softmax: qkv, the attention's output, y; maximum and sum per row and head.
        Ok(Some(Cost { flops: 2 * b * n * (4 * c * c + 2 * n * c), activation_bytes: 4 * b * n * (5 * c + 2 * heads) }))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        bench_map(size)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = global_settings(run.config())?;
        let (layer, layout) = Layout::build(|names| Attention::new(names.here(), settings, normal_02))?;
        let map = run.input("x")?;
        let [batch, height, width, c] = map.dims("x")?;
        let tokens = map.reshape([batch, height * width, c])?;
        let groups = Groups::all(height * width, height * width);
        run.unary(
            &layout,
            |p, _| {
                let (y, saved) = layer.forward(p, &tokens, &groups, None, None)?;
                Ok((y.reshape(map.shape())?, saved))
            },
            |p, g, saved, dy| {
                let dx = layer.backward(p, g, &tokens, saved, &groups, None, &dy.reshape(tokens.shape())?)?;
                dx.reshape(map.shape())
            },
        )
    }
}
