//! Training a classifier: cross-entropy with smoothed and mixed labels, layer-wise learning rates, distillation.
//!
//! With K classes, smoothing ε and a mixed batch ([`Mixing`]): `t_i = (1 − ε)(λ e_{y_i} + (1 − λ) e_{y_{B−1−i}}) + ε/K`, and the loss of
//! logits z is `CE(z, t) = −1/B Σ_i Σ_k t_ik log softmax(z_i)_k`, whose gradient is `(softmax(z) − t)/B`. Several heads count equally.
//!
//! Distillation (Touvron et al., *DeiT*, arXiv 2012.12877) of a network with two heads z, z′ from a teacher's logits u on the same mixed
//! images: hard `½ CE(z, t) + ½ CE(z′, e_{argmax u})`; soft `½ CE(z, t) + ½ τ² KL(softmax(u/τ) ‖ softmax(z′/τ))`.

use std::collections::BTreeMap;
use std::sync::Arc;

use rayon::prelude::*;

use super::finetune::FineTune;
use super::layer_decay::layer_rates;
use super::mixing::Mixing;
use crate::data::transform::Normalization;
use crate::model::network::{Built, Network, mean_logits};
use crate::model::zoo::Model;
use crate::nn::{Batch, Entry, Layout, Loss, Objective, Params};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// A trained network whose predictions another one learns.
pub struct Teacher {
    network: Box<dyn Network>,
    params: Params<f32>,
    tau: Option<f64>,
    /// Factor and offset that turn the student's pixels into the teacher's, per channel.
    pixels: Option<[(f32, f32); 3]>,
}

impl Teacher {
    /// `built` with `params`, for a student whose pixels are normalised as `student`; τ for soft distillation.
    pub fn new(built: Built, params: Params<f32>, tau: Option<f64>, own: Normalization, student: Normalization) -> Self {
        let affine = |c: usize| (student.std[c] / own.std[c], (student.mean[c] - own.mean[c]) / own.std[c]);
        let pixels = (own != student).then(|| [0, 1, 2].map(affine));
        Teacher { network: built.network, params, tau, pixels }
    }

    fn logits(&self, images: &Tensor<f32>) -> Result<Tensor<f32>> {
        let Some(pixels) = self.pixels else { return mean_logits(&self.network.infer(&self.params, images)?) };
        let mut images = images.clone();
        let [_, c, h, w] = images.dims("images")?;
        images.data_mut().par_chunks_mut((h * w).max(1)).enumerate().for_each(|(plane, x)| {
            let (factor, offset) = pixels[(plane % c).min(2)];
            x.iter_mut().for_each(|x| *x = *x * factor + offset);
        });
        mean_logits(&self.network.infer(&self.params, &images)?)
    }
}

/// A classifier and its loss.
pub struct Classification {
    network: Box<dyn Network>,
    layout: Arc<Layout>,
    size: usize,
    classes: usize,
    mixing: Mixing,
    smoothing: f64,
    rates: BTreeMap<String, f64>,
    teacher: Option<Teacher>,
}

impl Classification {
    /// The network `model` ([`FineTune::model`]), trained as `config` says, but for the teacher.
    ///
    /// # Errors
    /// If there are no classes, or the architecture does not allow the image size.
    pub fn new(model: &Model, config: &FineTune) -> Result<Self> {
        let classes = config.class_names.len();
        if classes == 0 {
            return Err(Error::config("class_names", "a classifier needs at least one class"));
        }
        let Built { network, layout } = model.build()?;
        let rates = layer_rates(&layout, config.layer_decay);
        let mixing = Mixing { mixup: config.mixup, cutmix: config.cutmix };
        Ok(Classification { network, layout, size: model.size, classes, mixing, smoothing: config.smoothing, rates, teacher: None })
    }

    /// The same, taught by `teacher`.
    ///
    /// # Errors
    /// Unless the network has two heads and the teacher as many classes.
    pub fn taught_by(mut self, teacher: Teacher) -> Result<Self> {
        let image = Tensor::zeros([1, 3, self.size, self.size]);
        let heads = self.network.infer(&Params::init(&self.layout, 0), &image)?.len();
        if heads != 2 {
            let message =
                format!("expected a network with two heads, such as deit_micro_distilled, to learn from a teacher; found {heads}");
            return Err(Error::config("teacher", message));
        }
        let [_, classes] = teacher.logits(&image)?.dims("the teacher's logits")?;
        if classes != self.classes {
            return Err(Error::config("teacher", format!("expected a network with {} classes, found {classes}", self.classes)));
        }
        self.teacher = Some(teacher);
        Ok(self)
    }

    /// The number of classes.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// The prediction for `images`, `[B, classes]`: the mean of the heads' logits.
    ///
    /// # Errors
    /// If the images have another shape than the network takes.
    pub fn logits(&self, params: &Params<f32>, images: &Tensor<f32>) -> Result<Tensor<f32>> {
        mean_logits(&self.network.infer(params, images)?)
    }

    /// t `[B, K]` for a batch of which each image keeps the part `own`.
    ///
    /// # Errors
    /// If a label is not below the number of classes.
    pub fn targets(&self, labels: &[usize], own: f64) -> Result<Vec<f64>> {
        let k = self.classes;
        if let Some(label) = labels.iter().find(|label| **label >= k) {
            return Err(Error::value("label", format!("{label}, expected less than {k}")));
        }
        let mut t = vec![self.smoothing / k as f64; labels.len() * k];
        for (i, row) in t.chunks_exact_mut(k).enumerate() {
            row[labels[i]] += (1.0 - self.smoothing) * own;
            row[labels[labels.len() - 1 - i]] += (1.0 - self.smoothing) * (1.0 - own);
        }
        Ok(t)
    }

    /// What the head for distillation learns from the teacher's logits: targets, τ, and their entropy.
    fn lesson(&self, teacher: &Teacher, images: &Tensor<f32>) -> Result<(Vec<f64>, f64, f64)> {
        let logits = teacher.logits(images)?;
        let rows = logits.data().chunks_exact(self.classes);
        let Some(tau) = teacher.tau else {
            let mut t = vec![0.0; logits.data().len()];
            for (row, t) in rows.zip(t.chunks_exact_mut(self.classes)) {
                t[(1..row.len()).fold(0, |best, k| if row[k] > row[best] { k } else { best })] = 1.0;
            }
            return Ok((t, 1.0, 0.0));
        };
        let logs: Vec<f64> = rows.flat_map(|row| log_softmax(row, tau)).collect();
        let t: Vec<f64> = logs.iter().map(|l| libm::exp(*l)).collect();
        let entropy = -t.iter().zip(&logs).map(|(t, l)| t * l).sum::<f64>() / logits.shape()[0] as f64;
        Ok((t, tau, entropy))
    }
}

impl Objective for Classification {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn image_shape(&self) -> (usize, usize) {
        (self.size, 3)
    }

    fn loss(&self, params: &Params<f32>, grads: Option<&mut Params<f32>>, batch: Batch) -> Result<Loss> {
        let [b, ..] = batch.images.dims::<4>("images")?;
        if batch.labels.len() != b {
            return Err(Error::shape("labels", [b], [batch.labels.len()]));
        }
        let mix = self.mixing.draw(self.size, batch.key);
        let targets = self.targets(batch.labels, mix.own())?;
        let mixed = mix.apply(batch.images)?;
        let images = mixed.as_ref().unwrap_or(batch.images);
        let lesson = self.teacher.as_ref().map(|teacher| self.lesson(teacher, images)).transpose()?;
        let mut value = 0.0;
        let mut judge = |logits: &[Tensor<f32>]| -> Result<Vec<Tensor<f32>>> {
            value = 0.0;
            let share = 1.0 / logits.len() as f64;
            let judged = logits.iter().enumerate().map(|(head, z)| {
                let (t, tau, entropy) = match &lesson {
                    Some((t, tau, entropy)) if head == 1 => (t, *tau, *entropy),
                    _ => (&targets, 1.0, 0.0),
                };
                let (loss, d) = cross_entropy(z, t, tau, share)?;
                value += loss - share * tau * tau * entropy;
                Ok(d)
            });
            judged.collect()
        };
        let updates = match grads {
            Some(grads) => self.network.learn(params, grads, images, &mut judge)?,
            None => {
                judge(&self.network.infer(params, images)?)?;
                Vec::new()
            }
        };
        Ok(Loss { value: value as f32, updates })
    }

    fn rate(&self, entry: &Entry) -> f64 {
        self.rates.get(&entry.name).copied().unwrap_or(1.0)
    }
}

/// `w τ² CE(z/τ, t)` of logits z and targets t, both `[B, K]`, and its gradient by z: `w τ (softmax(z/τ) − t)/B`.
fn cross_entropy(z: &Tensor<f32>, t: &[f64], tau: f64, weight: f64) -> Result<(f64, Tensor<f32>)> {
    let [b, k] = z.dims("logits")?;
    if b * k != t.len() {
        return Err(Error::shape("logits", [b, t.len() / b.max(1)], [b, k]));
    }
    let scale = weight / b as f64;
    let mut d = Tensor::zeros([b, k]);
    let mut losses = vec![0.0; b];
    let rows = d.data_mut().par_chunks_mut(k.max(1)).zip(&mut losses);
    rows.zip(z.data().par_chunks(k.max(1)).zip(t.par_chunks(k.max(1)))).for_each(|((d, loss), (z, t))| {
        for (d, (log, t)) in d.iter_mut().zip(log_softmax(z, tau).into_iter().zip(t)) {
            *loss -= t * log;
            *d = (scale * tau * (libm::exp(log) - t)) as f32;
        }
    });
    Ok((scale * tau * tau * losses.iter().sum::<f64>(), d))
}

fn log_softmax(z: &[f32], tau: f64) -> Vec<f64> {
    let max = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shifted: Vec<f64> = z.iter().map(|z| (f64::from(*z) - f64::from(max)) / tau).collect();
    let log = libm::log(shifted.iter().map(|z| libm::exp(*z)).sum());
    shifted.into_iter().map(|z| z - log).collect()
}
