//! `mim.a2mim`: A²MIM (arXiv 2205.13943): masked image modeling for ViTs and CNNs alike.
//!
//! Masked patches of the image are painted with its mean colour ([`mean_fill`]); inside the encoder a learned token is added at their places
//! to an intermediate feature map ([`MaskToken`]); a convolution and a pixel shuffle paint every pixel, the loss is [`A2mimLoss`] against
//! the image as it was. The encoder is a ViT with BEiT's blocks, or a ResNet, which runs densely over the whole map.
//!
//! Backward: loss → pixels → encoder, through the mask token. The image is data.

use std::sync::Arc;

use super::a2mim_loss::{A2mimLoss, sample_loss};
use super::a2mim_paint::{MaskToken, PixelMask, mean_fill};
use super::mask::read_mask;
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::{elementwise, reduce, rows};
use crate::model::beit::{with_class_token, with_class_token_backward, without_class_token, without_class_token_backward};
use crate::model::beit_block::{self, Block, a2mim_settings};
use crate::model::resnet::{self, Trunk};
use crate::nn::batch_norm::Updates;
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
    painted: Tensor<T>,
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
        let blocks =
            (0..config.usize("depth")?).map(|i| Block::new(&mut names.at(format!("layers.{i}")), settings)).collect::<Result<Vec<_>>>()?;
        let norm = config.bool_or("final_norm", true)?.then(|| LayerNorm::new(names.at("ln1"), dim, 1e-6));
        Ok(Vit { embed, class, positions, blocks, norm })
    }

    fn forward<T: Float>(
        &self,
        p: &Params<T>,
        image: &Tensor<T>,
        token: &MaskToken,
        layer: usize,
        cells: Cells,
    ) -> Result<(Tensor<T>, VitSaved<T>)> {
        let grid @ [h, w] = self.embed.grid();
        cells.expect(grid)?;
        let (mut x, embed) = self.embed.forward(p, image, None)?;
        let mut painted = x.clone();
        if layer == 0 {
            x = token.forward(p, &x, cells.hidden)?;
        }
        let mut x = with_class_token(p, self.class, &x)?;
        rows::add_table(x.data_mut(), p.get(self.positions));
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (i, block) in self.blocks.iter().enumerate() {
            if layer == i + 1 {
                painted = x.clone();
                x = token.forward(p, &x, cells.hidden)?;
            }
            let (y, saved) = block.forward(p, &x, None)?;
            blocks.push(saved);
            x = y;
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

    #[allow(clippy::too_many_arguments)]
    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: VitSaved<T>,
        token: &MaskToken,
        layer: usize,
        cells: Cells,
        d_map: &Tensor<T>,
    ) -> Result<()> {
        let VitSaved { embed, painted, blocks, last } = saved;
        let [b, h, w, c] = d_map.dims("gradient of the map")?;
        let mut d = without_class_token_backward(&d_map.reshape([b, h * w, c])?)?;
        if let (Some(norm), Some((x, stats))) = (&self.norm, last) {
            d = norm.backward(p, g, &x, &stats, &d, None)?;
        }
        for (i, (block, saved)) in self.blocks.iter().zip(blocks).enumerate().rev() {
            d = block.backward(p, g, saved, None, None, &d)?;
            if layer == i + 1 {
                d = token.backward(p, g, &painted, cells.hidden, &d)?;
            }
        }
        reduce::add_column_sums(g.get_mut(self.positions), d.data());
        let mut d = with_class_token_backward(g, self.class, &d)?;
        if layer == 0 {
            d = token.backward(p, g, &painted, cells.hidden, &d)?;
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
    /// The network from the keys of `mim.a2mim`.
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
            let (encoder, width, features) = if config.choice("encoder", &["vit", "resnet"])? == "vit" {
                let vit = Vit::new(&mut backbone, config, image, chans)?;
                below(vit.blocks.len(), "blocks")?;
                let dim = config.positive("embed_dim")?;
                (Encoder::Vit(vit), dim, dim)
            } else {
                let settings = resnet::settings(config)?;
                let trunk = Trunk::new(&mut backbone, &settings)?;
                below(settings.layers.len(), "stages")?;
                let width = if layer == 0 { settings.stem } else { settings.widths[layer - 1] };
                let outputs = trunk.outputs();
                (Encoder::ResNet { trunk, training: config.bool_or("training", true)? }, width, outputs)
            };
            let token = MaskToken::new(&mut backbone, config, width, matches!(encoder, Encoder::ResNet { .. }))?;
            let settings = ConvSettings { padding: [kernel / 2; 2], ..ConvSettings::new(features, outputs, kernel) };
            let neck = Conv2d::new(names.at("neck.decoder_pred.0"), settings, Init::NORMAL_02)?;
            Ok((encoder, token, neck))
        };
        let ((encoder, token, neck), layout) = Layout::build(build)?;
        let fill = config.str_or("fill", "mean")?;
        if !["mean", "none"].contains(&fill) {
            return Err(Error::config("fill", format!("expected \"mean\" or \"none\", found \"{fill}\"")));
        }
        let (loss, residual) = (A2mimLoss::from_config(config)?, config.bool_or("residual", false)?);
        Ok(A2mim { layout, encoder, token, layer, neck, stride, loss, fill: fill == "mean", residual, image, chans })
    }

    /// Names, shapes and initialisation of the parameters.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The loss of `image` `[B, C, S, S]` with the cells `hidden` `[B, h, w]`; the prediction is in what is saved.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, hidden: &[bool], cells: [usize; 3]) -> Result<(T, Saved<T>)> {
        let dims @ [b, _, _, _] = image.dims("image")?;
        image.expect_shape("image", [b, self.chans, self.image, self.image])?;
        let mask = PixelMask::new(hidden, cells, dims)?;
        let x = if self.fill { mean_fill(image, &mask)? } else { image.clone() };
        let at = Cells { hidden, size: [cells[1], cells[2]] };
        let (map, encoder) = match &self.encoder {
            Encoder::Vit(vit) => {
                let (map, saved) = vit.forward(p, &x, &self.token, self.layer, at)?;
                (map, EncoderSaved::Vit(saved))
            }
            Encoder::ResNet { trunk, training } => {
                let mut painted = None;
                let (map, trunk) = trunk.forward_with(p, &x, *training, |stage, x| {
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
            (Encoder::Vit(vit), EncoderSaved::Vit(saved)) => vit.backward(p, g, saved, &self.token, self.layer, at, &d_map),
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
        let (loss, mut saved) = model.forward(&p, &image, &hidden, cells)?;
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
