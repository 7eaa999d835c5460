//! What follows retention, per token and head: `z = act(g) ∘ ô` with `ô = o/√(mean(o²) + ε)`, or that of `o − mean(o)`.
//!
//! Backward: `∂g = ∂z ∘ ô ∘ act′(g)`, `∂ô = ∂z ∘ act(g)`, `ō = w r (∂ô − ô mean(∂ô ∘ ô) [− mean(∂ô)])`, `r = 1/√(· + ε)`, and w the row's
//! constant factor if it was rescaled.

use rayon::prelude::*;

use super::{chunk_rows, get, put};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::Float;

/// The norm and the gate.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    /// Heads of a row.
    pub heads: usize,
    /// Width of a head.
    pub width: usize,
    /// Tokens of a sequence.
    pub tokens: usize,
    /// ε of the norm.
    pub eps: f64,
    /// The mean is subtracted first.
    pub centre: bool,
    /// act is GELU instead of swish, `g σ(g)`.
    pub gelu: bool,
}

impl Gate {
    /// act(g) and its slope.
    #[inline(always)]
    fn act<T: Float, V: Vector<T>>(&self, g: V) -> (V, V) {
        if self.gelu {
            return g.gelu_with_grad();
        }
        let one = V::splat(T::ONE);
        let s = one / (one + (-g).exp());
        (g * s, s * (one + g * (one - s)))
    }

    /// The mean to subtract and r.
    #[inline(always)]
    fn stats<T: Float, V: Vector<T>>(&self, o: &[T]) -> (T, T) {
        let n = T::of(self.width);
        let mean = if self.centre { sum::<T, V>(o, |o| o) / n } else { T::ZERO };
        let centre = V::splat(mean);
        let mut squares = V::splat(T::ZERO);
        let mut j = 0;
        while j < o.len() {
            let d = get::<T, V>(o, j, mean) - centre;
            squares = d.mul_add(d, squares);
            j += LANES;
        }
        (mean, T::ONE / (squares.sum() / n + T::from_f64(self.eps)).root())
    }
}

#[inline(always)]
fn sum<T: Float, V: Vector<T>>(x: &[T], f: impl Fn(V) -> V) -> T {
    let mut total = V::splat(T::ZERO);
    let mut j = 0;
    while j < x.len() {
        total = total + f(get::<T, V>(x, j, T::ZERO));
        j += LANES;
    }
    total.sum()
}

struct Forward<'a, T> {
    gate: &'a Gate,
    z: &'a mut [T],
    o: &'a [T],
    g: &'a [T],
}

impl<T: Float> Kernel<T> for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.gate.width;
        for ((z, o), g) in self.z.chunks_exact_mut(width).zip(self.o.chunks_exact(width)).zip(self.g.chunks_exact(width)) {
            let (mean, r) = self.gate.stats::<T, V>(o);
            let (mean, r) = (V::splat(mean), V::splat(r));
            let mut j = 0;
            while j < width {
                let hat = (get::<T, V>(o, j, T::ZERO) - mean) * r;
                put(self.gate.act::<T, V>(get(g, j, T::ZERO)).0 * hat, z, j);
                j += LANES;
            }
        }
    }
}

/// `z` from `o` and `g`, all `[rows, heads · width]`.
pub fn forward<T: Float>(gate: &Gate, z: &mut [T], o: &[T], g: &[T]) {
    assert!(z.len() == o.len() && o.len() == g.len());
    let chunk = chunk_rows(gate.heads * gate.width) * gate.heads * gate.width;
    z.par_chunks_mut(chunk.max(1)).zip(o.par_chunks(chunk.max(1)).zip(g.par_chunks(chunk.max(1)))).for_each(|(z, (o, g))| {
        T::dispatch(Forward { gate, z, o, g });
    });
}

struct Backward<'a, T> {
    gate: &'a Gate,
    z: &'a mut [T],
    dg: &'a mut [T],
    dz: &'a mut [T],
    o: &'a [T],
    g: &'a [T],
    weights: &'a [T],
    /// The first head of the first row, of all.
    first: usize,
}

impl<T: Float> Kernel<T> for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let Gate { heads, width, tokens, centre, .. } = *self.gate;
        let n = T::of(width);
        let outputs = self.z.chunks_exact_mut(width).zip(self.dg.chunks_exact_mut(width)).zip(self.dz.chunks_exact_mut(width));
        for (i, (((z, dg), dz), (o, g))) in outputs.zip(self.o.chunks_exact(width).zip(self.g.chunks_exact(width))).enumerate() {
            let (mean, r) = self.gate.stats::<T, V>(o);
            let (centred, scale) = (V::splat(mean), V::splat(r));
            let (mut sum_d, mut sum_dh) = (V::splat(T::ZERO), V::splat(T::ZERO));
            let mut j = 0;
            while j < width {
                // The lanes beyond the row: ô = −mean r there, but ∂z = 0.
                let hat = (get::<T, V>(o, j, T::ZERO) - centred) * scale;
                let (act, slope) = self.gate.act::<T, V>(get(g, j, T::ZERO));
                let d = get::<T, V>(dz, j, T::ZERO);
                put(act * hat, z, j);
                put(d * hat * slope, dg, j);
                let d_hat = d * act;
                put(d_hat, dz, j);
                sum_d = sum_d + d_hat;
                sum_dh = d_hat.mul_add(hat, sum_dh);
                j += LANES;
            }
            let weight = if self.weights.is_empty() {
                T::ONE
            } else {
                let (row, head) = ((self.first + i) / heads, (self.first + i) % heads);
                self.weights[(row / tokens * heads + head) * tokens + row % tokens]
            };
            let mean_d = V::splat(if centre { sum_d.sum() / n } else { T::ZERO });
            let (mean_dh, scale_d) = (V::splat(sum_dh.sum() / n), V::splat(r * weight));
            j = 0;
            while j < width {
                let hat = (get::<T, V>(o, j, T::ZERO) - centred) * scale;
                put(scale_d * ((get::<T, V>(dz, j, T::ZERO) - mean_d) - hat * mean_dh), dz, j);
                j += LANES;
            }
        }
    }
}

/// Writes `z` again and `dg`; `dz` becomes the gradient of the outputs before they were rescaled by `weights` `[batch, heads, tokens]`
/// (or none).
pub fn backward<T: Float>(gate: &Gate, [z, dg, dz]: [&mut [T]; 3], [o, g]: [&[T]; 2], weights: &[T]) {
    assert!(z.len() == o.len() && o.len() == g.len() && dg.len() == g.len() && dz.len() == z.len());
    let rows = chunk_rows(gate.heads * gate.width);
    let chunk = (rows * gate.heads * gate.width).max(1);
    let outputs = z.par_chunks_mut(chunk).zip(dg.par_chunks_mut(chunk)).zip(dz.par_chunks_mut(chunk));
    outputs.zip(o.par_chunks(chunk).zip(g.par_chunks(chunk))).enumerate().for_each(|(i, (((z, dg), dz), (o, g)))| {
        T::dispatch(Backward { gate, z, dg, dz, o, g, weights, first: i * rows * gate.heads });
    });
}
