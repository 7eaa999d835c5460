//! Depthwise convolution in token layout: every channel with its own kernel.
//!
//! `y[b, i, j, c] = β[c] + Σ_{u,v} w[u, v, c] x[b, i s − p + u d, j s − p + v d, c]`, zero outside the map. Channels run in lanes, so there are
//! no transposes; input and output may be columns of wider rows.
//!
//! A task takes some rows with all their channels, as they lie in memory. The input rows that the kernel covers are kept in a ring,
//! padded with zeros and contiguous per sixteen channels: every row is copied once, all that follows reads nearby memory without
//! looking at borders. A
//! strip of output pixels stays in registers while the kernel passes over it. One image is parallel too.
//!
//! `dx` of stride 1 is the same convolution of `dy` with the kernel turned by 180°; else every input gathers the outputs it met.
//! `dw[u, v, c] = Σ dy[b, i, j, c] x[…same place…, c]`, `dβ = Σ dy`: partial sums over fixed groups of rows, added in order.

use super::im2col::Geometry;
use super::maps::{Map, MapMut, transpose};
use super::{get, put};
use crate::linalg::{ColumnsMut, Tiling, count_flops, par_tiles};
use crate::simd::{Kernel, LANES, Vector, fused_strided};
use crate::tensor::{Buffer, Float};

/// Output rows that are done together: what they read stays in the first-level cache.
const BAND: usize = 4;
/// Elements of a ring, at most: more channels than fit are left to other tasks.
const RING: usize = 3 << 16;
/// Parts of the sums over rows in the weight gradient.
const PARTS: usize = 32;

/// Rows of a task: a few tasks for one image, whole images where there are many.
fn task_rows(batch: usize, rows: usize) -> usize {
    rows.div_ceil((8 / batch.max(1)).max(1)).next_multiple_of(BAND)
}

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

    /// The input row that output row `i` and row `u` of the kernel meet at, if it is inside.
    #[inline(always)]
    fn row(&self, i: usize, u: usize, height: usize) -> Option<usize> {
        let y = (i * self.stride[0] + u * self.dilation[0]) as isize - self.padding[0];
        (y >= 0 && y < height as isize).then_some(y as usize)
    }

    /// Columns that `width` outputs look at.
    fn columns(&self, width: usize) -> usize {
        (width - 1) * self.stride[1] + (self.kernel[1] - 1) * self.dilation[1] + 1
    }

    /// Rows that a band looks at.
    fn slots(&self) -> usize {
        (BAND - 1) * self.stride[0] + (self.kernel[0] - 1) * self.dilation[0] + 1
    }

    /// Channels of a task.
    fn group(&self, width: usize) -> usize {
        (RING / (self.slots() * self.columns(width)).max(1)).max(4 * LANES).next_multiple_of(LANES)
    }
}

/// The rows of one image that the kernel covers, for some channels: `[slot, block of channels, column, lane]`.
struct Ring<'a, T: Float> {
    x: Map<'a, T>,
    view: View,
    image: usize,
    /// First channel and number of channels.
    channels: [usize; 2],
    slots: usize,
    columns: usize,
    rows: Buffer<T>,
    /// The next row that is not there yet.
    next: usize,
}

impl<'a, T: Float> Ring<'a, T> {
    fn new(x: Map<'a, T>, view: View, width: usize, channels: [usize; 2]) -> Self {
        let (slots, columns) = (view.slots(), view.columns(width));
        let rows = Buffer::scratch(slots * channels[1].div_ceil(LANES) * columns * LANES);
        Ring { x, view, image: 0, channels, slots, columns, rows, next: 0 }
    }

    fn start(&mut self, image: usize) {
        (self.image, self.next) = (image, 0);
    }

    fn blocks(&self) -> usize {
        self.channels[1].div_ceil(LANES)
    }

    /// Brings in what output rows `i..i + count` need.
    #[inline(always)]
    fn fill<V: Vector<T>>(&mut self, i: usize, count: usize) {
        let height = self.x.size()[1] as isize;
        let row = |i: usize, u: usize| (i * self.view.stride[0] + u * self.view.dilation[0]) as isize - self.view.padding[0];
        let (first, end) = (row(i, 0).max(self.next as isize), (row(i + count - 1, self.view.kernel[0] - 1) + 1).min(height));
        for y in first..end {
            self.copy::<V>(y as usize);
        }
        self.next = self.next.max(end.max(0) as usize);
    }

    #[inline(always)]
    fn copy<V: Vector<T>>(&mut self, y: usize) {
        let ([_, _, width, _], [first, channels]) = (self.x.size(), self.channels);
        let len = self.columns * LANES;
        let slot = y % self.slots * self.blocks() * len;
        let rows = &mut self.rows[slot..slot + channels.div_ceil(LANES) * len];
        for t in 0..self.columns {
            let x = t as isize - self.view.padding[1];
            let inside = x >= 0 && x < width as isize;
            for (block, row) in rows.chunks_exact_mut(len).enumerate() {
                let out = &mut row[t * LANES..(t + 1) * LANES];
                if inside {
                    let lanes = LANES.min(channels - block * LANES);
                    get::<T, V>(self.x.pixel(self.image, y, x as usize, first + block * LANES, lanes), 0, T::ZERO).store(out);
                } else {
                    V::splat(T::ZERO).store(out);
                }
            }
        }
    }

    /// Row `y` of a block of channels.
    #[inline(always)]
    fn row(&self, y: usize, block: usize) -> &[T] {
        let len = self.columns * LANES;
        &self.rows[(y % self.slots * self.blocks() + block) * len..][..len]
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
    /// First row of the tile; rows have this many pixels.
    row: usize,
    width: usize,
    channel: usize,
}

impl<T: Float> Kernel<T> for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let (channels, all) = (self.out.width(), self.x.size()[3]);
        let rows = self.out.rows() / self.width;
        let mut ring = Ring::new(self.x, self.view, self.width, [self.channel, channels]);
        ring.start(self.image);
        // The weights as the strips read them: [block, tap, lane].
        let taps = self.view.kernel[0] * self.view.kernel[1];
        let mut weights = Buffer::scratch(ring.blocks() * taps * LANES);
        for (k, out) in weights.chunks_exact_mut(LANES).enumerate() {
            let (block, tap) = (k / taps, k % taps);
            let lanes = LANES.min(channels - block * LANES);
            get::<T, V>(&self.weight[tap * all + self.channel + block * LANES..][..lanes], 0, T::ZERO).store(out);
        }
        for first in (0..rows).step_by(BAND) {
            let band = BAND.min(rows - first);
            ring.fill::<V>(self.row + first, band);
            for (block, i) in (0..ring.blocks()).flat_map(|block| (first..first + band).map(move |i| (block, i))) {
                let weights = &weights[block * taps * LANES..(block + 1) * taps * LANES];
                let mut j = 0;
                // As many sums as there are registers for: their number changes nothing else.
                while j < self.width {
                    j += match self.width - j {
                        14.. if V::TILE.rows > 12 => self.strip::<V, 14>(&ring, weights, i, j, block),
                        6.. => self.strip::<V, 6>(&ring, weights, i, j, block),
                        4.. => self.strip::<V, 4>(&ring, weights, i, j, block),
                        2.. => self.strip::<V, 2>(&ring, weights, i, j, block),
                        _ => self.strip::<V, 1>(&ring, weights, i, j, block),
                    };
                }
            }
        }
    }
}

impl<T: Float> Forward<'_, T> {
    /// `P` pixels of one row and block of channels.
    #[inline(always)]
    fn strip<V: Vector<T>, const P: usize>(&mut self, ring: &Ring<T>, weights: &[T], i: usize, j: usize, block: usize) -> usize {
        let (view, [kh, kw]) = (self.view, self.view.kernel);
        let from = self.channel + block * LANES;
        let lanes = LANES.min(self.out.width() - block * LANES);
        let start = self.bias.map_or(V::splat(T::ZERO), |bias| get::<T, V>(&bias[from..from + lanes], 0, T::ZERO));
        let mut acc = [start; P];
        let (step, next) = (view.stride[1] * LANES, view.dilation[1] * LANES);
        for (u, weights) in weights.chunks_exact(kw * LANES).enumerate().take(kh) {
            let Some(y) = view.row(self.row + i, u, ring.x.size()[1]) else { continue };
            let row = &ring.row(y, block)[j * step..];
            for (v, w) in weights.chunks_exact(LANES).enumerate() {
                fused_strided(&mut acc, &row[v * next..], step, V::load(w));
            }
        }
        for (p, acc) in acc.into_iter().enumerate() {
            put(acc, self.out.row(i * self.width + j + p), block * LANES);
        }
        P
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
    let [batch, height, width, _] = y.size();
    if y.size().contains(&0) {
        return;
    }
    y.par_tiles(task_rows(batch, height), view.group(width), |image, row, channel, out| {
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
    /// `[taps + 1, channels of the task]`: dw, then dβ.
    out: ColumnsMut<'a, T>,
    x: Map<'a, T>,
    dy: Map<'a, T>,
    geometry: Geometry,
    channel: usize,
    /// Stretches of `rows` output rows, counted through all images.
    units: std::ops::Range<usize>,
    rows: usize,
}

impl<T: Float> Kernel<T> for WeightGradient<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let ([_, oh, ow, _], channels, view) = (self.dy.size(), self.out.width(), View::new(self.geometry));
        let of_image = oh.div_ceil(self.rows);
        let mut ring = Ring::new(self.x, view, ow, [self.channel, channels]);
        // Rows of dy one by one, without padding.
        let plain = View { kernel: [1; 2], stride: [1; 2], padding: [0; 2], dilation: [1; 2] };
        let mut gradient = Ring::new(self.dy, plain, ow, [self.channel, channels]);
        for r in 0..self.out.rows() {
            self.out.row(r).fill(T::ZERO);
        }
        for unit in self.units.clone() {
            let (image, first) = (unit / of_image, unit % of_image * self.rows);
            ring.start(image);
            gradient.start(image);
            let last = (first + self.rows).min(oh);
            for first in (first..last).step_by(BAND) {
                let band = BAND.min(last - first);
                ring.fill::<V>(first, band);
                gradient.fill::<V>(first, band);
                for (block, i) in (0..ring.blocks()).flat_map(|block| (first..first + band).map(move |i| (block, i))) {
                    self.row::<V>(&ring, gradient.row(i, block), i, block);
                }
            }
        }
    }
}

impl<T: Float> WeightGradient<'_, T> {
    /// Adds what one row of `dy` gives.
    #[inline(always)]
    fn row<V: Vector<T>>(&mut self, ring: &Ring<T>, dy: &[T], i: usize, block: usize) {
        let [kh, kw] = self.geometry.kernel;
        let mut sum = V::splat(T::ZERO);
        for g in dy.chunks_exact(LANES) {
            sum = sum + V::load(g);
        }
        self.add(sum, kh * kw, block);
        for u in 0..kh {
            let Some(y) = ring.view.row(i, u, ring.x.size()[1]) else { continue };
            let row = ring.row(y, block);
            let mut v = 0;
            // As many taps as there are registers for: their number changes nothing else.
            while v < kw {
                v += match kw - v {
                    7.. if V::TILE.rows > 12 => self.taps::<V, 7>(ring, row, dy, u, v, block),
                    5.. if V::TILE.rows > 12 => self.taps::<V, 5>(ring, row, dy, u, v, block),
                    5 => self.taps::<V, 5>(ring, row, dy, u, v, block),
                    4.. => self.taps::<V, 4>(ring, row, dy, u, v, block),
                    3 => self.taps::<V, 3>(ring, row, dy, u, v, block),
                    2 => self.taps::<V, 2>(ring, row, dy, u, v, block),
                    _ => self.taps::<V, 1>(ring, row, dy, u, v, block),
                };
            }
        }
    }

    #[inline(always)]
    fn add<V: Vector<T>>(&mut self, sum: V, tap: usize, block: usize) {
        let out = self.out.row(tap);
        put(get::<T, V>(out, block * LANES, T::ZERO) + sum, out, block * LANES);
    }

    /// Taps `v..v + K` of row `u` of the kernel, for one row of `dy`.
    #[inline(always)]
    fn taps<V: Vector<T>, const K: usize>(&mut self, ring: &Ring<T>, row: &[T], dy: &[T], u: usize, v: usize, block: usize) -> usize {
        let (step, next) = (ring.view.stride[1] * LANES, ring.view.dilation[1] * LANES);
        let mut acc = [V::splat(T::ZERO); K];
        for (j, g) in dy.chunks_exact(LANES).enumerate() {
            fused_strided(&mut acc, &row[j * step + v * next..], next, V::load(g));
        }
        for (k, acc) in acc.into_iter().enumerate() {
            self.add(acc, u * self.geometry.kernel[1] + v + k, block);
        }
        K
    }
}

/// Adds to `dw` `[channels, kh, kw]` and `db` `[channels]`.
pub fn backward_params<T: Float>(dw: &mut [T], db: Option<&mut [T]>, x: Map<T>, dy: Map<T>, geometry: Geometry) {
    check(dy.size(), x.size(), dw, geometry);
    let ([batch, oh, ow, channels], taps) = (dy.size(), geometry.taps());
    count_flops(2 * dy.size().iter().product::<usize>() * taps);
    if dy.size().contains(&0) {
        return;
    }
    let rows = task_rows(batch, oh);
    let (units, len) = (batch * oh.div_ceil(rows), (taps + 1) * channels);
    let each = units.div_ceil(PARTS);
    let parts = units.div_ceil(each);
    let mut partial = Buffer::<T>::scratch(parts * len);
    let tiling = Tiling { batches: parts, skip: 0, rows: taps + 1, cols: View::new(geometry).group(ow) };
    par_tiles(ColumnsMut::new(&mut partial, channels), tiling, |part, _, channel, out| {
        let units = part * each..((part + 1) * each).min(units);
        T::dispatch(WeightGradient { out, x, dy, geometry, channel, units, rows });
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
