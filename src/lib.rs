//! karat.
pub mod data;
pub mod error;
mod fs;
#[cfg(feature = "cli")]
pub mod plot;
pub mod tensor;
pub use error::{Error, Result};
