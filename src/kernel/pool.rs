//! Maximum over windows, in token layout. Averages are in [`resize`](super::resize): they are linear.
//!
//! `y = max` over the window restricted to the map; the gradient goes to the first maximum in row-major order. It is found again in
//! the backward pass: nothing is kept but `x`.

use super::maps::{Map, MapMut};
use super::{get, put};
use crate::linalg::ColumnsMut;
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::Float;

/// Square windows: output `(i, j)` looks at rows `i · stride − padding …` and columns likewise, `kernel` of each.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Side.
    pub kernel: usize,
    /// Step.
    pub stride: usize,
    /// Rows and columns beyond the border that a window may begin or end at.
    pub padding: usize,
}

impl Window {
    /// The number of windows along `side`, if there is one and none lies wholly outside.
    pub fn outputs(&self, side: usize) -> Option<usize> {
        let Window { kernel, stride, padding } = *self;
        if kernel == 0 || stride == 0 || 2 * padding > kernel {
            return None;
        }
        Some((side + 2 * padding).checked_sub(kernel)? / stride + 1).filter(|_| side > 0)
    }

    fn range(&self, o: usize, side: usize) -> std::ops::Range<usize> {
        let from = (o * self.stride).saturating_sub(self.padding);
        from..(o * self.stride + self.kernel).saturating_sub(self.padding).min(side)
    }
}

#[inline(always)]
fn largest<T: Float, V: Vector<T>>(
    x: &Map<T>,
    b: usize,
    c: usize,
    rows: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
    channels: usize,
) -> V {
    let mut best = V::splat(T::NEG_INFINITY);
    for y in rows {
        for x_at in cols.clone() {
            best = get::<T, V>(x.pixel(b, y, x_at, c, channels), 0, T::NEG_INFINITY).max(best);
        }
    }
    best
}

struct Forward<'a, T> {
    out: ColumnsMut<'a, T>,
    x: Map<'a, T>,
    image: usize,
    row: usize,
    channel: usize,
    window: Window,
}

impl<T: Float> Kernel<T> for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let [_, height, width, _] = self.x.size();
        let channels = self.out.width();
        let rows = self.window.range(self.row, height);
        for j in 0..self.out.rows() {
            let cols = self.window.range(j, width);
            let out = self.out.row(j);
            let mut c = 0;
            while c < channels {
                let part = LANES.min(channels - c);
                put(largest::<T, V>(&self.x, self.image, self.channel + c, rows.clone(), cols.clone(), part), out, c);
                c += LANES;
            }
        }
    }
}

/// The maximum over every window.
pub fn max<T: Float>(y: MapMut<T>, x: Map<T>, window: Window) {
    let ([batch, oh, ow, channels], [b, h, w, c]) = (y.size(), x.size());
    assert!((batch, channels) == (b, c) && window.outputs(h) == Some(oh) && window.outputs(w) == Some(ow));
    y.par_tiles(1, 64, |image, row, channel, out| T::dispatch(Forward { out, x, image, row, channel, window }));
}

struct Backward<'a, T> {
    /// All pixels of an image, a few channels.
    dx: ColumnsMut<'a, T>,
    x: Map<'a, T>,
    dy: Map<'a, T>,
    image: usize,
    channel: usize,
    window: Window,
}

impl<T: Float> Kernel<T> for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let ([_, height, width, _], [_, oh, ow, _]) = (self.x.size(), self.dy.size());
        let (b, c, channels) = (self.image, self.channel, self.dx.width());
        let zero = V::splat(T::ZERO);
        for r in 0..self.dx.rows() {
            self.dx.row(r).fill(T::ZERO);
        }
        for i in 0..oh {
            let rows = self.window.range(i, height);
            for j in 0..ow {
                let cols = self.window.range(j, width);
                let best: V = largest(&self.x, b, c, rows.clone(), cols.clone(), channels);
                // What no earlier pixel of the window has taken.
                let mut left = get::<T, V>(self.dy.pixel(b, i, j, c, channels), 0, T::ZERO);
                for y in rows.clone() {
                    for x_at in cols.clone() {
                        let x = get::<T, V>(self.x.pixel(b, y, x_at, c, channels), 0, T::ZERO);
                        let dx = self.dx.row(y * width + x_at);
                        put(get::<T, V>(dx, 0, T::ZERO) + x.less(best, zero, left), dx, 0);
                        left = x.less(best, left, zero);
                    }
                }
            }
        }
    }
}

/// The gradient of [`max`]; `dx` is written.
pub fn max_backward<T: Float>(dx: MapMut<T>, x: Map<T>, dy: Map<T>, window: Window) {
    let ([b, oh, ow, c], size @ [_, h, w, _]) = (dy.size(), x.size());
    assert!(dx.size() == size && (size[0], size[3]) == (b, c) && window.outputs(h) == Some(oh) && window.outputs(w) == Some(ow));
    dx.par_tiles(h.max(1), LANES, |image, _, channel, dx| T::dispatch(Backward { dx, x, dy, image, channel, window }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_maximum_takes_the_gradient() {
        // All equal: the first pixel of every window takes it; windows overlap.
        let window = Window { kernel: 3, stride: 2, padding: 1 };
        let x = vec![1.0f32; 5 * 3 * 18];
        let (mut y, mut dx) = (vec![0.0; 3 * 2 * 18], vec![f32::NAN; x.len()]);
        max(MapMut::new(&mut y, [1, 3, 2, 18]), Map::new(&x, [1, 5, 3, 18]), window);
        assert!(y.iter().all(|&y| y == 1.0));
        let dy = vec![1.0; y.len()];
        max_backward(MapMut::new(&mut dx, [1, 5, 3, 18]), Map::new(&x, [1, 5, 3, 18]), Map::new(&dy, [1, 3, 2, 18]), window);
        for (pixel, dx) in dx.chunks_exact(18).enumerate() {
            let (row, col) = (pixel / 3, pixel % 3);
            let expected = if (row == 0 || row % 2 == 1 && row < 4) && col < 2 { 1.0 } else { 0.0 };
            assert!(dx.iter().all(|&d| d == expected), "{row} {col} {dx:?}");
        }
    }

    #[test]
    fn outputs_of_odd_sizes() {
        let window = Window { kernel: 3, stride: 2, padding: 1 };
        assert_eq!([1, 2, 7, 8].map(|side| window.outputs(side)), [Some(1), Some(1), Some(4), Some(4)]);
        assert_eq!(Window { kernel: 3, stride: 1, padding: 0 }.outputs(2), None);
        assert_eq!(Window { kernel: 1, stride: 1, padding: 1 }.outputs(4), None);
    }
}
