//! `mim.greenmim` (arXiv 2205.13515): a Swin (or Twins) encoder over visible tokens, a light decoder, the pixels of the masked cells.
//!
//! One random mask per batch on the coarse grid of the last stage (cells of `F = P·2^{stages−1}` pixels). Latents are embedded to
//! the decoder's width, put back among copies of `mask_token`, given fixed positions, and pass plain ViT blocks; `decoder_pred`
//! predicts the `F²·3` pixels of every cell, and [`MaskedPixelLoss`] counts the masked ones.
//!
//! `decoder_order`: latents stand in raster order, so a visible cell j belongs to latent "number of visible cells before j"
//! (`row_major`, our default). The released code takes the rank of j's noise instead (`noise_rank`), which puts most latents on
//! wrong cells; it is kept because published weights were trained with it.

use std::sync::Arc;

use super::green_encoder::{self, GreenEncoder, Visible};
use super::mask::{RandomMask, mask_tensor, random_mask};
use super::pixels::{MaskedPixelLoss, PixelSaved, hidden_pixels};
use super::{MaskedModel, Reconstruction};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::Result;
use crate::kernel::attention::Groups;
use crate::kernel::rows;
use crate::model::green_twins;
use crate::model::swin_ops::{mean_tokens, sample_encoder};
use crate::model::vit_block::{self, Block, BlockSettings};
use crate::nn::mask_token::{mix_token, mix_token_backward};
use crate::nn::{Batch, Init, LayerNorm, Layout, Linear, Loss, Names, Objective, Param, Params, Stats, StepKey, xavier};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// GreenMIM's network and loss.
#[derive(Clone, Debug)]
pub struct GreenMim {
    encoder: GreenEncoder,
    mask_token: Param,
    decoder_embed: Linear,
    positions: Param,
    blocks: Vec<Block>,
    norm: LayerNorm,
    pred: Linear,
    loss: MaskedPixelLoss,
    mask_ratio: f64,
    noise_rank: bool,
    /// Cells per side.
    side: usize,
    groups: Groups,
    layout: Arc<Layout>,
}

struct Saved<T: Float> {
    encoder: green_encoder::Saved<T>,
    latent: Tensor<T>,
    blocks: Vec<vit_block::Saved<T>>,
    last: Tensor<T>,
    stats: Stats<T>,
    normed: Tensor<T>,
}

impl GreenMim {
    /// The objective of a configuration (keys of `mim.greenmim`).
    pub fn new(config: &Config) -> Result<Self> {
        let (model, layout) = Layout::build(|names| Self::register(config, names))?;
        Ok(GreenMim { layout, ..model })
    }

    fn register(config: &Config, names: &mut Names) -> Result<Self> {
        let encoder = GreenEncoder::new(&mut names.at("encoder"), config)?;
        let (eps, ratio, side) = (encoder.norm_eps(), config.f64_or("mlp_ratio", 4.0)?, encoder.cells());
        let (image, chans) = encoder.image();
        let factor = image / side.max(1);
        let (dim, heads) = (config.positive("decoder_embed_dim")?, config.positive("decoder_num_heads")?);
        let block = BlockSettings {
            // The decoder's blocks always have biases, whatever the encoder's do.
            attention: crate::attention::softmax::Settings::new(dim, heads),
            mlp_ratio: ratio,
            norm_eps: eps,
            layer_scale: None,
            drop_path: 0.0,
            init: xavier,
        };
        let mask_token = names.param("mask_token", [1, 1, dim], Init::NORMAL_02);
        let decoder_embed = Linear::new(names.at("decoder_embed"), encoder.width(), dim, true, xavier(encoder.width(), dim));
        let positions = names.buffer("decoder_pos_embed", [1, side * side, dim], Init::sincos2d(dim, side, 0)?);
        let blocks = (0..config.usize("decoder_depth")?)
            .map(|i| Block::new(&mut names.at(format!("decoder_blocks.{i}")), block))
            .collect::<Result<_>>()?;
        let norm = LayerNorm::new(names.at("decoder_norm"), dim, eps);
        let pixels = factor * factor * chans;
        let pred = Linear::new(names.at("decoder_pred"), dim, pixels, true, xavier(dim, pixels));
        Ok(GreenMim {
            mask_token,
            decoder_embed,
            positions,
            blocks,
            norm,
            pred,
            loss: MaskedPixelLoss { patch: factor, norm_pix: config.bool("norm_pix_loss")? },
            mask_ratio: config.f64("mask_ratio")?,
            noise_rank: config.choice("decoder_order", &["noise_rank", "row_major"])? == "noise_rank",
            side,
            groups: Groups::all(side * side, side * side),
            layout: Arc::default(),
            encoder,
        })
    }

    /// For every cell its latent row, or a number beyond them where it is hidden.
    fn latent_rows(&self, mask: &RandomMask, hidden: &[bool]) -> Vec<u32> {
        let mut before = 0;
        (0..hidden.len())
            .map(|j| {
                let rank = if self.noise_rank { mask.ids_restore[j] } else { before };
                before += u32::from(!hidden[j]);
                if hidden[j] { u32::MAX } else { rank }
            })
            .collect()
    }

    fn forward<T: Float>(
        &self,
        p: &Params<T>,
        image: &Tensor<T>,
        seen: &Visible,
        hidden: &[bool],
        latents: &[u32],
    ) -> Result<(Tensor<T>, Saved<T>)> {
        let (latent, encoder) = self.encoder.forward(p, image, seen)?;
        let rows_in = self.decoder_embed.forward(p, &latent)?;
        let [batch, _, dim] = rows_in.dims("latents")?;
        let mut x = Tensor::scratch([batch, hidden.len(), dim]);
        rows::gather_batch(x.data_mut(), rows_in.data(), latents, batch, dim);
        drop(rows_in);
        mix_token(p, self.mask_token, &mut x, &hidden.repeat(batch))?;
        rows::add_table(x.data_mut(), p.buffer(self.positions));
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (y, saved) = block.forward(p, x, &self.groups, None)?;
            x = y;
            blocks.push(saved);
        }
        let (normed, stats) = self.norm.forward(p, &x)?;
        let pred = self.pred.forward(p, &normed)?;
        Ok((pred, Saved { encoder, latent, blocks, last: x, stats, normed }))
    }

    #[allow(clippy::too_many_arguments)]
    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        seen: &Visible,
        hidden: &[bool],
        latents: &[u32],
        d_pred: &Tensor<T>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let d_normed = self.pred.backward(p, g, &saved.normed, d_pred)?;
        let mut dx = self.norm.backward(p, g, &saved.last, &saved.stats, &d_normed, None)?;
        for (block, saved) in self.blocks.iter().zip(saved.blocks).rev() {
            dx = block.backward(p, g, saved, &self.groups, None, &dx)?;
        }
        let [batch, _, dim] = dx.dims("decoder tokens")?;
        mix_token_backward(g, self.mask_token, &mut dx, &hidden.repeat(batch))?;
        let mut cells = vec![u32::MAX; saved.latent.shape()[1]];
        for (j, &row) in latents.iter().enumerate().filter(|(_, row)| **row != u32::MAX) {
            cells[row as usize] = j as u32;
        }
        let mut d_rows = Tensor::scratch([batch, cells.len(), dim]);
        rows::gather_batch(d_rows.data_mut(), dx.data(), &cells, batch, dim);
        let d_latent = self.decoder_embed.backward(p, g, &saved.latent, &d_rows)?;
        self.encoder.backward(p, g, saved.encoder, seen, &d_latent, want_image)
    }

    fn draw(&self, key: StepKey) -> Result<RandomMask> {
        RandomMask::draw(1, self.side * self.side, self.mask_ratio, key)
    }
}

impl Objective for GreenMim {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn image_shape(&self) -> (usize, usize) {
        self.encoder.image()
    }

    fn loss(&self, params: &Params<f32>, grads: Option<&mut Params<f32>>, batch: Batch) -> Result<Loss> {
        let Batch { images, key, .. } = batch;
        let mask = self.draw(key)?;
        let hidden = mask.hidden();
        let (seen, latents) = (self.encoder.visible(&hidden)?, self.latent_rows(&mask, &hidden));
        let (pred, saved) = self.forward(params, images, &seen, &hidden, &latents)?;
        let (loss, pixels) = self.loss.forward(&pred, images, &hidden)?;
        if let Some(grads) = grads {
            let d_pred = self.loss.backward(&pixels, &pred, 1.0)?;
            drop((pred, pixels));
            self.backward(params, grads, saved, &seen, &hidden, &latents, &d_pred, false)?;
        }
        Ok(loss.into())
    }
}

impl MaskedModel for GreenMim {
    fn reconstruct(&self, params: &Params<f32>, images: &Tensor<f32>, key: StepKey) -> Result<Reconstruction> {
        let mask = self.draw(key)?;
        let hidden = mask.hidden();
        let (seen, latents) = (self.encoder.visible(&hidden)?, self.latent_rows(&mask, &hidden));
        let (pred, _) = self.forward(params, images, &seen, &hidden, &latents)?;
        let shape @ [batch, _, _, _] = images.dims("images")?;
        Ok(Reconstruction {
            hidden: hidden_pixels(&hidden.repeat(batch), shape, self.loss.patch)?,
            predicted: self.loss.picture(&pred, images)?,
        })
    }

    fn features(&self, params: &Params<f32>, images: &Tensor<f32>) -> Result<Tensor<f32>> {
        let seen = self.encoder.visible(&vec![false; self.side * self.side])?;
        mean_tokens(&self.encoder.forward(params, images, &seen)?.0)
    }
}

/// `mim.greenmim`.
pub struct GreenMimOp;

impl Operation for GreenMimOp {
    const NAME: &'static str = "mim.greenmim";
    const PAPER: &'static str = "2205.13515 GreenMIM";
    const DATA: &'static [&'static str] = &["noise"];

    fn sample(rng: &mut Rng) -> Config {
        // At least two cells, so that one can be hidden and one seen.
        let mut config = if rng.chance(0.3) {
            let mut config = green_twins::sample_encoder(rng, 2);
            config.set("encoder", "twins").set("mlp_ratio", rng.range(1.0, 2.0));
            config
        } else {
            let mut config = sample_encoder(rng);
            let stages = config.usizes("depths").map_or(1, |d| d.len());
            let patch = config.usize("patch_size").unwrap_or(1);
            let window = config.usize("window_size").unwrap_or(1);
            config.set("img_size", window.max(2) * (patch << (stages - 1))).set("window_size", window.max(2));
            config
        };
        config.set("norm_eps", 1e-6).set("in_chans", 3);
        let heads = rng.between(1, 2);
        config.set("decoder_embed_dim", 4 * heads).set("decoder_depth", rng.below(3)).set("decoder_num_heads", heads);
        config.set("mask_ratio", rng.range(0.3, 0.7)).set("norm_pix_loss", rng.chance(0.5));
        config.set("decoder_order", rng.pick(&["noise_rank", "row_major"]));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let side = config.positive("img_size")?;
        let cells = (side / config.positive("patch_size")?) >> (config.usizes("depths")?.len() - 1);
        let batch = draw.size("batch", 1, 2);
        draw.normal("image", [batch, config.positive("in_chans")?, side, side]);
        draw.uniform("noise", [cells * cells]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let model = GreenMim::new(run.config())?;
        let p = run.params(&model.layout)?;
        let image = run.input("image")?;
        let noise = run.input("noise")?;
        noise.expect_shape("input `noise`", [model.side * model.side])?;
        let mask = random_mask(&noise.reshape([1, model.side * model.side])?, model.mask_ratio)?;
        let hidden = mask.hidden();
        let (seen, latents) = (model.encoder.visible(&hidden)?, model.latent_rows(&mask, &hidden));
        let (pred, saved) = model.forward(&p, &image, &seen, &hidden, &latents)?;
        let (loss, pixels): (T, PixelSaved<T>) = model.loss.forward(&pred, &image, &hidden)?;
        run.output("loss", &Tensor::scalar(loss));
        run.output("pred", &pred);
        run.output_ints("mask", mask_tensor([hidden.len()], &hidden)?);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let from_loss = model.loss.backward(&pixels, &pred, run.cotangent("loss", [].into())?.data()[0])?;
            let mut d_pred = run.cotangent("pred", pred.shape())?;
            crate::kernel::elementwise::add(d_pred.data_mut(), from_loss.data());
            let d_image = model.backward(&p, &mut g, saved, &seen, &hidden, &latents, &d_pred, true)?;
            if let Some(mut d_image) = d_image {
                crate::kernel::elementwise::add(d_image.data_mut(), model.loss.backward_image(&pixels, &from_loss)?.data());
                run.grad_input("image", &d_image);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
