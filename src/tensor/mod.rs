//! Tensors: contiguous, row-major, of `f32` or `f64`, on pooled aligned memory; counter-based random numbers.

pub mod random;
