//! Whole rows: gather, scatter, broadcast, patches.

use rayon::prelude::*;

use super::chunk_rows;
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::Float;

use super::{get, put};

/// Row `i` of `out` ← row `index[i]` of `x`.
pub fn gather<T: Float>(out: &mut [T], x: &[T], index: &[u32], width: usize) {
    assert_eq!(out.len(), index.len() * width);
    let chunk = chunk_rows(width);
    out.par_chunks_mut((chunk * width).max(1)).zip(index.par_chunks(chunk)).for_each(|(out, index)| {
        for (row, &from) in out.chunks_exact_mut(width.max(1)).zip(index) {
            row.copy_from_slice(&x[from as usize * width..(from as usize + 1) * width]);
        }
    });
}

/// Row `index[i]` of `out` ← row `i` of `x`. Rows that no index names keep their value; of rows named twice the last one stays.
pub fn scatter<T: Float>(out: &mut [T], x: &[T], index: &[u32], width: usize) {
    for (row, &to) in x.chunks_exact(width.max(1)).zip(index) {
        out[to as usize * width..(to as usize + 1) * width].copy_from_slice(row);
    }
}

struct AddToColumns<'a, T> {
    out: &'a mut [T],
    stride: usize,
    first: usize,
    x: &'a [T],
    width: usize,
}

impl<T: Float> Kernel<T> for AddToColumns<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        for (out, x) in self.out.chunks_exact_mut(self.stride).zip(self.x.chunks_exact(self.width)) {
            let out = &mut out[self.first..self.first + self.width];
            let mut j = 0;
            while j < x.len() {
                put(get::<T, V>(out, j, T::ZERO) + get(x, j, T::ZERO), out, j);
                j += LANES;
            }
        }
    }
}

/// Adds rows of `width` values to columns `first..` of rows of `stride`: the gradient that reaches one part of `[q|k|v]` directly.
pub fn add_to_columns<T: Float>(out: &mut [T], stride: usize, first: usize, x: &[T], width: usize) {
    assert!(width > 0 && first + width <= stride && out.len() * width == x.len() * stride);
    let chunk = chunk_rows(stride);
    out.par_chunks_mut(chunk * stride)
        .zip(x.par_chunks(chunk * width))
        .for_each(|(out, x)| T::dispatch(AddToColumns { out, stride, first, x, width }));
}

/// Row `i` of image b of `out` ← row `index[i]` of image b of `x`; an index beyond the rows of `x` gives zeros.
pub fn gather_batch<T: Float>(out: &mut [T], x: &[T], index: &[u32], batch: usize, width: usize) {
    assert!(out.len() == batch * index.len() * width && (batch == 0 || x.len().is_multiple_of(batch)));
    if out.is_empty() {
        return;
    }
    let (rows, chunk) = (x.len() / batch / width, chunk_rows(width));
    out.par_chunks_mut(chunk * width).enumerate().for_each(|(c, out)| {
        for (i, row) in out.chunks_exact_mut(width).enumerate() {
            let (b, i) = ((c * chunk + i) / index.len(), (c * chunk + i) % index.len());
            let from = index[i] as usize;
            if from < rows {
                row.copy_from_slice(&x[(b * rows + from) * width..(b * rows + from + 1) * width]);
            } else {
                row.fill(T::ZERO);
            }
        }
    });
}

/// The adjoint of [`gather_batch`] for an index that names no row twice: `out` must hold zeros before.
pub fn scatter_batch<T: Float>(out: &mut [T], x: &[T], index: &[u32], batch: usize, width: usize) {
    assert!(x.len() == batch * index.len() * width && (batch == 0 || out.len().is_multiple_of(batch)));
    if out.is_empty() || x.is_empty() {
        return;
    }
    let rows = out.len() / batch / width;
    out.par_chunks_mut(rows * width).zip(x.par_chunks(index.len() * width)).for_each(|(out, x)| {
        for (row, &to) in x.chunks_exact(width).zip(index) {
            if (to as usize) < rows {
                out[to as usize * width..(to as usize + 1) * width].copy_from_slice(row);
            }
        }
    });
}

struct WithRow<'a, T> {
    rows: &'a mut [T],
    row: &'a [T],
    multiply: bool,
}

impl<T: Float> Kernel<T> for WithRow<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        for out in self.rows.chunks_exact_mut(self.row.len()) {
            let mut j = 0;
            while j < out.len() {
                let (a, b) = (get::<T, V>(out, j, T::ZERO), get::<T, V>(self.row, j, T::ZERO));
                put(if self.multiply { a * b } else { a + b }, out, j);
                j += LANES;
            }
        }
    }
}

/// Adds `table` (some rows, repeated for every batch) to `x`: `x[b, i] += table[i]`.
pub fn add_table<T: Float>(x: &mut [T], table: &[T]) {
    with_table(x, table, false);
}

/// Multiplies `x` by `table` (some rows, repeated): `x[b, i] *= table[i]`.
pub fn multiply_table<T: Float>(x: &mut [T], table: &[T]) {
    with_table(x, table, true);
}

fn with_table<T: Float>(x: &mut [T], table: &[T], multiply: bool) {
    if table.is_empty() {
        return;
    }
    let chunk = chunk_rows(table.len()) * table.len();
    x.par_chunks_mut(chunk).for_each(|rows| T::dispatch(WithRow { rows, row: table, multiply }));
}

/// The patches of images as rows: `out[b, y, x, (c, i, j)] = image[b, c, yP + i, xP + j]`, the order of a convolution weight.
/// Incomplete patches at the right and the bottom are dropped.
pub fn patches<T: Float>(out: &mut [T], image: &[T], [batch, chans, height, width]: [usize; 4], [ph, pw]: [usize; 2]) {
    let (rows, cols, len) = (height / ph, width / pw, chans * ph * pw);
    assert!(out.len() == batch * rows * cols * len && image.len() == batch * chans * height * width);
    out.par_chunks_mut((cols * len).max(1)).enumerate().for_each(|(line, out)| {
        let (b, y) = (line / rows, line % rows);
        for (x, patch) in out.chunks_exact_mut(len).enumerate() {
            for (k, part) in patch.chunks_exact_mut(pw).enumerate() {
                let (c, i) = (k / ph, k % ph);
                let from = ((b * chans + c) * height + y * ph + i) * width + x * pw;
                part.copy_from_slice(&image[from..from + pw]);
            }
        }
    });
}

/// The adjoint of [`patches`]: puts rows back into images; pixels outside every patch become 0.
pub fn patches_backward<T: Float>(image: &mut [T], rows_in: &[T], [batch, chans, height, width]: [usize; 4], [ph, pw]: [usize; 2]) {
    let (rows, cols, len) = (height / ph, width / pw, chans * ph * pw);
    assert!(rows_in.len() == batch * rows * cols * len && image.len() == batch * chans * height * width);
    image.par_chunks_mut((height * width).max(1)).enumerate().for_each(|(plane, image)| {
        let (b, c) = (plane / chans, plane % chans);
        image.fill(T::ZERO);
        for y in 0..rows * ph {
            for x in 0..cols {
                let from = ((b * rows + y / ph) * cols + x) * len + (c * ph + y % ph) * pw;
                image[y * width + x * pw..y * width + (x + 1) * pw].copy_from_slice(&rows_in[from..from + pw]);
            }
        }
    });
}
