//! Twins' position generator on visible tokens (GreenMIM, arXiv 2205.13515).
//!
//! A 3×3 depthwise convolution with bias and zero padding over the map on which hidden tokens are zeros, read at the visible ones. The
//! released GreenMIM code does *not* add its input, as the original Twins does.

use super::param::{Init, Names, Param, Params};
use crate::case::Cost;
use crate::error::Result;
use crate::kernel::neighbours::{self, Neighbours, PLACES};
use crate::kernel::reduce::add_column_sums;
use crate::tensor::{Float, Tensor};

/// The position generator: `weight` `[C, 1, 3, 3]`, `bias` `[C]`.
#[derive(Clone, Debug)]
pub struct Peg {
    weight: Param,
    bias: Param,
    dim: usize,
}

impl Peg {
    /// Registers the parameters.
    pub fn new(mut names: Names, dim: usize) -> Self {
        let weight = names.param("weight", [dim, 1, 3, 3], Init::Normal((2.0 / PLACES as f64).sqrt()));
        Peg { weight, bias: names.param("bias", [dim], Init::ZEROS), dim }
    }

    /// The cost for `b` images of `n` tokens of width `dim`.
    pub fn cost(dim: usize, b: usize, n: usize) -> Cost {
        Cost { flops: 2 * PLACES * b * n * dim, activation_bytes: 4 * b * n * dim }
    }

    /// `[B, N, C]` → `[B, N, C]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, near: &Neighbours) -> Result<Tensor<T>> {
        let [batch, n, _] = x.dims("input of a position generator")?;
        x.expect_shape("input of a position generator", [batch, near.len() / PLACES, self.dim])?;
        let mut y = Tensor::scratch([batch, n, self.dim]);
        neighbours::forward(y.data_mut(), x.data(), near, p.get(self.weight), p.get(self.bias));
        Ok(y)
    }

    /// `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        near: &Neighbours,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        dy.expect_shape("gradient of a position generator", x.shape())?;
        add_column_sums(g.get_mut(self.bias), dy.data());
        neighbours::backward_weight(g.get_mut(self.weight), x.data(), dy.data(), near);
        let mut dx = Tensor::scratch(x.shape());
        neighbours::backward_input(dx.data_mut(), dy.data(), near, p.get(self.weight));
        Ok(dx)
    }
}
