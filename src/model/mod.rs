//! Networks: one file per architecture, composed of the rooms below, parameters named as published.

pub mod beit_block;
pub mod cait_block;
pub mod cluster_block;
pub mod coat_block;
pub mod coc;
pub mod cogview_block;
pub mod dilate_block;
pub mod dilateformer;
pub mod green_swin;
pub mod green_twins;
pub mod hpvit;
pub mod resnet;
pub mod resnet_block;
pub mod swin;
pub mod swin_ops;
pub mod t2t;
pub mod t2t_block;
pub mod vit;
pub mod vit_block;
pub mod vt_fpn;
pub mod vt_resnet;
pub mod xcit;
pub mod xcit_block;
pub mod xcit_class;
pub mod xvit;
pub mod xvit_class;
