//! `attention.performer`: the linear attention of T2T-ViT's token Performer (arXiv 2101.11986, after 2009.14794), and
//! `nn.performer_features`, its features.
//!
//! With `φ(x)_i = e^{w_i·x − |x|²/2} / √m`:
//!
//! `[K|Q|V] = x W_kqvᵀ + b` (in this order), `K′ = φ(K)`, `Q′ = φ(Q)`, `σ = K′ᵀ 1`, `M = K′ᵀ V`, `D = Q′ σ`,
//! `Y = (Q′ M) / (D + ε)`, `out = V + Y W_projᵀ + b_proj`: the skip is V, since x has another width. ε stands beside D as it is:
//! D may be far smaller.
//!
//! Backward: `dY = dOut W_proj`, `R = dY / (D + ε)`, `dD = −rowsum(R ∘ Y)`, `dQ′ = R Mᵀ + dD σᵀ`, `dM = Q′ᵀ R`, `dσ = Q′ᵀ dD`,
//! `dK′ = V dMᵀ + 1 dσᵀ`, `dV = dOut + K′ dM`; with `T = dΦ ∘ Φ`, `dX = T w − (T·1) ∘ X` for Q and K.
//!
//! Tokens pass once forward for M, once for Y, and once more each backward, in blocks; a small M is summed over pieces of the tokens.
//! Kept are kqv, K′, Q′, Y and D: 4 E + 2 m + 1 numbers per token.

use rayon::prelude::*;

use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::kernel::features::{RankOne, Sums, divide, divide_backward, features, features_backward, minus_scaled};
use crate::kernel::pieces::{Piece, Pieces};
use crate::linalg::{Epilogue, Mat, MatMut, count_flops, gemm};
use crate::nn::dropout::Dropout;
use crate::nn::{Init, Layout, Linear, Names, Param, Params, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Buffer, Float, Tensor};

/// Tokens whose features are computed at a time.
const BLOCK: usize = 128;
/// A piece holds at least this many tokens, and an image at most [`PIECES`] of them.
const PIECE: usize = 32;
const PIECES: usize = 16;
/// From this size on, M is one matrix product, shared out by its elements; a smaller one is summed over pieces of the tokens.
const LARGE: usize = 1 << 14;

/// What the layer is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width of the input.
    pub dim: usize,
    /// Width E of q, k, v and the output.
    pub in_dim: usize,
    /// Features m over E, truncated.
    pub kernel_ratio: f64,
    /// ε beside the normaliser D.
    pub eps: f64,
}

impl Settings {
    /// From the keys `dim`, `in_dim`, `head_cnt`, `kernel_ratio`, `epsilon`.
    pub fn from_config(config: &Config) -> Result<Self> {
        let heads = config.usize_or("head_cnt", 1)?;
        if heads != 1 {
            return Err(Error::config("head_cnt", format!("expected 1, found {heads}: the published layer does not split heads")));
        }
        Ok(Settings {
            dim: config.positive("dim")?,
            in_dim: config.positive("in_dim")?,
            kernel_ratio: config.f64_or("kernel_ratio", 0.5)?,
            eps: config.f64_or("epsilon", 1e-8)?,
        })
    }

    /// The number of features m.
    pub fn features(&self) -> Result<usize> {
        let m = self.in_dim as f64 * self.kernel_ratio;
        if (1.0..65536.0).contains(&m) {
            Ok(m as usize)
        } else {
            Err(Error::config("kernel_ratio", format!("expected 1 to 65535 features, found {} · {}", self.in_dim, self.kernel_ratio)))
        }
    }
}

/// Linear attention by positive random features, with parameters `kqv`, `proj` and the fixed matrix `w`.
#[derive(Clone, Debug)]
pub struct Performer {
    kqv: Linear,
    proj: Linear,
    w: Param,
    dim: usize,
    width: usize,
    features: usize,
    eps: f64,
    dropout: Option<Dropout>,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    kqv: Tensor<T>,
    phi_k: Tensor<T>,
    phi_q: Tensor<T>,
    /// D.
    normaliser: Tensor<T>,
    /// σ and M of every image.
    state: Tensor<T>,
    /// Y.
    mixed: Tensor<T>,
}

/// The sizes of a batch and how it is cut.
struct Plan {
    batch: usize,
    tokens: usize,
    e: usize,
    m: usize,
    pieces: Pieces,
}

impl Plan {
    fn new<T: Float>(kqv: &Tensor<T>, m: usize) -> Result<Plan> {
        let [batch, tokens, three_e] = kqv.dims("kqv")?;
        Ok(Plan { batch, tokens, e: three_e / 3, m, pieces: Pieces::new(batch, tokens, PIECE, PIECES) })
    }

    /// σ and M, one after the other.
    fn state_len(&self) -> usize {
        self.m * (1 + self.e)
    }

    /// Whether M is one matrix product.
    fn large(&self) -> bool {
        self.m * self.e >= LARGE
    }

    /// What a piece sums: σ, and M unless it is large.
    fn part_len(&self) -> usize {
        if self.large() { self.m } else { self.state_len() }
    }

    /// σ of an image.
    fn sigma<'a, T: Float>(&self, state: &'a Tensor<T>, image: usize) -> &'a [T] {
        &state.data()[image * self.state_len()..][..self.m]
    }

    /// Calls `each` with blocks of a piece: the first row in the batch, the first row in the piece, the number of rows.
    fn blocks(&self, piece: Piece, mut each: impl FnMut(usize, usize, usize)) {
        for at in (0..piece.rows).step_by(BLOCK) {
            each(piece.image * self.tokens + piece.first + at, at, BLOCK.min(piece.rows - at));
        }
    }

    /// Part 0, 1 or 2 (k, q, v) of some rows.
    fn part<'a, T: Float>(&self, kqv: &'a Tensor<T>, part: usize, first: usize, rows: usize) -> Mat<'a, T> {
        let from = (first * 3 * self.e + part * self.e).min(kqv.data().len());
        Mat::strided(&kqv.data()[from..], rows, self.e, 3 * self.e, 1)
    }

    /// The state of each image: the sums of its pieces, in order, and a large M as `ΦᵀX`.
    fn join<'a, T: Float>(&self, parts: &[T], phi: &Tensor<T>, x: impl Fn(usize) -> Mat<'a, T>) -> Tensor<T> {
        let (len, part_len, per_image) = (self.state_len(), self.part_len(), self.pieces.per_image());
        let mut state = Tensor::zeros([self.batch, len]);
        if self.pieces.is_empty() {
            return state;
        }
        for (image, (state, parts)) in state.data_mut().chunks_exact_mut(len).zip(parts.chunks_exact(part_len * per_image)).enumerate() {
            parts.chunks_exact(part_len).for_each(|part| elementwise::add(&mut state[..part_len], part));
            if self.large() {
                let phi = Mat::new(rows_of(phi, image * self.tokens, self.tokens), self.tokens, self.m);
                gemm(phi.t(), x(image), MatMut::new(&mut state[self.m..], self.m, self.e), Epilogue::default());
            }
        }
        state
    }

    /// A right operand for every image: M or its transpose out of states.
    fn pack<T: Float>(&self, state: &Tensor<T>, transposed: bool) -> Vec<Buffer<T>> {
        let pack = |state: &[T]| {
            let m = Mat::new(&state[self.m..], self.m, self.e);
            let m = if transposed { m.t() } else { m };
            let mut packed = Buffer::scratch(T::packed_len(m.rows(), m.cols()));
            T::pack(m, &mut packed);
            packed
        };
        state.data().chunks_exact(self.state_len()).map(pack).collect()
    }
}

impl Performer {
    /// Registers `kqv`, `proj` and the buffer `w`.
    pub fn new(mut names: Names, settings: Settings, dropout: Option<Dropout>, init: fn(usize, usize) -> Init) -> Result<Self> {
        let Settings { dim, in_dim, eps, .. } = settings;
        let m = settings.features()?;
        let kqv = Linear::new(names.at("kqv"), dim, 3 * in_dim, true, init(dim, 3 * in_dim));
        let proj = Linear::new(names.at("proj"), in_dim, in_dim, true, init(in_dim, in_dim));
        let w = names.buffer("w", [m, in_dim], Init::Orthogonal { rows: m, cols: in_dim });
        Ok(Performer { kqv, proj, w, dim, width: in_dim, features: m, eps, dropout })
    }

    /// The linear layer that makes k, q and v.
    pub fn kqv(&self) -> &Linear {
        &self.kqv
    }

    /// `[B, N, dim]` → `[B, N, E]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let [_, _, dim] = x.dims("input of a performer")?;
        if dim != self.dim {
            return Err(Error::shape("input of a performer", format!("[batch, tokens, {}]", self.dim), x.shape()));
        }
        self.forward_kqv(p, self.kqv.forward(p, x)?)
    }

    /// The rest of [`forward`](Self::forward), from `[K|Q|V]`.
    pub fn forward_kqv<T: Float>(&self, p: &Params<T>, kqv: Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let plan = Plan::new(&kqv, self.features)?;
        let Plan { batch, tokens, e, m, ref pieces } = plan;
        let w = self.packed_w(p, true);
        let rows = |width: usize| Tensor::<T>::scratch([batch, tokens, width]);
        let (mut phi_k, mut phi_q, mut mixed, mut normaliser) = (rows(m), rows(m), rows(e), rows(1));

        // K′, σ = K′ᵀ 1, M = K′ᵀ V
        let mut parts = Buffer::<T>::zeros(pieces.len() * plan.part_len());
        let tasks: Vec<_> = pieces.iter().zip(pieces.deal(phi_k.data_mut(), m)).zip(parts.chunks_exact_mut(plan.part_len())).collect();
        tasks.into_par_iter().for_each(|((piece, phi), part)| {
            let (sigma, sum) = part.split_at_mut(m);
            let mut operand = Buffer::<T>::scratch(if plan.large() { 0 } else { T::packed_len(BLOCK, e) });
            plan.blocks(piece, |first, at, n| {
                let (k, phi) = (plan.part(&kqv, 0, first, n), &mut phi[at * m..(at + n) * m]);
                T::multiply_packed(k, &w, MatMut::new(phi, n, m), false);
                features(phi, k, Sums::Columns(sigma));
                if !plan.large() {
                    T::pack(plan.part(&kqv, 2, first, n), &mut operand);
                    T::multiply_packed(Mat::new(phi, n, m).t(), &operand, MatMut::new(sum, m, e), true);
                }
            });
        });
        let state = plan.join(&parts, &phi_k, |image| plan.part(&kqv, 2, image * tokens, tokens));
        drop(parts);

        // Q′, D = Q′ σ, Y = (Q′ M) / (D + ε)
        count_flops(2 * batch * tokens * m);
        let packed = plan.pack(&state, false);
        let tasks: Vec<_> = (pieces.iter().zip(pieces.deal(phi_q.data_mut(), m)))
            .zip(pieces.deal(mixed.data_mut(), e).zip(pieces.deal(normaliser.data_mut(), 1)))
            .collect();
        tasks.into_par_iter().for_each(|((piece, phi), (mixed, normaliser))| {
            let sigma = plan.sigma(&state, piece.image);
            plan.blocks(piece, |first, at, n| {
                let (q, phi, d) = (plan.part(&kqv, 1, first, n), &mut phi[at * m..(at + n) * m], &mut normaliser[at..at + n]);
                let y = &mut mixed[at * e..(at + n) * e];
                T::multiply_packed(q, &w, MatMut::new(phi, n, m), false);
                features(phi, q, Sums::Rows { sigma, out: d });
                T::multiply_packed(Mat::new(phi, n, m), &packed[piece.image], MatMut::new(y, n, e), false);
                divide(y, d, T::from_f64(self.eps));
            });
        });

        let y = match self.dropout {
            None => self.proj.forward_onto_rows(p, &mixed, Some(plan.part(&kqv, 2, 0, batch * tokens)))?,
            Some(dropout) => {
                let mut y = self.proj.forward(p, &mixed)?;
                dropout.apply(p, y.data_mut(), 0);
                let skip = plan.part(&kqv, 2, 0, batch * tokens);
                y.data_mut().chunks_exact_mut(e).enumerate().for_each(|(i, y)| {
                    y.iter_mut().zip(&skip.data()[i * 3 * e..]).for_each(|(y, &v)| *y += v);
                });
                y
            }
        };
        Ok((y, Saved { kqv, phi_k, phi_q, normaliser, state, mixed }))
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
        let d_kqv = self.backward_kqv(p, g, saved, dy)?;
        self.kqv.backward(p, g, x, &d_kqv)
    }

    /// The gradient of `[K|Q|V]`.
    pub fn backward_kqv<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let Saved { kqv, phi_k, phi_q, normaliser, state, mixed } = saved;
        let plan = Plan::new(&kqv, self.features)?;
        let Plan { batch, tokens, e, m, ref pieces } = plan;
        dy.expect_shape("gradient of a performer", mixed.shape())?;
        let mut d_kqv = Tensor::scratch(kqv.shape());
        if dy.data().is_empty() {
            return Ok(d_kqv);
        }
        let mut masked = dy.clone();
        if let Some(dropout) = self.dropout {
            dropout.apply(p, masked.data_mut(), 0);
        }
        let d_mixed = self.proj.backward(p, g, &mixed, &masked)?;
        drop(masked);
        let w = self.packed_w(p, false);

        // R, dD, dM = Q′ᵀ R, dσ = Q′ᵀ dD, dQ
        let transposed = plan.pack(&state, true);
        let mut parts = Buffer::<T>::zeros(pieces.len() * plan.part_len());
        // A large dM needs all of R, a small one a block at a time.
        let r_width = if plan.large() { e } else { 0 };
        let mut r_rows = Tensor::<T>::scratch([batch, tokens, r_width]);
        let tasks: Vec<_> = (pieces.iter().zip(pieces.deal(d_kqv.data_mut(), 3 * e)))
            .zip(pieces.deal(r_rows.data_mut(), r_width).zip(parts.chunks_exact_mut(plan.part_len())))
            .collect();
        tasks.into_par_iter().for_each(|((piece, d_kqv), (r_rows, part))| {
            let (d_sigma, d_sum) = part.split_at_mut(m);
            let sigma = plan.sigma(&state, piece.image);
            let scratch = |large: usize, small: usize| Buffer::<T>::scratch(if plan.large() { large } else { small });
            let (mut r, mut operand) = (scratch(0, BLOCK * e), scratch(0, T::packed_len(BLOCK, e)));
            let mut d_phi = Buffer::<T>::scratch(BLOCK * m);
            let (mut dd, mut sums) = ([T::ZERO; BLOCK], [T::ZERO; BLOCK]);
            plan.blocks(piece, |first, at, n| {
                let r = if plan.large() { &mut r_rows[at * e..(at + n) * e] } else { &mut r[..n * e] };
                let (d_phi, dd, sums) = (&mut d_phi[..n * m], &mut dd[..n], &mut sums[..n]);
                let (phi, d) = (rows_of(&phi_q, first, n), rows_of(&normaliser, first, n));
                divide_backward(r, dd, rows_of(&mixed, first, n), rows_of(&d_mixed, first, n), d, T::from_f64(self.eps));
                if !plan.large() {
                    T::pack(Mat::new(r, n, e), &mut operand);
                    T::multiply_packed(Mat::new(phi, n, m).t(), &operand, MatMut::new(d_sum, m, e), true);
                }
                T::multiply_packed(Mat::new(r, n, e), &transposed[piece.image], MatMut::new(d_phi, n, m), false);
                features_backward(d_phi, phi, Some(RankOne { rows: Some(dd), columns: sigma }), sums, Some(d_sigma));
                let dq = &mut d_kqv[at * 3 * e + e..];
                T::multiply_packed(Mat::new(d_phi, n, m), &w, MatMut::strided(dq, n, e, 3 * e), false);
                minus_scaled(dq, 3 * e, plan.part(&kqv, 1, first, n), sums);
            });
        });
        let d_state = plan.join(&parts, &phi_q, |image| Mat::new(rows_of(&r_rows, image * tokens, tokens), tokens, e));
        drop((parts, r_rows));

        // dK′ = V dMᵀ + 1 dσᵀ, dV = dOut + K′ dM, dK
        let (packed, transposed) = (plan.pack(&d_state, false), plan.pack(&d_state, true));
        let tasks: Vec<_> = pieces.iter().zip(pieces.deal(d_kqv.data_mut(), 3 * e)).collect();
        tasks.into_par_iter().for_each(|(piece, d_kqv)| {
            let d_sigma = plan.sigma(&d_state, piece.image);
            let (mut d_phi, mut sums) = (Buffer::<T>::scratch(BLOCK * m), [T::ZERO; BLOCK]);
            plan.blocks(piece, |first, at, n| {
                let (d_phi, sums, phi) = (&mut d_phi[..n * m], &mut sums[..n], rows_of(&phi_k, first, n));
                T::multiply_packed(plan.part(&kqv, 2, first, n), &transposed[piece.image], MatMut::new(d_phi, n, m), false);
                features_backward(d_phi, phi, Some(RankOne { rows: None, columns: d_sigma }), sums, None);
                let d_rows = &mut d_kqv[at * 3 * e..(at + n) * 3 * e];
                T::multiply_packed(Mat::new(d_phi, n, m), &w, MatMut::strided(d_rows, n, e, 3 * e), false);
                minus_scaled(d_rows, 3 * e, plan.part(&kqv, 0, first, n), sums);
                for (row, dy) in d_rows.chunks_exact_mut(3 * e).zip(rows_of(dy, first, n).chunks_exact(e)) {
                    row[2 * e..].copy_from_slice(dy);
                }
                T::multiply_packed(Mat::new(phi, n, m), &packed[piece.image], MatMut::strided(&mut d_rows[2 * e..], n, e, 3 * e), true);
            });
        });
        Ok(d_kqv)
    }

    /// `w` (or its transpose) as a right operand.
    fn packed_w<T: Float>(&self, p: &Params<T>, transposed: bool) -> Buffer<T> {
        pack_w(p.buffer(self.w), self.features, self.width, transposed)
    }

    /// What [`forward_kqv`](Self::forward_kqv) costs.
    pub fn cost_kqv(&self, b: usize, n: usize) -> Cost {
        let (e, m) = (self.width, self.features);
        // K′, Q′, M and Q′ M: m E each per token; D: m; proj: E².
        let flops = 2 * b * n * (4 * e * m + m + e * e);
        // K′ and Q′, Y, D and the output; M and σ.
        Cost { flops, activation_bytes: 4 * b * n * (2 * m + e + 1 + e) + 4 * b * m * (e + 1) }
    }

    /// What [`forward`](Self::forward) costs.
    pub fn cost(&self, b: usize, n: usize) -> Cost {
        let kqv = 3 * self.width;
        self.cost_kqv(b, n) + Cost { flops: 2 * b * n * self.dim * kqv, activation_bytes: 4 * b * n * kqv }
    }
}

/// Some rows of a tensor.
fn rows_of<T: Float>(x: &Tensor<T>, first: usize, rows: usize) -> &[T] {
    let width = x.shape().rows_cols().1;
    &x.data()[first * width..(first + rows) * width]
}

fn pack_w<T: Float>(w: &[T], m: usize, e: usize, transposed: bool) -> Buffer<T> {
    let w = Mat::new(w, m, e);
    let w = if transposed { w.t() } else { w };
    let mut packed = Buffer::scratch(T::packed_len(w.rows(), w.cols()));
    T::pack(w, &mut packed);
    packed
}

/// Random `training` with a dropout rate and a seed, mostly off.
pub fn sample_dropout(rng: &mut Rng, config: &mut Config) {
    let training = rng.chance(0.3);
    config.set("training", training);
    if training {
        config.set("dropout", rng.range(0.0, 0.5)).set("seed", rng.below(1000));
    }
}

/// `attention.performer`. `dropout` (in training only; default 0.1, the published constant) and `seed` are optional keys.
pub struct PerformerAttention;

impl PerformerAttention {
    fn build(config: &Config) -> Result<(Performer, std::sync::Arc<Layout>)> {
        let (settings, dropout) = (Settings::from_config(config)?, Dropout::from_config(config, 0.1)?);
        Layout::build(|names| Performer::new(names.here(), settings, dropout, normal_02))
    }
}

impl Operation for PerformerAttention {
    const NAME: &'static str = "attention.performer";
    const PAPER: &'static str = "2101.11986 T2T-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let in_dim = rng.between(1, 9);
        let mut config = Config::default();
        config.set("dim", rng.between(1, 12)).set("in_dim", in_dim).set("head_cnt", 1);
        config.set("kernel_ratio", rng.range(1.001 / in_dim as f64, 1.5));
        config.set("epsilon", if rng.chance(0.5) { 1e-8 } else { rng.range(1e-4, 1e-2) });
        sample_dropout(rng, &mut config);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, tokens) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 20));
        draw.normal("x", [batch, tokens, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        Ok(Some(Self::build(config)?.0.cost(b, n)))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        let bench = Benchmark::new(size).set("in_dim", size.dim).set("head_cnt", 1).set("kernel_ratio", 0.5);
        Some(bench.set("epsilon", 1e-8).set("training", false))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let x = run.input("x")?;
        let (layer, layout) = Self::build(run.config())?;
        run.unary(&layout, |p, x| layer.forward(p, x), |p, g, saved, dy| layer.backward(p, g, &x, saved, dy))
    }
}

/// `nn.performer_features`.
pub struct PerformerFeatures;

impl Operation for PerformerFeatures {
    const NAME: &'static str = "nn.performer_features";
    const PAPER: &'static str = "2101.11986 T2T-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("num_features", rng.between(1, 7));
        config
    }

    fn inputs(_: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, tokens, width) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 20), draw.size("width", 1, 10));
        draw.normal("x", [batch, tokens, width]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, n, d], m) = (inputs.dims("x")?, config.positive("num_features")?);
        Ok(Some(Cost { flops: 2 * b * n * d * m, activation_bytes: 4 * b * n * m }))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (x, m) = (run.input("x")?, run.config().positive("num_features")?);
        let [b, n, d] = x.dims("x")?;
        if d == 0 || m > 1 << 24 {
            return Err(Error::config(
                "num_features",
                format!("expected at most 2²⁴ of vectors that are not empty, found {m} of width {d}"),
            ));
        }
        let (w, layout) = Layout::build(|names| Ok(names.buffer("w", [m, d], Init::Orthogonal { rows: m, cols: d })))?;
        let blocks = |data: Mat<T>, i: usize| -> (usize, usize) { (i * BLOCK, BLOCK.min(data.rows() - i * BLOCK)) };
        let all = Mat::new(x.data(), b * n, d);
        run.unary(
            &layout,
            |p, _| {
                let (mut y, w) = (Tensor::scratch([b, n, m]), pack_w(p.buffer(w), m, d, true));
                y.data_mut().par_chunks_mut(BLOCK * m).enumerate().for_each(|(i, y)| {
                    let (first, rows) = blocks(all, i);
                    let x = all.rows_from(first, rows);
                    T::multiply_packed(x, &w, MatMut::new(y, rows, m), false);
                    features(y, x, Sums::None);
                });
                Ok((y.clone(), y))
            },
            |p, _, phi, dy| {
                let (mut dx, w) = (Tensor::scratch([b, n, d]), pack_w(p.buffer(w), m, d, false));
                dx.data_mut().par_chunks_mut(BLOCK * d).enumerate().for_each(|(i, dx)| {
                    let (first, rows) = blocks(all, i);
                    let (mut t, mut sums) = (Buffer::<T>::scratch(rows * m), [T::ZERO; BLOCK]);
                    t.copy_from_slice(rows_of(dy, first, rows));
                    features_backward(&mut t, rows_of(&phi, first, rows), None, &mut sums[..rows], None);
                    T::multiply_packed(Mat::new(&t, rows, m), &w, MatMut::new(dx, rows, d), false);
                    minus_scaled(dx, d, all.rows_from(first, rows), &sums[..rows]);
                });
                Ok(dx)
            },
        )
    }
}
