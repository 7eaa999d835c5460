//! Networks: one file per architecture, composed of the rooms below, parameters named as published.

pub mod vit;
pub mod vit_block;
