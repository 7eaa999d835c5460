//! Layers: parameters and kernels.
//!
//! A layer is a pair of functions: `forward(params, x) → (y, saved)` and `backward(params, grads, x, saved, dy) → dx`. Gradients of
//! parameters are added to; what is cheaper to recompute than to keep is recomputed.

pub mod batch_norm;
pub mod beit_rel_pos;
pub mod beit_rel_pos_resize;
mod cells;
mod checkpoint;
pub mod cogview_norm;
pub mod conv;
pub mod conv_norm;
pub mod conv_position;
pub mod conv_stem;
pub mod conv_transpose;
pub mod dilate;
pub mod drop_path;
pub mod dropout;
pub mod fourier;
pub mod group_norm;
mod grouped_linear;
pub mod gumbel_softmax;
pub mod layer_scale;
mod linear;
pub mod logit_laplace;
pub mod lpi;
pub mod maps;
pub mod mask_token;
pub mod mlp;
mod norm;
mod objective;
mod param;
mod pass;
pub mod patch_embed;
pub mod peg;
pub mod points;
pub mod pool;
pub mod positions;
pub mod resize;
pub mod soft_split;
pub mod spvit_fold;
pub mod spvit_gate;
pub mod spvit_mlp;

pub use batch_norm::BatchNorm2d;
pub use cells::{CellConv, Cells};
pub use checkpoint::{Checkpoint, write_tensors};
pub(crate) use checkpoint::{encode, items};
pub use cogview_norm::CogViewNorm;
pub use conv::{Conv2d, ConvSettings};
pub use conv_stem::ConvStem;
pub use drop_path::DropPath;
pub use fourier::FourierPosition;
pub use group_norm::GroupNorm;
pub use grouped_linear::GroupedLinear;
pub use layer_scale::LayerScale;
pub mod vector_quantize;

pub use conv_transpose::ConvTranspose2d;
pub use linear::Linear;
pub use lpi::LocalPatchInteraction;
pub use mlp::Mlp;
pub use norm::{LayerNorm, Stats};
pub use objective::{Batch, Loss, Objective, View};
pub use param::{Entry, Init, Layout, Names, Param, Params};
pub use pass::{Named, Pass, StepKey, Watch};
pub use patch_embed::PatchEmbed;
pub use peg::Peg;
pub use soft_split::SoftSplit;

/// The usual initialisation of transformer weights, normal with deviation 0.02, for any fan-in and fan-out.
pub fn normal_02(_: usize, _: usize) -> Init {
    Init::NORMAL_02
}

/// Xavier-uniform initialisation, MAE's and GreenMIM's.
pub fn xavier(fan_in: usize, fan_out: usize) -> Init {
    Init::XavierUniform { fan_in, fan_out }
}

/// Xavier-normal initialisation.
pub fn xavier_normal(fan_in: usize, fan_out: usize) -> Init {
    Init::Normal((2.0 / (fan_in + fan_out) as f64).sqrt())
}
