//! Swin Transformer (arXiv 2103.14030): `block.swin`, `nn.patch_merging`, `model.swin`; and the encoder that GreenMIM runs on
//! visible tokens and SimMIM on masked ones.
//!
//! A stage knows two groupings of its tokens, one for each shift, and four token indices per merged cell. Which tokens exist
//! is a [`Plan`]: all of a map, or the visible ones. Nothing else differs between the dense and the sparse network.

use crate::attention::softmax::Settings as AttentionSettings;
use crate::attention::window::{RelativeBias, qk_scale, shifted_windows};
use crate::case::{Config, Cost};
use crate::error::{Error, Result};
use crate::kernel::attention::Groups;
use crate::kernel::rows;
use crate::model::vit_block::{self, Block, BlockSettings};
use crate::nn::{Init, LayerNorm, Linear, Names, Param, Params, PatchEmbed, Stats, normal_02, patch_embed};
use crate::tensor::{Float, Tensor};

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
type StageSaved<T> = (Vec<vit_block::Saved<T>>, Option<MergingSaved<T>>);

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
        let mut stages = Vec::new();
        for (i, (&depth, &heads)) in s.depths.iter().zip(&s.num_heads).enumerate() {
            let mut names = names.at(format!("layers.{i}"));
            let dim = s.embed_dim << i;
            let (window, _) = clip_window(grid, s.window_size, 0, s.pad);
            let attention = AttentionSettings { qkv_bias: s.qkv_bias, scale: s.qk_scale, ..AttentionSettings::new(dim, heads) };
            let block =
                BlockSettings { attention, mlp_ratio: s.mlp_ratio, norm_eps: s.norm_eps, layer_scale: None, drop_path: 0.0, init: s.init };
            let blocks = (0..depth).map(|b| SwinBlock::new(&mut names.at(format!("blocks.{b}")), block, window)).collect::<Result<_>>()?;
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
            let mut blocks = Vec::with_capacity(stage.blocks.len());
            for (b, block) in stage.blocks.iter().enumerate() {
                let (y, s) = block.forward(p, x, if b % 2 == 0 { &plan.plain } else { &plan.shifted })?;
                x = y;
                blocks.push(s);
            }
            p.show(format!("stage.{i}"), &x);
            let mut merging = None;
            if let Some(downsample) = &stage.downsample {
                let (y, s) = downsample.forward(p, &x, &plan.cells)?;
                x = y;
                merging = Some(s);
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
            for (b, (block, saved)) in stage.blocks.iter().zip(blocks).enumerate().rev() {
                dx = block.backward(p, g, saved, if b % 2 == 0 { &plan.plain } else { &plan.shifted }, &dx)?;
            }
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
