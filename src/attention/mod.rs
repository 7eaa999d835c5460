//! Attention mechanisms: one file each, equations first, then configuration, parameters, forward, backward, operation.

pub mod beit;
pub mod class;
pub mod cluster;
pub mod dilated;
pub mod performer;
pub mod softmax;
pub mod swda;
pub mod talking_heads;
pub mod token_transformer;
pub mod window;
