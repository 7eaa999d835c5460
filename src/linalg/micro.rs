//! The micro-kernel: one tile of C in registers, and the packing of B that feeds it.

use crate::simd::{LANES, Vector, prefetch};

use super::view::Mat;

/// Products are summed in blocks of this many: inside a block one chain of fused multiply-adds in the order of k, then the
/// blocks in order. Tile shape, packing, instruction set and threads do not enter, so neither do they change a bit.
pub const KC: usize = 384;

/// Rows and vectors of a register tile.
#[derive(Clone, Copy)]
pub struct TileShape {
    /// Rows of C.
    pub rows: usize,
    /// Vectors of sixteen columns of C.
    pub vectors: usize,
}

impl TileShape {
    /// Whether a tile uses most of each cache line of a column of A that it touches.
    pub const fn reads_columns(&self) -> bool {
        2 * self.rows >= LANES
    }
}

/// One output tile: where A, B and C lie.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Products to sum, at most [`KC`].
    pub k: usize,
    /// `A(0, 0)` of the tile; element `(i, p)` is `i·a_row + p·a_col` further.
    pub a: *const f32,
    pub a_row: usize,
    pub a_col: usize,
    /// A packed panel of B: `vectors · 16` floats for each k.
    pub b: *const f32,
    /// `C(0, 0)` of the tile.
    pub c: *mut f32,
    pub c_row: usize,
    /// Columns of C to write: the rest of the panel is padding.
    pub cols: usize,
    /// Add to C instead of overwriting it.
    pub add: bool,
}

/// `C (+)= A B` for one tile of `ROWS` rows and `16 · NV` columns.
///
/// # Safety
/// The pointers of `t` must be valid for what the tile's shape and strides reach, and no other thread may touch the tile of C.
#[inline(always)]
unsafe fn tile<V: Vector<f32>, const ROWS: usize, const NV: usize>(t: Tile) {
    let mut acc = [[V::splat(0.0); NV]; ROWS];
    for i in 0..ROWS {
        prefetch(t.c.wrapping_add(i * t.c_row));
        prefetch(t.c.wrapping_add(i * t.c_row + LANES * NV - 1));
    }
    let (mut a, mut b) = (t.a, t.b);
    for _ in 0..t.k {
        for v in 0..NV {
            prefetch(b.wrapping_add((8 * NV + v) * LANES));
        }
        if V::TILE.reads_columns() && t.a_col > LANES {
            // Columns are too far apart for the hardware to guess where the next one is.
            prefetch(a.wrapping_add(12 * t.a_col));
            prefetch(a.wrapping_add(12 * t.a_col + ROWS - 1));
        }
        // SAFETY: k steps of `NV` vectors lie in the panel, `ROWS` elements in every column of A.
        unsafe {
            let row: [V; NV] = std::array::from_fn(|v| V::load_ptr(b.add(v * LANES)));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = V::splat(*a.add(i * t.a_row));
                for v in 0..NV {
                    acc[v] = x.mul_add(row[v], acc[v]);
                }
            }
            b = b.add(NV * LANES);
            a = a.wrapping_add(t.a_col);
        }
    }
    for (i, acc) in acc.iter().enumerate() {
        // SAFETY: row i of the tile has `cols` elements, and it is ours alone.
        let row = unsafe { std::slice::from_raw_parts_mut(t.c.add(i * t.c_row), t.cols) };
        for (v, &acc) in acc.iter().enumerate() {
            let Some(part) = row.get_mut(v * LANES..) else { break };
            if part.len() >= LANES {
                (if t.add { V::load(part) + acc } else { acc }).store(part);
            } else if !part.is_empty() {
                (if t.add { V::load_partial(part, 0.0) + acc } else { acc }).store_partial(part);
            }
        }
    }
}

/// [`tile`] for a number of rows and vectors known at run time.
///
/// # Safety
/// As [`tile`]; `rows` and `vectors` are at most `V`'s tile shape.
#[inline(always)]
pub unsafe fn tile_of<V: Vector<f32>>(rows: usize, vectors: usize, t: Tile) {
    macro_rules! arms {
        ($($n:literal)*) => {
            match rows {
                $($n if $n <= V::TILE.rows => {
                    // SAFETY: the caller's promise.
                    unsafe { if vectors == 2 && V::TILE.vectors == 2 { tile::<V, $n, 2>(t) } else { tile::<V, $n, 1>(t) } }
                })*
                _ => unreachable!("a tile of {rows} rows"),
            }
        };
    }
    arms!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
}

/// The length of B packed: `k · n` with the columns padded to whole vectors.
pub fn packed_len(k: usize, n: usize) -> usize {
    k * n.next_multiple_of(LANES)
}

/// The panels of `n` columns: `(first column, vectors)` of each, the last one possibly narrower than the tile.
pub fn panel(n: usize, tile_vectors: usize, index: usize) -> (usize, usize) {
    let first = index * tile_vectors * LANES;
    (first, (n - first).div_ceil(LANES).min(tile_vectors))
}

/// Packs columns `first..` of B, `vectors · 16` of them, as one panel: row after row, padded with zeros.
#[inline(always)]
pub fn pack_panel<V: Vector<f32>>(b: Mat<f32>, first: usize, vectors: usize, out: &mut [f32]) {
    let width = vectors * LANES;
    let cols = width.min(b.cols() - first);
    let (k, rs, cs, data) = (b.rows(), b.row_stride(), b.col_stride(), b.data());
    let out = &mut out[..k * width];
    if k == 0 {
        return;
    }
    if cs == 1 {
        for (p, row) in out.chunks_exact_mut(width).enumerate() {
            let from = p * rs + first;
            if cols == 2 * LANES {
                // A constant length: moves, not a call.
                row[..2 * LANES].copy_from_slice(&data[from..from + 2 * LANES]);
            } else {
                row[..cols].copy_from_slice(&data[from..from + cols]);
                row[cols..].fill(0.0);
            }
        }
        return;
    }
    // A transposed operand: 16 × 16 blocks, so that both sides are touched a cache line at a time.
    const BLOCK: usize = 16;
    for p0 in (0..k).step_by(BLOCK) {
        let depth = BLOCK.min(k - p0);
        for j0 in (0..width).step_by(BLOCK) {
            let live = cols.saturating_sub(j0).min(BLOCK);
            if rs == 1 && depth == BLOCK && live == BLOCK {
                let (from, to) = ((first + j0) * cs + p0, p0 * width + j0);
                let (from, to) = (&data[from..from + 15 * cs + BLOCK], &mut out[to..to + 15 * width + BLOCK]);
                // SAFETY: the slices just taken hold both blocks.
                unsafe { V::transpose(from.as_ptr(), cs, to.as_mut_ptr(), width) };
                continue;
            }
            for p in 0..depth {
                let to = (p0 + p) * width + j0;
                let row = &mut out[to..to + BLOCK];
                for (j, x) in row[..live].iter_mut().enumerate() {
                    *x = data[(p0 + p) * rs + (first + j0 + j) * cs];
                }
                row[live..].fill(0.0);
            }
        }
    }
}
