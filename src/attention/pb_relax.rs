//! `attention.pb_relax`: causal self-attention in CogView's overflow-safe order (arXiv 2105.13290).
//!
//! `z = concat(mem, x)`; q from the last N rows of z, k and v from all M + N. With `m` 1 where query i may see key j,
//!
//! `s = (q/(α√d)) kᵀ`, `s ← s∘m − (10000/α)(1 − m)`, `P = softmax(α (s − rowmax s))`, `y = (P v) W_denseᵀ + b`.
//!
//! In exact arithmetic α means nothing; in 16 or 32 bits no intermediate before the last subtraction is larger than the largest
//! score over α, and the rescaling can only overflow to −∞. The release switches the trick off; here it is always on.
//! The mask is finite as in the release: a query that may see nothing attends to everything alike.
//!
//! Backward: the projections as linear layers, q rows of memory without gradient; in between [`ranged`].

use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::Operand;
use crate::kernel::ranged::{self, Pattern, Sizes, Span};
use crate::linalg::ColumnsMut;
use crate::nn::{Init, Layout, Linear, Names, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Tensor};

/// The score of a pair that the mask forbids.
const HIDDEN: f64 = -10_000.0;

/// Self-attention with parameters `query_key_value` and `dense`, both with bias, of the last tokens over a pattern of all.
#[derive(Clone, Debug)]
pub struct CogViewAttention {
    query_key_value: Linear,
    dense: Linear,
    heads: usize,
    dim: usize,
    alpha: f64,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    qkv: Tensor<T>,
    out: Tensor<T>,
    stats: Tensor<T>,
}

impl CogViewAttention {
    /// Registers the parameters; `dense_init` is the initialisation of `dense.weight`, which shrinks with the depth of the model.
    pub fn new(mut names: Names, dim: usize, num_heads: usize, alpha: f64, dense_init: Init) -> Result<Self> {
        if num_heads == 0 || dim == 0 || !dim.is_multiple_of(num_heads) {
            return Err(Error::config("num_heads", format!("expected a divisor of the width {dim}, found {num_heads}")));
        }
        if !(1e-6..=1e6).contains(&alpha) {
            return Err(Error::config("alpha", format!("expected a positive number, found {alpha}")));
        }
        let query_key_value = Linear::new(names.at("query_key_value"), dim, 3 * dim, true, Init::NORMAL_02);
        let dense = Linear::new(names.at("dense"), dim, dim, true, dense_init);
        Ok(CogViewAttention { query_key_value, dense, heads: num_heads, dim, alpha })
    }

    fn sizes<T: Float>(&self, z: &Tensor<T>, first: usize) -> Result<Sizes> {
        let [batch, tokens, c] = z.dims("input of an attention")?;
        if c != self.dim || tokens < first {
            return Err(Error::shape("input of an attention", format!("[batch, at least {first}, {}]", self.dim), z.shape()));
        }
        let dim = self.dim / self.heads;
        Ok(Sizes {
            batch,
            heads: self.heads,
            dim,
            tokens,
            first,
            queries: tokens - first,
            scale: 1.0 / (dim as f64).sqrt(),
            relax: self.alpha,
        })
    }

    fn operands<'a, T: Float>(&self, qkv: &'a Tensor<T>) -> [Operand<'a, T>; 3] {
        std::array::from_fn(|i| Operand { data: qkv.data(), stride: 3 * self.dim, offset: i * self.dim })
    }

    /// `dense(attention(z))` for the tokens of `z` `[B, M+N, C]` from `first` on.
    pub fn forward<T: Float>(&self, p: &Params<T>, z: &Tensor<T>, first: usize, pattern: &Pattern) -> Result<(Tensor<T>, Saved<T>)> {
        let sizes = self.sizes(z, first)?;
        let qkv = self.query_key_value.forward(p, z)?;
        let mut out = Tensor::scratch([sizes.batch, sizes.queries, self.dim]);
        let mut stats = Tensor::scratch([sizes.batch, sizes.heads, sizes.queries, 2]);
        ranged::forward(out.data_mut(), stats.data_mut(), self.operands(&qkv), pattern, sizes);
        let y = self.dense.forward(p, &out)?;
        Ok((y, Saved { qkv, out, stats }))
    }

    /// `dz`.
    #[allow(clippy::too_many_arguments)]
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        z: &Tensor<T>,
        first: usize,
        pattern: &Pattern,
        saved: Saved<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let sizes = self.sizes(z, first)?;
        let Saved { qkv, out, stats } = saved;
        let d_out = self.dense.backward(p, g, &out, dy)?;
        let mut d_qkv = Tensor::zeros(qkv.shape());
        let (dq, rest) = ColumnsMut::new(d_qkv.data_mut(), 3 * self.dim).split_at(self.dim);
        let (dk, dv) = rest.split_at(self.dim);
        ranged::backward([dq, dk, dv], d_out.data(), out.data(), stats.data(), self.operands(&qkv), pattern, sizes);
        drop((d_out, out, stats, qkv));
        self.query_key_value.backward(p, g, z, &d_qkv)
    }

    /// `dense(attention(x))` of new tokens `x` `[B, n, C]` after `at` others, whose projections `cache` `[B, room, 3C]` holds; those of
    /// the new ones are added.
    pub fn extend<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, cache: &mut Tensor<T>, at: usize, pattern: &Pattern) -> Result<Tensor<T>> {
        let [batch, n, _] = x.dims("new tokens")?;
        let [b, room, width] = cache.dims("cache of an attention")?;
        if b != batch || width != 3 * self.dim || at + n > room {
            return Err(Error::shape("cache of an attention", format!("[{batch}, at least {}, {}]", at + n, 3 * self.dim), cache.shape()));
        }
        let qkv = self.query_key_value.forward(p, x)?;
        for (cache, new) in cache.data_mut().chunks_exact_mut(room * width).zip(qkv.data().chunks_exact((n * width).max(1))) {
            cache[at * width..(at + n) * width].copy_from_slice(new);
        }
        let sizes = Sizes { tokens: room, first: at, ..self.sizes(x, 0)? };
        let mut out = Tensor::scratch([batch, n, self.dim]);
        let mut stats = Tensor::scratch([batch, sizes.heads, n, 2]);
        ranged::forward(out.data_mut(), stats.data_mut(), self.operands(cache), pattern, sizes);
        self.dense.forward(p, &out)
    }

    /// The keys and values of `tokens` rows projected and `queries` of them attending, `pairs` scores per image.
    pub fn cost(&self, batch: usize, tokens: usize, queries: usize, pairs: usize) -> Cost {
        let c = self.dim;
        Cost {
            flops: 2 * batch * (3 * tokens * c * c + queries * c * c + 2 * pairs * c),
            // qkv; the attention's output and y; maximum and sum per row and head.
            activation_bytes: 4 * batch * (3 * tokens * c + 2 * queries * c + 2 * self.heads * queries),
        }
    }
}

/// Which keys a query may see.
#[derive(Clone, Copy, Debug)]
pub enum Mask<'a> {
    /// Memory and what stands no later.
    Causal,
    /// Also the first so many tokens.
    Prefix(usize),
    /// 1 = visible, `[B, N, M+N]`.
    Explicit(&'a IntTensor),
}

impl<'a> Mask<'a> {
    /// `mask`, and `sep` or the input `mask` that go with it.
    pub fn of<T: Float>(run: &Run<'a, T>) -> Result<Mask<'a>> {
        Ok(match run.config().choice("mask", &["causal", "prefix", "explicit"])? {
            "causal" => Mask::Causal,
            "prefix" => Mask::Prefix(run.config().usize("sep")?),
            _ => Mask::Explicit(run.ints("mask")?),
        })
    }

    /// The pattern for `memory` and then `queries` tokens.
    pub fn pattern(self, batch: usize, memory: usize, queries: usize) -> Result<Pattern<'a>> {
        let prefix = if let Mask::Prefix(sep) = self { memory.saturating_add(sep) } else { 0 };
        let mut pattern = Pattern { hidden: Some(HIDDEN), ..Pattern::causal(memory, queries, prefix) };
        if let Mask::Explicit(mask) = self {
            let keys = memory + queries;
            if *mask.shape != [batch, queries, keys] {
                return Err(Error::shape("input `mask`", [batch, queries, keys], mask.shape));
            }
            if mask.data.iter().any(|m| !(0..=1).contains(m)) {
                return Err(Error::value("input `mask`", "expected 0 and 1 alone"));
            }
            pattern.mask = Some(&mask.data);
            pattern.spans.fill(Span { far: 0, from: 0, to: keys as u32 });
        }
        Ok(pattern)
    }
}

/// Memory `[B, M, C]` and then `x` `[B, N, C]`, and M; without memory `x` itself.
pub fn with_memory<T: Float>(mem: Option<&Tensor<T>>, x: &Tensor<T>) -> Result<(Tensor<T>, usize)> {
    let [batch, n, c] = x.dims("input `x`")?;
    let Some(mem) = mem else { return Ok((x.clone(), 0)) };
    let [b, m, width] = mem.dims("input `mem`")?;
    if [b, width] != [batch, c] {
        return Err(Error::shape("input `mem`", format!("[{batch}, memory, {c}]"), mem.shape()));
    }
    let mut z = Tensor::scratch([batch, m + n, c]);
    for (b, z) in z.data_mut().chunks_exact_mut(((m + n) * c).max(1)).enumerate() {
        z[..m * c].copy_from_slice(&mem.data()[b * m * c..(b + 1) * m * c]);
        z[m * c..].copy_from_slice(&x.data()[b * n * c..(b + 1) * n * c]);
    }
    Ok((z, m))
}

/// The adjoint of [`with_memory`]: the gradients of memory and x.
pub fn split_memory<T: Float>(dz: Tensor<T>, memory: usize) -> Result<(Tensor<T>, Tensor<T>)> {
    let [batch, tokens, c] = dz.dims("gradient")?;
    let part = |from: usize, to: usize| {
        let mut out = Tensor::scratch([batch, to - from, c]);
        for (out, dz) in out.data_mut().chunks_exact_mut(((to - from) * c).max(1)).zip(dz.data().chunks_exact((tokens * c).max(1))) {
            out.copy_from_slice(&dz[from * c..to * c]);
        }
        out
    };
    if memory == 0 {
        return Ok((Tensor::zeros([batch, 0, c]), dz));
    }
    Ok((part(0, memory), part(memory, tokens)))
}

/// The input `mem`, if there is one.
pub fn memory_of<T: Float>(run: &Run<T>) -> Result<Option<Tensor<T>>> {
    if run.has_input("mem") { run.input("mem").map(Some) } else { Ok(None) }
}

/// Runs `layer` on the inputs `x` and, optionally, `mem`: the tail of the operations with these two.
pub fn run_with_memory<'a, T: Float>(
    run: &mut Run<'a, T>,
    alpha: f64,
    pattern: impl FnOnce(&Run<'a, T>, usize, usize, usize) -> Result<Pattern<'a>>,
) -> Result<()> {
    let config = run.config();
    let (dim, heads) = (config.usize("dim")?, config.usize("num_heads")?);
    let (layer, layout) = Layout::build(|names| CogViewAttention::new(names.here(), dim, heads, alpha, Init::NORMAL_02))?;
    let (mem, x) = (memory_of(run)?, run.input("x")?);
    let (z, memory) = with_memory(mem.as_ref(), &x)?;
    let [batch, queries, _] = x.dims("input `x`")?;
    drop((x, mem));
    let pattern = pattern(run, batch, memory, queries)?;
    let p = run.params(&layout)?;
    let (y, saved) = layer.forward(&p, &z, memory, &pattern)?;
    run.output("y", &y);
    if run.backward() {
        let mut g = run.zero_grads(&p);
        let dz = layer.backward(&p, &mut g, &z, memory, &pattern, saved, &run.cotangent("y", y.shape())?)?;
        let (d_mem, dx) = split_memory(dz, memory)?;
        run.grad_input("x", &dx);
        if run.has_input("mem") {
            run.grad_input("mem", &d_mem);
        }
        run.grad_params(&g);
    }
    Ok(())
}

/// A random explicit mask as an input, with some queries that see nothing.
pub fn draw_mask(draw: &mut Draw, batch: usize, queries: usize, keys: usize) -> Result<()> {
    let share = draw.rng.range(0.2, 0.9);
    let row = |rng: &mut Rng| {
        let blind = rng.chance(0.2);
        (0..keys).map(|_| i64::from(!blind && rng.chance(share))).collect::<Vec<_>>()
    };
    let data = (0..batch * queries).flat_map(|_| row(draw.rng)).collect();
    draw.ints("mask", [batch, queries, keys], data)
}

/// Random `mask` and what goes with it.
pub fn sample_mask(rng: &mut Rng, config: &mut Config) {
    let mask = rng.pick(&["causal", "prefix", "explicit"]);
    config.set("mask", mask);
    if mask == "prefix" {
        config.set("sep", rng.below(8));
    }
}

/// `x`, sometimes `mem`, and the mask of a configuration.
pub fn draw_with_memory(config: &Config, draw: &mut Draw) -> Result<()> {
    let (batch, n, memory) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 12), draw.size("memory", 0, 5));
    let dim = config.positive("dim")?;
    draw.normal("x", [batch, n, dim]);
    if memory > 0 {
        draw.normal("mem", [batch, memory, dim]);
    }
    if config.str("mask")? == "explicit" { draw_mask(draw, batch, n, memory + n) } else { Ok(()) }
}

/// Batch, memory and queries among the shapes of the inputs.
pub fn shapes_with_memory(inputs: &Shapes) -> Result<[usize; 3]> {
    let ([batch, queries, _], memory) = (inputs.dims("x")?, inputs.dims("mem").map_or(0, |[_, m, _]| m));
    Ok([batch, memory, queries])
}

/// The scores that one image takes under the configuration's mask.
pub fn masked_pairs(config: &Config, memory: usize, queries: usize) -> Result<usize> {
    let prefix = if config.str("mask")? == "prefix" { memory.saturating_add(config.usize("sep")?) } else { 0 };
    Ok(if config.str("mask")? == "explicit" {
        queries * (memory + queries)
    } else {
        Pattern::causal(memory, queries, prefix).pairs(queries)
    })
}

/// `attention.pb_relax`.
pub struct PbRelax;

impl Operation for PbRelax {
    const NAME: &'static str = "attention.pb_relax";
    const PAPER: &'static str = "2105.13290 CogView";

    fn sample(rng: &mut Rng) -> Config {
        let heads = rng.between(1, 4);
        let mut config = Config::default();
        config.set("dim", heads * rng.between(1, 7)).set("num_heads", heads).set("alpha", rng.range(1.0, 64.0));
        sample_mask(rng, &mut config);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_with_memory(config, draw)
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, m, n] = shapes_with_memory(inputs)?;
        let c = config.positive("dim")?;
        let (layer, _) = Layout::build(|names| CogViewAttention::new(names.here(), c, config.usize("num_heads")?, 1.0, Init::NORMAL_02))?;
        // With memory, both are kept in one piece.
        let joined = Cost { flops: 0, activation_bytes: if m > 0 { 4 * b * (m + n) * c } else { 0 } };
        Ok(Some(layer.cost(b, m + n, n, masked_pairs(config, m, n)?) + joined))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        Some(Benchmark::new(size).set("alpha", 32.0).set("mask", "causal").size("memory", 0))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let alpha = run.config().f64_or("alpha", 32.0)?;
        run_with_memory(run, alpha, |run, batch, memory, queries| Mask::of(run)?.pattern(batch, memory, queries))
    }
}
