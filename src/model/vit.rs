//! `model.vit`: the plain Vision Transformer (arXiv 2010.11929); `model.vit_distilled`: DeiT with a distillation token (2012.12877).
//!
//! `X₀ = [cls; patches(image) W + b] + pos_embed`, pre-norm blocks over all tokens, then `norm` on every token and a pool (class
//! token, or mean over the patch tokens), or the pool and `fc_norm` (MAE's fine-tuning head), then a linear head.
//!
//! Backward: heads, pool and norms as linear maps and LayerNorms, then the [`Encoder`].

use super::network::{Built, Classifier};
use super::vit_block::vit_block_settings;
use super::vit_encoder::{Encoder, EncoderSaved, EncoderSettings};
use super::weights::{self, Rules};
use super::zoo::{self, Eval, Family, Variant};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::nn::resize::PosEmbedResize;
use crate::nn::{Init, LayerNorm, Layout, Linear, Names, Params, Stats};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Shape, Tensor};

/// How a ViT makes one vector of its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// The class token.
    Token,
    /// The mean over the patch tokens; the class token takes no part.
    Avg,
}

/// A Vision Transformer with a class head.
#[derive(Clone, Debug)]
pub struct Vit {
    encoder: Encoder,
    pool: Pool,
    fc_norm: Option<LayerNorm>,
    head: Option<Linear>,
}

/// What [`Vit::backward`] needs.
pub struct Saved<T: Float> {
    encoder: EncoderSaved<T>,
    tokens: usize,
    pooled: Tensor<T>,
    normed: Option<(Tensor<T>, Stats<T>)>,
}

impl Vit {
    /// Registers the encoder, `fc_norm` and `head` from the keys of `model.vit`.
    pub fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let class_token = config.bool_or("class_token", true)?;
        let pool = if config.choice("global_pool", &["token", "avg"])? == "token" { Pool::Token } else { Pool::Avg };
        if pool == Pool::Token && !class_token {
            return Err(Error::config("global_pool", "expected \"avg\" without a class token, found \"token\""));
        }
        let fc_norm = config.bool_or("fc_norm", false)?;
        let tokens: &[&str] = if class_token { &["cls_token"] } else { &[] };
        let settings = vit_settings(config, config.positive("in_chans")?, tokens, !fc_norm)?;
        let encoder = Encoder::new(names, settings)?;
        let dim = encoder.dim;
        let fc_norm = fc_norm.then(|| LayerNorm::new(names.at("fc_norm"), dim, settings.block.norm_eps));
        let classes = config.usize("num_classes")?;
        let head = (classes > 0).then(|| Linear::new(names.at("head"), dim, classes, true, Init::NORMAL_02));
        Ok(Vit { encoder, pool, fc_norm, head })
    }

    /// Logits `[B, classes]`, or the pooled feature `[B, C]` without a head, of `[B, in, H, W]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let (x, encoder) = self.encoder.forward(p, image, None)?;
        let [_, tokens, _] = x.dims("tokens")?;
        let pooled = match self.pool {
            Pool::Token => token_row(&x, 0)?,
            Pool::Avg => self.encoder.mean(&x)?,
        };
        let (pooled, normed) = match &self.fc_norm {
            None => (pooled, None),
            Some(norm) => {
                let (y, stats) = norm.forward(p, &pooled)?;
                (y, Some((pooled, stats)))
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
        let mut d = self.head.as_ref().map_or(Ok(dy.clone()), |head| head.backward(p, g, &pooled, dy))?;
        if let (Some(norm), Some((x, stats))) = (&self.fc_norm, &normed) {
            d = norm.backward(p, g, x, stats, &d, None)?;
        }
        let [b, c] = d.dims("gradient of the pooled feature")?;
        let mut d_tokens = Tensor::zeros([b, tokens, c]);
        let prefix = self.encoder.prefix();
        for (out, d) in d_tokens.data_mut().chunks_exact_mut(tokens * c).zip(d.data().chunks_exact(c)) {
            match self.pool {
                Pool::Token => out[..c].copy_from_slice(d),
                Pool::Avg => {
                    let share = T::ONE / T::of(tokens - prefix);
                    out[prefix * c..].chunks_exact_mut(c).for_each(|row| elementwise::scale(row, d, share));
                }
            }
        }
        self.encoder.backward(p, g, encoder, &d_tokens, want_image)
    }
}

/// DeiT with a distillation token and a head for each token.
#[derive(Clone, Debug)]
pub struct DistilledVit {
    encoder: Encoder,
    heads: [Linear; 2],
}

/// What [`DistilledVit::backward`] needs.
pub struct DistilledSaved<T: Float> {
    encoder: EncoderSaved<T>,
    tokens: usize,
    rows: [Tensor<T>; 2],
}

impl DistilledVit {
    /// Registers the encoder, `head` and `head_dist` from the keys of `model.vit_distilled`.
    pub fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let encoder = Encoder::new(names, vit_settings(config, 3, &["cls_token", "dist_token"], true)?)?;
        let classes = config.positive("num_classes")?;
        let mut head = |name| Linear::new(names.at(name), encoder.dim, classes, true, Init::NORMAL_02);
        let heads = [head("head"), head("head_dist")];
        Ok(DistilledVit { encoder, heads })
    }

    /// The logits of both heads, `[B, classes]` each. In use their mean is the prediction.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<([Tensor<T>; 2], DistilledSaved<T>)> {
        let (x, encoder) = self.encoder.forward(p, image, None)?;
        let [_, tokens, _] = x.dims("tokens")?;
        let rows = [token_row(&x, 0)?, token_row(&x, 1)?];
        p.show("pooled", &rows[0]);
        p.show("pooled_dist", &rows[1]);
        let logits = [self.heads[0].forward(p, &rows[0])?, self.heads[1].forward(p, &rows[1])?];
        Ok((logits, DistilledSaved { encoder, tokens, rows }))
    }

    /// Adds the gradients of the parameters; the gradient of the image if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: DistilledSaved<T>,
        dy: [&Tensor<T>; 2],
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let DistilledSaved { encoder, tokens, rows } = saved;
        let c = self.encoder.dim;
        let mut d_tokens = Tensor::zeros([rows[0].shape()[0], tokens, c]);
        for (i, head) in self.heads.iter().enumerate() {
            let d = head.backward(p, g, &rows[i], dy[i])?;
            for (out, d) in d_tokens.data_mut().chunks_exact_mut(tokens * c).zip(d.data().chunks_exact(c)) {
                out[i * c..(i + 1) * c].copy_from_slice(d);
            }
        }
        self.encoder.backward(p, g, encoder, &d_tokens, want_image)
    }
}

/// Token `i` of every image: `[B, C]`.
pub fn token_row<T: Float>(x: &Tensor<T>, i: usize) -> Result<Tensor<T>> {
    let [b, n, c] = x.dims("tokens")?;
    let mut out = Tensor::scratch([b, c]);
    for (out, x) in out.data_mut().chunks_exact_mut(c).zip(x.data().chunks_exact(n * c)) {
        out.copy_from_slice(&x[i * c..(i + 1) * c]);
    }
    Ok(out)
}

fn vit_settings(config: &Config, chans: usize, tokens: &'static [&'static str], norm: bool) -> Result<EncoderSettings> {
    let patch = config.positive("patch_size")?;
    Ok(EncoderSettings {
        image: config.pair("img_size")?,
        patch,
        chans,
        depth: config.usize("depth")?,
        block: vit_block_settings(config, "embed_dim", "num_heads", "mlp_ratio")?,
        tokens,
        fixed_positions: false,
        norm,
        patch_init: Init::FanIn(chans * patch * patch),
    })
}

impl Classifier for Vit {
    type Saved = Saved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Saved<f32>)> {
        let (logits, saved) = self.forward(p, images)?;
        Ok((vec![logits], saved))
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Saved<f32>, d: &[Tensor<f32>]) -> Result<()> {
        self.backward(p, g, saved, &d[0], false).map(drop)
    }
}

impl Classifier for DistilledVit {
    type Saved = DistilledSaved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, DistilledSaved<f32>)> {
        let (logits, saved) = self.forward(p, images)?;
        Ok((logits.into(), saved))
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: DistilledSaved<f32>, d: &[Tensor<f32>]) -> Result<()> {
        self.backward(p, g, saved, [&d[0], &d[1]], false).map(drop)
    }
}

/// `pos_embed` for another grid of patches: bicubic, the rows of learned tokens kept.
pub fn resize_pos_embed(prefix: usize, table: &Tensor<f32>, wanted: Shape) -> Result<Option<Tensor<f32>>> {
    let ([one, rows, c], [_, wanted_rows, wanted_c]) = (table.dims::<3>("pos_embed")?, wanted.dims::<3>("pos_embed")?);
    let side = |rows: usize| rows.checked_sub(prefix).map(usize::isqrt).filter(|s| s * s + prefix == rows && *s > 0);
    match (side(rows), side(wanted_rows)) {
        (Some(old), Some(new)) if one == 1 && c == wanted_c => {
            PosEmbedResize::new(prefix, true, [old; 2], [new; 2])?.forward(table).map(Some)
        }
        _ => Ok(None),
    }
}

/// Multiply-adds for one image with `prefix` learned tokens, each of which has a head.
fn macs(config: &Config, size: usize, prefix: usize) -> Result<f64> {
    let [c, patch, depth, classes] = ["embed_dim", "patch_size", "depth", "num_classes"].map(|key| config.usize(key));
    let (c, patch, depth, classes) = (c? as f64, patch?, depth? as f64, classes? as f64);
    let (patches, ratio) = ((size / patch).pow(2) as f64, config.f64("mlp_ratio")?);
    let (n, prefix) = (patches + prefix as f64, prefix as f64);
    let block = (4.0 + 2.0 * ratio) * n * c * c + 2.0 * n * n * c;
    Ok(patches * c * (3 * patch * patch) as f64 + depth * block + prefix * c * classes)
}

const COMMON: &str = r#"{"patch_size": 16, "in_chans": 3, "mlp_ratio": 4.0, "qkv_bias": true, "qk_norm": false, "layer_scale": false,
    "norm_eps": 1e-6, "class_token": true, "global_pool": "token", "fc_norm": false}"#;

/// ViT and DeiT.
pub static FAMILY: Family = Family {
    op: "model.vit",
    common: COMMON,
    build: |config| Built::new(|names| Vit::new(names, config)),
    at_size: zoo::img_size,
    macs: |config, size| macs(config, size, 1),
    rules: Rules {
        key: weights::keep,
        resize: |name, table, wanted, _| if name == "pos_embed" { resize_pos_embed(1, table, wanted) } else { Ok(None) },
        heads: &["head"],
    },
    variants: &[
        Variant {
            name: "deit_tiny_patch16_224",
            also: &["vit_tiny_patch16_224"],
            config: r#"{"embed_dim": 192, "depth": 12, "num_heads": 3}"#,
            eval: Eval::IMAGENET,
            params: Some(5_717_416),
            gmacs: Some(1.25),
        },
        Variant {
            name: "deit_small_patch16_224",
            also: &["vit_small_patch16_224"],
            config: r#"{"embed_dim": 384, "depth": 12, "num_heads": 6}"#,
            eval: Eval::IMAGENET,
            params: Some(22_050_664),
            gmacs: Some(4.60),
        },
        Variant {
            name: "deit_base_patch16_224",
            also: &["vit_base_patch16_224"],
            config: r#"{"embed_dim": 768, "depth": 12, "num_heads": 12}"#,
            eval: Eval::IMAGENET,
            params: Some(86_567_656),
            gmacs: Some(17.56),
        },
        Variant {
            name: "deit_base_patch16_384",
            also: &["vit_base_patch16_384"],
            config: r#"{"embed_dim": 768, "depth": 12, "num_heads": 12}"#,
            eval: Eval::IMAGENET.at(384).crop(1.0),
            params: Some(86_859_496),
            gmacs: Some(55.48),
        },
        Variant {
            name: "vit_large_patch16_224",
            also: &[],
            config: r#"{"embed_dim": 1024, "depth": 24, "num_heads": 16}"#,
            eval: Eval::IMAGENET,
            params: Some(304_326_632),
            gmacs: Some(61.55),
        },
        Variant {
            name: "vit_huge_patch14_224",
            also: &[],
            config: r#"{"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14}"#,
            eval: Eval::IMAGENET,
            params: Some(632_045_800),
            gmacs: Some(167.3),
        },
        Variant {
            name: "vit_micro",
            also: &[],
            config: r#"{"embed_dim": 144, "depth": 6, "num_heads": 6, "patch_size": 4, "weight_init": "xavier"}"#,
            eval: Eval::SMALL,
            params: None,
            gmacs: None,
        },
    ],
};

/// DeiT with a distillation token.
pub static DISTILLED_FAMILY: Family = Family {
    op: "model.vit_distilled",
    common: r#"{"patch_size": 16, "mlp_ratio": 4.0, "qkv_bias": true, "norm_eps": 1e-6, "training": false}"#,
    build: |config| Built::new(|names| DistilledVit::new(names, config)),
    at_size: zoo::img_size,
    macs: |config, size| macs(config, size, 2),
    rules: Rules {
        key: weights::keep,
        resize: |name, table, wanted, _| if name == "pos_embed" { resize_pos_embed(2, table, wanted) } else { Ok(None) },
        heads: &["head", "head_dist"],
    },
    variants: &[
        Variant {
            name: "deit_tiny_distilled_patch16_224",
            also: &[],
            config: r#"{"embed_dim": 192, "depth": 12, "num_heads": 3}"#,
            eval: Eval::IMAGENET,
            params: Some(5_910_800),
            gmacs: None,
        },
        Variant {
            name: "deit_small_distilled_patch16_224",
            also: &[],
            config: r#"{"embed_dim": 384, "depth": 12, "num_heads": 6}"#,
            eval: Eval::IMAGENET,
            params: Some(22_436_432),
            gmacs: None,
        },
        Variant {
            name: "deit_base_distilled_patch16_224",
            also: &[],
            config: r#"{"embed_dim": 768, "depth": 12, "num_heads": 12}"#,
            eval: Eval::IMAGENET,
            params: Some(87_338_192),
            gmacs: None,
        },
        Variant {
            name: "deit_micro_distilled",
            also: &[],
            config: r#"{"embed_dim": 144, "depth": 6, "num_heads": 6, "patch_size": 4, "weight_init": "xavier"}"#,
            eval: Eval::SMALL,
            params: None,
            gmacs: None,
        },
    ],
};

/// Random sizes that both operations share.
fn sample_sizes(rng: &mut Rng) -> Config {
    let (heads, width, patch) = (rng.between(1, 3), rng.between(2, 5), rng.between(1, 4));
    let mut config = Config::default();
    config.set("img_size", vec![patch * rng.between(1, 3), patch * rng.between(1, 3)]).set("patch_size", patch);
    config.set("embed_dim", heads * width).set("depth", rng.between(0, 2)).set("num_heads", heads).set("mlp_ratio", rng.range(0.5, 3.0));
    config.set("qkv_bias", rng.chance(0.7)).set("norm_eps", 1e-6);
    config
}

/// `model.vit`.
pub struct ModelVit;

impl Operation for ModelVit {
    const NAME: &'static str = "model.vit";
    const PAPER: &'static str = "2010.11929 ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = sample_sizes(rng);
        let class_token = rng.chance(0.7);
        let pool = if class_token && rng.chance(0.5) { "token" } else { "avg" };
        config
            .set("in_chans", rng.between(1, 4))
            .set("num_classes", rng.below(4))
            .set("qk_norm", rng.chance(0.3))
            .set("layer_scale", rng.chance(0.3));
        config.set("class_token", class_token).set("global_pool", pool).set("fc_norm", rng.chance(0.5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let ([h, w], batch) = (config.pair("img_size")?, draw.size("batch", 1, 3));
        draw.normal("image", [batch, config.positive("in_chans")?, h, w]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (model, layout) = Layout::build(|names| Vit::new(names, run.config()))?;
        let p = run.params(&layout)?;
        let (logits, saved) = model.forward(&p, &run.input("image")?)?;
        run.output("logits", &logits);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            if let Some(d_image) = model.backward(&p, &mut g, saved, &run.cotangent("logits", logits.shape())?, true)? {
                run.grad_input("image", &d_image);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}

/// `model.vit_distilled`.
pub struct ModelVitDistilled;

impl Operation for ModelVitDistilled {
    const NAME: &'static str = "model.vit_distilled";
    const PAPER: &'static str = "2012.12877 DeiT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = sample_sizes(rng);
        config.set("num_classes", rng.between(1, 4)).set("training", rng.chance(0.5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let ([h, w], batch) = (config.pair("img_size")?, draw.size("batch", 1, 3));
        draw.normal("image", [batch, 3, h, w]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let training = run.config().bool("training")?;
        let (model, layout) = Layout::build(|names| DistilledVit::new(names, run.config()))?;
        let p = run.params(&layout)?;
        let ([class, dist], saved) = model.forward(&p, &run.input("image")?)?;
        let half = T::from_f64(0.5);
        if training {
            run.output("logits", &class);
            run.output("logits_dist", &dist);
        } else {
            let mut mean = Tensor::zeros(class.shape());
            elementwise::add_scaled(mean.data_mut(), class.data(), half);
            elementwise::add_scaled(mean.data_mut(), dist.data(), half);
            run.output("logits", &mean);
        }
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let mut d_class = run.cotangent("logits", class.shape())?;
            let d_dist = if training {
                run.cotangent("logits_dist", dist.shape())?
            } else {
                d_class.data_mut().iter_mut().for_each(|x| *x *= half);
                d_class.clone()
            };
            if let Some(d_image) = model.backward(&p, &mut g, saved, [&d_class, &d_dist], true)? {
                run.grad_input("image", &d_image);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
