//! Windows of a map as rows of a matrix, and back: what makes a convolution a matrix product.

use std::ops::Range;

use rayon::prelude::*;

use super::maps::Map;
use crate::error::{Error, Result};
use crate::linalg::Rows;
use crate::tensor::Float;

/// More padding than any network has.
const MOST_PADDING: usize = 512;

/// Where a convolution reads: output `(i, j)` and kernel position `(u, v)` meet at input
/// `(i · stride − padding + u · dilation, …)`; outside the map is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Rows and columns of the kernel.
    pub kernel: [usize; 2],
    /// Steps.
    pub stride: [usize; 2],
    /// Zeros before the first and after the last row and column.
    pub padding: [usize; 2],
    /// Distances between kernel positions.
    pub dilation: [usize; 2],
}

impl Geometry {
    /// The size of the output for a map of this size; an error unless there is one.
    pub fn outputs(&self, map: [usize; 2]) -> Result<[usize; 2]> {
        let side = |axis: usize| {
            let (kernel, stride, padding, dilation) = (self.kernel[axis], self.stride[axis], self.padding[axis], self.dilation[axis]);
            let extent = kernel.checked_sub(1)?.checked_mul(dilation)?.checked_add(1)?;
            let padded = map[axis].checked_add(padding.checked_mul(2)?)?;
            // Padding beyond the kernel's reach makes rows of nothing but bias: legal, but not without bound.
            let bounded = stride > 0 && dilation > 0 && padding <= MOST_PADDING;
            Some(padded.checked_sub(extent)?.checked_div(stride)? + 1).filter(|_| bounded)
        };
        match (side(0), side(1)) {
            (Some(h), Some(w)) => Ok([h, w]),
            _ => Err(Error::shape("input of a convolution", format!("a map that {self:?} fits"), map)),
        }
    }

    /// Positions of the kernel.
    pub fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// Whether every output sees its own input alone.
    pub fn is_pointwise(&self) -> bool {
        self.kernel == [1, 1] && self.stride == [1, 1] && self.padding == [0, 0]
    }

    /// The input row (axis 0) or column (axis 1) that output `o` and kernel position `u` meet at, if it is inside.
    #[inline(always)]
    pub fn input(&self, axis: usize, o: usize, u: usize, side: usize) -> Option<usize> {
        (o * self.stride[axis] + u * self.dilation[axis]).checked_sub(self.padding[axis]).filter(|&i| i < side)
    }

    /// The output that meets input `i` with kernel position `u`, if there is one.
    #[inline(always)]
    pub fn output(&self, axis: usize, i: usize, u: usize, side: usize) -> Option<usize> {
        let at = (i + self.padding[axis]).checked_sub(u * self.dilation[axis])?;
        Some(at / self.stride[axis]).filter(|&o| o < side && at % self.stride[axis] == 0)
    }
}

/// A stretch of output rows, counted through all images: `first..first + count`.
#[derive(Clone, Copy, Debug)]
pub struct Lines {
    /// The first.
    pub first: usize,
    /// How many.
    pub count: usize,
}

/// The matrix `[pixels, (u, v, c)]` of the inputs that every output pixel meets at `(u, v)`, channels `column..column + channels`.
#[derive(Clone, Copy)]
pub struct Windows<'a, T> {
    x: Map<'a, T>,
    column: usize,
    channels: usize,
    geometry: Geometry,
    out: [usize; 2],
}

impl<'a, T: Float> Windows<'a, T> {
    /// The windows for an output of `out` rows and columns per image.
    pub fn new(x: Map<'a, T>, [column, channels]: [usize; 2], geometry: Geometry, out: [usize; 2]) -> Self {
        assert!(column + channels <= x.size()[3]);
        Windows { x, column, channels, geometry, out }
    }

    /// The elements from `within` on in row `u` of the window of output `(i, j)` of image `b`, and those of the rows that follow.
    fn window(&self, [b, i, j]: [usize; 3], (mut u, mut within): (usize, usize), mut out: &mut [T]) {
        let Windows { x, column, channels, geometry, .. } = *self;
        let ([_, height, width, _], kw) = (x.size(), geometry.kernel[1]);
        // Where rows of pixels have no gaps, all columns of the kernel are one stretch of the input.
        let whole = (j * geometry.stride[1]).checked_sub(geometry.padding[1]);
        let whole = whole.filter(|from| geometry.dilation[1] == 1 && x.stride() == channels && from + kw <= width);
        while !out.is_empty() {
            let y = geometry.input(0, i, u, height);
            let (at, c, len) = match whole {
                _ if y.is_none() => (None, 0, kw * channels - within),
                Some(from) => (Some(from), within, kw * channels - within),
                None => (geometry.input(1, j, within / channels, width), within % channels, channels - within % channels),
            };
            let (head, tail) = out.split_at_mut(len.min(out.len()));
            match y.zip(at) {
                Some((y, at)) => head.copy_from_slice(&x.row(b, y, column)[at * x.stride() + c..][..head.len()]),
                None => head.fill(T::ZERO),
            }
            within += head.len();
            if within == kw * channels {
                (u, within) = (u + 1, 0);
            }
            out = tail;
        }
    }
}

impl<T: Float> Rows<T> for Windows<'_, T> {
    fn rows(&self) -> usize {
        self.x.size()[0] * self.out[0] * self.out[1]
    }

    fn cols(&self) -> usize {
        self.geometry.taps() * self.channels
    }

    fn copy(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [T], stride: usize) {
        let [oh, ow] = self.out;
        let row = self.geometry.kernel[1] * self.channels;
        let start = (cols.start / row, cols.start % row);
        let line = rows.start / ow;
        let (mut b, mut i, mut j) = (line / oh, line % oh, rows.start % ow);
        for out in out.chunks_mut(stride).take(rows.len()) {
            self.window([b, i, j], start, &mut out[..cols.len()]);
            j += 1;
            if j == ow {
                (i, j) = (i + 1, 0);
            }
            if i == oh {
                (b, i) = (b + 1, 0);
            }
        }
    }
}

/// The rows of `windows` for a stretch of output rows.
pub fn im2col<T: Float>(out: &mut [T], windows: Windows<T>, lines: Lines) {
    let (ow, len) = (windows.out[1], windows.cols());
    assert!(out.len() == lines.count * ow * len);
    if out.is_empty() {
        return;
    }
    out.par_chunks_mut(ow * len).enumerate().for_each(|(line, out)| {
        let first = (lines.first + line) * ow;
        windows.copy(first..first + ow, 0..len, out, len);
    });
}

/// The adjoint of [`im2col`]: adds `cols` to the channels `column..column + channels` of `dx` `[batch, height, width, all]`.
pub fn col2im<T: Float>(
    dx: &mut [T],
    size: [usize; 4],
    cols: &[T],
    [column, channels]: [usize; 2],
    geometry: Geometry,
    lines: Lines,
    [oh, ow]: [usize; 2],
) {
    let [batch, height, width, all] = size;
    let [kh, kw] = geometry.kernel;
    let len = kh * kw * channels;
    assert!(dx.len() == batch * height * width * all && cols.len() == lines.count * ow * len && column + channels <= all);
    if dx.is_empty() || cols.is_empty() {
        return;
    }
    dx.par_chunks_mut(width * all).enumerate().for_each(|(line, dx)| {
        let (b, y) = (line / height, line % height);
        for u in 0..kh {
            let Some(i) = geometry.output(0, y, u, oh) else { continue };
            let Some(row) = (b * oh + i).checked_sub(lines.first).filter(|&row| row < lines.count) else { continue };
            for (x_at, dx) in dx.chunks_exact_mut(all).enumerate() {
                for v in 0..kw {
                    let Some(j) = geometry.output(1, x_at, v, ow) else { continue };
                    let from = (row * ow + j) * len + (u * kw + v) * channels;
                    for (a, &g) in dx[column..column + channels].iter_mut().zip(&cols[from..from + channels]) {
                        *a += g;
                    }
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_in_parts() {
        let plain = Geometry { kernel: [3, 3], stride: [1, 1], padding: [1, 1], dilation: [1, 1] };
        let odd = Geometry { kernel: [2, 4], stride: [2, 1], padding: [2, 1], dilation: [1, 2] };
        for (geometry, [column, channels]) in [(plain, [0, 5]), (plain, [1, 3]), (odd, [0, 5]), (odd, [2, 2])] {
            let size @ [batch, h, w, all] = [2, 5, 8, 5];
            let [oh, ow] = geometry.outputs([h, w]).expect("fits");
            let x: Vec<f32> = (0..batch * h * w * all).map(|i| i as f32 + 1.0).collect();
            let windows = Windows::new(Map::new(&x, size), [column, channels], geometry, [oh, ow]);
            let (rows, cols) = (windows.rows(), windows.cols());
            let defined = |row: usize, col: usize| {
                let (b, i, j) = (row / (oh * ow), row / ow % oh, row % ow);
                let (u, v, c) = (col / channels / geometry.kernel[1], col / channels % geometry.kernel[1], col % channels);
                let at = geometry.input(0, i, u, h).zip(geometry.input(1, j, v, w));
                at.map_or(0.0, |(y, x_at)| x[((b * h + y) * w + x_at) * all + column + c])
            };
            for (from, to) in [(0, rows), (ow - 1, ow + 2), (oh * ow - 3, oh * ow + 1), (rows - 1, rows)] {
                for (first, end) in [(0, cols), (1, channels + 2), (channels - 1, cols - 1), (cols - 1, cols), (3, 3)] {
                    let stride = end - first + 2;
                    let mut out = vec![f32::NAN; (to - from) * stride];
                    windows.copy(from..to, first..end, &mut out, stride);
                    for (row, out) in (from..to).zip(out.chunks(stride)) {
                        (first..end).for_each(|col| assert_eq!(out[col - first], defined(row, col), "{geometry:?} {row} {col}"));
                        assert!(out[end - first..].iter().all(|x| x.is_nan()), "written beyond the row");
                    }
                }
            }
        }
    }

    #[test]
    fn adjoint_in_blocks() {
        let geometry = Geometry { kernel: [3, 2], stride: [2, 1], padding: [1, 1], dilation: [1, 2] };
        let size @ [batch, h, w, all] = [2, 5, 4, 7];
        let out @ [oh, ow] = geometry.outputs([h, w]).expect("fits");
        assert_eq!(out, [3, 4]);
        let x: Vec<f64> = (0..batch * h * w * all).map(|i| libm::sin(i as f64)).collect();
        let len = 6 * 3;
        let mut dx = vec![0.0; x.len()];
        let (mut forward, mut backward) = (0.0, 0.0);
        for first in [0, 4] {
            let lines = Lines { first, count: if first == 0 { 4 } else { 2 } };
            let mut cols = vec![f64::NAN; lines.count * ow * len];
            im2col(&mut cols, Windows::new(Map::new(&x, size), [2, 3], geometry, out), lines);
            let g: Vec<f64> = (0..cols.len()).map(|i| libm::cos((i + first) as f64)).collect();
            forward += cols.iter().zip(&g).map(|(a, b)| a * b).sum::<f64>();
            col2im(&mut dx, size, &g, [2, 3], geometry, lines, out);
        }
        backward += dx.iter().zip(&x).map(|(a, b)| a * b).sum::<f64>();
        assert!((forward - backward).abs() < 1e-10, "{forward} {backward}");
        assert_eq!(oh * batch, 6);
    }
}
