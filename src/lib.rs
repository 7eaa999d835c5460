//! karat.
<<<<<<< HEAD
pub mod case;
pub mod error;
pub mod kernel;
pub mod linalg;
pub mod mim;
pub mod nn;
pub mod simd;
=======
pub mod data;
pub mod error;
mod fs;
>>>>>>> 95c4ffb159a97ffa0d20a82f037dbd955dc1d0d4
pub mod tensor;
pub use error::{Error, Result};
