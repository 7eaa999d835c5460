//! `C = A B` in f32: packing, blocking, threads and epilogues around the micro-kernel.

use rayon::prelude::*;

use super::micro::{self, KC, Tile, TileShape, pack_panel, panel, tile_of};
use super::packed::Packed;
use super::view::{Mat, MatMut, Rows};
use super::{Activation, Epilogue};
use crate::simd::{self, Isa, Kernel, LANES, Vector, prefetch};
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

/// Bytes between elements that fall into one set of an L1 cache.
const SET: usize = 4096;

/// The left operand: where it lies, what makes it, or a copy of it in a range of k.
#[derive(Clone, Copy)]
pub(super) enum Left<'a> {
    InPlace(Mat<'a, f32>),
    Made(&'a dyn Rows<f32>),
    /// Strip after strip, `stride` apart, the elements of a column of a strip side by side.
    Packed {
        data: &'a [f32],
        stride: usize,
    },
}

/// A rectangle of C, for one range of k, by one thread.
struct Task<'a> {
    left: Left<'a>,
    /// Panels of B, of `packed_rows` rows each, of which the range's begin at `packed_from`.
    packed: &'a [f32],
    packed_rows: usize,
    packed_from: usize,
    /// Products in this range of k.
    k: usize,
    m: usize,
    n: usize,
    /// Strips that the rows of C are cut into.
    all_strips: usize,
    c: *mut f32,
    c_row: usize,
    strips: (usize, usize),
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
        // Rows that fall into one set of a cache are copied, a strip at a time.
        let copied = match self.left {
            Left::InPlace(a) => a.col_stride() == 1 && (a.row_stride() * 4).is_multiple_of(SET),
            Left::Made(_) => true,
            Left::Packed { .. } => false,
        };
        let mut scratch = Buffer::<f32>::scratch(if copied { tile_rows * COPY_STRIDE } else { 0 });
        for kb in (0..self.k).step_by(KC) {
            let depth = KC.min(self.k - kb);
            let add = self.epilogue.accumulate || !self.first_pass || kb > 0;
            let last = self.last_pass && kb + depth == self.k;
            for strip in self.strips.0..self.strips.1 {
                let (r0, r1) = share(self.m, self.all_strips, strip);
                let (a, a_row, a_col) = match self.left {
                    Left::Packed { data, stride } => (data[strip * stride + kb * tile_rows..].as_ptr(), 1, tile_rows),
                    Left::Made(rows) => {
                        // B was packed before: the rows are as long as its panels.
                        let from = self.packed_from + kb;
                        rows.copy(r0..r1, from..from + depth, &mut scratch, COPY_STRIDE);
                        (scratch.as_ptr(), COPY_STRIDE, 1)
                    }
                    Left::InPlace(a) => {
                        let source = a.rows_from(r0, r1 - r0).cols_from(kb, depth);
                        if copied {
                            for (i, row) in scratch.chunks_exact_mut(COPY_STRIDE).take(r1 - r0).enumerate() {
                                row[..depth].copy_from_slice(&source.data()[i * source.row_stride()..][..depth]);
                            }
                            (scratch.as_ptr(), COPY_STRIDE, 1)
                        } else {
                            (source.data().as_ptr(), source.row_stride(), source.col_stride())
                        }
                    }
                };
                for p in self.panels.0..self.panels.1 {
                    let (first, v) = panel(self.n, vectors, p);
                    let cols = (v * LANES).min(self.n - first);
                    if last {
                        self.epilogue.prefetch((r0, r1), (first, first + cols));
                    }
                    // SAFETY: `first` and the strip lie inside C and in no other task; the panel has the range's rows.
                    unsafe {
                        let c = self.c.add(r0 * self.c_row + first);
                        let b = self.packed.as_ptr().add(self.packed_rows * first + (self.packed_from + kb) * v * LANES);
                        tile_of::<V>(r1 - r0, v, Tile { k: depth, a, a_row, a_col, b, c, c_row: self.c_row, cols, add });
                        if last {
                            self.epilogue.finish::<V>(self.c, self.c_row, (r0, r1), (first, first + cols));
                        }
                    }
                }
            }
        }
        if self.k == 0 {
            let first = panel(self.n, vectors, self.panels.0).0;
            let end = (self.panels.1 * vectors * LANES).min(self.n);
            let rows = (share(self.m, self.all_strips, self.strips.0).0, share(self.m, self.all_strips, self.strips.1 - 1).1);
            if !self.epilogue.accumulate {
                for r in rows.0..rows.1 {
                    // SAFETY: this task's part of row r.
                    unsafe { std::slice::from_raw_parts_mut(self.c.add(r * self.c_row + first), end - first) }.fill(0.0);
                }
            }
            // SAFETY: as above.
            unsafe { self.epilogue.finish::<V>(self.c, self.c_row, rows, (first, end)) };
        }
    }
}

/// The distance between rows of A copied or made for a task: a block, and a cache line that moves each row to other cache sets.
const COPY_STRIDE: usize = KC + LANES;
/// Strips that are packed together: whole cache lines of each column of A.
const PACK_STRIPS: usize = 4;

/// Copies strips of A for [`Left::Packed`].
struct PackLeft<'a> {
    a: Mat<'a, f32>,
    all_strips: usize,
    /// The first strip in `out`.
    first: usize,
    stride: usize,
    out: &'a mut [f32],
}

impl Kernel<f32> for PackLeft<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector<f32>>(self) {
        let (m, rs, cs, data) = (self.a.rows(), self.a.row_stride(), self.a.col_stride(), self.a.data());
        let tile_rows = V::TILE.rows;
        let strips = self.out.len() / self.stride;
        let bounds: [usize; PACK_STRIPS + 1] = std::array::from_fn(|s| share(m, self.all_strips, (self.first + s).min(self.all_strips)).0);
        for p in 0..self.a.cols() {
            if rs == 1 {
                // The next columns are too far apart for the hardware to guess.
                let ahead = data.as_ptr().wrapping_add((p + 16) * cs);
                (bounds[0]..bounds[strips]).step_by(LANES).for_each(|r| prefetch(ahead.wrapping_add(r)));
            }
            for s in 0..strips {
                let (r0, r1) = (bounds[s], bounds[s + 1]);
                let (to, from) = (s * self.stride + p * tile_rows, p * cs + r0 * rs);
                if rs == 1 && from + LANES <= data.len() {
                    // Whole vectors: what is too much is overwritten by the next column, or is never read.
                    V::load(&data[from..]).store(&mut self.out[to..]);
                } else {
                    for i in 0..r1 - r0 {
                        self.out[to + i] = data[from + i * rs];
                    }
                }
            }
        }
    }
}

/// An [`Epilogue`] whose outputs are pointers that tasks share.
pub(super) struct RawEpilogue<'a, T> {
    pub accumulate: bool,
    bias: Option<&'a [T]>,
    residual: Option<Mat<'a, T>>,
    activation: RawActivation<T>,
}

enum RawActivation<T> {
    None,
    Relu,
    GeluOnly,
    Gelu { out: Shared<T>, stride: usize },
    GeluBackward { hidden: Shared<T>, stride: usize },
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
            Activation::Relu => RawActivation::Relu,
            Activation::GeluOnly => RawActivation::GeluOnly,
            Activation::Gelu { mut out } => {
                assert!(out.rows() == m && out.cols() == n, "activation shape");
                RawActivation::Gelu { stride: out.row_stride(), out: Shared(out.data().as_mut_ptr()) }
            }
            Activation::GeluBackward { mut hidden } => {
                assert!(hidden.rows() == m && hidden.cols() == n, "activation shape");
                RawActivation::GeluBackward { stride: hidden.row_stride(), hidden: Shared(hidden.data().as_mut_ptr()) }
            }
        };
        RawEpilogue { accumulate: epilogue.accumulate, bias: epilogue.bias, residual: epilogue.residual, activation }
    }

    /// Asks for what [`finish`](Self::finish) will read besides C, for a tile at most two cache lines wide.
    #[inline(always)]
    pub fn prefetch(&self, rows: (usize, usize), cols: (usize, usize)) {
        let ask = |from: *const T, stride: usize| {
            for r in rows.0..rows.1 {
                prefetch(from.wrapping_add(r * stride + cols.0));
                prefetch(from.wrapping_add(r * stride + cols.1 - 1));
            }
        };
        if let Some(residual) = &self.residual {
            ask(residual.data().as_ptr(), residual.row_stride());
        }
        if let RawActivation::Gelu { out: other, stride } | RawActivation::GeluBackward { hidden: other, stride } = &self.activation {
            ask(other.0, *stride);
        }
    }

    /// Applies the epilogue to a rectangle of C, while it is in L1.
    ///
    /// # Safety
    /// `c` and `c_row` are C's; no other thread touches these elements of it or of the activation's matrix.
    #[inline(always)]
    pub unsafe fn finish<V: Vector<T>>(&self, c: *mut T, c_row: usize, rows: (usize, usize), cols: (usize, usize)) {
        // SAFETY: the caller's promise.
        unsafe {
            match &self.activation {
                RawActivation::None if self.bias.is_none() && self.residual.is_none() => {}
                RawActivation::None => self.finish_as::<V, PLAIN>(c, c_row, rows, cols, (Shared(c), 0)),
                RawActivation::Relu => self.finish_as::<V, RELU>(c, c_row, rows, cols, (Shared(c), 0)),
                RawActivation::GeluOnly => self.finish_as::<V, GELU_ONLY>(c, c_row, rows, cols, (Shared(c), 0)),
                RawActivation::Gelu { out, stride } => self.finish_as::<V, GELU>(c, c_row, rows, cols, (*out, *stride)),
                RawActivation::GeluBackward { hidden, stride } => {
                    self.finish_as::<V, GELU_BACKWARD>(c, c_row, rows, cols, (*hidden, *stride))
                }
            }
        }
    }

    /// [`finish`](Self::finish) for one kind of activation.
    #[inline(always)]
    unsafe fn finish_as<V: Vector<T>, const KIND: u8>(
        &self,
        c: *mut T,
        c_row: usize,
        rows: (usize, usize),
        cols: (usize, usize),
        (other, other_row): (Shared<T>, usize),
    ) {
        let mut j = cols.0;
        while j < cols.1 {
            let width = LANES.min(cols.1 - j);
            let bias: V = self.bias.map_or(V::splat(T::ZERO), |bias| get(&bias[j..j + width]));
            for r in rows.0..rows.1 {
                // SAFETY: a part of row r of C, which is ours alone.
                let row = unsafe { std::slice::from_raw_parts_mut(c.add(r * c_row + j), width) };
                let mut x: V = get(row);
                if self.bias.is_some() {
                    x = x + bias;
                }
                if let Some(residual) = &self.residual {
                    x = x + part(residual, r, j, width);
                }
                if KIND == RELU {
                    x = x.max(V::splat(T::ZERO));
                } else if KIND == GELU_ONLY {
                    x = x.gelu();
                } else if KIND != PLAIN {
                    // SAFETY: the view's extent was checked in `new`; this part of it is ours alone.
                    let other = unsafe { std::slice::from_raw_parts_mut(other.0.add(r * other_row + j), width) };
                    if KIND == GELU {
                        put(x.gelu(), other);
                    } else {
                        let (value, slope) = get::<T, V>(other).gelu_with_grad();
                        x = x * slope;
                        put(value, other);
                    }
                }
                put(x, row);
            }
            j += width;
        }
    }
}

// The kinds of [`RawActivation`].
const PLAIN: u8 = 0;
const GELU: u8 = 1;
const GELU_BACKWARD: u8 = 2;
const GELU_ONLY: u8 = 3;
const RELU: u8 = 4;

// Functions and not closures, which a kernel compiled for AVX need not inline.

/// The `width` elements of row `r` from column `j`.
#[inline(always)]
fn part<T: Float, V: Vector<T>>(mat: &Mat<T>, r: usize, j: usize, width: usize) -> V {
    get(&mat.data()[r * mat.row_stride() + j..][..width])
}

/// The at most sixteen elements of `s`.
#[inline(always)]
fn get<T: Float, V: Vector<T>>(s: &[T]) -> V {
    if s.len() == LANES { V::load(s) } else { V::load_partial(s, T::ZERO) }
}

#[inline(always)]
fn put<T: Float, V: Vector<T>>(v: V, s: &mut [T]) {
    if s.len() == LANES { v.store(s) } else { v.store_partial(s) }
}

/// `work` on every chunk of `data`, on all threads if `parallel`.
fn each_chunk(parallel: bool, data: &mut [f32], len: usize, work: impl Fn((usize, &mut [f32])) + Sync + Send) {
    if parallel {
        data.par_chunks_mut(len).enumerate().with_max_len(1).for_each(work);
    } else {
        data.chunks_mut(len).enumerate().for_each(work);
    }
}

/// The right operand, as it is or packed before.
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    Plain(Mat<'a, f32>),
    Packed(&'a Packed<f32>),
}

/// `C (+)= A B` with an epilogue, on all threads of the current pool.
pub(super) fn gemm_f32(a: Left, b: Right, mut c: MatMut<f32>, epilogue: Epilogue<f32>) {
    let (b_rows, n) = match b {
        Right::Plain(b) => (b.rows(), b.cols()),
        Right::Packed(b) => (b.rows(), b.cols()),
    };
    let (m, k) = match a {
        Left::InPlace(a) => (a.rows(), a.cols()),
        Left::Made(a) => (a.rows(), a.cols()),
        Left::Packed { .. } => unreachable!("packed here only"),
    };
    assert!(b_rows == k && c.rows() == m && c.cols() == n, "matrix product of {m}×{k} and {b_rows}×{n} into {}×{}", c.rows(), c.cols());
    if m == 0 || n == 0 {
        return;
    }
    let epilogue = RawEpilogue::new(epilogue, m, n);
    // Read once: panels and tasks are cut for one tile shape, whatever `simd::force` does on another thread meanwhile.
    let isa = simd::isa();
    if let Right::Packed(b) = b {
        assert!(b.isa() == isa, "matrix packed for {}, multiplied by {}", b.isa().name(), isa.name());
    }
    // SAFETY: `simd::isa` returns what this machine has.
    let tile = unsafe { tile_shape_on(isa) };
    let (strips, panels) = (m.div_ceil(tile.rows), n.div_ceil(tile.vectors * LANES));
    let parallel = m * n * k.max(1) >= PARALLEL_FROM;

    // Tasks by shape: as large as caches like, but at least some two dozen while a task keeps two tiles.
    let (mut task_rows, mut task_cols) = (TASK_ROWS.min(strips), TASK_COLS.min(panels));
    // Rows that are made are made again for every task beside.
    let made = matches!(a, Left::Made(_));
    while strips.div_ceil(task_rows) * panels.div_ceil(task_cols) < 24 && task_rows * task_cols > 2 {
        let narrower = if made { task_rows == 1 } else { task_cols >= task_rows };
        if narrower { task_cols = task_cols.div_ceil(2) } else { task_rows = task_rows.div_ceil(2) }
    }
    let (row_tasks, col_tasks) = (strips.div_ceil(task_rows), panels.div_ceil(task_cols));

    let c_row = c.row_stride();
    let out = Shared(c.data().as_mut_ptr());
    let padded = n.next_multiple_of(LANES);
    // Columns are read in place unless they fall into one set of a cache, or two.
    let apart =
        |a: &Mat<f32>| a.col_stride() != 1 && (a.row_stride() != 1 || !tile.reads_columns() || (a.col_stride() * 8).is_multiple_of(SET));
    let to_pack = match a {
        Left::InPlace(a) if apart(&a) => Some(a),
        _ => None,
    };
    // Only what is copied limits how many products are summed at a time.
    let (pass_left, pass_right) = (if to_pack.is_some() { m } else { 0 }, if matches!(b, Right::Plain(_)) { padded } else { 0 });
    let pass = PACK_LIMIT.checked_div(pass_left.max(pass_right)).map_or(k, |rows| (rows / KC).max(1) * KC).min(k);
    let left_stride = |depth: usize| depth * tile.rows + LANES;
    let mut copied_left = Buffer::<f32>::scratch(if to_pack.is_some() { strips * left_stride(pass) } else { 0 });
    let mut copied_right = Buffer::<f32>::scratch(pass_right * pass);
    for k0 in (0..k.max(1)).step_by(pass.max(1)) {
        let depth = pass.min(k - k0);
        let stride = left_stride(depth);
        if let (Right::Plain(b), true) = (b, depth > 0) {
            let b = b.rows_from(k0, depth);
            let pack = |(p, out): (usize, &mut [f32])| {
                let (first, vectors) = panel(n, tile.vectors, p);
                // SAFETY: `simd::isa` returns what this machine has.
                unsafe { simd::dispatch_f32_on(isa, Pack { b, first, vectors, out }) };
            };
            each_chunk(parallel, &mut copied_right[..padded * depth], depth * tile.vectors * LANES, pack);
        }
        if let (Some(a), true) = (to_pack, depth > 0) {
            let a = a.cols_from(k0, depth);
            let pack = |(group, out): (usize, &mut [f32])| {
                // SAFETY: as above.
                unsafe { simd::dispatch_f32_on(isa, PackLeft { a, all_strips: strips, first: group * PACK_STRIPS, stride, out }) };
            };
            each_chunk(parallel, &mut copied_left[..strips * stride], PACK_STRIPS * stride, pack);
        }
        let left = match a {
            _ if to_pack.is_some() => Left::Packed { data: &copied_left, stride },
            Left::InPlace(a) => Left::InPlace(a.cols_from(k0, depth)),
            made => made,
        };
        let (packed, packed_rows, packed_from) = match b {
            Right::Plain(_) => (&copied_right[..], depth, 0),
            Right::Packed(b) => (b.data(), k, k0),
        };
        let task = |index: usize| {
            let (i, j) = (index % row_tasks, index / row_tasks);
            let work = Task {
                left,
                packed,
                packed_rows,
                packed_from,
                k: depth,
                m,
                n,
                all_strips: strips,
                c: { &out }.0,
                c_row,
                strips: share(strips, row_tasks, i),
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
pub(super) fn pack_f32(b: Mat<f32>, out: &mut [f32]) {
    let (k, n, isa) = (b.rows(), b.cols(), simd::isa());
    // SAFETY: `simd::isa` returns what this machine has.
    let tile = unsafe { tile_shape_on(isa) };
    let pack = |(p, out): (usize, &mut [f32])| {
        let (first, vectors) = panel(n, tile.vectors, p);
        // SAFETY: as above.
        unsafe { simd::dispatch_f32_on(isa, Pack { b, first, vectors, out }) };
    };
    each_chunk(k * n >= PARALLEL_FROM, &mut out[..micro::packed_len(k, n)], (k * tile.vectors * LANES).max(1), pack);
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
