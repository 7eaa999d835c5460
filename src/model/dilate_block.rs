//! `block.dilate` and `block.dilate_global`: DilateFormer's blocks (arXiv 2302.01791), on maps with channels last.
//!
//! `x ← x + dw3×3(x)` (a position encoding, if there is one), `x ← x + attn(norm1 x)`, `x ← x + mlp(norm2 x)`: dilated attention in the early
//! stages, global in the late ones.

use crate::attention::dilated::{self, Dilated, global_settings, sample_settings};
use crate::attention::softmax::{self, Attention};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::Result;
use crate::kernel::attention::Groups;
use crate::nn::dilate::PositionConv;
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::{DropPath, LayerNorm, Layout, Mlp, Names, Params, Stats, mlp, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

use super::vit_block::hidden_width;

/// ε of all LayerNorms.
pub const NORM_EPS: f64 = 1e-6;

/// The attention of a block.
#[derive(Clone, Debug)]
pub enum MixerSettings {
    /// Neighbourhoods.
    Dilated(dilated::Settings),
    /// The whole map.
    Global(softmax::Settings),
}

/// What a block is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The attention.
    pub mixer: MixerSettings,
    /// Hidden width of the MLP over C, truncated.
    pub mlp_ratio: f64,
    /// A position encoding comes first.
    pub cpe: bool,
    /// Probability that a residual branch is left out in training.
    pub drop_path: f64,
}

impl Settings {
    fn from_config(config: &Config, is_dilated: bool) -> Result<Self> {
        let mixer = if is_dilated {
            MixerSettings::Dilated(dilated::Settings::from_config(config)?)
        } else {
            MixerSettings::Global(global_settings(config)?)
        };
        Ok(Settings { mixer, mlp_ratio: config.f64_or("mlp_ratio", 4.0)?, cpe: config.bool_or("cpe_per_block", false)?, drop_path: 0.0 })
    }

    fn dim(&self) -> usize {
        match &self.mixer {
            MixerSettings::Dilated(settings) => settings.dim,
            MixerSettings::Global(settings) => settings.dim,
        }
    }

    /// What a forward pass on `[b, h, w]` costs, beside the input: it stays where there is no position encoding.
    pub fn cost(&self, [b, h, w]: [usize; 3]) -> Result<Cost> {
        let (c, n) = (self.dim(), h * w);
        let hidden = hidden_width(c, self.mlp_ratio)?;
        let attention = match &self.mixer {
            MixerSettings::Dilated(settings) => settings.cost(b * n),
            MixerSettings::Global(s) => {
                Cost { flops: 2 * b * n * (4 * c * c + 2 * n * c), activation_bytes: 4 * b * n * (5 * c + 2 * s.num_heads) }
            }
        };
        // The MLP; the statistics of both norms, the hidden units, y (the attention's output is the middle).
        let rest = Cost { flops: 4 * b * n * c * hidden, activation_bytes: 4 * b * n * (4 + hidden + c) };
        let position = if self.cpe { Cost { flops: 18 * b * n * c, activation_bytes: 4 * b * n * c } } else { Cost::default() };
        Ok(attention + rest + position)
    }
}

#[derive(Clone, Debug)]
enum Mixer {
    Dilated(Box<Dilated>),
    Global(Box<Attention>),
}

enum MixerSaved<T: Float> {
    Dilated(dilated::Saved<T>),
    Global(Box<softmax::Saved<T>>),
}

impl Mixer {
    fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, residual: Option<&Tensor<T>>) -> Result<(Tensor<T>, MixerSaved<T>)> {
        match self {
            Mixer::Dilated(layer) => {
                let (y, saved) = layer.forward(p, x, residual)?;
                Ok((y, MixerSaved::Dilated(saved)))
            }
            Mixer::Global(layer) => {
                let (shape, tokens) = (x.shape(), as_tokens(x)?);
                let residual = residual.map(as_tokens).transpose()?;
                let (y, saved) = layer.forward(p, &tokens, &all(&tokens)?, None, residual.as_ref())?;
                Ok((y.reshape(shape)?, MixerSaved::Global(Box::new(saved))))
            }
        }
    }

    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: MixerSaved<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        match (self, saved) {
            (Mixer::Dilated(layer), MixerSaved::Dilated(saved)) => layer.backward(p, g, x, saved, dy),
            (Mixer::Global(layer), MixerSaved::Global(saved)) => {
                let (shape, x) = (x.shape(), as_tokens(x)?);
                layer.backward(p, g, &x, *saved, &all(&x)?, None, &as_tokens(dy)?)?.reshape(shape)
            }
            _ => unreachable!("a block gets back what it saved"),
        }
    }
}

/// `[B, H, W, C]` as `[B, H·W, C]`.
fn as_tokens<T: Float>(x: &Tensor<T>) -> Result<Tensor<T>> {
    let [b, h, w, c] = x.dims("map [B, H, W, C]")?;
    x.reshape([b, h * w, c])
}

fn all<T: Float>(tokens: &Tensor<T>) -> Result<Groups> {
    let [_, n, _] = tokens.dims("tokens")?;
    Ok(Groups::all(n, n))
}

/// A block with parameters `pos_embed`, `norm1`, `attn`, `norm2`, `mlp`.
#[derive(Clone, Debug)]
pub struct DilateBlock {
    pos_embed: Option<PositionConv>,
    norm1: LayerNorm,
    attn: Mixer,
    norm2: LayerNorm,
    mlp: Mlp,
    drops: [DropPath; 2],
}

/// What [`DilateBlock::backward`] needs.
pub struct Saved<T: Float> {
    /// The input, where a position encoding follows.
    input: Option<Tensor<T>>,
    x: Tensor<T>,
    stats1: Stats<T>,
    attn: MixerSaved<T>,
    middle: Tensor<T>,
    stats2: Stats<T>,
    mlp: mlp::Saved<T>,
}

impl DilateBlock {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: &Settings) -> Result<Self> {
        let dim = settings.dim();
        let pos_embed = if settings.cpe { Some(PositionConv::new(names.at("pos_embed"), dim)?) } else { None };
        let norm1 = LayerNorm::new(names.at("norm1"), dim, NORM_EPS);
        let attn = match &settings.mixer {
            MixerSettings::Dilated(s) => Mixer::Dilated(Box::new(Dilated::new(names.at("attn"), s.clone())?)),
            MixerSettings::Global(s) => Mixer::Global(Box::new(Attention::new(names.at("attn"), *s, normal_02)?)),
        };
        let norm2 = LayerNorm::new(names.at("norm2"), dim, NORM_EPS);
        let mlp = Mlp::new(names.at("mlp"), dim, hidden_width(dim, settings.mlp_ratio)?, normal_02);
        let drops = [DropPath::new(names, settings.drop_path)?, DropPath::new(names, settings.drop_path)?];
        Ok(DilateBlock { pos_embed, norm1, attn, norm2, mlp, drops })
    }

    /// `[B, H, W, C]` → the same.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let (x, input) = match &self.pos_embed {
            Some(pos_embed) => (pos_embed.forward(p, &x)?, Some(x)),
            None => (x, None),
        };
        let (normed, stats1) = self.norm1.forward(p, &x)?;
        let (middle, attn) = self.drops[0].residual(p, &x, |residual| self.attn.forward(p, &normed, residual))?;
        let (normed, stats2) = self.norm2.forward(p, &middle)?;
        let (y, mlp) = self.drops[1].residual(p, &middle, |residual| self.mlp.forward(p, &normed, residual))?;
        Ok((y, Saved { input, x, stats1, attn, middle, stats2, mlp }))
    }

    /// `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let Saved { input, x, stats1, attn, middle, stats2, mlp } = saved;
        let normed = self.norm2.again(p, &middle, &stats2);
        let d_normed = self.drops[1].backward(p, dy, |d| self.mlp.backward(p, g, &normed, mlp, d))?;
        drop(normed);
        let d_middle = self.norm2.backward(p, g, &middle, &stats2, &d_normed, Some(dy))?;
        drop((d_normed, middle));
        let normed = self.norm1.again(p, &x, &stats1);
        let d_normed = self.drops[0].backward(p, &d_middle, |d| self.attn.backward(p, g, &normed, attn, d))?;
        drop(normed);
        let dx = self.norm1.backward(p, g, &x, &stats1, &d_normed, Some(&d_middle))?;
        match (&self.pos_embed, input) {
            (Some(pos_embed), Some(input)) => pos_embed.backward(p, g, &input, &dx),
            _ => Ok(dx),
        }
    }
}

/// A random map `x` `[batch, dim, height, width]`.
fn draw_map(config: &Config, draw: &mut Draw) -> Result<()> {
    let (batch, height, width) = (draw.size("batch", 1, 2), draw.size("height", 1, 6), draw.size("width", 1, 6));
    draw.normal("x", [batch, config.positive("dim")?, height, width]);
    Ok(())
}

fn cost_of(config: &Config, inputs: &Shapes, is_dilated: bool) -> Result<Option<Cost>> {
    let [b, c, h, w] = inputs.dims("x")?;
    // The input with channels last.
    let input = Cost { flops: 0, activation_bytes: 4 * b * c * h * w };
    Ok(Some(input + Settings::from_config(config, is_dilated)?.cost([b, h, w])?))
}

fn run_block<T: Float>(run: &mut Run<T>, is_dilated: bool) -> Result<()> {
    let settings = Settings::from_config(run.config(), is_dilated)?;
    let (block, layout) = Layout::build(|names| DilateBlock::new(names, &settings))?;
    run.unary(
        &layout,
        |p, x| {
            let (y, saved) = block.forward(p, channels_last(x)?)?;
            Ok((channels_first(&y)?, saved))
        },
        |p, g, saved, dy| channels_first(&block.backward(p, g, saved, &channels_last(dy)?)?),
    )
}

/// `block.dilate`.
pub struct BlockDilate;

impl Operation for BlockDilate {
    const NAME: &'static str = "block.dilate";
    const PAPER: &'static str = "2302.01791 DilateFormer";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        // A norm over one channel is constant: heads of two at least.
        sample_settings(rng, &mut config, 2);
        config.set("mlp_ratio", rng.range(0.5, 3.0)).set("cpe_per_block", rng.chance(0.6));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_map(config, draw)
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        cost_of(config, inputs, true)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        run_block(run, true)
    }
}

/// `block.dilate_global`.
pub struct BlockDilateGlobal;

impl Operation for BlockDilateGlobal {
    const NAME: &'static str = "block.dilate_global";
    const PAPER: &'static str = "2302.01791 DilateFormer";

    fn sample(rng: &mut Rng) -> Config {
        let heads = rng.between(1, 3);
        let mut config = Config::default();
        config.set("dim", heads * rng.between(2, 5)).set("num_heads", heads).set("qkv_bias", rng.chance(0.7));
        config.set("mlp_ratio", rng.range(0.5, 3.0)).set("cpe_per_block", rng.chance(0.6));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_map(config, draw)
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        cost_of(config, inputs, false)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        run_block(run, false)
    }
}
