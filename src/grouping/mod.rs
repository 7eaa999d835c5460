//! Window grouping of GreenMIM (*Green Hierarchical Vision Transformer for Masked Image Modeling*, arXiv 2205.13515).
//!
//! When masked patches are dropped before a window transformer, windows hold unequal numbers of visible tokens. GreenMIM packs
//! them into groups of at most `g` tokens and runs one masked attention per group. In multiply-accumulates, `n` groups of size
//! `g` at width `C` cost
//!
//! ```text
//! cost(n, g) = n (4 g C² + 2 g² C)          qkv and output projection, then QKᵀ and PV
//! ```
//!
//! so for a fixed `g` fewer groups are better, which is bin packing. Four questions are answered here:
//!
//! | function | question |
//! | --- | --- |
//! | [`knapsack`] | which windows fill one group best? |
//! | [`group_windows`] | the released greedy: fill one group after the other |
//! | [`optimal`] | the fewest groups there can be, with lower bounds that prove it |
//! | [`sweep`] | which group size costs least, greedily and at the optimum? |
//!
//! [`Windows`] finds the windows themselves and [`plan`] writes out everything a grouped attention needs: shuffling indices,
//! mask and relative positions. Everything is integer arithmetic and deterministic: budgets are counted in search nodes, never
//! in time.

mod knapsack;
pub mod ops;
mod optimal;
mod plan;
mod sweep;
mod windows;

pub use knapsack::{Knapsack, group_windows, knapsack};
pub use optimal::{Budget, Optimal, optimal};
pub use plan::{MASKED, Mode, Plan, Rule, plan};
pub use sweep::{Choice, Sweep, sweep};
pub use windows::Windows;

use crate::error::{Error, Result};

/// Most tokens that one grouping problem may hold: tables grow with the number of tokens.
pub const MAX_TOKENS: usize = 1 << 26;

/// A partition of windows into groups of at most `group_size` tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grouping {
    /// Capacity `g` of a group, in tokens.
    pub group_size: usize,
    /// The windows of each group, ascending inside a group.
    pub groups: Vec<Vec<usize>>,
    /// Tokens of each group, at most `group_size`.
    pub tokens: Vec<usize>,
}

impl Grouping {
    fn new(group_size: usize, groups: Vec<Vec<usize>>, sizes: &[usize]) -> Grouping {
        let tokens = groups.iter().map(|group| group.iter().map(|&i| sizes[i]).sum()).collect();
        Grouping { group_size, groups, tokens }
    }

    /// Number of groups `n`.
    pub fn num_groups(&self) -> usize {
        self.groups.len()
    }

    /// Attention cost of this grouping at width `channels`, see [`cost`].
    ///
    /// # Errors
    /// If the cost does not fit in an `i64`.
    pub fn cost(&self, channels: usize) -> Result<u64> {
        cost(self.num_groups(), self.group_size, channels)
    }
}

/// `n (4 g C² + 2 g² C)`: multiply-accumulates of attention over `n` groups of `g` tokens at width `C`.
///
/// # Errors
/// If the cost does not fit in an `i64`.
pub fn cost(num_groups: usize, group_size: usize, channels: usize) -> Result<u64> {
    let (n, g, c) = (num_groups as u128, group_size as u128, channels as u128);
    let per_group = || (4 * g).checked_mul(c.checked_mul(c)?)?.checked_add((2 * c).checked_mul(g.checked_mul(g)?)?);
    narrow(per_group().and_then(|one| one.checked_mul(n)))
}

/// `Σ (4 w C² + 2 w² C)`: the cost of attending inside every window by itself, which no grouping can beat.
///
/// # Errors
/// If the cost does not fit in an `i64`.
pub fn ragged_cost(sizes: &[usize], channels: usize) -> Result<u64> {
    sizes.iter().try_fold(0, |sum, &w| narrow(Some(u128::from(sum) + u128::from(cost(1, w, channels)?))))
}

fn narrow(cost: Option<u128>) -> Result<u64> {
    cost.filter(|&cost| cost <= i64::MAX as u128)
        .map(|cost| cost as u64)
        .ok_or_else(|| Error::value("attention cost", "more than 2^63 - 1 multiply-accumulates; use fewer tokens or channels"))
}

/// Checks that every window holds `1..=group_size` tokens and that there are at most [`MAX_TOKENS`] in all; returns their sum.
fn check_sizes(sizes: &[usize], group_size: usize) -> Result<usize> {
    let mut total = 0usize;
    for (i, &size) in sizes.iter().enumerate() {
        if size == 0 || size > group_size {
            return Err(Error::value(format!("sizes[{i}]"), format!("{size} tokens; expected 1 to {group_size} (the group size)")));
        }
        total = total.saturating_add(size);
    }
    if total > MAX_TOKENS {
        return Err(Error::value("sizes", format!("{total} tokens in all; expected at most {MAX_TOKENS}")));
    }
    Ok(total)
}
