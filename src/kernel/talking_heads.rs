//! The core of talking-heads attention: heads are mixed before and after the softmax.
//!
//! `S_a = s Q_a K_aᵀ`, `L_i = Σ_j W_ij S_j`, `A_i = softmax_keys L_i`, `R_i = Σ_j U_ij A_j + u_i`, `O_a = R_a V_a`. (A bias on L
//! would shift whole rows: the softmax does not see it, its gradient is 0.)
//!
//! A block of query rows of all heads is at work at a time; nothing N×N is kept, only `m = max` and `1/Σ e^{L−m}` per row and head.
//! Up to [`SINGLE_PASS`] keys a block's scores are computed once, beyond that for a block of keys at a time, twice: for the maxima and
//! sums first. Rows are padded to whole vectors; the padding holds zeros wherever it could be seen.
//!
//! With a [`Factor`] F on the scores, `F ⊙ S` stands for S: `dF = Σ d(F ⊙ S) ⊙ S`, `dS = F ⊙ d(F ⊙ S)`.
//!
//! Backward, from scores computed again: `dR_i = dO_i V_iᵀ`, `dV_i = R_iᵀ dO_i`; `dU_ij = ⟨dR_i, A_j⟩`, `du_i = Σ dR_i`,
//! `dA_j = Σ_i U_ij dR_i`; `dL = A ⊙ (dA − δ)`, `δ = Σ_keys A ⊙ dA`; `dW_ij = ⟨dL_i, S_j⟩`; `dS_j = Σ_i W_ij dL_i`;
//! `dQ = s dS K`, `dK = s dSᵀ Q`.

mod mix;

use rayon::prelude::*;

use super::attention::{AllHeads, Factor, ScoreBlock};
use crate::linalg::{Mat, MatMut};
use crate::tensor::{Buffer, Float};
use mix::{Attend, Block, Exponentials, Gram, PullBack, Remix, ScoreGradient};

/// Up to so many keys the scores of a block of rows are computed once.
pub const SINGLE_PASS: usize = 4096;
const ROWS: usize = 28;
/// Blocks beyond [`SINGLE_PASS`].
const LONG_ROWS: usize = 56;
const LONG_KEYS: usize = 128;
/// Parts per batch, at least, in which gradients of keys and values are summed.
const PARTS: usize = 8;
/// Floats in all those parts together, about, at most.
const PART_FLOATS: usize = 32 << 20;

/// The sizes of the attention: `qkv` is `[batch · tokens, 3 · heads · dim]`.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Images.
    pub batch: usize,
    /// Tokens N per image.
    pub tokens: usize,
    /// Heads h.
    pub heads: usize,
    /// Width d of a head.
    pub dim: usize,
}

impl Sizes {
    fn width(&self) -> usize {
        self.heads * self.dim
    }

    fn scale<T: Float>(&self) -> T {
        T::from_f64(1.0 / (self.dim as f64).sqrt())
    }

    /// Rows and keys of a block.
    fn plan(&self) -> Plan {
        if self.tokens <= SINGLE_PASS { (ROWS.min(self.tokens), self.tokens) } else { (LONG_ROWS, LONG_KEYS) }
    }

    /// Floating-point operations of the forward pass.
    pub fn flops(&self) -> usize {
        let (scores, mixes) = if self.tokens <= SINGLE_PASS { (2, 2) } else { (3, 3) };
        2 * self.batch * self.tokens * self.tokens * (scores * self.width() + mixes * self.heads * self.heads)
    }
}

/// The mixing of heads: `before` W and `after` U, `[h, h]`, rows are outputs; `after_bias` u, `[h]`.
#[derive(Clone, Copy)]
pub struct Mixing<'a, T> {
    /// W.
    pub before: &'a [T],
    /// U.
    pub after: &'a [T],
    /// u.
    pub after_bias: &'a [T],
}

/// The gradients of a [`Mixing`], which are added to.
pub struct MixingMut<'a, T> {
    /// dW.
    pub before: &'a mut [T],
    /// dU.
    pub after: &'a mut [T],
    /// du.
    pub after_bias: &'a mut [T],
}

/// The packed right operands of all images, heads and blocks of keys.
struct Packed<T: Float> {
    data: Buffer<T>,
    step: usize,
    heads: usize,
    blocks: usize,
}

impl<T: Float> Packed<T> {
    /// Part 1 (k) or 2 (v) of `qkv`, keys as rows, or as columns if `transposed`.
    fn new(qkv: &[T], part: usize, transposed: bool, keys: usize, sizes: Sizes) -> Self {
        let Sizes { tokens, heads, dim, .. } = sizes;
        let c = sizes.width();
        let blocks = tokens.div_ceil(keys);
        let step = if transposed { T::packed_len(dim, keys) } else { T::packed_len(keys, dim) };
        let mut data = Buffer::scratch(sizes.batch * heads * blocks * step);
        data.par_chunks_mut(step).enumerate().for_each(|(index, packed)| {
            let (image, a, block) = (index / (heads * blocks), index / blocks % heads, index % blocks);
            let from = (image * tokens + block * keys) * 3 * c + part * c + a * dim;
            let rows = Mat::strided(&qkv[from..], keys.min(tokens - block * keys), dim, 3 * c, 1);
            T::pack(if transposed { rows.t() } else { rows }, packed);
        });
        Packed { data, step, heads, blocks }
    }

    fn get(&self, image: usize, a: usize, block: usize) -> &[T] {
        &self.data[((image * self.heads + a) * self.blocks + block) * self.step..]
    }
}

fn transposed<T: Float>(w: &[T], heads: usize) -> Vec<T> {
    (0..heads * heads).map(|i| w[i % heads * heads + i / heads]).collect()
}

/// The scaled rows of q of some tokens, head after head: `[heads, rows, dim]`.
fn scaled_queries<T: Float>(out: &mut [T], qkv: &[T], first: usize, rows: usize, sizes: Sizes) {
    let (scale, c) = (sizes.scale::<T>(), sizes.width());
    for (i, row) in out.chunks_exact_mut(sizes.dim).enumerate() {
        let from = (first + i % rows) * 3 * c + i / rows * sizes.dim;
        row.iter_mut().zip(&qkv[from..from + sizes.dim]).for_each(|(y, &x)| *y = x * scale);
    }
}

/// Rows and keys of a block.
type Plan = (usize, usize);

/// Forward: `out` `[batch · tokens, heads · dim]`, and `stats` `[batch · tokens, heads, 2]` with `(m, 1/Σ)`.
pub fn forward<T: Float>(out: &mut [T], stats: &mut [T], qkv: &[T], mixing: Mixing<T>, sizes: Sizes) {
    forward_with(out, stats, qkv, mixing, None, sizes);
}

/// [`forward`] with a factor on the scores.
pub fn forward_with<T: Float>(out: &mut [T], stats: &mut [T], qkv: &[T], mixing: Mixing<T>, factor: Option<Factor<T>>, sizes: Sizes) {
    forward_by(sizes.plan(), out, stats, qkv, mixing, factor, sizes);
}

fn forward_by<T: Float>(
    (rows, keys): Plan,
    out: &mut [T],
    stats: &mut [T],
    qkv: &[T],
    mixing: Mixing<T>,
    factor: Option<Factor<T>>,
    sizes: Sizes,
) {
    let Sizes { batch, tokens, heads, dim } = sizes;
    let c = sizes.width();
    assert!(out.len() == batch * tokens * c && qkv.len() == 3 * out.len() && stats.len() == batch * tokens * heads * 2);
    if out.is_empty() {
        return;
    }
    let (before, after) = (transposed(mixing.before, heads), transposed(mixing.after, heads));
    let (kt, v) = (Packed::new(qkv, 1, true, keys, sizes), Packed::new(qkv, 2, false, keys, sizes));
    let factor = factor.and_then(|factor| AllHeads::new(factor, heads, tokens));
    let room = Block { heads, rows, keys }.len();
    let task = |image: usize, first: usize, out: &mut [T], stats: &mut [T]| {
        let m = out.len() / c;
        let (mut q, mut s, mut a) = (Buffer::<T>::scratch(m * c), Buffer::<T>::scratch(room), Buffer::<T>::scratch(room));
        let (mut scaled, mut line) = (Buffer::<T>::scratch(heads * heads), Buffer::<T>::scratch(keys.min(tokens)));
        scaled_queries(&mut q, qkv, image * tokens + first, m, sizes);
        let blocks = || (0..kt.blocks).map(|index| (index, Block { heads, rows: m, keys: keys.min(tokens - index * keys) }));
        let mut scores = |s: &mut [T], index: usize, block: Block| {
            block.clear_padding(s);
            for a in 0..heads {
                T::multiply_packed(Mat::new(&q[a * m * dim..], m, dim), kt.get(image, a, index), block.head_mut(s, a), false);
                if let Some(factor) = &factor {
                    let at = ScoreBlock { stride: block.stride(), query: first, key: index * keys, keys: block.keys };
                    factor.multiply(&mut s[a * block.plane()..(a + 1) * block.plane()], a, at, &mut line);
                }
            }
        };
        stats.chunks_exact_mut(2).for_each(|s| s.copy_from_slice(&[T::NEG_INFINITY, T::ZERO]));
        for (index, block) in blocks() {
            scores(&mut s, index, block);
            block.count_mix();
            T::dispatch(Exponentials { out: &mut a, scores: &s[..block.len()], w: &before, state: stats, block });
        }
        stats.chunks_exact_mut(2).for_each(|s| s[1] = T::ONE / s[1]);
        for (index, block) in blocks() {
            if kt.blocks > 1 {
                scores(&mut s, index, block);
                block.count_mix();
                T::dispatch(Attend { out: &mut a, scores: &s[..block.len()], w: &before, stats, block });
            }
            let stats = (kt.blocks == 1).then_some(&*stats);
            block.count_mix();
            let weights = &a[..block.len()];
            T::dispatch(Remix { out: &mut s, weights, w: &after, bias: mixing.after_bias, stats, scaled: &mut scaled, block });
            for a in 0..heads {
                let to = MatMut::strided(&mut out[a * dim..], m, dim, c);
                T::multiply_packed(block.head(&s, a), v.get(image, a, index), to, index > 0);
            }
        }
    };
    let images = out.par_chunks_mut(tokens * c).zip(stats.par_chunks_mut(tokens * heads * 2)).enumerate();
    images.for_each(|(image, (out, stats))| {
        let blocks = out.par_chunks_mut(rows * c).zip(stats.par_chunks_mut(rows * heads * 2)).enumerate();
        blocks.for_each(|(i, (out, stats))| task(image, i * rows, out, stats));
    });
}

/// Backward: `d_qkv` is written, the gradients of the mixing are added to.
pub fn backward<T: Float>(d_qkv: &mut [T], d_mixing: MixingMut<T>, d_out: &[T], qkv: &[T], stats: &[T], mixing: Mixing<T>, sizes: Sizes) {
    backward_by(sizes.plan(), d_qkv, d_mixing, d_out, qkv, stats, mixing, None, sizes);
}

/// [`backward`] with a factor on the scores, and where its gradient is added to.
#[allow(clippy::too_many_arguments)]
pub fn backward_with<T: Float>(
    d_qkv: &mut [T],
    d_mixing: MixingMut<T>,
    d_out: &[T],
    qkv: &[T],
    stats: &[T],
    mixing: Mixing<T>,
    factor: Option<(Factor<T>, &mut [T])>,
    sizes: Sizes,
) {
    backward_by(sizes.plan(), d_qkv, d_mixing, d_out, qkv, stats, mixing, factor, sizes);
}

#[allow(clippy::too_many_arguments)]
fn backward_by<T: Float>(
    (rows, keys): Plan,
    d_qkv: &mut [T],
    d_mixing: MixingMut<T>,
    d_out: &[T],
    qkv: &[T],
    stats: &[T],
    mixing: Mixing<T>,
    factor: Option<(Factor<T>, &mut [T])>,
    sizes: Sizes,
) {
    let Sizes { batch, tokens, heads, dim } = sizes;
    let (c, square) = (sizes.width(), heads * heads);
    assert!(d_qkv.len() == qkv.len() && qkv.len() == 3 * d_out.len() && d_out.len() == batch * tokens * c);
    assert_eq!(stats.len(), batch * tokens * heads * 2);
    if d_out.is_empty() {
        return;
    }
    // Gradients of keys and values (and of the mixing) are summed over the rows of a part, then over the parts, in order.
    let most = (PART_FLOATS / (batch * tokens * 2 * c)).max(2);
    let parts = PARTS.div_ceil(batch).min(most).min(tokens.div_ceil(rows));
    let part_rows = tokens.div_ceil(rows).div_ceil(parts) * rows;
    let parts = tokens.div_ceil(part_rows);
    let mut d_kv = Buffer::<T>::zeros(batch * parts * tokens * 2 * c);
    let (factor, d_factor) = factor.unzip();
    let factor = factor.and_then(|factor| AllHeads::new(factor, heads, tokens));
    let mix_len = 2 * square + heads + factor.as_ref().map_or(0, AllHeads::grads_len);
    let mut d_mix = Buffer::<T>::zeros(batch * parts * mix_len);
    let before = transposed(mixing.before, heads);
    let after = transposed(mixing.after, heads);
    let (k, kt, vt) =
        (Packed::new(qkv, 1, false, keys, sizes), Packed::new(qkv, 1, true, keys, sizes), Packed::new(qkv, 2, true, keys, sizes));
    let scale = sizes.scale::<T>();
    let room = Block { heads, rows, keys }.len();
    let task = |image: usize, first: usize, d_qkv: &mut [T], d_kv: &mut [T], d_mix: &mut [T]| {
        let scratch = || Buffer::<T>::scratch(room);
        let (mut s, mut a, mut r, mut d) = (scratch(), scratch(), scratch(), scratch());
        let (mut q, mut delta, mut scaled) =
            (Buffer::<T>::scratch(rows * c), Buffer::<T>::scratch(rows * heads), Buffer::<T>::scratch(square));
        let packed = T::packed_len(rows, dim);
        let (mut q_packed, mut do_packed) = (Buffer::<T>::scratch(heads * packed), Buffer::<T>::scratch(heads * packed));
        let (d_before, rest) = d_mix.split_at_mut(square);
        let (d_after, rest) = rest.split_at_mut(square);
        let (d_after_bias, d_tables) = rest.split_at_mut(heads);
        let mut raw = Buffer::<T>::scratch(if factor.is_some() { room } else { 0 });
        let mut line = Buffer::<T>::scratch(keys.min(tokens));
        for (i, d_qkv) in d_qkv.chunks_mut(rows * 3 * c).enumerate() {
            let (m, token) = (d_qkv.len() / (3 * c), image * tokens + first + i * rows);
            let stats = &stats[token * heads * 2..(token + m) * heads * 2];
            let q = &mut q[..m * c];
            scaled_queries(q, qkv, token, m, sizes);
            let d_out_of = |a: usize| Mat::strided(&d_out[token * c + a * dim..], m, dim, c, 1);
            for a in 0..heads {
                T::pack(Mat::new(&q[a * m * dim..], m, dim), &mut q_packed[a * packed..]);
                T::pack(d_out_of(a), &mut do_packed[a * packed..]);
            }
            let delta = &mut delta[..m * heads];
            delta.fill(T::ZERO);
            // S, A, dR = dO Vᵀ and dA of a block of keys; δ too, unless it is known.
            let query = first + i * rows;
            let place = |index: usize, block: Block| ScoreBlock { stride: block.stride(), query, key: index * keys, keys: block.keys };
            let again = |[s, a, r, d, raw, line]: [&mut [T]; 6], delta: Option<&mut [T]>, index: usize, block: Block| {
                block.clear_padding(s);
                block.clear_padding(r);
                for a in 0..heads {
                    T::multiply_packed(Mat::new(&q[a * m * dim..], m, dim), kt.get(image, a, index), block.head_mut(s, a), false);
                    T::multiply_packed(d_out_of(a), vt.get(image, a, index), block.head_mut(r, a), false);
                }
                if let Some(factor) = &factor {
                    raw[..block.len()].copy_from_slice(&s[..block.len()]);
                    for a in 0..heads {
                        let plane = a * block.plane()..(a + 1) * block.plane();
                        factor.multiply(&mut s[plane], a, place(index, block), line);
                    }
                }
                block.count_mix();
                T::dispatch(Attend { out: a, scores: &s[..block.len()], w: &before, stats, block });
                block.count_mix();
                let weights = delta.map(|delta| (&a[..block.len()], delta));
                T::dispatch(PullBack { out: d, x: &r[..block.len()], w: mixing.after, weights, block });
            };
            let blocks = || (0..kt.blocks).map(|index| (index, Block { heads, rows: m, keys: keys.min(tokens - index * keys) }));
            for (index, block) in blocks() {
                again([&mut s, &mut a, &mut r, &mut d, &mut raw, &mut line], Some(delta), index, block);
            }
            for (index, block) in blocks() {
                if kt.blocks > 1 {
                    again([&mut s, &mut a, &mut r, &mut d, &mut raw, &mut line], None, index, block);
                }
                let all = block.len();
                T::dispatch(ScoreGradient { d: &mut d[..all], weights: &a[..all], delta, block });
                block.count_mix();
                T::dispatch(Gram { out: d_after, sums: Some(d_after_bias), x: &r[..all], y: &a[..all], plane: block.plane() });
                // dR makes room for R.
                block.count_mix();
                let remix =
                    Remix { out: &mut r, weights: &a[..all], w: &after, bias: mixing.after_bias, stats: None, scaled: &mut scaled, block };
                T::dispatch(remix);
                block.count_mix();
                T::dispatch(Gram { out: d_before, sums: None, x: &d[..all], y: &s[..all], plane: block.plane() });
                // S makes room for dS.
                block.count_mix();
                T::dispatch(PullBack { out: &mut s, x: &d[..all], w: mixing.before, weights: None, block });
                if let Some(factor) = &factor {
                    for a in 0..heads {
                        let plane = a * block.plane()..(a + 1) * block.plane();
                        factor.pull_back(&mut s[plane.clone()], &raw[plane], d_tables, a, place(index, block), &mut line);
                    }
                }
                let from = index * keys * 2 * c;
                for a in 0..heads {
                    let dq = MatMut::strided(&mut d_qkv[a * dim..], m, dim, 3 * c);
                    T::multiply_packed(block.head(&s, a), k.get(image, a, index), dq, index > 0);
                    let dk = MatMut::strided(&mut d_kv[from + a * dim..], block.keys, dim, 2 * c);
                    T::multiply_packed(block.head(&s, a).t(), &q_packed[a * packed..], dk, true);
                    let dv = MatMut::strided(&mut d_kv[from + c + a * dim..], block.keys, dim, 2 * c);
                    T::multiply_packed(block.head(&r, a).t(), &do_packed[a * packed..], dv, true);
                }
            }
            d_qkv.chunks_exact_mut(3 * c).for_each(|row| row[..c].iter_mut().for_each(|x| *x *= scale));
        }
    };
    let images = d_qkv.par_chunks_mut(tokens * 3 * c).zip(d_kv.par_chunks_mut(parts * tokens * 2 * c));
    images.zip(d_mix.par_chunks_mut(parts * mix_len)).enumerate().for_each(|(image, ((d_qkv, d_kv), d_mix))| {
        let work = d_qkv.par_chunks_mut(part_rows * 3 * c).zip(d_kv.par_chunks_mut(tokens * 2 * c));
        work.zip(d_mix.par_chunks_mut(mix_len))
            .enumerate()
            .for_each(|(i, ((d_qkv, d_kv), d_mix))| task(image, i * part_rows, d_qkv, d_kv, d_mix));
        d_qkv.par_chunks_mut(3 * c).enumerate().for_each(|(row, d)| {
            for (part, d_kv) in d_kv.chunks_exact(tokens * 2 * c).enumerate() {
                let from = &d_kv[row * 2 * c..(row + 1) * 2 * c];
                if part == 0 {
                    d[c..].copy_from_slice(from);
                } else {
                    d[c..].iter_mut().zip(from).for_each(|(d, &x)| *d += x);
                }
            }
        });
    });
    for part in d_mix.chunks_exact(mix_len) {
        let totals = d_mixing.before.iter_mut().chain(d_mixing.after.iter_mut()).chain(d_mixing.after_bias.iter_mut());
        totals.zip(part).for_each(|(total, &x)| *total += x);
    }
    if let (Some(factor), Some(d_factor)) = (&factor, d_factor) {
        d_mix.chunks_exact(mix_len).for_each(|part| factor.add_to(d_factor, &part[2 * square + heads..]));
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention::FactorTable;
    use super::*;
    use crate::tensor::random::{Purpose, Rng};

    /// Blocks of keys, computed again, give what all keys at once give.
    #[test]
    fn blocks_do_not_matter() {
        for (tokens, heads) in [(19, 3), (32, 1), (5, 13)] {
            let sizes = Sizes { batch: 2, tokens, heads, dim: 3 };
            let (c, mut rng) = (sizes.width(), Rng::new(1, Purpose::Case, 0, tokens as u64));
            let mut normal = |n: usize| -> Vec<f64> { (0..n).map(|_| rng.normal()).collect() };
            let (qkv, d_out) = (normal(2 * tokens * 3 * c), normal(2 * tokens * c));
            let (before, after, after_bias) = (normal(heads * heads), normal(heads * heads), normal(heads));
            let mixing = Mixing { before: &before, after: &after, after_bias: &after_bias };
            let values = normal(heads * tokens);
            let factor = Factor { table: FactorTable::Distance { data: &values, grid: [1, tokens] }, prefix: 0 };
            let run = |plan: Plan| {
                let (mut out, mut stats) = (vec![0.0; 2 * tokens * c], vec![0.0; 2 * tokens * heads * 2]);
                forward_by(plan, &mut out, &mut stats, &qkv, mixing, Some(factor), sizes);
                let (mut d_qkv, mut w, mut u, mut b) =
                    (vec![0.0; qkv.len()], vec![0.0; heads * heads], vec![0.0; heads * heads], vec![0.0; heads]);
                let grads = MixingMut { before: &mut w, after: &mut u, after_bias: &mut b };
                let mut d_factor = vec![0.0; values.len()];
                backward_by(plan, &mut d_qkv, grads, &d_out, &qkv, &stats, mixing, Some((factor, &mut d_factor)), sizes);
                [out, d_qkv, w, u, b, d_factor].concat()
            };
            let whole = run((tokens, tokens));
            for plan in [(4, 16), (3, 5)] {
                for (a, b) in run(plan).iter().zip(&whole) {
                    assert!((a - b).abs() < 1e-11 * (1.0 + b.abs()), "{tokens} tokens, {heads} heads, {plan:?}: {a} instead of {b}");
                }
            }
        }
    }
}
