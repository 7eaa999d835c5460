//! `lm.cogview_generate`: image codes one after the other; `lm.caption_score`: the likelihood of a caption, for self-re-ranking
//! (CogView, arXiv 2105.13290).
//!
//! Generation keeps the keys and values of earlier tokens. With the norm over the maximum of the whole tensor (`ln_relax` `tensor`)
//! earlier states depend on later tokens; then every step computes the whole sequence anew, as the definition has it.

use super::loss::cross_entropy;
use super::sample::{Sampler, draw_token, uniforms};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::norm::Relax;
use crate::model::cogview::{CogView, draw_ids, sample_model};
use crate::nn::{Layout, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Tensor};

/// A sequence under construction: the model's state after the tokens so far.
pub struct Generator<'a, T: Float> {
    model: &'a CogView,
    params: &'a Params<T>,
    /// `[B, tokens]`, one image after the other.
    tokens: Vec<Vec<u32>>,
    caches: Option<Vec<Tensor<T>>>,
    cached: usize,
}

impl<'a, T: Float> Generator<'a, T> {
    /// Starts with `tokens` (one row per image, all as long), with room for `most` tokens.
    pub fn new(model: &'a CogView, params: &'a Params<T>, tokens: Vec<Vec<u32>>, most: usize) -> Self {
        let width = 3 * model.settings().dim;
        let cacheable = model.settings().ln_relax != Some(Relax::Tensor);
        let caches = cacheable.then(|| model.blocks().iter().map(|_| Tensor::zeros([tokens.len(), most, width])).collect());
        Generator { model, params, tokens, caches, cached: 0 }
    }

    /// The logits `[B, V]` of the next token.
    pub fn logits(&mut self) -> Result<Tensor<T>> {
        let (batch, n) = (self.tokens.len(), self.tokens.first().map_or(0, Vec::len));
        let from = if self.caches.is_some() { self.cached } else { 0 };
        let ids: Vec<u32> = self.tokens.iter().flat_map(|row| row[from..].iter().copied()).collect();
        let positions: Vec<u32> = (0..batch).flat_map(|_| from as u32..n as u32).collect();
        let shape = [batch, n - from];
        let hidden = match &mut self.caches {
            Some(caches) => {
                let x = self.model.embed(self.params, shape, &ids, &positions);
                self.model.extend(self.params, x, caches, from)?
            }
            None => {
                let sequence = crate::model::cogview::Sequence { shape, tokens: ids, positions };
                self.model.forward(self.params, &sequence)?.0
            }
        };
        self.cached = n;
        let c = self.model.settings().dim;
        let mut last = Tensor::scratch([batch, c]);
        for (row, hidden) in last.data_mut().chunks_exact_mut(c).zip(hidden.data().chunks_exact((n - from) * c)) {
            row.copy_from_slice(&hidden[(n - from - 1) * c..]);
        }
        Ok(self.model.logits(self.params, &last, 0..batch))
    }

    /// Appends a token to the row of an image.
    pub fn push(&mut self, image: usize, token: u32) {
        self.tokens[image].push(token);
    }
}

/// `lm.cogview_generate`.
pub struct CogViewGenerate;

impl Operation for CogViewGenerate {
    const NAME: &'static str = "lm.cogview_generate";
    const PAPER: &'static str = "2105.13290 CogView";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_model(rng, &mut config);
        config.set("num_image_tokens", rng.between(1, 3)).set("new_tokens", rng.between(1, 3));
        config.set("temperature", rng.range(0.5, 2.0)).set("top_k", rng.below(4)).set("top_p", 0.0);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (most, new) = (config.positive("max_positions")?, config.positive("new_tokens")?);
        let shape = [draw.size("batch", 1, 2), draw.size("tokens", 1, most + 1 - new)];
        draw_ids(draw, "tokens", shape, config.positive("vocab_size")?)?;
        draw.uniform("u", [shape[0], new]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (model, layout) = Layout::build(|names| CogView::new(names.here(), config))?;
        let (codes, new) = (config.positive("num_image_tokens")?, config.positive("new_tokens")?);
        if codes > model.vocab_size() {
            return Err(Error::config("num_image_tokens", format!("expected at most {}, found {codes}", model.vocab_size())));
        }
        let sampler = Sampler::of(config, 0..codes)?;
        let sequence = model.sequence(run.ints("tokens")?, None)?;
        let [b, n] = sequence.shape;
        let u = uniforms(run, [b, new])?;
        if n == 0 || b == 0 || n + new - 1 > model.max_positions() {
            let most = (model.max_positions() + 1).saturating_sub(new);
            return Err(Error::shape("input `tokens`", format!("[at least 1, from 1 to {most}]"), [b, n]));
        }
        let p = run.params(&layout)?;
        let start = sequence.tokens.chunks_exact(n).map(<[u32]>::to_vec).collect();
        let mut generator = Generator::new(&model, &p, start, n + new);
        let mut score = vec![0.0; b];
        let mut logits = Tensor::zeros([0]);
        for step in 0..new {
            logits = generator.logits()?;
            for (i, row) in logits.data().chunks_exact(model.vocab_size()).enumerate() {
                let probs = sampler.distribution(row.iter().map(|l| l.to_f64()));
                let token = draw_token(&probs, u[i * new + step]);
                score[i] += libm::log(probs[token]);
                generator.push(i, token as u32);
            }
        }
        let tokens = generator.tokens.iter().flatten().map(|&t| i64::from(t)).collect();
        run.output_ints("tokens", IntTensor::new([b, n + new], tokens)?);
        run.output("score", &Tensor::from_fn([b], |i| T::from_f64(score[i])));
        run.output("last_logits", &logits);
        run.backward();
        Ok(())
    }
}

/// `lm.caption_score`.
pub struct CaptionScore;

impl Operation for CaptionScore {
    const NAME: &'static str = "lm.caption_score";
    const PAPER: &'static str = "2105.13290 CogView";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_model(rng, &mut config);
        config.set("vocab_size", rng.between(8, 20)).set("num_image_tokens", rng.between(1, 6));
        config.set("text_start", rng.below(config.usize("max_positions").unwrap_or(3) - 1));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (start, most) = (config.usize("text_start")?, config.positive("max_positions")?);
        let (b, n) = (draw.size("batch", 1, 4), draw.size("tokens", start + 2, most));
        let (v, codes) = (config.positive("vocab_size")?, config.usize("num_image_tokens")?);
        // The caption holds no image codes, which cannot come there.
        let low = |i: usize| if i % n > start { codes } else { 0 };
        let ids = (0..b * n).map(|i| (low(i) + draw.rng.below(v - low(i))) as i64).collect();
        draw.ints("tokens", [b, n], ids)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (model, layout) = Layout::build(|names| CogView::new(names.here(), config))?;
        let (codes, start) = (config.usize("num_image_tokens")?, config.usize("text_start")?);
        let sequence = model.sequence(run.ints("tokens")?, None)?;
        let [b, n] = sequence.shape;
        let length = n.saturating_sub(1).saturating_sub(start);
        if length == 0 || b == 0 || codes >= model.vocab_size() {
            return Err(Error::config("text_start", format!("expected a text after token {start} of {n}, and ids beyond {codes} codes")));
        }
        let p = run.params(&layout)?;
        let hidden = model.forward(&p, &sequence)?.0;
        // The states before each token of the text.
        let c = model.settings().dim;
        let mut before = Tensor::scratch([b, length, c]);
        for (to, from) in before.data_mut().chunks_exact_mut(length * c).zip(hidden.data().chunks_exact(n * c)) {
            to.copy_from_slice(&from[start * c..(n - 1) * c]);
        }
        let labels: Vec<u32> = sequence.tokens.chunks_exact(n).flat_map(|row| row[start + 1..].iter().copied()).collect();
        let losses = cross_entropy(&model, &p, &before, &labels, codes);
        let score: Vec<f64> = losses.chunks_exact(length).map(|row| -row.iter().fold(0.0, |sum, x| sum + x)).collect();
        let mut ranking: Vec<usize> = (0..b).collect();
        ranking.sort_by(|&i, &j| score[j].total_cmp(&score[i]));
        run.output("score", &Tensor::from_fn([b], |i| T::from_f64(score[i])));
        run.output("caption_loss", &Tensor::from_fn([b], |i| T::from_f64(-score[i] / length as f64)));
        run.output_ints("ranking", IntTensor::vector(ranking));
        run.backward();
        Ok(())
    }
}
