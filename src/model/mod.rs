//! Networks: one file per architecture, composed of the rooms below, parameters named as published.

pub mod coat_block;
pub mod green_swin;
pub mod swin;
pub mod swin_ops;
pub mod t2t;
pub mod t2t_block;
pub mod vit;
pub mod vit_block;
