//! LayerScale over rows: `y = x + γ ⊙ f`, one pass each way.

use rayon::prelude::*;

use super::{chunk_rows, get, put};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

struct Forward<'a, T> {
    y: &'a mut [T],
    x: &'a [T],
    f: &'a [T],
    gamma: &'a [T],
}

impl<T: Float> Kernel<T> for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.gamma.len();
        for ((y, x), f) in self.y.chunks_exact_mut(width).zip(self.x.chunks_exact(width)).zip(self.f.chunks_exact(width)) {
            let mut j = 0;
            while j < width {
                let gamma = get::<T, V>(self.gamma, j, T::ZERO);
                put(gamma.mul_add(get(f, j, T::ZERO), get(x, j, T::ZERO)), y, j);
                j += LANES;
            }
        }
    }
}

/// `y = x + γ ⊙ f`.
pub fn layer_scale<T: Float>(y: &mut [T], x: &[T], f: &[T], gamma: &[T]) {
    assert!(y.len() == x.len() && y.len() == f.len() && (y.is_empty() || y.len().is_multiple_of(gamma.len())));
    let chunk = (chunk_rows(gamma.len()) * gamma.len()).max(1);
    y.par_chunks_mut(chunk)
        .zip(x.par_chunks(chunk))
        .zip(f.par_chunks(chunk))
        .for_each(|((y, x), f)| T::dispatch(Forward { y, x, f, gamma }));
}

struct Backward<'a, T> {
    df: &'a mut [T],
    dgamma: &'a mut [T],
    dy: &'a [T],
    f: &'a [T],
    gamma: &'a [T],
}

impl<T: Float> Kernel<T> for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.gamma.len();
        for ((df, dy), f) in self.df.chunks_exact_mut(width).zip(self.dy.chunks_exact(width)).zip(self.f.chunks_exact(width)) {
            let mut j = 0;
            while j < width {
                let d = get::<T, V>(dy, j, T::ZERO);
                put(d * get(self.gamma, j, T::ZERO), df, j);
                put(d.mul_add(get(f, j, T::ZERO), get(self.dgamma, j, T::ZERO)), self.dgamma, j);
                j += LANES;
            }
        }
    }
}

/// `df = γ ⊙ dy`, `dγ += Σ dy ⊙ f`: chunks of rows in parallel, their sums added in order.
pub fn layer_scale_backward<T: Float>(df: &mut [T], dgamma: &mut [T], dy: &[T], f: &[T], gamma: &[T]) {
    let width = gamma.len();
    assert!(df.len() == dy.len() && df.len() == f.len() && dgamma.len() == width);
    if df.is_empty() {
        return;
    }
    let chunk = chunk_rows(width).min(256) * width;
    let mut partial = Buffer::<T>::zeros(df.len().div_ceil(chunk) * width);
    df.par_chunks_mut(chunk)
        .zip(partial.par_chunks_mut(width))
        .zip(dy.par_chunks(chunk).zip(f.par_chunks(chunk)))
        .for_each(|((df, dgamma), (dy, f))| T::dispatch(Backward { df, dgamma, dy, f, gamma }));
    for part in partial.chunks_exact(width) {
        for (total, &p) in dgamma.iter_mut().zip(part) {
            *total += p;
        }
    }
}
