//! Blocks one after another: what is kept of each depends on how the network is run ([`Pass`]).

use crate::error::{Error, Result};
use crate::nn::{Params, Pass};
use crate::tensor::{Float, Tensor};

/// What is kept of one block of tokens for the backward pass.
pub type Kept<T, S> = KeptOf<Tensor<T>, S>;

/// What is kept of one block for the backward pass; X is what goes from block to block.
pub enum KeptOf<X, S> {
    /// Nothing: inference.
    Nothing,
    /// Its input; the block runs once more.
    Input(X),
    /// What its forward pass saved.
    Saved(S),
}

/// The last output, and what is kept of each block.
pub type Run<X, S> = (X, Vec<KeptOf<X, S>>);

/// Runs `run(block, index, x)` for each block in turn.
pub fn forward<T: Float, X: Clone, B, S>(
    p: &Params<T>,
    blocks: &[B],
    mut x: X,
    mut run: impl FnMut(&B, usize, X) -> Result<(X, S)>,
) -> Result<Run<X, S>> {
    let mut kept = Vec::with_capacity(blocks.len());
    for (index, block) in blocks.iter().enumerate() {
        let input = matches!(p.pass(), Pass::Train { recompute: true, .. }).then(|| x.clone());
        let (y, saved) = run(block, index, x)?;
        kept.push(match (p.pass(), input) {
            (Pass::Infer, _) => KeptOf::Nothing,
            (_, Some(input)) => KeptOf::Input(input),
            _ => KeptOf::Saved(saved),
        });
        x = y;
    }
    Ok((x, kept))
}

/// The gradient of the first block's input: `back(block, index, saved, d)` for each block, from the last; `run` as in [`forward`].
pub fn backward<X, B, S>(
    blocks: &[B],
    kept: Vec<KeptOf<X, S>>,
    mut d: X,
    mut run: impl FnMut(&B, usize, X) -> Result<(X, S)>,
    mut back: impl FnMut(&B, usize, S, &X) -> Result<X>,
) -> Result<X> {
    for ((index, block), kept) in blocks.iter().enumerate().zip(kept).rev() {
        let saved = match kept {
            KeptOf::Saved(saved) => saved,
            KeptOf::Input(x) => run(block, index, x)?.1,
            KeptOf::Nothing => return Err(Error::usage("a network that ran as inference has nothing to go backward from")),
        };
        d = back(block, index, saved, &d)?;
    }
    Ok(d)
}
