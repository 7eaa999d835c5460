//! `model.xvit`: X-ViT (arXiv 2205.13805; UFO-ViT, 2109.14382): XCiT's stem, learned positions, XNorm blocks, XNorm class blocks, a head.
//!
//! `t = stem(x) + pos_embed`, blocks over the patches, `c = cls_token`, `c ← class block(t, c)`, `logits = head(norm c)`. Only `pos_embed`
//! depends on the image size.
//!
//! Backward: the parts in turn; every class block gives the patches a gradient.

use crate::attention::xnorm;
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::{elementwise, reduce, rows};
use crate::nn::batch_norm::Updates;
use crate::nn::{ConvStem, Init, LayerNorm, Layout, Linear, Names, Param, Params, Stats, conv_stem};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

use super::xcit::{gain_start, sample_sizes};
use super::xcit_block::{self, Block, Mixing};
use super::xvit_class::{self, ClassBlock};

/// The network.
#[derive(Clone, Debug)]
pub struct Xvit {
    stem: ConvStem,
    positions: Param,
    token: Param,
    blocks: Vec<Block>,
    class_blocks: Vec<ClassBlock>,
    norm: LayerNorm,
    head: Option<Linear>,
    /// Channels, rows and columns of the images.
    image: [usize; 3],
    dim: usize,
}

/// What [`Xvit::backward`] needs.
pub struct Saved<T: Float> {
    stem: conv_stem::Saved<T>,
    blocks: Vec<xcit_block::Saved<T>>,
    class_blocks: Vec<xvit_class::Saved<T>>,
    /// The class tokens before and after the norm.
    class: [Tensor<T>; 2],
    stats: Stats<T>,
    patches: usize,
}

impl<T: Float> Saved<T> {
    /// Takes the running statistics after the call: none in evaluation.
    pub fn take_updates(&mut self) -> Updates<T> {
        let mut updates = self.stem.take_updates();
        updates.extend(self.blocks.iter_mut().flat_map(xcit_block::Saved::take_updates));
        updates
    }
}

impl Xvit {
    /// Registers the parameters from the keys of `model.xvit`.
    pub fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let (depth, classes) = (config.usize("depth")?, config.usize_or("num_classes", 1000)?);
        let (stem, dim) = (conv_stem::Settings::from_config(config)?, config.positive("embed_dim")?);
        let image = [config.positive("img_height")?, config.positive("img_width")?];
        let [h, w] = stem.grid(image)?;
        let start = config.bool_or("layer_scale", true)?.then(|| gain_start(depth));
        let mixing = Mixing::XNorm(xnorm::Settings::from_config(config, "embed_dim")?);
        let block = xcit_block::Settings::from_config(config, mixing, start)?;
        let class = xvit_class::Settings { layer_scale: start, ..xvit_class::Settings::from_config(config, "embed_dim")? };
        let chans = stem.chans;
        let stem = ConvStem::new(names.at("patch_embed"), stem)?;
        let positions = names.param("pos_embed", crate::tensor::Shape::try_new(&[1, h * w, dim])?, Init::NORMAL_02);
        let token = names.param("cls_token", [1, 1, dim], Init::NORMAL_02);
        let blocks = (0..depth).map(|i| Block::new(&mut names.at(format!("blocks.{i}")), block)).collect::<Result<_>>()?;
        let count = config.usize_or("cls_attn_layers", 2)?;
        let class_blocks =
            (0..count).map(|i| ClassBlock::new(&mut names.at(format!("cls_attn_blocks.{i}")), class)).collect::<Result<_>>()?;
        let norm = LayerNorm::new(names.at("norm"), dim, block.ln_eps);
        let head = (classes > 0).then(|| Linear::new(names.at("head"), dim, classes, true, Init::NORMAL_02));
        Ok(Xvit { stem, positions, token, blocks, class_blocks, norm, head, image: [chans, image[0], image[1]], dim })
    }

    /// Logits `[B, classes]`, or the class vector `[B, C]` without a head, of `[B, in, H, W]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, training: bool) -> Result<(Tensor<T>, Saved<T>)> {
        let [b, chans, h, w] = image.dims("input `x`")?;
        if [chans, h, w] != self.image {
            let [chans, h, w] = self.image;
            return Err(Error::shape("input `x`", format!("[batch, {chans}, {h}, {w}]"), image.shape()));
        }
        let (mut x, map, stem) = self.stem.forward(p, image, training)?;
        rows::add_table(x.data_mut(), p.get(self.positions));
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (y, saved) = block.forward(p, x, map, training)?;
            blocks.push(saved);
            x = y;
        }
        let mut class = Tensor::scratch([b, 1, self.dim]);
        class.data_mut().chunks_exact_mut(self.dim).for_each(|row| row.copy_from_slice(p.get(self.token)));
        let mut class_blocks = Vec::with_capacity(self.class_blocks.len());
        for block in &self.class_blocks {
            let (y, saved) = block.forward(p, &x, &class)?;
            class_blocks.push(saved);
            class = y;
        }
        let (normed, stats) = self.norm.forward(p, &class)?;
        let normed = normed.reshape([b, self.dim])?;
        let logits = self.head.as_ref().map_or(Ok(normed.clone()), |head| head.forward(p, &normed))?;
        Ok((logits, Saved { stem, blocks, class_blocks, class: [class, normed], stats, patches: map[0] * map[1] }))
    }

    /// The gradient of the images.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let Saved { stem, blocks, class_blocks, class: [class, normed], stats, patches } = saved;
        let (b, c) = (class.shape()[0], self.dim);
        let d_normed = self.head.as_ref().map_or(Ok(dy.clone()), |head| head.backward(p, g, &normed, dy))?;
        let mut d_class = self.norm.backward(p, g, &class, &stats, &d_normed.reshape([b, 1, c])?, None)?;
        let mut d = Tensor::zeros([b, patches, c]);
        for (block, saved) in self.class_blocks.iter().zip(class_blocks).rev() {
            d_class = block.backward(p, g, saved, &mut d, &d_class)?;
        }
        for row in d_class.data().chunks_exact(c) {
            elementwise::add(g.get_mut(self.token), row);
        }
        for (block, saved) in self.blocks.iter().zip(blocks).rev() {
            d = block.backward(p, g, saved, &d)?;
        }
        reduce::add_column_sums(g.get_mut(self.positions), d.data());
        self.stem.backward(p, g, stem, &d)
    }
}

/// `model.xvit`.
pub struct ModelXvit;

impl Operation for ModelXvit {
    const NAME: &'static str = "model.xvit";
    const PAPER: &'static str = "2205.13805 X-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        xnorm::sample_settings(rng, &mut config);
        sample_sizes(rng, &mut config);
        let patch = config.usize("patch_size").unwrap_or(16);
        config.set("img_height", rng.between(patch + 1, 2 * patch + 2)).set("img_width", rng.between(patch + 1, patch + 3));
        config.set("embed_dim", rng.between(8, 12)).set("lpi", rng.pick(&["xcit", "conv_bn_gelu"])).set("layer_scale", rng.chance(0.5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let batch = draw.size("batch", 2, 3);
        draw.normal("x", [batch, config.positive("in_chans")?, config.positive("img_height")?, config.positive("img_width")?]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (config, x) = (run.config(), run.input("x")?);
        let training = config.bool_or("training", false)?;
        let (model, layout) = Layout::build(|names| Xvit::new(names, config))?;
        let p = run.params(&layout)?;
        let (logits, mut saved) = model.forward(&p, &x, training)?;
        run.output("logits", &logits);
        let updates = saved.take_updates();
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let dx = model.backward(&p, &mut g, saved, &run.cotangent("logits", logits.shape())?)?;
            run.grad_input("x", &dx);
            run.grad_params(&g);
        }
        run.after_buffers(&layout, updates);
        Ok(())
    }
}
