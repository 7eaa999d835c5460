//! What can be trained: a loss over batches of images with parameters in the flat store.

use std::sync::Arc;

use super::batch_norm::Updates;
use super::{Entry, Layout, Params, StepKey};
use crate::data::transform::Normalization;
use crate::error::Result;
use crate::tensor::Tensor;

/// One batch of a training step.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    /// Normalised pixels, `[B, C, S, S]`.
    pub images: &'a Tensor<f32>,
    /// The same crops for whoever asks for a [`second view`](Objective::second_view), `[B, C, S', S']`.
    pub second: Option<&'a Tensor<f32>>,
    /// One class per image; objectives without labels don't look.
    pub labels: &'a [usize],
    /// What the step's random numbers depend on.
    pub key: StepKey,
}

/// The loss of one batch.
#[derive(Debug)]
pub struct Loss {
    /// Its value.
    pub value: f32,
    /// Running statistics after the step.
    pub updates: Updates<f32>,
}

impl From<f32> for Loss {
    fn from(value: f32) -> Self {
        Loss { value, updates: Vec::new() }
    }
}

/// How images are prepared for a second network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct View {
    /// Side in pixels.
    pub size: usize,
    /// How pixels are normalised.
    pub normalization: Normalization,
}

/// A loss with its network: what the trainer needs of it.
pub trait Objective: Send + Sync {
    /// Names, shapes and initialisation of the parameters.
    fn layout(&self) -> &Arc<Layout>;

    /// Side length in pixels and channels of the images it takes.
    fn image_shape(&self) -> (usize, usize);

    /// The same crops as another network sees them: a tokenizer.
    fn second_view(&self) -> Option<View> {
        None
    }

    /// The loss of a batch; with `grads`, its gradient is added there.
    fn loss(&self, params: &Params<f32>, grads: Option<&mut Params<f32>>, batch: Batch) -> Result<Loss>;

    /// The factor on the learning rate of one parameter: 1 unless layers learn at different rates.
    fn rate(&self, _: &Entry) -> f64 {
        1.0
    }
}
