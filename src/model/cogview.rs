//! `model.cogview`: CogView's decoder-only transformer (arXiv 2105.13290).
//!
//! `x = E[token] + Pos[position]`, `depth` causal [blocks](super::cogview_block), `final_layernorm`, `logits = x Eᵀ` (tied, without
//! bias). `dE` gets both contributions: `dlogitsᵀ x` and the rows of `dx`.

use std::ops::Range;

use super::cogview_block::{self, Block, Settings};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::ranged::Pattern;
use crate::linalg::{Epilogue, Mat, MatMut, gemm};
use crate::nn::{CogViewNorm, Init, Layout, Names, Param, Params, Stats};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Tensor};

/// CogView.
#[derive(Clone, Debug)]
pub struct CogView {
    words: Param,
    positions: Param,
    blocks: Vec<Block>,
    norm: CogViewNorm,
    settings: Settings,
    vocab_size: usize,
    max_positions: usize,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    pattern: Pattern<'static>,
    blocks: Vec<cogview_block::Saved<T>>,
    last: Tensor<T>,
    stats: Stats<T>,
}

/// Checked tokens and positions of a batch `[B, N]`.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// B and N.
    pub shape: [usize; 2],
    /// Rows of E.
    pub tokens: Vec<u32>,
    /// Rows of Pos.
    pub positions: Vec<u32>,
}

fn below(what: &str, ids: &[i64], limit: usize) -> Result<Vec<u32>> {
    match ids.iter().find(|&&id| !(0..limit as i64).contains(&id)) {
        Some(bad) => Err(Error::value(what, format!("expected numbers below {limit}, found {bad}"))),
        None => Ok(ids.iter().map(|&id| id as u32).collect()),
    }
}

impl CogView {
    /// Registers the parameters of the model that a configuration describes.
    pub fn new(mut names: Names, config: &Config) -> Result<Self> {
        let (settings, depth) = (Settings::of(config)?, config.usize("depth")?);
        let (vocab_size, max_positions) = (config.positive("vocab_size")?, config.positive("max_positions")?);
        if depth > 10_000 {
            return Err(Error::config("depth", format!("expected at most 10000, found {depth}")));
        }
        let dim = settings.dim;
        let words = names.param("word_embeddings.weight", crate::tensor::Shape::try_new(&[vocab_size, dim])?, Init::NORMAL_02);
        let mut inner = names.at("transformer");
        let table = crate::tensor::Shape::try_new(&[max_positions, dim])?;
        let positions = inner.param("position_embeddings.weight", table, Init::NORMAL_02);
        let blocks = (0..depth).map(|i| Block::new(inner.at(format!("layers.{i}")), settings, depth)).collect::<Result<Vec<_>>>()?;
        let norm = CogViewNorm::new(inner.at("final_layernorm"), dim, settings.ln_eps, settings.ln_relax);
        Ok(CogView { words, positions, blocks, norm, settings, vocab_size, max_positions })
    }

    /// Codes V.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The longest sequence.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// The blocks.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// What the blocks are made of.
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// Checks ids; positions count from 0 if none are given.
    pub fn sequence(&self, tokens: &IntTensor, position_ids: Option<&IntTensor>) -> Result<Sequence> {
        let shape @ [_, n] = tokens.shape.dims("input `tokens`")?;
        let ids = below("input `tokens`", &tokens.data, self.vocab_size)?;
        let positions = match position_ids {
            Some(given) if given.shape == tokens.shape => below("input `position_ids`", &given.data, self.max_positions)?,
            Some(given) => return Err(Error::shape("input `position_ids`", tokens.shape, given.shape)),
            None if n > self.max_positions => {
                return Err(Error::value("input `tokens`", format!("expected at most {} tokens, found {n}", self.max_positions)));
            }
            None => (0..ids.len()).map(|i| (i % n) as u32).collect(),
        };
        Ok(Sequence { shape, tokens: ids, positions })
    }

    /// `E[token] + Pos[position]` `[B, N, C]`.
    pub fn embed<T: Float>(&self, p: &Params<T>, [b, n]: [usize; 2], tokens: &[u32], positions: &[u32]) -> Tensor<T> {
        let c = self.settings.dim;
        let (words, table) = (p.get(self.words), p.get(self.positions));
        let mut x = Tensor::scratch([b, n, c]);
        for ((row, &token), &at) in x.data_mut().chunks_exact_mut(c).zip(tokens).zip(positions) {
            let (word, place) = (&words[token as usize * c..][..c], &table[at as usize * c..][..c]);
            row.iter_mut().zip(word).zip(place).for_each(|((x, &w), &q)| *x = w + q);
        }
        x
    }

    /// The normalised last hidden states `[B, N, C]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, sequence: &Sequence) -> Result<(Tensor<T>, Saved<T>)> {
        let mut x = self.embed(p, sequence.shape, &sequence.tokens, &sequence.positions);
        let pattern = Pattern::causal(0, sequence.shape[1], 0);
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (y, saved) = block.forward(p, x, None, &pattern)?;
            blocks.push(saved);
            x = y;
        }
        let (hidden, stats) = self.norm.forward(p, &x)?;
        Ok((hidden, Saved { pattern, blocks, last: x, stats }))
    }

    /// The gradients of everything but the output's share of E.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        sequence: &Sequence,
        saved: Saved<T>,
        d_hidden: &Tensor<T>,
    ) -> Result<()> {
        let Saved { pattern, blocks, last, stats } = saved;
        let mut dx = self.norm.backward(p, g, &last, &stats, d_hidden, None)?;
        for (block, saved) in self.blocks.iter().zip(blocks).rev() {
            dx = block.backward(p, g, &pattern, saved, &dx)?.0;
        }
        let c = self.settings.dim;
        for (table, ids) in [(self.words, &sequence.tokens), (self.positions, &sequence.positions)] {
            let table = g.get_mut(table);
            for (row, &id) in dx.data().chunks_exact(c).zip(ids) {
                table[id as usize * c..][..c].iter_mut().zip(row).for_each(|(a, &b)| *a += b);
            }
        }
        Ok(())
    }

    /// The normalised states of new tokens after `at` others, whose keys and values `caches` holds (one `[B, room, 3C]` per block);
    /// those of the new ones are added.
    pub fn extend<T: Float>(&self, p: &Params<T>, mut x: Tensor<T>, caches: &mut [Tensor<T>], at: usize) -> Result<Tensor<T>> {
        let pattern = Pattern::causal(at, x.dims::<3>("new tokens")?[1], 0);
        for (block, cache) in self.blocks.iter().zip(caches) {
            let (normed, _) = block.input_norm().forward(p, &x)?;
            let a = block.attention().extend(p, &normed, cache, at, &pattern)?;
            x = block.finish(p, &x, a)?.0;
        }
        Ok(self.norm.forward(p, &x)?.0)
    }

    /// `hidden Eᵀ` for some rows of `hidden` `[…, C]`.
    pub fn logits<T: Float>(&self, p: &Params<T>, hidden: &Tensor<T>, rows: Range<usize>) -> Tensor<T> {
        let c = self.settings.dim;
        let mut y = Tensor::scratch([rows.len(), self.vocab_size]);
        let from = Mat::new(&hidden.data()[rows.start * c..rows.end * c], rows.len(), c);
        let words = Mat::new(p.get(self.words), self.vocab_size, c);
        gemm(from, words.t(), MatMut::new(y.data_mut(), rows.len(), self.vocab_size), Epilogue::default());
        y
    }

    /// The adjoint of [`logits`](Self::logits): writes those rows of `d_hidden`, adds to dE.
    pub fn logits_backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        hidden: &Tensor<T>,
        rows: Range<usize>,
        d_logits: &Tensor<T>,
        d_hidden: &mut Tensor<T>,
    ) {
        let (c, v, count) = (self.settings.dim, self.vocab_size, rows.len());
        let at = rows.start * c..rows.end * c;
        let d = Mat::new(d_logits.data(), count, v);
        let target = MatMut::new(&mut d_hidden.data_mut()[at.clone()], count, c);
        gemm(d, Mat::new(p.get(self.words), v, c), target, Epilogue::default());
        let accumulate = Epilogue { accumulate: true, ..Epilogue::default() };
        gemm(d.t(), Mat::new(&hidden.data()[at], count, c), MatMut::new(g.get_mut(self.words), v, c), accumulate);
    }

    /// The blocks and norms for `[B, N]`, without the head.
    pub fn cost(&self, [b, n]: [usize; 2]) -> Cost {
        let pairs = Pattern::causal(0, n, 0).pairs(n);
        // Embedding, last hidden states and their statistics.
        let own = Cost { flops: 0, activation_bytes: 4 * b * n * (2 * self.settings.dim + 2) };
        self.blocks.iter().fold(own, |sum, block| sum + block.cost(b, 0, n, pairs))
    }
}

/// Random keys of a small model.
pub fn sample_model(rng: &mut Rng, config: &mut Config) {
    Settings::sample(rng, config);
    config.set("depth", rng.below(3)).set("vocab_size", rng.between(3, 20)).set("max_positions", rng.between(3, 9));
}

/// Random ids below `limit` as an input.
pub fn draw_ids(draw: &mut Draw, name: &str, shape: [usize; 2], limit: usize) -> Result<()> {
    let ids = (0..shape[0] * shape[1]).map(|_| draw.rng.below(limit) as i64).collect();
    draw.ints(name, shape, ids)
}

/// `model.cogview`.
pub struct ModelCogView;

impl Operation for ModelCogView {
    const NAME: &'static str = "model.cogview";
    const PAPER: &'static str = "2105.13290 CogView";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_model(rng, &mut config);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let most = config.positive("max_positions")?;
        let shape = [draw.size("batch", 1, 2), draw.size("tokens", 1, most)];
        draw_ids(draw, "tokens", shape, config.positive("vocab_size")?)?;
        if draw.rng.chance(0.5) { draw_ids(draw, "position_ids", shape, most) } else { Ok(()) }
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let shape @ [b, n] = inputs.dims("tokens")?;
        let (model, _) = Layout::build(|names| CogView::new(names.here(), config))?;
        let (c, v) = (model.settings.dim, model.vocab_size);
        Ok(Some(model.cost(shape) + Cost { flops: 2 * b * n * c * v, activation_bytes: 4 * b * n * v }))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (model, layout) = Layout::build(|names| CogView::new(names.here(), config))?;
        let position_ids = if run.has_input("position_ids") { Some(run.ints("position_ids")?) } else { None };
        let sequence = model.sequence(run.ints("tokens")?, position_ids)?;
        let p = run.params(&layout)?;
        let [b, n] = sequence.shape;
        let (hidden, saved) = model.forward(&p, &sequence)?;
        let logits = model.logits(&p, &hidden, 0..b * n).reshape([b, n, model.vocab_size])?;
        run.output("logits", &logits);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let d_logits = run.cotangent("logits", logits.shape())?;
            let mut d_hidden = Tensor::scratch(hidden.shape());
            model.logits_backward(&p, &mut g, &hidden, 0..b * n, &d_logits, &mut d_hidden);
            model.backward(&p, &mut g, &sequence, saved, &d_hidden)?;
            run.grad_params(&g);
        }
        Ok(())
    }
}
