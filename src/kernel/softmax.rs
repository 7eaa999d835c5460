//! Softmax over rows that exist as a whole: `p = softmax(s x)`, `dx = s p ⊙ (dp − Σ p dp)`.

use rayon::prelude::*;

use super::reduce::dot_lanes;
use super::{chunk_rows, exp_of_softmax, get, put};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::Float;

struct Forward<'a, T> {
    x: &'a mut [T],
    width: usize,
    scale: T,
}

impl<T: Float> Kernel<T> for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let scale = V::splat(self.scale);
        for row in self.x.chunks_exact_mut(self.width) {
            let mut best = V::splat(T::NEG_INFINITY);
            let mut j = 0;
            while j < row.len() {
                // A negative scale is as good as any: the scaled logits are compared.
                let v = get::<T, V>(row, j, T::ZERO) * scale;
                put(v, row, j);
                best = get::<T, V>(row, j, T::NEG_INFINITY).max(best);
                j += LANES;
            }
            let (center, mut sum) = (V::splat(best.largest()), V::splat(T::ZERO));
            j = 0;
            while j < row.len() {
                let e = exp_of_softmax::<T, V>(get::<T, V>(row, j, T::NEG_INFINITY) - center);
                sum = sum + e;
                put(e, row, j);
                j += LANES;
            }
            let inverse = V::splat(T::ONE / sum.sum());
            j = 0;
            while j < row.len() {
                put(get::<T, V>(row, j, T::ZERO) * inverse, row, j);
                j += LANES;
            }
        }
    }
}

/// Every row of `width` elements becomes `softmax(scale · row)`.
pub fn softmax<T: Float>(x: &mut [T], width: usize, scale: f64) {
    assert!(width > 0 && x.len().is_multiple_of(width));
    let scale = T::from_f64(scale);
    x.par_chunks_mut(chunk_rows(width) * width).for_each(|x| T::dispatch(Forward { x, width, scale }));
}

struct Backward<'a, T> {
    dp: &'a mut [T],
    p: &'a [T],
    width: usize,
    scale: T,
}

impl<T: Float> Kernel<T> for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let scale = V::splat(self.scale);
        for (dp, p) in self.dp.chunks_exact_mut(self.width).zip(self.p.chunks_exact(self.width)) {
            let mean = V::splat(dot_lanes::<T, V>(p, dp).sum());
            let mut j = 0;
            while j < dp.len() {
                let d = scale * (get::<T, V>(p, j, T::ZERO) * (get::<T, V>(dp, j, T::ZERO) - mean));
                put(d, dp, j);
                j += LANES;
            }
        }
    }
}

/// The gradient of [`softmax`] with result `p`: `dp` becomes `dx`.
pub fn softmax_backward<T: Float>(dp: &mut [T], p: &[T], width: usize, scale: f64) {
    assert!(width > 0 && dp.len() == p.len() && p.len().is_multiple_of(width));
    let (chunk, scale) = (chunk_rows(width) * width, T::from_f64(scale));
    dp.par_chunks_mut(chunk).zip(p.par_chunks(chunk)).for_each(|(dp, p)| T::dispatch(Backward { dp, p, width, scale }));
}
