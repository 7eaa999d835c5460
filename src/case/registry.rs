//! Every operation, once. Adding one adds one line here; golden tests, gradient checks, `verify`, `case new` and `list` follow.

use super::op::Op;
use crate::error::{Error, Result};

static OPERATIONS: &[Op] = &[
    Op::of::<crate::nn::positions::PosEmbedSinCos2d>(),
    Op::of::<crate::nn::conv::Conv2dOp>(),
    Op::of::<crate::nn::batch_norm::BatchNorm2dOp>(),
    Op::of::<crate::nn::group_norm::GroupNormOp>(),
    Op::of::<crate::nn::pool::MaxPool2d>(),
    Op::of::<crate::nn::resize::BilinearResize>(),
    Op::of::<crate::nn::resize::ResizePosEmbed>(),
    Op::of::<crate::nn::resize::HpvitPosEmbed>(),
    Op::of::<crate::nn::layer_scale::LayerScaleOp>(),
    Op::of::<crate::attention::softmax::SoftmaxAttention>(),
    Op::of::<crate::attention::xca::CrossCovariance>(),
    Op::of::<crate::attention::class::Class>(),
    Op::of::<crate::attention::xnorm::XNormAttention>(),
    Op::of::<crate::attention::class_xnorm::ClassXNormAttention>(),
    Op::of::<crate::attention::talking_heads::TalkingHeadsAttention>(),
    Op::of::<crate::attention::window::Window>(),
    Op::of::<crate::attention::window::GroupWindow>(),
    Op::of::<crate::attention::swda::Swda>(),
    Op::of::<crate::attention::dilated::DilatedAttention>(),
    Op::of::<crate::attention::dilated::GlobalAttention>(),
    Op::of::<crate::attention::cluster::ClusterAttention>(),
    Op::of::<crate::model::vit_block::VitBlock>(),
    Op::of::<crate::model::cait_block::LayerScaleBlock>(),
    Op::of::<crate::model::cait_block::LayerScaleClassAttention>(),
    Op::of::<crate::model::swin_ops::Block>(),
    Op::of::<crate::model::swin_ops::Merging>(),
    Op::of::<crate::model::swin_ops::Model>(),
    Op::of::<crate::model::green_swin::Block>(),
    Op::of::<crate::model::green_swin::Merging>(),
    Op::of::<crate::model::green_swin::Model>(),
    Op::of::<crate::model::vit::ModelVit>(),
    Op::of::<crate::model::vit::ModelVitDistilled>(),
    Op::of::<crate::mim::mask::MaskRandom>(),
    Op::of::<crate::mim::mask::MaskSimMim>(),
    Op::of::<crate::mim::mae::MimMae>(),
    Op::of::<crate::mim::simmim::MimSimMim>(),
    Op::of::<crate::mim::greenmim::GreenMimOp>(),
    Op::of::<crate::grouping::ops::GroupKnapsack>(),
    Op::of::<crate::grouping::ops::GroupWindows>(),
    Op::of::<crate::grouping::ops::GroupOptimal>(),
    Op::of::<crate::grouping::ops::GroupSweep>(),
    Op::of::<crate::grouping::ops::GroupPlan>(),
    Op::of::<crate::nn::soft_split::SoftSplitOp>(),
    Op::of::<crate::nn::positions::SinusoidPosition>(),
    Op::of::<crate::attention::performer::PerformerFeatures>(),
    Op::of::<crate::attention::performer::PerformerAttention>(),
    Op::of::<crate::attention::token_transformer::TokenTransformer>(),
    Op::of::<crate::model::t2t_block::TokenTransformerBlock>(),
    Op::of::<crate::model::t2t_block::TokenPerformerBlock>(),
    Op::of::<crate::model::t2t::T2tModuleOp>(),
    Op::of::<crate::model::t2t::ModelT2tVit>(),
    Op::of::<crate::mim::uniform::MaskUniform>(),
    Op::of::<crate::mim::uniform::MaskSecondary>(),
    Op::of::<crate::mim::uniform::UmCompact>(),
    Op::of::<crate::attention::um_window::UmWindowAttention>(),
    Op::of::<crate::attention::spatial_reduction::SpatialReductionAttention>(),
    Op::of::<crate::attention::spatial_reduction::Gsa>(),
    Op::of::<crate::model::green_twins::PegVisible>(),
    Op::of::<crate::attention::pb_relax::PbRelax>(),
    Op::of::<crate::attention::cogview_sparse::CogViewSparse>(),
    Op::of::<crate::nn::cogview_norm::CogViewLayerNorm>(),
    Op::of::<crate::model::cogview_block::Sandwich>(),
    Op::of::<crate::nn::gumbel_softmax::GumbelSoftmax>(),
    Op::of::<crate::nn::logit_laplace::LogitLaplace>(),
    Op::of::<crate::attention::gaussian_mask::MaskGaussianMixture>(),
    Op::of::<crate::attention::gaussian_mask::GaussianMask>(),
    Op::of::<crate::attention::gaussian_mask_swin::GaussianMaskSwin>(),
    Op::of::<crate::model::gmm_vit::GaussianMaskBlock>(),
    Op::of::<crate::model::gmm_vit::ModelGmmVit>(),
    Op::of::<crate::attention::retention::Retention>(),
];

/// All operations, in order of the sheets.
pub fn operations() -> &'static [Op] {
    OPERATIONS
}

/// The operation of this name.
pub fn find(name: &str) -> Result<&'static Op> {
    OPERATIONS.iter().find(|op| op.name == name).ok_or_else(|| Error::unknown("operation", name, OPERATIONS.iter().map(|op| op.name)))
}
