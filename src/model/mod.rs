//! Networks: one file per architecture, composed of the rooms below, parameters named as published.

pub mod cait_block;
pub mod cogview_block;
pub mod green_swin;
pub mod green_twins;
pub mod pre_norm;
pub mod pvt;
pub mod swin;
pub mod swin_ops;
pub mod t2t;
pub mod t2t_block;
pub mod um_swin;
pub mod vit;
pub mod vit_block;
