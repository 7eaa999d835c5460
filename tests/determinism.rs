//! The same f32 bits from every instruction set and any number of threads.

use karat::grouping::Windows;
use karat::kernel::attention::{self, Bias, Gradients, Groups, Operand, Side, Sizes};
use karat::kernel::gram::{self, Maps, Tokens};
use karat::kernel::optim::AdamW;
use karat::kernel::{elementwise, norm, reduce};
use karat::linalg::{Activation, ColumnsMut, Epilogue, Mat, MatMut, gemm};
use karat::simd::{self, Isa};
use karat::tensor::random::{Purpose, Rng};

/// Names of results and FNV-1a hashes of their bits.
#[derive(Default)]
struct Prints(Vec<(String, u64)>);

impl Prints {
    fn add(&mut self, what: impl Into<String>, data: &[f32]) {
        let bytes = data.iter().flat_map(|x| x.to_bits().to_le_bytes());
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        self.0.push((what.into(), hash));
    }
}

/// Normal numbers, of which every stream is another.
fn normals(stream: u64, len: usize) -> Vec<f32> {
    let mut rng = Rng::new(11, Purpose::Case, 0, stream);
    (0..len).map(|_| rng.normal() as f32).collect()
}

fn products(prints: &mut Prints) {
    for (m, k, n) in
        [(1, 1, 1), (13, 1000, 17), (14, 384, 32), (197, 385, 100), (65, 1000, 129), (3, 2500, 700), (130, 64, 65), (49, 0, 20)]
    {
        let (a, b, bias, pre) = (normals(1, m * k), normals(2, k * n), normals(3, n), normals(4, m * n));
        let what = |kind| format!("gemm {kind} {m}×{k}×{n}");
        let mut c = normals(5, m * n);
        gemm(Mat::new(&a, m, k), Mat::new(&b, k, n), MatMut::new(&mut c, m, n), Epilogue::default());
        prints.add(what("plain"), &c);
        gemm(
            Mat::new(&a, k, m).t(),
            Mat::new(&b, n, k).t(),
            MatMut::new(&mut c, m, n),
            Epilogue { accumulate: true, ..Epilogue::default() },
        );
        prints.add(what("transposed, added"), &c);
        let mut out = vec![0.0; m * n];
        let activation = Activation::Gelu { out: MatMut::new(&mut out, m, n) };
        let epilogue = Epilogue { bias: Some(&bias), residual: Some(Mat::new(&pre, m, n)), activation, accumulate: false };
        gemm(Mat::new(&a, m, k), Mat::new(&b, k, n), MatMut::new(&mut c, m, n), epilogue);
        prints.add(what("GELU"), &[&c[..], &out].concat());
        out.copy_from_slice(&pre);
        let activation = Activation::GeluBackward { hidden: MatMut::new(&mut out, m, n) };
        gemm(Mat::new(&a, m, k), Mat::new(&b, k, n), MatMut::new(&mut c, m, n), Epilogue { activation, ..Epilogue::default() });
        prints.add(what("GELU backward"), &[&c[..], &out].concat());
    }
}

fn norms(prints: &mut Prints) {
    for (rows, width) in [(1, 1), (700, 97), (300, 16), (5, 20_000)] {
        let (x, dy, gamma, beta, residual) =
            (normals(1, rows * width), normals(2, rows * width), normals(3, width), normals(4, width), normals(5, rows * width));
        let (mut y, mut stats) = (vec![0.0; rows * width], vec![0.0; 2 * rows]);
        norm::layer_norm(&mut y, &mut stats, &x, Some((&gamma, &beta)), width, 1e-6);
        prints.add(format!("layer_norm {rows}×{width}"), &[&y[..], &stats].concat());
        norm::layer_norm_again(&mut y, &mut stats, &x, None, width);
        prints.add(format!("layer_norm again {rows}×{width}"), &y);
        let (mut dgamma, mut dbeta) = (vec![0.0; width], vec![0.0; width]);
        let affine = Some((&mut dgamma[..], &mut dbeta[..]));
        norm::layer_norm_backward(&mut y, affine, &x, &dy, &stats, Some(&gamma), Some(&residual), width);
        prints.add(format!("layer_norm backward {rows}×{width}"), &[&y[..], &dgamma, &dbeta].concat());
    }
}

/// Attention forward and backward; `side` of the bias, if there is one.
fn attend(prints: &mut Prints, what: &str, (batch, heads, dim, n): (usize, usize, usize, usize), groups: &Groups, side: Option<usize>) {
    let width = heads * dim;
    let (qkv, d_out, table) =
        (normals(1, batch * n * 3 * width), normals(2, batch * n * width), normals(3, heads * side.unwrap_or(0).pow(2)));
    let [q, k, v] = [0, 1, 2].map(|part| Operand { data: &qkv[..], stride: 3 * width, offset: part * width });
    let sizes = Sizes { batch, heads, dim, value_dim: dim, queries: n, keys: n, scale: 1.0 / (dim as f64).sqrt() };
    let bias = side.map(|side| Bias { data: &table[..], side });
    let (mut out, mut stats) = (vec![0.0; batch * n * width], vec![0.0; batch * heads * n * 2]);
    attention::forward(&mut out, &mut stats, q, k, v, bias, groups, sizes);
    prints.add(format!("attention {what}"), &[&out[..], &stats].concat());
    let (mut d_qkv, mut d_table) = (vec![0.0; qkv.len()], vec![0.0; table.len()]);
    let (dq, rest) = ColumnsMut::new(&mut d_qkv, 3 * width).split_at(width);
    let (dk, dv) = rest.split_at(width);
    let grads = Gradients { q: dq, k: dk, v: dv, bias: side.map(|_| &mut d_table[..]) };
    attention::backward(grads, &d_out, &out, &stats, q, k, v, bias, groups, sizes);
    prints.add(format!("attention backward {what}"), &[&d_qkv[..], &d_table].concat());
}

fn attentions(prints: &mut Prints) {
    let Windows { offsets, tokens, positions, .. } = Windows::dense(9, 11, (5, 5), (2, 2)).unwrap();
    let windows = Side { offsets, tokens, positions };
    let windows = Groups { queries: windows.clone(), keys: windows, zero_tokens: 0 };
    attend(prints, "in windows", (3, 2, 10, 99), &windows, Some(25));
    attend(prints, "of one token", (1, 1, 1, 1), &Groups::all(1, 1), None);
    attend(prints, "of 197 tokens", (2, 3, 32, 197), &Groups::all(197, 197), None);
    // More keys than one block of them.
    attend(prints, "of 600 tokens", (1, 2, 24, 600), &Groups::all(600, 600), Some(600));
}

/// The parts of linear attention, over several segments of tokens.
fn linear_attention(prints: &mut Prints) {
    let (batch, tokens, heads, width) = (2, 700, 3, 20);
    let stride = 2 * heads * width;
    let (x, scales) = (normals(1, batch * tokens * stride), normals(2, batch * tokens * heads));
    let [a, b] = [0, 1].map(|part| Operand { data: &x[..], stride, offset: part * heads * width });
    let (mut sums, mut squares) = (vec![0.0; batch * heads * width * width], vec![0.0; batch * stride]);
    let sizes = Tokens { batch, tokens, heads };
    gram::products(&mut sums, Some(&mut squares), a, b, Some(&scales), [width; 2], sizes);
    prints.add("outer products of tokens", &[&sums[..], &squares].concat());
    let maps = Maps::new(&sums, heads, [width; 2], true);
    let mut y = normals(3, batch * tokens * stride);
    gram::par_rows(&mut y, stride, tokens, |image, first, rows| maps.apply(image, a, first, rows, stride, width, true));
    prints.add("a matrix per head", &y);
    let (mut covariance, mut mean) = (vec![0.0; stride * stride], vec![0.0; stride]);
    gram::covariance(&mut covariance, &mut mean, &x);
    prints.add("covariance", &[covariance, mean].concat());
}

fn reductions(prints: &mut Prints) {
    let x = normals(1, 1000 * 37);
    let mut sums = normals(2, 37);
    reduce::add_column_sums(&mut sums, &x);
    prints.add("column sums", &sums);
    let dot = reduce::dot(&x, &normals(3, x.len())).to_bits();
    prints.add("dot", &[f32::from_bits(dot as u32), f32::from_bits((dot >> 32) as u32)]);
}

fn elements(prints: &mut Prints) {
    let n = 40_003;
    // Far tails, zeros, infinities: where polynomials change over.
    let mut x: Vec<f32> = normals(1, n).iter().map(|x| x * 6.0).collect();
    x[..10].copy_from_slice(&[0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, f32::INFINITY, f32::MIN_POSITIVE, 88.7, -88.7]);
    let mut y = normals(2, n);
    elementwise::gelu(&mut y, &x, 0.7);
    prints.add("gelu", &y);
    let mut y = normals(2, n);
    elementwise::gelu_backward(&mut y, &x, 0.7);
    prints.add("gelu backward", &y);
    elementwise::add_scaled(&mut y, &normals(3, n), -1.3);
    elementwise::multiply(&mut y, &normals(4, n), 0.9);
    prints.add("add_scaled, multiply", &y);

    let (mut theta, mut m, mut v) = (normals(5, n), normals(6, n), normals(7, n).iter().map(|x| x * x).collect::<Vec<_>>());
    for step in 1..4 {
        let adamw = AdamW { lr: 1e-3, betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.05, step, grad_scale: 0.3 };
        adamw.step(&mut theta, &mut m, &mut v, &normals(8 + step, n));
    }
    prints.add("adamw", &[theta, m, v].concat());
}

fn prints() -> Vec<(String, u64)> {
    let mut prints = Prints::default();
    products(&mut prints);
    norms(&mut prints);
    attentions(&mut prints);
    linear_attention(&mut prints);
    reductions(&mut prints);
    elements(&mut prints);
    prints.0
}

/// One function: the back end is a setting of the whole process.
#[test]
fn same_bits_on_every_back_end_and_any_number_of_threads() {
    let mut first: Option<Vec<(String, u64)>> = None;
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        simd::force(isa).unwrap();
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let found = pool.install(prints);
            let want = first.get_or_insert_with(|| found.clone());
            let other: Vec<_> = found.iter().zip(want.iter()).filter(|(a, b)| a != b).map(|(a, _)| &a.0).collect();
            assert!(other.is_empty(), "{} with {threads} threads: other bits than the first run in {other:?}", isa.name());
        }
    }
    let mut hashes: Vec<u64> = first.iter().flatten().map(|print| print.1).collect();
    let all = hashes.len();
    hashes.sort_unstable();
    hashes.dedup();
    assert!(hashes.len() > all / 2, "results that do not depend on their inputs");
}
