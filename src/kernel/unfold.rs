//! Overlapping windows of a map as rows (unfold, im2col) and their adjoint (fold), a band of window rows at a time.
//!
//! Forward `y[(oy, ox), (c, i, j)] = x[c, oy·s + i − p, ox·s + j − p]`, 0 outside the map; backward every window adds its
//! gradient to the pixels it was read from, in the order of the windows.

use std::ops::Range;

use rayon::prelude::*;

use super::{get, put};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

/// How the values of an image lie, and in which order a window's values follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `[C, H, W]`; windows are (channel, row, column).
    Planes,
    /// `[H, W, C]`; windows are (row, column, channel): whole pixels are moved.
    Pixels,
}

/// Square windows over a map.
#[derive(Clone, Copy, Debug)]
pub struct Unfold {
    /// Side k of a window.
    pub kernel: usize,
    /// Distance s between windows.
    pub stride: usize,
    /// Zeros p around the map.
    pub padding: usize,
    /// Channels C.
    pub chans: usize,
    /// Rows and columns of the map.
    pub map: [usize; 2],
    /// Rows and columns of windows.
    pub grid: [usize; 2],
    /// The order of image and window.
    pub order: Order,
}

/// Windows per band, about.
const BAND: usize = 128;

impl Unfold {
    /// The values of a window.
    pub fn width(&self) -> usize {
        self.chans * self.kernel * self.kernel
    }

    /// The windows of an image.
    pub fn windows(&self) -> usize {
        self.grid[0] * self.grid[1]
    }

    /// The values of an image.
    pub fn image(&self) -> usize {
        self.chans * self.map[0] * self.map[1]
    }

    /// Rows of windows per band.
    fn lines(&self) -> usize {
        (BAND / self.grid[1].max(1)).clamp(1, self.grid[0].max(1))
    }

    /// Bands per image.
    pub fn bands(&self) -> usize {
        self.grid[0].div_ceil(self.lines())
    }

    /// The window rows of a band.
    fn band(&self, index: usize) -> Range<usize> {
        index * self.lines()..((index + 1) * self.lines()).min(self.grid[0])
    }

    /// The windows of a band.
    pub fn band_windows(&self, index: usize) -> Range<usize> {
        let lines = self.band(index);
        lines.start * self.grid[1]..lines.end * self.grid[1]
    }

    /// The map rows that a band reads.
    fn band_rows(&self, index: usize) -> Range<usize> {
        let lines = self.band(index);
        let at = |row: usize| row.saturating_sub(self.padding).min(self.map[0]);
        at(lines.start * self.stride)..at((lines.end.max(1) - 1) * self.stride + self.kernel)
    }

    /// The values of a band's gradient, of any band.
    pub fn band_len(&self) -> usize {
        ((self.lines() - 1) * self.stride + self.kernel).min(self.map[0]) * self.map[1] * self.chans
    }

    /// The columns of a window that lie in the map, for window column `ox`.
    fn columns(&self, ox: usize) -> Range<usize> {
        let first = ox * self.stride;
        self.padding.saturating_sub(first).min(self.kernel)..(self.map[1] + self.padding).saturating_sub(first).min(self.kernel)
    }

    /// Calls `each(window, kernel row, map row, kernel columns, first map column)` for every window row inside the map of a band;
    /// windows count from the start of the band.
    #[inline(always)]
    fn walk(&self, band: usize, mut each: impl FnMut(usize, usize, usize, Range<usize>, usize)) {
        for (line, oy) in self.band(band).enumerate() {
            for ox in 0..self.grid[1] {
                let columns = self.columns(ox);
                if columns.is_empty() {
                    continue;
                }
                let x = ox * self.stride + columns.start - self.padding;
                for i in 0..self.kernel {
                    let Some(y) = (oy * self.stride + i).checked_sub(self.padding).filter(|&y| y < self.map[0]) else { continue };
                    each(line * self.grid[1] + ox, i, y, columns.clone(), x);
                }
            }
        }
    }

    /// The windows of a band of one image as rows.
    pub fn gather<T: Float>(&self, out: &mut [T], image: &[T], band: usize) {
        let (k, c, width, [h, w]) = (self.kernel, self.chans, self.width(), self.map);
        assert!(image.len() == self.image() && out.len() == self.band_windows(band).len() * width);
        // Only windows over the border have values that no pixel fills.
        let inside = |n: usize, side: usize, last: usize| n * self.stride >= self.padding && last <= side + self.padding;
        let lines = self.band(band);
        for (window, row) in out.chunks_exact_mut(width.max(1)).enumerate() {
            let (oy, ox) = (lines.start + window / self.grid[1], window % self.grid[1]);
            if !inside(oy, h, oy * self.stride + k) || !inside(ox, w, ox * self.stride + k) {
                row.fill(T::ZERO);
            }
        }
        self.walk(band, |window, i, y, columns, x| {
            let row = &mut out[window * width..(window + 1) * width];
            match self.order {
                Order::Planes => {
                    for ch in 0..c {
                        let from = (ch * h + y) * w + x;
                        let to = (ch * k + i) * k;
                        row[to + columns.start..to + columns.end].copy_from_slice(&image[from..from + columns.len()]);
                    }
                }
                Order::Pixels => {
                    let from = (y * w + x) * c;
                    let to = i * k * c;
                    row[to + columns.start * c..to + columns.end * c].copy_from_slice(&image[from..from + columns.len() * c]);
                }
            }
        });
    }

    /// The gradient of the map rows that a band reads, from that of its windows: overwrites `out` (of [`band_len`](Self::band_len)).
    pub fn scatter<T: Float>(&self, out: &mut [T], windows: &[T], band: usize) {
        let rows = self.band_rows(band);
        let len = rows.len() * self.map[1] * self.chans;
        assert!(windows.len() == self.band_windows(band).len() * self.width());
        out[..len].fill(T::ZERO);
        T::dispatch(Scatter { unfold: self, out: &mut out[..len], windows, band, rows });
    }

    /// The gradient of `batch` images from those of all their bands ([`scatter`](Self::scatter), `band_len` apart, band after band).
    pub fn join<T: Float>(&self, images: &mut [T], parts: &[T], batch: usize) {
        let [h, w] = self.map;
        assert!(images.len() == batch * self.image() && parts.len() == batch * self.bands() * self.band_len());
        if images.is_empty() {
            return;
        }
        // A run is a row of one plane, or of pixels.
        let (run, planes) = match self.order {
            Order::Planes => (w, self.chans),
            Order::Pixels => (w * self.chans, 1),
        };
        images.par_chunks_mut(run).enumerate().for_each(|(index, out)| {
            let (b, plane, y) = (index / (planes * h), index / h % planes, index % h);
            out.fill(T::ZERO);
            for band in 0..self.bands() {
                let rows = self.band_rows(band);
                if rows.contains(&y) {
                    let from = (b * self.bands() + band) * self.band_len() + (plane * rows.len() + y - rows.start) * run;
                    for (o, &d) in out.iter_mut().zip(&parts[from..from + run]) {
                        *o += d;
                    }
                }
            }
        });
    }

    /// All windows of `batch` images: `[batch, windows, width]`.
    pub fn unfold<T: Float>(&self, out: &mut [T], images: &[T], batch: usize) {
        assert!(out.len() == batch * self.windows() * self.width());
        if out.is_empty() {
            return;
        }
        let line = self.grid[1] * self.width();
        out.par_chunks_mut(self.windows() * self.width()).zip(images.par_chunks(self.image())).for_each(|(out, image)| {
            out.par_chunks_mut(self.lines() * line).enumerate().for_each(|(band, out)| self.gather(out, image, band));
        });
    }

    /// The adjoint of [`unfold`](Self::unfold).
    pub fn fold<T: Float>(&self, images: &mut [T], windows: &[T], batch: usize) {
        assert!(windows.len() == batch * self.windows() * self.width());
        if images.is_empty() {
            return;
        }
        let (bands, len) = (self.bands(), self.band_len());
        let mut parts = Buffer::<T>::scratch(batch * bands * len);
        parts.par_chunks_mut(len).enumerate().for_each(|(index, part)| {
            let (b, band) = (index / bands, index % bands);
            let at = self.band_windows(band);
            let first = b * self.windows();
            self.scatter(part, &windows[(first + at.start) * self.width()..(first + at.end) * self.width()], band);
        });
        self.join(images, &parts, batch);
    }
}

struct Scatter<'a, T> {
    unfold: &'a Unfold,
    out: &'a mut [T],
    windows: &'a [T],
    band: usize,
    rows: Range<usize>,
}

impl<T: Float> Kernel<T> for Scatter<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let Unfold { kernel: k, chans: c, map: [_, w], order, .. } = *self.unfold;
        let width = self.unfold.width();
        self.unfold.walk(self.band, |window, i, y, columns, x| {
            let (row, y) = (&self.windows[window * width..(window + 1) * width], y - self.rows.start);
            match order {
                Order::Planes => {
                    for ch in 0..c {
                        let (to, from) = ((ch * self.rows.len() + y) * w + x, (ch * k + i) * k);
                        let out = &mut self.out[to..to + columns.len()];
                        for (o, &d) in out.iter_mut().zip(&row[from + columns.start..from + columns.end]) {
                            *o += d;
                        }
                    }
                }
                Order::Pixels => {
                    let (to, from) = ((y * w + x) * c, i * k * c);
                    let d = &row[from + columns.start * c..from + columns.end * c];
                    let out = &mut self.out[to..to + d.len()];
                    let mut j = 0;
                    while j < d.len() {
                        put(get::<T, V>(out, j, T::ZERO) + get(d, j, T::ZERO), out, j);
                        j += LANES;
                    }
                }
            }
        });
    }
}
