//! From an 8-bit image to the floats of a network's input: crop, bicubic resize, flip, normalise.
//!
//! Training: a random part of the image (random resized crop), mirrored half of the time. Evaluation: the shorter side is
//! resized, then the centre is cut out. Geometry and rounding are torchvision's, pixels are Pillow's (`resample`).
//! The crop is drawn from the caller's random stream and depends only on that stream and the image's size, never on the size of the result:
//! two transforms of different `size` show the same part for the same stream (as BEiT needs).
//!
//! Szegedy et al., *Going deeper with convolutions*, CVPR 2015 (random resized crop).

use std::cell::RefCell;

use super::Image;
use super::augment::{ColorJitter, RandAugment, RandomErasing};
use super::pillow::Bitmap;
use super::resample::{Scratch, View, resize};
use crate::tensor::random::Rng;
use crate::{Error, Result};

/// Largest `size`.
const MAX_SIZE: usize = 8192;

/// Mean and standard deviation per channel, of pixels in `[0, 1]`; grey networks use the first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalization {
    /// Subtracted.
    pub mean: [f32; 3],
    /// Divided by.
    pub std: [f32; 3],
}

impl Normalization {
    /// Of ImageNet-1k, as almost every published network uses them.
    pub const IMAGENET: Self = Normalization { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };
    /// To `[-1, 1]`.
    pub const HALF: Self = Normalization { mean: [0.5; 3], std: [0.5; 3] };
    /// Of the 60,000 training images of Fashion-MNIST.
    pub const FASHION_MNIST: Self = Normalization { mean: [0.286; 3], std: [0.353; 3] };
    /// None: pixels in `[0, 1]`.
    pub const NONE: Self = Normalization { mean: [0.0; 3], std: [1.0; 3] };
}

/// How the part of the image is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CropRule {
    /// Random resized crop: area a uniform fraction of the image's, aspect ratio log-uniform; mirrored with probability `flip`.
    Random {
        /// Smallest and largest fraction of the area, in `(0, 1]`.
        scale: (f64, f64),
        /// Smallest and largest width / height.
        ratio: (f64, f64),
        /// Probability of a horizontal flip.
        flip: f64,
    },
    /// The shorter side resized to `resize` pixels, then the centre.
    Center {
        /// At least the transform's `size`.
        resize: usize,
    },
}

/// A part of an image, as [`Transform::draw`] chose it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crop {
    /// First row.
    pub top: usize,
    /// First column.
    pub left: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Whether it is mirrored left to right.
    pub flip: bool,
}

/// A transform to `[channels, size, size]` floats.
#[derive(Clone, Debug)]
pub struct Transform {
    size: usize,
    channels: usize,
    rule: CropRule,
    /// The normalised float of each 8-bit value, per channel.
    table: [[f32; 256]; 3],
    /// The mean colour: what augmentation puts where an image has no pixels.
    fill: [u8; 3],
    jitter: Option<ColorJitter>,
    augment: Option<RandAugment>,
    erasing: Option<RandomErasing>,
}

thread_local! {
    // A worker transforms millions of images: it keeps its buffers.
    static BUFFERS: RefCell<(Scratch, Vec<u8>, Vec<u8>)> = RefCell::default();
}

impl Transform {
    /// A transform to `channels` (1 or 3) planes of `size`×`size`. Grey images are repeated for 3 channels; RGB images become ITU-R 601
    /// luma for 1 channel.
    ///
    /// # Errors
    /// If a size is 0 or too large, a range is empty, or a standard deviation is not positive.
    pub fn new(size: usize, channels: usize, rule: CropRule, normalization: Normalization) -> Result<Self> {
        if size == 0 || size > MAX_SIZE {
            return Err(Error::config("size", format!("{size}, expected 1 to {MAX_SIZE}")));
        }
        if channels != 1 && channels != 3 {
            return Err(Error::config("channels", format!("{channels}, expected 1 or 3")));
        }
        match rule {
            CropRule::Random { scale, ratio, flip } => {
                if !(0.0 < scale.0 && scale.0 <= scale.1 && scale.1 <= 1.0) {
                    return Err(Error::config("scale", format!("{scale:?}, expected 0 < low ≤ high ≤ 1")));
                }
                if !(0.0 < ratio.0 && ratio.0 <= ratio.1 && ratio.1.is_finite()) {
                    return Err(Error::config("ratio", format!("{ratio:?}, expected 0 < low ≤ high")));
                }
                if !(0.0..=1.0).contains(&flip) {
                    return Err(Error::config("flip", format!("{flip}, expected a probability")));
                }
            }
            CropRule::Center { resize } => {
                if resize < size || resize > 2 * MAX_SIZE {
                    return Err(Error::config("resize", format!("{resize}, expected {size} (the size) to {}", 2 * MAX_SIZE)));
                }
            }
        }
        let Normalization { mean, std } = normalization;
        if mean.iter().any(|m| !m.is_finite()) || std.iter().any(|s| !(*s > 0.0 && s.is_finite())) {
            return Err(Error::config("normalization", format!("mean {mean:?}, std {std:?}; expected finite means, positive deviations")));
        }
        let table = std::array::from_fn(|c| std::array::from_fn(|v| (v as f32 / 255.0 - mean[c]) / std[c]));
        let fill = mean.map(|m| (255.0 * m).round() as u8);
        Ok(Transform { size, channels, rule, table, fill, jitter: None, augment: None, erasing: None })
    }

    /// Random resized crop with `scale`, ratio 3/4 to 4/3, flip with probability 1/2.
    ///
    /// # Errors
    /// As [`Transform::new`].
    pub fn training(size: usize, channels: usize, scale: (f64, f64), normalization: Normalization) -> Result<Self> {
        Self::new(size, channels, CropRule::Random { scale, ratio: (3.0 / 4.0, 4.0 / 3.0), flip: 0.5 }, normalization)
    }

    /// Shorter side to `resize`, centre crop of `size`.
    ///
    /// # Errors
    /// As [`Transform::new`].
    pub fn evaluation(size: usize, channels: usize, resize: usize, normalization: Normalization) -> Result<Self> {
        Self::new(size, channels, CropRule::Center { resize }, normalization)
    }

    /// The same with random augmentation in 8 bits after crop and flip, and random erasing after normalisation.
    #[must_use]
    pub fn augmented(self, augment: Option<RandAugment>, erasing: Option<RandomErasing>) -> Self {
        Transform { augment, erasing, ..self }
    }

    /// The same with jitter of the image's colours before the crop is cut out.
    #[must_use]
    pub fn jittered(self, jitter: Option<ColorJitter>) -> Self {
        Transform { jitter, ..self }
    }

    /// Side of the result in pixels.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Channels of the result.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Floats per image.
    pub fn len(&self) -> usize {
        self.channels * self.size * self.size
    }

    /// Never: the result has at least one pixel.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Chooses the part of a `height`×`width` image (both positive) that a random rule shows; all of it under the centre rule.
    pub fn draw(&self, height: usize, width: usize, rng: &mut Rng) -> Crop {
        let CropRule::Random { scale, ratio, flip } = self.rule else {
            return Crop { top: 0, left: 0, height, width, flip: false };
        };
        let area = height as f64 * width as f64;
        let (log_low, log_high) = (libm::log(ratio.0), libm::log(ratio.1));
        let mut crop = None;
        // Ten trials, as torchvision: at extreme aspect ratios most rectangles don't fit.
        for _ in 0..10 {
            let target = area * rng.range(scale.0, scale.1);
            let aspect = libm::exp(rng.range(log_low, log_high));
            let w = (target * aspect).sqrt().round_ties_even() as usize;
            let h = (target / aspect).sqrt().round_ties_even() as usize;
            if (1..=width).contains(&w) && (1..=height).contains(&h) {
                crop = Some((rng.between(0, height - h), rng.between(0, width - w), h, w));
                break;
            }
        }
        let (top, left, h, w) = crop.unwrap_or_else(|| {
            // The largest centred rectangle whose aspect ratio is in range.
            let (mut h, mut w) = (height, width);
            let aspect = width as f64 / height as f64;
            if aspect < ratio.0 {
                h = (width as f64 / ratio.0).round_ties_even() as usize;
            } else if aspect > ratio.1 {
                w = (height as f64 * ratio.1).round_ties_even() as usize;
            }
            let (h, w) = (h.clamp(1, height), w.clamp(1, width));
            ((height - h) / 2, (width - w) / 2, h, w)
        });
        Crop { top, left, height: h, width: w, flip: rng.chance(flip) }
    }

    /// Draws a crop and applies it, then what [`augmented`](Self::augmented) asks for: `image` to `out` `[channels, size, size]`. The
    /// centre rule draws nothing from `rng`.
    ///
    /// # Errors
    /// If `out` has another length than [`Transform::len`], or the image's sizes don't fit its pixels.
    pub fn apply(&self, image: &Image, rng: &mut Rng, out: &mut [f32]) -> Result<()> {
        check_image(image)?;
        let crop = self.draw(image.height, image.width, rng);
        let jittered = self.jitter.map(|jitter| jitter.apply(image, rng));
        let image = jittered.as_ref().unwrap_or(image);
        match self.augment {
            None => self.apply_crop(image, crop, out)?,
            Some(augment) => self.with_pixels(image, crop, out, |view, out| {
                let mut bitmap = self.cut(view, crop.flip);
                // Pictures in grey have one fill, the mean's luma.
                let fill = if bitmap.channels == 1 { [luma(&self.fill); 3] } else { self.fill };
                augment.apply(&mut bitmap, fill, rng);
                let view = View { pixels: &bitmap.pixels, stride: self.size, channels: bitmap.channels, origin: (0, 0), size: view.size };
                self.normalize(view, false, out);
            })?,
        }
        if let Some(erasing) = self.erasing {
            erasing.apply(out, self.size, rng);
        }
        Ok(())
    }

    /// Applies a crop that [`Transform::draw`] (of this or another transform) chose, without augmentation.
    ///
    /// # Errors
    /// As [`Transform::apply`], or if the crop does not lie inside the image.
    pub fn apply_crop(&self, image: &Image, crop: Crop, out: &mut [f32]) -> Result<()> {
        self.with_pixels(image, crop, out, |view, out| self.normalize(view, crop.flip, out))
    }

    /// `finish` on the `size`×`size` pixels of the crop at a view's origin, before the flip, and the result.
    fn with_pixels(&self, image: &Image, crop: Crop, out: &mut [f32], finish: impl FnOnce(View, &mut [f32])) -> Result<()> {
        check_image(image)?;
        if out.len() != self.len() {
            return Err(Error::shape("transformed image", [self.channels, self.size, self.size], [out.len()]));
        }
        let inside = |start: usize, length: usize, whole: usize| length > 0 && start.checked_add(length).is_some_and(|end| end <= whole);
        if !inside(crop.top, crop.height, image.height) || !inside(crop.left, crop.width, image.width) {
            let message = format!("{crop:?}, expected a part of {}×{} pixels", image.height, image.width);
            return Err(Error::value("crop", message));
        }
        BUFFERS.with_borrow_mut(|(scratch, grey, pixels)| {
            let mut view = View {
                pixels: &image.pixels,
                stride: image.width,
                channels: image.channels,
                origin: (crop.top, crop.left),
                size: (crop.height, crop.width),
            };
            if self.channels == 1 && image.channels == 3 {
                grey.clear();
                grey.extend(image.pixels.as_chunks().0.iter().map(luma));
                view = View { pixels: grey, channels: 1, ..view };
            }
            // Random: the crop becomes the result. Centre: the crop is resized and its middle is the result.
            let full = match self.rule {
                CropRule::Random { .. } => (self.size, self.size),
                CropRule::Center { resize } => shorter_side(view.size, resize),
            };
            let (top, left) = (center(full.0, self.size), center(full.1, self.size));
            let (rows, columns) = (top..top + self.size, left..left + self.size);
            if full == view.size {
                // Nothing to resize: straight from the image.
                let origin = (view.origin.0 + top, view.origin.1 + left);
                finish(View { origin, ..view }, out);
            } else {
                pixels.clear();
                pixels.resize(self.size * self.size * view.channels, 0);
                resize(view, full, rows, columns, scratch, pixels);
                let result = View { pixels, stride: self.size, channels: view.channels, origin: (0, 0), size: (self.size, self.size) };
                finish(result, out);
            }
        });
        Ok(())
    }

    /// The `size`×`size` pixels at the view's origin, flipped, on their own.
    fn cut(&self, view: View, flip: bool) -> Bitmap {
        let (n, c) = (self.size, view.channels);
        let mut pixels = Vec::with_capacity(n * n * c);
        for y in 0..n {
            let start = ((view.origin.0 + y) * view.stride + view.origin.1) * c;
            let row = &view.pixels[start..start + n * c];
            if flip {
                row.rchunks_exact(c).for_each(|pixel| pixels.extend_from_slice(pixel));
            } else {
                pixels.extend_from_slice(row);
            }
        }
        Bitmap { height: n, width: n, channels: c, pixels }
    }

    /// The `size`×`size` pixels at the view's origin to float planes.
    fn normalize(&self, view: View, flip: bool, out: &mut [f32]) {
        let n = self.size;
        for (c, plane) in out.chunks_exact_mut(n * n).enumerate() {
            let table = &self.table[c];
            let source = c.min(view.channels - 1);
            for (y, line) in plane.chunks_exact_mut(n).enumerate() {
                let start = ((view.origin.0 + y) * view.stride + view.origin.1) * view.channels;
                let row = view.pixels[start..start + n * view.channels][source..].iter().step_by(view.channels);
                if flip {
                    line.iter_mut().rev().zip(row).for_each(|(to, &v)| *to = table[usize::from(v)]);
                } else {
                    line.iter_mut().zip(row).for_each(|(to, &v)| *to = table[usize::from(v)]);
                }
            }
        }
    }
}

fn check_image(image: &Image) -> Result<()> {
    let Image { height, width, channels, ref pixels } = *image;
    let size = height.checked_mul(width).and_then(|n| n.checked_mul(channels));
    if height == 0 || width == 0 || !matches!(channels, 1 | 3) || size != Some(pixels.len()) {
        let message = format!("{} bytes for {height}×{width}×{channels}, expected a non-empty image of 1 or 3 channels", pixels.len());
        return Err(Error::value("image", message));
    }
    Ok(())
}

/// ITU-R 601 luma in 16-bit fixed point, as Pillow's mode `L`.
pub(super) fn luma(&[r, g, b]: &[u8; 3]) -> u8 {
    ((u32::from(r) * 19595 + u32::from(g) * 38470 + u32::from(b) * 7471 + 0x8000) >> 16) as u8
}

/// Height and width after the shorter side is brought to `short`; the longer one is rounded down.
fn shorter_side((height, width): (usize, usize), short: usize) -> (usize, usize) {
    if height <= width { (short, short * width / height) } else { (short * height / width, short) }
}

/// Where the middle `part` of `whole` begins; ties go to the even number, as Python rounds.
fn center(whole: usize, part: usize) -> usize {
    ((whole - part) as f64 / 2.0).round_ties_even() as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::random::Purpose;

    fn rng(sample: u64) -> Rng {
        Rng::new(5, Purpose::Augment, 2, sample)
    }

    fn noise(height: usize, width: usize, channels: usize) -> Image<'static> {
        let mut rng = Rng::new(1, Purpose::Case, height as u64, width as u64);
        let pixels = (0..height * width * channels).map(|_| rng.next_u32() as u8).collect();
        Image { height, width, channels, pixels }
    }

    fn bytes(text: &serde_json::Value) -> Vec<u8> {
        let text = text.as_str().unwrap();
        (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
    }

    /// The evaluation transform, in colour and as luma, against Pillow and torchvision's rounding: every byte.
    #[test]
    fn center_equals_pillow() {
        let file: serde_json::Value = serde_json::from_str(include_str!("../../fixtures/resize/pil.json")).unwrap();
        let cases = file["centers"].as_array().unwrap();
        assert_eq!(cases.len(), 4);
        for case in cases {
            let number = |v: &serde_json::Value| v.as_u64().unwrap() as usize;
            let (height, width) = (number(&case["from"][0]), number(&case["from"][1]));
            let (channels, size) = (number(&case["channels"]), number(&case["size"]));
            let image = Image { height, width, channels: 3, pixels: bytes(&case["input"]).into() };
            let transform = Transform::evaluation(size, channels, number(&case["resize"]), Normalization::NONE).unwrap();
            let mut out = vec![f32::NAN; transform.len()];
            transform.apply(&image, &mut rng(0), &mut out).unwrap();
            for (i, want) in bytes(&case["output"]).into_iter().enumerate() {
                let (pixel, c) = (i / channels, i % channels);
                assert_eq!((out[c * size * size + pixel] * 255.0).round() as u8, want, "{height}×{width} pixel {pixel} channel {c}");
            }
        }
    }

    /// Crops lie inside the image, cover the scales and ratios asked for, and flip half of the time.
    #[test]
    fn drawn_crops() {
        let transform = Transform::training(8, 3, (0.2, 1.0), Normalization::HALF).unwrap();
        let (height, width, n) = (200, 300, 4000);
        let (mut flips, mut area) = (0, 0.0);
        for i in 0..n {
            let crop = transform.draw(height, width, &mut rng(i));
            assert!(crop.height > 0 && crop.width > 0 && crop.top + crop.height <= height && crop.left + crop.width <= width);
            let (fraction, ratio) = ((crop.height * crop.width) as f64 / 60_000.0, crop.width as f64 / crop.height as f64);
            assert!((0.19..=1.0).contains(&fraction) && (0.74..=1.36).contains(&ratio), "{crop:?}");
            flips += usize::from(crop.flip);
            area += fraction;
        }
        assert!(flips.abs_diff(2000) < 150, "{flips}");
        // Uniform in [0.2, 1], less the trials that don't fit: 0.4526 in a simulation of torchvision's rule.
        assert!((area / n as f64 - 0.4526).abs() < 0.01, "{}", area / n as f64);
        // A rectangle of ratio 3/4 to 4/3 and 90 % of the area never fits: the centred one is taken.
        let whole = Transform::training(8, 3, (0.9, 1.0), Normalization::HALF).unwrap();
        let crop = whole.draw(100, 1000, &mut rng(0));
        assert_eq!((crop.top, crop.left, crop.height, crop.width), (0, 433, 100, 133));
        let crop = whole.draw(1000, 100, &mut rng(0));
        assert_eq!((crop.top, crop.left, crop.height, crop.width), (433, 0, 133, 100));
        assert_eq!(whole.draw(1, 1, &mut rng(3)).height, 1);
    }

    /// Sizes don't enter the draw; a crop applied is the crop cut out and resized; flips mirror.
    #[test]
    fn applied_crops() {
        let image = noise(31, 45, 3);
        let (small, large) = (
            Transform::training(9, 3, (0.3, 1.0), Normalization::IMAGENET),
            Transform::training(40, 3, (0.3, 1.0), Normalization::IMAGENET),
        );
        let (small, large) = (small.unwrap(), large.unwrap());
        for i in 0..50 {
            let crop = small.draw(31, 45, &mut rng(i));
            assert_eq!(crop, large.draw(31, 45, &mut rng(i)));
            let rows = crop.top..crop.top + crop.height;
            let cut = rows.flat_map(|y| image.pixels[(y * 45 + crop.left) * 3..(y * 45 + crop.left + crop.width) * 3].to_vec()).collect();
            let cut = Image { height: crop.height, width: crop.width, channels: 3, pixels: cut };
            let all = Crop { top: 0, left: 0, flip: false, ..crop };
            let (mut got, mut want) = (vec![f32::NAN; large.len()], vec![f32::NAN; large.len()]);
            large.apply(&image, &mut rng(i), &mut got).unwrap();
            large.apply_crop(&cut, all, &mut want).unwrap();
            if crop.flip {
                want.chunks_mut(40).for_each(<[f32]>::reverse);
            }
            assert_eq!(got, want, "{crop:?}");
        }
    }

    /// A crop of the result's size is normalised as it is; grey becomes three equal planes before normalisation.
    #[test]
    fn same_size_and_channels() {
        let grey = noise(6, 6, 1);
        let norm = Normalization::IMAGENET;
        let transform = Transform::evaluation(6, 3, 6, norm).unwrap();
        let mut out = vec![f32::NAN; transform.len()];
        transform.apply(&grey, &mut rng(0), &mut out).unwrap();
        for c in 0..3 {
            for (got, &v) in out[c * 36..(c + 1) * 36].iter().zip(grey.pixels.iter()) {
                assert_eq!(*got, (f32::from(v) / 255.0 - norm.mean[c]) / norm.std[c]);
            }
        }
        let rgb = noise(8, 6, 3);
        transform.apply(&rgb, &mut rng(0), &mut out).unwrap();
        assert_eq!(out[36], (f32::from(rgb.pixels[6 * 3 + 1]) / 255.0 - norm.mean[1]) / norm.std[1]);
    }

    /// Augmentation works on the very pixels, flipped, that are else normalised; it changes pictures, in grey and in colour.
    #[test]
    fn augmented_at_magnitude_0() {
        let plain = Transform::training(9, 3, (0.3, 1.0), Normalization::IMAGENET).unwrap();
        let with = |ops, magnitude| plain.clone().augmented(Some(RandAugment::new(ops, magnitude).unwrap()), None);
        for channels in [1, 3] {
            let image = noise(31, 45, channels);
            let run = |transform: &Transform, i| {
                let mut out = vec![f32::NAN; transform.len()];
                transform.apply(&image, &mut rng(i), &mut out).unwrap();
                out
            };
            let equal = |transform: &Transform| (0..60).filter(|&i| run(transform, i) == run(&plain, i)).count();
            // Only auto-contrast and equalisation (2 of 14) do anything.
            assert!((45..60).contains(&equal(&with(1, 0.0))), "{}", equal(&with(1, 0.0)));
            assert!(equal(&with(2, 9.0)) < 20);
            let erased = plain.clone().augmented(None, Some(RandomErasing::new(0.5).unwrap()));
            assert!((20..40).contains(&equal(&erased)), "{}", equal(&erased));
        }
    }

    /// Two views of one stream show the same part in the same colours; grey pictures stay grey, and jitter changes what is seen.
    #[test]
    fn jittered_views() {
        let view = |size, strength| {
            let transform = Transform::training(size, 3, (0.3, 1.0), Normalization::NONE).unwrap();
            transform.jittered(Some(ColorJitter::new(strength).unwrap()))
        };
        let flat = |rgb: [u8; 3]| Image { height: 21, width: 30, channels: 3, pixels: rgb.repeat(21 * 30).into() };
        let run = |transform: &Transform, image: &Image, i| {
            let mut out = vec![f32::NAN; transform.len()];
            transform.apply(image, &mut rng(i), &mut out).unwrap();
            out
        };
        let plain = Transform::training(7, 3, (0.3, 1.0), Normalization::NONE).unwrap();
        let (small, large) = (view(7, 0.4), view(12, 0.4));
        let (orange, noisy) = (flat([200, 120, 40]), noise(21, 30, 3));
        let mut reds = Vec::new();
        for i in 0..200 {
            let (a, b) = (run(&small, &orange, i), run(&large, &orange, i));
            for c in 0..3 {
                // One colour stays one colour, in both views.
                let colour = a[c * 49];
                assert!(a[c * 49..(c + 1) * 49].iter().chain(&b[c * 144..(c + 1) * 144]).all(|v| *v == colour), "{a:?}");
            }
            reds.push(a[0]);
            let grey = run(&small, &flat([90; 3]), i);
            assert!(grey[..49] == grey[49..98] && grey[..49] == grey[98..]);
            assert_eq!(run(&view(7, 0.0), &noisy, i), run(&plain, &noisy, i));
            assert_ne!(run(&small, &noisy, i), run(&plain, &noisy, i));
        }
        let (low, high) = reds.iter().fold((1f32, 0f32), |(low, high), red| (low.min(*red), high.max(*red)));
        assert!(low < 0.55 && high > 0.97 && low > 0.3, "{low} {high}");
        assert!(ColorJitter::new(1.5).is_err() && ColorJitter::new(f64::NAN).is_err());
    }

    #[test]
    fn bad_values() {
        let new = |size, channels, rule| Transform::new(size, channels, rule, Normalization::HALF).map(|_| ()).unwrap_err().to_string();
        let random = |scale, ratio, flip| CropRule::Random { scale, ratio, flip };
        assert!(new(0, 3, CropRule::Center { resize: 8 }).contains("`size`"));
        assert!(new(8, 2, CropRule::Center { resize: 8 }).contains("`channels`"));
        assert!(new(8, 3, CropRule::Center { resize: 7 }).contains("`resize`"));
        assert!(new(8, 3, random((0.0, 1.0), (1.0, 1.0), 0.5)).contains("`scale`"));
        assert!(new(8, 3, random((0.5, f64::NAN), (1.0, 1.0), 0.5)).contains("`scale`"));
        assert!(new(8, 3, random((0.5, 1.0), (2.0, 1.0), 0.5)).contains("`ratio`"));
        assert!(new(8, 3, random((0.5, 1.0), (1.0, 1.0), 1.5)).contains("`flip`"));
        let flat = Normalization { std: [1.0, 0.0, 1.0], ..Normalization::HALF };
        assert!(Transform::evaluation(8, 3, 8, flat).is_err());

        let transform = Transform::evaluation(4, 1, 4, Normalization::HALF).unwrap();
        assert!(transform.apply(&noise(5, 5, 1), &mut rng(0), &mut [0.0; 15]).is_err());
        let mut broken = noise(5, 5, 1);
        broken.height = 6;
        assert!(transform.apply(&broken, &mut rng(0), &mut [0.0; 16]).unwrap_err().to_string().contains("image"));
        let outside = Crop { top: 3, left: 0, height: 3, width: 5, flip: false };
        assert!(transform.apply_crop(&noise(5, 5, 1), outside, &mut [0.0; 16]).unwrap_err().to_string().contains("crop"));
    }
}
