//! `karat eval`: how often a network is right on labelled images.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value as Json, json};

use super::network::{Choice, Meter, batch_size};
use super::{Outcome, say};
use crate::data::{Dataset, OpenOptions, Split};
use crate::error::{Error, Result};
use crate::fs::write_atomic;
use crate::model::accuracy::Accuracy;
use crate::model::trained::Trained;
use crate::plot::Confusion;
use crate::tensor::pool;
use crate::train::BUILTIN;

/// Measure the accuracy of a network on labelled images
///
/// Uses the test images, if the folder has some set apart. With ImageNet's 1000 classes, folders called by WordNet numbers (n01440764)
/// are matched by these, also if there are fewer; the classes of a fine-tuning run are matched by name; else folders count in order.
#[derive(Args)]
#[command(
    after_help = "Example: karat eval --model deit_tiny_patch16_224 --weights deit_tiny.safetensors --data imagenet/val --confusion confusion.svg"
)]
pub struct Eval {
    #[command(flatten)]
    network: Choice,
    /// A folder with one sub-folder of images per class, IDX or CIFAR files, or `builtin` [default: the run's]
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// Images at a time
    #[arg(long, value_name = "B", default_value_t = 16, value_parser = batch_size())]
    batch: u32,
    /// Leave out images that cannot be read, instead of failing
    #[arg(long)]
    skip_bad: bool,
    /// Write the figures to a JSON file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw which class is taken for which (.svg or .png)
    #[arg(long, value_name = "FILE", value_parser = picture)]
    confusion: Option<PathBuf>,
}

/// The extension is checked before hours of work, not after.
fn picture(path: &str) -> Result<PathBuf, String> {
    match Path::new(path).extension().and_then(|e| e.to_str()) {
        Some("svg" | "png") => Ok(path.into()),
        _ => Err("expected a picture called .svg or .png".into()),
    }
}

impl Eval {
    /// Runs the command; the figures go to `out`.
    ///
    /// # Errors
    /// A network without weights, weights of another one, unreadable images, classes that do not fit.
    pub(super) fn run(&self, out: &mut dyn Write) -> Result<Outcome> {
        let trained = self.network.open_classifier()?;
        let data = self.open(&trained)?;
        let classes = trained.classes_of(data.class_names())?;
        let (name, images) = (trained.model.variant.name, data.len());
        say(out, format!("{name} on {}: {images} images, {} classes", data.name(), classes.len()))?;

        let mut accuracy = Accuracy::default();
        let mut meter = Meter::new(images);
        pool::reset_peak();
        for start in (0..images).step_by(self.batch as usize) {
            let count = (images - start).min(self.batch as usize);
            let logits = trained.logits(&trained.prepare(count, |i| data.image(start + i))?)?;
            for (i, logits) in logits.data().chunks_exact(trained.classes()).enumerate() {
                accuracy.add(logits, classes[data.label(start + i)])?;
            }
            meter.advance(count);
        }
        let speed = images as f64 / meter.finish().max(1e-9);
        let peak = pool::stats().peak_bytes;
        say(out, format!("top-1   {:6.2} %", 100.0 * accuracy.top1()))?;
        say(out, format!("top-5   {:6.2} %", 100.0 * accuracy.top5()))?;
        say(out, format!("speed   {speed:6.1} images/s"))?;
        say(out, format!("memory  {:6.0} MB at most: parameters and activations", peak as f64 / 1e6))?;

        let class_name = |class: usize| match trained.class_name(class) {
            Some(name) => name.to_string(),
            None => data.class_names().get(class).cloned().unwrap_or_default(),
        };
        if let Some(path) = &self.json {
            let by_class = accuracy.by_class();
            let by_class = by_class.iter().map(|(&class, &(images, right))| {
                json!({ "class": class, "name": class_name(class), "images": images, "top1": right as f64 / images as f64 })
            });
            let figures = json!({
                "model": name, "image_size": trained.model.size, "data": data.name(), "images": images, "top1": accuracy.top1(),
                "top5": accuracy.top5(), "images_per_second": speed, "peak_bytes": peak, "by_class": by_class.collect::<Json>(),
            });
            write_atomic(path, format!("{figures:#}\n").as_bytes())?;
        }
        if let Some(path) = &self.confusion {
            let title = format!("{name} on {}: {:.1} % of {images} right", data.name(), 100.0 * accuracy.top1());
            matrix(&accuracy, title, class_name).save(path)?;
            say(out, format!("wrote {}", path.display()))?;
        }
        Ok(Outcome::Good)
    }

    fn open(&self, trained: &Trained) -> Result<Dataset> {
        let name = match (&self.data, &trained.run) {
            (Some(data), _) => Some(data),
            (None, Some(run)) => run.data.as_ref(),
            (None, None) => None,
        };
        let name = name.ok_or_else(|| Error::usage("no images: expected --data DIR"))?;
        if name == BUILTIN {
            return Dataset::builtin(Split::Test);
        }
        let (data, skipped) = Dataset::open(Path::new(name), OpenOptions { split: Split::Test, skip_bad: self.skip_bad })?;
        for (_, error) in &skipped.files {
            eprintln!("karat: left out: {error}");
        }
        Ok(data)
    }
}

/// The classes that occur as rows; what was taken for a class that does not occur is in the last column.
fn matrix(accuracy: &Accuracy, title: String, name: impl Fn(usize) -> String) -> Confusion {
    let rows: BTreeMap<usize, usize> = accuracy.by_class().into_keys().enumerate().map(|(row, class)| (class, row)).collect();
    let n = rows.len();
    let mut counts = vec![vec![0; n + 1]; n];
    for ((class, predicted), count) in accuracy.confusion() {
        counts[rows[class]][rows.get(predicted).copied().unwrap_or(n)] += count;
    }
    Confusion { title, names: rows.into_keys().map(name).collect(), counts }
}
