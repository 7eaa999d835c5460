//! The image tokenizer that karat trains and BEiT (arXiv 2106.08254) predicts: the discrete VAE of [`simple`](super::simple).
//!
//! A folder holds one: `tokenizer.json` (its sizes) and `checkpoint.safetensors`. It sees pixels in `[−1, 1]`.
//!
//! Training minimises `recon_loss + kl_weight · kl / positions` (the mean over batch and positions: the release's sum would grow with both)
//! with Gumbel noise of its own for every step and image. The temperature falls from 1 to 1/16 along half a cosine in the first 60 % of the
//! steps, as DALL-E's (arXiv 2102.12092) does in the first part of its run, and stays.

use std::path::Path;
use std::sync::Arc;

use super::simple::Sizes;
use super::simple_vae::{Relaxation, Trained, Vae};
use crate::case::Config;
use crate::data::transform::Normalization;
use crate::error::{Error, Result};
use crate::kernel::resize::Axis;
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::resize::resize_map;
use crate::nn::{Batch, Checkpoint, Layout, Loss, Objective, Params, StepKey};
use crate::tensor::Tensor;
use crate::tensor::random::{Purpose, Rng};
use crate::train::CHECKPOINT;

/// The sizes of a tokenizer, in its folder.
pub const TOKENIZER: &str = "tokenizer.json";

/// How a tokenizer's pixels are normalised.
pub const NORMALIZATION: Normalization = Normalization::HALF;

/// A trained tokenizer.
pub struct ImageTokenizer {
    vae: Vae,
    params: Params<f32>,
}

/// The configuration in the folder of a tokenizer.
///
/// # Errors
/// If there is no such file or it is no tokenizer's.
pub fn read_config(folder: &Path) -> Result<Config> {
    let path = folder.join(TOKENIZER);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let named = |e: Error| Error::format(&path, e.to_string());
    let config = Config::parse(&text).map_err(named)?;
    config.choice("arch", &["simple"]).and_then(|_| Sizes::of(&config)).map_err(named)?;
    Ok(config)
}

impl ImageTokenizer {
    /// The tokenizer of `params`, with the keys of `tokenizer.dvae` (`arch` `simple`).
    ///
    /// # Errors
    /// If the sizes make no sense.
    pub fn new(config: &Config, seed: u64) -> Result<Self> {
        let sizes = Sizes::of(config)?;
        let (vae, layout) = Layout::build(|names| Vae::new(names, sizes))?;
        Ok(ImageTokenizer { vae, params: Params::init(&layout, seed) })
    }

    /// The tokenizer in `folder`, as `karat tokenizer train` wrote it.
    ///
    /// # Errors
    /// If a file is missing or damaged.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut tokenizer = Self::new(&read_config(folder)?, 0)?;
        Checkpoint::open(folder.join(CHECKPOINT))?.load(&mut tokenizer.params)?;
        Ok(tokenizer)
    }

    /// The sizes.
    pub fn sizes(&self) -> Sizes {
        self.vae.sizes()
    }

    /// The codes `[B, h·w]` of `images` `[B, C, S, S]` in `[−1, 1]`.
    ///
    /// # Errors
    /// If the images are not of the tokenizer's size.
    pub fn encode(&self, images: &Tensor<f32>) -> Result<Vec<u32>> {
        self.vae.encode(&self.params, images)
    }

    /// The images `[B, C, S, S]`, about in `[−1, 1]`, of codes `[B, h·w]`.
    ///
    /// # Errors
    /// If the codes are not those of whole images.
    pub fn decode(&self, codes: &[u32]) -> Result<Tensor<f32>> {
        self.vae.decode(&self.params, codes)
    }
}

/// `images` `[B, C, H, W]`, normalised by `from`, as `to` normalises them.
pub fn renormalise(images: &Tensor<f32>, from: Normalization, to: Normalization) -> Result<Tensor<f32>> {
    let [_, chans, h, w] = images.dims("images")?;
    let mut y = images.clone();
    for (i, plane) in y.data_mut().chunks_exact_mut((h * w).max(1)).enumerate() {
        let c = (i % chans).min(2);
        let (scale, shift) = (from.std[c] / to.std[c], (from.mean[c] - to.mean[c]) / to.std[c]);
        plane.iter_mut().for_each(|x| *x = *x * scale + shift);
    }
    Ok(y)
}

/// Square images at another size: means of pixels for a smaller one, linear interpolation for a larger one.
pub fn at_side(images: &Tensor<f32>, side: usize) -> Result<Tensor<f32>> {
    let [_, _, h, w] = images.dims("images")?;
    if [h, w] == [side, side] {
        return Ok(images.clone());
    }
    if h * w == 0 {
        return Err(Error::shape("images", "at least one pixel", images.shape()));
    }
    let axis = |from: usize| if side < from { Axis::adaptive(from, side) } else { Axis::bilinear(from, side, false) };
    channels_first(&resize_map(&channels_last(images)?, &axis(h), &axis(w))?)
}

/// The training of a tokenizer.
pub struct Training {
    layout: Arc<Layout>,
    vae: Vae,
    kl_weight: f64,
    steps: u64,
    normalization: Normalization,
}

impl Training {
    /// From the sizes and `kl_weight` in `config`, for a run of `steps` steps on images normalised by `normalization`.
    ///
    /// # Errors
    /// If a key is missing or makes no sense.
    pub fn new(config: &Config, steps: u64, normalization: Normalization) -> Result<Self> {
        let (sizes, kl_weight) = (Sizes::of(config)?, config.f64("kl_weight")?);
        if !(kl_weight >= 0.0 && kl_weight.is_finite()) {
            return Err(Error::config("kl_weight", format!("{kl_weight}, expected a number of at least 0")));
        }
        let (vae, layout) = Layout::build(|names| Vae::new(names, sizes))?;
        Ok(Training { layout, vae, kl_weight, steps, normalization })
    }

    /// The temperature of step `step`.
    pub fn temperature(&self, step: u64) -> f64 {
        const LAST: f64 = 1.0 / 16.0;
        let part = step as f64 / (0.6 * self.steps as f64).max(1.0);
        if part >= 1.0 { LAST } else { LAST + (1.0 - LAST) * 0.5 * (1.0 + libm::cos(std::f64::consts::PI * part)) }
    }

    /// Standard Gumbel noise `[B, h, w, V]`: image `b` takes it from the stream of sample `b`.
    fn noise(&self, batch: usize, key: StepKey) -> Tensor<f32> {
        let (sizes, side) = (self.vae.sizes(), self.vae.sizes().grid());
        let mut noise = Tensor::scratch([batch, side, side, sizes.vocab_size]);
        let each = side * side * sizes.vocab_size;
        for (b, noise) in noise.data_mut().chunks_exact_mut(each.max(1)).enumerate() {
            let mut rng = Rng::new(key.seed, Purpose::Noise, key.step, b as u64);
            noise.iter_mut().for_each(|x| *x = -libm::log(-libm::log(rng.uniform().clamp(1e-12, 1.0 - 1e-12))) as f32);
        }
        noise
    }

    fn run(&self, params: &Params<f32>, images: &Tensor<f32>, key: StepKey) -> Result<Trained<f32>> {
        let [batch, ..] = images.dims::<4>("images")?;
        let pixels = renormalise(images, self.normalization, NORMALIZATION)?;
        let relaxation = Relaxation { tau: self.temperature(key.step), hard: false };
        self.vae.train(params, &pixels, &self.noise(batch, key), relaxation, true)
    }
}

impl Objective for Training {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn image_shape(&self) -> (usize, usize) {
        (self.vae.sizes().image_size, self.vae.sizes().in_chans)
    }

    fn loss(&self, params: &Params<f32>, grads: Option<&mut Params<f32>>, batch: Batch) -> Result<Loss> {
        let trained = self.run(params, batch.images, batch.key)?;
        let weight = self.kl_weight / trained.codes.len().max(1) as f64;
        let loss = trained.recon_loss + weight * trained.kl;
        if let Some(grads) = grads {
            self.vae.train_backward(params, grads, trained, [1.0, weight], None)?;
        }
        Ok((loss as f32).into())
    }
}

/// How a tokenizer uses its codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CodeUse {
    /// Codes that occur.
    pub used: usize,
    /// `exp(−Σ p ln p)` with the share p of each code: as many codes, used evenly, say as much.
    pub perplexity: f64,
}

impl CodeUse {
    /// Of `codes` among `vocab`.
    pub fn of(codes: &[u32], vocab: usize) -> Self {
        let mut counts = vec![0usize; vocab];
        codes.iter().for_each(|&code| counts[code as usize] += 1);
        let shares = || counts.iter().filter(|&&n| n > 0).map(|&n| n as f64 / codes.len() as f64);
        CodeUse { used: shares().count(), perplexity: libm::exp(-shares().fold(0.0, |sum, p| sum + p * libm::log(p))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config::parse(
            r#"{"arch": "simple", "image_size": 8, "num_layers": 1, "vocab_size": 6, "codebook_dim": 4, "hidden_dim": 4, "in_chans": 3,
                "kl_weight": 0.01}"#,
        )
        .unwrap()
    }

    /// Steps of gradient descent lower the loss, which is a function of parameters, images and key; the temperature falls as said.
    #[test]
    fn training_learns() {
        let training = Training::new(&config(), 100, Normalization::IMAGENET).unwrap();
        assert_eq!((training.temperature(0), training.temperature(60), training.temperature(99)), (1.0, 1.0 / 16.0, 1.0 / 16.0));
        assert!((training.temperature(30) - 17.0 / 32.0).abs() < 1e-12);
        let mut rng = Rng::new(1, Purpose::Case, 0, 0);
        let images = Tensor::from_fn([2, 3, 8, 8], |_| rng.normal() as f32);
        let mut p = Params::init(&training.layout, 1);
        let batch = |step| Batch { images: &images, labels: &[], second: None, key: StepKey { seed: 2, step } };
        let loss = |p: &Params<f32>, step| training.loss(p, None, batch(step)).unwrap().value;
        let first = loss(&p, 3);
        assert_eq!(first, loss(&p, 3));
        assert_ne!(first, loss(&p, 4));
        for _ in 0..40 {
            let mut g = Params::zeros(&training.layout);
            training.loss(&p, Some(&mut g), batch(3)).unwrap();
            p.flat_mut().iter_mut().zip(g.flat()).for_each(|(p, g)| *p -= 0.1 * g);
        }
        assert!(loss(&p, 3) < 0.95 * first, "{} after {first}", loss(&p, 3));
        assert!(Training::new(config().set("kl_weight", -1.0), 100, Normalization::HALF).is_err());
    }

    #[test]
    fn pixels_keep_their_meaning() {
        let x = Tensor::<f32>::from_fn([1, 3, 4, 4], |i| i as f32 / 10.0);
        let there = renormalise(&x, Normalization::IMAGENET, Normalization::HALF).unwrap();
        // (0.485 − 0.5)/0.5 where the normalised pixel is 0.
        assert!((there.data()[0] + 0.03).abs() < 1e-6);
        let back = renormalise(&there, Normalization::HALF, Normalization::IMAGENET).unwrap();
        assert!(back.data().iter().zip(x.data()).all(|(a, b)| (a - b).abs() < 1e-5));
        // Row 0 of the halved plane: the means of 2×2 pixels.
        assert!((at_side(&x, 2).unwrap().data()[0] - 0.25).abs() < 1e-6);
        assert_eq!(*at_side(&x, 7).unwrap().shape(), [1, 3, 7, 7]);
    }

    #[test]
    fn evenly_used_codes() {
        let even = CodeUse::of(&[0, 1, 2, 3, 3, 2, 1, 0], 9);
        assert!(even.used == 4 && (even.perplexity - 4.0).abs() < 1e-12);
        assert_eq!(CodeUse::of(&[5; 4], 6), CodeUse { used: 1, perplexity: 1.0 });
    }

    /// Codes decode to images of the same size; codes that don't exist are refused.
    #[test]
    fn there_and_back() {
        let tokenizer = ImageTokenizer::new(&config(), 3).unwrap();
        let mut rng = Rng::new(1, Purpose::Case, 0, 1);
        let images = Tensor::from_fn([2, 3, 8, 8], |_| rng.normal() as f32);
        let codes = tokenizer.encode(&images).unwrap();
        assert!(codes.len() == 2 * 16 && codes.iter().all(|&code| code < 6));
        assert_eq!(tokenizer.decode(&codes).unwrap().shape(), images.shape());
        assert!(tokenizer.decode(&[6; 16]).is_err() && tokenizer.decode(&[0; 15]).is_err());
        assert!(tokenizer.encode(&Tensor::zeros([1, 3, 4, 8])).is_err());
    }
}
