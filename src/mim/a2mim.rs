//! `mim.a2mim`: A²MIM (arXiv 2205.13943): masked image modeling for ViTs and CNNs alike.
//!
//! Masked patches of the image are painted with its mean colour ([`mean_fill`]); inside the encoder a learned token is added at their places
//! to an intermediate feature map ([`MaskToken`]); a convolution and a pixel shuffle paint every pixel, the loss is [`A2mimLoss`] against
//! the image as it was. The encoder is a ViT with BEiT's blocks, or a ResNet, which runs densely over the whole map.
//!
//! Training masks square cells of `mask_patch_size` pixels ([`CoarseMask`]). Batch norms use the batch in a training step, their running
//! statistics for pictures and features; of a ResNet the mask token learns at a tenth of the rate.
//!
//! Backward: loss → pixels → encoder, through the mask token. The image is data.

use std::sync::Arc;

use super::a2mim_loss::{A2mimLoss, sample_loss};
use super::a2mim_paint::{MaskToken, PixelMask, mean_fill};
use super::mask::{CoarseMask, read_mask};
use super::pixels::hidden_pixels;
use super::{MaskedModel, Reconstruction};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::{elementwise, reduce, rows};
use crate::model::beit::{with_class_token, with_class_token_backward, without_class_token, without_class_token_backward};
use crate::model::beit_block::{self, Block, a2mim_settings};
use crate::model::network::weight_init;
use crate::model::resnet::{self, Trunk};
use crate::model::swin_ops::mean_tokens;
use crate::nn::batch_norm::Updates;
use crate::nn::drop_path::DropPath;
use crate::nn::{Batch, Entry, Loss, Objective, StepKey};
use crate::nn::{Conv2d, ConvSettings, Init, LayerNorm, Layout, Names, Param, Params, PatchEmbed, Stats, patch_embed};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// Where the mask stands: which cells are masked, and their rows and columns.
#[derive(Clone, Copy)]
struct Cells<'a> {
    hidden: &'a [bool],
    size: [usize; 2],
}

impl Cells<'_> {
    fn expect(&self, size: [usize; 2]) -> Result<()> {
        if self.size == size { Ok(()) } else { Err(Error::shape("mask", format!("[batch, {}, {}]", size[0], size[1]), self.size)) }
    }
}

/// The mask token on its way into the encoder: in front of which stage or block, and at which cells.
#[derive(Clone, Copy)]
struct Paint<'a> {
    token: &'a MaskToken,
    layer: usize,
    cells: Cells<'a>,
}

/// The ViT: `patch_embed.projection`, `cls_token`, `pos_embed`, `layers.{i}`, `ln1`, with the mask token in front of a layer.
struct Vit {
    embed: PatchEmbed,
    class: Param,
    positions: Param,
    blocks: Vec<Block>,
    norm: Option<LayerNorm>,
}

struct VitSaved<T: Float> {
    embed: patch_embed::Saved<T>,
    /// What the mask token was put into.
    painted: Option<Tensor<T>>,
    blocks: Vec<beit_block::Saved<T>>,
    last: Option<(Tensor<T>, Stats<T>)>,
}

/// The network in front of the neck.
enum Encoder {
    Vit(Vit),
    ResNet { trunk: Trunk, training: bool },
}

enum EncoderSaved<T: Float> {
    Vit(VitSaved<T>),
    ResNet { trunk: resnet::Saved<T>, painted: Option<Tensor<T>> },
}

impl Vit {
    fn new(names: &mut Names, config: &Config, image: usize, chans: usize) -> Result<Self> {
        let (patch, dim) = (config.positive("patch_size")?, config.positive("embed_dim")?);
        let fan_in = chans.saturating_mul(patch.saturating_mul(patch));
        let embed = PatchEmbed::named(names.at("patch_embed"), "projection", [image; 2], patch, chans, dim, None, Init::FanIn(fan_in))?;
        let grid = embed.grid();
        let class = names.param("cls_token", [1, 1, dim], Init::NORMAL_02);
        let positions = names.param("pos_embed", [1, 1 + grid[0] * grid[1], dim], Init::NORMAL_02);
        let settings = a2mim_settings(config, dim, grid)?;
        let depth = config.usize("depth")?;
        let block = |i| {
            let drop_path = DropPath::linear(settings.drop_path, i, depth);
            Block::new(&mut names.at(format!("layers.{i}")), beit_block::Settings { drop_path, ..settings })
        };
        let blocks = (0..depth).map(block).collect::<Result<Vec<_>>>()?;
        let norm = config.bool_or("final_norm", true)?.then(|| LayerNorm::new(names.at("ln1"), dim, 1e-6));
        Ok(Vit { embed, class, positions, blocks, norm })
    }

    /// The map of `image`; whole images without `paint`.
    fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, paint: Option<Paint>) -> Result<(Tensor<T>, VitSaved<T>)> {
        let grid @ [h, w] = self.embed.grid();
        paint.map_or(Ok(()), |paint| paint.cells.expect(grid))?;
        let at = |layer: usize| paint.filter(|paint| paint.layer == layer);
        let (mut x, embed) = self.embed.forward(p, image, None)?;
        let mut painted = None;
        if let Some(paint) = at(0) {
            let y = paint.token.forward(p, &x, paint.cells.hidden)?;
            painted = Some(std::mem::replace(&mut x, y));
        }
        let mut x = with_class_token(p, self.class, &x)?;
        rows::add_table(x.data_mut(), p.get(self.positions));
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (i, block) in self.blocks.iter().enumerate() {
            if let Some(paint) = at(i + 1) {
                let y = paint.token.forward(p, &x, paint.cells.hidden)?;
                painted = Some(std::mem::replace(&mut x, y));
            }
            let (y, saved) = block.forward(p, &x, None)?;
            blocks.push(saved);
            x = y;
            p.show(format!("blocks.{i}"), &x);
        }
        let (y, last) = match &self.norm {
            None => (x, None),
            Some(norm) => {
                let (y, stats) = norm.forward(p, &x)?;
                (y, Some((x, stats)))
            }
        };
        let patches = without_class_token(&y)?;
        let [b, _, c] = patches.dims("patches")?;
        Ok((patches.reshape([b, h, w, c])?, VitSaved { embed, painted, blocks, last }))
    }

    fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: VitSaved<T>, paint: Paint, d_map: &Tensor<T>) -> Result<()> {
        let Paint { token, layer, cells } = paint;
        let VitSaved { embed, painted, blocks, last } = saved;
        let [b, h, w, c] = d_map.dims("gradient of the map")?;
        let mut d = without_class_token_backward(&d_map.reshape([b, h * w, c])?)?;
        if let (Some(norm), Some((x, stats))) = (&self.norm, last) {
            d = norm.backward(p, g, &x, &stats, &d, None)?;
        }
        for (i, (block, saved)) in self.blocks.iter().zip(blocks).enumerate().rev() {
            d = block.backward(p, g, saved, None, None, &d)?;
            if let (Some(x), true) = (&painted, layer == i + 1) {
                d = token.backward(p, g, x, cells.hidden, &d)?;
            }
        }
        reduce::add_column_sums(g.get_mut(self.positions), d.data());
        let mut d = with_class_token_backward(g, self.class, &d)?;
        if let (Some(x), 0) = (&painted, layer) {
            d = token.backward(p, g, x, cells.hidden, &d)?;
        }
        self.embed.backward_params(p, g, &embed, &d)?;
        Ok(())
    }
}

/// The network, its loss and how it masks.
pub struct A2mim {
    layout: Arc<Layout>,
    encoder: Encoder,
    token: MaskToken,
    /// The stage or block in front of which the mask token stands.
    layer: usize,
    neck: Conv2d,
    stride: usize,
    loss: A2mimLoss,
    fill: bool,
    residual: bool,
    image: usize,
    chans: usize,
    /// Pixels per side of a cell where the mask token is put, and how training masks.
    cell: usize,
    masks: Option<CoarseMask>,
}

/// What [`A2mim::backward`] needs, and the prediction.
pub struct Saved<T: Float> {
    encoder: EncoderSaved<T>,
    map: Tensor<T>,
    hidden: Vec<bool>,
    cells: [usize; 2],
    /// The gradient of the loss.
    d_pred: Tensor<T>,
    /// `[B, C, S, S]`.
    pub pred: Tensor<T>,
}

impl<T: Float> Saved<T> {
    /// Takes the running statistics after the call.
    fn take_updates(&mut self) -> Updates<T> {
        match &mut self.encoder {
            EncoderSaved::Vit(_) => Updates::new(),
            EncoderSaved::ResNet { trunk, .. } => trunk.take_updates(),
        }
    }
}

impl A2mim {
    /// The network from the keys of `mim.a2mim`. For training also `mask_patch_size` and `mask_ratio` (0.6).
    pub fn new(config: &Config) -> Result<Self> {
        let (image, chans, stride) = (config.positive("img_size")?, config.positive("in_chans")?, config.positive("encoder_stride")?);
        let (layer, kernel) = (config.usize("mask_layer")?, config.usize_or("kernel_size", 1)?);
        if kernel % 2 == 0 {
            return Err(Error::config("kernel_size", format!("expected an odd number, found {kernel}")));
        }
        let outputs = stride.checked_mul(stride).and_then(|r| r.checked_mul(chans)).filter(|&n| n < 1 << 24);
        let outputs = outputs.ok_or_else(|| Error::config("encoder_stride", format!("expected a smaller number, found {stride}")))?;
        let below = |limit: usize, what: &str| match layer < limit {
            true => Ok(()),
            false => Err(Error::config("mask_layer", format!("expected less than {limit} {what}, found {layer}"))),
        };
        let build = |names: &mut Names| {
            let mut backbone = names.at("backbone");
            let (encoder, width, features, cell) = if config.choice("encoder", &["vit", "resnet"])? == "vit" {
                let vit = Vit::new(&mut backbone, config, image, chans)?;
                below(vit.blocks.len(), "blocks")?;
                let (dim, patch) = (config.positive("embed_dim")?, config.positive("patch_size")?);
                (Encoder::Vit(vit), dim, dim, patch)
            } else {
                let settings = resnet::settings(config)?;
                let trunk = Trunk::new(&mut backbone, &settings)?;
                below(settings.layers.len(), "stages")?;
                let width = if layer == 0 { settings.stem } else { settings.widths[layer - 1] };
                let (outputs, shrink) = (trunk.outputs(), settings.strides.iter().take(layer).fold(4usize, |s, &k| s.saturating_mul(k)));
                (Encoder::ResNet { trunk, training: config.bool_or("training", true)? }, width, outputs, shrink)
            };
            let token = MaskToken::new(&mut backbone, config, width, matches!(encoder, Encoder::ResNet { .. }))?;
            let settings = ConvSettings { padding: [kernel / 2; 2], ..ConvSettings::new(features, outputs, kernel) };
            let neck = Conv2d::new(names.at("neck.decoder_pred.0"), settings, Init::NORMAL_02)?;
            Ok((encoder, token, neck, cell))
        };
        let ((encoder, token, neck, cell), layout) = Layout::build(build)?;
        let layout = weight_init(layout, config)?;
        let fill = config.str_or("fill", "mean")?;
        if !["mean", "none"].contains(&fill) {
            return Err(Error::config("fill", format!("expected \"mean\" or \"none\", found \"{fill}\"")));
        }
        let (loss, residual) = (A2mimLoss::from_config(config)?, config.bool_or("residual", false)?);
        let masks = match config.get("mask_patch_size") {
            None => None,
            Some(_) => Some(CoarseMask::new(image, config.positive("mask_patch_size")?, cell, config.f64_or("mask_ratio", 0.6)?)?),
        };
        Ok(A2mim { layout, encoder, token, layer, neck, stride, loss, fill: fill == "mean", residual, image, chans, cell, masks })
    }

    /// Whether batch norms use the batch in a training step.
    fn training(&self) -> bool {
        matches!(self.encoder, Encoder::ResNet { training: true, .. })
    }

    /// The loss of `image` `[B, C, S, S]` with the cells `hidden` `[B, h, w]`; the prediction is in what is saved. With `training`, batch
    /// norms use the batch.
    pub fn forward<T: Float>(
        &self,
        p: &Params<T>,
        image: &Tensor<T>,
        hidden: &[bool],
        cells: [usize; 3],
        training: bool,
    ) -> Result<(T, Saved<T>)> {
        let dims @ [b, _, _, _] = image.dims("image")?;
        image.expect_shape("image", [b, self.chans, self.image, self.image])?;
        let mask = PixelMask::new(hidden, cells, dims)?;
        let x = if self.fill { mean_fill(image, &mask)? } else { image.clone() };
        let at = Cells { hidden, size: [cells[1], cells[2]] };
        let (map, encoder) = match &self.encoder {
            Encoder::Vit(vit) => {
                let (map, saved) = vit.forward(p, &x, Some(Paint { token: &self.token, layer: self.layer, cells: at }))?;
                (map, EncoderSaved::Vit(saved))
            }
            Encoder::ResNet { trunk, .. } => {
                let mut painted = None;
                let (map, trunk) = trunk.forward_with(p, &x, training, |stage, x| {
                    if stage != self.layer {
                        return Ok(x);
                    }
                    let [b, h, w, c] = x.dims("feature map")?;
                    at.expect([h, w])?;
                    let flat = x.reshape([b, h * w, c])?;
                    let y = self.token.forward(p, &flat, hidden)?.reshape([b, h, w, c])?;
                    painted = Some(flat);
                    Ok(y)
                })?;
                (map, EncoderSaved::ResNet { trunk, painted })
            }
        };
        let z = self.neck.forward(p, &map)?;
        let mut pred = shuffle(&z, self.stride, self.chans)?;
        image.expect_shape("image", pred.shape())?;
        if self.residual {
            let plane = self.image * self.image;
            for (pred, image) in pred.data_mut().chunks_exact_mut(plane).zip(image.data().chunks_exact(plane)) {
                let mean = T::from_f64(image.iter().fold(0.0, |sum, x| sum + x.to_f64()) / plane as f64);
                pred.iter_mut().for_each(|x| *x += mean);
            }
        }
        let (loss, d_pred) = self.loss.run(&pred, image, hidden, cells)?;
        Ok((loss, Saved { encoder, map, hidden: hidden.to_vec(), cells: at.size, d_pred, pred }))
    }

    /// Adds the gradients of the parameters, for the gradient of the loss and, where there is one, a further gradient of `pred`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_loss: T,
        d_pred_too: Option<&Tensor<T>>,
    ) -> Result<()> {
        let Saved { encoder, map, hidden, cells, mut d_pred, .. } = saved;
        d_pred.data_mut().iter_mut().for_each(|x| *x *= d_loss);
        if let Some(more) = d_pred_too {
            more.expect_shape("gradient of pred", d_pred.shape())?;
            elementwise::add(d_pred.data_mut(), more.data());
        }
        let d_map = self.neck.backward(p, g, &map, &unshuffle(&d_pred, self.stride)?)?;
        let at = Cells { hidden: &hidden, size: cells };
        match (&self.encoder, encoder) {
            (Encoder::Vit(vit), EncoderSaved::Vit(saved)) => {
                vit.backward(p, g, saved, Paint { token: &self.token, layer: self.layer, cells: at }, &d_map)
            }
            (Encoder::ResNet { trunk, .. }, EncoderSaved::ResNet { trunk: saved, painted }) => {
                trunk.backward_with(p, g, saved, d_map, |g, stage, d| match &painted {
                    Some(x) if stage == self.layer => {
                        let d_flat = d.reshape(x.shape())?;
                        self.token.backward(p, g, x, &hidden, &d_flat)?.reshape(d.shape())
                    }
                    _ => Ok(d),
                })?;
                Ok(())
            }
            _ => unreachable!("an encoder is handed what it saved"),
        }
    }
}

impl A2mim {
    /// The masks of a training step, and their shape.
    fn draw(&self, images: &Tensor<f32>, key: StepKey) -> Result<(Vec<bool>, [usize; 3])> {
        let [batch, ..] = images.dims::<4>("images")?;
        let masks = self.masks.ok_or_else(|| Error::config("mask_patch_size", "missing; training needs the side of a masked cell"))?;
        Ok((masks.draw(batch, key), [batch, masks.side(), masks.side()]))
    }
}

impl Objective for A2mim {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn image_shape(&self) -> (usize, usize) {
        (self.image, self.chans)
    }

    fn loss(&self, params: &Params<f32>, grads: Option<&mut Params<f32>>, batch: Batch) -> Result<Loss> {
        let (hidden, cells) = self.draw(batch.images, batch.key)?;
        let (value, mut saved) = self.forward(params, batch.images, &hidden, cells, self.training())?;
        let updates = saved.take_updates();
        if let Some(grads) = grads {
            self.backward(params, grads, saved, 1.0, None)?;
        }
        Ok(Loss { value, updates })
    }

    fn rate(&self, entry: &Entry) -> f64 {
        if matches!(self.encoder, Encoder::ResNet { .. }) && entry.name.ends_with(".mask_token") { 0.1 } else { 1.0 }
    }
}

impl MaskedModel for A2mim {
    fn reconstruct(&self, params: &Params<f32>, images: &Tensor<f32>, key: StepKey) -> Result<Reconstruction> {
        let (hidden, cells) = self.draw(images, key)?;
        let (_, saved) = self.forward(params, images, &hidden, cells, false)?;
        Ok(Reconstruction { hidden: hidden_pixels(&hidden, images.dims("images")?, self.cell)?, predicted: saved.pred })
    }

    fn features(&self, params: &Params<f32>, images: &Tensor<f32>) -> Result<Tensor<f32>> {
        let map = match &self.encoder {
            Encoder::Vit(vit) => vit.forward(params, images, None)?.0,
            Encoder::ResNet { trunk, .. } => trunk.forward(params, images, false)?.0,
        };
        let [b, h, w, c] = map.dims("last map")?;
        mean_tokens(&map.reshape([b, h * w, c])?)
    }
}

/// Pixel shuffle: `y[b, c, r i + p, r j + q] = z[b, i, j, c r² + p r + q]`.
fn shuffle<T: Float>(z: &Tensor<T>, r: usize, c: usize) -> Result<Tensor<T>> {
    let [b, h, w, channels] = z.dims("prediction")?;
    let (height, width) = (h * r, w * r);
    Ok(Tensor::from_fn([b, c, height, width], |i| {
        let (x, y, k, image) = (i % width, i / width % height, i / (width * height) % c, i / (width * height * c));
        z.data()[((image * h + y / r) * w + x / r) * channels + (k * r + y % r) * r + x % r]
    }))
}

/// The adjoint of [`shuffle`].
fn unshuffle<T: Float>(y: &Tensor<T>, r: usize) -> Result<Tensor<T>> {
    let [b, c, height, width] = y.dims("gradient of the prediction")?;
    let (h, w, channels) = (height / r, width / r, c * r * r);
    Ok(Tensor::from_fn([b, h, w, channels], |i| {
        let (k, j, i, image) = (i % channels, i / channels % w, i / (channels * w) % h, i / (channels * w * h));
        let (k, p, q) = (k / (r * r), k / r % r, k % r);
        y.data()[((image * c + k) * height + i * r + p) * width + j * r + q]
    }))
}

/// `mim.a2mim`.
pub struct MimA2mim;

impl Operation for MimA2mim {
    const NAME: &'static str = "mim.a2mim";
    const PAPER: &'static str = "2205.13943 A2MIM";
    const DATA: &'static [&'static str] = &["image"];

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_loss(rng, &mut config);
        let vit = rng.chance(0.6);
        config.set("mask_mode", rng.pick(&["learnable", "learnable", "zero", "randn"])).set("replace", rng.chance(0.3));
        config.set("mask_gamma", rng.chance(0.5)).set("detach", rng.chance(0.1)).set("fill", rng.pick(&["mean", "none"]));
        config.set("in_chans", rng.between(1, 3)).set("kernel_size", [1, 3][rng.below(2)]).set("residual", rng.chance(0.3));
        if vit {
            let (patch, heads, depth) = (rng.between(1, 4), rng.between(1, 2), rng.between(1, 2));
            config.set("encoder", "vit").set("patch_size", patch).set("encoder_stride", patch).set("img_size", patch * rng.between(1, 3));
            config.set("embed_dim", heads * rng.between(2, 3)).set("depth", depth).set("num_heads", heads);
            config.set("mlp_hidden", rng.between(1, 8)).set("mask_layer", rng.below(depth)).set("training", true);
            for key in ["rel_pos_bias", "layer_scale", "final_norm"] {
                config.set(key, rng.chance(0.5));
            }
        } else {
            let (stages, basic, training) = (rng.between(1, 2), rng.chance(0.5), rng.chance(0.4));
            let strides: Vec<usize> = (0..stages).map(|i| if i == 0 { 1 } else { rng.between(1, 2) }).collect();
            let shrink = 4 * strides.iter().product::<usize>();
            config
                .set("encoder", "resnet")
                .set("encoder_stride", shrink)
                .set("img_size", shrink * if training { 2 } else { rng.between(1, 2) });
            config.set("block", if basic { "basic" } else { "bottleneck" }).set("expansion", if basic { 1 } else { 2 });
            config.set("layers", vec![1; stages]).set("strides", strides).set("stem_channels", rng.between(1, 3));
            config.set("base_channels", rng.between(1, 2)).set("training", training).set("mask_layer", rng.below(stages));
        }
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (image, layer) = (config.positive("img_size")?, config.usize("mask_layer")?);
        let batch = draw.size("batch", 2, 3);
        let side = if config.choice("encoder", &["vit", "resnet"])? == "vit" {
            image / config.positive("patch_size")?
        } else {
            image / (4 * config.usizes("strides")?.iter().take(layer).product::<usize>()).max(1)
        };
        draw.normal("image", [batch, config.positive("in_chans")?, image, image]);
        let mask = (0..batch * side * side).map(|_| i64::from(draw.rng.chance(0.6))).collect();
        draw.ints("mask", [batch, side, side], mask)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let model = A2mim::new(run.config())?;
        let p = run.params(&model.layout)?;
        let (image, mask) = (run.input("image")?, run.ints("mask")?);
        let cells = mask.shape.dims("mask")?;
        let hidden = read_mask(mask, cells)?;
        let (loss, mut saved) = model.forward(&p, &image, &hidden, cells, model.training())?;
        let updates = saved.take_updates();
        run.output("loss", &Tensor::scalar(loss));
        run.output("pred", &saved.pred);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let d_loss = run.cotangent("loss", [].into())?.data()[0];
            let d_pred = run.cotangent("pred", saved.pred.shape())?;
            model.backward(&p, &mut g, saved, d_loss, Some(&d_pred))?;
            run.grad_params(&g);
        }
        run.after_buffers(&model.layout, updates);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIT: &str = r#"{"encoder": "vit", "img_size": 16, "patch_size": 2, "in_chans": 3, "embed_dim": 8, "depth": 2, "num_heads": 2,
        "mlp_hidden": 16, "mask_layer": 1, "encoder_stride": 2, "replace": false, "mask_patch_size": 4, "mask_ratio": 0.5,
        "fft_weight": 0.1, "fft_focal": true, "fft_unmask_replace": "mixed"}"#;
    const RESNET: &str = r#"{"encoder": "resnet", "img_size": 32, "in_chans": 3, "block": "basic", "expansion": 1, "layers": [1, 1],
        "strides": [1, 2], "stem_channels": 4, "base_channels": 4, "mask_layer": 1, "encoder_stride": 8, "replace": false,
        "mask_gamma": true, "mask_patch_size": 8, "mask_ratio": 0.5, "loss_mode": "focal_l1_loss", "fft_weight": 0.5, "fft_focal": true,
        "fft_unmask_weight": 1e-3, "fft_unmask_replace": "mixed"}"#;

    /// What the trainer, the pictures and the probe rely on.
    #[test]
    fn objective() {
        for json in [VIT, RESNET] {
            let model = A2mim::new(&Config::parse(json).unwrap()).unwrap();
            crate::mim::tests::check_objective(&model, 0.5, 8);
        }
    }

    /// A step of a ResNet hands out new running statistics; features depend on them and on no other image of the batch.
    #[test]
    fn running_statistics() {
        let model = A2mim::new(&Config::parse(RESNET).unwrap()).unwrap();
        let mut p = Params::init(&model.layout, 1);
        let mut rng = Rng::new(1, crate::tensor::random::Purpose::Case, 0, 0);
        let images = Tensor::<f32>::from_fn([2, 3, 32, 32], |_| rng.normal() as f32);
        let one = Tensor::new([1, 3, 32, 32], &images.data()[..3 * 32 * 32]).unwrap();
        let before = model.features(&p, &images).unwrap();
        assert_eq!(model.features(&p, &one).unwrap().data(), &before.data()[..8]);
        let batch = Batch { images: &images, labels: &[], second: None, key: StepKey { seed: 1, step: 0 } };
        let updates = model.loss(&p, None, batch).unwrap().updates;
        assert!(!updates.is_empty());
        p.update(&updates);
        assert_ne!(model.features(&p, &images).unwrap().data(), before.data());
        let rate = |name: &str| model.rate(model.layout.params().iter().find(|e| e.name == name).unwrap());
        assert_eq!((rate("backbone.mask_token"), rate("backbone.conv1.weight")), (0.1, 1.0));
    }
}
