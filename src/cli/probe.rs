//! `karat probe`: what a linear classifier makes of the pre-trained features.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::{Outcome, objective, say};
use crate::Result;
use crate::data::Dataset;
use crate::fs::write_atomic;
use crate::nn::Params;
use crate::train::{CHECKPOINT, Checkpoint, PROBE, TrainConfig, extract, pixels, probe, saved_config};

/// Measure pre-trained features by a linear classifier
///
/// Trains softmax regression on the frozen features of the training images and prints its accuracy on the test images; likewise for
/// the same network before training, and for the raw pixels. The run's folder keeps the accuracy in probe.json.
#[derive(Args)]
#[command(after_help = "Example: karat probe --from runs/mine")]
pub struct Probe {
    /// The folder of a pre-training run
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// A folder of labelled images [default: the run's]
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// Leave out images that cannot be read, instead of failing
    #[arg(long)]
    skip_bad: bool,
}

impl Probe {
    /// Runs the command; the table goes to `out`.
    ///
    /// # Errors
    /// A missing or damaged checkpoint, unreadable data, fewer than two classes.
    pub(super) fn run(self, out: &mut dyn Write) -> Result<Outcome> {
        let file = Checkpoint::open(self.from.join(CHECKPOINT))?;
        let config = saved_config(&file)?;
        let objective = objective(&config)?;
        let untrained = Params::init(objective.layout(), config.seed);
        let mut params = untrained.clone();
        file.load(&mut params)?;

        // Pixels are normalised as in training, whatever they are now.
        let transform = config.test_transform(objective.image_shape())?;
        let source =
            TrainConfig { data: self.data.unwrap_or_else(|| config.data.clone()), skip_bad: config.skip_bad || self.skip_bad, ..config };
        let ([train, test], _) = source.open_both()?;
        say(
            out,
            format!(
                "linear probe on {}: {} training and {} test images, {} classes",
                train.name(),
                train.len(),
                test.len(),
                train.class_names().len()
            ),
        )?;
        if !train.held_out() {
            say(out, "the same images serve for training and test: these are training accuracies")?;
        }
        say(out, format!("{:<22}{:>9}{:>15}{:>14}", "features", "numbers", "test accuracy", "weight decay"))?;
        let features = |params: &Params<f32>, data: &Dataset| extract(&*objective, params, data, transform.clone());
        let raw = |data: &Dataset| pixels(data, transform.clone());
        let mut record = Value::Null;
        for kind in ["pre-trained network", "untrained network", "pixels"] {
            let (a, b) = match kind {
                "pixels" => (raw(&train)?, raw(&test)?),
                "untrained network" => (features(&untrained, &train)?, features(&untrained, &test)?),
                _ => (features(&params, &train)?, features(&params, &test)?),
            };
            let found = probe(&a, &b)?;
            if kind == "pre-trained network" {
                record = json!({ "accuracy": found.accuracy, "images": train.name(), "features": a.width });
            }
            say(out, format!("{kind:<22}{:>9}{:>13.1} %{:>14.0e}", a.width, 100.0 * found.accuracy, found.lambda))?;
        }
        write_atomic(self.from.join(PROBE), format!("{record}\n").as_bytes())?;
        Ok(Outcome::Good)
    }
}
