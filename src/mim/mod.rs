//! Masked image modeling: masks, targets, one file per objective.

pub mod greenmim;
pub mod mask;
pub mod methods;
pub mod pixels;
pub mod simmim_swin;

use std::sync::Arc;

use crate::error::Result;
use crate::nn::{Layout, Params};
use crate::tensor::{Float, Tensor};

/// What one training step needs to be reproducible: its masks depend on these numbers alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepKey {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step, counted from 0 (or any number for a picture).
    pub step: u64,
}

/// A batch as the objective saw and predicted it, in normalised pixels `[B, C, H, W]`.
pub struct Reconstruction<T: Float> {
    /// 1 where a pixel was hidden, else 0: `[B, C, H, W]`.
    pub hidden: Tensor<T>,
    /// The prediction for every pixel. Objectives that predict per-patch normalised pixels undo that with the patch's own mean
    /// and deviation, as their authors' visualisations do.
    pub predicted: Tensor<T>,
}

/// A masked-image-modeling objective with its network: what the trainer, the probe and the pictures need of it.
pub trait Objective: Send + Sync {
    /// Names, shapes and initialisation of the parameters.
    fn layout(&self) -> &Arc<Layout>;

    /// Side length in pixels and channels of the images it takes.
    fn image_shape(&self) -> (usize, usize);

    /// The loss of a batch `images` `[B, C, S, S]`; with `grads`, its gradient is added there.
    fn loss<T: Float>(&self, params: &Params<T>, grads: Option<&mut Params<T>>, images: &Tensor<T>, key: StepKey) -> Result<T>;

    /// The prediction for a batch, for pictures.
    fn reconstruct<T: Float>(&self, params: &Params<T>, images: &Tensor<T>, key: StepKey) -> Result<Reconstruction<T>>;

    /// Frozen features of whole images for a linear probe: the encoder's normalised output averaged over tokens, `[B, F]`.
    fn features<T: Float>(&self, params: &Params<T>, images: &Tensor<T>) -> Result<Tensor<T>>;
}
