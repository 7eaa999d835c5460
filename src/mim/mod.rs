//! Masked image modeling: masks, targets, one file per objective.

pub mod a2mim;
pub mod a2mim_loss;
pub mod a2mim_paint;
pub mod beit;
pub mod blockwise;
pub mod frequency;
pub mod green_encoder;
pub mod greenmim;
pub mod interaction;
pub mod mae;
pub mod mask;
pub mod methods;
pub mod pixels;
pub mod simmim;
pub mod simmim_swin;
pub mod simmim_vit;
pub mod um_encoder;
pub mod um_mae;
pub mod uniform;

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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::tensor::random::{Purpose, Rng};

    /// What everything that takes an [`Objective`] relies on: the loss is a function of parameters, images and key; the hidden share is
    /// as configured; plain gradient descent with the gradients that it adds lowers it; features are one finite row per image.
    pub(crate) fn check_objective(objective: &impl Objective, ratio: f64, features: usize) {
        let (side, chans) = objective.image_shape();
        let mut rng = Rng::new(7, Purpose::Case, 0, 0);
        let images = Tensor::<f32>::from_fn([3, chans, side, side], |_| rng.normal() as f32);
        let key = StepKey { seed: 11, step: 4 };
        let mut p = Params::init(objective.layout(), 1);
        let first = objective.loss(&p, None, &images, key).unwrap();
        assert_eq!(first, objective.loss(&p, None, &images, key).unwrap());
        assert_ne!(first, objective.loss(&p, None, &images, StepKey { step: 5, ..key }).unwrap());
        for _ in 0..20 {
            let mut g = Params::zeros(objective.layout());
            objective.loss(&p, Some(&mut g), &images, key).unwrap();
            p.flat_mut().iter_mut().zip(g.flat()).for_each(|(p, g)| *p -= 0.05 * g);
        }
        let last = objective.loss(&p, None, &images, key).unwrap();
        assert!(last < first, "{last} after {first}");
        let picture = objective.reconstruct(&p, &images, key).unwrap();
        assert_eq!((picture.hidden.shape(), picture.predicted.shape()), (images.shape(), images.shape()));
        let share = picture.hidden.data().iter().sum::<f32>() / images.data().len() as f32;
        assert!((f64::from(share) - ratio).abs() < 1e-6, "{share} hidden");
        assert!(picture.predicted.data().iter().all(|x| x.is_finite()));
        let rows = objective.features(&p, &images).unwrap();
        assert!(*rows.shape() == [3, features] && rows.data().iter().all(|x| x.is_finite()));
        assert!(objective.loss(&p, None, &Tensor::zeros([1, chans, side + 1, side]), key).is_err());
    }
}
