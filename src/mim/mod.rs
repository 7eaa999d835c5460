//! Masked image modeling: masks, targets, one file per objective.

pub mod a2mim;
pub mod a2mim_loss;
pub mod a2mim_paint;
pub mod analysis;
pub mod beit;
pub mod beit_pretrain;
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

use crate::error::Result;
use crate::nn::{Objective, Params, StepKey};
use crate::tensor::Tensor;

/// A batch as the objective saw and predicted it, in normalised pixels `[B, C, H, W]`.
pub struct Reconstruction {
    /// 1 where a pixel was hidden, else 0: `[B, C, H, W]`.
    pub hidden: Tensor<f32>,
    /// The prediction for every pixel. Objectives that predict per-patch normalised pixels undo that with the patch's own mean
    /// and deviation, as their authors' visualisations do.
    pub predicted: Tensor<f32>,
}

/// A masked-image-modeling objective with its network: what the probe and the pictures need of it, beside its [`Objective`].
pub trait MaskedModel: Objective {
    /// The prediction for a batch, for pictures.
    fn reconstruct(&self, params: &Params<f32>, images: &Tensor<f32>, key: StepKey) -> Result<Reconstruction>;

    /// Frozen features of whole images for a linear probe: the encoder's normalised output averaged over tokens, `[B, F]`.
    fn features(&self, params: &Params<f32>, images: &Tensor<f32>) -> Result<Tensor<f32>>;
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::nn::Batch;
    use crate::tensor::random::{Purpose, Rng};

    /// What everything that takes an [`Objective`] relies on: the loss is a function of parameters, images and key; the hidden share is
    /// as configured; plain gradient descent with the gradients that it adds lowers it; features are one finite row per image.
    pub(crate) fn check_objective(objective: &impl MaskedModel, ratio: f64, features: usize) {
        let (side, chans) = objective.image_shape();
        let mut rng = Rng::new(7, Purpose::Case, 0, 0);
        let images = Tensor::<f32>::from_fn([3, chans, side, side], |_| rng.normal() as f32);
        let key = StepKey { seed: 11, step: 4 };
        let mut p = Params::init(objective.layout(), 1);
        let batch = Batch { images: &images, labels: &[], second: None, key };
        let loss = |p: &Params<f32>, batch| objective.loss(p, None, batch).unwrap().value;
        let first = loss(&p, batch);
        assert_eq!(first, loss(&p, batch));
        assert_ne!(first, loss(&p, Batch { key: StepKey { step: 5, ..key }, ..batch }));
        for _ in 0..20 {
            let mut g = Params::zeros(objective.layout());
            objective.loss(&p, Some(&mut g), batch).unwrap();
            p.flat_mut().iter_mut().zip(g.flat()).for_each(|(p, g)| *p -= 0.05 * g);
        }
        let last = loss(&p, batch);
        assert!(last < first, "{last} after {first}");
        let picture = objective.reconstruct(&p, &images, key).unwrap();
        assert_eq!((picture.hidden.shape(), picture.predicted.shape()), (images.shape(), images.shape()));
        let share = picture.hidden.data().iter().sum::<f32>() / images.data().len() as f32;
        assert!((f64::from(share) - ratio).abs() < 1e-6, "{share} hidden");
        assert!(picture.predicted.data().iter().all(|x| x.is_finite()));
        let rows = objective.features(&p, &images).unwrap();
        assert!(*rows.shape() == [3, features] && rows.data().iter().all(|x| x.is_finite()));
        assert!(objective.loss(&p, None, Batch { images: &Tensor::zeros([1, chans, side + 1, side]), ..batch }).is_err());
    }
}
