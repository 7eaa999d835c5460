//! The group size that costs least: GreenMIM's sweep with greedy groups, and the same sweep with optimal ones.

use super::optimal::{Budget, Packing};
use super::{Grouping, check_sizes, cost, ragged_cost};
use crate::error::{Error, Result};

/// A grouping and its attention cost in multiply-accumulates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The grouping; its `group_size` is the one chosen.
    pub grouping: Grouping,
    /// `n (4 g C² + 2 g² C)`.
    pub cost: u64,
}

/// What [`sweep`] found. `ragged_cost ≤ lower_bound`, and `lower_bound ≤ optimal.cost ≤ greedy.cost ≤ max_rule_cost`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sweep {
    /// The first group size at which the greedy costs least: the paper's choice.
    pub greedy: Choice,
    /// The first group size at which an optimal partition costs least.
    pub optimal: Choice,
    /// Cost without groups, padding and masks: a window at a time.
    pub ragged_cost: u64,
    /// Cost of the greedy at `g = max w`, the rule of the released code.
    pub max_rule_cost: u64,
    /// `min_g L2(g) (4 g C² + 2 g² C)`: no group size and partition cost less.
    pub lower_bound: u64,
    /// Whether `optimal` is proved to cost least over all group sizes and partitions. False means that the budget ran out.
    pub proved: bool,
    /// Search nodes used, over all group sizes.
    pub nodes: u64,
}

/// Tries every group size from the largest window to the sum of all windows, for attention of width `channels`.
///
/// Group sizes that cannot win are skipped, which changes nothing: `n g ≥ S = Σw` gives `cost ≥ S (4 C² + 2 g C)`, which grows
/// with `g` and ends the sweep, and `L2(g)` bounds the number of groups from below. No window costs nothing.
///
/// # Errors
/// If a window is empty, there are more than [`super::MAX_TOKENS`] tokens, `channels` is 0 or above `u32::MAX`, or a cost does
/// not fit in an `i64`.
pub fn sweep(sizes: &[usize], channels: usize, budget: Budget) -> Result<Sweep> {
    let problem = Sizes::new(sizes, channels)?;
    let (greedy, max_rule_cost) = problem.greedy()?;
    let mut left = budget.nodes;
    let (optimal, exhausted) = problem.optimal(&greedy, &mut left);
    let lower_bound = problem.lower_bound(greedy.cost);
    let proved = exhausted || optimal.cost == lower_bound;
    let nodes = budget.nodes - left;
    Ok(Sweep { greedy, optimal, ragged_cost: ragged_cost(sizes, channels)?, max_rule_cost, lower_bound, proved, nodes })
}

/// The paper's choice alone.
pub(super) fn greedy_sweep(sizes: &[usize], channels: usize) -> Result<Choice> {
    Ok(Sizes::new(sizes, channels)?.greedy()?.0)
}

/// Windows and the width at which they are attended. At most 2^26 tokens and 32 bits of channels keep every cost in 128 bits.
struct Sizes<'a> {
    packing: Packing<'a>,
    channels: u128,
}

impl<'a> Sizes<'a> {
    fn new(sizes: &'a [usize], channels: usize) -> Result<Sizes<'a>> {
        if channels == 0 || u32::try_from(channels).is_err() {
            return Err(Error::config("channels", format!("{channels}; expected 1 to {}", u32::MAX)));
        }
        check_sizes(sizes, usize::MAX)?;
        Ok(Sizes { packing: Packing::new(sizes), channels: channels as u128 })
    }

    /// Group sizes from the largest window on, with the cost of one group and a lower bound on the cost of all that grows.
    fn group_sizes(&self) -> impl Iterator<Item = (usize, u128, u128)> {
        let (c, total) = (self.channels, self.packing.total as u128);
        (self.packing.largest()..=self.packing.total).map(move |group_size| {
            let g = group_size as u128;
            (group_size, 4 * g * c * c + 2 * g * g * c, total * (4 * c * c + 2 * g * c))
        })
    }

    /// The first strict minimum over greedy groupings, and the cost of the first group size.
    fn greedy(&self) -> Result<(Choice, u64)> {
        let grouping = self.packing.greedy(self.packing.largest());
        let max_rule_cost = cost(grouping.num_groups(), grouping.group_size, self.channels as usize)?;
        let mut best = Choice { grouping, cost: max_rule_cost };
        for (group_size, each, bound) in self.group_sizes().skip(1) {
            if bound >= u128::from(best.cost) {
                break;
            }
            if self.packing.l2(group_size) as u128 * each >= u128::from(best.cost) {
                continue;
            }
            let grouping = self.packing.greedy(group_size);
            let cost = grouping.num_groups() as u128 * each;
            if cost < u128::from(best.cost) {
                best = Choice { grouping, cost: cost as u64 };
            }
        }
        Ok((best, max_rule_cost))
    }

    /// The first strict minimum over optimal groupings, and whether every search that mattered came to its end.
    fn optimal(&self, greedy: &Choice, nodes: &mut u64) -> (Choice, bool) {
        let (mut best, mut proved) = (None, true);
        // An earlier group size may equal the greedy's cost; after that only less will do.
        let mut allowed = u128::from(greedy.cost);
        for (group_size, each, bound) in self.group_sizes() {
            if bound > allowed {
                break;
            }
            let limit = (allowed.checked_div(each).unwrap_or(0)) as usize;
            if self.packing.l2(group_size) > limit {
                continue;
            }
            let (grouping, searched) = self.packing.solve(group_size, self.packing.greedy(group_size), limit, nodes);
            proved &= searched;
            if grouping.num_groups() <= limit {
                let cost = grouping.num_groups() as u128 * each;
                allowed = cost.saturating_sub(1);
                best = Some(Choice { grouping, cost: cost as u64 });
            }
        }
        (best.unwrap_or_else(|| greedy.clone()), proved)
    }

    /// `min_g L2(g) (4 g C² + 2 g² C)`, at most `known`, the cost of some grouping.
    fn lower_bound(&self, known: u64) -> u64 {
        let mut least = u128::from(known);
        for (group_size, each, bound) in self.group_sizes() {
            if bound >= least {
                break;
            }
            least = least.min(self.packing.l2(group_size) as u128 * each);
        }
        least as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greedy_sweep_is_not_optimal() {
        let found = sweep(&[4, 1, 3, 8, 5, 9, 9], 64, Budget::default()).unwrap();
        assert_eq!((found.greedy.grouping.group_size, found.greedy.cost), (20, 757_760));
        assert_eq!((found.optimal.grouping.group_size, found.optimal.cost, found.proved), (13, 703_872, true));
        assert!(found.ragged_cost <= found.lower_bound && found.lower_bound <= found.optimal.cost);
    }

    #[test]
    fn edges() {
        let none = sweep(&[], 8, Budget::default()).unwrap();
        assert_eq!((none.greedy.cost, none.optimal.cost, none.lower_bound, none.proved), (0, 0, 0, true));
        let one = sweep(&[5], 3, Budget { nodes: 0 }).unwrap();
        assert_eq!((one.optimal.cost, one.ragged_cost, one.lower_bound, one.proved), (330, 330, 330, true));
        assert!(sweep(&[3], 0, Budget::default()).unwrap_err().to_string().contains("channels"));
        assert!(sweep(&[3, 0], 8, Budget::default()).unwrap_err().to_string().contains("sizes[1]"));
        assert!(sweep(&[1 << 20], u32::MAX as usize, Budget::default()).unwrap_err().to_string().contains("cost"));
    }
}
