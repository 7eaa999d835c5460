//! The accuracy of a classifier on held-out images.

use super::classification::Classification;
use crate::data::{Dataset, Loader, LoaderOptions, Transform};
use crate::model::accuracy::rank;
use crate::nn::Params;
use crate::tensor::Tensor;
use crate::{Error, Result};

const BATCH: usize = 64;

/// How many images were classified right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accuracy {
    /// Images whose class has the largest logit.
    pub top1: u64,
    /// Images whose class is among the five largest.
    pub top5: u64,
    /// All images.
    pub images: u64,
}

impl Accuracy {
    /// The fractions of right answers, first and among five.
    pub fn fractions(&self) -> (f64, f64) {
        let all = self.images.max(1) as f64;
        (self.top1 as f64 / all, self.top5 as f64 / all)
    }

    /// Counts one image.
    fn count(&mut self, logits: &[f32], label: usize) {
        self.images += 1;
        let rank = rank(logits, label);
        self.top1 += u64::from(rank == Some(0));
        self.top5 += u64::from(rank.is_some_and(|rank| rank < 5));
    }
}

/// What a classifier is measured on.
pub struct Evaluation<'a> {
    classification: &'a Classification,
    loader: Loader<'a>,
}

impl<'a> Evaluation<'a> {
    /// `classification` on the images of `data`, prepared by `transform`.
    ///
    /// # Errors
    /// If the transform gives images of another shape, or a label has no logit.
    pub fn new(classification: &'a Classification, data: &'a Dataset, transform: Transform) -> Result<Self> {
        let (expected, found) = (crate::nn::Objective::image_shape(classification), (transform.size(), transform.channels()));
        if expected != found {
            return Err(Error::shape("test images", expected, found));
        }
        if let Some(label) = (0..data.len()).map(|i| data.label(i)).find(|&label| label >= classification.classes()) {
            return Err(Error::value("test label", format!("{label}, expected less than {}", classification.classes())));
        }
        let loader = Loader::new(data, transform, LoaderOptions { batch: BATCH, seed: 0, shuffle: false, drop_last: false })?;
        Ok(Evaluation { classification, loader })
    }

    /// The accuracy with `params`.
    ///
    /// # Errors
    /// If an image cannot be read.
    pub fn run(&self, params: &Params<f32>) -> Result<Accuracy> {
        let (c, s) = (self.loader.transform().channels(), self.loader.transform().size());
        let epoch = self.loader.epoch(0);
        let mut accuracy = Accuracy::default();
        for step in 0..epoch.steps() {
            let batch = epoch.batch(step)?;
            let images = Tensor::new([batch.labels.len(), c, s, s], &batch.images)?;
            let logits = self.classification.logits(params, &images)?;
            for (row, label) in logits.data().chunks_exact(self.classification.classes()).zip(batch.labels) {
                accuracy.count(row, label);
            }
        }
        Ok(accuracy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks() {
        let mut a = Accuracy::default();
        a.count(&[0.0, 3.0, 1.0], 1);
        a.count(&[2.0, 2.0, 1.0], 1);
        assert_eq!(a, Accuracy { top1: 1, top5: 2, images: 2 });
        a.count(&[1.0, 2.0, 3.0, 4.0, 5.0, 0.0], 5);
        a.count(&[f32::NAN, 2.0], 0);
        a.count(&[f32::NAN, 2.0], 1);
        assert_eq!(a, Accuracy { top1: 1, top5: 3, images: 5 });
        assert_eq!(a.fractions(), (0.2, 0.6));
    }
}
