//! Everything a grouped window attention needs to know about a set of visible tokens.

use super::sweep::greedy_sweep;
use super::{Grouping, Windows, group_windows};
use crate::error::{Error, Result};

/// What the mask adds to the score of a pair that must not attend.
pub const MASKED: f64 = -100.0;

/// Whether tokens are shuffled into groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// [`Mode::Masking`] if there are at most `2 M²` tokens, else [`Mode::Grouping`].
    #[default]
    Auto,
    /// One group of all tokens in their own order.
    Masking,
    /// Groups of whole windows, filled greedily.
    Grouping,
}

impl Mode {
    /// The mode called `auto`, `masking` or `grouping`.
    ///
    /// # Errors
    /// If the name is another.
    pub fn parse(name: &str) -> Result<Mode> {
        match name {
            "auto" => Ok(Mode::Auto),
            "masking" => Ok(Mode::Masking),
            "grouping" => Ok(Mode::Grouping),
            _ => Err(Error::unknown("grouping mode", name, ["auto", "masking", "grouping"])),
        }
    }
}

/// How the group size is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rule {
    /// The largest window: the released code.
    #[default]
    Max,
    /// The least cost at a given width: the sweep of the paper, see [`super::sweep()`].
    Paper,
}

impl Rule {
    /// The rule called `max` or `paper`.
    ///
    /// # Errors
    /// If the name is another.
    pub fn parse(name: &str) -> Result<Rule> {
        match name {
            "max" => Ok(Rule::Max),
            "paper" => Ok(Rule::Paper),
            _ => Err(Error::unknown("group size rule", name, ["max", "paper"])),
        }
    }
}

/// Indices and masks of a grouped window attention over `N` tokens: `G` groups of `g` slots, of which padding fills some.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Whether tokens are shuffled into groups; false in masking mode.
    pub grouped: bool,
    /// The windows in each group, and `g`.
    pub grouping: Grouping,
    /// The windows themselves; `windows.yx` holds the window of every token.
    pub windows: Windows,
    /// `[G·g]`: the token in each slot, 0 in a padding slot. Windows ascend inside a group, tokens inside a window.
    pub idx_shuffle: Vec<u32>,
    /// `[N]`: the slot of each token.
    pub idx_unshuffle: Vec<u32>,
    /// `[G, g, g]`: 0 for two tokens of one window, else [`MASKED`]; rows and columns of padding are masked throughout.
    pub attn_mask: Vec<f64>,
    /// `[G, g, g]`: row `(Δy + M - 1)(2M - 1) + Δx + M - 1` of the relative position table, Δ = query - key; 0 where masked.
    pub rel_pos_idx: Vec<u32>,
}

/// Plans group attention of the tokens at `coords` (`(y, x)`) in windows of `window × window`, shifted by `shift`. `channels` is
/// used by [`Rule::Paper`] only.
///
/// # Errors
/// As [`Windows::new`] and [`super::sweep()`]; or if masks would hold more than 2^27 entries.
pub fn plan(coords: &[[usize; 2]], window: usize, shift: usize, mode: Mode, rule: Rule, channels: usize) -> Result<Plan> {
    let windows = Windows::new(coords, (window, window), (shift, shift))?;
    let grouped = match mode {
        Mode::Auto => coords.len() > 2 * window * window,
        Mode::Masking => false,
        Mode::Grouping => true,
    };
    let sizes = windows.sizes();
    let grouping = match rule {
        _ if !grouped => Grouping::new(coords.len(), vec![(0..sizes.len()).collect()], &sizes),
        Rule::Max => group_windows(&sizes, sizes.iter().copied().max().unwrap_or(0))?,
        Rule::Paper => greedy_sweep(&sizes, channels)?.grouping,
    };
    let (g, groups) = (grouping.group_size, grouping.num_groups());
    let entries = groups.checked_mul(g).and_then(|slots| slots.checked_mul(g)).filter(|&entries| entries <= 1 << 27);
    let Some(entries) = entries else {
        return Err(Error::value("coords", format!("{groups} groups of {g} tokens; expected masks of at most 2^27 entries")));
    };

    let mut plan = Plan {
        grouped,
        idx_shuffle: vec![0; groups * g],
        idx_unshuffle: vec![0; coords.len()],
        attn_mask: vec![MASKED; entries],
        rel_pos_idx: vec![0; entries],
        grouping,
        windows,
    };
    for (group, members) in plan.grouping.groups.iter().enumerate() {
        let tokens = members.iter().flat_map(|&window| &plan.windows.tokens[plan.windows.range(window)]);
        for (slot, &token) in (group * g..).zip(tokens) {
            // Masking mode keeps the tokens' own order.
            let slot = if grouped { slot } else { token as usize };
            plan.idx_shuffle[slot] = token;
            plan.idx_unshuffle[token as usize] = slot as u32;
        }
    }
    let (side, span) = (window as u32, 2 * window as u32 - 1);
    for range in (0..plan.windows.len()).map(|i| plan.windows.range(i)) {
        let slots: Vec<usize> = plan.windows.tokens[range.clone()].iter().map(|&t| plan.idx_unshuffle[t as usize] as usize).collect();
        let positions = &plan.windows.positions[range];
        for (&query, &p) in slots.iter().zip(positions) {
            for (&key, &q) in slots.iter().zip(positions) {
                let at = query * g + key % g;
                plan.attn_mask[at] = 0.0;
                plan.rel_pos_idx[at] = (p / side + side - 1 - q / side) * span + (p % side + side - 1 - q % side);
            }
        }
    }
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!([Mode::parse("auto").unwrap(), Mode::parse("masking").unwrap()], [Mode::Auto, Mode::Masking]);
        assert_eq!((Mode::parse("grouping").unwrap(), Rule::parse("max").unwrap()), (Mode::Grouping, Rule::Max));
        assert!(Rule::parse("sweep").unwrap_err().to_string().contains("paper"));
        assert!(Mode::parse("").is_err());
    }

    #[test]
    fn two_windows_side_by_side() {
        let coords = [[0, 0], [0, 1], [0, 2]];
        let found = plan(&coords, 2, 0, Mode::Grouping, Rule::Max, 0).unwrap();
        assert_eq!((found.grouping.group_size, found.grouping.num_groups()), (2, 2));
        assert_eq!((found.idx_shuffle, found.idx_unshuffle), (vec![0, 1, 2, 0], vec![0, 1, 2]));
        assert_eq!(found.attn_mask, [0.0, 0.0, 0.0, 0.0, 0.0, MASKED, MASKED, MASKED]);
        assert_eq!(found.rel_pos_idx, [4, 3, 5, 4, 4, 0, 0, 0]);
    }

    #[test]
    fn no_token() {
        let masking = plan(&[], 2, 1, Mode::Auto, Rule::Max, 0).unwrap();
        assert_eq!((masking.grouped, masking.grouping.group_size, masking.grouping.num_groups()), (false, 0, 1));
        for rule in [Rule::Max, Rule::Paper] {
            let grouping = plan(&[], 2, 1, Mode::Grouping, rule, 4).unwrap();
            assert_eq!((grouping.grouped, grouping.grouping.num_groups(), grouping.idx_shuffle.len()), (true, 0, 0));
        }
    }

    #[test]
    fn hostile_input_is_refused() {
        let many: Vec<_> = (0..20_000).map(|x| [0, x]).collect();
        assert!(plan(&many, 7, 0, Mode::Masking, Rule::Max, 0).unwrap_err().to_string().contains("2^27"));
        assert!(plan(&many, 0, 0, Mode::Auto, Rule::Max, 0).is_err());
        assert!(plan(&many, 7, 7, Mode::Auto, Rule::Max, 0).is_err());
        assert!(plan(&many, 7, 0, Mode::Auto, Rule::Paper, 0).unwrap_err().to_string().contains("channels"));
    }
}
