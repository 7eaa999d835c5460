//! Every operation, once. Adding one adds one line here; golden tests, gradient checks, `verify`, `case new` and `list` follow.

use super::op::Op;
use crate::attention::{softmax, window};
use crate::error::{Error, Result};
use crate::grouping::ops as group;
use crate::mim::{greenmim, mae, mask, simmim};
use crate::model::{green_swin, swin_ops, vit, vit_block};
use crate::nn::positions;

static OPERATIONS: &[Op] = &[
    Op::of::<positions::PosEmbedSinCos2d>(),
    Op::of::<softmax::SoftmaxAttention>(),
    Op::of::<window::Window>(),
    Op::of::<window::GroupWindow>(),
    Op::of::<vit_block::VitBlock>(),
    Op::of::<swin_ops::Block>(),
    Op::of::<swin_ops::Merging>(),
    Op::of::<swin_ops::Model>(),
    Op::of::<green_swin::Block>(),
    Op::of::<green_swin::Merging>(),
    Op::of::<green_swin::Model>(),
    Op::of::<vit::ModelVit>(),
    Op::of::<vit::ModelVitDistilled>(),
    Op::of::<mask::MaskRandom>(),
    Op::of::<mask::MaskSimMim>(),
    Op::of::<mae::MimMae>(),
    Op::of::<simmim::MimSimMim>(),
    Op::of::<greenmim::GreenMimOp>(),
    Op::of::<group::GroupKnapsack>(),
    Op::of::<group::GroupWindows>(),
    Op::of::<group::GroupOptimal>(),
    Op::of::<group::GroupSweep>(),
    Op::of::<group::GroupPlan>(),
];

/// All operations, in order of the sheets.
pub fn operations() -> &'static [Op] {
    OPERATIONS
}

/// The operation of this name.
pub fn find(name: &str) -> Result<&'static Op> {
    OPERATIONS.iter().find(|op| op.name == name).ok_or_else(|| Error::unknown("operation", name, OPERATIONS.iter().map(|op| op.name)))
}
