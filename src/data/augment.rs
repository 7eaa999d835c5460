//! Random augmentation: [`ColorJitter`] of the whole image, [`RandAugment`] on 8-bit pixels after crop and flip, [`RandomErasing`] on the
//! network's input.

use super::Image;
use super::pillow::{Bitmap, Op};
use crate::tensor::random::Rng;
use crate::{Error, Result};

/// What the operations are drawn from: those of the paper.
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

/// Random augmentation (Cubuk et al., *RandAugment*, arXiv 1909.13719): `ops` operations one after another, each drawn uniformly from
/// fourteen, all at one magnitude m from 0 to 10.
///
/// | operation | at m |
/// | --- | --- |
/// | rotate | ±30 m/10 degrees |
/// | shear x, y | ±0.3 m/10 |
/// | translate x, y | ±0.45 m/10 of the side |
/// | color, contrast, brightness, sharpness | factor 1 ± 0.9 m/10 |
/// | posterize | 8 − 4 m/10 bits, rounded |
/// | solarize | from 256 (1 − m/10) on, rounded |
/// | auto-contrast, equalize, identity | |
///
/// Signs are drawn. The arithmetic is Pillow's, geometry is bilinear, and what comes from outside has the mean colour.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandAugment {
    ops: usize,
    magnitude: f64,
}

impl RandAugment {
    /// `ops` operations at `magnitude`.
    ///
    /// # Errors
    /// Unless there are 1 to 14 operations and the magnitude is 0 to 10.
    pub fn new(ops: usize, magnitude: f64) -> Result<Self> {
        if !(1..=OPS.len()).contains(&ops) || !(0.0..=10.0).contains(&magnitude) {
            let message = format!("{ops} operations at magnitude {magnitude}, expected 1 to {} at 0 to 10", OPS.len());
            return Err(Error::config("randaug", message));
        }
        Ok(RandAugment { ops, magnitude })
    }

    /// How many operations, at what magnitude.
    pub fn settings(&self) -> (usize, f64) {
        (self.ops, self.magnitude)
    }

    pub(super) fn apply(&self, bitmap: &mut Bitmap, fill: [u8; 3], rng: &mut Rng) {
        for _ in 0..self.ops {
            let op = OPS[rng.below(OPS.len())];
            let negative = rng.chance(0.5);
            bitmap.apply(op, self.amount(op, negative, bitmap), fill);
        }
    }

    fn amount(&self, op: Op, negative: bool, bitmap: &Bitmap) -> f64 {
        let m = self.magnitude / 10.0;
        let sign = if negative { -1.0 } else { 1.0 };
        match op {
            Op::Identity | Op::AutoContrast | Op::Equalize => 0.0,
            Op::Rotate => sign * 30.0 * m,
            Op::ShearX | Op::ShearY => sign * 0.3 * m,
            Op::TranslateX => sign * 0.45 * m * bitmap.width as f64,
            Op::TranslateY => sign * 0.45 * m * bitmap.height as f64,
            Op::Color | Op::Contrast | Op::Brightness | Op::Sharpness => 1.0 + sign * 0.9 * m,
            Op::Posterize => 8.0 - (4.0 * m).round(),
            Op::Solarize => (256.0 * (1.0 - m)).round(),
        }
    }
}

/// Jitter of colours before the crop, as torchvision's `ColorJitter` without hue: brightness, contrast and saturation in drawn order, each
/// by a factor uniform in 1 ± `strength`. The arithmetic is Pillow's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ColorJitter {
    strength: f64,
}

impl ColorJitter {
    /// Factors of 1 ± `strength`.
    ///
    /// # Errors
    /// Unless it is 0 to 1.
    pub fn new(strength: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&strength) {
            return Err(Error::config("jitter", format!("{strength}, expected 0 to 1")));
        }
        Ok(ColorJitter { strength })
    }

    pub(super) fn apply(&self, image: &Image, rng: &mut Rng) -> Image<'static> {
        let Image { height, width, channels, .. } = *image;
        let mut bitmap = Bitmap { height, width, channels, pixels: image.pixels.to_vec() };
        let mut ops = [Op::Brightness, Op::Contrast, Op::Color];
        for i in (1..ops.len()).rev() {
            ops.swap(i, rng.below(i + 1));
        }
        for op in ops {
            bitmap.apply(op, rng.range(1.0 - self.strength, 1.0 + self.strength), [0; 3]);
        }
        Image { height, width, channels, pixels: bitmap.pixels.into() }
    }
}

/// Random erasing (Zhong et al., arXiv 1708.04896): with a probability, a rectangle of 2 % to a third of the image, its aspect ratio
/// log-uniform in 0.3 to 1/0.3, becomes standard normal noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandomErasing {
    probability: f64,
}

impl RandomErasing {
    /// Erases with `probability`.
    ///
    /// # Errors
    /// Unless it is a probability.
    pub fn new(probability: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&probability) {
            return Err(Error::config("erasing", format!("{probability}, expected a probability")));
        }
        Ok(RandomErasing { probability })
    }

    /// Erases in `image` `[channels, side, side]`.
    pub(super) fn apply(&self, image: &mut [f32], side: usize, rng: &mut Rng) {
        if !rng.chance(self.probability) {
            return;
        }
        let limit = libm::log(0.3);
        for _ in 0..10 {
            let area = rng.range(0.02, 1.0 / 3.0) * (side * side) as f64;
            let aspect = libm::exp(rng.range(limit, -limit));
            let (h, w) = ((area * aspect).sqrt().round() as usize, (area / aspect).sqrt().round() as usize);
            if h >= side || w >= side || h == 0 || w == 0 {
                continue;
            }
            let (top, left) = (rng.between(0, side - h), rng.between(0, side - w));
            for plane in image.chunks_exact_mut(side * side) {
                for row in plane.chunks_exact_mut(side).skip(top).take(h) {
                    row[left..left + w].iter_mut().for_each(|x| *x = rng.normal() as f32);
                }
            }
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::random::Purpose;

    fn rng(sample: u64) -> Rng {
        Rng::new(2, Purpose::Augment, 1, sample)
    }

    fn bitmap() -> Bitmap {
        let mut rng = rng(0);
        Bitmap { height: 12, width: 10, channels: 3, pixels: (0..360).map(|_| rng.next_u32() as u8).collect() }
    }

    /// The ends of the scale, and that a magnitude moves the pictures as far as the table says.
    #[test]
    fn magnitudes() {
        let amount = |m, op, negative| RandAugment::new(2, m).unwrap().amount(op, negative, &bitmap());
        assert_eq!([0.0, 5.0, 10.0].map(|m| amount(m, Op::Posterize, false)), [8.0, 6.0, 4.0]);
        assert_eq!([0.0, 5.0, 10.0].map(|m| amount(m, Op::Solarize, false)), [256.0, 128.0, 0.0]);
        assert_eq!([amount(10.0, Op::Rotate, true), amount(10.0, Op::TranslateX, false)], [-30.0, 4.5]);
        // At magnitude 0 every operation but auto-contrast and equalisation leaves the picture as it is.
        for op in OPS.into_iter().filter(|op| ![Op::AutoContrast, Op::Equalize].contains(op)) {
            let mut picture = bitmap();
            picture.apply(op, amount(0.0, op, true), [9; 3]);
            assert_eq!(picture, bitmap(), "{op:?}");
        }
    }

    /// The same stream gives the same picture, another one another; grey pictures work; the size stays.
    #[test]
    fn drawn_from_the_stream() {
        let augment = RandAugment::new(3, 9.0).unwrap();
        let drawn = |sample| {
            let mut picture = bitmap();
            augment.apply(&mut picture, [1, 2, 3], &mut rng(sample));
            picture
        };
        assert_eq!(drawn(1), drawn(1));
        assert!((2..20).filter(|&i| drawn(i) != drawn(1)).count() > 15);
        let mut grey = Bitmap { height: 30, width: 12, channels: 1, pixels: bitmap().pixels };
        (0..40).for_each(|i| augment.apply(&mut grey, [7; 3], &mut rng(i)));
        assert_eq!(grey.pixels.len(), 360);
    }

    /// As often as asked, one rectangle of the right size, the same in all channels, standard normal.
    #[test]
    fn erases() {
        let (n, side) = (2000, 16);
        let (mut hits, mut area, mut sum, mut squares) = (0, 0.0, 0.0, 0.0);
        for i in 0..n {
            let mut image = vec![50.0; 2 * side * side];
            RandomErasing::new(0.25).unwrap().apply(&mut image, side, &mut rng(i));
            let erased: Vec<f32> = image.iter().copied().filter(|&x| x != 50.0).collect();
            let (first, second) = image.split_at(side * side);
            assert!(first.iter().zip(second).all(|(a, b)| (*a == 50.0) == (*b == 50.0)));
            hits += usize::from(!erased.is_empty());
            area += erased.len() as f64 / 512.0;
            sum += erased.iter().map(|&x| f64::from(x)).sum::<f64>();
            squares += erased.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
        }
        let count = area * 512.0;
        assert!(hits.abs_diff(500) < 80, "{hits}");
        assert!((0.1..0.25).contains(&(area / hits as f64)), "{}", area / hits as f64);
        assert!((sum / count).abs() < 0.03 && (squares / count - 1.0).abs() < 0.04, "{} {}", sum / count, squares / count);
    }

    #[test]
    fn bad_values() {
        assert!(RandAugment::new(0, 5.0).unwrap_err().to_string().contains("`randaug`"));
        assert!(RandAugment::new(2, 10.5).is_err() && RandAugment::new(2, f64::NAN).is_err());
        assert!(RandomErasing::new(1.5).unwrap_err().to_string().contains("`erasing`"));
    }
}
