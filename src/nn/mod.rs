//! Layers: parameters and kernels.

mod param;

pub use param::{Entry, Init, Layout, Names, Param, Params};
