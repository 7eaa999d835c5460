//! `model.beit`: BEiT (arXiv 2106.08254), a plain ViT with relative position biases; also the encoder of BEiT's and SimMIM's (2111.09886)
//! pre-training.
//!
//! `X₀ = [cls; patches(1 − w) + mask_token·w] (+ pos_embed)`, blocks ([`Block`]), which all get the same bias from `rel_pos_bias`, each has
//! a table of its own, or both; then `norm`. The classifier reads the class token after `norm`, or, without that norm, the mean of the
//! patches after `fc_norm`.

use super::beit_block::{self, BEIT_NAMES, Block};
use super::network::{Built, Classifier};
use super::stack::{self, Kept};
use super::swin_ops::{mean_tokens, mean_tokens_backward};
use super::vit::{resize_pos_embed, token_row};
use super::vit_block::hidden_width;
use super::weights::{Key, Rules};
use super::zoo::{Eval, Family, Variant};
use crate::attention::beit::{self, Biases};
use crate::case::{Config, Draw, Operation, Run};
use crate::data::transform::Normalization;
use crate::error::Result;
use crate::kernel::{elementwise, reduce, rows};
use crate::nn::beit_rel_pos::RelativeTable;
use crate::nn::mask_token::{mix_token, mix_token_backward};
use crate::nn::{Init, LayerNorm, Layout, Linear, Names, Param, Params, Pass, PatchEmbed, Stats, beit_rel_pos_resize, patch_embed};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Shape, Tensor};

/// What an [`Encoder`] is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Rows and columns of the images, in pixels.
    pub image: [usize; 2],
    /// Side of a patch.
    pub patch: usize,
    /// Channels of the images.
    pub chans: usize,
    /// The number of blocks.
    pub depth: usize,
    /// The blocks, but for their tables.
    pub block: beit_block::Settings,
    /// There is a `mask_token`.
    pub mask_token: bool,
    /// Learned absolute positions.
    pub positions: bool,
    /// A relative table per block.
    pub own_tables: bool,
    /// One relative table for all blocks.
    pub shared_table: bool,
    /// A norm follows the blocks.
    pub norm: bool,
    /// Initialisation of the patch embedding.
    pub patch_init: Init,
}

/// The encoder: `patch_embed`, `cls_token`, `mask_token`, `pos_embed`, `rel_pos_bias`, `blocks.{i}`, `norm`.
#[derive(Clone, Debug)]
pub struct Encoder {
    embed: PatchEmbed,
    cls_token: Param,
    mask_token: Option<Param>,
    positions: Option<Param>,
    shared: Option<RelativeTable>,
    blocks: Vec<Block>,
    norm: Option<LayerNorm>,
    dim: usize,
}

/// What [`Encoder::backward`] needs.
pub struct EncoderSaved<T: Float> {
    embed: patch_embed::Saved<T>,
    hidden: Option<Vec<bool>>,
    blocks: Vec<Kept<T, beit_block::Saved<T>>>,
    last: Option<(Tensor<T>, Stats<T>)>,
}

impl Encoder {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: Settings) -> Result<Self> {
        let Settings { image, patch, chans, depth, mut block, .. } = settings;
        let (dim, heads) = (block.attention.dim, block.attention.num_heads);
        let embed = PatchEmbed::new(names.at("patch_embed"), image, patch, chans, dim, None, settings.patch_init)?;
        let grid = embed.grid();
        let token = |names: &mut Names, name| names.param(name, [1, 1, dim], Init::NORMAL_02);
        let cls_token = token(names, "cls_token");
        let mask_token = settings.mask_token.then(|| token(names, "mask_token"));
        let positions = settings.positions.then(|| names.param("pos_embed", [1, 1 + grid[0] * grid[1], dim], Init::NORMAL_02));
        let shared = settings.shared_table.then(|| RelativeTable::new(&mut names.at("rel_pos_bias"), grid, heads)).transpose()?;
        block.attention.window = settings.own_tables.then_some(grid);
        let blocks =
            (0..depth).map(|i| Block::new(&mut names.at(format!("blocks.{i}")), block.at_depth(i, depth))).collect::<Result<_>>()?;
        let norm = settings.norm.then(|| LayerNorm::new(names.at("norm"), dim, block.eps));
        Ok(Encoder { embed, cls_token, mask_token, positions, shared, blocks, norm, dim })
    }

    /// Rows and columns of patches.
    pub fn grid(&self) -> [usize; 2] {
        self.embed.grid()
    }

    /// The width C of the tokens.
    pub fn features(&self) -> usize {
        self.dim
    }

    /// The tokens `[B, 1 + N, C]` after the norm; `hidden` `[B, N]` says where the mask token stands.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, hidden: Option<&[bool]>) -> Result<(Tensor<T>, EncoderSaved<T>)> {
        let (mut patches, embed) = self.embed.forward(p, image, None)?;
        if let (Some(token), Some(hidden)) = (self.mask_token, hidden) {
            mix_token(p, token, &mut patches, hidden)?;
        }
        let mut x = with_class_token(p, self.cls_token, &patches)?;
        drop(patches);
        if let Some(positions) = self.positions {
            rows::add_table(x.data_mut(), p.get(positions));
        }
        let shared = self.shared.map(|table| table.dense(p));
        let (x, blocks) = stack::forward(p, &self.blocks, x, |block, i, x| {
            let run = block.forward(p, &x, shared.as_ref())?;
            p.show(format!("blocks.{i}"), &run.0);
            Ok(run)
        })?;
        let (y, last) = match &self.norm {
            None => (x, None),
            Some(norm) => {
                let (y, stats) = norm.forward(p, &x)?;
                (y, Some((x, stats)))
            }
        };
        p.show("tokens", &y);
        Ok((y, EncoderSaved { embed, hidden: hidden.map(<[bool]>::to_vec), blocks, last }))
    }

    /// [`forward`](Self::forward) of whole images without keeping anything for a backward pass.
    pub fn infer<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<Tensor<T>> {
        Ok(self.forward(&p.run_as(Pass::Infer), image, None)?.0)
    }

    /// Adds the gradients of the parameters; the gradient of the image if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: EncoderSaved<T>,
        dy: &Tensor<T>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let EncoderSaved { embed, hidden, blocks, last } = saved;
        let d = match (&self.norm, last) {
            (Some(norm), Some((x, stats))) => norm.backward(p, g, &x, &stats, dy, None)?,
            _ => dy.clone(),
        };
        let shared = self.shared.map(|table| table.dense(p));
        let mut d_shared = shared.as_ref().map(|shared| Tensor::zeros(shared.shape()));
        let d = stack::backward(
            &self.blocks,
            blocks,
            d,
            |block, _, x| block.forward(p, &x, shared.as_ref()),
            |block, _, saved, d| block.backward(p, g, saved, shared.as_ref(), d_shared.as_mut(), d),
        )?;
        if let (Some(table), Some(d_shared)) = (self.shared, d_shared) {
            table.backward(g, &d_shared);
        }
        if let Some(positions) = self.positions {
            reduce::add_column_sums(g.get_mut(positions), d.data());
        }
        let mut d_patches = with_class_token_backward(g, self.cls_token, &d)?;
        if let (Some(token), Some(hidden)) = (self.mask_token, &hidden) {
            mix_token_backward(g, token, &mut d_patches, hidden)?;
        }
        if want_image {
            Ok(Some(self.embed.backward(p, g, &embed, &d_patches, None)?))
        } else {
            self.embed.backward_params(p, g, &embed, &d_patches)?;
            Ok(None)
        }
    }
}

/// `[B, N, C]` → `[B, 1 + N, C]` with the class token in front.
pub fn with_class_token<T: Float>(p: &Params<T>, token: Param, patches: &Tensor<T>) -> Result<Tensor<T>> {
    let [b, n, c] = patches.dims("patches")?;
    let mut x = Tensor::scratch([b, 1 + n, c]);
    for (out, patches) in x.data_mut().chunks_exact_mut((1 + n) * c).zip(patches.data().chunks_exact((n * c).max(1))) {
        out[..c].copy_from_slice(p.get(token));
        out[c..].copy_from_slice(patches);
    }
    Ok(x)
}

/// Backward of [`with_class_token`]: the gradient of the patches.
pub fn with_class_token_backward<T: Float>(g: &mut Params<T>, token: Param, d: &Tensor<T>) -> Result<Tensor<T>> {
    let [_, _, c] = d.dims("gradient of the tokens")?;
    for image in d.data().chunks_exact((d.shape()[1] * c).max(1)) {
        elementwise::add(g.get_mut(token), &image[..c]);
    }
    without_class_token(d)
}

/// `[B, 1 + N, C]` → `[B, N, C]`.
pub fn without_class_token<T: Float>(x: &Tensor<T>) -> Result<Tensor<T>> {
    let [b, all, c] = x.dims("tokens")?;
    let n = all.saturating_sub(1);
    let mut out = Tensor::scratch([b, n, c]);
    for (out, x) in out.data_mut().chunks_exact_mut((n * c).max(1)).zip(x.data().chunks_exact((all * c).max(1))) {
        out.copy_from_slice(&x[c..]);
    }
    Ok(out)
}

/// Backward of [`without_class_token`].
pub fn without_class_token_backward<T: Float>(d: &Tensor<T>) -> Result<Tensor<T>> {
    let [b, n, c] = d.dims("gradient of the patches")?;
    let mut out = Tensor::zeros([b, 1 + n, c]);
    for (out, d) in out.data_mut().chunks_exact_mut((1 + n) * c).zip(d.data().chunks_exact((n * c).max(1))) {
        out[c..].copy_from_slice(d);
    }
    Ok(out)
}

/// The encoder's settings from the keys that `model.beit` and `mim.beit` share.
pub fn settings(config: &Config, pretraining: bool, norm: bool) -> Result<Settings> {
    let (dim, heads) = (config.positive("dim")?, config.positive("num_heads")?);
    let (patch, chans) = (config.positive("patch_size")?, config.positive("in_chans")?);
    let biases = if config.bool_or("qkv_bias", false)? { Biases::QueryValue } else { Biases::None };
    Ok(Settings {
        image: [config.positive("img_h")?, config.positive("img_w")?],
        patch,
        chans,
        depth: config.usize("depth")?,
        block: beit_block::Settings {
            attention: beit::Settings { biases, ..beit::Settings::new(dim, heads) },
            hidden: hidden_width(dim, config.f64_or("mlp_ratio", 4.0)?)?,
            eps: config.f64_or("ln_eps", 1e-6)?,
            layer_scale: if config.bool("layer_scale")? { Some(config.f64_or("init_scale", 0.1)?) } else { None },
            drop_path: config.f64_or("drop_path_rate", 0.0)?,
            names: BEIT_NAMES,
        },
        mask_token: pretraining,
        positions: config.bool("abs_pos_emb")?,
        own_tables: config.bool("rel_pos_bias")?,
        shared_table: config.bool("shared_rel_pos_bias")?,
        norm,
        // Fine-tuning leaves the convolution to the framework.
        patch_init: if pretraining { Init::NORMAL_02 } else { Init::FanIn(chans.saturating_mul(patch.saturating_mul(patch))) },
    })
}

/// The classifier: the encoder, `fc_norm` with mean pooling, `head`.
#[derive(Clone, Debug)]
pub struct Beit {
    encoder: Encoder,
    fc_norm: Option<LayerNorm>,
    head: Option<Linear>,
}

/// What [`Beit::backward`] needs.
pub struct Saved<T: Float> {
    encoder: EncoderSaved<T>,
    tokens: usize,
    pooled: Tensor<T>,
    normed: Option<(Tensor<T>, Stats<T>)>,
}

impl Beit {
    /// Registers the parameters from the keys of `model.beit`.
    pub fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let (mean, classes) = (config.bool("mean_pooling")?, config.usize("num_classes")?);
        let settings = settings(config, false, !mean)?;
        let encoder = Encoder::new(names, settings)?;
        let fc_norm = mean.then(|| LayerNorm::new(names.at("fc_norm"), encoder.dim, settings.block.eps));
        // The authors shrink the head a thousandfold.
        let head = (classes > 0).then(|| Linear::new(names.at("head"), encoder.dim, classes, true, Init::Normal(2e-5)));
        Ok(Beit { encoder, fc_norm, head })
    }

    /// Logits `[B, classes]`, or the pooled feature `[B, C]` without a head.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let (x, encoder) = self.encoder.forward(p, image, None)?;
        let [_, tokens, _] = x.dims("tokens")?;
        let (pooled, normed) = match &self.fc_norm {
            None => (token_row(&x, 0)?, None),
            Some(norm) => {
                let mean = mean_tokens(&without_class_token(&x)?)?;
                let (y, stats) = norm.forward(p, &mean)?;
                (y, Some((mean, stats)))
            }
        };
        p.show("pooled", &pooled);
        let logits = self.head.as_ref().map_or(Ok(pooled.clone()), |head| head.forward(p, &pooled))?;
        Ok((logits, Saved { encoder, tokens, pooled, normed }))
    }

    /// Adds the gradients of the parameters; the gradient of the image if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        dy: &Tensor<T>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let Saved { encoder, tokens, pooled, normed } = saved;
        let d = self.head.as_ref().map_or(Ok(dy.clone()), |head| head.backward(p, g, &pooled, dy))?;
        let [b, c] = d.dims("gradient of the pooled feature")?;
        let d_tokens = match (&self.fc_norm, &normed) {
            (Some(norm), Some((x, stats))) => {
                let d = norm.backward(p, g, x, stats, &d, None)?;
                without_class_token_backward(&mean_tokens_backward(&d, tokens - 1)?)?
            }
            _ => {
                let mut d_tokens = Tensor::zeros([b, tokens, c]);
                for (out, d) in d_tokens.data_mut().chunks_exact_mut(tokens * c).zip(d.data().chunks_exact(c)) {
                    out[..c].copy_from_slice(d);
                }
                d_tokens
            }
        };
        self.encoder.backward(p, g, encoder, &d_tokens, want_image)
    }
}

impl Classifier for Beit {
    type Saved = Saved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Saved<f32>)> {
        let (logits, saved) = self.forward(p, images)?;
        Ok((vec![logits], saved))
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Saved<f32>, d: &[Tensor<f32>]) -> Result<()> {
        self.backward(p, g, saved, &d[0], false).map(drop)
    }
}

/// Tables of positions for another image size: the relative ones along the authors' geometric grid, the absolute one bicubic.
fn resize(name: &str, table: &Tensor<f32>, wanted: Shape, _: &Config) -> Result<Option<Tensor<f32>>> {
    if name == "pos_embed" {
        return resize_pos_embed(1, table, wanted);
    }
    if !name.ends_with("relative_position_bias_table") {
        return Ok(None);
    }
    // (2s − 1)² pairs of patches and three of the class token.
    let side = |rows: usize| {
        rows.checked_sub(3).map(usize::isqrt).filter(|span| span * span + 3 == rows && span % 2 == 1).map(|span| span.div_ceil(2))
    };
    let ((rows, heads), (wanted_rows, wanted_heads)) = (table.shape().rows_cols(), wanted.rows_cols());
    match (side(rows), side(wanted_rows)) {
        (Some(old), Some(new)) if heads == wanted_heads => beit_rel_pos_resize::resize(table, old, new).map(Some),
        _ => Ok(None),
    }
}

/// Multiply-adds for one image.
fn macs(config: &Config, size: usize) -> Result<f64> {
    let [c, patch, depth, classes] = ["dim", "patch_size", "depth", "num_classes"].map(|key| config.usize(key));
    let (c, patch, ratio) = (c? as f64, patch?.max(1), config.f64("mlp_ratio")?);
    let patches = (size / patch).pow(2) as f64;
    let n = patches + 1.0;
    let block = (4.0 + 2.0 * ratio) * n * c * c + 2.0 * n * n * c;
    Ok(patches * c * (3 * patch * patch) as f64 + depth? as f64 * block + c * classes? as f64)
}

const fn variant(name: &'static str, config: &'static str, eval: Eval, params: usize, gmacs: f64) -> Variant {
    Variant { name, also: &[], config, eval, params: Some(params), gmacs: Some(gmacs) }
}

const HALF: Eval = Eval { normalization: Normalization::HALF, ..Eval::IMAGENET };
const BASE: &str = r#"{"dim": 768, "depth": 12, "num_heads": 12}"#;
/// As in the first version of the paper.
const BASE_V1: &str = r#"{"dim": 768, "depth": 12, "num_heads": 12, "abs_pos_emb": true, "rel_pos_bias": false, "layer_scale": false}"#;
const LARGE: &str = r#"{"dim": 1024, "depth": 24, "num_heads": 16, "init_scale": 1e-5}"#;
const MICRO: &str = r#"{"dim": 144, "depth": 6, "num_heads": 6, "patch_size": 4, "weight_init": "xavier"}"#;

/// BEiT, fine-tuned: a table per block, the mean of the patches.
pub static FAMILY: Family = Family {
    op: "model.beit",
    common: r#"{"patch_size": 16, "in_chans": 3, "mlp_ratio": 4.0, "qkv_bias": true, "abs_pos_emb": false, "rel_pos_bias": true,
        "shared_rel_pos_bias": false, "mean_pooling": true, "layer_scale": true, "ln_eps": 1e-6}"#,
    build: |config| Built::new(|names| Beit::new(names, config)),
    at_size: |config, size| {
        config.set("img_h", size).set("img_w", size);
    },
    macs,
    rules: Rules { key: |name| if name.ends_with("relative_position_index") { Key::Drop } else { Key::Keep }, resize, heads: &["head"] },
    variants: &[
        variant("beit_base_patch16_224", BASE, HALF, 86_530_984, 17.56),
        variant("beit_base_patch16_384", BASE, HALF.at(384).crop(1.0), 86_744_104, 55.48),
        variant("beit_large_patch16_224", LARGE, HALF, 304_430_568, 61.55),
        variant("beit_large_patch16_384", LARGE, HALF.at(384).crop(1.0), 304_998_888, 191.07),
        variant("beit_large_patch16_512", LARGE, HALF.at(512).crop(1.0), 305_674_728, 361.99),
        variant("beit_base_patch16_224_v1", BASE_V1, HALF, 86_558_440, 17.56),
        Variant { name: "beit_micro", also: &[], config: MICRO, eval: Eval::SMALL, params: None, gmacs: None },
    ],
};

/// A random small encoder: the keys that `model.beit` and `mim.beit` share.
pub fn sample_encoder(rng: &mut Rng) -> Config {
    let (patch, heads) = (rng.between(1, 3), rng.between(1, 3));
    let mut config = Config::default();
    config.set("img_h", patch * rng.between(1, 3)).set("img_w", patch * rng.between(1, 3)).set("patch_size", patch);
    config.set("in_chans", rng.between(1, 3)).set("dim", heads * rng.between(2, 4)).set("depth", rng.between(0, 2));
    config.set("num_heads", heads).set("mlp_ratio", rng.range(0.5, 2.0)).set("ln_eps", 1e-6);
    for key in ["qkv_bias", "abs_pos_emb", "rel_pos_bias", "shared_rel_pos_bias", "layer_scale"] {
        config.set(key, rng.chance(0.5));
    }
    config
}

/// `model.beit`.
pub struct ModelBeit;

impl Operation for ModelBeit {
    const NAME: &'static str = "model.beit";
    const PAPER: &'static str = "2106.08254 BEiT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = sample_encoder(rng);
        config.set("num_classes", rng.below(4)).set("mean_pooling", rng.chance(0.5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let batch = draw.size("batch", 1, 2);
        draw.normal("image", [batch, config.positive("in_chans")?, config.positive("img_h")?, config.positive("img_w")?]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (model, layout) = Layout::build(|names| Beit::new(names, run.config()))?;
        let p = run.params(&layout)?;
        let (logits, saved) = model.forward(&p, &run.input("image")?)?;
        run.output("logits", &logits);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let d_logits = run.cotangent("logits", logits.shape())?;
            if let Some(d_image) = model.backward(&p, &mut g, saved, &d_logits, true)? {
                run.grad_input("image", &d_image);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
