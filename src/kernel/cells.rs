//! Cells of tokens: a convolution whose kernel is its stride, and the mean, over tokens found by index.
//!
//! A cell is `area` tokens of an image, named by their rows, a number beyond them standing for a token that is not there (zeros). No
//! token lies in two cells. So the same kernels serve whole maps and the visible tokens of a masked one.

use rayon::prelude::*;

use super::{chunk_rows, get, put};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::Float;

/// The sizes that all functions here share.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Images.
    pub batch: usize,
    /// Tokens per image.
    pub tokens: usize,
    /// Tokens per cell.
    pub area: usize,
    /// Channels of a token.
    pub width: usize,
}

/// Channels copied at a time: what they touch of a cell's row stays in L1.
const BLOCK: usize = 16;

/// Row `cell` of image b of `out` `[batch, cells, width · area]` ← the cell's tokens of `x` `[batch, tokens, width]`, in the order (channel,
/// place in the cell): that of a convolution weight.
pub fn gather<T: Float>(out: &mut [T], x: &[T], cells: &[u32], sizes: Sizes) {
    let Sizes { batch, tokens, area, width } = sizes;
    let (count, row) = (cells.len() / area.max(1), width * area);
    assert!(x.len() == batch * tokens * width && out.len() == batch * count * row);
    if out.is_empty() {
        return;
    }
    let chunk = chunk_rows(row);
    out.par_chunks_mut(chunk * row).enumerate().for_each(|(c, out)| {
        for (i, out) in out.chunks_exact_mut(row).enumerate() {
            let (b, cell) = ((c * chunk + i) / count, (c * chunk + i) % count);
            let cell = &cells[cell * area..(cell + 1) * area];
            for first in (0..width).step_by(BLOCK) {
                let channels = first..(first + BLOCK).min(width);
                for (k, &token) in cell.iter().enumerate() {
                    let places = out[channels.start * area + k..].iter_mut().step_by(area);
                    if (token as usize) < tokens {
                        let from = (b * tokens + token as usize) * width;
                        places.zip(&x[from + channels.start..from + channels.end]).for_each(|(y, x)| *y = *x);
                    } else {
                        places.take(channels.len()).for_each(|y| *y = T::ZERO);
                    }
                }
            }
        }
    });
}

/// The place of every token: its cell times `area` plus its place in the cell; a number beyond all for a token in none.
fn places(cells: &[u32], tokens: usize) -> Vec<u32> {
    let mut places = vec![u32::MAX; tokens];
    for (place, &token) in cells.iter().enumerate().filter(|(_, token)| (**token as usize) < tokens) {
        places[token as usize] = place as u32;
    }
    places
}

/// The adjoint of [`gather`]: added to `dx`.
pub fn gather_backward<T: Float>(dx: &mut [T], dy: &[T], cells: &[u32], sizes: Sizes) {
    let Sizes { batch, tokens, area, width } = sizes;
    let (count, row) = (cells.len() / area.max(1), width * area);
    assert!(dx.len() == batch * tokens * width && dy.len() == batch * count * row);
    if dy.is_empty() || dx.is_empty() {
        return;
    }
    let (places, chunk) = (places(cells, tokens), chunk_rows(width));
    dx.par_chunks_mut(chunk * width).enumerate().for_each(|(c, dx)| {
        for first in (0..width).step_by(BLOCK) {
            for (i, dx) in dx.chunks_exact_mut(width).enumerate() {
                let (b, token) = ((c * chunk + i) / tokens, (c * chunk + i) % tokens);
                let place = places[token] as usize;
                if place < cells.len() {
                    let from = (b * count + place / area) * row + first * area + place % area;
                    dx[first..].iter_mut().take(BLOCK).zip(dy[from..].iter().step_by(area)).for_each(|(x, y)| *x += *y);
                }
            }
        }
    });
}

struct AddRow<'a, T> {
    out: &'a mut [T],
    x: &'a [T],
    factor: T,
}

impl<T: Float> Kernel<T> for AddRow<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let factor = V::splat(self.factor);
        let mut j = 0;
        while j < self.out.len() {
            put(get::<T, V>(self.x, j, T::ZERO).mul_add(factor, get(self.out, j, T::ZERO)), self.out, j);
            j += LANES;
        }
    }
}

/// The mean of every cell: `out` `[batch, cells, width]`. A token that is not there counts as zeros.
pub fn mean<T: Float>(out: &mut [T], x: &[T], cells: &[u32], sizes: Sizes) {
    let Sizes { batch, tokens, area, width } = sizes;
    let count = cells.len() / area.max(1);
    assert!(x.len() == batch * tokens * width && out.len() == batch * count * width);
    if out.is_empty() {
        return;
    }
    let (chunk, factor) = (chunk_rows(width * area), T::ONE / T::of(area));
    out.par_chunks_mut(chunk * width).enumerate().for_each(|(c, out)| {
        for (i, out) in out.chunks_exact_mut(width).enumerate() {
            let (b, cell) = ((c * chunk + i) / count, (c * chunk + i) % count);
            out.fill(T::ZERO);
            for &token in cells[cell * area..(cell + 1) * area].iter().filter(|token| (**token as usize) < tokens) {
                let from = (b * tokens + token as usize) * width;
                T::dispatch(AddRow { out, x: &x[from..from + width], factor });
            }
        }
    });
}

/// The adjoint of [`mean`]: added to `dx`.
pub fn mean_backward<T: Float>(dx: &mut [T], dy: &[T], cells: &[u32], sizes: Sizes) {
    let Sizes { batch, tokens, area, width } = sizes;
    let count = cells.len() / area.max(1);
    assert!(dx.len() == batch * tokens * width && dy.len() == batch * count * width);
    if dy.is_empty() || dx.is_empty() {
        return;
    }
    let (places, chunk, factor) = (places(cells, tokens), chunk_rows(width), T::ONE / T::of(area));
    dx.par_chunks_mut(chunk * width).enumerate().for_each(|(c, dx)| {
        for (i, dx) in dx.chunks_exact_mut(width).enumerate() {
            let (b, token) = ((c * chunk + i) / tokens, (c * chunk + i) % tokens);
            let place = places[token] as usize;
            if place < cells.len() {
                let from = (b * count + place / area) * width;
                T::dispatch(AddRow { out: dx, x: &dy[from..from + width], factor });
            }
        }
    });
}
