//! AVX2 + FMA: sixteen lanes in two registers.

use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Neg, Sub};

use crate::linalg::TileShape;

use super::{Kernel, LANES, Vector, double, math};

/// Sixteen f32 lanes. Only ever made inside [`run`], that is, on a machine with AVX2 and FMA.
#[derive(Clone, Copy)]
pub struct F32x16(__m256, __m256);

/// Runs `kernel` with AVX2 code.
#[target_feature(enable = "avx2,fma")]
pub fn run<K: Kernel<f32>>(kernel: K) -> K::Output {
    kernel.run::<F32x16>()
}

/// Runs an f64 kernel compiled with AVX2 code.
#[target_feature(enable = "avx2,fma")]
pub fn run_f64<K: Kernel<f64>>(kernel: K) -> K::Output {
    kernel.run::<double::F64x16>()
}

/// Transposes 8 × 8 floats.
///
/// # Safety
/// The machine must have AVX2, and both blocks must be valid.
#[inline(always)]
unsafe fn transpose_8(from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let [a, b, c, d, e, f, g, h]: [__m256; 8] = std::array::from_fn(|j| _mm256_loadu_ps(from.add(j * from_row)));
        let pairs = [
            [_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d), _mm256_unpacklo_ps(e, f), _mm256_unpacklo_ps(g, h)],
            [_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d), _mm256_unpackhi_ps(e, f), _mm256_unpackhi_ps(g, h)],
        ];
        for (i, [ab, cd, ef, gh]) in pairs.into_iter().enumerate() {
            let fours = [
                [_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0x44>(ef, gh)],
                [_mm256_shuffle_ps::<0xee>(ab, cd), _mm256_shuffle_ps::<0xee>(ef, gh)],
            ];
            for (k, [abcd, efgh]) in fours.into_iter().enumerate() {
                let column = 2 * i + k;
                _mm256_storeu_ps(to.add(column * to_row), _mm256_permute2f128_ps::<0x20>(abcd, efgh));
                _mm256_storeu_ps(to.add((column + 4) * to_row), _mm256_permute2f128_ps::<0x31>(abcd, efgh));
            }
        }
    }
}

/// [`Vector::transpose`] where there is AVX2.
///
/// # Safety
/// As [`Vector::transpose`], and the machine must have AVX2.
#[inline(always)]
pub(super) unsafe fn transpose(from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
    for (i, j) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
        // SAFETY: the caller's promise; the quarters lie inside the blocks.
        unsafe { transpose_8(from.add(i * from_row + j), from_row, to.add(j * to_row + i), to_row) };
    }
}

macro_rules! binary {
    ($($op:ident $method:ident $intrinsic:ident),*) => {$(
        impl $op for F32x16 {
            type Output = Self;
            #[inline(always)]
            fn $method(self, b: Self) -> Self {
                // SAFETY: a vector of this type exists only where AVX2 does.
                unsafe { F32x16($intrinsic(self.0, b.0), $intrinsic(self.1, b.1)) }
            }
        }
    )*};
}
binary!(Add add _mm256_add_ps, Sub sub _mm256_sub_ps, Mul mul _mm256_mul_ps, Div div _mm256_div_ps);

impl Neg for F32x16 {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        // SAFETY: a vector of this type exists only where AVX2 does.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            F32x16(_mm256_xor_ps(self.0, sign), _mm256_xor_ps(self.1, sign))
        }
    }
}

// Functions and not closures, which a kernel compiled for AVX2 need not inline.

/// `2^n` for `n` between −126 and 127.
///
/// # Safety
/// The machine must have AVX2.
#[inline(always)]
unsafe fn power(n: __m256i) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127)))) }
}

/// `x 2^n` in two steps, because 2^n need not be a normal number; the first is exact.
///
/// # Safety
/// The machine must have AVX2.
#[inline(always)]
unsafe fn ldexp(x: __m256, n: __m256) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let n = _mm256_cvtps_epi32(n);
        let half = _mm256_srai_epi32::<1>(n);
        _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(n, half)))
    }
}

// SAFETY of every block below: a vector of this type is only made inside `run`, where AVX2 exists; memory is touched only
// within the slices given, whose lengths are checked.
impl Vector<f32> for F32x16 {
    const TILE: TileShape = TileShape { rows: 6, vectors: 1 };

    #[inline(always)]
    unsafe fn transpose(from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
        // SAFETY: the caller's promise; a vector of this type exists only where AVX2 does.
        unsafe { transpose(from, from_row, to, to_row) }
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see above.
        let v = unsafe { _mm256_set1_ps(x) };
        F32x16(v, v)
    }
    #[inline(always)]
    fn load(s: &[f32]) -> Self {
        assert!(s.len() >= LANES);
        // SAFETY: see above.
        unsafe { Self::load_ptr(s.as_ptr()) }
    }
    #[inline(always)]
    fn load_partial(s: &[f32], fill: f32) -> Self {
        let mut lanes = [fill; LANES];
        lanes[..s.len()].copy_from_slice(s);
        Self::load(&lanes)
    }
    #[inline(always)]
    unsafe fn load_ptr(p: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { F32x16(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    fn store(self, s: &mut [f32]) {
        assert!(s.len() >= LANES);
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(s.as_mut_ptr(), self.0);
            _mm256_storeu_ps(s.as_mut_ptr().add(8), self.1);
        }
    }
    #[inline(always)]
    fn store_partial(self, s: &mut [f32]) {
        s.copy_from_slice(&self.to_array()[..s.len()]);
    }
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        // SAFETY: both are 64 bytes of plain floats.
        unsafe { std::mem::transmute([self.0, self.1]) }
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: see above.
        unsafe { F32x16(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        // SAFETY: see above.
        unsafe { F32x16(_mm256_max_ps(self.0, b.0), _mm256_max_ps(self.1, b.1)) }
    }
    #[inline(always)]
    fn min(self, b: Self) -> Self {
        // SAFETY: see above.
        unsafe { F32x16(_mm256_min_ps(self.0, b.0), _mm256_min_ps(self.1, b.1)) }
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        // SAFETY: see above.
        unsafe { F32x16(_mm256_sqrt_ps(self.0), _mm256_sqrt_ps(self.1)) }
    }
    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            F32x16(_mm256_andnot_ps(sign, self.0), _mm256_andnot_ps(sign, self.1))
        }
    }
    #[inline(always)]
    fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: see above.
        unsafe { F32x16(_mm256_round_ps::<NEAREST>(self.0), _mm256_round_ps::<NEAREST>(self.1)) }
    }
    #[inline(always)]
    fn pow2(self) -> Self {
        // SAFETY: see above.
        unsafe { F32x16(power(_mm256_cvtps_epi32(self.0)), power(_mm256_cvtps_epi32(self.1))) }
    }
    #[inline(always)]
    fn ldexp(self, n: Self) -> Self {
        // SAFETY: see above.
        unsafe { F32x16(ldexp(self.0, n.0), ldexp(self.1, n.1)) }
    }
    #[inline(always)]
    fn copysign(self, sign: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            let bit = _mm256_set1_ps(-0.0);
            F32x16(
                _mm256_or_ps(_mm256_andnot_ps(bit, self.0), _mm256_and_ps(bit, sign.0)),
                _mm256_or_ps(_mm256_andnot_ps(bit, self.1), _mm256_and_ps(bit, sign.1)),
            )
        }
    }
    #[inline(always)]
    fn less(self, other: Self, yes: Self, no: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            F32x16(
                _mm256_blendv_ps(no.0, yes.0, _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, other.0)),
                _mm256_blendv_ps(no.1, yes.1, _mm256_cmp_ps::<_CMP_LT_OQ>(self.1, other.1)),
            )
        }
    }
    math::elementary!();
}
