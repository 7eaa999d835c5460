//! The softmax attention core: `O = softmax_keys(s Q Kᵀ + A) V`, per image, head and group of tokens.
//!
//! q, k and v are read in place, with strides; a group (a window, or all tokens) is gathered by index. Scores exist for a block
//! of query rows at a time, never as an N×N matrix: up to [`KEY_BLOCK`] keys exactly in two passes, beyond that with the online
//! softmax. What is kept for the backward pass is `m = max` and `1/Σ e^{s−m}` per row and head; it recomputes the scores once:
//!
//! `dV = Pᵀ dO`, `dP = dO Vᵀ`, `δ_i = Σ_j O_ij dO_ij`, `dS = P ⊙ (dP − δ)`, `dQ = s dS K`, `dK = s dSᵀ Q`, `dA = Σ dS`.

use super::reduce::dot_lanes;
use super::{get, put};
use crate::linalg::{ColumnsMut, Mat, MatMut, par_blocks};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

/// Query rows whose scores exist at a time.
const QUERY_BLOCK: usize = 64;
/// Keys whose scores exist at a time.
pub const KEY_BLOCK: usize = 512;

/// One side of a grouping: which tokens each group holds, and the position of each in the bias.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Side {
    /// Group g holds entries `offsets[g]..offsets[g + 1]`.
    pub offsets: Vec<u32>,
    /// Row of each entry among the tokens of an image.
    pub tokens: Vec<u32>,
    /// Row or column of each entry in the bias.
    pub positions: Vec<u32>,
}

impl Side {
    /// One group of all `n` tokens.
    pub fn all(n: usize) -> Side {
        let every: Vec<u32> = (0..n as u32).collect();
        Side { offsets: vec![0, n as u32], positions: every.clone(), tokens: every }
    }

    fn group(&self, g: usize) -> (&[u32], &[u32]) {
        let at = self.offsets[g] as usize..self.offsets[g + 1] as usize;
        (&self.tokens[at.clone()], &self.positions[at])
    }

    fn largest(&self) -> usize {
        self.offsets.windows(2).map(|w| (w[1] - w[0]) as usize).max().unwrap_or(0)
    }
}

/// Who attends to whom: queries of group g see the keys of group g. Every query token stands in exactly one group.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Groups {
    /// The queries.
    pub queries: Side,
    /// The keys; a token may stand in several groups, or several times in one.
    pub keys: Side,
    /// How many zero tokens the caller must append to every image: keys beyond its own tokens, nobody's queries.
    pub zero_tokens: usize,
}

impl Groups {
    /// Every query sees every key.
    pub fn all(queries: usize, keys: usize) -> Groups {
        Groups { queries: Side::all(queries), keys: Side::all(keys), zero_tokens: 0 }
    }

    /// The number of (query, key) pairs.
    pub fn pairs(&self) -> usize {
        self.queries.offsets.windows(2).zip(self.keys.offsets.windows(2)).map(|(q, k)| ((q[1] - q[0]) * (k[1] - k[0])) as usize).sum()
    }
}

/// An operand `[batch · tokens, stride]` whose head `a` lies in columns `offset + a·dim..`.
#[derive(Clone, Copy)]
pub struct Operand<'a, T> {
    /// All rows.
    pub data: &'a [T],
    /// The length of a row.
    pub stride: usize,
    /// The column of the first head.
    pub offset: usize,
}

/// The sizes of an attention.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Images.
    pub batch: usize,
    /// Heads h.
    pub heads: usize,
    /// Width d of a head of q and k.
    pub dim: usize,
    /// Width of a head of v.
    pub value_dim: usize,
    /// Query tokens per image.
    pub queries: usize,
    /// Key tokens per image.
    pub keys: usize,
    /// The factor s on the scores.
    pub scale: f64,
}

/// Additive logits `[heads, side, side]`, read at the positions of query and key; shared by all images.
#[derive(Clone, Copy)]
pub struct Bias<'a, T> {
    /// The table.
    pub data: &'a [T],
    /// Rows and columns of a head's table.
    pub side: usize,
}

impl<T: Float> Operand<'_, T> {
    fn row(&self, token: usize, column: usize, width: usize) -> &[T] {
        let from = token * self.stride + self.offset + column;
        &self.data[from..from + width]
    }
}

fn gather<T: Float>(out: &mut [T], x: &Operand<T>, first: usize, tokens: &[u32], column: usize, width: usize, scale: T) {
    for (row, &t) in out.chunks_exact_mut(width).zip(tokens) {
        let from = x.row(first + t as usize, column, width);
        if scale == T::ONE {
            row.copy_from_slice(from);
        } else {
            for (a, &b) in row.iter_mut().zip(from) {
                *a = b * scale;
            }
        }
    }
}

/// One head's bias table, its side, and the positions of queries and keys in it.
type HeadBias<'a, T> = (&'a [T], usize, &'a [u32], &'a [u32]);

/// Scores of some rows → exponentials, with the running maximum and sum of the online softmax.
struct Softmax<'a, T> {
    scores: &'a mut [T],
    keys: usize,
    bias: Option<HeadBias<'a, T>>,
    /// Per row: maximum and sum so far, and the factor by which earlier results must shrink.
    state: &'a mut [[T; 3]],
}

impl<T: Float> Kernel<T> for Softmax<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        for (i, (row, state)) in self.scores.chunks_exact_mut(self.keys).zip(self.state).enumerate() {
            add_bias(row, i, self.bias);
            let mut best = V::splat(T::NEG_INFINITY);
            let mut j = 0;
            while j < row.len() {
                best = get::<T, V>(row, j, T::NEG_INFINITY).max(best);
                j += LANES;
            }
            let max = best.largest().larger(state[0]);
            let (center, mut sum) = (V::splat(max), V::splat(T::ZERO));
            j = 0;
            while j < row.len() {
                let e = (get::<T, V>(row, j, T::NEG_INFINITY) - center).exp();
                sum = sum + e;
                put(e, row, j);
                j += LANES;
            }
            let shrink = if state[0] == max || state[0] == T::NEG_INFINITY { T::ONE } else { V::splat(state[0] - max).exp().to_array()[0] };
            *state = [max, state[1].fused(shrink, sum.sum()), shrink];
        }
    }
}

#[inline(always)]
fn add_bias<T: Float>(row: &mut [T], i: usize, bias: Option<HeadBias<T>>) {
    if let Some((table, side, queries, keys)) = bias {
        let line = &table[queries[i] as usize * side..(queries[i] as usize + 1) * side];
        for (x, &k) in row.iter_mut().zip(keys) {
            *x += line[k as usize];
        }
    }
}

/// Scores → probabilities with known `m` and `1/Σ`.
struct Again<'a, T> {
    scores: &'a mut [T],
    keys: usize,
    bias: Option<HeadBias<'a, T>>,
    stats: &'a [T],
}

impl<T: Float> Kernel<T> for Again<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        for (i, (row, stats)) in self.scores.chunks_exact_mut(self.keys).zip(self.stats.chunks_exact(2)).enumerate() {
            add_bias(row, i, self.bias);
            let (max, inverse) = (V::splat(stats[0]), V::splat(stats[1]));
            let mut j = 0;
            while j < row.len() {
                put((get::<T, V>(row, j, T::ZERO) - max).exp() * inverse, row, j);
                j += LANES;
            }
        }
    }
}

/// `dS = P ⊙ (dP − δ)`, in place of P.
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

struct RowDots<'a, T> {
    out: &'a mut [T],
    x: &'a [T],
    y: &'a [T],
    width: usize,
}

impl<T: Float> Kernel<T> for RowDots<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        for ((out, x), y) in self.out.iter_mut().zip(self.x.chunks_exact(self.width)).zip(self.y.chunks_exact(self.width)) {
            *out = dot_lanes::<T, V>(x, y).sum();
        }
    }
}

/// Forward: `out` `[batch · queries, heads · value_dim]` is written, and `stats` `[batch, heads, queries, 2]` with `(m, 1/Σ)`.
/// A group without keys gives zeros; queries in no group are left as they are.
#[allow(clippy::too_many_arguments)]
pub fn forward<T: Float>(
    out: &mut [T],
    stats: &mut [T],
    q: Operand<T>,
    k: Operand<T>,
    v: Operand<T>,
    bias: Option<Bias<T>>,
    groups: &Groups,
    sizes: Sizes,
) {
    let Sizes { batch, heads, dim, value_dim, queries, keys, scale } = sizes;
    assert!(out.len() == batch * queries * heads * value_dim && stats.len() == batch * heads * queries * 2);
    if batch * heads * queries == 0 {
        return;
    }
    let (scale, most_keys) = (T::from_f64(scale), groups.keys.largest());
    let block = most_keys.min(KEY_BLOCK);
    let rows = groups.queries.largest().min(QUERY_BLOCK);
    let out = ColumnsMut::new(out, heads * value_dim);
    // The statistics of an image and head are one row block of a matrix with a single column block.
    let stats = ColumnsMut::new(stats, 2);
    let work = |b: usize, a: usize, mut out: ColumnsMut<T>, mut stats: ColumnsMut<T>| {
        let bias = bias.map(|bias| (&bias.data[a * bias.side * bias.side..(a + 1) * bias.side * bias.side], bias.side));
        let mut kv = Buffer::<T>::scratch(block * dim.max(value_dim));
        let mut k_packed = Buffer::<T>::scratch(T::packed_len(dim, block) * most_keys.div_ceil(KEY_BLOCK).max(1));
        let mut v_packed = Buffer::<T>::scratch(T::packed_len(block, value_dim) * most_keys.div_ceil(KEY_BLOCK).max(1));
        let mut q_rows = Buffer::<T>::scratch(rows * dim);
        let mut scores = Buffer::<T>::scratch(rows * block);
        let mut o = Buffer::<T>::scratch(rows * value_dim);
        let mut state = [[T::ZERO; 3]; QUERY_BLOCK];
        for g in 0..groups.queries.offsets.len() - 1 {
            let (q_tokens, q_positions) = groups.queries.group(g);
            let (k_tokens, k_positions) = groups.keys.group(g);
            let (k_step, v_step) = (T::packed_len(dim, block), T::packed_len(block, value_dim));
            for (index, tokens) in k_tokens.chunks(KEY_BLOCK).enumerate() {
                let n = tokens.len();
                gather(&mut kv[..n * dim], &k, b * keys, tokens, a * dim, dim, T::ONE);
                T::pack(Mat::new(&kv[..n * dim], n, dim).t(), &mut k_packed[index * k_step..]);
                gather(&mut kv[..n * value_dim], &v, b * keys, tokens, a * value_dim, value_dim, T::ONE);
                T::pack(Mat::new(&kv[..n * value_dim], n, value_dim), &mut v_packed[index * v_step..]);
            }
            for (q_tokens, q_positions) in q_tokens.chunks(QUERY_BLOCK).zip(q_positions.chunks(QUERY_BLOCK)) {
                let m = q_tokens.len();
                gather(&mut q_rows[..m * dim], &q, b * queries, q_tokens, a * dim, dim, scale);
                let state = &mut state[..m];
                state.fill([T::NEG_INFINITY, T::ZERO, T::ONE]);
                let o = &mut o[..m * value_dim];
                o.fill(T::ZERO);
                for (index, k_positions) in k_positions.chunks(KEY_BLOCK).enumerate() {
                    let n = k_positions.len();
                    let scores = &mut scores[..m * n];
                    T::multiply_packed(Mat::new(&q_rows, m, dim), &k_packed[index * k_step..], MatMut::new(scores, m, n), false);
                    let bias = bias.map(|(table, side)| (table, side, q_positions, k_positions));
                    T::dispatch(Softmax { scores, keys: n, bias, state });
                    if index > 0 {
                        for (o, state) in o.chunks_exact_mut(value_dim).zip(state.iter()).filter(|(_, state)| state[2] != T::ONE) {
                            o.iter_mut().for_each(|x| *x *= state[2]);
                        }
                    }
                    T::multiply_packed(Mat::new(scores, m, n), &v_packed[index * v_step..], MatMut::new(o, m, value_dim), index > 0);
                }
                for ((&t, o), state) in q_tokens.iter().zip(o.chunks_exact(value_dim)).zip(state.iter()) {
                    let inverse = if k_tokens.is_empty() { T::ZERO } else { T::ONE / state[1] };
                    stats.row(t as usize).copy_from_slice(&[state[0], inverse]);
                    for (y, &x) in out.row(t as usize).iter_mut().zip(o) {
                        *y = x * inverse;
                    }
                }
            }
        }
    };
    par_blocks([out], [stats], batch, heads, |b, a, [out], [stats]| work(b, a, out, stats));
}

/// What the backward pass writes: `dq`, `dk`, `dv` as column blocks of `[batch · tokens, heads · dim]`, and `dbias`
/// `[heads, side, side]`, which is added to. All of `dq`, `dk`, `dv` must hold zeros before.
pub struct Gradients<'a, T> {
    /// dQ.
    pub q: ColumnsMut<'a, T>,
    /// dK.
    pub k: ColumnsMut<'a, T>,
    /// dV.
    pub v: ColumnsMut<'a, T>,
    /// dA.
    pub bias: Option<&'a mut [T]>,
}

/// Backward: everything that [`forward`] was given, its outputs, and the gradient `d_out` of `out`.
#[allow(clippy::too_many_arguments)]
pub fn backward<T: Float>(
    grads: Gradients<T>,
    d_out: &[T],
    out: &[T],
    stats: &[T],
    q: Operand<T>,
    k: Operand<T>,
    v: Operand<T>,
    bias: Option<Bias<T>>,
    groups: &Groups,
    sizes: Sizes,
) {
    let Sizes { batch, heads, dim, value_dim, queries, keys, scale } = sizes;
    assert!(out.len() == batch * queries * heads * value_dim && d_out.len() == out.len() && stats.len() == batch * heads * queries * 2);
    if batch * heads * queries * keys == 0 {
        return;
    }
    let scale = T::from_f64(scale);
    let block = groups.keys.largest().min(KEY_BLOCK);
    let rows = groups.queries.largest().min(QUERY_BLOCK);
    let table = bias.map_or(0, |bias| bias.side * bias.side);
    let out = Operand { data: out, stride: heads * value_dim, offset: 0 };
    let d_out = Operand { data: d_out, stride: heads * value_dim, offset: 0 };
    let mut d_tables = Buffer::<T>::zeros(batch * heads * table);
    let tables = ColumnsMut::new(&mut d_tables, table.max(1));
    let work = |b: usize, a: usize, mut dq: ColumnsMut<T>, mut dk: ColumnsMut<T>, mut dv: ColumnsMut<T>, mut d_table: Option<&mut [T]>| {
        let bias = bias.map(|bias| (&bias.data[a * table..(a + 1) * table], bias.side));
        let scratch = |m: usize, n: usize| Buffer::<T>::scratch(m * n);
        let packed = |m: usize, n: usize| Buffer::<T>::scratch(T::packed_len(m, n));
        let (mut k_rows, mut v_rows) = (scratch(block, dim), scratch(block, value_dim));
        let (mut k_packed, mut kt_packed, mut vt_packed) = (packed(block, dim), packed(dim, block), packed(value_dim, block));
        let (mut q_rows, mut o_rows, mut do_rows) = (scratch(rows, dim), scratch(rows, value_dim), scratch(rows, value_dim));
        let (mut q_packed, mut do_packed) = (packed(rows, dim), packed(rows, value_dim));
        let (mut p, mut dp) = (scratch(rows, block), scratch(rows, block));
        let (mut dq_rows, mut dk_rows, mut dv_rows) = (scratch(rows, dim), scratch(block, dim), scratch(block, value_dim));
        let (mut delta, mut row_stats) = ([T::ZERO; QUERY_BLOCK], [T::ZERO; 2 * QUERY_BLOCK]);
        for g in 0..groups.queries.offsets.len() - 1 {
            let (q_tokens, q_positions) = groups.queries.group(g);
            let (k_tokens, k_positions) = groups.keys.group(g);
            for (k_tokens, k_positions) in k_tokens.chunks(KEY_BLOCK).zip(k_positions.chunks(KEY_BLOCK)) {
                let n = k_tokens.len();
                gather(&mut k_rows[..n * dim], &k, b * keys, k_tokens, a * dim, dim, T::ONE);
                gather(&mut v_rows[..n * value_dim], &v, b * keys, k_tokens, a * value_dim, value_dim, T::ONE);
                T::pack(Mat::new(&k_rows, n, dim), &mut k_packed);
                T::pack(Mat::new(&k_rows, n, dim).t(), &mut kt_packed);
                T::pack(Mat::new(&v_rows, n, value_dim).t(), &mut vt_packed);
                let (dk_rows, dv_rows) = (&mut dk_rows[..n * dim], &mut dv_rows[..n * value_dim]);
                dk_rows.fill(T::ZERO);
                dv_rows.fill(T::ZERO);
                for (q_tokens, q_positions) in q_tokens.chunks(QUERY_BLOCK).zip(q_positions.chunks(QUERY_BLOCK)) {
                    let m = q_tokens.len();
                    gather(&mut q_rows[..m * dim], &q, b * queries, q_tokens, a * dim, dim, scale);
                    gather(&mut o_rows[..m * value_dim], &out, b * queries, q_tokens, a * value_dim, value_dim, T::ONE);
                    gather(&mut do_rows[..m * value_dim], &d_out, b * queries, q_tokens, a * value_dim, value_dim, T::ONE);
                    for (s, &t) in row_stats.chunks_exact_mut(2).zip(q_tokens) {
                        let from = ((b * heads + a) * queries + t as usize) * 2;
                        s.copy_from_slice(&stats[from..from + 2]);
                    }
                    let (p, dp) = (&mut p[..m * n], &mut dp[..m * n]);
                    // P = softmax(s Q Kᵀ + A)
                    T::multiply_packed(Mat::new(&q_rows, m, dim), &kt_packed, MatMut::new(p, m, n), false);
                    let bias = bias.map(|(table, side)| (table, side, q_positions, k_positions));
                    T::dispatch(Again { scores: p, keys: n, bias, stats: &row_stats[..2 * m] });
                    // dV = Pᵀ dO
                    T::pack(Mat::new(&do_rows, m, value_dim), &mut do_packed);
                    T::multiply_packed(Mat::new(p, m, n).t(), &do_packed, MatMut::new(dv_rows, n, value_dim), true);
                    // dP = dO Vᵀ, δ = Σ_j O_ij dO_ij, dS = P ⊙ (dP − δ)
                    T::multiply_packed(Mat::new(&do_rows, m, value_dim), &vt_packed, MatMut::new(dp, m, n), false);
                    T::dispatch(RowDots { out: &mut delta[..m], x: &o_rows, y: &do_rows, width: value_dim });
                    T::dispatch(ScoreGradient { p, dp, delta: &delta[..m], keys: n });
                    let ds = &*p;
                    if let (Some((_, side, ..)), Some(d_table)) = (bias, &mut d_table) {
                        for (row, &i) in ds.chunks_exact(n).zip(q_positions) {
                            let line = &mut d_table[i as usize * side..(i as usize + 1) * side];
                            for (&x, &j) in row.iter().zip(k_positions) {
                                line[j as usize] += x;
                            }
                        }
                    }
                    // dQ = s dS K, dK = dSᵀ (s Q)
                    T::multiply_packed(Mat::new(ds, m, n), &k_packed, MatMut::new(&mut dq_rows[..m * dim], m, dim), false);
                    for (row, &t) in dq_rows.chunks_exact(dim).zip(q_tokens) {
                        for (y, &x) in dq.row(t as usize).iter_mut().zip(row) {
                            *y += x * scale;
                        }
                    }
                    T::pack(Mat::new(&q_rows, m, dim), &mut q_packed);
                    T::multiply_packed(Mat::new(ds, m, n).t(), &q_packed, MatMut::new(dk_rows, n, dim), true);
                }
                for (i, &t) in k_tokens.iter().enumerate() {
                    for (y, &x) in dk.row(t as usize).iter_mut().zip(&dk_rows[i * dim..(i + 1) * dim]) {
                        *y += x;
                    }
                    for (y, &x) in dv.row(t as usize).iter_mut().zip(&dv_rows[i * value_dim..(i + 1) * value_dim]) {
                        *y += x;
                    }
                }
            }
        }
    };
    let Gradients { q: dq, k: dk, v: dv, bias: d_bias } = grads;
    if table == 0 {
        par_blocks([dq, dk, dv], [], batch, heads, |b, a, [dq, dk, dv], []| work(b, a, dq, dk, dv, None));
    } else {
        par_blocks([dq, dk, dv], [tables], batch, heads, |b, a, [dq, dk, dv], [mut t]| work(b, a, dq, dk, dv, Some(t.row(0))));
    }
    if let Some(d_bias) = d_bias {
        super::reduce::add_column_sums(d_bias, &d_tables);
    }
}
