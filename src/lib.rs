//! karat.
pub mod error;
pub mod grouping;
pub mod tensor;
pub use error::{Error, Result};
