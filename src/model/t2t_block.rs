//! `block.token_transformer` and `block.token_performer`: the blocks between T2T-ViT's soft splits (arXiv 2101.11986).
//!
//! `y = Attn(LN₁(x))`, `out = y + fc₂(GELU(fc₁(LN₂(y))))`. The first line has no residual: the attention narrows the tokens and adds
//! its own v instead (the paper's formula shows neither). The tokens may also be the windows of a map, which then exist for a band at a
//! time ([`SplitLinear`]).

use crate::attention::performer::{self, Performer, sample_dropout};
use crate::attention::token_transformer::{self, TokenAttention, sample_settings};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::Result;
use crate::kernel::unfold::Order;
use crate::model::vit_block::hidden_width;
use crate::nn::dropout::Dropout;
use crate::nn::soft_split::{SoftSplit, SplitLinear};
use crate::nn::{LayerNorm, Layout, Linear, Mlp, Names, Params, Stats, mlp, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// What the block is made of.
#[derive(Clone, Copy, Debug)]
pub enum BlockSettings {
    /// Softmax attention; the hidden width of the MLP over E.
    Transformer {
        /// The attention.
        attention: token_transformer::Settings,
        /// Hidden width of the MLP over E, truncated.
        mlp_ratio: f64,
    },
    /// Performer; the MLP is as wide as its input. Dropout follows `proj` and the MLP, as in the released code, in training only.
    Performer {
        /// The attention.
        attention: performer::Settings,
        /// The two dropouts.
        dropout: Option<Dropout>,
    },
}

#[derive(Clone, Debug)]
enum Attn {
    Transformer(TokenAttention),
    Performer(Performer),
}

enum AttnSaved<T: Float> {
    Transformer(token_transformer::Saved<T>),
    Performer(performer::Saved<T>),
}

/// A token block: norm, attention that narrows, norm, MLP.
#[derive(Clone, Debug)]
pub struct TokenBlock {
    norm1: LayerNorm,
    attn: Attn,
    norm2: LayerNorm,
    mlp: Mlp,
    dropout: Option<Dropout>,
    /// Input width, E, hidden width.
    widths: [usize; 3],
}

/// What the backward pass needs; `x` is the tokens, or the map that they are windows of.
pub struct Saved<T: Float> {
    x: Tensor<T>,
    stats1: Stats<T>,
    attn: AttnSaved<T>,
    middle: Tensor<T>,
    stats2: Stats<T>,
    mlp: mlp::Saved<T>,
}

/// The windows of a map as the tokens of a block.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// The windows.
    pub split: SoftSplit,
    /// How the map lies.
    pub order: Order,
}

impl TokenBlock {
    /// Registers `norm1`, the attention (under `attn` for a transformer, by itself for a Performer), `norm2`, `mlp`.
    pub fn new(names: &mut Names, settings: BlockSettings, norm_eps: f64) -> Result<Self> {
        let (dim, e, hidden) = match settings {
            BlockSettings::Transformer { attention: a, mlp_ratio } => (a.dim, a.in_dim, hidden_width(a.in_dim, mlp_ratio)?),
            BlockSettings::Performer { attention: a, .. } => (a.dim, a.in_dim, a.in_dim),
        };
        let norm1 = LayerNorm::new(names.at("norm1"), dim, norm_eps);
        let (attn, layers, dropout) = match settings {
            BlockSettings::Transformer { attention, .. } => {
                (Attn::Transformer(TokenAttention::new(names.at("attn"), attention, normal_02)), ["fc1", "fc2"], None)
            }
            BlockSettings::Performer { attention, dropout } => {
                (Attn::Performer(Performer::new(names.here(), attention, dropout, normal_02)?), ["0", "2"], dropout)
            }
        };
        let norm2 = LayerNorm::new(names.at("norm2"), e, norm_eps);
        let mlp = Mlp::named(names.at("mlp"), layers, e, hidden, [normal_02(e, hidden), normal_02(hidden, e)]);
        Ok(TokenBlock { norm1, attn, norm2, mlp, dropout, widths: [dim, e, hidden] })
    }

    /// The linear layer behind the first norm.
    fn first(&self) -> &Linear {
        match &self.attn {
            Attn::Transformer(attn) => attn.qkv(),
            Attn::Performer(attn) => attn.kqv(),
        }
    }

    fn windows(&self, windows: Windows) -> SplitLinear<'_> {
        SplitLinear { split: windows.split, norm: Some(&self.norm1), linear: self.first(), order: windows.order }
    }

    /// `[B, N, dim]` → `[B, N, E]`; or, with `windows`, from a map.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>, windows: Option<Windows>) -> Result<(Tensor<T>, Saved<T>)> {
        let (qkv, stats1) = match windows {
            Some(windows) => {
                let (qkv, stats) = self.windows(windows).forward(p, &x)?;
                (qkv, stats.unwrap_or_else(|| Tensor::zeros([0, 2])))
            }
            None => {
                let [_, _, _] = x.dims("input of a token block")?;
                let (normed, stats) = self.norm1.forward(p, &x)?;
                (self.first().forward(p, &normed)?, stats)
            }
        };
        let (middle, attn) = match &self.attn {
            Attn::Transformer(attn) => {
                let (y, saved) = attn.forward_qkv(p, qkv)?;
                (y, AttnSaved::Transformer(saved))
            }
            Attn::Performer(attn) => {
                let (y, saved) = attn.forward_kqv(p, qkv)?;
                (y, AttnSaved::Performer(saved))
            }
        };
        let (normed, stats2) = self.norm2.forward(p, &middle)?;
        let (y, mlp) = match self.dropout {
            None => self.mlp.forward(p, &normed, Some(&middle))?,
            Some(dropout) => {
                let (mut y, mlp) = self.mlp.forward(p, &normed, None)?;
                dropout.apply(p, y.data_mut(), 1);
                crate::kernel::elementwise::add(y.data_mut(), middle.data());
                (y, mlp)
            }
        };
        Ok((y, Saved { x, stats1, attn, middle, stats2, mlp }))
    }

    /// The gradient of what went in.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        windows: Option<Windows>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let Saved { x, stats1, attn, middle, stats2, mlp } = saved;
        let mut masked = dy.clone();
        if let Some(dropout) = self.dropout {
            dropout.apply(p, masked.data_mut(), 1);
        }
        let normed = self.norm2.again(p, &middle, &stats2);
        let d_normed = self.mlp.backward(p, g, &normed, mlp, &masked)?;
        drop((normed, masked));
        let d_middle = self.norm2.backward(p, g, &middle, &stats2, &d_normed, Some(dy))?;
        drop((d_normed, middle));
        let d_qkv = match (&self.attn, attn) {
            (Attn::Transformer(attn), AttnSaved::Transformer(saved)) => attn.backward_qkv(p, g, saved, &d_middle)?,
            (Attn::Performer(attn), AttnSaved::Performer(saved)) => attn.backward_kqv(p, g, saved, &d_middle)?,
            _ => unreachable!("saved by another block"),
        };
        drop(d_middle);
        match windows {
            Some(windows) => self.windows(windows).backward(p, g, &x, Some(&stats1), &d_qkv),
            None => {
                let normed = self.norm1.again(p, &x, &stats1);
                let d_normed = self.first().backward(p, g, &normed, &d_qkv)?;
                self.norm1.backward(p, g, &x, &stats1, &d_normed, None)
            }
        }
    }

    /// What [`forward`](Self::forward) costs for `n` tokens, whether they come from a map or not.
    pub fn cost(&self, b: usize, n: usize) -> Cost {
        let [_, e, hidden] = self.widths;
        let attn = match &self.attn {
            Attn::Transformer(attn) => attn.cost(b, n),
            Attn::Performer(attn) => attn.cost(b, n),
        };
        // The MLP, its hidden units and its output; two norms.
        attn + Cost { flops: 2 * b * n * 2 * e * hidden, activation_bytes: 4 * b * n * (hidden + e + 4) }
    }
}

fn run_block<T: Float>(run: &mut Run<T>, settings: BlockSettings) -> Result<()> {
    let eps = run.config().f64_or("norm_eps", 1e-5)?;
    let (block, layout) = Layout::build(|names| TokenBlock::new(names, settings, eps))?;
    run.unary(&layout, |p, x| block.forward(p, x.clone(), None), |p, g, saved, dy| block.backward(p, g, saved, None, dy))
}

fn block_cost(config: &Config, inputs: &Shapes, settings: BlockSettings) -> Result<Option<Cost>> {
    let ([b, n, _], eps) = (inputs.dims("x")?, config.f64_or("norm_eps", 1e-5)?);
    let (block, _) = Layout::build(|names| TokenBlock::new(names, settings, eps))?;
    Ok(Some(block.cost(b, n)))
}

fn draw_tokens(config: &Config, draw: &mut Draw) -> Result<()> {
    let (batch, tokens) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 20));
    draw.normal("x", [batch, tokens, config.positive("dim")?]);
    Ok(())
}

/// `block.token_transformer`.
pub struct TokenTransformerBlock;

impl TokenTransformerBlock {
    fn settings(config: &Config) -> Result<BlockSettings> {
        let attention = token_transformer::Settings::from_config(config)?;
        Ok(BlockSettings::Transformer { attention, mlp_ratio: config.f64_or("mlp_ratio", 1.0)? })
    }
}

impl Operation for TokenTransformerBlock {
    const NAME: &'static str = "block.token_transformer";
    const PAPER: &'static str = "2101.11986 T2T-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_settings(rng, &mut config);
        config.set("mlp_ratio", rng.range(0.6, 2.5)).set("norm_eps", 1e-5);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_tokens(config, draw)
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        block_cost(config, inputs, Self::settings(config)?)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        run_block(run, Self::settings(run.config())?)
    }
}

/// `block.token_performer`. `dropout` (in training only; default 0.1, the published constant) and `seed` are optional keys.
pub struct TokenPerformerBlock;

impl TokenPerformerBlock {
    fn settings(config: &Config) -> Result<BlockSettings> {
        let attention = performer::Settings::from_config(config)?;
        Ok(BlockSettings::Performer { attention, dropout: Dropout::from_config(config, 0.1)? })
    }
}

impl Operation for TokenPerformerBlock {
    const NAME: &'static str = "block.token_performer";
    const PAPER: &'static str = "2101.11986 T2T-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("dim", rng.between(2, 12)).set("in_dim", rng.between(2, 9)).set("head_cnt", 1);
        config.set("kernel_ratio", rng.range(0.51, 1.5)).set("norm_eps", 1e-5);
        config.set("epsilon", if rng.chance(0.5) { 1e-8 } else { rng.range(1e-4, 1e-2) });
        sample_dropout(rng, &mut config);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_tokens(config, draw)
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        block_cost(config, inputs, Self::settings(config)?)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        run_block(run, Self::settings(run.config())?)
    }
}
