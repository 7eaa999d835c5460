//! `karat pretrain`: masked image modeling.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde_json::{Map, Value, json};

use super::progress::Progress;
use super::{Outcome, new_run, objective, picture, say, write_config};
use crate::data::{Dataset, Loader, LoaderOptions, Split};
use crate::fs::write_atomic;
use crate::mim::{MaskedModel, methods};
use crate::nn::StepKey;
use crate::tensor::{Tensor, pool};
use crate::train::{CHECKPOINT, Checkpoint, METRICS, STATE, SUMMARY, TrainConfig, Trainer, read_metrics, saved_config};
use crate::{Error, Result};

/// Pre-train a network by masked image modeling
///
/// With no arguments: GreenMIM with a small Swin on the built-in images. Writes configuration, metrics, loss curve, reconstructions,
/// parameters and the trainer's state into one folder. A run that was killed goes on with --resume and ends in the same bits.
#[derive(Args)]
#[command(after_help = "Example: karat pretrain --method simmim --epochs 50 --out runs/mine")]
pub struct Pretrain {
    /// The objective (`karat list methods`) [default: greenmim]
    #[arg(long, value_name = "NAME")]
    method: Option<String>,
    /// The network (`karat list methods`) [default: a small one that the method serves]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Read the configuration from this file, such as a run's config.toml or one of reference/recipes; options override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The folder of an image tokenizer, for a method that predicts its codes (`karat tokenizer train`)
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<String>,
    /// A folder of images, IDX or CIFAR files [default: built-in Fashion-MNIST subset]
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// Side of the images in pixels [default: the network's]
    #[arg(long, value_name = "N")]
    image_size: Option<usize>,
    /// Passes over the images [default: 20]
    #[arg(long, value_name = "N", conflicts_with = "steps")]
    epochs: Option<u64>,
    /// Optimizer steps
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Images per step [default: 64, or all if there are fewer]
    #[arg(long, value_name = "B")]
    batch: Option<usize>,
    /// Fraction of the patches that is hidden [default: the method's]
    #[arg(long, value_name = "R")]
    mask_ratio: Option<f64>,
    /// The largest learning rate [default: 0.001]
    #[arg(long, value_name = "X")]
    lr: Option<f64>,
    /// Seed of everything random [default: 0]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Steps between two saves [default: one epoch]
    #[arg(long, value_name = "N")]
    save_every: Option<u64>,
    /// Leave out images that cannot be read, instead of failing
    #[arg(long)]
    skip_bad: bool,
    /// The folder to write [default: runs/METHOD-MODEL]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with the run in this folder, with its configuration
    #[arg(long, value_name = "DIR", conflicts_with_all = [
        "method", "model", "config", "tokenizer", "data", "image_size", "epochs", "steps", "batch", "mask_ratio", "lr", "seed", "save_every", "skip_bad", "out",
    ])]
    resume: Option<PathBuf>,
}

impl Pretrain {
    /// The options that were given, as keys of the configuration.
    fn options(&self) -> Map<String, Value> {
        let given: [(&str, Option<Value>); 12] = [
            ("method", self.method.clone().map(Value::from)),
            ("model", self.model.clone().map(Value::from)),
            ("tokenizer", self.tokenizer.clone().map(Value::from)),
            ("data", self.data.clone().map(Value::from)),
            ("image_size", self.image_size.map(Value::from)),
            ("epochs", self.epochs.map(Value::from)),
            ("steps", self.steps.map(Value::from)),
            ("batch", self.batch.map(Value::from)),
            ("mask_ratio", self.mask_ratio.map(Value::from)),
            ("lr", self.lr.map(Value::from)),
            ("seed", self.seed.map(Value::from)),
            ("save_every", self.save_every.map(Value::from)),
        ];
        let mut options: Map<String, Value> = given.into_iter().filter_map(|(key, value)| Some((key.into(), value?))).collect();
        if self.skip_bad {
            options.insert("skip_bad".into(), true.into());
        }
        options
    }

    /// What the options say, then the file, then the defaults: a network's own image size, and a method's own small network.
    fn config(&self) -> Result<TrainConfig> {
        let mut given = Map::new();
        if let Some(path) = &self.config {
            let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
            given = toml::from_str(&text).map_err(|e| Error::format(path, e.to_string().trim().replace('\n', " ")))?;
            complete(given.clone()).map_err(|e| Error::format(path, e.to_string()))?;
        }
        let options = self.options();
        // Who asks for another method or network than the file's wants that one's defaults.
        let replaces = |key: &str| options.get(key).is_some_and(|value| given.get(key) != Some(value));
        let (method, model) = (replaces("method"), replaces("model"));
        if method {
            ["model", "mask_ratio", "tokenizer"].iter().for_each(|key| drop(given.remove(*key)));
        }
        if method || model {
            given.remove("image_size");
        }
        if options.contains_key("epochs") || options.contains_key("steps") {
            given.remove("epochs");
            given.remove("steps");
        }
        given.extend(options);
        complete(given)
    }

    /// Runs the command; what it has to say goes to `out`, progress to standard error.
    ///
    /// # Errors
    /// Bad options, unreadable data, a folder that already holds a run, a damaged state.
    pub(super) fn run(self, out: &mut dyn Write) -> Result<Outcome> {
        let (mut config, folder, state) = match &self.resume {
            Some(folder) => {
                let state = Checkpoint::open(folder.join(STATE))?;
                (saved_config(&state)?, folder.clone(), Some(state))
            }
            None => {
                let config = self.config()?;
                let folder = self.out.clone().unwrap_or_else(|| Path::new("runs").join(format!("{}-{}", config.method, config.model)));
                new_run(&folder)?;
                (config, folder, None)
            }
        };
        let objective = objective(&config)?;
        let (data, skipped) = config.open_data(Split::Train)?;
        for (_, error) in &skipped.files {
            eprintln!("karat: left out: {error}");
        }
        // A few photos are a smaller batch than the default one.
        if state.is_none() && self.batch.is_none() && self.config.is_none() {
            config.batch = config.batch.min(data.len().max(1));
        }
        let mut trainer = match &state {
            Some(state) => Trainer::resume(&*objective, &data, state)?,
            None => Trainer::new(&*objective, &data, config)?,
        };
        // The state is in memory now; its file is about to be replaced.
        drop(state);
        train(&mut trainer, &*objective, &data, &folder, out)?;
        Ok(Outcome::Good)
    }
}

/// The configuration of the keys in `given`, the others by default.
fn complete(mut given: Map<String, Value>) -> Result<TrainConfig> {
    let Value::Object(mut object) = TrainConfig::default().to_json() else { unreachable!("a configuration is an object") };
    let text = |given: &Map<String, Value>, key: &str| given.get(key).and_then(Value::as_str).map(String::from);
    if let Some(name) = text(&given, "method").or_else(|| text(&object, "method")) {
        let method = methods::find(&name)?;
        let network = text(&given, "model").map_or(Ok(method.default_network()), |model| method.network(&model))?;
        object.insert("model".into(), network.name.into());
        object.insert("image_size".into(), network.size.into());
    }
    if given.contains_key("epochs") || given.contains_key("steps") {
        object.remove("epochs");
    }
    if let (Some(lr), None, Some(min)) =
        (given.get("lr").and_then(Value::as_f64), given.get("min_lr"), object.get("min_lr").and_then(Value::as_f64))
    {
        object.insert("min_lr".into(), min.min(lr).into());
    }
    object.append(&mut given);
    TrainConfig::from_json(&Value::Object(object).to_string())
}

fn train(trainer: &mut Trainer, objective: &dyn MaskedModel, data: &Dataset, folder: &Path, out: &mut dyn Write) -> Result<()> {
    let config = trainer.config().clone();
    let (done, steps) = trainer.progress();
    // Read before the hours of training, not after.
    let pictured = pictured(&config, objective.image_shape())?;
    write_config(folder, &config)?;
    say(
        out,
        format!(
            "{} with {}, {} parameters, on {} ({} images); steps {done} to {steps} of {} images; {} threads",
            config.method,
            config.model,
            objective.layout().numel(),
            data.name(),
            data.len(),
            config.batch,
            rayon::current_num_threads()
        ),
    )?;
    let started = Instant::now();
    let mut progress = Progress::new(done, steps);
    let result = trainer.run(folder, &mut |report| progress.step(report));
    progress.finish();
    result?;

    let summary = json!({ "parameters": objective.layout().numel(), "peak_bytes": pool::stats().peak_bytes });
    write_atomic(folder.join(SUMMARY), format!("{summary}\n").as_bytes())?;
    let losses = read_metrics(&folder.join(METRICS))?;
    picture::loss_curve(&folder.join("loss.svg"), &losses, &format!("{} with {}: loss", config.method, config.model))?;
    let key = StepKey { seed: config.seed, step: 0 };
    picture::reconstructions(&folder.join("reconstruction.png"), objective, trainer.params(), &pictured, key, config.normalization())?;
    let last = losses.last().map_or(f64::NAN, |l| l.1);
    say(
        out,
        format!(
            "loss {last:.4} after {steps} steps, {:.1} s; wrote {}",
            started.elapsed().as_secs_f64(),
            folder.join(CHECKPOINT).display()
        ),
    )
}

/// The first eight test images.
pub(super) fn pictured(config: &TrainConfig, (size, channels): (usize, usize)) -> Result<Tensor<f32>> {
    let (test, _) = config.open_data(Split::Test)?;
    let batch = test.len().min(8);
    let options = LoaderOptions { batch, seed: config.seed, shuffle: false, drop_last: false };
    let loader = Loader::new(&test, config.test_transform((size, channels))?, options)?;
    Tensor::new([batch, channels, size, size], &loader.epoch(0).batch(0)?.images)
}
