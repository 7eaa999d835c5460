//! Blocks one after another: what is kept of each depends on how the network is run ([`Pass`]).

use crate::error::{Error, Result};
use crate::nn::{Params, Pass};
use crate::tensor::{Float, Tensor};

/// What is kept of one block for the backward pass.
pub enum Kept<T: Float, S> {
    /// Nothing: inference.
    Nothing,
    /// Its input; the block runs once more.
    Input(Tensor<T>),
    /// What its forward pass saved.
    Saved(S),
}

/// The last output, and what is kept of each block.
pub type Run<T, S> = (Tensor<T>, Vec<Kept<T, S>>);

/// Runs `run(block, index, x)` for each block in turn.
pub fn forward<T: Float, B, S>(
    p: &Params<T>,
    blocks: &[B],
    mut x: Tensor<T>,
    mut run: impl FnMut(&B, usize, Tensor<T>) -> Result<(Tensor<T>, S)>,
) -> Result<Run<T, S>> {
    let mut kept = Vec::with_capacity(blocks.len());
    for (index, block) in blocks.iter().enumerate() {
        let input = matches!(p.pass(), Pass::Train { recompute: true, .. }).then(|| x.clone());
        let (y, saved) = run(block, index, x)?;
        kept.push(match (p.pass(), input) {
            (Pass::Infer, _) => Kept::Nothing,
            (_, Some(input)) => Kept::Input(input),
            _ => Kept::Saved(saved),
        });
        x = y;
    }
    Ok((x, kept))
}

/// The gradient of the first block's input: `back(block, index, saved, d)` for each block, from the last; `run` as in [`forward`].
pub fn backward<T: Float, B, S>(
    blocks: &[B],
    kept: Vec<Kept<T, S>>,
    mut d: Tensor<T>,
    mut run: impl FnMut(&B, usize, Tensor<T>) -> Result<(Tensor<T>, S)>,
    mut back: impl FnMut(&B, usize, S, &Tensor<T>) -> Result<Tensor<T>>,
) -> Result<Tensor<T>> {
    for ((index, block), kept) in blocks.iter().enumerate().zip(kept).rev() {
        let saved = match kept {
            Kept::Saved(saved) => saved,
            Kept::Input(x) => run(block, index, x)?.1,
            Kept::Nothing => return Err(Error::usage("a network that ran as inference has nothing to go backward from")),
        };
        d = back(block, index, saved, &d)?;
    }
    Ok(d)
}
