//! `block.vit`: the pre-norm block of ViT (arXiv 2010.11929): `x ← x + ls1 ⊙ attn(norm1 x)`, `x ← x + ls2 ⊙ mlp(norm2 x)`.
//!
//! Kept for the backward pass per token: the input, `qkv`, the attention's output, the middle of the block and the hidden
//! units, 10 C numbers; the norms' outputs and `GELU` are recomputed.

use crate::attention::softmax::{self, Attention, Settings};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::{Bias, Groups};
use crate::nn::{DropPath, Init, LayerNorm, LayerScale, Layout, Mlp, Names, Params, Stats, mlp};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// A pre-norm transformer block over any grouping of the tokens: ViT's, Swin's and GreenMIM's.
#[derive(Clone, Debug)]
pub struct Block {
    norm1: LayerNorm,
    attn: Attention,
    scale1: Option<LayerScale>,
    drop1: DropPath,
    norm2: LayerNorm,
    mlp: Mlp,
    scale2: Option<LayerScale>,
    drop2: DropPath,
}

/// What the block is made of.
#[derive(Clone, Copy, Debug)]
pub struct BlockSettings {
    /// The attention.
    pub attention: Settings,
    /// Hidden width of the MLP over C, truncated.
    pub mlp_ratio: f64,
    /// ε of both norms.
    pub norm_eps: f64,
    /// Names of the two LayerScale vectors and their start, if there are any.
    pub layer_scale: Option<([&'static str; 2], f64)>,
    /// Probability that a residual branch is left out in training.
    pub drop_path: f64,
    /// Initialisation of the linear weights.
    pub init: fn(usize, usize) -> Init,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    x: Tensor<T>,
    stats1: Stats<T>,
    attn: softmax::Saved<T>,
    branch1: Option<Tensor<T>>,
    middle: Tensor<T>,
    stats2: Stats<T>,
    mlp: mlp::Saved<T>,
    branch2: Option<Tensor<T>>,
}

/// `⌊dim · ratio⌋`: the hidden width of an MLP.
pub fn hidden_width(dim: usize, ratio: f64) -> Result<usize> {
    let hidden = dim as f64 * ratio;
    if (1.0..1e9).contains(&hidden) {
        Ok(hidden as usize)
    } else {
        Err(Error::config("mlp_ratio", format!("expected a hidden width of at least 1, found {dim} · {ratio}")))
    }
}

impl Block {
    /// Registers the parameters: `norm1`, `attn`, `norm2`, `mlp`.
    pub fn new(names: &mut Names, settings: BlockSettings) -> Result<Self> {
        let BlockSettings { attention, mlp_ratio, norm_eps, layer_scale, drop_path, init } = settings;
        let dim = attention.dim;
        let scale = |names: &mut Names, i: usize| layer_scale.map(|(name, start)| LayerScale::new(names, name[i], dim, start));
        let norm1 = LayerNorm::new(names.at("norm1"), dim, norm_eps);
        let attn = Attention::new(names.at("attn"), attention, init)?;
        let scale1 = scale(names, 0);
        let norm2 = LayerNorm::new(names.at("norm2"), dim, norm_eps);
        let mlp = Mlp::new(names.at("mlp"), dim, hidden_width(dim, mlp_ratio)?, init);
        let scale2 = scale(names, 1);
        let [drop1, drop2] = [DropPath::new(names, drop_path)?, DropPath::new(names, drop_path)?];
        Ok(Block { norm1, attn, scale1, drop1, norm2, mlp, scale2, drop2 })
    }

    /// The same, but the backward pass computes the hidden units again.
    pub fn recompute_hidden(self) -> Self {
        Block { mlp: self.mlp.recomputed(), ..self }
    }

    /// The cost for `b` images of `n` tokens over `groups`.
    pub fn cost(settings: &BlockSettings, b: usize, n: usize, groups: &Groups) -> Result<Cost> {
        let dim = settings.attention.dim;
        let mlp = Mlp::cost(dim, hidden_width(dim, settings.mlp_ratio)?, b, n);
        // Statistics of both norms; with LayerScale, the two branches beside their sums.
        let scaled = if settings.layer_scale.is_some() { 2 * dim } else { 0 };
        let more = Cost { flops: 0, activation_bytes: 4 * b * n * (2 + 2 + scaled) };
        Ok(Attention::cost(settings.attention, b, n, groups) + mlp + more)
    }

    /// The block's output.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>, groups: &Groups, bias: Option<Bias<T>>) -> Result<(Tensor<T>, Saved<T>)> {
        let (normed, stats1) = self.norm1.forward(p, &x)?;
        let (middle, attn, branch1) =
            add_branch(p, self.drop1, self.scale1, &x, |residual| self.attn.forward(p, &normed, groups, bias, residual))?;
        let (normed, stats2) = self.norm2.forward(p, &middle)?;
        let (y, mlp, branch2) = add_branch(p, self.drop2, self.scale2, &middle, |residual| self.mlp.forward(p, &normed, residual))?;
        Ok((y, Saved { x, stats1, attn, branch1, middle, stats2, mlp, branch2 }))
    }

    /// `dx`; `d_bias` is added to.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        groups: &Groups,
        bias: Option<(Bias<T>, &mut [T])>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let Saved { x, stats1, attn, branch1, middle, stats2, mlp, branch2 } = saved;
        let normed = self.norm2.again(p, &middle, &stats2);
        let d_normed = branch_backward(p, g, (self.drop2, self.scale2, branch2), dy, |g, df| self.mlp.backward(p, g, &normed, mlp, df))?;
        drop(normed);
        let d_middle = self.norm2.backward(p, g, &middle, &stats2, &d_normed, Some(dy))?;
        drop((d_normed, middle));
        let normed = self.norm1.again(p, &x, &stats1);
        let d_normed = branch_backward(p, g, (self.drop1, self.scale1, branch1), &d_middle, |g, df| {
            self.attn.backward(p, g, &normed, attn, groups, bias, df)
        })?;
        drop(normed);
        self.norm1.backward(p, g, &x, &stats1, &d_normed, Some(&d_middle))
    }
}

/// `x + γ ⊙ drop(f)`, what the branch saves, and the branch itself if it has gains γ. `run(Some(x))` is `x + f`, `run(None)` is `f`.
pub fn add_branch<T: Float, S>(
    p: &Params<T>,
    drop: DropPath,
    scale: Option<LayerScale>,
    x: &Tensor<T>,
    run: impl FnOnce(Option<&Tensor<T>>) -> Result<(Tensor<T>, S)>,
) -> Result<(Tensor<T>, S, Option<Tensor<T>>)> {
    let Some(scale) = scale else {
        let (y, saved) = drop.residual(p, x, run)?;
        return Ok((y, saved, None));
    };
    let (f, saved) = run(None)?;
    let f = drop.apply(p, f);
    Ok((scale.forward(p, x, &f)?, saved, Some(f)))
}

/// `run(g, df)` with the gradient of the output of a branch of [`add_branch`], which had this path, these gains and this output.
pub fn branch_backward<T: Float, R>(
    p: &Params<T>,
    g: &mut Params<T>,
    (drop, scale, f): (DropPath, Option<LayerScale>, Option<Tensor<T>>),
    dy: &Tensor<T>,
    run: impl FnOnce(&mut Params<T>, &Tensor<T>) -> Result<R>,
) -> Result<R> {
    match (scale, f) {
        (Some(scale), Some(f)) => {
            let df = scale.backward(p, g, &f, dy)?;
            run(g, &drop.apply(p, df))
        }
        _ => drop.backward(p, dy, |df| run(g, df)),
    }
}

/// `block.vit`.
pub struct VitBlock;

impl Operation for VitBlock {
    const NAME: &'static str = "block.vit";
    const PAPER: &'static str = "2010.11929 ViT";

    fn sample(rng: &mut Rng) -> Config {
        let (heads, width) = (rng.between(1, 3), rng.between(2, 6));
        let mut config = Config::default();
        config.set("dim", heads * width).set("num_heads", heads).set("mlp_ratio", rng.range(0.5, 3.0)).set("qkv_bias", rng.chance(0.7));
        config.set("qk_norm", rng.chance(0.5)).set("layer_scale", rng.chance(0.5)).set("norm_eps", 1e-6);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, tokens) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 20));
        draw.normal("x", [batch, tokens, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        Block::cost(&vit_block_settings(config, "dim", "num_heads", "mlp_ratio")?, b, n, &Groups::all(n, n)).map(Some)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = vit_block_settings(run.config(), "dim", "num_heads", "mlp_ratio")?;
        let (block, layout) = Layout::build(|names| Block::new(names, settings))?;
        let [_, tokens, _] = run.input("x")?.dims("input `x`")?;
        let groups = Groups::all(tokens, tokens);
        run.unary(
            &layout,
            |p, x| block.forward(p, x.clone(), &groups, None),
            |p, g, saved, dy| block.backward(p, g, saved, &groups, None, dy),
        )
    }
}

/// The settings of a timm ViT block from a configuration; the keys of width, heads and MLP ratio differ between models.
pub fn vit_block_settings(config: &Config, dim: &str, heads: &str, ratio: &str) -> Result<BlockSettings> {
    let eps = config.f64_or("norm_eps", 1e-6)?;
    let qk_norm = config.bool_or("qk_norm", false)?.then_some(eps);
    Ok(BlockSettings {
        attention: Settings {
            qkv_bias: config.bool_or("qkv_bias", true)?,
            qk_norm,
            ..Settings::new(config.usize(dim)?, config.usize(heads)?)
        },
        mlp_ratio: config.f64_or(ratio, 4.0)?,
        norm_eps: eps,
        layer_scale: config.bool_or("layer_scale", false)?.then_some((["ls1.gamma", "ls2.gamma"], 1e-5)),
        drop_path: config.f64_or("drop_path_rate", 0.0)?,
        init: crate::nn::normal_02,
    })
}
