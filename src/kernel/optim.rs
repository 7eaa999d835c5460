//! Optimizer steps over the flat parameter store.

use rayon::prelude::*;

use super::{get, put};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::Float;

/// One step of AdamW (Loshchilov & Hutter, 1711.05101), decoupled weight decay:
///
/// `m ← β₁ m + (1−β₁) g`, `v ← β₂ v + (1−β₂) g²`, `θ ← θ − lr (m̂ / (√v̂ + ε) + λ θ)`, `m̂ = m/(1−β₁ᵗ)`, `v̂ = v/(1−β₂ᵗ)`.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// β₁ and β₂.
    pub betas: (f64, f64),
    /// ε, outside the root.
    pub eps: f64,
    /// λ.
    pub weight_decay: f64,
    /// t, counted from 1.
    pub step: u64,
    /// The gradient is multiplied by this first (clipping).
    pub grad_scale: f64,
}

struct Step<'a, T> {
    theta: &'a mut [T],
    m: &'a mut [T],
    v: &'a mut [T],
    g: &'a [T],
    adamw: AdamW,
}

impl<T: Float> Kernel<T> for Step<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let c = |x: f64| V::splat(T::from_f64(x));
        let AdamW { lr, betas: (b1, b2), eps, weight_decay, step, grad_scale } = self.adamw;
        let power = |b: f64| libm::pow(b, step as f64);
        let (rate, root) = (c(lr / (1.0 - power(b1))), c(libm::sqrt(1.0 - power(b2))));
        let (beta1, beta2, rest1, rest2) = (c(b1), c(b2), c(1.0 - b1), c(1.0 - b2));
        let (eps, keep, scale) = (c(eps), c(1.0 - lr * weight_decay), c(grad_scale));
        let mut j = 0;
        while j < self.theta.len() {
            let g = get::<T, V>(self.g, j, T::ZERO) * scale;
            let m = get::<T, V>(self.m, j, T::ZERO).mul_add(beta1, g * rest1);
            let v = get::<T, V>(self.v, j, T::ZERO).mul_add(beta2, g * g * rest2);
            let theta = get::<T, V>(self.theta, j, T::ZERO) * keep - rate * m / (v.sqrt() / root + eps);
            put(m, self.m, j);
            put(v, self.v, j);
            put(theta, self.theta, j);
            j += LANES;
        }
    }
}

impl AdamW {
    /// Updates parameters `theta` and moments `m`, `v` with gradient `g`.
    pub fn step<T: Float>(self, theta: &mut [T], m: &mut [T], v: &mut [T], g: &[T]) {
        const CHUNK: usize = 16_384;
        assert!(theta.len() == g.len() && m.len() == g.len() && v.len() == g.len());
        theta
            .par_chunks_mut(CHUNK)
            .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
            .zip(g.par_chunks(CHUNK))
            .for_each(|((theta, (m, v)), g)| T::dispatch(Step { theta, m, v, g, adamw: self }));
    }
}
