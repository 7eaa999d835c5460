//! `karat transfer`: what pre-training is worth with few labels.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::finetune::Finetune;
use super::network::Meter;
use super::{Outcome, say};
use crate::data::Dataset;
use crate::fs::write_atomic;
use crate::train::{CHECKPOINT, Checkpoint, Classification, Gain, Spread, Start, TRANSFER, TrainConfig, Trainer, fit, saved_config};
use crate::{Error, Result};

/// Measure what pre-training is worth: fine-tuning from each run against the same network from scratch
///
/// Trains classifiers on a few labelled images, from the parameters of each pre-training run and from scratch, with the same settings,
/// and prints their accuracies on the test images after the last step: mean ± standard deviation over the seeds. A seed decides
/// initialisation, order and augmentation, and which images are labelled: the first of each class, the next, … Seed 0 is
/// `karat finetune --limit N`. Runs of the same network share what starts from scratch. Each run's folder keeps its figures in
/// transfer.json.
#[derive(Args)]
#[command(after_help = "Example: karat transfer runs/greenmim-swin_micro runs/simmim-swin_micro --labels 1000 --seeds 3")]
pub struct Transfer {
    /// Folders of pre-training runs
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The classifier [default: the network that was pre-trained]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Labelled images, as many of each class
    #[arg(long, value_name = "N", default_value_t = 1000)]
    labels: usize,
    /// Measurements
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=1000))]
    seeds: u64,
    /// Passes over the labelled images
    #[arg(long, value_name = "N", default_value_t = 15, conflicts_with = "steps")]
    epochs: u64,
    /// Optimizer steps
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Images per step [default: 32, or all labelled ones if there are fewer]
    #[arg(long, value_name = "B")]
    batch: Option<usize>,
    /// The largest learning rate
    #[arg(long, value_name = "X", default_value_t = 1e-3)]
    lr: f64,
    /// Learning rate of a layer over that of the next
    #[arg(long, value_name = "D", default_value_t = 1.0)]
    layer_decay: f64,
    /// Probability that the last block's branches are dropped [default: the network's]
    #[arg(long, value_name = "R")]
    drop_path: Option<f64>,
    /// The smallest share of an image's area that a training crop shows [default: 0.8]
    #[arg(long, value_name = "S")]
    crop: Option<f64>,
    /// A folder of labelled images [default: the run's]
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// Leave out images that cannot be read, instead of failing
    #[arg(long)]
    skip_bad: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A run, and how a classifier is trained from it.
struct Job<'a> {
    folder: &'a Path,
    /// What was pre-trained.
    network: String,
    method: String,
    config: TrainConfig,
    start: Start,
    images: usize,
}

/// Images for training and for test, by where they are.
type Images = BTreeMap<String, [Dataset; 2]>;

impl Transfer {
    /// The settings of a classifier that starts from the run in `folder`; loads once what can go wrong later.
    fn job<'a>(&self, folder: &'a Path, images: &mut Images) -> Result<Job<'a>> {
        let file = Checkpoint::open(folder.join(CHECKPOINT))?;
        let pretraining = saved_config(&file)?;
        if pretraining.finetune.is_some() {
            return Err(file.error("a run of karat finetune, expected one of pre-training"));
        }
        let options = Finetune {
            from: Some(folder.into()),
            model: self.model.clone(),
            data: self.data.clone(),
            epochs: self.steps.is_none().then_some(self.epochs),
            steps: self.steps,
            batch: Some(self.batch.unwrap_or(self.labels.clamp(1, 32))),
            lr: Some(self.lr),
            layer_decay: Some(self.layer_decay),
            drop_path: self.drop_path,
            crop: self.crop,
            limit: Some(self.labels),
            skip_bad: self.skip_bad,
            ..Finetune::default()
        };
        let network = &pretraining.model;
        let (mut config, start) = options.config().map_err(|error| match error {
            Error::Unknown { kind: "model", .. } if self.model.is_none() => {
                file.error(format!("{network} has no classifier; `karat list models` has the networks that do"))
            }
            other => other,
        })?;
        if !images.contains_key(&config.data) {
            let (both, skipped) = config.open_both()?;
            for (_, error) in skipped.iter().flat_map(|skipped| &skipped.files) {
                eprintln!("karat: left out: {error}");
            }
            images.insert(config.data.clone(), both);
        }
        let [train, test] = &images[&config.data];
        let labelled = train.balanced(self.labels)?;
        let mut settings = config.finetune.take().unwrap_or_default();
        settings.class_names = train.class_names().to_vec();
        let model = settings.model(&config.model, config.image_size)?;
        config.finetune = Some(settings.clone());
        let config = config.checked()?;
        let classification = Classification::new(&model, &settings)?;
        let mut trainer = Trainer::new(&classification, &labelled, config.clone())?;
        start.load(&model, &mut trainer)?;
        let images = trainer.progress().1 as usize * config.batch * self.seeds as usize;
        if test.is_empty() {
            return Err(Error::value("data", "no test images"));
        }
        drop(trainer);
        Ok(Job { folder, network: pretraining.model, method: pretraining.method, config, start, images })
    }

    /// The accuracies of `job` with each seed, from `start`.
    fn accuracies(&self, job: &Job, start: &Start, images: &Images, meter: &mut Meter) -> Result<Vec<f64>> {
        let [train, test] = &images[&job.config.data];
        let one = |seed: u64| {
            let config = TrainConfig { seed, ..job.config.clone() };
            let labelled = train.drawn(self.labels, seed)?;
            let accuracy = fit(&config, start, [&labelled, test], &mut |report| meter.advance(report.images))?;
            Ok(accuracy.fractions().0)
        };
        (0..self.seeds).map(one).collect()
    }

    /// Runs the command; the table goes to `out`.
    ///
    /// # Errors
    /// A folder without a run of pre-training, a network that classifies nothing, unreadable data, more labels than images.
    pub(super) fn run(self, out: &mut dyn Write) -> Result<Outcome> {
        let mut images = Images::new();
        let jobs = self.runs.iter().map(|folder| self.job(folder, &mut images)).collect::<Result<Vec<_>>>()?;
        // From scratch, a run is what its configuration says.
        let key = |job: &Job| job.config.to_json().to_string();
        let baselines: BTreeMap<String, usize> = jobs.iter().map(|job| (key(job), job.images)).collect();
        let mut meter = Meter::new(jobs.iter().map(|job| job.images).chain(baselines.into_values()).sum());
        let mut baselines: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        let mut gains = Vec::new();
        for job in &jobs {
            let scratch = match baselines.get(&key(job)) {
                Some(known) => known.clone(),
                None => self.accuracies(job, &Start::Scratch, &images, &mut meter)?,
            };
            baselines.insert(key(job), scratch.clone());
            let gain = Gain { scratch, tuned: self.accuracies(job, &job.start, &images, &mut meter)? };
            let record = self.record(job, &gain, &images);
            write_atomic(job.folder.join(TRANSFER), format!("{record:#}\n").as_bytes())?;
            gains.push((gain, record));
        }
        meter.finish();
        if self.json {
            say(out, Value::Array(gains.into_iter().map(|(_, record)| record).collect()))?;
            return Ok(Outcome::Good);
        }
        self.table(&jobs, &gains, &images, out)?;
        Ok(Outcome::Good)
    }

    fn record(&self, job: &Job, gain: &Gain, images: &Images) -> Value {
        let [train, test] = &images[&job.config.data];
        let mut record = json!({
            "run": job.folder.display().to_string(), "network": job.network, "method": job.method,
            "classifier": job.config.model, "data": train.name(),
            "labels": self.labels, "test_images": test.len(), "batch": job.config.batch, "lr": job.config.lr,
            "layer_decay": self.layer_decay, "drop_path": self.drop_path, "crop": job.config.crop,
            "images_per_seed": job.images / self.seeds as usize,
        });
        if let (Value::Object(record), Value::Object(gain)) = (&mut record, gain.to_json()) {
            record.extend(gain);
        }
        record
    }

    fn table(&self, jobs: &[Job], gains: &[(Gain, Value)], images: &Images, out: &mut dyn Write) -> Result<()> {
        let seeds = match self.seeds {
            1 => "seed 0".to_string(),
            n => format!("{n} seeds (mean ± standard deviation)"),
        };
        say(out, format!("{} labelled images, {seeds}; top-1 accuracy in %", self.labels))?;
        if images.values().any(|[train, _]| !train.held_out()) {
            say(out, "the same images serve for training and test: these are training accuracies")?;
        }
        say(out, format!("{:<22}{:<10}{:>16}{:>16}{:>16}", "network", "method", "from scratch", "fine-tuned", "difference"))?;
        for (job, (gain, _)) in jobs.iter().zip(gains) {
            let percent = |values: &[f64], plus: &str| {
                let Spread { mean, deviation } = Spread::of(values);
                let sign = if mean >= 0.0 { plus } else { "" };
                let deviation = deviation.map_or(String::new(), |d| format!(" ± {:.1}", 100.0 * d));
                format!("{sign}{:.1}{deviation}", 100.0 * mean)
            };
            let cells = [percent(&gain.scratch, ""), percent(&gain.tuned, ""), percent(&gain.differences(), "+")];
            let [scratch, tuned, difference] = cells;
            say(out, format!("{:<22}{:<10}{scratch:>16}{tuned:>16}{difference:>16}", job.network, job.method))?;
        }
        Ok(())
    }
}
