//! Pixels as targets: MAE's and GreenMIM's squared error on patches, SimMIM's absolute error on pixels, and the way back to images.
//!
//! **Squared** (MAE, arXiv 2111.06377). Patch vectors in the order (row, column, channel), `n = P²·C` numbers. With `norm_pix`,
//! `t ← (t − mean)/√(var + 1e-6)` per patch, `var` with divisor `n − 1`. `loss = Σ_masked mean_n (pred − t)² / M`, M masked patches.
//! Backward: `dpred = 2(pred − t)·mask/(nM)`, `dt = −dpred`, and through the normalisation
//! `dpixel = (dt − mean(dt) − t Σ(dt⊙t)/(n−1)) / s`.
//!
//! **Absolute** (SimMIM, 2111.09886). `loss = Σ |t − pred|·m / (Σm + 1e-5) / C` over pixels, the sum of m over one channel. With
//! `norm_target = k`, `t = (x − μ)/√(v + 1e-6)` with mean and unbiased variance over the k×k window around each pixel, clipped at
//! the border. Backward: `dpred = −sign(t − pred)·m/((Σm + 1e-5)·C)`, `dt = −dpred`, then `dv = −½ dt (x−μ)/s³·[v>0]`,
//! `dq = dv·w/(w−1)`, `dμ = −dt/s − 2μ dq`, `dx = dt/s + box(dμ/w) + 2x·box(dq/w)`, w pixels in the window, box = sum over windows.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::kernel::rows;
use crate::nn::patch_embed::patch_count;
pub use crate::nn::patch_embed::{patchify, unpatchify};
use crate::nn::{Init, Linear, Names, Params};
use crate::tensor::{Buffer, Float, Tensor};

/// ε inside the root of both normalisations.
const EPS: f64 = 1e-6;

/// The squared error on the pixels of masked patches.
#[derive(Clone, Copy, Debug)]
pub struct MaskedPixelLoss {
    /// Side P of a patch.
    pub patch: usize,
    /// Each patch is normalised by its own mean and deviation.
    pub norm_pix: bool,
}

/// What the backward pass of [`MaskedPixelLoss`] needs.
pub struct PixelSaved<T: Float> {
    /// `[B, L, n]`.
    target: Tensor<T>,
    /// Mean and deviation s of every patch, `[B·L, 2]`.
    stats: Option<Tensor<T>>,
    hidden: Vec<bool>,
    /// M.
    count: usize,
    image: [usize; 3],
}

impl MaskedPixelLoss {
    /// The targets `[B, L, n]`, and mean and deviation of every patch if they are normalised.
    pub fn targets<T: Float>(&self, image: &Tensor<T>) -> Result<(Tensor<T>, Option<Tensor<T>>)> {
        let mut target = patchify(image, self.patch)?;
        if !self.norm_pix {
            return Ok((target, None));
        }
        let (rows, n) = target.shape().rows_cols();
        if n < 2 {
            return Err(Error::config("norm_pix_loss", "expected false for patches of one number: they have no deviation"));
        }
        let mut stats = Tensor::scratch([rows, 2]);
        target.data_mut().par_chunks_mut(n).zip(stats.data_mut().par_chunks_mut(2)).for_each(|(t, stats)| {
            let mean = t.iter().fold(0.0, |sum, x| sum + x.to_f64()) / n as f64;
            let var = t.iter().fold(0.0, |sum, x| sum + (x.to_f64() - mean) * (x.to_f64() - mean)) / (n - 1) as f64;
            let s = (var + EPS).sqrt();
            t.iter_mut().for_each(|x| *x = T::from_f64((x.to_f64() - mean) / s));
            stats.copy_from_slice(&[T::from_f64(mean), T::from_f64(s)]);
        });
        Ok((target, Some(stats)))
    }

    /// The loss of `pred` `[B, L, n]` for `image` `[B, C, H, W]`; `hidden` says which patches count, `[B, L]`, or `[L]` for all images
    /// alike. An error if none does.
    pub fn forward<T: Float>(&self, pred: &Tensor<T>, image: &Tensor<T>, hidden: &[bool]) -> Result<(T, PixelSaved<T>)> {
        let [_, c, h, w] = image.dims("image")?;
        let (target, stats) = self.targets(image)?;
        pred.expect_shape("pred", target.shape())?;
        let [b, l, n] = target.dims("target")?;
        let hidden = if hidden.len() == l && b > 0 { hidden.repeat(b) } else { hidden.to_vec() };
        if hidden.len() != b * l {
            return Err(Error::shape("mask", [b, l], [hidden.len()]));
        }
        let count = hidden.iter().filter(|&&m| m).count();
        if count == 0 {
            return Err(Error::config("mask_ratio", "expected at least one masked patch: the loss is a mean over them"));
        }
        let mut parts = Buffer::<f64>::zeros(b * l);
        parts.par_iter_mut().enumerate().filter(|(i, _)| hidden[*i]).for_each(|(i, part)| {
            let rows = pred.data()[i * n..(i + 1) * n].iter().zip(&target.data()[i * n..(i + 1) * n]);
            *part = rows.fold(0.0, |sum, (p, t)| sum + (*p - *t).to_f64() * (*p - *t).to_f64());
        });
        let loss = parts.iter().fold(0.0, |sum, part| sum + part) / (n * count) as f64;
        Ok((T::from_f64(loss), PixelSaved { target, stats, hidden, count, image: [c, h, w] }))
    }

    /// `dpred` `[B, L, n]`.
    pub fn backward<T: Float>(&self, saved: &PixelSaved<T>, pred: &Tensor<T>, d_loss: T) -> Result<Tensor<T>> {
        let PixelSaved { target, hidden, count, .. } = saved;
        pred.expect_shape("pred", target.shape())?;
        let n = target.shape().rows_cols().1;
        let factor = d_loss * T::from_f64(2.0 / (n * count) as f64);
        let mut d = Tensor::zeros(pred.shape());
        d.data_mut().par_chunks_mut(n).enumerate().filter(|(i, _)| hidden[*i]).for_each(|(i, d)| {
            let rows = pred.data()[i * n..(i + 1) * n].iter().zip(&target.data()[i * n..(i + 1) * n]);
            d.iter_mut().zip(rows).for_each(|(d, (p, t))| *d = (*p - *t) * factor);
        });
        Ok(d)
    }

    /// The gradient of the image through the target, from [`backward`](Self::backward)'s `dpred`. Training needs none.
    pub fn backward_image<T: Float>(&self, saved: &PixelSaved<T>, d_pred: &Tensor<T>) -> Result<Tensor<T>> {
        let PixelSaved { target, stats, hidden, image, .. } = saved;
        d_pred.expect_shape("gradient of pred", target.shape())?;
        let n = target.shape().rows_cols().1;
        let mut d = Tensor::zeros(target.shape());
        d.data_mut().par_chunks_mut(n).enumerate().filter(|(i, _)| hidden[*i]).for_each(|(i, d)| {
            let (d_pred, t) = (&d_pred.data()[i * n..(i + 1) * n], &target.data()[i * n..(i + 1) * n]);
            match stats {
                None => d.iter_mut().zip(d_pred).for_each(|(d, x)| *d = -*x),
                Some(stats) => {
                    let s = stats.data()[2 * i + 1].to_f64();
                    let mean = d_pred.iter().fold(0.0, |sum, x| sum - x.to_f64()) / n as f64;
                    let along = d_pred.iter().zip(t).fold(0.0, |sum, (x, t)| sum - x.to_f64() * t.to_f64()) / (n - 1) as f64;
                    d.iter_mut()
                        .zip(d_pred.iter().zip(t))
                        .for_each(|(d, (x, t))| *d = T::from_f64((-x.to_f64() - mean - t.to_f64() * along) / s));
                }
            }
        });
        unpatchify(&d, *image, self.patch)
    }

    /// The image that `pred` `[B, L, n]` shows: normalised predictions get back the mean and deviation of the true patch.
    pub fn picture<T: Float>(&self, pred: &Tensor<T>, image: &Tensor<T>) -> Result<Tensor<T>> {
        let [_, c, h, w] = image.dims("image")?;
        let (target, stats) = self.targets(image)?;
        pred.expect_shape("pred", target.shape())?;
        let n = target.shape().rows_cols().1;
        let mut pixels = pred.clone();
        if let Some(stats) = stats {
            for (row, stats) in pixels.data_mut().chunks_exact_mut(n).zip(stats.data().chunks_exact(2)) {
                row.iter_mut().for_each(|x| *x = x.fused(stats[1], stats[0]));
            }
        }
        unpatchify(&pixels, [c, h, w], self.patch)
    }
}

/// A mask of patches as one of pixels: 1 where hidden, `[B, C, H, W]`. `hidden` is `[B, H/P, W/P]`.
pub fn hidden_pixels<T: Float>(hidden: &[bool], shape: [usize; 4], patch: usize) -> Result<Tensor<T>> {
    let [b, c, h, w] = shape;
    let (l, _) = patch_count(shape, patch)?;
    if hidden.len() != b * l {
        return Err(Error::shape("mask", [b, h / patch, w / patch], [hidden.len()]));
    }
    Ok(Tensor::from_fn(shape, |i| {
        let (image, y, x) = (i / (c * h * w), i / w % h, i % w);
        if hidden[image * l + y / patch * (w / patch) + x / patch] { T::ONE } else { T::ZERO }
    }))
}

/// SimMIM's decoder: a 1×1 convolution (`decoder.0`, weight `[3E², F, 1, 1]`) and a pixel shuffle: channel `(c·E + i)·E + j` of cell
/// `(y, x)` is pixel `(c, yE + i, xE + j)`.
#[derive(Clone, Debug)]
pub struct PixelDecoder {
    proj: Linear,
    stride: usize,
    grid: [usize; 2],
}

/// Channels of the images that SimMIM's decoder paints.
pub const DECODER_CHANS: usize = 3;

impl PixelDecoder {
    /// Registers `weight` and `bias`; the encoder delivers `grid` (rows, columns) cells of `features` numbers, each of which
    /// becomes a square of `stride` pixels.
    pub fn new(mut names: Names, features: usize, stride: usize, grid: [usize; 2]) -> Self {
        let out = DECODER_CHANS * stride * stride;
        let proj = Linear::shaped(&mut names, [out, features, 1, 1].into(), features, out, true, Init::FanIn(features));
        PixelDecoder { proj, stride, grid }
    }

    fn image_dims(&self, batch: usize) -> [usize; 4] {
        [batch, DECODER_CHANS, self.grid[0] * self.stride, self.grid[1] * self.stride]
    }

    /// The image `[B, 3, H, W]` of tokens `[B, N, F]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, tokens: &Tensor<T>) -> Result<Tensor<T>> {
        let [b, n, f] = tokens.dims("tokens")?;
        if n != self.grid[0] * self.grid[1] {
            return Err(Error::shape("tokens", [b, self.grid[0] * self.grid[1], f], tokens.shape()));
        }
        let cells = self.proj.forward(p, tokens)?;
        let mut image = Tensor::scratch(self.image_dims(b));
        // A cell's channels lie in the order of a convolution's patch.
        rows::patches_backward(image.data_mut(), cells.data(), self.image_dims(b), [self.stride; 2]);
        Ok(image)
    }

    /// Adds the gradients of the parameters; returns the gradient of the tokens.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, tokens: &Tensor<T>, d_image: &Tensor<T>) -> Result<Tensor<T>> {
        let [b, n, _] = tokens.dims("tokens")?;
        d_image.expect_shape("gradient of pred", self.image_dims(b))?;
        let mut cells = Tensor::scratch([b, n, self.proj.outputs()]);
        rows::patches(cells.data_mut(), d_image.data(), self.image_dims(b), [self.stride; 2]);
        self.proj.backward(p, g, tokens, &cells)
    }
}

/// The absolute error on masked pixels.
#[derive(Clone, Copy, Debug)]
pub struct MaskedL1Loss {
    /// Side P of the patches of the mask.
    patch: usize,
    /// Side k of the window of the target's normalisation; 0 for none.
    norm_target: usize,
}

/// What the backward pass of [`MaskedL1Loss`] needs.
pub struct L1Saved<T: Float> {
    target: Tensor<T>,
    /// `[B, C, H, W]`, 1 where hidden.
    hidden: Tensor<T>,
    /// `1 / ((Σm + 1e-5)·C)`.
    factor: f64,
}

impl MaskedL1Loss {
    /// An error unless `norm_target` is 0 or an odd number from 3 on.
    pub fn new(patch: usize, norm_target: usize) -> Result<Self> {
        if norm_target != 0 && (norm_target < 3 || norm_target.is_multiple_of(2)) {
            return Err(Error::config("norm_target", format!("expected 0 (off) or an odd number of at least 3, found {norm_target}")));
        }
        Ok(MaskedL1Loss { patch, norm_target })
    }

    /// The target `[B, C, H, W]`: the image, or its local normalisation.
    pub fn target<T: Float>(&self, image: &Tensor<T>) -> Result<Tensor<T>> {
        let [_, _, h, w] = image.dims("image")?;
        if self.norm_target == 0 {
            return Ok(image.clone());
        }
        if h * w < 2 {
            return Err(Error::config("norm_target", "expected 0 for images of one pixel: they have no deviation"));
        }
        let mut target = Tensor::scratch(image.shape());
        target.data_mut().par_chunks_mut(h * w).zip(image.data().par_chunks(h * w)).for_each(|(t, x)| {
            let local = Local::new(x, [h, w], self.norm_target);
            t.iter_mut().enumerate().for_each(|(j, t)| *t = T::from_f64((local.x[j] - local.mean[j]) / local.deviation(j)));
        });
        Ok(target)
    }

    /// The loss of `pred` for `image`, both `[B, C, H, W]`, on the patches that `hidden` `[B, H/P, W/P]` names; 0 if it names none.
    pub fn forward<T: Float>(&self, pred: &Tensor<T>, image: &Tensor<T>, hidden: &[bool]) -> Result<(T, L1Saved<T>)> {
        pred.expect_shape("pred", image.shape())?;
        let shape @ [_, c, h, w] = image.dims("image")?;
        let target = self.target(image)?;
        let masked = hidden.iter().filter(|&&m| m).count() * self.patch * self.patch;
        let hidden = hidden_pixels::<T>(hidden, shape, self.patch)?;
        let factor = 1.0 / ((masked as f64 + 1e-5) * c as f64);
        let mut parts = Buffer::<f64>::zeros(pred.data().len().div_ceil(h * w));
        parts.par_iter_mut().enumerate().for_each(|(i, part)| {
            let plane = i * h * w..(i + 1) * h * w;
            let pairs = pred.data()[plane.clone()].iter().zip(&target.data()[plane.clone()]).zip(&hidden.data()[plane]);
            *part = pairs.fold(0.0, |sum, ((p, t), m)| sum + (t.to_f64() - p.to_f64()).abs() * m.to_f64());
        });
        let loss = parts.iter().fold(0.0, |sum, part| sum + part) * factor;
        Ok((T::from_f64(loss), L1Saved { target, hidden, factor }))
    }

    /// `dpred`.
    pub fn backward<T: Float>(&self, saved: &L1Saved<T>, pred: &Tensor<T>, d_loss: T) -> Result<Tensor<T>> {
        pred.expect_shape("pred", saved.target.shape())?;
        let factor = d_loss * T::from_f64(saved.factor);
        let mut d = Tensor::scratch(pred.shape());
        let pairs = pred.data().iter().zip(saved.target.data()).zip(saved.hidden.data());
        for (d, ((p, t), m)) in d.data_mut().iter_mut().zip(pairs) {
            *d = if *m == T::ZERO || t == p {
                T::ZERO
            } else if t > p {
                -factor
            } else {
                factor
            };
        }
        Ok(d)
    }

    /// The gradient of the image through the target, from [`backward`](Self::backward)'s `dpred`. Training needs none.
    pub fn backward_image<T: Float>(&self, image: &Tensor<T>, d_pred: &Tensor<T>) -> Result<Tensor<T>> {
        let [_, _, h, w] = image.dims("image")?;
        d_pred.expect_shape("gradient of pred", image.shape())?;
        let mut d = Tensor::scratch(image.shape());
        let planes = d.data_mut().par_chunks_mut((h * w).max(1)).zip(d_pred.data().par_chunks((h * w).max(1)));
        planes.zip(image.data().par_chunks((h * w).max(1))).for_each(|((d, d_pred), x)| {
            if self.norm_target == 0 {
                d.iter_mut().zip(d_pred).for_each(|(d, x)| *d = -*x);
            } else {
                Local::new(x, [h, w], self.norm_target).backward(d, d_pred);
            }
        });
        Ok(d)
    }
}

impl MaskedL1Loss {
    /// The image that `pred` shows: locally normalised predictions get back the mean and deviation of the true window.
    pub fn picture<T: Float>(&self, pred: &Tensor<T>, image: &Tensor<T>) -> Result<Tensor<T>> {
        pred.expect_shape("pred", image.shape())?;
        self.target(image)?;
        let [_, _, h, w] = image.dims("image")?;
        let mut picture = pred.clone();
        if self.norm_target != 0 {
            picture.data_mut().par_chunks_mut(h * w).zip(image.data().par_chunks(h * w)).for_each(|(y, x)| {
                let local = Local::new(x, [h, w], self.norm_target);
                y.iter_mut().enumerate().for_each(|(j, y)| {
                    // `x − (centred x)` is the centre.
                    let mean = x[j].to_f64() - local.x[j] + local.mean[j];
                    *y = T::from_f64(y.to_f64() * local.deviation(j) + mean);
                });
            });
        }
        Ok(picture)
    }
}

/// The local statistics of one channel, in f64: sums over windows come from prefix sums, which cancel. For the same reason the
/// channel is centred first, which the normalisation doesn't notice.
struct Local {
    x: Vec<f64>,
    mean: Vec<f64>,
    variance: Vec<f64>,
    sizes: Vec<f64>,
    shape: [usize; 2],
    window: usize,
}

impl Local {
    fn new<T: Float>(x: &[T], shape: [usize; 2], window: usize) -> Self {
        let center = x.iter().fold(0.0, |sum, x| sum + x.to_f64()) / x.len() as f64;
        let x: Vec<f64> = x.iter().map(|x| x.to_f64() - center).collect();
        let sizes = box_sums(&vec![1.0; x.len()], shape, window);
        let over = |sums: Vec<f64>| -> Vec<f64> { sums.iter().zip(&sizes).map(|(s, n)| s / n).collect() };
        let mean = over(box_sums(&x, shape, window));
        let squares = over(box_sums(&x.iter().map(|x| x * x).collect::<Vec<_>>(), shape, window));
        let variance = (0..x.len()).map(|j| ((squares[j] - mean[j] * mean[j]) * sizes[j] / (sizes[j] - 1.0)).max(0.0)).collect();
        Local { x, mean, variance, sizes, shape, window }
    }

    fn deviation(&self, j: usize) -> f64 {
        (self.variance[j] + EPS).sqrt()
    }

    /// `dx` from `dpred = −dt`.
    fn backward<T: Float>(&self, dx: &mut [T], d_pred: &[T]) {
        let n = self.x.len();
        let (mut d_mean, mut d_square) = (vec![0.0; n], vec![0.0; n]);
        for j in 0..n {
            let (dt, s, size) = (-d_pred[j].to_f64(), self.deviation(j), self.sizes[j]);
            let dv = if self.variance[j] > 0.0 { -0.5 * dt * (self.x[j] - self.mean[j]) / (s * s * s) } else { 0.0 };
            let dq = dv * size / (size - 1.0);
            d_mean[j] = (-dt / s - 2.0 * self.mean[j] * dq) / size;
            d_square[j] = dq / size;
        }
        let (d_mean, d_square) = (box_sums(&d_mean, self.shape, self.window), box_sums(&d_square, self.shape, self.window));
        for (j, dx) in dx.iter_mut().enumerate() {
            *dx = T::from_f64(-d_pred[j].to_f64() / self.deviation(j) + d_mean[j] + 2.0 * self.x[j] * d_square[j]);
        }
    }
}

/// The sum over the `k × k` window around every element, clipped at the border; time independent of k.
fn box_sums(x: &[f64], [h, w]: [usize; 2], k: usize) -> Vec<f64> {
    let reach = k / 2;
    // `prefix[y][x]` is the sum of everything above and left of (y, x).
    let mut prefix = vec![0.0; (h + 1) * (w + 1)];
    for y in 0..h {
        let mut row = 0.0;
        for i in 0..w {
            row += x[y * w + i];
            prefix[(y + 1) * (w + 1) + i + 1] = prefix[y * (w + 1) + i + 1] + row;
        }
    }
    let clip = |i: usize, n: usize| (i.saturating_sub(reach), (i + reach + 1).min(n));
    let at = |y: usize, x: usize| prefix[y * (w + 1) + x];
    let sum = |j: usize| {
        let ((top, bottom), (left, right)) = (clip(j / w, h), clip(j % w, w));
        at(bottom, right) - at(top, right) - at(bottom, left) + at(top, left)
    };
    (0..h * w).map(sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::random::{Purpose, Rng};

    fn random(shape: [usize; 4], seed: u64) -> Tensor<f64> {
        let mut rng = Rng::new(seed, Purpose::Case, 0, 0);
        Tensor::from_fn(shape, |_| 3.0 + 2.0 * rng.normal())
    }

    #[test]
    fn patches_are_in_row_column_channel_order_and_come_back() {
        let image = Tensor::<f64>::from_fn([1, 2, 2, 4], |i| i as f64);
        let patches = patchify(&image, 2).unwrap();
        assert_eq!(patches.data()[..8], [0.0, 8.0, 1.0, 9.0, 4.0, 12.0, 5.0, 13.0]);
        let image = random([2, 3, 6, 9], 1);
        assert_eq!(unpatchify(&patchify(&image, 3).unwrap(), [3, 6, 9], 3).unwrap().data(), image.data());
        assert!(patchify(&image, 4).is_err() && patchify(&image, 0).is_err());
    }

    /// A perfect prediction has no loss and shows the image, whatever the normalisation.
    #[test]
    fn perfect_predictions_show_the_image() {
        let image = random([2, 3, 6, 6], 2);
        let close = |a: &Tensor<f64>| a.data().iter().zip(image.data()).all(|(a, b)| (a - b).abs() < 1e-12);
        for norm_pix in [false, true] {
            let loss = MaskedPixelLoss { patch: 2, norm_pix };
            let pred = loss.targets(&image).unwrap().0;
            assert_eq!(loss.forward(&pred, &image, &[true; 9]).unwrap().0, 0.0);
            assert!(close(&loss.picture(&pred, &image).unwrap()));
        }
        for norm_target in [0, 3, 47] {
            let loss = MaskedL1Loss::new(2, norm_target).unwrap();
            let pred = loss.target(&image).unwrap();
            assert_eq!(loss.forward(&pred, &image, &[true; 18]).unwrap().0, 0.0);
            assert!(close(&loss.picture(&pred, &image).unwrap()));
        }
        assert!(MaskedL1Loss::new(2, 4).is_err() && MaskedL1Loss::new(2, 1).is_err());
    }

    /// Only masked patches count; a mask of one image serves all.
    #[test]
    fn only_masked_patches_count() {
        let image = Tensor::<f64>::from_fn([2, 1, 4, 4], |i| i as f64);
        let loss = MaskedPixelLoss { patch: 2, norm_pix: false };
        let mut pred = loss.targets(&image).unwrap().0;
        pred.data_mut()[..4].iter_mut().for_each(|x| *x += 2.0);
        let of = |hidden: &[bool]| loss.forward(&pred, &image, hidden).map(|(loss, _)| loss);
        assert_eq!(of(&[true, false, false, true]).unwrap(), 1.0);
        assert_eq!(of(&[true, false, false, false, false, false, false, false]).unwrap(), 4.0);
        assert_eq!(of(&[false, true, true, true]).unwrap(), 0.0);
        assert!(of(&[false; 4]).is_err() && of(&[true; 3]).is_err());
    }

    /// Sums over clipped windows against their definition.
    #[test]
    fn box_sums_are_sums_over_windows() {
        let (h, w) = (5, 7);
        let x = random([1, 1, h, w], 4);
        for k in [3, 5, 9, 31] {
            let sums = box_sums(x.data(), [h, w], k);
            for (j, sum) in sums.iter().enumerate() {
                let near = |i: &usize| (i / w).abs_diff(j / w) <= k / 2 && (i % w).abs_diff(j % w) <= k / 2;
                let want: f64 = (0..h * w).filter(near).map(|i| x.data()[i]).sum();
                assert!((sum - want).abs() < 1e-12);
            }
        }
    }

    /// Flat surroundings have no deviation: finite targets of 0, finite gradients.
    #[test]
    fn flat_images_are_no_accident() {
        let image = Tensor::<f64>::from_fn([1, 3, 8, 8], |_| 0.7);
        let loss = MaskedL1Loss::new(2, 3).unwrap();
        let pred = random([1, 3, 8, 8], 5);
        let (value, saved) = loss.forward(&pred, &image, &[true; 16]).unwrap();
        let d_image = loss.backward_image(&image, &loss.backward(&saved, &pred, 1.0).unwrap()).unwrap();
        assert!(value.is_finite() && d_image.data().iter().all(|x| x.is_finite()));
        assert!(loss.target(&image).unwrap().data().iter().all(|x| x.abs() < 1e-12));
    }
}
