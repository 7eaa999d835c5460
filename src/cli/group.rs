//! `karat group`: draws a mask, groups its windows in every way there is, and says how good each is.

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::{Value as Json, json};

use super::{Outcome, say};
use crate::error::{Error, Result};
use crate::fs::write_atomic;
use crate::grouping::{Budget, Choice, Optimal, Sweep, Windows, group_windows, optimal, sweep};
use crate::plot::grouping::Picture;
use crate::tensor::random::{Purpose, Rng};

/// Largest side of the token grid: a picture of more shows nothing.
const MOST: usize = 512;

/// Show how GreenMIM packs the windows of a mask into groups: sizes, costs, certificates, a picture
#[derive(Args)]
#[command(after_help = "Example: karat group --window 7 --shift 3 --channels 128 -o groups.svg")]
pub struct Group {
    /// Side of the token grid of the stage
    #[arg(long, default_value_t = 56, value_name = "N")]
    grid: usize,
    /// Side of a window
    #[arg(long, default_value_t = 7, value_name = "M")]
    window: usize,
    /// Shift of the windows, less than their side
    #[arg(long, default_value_t = 0, value_name = "S")]
    shift: usize,
    /// Side of a cell that is hidden or visible as a whole, in tokens
    #[arg(long, default_value_t = 8, value_name = "N")]
    cell: usize,
    /// Share of the cells to hide
    #[arg(long, default_value_t = 0.75, value_name = "R")]
    mask_ratio: f64,
    /// Where the random numbers start
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Width C of the attention, which weighs projections against scores
    #[arg(long, default_value_t = 128, value_name = "C")]
    channels: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The grouping to draw
    #[arg(long, default_value = "optimal", value_name = "RULE")]
    draw: Rule,
    /// The picture to write, as SVG
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Rule {
    /// g = the largest window, greedily: the released code
    Max,
    /// The greedy sweep over g: the paper
    Paper,
    /// The least cost over all g and all partitions
    Optimal,
}

/// Everything that is known about one mask.
struct Found {
    cells: usize,
    kept: usize,
    coords: Vec<[usize; 2]>,
    windows: Windows,
    sizes: Vec<usize>,
    released: Choice,
    sweep: Sweep,
    fewest: Optimal,
}

impl Group {
    pub(super) fn run(&self, out: &mut dyn Write) -> Result<Outcome> {
        let found = self.find()?;
        if let Some(path) = &self.output {
            let (name, choice) = match self.draw {
                Rule::Max => ("g = largest window, greedy", &found.released),
                Rule::Paper => ("paper's sweep", &found.sweep.greedy),
                Rule::Optimal => ("optimal", &found.sweep.optimal),
            };
            let (groups, g) = (choice.grouping.num_groups(), choice.grouping.group_size);
            let (window, shift, ratio) = (self.window, self.shift, ratio(choice.cost, found.sweep.ragged_cost));
            let title = format!("window {window}, shift {shift}, {name}: {groups} groups of {g} tokens, {ratio:.3} × the ragged cost");
            let picture = Picture {
                title: &title,
                grid: self.grid,
                window: (window, shift),
                coords: &found.coords,
                windows: &found.windows,
                grouping: &choice.grouping,
            };
            write_atomic(path, picture.svg().as_bytes())?;
        }
        if self.json {
            say(out, self.to_json(&found))?
        } else {
            self.print(&found, out)?
        }
        Ok(Outcome::Good)
    }

    /// Draws the mask (the cells with the lowest noise stay visible) and groups its windows.
    fn find(&self) -> Result<Found> {
        let Group { grid, window, shift, cell, mask_ratio, seed, channels, .. } = *self;
        if grid == 0 || grid > MOST {
            return Err(Error::usage(format!("--grid {grid}: expected 1 to {MOST}")));
        }
        if cell == 0 || !grid.is_multiple_of(cell) {
            return Err(Error::usage(format!("--cell {cell}: expected a divisor of the grid's {grid}")));
        }
        if !(0.0..=1.0).contains(&mask_ratio) {
            return Err(Error::usage(format!("--mask-ratio {mask_ratio}: expected 0 to 1")));
        }
        let side = grid / cell;
        let cells = side * side;
        let kept = (cells as f64 * (1.0 - mask_ratio)) as usize;
        if kept == 0 {
            return Err(Error::usage(format!("--mask-ratio {mask_ratio}: none of {cells} cells stays visible")));
        }
        let mut rng = Rng::new(seed, Purpose::Mask, 0, 0);
        let noise: Vec<f64> = (0..cells).map(|_| rng.uniform()).collect();
        let mut order: Vec<usize> = (0..cells).collect();
        order.sort_by(|&a, &b| noise[a].total_cmp(&noise[b]));
        let mut visible = vec![false; cells];
        order[..kept].iter().for_each(|&i| visible[i] = true);
        let all = (0..grid).flat_map(|y| (0..grid).map(move |x| [y, x]));
        let coords: Vec<[usize; 2]> = all.filter(|[y, x]| visible[y / cell * side + x / cell]).collect();

        let windows = Windows::new(&coords, (window, window), (shift, shift))?;
        let sizes = windows.sizes();
        let largest = sizes.iter().copied().max().unwrap_or(0);
        let sweep = sweep(&sizes, channels, Budget::default())?;
        let released = Choice { grouping: group_windows(&sizes, largest)?, cost: sweep.max_rule_cost };
        let fewest = optimal(&sizes, largest, Budget::default())?;
        Ok(Found { cells, kept, coords, windows, sizes, released, sweep, fewest })
    }

    fn print(&self, found: &Found, out: &mut dyn Write) -> Result<()> {
        let Found { cells, kept, coords, sizes, released, sweep, fewest, .. } = found;
        let Group { grid, window, shift, cell, seed, channels, .. } = self;
        say(
            out,
            format!(
                "mask     {grid} × {grid} tokens; {kept} of {cells} cells of {cell} × {cell} visible: {} tokens (seed {seed})",
                coords.len()
            ),
        )?;
        let mut descending = sizes.clone();
        descending.sort_unstable_by(|a, b| b.cmp(a));
        let runs: Vec<String> = descending
            .chunk_by(|a, b| a == b)
            .map(|run| if run.len() == 1 { run[0].to_string() } else { format!("{}×{}", run.len(), run[0]) })
            .collect();
        say(out, format!("windows  {} of side {window}, shift {shift}, with {} tokens", sizes.len(), runs.join(", ")))?;
        say(out, "")?;
        say(out, format!("{:<34}{:>5}{:>8}{:>16}{:>10}", format!("grouping (C = {channels})"), "g", "groups", "MACs", "/ragged"))?;
        for (name, choice) in [
            ("released: g = max, greedy", released),
            ("paper: sweep over g, greedy", &sweep.greedy),
            ("optimal over g and partitions", &sweep.optimal),
        ] {
            let (g, groups) = (choice.grouping.group_size, choice.grouping.num_groups());
            say(out, format!("{name:<34}{g:>5}{groups:>8}{:>16}{:>10.3}", choice.cost, ratio(choice.cost, sweep.ragged_cost)))?;
        }
        say(
            out,
            format!("{:<47}{:>16}{:>10.3}", "lower bound for any grouping", sweep.lower_bound, ratio(sweep.lower_bound, sweep.ragged_cost)),
        )?;
        say(out, format!("{:<47}{:>16}{:>10.3}", "ragged: every window by itself", sweep.ragged_cost, 1.0))?;
        say(out, "")?;
        let proof = match (sweep.proved, sweep.optimal.cost == sweep.lower_bound) {
            (true, true) => "proved: it meets the lower bound".to_string(),
            (true, false) => format!("proved: the search came to its end after {} nodes", sweep.nodes),
            (false, _) => format!("not proved: the search stopped after {} nodes", sweep.nodes),
        };
        say(out, format!("optimum  {proof}"))?;
        let Optimal { grouping, greedy_num_groups, l1, l2, proved, .. } = fewest;
        let (g, groups) = (grouping.group_size, grouping.num_groups());
        let proof = match (proved, groups == *l2) {
            (true, true) => "proved: L2 meets it",
            (true, false) => "proved: the search came to its end",
            (false, _) => "not proved",
        };
        say(
            out,
            format!("at g={g:<4} greedy needs {greedy_num_groups} groups, the optimum {groups} (bounds L1 = {l1}, L2 = {l2}); {proof}"),
        )?;
        if let Some(path) = &self.output {
            say(out, format!("picture  {}", path.display()))?;
        }
        Ok(())
    }

    fn to_json(&self, found: &Found) -> Json {
        let Found { kept, coords, sizes, released, sweep, fewest, .. } = found;
        let of = |choice: &Choice| {
            let grouping = &choice.grouping;
            json!({
                "group_size": grouping.group_size, "num_groups": grouping.num_groups(), "cost": choice.cost,
                "ratio_to_ragged": ratio(choice.cost, sweep.ragged_cost), "tokens": grouping.tokens, "groups": grouping.groups,
            })
        };
        json!({
            "grid": self.grid, "window": self.window, "shift": self.shift, "cell": self.cell, "mask_ratio": self.mask_ratio,
            "seed": self.seed, "channels": self.channels, "visible_cells": kept, "tokens": coords.len(), "sizes": sizes,
            "max_rule": of(released), "paper": of(&sweep.greedy), "optimal": of(&sweep.optimal),
            "ragged_cost": sweep.ragged_cost, "lower_bound": sweep.lower_bound, "proved": sweep.proved, "nodes": sweep.nodes,
            "fewest_groups_at_max": {
                "group_size": fewest.grouping.group_size, "num_groups": fewest.grouping.num_groups(), "greedy_num_groups": fewest.greedy_num_groups,
                "lower_bound_l1": fewest.l1, "lower_bound_l2": fewest.l2, "proved": fewest.proved,
            },
        })
    }
}

fn ratio(cost: u64, ragged: u64) -> f64 {
    cost as f64 / ragged.max(1) as f64
}
