//! `karat tokenizer train`: the discrete VAE whose codes BEiT predicts.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, Subcommand};
use serde_json::json;

use super::pretrain::pictured;
use super::progress::Progress;
use super::{Outcome, picture, say, write_config};
use crate::case::Config;
use crate::data::{Dataset, Loader, LoaderOptions, Split};
use crate::fs::write_atomic;
use crate::nn::Objective;
use crate::plot::{Grid, Tile, image_grid_png};
use crate::tensor::Tensor;
use crate::tokenizer::image::{CodeUse, ImageTokenizer, NORMALIZATION, TOKENIZER, Training, read_config, renormalise};
use crate::train::{Checkpoint, Length, METRICS, STATE, TrainConfig, Trainer, prepare_folder, read_metrics, saved_config};
use crate::{Error, Result};

/// What a tokenizer's configuration calls its method and its network.
const METHOD: [&str; 2] = ["dvae", "simple"];
/// Test images that the codes in use are counted on, at most.
const JUDGED: usize = 256;

/// Image tokenizers
#[derive(Subcommand)]
pub enum Tokenizer {
    Train(Train),
}

/// Train the discrete VAE whose codes BEiT predicts
///
/// Writes configuration, metrics, loss curve, reconstructions, the codes in use, parameters and the trainer's state into one folder, which
/// `karat pretrain --method beit --tokenizer` takes. A run that was killed goes on with --resume and ends in the same bits.
#[derive(Args)]
#[command(after_help = "Example: karat tokenizer train --out runs/tokenizer")]
pub struct Train {
    /// A folder of images, IDX or CIFAR files [default: built-in Fashion-MNIST subset]
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// Side of the images in pixels
    #[arg(long, value_name = "N", default_value_t = 32)]
    image_size: usize,
    /// Codes
    #[arg(long, value_name = "V", default_value_t = 256)]
    codes: usize,
    /// How often the image is halved: a code stands for 2^L × 2^L pixels
    #[arg(long, value_name = "L", default_value_t = 2)]
    layers: usize,
    /// Width of convolutions and codes
    #[arg(long, value_name = "D", default_value_t = 32)]
    width: usize,
    /// Weight of the divergence of the codes' distribution from the uniform one, per code
    #[arg(long, value_name = "W", default_value_t = 0.01)]
    kl_weight: f64,
    /// Passes over the images [default: 10]
    #[arg(long, value_name = "N", conflicts_with = "steps")]
    epochs: Option<u64>,
    /// Optimizer steps
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Images per step
    #[arg(long, value_name = "B", default_value_t = 64)]
    batch: usize,
    /// The largest learning rate
    #[arg(long, value_name = "X", default_value_t = 1e-3)]
    lr: f64,
    /// Seed of everything random
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Leave out images that cannot be read, instead of failing
    #[arg(long)]
    skip_bad: bool,
    /// The folder to write
    #[arg(long, value_name = "DIR", required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Go on with the run in this folder, with its configuration
    #[arg(long, value_name = "DIR", conflicts_with_all = [
        "data", "image_size", "codes", "layers", "width", "kl_weight", "epochs", "steps", "batch", "lr", "seed", "skip_bad", "out",
    ])]
    resume: Option<PathBuf>,
}

impl Tokenizer {
    pub(super) fn run(self, out: &mut dyn Write) -> Result<Outcome> {
        match self {
            Tokenizer::Train(train) => train.run(out),
        }
    }
}

impl Train {
    fn config(&self) -> Result<TrainConfig> {
        let default = TrainConfig::default();
        let [method, model] = METHOD.map(String::from);
        TrainConfig {
            method,
            model,
            image_size: self.image_size,
            data: self.data.clone().unwrap_or_else(|| default.data.clone()),
            skip_bad: self.skip_bad,
            length: self.epochs.map(Length::Epochs).or(self.steps.map(Length::Steps)).unwrap_or(Length::Epochs(10)),
            batch: self.batch,
            lr: self.lr,
            min_lr: default.min_lr.min(self.lr),
            weight_decay: 1e-4,
            betas: (0.9, 0.999),
            clip: 1.0,
            seed: self.seed,
            ..default
        }
        .checked()
    }

    fn sizes(&self) -> Config {
        let mut config = Config::default();
        config.set("arch", "simple").set("image_size", self.image_size).set("num_layers", self.layers).set("vocab_size", self.codes);
        config.set("codebook_dim", self.width).set("hidden_dim", self.width).set("in_chans", 3).set("kl_weight", self.kl_weight);
        config
    }

    /// Runs the command; what it has to say goes to `out`, progress to standard error.
    ///
    /// # Errors
    /// Bad options, unreadable data, a folder that already holds a run, a damaged state.
    fn run(self, out: &mut dyn Write) -> Result<Outcome> {
        let (config, sizes, folder, state) = match (&self.resume, &self.out) {
            (Some(folder), _) => {
                let sizes = read_config(folder)?;
                let state = Checkpoint::open(folder.join(STATE))?;
                (saved_config(&state)?, sizes, folder.clone(), Some(state))
            }
            (None, Some(folder)) => {
                if folder.join(STATE).exists() {
                    let name = folder.display();
                    let message = format!("{name} already holds a run: continue it with --resume {name}, or choose another --out");
                    return Err(Error::usage(message));
                }
                (self.config()?, self.sizes(), folder.clone(), None)
            }
            (None, None) => return Err(Error::usage("--out: expected the folder to write")),
        };
        let (data, skipped) = config.open_data(Split::Train)?;
        for (_, error) in &skipped.files {
            eprintln!("karat: left out: {error}");
        }
        let steps = config.steps(data.len().checked_div(config.batch).unwrap_or(0) as u64);
        let training = Training::new(&sizes, steps, config.normalization())?;
        let mut trainer = match &state {
            Some(state) => Trainer::resume(&training, &data, state)?,
            None => Trainer::new(&training, &data, config.clone())?,
        };
        drop(state);
        // Read before the training, not after.
        let (test, _) = config.open_data(Split::Test)?;
        let shown = pictured(&config, training.image_shape())?;
        prepare_folder(&folder)?;
        write_config(&folder, &config)?;
        write_atomic(folder.join(TOKENIZER), sizes.to_json().as_bytes())?;
        let (done, steps) = trainer.progress();
        let codes = sizes.positive("vocab_size")?;
        say(
            out,
            format!(
                "tokenizer of {codes} codes, {} parameters, on {} ({} images); steps {done} to {steps} of {} images; {} threads",
                training.layout().numel(),
                data.name(),
                data.len(),
                config.batch,
                rayon::current_num_threads()
            ),
        )?;
        let started = Instant::now();
        let mut progress = Progress::new(done, steps);
        let result = trainer.run(&folder, &mut |report| progress.step(report));
        progress.finish();
        result?;

        let losses = read_metrics(&folder.join(METRICS))?;
        picture::loss_curve(&folder.join("loss.svg"), &losses, &format!("tokenizer of {codes} codes: loss"))?;
        let tokenizer = ImageTokenizer::open(&folder)?;
        let shown = renormalise(&shown, config.normalization(), NORMALIZATION)?;
        let again = tokenizer.decode(&tokenizer.encode(&shown)?)?;
        pairs(&folder.join("reconstruction.png"), &shown, &again)?;
        let judged = judge(&tokenizer, &config, &test)?;
        let CodeUse { used, perplexity } = judged.codes;
        let report = json!({ "images": judged.images, "codes": codes, "used": used, "perplexity": perplexity, "mse": judged.mse });
        write_atomic(folder.join("codebook.json"), format!("{report:#}\n").as_bytes())?;
        say(
            out,
            format!(
                "after {steps} steps, {:.1} s, on {} test images: squared error {:.4} of pixels in [-1, 1], {used} of {codes} codes in use, \
                 perplexity {perplexity:.1}; wrote {}",
                started.elapsed().as_secs_f64(),
                judged.images,
                judged.mse,
                folder.display()
            ),
        )?;
        Ok(Outcome::Good)
    }
}

/// What a tokenizer makes of test images: each becomes its codes and an image again.
struct Judged {
    images: usize,
    codes: CodeUse,
    /// Mean squared error of pixels in [−1, 1].
    mse: f64,
}

fn judge(tokenizer: &ImageTokenizer, config: &TrainConfig, test: &Dataset) -> Result<Judged> {
    let (size, channels) = (tokenizer.sizes().image_size, tokenizer.sizes().in_chans);
    let options = LoaderOptions { batch: 64, seed: config.seed, shuffle: false, drop_last: false };
    let loader = Loader::new(test, config.test_transform((size, channels))?, options)?;
    let (mut codes, mut sum, mut count, mut images) = (Vec::new(), 0.0, 0, 0);
    let epoch = loader.epoch(0);
    for step in (0..epoch.steps()).take(JUDGED / options.batch) {
        let batch = epoch.batch(step)?;
        let x = Tensor::new([batch.labels.len(), channels, size, size], &batch.images)?;
        let x = renormalise(&x, config.normalization(), NORMALIZATION)?;
        let found = tokenizer.encode(&x)?;
        let y = tokenizer.decode(&found)?;
        sum += x.data().iter().zip(y.data()).fold(0.0, |sum, (x, y)| sum + f64::from(x - y).powi(2));
        count += x.data().len();
        images += batch.labels.len();
        codes.extend(found);
    }
    Ok(Judged { images, codes: CodeUse::of(&codes, tokenizer.sizes().vocab_size), mse: sum / count.max(1) as f64 })
}

/// Writes a PNG with the images `[B, C, S, S]` in `[−1, 1]` above and what became of them below.
fn pairs(path: &Path, above: &Tensor<f32>, below: &Tensor<f32>) -> Result<()> {
    let [_, c, h, w] = above.dims("images")?;
    let row = |images: &Tensor<f32>| -> Result<Vec<Tile>> {
        let pixels: Vec<f32> = images.data().iter().map(|x| 0.5 * x + 0.5).collect();
        pixels.chunks_exact(c * h * w).map(|image| Tile::from_planes(h, w, c, image)).collect()
    };
    image_grid_png(path, &Grid { captions: Vec::new(), rows: vec![row(above)?, row(below)?], scale: (128 / w).max(1), gap: 4 })
}
