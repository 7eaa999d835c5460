//! A depthwise convolution over tokens found by index: `y_i = b + Σ_k w_k ⊙ x_{n(i, k)}`, n(i, k) the k-th neighbour of token i.
//!
//! Backward, for a symmetric neighbourhood (i is neighbour K−1−k of its neighbour k): `dx_i = Σ_k w_{K−1−k} ⊙ dy_{n(i, k)}`, the same with
//! the kernel reversed; `dw_k = Σ_i dy_i ⊙ x_{n(i, k)}`.

use rayon::prelude::*;

use super::{chunk_rows, get, put};
use crate::linalg::count_flops;
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

/// Neighbours per token: a 3×3 square, row-major, the token itself in the middle.
pub const PLACES: usize = 9;

/// The neighbours of every token, `[N, 9]`: rows, or a number beyond them where there is none.
pub type Neighbours = [u32];

/// The neighbours among tokens at different places `coords` (row, column).
pub fn of_coords(coords: &[[usize; 2]]) -> Vec<u32> {
    let mut sorted: Vec<([usize; 2], u32)> = coords.iter().enumerate().map(|(i, at)| (*at, i as u32)).collect();
    sorted.sort_unstable();
    let find = |at: [usize; 2]| sorted.binary_search_by_key(&at, |(at, _)| *at).map_or(u32::MAX, |found| sorted[found].1);
    let neighbour = |at: &[usize; 2], k: usize| match ((at[0] + k / 3).checked_sub(1), (at[1] + k % 3).checked_sub(1)) {
        (Some(y), Some(x)) => find([y, x]),
        _ => u32::MAX,
    };
    coords.iter().flat_map(|at| (0..PLACES).map(move |k| neighbour(at, k))).collect()
}

struct Convolve<'a, T> {
    out: &'a mut [T],
    x: &'a [T],
    neighbours: &'a Neighbours,
    /// `[9, C]`.
    weight: &'a [T],
    bias: Option<&'a [T]>,
    width: usize,
}

impl<T: Float> Kernel<T> for Convolve<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.width;
        for (out, near) in self.out.chunks_exact_mut(width).zip(self.neighbours.chunks_exact(PLACES)) {
            let mut rows = [(0, &self.x[..0]); PLACES];
            let mut count = 0;
            for (k, &row) in near.iter().enumerate() {
                if let Some(x) = self.x.get(row as usize * width..(row as usize + 1) * width) {
                    rows[count] = (k, x);
                    count += 1;
                }
            }
            for j in (0..width).step_by(LANES) {
                let mut sum = self.bias.map_or(V::splat(T::ZERO), |bias| get(bias, j, T::ZERO));
                for &(k, x) in &rows[..count] {
                    sum = get::<T, V>(&self.weight[k * width..(k + 1) * width], j, T::ZERO).mul_add(get(x, j, T::ZERO), sum);
                }
                put(sum, out, j);
            }
        }
    }
}

/// `weight` `[C, 9]` as `[9, C]`, the places reversed for the backward pass.
fn by_place<T: Float>(weight: &[T], reversed: bool) -> Buffer<T> {
    let width = weight.len() / PLACES;
    let mut out = Buffer::<T>::scratch(weight.len());
    for (k, out) in out.chunks_exact_mut(width.max(1)).enumerate() {
        let k = if reversed { PLACES - 1 - k } else { k };
        out.iter_mut().enumerate().for_each(|(c, x)| *x = weight[c * PLACES + k]);
    }
    out
}

fn convolve<T: Float>(out: &mut [T], x: &[T], neighbours: &Neighbours, weight: &[T], bias: Option<&[T]>, width: usize) {
    let tokens = neighbours.len() / PLACES;
    assert!(out.len() == x.len() && (x.is_empty() || x.len().is_multiple_of(tokens * width)) && weight.len() == PLACES * width);
    let chunk = chunk_rows(PLACES * width);
    out.par_chunks_mut((tokens * width).max(1)).zip(x.par_chunks((tokens * width).max(1))).for_each(|(out, x)| {
        out.par_chunks_mut(chunk * width).zip(neighbours.par_chunks(chunk * PLACES)).for_each(|(out, neighbours)| {
            T::dispatch(Convolve { out, x, neighbours, weight, bias, width });
        });
    });
}

/// `out` `[batch, N, C]` of `x` `[batch, N, C]`, `weight` `[C, 9]`, `bias` `[C]`. Counts all nine places, whether or not a neighbour is there.
pub fn forward<T: Float>(out: &mut [T], x: &[T], neighbours: &Neighbours, weight: &[T], bias: &[T]) {
    count_flops(2 * PLACES * x.len());
    convolve(out, x, neighbours, &by_place(weight, false), Some(bias), bias.len());
}

/// `dx`.
pub fn backward_input<T: Float>(dx: &mut [T], dy: &[T], neighbours: &Neighbours, weight: &[T]) {
    count_flops(2 * PLACES * dy.len());
    convolve(dx, dy, neighbours, &by_place(weight, true), None, weight.len() / PLACES);
}

struct WeightGradient<'a, T> {
    /// `[9, C]`.
    out: &'a mut [T],
    x: &'a [T],
    dy: &'a [T],
    neighbours: &'a Neighbours,
    width: usize,
}

impl<T: Float> Kernel<T> for WeightGradient<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.width;
        for j in (0..width).step_by(LANES) {
            let mut sums = [V::splat(T::ZERO); PLACES];
            for (dy, near) in self.dy.chunks_exact(width).zip(self.neighbours.chunks_exact(PLACES)) {
                let dy = get::<T, V>(dy, j, T::ZERO);
                for (sum, &row) in sums.iter_mut().zip(near) {
                    if let Some(x) = self.x.get(row as usize * width..(row as usize + 1) * width) {
                        *sum = dy.mul_add(get(x, j, T::ZERO), *sum);
                    }
                }
            }
            for (out, sum) in self.out.chunks_exact_mut(width).zip(sums) {
                put(sum, out, j);
            }
        }
    }
}

/// Adds to `d_weight` `[C, 9]`: runs of tokens in parallel, their sums added in order.
pub fn backward_weight<T: Float>(d_weight: &mut [T], x: &[T], dy: &[T], neighbours: &Neighbours) {
    const RUN: usize = 256;
    let (tokens, width) = (neighbours.len() / PLACES, d_weight.len() / PLACES);
    if dy.is_empty() {
        return;
    }
    count_flops(2 * PLACES * dy.len());
    let (batch, runs) = (dy.len() / (tokens * width), tokens.div_ceil(RUN));
    let mut parts = Buffer::<T>::scratch(batch * runs * PLACES * width);
    parts.par_chunks_mut(PLACES * width).enumerate().for_each(|(part, out)| {
        let image = part / runs * tokens * width..(part / runs + 1) * tokens * width;
        let at = part % runs * RUN..(part % runs * RUN + RUN).min(tokens);
        let dy = &dy[image.clone()][at.start * width..at.end * width];
        T::dispatch(WeightGradient { out, x: &x[image], dy, neighbours: &neighbours[at.start * PLACES..at.end * PLACES], width });
    });
    let mut sums = Buffer::<T>::zeros(PLACES * width);
    super::reduce::add_column_sums(&mut sums, &parts);
    for (i, x) in sums.iter().enumerate() {
        d_weight[i % width * PLACES + i / width] += *x;
    }
}
