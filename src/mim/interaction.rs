//! Multi-order interactions of patches (the analysis of A²MIM, arXiv 2205.13943): `analysis.interaction_masks`, `analysis.interaction`.
//!
//! An image is cut into `n = g²` patches; `v(S)` is the score of the true class when all patches outside S are 0.
//! `Δv(i, j, S) = v(S∪{i,j}) − v(S∪{i}) − v(S∪{j}) + v(S)` for contexts S of `trunc((n − 2)·ratio)` patches; the strength of an order is
//! the mean over images and pairs of `|mean_S Δv|`, over the mean of the same over the orders.

use rayon::prelude::*;

use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Tensor};

/// Largest number of patches.
const MOST_PATCHES: usize = 1 << 20;

/// Pairs of different patches, `[P, 2]`.
fn read_pairs(pairs: &IntTensor, n: usize) -> Result<Vec<[usize; 2]>> {
    let [_, two] = pairs.shape.dims("input `pairs`")?;
    if two != 2 {
        return Err(Error::shape("input `pairs`", "[pairs, 2]", pairs.shape));
    }
    let read = |pair: &[i64]| {
        let patch = |x: i64| usize::try_from(x).ok().filter(|&x| x < n);
        match (patch(pair[0]), patch(pair[1])) {
            (Some(i), Some(j)) if i != j => Ok([i, j]),
            _ => Err(Error::value("input `pairs`", format!("expected two different patches below {n}, found {pair:?}"))),
        }
    };
    pairs.data.chunks_exact(2).map(read).collect()
}

/// The patches of a context for `pair`: of all others the `trunc((n − 2)·ratio)` of least noise, in that order.
pub fn context<T: Float>(noise: &[T], pair: [usize; 2], ratio: f64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..noise.len()).filter(|patch| !pair.contains(patch)).collect();
    order.sort_by(|&a, &b| noise[a].partial_cmp(&noise[b]).unwrap_or(std::cmp::Ordering::Equal));
    order.truncate((noise.len().saturating_sub(2) as f64 * ratio) as usize);
    order
}

/// The four images `[4, C, side, side]` of `S∪{i, j}`, `S∪{i}`, `S∪{j}` and `S` on a grid of `g × g` patches.
pub fn four_images<T: Float>(out: &mut [T], image: &[T], side: usize, g: usize, pair: [usize; 2], context: &[usize]) {
    let mut kept = vec![false; g * g];
    context.iter().for_each(|&patch| kept[patch] = true);
    let cell = side / g;
    for (out, with) in out.chunks_exact_mut(image.len().max(1)).zip([[true, true], [true, false], [false, true], [false, false]]) {
        let mut seen = kept.clone();
        (0..2).filter(|&k| with[k]).for_each(|k| seen[pair[k]] = true);
        for (pixel, (y, &x)) in out.iter_mut().zip(image).enumerate() {
            let (row, column) = (pixel / side % side, pixel % side);
            *y = if seen[row / cell * g + column / cell] { x } else { T::ZERO };
        }
    }
}

/// `analysis.interaction_masks`.
pub struct InteractionMasks;

impl Operation for InteractionMasks {
    const NAME: &'static str = "analysis.interaction_masks";
    const PAPER: &'static str = "2205.13943 A2MIM";
    const DATA: &'static [&'static str] = &["image", "noise"];

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("grid_size", rng.between(2, 4)).set("ratio", [0.0, 0.05, 0.3, 0.5, 0.9, 1.0][rng.below(6)]);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (g, pairs, contexts) = (config.positive("grid_size")?, draw.rng.between(1, 3), draw.rng.between(1, 3));
        let side = g * draw.rng.between(1, 3);
        let chans = draw.rng.between(1, 2);
        draw.normal("image", [chans, side, side]);
        let list = (0..pairs).flat_map(|_| draw.rng.permutation(g * g).into_iter().take(2)).map(|x| x as i64).collect();
        draw.ints("pairs", [pairs, 2], list)?;
        draw.uniform("noise", [pairs, contexts, g * g]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (g, ratio) = (config.positive("grid_size")?, config.f64("ratio")?);
        let n = g.checked_mul(g).filter(|&n| (2..=MOST_PATCHES).contains(&n));
        let n = n.ok_or_else(|| Error::config("grid_size", format!("expected from 2 to 1024, found {g}")))?;
        if !(0.0..=1.0).contains(&ratio) {
            return Err(Error::config("ratio", format!("expected a number from 0 to 1, found {ratio}")));
        }
        let m = ((n - 2) as f64 * ratio) as usize;
        let (image, noise): (Tensor<T>, Tensor<T>) = (run.input("image")?, run.input("noise")?);
        let [c, side, width] = image.dims("input `image`")?;
        if side != width || side == 0 || !side.is_multiple_of(g) {
            return Err(Error::shape("input `image`", format!("[channels, side, side] with a side that {g} divides"), image.shape()));
        }
        let pairs = read_pairs(run.ints("pairs")?, n)?;
        let [p, s, patches] = noise.dims("input `noise`")?;
        if p != pairs.len() || patches != n {
            return Err(Error::shape("input `noise`", format!("[{}, contexts, {n}]", pairs.len()), noise.shape()));
        }
        if noise.data().iter().any(|x| x.to_f64().is_nan()) {
            return Err(Error::value("input `noise`", "expected numbers, found NaN"));
        }
        let mut contexts = Vec::with_capacity(p * s * m);
        for (k, noise) in noise.data().chunks_exact(n).enumerate() {
            contexts.extend(context(noise, pairs[k / s], ratio));
        }
        let size = c * side * side;
        let mut images = Tensor::scratch([p, s, 4, c, side, side]);
        images.data_mut().par_chunks_mut((4 * size).max(1)).enumerate().for_each(|(k, sets)| {
            four_images(sets, image.data(), side, g, pairs[k / s], &contexts[k * m..(k + 1) * m]);
        });
        let contexts = contexts.into_iter().map(|patch| patch as i64).collect();
        run.output_ints("contexts", IntTensor::new([p, s, m], contexts)?);
        run.output("images", &images);
        Ok(())
    }
}

/// How the class that is scored gets its score: `"modified"` is the logarithm of its odds, `"normal"` of its probability, `"yi"` its logit.
pub const REWARDS: [&str; 3] = ["modified", "normal", "yi"];

/// The score of class `label`.
fn reward(logits: &[f64], label: usize, kind: &str) -> f64 {
    let log_sum = |skip: Option<usize>| {
        let those = || logits.iter().enumerate().filter(move |(k, _)| Some(*k) != skip).map(|(_, &z)| z);
        let max = those().fold(f64::NEG_INFINITY, f64::max);
        max + libm::log(those().fold(0.0, |sum, z| sum + libm::exp(z - max)))
    };
    match kind {
        "modified" => logits[label] - log_sum(Some(label)),
        "normal" => logits[label] - log_sum(None),
        _ => logits[label],
    }
}

/// `Δv` of the logits `[4, K]` of the four sets.
pub fn interaction(logits: &[f64], label: usize, kind: &str) -> f64 {
    let k = logits.len() / 4;
    let score = |set: usize| reward(&logits[set * k..(set + 1) * k], label, kind);
    score(0) - score(1) - score(2) + score(3)
}

/// The strength of R orders from `Δv` `[X, R, P, S]` of images, orders, pairs and contexts.
pub fn strength(all: &[f64], [x, r, p, s]: [usize; 4]) -> Vec<f64> {
    let mut strength = vec![0.0; r];
    for (group, contexts) in all.chunks_exact(s.max(1)).enumerate() {
        strength[group / p % r] += (contexts.iter().fold(0.0, |sum, d| sum + d) / s as f64).abs() / (x * p) as f64;
    }
    let mean = strength.iter().fold(0.0, |sum, x| sum + x) / r as f64;
    strength.iter().map(|x| x / mean).collect()
}

/// `analysis.interaction`.
pub struct Interaction;

impl Operation for Interaction {
    const NAME: &'static str = "analysis.interaction";
    const PAPER: &'static str = "2205.13943 A2MIM";
    const DATA: &'static [&'static str] = &["logits"];

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("reward", rng.pick(&REWARDS));
        config
    }

    fn inputs(_: &Config, draw: &mut Draw) -> Result<()> {
        let mut size = |high| draw.rng.between(1, high);
        let (shape, classes) = ([size(3), size(3), size(3), size(3), 4], 1 + size(4));
        draw.normal("logits", [shape[0], shape[1], shape[2], shape[3], 4, classes]);
        let labels = (0..shape[0]).map(|_| draw.rng.below(classes) as i64).collect();
        draw.ints("labels", [shape[0]], labels)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let kind = run.config().choice("reward", &REWARDS)?;
        let logits: Tensor<T> = run.input("logits")?;
        let [x, r, p, s, four, k] = logits.dims("input `logits`")?;
        if four != 4 || k == 0 || (kind == "modified" && k < 2) {
            return Err(Error::shape("input `logits`", "[images, orders, pairs, contexts, 4, classes]", logits.shape()));
        }
        let labels = run.ints("labels")?;
        if labels.shape != [x][..] {
            return Err(Error::shape("input `labels`", [x], labels.shape));
        }
        let label = |&l: &i64| usize::try_from(l).ok().filter(|&l| l < k);
        let labels: Option<Vec<usize>> = labels.data.iter().map(label).collect();
        let labels = labels.ok_or_else(|| Error::value("input `labels`", format!("expected classes below {k}")))?;
        let each = |i: usize| -> f64 {
            let sets: Vec<f64> = logits.data()[i * 4 * k..(i + 1) * 4 * k].iter().map(|z| z.to_f64()).collect();
            interaction(&sets, labels[i / (r * p * s)], kind)
        };
        let all: Vec<f64> = (0..x * r * p * s).map(each).collect();
        let strength = strength(&all, [x, r, p, s]);
        run.output("interactions", &Tensor::from_fn([x, r, p, s], |i| T::from_f64(all[i])));
        run.output("strength", &Tensor::from_fn([r], |i| T::from_f64(strength[i])));
        Ok(())
    }
}
