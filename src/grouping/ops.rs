//! `group.*`: window grouping (GreenMIM, arXiv 2205.13515) as operations of the registry. All of them answer in integers; there
//! is nothing to differentiate.

use super::{Budget, Choice, Mode, Rule, group_windows, knapsack, optimal, plan, sweep};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Tensor};

const PAPER: &str = "2205.13515 GreenMIM";

/// An integer input `[n]` of values that are not negative.
fn list<T: Float>(run: &Run<T>, name: &str) -> Result<Vec<usize>> {
    let tensor = run.ints(name)?;
    let [_] = tensor.shape.dims(name)?;
    tensor.data.iter().enumerate().map(|(i, &v)| natural(v, || format!("{name}[{i}]"))).collect()
}

fn natural(v: i64, what: impl FnOnce() -> String) -> Result<usize> {
    usize::try_from(v).map_err(|_| Error::value(what(), format!("expected a non-negative integer, found {v}")))
}

/// Hands in a count of shape `[1]`.
fn count<T: Float>(run: &mut Run<T>, name: &str, value: usize) {
    run.output_ints(name, IntTensor::vector([value]));
}

/// A result that the search budget left unproved must not pass for the optimum.
fn certain(proved: bool) -> Result<()> {
    if proved { Ok(()) } else { Err(Error::value("sizes", "the search for the optimum ran out of its budget; expected fewer windows")) }
}

/// Window sizes for a group size of `g`.
fn draw_sizes(draw: &mut Draw, g: usize) -> Result<()> {
    let n = draw.size("windows", 1, 14);
    let sizes = (0..n).map(|_| draw.rng.between(1, g) as i64).collect();
    draw.ints("sizes", [n], sizes)
}

/// `group.knapsack`: the subset of `weights` with the largest sum up to `capacity`.
pub struct GroupKnapsack;

impl Operation for GroupKnapsack {
    const NAME: &'static str = "group.knapsack";
    const PAPER: &'static str = PAPER;

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("capacity", rng.between(1, 40));
        config
    }

    fn inputs(_: &Config, draw: &mut Draw) -> Result<()> {
        let n = draw.size("items", 1, 14);
        let weights = (0..n).map(|_| draw.rng.between(1, 20) as i64).collect();
        draw.ints("weights", [n], weights)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let found = knapsack(&list(run, "weights")?, run.config().usize("capacity")?)?;
        count(run, "best", found.best);
        run.output_ints("index", IntTensor::vector(found.index));
        Ok(())
    }
}

/// `group.windows`: the released greedy at a fixed group size.
pub struct GroupWindows;

impl Operation for GroupWindows {
    const NAME: &'static str = "group.windows";
    const PAPER: &'static str = PAPER;

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("group_size", rng.between(1, 49));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_sizes(draw, config.positive("group_size")?)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let found = group_windows(&list(run, "sizes")?, run.config().usize("group_size")?)?;
        count(run, "num_groups", found.num_groups());
        run.output_ints("group_len", IntTensor::vector(found.groups.iter().map(Vec::len)));
        run.output_ints("group_index", IntTensor::vector(found.groups.concat()));
        run.output_ints("num_ele_group", IntTensor::vector(found.tokens));
        Ok(())
    }
}

/// `group.optimal`: the fewest groups, beside the greedy's number and two lower bounds.
pub struct GroupOptimal;

impl Operation for GroupOptimal {
    const NAME: &'static str = "group.optimal";
    const PAPER: &'static str = PAPER;

    fn sample(rng: &mut Rng) -> Config {
        GroupWindows::sample(rng)
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        GroupWindows::inputs(config, draw)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let found = optimal(&list(run, "sizes")?, run.config().usize("group_size")?, Budget::default())?;
        certain(found.proved)?;
        count(run, "num_groups", found.grouping.num_groups());
        count(run, "greedy_num_groups", found.greedy_num_groups);
        count(run, "lower_bound_l1", found.l1);
        count(run, "lower_bound_l2", found.l2);
        Ok(())
    }
}

/// `group.sweep`: the group size of least cost, greedily (the paper) and at the optimum.
pub struct GroupSweep;

impl Operation for GroupSweep {
    const NAME: &'static str = "group.sweep";
    const PAPER: &'static str = PAPER;

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("channels", rng.between(1, 128));
        config
    }

    fn inputs(_: &Config, draw: &mut Draw) -> Result<()> {
        let largest = draw.rng.between(1, 16);
        draw_sizes(draw, largest)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let found = sweep(&list(run, "sizes")?, run.config().usize("channels")?, Budget::default())?;
        certain(found.proved)?;
        for (prefix, Choice { grouping, cost }) in [("", &found.greedy), ("opt_", &found.optimal)] {
            count(run, &format!("{prefix}group_size"), grouping.group_size);
            count(run, &format!("{prefix}num_groups"), grouping.num_groups());
            count(run, &format!("{prefix}cost"), *cost as usize);
        }
        count(run, "ragged_cost", found.ragged_cost as usize);
        count(run, "max_rule_cost", found.max_rule_cost as usize);
        Ok(())
    }
}

/// `group.plan`: shuffling indices, mask and relative positions of a grouped attention.
pub struct GroupPlan;

impl Operation for GroupPlan {
    const NAME: &'static str = "group.plan";
    const PAPER: &'static str = PAPER;

    fn sample(rng: &mut Rng) -> Config {
        let window = rng.between(1, 4);
        let rule = rng.pick(&["max", "paper"]);
        let mut config = Config::default();
        config.set("window_size", window).set("shift_size", rng.below(window));
        config.set("mode", rng.pick(&["auto", "masking", "grouping"])).set("group_size", rule);
        config.set("channels", if rule == "paper" { rng.between(1, 64) } else { 0 });
        config
    }

    fn inputs(_: &Config, draw: &mut Draw) -> Result<()> {
        let (height, width) = (draw.size("height", 1, 10), draw.size("width", 1, 10));
        let mut cells = draw.rng.permutation(height * width);
        // At least one token stays; tokens stand in row-major order.
        cells.truncate(draw.rng.between(1, cells.len().max(1)));
        cells.sort_unstable();
        let coords: Vec<i64> = cells.iter().flat_map(|&cell| [(cell / width) as i64, (cell % width) as i64]).collect();
        draw.ints("coords", [coords.len() / 2, 2], coords)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (config, coords) = (run.config(), run.ints("coords")?);
        let [n, 2] = coords.shape.dims("coords")? else { return Err(Error::shape("coords", "[tokens, 2]", coords.shape)) };
        let mut points = Vec::with_capacity(n);
        for (i, yx) in coords.data.chunks_exact(2).enumerate() {
            points.push([natural(yx[0], || format!("coords[{i}, 0]"))?, natural(yx[1], || format!("coords[{i}, 1]"))?]);
        }
        let (mode, rule) = (Mode::parse(config.str("mode")?)?, Rule::parse(config.str("group_size")?)?);
        let (window, shift) = (config.usize("window_size")?, config.usize("shift_size")?);
        let found = plan(&points, window, shift, mode, rule, config.usize_or("channels", 0)?)?;
        let (groups, g) = (found.grouping.num_groups(), found.grouping.group_size);
        let integers = |values: &[u32]| values.iter().map(|&v| i64::from(v)).collect::<Vec<_>>();
        count(run, "grouped", found.grouped.into());
        count(run, "group_size", g);
        count(run, "num_groups", groups);
        run.output_ints("window_yx", IntTensor::new([n, 2], integers(found.windows.yx.as_flattened()))?);
        run.output_ints("idx_shuffle", IntTensor::new([groups * g], integers(&found.idx_shuffle))?);
        run.output_ints("idx_unshuffle", IntTensor::new([n], integers(&found.idx_unshuffle))?);
        run.output("attn_mask", &Tensor::from_fn([groups, g, g], |i| T::from_f64(found.attn_mask[i])));
        run.output_ints("rel_pos_idx", IntTensor::new([groups, g, g], integers(&found.rel_pos_idx))?);
        Ok(())
    }
}
