//! Softmax attention in which every query sees ranges of a list of keys: causal masks, prefixes, windows with pivots.
//!
//! The keys of an image are a list of tokens (gathered by index, or all in order). Its first `far` entries are shared by all
//! windows; the others are near. Query i sees the first `far_i` of the former, with a constant added to the score, and the
//! entries `from..to` of the latter. Blocks of keys that no query of a block sees are not computed, so a causal mask costs half
//! and windows cost what they see; there is no N×N matrix. Alternatively an explicit mask says who sees whom.
//!
//! Scores are taken in the order of PB-relax (CogView, arXiv 2105.13290), which cannot overflow where the result does not:
//!
//! `s = (q/(α√d)) kᵀ`, `P = softmax(α (s − max s))`.
//!
//! An invisible key is left out, or (CogView) has the finite score −10000: where a row sees nothing above −9000 its block of
//! queries is computed again with all keys; elsewhere `e^{−1000}` is 0 and both are the same.
//!
//! Backward, with `m` 1 for visible keys: `dV = Pᵀ dO`, `dP = dO Vᵀ`, `dS = m ∘ P ∘ (dP − Σ P ∘ dP)`, `dQ = dS K/√d`,
//! `dK = dSᵀ Q/√d`. `Σ_j P_ij dP_ij = Σ_c O_ic dO_ic` is summed as a matrix product sums it: for a row with one visible key it
//! equals `dP` bit for bit, and dS is 0 however large k is.

use std::ops::Range;

use super::attention::Operand;
use super::{exp_of_softmax, get, put};
use crate::linalg::{ColumnsMut, Mat, MatMut, par_blocks};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

/// Keys whose scores exist at a time.
const CHUNK: usize = 512;
/// What a finite score must be above the best visible one to count.
const NEGLIGIBLE: f64 = 1000.0;

/// What a query sees: entries `0..far` and `from..to` of the list; far ones only if the near ones begin later than they could.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// How many of the far entries.
    pub far: u32,
    /// The first near entry.
    pub from: u32,
    /// The near entry after the last.
    pub to: u32,
}

/// Who sees whom.
#[derive(Clone, Debug)]
pub struct Pattern<'a> {
    /// The list of keys: tokens of the image, `keys` for all images or for each one after the other.
    pub tokens: Vec<u32>,
    /// The length of the list.
    pub keys: usize,
    /// The far entries, at the beginning of the list.
    pub far: usize,
    /// Added to the scores of far entries.
    pub far_bias: f64,
    /// One per query, for all images or for each; `from` and `to` are the same for all images.
    pub spans: Vec<Span>,
    /// 1 = visible, `[batch, queries, keys]`; then the spans must be the whole list.
    pub mask: Option<&'a [i64]>,
    /// The score of an invisible key; `None` leaves it out.
    pub hidden: Option<f64>,
    /// Queries computed together.
    pub query_block: usize,
    /// Keys packed together.
    pub key_block: usize,
}

/// The sizes of such an attention. Operands hold `tokens` rows per image; the queries are `queries` of them from `first` on.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Images.
    pub batch: usize,
    /// Heads h.
    pub heads: usize,
    /// Width d of a head.
    pub dim: usize,
    /// Rows per image of q, k and v.
    pub tokens: usize,
    /// The first row of an image that is a query.
    pub first: usize,
    /// Queries per image.
    pub queries: usize,
    /// The factor on the scores, 1/√d.
    pub scale: f64,
    /// α.
    pub relax: f64,
}

impl Pattern<'_> {
    /// Every query sees the keys up to its own place, `memory` keys standing before the first query, and always the first `prefix`.
    pub fn causal(memory: usize, queries: usize, prefix: usize) -> Self {
        let keys = memory + queries;
        let see = |i: usize| Span { far: 0, from: 0, to: (memory + i + 1).max(prefix.min(keys)) as u32 };
        Pattern {
            tokens: (0..keys as u32).collect(),
            keys,
            far: 0,
            far_bias: 0.0,
            spans: (0..queries).map(see).collect(),
            mask: None,
            hidden: None,
            query_block: 64,
            key_block: 64,
        }
    }

    fn list(&self, image: usize) -> &[u32] {
        if self.tokens.len() == self.keys { &self.tokens } else { &self.tokens[image * self.keys..(image + 1) * self.keys] }
    }

    fn spans(&self, image: usize, sizes: &Sizes) -> &[Span] {
        let n = sizes.queries;
        if self.spans.len() == n { &self.spans } else { &self.spans[image * n..(image + 1) * n] }
    }

    /// The blocks of the list: start and length of each.
    fn blocks(&self, range: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
        let step = self.key_block;
        range.clone().step_by(step).map(move |start| (start, step.min(range.end - start)))
    }

    /// All blocks, far ones first.
    fn all_blocks(&self) -> impl Iterator<Item = (usize, usize)> {
        self.blocks(0..self.far).chain(self.blocks(self.far..self.keys))
    }

    fn block_count(&self) -> usize {
        self.far.div_ceil(self.key_block) + (self.keys - self.far).div_ceil(self.key_block)
    }

    /// Which of all blocks begins at `start`.
    fn block_index(&self, start: usize) -> usize {
        if start < self.far { start / self.key_block } else { self.far.div_ceil(self.key_block) + (start - self.far) / self.key_block }
    }

    /// The parts of the list whose scores with the queries of `spans` are computed, each at most about a chunk, none partly far.
    fn chunks(&self, spans: &[Span], everything: bool) -> impl Iterator<Item = Range<usize>> {
        let (far, step) = (self.far, self.key_block);
        let near = if everything {
            far..self.keys
        } else {
            let from = spans.iter().map(|s| s.from as usize).min().unwrap_or(far);
            let to = spans.iter().map(|s| s.to as usize).max().unwrap_or(far);
            far + (from - far) / step * step..(far + (to - far).next_multiple_of(step)).min(self.keys)
        };
        let size = (CHUNK / step).max(1) * step;
        let cut = move |range: Range<usize>| range.clone().step_by(size).map(move |start| start..(start + size).min(range.end));
        // Where the near keys begin at the beginning, no far one lies before them.
        let far = if everything || spans.iter().any(|s| s.from as usize > far) { far } else { 0 };
        cut(0..far).chain(cut(near))
    }

    /// The pairs (query, key) of one image whose scores are computed: by the shape alone.
    pub fn pairs(&self, queries: usize) -> usize {
        self.spans[..queries]
            .chunks(self.query_block)
            .map(|spans| spans.len() * self.chunks(spans, false).map(|c| c.len()).sum::<usize>())
            .sum()
    }

    /// Gives invisible pairs of some rows of scores the score `value`; the first query is `first`, the columns are `columns`.
    fn hide<T: Float>(&self, scores: &mut [T], spans: &[Span], first: usize, image: usize, columns: &Range<usize>, value: T) {
        let n = columns.len();
        if let Some(mask) = self.mask {
            let queries = self.spans.len();
            for (i, row) in scores.chunks_exact_mut(n).enumerate() {
                let from = (image * queries + first + i) * self.keys + columns.start;
                for (x, &m) in row.iter_mut().zip(&mask[from..from + n]) {
                    if m == 0 {
                        *x = value;
                    }
                }
            }
            return;
        }
        for (row, span) in scores.chunks_exact_mut(n).zip(spans) {
            let (lo, hi) = if columns.start < self.far { (0, span.far as usize) } else { (span.from as usize, span.to as usize) };
            let lo = lo.saturating_sub(columns.start).min(n);
            let hi = hi.saturating_sub(columns.start).clamp(lo, n);
            row[..lo].fill(value);
            row[hi..].fill(value);
        }
    }

    /// Whether a block of queries whose best visible scores are these has to be computed with all keys.
    fn counts_hidden<T: Float>(&self, best: impl Iterator<Item = T>, relax: f64) -> bool {
        let Some(hidden) = self.hidden.filter(|_| self.mask.is_none()) else { return false };
        let floor = T::from_f64((hidden + NEGLIGIBLE) / relax);
        best.into_iter().any(|max| max <= floor)
    }

    /// The relaxed score of an invisible key.
    fn hidden_score<T: Float>(&self, everything: bool, relax: f64) -> T {
        match self.hidden {
            Some(hidden) if everything || self.mask.is_some() => T::from_f64(hidden / relax),
            _ => T::NEG_INFINITY,
        }
    }
}

/// Scores of some rows → exponentials `e^{α (s − max)}`, with the running maximum and sum of the online softmax.
struct Softmax<'a, T> {
    scores: &'a mut [T],
    keys: usize,
    shift: T,
    relax: T,
    /// Per row: maximum and sum so far, and the factor by which earlier results must shrink.
    state: &'a mut [[T; 3]],
}

impl<T: Float> Kernel<T> for Softmax<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let (shift, relax) = (V::splat(self.shift), V::splat(self.relax));
        for (row, state) in self.scores.chunks_exact_mut(self.keys).zip(self.state) {
            let mut best = V::splat(T::NEG_INFINITY);
            let mut j = 0;
            while j < row.len() {
                best = (get::<T, V>(row, j, T::NEG_INFINITY) + shift).max(best);
                j += LANES;
            }
            let max = best.largest().larger(state[0]);
            if max == T::NEG_INFINITY {
                row.fill(T::ZERO);
                state[2] = T::ONE;
                continue;
            }
            let (center, mut sum) = (V::splat(max), V::splat(T::ZERO));
            j = 0;
            while j < row.len() {
                let e = exp_of_softmax::<T, V>((get::<T, V>(row, j, T::NEG_INFINITY) + shift - center) * relax);
                sum = sum + e;
                put(e, row, j);
                j += LANES;
            }
            let shrink = if state[0] == max || state[0] == T::NEG_INFINITY {
                T::ONE
            } else {
                (V::splat(state[0] - max) * relax).exp().to_array()[0]
            };
            *state = [max, state[1].fused(shrink, sum.sum()), shrink];
        }
    }
}

/// Scores → probabilities with known maximum and `1/Σ`.
struct Again<'a, T> {
    scores: &'a mut [T],
    keys: usize,
    shift: T,
    relax: T,
    stats: &'a [T],
}

impl<T: Float> Kernel<T> for Again<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let (shift, relax) = (V::splat(self.shift), V::splat(self.relax));
        for (row, stats) in self.scores.chunks_exact_mut(self.keys).zip(self.stats.chunks_exact(2)) {
            let (max, inverse) = (V::splat(stats[0]), V::splat(stats[1]));
            let mut j = 0;
            while j < row.len() {
                put(exp_of_softmax::<T, V>((get::<T, V>(row, j, T::ZERO) + shift - max) * relax) * inverse, row, j);
                j += LANES;
            }
        }
    }
}

/// `dS = P ∘ (dP − δ)`, in place of P.
struct ScoreGradient<'a, T> {
    p: &'a mut [T],
    dp: &'a [T],
    delta: &'a [T],
    keys: usize,
}

impl<T: Float> Kernel<T> for ScoreGradient<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        for ((p, dp), &delta) in self.p.chunks_exact_mut(self.keys).zip(self.dp.chunks_exact(self.keys)).zip(self.delta) {
            let delta = V::splat(delta);
            let mut j = 0;
            while j < p.len() {
                put(get::<T, V>(p, j, T::ZERO) * (get::<T, V>(dp, j, T::ZERO) - delta), p, j);
                j += LANES;
            }
        }
    }
}

/// Inner products of rows as one chain of fused multiply-adds each: what a matrix product gives.
struct RowChains<'a, T> {
    out: &'a mut [T],
    x: &'a [T],
    y: &'a [T],
    width: usize,
}

impl<T: Float> Kernel<T> for RowChains<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        for ((out, x), y) in self.out.iter_mut().zip(self.x.chunks_exact(self.width)).zip(self.y.chunks_exact(self.width)) {
            *out = x.iter().zip(y).fold(T::ZERO, |sum, (&x, &y)| x.fused(y, sum));
        }
    }
}

/// Rows `tokens` of one head.
fn gather<'t, T: Float>(out: &mut [T], x: &Operand<T>, tokens: impl Iterator<Item = &'t u32>, first: usize, column: usize, width: usize) {
    for (row, &t) in out.chunks_exact_mut(width).zip(tokens) {
        let from = (first + t as usize) * x.stride + x.offset + column;
        row.copy_from_slice(&x.data[from..from + width]);
    }
}

/// Consecutive rows of one head, times `scale`.
fn rows_of<T: Float>(out: &mut [T], x: &Operand<T>, first: usize, column: usize, width: usize, scale: T) {
    for (i, row) in out.chunks_exact_mut(width).enumerate() {
        let from = (first + i) * x.stride + x.offset + column;
        row.iter_mut().zip(&x.data[from..from + width]).for_each(|(y, &x)| *y = x * scale);
    }
}

/// Forward: `out` `[batch · queries, heads · dim]` is written, and `stats` `[batch, heads, queries, 2]` with `(max s, 1/Σ)`.
pub fn forward<T: Float>(out: &mut [T], stats: &mut [T], [q, k, v]: [Operand<T>; 3], pattern: &Pattern, sizes: Sizes) {
    let Sizes { batch, heads, dim, tokens, first, queries, scale, relax } = sizes;
    assert!(out.len() == batch * queries * heads * dim && stats.len() == batch * heads * queries * 2);
    assert!(first + queries <= tokens && pattern.spans.len().is_multiple_of(queries.max(1)) && pattern.far <= pattern.keys);
    if batch * heads * queries == 0 {
        return;
    }
    let (q_scale, alpha) = (T::from_f64(scale / relax), T::from_f64(relax));
    let block = pattern.key_block.min(pattern.keys);
    let (k_step, v_step) = (T::packed_len(dim, block), T::packed_len(block, dim));
    let rows = pattern.query_block.min(queries);
    let width = (CHUNK / pattern.key_block).max(1) * pattern.key_block;
    let out = ColumnsMut::new(out, heads * dim);
    let stats = ColumnsMut::new(stats, 2);
    let work = |b: usize, a: usize, mut out: ColumnsMut<T>, mut stats: ColumnsMut<T>| {
        let (list, spans, column) = (pattern.list(b), pattern.spans(b, &sizes), a * dim);
        let mut kv = Buffer::<T>::scratch(block * dim);
        let mut k_packed = Buffer::<T>::scratch(k_step * pattern.block_count());
        let mut v_packed = Buffer::<T>::scratch(v_step * pattern.block_count());
        for (index, (start, n)) in pattern.all_blocks().enumerate() {
            let tokens_of = || list[start..start + n].iter();
            gather(&mut kv[..n * dim], &k, tokens_of(), b * tokens, column, dim);
            T::pack(Mat::new(&kv[..n * dim], n, dim).t(), &mut k_packed[index * k_step..]);
            gather(&mut kv[..n * dim], &v, tokens_of(), b * tokens, column, dim);
            T::pack(Mat::new(&kv[..n * dim], n, dim), &mut v_packed[index * v_step..]);
        }
        let (mut q_rows, mut o) = (Buffer::<T>::scratch(rows * dim), Buffer::<T>::scratch(rows * dim));
        let mut scores = Buffer::<T>::scratch(rows * width.min(pattern.keys.next_multiple_of(LANES)));
        let mut state = vec![[T::ZERO; 3]; rows];
        for (at, spans) in spans.chunks(rows).enumerate() {
            let (from, m) = (at * rows, spans.len());
            let (state, o) = (&mut state[..m], &mut o[..m * dim]);
            rows_of(&mut q_rows[..m * dim], &q, b * tokens + first + from, column, dim, q_scale);
            for everything in [false, true] {
                state.fill([T::NEG_INFINITY, T::ZERO, T::ONE]);
                o.fill(T::ZERO);
                for columns in pattern.chunks(spans, everything) {
                    let n = columns.len();
                    let scores = &mut scores[..m * n];
                    for (start, size) in pattern.blocks(columns.clone()) {
                        let packed = &k_packed[pattern.block_index(start) * k_step..];
                        let part = MatMut::strided(&mut scores[start - columns.start..], m, size, n);
                        T::multiply_packed(Mat::new(&q_rows, m, dim), packed, part, false);
                    }
                    pattern.hide(scores, spans, from, b, &columns, pattern.hidden_score(everything, relax));
                    let shift = T::from_f64(if columns.start < pattern.far { pattern.far_bias / relax } else { 0.0 });
                    T::dispatch(Softmax { scores, keys: n, shift, relax: alpha, state });
                    for (o, state) in o.chunks_exact_mut(dim).zip(state.iter()).filter(|(_, state)| state[2] != T::ONE) {
                        o.iter_mut().for_each(|x| *x *= state[2]);
                    }
                    for (start, size) in pattern.blocks(columns.clone()) {
                        let packed = &v_packed[pattern.block_index(start) * v_step..];
                        let part = Mat::strided(&scores[start - columns.start..], m, size, n, 1);
                        T::multiply_packed(part, packed, MatMut::new(o, m, dim), true);
                    }
                }
                if !pattern.counts_hidden(state.iter().map(|s| s[0]), relax) {
                    break;
                }
            }
            for (i, (o, state)) in o.chunks_exact(dim).zip(state.iter()).enumerate() {
                let inverse = if state[1] == T::ZERO { T::ZERO } else { T::ONE / state[1] };
                stats.row(from + i).copy_from_slice(&[state[0], inverse]);
                out.row(from + i).iter_mut().zip(o).for_each(|(y, &x)| *y = x * inverse);
            }
        }
    };
    par_blocks([out], [stats], batch, heads, |b, a, [out], [stats]| work(b, a, out, stats));
}

/// Backward: what [`forward`] was given, its outputs, and the gradient `d_out` of `out`. `grads` are dq, dk and dv as column blocks
/// of `[batch · tokens, heads · dim]`; rows that are no queries, and tokens that are nobody's keys, must hold zeros before.
pub fn backward<T: Float>(
    grads: [ColumnsMut<T>; 3],
    d_out: &[T],
    out: &[T],
    stats: &[T],
    [q, k, v]: [Operand<T>; 3],
    pattern: &Pattern,
    sizes: Sizes,
) {
    let Sizes { batch, heads, dim, tokens, first, queries, scale, relax } = sizes;
    assert!(out.len() == batch * queries * heads * dim && d_out.len() == out.len() && stats.len() == batch * heads * queries * 2);
    if batch * heads * queries == 0 {
        return;
    }
    let (q_scale, alpha, scale) = (T::from_f64(scale / relax), T::from_f64(relax), T::from_f64(scale));
    let block = pattern.key_block.min(pattern.keys);
    let (t_step, step) = (T::packed_len(dim, block), T::packed_len(block, dim));
    let rows = pattern.query_block.min(queries);
    let out = Operand { data: out, stride: heads * dim, offset: 0 };
    let d_out = Operand { data: d_out, stride: heads * dim, offset: 0 };
    let work = |b: usize, a: usize, [mut dq, mut dk, mut dv]: [ColumnsMut<T>; 3]| {
        let (list, spans, column) = (pattern.list(b), pattern.spans(b, &sizes), a * dim);
        let scratch = |m: usize, n: usize| Buffer::<T>::scratch(m * n);
        let mut kv = scratch(block, dim);
        let count = pattern.block_count();
        let (mut k_packed, mut kt_packed, mut vt_packed) = (scratch(step, count), scratch(t_step, count), scratch(t_step, count));
        for (index, (start, n)) in pattern.all_blocks().enumerate() {
            let tokens_of = || list[start..start + n].iter();
            gather(&mut kv[..n * dim], &k, tokens_of(), b * tokens, column, dim);
            T::pack(Mat::new(&kv[..n * dim], n, dim), &mut k_packed[index * step..]);
            T::pack(Mat::new(&kv[..n * dim], n, dim).t(), &mut kt_packed[index * t_step..]);
            gather(&mut kv[..n * dim], &v, tokens_of(), b * tokens, column, dim);
            T::pack(Mat::new(&kv[..n * dim], n, dim).t(), &mut vt_packed[index * t_step..]);
        }
        let (mut dk_rows, mut dv_rows) = (Buffer::<T>::zeros(pattern.keys * dim), Buffer::<T>::zeros(pattern.keys * dim));
        let (mut q_rows, mut o_rows, mut do_rows, mut dq_rows) =
            (scratch(rows, dim), scratch(rows, dim), scratch(rows, dim), scratch(rows, dim));
        let packed = || Buffer::<T>::scratch(T::packed_len(rows, dim));
        let (mut q_packed, mut do_packed) = (packed(), packed());
        let (mut p, mut dp, mut delta) = (scratch(rows, block), scratch(rows, block), scratch(rows, 1));
        for (at, spans) in spans.chunks(rows).enumerate() {
            let (from, m) = (at * rows, spans.len());
            rows_of(&mut q_rows[..m * dim], &q, b * tokens + first + from, column, dim, q_scale);
            rows_of(&mut o_rows[..m * dim], &out, b * queries + from, column, dim, T::ONE);
            rows_of(&mut do_rows[..m * dim], &d_out, b * queries + from, column, dim, T::ONE);
            let stats = &stats[((b * heads + a) * queries + from) * 2..][..2 * m];
            let (q_rows, do_rows) = (Mat::new(&q_rows, m, dim), Mat::new(&do_rows, m, dim));
            T::pack(q_rows, &mut q_packed);
            T::pack(do_rows, &mut do_packed);
            // δ_i = Σ_c O_ic dO_ic
            T::dispatch(RowChains { out: &mut delta[..m], x: &o_rows[..m * dim], y: &do_rows.data()[..m * dim], width: dim });
            let everything = pattern.counts_hidden(stats.iter().step_by(2).copied(), relax);
            dq_rows[..m * dim].fill(T::ZERO);
            for (start, n) in pattern.chunks(spans, everything).flat_map(|columns| pattern.blocks(columns)) {
                let (index, columns) = (pattern.block_index(start), start..start + n);
                let (p, dp) = (&mut p[..m * n], &mut dp[..m * n]);
                // P = softmax(α s)
                T::multiply_packed(q_rows, &kt_packed[index * t_step..], MatMut::new(p, m, n), false);
                pattern.hide(p, spans, from, b, &columns, pattern.hidden_score(everything, relax));
                let shift = T::from_f64(if start < pattern.far { pattern.far_bias / relax } else { 0.0 });
                T::dispatch(Again { scores: p, keys: n, shift, relax: alpha, stats });
                // dV = Pᵀ dO
                let dv_part = MatMut::new(&mut dv_rows[start * dim..], n, dim);
                T::multiply_packed(Mat::new(p, m, n).t(), &do_packed, dv_part, true);
                // dP = dO Vᵀ, dS = m ∘ P ∘ (dP − δ)
                T::multiply_packed(do_rows, &vt_packed[index * t_step..], MatMut::new(dp, m, n), false);
                T::dispatch(ScoreGradient { p, dp, delta: &delta[..m], keys: n });
                if everything || pattern.mask.is_some() {
                    pattern.hide(p, spans, from, b, &columns, T::ZERO);
                }
                // dQ = dS K/√d, dK = dSᵀ Q/√d
                let ds = Mat::new(p, m, n);
                T::multiply_packed(ds, &k_packed[index * step..], MatMut::new(&mut dq_rows, m, dim), true);
                T::multiply_packed(ds.t(), &q_packed, MatMut::new(&mut dk_rows[start * dim..], n, dim), true);
            }
            for (i, row) in dq_rows[..m * dim].chunks_exact(dim).enumerate() {
                dq.row(first + from + i).iter_mut().zip(row).for_each(|(y, &x)| *y = x * scale);
            }
        }
        for ((&t, dk_row), dv_row) in list.iter().zip(dk_rows.chunks_exact(dim)).zip(dv_rows.chunks_exact(dim)) {
            // The rows of q were divided by α.
            dk.row(t as usize).iter_mut().zip(dk_row).for_each(|(y, &x)| *y += x * alpha);
            dv.row(t as usize).iter_mut().zip(dv_row).for_each(|(y, &x)| *y += x);
        }
    };
    par_blocks(grads, [], batch, heads, |b, a, grads, []| work(b, a, grads));
}
