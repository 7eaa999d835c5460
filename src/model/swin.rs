//! Swin Transformer (arXiv 2103.14030): `block.swin`, `nn.patch_merging`, `model.swin`; and the encoder that GreenMIM runs on
//! visible tokens and SimMIM on masked ones.
//!
//! A stage knows two groupings of its tokens, one for each shift, and four token indices per merged cell. Which tokens exist
//! is a [`Plan`]: all of a map, or the visible ones. Nothing else differs between the dense and the sparse network.

use super::network::{Built, Classifier};
use super::stack::{self, Kept};
use super::swin_ops::{mean_tokens, mean_tokens_backward};
use super::weights::{Key, Rules};
use super::zoo::{self, Eval, Family, Variant};
use crate::attention::softmax::Settings as AttentionSettings;
use crate::attention::window::{RelativeBias, qk_scale, shifted_windows};
use crate::case::{Config, Cost};
use crate::error::{Error, Result};
use crate::kernel::attention::Groups;
use crate::kernel::rows;
use crate::model::vit_block::{self, Block, BlockSettings};
use crate::nn::resize::PosEmbedResize;
use crate::nn::{DropPath, Init, LayerNorm, Linear, Names, Param, Params, Pass, PatchEmbed, Stats, normal_02, patch_embed};
use crate::tensor::{Float, Shape, Tensor};

/// A pre-norm block whose attention runs in windows, with a relative position bias: Swin's and GreenMIM's.
#[derive(Clone, Debug)]
pub struct SwinBlock {
    bias: RelativeBias,
    block: Block,
}

impl SwinBlock {
    /// Registers `norm1`, `attn.*` (with its table), `norm2`, `mlp`.
    pub fn new(names: &mut Names, settings: BlockSettings, window: [usize; 2]) -> Result<Self> {
        let bias = RelativeBias::new(&mut names.at("attn"), window, settings.attention.num_heads);
        Ok(SwinBlock { bias, block: Block::new(names, settings)? })
    }

    /// The same, but the backward pass computes the hidden units again.
    pub fn recompute_hidden(self) -> Self {
        SwinBlock { block: self.block.recompute_hidden(), ..self }
    }

    /// The block's output, attending inside `groups`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>, groups: &Groups) -> Result<(Tensor<T>, vit_block::Saved<T>)> {
        let logits = self.bias.logits(p);
        self.block.forward(p, x, groups, Some(self.bias.view(&logits)))
    }

    /// `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: vit_block::Saved<T>,
        groups: &Groups,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let logits = self.bias.logits(p);
        let mut d_logits = Tensor::zeros(logits.shape());
        let dx = self.block.backward(p, g, saved, groups, Some((self.bias.view(&logits), d_logits.data_mut())), dy)?;
        self.bias.backward(g, d_logits.data());
        Ok(dx)
    }
}

/// The window and shift that a block uses on a map: official Swin clips both when the shorter side fits into one window, timm
/// (`pad`) each axis by itself.
pub fn clip_window(map: [usize; 2], window: usize, shift: usize, pad: bool) -> ([usize; 2], [usize; 2]) {
    if pad {
        let clipped = map.map(|side| side.min(window));
        (clipped, std::array::from_fn(|axis| if map[axis] <= clipped[axis] { 0 } else { shift }))
    } else {
        let shorter = map[0].min(map[1]);
        if shorter <= window { ([shorter; 2], [0; 2]) } else { ([window; 2], [shift; 2]) }
    }
}

/// Marks a merged cell's corner that lies outside the map.
const OUTSIDE: u32 = u32::MAX;

/// The four tokens of each 2×2 cell of a dense map, in the order (0,0), (1,0), (0,1), (1,1): down first.
pub fn dense_cells([height, width]: [usize; 2], pad: bool) -> Result<Vec<u32>> {
    if !pad && (height % 2 == 1 || width % 2 == 1) {
        return Err(Error::config("height", format!("patch merging needs an even map (or `pad`), found {height}×{width}")));
    }
    let mut cells = Vec::with_capacity(4 * height.div_ceil(2) * width.div_ceil(2));
    for y in (0..height).step_by(2) {
        for x in (0..width).step_by(2) {
            for (dy, dx) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
                let inside = y + dy < height && x + dx < width;
                cells.push(if inside { ((y + dy) * width + x + dx) as u32 } else { OUTSIDE });
            }
        }
    }
    Ok(cells)
}

/// Patch merging: the four tokens of a cell side by side, LayerNorm, a linear map from 4C to 2C without bias.
#[derive(Clone, Debug)]
pub struct PatchMerging {
    norm: LayerNorm,
    reduction: Linear,
}

/// What the backward pass needs.
pub struct MergingSaved<T: Float> {
    merged: Tensor<T>,
    stats: Stats<T>,
    tokens: usize,
}

impl PatchMerging {
    /// Registers `norm` (over 4C) and `reduction`.
    pub fn new(names: &mut Names, dim: usize, eps: f64, init: fn(usize, usize) -> Init) -> Self {
        let norm = LayerNorm::new(names.at("norm"), 4 * dim, eps);
        PatchMerging { norm, reduction: Linear::new(names.at("reduction"), 4 * dim, 2 * dim, false, init(4 * dim, 2 * dim)) }
    }

    /// The cost for `cells` merged cells in each of `b` images: the cells, their statistics and y are kept.
    pub fn cost(dim: usize, b: usize, cells: usize) -> Cost {
        Cost { flops: 2 * b * cells * 4 * dim * 2 * dim, activation_bytes: 4 * b * cells * (4 * dim + 2 + 2 * dim) }
    }

    /// `[B, N, C]` → `[B, cells/4, 2C]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, cells: &[u32]) -> Result<(Tensor<T>, MergingSaved<T>)> {
        let [batch, tokens, c] = x.dims("input of patch merging")?;
        let mut merged = Tensor::scratch([batch, cells.len() / 4, 4 * c]);
        rows::gather_batch(merged.data_mut(), x.data(), cells, batch, c);
        let (normed, stats) = self.norm.forward(p, &merged)?;
        Ok((self.reduction.forward(p, &normed)?, MergingSaved { merged, stats, tokens }))
    }

    /// `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: MergingSaved<T>,
        cells: &[u32],
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let normed = self.norm.again(p, &saved.merged, &saved.stats);
        let d_normed = self.reduction.backward(p, g, &normed, dy)?;
        drop(normed);
        let d_merged = self.norm.backward(p, g, &saved.merged, &saved.stats, &d_normed, None)?;
        let [batch, _, four_c] = d_merged.dims("merged tokens")?;
        let mut dx = Tensor::zeros([batch, saved.tokens, four_c / 4]);
        rows::scatter_batch(dx.data_mut(), d_merged.data(), cells, batch, four_c / 4);
        Ok(dx)
    }
}

/// What a Swin encoder is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Image rows and columns.
    pub img_size: [usize; 2],
    /// Patch side.
    pub patch_size: usize,
    /// Image channels.
    pub in_chans: usize,
    /// Width of the first stage; it doubles from stage to stage.
    pub embed_dim: usize,
    /// Blocks per stage.
    pub depths: Vec<usize>,
    /// Heads per stage.
    pub num_heads: Vec<usize>,
    /// Window side M.
    pub window_size: usize,
    /// Hidden width of the MLPs over their width.
    pub mlp_ratio: f64,
    /// `qkv` has a bias.
    pub qkv_bias: bool,
    /// The factor on the scores; `None` is `d^{−1/2}`.
    pub qk_scale: Option<f64>,
    /// Absolute positions.
    pub ape: bool,
    /// LayerNorm after the patch embedding.
    pub patch_norm: bool,
    /// ε of all norms.
    pub norm_eps: f64,
    /// timm's padding of incomplete windows and cells.
    pub pad: bool,
    /// Probability that a residual branch of the last block is left out in training; it grows linearly from 0.
    pub drop_path: f64,
    /// Initialisation of the linear weights.
    pub init: fn(usize, usize) -> Init,
}

impl Settings {
    /// From a configuration, with the sheet's defaults.
    pub fn from_config(config: &Config, default_eps: f64) -> Result<Self> {
        Ok(Settings {
            img_size: config.pair("img_size")?,
            patch_size: config.usize_or("patch_size", 4)?,
            in_chans: config.usize_or("in_chans", 3)?,
            embed_dim: config.positive("embed_dim")?,
            depths: config.usizes("depths")?,
            num_heads: config.usizes("num_heads")?,
            window_size: config.positive("window_size")?,
            mlp_ratio: config.f64_or("mlp_ratio", 4.0)?,
            qkv_bias: config.bool_or("qkv_bias", true)?,
            qk_scale: qk_scale(config)?,
            ape: config.bool_or("ape", false)?,
            patch_norm: config.bool_or("patch_norm", true)?,
            norm_eps: config.f64_or("norm_eps", default_eps)?,
            pad: config.bool_or("pad", false)?,
            drop_path: config.f64_or("drop_path_rate", 0.0)?,
            init: normal_02,
        })
    }
}

/// Which tokens a stage works on: its two groupings and the cells that its merging makes.
#[derive(Clone, Debug)]
pub struct StagePlan {
    /// Windows without shift.
    pub plain: Groups,
    /// Shifted windows (or the same again, where a single window covers the map).
    pub shifted: Groups,
    /// Four tokens per merged cell; empty after the last stage.
    pub cells: Vec<u32>,
}

impl StagePlan {
    /// The grouping of block `b`: every second one is shifted.
    fn groups(&self, b: usize) -> &Groups {
        if b.is_multiple_of(2) { &self.plain } else { &self.shifted }
    }
}

/// One [`StagePlan`] per stage.
pub type Plan = Vec<StagePlan>;

#[derive(Clone, Debug)]
struct Stage {
    blocks: Vec<SwinBlock>,
    downsample: Option<PatchMerging>,
    grid: [usize; 2],
}

/// A Swin network up to its final norm.
#[derive(Clone, Debug)]
pub struct Encoder {
    settings: Settings,
    patch_embed: PatchEmbed,
    ape: Option<Param>,
    stages: Vec<Stage>,
    norm: LayerNorm,
}

/// The blocks of a stage and its merging.
type StageSaved<T> = (Vec<Kept<T, vit_block::Saved<T>>>, Option<MergingSaved<T>>);

/// What the backward pass needs.
pub struct EncoderSaved<T: Float> {
    stages: Vec<StageSaved<T>>,
    last: Tensor<T>,
    stats: Stats<T>,
}

impl Encoder {
    /// Registers `patch_embed`, `absolute_pos_embed`, `layers.{i}.blocks.{b}`, `layers.{i}.downsample`, `norm`.
    pub fn new(names: &mut Names, settings: Settings) -> Result<Self> {
        let s = &settings;
        if s.depths.is_empty() || s.depths.len() != s.num_heads.len() || s.depths.len() > 16 {
            return Err(Error::config(
                "depths",
                format!("expected one entry per stage, as in num_heads {:?}, found {:?}", s.num_heads, s.depths),
            ));
        }
        let eps = s.patch_norm.then_some(s.norm_eps);
        let conv_init = (s.init)(s.in_chans * s.patch_size * s.patch_size, s.embed_dim);
        let patch_embed = PatchEmbed::new(names.at("patch_embed"), s.img_size, s.patch_size, s.in_chans, s.embed_dim, eps, conv_init)?;
        let mut grid = patch_embed.grid();
        let ape = s.ape.then(|| names.param("absolute_pos_embed", [1, grid[0] * grid[1], s.embed_dim], Init::NORMAL_02));
        let all = s.depths.iter().fold(0usize, |all, &depth| all.saturating_add(depth));
        let mut stages = Vec::new();
        for (i, (&depth, &heads)) in s.depths.iter().zip(&s.num_heads).enumerate() {
            let mut names = names.at(format!("layers.{i}"));
            let dim = s.embed_dim << i;
            let (window, _) = clip_window(grid, s.window_size, 0, s.pad);
            let attention = AttentionSettings { qkv_bias: s.qkv_bias, scale: s.qk_scale, ..AttentionSettings::new(dim, heads) };
            let before: usize = s.depths[..i].iter().sum();
            let block = |b| {
                let drop_path = DropPath::linear(s.drop_path, before + b, all);
                let block =
                    BlockSettings { attention, mlp_ratio: s.mlp_ratio, norm_eps: s.norm_eps, layer_scale: None, drop_path, init: s.init };
                let block = SwinBlock::new(&mut names.at(format!("blocks.{b}")), block, window)?;
                // Early stages have most of the tokens and little of the work: in Swin-T a quarter of what is kept for 3 % more operations.
                Ok(if i + 2 < s.depths.len() { block.recompute_hidden() } else { block })
            };
            let blocks = (0..depth).map(block).collect::<Result<_>>()?;
            let last = i + 1 == s.depths.len();
            let downsample = (!last).then(|| PatchMerging::new(&mut names.at("downsample"), dim, s.norm_eps, s.init));
            stages.push(Stage { blocks, downsample, grid });
            grid = grid.map(|side| side.div_ceil(2));
        }
        let norm = LayerNorm::new(names.at("norm"), s.embed_dim << (s.depths.len() - 1), s.norm_eps);
        Ok(Encoder { settings, patch_embed, ape, stages, norm })
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The width of the output.
    pub fn width(&self) -> usize {
        self.settings.embed_dim << (self.stages.len() - 1)
    }

    /// Rows and columns of tokens at each stage.
    pub fn grids(&self) -> Vec<[usize; 2]> {
        self.stages.iter().map(|stage| stage.grid).collect()
    }

    /// The plan in which every token exists.
    pub fn dense_plan(&self) -> Result<Plan> {
        let Settings { window_size, pad, .. } = self.settings;
        self.stages
            .iter()
            .map(|stage| {
                let (window, shift) = clip_window(stage.grid, window_size, window_size / 2, pad);
                let plain = shifted_windows(stage.grid, window, [0; 2], pad)?;
                let shifted = if shift == [0; 2] { plain.clone() } else { shifted_windows(stage.grid, window, shift, pad)? };
                let cells = if stage.downsample.is_some() { dense_cells(stage.grid, pad)? } else { Vec::new() };
                Ok(StagePlan { plain, shifted, cells })
            })
            .collect()
    }

    /// Patches as tokens, without positions; with `keep` only those.
    pub fn embed<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, keep: Option<&[u32]>) -> Result<(Tensor<T>, patch_embed::Saved<T>)> {
        self.patch_embed.forward(p, image, keep)
    }

    /// The patch embedding.
    pub fn patch_embed(&self) -> &PatchEmbed {
        &self.patch_embed
    }

    /// Tokens `[B, N, C₀]` (all, or those in `keep`) through positions, stages and the final norm.
    pub fn forward<T: Float>(
        &self,
        p: &Params<T>,
        mut x: Tensor<T>,
        plan: &Plan,
        keep: Option<&[u32]>,
    ) -> Result<(Tensor<T>, EncoderSaved<T>)> {
        if let Some(ape) = self.ape {
            let (table, width) = (p.get(ape), self.settings.embed_dim);
            match keep {
                None => rows::add_table(x.data_mut(), table),
                Some(keep) => {
                    let mut kept = Tensor::scratch([keep.len(), width]);
                    rows::gather(kept.data_mut(), table, keep, width);
                    rows::add_table(x.data_mut(), kept.data());
                }
            }
        }
        let mut saved = Vec::with_capacity(self.stages.len());
        for (i, (stage, plan)) in self.stages.iter().zip(plan).enumerate() {
            let blocks;
            (x, blocks) = stack::forward(p, &stage.blocks, x, |block, b, x| block.forward(p, x, plan.groups(b)))?;
            p.show(format!("stages.{i}"), &x);
            let mut merging = None;
            if let Some(downsample) = &stage.downsample {
                let (y, s) = downsample.forward(p, &x, &plan.cells)?;
                x = y;
                merging = (p.pass() != Pass::Infer).then_some(s);
            }
            saved.push((blocks, merging));
        }
        let (y, stats) = self.norm.forward(p, &x)?;
        Ok((y, EncoderSaved { stages: saved, last: x, stats }))
    }

    /// The gradient of the tokens that went into [`forward`](Self::forward).
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: EncoderSaved<T>,
        plan: &Plan,
        keep: Option<&[u32]>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let mut dx = self.norm.backward(p, g, &saved.last, &saved.stats, dy, None)?;
        drop(saved.last);
        for ((stage, plan), (blocks, merging)) in self.stages.iter().zip(plan).zip(saved.stages).rev() {
            if let (Some(downsample), Some(merging)) = (&stage.downsample, merging) {
                dx = downsample.backward(p, g, merging, &plan.cells, &dx)?;
            }
            dx = stack::backward(
                &stage.blocks,
                blocks,
                dx,
                |block, b, x| block.forward(p, x, plan.groups(b)),
                |block, b, saved, d| block.backward(p, g, saved, plan.groups(b), d),
            )?;
        }
        if let Some(ape) = self.ape {
            let (table, width) = (g.get_mut(ape), self.settings.embed_dim);
            let tokens = keep.map_or(table.len() / width, <[u32]>::len);
            for image in dx.data().chunks_exact((tokens * width).max(1)) {
                for (i, d) in image.chunks_exact(width).enumerate() {
                    let row = keep.map_or(i, |keep| keep[i] as usize);
                    table[row * width..(row + 1) * width].iter_mut().zip(d).for_each(|(t, &d)| *t += d);
                }
            }
        }
        Ok(dx)
    }
}

/// The Swin classifier: encoder, mean over tokens, `head`.
#[derive(Clone, Debug)]
pub struct Swin {
    encoder: Encoder,
    plan: Plan,
    head: Option<Linear>,
}

/// What [`Swin::backward`] needs.
pub struct Saved<T: Float> {
    embed: patch_embed::Saved<T>,
    encoder: EncoderSaved<T>,
    pooled: Tensor<T>,
    tokens: usize,
}

impl Swin {
    /// Registers the encoder and `head` from the keys of `model.swin`.
    pub fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let encoder = Encoder::new(names, Settings::from_config(config, 1e-5)?)?;
        let classes = config.usize("num_classes")?;
        let head = (classes > 0).then(|| Linear::new(names.at("head"), encoder.width(), classes, true, Init::NORMAL_02));
        Ok(Swin { plan: encoder.dense_plan()?, encoder, head })
    }

    /// Logits `[B, classes]`, or the pooled feature `[B, C]` without a head, of `[B, in, H, W]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let (x, embed) = self.encoder.embed(p, image, None)?;
        let (y, encoder) = self.encoder.forward(p, x, &self.plan, None)?;
        let [_, tokens, _] = y.dims("tokens")?;
        let pooled = mean_tokens(&y)?;
        p.show("pooled", &pooled);
        let logits = self.head.as_ref().map_or(Ok(pooled.clone()), |head| head.forward(p, &pooled))?;
        Ok((logits, Saved { embed, encoder, pooled, tokens }))
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
        let Saved { embed, encoder, pooled, tokens } = saved;
        let d = self.head.as_ref().map_or(Ok(dy.clone()), |head| head.backward(p, g, &pooled, dy))?;
        let d = self.encoder.backward(p, g, encoder, &self.plan, None, &mean_tokens_backward(&d, tokens)?)?;
        let layer = self.encoder.patch_embed();
        if want_image {
            return layer.backward(p, g, &embed, &d, None).map(Some);
        }
        layer.backward_params(p, g, &embed, &d)?;
        Ok(None)
    }
}

impl Classifier for Swin {
    type Saved = Saved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Saved<f32>)> {
        let (logits, saved) = self.forward(p, images)?;
        Ok((vec![logits], saved))
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Saved<f32>, d: &[Tensor<f32>]) -> Result<()> {
        self.backward(p, g, saved, &d[0], false).map(drop)
    }
}

/// The authors put the merging at the end of a stage, timm at the beginning of the next; timm's classifier is `head.fc`.
fn key(name: &str) -> Key {
    if name.ends_with("relative_position_index") || name.ends_with("attn_mask") {
        return Key::Drop;
    }
    if let Some(rest) = name.strip_prefix("head.fc.") {
        return Key::Rename(format!("head.{rest}"));
    }
    let moved = || {
        let (stage, rest) = name.strip_prefix("layers.")?.split_once(".downsample.")?;
        let before = stage.parse::<usize>().ok()?.checked_sub(1)?;
        Some(Key::RenameUnless { name: format!("layers.{before}.downsample.{rest}"), unless: "layers.0.downsample.reduction.weight" })
    };
    moved().unwrap_or(Key::Keep)
}

/// A square table of positions `[side², width]` for another side: bicubic.
fn resize_square(table: &Tensor<f32>, wanted: [usize; 2]) -> Result<Option<Tensor<f32>>> {
    let (rows, width) = table.shape().rows_cols();
    let [old, new] = [rows, wanted[0]].map(usize::isqrt);
    if old == 0 || new == 0 || old * old != rows || new * new != wanted[0] || width != wanted[1] {
        return Ok(None);
    }
    PosEmbedResize::new(0, false, [old; 2], [new; 2])?.forward(&table.reshape([1, rows, width])?).map(Some)
}

fn resize(name: &str, table: &Tensor<f32>, wanted: Shape, _: &Config) -> Result<Option<Tensor<f32>>> {
    if !(name.ends_with("relative_position_bias_table") || name == "absolute_pos_embed") {
        return Ok(None);
    }
    let (rows, width) = wanted.rows_cols();
    resize_square(table, [rows, width])?.map(|table| table.reshape(wanted)).transpose()
}

/// Multiply-adds for one image.
fn macs(config: &Config, size: usize) -> Result<f64> {
    let (settings, classes) = (Settings::from_config(config, 1e-5)?, config.usize("num_classes")?);
    let mut side = size / settings.patch_size.max(1);
    let mut sum = (side * side * settings.embed_dim * settings.in_chans * settings.patch_size.pow(2)) as f64;
    for (i, &depth) in settings.depths.iter().enumerate() {
        let (n, c) = ((side * side) as f64, (settings.embed_dim << i) as f64);
        let window = settings.window_size.min(side).pow(2) as f64;
        sum += depth as f64 * ((4.0 + 2.0 * settings.mlp_ratio) * n * c * c + 2.0 * n * window * c);
        if i + 1 < settings.depths.len() {
            side = side.div_ceil(2);
            sum += (side * side) as f64 * 8.0 * c * c;
        } else {
            sum += c * classes as f64;
        }
    }
    Ok(sum)
}

const TINY: &str = r#"{"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}"#;
const SMALL: &str = r#"{"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]}"#;
const BASE: &str = r#"{"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}"#;
const BASE_12: &str = r#"{"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12}"#;
const LARGE: &str = r#"{"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]}"#;
const LARGE_12: &str = r#"{"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12}"#;
const MICRO: &str =
    r#"{"embed_dim": 48, "depths": [2, 2, 2], "num_heads": [3, 6, 12], "patch_size": 2, "window_size": 4, "weight_init": "xavier"}"#;

const fn variant(name: &'static str, config: &'static str, eval: Eval, params: usize, gmacs: f64) -> Variant {
    Variant { name, also: &[], config, eval, params: Some(params), gmacs: Some(gmacs) }
}

/// Swin. Incomplete windows and cells are padded as timm does: published sizes need no padding, any other works.
pub static FAMILY: Family = Family {
    op: "model.swin",
    common: r#"{"patch_size": 4, "in_chans": 3, "window_size": 7, "mlp_ratio": 4.0, "qkv_bias": true, "ape": false, "patch_norm": true,
        "norm_eps": 1e-5, "pad": true}"#,
    build: |config| Built::new(|names| Swin::new(names, config)),
    at_size: zoo::img_size,
    macs,
    rules: Rules { key, resize, heads: &["head"] },
    variants: &[
        variant("swin_tiny_patch4_window7_224", TINY, Eval::IMAGENET, 28_288_354, 4.49),
        variant("swin_small_patch4_window7_224", SMALL, Eval::IMAGENET, 49_606_258, 8.74),
        variant("swin_base_patch4_window7_224", BASE, Eval::IMAGENET, 87_768_224, 15.43),
        variant("swin_base_patch4_window12_384", BASE_12, Eval::IMAGENET.at(384).crop(1.0), 87_903_584, 47.1),
        variant("swin_large_patch4_window7_224", LARGE, Eval::IMAGENET, 196_532_476, 34.48),
        variant("swin_large_patch4_window12_384", LARGE_12, Eval::IMAGENET.at(384).crop(1.0), 196_735_516, 103.9),
        Variant { name: "swin_micro", also: &[], config: MICRO, eval: Eval::SMALL, params: None, gmacs: None },
    ],
};
