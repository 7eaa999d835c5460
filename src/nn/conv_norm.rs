//! A convolution with a batch norm behind it.
//!
//! Inference makes one convolution of both: with `s = γ/√(v + ε)` per output channel, from the running statistics,
//! `BN(conv(x; W, b)) = conv(x; s W, s (b − m) + β)`, exact but for rounding. The weights are scaled in every call: they are small beside the
//! maps, whose second pass is saved, and nothing can be out of date.

use rayon::prelude::*;

use super::batch_norm::{self, BatchNorm2d};
use super::conv::Conv2d;
use super::param::Params;
use super::pass::Pass;
use crate::error::Result;
use crate::kernel::elementwise;
use crate::tensor::{Buffer, Float, Tensor};

/// Elements that one thread makes positive at a time.
const CHUNK: usize = 1 << 14;

/// What goes into a norm, and its statistics; both are empty after inference.
pub type NormInput<T> = (Tensor<T>, batch_norm::Saved<T>);

/// What follows the norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing.
    Identity,
    /// `max(y, 0)`.
    Relu,
    /// GELU.
    Gelu,
}

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
        let mut y = folded((conv, weights), (norm, p), x)?;
        match then {
            Then::Identity => {}
            Then::Relu => y.data_mut().par_chunks_mut(CHUNK).for_each(|y| {
                y.iter_mut().for_each(|y| *y = if *y > T::ZERO { *y } else { T::ZERO });
            }),
            Then::Gelu => y = gelu(&y),
        }
        return Ok((y, (Tensor::zeros([0]), batch_norm::Saved::empty())));
    }
    let z = conv.forward(weights, x)?;
    let (y, saved) = if then == Then::Relu { norm.forward_relu(p, &z, training)? } else { norm.forward(p, &z, training)? };
    Ok((if then == Then::Gelu { gelu(&y) } else { y }, (z, saved)))
}

/// `BN(conv(x))` with the running statistics, as one convolution.
fn folded<T: Float>((conv, weights): (&Conv2d, &Params<T>), (norm, p): (&BatchNorm2d, &Params<T>), x: &Tensor<T>) -> Result<Tensor<T>> {
    let (scale, mut bias) = norm.affine(p);
    if let Some(own) = conv.bias() {
        bias.iter_mut().zip(weights.get(own).iter().zip(&*scale)).for_each(|(b, (&own, &s))| *b += own * s);
    }
    let weight = weights.get(conv.weight());
    let mut scaled = Buffer::scratch(weight.len());
    let each = (weight.len() / scale.len().max(1)).max(1);
    for ((out, w), &s) in scaled.chunks_exact_mut(each).zip(weight.chunks_exact(each)).zip(&*scale) {
        out.iter_mut().zip(w).for_each(|(out, &w)| *out = w * s);
    }
    conv.forward_with(&scaled, Some(&bias), x)
}

/// GELU of a map.
pub(super) fn gelu<T: Float>(x: &Tensor<T>) -> Tensor<T> {
    let mut y = Tensor::scratch(x.shape());
    elementwise::gelu(y.data_mut(), x.data(), T::ONE);
    y
}
