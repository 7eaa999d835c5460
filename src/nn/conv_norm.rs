//! A convolution with a batch norm behind it.
//!
//! Inference makes one convolution of both: with `s = γ/√(v + ε)` per output channel, from the running statistics,
//! `BN(conv(x; W, b)) = conv(x; s W, s (b − m) + β)`, exact but for rounding.

use super::batch_norm::{self, BatchNorm2d};
pub use super::conv::Then;
use super::conv::{Conv2d, Tail};
use super::param::Params;
use super::pass::Pass;
use crate::error::Result;
use crate::kernel::elementwise;
use crate::tensor::{Buffer, Float, Tensor};

/// What goes into a norm, and its statistics; both are empty after inference.
pub type NormInput<T> = (Tensor<T>, batch_norm::Saved<T>);

/// `then(BN(conv(x)))`, and what the norm's backward pass needs. The convolution's parameters are in `weights`, the norm's in `p`.
///
/// # Errors
/// As the two layers.
pub fn forward<T: Float>(
    (conv, weights): (&Conv2d, &Params<T>),
    (norm, p): (&BatchNorm2d, &Params<T>),
    x: &Tensor<T>,
    training: bool,
    then: Then,
) -> Result<(Tensor<T>, NormInput<T>)> {
    if p.pass() == Pass::Infer && !training {
        let y = infer((conv, weights), (norm, p), x, None, then)?;
        return Ok((y, (Tensor::zeros([0]), batch_norm::Saved::empty())));
    }
    let z = conv.forward(weights, x)?;
    let (y, saved) = if then == Then::Relu { norm.forward_relu(p, &z, training)? } else { norm.forward(p, &z, training)? };
    Ok((if then == Then::Gelu { gelu(&y) } else { y }, (z, saved)))
}

/// `then(BN(conv(x)) + residual)` with the running statistics, as one convolution.
///
/// # Errors
/// As the convolution; a residual of another shape.
pub fn infer<T: Float>(
    (conv, weights): (&Conv2d, &Params<T>),
    (norm, p): (&BatchNorm2d, &Params<T>),
    x: &Tensor<T>,
    residual: Option<&Tensor<T>>,
    then: Then,
) -> Result<Tensor<T>> {
    let (scale, mut bias) = norm.affine(p);
    if let Some(own) = conv.bias() {
        bias.iter_mut().zip(weights.get(own).iter().zip(&*scale)).for_each(|(b, (&own, &s))| *b += own * s);
    }
    let scaled = || {
        let weight = weights.get(conv.weight());
        let mut scaled = Buffer::scratch(weight.len());
        let each = (weight.len() / scale.len().max(1)).max(1);
        for ((out, w), &s) in scaled.chunks_exact_mut(each).zip(weight.chunks_exact(each)).zip(&*scale) {
            out.iter_mut().zip(w).for_each(|(out, &w)| *out = w * s);
        }
        scaled
    };
    if conv.is_depthwise() {
        let mut y = conv.forward_depthwise(&scaled(), Some(&bias), x)?;
        if let Some(residual) = residual {
            residual.expect_shape("what is added to a convolution", y.shape())?;
            elementwise::add(y.data_mut(), residual.data());
        }
        return Ok(match then {
            Then::Identity => y,
            Then::Relu => map(&y, elementwise::relu),
            Then::Gelu => gelu(&y),
        });
    }
    let tail = Tail { bias: Some(&bias), residual, then };
    // One group: its operand may be kept.
    let kept = if conv.settings().groups == 1 { weights.packed(conv.weight(), || conv.operand(&scaled())) } else { None };
    match kept {
        Some(kept) => conv.forward_dense(&[kept], tail, x),
        None => conv.forward_dense(&conv.operands(&scaled()), tail, x),
    }
}

/// GELU of a map.
pub(super) fn gelu<T: Float>(x: &Tensor<T>) -> Tensor<T> {
    map(x, elementwise::gelu)
}

fn map<T: Float>(x: &Tensor<T>, f: fn(&mut [T], &[T], T)) -> Tensor<T> {
    let mut y = Tensor::scratch(x.shape());
    f(y.data_mut(), x.data(), T::ONE);
    y
}
