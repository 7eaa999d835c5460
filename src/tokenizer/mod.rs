//! Tokenizers: pictures and text to small integers and back.
//!
//! The image tokenizers are stacks of convolutions on channels-last maps around a codebook; images are `[B, C, H, W]` at the border.

pub mod bpe;
pub mod dalle;
pub mod dvae;
pub mod image;
pub mod simple;
pub mod simple_vae;
pub mod stack;
pub mod vqvae;

use crate::error::{Error, Result};
use crate::kernel::categorical;
use crate::tensor::{Float, IntTensor, Tensor};

/// Codes below `limit` from an integer tensor.
pub fn codes_below(what: &str, codes: &IntTensor, limit: usize) -> Result<Vec<u32>> {
    match codes.data.iter().find(|&&c| !(0..limit as i64).contains(&c)) {
        Some(bad) => Err(Error::value(what, format!("expected numbers below {limit}, found {bad}"))),
        None => Ok(codes.data.iter().map(|&c| c as u32).collect()),
    }
}

/// Codes as a tensor `[batch, positions]`.
pub fn codes_tensor(codes: &[u32], batch: usize) -> Result<IntTensor> {
    let each = codes.len().checked_div(batch).unwrap_or(0);
    IntTensor::new([batch, each], codes.iter().map(|&c| i64::from(c)).collect())
}

/// The most likely code at every position of `[B, h, w, V]`.
fn most_likely<T: Float>(logits: &Tensor<T>) -> Vec<u32> {
    let (rows, width) = logits.shape().rows_cols();
    let mut codes = vec![0; rows];
    categorical::first_largest(&mut codes, logits.data(), None, width);
    codes
}

/// `q = softmax(l)`.
fn probabilities<T: Float>(logits: &Tensor<T>) -> Tensor<T> {
    let mut q = Tensor::scratch(logits.shape());
    categorical::softmax(q.data_mut(), logits.data(), None, 1.0, logits.shape().rows_cols().1);
    q
}
