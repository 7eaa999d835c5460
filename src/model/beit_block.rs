//! `block.beit`: BEiT's pre-norm block (arXiv 2106.08254), also SimMIM's (2111.09886) and, under other names, A²MIM's (2205.13943,
//! `block.a2mim_vit`).
//!
//! `x ← x + γ₁ ⊙ attn(norm1 x)`, `x ← x + γ₂ ⊙ mlp(norm2 x)`; without LayerScale the gains are 1.

use crate::attention::beit::{self, BeitAttention, Biases, draw_inputs, run_with_outer_bias, sample_settings};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::Result;
use crate::nn::beit_rel_pos::window;
use crate::nn::{DropPath, Init, LayerNorm, LayerScale, Layout, Mlp, Names, Params, Stats, mlp};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

use super::vit_block::{add_branch, branch_backward, hidden_width};

/// The published names of the parts.
#[derive(Clone, Copy, Debug)]
pub struct PartNames {
    /// Both norms.
    pub norms: [&'static str; 2],
    /// The MLP.
    pub mlp: &'static str,
    /// Its two layers.
    pub layers: [&'static str; 2],
}

/// BEiT's and SimMIM's names.
pub const BEIT_NAMES: PartNames = PartNames { norms: ["norm1", "norm2"], mlp: "mlp", layers: ["fc1", "fc2"] };
/// A²MIM's names.
pub const A2MIM_NAMES: PartNames = PartNames { norms: ["ln1", "ln2"], mlp: "ffn", layers: ["layers.0.0", "layers.1"] };

/// What the block is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The attention.
    pub attention: beit::Settings,
    /// Hidden width of the MLP.
    pub hidden: usize,
    /// ε of both norms.
    pub eps: f64,
    /// Start of `gamma_1` and `gamma_2`, if there are any.
    pub layer_scale: Option<f64>,
    /// Probability that a branch is left out in training.
    pub drop_path: f64,
    /// Names of the parts.
    pub names: PartNames,
}

impl Settings {
    /// From the keys of `block.beit`.
    pub fn from_config(config: &Config) -> Result<Self> {
        let attention = beit::Settings::from_config(config)?;
        Ok(Settings {
            hidden: hidden_width(attention.dim, config.f64("mlp_ratio")?)?,
            attention,
            eps: config.f64_or("ln_eps", 1e-6)?,
            layer_scale: config.bool("layer_scale")?.then_some(0.1),
            drop_path: config.f64_or("drop_path_rate", 0.0)?,
            names: BEIT_NAMES,
        })
    }

    /// Block `index` of `depth`: the weights that end its branches start smaller by √(2(index + 1)), drop path grows linearly from 0.
    pub fn at_depth(mut self, index: usize, depth: usize) -> Self {
        self.drop_path = DropPath::linear(self.drop_path, index, depth);
        self.attention.proj_init = Init::Normal(0.02 / (2.0 * (index + 1) as f64).sqrt());
        self
    }

    /// What the forward pass for `[b, n, dim]` costs.
    pub fn cost(&self, b: usize, n: usize) -> Result<Cost> {
        let (c, hidden) = (self.attention.dim, self.hidden);
        // The MLP; statistics, the middle (the attention's output, without LayerScale), hidden units, y; with LayerScale both branches.
        let branches = if self.layer_scale.is_some() { 2 * c } else { 0 };
        Ok(self.attention.cost(b, n)? + Cost { flops: 4 * b * n * c * hidden, activation_bytes: 4 * b * n * (4 + c + hidden + branches) })
    }
}

/// The block.
#[derive(Clone, Debug)]
pub struct Block {
    norm1: LayerNorm,
    attn: BeitAttention,
    scale1: Option<LayerScale>,
    norm2: LayerNorm,
    mlp: Mlp,
    scale2: Option<LayerScale>,
    drops: [DropPath; 2],
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    x: Tensor<T>,
    stats1: Stats<T>,
    attn: beit::Saved<T>,
    branch1: Option<Tensor<T>>,
    middle: Tensor<T>,
    stats2: Stats<T>,
    mlp: mlp::Saved<T>,
    branch2: Option<Tensor<T>>,
}

impl Block {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: Settings) -> Result<Self> {
        let Settings { attention, hidden, eps, layer_scale, drop_path, names: part } = settings;
        let dim = attention.dim;
        let norm1 = LayerNorm::new(names.at(part.norms[0]), dim, eps);
        let attn = BeitAttention::new(names.at("attn"), attention)?;
        let norm2 = LayerNorm::new(names.at(part.norms[1]), dim, eps);
        let mlp = Mlp::named(names.at(part.mlp), part.layers, dim, hidden, [Init::NORMAL_02, attention.proj_init]);
        let [scale1, scale2] = ["gamma_1", "gamma_2"].map(|name| layer_scale.map(|start| LayerScale::new(names, name, dim, start)));
        let drops = [DropPath::new(names, drop_path)?, DropPath::new(names, drop_path)?];
        Ok(Block { norm1, attn, scale1, norm2, mlp, scale2, drops })
    }

    /// The block's output; `outer` `[h, N, N]` is added to the scores.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, outer: Option<&Tensor<T>>) -> Result<(Tensor<T>, Saved<T>)> {
        let (normed, stats1) = self.norm1.forward(p, x)?;
        let (middle, attn, branch1) =
            add_branch(p, self.drops[0], self.scale1, x, |residual| self.attn.forward(p, &normed, outer, residual))?;
        let (normed, stats2) = self.norm2.forward(p, &middle)?;
        let (y, mlp, branch2) = add_branch(p, self.drops[1], self.scale2, &middle, |residual| self.mlp.forward(p, &normed, residual))?;
        Ok((y, Saved { x: x.clone(), stats1, attn, branch1, middle, stats2, mlp, branch2 }))
    }

    /// `dx`; the gradient of `outer` is added to `d_outer`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        outer: Option<&Tensor<T>>,
        d_outer: Option<&mut Tensor<T>>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let Saved { x, stats1, attn, branch1, middle, stats2, mlp, branch2 } = saved;
        let normed = self.norm2.again(p, &middle, &stats2);
        let branch = (self.drops[1], self.scale2, branch2);
        let d_normed = branch_backward(p, g, branch, dy, |g, df| self.mlp.backward(p, g, &normed, mlp, df))?;
        drop(normed);
        let d_middle = self.norm2.backward(p, g, &middle, &stats2, &d_normed, Some(dy))?;
        drop((d_normed, middle));
        let normed = self.norm1.again(p, &x, &stats1);
        let branch = (self.drops[0], self.scale1, branch1);
        let d_normed = branch_backward(p, g, branch, &d_middle, |g, df| self.attn.backward(p, g, &normed, attn, outer, d_outer, df))?;
        drop(normed);
        self.norm1.backward(p, g, &x, &stats1, &d_normed, Some(&d_middle))
    }
}

/// `block.beit`.
pub struct BeitBlock;

impl Operation for BeitBlock {
    const NAME: &'static str = "block.beit";
    const PAPER: &'static str = "2106.08254 BEiT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_settings(rng, &mut config);
        config.set("rel_pos_bias", rng.chance(0.7)).set("window_h", rng.between(1, 3)).set("window_w", rng.between(1, 4));
        config.set("mlp_ratio", rng.range(0.5, 3.0)).set("layer_scale", rng.chance(0.5)).set("ln_eps", 1e-6);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_inputs(config, draw)
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        Settings::from_config(config)?.cost(b, n).map(Some)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config())?;
        let (block, layout) = Layout::build(|names| Block::new(names, settings))?;
        run_with_outer_bias(
            run,
            &layout,
            |p, x, outer| block.forward(p, x, outer),
            |p, g, _, saved, outer, d_outer, dy| block.backward(p, g, saved, outer, d_outer, dy),
        )
    }
}

/// The settings of an A²MIM block of width `dim` on a grid of `window` patches, with the other keys of `block.a2mim_vit`.
pub fn a2mim_settings(config: &Config, dim: usize, window: [usize; 2]) -> Result<Settings> {
    let relative = config.bool_or("rel_pos_bias", true)?;
    Ok(Settings {
        attention: beit::Settings {
            biases: if relative { Biases::QueryValue } else { Biases::All },
            window: relative.then_some(window),
            ..beit::Settings::new(dim, config.positive("num_heads")?)
        },
        hidden: config.positive("mlp_hidden")?,
        eps: config.f64_or("ln_eps", 1e-6)?,
        layer_scale: config.bool_or("layer_scale", true)?.then_some(0.1),
        drop_path: config.f64_or("drop_path_rate", 0.0)?,
        names: A2MIM_NAMES,
    })
}

/// `block.a2mim_vit`.
pub struct A2mimBlock;

impl Operation for A2mimBlock {
    const NAME: &'static str = "block.a2mim_vit";
    const PAPER: &'static str = "2205.13943 A2MIM";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let (heads, width) = (rng.between(1, 4), rng.between(2, 5));
        config.set("dim", heads * width).set("num_heads", heads).set("mlp_hidden", rng.between(1, 20));
        config.set("window_h", rng.between(1, 3)).set("window_w", rng.between(1, 4)).set("ln_eps", 1e-6);
        config.set("rel_pos_bias", rng.chance(0.5)).set("layer_scale", rng.chance(0.5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let [h, w] = window(config)?;
        let batch = draw.size("batch", 1, 3);
        draw.normal("x", [batch, 1 + h * w, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, c] = inputs.dims("x")?;
        a2mim_settings(config, c, window(config)?)?.cost(b, n).map(Some)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let window = window(run.config())?;
        let settings = a2mim_settings(run.config(), run.config().positive("dim")?, window)?;
        let (block, layout) = Layout::build(|names| Block::new(names, settings))?;
        let (x, tokens) = (run.input("x")?, 1 + window[0] * window[1]);
        if x.dims::<3>("input `x`")?[1] != tokens {
            return Err(crate::Error::shape("input `x`", format!("[batch, {tokens}, dim]"), x.shape()));
        }
        run.unary(&layout, |p, x| block.forward(p, x, None), |p, g, saved, dy| block.backward(p, g, saved, None, None, dy))
    }
}
