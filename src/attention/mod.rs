//! Attention mechanisms: one file each, equations first, then configuration, parameters, forward, backward, operation.

pub mod class;
pub mod class_xnorm;
pub mod softmax;
pub mod window;
pub mod xca;
pub mod xnorm;
