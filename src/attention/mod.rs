//! Attention mechanisms: one file each, equations first, then configuration, parameters, forward, backward, operation.

pub mod factorized_conv;
pub mod performer;
pub mod softmax;
pub mod token_transformer;
pub mod window;
