//! Strided matrix views over slices, and rows that are made when they are needed.

use std::ops::Range;

/// A read-only matrix: element `(i, j)` is `data[i·row_stride + j·col_stride]`.
#[derive(Clone, Copy)]
pub struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// A matrix whose rows follow each other without gaps.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols, 1)
    }

    /// A matrix with any strides. Panics if its last element lies outside `data`: shapes are checked before this level.
    pub fn strided(data: &'a [T], rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * row_stride + (cols - 1) * col_stride < data.len(), "matrix view outside its data");
        Mat { data, rows, cols, row_stride, col_stride }
    }

    /// The transpose, without copying.
    pub fn t(self) -> Self {
        Mat { data: self.data, rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// The distance between rows.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }
    /// The distance between columns.
    pub fn col_stride(&self) -> usize {
        self.col_stride
    }
    /// The elements from `(0, 0)` on.
    pub fn data(&self) -> &'a [T] {
        self.data
    }

    /// Rows `from..from + rows`.
    pub fn rows_from(self, from: usize, rows: usize) -> Self {
        assert!(from + rows <= self.rows);
        let start = if rows == 0 || self.cols == 0 { 0 } else { from * self.row_stride };
        Mat { data: &self.data[start..], rows, ..self }
    }

    /// Columns `from..from + cols`.
    pub fn cols_from(self, from: usize, cols: usize) -> Self {
        self.t().rows_from(from, cols).t()
    }
}

/// A left operand whose rows a product asks for, a few at a time.
pub trait Rows<T>: Sync {
    /// The number of rows.
    fn rows(&self) -> usize;
    /// The number of columns.
    fn cols(&self) -> usize;
    /// Columns `cols` of row `r` of `rows`, to the elements of `out` from `(r − rows.start) · stride` on.
    fn copy(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [T], stride: usize);
}

/// A matrix to write: rows are contiguous, `row_stride` apart.
pub struct MatMut<'a, T> {
    data: &'a mut [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a, T> MatMut<'a, T> {
    /// A matrix whose rows follow each other without gaps.
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A matrix whose rows are `row_stride ≥ cols` apart. Panics if its last element lies outside `data`.
    pub fn strided(data: &'a mut [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * row_stride + cols <= data.len(), "matrix view outside its data");
        assert!(rows <= 1 || row_stride >= cols, "rows of an output overlap");
        MatMut { data, rows, cols, row_stride }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// The distance between rows.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }
    /// The elements from `(0, 0)` on.
    pub fn data(&mut self) -> &mut [T] {
        self.data
    }

    /// Rows `from..from + rows`.
    pub fn rows_from(&mut self, from: usize, rows: usize) -> MatMut<'_, T> {
        assert!(from + rows <= self.rows);
        let start = if rows == 0 || self.cols == 0 { 0 } else { from * self.row_stride };
        MatMut { data: &mut self.data[start..], rows, cols: self.cols, row_stride: self.row_stride }
    }
}
