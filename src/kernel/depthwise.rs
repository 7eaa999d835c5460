//! Depthwise convolution in token layout: every channel with its own kernel.
//!
//! `y[b, i, j, c] = β[c] + Σ_{u,v} w[u, v, c] x[b, i s − p + u d, j s − p + v d, c]`, zero outside the map. Channels run in lanes, so there are
//! no transposes; input and output may be columns of wider rows. A strip of [`STRIP`] output pixels stays in registers while the
//! kernel passes over it. Rows are cut in parallel over (image, output row), so one image is parallel too.
//!
//! `dx` of stride 1 is the same convolution of `dy` with the kernel turned by 180°; else every input gathers the outputs it met.
//! `dw[u, v, c] = Σ dy[b, i, j, c] x[…same place…, c]`, `dβ = Σ dy`: partial sums over fixed groups of rows, added in order.

use rayon::prelude::*;

use super::im2col::Geometry;
use super::maps::{Map, MapMut, transpose};
use super::{get, put};
use crate::linalg::{ColumnsMut, count_flops};
use crate::simd::{Kernel, LANES, Vector, fused_strided};
use crate::tensor::{Buffer, Float};

/// Output pixels whose sums are in registers at a time.
const STRIP: usize = 8;
/// Parts of the sums over rows in the weight gradient.
const PARTS: usize = 16;

/// A geometry as seen from the output that is computed: the padding may be negative.
#[derive(Clone, Copy)]
struct View {
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [isize; 2],
    dilation: [usize; 2],
}

impl View {
    fn new(g: Geometry) -> View {
        View { kernel: g.kernel, stride: g.stride, padding: g.padding.map(|p| p as isize), dilation: g.dilation }
    }

    /// For stride 1, the view of the input gradient on the output gradient.
    fn turned(g: Geometry) -> View {
        let padding = std::array::from_fn(|a| (g.dilation[a] * (g.kernel[a] - 1)) as isize - g.padding[a] as isize);
        View { padding, ..View::new(g) }
    }

    #[inline(always)]
    fn input(&self, axis: usize, o: usize, u: usize) -> isize {
        (o * self.stride[axis] + u * self.dilation[axis]) as isize - self.padding[axis]
    }
}

struct Forward<'a, T> {
    out: ColumnsMut<'a, T>,
    x: Map<'a, T>,
    /// `[taps, channels]`.
    weight: &'a [T],
    bias: Option<&'a [T]>,
    view: View,
    image: usize,
    /// First row of the tile and rows have this many pixels.
    row: usize,
    width: usize,
    channel: usize,
}

impl<T: Float> Kernel<T> for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let channels = self.out.width();
        let rows = self.out.rows() / self.width;
        for i in 0..rows {
            let mut c = 0;
            while c < channels {
                for j in (0..self.width).step_by(STRIP) {
                    self.strip::<V>(i, j, c);
                }
                c += LANES;
            }
        }
    }
}

impl<T: Float> Forward<'_, T> {
    #[inline(always)]
    fn strip<V: Vector<T>>(&mut self, i: usize, j: usize, c: usize) {
        let [_, height, width, all] = self.x.size();
        let ([kh, kw], view) = (self.view.kernel, self.view);
        let (at, lanes) = (self.channel + c, LANES.min(self.out.width() - c));
        let pixels = STRIP.min(self.width - j);
        let start = match self.bias {
            Some(bias) => get::<T, V>(&bias[..at + lanes], at, T::ZERO),
            None => V::splat(T::ZERO),
        };
        let mut acc = [start; STRIP];
        let step = self.x.stride() * view.stride[1];
        for u in 0..kh {
            let y = view.input(0, self.row + i, u);
            if y < 0 || y >= height as isize {
                continue;
            }
            let line = self.x.row(self.image, y as usize, at);
            for v in 0..kw {
                let w = get::<T, V>(&self.weight[..(u * kw + v) * all + at + lanes], (u * kw + v) * all + at, T::ZERO);
                let from = view.input(1, j, v);
                let last = from + ((pixels - 1) * view.stride[1]) as isize;
                if from >= 0 && last < width as isize && pixels == STRIP && lanes == LANES {
                    fused_strided(&mut acc, &line[from as usize * self.x.stride()..], step, w);
                } else {
                    for (p, acc) in acc.iter_mut().enumerate() {
                        let x = from + (p * view.stride[1]) as isize;
                        if x >= 0 && x < width as isize && p < pixels {
                            let x = &line[x as usize * self.x.stride()..];
                            let x = if lanes == LANES { V::load(x) } else { V::load_partial(&x[..lanes], T::ZERO) };
                            *acc = x.mul_add(w, *acc);
                        }
                    }
                }
            }
        }
        for (p, acc) in acc.into_iter().enumerate() {
            if p < pixels {
                put(acc, self.out.row(i * self.width + j + p), c);
            }
        }
    }
}

/// `[channels, taps]` → `[taps, channels]`, the taps in reverse order if `turned`.
fn by_tap<T: Float>(weight: &[T], taps: usize, turned: bool) -> Buffer<T> {
    let channels = weight.len() / taps;
    let mut out = Buffer::scratch(weight.len());
    transpose(&mut out, weight, 1, channels, taps);
    if turned && channels > 0 {
        for u in 0..taps / 2 {
            let (front, back) = out.split_at_mut((taps - 1 - u) * channels);
            front[u * channels..(u + 1) * channels].swap_with_slice(&mut back[..channels]);
        }
    }
    out
}

fn correlate<T: Float>(y: MapMut<T>, x: Map<T>, weight: &[T], bias: Option<&[T]>, view: View) {
    let [_, _, width, channels] = y.size();
    // Enough for the weights to pay off, few enough for many tasks.
    let rows = (8192 / (width * channels).max(1)).max(1);
    y.par_tiles(rows, channels, |image, row, channel, out| {
        T::dispatch(Forward { out, x, weight, bias, view, image, row, width, channel });
    });
}

fn check<T: Float>(y: [usize; 4], x: [usize; 4], weight: &[T], geometry: Geometry) {
    assert!(y[0] == x[0] && y[3] == x[3] && weight.len() == geometry.taps() * x[3]);
    assert!(geometry.outputs([x[1], x[2]]).is_ok_and(|out| out == [y[1], y[2]]), "a depthwise convolution of another size");
}

/// Writes `y`. `weight` is `[channels, kh, kw]`, as published.
pub fn forward<T: Float>(y: MapMut<T>, x: Map<T>, weight: &[T], bias: Option<&[T]>, geometry: Geometry) {
    check(y.size(), x.size(), weight, geometry);
    count_flops(2 * y.size().iter().product::<usize>() * geometry.taps());
    correlate(y, x, &by_tap(weight, geometry.taps(), false), bias, View::new(geometry));
}

struct Gather<'a, T> {
    dx: ColumnsMut<'a, T>,
    dy: Map<'a, T>,
    weight: &'a [T],
    geometry: Geometry,
    image: usize,
    row: usize,
    channel: usize,
}

impl<T: Float> Kernel<T> for Gather<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let ([_, oh, ow, all], [kh, kw]) = (self.dy.size(), self.geometry.kernel);
        let channels = self.dx.width();
        for x in 0..self.dx.rows() {
            let dx = self.dx.row(x);
            let mut c = 0;
            while c < channels {
                let (at, lanes) = (self.channel + c, LANES.min(channels - c));
                let mut acc = V::splat(T::ZERO);
                for u in 0..kh {
                    let Some(i) = self.geometry.output(0, self.row, u, oh) else { continue };
                    for v in 0..kw {
                        let Some(j) = self.geometry.output(1, x, v, ow) else { continue };
                        let tap = (u * kw + v) * all + at;
                        let w = get::<T, V>(&self.weight[tap..tap + lanes], 0, T::ZERO);
                        acc = get::<T, V>(self.dy.pixel(self.image, i, j, at, lanes), 0, T::ZERO).mul_add(w, acc);
                    }
                }
                put(acc, dx, c);
                c += LANES;
            }
        }
    }
}

/// Writes `dx`.
pub fn backward_input<T: Float>(dx: MapMut<T>, dy: Map<T>, weight: &[T], geometry: Geometry) {
    check(dy.size(), dx.size(), weight, geometry);
    let taps = geometry.taps();
    count_flops(2 * dy.size().iter().product::<usize>() * taps);
    if geometry.stride == [1, 1] {
        correlate(dx, dy, &by_tap(weight, taps, true), None, View::turned(geometry));
    } else {
        let (weight, channels) = (&by_tap(weight, taps, false)[..], dx.size()[3]);
        dx.par_tiles(1, channels, |image, row, channel, dx| {
            T::dispatch(Gather { dx, dy, weight, geometry, image, row, channel });
        });
    }
}

struct WeightGradient<'a, T> {
    /// `[taps, channels]`.
    dw: &'a mut [T],
    db: &'a mut [T],
    x: Map<'a, T>,
    dy: Map<'a, T>,
    geometry: Geometry,
    /// Output rows, counted through all images.
    lines: std::ops::Range<usize>,
}

impl<T: Float> Kernel<T> for WeightGradient<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let channels = self.db.len();
        for c in (0..channels).step_by(LANES) {
            self.bias::<V>(c);
            for u in (0..self.geometry.kernel[0]).step_by(if self.geometry.kernel[1] <= 3 { 3 } else { 1 }) {
                match self.geometry.kernel[1] {
                    1 => self.taps::<V, 3, 1>(c, u, 0),
                    2 => self.taps::<V, 3, 2>(c, u, 0),
                    3 => self.taps::<V, 3, 3>(c, u, 0),
                    5 => self.taps::<V, 1, 5>(c, u, 0),
                    7 => self.taps::<V, 1, 7>(c, u, 0),
                    kw => (0..kw).step_by(4).for_each(|v| self.taps::<V, 1, 4>(c, u, v)),
                }
            }
        }
    }
}

impl<T: Float> WeightGradient<'_, T> {
    #[inline(always)]
    fn bias<V: Vector<T>>(&mut self, c: usize) {
        let [_, oh, ow, channels] = self.dy.size();
        let mut acc = V::splat(T::ZERO);
        for line in self.lines.clone() {
            for j in 0..ow {
                acc = acc + get::<T, V>(self.dy.pixel(line / oh, line % oh, j, c, LANES.min(channels - c)), 0, T::ZERO);
            }
        }
        put(acc, self.db, c);
    }

    /// The gradients of the taps in rows `u..u + R` and columns `v..v + K` of the kernel.
    #[inline(always)]
    fn taps<V: Vector<T>, const R: usize, const K: usize>(&mut self, c: usize, u: usize, v: usize) {
        let ([_, height, width, _], [_, oh, ow, channels]) = (self.x.size(), self.dy.size());
        let (geometry, [kh, kw]) = (self.geometry, self.geometry.kernel);
        let (lanes, step) = (LANES.min(channels - c), self.x.stride() * geometry.dilation[1]);
        let mut acc = [[V::splat(T::ZERO); K]; R];
        for line in self.lines.clone() {
            let (b, i) = (line / oh, line % oh);
            for j in 0..ow {
                let g = get::<T, V>(self.dy.pixel(b, i, j, c, lanes), 0, T::ZERO);
                let first = geometry.input(1, j, v, width);
                let inside = first.is_some_and(|first| first + (K - 1) * geometry.dilation[1] < width) && v + K <= kw && lanes == LANES;
                for (r, acc) in acc.iter_mut().enumerate() {
                    let Some(y) = geometry.input(0, i, u + r, height).filter(|_| u + r < kh) else { continue };
                    let line = self.x.row(b, y, c);
                    if let (true, Some(first)) = (inside, first) {
                        fused_strided(acc, &line[first * self.x.stride()..], step, g);
                    } else {
                        for (k, acc) in acc.iter_mut().enumerate() {
                            if let Some(x) = geometry.input(1, j, v + k, width).filter(|_| v + k < kw) {
                                let x = &line[x * self.x.stride()..][..lanes];
                                *acc = get::<T, V>(x, 0, T::ZERO).mul_add(g, *acc);
                            }
                        }
                    }
                }
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            for (k, acc) in acc.into_iter().enumerate() {
                if u + r < kh && v + k < kw {
                    let tap = ((u + r) * kw + v + k) * channels;
                    put(acc, &mut self.dw[tap..tap + channels], c);
                }
            }
        }
    }
}

/// Adds to `dw` `[channels, kh, kw]` and `db` `[channels]`.
pub fn backward_params<T: Float>(dw: &mut [T], db: Option<&mut [T]>, x: Map<T>, dy: Map<T>, geometry: Geometry) {
    check(dy.size(), x.size(), dw, geometry);
    let ([batch, oh, _, channels], taps) = (dy.size(), geometry.taps());
    count_flops(2 * dy.size().iter().product::<usize>() * taps);
    let lines = batch * oh;
    if dy.size().contains(&0) {
        return;
    }
    let (each, len) = (lines.div_ceil(PARTS), (taps + 1) * channels);
    let mut partial = Buffer::<T>::scratch(lines.div_ceil(each) * len);
    partial.par_chunks_mut(len).enumerate().for_each(|(part, out)| {
        let (dw, db) = out.split_at_mut(taps * channels);
        let lines = part * each..((part + 1) * each).min(lines);
        T::dispatch(WeightGradient { dw, db, x, dy, geometry, lines });
    });
    let (sum, parts) = partial.split_at_mut(len);
    for part in parts.chunks_exact(len) {
        for (a, &b) in sum.iter_mut().zip(part) {
            *a += b;
        }
    }
    for (c, dw) in dw.chunks_exact_mut(taps).enumerate() {
        for (t, dw) in dw.iter_mut().enumerate() {
            *dw += sum[t * channels + c];
        }
    }
    if let Some(db) = db {
        for (a, &b) in db.iter_mut().zip(&sum[taps * channels..]) {
            *a += b;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::random::{Purpose, Rng};

    struct Problem {
        geometry: Geometry,
        size: [usize; 4],
        out: [usize; 4],
        /// Class rows, row length and first column of both maps inside their tokens.
        skip: usize,
        stride: usize,
        column: usize,
    }

    fn problem(rng: &mut Rng) -> Problem {
        loop {
            let mut pair = |low: usize, high: usize| [rng.between(low, high), rng.between(low, high)];
            let geometry = Geometry { kernel: pair(1, 8), stride: pair(1, 2), padding: pair(0, 4), dilation: pair(1, 2) };
            let geometry = if rng.chance(0.5) {
                let k = 2 * rng.between(0, 3) + 1;
                Geometry { kernel: [k, k], stride: [1, 1], padding: [k / 2; 2], dilation: [1, 1] }
            } else {
                geometry
            };
            let size = [rng.between(1, 3), rng.between(1, 12), rng.between(1, 21), rng.between(1, 40)];
            if let Ok([oh, ow]) = geometry.outputs([size[1], size[2]]) {
                let column = rng.below(3);
                return Problem {
                    geometry,
                    size,
                    out: [size[0], oh, ow, size[3]],
                    skip: rng.below(2),
                    stride: size[3] + column + rng.below(3),
                    column,
                };
            }
        }
    }

    fn data(rng: &mut Rng, len: usize) -> Vec<f64> {
        (0..len).map(|_| rng.normal()).collect()
    }

    /// Every path against plain loops over the definition.
    #[test]
    fn agrees_with_plain_loops() {
        for seed in 0..400 {
            let mut rng = Rng::new(seed, Purpose::Case, 7, 7);
            let Problem { geometry, size: size @ [b, h, w, c], out: out @ [_, oh, ow, _], skip, stride, column } = problem(&mut rng);
            let [kh, kw] = geometry.kernel;
            let x = data(&mut rng, b * (skip + h * w) * stride);
            let dy = data(&mut rng, b * (skip + oh * ow) * stride);
            let (weight, bias) = (data(&mut rng, c * kh * kw), data(&mut rng, c));
            let (x_map, dy_map) = (Map::within(&x, size, skip, stride, column), Map::within(&dy, out, skip, stride, column));
            let (mut y, mut dx) = (vec![7.0; dy.len()], vec![7.0; x.len()]);
            fn part(data: &mut [f64], stride: usize, column: usize, c: usize) -> ColumnsMut<'_, f64> {
                ColumnsMut::new(data, stride).split_at(column).1.split_at(c).0
            }
            forward(MapMut::within(part(&mut y, stride, column, c), out, skip), x_map, &weight, Some(&bias), geometry);
            backward_input(MapMut::within(part(&mut dx, stride, column, c), size, skip), dy_map, &weight, geometry);
            let (mut dw, mut db) = (vec![1.0; weight.len()], vec![1.0; c]);
            backward_params(&mut dw, Some(&mut db), x_map, dy_map, geometry);

            let (mut y_0, mut dx_0) = (vec![7.0; y.len()], vec![7.0; dx.len()]);
            let (mut dw_0, mut db_0) = (vec![1.0; dw.len()], vec![1.0; c]);
            let at =
                |b: usize, h: usize, w: usize, i: usize, j: usize, c: usize| (b * (skip + h * w) + skip + i * w + j) * stride + column + c;
            for (image, i, j, ch) in (0..b * h * w * c).map(|k| (k / (h * w * c), k / (w * c) % h, k / c % w, k % c)) {
                dx_0[at(image, h, w, i, j, ch)] = 0.0;
            }
            for (image, i, j, ch) in (0..b * oh * ow * c).map(|k| (k / (oh * ow * c), k / (ow * c) % oh, k / c % ow, k % c)) {
                let o = at(image, oh, ow, i, j, ch);
                y_0[o] = bias[ch];
                db_0[ch] += dy[o];
                for (u, v) in (0..kh * kw).map(|t| (t / kw, t % kw)) {
                    if let (Some(p), Some(q)) = (geometry.input(0, i, u, h), geometry.input(1, j, v, w)) {
                        let (k, t) = (at(image, h, w, p, q, ch), (ch * kh + u) * kw + v);
                        y_0[o] += weight[t] * x[k];
                        dx_0[k] += weight[t] * dy[o];
                        dw_0[t] += dy[o] * x[k];
                    }
                }
            }
            for (name, a, b) in [("y", &y, &y_0), ("dx", &dx, &dx_0), ("dw", &dw, &dw_0), ("db", &db, &db_0)] {
                for (i, (a, b)) in a.iter().zip(b).enumerate() {
                    assert!((a - b).abs() <= 1e-11, "seed {seed} {geometry:?} {size:?}: {name}[{i}] {a} instead of {b}");
                }
            }
        }
    }
}
