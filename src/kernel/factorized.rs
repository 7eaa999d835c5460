//! What factorised attention does element by element: softmax down the columns, products with a map.

use super::{exp_of_softmax, get, put};
use crate::linalg::Mat;
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::Float;

/// Row `i` of a matrix whose columns follow each other.
#[inline(always)]
fn row<'a, T>(x: &Mat<'a, T>, i: usize) -> &'a [T] {
    let from = i * x.row_stride();
    &x.data()[from..from + x.cols()]
}

struct Largest<'a, T> {
    max: &'a mut [T],
    x: Mat<'a, T>,
}

impl<T: Float> Kernel<T> for Largest<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let mut j = 0;
        while j < self.max.len() {
            let mut best = get::<T, V>(self.max, j, T::NEG_INFINITY);
            for i in 0..self.x.rows() {
                best = get::<T, V>(row(&self.x, i), j, T::NEG_INFINITY).max(best);
            }
            put(best, self.max, j);
            j += LANES;
        }
    }
}

/// `max_j ← max(max_j, max_i x_ij)`.
pub fn largest<T: Float>(max: &mut [T], x: Mat<T>) {
    assert!(max.len() == x.cols() && x.col_stride() == 1);
    T::dispatch(Largest { max, x });
}

struct Exponentials<'a, T> {
    e: &'a mut [T],
    x: Mat<'a, T>,
    max: &'a [T],
    factors: Option<&'a [T]>,
    sums: Option<&'a mut [T]>,
}

impl<T: Float> Kernel<T> for Exponentials<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        for (i, e) in self.e.chunks_exact_mut(self.max.len()).enumerate() {
            let x = row(&self.x, i);
            let mut j = 0;
            while j < e.len() {
                let mut v = exp_of_softmax::<T, V>(get::<T, V>(x, j, T::ZERO) - get(self.max, j, T::ZERO));
                if let Some(factors) = self.factors {
                    v = v * get(factors, j, T::ZERO);
                }
                put(v, e, j);
                if let Some(sums) = &mut self.sums {
                    put(get::<T, V>(sums, j, T::ZERO) + v, sums, j);
                }
                j += LANES;
            }
        }
    }
}

/// `e_ij = e^{x_ij − max_j}`, times `factor_j` if there are any; `sum_j += Σ_i e_ij`.
pub fn exponentials<T: Float>(e: &mut [T], x: Mat<T>, max: &[T], factors: Option<&[T]>, sums: Option<&mut [T]>) {
    assert!(e.len() == x.rows() * x.cols() && max.len() == x.cols() && x.col_stride() == 1);
    if !e.is_empty() {
        T::dispatch(Exponentials { e, x, max, factors, sums });
    }
}

struct Products<'a, T> {
    out: &'a mut [T],
    stride: usize,
    a: Mat<'a, T>,
    b: Mat<'a, T>,
}

impl<T: Float> Kernel<T> for Products<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        for (i, out) in self.out.chunks_mut(self.stride).take(self.a.rows()).enumerate() {
            let (a, b, out) = (row(&self.a, i), row(&self.b, i), &mut out[..self.a.cols()]);
            let mut j = 0;
            while j < out.len() {
                put(get::<T, V>(a, j, T::ZERO) * get(b, j, T::ZERO), out, j);
                j += LANES;
            }
        }
    }
}

/// `out = a ∘ b`, the rows of `out` `stride` apart.
pub fn products<T: Float>(out: &mut [T], stride: usize, a: Mat<T>, b: Mat<T>) {
    assert!(a.rows() == b.rows() && a.cols() == b.cols() && a.col_stride() == 1 && b.col_stride() == 1 && stride >= a.cols());
    T::dispatch(Products { out, stride, a, b });
}

struct SoftmaxGradient<'a, T> {
    ds: &'a mut [T],
    stride: usize,
    s: &'a [T],
    r: &'a [T],
}

impl<T: Float> Kernel<T> for SoftmaxGradient<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.r.len();
        for (ds, s) in self.ds.chunks_mut(self.stride).zip(self.s.chunks_exact(width)) {
            let ds = &mut ds[..width];
            let mut j = 0;
            while j < width {
                put(get::<T, V>(s, j, T::ZERO) * (get::<T, V>(ds, j, T::ZERO) - get(self.r, j, T::ZERO)), ds, j);
                j += LANES;
            }
        }
    }
}

/// `dS → dK = S ∘ (dS − 1 rᵀ)` in place, rows `stride` apart: the softmax down the columns, `r_j = Σ_i S_ij dS_ij`.
pub fn softmax_gradient<T: Float>(ds: &mut [T], stride: usize, s: &[T], r: &[T]) {
    assert!(stride >= r.len());
    if !s.is_empty() {
        T::dispatch(SoftmaxGradient { ds, stride, s, r });
    }
}
