//! Feature maps in token layout: `[batch, height, width, channels]`, alone or as part of rows of tokens.

use crate::linalg::{ColumnsMut, Tiling, par_tiles};
use crate::tensor::Float;

/// A map `[batch, height, width, channels]` to read. Pixels are `pixel` elements apart; an image begins `offset` after a multiple of
/// `image`: rows of class tokens may stand before it, other channels beside it.
#[derive(Clone, Copy)]
pub struct Map<'a, T> {
    data: &'a [T],
    size: [usize; 4],
    image: usize,
    pixel: usize,
    offset: usize,
}

impl<'a, T> Map<'a, T> {
    /// A map that fills `data`.
    pub fn new(data: &'a [T], size: [usize; 4]) -> Self {
        assert_eq!(data.len(), size.iter().product::<usize>(), "a map of another size than its data");
        Self::within(data, size, 0, size[3], 0)
    }

    /// The map in `[batch, skip + height · width, stride]`: the rows after the first `skip`, the channels from column `column` on.
    pub fn within(data: &'a [T], size: [usize; 4], skip: usize, stride: usize, column: usize) -> Self {
        let [batch, height, width, channels] = size;
        assert!(data.len() == batch * (skip + height * width) * stride && column + channels <= stride, "a map outside its data");
        Map { data, size, image: (skip + height * width) * stride, pixel: stride, offset: skip * stride + column }
    }

    /// `[batch, height, width, channels]`.
    pub fn size(&self) -> [usize; 4] {
        self.size
    }

    /// The distance between neighbouring pixels of a row.
    pub fn stride(&self) -> usize {
        self.pixel
    }

    /// `channels` of the pixel at row `y` and column `x` of image `b`, from channel `c` on.
    #[inline(always)]
    pub fn pixel(&self, b: usize, y: usize, x: usize, c: usize, channels: usize) -> &'a [T] {
        let from = b * self.image + self.offset + (y * self.size[2] + x) * self.pixel + c;
        &self.data[from..from + channels]
    }

    /// All elements from row `y`, column 0, channel `c` of image `b` on.
    #[inline(always)]
    pub fn row(&self, b: usize, y: usize, c: usize) -> &'a [T] {
        &self.data[b * self.image + self.offset + y * self.size[2] * self.pixel + c..]
    }
}

/// A map to write.
pub struct MapMut<'a, T> {
    columns: ColumnsMut<'a, T>,
    size: [usize; 4],
    skip: usize,
}

impl<'a, T: Send> MapMut<'a, T> {
    /// A map that fills `data`.
    pub fn new(data: &'a mut [T], size: [usize; 4]) -> Self {
        assert_eq!(data.len(), size.iter().product::<usize>(), "a map of another size than its data");
        MapMut { columns: ColumnsMut::new(data, size[3]), size, skip: 0 }
    }

    /// The map in the columns of `[batch · (skip + height · width), channels]`: the rows after the first `skip` of each image.
    pub fn within(columns: ColumnsMut<'a, T>, size: [usize; 4], skip: usize) -> Self {
        let [batch, height, width, channels] = size;
        assert!(columns.rows() == batch * (skip + height * width) && columns.width() == channels, "a map outside its data");
        MapMut { columns, size, skip }
    }

    /// `[batch, height, width, channels]`.
    pub fn size(&self) -> [usize; 4] {
        self.size
    }

    /// Calls `work(b, first row of the map, first channel, tile)` in parallel for tiles of `rows` rows of the map (the pixels of which
    /// are the rows of the tile) by `channels` channels.
    pub fn par_tiles(self, rows: usize, channels: usize, work: impl Fn(usize, usize, usize, ColumnsMut<'_, T>) + Sync) {
        let [batch, _, width, _] = self.size;
        if self.size.contains(&0) {
            return;
        }
        let tiling = Tiling { batches: batch, skip: self.skip, rows: rows * width, cols: channels };
        par_tiles(self.columns, tiling, |b, row, c, tile| work(b, row / width, c, tile));
    }
}

/// `out[b, j, i] = x[b, i, j]` for `batch` matrices of `rows` by `cols`.
pub fn transpose<T: Float>(out: &mut [T], x: &[T], batch: usize, rows: usize, cols: usize) {
    assert!(out.len() == batch * rows * cols && x.len() == out.len());
    if out.is_empty() {
        return;
    }
    const SIDE: usize = 16;
    if rows == 1 || cols == 1 {
        out.copy_from_slice(x);
        return;
    }
    let tiling = Tiling { batches: batch, skip: 0, rows: 4 * SIDE, cols: 4 * SIDE };
    par_tiles(ColumnsMut::new(out, rows), tiling, |b, first_j, first_i, mut tile| {
        let x = &x[b * rows * cols..(b + 1) * rows * cols];
        let width = tile.row(0).len();
        for j in (0..tile.rows()).step_by(SIDE) {
            let (from, wide) = (first_j + j, SIDE.min(tile.rows() - j));
            for i in (0..width).step_by(SIDE) {
                let high = SIDE.min(width - i);
                let mut block = [[T::ZERO; SIDE]; SIDE];
                for (r, line) in block.iter_mut().take(high).enumerate() {
                    let at = (first_i + i + r) * cols + from;
                    line[..wide].copy_from_slice(&x[at..at + wide]);
                }
                for c in 0..wide {
                    let out = &mut tile.row(j + c)[i..i + high];
                    for (o, line) in out.iter_mut().zip(&block) {
                        *o = line[c];
                    }
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposes_every_element() {
        for (batch, rows, cols) in [(1, 1, 1), (2, 3, 5), (1, 64, 65), (2, 130, 17), (3, 16, 1), (1, 0, 4)] {
            let x: Vec<f32> = (0..batch * rows * cols).map(|i| i as f32).collect();
            let mut out = vec![f32::NAN; x.len()];
            transpose(&mut out, &x, batch, rows, cols);
            for (k, &v) in x.iter().enumerate() {
                let (b, i, j) = (k / (rows * cols), k / cols % rows, k % cols);
                assert_eq!(out[(b * cols + j) * rows + i], v, "{batch} {rows} {cols} {k}");
            }
        }
    }

    #[test]
    fn maps_inside_tokens() {
        let data: Vec<f64> = (0..2 * 7 * 5).map(|i| i as f64).collect();
        let map = Map::within(&data, [2, 2, 3, 2], 1, 5, 3);
        assert_eq!(map.pixel(1, 1, 2, 1, 1), &[(7.0 + 1.0 + 5.0) * 5.0 + 4.0]);
        let mut out = vec![0.0; 2 * 7 * 5];
        let (_, right) = ColumnsMut::new(&mut out, 5).split_at(3);
        MapMut::within(right, [2, 2, 3, 2], 1).par_tiles(1, 16, |b, y, c, mut tile| {
            for x in 0..3 {
                tile.row(x).copy_from_slice(map.pixel(b, y, x, c, 2));
            }
        });
        for (i, (&o, &x)) in out.iter().zip(&data).enumerate() {
            assert_eq!(o, if i % 5 >= 3 && i / 5 % 7 > 0 { x } else { 0.0 });
        }
    }
}
