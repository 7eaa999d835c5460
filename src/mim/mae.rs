//! `mim.mae`: masked autoencoders (arXiv 2111.06377).
//!
//! The [`Encoder`] sees the visible patches only, in the order of their noise. `decoder_embed` narrows its tokens; a learned
//! `mask_token` stands in for hidden patches; position j takes row `ids_restore_j` of [visible; mask tokens]. A light [`Trunk`] on
//! all positions and `decoder_pred` give `pred` `[B, L, P²·3]`; the loss is [`MaskedPixelLoss`].
//!
//! Backward: row k of the encoder receives the gradient of the position that it was moved to, `dmask_token` the sum over hidden
//! positions, hidden patches nothing. The image's gradient has two paths: encoder and target.

use std::sync::Arc;

use rayon::prelude::*;

use super::mask::{RandomMask, mask_tensor, random_mask};
use super::pixels::{MaskedPixelLoss, PixelSaved, hidden_pixels};
use super::{MaskedModel, Reconstruction};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::{elementwise, rows};
use crate::model::vit_encoder::{Encoder, EncoderSaved, EncoderSettings, Trunk, TrunkSaved, mae_block_settings};
use crate::nn::{Batch, Init, Layout, Linear, Loss, Names, Objective, Param, Params, StepKey, xavier};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The network and its loss.
pub struct Mae {
    layout: Arc<Layout>,
    net: Net,
    loss: MaskedPixelLoss,
    image: usize,
    chans: usize,
    mask_ratio: f64,
}

struct Net {
    encoder: Encoder,
    embed: Linear,
    mask_token: Param,
    positions: Param,
    trunk: Trunk,
    pred: Linear,
}

/// What [`Mae::backward`] needs.
pub struct Saved<T: Float> {
    encoder: EncoderSaved<T>,
    latent: Tensor<T>,
    trunk: TrunkSaved<T>,
    decoded: Tensor<T>,
    ids_restore: Vec<u32>,
    pred: Tensor<T>,
    pixels: PixelSaved<T>,
}

impl Net {
    fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let (image, patch, chans) = (config.positive("img_size")?, config.positive("patch_size")?, config.positive("in_chans")?);
        let (ratio, eps) = (config.f64_or("mlp_ratio", 4.0)?, config.f64_or("norm_eps", 1e-6)?);
        let (dim, width) = (config.positive("embed_dim")?, config.positive("decoder_embed_dim")?);
        let (pixels, depth) = (patch * patch * chans, config.usize("depth")?);
        let encoder = Encoder::new(
            names,
            EncoderSettings {
                image: [image; 2],
                patch,
                chans,
                depth,
                block: mae_block_settings(dim, config.positive("num_heads")?, ratio, eps),
                tokens: &["cls_token"],
                fixed_positions: true,
                norm: true,
                patch_init: xavier(pixels, dim),
            },
        )?;
        let [side, _] = encoder.grid();
        let embed = Linear::new(names.at("decoder_embed"), dim, width, true, xavier(dim, width));
        let mask_token = names.param("mask_token", [1, 1, width], Init::NORMAL_02);
        let positions = names.buffer("decoder_pos_embed", [1, 1 + side * side, width], Init::sincos2d(width, side, 1)?);
        let block = mae_block_settings(width, config.positive("decoder_num_heads")?, ratio, eps);
        let trunk = Trunk::new(names, "decoder_", config.usize("decoder_depth")?, block, true)?;
        let pred = Linear::new(names.at("decoder_pred"), width, pixels, true, xavier(width, pixels));
        Ok(Net { encoder, embed, mask_token, positions, trunk, pred })
    }

    /// `[B, 1 + K, D]` → `[B, 1 + L, D]`: mask tokens filled in, order restored, positions added.
    fn fill<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, mask: &RandomMask) -> Result<Tensor<T>> {
        let [b, given, d] = x.dims("latent tokens")?;
        let (l, token) = (mask.len, p.get(self.mask_token));
        let mut out = Tensor::scratch([b, 1 + l, d]);
        out.data_mut().par_chunks_mut((1 + l) * d).zip(x.data().par_chunks(given * d)).enumerate().for_each(|(i, (out, x))| {
            let (class, rest) = out.split_at_mut(d);
            class.copy_from_slice(&x[..d]);
            for (row, &rank) in rest.chunks_exact_mut(d).zip(&mask.ids_restore[i * l..]) {
                let at = (1 + rank as usize) * d;
                row.copy_from_slice(x.get(at..at + d).unwrap_or(token));
            }
        });
        rows::add_table(out.data_mut(), p.buffer(self.positions));
        Ok(out)
    }

    /// Backward of [`fill`](Self::fill): the gradient of the `1 + given` rows that went in.
    fn fill_backward<T: Float>(&self, g: &mut Params<T>, dy: &Tensor<T>, ids_restore: &[u32], given: usize) -> Result<Tensor<T>> {
        let [b, all, d] = dy.dims("gradient of the decoder's tokens")?;
        let l = all - 1;
        let mut dx = Tensor::scratch([b, 1 + given, d]);
        let d_token = g.get_mut(self.mask_token);
        for (i, (dx, dy)) in dx.data_mut().chunks_exact_mut((1 + given) * d).zip(dy.data().chunks_exact(all * d)).enumerate() {
            dx[..d].copy_from_slice(&dy[..d]);
            for (dy, &rank) in dy[d..].chunks_exact(d).zip(&ids_restore[i * l..]) {
                let at = (1 + rank as usize) * d;
                match dx.get_mut(at..at + d) {
                    Some(row) => row.copy_from_slice(dy),
                    None => d_token.iter_mut().zip(dy).for_each(|(t, x)| *t += *x),
                }
            }
        }
        Ok(dx)
    }
}

/// Drops the class row: `[B, 1 + L, D]` → `[B, L, D]`.
fn without_class<T: Float>(x: &Tensor<T>) -> Result<Tensor<T>> {
    let [b, n, d] = x.dims("tokens")?;
    let mut out = Tensor::scratch([b, n - 1, d]);
    out.data_mut().par_chunks_mut((n - 1) * d).zip(x.data().par_chunks(n * d)).for_each(|(out, x)| out.copy_from_slice(&x[d..]));
    Ok(out)
}

/// Backward of [`without_class`].
fn with_zero_class<T: Float>(x: &Tensor<T>) -> Result<Tensor<T>> {
    let [b, l, d] = x.dims("tokens")?;
    let mut out = Tensor::zeros([b, 1 + l, d]);
    out.data_mut().par_chunks_mut((1 + l) * d).zip(x.data().par_chunks(l * d)).for_each(|(out, x)| out[d..].copy_from_slice(x));
    Ok(out)
}

impl Mae {
    /// The network from the keys of `mim.mae`.
    pub fn new(config: &Config) -> Result<Self> {
        let (net, layout) = Layout::build(|names| Net::new(names, config))?;
        let mask_ratio = config.f64("mask_ratio")?;
        super::mask::len_keep(1, mask_ratio)?;
        Ok(Mae {
            layout,
            net,
            loss: MaskedPixelLoss { patch: config.positive("patch_size")?, norm_pix: config.bool_or("norm_pix_loss", true)? },
            image: config.positive("img_size")?,
            chans: config.positive("in_chans")?,
            mask_ratio,
        })
    }

    /// Patches L of an image.
    pub fn patches(&self) -> usize {
        self.net.encoder.grid().iter().product()
    }

    /// The loss of `image` `[B, C, H, W]` under `mask`, and the prediction `[B, L, P²·C]` (in what is saved).
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, mask: &RandomMask) -> Result<(T, Saved<T>)> {
        let net = &self.net;
        if [mask.batch, mask.len] != [image.shape().first().copied().unwrap_or(0), self.patches()] {
            return Err(Error::shape("mask", [image.shape().first().copied().unwrap_or(0), self.patches()], [mask.batch, mask.len]));
        }
        let (latent, encoder) = net.encoder.forward(p, image, Some(&mask.ids_keep))?;
        let narrow = net.embed.forward(p, &latent)?;
        let full = net.fill(p, &narrow, mask)?;
        drop(narrow);
        let (decoded, trunk) = net.trunk.forward(p, full)?;
        let decoded = without_class(&decoded)?;
        let pred = net.pred.forward(p, &decoded)?;
        let (loss, pixels) = self.loss.forward(&pred, image, &mask.hidden())?;
        Ok((loss, Saved { encoder, latent, trunk, decoded, ids_restore: mask.ids_restore.clone(), pred, pixels }))
    }

    /// Adds the gradients of the parameters, for the gradient of the loss and, where there is one, a further gradient of `pred`.
    /// The gradient of the image, through encoder and target, if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_loss: T,
        d_pred_too: Option<&Tensor<T>>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let Saved { encoder, latent, trunk, decoded, ids_restore, pred, pixels } = saved;
        let net = &self.net;
        let mut d_pred = self.loss.backward(&pixels, &pred, d_loss)?;
        let through_target = if want_image { Some(self.loss.backward_image(&pixels, &d_pred)?) } else { None };
        drop((pixels, pred));
        if let Some(more) = d_pred_too {
            more.expect_shape("gradient of pred", d_pred.shape())?;
            elementwise::add(d_pred.data_mut(), more.data());
        }
        let d_decoded = with_zero_class(&net.pred.backward(p, g, &decoded, &d_pred)?)?;
        drop((d_pred, decoded));
        let d_full = net.trunk.backward(p, g, trunk, &d_decoded)?;
        let [_, rows, _] = latent.dims("latent tokens")?;
        let d_narrow = net.fill_backward(g, &d_full, &ids_restore, rows - 1)?;
        let d_latent = net.embed.backward(p, g, &latent, &d_narrow)?;
        drop((latent, d_narrow, d_full, d_decoded));
        let d_image = net.encoder.backward(p, g, encoder, &d_latent, want_image)?;
        Ok(d_image.zip(through_target).map(|(mut d, other)| {
            elementwise::add(d.data_mut(), other.data());
            d
        }))
    }

    fn draw(&self, images: usize, key: StepKey) -> Result<RandomMask> {
        RandomMask::draw(images, self.patches(), self.mask_ratio, key)
    }
}

impl Objective for Mae {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn image_shape(&self) -> (usize, usize) {
        (self.image, self.chans)
    }

    fn loss(&self, params: &Params<f32>, grads: Option<&mut Params<f32>>, batch: Batch) -> Result<Loss> {
        let Batch { images, key, .. } = batch;
        let [b, ..] = images.dims::<4>("images")?;
        let (loss, saved) = self.forward(params, images, &self.draw(b, key)?)?;
        if let Some(grads) = grads {
            self.backward(params, grads, saved, 1.0, None, false)?;
        }
        Ok(loss.into())
    }
}

impl MaskedModel for Mae {
    fn reconstruct(&self, params: &Params<f32>, images: &Tensor<f32>, key: StepKey) -> Result<Reconstruction> {
        let shape @ [b, _, _, _] = images.dims("images")?;
        let mask = self.draw(b, key)?;
        let (_, saved) = self.forward(params, images, &mask)?;
        let hidden = hidden_pixels(&mask.hidden(), shape, self.loss.patch)?;
        Ok(Reconstruction { hidden, predicted: self.loss.picture(&saved.pred, images)? })
    }

    fn features(&self, params: &Params<f32>, images: &Tensor<f32>) -> Result<Tensor<f32>> {
        self.net.encoder.mean(&self.net.encoder.infer(params, images)?)
    }
}

/// `mim.mae`.
pub struct MimMae;

impl Operation for MimMae {
    const NAME: &'static str = "mim.mae";
    const PAPER: &'static str = "2111.06377 MAE";
    const DATA: &'static [&'static str] = &["noise"];

    fn sample(rng: &mut Rng) -> Config {
        let (patch, heads, decoder_heads) = (rng.between(1, 4), rng.between(1, 3), rng.between(1, 2));
        let mut config = Config::default();
        config.set("img_size", patch * rng.between(1, 3)).set("patch_size", patch).set("in_chans", 3).set("mlp_ratio", rng.range(0.5, 2.0));
        config.set("embed_dim", 4 * heads).set("depth", rng.between(0, 2)).set("num_heads", heads).set("norm_eps", 1e-6);
        config.set("decoder_embed_dim", 4 * decoder_heads).set("decoder_depth", rng.between(0, 2)).set("decoder_num_heads", decoder_heads);
        config.set("mask_ratio", [0.25, 0.5, 0.75, 1.0][rng.below(4)]).set("norm_pix_loss", rng.chance(0.5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (image, patch, batch) = (config.positive("img_size")?, config.positive("patch_size")?, draw.size("batch", 1, 3));
        draw.normal("image", [batch, config.positive("in_chans")?, image, image]);
        draw.uniform("noise", [batch, (image / patch) * (image / patch)]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let mae = Mae::new(run.config())?;
        let p = run.params(&mae.layout)?;
        let image = run.input("image")?;
        let mask = random_mask(&run.input("noise")?, mae.mask_ratio)?;
        let (loss, saved) = mae.forward(&p, &image, &mask)?;
        run.output("loss", &Tensor::scalar(loss));
        run.output("pred", &saved.pred);
        run.output_ints("mask", mask_tensor([mask.batch, mask.len], &mask.hidden())?);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let d_loss = run.cotangent("loss", [].into())?.data()[0];
            let d_pred = run.cotangent("pred", saved.pred.shape())?;
            if let Some(d_image) = mae.backward(&p, &mut g, saved, d_loss, Some(&d_pred), true)? {
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
    fn objective() {
        let json = r#"{"img_size": 8, "patch_size": 2, "in_chans": 3, "embed_dim": 8, "depth": 1, "num_heads": 2, "decoder_embed_dim": 4,
            "decoder_depth": 1, "decoder_num_heads": 1, "mlp_ratio": 2, "norm_eps": 1e-6, "mask_ratio": 0.75, "norm_pix_loss": true}"#;
        let mae = Mae::new(&Config::parse(json).unwrap()).unwrap();
        crate::mim::tests::check_objective(&mae, 0.75, 8);
    }

    #[test]
    fn nothing_masked_is_refused() {
        let mut config = MimMae::sample(&mut Rng::new(1, crate::tensor::random::Purpose::Case, 0, 0));
        config.set("mask_ratio", 0.0);
        let mae = Mae::new(&config).unwrap();
        let (side, chans) = mae.image_shape();
        let p = Params::<f32>::init(&mae.layout, 1);
        let batch = Batch { images: &Tensor::zeros([1, chans, side, side]), labels: &[], second: None, key: StepKey { seed: 1, step: 0 } };
        let error = mae.loss(&p, None, batch).unwrap_err();
        assert!(error.to_string().contains("mask_ratio"), "{error}");
    }

    /// The positions are frozen and start as the table that the published checkpoints hold.
    #[test]
    fn positions_start_as_the_table() {
        let mae = Mae::new(&MimMae::sample(&mut Rng::new(2, crate::tensor::random::Purpose::Case, 0, 0))).unwrap();
        let p = Params::<f64>::init(&mae.layout, 1);
        for entry in mae.layout.buffers() {
            let [_, rows, dim] = *entry.param.shape() else { panic!("{}", entry.name) };
            let table = crate::nn::positions::sincos2d::<f64>(dim, (rows - 1).isqrt(), true).unwrap();
            assert_eq!(p.buffer(entry.param), table.data(), "{}", entry.name);
        }
        assert_eq!(mae.layout.buffers().len(), 2);
    }
}
