//! Matrix products.

/// Matrix products in one precision.
pub trait Gemm: Sized {}
impl Gemm for f32 {}
impl Gemm for f64 {}
