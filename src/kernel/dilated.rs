//! Dilated neighbourhood attention: every position of a map attends to `k × k` positions around it, `r` apart; no unfolded copy of k or v.
//!
//! Slot `t = a k + b` of position `(i, j)` lies at `(i + a r − pad, j + b r − pad)`, `pad = r (k − 1) / 2`. With `s` the scale,
//!
//! `ℓ_t = s q·k_t` inside the map and 0 outside, `p = softmax_t ℓ` over all `k²` slots, `o = Σ_{t inside} p_t v_t`.
//!
//! A slot outside the map is not masked: it takes its part of the softmax with logit 0 and gives nothing.
//!
//! Backward, `g = do`: the probabilities are computed again. Per query `δ_t = g·v_t`, `ρ = Σ_t p_t δ_t`, `dℓ_t = p_t (δ_t − ρ)`,
//! `dq = s Σ_t dℓ_t k_t`. Per key `m` the sums run over the queries `n = m − offset_t` that see it in slot `t`, which makes a gather of
//! the scatter: `dk_m = s Σ_t dℓ_{n,t} q_n`, `dv_m = Σ_t p_{n,t} g_n`. `p` and `dℓ` exist in between, `2 k²` numbers per query and head.
//!
//! One task is one row of a map and the heads that share a dilation; lanes run along the channels of a head.

use super::attention::Operand;
use super::{exp_of_softmax, get, put};
use crate::linalg::{ColumnsMut, count_flops, par_blocks};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

/// The sizes of a dilated attention.
#[derive(Clone, Copy, Debug)]
pub struct Sizes<'a> {
    /// Images.
    pub batch: usize,
    /// Rows and columns of the map.
    pub map: [usize; 2],
    /// Heads.
    pub heads: usize,
    /// Width of a head.
    pub dim: usize,
    /// Side k of the neighbourhood.
    pub kernel: usize,
    /// The distance r of neighbours, for each of equally many consecutive heads; `r (k − 1)` must be even.
    pub dilations: &'a [usize],
    /// The factor s on the scores.
    pub scale: f64,
}

impl Sizes<'_> {
    fn slots(&self) -> usize {
        self.kernel * self.kernel
    }

    /// Multiply-adds of one product over all slots, channels and positions.
    fn products(&self) -> usize {
        self.slots() * self.batch * self.map[0] * self.map[1] * self.heads * self.dim
    }

    /// Floating-point operations of a forward pass.
    pub fn flops(&self) -> usize {
        4 * self.products()
    }

    fn is_empty(&self) -> bool {
        self.batch * self.map[0] * self.map[1] * self.heads * self.dim == 0
    }
}

/// A slot, and the token of the image that lies there.
type Slot = (usize, usize);

/// One row of a map and the heads of one dilation.
#[derive(Clone, Copy)]
struct Task<'a> {
    sizes: Sizes<'a>,
    /// Row `i` of image `b` is `b · rows + i`.
    row: usize,
    group: usize,
}

impl Task<'_> {
    fn heads(&self) -> usize {
        self.sizes.heads / self.sizes.dilations.len()
    }

    /// The column of head `a` of the group in `[…, heads · dim]`.
    fn column(&self, a: usize) -> usize {
        (self.group * self.heads() + a) * self.sizes.dim
    }

    /// The token at the start of the row, and the first token of its image.
    fn first(&self) -> (usize, usize) {
        let [rows, cols] = self.sizes.map;
        (self.row * cols, self.row / rows * rows * cols)
    }

    /// The slots of column `j` inside the map: of the keys that it sees or, with `reverse`, of the queries that see it.
    fn slots_at(&self, j: usize, reverse: bool, out: &mut Vec<Slot>) {
        let (k, r, [rows, cols]) = (self.sizes.kernel, self.sizes.dilations[self.group], self.sizes.map);
        let pad = r * (k - 1) / 2;
        // `None` above or left of the map.
        let at = |from: usize, step: usize| if reverse { (from + pad).checked_sub(step * r) } else { (from + step * r).checked_sub(pad) };
        out.clear();
        for a in 0..k {
            let Some(y) = at(self.row % rows, a).filter(|&y| y < rows) else { continue };
            for b in 0..k {
                let Some(x) = at(j, b).filter(|&x| x < cols) else { continue };
                out.push((a * k + b, y * cols + x));
            }
        }
    }
}

/// Vectors that a piece of a head fills: up to four stay in registers, a wider head goes one by one.
fn vectors(dim: usize) -> usize {
    let n = dim.div_ceil(LANES);
    if n <= 4 { n } else { 1 }
}

/// Calls a method for the number of vectors per piece.
macro_rules! by_vectors {
    ($this:expr, $V:ty) => {
        match vectors($this.task.sizes.dim) {
            2 => $this.row::<$V, 2>(),
            3 => $this.row::<$V, 3>(),
            4 => $this.row::<$V, 4>(),
            _ => $this.row::<$V, 1>(),
        }
    };
}

#[inline(always)]
fn part<'a, T>(x: &Operand<'a, T>, token: usize, column: usize, width: usize) -> &'a [T] {
    &x.data[token * x.stride + x.offset + column..][..width]
}

#[inline(always)]
fn load<T: Float, V: Vector<T>, const N: usize>(x: &[T]) -> [V; N] {
    // A loop and not a closure, which a kernel compiled for AVX need not inline.
    let mut vectors = [V::splat(T::ZERO); N];
    for (i, v) in vectors.iter_mut().enumerate() {
        *v = get(x, i * LANES, T::ZERO);
    }
    vectors
}

/// `out[t] ← scale · x·y_t` for the slots inside; `y` at `column` of tokens from `first` on.
#[inline(always)]
fn products<T: Float, V: Vector<T>, const N: usize>(
    out: &mut [T],
    x: &[T],
    (y, first, column): (&Operand<T>, usize, usize),
    slots: &[Slot],
    scale: T,
) {
    for from in (0..x.len()).step_by(N * LANES) {
        let width = (x.len() - from).min(N * LANES);
        let x = load::<T, V, N>(&x[from..from + width]);
        for &(t, n) in slots {
            let y = load::<T, V, N>(part(y, first + n, column + from, width));
            let mut sum = x[0] * y[0];
            for i in 1..N {
                sum = x[i].mul_add(y[i], sum);
            }
            let product = sum.sum() * scale;
            out[t] = if from == 0 { product } else { out[t] + product };
        }
    }
}

/// `out ← scale · Σ_t weight(t, n_t) y_t` over the slots inside.
#[inline(always)]
fn combine<T: Float, V: Vector<T>, const N: usize>(
    out: &mut [T],
    weight: impl Fn(Slot) -> T,
    (y, first, column): (&Operand<T>, usize, usize),
    slots: &[Slot],
    scale: T,
) {
    for from in (0..out.len()).step_by(N * LANES) {
        let width = (out.len() - from).min(N * LANES);
        let mut sum = [V::splat(T::ZERO); N];
        for &slot in slots {
            let w = V::splat(weight(slot));
            let y = load::<T, V, N>(part(y, first + slot.1, column + from, width));
            for i in 0..N {
                sum[i] = w.mul_add(y[i], sum[i]);
            }
        }
        let scale = V::splat(scale);
        for (i, sum) in sum.into_iter().enumerate() {
            put(sum * scale, &mut out[from..from + width], i * LANES);
        }
    }
}

/// `e ← e^{ℓ − max ℓ}`; returns `1/Σ e`. Both are a whole number of vectors, padded with −∞.
#[inline(always)]
fn exponentials<T: Float, V: Vector<T>>(e: &mut [T], logits: &[T]) -> T {
    let mut best = V::splat(T::NEG_INFINITY);
    for l in logits.chunks_exact(LANES) {
        best = V::load(l).max(best);
    }
    let (max, mut sum) = (V::splat(best.largest()), V::splat(T::ZERO));
    for (e, l) in e.chunks_exact_mut(LANES).zip(logits.chunks_exact(LANES)) {
        let x = exp_of_softmax::<T, V>(V::load(l) - max);
        sum = sum + x;
        x.store(e);
    }
    T::ONE / sum.sum()
}

/// Scratch for the slots of one query, padded to whole vectors.
struct Scratch<T: Float> {
    logits: Buffer<T>,
    p: Buffer<T>,
    slots: Vec<Slot>,
    count: usize,
}

impl<T: Float> Scratch<T> {
    fn new(count: usize) -> Self {
        let len = count.next_multiple_of(LANES);
        let mut logits = Buffer::scratch(len);
        logits[count..].fill(T::NEG_INFINITY);
        Scratch { logits, p: Buffer::scratch(len), slots: Vec::with_capacity(count), count }
    }

    /// Goes to the query at column `j`: slots outside the map have logit 0.
    fn start(&mut self, task: &Task, j: usize) {
        task.slots_at(j, false, &mut self.slots);
        self.logits[..self.count].fill(T::ZERO);
    }
}

struct Forward<'a, T> {
    task: Task<'a>,
    out: ColumnsMut<'a, T>,
    q: Operand<'a, T>,
    k: Operand<'a, T>,
    v: Operand<'a, T>,
}

impl<T: Float> Forward<'_, T> {
    #[inline(always)]
    fn row<V: Vector<T>, const N: usize>(self) {
        let Forward { task, mut out, q, k, v } = self;
        let (dim, scale) = (task.sizes.dim, T::from_f64(task.sizes.scale));
        let (start, first) = task.first();
        let mut s = Scratch::new(task.sizes.slots());
        for j in 0..task.sizes.map[1] {
            s.start(&task, j);
            let out = out.row(j);
            for a in 0..task.heads() {
                let column = task.column(a);
                // ℓ_t = s q·k_t
                products::<T, V, N>(&mut s.logits, part(&q, start + j, column, dim), (&k, first, column), &s.slots, scale);
                let inverse = exponentials::<T, V>(&mut s.p, &s.logits);
                // o = Σ p_t v_t
                let p = &s.p;
                combine::<T, V, N>(&mut out[a * dim..(a + 1) * dim], |(t, _)| p[t], (&v, first, column), &s.slots, inverse);
            }
        }
    }
}

impl<T: Float> Kernel<T> for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        by_vectors!(self, V)
    }
}

/// `out` `[batch · tokens, heads · dim]` ← the attention of `q`, `k`, `v`.
pub fn forward<T: Float>(out: &mut [T], q: Operand<T>, k: Operand<T>, v: Operand<T>, sizes: Sizes) {
    let [rows, cols] = sizes.map;
    assert_eq!(out.len(), sizes.batch * rows * cols * sizes.heads * sizes.dim);
    if sizes.is_empty() {
        return;
    }
    count_flops(sizes.flops());
    let out = ColumnsMut::new(out, sizes.heads * sizes.dim);
    par_blocks([out], [], sizes.batch * rows, sizes.dilations.len(), |row, group, [out], []| {
        T::dispatch(Forward { task: Task { sizes, row, group }, out, q, k, v });
    });
}

/// The backward pass of the queries: `dq`, and `p` and `dℓ` for the keys.
struct Queries<'a, T> {
    task: Task<'a>,
    dq: ColumnsMut<'a, T>,
    /// Per query of the row and head of the group: `p`, `dℓ`.
    weights: ColumnsMut<'a, T>,
    q: Operand<'a, T>,
    k: Operand<'a, T>,
    v: Operand<'a, T>,
    d_out: Operand<'a, T>,
}

impl<T: Float> Queries<'_, T> {
    #[inline(always)]
    fn row<V: Vector<T>, const N: usize>(self) {
        let Queries { task, mut dq, mut weights, q, k, v, d_out } = self;
        let (dim, count, scale) = (task.sizes.dim, task.sizes.slots(), T::from_f64(task.sizes.scale));
        let (start, first) = task.first();
        let mut s = Scratch::new(count);
        let mut delta = Buffer::<T>::zeros(count.next_multiple_of(LANES));
        for j in 0..task.sizes.map[1] {
            s.start(&task, j);
            // δ of slots outside is 0.
            delta.fill(T::ZERO);
            let (dq, weights) = (dq.row(j), weights.row(j));
            for (a, weights) in weights.chunks_exact_mut(2 * count).enumerate() {
                let column = task.column(a);
                let g = part(&d_out, start + j, column, dim);
                products::<T, V, N>(&mut s.logits, part(&q, start + j, column, dim), (&k, first, column), &s.slots, scale);
                let inverse = V::splat(exponentials::<T, V>(&mut s.p, &s.logits));
                // δ_t = g·v_t, ρ = Σ p_t δ_t
                products::<T, V, N>(&mut delta, g, (&v, first, column), &s.slots, T::ONE);
                let mut rho = V::splat(T::ZERO);
                for (p, d) in s.p.chunks_exact_mut(LANES).zip(delta.chunks_exact(LANES)) {
                    let normed = V::load(p) * inverse;
                    normed.store(p);
                    rho = normed.mul_add(V::load(d), rho);
                }
                let rho = V::splat(rho.sum());
                // dℓ_t = p_t (δ_t − ρ)
                let (to_p, to_dl) = weights.split_at_mut(count);
                for i in (0..count).step_by(LANES) {
                    let p = get::<T, V>(&s.p, i, T::ZERO);
                    put(p, to_p, i);
                    put(p * (get::<T, V>(&delta, i, T::ZERO) - rho), to_dl, i);
                }
                // dq = s Σ dℓ_t k_t
                combine::<T, V, N>(&mut dq[a * dim..(a + 1) * dim], |(t, _)| to_dl[t], (&k, first, column), &s.slots, scale);
            }
        }
    }
}

impl<T: Float> Kernel<T> for Queries<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        by_vectors!(self, V)
    }
}

/// The backward pass of the keys and values.
struct Keys<'a, T> {
    task: Task<'a>,
    dk: ColumnsMut<'a, T>,
    dv: ColumnsMut<'a, T>,
    weights: &'a [T],
    q: Operand<'a, T>,
    d_out: Operand<'a, T>,
}

impl<T: Float> Keys<'_, T> {
    #[inline(always)]
    fn row<V: Vector<T>, const N: usize>(self) {
        let Keys { task, mut dk, mut dv, weights, q, d_out } = self;
        let (dim, count, scale) = (task.sizes.dim, task.sizes.slots(), T::from_f64(task.sizes.scale));
        let first = task.first().1;
        let mut slots = Vec::with_capacity(count);
        for j in 0..task.sizes.map[1] {
            task.slots_at(j, true, &mut slots);
            let (dk, dv) = (dk.row(j), dv.row(j));
            for a in 0..task.heads() {
                let column = task.column(a);
                let at = |(t, n): Slot| ((first + n) * task.sizes.heads + column / dim) * 2 * count + t;
                let to = a * dim..(a + 1) * dim;
                // dk_m = s Σ dℓ_{n,t} q_n, dv_m = Σ p_{n,t} g_n
                combine::<T, V, N>(&mut dk[to.clone()], |slot| weights[at(slot) + count], (&q, first, column), &slots, scale);
                combine::<T, V, N>(&mut dv[to], |slot| weights[at(slot)], (&d_out, first, column), &slots, T::ONE);
            }
        }
    }
}

impl<T: Float> Kernel<T> for Keys<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        by_vectors!(self, V)
    }
}

/// Writes `dq`, `dk`, `dv` (each `[batch · tokens, heads · dim]`, columns of wider rows or not) for the gradient `d_out` of [`forward`]'s
/// output.
pub fn backward<T: Float>([dq, dk, dv]: [ColumnsMut<T>; 3], d_out: &[T], q: Operand<T>, k: Operand<T>, v: Operand<T>, sizes: Sizes) {
    let Sizes { batch, map: [rows, cols], heads, dim, dilations, .. } = sizes;
    assert_eq!(d_out.len(), batch * rows * cols * heads * dim);
    if sizes.is_empty() {
        return;
    }
    count_flops(10 * sizes.products());
    let d_out = Operand { data: d_out, stride: heads * dim, offset: 0 };
    let per_token = heads * 2 * sizes.slots();
    let mut weights = Buffer::<T>::scratch(batch * rows * cols * per_token);
    let columns = ColumnsMut::new(&mut weights, per_token);
    par_blocks([dq, columns], [], batch * rows, dilations.len(), |row, group, [dq, weights], []| {
        T::dispatch(Queries { task: Task { sizes, row, group }, dq, weights, q, k, v, d_out });
    });
    let weights = &weights[..];
    par_blocks([dk, dv], [], batch * rows, dilations.len(), |row, group, [dk, dv], []| {
        T::dispatch(Keys { task: Task { sizes, row, group }, dk, dv, weights, q, d_out });
    });
}
