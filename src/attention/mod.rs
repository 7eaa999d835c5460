//! Attention mechanisms: one file each, equations first, then configuration, parameters, forward, backward, operation.

pub mod softmax;
pub mod spatial_reduction;
pub mod um_window;
pub mod window;
