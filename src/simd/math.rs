//! exp, erf, tanh and GELU in f32, from our own polynomials in fused multiply-adds: the same bits on every machine.

use super::Vector;

/// The elementary functions of a [`Vector`] of f32, for the body of its implementation.
macro_rules! elementary {
    () => {
        #[inline(always)]
        fn exp(self) -> Self {
            math::exp(self)
        }
        #[inline(always)]
        fn erf(self) -> Self {
            math::erf(self)
        }
        #[inline(always)]
        fn tanh(self) -> Self {
            math::tanh(self)
        }
        #[inline(always)]
        fn gelu_with_grad(self) -> (Self, Self) {
            math::gelu_with_grad(self)
        }
        #[inline(always)]
        fn gelu(self) -> Self {
            math::gelu(self)
        }
    };
}
pub(super) use elementary;

/// `e^x`: `x = n ln 2 + r` with `|r| ≤ ½ ln 2`, a polynomial in `r`, and `2^n` in two exact steps (so subnormals round once).
#[inline(always)]
pub fn exp<V: Vector<f32>>(x: V) -> V {
    let c = V::splat;
    // Outside, the result is 0 or ∞ anyway; NaN passes through `min` and `max` as their second operand.
    let x = c(-104.0).max(c(89.0).min(x));
    let n = (x * c(std::f32::consts::LOG2_E)).round();
    let r = n.mul_add(c(-0.693_359_4), x);
    let r = n.mul_add(c(2.121_944_4e-4), r);
    let p = c(1.987_569_1e-4).mul_add(r, c(1.398_199_9e-3));
    let p = p.mul_add(r, c(8.333_452e-3));
    let p = p.mul_add(r, c(4.166_579_6e-2));
    let p = p.mul_add(r, c(1.666_666_5e-1));
    let p = p.mul_add(r, c(0.5));
    let p = p.mul_add(r * r, r) + c(1.0);
    let half = (n * c(0.5)).round();
    p * half.pow2() * (n - half).pow2()
}

#[inline(always)]
fn per_lane<V: Vector<f32>>(x: V, f: impl Fn(f64) -> f64) -> V {
    V::load(&x.to_array().map(|x| f(f64::from(x)) as f32))
}

/// The error function.
#[inline(always)]
pub fn erf<V: Vector<f32>>(x: V) -> V {
    per_lane(x, libm::erf)
}

/// The hyperbolic tangent.
#[inline(always)]
pub fn tanh<V: Vector<f32>>(x: V) -> V {
    per_lane(x, libm::tanh)
}

/// `x Φ(x)` and `Φ(x) + x φ(x)`.
#[inline(always)]
pub fn gelu_with_grad<V: Vector<f32>>(x: V) -> (V, V) {
    let c = V::splat;
    let cdf = c(0.5) + c(0.5) * erf(x * c(std::f32::consts::FRAC_1_SQRT_2));
    let density = exp(x * x * c(-0.5)) * c(0.398_942_3);
    (x * cdf, x.mul_add(density, cdf))
}

/// `x Φ(x)`.
#[inline(always)]
pub fn gelu<V: Vector<f32>>(x: V) -> V {
    gelu_with_grad(x).0
}
