//! Statistics over the rows of each image, per channel, and what norms over maps do with them.
//!
//! `x` is `[images, rows, channels]`. BatchNorm sees one image of all rows; GroupNorm merges the channels of a group.

use rayon::prelude::*;

use super::{get, put};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

/// The sizes of `x`.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Images: rows of different ones are never summed.
    pub images: usize,
    /// Rows of an image.
    pub rows: usize,
    /// Channels.
    pub channels: usize,
}

impl Rows {
    /// Rows per partial sum: some 64 KiB, and at most 64 parts.
    fn chunk(&self) -> usize {
        (16_384 / self.channels.max(1)).max(self.rows.div_ceil(64)).max(1)
    }

    fn parts(&self) -> usize {
        self.rows.div_ceil(self.chunk())
    }

    fn check<T>(&self, x: &[T]) {
        assert_eq!(x.len(), self.images * self.rows * self.channels);
    }

    /// Part `index` of all: its image and its elements.
    fn part<'a, T>(&self, x: &'a [T], index: usize) -> (usize, &'a [T]) {
        let (image, first) = (index / self.parts(), index % self.parts() * self.chunk());
        let last = (first + self.chunk()).min(self.rows);
        (image, &x[(image * self.rows + first) * self.channels..(image * self.rows + last) * self.channels])
    }
}

/// What is summed over rows: sixteen channels from one on. (Methods: a closure need not be inlined into a kernel compiled for AVX.)
#[derive(Clone, Copy)]
enum Term<'a, T, V> {
    /// x.
    Value(&'a [T]),
    /// `(x − center)²`.
    Square(&'a [T], V),
    /// `dy (x − center)`.
    Product(&'a [T], &'a [T], V),
}

impl<T: Float, V: Vector<T>> Term<'_, T, V> {
    /// `acc` and the term of the row that begins at `from`.
    #[inline(always)]
    fn add(self, from: usize, lanes: usize, acc: V) -> V {
        match self {
            Term::Value(x) => acc + at::<T, V>(x, from, lanes),
            Term::Square(x, center) => {
                let d = at::<T, V>(x, from, lanes) - center;
                d.mul_add(d, acc)
            }
            Term::Product(dy, x, center) => at::<T, V>(dy, from, lanes).mul_add(at::<T, V>(x, from, lanes) - center, acc),
        }
    }

    /// The sum over rows of `channels`, for those from `j` on, in four interleaved sums per 32 rows, added up block by block: short
    /// chains round little.
    #[inline(always)]
    fn sum(self, rows: usize, channels: usize, j: usize) -> V {
        let lanes = LANES.min(channels - j);
        let mut total = V::splat(T::ZERO);
        for first in (0..rows).step_by(32) {
            let last = (first + 32).min(rows);
            let mut acc = [V::splat(T::ZERO); 4];
            let mut r = first;
            while r + 4 <= last {
                acc[0] = self.add(r * channels + j, lanes, acc[0]);
                acc[1] = self.add((r + 1) * channels + j, lanes, acc[1]);
                acc[2] = self.add((r + 2) * channels + j, lanes, acc[2]);
                acc[3] = self.add((r + 3) * channels + j, lanes, acc[3]);
                r += 4;
            }
            while r < last {
                acc[0] = self.add(r * channels + j, lanes, acc[0]);
                r += 1;
            }
            total = total + ((acc[0] + acc[1]) + (acc[2] + acc[3]));
        }
        total
    }
}

/// The `lanes` elements from `from`.
#[inline(always)]
fn at<T: Float, V: Vector<T>>(x: &[T], from: usize, lanes: usize) -> V {
    get(&x[from..from + lanes], 0, T::ZERO)
}

/// Mean and squared deviations of some rows.
struct Moments<'a, T> {
    mean: &'a mut [T],
    squares: &'a mut [T],
    x: &'a [T],
}

impl<T: Float> Kernel<T> for Moments<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let channels = self.mean.len();
        let rows = self.x.len() / channels;
        for j in (0..channels).step_by(LANES) {
            let mean = Term::<T, V>::Value(self.x).sum(rows, channels, j) / V::splat(T::of(rows));
            let squares = Term::Square(self.x, mean).sum(rows, channels, j);
            put(mean, self.mean, j);
            put(squares, self.squares, j);
        }
    }
}

/// Mean μ and sum of squared deviations `Σ (x − μ)²` of every image and channel, `[images, channels]` each: two passes over chunks
/// that stay in cache, merged in order (Chan, Golub & LeVeque).
pub fn moments<T: Float>(mean: &mut [T], squares: &mut [T], x: &[T], rows: Rows) {
    rows.check(x);
    let (channels, parts) = (rows.channels, rows.parts());
    assert!(mean.len() == rows.images * channels && squares.len() == mean.len());
    if x.is_empty() {
        return;
    }
    let mut partial = Buffer::<T>::scratch(rows.images * parts * 2 * channels);
    partial.par_chunks_mut(2 * channels).enumerate().for_each(|(index, partial)| {
        let (mean, squares) = partial.split_at_mut(channels);
        T::dispatch(Moments { mean, squares, x: rows.part(x, index).1 });
    });
    for (image, (mean, squares)) in mean.chunks_exact_mut(channels).zip(squares.chunks_exact_mut(channels)).enumerate() {
        for (index, part) in partial[image * parts * 2 * channels..][..parts * 2 * channels].chunks_exact(2 * channels).enumerate() {
            if index == 0 {
                mean.copy_from_slice(&part[..channels]);
                squares.copy_from_slice(&part[channels..]);
                continue;
            }
            let before = index * rows.chunk();
            let here = rows.chunk().min(rows.rows - before);
            for c in 0..channels {
                merge((&mut mean[c], &mut squares[c], before), (part[c], part[channels + c], here));
            }
        }
    }
}

/// Mean and squared deviations of two samples together; the first becomes the result.
pub fn merge<T: Float>((mean, squares, n): (&mut T, &mut T, usize), (mean_b, squares_b, n_b): (T, T, usize)) {
    let delta = mean_b - *mean;
    let share = T::of(n_b) / T::of(n + n_b);
    *mean = delta.fused(share, *mean);
    *squares += squares_b + delta * delta * (T::of(n) * share);
}

struct Normalize<'a, T> {
    y: &'a mut [T],
    x: &'a [T],
    center: &'a [T],
    scale: &'a [T],
    shift: &'a [T],
    relu: bool,
}

impl<T: Float> Kernel<T> for Normalize<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let channels = self.center.len();
        let zero = V::splat(T::ZERO);
        for (y, x) in self.y.chunks_exact_mut(channels).zip(self.x.chunks_exact(channels)) {
            let mut j = 0;
            while j < channels {
                let d = get::<T, V>(x, j, T::ZERO) - get(self.center, j, T::ZERO);
                let v = d.mul_add(get(self.scale, j, T::ZERO), get(self.shift, j, T::ZERO));
                put(if self.relu { v.max(zero) } else { v }, y, j);
                j += LANES;
            }
        }
    }
}

/// `y = (x − center) scale + shift`, then `max(y, 0)` if `relu`. `center` and `scale` are `[images, channels]`, `shift` `[channels]`.
pub fn normalize<T: Float>(y: &mut [T], x: &[T], center: &[T], scale: &[T], shift: &[T], rows: Rows, relu: bool) {
    rows.check(x);
    assert!(y.len() == x.len() && center.len() == rows.images * rows.channels && scale.len() == center.len());
    if x.is_empty() {
        return;
    }
    let (image, chunk) = (rows.rows * rows.channels, super::chunk_rows(rows.channels) * rows.channels);
    y.par_chunks_mut(image).zip(x.par_chunks(image)).enumerate().for_each(|(b, (y, x))| {
        let of_image = b * rows.channels..(b + 1) * rows.channels;
        y.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).for_each(|(y, x)| {
            T::dispatch(Normalize { y, x, center: &center[of_image.clone()], scale: &scale[of_image.clone()], shift, relu });
        });
    });
}

struct Sums<'a, T> {
    sum: &'a mut [T],
    sum_d: &'a mut [T],
    x: &'a [T],
    dy: &'a [T],
    center: &'a [T],
}

impl<T: Float> Kernel<T> for Sums<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let channels = self.center.len();
        let rows = self.x.len() / channels;
        for j in (0..channels).step_by(LANES) {
            let center = get::<T, V>(self.center, j, T::ZERO);
            put(Term::<T, V>::Value(self.dy).sum(rows, channels, j), self.sum, j);
            put(Term::Product(self.dy, self.x, center).sum(rows, channels, j), self.sum_d, j);
        }
    }
}

/// `Σ dy` and `Σ dy (x − center)` of every image and channel, `[images, channels]` each.
pub fn sums<T: Float>(sum: &mut [T], sum_d: &mut [T], x: &[T], dy: &[T], center: &[T], rows: Rows) {
    rows.check(x);
    let (channels, parts) = (rows.channels, rows.parts());
    assert!(dy.len() == x.len() && sum.len() == rows.images * channels && sum_d.len() == sum.len() && center.len() == sum.len());
    sum.fill(T::ZERO);
    sum_d.fill(T::ZERO);
    if x.is_empty() {
        return;
    }
    let mut partial = Buffer::<T>::scratch(rows.images * parts * 2 * channels);
    partial.par_chunks_mut(2 * channels).enumerate().for_each(|(index, partial)| {
        let (sum, sum_d) = partial.split_at_mut(channels);
        let (image, x) = rows.part(x, index);
        let center = &center[image * channels..(image + 1) * channels];
        T::dispatch(Sums { sum, sum_d, x, dy: rows.part(dy, index).1, center });
    });
    for (index, part) in partial.chunks_exact(2 * channels).enumerate() {
        let of_image = index / parts * channels..(index / parts + 1) * channels;
        for (total, &p) in sum[of_image.clone()].iter_mut().zip(&part[..channels]) {
            *total += p;
        }
        for (total, &p) in sum_d[of_image].iter_mut().zip(&part[channels..]) {
            *total += p;
        }
    }
}

struct Gradient<'a, T> {
    dx: &'a mut [T],
    x: &'a [T],
    dy: &'a [T],
    center: &'a [T],
    factors: [&'a [T]; 3],
}

impl<T: Float> Kernel<T> for Gradient<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let channels = self.center.len();
        let [a, b, c] = self.factors;
        for ((dx, x), dy) in self.dx.chunks_exact_mut(channels).zip(self.x.chunks_exact(channels)).zip(self.dy.chunks_exact(channels)) {
            let mut j = 0;
            while j < channels {
                let d = get::<T, V>(x, j, T::ZERO) - get(self.center, j, T::ZERO);
                let g = get::<T, V>(dy, j, T::ZERO);
                let v = g.mul_add(get(a, j, T::ZERO), -get::<T, V>(b, j, T::ZERO));
                put((-d).mul_add(get(c, j, T::ZERO), v), dx, j);
                j += LANES;
            }
        }
    }
}

/// `dx = a dy − b − (x − center) c`, with all of `center`, `a`, `b`, `c` `[images, channels]`.
pub fn gradient<T: Float>(dx: &mut [T], x: &[T], dy: &[T], center: &[T], [a, b, c]: [&[T]; 3], rows: Rows) {
    rows.check(x);
    assert!(dx.len() == x.len() && dy.len() == x.len() && [a, b, c].iter().all(|f| f.len() == center.len()));
    if x.is_empty() {
        return;
    }
    let (image, chunk) = (rows.rows * rows.channels, super::chunk_rows(rows.channels) * rows.channels);
    dx.par_chunks_mut(image).zip(x.par_chunks(image)).zip(dy.par_chunks(image)).enumerate().for_each(|(index, ((dx, x), dy))| {
        let at = index * rows.channels..(index + 1) * rows.channels;
        dx.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).zip(dy.par_chunks(chunk)).for_each(|((dx, x), dy)| {
            let factors = [&a[at.clone()], &b[at.clone()], &c[at.clone()]];
            T::dispatch(Gradient { dx, x, dy, center: &center[at.clone()], factors });
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_of_many_chunks() {
        // 20 000 rows of 3 channels are several parts; the mean is far from zero.
        let rows = Rows { images: 2, rows: 20_000, channels: 3 };
        assert!(rows.parts() > 1);
        let x: Vec<f64> = (0..2 * 20_000 * 3).map(|i| 1000.0 + (i % 3) as f64 + libm::sin(i as f64)).collect();
        let (mut mean, mut squares) = ([0.0; 6], [0.0; 6]);
        moments(&mut mean, &mut squares, &x, rows);
        for image in 0..2 {
            for c in 0..3 {
                let all: Vec<f64> = (0..20_000).map(|r| x[(image * 20_000 + r) * 3 + c]).collect();
                let mu = all.iter().sum::<f64>() / 20_000.0;
                let dev: f64 = all.iter().map(|x| (x - mu) * (x - mu)).sum();
                assert!((mean[image * 3 + c] - mu).abs() < 1e-9 && (squares[image * 3 + c] - dev).abs() < 1e-6 * dev);
            }
        }
    }
}
