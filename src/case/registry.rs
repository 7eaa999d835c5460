//! Every operation, once. Adding one adds one line here; golden tests, gradient checks, `verify`, `case new` and `list` follow.

use super::op::Op;
use crate::attention::softmax::SoftmaxAttention;
use crate::attention::window::{GroupWindow, Window};
use crate::error::{Error, Result};
use crate::mim::greenmim::GreenMimOp;
use crate::model::{green_swin, swin_ops};
use crate::model::vit_block::VitBlock;
use crate::nn::positions::PosEmbedSinCos2d;

static OPERATIONS: &[Op] = &[Op::of::<SoftmaxAttention>(), Op::of::<Window>(), Op::of::<GroupWindow>(), Op::of::<VitBlock>(), Op::of::<swin_ops::Block>(), Op::of::<swin_ops::Merging>(), Op::of::<swin_ops::Model>(), Op::of::<green_swin::Block>(), Op::of::<green_swin::Merging>(), Op::of::<green_swin::Model>(), Op::of::<GreenMimOp>(), Op::of::<PosEmbedSinCos2d>()];

/// All operations, in order of the sheets.
pub fn operations() -> &'static [Op] {
    OPERATIONS
}

/// The operation of this name.
pub fn find(name: &str) -> Result<&'static Op> {
    OPERATIONS.iter().find(|op| op.name == name).ok_or_else(|| Error::unknown("operation", name, OPERATIONS.iter().map(|op| op.name)))
}
