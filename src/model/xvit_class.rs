//! `block.xvit_class_attention`: X-ViT's class block (arXiv 2205.13805): CaiT's, with XNorm class attention.
//!
//! `u = [c; x]`, `c ← c + γ₁ ⊙ attn(norm1 u)`, `y = c + γ₂ ⊙ mlp(norm2 c)`; the patches stay as they are. Without LayerScale the gains
//! are 1. Backward: the patches receive the gradient of `norm1` and of the attention's k and v.

use crate::attention::class::first_rows;
use crate::attention::class_xnorm::{self, ClassXNorm};
use crate::attention::xnorm;
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::Result;
use crate::kernel::elementwise;
use crate::nn::{LayerNorm, LayerScale, Layout, Mlp, Names, Params, Stats, mlp, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

use super::cait_block::{add_patches, with_class};
use super::vit_block::hidden_width;

/// What the class blocks are made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The attention.
    pub attention: xnorm::Settings,
    /// Hidden width of the MLP over C, truncated.
    pub mlp_ratio: f64,
    /// Start of the gains of the branches, if there are any.
    pub layer_scale: Option<f64>,
    /// ε of the norms.
    pub ln_eps: f64,
}

impl Settings {
    /// From the keys of `attention.xnorm` (that of the width by name), `mlp_ratio`, `layer_scale`, `ln_eps`.
    pub fn from_config(config: &Config, dim: &str) -> Result<Self> {
        Ok(Settings {
            attention: xnorm::Settings::from_config(config, dim)?,
            mlp_ratio: config.f64_or("mlp_ratio", 4.0)?,
            layer_scale: config.bool_or("layer_scale", true)?.then_some(1.0),
            ln_eps: config.f64_or("ln_eps", 1e-6)?,
        })
    }

    /// What a class block costs for `b` images of `n` patches.
    pub fn cost(&self, b: usize, n: usize) -> Result<Cost> {
        let c = self.attention.dim;
        let hidden = hidden_width(c, self.mlp_ratio)?;
        // `[c; x]` and its statistics, those of the middle, hidden units, the MLP's output; with gains, branches and sums are two things.
        let sums = if self.layer_scale.is_some() { 2 * c } else { 0 };
        let rest = Cost { flops: 4 * b * c * hidden, activation_bytes: 4 * b * ((n + 1) * (c + 2) + 2 + hidden + c + sums) };
        Ok(class_xnorm::cost(&self.attention, b, n + 1) + rest)
    }
}

/// A class block with parameters `norm1`, `attn`, `norm2`, `mlp`, `gamma_1`, `gamma_2`.
#[derive(Clone, Debug)]
pub struct ClassBlock {
    norm1: LayerNorm,
    attn: ClassXNorm,
    norm2: LayerNorm,
    mlp: Mlp,
    scales: Option<[LayerScale; 2]>,
}

/// What [`ClassBlock::backward`] needs.
pub struct Saved<T: Float> {
    /// `[c; x]`.
    tokens: Tensor<T>,
    stats1: Stats<T>,
    attn: class_xnorm::Saved<T>,
    middle: Tensor<T>,
    stats2: Stats<T>,
    mlp: mlp::Saved<T>,
    /// The outputs of attention and MLP, where they have gains.
    branches: Option<[Tensor<T>; 2]>,
}

impl ClassBlock {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: Settings) -> Result<Self> {
        let Settings { attention, mlp_ratio, layer_scale, ln_eps } = settings;
        let dim = attention.dim;
        let norm1 = LayerNorm::new(names.at("norm1"), dim, ln_eps);
        let attn = ClassXNorm::new(names.at("attn"), attention, normal_02)?;
        let norm2 = LayerNorm::new(names.at("norm2"), dim, ln_eps);
        let mlp = Mlp::new(names.at("mlp"), dim, hidden_width(dim, mlp_ratio)?, normal_02);
        let scales = layer_scale.map(|start| ["gamma_1", "gamma_2"].map(|name| LayerScale::new(names, name, dim, start)));
        Ok(ClassBlock { norm1, attn, norm2, mlp, scales })
    }

    /// The new class tokens `[B, 1, C]`, of patches `x` `[B, N, C]` and class tokens `class` `[B, 1, C]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, class: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let tokens = with_class(class, x)?;
        let (normed, stats1) = self.norm1.forward(p, &tokens)?;
        let (mut f, attn) = self.attn.forward(p, &normed)?;
        drop(normed);
        let Some([scale1, scale2]) = &self.scales else {
            elementwise::add(f.data_mut(), class.data());
            let (normed, stats2) = self.norm2.forward(p, &f)?;
            let (y, mlp) = self.mlp.forward(p, &normed, Some(&f))?;
            return Ok((y, Saved { tokens, stats1, attn, middle: f, stats2, mlp, branches: None }));
        };
        let middle = scale1.forward(p, class, &f)?;
        let (normed, stats2) = self.norm2.forward(p, &middle)?;
        let (f2, mlp) = self.mlp.forward(p, &normed, None)?;
        let y = scale2.forward(p, &middle, &f2)?;
        Ok((y, Saved { tokens, stats1, attn, middle, stats2, mlp, branches: Some([f, f2]) }))
    }

    /// The gradient of the class tokens; that of the patches is added to `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        dx: &mut Tensor<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let Saved { tokens, stats1, attn, middle, stats2, mlp, branches } = saved;
        let gains = self.scales.as_ref().zip(branches.as_ref());
        let df = gains.map_or(Ok(dy.clone()), |([_, scale], [_, f])| scale.backward(p, g, f, dy))?;
        let normed = self.norm2.again(p, &middle, &stats2);
        let d_normed = self.mlp.backward(p, g, &normed, mlp, &df)?;
        let d_middle = self.norm2.backward(p, g, &middle, &stats2, &d_normed, Some(dy))?;
        let df = gains.map_or(Ok(d_middle.clone()), |([scale, _], [f, _])| scale.backward(p, g, f, &d_middle))?;
        let normed = self.norm1.again(p, &tokens, &stats1);
        let d_normed = self.attn.backward(p, g, &normed, attn, &df)?;
        drop(normed);
        let d_tokens = self.norm1.backward(p, g, &tokens, &stats1, &d_normed, None)?;
        add_patches(dx, &d_tokens)?;
        let mut d_class = first_rows(&d_tokens)?;
        elementwise::add(d_class.data_mut(), d_middle.data());
        Ok(d_class)
    }
}

/// `block.xvit_class_attention`.
pub struct XvitClassAttention;

impl Operation for XvitClassAttention {
    const NAME: &'static str = "block.xvit_class_attention";
    const PAPER: &'static str = "2205.13805 X-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        xnorm::sample_settings(rng, &mut config);
        // A norm over one channel is constant: nothing to differentiate.
        config.set("dim", rng.between(2, 10)).set("mlp_ratio", rng.range(0.5, 2.5)).set("layer_scale", rng.chance(0.5));
        config.set("ln_eps", 1e-6);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, tokens, dim) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 20), config.positive("dim")?);
        draw.normal("x", [batch, tokens, dim]);
        draw.normal("x_cls", [batch, 1, dim]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        Settings::from_config(config, "dim")?.cost(b, n).map(Some)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config(), "dim")?;
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
