//! Element by element: sums, products, residuals.

use rayon::prelude::*;

use super::{get, put};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::Float;

/// Elements per parallel chunk.
const CHUNK: usize = 16_384;

struct Map<'a, T, F> {
    out: &'a mut [T],
    x: &'a [T],
    f: F,
}

/// A lane-wise function of `out` and one operand.
trait Binary<T: Copy> {
    fn apply<V: Vector<T>>(&self, out: V, x: V) -> V;
}

impl<T: Float, F: Binary<T>> Kernel<T> for Map<'_, T, F> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let mut j = 0;
        while j < self.out.len() {
            let y = self.f.apply::<V>(get(self.out, j, T::ZERO), get(self.x, j, T::ZERO));
            put(y, self.out, j);
            j += LANES;
        }
    }
}

fn binary<T: Float, F: Binary<T> + Copy + Sync + Send>(out: &mut [T], x: &[T], f: F) {
    assert_eq!(out.len(), x.len());
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(out, x)| T::dispatch(Map { out, x, f }));
}

macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident |$alpha:ident, $a:ident, $b:ident| $body:expr;)*) => {$(
        $(#[$doc])*
        pub fn $name<T: Float>(out: &mut [T], x: &[T], alpha: T) {
            #[derive(Clone, Copy)]
            struct F<T>(T);
            impl<T: Float> Binary<T> for F<T> {
                #[inline(always)]
                fn apply<V: Vector<T>>(&self, $a: V, $b: V) -> V {
                    let $alpha = V::splat(self.0);
                    $body
                }
            }
            binary(out, x, F(alpha));
        }
    )*};
}

operations! {
    /// `out ← out + alpha · x`.
    add_scaled |alpha, a, b| b.mul_add(alpha, a);
    /// `out ← alpha · x`.
    scale |alpha, _a, b| b * alpha;
    /// `out ← out ⊙ (alpha · x)`.
    multiply |alpha, a, b| a * (b * alpha);
    /// `out ← max(alpha · x, 0)`.
    relu |alpha, _a, b| (alpha * b).max(V::splat(T::ZERO));
    /// `out ← max(out + alpha · x, 0)`.
    add_relu |alpha, a, b| b.mul_add(alpha, a).max(V::splat(T::ZERO));
    /// `out ← alpha · out` where `x > 0`, else 0: the gradient of a ReLU whose output (or input) is `x`.
    relu_backward |alpha, a, b| V::splat(T::ZERO).less(b, alpha * a, V::splat(T::ZERO));
    /// `out ← alpha · GELU(x)`.
    gelu |alpha, _a, b| alpha * b.gelu();
    /// `out ← alpha · out ⊙ GELU′(x)`.
    gelu_backward |alpha, a, b| alpha * a * b.gelu_with_grad().1;
    /// `out ← alpha · ½x(1 + tanh(√(2/π)(x + 0.044715x³)))`: the tanh form of GELU.
    gelu_tanh |alpha, _a, b| alpha * (half(b) * (V::splat(T::ONE) + gelu_tanh_argument(b).0.tanh()));
    /// `out ← alpha · out ⊙` its derivative `½(1 + t) + ½x(1 − t²)·√(2/π)(1 + 3·0.044715x²)`.
    gelu_tanh_backward |alpha, a, b| {
        let (argument, slope) = gelu_tanh_argument(b);
        let (t, one) = (argument.tanh(), V::splat(T::ONE));
        alpha * a * (half(b) * (one - t * t)).mul_add(slope, half(one + t))
    };
}

#[inline(always)]
fn half<T: Float, V: Vector<T>>(x: V) -> V {
    x * V::splat(T::from_f64(0.5))
}

/// `√(2/π)(x + 0.044715x³)` and its derivative.
#[inline(always)]
fn gelu_tanh_argument<T: Float, V: Vector<T>>(x: V) -> (V, V) {
    let (c, one) = (|c: f64| V::splat(T::from_f64(c)), V::splat(T::ONE));
    let (square, root) = (x * x, c(0.797_884_560_802_865_4));
    (x * root * square.mul_add(c(0.044_715), one), root * square.mul_add(c(3.0 * 0.044_715), one))
}

/// `out ← out + x`.
pub fn add<T: Float>(out: &mut [T], x: &[T]) {
    add_scaled(out, x, T::ONE);
}
