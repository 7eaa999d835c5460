//! Attention mechanisms: one file each, equations first, then configuration, parameters, forward, backward, operation.

pub mod beit;
pub mod class;
pub mod class_xnorm;
pub mod cluster;
pub mod cogview_sparse;
pub mod dilated;
pub mod factorized_conv;
pub mod gaussian_mask;
pub mod gaussian_mask_cait;
pub mod gaussian_mask_swin;
pub mod gaussian_mask_t2t;
pub mod pb_relax;
pub mod performer;
pub mod retention;
pub mod single_path;
pub mod single_path_ops;
pub mod softmax;
pub mod spatial_reduction;
pub mod swda;
pub mod talking_heads;
pub mod token_transformer;
pub mod um_window;
pub mod visual_tokens;
pub mod window;
pub mod xca;
pub mod xnorm;
