//! What happens to a block of scores of all heads between its products: mixes, exponentials, and their gradients.

// Loops over heads that are held in registers read better by index.
#![allow(clippy::needless_range_loop)]

use crate::kernel::exp_of_softmax;
use crate::linalg::{Mat, MatMut, count_flops};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::Float;

/// A block `[heads, rows, keys]` of scores, rows padded to whole vectors.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub heads: usize,
    pub rows: usize,
    pub keys: usize,
}

impl Block {
    pub fn stride(&self) -> usize {
        self.keys.next_multiple_of(LANES)
    }
    pub fn plane(&self) -> usize {
        self.rows * self.stride()
    }
    pub fn len(&self) -> usize {
        self.heads * self.plane()
    }
    /// One head's scores.
    pub fn head<'a, T>(&self, x: &'a [T], a: usize) -> Mat<'a, T> {
        Mat::strided(&x[a * self.plane()..(a + 1) * self.plane()], self.rows, self.keys, self.stride(), 1)
    }
    pub fn head_mut<'a, T>(&self, x: &'a mut [T], a: usize) -> MatMut<'a, T> {
        MatMut::strided(&mut x[a * self.plane()..(a + 1) * self.plane()], self.rows, self.keys, self.stride())
    }
    /// Zeros where no product writes.
    pub fn clear_padding<T: Float>(&self, x: &mut [T]) {
        if self.stride() > self.keys {
            x[..self.len()].chunks_exact_mut(self.stride()).for_each(|row| row[self.keys..].fill(T::ZERO));
        }
    }
    pub fn count_mix(&self) {
        count_flops(2 * self.rows * self.keys * self.heads * self.heads);
    }
}

/// `y_i = Σ_j w[j, i] x_j` for outputs `first..first + I`, the sixteen elements from `at` of every plane of `x`.
#[inline(always)]
fn mix<T: Float, V: Vector<T>, const I: usize>(
    mut acc: [V; I],
    x: &[T],
    plane: usize,
    at: usize,
    w: &[T],
    heads: usize,
    first: usize,
) -> [V; I] {
    for (w, x) in w.chunks_exact(heads).zip(x.chunks_exact(plane)) {
        let x = V::load(&x[at..at + LANES]);
        let w = &w[first..first + I];
        for i in 0..I {
            acc[i] = x.mul_add(V::splat(w[i]), acc[i]);
        }
    }
    acc
}

/// Calls `$part::<V, I>($first)` for groups of I heads, until all have had their turn.
macro_rules! in_groups {
    ($heads:expr, $first:ident, $part:ident $(, $argument:expr)*) => {{
        let mut $first = 0;
        while $first < $heads {
            match $heads - $first {
                8.. => { $part::<T, V, 8>($($argument,)* $first); $first += 8; }
                4..=7 => { $part::<T, V, 4>($($argument,)* $first); $first += 4; }
                2 | 3 => { $part::<T, V, 2>($($argument,)* $first); $first += 2; }
                _ => { $part::<T, V, 1>($($argument,)* $first); $first += 1; }
            }
        }
    }};
}

/// −∞ in the padding of the last vector of a row, zeros else.
#[inline(always)]
fn beyond<T: Float, V: Vector<T>>(keys: usize) -> V {
    V::load_partial(&[T::ZERO; LANES][..(keys - 1) % LANES + 1], T::NEG_INFINITY)
}

/// S → `e^{L − m}` with the running maximum m and sum of every row and head.
pub(super) struct Exponentials<'a, T> {
    pub out: &'a mut [T],
    pub scores: &'a [T],
    /// W transposed.
    pub w: &'a [T],
    /// `[rows, heads, 2]`.
    pub state: &'a mut [T],
    pub block: Block,
}

#[inline(always)]
fn exponentials<T: Float, V: Vector<T>, const I: usize>(k: &mut Exponentials<T>, row: usize, first: usize) {
    let (stride, plane, heads) = (k.block.stride(), k.block.plane(), k.block.heads);
    let at = row * stride;
    let mut best = [V::splat(T::NEG_INFINITY); I];
    for j in (0..stride).step_by(LANES) {
        let mut y = mix::<T, V, I>([V::splat(T::ZERO); I], k.scores, plane, at + j, k.w, heads, first);
        for i in 0..I {
            if j + LANES >= stride {
                y[i] = y[i] + beyond::<T, V>(k.block.keys);
            }
            best[i] = y[i].max(best[i]);
            y[i].store(&mut k.out[(first + i) * plane + at + j..]);
        }
    }
    for i in 0..I {
        let state = &mut k.state[(row * heads + first + i) * 2..][..2];
        let max = best[i].largest().larger(state[0]);
        let (center, mut sum) = (V::splat(max), V::splat(T::ZERO));
        let from = (first + i) * plane + at;
        for x in k.out[from..from + stride].chunks_exact_mut(LANES) {
            let e = exp_of_softmax::<T, V>(V::load(x) - center);
            sum = sum + e;
            e.store(x);
        }
        let shrink = if state[0] == max || state[0] == T::NEG_INFINITY { T::ONE } else { V::splat(state[0] - max).exp().to_array()[0] };
        state[1] = state[1].fused(shrink, sum.sum());
        state[0] = max;
    }
}

impl<T: Float> Kernel<T> for Exponentials<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let k = &mut self;
        for row in 0..k.block.rows {
            in_groups!(k.block.heads, first, exponentials, k, row);
        }
    }
}

/// S → A, given the maxima and inverse sums.
pub(super) struct Attend<'a, T> {
    pub out: &'a mut [T],
    pub scores: &'a [T],
    /// W transposed.
    pub w: &'a [T],
    /// `[rows, heads, 2]`.
    pub stats: &'a [T],
    pub block: Block,
}

#[inline(always)]
fn attend<T: Float, V: Vector<T>, const I: usize>(k: &mut Attend<T>, row: usize, first: usize) {
    let (stride, plane, heads) = (k.block.stride(), k.block.plane(), k.block.heads);
    let at = row * stride;
    let stats = &k.stats[(row * heads + first) * 2..][..2 * I];
    for j in (0..stride).step_by(LANES) {
        let y = mix::<T, V, I>([V::splat(T::ZERO); I], k.scores, plane, at + j, k.w, heads, first);
        for i in 0..I {
            let mut x = y[i] - V::splat(stats[2 * i]);
            if j + LANES >= stride {
                x = x + beyond::<T, V>(k.block.keys);
            }
            (exp_of_softmax::<T, V>(x) * V::splat(stats[2 * i + 1])).store(&mut k.out[(first + i) * plane + at + j..]);
        }
    }
}

impl<T: Float> Kernel<T> for Attend<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let k = &mut self;
        for row in 0..k.block.rows {
            in_groups!(k.block.heads, first, attend, k, row);
        }
    }
}

/// A → R. With `stats`, A is still to be multiplied by its inverse sums.
pub(super) struct Remix<'a, T> {
    pub out: &'a mut [T],
    pub weights: &'a [T],
    /// U transposed.
    pub w: &'a [T],
    pub bias: &'a [T],
    pub stats: Option<&'a [T]>,
    /// Room for U of one row.
    pub scaled: &'a mut [T],
    pub block: Block,
}

#[inline(always)]
fn remix<T: Float, V: Vector<T>, const I: usize>(k: &mut Remix<T>, row: usize, first: usize) {
    let (stride, plane, heads) = (k.block.stride(), k.block.plane(), k.block.heads);
    let at = row * stride;
    let bias: [V; I] = std::array::from_fn(|i| V::splat(k.bias[first + i]));
    for j in (0..stride).step_by(LANES) {
        let y = mix::<T, V, I>(bias, k.weights, plane, at + j, k.scaled, heads, first);
        for i in 0..I {
            y[i].store(&mut k.out[(first + i) * plane + at + j..]);
        }
    }
}

impl<T: Float> Kernel<T> for Remix<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let k = &mut self;
        let heads = k.block.heads;
        k.scaled.copy_from_slice(k.w);
        for row in 0..k.block.rows {
            if let Some(stats) = k.stats {
                let rows = k.scaled.chunks_exact_mut(heads).zip(k.w.chunks_exact(heads));
                for ((scaled, w), stats) in rows.zip(stats[row * heads * 2..].chunks_exact(2)) {
                    scaled.iter_mut().zip(w).for_each(|(x, &w)| *x = w * stats[1]);
                }
            }
            in_groups!(heads, first, remix, k, row);
        }
    }
}

/// `y_j = Σ_i w[i, j] x_i`; with `weights` A, also `δ += Σ_keys A ⊙ y`.
pub(super) struct PullBack<'a, T> {
    pub out: &'a mut [T],
    pub x: &'a [T],
    pub w: &'a [T],
    /// A, and δ `[rows, heads]`.
    pub weights: Option<(&'a [T], &'a mut [T])>,
    pub block: Block,
}

#[inline(always)]
fn pull_back<T: Float, V: Vector<T>, const I: usize>(k: &mut PullBack<T>, row: usize, first: usize) {
    let (stride, plane, heads) = (k.block.stride(), k.block.plane(), k.block.heads);
    let at = row * stride;
    let mut delta = [V::splat(T::ZERO); I];
    for j in (0..stride).step_by(LANES) {
        let y = mix::<T, V, I>([V::splat(T::ZERO); I], k.x, plane, at + j, k.w, heads, first);
        for i in 0..I {
            let from = (first + i) * plane + at + j;
            y[i].store(&mut k.out[from..]);
            if let Some((weights, _)) = &k.weights {
                delta[i] = y[i].mul_add(V::load(&weights[from..from + LANES]), delta[i]);
            }
        }
    }
    if let Some((_, sums)) = &mut k.weights {
        for i in 0..I {
            sums[row * heads + first + i] += delta[i].sum();
        }
    }
}

impl<T: Float> Kernel<T> for PullBack<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let k = &mut self;
        for row in 0..k.block.rows {
            in_groups!(k.block.heads, first, pull_back, k, row);
        }
    }
}

/// dA → `dL = A ⊙ (dA − δ)`, in place.
pub(super) struct ScoreGradient<'a, T> {
    pub d: &'a mut [T],
    pub weights: &'a [T],
    pub delta: &'a [T],
    pub block: Block,
}

impl<T: Float> Kernel<T> for ScoreGradient<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let Block { heads, rows, .. } = self.block;
        let lines = self.d.chunks_exact_mut(self.block.stride()).zip(self.weights.chunks_exact(self.block.stride()));
        for (line, (d, weights)) in lines.enumerate() {
            let delta = V::splat(self.delta[line % rows * heads + line / rows]);
            for (d, a) in d.chunks_exact_mut(LANES).zip(weights.chunks_exact(LANES)) {
                (V::load(a) * (V::load(d) - delta)).store(d);
            }
        }
    }
}

/// `out[i, j] += ⟨x_i, y_j⟩` over planes; `sums_i += Σ x_i`.
pub(super) struct Gram<'a, T> {
    pub out: &'a mut [T],
    pub sums: Option<&'a mut [T]>,
    pub x: &'a [T],
    pub y: &'a [T],
    pub plane: usize,
}

/// Heads of x and y whose products are summed at the same time.
const GRAM: usize = 4;

impl<T: Float> Gram<'_, T> {
    #[inline(always)]
    fn tile<V: Vector<T>, const I: usize, const J: usize>(&mut self, i0: usize, j0: usize, heads: usize) {
        let mut acc = [[V::splat(T::ZERO); J]; I];
        let x: [&[T]; I] = std::array::from_fn(|i| &self.x[(i0 + i) * self.plane..(i0 + i + 1) * self.plane]);
        let y: [&[T]; J] = std::array::from_fn(|j| &self.y[(j0 + j) * self.plane..(j0 + j + 1) * self.plane]);
        for at in (0..self.plane).step_by(LANES) {
            let y: [V; J] = std::array::from_fn(|j| V::load(&y[j][at..at + LANES]));
            for i in 0..I {
                let x = V::load(&x[i][at..at + LANES]);
                for j in 0..J {
                    acc[i][j] = x.mul_add(y[j], acc[i][j]);
                }
            }
        }
        for i in 0..I {
            for j in 0..J {
                self.out[(i0 + i) * heads + j0 + j] += acc[i][j].sum();
            }
        }
    }
}

impl<T: Float> Kernel<T> for Gram<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let heads = self.x.len() / self.plane;
        let whole = heads / GRAM * GRAM;
        for i in (0..whole).step_by(GRAM) {
            (0..whole).step_by(GRAM).for_each(|j| self.tile::<V, GRAM, GRAM>(i, j, heads));
            (whole..heads).for_each(|j| self.tile::<V, GRAM, 1>(i, j, heads));
        }
        for i in whole..heads {
            (0..whole).step_by(GRAM).for_each(|j| self.tile::<V, 1, GRAM>(i, j, heads));
            (whole..heads).for_each(|j| self.tile::<V, 1, 1>(i, j, heads));
        }
        if let Some(sums) = self.sums {
            for (sum, x) in sums.iter_mut().zip(self.x.chunks_exact(self.plane)) {
                let mut acc = V::splat(T::ZERO);
                x.chunks_exact(LANES).for_each(|x| acc = acc + V::load(x));
                *sum += acc.sum();
            }
        }
    }
}
