//! `block.xca` (XCiT, arXiv 2106.09681) and `block.xvit` (X-ViT, arXiv 2205.13805): attention, then local patch interaction, then MLP.
//!
//! `x ← x + γ₁ ⊙ attn(norm1 x)`, `x ← x + γ₃ ⊙ lpi(norm3 x)`, `x ← x + γ₂ ⊙ mlp(norm2 x)`: the order is 1, 3, 2. The attention is XCA or
//! XNorm. Without LayerScale the gains are 1. Drop path leaves each of the three branches out by itself.
//!
//! Backward: the branches in turn. Norms and GELU are computed again.

use crate::attention::xca::{self, Xca};
use crate::attention::xnorm::{self, XNorm};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::Result;
use crate::kernel::elementwise;
use crate::nn::batch_norm::Updates;
use crate::nn::{DropPath, LayerNorm, LayerScale, Layout, LocalPatchInteraction, Mlp, Names, Params, Stats, lpi, mlp, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

use super::swin_ops::map_size;
use super::vit_block::{add_branch, branch_backward, hidden_width};

/// The attention of a block.
#[derive(Clone, Copy, Debug)]
pub enum Mixing {
    /// Cross-covariance attention.
    Xca(xca::Settings),
    /// XNorm attention.
    XNorm(xnorm::Settings),
}

impl Mixing {
    fn dim(&self) -> usize {
        match self {
            Mixing::Xca(settings) => settings.dim,
            Mixing::XNorm(settings) => settings.dim,
        }
    }

    fn cost(&self, batch: usize, tokens: usize) -> Cost {
        match self {
            Mixing::Xca(settings) => settings.cost(batch, tokens),
            Mixing::XNorm(settings) => settings.cost(batch, tokens),
        }
    }
}

/// What the block is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The attention.
    pub mixing: Mixing,
    /// Hidden width of the MLP over C, truncated.
    pub mlp_ratio: f64,
    /// Start of the gains of the branches, if there are any: 1 for 12 blocks, 1e-5 for 24.
    pub layer_scale: Option<f64>,
    /// The convolutions.
    pub lpi: lpi::Settings,
    /// ε of the three LayerNorms.
    pub ln_eps: f64,
    /// Probability that a branch is left out in training: the same in all blocks.
    pub drop_path: f64,
}

impl Settings {
    /// From the keys `mlp_ratio`, `ln_eps`, `lpi`, `bn_eps`, `bn_momentum`.
    pub fn from_config(config: &Config, mixing: Mixing, layer_scale: Option<f64>) -> Result<Self> {
        Ok(Settings {
            mixing,
            mlp_ratio: config.f64_or("mlp_ratio", 4.0)?,
            layer_scale,
            lpi: lpi::Settings::from_config(config, mixing.dim())?,
            ln_eps: config.f64_or("ln_eps", 1e-6)?,
            drop_path: config.f64_or("drop_path_rate", 0.0)?,
        })
    }
}

#[derive(Clone, Debug)]
enum Attention {
    Xca(Xca),
    XNorm(XNorm),
}

enum AttentionSaved<T: Float> {
    Xca(xca::Saved<T>),
    XNorm(xnorm::Saved<T>),
}

impl Attention {
    fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, residual: Option<&Tensor<T>>) -> Result<(Tensor<T>, AttentionSaved<T>)> {
        Ok(match self {
            Attention::Xca(layer) => {
                let (y, saved) = layer.forward(p, x, residual)?;
                (y, AttentionSaved::Xca(saved))
            }
            Attention::XNorm(layer) => {
                let (y, saved) = layer.forward(p, x, residual)?;
                (y, AttentionSaved::XNorm(saved))
            }
        })
    }

    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: AttentionSaved<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        match (self, saved) {
            (Attention::Xca(layer), AttentionSaved::Xca(saved)) => layer.backward(p, g, x, saved, dy),
            (Attention::XNorm(layer), AttentionSaved::XNorm(saved)) => layer.backward(p, g, x, saved, dy),
            _ => unreachable!("a block saves what its own attention saves"),
        }
    }
}

/// A block with parameters `norm1`, `attn`, `norm3`, `local_mp`, `norm2`, `mlp`, `gamma1`, `gamma3`, `gamma2`.
#[derive(Clone, Debug)]
pub struct Block {
    norm1: LayerNorm,
    attn: Attention,
    norm3: LayerNorm,
    local: LocalPatchInteraction,
    norm2: LayerNorm,
    mlp: Mlp,
    /// In the order of the branches.
    scales: [Option<LayerScale>; 3],
    drops: [DropPath; 3],
    settings: Settings,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    /// The input and the two middles.
    x: [Tensor<T>; 3],
    stats: [Stats<T>; 3],
    attn: AttentionSaved<T>,
    local: lpi::Saved<T>,
    mlp: mlp::Saved<T>,
    branches: [Option<Tensor<T>>; 3],
    map: [usize; 2],
}

impl<T: Float> Saved<T> {
    /// Takes the running statistics after the call: none in evaluation.
    pub fn take_updates(&mut self) -> Updates<T> {
        self.local.take_updates()
    }
}

impl Block {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: Settings) -> Result<Self> {
        let Settings { mixing, mlp_ratio, layer_scale, lpi, ln_eps, drop_path } = settings;
        let dim = mixing.dim();
        let norm1 = LayerNorm::new(names.at("norm1"), dim, ln_eps);
        let attn = match mixing {
            Mixing::Xca(settings) => Attention::Xca(Xca::new(names.at("attn"), settings, normal_02)?),
            Mixing::XNorm(settings) => Attention::XNorm(XNorm::new(names.at("attn"), settings, normal_02)?),
        };
        let norm3 = LayerNorm::new(names.at("norm3"), dim, ln_eps);
        let local = LocalPatchInteraction::new(names.at("local_mp"), lpi)?;
        let norm2 = LayerNorm::new(names.at("norm2"), dim, ln_eps);
        let mlp = Mlp::new(names.at("mlp"), dim, hidden_width(dim, mlp_ratio)?, normal_02);
        let scales = ["gamma1", "gamma3", "gamma2"].map(|name| layer_scale.map(|start| LayerScale::new(names, name, dim, start)));
        let drops = [DropPath::new(names, drop_path)?, DropPath::new(names, drop_path)?, DropPath::new(names, drop_path)?];
        Ok(Block { norm1, attn, norm3, local, norm2, mlp, scales, drops, settings })
    }

    /// What the forward pass for `[b, h, w]` tokens costs.
    pub fn cost(&self, size: [usize; 3], training: bool) -> Result<Cost> {
        let (rows, c) = (size.iter().product::<usize>(), self.settings.mixing.dim());
        let hidden = hidden_width(c, self.settings.mlp_ratio)?;
        let parts = self.settings.mixing.cost(size[0], size[1] * size[2]) + self.local.cost(size, training)?;
        // The MLP's hidden units and output, three times two statistics. With gains, branches and sums are two things.
        let sums = if self.settings.layer_scale.is_some() { 3 * c } else { 0 };
        Ok(parts + Cost { flops: 4 * rows * c * hidden, activation_bytes: 4 * rows * (hidden + c + 6 + sums) })
    }

    /// The block's output, for tokens `[B, N, C]` of a map of `map` rows and columns.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>, map: [usize; 2], training: bool) -> Result<(Tensor<T>, Saved<T>)> {
        let ([scale1, scale3, scale2], [drop1, drop3, drop2]) = (self.scales, self.drops);
        let (normed, stats1) = self.norm1.forward(p, &x)?;
        let (x3, attn, branch1) = add_branch(p, drop1, scale1, &x, |residual| self.attn.forward(p, &normed, residual))?;
        let (normed, stats3) = self.norm3.forward(p, &x3)?;
        let (x2, local, branch3) = add_branch(p, drop3, scale3, &x3, |residual| {
            let (mut f, saved) = self.local.forward(p, &normed, map, training)?;
            if let Some(residual) = residual {
                elementwise::add(f.data_mut(), residual.data());
            }
            Ok((f, saved))
        })?;
        let (normed, stats2) = self.norm2.forward(p, &x2)?;
        let (y, mlp, branch2) = add_branch(p, drop2, scale2, &x2, |residual| self.mlp.forward(p, &normed, residual))?;
        let (x, stats) = ([x, x3, x2], [stats1, stats3, stats2]);
        Ok((y, Saved { x, stats, attn, local, mlp, branches: [branch1, branch3, branch2], map }))
    }

    /// `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let Saved { x: [x, x3, x2], stats: [stats1, stats3, stats2], attn, local, mlp, branches: [branch1, branch3, branch2], map } = saved;
        let ([scale1, scale3, scale2], [drop1, drop3, drop2]) = (self.scales, self.drops);
        let normed = self.norm2.again(p, &x2, &stats2);
        let branch = (drop2, scale2, branch2);
        let d_normed = branch_backward(p, g, branch, dy, |g, df| self.mlp.backward(p, g, &normed, mlp, df))?;
        drop(normed);
        let d2 = self.norm2.backward(p, g, &x2, &stats2, &d_normed, Some(dy))?;
        drop((d_normed, x2));
        let normed = self.norm3.again(p, &x3, &stats3);
        let branch = (drop3, scale3, branch3);
        let d_normed = branch_backward(p, g, branch, &d2, |g, df| self.local.backward(p, g, &normed, map, local, df))?;
        drop(normed);
        let d3 = self.norm3.backward(p, g, &x3, &stats3, &d_normed, Some(&d2))?;
        drop((d_normed, d2, x3));
        let normed = self.norm1.again(p, &x, &stats1);
        let branch = (drop1, scale1, branch1);
        let d_normed = branch_backward(p, g, branch, &d3, |g, df| self.attn.backward(p, g, &normed, attn, df))?;
        drop(normed);
        self.norm1.backward(p, g, &x, &stats1, &d_normed, Some(&d3))
    }
}

/// A random map, and what both blocks share.
fn sample(rng: &mut Rng, config: &mut Config) {
    config.set("mlp_ratio", rng.range(0.5, 2.5)).set("qkv_bias", rng.chance(0.7));
    config.set("height", rng.between(1, 4)).set("width", rng.between(2, 4)).set("ln_eps", 1e-6);
    config.set("bn_eps", 1e-5).set("bn_momentum", 0.1).set("training", rng.chance(0.5));
}

fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
    let ([height, width], batch) = (map_size(config)?, draw.size("batch", 2, 3));
    draw.normal("x", [batch, height * width, config.positive("dim")?]);
    Ok(())
}

fn cost(config: &Config, shapes: &Shapes, settings: Settings) -> Result<Option<Cost>> {
    let ([b, _, _], [height, width]) = (shapes.dims("x")?, map_size(config)?);
    let (block, _) = Layout::build(|names| Block::new(names, settings))?;
    block.cost([b, height, width], config.bool("training")?).map(Some)
}

fn run_block<T: Float>(run: &mut Run<T>, settings: Settings) -> Result<()> {
    let (map, training) = (map_size(run.config())?, run.config().bool("training")?);
    let (block, layout) = Layout::build(|names| Block::new(names, settings))?;
    let mut updates = Vec::new();
    run.unary(
        &layout,
        |p, x| {
            let (y, mut saved) = block.forward(p, x.clone(), map, training)?;
            updates = saved.take_updates();
            Ok((y, saved))
        },
        |p, g, saved, dy| block.backward(p, g, saved, dy),
    )?;
    run.after_buffers(&layout, updates);
    Ok(())
}

/// `block.xca`.
pub struct XcaBlock;

fn xca_settings(config: &Config) -> Result<Settings> {
    Settings::from_config(config, Mixing::Xca(xca::Settings::from_config(config, "dim")?), Some(1.0))
}

impl Operation for XcaBlock {
    const NAME: &'static str = "block.xca";
    const PAPER: &'static str = "2106.09681 XCiT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        // A norm over one channel is constant: nothing to differentiate.
        let heads = rng.between(1, 3);
        config.set("dim", heads * rng.between(2, 4)).set("num_heads", heads);
        sample(rng, &mut config);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        inputs(config, draw)
    }

    fn cost(config: &Config, shapes: &Shapes) -> Result<Option<Cost>> {
        cost(config, shapes, xca_settings(config)?)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        run_block(run, xca_settings(run.config())?)
    }
}

/// `block.xvit`.
pub struct XvitBlock;

fn xvit_settings(config: &Config) -> Result<Settings> {
    let layer_scale = config.bool_or("layer_scale", true)?.then_some(1.0);
    Settings::from_config(config, Mixing::XNorm(xnorm::Settings::from_config(config, "dim")?), layer_scale)
}

impl Operation for XvitBlock {
    const NAME: &'static str = "block.xvit";
    const PAPER: &'static str = "2205.13805 X-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        xnorm::sample_settings(rng, &mut config);
        sample(rng, &mut config);
        config.set("dim", rng.between(2, 8)).set("lpi", rng.pick(&["xcit", "conv_bn_gelu"])).set("layer_scale", rng.chance(0.5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        inputs(config, draw)
    }

    fn cost(config: &Config, shapes: &Shapes) -> Result<Option<Cost>> {
        cost(config, shapes, xvit_settings(config)?)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        run_block(run, xvit_settings(run.config())?)
    }
}
