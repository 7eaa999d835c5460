//! `attention.cogview_sparse`: causal attention over windows and pivots (CogView, arXiv 2105.13290).
//!
//! Training: s tokens in windows of w. A query in window b sees, of the keys up to its own place, those in windows b − t + 1 … b
//! with score `q·k/√d`, and the pivots in earlier windows with score `q·k/√d + ln⌊s/P⌋`: P sampled positions stand for all. One
//! softmax over both, `dense` afterwards. A query sees its own key at least.
//!
//! Inference: the last N of a list of K keys (by index among memory and x) are the queries; scores `q·k/√d`, causal among those
//! N. The release adds no logarithm here, although it trained with one.
//!
//! Parameters, projections and backward pass are those of [`pb_relax`](super::pb_relax). What is invisible is dropped: the
//! release's −10000 makes no difference unless scores are that low. Keys are gathered by index, windows are runs of the same
//! list, and time and memory grow with s·(P + w·t).

use super::pb_relax::{CogViewAttention, run_with_memory, shapes_with_memory};
use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::ranged::{Pattern, Span};
use crate::nn::{Init, Layout};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor};

/// The indices of an integer tensor `[batch, any]`, which must be below `limit`.
fn indices(what: &str, index: &IntTensor, batch: usize, limit: usize) -> Result<(usize, Vec<u32>)> {
    let [b, count] = index.shape.dims(what)?;
    if b != batch {
        return Err(Error::shape(what, format!("[{batch}, any]"), index.shape));
    }
    if let Some(bad) = index.data.iter().find(|&&i| !(0..limit as i64).contains(&i)) {
        return Err(Error::value(what, format!("expected positions below {limit}, found {bad}")));
    }
    Ok((count, index.data.iter().map(|&i| i as u32).collect()))
}

/// How windows of w are cut for the kernel: keys and queries per block, about 64 of each, whole windows or equal parts of one.
fn blocks(window: usize) -> (usize, usize) {
    let whole = (64 / window).max(1) * window;
    let keys = if window <= 128 { whole } else { 64 };
    (keys, if window <= 64 { whole } else { window.div_ceil(window.div_ceil(64)) })
}

/// The training pattern: `pivots` holds those of one image after the other.
fn windows_and_pivots(batch: usize, tokens: usize, mut pivots: Vec<u32>, window: usize, times: usize) -> Result<Pattern<'static>> {
    if !tokens.is_multiple_of(window) {
        return Err(Error::config("query_window", format!("expected a divisor of the {tokens} tokens, found {window}")));
    }
    let count = pivots.len().checked_div(batch).unwrap_or(0);
    if count > tokens {
        return Err(Error::value("input `pivot_idx`", format!("expected at most {tokens} pivots, found {count}")));
    }
    let (mut list, mut spans) = (Vec::with_capacity(batch * (count + tokens)), Vec::with_capacity(batch * tokens));
    for b in 0..batch {
        // The order of the pivots means nothing; sorted, each window sees the first few.
        let pivots = &mut pivots[b * count..(b + 1) * count];
        pivots.sort_unstable();
        list.extend_from_slice(pivots);
        list.extend(0..tokens as u32);
        for i in 0..tokens {
            let first = (i / window + 1).saturating_sub(times) * window;
            let far = pivots.partition_point(|&j| (j as usize) < first) as u32;
            spans.push(Span { far, from: (count + first) as u32, to: (count + i + 1) as u32 });
        }
    }
    let (key_block, query_block) = blocks(window);
    let far_bias = tokens.checked_div(count).map_or(0.0, |each| (each as f64).ln());
    Ok(Pattern { tokens: list, keys: count + tokens, far: count, far_bias, spans, mask: None, hidden: None, query_block, key_block })
}

/// The inference pattern: `list` holds the keys of one image after the other, the queries last.
fn gathered(list: Vec<u32>, keys: usize, queries: usize) -> Result<Pattern<'static>> {
    if keys < queries {
        return Err(Error::value("input `pivot_window_idx`", format!("expected at least the {queries} queries, found {keys} keys")));
    }
    Ok(Pattern { tokens: list, ..Pattern::causal(keys - queries, queries, 0) })
}

fn windows(config: &Config) -> Result<(usize, usize)> {
    Ok((config.positive("query_window")?, config.positive("key_window_times")?))
}

/// `attention.cogview_sparse`.
pub struct CogViewSparse;

impl Operation for CogViewSparse {
    const NAME: &'static str = "attention.cogview_sparse";
    const PAPER: &'static str = "2105.13290 CogView";

    fn sample(rng: &mut Rng) -> Config {
        let heads = rng.between(1, 3);
        let mut config = Config::default();
        config.set("dim", heads * rng.between(1, 6)).set("num_heads", heads);
        if rng.chance(0.6) {
            config.set("mode", "train").set("query_window", rng.between(1, 5)).set("key_window_times", rng.between(1, 4));
        } else {
            config.set("mode", "inference");
        }
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, dim) = (draw.size("batch", 1, 3), config.positive("dim")?);
        if config.str("mode")? == "train" {
            let window = config.positive("query_window")?;
            let count = draw.rng.between(1, 6);
            let tokens = draw.size("tokens", window * count, window * count);
            let pivots = draw.size("pivots", 0, tokens).min(tokens);
            draw.normal("x", [batch, tokens, dim]);
            let index = (0..batch).flat_map(|_| draw.rng.permutation(tokens).into_iter().take(pivots).map(|i| i as i64)).collect();
            return draw.ints("pivot_idx", [batch, pivots], index);
        }
        let (n, memory) = (draw.size("tokens", 1, 5), draw.size("memory", 1, 12));
        let earlier = draw.rng.below(memory + 1);
        draw.normal("x", [batch, n, dim]);
        draw.normal("mem", [batch, memory, dim]);
        let index = (0..batch).flat_map(|_| {
            let earlier = draw.rng.permutation(memory).into_iter().take(earlier).collect::<Vec<_>>();
            earlier.into_iter().chain(memory..memory + n).map(|i| i as i64)
        });
        let index = index.collect();
        draw.ints("pivot_window_idx", [batch, earlier + n], index)
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, m, n] = shapes_with_memory(inputs)?;
        let c = config.positive("dim")?;
        let (layer, _) = Layout::build(|names| CogViewAttention::new(names.here(), c, config.usize("num_heads")?, 1.0, Init::NORMAL_02))?;
        let pairs = if config.str("mode")? == "train" {
            let ((window, times), [_, pivots]) = (windows(config)?, inputs.dims("pivot_idx")?);
            windows_and_pivots(1, n, vec![0; pivots], window, times)?.pairs(n)
        } else {
            let [_, keys] = inputs.dims("pivot_window_idx")?;
            gathered(vec![0; keys], keys, n)?.pairs(n)
        };
        let joined = Cost { flops: 0, activation_bytes: if m > 0 { 4 * b * (m + n) * c } else { 0 } };
        Ok(Some(layer.cost(b, m + n, n, pairs) + joined))
    }

    /// The window is the largest one up to the usual 128 that divides the tokens; a quarter of them, at most 768, are pivots.
    fn bench(size: BenchSize) -> Option<Benchmark> {
        let window = (1..=128).rev().find(|&w| size.tokens.is_multiple_of(w))?;
        let benchmark = Benchmark::new(size).set("mode", "train").set("query_window", window).set("key_window_times", 6);
        Some(benchmark.size("pivots", (size.tokens / 4).min(768)))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let train = run.config().choice("mode", &["train", "inference"])? == "train";
        run_with_memory(run, 1.0, |run, batch, memory, queries| {
            if train {
                if memory > 0 {
                    return Err(Error::value("input `mem`", "there is no memory in mode `train`"));
                }
                let (_, pivots) = indices("input `pivot_idx`", run.ints("pivot_idx")?, batch, queries)?;
                let (window, times) = windows(run.config())?;
                windows_and_pivots(batch, queries, pivots, window, times)
            } else {
                let (keys, list) = indices("input `pivot_window_idx`", run.ints("pivot_window_idx")?, batch, memory + queries)?;
                gathered(list, keys, queries)
            }
        })
    }
}
