//! karat.
pub mod case;
#[cfg(feature = "cli")]
pub mod cli;
pub mod error;
mod fs;
pub mod linalg;
pub mod nn;
pub mod simd;
pub mod tensor;
pub use error::{Error, Result};
