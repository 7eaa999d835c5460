//! Sums with a fixed order: over rows, and of everything.

use rayon::prelude::*;

use super::{get, put};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

/// Rows per partial sum.
const CHUNK_ROWS: usize = 256;

struct ColumnSums<'a, T> {
    out: &'a mut [T],
    x: &'a [T],
}

impl<T: Float> Kernel<T> for ColumnSums<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        for row in self.x.chunks_exact(self.out.len()) {
            let mut j = 0;
            while j < row.len() {
                put(get::<T, V>(self.out, j, T::ZERO) + get::<T, V>(row, j, T::ZERO), self.out, j);
                j += LANES;
            }
        }
    }
}

/// `out[j] += Σ_i x[i, j]`: chunks of rows in parallel, their sums added in order.
pub fn add_column_sums<T: Float>(out: &mut [T], x: &[T]) {
    let cols = out.len();
    if cols == 0 || x.is_empty() {
        return;
    }
    let chunk = CHUNK_ROWS * cols;
    let parts = x.len().div_ceil(chunk);
    let mut partial = Buffer::<T>::zeros(parts * cols);
    partial.par_chunks_mut(cols).zip(x.par_chunks(chunk)).for_each(|(out, x)| T::dispatch(ColumnSums { out, x }));
    T::dispatch(ColumnSums { out, x: &partial });
}

struct Dot<'a, T> {
    x: &'a [T],
    y: &'a [T],
}

impl<T: Float> Kernel<T> for Dot<'_, T> {
    type Output = T;
    #[inline(always)]
    fn run<V: Vector<T>>(self) -> T {
        dot_lanes::<T, V>(self.x, self.y).sum()
    }
}

/// `Σ x_j y_j` in sixteen strided lanes.
#[inline(always)]
pub(crate) fn dot_lanes<T: Float, V: Vector<T>>(x: &[T], y: &[T]) -> V {
    let mut acc = V::splat(T::ZERO);
    let mut j = 0;
    while j < x.len() {
        acc = get::<T, V>(x, j, T::ZERO).mul_add(get(y, j, T::ZERO), acc);
        j += LANES;
    }
    acc
}

/// The inner product, chunk by chunk, in f64 across chunks.
pub fn dot<T: Float>(x: &[T], y: &[T]) -> f64 {
    assert_eq!(x.len(), y.len());
    const CHUNK: usize = 8192;
    let parts = x.len().div_ceil(CHUNK);
    let mut partial = Buffer::<f64>::zeros(parts);
    partial
        .par_iter_mut()
        .zip(x.par_chunks(CHUNK).zip(y.par_chunks(CHUNK)))
        .for_each(|(sum, (x, y))| *sum = T::dispatch(Dot { x, y }).to_f64());
    partial.iter().fold(0.0, |sum, part| sum + part)
}

struct MaxAbs<'a, T>(&'a [T]);

impl<T: Float> Kernel<T> for MaxAbs<'_, T> {
    type Output = T;
    #[inline(always)]
    fn run<V: Vector<T>>(self) -> T {
        let mut max = V::splat(T::ZERO);
        let mut j = 0;
        while j < self.0.len() {
            max = get::<T, V>(self.0, j, T::ZERO).abs().max(max);
            j += LANES;
        }
        max.largest()
    }
}

/// The largest magnitude, 0 of nothing. NaN does not count.
pub fn max_abs<T: Float>(x: &[T]) -> T {
    const CHUNK: usize = 8192;
    let mut partial = Buffer::<T>::zeros(x.len().div_ceil(CHUNK));
    partial.par_iter_mut().zip(x.par_chunks(CHUNK)).for_each(|(max, x)| *max = T::dispatch(MaxAbs(x)));
    partial.iter().fold(T::ZERO, |max, &part| max.larger(part))
}
