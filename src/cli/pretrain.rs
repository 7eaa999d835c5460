//! `karat pretrain`: masked image modeling.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;

use super::progress::Progress;
use super::{Outcome, new_run, picture, say, write_config};
use crate::Result;
use crate::data::{Dataset, Loader, LoaderOptions, Split};
use crate::mim::{MaskedModel, methods};
use crate::nn::StepKey;
use crate::tensor::Tensor;
use crate::train::{CHECKPOINT, Checkpoint, Length, METRICS, STATE, TrainConfig, Trainer, read_metrics, saved_config};

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
    /// The network (`karat list models`) [default: a small Swin]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// A folder of images, IDX or CIFAR files [default: built-in Fashion-MNIST subset]
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// Side of the images in pixels [default: 32]
    #[arg(long, value_name = "N")]
    image_size: Option<usize>,
    /// Passes over the images [default: 20]
    #[arg(long, value_name = "N", conflicts_with = "steps")]
    epochs: Option<u64>,
    /// Optimizer steps
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Images per step [default: 64]
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
        "method", "model", "data", "image_size", "epochs", "steps", "batch", "mask_ratio", "lr", "seed", "save_every", "skip_bad", "out",
    ])]
    resume: Option<PathBuf>,
}

impl Pretrain {
    fn config(&self) -> TrainConfig {
        let mut c = TrainConfig::default();
        let set = |target: &mut String, value: &Option<String>| {
            if let Some(value) = value {
                target.clone_from(value);
            }
        };
        set(&mut c.method, &self.method);
        set(&mut c.model, &self.model);
        set(&mut c.data, &self.data);
        c.length = self.epochs.map(Length::Epochs).or(self.steps.map(Length::Steps)).unwrap_or(c.length);
        c.image_size = self.image_size.unwrap_or(c.image_size);
        c.batch = self.batch.unwrap_or(c.batch);
        c.mask_ratio = self.mask_ratio;
        c.lr = self.lr.unwrap_or(c.lr);
        c.min_lr = c.min_lr.min(c.lr);
        c.seed = self.seed.unwrap_or(c.seed);
        c.save_every = self.save_every.unwrap_or(c.save_every);
        c.skip_bad = self.skip_bad;
        c
    }

    /// Runs the command; what it has to say goes to `out`, progress to standard error.
    ///
    /// # Errors
    /// Bad options, unreadable data, a folder that already holds a run, a damaged state.
    pub(super) fn run(self, out: &mut dyn Write) -> Result<Outcome> {
        let (config, folder, state) = match &self.resume {
            Some(folder) => {
                let state = Checkpoint::open(folder.join(STATE))?;
                (saved_config(&state)?, folder.clone(), Some(state))
            }
            None => {
                let config = self.config().checked()?;
                let folder = self.out.clone().unwrap_or_else(|| Path::new("runs").join(format!("{}-{}", config.method, config.model)));
                new_run(&folder)?;
                (config, folder, None)
            }
        };
        let objective = methods::build(&config.method, &config.model, config.image_size, config.mask_ratio)?;
        let (data, skipped) = config.open_data(Split::Train)?;
        for (_, error) in &skipped.files {
            eprintln!("karat: left out: {error}");
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
fn pictured(config: &TrainConfig, (size, channels): (usize, usize)) -> Result<Tensor<f32>> {
    let (test, _) = config.open_data(Split::Test)?;
    let batch = test.len().min(8);
    let options = LoaderOptions { batch, seed: config.seed, shuffle: false, drop_last: false };
    let loader = Loader::new(&test, config.test_transform((size, channels))?, options)?;
    Tensor::new([batch, channels, size, size], &loader.epoch(0).batch(0)?.images)
}
