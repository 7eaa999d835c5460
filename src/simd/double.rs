//! f64 for the oracle: plain lanes, which the compiler vectorises, and `libm` for the elementary functions.

use std::ops::{Add, Div, Mul, Neg, Sub};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::linalg::TileShape;

use super::{LANES, Vector};

static TANH_GELU: AtomicBool = AtomicBool::new(false);

/// Runs `work` with GELU in f64 by its tanh approximation, on all threads of the process: the audit of golden cases asks whether they
/// tell the two apart. For one caller at a time.
pub(crate) fn with_tanh_gelu<R>(work: impl FnOnce() -> R) -> R {
    TANH_GELU.store(true, Ordering::Relaxed);
    let result = work();
    TANH_GELU.store(false, Ordering::Relaxed);
    result
}

/// `x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))` and its derivative.
fn tanh_gelu_with_grad(x: f64) -> (f64, f64) {
    let root = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
    let t = libm::tanh(root * (x + 0.044715 * x * x * x));
    (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * root * (1.0 + 3.0 * 0.044715 * x * x))
}

/// Sixteen f64 lanes.
#[derive(Clone, Copy)]
pub struct F64x16([f64; LANES]);

macro_rules! binary {
    ($($op:ident $method:ident $sign:tt),*) => {$(
        impl $op for F64x16 {
            type Output = Self;
            #[inline(always)]
            fn $method(self, b: Self) -> Self {
                F64x16(std::array::from_fn(|i| self.0[i] $sign b.0[i]))
            }
        }
    )*};
}
binary!(Add add +, Sub sub -, Mul mul *, Div div /);

impl Neg for F64x16 {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        F64x16(self.0.map(|x| -x))
    }
}

impl Vector<f64> for F64x16 {
    const TILE: TileShape = TileShape { rows: 4, vectors: 1 };

    #[inline(always)]
    fn splat(x: f64) -> Self {
        F64x16([x; LANES])
    }
    #[inline(always)]
    fn load(s: &[f64]) -> Self {
        F64x16(std::array::from_fn(|i| s[i]))
    }
    #[inline(always)]
    fn load_partial(s: &[f64], fill: f64) -> Self {
        let mut lanes = [fill; LANES];
        lanes[..s.len()].copy_from_slice(s);
        F64x16(lanes)
    }
    #[inline(always)]
    unsafe fn load_ptr(p: *const f64) -> Self {
        // SAFETY: the caller's promise.
        Self::load(unsafe { std::slice::from_raw_parts(p, LANES) })
    }
    #[inline(always)]
    fn store(self, s: &mut [f64]) {
        s[..LANES].copy_from_slice(&self.0);
    }
    #[inline(always)]
    fn store_partial(self, s: &mut [f64]) {
        s.copy_from_slice(&self.0[..s.len()]);
    }
    #[inline(always)]
    fn to_array(self) -> [f64; LANES] {
        self.0
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        F64x16(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        F64x16(std::array::from_fn(|i| if self.0[i] > b.0[i] { self.0[i] } else { b.0[i] }))
    }
    #[inline(always)]
    fn min(self, b: Self) -> Self {
        F64x16(std::array::from_fn(|i| if self.0[i] < b.0[i] { self.0[i] } else { b.0[i] }))
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        F64x16(self.0.map(f64::sqrt))
    }
    #[inline(always)]
    fn abs(self) -> Self {
        F64x16(self.0.map(f64::abs))
    }
    #[inline(always)]
    fn round(self) -> Self {
        F64x16(self.0.map(f64::round_ties_even))
    }
    #[inline(always)]
    fn pow2(self) -> Self {
        F64x16(self.0.map(libm::exp2))
    }
    #[inline(always)]
    fn ldexp(self, n: Self) -> Self {
        F64x16(std::array::from_fn(|i| libm::ldexp(self.0[i], n.0[i] as i32)))
    }
    #[inline(always)]
    fn copysign(self, sign: Self) -> Self {
        F64x16(std::array::from_fn(|i| self.0[i].copysign(sign.0[i])))
    }
    #[inline(always)]
    fn less(self, other: Self, yes: Self, no: Self) -> Self {
        F64x16(std::array::from_fn(|i| if self.0[i] < other.0[i] { yes.0[i] } else { no.0[i] }))
    }
    #[inline(always)]
    fn exp(self) -> Self {
        F64x16(self.0.map(libm::exp))
    }
    #[inline(always)]
    fn erf(self) -> Self {
        F64x16(self.0.map(libm::erf))
    }
    #[inline(always)]
    fn tanh(self) -> Self {
        F64x16(self.0.map(libm::tanh))
    }
    #[inline(always)]
    fn gelu_with_grad(self) -> (Self, Self) {
        let tanh = TANH_GELU.load(Ordering::Relaxed);
        let both = self.0.map(|x| {
            if tanh {
                return tanh_gelu_with_grad(x);
            }
            let cdf = 0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2);
            let density = libm::exp(-0.5 * x * x) * (0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2);
            // Infinite x: the limits are 0 and 1 on the left, ∞ and 1 on the right.
            if x == f64::NEG_INFINITY { (-0.0, 0.0) } else { (x * cdf, if x.is_infinite() { 1.0 } else { cdf + x * density }) }
        });
        (F64x16(both.map(|b| b.0)), F64x16(both.map(|b| b.1)))
    }
    #[inline(always)]
    fn gelu(self) -> Self {
        self.gelu_with_grad().0
    }
}
