//! What linear attention is made of: `Σ_n a_n ⊗ b_n` per head over all tokens, and `y_n = x_n M` with a small matrix per head.
//!
//! Both read their operands in place, row by row, all heads of a row at once: tokens stream through the cache once. Work is cut into
//! segments of tokens; sums over tokens are taken per segment and the segments added in order.

use rayon::prelude::*;

use super::attention::Operand;
use super::reduce::add_column_sums;
use super::{get, put};
use crate::linalg::{Epilogue, Mat, MatMut, gemm};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

/// Tokens whose operands are packed at a time.
const BLOCK: usize = 64;

/// Images, tokens, heads.
#[derive(Clone, Copy, Debug)]
pub struct Tokens {
    /// Images.
    pub batch: usize,
    /// Tokens per image.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
}

impl Tokens {
    /// Tokens per segment of a sum: an eighth of an image, at least a block and at most eight.
    fn segment(&self) -> usize {
        self.tokens.div_ceil(8).next_multiple_of(16).clamp(32, 8 * BLOCK)
    }
}

impl<'a, T: Float> Operand<'a, T> {
    /// Head `head`, `width` wide, of `rows` rows from `first`, as a matrix.
    fn head(&self, first: usize, rows: usize, head: usize, width: usize) -> Mat<'a, T> {
        if rows == 0 {
            return Mat::new(&[], 0, width);
        }
        Mat::strided(&self.data[first * self.stride + self.offset + head * width..], rows, width, self.stride, 1)
    }
}

/// Copies rows of one head, each times a factor of its own if there are any.
struct CopyScaled<'a, T> {
    out: &'a mut [T],
    x: Mat<'a, T>,
    /// One number per row, `step` apart.
    factors: Option<(&'a [T], usize)>,
}

impl<T: Float> Kernel<T> for CopyScaled<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let (data, stride, width) = (self.x.data(), self.x.row_stride(), self.x.cols());
        for (i, out) in self.out.chunks_exact_mut(width).enumerate() {
            let row = &data[i * stride..i * stride + width];
            let factor = V::splat(self.factors.map_or(T::ONE, |(f, step)| f[i * step]));
            let mut j = 0;
            while j < width {
                put(get::<T, V>(row, j, T::ZERO) * factor, out, j);
                j += LANES;
            }
        }
    }
}

/// `out[j] += Σ x[i, j]²` for some rows.
struct Squares<'a, T> {
    out: &'a mut [T],
    x: &'a [T],
    stride: usize,
}

impl<T: Float> Kernel<T> for Squares<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.out.len();
        for row in self.x.chunks(self.stride) {
            let row = &row[..width];
            let mut j = 0;
            while j < width {
                let x = get::<T, V>(row, j, T::ZERO);
                put(x.mul_add(x, get(self.out, j, T::ZERO)), self.out, j);
                j += LANES;
            }
        }
    }
}

/// `gram[b, a] = Σ_n s_n a_n ⊗ b_n` `[left, right]` for every image and head, `s` `[B·N, h]` being 1 unless given.
///
/// With `squares` `[B, width]`, also the sums over tokens of the squares of the first `width` columns of a's rows, from its offset.
pub fn products<T: Float>(
    gram: &mut [T],
    squares: Option<&mut [T]>,
    a: Operand<T>,
    b: Operand<T>,
    scales: Option<&[T]>,
    [left, right]: [usize; 2],
    sizes: Tokens,
) {
    let Tokens { batch, tokens, heads } = sizes;
    let size = heads * left * right;
    assert_eq!(gram.len(), batch * size);
    if batch * size == 0 {
        return;
    }
    let width = squares.as_ref().map_or(0, |s| s.len() / batch);
    let (segment, per_image) = (sizes.segment(), tokens.div_ceil(sizes.segment()));
    let mut parts = Buffer::<T>::scratch(batch * per_image * (size + width));
    parts.par_chunks_mut(size + width).enumerate().for_each(|(index, part)| {
        let (image, from) = (index / per_image, index % per_image * segment);
        let (gram, squares) = part.split_at_mut(size);
        squares.fill(T::ZERO);
        let mut rows = Buffer::<T>::scratch(BLOCK * left);
        let mut packed = Buffer::<T>::scratch(T::packed_len(BLOCK, right));
        for at in (from..tokens.min(from + segment)).step_by(BLOCK) {
            let (first, n) = (image * tokens + at, BLOCK.min(tokens.min(from + segment) - at));
            for head in 0..heads {
                let rows = &mut rows[..n * left];
                let factors = scales.map(|s| (&s[first * heads + head..], heads));
                T::dispatch(CopyScaled { out: rows, x: a.head(first, n, head, left), factors });
                T::pack(b.head(first, n, head, right), &mut packed);
                let gram = MatMut::new(&mut gram[head * left * right..(head + 1) * left * right], left, right);
                T::multiply_packed(Mat::new(rows, n, left).t(), &packed, gram, at > from);
            }
            if width > 0 {
                let x = &a.data[first * a.stride + a.offset..(first + n - 1) * a.stride + a.offset + width];
                T::dispatch(Squares { out: squares, x, stride: a.stride });
            }
        }
    });
    let mut squares = squares;
    for image in 0..batch {
        let gram = &mut gram[image * size..(image + 1) * size];
        let parts = &parts[image * per_image * (size + width)..(image + 1) * per_image * (size + width)];
        sum_parts(gram, parts, size + width, 0);
        if let Some(squares) = &mut squares {
            sum_parts(&mut squares[image * width..(image + 1) * width], parts, size + width, size);
        }
    }
}

/// Adds what lies at `offset` in every one of `parts`, in order.
fn sum_parts<T: Float>(out: &mut [T], parts: &[T], stride: usize, offset: usize) {
    const CHUNK: usize = 4096;
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| {
        out.fill(T::ZERO);
        for part in parts.chunks_exact(stride) {
            let from = offset + i * CHUNK;
            let x = &part[from..from + out.len()];
            T::dispatch(AddTo { out, x });
        }
    });
}

struct AddTo<'a, T> {
    out: &'a mut [T],
    x: &'a [T],
}

impl<T: Float> Kernel<T> for AddTo<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let mut j = 0;
        while j < self.out.len() {
            put(get::<T, V>(self.out, j, T::ZERO) + get(self.x, j, T::ZERO), self.out, j);
            j += LANES;
        }
    }
}

/// A small matrix per image and head, ready to be multiplied from the right.
pub struct Maps<T: Float> {
    packed: Buffer<T>,
    heads: usize,
    /// Rows and columns.
    shape: [usize; 2],
}

impl<T: Float> Maps<T> {
    /// Of `maps` `[B, h, rows, cols]`; with `transpose`, each is turned over.
    pub fn new(maps: &[T], heads: usize, [rows, cols]: [usize; 2], transpose: bool) -> Self {
        let shape = if transpose { [cols, rows] } else { [rows, cols] };
        let (step, size) = (T::packed_len(shape[0], shape[1]), (rows * cols).max(1));
        let mut packed = Buffer::<T>::scratch(maps.len() / size * step);
        packed.par_chunks_mut(step.max(1)).zip(maps.par_chunks_exact(size)).for_each(|(packed, map)| {
            let map = Mat::new(map, rows, cols);
            T::pack(if transpose { map.t() } else { map }, packed);
        });
        Maps { packed, heads, shape }
    }

    /// `y_n (+)= x_n M` for every head of `rows` tokens of an image, on the calling thread. The tokens are rows `first…` of `x`; `y`
    /// holds as many rows of `stride`, the first head in column `to`.
    #[allow(clippy::too_many_arguments)]
    pub fn apply(&self, image: usize, x: Operand<T>, first: usize, y: &mut [T], stride: usize, to: usize, add: bool) {
        let [inputs, outputs] = self.shape;
        let step = T::packed_len(inputs, outputs);
        let rows = y.len() / stride;
        for head in 0..if rows == 0 { 0 } else { self.heads } {
            let packed = &self.packed[(image * self.heads + head) * step..];
            let y = MatMut::strided(&mut y[to + head * outputs..], rows, outputs, stride);
            T::multiply_packed(x.head(first, rows, head, inputs), packed, y, add);
        }
    }
}

/// Calls `work(image, first, rows)` for blocks of the rows of `out` `[B·N, stride]`, `first` being the number of the first row, in
/// parallel. No block holds rows of two images.
pub fn par_rows<T: Float>(out: &mut [T], stride: usize, tokens: usize, work: impl Fn(usize, usize, &mut [T]) + Sync) {
    out.par_chunks_mut((tokens * stride).max(1)).enumerate().for_each(|(image, out)| {
        out.par_chunks_mut(BLOCK * stride).enumerate().for_each(|(i, rows)| work(image, image * tokens + i * BLOCK, rows));
    });
}

/// [`par_rows`] with rows of a second matrix `[B·N, other_stride]` beside those of the first.
pub fn par_rows_with<T: Float>(
    [out, other]: [&mut [T]; 2],
    [stride, other_stride]: [usize; 2],
    tokens: usize,
    work: impl Fn(usize, usize, &mut [T], &mut [T]) + Sync,
) {
    (out.par_chunks_mut((tokens * stride).max(1))).zip(other.par_chunks_mut((tokens * other_stride).max(1))).enumerate().for_each(
        |(image, (out, other))| {
            (out.par_chunks_mut(BLOCK * stride))
                .zip(other.par_chunks_mut(BLOCK * other_stride))
                .enumerate()
                .for_each(|(i, (rows, others))| work(image, image * tokens + i * BLOCK, rows, others));
        },
    );
}

/// Columns whose products with all columns behind them are one product.
const COLUMNS: usize = 128;

/// Rows that exist centered at a time.
const CENTERED: usize = 768;

/// `out ← x − mean` for some rows.
struct Center<'a, T> {
    out: &'a mut [T],
    x: &'a [T],
    mean: &'a [T],
}

impl<T: Float> Kernel<T> for Center<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.mean.len();
        for (out, x) in self.out.chunks_exact_mut(width).zip(self.x.chunks_exact(width)) {
            let mut j = 0;
            while j < width {
                put(get::<T, V>(x, j, T::ZERO) - get(self.mean, j, T::ZERO), out, j);
                j += LANES;
            }
        }
    }
}

/// The mean of rows `x`, and `Σ (x − mean) ⊗ (x − mean)`. That is symmetric: half of it is computed, in blocks, and copied to the other
/// half.
pub fn covariance<T: Float>(out: &mut [T], mean: &mut [T], x: &[T]) {
    let width = mean.len();
    let rows = x.len().checked_div(width).unwrap_or(0);
    assert!(out.len() == width * width && rows * width == x.len());
    mean.fill(T::ZERO);
    add_column_sums(mean, x);
    mean.iter_mut().for_each(|m| *m = *m / T::of(rows.max(1)));
    let mut centered = Buffer::<T>::scratch(CENTERED.min(rows) * width);
    let chunk = (super::chunk_rows(width) * width).max(1);
    for (index, x) in x.chunks((CENTERED * width).max(1)).enumerate() {
        let centered = &mut centered[..x.len()];
        centered.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).for_each(|(out, x)| T::dispatch(Center { out, x, mean }));
        for from in (0..width).step_by(COLUMNS) {
            let all = Mat::new(centered, x.len() / width, width).cols_from(from, width - from);
            let some = all.cols_from(0, COLUMNS.min(width - from));
            let block = MatMut::strided(&mut out[from * width + from..], some.cols(), width - from, width);
            gemm(some.t(), all, block, Epilogue { accumulate: index > 0, ..Epilogue::default() });
        }
    }
    for i in COLUMNS..width {
        for j in 0..i / COLUMNS * COLUMNS {
            out[i * width + j] = out[j * width + i];
        }
    }
}

/// The floating-point operations of [`covariance`].
pub fn covariance_flops(rows: usize, width: usize) -> usize {
    (0..width).step_by(COLUMNS).map(|from| 2 * rows * COLUMNS.min(width - from) * (width - from)).sum()
}
