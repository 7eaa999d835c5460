//! Kernels: slices in, slices out; forward and backward side by side.
//!
//! Lengths are checked by the callers and asserted here. Work is cut by shape, never by the number of threads; sums over rows
//! go through fixed chunks whose parts are added in order.

pub mod attention;
pub mod categorical;
pub mod cells;
pub mod channel_norm;
pub mod cluster;
pub mod depthwise;
pub mod dilated;
pub mod elementwise;
pub mod factorized;
pub mod features;
pub mod gram;
pub mod im2col;
pub mod layer_scale;
pub mod maps;
pub mod neighbours;
pub mod norm;
pub mod optim;
pub mod pieces;
pub mod pool;
pub mod position_mlp;
pub mod ranged;
pub mod reduce;
pub mod resize;
pub mod retention;
pub mod retention_gate;
pub mod rows;
pub mod softmax;
pub mod talking_heads;
pub mod unfold;

use crate::simd::{LANES, Vector};
use crate::tensor::Float;

/// Rows per parallel chunk for rows of `width` elements: some 64 KiB of f32.
pub(crate) fn chunk_rows(width: usize) -> usize {
    (16_384 / width.max(1)).max(1)
}

/// Sixteen elements of `s` from `j`, or what is left of it and `fill`.
#[inline(always)]
pub(crate) fn get<T: Copy, V: Vector<T>>(s: &[T], j: usize, fill: T) -> V {
    let s = &s[j..];
    if s.len() >= LANES { V::load(s) } else { V::load_partial(s, fill) }
}

/// `e^x` of a softmax, whose largest term is 1: 0 below [`Float::NOTHING`]. Subnormal probabilities would change no result, but cost some
/// processors a hundred cycles whenever they are touched.
#[inline(always)]
pub(crate) fn exp_of_softmax<T: Float, V: Vector<T>>(x: V) -> V {
    let nothing = V::splat(T::NOTHING);
    x.less(nothing, V::splat(T::ZERO), nothing.max(x).exp())
}

/// Writes sixteen elements of `s` from `j`, or what is left of it.
#[inline(always)]
pub(crate) fn put<T: Copy, V: Vector<T>>(v: V, s: &mut [T], j: usize) {
    let s = &mut s[j..];
    if s.len() >= LANES { v.store(s) } else { v.store_partial(s) }
}
