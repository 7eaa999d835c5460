//! A right operand in the order in which products read it.

use crate::simd::{self, Isa};
use crate::tensor::{Buffer, Float};

use super::view::Mat;

/// A matrix packed once for many products: weights, when a network only infers.
#[derive(Clone)]
pub struct Packed<T: Float> {
    data: Buffer<T>,
    rows: usize,
    cols: usize,
    /// The back end whose tiles it is cut for.
    isa: Isa,
}

impl<T: Float> Packed<T> {
    /// Packs B for the active back end.
    pub fn new(b: Mat<T>) -> Self {
        let (rows, cols) = (b.rows(), b.cols());
        let mut data = Buffer::scratch(T::packed_len(rows, cols));
        T::pack(b, &mut data);
        Packed { data, rows, cols, isa: simd::isa() }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// The back end that can multiply by it.
    pub fn isa(&self) -> Isa {
        self.isa
    }
    pub(super) fn data(&self) -> &[T] {
        &self.data
    }
}
