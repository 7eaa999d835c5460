//! `model.coat`: CoaT and CoaT-Lite (arXiv 2104.06399).
//!
//! Four stages: a strided convolution and a norm make tokens of the image, or of the map of the stage before without its class token;
//! the stage's own class token goes in front; serial blocks follow. CoaT then runs parallel blocks over scales 2, 3 and 4. All blocks
//! of a scale share one CPE and one CRPE, serial and parallel alike, so those gradients are sums over the whole network.
//!
//! Head: `f = pool(norm₄ x₄)` (Lite), or `f = Σ_s a_s pool(norm_s x_s) + a₀` over scales 2, 3, 4; logits are `head(f)`. `pool` is the
//! class token or the mean of the others. With `return_interm_layers`, the maps themselves come out instead.
//!
//! `norm1`, and in Lite `norm2` and `norm3`, stand in the published weights but are never used: they are taken where they are given.

use super::coat_block::{BlockSettings, ParallelBlock, ParallelSaved, Positions, SerialBlock, SerialSaved};
use super::network::{Built, Classifier};
use super::stack::{self, Kept, KeptOf};
use super::swin_ops::{mean_tokens, mean_tokens_backward};
use super::weights::{self, Key, Rules};
use super::zoo::{Eval, Family, Variant};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::{elementwise, reduce};
use crate::nn::conv_position::{PositionEncoding, RelativePosition};
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::{Conv2d, ConvSettings, Init, LayerNorm, Layout, Linear, Names, Param, Params, Stats, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The names of the maps that can come out.
const FEATURES: [&str; 4] = ["x1_nocls", "x2_nocls", "x3_nocls", "x4_nocls"];

/// A patch embedding, a class token, serial blocks.
#[derive(Clone, Debug)]
struct Stage {
    embed: Conv2d,
    norm: LayerNorm,
    cls_token: Param,
    blocks: Vec<SerialBlock>,
}

struct StageSaved<T: Float> {
    input: Tensor<T>,
    embedded: Tensor<T>,
    stats: Stats<T>,
    blocks: Vec<Kept<T, SerialSaved<T>>>,
}

/// `[B, HW, C]` → `[B, 1 + HW, C]`, `class` in front.
fn with_class<T: Float>(x: &Tensor<T>, class: &[T]) -> Result<Tensor<T>> {
    let [b, n, c] = x.dims("tokens")?;
    let mut y = Tensor::scratch([b, 1 + n, c]);
    for (y, x) in y.data_mut().chunks_exact_mut((1 + n) * c).zip(x.data().chunks_exact(n * c)) {
        y[..c].copy_from_slice(class);
        y[c..].copy_from_slice(x);
    }
    Ok(y)
}

/// Some rows of every image of tokens.
fn token_rows<T: Float>(x: &Tensor<T>, rows: std::ops::Range<usize>) -> Result<Tensor<T>> {
    let [b, n, c] = x.dims("tokens")?;
    let mut y = Tensor::scratch([b, rows.len(), c]);
    for (y, x) in y.data_mut().chunks_exact_mut(rows.len() * c).zip(x.data().chunks_exact(n * c)) {
        y.copy_from_slice(&x[rows.start * c..rows.end * c]);
    }
    Ok(y)
}

/// The adjoint of [`token_rows`], added to `dx`.
fn add_token_rows<T: Float>(dx: &mut Tensor<T>, dy: &Tensor<T>, first: usize) -> Result<()> {
    let ([_, n, c], [_, rows, _]) = (dx.dims("tokens")?, dy.dims("tokens")?);
    for (dx, dy) in dx.data_mut().chunks_exact_mut(n * c).zip(dy.data().chunks_exact(rows * c)) {
        elementwise::add(&mut dx[first * c..(first + rows) * c], dy);
    }
    Ok(())
}

impl Stage {
    /// `[B, H, W, C']` → tokens `[B, 1 + H′W′, C]`, and rows and columns of their map.
    fn forward<T: Float>(&self, p: &Params<T>, input: Tensor<T>) -> Result<(Tensor<T>, [usize; 2], StageSaved<T>)> {
        let embedded = self.embed.forward(p, &input)?;
        let [b, h, w, c] = embedded.dims("patches")?;
        let embedded = embedded.reshape([b, h * w, c])?;
        let (normed, stats) = self.norm.forward(p, &embedded)?;
        let x = with_class(&normed, p.get(self.cls_token))?;
        drop(normed);
        let (x, blocks) = stack::forward(p, &self.blocks, x, |block, _, x| block.forward(p, x, [h, w]))?;
        Ok((x, [h, w], StageSaved { input, embedded, stats, blocks }))
    }

    /// The gradient of the input map, if `want_input`.
    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: StageSaved<T>,
        [h, w]: [usize; 2],
        d: Tensor<T>,
        want_input: bool,
    ) -> Result<Option<Tensor<T>>> {
        let StageSaved { input, embedded, stats, blocks } = saved;
        let d = stack::backward(
            &self.blocks,
            blocks,
            d,
            |block, _, x| block.forward(p, x, [h, w]),
            |block, _, saved, d| block.backward(p, g, saved, [h, w], d),
        )?;
        let [b, _, c] = d.dims("gradient of the tokens")?;
        reduce::add_column_sums(g.get_mut(self.cls_token), token_rows(&d, 0..1)?.data());
        let d = self.norm.backward(p, g, &embedded, &stats, &token_rows(&d, 1..1 + h * w)?, None)?;
        let d = d.reshape([b, h, w, c])?;
        if want_input {
            return self.embed.backward(p, g, &input, &d).map(Some);
        }
        self.embed.backward_params(g, &input, &d)?;
        Ok(None)
    }
}

/// Norms of the scales that are pooled, how they are joined, and the classifier.
#[derive(Clone, Debug)]
struct Head {
    /// Scale (from 0) and norm.
    norms: Vec<(usize, LayerNorm)>,
    /// `aggregate.weight` and `aggregate.bias`.
    aggregate: Option<[Param; 2]>,
    linear: Option<Linear>,
    average: bool,
}

struct HeadSaved<T: Float> {
    /// What is normed, its statistics, what is pooled from it.
    scales: Vec<(Tensor<T>, Stats<T>, Tensor<T>)>,
    pooled: Tensor<T>,
}

impl Head {
    fn forward<T: Float>(&self, p: &Params<T>, x: &[Tensor<T>]) -> Result<(Tensor<T>, HeadSaved<T>)> {
        let mut scales = Vec::new();
        for (s, norm) in &self.norms {
            let rows = if self.average { 1..x[*s].shape()[1] } else { 0..1 };
            let rows = token_rows(&x[*s], rows)?;
            let (normed, stats) = norm.forward(p, &rows)?;
            scales.push((rows, stats, mean_tokens(&normed)?));
        }
        let pooled = match self.aggregate {
            None => scales[0].2.clone(),
            Some([weight, bias]) => {
                let mut f = Tensor::from_fn(scales[0].2.shape(), |_| p.get(bias)[0]);
                for ((.., pooled), &a) in scales.iter().zip(p.get(weight)) {
                    elementwise::add_scaled(f.data_mut(), pooled.data(), a);
                }
                f
            }
        };
        p.show("pooled", &pooled);
        let logits = self.linear.as_ref().map_or(Ok(pooled.clone()), |linear| linear.forward(p, &pooled))?;
        Ok((logits, HeadSaved { scales, pooled }))
    }

    /// Adds to the gradients of the scales.
    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: HeadSaved<T>,
        dy: &Tensor<T>,
        dx: &mut [Tensor<T>],
    ) -> Result<()> {
        let df = self.linear.as_ref().map_or(Ok(dy.clone()), |linear| linear.backward(p, g, &saved.pooled, dy))?;
        if let Some([_, bias]) = self.aggregate {
            let sum = df.data().iter().fold(T::ZERO, |sum, &d| sum + d);
            g.get_mut(bias)[0] += sum;
        }
        for (i, ((s, norm), (rows, stats, pooled))) in self.norms.iter().zip(saved.scales).enumerate() {
            let mut d = df.clone();
            if let Some([weight, _]) = self.aggregate {
                g.get_mut(weight)[i] += T::from_f64(reduce::dot(df.data(), pooled.data()));
                elementwise::scale(d.data_mut(), df.data(), p.get(weight)[i]);
            }
            let d = mean_tokens_backward(&d, rows.shape()[1])?;
            let d = norm.backward(p, g, &rows, &stats, &d, None)?;
            add_token_rows(&mut dx[*s], &d, usize::from(self.average))?;
        }
        Ok(())
    }
}

/// CoaT.
#[derive(Clone, Debug)]
pub struct Coat {
    stages: Vec<Stage>,
    parallel: Vec<ParallelBlock>,
    /// Without a head, maps come out.
    head: Option<Head>,
    /// Which ones.
    features: [bool; 4],
    chans: usize,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    stages: Vec<StageSaved<T>>,
    maps: Vec<[usize; 2]>,
    parallel: Vec<KeptOf<Vec<Tensor<T>>, ParallelSaved<T>>>,
    shapes: Vec<crate::tensor::Shape>,
    head: Option<HeadSaved<T>>,
}

/// What comes out: logits, or maps by name.
pub type Outputs<T> = Vec<(&'static str, Tensor<T>)>;

/// Four values of a list.
fn four<R: Copy>(key: &str, list: &[R]) -> Result<[R; 4]> {
    <[R; 4]>::try_from(list).map_err(|_| Error::config(key, format!("expected one entry for each of four stages, found {}", list.len())))
}

impl Coat {
    /// Registers everything from the keys of `model.coat`. `unused` says which of `norm1` to `norm4` to take although nothing uses them.
    pub fn new(names: &mut Names, config: &Config, unused: [bool; 4]) -> Result<Self> {
        let patch = config.usize_or("patch_size", 4)?;
        let chans = config.usize_or("in_chans", 3)?;
        let dims = four("embed_dims", &config.usizes("embed_dims")?)?;
        let depths = four("serial_depths", &config.usizes("serial_depths")?)?;
        let ratios = four("mlp_ratios", &config.f64s("mlp_ratios")?)?;
        let parallel_depth = config.usize_or("parallel_depth", 0)?;
        let patch_eps = config.f64_or("patch_norm_eps", 1e-5)?;
        if depths.iter().chain([&parallel_depth]).any(|&depth| depth > 1 << 12) {
            return Err(Error::config("serial_depths", format!("expected depths of at most 4096, found {depths:?} and {parallel_depth}")));
        }
        if parallel_depth > 0 && (dims[1] != dims[2] || dims[2] != dims[3] || ratios[1] != ratios[2] || ratios[2] != ratios[3]) {
            let said = format!("expected equal widths and MLP ratios of stages 2 to 4 with parallel blocks, found {dims:?} and {ratios:?}");
            return Err(Error::config("embed_dims", said));
        }
        let settings = |s: usize| BlockSettings::from_config(config, dims[s], ratios[s]);
        let positions = (0..4).map(|s| {
            let cpe = PositionEncoding::new(names.at(format!("cpe{}", s + 1)), dims[s], 3)?;
            let crpe = RelativePosition::from_config(names.at(format!("crpe{}", s + 1)), config, dims[s])?;
            Ok(Positions { cpe, crpe })
        });
        let positions: Vec<Positions> = positions.collect::<Result<_>>()?;
        let mut stages = Vec::new();
        for s in 0..4 {
            let (inputs, side) = if s == 0 { (chans, patch) } else { (dims[s - 1], 2) };
            let conv = ConvSettings { stride: [side; 2], ..ConvSettings::new(inputs, dims[s], side) };
            let mut embed = names.at(format!("patch_embed{}", s + 1));
            let (conv, norm) =
                (Conv2d::new(embed.at("proj"), conv, conv.default_init())?, LayerNorm::new(embed.at("norm"), dims[s], patch_eps));
            let cls_token = names.param(&format!("cls_token{}", s + 1), [1, 1, dims[s]], Init::NORMAL_02);
            let block = |i| SerialBlock::new(&mut names.at(format!("serial_blocks{}.{i}", s + 1)), settings(s)?, positions[s].clone());
            stages.push(Stage { embed: conv, norm, cls_token, blocks: (0..depths[s]).map(block).collect::<Result<_>>()? });
        }
        let block = |i| ParallelBlock::new(&mut names.at(format!("parallel_blocks.{i}")), settings(1)?, positions[1..].to_vec());
        let parallel: Vec<_> = (0..parallel_depth).map(block).collect::<Result<_>>()?;
        let (head, features) = if config.bool_or("return_interm_layers", false)? {
            (None, out_features(config)?)
        } else {
            (Some(head(names, config, dims, parallel_depth > 0, unused)?), [false; 4])
        };
        Ok(Coat { stages, parallel, head, features, chans })
    }

    /// Logits `[B, classes]` of `[B, in, H, W]`, or the maps `[B, C_s, H_s, W_s]` that were asked for.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<(Outputs<T>, Saved<T>)> {
        let [_, c, _, _] = image.dims("image")?;
        if c != self.chans {
            return Err(Error::shape("image", format!("[batch, {}, height, width]", self.chans), image.shape()));
        }
        let mut input = channels_last(image)?;
        let (mut x, mut maps, mut stages) = (Vec::new(), Vec::new(), Vec::new());
        for (s, stage) in self.stages.iter().enumerate() {
            let (tokens, map, saved) = stage.forward(p, input)?;
            let [b, n, c] = tokens.dims("tokens")?;
            // The last stage's map goes nowhere.
            input = if s < 3 { token_rows(&tokens, 1..n)?.reshape([b, map[0], map[1], c])? } else { Tensor::zeros([0]) };
            x.push(tokens);
            maps.push(map);
            stages.push(saved);
        }
        let scales = [maps[1], maps[2], maps[3]];
        let (y, parallel) = stack::forward(p, &self.parallel, x.split_off(1), |block, _, x| block.forward(p, x, scales))?;
        x.extend(y);
        for (s, x) in x.iter().enumerate() {
            p.show(format!("stages.{s}"), x);
        }
        let shapes = x.iter().map(Tensor::shape).collect();
        let (outputs, head) = match &self.head {
            Some(head) => {
                let (logits, saved) = head.forward(p, &x)?;
                (vec![("logits", logits)], Some(saved))
            }
            None => {
                let map = |s: usize| -> Result<_> {
                    let [b, n, c] = x[s].dims("tokens")?;
                    let map = token_rows(&x[s], 1..n)?.reshape([b, maps[s][0], maps[s][1], c])?;
                    Ok((FEATURES[s], channels_first(&map)?))
                };
                ((0..4).filter(|&s| self.features[s]).map(map).collect::<Result<_>>()?, None)
            }
        };
        Ok((outputs, Saved { stages, maps, parallel, shapes, head }))
    }

    /// Adds the gradients of the parameters, from the gradients of all outputs, in their order; the gradient of the image if
    /// `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        dy: &[Tensor<T>],
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let Saved { stages, maps, parallel, shapes, head } = saved;
        let mut dx: Vec<Tensor<T>> = shapes.into_iter().map(Tensor::zeros).collect();
        if let (Some(head), Some(saved)) = (&self.head, head) {
            head.backward(p, g, saved, &dy[0], &mut dx)?;
        }
        for (s, dy) in (0..4).filter(|&s| self.features[s]).zip(dy) {
            let dy = channels_last(dy)?;
            let [b, h, w, c] = dy.dims("gradient of a map")?;
            add_token_rows(&mut dx[s], &dy.reshape([b, h * w, c])?, 1)?;
        }
        let scales = [maps[1], maps[2], maps[3]];
        let d = stack::backward(
            &self.parallel,
            parallel,
            dx.split_off(1),
            |block, _, x| block.forward(p, x, scales),
            |block, _, saved, d| block.backward(p, g, saved, scales, d),
        )?;
        dx.extend(d);
        let mut d_input: Option<Tensor<T>> = None;
        for (s, (((stage, saved), map), mut d)) in self.stages.iter().zip(stages).zip(maps).zip(dx).enumerate().rev() {
            if let Some(d_input) = d_input {
                let [b, h, w, c] = d_input.dims("gradient of a map")?;
                add_token_rows(&mut d, &d_input.reshape([b, h * w, c])?, 1)?;
            }
            d_input = stage.backward(p, g, saved, map, d, want_image || s > 0)?;
        }
        d_input.map(|d| channels_first(&d)).transpose()
    }
}

impl Classifier for Coat {
    type Saved = Saved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Saved<f32>)> {
        let (outputs, saved) = self.forward(p, images)?;
        Ok((outputs.into_iter().map(|(_, y)| y).collect(), saved))
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Saved<f32>, d: &[Tensor<f32>]) -> Result<()> {
        self.backward(p, g, saved, d, false).map(drop)
    }
}

/// Shared modules have a name in every block that uses them; the authors' norms of scales that no head reads are left out.
fn key(name: &str) -> Key {
    let parts: Vec<&str> = name.splitn(4, '.').collect();
    match parts[..] {
        [block, _, "cpe", rest] => block.strip_prefix("serial_blocks").map(|s| format!("cpe{s}.{rest}")),
        [block, _, "factoratt_crpe", rest] => {
            block.strip_prefix("serial_blocks").zip(rest.strip_prefix("crpe.")).map(|(s, rest)| format!("crpe{s}.{rest}"))
        }
        ["parallel_blocks", i, "mlp3" | "mlp4", rest] => Some(format!("parallel_blocks.{i}.mlp2.{rest}")),
        ["parallel_blocks", _, attention, rest] => {
            attention.strip_prefix("factoratt_crpe").zip(rest.strip_prefix("crpe.")).map(|(s, rest)| format!("crpe{s}.{rest}"))
        }
        ["norm1" | "norm2" | "norm3", _] => return Key::Optional,
        _ => None,
    }
    .map_or(Key::Keep, Key::Alias)
}

/// Multiply-adds for one image.
fn macs(config: &Config, size: usize) -> Result<f64> {
    let (patch, parallel) = (config.usize("patch_size")?.max(1), config.usize("parallel_depth")? as f64);
    let (dims, depths, ratios) = (config.usizes("embed_dims")?, config.usizes("serial_depths")?, config.f64s("mlp_ratios")?);
    let (heads, classes) = (config.usize("num_heads")?.max(1) as f64, config.usize("num_classes")? as f64);
    let groups = config.usizes("crpe_windows")?.into_iter().zip(config.usizes("crpe_head_splits")?);
    let taps = groups.map(|(window, heads)| (heads * window * window) as f64).sum::<f64>() / heads;
    let (mut side, mut inputs, mut sum) = (size, 3.0, 0.0);
    for (s, (&c, &ratio)) in dims.iter().zip(&ratios).enumerate() {
        let (patch, c) = (if s == 0 { patch } else { 2 }, c as f64);
        side /= patch;
        let map = (side * side) as f64;
        let block = (map + 1.0) * ((4.0 + 2.0 * ratio) * c * c + 2.0 * c * c / heads) + map * c * (9.0 + taps);
        let blocks = depths.get(s).map_or(0.0, |&depth| depth as f64) + if s > 0 { parallel } else { 0.0 };
        sum += map * c * inputs * (patch * patch) as f64 + blocks * block;
        inputs = c;
    }
    Ok(sum + inputs * classes)
}

const fn variant(name: &'static str, config: &'static str, eval: Eval, params: usize, gmacs: f64) -> Variant {
    Variant { name, also: &[], config, eval, params: Some(params), gmacs: Some(gmacs) }
}

const TINY: &str = r#"{"embed_dims": [152, 152, 152, 152], "serial_depths": [2, 2, 2, 2], "parallel_depth": 6}"#;
const MINI: &str = r#"{"embed_dims": [152, 216, 216, 216], "serial_depths": [2, 2, 2, 2], "parallel_depth": 6}"#;
const SMALL: &str = r#"{"embed_dims": [152, 320, 320, 320], "serial_depths": [2, 2, 2, 2], "parallel_depth": 6}"#;
const LITE_TINY: &str = r#"{"embed_dims": [64, 128, 256, 320], "serial_depths": [2, 2, 2, 2], "mlp_ratios": [8, 8, 4, 4]}"#;
const LITE_MINI: &str = r#"{"embed_dims": [64, 128, 320, 512], "serial_depths": [2, 2, 2, 2], "mlp_ratios": [8, 8, 4, 4]}"#;
const LITE_SMALL: &str = r#"{"embed_dims": [64, 128, 320, 512], "serial_depths": [3, 4, 6, 3], "mlp_ratios": [8, 8, 4, 4]}"#;
const LITE_MEDIUM: &str = r#"{"embed_dims": [128, 256, 320, 512], "serial_depths": [3, 6, 10, 8]}"#;
const MICRO: &str = r#"{"patch_size": 2, "embed_dims": [32, 64, 64, 64], "serial_depths": [1, 1, 1, 1], "parallel_depth": 2,
    "num_heads": 4, "crpe_head_splits": [1, 1, 2]}"#;
const LITE_MICRO: &str = r#"{"patch_size": 2, "embed_dims": [32, 64, 96, 128], "serial_depths": [1, 2, 2, 1], "num_heads": 4,
    "crpe_head_splits": [1, 1, 2]}"#;

/// CoaT and CoaT-Lite.
pub static FAMILY: Family = Family {
    op: "model.coat",
    common: r#"{"patch_size": 4, "in_chans": 3, "mlp_ratios": [4, 4, 4, 4], "parallel_depth": 0, "num_heads": 8, "qkv_bias": true,
        "crpe_windows": [3, 5, 7], "crpe_head_splits": [2, 3, 3], "norm_eps": 1e-6, "patch_norm_eps": 1e-5, "global_pool": "token",
        "return_interm_layers": false}"#,
    build: |config| Built::new(|names| Coat::new(names, config, [false; 4])),
    // Nothing depends on it.
    at_size: |_, _| {},
    macs,
    rules: Rules { key, resize: weights::fixed, heads: &["head"] },
    variants: &[
        variant("coat_tiny", TINY, Eval::IMAGENET, 5_498_540, 4.32),
        variant("coat_mini", MINI, Eval::IMAGENET, 10_337_004, 6.77),
        variant("coat_small", SMALL, Eval::IMAGENET, 21_693_908, 12.55),
        variant("coat_lite_tiny", LITE_TINY, Eval::IMAGENET, 5_721_960, 1.59),
        variant("coat_lite_mini", LITE_MINI, Eval::IMAGENET, 11_011_560, 1.99),
        variant("coat_lite_small", LITE_SMALL, Eval::IMAGENET, 19_838_504, 3.94),
        variant("coat_lite_medium", LITE_MEDIUM, Eval::IMAGENET, 44_571_048, 9.77),
        variant("coat_lite_medium_384", LITE_MEDIUM, Eval::IMAGENET.at(384).crop(1.0), 44_571_048, 28.63),
        Variant { name: "coat_micro", also: &[], config: MICRO, eval: Eval::SMALL, params: None, gmacs: None },
        Variant { name: "coat_lite_micro", also: &[], config: LITE_MICRO, eval: Eval::SMALL, params: None, gmacs: None },
    ],
};

/// `out_features` as one flag per stage.
fn out_features(config: &Config) -> Result<[bool; 4]> {
    let wrong = || Error::config("out_features", format!("expected a list of {FEATURES:?}"));
    let list = config.get("out_features").and_then(|list| list.as_array()).ok_or_else(wrong)?;
    let mut wanted = [false; 4];
    for name in list {
        let s = FEATURES.iter().position(|feature| name.as_str() == Some(feature)).ok_or_else(wrong)?;
        wanted[s] = true;
    }
    Ok(wanted)
}

fn head(names: &mut Names, config: &Config, dims: [usize; 4], parallel: bool, unused: [bool; 4]) -> Result<Head> {
    let eps = config.f64_or("norm_eps", 1e-6)?;
    let mut norms = Vec::new();
    for s in 0..4 {
        let used = s == 3 || s > 0 && parallel;
        if used || unused[s] {
            let norm = LayerNorm::new(names.at(format!("norm{}", s + 1)), dims[s], eps);
            norms.extend(used.then_some((s, norm)));
        }
    }
    let aggregate = parallel.then(|| {
        let mut names = names.at("aggregate");
        [names.param("weight", [1, 3, 1], Init::FanIn(3)), names.param("bias", [1], Init::FanIn(3))]
    });
    let classes = config.usize_or("num_classes", 1000)?;
    let linear = (classes > 0).then(|| Linear::new(names.at("head"), dims[3], classes, true, normal_02(dims[3], classes)));
    let pool = if config.get("global_pool").is_none() { "token" } else { config.choice("global_pool", &["token", "avg"])? };
    Ok(Head { norms, aggregate, linear, average: pool == "avg" })
}

/// `model.coat`.
pub struct ModelCoat;

impl Operation for ModelCoat {
    const NAME: &'static str = "model.coat";
    const PAPER: &'static str = "2104.06399 CoaT";

    fn sample(rng: &mut Rng) -> Config {
        let groups = rng.between(1, 2);
        let splits: Vec<usize> = (0..groups).map(|_| rng.between(1, 2)).collect();
        let heads: usize = splits.iter().sum();
        let windows: Vec<usize> = (0..groups).map(|_| 2 * rng.between(0, 2) + 1).collect();
        let parallel = rng.below(2);
        // A norm over one channel is constant: nothing to differentiate.
        let mut width = || heads * if heads == 1 { rng.between(2, 3) } else { rng.between(1, 2) };
        let dims = if parallel > 0 { [width(), 4 * heads, 4 * heads, 4 * heads] } else { [width(), width(), width(), width()] };
        let mut config = Config::default();
        config.set("patch_size", rng.between(1, 2)).set("in_chans", rng.between(1, 2)).set("num_classes", rng.below(3));
        config.set("embed_dims", dims.to_vec()).set("serial_depths", (0..4).map(|_| rng.below(2)).collect::<Vec<_>>());
        config.set("parallel_depth", parallel).set("num_heads", heads);
        let ratio = rng.range(0.6, 1.5);
        config.set("mlp_ratios", [rng.range(0.6, 1.5), ratio, ratio, ratio].to_vec()).set("qkv_bias", rng.chance(0.7));
        config.set("qk_scale", if rng.chance(0.3) { serde_json::json!(rng.range(0.2, 1.0)) } else { serde_json::Value::Null });
        config.set("crpe_windows", windows).set("crpe_head_splits", splits).set("norm_eps", 1e-6).set("patch_norm_eps", 1e-5);
        config.set("global_pool", rng.pick(&["token", "avg"]));
        let features = rng.chance(0.3);
        let wanted: Vec<&str> = FEATURES.into_iter().filter(|_| rng.chance(0.6)).collect();
        let wanted = if wanted.is_empty() { vec!["x4_nocls"] } else { wanted };
        config.set("return_interm_layers", features);
        config.set("out_features", if features { serde_json::json!(wanted) } else { serde_json::Value::Null });
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, least) = (draw.size("batch", 1, 2), 8 * config.positive("patch_size")?);
        let (height, width) = (draw.size("height", least, least + 5), draw.size("width", least, least + 9));
        draw.normal("image", [batch, config.positive("in_chans")?, height, width]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let image = run.input("image")?;
        let mut unused = [false; 4];
        for (s, unused) in unused.iter_mut().enumerate() {
            *unused = run.param_dims::<1>(&format!("norm{}.weight", s + 1))?.is_some();
        }
        let (model, layout) = Layout::build(|names| Coat::new(names, run.config(), unused))?;
        let p = run.params(&layout)?;
        let (outputs, saved) = model.forward(&p, &image)?;
        for (name, y) in &outputs {
            run.output(name, y);
        }
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let dy: Vec<_> = outputs.iter().map(|(name, y)| run.cotangent(name, y.shape())).collect::<Result<_>>()?;
            if let Some(d_image) = model.backward(&p, &mut g, saved, &dy, true)? {
                run.grad_input("image", &d_image);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
