//! Every operation, once. Adding one adds one line here; golden tests, gradient checks, `verify`, `case new` and `list` follow.

use super::op::Op;
use crate::attention::softmax::SoftmaxAttention;
use crate::error::{Error, Result};
use crate::grouping::ops::{GroupKnapsack, GroupOptimal, GroupPlan, GroupSweep, GroupWindows};
use crate::model::vit_block::VitBlock;
use crate::nn::positions::PosEmbedSinCos2d;

static OPERATIONS: &[Op] = &[
    Op::of::<SoftmaxAttention>(),
    Op::of::<VitBlock>(),
    Op::of::<PosEmbedSinCos2d>(),
    Op::of::<GroupKnapsack>(),
    Op::of::<GroupWindows>(),
    Op::of::<GroupOptimal>(),
    Op::of::<GroupSweep>(),
    Op::of::<GroupPlan>(),
];

/// All operations, in order of the sheets.
pub fn operations() -> &'static [Op] {
    OPERATIONS
}

/// The operation of this name.
pub fn find(name: &str) -> Result<&'static Op> {
    OPERATIONS.iter().find(|op| op.name == name).ok_or_else(|| Error::unknown("operation", name, OPERATIONS.iter().map(|op| op.name)))
}
