//! SIMD with run-time dispatch.
//!
//! A kernel is written once, over [`Vector`]: sixteen lanes, whatever the machine. AVX-512 holds them in one register, AVX2 in
//! two, the portable back end in two `wide` vectors; every operation rounds the same way everywhere, so the same f32 bits come
//! out of each. [`Float::dispatch`](crate::tensor::Float::dispatch) compiles the kernel for each instruction set and picks one
//! at run time.
//!
//! `KARAT_SIMD=portable|avx2|avx512` forces a back end.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod double;
mod math;
pub mod peak;
mod portable;

use std::ops::{Add, Div, Mul, Neg, Sub};
use std::sync::atomic::{AtomicU8, Ordering};

use crate::error::{Error, Result};
use crate::linalg::TileShape;

pub(crate) use double::with_tanh_gelu;

/// Lanes of every vector, on every machine.
pub const LANES: usize = 16;

/// Sixteen lanes of `T`. All operations are lane-wise and IEEE; `max`, `min` and [`less`](Vector::less) treat NaN as x86 does.
pub trait Vector<T: Copy>:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self> + Neg<Output = Self>
{
    /// The register tile of matrix products: as many accumulators as there are registers for.
    const TILE: TileShape;
    /// All lanes `x`.
    fn splat(x: T) -> Self;
    /// The first sixteen elements of `s`, which must have as many.
    fn load(s: &[T]) -> Self;
    /// The elements of `s` (at most sixteen), the other lanes `fill`.
    fn load_partial(s: &[T], fill: T) -> Self;
    /// Sixteen elements from `p`.
    ///
    /// # Safety
    /// `p` must be valid for reading sixteen elements.
    unsafe fn load_ptr(p: *const T) -> Self;
    /// Writes the first sixteen elements of `s`, which must have as many.
    fn store(self, s: &mut [T]);
    /// Writes as many lanes as `s` has elements (at most sixteen).
    fn store_partial(self, s: &mut [T]);
    /// The lanes as an array.
    fn to_array(self) -> [T; LANES];
    /// `self · b + c`, rounded once.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// `self > other ? self : other`.
    fn max(self, other: Self) -> Self;
    /// `self < other ? self : other`.
    fn min(self, other: Self) -> Self;
    /// The square root, correctly rounded.
    fn sqrt(self) -> Self;
    /// The absolute value.
    fn abs(self) -> Self;
    /// The nearest integer, ties to even.
    fn round(self) -> Self;
    /// `2^self` for integral lanes between −126 and 127.
    fn pow2(self) -> Self;
    /// `self · 2^n`, rounded once, for integral `n` between −200 and 200 and lanes of magnitude 2⁻²⁴ to 2²⁴ (or NaN).
    fn ldexp(self, n: Self) -> Self;
    /// The magnitude of `self` with the sign of `sign`.
    fn copysign(self, sign: Self) -> Self;
    /// `self < other ? yes : no`, per lane; NaN compares false.
    fn less(self, other: Self, yes: Self, no: Self) -> Self;
    /// `e^self`.
    fn exp(self) -> Self;
    /// The error function.
    fn erf(self) -> Self;
    /// The hyperbolic tangent.
    fn tanh(self) -> Self;
    /// `x Φ(x)` and its derivative `Φ(x) + x φ(x)`.
    fn gelu_with_grad(self) -> (Self, Self);
    /// `x Φ(x)`.
    fn gelu(self) -> Self;

    /// Transposes a block of sixteen rows and columns: `to[p · to_row + j] = from[j · from_row + p]`.
    ///
    /// # Safety
    /// Both blocks must be valid for reading and writing, and must not overlap.
    #[inline(always)]
    unsafe fn transpose(from: *const T, from_row: usize, to: *mut T, to_row: usize) {
        for (j, p) in (0..LANES).flat_map(|j| (0..LANES).map(move |p| (j, p))) {
            // SAFETY: inside the blocks.
            unsafe { *to.add(p * to_row + j) = *from.add(j * from_row + p) };
        }
    }

    /// The sum of the lanes by one fixed tree: halves folded onto each other, 8, 4, 2, 1.
    #[inline(always)]
    fn sum(self) -> T
    where
        T: Add<Output = T>,
    {
        let a = self.to_array();
        let b: [T; 8] = std::array::from_fn(|i| a[i] + a[i + 8]);
        let c: [T; 4] = std::array::from_fn(|i| b[i] + b[i + 4]);
        (c[0] + c[2]) + (c[1] + c[3])
    }

    /// The largest lane (no lane may be NaN).
    #[inline(always)]
    fn largest(self) -> T
    where
        T: PartialOrd,
    {
        let a = self.to_array();
        let larger = |x: T, y: T| if x > y { x } else { y };
        let b: [T; 8] = std::array::from_fn(|i| larger(a[i], a[i + 8]));
        let c: [T; 4] = std::array::from_fn(|i| larger(b[i], b[i + 4]));
        larger(larger(c[0], c[2]), larger(c[1], c[3]))
    }
}

/// `acc[p] ← s[p · step ..] · b + acc[p]`, rounded once. `s` must hold all the vectors.
#[inline(always)]
pub fn fused_strided<T: Copy, V: Vector<T>, const P: usize>(acc: &mut [V; P], s: &[T], step: usize, b: V) {
    assert!(P == 0 || (P - 1).checked_mul(step).and_then(|last| last.checked_add(LANES)).is_some_and(|end| end <= s.len()));
    for (p, acc) in acc.iter_mut().enumerate() {
        // SAFETY: the last vector ends inside `s`, as asserted, and the others end before it.
        *acc = unsafe { V::load_ptr(s.as_ptr().add(p * step)) }.mul_add(b, *acc);
    }
}

/// A computation over any [`Vector`] of `T`; implementations of `run` must be `#[inline(always)]`.
pub trait Kernel<T: Copy> {
    /// What the computation returns.
    type Output;
    /// The computation.
    fn run<V: Vector<T>>(self) -> Self::Output;
}

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Isa {
    /// `wide` vectors and scalar fused multiply-adds: any machine.
    Portable = 1,
    /// x86-64 with AVX2 and FMA.
    Avx2 = 2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512 = 3,
}

impl Isa {
    /// All of them, slowest first.
    pub const ALL: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

    /// The name that `KARAT_SIMD` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// Whether this machine has it.
    pub fn available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }
}

static ACTIVE: AtomicU8 = AtomicU8::new(0);

/// Chooses the back end: the one that `KARAT_SIMD` names, else the fastest that the machine has.
///
/// # Errors
/// `KARAT_SIMD` names no back end, or one that this machine lacks.
pub fn init() -> Result<Isa> {
    let isa = match std::env::var("KARAT_SIMD") {
        Ok(name) if !name.is_empty() => *Isa::ALL
            .iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| Error::unknown("back end in KARAT_SIMD", &name, Isa::ALL.map(Isa::name)))?,
        _ => Isa::ALL.into_iter().rev().find(|isa| isa.available()).unwrap_or(Isa::Portable),
    };
    force(isa)?;
    Ok(isa)
}

/// Makes all further kernels of the process run on `isa`. Operands that are packed for small products
/// ([`Gemm::pack`](crate::linalg::Gemm::pack)) have to be packed anew, so no other thread should compute meanwhile.
///
/// # Errors
/// This machine lacks it.
pub fn force(isa: Isa) -> Result<()> {
    if !isa.available() {
        return Err(Error::usage(format!("SIMD back end `{}`: this machine lacks it", isa.name())));
    }
    ACTIVE.store(isa as u8, Ordering::Relaxed);
    Ok(())
}

/// The back end in use. The first call chooses it as [`init`] does; a `KARAT_SIMD` that cannot be served counts as unset here,
/// so programs call [`init`] first.
#[inline]
pub fn isa() -> Isa {
    match ACTIVE.load(Ordering::Relaxed) {
        1 => Isa::Portable,
        2 => Isa::Avx2,
        3 => Isa::Avx512,
        _ => init().unwrap_or_else(|_| {
            let best = Isa::ALL.into_iter().rev().find(|isa| isa.available()).unwrap_or(Isa::Portable);
            ACTIVE.store(best as u8, Ordering::Relaxed);
            best
        }),
    }
}

/// Runs an f32 kernel on the active back end.
#[inline]
pub(crate) fn dispatch_f32<K: Kernel<f32>>(kernel: K) -> K::Output {
    // SAFETY: `isa` only ever returns a back end that the machine has.
    unsafe { dispatch_f32_on(isa(), kernel) }
}

/// Runs an f32 kernel on `isa`: for work in several steps that must not change back ends in between.
///
/// # Safety
/// This machine must have `isa`, as it has whatever [`isa`] returned.
#[inline]
pub(crate) unsafe fn dispatch_f32_on<K: Kernel<f32>>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        // SAFETY: the caller's promise.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::run(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::run(kernel) },
        _ => kernel.run::<portable::F32x16>(),
    }
}

/// Runs an f64 kernel, compiled for AVX2 where the active back end has it.
#[inline]
pub(crate) fn dispatch_f64<K: Kernel<f64>>(kernel: K) -> K::Output {
    match isa() {
        // The oracle needs no third copy of every kernel: machines with AVX-512 have AVX2.
        // SAFETY: `isa` only ever returns a back end that the machine has.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 => unsafe { avx2::run_f64(kernel) },
        _ => kernel.run::<double::F64x16>(),
    }
}

/// Asks the memory system to bring the cache line at `p` into L1. Never faults.
#[inline(always)]
pub(crate) fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetching any address is harmless.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast())
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
