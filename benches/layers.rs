//! Each layer of the stack against what this machine can do: products and attention as fractions of the FMA peak, what moves memory as
//! fractions of its bandwidth. Ratios only: a change that slows a layer shows on any machine.
//!
//! `cargo bench --bench layers`

use std::time::Instant;

use karat::attention::softmax::{Attention, Settings};
use karat::kernel::attention::Groups;
use karat::linalg::{Activation, Epilogue, Mat, MatMut, gemm};
use karat::nn::{Init, LayerNorm, Layout, Params};
use karat::simd::{isa, peak};
use karat::tensor::{Buffer, Tensor};

/// DeiT-S at batch 8.
const BATCH: usize = 8;
const TOKENS: usize = 197;
const DIM: usize = 384;
const HEADS: usize = 6;

/// The shortest of some runs, in seconds.
fn best(mut work: impl FnMut()) -> f64 {
    work();
    (0..15).fold(f64::INFINITY, |best, _| {
        let start = Instant::now();
        work();
        best.min(start.elapsed().as_secs_f64())
    })
}

fn filled(n: usize) -> Buffer<f32> {
    let mut buffer = Buffer::scratch(n);
    buffer.iter_mut().enumerate().for_each(|(i, x)| *x = ((i * 7) % 1009) as f32 / 1009.0 - 0.5);
    buffer
}

fn main() {
    let threads = rayon::current_num_threads();
    println!("{} threads, {}", threads, isa().name());
    karat::threads::awake(|| {
        products(threads);
        layer_norm();
        attention(threads);
    });
}

/// The four kinds of products of a training step.
fn products(threads: usize) {
    let (rows, wide) = (BATCH * TOKENS, 4 * DIM);
    let (x, w, dy) = (filled(rows * DIM), filled(DIM * wide), filled(rows * wide));
    let (mut y, mut a, mut dx, mut dw) = (filled(rows * wide), filled(rows * wide), filled(rows * DIM), filled(DIM * wide));
    let bias = filled(wide);
    let flops = 2.0 * (rows * DIM * wide) as f64;
    let of_peak = |seconds: f64| flops / seconds / peak::fma_flops() / threads as f64;
    let linear = best(|| {
        let epilogue = Epilogue { bias: Some(&bias), ..Epilogue::default() };
        gemm(Mat::new(&x, rows, DIM), Mat::new(&w, wide, DIM).t(), MatMut::new(&mut y, rows, wide), epilogue);
    });
    let gelu = best(|| {
        let activation = Activation::Gelu { out: MatMut::new(&mut a, rows, wide) };
        let epilogue = Epilogue { bias: Some(&bias), activation, ..Epilogue::default() };
        gemm(Mat::new(&x, rows, DIM), Mat::new(&w, wide, DIM).t(), MatMut::new(&mut y, rows, wide), epilogue);
    });
    let input = best(|| {
        gemm(Mat::new(&dy, rows, wide), Mat::new(&w, wide, DIM), MatMut::new(&mut dx, rows, DIM), Epilogue::default());
    });
    let weight = best(|| {
        let epilogue = Epilogue { accumulate: true, ..Epilogue::default() };
        gemm(Mat::new(&dy, rows, wide).t(), Mat::new(&x, rows, DIM), MatMut::new(&mut dw, wide, DIM), epilogue);
    });
    for (name, seconds) in [("x Wᵀ + b", linear), ("x Wᵀ + b and GELU", gelu), ("dy W", input), ("dW += dyᵀ x", weight)] {
        println!("{name:24} {:.2} of the FMA peak", of_peak(seconds));
    }
}

/// Forward reads x and writes y; backward reads x and dy and writes dx.
fn layer_norm() {
    let (norm, layout) = Layout::build(|names| Ok(LayerNorm::new(names.at("norm"), DIM, 1e-6))).expect("a norm");
    let (params, mut grads) = (Params::<f32>::init(&layout, 0), Params::<f32>::zeros(&layout));
    // More than the caches hold.
    let x = Tensor::from_fn([64 * TOKENS * BATCH, DIM], |i| ((i * 7) % 1009) as f32 / 1009.0 - 0.5);
    let bytes = 4.0 * x.data().len() as f64;
    let bandwidth = peak::bandwidth();
    let stats = norm.forward(&params, &x).expect("shapes agree").1;
    let forward = best(|| drop(norm.forward(&params, &x)));
    let backward = best(|| drop(norm.backward(&params, &mut grads, &x, &stats, &x, None)));
    for (name, moved, seconds) in [("LayerNorm", 2.0 * bytes, forward), ("LayerNorm, backward", 3.0 * bytes, backward)] {
        println!("{name:24} {:.2} of one core's memory bandwidth", moved / seconds / bandwidth);
    }
}

/// Softmax attention with its two linear layers.
fn attention(threads: usize) {
    let settings = Settings::new(DIM, HEADS);
    let (layer, layout) = Layout::build(|names| Attention::new(names.at("attn"), settings, |_, _| Init::NORMAL_02)).expect("a layer");
    let (params, mut grads) = (Params::<f32>::init(&layout, 0), Params::<f32>::zeros(&layout));
    let x = Tensor::from_fn([BATCH, TOKENS, DIM], |i| ((i * 7) % 1009) as f32 / 1009.0 - 0.5);
    let groups = Groups::all(TOKENS, TOKENS);
    let mut run = |backward: bool| {
        let (y, saved) = layer.forward(&params, &x, &groups, None, None).expect("shapes agree");
        if backward {
            drop(layer.backward(&params, &mut grads, &x, saved, &groups, None, &y));
        }
    };
    for backward in [false, true] {
        let flops = karat::linalg::counted(|| run(backward)).1;
        let seconds = best(|| run(backward));
        let name = if backward { "attention, both passes" } else { "attention, forward" };
        println!("{name:24} {:.2} of the FMA peak", flops as f64 / seconds / peak::fma_flops() / threads as f64);
    }
}
