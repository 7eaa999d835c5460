//! Attention mechanisms: one file each, equations first, then configuration, parameters, forward, backward, operation.

pub mod cogview_sparse;
pub mod pb_relax;
pub mod softmax;
pub mod window;
