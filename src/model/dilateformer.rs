//! `model.dilateformer`: a pyramid of dilated and global attention (arXiv 2302.01791).
//!
//! `x = patch_embed(image)`; per stage its blocks, then a merging that halves the map and doubles the width; LayerNorm `norm` of every
//! position, the mean over all, `head`. No positions but the blocks' convolutions, no class token.
//!
//! | variant | depths | width | heads |
//! | --- | --- | --- | --- |
//! | tiny | 2, 2, 6, 2 | 72 | 3, 6, 12, 24 |
//! | small | 3, 5, 8, 3 | 72 | 3, 6, 12, 24 |
//! | base | 4, 8, 10, 3 | 96 | 3, 6, 12, 24 |
//!
//! Checkpoints load by name; `attn.qkv.weight` has four dimensions in dilated stages. The published key `cpe_per_satge` is spelled
//! `cpe_per_stage` here.

use super::dilate_block::{self, DilateBlock, MixerSettings, NORM_EPS};
use super::network::{Built, Classifier};
use super::stack::{self, Kept};
use super::swin_ops::{mean_tokens, mean_tokens_backward};
use super::weights::{self, Rules};
use super::zoo::{self, Eval, Family, Variant};
use crate::attention::window::qk_scale;
use crate::attention::{dilated, softmax};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::nn::batch_norm::Updates;
use crate::nn::dilate::{self, DilateMerging, DilatePatchEmbed, EmbedSettings};
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::{DropPath, LayerNorm, Layout, Linear, Names, Params, Stats, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// What a stage is made of.
#[derive(Clone, Copy, Debug)]
pub struct StageSettings {
    /// Blocks.
    pub depth: usize,
    /// Heads.
    pub num_heads: usize,
    /// Dilated attention, or global.
    pub is_dilated: bool,
    /// A merging follows.
    pub downsample: bool,
}

/// What a DilateFormer is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Rows and columns of the image; `None` takes any.
    pub img_size: Option<[usize; 2]>,
    /// The stem; its width is that of the first stage and doubles from stage to stage.
    pub embed: EmbedSettings,
    /// The stages.
    pub stages: Vec<StageSettings>,
    /// Side of the neighbourhoods.
    pub kernel_size: usize,
    /// Distances in the neighbourhoods.
    pub dilation: Vec<usize>,
    /// Hidden width of the MLPs over C.
    pub mlp_ratio: f64,
    /// `qkv` has a bias.
    pub qkv_bias: bool,
    /// The factor on scores; `None` is `d^{−1/2}`.
    pub scale: Option<f64>,
    /// `conv3_2` or `conv2_2`.
    pub merging_way: String,
    /// A position encoding after every merging.
    pub cpe_per_stage: bool,
    /// A position encoding before every block.
    pub cpe_per_block: bool,
    /// Classes.
    pub num_classes: usize,
    /// Drop path of the last block; it grows linearly from 0 over all blocks.
    pub drop_path: f64,
}

/// A list of truth values, or `default`.
fn bools(config: &Config, key: &str, default: impl FnOnce() -> Vec<bool>) -> Result<Vec<bool>> {
    match config.get(key) {
        None => Ok(default()),
        Some(value) => value
            .as_array()
            .and_then(|list| list.iter().map(serde_json::Value::as_bool).collect())
            .ok_or_else(|| Error::config(key, format!("expected a list of truth values, found {value}"))),
    }
}

impl Settings {
    /// From a configuration, with the sheet's defaults.
    pub fn from_config(config: &Config) -> Result<Self> {
        let (depths, heads) = (config.usizes("depths")?, config.usizes("num_heads")?);
        let count = depths.len();
        let dilate = bools(config, "dilate_attention", || (0..count).map(|i| 2 * i < count).collect())?;
        let downsamples = bools(config, "downsamples", || (0..count).map(|i| i + 1 < count).collect())?;
        if !(1..=16).contains(&count) {
            return Err(Error::config("depths", format!("expected 1 to 16 stages, found {depths:?}")));
        }
        for (key, len) in [("num_heads", heads.len()), ("dilate_attention", dilate.len()), ("downsamples", downsamples.len())] {
            if len != count {
                return Err(Error::config(key, format!("expected one for each of the {count} stages, found {len}")));
            }
        }
        if depths.iter().any(|&depth| depth > 1024) {
            return Err(Error::config("depths", format!("expected at most 1024 blocks per stage, found {depths:?}")));
        }
        if !downsamples[..count - 1].iter().all(|&d| d) {
            let message = format!("expected true for every stage but the last: widths would not match; found {downsamples:?}");
            return Err(Error::config("downsamples", message));
        }
        let stage = |i: usize| StageSettings { depth: depths[i], num_heads: heads[i], is_dilated: dilate[i], downsample: downsamples[i] };
        Ok(Settings {
            img_size: Some(config.pair("img_size")?),
            embed: EmbedSettings::from_config(config)?,
            stages: (0..count).map(stage).collect(),
            kernel_size: config.usize_or("kernel_size", 3)?,
            dilation: if config.get("dilation").is_none() { vec![1, 2, 3] } else { config.usizes("dilation")? },
            mlp_ratio: config.f64_or("mlp_ratio", 4.0)?,
            qkv_bias: config.bool_or("qkv_bias", true)?,
            scale: qk_scale(config)?,
            merging_way: config.str_or("merging_way", "conv3_2")?.into(),
            cpe_per_stage: config.bool_or("cpe_per_stage", false)?,
            cpe_per_block: config.bool_or("cpe_per_block", true)?,
            num_classes: config.positive("num_classes")?,
            drop_path: config.f64_or("drop_path_rate", 0.0)?,
        })
    }

    fn block(&self, stage: StageSettings, dim: usize) -> dilate_block::Settings {
        let (num_heads, qkv_bias, scale) = (stage.num_heads, self.qkv_bias, self.scale);
        let mixer = if stage.is_dilated {
            let (kernel_size, dilation) = (self.kernel_size, self.dilation.clone());
            MixerSettings::Dilated(dilated::Settings { dim, num_heads, qkv_bias, kernel_size, dilation, scale })
        } else {
            MixerSettings::Global(softmax::Settings { qkv_bias, scale, ..softmax::Settings::new(dim, num_heads) })
        };
        dilate_block::Settings { mixer, mlp_ratio: self.mlp_ratio, cpe: self.cpe_per_block, drop_path: 0.0 }
    }
}

#[derive(Clone, Debug)]
struct Stage {
    blocks: Vec<DilateBlock>,
    downsample: Option<DilateMerging>,
}

/// A DilateFormer.
#[derive(Clone, Debug)]
pub struct DilateFormer {
    img_size: Option<[usize; 2]>,
    patch_embed: DilatePatchEmbed,
    stages: Vec<Stage>,
    norm: LayerNorm,
    head: Linear,
}

struct StageSaved<T: Float> {
    blocks: Vec<Kept<T, dilate_block::Saved<T>>>,
    merging: Option<dilate::MergingSaved<T>>,
}

/// What [`DilateFormer::backward`] needs.
pub struct Saved<T: Float> {
    embed: dilate::EmbedSaved<T>,
    stages: Vec<StageSaved<T>>,
    last: Tensor<T>,
    stats: Stats<T>,
    mean: Tensor<T>,
}

impl<T: Float> Saved<T> {
    /// Takes the running statistics after the call, in training.
    pub fn take_updates(&mut self) -> Updates<T> {
        let mut updates = self.embed.take_updates();
        updates.extend(self.stages.iter_mut().flat_map(|stage| stage.merging.iter_mut().flat_map(|m| m.take_updates())));
        updates
    }
}

impl DilateFormer {
    /// Registers `patch_embed`, `stages.{i}.blocks.{j}`, `stages.{i}.downsample`, `norm`, `head`.
    pub fn new(names: &mut Names, settings: &Settings) -> Result<Self> {
        let patch_embed = DilatePatchEmbed::new(names.at("patch_embed"), &settings.embed)?;
        let (mut dim, mut stages) = (settings.embed.embed_dim, Vec::new());
        let (mut index, depth) = (0, settings.stages.iter().map(|stage| stage.depth).sum());
        for (i, &stage) in settings.stages.iter().enumerate() {
            if dim > 1 << 24 {
                return Err(Error::config("embed_dim", format!("expected stages narrower than 2^24, found {dim} in stage {i}")));
            }
            let mut names = names.at(format!("stages.{i}"));
            let mut block = settings.block(stage, dim);
            let mut blocks = Vec::with_capacity(stage.depth);
            for j in 0..stage.depth {
                block.drop_path = DropPath::linear(settings.drop_path, index, depth);
                blocks.push(DilateBlock::new(&mut names.at(format!("blocks.{j}")), &block)?);
                index += 1;
            }
            let downsample = match stage.downsample {
                false => None,
                true => {
                    let way = settings.merging_way.as_str();
                    Some(DilateMerging::new(names.at("downsample"), dim, 2 * dim, way, settings.cpe_per_stage)?)
                }
            };
            if stage.downsample {
                dim *= 2;
            }
            stages.push(Stage { blocks, downsample });
        }
        let norm = LayerNorm::new(names.at("norm"), dim, NORM_EPS);
        let head = Linear::new(names.at("head"), dim, settings.num_classes, true, normal_02(0, 0));
        Ok(DilateFormer { img_size: settings.img_size, patch_embed, stages, norm, head })
    }

    /// Logits `[B, classes]` of images `[B, H, W, in]`; `training` is the mode of the BatchNorms.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: Tensor<T>, training: bool) -> Result<(Tensor<T>, Saved<T>)> {
        let [_, height, width, _] = image.dims("image [B, H, W, C]")?;
        if self.img_size.is_some_and(|size| size != [height, width]) {
            return Err(Error::shape("image", format!("of img_size {:?}", self.img_size.unwrap_or_default()), [height, width]));
        }
        let (mut x, embed) = self.patch_embed.forward(p, image, training)?;
        let mut stages = Vec::with_capacity(self.stages.len());
        for (i, stage) in self.stages.iter().enumerate() {
            let (y, blocks) = stack::forward(p, &stage.blocks, x, |block, _, x| block.forward(p, x))?;
            p.show(format!("stages.{i}"), &y);
            x = y;
            let mut merging = None;
            if let Some(downsample) = &stage.downsample {
                let (y, saved) = downsample.forward(p, x, training)?;
                merging = Some(saved);
                x = y;
            }
            stages.push(StageSaved { blocks, merging });
        }
        let [batch, h, w, c] = x.dims("map [B, H, W, C]")?;
        if h * w == 0 {
            return Err(Error::shape("image", "large enough for a position in the last stage", [height, width]));
        }
        let (normed, stats) = self.norm.forward(p, &x)?;
        let mean = mean_tokens(&normed.reshape([batch, h * w, c])?)?;
        p.show("pooled", &mean);
        let logits = self.head.forward(p, &mean)?;
        Ok((logits, Saved { embed, stages, last: x, stats, mean }))
    }

    /// Adds the gradients of the parameters; the gradient of the images if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_logits: &Tensor<T>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let Saved { embed, stages, last, stats, mean } = saved;
        let d_mean = self.head.backward(p, g, &mean, d_logits)?;
        let [_, h, w, _] = last.dims("map [B, H, W, C]")?;
        let d_normed = mean_tokens_backward(&d_mean, h * w)?.reshape(last.shape())?;
        let mut d = self.norm.backward(p, g, &last, &stats, &d_normed, None)?;
        drop((last, d_normed));
        for (stage, saved) in self.stages.iter().zip(stages).rev() {
            if let (Some(downsample), Some(merging)) = (&stage.downsample, saved.merging) {
                d = downsample.backward(p, g, merging, &d)?;
            }
            let again = |block: &DilateBlock, _, x| block.forward(p, x);
            d = stack::backward(&stage.blocks, saved.blocks, d, again, |block, _, saved, d| block.backward(p, g, saved, d))?;
        }
        if want_image {
            self.patch_embed.backward(p, g, embed, &d).map(Some)
        } else {
            self.patch_embed.backward_params(p, g, embed, &d)?;
            Ok(None)
        }
    }
}

impl Classifier for DilateFormer {
    type Saved = Saved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Saved<f32>)> {
        let (logits, saved) = self.forward(p, channels_last(images)?, p.training())?;
        Ok((vec![logits], saved))
    }

    fn updates(saved: &mut Saved<f32>) -> Updates<f32> {
        saved.take_updates()
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Saved<f32>, d: &[Tensor<f32>]) -> Result<()> {
        self.backward(p, g, saved, &d[0], false).map(drop)
    }
}

/// Multiply-adds for one image: convolutions, linear maps and attention's two products.
fn macs(config: &Config, size: usize) -> Result<f64> {
    let settings = Settings::from_config(config)?;
    let (model, _) = Layout::build(|names| DilateFormer::new(names, &settings))?;
    let (mut cost, [mut h, mut w]) = model.patch_embed.cost([1, size, size], false)?;
    let mut dim = settings.embed.embed_dim;
    for (&stage, layers) in settings.stages.iter().zip(&model.stages) {
        let block = settings.block(stage, dim).cost([1, h, w])?;
        cost = (0..stage.depth).fold(cost, |cost, _| cost + block);
        if let Some(downsample) = &layers.downsample {
            let (merging, map) = downsample.cost([1, h, w], false)?;
            (cost, [h, w], dim) = (cost + merging, map, 2 * dim);
        }
    }
    Ok((cost.flops / 2 + dim * settings.num_classes) as f64)
}

/// The published networks.
pub static FAMILY: Family = Family {
    op: "model.dilateformer",
    common: r#"{"patch_size": 4, "in_chans": 3, "hidden_dim": 16, "embed_dim": 72, "num_heads": [3, 6, 12, 24], "kernel_size": 3,
        "dilation": [1, 2, 3], "mlp_ratio": 4.0, "qkv_bias": true, "merging_way": "conv3_2", "patch_way": "overlaping",
        "dilate_attention": [true, true, false, false], "downsamples": [true, true, true, false],
        "cpe_per_stage": false, "cpe_per_block": true}"#,
    build: |config| Built::new(|names| DilateFormer::new(names, &Settings::from_config(config)?)),
    at_size: zoo::img_size,
    macs,
    rules: Rules { key: weights::without_counters, resize: weights::fixed, heads: &["head"] },
    variants: &[
        Variant {
            name: "dilateformer_tiny",
            also: &[],
            config: r#"{"depths": [2, 2, 6, 2]}"#,
            eval: Eval::IMAGENET,
            params: Some(17_238_744),
            gmacs: Some(3.162),
        },
        Variant {
            name: "dilateformer_small",
            also: &[],
            config: r#"{"depths": [3, 5, 8, 3]}"#,
            eval: Eval::IMAGENET,
            params: Some(24_057_504),
            gmacs: Some(4.591),
        },
        Variant {
            name: "dilateformer_base",
            also: &[],
            config: r#"{"depths": [4, 8, 10, 3], "embed_dim": 96}"#,
            eval: Eval::IMAGENET,
            params: Some(47_432_376),
            gmacs: Some(9.924),
        },
        Variant {
            name: "dilateformer_micro",
            also: &[],
            config: r#"{"depths": [3, 4, 1], "hidden_dim": 8, "embed_dim": 36, "num_heads": [3, 6, 12], "dilate_attention": [true, true, false],
                "downsamples": [true, true, false], "mlp_ratio": 3.0}"#,
            eval: Eval::SMALL,
            params: None,
            gmacs: None,
        },
    ],
};

/// `model.dilateformer`.
pub struct ModelDilateFormer;

impl Operation for ModelDilateFormer {
    const NAME: &'static str = "model.dilateformer";
    const PAPER: &'static str = "2302.01791 DilateFormer";

    fn sample(rng: &mut Rng) -> Config {
        let (stages, dilations, training) = (rng.between(1, 2), rng.between(1, 2), rng.chance(0.5));
        let mut config = Config::default();
        let way = *rng.pick(&[&"overlaping", &"pointconv", &"nonoverlaping"]);
        let patch = if way == "nonoverlaping" { rng.between(2, 4) } else { 4 };
        // BatchNorm in training wants a few positions wherever it stands, also after a merging of the last stage.
        let side = |rng: &mut Rng| patch * rng.between(4, 5) + rng.below(patch);
        config.set("img_size", vec![side(rng), side(rng)]).set("patch_size", patch).set("in_chans", rng.between(1, 2));
        config.set("num_classes", rng.between(1, 3)).set("embed_dim", 2 * dilations).set("hidden_dim", rng.between(1, 2));
        config.set("depths", (0..stages).map(|_| rng.between(0, 1)).collect::<Vec<_>>());
        config.set("num_heads", vec![dilations; stages]).set("kernel_size", 3);
        config.set("dilation", (0..dilations).map(|_| rng.between(1, 3)).collect::<Vec<_>>());
        config.set("mlp_ratio", rng.range(0.5, 2.0)).set("qkv_bias", rng.chance(0.7));
        config.set("merging_way", rng.pick(&["conv3_2", "conv2_2"])).set("patch_way", way);
        config.set("dilate_attention", (0..stages).map(|_| rng.chance(0.5)).collect::<Vec<_>>());
        config.set("downsamples", (0..stages).map(|i| i + 1 < stages || (stages == 1 && rng.chance(0.3))).collect::<Vec<_>>());
        config.set("cpe_per_stage", rng.chance(0.3)).set("cpe_per_block", rng.chance(0.7)).set("training", training);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let ([h, w], batch) = (config.pair("img_size")?, draw.size("batch", 1, 2));
        draw.normal("x", [batch, config.positive("in_chans")?, h, w]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let training = run.config().bool_or("training", false)?;
        let (model, layout) = Layout::build(|names| DilateFormer::new(names, &Settings::from_config(run.config())?))?;
        let p = run.params(&layout)?;
        let (logits, mut saved) = model.forward(&p, channels_last(&run.input("x")?)?, training)?;
        run.output("logits", &logits);
        run.after_buffers(&layout, saved.take_updates());
        if run.backward() {
            let mut g = run.zero_grads(&p);
            if let Some(d_image) = model.backward(&p, &mut g, saved, &run.cotangent("logits", logits.shape())?, true)? {
                run.grad_input("x", &channels_first(&d_image)?);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
