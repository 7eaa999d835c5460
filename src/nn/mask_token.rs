//! A learned token in the place of hidden tokens.

use super::param::{Param, Params};
use crate::error::{Error, Result};
use crate::tensor::{Float, Tensor};

/// `x ← x(1 − w) + token · w`: hidden tokens of `x` `[B, N, C]` become the learned token `[1, 1, C]`.
pub fn mix_token<T: Float>(p: &Params<T>, token: Param, x: &mut Tensor<T>, hidden: &[bool]) -> Result<()> {
    mix_row(p.get(token), x, hidden)
}

/// [`mix_token`] with a token that was computed.
pub fn mix_row<T: Float>(token: &[T], x: &mut Tensor<T>, hidden: &[bool]) -> Result<()> {
    let (rows, c) = x.shape().rows_cols();
    expect_mask(hidden, rows)?;
    for (row, _) in x.data_mut().chunks_exact_mut(c.max(1)).zip(hidden).filter(|(_, hidden)| **hidden) {
        row.copy_from_slice(token);
    }
    Ok(())
}

/// Backward of [`mix_token`]: `dtoken += Σ dx · w`, `dx ← dx(1 − w)`.
pub fn mix_token_backward<T: Float>(g: &mut Params<T>, token: Param, dx: &mut Tensor<T>, hidden: &[bool]) -> Result<()> {
    mix_row_backward(g.get_mut(token), dx, hidden)
}

/// Backward of [`mix_row`].
pub fn mix_row_backward<T: Float>(d_token: &mut [T], dx: &mut Tensor<T>, hidden: &[bool]) -> Result<()> {
    let (rows, c) = dx.shape().rows_cols();
    expect_mask(hidden, rows)?;
    for (row, _) in dx.data_mut().chunks_exact_mut(c.max(1)).zip(hidden).filter(|(_, hidden)| **hidden) {
        for (d, x) in d_token.iter_mut().zip(row) {
            *d += *x;
            *x = T::ZERO;
        }
    }
    Ok(())
}

fn expect_mask(hidden: &[bool], rows: usize) -> Result<()> {
    if hidden.len() == rows { Ok(()) } else { Err(Error::shape("mask", format!("{rows} tokens"), format!("{} tokens", hidden.len()))) }
}
