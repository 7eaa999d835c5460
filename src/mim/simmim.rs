//! `mim.simmim`: SimMIM (arXiv 2111.09886): hidden patches become a learned token, an encoder sees all tokens, one linear layer
//! paints every pixel, and the loss is the absolute error on the hidden ones.
//!
//! `tokens = encoder(x(1 − w) + mask_token·w)`, `pred = shuffle(conv1×1(tokens))` ([`PixelDecoder`]), loss [`MaskedL1Loss`].
//!
//! Backward: loss → decoder → encoder; the image's gradient has two paths, encoder and target.

use std::sync::Arc;

use super::mask::{CoarseMask, read_mask};
use super::pixels::{DECODER_CHANS, L1Saved, MaskedL1Loss, PixelDecoder, hidden_pixels};
use super::simmim_swin::{self, SimMimSwin};
use super::simmim_vit::{self, SimMimVit};
use super::{MaskedModel, Reconstruction};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::{elementwise, reduce};
use crate::model::network::weight_init;
use crate::nn::{Batch, Layout, Loss, Names, Objective, Params, StepKey};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The encoders that SimMIM trains.
enum Encoder {
    /// A plain ViT in the style of BEiT.
    Vit(SimMimVit),
    /// Swin.
    Swin(SimMimSwin),
}

/// What an encoder's backward pass needs.
enum EncoderSaved<T: Float> {
    Vit(simmim_vit::Saved<T>),
    Swin(simmim_swin::Saved<T>),
}

const ENCODERS: [&str; 2] = ["swin", "vit"];

impl Encoder {
    fn new(config: &Config, names: &mut Names) -> Result<Self> {
        match config.choice("encoder", &ENCODERS)? {
            "swin" => Ok(Encoder::Swin(SimMimSwin::new(config, names)?)),
            _vit => Ok(Encoder::Vit(SimMimVit::new(config, names)?)),
        }
    }

    /// Rows and columns of the tokens that come out.
    fn grid(&self) -> [usize; 2] {
        match self {
            Encoder::Vit(vit) => vit.grid(),
            Encoder::Swin(swin) => swin.grid(),
        }
    }

    /// The width of the tokens that come out.
    fn features(&self) -> usize {
        match self {
            Encoder::Vit(vit) => vit.features(),
            Encoder::Swin(swin) => swin.features(),
        }
    }

    fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, hidden: &[bool]) -> Result<(Tensor<T>, EncoderSaved<T>)> {
        match self {
            Encoder::Vit(vit) => vit.forward(p, image, Some(hidden)).map(|(y, saved)| (y, EncoderSaved::Vit(saved))),
            Encoder::Swin(swin) => swin.forward(p, image, Some(hidden)).map(|(y, saved)| (y, EncoderSaved::Swin(saved))),
        }
    }

    fn infer<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<Tensor<T>> {
        match self {
            Encoder::Vit(vit) => vit.infer(p, image),
            Encoder::Swin(swin) => Ok(swin.forward(p, image, None)?.0),
        }
    }

    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: EncoderSaved<T>,
        d: &Tensor<T>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        match (self, saved) {
            (Encoder::Vit(vit), EncoderSaved::Vit(saved)) => vit.backward(p, g, saved, d, want_image),
            (Encoder::Swin(swin), EncoderSaved::Swin(saved)) => swin.backward(p, g, saved, d, want_image),
            _ => unreachable!("an encoder is handed what it saved"),
        }
    }
}

/// The network, its loss and its masks.
pub struct SimMim {
    layout: Arc<Layout>,
    encoder: Encoder,
    decoder: PixelDecoder,
    loss: MaskedL1Loss,
    image: usize,
    patch: usize,
    mask_patch: usize,
    mask_ratio: f64,
}

/// What [`SimMim::backward`] needs.
pub struct Saved<T: Float> {
    encoder: EncoderSaved<T>,
    tokens: Tensor<T>,
    pred: Tensor<T>,
    pixels: L1Saved<T>,
}

impl SimMim {
    /// The network from the keys of `mim.simmim`. For training also `mask_patch_size` (32 where that divides the image, else
    /// `encoder_stride`) and `mask_ratio` (0.6).
    pub fn new(config: &Config) -> Result<Self> {
        let (image, patch, chans) = (config.positive("img_size")?, config.positive("patch_size")?, config.positive("in_chans")?);
        let stride = config.positive("encoder_stride")?;
        if chans != DECODER_CHANS {
            return Err(Error::config("in_chans", format!("expected {DECODER_CHANS}, what the decoder paints, found {chans}")));
        }
        let loss = MaskedL1Loss::new(patch, config.usize_or("norm_target", 0)?)?;
        let build = |names: &mut Names| {
            let encoder = Encoder::new(config, &mut names.at("encoder"))?;
            let grid = encoder.grid();
            if grid.map(|side| side * stride) != [image; 2] {
                let message = format!("expected {image} pixels over {} rows of tokens, found {stride}", grid[0]);
                return Err(Error::config("encoder_stride", message));
            }
            let decoder = PixelDecoder::new(names.at("decoder.0"), encoder.features(), stride, grid);
            Ok((encoder, decoder))
        };
        let ((encoder, decoder), layout) = Layout::build(build)?;
        let layout = weight_init(layout, config)?;
        let mask_patch =
            config.usize_or("mask_patch_size", if image.is_multiple_of(32) && 32usize.is_multiple_of(patch) { 32 } else { stride })?;
        let mask_ratio = config.f64_or("mask_ratio", 0.6)?;
        CoarseMask::new(image, mask_patch, patch, mask_ratio)?;
        Ok(SimMim { layout, encoder, decoder, loss, image, patch, mask_patch, mask_ratio })
    }

    /// The loss of `image` `[B, 3, S, S]` with the patches `hidden` `[B, S/P, S/P]`, and the prediction (in what is saved).
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, hidden: &[bool]) -> Result<(T, Saved<T>)> {
        let (tokens, encoder) = self.encoder.forward(p, image, hidden)?;
        let pred = self.decoder.forward(p, &tokens)?;
        let (loss, pixels) = self.loss.forward(&pred, image, hidden)?;
        Ok((loss, Saved { encoder, tokens, pred, pixels }))
    }

    /// Adds the gradients of the parameters, for the gradient of the loss and, where there is one, a further gradient of `pred`.
    /// With `image`, the gradient of the image, through encoder and target.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_loss: T,
        d_pred_too: Option<&Tensor<T>>,
        image: Option<&Tensor<T>>,
    ) -> Result<Option<Tensor<T>>> {
        let Saved { encoder, tokens, pred, pixels } = saved;
        let mut d_pred = self.loss.backward(&pixels, &pred, d_loss)?;
        let through_target = image.map(|image| self.loss.backward_image(image, &d_pred)).transpose()?;
        drop((pixels, pred));
        if let Some(more) = d_pred_too {
            more.expect_shape("gradient of pred", d_pred.shape())?;
            elementwise::add(d_pred.data_mut(), more.data());
        }
        let d_tokens = self.decoder.backward(p, g, &tokens, &d_pred)?;
        let d_image = self.encoder.backward(p, g, encoder, &d_tokens, image.is_some())?;
        Ok(d_image.zip(through_target).map(|(mut d, other)| {
            elementwise::add(d.data_mut(), other.data());
            d
        }))
    }

    fn draw(&self, images: usize, key: StepKey) -> Result<Vec<bool>> {
        Ok(CoarseMask::new(self.image, self.mask_patch, self.patch, self.mask_ratio)?.draw(images, key))
    }
}

impl Objective for SimMim {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn image_shape(&self) -> (usize, usize) {
        (self.image, DECODER_CHANS)
    }

    fn loss(&self, params: &Params<f32>, grads: Option<&mut Params<f32>>, batch: Batch) -> Result<Loss> {
        let Batch { images, key, .. } = batch;
        let [b, ..] = images.dims::<4>("images")?;
        let (loss, saved) = self.forward(params, images, &self.draw(b, key)?)?;
        if let Some(grads) = grads {
            self.backward(params, grads, saved, 1.0, None, None)?;
        }
        Ok(loss.into())
    }
}

impl MaskedModel for SimMim {
    fn reconstruct(&self, params: &Params<f32>, images: &Tensor<f32>, key: StepKey) -> Result<Reconstruction> {
        let shape @ [b, _, _, _] = images.dims("images")?;
        let hidden = self.draw(b, key)?;
        let (_, saved) = self.forward(params, images, &hidden)?;
        let predicted = self.loss.picture(&saved.pred, images)?;
        Ok(Reconstruction { hidden: hidden_pixels(&hidden, shape, self.patch)?, predicted })
    }

    fn features(&self, params: &Params<f32>, images: &Tensor<f32>) -> Result<Tensor<f32>> {
        let tokens = self.encoder.infer(params, images)?;
        let [b, n, c] = tokens.dims("tokens")?;
        let mut mean = Tensor::zeros([b, c]);
        for (mean, x) in mean.data_mut().chunks_exact_mut(c).zip(tokens.data().chunks_exact(n * c)) {
            reduce::add_column_sums(mean, x);
            mean.iter_mut().for_each(|x| *x /= n as f32);
        }
        Ok(mean)
    }
}

/// `mim.simmim`.
pub struct MimSimMim;

impl Operation for MimSimMim {
    const NAME: &'static str = "mim.simmim";
    const PAPER: &'static str = "2111.09886 SimMIM";

    fn sample(rng: &mut Rng) -> Config {
        let (patch, heads, width) = (rng.between(1, 4), rng.between(1, 3), rng.between(2, 4));
        let mut config = Config::default();
        config.set("encoder", "vit").set("img_size", patch * rng.between(2, 3)).set("patch_size", patch).set("in_chans", 3);
        config
            .set("embed_dim", heads * width)
            .set("depth", rng.between(0, 2))
            .set("num_heads", heads)
            .set("mlp_ratio", rng.range(0.5, 2.0));
        for key in ["qkv_bias", "layer_scale", "use_ape", "use_rpb", "use_shared_rpb", "use_mean_pooling"] {
            config.set(key, rng.chance(0.5));
        }
        config.set("norm_eps", 1e-6).set("norm_target", [0, 3, 5][rng.below(3)]).set("encoder_stride", patch);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (image, side, batch) =
            (config.positive("img_size")?, config.positive("img_size")? / config.positive("patch_size")?, draw.size("batch", 1, 3));
        draw.normal("image", [batch, config.positive("in_chans")?, image, image]);
        let mask = (0..batch * side * side).map(|_| i64::from(draw.rng.chance(0.6))).collect();
        draw.ints("mask", [batch, side, side], mask)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let simmim = SimMim::new(run.config())?;
        let p = run.params(&simmim.layout)?;
        let image = run.input("image")?;
        let [batch, ..] = image.dims::<4>("image")?;
        let hidden = read_mask(run.ints("mask")?, [batch, simmim.image / simmim.patch, simmim.image / simmim.patch])?;
        let (loss, saved) = simmim.forward(&p, &image, &hidden)?;
        run.output("loss", &Tensor::scalar(loss));
        run.output("pred", &saved.pred);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let d_loss = run.cotangent("loss", [].into())?.data()[0];
            let d_pred = run.cotangent("pred", saved.pred.shape())?;
            if let Some(d_image) = simmim.backward(&p, &mut g, saved, d_loss, Some(&d_pred), Some(&image))? {
                run.grad_input("image", &d_image);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the trainer, the pictures and the probe rely on.
    #[test]
    fn objective_with_a_vit() {
        let json = r#"{"encoder": "vit", "img_size": 16, "patch_size": 2, "in_chans": 3, "embed_dim": 8, "depth": 1, "num_heads": 2,
            "mlp_ratio": 2, "qkv_bias": true, "layer_scale": true, "use_ape": false, "use_rpb": false, "use_shared_rpb": true,
            "use_mean_pooling": false, "norm_eps": 1e-6, "norm_target": 0, "encoder_stride": 2, "mask_patch_size": 4, "mask_ratio": 0.5}"#;
        let config = Config::parse(json).unwrap();
        crate::mim::tests::check_objective(&SimMim::new(&config).unwrap(), 0.5, 8);
        for (key, value) in [("mask_patch_size", 3), ("encoder_stride", 4), ("in_chans", 1), ("norm_target", 4)] {
            let mut config = config.clone();
            config.set(key, value);
            assert!(SimMim::new(&config).is_err(), "{key}");
        }
    }

    /// Nothing masked: no loss, and gradients of zero rather than no numbers.
    #[test]
    fn nothing_masked_is_no_loss() {
        let config = MimSimMim::sample(&mut Rng::new(3, crate::tensor::random::Purpose::Case, 0, 0));
        let simmim = SimMim::new(&config).unwrap();
        let (side, n) = (simmim.image, simmim.image / simmim.patch);
        let p = Params::<f32>::init(&simmim.layout, 1);
        let mut g = Params::zeros(&simmim.layout);
        let (loss, saved) = simmim.forward(&p, &Tensor::zeros([2, 3, side, side]), &vec![false; 2 * n * n]).unwrap();
        simmim.backward(&p, &mut g, saved, 1.0, None, None).unwrap();
        assert!(loss == 0.0 && g.flat().iter().all(|&x| x == 0.0));
    }
}
