//! CaiT's blocks (arXiv 2103.17239): `block.layer_scale`, `block.layer_scale_class_attention`, and the stage that reads a class from the
//! patches.
//!
//! A patch block is `x ← x + γ₁ ⊙ talking_heads(norm1 x)`, `x ← x + γ₂ ⊙ mlp(norm2 x)`.
//!
//! A class block sees the patches and never changes them: `u = [c; x]`, `c ← c + γ₁ ⊙ attn(norm1 u)₀`, `c ← c + γ₂ ⊙ mlp(norm2 c)`.
//! The stage starts from the learned `cls_token` (the same for all images, without a position), runs `blocks_token_only.{i}` and
//! normalises the class token alone; the authors' code normalises all tokens and takes the first, which is the same.
//!
//! Backward: the patches receive the gradient of `norm1` and of the attention's k and v, from every class block.

use crate::attention::class::{self, ClassAttention, first_rows};
use crate::attention::talking_heads::{self, TalkingHeads};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::nn::{DropPath, Init, LayerNorm, LayerScale, Layout, Mlp, Names, Param, Params, Pass, Stats, mlp, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

use super::stack::{self, Kept};
use super::vit_block::hidden_width;

/// What CaiT's blocks are made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width C.
    pub dim: usize,
    /// Heads h, a divisor of C.
    pub num_heads: usize,
    /// Hidden width of the MLP over C, truncated.
    pub mlp_ratio: f64,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// ε of all norms.
    pub ln_eps: f64,
    /// Start of `gamma_1` and `gamma_2`: 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond.
    pub init_scale: f64,
    /// Probability that a branch of a patch block is left out in training: the same in all of them.
    pub drop_path: f64,
}

impl Settings {
    /// From the keys `dim`, `num_heads`, `mlp_ratio`, `qkv_bias`, `ln_eps`.
    pub fn from_config(config: &Config) -> Result<Self> {
        Ok(Settings {
            dim: config.positive("dim")?,
            num_heads: config.positive("num_heads")?,
            mlp_ratio: config.f64_or("mlp_ratio", 4.0)?,
            qkv_bias: config.bool_or("qkv_bias", false)?,
            ln_eps: config.f64_or("ln_eps", 1e-6)?,
            init_scale: 1e-5,
            drop_path: config.f64_or("drop_path_rate", 0.0)?,
        })
    }

    fn attention(&self) -> class::Settings {
        class::Settings { dim: self.dim, num_heads: self.num_heads, qkv_bias: self.qkv_bias, joint: false }
    }

    fn talking_heads(&self) -> talking_heads::Settings {
        talking_heads::Settings { dim: self.dim, num_heads: self.num_heads, qkv_bias: self.qkv_bias }
    }

    /// What a patch block costs for `b` images of `n` patches.
    pub fn patch_cost(&self, b: usize, n: usize) -> Result<Cost> {
        let (c, hidden) = (self.dim, hidden_width(self.dim, self.mlp_ratio)?);
        // The MLP; the statistics of both norms, the middle, the hidden units, both branches (the attention's is its output), y.
        let rest = Cost { flops: 4 * b * n * c * hidden, activation_bytes: 4 * b * n * (4 + 3 * c + hidden) };
        Ok(self.talking_heads().cost(b, n) + rest)
    }

    /// What a class block costs for `b` images of `n` patches.
    pub fn class_cost(&self, b: usize, n: usize) -> Result<Cost> {
        let (c, hidden) = (self.dim, hidden_width(self.dim, self.mlp_ratio)?);
        // The MLP; `[c; x]` and its statistics, the middle and its, the hidden units, both branches (the attention's is its output), y.
        let rest = Cost { flops: 4 * b * c * hidden, activation_bytes: 4 * b * ((n + 1) * (c + 2) + 3 * c + 2 + hidden) };
        Ok(self.attention().cost(b, n + 1) + rest)
    }
}

/// A patch block with parameters `norm1`, `attn`, `norm2`, `mlp`, `gamma_1`, `gamma_2`.
#[derive(Clone, Debug)]
pub struct PatchBlock {
    norm1: LayerNorm,
    attn: TalkingHeads,
    scale1: LayerScale,
    norm2: LayerNorm,
    mlp: Mlp,
    scale2: LayerScale,
    drops: [DropPath; 2],
}

/// What [`PatchBlock::backward`] needs.
pub struct PatchSaved<T: Float> {
    x: Tensor<T>,
    stats1: Stats<T>,
    attn: talking_heads::Saved<T>,
    branch1: Tensor<T>,
    middle: Tensor<T>,
    stats2: Stats<T>,
    mlp: mlp::Saved<T>,
    branch2: Tensor<T>,
}

impl PatchBlock {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: Settings) -> Result<Self> {
        let Settings { dim, ln_eps, init_scale, .. } = settings;
        let norm1 = LayerNorm::new(names.at("norm1"), dim, ln_eps);
        let attn = TalkingHeads::new(names.at("attn"), settings.talking_heads(), normal_02)?;
        let norm2 = LayerNorm::new(names.at("norm2"), dim, ln_eps);
        let mlp = Mlp::new(names.at("mlp"), dim, hidden_width(dim, settings.mlp_ratio)?, normal_02);
        let [scale1, scale2] = ["gamma_1", "gamma_2"].map(|name| LayerScale::new(names, name, dim, init_scale));
        let drops = [DropPath::new(names, settings.drop_path)?, DropPath::new(names, settings.drop_path)?];
        Ok(PatchBlock { norm1, attn, scale1, norm2, mlp, scale2, drops })
    }

    /// The patches `[B, N, C]` after the block.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>) -> Result<(Tensor<T>, PatchSaved<T>)> {
        let (normed, stats1) = self.norm1.forward(p, &x)?;
        let (f, attn) = self.attn.forward(p, &normed)?;
        let branch1 = self.drops[0].apply(p, f);
        let middle = self.scale1.forward(p, &x, &branch1)?;
        let (normed, stats2) = self.norm2.forward(p, &middle)?;
        let (f, mlp) = self.mlp.forward(p, &normed, None)?;
        let branch2 = self.drops[1].apply(p, f);
        let y = self.scale2.forward(p, &middle, &branch2)?;
        Ok((y, PatchSaved { x, stats1, attn, branch1, middle, stats2, mlp, branch2 }))
    }

    /// `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: PatchSaved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let PatchSaved { x, stats1, attn, branch1, middle, stats2, mlp, branch2 } = saved;
        let df = self.drops[1].apply(p, self.scale2.backward(p, g, &branch2, dy)?);
        let normed = self.norm2.again(p, &middle, &stats2);
        let d_normed = self.mlp.backward(p, g, &normed, mlp, &df)?;
        drop((df, normed, branch2));
        let d_middle = self.norm2.backward(p, g, &middle, &stats2, &d_normed, Some(dy))?;
        drop((d_normed, middle));
        let df = self.drops[0].apply(p, self.scale1.backward(p, g, &branch1, &d_middle)?);
        let normed = self.norm1.again(p, &x, &stats1);
        let d_normed = self.attn.backward(p, g, &normed, attn, &df)?;
        drop((df, normed, branch1));
        self.norm1.backward(p, g, &x, &stats1, &d_normed, Some(&d_middle))
    }
}

/// A class block with parameters `norm1`, `attn`, `norm2`, `mlp`, `gamma_1`, `gamma_2`.
#[derive(Clone, Debug)]
pub struct ClassBlock {
    norm1: LayerNorm,
    attn: ClassAttention,
    scale1: LayerScale,
    norm2: LayerNorm,
    mlp: Mlp,
    scale2: LayerScale,
}

/// What [`ClassBlock::backward`] needs.
pub struct ClassSaved<T: Float> {
    /// `[c; x]`.
    tokens: Tensor<T>,
    stats1: Stats<T>,
    attn: class::Saved<T>,
    branch1: Tensor<T>,
    middle: Tensor<T>,
    stats2: Stats<T>,
    mlp: mlp::Saved<T>,
    branch2: Tensor<T>,
}

/// `[c; x]` `[B, 1 + N, C]` of class tokens `[B, 1, C]` and patches `[B, N, C]`.
pub(super) fn with_class<T: Float>(class: &Tensor<T>, x: &Tensor<T>) -> Result<Tensor<T>> {
    let [b, n, c] = x.dims("patches")?;
    class.expect_shape("class tokens", [b, 1, c])?;
    let mut tokens = Tensor::scratch([b, 1 + n, c]);
    for (i, out) in tokens.data_mut().chunks_exact_mut(((1 + n) * c).max(1)).enumerate() {
        out[..c].copy_from_slice(&class.data()[i * c..(i + 1) * c]);
        out[c..].copy_from_slice(&x.data()[i * n * c..(i + 1) * n * c]);
    }
    Ok(tokens)
}

/// Adds the rows after the first of every image of `tokens` `[B, 1 + N, C]` to `x` `[B, N, C]`.
pub(super) fn add_patches<T: Float>(x: &mut Tensor<T>, tokens: &Tensor<T>) -> Result<()> {
    let [_, n, c] = x.dims("patches")?;
    if n * c > 0 {
        for (x, tokens) in x.data_mut().chunks_exact_mut(n * c).zip(tokens.data().chunks_exact((1 + n) * c)) {
            elementwise::add(x, &tokens[c..]);
        }
    }
    Ok(())
}

impl ClassBlock {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: Settings) -> Result<Self> {
        let Settings { dim, ln_eps, init_scale, .. } = settings;
        let norm1 = LayerNorm::new(names.at("norm1"), dim, ln_eps);
        let attn = ClassAttention::new(names.at("attn"), settings.attention(), normal_02)?;
        let norm2 = LayerNorm::new(names.at("norm2"), dim, ln_eps);
        let mlp = Mlp::new(names.at("mlp"), dim, hidden_width(dim, settings.mlp_ratio)?, normal_02);
        let [scale1, scale2] = ["gamma_1", "gamma_2"].map(|name| LayerScale::new(names, name, dim, init_scale));
        Ok(ClassBlock { norm1, attn, scale1, norm2, mlp, scale2 })
    }

    /// The new class tokens `[B, 1, C]`, of patches `x` `[B, N, C]` and class tokens `class` `[B, 1, C]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, class: &Tensor<T>) -> Result<(Tensor<T>, ClassSaved<T>)> {
        let tokens = with_class(class, x)?;
        let (normed, stats1) = self.norm1.forward(p, &tokens)?;
        let (branch1, attn) = self.attn.forward(p, &normed)?;
        drop(normed);
        let middle = self.scale1.forward(p, class, &branch1)?;
        let (normed, stats2) = self.norm2.forward(p, &middle)?;
        let (branch2, mlp) = self.mlp.forward(p, &normed, None)?;
        let y = self.scale2.forward(p, &middle, &branch2)?;
        Ok((y, ClassSaved { tokens, stats1, attn, branch1, middle, stats2, mlp, branch2 }))
    }

    /// The gradient of the class tokens; that of the patches is added to `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: ClassSaved<T>,
        dx: &mut Tensor<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let ClassSaved { tokens, stats1, attn, branch1, middle, stats2, mlp, branch2 } = saved;
        let df = self.scale2.backward(p, g, &branch2, dy)?;
        let normed = self.norm2.again(p, &middle, &stats2);
        let d_normed = self.mlp.backward(p, g, &normed, mlp, &df)?;
        let d_middle = self.norm2.backward(p, g, &middle, &stats2, &d_normed, Some(dy))?;
        let df = self.scale1.backward(p, g, &branch1, &d_middle)?;
        let normed = self.norm1.again(p, &tokens, &stats1);
        let d_normed = self.attn.backward(p, g, &normed, attn, &df, None)?;
        drop(normed);
        let d_tokens = self.norm1.backward(p, g, &tokens, &stats1, &d_normed, None)?;
        add_patches(dx, &d_tokens)?;
        let mut d_class = first_rows(&d_tokens)?;
        elementwise::add(d_class.data_mut(), d_middle.data());
        Ok(d_class)
    }
}

/// From patches to one vector per image: `cls_token`, `blocks_token_only.{i}`, `norm`.
#[derive(Clone, Debug)]
pub struct ClassStage {
    token: Param,
    blocks: Vec<ClassBlock>,
    norm: LayerNorm,
    dim: usize,
}

/// What [`ClassStage::backward`] needs.
pub struct StageSaved<T: Float> {
    blocks: Vec<Kept<T, ClassSaved<T>>>,
    /// The patches, where the blocks run once more.
    x: Option<Tensor<T>>,
    last: Tensor<T>,
    stats: Stats<T>,
    patches: usize,
}

impl ClassStage {
    /// Registers the parameters of `depth` class blocks.
    pub fn new(names: &mut Names, settings: Settings, depth: usize) -> Result<Self> {
        let token = names.param("cls_token", [1, 1, settings.dim], Init::NORMAL_02);
        let blocks =
            (0..depth).map(|i| ClassBlock::new(&mut names.at(format!("blocks_token_only.{i}")), settings)).collect::<Result<_>>()?;
        let norm = LayerNorm::new(names.at("norm"), settings.dim, settings.ln_eps);
        Ok(ClassStage { token, blocks, norm, dim: settings.dim })
    }

    /// What the stage costs for `b` images of `n` patches.
    pub fn cost(settings: Settings, depth: usize, b: usize, n: usize) -> Result<Cost> {
        let block = settings.class_cost(b, n)?;
        // The norm's input is the last block's output (without blocks, the token repeated); its statistics, y.
        let first = if depth == 0 { b * settings.dim } else { 0 };
        let activation_bytes = depth * block.activation_bytes + 4 * (first + b * (settings.dim + 2));
        Ok(Cost { flops: depth * block.flops, activation_bytes })
    }

    /// `[B, C]` of patches `[B, N, C]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, StageSaved<T>)> {
        let [b, n, c] = x.dims("patches")?;
        if c != self.dim {
            return Err(Error::shape("patches", format!("[batch, patches, {}]", self.dim), x.shape()));
        }
        let mut class = Tensor::scratch([b, 1, c]);
        class.data_mut().chunks_exact_mut(c).for_each(|row| row.copy_from_slice(p.get(self.token)));
        let (class, blocks) = stack::forward(p, &self.blocks, class, |block, _, class| block.forward(p, x, &class))?;
        let (y, stats) = self.norm.forward(p, &class)?;
        let x = matches!(p.pass(), Pass::Train { recompute: true, .. }).then(|| x.clone());
        Ok((y.reshape([b, c])?, StageSaved { blocks, x, last: class, stats, patches: n }))
    }

    /// The gradient of the patches.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: StageSaved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let StageSaved { blocks, x, last, stats, patches } = saved;
        let [b, c] = dy.dims("gradient of the class vector")?;
        let d_class = self.norm.backward(p, g, &last, &stats, &dy.reshape([b, 1, c])?, None)?;
        let mut dx = Tensor::zeros([b, patches, c]);
        let d_class = stack::backward(
            &self.blocks,
            blocks,
            d_class,
            |block, _, class| block.forward(p, x.as_ref().unwrap_or(&last), &class),
            |block, _, saved, d| block.backward(p, g, saved, &mut dx, d),
        )?;
        for row in d_class.data().chunks_exact(c) {
            elementwise::add(g.get_mut(self.token), row);
        }
        Ok(dx)
    }
}

/// Random `dim`, `num_heads`, `mlp_ratio`, `qkv_bias`, `ln_eps`.
pub fn sample_settings(rng: &mut Rng) -> Config {
    // A norm over one channel is constant: nothing to differentiate.
    let (heads, width) = (rng.between(1, 4), rng.between(2, 5));
    let mut config = Config::default();
    config.set("dim", heads * width).set("num_heads", heads).set("mlp_ratio", rng.range(0.5, 3.0));
    config.set("qkv_bias", rng.chance(0.7)).set("ln_eps", 1e-6);
    config
}

/// `block.layer_scale`.
pub struct LayerScaleBlock;

impl Operation for LayerScaleBlock {
    const NAME: &'static str = "block.layer_scale";
    const PAPER: &'static str = "2103.17239 CaiT";

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
        Settings::from_config(config)?.patch_cost(b, n).map(Some)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config())?;
        let (block, layout) = Layout::build(|names| PatchBlock::new(names, settings))?;
        run.unary(&layout, |p, x| block.forward(p, x.clone()), |p, g, saved, dy| block.backward(p, g, saved, dy))
    }
}

/// `block.layer_scale_class_attention`.
pub struct LayerScaleClassAttention;

impl Operation for LayerScaleClassAttention {
    const NAME: &'static str = "block.layer_scale_class_attention";
    const PAPER: &'static str = "2103.17239 CaiT";

    fn sample(rng: &mut Rng) -> Config {
        sample_settings(rng)
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, tokens, dim) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 20), config.positive("dim")?);
        draw.normal("x", [batch, tokens, dim]);
        draw.normal("x_cls", [batch, 1, dim]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        Settings::from_config(config)?.class_cost(b, n).map(Some)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config())?;
        let (block, layout) = Layout::build(|names| ClassBlock::new(names, settings))?;
        let p = run.params(&layout)?;
        let (x, class) = (run.input("x")?, run.input("x_cls")?);
        let (y, saved) = block.forward(&p, &x, &class)?;
        run.output("y", &y);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let mut dx = Tensor::zeros(x.shape());
            let d_class = block.backward(&p, &mut g, saved, &mut dx, &run.cotangent("y", y.shape())?)?;
            run.grad_input("x", &dx);
            run.grad_input("x_cls", &d_class);
            run.grad_params(&g);
        }
        Ok(())
    }
}
