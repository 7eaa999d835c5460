//! Transposed convolution of channels-last maps: the adjoint of [`Conv2d`].
//!
//! `y[b, Y, X, o] = bias[o] + Σ x[b, r, s, i] weight[i, o, u, v]` over all `(r, s, i, u, v)` with `r·stride − padding + u = Y`,
//! `s·stride − padding + v = X`. So forward is the input gradient of a convolution from the outputs to the inputs with the same
//! weight, `dx` is that convolution of `dy`, and `dW` is its weight gradient with the roles of input and gradient exchanged.

use super::conv::{Conv2d, ConvSettings};
use super::param::{Init, Names, Param, Params};
use crate::error::{Error, Result};
use crate::kernel::{reduce, rows};
use crate::tensor::{Float, Tensor};

/// A transposed convolution with `weight` `[in, out, kh, kw]` and `bias` `[out]`.
#[derive(Clone, Debug)]
pub struct ConvTranspose2d {
    conv: Conv2d,
    bias: Param,
    inputs: usize,
    outputs: usize,
}

impl ConvTranspose2d {
    /// Registers `weight` and `bias`, uniform in `±1/√(out · kh · kw)` (PyTorch takes the second dimension of the weight for the
    /// number of inputs). `settings` name the channels of the transposed convolution itself.
    pub fn new(mut names: Names, settings: ConvSettings) -> Result<Self> {
        let ConvSettings { inputs, outputs, .. } = settings;
        let adjoint = ConvSettings { inputs: outputs, outputs: inputs, bias: false, ..settings };
        let init = Init::FanIn(adjoint.fan_in());
        let conv = Conv2d::new(names.here(), adjoint, init)?;
        let bias = names.param("bias", [outputs], init);
        Ok(ConvTranspose2d { conv, bias, inputs, outputs })
    }

    fn sizes<T: Float>(&self, x: &Tensor<T>) -> Result<[usize; 4]> {
        let [b, h, w, c] = x.dims("input of a transposed convolution [B, H, W, C]")?;
        let ConvSettings { kernel, stride, padding, .. } = self.conv.settings();
        let side = |axis: usize, n: usize| {
            let end = n.checked_sub(1)?.checked_mul(stride[axis])?.checked_add(kernel[axis])?;
            end.checked_sub(2 * padding[axis]).filter(|&n| n > 0)
        };
        match (side(0, h), side(1, w)) {
            (Some(oh), Some(ow)) if c == self.inputs => Ok([b, oh, ow, self.outputs]),
            _ => Err(Error::shape("input of a transposed convolution", format!("[batch, height, width, {}]", self.inputs), x.shape())),
        }
    }

    /// `[B, H, W, in]` → `[B, H', W', out]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<Tensor<T>> {
        let mut y = self.conv.backward_input(p, self.sizes(x)?, x)?;
        rows::add_table(y.data_mut(), p.get(self.bias));
        Ok(y)
    }

    /// All gradients; returns `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, x: &Tensor<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        dy.expect_shape("gradient of a transposed convolution", self.sizes(x)?)?;
        reduce::add_column_sums(g.get_mut(self.bias), dy.data());
        self.conv.backward_params(g, dy, x)?;
        self.conv.forward(p, dy)
    }
}
