//! `attention.xnorm`: linear attention without softmax (X-ViT, arXiv 2205.13805; UFO-ViT, arXiv 2109.14382).
//!
//! `[Q K V] = x W_qkvᵀ + b`, widths E; per head `Z = KᵀV` (`d × d`, a sum over all tokens), `XN(a) = γ a / max(‖a‖₂, ε)`,
//! `O = XN(Q) XN(Z)`, `y = O W_projᵀ + b`. Rows of Q are normalised; of Z the columns (axis "key", the index contracted with q: then
//! `|O| ≤ γ²`) or, as third-party code does, the rows ("value"). γ is one number per head, shared by both norms or not.
//! There is no official code; the readings are those of the sheet.
//!
//! Backward, with unit vectors `q̂`, `ẑ` and clamped norms m: `dq̃ = dO Z̃ᵀ`, `dZ̃ = q̃ᵀ dO`, `dγ_q = Σ dq̃ ⊙ q̂`, `dγ_kv = Σ dZ̃ ⊙ Ẑ`,
//! `dq = (γ/m)(dq̃ − q̂ (q̂·dq̃))`, dZ alike along its axis (without the projection where the norm is below ε), `dK = V dZᵀ`, `dV = K dZ`.

use rayon::prelude::*;

use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::Operand;
use crate::kernel::gram::{self, Maps, Tokens};
use crate::kernel::reduce::{add_column_sums, dot_lanes};
use crate::kernel::{get, put};
use crate::nn::{Init, Layout, Linear, Names, Param, Params};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::random::Rng;
use crate::tensor::{Buffer, Float, Tensor};

/// Along which index `KᵀV` is normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Every column is a unit vector: the sum runs over the key channels.
    Key,
    /// Every row is: the sum runs over the value channels.
    Value,
}

/// What the layer is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width C.
    pub dim: usize,
    /// Width E of q, k and v.
    pub attn_dim: usize,
    /// Heads h, a divisor of E.
    pub num_heads: usize,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// The axis of the norm of `KᵀV`.
    pub axis: Axis,
    /// One γ per head for both norms.
    pub shared_gamma: bool,
    /// ε: norms below count as this.
    pub eps: f64,
}

impl Settings {
    /// From the keys of `attention.xnorm` and that of the width.
    pub fn from_config(config: &Config, dim: &str) -> Result<Self> {
        let dim = config.usize(dim)?;
        let axis = match config.str_or("kv_norm_axis", "key")? {
            "key" => Axis::Key,
            "value" => Axis::Value,
            other => return Err(Error::config("kv_norm_axis", format!("expected \"key\" or \"value\", found \"{other}\""))),
        };
        Ok(Settings {
            dim,
            attn_dim: config.usize_or("attn_dim", dim)?,
            num_heads: config.usize("num_heads")?,
            qkv_bias: config.bool_or("qkv_bias", true)?,
            axis,
            shared_gamma: config.bool_or("shared_gamma", true)?,
            eps: config.f64_or("eps", 1e-12)?,
        })
    }

    pub(super) fn check(&self) -> Result<()> {
        let Settings { dim, attn_dim, num_heads, eps, .. } = *self;
        if dim == 0 {
            return Err(Error::config("dim", "expected a positive width, found 0"));
        }
        if num_heads == 0 || attn_dim == 0 || !attn_dim.is_multiple_of(num_heads) {
            return Err(Error::config("num_heads", format!("expected a divisor of attn_dim {attn_dim}, found {num_heads}")));
        }
        if !(eps >= 0.0 && eps.is_finite()) {
            return Err(Error::config("eps", format!("expected a finite number from 0, found {eps}")));
        }
        Ok(())
    }

    /// What the forward pass for `batch` images of `tokens` tokens costs.
    pub fn cost(&self, batch: usize, tokens: usize) -> Cost {
        let (c, e, h) = (self.dim, self.attn_dim, self.num_heads);
        let d = e / h.max(1);
        // qkv and proj: 4 C E per token; KᵀV and Q Z: 2 E d.
        let flops = 2 * batch * tokens * (4 * c * e + 2 * e * d);
        // qkv, O, y and the norms of q; Ẑ and its norms once per image.
        Cost { flops, activation_bytes: 4 * batch * (tokens * (4 * e + c + h) + e * d + e) }
    }
}

/// γ and ε: the part of the mechanism that whole attention and class attention share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norms {
    gamma: [Param; 2],
    pub heads: usize,
    /// Width of a head.
    pub width: usize,
    axis: Axis,
    eps: f64,
}

/// The matrix of every image and head after its norm.
pub(super) struct Unit<T: Float> {
    /// Ẑ, `[B, h, d, d]`.
    z: Tensor<T>,
    /// Norms of the columns or rows of Z, not clamped, `[B, h, d]`.
    norms: Tensor<T>,
}

impl Norms {
    pub fn new(names: &mut Names, settings: &Settings) -> Self {
        let mut gamma = |name| names.param(name, [1, settings.num_heads, 1, 1], Init::ONES);
        let gamma = if settings.shared_gamma { [gamma("gamma"); 2] } else { [gamma("gamma_q"), gamma("gamma_kv")] };
        let (heads, width) = (settings.num_heads, settings.attn_dim / settings.num_heads);
        Norms { gamma, heads, width, axis: settings.axis, eps: settings.eps }
    }

    /// γ of q, and of q times that of `KᵀV`, for every head.
    fn gains<T: Float>(&self, p: &Params<T>) -> [Vec<T>; 2] {
        let [q, kv] = self.gamma.map(|gamma| p.get(gamma));
        [q.to_vec(), q.iter().zip(kv).map(|(&q, &kv)| q * kv).collect()]
    }

    /// Ẑ of `Z = KᵀV`.
    pub fn unit<T: Float>(&self, k: Operand<T>, v: Operand<T>, sizes: Tokens) -> Unit<T> {
        let (h, d) = (self.heads, self.width);
        let (mut z, mut norms) = (Tensor::scratch([sizes.batch, h, d, d]), Tensor::scratch([sizes.batch, h, d]));
        gram::products(z.data_mut(), None, k, v, None, [d, d], sizes);
        (z.data_mut().par_chunks_mut(d * d))
            .zip(norms.data_mut().par_chunks_mut(d))
            .for_each(|(z, norms)| T::dispatch(Normalise { z, norms, axis: self.axis, eps: T::from_f64(self.eps) }));
        Unit { z, norms }
    }

    /// O `[B·N, E]` of the queries, and their norms `[B·N, h]`.
    pub fn attend<T: Float>(&self, p: &Params<T>, q: Operand<T>, unit: &Unit<T>, [batch, queries]: [usize; 2]) -> (Tensor<T>, Tensor<T>) {
        let (h, d) = (self.heads, self.width);
        let maps = Maps::new(unit.z.data(), h, [d, d], false);
        let (mut out, mut norms) = (Tensor::scratch([batch, queries, h * d]), Tensor::scratch([batch * queries, h]));
        let [_, gain] = self.gains(p);
        gram::par_rows_with([out.data_mut(), norms.data_mut()], [h * d, h], queries, |image, first, out, norms| {
            maps.apply(image, q, first, out, h * d, 0, false);
            T::dispatch(ScaleRows { out, norms, q: Rows::of(q, first), gain: &gain, eps: T::from_f64(self.eps) });
        });
        (out, norms)
    }

    /// The gradient dZ of `KᵀV`, of queries, their norms and dO; adds `dγ_kv`.
    #[allow(clippy::too_many_arguments)]
    pub fn unit_backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        unit: &Unit<T>,
        q: Operand<T>,
        norms: &Tensor<T>,
        d_out: &Tensor<T>,
        [batch, queries]: [usize; 2],
    ) -> Tensor<T> {
        let (h, d, eps) = (self.heads, self.width, T::from_f64(self.eps));
        let [gain, _] = self.gains(p);
        // q̃ = γ q / m, dZ̃ = q̃ᵀ dO
        let mut scales = norms.clone();
        for row in scales.data_mut().chunks_exact_mut(h) {
            row.iter_mut().zip(&gain).for_each(|(m, &gain)| *m = gain / m.larger(eps));
        }
        let mut dz = Tensor::scratch(unit.z.shape());
        let d_rows = Operand { data: d_out.data(), stride: h * d, offset: 0 };
        gram::products(dz.data_mut(), None, q, d_rows, Some(scales.data()), [d, d], Tokens { batch, tokens: queries, heads: h });
        let mut d_gamma = Buffer::<T>::scratch(batch * h);
        let gamma = p.get(self.gamma[1]);
        (dz.data_mut().par_chunks_mut(d * d)).zip(d_gamma.par_iter_mut()).enumerate().for_each(|(i, (dz, d_gamma))| {
            let (z, norms) = (&unit.z.data()[i * d * d..(i + 1) * d * d], &unit.norms.data()[i * d..(i + 1) * d]);
            *d_gamma = T::dispatch(NormaliseBackward { dz, z, norms, gamma: gamma[i % h], axis: self.axis, eps });
        });
        add_column_sums(g.get_mut(self.gamma[1]), &d_gamma);
        dz
    }

    /// dQ into columns `0..E` of rows of `rows`, for the queries from `first` on, of their dO; `norms` become what
    /// [`add_gain`](Self::add_gain) needs.
    #[allow(clippy::too_many_arguments)]
    pub fn queries_backward<T: Float>(
        &self,
        maps: &Maps<T>,
        gain: &[T],
        [q, d_out]: [Operand<T>; 2],
        (image, first): (usize, usize),
        rows: &mut [T],
        stride: usize,
        norms: &mut [T],
    ) {
        // dq̃ = dO Z̃ᵀ, of which γ_kv is left out here and comes in with the gain.
        maps.apply(image, d_out, first, rows, stride, 0, false);
        T::dispatch(QueryGradient { rows, stride, width: self.width, norms, q: Rows::of(q, first), gain, eps: T::from_f64(self.eps) });
    }

    /// What [`queries_backward`](Self::queries_backward) shares: `Ẑᵀ` and the gains.
    pub fn backward_maps<T: Float>(&self, p: &Params<T>, unit: &Unit<T>) -> (Maps<T>, Vec<T>) {
        let [_, gain] = self.gains(p);
        (Maps::new(unit.z.data(), self.heads, [self.width; 2], true), gain)
    }

    /// dK and dV from dZ: `V dZᵀ` and `K dZ`.
    pub fn kv_maps<T: Float>(&self, dz: &Tensor<T>) -> [Maps<T>; 2] {
        [true, false].map(|transpose| Maps::new(dz.data(), self.heads, [self.width; 2], transpose))
    }

    /// Adds `dγ_q = γ_kv Σ (dO Ẑᵀ) ⊙ q̂`.
    pub fn add_gain<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, dots: &Tensor<T>) {
        let mut sums = Buffer::<T>::zeros(self.heads);
        add_column_sums(&mut sums, dots.data());
        for ((total, &sum), &gamma) in g.get_mut(self.gamma[0]).iter_mut().zip(sums.iter()).zip(p.get(self.gamma[1])) {
            *total += sum * gamma;
        }
    }
}

/// Rows of all heads of an operand, from one on.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    data: &'a [T],
    stride: usize,
}

impl<'a, T: Float> Rows<'a, T> {
    fn of(x: Operand<'a, T>, first: usize) -> Self {
        Rows { data: &x.data[first * x.stride + x.offset..], stride: x.stride }
    }

    #[inline(always)]
    fn head(&self, row: usize, head: usize, width: usize) -> &'a [T] {
        let from = row * self.stride + head * width;
        &self.data[from..from + width]
    }
}

/// Z → Ẑ, with the norms of its columns or rows.
struct Normalise<'a, T> {
    z: &'a mut [T],
    norms: &'a mut [T],
    axis: Axis,
    eps: T,
}

impl<T: Float> Kernel<T> for Normalise<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let (d, eps) = (self.norms.len(), V::splat(self.eps));
        match self.axis {
            Axis::Key => {
                let mut j = 0;
                while j < d {
                    let mut squares = V::splat(T::ZERO);
                    for row in self.z.chunks_exact(d) {
                        let z = get::<T, V>(row, j, T::ZERO);
                        squares = z.mul_add(z, squares);
                    }
                    let norm = squares.sqrt();
                    put(norm, self.norms, j);
                    for row in self.z.chunks_exact_mut(d) {
                        put(get::<T, V>(row, j, T::ZERO) / norm.max(eps), row, j);
                    }
                    j += LANES;
                }
            }
            Axis::Value => {
                for (row, norm) in self.z.chunks_exact_mut(d).zip(self.norms) {
                    *norm = dot_lanes::<T, V>(row, row).sum().root();
                    let m = V::splat(norm.larger(self.eps));
                    let mut j = 0;
                    while j < d {
                        put(get::<T, V>(row, j, T::ZERO) / m, row, j);
                        j += LANES;
                    }
                }
            }
        }
    }
}

/// dZ̃ → dZ; returns `dγ = Σ dZ̃ ⊙ Ẑ`.
struct NormaliseBackward<'a, T> {
    dz: &'a mut [T],
    z: &'a [T],
    norms: &'a [T],
    gamma: T,
    axis: Axis,
    eps: T,
}

impl<T: Float> Kernel<T> for NormaliseBackward<'_, T> {
    type Output = T;
    #[inline(always)]
    fn run<V: Vector<T>>(self) -> T {
        let (d, eps, zero, gamma) = (self.norms.len(), V::splat(self.eps), V::splat(T::ZERO), V::splat(self.gamma));
        let mut d_gamma = zero;
        match self.axis {
            Axis::Key => {
                let mut j = 0;
                while j < d {
                    let mut dots = zero;
                    for (z, dz) in self.z.chunks_exact(d).zip(self.dz.chunks_exact(d)) {
                        dots = get::<T, V>(z, j, T::ZERO).mul_add(get(dz, j, T::ZERO), dots);
                    }
                    d_gamma = d_gamma + dots;
                    let norm = get::<T, V>(self.norms, j, T::ONE);
                    let (dots, factor) = (norm.less(eps, zero, dots), gamma / norm.max(eps));
                    for (z, dz) in self.z.chunks_exact(d).zip(self.dz.chunks_exact_mut(d)) {
                        put((get::<T, V>(dz, j, T::ZERO) - get::<T, V>(z, j, T::ZERO) * dots) * factor, dz, j);
                    }
                    j += LANES;
                }
            }
            Axis::Value => {
                for ((z, dz), &norm) in self.z.chunks_exact(d).zip(self.dz.chunks_exact_mut(d)).zip(self.norms) {
                    let lanes = dot_lanes::<T, V>(z, dz);
                    d_gamma = d_gamma + lanes;
                    let dot = V::splat(if norm < self.eps { T::ZERO } else { lanes.sum() });
                    let factor = gamma / V::splat(norm.larger(self.eps));
                    let mut j = 0;
                    while j < d {
                        put((get::<T, V>(dz, j, T::ZERO) - get::<T, V>(z, j, T::ZERO) * dot) * factor, dz, j);
                        j += LANES;
                    }
                }
            }
        }
        d_gamma.sum()
    }
}

/// Rows `q Ẑ` → O, with the norms of the queries.
struct ScaleRows<'a, T> {
    out: &'a mut [T],
    norms: &'a mut [T],
    q: Rows<'a, T>,
    gain: &'a [T],
    eps: T,
}

impl<T: Float> Kernel<T> for ScaleRows<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let h = self.gain.len();
        let d = self.out.len() / self.norms.len();
        for (i, (out, norms)) in self.out.chunks_exact_mut(h * d).zip(self.norms.chunks_exact_mut(h)).enumerate() {
            for (a, (out, norm)) in out.chunks_exact_mut(d).zip(norms).enumerate() {
                let q = self.q.head(i, a, d);
                *norm = dot_lanes::<T, V>(q, q).sum().root();
                let factor = V::splat(self.gain[a] / norm.larger(self.eps));
                let mut j = 0;
                while j < d {
                    put(get::<T, V>(out, j, T::ZERO) * factor, out, j);
                    j += LANES;
                }
            }
        }
    }
}

/// Rows `dO Ẑᵀ` → dQ; norms → `q̂·(dO Ẑᵀ)`.
struct QueryGradient<'a, T> {
    rows: &'a mut [T],
    stride: usize,
    width: usize,
    norms: &'a mut [T],
    q: Rows<'a, T>,
    gain: &'a [T],
    eps: T,
}

impl<T: Float> Kernel<T> for QueryGradient<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let h = self.gain.len();
        let d = self.width;
        for (i, (row, norms)) in self.rows.chunks_exact_mut(self.stride).zip(self.norms.chunks_exact_mut(h)).enumerate() {
            for (a, (dq, norm)) in row[..h * d].chunks_exact_mut(d).zip(norms).enumerate() {
                let q = self.q.head(i, a, d);
                let m = norm.larger(self.eps);
                let dot = dot_lanes::<T, V>(q, dq).sum() / m;
                let factor = V::splat(self.gain[a] / m);
                let along = V::splat(if *norm < self.eps { T::ZERO } else { dot / m });
                let mut j = 0;
                while j < d {
                    put((get::<T, V>(dq, j, T::ZERO) - get::<T, V>(q, j, T::ZERO) * along) * factor, dq, j);
                    j += LANES;
                }
                *norm = dot;
            }
        }
    }
}

/// Linear attention with parameters `qkv`, `proj`, `gamma`.
#[derive(Clone, Debug)]
pub struct XNorm {
    qkv: Linear,
    proj: Linear,
    norms: Norms,
    dim: usize,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    qkv: Tensor<T>,
    out: Tensor<T>,
    norms: Tensor<T>,
    unit: Unit<T>,
}

impl XNorm {
    /// Registers the parameters.
    pub fn new(mut names: Names, settings: Settings, init: fn(usize, usize) -> Init) -> Result<Self> {
        settings.check()?;
        let Settings { dim, attn_dim, qkv_bias, .. } = settings;
        let qkv = Linear::new(names.at("qkv"), dim, 3 * attn_dim, qkv_bias, init(dim, 3 * attn_dim));
        let proj = Linear::new(names.at("proj"), attn_dim, dim, true, init(attn_dim, dim));
        Ok(XNorm { qkv, proj, norms: Norms::new(&mut names, &settings), dim })
    }

    fn sizes<T: Float>(&self, x: &Tensor<T>) -> Result<Tokens> {
        let [batch, tokens, c] = x.dims("input of an XNorm attention")?;
        if c != self.dim || tokens == 0 {
            return Err(Error::shape("input of an XNorm attention", format!("[batch, tokens ≥ 1, {}]", self.dim), x.shape()));
        }
        Ok(Tokens { batch, tokens, heads: self.norms.heads })
    }

    fn parts<'a, T: Float>(&self, qkv: &'a Tensor<T>) -> [Operand<'a, T>; 3] {
        let e = self.norms.heads * self.norms.width;
        [0, 1, 2].map(|part| Operand { data: qkv.data(), stride: 3 * e, offset: part * e })
    }

    /// `proj(attention(x))`, plus `residual`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, residual: Option<&Tensor<T>>) -> Result<(Tensor<T>, Saved<T>)> {
        let sizes = self.sizes(x)?;
        let qkv = self.qkv.forward(p, x)?;
        let [q, k, v] = self.parts(&qkv);
        let unit = self.norms.unit(k, v, sizes);
        let (out, norms) = self.norms.attend(p, q, &unit, [sizes.batch, sizes.tokens]);
        let y = self.proj.forward_onto(p, &out, residual)?;
        Ok((y, Saved { qkv, out, norms, unit }))
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
        let (sizes, e) = (self.sizes(x)?, self.norms.heads * self.norms.width);
        let Saved { qkv, out, mut norms, unit } = saved;
        let d_out = self.proj.backward(p, g, &out, dy)?;
        drop(out);
        let [q, k, v] = self.parts(&qkv);
        let dz = self.norms.unit_backward(p, g, &unit, q, &norms, &d_out, [sizes.batch, sizes.tokens]);
        let (maps, gain) = self.norms.backward_maps(p, &unit);
        let [to_k, to_v] = self.norms.kv_maps(&dz);
        let d_rows = Operand { data: d_out.data(), stride: e, offset: 0 };
        let mut d_qkv = Tensor::scratch(qkv.shape());
        let strides = [3 * e, self.norms.heads];
        gram::par_rows_with([d_qkv.data_mut(), norms.data_mut()], strides, sizes.tokens, |image, first, rows, norms| {
            self.norms.queries_backward(&maps, &gain, [q, d_rows], (image, first), rows, 3 * e, norms);
            to_k.apply(image, v, first, rows, 3 * e, e, false);
            to_v.apply(image, k, first, rows, 3 * e, 2 * e, false);
        });
        self.norms.add_gain(p, g, &norms);
        drop((qkv, d_out));
        self.qkv.backward(p, g, x, &d_qkv)
    }
}

/// Random settings.
pub fn sample_settings(rng: &mut Rng, config: &mut Config) {
    let (heads, width) = (rng.between(1, 4), rng.between(1, 7));
    config.set("dim", rng.between(1, 12)).set("attn_dim", heads * width).set("num_heads", heads).set("qkv_bias", rng.chance(0.7));
    config.set("kv_norm_axis", rng.pick(&["key", "value"])).set("shared_gamma", rng.chance(0.5));
    config.set("eps", if rng.chance(0.8) { 1e-12 } else { 0.5 });
}

/// `attention.xnorm`.
pub struct XNormAttention;

impl Operation for XNormAttention {
    const NAME: &'static str = "attention.xnorm";
    const PAPER: &'static str = "2205.13805 X-ViT, 2109.14382 UFO-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_settings(rng, &mut config);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let most = if draw.rng.chance(0.2) { 150 } else { 20 };
        let (batch, tokens) = (draw.size("batch", 1, 3), draw.size("tokens", 1, most));
        draw.normal("x", [batch, tokens, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        Ok(Some(Settings::from_config(config, "dim")?.cost(b, n)))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        let all = Benchmark::new(size).set("attn_dim", size.dim).set("qkv_bias", true).set("kv_norm_axis", "key");
        Some(all.set("shared_gamma", true).set("eps", 1e-12))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config(), "dim")?;
        let (layer, layout) = Layout::build(|names| XNorm::new(names.here(), settings, crate::nn::normal_02))?;
        let x = run.input("x")?;
        run.unary(&layout, |p, x| layer.forward(p, x, None), |p, g, saved, dy| layer.backward(p, g, &x, saved, dy))
    }
}
