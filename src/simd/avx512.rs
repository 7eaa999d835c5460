//! AVX-512: sixteen lanes in one register.

use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Neg, Sub};

use crate::linalg::TileShape;

use super::{Kernel, LANES, Vector, math};

/// Sixteen f32 lanes. Only ever made inside [`run`], that is, on a machine with AVX-512.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct F32x16(__m512);

/// Runs `kernel` with AVX-512 code.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub fn run<K: Kernel<f32>>(kernel: K) -> K::Output {
    kernel.run::<F32x16>()
}

macro_rules! binary {
    ($($op:ident $method:ident $intrinsic:ident),*) => {$(
        impl $op for F32x16 {
            type Output = Self;
            #[inline(always)]
            fn $method(self, b: Self) -> Self {
                // SAFETY: a vector of this type exists only where AVX-512 does.
                F32x16(unsafe { $intrinsic(self.0, b.0) })
            }
        }
    )*};
}
binary!(Add add _mm512_add_ps, Sub sub _mm512_sub_ps, Mul mul _mm512_mul_ps, Div div _mm512_div_ps);

impl Neg for F32x16 {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        // SAFETY: a vector of this type exists only where AVX-512 does.
        F32x16(unsafe { _mm512_xor_ps(self.0, _mm512_set1_ps(-0.0)) })
    }
}

fn lane_mask(n: usize) -> __mmask16 {
    assert!(n <= LANES);
    ((1u32 << n) - 1) as __mmask16
}

// SAFETY of every block below: a vector of this type is only made inside `run`, where AVX-512 exists; memory is touched only
// within the slices given, whose lengths are checked.
impl Vector<f32> for F32x16 {
    const TILE: TileShape = TileShape { rows: 14, vectors: 2 };

    #[inline(always)]
    unsafe fn transpose(from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
        // SAFETY: the caller's promise; a vector of this type exists only where AVX2 does.
        unsafe { super::avx2::transpose(from, from_row, to, to_row) }
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see above.
        F32x16(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    fn load(s: &[f32]) -> Self {
        assert!(s.len() >= LANES);
        // SAFETY: see above.
        unsafe { Self::load_ptr(s.as_ptr()) }
    }
    #[inline(always)]
    fn load_partial(s: &[f32], fill: f32) -> Self {
        // SAFETY: see above; masked-out lanes are not read.
        F32x16(unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), lane_mask(s.len()), s.as_ptr()) })
    }
    #[inline(always)]
    unsafe fn load_ptr(p: *const f32) -> Self {
        // SAFETY: the caller's promise.
        F32x16(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    fn store(self, s: &mut [f32]) {
        assert!(s.len() >= LANES);
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(s.as_mut_ptr(), self.0) }
    }
    #[inline(always)]
    fn store_partial(self, s: &mut [f32]) {
        // SAFETY: see above; masked-out lanes are not written.
        unsafe { _mm512_mask_storeu_ps(s.as_mut_ptr(), lane_mask(s.len()), self.0) }
    }
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        // SAFETY: both are 64 bytes of plain floats.
        unsafe { std::mem::transmute(self.0) }
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: see above.
        F32x16(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        // SAFETY: see above.
        F32x16(unsafe { _mm512_max_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn min(self, b: Self) -> Self {
        // SAFETY: see above.
        F32x16(unsafe { _mm512_min_ps(self.0, b.0) })
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        // SAFETY: see above.
        F32x16(unsafe { _mm512_sqrt_ps(self.0) })
    }
    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: see above.
        F32x16(unsafe { _mm512_abs_ps(self.0) })
    }
    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: see above.
        F32x16(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }
    #[inline(always)]
    fn pow2(self) -> Self {
        // SAFETY: see above.
        F32x16(unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        })
    }
    #[inline(always)]
    fn ldexp(self, n: Self) -> Self {
        // SAFETY: see above.
        F32x16(unsafe { _mm512_scalef_ps(self.0, n.0) })
    }
    #[inline(always)]
    fn copysign(self, sign: Self) -> Self {
        // SAFETY: see above.
        F32x16(unsafe {
            let bit = _mm512_set1_ps(-0.0);
            _mm512_or_ps(_mm512_andnot_ps(bit, self.0), _mm512_and_ps(bit, sign.0))
        })
    }
    #[inline(always)]
    fn less(self, other: Self, yes: Self, no: Self) -> Self {
        // SAFETY: see above.
        F32x16(unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0), no.0, yes.0) })
    }
    math::elementary!();
}
