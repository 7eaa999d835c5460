//! `model.cait`: CaiT (arXiv 2103.17239), a deep plain ViT whose class token joins only in the last layers.
//!
//! `t = patches(x) + pos_embed`; patch blocks (`blocks.{i}`); the class stage (`cls_token`, `blocks_token_only.{i}`, `norm`); `head`.

use super::cait_block::{ClassStage, PatchBlock, PatchSaved, Settings, StageSaved};
use super::network::{Built, Classifier};
use super::stack::{self, Kept};
use super::vit::resize_pos_embed;
use super::weights::{Key, Rules};
use super::zoo::{Eval, Family, Variant};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::Result;
use crate::kernel::{reduce, rows};
use crate::nn::{Init, Layout, Linear, Names, Param, Params, PatchEmbed, patch_embed};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The classifier.
#[derive(Clone, Debug)]
pub struct Cait {
    embed: PatchEmbed,
    positions: Param,
    blocks: Vec<PatchBlock>,
    stage: ClassStage,
    head: Option<Linear>,
}

/// What [`Cait::backward`] needs.
pub struct Saved<T: Float> {
    embed: patch_embed::Saved<T>,
    blocks: Vec<Kept<T, PatchSaved<T>>>,
    stage: StageSaved<T>,
    feature: Tensor<T>,
}

impl Cait {
    /// Registers the parameters from the keys of `model.cait`.
    pub fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let image = [config.positive("img_height")?, config.positive("img_width")?];
        let (patch, chans, depth) = (config.positive("patch_size")?, config.positive("in_chans")?, config.usize("depth")?);
        let start = match depth {
            0..=18 => 0.1,
            19..=24 => 1e-5,
            _ => 1e-6,
        };
        let settings = Settings {
            dim: config.positive("embed_dim")?,
            num_heads: config.positive("num_heads")?,
            mlp_ratio: config.f64_or("mlp_ratio", 4.0)?,
            qkv_bias: config.bool_or("qkv_bias", false)?,
            ln_eps: config.f64_or("ln_eps", 1e-6)?,
            init_scale: config.f64_or("init_scale", start)?,
            drop_path: config.f64_or("drop_path_rate", 0.0)?,
        };
        let inputs = chans.saturating_mul(patch.saturating_mul(patch));
        let embed = PatchEmbed::new(names.at("patch_embed"), image, patch, chans, settings.dim, None, Init::FanIn(inputs))?;
        let [gh, gw] = embed.grid();
        let positions = names.param("pos_embed", [1, gh * gw, settings.dim], Init::NORMAL_02);
        let blocks = (0..depth).map(|i| PatchBlock::new(&mut names.at(format!("blocks.{i}")), settings)).collect::<Result<_>>()?;
        let class = Settings { mlp_ratio: config.f64_or("mlp_ratio_clstk", 4.0)?, ..settings };
        let stage = ClassStage::new(names, class, config.usize_or("depth_token_only", 2)?)?;
        let classes = config.usize("num_classes")?;
        let head = (classes > 0).then(|| Linear::new(names.at("head"), settings.dim, classes, true, Init::NORMAL_02));
        Ok(Cait { embed, positions, blocks, stage, head })
    }

    /// Logits `[B, classes]`, or the class vector `[B, C]` without a head.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let (mut x, embed) = self.embed.forward(p, image, None)?;
        rows::add_table(x.data_mut(), p.get(self.positions));
        let (x, blocks) = stack::forward(p, &self.blocks, x, |block, _, x| block.forward(p, x))?;
        p.show("tokens", &x);
        let (feature, stage) = self.stage.forward(p, &x)?;
        p.show("pooled", &feature);
        let logits = self.head.as_ref().map_or(Ok(feature.clone()), |head| head.forward(p, &feature))?;
        Ok((logits, Saved { embed, blocks, stage, feature }))
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
        let Saved { embed, blocks, stage, feature } = saved;
        let d = self.head.as_ref().map_or(Ok(dy.clone()), |head| head.backward(p, g, &feature, dy))?;
        let d = self.stage.backward(p, g, stage, &d)?;
        let d = stack::backward(
            &self.blocks,
            blocks,
            d,
            |block, _, x| block.forward(p, x),
            |block, _, saved, d| block.backward(p, g, saved, d),
        )?;
        reduce::add_column_sums(g.get_mut(self.positions), d.data());
        if want_image {
            return self.embed.backward(p, g, &embed, &d, None).map(Some);
        }
        self.embed.backward_params(p, g, &embed, &d)?;
        Ok(None)
    }
}

impl Classifier for Cait {
    type Saved = Saved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Saved<f32>)> {
        let (logits, saved) = self.forward(p, images)?;
        Ok((vec![logits], saved))
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Saved<f32>, d: &[Tensor<f32>]) -> Result<()> {
        self.backward(p, g, saved, &d[0], false).map(drop)
    }
}

/// Multiply-adds for one image, those of the head mixing included; the class blocks project all tokens to k and v, as released.
fn macs(config: &Config, size: usize) -> Result<f64> {
    let [c, heads, patch, depth, class_depth, classes] =
        ["embed_dim", "num_heads", "patch_size", "depth", "depth_token_only", "num_classes"].map(|key| config.usize(key));
    let (c, heads, patch, depth) = (c? as f64, heads? as f64, patch?.max(1), depth? as f64);
    let (ratio, class_ratio) = (config.f64("mlp_ratio")?, config.f64("mlp_ratio_clstk")?);
    let n = (size / patch).pow(2) as f64;
    let block = n * (4.0 + 2.0 * ratio) * c * c + 2.0 * n * n * (c + heads * heads);
    let class = (n + 1.0) * (2.0 * c * c + 2.0 * c) + (2.0 + 2.0 * class_ratio) * c * c;
    Ok(n * c * (3 * patch * patch) as f64 + depth * block + class_depth? as f64 * class + c * classes? as f64)
}

const fn variant(
    name: &'static str,
    also: &'static [&'static str],
    config: &'static str,
    size: usize,
    params: usize,
    gmacs: f64,
) -> Variant {
    Variant { name, also, config, eval: Eval::IMAGENET.crop(1.0).at(size), params: Some(params), gmacs: Some(gmacs) }
}

const XXS24: &str = r#"{"embed_dim": 192, "depth": 24, "num_heads": 4}"#;
const XXS36: &str = r#"{"embed_dim": 192, "depth": 36, "num_heads": 4, "init_scale": 1e-5}"#;
const XS24: &str = r#"{"embed_dim": 288, "depth": 24, "num_heads": 6}"#;
const S24: &str = r#"{"embed_dim": 384, "depth": 24, "num_heads": 8}"#;
const S36: &str = r#"{"embed_dim": 384, "depth": 36, "num_heads": 8}"#;
const M36: &str = r#"{"embed_dim": 768, "depth": 36, "num_heads": 16}"#;
const M48: &str = r#"{"embed_dim": 768, "depth": 48, "num_heads": 16}"#;
const MICRO: &str = r#"{"embed_dim": 96, "depth": 6, "num_heads": 4, "patch_size": 4, "weight_init": "xavier"}"#;

/// CaiT.
pub static FAMILY: Family = Family {
    op: "model.cait",
    common: r#"{"patch_size": 16, "in_chans": 3, "mlp_ratio": 4.0, "mlp_ratio_clstk": 4.0, "qkv_bias": true, "depth_token_only": 2,
        "ln_eps": 1e-6}"#,
    build: |config| Built::new(|names| Cait::new(names, config)),
    at_size: |config, size| {
        config.set("img_height", size).set("img_width", size);
    },
    macs,
    rules: Rules {
        key: |name| name.strip_prefix("module.").map_or(Key::Keep, |name| Key::Rename(name.into())),
        resize: |name, table, wanted, _| if name == "pos_embed" { resize_pos_embed(0, table, wanted) } else { Ok(None) },
        heads: &["head"],
    },
    variants: &[
        variant("cait_xxs24_224", &["cait_XXS24_224"], XXS24, 224, 11_956_264, 2.52),
        variant("cait_xxs24_384", &["cait_XXS24"], XXS24, 384, 12_029_224, 9.60),
        variant("cait_xxs36_224", &["cait_XXS36_224"], XXS36, 224, 17_299_720, 3.76),
        variant("cait_xxs36_384", &["cait_XXS36"], XXS36, 384, 17_372_680, 14.31),
        variant("cait_xs24_384", &["cait_XS24"], XS24, 384, 26_670_088, 19.24),
        variant("cait_s24_224", &["cait_S24_224"], S24, 224, 46_916_200, 9.33),
        variant("cait_s24_384", &["cait_S24"], S24, 384, 47_062_120, 32.11),
        variant("cait_s36_384", &["cait_S36"], S36, 384, 68_366_632, 47.91),
        variant("cait_m36_384", &["cait_M36"], M36, 384, 271_221_352, 172.94),
        variant("cait_m48_448", &["cait_M48"], M48, 448, 356_460_520, 329.11),
        Variant { name: "cait_micro", also: &[], config: MICRO, eval: Eval::SMALL, params: None, gmacs: None },
    ],
};

/// `model.cait`.
pub struct ModelCait;

impl Operation for ModelCait {
    const NAME: &'static str = "model.cait";
    const PAPER: &'static str = "2103.17239 CaiT";

    fn sample(rng: &mut Rng) -> Config {
        let (patch, heads) = (rng.between(1, 3), rng.between(1, 3));
        let mut config = Config::default();
        config.set("img_height", patch * rng.between(1, 3)).set("img_width", patch * rng.between(1, 3)).set("patch_size", patch);
        config.set("in_chans", rng.between(1, 3)).set("num_classes", rng.between(1, 4)).set("embed_dim", heads * rng.between(2, 4));
        config.set("depth", rng.between(0, 2)).set("num_heads", heads).set("mlp_ratio", rng.range(0.5, 2.0));
        config.set("mlp_ratio_clstk", rng.range(0.5, 2.0)).set("qkv_bias", rng.chance(0.7)).set("depth_token_only", rng.between(0, 2));
        config.set("ln_eps", 1e-6);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let batch = draw.size("batch", 1, 2);
        draw.normal("x", [batch, config.positive("in_chans")?, config.positive("img_height")?, config.positive("img_width")?]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (model, layout) = Layout::build(|names| Cait::new(names, run.config()))?;
        let p = run.params(&layout)?;
        let (logits, saved) = model.forward(&p, &run.input("x")?)?;
        run.output("logits", &logits);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let d_logits = run.cotangent("logits", logits.shape())?;
            if let Some(dx) = model.backward(&p, &mut g, saved, &d_logits, true)? {
                run.grad_input("x", &dx);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
