//! Matrix products of ViT shapes, beside `matrixmultiply` on one thread. Every shape also prints ratios measured by turns.
//!
//! `cargo bench --bench gemm`

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use karat::linalg::{Epilogue, Mat, MatMut, gemm, reference_gemm_f32};
use karat::simd::{isa, peak};

/// `(m, k, n)`.
const SHAPES: [(usize, usize, usize); 6] =
    [(1568, 384, 1536), (1568, 1536, 384), (6272, 96, 384), (392, 192, 576), (1576, 768, 3072), (1024, 1024, 1024)];

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    // One thread: cores and their share of caches and memory are measured by `karat bench gemm --threads T`.
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().expect("the global pool is not built yet");
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .without_plots()
        .configure_from_args();
    for (m, k, n) in SHAPES {
        let fill = |len: usize| (0..len).map(|i| ((i * 7) % 1009) as f32 / 1009.0 - 0.5).collect::<Vec<_>>();
        let (a, b) = (fill(m * k), fill(k * n));
        let (mut c, mut d) = (vec![0.0f32; m * n], vec![0.0f32; m * n]);
        let ours = |c: &mut [f32]| gemm(Mat::new(&a, m, k), Mat::new(&b, k, n), MatMut::new(c, m, n), Epilogue::default());
        let theirs = |d: &mut [f32]| reference_gemm_f32(Mat::new(&a, m, k), Mat::new(&b, k, n), MatMut::new(d, m, n));

        let flops = 2 * (m * k * n) as u64;
        let shape = format!("{m}x{k}x{n}");
        let mut group = criterion.benchmark_group("gemm");
        group.throughput(Throughput::Elements(flops));
        group.bench_function(BenchmarkId::new("karat", &shape), |bench| bench.iter(|| ours(&mut c)));
        group.bench_function(BenchmarkId::new("matrixmultiply", &shape), |bench| bench.iter(|| theirs(&mut d)));
        group.finish();

        let (mut best, mut ratios) = (f64::INFINITY, Vec::new());
        for _ in 0..9 {
            let own = seconds(|| ours(&mut c));
            ratios.push(seconds(|| theirs(&mut d)) / own);
            best = best.min(own);
        }
        let fraction = flops as f64 / best / peak::fma_flops();
        println!("{shape} on {}: {fraction:.3} of the FMA peak, {:.3} times matrixmultiply", isa().name(), median(ratios));
    }
}
