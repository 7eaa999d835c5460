//! `model.spvit_swin`: a Swin Transformer whose layers are window attention, convolutions or nothing (SPViT, arXiv 2111.11802).
//!
//! A finished attention layer attends inside shifted windows; a finished convolution sees the whole map. In a search all branches see the
//! windows of the rolled map, with the standard shift mask, and convolutions stay inside a window.

use super::network::{Built, Classifier};
use super::spvit_block::{Arrangement, Block, BlockSaved, Noise, Search, SearchLoss, finished_macs, key, sample_layer};
use super::stack::{self, Kept};
use super::swin::{MergingSaved, PatchMerging, clip_window, dense_cells};
use super::swin_ops::{mean_tokens, mean_tokens_backward};
use super::weights::{self, Rules};
use super::zoo::{Eval, Family, Variant};
use crate::attention::gaussian_mask_swin::window_groups;
use crate::attention::single_path::{Mode, Settings};
use crate::attention::window::shifted_windows;
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::attention::Groups;
use crate::model::vit_block::hidden_width;
use crate::nn::batch_norm::Updates;
use crate::nn::spvit_gate::{FlopsLoss, Gates, LayerFlops, noise};
use crate::nn::{DropPath, Init, LayerNorm, Layout, Linear, Names, Params, PatchEmbed, Stats, normal_02, patch_embed};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// One block: what its layer does, and where.
#[derive(Clone, Copy, Debug)]
struct BlockPlan {
    mode: Mode,
    map: [usize; 2],
    dim: usize,
    heads: usize,
    window: usize,
    shift: usize,
    hidden: usize,
}

impl BlockPlan {
    /// How the tokens of a batch reach the layer.
    fn arrangement<T: Float>(&self, batch: usize) -> Result<Arrangement<T>> {
        let ([h, w], n, side) = (self.map, self.map[0] * self.map[1], self.window * self.window);
        let whole = |groups| Arrangement { index: None, attend: [batch, n], groups, mask: None, map: [batch, h, w] };
        match self.mode {
            Mode::Msa => Ok(whole(shifted_windows(self.map, [self.window; 2], [self.shift; 2], false)?)),
            Mode::Skip | Mode::Conv(_) => Ok(whole(Groups::default())),
            Mode::Search => {
                let across = w / self.window;
                // Row and column in the rolled map of place i of the windows.
                let at = |i: usize| {
                    let (window, inner) = (i / side, i % side);
                    let (y, x) = (window / across * self.window + inner / self.window, window % across * self.window + inner % self.window);
                    [y, x]
                };
                let index = (0..n).map(|i| {
                    let [y, x] = at(i);
                    ((y + self.shift) % h * w + (x + self.shift) % w) as u32
                });
                let strip = |at: usize, len: usize| usize::from(at >= len - self.window) + usize::from(at >= len - self.shift);
                let label = |i: usize| {
                    let [y, x] = at(i);
                    3 * strip(y, h) + strip(x, w)
                };
                let entry = |i: usize| {
                    let (window, query, key) = (i / (side * side), i / side % side, i % side);
                    let apart = label(window * side + query) != label(window * side + key);
                    T::from_f64(if apart { -100.0 } else { 0.0 })
                };
                let mask = (self.shift > 0).then(|| Tensor::from_fn([n / side, side, side], entry));
                Ok(Arrangement {
                    index: Some(index.collect()),
                    attend: [1, batch * n],
                    groups: window_groups(batch * n / side, side),
                    mask,
                    map: [batch * n / side, self.window, self.window],
                })
            }
        }
    }
}

/// The keys of `model.spvit_swin`.
struct ModelSettings {
    search: Search,
    image: usize,
    patch: usize,
    chans: usize,
    classes: usize,
    dim: usize,
    /// The blocks of every stage.
    stages: Vec<Vec<BlockPlan>>,
}

impl ModelSettings {
    fn from_config(config: &Config) -> Result<Self> {
        let search = Search::from_config(config, 100.0, 1e-5)?;
        let (image, patch, dim) = (config.positive("image_size")?, config.positive("patch_size")?, config.positive("embed_dim")?);
        let (depths, heads, window) = (config.usizes("depths")?, config.usizes("num_heads")?, config.positive("window_size")?);
        let blocks = depths.iter().fold(0usize, |sum, &depth| sum.saturating_add(depth));
        if depths.is_empty() || depths.len() > 16 || heads.len() != depths.len() || blocks > 1 << 10 || !image.is_multiple_of(patch) {
            let message = format!("expected as many heads as stages, and whole patches, found {depths:?}, {heads:?}, {image}/{patch}");
            return Err(Error::config("depths", message));
        }
        let indicators = config.get("msa_indicators").and_then(serde_json::Value::as_array);
        let kept = if search.search { None } else { Some(config.usizes("ffn_hidden")?) };
        if kept.as_ref().is_some_and(|kept| kept.len() != blocks || kept.contains(&0)) {
            return Err(Error::config("ffn_hidden", format!("expected {blocks} positive widths, found {kept:?}")));
        }
        let (mut stages, mut side, mut width, mut number) = (Vec::new(), image / patch, dim, 0);
        for (l, (&depth, &heads)) in depths.iter().zip(&heads).enumerate() {
            if l > 0 {
                if !side.is_multiple_of(2) {
                    return Err(Error::config("image_size", format!("expected an even map before every merging, found {side}×{side}")));
                }
                (side, width) = (side / 2, width.saturating_mul(2));
            }
            if heads == 0 || !width.is_multiple_of(heads) || side == 0 {
                return Err(Error::config("num_heads", format!("expected divisors of the widths, found {heads} for {width}")));
            }
            let of_stage = indicators.and_then(|list| list.get(l)).and_then(serde_json::Value::as_array);
            let mut plans = Vec::new();
            for j in 0..depth {
                let shift = if j % 2 == 0 { 0 } else { window / 2 };
                let ([own, _], [shift, _]) = clip_window([side; 2], window, shift, false);
                let mode = search.mode(of_stage.and_then(|list| list.get(j)))?;
                if !side.is_multiple_of(own) {
                    return Err(Error::config("window_size", format!("expected a divisor of the map {side}×{side}, found {own}")));
                }
                let hidden = match &kept {
                    Some(kept) => kept[number],
                    None => hidden_width(width, config.f64("mlp_ratio")?)?,
                };
                plans.push(BlockPlan { mode, map: [side; 2], dim: width, heads, window: own, shift, hidden });
                number += 1;
            }
            stages.push(plans);
        }
        let (chans, classes) = (config.positive("in_chans")?, config.positive("num_classes")?);
        Ok(ModelSettings { search, image, patch, chans, classes, dim, stages })
    }

    fn blocks(&self) -> impl Iterator<Item = &BlockPlan> {
        self.stages.iter().flatten()
    }

    /// The width and the side of the map of a stage.
    fn stage(&self, l: usize) -> (usize, usize) {
        (self.dim << l, (self.image / self.patch) >> l)
    }

    fn loss(&self, target: f64, lambda: f64) -> FlopsLoss {
        let layers = self.blocks().map(|b| LayerFlops::swin(b.map[0] * b.map[1], b.dim, b.heads, b.window * b.window)).collect();
        let side = self.image / self.patch;
        let (tokens, e) = ((side * side) as f64, self.dim as f64);
        let mut fixed = tokens * e * (self.chans * self.patch * self.patch) as f64 + tokens * e;
        fixed += self.blocks().map(|b| 2.0 * (b.dim * b.map[0] * b.map[1]) as f64).fold(0.0, |sum, x| sum + x);
        for l in 0..self.stages.len() - 1 {
            let (c, side) = self.stage(l);
            let (c, cells) = (c as f64, ((side / 2) * (side / 2)) as f64);
            fixed += (side * side) as f64 * c + cells * 8.0 * c * c;
        }
        let (features, _) = self.stage(self.stages.len() - 1);
        fixed += ((features * side * side) >> self.stages.len()) as f64 + (features * self.classes) as f64;
        FlopsLoss { layers, fixed, target, lambda }
    }
}

/// SPViT-Swin.
struct SpvitSwin {
    embed: PatchEmbed,
    stages: Vec<(Vec<Block>, Option<PatchMerging>)>,
    norm: LayerNorm,
    head: Linear,
    settings: ModelSettings,
}

struct Saved<T: Float> {
    embed: patch_embed::Saved<T>,
    stages: Vec<Vec<Kept<T, BlockSaved<T>>>>,
    updates: Updates<T>,
    gates: Vec<(Gates, Gates)>,
    mergings: Vec<MergingSaved<T>>,
    last: Tensor<T>,
    stats: Stats<T>,
    pooled: Tensor<T>,
}

impl SpvitSwin {
    fn new(names: &mut Names, settings: ModelSettings) -> Result<Self> {
        let Search { alpha, norm_eps, own_conv, .. } = settings.search;
        let (image, dim) = ([settings.image; 2], settings.dim);
        let embed = PatchEmbed::new(names.at("patch_embed"), image, settings.patch, settings.chans, dim, Some(norm_eps), Init::NORMAL_02)?;
        let (mut stages, mut index, depth) = (Vec::new(), 0, settings.blocks().count());
        for (l, plans) in settings.stages.iter().enumerate() {
            let mut blocks = Vec::new();
            for (j, plan) in plans.iter().enumerate() {
                let BlockPlan { mode, dim, heads, window, hidden, .. } = *plan;
                let layer = Settings { dim, heads, mode, alpha, qkv_bias: true, class: false, window: Some(window), own_conv };
                let drop_path = DropPath::linear(settings.search.drop_path, index, depth);
                blocks.push(Block::new(&mut names.at(format!("layers.{l}.blocks.{j}")), layer, hidden, norm_eps, drop_path)?);
                index += 1;
            }
            let merges = l + 1 < settings.stages.len();
            let (width, _) = settings.stage(l);
            let merging = merges.then(|| PatchMerging::new(&mut names.at(format!("layers.{l}.downsample")), width, norm_eps, normal_02));
            stages.push((blocks, merging));
        }
        let (width, _) = settings.stage(settings.stages.len() - 1);
        let norm = LayerNorm::new(names.at("norm"), width, norm_eps);
        let head = Linear::new(names.at("head"), width, settings.classes, true, normal_02(width, width));
        Ok(SpvitSwin { embed, stages, norm, head, settings })
    }

    fn cells(&self, l: usize) -> Result<Vec<u32>> {
        dense_cells([self.settings.stage(l).1; 2], false)
    }

    fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, noises: &[Noise<T>]) -> Result<(Tensor<T>, Saved<T>)> {
        let (mut x, embed) = self.embed.forward(p, image, None)?;
        let [batch, _, _] = x.dims::<3>("patches")?;
        let (mut stages, mut mergings, mut updates, mut gates) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (training, mut before) = (self.settings.search.trains(p), 0);
        for (l, (stage, merging)) in self.stages.iter().enumerate() {
            let (y, kept) = stack::forward(p, stage, x, |block, j, x| {
                let noise = noises.get(before + j).copied().unwrap_or_default();
                let (y, mut saved) = block.forward(p, &x, &self.settings.stages[l][j].arrangement(batch)?, training, noise)?;
                updates.extend(saved.take_updates());
                gates.extend(saved.gates());
                Ok((y, saved))
            })?;
            before += stage.len();
            p.show(format!("stages.{l}"), &y);
            stages.push(kept);
            x = y;
            if let Some(merging) = merging {
                let (y, saved) = merging.forward(p, &x, &self.cells(l)?)?;
                mergings.push(saved);
                x = y;
            }
        }
        let (normed, stats) = self.norm.forward(p, &x)?;
        let pooled = mean_tokens(&normed)?;
        p.show("pooled", &pooled);
        Ok((self.head.forward(p, &pooled)?, Saved { embed, stages, updates, gates, mergings, last: x, stats, pooled }))
    }

    /// What the patch embedding saved, and the gradient of its output.
    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_logits: &Tensor<T>,
        d_expected: &[([T; 3], Vec<T>)],
    ) -> Result<(patch_embed::Saved<T>, Tensor<T>)> {
        let Saved { embed, stages, mut mergings, last, stats, pooled, .. } = saved;
        let [batch, n, _] = last.dims("tokens")?;
        let d_pooled = self.head.backward(p, g, &pooled, d_logits)?;
        let mut d = self.norm.backward(p, g, &last, &stats, &mean_tokens_backward(&d_pooled, n)?, None)?;
        let mut before = self.settings.blocks().count();
        for ((l, (stage, merging)), kept) in self.stages.iter().enumerate().zip(stages).rev() {
            if let (Some(merging), Some(saved)) = (merging, merging.as_ref().and_then(|_| mergings.pop())) {
                d = merging.backward(p, g, saved, &self.cells(l)?, &d)?;
            }
            before -= stage.len();
            let (plans, training) = (&self.settings.stages[l], self.settings.search.trains(p));
            d = stack::backward(
                stage,
                kept,
                d,
                // Only finished networks are recomputed: they have no noise.
                |block, j, x| block.forward(p, &x, &plans[j].arrangement(batch)?, training, [None, None]),
                |block, j, saved, d| block.backward(p, g, saved, &plans[j].arrangement(batch)?, d, d_expected.get(before + j)),
            )?;
        }
        Ok((embed, d))
    }
}

impl Classifier for SpvitSwin {
    type Saved = Saved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Saved<f32>)> {
        let (logits, saved) = self.forward(p, images, &[])?;
        Ok((vec![logits], saved))
    }

    fn updates(saved: &mut Saved<f32>) -> Updates<f32> {
        std::mem::take(&mut saved.updates)
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Saved<f32>, d: &[Tensor<f32>]) -> Result<()> {
        let (embed, d) = self.backward(p, g, saved, &d[0], &[])?;
        self.embed.backward_params(p, g, &embed, &d).map(drop)
    }
}

/// The finished Swins, as fine-tuned and (`_folded`) with their convolutions made plain.
pub static FAMILY: Family = Family {
    op: "model.spvit_swin",
    common: r#"{"patch_size": 4, "in_chans": 3, "embed_dim": 96, "num_heads": [3, 6, 12, 24], "window_size": 7, "mlp_ratio": 4.0,
        "mode": "finetune"}"#,
    build: |config| {
        let settings = ModelSettings::from_config(config)?;
        settings.search.finished()?;
        Built::new(|names| SpvitSwin::new(names, settings))
    },
    at_size: |config, size| {
        config.set("image_size", size);
    },
    macs: |config, _| {
        let settings = ModelSettings::from_config(config)?;
        Ok(finished_macs(&settings.loss(0.0, 0.0), settings.blocks().map(|b| (b.mode, b.hidden))))
    },
    rules: Rules { key, resize: weights::fixed, heads: &["head"] },
    variants: &[
        Variant {
            name: "spvit_swin_t_l28_t32",
            also: &[],
            config: r#"{"depths": [2, 2, 6, 2],
                "msa_indicators": [[[1,0,0], [0,0,0]],
                    [[1,0,0], [0,0,0]],
                    [[1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1]],
                    [[1,1,1], [1,1,1]]],
                "ffn_hidden": [186, 152, 646, 504, 1350, 1319, 1289, 1249, 1234, 1082, 3041, 2994]}"#,
            eval: Eval::IMAGENET,
            params: Some(26_306_263),
            gmacs: None,
        },
        Variant {
            name: "spvit_swin_t_l28_t32_folded",
            also: &[],
            config: r#"{"depths": [2, 2, 6, 2],
                "msa_indicators": [[[1,0,0], [0,0,0]],
                    [[1,0,0], [0,0,0]],
                    [[1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1]],
                    [[1,1,1], [1,1,1]]],
                "ffn_hidden": [186, 152, 646, 504, 1350, 1319, 1289, 1249, 1234, 1082, 3041, 2994], "param_opt": true}"#,
            eval: Eval::IMAGENET,
            params: Some(26_232_230),
            gmacs: None,
        },
        Variant {
            name: "spvit_swin_s_l04_t55",
            also: &[],
            config: r#"{"depths": [2, 2, 18, 2],
                "msa_indicators": [[[1,0,0], [0,0,0]],
                    [[1,1,1], [1,1,1]],
                    [[1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [0,0,0], [1,0,0], [1,1,1], [1,1,1], [0,0,0], [0,0,0]],
                    [[1,1,1], [1,1,1]]],
                "ffn_hidden": [188, 209, 748, 680, 1159, 1260, 1127, 1036, 919, 916, 868, 918, 903, 937, 961, 1037, 1063, 996, 888, 866, 741, 509, 3064, 3051]}"#,
            eval: Eval::IMAGENET,
            params: Some(39_205_671),
            gmacs: None,
        },
        Variant {
            name: "spvit_swin_s_l04_t55_folded",
            also: &[],
            config: r#"{"depths": [2, 2, 18, 2],
                "msa_indicators": [[[1,0,0], [0,0,0]],
                    [[1,1,1], [1,1,1]],
                    [[1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [0,0,0], [1,0,0], [1,1,1], [1,1,1], [0,0,0], [0,0,0]],
                    [[1,1,1], [1,1,1]]],
                "ffn_hidden": [188, 209, 748, 680, 1159, 1260, 1127, 1036, 919, 916, 868, 918, 903, 937, 961, 1037, 1063, 996, 888, 866, 741, 509, 3064, 3051], "param_opt": true}"#,
            eval: Eval::IMAGENET,
            params: Some(38_922_496),
            gmacs: None,
        },
        Variant {
            name: "spvit_swin_b_l01_t100",
            also: &[],
            config: r#"{"embed_dim": 128, "num_heads": [4, 8, 16, 32], "depths": [2, 2, 18, 2],
                "msa_indicators": [[[1,1,1], [0,0,0]],
                    [[1,1,1], [1,1,1]],
                    [[1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [0,0,0], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [0,0,0], [1,0,0], [1,1,1], [0,0,0]],
                    [[1,1,1], [1,1,1]]],
                "ffn_hidden": [311, 303, 1011, 980, 1763, 1673, 1636, 1523, 1410, 1377, 1332, 1345, 1440, 1426, 1400, 1315, 1371, 1321, 1324, 1265, 1127, 734, 3572, 2931]}"#,
            eval: Eval::IMAGENET,
            params: Some(68_034_286),
            gmacs: None,
        },
        Variant {
            name: "spvit_swin_b_l01_t100_folded",
            also: &[],
            config: r#"{"embed_dim": 128, "num_heads": [4, 8, 16, 32], "depths": [2, 2, 18, 2],
                "msa_indicators": [[[1,1,1], [0,0,0]],
                    [[1,1,1], [1,1,1]],
                    [[1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [0,0,0], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [0,0,0], [1,0,0], [1,1,1], [0,0,0]],
                    [[1,1,1], [1,1,1]]],
                "ffn_hidden": [311, 303, 1011, 980, 1763, 1673, 1636, 1523, 1410, 1377, 1332, 1345, 1440, 1426, 1400, 1315, 1371, 1321, 1324, 1265, 1127, 734, 3572, 2931], "param_opt": true}"#,
            eval: Eval::IMAGENET,
            params: Some(67_542_142),
            gmacs: None,
        },
        Variant {
            name: "spvit_swin_micro",
            also: &[],
            config: r#"{"patch_size": 2, "embed_dim": 32, "num_heads": [2, 4, 8], "window_size": 4, "depths": [2, 2, 2],
                "msa_indicators": [[[1,0,0], [1,1,1]], [[1,1,0], [0,0,0]], [[1,1,1], [1,1,1]]],
                "ffn_hidden": [64, 64, 128, 128, 256, 256]}"#,
            eval: Eval::SMALL,
            params: None,
            gmacs: None,
        },
    ],
};

/// `model.spvit_swin`.
pub struct ModelSpvitSwin;

impl Operation for ModelSpvitSwin {
    const NAME: &'static str = "model.spvit_swin";
    const PAPER: &'static str = "2111.11802 SPViT";
    const DATA: &'static [&'static str] = &[
        "u_kernel", "u_ffn.0", "u_ffn.1", "u_ffn.2", "u_ffn.3", "u_ffn.4", "u_ffn.5", "u_ffn.6", "u_ffn.7", "u_ffn.8", "u_ffn.9",
        "u_ffn.10", "u_ffn.11", "u_ffn.12", "u_ffn.13", "u_ffn.14", "u_ffn.15", "u_ffn.16", "u_ffn.17", "u_ffn.18", "u_ffn.19", "u_ffn.20",
        "u_ffn.21", "u_ffn.22", "u_ffn.23",
    ];

    fn sample(rng: &mut Rng) -> Config {
        let (stages, window, patch, mut config) = (rng.between(1, 2), rng.between(2, 3), rng.between(1, 2), Config::default());
        let side = window * (1 << (stages - 1)) * rng.between(1, 2) * patch;
        let depths: Vec<usize> = (0..stages).map(|_| rng.between(1, 2)).collect();
        config.set("image_size", side).set("patch_size", patch).set("in_chans", rng.between(1, 2)).set("num_classes", rng.between(1, 3));
        config.set("embed_dim", 4).set("num_heads", (0..stages).map(|_| rng.between(1, 2)).collect::<Vec<_>>());
        config.set("window_size", window).set("mlp_ratio", 1.0).set("alpha", rng.range(0.1, 100.0)).set("norm_eps", 1e-5);
        config.set("training", rng.chance(0.5)).set("param_opt", rng.chance(0.4));
        if rng.chance(0.5) {
            config.set("mode", "search").set("target_flops", rng.range(0.0, 1e-4)).set("loss_lambda", 1e5);
        } else {
            let mut hidden = Vec::new();
            let mut layers = |depth: usize| -> Vec<Vec<usize>> {
                let layers = (0..depth).map(|_| sample_layer(rng));
                layers.map(|(indicators, units)| (hidden.push(units), indicators).1).collect()
            };
            let indicators: Vec<_> = depths.iter().map(|&depth| layers(depth)).collect();
            config.set("mode", "finetune").set("msa_indicators", indicators).set("ffn_hidden", hidden);
        }
        config.set("depths", depths);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let settings = ModelSettings::from_config(config)?;
        let batch = draw.size("batch", 1, 2);
        draw.normal("x", [batch, settings.chans, settings.image, settings.image]);
        if settings.search.search && settings.search.training {
            draw.uniform("u_kernel", [settings.blocks().count(), 3]);
            for (b, block) in settings.blocks().enumerate() {
                draw.uniform(&format!("u_ffn.{b}"), [block.hidden]);
            }
        }
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (x, config) = (run.input("x")?, run.config());
        let settings = ModelSettings::from_config(config)?;
        let (search, hidden): (bool, Vec<usize>) = (settings.search.search, settings.blocks().map(|b| b.hidden).collect());
        let loss = if search { Some(settings.loss(config.f64("target_flops")?, config.f64("loss_lambda")?)) } else { None };
        let noisy = search && settings.search.training;
        let u_kernel = noise(run, "u_kernel", [hidden.len(), 3], noisy)?;
        let u_ffn: Vec<Option<Tensor<T>>> =
            hidden.iter().enumerate().map(|(b, &n)| noise(run, &format!("u_ffn.{b}"), [n], noisy)).collect::<Result<_>>()?;
        let kernel = |b: usize| u_kernel.as_ref().map(|u| &u.data()[3 * b..3 * b + 3]);
        let noises: Vec<Noise<T>> = u_ffn.iter().enumerate().map(|(b, u)| [kernel(b), u.as_ref().map(Tensor::data)]).collect();
        let (model, layout) = Layout::build(|names| SpvitSwin::new(names, settings))?;
        let p = run.params(&layout)?;
        let (logits, mut saved) = model.forward(&p, &x, &noises)?;
        run.output("logits", &logits);
        run.after_buffers(&layout, std::mem::take(&mut saved.updates));
        let gates = std::mem::take(&mut saved.gates);
        let loss = loss.map(|loss| SearchLoss::output(run, loss, gates, hidden));
        if run.backward() {
            let (mut g, d_logits) = (run.zero_grads(&p), run.cotangent("logits", logits.shape())?);
            let d_expected = loss.map_or(Ok(Vec::new()), |loss| loss.backward(run))?;
            let (embed, d) = model.backward(&p, &mut g, saved, &d_logits, &d_expected)?;
            run.grad_input("x", &model.embed.backward(&p, &mut g, &embed, &d, None)?);
            run.grad_params(&g);
        }
        Ok(())
    }
}
