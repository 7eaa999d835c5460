//! Retention (arXiv 2307.08621): `o_n = Σ_{m≤n} γ^{n−m} (q_n·k_m) v_m + γ^{n+1} q_nᵀ S₀` per image and head, in chunks of c tokens.
//!
//! Inside a chunk `O = ((Q Kᵀ) ∘ D) V + diag(γ^{n+1}) Q S` with `D_nm = γ^{n−m}` for `n ≥ m`, n counted in the chunk and S the state
//! before it; then `S ← γ^c S + Σ γ^{c−1−m} k_m v_mᵀ`. One chunk of all tokens is the parallel form (quadratic), chunks of one token
//! the recurrent one; for fixed c time and memory are linear. Scores exist for [`BLOCK`] rows and columns at a time. q and k are turned
//! by `e^{i(offset + n)θ_j}`, pair by pair, as they are read.
//!
//! Backward, whatever the form was, in chunks of [`BLOCK`] tokens, `P̄ = (Ō Vᵀ) ∘ D`, S̄ the gradient of the state after the chunk:
//! `Q̄ = P̄ K + γ^{n+1} Ō Sᵀ`, `K̄ = P̄ᵀ Q + γ^{c−1−m} V S̄ᵀ`, `V̄ = ((Q Kᵀ) ∘ D)ᵀ Ō + γ^{c−1−m} K S̄`,
//! `S̄ ← γ^c S̄ + Σ γ^{n+1} q_n ō_nᵀ`, from the last chunk to the first; the states are recomputed.
//!
//! Where images times heads are fewer than `TASKS`, a sequence is cut into segments: their own contributions to S and S̄ come
//! first, each from zero, are added up in order, and every segment starts from what it is then given.

use std::ops::Range;

use rayon::prelude::*;

use super::{get, put};
use crate::linalg::{ColumnsMut, Dealt, Mat, MatMut, RowsMut, par_blocks, par_rows};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

/// Rows and columns of scores that exist at a time; tokens of a chunk of the backward pass.
pub const BLOCK: usize = 64;
/// As many tasks as there should be at least.
const TASKS: usize = 8;

/// The sizes and constants of a retention.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Sequences.
    pub batch: usize,
    /// Heads h; head i decays by `γ = 1 − 2^{−5−i}` per token.
    pub heads: usize,
    /// Tokens N.
    pub tokens: usize,
    /// Width of a head of q and k, even.
    pub dim: usize,
    /// Width of a head of v.
    pub value_dim: usize,
    /// Position of the first token.
    pub offset: usize,
    /// q and k are turned by their positions.
    pub rotary: bool,
}

/// `γ` of a head.
pub fn gamma(head: usize) -> f64 {
    1.0 - libm::exp2(-5.0 - head as f64)
}

/// How rows are rescaled, as torchscale does to stay in range: `o_n ← w_n o_n`, where w counts as a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rescale {
    /// Not at all.
    None,
    /// `1/(√ρ_n clamp(Σ_m |A_nm|, 1, 5e4))` with `A = (Q Kᵀ) ∘ D/√ρ`.
    Parallel,
    /// `1/√ρ_n`.
    Recurrent,
    /// `1/(√ρ_n max(1, Σ_m |A_nm|, κ))` inside a chunk, κ the largest column sum of `|S|/Σγ^m` before it, at least 1.
    Chunkwise,
}

/// q, k (`[batch · tokens, heads · dim]`), v (`[batch · tokens, heads · value_dim]`), and the state before the first token
/// (`[batch, heads, dim, value_dim]`).
#[derive(Clone, Copy)]
pub struct Inputs<'a, T> {
    /// q.
    pub q: &'a [T],
    /// k, before the factor `dim^{−1/2}`.
    pub k: &'a [T],
    /// v.
    pub v: &'a [T],
    /// S₀; zeros if there is none.
    pub state: Option<&'a [T]>,
}

/// `cos φ, sin φ` of every token and pair of channels: `[tokens, dim]`, from `e^{iφ(64a + b)} = e^{iφ(64a)} e^{iφ(b)}`.
fn rotation<T: Float>(sizes: &Sizes) -> Buffer<T> {
    let Sizes { tokens, dim, offset, rotary, .. } = *sizes;
    if !rotary {
        return Buffer::scratch(0);
    }
    let pairs = dim / 2;
    let theta: Vec<f64> =
        (0..pairs).map(|j| if pairs == 1 { 1.0 } else { libm::pow(10_000.0, -(j as f64) / (pairs - 1) as f64) }).collect();
    let turns = |n: usize| theta.iter().map(move |t| (libm::cos(n as f64 * t), libm::sin(n as f64 * t)));
    let fine: Vec<(f64, f64)> = (0..BLOCK.min(tokens)).flat_map(turns).collect();
    let mut table = Buffer::<T>::scratch(tokens * dim);
    table.par_chunks_mut((BLOCK * dim).max(1)).enumerate().for_each(|(block, rows)| {
        let coarse: Vec<(f64, f64)> = turns(offset + block * BLOCK).collect();
        for (row, fine) in rows.chunks_exact_mut(dim).zip(fine.chunks_exact(pairs)) {
            for ((pair, (c, s)), (c0, s0)) in row.chunks_exact_mut(2).zip(fine).zip(&coarse) {
                pair[0] = T::from_f64(c0 * c - s0 * s);
                pair[1] = T::from_f64(s0 * c + c0 * s);
            }
        }
    });
    table
}

/// Rows of a head, turned (`sign` 1) or turned back (−1), and scaled.
struct Turn<'a, T> {
    out: &'a mut [T],
    x: Mat<'a, T>,
    /// Empty: no turning.
    table: &'a [T],
    scale: T,
    sign: T,
}

impl<T: Float> Kernel<T> for Turn<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.x.cols();
        for (i, out) in self.out.chunks_exact_mut(width).enumerate() {
            let x = &self.x.data()[i * self.x.row_stride()..][..width];
            if self.table.is_empty() {
                out.iter_mut().zip(x).for_each(|(y, &x)| *y = x * self.scale);
                continue;
            }
            let table = &self.table[i * width..(i + 1) * width];
            for ((y, x), t) in out.chunks_exact_mut(2).zip(x.chunks_exact(2)).zip(table.chunks_exact(2)) {
                let (c, s) = (t[0] * self.scale, t[1] * self.scale * self.sign);
                y[0] = x[0] * c - x[1] * s;
                y[1] = x[1] * c + x[0] * s;
            }
        }
    }
}

/// Scores of queries `first..` of a chunk with keys `key..` of it, times D; adds the sums of magnitudes.
struct Decay<'a, T> {
    scores: &'a mut [T],
    keys: usize,
    /// `γ^{L−1} … γ, 1, 0, 0, …`: row n of D reads a run of it.
    powers: &'a [T],
    /// Where row `first` starts reading.
    from: usize,
    sums: Option<&'a mut [T]>,
}

impl<T: Float> Kernel<T> for Decay<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        for (i, row) in self.scores.chunks_exact_mut(self.keys).enumerate() {
            let powers = &self.powers[self.from - i..][..self.keys];
            let mut sum = V::splat(T::ZERO);
            let mut j = 0;
            while j < row.len() {
                let a = get::<T, V>(row, j, T::ZERO) * get::<T, V>(powers, j, T::ZERO);
                sum = sum + a.abs();
                put(a, row, j);
                j += LANES;
            }
            if let Some(sums) = &mut self.sums {
                sums[i] += sum.sum();
            }
        }
    }
}

/// `x[i] ← x[i] · by[i]`, row by row.
struct ScaleRows<'a, T> {
    x: &'a mut [T],
    by: &'a [T],
    width: usize,
}

impl<T: Float> Kernel<T> for ScaleRows<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        for (row, &by) in self.x.chunks_exact_mut(self.width).zip(self.by) {
            let by = V::splat(by);
            let mut j = 0;
            while j < row.len() {
                put(get::<T, V>(row, j, T::ZERO) * by, row, j);
                j += LANES;
            }
        }
    }
}

fn scale_rows<T: Float>(x: &mut [T], by: &[T], width: usize) {
    T::dispatch(ScaleRows { x, by, width });
}

/// The powers of γ that chunks of up to `len` tokens need.
struct Powers<T: Float> {
    /// `γ^{L−1} … 1`, then zeros.
    falling: Buffer<T>,
    /// `γ¹ … γ^L`.
    rising: Buffer<T>,
    len: usize,
}

impl<T: Float> Powers<T> {
    fn new(head: usize, len: usize) -> Self {
        let (mut falling, mut rising) = (Buffer::zeros(len + BLOCK), Buffer::scratch(len));
        let (gamma, mut power) = (gamma(head), 1.0);
        for t in 0..len {
            falling[len - 1 - t] = T::from_f64(power);
            power *= gamma;
            rising[t] = T::from_f64(power);
        }
        Powers { falling, rising, len }
    }

    /// `γ^{c−1−m}` for the tokens m of a chunk of `c`.
    fn to_end(&self, c: usize) -> &[T] {
        &self.falling[self.len - c..self.len]
    }

    /// Times D for queries `q..` and keys `k..` of a chunk.
    fn decay(&self, scores: &mut [T], keys: usize, q: usize, k: usize, sums: Option<&mut [T]>) {
        T::dispatch(Decay { scores, keys, powers: &self.falling, from: self.len - 1 + k - q, sums });
    }
}

/// The tokens of every segment, and the same as lists of rows.
fn segments(tokens: usize, chunk: usize, wanted: usize) -> Vec<Range<usize>> {
    let chunks = tokens.div_ceil(chunk);
    let count = wanted.min(chunks).max(1);
    (0..count).map(|s| chunks * s / count * chunk..(chunks * (s + 1) / count * chunk).min(tokens)).collect()
}

/// One head of one sequence.
struct Head<'a, T> {
    inputs: Inputs<'a, T>,
    sizes: Sizes,
    turns: &'a [T],
    batch: usize,
    head: usize,
}

impl<T: Float> Head<'_, T> {
    fn scale(&self) -> T {
        T::from_f64(1.0 / (self.sizes.dim as f64).sqrt())
    }

    fn rows<'s>(&self, data: &'s [T], tokens: Range<usize>, width: usize) -> Mat<'s, T> {
        let stride = self.sizes.heads * width;
        let from = (self.batch * self.sizes.tokens + tokens.start) * stride + self.head * width;
        let len = if tokens.is_empty() { 0 } else { (tokens.len() - 1) * stride + width };
        Mat::strided(&data[from..from + len], tokens.len(), width, stride, 1)
    }

    fn values(&self, tokens: Range<usize>) -> Mat<'_, T> {
        self.rows(self.inputs.v, tokens, self.sizes.value_dim)
    }

    fn turn(&self, out: &mut [T], x: &[T], tokens: Range<usize>, scale: T) {
        let dim = self.sizes.dim;
        let table = if self.sizes.rotary { &self.turns[tokens.start * dim..tokens.end * dim] } else { &[] };
        T::dispatch(Turn { out: &mut out[..tokens.len() * dim], x: self.rows(x, tokens, dim), table, scale, sign: T::ONE });
    }

    fn queries(&self, out: &mut [T], tokens: Range<usize>) {
        self.turn(out, self.inputs.q, tokens, T::ONE);
    }

    fn keys(&self, out: &mut [T], tokens: Range<usize>) {
        self.turn(out, self.inputs.k, tokens, self.scale());
    }

    /// `S₀` of this head, or zeros.
    fn first_state(&self, state: &mut [T]) {
        let len = state.len();
        match self.inputs.state {
            None => state.fill(T::ZERO),
            Some(all) => state.copy_from_slice(&all[(self.batch * self.sizes.heads + self.head) * len..][..len]),
        }
    }

    /// The state after `tokens` (whole blocks but the last) from the one before.
    fn advance(&self, powers: &Powers<T>, tokens: Range<usize>, state: &mut [T]) {
        let Sizes { dim, value_dim, .. } = self.sizes;
        let (mut k, mut v_packed) = (Buffer::<T>::scratch(BLOCK * dim), Buffer::<T>::scratch(T::packed_len(BLOCK, value_dim)));
        for from in tokens.clone().step_by(BLOCK) {
            let block = from..(from + BLOCK).min(tokens.end);
            self.keys(&mut k, block.clone());
            T::pack(self.values(block.clone()), &mut v_packed);
            self.absorb(powers, &mut k, &v_packed, block.len(), state);
        }
    }

    /// `S ← γ^c S + Σ γ^{c−1−m} k_m v_mᵀ` for a block; scales the keys.
    fn absorb(&self, powers: &Powers<T>, k: &mut [T], v_packed: &[T], c: usize, state: &mut [T]) {
        let Sizes { dim, value_dim, .. } = self.sizes;
        let decay = powers.rising[c - 1];
        state.iter_mut().for_each(|s| *s *= decay);
        let k = &mut k[..c * dim];
        scale_rows(k, powers.to_end(c), dim);
        T::multiply_packed(Mat::new(k, c, dim).t(), v_packed, MatMut::new(state, dim, value_dim), true);
    }

    /// `S̄ ← γ^c S̄ + Σ γ^{n+1} q_n ō_nᵀ` for a block; scales the queries.
    fn absorb_back(&self, powers: &Powers<T>, q: &mut [T], do_packed: &[T], c: usize, d_state: &mut [T]) {
        let Sizes { dim, value_dim, .. } = self.sizes;
        let decay = powers.rising[c - 1];
        d_state.iter_mut().for_each(|s| *s *= decay);
        let q = &mut q[..c * dim];
        scale_rows(q, &powers.rising[..c], dim);
        T::multiply_packed(Mat::new(q, c, dim).t(), do_packed, MatMut::new(d_state, dim, value_dim), true);
    }

    /// The outputs of a segment in chunks of `chunk` tokens; `state` is the one before and becomes the one after (unless nobody asks).
    #[allow(clippy::too_many_arguments)]
    fn forward(
        &self,
        tokens: Range<usize>,
        chunk: usize,
        rescale: Rescale,
        state: &mut [T],
        want_state: bool,
        out: &mut RowsMut<T>,
        weights: &mut [T],
    ) {
        let Sizes { dim, value_dim, .. } = self.sizes;
        let chunk = chunk.min(tokens.len()).max(1);
        let (powers, gamma, blocks) = (Powers::<T>::new(self.head, chunk), gamma(self.head), chunk.div_ceil(BLOCK));
        let rows = BLOCK.min(chunk);
        let (k_step, v_step) = (T::packed_len(dim, rows), T::packed_len(rows, value_dim));
        let (mut k, mut q) = (Buffer::<T>::scratch(chunk * dim), Buffer::<T>::scratch(rows * dim));
        let (mut k_packed, mut v_packed) = (Buffer::<T>::scratch(blocks * k_step), Buffer::<T>::scratch(blocks * v_step));
        let mut s_packed = Buffer::<T>::scratch(T::packed_len(dim, value_dim));
        let (mut scores, mut o) = (Buffer::<T>::scratch(rows * rows), Buffer::<T>::scratch(rows * value_dim));
        let (mut sums, mut w) = ([T::ZERO; BLOCK], [T::ONE; BLOCK]);
        let total = (1.0 - libm::pow(gamma, chunk as f64)) / (1.0 - gamma);
        let mut has_state = self.inputs.state.is_some() || tokens.start > 0;
        for from in tokens.clone().step_by(chunk) {
            let whole = from..(from + chunk).min(tokens.end);
            let c = whole.len();
            let block = |j: usize| whole.start + j * BLOCK..(whole.start + (j + 1) * BLOCK).min(whole.end);
            for j in 0..c.div_ceil(BLOCK) {
                let (at, b) = (j * BLOCK, block(j));
                self.keys(&mut k[at * dim..], b.clone());
                T::pack(Mat::new(&k[at * dim..], b.len(), dim).t(), &mut k_packed[j * k_step..]);
                T::pack(self.values(b), &mut v_packed[j * v_step..]);
            }
            if has_state {
                T::pack(Mat::new(state, dim, value_dim), &mut s_packed);
            }
            let largest = if rescale == Rescale::Chunkwise { column_sum(state, value_dim) / total } else { 0.0 };
            for i in 0..c.div_ceil(BLOCK) {
                let (first, m) = (i * BLOCK, block(i).len());
                self.queries(&mut q, block(i));
                let q = Mat::new(&q, m, dim);
                let o = &mut o[..m * value_dim];
                if has_state {
                    T::multiply_packed(q, &s_packed, MatMut::new(o, m, value_dim), false);
                    scale_rows(o, &powers.rising[first..first + m], value_dim);
                }
                sums.fill(T::ZERO);
                for j in 0..=i {
                    let n = block(j).len();
                    let scores = &mut scores[..m * n];
                    T::multiply_packed(q, &k_packed[j * k_step..], MatMut::new(scores, m, n), false);
                    powers.decay(scores, n, first, j * BLOCK, (rescale != Rescale::None).then_some(&mut sums[..m]));
                    let o = MatMut::new(o, m, value_dim);
                    T::multiply_packed(Mat::new(scores, m, n), &v_packed[j * v_step..], o, has_state || j > 0);
                }
                if rescale != Rescale::None {
                    for (r, (w, sum)) in w[..m].iter_mut().zip(&sums).enumerate() {
                        let position = first + r + if rescale == Rescale::Recurrent { whole.start } else { 0 };
                        let root = ((1.0 - libm::pow(gamma, (position + 1) as f64)) / (1.0 - gamma)).sqrt();
                        let size = sum.to_f64() / root;
                        let divisor = match rescale {
                            Rescale::None | Rescale::Recurrent => 1.0,
                            Rescale::Parallel => size.clamp(1.0, 5e4),
                            Rescale::Chunkwise => size.max(largest).max(1.0),
                        };
                        *w = T::from_f64(1.0 / (root * divisor));
                    }
                    scale_rows(o, &w[..m], value_dim);
                    let at = whole.start - tokens.start + first;
                    weights[at..at + m].copy_from_slice(&w[..m]);
                }
                for (r, o) in o.chunks_exact(value_dim).enumerate() {
                    out.row(whole.start - tokens.start + first + r).copy_from_slice(o);
                }
            }
            if want_state || whole.end < tokens.end {
                let decay = powers.rising[c - 1];
                state.iter_mut().for_each(|s| *s *= decay);
                scale_rows(&mut k[..c * dim], powers.to_end(c), dim);
                for j in 0..c.div_ceil(BLOCK) {
                    let keys = Mat::new(&k[j * BLOCK * dim..], block(j).len(), dim).t();
                    T::multiply_packed(keys, &v_packed[j * v_step..], MatMut::new(state, dim, value_dim), true);
                }
            }
            has_state = true;
        }
    }
}

/// The largest sum of magnitudes of a column.
fn column_sum<T: Float>(state: &[T], width: usize) -> f64 {
    let sum = |j: usize| state[j..].iter().step_by(width).fold(0.0, |sum, x| sum + x.to_f64().abs());
    (0..width).map(sum).fold(0.0, f64::max)
}

/// The contractions of [`forward`], in multiply-adds per sequence: `pairs` of a query and a key block, and state products.
pub fn forward_macs(sizes: &Sizes, chunk: usize, state_in: bool, state_out: bool) -> usize {
    let Sizes { batch, heads, tokens, dim, value_dim, .. } = *sizes;
    if batch * heads * tokens == 0 {
        return 0;
    }
    let parts = segments(tokens, chunk.max(1), TASKS.div_ceil(batch * heads));
    let mut macs = 0;
    for (s, part) in parts.iter().enumerate() {
        let chunk = chunk.min(part.len()).max(1);
        let mut has_state = state_in || s > 0;
        for from in part.clone().step_by(chunk) {
            let c = chunk.min(part.end - from);
            let block = |j: usize| (c - j * BLOCK).min(BLOCK);
            for i in 0..c.div_ceil(BLOCK) {
                macs += (0..=i).map(|j| block(i) * block(j) * (dim + value_dim)).sum::<usize>();
            }
            macs += if has_state { c * dim * value_dim } else { 0 };
            let last = from + c == part.end;
            macs += if !last || (state_out && s + 1 == parts.len()) { c * dim * value_dim } else { 0 };
            has_state = true;
        }
        // A segment's own contribution to the state, where there are several.
        macs += if s + 1 < parts.len() { part.len() * dim * value_dim } else { 0 };
    }
    macs * heads * batch
}

/// What [`forward`] writes.
pub struct Outputs<'a, T> {
    /// `[batch · tokens, heads · value_dim]`, rescaled.
    pub out: &'a mut [T],
    /// w, `[batch, heads, tokens]`; empty without rescaling.
    pub weights: &'a mut [T],
    /// The state after the last token.
    pub state: Option<&'a mut [T]>,
}

/// Forward in chunks of `chunk` tokens.
pub fn forward<T: Float>(outputs: Outputs<T>, inputs: Inputs<T>, chunk: usize, rescale: Rescale, sizes: Sizes) {
    let Sizes { batch, heads, tokens, dim, value_dim, .. } = sizes;
    let Outputs { out, weights, state } = outputs;
    assert!(out.len() == batch * tokens * heads * value_dim && chunk > 0);
    if batch * heads == 0 || tokens == 0 {
        if let (Some(state), Some(before)) = (state, inputs.state) {
            state.copy_from_slice(before);
        }
        return;
    }
    let turns = rotation::<T>(&sizes);
    let parts = segments(tokens, chunk, TASKS.div_ceil(batch * heads));
    let (count, len) = (parts.len(), dim * value_dim);
    let of = |batch: usize, head: usize| Head { inputs, sizes, turns: &turns, batch, head };
    let mut states = Buffer::<T>::zeros(batch * heads * count * len);
    start_states(&mut states, &parts, sizes, of);
    let numbers: Vec<u32> = (0..tokens as u32).collect();
    let rows: Vec<&[u32]> = parts.iter().map(|part| &numbers[part.clone()]).collect();
    let weight_rows = if rescale == Rescale::None { 0 } else { 1 };
    let dealt = |matrix, stacked| Dealt { matrix, stacked, rows: &rows };
    let want_state = state.is_some();
    if weight_rows == 0 {
        par_rows(
            [dealt(ColumnsMut::new(out, heads * value_dim), false)],
            [ColumnsMut::new(&mut states, len)],
            [batch, heads, count],
            |[b, a, s], [mut out], [mut state]| {
                let last = s + 1 == count;
                of(b, a).forward(parts[s].clone(), chunk, rescale, state.row(0), last && want_state, &mut out, &mut []);
            },
        );
    } else {
        // Segments may differ in length; a task's weights pass through a row of the longest.
        par_rows(
            [dealt(ColumnsMut::new(out, heads * value_dim), false), dealt(ColumnsMut::new(weights, 1), true)],
            [ColumnsMut::new(&mut states, len)],
            [batch, heads, count],
            |[b, a, s], [mut out, mut weights], [mut state]| {
                let last = s + 1 == count;
                let mut own = Buffer::<T>::scratch(parts[s].len());
                of(b, a).forward(parts[s].clone(), chunk, rescale, state.row(0), last && want_state, &mut out, &mut own);
                own.iter().enumerate().for_each(|(i, &w)| weights.row(i)[0] = w);
            },
        );
    }
    if let Some(state) = state {
        for (to, all) in state.chunks_exact_mut(len).zip(states.chunks_exact(count * len)) {
            to.copy_from_slice(&all[(count - 1) * len..]);
        }
    }
}

/// The state before every segment: `[batch, heads, segments, dim · value_dim]`.
fn start_states<'a, T: Float>(
    states: &mut Buffer<T>,
    parts: &[Range<usize>],
    sizes: Sizes,
    of: impl Fn(usize, usize) -> Head<'a, T> + Sync,
) {
    let (Sizes { batch, heads, .. }, count, len) = (sizes, parts.len(), sizes.dim * sizes.value_dim);
    if count > 1 {
        par_rows([], [ColumnsMut::new(states, len)], [batch, heads, count], |[b, a, s], [], [mut state]| {
            // The contribution of segment s − 1 lies where segment s will start.
            if let Some(before) = s.checked_sub(1) {
                of(b, a).advance(&Powers::new(a, BLOCK), parts[before].clone(), state.row(0));
            }
        });
    }
    for (index, all) in states.chunks_exact_mut(count * len).enumerate() {
        let (batch, head) = (index / heads, index % heads);
        of(batch, head).first_state(&mut all[..len]);
        for s in 1..count {
            let (before, here) = all[(s - 1) * len..].split_at_mut(len);
            let decay = T::from_f64(libm::pow(gamma(head), parts[s - 1].len() as f64));
            here[..len].iter_mut().zip(before).for_each(|(y, x)| *y += decay * *x);
        }
    }
}

/// What [`backward`] writes: the gradients of q, k, v (shaped like them) and of the state before the first token.
pub struct Gradients<'a, T> {
    /// dQ.
    pub q: &'a mut [T],
    /// dK.
    pub k: &'a mut [T],
    /// dV.
    pub v: &'a mut [T],
    /// dS₀.
    pub state: Option<&'a mut [T]>,
}

/// Backward: `d_out` is the gradient of the outputs before they were rescaled, `d_state` that of the state after the last token.
pub fn backward<T: Float>(grads: Gradients<T>, d_out: &[T], d_state: Option<&[T]>, inputs: Inputs<T>, sizes: Sizes) {
    let Sizes { batch, heads, tokens, dim, value_dim, .. } = sizes;
    let Gradients { q: dq, k: dk, v: dv, state: d_first } = grads;
    if batch * heads == 0 || tokens == 0 {
        if let (Some(to), Some(from)) = (d_first, d_state) {
            to.copy_from_slice(from);
        }
        return;
    }
    let turns = rotation::<T>(&sizes);
    let parts = segments(tokens, BLOCK, TASKS.div_ceil(batch * heads));
    let (count, len) = (parts.len(), dim * value_dim);
    let of = |batch: usize, head: usize| Head { inputs, sizes, turns: &turns, batch, head };
    let mut states = Buffer::<T>::zeros(batch * heads * count * len);
    start_states(&mut states, &parts, sizes, of);
    // S̄ after every segment.
    let mut d_states = Buffer::<T>::zeros(batch * heads * count * len);
    if count > 1 {
        par_rows([], [ColumnsMut::new(&mut d_states, len)], [batch, heads, count], |[b, a, s], [], [mut d_state]| {
            if s + 1 < count {
                let (head, powers, part) = (of(b, a), Powers::<T>::new(a, BLOCK), parts[s + 1].clone());
                let mut q = Buffer::<T>::scratch(BLOCK * dim);
                let mut do_packed = Buffer::<T>::scratch(T::packed_len(BLOCK, value_dim));
                for from in part.clone().step_by(BLOCK).collect::<Vec<_>>().into_iter().rev() {
                    let block = from..(from + BLOCK).min(part.end);
                    head.queries(&mut q, block.clone());
                    T::pack(head.rows(d_out, block.clone(), value_dim), &mut do_packed);
                    head.absorb_back(&powers, &mut q, &do_packed, block.len(), d_state.row(0));
                }
            }
        });
    }
    for (index, all) in d_states.chunks_exact_mut(count * len).enumerate() {
        if let Some(d_state) = d_state {
            all[(count - 1) * len..].copy_from_slice(&d_state[index * len..(index + 1) * len]);
        }
        for s in (0..count - 1).rev() {
            let (here, after) = all[s * len..].split_at_mut(len);
            let decay = T::from_f64(libm::pow(gamma(index % heads), parts[s + 1].len() as f64));
            here.iter_mut().zip(after).for_each(|(y, x)| *y += decay * *x);
        }
    }
    let numbers: Vec<u32> = (0..tokens as u32).collect();
    let rows: Vec<&[u32]> = parts.iter().map(|part| &numbers[part.clone()]).collect();
    let dealt = |data, width: usize| Dealt { matrix: ColumnsMut::new(data, heads * width), stacked: false, rows: &rows };
    par_rows(
        [dealt(dq, dim), dealt(dk, dim), dealt(dv, value_dim)],
        [ColumnsMut::new(&mut states, len), ColumnsMut::new(&mut d_states, len)],
        [batch, heads, count],
        |[b, a, s], grads, [mut state, mut d_state]| of(b, a).backward(parts[s].clone(), d_out, state.row(0), d_state.row(0), grads),
    );
    if let Some(d_first) = d_first {
        par_blocks(
            [],
            [ColumnsMut::new(d_first, len), ColumnsMut::new(&mut d_states, len)],
            batch,
            heads,
            |_, _, [], [mut to, mut all]| {
                to.row(0).copy_from_slice(all.row(0));
            },
        );
    }
}

impl<T: Float> Head<'_, T> {
    /// The gradients of a segment. `state` is the one before it, `d_state` the gradient of the one after; both change.
    fn backward(&self, tokens: Range<usize>, d_out: &[T], state: &mut [T], d_state: &mut [T], grads: [RowsMut<T>; 3]) {
        let Sizes { dim, value_dim, .. } = self.sizes;
        let [mut dq, mut dk, mut dv] = grads;
        let (powers, len) = (Powers::<T>::new(self.head, BLOCK), dim * value_dim);
        let starts: Vec<usize> = tokens.clone().step_by(BLOCK).collect();
        let block = |from: usize| from..(from + BLOCK).min(tokens.end);
        let mut states = Buffer::<T>::scratch(starts.len() * len);
        for (&from, slot) in starts.iter().zip(states.chunks_exact_mut(len)) {
            slot.copy_from_slice(state);
            if block(from).end < tokens.end {
                self.advance(&powers, block(from), state);
            }
        }
        let rows = |width: usize| Buffer::<T>::scratch(BLOCK * width);
        let packed = |k: usize, n: usize| Buffer::<T>::scratch(T::packed_len(k, n));
        let (mut q, mut k, mut d_rows, mut dv_rows, mut other) =
            (rows(dim), rows(dim), rows(dim), rows(value_dim), rows(dim.max(value_dim)));
        let (mut a, mut p) = (rows(BLOCK), rows(BLOCK));
        let (mut kt_packed, mut vt_packed) = (packed(dim, BLOCK), packed(value_dim, BLOCK));
        let (mut k_packed, mut q_packed, mut do_packed) = (packed(BLOCK, dim), packed(BLOCK, dim), packed(BLOCK, value_dim));
        let (mut state_packed, mut d_state_packed) = (packed(value_dim, dim), packed(dim, value_dim));
        for (&from, state) in starts.iter().zip(states.chunks_exact(len)).rev() {
            let (tokens_here, first) = (block(from), from - tokens.start);
            let c = tokens_here.len();
            self.queries(&mut q, tokens_here.clone());
            self.keys(&mut k, tokens_here.clone());
            let (v, d_o) = (self.values(tokens_here.clone()), self.rows(d_out, tokens_here.clone(), value_dim));
            let (q_mat, k_mat) = (Mat::new(&q, c, dim), Mat::new(&k, c, dim));
            T::pack(k_mat.t(), &mut kt_packed);
            T::pack(v.t(), &mut vt_packed);
            T::pack(k_mat, &mut k_packed);
            T::pack(q_mat, &mut q_packed);
            T::pack(d_o, &mut do_packed);
            let (a, p) = (&mut a[..c * c], &mut p[..c * c]);
            // A = (Q Kᵀ) ∘ D, P̄ = (Ō Vᵀ) ∘ D
            T::multiply_packed(q_mat, &kt_packed, MatMut::new(a, c, c), false);
            powers.decay(a, c, 0, 0, None);
            T::multiply_packed(d_o, &vt_packed, MatMut::new(p, c, c), false);
            powers.decay(p, c, 0, 0, None);
            let to_end = powers.to_end(c);
            // V̄ = Aᵀ Ō + γ^{c−1−m} K S̄
            {
                let dv_rows = &mut dv_rows[..c * value_dim];
                T::pack(Mat::new(d_state, dim, value_dim), &mut d_state_packed);
                T::multiply_packed(k_mat, &d_state_packed, MatMut::new(dv_rows, c, value_dim), false);
                scale_rows(dv_rows, to_end, value_dim);
                T::multiply_packed(Mat::new(a, c, c).t(), &do_packed, MatMut::new(dv_rows, c, value_dim), true);
                dv_rows.chunks_exact(value_dim).enumerate().for_each(|(i, row)| dv.row(first + i).copy_from_slice(row));
            }
            // Q̄ = P̄ K + γ^{n+1} Ō Sᵀ
            let d_rows = &mut d_rows[..c * dim];
            T::pack(Mat::new(state, dim, value_dim).t(), &mut state_packed);
            T::multiply_packed(d_o, &state_packed, MatMut::new(d_rows, c, dim), false);
            scale_rows(d_rows, &powers.rising[..c], dim);
            T::multiply_packed(Mat::new(p, c, c), &k_packed, MatMut::new(d_rows, c, dim), true);
            self.turn_back(&mut other, d_rows, tokens_here.clone(), T::ONE);
            other.chunks_exact(dim).take(c).enumerate().for_each(|(i, row)| dq.row(first + i).copy_from_slice(row));
            // K̄ = P̄ᵀ Q + γ^{c−1−m} V S̄ᵀ
            T::pack(Mat::new(d_state, dim, value_dim).t(), &mut state_packed);
            T::multiply_packed(v, &state_packed, MatMut::new(d_rows, c, dim), false);
            scale_rows(d_rows, to_end, dim);
            T::multiply_packed(Mat::new(p, c, c).t(), &q_packed, MatMut::new(d_rows, c, dim), true);
            self.turn_back(&mut other, d_rows, tokens_here, self.scale());
            other.chunks_exact(dim).take(c).enumerate().for_each(|(i, row)| dk.row(first + i).copy_from_slice(row));
            self.absorb_back(&powers, &mut q, &do_packed, c, d_state);
        }
    }

    fn turn_back(&self, out: &mut [T], x: &[T], tokens: Range<usize>, scale: T) {
        let (dim, c) = (self.sizes.dim, tokens.len());
        let table = if self.sizes.rotary { &self.turns[tokens.start * dim..tokens.end * dim] } else { &[] };
        T::dispatch(Turn { out: &mut out[..c * dim], x: Mat::new(x, c, dim), table, scale, sign: -T::ONE });
    }
}
