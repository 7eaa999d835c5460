//! The training loop.
//!
//! Step `s` is a function of the state after step `s − 1` and the configuration: batch, augmentation, masks and learning rate are
//! computed from (seed, epoch, step). So a run that was killed goes on from its last save and ends in the same bits.

use std::fs;
use std::path::Path;
use std::time::Instant;

use rayon::prelude::*;

use super::config::TrainConfig;
use super::evaluation::{Accuracy, Evaluation};
use super::gain::TRANSFER;
use super::metrics::{METRICS, Metrics, StepReport};
use super::optimizer::{Optimizer, clip};
use super::schedule::Schedule;
use crate::data::{Dataset, Loader, LoaderOptions};
use crate::fs::write_atomic;
use crate::nn::batch_norm::Updates;
use crate::nn::{Batch, Checkpoint, Loss, Objective, Params, Pass, StepKey, View, encode, items};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// The parameters of the last save: their moving average, if there is one.
pub const CHECKPOINT: &str = "checkpoint.safetensors";
/// The parameters that were most accurate on the test images.
pub const BEST: &str = "best.safetensors";
/// The trainer's state at the last save.
pub const STATE: &str = "state.safetensors";
/// What a run needed, written at its end.
pub const SUMMARY: &str = "summary.json";
/// What the linear probe made of a run.
pub const PROBE: &str = "probe.json";

/// What a run reports while it goes on.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A step was done.
    Step(&'a StepReport),
    /// The test images were classified after so many steps.
    Accuracy(u64, &'a Accuracy),
}

/// A training run.
pub struct Trainer<'a> {
    objective: &'a dyn Objective,
    config: TrainConfig,
    loader: Loader<'a>,
    schedule: Schedule,
    params: Params<f32>,
    grads: Params<f32>,
    optimizer: Optimizer,
    /// The moving average of the parameters.
    ema: Option<Params<f32>>,
    evaluation: Option<Evaluation<'a>>,
    /// The best accuracy so far.
    best: Accuracy,
    /// Steps done.
    step: u64,
    /// The epoch whose order is held, and the order.
    order: (Option<u64>, Vec<usize>),
    images: Tensor<f32>,
    labels: Vec<usize>,
    /// The same crops for the objective's second view.
    second: Option<(Loader<'a>, Tensor<f32>)>,
}

impl<'a> Trainer<'a> {
    /// A run from its beginning.
    ///
    /// # Errors
    /// If the configuration does not fit the data.
    pub fn new(objective: &'a dyn Objective, dataset: &'a Dataset, config: TrainConfig) -> Result<Self> {
        let config = config.checked()?;
        let (size, channels) = objective.image_shape();
        let transform = config.training_transform((size, channels))?;
        let options = LoaderOptions { batch: config.batch, seed: config.seed, shuffle: true, drop_last: true };
        let loader = Loader::new(dataset, transform, options)?;
        let second = match objective.second_view() {
            None => None,
            Some(View { size, normalization }) => {
                let transform = config.view((size, channels), normalization)?;
                Some((Loader::new(dataset, transform, options)?, Tensor::zeros([config.batch, channels, size, size])))
            }
        };
        let schedule = config.schedule(config.steps(loader.steps() as u64));
        let params = Params::init(objective.layout(), config.seed);
        Ok(Trainer {
            objective,
            loader,
            schedule,
            grads: Params::zeros(objective.layout()),
            optimizer: Optimizer::with_rates(&params, config.betas, config.weight_decay, |entry| objective.rate(entry)),
            ema: (ema_decay(&config) > 0.0).then(|| params.clone()),
            evaluation: None,
            best: Accuracy::default(),
            params,
            step: 0,
            order: (None, Vec::new()),
            images: Tensor::zeros([config.batch, channels, size, size]),
            labels: vec![0; config.batch],
            second,
            config,
        })
    }

    /// The run whose last save is `state`, where it stopped; the configuration is the saved one.
    ///
    /// # Errors
    /// If the state is not of this network or this data.
    pub fn resume(objective: &'a dyn Objective, dataset: &'a Dataset, state: &Checkpoint) -> Result<Self> {
        let mut trainer = Self::new(objective, dataset, saved_config(state)?)?;
        let number = |key: &str| state.need_meta(key)?.parse::<u64>().map_err(|_| state.error(format!("metadata `{key}` is not a number")));
        let (images, found) = (number("images")?, dataset.len() as u64);
        if images != found {
            return Err(state.error(format!("the run began with {images} images; `{}` now has {found}", dataset.name())));
        }
        trainer.step = number("step")?;
        if state.meta("best_top1").is_some() {
            trainer.best = Accuracy { top1: number("best_top1")?, top5: number("best_top5")?, images: number("best_images")? };
        }
        let Optimizer { m, v, .. } = &mut trainer.optimizer;
        let mut sets = vec![("params.", &mut trainer.params, true), ("m.", m, false), ("v.", v, false)];
        sets.extend(trainer.ema.as_mut().map(|ema| ("ema.", ema, true)));
        state.fill(&mut sets)?;
        Ok(trainer)
    }

    /// Starts from `params` instead of freshly initialised ones.
    ///
    /// # Errors
    /// If they are of another network.
    pub fn start_from(&mut self, params: Params<f32>) -> Result<()> {
        if params.flat().len() != self.params.flat().len() {
            return Err(Error::shape("parameters to start from", self.params.flat().len(), params.flat().len()));
        }
        self.ema = self.ema.take().map(|_| params.clone());
        self.params = params;
        Ok(())
    }

    /// Measures the accuracy after each epoch of [`run`](Self::run), and keeps the best parameters in [`BEST`].
    pub fn evaluate_with(&mut self, evaluation: Evaluation<'a>) {
        self.evaluation = Some(evaluation);
    }

    /// The best accuracy so far, of no images if there was none.
    pub fn best(&self) -> Accuracy {
        self.best
    }

    /// What evaluation and checkpoints take: the moving average, if there is one.
    pub fn averaged(&self) -> &Params<f32> {
        self.ema.as_ref().unwrap_or(&self.params)
    }

    /// The configuration.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The parameters as they are now.
    pub fn params(&self) -> &Params<f32> {
        &self.params
    }

    /// Steps done and all steps.
    pub fn progress(&self) -> (u64, u64) {
        (self.step, self.schedule.steps)
    }

    /// One optimizer step.
    ///
    /// # Errors
    /// If an image cannot be read or the loss or gradient is not finite; the parameters are then as before.
    pub fn step(&mut self) -> Result<StepReport> {
        let started = Instant::now();
        let per_epoch = self.loader.steps() as u64;
        let (epoch, within) = (self.step / per_epoch, (self.step % per_epoch) as usize);
        self.load_order(epoch)?;
        let batch = self.config.batch;
        let indices = &self.order.1[within * batch..(within + 1) * batch];
        self.loader.fill(epoch, indices, self.images.data_mut(), &mut self.labels)?;
        if let Some((loader, images)) = &mut self.second {
            loader.fill(epoch, indices, images.data_mut(), &mut self.labels)?;
        }

        self.grads.flat_mut().par_chunks_mut(1 << 16).for_each(|chunk| chunk.fill(0.0));
        let key = StepKey { seed: self.config.seed, step: self.step };
        let second = self.second.as_ref().map(|(_, images)| images);
        let batch = Batch { images: &self.images, second, labels: &self.labels, key };
        let recompute = self.config.finetune.as_ref().is_some_and(|f| f.recompute);
        let training = self.params.run_as(Pass::Train { key, recompute });
        let Loss { value, updates } = self.objective.loss(&training, Some(&mut self.grads), batch)?;
        // The optimizer would copy parameters that are shared.
        drop(training);
        let loss = f64::from(value);
        let (grad_norm, scale) = clip(&self.grads, self.config.clip);
        if !(loss.is_finite() && grad_norm.is_finite()) {
            let message = format!("{loss} with gradient norm {grad_norm} at step {}; try a smaller learning rate", self.step + 1);
            return Err(Error::value("loss", message));
        }
        let lr = self.schedule.rate(self.step);
        self.optimizer.step(&mut self.params, &self.grads, lr, self.step + 1, scale);
        self.params.update(&updates);
        self.step += 1;
        self.average(&updates);
        let seconds = started.elapsed().as_secs_f64();
        Ok(StepReport { step: self.step, steps: self.schedule.steps, epoch, loss, lr, grad_norm, images: self.config.batch, seconds })
    }

    /// `ema ← ema + (1 − d)(θ − ema)` with `d = min(D, (1 + t)/(10 + t))` after t steps: short runs are not held back by their beginning.
    fn average(&mut self, updates: &Updates<f32>) {
        let Some(ema) = &mut self.ema else { return };
        let t = self.step as f64;
        let rest = (1.0 - ema_decay(&self.config).min((1.0 + t) / (10.0 + t))) as f32;
        let chunks = ema.flat_mut().par_chunks_mut(1 << 14).zip(self.params.flat().par_chunks(1 << 14));
        chunks.for_each(|(ema, params)| ema.iter_mut().zip(params).for_each(|(e, p)| *e += rest * (*p - *e)));
        ema.update(updates);
    }

    fn load_order(&mut self, epoch: u64) -> Result<()> {
        if self.order.0 != Some(epoch) {
            let order = self.loader.epoch(epoch);
            self.order.1.clear();
            for step in 0..order.steps() {
                self.order.1.extend_from_slice(order.indices(step)?);
            }
            self.order.0 = Some(epoch);
        }
        Ok(())
    }

    /// Trains to the end, with metrics, states and checkpoints in `folder`; `progress` hears of every step.
    ///
    /// # Errors
    /// As [`Trainer::run_evaluated`].
    pub fn run(&mut self, folder: &Path, progress: &mut dyn FnMut(&StepReport)) -> Result<()> {
        self.run_evaluated(folder, &mut |event| match event {
            Event::Step(report) => progress(report),
            Event::Accuracy(..) => {}
        })
    }

    /// [`run`](Self::run), where `progress` hears of evaluations too.
    ///
    /// A state is saved before the first step too: a run killed at any moment can be resumed.
    ///
    /// # Errors
    /// As [`Trainer::step`], or if a file cannot be written.
    pub fn run_evaluated(&mut self, folder: &Path, progress: &mut dyn FnMut(Event)) -> Result<()> {
        prepare_folder(folder)?;
        let every = if self.config.save_every == 0 { self.loader.steps() as u64 } else { self.config.save_every };
        let mut metrics = Metrics::open(folder, self.step)?;
        self.save(folder)?;
        while self.step < self.schedule.steps {
            let report = self.step()?;
            metrics.push(&report)?;
            progress(Event::Step(&report));
            let last = self.step == self.schedule.steps;
            if last || self.step.is_multiple_of(self.loader.steps() as u64) {
                self.evaluate(folder, report.epoch, &mut metrics, progress)?;
            }
            if self.step.is_multiple_of(every) || self.step == self.schedule.steps {
                metrics.flush()?;
                self.save(folder)?;
            }
        }
        Ok(())
    }

    /// Classifies the test images, if there are any. The best parameters are on the disk before the state that knows of them: a run that is
    /// killed in between finds them again.
    fn evaluate(&mut self, folder: &Path, epoch: u64, metrics: &mut Metrics, progress: &mut dyn FnMut(Event)) -> Result<()> {
        let Some(evaluation) = &self.evaluation else { return Ok(()) };
        let accuracy = evaluation.run(self.averaged())?;
        metrics.push_accuracy(self.step, epoch, &accuracy)?;
        if self.best.images == 0 || accuracy.top1 > self.best.top1 {
            self.best = accuracy;
            let metadata = [self.metadata(), vec![("top1", accuracy.fractions().0.to_string())]].concat();
            self.write(&folder.join(BEST), &metadata)?;
        }
        progress(Event::Accuracy(self.step, &accuracy));
        Ok(())
    }

    /// What every file of parameters says about its run.
    fn metadata(&self) -> Vec<(&'static str, String)> {
        let version = ("karat", env!("CARGO_PKG_VERSION").to_string());
        vec![version, ("config", self.config.to_json().to_string()), ("step", self.step.to_string())]
    }

    fn write(&self, path: &Path, metadata: &[(&str, String)]) -> Result<()> {
        let checkpoint: Vec<_> = items("", self.averaged(), true).collect();
        write_atomic(path, &encode(&checkpoint, metadata))
    }

    /// Writes `state.safetensors`, whole in one file, then `checkpoint.safetensors`, which follows from it.
    ///
    /// # Errors
    /// If a file cannot be written; the old one is then untouched.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let ema = self.ema.iter().flat_map(|ema| items("ema.", ema, true));
        let state: Vec<_> = items("params.", &self.params, true)
            .chain(items("m.", &self.optimizer.m, false))
            .chain(items("v.", &self.optimizer.v, false))
            .chain(ema)
            .collect();
        let mut metadata = self.metadata();
        metadata.push(("images", self.loader.dataset().len().to_string()));
        if self.best.images > 0 {
            let Accuracy { top1, top5, images } = self.best;
            let best = [("best_top1", top1), ("best_top5", top5), ("best_images", images)];
            metadata.extend(best.map(|(key, count)| (key, count.to_string())));
        }
        write_atomic(folder.join(STATE), &encode(&state, &metadata))?;
        self.write(&folder.join(CHECKPOINT), &self.metadata())
    }
}

fn ema_decay(config: &TrainConfig) -> f64 {
    config.finetune.as_ref().map_or(0.0, |f| f.ema)
}

/// The configuration that a checkpoint or state was saved with.
///
/// # Errors
/// If there is none.
pub fn saved_config(file: &Checkpoint) -> Result<TrainConfig> {
    TrainConfig::from_json(file.need_meta("config")?).map_err(|e| file.error(e.to_string()))
}

/// Every file that a run writes into its folder.
const FILES: [&str; 13] = [
    STATE,
    CHECKPOINT,
    BEST,
    METRICS,
    SUMMARY,
    "config.toml",
    "loss.svg",
    "accuracy.svg",
    "reconstruction.png",
    "tokenizer.json",
    "codebook.json",
    PROBE,
    TRANSFER,
];

/// Makes the folder of a run, and removes the temporary files that a killed run left in it: a process that happens to have the
/// same number could not write its own.
pub(crate) fn prepare_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    for entry in fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".tmp") && FILES.iter().any(|of| name.starts_with(&format!(".{of}."))) {
            fs::remove_file(&path).map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}
