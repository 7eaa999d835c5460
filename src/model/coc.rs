//! `model.coc`: Context Cluster, an image as a set of points (arXiv 2303.01494).
//!
//! `x = patch_embed([image; coordinates])`; per stage its blocks `network.{2s}.{j}`, and between stages, if the map or the width changes, a
//! point reducer `network.{2s+1}`; GroupNorm `norm`, the mean over all points, `head`. Proposals and folds are no parameters: a checkpoint
//! loads under any of them. Maps must divide into the folds; networks without folds take any size.
//!
//! | variant | layers | widths | MLP | heads | head width | folds |
//! | --- | --- | --- | --- | --- | --- | --- |
//! | tiny | 3, 4, 5, 2 | 32, 64, 196, 320 | 8, 8, 4, 4 | 4, 4, 8, 8 | 24 | 8, 4, 2, 1 |
//! | small | 2, 2, 6, 2 | 64, 128, 320, 512 | 8, 8, 4, 4 | 4, 4, 8, 8 | 32 | 8, 4, 2, 1 |
//! | medium | 4, 4, 12, 4 | 64, 128, 320, 512 | 8, 8, 4, 4 | 6, 6, 12, 12 | 32 | 8, 4, 2, 1 |

use super::cluster_block::{self, ClusterBlock, NORM_EPS};
use super::swin_ops::{mean_tokens, mean_tokens_backward};
use crate::attention::cluster;
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::nn::points::{CocEmbed, point_reducer};
use crate::nn::{Conv2d, GroupNorm, Layout, Linear, Names, Params, group_norm, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Tensor};

/// The blocks of a stage.
#[derive(Clone, Copy, Debug)]
pub struct StageSettings {
    /// How many.
    pub layers: usize,
    /// Each of them.
    pub block: cluster_block::Settings,
    /// A point reducer follows, if there is a next stage.
    pub downsample: bool,
}

/// What a CoC is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Side, stride and padding of the embedding.
    pub embed: [usize; 3],
    /// Side, stride and padding of the point reducers.
    pub down: [usize; 3],
    /// The stages.
    pub stages: Vec<StageSettings>,
    /// Classes.
    pub num_classes: usize,
}

impl Settings {
    /// From a configuration: one entry per stage in every list.
    pub fn from_config(config: &Config) -> Result<Self> {
        let layers = config.usizes("layers")?;
        let count = layers.len();
        if !(1..=16).contains(&count) || layers.iter().any(|&n| n > 1024) {
            return Err(Error::config("layers", format!("expected 1 to 16 stages of at most 1024 blocks, found {layers:?}")));
        }
        let per_stage = |key: &str, len: usize| match len == count {
            true => Ok(()),
            false => Err(Error::config(key, format!("expected one for each of the {count} stages, found {len}"))),
        };
        let list = |key: &str| -> Result<Vec<usize>> {
            let list = config.usizes(key)?;
            per_stage(key, list.len())?;
            Ok(list)
        };
        let (dims, heads, head_dim) = (list("embed_dims")?, list("heads")?, list("head_dim")?);
        let (proposals, folds) = ([list("proposal_w")?, list("proposal_h")?], [list("fold_w")?, list("fold_h")?]);
        let ratios = config.f64s("mlp_ratios")?;
        per_stage("mlp_ratios", ratios.len())?;
        let downsamples: Option<Vec<bool>> =
            config.get("downsamples").and_then(|v| v.as_array()).and_then(|list| list.iter().map(|v| v.as_bool()).collect());
        let downsamples = downsamples.ok_or_else(|| Error::config("downsamples", "expected a list of truth values"))?;
        per_stage("downsamples", downsamples.len())?;
        let layer_scale = config.bool_or("use_layer_scale", true)?;
        let stage = |i: usize| StageSettings {
            layers: layers[i],
            block: cluster_block::Settings {
                cluster: cluster::Settings {
                    dim: dims[i],
                    out_dim: dims[i],
                    proposals: [proposals[0][i], proposals[1][i]],
                    folds: [folds[0][i], folds[1][i]],
                    heads: heads[i],
                    head_dim: head_dim[i],
                    return_center: false,
                    count: false,
                },
                mlp_ratio: ratios[i],
                layer_scale,
            },
            downsample: downsamples[i],
        };
        Ok(Settings {
            embed: CocEmbed::shape(config)?,
            down: [config.usize_or("down_patch_size", 3)?, config.usize_or("down_stride", 2)?, config.usize_or("down_pad", 1)?],
            stages: (0..count).map(stage).collect(),
            num_classes: config.positive("num_classes")?,
        })
    }
}

#[derive(Clone, Debug)]
struct Stage {
    blocks: Vec<ClusterBlock>,
    reducer: Option<Conv2d>,
}

/// A Context Cluster network.
#[derive(Clone, Debug)]
pub struct Coc {
    embed: CocEmbed,
    stages: Vec<Stage>,
    norm: GroupNorm,
    head: Linear,
}

struct StageSaved<T: Float> {
    blocks: Vec<cluster_block::Saved<T>>,
    /// What the point reducer read.
    before: Option<Tensor<T>>,
}

/// What [`Coc::backward`] needs.
pub struct Saved<T: Float> {
    image: Tensor<T>,
    stages: Vec<StageSaved<T>>,
    last: Tensor<T>,
    stats: group_norm::Stats<T>,
    mean: Tensor<T>,
}

impl<T: Float> Saved<T> {
    /// The cluster of every point and head, `[B, H, W, heads]` for each stage and block: to look at.
    pub fn assignments(&self) -> Vec<Vec<IntTensor>> {
        self.stages.iter().map(|stage| stage.blocks.iter().map(|block| block.cluster().assignment()).collect()).collect()
    }
}

impl Coc {
    /// Registers `patch_embed`, `network.{i}`, `norm`, `head`.
    pub fn new(names: &mut Names, settings: &Settings) -> Result<Self> {
        let width = |s: usize| settings.stages[s].block.cluster.dim;
        let embed = CocEmbed::new(names, width(0), settings.embed)?;
        let (mut stages, last) = (Vec::new(), settings.stages.len() - 1);
        for (s, stage) in settings.stages.iter().enumerate() {
            let mut at = names.at(format!("network.{}", 2 * s));
            let blocks = (0..stage.layers).map(|j| ClusterBlock::new(&mut at.at(j.to_string()), stage.block)).collect::<Result<_>>()?;
            let reducer = match s < last && (stage.downsample || width(s) != width(s + 1)) {
                true => Some(point_reducer(names.at(format!("network.{}", 2 * s + 1)), [width(s), width(s + 1)], settings.down)?),
                false => None,
            };
            stages.push(Stage { blocks, reducer });
        }
        let norm = GroupNorm::new(names.at("norm"), 1, width(last), NORM_EPS)?;
        let head = Linear::new(names.at("head"), width(last), settings.num_classes, true, normal_02(0, 0));
        Ok(Coc { embed, stages, norm, head })
    }

    /// Logits `[B, classes]` of images `[B, 3, H, W]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let (mut x, image) = self.embed.forward(p, image)?;
        let mut stages = Vec::with_capacity(self.stages.len());
        for stage in &self.stages {
            let mut saved = StageSaved { blocks: Vec::with_capacity(stage.blocks.len()), before: None };
            for block in &stage.blocks {
                let (y, s) = block.forward(p, x)?;
                saved.blocks.push(s);
                x = y;
            }
            if let Some(reducer) = &stage.reducer {
                let y = reducer.forward(p, &x)?;
                saved.before = Some(std::mem::replace(&mut x, y));
            }
            stages.push(saved);
        }
        let (normed, stats) = self.norm.forward(p, &x)?;
        let [batch, h, w, c] = x.dims("map [B, H, W, C]")?;
        if h * w == 0 {
            return Err(Error::shape("map of the last stage", "a point at least", x.shape()));
        }
        let mean = mean_tokens(&normed.reshape([batch, h * w, c])?)?;
        let logits = self.head.forward(p, &mean)?;
        Ok((logits, Saved { image, stages, last: x, stats, mean }))
    }

    /// The gradient of the images `[B, 3, H, W]`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, d_logits: &Tensor<T>) -> Result<Tensor<T>> {
        let Saved { image, stages, last, stats, mean } = saved;
        let d_mean = self.head.backward(p, g, &mean, d_logits)?;
        let [_, h, w, _] = last.dims("map [B, H, W, C]")?;
        let d_normed = mean_tokens_backward(&d_mean, h * w)?.reshape(last.shape())?;
        let mut d = self.norm.backward(p, g, &last, &stats, &d_normed)?;
        drop((last, d_normed));
        for (stage, saved) in self.stages.iter().zip(stages).rev() {
            if let (Some(reducer), Some(before)) = (&stage.reducer, saved.before) {
                d = reducer.backward(p, g, &before, &d)?;
            }
            for (block, saved) in stage.blocks.iter().zip(saved.blocks).rev() {
                d = block.backward(p, g, saved, &d)?;
            }
        }
        self.embed.backward(p, g, &image, &d)
    }
}

/// `model.coc`.
pub struct ModelCoc;

impl Operation for ModelCoc {
    const NAME: &'static str = "model.coc";
    const PAPER: &'static str = "2303.01494 CoC";

    fn sample(rng: &mut Rng) -> Config {
        let stages = rng.between(1, 2);
        let mut config = Config::default();
        let mut list = |low: usize, high: usize| -> Vec<usize> { (0..stages).map(|_| rng.between(low, high)).collect() };
        config.set("layers", list(0, 2)).set("embed_dims", list(1, 4)).set("heads", list(1, 2)).set("head_dim", list(2, 3));
        config.set("proposal_w", list(1, 2)).set("proposal_h", list(1, 2)).set("fold_w", list(1, 2)).set("fold_h", list(1, 2));
        config.set("mlp_ratios", (0..stages).map(|_| rng.range(1.0, 2.0)).collect::<Vec<_>>());
        // Without a reducer the widths must agree, which here only chance does: then there is one anyway.
        config.set("downsamples", (0..stages).map(|_| rng.chance(0.7)).collect::<Vec<_>>());
        let stride = rng.between(1, 3);
        config.set("in_patch_size", stride).set("in_stride", stride).set("in_pad", 0);
        config.set("down_patch_size", rng.between(2, 3)).set("down_stride", 2).set("down_pad", 1);
        config.set("num_classes", rng.between(1, 3)).set("use_layer_scale", rng.chance(0.5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        // Every stage must divide into two by two regions: 2 and 4 do with side 2, stride 2, padding 1 → 2, 3 do not; so without folds
        // any size, else the first one that suits.
        let batch = draw.size("batch", 1, 2);
        let settings = Settings::from_config(config)?;
        let (model, _) = Layout::build(|names| Coc::new(names, &settings))?;
        let suits = |map: [usize; 2]| -> bool {
            let Ok((_, mut map)) = model.embed.cost([1, map[0], map[1]]) else { return false };
            settings.stages.iter().zip(&model.stages).all(|(stage, layers)| {
                let fits = stage.layers == 0 || stage.block.cost([1, map[0], map[1]]).is_ok();
                if let Some(reducer) = &layers.reducer {
                    match reducer.output_size(map) {
                        Ok(next) => map = next,
                        Err(_) => return false,
                    }
                }
                fits
            })
        };
        let mut side = || draw.rng.between(4, 9);
        let first = [side(), side()];
        let sizes = (0..256).map(|i| [4 + (first[0] + i / 16) % 16, 4 + (first[1] + i % 16) % 16]);
        let [h, w] = sizes.into_iter().find(|&map| suits(map)).unwrap_or([8, 8]);
        draw.normal("x", [batch, 3, h, w]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (model, layout) = Layout::build(|names| Coc::new(names, &Settings::from_config(run.config())?))?;
        let p = run.params(&layout)?;
        let (logits, saved) = model.forward(&p, &run.input("x")?)?;
        run.output("logits", &logits);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let d_image = model.backward(&p, &mut g, saved, &run.cotangent("logits", logits.shape())?)?;
            run.grad_input("x", &d_image);
            run.grad_params(&g);
        }
        Ok(())
    }
}
