//! The operations of random augmentation on 8-bit pictures, with Pillow's arithmetic to the last bit: `ImageOps`, `ImageEnhance`, and
//! `Image.transform` with bilinear sampling, outside filled with a colour.

use super::transform::luma;

/// One operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Nothing.
    Identity,
    /// Each channel stretched to 0…255.
    AutoContrast,
    /// Each channel's histogram made flat.
    Equalize,
    /// Turned counter-clockwise about the centre, by degrees.
    Rotate,
    /// Values from the threshold on are inverted.
    Solarize,
    /// Blended with its grey version: 0 is grey, 1 the picture.
    Color,
    /// So many leading bits are kept.
    Posterize,
    /// Blended with its mean grey.
    Contrast,
    /// Blended with black.
    Brightness,
    /// Blended with a smoothed version.
    Sharpness,
    /// Row y moves by y times the amount to the left.
    ShearX,
    /// Column x moves by x times the amount upwards.
    ShearY,
    /// Moved to the left, by pixels.
    TranslateX,
    /// Moved upwards, by pixels.
    TranslateY,
}

/// A picture in 8 bits, `[height, width, channels]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bitmap {
    pub height: usize,
    pub width: usize,
    /// 1 or 3.
    pub channels: usize,
    pub pixels: Vec<u8>,
}

impl Bitmap {
    /// Applies `op`; `amount` is in its own unit, `fill` the colour of what comes from outside.
    pub fn apply(&mut self, op: Op, amount: f64, fill: [u8; 3]) {
        match op {
            Op::Identity => {}
            Op::AutoContrast => self.map_channels(stretch),
            Op::Equalize => self.map_channels(flatten),
            Op::Solarize => self.map(|v| if f64::from(v) < amount { v } else { 255 - v }),
            Op::Posterize => {
                let mask = u8::MAX << (8 - (amount as u32).clamp(1, 8));
                self.map(|v| v & mask);
            }
            Op::Brightness => self.map(|v| blend(0, v, amount as f32)),
            Op::Contrast => {
                let sum: u64 = self.grey().map(u64::from).sum();
                let mean = (sum as f64 / (self.height * self.width) as f64 + 0.5) as u8;
                self.map(|v| blend(mean, v, amount as f32));
            }
            Op::Color if self.channels == 3 => {
                for pixel in self.pixels.as_chunks_mut::<3>().0 {
                    let grey = luma(pixel);
                    pixel.iter_mut().for_each(|v| *v = blend(grey, *v, amount as f32));
                }
            }
            // Grey is its own grey version.
            Op::Color => {}
            Op::Sharpness => {
                let smooth = self.smoothed();
                self.pixels.iter_mut().zip(smooth).for_each(|(v, s)| *v = blend(s, *v, amount as f32));
            }
            Op::Rotate => self.rotate(amount, fill),
            Op::ShearX => self.affine([1.0, amount, 0.0, 0.0, 1.0, 0.0], fill),
            Op::ShearY => self.affine([1.0, 0.0, 0.0, amount, 1.0, 0.0], fill),
            Op::TranslateX => self.affine([1.0, 0.0, amount, 0.0, 1.0, 0.0], fill),
            Op::TranslateY => self.affine([1.0, 0.0, 0.0, 0.0, 1.0, amount], fill),
        }
    }

    fn map(&mut self, f: impl Fn(u8) -> u8) {
        self.pixels.iter_mut().for_each(|v| *v = f(*v));
    }

    /// Each channel through the table that `table` makes of its histogram.
    fn map_channels(&mut self, table: fn(&[usize; 256]) -> [u8; 256]) {
        for c in 0..self.channels {
            let mut histogram = [0; 256];
            self.pixels[c..].iter().step_by(self.channels).for_each(|&v| histogram[usize::from(v)] += 1);
            let table = table(&histogram);
            self.pixels[c..].iter_mut().step_by(self.channels).for_each(|v| *v = table[usize::from(*v)]);
        }
    }

    /// The luma of every pixel.
    fn grey(&self) -> impl Iterator<Item = u8> {
        self.pixels.chunks_exact(self.channels).map(|pixel| match *pixel {
            [r, g, b] => luma(&[r, g, b]),
            _ => pixel[0],
        })
    }

    /// The mean of 3×3 pixels, the middle one five times; the border as it is.
    fn smoothed(&self) -> Vec<u8> {
        let mut out = self.pixels.clone();
        let (stride, c) = (self.width * self.channels, self.channels);
        if self.height < 3 || self.width < 3 {
            return out;
        }
        let (side, middle) = (1.0f32 / 13.0, 5.0f32 / 13.0);
        let line = |at: usize, center: f32| {
            let v = |i: usize| f32::from(self.pixels[i]);
            v(at - c) * side + v(at) * center + v(at + c) * side
        };
        for y in 1..self.height - 1 {
            let inner = y * stride + c..(y + 1) * stride - c;
            for (at, to) in inner.clone().zip(&mut out[inner]) {
                // Pillow's order: the row below first.
                let sum = 0.5 + line(at + stride, side) + line(at, middle) + line(at - stride, side);
                *to = sum as u8;
            }
        }
        out
    }

    fn rotate(&mut self, degrees: f64, fill: [u8; 3]) {
        let degrees = degrees.rem_euclid(360.0);
        if degrees == 0.0 {
            return;
        }
        let angle = -degrees.to_radians();
        // Pillow rounds to 15 decimals, so that right angles are exact.
        let round = |x: f64| format!("{x:.15}").parse::<f64>().unwrap_or(x);
        let (cos, sin, less) = (round(libm::cos(angle)), round(libm::sin(angle)), round(-libm::sin(angle)));
        let (x, y) = (self.width as f64 / 2.0, self.height as f64 / 2.0);
        let (u, v) = (cos * -x + sin * -y + x, less * -x + cos * -y + y);
        self.affine([cos, sin, u, less, cos, v], fill);
    }

    /// Output pixel (x, y) from the input at `(a x + b y + c, d x + e y + f)`, pixel centres at halves, bilinear.
    fn affine(&mut self, [a, b, c, d, e, f]: [f64; 6], fill: [u8; 3]) {
        let (w, h, n) = (self.width, self.height, self.channels);
        let old = std::mem::take(&mut self.pixels);
        self.pixels.reserve(old.len());
        for y in 0..h {
            for x in 0..w {
                let (x, y) = (x as f64 + 0.5, y as f64 + 0.5);
                let (u, v) = (a * x + b * y + c, d * x + e * y + f);
                if !(u >= 0.0 && u < w as f64 && v >= 0.0 && v < h as f64) {
                    self.pixels.extend_from_slice(&fill[..n]);
                    continue;
                }
                let (u, v) = (u - 0.5, v - 0.5);
                let (left, top) = (u.floor(), v.floor());
                let (du, dv) = (u - left, v - top);
                // −0.5 has floor −1: the border is repeated.
                let clip = |i: f64, whole: usize| (i.max(0.0) as usize).min(whole - 1);
                let (x0, x1) = (clip(left, w), clip(left + 1.0, w));
                let (y0, y1) = (clip(top, h), clip(top + 1.0, h));
                for k in 0..n {
                    let at = |x: usize, y: usize| f64::from(old[(y * w + x) * n + k]);
                    let row = |y: usize| at(x0, y) + (at(x1, y) - at(x0, y)) * du;
                    let (upper, lower) = (row(y0), row(y1));
                    self.pixels.push((upper + (lower - upper) * dv) as u8);
                }
            }
        }
    }
}

/// `from + alpha (to − from)`, cut off at 0 and 255 and rounded down.
fn blend(from: u8, to: u8, alpha: f32) -> u8 {
    (f32::from(from) + alpha * (f32::from(to) - f32::from(from))) as u8
}

fn identity() -> [u8; 256] {
    std::array::from_fn(|v| v as u8)
}

/// The table of auto-contrast: smallest value to 0, largest to 255.
fn stretch(histogram: &[usize; 256]) -> [u8; 256] {
    let low = histogram.iter().position(|&n| n > 0).unwrap_or(0);
    let high = histogram.iter().rposition(|&n| n > 0).unwrap_or(0);
    if high <= low {
        return identity();
    }
    let scale = 255.0 / (high - low) as f64;
    let offset = -(low as f64) * scale;
    std::array::from_fn(|v| (v as f64 * scale + offset) as u8)
}

/// The table of equalisation: cumulative counts over the mean count per value.
fn flatten(histogram: &[usize; 256]) -> [u8; 256] {
    let last = histogram.iter().rev().find(|&&n| n > 0).copied().unwrap_or(0);
    let step = (histogram.iter().sum::<usize>() - last) / 255;
    if step == 0 {
        return identity();
    }
    let mut sum = step / 2;
    std::array::from_fn(|v| {
        let to = (sum / step).min(255) as u8;
        sum += histogram[v];
        to
    })
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const OPS: [Op; 14] = [
        Op::Identity,
        Op::AutoContrast,
        Op::Equalize,
        Op::Rotate,
        Op::Solarize,
        Op::Color,
        Op::Posterize,
        Op::Contrast,
        Op::Brightness,
        Op::Sharpness,
        Op::ShearX,
        Op::ShearY,
        Op::TranslateX,
        Op::TranslateY,
    ];

    fn bytes(text: &Value) -> Vec<u8> {
        let text = text.as_str().unwrap();
        (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
    }

    /// Every operation on grey and colour pictures of odd sizes: every byte is Pillow's.
    #[test]
    fn equals_pillow() {
        let file: Value = serde_json::from_str(include_str!("../../fixtures/augment/pil.json")).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for case in file["cases"].as_array().unwrap() {
            let picture = &file["pictures"][case["picture"].as_u64().unwrap() as usize];
            let number = |key: &str| picture[key].as_u64().unwrap() as usize;
            let mut bitmap = Bitmap {
                height: number("height"),
                width: number("width"),
                channels: number("channels"),
                pixels: bytes(&picture["pixels"]),
            };
            let fill = bytes(&file["fill"]);
            let (name, amount) = (case["op"].as_str().unwrap(), case["amount"].as_f64().unwrap());
            let op = OPS.into_iter().find(|op| format!("{op:?}") == name).unwrap();
            bitmap.apply(op, amount, [fill[0], fill[1], fill[2]]);
            let wrong = bitmap.pixels.iter().zip(bytes(&case["output"])).filter(|(a, b)| **a != *b).count();
            assert_eq!(wrong, 0, "{name} {amount} on picture {}: bytes that differ", case["picture"]);
            seen.insert(name.to_string());
        }
        assert_eq!(seen.len(), OPS.len());
    }
}
