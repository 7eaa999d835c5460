//! karat.
pub mod case;
pub mod error;
pub mod kernel;
pub mod linalg;
pub mod nn;
pub mod simd;
pub mod tensor;
pub use error::{Error, Result};
