//! `fc2(GELU(fc1(x)))`.

use super::linear::Linear;
use super::param::{Init, Names, Params};
use super::pass::Pass;
use crate::case::Cost;
use crate::error::Result;
use crate::tensor::{Float, Tensor};

/// The MLP of a transformer block: `fc1`, exact GELU, `fc2`, both with bias.
#[derive(Clone, Debug)]
pub struct Mlp {
    fc1: Linear,
    fc2: Linear,
    recompute: bool,
}

/// What [`Mlp::backward`] needs beside the input: `h = fc1(x)`, unless that is recomputed as `GELU(h)` always is.
pub struct Saved<T: Float> {
    hidden: Option<Tensor<T>>,
}

impl Mlp {
    /// Registers `fc1` and `fc2`.
    pub fn new(names: Names, dim: usize, hidden: usize, init: fn(usize, usize) -> Init) -> Self {
        Self::with_inits(names, dim, hidden, [init(dim, hidden), init(hidden, dim)])
    }

    /// Registers `fc1` and `fc2` with an initialisation for each.
    pub fn with_inits(names: Names, dim: usize, hidden: usize, inits: [Init; 2]) -> Self {
        Self::named(names, ["fc1", "fc2"], dim, hidden, inits)
    }

    /// Registers the two layers under other names: `["0", "2"]` where the MLP was published as a sequence.
    pub fn named(mut names: Names, layers: [&str; 2], dim: usize, hidden: usize, [first, second]: [Init; 2]) -> Self {
        let fc1 = Linear::new(names.at(layers[0]), dim, hidden, true, first);
        let fc2 = Linear::new(names.at(layers[1]), hidden, dim, true, second);
        Mlp { fc1, fc2, recompute: false }
    }

    /// The same, but the backward pass computes `fc1(x)` again: a ninth more work for 4 of the 10 C numbers per token that a block keeps.
    pub fn recomputed(self) -> Self {
        Mlp { recompute: true, ..self }
    }

    /// The cost for `b` images of `n` tokens: the hidden units and the output are kept.
    pub fn cost(dim: usize, hidden: usize, b: usize, n: usize) -> Cost {
        Cost { flops: 4 * b * n * dim * hidden, activation_bytes: 4 * b * n * (hidden + dim) }
    }

    /// `fc2(GELU(fc1(x)))`, plus `residual`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, residual: Option<&Tensor<T>>) -> Result<(Tensor<T>, Saved<T>)> {
        let (hidden, active) = if self.recompute || p.pass() == Pass::Infer {
            (None, self.fc1.gelu(p, x)?)
        } else {
            let (hidden, active) = self.fc1.forward_gelu(p, x)?;
            (Some(hidden), active)
        };
        Ok((self.fc2.forward_onto(p, &active, residual)?, Saved { hidden }))
    }

    /// `dx` (without the residual's share).
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        Saved { hidden }: Saved<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let mut hidden = match hidden {
            Some(hidden) => hidden,
            None => self.fc1.forward(p, x)?,
        };
        let dh = self.fc2.backward_gelu(p, &mut hidden, dy)?;
        self.fc2.backward_params(g, &hidden, dy)?;
        drop(hidden);
        self.fc1.backward(p, g, x, &dh)
    }
}
