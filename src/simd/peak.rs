//! The two limits of the machine at hand, measured: fused multiply-adds per second, bytes per second.

use std::time::Instant;

use super::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

struct Chains {
    rounds: usize,
}

impl Kernel<f32> for Chains {
    type Output = f32;

    #[inline(always)]
    fn run<V: Vector<f32>>(self) -> f32 {
        // Enough independent chains to hide the latency, few enough for the registers: a vector is one of 32 registers, or two
        // of 16.
        if V::TILE.vectors == 2 { self.chains::<V, 12>() } else { self.chains::<V, 6>() }
    }
}

impl Chains {
    /// Runs `12 · rounds` steps in all, on `CHAINS` chains.
    #[inline(always)]
    fn chains<V: Vector<f32>, const CHAINS: usize>(self) -> f32 {
        let (a, b) = (V::splat(std::hint::black_box(0.999)), V::splat(std::hint::black_box(1e-3)));
        let mut acc: [V; CHAINS] = std::array::from_fn(|i| V::splat(i as f32));
        for _ in 0..self.rounds * 12 / CHAINS {
            for x in &mut acc {
                *x = x.mul_add(a, b);
            }
        }
        acc.into_iter().fold(V::splat(0.0), |s, x| s + x).sum()
    }
}

/// f32 FMA peak of one core on the active back end, in flops per second: the best of several short runs without memory traffic.
pub fn fma_flops() -> f64 {
    let rounds = 200_000;
    (0..8).fold(0.0, |best: f64, _| {
        let start = Instant::now();
        std::hint::black_box(f32::dispatch(Chains { rounds }));
        let flops = (rounds * 12 * LANES * 2) as f64;
        best.max(flops / start.elapsed().as_secs_f64())
    })
}

/// Memory bandwidth of one core in bytes per second: `a ← a + b` over arrays far larger than any cache, counting two reads
/// and one write.
pub fn bandwidth() -> f64 {
    let n = 32 << 20;
    let (mut a, b) = (Buffer::<f32>::zeros(n), Buffer::<f32>::zeros(n));
    (0..4).fold(0.0, |best: f64, _| {
        let start = Instant::now();
        for (x, y) in a.iter_mut().zip(b.iter()) {
            *x += *y;
        }
        std::hint::black_box(&mut a);
        best.max((3 * n * 4) as f64 / start.elapsed().as_secs_f64())
    })
}
