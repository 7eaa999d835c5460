//! Subset-sum knapsack and the greedy grouping that GreenMIM released.

use super::{Grouping, MAX_TOKENS, check_sizes};
use crate::error::{Error, Result};

/// The subset that fills a knapsack best.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Knapsack {
    /// Largest subset sum that is at most the capacity.
    pub best: usize,
    /// The chosen items, ascending.
    pub index: Vec<usize>,
}

/// The subset of `weights` with the largest sum that is at most `capacity`; among equal sums the one that the table
///
/// ```text
/// K[i][r] = max(K[i-1][r], w_i + K[i-1][r - w_i])
/// ```
///
/// yields when it is traced back from the last item and an item is skipped whenever it can be: lower indices win. Weights of
/// zero are never chosen. `O(n W / 64)` time and `O(W)` memory, `W` being the smaller of the capacity and the sum.
///
/// # Errors
/// If both the capacity and the sum of the weights exceed [`MAX_TOKENS`], or there are more than `u32::MAX` weights.
pub fn knapsack(weights: &[usize], capacity: usize) -> Result<Knapsack> {
    let capacity = weights.iter().fold(0, |sum: usize, &w| sum.saturating_add(w)).min(capacity);
    if capacity > MAX_TOKENS {
        return Err(Error::value("capacity", format!("{capacity}; expected at most {MAX_TOKENS} (or a smaller sum of weights)")));
    }
    if u32::try_from(weights.len()).is_err() {
        return Err(Error::value("weights", format!("{} items; expected at most {}", weights.len(), u32::MAX)));
    }
    let mut index = Vec::new();
    let best = Sums::default().fill(weights, 0..weights.len() as u32, capacity, &mut index);
    Ok(Knapsack { best, index })
}

/// GreenMIM's grouping: fill a group with the best [`knapsack`] of the remaining windows (in their given order), remove them,
/// repeat. Not optimal in the number of groups: see [`super::optimal`]. No window gives no group.
///
/// # Errors
/// If a window is empty or larger than the group (the released loop would never end), or there are more than [`MAX_TOKENS`]
/// tokens.
pub fn group_windows(sizes: &[usize], group_size: usize) -> Result<Grouping> {
    let total = check_sizes(sizes, group_size)?;
    Ok(greedy(sizes, (0..sizes.len() as u32).collect(), group_size, total))
}

/// The greedy with ties decided by the order in which `remaining` presents the windows.
pub(super) fn greedy(sizes: &[usize], mut remaining: Vec<u32>, group_size: usize, mut total: usize) -> Grouping {
    let (mut groups, mut sums, mut taken) = (Vec::new(), Sums::default(), vec![false; sizes.len()]);
    while !remaining.is_empty() {
        let mut group = Vec::new();
        total -= sums.fill(sizes, remaining.iter().copied(), group_size.min(total), &mut group);
        group.iter().for_each(|&i| taken[i] = true);
        remaining.retain(|&i| !taken[i as usize]);
        group.sort_unstable();
        groups.push(group);
    }
    Grouping::new(group_size, groups, sizes)
}

/// The reachable subset sums as a bit set, and for each sum the item that first reached it.
///
/// One row replaces the whole table: `K[i][r] = K[i-1][r]` says that the value is reachable without item `i`, so tracing back
/// takes exactly the item that first reached the sum; and what is left was reached by an earlier item.
#[derive(Default)]
struct Sums {
    bits: Vec<u64>,
    first: Vec<u32>,
}

impl Sums {
    /// Appends the chosen items to `chosen` in the order of `items` and returns their sum.
    fn fill(&mut self, weights: &[usize], items: impl Iterator<Item = u32>, capacity: usize, chosen: &mut Vec<usize>) -> usize {
        let last = capacity / 64;
        // A sum's `first` entry is only read once its bit is set, so it needs no clearing.
        self.first.resize(self.first.len().max(capacity + 1), 0);
        self.bits.clear();
        self.bits.resize(last + 1, 0);
        self.bits[0] = 1;
        let within = u64::MAX >> (63 - capacity % 64);
        let mut top = 0;
        for item in items {
            let weight = weights[item as usize];
            if weight > capacity {
                continue;
            }
            let (words, bits) = (weight / 64, weight % 64);
            // From high to low, so that a word is read before this item changes it.
            for k in (words..=((top + weight) / 64).min(last)).rev() {
                let mut moved = self.bits[k - words] << bits;
                if bits > 0 && k > words {
                    moved |= self.bits[k - words - 1] >> (64 - bits);
                }
                let mut new = moved & !self.bits[k] & if k == last { within } else { u64::MAX };
                self.bits[k] |= new;
                while new != 0 {
                    let sum = 64 * k + new.trailing_zeros() as usize;
                    self.first[sum] = item;
                    top = top.max(sum);
                    new &= new - 1;
                }
            }
            if top == capacity {
                break;
            }
        }
        let (start, mut rest) = (chosen.len(), top);
        while rest > 0 {
            let item = self.first[rest] as usize;
            chosen.push(item);
            rest -= weights[item];
        }
        chosen[start..].reverse();
        top
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_lower_indices() {
        let found = knapsack(&[5, 5, 3, 7, 2, 5], 10).unwrap();
        assert_eq!(found, Knapsack { best: 10, index: vec![0, 1] });
    }

    #[test]
    fn nothing_fits() {
        for (weights, capacity) in [(&[7usize, 9][..], 6), (&[], 5), (&[1], 0), (&[0, 0], 3)] {
            assert_eq!(knapsack(weights, capacity).unwrap(), Knapsack { best: 0, index: vec![] });
        }
    }

    #[test]
    fn sums_cross_words() {
        let weights = [63, 1, 64, 65, 128, 200];
        for (capacity, best, index) in [(63, 63, vec![0]), (64, 64, vec![0, 1]), (127, 127, vec![0, 2]), (521, 521, vec![0, 1, 2, 3, 4, 5])]
        {
            assert_eq!(knapsack(&weights, capacity).unwrap(), Knapsack { best, index });
        }
    }

    #[test]
    fn hostile_sizes_are_refused() {
        assert!(knapsack(&[usize::MAX, usize::MAX], usize::MAX).is_err());
        assert!(knapsack(&[usize::MAX, 3], 5).is_ok_and(|found| found.best == 3));
        assert!(group_windows(&[1, 0], 3).unwrap_err().to_string().contains("sizes[1]"));
        assert!(group_windows(&[4], 3).unwrap_err().to_string().contains("expected 1 to 3"));
        assert!(group_windows(&[usize::MAX, usize::MAX], usize::MAX).is_err());
        assert_eq!(group_windows(&[], 0).unwrap().num_groups(), 0);
    }
}
