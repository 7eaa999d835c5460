//! The pre-norm residual block around any attention: `x ← x + attn(norm1 x)`, `x ← x + mlp(norm2 x)`; and the head that averages tokens.
//!
//! Kept for the backward pass: the input, the middle, the statistics of both norms, the hidden units, and what the attention keeps. The
//! norms' outputs are computed again.

use super::swin_ops::{mean_tokens, mean_tokens_backward};
use super::vit_block::hidden_width;
use crate::case::Cost;
use crate::error::Result;
use crate::nn::{DropPath, Init, LayerNorm, Linear, Mlp, Names, Params, Stats, mlp};
use crate::tensor::{Float, Tensor};

/// Everything of a block but its attention: `norm1`, `norm2`, `mlp`.
#[derive(Clone, Debug)]
pub struct PreNorm {
    norm1: LayerNorm,
    norm2: LayerNorm,
    mlp: Mlp,
    drops: [DropPath; 2],
}

/// What the backward pass needs; S is what the attention keeps.
pub struct Saved<T: Float, S> {
    x: Tensor<T>,
    stats1: Stats<T>,
    attn: S,
    middle: Tensor<T>,
    stats2: Stats<T>,
    mlp: mlp::Saved<T>,
}

impl PreNorm {
    /// Registers `norm1`, `norm2` and `mlp`; `drop_path` is the probability that a branch is left out in training.
    pub fn new(names: &mut Names, dim: usize, mlp_ratio: f64, eps: f64, drop_path: f64, init: fn(usize, usize) -> Init) -> Result<Self> {
        let hidden = hidden_width(dim, mlp_ratio)?;
        let [norm1, norm2] = ["norm1", "norm2"].map(|name| LayerNorm::new(names.at(name), dim, eps));
        let drops = [DropPath::new(names, drop_path)?, DropPath::new(names, drop_path)?];
        Ok(PreNorm { norm1, norm2, mlp: Mlp::new(names.at("mlp"), dim, hidden, init), drops })
    }

    /// The cost for `b` images of `n` tokens, beside the attention's (whose output is the block's middle).
    pub fn cost(dim: usize, mlp_ratio: f64, b: usize, n: usize) -> Result<Cost> {
        let statistics = Cost { flops: 0, activation_bytes: 4 * b * n * (2 + 2) };
        Ok(Mlp::cost(dim, hidden_width(dim, mlp_ratio)?, b, n) + statistics)
    }

    /// The block's output. `attend(normed, residual)` is the attention of the normed tokens, plus the residual if there is one.
    pub fn forward<T: Float, S>(
        &self,
        p: &Params<T>,
        x: Tensor<T>,
        attend: impl FnOnce(&Tensor<T>, Option<&Tensor<T>>) -> Result<(Tensor<T>, S)>,
    ) -> Result<(Tensor<T>, Saved<T, S>)> {
        let (normed, stats1) = self.norm1.forward(p, &x)?;
        let (middle, attn) = self.drops[0].residual(p, &x, |residual| attend(&normed, residual))?;
        let (normed, stats2) = self.norm2.forward(p, &middle)?;
        let (y, mlp) = self.drops[1].residual(p, &middle, |residual| self.mlp.forward(p, &normed, residual))?;
        Ok((y, Saved { x, stats1, attn, middle, stats2, mlp }))
    }

    /// `dx`. `attend_backward(grads, normed, saved, d)` is the gradient of the normed tokens.
    pub fn backward<T: Float, S>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T, S>,
        dy: &Tensor<T>,
        attend_backward: impl FnOnce(&mut Params<T>, &Tensor<T>, S, &Tensor<T>) -> Result<Tensor<T>>,
    ) -> Result<Tensor<T>> {
        let Saved { x, stats1, attn, middle, stats2, mlp } = saved;
        let normed = self.norm2.again(p, &middle, &stats2);
        let d_normed = self.drops[1].backward(p, dy, |d| self.mlp.backward(p, g, &normed, mlp, d))?;
        drop(normed);
        let d_middle = self.norm2.backward(p, g, &middle, &stats2, &d_normed, Some(dy))?;
        drop((d_normed, middle));
        let normed = self.norm1.again(p, &x, &stats1);
        let d_normed = self.drops[0].backward(p, &d_middle, |d| attend_backward(g, &normed, attn, d))?;
        drop(normed);
        self.norm1.backward(p, g, &x, &stats1, &d_normed, Some(&d_middle))
    }
}

/// Mean over tokens, `fc_norm`, and `head` unless there are no classes.
#[derive(Clone, Debug)]
pub struct MeanHead {
    norm: LayerNorm,
    head: Option<Linear>,
}

/// What the backward pass needs.
pub struct MeanSaved<T: Float> {
    tokens: usize,
    pooled: Tensor<T>,
    stats: Stats<T>,
}

impl MeanHead {
    /// Registers `fc_norm` and `head`.
    pub fn new(names: &mut Names, dim: usize, classes: usize, eps: f64, init: fn(usize, usize) -> Init) -> Self {
        let norm = LayerNorm::new(names.at("fc_norm"), dim, eps);
        let head = (classes > 0).then(|| Linear::new(names.at("head"), dim, classes, true, init(dim, classes)));
        MeanHead { norm, head }
    }

    /// `[B, N, C]` → `[B, classes]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, MeanSaved<T>)> {
        let [_, tokens, _] = x.dims("tokens")?;
        let pooled = mean_tokens(x)?;
        let (normed, stats) = self.norm.forward(p, &pooled)?;
        p.show("pooled", &normed);
        let y = self.head.as_ref().map_or(Ok(normed.clone()), |head| head.forward(p, &normed))?;
        Ok((y, MeanSaved { tokens, pooled, stats }))
    }

    /// The gradient of the tokens.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: MeanSaved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let MeanSaved { tokens, pooled, stats } = saved;
        let d_normed = match &self.head {
            Some(head) => head.backward(p, g, &self.norm.again(p, &pooled, &stats), dy)?,
            None => dy.clone(),
        };
        let d_pooled = self.norm.backward(p, g, &pooled, &stats, &d_normed, None)?;
        mean_tokens_backward(&d_pooled, tokens)
    }
}
