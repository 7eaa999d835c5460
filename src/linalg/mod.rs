//! Matrix products: our own SIMD GEMM for f32, `matrixmultiply` for f64.
//!
//! Every element of an f32 product is `Σ` over blocks of 384 of one chain of fused multiply-adds in the order of k, whatever
//! the instruction set, the tile, the packing or the number of threads: the same bits everywhere.

mod columns;
mod count;
mod double;
mod gemm;
mod micro;
mod packed;
mod view;

pub use columns::{ColumnsMut, Dealt, RowsMut, Tiling, disjoint, par_blocks, par_rows, par_tiles};
pub use count::{count_flops, counted, flops_so_far};
pub use view::{Mat, MatMut, Rows};

use crate::tensor::Float;
pub use micro::TileShape;
pub use packed::Packed;

/// What happens to a product while it is still in cache: `C ← activation((C) + A B + bias + residual)`.
pub struct Epilogue<'a, T> {
    /// Add to what C holds instead of overwriting it.
    pub accumulate: bool,
    /// One number per column.
    pub bias: Option<&'a [T]>,
    /// A matrix of C's shape.
    pub residual: Option<Mat<'a, T>>,
    /// A second output or a factor.
    pub activation: Activation<'a, T>,
}

impl<T> Default for Epilogue<'_, T> {
    fn default() -> Self {
        Epilogue { accumulate: false, bias: None, residual: None, activation: Activation::None }
    }
}

/// The activation of an [`Epilogue`].
#[derive(Default)]
pub enum Activation<'a, T> {
    /// C is the sum.
    #[default]
    None,
    /// C is `max(sum, 0)`.
    Relu,
    /// C is `GELU` of the sum.
    GeluOnly,
    /// C is the sum `h`, `out` becomes `GELU(h)`.
    Gelu {
        /// Of C's shape.
        out: MatMut<'a, T>,
    },
    /// C is the sum times `GELU′(h)`; `hidden`, which holds `h`, becomes `GELU(h)`: the next layer's weight gradient needs it.
    GeluBackward {
        /// Of C's shape.
        hidden: MatMut<'a, T>,
    },
}

/// Matrix products in one precision. Shapes must agree; they are checked before this level, a mismatch here panics.
pub trait Gemm: Sized {
    /// `C = A B` with an epilogue, on all threads of the current pool.
    fn gemm(a: Mat<Self>, b: Mat<Self>, c: MatMut<Self>, epilogue: Epilogue<Self>);

    /// [`gemm`](Gemm::gemm) with B packed before.
    fn gemm_packed(a: Mat<Self>, b: &Packed<Self>, c: MatMut<Self>, epilogue: Epilogue<Self>)
    where
        Self: Float;

    /// [`gemm_packed`](Gemm::gemm_packed) with rows of A that are made when they are needed: A never exists as a whole.
    fn gemm_rows(a: &dyn Rows<Self>, b: &Packed<Self>, c: MatMut<Self>, epilogue: Epilogue<Self>)
    where
        Self: Float;

    /// The length of a packed `k × n` right operand of [`multiply_packed`](Gemm::multiply_packed).
    fn packed_len(k: usize, n: usize) -> usize;

    /// Packs the right operand of small products.
    fn pack(b: Mat<Self>, packed: &mut [Self]);

    /// `C = A B`, or `C += A B`, on the calling thread, with B packed.
    fn multiply_packed(a: Mat<Self>, packed: &[Self], c: MatMut<Self>, add: bool);
}

impl Gemm for f32 {
    fn gemm(a: Mat<f32>, b: Mat<f32>, c: MatMut<f32>, epilogue: Epilogue<f32>) {
        count_flops(2 * a.rows() * a.cols() * b.cols());
        gemm::gemm_f32(gemm::Left::InPlace(a), gemm::Right::Plain(b), c, epilogue);
    }
    fn gemm_packed(a: Mat<f32>, b: &Packed<f32>, c: MatMut<f32>, epilogue: Epilogue<f32>) {
        count_flops(2 * a.rows() * a.cols() * b.cols());
        gemm::gemm_f32(gemm::Left::InPlace(a), gemm::Right::Packed(b), c, epilogue);
    }
    fn gemm_rows(a: &dyn Rows<f32>, b: &Packed<f32>, c: MatMut<f32>, epilogue: Epilogue<f32>) {
        count_flops(2 * a.rows() * a.cols() * b.cols());
        gemm::gemm_f32(gemm::Left::Made(a), gemm::Right::Packed(b), c, epilogue);
    }
    fn packed_len(k: usize, n: usize) -> usize {
        micro::packed_len(k, n)
    }
    fn pack(b: Mat<f32>, packed: &mut [f32]) {
        gemm::pack_f32(b, packed);
    }
    fn multiply_packed(a: Mat<f32>, packed: &[f32], c: MatMut<f32>, add: bool) {
        count_flops(2 * a.rows() * a.cols() * c.cols());
        gemm::multiply_packed_f32(a, packed, c, add);
    }
}

impl Gemm for f64 {
    fn gemm(a: Mat<f64>, b: Mat<f64>, c: MatMut<f64>, epilogue: Epilogue<f64>) {
        count_flops(2 * a.rows() * a.cols() * b.cols());
        double::gemm_f64(a, b, c, epilogue);
    }
    fn gemm_packed(a: Mat<f64>, b: &Packed<f64>, c: MatMut<f64>, epilogue: Epilogue<f64>) {
        Self::gemm(a, Mat::new(b.data(), b.rows(), b.cols()), c, epilogue);
    }
    fn gemm_rows(a: &dyn Rows<f64>, b: &Packed<f64>, c: MatMut<f64>, epilogue: Epilogue<f64>) {
        count_flops(2 * a.rows() * a.cols() * b.cols());
        double::gemm_rows_f64(a, Mat::new(b.data(), b.rows(), b.cols()), c, epilogue);
    }
    fn packed_len(k: usize, n: usize) -> usize {
        k * n
    }
    fn pack(b: Mat<f64>, packed: &mut [f64]) {
        double::pack_f64(b, packed);
    }
    fn multiply_packed(a: Mat<f64>, packed: &[f64], mut c: MatMut<f64>, add: bool) {
        count_flops(2 * a.rows() * a.cols() * c.cols());
        let b = Mat::new(packed, a.cols(), c.cols());
        double::dgemm(a, b, &mut c, add);
    }
}

/// `C = A B` with an epilogue.
pub fn gemm<T: Float>(a: Mat<T>, b: Mat<T>, c: MatMut<T>, epilogue: Epilogue<T>) {
    T::gemm(a, b, c, epilogue);
}

/// `C = A B` with an epilogue, where B was packed once for many products.
pub fn gemm_packed<T: Float>(a: Mat<T>, b: &Packed<T>, c: MatMut<T>, epilogue: Epilogue<T>) {
    T::gemm_packed(a, b, c, epilogue);
}

/// `C = A B` with an epilogue, where the rows of A are made when they are needed and B was packed once for many products.
pub fn gemm_rows<T: Float>(a: &dyn Rows<T>, b: &Packed<T>, c: MatMut<T>, epilogue: Epilogue<T>) {
    T::gemm_rows(a, b, c, epilogue);
}

/// `C = A B` by `matrixmultiply`, the independent implementation that ours is checked and measured against.
pub fn reference_gemm_f32(a: Mat<f32>, b: Mat<f32>, mut c: MatMut<f32>) {
    assert!(a.cols() == b.rows() && a.rows() == c.rows() && b.cols() == c.cols());
    let (m, k, n, c_row) = (a.rows(), a.cols(), b.cols(), c.row_stride() as isize);
    let (ars, acs) = (a.row_stride() as isize, a.col_stride() as isize);
    let (brs, bcs) = (b.row_stride() as isize, b.col_stride() as isize);
    // SAFETY: the views lie inside their slices and the shapes agree.
    unsafe {
        matrixmultiply::sgemm(m, k, n, 1.0, a.data().as_ptr(), ars, acs, b.data().as_ptr(), brs, bcs, 0.0, c.data().as_mut_ptr(), c_row, 1);
    }
}
