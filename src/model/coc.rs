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
use super::network::{Built, Classifier};
use super::stack::{self, Kept};
use super::swin_ops::{mean_tokens, mean_tokens_backward};
use super::vit_block::hidden_width;
use super::weights::{self, Rules};
use super::zoo::{Eval, Family, Variant};
use crate::attention::cluster;
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::nn::points::{CocEmbed, point_reducer};
use crate::nn::{Conv2d, DropPath, GroupNorm, Layout, Linear, Names, Params, group_norm, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Tensor};

/// The blocks of a stage.
#[derive(Clone, Copy, Debug)]
pub struct StageSettings {
    /// How many.
    pub layers: usize,
    /// Each of them; drop path is the network's.
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
    /// Drop path of the last block; it grows linearly from 0 over all blocks.
    pub drop_path: f64,
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
                drop_path: 0.0,
            },
            downsample: downsamples[i],
        };
        Ok(Settings {
            embed: CocEmbed::shape(config)?,
            down: [config.usize_or("down_patch_size", 3)?, config.usize_or("down_stride", 2)?, config.usize_or("down_pad", 1)?],
            stages: (0..count).map(stage).collect(),
            num_classes: config.positive("num_classes")?,
            drop_path: config.f64_or("drop_path_rate", 0.0)?,
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
    blocks: Vec<Kept<T, cluster_block::Saved<T>>>,
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
    /// The cluster of every point and head, `[B, H, W, heads]` for each stage and block that was kept: to look at.
    pub fn assignments(&self) -> Vec<Vec<IntTensor>> {
        let of = |kept: &Kept<T, cluster_block::Saved<T>>| match kept {
            Kept::Saved(block) => Some(block.cluster().assignment()),
            _ => None,
        };
        self.stages.iter().map(|stage| stage.blocks.iter().filter_map(of).collect()).collect()
    }
}

impl Coc {
    /// Registers `patch_embed`, `network.{i}`, `norm`, `head`.
    pub fn new(names: &mut Names, settings: &Settings) -> Result<Self> {
        let width = |s: usize| settings.stages[s].block.cluster.dim;
        let embed = CocEmbed::new(names, width(0), settings.embed)?;
        let (mut stages, last) = (Vec::new(), settings.stages.len() - 1);
        let (mut index, depth) = (0, settings.stages.iter().map(|stage| stage.layers).sum());
        for (s, stage) in settings.stages.iter().enumerate() {
            let mut at = names.at(format!("network.{}", 2 * s));
            let mut block = |j| {
                let drop_path = DropPath::linear(settings.drop_path, index + j, depth);
                ClusterBlock::new(&mut at.at(format!("{j}")), cluster_block::Settings { drop_path, ..stage.block })
            };
            let blocks = (0..stage.layers).map(&mut block).collect::<Result<_>>()?;
            index += stage.layers;
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
        for (i, stage) in self.stages.iter().enumerate() {
            let (y, blocks) = stack::forward(p, &stage.blocks, x, |block, _, x| block.forward(p, x))?;
            p.show(format!("stages.{i}"), &y);
            x = y;
            let mut before = None;
            if let Some(reducer) = &stage.reducer {
                let y = reducer.forward(p, &x)?;
                before = Some(std::mem::replace(&mut x, y));
            }
            stages.push(StageSaved { blocks, before });
        }
        let (normed, stats) = self.norm.forward(p, &x)?;
        let [batch, h, w, c] = x.dims("map [B, H, W, C]")?;
        if h * w == 0 {
            return Err(Error::shape("map of the last stage", "a point at least", x.shape()));
        }
        let mean = mean_tokens(&normed.reshape([batch, h * w, c])?)?;
        p.show("pooled", &mean);
        let logits = self.head.forward(p, &mean)?;
        Ok((logits, Saved { image, stages, last: x, stats, mean }))
    }

    /// Adds the gradients of the parameters; the gradient of the images `[B, 3, H, W]` if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_logits: &Tensor<T>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
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
            let again = |block: &ClusterBlock, _, x| block.forward(p, x);
            d = stack::backward(&stage.blocks, saved.blocks, d, again, |block, _, saved, d| block.backward(p, g, saved, d))?;
        }
        if want_image {
            self.embed.backward(p, g, &image, &d).map(Some)
        } else {
            self.embed.backward_params(g, &image, &d)?;
            Ok(None)
        }
    }
}

impl Classifier for Coc {
    type Saved = Saved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Saved<f32>)> {
        let (logits, saved) = self.forward(p, images)?;
        Ok((vec![logits], saved))
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Saved<f32>, d: &[Tensor<f32>]) -> Result<()> {
        self.backward(p, g, saved, &d[0], false).map(drop)
    }
}

/// Multiply-adds for one image: convolutions, linear maps, and three products of every point with every centre of its region.
fn macs(config: &Config, size: usize) -> Result<f64> {
    let settings = Settings::from_config(config)?;
    let (model, _) = Layout::build(|names| Coc::new(names, &settings))?;
    let flops = |conv: &Conv2d, side: usize| -> Result<(f64, usize)> {
        Ok((conv.cost([1, side, side])?.flops as f64 / 2.0, conv.output_size([side, side])?[0]))
    };
    let (cost, [mut side, _]) = model.embed.cost([1, size, size])?;
    let mut macs = cost.flops as f64 / 2.0;
    let mut width = 0;
    for (stage, layers) in settings.stages.iter().zip(&model.stages) {
        let cluster = &stage.block.cluster;
        let (points, inner, centres) = (side * side, cluster.heads * cluster.head_dim, cluster.proposals[0] * cluster.proposals[1]);
        width = cluster.dim;
        let per_point = 3 * inner * (width + centres) + 2 * width * hidden_width(width, stage.block.mlp_ratio)?;
        macs += (stage.layers * points * per_point) as f64;
        if let Some(reducer) = &layers.reducer {
            let (reduced, next) = flops(reducer, side)?;
            macs += reduced;
            side = next;
        }
    }
    Ok(macs + (width * settings.num_classes) as f64)
}

/// The published networks, re-trained by the authors; crop 0.9 for all.
pub static FAMILY: Family = Family {
    op: "model.coc",
    common: r#"{"mlp_ratios": [8, 8, 4, 4], "downsamples": [true, true, true, true], "in_patch_size": 4, "in_stride": 4, "in_pad": 0,
        "down_patch_size": 3, "down_stride": 2, "down_pad": 1, "use_layer_scale": true,
        "proposal_w": [2, 2, 2, 2], "proposal_h": [2, 2, 2, 2], "fold_w": [8, 4, 2, 1], "fold_h": [8, 4, 2, 1]}"#,
    build: |config| Built::new(|names| Coc::new(names, &Settings::from_config(config)?)),
    at_size: |_, _| (),
    macs,
    rules: Rules { key: weights::keep, resize: weights::fixed, heads: &["head"] },
    variants: &[
        Variant {
            name: "coc_tiny",
            also: &[],
            config: r#"{"layers": [3, 4, 5, 2], "embed_dims": [32, 64, 196, 320], "heads": [4, 4, 8, 8], "head_dim": [24, 24, 24, 24]}"#,
            eval: Eval::IMAGENET,
            params: Some(5_570_584),
            gmacs: Some(1.104),
        },
        Variant {
            name: "coc_tiny2",
            also: &[],
            config: r#"{"layers": [3, 4, 5, 2], "embed_dims": [32, 64, 196, 320], "heads": [4, 4, 8, 8], "head_dim": [24, 24, 24, 24],
                "proposal_w": [4, 2, 7, 4], "proposal_h": [4, 2, 7, 4], "fold_w": [7, 7, 1, 1], "fold_h": [7, 7, 1, 1]}"#,
            eval: Eval::IMAGENET,
            params: Some(5_570_584),
            gmacs: Some(1.162),
        },
        Variant {
            name: "coc_tiny_plain",
            also: &[],
            config: r#"{"layers": [3, 4, 5, 2], "embed_dims": [32, 64, 196, 320], "heads": [4, 4, 8, 8], "head_dim": [24, 24, 24, 24],
                "proposal_w": [4, 4, 2, 2], "proposal_h": [4, 4, 2, 2], "fold_w": [1, 1, 1, 1], "fold_h": [1, 1, 1, 1]}"#,
            eval: Eval::IMAGENET,
            params: Some(5_570_584),
            gmacs: Some(1.147),
        },
        Variant {
            name: "coc_small",
            also: &[],
            config: r#"{"layers": [2, 2, 6, 2], "embed_dims": [64, 128, 320, 512], "heads": [4, 4, 8, 8], "head_dim": [32, 32, 32, 32]}"#,
            eval: Eval::IMAGENET,
            params: Some(14_657_024),
            gmacs: Some(2.785),
        },
        Variant {
            name: "coc_medium",
            also: &[],
            config: r#"{"layers": [4, 4, 12, 4], "embed_dims": [64, 128, 320, 512], "heads": [6, 6, 12, 12], "head_dim": [32, 32, 32, 32]}"#,
            eval: Eval::IMAGENET,
            params: Some(29_290_520),
            gmacs: Some(5.925),
        },
        Variant {
            name: "coc_base_dim64",
            also: &[],
            config: r#"{"layers": [6, 6, 24, 6], "embed_dims": [64, 128, 320, 512], "heads": [8, 8, 16, 16], "head_dim": [32, 32, 32, 32]}"#,
            eval: Eval::IMAGENET,
            params: Some(54_231_100),
            gmacs: Some(11.189),
        },
        Variant {
            name: "coc_base_dim96",
            also: &[],
            config: r#"{"layers": [4, 4, 12, 4], "embed_dims": [96, 192, 384, 768], "heads": [8, 8, 16, 16], "head_dim": [32, 32, 32, 32]}"#,
            eval: Eval::IMAGENET,
            params: Some(53_054_904),
            gmacs: Some(10.883),
        },
        Variant {
            name: "coc_micro",
            also: &[],
            config: r#"{"layers": [2, 2, 2], "embed_dims": [32, 64, 128], "mlp_ratios": [4, 4, 4], "heads": [4, 4, 8], "head_dim": [16, 16, 16],
                "downsamples": [true, true, true], "in_patch_size": 4, "in_stride": 2, "in_pad": 1, "use_layer_scale": false,
                "proposal_w": [2, 2, 2], "proposal_h": [2, 2, 2], "fold_w": [4, 2, 1], "fold_h": [4, 2, 1]}"#,
            eval: Eval::SMALL,
            params: None,
            gmacs: None,
        },
    ],
};

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
            if let Some(d_image) = model.backward(&p, &mut g, saved, &run.cotangent("logits", logits.shape())?, true)? {
                run.grad_input("x", &d_image);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
