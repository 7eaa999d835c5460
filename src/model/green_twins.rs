//! Twins-SVT over visible tokens (GreenMIM, arXiv 2205.13515): `nn.peg_visible`, `model.green_twins`.
//!
//! Every stage embeds its tokens (patches of the image, then 2×2 cells of visible tokens) with a norm and runs blocks `x + attn(norm1 x)`,
//! `x + mlp(norm2 x)`: even ones attend inside windows without bias or shift, odd ones globally to a reduced map. After the first block
//! of a stage the position generator replaces the tokens. A coarse cell (one token of the last stage) is visible or hidden as a whole.

use super::green_swin::mask_values;
use super::pre_norm::{self, PreNorm};
use crate::attention::softmax::{self, Attention};
use crate::attention::spatial_reduction::{self, Mode, Settings, SpatialReduction, check_reduction, draw_visible, visible_input};
use crate::attention::window::visible_windows;
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::Groups;
use crate::kernel::neighbours;
use crate::nn::{CellConv, Cells, Init, LayerNorm, Layout, Names, Params, PatchEmbed, Peg, Stats, patch_embed, xavier};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// What a Twins encoder is made of.
#[derive(Clone, Debug)]
pub struct EncoderSettings {
    /// Side of the images.
    pub img_size: usize,
    /// Patch side.
    pub patch_size: usize,
    /// Image channels.
    pub in_chans: usize,
    /// Widths per stage.
    pub embed_dims: Vec<usize>,
    /// Heads per stage.
    pub num_heads: Vec<usize>,
    /// Hidden widths of the MLPs over the width, per stage.
    pub mlp_ratios: Vec<f64>,
    /// Blocks per stage.
    pub depths: Vec<usize>,
    /// Reductions of the global attentions, per stage.
    pub sr_ratios: Vec<usize>,
    /// Window side of the local attentions.
    pub window_size: usize,
    /// `qkv`, `q` and `kv` have biases.
    pub qkv_bias: bool,
    /// ε of all norms.
    pub norm_eps: f64,
}

impl EncoderSettings {
    /// From the keys of `model.green_twins`.
    pub fn from_config(config: &Config) -> Result<Self> {
        let settings = EncoderSettings {
            img_size: config.positive("img_size")?,
            patch_size: config.usize_or("patch_size", 4)?,
            in_chans: config.usize_or("in_chans", 3)?,
            embed_dims: config.usizes("embed_dims")?,
            num_heads: config.usizes("num_heads")?,
            mlp_ratios: config.f64s("mlp_ratios")?,
            depths: config.usizes("depths")?,
            sr_ratios: config.usizes("sr_ratios")?,
            window_size: config.positive("window_size")?,
            qkv_bias: config.bool_or("qkv_bias", true)?,
            norm_eps: config.f64_or("norm_eps", 1e-6)?,
        };
        let s = &settings;
        let count = s.embed_dims.len();
        if [s.num_heads.len(), s.mlp_ratios.len(), s.depths.len(), s.sr_ratios.len()] != [count; 4] || count == 0 || count > 16 {
            return Err(Error::config("embed_dims", format!("expected as many entries in every list of stages, found {s:?}")));
        }
        if s.embed_dims.contains(&0) || s.depths.contains(&0) {
            return Err(Error::config("depths", "expected a positive width and at least one block per stage"));
        }
        let cell = s.patch_size.checked_shl(count as u32 - 1).unwrap_or(0);
        if cell == 0 || !s.img_size.is_multiple_of(cell) {
            return Err(Error::config("img_size", format!("expected whole cells of {cell} pixels, found {}", s.img_size)));
        }
        Ok(settings)
    }

    /// Cells per side: tokens of the last stage.
    pub fn cells(&self) -> usize {
        self.side(self.embed_dims.len() - 1)
    }

    /// Tokens per side at a stage.
    fn side(&self, stage: usize) -> usize {
        (self.img_size / self.patch_size) >> stage
    }
}

/// The attention of a block.
#[derive(Clone, Debug)]
enum Mixer {
    Local(Attention),
    Global(SpatialReduction),
}

enum MixerSaved<T: Float> {
    Local(softmax::Saved<T>),
    Global(spatial_reduction::Saved<T>),
}

#[derive(Clone, Debug)]
struct Block {
    mixer: Mixer,
    pre_norm: PreNorm,
}

type BlockSaved<T> = pre_norm::Saved<T, MixerSaved<T>>;

impl Block {
    fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>, plan: &StagePlan) -> Result<(Tensor<T>, BlockSaved<T>)> {
        self.pre_norm.forward(p, x, |normed, residual| match &self.mixer {
            Mixer::Local(attn) => {
                let (y, saved) = attn.forward(p, normed, &plan.windows, None, residual)?;
                Ok((y, MixerSaved::Local(saved)))
            }
            Mixer::Global(attn) => {
                let (y, saved) = attn.forward(p, normed, &plan.reduced, residual)?;
                Ok((y, MixerSaved::Global(saved)))
            }
        })
    }

    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: BlockSaved<T>,
        plan: &StagePlan,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        self.pre_norm.backward(p, g, saved, dy, |g, normed, saved, d| match (&self.mixer, saved) {
            (Mixer::Local(attn), MixerSaved::Local(saved)) => attn.backward(p, g, normed, saved, &plan.windows, None, d),
            (Mixer::Global(attn), MixerSaved::Global(saved)) => attn.backward(p, g, normed, saved, &plan.reduced, d),
            _ => Err(Error::usage("a block got what another one saved")),
        })
    }
}

#[derive(Clone, Debug)]
struct Stage {
    /// The convolution over cells of the stage before and its norm; the first stage embeds the image.
    embed: Option<(CellConv, LayerNorm)>,
    blocks: Vec<Block>,
    peg: Peg,
}

/// Which tokens a stage works on.
#[derive(Clone, Debug)]
pub struct StagePlan {
    /// Its tokens as cells of the stage before.
    merged: Option<Cells>,
    windows: Groups,
    reduced: Cells,
    near: Vec<u32>,
}

/// The visible tokens of all stages.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Visible patches of the image.
    pub keep: Vec<u32>,
    stages: Vec<StagePlan>,
}

/// Twins up to its final norm.
#[derive(Clone, Debug)]
pub struct Encoder {
    settings: EncoderSettings,
    patch_embed: PatchEmbed,
    stages: Vec<Stage>,
    norm: LayerNorm,
}

struct StageSaved<T: Float> {
    /// What the stage before gave, the convolution's output and the norm's statistics.
    embed: Option<(Tensor<T>, Tensor<T>, Stats<T>)>,
    /// What went into the position generator.
    peg: Tensor<T>,
    blocks: Vec<BlockSaved<T>>,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    patches: patch_embed::Saved<T>,
    stages: Vec<StageSaved<T>>,
    last: Tensor<T>,
    stats: Stats<T>,
}

impl Encoder {
    /// Registers `patch_embeds.{i}`, `pos_block.{i}.proj.0`, `blocks.{i}.{j}`, `norm`.
    pub fn new(names: &mut Names, settings: EncoderSettings) -> Result<Self> {
        let s = &settings;
        let pixels = s.in_chans * s.patch_size * s.patch_size;
        let (image, first, eps) = ([s.img_size; 2], s.embed_dims[0], s.norm_eps);
        let patch_embed =
            PatchEmbed::new(names.at("patch_embeds.0"), image, s.patch_size, s.in_chans, first, Some(eps), xavier(pixels, first))?;
        let mut stages = Vec::new();
        for (i, (&dim, &num_heads)) in s.embed_dims.iter().zip(&s.num_heads).enumerate() {
            check_reduction([s.side(i); 2], s.sr_ratios[i])?;
            let embed = if i == 0 {
                None
            } else {
                let (mut names, from) = (names.at(format!("patch_embeds.{i}")), s.embed_dims[i - 1]);
                let conv = CellConv::new(names.at("proj"), from, dim, 2, Init::XavierUniform { fan_in: 4 * from, fan_out: dim })?;
                Some((conv, LayerNorm::new(names.at("norm"), dim, eps)))
            };
            let block = |names: &mut Names, j: usize| -> Result<Block> {
                let mixer = if j.is_multiple_of(2) {
                    let settings = softmax::Settings { qkv_bias: s.qkv_bias, ..softmax::Settings::new(dim, num_heads) };
                    Mixer::Local(Attention::new(names.at("attn"), settings, xavier)?)
                } else {
                    let settings =
                        Settings { dim, num_heads, sr_ratio: s.sr_ratios[i], mode: Mode::Conv, qkv_bias: s.qkv_bias, norm_eps: eps };
                    Mixer::Global(SpatialReduction::new(&mut names.at("attn"), settings, xavier)?)
                };
                Ok(Block { mixer, pre_norm: PreNorm::new(names, dim, s.mlp_ratios[i], eps, 0.0, xavier)? })
            };
            let blocks = (0..s.depths[i]).map(|j| block(&mut names.at(format!("blocks.{i}.{j}")), j)).collect::<Result<_>>()?;
            stages.push(Stage { embed, blocks, peg: Peg::new(names.at(format!("pos_block.{i}.proj.0")), dim) });
        }
        let norm = LayerNorm::new(names.at("norm"), s.embed_dims[s.embed_dims.len() - 1], eps);
        Ok(Encoder { patch_embed, stages, norm, settings })
    }

    /// The patch embedding.
    pub fn patch_embed(&self) -> &PatchEmbed {
        &self.patch_embed
    }

    /// The settings.
    pub fn settings(&self) -> &EncoderSettings {
        &self.settings
    }

    /// The visible tokens under a mask over the coarse cells (`true` = hidden).
    pub fn plan(&self, hidden: &[bool]) -> Result<Plan> {
        let (s, cells) = (&self.settings, self.settings.cells());
        if hidden.len() != cells * cells {
            return Err(Error::shape("input `mask`", [cells * cells], [hidden.len()]));
        }
        let (mut stages, mut keep) = (Vec::with_capacity(self.stages.len()), Vec::new());
        let mut before: Vec<[usize; 2]> = Vec::new();
        for i in 0..self.stages.len() {
            let (side, factor) = (s.side(i), s.side(i) / cells);
            let places = (0..side * side).map(|t| [t / side, t % side]);
            let coords: Vec<[usize; 2]> = places.filter(|[y, x]| !hidden[y / factor * cells + x / factor]).collect();
            if i == 0 {
                keep = coords.iter().map(|[y, x]| (y * side + x) as u32).collect();
            }
            stages.push(StagePlan {
                merged: (i > 0).then(|| Cells::visible(&before, [2 * side; 2], 2)),
                windows: visible_windows(&coords, s.window_size, 0)?,
                reduced: Cells::visible(&coords, [side; 2], s.sr_ratios[i]),
                near: neighbours::of_coords(&coords),
            });
            before = coords;
        }
        Ok(Plan { keep, stages })
    }

    /// The normed tokens `[B, visible cells, C]`, in raster order.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, plan: &Plan) -> Result<(Tensor<T>, Saved<T>)> {
        let (mut x, patches) = self.patch_embed.forward(p, image, Some(&plan.keep))?;
        let mut saved = Vec::with_capacity(self.stages.len());
        for (i, (stage, plan)) in self.stages.iter().zip(&plan.stages).enumerate() {
            let embed = match (&stage.embed, &plan.merged) {
                (Some((conv, norm)), Some(cells)) => {
                    let c = conv.forward(p, &x, cells)?;
                    let (y, stats) = norm.forward(p, &c)?;
                    Some((std::mem::replace(&mut x, y), c, stats))
                }
                _ => None,
            };
            let (mut peg, mut blocks) = (None, Vec::with_capacity(stage.blocks.len()));
            for block in &stage.blocks {
                let (y, s) = block.forward(p, x, plan)?;
                blocks.push(s);
                x = match peg {
                    Some(_) => y,
                    None => {
                        let encoded = stage.peg.forward(p, &y, &plan.near)?;
                        peg = Some(y);
                        encoded
                    }
                };
            }
            let peg = peg.ok_or_else(|| Error::config("depths", "expected at least one block per stage"))?;
            saved.push(StageSaved { embed, peg, blocks });
            p.show(format!("stages.{i}"), &x);
        }
        let (y, stats) = self.norm.forward(p, &x)?;
        Ok((y, Saved { patches, stages: saved, last: x, stats }))
    }

    /// Adds the gradients of the parameters; returns that of the kept patches' tokens, and what the patch embedding saved.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        plan: &Plan,
        dy: &Tensor<T>,
    ) -> Result<(Tensor<T>, patch_embed::Saved<T>)> {
        let Saved { patches, stages, last, stats } = saved;
        let mut d = self.norm.backward(p, g, &last, &stats, dy, None)?;
        drop(last);
        for ((stage, plan), saved) in self.stages.iter().zip(&plan.stages).zip(stages).rev() {
            for (j, (block, saved_block)) in stage.blocks.iter().zip(saved.blocks).enumerate().rev() {
                if j == 0 {
                    d = stage.peg.backward(p, g, &saved.peg, &plan.near, &d)?;
                }
                d = block.backward(p, g, saved_block, plan, &d)?;
            }
            if let (Some((conv, norm)), Some(cells), Some((x, c, stats))) = (&stage.embed, &plan.merged, saved.embed) {
                let dc = norm.backward(p, g, &c, &stats, &d, None)?;
                d = conv.backward(p, g, &x, cells, &dc)?;
            }
        }
        Ok((d, patches))
    }
}

/// A random small encoder with one or two cells per side, at least `least_cells`.
pub fn sample_encoder(rng: &mut Rng, least_cells: usize) -> Config {
    let (stages, patch) = (rng.between(1, 3), rng.between(1, 2));
    let (side, mut config) = (rng.between(least_cells, 2) << (stages - 1), Config::default());
    config.set("img_size", side * patch).set("patch_size", patch).set("in_chans", rng.between(1, 3));
    let heads: Vec<usize> = (0..stages).map(|_| rng.between(1, 2)).collect();
    config.set("embed_dims", heads.iter().map(|heads| heads * rng.between(2, 3)).collect::<Vec<_>>()).set("num_heads", heads);
    config.set("mlp_ratios", (0..stages).map(|_| rng.between(1, 2)).collect::<Vec<_>>());
    config.set("depths", (0..stages).map(|_| rng.between(1, 3)).collect::<Vec<_>>()).set("window_size", rng.between(1, 4));
    config.set("sr_ratios", (0..stages).map(|i| rng.between(1, side >> i)).collect::<Vec<_>>());
    config.set("qkv_bias", rng.chance(0.7)).set("norm_eps", 1e-6);
    config
}

/// `model.green_twins`.
pub struct ModelGreenTwins;

impl Operation for ModelGreenTwins {
    const NAME: &'static str = "model.green_twins";
    const PAPER: &'static str = "2205.13515 GreenMIM";

    fn sample(rng: &mut Rng) -> Config {
        sample_encoder(rng, 1)
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let settings = EncoderSettings::from_config(config)?;
        let (side, cells, batch) = (settings.img_size, settings.cells(), draw.size("batch", 1, 2));
        let mut mask: Vec<i64> = (0..cells * cells).map(|_| i64::from(draw.rng.chance(0.5))).collect();
        mask[0] = 0;
        draw.ints("mask", [cells * cells], mask)?;
        draw.normal("image", [batch, settings.in_chans, side, side]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = EncoderSettings::from_config(run.config())?;
        let image: Tensor<T> = run.input("image")?;
        let [batch, ..] = image.dims::<4>("input `image`")?;
        image.expect_shape("input `image`", [batch, settings.in_chans, settings.img_size, settings.img_size])?;
        let (encoder, layout) = Layout::build(|names| Encoder::new(names, settings))?;
        let plan = encoder.plan(&mask_values(run.ints("mask")?)?)?;
        let p: Params<T> = run.params(&layout)?;
        let (y, saved) = encoder.forward(&p, &image, &plan)?;
        run.output("y", &y);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let (d, patches) = encoder.backward(&p, &mut g, saved, &plan, &run.cotangent("y", y.shape())?)?;
            run.grad_input("image", &encoder.patch_embed().backward(&p, &mut g, &patches, &d, Some(&plan.keep))?);
            run.grad_params(&g);
        }
        Ok(())
    }
}

/// `nn.peg_visible`.
pub struct PegVisible;

impl Operation for PegVisible {
    const NAME: &'static str = "nn.peg_visible";
    const PAPER: &'static str = "2205.13515 GreenMIM";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("height", rng.between(1, 7)).set("width", rng.between(1, 7)).set("dim", rng.between(1, 20));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_visible(config, draw)
    }

    fn cost(_: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, dim] = inputs.dims("x")?;
        Ok(Some(Peg::cost(dim, b, n)))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (_, coords, x) = visible_input(run)?;
        let near = neighbours::of_coords(&coords);
        let (layer, layout) = Layout::build(|names| Ok(Peg::new(names.at("proj.0"), x.shape()[2])))?;
        run.unary(&layout, |p, x| Ok((layer.forward(p, x, &near)?, ())), |p, g, (), dy| layer.backward(p, g, &x, &near, dy))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_size() {
        let json = r#"{"img_size": 224, "patch_size": 4, "in_chans": 3, "embed_dims": [128, 256, 512, 1024], "num_heads": [4, 8, 16, 32],
            "mlp_ratios": [4, 4, 4, 4], "depths": [2, 2, 18, 2], "window_size": 7, "sr_ratios": [8, 4, 2, 1], "qkv_bias": true}"#;
        let settings = EncoderSettings::from_config(&Config::parse(json).unwrap()).unwrap();
        let (_, layout) = Layout::build(|names| Encoder::new(names, settings)).unwrap();
        assert_eq!(layout.numel(), 98_246_400);
    }
}
