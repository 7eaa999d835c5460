//! `block.sandwich`: CogView's transformer block with norms on both sides of a branch (arXiv 2105.13290).
//!
//! `x' = x + LN₃(Attn(LN₁ x))`, `y = x' + LN₄(W₂ gelu(W₁ LN₂(x') + b₁) + b₂)`; all four are
//! [`CogViewNorm`]s, GELU is the tanh form. Without `sandwich` LN₃ and LN₄ are absent: ordinary pre-LN. Memory passes LN₁ in a
//! call of its own, so with its own maximum.
//!
//! Kept for the backward pass beside input and memory: `qkv`, the attention's output, both branches, the middle, the hidden
//! units; the outputs of LN₁, LN₂ and GELU are recomputed.

use crate::attention::pb_relax::{
    self, CogViewAttention, Mask, draw_with_memory, masked_pairs, memory_of, sample_mask, shapes_with_memory, split_memory, with_memory,
};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::kernel::norm::Relax;
use crate::kernel::ranged::Pattern;
use crate::nn::cogview_norm::relax_of;
use crate::nn::{CogViewNorm, Init, Layout, Linear, Names, Params, Stats};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// What a block is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width C.
    pub dim: usize,
    /// Heads h, a divisor of C.
    pub num_heads: usize,
    /// α of the relaxed scores.
    pub alpha: f64,
    /// ε of all norms.
    pub ln_eps: f64,
    /// The maximum that they divide by.
    pub ln_relax: Option<Relax>,
    /// Norms after the branches, too.
    pub sandwich: bool,
}

impl Settings {
    /// `dim`, `num_heads`, `alpha`, `ln_eps`, `ln_relax`, `sandwich`.
    pub fn of(config: &Config) -> Result<Self> {
        Ok(Settings {
            dim: config.usize("dim")?,
            num_heads: config.usize("num_heads")?,
            alpha: config.f64_or("alpha", 32.0)?,
            ln_eps: config.f64_or("ln_eps", 1e-5)?,
            ln_relax: relax_of(config)?,
            sandwich: config.bool("sandwich")?,
        })
    }

    /// Random ones, for a sample.
    pub fn sample(rng: &mut Rng, config: &mut Config) {
        let heads = rng.between(1, 3);
        config.set("dim", heads * rng.between(2, 5)).set("num_heads", heads).set("alpha", rng.range(1.0, 64.0));
        config.set("ln_eps", 1e-5).set("ln_relax", rng.pick(&["tensor", "token", "none"])).set("sandwich", rng.chance(0.7));
    }
}

/// CogView's block.
#[derive(Clone, Debug)]
pub struct Block {
    ln1: CogViewNorm,
    attention: CogViewAttention,
    ln3: Option<CogViewNorm>,
    ln2: CogViewNorm,
    dense_h_to_4h: Linear,
    dense_4h_to_h: Linear,
    ln4: Option<CogViewNorm>,
    dim: usize,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    x: Tensor<T>,
    stats1: Stats<T>,
    memory: Option<(Tensor<T>, Stats<T>)>,
    attention: pb_relax::Saved<T>,
    branch1: Option<(Tensor<T>, Stats<T>)>,
    middle: Tensor<T>,
    stats2: Stats<T>,
    hidden: Tensor<T>,
    branch2: Option<(Tensor<T>, Stats<T>)>,
}

impl Block {
    /// Registers the parameters. `layers` is the depth of the model, with which the output weights shrink.
    pub fn new(mut names: Names, settings: Settings, layers: usize) -> Result<Self> {
        let Settings { dim, num_heads, alpha, ln_eps, ln_relax, sandwich } = settings;
        let out_init = Init::Normal(0.02 / (2.0 * layers as f64).sqrt());
        let norm = |names: &mut Names, name: &str| CogViewNorm::new(names.at(name), dim, ln_eps, ln_relax);
        let ln1 = norm(&mut names, "input_layernorm");
        let attention = CogViewAttention::new(names.at("attention"), dim, num_heads, alpha, out_init)?;
        let ln3 = sandwich.then(|| norm(&mut names, "third_layernorm"));
        let ln2 = norm(&mut names, "post_attention_layernorm");
        let mut mlp = names.at("mlp");
        let dense_h_to_4h = Linear::new(mlp.at("dense_h_to_4h"), dim, 4 * dim, true, Init::NORMAL_02);
        let dense_4h_to_h = Linear::new(mlp.at("dense_4h_to_h"), 4 * dim, dim, true, out_init);
        let ln4 = sandwich.then(|| norm(&mut names, "fourth_layernorm"));
        Ok(Block { ln1, attention, ln3, ln2, dense_h_to_4h, dense_4h_to_h, ln4, dim })
    }

    /// The attention.
    pub fn attention(&self) -> &CogViewAttention {
        &self.attention
    }

    /// The first norm.
    pub fn input_norm(&self) -> &CogViewNorm {
        &self.ln1
    }

    /// `x + norm(branch)`, and what the norm's backward pass needs.
    #[allow(clippy::type_complexity)]
    fn close<T: Float>(
        p: &Params<T>,
        norm: &Option<CogViewNorm>,
        x: &Tensor<T>,
        branch: Tensor<T>,
    ) -> Result<(Tensor<T>, Option<(Tensor<T>, Stats<T>)>)> {
        let (mut y, saved) = match norm {
            None => (branch, None),
            Some(norm) => {
                let (y, stats) = norm.forward(p, &branch)?;
                (y, Some((branch, stats)))
            }
        };
        elementwise::add(y.data_mut(), x.data());
        Ok((y, saved))
    }

    /// The part of the block after its attention `a`: the output, and what is kept.
    pub fn finish<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, a: Tensor<T>) -> Result<(Tensor<T>, Finish<T>)> {
        let (middle, branch1) = Self::close(p, &self.ln3, x, a)?;
        let (normed, stats2) = self.ln2.forward(p, &middle)?;
        let hidden = self.dense_h_to_4h.forward(p, &normed)?;
        drop(normed);
        let mut active = Tensor::scratch(hidden.shape());
        elementwise::gelu_tanh(active.data_mut(), hidden.data(), T::ONE);
        let f = self.dense_4h_to_h.forward(p, &active)?;
        drop(active);
        let (y, branch2) = Self::close(p, &self.ln4, &middle, f)?;
        Ok((y, Finish { branch1, middle, stats2, hidden, branch2 }))
    }

    /// The block's output.
    pub fn forward<T: Float>(
        &self,
        p: &Params<T>,
        x: Tensor<T>,
        mem: Option<Tensor<T>>,
        pattern: &Pattern,
    ) -> Result<(Tensor<T>, Saved<T>)> {
        let (normed, stats1) = self.ln1.forward(p, &x)?;
        let (normed_mem, memory) = match mem {
            None => (None, None),
            Some(mem) => {
                let (normed, stats) = self.ln1.forward(p, &mem)?;
                (Some(normed), Some((mem, stats)))
            }
        };
        let (z, first) = with_memory(normed_mem.as_ref(), &normed)?;
        drop((normed, normed_mem));
        let (a, attention) = self.attention.forward(p, &z, first, pattern)?;
        drop(z);
        let (y, Finish { branch1, middle, stats2, hidden, branch2 }) = self.finish(p, &x, a)?;
        Ok((y, Saved { x, stats1, memory, attention, branch1, middle, stats2, hidden, branch2 }))
    }

    /// `dx`, and `dmem` if there is memory.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        pattern: &Pattern,
        saved: Saved<T>,
        dy: &Tensor<T>,
    ) -> Result<(Tensor<T>, Option<Tensor<T>>)> {
        let Saved { x, stats1, memory, attention, branch1, middle, stats2, hidden, branch2 } = saved;
        // y = x' + LN₄(W₂ gelu(h) + b₂)
        let df = Self::open(p, g, &self.ln4, branch2, dy)?;
        let mut active = Tensor::scratch(hidden.shape());
        elementwise::gelu_tanh(active.data_mut(), hidden.data(), T::ONE);
        let mut dh = self.dense_4h_to_h.backward(p, g, &active, &df)?;
        drop((active, df));
        elementwise::gelu_tanh_backward(dh.data_mut(), hidden.data(), T::ONE);
        drop(hidden);
        // h = W₁ LN₂(x') + b₁
        let normed = self.ln2.again(p, &middle, &stats2);
        let d_normed = self.dense_h_to_4h.backward(p, g, &normed, &dh)?;
        drop((dh, normed));
        let d_middle = self.ln2.backward(p, g, &middle, &stats2, &d_normed, Some(dy))?;
        drop((d_normed, middle));
        // x' = x + LN₃(Attn(LN₁ x))
        let da = Self::open(p, g, &self.ln3, branch1, &d_middle)?;
        let normed_mem = memory.as_ref().map(|(mem, stats)| self.ln1.again(p, mem, stats));
        let (z, first) = with_memory(normed_mem.as_ref(), &self.ln1.again(p, &x, &stats1))?;
        drop(normed_mem);
        let dz = self.attention.backward(p, g, &z, first, pattern, attention, &da)?;
        drop((z, da));
        let (d_mem, d_x) = split_memory(dz, first)?;
        let dx = self.ln1.backward(p, g, &x, &stats1, &d_x, Some(&d_middle))?;
        let d_mem = memory.map(|(mem, stats)| self.ln1.backward(p, g, &mem, &stats, &d_mem, None)).transpose()?;
        Ok((dx, d_mem))
    }

    /// The gradient of a branch from that of the sum.
    fn open<T: Float>(
        p: &Params<T>,
        g: &mut Params<T>,
        norm: &Option<CogViewNorm>,
        branch: Option<(Tensor<T>, Stats<T>)>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        match (norm, branch) {
            (Some(norm), Some((branch, stats))) => norm.backward(p, g, &branch, &stats, dy, None),
            _ => Ok(dy.clone()),
        }
    }

    /// `queries` tokens per image after `memory`, `pairs` scores per image.
    pub fn cost(&self, batch: usize, memory: usize, queries: usize, pairs: usize) -> Cost {
        let (c, rows) = (self.dim, batch * queries);
        let sandwich = usize::from(self.ln3.is_some());
        // The middle or the first branch is what the attention counts as its output.
        let kept = rows * (c * (1 + 4 + 2 * sandwich) + 4 + 4 * sandwich) + 2 * batch * memory;
        self.attention.cost(batch, memory + queries, queries, pairs) + Cost { flops: 2 * rows * 8 * c * c, activation_bytes: 4 * kept }
    }
}

/// What [`Block::finish`] keeps.
pub struct Finish<T: Float> {
    branch1: Option<(Tensor<T>, Stats<T>)>,
    middle: Tensor<T>,
    stats2: Stats<T>,
    hidden: Tensor<T>,
    branch2: Option<(Tensor<T>, Stats<T>)>,
}

/// `block.sandwich`.
pub struct Sandwich;

impl Operation for Sandwich {
    const NAME: &'static str = "block.sandwich";
    const PAPER: &'static str = "2105.13290 CogView";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        Settings::sample(rng, &mut config);
        sample_mask(rng, &mut config);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_with_memory(config, draw)
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, m, n] = shapes_with_memory(inputs)?;
        let (block, _) = Layout::build(|names| Block::new(names.here(), Settings::of(config)?, 1))?;
        Ok(Some(block.cost(b, m, n, masked_pairs(config, m, n)?)))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::of(run.config())?;
        let (block, layout) = Layout::build(|names| Block::new(names.here(), settings, 1))?;
        let (mem, x) = (memory_of(run)?, run.input("x")?);
        let [batch, queries, c] = x.dims("input `x`")?;
        let memory = match &mem {
            None => 0,
            Some(mem) => mem.dims::<3>("input `mem`")?[1],
        };
        if c != settings.dim {
            return Err(Error::shape("input `x`", format!("[batch, tokens, {}]", settings.dim), x.shape()));
        }
        let pattern = Mask::of(run)?.pattern(batch, memory, queries)?;
        let p = run.params(&layout)?;
        let (y, saved) = block.forward(&p, x, mem, &pattern)?;
        run.output("y", &y);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let (dx, d_mem) = block.backward(&p, &mut g, &pattern, saved, &run.cotangent("y", y.shape())?)?;
            run.grad_input("x", &dx);
            if let Some(d_mem) = d_mem {
                run.grad_input("mem", &d_mem);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
