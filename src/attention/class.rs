//! `attention.class`: a class token reads the patches (CaiT, arXiv 2103.17239; XCiT, arXiv 2106.09681).
//!
//! Only token 0 asks: per head `ℓ_n = d^{−1/2} q·k_n` over all tokens, itself included, `a = softmax ℓ`, `o = Σ a_n v_n`,
//! `y = proj(concat o)`. CaiT returns that one row; XCiT all rows, the others as they came.
//!
//! Neither K nor V is ever made: with `g = d^{−1/2} W_kᵀ q` the logits are `g·x_n` (the bias of k is the same for all n and drops out
//! of the softmax), and `o = W_v m + b_v` with the mixture `m = Σ a_n x_n`. That is 2NhC multiply-adds instead of 2NC², and a single
//! pass over the tokens, in chunks whose maxima, sums and mixtures are put together afterwards.
//!
//! Backward: `dm = W_vᵀ do`, `da_n = dm·x_n`, `dℓ = a ⊙ (da − dm·m)`, `dg = Σ dℓ_n x_n`, `dx_n = a_n dm + dℓ_n g`, again in one
//! pass; then `dq = d^{−1/2} W_k dg`, `dW_k = d^{−1/2} q dgᵀ`, `dW_v = do mᵀ`, `db_k = 0`.

use rayon::prelude::*;

use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::{elementwise, get, put, reduce, rows};
use crate::linalg::{Epilogue, Mat, MatMut, gemm};
use crate::nn::{Init, Layout, Linear, Names, Params};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::random::Rng;
use crate::tensor::{Buffer, Float, Tensor};

/// Tokens per chunk.
const CHUNK: usize = 64;

/// What the layer is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width C.
    pub dim: usize,
    /// Heads h, a divisor of C.
    pub num_heads: usize,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// One parameter `qkv` (XCiT) instead of `q`, `k`, `v` (CaiT).
    pub joint: bool,
}

impl Settings {
    /// What the forward pass for `batch` images of `tokens` tokens costs; the output is one row per image.
    pub fn cost(&self, batch: usize, tokens: usize) -> Cost {
        let (c, h) = (self.dim, self.num_heads);
        // q, g, o and proj once per image; logits and mixture per token and head.
        let flops = 2 * batch * (4 * c * c + 2 * tokens * h * c);
        // q, g, m, concat o, y; the weights a.
        Cost { flops, activation_bytes: 4 * batch * (3 * c + 2 * h * c + tokens * h) }
    }
}

/// Class attention with parameters `q`, `k`, `v` (or `qkv`) and `proj`.
#[derive(Clone, Debug)]
pub struct ClassAttention {
    /// One linear map for all of q, k, v, or one for each.
    parts: Vec<Linear>,
    proj: Linear,
    heads: usize,
    dim: usize,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    /// `[B, C]`.
    q: Tensor<T>,
    /// g, `[B, h, C]`.
    keys: Tensor<T>,
    /// a, `[B, N, h]`.
    weights: Tensor<T>,
    /// m, `[B, h, C]`.
    mix: Tensor<T>,
    /// o, `[B, C]`.
    out: Tensor<T>,
}

impl<T: Float> Saved<T> {
    /// The attention maps a of all heads, `[B, N, h]`.
    pub fn weights(&self) -> &Tensor<T> {
        &self.weights
    }
}

impl ClassAttention {
    /// Registers the parameters.
    pub fn new(mut names: Names, settings: Settings, init: fn(usize, usize) -> Init) -> Result<Self> {
        let Settings { dim, num_heads, qkv_bias, joint } = settings;
        if num_heads == 0 || dim == 0 || !dim.is_multiple_of(num_heads) {
            return Err(Error::config("num_heads", format!("expected a divisor of the width {dim}, found {num_heads}")));
        }
        let parts = if joint {
            vec![Linear::new(names.at("qkv"), dim, 3 * dim, qkv_bias, init(dim, 3 * dim))]
        } else {
            ["q", "k", "v"].map(|name| Linear::new(names.at(name), dim, dim, qkv_bias, init(dim, dim))).into()
        };
        let proj = Linear::new(names.at("proj"), dim, dim, true, init(dim, dim));
        Ok(ClassAttention { parts, proj, heads: num_heads, dim })
    }

    /// The weight of part 0 (q), 1 (k) or 2 (v).
    fn weight<'a, T: Float>(&self, p: &'a Params<T>, part: usize) -> &'a [T] {
        let size = self.dim * self.dim;
        match &self.parts[..] {
            [joint] => &p.get(joint.weight())[part * size..(part + 1) * size],
            parts => p.get(parts[part].weight()),
        }
    }

    fn weight_mut<'a, T: Float>(&self, g: &'a mut Params<T>, part: usize) -> &'a mut [T] {
        let size = self.dim * self.dim;
        match &self.parts[..] {
            [joint] => &mut g.get_mut(joint.weight())[part * size..(part + 1) * size],
            parts => g.get_mut(parts[part].weight()),
        }
    }

    fn bias<'a, T: Float>(&self, p: &'a Params<T>, part: usize) -> Option<&'a [T]> {
        match &self.parts[..] {
            [joint] => joint.bias().map(|bias| &p.get(bias)[part * self.dim..(part + 1) * self.dim]),
            parts => parts[part].bias().map(|bias| p.get(bias)),
        }
    }

    fn bias_mut<'a, T: Float>(&self, g: &'a mut Params<T>, part: usize) -> Option<&'a mut [T]> {
        match &self.parts[..] {
            [joint] => joint.bias().map(|bias| &mut g.get_mut(bias)[part * self.dim..(part + 1) * self.dim]),
            parts => parts[part].bias().map(|bias| g.get_mut(bias)),
        }
    }

    fn dims<T: Float>(&self, x: &Tensor<T>) -> Result<[usize; 2]> {
        let [batch, n, c] = x.dims("input of a class attention")?;
        if c == self.dim && n > 0 {
            Ok([batch, n])
        } else {
            Err(Error::shape("input of a class attention", format!("[batch, tokens ≥ 1, {}]", self.dim), x.shape()))
        }
    }

    /// Head a of `out` `[B, h, wide]` is head a of `x` `[B, h, narrow]` times (rows `a d …` of) the square weight, or its transpose.
    fn per_head<T: Float>(&self, out: &mut [T], x: &[T], weight: &[T], bias: Option<&[T]>, transpose: bool) {
        let (c, h) = (self.dim, self.heads);
        let d = c / h;
        let (inputs, outputs) = if transpose { (c, d) } else { (d, c) };
        let batch = x.len() / (h * inputs);
        for a in 0..if batch == 0 { 0 } else { h } {
            let rows = Mat::new(&weight[a * d * c..(a + 1) * d * c], d, c);
            gemm(
                Mat::strided(&x[a * inputs..], batch, inputs, h * inputs, 1),
                if transpose { rows.t() } else { rows },
                MatMut::strided(&mut out[a * outputs..], batch, outputs, h * outputs),
                Epilogue { bias: bias.map(|b| &b[a * d..(a + 1) * d]), ..Epilogue::default() },
            );
        }
    }

    /// Rows `a d …` of `dw` += `narrow_aᵀ wide_a` for every head, of `narrow` `[B, h, d]` and `wide` `[B, h, C]`.
    fn weight_gradient<T: Float>(&self, dw: &mut [T], narrow: &[T], wide: &[T]) {
        let (c, h) = (self.dim, self.heads);
        let (d, batch) = (c / h, narrow.len() / c);
        for a in 0..if batch == 0 { 0 } else { h } {
            gemm(
                Mat::strided(&narrow[a * d..], batch, d, c, 1).t(),
                Mat::strided(&wide[a * c..], batch, c, h * c, 1),
                MatMut::new(&mut dw[a * d * c..(a + 1) * d * c], d, c),
                Epilogue { accumulate: true, ..Epilogue::default() },
            );
        }
    }

    /// `d^{−1/2} q`.
    fn scaled<T: Float>(&self, q: &Tensor<T>) -> Tensor<T> {
        let mut scaled = Tensor::scratch(q.shape());
        elementwise::scale(scaled.data_mut(), q.data(), T::from_f64(1.0 / ((self.dim / self.heads) as f64).sqrt()));
        scaled
    }

    /// The class token's row `[B, 1, C]`, of tokens `[B, N, C]` of which it is the first.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let ([b, n], c, h) = (self.dims(x)?, self.dim, self.heads);
        let mut q = Tensor::scratch([b, c]);
        gemm(
            Mat::strided(x.data(), b, c, n * c, 1),
            Mat::new(self.weight(p, 0), c, c).t(),
            MatMut::new(q.data_mut(), b, c),
            Epilogue { bias: self.bias(p, 0), ..Epilogue::default() },
        );
        // g = d^{−1/2} W_kᵀ q
        let mut keys = Tensor::scratch([b, h, c]);
        self.per_head(keys.data_mut(), self.scaled(&q).data(), self.weight(p, 1), None, false);
        let (mut weights, mut mix) = (Tensor::scratch([b, n, h]), Tensor::scratch([b, h, c]));
        (weights.data_mut().par_chunks_mut(n * h))
            .zip(mix.data_mut().par_chunks_mut(h * c))
            .zip(x.data().par_chunks(n * c))
            .zip(keys.data().par_chunks(h * c))
            .for_each(|(((weights, mix), x), keys)| attend(weights, mix, x, keys, h));
        // o = W_v m + b_v
        let mut out = Tensor::scratch([b, c]);
        self.per_head(out.data_mut(), mix.data(), self.weight(p, 2), self.bias(p, 2), true);
        let y = self.proj.forward(p, &out)?.reshape([b, 1, c])?;
        Ok((y, Saved { q, keys, weights, mix, out }))
    }

    /// `dx` of the gradient `dy` `[B, 1, C]`, plus `onto` `[B, N, C]`: what reaches the tokens by other ways.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: Saved<T>,
        dy: &Tensor<T>,
        onto: Option<&Tensor<T>>,
    ) -> Result<Tensor<T>> {
        let ([b, n], c, h) = (self.dims(x)?, self.dim, self.heads);
        dy.expect_shape("gradient of a class attention", [b, 1, c])?;
        onto.map_or(Ok(()), |onto| onto.expect_shape("gradient of the tokens", x.shape()))?;
        let Saved { q, keys, weights, mix, out } = saved;
        let d_out = self.proj.backward(p, g, &out, &dy.reshape([b, c])?)?;
        // o = W_v m + b_v: dm = W_vᵀ do, dW_v = do mᵀ
        let mut d_mix = Tensor::scratch([b, h, c]);
        self.per_head(d_mix.data_mut(), d_out.data(), self.weight(p, 2), None, false);
        self.weight_gradient(self.weight_mut(g, 2), d_out.data(), mix.data());
        self.bias_mut(g, 2).into_iter().for_each(|bias| reduce::add_column_sums(bias, d_out.data()));
        let (mut dx, mut d_keys) = (Tensor::scratch(x.shape()), Tensor::scratch([b, h, c]));
        (dx.data_mut().par_chunks_mut(n * c)).zip(d_keys.data_mut().par_chunks_mut(h * c)).enumerate().for_each(|(i, (dx, d_keys))| {
            let (tokens, heads) = (i * n * c..(i + 1) * n * c, i * h * c..(i + 1) * h * c);
            attend_backward(
                Gradients { x: dx, keys: d_keys },
                &x.data()[tokens.clone()],
                &weights.data()[i * n * h..(i + 1) * n * h],
                [&keys.data()[heads.clone()], &mix.data()[heads.clone()], &d_mix.data()[heads]],
                onto.map(|onto| &onto.data()[tokens]),
                h,
            );
        });
        // g = d^{−1/2} W_kᵀ q: dq = d^{−1/2} W_k dg, dW_k = d^{−1/2} q dgᵀ
        let mut dq = Tensor::scratch([b, c]);
        self.per_head(dq.data_mut(), d_keys.data(), self.weight(p, 1), None, true);
        let dq = self.scaled(&dq);
        self.weight_gradient(self.weight_mut(g, 1), self.scaled(&q).data(), d_keys.data());
        // q = W_q x_0 + b_q
        let first = Mat::strided(x.data(), b, c, n * c, 1);
        let add = || Epilogue { accumulate: true, ..Epilogue::default() };
        gemm(Mat::new(dq.data(), b, c).t(), first, MatMut::new(self.weight_mut(g, 0), c, c), add());
        self.bias_mut(g, 0).into_iter().for_each(|bias| reduce::add_column_sums(bias, dq.data()));
        let weight = Mat::new(self.weight(p, 0), c, c);
        gemm(Mat::new(dq.data(), b, c), weight, MatMut::strided(dx.data_mut(), b, c, n * c), add());
        Ok(dx)
    }
}

/// Logits of some tokens → `e^{ℓ − max}`, with maximum and sum of every head.
struct Exponentials<'a, T> {
    rows: &'a mut [T],
    max: &'a mut [T],
    sum: &'a mut [T],
}

impl<T: Float> Kernel<T> for Exponentials<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let heads = self.max.len();
        let mut j = 0;
        while j < heads {
            let mut max = V::splat(T::NEG_INFINITY);
            for row in self.rows.chunks_exact(heads) {
                max = get::<T, V>(row, j, T::ZERO).max(max);
            }
            let mut sum = V::splat(T::ZERO);
            for row in self.rows.chunks_exact_mut(heads) {
                let e = (get::<T, V>(row, j, T::ZERO) - max).exp();
                sum = sum + e;
                put(e, row, j);
            }
            put(max, self.max, j);
            put(sum, self.sum, j);
            j += LANES;
        }
    }
}

/// `factor ← e^{part − max} / sum` for every head; a sum of ones gives the factors by which parts of an online softmax shrink.
struct Factors<'a, T> {
    factor: &'a mut [T],
    part: &'a [T],
    max: &'a [T],
    sum: &'a [T],
}

impl<T: Float> Kernel<T> for Factors<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let mut j = 0;
        while j < self.factor.len() {
            let e = (get::<T, V>(self.part, j, T::ZERO) - get(self.max, j, T::ZERO)).exp();
            put(e / get(self.sum, j, T::ONE), self.factor, j);
            j += LANES;
        }
    }
}

/// One image: `weights` `[N, h]` and `mix` `[h, C]` of tokens `x` `[N, C]` and `keys` g `[h, C]`.
fn attend<T: Float>(weights: &mut [T], mix: &mut [T], x: &[T], keys: &[T], h: usize) {
    let c = keys.len() / h;
    let chunks = x.len().div_ceil(CHUNK * c);
    let mut keys_packed = Buffer::<T>::scratch(T::packed_len(c, h));
    T::pack(Mat::new(keys, h, c).t(), &mut keys_packed);
    // Of every chunk: maxima, sums, mixtures.
    let size = 2 * h + h * c;
    let mut parts = Buffer::<T>::scratch(chunks * size);
    (parts.par_chunks_mut(size)).zip(weights.par_chunks_mut(CHUNK * h)).zip(x.par_chunks(CHUNK * c)).for_each(|((part, weights), x)| {
        let n = x.len() / c;
        let (max, rest) = part.split_at_mut(h);
        let (sum, mix) = rest.split_at_mut(h);
        let x = Mat::new(x, n, c);
        T::multiply_packed(x, &keys_packed, MatMut::new(weights, n, h), false);
        T::dispatch(Exponentials { rows: weights, max, sum });
        let mut packed = Buffer::<T>::scratch(T::packed_len(n, c));
        T::pack(x, &mut packed);
        T::multiply_packed(Mat::new(weights, n, h).t(), &packed, MatMut::new(mix, h, c), false);
    });
    let (mut max, mut sum) = (Buffer::<T>::scratch(h), Buffer::<T>::zeros(h));
    max.fill(T::NEG_INFINITY);
    for part in parts.chunks_exact(size) {
        max.iter_mut().zip(part).for_each(|(m, &x)| *m = x.larger(*m));
    }
    let mut ones = Buffer::<T>::scratch(h);
    ones.fill(T::ONE);
    let mut factors = Buffer::<T>::scratch(chunks * h);
    for (factor, part) in factors.chunks_exact_mut(h).zip(parts.chunks_exact(size)) {
        T::dispatch(Factors { factor, part: &part[..h], max: &max, sum: &ones });
        for ((sum, &f), &part) in sum.iter_mut().zip(factor.iter()).zip(&part[h..2 * h]) {
            *sum = f.fused(part, *sum);
        }
    }
    for (factor, part) in factors.chunks_exact_mut(h).zip(parts.chunks_exact(size)) {
        T::dispatch(Factors { factor, part: &part[..h], max: &max, sum: &sum });
    }
    mix.fill(T::ZERO);
    for (factor, part) in factors.chunks_exact(h).zip(parts.chunks_exact(size)) {
        for ((mix, part), &f) in mix.chunks_exact_mut(c).zip(part[2 * h..].chunks_exact(c)).zip(factor) {
            elementwise::add_scaled(mix, part, f);
        }
    }
    for (weights, factor) in weights.chunks_mut(CHUNK * h).zip(factors.chunks_exact(h)) {
        rows::multiply_table(weights, factor);
    }
}

/// Rows `[a, da]` → rows `[a, a ⊙ (da − δ)]`.
struct LogitGradient<'a, T> {
    rows: &'a mut [T],
    delta: &'a [T],
}

impl<T: Float> Kernel<T> for LogitGradient<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let heads = self.delta.len();
        for row in self.rows.chunks_exact_mut(2 * heads) {
            let (a, d) = row.split_at_mut(heads);
            let mut j = 0;
            while j < heads {
                let da = get::<T, V>(d, j, T::ZERO) - get(self.delta, j, T::ZERO);
                put(get::<T, V>(a, j, T::ZERO) * da, d, j);
                j += LANES;
            }
        }
    }
}

/// What [`attend_backward`] writes.
struct Gradients<'a, T> {
    x: &'a mut [T],
    keys: &'a mut [T],
}

/// The gradient of [`attend`] for one image, given g, m and dm, each `[h, C]`.
fn attend_backward<T: Float>(grads: Gradients<T>, x: &[T], weights: &[T], [keys, mix, d_mix]: [&[T]; 3], onto: Option<&[T]>, h: usize) {
    let c = keys.len() / h;
    let chunks = x.len().div_ceil(CHUNK * c);
    // δ = Σ a_n da_n = dm·m
    let delta: Vec<T> = mix.chunks_exact(c).zip(d_mix.chunks_exact(c)).map(|(m, dm)| T::from_f64(reduce::dot(m, dm))).collect();
    let (mut d_mix_packed, mut rows_packed) = (Buffer::<T>::scratch(T::packed_len(c, h)), Buffer::<T>::scratch(T::packed_len(2 * h, c)));
    T::pack(Mat::new(d_mix, h, c).t(), &mut d_mix_packed);
    let mut both = Buffer::<T>::scratch(2 * h * c);
    both[..h * c].copy_from_slice(d_mix);
    both[h * c..].copy_from_slice(keys);
    T::pack(Mat::new(&both, 2 * h, c), &mut rows_packed);
    let mut parts = Buffer::<T>::scratch(chunks * h * c);
    parts.par_chunks_mut(h * c).zip(grads.x.par_chunks_mut(CHUNK * c)).enumerate().for_each(|(i, (d_keys, dx))| {
        let n = dx.len() / c;
        let tokens = i * CHUNK * c..i * CHUNK * c + n * c;
        let x = Mat::new(&x[tokens.clone()], n, c);
        // Rows [a, dℓ].
        let mut rows = Buffer::<T>::scratch(n * 2 * h);
        for (row, a) in rows.chunks_exact_mut(2 * h).zip(weights[i * CHUNK * h..].chunks_exact(h)) {
            row[..h].copy_from_slice(a);
        }
        // da_n = dm·x_n, dℓ = a ⊙ (da − δ)
        T::multiply_packed(x, &d_mix_packed, MatMut::strided(&mut rows[h..], n, h, 2 * h), false);
        T::dispatch(LogitGradient { rows: &mut rows, delta: &delta });
        // dg = Σ dℓ_n x_n
        let mut packed = Buffer::<T>::scratch(T::packed_len(n, c));
        T::pack(x, &mut packed);
        T::multiply_packed(Mat::strided(&rows[h..], n, h, 2 * h, 1).t(), &packed, MatMut::new(d_keys, h, c), false);
        // dx_n = a_n dm + dℓ_n g
        if let Some(onto) = onto {
            dx.copy_from_slice(&onto[tokens]);
        }
        T::multiply_packed(Mat::new(&rows, n, 2 * h), &rows_packed, MatMut::new(dx, n, c), onto.is_some());
    });
    grads.keys.fill(T::ZERO);
    for part in parts.chunks_exact(h * c) {
        elementwise::add(grads.keys, part);
    }
}

/// `attention.class`, both variants.
pub struct Class;

/// Whether the variant is XCiT's, and the layer.
fn settings(config: &Config) -> Result<(bool, Settings)> {
    let joint = config.choice("variant", &["cait", "xcit"])? == "xcit";
    let (dim, num_heads) = (config.usize("dim")?, config.usize("num_heads")?);
    Ok((joint, Settings { dim, num_heads, qkv_bias: config.bool_or("qkv_bias", false)?, joint }))
}

impl Operation for Class {
    const NAME: &'static str = "attention.class";
    const PAPER: &'static str = "2103.17239 CaiT, 2106.09681 XCiT";

    fn sample(rng: &mut Rng) -> Config {
        let (heads, width) = (rng.between(1, 4), rng.between(1, 7));
        let mut config = Config::default();
        config.set("variant", rng.pick(&["cait", "xcit"])).set("dim", heads * width).set("num_heads", heads);
        config.set("qkv_bias", rng.chance(0.7));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let most = if draw.rng.chance(0.2) { 150 } else { 20 };
        let (batch, tokens) = (draw.size("batch", 1, 3), draw.size("tokens", 1, most));
        draw.normal("x", [batch, tokens, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ((all_rows, settings), [b, n, c]) = (settings(config)?, inputs.dims("x")?);
        let mut cost = settings.cost(b, n);
        if all_rows {
            cost.activation_bytes += 4 * b * (n - 1) * c;
        }
        Ok(Some(cost))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        Some(Benchmark::new(size).set("variant", "cait").set("qkv_bias", true))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (all_rows, settings) = settings(run.config())?;
        let (layer, layout) = Layout::build(|names| ClassAttention::new(names.here(), settings, crate::nn::normal_02))?;
        let x = run.input("x")?;
        run.unary(
            &layout,
            |p, x| {
                let (y, saved) = layer.forward(p, x)?;
                Ok((if all_rows { with_first_rows(x.clone(), &y)? } else { y }, saved))
            },
            |p, g, saved, dy| {
                if !all_rows {
                    return layer.backward(p, g, &x, saved, dy, None);
                }
                let first = first_rows(dy)?;
                let others = with_first_rows(dy.clone(), &Tensor::zeros(first.shape()))?;
                layer.backward(p, g, &x, saved, &first, Some(&others))
            },
        )
    }
}

/// Token 0 of every image, `[B, 1, C]`.
pub fn first_rows<T: Float>(x: &Tensor<T>) -> Result<Tensor<T>> {
    let [b, n, c] = x.dims("tokens")?;
    if n == 0 {
        return Err(Error::shape("tokens", "at least one", x.shape()));
    }
    let mut first = Tensor::scratch([b, 1, c]);
    for (to, from) in first.data_mut().chunks_exact_mut(c.max(1)).zip(x.data().chunks_exact((n * c).max(1))) {
        to.copy_from_slice(&from[..c]);
    }
    Ok(first)
}

/// `x` with other tokens 0.
pub fn with_first_rows<T: Float>(mut x: Tensor<T>, first: &Tensor<T>) -> Result<Tensor<T>> {
    let [b, n, c] = x.dims("tokens")?;
    first.expect_shape("class tokens", [b, 1, c])?;
    for (to, from) in x.data_mut().chunks_exact_mut((n * c).max(1)).zip(first.data().chunks_exact(c.max(1))) {
        to[..c].copy_from_slice(from);
    }
    Ok(x)
}
