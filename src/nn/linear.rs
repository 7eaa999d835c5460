//! `y = x Wᵀ + b`.

use super::param::{Init, Names, Param, Params};
use crate::error::{Error, Result};
use crate::kernel::reduce::add_column_sums;
use crate::linalg::{Activation, Epilogue, Mat, MatMut, Packed, gemm, gemm_packed};
use crate::tensor::{Float, Tensor};

/// A linear layer over the last axis: `weight` `[out, in]`, `bias` `[out]`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Param,
    bias: Option<Param>,
    inputs: usize,
    outputs: usize,
}

impl Linear {
    /// Registers `weight` and, if asked for, `bias` (which starts at 0).
    pub fn new(mut names: Names, inputs: usize, outputs: usize, bias: bool, init: Init) -> Self {
        Self::shaped(&mut names, [outputs, inputs].into(), inputs, outputs, bias, init)
    }

    /// A linear layer whose weight is published with more dimensions: a convolution seen as a matrix.
    pub fn shaped(names: &mut Names, shape: crate::tensor::Shape, inputs: usize, outputs: usize, bias: bool, init: Init) -> Self {
        debug_assert_eq!(shape.numel(), inputs * outputs);
        let weight = names.param("weight", shape, init);
        let bias = bias.then(|| names.param("bias", [outputs], Init::ZEROS));
        Linear { weight, bias, inputs, outputs }
    }

    /// A 1×1 convolution over channels-last maps: `weight` `[out, in, 1, 1]`; weight and bias start as PyTorch starts convolutions.
    pub fn pointwise(mut names: Names, inputs: usize, outputs: usize, bias: bool) -> Self {
        let init = Init::FanIn(inputs);
        let weight = names.param("weight", [outputs, inputs, 1, 1], init);
        let bias = bias.then(|| names.param("bias", [outputs], init));
        Linear { weight, bias, inputs, outputs }
    }

    /// The width of the input.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// The width of the output.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// The weight.
    pub fn weight(&self) -> Param {
        self.weight
    }

    /// The bias.
    pub fn bias(&self) -> Option<Param> {
        self.bias
    }

    fn rows<T: Float>(&self, what: &str, x: &Tensor<T>, width: usize) -> Result<usize> {
        let (rows, cols) = x.shape().rows_cols();
        if cols == width { Ok(rows) } else { Err(Error::shape(what, format!("[…, {width}]"), x.shape())) }
    }

    fn weight_matrix<'a, T: Float>(&self, p: &'a Params<T>) -> Mat<'a, T> {
        Mat::new(p.get(self.weight), self.outputs, self.inputs)
    }

    /// `x Wᵀ + b`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<Tensor<T>> {
        self.forward_onto(p, x, None)
    }

    /// `x Wᵀ + b`, plus `residual` (of the output's shape).
    pub fn forward_onto<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, residual: Option<&Tensor<T>>) -> Result<Tensor<T>> {
        if let Some(residual) = residual {
            residual.expect_shape("residual", x.shape().with_last(self.outputs))?;
        }
        self.forward_onto_rows(p, x, residual.map(|r| Mat::new(r.data(), x.shape().rows_cols().0, self.outputs)))
    }

    /// `x Wᵀ + b`, plus `residual`: the rows of the output, which may be columns of something wider. Panics if their number differs.
    pub fn forward_onto_rows<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, residual: Option<Mat<T>>) -> Result<Tensor<T>> {
        let rows = self.rows("input of a linear layer", x, self.inputs)?;
        let mut y = Tensor::scratch(x.shape().with_last(self.outputs));
        self.product(p, x, &mut y, rows, residual, Activation::None);
        Ok(y)
    }

    /// `h = x Wᵀ + b` and `GELU(h)`.
    pub fn forward_gelu<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, Tensor<T>)> {
        let rows = self.rows("input of a linear layer", x, self.inputs)?;
        let (mut h, mut a) = (Tensor::scratch(x.shape().with_last(self.outputs)), Tensor::scratch(x.shape().with_last(self.outputs)));
        let activation = Activation::Gelu { out: MatMut::new(a.data_mut(), rows, self.outputs) };
        self.product(p, x, &mut h, rows, None, activation);
        Ok((h, a))
    }

    /// `GELU(x Wᵀ + b)` alone.
    pub fn gelu<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<Tensor<T>> {
        let rows = self.rows("input of a linear layer", x, self.inputs)?;
        let mut a = Tensor::scratch(x.shape().with_last(self.outputs));
        self.product(p, x, &mut a, rows, None, Activation::GeluOnly);
        Ok(a)
    }

    /// `y = activation(x Wᵀ + b + residual)`.
    fn product<T: Float>(
        &self,
        p: &Params<T>,
        x: &Tensor<T>,
        y: &mut Tensor<T>,
        rows: usize,
        residual: Option<Mat<T>>,
        activation: Activation<T>,
    ) {
        let epilogue = Epilogue { bias: self.bias.map(|b| p.get(b)), residual, activation, ..Epilogue::default() };
        let (x, y) = (Mat::new(x.data(), rows, self.inputs), MatMut::new(y.data_mut(), rows, self.outputs));
        match p.packed(self.weight, || Packed::new(self.weight_matrix(p).t())) {
            Some(weight) => gemm_packed(x, &weight, y, epilogue),
            None => gemm(x, self.weight_matrix(p).t(), y, epilogue),
        }
    }

    /// `dx = dy W`.
    pub fn backward_input<T: Float>(&self, p: &Params<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let rows = self.rows("gradient of a linear layer", dy, self.outputs)?;
        let mut dx = Tensor::scratch(dy.shape().with_last(self.inputs));
        gemm(
            Mat::new(dy.data(), rows, self.outputs),
            self.weight_matrix(p),
            MatMut::new(dx.data_mut(), rows, self.inputs),
            Epilogue::default(),
        );
        Ok(dx)
    }

    /// `dx += dy W`, where several layers read the same input.
    pub fn add_backward_input<T: Float>(&self, p: &Params<T>, dx: &mut Tensor<T>, dy: &Tensor<T>) -> Result<()> {
        let rows = self.rows("gradient of a linear layer", dy, self.outputs)?;
        dx.expect_shape("gradient of the input of a linear layer", dy.shape().with_last(self.inputs))?;
        let epilogue = Epilogue { accumulate: true, ..Epilogue::default() };
        gemm(Mat::new(dy.data(), rows, self.outputs), self.weight_matrix(p), MatMut::new(dx.data_mut(), rows, self.inputs), epilogue);
        Ok(())
    }

    /// For `y = GELU(h) Wᵀ + b`: `dh = dy W ⊙ GELU′(h)`; `h` becomes `GELU(h)`, which [`backward_params`](Self::backward_params) needs.
    pub fn backward_gelu<T: Float>(&self, p: &Params<T>, h: &mut Tensor<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let rows = self.rows("gradient of a linear layer", dy, self.outputs)?;
        h.expect_shape("pre-activation", dy.shape().with_last(self.inputs))?;
        let mut dh = Tensor::scratch(h.shape());
        let activation = Activation::GeluBackward { hidden: MatMut::new(h.data_mut(), rows, self.inputs) };
        let epilogue = Epilogue { activation, ..Epilogue::default() };
        gemm(Mat::new(dy.data(), rows, self.outputs), self.weight_matrix(p), MatMut::new(dh.data_mut(), rows, self.inputs), epilogue);
        Ok(dh)
    }

    /// `dW += dyᵀ x`, `db += Σ dy`.
    pub fn backward_params<T: Float>(&self, g: &mut Params<T>, x: &Tensor<T>, dy: &Tensor<T>) -> Result<()> {
        let rows = self.rows("gradient of a linear layer", dy, self.outputs)?;
        if self.rows("input of a linear layer", x, self.inputs)? != rows {
            return Err(Error::shape("gradient of a linear layer", x.shape().with_last(self.outputs), dy.shape()));
        }
        let epilogue = Epilogue { accumulate: true, ..Epilogue::default() };
        let dw = MatMut::new(g.get_mut(self.weight), self.outputs, self.inputs);
        gemm(Mat::new(dy.data(), rows, self.outputs).t(), Mat::new(x.data(), rows, self.inputs), dw, epilogue);
        if let Some(bias) = self.bias {
            add_column_sums(g.get_mut(bias), dy.data());
        }
        Ok(())
    }

    /// All three gradients; returns `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, x: &Tensor<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        self.backward_params(g, x, dy)?;
        self.backward_input(p, dy)
    }
}
