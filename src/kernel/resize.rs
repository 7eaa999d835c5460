//! Separable linear maps between grids: bilinear and bicubic interpolation, averages over tiles, nearest neighbours.
//!
//! `y[b, i, j] = Σ_{u,v} R[i, u] S[j, v] x[b, u, v]` with sparse `R` and `S`, in token layout; the adjoint is the same map with
//! `Rᵀ` and `Sᵀ`. No anti-aliasing.

use super::maps::{Map, MapMut};
use super::{get, put};
use crate::linalg::ColumnsMut;
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::Float;

/// One axis: a sparse matrix `[outputs, inputs]`, whose row `o` holds `taps[offsets[o]..offsets[o + 1]]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    inputs: usize,
    offsets: Vec<u32>,
    /// Column and value, columns ascending.
    taps: Vec<(u32, f64)>,
}

impl Axis {
    fn from_rows(inputs: usize, rows: impl IntoIterator<Item = Vec<(usize, f64)>>) -> Axis {
        let mut axis = Axis { inputs, offsets: vec![0], taps: Vec::new() };
        for mut row in rows {
            row.sort_by_key(|&(i, _)| i);
            let first = axis.taps.len();
            for (i, w) in row {
                match axis.taps[first..].last_mut() {
                    Some(last) if last.0 == i as u32 => last.1 += w,
                    _ => axis.taps.push((i as u32, w)),
                }
            }
            axis.offsets.push(axis.taps.len() as u32);
        }
        axis
    }

    /// Linear interpolation as in PyTorch, with centres of cells (`align_corners` false) or corners in register.
    pub fn bilinear(inputs: usize, outputs: usize, align_corners: bool) -> Axis {
        assert!(inputs > 0);
        Self::from_rows(
            inputs,
            (0..outputs).map(|o| {
                let u = match align_corners {
                    false => ((o as f64 + 0.5) * (inputs as f64 / outputs as f64) - 0.5).max(0.0),
                    true if outputs > 1 => o as f64 * ((inputs - 1) as f64 / (outputs - 1) as f64),
                    true => 0.0,
                };
                let low = (u.floor() as usize).min(inputs - 1);
                let part = (u - low as f64).clamp(0.0, 1.0);
                vec![(low, 1.0 - part), ((low + 1).min(inputs - 1), part)]
            }),
        )
    }

    /// Cubic convolution as in PyTorch (`align_corners` false, a = −0.75); indices beyond the border are clamped.
    pub fn bicubic(inputs: usize, outputs: usize) -> Axis {
        const A: f64 = -0.75;
        assert!(inputs > 0);
        let kernel = |t: f64| match t.abs() {
            t if t <= 1.0 => ((A + 2.0) * t - (A + 3.0)) * t * t + 1.0,
            t if t < 2.0 => ((t - 5.0) * t + 8.0) * t * A - 4.0 * A,
            _ => 0.0,
        };
        Self::from_rows(
            inputs,
            (0..outputs).map(|o| {
                let u = (o as f64 + 0.5) * (inputs as f64 / outputs as f64) - 0.5;
                let first = u.floor() as i64 - 1;
                let tap = |i: i64| (i.clamp(0, inputs as i64 - 1) as usize, kernel(u - i as f64));
                (first..first + 4).map(tap).collect()
            }),
        )
    }

    /// `⌊o · inputs / outputs⌋`: the nearest neighbour as in PyTorch.
    pub fn nearest(inputs: usize, outputs: usize) -> Axis {
        assert!(inputs > 0);
        Self::from_rows(inputs, (0..outputs).map(|o| vec![(o * inputs / outputs, 1.0)]))
    }

    /// Averages over tiles of `size`: the rest at the end is a smaller tile if `partial`, else left out.
    pub fn tiles(inputs: usize, size: usize, partial: bool) -> Axis {
        assert!(size > 0);
        let count = if partial { inputs.div_ceil(size) } else { inputs / size };
        Self::averages(inputs, (0..count).map(|o| (o * size, ((o + 1) * size).min(inputs))))
    }

    /// Adaptive averages: output `o` is the mean of `⌊o · inputs / outputs⌋ … ⌈(o + 1) · inputs / outputs⌉ − 1`.
    pub fn adaptive(inputs: usize, outputs: usize) -> Axis {
        assert!(inputs > 0);
        Self::averages(inputs, (0..outputs).map(|o| (o * inputs / outputs, ((o + 1) * inputs).div_ceil(outputs))))
    }

    /// Averages over ranges `(start, end)`.
    pub fn averages(inputs: usize, ranges: impl IntoIterator<Item = (usize, usize)>) -> Axis {
        Self::from_rows(inputs, ranges.into_iter().map(|(from, to)| (from..to).map(|i| (i, 1.0 / (to - from) as f64)).collect()))
    }

    /// The adjoint.
    pub fn transposed(&self) -> Axis {
        let mut rows = vec![Vec::new(); self.inputs];
        for o in 0..self.outputs() {
            for &(i, w) in self.row(o) {
                rows[i as usize].push((o, w));
            }
        }
        Self::from_rows(self.outputs(), rows)
    }

    /// Positions that go in.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Positions that come out.
    pub fn outputs(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The taps of output `o`: input and weight.
    pub fn row(&self, o: usize) -> &[(u32, f64)] {
        &self.taps[self.offsets[o] as usize..self.offsets[o + 1] as usize]
    }
}

struct Line<'a, T> {
    /// One row of pixels.
    out: ColumnsMut<'a, T>,
    x: Map<'a, T>,
    image: usize,
    channel: usize,
    rows: &'a [(u32, f64)],
    cols: &'a Axis,
    add: bool,
}

impl<T: Float> Kernel<T> for Line<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let channels = self.out.width();
        for j in 0..self.cols.outputs() {
            let out = self.out.row(j);
            let mut c = 0;
            while c < channels {
                let mut acc = if self.add { get::<T, V>(out, c, T::ZERO) } else { V::splat(T::ZERO) };
                for &(u, r) in self.rows {
                    for &(v, s) in self.cols.row(j) {
                        let x = self.x.pixel(self.image, u as usize, v as usize, self.channel, channels);
                        acc = get::<T, V>(x, c, T::ZERO).mul_add(V::splat(T::from_f64(r * s)), acc);
                    }
                }
                put(acc, out, c);
                c += LANES;
            }
        }
    }
}

/// Applies `rows` and `cols` to every channel: `y` is written, or added to if `add`.
pub fn resize<T: Float>(y: MapMut<T>, x: Map<T>, rows: &Axis, cols: &Axis, add: bool) {
    let [batch, height, width, channels] = x.size();
    assert!(y.size() == [batch, rows.outputs(), cols.outputs(), channels] && rows.inputs() == height && cols.inputs() == width);
    let channels_each = if channels > 128 { 64 } else { channels };
    y.par_tiles(1, channels_each, |image, i, channel, out| {
        T::dispatch(Line { out, x, image, channel, rows: rows.row(i), cols, add });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dense(axis: &Axis) -> Vec<Vec<f64>> {
        (0..axis.outputs())
            .map(|o| {
                let mut row = vec![0.0; axis.inputs()];
                axis.row(o).iter().for_each(|&(i, w)| row[i as usize] += w);
                row
            })
            .collect()
    }

    #[test]
    fn exact_ratios() {
        assert_eq!(dense(&Axis::bilinear(8, 2, false))[1], [0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.0]);
        assert_eq!(dense(&Axis::bilinear(2, 4, false))[1], [0.75, 0.25]);
        assert_eq!(dense(&Axis::bilinear(3, 5, true))[1], [0.5, 0.5, 0.0]);
        assert_eq!(dense(&Axis::tiles(5, 2, true))[2], [0.0, 0.0, 0.0, 0.0, 1.0]);
        assert_eq!(Axis::tiles(5, 2, false).outputs(), 2);
        assert_eq!(dense(&Axis::adaptive(5, 2))[0], [1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
    }

    #[test]
    fn rows_sum_to_one_and_equal_sizes_are_the_identity() {
        for inputs in 1..9 {
            for outputs in 1..9 {
                let all = [
                    Axis::bilinear(inputs, outputs, false),
                    Axis::bilinear(inputs, outputs, true),
                    Axis::bicubic(inputs, outputs),
                    Axis::nearest(inputs, outputs),
                    Axis::adaptive(inputs, outputs),
                ];
                for axis in all {
                    assert_eq!((axis.inputs(), axis.outputs()), (inputs, outputs));
                    for (o, row) in dense(&axis).iter().enumerate() {
                        assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                        if inputs == outputs {
                            assert!((row[o] - 1.0).abs() < 1e-12, "{axis:?}");
                        }
                    }
                    assert_eq!(axis.transposed().transposed(), axis);
                }
            }
        }
    }

    #[test]
    fn two_axes_are_a_matrix_product_per_channel() {
        let (rows, cols, [b, h, w, c]) = (Axis::bicubic(3, 5), Axis::bilinear(4, 2, false), [2, 3, 4, 19]);
        let x: Vec<f64> = (0..b * h * w * c).map(|i| libm::sin(i as f64)).collect();
        let mut y = vec![f64::NAN; b * 5 * 2 * c];
        resize(MapMut::new(&mut y, [b, 5, 2, c]), Map::new(&x, [b, h, w, c]), &rows, &cols, false);
        let (dense_rows, dense_cols) = (dense(&rows), dense(&cols));
        for (k, &y) in y.iter().enumerate() {
            let (image, i, j, channel) = (k / (10 * c), k / (2 * c) % 5, k / c % 2, k % c);
            let mut sum = 0.0;
            for (u, r) in dense_rows[i].iter().enumerate() {
                for (v, s) in dense_cols[j].iter().enumerate() {
                    sum += r * s * x[((image * h + u) * w + v) * c + channel];
                }
            }
            assert!((y - sum).abs() < 1e-14);
        }
    }
}
