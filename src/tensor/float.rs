//! The two precisions: `f32`, the product, and `f64`, the oracle.

use std::fmt::{Debug, Display};
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

use crate::linalg::Gemm;
use crate::simd::Kernel;

/// A floating-point type that karat computes in.
///
/// All else is generic over this trait; `tensor`, `simd`, `linalg` and `kernel` alone know which type it is.
pub trait Float:
    Copy
    + Send
    + Sync
    + Default
    + PartialOrd
    + Debug
    + Display
    + 'static
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + Gemm
{
    /// `"f32"` or `"f64"`.
    const NAME: &'static str;
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// −∞.
    const NEG_INFINITY: Self;
    /// Where `e^x` is nothing beside 1: `ln 2⁻¹⁰⁰` in f32, far above the subnormal numbers.
    const NOTHING: Self;

    /// Rounds to this precision.
    fn from_f64(x: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// `self · b + c`, rounded once.
    fn fused(self, b: Self, c: Self) -> Self;
    /// The square root, correctly rounded.
    fn root(self) -> Self;
    /// Runs `kernel` on the widest instruction set that this machine has (see [`crate::simd`]).
    fn dispatch<K: Kernel<Self>>(kernel: K) -> K::Output;

    /// An integer as a float.
    fn of(n: usize) -> Self {
        Self::from_f64(n as f64)
    }
    /// The larger of two numbers.
    fn larger(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
}

macro_rules! float {
    ($t:ident, $name:literal, $nothing:literal, $dispatch:path) => {
        impl Float for $t {
            const NAME: &'static str = $name;
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = $t::NEG_INFINITY;
            const NOTHING: Self = $nothing;

            fn from_f64(x: f64) -> Self {
                x as $t
            }
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn fused(self, b: Self, c: Self) -> Self {
                self.mul_add(b, c)
            }
            #[inline(always)]
            fn root(self) -> Self {
                self.sqrt()
            }
            #[inline]
            fn dispatch<K: Kernel<Self>>(kernel: K) -> K::Output {
                $dispatch(kernel)
            }
        }
    };
}

float!(f32, "f32", -69.314_72, crate::simd::dispatch_f32);
float!(f64, "f64", -700.0, crate::simd::dispatch_f64);

/// IEEE binary16, widened exactly.
pub fn f16_to_f64(bits: u16) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    let magnitude = match exponent {
        0 => libm::ldexp(fraction, -24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => libm::ldexp(1024.0 + fraction, exponent - 25),
    };
    if bits >> 15 == 1 { -magnitude } else { magnitude }
}
