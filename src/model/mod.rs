//! Networks: one file per architecture, composed of the rooms below, parameters named as published.

pub mod cait_block;
pub mod cogview_block;
pub mod gmm_vit;
pub mod green_swin;
pub mod green_twins;
pub mod swin;
pub mod swin_ops;
pub mod t2t;
pub mod t2t_block;
pub mod vit;
pub mod vit_block;
