//! `nn.spvit_mlp`: an MLP whose hidden units have gates (SPViT, arXiv 2111.11802): `fc2(m ⊙ GELU(fc1 x))`, m the binary gates of
//! [`spvit_gate`](super::spvit_gate) while the widths are searched, all ones afterwards.
//!
//! Backward: `dh = m ⊙ (dy W₂) ⊙ GELU′(h)`, `∂m_j = Σ (dy W₂)_j GELU(h)_j`, `dW₂ = dyᵀ (m ⊙ GELU(h))`.

use super::mlp::{self, Mlp};
use super::spvit_gate::{GateKind, Gates, START, noise};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::{elementwise, reduce, rows};
use crate::nn::{Init, Layout, Linear, Names, Param, Params, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The MLP: plain, or with `ffn_thresholds`.
#[derive(Clone, Debug)]
pub enum SpvitMlp {
    /// All units of it are kept.
    Plain(Mlp),
    /// Units have gates.
    Gated {
        /// `fc1`.
        fc1: Linear,
        /// `fc2`.
        fc2: Linear,
        /// θ.
        thresholds: Param,
    },
}

/// What the backward pass needs beside the input.
pub enum Saved<T: Float> {
    /// Of a plain MLP.
    Plain(mlp::Saved<T>),
    /// Of a gated one.
    Gated {
        /// `fc1(x)`.
        hidden: Tensor<T>,
        /// m.
        mask: Tensor<T>,
        /// The gates.
        gates: Gates,
    },
}

impl<T: Float> Saved<T> {
    /// The gates of a search.
    pub fn gates(&self) -> Option<&Gates> {
        match self {
            Saved::Plain(_) => None,
            Saved::Gated { gates, .. } => Some(gates),
        }
    }
}

impl SpvitMlp {
    /// Registers `fc1`, `fc2` and, for a `search`, `ffn_thresholds`.
    pub fn new(names: &mut Names, dim: usize, hidden: usize, search: bool) -> Self {
        if !search {
            return SpvitMlp::Plain(Mlp::new(names.here(), dim, hidden, normal_02));
        }
        let fc1 = Linear::new(names.at("fc1"), dim, hidden, true, normal_02(dim, hidden));
        let fc2 = Linear::new(names.at("fc2"), hidden, dim, true, normal_02(hidden, dim));
        SpvitMlp::Gated { fc1, fc2, thresholds: names.param("ffn_thresholds", [hidden], Init::Constant(START)) }
    }

    /// The output plus `residual`; `u` is the noise of a search in training.
    pub fn forward<T: Float>(
        &self,
        p: &Params<T>,
        x: &Tensor<T>,
        u: Option<&[T]>,
        residual: Option<&Tensor<T>>,
    ) -> Result<(Tensor<T>, Saved<T>)> {
        match self {
            SpvitMlp::Plain(mlp) => {
                let (y, saved) = mlp.forward(p, x, residual)?;
                Ok((y, Saved::Plain(saved)))
            }
            SpvitMlp::Gated { fc1, fc2, thresholds } => {
                let gates = Gates::new(GateKind::Ffn, p.get(*thresholds), u);
                let mask = gates.gates();
                let (hidden, mut active) = fc1.forward_gelu(p, x)?;
                rows::multiply_table(active.data_mut(), mask.data());
                Ok((fc2.forward_onto(p, &active, residual)?, Saved::Gated { hidden, mask, gates }))
            }
        }
    }

    /// `dx` (without the residual's share); `d_expected` is the gradient of the expected gates.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: Saved<T>,
        dy: &Tensor<T>,
        d_expected: Option<&[T]>,
    ) -> Result<Tensor<T>> {
        match (self, saved) {
            (SpvitMlp::Plain(mlp), Saved::Plain(saved)) => mlp.backward(p, g, x, saved, dy),
            (SpvitMlp::Gated { fc1, fc2, thresholds }, Saved::Gated { hidden, mask, gates }) => {
                let mut d_active = fc2.backward_input(p, dy)?;
                let mut active = Tensor::scratch(hidden.shape());
                elementwise::gelu(active.data_mut(), hidden.data(), T::ONE);
                let mut d_mask = Tensor::zeros(mask.shape());
                let mut product = active.clone();
                elementwise::multiply(product.data_mut(), d_active.data(), T::ONE);
                reduce::add_column_sums(d_mask.data_mut(), product.data());
                drop(product);
                gates.backward(g.get_mut(*thresholds), Some(d_mask.data()), d_expected);
                rows::multiply_table(active.data_mut(), mask.data());
                fc2.backward_params(g, &active, dy)?;
                drop(active);
                rows::multiply_table(d_active.data_mut(), mask.data());
                elementwise::gelu_backward(d_active.data_mut(), hidden.data(), T::ONE);
                fc1.backward(p, g, x, &d_active)
            }
            _ => Err(Error::value("a gated MLP", "saved by another one")),
        }
    }

    /// What the MLP costs on `rows` tokens: the hidden units and the output are kept.
    pub fn cost(rows: usize, dim: usize, hidden: usize) -> Cost {
        Cost { flops: 4 * rows * dim * hidden, activation_bytes: 4 * rows * (dim + hidden) }
    }
}

/// The units that a search keeps: those whose indicator is not 0, in order.
pub fn kept_units<T: Float>(indicators: &[T]) -> Vec<usize> {
    (0..indicators.len()).filter(|&j| indicators[j] != T::ZERO).collect()
}

/// Cuts the weights of a dense MLP to some hidden units: `fc1.weight` `[hidden, C]`, `fc1.bias`, `fc2.weight` `[C, hidden]`.
pub fn slice_units<T: Float>(
    fc1_weight: &Tensor<T>,
    fc1_bias: &Tensor<T>,
    fc2_weight: &Tensor<T>,
    kept: &[usize],
) -> Result<[Tensor<T>; 3]> {
    let [hidden, c] = fc1_weight.dims("fc1.weight")?;
    fc1_bias.expect_shape("fc1.bias", [hidden])?;
    fc2_weight.expect_shape("fc2.weight", [c, hidden])?;
    if let Some(unit) = kept.iter().find(|&&unit| unit >= hidden) {
        return Err(Error::value("kept units", format!("expected numbers below {hidden}, found {unit}")));
    }
    let k = kept.len().max(1);
    Ok([
        Tensor::from_fn([kept.len(), c], |i| fc1_weight.data()[kept[i / c] * c + i % c]),
        Tensor::from_fn([kept.len()], |i| fc1_bias.data()[kept[i]]),
        Tensor::from_fn([c, kept.len()], |i| fc2_weight.data()[i / k * hidden + kept[i % k]]),
    ])
}

/// `nn.spvit_mlp`.
pub struct SpvitMlpOp;

fn settings(config: &Config) -> Result<(usize, usize, bool, bool)> {
    let search = config.choice("mode", &["search", "finetune"])? == "search";
    Ok((config.positive("dim")?, config.positive("hidden")?, search, search && config.bool("training")?))
}

impl Operation for SpvitMlpOp {
    const NAME: &'static str = "nn.spvit_mlp";
    const PAPER: &'static str = "2111.11802 SPViT";
    const DATA: &'static [&'static str] = &["u"];

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("dim", rng.between(1, 8)).set("hidden", rng.between(1, 12)).set("mode", rng.pick(&["search", "search", "finetune"]));
        config.set("training", rng.chance(0.6));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (dim, hidden, _, noisy) = settings(config)?;
        let (batch, tokens) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 12));
        draw.normal("x", [batch, tokens, dim]);
        if noisy {
            draw.uniform("u", [hidden]);
        }
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, n, _], (dim, hidden, search, _)) = (inputs.dims("x")?, settings(config)?);
        let gates = Cost { flops: 0, activation_bytes: if search { 4 * hidden } else { 0 } };
        Ok(Some(SpvitMlp::cost(b * n, dim, hidden) + gates))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (dim, hidden, search, noisy) = settings(run.config())?;
        let (x, u) = (run.input("x")?, noise(run, "u", [hidden], noisy)?);
        let [_, _, c] = x.dims("input `x`")?;
        if c != dim {
            return Err(Error::shape("input `x`", format!("[batch, tokens, {dim}]"), x.shape()));
        }
        let (mlp, layout) = Layout::build(|names| Ok(SpvitMlp::new(names, dim, hidden, search)))?;
        let p = run.params(&layout)?;
        let (y, saved) = mlp.forward(&p, &x, u.as_ref().map(Tensor::data), None)?;
        run.output("out", &y);
        if let Some(gates) = saved.gates() {
            run.output("ffn_indicators", &gates.expected());
        }
        if run.backward() {
            let (mut g, dy) = (run.zero_grads(&p), run.cotangent("out", y.shape())?);
            let d_expected = if search { Some(run.cotangent("ffn_indicators", [hidden].into())?) } else { None };
            let dx = mlp.backward(&p, &mut g, &x, saved, &dy, d_expected.as_ref().map(Tensor::data))?;
            run.grad_input("x", &dx);
            run.grad_params(&g);
        }
        Ok(())
    }
}
