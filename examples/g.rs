use karat::linalg::*;
use std::time::Instant;
fn main() {
    let t: usize = std::env::args().nth(1).map(|s| s.parse().unwrap()).unwrap_or(1);
    rayon::ThreadPoolBuilder::new().num_threads(t).build_global().unwrap();
    let peak = karat::simd::peak::fma_flops() * t as f64;
    println!("peak {:.1} bw {:.1}", peak / 1e9, karat::simd::peak::bandwidth() / 1e9);
    for (m, k, n) in
        [(1568, 384, 1536), (1568, 1536, 384), (6272, 96, 384), (392, 192, 576), (1576, 768, 3072), (1024, 1024, 1024), (49, 768, 768)]
    {
        let a: Vec<f32> = (0..m * k).map(|i| (i % 17) as f32 - 8.0).collect();
        let b: Vec<f32> = (0..k * n).map(|i| (i % 13) as f32 - 6.0).collect();
        let mut c = vec![0f32; m * n];
        let mut d = vec![0f32; m * n];
        let fl = (2 * m * k * n) as f64;
        let mut best = [1e9f64; 4];
        let reps = ((2e9 / fl) as usize).clamp(3, 200);
        for _ in 0..reps {
            let s = Instant::now();
            gemm(Mat::new(&a, m, k), Mat::new(&b, k, n), MatMut::new(&mut c, m, n), Epilogue::default());
            best[0] = best[0].min(s.elapsed().as_secs_f64());
            let s = Instant::now();
            gemm(Mat::new(&a, m, k), Mat::new(&b, n, k).t(), MatMut::new(&mut c, m, n), Epilogue::default());
            best[2] = best[2].min(s.elapsed().as_secs_f64());
            let s = Instant::now();
            gemm(Mat::new(&a, k, m).t(), Mat::new(&b, k, n), MatMut::new(&mut c, m, n), Epilogue::default());
            best[3] = best[3].min(s.elapsed().as_secs_f64());
            if t == 1 {
                let s = Instant::now();
                reference_gemm_f32(Mat::new(&a, m, k), Mat::new(&b, k, n), MatMut::new(&mut d, m, n));
                best[1] = best[1].min(s.elapsed().as_secs_f64());
            }
        }
        gemm(Mat::new(&a, m, k), Mat::new(&b, k, n), MatMut::new(&mut c, m, n), Epilogue::default());
        if t == 1 {
            assert_eq!(c, d);
        }
        println!(
            "{m}x{k}x{n}: nn {:.3} nt {:.3} tn {:.3} of peak; mm {:.3}",
            fl / best[0] / peak,
            fl / best[2] / peak,
            fl / best[3] / peak,
            fl / best[1] / peak
        );
    }
}
