//! exp, erf, tanh and GELU in f32, from our own polynomials in fused multiply-adds: the same bits on every machine.
//!
//! There are no branches: both sides of a split are computed and [`Vector::less`] picks one. Coefficients, lowest degree first,
//! are printed by `reference/fit_elementary.py`. Errors are in the docs of each function, in ULP of the exact result, over all
//! f32 (`tests/simd.rs` measures them).

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

/// `e^r ≈ 1 + r + r² P(r)` for `|r| ≤ ½ ln 2`.
const EXP: [f32; 5] = [4.9999994e-1, 1.6666521e-1, 4.1668262e-2, 8.368674e-3, 1.382103e-3];
/// `erf x ≈ x + x P(x²)` below [`ERF_SPLIT`].
const ERF_NEAR: [f32; 6] = [1.2837915e-1, -3.7612507e-1, 1.1281978e-1, -2.6773399e-2, 5.004346e-3, -6.053446e-4];
/// `erf x ≈ 1 − e^P(x)` above.
const ERF_FAR: [f32; 7] = [-1.6644482e-4, -1.1277972, -6.369761e-1, -1.04113564e-1, 2.2315092e-2, -3.0654348e-3, 1.9821027e-4];
const ERF_SPLIT: f32 = 0.9;
/// `tanh x ≈ x + x³ P(x²)` below [`TANH_SPLIT`], `1 − 2 / (e^(2x) + 1)` above.
const TANH_NEAR: [f32; 5] = [-3.3333316e-1, 1.3332546e-1, -5.3847853e-2, 2.1052502e-2, -6.246066e-3];
const TANH_SPLIT: f32 = 0.55;
/// `x Φ(x) ≈ ½x + h P(h)` with `h = −x²/2`, for `x` within [`GELU_SPLIT`].
const GELU_NEAR: [f32; 5] = [-7.978845e-1, -2.6595932e-1, -7.975486e-2, -1.8789453e-2, -3.1239397e-3];
/// `a Φ(−a) ≈ e^(−a²/2) (1/√(2π) − P(a) / R(a))` for `a` beyond: `P`, and `R`.
const GELU_FAR: [f32; 4] = [2.8928512e-1, 1.7218703e-1, 4.9712054e-2, 7.078521e-3];
const GELU_FAR_DIVISOR: [f32; 6] = [7.25e-1, 1.3411053, 1.0779102, 4.8662803e-1, 1.2452707e-1, 1.7744599e-2];
const GELU_SPLIT: f32 = 0.86;
/// 1/√(2π).
const DENSITY: f32 = 0.398_942_3;

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 in two parts; the first has sixteen bits, so its product with an integral `n` below 2⁸ is exact.
const LN_2_HIGH: f32 = 45_426.0 / 65_536.0;
const LN_2_LOW: f32 = (std::f64::consts::LN_2 - 45_426.0 / 65_536.0) as f32;

/// A polynomial, by Horner's rule.
#[inline(always)]
fn horner<V: Vector<f32>, const N: usize>(coefficients: [f32; N], x: V) -> V {
    let mut y = V::splat(coefficients[N - 1]);
    for &c in coefficients[..N - 1].iter().rev() {
        y = y.mul_add(x, V::splat(c));
    }
    y
}

/// `n` and `r` with `x = n ln 2 + r`, `n` integral and `|r| ≤ ½ ln 2`.
#[inline(always)]
fn reduce<V: Vector<f32>>(x: V) -> (V, V) {
    let n = (x * V::splat(LOG2_E)).round();
    (n, n.mul_add(V::splat(-LN_2_LOW), n.mul_add(V::splat(-LN_2_HIGH), x)))
}

/// `e^r − 1` for a reduced `r`. The 1 is left to the caller, who rounds it together with something else.
#[inline(always)]
fn expm1_reduced<V: Vector<f32>>(r: V) -> V {
    (r * r).mul_add(horner(EXP, r), r)
}

/// `e^x`, within 1.02 ULP.
#[inline(always)]
pub fn exp<V: Vector<f32>>(x: V) -> V {
    // Beyond, the result is 0 or ∞ anyway; NaN passes through `min` and `max` as their second operand.
    let x = V::splat(-104.0).max(V::splat(89.0).min(x));
    let (n, r) = reduce(x);
    (expm1_reduced(r) + V::splat(1.0)).ldexp(n)
}

/// The error function, within 1 ULP.
#[inline(always)]
pub fn erf<V: Vector<f32>>(x: V) -> V {
    // Beyond 4 the result rounds to ±1.
    let a = V::splat(4.0).min(x.abs());
    let (n, r) = reduce(horner(ERF_FAR, a));
    let power = n.pow2();
    let far = (-power).mul_add(expm1_reduced(r), V::splat(1.0) - power).copysign(x);
    let near = x.mul_add(horner(ERF_NEAR, a * a), x);
    a.less(V::splat(ERF_SPLIT), near, far)
}

/// The hyperbolic tangent, within 1.34 ULP.
#[inline(always)]
pub fn tanh<V: Vector<f32>>(x: V) -> V {
    let one = V::splat(1.0);
    // Beyond 10 the result rounds to ±1.
    let a = V::splat(10.0).min(x.abs());
    let (n, r) = reduce(a + a);
    let power = n.pow2();
    let far = one - V::splat(2.0) / power.mul_add(expm1_reduced(r), power + one);
    let square = a * a;
    let near = (a * square).mul_add(horner(TANH_NEAR, square), a);
    a.less(V::splat(TANH_SPLIT), near, far).copysign(x)
}

/// `x Φ(x)`, within 1.95 ULP, and its derivative `Φ(x) + x φ(x)`, within 1.7e-7.
///
/// Near 0, `x Φ(x) = ½x + h P(h)` with `h = −x²/2`. Beyond [`GELU_SPLIT`], with `a = |x|`, it is `max(x, 0) − a Φ(−a)`, where
/// `a Φ(−a)` is `e^h` times a factor that tends to 1/√(2π), from which a rational function is subtracted: the larger `a`, the
/// less the rounding errors of that one count.
#[inline(always)]
pub fn gelu_with_grad<V: Vector<f32>>(x: V) -> (V, V) {
    let c = V::splat;
    // Beyond, Φ(−a) and φ(a) round to 0.
    let a = c(14.5).min(x.abs());
    let square = a * a;
    let h = square * c(-0.5);
    // What rounding took from h: e^h would turn it into a relative error as large.
    let h_low = (a * c(-0.5)).mul_add(a, -h);

    // e^h = 2^n (1 + g), as in `reduce`; the first term of r is exact.
    let n = (h * c(LOG2_E)).round();
    let g = expm1_reduced(n.mul_add(c(-LN_2_HIGH), h) + n.mul_add(c(-LN_2_LOW), h_low));

    // The divisor is summed by pairs, which rounds less than Horner's rule: at a few a this keeps the result within 2 ULP.
    let pair = |i: usize| a.mul_add(c(GELU_FAR_DIVISOR[i + 1]), c(GELU_FAR_DIVISOR[i]));
    let divisor = square.mul_add(square.mul_add(pair(4), pair(2)), pair(0));
    let ratio = horner(GELU_FAR, a) / divisor;
    // (1/√(2π) − ratio) (1 + g), the largest term last.
    let tail = (c(DENSITY).mul_add(g, -ratio.mul_add(g, ratio)) + c(DENSITY)).ldexp(n);
    let far = c(0.0).max(x) - tail;

    let poly = horner(GELU_NEAR, h);
    let near = h.mul_add(poly, x * c(0.5));
    let split = c(GELU_SPLIT);
    let value = a.less(split, near, far);

    // Φ(x): the value over x, or near 0 its polynomial. The clamped x gives the limits at ±∞, not ∞/∞ and 0·∞.
    let x = c(-14.5).max(c(14.5).min(x));
    let cdf = a.less(split, (x * c(-0.5)).mul_add(poly, c(0.5)), (c(0.0).max(x) - tail) / x);
    let density = (g + c(1.0)).ldexp(n) * c(DENSITY);
    (value, x.mul_add(density, cdf))
}

/// `x Φ(x)`: [`gelu_with_grad`], of which the compiler drops what the derivative alone needs.
#[inline(always)]
pub fn gelu<V: Vector<f32>>(x: V) -> V {
    gelu_with_grad(x).0
}
