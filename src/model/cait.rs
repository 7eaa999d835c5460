//! `model.cait`: CaiT (arXiv 2103.17239), a deep plain ViT whose class token joins only in the last layers.
//!
//! `t = patches(x) + pos_embed`; patch blocks (`blocks.{i}`); the class stage (`cls_token`, `blocks_token_only.{i}`, `norm`); `head`.

use super::cait_block::{ClassStage, PatchBlock, PatchSaved, Settings, StageSaved};
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
    blocks: Vec<PatchSaved<T>>,
    stage: StageSaved<T>,
    feature: Tensor<T>,
}

impl Cait {
    /// Registers the parameters from the keys of `model.cait`.
    pub fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let image = [config.positive("img_height")?, config.positive("img_width")?];
        let (patch, chans, depth) = (config.positive("patch_size")?, config.positive("in_chans")?, config.usize("depth")?);
        let settings = Settings {
            dim: config.positive("embed_dim")?,
            num_heads: config.positive("num_heads")?,
            mlp_ratio: config.f64_or("mlp_ratio", 4.0)?,
            qkv_bias: config.bool_or("qkv_bias", false)?,
            ln_eps: config.f64_or("ln_eps", 1e-6)?,
            init_scale: match depth {
                0..=18 => 0.1,
                19..=24 => 1e-5,
                _ => 1e-6,
            },
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
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (y, saved) = block.forward(p, &x)?;
            blocks.push(saved);
            x = y;
        }
        let (feature, stage) = self.stage.forward(p, &x)?;
        let logits = self.head.as_ref().map_or(Ok(feature.clone()), |head| head.forward(p, &feature))?;
        Ok((logits, Saved { embed, blocks, stage, feature }))
    }

    /// Adds the gradients of the parameters; returns that of the image.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let Saved { embed, blocks, stage, feature } = saved;
        let d = self.head.as_ref().map_or(Ok(dy.clone()), |head| head.backward(p, g, &feature, dy))?;
        let mut d = self.stage.backward(p, g, stage, &d)?;
        for (block, saved) in self.blocks.iter().zip(blocks).rev() {
            d = block.backward(p, g, saved, &d)?;
        }
        reduce::add_column_sums(g.get_mut(self.positions), d.data());
        self.embed.backward(p, g, &embed, &d, None)
    }
}

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
            let dx = model.backward(&p, &mut g, saved, &d_logits)?;
            run.grad_input("x", &dx);
            run.grad_params(&g);
        }
        Ok(())
    }
}
