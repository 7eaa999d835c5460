//! Bicubic resizing of 8-bit images with antialiasing, bit for bit as Pillow does it.
//!
//! The kernel is Keys' cubic with a = −1/2; when shrinking it is stretched by the scale, so that it also low-passes
//! (antialiasing). Rows first, then columns, each in fixed point with 22 fractional bits and rounded to 8 bits in between.
//! Integer sums have no order: the result is the same on every machine.
//!
//! Keys, *Cubic convolution interpolation for digital image processing*, IEEE TASSP 1981.

use std::ops::Range;

/// Fractional bits of a weight: 8 bits of pixel, 2 bits of headroom for overshoot, 22 for the weight.
const BITS: u32 = 32 - 8 - 2;

/// A rectangle of an interleaved 8-bit image.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    /// All pixels, `[rows, columns, channels]`.
    pub pixels: &'a [u8],
    /// Columns of the whole image.
    pub stride: usize,
    /// Channels.
    pub channels: usize,
    /// Top row, left column.
    pub origin: (usize, usize),
    /// Height, width of the rectangle.
    pub size: (usize, usize),
}

impl<'a> View<'a> {
    /// The bytes of row `y` of the rectangle.
    fn row(&self, y: usize) -> &'a [u8] {
        let start = ((self.origin.0 + y) * self.stride + self.origin.1) * self.channels;
        &self.pixels[start..start + self.size.1 * self.channels]
    }
}

/// Memory that is kept between calls.
#[derive(Default)]
pub(crate) struct Scratch {
    rows: Weights,
    columns: Weights,
    between: Vec<u8>,
    sums: Vec<i32>,
}

/// For each output position: the first input position and `taps` weights, of which those past `counts` are unused.
#[derive(Default)]
struct Weights {
    taps: usize,
    first: Vec<usize>,
    counts: Vec<usize>,
    fixed: Vec<i32>,
    exact: Vec<f64>,
}

/// Keys' cubic kernel with a = −1/2.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

impl Weights {
    /// The weights of outputs `window` when `input` positions are resized to `output`.
    fn fill(&mut self, input: usize, output: usize, window: Range<usize>) {
        let scale = input as f64 / output as f64;
        let stretch = scale.max(1.0);
        let support = 2.0 * stretch;
        self.taps = support.ceil() as usize * 2 + 1;
        self.first.clear();
        self.counts.clear();
        self.fixed.clear();
        for position in window {
            let center = (position as f64 + 0.5) * scale;
            // Truncation towards zero, as in Pillow: a negative start is 0 anyway.
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(input);
            self.exact.clear();
            self.exact.extend((first..end).map(|i| cubic((i as f64 - center + 0.5) * (1.0 / stretch))));
            let total: f64 = self.exact.iter().sum();
            let one = f64::from(1u32 << BITS);
            self.fixed.extend(self.exact.iter().map(|w| (w / total * one + if *w < 0.0 { -0.5 } else { 0.5 }) as i32));
            self.fixed.resize((self.first.len() + 1) * self.taps, 0);
            self.first.push(first);
            self.counts.push(end - first);
        }
    }

    /// First input position and weights of the `i`-th output of the window.
    fn at(&self, i: usize) -> (usize, &[i32]) {
        (self.first[i], &self.fixed[i * self.taps..i * self.taps + self.counts[i]])
    }
}

/// Half a unit, where every sum starts, so that the shift rounds to nearest.
const HALF: i32 = 1 << (BITS - 1);

/// The sum back to 8 bits, clipped.
fn clip(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

/// Resizes the rectangle `view` to `full` = (height, width) and writes the part (`rows`, `columns`) of the result to `out`
/// `[rows, columns, channels]`. All sizes are positive and the part lies inside `full`.
pub(crate) fn resize(view: View, full: (usize, usize), rows: Range<usize>, columns: Range<usize>, scratch: &mut Scratch, out: &mut [u8]) {
    let (channels, width) = (view.channels, columns.len());
    let line = width * channels;
    // Pillow leaves a pass out when the size does not change.
    let (same_height, same_width) = (full.0 == view.size.0, full.1 == view.size.1);
    if same_height && same_width {
        for (y, to) in rows.zip(out.chunks_exact_mut(line)) {
            to.copy_from_slice(&view.row(y)[columns.start * channels..columns.end * channels]);
        }
        return;
    }
    scratch.columns.fill(view.size.1, full.1, columns.clone());
    if same_height {
        for (y, to) in rows.zip(out.chunks_exact_mut(line)) {
            resize_row(view.row(y), channels, &scratch.columns, to);
        }
        return;
    }
    scratch.rows.fill(view.size.0, full.0, rows);
    // Only the rows that the second pass reads.
    let top = scratch.rows.first.iter().copied().min().unwrap_or(0);
    let bottom = scratch.rows.first.iter().zip(&scratch.rows.counts).map(|(f, c)| f + c).max().unwrap_or(0);
    scratch.between.resize((bottom - top) * line, 0);
    for (y, to) in (top..bottom).zip(scratch.between.chunks_exact_mut(line)) {
        if same_width {
            to.copy_from_slice(&view.row(y)[columns.start * channels..columns.end * channels]);
        } else {
            resize_row(view.row(y), channels, &scratch.columns, to);
        }
    }
    for (i, to) in out.chunks_exact_mut(line).enumerate() {
        let (first, weights) = scratch.rows.at(i);
        scratch.sums.clear();
        scratch.sums.resize(line, HALF);
        for (row, weight) in scratch.between[(first - top) * line..].chunks_exact(line).zip(weights) {
            for (sum, pixel) in scratch.sums.iter_mut().zip(row) {
                *sum += i32::from(*pixel) * weight;
            }
        }
        for (to, sum) in to.iter_mut().zip(&scratch.sums) {
            *to = clip(*sum);
        }
    }
}

/// One row of the first pass.
fn resize_row(from: &[u8], channels: usize, weights: &Weights, to: &mut [u8]) {
    if channels == 3 {
        resize_pixels::<3>(from.as_chunks().0, weights, to.as_chunks_mut().0);
    } else {
        resize_pixels::<1>(from.as_chunks().0, weights, to.as_chunks_mut().0);
    }
}

fn resize_pixels<const C: usize>(from: &[[u8; C]], weights: &Weights, to: &mut [[u8; C]]) {
    for (i, to) in to.iter_mut().enumerate() {
        let (first, weights) = weights.at(i);
        let mut sums = [HALF; C];
        for (pixel, weight) in from[first..].iter().zip(weights) {
            for c in 0..C {
                sums[c] += i32::from(pixel[c]) * weight;
            }
        }
        *to = sums.map(clip);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &serde_json::Value) -> Vec<u8> {
        let text = text.as_str().unwrap();
        (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
    }

    fn pair(value: &serde_json::Value) -> (usize, usize) {
        (value[0].as_u64().unwrap() as usize, value[1].as_u64().unwrap() as usize)
    }

    /// Pillow's results, exactly; any part of a result equals that part of the whole; so does a rectangle in a larger image.
    #[test]
    fn equals_pillow() {
        let file: serde_json::Value = serde_json::from_str(include_str!("../../fixtures/resize/pil.json")).unwrap();
        let cases = file["cases"].as_array().unwrap();
        assert_eq!(cases.len(), 8);
        let mut scratch = Scratch::default();
        for case in cases {
            let (input, want) = (hex(&case["input"]), hex(&case["output"]));
            let (size, full) = (pair(&case["from"]), pair(&case["to"]));
            let channels = case["channels"].as_u64().unwrap() as usize;
            let view = View { pixels: &input, stride: size.1, channels, origin: (0, 0), size };
            let mut got = vec![0; want.len()];
            resize(view, full, 0..full.0, 0..full.1, &mut scratch, &mut got);
            assert_eq!(got, want, "{size:?} to {full:?}, {channels} channels");

            let (rows, columns) = (full.0 / 3..full.0 - full.0 / 4, full.1 / 4..full.1 - full.1 / 3);
            let mut part = vec![0; rows.len() * columns.len() * channels];
            resize(view, full, rows.clone(), columns.clone(), &mut scratch, &mut part);
            for (y, line) in rows.zip(part.chunks(columns.len() * channels)) {
                let start = (y * full.1 + columns.start) * channels;
                assert_eq!(line, &want[start..start + line.len()]);
            }

            let stride = size.1 + 5;
            let mut large = vec![77; (size.0 + 4) * stride * channels];
            for (y, line) in input.chunks(size.1 * channels).enumerate() {
                let start = ((y + 1) * stride + 2) * channels;
                large[start..start + line.len()].copy_from_slice(line);
            }
            got.fill(0);
            resize(View { pixels: &large, stride, origin: (1, 2), ..view }, full, 0..full.0, 0..full.1, &mut scratch, &mut got);
            assert_eq!(got, want);
        }
    }

    #[test]
    fn same_size_is_a_copy() {
        let pixels: Vec<u8> = (0..60).collect();
        let view = View { pixels: &pixels, stride: 5, channels: 3, origin: (0, 0), size: (4, 5) };
        let mut out = vec![0; 2 * 3 * 3];
        resize(view, (4, 5), 1..3, 2..5, &mut Scratch::default(), &mut out);
        assert_eq!(out[..9], pixels[21..30]);
        assert_eq!(out[9..], pixels[36..45]);
    }
}
