//! Cells of `side × side` tokens and the convolution over them: kernel and stride are one, incomplete cells are dropped.

use super::linear::Linear;
use super::param::{Init, Names, Params};
use crate::case::Cost;
use crate::error::{Error, Result};
use crate::kernel::cells::{self, Sizes};
use crate::linalg::{Epilogue, Mat, MatMut, gemm};
use crate::tensor::{Buffer, Float, Tensor};

/// Which tokens lie in which cell, in raster order; on a whole map, or among the visible tokens of a masked one.
#[derive(Clone, Debug)]
pub struct Cells {
    /// `side²` token rows per cell, row-major; [`u32::MAX`] where a token is not there.
    tokens: Vec<u32>,
    area: usize,
    /// Position (row, column) of every cell on the map of cells.
    positions: Vec<[usize; 2]>,
}

impl Cells {
    /// All complete cells of a `height × width` map.
    pub fn dense([height, width]: [usize; 2], side: usize) -> Self {
        let (rows, columns) = (height / side.max(1), width / side.max(1));
        let positions: Vec<[usize; 2]> = (0..rows * columns).map(|cell| [cell / columns, cell % columns]).collect();
        let tokens = positions.iter().flat_map(|[y, x]| {
            let first = y * side * width + x * side;
            (0..side * side).map(move |k| (first + k / side * width + k % side) as u32)
        });
        Cells { tokens: tokens.collect(), area: side * side, positions: positions.clone() }
    }

    /// The complete cells of a map that hold at least one of the visible tokens at `coords`, which must be different places of the map.
    pub fn visible(coords: &[[usize; 2]], [height, width]: [usize; 2], side: usize) -> Self {
        let (rows, columns) = (height / side.max(1), width / side.max(1));
        let inside = |at: &[usize; 2]| Some([at[0] / side, at[1] / side]).filter(|[y, x]| *y < rows && *x < columns);
        let mut positions: Vec<[usize; 2]> = coords.iter().filter_map(inside).collect();
        positions.sort_unstable();
        positions.dedup();
        let mut tokens = vec![u32::MAX; positions.len() * side * side];
        for (i, at) in coords.iter().enumerate() {
            if let Some(cell) = inside(at).and_then(|cell| positions.binary_search(&cell).ok()) {
                tokens[cell * side * side + at[0] % side * side + at[1] % side] = i as u32;
            }
        }
        Cells { tokens, area: side * side, positions }
    }

    /// The number of cells of an image.
    pub fn count(&self) -> usize {
        self.positions.len()
    }

    /// The positions of the cells.
    pub fn positions(&self) -> &[[usize; 2]] {
        &self.positions
    }

    fn sizes<T: Float>(&self, x: &Tensor<T>) -> Result<Sizes> {
        let [batch, tokens, width] = x.dims("tokens")?;
        Ok(Sizes { batch, tokens, area: self.area, width })
    }

    /// The mean of every cell: `[B, N, C]` → `[B, cells, C]`.
    pub fn mean<T: Float>(&self, x: &Tensor<T>) -> Result<Tensor<T>> {
        let sizes = self.sizes(x)?;
        let mut y = Tensor::scratch([sizes.batch, self.count(), sizes.width]);
        cells::mean(y.data_mut(), x.data(), &self.tokens, sizes);
        Ok(y)
    }

    /// Adds the gradient of the tokens of [`mean`](Self::mean) to `dx`.
    pub fn mean_backward<T: Float>(&self, dx: &mut Tensor<T>, dy: &Tensor<T>) -> Result<()> {
        let sizes = self.sizes(dx)?;
        dy.expect_shape("gradient of means", [sizes.batch, self.count(), sizes.width])?;
        cells::mean_backward(dx.data_mut(), dy.data(), &self.tokens, sizes);
        Ok(())
    }

    /// The tokens of every cell side by side, in the order of a convolution weight: `[B, cells, C·side²]`.
    fn gather<T: Float>(&self, x: &Tensor<T>) -> Result<Tensor<T>> {
        let sizes = self.sizes(x)?;
        let mut y = Tensor::scratch([sizes.batch, self.count(), sizes.width * self.area]);
        cells::gather(y.data_mut(), x.data(), &self.tokens, sizes);
        Ok(y)
    }
}

/// A convolution over [`Cells`]: `weight` `[out, in, side, side]`, `bias`. What it gathers is gathered again for the backward pass.
#[derive(Clone, Debug)]
pub struct CellConv {
    linear: Linear,
    inputs: usize,
}

impl CellConv {
    /// Registers `weight` and `bias`.
    pub fn new(mut names: Names, inputs: usize, outputs: usize, side: usize, init: Init) -> Result<Self> {
        let fits = side.checked_mul(side).and_then(|area| area.checked_mul(inputs)).and_then(|n| n.checked_mul(outputs));
        if side == 0 || fits.is_none_or(|n| n > 1 << 40) {
            return Err(Error::config(
                "kernel",
                format!("expected a kernel of sensible size, found {side}×{side} for {inputs} → {outputs} channels"),
            ));
        }
        let linear = Linear::shaped(&mut names, [outputs, inputs, side, side].into(), inputs * side * side, outputs, true, init);
        Ok(CellConv { linear, inputs })
    }

    /// The cost for `count` cells in each of `b` images: the output is all that is new.
    pub fn cost(inputs: usize, outputs: usize, side: usize, b: usize, count: usize) -> Cost {
        Cost { flops: 2 * b * count * outputs * inputs * side * side, activation_bytes: 4 * b * count * outputs }
    }

    fn expect<T: Float>(&self, x: &Tensor<T>) -> Result<()> {
        let [batch, n, c] = x.dims("input of a convolution over cells")?;
        if c == self.inputs { Ok(()) } else { Err(Error::shape("input of a convolution over cells", [batch, n, self.inputs], x.shape())) }
    }

    /// `[B, N, in]` → `[B, cells, out]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, cells: &Cells) -> Result<Tensor<T>> {
        self.expect(x)?;
        let gathered = cells.gather(x)?;
        let ([batch, count, inputs], outputs) = (gathered.dims("gathered cells")?, self.linear.outputs());
        let rows = batch * count;
        if rows >= outputs {
            return self.linear.forward(p, &gathered);
        }
        // Few cells under a large kernel: `yᵀ = W xᵀ` reads the weight in place and packs the cells.
        let mut across = Buffer::<T>::scratch(outputs * rows);
        let weight = Mat::new(p.get(self.linear.weight()), outputs, inputs);
        gemm(weight, Mat::new(gathered.data(), rows, inputs).t(), MatMut::new(&mut across, outputs, rows), Epilogue::default());
        let mut y = Tensor::scratch([batch, count, outputs]);
        let bias = self.linear.bias().map(|b| p.get(b));
        for (r, y) in y.data_mut().chunks_exact_mut(outputs).enumerate() {
            for (o, y) in y.iter_mut().enumerate() {
                *y = across[o * rows + r] + bias.map_or(T::ZERO, |b| b[o]);
            }
        }
        Ok(y)
    }

    /// Adds the gradients of the parameters, and that of `x` to `dx`.
    pub fn backward_onto<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        cells: &Cells,
        dy: &Tensor<T>,
        dx: &mut Tensor<T>,
    ) -> Result<()> {
        let sizes = cells.sizes(x)?;
        let d = self.linear.backward(p, g, &cells.gather(x)?, dy)?;
        cells::gather_backward(dx.data_mut(), d.data(), &cells.tokens, sizes);
        Ok(())
    }

    /// Adds the gradients of the parameters; returns `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, x: &Tensor<T>, cells: &Cells, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let mut dx = Tensor::zeros(x.shape());
        self.backward_onto(p, g, x, cells, dy, &mut dx)?;
        Ok(dx)
    }
}
