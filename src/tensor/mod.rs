//! Tensors: contiguous, row-major, of `f32` or `f64`, on pooled aligned memory; counter-based random numbers.

mod float;
pub mod pool;
pub mod random;
mod shape;

use std::fmt;
use std::sync::Arc;

pub use float::{Float, f16_to_f64};
pub use pool::Buffer;
pub use shape::Shape;

use crate::error::{Error, Result};

/// A contiguous row-major array of floats.
///
/// Cloning shares the memory; writing to a shared tensor copies it first. So a layer that keeps its input for the backward
/// pass costs nothing, and a tensor that nobody else holds is changed in place.
#[derive(Clone)]
pub struct Tensor<T: Float> {
    shape: Shape,
    data: Arc<Buffer<T>>,
}

impl<T: Float> Tensor<T> {
    /// A tensor of zeros.
    pub fn zeros(shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        Tensor { shape, data: Arc::new(Buffer::zeros(shape.numel())) }
    }

    /// A tensor that holds whatever its memory last held: for outputs that are written whole.
    pub fn scratch(shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        Tensor { shape, data: Arc::new(Buffer::scratch(shape.numel())) }
    }

    /// A tensor with the values of `data`; an error unless there are as many as `shape` says.
    pub fn new(shape: impl Into<Shape>, data: &[T]) -> Result<Self> {
        let shape = shape.into();
        if shape.numel() != data.len() {
            return Err(Error::shape("tensor", shape, format!("{} elements", data.len())));
        }
        let mut tensor = Self::scratch(shape);
        tensor.data_mut().copy_from_slice(data);
        Ok(tensor)
    }

    /// A tensor whose element `i` (in row-major order) is `f(i)`.
    pub fn from_fn(shape: impl Into<Shape>, mut f: impl FnMut(usize) -> T) -> Self {
        let mut tensor = Self::scratch(shape);
        for (i, x) in tensor.data_mut().iter_mut().enumerate() {
            *x = f(i);
        }
        tensor
    }

    /// A 0-d tensor.
    pub fn scalar(x: T) -> Self {
        Self::from_fn([], |_| x)
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The elements in row-major order.
    pub fn data(&self) -> &[T] {
        &self.data
    }

    /// The elements, to be changed; copies them first if the memory is shared.
    pub fn data_mut(&mut self) -> &mut [T] {
        let buffer: &mut Buffer<T> = Arc::make_mut(&mut self.data);
        buffer
    }

    /// The same elements under another shape with as many elements.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        if shape.numel() != self.shape.numel() {
            return Err(Error::shape("reshape", shape, self.shape));
        }
        Ok(Tensor { shape, data: Arc::clone(&self.data) })
    }

    /// The dimensions by name, or an error that names the tensor: `let [b, n, c] = x.dims("x")?`.
    pub fn dims<const R: usize>(&self, what: &str) -> Result<[usize; R]> {
        self.shape.dims(what)
    }

    /// An error that names the tensor unless it has this shape.
    pub fn expect_shape(&self, what: &str, shape: impl Into<Shape>) -> Result<()> {
        let shape = shape.into();
        if self.shape == shape { Ok(()) } else { Err(Error::shape(what, shape, self.shape)) }
    }

    /// The same values in another precision.
    pub fn cast<U: Float>(&self) -> Tensor<U> {
        Tensor::from_fn(self.shape, |i| U::from_f64(self.data[i].to_f64()))
    }
}

impl<T: Float> fmt::Debug for Tensor<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = &self.data[..self.data.len().min(8)];
        write!(f, "Tensor<{}>{:?} {head:?}{}", T::NAME, self.shape, if self.data.len() > 8 { "…" } else { "" })
    }
}

/// A contiguous row-major array of integers: indices, coordinates, masks.
#[derive(Clone, Debug, PartialEq)]
pub struct IntTensor {
    /// The shape.
    pub shape: Shape,
    /// The elements in row-major order.
    pub data: Vec<i64>,
}

impl IntTensor {
    /// A tensor with the values of `data`; an error unless there are as many as `shape` says.
    pub fn new(shape: impl Into<Shape>, data: Vec<i64>) -> Result<Self> {
        let shape = shape.into();
        if shape.numel() != data.len() {
            return Err(Error::shape("integer tensor", shape, format!("{} elements", data.len())));
        }
        Ok(IntTensor { shape, data })
    }

    /// A one-dimensional tensor.
    pub fn vector(data: impl IntoIterator<Item = usize>) -> Self {
        let data: Vec<i64> = data.into_iter().map(|x| x as i64).collect();
        IntTensor { shape: [data.len()].into(), data }
    }
}
