//! Counts floating-point operations, so that cost models can be held to what is really computed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

static COUNTING: AtomicBool = AtomicBool::new(false);
static FLOPS: AtomicU64 = AtomicU64::new(0);

/// Adds the floating-point operations of a contraction that does not go through [`gemm`](super::gemm) or
/// [`multiply_packed`](super::Gemm::multiply_packed), which count themselves: two per multiply-add. Costs nothing unless
/// [`counted`] is at work.
#[inline]
pub fn count_flops(flops: usize) {
    if COUNTING.load(Ordering::Relaxed) {
        FLOPS.fetch_add(flops as u64, Ordering::Relaxed);
    }
}

/// How many operations have been counted so far: 0 outside [`counted`].
pub fn flops_so_far() -> u64 {
    FLOPS.load(Ordering::Relaxed)
}

/// Runs `work` and returns the floating-point operations of its contractions, on all threads. For one caller at a time: whatever
/// else the process computes meanwhile is counted too.
pub fn counted<R>(work: impl FnOnce() -> R) -> (R, u64) {
    FLOPS.store(0, Ordering::Relaxed);
    COUNTING.store(true, Ordering::Relaxed);
    let result = work();
    COUNTING.store(false, Ordering::Relaxed);
    (result, FLOPS.swap(0, Ordering::Relaxed))
}
