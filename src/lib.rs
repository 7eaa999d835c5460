//! karat.
pub mod data;
pub mod error;
mod fs;
pub mod tensor;
pub use error::{Error, Result};
