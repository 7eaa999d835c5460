//! `C = A B` in f32: packing, blocking, threads and epilogues around the micro-kernel.

use rayon::prelude::*;

use super::micro::{self, KC, Tile, TileShape, pack_panel, panel, tile_of};
use super::view::{Mat, MatMut};
use super::{Activation, Epilogue};
use crate::simd::{self, Isa, Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

/// Packed B stays below this many floats (4 MiB): longer sums are taken in several passes over C.
const PACK_LIMIT: usize = 1 << 20;
/// Register tiles per task, in rows and columns: B's part of a task fits L2.
const TASK_ROWS: usize = 8;
const TASK_COLS: usize = 12;
/// Products below this many run on the calling thread.
const PARALLEL_FROM: usize = 1 << 18;

/// A pointer that tasks share; each writes its own tiles.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub *mut T);
// SAFETY: tasks write disjoint tiles, see `Task`.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

/// The register tile of the active back end.
struct TileOf;
impl Kernel<f32> for TileOf {
    type Output = TileShape;
    #[inline(always)]
    fn run<V: Vector<f32>>(self) -> TileShape {
        V::TILE
    }
}

/// The register tile of the back end `isa`.
///
/// # Safety
/// This machine must have `isa`.
unsafe fn tile_shape_on(isa: Isa) -> TileShape {
    // SAFETY: the caller's promise.
    unsafe { simd::dispatch_f32_on(isa, TileOf) }
}

/// Cuts `n` items into `parts` runs that differ by at most one; run `i`.
fn share(n: usize, parts: usize, i: usize) -> (usize, usize) {
    (n * i / parts, n * (i + 1) / parts)
}

/// A rectangle of C, for one range of k, by one thread.
struct Task<'a> {
    a: Mat<'a, f32>,
    /// Panels of B for rows `k0..k0 + k` of it.
    packed: &'a [f32],
    k0: usize,
    k: usize,
    n: usize,
    c: *mut f32,
    c_row: usize,
    rows: (usize, usize),
    panels: (usize, usize),
    first_pass: bool,
    last_pass: bool,
    epilogue: &'a RawEpilogue<'a, f32>,
}

impl Kernel<f32> for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector<f32>>(self) {
        let TileShape { rows: tile_rows, vectors } = V::TILE;
        let rows = self.rows.1 - self.rows.0;
        let strips = rows.div_ceil(tile_rows);
        // A is read in place if its columns follow each other and its rows do not all fall into one set of an L1 cache.
        let in_place = self.a.col_stride() == 1 && !(self.a.row_stride() * 4).is_multiple_of(4096);
        let mut scratch = Buffer::<f32>::scratch(if in_place { 0 } else { tile_rows.max(LANES) * COPY_STRIDE });
        for kb in (0..self.k).step_by(KC) {
            let depth = KC.min(self.k - kb);
            let add = self.epilogue.accumulate || !self.first_pass || kb > 0;
            let last = self.last_pass && kb + depth == self.k;
            let panels = self.panels.1 - self.panels.0;
            let mut copied = (usize::MAX, (0, 0));
            for index in 0..strips * panels {
                let (strip, p) = (index / panels, index % panels);
                let (r0, r1) = share(rows, strips, strip);
                let (r0, r1) = (self.rows.0 + r0, self.rows.0 + r1);
                let source = self.a.rows_from(r0, r1 - r0).cols_from(self.k0 + kb, depth);
                let (a, a_row, a_col) = if in_place {
                    (source.data().as_ptr(), source.row_stride(), 1)
                } else {
                    if copied.0 != strip {
                        copied = (strip, copy_strip::<V>(source, tile_rows, &mut scratch));
                    }
                    (scratch.as_ptr(), copied.1.0, copied.1.1)
                };
                let (first, v) = panel(self.n, vectors, self.panels.0 + p);
                let cols = (v * LANES).min(self.n - first);
                // SAFETY: `first` and the strip lie inside C and in no other task; the panel has `self.k` rows.
                unsafe {
                    let c = self.c.add(r0 * self.c_row + first);
                    let b = self.packed.as_ptr().add(self.k * first + kb * v * LANES);
                    tile_of::<V>(r1 - r0, v, Tile { k: depth, a, a_row, a_col, b, c, c_row: self.c_row, cols, add });
                    if last && !self.epilogue.is_plain() {
                        for r in r0..r1 {
                            let row = std::slice::from_raw_parts_mut(self.c.add(r * self.c_row + first), cols);
                            self.epilogue.finish::<V>(r, first, row);
                        }
                    }
                }
            }
        }
        if self.k == 0 {
            for r in self.rows.0..self.rows.1 {
                let (first, _) = panel(self.n, vectors, self.panels.0);
                let end = (self.panels.1 * vectors * LANES).min(self.n);
                // SAFETY: this task's part of row r.
                let row = unsafe { std::slice::from_raw_parts_mut(self.c.add(r * self.c_row + first), end - first) };
                if !self.epilogue.accumulate {
                    row.fill(0.0);
                }
                // SAFETY: as above.
                unsafe { self.epilogue.finish::<V>(r, first, row) };
            }
        }
    }
}

/// The distance between rows of A copied for a task: a block, and a cache line that moves each row to other cache sets.
const COPY_STRIDE: usize = KC + LANES;

/// Copies a strip of A to where a tile reads it well; returns its row and column strides there.
#[inline(always)]
fn copy_strip<V: Vector<f32>>(a: Mat<f32>, tile_rows: usize, out: &mut [f32]) -> (usize, usize) {
    let (rows, rs, cs, data) = (a.rows(), a.row_stride(), a.col_stride(), a.data());
    if cs == 1 {
        for (i, row) in out.chunks_exact_mut(COPY_STRIDE).take(rows).enumerate() {
            row[..a.cols()].copy_from_slice(&data[i * rs..i * rs + a.cols()]);
        }
        return (COPY_STRIDE, 1);
    }
    for p in 0..a.cols() {
        let (to, from) = (p * tile_rows, p * cs);
        if rs == 1 && from + LANES <= data.len() {
            // Whole vectors: what is too much is overwritten by the next column, or is never read.
            V::load(&data[from..]).store(&mut out[to..]);
        } else {
            for i in 0..rows {
                out[to + i] = data[from + i * rs];
            }
        }
    }
    (1, tile_rows)
}

/// An [`Epilogue`] whose outputs are pointers that tasks share.
pub(super) struct RawEpilogue<'a, T> {
    pub accumulate: bool,
    bias: Option<&'a [T]>,
    residual: Option<Mat<'a, T>>,
    activation: RawActivation<'a, T>,
}

enum RawActivation<'a, T> {
    None,
    Gelu { out: Shared<T>, stride: usize },
    GeluBackward { pre: Mat<'a, T>, out: Shared<T>, stride: usize },
}

impl<'a, T: Float> RawEpilogue<'a, T> {
    pub fn new(epilogue: Epilogue<'a, T>, m: usize, n: usize) -> Self {
        if let Some(bias) = epilogue.bias {
            assert_eq!(bias.len(), n, "bias length");
        }
        let fits = |mat: &Mat<T>| assert!(mat.rows() == m && mat.cols() == n && mat.col_stride() == 1, "epilogue operand shape");
        epilogue.residual.iter().for_each(fits);
        let activation = match epilogue.activation {
            Activation::None => RawActivation::None,
            Activation::Gelu { mut out } => {
                assert!(out.rows() == m && out.cols() == n, "activation shape");
                RawActivation::Gelu { stride: out.row_stride(), out: Shared(out.data().as_mut_ptr()) }
            }
            Activation::GeluBackward { pre, mut out } => {
                fits(&pre);
                assert!(out.rows() == m && out.cols() == n, "activation shape");
                RawActivation::GeluBackward { pre, stride: out.row_stride(), out: Shared(out.data().as_mut_ptr()) }
            }
        };
        RawEpilogue { accumulate: epilogue.accumulate, bias: epilogue.bias, residual: epilogue.residual, activation }
    }

    /// Whether there is nothing to do once the products are summed.
    fn is_plain(&self) -> bool {
        self.bias.is_none() && self.residual.is_none() && matches!(self.activation, RawActivation::None)
    }

    /// Applies the epilogue to columns `first..` of row `r` of C, while they are in L1.
    ///
    /// # Safety
    /// No other thread touches these elements of C or of the activation's output.
    #[inline(always)]
    pub unsafe fn finish<V: Vector<T>>(&self, r: usize, first: usize, row: &mut [T]) {
        if self.is_plain() {
            return;
        }
        let len = row.len();
        let at = |mat: &Mat<'a, T>| {
            let from = r * mat.row_stride() + first;
            &mat.data()[from..from + len]
        };
        let bias = self.bias.map(|bias| &bias[first..first + len]);
        let residual = self.residual.as_ref().map(at);
        let (pre, mut out) = match &self.activation {
            RawActivation::None => (None, None),
            // SAFETY: the view's extent was checked in `new`; this row segment is ours alone.
            RawActivation::Gelu { out, stride } => {
                (None, Some(unsafe { std::slice::from_raw_parts_mut(out.0.add(r * stride + first), len) }))
            }
            RawActivation::GeluBackward { pre, out, stride } => {
                // SAFETY: as above.
                (Some(at(pre)), Some(unsafe { std::slice::from_raw_parts_mut(out.0.add(r * stride + first), len) }))
            }
        };
        let mut j = 0;
        while j < len {
            let end = (j + LANES).min(len);
            let mut x: V = get(&row[j..end]);
            if let Some(bias) = bias {
                x = x + get(&bias[j..end]);
            }
            if let Some(residual) = residual {
                x = x + get(&residual[j..end]);
            }
            match (pre, &mut out) {
                (Some(pre), Some(out)) => {
                    let (value, slope) = get::<T, V>(&pre[j..end]).gelu_with_grad();
                    x = x * slope;
                    put(value, &mut out[j..end]);
                }
                (None, Some(out)) => put(x.gelu(), &mut out[j..end]),
                _ => {}
            }
            put(x, &mut row[j..end]);
            j = end;
        }
    }
}

// Functions and not closures, which a kernel compiled for AVX need not inline.

/// The at most sixteen elements of `s`.
#[inline(always)]
fn get<T: Float, V: Vector<T>>(s: &[T]) -> V {
    if s.len() == LANES { V::load(s) } else { V::load_partial(s, T::ZERO) }
}

#[inline(always)]
fn put<T: Float, V: Vector<T>>(v: V, s: &mut [T]) {
    if s.len() == LANES { v.store(s) } else { v.store_partial(s) }
}

/// `C (+)= A B` with an epilogue, on all threads of the current pool.
pub(super) fn gemm_f32(a: Mat<f32>, b: Mat<f32>, mut c: MatMut<f32>, epilogue: Epilogue<f32>) {
    let (m, n, k) = (a.rows(), b.cols(), a.cols());
    assert!(
        b.rows() == k && c.rows() == m && c.cols() == n,
        "matrix product of {m}×{k} and {}×{n} into {}×{}",
        b.rows(),
        c.rows(),
        c.cols()
    );
    if m == 0 || n == 0 {
        return;
    }
    let epilogue = RawEpilogue::new(epilogue, m, n);
    // Read once: panels and tasks are cut for one tile shape, whatever `simd::force` does on another thread meanwhile.
    let isa = simd::isa();
    // SAFETY: `simd::isa` returns what this machine has.
    let tile = unsafe { tile_shape_on(isa) };
    let (strips, panels) = (m.div_ceil(tile.rows), n.div_ceil(tile.vectors * LANES));
    let parallel = m * n * k.max(1) >= PARALLEL_FROM;

    // Tasks by shape: as large as caches like, but at least some two dozen while a task keeps two tiles.
    let (mut task_rows, mut task_cols) = (TASK_ROWS.min(strips), TASK_COLS.min(panels));
    while strips.div_ceil(task_rows) * panels.div_ceil(task_cols) < 24 && task_rows * task_cols > 2 {
        if task_cols >= task_rows { task_cols = task_cols.div_ceil(2) } else { task_rows = task_rows.div_ceil(2) }
    }
    let (row_tasks, col_tasks) = (strips.div_ceil(task_rows), panels.div_ceil(task_cols));

    let c_row = c.row_stride();
    let out = Shared(c.data().as_mut_ptr());
    let padded = n.next_multiple_of(LANES);
    let pass = (PACK_LIMIT / padded / KC).max(1) * KC;
    let mut packed = Buffer::<f32>::scratch(padded * pass.min(k));
    for k0 in (0..k.max(1)).step_by(pass) {
        let depth = pass.min(k - k0);
        let rows = b.rows_from(k0, depth);
        let width = tile.vectors * LANES;
        let pack = |(p, part): (usize, &mut [f32])| {
            let (first, vectors) = panel(n, tile.vectors, p);
            // SAFETY: `simd::isa` returns what this machine has.
            unsafe { simd::dispatch_f32_on(isa, Pack { b: rows, first, vectors, out: part }) };
        };
        if depth > 0 {
            let packed = &mut packed[..padded * depth];
            if parallel {
                packed.par_chunks_mut(depth * width).enumerate().with_max_len(1).for_each(pack)
            } else {
                packed.chunks_mut(depth * width).enumerate().for_each(pack)
            }
        }
        let task = |index: usize| {
            let (i, j) = (index % row_tasks, index / row_tasks);
            let (s0, s1) = share(strips, row_tasks, i);
            let work = Task {
                a,
                packed: &packed,
                k0,
                k: depth,
                n,
                c: { &out }.0,
                c_row,
                rows: (s0 * m / strips, s1 * m / strips),
                panels: share(panels, col_tasks, j),
                first_pass: k0 == 0,
                last_pass: k0 + depth == k,
                epilogue: &epilogue,
            };
            // SAFETY: as above.
            unsafe { simd::dispatch_f32_on(isa, work) };
        };
        let tasks = row_tasks * col_tasks;
        if parallel { (0..tasks).into_par_iter().with_max_len(1).for_each(task) } else { (0..tasks).for_each(task) }
    }
}

/// A packed operand times A on the calling thread, for the many small products inside attention.
struct Small<'a> {
    a: Mat<'a, f32>,
    packed: &'a [f32],
    n: usize,
    c: *mut f32,
    c_row: usize,
    add: bool,
}

impl Kernel<f32> for Small<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector<f32>>(self) {
        let TileShape { rows: tile_rows, vectors } = V::TILE;
        let (m, k) = (self.a.rows(), self.a.cols());
        let strips = m.div_ceil(tile_rows);
        for kb in (0..k).step_by(KC) {
            let depth = KC.min(k - kb);
            for p in 0..self.n.div_ceil(vectors * LANES) {
                let (first, v) = panel(self.n, vectors, p);
                let cols = (v * LANES).min(self.n - first);
                for strip in 0..strips {
                    let (r0, r1) = share(m, strips, strip);
                    let source = self.a.rows_from(r0, r1 - r0).cols_from(kb, depth);
                    // SAFETY: the shapes were checked in `multiply_packed`; C is borrowed by it.
                    unsafe {
                        let t = Tile {
                            k: depth,
                            a: source.data().as_ptr(),
                            a_row: source.row_stride(),
                            a_col: source.col_stride(),
                            b: self.packed.as_ptr().add(k * first + kb * v * LANES),
                            c: self.c.add(r0 * self.c_row + first),
                            c_row: self.c_row,
                            cols,
                            add: self.add || kb > 0,
                        };
                        tile_of::<V>(r1 - r0, v, t);
                    }
                }
            }
        }
    }
}

/// One panel of a packed operand.
struct Pack<'a> {
    b: Mat<'a, f32>,
    first: usize,
    vectors: usize,
    out: &'a mut [f32],
}

impl Kernel<f32> for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector<f32>>(self) {
        pack_panel::<V>(self.b, self.first, self.vectors, self.out);
    }
}

/// All panels of a packed operand.
struct PackAll<'a> {
    b: Mat<'a, f32>,
    out: &'a mut [f32],
}

impl Kernel<f32> for PackAll<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector<f32>>(self) {
        let (n, vectors) = (self.b.cols(), V::TILE.vectors);
        for p in 0..n.div_ceil(vectors * LANES) {
            let (first, v) = panel(n, vectors, p);
            pack_panel::<V>(self.b, first, v, &mut self.out[self.b.rows() * first..]);
        }
    }
}

pub(super) fn pack_f32(b: Mat<f32>, out: &mut [f32]) {
    f32::dispatch(PackAll { b, out });
}

pub(super) fn multiply_packed_f32(a: Mat<f32>, packed: &[f32], mut c: MatMut<f32>, add: bool) {
    let (m, k, n) = (a.rows(), a.cols(), c.cols());
    assert!(c.rows() == m && packed.len() >= micro::packed_len(k, n), "small matrix product: shapes");
    if k == 0 && !add {
        for r in 0..m {
            let from = r * c.row_stride();
            c.data()[from..from + n].fill(0.0);
        }
    }
    let c_row = c.row_stride();
    f32::dispatch(Small { a, packed, n, c: c.data().as_mut_ptr(), c_row, add });
}
