//! A table of position biases: `b = W₂ ReLU(W₁ z + b₁) + b₂` for many offsets z of two coordinates.
//!
//! Entries lie in the lanes. `z` holds the two coordinates of all entries one after the other, `[2, T]`; the table is `[heads, T]`, T a
//! multiple of [`CHUNK`]. Backward: `du = W₂ᵀ db`, `da = du ⊙ [a > 0]`, `dW₂ = Σ db uᵀ`, `dW₁ = Σ da zᵀ`, `db₁ = Σ da`.

use rayon::prelude::*;

use super::{get, put};
use crate::linalg::{ColumnsMut, par_blocks};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

/// Entries per task: T is a multiple of it.
pub const CHUNK: usize = 256;

/// The parameters: `W₁` `[hidden, 2]`, `b₁`, `W₂` `[heads, hidden]`, `b₂`.
#[derive(Clone, Copy)]
pub struct Weights<'a, T> {
    /// `W₁` `[hidden, 2]`.
    pub first: &'a [T],
    /// `b₁` `[hidden]`.
    pub first_bias: &'a [T],
    /// `W₂` `[heads, hidden]`.
    pub second: &'a [T],
    /// `b₂` `[heads]`.
    pub second_bias: &'a [T],
}

impl<T: Float> Weights<'_, T> {
    /// `a = W₁ z + b₁` of one hidden unit.
    #[inline(always)]
    fn hidden<V: Vector<T>>(&self, k: usize, [row, column]: [V; 2]) -> V {
        let (w, b) = (&self.first[2 * k..2 * k + 2], V::splat(self.first_bias[k]));
        column.mul_add(V::splat(w[1]), row.mul_add(V::splat(w[0]), b))
    }
}

struct Forward<'a, T> {
    out: &'a mut [T],
    z: [&'a [T]; 2],
    head: usize,
    weights: Weights<'a, T>,
}

impl<T: Float> Kernel<T> for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let hidden = self.weights.first_bias.len();
        let second = &self.weights.second[self.head * hidden..(self.head + 1) * hidden];
        for j in (0..self.out.len()).step_by(LANES) {
            let z = [get::<T, V>(self.z[0], j, T::ZERO), get::<T, V>(self.z[1], j, T::ZERO)];
            let mut sum = V::splat(self.weights.second_bias[self.head]);
            for (k, &w) in second.iter().enumerate() {
                sum = self.weights.hidden(k, z).max(V::splat(T::ZERO)).mul_add(V::splat(w), sum);
            }
            put(sum, self.out, j);
        }
    }
}

/// Writes the table `[heads, T]` of `z` `[2, T]`.
pub fn forward<T: Float>(table: &mut [T], z: &[T], weights: Weights<T>) {
    let (entries, heads) = (z.len() / 2, weights.second_bias.len());
    assert!(entries.is_multiple_of(CHUNK) && table.len() == heads * entries);
    if table.is_empty() {
        return;
    }
    let (rows, columns) = z.split_at(entries);
    par_blocks([ColumnsMut::new(table, entries)], [], heads, entries / CHUNK, |head, chunk, [mut out], []| {
        let at = chunk * CHUNK..(chunk + 1) * CHUNK;
        T::dispatch(Forward { out: out.row(0), z: [&rows[at.clone()], &columns[at]], head, weights });
    });
}

struct Backward<'a, T> {
    /// For every hidden unit `dW₁` (two), `db₁` and `dW₂` (one per head), sixteen lanes each.
    sums: &'a mut [T],
    z: [&'a [T]; 2],
    d_table: &'a [T],
    /// The distance between heads in `d_table`.
    entries: usize,
    weights: Weights<'a, T>,
}

impl<T: Float> Kernel<T> for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let (hidden, heads) = (self.weights.first_bias.len(), self.weights.second_bias.len());
        let zero = V::splat(T::ZERO);
        for j in (0..self.z[0].len()).step_by(LANES) {
            let z @ [row, column] = [get::<T, V>(self.z[0], j, T::ZERO), get::<T, V>(self.z[1], j, T::ZERO)];
            for (k, sums) in self.sums.chunks_exact_mut((3 + heads) * LANES).enumerate() {
                let a = self.weights.hidden(k, z);
                let (u, mut du) = (a.max(zero), zero);
                for head in 0..heads {
                    let db = get::<T, V>(self.d_table, head * self.entries + j, T::ZERO);
                    du = db.mul_add(V::splat(self.weights.second[head * hidden + k]), du);
                    let at = (3 + head) * LANES;
                    put(db.mul_add(u, get(sums, at, T::ZERO)), sums, at);
                }
                let da = zero.less(a, du, zero);
                put(da.mul_add(row, get(sums, 0, T::ZERO)), sums, 0);
                put(da.mul_add(column, get(sums, LANES, T::ZERO)), sums, LANES);
                put(da + get::<T, V>(sums, 2 * LANES, T::ZERO), sums, 2 * LANES);
            }
        }
    }
}

struct LaneSums<'a, T> {
    x: &'a [T],
    out: &'a mut [T],
}

impl<T: Float> Kernel<T> for LaneSums<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        for (j, out) in self.out.iter_mut().enumerate() {
            *out += get::<T, V>(self.x, j * LANES, T::ZERO).sum();
        }
    }
}

/// The gradients of `W₁`, `b₁` and `W₂`, in this order, for the gradient `d_table` `[heads, T]`. `b₂` shifts all logits of a head alike,
/// so a softmax over them gives it none.
pub fn backward<T: Float>(d_table: &[T], z: &[T], weights: Weights<T>) -> [Buffer<T>; 3] {
    let (entries, heads, hidden) = (z.len() / 2, weights.second_bias.len(), weights.first_bias.len());
    assert!(entries.is_multiple_of(CHUNK) && d_table.len() == heads * entries);
    let (rows, columns) = z.split_at(entries);
    let each = (3 + heads) * hidden;
    let mut parts = Buffer::<T>::zeros(entries / CHUNK * each);
    parts.par_chunks_mut(each.max(1)).enumerate().for_each(|(chunk, out)| {
        let mut sums = Buffer::<T>::zeros(each * LANES);
        let at = chunk * CHUNK..(chunk + 1) * CHUNK;
        T::dispatch(Backward {
            sums: &mut sums,
            z: [&rows[at.clone()], &columns[at.clone()]],
            d_table: &d_table[at.start..],
            entries,
            weights,
        });
        T::dispatch(LaneSums { x: &sums, out });
    });
    let mut total = Buffer::<T>::zeros(each);
    super::reduce::add_column_sums(&mut total, &parts);
    let mut grads = [2 * hidden, hidden, heads * hidden].map(Buffer::<T>::zeros);
    for (k, total) in total.chunks_exact(3 + heads).enumerate() {
        grads[0][2 * k..2 * k + 2].copy_from_slice(&total[..2]);
        grads[1][k] = total[2];
        for (head, &sum) in total[3..].iter().enumerate() {
            grads[2][head * hidden + k] = sum;
        }
    }
    grads
}
