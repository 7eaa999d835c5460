//! The configuration of a training run.

use std::path::Path;

use serde_json::{Value, json};

use super::finetune::{CLASSIFICATION, FineTune};
use super::schedule::Schedule;
use crate::case::Config;
use crate::data::augment::ColorJitter;
use crate::data::transform::Normalization;
use crate::data::{Dataset, OpenOptions, Skipped, Split, Transform};
use crate::{Error, Result};

/// What [`TrainConfig::data`] says for the images inside the program.
pub const BUILTIN: &str = "builtin";

/// How long to train.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// So many passes over the data.
    Epochs(u64),
    /// So many optimizer steps.
    Steps(u64),
}

/// Everything that a training run depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainConfig {
    /// The objective, by name.
    pub method: String,
    /// The network, by name.
    pub model: String,
    /// Side of the images in pixels, as the network sees them.
    pub image_size: usize,
    /// A folder of images, or [`BUILTIN`].
    pub data: String,
    /// Leave out images that cannot be read.
    pub skip_bad: bool,
    /// How long to train.
    pub length: Length,
    /// Images per step.
    pub batch: usize,
    /// Fraction of the patches that is hidden, or what the method's authors chose.
    pub mask_ratio: Option<f64>,
    /// The largest learning rate.
    pub lr: f64,
    /// The learning rate at the end.
    pub min_lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// β₁ and β₂ of AdamW.
    pub betas: (f64, f64),
    /// Fraction of all steps in which the learning rate rises.
    pub warmup: f64,
    /// The largest norm of the gradient; 0 for no clipping.
    pub clip: f64,
    /// The smallest fraction of an image's area that a training crop shows.
    pub crop: f64,
    /// Brightness, contrast and saturation change by factors of up to 1 ± this in training; 0 for no change.
    pub jitter: f64,
    /// Fractions of all steps at which the learning rate falls to a tenth, ascending; none for a cosine.
    pub milestones: Vec<f64>,
    /// Probability that the branches of the last block are dropped in pre-training (fine-tuning has its own: [`FineTune::drop_path`]).
    pub drop_path: f64,
    /// Seed of initialisation, order, augmentation and masks.
    pub seed: u64,
    /// Steps between two saves; 0 for one save per epoch.
    pub save_every: u64,
    /// The settings of fine-tuning; none for pre-training.
    pub finetune: Option<FineTune>,
    /// The folder of the image tokenizer whose codes are predicted, for methods that do so.
    pub tokenizer: Option<String>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            method: "greenmim".into(),
            model: "swin_micro".into(),
            image_size: 32,
            data: BUILTIN.into(),
            skip_bad: false,
            length: Length::Epochs(20),
            batch: 64,
            mask_ratio: None,
            lr: 1e-3,
            min_lr: 1e-6,
            weight_decay: 0.05,
            betas: (0.9, 0.95),
            warmup: 0.1,
            clip: 5.0,
            crop: 0.5,
            jitter: 0.0,
            milestones: Vec::new(),
            drop_path: 0.0,
            seed: 0,
            save_every: 0,
            finetune: None,
            tokenizer: None,
        }
    }
}

impl TrainConfig {
    /// The defaults of fine-tuning.
    pub fn classification() -> Self {
        TrainConfig {
            method: CLASSIFICATION.into(),
            model: "xcit_micro".into(),
            length: Length::Epochs(12),
            betas: (0.9, 0.999),
            // Half an image teaches a pre-training; a label needs more of it, in as few epochs.
            crop: 0.8,
            finetune: Some(FineTune::default()),
            ..TrainConfig::default()
        }
    }

    /// The configuration as a JSON object.
    pub fn to_json(&self) -> Value {
        let (key, n) = match self.length {
            Length::Epochs(n) => ("epochs", n),
            Length::Steps(n) => ("steps", n),
        };
        let mut object = json!({
            "method": self.method, "model": self.model, "image_size": self.image_size, "data": self.data, "skip_bad": self.skip_bad,
            "batch": self.batch, "lr": self.lr, "min_lr": self.min_lr, "weight_decay": self.weight_decay,
            "betas": [self.betas.0, self.betas.1], "warmup": self.warmup, "clip": self.clip, "crop": self.crop,
            "seed": self.seed, "save_every": self.save_every, "jitter": self.jitter, "milestones": self.milestones,
        });
        object[key] = n.into();
        if let Some(ratio) = self.mask_ratio {
            object["mask_ratio"] = ratio.into();
        }
        if self.finetune.is_none() {
            object["drop_path"] = self.drop_path.into();
        }
        if let (Some(finetune), Value::Object(map)) = (&self.finetune, &mut object) {
            finetune.write(map);
        }
        if let Some(folder) = &self.tokenizer {
            object["tokenizer"] = folder.as_str().into();
        }
        object
    }

    /// Reads a TOML file such as a run's `config.toml`; `self` has what it does not say.
    ///
    /// # Errors
    /// If it cannot be read or is no TOML; as [`TrainConfig::from_json`].
    #[cfg(feature = "cli")]
    pub fn updated_from(&self, path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let wrong = |message: String| Error::format(path, message.replace('\n', " ").trim_end().to_string());
        let file: serde_json::Map<String, Value> = toml::from_str(&text).map_err(|e| wrong(format!("not TOML: {e}")))?;
        if let Some(method) = file.get("method").and_then(Value::as_str)
            && (method == CLASSIFICATION) != self.finetune.is_some()
        {
            return Err(wrong(format!("configuration key `method`: {method} is for another command")));
        }
        let mut all = self.to_json();
        let length = ["epochs", "steps"];
        if let Value::Object(map) = &mut all {
            if length.iter().any(|key| file.contains_key(*key)) {
                map.retain(|key, _| !length.contains(&key.as_str()));
            }
            map.extend(file);
        }
        Self::from_json(&all.to_string()).map_err(|e| wrong(e.to_string()))
    }

    /// Reads what [`TrainConfig::to_json`] wrote.
    ///
    /// # Errors
    /// One that names the key which is missing, unknown, or has a value that cannot be served.
    pub fn from_json(text: &str) -> Result<Self> {
        let c = Config::parse(text)?;
        let uint = |key: &str| c.usize(key).map(|n| n as u64);
        let length = match (c.get("epochs"), c.get("steps")) {
            (Some(_), None) => Length::Epochs(uint("epochs")?),
            (None, Some(_)) => Length::Steps(uint("steps")?),
            _ => return Err(Error::config("epochs", "expected either `epochs` or `steps`")),
        };
        let betas = c.f64s("betas")?;
        let &[beta1, beta2] = &betas[..] else {
            return Err(Error::config("betas", format!("expected two numbers, found {}", betas.len())));
        };
        let config = TrainConfig {
            method: c.str("method")?.into(),
            model: c.str("model")?.into(),
            image_size: c.positive("image_size")?,
            data: c.str("data")?.into(),
            skip_bad: c.bool("skip_bad")?,
            length,
            batch: c.positive("batch")?,
            mask_ratio: c.get("mask_ratio").map(|_| c.f64("mask_ratio")).transpose()?,
            lr: c.f64("lr")?,
            min_lr: c.f64("min_lr")?,
            weight_decay: c.f64("weight_decay")?,
            betas: (beta1, beta2),
            warmup: c.f64("warmup")?,
            clip: c.f64("clip")?,
            crop: c.f64("crop")?,
            // Runs of earlier versions don't have these.
            jitter: c.f64_or("jitter", 0.0)?,
            milestones: if c.get("milestones").is_some() { c.f64s("milestones")? } else { Vec::new() },
            drop_path: if c.str("method")? == CLASSIFICATION { 0.0 } else { c.f64_or("drop_path", 0.0)? },
            seed: uint("seed")?,
            save_every: uint("save_every")?,
            finetune: if c.str("method")? == CLASSIFICATION { Some(FineTune::read(&c)?) } else { None },
            tokenizer: c.get("tokenizer").map(|_| c.str("tokenizer").map(String::from)).transpose()?,
        };
        let known = config.to_json();
        if let Some(key) = c.keys().find(|key| known.get(key).is_none()) {
            return Err(Error::config(key, "unknown key"));
        }
        config.checked()
    }

    /// The configuration with its values checked, and its real numbers rounded to 15 digits: so many survive JSON exactly, and
    /// a resumed run must compute with the very same numbers.
    ///
    /// # Errors
    /// One that names the key.
    pub fn checked(mut self) -> Result<Self> {
        let at_least_0 = |key: &str, x: f64| range(key, x, x >= 0.0, "a finite number, at least 0");
        let below_1 = |key: &str, x: f64| range(key, x, (0.0..1.0).contains(&x), "at least 0, less than 1");
        self.lr = at_least_0("lr", self.lr)?;
        self.min_lr = range("min_lr", self.min_lr, (0.0..=self.lr).contains(&self.min_lr), "0 to the learning rate")?;
        self.weight_decay = at_least_0("weight_decay", self.weight_decay)?;
        self.betas = (below_1("betas", self.betas.0)?, below_1("betas", self.betas.1)?);
        self.warmup = below_1("warmup", self.warmup)?;
        self.clip = at_least_0("clip", self.clip)?;
        self.crop = range("crop", self.crop, self.crop > 0.0 && self.crop <= 1.0, "more than 0, at most 1")?;
        self.jitter = range("jitter", self.jitter, (0.0..=1.0).contains(&self.jitter), "0 to 1")?;
        self.drop_path = below_1("drop_path", self.drop_path)?;
        let mut last = 0.0;
        for milestone in &mut self.milestones {
            let ok = *milestone > last && *milestone < 1.0;
            *milestone = range("milestones", *milestone, ok, "ascending fractions of the run, more than 0 and less than 1")?;
            last = *milestone;
        }
        if let Some(ratio) = self.mask_ratio {
            self.mask_ratio = Some(range("mask_ratio", ratio, (0.0..=1.0).contains(&ratio), "0 to 1")?);
        }
        self.finetune = self.finetune.map(FineTune::checked).transpose()?;
        // TOML and many readers of JSON have signed or floating-point integers only.
        if self.seed > 1 << 53 {
            return Err(Error::config("seed", format!("{}, expected at most 2^53", self.seed)));
        }
        match self.length {
            Length::Epochs(1..=1_000_000) | Length::Steps(1..=1_000_000_000) => Ok(self),
            Length::Epochs(n) => Err(Error::config("epochs", format!("{n}, expected 1 to 1000000"))),
            Length::Steps(n) => Err(Error::config("steps", format!("{n}, expected 1 to 1000000000"))),
        }
    }

    /// All optimizer steps, if an epoch has `per_epoch`.
    pub fn steps(&self, per_epoch: u64) -> u64 {
        match self.length {
            Length::Epochs(n) => n * per_epoch,
            Length::Steps(n) => n,
        }
    }

    /// The learning rates of a run of `steps` steps.
    pub fn schedule(&self, steps: u64) -> Schedule {
        let at = |fraction: f64| (fraction * steps as f64) as u64;
        let milestones = self.milestones.iter().map(|&fraction| at(fraction)).collect();
        Schedule { peak: self.lr, floor: self.min_lr, warmup: at(self.warmup), steps, milestones }
    }

    /// Opens the images.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn open_data(&self, split: Split) -> Result<(Dataset, Skipped)> {
        if self.data == BUILTIN {
            return Ok((Dataset::builtin(split)?, Skipped::default()));
        }
        Dataset::open(Path::new(&self.data), OpenOptions { split, skip_bad: self.skip_bad })
    }

    /// Opens the images for training and for test, and what was left out of them.
    ///
    /// # Errors
    /// As [`Dataset::open`], or if the two have different classes.
    pub fn open_both(&self) -> Result<([Dataset; 2], Vec<Skipped>)> {
        let (train, skipped) = self.open_data(Split::Train)?;
        let (test, skipped_test) = self.open_data(Split::Test)?;
        if train.class_names() != test.class_names() {
            return Err(Error::value("data", "training and test images have different classes"));
        }
        Ok(([train, test], vec![skipped, skipped_test]))
    }

    /// How pixels become the network's input.
    pub fn normalization(&self) -> Normalization {
        match &self.finetune {
            Some(finetune) => finetune.normalization,
            None if self.data == BUILTIN => Normalization::FASHION_MNIST,
            None => Normalization::IMAGENET,
        }
    }

    /// Jitter of colours, random resized crop and flip, to images of side `size` and `channels` with `normalization`. The random choices
    /// depend neither on the size nor on the normalisation.
    ///
    /// # Errors
    /// As [`Transform::new`].
    pub fn view(&self, (size, channels): (usize, usize), normalization: Normalization) -> Result<Transform> {
        let jitter = (self.jitter > 0.0).then(|| ColorJitter::new(self.jitter)).transpose()?;
        Ok(Transform::training(size, channels, (self.crop, 1.0), normalization)?.jittered(jitter))
    }

    /// The view that a network is trained on; in fine-tuning with its augmentation.
    ///
    /// # Errors
    /// As [`Transform::new`].
    pub fn training_transform(&self, shape: (usize, usize)) -> Result<Transform> {
        let transform = self.view(shape, self.normalization())?;
        let (augment, erasing) = self.finetune.as_ref().map_or(Ok((None, None)), FineTune::augmentation)?;
        Ok(transform.augmented(augment, erasing))
    }

    /// The whole image (its centre square), to images of side `size` and `channels`.
    ///
    /// # Errors
    /// As [`Transform::new`].
    pub fn test_transform(&self, (size, channels): (usize, usize)) -> Result<Transform> {
        Transform::evaluation(size, channels, size, self.normalization())
    }
}

/// `x` rounded to 15 digits if it is `ok`, else an error that names the key.
pub(super) fn range(key: &str, x: f64, ok: bool, expected: &str) -> Result<f64> {
    match ok && x.is_finite() {
        true => Ok(format!("{x:.14e}").parse::<f64>().unwrap_or(x)),
        false => Err(Error::config(key, format!("{x}, expected {expected}"))),
    }
}
