//! Distributions over the entries of rows: softmax with temperature, the first largest entry, the nearest code.

use rayon::prelude::*;

use super::{chunk_rows, exp_of_softmax, get, put};
use crate::linalg::{Mat, MatMut};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

struct Softmax<'a, T> {
    out: &'a mut [T],
    x: &'a [T],
    noise: Option<&'a [T]>,
    inverse: T,
    width: usize,
}

impl<T: Float> Kernel<T> for Softmax<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let inverse = V::splat(self.inverse);
        for (i, (out, x)) in self.out.chunks_exact_mut(self.width).zip(self.x.chunks_exact(self.width)).enumerate() {
            let noise = self.noise.map(|noise| &noise[i * self.width..(i + 1) * self.width]);
            let mut best = V::splat(T::NEG_INFINITY);
            let mut j = 0;
            while j < x.len() {
                let mut s = get::<T, V>(x, j, T::NEG_INFINITY);
                if let Some(noise) = noise {
                    s = s + get::<T, V>(noise, j, T::ZERO);
                }
                best = (s * inverse).max(best);
                put(s * inverse, out, j);
                j += LANES;
            }
            let (center, mut sum) = (V::splat(best.largest()), V::splat(T::ZERO));
            j = 0;
            while j < x.len() {
                let e = exp_of_softmax::<T, V>(get::<T, V>(out, j, T::NEG_INFINITY) - center);
                sum = sum + e;
                put(e, out, j);
                j += LANES;
            }
            let factor = V::splat(T::ONE / sum.sum());
            j = 0;
            while j < x.len() {
                put(get::<T, V>(out, j, T::ZERO) * factor, out, j);
                j += LANES;
            }
        }
    }
}

/// Every row of `out` ← `softmax((x + noise)/τ)`.
pub fn softmax<T: Float>(out: &mut [T], x: &[T], noise: Option<&[T]>, tau: f64, width: usize) {
    assert!(width > 0 && out.len() == x.len() && x.len().is_multiple_of(width) && noise.is_none_or(|noise| noise.len() == x.len()));
    let (chunk, inverse) = (chunk_rows(width) * width, T::from_f64(1.0 / tau));
    out.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).enumerate().for_each(|(i, (out, x))| {
        let noise = noise.map(|noise| &noise[i * chunk..i * chunk + x.len()]);
        T::dispatch(Softmax { out, x, noise, inverse, width });
    });
}

struct SoftmaxBackward<'a, T> {
    d: &'a mut [T],
    s: &'a [T],
    inverse: T,
    width: usize,
}

impl<T: Float> Kernel<T> for SoftmaxBackward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let inverse = V::splat(self.inverse);
        for (d, s) in self.d.chunks_exact_mut(self.width).zip(self.s.chunks_exact(self.width)) {
            let mean = V::splat(super::reduce::dot_lanes::<T, V>(s, d).sum());
            let mut j = 0;
            while j < d.len() {
                put(get::<T, V>(s, j, T::ZERO) * (get::<T, V>(d, j, T::ZERO) - mean) * inverse, d, j);
                j += LANES;
            }
        }
    }
}

/// The gradient of [`softmax`] with respect to x and to noise: `d ← s ∘ (d − Σ s ∘ d)/τ` in every row, s being its output.
pub fn softmax_backward<T: Float>(d: &mut [T], s: &[T], tau: f64, width: usize) {
    assert!(width > 0 && d.len() == s.len() && d.len().is_multiple_of(width));
    let (chunk, inverse) = (chunk_rows(width) * width, T::from_f64(1.0 / tau));
    d.par_chunks_mut(chunk).zip(s.par_chunks(chunk)).for_each(|(d, s)| T::dispatch(SoftmaxBackward { d, s, inverse, width }));
}

/// The place of the smallest entry of a row, the first of several: `(value, place)`. NaN is never smallest.
struct FirstLeast<'a, T>(&'a [T]);

impl<T: Float> Kernel<T> for FirstLeast<'_, T> {
    type Output = (T, usize);
    #[inline(always)]
    fn run<V: Vector<T>>(self) -> (T, usize) {
        let infinity = -T::NEG_INFINITY;
        let mut number = [T::ZERO; LANES];
        number.iter_mut().enumerate().for_each(|(i, x)| *x = T::of(i));
        let (mut at, step) = (V::load(&number), V::splat(T::of(LANES)));
        let (mut best, mut place) = (V::splat(infinity), V::splat(T::ZERO));
        let mut j = 0;
        while j < self.0.len() {
            let x = get::<T, V>(self.0, j, infinity);
            place = x.less(best, at, place);
            best = x.less(best, x, best);
            at = at + step;
            j += LANES;
        }
        let (best, place) = (best.to_array(), place.to_array());
        let least = best
            .iter()
            .zip(&place)
            .fold((infinity, T::ZERO), |(b, p), (&x, &i)| if x < b || x == b && x < infinity && i < p { (x, i) } else { (b, p) });
        (least.0, least.1.to_f64() as usize)
    }
}

/// Codes scored at a time: their numbers are exact in f32.
const CODES: usize = 512;
/// Vectors scored at a time.
const VECTORS: usize = 64;

/// For every row f of `x`, the code e (a column of `codes` `[width, count]`) with the smallest `‖e‖² − 2 f·e`, the first of several:
/// the nearest one, without a table of all distances.
pub fn nearest<T: Float>(index: &mut [u32], x: &[T], codes: &[T], width: usize, count: usize) {
    assert!(width > 0 && count > 0 && x.len() == index.len() * width && codes.len() == width * count);
    let squares = column_squares(codes, count);
    let all = Mat::new(codes, width, count);
    let step = T::packed_len(width, CODES.min(count));
    let mut packed = Buffer::<T>::scratch(step * count.div_ceil(CODES));
    for (part, start) in packed.chunks_exact_mut(step).zip((0..count).step_by(CODES)) {
        T::pack(all.cols_from(start, CODES.min(count - start)), part);
    }
    let minus_two = T::from_f64(-2.0);
    index.par_chunks_mut(VECTORS).zip(x.par_chunks(VECTORS * width)).for_each(|(index, x)| {
        let m = index.len();
        let mut scores = Buffer::<T>::scratch(m * CODES.min(count));
        let mut best = [-T::NEG_INFINITY; VECTORS];
        index.fill(0);
        for (packed, start) in packed.chunks_exact(step).zip((0..count).step_by(CODES)) {
            let n = CODES.min(count - start);
            T::multiply_packed(Mat::new(x, m, width), packed, MatMut::new(&mut scores[..m * n], m, n), false);
            for (i, row) in scores[..m * n].chunks_exact_mut(n).enumerate() {
                for (s, &square) in row.iter_mut().zip(&squares[start..]) {
                    *s = *s * minus_two + square;
                }
                let (value, place) = T::dispatch(FirstLeast(row));
                if value < best[i] {
                    best[i] = value;
                    index[i] = (start + place) as u32;
                }
            }
        }
    });
}

/// `‖e‖²` of every column of a matrix with `count` columns.
pub fn column_squares<T: Float>(codes: &[T], count: usize) -> Buffer<T> {
    let mut squares = Buffer::<T>::zeros(count);
    for row in codes.chunks_exact(count.max(1)) {
        for (sum, &e) in squares.iter_mut().zip(row) {
            *sum = e.fused(e, *sum);
        }
    }
    squares
}

/// The place of the largest entry of every row of `x + noise`, the first of several.
pub fn first_largest<T: Float>(index: &mut [u32], x: &[T], noise: Option<&[T]>, width: usize) {
    assert!(width > 0 && x.len() == index.len() * width);
    let chunk = chunk_rows(width);
    index.par_chunks_mut(chunk).enumerate().for_each(|(c, index)| {
        for (i, place) in index.iter_mut().enumerate() {
            let at = (c * chunk + i) * width;
            let entry = |j: usize| x[at + j] + noise.map_or(T::ZERO, |noise| noise[at + j]);
            *place = (1..width).fold(0, |best, j| if entry(j) > entry(best) { j } else { best }) as u32;
        }
    });
}

/// A distance of a distribution p over K entries from the uniform one, `Σ_k (p_k + a) ln((p_k + a) K + b)`: the Kullback-Leibler
/// divergence, with what releases add to stay clear of ln 0.
#[derive(Clone, Copy, Debug)]
pub struct Divergence {
    /// Added to the probability.
    pub a: f64,
    /// Added inside the logarithm.
    pub b: f64,
}

impl Divergence {
    fn terms<T: Float>(&self, p: T, count: f64) -> (f64, f64) {
        let p = p.to_f64() + self.a;
        let inside = p * count + self.b;
        // p ln p is 0 at 0.
        if inside > 0.0 { (p * libm::log(inside), libm::log(inside) + p * count / inside) } else { (0.0, 0.0) }
    }

    /// The sum over all rows of `p`.
    pub fn sum<T: Float>(&self, p: &[T], width: usize) -> f64 {
        let chunk = chunk_rows(width) * width.max(1);
        let parts: Vec<f64> = p.par_chunks(chunk).map(|p| p.iter().fold(0.0, |sum, &p| sum + self.terms(p, width as f64).0)).collect();
        parts.iter().sum()
    }

    /// `d += factor · ∂sum/∂l` where `p = softmax(l)`: with w the derivative by p, `factor · p ∘ (w − Σ p w)` in every row.
    pub fn add_gradient<T: Float>(&self, d: &mut [T], p: &[T], width: usize, factor: f64) {
        assert_eq!(d.len(), p.len());
        let (chunk, count) = (chunk_rows(width) * width.max(1), width as f64);
        d.par_chunks_mut(chunk).zip(p.par_chunks(chunk)).for_each(|(d, p)| {
            let mut slope = vec![0.0; width];
            for (d, p) in d.chunks_exact_mut(width.max(1)).zip(p.chunks_exact(width.max(1))) {
                let mut mean = 0.0;
                for (slope, &p) in slope.iter_mut().zip(p) {
                    *slope = self.terms(p, count).1;
                    mean += p.to_f64() * *slope;
                }
                for ((d, &p), slope) in d.iter_mut().zip(p).zip(&slope) {
                    *d += T::from_f64(factor * p.to_f64() * (slope - mean));
                }
            }
        });
    }
}

struct LogSumExp<'a, T>(&'a [T]);

impl<T: Float> Kernel<T> for LogSumExp<'_, T> {
    type Output = f64;
    #[inline(always)]
    fn run<V: Vector<T>>(self) -> f64 {
        let mut best = V::splat(T::NEG_INFINITY);
        let mut j = 0;
        while j < self.0.len() {
            best = get::<T, V>(self.0, j, T::NEG_INFINITY).max(best);
            j += LANES;
        }
        let max = best.largest();
        let (center, mut sum) = (V::splat(max), V::splat(T::ZERO));
        j = 0;
        while j < self.0.len() {
            sum = sum + (get::<T, V>(self.0, j, T::NEG_INFINITY) - center).exp();
            j += LANES;
        }
        max.to_f64() + libm::log(sum.sum().to_f64())
    }
}

/// `ln Σ e^x` of one row.
pub fn log_sum_exp<T: Float>(row: &[T]) -> f64 {
    T::dispatch(LogSumExp(row))
}
