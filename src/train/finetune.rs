//! What a run of `karat finetune` depends on beside what all runs do.

use serde_json::{Map, Value, json};

use super::config::range;
use crate::case::Config;
use crate::data::augment::{RandAugment, RandomErasing};
use crate::data::transform::Normalization;
use crate::model::zoo::Model;
use crate::{Error, Result};

/// What [`TrainConfig::method`](super::TrainConfig::method) says for a run that trains a classifier.
pub const CLASSIFICATION: &str = "classification";

/// A network that teaches another one (Touvron et al., *DeiT*, arXiv 2012.12877).
#[derive(Clone, Debug, PartialEq)]
pub struct TeacherConfig {
    /// The network, by name.
    pub model: String,
    /// Its weights.
    pub weights: String,
    /// τ of soft distillation; hard distillation if not given.
    pub tau: Option<f64>,
}

/// The settings of fine-tuning.
#[derive(Clone, Debug, PartialEq)]
pub struct FineTune {
    /// The classes, in the order of the logits.
    pub class_names: Vec<String>,
    /// Keys of the network's configuration that differ from the variant's.
    pub network: Config,
    /// How pixels become the network's input.
    pub normalization: Normalization,
    /// Train on the first images of each class only, so many in all; 0 for all.
    pub limit: usize,
    /// α of mixup; 0 for none.
    pub mixup: f64,
    /// α of cutmix; 0 for none.
    pub cutmix: f64,
    /// ε of label smoothing.
    pub smoothing: f64,
    /// Operations and magnitude of random augmentation.
    pub randaug: Option<(usize, f64)>,
    /// Probability of random erasing.
    pub erasing: f64,
    /// The learning rate of a layer over that of the layer after it.
    pub layer_decay: f64,
    /// Probability that the last block's branches are dropped; 0 for the variant's.
    pub drop_path: f64,
    /// Decay of the moving average of the parameters; 0 for none.
    pub ema: f64,
    /// Run blocks twice to save memory.
    pub recompute: bool,
    /// The teacher of a network with two heads.
    pub teacher: Option<TeacherConfig>,
}

impl Default for FineTune {
    fn default() -> Self {
        FineTune {
            class_names: Vec::new(),
            network: Config::default(),
            normalization: Normalization::FASHION_MNIST,
            limit: 0,
            mixup: 0.0,
            cutmix: 0.0,
            smoothing: 0.1,
            randaug: None,
            erasing: 0.0,
            layer_decay: 1.0,
            drop_path: 0.0,
            ema: 0.0,
            recompute: false,
            teacher: None,
        }
    }
}

impl FineTune {
    pub(super) fn write(&self, object: &mut Map<String, Value>) {
        // As short as an f32 can be written, and exact.
        let short = |x: f32| Value::from(x.to_string().parse::<f64>().unwrap_or(f64::from(x)));
        let mut set = |key: &str, value: Value| object.insert(key.into(), value);
        set("class_names", json!(self.class_names));
        set("mean", self.normalization.mean.map(short).to_vec().into());
        set("std", self.normalization.std.map(short).to_vec().into());
        set("limit", self.limit.into());
        for (key, value) in [
            ("mixup", self.mixup),
            ("cutmix", self.cutmix),
            ("smoothing", self.smoothing),
            ("erasing", self.erasing),
            ("layer_decay", self.layer_decay),
            ("drop_path", self.drop_path),
            ("ema", self.ema),
        ] {
            set(key, value.into());
        }
        set("recompute", self.recompute.into());
        if let Some((ops, magnitude)) = self.randaug {
            set("randaug", json!([ops as f64, magnitude]));
        }
        if self.network.keys().next().is_some() {
            set("network", serde_json::from_str(&self.network.to_json()).unwrap_or_default());
        }
        if let Some(teacher) = &self.teacher {
            set("teacher", teacher.model.clone().into());
            set("teacher_weights", teacher.weights.clone().into());
            if let Some(tau) = teacher.tau {
                set("tau", tau.into());
            }
        }
    }

    pub(super) fn read(c: &Config) -> Result<Self> {
        let names = c.get("class_names").and_then(Value::as_array).and_then(|list| list.iter().map(Value::as_str).collect());
        let names: Option<Vec<&str>> = names;
        let names = names.ok_or_else(|| Error::config("class_names", "expected a list of strings"))?;
        let three = |key: &str| match c.f64s(key)?[..] {
            [r, g, b] => Ok([r as f32, g as f32, b as f32]),
            ref other => Err(Error::config(key, format!("expected three numbers, found {}", other.len()))),
        };
        let randaug = match c.get("randaug") {
            None => None,
            Some(_) => match c.f64s("randaug")?[..] {
                [ops, magnitude] if ops.fract() == 0.0 && (0.0..1e6).contains(&ops) => Some((ops as usize, magnitude)),
                _ => return Err(Error::config("randaug", "expected the number of operations and their magnitude")),
            },
        };
        let network = c.get("network").map(|value| Config::parse(&value.to_string())).transpose()?.unwrap_or_default();
        let teacher = match c.get("teacher") {
            None => None,
            Some(_) => Some(TeacherConfig {
                model: c.str("teacher")?.into(),
                weights: c.str("teacher_weights")?.into(),
                tau: c.get("tau").map(|_| c.f64("tau")).transpose()?,
            }),
        };
        Ok(FineTune {
            class_names: names.into_iter().map(String::from).collect(),
            network,
            normalization: Normalization { mean: three("mean")?, std: three("std")? },
            limit: c.usize("limit")?,
            mixup: c.f64("mixup")?,
            cutmix: c.f64("cutmix")?,
            smoothing: c.f64("smoothing")?,
            randaug,
            erasing: c.f64("erasing")?,
            layer_decay: c.f64("layer_decay")?,
            drop_path: c.f64("drop_path")?,
            ema: c.f64("ema")?,
            recompute: c.bool("recompute")?,
            teacher,
        })
    }

    pub(super) fn checked(mut self) -> Result<Self> {
        for (key, alpha) in [("mixup", &mut self.mixup), ("cutmix", &mut self.cutmix)] {
            *alpha = range(key, *alpha, (0.0..=100.0).contains(alpha), "0 to 100")?;
        }
        for (key, x) in [("smoothing", &mut self.smoothing), ("drop_path", &mut self.drop_path), ("ema", &mut self.ema)] {
            *x = range(key, *x, (0.0..1.0).contains(x), "at least 0, less than 1")?;
        }
        let decay = self.layer_decay;
        self.layer_decay = range("layer_decay", decay, decay > 0.0 && decay <= 1.0, "more than 0, at most 1")?;
        self.erasing = range("erasing", self.erasing, (0.0..=1.0).contains(&self.erasing), "0 to 1")?;
        if let Some((ops, magnitude)) = self.randaug {
            RandAugment::new(ops, magnitude)?;
            self.randaug = Some((ops, range("randaug", magnitude, true, "a magnitude")?));
        }
        if let Some(TeacherConfig { tau: Some(tau), .. }) = &mut self.teacher {
            *tau = range("tau", *tau, *tau > 0.0, "more than 0")?;
        }
        Ok(self)
    }

    /// The network `name` as it is trained: with these classes and this drop path.
    ///
    /// # Errors
    /// As [`Model::named`].
    pub fn model(&self, name: &str, image_size: usize) -> Result<Model> {
        let mut model = Model::named(name, self.class_names.len(), Some(image_size))?;
        model.set(&self.network);
        if self.drop_path > 0.0 {
            model.config.set("drop_path_rate", self.drop_path);
        }
        Ok(model)
    }

    /// Random augmentation and erasing, as configured.
    ///
    /// # Errors
    /// If a value is out of range.
    pub fn augmentation(&self) -> Result<(Option<RandAugment>, Option<RandomErasing>)> {
        let augment = self.randaug.map(|(ops, magnitude)| RandAugment::new(ops, magnitude)).transpose()?;
        let erasing = (self.erasing > 0.0).then(|| RandomErasing::new(self.erasing)).transpose()?;
        Ok((augment, erasing))
    }
}
