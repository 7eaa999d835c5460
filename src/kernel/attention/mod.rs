//! The softmax attention core: `O = softmax_keys(F ⊙ (s Q Kᵀ) + A + M) V`, per image, head and group of tokens, with an optional
//! factor F, bias A and mask M ([`Terms`]).
//!
//! q, k and v are read in place, with strides; a group (a window, or all tokens) is gathered by index. Scores exist for a block
//! of query rows at a time, never as an N×N matrix: up to [`KEY_BLOCK`] keys exactly in two passes, beyond that with the online
//! softmax. What is kept for the backward pass is `m = max` and `1/Σ e^{s−m}` per row and head; it recomputes the scores once:
//!
//! `dV = Pᵀ dO`, `dP = dO Vᵀ`, `δ_i = Σ_j O_ij dO_ij`, `dZ = P ⊙ (dP − δ)`, `dA = Σ dZ`, `dF = Σ dZ ⊙ S`, `dS = dZ ⊙ F`,
//! `dQ = s dS K`, `dK = s dSᵀ Q` (`S = s Q Kᵀ`).
//!
//! Images and heads are separate tasks. Where these are fewer than `TASKS`, the queries of a head are dealt out too (forward), or
//! its groups, or the keys of its only group (backward; then `dQ` is a sum of parts, added in order).

mod terms;

use std::ops::Range;

use super::reduce::dot_lanes;
use crate::linalg::{ColumnsMut, Dealt, Mat, MatMut, RowsMut, disjoint, par_blocks, par_rows};
use crate::simd::{Kernel, Vector};
use crate::tensor::{Buffer, Float};

pub(crate) use terms::{AllHeads, ScoreBlock};
use terms::{AllPlaces, Centre, HeadTerms, Keys, ScoreGradient, Scores, is_run};
pub use terms::{Factor, FactorTable, Mask, TermGradients, Terms};

/// Query rows whose scores exist at a time.
const QUERY_BLOCK: usize = 64;
/// Keys whose scores exist at a time.
pub const KEY_BLOCK: usize = 512;
/// As many tasks as there should be at least.
const TASKS: usize = 8;
/// Groups of up to this many keys are read where they lie, if their rows follow each other; for larger ones a copy pays.
const IN_PLACE_KEYS: usize = 128;

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

    fn group(&self, g: usize) -> Range<usize> {
        self.offsets[g] as usize..self.offsets[g + 1] as usize
    }

    /// Cuts the entries into at most `parts` runs of whole blocks of [`QUERY_BLOCK`] entries of a group; returns their ends.
    fn cuts(&self, parts: usize) -> Vec<usize> {
        let blocks = |g| self.group(g).len().div_ceil(QUERY_BLOCK);
        let groups = 0..self.offsets.len() - 1;
        let total: usize = groups.clone().map(blocks).sum();
        let parts = parts.min(total).max(1);
        let (mut cuts, mut before) = (Vec::with_capacity(parts + 1), 0);
        cuts.push(0);
        for g in groups {
            let n = blocks(g);
            while cuts.len() < parts && total * cuts.len() / parts < before + n {
                cuts.push(self.group(g).start + (total * cuts.len() / parts - before) * QUERY_BLOCK);
            }
            before += n;
        }
        cuts.push(self.tokens.len());
        cuts
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

/// The rows `tokens` of a head: in place if that is asked for and they follow each other, else copied to `room`.
fn rows_of<'s, T: Float>(
    x: &Operand<'s, T>,
    (first, column, width): (usize, usize, usize),
    tokens: &[u32],
    in_place: bool,
    room: &'s mut [T],
) -> Mat<'s, T> {
    let m = tokens.len();
    if m > 0 && in_place && is_run(tokens) {
        let from = (first + tokens[0] as usize) * x.stride + x.offset + column;
        return Mat::strided(&x.data[from..from + (m - 1) * x.stride + width], m, width, x.stride, 1);
    }
    let room = &mut room[..m * width];
    gather(room, x, first, tokens, column, width, T::ONE);
    Mat::new(room, m, width)
}

struct RowDots<'a, T> {
    out: &'a mut [T],
    x: Mat<'a, T>,
    y: Mat<'a, T>,
}

impl<T: Float> Kernel<T> for RowDots<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.x.cols();
        for (i, out) in self.out.iter_mut().enumerate() {
            let (x, y) = (&self.x.data()[i * self.x.row_stride()..], &self.y.data()[i * self.y.row_stride()..]);
            *out = dot_lanes::<T, V>(&x[..width], &y[..width]).sum();
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
    forward_with(out, stats, [q, k, v], Terms { bias, ..Terms::default() }, groups, sizes);
}

/// [`forward`] with all [`Terms`].
pub fn forward_with<T: Float>(out: &mut [T], stats: &mut [T], qkv: [Operand<T>; 3], terms: Terms<T>, groups: &Groups, sizes: Sizes) {
    let Sizes { batch, heads, value_dim, queries, .. } = sizes;
    assert!(out.len() == batch * queries * heads * value_dim && stats.len() == batch * heads * queries * 2);
    if batch * heads * queries == 0 {
        return;
    }
    let cuts = groups.queries.cuts(TASKS.div_ceil(batch * heads));
    let rows: Vec<&[u32]> = cuts.windows(2).map(|w| &groups.queries.tokens[w[0]..w[1]]).collect();
    let dealt = [
        Dealt { matrix: ColumnsMut::new(out, heads * value_dim), stacked: false, rows: &rows },
        // The statistics of an image and head are one row block of a matrix with a single column block.
        Dealt { matrix: ColumnsMut::new(stats, 2), stacked: true, rows: &rows },
    ];
    let task = Forward { qkv, terms, groups, sizes };
    par_rows(dealt, [], [batch, heads, rows.len()], |[b, a, t], [out, stats], []| task.run(b, a, cuts[t]..cuts[t + 1], out, stats));
}

struct Forward<'a, T> {
    qkv: [Operand<'a, T>; 3],
    terms: Terms<'a, T>,
    groups: &'a Groups,
    sizes: Sizes,
}

impl<T: Float> Forward<'_, T> {
    /// The queries `entries` of head `a` of image `b`.
    fn run(&self, b: usize, a: usize, entries: Range<usize>, mut out: RowsMut<T>, mut stats: RowsMut<T>) {
        let Forward { qkv: [q, k, v], terms, groups, sizes } = self;
        let Sizes { dim, value_dim, queries, keys, scale, .. } = *sizes;
        let (scale, most_keys, count) = (T::from_f64(scale), groups.keys.largest(), groups.queries.offsets.len() - 1);
        let block = most_keys.min(KEY_BLOCK);
        let rows = groups.queries.largest().min(QUERY_BLOCK);
        let (k_step, v_step) = (T::packed_len(dim, block), T::packed_len(block, value_dim));
        let mut mirrored = Buffer::<T>::scratch(terms.room());
        let terms = terms.head(a, &mut mirrored);
        let mut kv = Buffer::<T>::scratch(block * dim.max(value_dim));
        let mut k_packed = Buffer::<T>::scratch(k_step * most_keys.div_ceil(KEY_BLOCK).max(1));
        let mut v_packed = Buffer::<T>::scratch(v_step * most_keys.div_ceil(KEY_BLOCK).max(1));
        let mut q_rows = Buffer::<T>::scratch(rows * dim);
        let mut scores = Buffer::<T>::scratch(rows * block);
        let mut line = Buffer::<T>::scratch(block);
        let mut o = Buffer::<T>::scratch(rows * value_dim);
        let mut state = [[T::ZERO; 3]; QUERY_BLOCK];
        for g in first_group(&groups.queries, entries.start)..count {
            let (q_entries, k_entries) = (groups.queries.group(g), groups.keys.group(g));
            if q_entries.start >= entries.end {
                break;
            }
            let q_entries = q_entries.start.max(entries.start)..q_entries.end.min(entries.end);
            if q_entries.is_empty() {
                continue;
            }
            let in_place = k_entries.len() <= IN_PLACE_KEYS;
            let terms = terms.with_mask(b * count + g);
            let (k_tokens, k_positions) = (&groups.keys.tokens[k_entries.clone()], &groups.keys.positions[k_entries]);
            for (index, tokens) in k_tokens.chunks(KEY_BLOCK).enumerate() {
                let n = tokens.len();
                // The factor on the scores rides on the keys.
                gather(&mut kv[..n * dim], k, b * keys, tokens, a * dim, dim, scale);
                T::pack(Mat::new(&kv[..n * dim], n, dim).t(), &mut k_packed[index * k_step..]);
                T::pack(rows_of(v, (b * keys, a * value_dim, value_dim), tokens, true, &mut kv), &mut v_packed[index * v_step..]);
            }
            for from in q_entries.clone().step_by(QUERY_BLOCK) {
                let q_block = from..(from + QUERY_BLOCK).min(q_entries.end);
                let (m, q_positions) = (q_block.len(), &groups.queries.positions[q_block.clone()]);
                let q_mat = rows_of(q, (b * queries, a * dim, dim), &groups.queries.tokens[q_block.clone()], in_place, &mut q_rows);
                let state = &mut state[..m];
                state.fill([T::NEG_INFINITY, T::ZERO, T::ONE]);
                let o = &mut o[..m * value_dim];
                o.fill(T::ZERO);
                for (index, k_positions) in k_positions.chunks(KEY_BLOCK).enumerate() {
                    let n = k_positions.len();
                    let scores = &mut scores[..m * n];
                    T::multiply_packed(q_mat, &k_packed[index * k_step..], MatMut::new(scores, m, n), false);
                    T::dispatch(Scores {
                        scores,
                        terms: &terms,
                        queries: q_positions,
                        keys: Keys::new(k_positions),
                        line: &mut line,
                        raw: None,
                        centre: Centre::Running(state),
                    });
                    if index > 0 {
                        for (o, state) in o.chunks_exact_mut(value_dim).zip(state.iter()).filter(|(_, state)| state[2] != T::ONE) {
                            o.iter_mut().for_each(|x| *x *= state[2]);
                        }
                    }
                    T::multiply_packed(Mat::new(scores, m, n), &v_packed[index * v_step..], MatMut::new(o, m, value_dim), index > 0);
                }
                for (i, (o, state)) in o.chunks_exact(value_dim).zip(state.iter()).enumerate() {
                    let inverse = if k_tokens.is_empty() { T::ZERO } else { T::ONE / state[1] };
                    let at = q_block.start - entries.start + i;
                    stats.row(at).copy_from_slice(&[state[0], inverse]);
                    for (y, &x) in out.row(at).iter_mut().zip(o) {
                        *y = x * inverse;
                    }
                }
            }
        }
    }
}

/// The group that holds an entry.
fn first_group(side: &Side, entry: usize) -> usize {
    side.offsets.partition_point(|&o| o as usize <= entry).saturating_sub(1)
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
    let Gradients { q: dq, k: dk, v: dv, bias: d_bias } = grads;
    let (terms, term_grads) = (Terms { bias, ..Terms::default() }, TermGradients { bias: d_bias, factor: None });
    backward_with([dq, dk, dv], term_grads, [d_out, out, stats], [q, k, v], terms, groups, sizes);
}

/// [`backward`] with all [`Terms`]: `grads` are dQ, dK, dV, which must hold zeros before; `results` are the gradient of `out`, `out` and
/// `stats`.
pub fn backward_with<T: Float>(
    grads: [ColumnsMut<T>; 3],
    term_grads: TermGradients<T>,
    results: [&[T]; 3],
    qkv: [Operand<T>; 3],
    terms: Terms<T>,
    groups: &Groups,
    sizes: Sizes,
) {
    let Sizes { batch, heads, dim, value_dim, queries, keys, .. } = sizes;
    let [d_out, out, stats] = results;
    assert!(out.len() == batch * queries * heads * value_dim && d_out.len() == out.len() && stats.len() == batch * heads * queries * 2);
    if batch * heads * queries * keys == 0 {
        return;
    }
    let operand = |data| Operand { data, stride: heads * value_dim, offset: 0 };
    let places = terms.places(&term_grads);
    let width: usize = places.lens().iter().sum();
    let Division { parts, block, whole_groups } = Division::new(groups, TASKS.div_ceil(batch * heads));
    let of = |side: fn(&Groups) -> &Side, entries: fn(&Part) -> Range<usize>| -> Vec<&[u32]> {
        parts.iter().map(|part| &side(groups).tokens[entries(part)]).collect()
    };
    let (k_rows, q_rows) = (of(|g| &g.keys, |p| p.keys.clone()), of(|g| &g.queries, |p| p.queries.clone()));
    let mut d_tables = Buffer::<T>::zeros(batch * heads * parts.len() * width);
    let tables = ColumnsMut::new(&mut d_tables, width);
    let task = Backward { qkv, d_out: operand(d_out), out: operand(out), stats, terms, places, groups, sizes, block };
    let [dq, dk, dv] = grads;
    let dealt = |matrix, rows| Dealt { matrix, stacked: false, rows };
    let table = |mut t: ColumnsMut<T>, work: &mut dyn FnMut(&mut [T])| if width > 0 { work(t.row(0)) } else { work(&mut []) };
    let count = [batch, heads, parts.len()];
    if whole_groups {
        par_rows([dealt(dq, &q_rows), dealt(dk, &k_rows), dealt(dv, &k_rows)], [tables], count, |[b, a, t], [dq, mut dk, mut dv], [d]| {
            let mut dq = QueryRows::Own(dq);
            table(d, &mut |d| task.run(b, a, &parts[t], &mut dq, &mut dk, &mut dv, d));
        });
    } else {
        let mut sums = Buffer::<T>::zeros(batch * heads * parts.len() * queries * dim);
        let stacks = [tables, ColumnsMut::new(&mut sums, dim)];
        par_rows([dealt(dk, &k_rows), dealt(dv, &k_rows)], stacks, count, |[b, a, t], [mut dk, mut dv], [d, part]| {
            let mut dq = QueryRows::Part(part);
            table(d, &mut |d| task.run(b, a, &parts[t], &mut dq, &mut dk, &mut dv, d));
        });
        par_blocks([dq], [ColumnsMut::new(&mut sums, dim)], batch, heads, |_, _, [mut dq], [mut sums]| {
            for part in 0..parts.len() {
                for t in 0..queries {
                    add_row(dq.row(t), sums.row(part * queries + t), T::ONE);
                }
            }
        });
    }
    terms::reduce(&d_tables, &places, term_grads, &terms, count);
}

fn add_row<T: Float>(to: &mut [T], from: &[T], scale: T) {
    for (y, &x) in to.iter_mut().zip(from) {
        *y += x * scale;
    }
}

/// What one task of a head does in the backward pass: some groups, or some keys of the only group.
#[derive(Clone, Debug)]
struct Part {
    groups: Range<usize>,
    queries: Range<usize>,
    keys: Range<usize>,
}

/// How the backward pass of a head is shared out.
struct Division {
    parts: Vec<Part>,
    /// Keys whose scores exist at a time.
    block: usize,
    /// A task has whole groups: no query belongs to two.
    whole_groups: bool,
}

impl Division {
    fn new(groups: &Groups, tasks: usize) -> Self {
        let (queries, keys) = (&groups.queries, &groups.keys);
        let (count, most) = (queries.offsets.len() - 1, keys.largest());
        let all = Part { groups: 0..count, queries: 0..queries.tokens.len(), keys: 0..keys.tokens.len() };
        let one = Division { parts: vec![all], block: most.min(KEY_BLOCK), whole_groups: true };
        let apart = |parts: &[Part]| {
            let lists: Vec<&[u32]> = parts.iter().map(|p| &keys.tokens[p.keys.clone()]).collect();
            disjoint(&lists, keys.tokens.iter().max().map_or(0, |&t| t as usize + 1))
        };
        if tasks < 2 {
            return one;
        }
        if count > 1 {
            let total = groups.pairs();
            let (mut parts, mut first, mut done) = (Vec::new(), 0, 0);
            for g in 0..count {
                done += queries.group(g).len() * keys.group(g).len();
                if done * tasks >= total * (parts.len() + 1) || g + 1 == count {
                    let of = |side: &Side| side.offsets[first] as usize..side.offsets[g + 1] as usize;
                    parts.push(Part { groups: first..g + 1, queries: of(queries), keys: of(keys) });
                    first = g + 1;
                }
            }
            return if apart(&parts) { Division { parts, ..one } } else { one };
        }
        // Blocks of keys, equally many to a task.
        let block = most.div_ceil(tasks).next_multiple_of(16).clamp(64, KEY_BLOCK);
        let blocks = most.div_ceil(block).max(1);
        let tasks = tasks.min(blocks);
        let end = |t: usize| (blocks * t / tasks * block).min(most);
        let parts: Vec<Part> =
            (0..tasks).map(|t| Part { groups: 0..1, queries: 0..queries.tokens.len(), keys: end(t)..end(t + 1) }).collect();
        if tasks < 2 || !apart(&parts) { one } else { Division { parts, block, whole_groups: false } }
    }
}

/// Where a task adds its share of dQ.
enum QueryRows<'a, T> {
    /// The rows of its own queries.
    Own(RowsMut<'a, T>),
    /// A sum over its keys.
    Part(ColumnsMut<'a, T>),
}

struct Backward<'a, T> {
    qkv: [Operand<'a, T>; 3],
    d_out: Operand<'a, T>,
    out: Operand<'a, T>,
    stats: &'a [T],
    terms: Terms<'a, T>,
    places: AllPlaces,
    groups: &'a Groups,
    sizes: Sizes,
    block: usize,
}

impl<T: Float> Backward<'_, T> {
    #[allow(clippy::too_many_arguments)]
    fn run(&self, b: usize, a: usize, part: &Part, dq: &mut QueryRows<T>, dk: &mut RowsMut<T>, dv: &mut RowsMut<T>, d_table: &mut [T]) {
        let Backward { qkv: [q, k, v], d_out, out, stats, terms, places, groups, sizes, block } = self;
        let Sizes { heads, dim, value_dim, queries, keys, scale, .. } = *sizes;
        let (scale, block, count) = (T::from_f64(scale), *block, groups.queries.offsets.len() - 1);
        let rows = groups.queries.largest().min(QUERY_BLOCK);
        let mut mirrored = Buffer::<T>::scratch(terms.room());
        let terms: HeadTerms<T> = terms.head(a, &mut mirrored);
        let (d_factor, d_bias) = d_table.split_at_mut(places.lens()[0]);
        let matrix = |width: usize| Buffer::<T>::scratch(rows * width);
        let (mut q_room, mut o_room, mut do_room, mut dq_rows) = (matrix(dim), matrix(value_dim), matrix(value_dim), matrix(dim));
        let (mut p, mut dp, mut raw) = (matrix(block), matrix(block), matrix(if terms.factor.is_some() { block } else { 0 }));
        let (mut k_rows, mut v_room) = (Buffer::<T>::scratch(block * dim), Buffer::<T>::scratch(block * value_dim));
        let (mut dk_rows, mut dv_rows) = (Buffer::<T>::scratch(block * dim), Buffer::<T>::scratch(block * value_dim));
        let packed = |k: usize, n: usize| Buffer::<T>::scratch(T::packed_len(k, n));
        let (mut k_packed, mut kt_packed, mut vt_packed) = (packed(block, dim), packed(dim, block), packed(value_dim, block));
        let (mut q_packed, mut do_packed) = (packed(rows, dim), packed(rows, value_dim));
        let mut line = Buffer::<T>::scratch(block);
        let (mut delta, mut row_stats) = ([T::ZERO; QUERY_BLOCK], [T::ZERO; 2 * QUERY_BLOCK]);
        for g in part.groups.clone() {
            let (q_entries, k_entries) = (groups.queries.group(g), groups.keys.group(g));
            let in_place = k_entries.len() <= IN_PLACE_KEYS;
            let terms = terms.with_mask(b * count + g);
            let k_entries = k_entries.start.max(part.keys.start)..k_entries.end.min(part.keys.end);
            for k_from in k_entries.clone().step_by(block.max(1)) {
                let k_block = k_from..(k_from + block).min(k_entries.end);
                let k_tokens = &groups.keys.tokens[k_block.clone()];
                let (n, key_positions) = (k_tokens.len(), Keys::new(&groups.keys.positions[k_block.clone()]));
                let v_mat = rows_of(v, (b * keys, a * value_dim, value_dim), k_tokens, true, &mut v_room);
                T::pack(v_mat.t(), &mut vt_packed);
                // s K: the factor on the scores rides on the keys.
                gather(&mut k_rows[..n * dim], k, b * keys, k_tokens, a * dim, dim, scale);
                T::pack(Mat::new(&k_rows, n, dim), &mut k_packed);
                T::pack(Mat::new(&k_rows, n, dim).t(), &mut kt_packed);
                let (dk_rows, dv_rows) = (&mut dk_rows[..n * dim], &mut dv_rows[..n * value_dim]);
                dk_rows.fill(T::ZERO);
                dv_rows.fill(T::ZERO);
                for q_from in q_entries.clone().step_by(QUERY_BLOCK) {
                    let q_block = q_from..(q_from + QUERY_BLOCK).min(q_entries.end);
                    let (q_tokens, q_positions) = (&groups.queries.tokens[q_block.clone()], &groups.queries.positions[q_block.clone()]);
                    let m = q_tokens.len();
                    let values = (b * queries, a * value_dim, value_dim);
                    let q_mat = rows_of(q, (b * queries, a * dim, dim), q_tokens, in_place, &mut q_room);
                    let o_mat = rows_of(out, values, q_tokens, in_place, &mut o_room);
                    let do_mat = rows_of(d_out, values, q_tokens, in_place, &mut do_room);
                    for (s, &t) in row_stats.chunks_exact_mut(2).zip(q_tokens) {
                        let from = ((b * heads + a) * queries + t as usize) * 2;
                        s.copy_from_slice(&stats[from..from + 2]);
                    }
                    let (p, dp) = (&mut p[..m * n], &mut dp[..m * n]);
                    // P = softmax(F ⊙ (s Q Kᵀ) + A + M)
                    T::multiply_packed(q_mat, &kt_packed, MatMut::new(p, m, n), false);
                    T::dispatch(Scores {
                        scores: p,
                        terms: &terms,
                        queries: q_positions,
                        keys: key_positions,
                        line: &mut line,
                        raw: terms.factor.is_some().then_some(&mut raw),
                        centre: Centre::Known(&row_stats[..2 * m]),
                    });
                    // dV = Pᵀ dO
                    T::pack(do_mat, &mut do_packed);
                    T::multiply_packed(Mat::new(p, m, n).t(), &do_packed, MatMut::new(dv_rows, n, value_dim), true);
                    // dP = dO Vᵀ, δ = Σ_j O_ij dO_ij, dZ = P ⊙ (dP − δ), dS = dZ ⊙ F
                    T::multiply_packed(do_mat, &vt_packed, MatMut::new(dp, m, n), false);
                    T::dispatch(RowDots { out: &mut delta[..m], x: o_mat, y: do_mat });
                    T::dispatch(ScoreGradient {
                        p,
                        dp,
                        delta: &delta[..m],
                        terms: &terms,
                        queries: q_positions,
                        keys: key_positions,
                        line: &mut line,
                        raw: &raw,
                        places: *places,
                        d_factor,
                        d_bias,
                    });
                    let ds = &*p;
                    // dQ = dS (s K), dK = s dSᵀ Q
                    T::multiply_packed(Mat::new(ds, m, n), &k_packed, MatMut::new(&mut dq_rows[..m * dim], m, dim), false);
                    for (i, (row, &t)) in dq_rows.chunks_exact(dim).zip(q_tokens).enumerate() {
                        let to = match dq {
                            QueryRows::Own(rows) => rows.row(q_block.start - part.queries.start + i),
                            QueryRows::Part(rows) => rows.row(t as usize),
                        };
                        add_row(to, row, T::ONE);
                    }
                    T::pack(q_mat, &mut q_packed);
                    T::multiply_packed(Mat::new(ds, m, n).t(), &q_packed, MatMut::new(dk_rows, n, dim), true);
                }
                for i in 0..n {
                    let at = k_block.start - part.keys.start + i;
                    add_row(dk.row(at), &dk_rows[i * dim..(i + 1) * dim], scale);
                    add_row(dv.row(at), &dv_rows[i * value_dim..(i + 1) * value_dim], T::ONE);
                }
            }
        }
    }
}
