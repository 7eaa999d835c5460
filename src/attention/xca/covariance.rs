//! XCA of many tokens without q, k, v: everything before the softmax depends on x through its mean and its covariance alone,
//! everything after it is one matrix per image.
//!
//! With the mean μ, the centered sum `Σ = (x − μ)ᵀ(x − μ)` and `q̄ = W_q μ + b_q` (k alike): `QᵀK = W_q Σ W_kᵀ + N q̄ k̄ᵀ`,
//! `‖q_i‖² = w_i Σ w_iᵀ + N q̄_i²`; and with `D = blockdiag(A) W_v`, `δ = blockdiag(A) b_v`: `y = x (W_p D)ᵀ + (W_p δ + b_p)`. That is
//! about 1⅔ N C² + 3 C³ multiply-adds instead of 4 N C² + 2 N C d, and nothing of N rows is kept. Backward, 3 N C² + 4 C³ instead of
//! 8 N C² + 4 N C d: with `p = N q̄` and `P = W Σ + p μᵀ` for the rows of q and k, `H = dyᵀ x`, `η = Σ dy`, `K = W_pᵀ H`, `κ = W_pᵀ η`:
//!
//! `dW_p = H Dᵀ + η δᵀ`, `dA = K W_vᵀ + κ b_vᵀ`, `dW_v = Aᵀ K`, `db_v = Aᵀ κ`; then M and r as in the plain form, and
//! `dW_q = M P_k − diag(r^q) P_q`, `dW_k = Mᵀ P_q − diag(r^k) P_k`, `db` alike with p; with `U_q = M W_k − diag(r^q) W_q`,
//! `U_k = Mᵀ W_q − diag(r^k) W_k` and u alike with b: `dx = dy (W_p D) + x (Uᵀ W_qk) + uᵀ W_qk`.
//!
//! A norm from Σ loses digits where the terms of `w Σ w` cancel. [`forward`] measures that for every channel and gives up, for the
//! plain form, where more than three bits are lost. (A mean however large cancels nothing: it is taken out first.)

use crate::kernel::elementwise;
use crate::kernel::gram::{covariance, covariance_flops};
use crate::kernel::reduce::{add_column_sums, dot_lanes};
use crate::kernel::{get, put};
use crate::linalg::{Epilogue, Mat, MatMut, gemm};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float, Tensor};

/// Norms whose square is smaller than this share of its terms are not trusted.
const TRUST: f64 = 1.0 / 8.0;

/// From how many tokens of width `dim` on this form is the faster one, forward and backward together.
pub fn pays(tokens: usize, dim: usize) -> bool {
    tokens >= (2 * dim).max(64)
}

/// Multiply-adds of [`forward`] for one image.
pub fn forward_products(n: usize, c: usize, d: usize) -> usize {
    // Σ, P, QᵀK, D, W_p D, y.
    covariance_flops(n, c) / 2 + 2 * c * c * c + 2 * c * c * d + c * c * c + n * c * c
}

/// Elements that are kept per image, beside G, A and the norms.
pub fn kept(c: usize) -> usize {
    // P, p, D, δ, W_p D.
    2 * c * c + 2 * c + c * c + c + c * c
}

/// Weights and biases: of q, k, v together, and of the output.
#[derive(Clone, Copy)]
pub struct Weights<'a, T> {
    /// `[3C, C]`.
    pub qkv: &'a [T],
    /// `[3C]`.
    pub qkv_bias: Option<&'a [T]>,
    /// `[C, C]`.
    pub proj: &'a [T],
    /// `[C]`.
    pub proj_bias: Option<&'a [T]>,
}

/// Heads h and their width d.
#[derive(Clone, Copy)]
pub struct Heads {
    pub count: usize,
    pub width: usize,
}

/// Of every image: P, p.
pub struct Products<T: Float> {
    /// `[B, 2C, C]`.
    rows: Tensor<T>,
    /// `[B, 2C]`.
    sums: Tensor<T>,
}

/// Of every image: D, δ and `W_p D`.
pub struct Outer<T: Float> {
    /// `[B, C, C]`.
    mixed: Tensor<T>,
    /// `[B, C]`.
    mixed_bias: Tensor<T>,
    /// `[B, C, C]`.
    whole: Tensor<T>,
}

fn add<'a, T>() -> Epilogue<'a, T> {
    Epilogue { accumulate: true, ..Epilogue::default() }
}

/// `out[i, :] += column[i] row`.
struct AddOuter<'a, T> {
    out: &'a mut [T],
    column: &'a [T],
    row: &'a [T],
}

impl<T: Float> Kernel<T> for AddOuter<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        for (out, &factor) in self.out.chunks_exact_mut(self.row.len()).zip(self.column) {
            let factor = V::splat(factor);
            let mut j = 0;
            while j < out.len() {
                put(factor.mul_add(get(self.row, j, T::ZERO), get(out, j, T::ZERO)), out, j);
                j += LANES;
            }
        }
    }
}

fn add_outer<T: Float>(out: &mut [T], column: &[T], row: &[T]) {
    T::dispatch(AddOuter { out, column, row });
}

/// `out[i, :] −= r[i] x[i, :]`.
struct SubtractRows<'a, T> {
    out: &'a mut [T],
    x: &'a [T],
    r: &'a [T],
}

impl<T: Float> Kernel<T> for SubtractRows<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.x.len() / self.r.len();
        for ((out, x), &r) in self.out.chunks_exact_mut(width).zip(self.x.chunks_exact(width)).zip(self.r) {
            let factor = V::splat(-r);
            let mut j = 0;
            while j < width {
                put(factor.mul_add(get(x, j, T::ZERO), get(out, j, T::ZERO)), out, j);
                j += LANES;
            }
        }
    }
}

fn subtract_rows<T: Float>(out: &mut [T], x: &[T], r: &[T]) {
    T::dispatch(SubtractRows { out, x, r });
}

/// `out += Σ_i factors[i] matrix[i, :]`.
struct AddWeighted<'a, T> {
    out: &'a mut [T],
    matrix: &'a [T],
    factors: &'a [T],
}

impl<T: Float> Kernel<T> for AddWeighted<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        for (row, &factor) in self.matrix.chunks_exact(self.out.len()).zip(self.factors) {
            let factor = V::splat(factor);
            let mut j = 0;
            while j < row.len() {
                put(factor.mul_add(get(row, j, T::ZERO), get(self.out, j, T::ZERO)), self.out, j);
                j += LANES;
            }
        }
    }
}

/// `out[i] = matrix[i, :]·x`.
struct MatrixVector<'a, T> {
    out: &'a mut [T],
    matrix: &'a [T],
    x: &'a [T],
}

impl<T: Float> Kernel<T> for MatrixVector<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        for (out, row) in self.out.iter_mut().zip(self.matrix.chunks_exact(self.x.len())) {
            *out = dot_lanes::<T, V>(row, self.x).sum();
        }
    }
}

/// Of one channel: `P_i·w_i` and `Σ_j w_ij² S_jj`.
struct Energies<'a, T> {
    row: &'a [T],
    weight: &'a [T],
    diagonal: &'a [T],
}

impl<T: Float> Kernel<T> for Energies<'_, T> {
    type Output = [T; 2];
    #[inline(always)]
    fn run<V: Vector<T>>(self) -> [T; 2] {
        let (mut square, mut terms) = (V::splat(T::ZERO), V::splat(T::ZERO));
        let mut j = 0;
        while j < self.weight.len() {
            let w = get::<T, V>(self.weight, j, T::ZERO);
            square = w.mul_add(get(self.row, j, T::ZERO), square);
            terms = (w * w).mul_add(get(self.diagonal, j, T::ZERO), terms);
            j += LANES;
        }
        [square.sum(), terms.sum()]
    }
}

/// `QᵀK` into `cosines` `[B, h, d, d]` and the squared norms into `squares` `[B, 2C]`, of tokens `x` `[B, N, C]`; nothing if a norm
/// cannot be trusted.
pub fn forward<T: Float>(
    cosines: &mut Tensor<T>,
    squares: &mut Tensor<T>,
    x: &Tensor<T>,
    weights: Weights<T>,
    heads: Heads,
    tokens: usize,
) -> Option<Products<T>> {
    let (h, d) = (heads.count, heads.width);
    let (c, batch) = (h * d, squares.shape()[0]);
    let mut rows = Tensor::scratch([batch, 2 * c, c]);
    let mut sums = Tensor::scratch([batch, 2 * c]);
    let (mut s, mut mean) = (Tensor::scratch([c, c]), Tensor::scratch([c]));
    let qk = &weights.qkv[..2 * c * c];
    let count = T::of(tokens);
    for b in 0..batch {
        covariance(s.data_mut(), mean.data_mut(), &x.data()[b * tokens * c..(b + 1) * tokens * c]);
        // p = N (W μ + b); W Σ, the first part of P
        let sums = &mut sums.data_mut()[2 * b * c..2 * (b + 1) * c];
        T::dispatch(MatrixVector { out: sums, matrix: qk, x: mean.data() });
        if let Some(bias) = weights.qkv_bias {
            elementwise::add(sums, &bias[..2 * c]);
        }
        let means: Vec<T> = sums.to_vec();
        sums.iter_mut().for_each(|sum| *sum *= count);
        let rows = &mut rows.data_mut()[2 * b * c * c..2 * (b + 1) * c * c];
        gemm(Mat::new(qk, 2 * c, c), Mat::new(s.data(), c, c), MatMut::new(rows, 2 * c, c), Epilogue::default());
        // ‖q_i‖² = (W Σ)_i·w_i + N q̄_i², the first of terms about as large as Σ_j w_ij² Σ_jj
        let diagonal: Vec<T> = (0..c).map(|j| s.data()[j * c + j]).collect();
        for (i, to) in squares.data_mut()[2 * b * c..2 * (b + 1) * c].iter_mut().enumerate() {
            let own = i * c..(i + 1) * c;
            let [square, terms] = T::dispatch(Energies { row: &rows[own.clone()], weight: &qk[own], diagonal: &diagonal });
            *to = square + sums[i] * means[i];
            // A channel without weight and bias is dead in every form; what is no number goes on as such.
            if *to < T::from_f64(TRUST) * terms {
                return None;
            }
        }
        // QᵀK = (W_q Σ) W_kᵀ + N q̄ k̄ᵀ
        for a in 0..h {
            let (q, k) = (a * d, c + a * d);
            let to = (b * h + a) * d * d;
            let out = &mut cosines.data_mut()[to..to + d * d];
            gemm(Mat::new(&rows[q * c..], d, c), Mat::new(&qk[k * c..], d, c).t(), MatMut::new(out, d, d), Epilogue::default());
            add_outer(out, &sums[q..q + d], &means[k..k + d]);
        }
        add_outer(rows, sums, mean.data());
    }
    Some(Products { rows, sums })
}

/// `y` `[B, N, C]` with A `[B, h, d, d]` known, plus `residual`.
pub fn mix<T: Float>(
    x: &Tensor<T>,
    mixing: &Tensor<T>,
    weights: Weights<T>,
    heads: Heads,
    residual: Option<&Tensor<T>>,
) -> (Tensor<T>, Outer<T>) {
    let (h, d) = (heads.count, heads.width);
    let (c, batch) = (h * d, mixing.shape()[0]);
    let n = x.data().len() / (batch * c).max(1);
    let mut y = Tensor::scratch(x.shape());
    let (mut mixed, mut mixed_bias) = (Tensor::scratch([batch, c, c]), Tensor::zeros([batch, c]));
    let mut whole = Tensor::scratch([batch, c, c]);
    for b in 0..batch {
        // D = blockdiag(A) W_v, δ = blockdiag(A) b_v
        let mixed = &mut mixed.data_mut()[b * c * c..(b + 1) * c * c];
        let mixed_bias = &mut mixed_bias.data_mut()[b * c..(b + 1) * c];
        for a in 0..h {
            let weight = &mixing.data()[(b * h + a) * d * d..(b * h + a + 1) * d * d];
            let value = Mat::new(&weights.qkv[(2 * c + a * d) * c..], d, c);
            gemm(Mat::new(weight, d, d), value, MatMut::new(&mut mixed[a * d * c..(a + 1) * d * c], d, c), Epilogue::default());
            if let Some(bias) = weights.qkv_bias {
                let x = &bias[2 * c + a * d..2 * c + (a + 1) * d];
                T::dispatch(MatrixVector { out: &mut mixed_bias[a * d..(a + 1) * d], matrix: weight, x });
            }
        }
        // y = x (W_p D)ᵀ + (W_p δ + b_p)
        let whole = &mut whole.data_mut()[b * c * c..(b + 1) * c * c];
        gemm(Mat::new(weights.proj, c, c), Mat::new(mixed, c, c), MatMut::new(whole, c, c), Epilogue::default());
        let mut bias = Buffer::<T>::scratch(c);
        T::dispatch(MatrixVector { out: &mut bias, matrix: weights.proj, x: mixed_bias });
        if let Some(proj_bias) = weights.proj_bias {
            elementwise::add(&mut bias, proj_bias);
        }
        let at = b * n * c..(b + 1) * n * c;
        let residual = residual.map(|r| Mat::new(&r.data()[at.clone()], n, c));
        let out = MatMut::new(&mut y.data_mut()[at.clone()], n, c);
        gemm(
            Mat::new(&x.data()[at], n, c),
            Mat::new(whole, c, c).t(),
            out,
            Epilogue { bias: Some(&bias), residual, ..Epilogue::default() },
        );
    }
    (y, Outer { mixed, mixed_bias, whole })
}

/// What the backward passes write, all of it added to.
pub struct Gradients<'a, T> {
    pub weight: &'a mut [T],
    pub bias: &'a mut [T],
}

/// `H = dyᵀ x` times `W_pᵀ`, and `κ`.
pub struct Pulled<T: Float> {
    /// K, `[B, C, C]`.
    rows: Tensor<T>,
    /// κ, `[B, C]`.
    sums: Tensor<T>,
}

/// dA `[B, h, d, d]`, and K; adds `dW_p` and `db_p`.
pub fn mix_backward<T: Float>(
    proj: Gradients<T>,
    x: &Tensor<T>,
    dy: &Tensor<T>,
    outer: &Outer<T>,
    weights: Weights<T>,
    heads: Heads,
) -> (Tensor<T>, Pulled<T>) {
    let (h, d) = (heads.count, heads.width);
    let (c, batch) = (h * d, outer.mixed_bias.shape()[0]);
    let n = x.data().len() / (batch * c).max(1);
    let mut d_mixing = Tensor::scratch([batch, h, d, d]);
    let (mut rows, mut sums) = (Tensor::scratch([batch, c, c]), Tensor::zeros([batch, c]));
    let mut product = Tensor::scratch([c, c]);
    let Gradients { weight, bias } = proj;
    for b in 0..batch {
        let at = b * n * c..(b + 1) * n * c;
        let (x, dy) = (&x.data()[at.clone()], &dy.data()[at]);
        // H = dyᵀ x, η = Σ dy
        gemm(Mat::new(dy, n, c).t(), Mat::new(x, n, c), MatMut::new(product.data_mut(), c, c), Epilogue::default());
        let mut total = Tensor::zeros([c]);
        add_column_sums(total.data_mut(), dy);
        // dW_p = H Dᵀ + η δᵀ, db_p = η
        let mixed = Mat::new(&outer.mixed.data()[b * c * c..(b + 1) * c * c], c, c);
        gemm(Mat::new(product.data(), c, c), mixed.t(), MatMut::new(weight, c, c), add());
        add_outer(weight, total.data(), &outer.mixed_bias.data()[b * c..(b + 1) * c]);
        elementwise::add(bias, total.data());
        // K = W_pᵀ H, κ = W_pᵀ η
        let rows = &mut rows.data_mut()[b * c * c..(b + 1) * c * c];
        gemm(Mat::new(weights.proj, c, c).t(), Mat::new(product.data(), c, c), MatMut::new(rows, c, c), Epilogue::default());
        let sums = &mut sums.data_mut()[b * c..(b + 1) * c];
        T::dispatch(AddWeighted { out: sums, matrix: weights.proj, factors: total.data() });
        // dA = K W_vᵀ + κ b_vᵀ
        for a in 0..h {
            let (head, value) = (a * d, 2 * c + a * d);
            let to = (b * h + a) * d * d;
            let out = &mut d_mixing.data_mut()[to..to + d * d];
            let values = Mat::new(&weights.qkv[value * c..], d, c);
            gemm(Mat::new(&rows[head * c..], d, c), values.t(), MatMut::new(out, d, d), Epilogue::default());
            if let Some(bias) = weights.qkv_bias {
                add_outer(out, &sums[head..head + d], &bias[value..value + d]);
            }
        }
    }
    (d_mixing, Pulled { rows, sums })
}

/// What [`backward`] reads.
pub struct Given<'a, T: Float> {
    /// The tokens and the gradient of the output, `[B, N, C]`.
    pub x: &'a Tensor<T>,
    pub dy: &'a Tensor<T>,
    pub products: Products<T>,
    pub outer: Outer<T>,
    pub pulled: Pulled<T>,
    /// A, M `[B, h, d, d]` and r `[B, 2C]`.
    pub mixing: &'a Tensor<T>,
    pub m: &'a Tensor<T>,
    pub shrink: &'a Tensor<T>,
}

/// `dx`; adds the gradients of `qkv`.
pub fn backward<T: Float>(qkv: Gradients<T>, given: Given<T>, weights: Weights<T>, heads: Heads) -> Tensor<T> {
    let (h, d) = (heads.count, heads.width);
    let Given { x, dy, products, outer, pulled, mixing, m, shrink } = given;
    let (c, batch) = (h * d, shrink.shape()[0]);
    let n = x.data().len() / (batch * c).max(1);
    let Gradients { weight: d_weight, bias: d_bias } = qkv;
    let mut dx = Tensor::scratch(x.shape());
    let (mut u, mut e) = (Tensor::scratch([2 * c, c]), Tensor::scratch([c, c]));
    for b in 0..batch {
        let rows = &products.rows.data()[2 * b * c * c..2 * (b + 1) * c * c];
        let sums = &products.sums.data()[2 * b * c..2 * (b + 1) * c];
        let r = &shrink.data()[2 * b * c..2 * (b + 1) * c];
        let mut u_bias = Buffer::<T>::zeros(2 * c);
        for a in 0..h {
            let block = (b * h + a) * d * d..(b * h + a + 1) * d * d;
            let m = Mat::new(&m.data()[block.clone()], d, d);
            // To q from k through M, to k from q through Mᵀ.
            for (to, from, m) in [(a * d, c + a * d, m), (c + a * d, a * d, m.t())] {
                let own = to * c..(to + d) * c;
                // dW = M P' − diag(r) P, db alike
                let out = &mut d_weight[own.clone()];
                gemm(m, Mat::new(&rows[from * c..], d, c), MatMut::new(out, d, c), add());
                subtract_rows(out, &rows[own.clone()], &r[to..to + d]);
                add_vector(&mut d_bias[to..to + d], m, &sums[from..from + d], &sums[to..to + d], &r[to..to + d]);
                // U = M W' − diag(r) W, u alike
                let out = &mut u.data_mut()[own.clone()];
                gemm(m, Mat::new(&weights.qkv[from * c..], d, c), MatMut::new(out, d, c), Epilogue::default());
                subtract_rows(out, &weights.qkv[own], &r[to..to + d]);
                if let Some(bias) = weights.qkv_bias {
                    add_vector(&mut u_bias[to..to + d], m, &bias[from..from + d], &bias[to..to + d], &r[to..to + d]);
                }
            }
            // dW_v = Aᵀ K, db_v = Aᵀ κ
            let (value, mix) = (2 * c + a * d, Mat::new(&mixing.data()[block], d, d));
            let (k, kappa) = (&pulled.rows.data()[(b * c + a * d) * c..], &pulled.sums.data()[b * c + a * d..][..d]);
            gemm(mix.t(), Mat::new(k, d, c), MatMut::new(&mut d_weight[value * c..(value + d) * c], d, c), add());
            add_vector(&mut d_bias[value..value + d], mix.t(), kappa, kappa, &[]);
        }
        // dx = dy (W_p D) + x (Uᵀ W_qk) + uᵀ W_qk
        let qk = Mat::new(&weights.qkv[..2 * c * c], 2 * c, c);
        gemm(Mat::new(u.data(), 2 * c, c).t(), qk, MatMut::new(e.data_mut(), c, c), Epilogue::default());
        let mut bias = Buffer::<T>::zeros(c);
        if weights.qkv_bias.is_some() {
            T::dispatch(AddWeighted { out: &mut bias, matrix: weights.qkv, factors: &u_bias });
        }
        let at = b * n * c..(b + 1) * n * c;
        let dx = &mut dx.data_mut()[at.clone()];
        let whole = Mat::new(&outer.whole.data()[b * c * c..(b + 1) * c * c], c, c);
        gemm(Mat::new(&dy.data()[at.clone()], n, c), whole, MatMut::new(dx, n, c), Epilogue::default());
        let epilogue = Epilogue { accumulate: true, bias: Some(&bias), ..Epilogue::default() };
        gemm(Mat::new(&x.data()[at], n, c), Mat::new(e.data(), c, c), MatMut::new(dx, n, c), epilogue);
    }
    dx
}

/// `out += m x − r ⊙ own`; without r, the first term alone.
fn add_vector<T: Float>(out: &mut [T], m: Mat<T>, x: &[T], own: &[T], r: &[T]) {
    for (i, out) in out.iter_mut().enumerate() {
        let mut sum = T::ZERO;
        for (j, &x) in x.iter().enumerate() {
            sum += m.data()[i * m.row_stride() + j * m.col_stride()] * x;
        }
        *out += r.get(i).map_or(sum, |&r| sum - r * own[i]);
    }
}
