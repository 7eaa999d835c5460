//! `mim.um_mae` (arXiv 2205.10063): masked autoencoding for pyramids, which see one patch of every 2×2 block as a compact map.
//!
//! The [`Encoder`] works on the kept patches, a share of them secondarily masked. `decoder_embed` widens the pyramid's last map to
//! `4·D` channels and a pixel shuffle makes one visible token per block of it, in block raster order (`out[d, 2i+a, 2j+b] = in[4d+2a+b, i, j]`);
//! a ViT's tokens are its kept patches in raster order, after its class token. Visible tokens with positions, then a `mask_token`
//! with position for every removed patch in raster order, pass plain ViT blocks; `decoder_pred` predicts the pixels of all patches.
//!
//! `vis_pos_order`: `raster` is the released code, which gives the visible tokens of a pyramid (in block order) the positions of the kept
//! patches in raster order: most get that of another token. `block` gives each its own. The loss is the mean squared error on removed
//! patches, whose targets may be normalised ([`MaskedPixelLoss`]). Image and noise are data.

use std::sync::Arc;

use rayon::prelude::*;

use super::mask::mask_tensor;
use super::pixels::{MaskedPixelLoss, PixelSaved, hidden_pixels};
use super::um_encoder::{self, Encoder, Seen, with_row, without_row};
use super::uniform::{Compact, SecondaryRule, draw_uniform, kept_patches, read_mask_rows, secondary_mask, uniform_mask};
use super::{MaskedModel, Reconstruction};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::{elementwise, rows};
use crate::model::swin_ops::mean_tokens;
use crate::model::vit_encoder::{Trunk, TrunkSaved, mae_block_settings};
use crate::nn::{Batch, Init, Layout, Linear, Loss, Names, Objective, Param, Params, StepKey, xavier};
use crate::tensor::random::{Purpose, Rng};
use crate::tensor::{Float, IntTensor, Tensor};

/// The network and its loss.
pub struct UmMae {
    layout: Arc<Layout>,
    net: Net,
    loss: MaskedPixelLoss,
    image: usize,
    /// Mask patches M per side.
    grid: usize,
    /// Tokens K per side of a mask patch; 0 for a ViT.
    per: usize,
    ratio: f64,
    /// Visible tokens get their own positions.
    own_positions: bool,
    /// Uniform masks of training choose every block by itself.
    iid: bool,
}

struct Net {
    encoder: Encoder,
    embed: Linear,
    mask_token: Param,
    positions: Param,
    trunk: Trunk,
    pred: Linear,
    width: usize,
}

/// The masks of a batch.
#[derive(Clone, Debug)]
pub struct Masks {
    /// `[B, M²]`, true where a patch is removed.
    removed: Vec<bool>,
    seen: Seen,
    /// For every decoder token its patch, `[B, M²]`: the visible ones first.
    places: Vec<u32>,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    encoder: um_encoder::Saved<T>,
    latent: Tensor<T>,
    trunk: TrunkSaved<T>,
    decoded: Tensor<T>,
    /// `[B, M², n]`, in the order of the decoder's tokens.
    pub pred: Tensor<T>,
    in_raster: Tensor<T>,
    pixels: PixelSaved<T>,
}

impl Net {
    fn new(names: &mut Names, config: &Config, grid: usize, pixels: usize, masks: bool) -> Result<Self> {
        let vit = Encoder::stages(config)? == 0;
        let encoder = Encoder::new(names, config, masks)?;
        let (width, from) = (config.positive("decoder_embed_dim")?, encoder.width());
        let outputs = if vit { width } else { width.saturating_mul(4) };
        let embed = Linear::new(names.at("decoder_embed"), from, outputs, true, xavier(from, outputs));
        let mask_token = names.param("mask_token", [1, 1, width], Init::NORMAL_02);
        let prefix = usize::from(vit);
        let positions = names.buffer("decoder_pos_embed", [1, prefix + grid * grid, width], Init::sincos2d(width, grid, prefix)?);
        let ratio = config.f64_or(if config.str("encoder")? == "pvt" { "decoder_mlp_ratio" } else { "mlp_ratio" }, 4.0)?;
        let block = mae_block_settings(width, config.positive("decoder_num_heads")?, ratio, 1e-6);
        let trunk = Trunk::new(names, "decoder_", config.usize("decoder_depth")?, block, true)?;
        let pred = Linear::new(names.at("decoder_pred"), width, pixels, true, xavier(width, pixels));
        Ok(Net { encoder, embed, mask_token, positions, trunk, pred, width })
    }
}

/// The pixel shuffle `[B, side², 4D]` → `[B, (2·side)², D]`, or back.
fn shuffle<T: Float>(x: &Tensor<T>, side: usize, back: bool) -> Result<Tensor<T>> {
    let [batch, _, c] = x.dims("map of a pixel shuffle")?;
    let (n, d) = (side * side, if back { c } else { c / 4 });
    let mut y = Tensor::scratch(if back { [batch, n, 4 * d] } else { [batch, 4 * n, d] });
    let row = if back { 4 * d } else { d };
    y.data_mut().par_chunks_mut(row).enumerate().for_each(|(i, y)| {
        if back {
            let (b, r, q) = (i / n, i / side % side, i % side);
            for (place, first) in [(0, 0), (0, 1), (1, 0), (1, 1)].into_iter().enumerate() {
                let from = (b * 4 * n + (2 * r + first.0) * 2 * side + 2 * q + first.1) * d;
                y[place..].iter_mut().step_by(4).zip(&x.data()[from..from + d]).for_each(|(y, x)| *y = *x);
            }
        } else {
            let (b, r, q) = (i / (4 * n), i / (2 * side) % (2 * side), i % (2 * side));
            let from = (b * n + r / 2 * side + q / 2) * 4 * d + 2 * (r % 2) + q % 2;
            y.iter_mut().zip(x.data()[from..].iter().step_by(4)).for_each(|(y, x)| *y = *x);
        }
    });
    Ok(y)
}

impl UmMae {
    /// The network from the keys of `mim.um_mae`; `mask_mode` (`"pool"` or `"iid"`) says how training draws its masks.
    pub fn new(config: &Config) -> Result<Self> {
        let (image, patch) = (config.positive("img_size")?, config.positive("patch_size")?);
        if config.usize_or("in_chans", 3)? != 3 {
            return Err(Error::config("in_chans", format!("expected 3, found {}", config.usize("in_chans")?)));
        }
        let stages = Encoder::stages(config)?;
        let stride = if stages == 0 { patch } else { config.positive("stride")? };
        let (grid, per) = (image / stride, stride / patch);
        if !image.is_multiple_of(stride) || !grid.is_multiple_of(2) || grid == 0 || grid > 1 << 12 {
            return Err(Error::config(
                "img_size",
                format!("expected an even number of {stride}-pixel mask patches per side, found {image}"),
            ));
        }
        if stages > 0 && (!stride.is_multiple_of(patch) || stages < 2 || per != 1 << (stages - 2)) {
            let message =
                format!("expected patch_size · 2^(stages − 2), the pixels of a decoder token, found {stride} for {stages} stages");
            return Err(Error::config("stride", message));
        }
        if stages > 0 && !grid.is_multiple_of(4) {
            return Err(Error::config("img_size", format!("expected a multiple of 4 mask patches per side, found {grid}")));
        }
        let ratio = config.f64_or("vis_mask_ratio", 0.25)?;
        if !(0.0..=1.0).contains(&ratio) {
            return Err(Error::config("vis_mask_ratio", format!("expected a number from 0 to 1, found {ratio}")));
        }
        let own_positions = match config.get("vis_pos_order") {
            None => false,
            Some(_) => config.choice("vis_pos_order", &["raster", "block"])? == "block",
        };
        let iid = match config.get("mask_mode") {
            None => false,
            Some(_) => config.choice("mask_mode", &["pool", "iid"])? == "iid",
        };
        let pixels = stride * stride * 3;
        let (net, layout) = Layout::build(|names| Net::new(names, config, grid, pixels, ratio > 0.0))?;
        let loss = MaskedPixelLoss { patch: stride, norm_pix: config.bool_or("norm_pix_loss", true)? };
        Ok(UmMae { layout, net, loss, image, grid, per: if stages == 0 { 0 } else { per }, ratio, own_positions, iid })
    }

    fn patches(&self) -> usize {
        self.grid * self.grid
    }

    /// The masks of a batch from its mask of removed patches `[B, M²]`, and noise for the secondary ones if there are any.
    pub fn masks<T: Float>(&self, removed: Vec<bool>, batch: usize, noise: Option<&Tensor<T>>) -> Result<Masks> {
        let patches = self.patches();
        if removed.len() != batch * patches {
            return Err(Error::shape("input `mask`", [batch, patches], [removed.len()]));
        }
        let raster = kept_patches(&removed, batch)?;
        let compact = if self.per == 0 { None } else { Some(Compact::new(&removed, batch, self.grid, self.per)?) };
        let kept = compact.as_ref().map_or_else(|| raster.clone(), |compact| compact.patches.clone());
        let rule = if self.per == 0 { SecondaryRule::Vit } else { SecondaryRule::Pyramid };
        let masked = match noise {
            Some(noise) if self.ratio > 0.0 => secondary_mask(&kept, noise, patches, self.ratio, rule)?,
            None if self.ratio > 0.0 => return Err(Error::missing("input `noise`")),
            _ => vec![false; kept.len()],
        };
        let visible = if self.own_positions { &kept } else { &raster };
        let each = visible.len().checked_div(batch).unwrap_or(0);
        let mut places = Vec::with_capacity(removed.len());
        for (b, removed) in removed.chunks_exact(patches).enumerate() {
            places.extend_from_slice(&visible[b * each..(b + 1) * each]);
            places.extend((0..patches as u32).filter(|&i| removed[i as usize]));
        }
        Ok(Masks { removed, seen: Seen { batch, kept, masked, compact }, places })
    }

    /// `places` among the patches of all images.
    fn rows(&self, masks: &Masks) -> Vec<u32> {
        let patches = self.patches();
        masks.places.iter().enumerate().map(|(i, &patch)| (i / patches * patches) as u32 + patch).collect()
    }

    /// The loss of `image` `[B, 3, S, S]` under `masks`, and the prediction (in what is saved).
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, masks: &Masks) -> Result<(T, Saved<T>)> {
        let (net, patches, d) = (&self.net, self.patches(), self.net.width);
        let (latent, encoder) = net.encoder.forward(p, image, &masks.seen)?;
        let narrow = net.embed.forward(p, &latent)?;
        let (visible, class) = match self.per {
            0 => {
                let mut class = Tensor::zeros([d]);
                (without_row(&narrow, class.data_mut())?, Some(narrow))
            }
            _ => (shuffle(&narrow, self.grid / 4, false)?, None),
        };
        let [batch, each, _] = visible.dims("visible tokens")?;
        let table = p.buffer(net.positions);
        let (front, table) = table.split_at(table.len() - patches * d);
        let (token, mut x) = (p.get(net.mask_token), Tensor::scratch([batch, patches, d]));
        rows::gather(x.data_mut(), table, &masks.places, d);
        x.data_mut().par_chunks_mut(d).enumerate().for_each(|(i, x)| {
            let (b, t) = (i / patches, i % patches);
            let add = if t < each { &visible.data()[(b * each + t) * d..(b * each + t + 1) * d] } else { token };
            x.iter_mut().zip(add).for_each(|(x, y)| *x += *y);
        });
        if let Some(narrow) = class {
            // Every image has its own class token by now.
            let mut full = with_row(&x, front)?;
            for (full, narrow) in full.data_mut().chunks_exact_mut((1 + patches) * d).zip(narrow.data().chunks_exact((1 + each) * d)) {
                elementwise::add(&mut full[..d], &narrow[..d]);
            }
            x = full;
        }
        let (mut decoded, trunk) = net.trunk.forward(p, x)?;
        if self.per == 0 {
            decoded = without_row(&decoded, Tensor::zeros([d]).data_mut())?;
        }
        let pred = net.pred.forward(p, &decoded)?;
        let mut in_raster = Tensor::scratch(pred.shape());
        rows::scatter(in_raster.data_mut(), pred.data(), &self.rows(masks), net.pred.outputs());
        let (loss, pixels) = self.loss.forward(&in_raster, image, &masks.removed)?;
        Ok((loss, Saved { encoder, latent, trunk, decoded, pred, in_raster, pixels }))
    }

    /// Adds the gradients of the parameters, for the gradient of the loss and, where there is one, a further gradient of `pred`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        masks: &Masks,
        d_loss: T,
        d_pred_too: Option<&Tensor<T>>,
    ) -> Result<()> {
        let Saved { encoder, latent, trunk, decoded, pred, in_raster, pixels } = saved;
        let (net, patches, d) = (&self.net, self.patches(), self.net.width);
        let d_raster = self.loss.backward(&pixels, &in_raster, d_loss)?;
        drop((pixels, in_raster));
        let mut d_pred = Tensor::scratch(pred.shape());
        rows::gather(d_pred.data_mut(), d_raster.data(), &self.rows(masks), net.pred.outputs());
        drop((d_raster, pred));
        if let Some(more) = d_pred_too {
            more.expect_shape("gradient of pred", d_pred.shape())?;
            elementwise::add(d_pred.data_mut(), more.data());
        }
        let mut dx = net.pred.backward(p, g, &decoded, &d_pred)?;
        drop((d_pred, decoded));
        let zero = Tensor::zeros([d]);
        if self.per == 0 {
            dx = with_row(&dx, zero.data())?;
        }
        dx = net.trunk.backward(p, g, trunk, &dx)?;
        // Visible tokens get theirs back, the mask token the sum of the others.
        let [batch, all, _] = dx.dims("decoder tokens")?;
        let (prefix, each) = (all - patches, masks.seen.kept.len().checked_div(batch).unwrap_or(0));
        let mut d_visible = Tensor::scratch([batch, prefix + each, d]);
        for (d_visible, dx) in d_visible.data_mut().chunks_exact_mut((prefix + each) * d).zip(dx.data().chunks_exact(all * d)) {
            let (own, rest) = dx.split_at((prefix + each) * d);
            d_visible.copy_from_slice(own);
            crate::kernel::reduce::add_column_sums(g.get_mut(net.mask_token), rest);
        }
        drop(dx);
        if self.per > 0 {
            d_visible = shuffle(&d_visible, self.grid / 4, true)?;
        }
        let d_latent = net.embed.backward(p, g, &latent, &d_visible)?;
        drop((latent, d_visible));
        net.encoder.backward(p, g, encoder, &d_latent)
    }

    /// The masks of a training step: image `b` takes its noise from the stream of sample `b`.
    fn draw(&self, batch: usize, key: StepKey) -> Result<Masks> {
        let patches = self.patches();
        let columns = if self.iid { patches / 4 } else { 4 * patches.div_ceil(8) };
        let second = if self.per == 0 { patches / 4 } else { patches };
        let mut first = Tensor::<f64>::zeros([batch, columns]);
        let mut noise = Tensor::<f64>::zeros([batch, second]);
        for (b, (first, noise)) in first.data_mut().chunks_exact_mut(columns).zip(noise.data_mut().chunks_exact_mut(second)).enumerate() {
            let mut rng = Rng::new(key.seed, Purpose::Mask, key.step, b as u64);
            first.iter_mut().chain(noise).for_each(|x| *x = rng.uniform());
        }
        self.masks(uniform_mask(&first, [self.grid; 2], self.iid)?, batch, Some(&noise))
    }
}

impl Objective for UmMae {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn image_shape(&self) -> (usize, usize) {
        (self.image, 3)
    }

    fn loss(&self, params: &Params<f32>, grads: Option<&mut Params<f32>>, batch: Batch) -> Result<Loss> {
        let Batch { images, key, .. } = batch;
        let [batch, ..] = images.dims::<4>("images")?;
        let masks = self.draw(batch, key)?;
        let (loss, saved) = self.forward(params, images, &masks)?;
        if let Some(grads) = grads {
            self.backward(params, grads, saved, &masks, 1.0, None)?;
        }
        Ok(loss.into())
    }
}

impl MaskedModel for UmMae {
    fn reconstruct(&self, params: &Params<f32>, images: &Tensor<f32>, key: StepKey) -> Result<Reconstruction> {
        let shape @ [batch, _, _, _] = images.dims("images")?;
        let masks = self.draw(batch, key)?;
        let (_, saved) = self.forward(params, images, &masks)?;
        let hidden = hidden_pixels(&masks.removed, shape, self.loss.patch)?;
        Ok(Reconstruction { hidden, predicted: self.loss.picture(&saved.in_raster, images)? })
    }

    fn features(&self, params: &Params<f32>, images: &Tensor<f32>) -> Result<Tensor<f32>> {
        mean_tokens(&self.net.encoder.whole(params, images)?)
    }
}

/// `mim.um_mae`.
pub struct UmMaeOp;

impl Operation for UmMaeOp {
    const NAME: &'static str = "mim.um_mae";
    const PAPER: &'static str = "2205.10063 UM-MAE";
    const DATA: &'static [&'static str] = &["image", "noise"];

    fn sample(rng: &mut Rng) -> Config {
        let (encoder, heads) = (rng.pick(&["pvt", "swin", "vit"]), rng.between(1, 2));
        let mut config = Config::default();
        config.set("encoder", encoder).set("in_chans", 3).set("vis_mask_ratio", [0.0, 0.25, 0.5][rng.below(3)]);
        config.set("norm_pix_loss", rng.chance(0.5)).set("vis_pos_order", rng.pick(&["raster", "block"]));
        config.set("decoder_embed_dim", 4 * heads).set("decoder_depth", rng.below(2)).set("decoder_num_heads", heads);
        if encoder == "vit" {
            let (heads, patch) = (rng.between(1, 2), rng.between(1, 2));
            config.set("patch_size", patch).set("img_size", patch * 2 * rng.between(1, 2)).set("embed_dim", 4 * heads);
            config.set("num_heads", heads).set("depth", rng.below(3)).set("mlp_ratio", rng.range(0.5, 2.0));
            return config;
        }
        let stages = rng.between(2, 3);
        let stride = 1 << (stages - 2);
        config.set("patch_size", 1).set("stride", stride).set("img_size", 4 * stride);
        let heads: Vec<usize> = (0..stages).map(|_| rng.between(1, 2)).collect();
        config.set("depths", (0..stages).map(|_| rng.between(1, 2)).collect::<Vec<_>>());
        if encoder == "swin" {
            config.set("embed_dim", 4).set("num_heads", heads).set("mlp_ratio", rng.range(0.5, 2.0));
            config.set("window_size", rng.between(1, 2)).set("posmlp_dim", rng.between(1, 3));
        } else {
            config.set("embed_dims", (0..stages).map(|i| 4 + 2 * i).collect::<Vec<_>>()).set("num_heads", heads);
            config.set("mlp_ratios", (0..stages).map(|_| rng.between(1, 2)).collect::<Vec<_>>()).set("decoder_mlp_ratio", 2);
            config.set("sr_ratios", (0..stages).map(|i| rng.between(1, (2 * stride) >> i)).collect::<Vec<_>>());
        }
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (image, batch) = (config.positive("img_size")?, draw.size("batch", 1, 2));
        let vit = config.str("encoder")? == "vit";
        let grid = image / config.positive(if vit { "patch_size" } else { "stride" })?;
        draw.normal("image", [batch, 3, image, image]);
        let removed = draw_uniform(draw, batch, grid);
        let mask = mask_tensor([batch, grid * grid], &removed)?;
        draw.ints("mask", mask.shape, mask.data)?;
        draw.uniform("noise", [batch, grid * grid / if vit { 4 } else { 1 }]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let image = run.input("image")?;
        let side = run.config().positive("img_size")?;
        let [batch, ..] = image.dims::<4>("input `image`")?;
        image.expect_shape("input `image`", [batch, 3, side, side])?;
        let model = UmMae::new(run.config())?;
        let mask: &IntTensor = run.ints("mask")?;
        if *mask.shape != [batch, model.patches()] {
            return Err(Error::shape("input `mask`", [batch, model.patches()], mask.shape));
        }
        let noise = if run.has_input("noise") { Some(run.input("noise")?) } else { None };
        let masks = model.masks(read_mask_rows("mask", mask)?.1, batch, noise.as_ref())?;
        let p = run.params(&model.layout)?;
        let (loss, saved) = model.forward(&p, &image, &masks)?;
        run.output("loss", &Tensor::scalar(loss));
        run.output("pred", &saved.pred);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let d_loss = run.cotangent("loss", [].into())?.data()[0];
            let d_pred = run.cotangent("pred", saved.pred.shape())?;
            model.backward(&p, &mut g, saved, &masks, d_loss, Some(&d_pred))?;
            run.grad_params(&g);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str, features: usize) {
        let model = UmMae::new(&Config::parse(json).unwrap()).unwrap();
        crate::mim::tests::check_objective(&model, 0.75, features);
    }

    /// What the trainer, the pictures and the probe rely on.
    #[test]
    fn objective() {
        check(
            r#"{"encoder": "vit", "img_size": 8, "patch_size": 2, "in_chans": 3, "embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 2,
                "decoder_embed_dim": 4, "decoder_depth": 1, "decoder_num_heads": 1, "vis_mask_ratio": 0.25, "norm_pix_loss": true}"#,
            8,
        );
        check(
            r#"{"encoder": "pvt", "img_size": 16, "patch_size": 2, "stride": 4, "in_chans": 3, "embed_dims": [4, 8, 8], "depths": [1, 1, 1],
                "num_heads": [1, 2, 2], "mlp_ratios": [2, 2, 2], "sr_ratios": [2, 1, 1], "decoder_embed_dim": 4, "decoder_depth": 1,
                "decoder_num_heads": 1, "vis_mask_ratio": 0.25, "norm_pix_loss": true, "vis_pos_order": "block", "mask_mode": "iid"}"#,
            8,
        );
        check(
            r#"{"encoder": "swin", "img_size": 16, "patch_size": 2, "stride": 4, "in_chans": 3, "embed_dim": 4, "depths": [2, 1, 1],
                "num_heads": [1, 2, 2], "mlp_ratio": 2, "window_size": 2, "posmlp_dim": 4, "decoder_embed_dim": 4, "decoder_depth": 1,
                "decoder_num_heads": 1, "vis_mask_ratio": 0, "norm_pix_loss": true}"#,
            16,
        );
    }

    fn parameters(json: &str) -> usize {
        let mut config = Config::parse(json).unwrap();
        config.set("in_chans", 3).set("decoder_embed_dim", 512).set("decoder_num_heads", 16).set("vis_mask_ratio", 0.25);
        UmMae::new(&config).unwrap().layout.numel()
    }

    /// The trainable parameters of the published models.
    #[test]
    fn published_sizes() {
        let pvt = r#"{"encoder": "pvt", "img_size": 256, "patch_size": 4, "stride": 16, "embed_dims": [64, 128, 320, 512],
            "depths": [3, 4, 6, 3], "num_heads": [1, 2, 5, 8], "mlp_ratios": [8, 8, 4, 4], "sr_ratios": [4, 2, 1, 1], "decoder_depth": 2}"#;
        let swin = r#"{"encoder": "swin", "img_size": 256, "patch_size": 4, "stride": 16, "embed_dim": 96, "depths": [2, 2, 6, 2],
            "num_heads": [3, 6, 12, 24], "mlp_ratio": 4, "window_size": 8, "posmlp_dim": 32, "decoder_depth": 2}"#;
        let large = r#"{"encoder": "swin", "img_size": 256, "patch_size": 4, "stride": 16, "embed_dim": 192, "depths": [2, 2, 18, 2],
            "num_heads": [6, 12, 24, 48], "mlp_ratio": 4, "window_size": 8, "posmlp_dim": 64, "decoder_depth": 8}"#;
        let vit = r#"{"encoder": "vit", "img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4,
            "decoder_depth": 2}"#;
        assert_eq!([pvt, swin, large, vit].map(parameters), [28_522_560, 35_774_346, 223_698_612, 92_742_144]);
    }
}
