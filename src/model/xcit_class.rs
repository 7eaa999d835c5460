//! XCiT's class-attention block (arXiv 2106.09681), `block.class_attention`, and the stage that reads a class from the patches,
//! `block.class_attention_stage`, XCiT's and CaiT's (arXiv 2103.17239).
//!
//! As released, and as published weights need it, the patches do change: with `a = norm1 x`,
//! `x₀ ← x₀ + γ₁ ⊙ attn(a)`, `x_n ← x_n + γ₁ ⊙ a_n`; `z = norm2 x` (of the class token alone without `tokens_norm`);
//! `y₀ = z₀ + γ₂ ⊙ mlp(z₀)` (the residual is the normalised z₀), `y_n = 2 z_n`.
//!
//! Backward: `dz₀ = dy₀ + mlpᵀ(γ₂ ⊙ dy₀)`, `dz_n = 2 dy_n`, then the norm (or nothing), then the residual.

use crate::attention::class::{self, ClassAttention, first_rows, with_first_rows};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::nn::{Init, LayerNorm, LayerScale, Layout, Mlp, Names, Param, Params, Stats, mlp, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

use super::cait_block::{self, add_patches, with_class};
use super::stack::{self, Kept};
use super::vit_block::hidden_width;

/// What the class blocks are made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The attention.
    pub attention: class::Settings,
    /// Hidden width of the MLP over C, truncated.
    pub mlp_ratio: f64,
    /// `norm2` goes over all tokens, not the class token alone.
    pub tokens_norm: bool,
    /// Start of the gains of the branches, if there are any.
    pub layer_scale: Option<f64>,
    /// ε of the norms.
    pub ln_eps: f64,
}

impl Settings {
    /// From the keys `num_heads`, `mlp_ratio`, `qkv_bias`, `tokens_norm`, `layer_scale`, `ln_eps`, and that of the width.
    pub fn from_config(config: &Config, dim: &str) -> Result<Self> {
        let qkv_bias = config.bool_or("qkv_bias", false)?;
        Ok(Settings {
            attention: class::Settings { dim: config.usize(dim)?, num_heads: config.usize("num_heads")?, qkv_bias, joint: true },
            mlp_ratio: config.f64_or("mlp_ratio", 4.0)?,
            tokens_norm: config.bool_or("tokens_norm", false)?,
            layer_scale: config.bool_or("layer_scale", true)?.then_some(1.0),
            ln_eps: config.f64_or("ln_eps", 1e-6)?,
        })
    }

    /// What a block costs for `b` images of `n` tokens, the class token included.
    pub fn cost(&self, b: usize, n: usize) -> Result<Cost> {
        let c = self.attention.dim;
        let hidden = hidden_width(c, self.mlp_ratio)?;
        // Statistics, the middle, y; z₀, hidden units, the MLP's output if it is kept.
        let normed = if self.tokens_norm { n } else { 1 };
        let branch = if self.layer_scale.is_some() { c } else { 0 };
        let kept = n * (2 + 2 * c) + 2 * normed + c + hidden + branch;
        Ok(self.attention.cost(b, n) + Cost { flops: 4 * b * c * hidden, activation_bytes: 4 * b * kept })
    }
}

/// A class block with parameters `norm1`, `attn`, `norm2`, `mlp`, `gamma1`, `gamma2`.
#[derive(Clone, Debug)]
pub struct ClassBlock {
    norm1: LayerNorm,
    attn: ClassAttention,
    norm2: LayerNorm,
    mlp: Mlp,
    scales: Option<[LayerScale; 2]>,
    tokens_norm: bool,
}

/// What [`ClassBlock::backward`] needs.
pub struct Saved<T: Float> {
    x: Tensor<T>,
    stats1: Stats<T>,
    attn: class::Saved<T>,
    /// The attention's output, `[B, 1, C]`.
    class: Tensor<T>,
    middle: Tensor<T>,
    stats2: Stats<T>,
    /// z₀, `[B, 1, C]`.
    z: Tensor<T>,
    mlp: mlp::Saved<T>,
    /// The MLP's output, where it has gains.
    branch: Option<Tensor<T>>,
}

impl<T: Float> Saved<T> {
    /// The attention maps of all heads, `[B, N, h]`.
    pub fn weights(&self) -> &Tensor<T> {
        self.attn.weights()
    }
}

impl ClassBlock {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: Settings) -> Result<Self> {
        let Settings { attention, mlp_ratio, tokens_norm, layer_scale, ln_eps } = settings;
        let dim = attention.dim;
        let norm1 = LayerNorm::new(names.at("norm1"), dim, ln_eps);
        let attn = ClassAttention::new(names.at("attn"), attention, normal_02)?;
        let norm2 = LayerNorm::new(names.at("norm2"), dim, ln_eps);
        let mlp = Mlp::new(names.at("mlp"), dim, hidden_width(dim, mlp_ratio)?, normal_02);
        let scales = layer_scale.map(|start| ["gamma1", "gamma2"].map(|name| LayerScale::new(names, name, dim, start)));
        Ok(ClassBlock { norm1, attn, norm2, mlp, scales, tokens_norm })
    }

    /// All tokens `[B, N, C]`, of which the first is the class token.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let (normed, stats1) = self.norm1.forward(p, &x)?;
        let (class, attn) = self.attn.forward(p, &normed)?;
        let mut branch = with_first_rows(normed, &class)?;
        let middle = match &self.scales {
            Some([scale, _]) => scale.forward(p, &x, &branch)?,
            None => {
                elementwise::add(branch.data_mut(), x.data());
                branch
            }
        };
        let (all, z, stats2) = if self.tokens_norm {
            let (all, stats) = self.norm2.forward(p, &middle)?;
            let z = first_rows(&all)?;
            (all, z, stats)
        } else {
            let (z, stats) = self.norm2.forward(p, &first_rows(&middle)?)?;
            (middle.clone(), z, stats)
        };
        let mut y = Tensor::scratch(all.shape());
        elementwise::scale(y.data_mut(), all.data(), T::from_f64(2.0));
        drop(all);
        let (first, mlp, branch) = match &self.scales {
            Some([_, scale]) => {
                let (f, saved) = self.mlp.forward(p, &z, None)?;
                (scale.forward(p, &z, &f)?, saved, Some(f))
            }
            None => {
                let (y, saved) = self.mlp.forward(p, &z, Some(&z))?;
                (y, saved, None)
            }
        };
        let y = with_first_rows(y, &first)?;
        Ok((y, Saved { x, stats1, attn, class, middle, stats2, z, mlp, branch }))
    }

    /// `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let Saved { x, stats1, attn, class, middle, stats2, z, mlp, branch } = saved;
        dy.expect_shape("gradient of a class block", x.shape())?;
        // y₀ = z₀ + γ₂ ⊙ mlp(z₀), y_n = 2 z_n
        let d_first = first_rows(dy)?;
        let df = match (&self.scales, branch) {
            (Some([_, scale]), Some(branch)) => scale.backward(p, g, &branch, &d_first)?,
            _ => d_first.clone(),
        };
        let mut dz = self.mlp.backward(p, g, &z, mlp, &df)?;
        elementwise::add(dz.data_mut(), d_first.data());
        let mut d = Tensor::scratch(dy.shape());
        elementwise::scale(d.data_mut(), dy.data(), T::from_f64(2.0));
        let d = if self.tokens_norm {
            self.norm2.backward(p, g, &middle, &stats2, &with_first_rows(d, &dz)?, None)?
        } else {
            let dz = self.norm2.backward(p, g, &first_rows(&middle)?, &stats2, &dz, None)?;
            with_first_rows(d, &dz)?
        };
        drop(middle);
        // x₀ + γ₁ ⊙ attn(a), x_n + γ₁ ⊙ a_n
        let normed = self.norm1.again(p, &x, &stats1);
        let df = match &self.scales {
            Some([scale, _]) => scale.backward(p, g, &with_first_rows(normed.clone(), &class)?, &d)?,
            None => d.clone(),
        };
        let d_class = first_rows(&df)?;
        let others = with_first_rows(df, &Tensor::zeros(d_class.shape()))?;
        let d_normed = self.attn.backward(p, g, &normed, attn, &d_class, Some(&others))?;
        self.norm1.backward(p, g, &x, &stats1, &d_normed, Some(&d))
    }
}

/// From patches to one vector per image: `cls_token`, `cls_attn_blocks.{i}`, `norm` of the class token.
#[derive(Clone, Debug)]
pub struct ClassStage {
    token: Param,
    blocks: Vec<ClassBlock>,
    norm: LayerNorm,
    settings: Settings,
}

/// What [`ClassStage::backward`] needs.
pub struct StageSaved<T: Float> {
    blocks: Vec<Kept<T, Saved<T>>>,
    last: Tensor<T>,
    stats: Stats<T>,
    patches: usize,
}

impl ClassStage {
    /// Registers the parameters of `depth` class blocks.
    pub fn new(names: &mut Names, settings: Settings, depth: usize) -> Result<Self> {
        let dim = settings.attention.dim;
        if dim == 0 {
            return Err(Error::config("dim", "expected a positive width, found 0"));
        }
        let token = names.param("cls_token", [1, 1, dim], Init::NORMAL_02);
        let blocks = (0..depth).map(|i| ClassBlock::new(&mut names.at(format!("cls_attn_blocks.{i}")), settings)).collect::<Result<_>>()?;
        Ok(ClassStage { token, blocks, norm: LayerNorm::new(names.at("norm"), dim, settings.ln_eps), settings })
    }

    /// The width C.
    pub fn dim(&self) -> usize {
        self.settings.attention.dim
    }

    /// What the stage costs for `b` images of `n` patches.
    pub fn cost(&self, b: usize, n: usize) -> Result<Cost> {
        let (c, depth) = (self.settings.attention.dim, self.blocks.len());
        let block = self.settings.cost(b, n + 1)?;
        // The class token and its patches are the first block's input; the last block's output is not kept, but its class token is, with
        // its statistics and y.
        let all = depth * block.activation_bytes + 4 * b * (2 * c + 2);
        Ok(Cost { flops: depth * block.flops, activation_bytes: all })
    }

    /// `[B, C]` of patches `[B, N, C]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, StageSaved<T>)> {
        let ([b, n, c], dim) = (x.dims("patches")?, self.settings.attention.dim);
        if c != dim {
            return Err(Error::shape("patches", format!("[batch, patches, {dim}]"), x.shape()));
        }
        let mut class = Tensor::scratch([b, 1, c]);
        class.data_mut().chunks_exact_mut(c).for_each(|row| row.copy_from_slice(p.get(self.token)));
        let (tokens, blocks) = stack::forward(p, &self.blocks, with_class(&class, x)?, |block, _, x| block.forward(p, x))?;
        let last = first_rows(&tokens)?;
        let (y, stats) = self.norm.forward(p, &last)?;
        Ok((y.reshape([b, c])?, StageSaved { blocks, last, stats, patches: n }))
    }

    /// The gradient of the patches.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: StageSaved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let StageSaved { blocks, last, stats, patches } = saved;
        let [b, c] = dy.dims("gradient of the class vector")?;
        let d_last = self.norm.backward(p, g, &last, &stats, &dy.reshape([b, 1, c])?, None)?;
        let d = with_first_rows(Tensor::zeros([b, 1 + patches, c]), &d_last)?;
        let d = stack::backward(
            &self.blocks,
            blocks,
            d,
            |block, _, x| block.forward(p, x),
            |block, _, saved, d| block.backward(p, g, saved, d),
        )?;
        for row in first_rows(&d)?.data().chunks_exact(c) {
            elementwise::add(g.get_mut(self.token), row);
        }
        let mut dx = Tensor::zeros([b, patches, c]);
        add_patches(&mut dx, &d)?;
        Ok(dx)
    }
}

/// Random `dim`, `num_heads`, `mlp_ratio`, `qkv_bias`, `ln_eps`, `tokens_norm`, `layer_scale`.
fn sample_settings(rng: &mut Rng) -> Config {
    let mut config = cait_block::sample_settings(rng);
    config.set("tokens_norm", rng.chance(0.5)).set("layer_scale", rng.chance(0.6));
    config
}

/// `block.class_attention`.
pub struct ClassAttentionBlock;

impl Operation for ClassAttentionBlock {
    const NAME: &'static str = "block.class_attention";
    const PAPER: &'static str = "2106.09681 XCiT";

    fn sample(rng: &mut Rng) -> Config {
        sample_settings(rng)
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, tokens) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 20));
        draw.normal("x", [batch, tokens, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        Settings::from_config(config, "dim")?.cost(b, n).map(Some)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config(), "dim")?;
        let (block, layout) = Layout::build(|names| ClassBlock::new(names, settings))?;
        run.unary(&layout, |p, x| block.forward(p, x.clone()), |p, g, saved, dy| block.backward(p, g, saved, dy))
    }
}

/// `block.class_attention_stage`, both variants.
pub struct ClassAttentionStage;

impl Operation for ClassAttentionStage {
    const NAME: &'static str = "block.class_attention_stage";
    const PAPER: &'static str = "2103.17239 CaiT, 2106.09681 XCiT";

    fn sample(rng: &mut Rng) -> Config {
        if rng.chance(0.5) {
            let mut config = cait_block::sample_settings(rng);
            config.set("variant", "cait").set("depth_token_only", rng.between(0, 2));
            return config;
        }
        let mut config = sample_settings(rng);
        config.set("variant", "xcit").set("cls_attn_layers", rng.between(0, 2));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, tokens) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 12));
        draw.normal("x", [batch, tokens, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        if is_xcit(config)? {
            Layout::build(|names| xcit_stage(names, config))?.0.cost(b, n).map(Some)
        } else {
            let depth = config.usize_or("depth_token_only", 2)?;
            cait_block::ClassStage::cost(cait_block::Settings::from_config(config)?, depth, b, n).map(Some)
        }
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        if is_xcit(config)? {
            let (stage, layout) = Layout::build(|names| xcit_stage(names, config))?;
            run.unary(&layout, |p, x| stage.forward(p, x), |p, g, saved, dy| stage.backward(p, g, saved, dy))
        } else {
            let (settings, depth) = (cait_block::Settings::from_config(config)?, config.usize_or("depth_token_only", 2)?);
            let (stage, layout) = Layout::build(|names| cait_block::ClassStage::new(names, settings, depth))?;
            run.unary(&layout, |p, x| stage.forward(p, x), |p, g, saved, dy| stage.backward(p, g, saved, dy))
        }
    }
}

fn is_xcit(config: &Config) -> Result<bool> {
    Ok(config.choice("variant", &["cait", "xcit"])? == "xcit")
}

fn xcit_stage(names: &mut Names, config: &Config) -> Result<ClassStage> {
    ClassStage::new(names, Settings::from_config(config, "dim")?, config.usize_or("cls_attn_layers", 2)?)
}
