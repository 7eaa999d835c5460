//! LayerNorm over the last axis.

use super::param::{Init, Names, Param, Params};
use crate::error::{Error, Result};
use crate::kernel::norm::{self, Relax};
use crate::tensor::{Float, Tensor};

/// LayerNorm over the last axis, biased variance, ε inside the root: `weight` γ and `bias` β, `[C]`.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Param,
    bias: Param,
    width: usize,
    eps: f64,
}

/// `(μ, r)` of every row.
pub type Stats<T> = Tensor<T>;

impl LayerNorm {
    /// Registers `weight` (ones) and `bias` (zeros).
    pub fn new(mut names: Names, width: usize, eps: f64) -> Self {
        let (weight, bias) = (names.param("weight", [width], Init::ONES), names.param("bias", [width], Init::ZEROS));
        LayerNorm { weight, bias, width, eps }
    }

    /// `weight` and `bias`.
    pub fn params(&self) -> [Param; 2] {
        [self.weight, self.bias]
    }

    /// ε.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// The normalised rows and their statistics.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, Stats<T>)> {
        self.forward_relaxed(p, x, None)
    }

    /// [`forward`](Self::forward) of x over its largest magnitude, CogView's; the rest stays the same.
    pub fn forward_relaxed<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, relax: Option<Relax>) -> Result<(Tensor<T>, Stats<T>)> {
        let (rows, cols) = x.shape().rows_cols();
        if cols != self.width || cols == 0 {
            return Err(Error::shape("input of a layer norm", format!("[…, {}]", self.width), x.shape()));
        }
        let (mut y, mut stats) = (Tensor::scratch(x.shape()), Tensor::scratch([rows, 2]));
        let affine = Some((p.get(self.weight), p.get(self.bias)));
        match relax {
            None => norm::layer_norm(y.data_mut(), stats.data_mut(), x.data(), affine, cols, self.eps),
            Some(relax) => norm::layer_norm_relaxed(y.data_mut(), stats.data_mut(), x.data(), affine, cols, self.eps, relax),
        }
        Ok((y, stats))
    }

    /// The output of an earlier [`forward`](Self::forward), computed again from its statistics.
    pub fn again<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, stats: &Stats<T>) -> Tensor<T> {
        let (mut y, mut stats) = (Tensor::scratch(x.shape()), stats.clone());
        norm::layer_norm_again(y.data_mut(), stats.data_mut(), x.data(), Some((p.get(self.weight), p.get(self.bias))), self.width);
        y
    }

    /// `dx`, plus `residual` if there is one: the gradient that flows past the norm and its branch.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        stats: &Stats<T>,
        dy: &Tensor<T>,
        residual: Option<&Tensor<T>>,
    ) -> Result<Tensor<T>> {
        dy.expect_shape("gradient of a layer norm", x.shape())?;
        let mut dx = Tensor::scratch(x.shape());
        let (mut dgamma, mut dbeta) = (Tensor::zeros([self.width]), Tensor::zeros([self.width]));
        norm::layer_norm_backward(
            dx.data_mut(),
            Some((dgamma.data_mut(), dbeta.data_mut())),
            x.data(),
            dy.data(),
            stats.data(),
            Some(p.get(self.weight)),
            residual.map(Tensor::data),
            self.width,
        );
        for (param, grad) in [(self.weight, dgamma), (self.bias, dbeta)] {
            for (total, &part) in g.get_mut(param).iter_mut().zip(grad.data()) {
                *total += part;
            }
        }
        Ok(dx)
    }
}
