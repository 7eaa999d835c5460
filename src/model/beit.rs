//! `model.beit`: BEiT (arXiv 2106.08254), a plain ViT with relative position biases; also the encoder of BEiT's and SimMIM's (2111.09886)
//! pre-training.
//!
//! `X₀ = [cls; patches(1 − w) + mask_token·w] (+ pos_embed)`, blocks ([`Block`]), which all get the same bias from `rel_pos_bias`, each has
//! a table of its own, or both; then `norm`. The classifier reads the class token after `norm`, or, without that norm, the mean of the
//! patches after `fc_norm`.

use super::beit_block::{self, BEIT_NAMES, Block};
use super::vit::token_row;
use super::vit_block::hidden_width;
use crate::attention::beit::{self, Biases};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::Result;
use crate::kernel::{elementwise, reduce, rows};
use crate::nn::beit_rel_pos::RelativeTable;
use crate::nn::mask_token::{mix_token, mix_token_backward};
use crate::nn::{Init, LayerNorm, Layout, Linear, Names, Param, Params, PatchEmbed, Stats, patch_embed};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

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
    blocks: Vec<beit_block::Saved<T>>,
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
        let blocks = (0..depth).map(|i| Block::new(&mut names.at(format!("blocks.{i}")), block.at_depth(i))).collect::<Result<_>>()?;
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
        let mut blocks = Vec::with_capacity(self.blocks.len());
        let (y, embed, last) = self.run(p, image, hidden, |saved| blocks.push(saved))?;
        Ok((y, EncoderSaved { embed, hidden: hidden.map(<[bool]>::to_vec), blocks, last }))
    }

    /// [`forward`](Self::forward) of whole images without keeping anything for a backward pass.
    pub fn infer<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<Tensor<T>> {
        Ok(self.run(p, image, None, drop)?.0)
    }

    #[allow(clippy::type_complexity)]
    fn run<T: Float>(
        &self,
        p: &Params<T>,
        image: &Tensor<T>,
        hidden: Option<&[bool]>,
        mut keep: impl FnMut(beit_block::Saved<T>),
    ) -> Result<(Tensor<T>, patch_embed::Saved<T>, Option<(Tensor<T>, Stats<T>)>)> {
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
        for (i, block) in self.blocks.iter().enumerate() {
            let (y, saved) = block.forward(p, &x, shared.as_ref())?;
            keep(saved);
            x = y;
            p.show(format!("block.{i}"), &x);
        }
        match &self.norm {
            None => Ok((x, embed, None)),
            Some(norm) => {
                let (y, stats) = norm.forward(p, &x)?;
                Ok((y, embed, Some((x, stats))))
            }
        }
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
        let mut d = match (&self.norm, last) {
            (Some(norm), Some((x, stats))) => norm.backward(p, g, &x, &stats, dy, None)?,
            _ => dy.clone(),
        };
        let shared = self.shared.map(|table| table.dense(p));
        let mut d_shared = shared.as_ref().map(|shared| Tensor::zeros(shared.shape()));
        for (block, saved) in self.blocks.iter().zip(blocks).rev() {
            d = block.backward(p, g, saved, shared.as_ref(), d_shared.as_mut(), &d)?;
        }
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
            layer_scale: config.bool("layer_scale")?.then_some(0.1),
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
                let mean = super::swin_ops::mean_tokens(&without_class_token(&x)?)?;
                let (y, stats) = norm.forward(p, &mean)?;
                (y, Some((mean, stats)))
            }
        };
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
                without_class_token_backward(&super::swin_ops::mean_tokens_backward(&d, tokens - 1)?)?
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
