//! karat.
pub mod error;
pub mod linalg;
pub mod simd;
pub mod tensor;
pub use error::{Error, Result};
