//! The portable back end: `wide` vectors where they round as IEEE says, plain lanes elsewhere.
//!
//! `wide` chooses its lanes at compile time and its multiply-add rounds twice without compile-time FMA, so the fused
//! multiply-add is the scalar one: slow, and right.

use std::ops::{Add, Div, Mul, Neg, Sub};

use wide::f32x8;

use crate::linalg::TileShape;

use super::{LANES, Vector, math};

/// Sixteen f32 lanes.
#[derive(Clone, Copy)]
pub struct F32x16(f32x8, f32x8);

macro_rules! binary {
    ($($op:ident $method:ident $sign:tt),*) => {$(
        impl $op for F32x16 {
            type Output = Self;
            #[inline(always)]
            fn $method(self, b: Self) -> Self {
                F32x16(self.0 $sign b.0, self.1 $sign b.1)
            }
        }
    )*};
}
binary!(Add add +, Sub sub -, Mul mul *, Div div /);

impl Neg for F32x16 {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        self.map(|x| -x)
    }
}

impl F32x16 {
    #[inline(always)]
    fn from_array(a: [f32; LANES]) -> Self {
        let (low, high) = a.split_at(8);
        F32x16(f32x8::new(low.try_into().unwrap_or_default()), f32x8::new(high.try_into().unwrap_or_default()))
    }
    #[inline(always)]
    fn map(self, f: impl Fn(f32) -> f32) -> Self {
        Self::from_array(self.to_array().map(f))
    }
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let (a, b) = (self.to_array(), b.to_array());
        Self::from_array(std::array::from_fn(|i| f(a[i], b[i])))
    }
}

impl Vector<f32> for F32x16 {
    const TILE: TileShape = TileShape { rows: 4, vectors: 1 };

    #[inline(always)]
    fn splat(x: f32) -> Self {
        F32x16(f32x8::splat(x), f32x8::splat(x))
    }
    #[inline(always)]
    fn load(s: &[f32]) -> Self {
        Self::from_array(std::array::from_fn(|i| s[i]))
    }
    #[inline(always)]
    fn load_partial(s: &[f32], fill: f32) -> Self {
        let mut lanes = [fill; LANES];
        lanes[..s.len()].copy_from_slice(s);
        Self::from_array(lanes)
    }
    #[inline(always)]
    unsafe fn load_ptr(p: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Self::load(unsafe { std::slice::from_raw_parts(p, LANES) })
    }
    #[inline(always)]
    fn store(self, s: &mut [f32]) {
        s[..LANES].copy_from_slice(&self.to_array());
    }
    #[inline(always)]
    fn store_partial(self, s: &mut [f32]) {
        s.copy_from_slice(&self.to_array()[..s.len()]);
    }
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        let (low, high) = (self.0.to_array(), self.1.to_array());
        std::array::from_fn(|i| if i < 8 { low[i] } else { high[i - 8] })
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        let (a, b, c) = (self.to_array(), b.to_array(), c.to_array());
        Self::from_array(std::array::from_fn(|i| a[i].mul_add(b[i], c[i])))
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        self.zip(b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    fn min(self, b: Self) -> Self {
        self.zip(b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        F32x16(self.0.sqrt(), self.1.sqrt())
    }
    #[inline(always)]
    fn abs(self) -> Self {
        self.map(f32::abs)
    }
    #[inline(always)]
    fn round(self) -> Self {
        self.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn pow2(self) -> Self {
        self.map(|k| f32::from_bits(((k as i32).wrapping_add(127) as u32) << 23))
    }
    #[inline(always)]
    fn ldexp(self, n: Self) -> Self {
        // Two steps, because 2^n need not be a normal number; the first is exact.
        self.zip(n, |x, n| {
            let power = |k: i32| f32::from_bits((k.wrapping_add(127) as u32) << 23);
            let (n, first) = (n as i32, n as i32 >> 1);
            x * power(first) * power(n - first)
        })
    }
    #[inline(always)]
    fn copysign(self, sign: Self) -> Self {
        self.zip(sign, f32::copysign)
    }
    #[inline(always)]
    fn less(self, other: Self, yes: Self, no: Self) -> Self {
        let (a, b, yes, no) = (self.to_array(), other.to_array(), yes.to_array(), no.to_array());
        Self::from_array(std::array::from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] }))
    }
    math::elementary!();
}
