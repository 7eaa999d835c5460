//! `mim.focal_frequency_loss`: the distance of two images in the Fourier domain, where it is large counting more (arXiv 2012.12821, as
//! used by A²MIM, 2205.13943).
//!
//! `E = DFT(pred − target)`, orthonormal, per plane; with `ave_spectrum` of the mean over the batch. `a = |E|`, `w = a^α` (`ln(w + 1)` with
//! `log_matrix`) over its maximum: of everything with `batch_matrix`, else of each plane. `loss = weight · mean(w a²)`, w a constant.
//!
//! With `C_n[k, j] = cos(2πkj/n)/√n` and `S_n` likewise: `A = C_H e`, `B = −S_H e`, `Re E = A C_W + B S_W`, `Im E = B C_W − A S_W`.
//!
//! Backward: `G = (2 weight / elements) w ⊙ E`, `∂e = Re(Fᴴ G)`: `A' = C_H Re G − S_H Im G`, `B' = C_H Im G + S_H Re G`,
//! `∂e = A' C_W − B' S_W`.

use rayon::prelude::*;

use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::linalg::{Epilogue, Mat, MatMut, gemm};
use crate::tensor::random::Rng;
use crate::tensor::{Buffer, Float, Tensor};

/// The orthonormal two-dimensional DFT of real planes `[H, W]`, as products with matrices of cosines and sines.
pub struct Dft<T: Float> {
    size: [usize; 2],
    cos: [Tensor<T>; 2],
    sin: [Tensor<T>; 2],
    /// −sin.
    nis: [Tensor<T>; 2],
}

impl<T: Float> Dft<T> {
    /// For planes of this size.
    pub fn new(size: [usize; 2]) -> Self {
        let matrix = |n: usize, f: fn(f64) -> f64| {
            let scale = 1.0 / (n as f64).sqrt();
            Tensor::from_fn([n, n], |i| T::from_f64(scale * f(std::f64::consts::TAU * ((i / n * (i % n)) % n) as f64 / n as f64)))
        };
        let nis = |x: f64| -libm::sin(x);
        Dft { size, cos: size.map(|n| matrix(n, libm::cos)), sin: size.map(|n| matrix(n, libm::sin)), nis: size.map(|n| matrix(n, nis)) }
    }

    /// `out ← l x`, or `+=`, for a matrix of rows.
    fn left(&self, l: &Tensor<T>, x: &[T], out: &mut [T], accumulate: bool) {
        let [h, w] = self.size;
        gemm(Mat::new(l.data(), h, h), Mat::new(x, h, w), MatMut::new(out, h, w), Epilogue { accumulate, ..Epilogue::default() });
    }

    /// `out ← x r`, or `+=`, for a matrix of columns.
    fn right(&self, x: &[T], r: &Tensor<T>, out: &mut [T], accumulate: bool) {
        let [h, w] = self.size;
        gemm(Mat::new(x, h, w), Mat::new(r.data(), w, w), MatMut::new(out, h, w), Epilogue { accumulate, ..Epilogue::default() });
    }

    /// Real and imaginary part of the transform of all planes of `x`.
    pub fn forward(&self, x: &Tensor<T>) -> [Tensor<T>; 2] {
        let n = self.size[0] * self.size[1];
        let (mut re, mut im) = (Tensor::scratch(x.shape()), Tensor::scratch(x.shape()));
        re.data_mut().par_chunks_mut(n).zip(im.data_mut().par_chunks_mut(n)).zip(x.data().par_chunks(n)).for_each(|((re, im), x)| {
            let (mut a, mut b) = (Buffer::<T>::scratch(n), Buffer::<T>::scratch(n));
            self.left(&self.cos[0], x, &mut a, false);
            self.left(&self.nis[0], x, &mut b, false);
            self.right(&a, &self.cos[1], re, false);
            self.right(&b, &self.sin[1], re, true);
            self.right(&b, &self.cos[1], im, false);
            self.right(&a, &self.nis[1], im, true);
        });
        [re, im]
    }

    /// The real part of the inverse transform.
    pub fn inverse(&self, [re, im]: [&Tensor<T>; 2]) -> Tensor<T> {
        let n = self.size[0] * self.size[1];
        let mut x = Tensor::scratch(re.shape());
        x.data_mut().par_chunks_mut(n).zip(re.data().par_chunks(n)).zip(im.data().par_chunks(n)).for_each(|((x, re), im)| {
            let (mut a, mut b) = (Buffer::<T>::scratch(n), Buffer::<T>::scratch(n));
            self.left(&self.cos[0], re, &mut a, false);
            self.left(&self.nis[0], im, &mut a, true);
            self.left(&self.cos[0], im, &mut b, false);
            self.left(&self.sin[0], re, &mut b, true);
            self.right(&a, &self.cos[1], x, false);
            self.right(&b, &self.nis[1], x, true);
        });
        x
    }
}

/// `[B, C, H, W]` of two images, which must agree and hold something.
pub fn same_images<T: Float>(pred: &Tensor<T>, target: &Tensor<T>) -> Result<[usize; 4]> {
    let dims = pred.dims("pred")?;
    target.expect_shape("target", pred.shape())?;
    if dims.contains(&0) { Err(Error::shape("pred", "at least one pixel", pred.shape())) } else { Ok(dims) }
}

/// The loss.
#[derive(Clone, Copy, Debug)]
pub struct FocalFrequency {
    /// α.
    pub alpha: f64,
    /// Transforms the mean over the batch.
    pub ave_spectrum: bool,
    /// The weight is a logarithm.
    pub log_matrix: bool,
    /// One maximum for everything.
    pub batch_matrix: bool,
    /// A factor on the loss.
    pub weight: f64,
}

impl FocalFrequency {
    /// What A²MIM takes.
    pub const A2MIM: FocalFrequency = FocalFrequency { alpha: 1.0, ave_spectrum: true, log_matrix: true, batch_matrix: true, weight: 1.0 };

    /// The loss and the gradient of `pred`.
    pub fn run<T: Float>(&self, pred: &Tensor<T>, target: &Tensor<T>) -> Result<(f64, Tensor<T>)> {
        let [b, c, h, w] = same_images(pred, target)?;
        let difference = |i: usize| pred.data()[i].to_f64() - target.data()[i].to_f64();
        let (images, plane) = (if self.ave_spectrum { 1 } else { b }, c * h * w);
        let e = Tensor::from_fn([images, c, h, w], |i| {
            T::from_f64(if self.ave_spectrum {
                (0..b).fold(0.0, |sum, k| sum + difference(k * plane + i)) / b as f64
            } else {
                difference(i)
            })
        });
        let dft = Dft::new([h, w]);
        let [mut re, mut im] = dft.forward(&e);
        let square = |i: usize| re.data()[i].to_f64().powi(2) + im.data()[i].to_f64().powi(2);
        let elements = images * plane;
        let mut weights: Vec<f64> = (0..elements)
            .map(|i| {
                let a = square(i).sqrt();
                let w = if self.alpha == 1.0 { a } else { libm::pow(a, self.alpha) };
                if self.log_matrix { libm::log(w + 1.0) } else { w }
            })
            .collect();
        for part in weights.chunks_mut(if self.batch_matrix { elements } else { h * w }) {
            let max = part.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            // 0/0 is no weight.
            part.iter_mut().for_each(|w| *w = if (*w / max).is_nan() { 0.0 } else { (*w / max).clamp(0.0, 1.0) });
        }
        let sum = (0..elements).fold(0.0, |sum, i| sum + weights[i] * square(i));
        let factor = 2.0 * self.weight / elements as f64;
        for part in [&mut re, &mut im] {
            part.data_mut().iter_mut().zip(&weights).for_each(|(x, &w)| *x *= T::from_f64(factor * w));
        }
        let de = dft.inverse([&re, &im]);
        let share = if self.ave_spectrum { 1.0 / b as f64 } else { 1.0 };
        let d = Tensor::from_fn(pred.shape(), |i| T::from_f64(share * de.data()[i % elements].to_f64()));
        Ok((self.weight * sum / elements as f64, d))
    }
}

/// `mim.focal_frequency_loss`.
pub struct FocalFrequencyLoss;

impl Operation for FocalFrequencyLoss {
    const NAME: &'static str = "mim.focal_frequency_loss";
    const PAPER: &'static str = "2205.13943 A2MIM";
    const DATA: &'static [&'static str] = &["target"];

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("alpha", [1.0, 0.5, 2.0][rng.below(3)]).set("loss_weight", rng.range(0.5, 2.0));
        for key in ["ave_spectrum", "log_matrix", "batch_matrix"] {
            config.set(key, rng.chance(0.5));
        }
        config
    }

    fn inputs(_: &Config, draw: &mut Draw) -> Result<()> {
        let shape = [draw.size("batch", 1, 3), draw.rng.between(1, 3), draw.rng.between(1, 9), draw.rng.between(1, 9)];
        draw.normal("pred", shape);
        draw.normal("target", shape);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let loss = FocalFrequency {
            alpha: config.f64_or("alpha", 1.0)?,
            ave_spectrum: config.bool("ave_spectrum")?,
            log_matrix: config.bool("log_matrix")?,
            batch_matrix: config.bool("batch_matrix")?,
            weight: config.f64_or("loss_weight", 1.0)?,
        };
        let (value, mut d) = loss.run(&run.input("pred")?, &run.input("target")?)?;
        run.output("loss", &Tensor::scalar(T::from_f64(value)));
        if run.backward() {
            let d_loss = run.cotangent("loss", [].into())?.data()[0];
            d.data_mut().iter_mut().for_each(|x| *x *= d_loss);
            run.grad_input("pred", &d);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::random::Purpose;

    /// A transform from the definition; and the transform is orthonormal.
    #[test]
    fn transform_is_the_sum() {
        let ([h, w], mut rng) = ([5, 6], Rng::new(1, Purpose::Case, 0, 0));
        let x = Tensor::<f64>::from_fn([2, h, w], |_| rng.normal());
        let dft = Dft::new([h, w]);
        let [re, im] = dft.forward(&x);
        for i in 0..2 * h * w {
            let (p, u, v) = (i / (h * w), i / w % h, i % w);
            let (mut a, mut b) = (0.0, 0.0);
            for k in 0..h * w {
                let angle = -std::f64::consts::TAU * ((u * (k / w)) as f64 / h as f64 + (v * (k % w)) as f64 / w as f64);
                a += x.data()[p * h * w + k] * angle.cos() / ((h * w) as f64).sqrt();
                b += x.data()[p * h * w + k] * angle.sin() / ((h * w) as f64).sqrt();
            }
            assert!((re.data()[i] - a).abs() < 1e-12 && (im.data()[i] - b).abs() < 1e-12);
        }
        let back = dft.inverse([&re, &im]);
        assert!(back.data().iter().zip(x.data()).all(|(a, b)| (a - b).abs() < 1e-12));
    }

    #[test]
    fn equal_images_are_no_loss() {
        let x = Tensor::<f32>::from_fn([2, 1, 3, 4], |i| i as f32);
        let (loss, d) = FocalFrequency::A2MIM.run(&x, &x).unwrap();
        assert!(loss == 0.0 && d.data().iter().all(|&x| x == 0.0));
    }
}
