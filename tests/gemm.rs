//! Matrix products: exact on small integers for every size and layout, within derived bounds on anything, nothing touched beside C.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use karat::linalg::{Activation, Epilogue, Gemm, Mat, MatMut, Packed, Rows, gemm, gemm_rows};
use karat::simd::{self, Isa};
use karat::tensor::Float;
use karat::tensor::random::{Purpose, Rng};
use proptest::prelude::*;

/// `simd::force` is for the whole process: the tests of this file take turns.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The unit roundoff of f32.
const U: f64 = 1.0 / (1u64 << 24) as f64;

// ---- operands ---------------------------------------------------------------------------------------------------------------

/// Rows, columns, rows with gaps, columns with gaps, gaps everywhere.
const LAYOUTS: usize = 5;

/// A matrix in one of the layouts. Whatever lies between its elements is NaN, so that a stray read shows.
struct Operand<T> {
    data: Vec<T>,
    shape: (usize, usize),
    strides: (usize, usize),
}

impl<T: Float> Operand<T> {
    fn new((rows, cols): (usize, usize), layout: usize, mut value: impl FnMut() -> f64) -> Self {
        let strides = [(cols, 1), (1, rows), (cols + 3, 1), (1, rows + 2), (2 * cols + 1, 2)][layout];
        let len = if rows * cols == 0 { 0 } else { (rows - 1) * strides.0 + (cols - 1) * strides.1 + 1 };
        let mut data = vec![T::from_f64(f64::NAN); len];
        for i in 0..rows {
            for j in 0..cols {
                data[i * strides.0 + j * strides.1] = T::from_f64(value());
            }
        }
        Operand { data, shape: (rows, cols), strides }
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        self.data[i * self.strides.0 + j * self.strides.1].to_f64()
    }

    fn view(&self) -> Mat<'_, T> {
        Mat::strided(&self.data, self.shape.0, self.shape.1, self.strides.0, self.strides.1)
    }
}

/// What surrounds an output.
const GUARD: f64 = 12_345.0;

/// An output inside guards: behind every row and behind the last.
struct Output<T> {
    data: Vec<T>,
    shape: (usize, usize),
    stride: usize,
}

impl<T: Float> Output<T> {
    fn new((rows, cols): (usize, usize), gap: usize, value: impl Fn(usize, usize) -> f64) -> Self {
        let stride = cols + gap;
        let data = (0..(rows + 1) * stride).map(|i| (i / stride, i % stride));
        let data = data.map(|(i, j)| T::from_f64(if i < rows && j < cols { value(i, j) } else { GUARD })).collect();
        Output { data, shape: (rows, cols), stride }
    }

    fn view(&mut self) -> MatMut<'_, T> {
        MatMut::strided(&mut self.data, self.shape.0, self.shape.1, self.stride)
    }

    /// Compares with `want(i, j)`, which gives a value and how far off it may be; guards must be untouched.
    fn check(&self, what: &str, want: impl Fn(usize, usize) -> (f64, f64)) {
        for (index, x) in self.data.iter().enumerate() {
            let (i, j, x) = (index / self.stride, index % self.stride, x.to_f64());
            let (value, bound) = if i < self.shape.0 && j < self.shape.1 { want(i, j) } else { (GUARD, 0.0) };
            // Not `>`: NaN must fail.
            let good = (x - value).abs() <= bound;
            assert!(good, "{what}: found {x} at ({i}, {j}), expected {value} within {bound:e}");
        }
    }
}

impl<T: Float> Rows<T> for Operand<T> {
    fn rows(&self) -> usize {
        self.shape.0
    }
    fn cols(&self) -> usize {
        self.shape.1
    }
    fn copy(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [T], stride: usize) {
        for (at, i) in rows.enumerate() {
            cols.clone().enumerate().for_each(|(to, j)| out[at * stride + to] = T::from_f64(self.at(i, j)));
        }
    }
}

/// `(A B)_ij` and `Σ |a| |b|`, in f64.
fn product<T: Float>(a: &Operand<T>, b: &Operand<T>, i: usize, j: usize) -> (f64, f64) {
    (0..a.shape.1).fold((0.0, 0.0), |(sum, size), p| {
        let term = a.at(i, p) * b.at(p, j);
        (sum + term, size + term.abs())
    })
}

/// A stream of small integers: products and sums of thousands of them are exact in f32.
fn integers(seed: u64) -> impl FnMut() -> f64 {
    let mut rng = Rng::new(seed, Purpose::Case, 0, 0);
    move || rng.below(9) as f64 - 4.0
}

fn nan(_: usize, _: usize) -> f64 {
    f64::NAN
}

fn exact<T: Float>(m: usize, k: usize, n: usize, variant: usize) {
    let a = Operand::<T>::new((m, k), variant % LAYOUTS, integers(1));
    let b = Operand::<T>::new((k, n), variant / LAYOUTS % LAYOUTS, integers(2));
    let mut c = Output::<T>::new((m, n), [0, 1, 5][variant % 3], nan);
    gemm(a.view(), b.view(), c.view(), Epilogue::default());
    c.check(&format!("{} {m}×{k}×{n}, variant {variant}, {:?}", T::NAME, simd::isa()), |i, j| (product(&a, &b, i, j).0, 0.0));
}

// ---- exact ------------------------------------------------------------------------------------------------------------------

#[test]
fn all_small_sizes_are_exact() {
    let _turn = turn();
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        simd::force(isa).unwrap();
        let mut variant = 0;
        for m in 0..=20 {
            for k in 0..=20 {
                for n in 0..=20 {
                    exact::<f32>(m, k, n, variant);
                    if isa == Isa::Portable {
                        exact::<f64>(m, k, n, variant);
                    }
                    // Prime to the number of variants: neighbours differ in every layout.
                    variant = (variant + 7) % 75;
                }
            }
        }
    }
}

#[test]
fn sizes_around_tiles_and_blocks_are_exact() {
    let _turn = turn();
    // Register tiles of 6 to 14 rows by 16 or 32 columns; blocks of 384 products.
    let rows = [1, 5, 6, 7, 13, 14, 15, 27, 28, 29, 113];
    let cols = [1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 321];
    let depths = [1, 383, 384, 385, 769];
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        simd::force(isa).unwrap();
        let mut variant = 0;
        for m in rows {
            for n in cols {
                for k in depths {
                    if isa == Isa::Avx512 || variant % 3 == 0 {
                        exact::<f32>(m, k, n, variant);
                    }
                    variant = (variant + 7) % 75;
                }
            }
        }
    }
}

#[test]
fn every_pair_of_layouts_is_exact() {
    let _turn = turn();
    for variant in 0..75 {
        exact::<f32>(31, 50, 37, variant);
        // Large enough for several threads, and for several passes over packed B.
        exact::<f32>(130, 70, 161, variant);
        exact::<f64>(31, 50, 37, variant);
    }
    exact::<f32>(9, 2000, 1030, 0);
    exact::<f32>(9, 2000, 1030, 6);
}

#[test]
fn packed_small_products_are_exact() {
    let _turn = turn();
    fn check<T: Float>(m: usize, k: usize, n: usize, variant: usize) {
        let a = Operand::<T>::new((m, k), variant % LAYOUTS, integers(3));
        let b = Operand::<T>::new((k, n), variant / LAYOUTS % LAYOUTS, integers(4));
        let mut packed = vec![T::from_f64(f64::NAN); T::packed_len(k, n)];
        <T as Gemm>::pack(b.view(), &mut packed);
        for add in [false, true] {
            let start = |i: usize, j: usize| if add { (i * 3 + j) as f64 } else { f64::NAN };
            let mut c = Output::<T>::new((m, n), [0, 1, 5][variant % 3], start);
            T::multiply_packed(a.view(), &packed, c.view(), add);
            let what = format!("packed {} {m}×{k}×{n}, variant {variant}, add {add}", T::NAME);
            c.check(&what, |i, j| (product(&a, &b, i, j).0 + if add { start(i, j) } else { 0.0 }, 0.0));
        }
    }
    let mut variant = 0;
    for m in [0, 1, 6, 7, 13, 14, 15, 49, 64] {
        for k in [0, 1, 5, 32, 49, 383, 384, 385, 769] {
            for n in [0, 1, 15, 16, 17, 31, 32, 33, 49, 64, 65] {
                check::<f32>(m, k, n, variant);
                check::<f64>(m, k, n, variant);
                variant = (variant + 7) % 75;
            }
        }
    }
}

#[test]
fn products_of_rows_made_on_the_way_are_exact() {
    let _turn = turn();
    fn check<T: Float>(m: usize, k: usize, n: usize) {
        let (a, b) = (Operand::<T>::new((m, k), 0, integers(5)), Operand::<T>::new((k, n), 0, integers(6)));
        let packed = Packed::new(b.view());
        for accumulate in [false, true] {
            let start = |i: usize, j: usize| if accumulate { (i * 3 + j) as f64 } else { f64::NAN };
            let mut c = Output::<T>::new((m, n), 5, start);
            gemm_rows(&a, &packed, c.view(), Epilogue { accumulate, ..Epilogue::default() });
            let what = format!("rows {} {m}×{k}×{n}, {accumulate}, {:?}", T::NAME, simd::isa());
            c.check(&what, |i, j| (product(&a, &b, i, j).0 + if accumulate { start(i, j) } else { 0.0 }, 0.0));
        }
    }
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        simd::force(isa).unwrap();
        for m in [0, 1, 6, 13, 14, 15, 28, 113] {
            for k in [0, 1, 17, 383, 384, 385, 769] {
                for n in [0, 1, 16, 33, 65] {
                    check::<f32>(m, k, n);
                    if isa == Isa::Portable {
                        check::<f64>(m, k, n);
                    }
                }
            }
        }
        // Tasks beside and below each other.
        check::<f32>(150, 400, 420);
    }
    // More than one block of rows in f64.
    check::<f64>(2700, 400, 3);
}

/// A product keeps the back end that it began with.
#[test]
fn forcing_a_back_end_meanwhile_is_harmless() {
    let _turn = turn();
    std::thread::scope(|scope| {
        let products = scope.spawn(|| (0..300).for_each(|i| exact::<f32>(20 + i % 50, 11, 30 + i % 70, i % 75)));
        while !products.is_finished() {
            Isa::ALL.into_iter().filter(|isa| isa.available()).for_each(|isa| simd::force(isa).unwrap());
        }
    });
}

// ---- epilogues --------------------------------------------------------------------------------------------------------------

/// `x Φ(x)` and its derivative.
fn gelu(x: f64) -> (f64, f64) {
    let phi = 0.5 * libm::erfc(-x / std::f64::consts::SQRT_2);
    let density = libm::exp(-0.5 * x * x) / (2.0 * std::f64::consts::PI).sqrt();
    (x * phi, phi + x * density)
}

/// Products, bias, residual and C are multiples of 1/64, so their sum is exact; only the activation rounds.
fn epilogue<T: Float>((m, k, n): (usize, usize, usize), (accumulate, bias, residual): (bool, bool, bool), activation: usize) {
    let unit = if T::NAME == "f32" { U } else { 1.0 / (1u64 << 53) as f64 };
    let eighths = |seed| {
        let mut next = integers(seed);
        move || next() / 8.0
    };
    let (a, b) = (Operand::<T>::new((m, k), 2, eighths(5)), Operand::<T>::new((k, n), 1, eighths(6)));
    let (bias_row, residual_mat) = (Operand::<T>::new((1, n), 0, eighths(7)), Operand::<T>::new((m, n), 2, eighths(8)));
    let mut rng = Rng::new(9, Purpose::Case, 0, 0);
    let mut pre = || 3.0 * rng.normal();
    let pre: Vec<f64> = (0..m * n).map(|_| T::from_f64(pre()).to_f64()).collect();
    let pre = |i: usize, j: usize| pre[i * n + j];
    let start = |i: usize, j: usize| ((i * 5 + j * 3) % 17) as f64 / 4.0 - 2.0;
    let mut c = Output::<T>::new((m, n), 3, |i, j| if accumulate { start(i, j) } else { f64::NAN });
    let mut out = Output::<T>::new((m, n), 2, |i, j| if activation == 3 { pre(i, j) } else { f64::NAN });
    let wanted = match activation {
        0 => Activation::None,
        1 => Activation::Gelu { out: out.view() },
        2 => Activation::GeluOnly,
        _ => Activation::GeluBackward { hidden: out.view() },
    };
    let given = Epilogue {
        accumulate,
        bias: bias.then_some(&bias_row.data[..]),
        residual: residual.then_some(residual_mat.view()),
        activation: wanted,
    };
    gemm(a.view(), b.view(), c.view(), given);

    let sum = |i: usize, j: usize| {
        let parts = [(accumulate, start(i, j)), (bias, if bias { bias_row.at(0, j) } else { 0.0 }), (residual, residual_mat.at(i, j))];
        product(&a, &b, i, j).0 + parts.into_iter().filter(|p| p.0).map(|p| p.1).sum::<f64>()
    };
    // GELU by an erf good to a few units in the last place: an absolute error of a few u beside x, and of |x| as a factor.
    let close = |value: f64, size: f64| (value, 8.0 * unit * size);
    let what = format!("{} {m}×{k}×{n} accumulate {accumulate} bias {bias} residual {residual} activation {activation}", T::NAME);
    c.check(&what, |i, j| match activation {
        0 | 1 => (sum(i, j), 0.0),
        2 => close(gelu(sum(i, j)).0, sum(i, j).abs()),
        _ => close(sum(i, j) * gelu(pre(i, j)).1, sum(i, j).abs()),
    });
    match activation {
        0 | 2 => assert!(out.data.iter().all(|x| x.to_f64().is_nan() || x.to_f64() == GUARD)),
        1 => out.check(&what, |i, j| close(gelu(sum(i, j)).0, sum(i, j).abs())),
        _ => out.check(&what, |i, j| close(gelu(pre(i, j)).0, pre(i, j).abs())),
    }
}

#[test]
fn epilogues_do_what_plain_loops_do() {
    let _turn = turn();
    // No products at all, one tile, edges, several blocks of k, several threads.
    for shape in [(5, 0, 19), (1, 1, 1), (14, 8, 32), (15, 33, 49), (29, 385, 31), (7, 800, 5), (150, 64, 130)] {
        for switches in 0..8 {
            for activation in 0..4 {
                let switches = (switches & 1 > 0, switches & 2 > 0, switches & 4 > 0);
                epilogue::<f32>(shape, switches, activation);
                epilogue::<f64>(shape, switches, activation);
            }
        }
    }
}

// ---- anything ---------------------------------------------------------------------------------------------------------------

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(96) })]

    /// `|fl(Σ ab) − Σ ab| ≤ γ_r Σ |a||b|`, `γ_r = r u/(1 − r u)`, with one rounding per product and one per further block of k.
    #[test]
    fn random_products_stay_within_the_bound(m in 0usize..70, k in 0usize..1200, n in 0usize..70, variant in 0usize..25, seed: u64) {
    let _turn = turn();
        let mut rng = Rng::new(seed, Purpose::Case, 0, 0);
        let a = Operand::<f32>::new((m, k), variant % LAYOUTS, || rng.normal());
        let b = Operand::<f32>::new((k, n), variant / LAYOUTS, || rng.normal());
        let mut c = Output::<f32>::new((m, n), variant % 3, nan);
        gemm(a.view(), b.view(), c.view(), Epilogue::default());
        let roundings = (k + k.div_ceil(384)) as f64;
        let gamma = roundings * U / (1.0 - roundings * U);
        c.check(&format!("{m}×{k}×{n}, variant {variant}"), |i, j| {
            let (sum, size) = product(&a, &b, i, j);
            (sum, gamma * size)
        });
    }
}
