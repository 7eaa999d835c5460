//! A linear map with a block-diagonal weight: a 1×1 convolution in groups.

use super::param::{Init, Names, Param, Params};
use crate::error::{Error, Result};
use crate::kernel::reduce::add_column_sums;
use crate::linalg::{Epilogue, Mat, MatMut, gemm};
use crate::tensor::{Float, Shape, Tensor};

/// `y = x Wᵀ + b` over the last axis, where `groups` consecutive blocks of outputs see their own block of inputs: `weight`
/// `[out, in/groups, 1, …]`, `bias` `[out]`.
#[derive(Clone, Debug)]
pub struct GroupedLinear {
    weight: Param,
    bias: Param,
    inputs: usize,
    outputs: usize,
    groups: usize,
}

impl GroupedLinear {
    /// Registers `weight`, with `axes` axes of length 1 at its end as published, and `bias`. An error unless `groups` divides both
    /// widths.
    pub fn new(mut names: Names, [inputs, outputs]: [usize; 2], groups: usize, axes: usize) -> Result<Self> {
        if groups == 0 || inputs == 0 || outputs == 0 || !inputs.is_multiple_of(groups) || !outputs.is_multiple_of(groups) {
            return Err(Error::config("groups", format!("expected a divisor of {inputs} and {outputs} channels, found {groups}")));
        }
        let fan_in = inputs / groups;
        let shape = [outputs, fan_in, 1, 1, 1, 1];
        let weight = names.param("weight", Shape::try_new(&shape[..2 + axes])?, Init::FanIn(fan_in));
        let bias = names.param("bias", [outputs], Init::FanIn(fan_in));
        Ok(GroupedLinear { weight, bias, inputs, outputs, groups })
    }

    /// The weight.
    pub fn weight(&self) -> Param {
        self.weight
    }

    /// Multiply-adds of a row, doubled.
    pub fn flops(&self) -> usize {
        2 * self.outputs * (self.inputs / self.groups)
    }

    fn rows<T: Float>(&self, x: &Tensor<T>, width: usize) -> Result<usize> {
        let (rows, cols) = x.shape().rows_cols();
        if cols == width { Ok(rows) } else { Err(Error::shape("operand of a linear layer", format!("[…, {width}]"), x.shape())) }
    }

    /// The blocks: first input, first output, place of the weight.
    fn blocks(&self) -> impl Iterator<Item = (usize, usize, std::ops::Range<usize>)> {
        let (i, o) = (self.inputs / self.groups, self.outputs / self.groups);
        (0..self.groups).map(move |g| (g * i, g * o, g * i * o..(g + 1) * i * o))
    }

    /// `x Wᵀ + b`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<Tensor<T>> {
        let rows = self.rows(x, self.inputs)?;
        let (inputs, outputs) = (self.inputs / self.groups, self.outputs / self.groups);
        let mut y = Tensor::scratch(x.shape().with_last(self.outputs));
        let a = Mat::new(x.data(), rows, self.inputs);
        for (i, o, w) in self.blocks() {
            let from = o.min(y.data().len());
            let c = MatMut::strided(&mut y.data_mut()[from..], rows, outputs, self.outputs);
            let bias = Some(&p.get(self.bias)[o..o + outputs]);
            gemm(
                a.cols_from(i, inputs),
                Mat::new(&p.get(self.weight)[w], outputs, inputs).t(),
                c,
                Epilogue { bias, ..Epilogue::default() },
            );
        }
        Ok(y)
    }

    /// All gradients; returns `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, x: &Tensor<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let rows = self.rows(x, self.inputs)?;
        if self.rows(dy, self.outputs)? != rows {
            return Err(Error::shape("gradient of a linear layer", x.shape().with_last(self.outputs), dy.shape()));
        }
        let (inputs, outputs) = (self.inputs / self.groups, self.outputs / self.groups);
        let mut dx = Tensor::scratch(x.shape());
        let (x, dy_all) = (Mat::new(x.data(), rows, self.inputs), Mat::new(dy.data(), rows, self.outputs));
        for (i, o, w) in self.blocks() {
            let dy = dy_all.cols_from(o, outputs);
            let from = i.min(dx.data().len());
            let c = MatMut::strided(&mut dx.data_mut()[from..], rows, inputs, self.inputs);
            gemm(dy, Mat::new(&p.get(self.weight)[w.clone()], outputs, inputs), c, Epilogue::default());
            let dw = MatMut::new(&mut g.get_mut(self.weight)[w], outputs, inputs);
            gemm(dy.t(), x.cols_from(i, inputs), dw, Epilogue { accumulate: true, ..Epilogue::default() });
        }
        add_column_sums(g.get_mut(self.bias), dy.data());
        Ok(dx)
    }
}
