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
use crate::nn::{ConvStem, Init, LayerNorm, Layout, Linear, Names, Param, Params, Pass, Stats, conv_stem};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

use super::network::{Built, Classifier};
use super::stack::{self, Kept};
use super::vit::resize_pos_embed;
use super::weights::{Key, Rules};
use super::xcit::{gain_start, sample_sizes, stem_macs};
use super::xcit_block::{self, Block, Mixing};
use super::xvit_class::{self, ClassBlock};
use super::zoo::{Eval, Family, Variant};

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
    blocks: Vec<Kept<T, xcit_block::Saved<T>>>,
    class_blocks: Vec<Kept<T, xvit_class::Saved<T>>>,
    /// The patches, where the class blocks run once more.
    x: Option<Tensor<T>>,
    /// The class tokens before and after the norm.
    class: [Tensor<T>; 2],
    stats: Stats<T>,
    map: [usize; 2],
    training: bool,
    updates: Updates<T>,
}

impl<T: Float> Saved<T> {
    /// Takes the running statistics after the call: none in evaluation.
    pub fn take_updates(&mut self) -> Updates<T> {
        std::mem::take(&mut self.updates)
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
        let (mut x, map, mut stem) = self.stem.forward(p, image, training)?;
        let mut updates = stem.take_updates();
        rows::add_table(x.data_mut(), p.get(self.positions));
        let (x, blocks) = stack::forward(p, &self.blocks, x, |block, _, x| {
            let (y, mut saved) = block.forward(p, x, map, training)?;
            updates.extend(saved.take_updates());
            Ok((y, saved))
        })?;
        p.show("tokens", &x);
        let mut class = Tensor::scratch([b, 1, self.dim]);
        class.data_mut().chunks_exact_mut(self.dim).for_each(|row| row.copy_from_slice(p.get(self.token)));
        let (class, class_blocks) = stack::forward(p, &self.class_blocks, class, |block, _, class| block.forward(p, &x, &class))?;
        let (normed, stats) = self.norm.forward(p, &class)?;
        let normed = normed.reshape([b, self.dim])?;
        p.show("pooled", &normed);
        let logits = self.head.as_ref().map_or(Ok(normed.clone()), |head| head.forward(p, &normed))?;
        let x = matches!(p.pass(), Pass::Train { recompute: true, .. }).then_some(x);
        Ok((logits, Saved { stem, blocks, class_blocks, x, class: [class, normed], stats, map, training, updates }))
    }

    /// Adds the gradients of the parameters; the gradient of the images if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        dy: &Tensor<T>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let Saved { stem, blocks, class_blocks, x, class: [class, normed], stats, map, training, .. } = saved;
        let (b, c) = (class.shape()[0], self.dim);
        let d_normed = self.head.as_ref().map_or(Ok(dy.clone()), |head| head.backward(p, g, &normed, dy))?;
        let d_class = self.norm.backward(p, g, &class, &stats, &d_normed.reshape([b, 1, c])?, None)?;
        let mut d = Tensor::zeros([b, map[0] * map[1], c]);
        let d_class = stack::backward(
            &self.class_blocks,
            class_blocks,
            d_class,
            |block, _, again| block.forward(p, x.as_ref().unwrap_or(&class), &again),
            |block, _, saved, d_class| block.backward(p, g, saved, &mut d, d_class),
        )?;
        for row in d_class.data().chunks_exact(c) {
            elementwise::add(g.get_mut(self.token), row);
        }
        let d = stack::backward(
            &self.blocks,
            blocks,
            d,
            |block, _, x| block.forward(p, x, map, training),
            |block, _, saved, d| block.backward(p, g, saved, d),
        )?;
        reduce::add_column_sums(g.get_mut(self.positions), d.data());
        if want_image {
            return self.stem.backward(p, g, stem, &d).map(Some);
        }
        self.stem.backward_params(p, g, stem, &d)?;
        Ok(None)
    }
}

impl Classifier for Xvit {
    type Saved = Saved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Saved<f32>)> {
        let (logits, saved) = self.forward(p, images, p.training())?;
        Ok((vec![logits], saved))
    }

    fn updates(saved: &mut Saved<f32>) -> Updates<f32> {
        saved.take_updates()
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Saved<f32>, d: &[Tensor<f32>]) -> Result<()> {
        self.backward(p, g, saved, &d[0], false).map(drop)
    }
}

/// Multiply-adds for one image.
fn macs(config: &Config, size: usize) -> Result<f64> {
    let [c, e, heads, depth, layers, classes] =
        ["embed_dim", "attn_dim", "num_heads", "depth", "cls_attn_layers", "num_classes"].map(|key| config.usize(key));
    let (c, e, heads, ratio) = (c? as f64, e? as f64, heads?.max(1) as f64, config.f64("mlp_ratio")?);
    let (stem, map) = stem_macs(config, size)?;
    let n = (map[0] * map[1]) as f64;
    let block = n * (4.0 * c * e + 2.0 * ratio * c * c + 2.0 * e * e / heads + 18.0 * c);
    let class = (n + 1.0) * (2.0 * c * e + e * e / heads) + 2.0 * c * e + e * e / heads + 2.0 * ratio * c * c;
    Ok(stem + depth? as f64 * block + layers? as f64 * class + c * classes? as f64)
}

/// No weights are published: images are prepared as for XCiT, whose recipe it shares.
const fn variant(name: &'static str, config: &'static str, params: usize, gmacs: f64) -> Variant {
    Variant { name, also: &[], config, eval: Eval::IMAGENET.crop(1.0), params: Some(params), gmacs: Some(gmacs) }
}

const TINY: &str = r#"{"embed_dim": 192, "attn_dim": 96, "depth": 24}"#;
const SMALL: &str = r#"{"embed_dim": 384, "attn_dim": 128, "depth": 12}"#;
const MEDIUM: &str = r#"{"embed_dim": 384, "attn_dim": 128, "depth": 24}"#;
const BASE: &str = r#"{"embed_dim": 512, "attn_dim": 128, "depth": 24}"#;
const MICRO: &str = r#"{"patch_size": 8, "embed_dim": 96, "attn_dim": 64, "depth": 4, "cls_attn_layers": 1}"#;

/// X-ViT.
pub static FAMILY: Family = Family {
    op: "model.xvit",
    common: r#"{"patch_size": 16, "in_chans": 3, "num_heads": 4, "mlp_ratio": 4.0, "qkv_bias": true, "cls_attn_layers": 2,
        "kv_norm_axis": "key", "shared_gamma": true, "eps": 1e-12, "lpi": "xcit", "layer_scale": true, "ln_eps": 1e-6, "bn_eps": 1e-5,
        "bn_momentum": 0.1}"#,
    build: |config| Built::new(|names| Xvit::new(names, config)),
    at_size: |config, size| {
        config.set("img_height", size).set("img_width", size);
    },
    macs,
    rules: Rules {
        key: |name| if name.ends_with("num_batches_tracked") { Key::Drop } else { Key::Keep },
        resize: |name, table, wanted, _| if name == "pos_embed" { resize_pos_embed(0, table, wanted) } else { Ok(None) },
        heads: &["head"],
    },
    variants: &[
        variant("xvit_tiny", TINY, 10_217_640, 1.89),
        variant("xvit_small", SMALL, 20_787_792, 3.72),
        variant("xvit_medium", MEDIUM, 37_478_016, 7.00),
        variant("xvit_base", BASE, 63_985_552, 11.95),
        Variant { name: "xvit_micro", also: &[], config: MICRO, eval: Eval::SMALL, params: None, gmacs: None },
    ],
};

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
            if let Some(dx) = model.backward(&p, &mut g, saved, &run.cotangent("logits", logits.shape())?, true)? {
                run.grad_input("x", &dx);
            }
            run.grad_params(&g);
        }
        run.after_buffers(&layout, updates);
        Ok(())
    }
}
