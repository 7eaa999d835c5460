//! The fewest groups that hold all windows: bin packing, solved exactly and with a certificate.
//!
//! Lower bounds: `L1 = ⌈Σw / g⌉`, and `L2` of Martello and Toth (*Lower bounds and reduction procedures for the bin packing
//! problem*, 1990). Search: bin completion (Korf, *A new algorithm for optimal bin packing*, 2002), depth first: each group takes
//! the largest window left and every undominated completion of it.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use super::knapsack::greedy;
use super::{Grouping, check_sizes};
use crate::error::Result;

/// How much search is allowed, counted in nodes (windows put into a group) and never in time, so that the result is the same
/// on every machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Search nodes for the whole call.
    pub nodes: u64,
}

impl Default for Budget {
    /// A million nodes, about a tenth of a second. Sweeping a mask of Swin-B mostly takes a few hundred, rarely some ten thousand.
    fn default() -> Self {
        Budget { nodes: 1_000_000 }
    }
}

/// The best partition found, and what is known about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Optimal {
    /// The partition with the fewest groups that was found; the greedy one where that is as good.
    pub grouping: Grouping,
    /// Groups that [`super::group_windows`] needs.
    pub greedy_num_groups: usize,
    /// Lower bound `⌈Σw / g⌉`.
    pub l1: usize,
    /// Lower bound of Martello and Toth, at least `l1`.
    pub l2: usize,
    /// Whether no partition has fewer groups: their number equals `l2`, or the search for one less was exhausted. False means that
    /// the budget ran out.
    pub proved: bool,
    /// Search nodes used.
    pub nodes: u64,
}

/// The fewest groups of at most `group_size` tokens that hold all windows, searched within `budget`.
///
/// # Errors
/// As [`super::group_windows`].
pub fn optimal(sizes: &[usize], group_size: usize, budget: Budget) -> Result<Optimal> {
    check_sizes(sizes, group_size)?;
    let problem = Packing::new(sizes);
    let mut left = budget.nodes;
    let start = problem.greedy(group_size);
    let greedy_num_groups = start.num_groups();
    let (grouping, proved) = problem.solve(group_size, start, usize::MAX, &mut left);
    let (l1, l2) = (problem.l1(group_size), problem.l2(group_size));
    Ok(Optimal { grouping, greedy_num_groups, l1, l2, proved, nodes: budget.nodes - left })
}

/// Windows by class of equal size, largest first.
pub(super) struct Packing<'a> {
    sizes: &'a [usize],
    pub(super) total: usize,
    /// Window indices in order of descending size, ascending among equals.
    descending: Vec<u32>,
    width: Vec<usize>,
    count: Vec<u32>,
}

enum Search {
    /// Groups of window indices.
    Packed(Vec<Vec<usize>>),
    Impossible,
    OutOfBudget,
}

impl<'a> Packing<'a> {
    /// Expects sizes that [`check_sizes`] accepts.
    pub(super) fn new(sizes: &'a [usize]) -> Packing<'a> {
        let mut descending: Vec<u32> = (0..sizes.len() as u32).collect();
        descending.sort_by_key(|&i| std::cmp::Reverse(sizes[i as usize]));
        let classes: Vec<_> = descending.chunk_by(|&i, &j| sizes[i as usize] == sizes[j as usize]).collect();
        let width = classes.iter().map(|class| sizes[class[0] as usize]).collect();
        let count = classes.iter().map(|class| class.len() as u32).collect();
        Packing { sizes, total: sizes.iter().sum(), descending, width, count }
    }

    /// The largest window, 0 without windows.
    pub(super) fn largest(&self) -> usize {
        self.width.first().copied().unwrap_or(0)
    }

    pub(super) fn l1(&self, group_size: usize) -> usize {
        self.total.div_ceil(group_size.max(1))
    }

    pub(super) fn l2(&self, group_size: usize) -> usize {
        l2(&self.width, &self.count, group_size)
    }

    pub(super) fn greedy(&self, group_size: usize) -> Grouping {
        greedy(self.sizes, (0..self.sizes.len() as u32).collect(), group_size, self.total)
    }

    /// The best grouping that improves on `start` and whether that is proved. Only groupings of at most `limit` groups are of
    /// interest: where none is found, some larger one comes back, and the proof is that there is none of `limit` groups.
    pub(super) fn solve(&self, group_size: usize, start: Grouping, limit: usize, nodes: &mut u64) -> (Grouping, bool) {
        let bound = self.l2(group_size);
        let mut best = start;
        if best.num_groups() > bound {
            // The greedy with ties that prefer large windows, then best fit decreasing.
            for other in [greedy(self.sizes, self.descending.clone(), group_size, self.total), self.best_fit(group_size)] {
                if other.num_groups() < best.num_groups() {
                    best = other;
                }
            }
        }
        loop {
            let wanted = limit.min(best.num_groups().saturating_sub(1));
            if wanted < bound || wanted == 0 {
                return (best, true);
            }
            match self.search(group_size, wanted, nodes) {
                Search::Packed(groups) => best = Grouping::new(group_size, groups, self.sizes),
                Search::Impossible => return (best, true),
                Search::OutOfBudget => return (best, false),
            }
        }
    }

    /// Best fit decreasing: every window, largest first, goes into the fullest group that has room.
    fn best_fit(&self, group_size: usize) -> Grouping {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut rooms = BTreeSet::new();
        for &i in &self.descending {
            let size = self.sizes[i as usize];
            let (room, group) = rooms.range((size, 0)..).next().copied().unwrap_or((group_size, groups.len()));
            rooms.remove(&(room, group));
            rooms.insert((room - size, group));
            if group == groups.len() {
                groups.push(Vec::new());
            }
            groups[group].push(i as usize);
        }
        groups.iter_mut().for_each(|group| group.sort_unstable());
        Grouping::new(group_size, groups, self.sizes)
    }

    /// Whether the windows fit in `groups` groups: depth-first search over the classes put into one group after the other.
    ///
    /// A group starts with the largest window left (its anchor) and continues with classes of non-increasing size, so each
    /// multiset is met once. It is closed only if [`undominated`], if `L2` of what is left allows it, and if what is left is not
    /// already known to need more groups.
    fn search(&self, group_size: usize, groups: usize, nodes: &mut u64) -> Search {
        /// Bounds the memory of `dead`, in classes stored over all its keys.
        const DEAD_CLASSES: usize = 1 << 24;
        let mut left = self.count.clone();
        let mut placed: Vec<usize> = Vec::new();
        // Start in `placed` and free room of every group so far; the last one is open.
        let mut opened = vec![(0, group_size)];
        // Windows left at an anchor → most groups that are known not to hold them.
        let mut dead: HashMap<Box<[u32]>, usize> = HashMap::new();
        // The largest class that may come next.
        let mut next = 0;
        loop {
            let (start, room) = opened.last_mut().expect("one group is always open");
            if let Some(class) = (next..left.len()).find(|&class| left[class] > 0 && self.width[class] <= *room) {
                if *nodes == 0 {
                    return Search::OutOfBudget;
                }
                *nodes -= 1;
                left[class] -= 1;
                *room -= self.width[class];
                placed.push(class);
                next = class;
                continue;
            }
            let Some(anchor) = left.iter().position(|&count| count > 0) else {
                let starts: Vec<usize> = opened.iter().map(|&(start, _)| start).collect();
                return Search::Packed(self.name(&placed, &starts));
            };
            if undominated(&self.width, &left, &placed[*start..], *room)
                && l2(&self.width, &left, group_size) <= groups - opened.len()
                && dead.get(&left[..]).is_none_or(|&few| few < groups - opened.len())
            {
                opened.push((placed.len(), group_size));
                next = anchor;
                continue;
            }
            // Take back the last window; behind an anchor there is no other choice, so its group and the window before go too.
            loop {
                let Some(class) = placed.pop() else { return Search::Impossible };
                left[class] += 1;
                let (start, room) = opened.last_mut().expect("a placed window lies in an open group");
                *room += self.width[class];
                if placed.len() > *start {
                    next = class + 1;
                    break;
                }
                opened.pop();
                if opened.is_empty() {
                    return Search::Impossible;
                }
                if (dead.len() + 1) * left.len() <= DEAD_CLASSES {
                    let few = dead.entry(left.clone().into()).or_default();
                    *few = (*few).max(groups - opened.len());
                }
            }
        }
    }

    /// Turns classes into window indices, handed out in ascending order within each class.
    fn name(&self, placed: &[usize], starts: &[usize]) -> Vec<Vec<usize>> {
        let mut next: Vec<usize> = self.count.iter().scan(0, |sum, &n| Some(std::mem::replace(sum, *sum + n as usize))).collect();
        let ends = starts.iter().skip(1).copied().chain([placed.len()]);
        starts
            .iter()
            .zip(ends)
            .map(|(&start, end)| {
                let mut group: Vec<usize> = placed[start..end]
                    .iter()
                    .map(|&class| {
                        next[class] += 1;
                        self.descending[next[class] - 1] as usize
                    })
                    .collect();
                group.sort_unstable();
                group
            })
            .collect()
    }
}

/// Whether a full group is one that an exact search has to consider. It is not if a window that is left fits as well, or may
/// replace a smaller member (other than the anchor, which is largest anyway): in any packing with such a group, moving or
/// swapping that window gives a packing of as few groups whose group is fuller.
fn undominated(width: &[usize], left: &[u32], group: &[usize], room: usize) -> bool {
    let fits = (0..width.len()).rev().take_while(|&class| width[class] <= room).any(|class| left[class] > 0);
    let improves =
        |&class: &usize| (0..class).rev().take_while(|&larger| width[larger] - width[class] <= room).any(|larger| left[larger] > 0);
    !fits && !group[1..].iter().any(improves)
}

/// `L2 = max(L1, max_α L(α))` of Martello and Toth, for `α ∈ {0} ∪ {w : 2w ≤ g}`. With `J1 = {w > g - α}`,
/// `J2 = {g - α ≥ w > g/2}` and `J3 = {g/2 ≥ w ≥ α}`, no window of `J1` shares a group with one of `J3`, so
///
/// ```text
/// L(α) = |J1| + |J2| + max(0, ⌈(Σ_{J3} w - (|J2| g - Σ_{J2} w)) / g⌉)
/// ```
///
/// `width` descends strictly; `count[k]` windows hold `width[k] ≤ g` tokens.
fn l2(width: &[usize], count: &[u32], g: usize) -> usize {
    let split = width.partition_point(|&w| w > g / 2);
    let sum = |range: Range<usize>| range.fold((0, 0), |(n, sum), k| (n + count[k] as usize, sum + count[k] as usize * width[k]));
    let (large, sum_large) = sum(0..split);
    let (_, sum_small) = sum(split..width.len());
    let mut best = (sum_large + sum_small).div_ceil(g.max(1)).max(large);
    // While α descends, J3 grows and J2 takes in larger windows, from g/2 upwards.
    let (mut sum3, mut number2, mut sum2, mut at) = (0, 0, 0, split);
    for alpha in split..width.len() {
        sum3 += count[alpha] as usize * width[alpha];
        while at > 0 && width[at - 1] <= g - width[alpha] {
            at -= 1;
            number2 += count[at] as usize;
            sum2 += count[at] as usize * width[at];
        }
        best = best.max(large + sum3.saturating_sub(number2 * g - sum2).div_ceil(g));
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Group size, windows and fewest groups of instances for which the greedy needs one group more.
    const HARD: &[(usize, &[usize], usize)] = &[
        (3, &[1, 1, 1, 2, 2, 2], 3),
        (4, &[1, 1, 2, 2, 3, 3], 3),
        (5, &[1, 2, 2, 3, 3, 3], 3),
        (6, &[1, 2, 3, 3, 4, 4], 3),
        (9, &[3, 3, 3, 5, 5, 5], 3),
        (10, &[1, 2, 3, 7, 8, 8], 3),
    ];

    #[test]
    fn greedy_fails_where_the_optimum_is_known() {
        for &(group_size, sizes, groups) in HARD {
            let found = optimal(sizes, group_size, Budget::default()).unwrap();
            assert_eq!((found.grouping.num_groups(), found.greedy_num_groups, found.proved), (groups, groups + 1, true), "{sizes:?}");
        }
    }

    #[test]
    fn search_proves_what_bounds_cannot() {
        // Two windows of 4 fill a group of 10 as far as they can, but no bound sees that: L1 = L2 = 2.
        let sizes = [4; 5];
        let found = optimal(&sizes, 10, Budget::default()).unwrap();
        assert_eq!((found.grouping.num_groups(), found.l1, found.l2, found.proved), (3, 2, 2, true));
        let cut = optimal(&sizes, 10, Budget { nodes: found.nodes - 1 }).unwrap();
        assert_eq!((cut.grouping.num_groups(), cut.proved, cut.nodes), (3, false, found.nodes - 1));
    }

    #[test]
    fn no_window_needs_no_group() {
        let found = optimal(&[], 5, Budget { nodes: 0 }).unwrap();
        assert_eq!((found.grouping.num_groups(), found.l1, found.l2, found.proved), (0, 0, 0, true));
        assert!(optimal(&[6], 5, Budget::default()).is_err());
    }
}
