//! A network with its weights, its evaluation transform and the names of its classes: all that prediction needs.

use std::path::Path;

use rayon::prelude::*;
use serde_json::Value;

use super::network::{Network, mean_logits};
use super::weights::{self, Loaded};
use super::zoo::{Eval, Model};
use crate::case::Config;
use crate::data::transform::Normalization;
use crate::data::{Image, Transform, imagenet};
use crate::error::{Error, Result};
use crate::nn::{Checkpoint, Named, Params, Watch};
use crate::tensor::Tensor;
use crate::tensor::random::{Purpose, Rng};

/// The parameters in the folder of a run.
const CHECKPOINT: &str = "checkpoint.safetensors";

/// What a fine-tuning run says of itself, in the metadata `config` of its checkpoint.
pub struct RunConfig {
    /// The network (`model`).
    pub model: String,
    /// Side of its images (`image_size`), unless it is the published one.
    pub image_size: Option<usize>,
    /// Its classes (`class_names`), in the order of the logits.
    pub class_names: Vec<String>,
    /// The images it was trained on (`data`).
    pub data: Option<String>,
    /// How pixels become its input (`mean` and `std`), unless as published.
    pub normalization: Option<Normalization>,
    /// Keys of the network's configuration that differ from the published one's (`network`).
    pub network: Config,
}

impl RunConfig {
    /// Reads the configuration of a run's checkpoint; keys that prediction does not need are ignored.
    ///
    /// # Errors
    /// If there is none, or a key is missing or of the wrong type.
    pub fn read(file: &Checkpoint) -> Result<Self> {
        let text =
            file.meta("config").ok_or_else(|| file.error("no `config` in the metadata, expected the checkpoint of a fine-tuning run"))?;
        let config: Value = serde_json::from_str(text).map_err(|_| file.error("metadata `config` is no JSON"))?;
        let wrong = |key: &str, expected: &str| file.error(format!("configuration key `{key}`: expected {expected}"));
        let optional = |key: &str| config.get(key).filter(|value| !value.is_null());
        let Some(names) = optional("class_names") else {
            return Err(file.error("no `class_names` in its configuration: expected a fine-tuning run, whose network has a classifier"));
        };
        let strings = names.as_array().and_then(|list| list.iter().map(|name| name.as_str().map(String::from)).collect());
        let class_names: Vec<String> = strings.ok_or_else(|| wrong("class_names", "a list of strings"))?;
        if class_names.is_empty() {
            return Err(wrong("class_names", "at least one"));
        }
        let three = |key| -> Result<Option<[f32; 3]>> {
            let Some(value) = optional(key) else { return Ok(None) };
            let list: Option<Vec<f32>> = value.as_array().and_then(|list| list.iter().map(|x| x.as_f64().map(|x| x as f32)).collect());
            list.and_then(|list| list.try_into().ok()).map(Some).ok_or_else(|| wrong(key, "three numbers"))
        };
        let data = optional("data").and_then(Value::as_str).map(String::from);
        let normalization = match (three("mean")?, three("std")?) {
            (Some(mean), Some(std)) => Some(Normalization { mean, std }),
            _ => None,
        };
        let network = optional("network").map(|value| Config::parse(&value.to_string())).transpose();
        let network = network.map_err(|e| file.error(format!("configuration key `network`: {e}")))?.unwrap_or_default();
        Ok(RunConfig {
            model: optional("model").and_then(Value::as_str).ok_or_else(|| wrong("model", "the name of a network"))?.to_string(),
            image_size: optional("image_size")
                .map(|size| size.as_u64().map(|size| size as usize).ok_or_else(|| wrong("image_size", "a number of pixels")))
                .transpose()?,
            class_names,
            data,
            normalization,
            network,
        })
    }
}

/// A network that can be asked.
pub struct Trained {
    /// Which it is.
    pub model: Model,
    /// What loading its weights did beside copying.
    pub loaded: Loaded,
    /// The run it comes from, if karat trained it.
    pub run: Option<RunConfig>,
    network: Box<dyn Network>,
    params: Params<f32>,
    transform: Transform,
    classes: usize,
}

impl Trained {
    /// The network `name` of `classes` classes with the weights of `file`, for images of `size` pixels (as published, if not given). With
    /// `new_head` its classifier is not loaded, and it has no logits to offer.
    ///
    /// # Errors
    /// If there is no such network, it does not allow the size, or the file holds the weights of another one.
    pub fn published(name: &str, file: &Checkpoint, classes: usize, size: Option<usize>, new_head: bool) -> Result<Self> {
        let model = Model::named(name, classes, size)?;
        let eval = model.variant.eval.at(model.size);
        Self::load(model, eval, file, classes, new_head)
    }

    /// The network of a fine-tuning run: its folder, for the last checkpoint, or another checkpoint in it.
    ///
    /// # Errors
    /// As [`Trained::published`], or if there is no such run.
    pub fn from_run(run: &Path, size: Option<usize>, new_head: bool) -> Result<Self> {
        let file = if run.is_dir() { Checkpoint::open(run.join(CHECKPOINT)) } else { Checkpoint::open(run) }?;
        let run = RunConfig::read(&file)?;
        let classes = run.class_names.len();
        let mut model = Model::named(&run.model, classes, size.or(run.image_size)).map_err(|e| file.error(e.to_string()))?;
        model.set(&run.network);
        // Runs are evaluated on the whole centre square.
        let normalization = run.normalization.unwrap_or(model.variant.eval.normalization);
        let eval = Eval { size: model.size, crop: 1.0, normalization };
        Ok(Trained { run: Some(run), ..Self::load(model, eval, &file, classes, new_head)? })
    }

    fn load(model: Model, eval: Eval, file: &Checkpoint, classes: usize, new_head: bool) -> Result<Self> {
        let transform = eval.transform()?;
        let built = model.build()?;
        let mut params = Params::zeros(&built.layout);
        let loaded = weights::load(file, &model, &mut params, new_head)?;
        Ok(Trained { model, loaded, run: None, network: built.network, params: params.packing(), transform, classes })
    }

    /// The number of logits.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// How images are prepared.
    pub fn transform(&self) -> &Transform {
        &self.transform
    }

    /// What class `class` is called: as the run says, or ImageNet's name if there are 1000.
    pub fn class_name(&self, class: usize) -> Option<&str> {
        match &self.run {
            Some(run) => run.class_names.get(class).map(String::as_str),
            None if self.classes == imagenet::CLASSES => imagenet::names().nth(class),
            None => None,
        }
    }

    /// The class of each folder of a data set: by the run's names; by WordNet numbers if there are ImageNet's 1000 classes and every
    /// folder has one; else in order.
    ///
    /// # Errors
    /// If a name is not among the run's, or the numbers of classes differ.
    pub fn classes_of(&self, names: &[String]) -> Result<Vec<usize>> {
        if let Some(run) = &self.run {
            let find = |name: &String| {
                let known = run.class_names.iter().position(|known| known == name);
                known.ok_or_else(|| Error::value("data", format!("class `{name}` is not among the run's {} classes", self.classes)))
            };
            return names.iter().map(find).collect();
        }
        let imagenet: Option<Vec<usize>> = names.iter().map(|name| imagenet::class_of(name)).collect();
        match imagenet {
            Some(classes) if self.classes == imagenet::CLASSES => Ok(classes),
            _ if names.len() == self.classes => Ok((0..self.classes).collect()),
            _ => {
                let or = if self.classes == imagenet::CLASSES { ", or folders called by WordNet numbers such as n01440764" } else { "" };
                Err(Error::value("data", format!("{} classes, expected {} as the network has{or}", names.len(), self.classes)))
            }
        }
    }

    /// Loads and prepares `count` images in parallel: `[count, 3, S, S]`.
    ///
    /// # Errors
    /// That of the first image that cannot be loaded.
    pub fn prepare<'i>(&self, count: usize, load: impl Fn(usize) -> Result<Image<'i>> + Sync) -> Result<Tensor<f32>> {
        let size = self.transform.size();
        let mut images = Tensor::zeros([count, self.transform.channels(), size, size]);
        let work = images.data_mut().par_chunks_exact_mut(self.transform.len()).enumerate().map(|(index, out)| {
            // The centre rule draws nothing from the stream.
            self.transform.apply(&load(index)?, &mut Rng::new(0, Purpose::Augment, 0, 0), out)
        });
        // Which error is reported must not depend on the threads.
        work.find_map_first(Result::err).map_or(Ok(images), Err)
    }

    /// The logits `[B, classes]` of prepared images: the mean over the heads, if there are several.
    ///
    /// # Errors
    /// If the images have another shape, or a logit is not finite.
    pub fn logits(&self, images: &Tensor<f32>) -> Result<Tensor<f32>> {
        mean(&self.network.infer(&self.params, images)?)
    }

    /// `logits`, and what the network shows on its way: `pooled`, which the head sees, and its stages; each with the images along the
    /// first axis.
    ///
    /// # Errors
    /// As [`Trained::logits`].
    pub fn features(&self, images: &Tensor<f32>) -> Result<Vec<Named<f32>>> {
        let watch = Watch::default();
        let heads = self.network.infer(&self.params.watched(&watch), images)?;
        let mut features = vec![("logits".to_string(), mean(&heads)?)];
        features.extend(watch.take());
        Ok(features)
    }
}

/// The mean of the heads' logits.
fn mean(heads: &[Tensor<f32>]) -> Result<Tensor<f32>> {
    let logits = mean_logits(heads)?;
    if logits.data().iter().any(|x| !x.is_finite()) {
        return Err(Error::value("logits", "not all finite: expected weights of a trained network"));
    }
    Ok(logits)
}

/// `exp(zᵢ) / Σⱼ exp(zⱼ)`.
pub fn softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let terms: Vec<f64> = logits.iter().map(|&z| libm::exp(f64::from(z) - f64::from(max))).collect();
    let sum: f64 = terms.iter().sum();
    terms.into_iter().map(|x| x / sum).collect()
}

/// The classes of the `k` largest logits, from the largest; of equal ones the lower class comes first.
pub fn top(logits: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(k);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_averaged() {
        let head = |values: &[f32]| Tensor::new([1, 3], values).unwrap();
        assert_eq!(mean(&[head(&[1.0, -2.0, 8.0]), head(&[3.0, 0.0, -8.0])]).unwrap().data(), [2.0, -1.0, 0.0]);
        assert!(mean(&[head(&[1.0, f32::NAN, 0.0])]).unwrap_err().to_string().contains("finite"));
        assert!(mean(&[]).is_err() && mean(&[head(&[0.0; 3]), Tensor::zeros([1, 4])]).is_err());
    }

    #[test]
    fn probabilities_and_order() {
        let p = softmax(&[1000.0, 1000.0 + std::f32::consts::LN_2, -1000.0]);
        assert!((p[0] - 1.0 / 3.0).abs() < 1e-4 && (p[1] - 2.0 / 3.0).abs() < 1e-4 && p[2] < 1e-300, "{p:?}");
        assert_eq!(top(&[0.5, -1.0, 2.0, 0.5], 3), [2, 0, 3]);
        assert_eq!(top(&[0.5], 5), [0]);
    }
}
