//! Shapes: up to six dimensions, held inline.

use std::fmt;
use std::ops::Deref;

use crate::error::{Error, Result};

const MAX_RANK: usize = 6;

/// The dimensions of a tensor, outermost first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    dims: [usize; MAX_RANK],
    rank: u8,
}

impl Shape {
    /// A shape from a slice of at most six dimensions.
    pub fn try_new(dims: &[usize]) -> Result<Self> {
        if dims.len() > MAX_RANK || dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).is_none() {
            return Err(Error::shape("tensor", "at most 6 dimensions and fewer than 2^64 elements", dims));
        }
        let mut all = [1; MAX_RANK];
        all[..dims.len()].copy_from_slice(dims);
        Ok(Shape { dims: all, rank: dims.len() as u8 })
    }

    /// The number of elements.
    pub fn numel(&self) -> usize {
        self.iter().product()
    }

    /// The dimensions by name: `let [b, n, c] = shape.dims("x")?`.
    pub fn dims<const R: usize>(&self, what: &str) -> Result<[usize; R]> {
        <[usize; R]>::try_from(&self[..]).map_err(|_| Error::shape(what, format!("of {R} dimensions"), self))
    }

    /// All dimensions but the last multiplied, and the last: the matrix that a linear layer sees. Rank 0 counts as `[1, 1]`.
    pub fn rows_cols(&self) -> (usize, usize) {
        let cols = self.last().copied().unwrap_or(1);
        (self[..self.len().saturating_sub(1)].iter().product(), cols)
    }

    /// This shape with another last dimension.
    pub fn with_last(mut self, last: usize) -> Self {
        assert!(self.rank > 0, "a scalar has no last dimension");
        self.dims[self.rank as usize - 1] = last;
        self
    }
}

impl Deref for Shape {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.dims[..self.rank as usize]
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl<const R: usize> From<[usize; R]> for Shape {
    fn from(dims: [usize; R]) -> Self {
        const { assert!(R <= MAX_RANK) };
        let mut all = [1; MAX_RANK];
        all[..R].copy_from_slice(&dims);
        Shape { dims: all, rank: R as u8 }
    }
}

impl PartialEq<[usize]> for Shape {
    fn eq(&self, other: &[usize]) -> bool {
        &**self == other
    }
}
