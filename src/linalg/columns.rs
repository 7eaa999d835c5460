//! Disjoint column blocks of one matrix, to be written by different threads.

use std::marker::PhantomData;

use rayon::prelude::*;

/// A block of columns of a row-major matrix. Blocks made by [`split_at`](ColumnsMut::split_at) and
/// [`par_blocks`] never overlap, so each may be written by another thread.
pub struct ColumnsMut<'a, T> {
    first: *mut T,
    rows: usize,
    stride: usize,
    width: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a block has exclusive access to its own elements, like a mutable slice.
unsafe impl<T: Send> Send for ColumnsMut<'_, T> {}

impl<'a, T> ColumnsMut<'a, T> {
    /// The whole matrix of rows of `stride` elements. Panics unless `data` is a whole number of rows.
    pub fn new(data: &'a mut [T], stride: usize) -> Self {
        let rows = data.len().checked_div(stride).unwrap_or(0);
        assert_eq!(rows * stride, data.len(), "columns of a ragged matrix");
        ColumnsMut { first: data.as_mut_ptr(), rows, stride, width: stride, borrow: PhantomData }
    }

    /// The first `width` columns, and the others.
    pub fn split_at(self, width: usize) -> (Self, Self) {
        assert!(width <= self.width);
        let right = ColumnsMut { first: self.first.wrapping_add(width), width: self.width - width, ..self };
        (ColumnsMut { width, ..self }, right)
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// This block's part of row `r`.
    #[inline]
    pub fn row(&mut self, r: usize) -> &mut [T] {
        assert!(r < self.rows);
        // SAFETY: row r of the block lies in the matrix that `new` borrowed, belongs to this block alone, and the block is
        // borrowed mutably for as long as the slice lives.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(r * self.stride), self.width) }
    }

    /// Rows `batch · rows / batches …` and columns `head · width / heads …`: block `(batch, head)` of a grid.
    ///
    /// # Safety
    /// No two live blocks may be the same.
    unsafe fn block(&self, (batch, batches): (usize, usize), (head, heads): (usize, usize)) -> Self {
        let (rows, width) = (self.rows / batches, self.width / heads);
        let first = self.first.wrapping_add(batch * rows * self.stride + head * width);
        ColumnsMut { first, rows, stride: self.stride, width, borrow: PhantomData }
    }
}

/// Calls `work(batch, head, blocks, runs)` for every `batch` and `head`, in parallel. `blocks` holds block `(batch, head)` of each
/// matrix in `grids`, cut into `batches` row blocks by `heads` column blocks; `runs` holds row block `batch · heads + head` of
/// each matrix in `stacks`, cut into `batches · heads` row blocks.
pub fn par_blocks<T: Send, const M: usize, const S: usize>(
    grids: [ColumnsMut<'_, T>; M],
    stacks: [ColumnsMut<'_, T>; S],
    batches: usize,
    heads: usize,
    work: impl Fn(usize, usize, [ColumnsMut<'_, T>; M], [ColumnsMut<'_, T>; S]) + Sync,
) {
    let count = batches * heads;
    assert!(count > 0, "no blocks");
    assert!(grids.iter().all(|g| g.rows.is_multiple_of(batches) && g.width.is_multiple_of(heads)), "blocks of unequal size");
    assert!(stacks.iter().all(|s| s.rows.is_multiple_of(count)), "blocks of unequal size");
    /// Lets threads look at the matrices; each takes other blocks of them.
    struct Parts<'a, T, const M: usize, const S: usize>([ColumnsMut<'a, T>; M], [ColumnsMut<'a, T>; S]);
    // SAFETY: the matrices themselves are never written through a shared reference, only the blocks made below.
    unsafe impl<T: Send, const M: usize, const S: usize> Sync for Parts<'_, T, M, S> {}
    let parts = &Parts(grids, stacks);
    (0..count).into_par_iter().for_each(|index| {
        let (batch, head) = (index / heads, index % heads);
        // SAFETY: every index makes its own blocks, once.
        let blocks = std::array::from_fn(|m| unsafe { parts.0[m].block((batch, batches), (head, heads)) });
        // SAFETY: as above.
        let runs = std::array::from_fn(|s| unsafe { parts.1[s].block((index, count), (0, 1)) });
        work(batch, head, blocks, runs);
    });
}

/// How [`par_tiles`] cuts a matrix.
#[derive(Clone, Copy, Debug)]
pub struct Tiling {
    /// Row blocks of equal size: images.
    pub batches: usize,
    /// Rows at the start of each row block that are left alone: class tokens.
    pub skip: usize,
    /// Rows of a tile; the last one of a row block may have fewer.
    pub rows: usize,
    /// Columns of a tile; the last one may have fewer.
    pub cols: usize,
}

/// Calls `work(batch, first row, first column, tile)` for every tile, in parallel. Rows are counted within the row block, after the
/// skipped ones.
pub fn par_tiles<T: Send>(matrix: ColumnsMut<'_, T>, tiling: Tiling, work: impl Fn(usize, usize, usize, ColumnsMut<'_, T>) + Sync) {
    let Tiling { batches, skip, rows, cols } = tiling;
    if batches == 0 || matrix.rows == 0 || matrix.width == 0 {
        return;
    }
    assert!(matrix.rows.is_multiple_of(batches) && rows > 0 && cols > 0, "tiles of unequal row blocks");
    let block = matrix.rows / batches;
    assert!(skip <= block, "more rows skipped than there are");
    let (down, across) = ((block - skip).div_ceil(rows), matrix.width.div_ceil(cols));
    /// Lets threads look at the matrix; each takes other tiles of it.
    struct Whole<'a, T>(ColumnsMut<'a, T>);
    // SAFETY: the matrix itself is never written through a shared reference, only the tiles made below.
    unsafe impl<T: Send> Sync for Whole<'_, T> {}
    let whole = &Whole(matrix);
    (0..batches * down * across).into_par_iter().for_each(|index| {
        let matrix = &whole.0;
        let (batch, y, x) = (index / (down * across), index / across % down * rows, index % across * cols);
        let (rows, width) = (rows.min(block - skip - y), cols.min(matrix.width - x));
        let first = matrix.first.wrapping_add((batch * block + skip + y) * matrix.stride + x);
        // Tiles of different indices share no element, and every index makes its own, once.
        work(batch, y, x, ColumnsMut { first, rows, stride: matrix.stride, width, borrow: PhantomData });
    });
}

/// A matrix whose rows [`par_rows`] deals out: task `t` of block `(batch, head)` owns the rows `rows[t]` of that block.
pub struct Dealt<'a, T> {
    /// The matrix.
    pub matrix: ColumnsMut<'a, T>,
    /// Block `(batch, head)` is row block `batch · heads + head` instead of a block of the grid of row and column blocks.
    pub stacked: bool,
    /// For every task the rows that it owns, counted in the block. A row may stand in one task's list alone.
    pub rows: &'a [&'a [u32]],
}

/// The rows of a block that a task owns.
pub struct RowsMut<'a, T> {
    block: ColumnsMut<'a, T>,
    rows: &'a [u32],
}

impl<T> RowsMut<'_, T> {
    /// The row that stands at `index` in the task's list.
    #[inline]
    pub fn row(&mut self, index: usize) -> &mut [T] {
        self.block.row(self.rows[index] as usize)
    }
}

/// Whether no two of the lists, which hold numbers below `limit`, share a number.
pub fn disjoint(lists: &[&[u32]], limit: usize) -> bool {
    if lists.len() < 2 {
        return true;
    }
    let mut seen = vec![0u64; limit.div_ceil(64)];
    lists.iter().all(|list| {
        let free = list.iter().all(|&r| (r as usize) < limit && seen[r as usize / 64] >> (r % 64) & 1 == 0);
        if free {
            list.iter().for_each(|&r| seen[r as usize / 64] |= 1 << (r % 64));
        }
        free
    })
}

/// [`par_blocks`] with every block shared by several tasks, each of which owns some of its rows: calls
/// `work([batch, head, task], rows, runs)` in parallel. `runs` holds row block `(batch · heads + head) · tasks + task` of each matrix in
/// `stacks`. Panics if two tasks would own the same row.
pub fn par_rows<T: Send, const M: usize, const S: usize>(
    dealt: [Dealt<'_, T>; M],
    stacks: [ColumnsMut<'_, T>; S],
    [batches, heads, tasks]: [usize; 3],
    work: impl Fn([usize; 3], [RowsMut<'_, T>; M], [ColumnsMut<'_, T>; S]) + Sync,
) {
    let (blocks, count) = (batches * heads, batches * heads * tasks);
    assert!(count > 0, "no blocks");
    for d in &dealt {
        let (rows, columns) = if d.stacked { (blocks, 1) } else { (batches, heads) };
        assert!(d.matrix.rows.is_multiple_of(rows) && d.matrix.width.is_multiple_of(columns), "blocks of unequal size");
        assert!(d.rows.len() == tasks && disjoint(d.rows, d.matrix.rows / rows), "tasks that share rows");
    }
    assert!(stacks.iter().all(|s| s.rows.is_multiple_of(count)), "blocks of unequal size");
    /// Lets threads look at the matrices; each takes other rows of them.
    struct Parts<'a, T, const M: usize, const S: usize>([Dealt<'a, T>; M], [ColumnsMut<'a, T>; S]);
    // SAFETY: the matrices themselves are never written through a shared reference, only the rows dealt out below.
    unsafe impl<T: Send, const M: usize, const S: usize> Sync for Parts<'_, T, M, S> {}
    let parts = &Parts(dealt, stacks);
    (0..count).into_par_iter().for_each(|index| {
        let (block, task) = (index / tasks, index % tasks);
        let (batch, head) = (block / heads, block % heads);
        let rows = std::array::from_fn(|m| {
            let Dealt { matrix, stacked, rows } = &parts.0[m];
            let (row, column) = if *stacked { ((block, blocks), (0, 1)) } else { ((batch, batches), (head, heads)) };
            // SAFETY: the tasks of a block touch the rows of their lists only, which share no row (checked above); every index
            // makes its own, once.
            RowsMut { block: unsafe { matrix.block(row, column) }, rows: rows[task] }
        });
        // SAFETY: every index makes its own blocks, once.
        let runs = std::array::from_fn(|s| unsafe { parts.1[s].block((index, count), (0, 1)) });
        work([batch, head, task], rows, runs);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_the_matrix_once() {
        // Two images of one skipped row and five others, columns 2..9 of 9 in tiles of 2 by 3.
        let mut data = vec![0usize; 12 * 9];
        let (_, right) = ColumnsMut::new(&mut data, 9).split_at(2);
        par_tiles(right, Tiling { batches: 2, skip: 1, rows: 2, cols: 3 }, |b, y, x, mut tile| {
            for r in 0..tile.rows() {
                tile.row(r).iter_mut().enumerate().for_each(|(c, v)| *v += 1 + 1000 * b + 100 * (y + r) + (x + c));
            }
        });
        for (i, &v) in data.iter().enumerate() {
            let (r, c) = (i / 9, i % 9);
            let expected = if c < 2 || r % 6 == 0 { 0 } else { 1 + 1000 * (r / 6) + 100 * (r % 6 - 1) + c - 2 };
            assert_eq!(v, expected, "({r}, {c})");
        }
    }

    #[test]
    fn blocks_cover_the_matrix_once() {
        let mut data = vec![0usize; 6 * 9];
        let (left, right) = ColumnsMut::new(&mut data, 9).split_at(6);
        par_blocks([left], [], 2, 3, |b, h, [mut block], []| {
            for r in 0..3 {
                block.row(r).iter_mut().for_each(|x| *x += 10 * b + h + 1);
            }
        });
        par_blocks([], [right], 3, 1, |_, _, [], [mut block]| block.row(1).iter_mut().for_each(|x| *x += 100));
        for (i, &x) in data.iter().enumerate() {
            let (r, c) = (i / 9, i % 9);
            assert_eq!(x, if c < 6 { 10 * (r / 3) + c / 2 + 1 } else { 100 * (r % 2) }, "({r}, {c})");
        }
    }

    #[test]
    fn dealt_rows_cover_the_matrix_once() {
        let mut data = vec![0usize; 6 * 4];
        let mut stacked = vec![0usize; 12];
        let rows: [&[u32]; 2] = [&[2, 0], &[1]];
        let dealt = [
            Dealt { matrix: ColumnsMut::new(&mut data, 4), stacked: false, rows: &rows },
            Dealt { matrix: ColumnsMut::new(&mut stacked, 1), stacked: true, rows: &rows },
        ];
        par_rows(dealt, [], [2, 2, 2], |[b, h, t], [mut grid, mut stack], []| {
            for i in 0..rows[t].len() {
                grid.row(i).iter_mut().for_each(|x| *x += 100 * b + 10 * h + t + 1);
                stack.row(i)[0] += 100 * b + 10 * h + t + 1;
            }
        });
        let expected = |b, h, r| 100 * b + 10 * h + usize::from(r == 1) + 1;
        for (i, &x) in data.iter().enumerate() {
            assert_eq!(x, expected(i / 12, i % 4 / 2, i / 4 % 3));
        }
        for (i, &x) in stacked.iter().enumerate() {
            assert_eq!(x, expected(i / 6, i / 3 % 2, i % 3));
        }
    }

    #[test]
    #[should_panic(expected = "tasks that share rows")]
    fn shared_rows_are_refused() {
        let mut data = [0usize; 3];
        let rows: [&[u32]; 2] = [&[2, 0], &[0]];
        par_rows([Dealt { matrix: ColumnsMut::new(&mut data, 1), stacked: false, rows: &rows }], [], [1, 1, 2], |_, _, []| {});
    }
}
