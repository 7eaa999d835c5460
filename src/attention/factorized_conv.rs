//! `attention.factorized_conv`: CoaT's conv-attention (arXiv 2104.06399), linear in N.
//!
//! `[Q|K|V] = x W_qkvᵀ (+ b)`; per image and head, with the softmax down every column of K over all N tokens (class token too):
//! `S = softmax_columns(K)`, `M = Sᵀ V`, `O = s·Q M + E`, `E₀ = 0`, `Ê = Q̂ ∘ U`, `U = DW(V̂)` ([CRPE](crate::nn::conv_position)), and
//! `y = O W_projᵀ + b_proj`. The scale s stands on the factorised term alone.
//!
//! Backward: `dM = s·Qᵀ dO`, `dQ = s·dO Mᵀ` (`+ dÔ ∘ U`), `dV = S dM` (`+ DWᵀ(dÔ ∘ Q̂)`), and with `r = rowsum(M ∘ dM)`, which are the
//! column sums of `S ∘ dS`, `dK = S ∘ (V dMᵀ − 1 rᵀ)`.
//!
//! Forward, pieces of the tokens make their own maxima, sums and M; these are joined in order, then a second pass makes O. S is made
//! again in the backward pass from K, the maxima and the sums. Kept per token: 3 C (qkv), C (U), C (O).

use rayon::prelude::*;

use super::window::qk_scale;
use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::factorized::{exponentials, largest, products, softmax_gradient};
use crate::kernel::pieces::{Piece, Pieces};
use crate::linalg::{ColumnsMut, Epilogue, Mat, MatMut, gemm};
use crate::nn::conv_position::{RelativePosition, Values, check_tokens, map_size, sample_heads};
use crate::nn::{Init, Layout, Linear, Names, Params, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Buffer, Float, Tensor};

/// Tokens that a task works on at a time.
const BLOCK: usize = 64;
/// A piece holds at least this many tokens, and an image at most [`PIECES`] of them.
const PIECE: usize = 32;
const PIECES: usize = 16;

/// What the layer is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width C.
    pub dim: usize,
    /// Heads h, a divisor of C.
    pub num_heads: usize,
    /// `qkv` has a bias.
    pub qkv_bias: bool,
    /// The factor s; `None` is `d^{−1/2}`.
    pub scale: Option<f64>,
}

impl Settings {
    /// From the keys `num_heads`, `qkv_bias`, `qk_scale`.
    pub fn from_config(config: &Config, dim: usize) -> Result<Self> {
        let (num_heads, qkv_bias) = (config.usize_or("num_heads", 8)?, config.bool_or("qkv_bias", true)?);
        Ok(Settings { dim, num_heads, qkv_bias, scale: qk_scale(config)? })
    }
}

/// Factorised attention with convolutional relative positions: `qkv`, `proj`, and a [`RelativePosition`], which several layers may share.
#[derive(Clone, Debug)]
pub struct FactorizedAttention {
    qkv: Linear,
    proj: Linear,
    crpe: RelativePosition,
    dim: usize,
    heads: usize,
    scale: f64,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    qkv: Tensor<T>,
    u: Tensor<T>,
    out: Tensor<T>,
    /// Per image: M of every head, then the maxima and the inverse sums of the C columns of K.
    state: Tensor<T>,
}

/// The sizes of a batch and how it is cut.
struct Plan {
    batch: usize,
    tokens: usize,
    c: usize,
    heads: usize,
    pieces: Pieces,
}

impl Plan {
    /// The width of a head.
    fn d(&self) -> usize {
        self.c / self.heads
    }

    /// M of all heads.
    fn products(&self) -> usize {
        self.c * self.d()
    }

    /// M of all heads and two numbers per column.
    fn state(&self) -> usize {
        self.products() + 2 * self.c
    }

    /// Calls `each` with blocks of a piece: the first row in the image, the number of rows.
    fn blocks(&self, piece: Piece, mut each: impl FnMut(usize, usize)) {
        for at in (0..piece.rows).step_by(BLOCK) {
            each(piece.first + at, BLOCK.min(piece.rows - at));
        }
    }

    /// Columns `column..column + width` of some rows of an image in `[B, N, stride]`.
    fn rows<'a, T: Float>(&self, x: &'a Tensor<T>, image: usize, first: usize, n: usize, column: usize, width: usize) -> Mat<'a, T> {
        let stride = x.shape()[2];
        Mat::strided(&x.data()[(image * self.tokens + first) * stride + column..], n, width, stride, 1)
    }

    /// A right operand per image and head, out of the M (or dM) at the start of each state: `factor · M`, or its transpose.
    fn pack<T: Float>(&self, state: &[T], stride: usize, factor: T, transposed: bool) -> (Buffer<T>, usize) {
        let (d, len) = (self.d(), T::packed_len(self.d(), self.d()));
        let mut packed = Buffer::scratch(self.batch * self.heads * len);
        let mut scaled = Buffer::<T>::scratch(d * d);
        for (index, packed) in packed.chunks_exact_mut(len).enumerate() {
            let from = index / self.heads * stride + index % self.heads * d * d;
            scaled.iter_mut().zip(&state[from..from + d * d]).for_each(|(to, &m)| *to = m * factor);
            let m = Mat::new(&scaled, d, d);
            T::pack(if transposed { m.t() } else { m }, packed);
        }
        (packed, len)
    }
}

impl FactorizedAttention {
    /// Registers `qkv` and `proj`.
    pub fn new(mut names: Names, settings: Settings, crpe: RelativePosition, init: fn(usize, usize) -> Init) -> Result<Self> {
        let Settings { dim, num_heads, qkv_bias, scale } = settings;
        if num_heads == 0 || dim == 0 || !dim.is_multiple_of(num_heads) {
            return Err(Error::config("num_heads", format!("expected a divisor of the width {dim}, found {num_heads}")));
        }
        let qkv = Linear::new(names.at("qkv"), dim, 3 * dim, qkv_bias, init(dim, 3 * dim));
        let proj = Linear::new(names.at("proj"), dim, dim, true, init(dim, dim));
        let scale = scale.unwrap_or_else(|| 1.0 / ((dim / num_heads) as f64).sqrt());
        Ok(FactorizedAttention { qkv, proj, crpe, dim, heads: num_heads, scale })
    }

    fn plan<T: Float>(&self, x: &Tensor<T>, map: [usize; 2]) -> Result<Plan> {
        let batch = check_tokens("input of a factorised attention", x, map, self.dim)?;
        let tokens = 1 + map[0] * map[1];
        Ok(Plan { batch, tokens, c: self.dim, heads: self.heads, pieces: Pieces::new(batch, tokens, PIECE, PIECES) })
    }

    fn values<'a, T: Float>(&self, qkv: &'a Tensor<T>) -> Values<'a, T> {
        Values { data: qkv.data(), stride: 3 * self.dim, column: 2 * self.dim }
    }

    /// `[B, 1 + HW, C]` → the same, plus `residual`.
    pub fn forward<T: Float>(
        &self,
        p: &Params<T>,
        x: &Tensor<T>,
        map: [usize; 2],
        residual: Option<&Tensor<T>>,
    ) -> Result<(Tensor<T>, Saved<T>)> {
        let plan = self.plan(x, map)?;
        let Plan { batch, c, .. } = plan;
        let qkv = self.qkv.forward(p, x)?;
        let state = state(&plan, &qkv);
        let u = self.crpe.forward(p, self.values(&qkv), batch, map);

        // O = s·Q M + E
        let d = plan.d();
        let (packed, len) = plan.pack(state.data(), plan.state(), T::from_f64(self.scale), false);
        let mut out = Tensor::scratch(x.shape());
        let tasks: Vec<_> = plan.pieces.iter().zip(plan.pieces.deal(out.data_mut(), c)).collect();
        tasks.into_par_iter().for_each(|(piece, out)| {
            plan.blocks(piece, |first, n| {
                let (image, at) = (piece.image, first - piece.first);
                let out = &mut out[at * c..(at + n) * c];
                let class = usize::from(first == 0);
                out[..class * c].fill(T::ZERO);
                let q = plan.rows(&qkv, image, first + class, n - class, 0, c);
                products(&mut out[class * c..], c, q, map_rows(&u, image, first + class, n - class));
                for head in 0..plan.heads {
                    let q = plan.rows(&qkv, image, first, n, head * d, d);
                    let m = &packed[(image * plan.heads + head) * len..][..len];
                    T::multiply_packed(q, m, MatMut::strided(&mut out[head * d..], n, d, c), true);
                }
            });
        });
        let y = self.proj.forward_onto(p, &out, residual)?;
        Ok((y, Saved { qkv, u, out, state }))
    }

    /// `dx` (without the residual's share).
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        map: [usize; 2],
        saved: Saved<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let plan = self.plan(x, map)?;
        let Plan { batch, tokens, c, heads, ref pieces } = plan;
        let (d, scale) = (plan.d(), T::from_f64(self.scale));
        let Saved { qkv, u, out, state } = saved;
        let d_out = self.proj.backward(p, g, &out, dy)?;
        drop(out);
        if pieces.is_empty() {
            return Ok(Tensor::zeros(x.shape()));
        }

        // dM = s·Qᵀ dO, dQ = s·dO Mᵀ (+ dÔ ∘ U), dU = dÔ ∘ Q̂
        let (packed, len) = plan.pack(state.data(), plan.state(), scale, true);
        let (mut d_qkv, mut du) = (Tensor::scratch(qkv.shape()), Tensor::scratch(u.shape()));
        let mut parts = Buffer::<T>::zeros(pieces.len() * plan.products());
        {
            let mut du = &mut du.data_mut()[..];
            let mut tasks = Vec::with_capacity(pieces.len());
            for ((piece, d_qkv), part) in
                pieces.iter().zip(pieces.deal(d_qkv.data_mut(), 3 * c)).zip(parts.chunks_exact_mut(plan.products()))
            {
                let (mine, rest) = std::mem::take(&mut du).split_at_mut((piece.rows - usize::from(piece.first == 0)) * c);
                du = rest;
                tasks.push((piece, d_qkv, part, mine));
            }
            tasks.into_par_iter().for_each(|(piece, d_qkv, part, du)| {
                let (mut scaled, mut operand) = (Buffer::<T>::scratch(BLOCK * c), Buffer::<T>::scratch(T::packed_len(BLOCK, d)));
                let mut du = du;
                plan.blocks(piece, |first, n| {
                    let (image, at) = (piece.image, first - piece.first);
                    let d_qkv = &mut d_qkv[at * 3 * c..(at + n) * 3 * c];
                    let class = usize::from(first == 0);
                    if class == 1 {
                        d_qkv[..3 * c].fill(T::ZERO);
                    }
                    let (q, d_out_map) =
                        (plan.rows(&qkv, image, first + class, n - class, 0, c), plan.rows(&d_out, image, first + class, n - class, 0, c));
                    products(&mut d_qkv[class * 3 * c..], 3 * c, d_out_map, map_rows(&u, image, first + class, n - class));
                    let (mine, rest) = std::mem::take(&mut du).split_at_mut((n - class) * c);
                    du = rest;
                    products(mine, c, d_out_map, q);
                    let q = plan.rows(&qkv, image, first, n, 0, c);
                    for (to, i) in scaled.chunks_exact_mut(c).zip(0..n) {
                        to.iter_mut().zip(&q.data()[i * 3 * c..]).for_each(|(to, &q)| *to = scale * q);
                    }
                    for head in 0..heads {
                        let d_out = plan.rows(&d_out, image, first, n, head * d, d);
                        let m = &packed[(image * heads + head) * len..][..len];
                        T::multiply_packed(d_out, m, MatMut::strided(&mut d_qkv[head * d..], n, d, 3 * c), true);
                        T::pack(d_out, &mut operand);
                        let q = Mat::strided(&scaled[head * d..], n, d, c, 1);
                        T::multiply_packed(q.t(), &operand, MatMut::new(&mut part[head * d * d..(head + 1) * d * d], d, d), true);
                    }
                });
            });
        }
        let mut d_m = Tensor::<T>::zeros([batch, plan.products()]);
        for (d_m, parts) in d_m.data_mut().chunks_exact_mut(plan.products()).zip(parts.chunks_exact(plan.products() * pieces.per_image())) {
            parts.chunks_exact(plan.products()).for_each(|part| crate::kernel::elementwise::add(d_m, part));
        }
        drop((parts, packed));

        // dV̂ = DWᵀ(dU)
        let (_, dv) = ColumnsMut::new(d_qkv.data_mut(), 3 * c).split_at(2 * c);
        self.crpe.backward(p, g, self.values(&qkv), &du, dv, map);
        drop((du, u));

        // dV += S dM, dK = S ∘ (V dMᵀ − 1 rᵀ), r = rowsum(M ∘ dM)
        let mut r = Tensor::<T>::zeros([batch, c]);
        for (image, r) in r.data_mut().chunks_exact_mut(c).enumerate() {
            let (m, d_m) = (&state.data()[image * plan.state()..], &d_m.data()[image * plan.products()..]);
            for (r, (m, d_m)) in r.iter_mut().zip(m.chunks_exact(d).zip(d_m.chunks_exact(d))) {
                *r = m.iter().zip(d_m).fold(T::ZERO, |sum, (&m, &d_m)| m.fused(d_m, sum));
            }
        }
        let ((packed, _), (transposed, _)) =
            (plan.pack(d_m.data(), plan.products(), T::ONE, false), plan.pack(d_m.data(), plan.products(), T::ONE, true));
        let tasks: Vec<_> = pieces.iter().zip(pieces.deal(d_qkv.data_mut(), 3 * c)).collect();
        tasks.into_par_iter().for_each(|(piece, d_qkv)| {
            let mut s = Buffer::<T>::scratch(BLOCK * c);
            let columns = &state.data()[piece.image * plan.state() + plan.products()..(piece.image + 1) * plan.state()];
            let (max, inverse) = columns.split_at(c);
            plan.blocks(piece, |first, n| {
                let (image, at) = (piece.image, first - piece.first);
                let d_qkv = &mut d_qkv[at * 3 * c..(at + n) * 3 * c];
                let s = &mut s[..n * c];
                exponentials(s, plan.rows(&qkv, image, first, n, c, c), max, Some(inverse), None);
                for head in 0..heads {
                    let operand = (image * heads + head) * len..(image * heads + head + 1) * len;
                    let v = plan.rows(&qkv, image, first, n, 2 * c + head * d, d);
                    T::multiply_packed(v, &transposed[operand.clone()], MatMut::strided(&mut d_qkv[c + head * d..], n, d, 3 * c), false);
                    let s = Mat::strided(&s[head * d..], n, d, c, 1);
                    T::multiply_packed(s, &packed[operand], MatMut::strided(&mut d_qkv[2 * c + head * d..], n, d, 3 * c), true);
                }
                softmax_gradient(&mut d_qkv[c..], 3 * c, s, &r.data()[image * c..(image + 1) * c]);
            });
        });
        debug_assert_eq!(tokens, qkv.shape()[1]);
        drop(qkv);
        self.qkv.backward(p, g, x, &d_qkv)
    }

    /// `s·Q Sᵀ`, `[B, h, N, N]`, which the layer itself never forms: how much of token j's value token i takes, to be looked at.
    pub fn matrix<T: Float>(&self, saved: &Saved<T>) -> Result<Tensor<T>> {
        let [batch, tokens, _] = saved.qkv.dims("qkv")?;
        let plan = Plan { batch, tokens, c: self.dim, heads: self.heads, pieces: Pieces::new(batch, tokens, PIECE, PIECES) };
        let (c, d, scale) = (self.dim, plan.d(), T::from_f64(self.scale));
        let mut out = Tensor::scratch([batch, self.heads, tokens, tokens]);
        let mut s = Buffer::<T>::scratch(tokens * c);
        for (index, out) in out.data_mut().chunks_exact_mut((tokens * tokens).max(1)).enumerate() {
            let (image, head) = (index / self.heads, index % self.heads);
            if head == 0 {
                let (max, inverse) = saved.state.data()[image * plan.state() + plan.products()..][..2 * c].split_at(c);
                exponentials(&mut s, plan.rows(&saved.qkv, image, 0, tokens, c, c), max, Some(inverse), None);
            }
            let q = plan.rows(&saved.qkv, image, 0, tokens, head * d, d);
            gemm(q, Mat::strided(&s[head * d..], tokens, d, c, 1).t(), MatMut::new(out, tokens, tokens), Epilogue::default());
            out.iter_mut().for_each(|x| *x *= scale);
        }
        Ok(out)
    }

    /// What [`forward`](Self::forward) costs.
    pub fn cost(&self, b: usize, map: [usize; 2]) -> Cost {
        let (n, c, d) = (1 + map[0] * map[1], self.dim, self.dim / self.heads);
        // qkv and proj: 4 C² per token; Sᵀ V and Q M: d per channel. Kept: qkv, O, y; M, maxima and sums; and U, which CRPE counts.
        let own = Cost { flops: 2 * b * n * (4 * c * c + 2 * c * d), activation_bytes: 4 * b * (n * 5 * c + c * d + 2 * c) };
        own + self.crpe.cost(b, map)
    }
}

/// M, maxima and inverse sums of every image.
fn state<T: Float>(plan: &Plan, qkv: &Tensor<T>) -> Tensor<T> {
    let Plan { batch, c, heads, ref pieces, .. } = *plan;
    let d = plan.d();
    // Pieces: M = Σ e^{K − max} V, and maxima and sums, of their own.
    let mut parts = Buffer::<T>::zeros(pieces.len() * plan.state());
    let tasks: Vec<_> = pieces.iter().zip(parts.chunks_exact_mut(plan.state())).collect();
    tasks.into_par_iter().for_each(|(piece, part)| {
        let (m, columns) = part.split_at_mut(plan.products());
        let (max, sums) = columns.split_at_mut(c);
        max.fill(T::NEG_INFINITY);
        largest(max, plan.rows(qkv, piece.image, piece.first, piece.rows, c, c));
        let (mut e, mut operand) = (Buffer::<T>::scratch(BLOCK * c), Buffer::<T>::scratch(T::packed_len(BLOCK, d)));
        plan.blocks(piece, |first, n| {
            let e = &mut e[..n * c];
            exponentials(e, plan.rows(qkv, piece.image, first, n, c, c), max, None, Some(sums));
            for head in 0..heads {
                T::pack(plan.rows(qkv, piece.image, first, n, 2 * c + head * d, d), &mut operand);
                let e = Mat::strided(&e[head * d..], n, d, c, 1);
                T::multiply_packed(e.t(), &operand, MatMut::new(&mut m[head * d * d..(head + 1) * d * d], d, d), true);
            }
        });
    });
    let mut state = Tensor::zeros([batch, plan.state()]);
    if pieces.is_empty() {
        return state;
    }
    let (len, products) = (plan.state(), plan.products());
    let mut factor = Buffer::<T>::scratch(c);
    for (state, parts) in state.data_mut().chunks_exact_mut(len).zip(parts.chunks_exact(len * pieces.per_image())) {
        let (m, columns) = state.split_at_mut(products);
        let (max, sums) = columns.split_at_mut(c);
        max.fill(T::NEG_INFINITY);
        for part in parts.chunks_exact(len) {
            largest(max, Mat::new(&part[products..products + c], 1, c));
        }
        for part in parts.chunks_exact(len) {
            exponentials(&mut factor, Mat::new(&part[products..products + c], 1, c), max, None, None);
            for (j, &factor) in factor.iter().enumerate() {
                sums[j] = part[products + c + j].fused(factor, sums[j]);
                for (m, &part) in m[j * d..(j + 1) * d].iter_mut().zip(&part[j * d..(j + 1) * d]) {
                    *m = part.fused(factor, *m);
                }
            }
        }
        for (j, sum) in sums.iter_mut().enumerate() {
            *sum = T::ONE / *sum;
            m[j * d..(j + 1) * d].iter_mut().for_each(|m| *m *= *sum);
        }
    }
    state
}

/// The rows of U that belong to some tokens (not the class token) of an image.
fn map_rows<T: Float>(u: &Tensor<T>, image: usize, first: usize, n: usize) -> Mat<'_, T> {
    let (pixels, c) = (u.shape()[1], u.shape()[2]);
    let from = ((image * pixels + first) * c).saturating_sub(c).min(u.data().len());
    Mat::new(&u.data()[from..], n, c)
}

/// Random keys of the layer.
pub fn sample_settings(rng: &mut Rng, config: &mut Config, narrowest: usize) {
    sample_heads(rng, config, narrowest);
    config.set("qkv_bias", rng.chance(0.7));
    config.set("qk_scale", if rng.chance(0.3) { serde_json::json!(rng.range(0.2, 1.0)) } else { serde_json::Value::Null });
}

/// `attention.factorized_conv`.
pub struct FactorizedConv;

impl FactorizedConv {
    fn build(config: &Config) -> Result<(FactorizedAttention, std::sync::Arc<Layout>, [usize; 2])> {
        let dim = config.positive("dim")?;
        let (layer, layout) = Layout::build(|names| {
            let crpe = RelativePosition::from_config(names.at("crpe"), config, dim)?;
            FactorizedAttention::new(names.here(), Settings::from_config(config, dim)?, crpe, normal_02)
        })?;
        Ok((layer, layout, map_size(config, "height", "width")?))
    }
}

impl Operation for FactorizedConv {
    const NAME: &'static str = "attention.factorized_conv";
    const PAPER: &'static str = "2104.06399 CoaT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_settings(rng, &mut config, 1);
        config.set("height", rng.between(1, 9)).set("width", rng.between(1, 9));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let ([h, w], batch) = (map_size(config, "height", "width")?, draw.size("batch", 1, 3));
        draw.normal("x", [batch, 1 + h * w, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, ..], (layer, _, map)) = (inputs.dims::<3>("x")?, Self::build(config)?);
        Ok(Some(layer.cost(b, map)))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        // The class token is one more. Heads as published where there are eight; else one window.
        let side = size.side()?;
        let (windows, splits) = if size.heads == 8 { (vec![3, 5, 7], vec![2, 3, 3]) } else { (vec![3], vec![size.heads]) };
        let bench = Benchmark::new(size).set("qkv_bias", true).set("qk_scale", serde_json::Value::Null);
        Some(bench.set("crpe_windows", windows).set("crpe_head_splits", splits).set("height", side).set("width", side))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (layer, layout, map) = Self::build(run.config())?;
        let x = run.input("x")?;
        check_tokens("input `x`", &x, map, layer.dim)?;
        run.unary(&layout, |p, x| layer.forward(p, x, map, None), |p, g, saved, dy| layer.backward(p, g, &x, map, saved, dy))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::random::Purpose;

    /// The matrix that may be looked at is the one that the layer applies.
    #[test]
    fn the_matrix_mixes_the_values() {
        let (mut rng, map, c, heads) = (Rng::new(1, Purpose::Case, 0, 0), [5, 3], 6, 2);
        let build = |names: &mut Names| {
            let crpe = RelativePosition::new(names.at("crpe"), c, heads, &[3, 1], &[1, 1])?;
            FactorizedAttention::new(names.here(), Settings { dim: c, num_heads: heads, qkv_bias: true, scale: None }, crpe, normal_02)
        };
        let (layer, layout) = Layout::build(build).expect("a legal layer");
        let mut p = Params::<f64>::init(&layout, 3);
        p.flat_mut().iter_mut().for_each(|x| *x += 0.5 * rng.normal());
        let x = Tensor::from_fn([2, 16, c], |_| rng.normal());
        let (_, saved) = layer.forward(&p, &x, map, None).expect("an output");
        let matrix = layer.matrix(&saved).expect("a matrix");
        for (i, &out) in saved.out.data().iter().enumerate() {
            let (image, token, channel) = (i / (16 * c), i / c % 16, i % c);
            let row = &matrix.data()[((image * heads + channel / 3) * 16 + token) * 16..][..16];
            let qkv = |token: usize, column: usize| saved.qkv.data()[(image * 16 + token) * 3 * c + column];
            let mixed: f64 = row.iter().enumerate().map(|(j, a)| a * qkv(j, 2 * c + channel)).sum();
            let relative = if token == 0 { 0.0 } else { qkv(token, channel) * saved.u.data()[(image * 15 + token - 1) * c + channel] };
            assert!((mixed + relative - out).abs() < 1e-12, "{i}: {} instead of {out}", mixed + relative);
        }
    }
}
