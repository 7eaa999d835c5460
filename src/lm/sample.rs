//! `lm.sample_token`: the next token from logits (CogView, arXiv 2105.13290).
//!
//! In this order: divide by the temperature; forbid all but ids `lo ≤ id < hi`; top-k drops logits strictly below the k-th largest
//! (ties stay); top-p, on the softmax of what is left in falling order, keeps an entry if the mass before it is at most p; softmax;
//! the token is the number of ids whose cumulative probability is at most `u` times the total.

use std::ops::Range;

use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Tensor};

/// How tokens are drawn.
#[derive(Clone, Debug)]
pub struct Sampler {
    /// Divides the logits.
    pub temperature: f64,
    /// The ids that may come.
    pub allowed: Range<usize>,
    /// How many of the largest logits stay; 0 = all.
    pub top_k: usize,
    /// The mass that stays; 0 = all.
    pub top_p: f64,
}

impl Sampler {
    /// `temperature`, `top_k`, `top_p` of a configuration.
    pub fn of(config: &Config, allowed: Range<usize>) -> Result<Self> {
        let (temperature, top_p) = (config.f64_or("temperature", 1.0)?, config.f64_or("top_p", 0.0)?);
        if !(temperature > 0.0 && temperature.is_finite()) {
            return Err(Error::config("temperature", format!("expected a positive number, found {temperature}")));
        }
        if !(0.0..=1.0).contains(&top_p) {
            return Err(Error::config("top_p", format!("expected a number from 0 to 1, found {top_p}")));
        }
        Ok(Sampler { temperature, allowed, top_k: config.usize_or("top_k", 0)?, top_p })
    }

    /// The filtered distribution of one row of logits.
    pub fn distribution(&self, logits: impl Iterator<Item = f64>) -> Vec<f64> {
        let forbidden = |i: usize| !self.allowed.contains(&i);
        let mut x: Vec<f64> =
            logits.enumerate().map(|(i, l)| if forbidden(i) { f64::NEG_INFINITY } else { l / self.temperature }).collect();
        let falling = |x: &[f64]| {
            let mut order: Vec<usize> = (0..x.len()).collect();
            order.sort_by(|&a, &b| x[b].total_cmp(&x[a]));
            order
        };
        if (1..x.len()).contains(&self.top_k) {
            let least = x[falling(&x)[self.top_k - 1]];
            x.iter_mut().filter(|l| **l < least).for_each(|l| *l = f64::NEG_INFINITY);
        }
        if self.top_p > 0.0 {
            let (p, mut before) = (softmax(&x), 0.0);
            for i in falling(&x) {
                if before > self.top_p {
                    x[i] = f64::NEG_INFINITY;
                }
                before += p[i];
            }
        }
        softmax(&x)
    }
}

/// The probabilities of logits, of which some may be −∞.
fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(x));
    let mut p: Vec<f64> = x.iter().map(|x| libm::exp(x - max)).collect();
    let sum = p.iter().fold(0.0, |sum, p| sum + p);
    p.iter_mut().for_each(|p| *p /= sum);
    p
}

/// The token at `u` in `[0, 1)` of a distribution.
pub fn draw_token(probs: &[f64], u: f64) -> usize {
    let total = probs.iter().fold(0.0, |sum, p| sum + p);
    let (mut sum, mut count) = (0.0, 0);
    for p in probs {
        sum += p;
        count += usize::from(sum <= u * total);
    }
    count.min(probs.len().saturating_sub(1))
}

/// Uniform numbers of this shape, which must lie in `[0, 1)`.
pub fn uniforms<T: Float>(run: &Run<T>, shape: impl Into<crate::tensor::Shape>) -> Result<Vec<f64>> {
    let u = run.input("u")?;
    u.expect_shape("input `u`", shape)?;
    let u: Vec<f64> = u.data().iter().map(|u| u.to_f64()).collect();
    if u.iter().all(|u| (0.0..=1.0).contains(u)) { Ok(u) } else { Err(Error::value("input `u`", "expected numbers in [0, 1)")) }
}

/// `lm.sample_token`.
pub struct SampleToken;

impl Operation for SampleToken {
    const NAME: &'static str = "lm.sample_token";
    const PAPER: &'static str = "2105.13290 CogView";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let lo = rng.below(5);
        config.set("temperature", rng.range(0.5, 2.0)).set("allow_lo", lo).set("allow_hi", lo + rng.between(1, 15));
        config.set("top_k", rng.below(8)).set("top_p", if rng.chance(0.5) { 0.0 } else { rng.uniform() });
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (b, v) = (draw.size("batch", 1, 4), config.usize("allow_hi")? + draw.rng.below(5));
        draw.normal("logits", [b, v]);
        draw.uniform("u", [b]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let logits = run.input("logits")?;
        let [b, v] = logits.dims("input `logits`")?;
        let allowed = config.usize("allow_lo")?..config.usize("allow_hi")?;
        if allowed.start >= allowed.end.min(v) {
            return Err(Error::config("allow_lo", format!("expected some of the ids below {v}, found {allowed:?}")));
        }
        let sampler = Sampler::of(config, allowed)?;
        let u = uniforms(run, [b])?;
        let (mut probs, mut tokens) = (Vec::with_capacity(b * v), Vec::with_capacity(b));
        for (row, u) in logits.data().chunks_exact(v).zip(u) {
            let p = sampler.distribution(row.iter().map(|l| l.to_f64()));
            tokens.push(draw_token(&p, u) as i64);
            probs.extend(p);
        }
        run.output("probs", &Tensor::from_fn([b, v], |i| T::from_f64(probs[i])));
        run.output_ints("token", IntTensor::new([b], tokens)?);
        run.backward();
        Ok(())
    }
}
