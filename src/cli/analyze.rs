//! `karat analyze`: what a pre-trained network has learnt to look at.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Outcome, objective, progress, say};
use crate::data::{Loader, LoaderOptions, Split};
use crate::fs::write_atomic;
use crate::mim::MaskedModel;
use crate::mim::analysis::{RATIOS, Sampling, interactions, spectra};
use crate::nn::{Params, Watch};
use crate::plot::{Chart, Series, save_line_chart};
use crate::tensor::Tensor;
use crate::train::{CHECKPOINT, Checkpoint, Classifier, TrainConfig, extract, saved_config};
use crate::{Error, Result};

/// Look into a pre-trained network: a chart (SVG) and its numbers (JSON)
#[derive(Subcommand)]
pub enum Analyze {
    Interactions(Interactions),
    Fourier(Fourier),
}

/// How strongly pairs of patches interact, by how much of the image is there (the order)
///
/// The class is scored by a linear classifier of the frozen features, trained as `karat probe` does. Low orders are local patterns,
/// middle orders are objects' parts together. The curve has mean 1.
#[derive(Args)]
#[command(after_help = "Example: karat analyze interactions --from runs/mine")]
pub struct Interactions {
    #[command(flatten)]
    source: Source,
    /// Patches per side [default: 14 at 224 pixels, 8 at 32]
    #[arg(long, value_name = "G")]
    grid: Option<usize>,
    /// Pairs of patches per image
    #[arg(long, value_name = "N", default_value_t = 10)]
    pairs: usize,
    /// Contexts per pair and order
    #[arg(long, value_name = "N", default_value_t = 10)]
    contexts: usize,
    /// What the true class scores: logarithm of its odds, of its probability, or its logit
    #[arg(long, value_name = "KIND", default_value = "modified", value_parser = crate::mim::interaction::REWARDS)]
    reward: String,
}

/// The spectrum of the features of each stage (of each block of a plain network): amplitude by frequency, relative to the mean
#[derive(Args)]
#[command(after_help = "Example: karat analyze fourier --from runs/mine")]
pub struct Fourier {
    #[command(flatten)]
    source: Source,
}

#[derive(Args)]
struct Source {
    /// The folder of a pre-training run
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// A folder of labelled images [default: the run's]
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// Test images to look at
    #[arg(long, value_name = "N", default_value_t = 20)]
    images: usize,
    /// Seed of the choice of images, pairs and contexts
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// The folder to write chart and numbers to [default: the run's]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// A run with its test images.
struct Opened {
    config: TrainConfig,
    objective: Box<dyn MaskedModel>,
    params: Params<f32>,
    images: Tensor<f32>,
    labels: Vec<usize>,
}

impl Source {
    fn open(&self) -> Result<Opened> {
        let file = Checkpoint::open(self.from.join(CHECKPOINT))?;
        let config = saved_config(&file)?;
        let objective = objective(&config)?;
        let mut params = Params::zeros(objective.layout());
        file.load(&mut params)?;
        // Pixels are normalised as in training, whatever they are now.
        let (transform, shape) = (config.test_transform(objective.image_shape())?, objective.image_shape());
        let config = TrainConfig { data: self.data.clone().unwrap_or_else(|| config.data.clone()), ..config };
        let test = config.open_data(Split::Test)?.0;
        if self.images == 0 || self.images > test.len() {
            return Err(Error::usage(format!("--images {}: expected 1 to {}, the test images", self.images, test.len())));
        }
        let options = LoaderOptions { batch: self.images, seed: self.seed, shuffle: true, drop_last: true };
        let batch = Loader::new(&test, transform, options)?.epoch(0).batch(0)?;
        let images = Tensor::new([self.images, shape.1, shape.0, shape.0], &batch.images)?;
        Ok(Opened { config, objective, params, images, labels: batch.labels })
    }

    fn write(&self, name: &str, chart: &Chart, numbers: &Value, out: &mut dyn Write) -> Result<()> {
        let folder: &Path = self.out.as_deref().unwrap_or(&self.from);
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        let svg = folder.join(format!("{name}.svg"));
        save_line_chart(&svg, chart)?;
        write_atomic(folder.join(format!("{name}.json")), format!("{numbers:#}\n").as_bytes())?;
        say(out, format!("wrote {}", svg.display()))
    }
}

impl Analyze {
    /// Runs the command; the table goes to `out`.
    ///
    /// # Errors
    /// A missing or damaged checkpoint, unreadable data, a grid that does not fit the images.
    pub(super) fn run(self, out: &mut dyn Write) -> Result<Outcome> {
        match self {
            Analyze::Interactions(command) => command.run(out),
            Analyze::Fourier(command) => command.run(out),
        }
    }
}

impl Interactions {
    fn run(self, out: &mut dyn Write) -> Result<Outcome> {
        let Opened { config, objective, params, images, labels } = self.source.open()?;
        let side = objective.image_shape().0;
        let usual: &[usize] = if side < 128 { &[8, 7, 6, 5, 4, 3] } else { &[14, 16, 12, 8] };
        let sampling = Sampling {
            grid: self.grid.or_else(|| usual.iter().copied().find(|g| side.is_multiple_of(*g))).unwrap_or(8),
            ratios: RATIOS.to_vec(),
            pairs: self.pairs,
            contexts: self.contexts,
            reward: self.reward,
            seed: self.source.seed,
        };
        let train = config.open_data(Split::Train)?.0;
        let transform = config.test_transform(objective.image_shape())?;
        let classifier = Classifier::train(&extract(&*objective, &params, &train, transform)?)?;
        let bar = progress((labels.len() * RATIOS.len()) as u64, "interactions");
        let mut logits = |images: &Tensor<f32>| classifier.logits(&objective.features(&params, images)?);
        let found = interactions(&sampling, &images, &labels, &mut logits, &mut || bar.inc(1));
        bar.finish_and_clear();
        let strength = found?;
        say(out, format!("{:>9}{:>12}", "order m/n", "strength"))?;
        for (ratio, strength) in RATIOS.iter().zip(&strength) {
            say(out, format!("{ratio:>9.2}{strength:>12.4}"))?;
        }
        let name = format!("{} with {}", config.method, config.model);
        let chart = Chart {
            title: format!("{name}: interactions of patches"),
            x_label: "order m/n".into(),
            y_label: "relative strength".into(),
            series: vec![Series { name, points: RATIOS.iter().copied().zip(strength.iter().copied()).collect() }],
            ..Chart::default()
        };
        let Sampling { grid, pairs, contexts, reward, seed, .. } = sampling;
        let numbers = json!({
            "method": config.method, "model": config.model, "images": labels.len(), "grid": grid, "pairs": pairs, "contexts": contexts,
            "reward": reward, "seed": seed, "orders": RATIOS, "strength": strength,
        });
        self.source.write("interactions", &chart, &numbers, out)?;
        Ok(Outcome::Good)
    }
}

impl Fourier {
    fn run(self, out: &mut dyn Write) -> Result<Outcome> {
        let Opened { config, objective, params, images, .. } = self.source.open()?;
        let watch = Watch::default();
        objective.features(&params.watched(&watch), &images)?;
        let spectra = spectra(&watch.take())?;
        say(out, format!("{:<12}{:>8}{:>28}", "features", "map", "ln amplitude at r = 1"))?;
        for spectrum in &spectra {
            let highest = spectrum.curve.iter().find(|(r, _)| *r >= 1.0).map_or(f64::NAN, |point| point.1);
            say(out, format!("{:<12}{:>8}{highest:>28.3}", spectrum.name, format!("{0}×{0}", spectrum.side)))?;
        }
        let chart = Chart {
            title: format!("{} with {}: spectrum of features", config.method, config.model),
            x_label: "frequency (1: the highest along an axis)".into(),
            y_label: "ln amplitude, relative to the centre".into(),
            series: spectra.iter().map(|s| Series { name: s.name.clone(), points: s.curve.clone() }).collect(),
            ..Chart::default()
        };
        let maps: Vec<Value> = spectra.iter().map(|s| json!({ "name": s.name, "side": s.side, "curve": s.curve })).collect();
        let numbers = json!({ "method": config.method, "model": config.model, "images": images.shape()[0], "maps": maps });
        self.source.write("fourier", &chart, &numbers, out)?;
        Ok(Outcome::Good)
    }
}
