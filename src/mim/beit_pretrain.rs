//! BEiT's pre-training as an objective (arXiv 2106.08254): the network of [`beit`](super::beit), block-wise masks, and a tokenizer that
//! turns the same crop into the visual tokens to be predicted.
//!
//! The tokenizer sees a second view of the crop, at its own size and normalisation, so that its grid of codes is the grid of patches. The
//! picture is the tokenizer's decoding of the image's codes with the predicted ones at the masked patches.

use std::sync::Arc;

use super::beit::BeitMim;
use super::blockwise::Blockwise;
use super::pixels::hidden_pixels;
use super::{MaskedModel, Reconstruction};
use crate::case::Config;
use crate::data::transform::Normalization;
use crate::error::{Error, Result};
use crate::nn::{Batch, Layout, Loss, Objective, Params, StepKey, View};
use crate::tensor::Tensor;
use crate::tensor::random::{Purpose, Rng};
use crate::tokenizer::image::{self, ImageTokenizer, at_side, renormalise};

/// The network, its masks and its tokenizer.
pub struct BeitPretraining {
    net: BeitMim,
    masks: Blockwise,
    tokenizer: Option<ImageTokenizer>,
    image: usize,
    chans: usize,
    patch: usize,
    normalization: Normalization,
}

impl BeitPretraining {
    /// From the keys of `mim.beit` with those of `mask.blockwise` beside them: `img_h` is the side of the images, and `vocab_size` the
    /// tokenizer's, if there is one. Images are normalised by `normalization`.
    ///
    /// # Errors
    /// If a key makes no sense, or the tokenizer's codes don't lie on the grid of patches.
    pub fn new(config: &Config, tokenizer: Option<ImageTokenizer>, normalization: Normalization) -> Result<Self> {
        let (image, patch, chans) = (config.positive("img_h")?, config.positive("patch_size")?, config.positive("in_chans")?);
        let (mut config, grid) = (config.clone(), image / patch);
        if let Some(tokenizer) = &tokenizer {
            let sizes = tokenizer.sizes();
            if sizes.grid() != grid || sizes.in_chans != chans {
                let found = format!("{0}×{0} codes of {1} channels", sizes.grid(), sizes.in_chans);
                return Err(Error::config("tokenizer", format!("expected {grid}×{grid} codes of {chans} channels, found {found}")));
            }
            config.set("vocab_size", sizes.vocab_size);
        }
        config.set("height", grid).set("width", grid).set("rule", "code");
        let (net, masks) = (BeitMim::new(&config)?, Blockwise::from_config(&config)?);
        Ok(BeitPretraining { net, masks, tokenizer, image, chans, patch, normalization })
    }

    fn tokenizer(&self) -> Result<&ImageTokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| Error::config("tokenizer", "missing; BEiT predicts the codes of a tokenizer"))
    }

    /// The masks of a training step, `[B, N]`: image `b` takes its numbers from the stream of sample `b`.
    fn draw(&self, batch: usize, key: StepKey) -> Result<Vec<bool>> {
        let mut hidden = Vec::with_capacity(batch * self.net.patches());
        for b in 0..batch {
            let mut rng = Rng::new(key.seed, Purpose::Mask, key.step, b as u64);
            hidden.extend(self.masks.mask(|| Some(rng.uniform()))?.hidden);
        }
        Ok(hidden)
    }

    /// The codes `[B, N]` of the images; their second view is made of them where there is none.
    fn codes(&self, images: &Tensor<f32>, second: Option<&Tensor<f32>>) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer()?;
        match second {
            Some(second) => tokenizer.encode(second),
            None => {
                let pixels = renormalise(images, self.normalization, image::NORMALIZATION)?;
                tokenizer.encode(&at_side(&pixels, tokenizer.sizes().image_size)?)
            }
        }
    }

    fn batch(&self, images: &Tensor<f32>) -> Result<usize> {
        let [batch, ..] = images.dims::<4>("images")?;
        images.expect_shape("images", [batch, self.chans, self.image, self.image])?;
        Ok(batch)
    }
}

fn tokens(codes: &[u32]) -> Vec<i64> {
    codes.iter().map(|&code| i64::from(code)).collect()
}

impl Objective for BeitPretraining {
    fn layout(&self) -> &Arc<Layout> {
        self.net.layout()
    }

    fn image_shape(&self) -> (usize, usize) {
        (self.image, self.chans)
    }

    fn second_view(&self) -> Option<View> {
        self.tokenizer.as_ref().map(|t| View { size: t.sizes().image_size, normalization: image::NORMALIZATION })
    }

    fn loss(&self, params: &Params<f32>, grads: Option<&mut Params<f32>>, batch: Batch) -> Result<Loss> {
        let hidden = self.draw(self.batch(batch.images)?, batch.key)?;
        let tokens = tokens(&self.codes(batch.images, batch.second)?);
        let saved = self.net.forward(params, batch.images, &hidden, &tokens)?;
        let loss = saved.loss;
        if let Some(grads) = grads {
            self.net.backward(params, grads, saved, 1.0, None, false)?;
        }
        Ok(loss.into())
    }
}

impl MaskedModel for BeitPretraining {
    fn reconstruct(&self, params: &Params<f32>, images: &Tensor<f32>, key: StepKey) -> Result<Reconstruction> {
        let hidden = self.draw(self.batch(images)?, key)?;
        let mut codes = self.codes(images, None)?;
        let saved = self.net.forward(params, images, &hidden, &tokens(&codes))?;
        let predicted = saved.predicted();
        codes.iter_mut().zip(&hidden).filter(|(_, hidden)| **hidden).zip(predicted).for_each(|((code, _), new)| *code = new);
        let pixels = at_side(&self.tokenizer()?.decode(&codes)?, self.image)?;
        Ok(Reconstruction {
            hidden: hidden_pixels(&hidden, images.dims("images")?, self.patch)?,
            predicted: renormalise(&pixels, image::NORMALIZATION, self.normalization)?,
        })
    }

    fn features(&self, params: &Params<f32>, images: &Tensor<f32>) -> Result<Tensor<f32>> {
        self.net.features(params, images)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEIT: &str = r#"{"img_h": 16, "img_w": 16, "patch_size": 4, "in_chans": 3, "dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 2,
        "qkv_bias": true, "ln_eps": 1e-6, "layer_scale": true, "abs_pos_emb": false, "rel_pos_bias": false, "shared_rel_pos_bias": true,
        "vocab_size": 5, "num_masking_patches": 6, "min_num_patches": 1}"#;

    fn tokenizer(image_size: usize) -> ImageTokenizer {
        let json = format!(
            r#"{{"image_size": {image_size}, "num_layers": 1, "vocab_size": 7, "codebook_dim": 4, "hidden_dim": 4, "in_chans": 3}}"#
        );
        ImageTokenizer::new(&Config::parse(&json).unwrap(), 4).unwrap()
    }

    fn model(tokenizer: Option<ImageTokenizer>) -> Result<BeitPretraining> {
        BeitPretraining::new(&Config::parse(BEIT).unwrap(), tokenizer, Normalization::IMAGENET)
    }

    /// What the trainer, the pictures and the probe rely on.
    #[test]
    fn objective() {
        let beit = model(Some(tokenizer(8))).unwrap();
        crate::mim::tests::check_objective(&beit, 6.0 / 16.0, 8);
        assert_eq!(beit.second_view().map(|view| view.size), Some(8));
    }

    /// The second view alone decides on the tokens; without a tokenizer there is no loss, but there are features.
    #[test]
    fn tokens_come_from_the_second_view() {
        let beit = model(Some(tokenizer(8))).unwrap();
        let p = Params::init(beit.layout(), 1);
        let mut rng = Rng::new(3, Purpose::Case, 0, 0);
        let mut noise = |side| Tensor::<f32>::from_fn([2, 3, side, side], |_| rng.normal() as f32);
        let (images, one, two) = (noise(16), noise(8), noise(8));
        let loss = |beit: &BeitPretraining, second| {
            let batch = Batch { images: &images, second, labels: &[], key: StepKey { seed: 1, step: 1 } };
            beit.loss(&p, None, batch).map(|loss| loss.value)
        };
        assert_eq!(loss(&beit, Some(&one)).unwrap(), loss(&beit, Some(&one)).unwrap());
        assert_ne!(loss(&beit, Some(&one)).unwrap(), loss(&beit, Some(&two)).unwrap());
        let without = model(None).unwrap();
        assert!(loss(&without, None).unwrap_err().to_string().contains("tokenizer"));
        assert!(without.features(&Params::init(without.layout(), 1), &images).is_ok());
        assert!(model(Some(tokenizer(16))).err().unwrap().to_string().contains("8×8"));
    }
}
