//! Choosing a trained network: what `predict`, `eval` and `features` share.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::data::imagenet;
use crate::error::{Error, Result};
use crate::model::trained::Trained;
use crate::nn::Checkpoint;

/// A network and where its weights are.
#[derive(Args)]
pub struct Choice {
    /// The network (`karat list models`)
    #[arg(long, value_name = "NAME", conflicts_with = "from")]
    model: Option<String>,
    /// Its published weights: a safetensors file (`reference/convert.py` makes one of a PyTorch file)
    #[arg(long, value_name = "FILE", conflicts_with = "from")]
    weights: Option<PathBuf>,
    /// The folder of a fine-tuning run, or a checkpoint in it, in place of --model and --weights
    #[arg(long, value_name = "RUN")]
    from: Option<PathBuf>,
    /// Side of the images in pixels [default: the network's, or the run's]
    #[arg(long, value_name = "N")]
    image_size: Option<usize>,
    /// Classes of the published weights [default: 1000]
    #[arg(long, value_name = "N", conflicts_with = "from", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    classes: Option<u32>,
    /// Leave the classifier out: the file's is not loaded, so there are features but no predictions
    #[arg(long)]
    pub new_head: bool,
}

impl Choice {
    /// Loads the network and says on standard error what loading did beside copying.
    ///
    /// # Errors
    /// If no weights are named, or as [`Trained::published`] and [`Trained::from_run`].
    pub fn open(&self) -> Result<Trained> {
        let trained = match (&self.from, &self.model, &self.weights) {
            (Some(folder), ..) => Trained::from_run(folder, self.image_size, self.new_head)?,
            (None, Some(name), Some(weights)) => {
                if weights.is_dir() {
                    return Err(Error::format(weights, "a folder, expected a safetensors file; --from takes the folder of a run"));
                }
                let classes = self.classes.map_or(imagenet::CLASSES, |n| n as usize);
                Trained::published(name, &Checkpoint::open(weights)?, classes, self.image_size, self.new_head)?
            }
            (None, Some(name), None) => {
                return Err(Error::usage(format!("no weights for `{name}`: expected --weights FILE (random ones would predict nothing)")));
            }
            (None, None, _) => return Err(Error::usage("no network: expected --model NAME with --weights FILE, or --from RUN")),
        };
        let loaded = &trained.loaded;
        for (what, names) in [
            ("resized for the image size", &loaded.resized),
            ("not used", &loaded.dropped),
            ("left as they were, the new classifier", &loaded.fresh),
        ] {
            if let Some(first) = names.first() {
                let more = if names.len() > 1 { format!(" and {} more", names.len() - 1) } else { String::new() };
                eprintln!("karat: {what}: {first}{more}");
            }
        }
        Ok(trained)
    }

    /// The same for a command that predicts classes.
    ///
    /// # Errors
    /// As [`Choice::open`], or with `--new-head`.
    pub fn open_classifier(&self) -> Result<Trained> {
        if self.new_head {
            return Err(Error::usage("--new-head: an untrained classifier predicts nothing; expected only with `karat features`"));
        }
        self.open()
    }
}

/// A value parser for the number of images at a time.
pub fn batch_size() -> impl clap::builder::TypedValueParser<Value = u32> {
    clap::value_parser!(u32).range(1..=4096)
}

/// Progress on standard error of work that takes longer than two seconds: a bar on a terminal, else a line every ten seconds.
pub struct Meter {
    total: u64,
    done: u64,
    started: Instant,
    said: Option<Instant>,
    bar: Option<ProgressBar>,
}

impl Meter {
    /// Work on `total` images begins.
    pub fn new(total: usize) -> Self {
        Meter { total: total as u64, done: 0, started: Instant::now(), said: None, bar: None }
    }

    /// `images` more are done.
    pub fn advance(&mut self, images: usize) {
        self.done += images as u64;
        if self.started.elapsed() < Duration::from_secs(2) || self.done == self.total {
            return;
        }
        if std::io::stderr().is_terminal() {
            let bar = self.bar.get_or_insert_with(|| {
                let bar = ProgressBar::new(self.total);
                if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} images  {eta} left") {
                    bar.set_style(style);
                }
                bar
            });
            bar.set_position(self.done);
        } else if self.said.is_none_or(|said| said.elapsed() > Duration::from_secs(10)) {
            self.said = Some(Instant::now());
            let left = self.started.elapsed().as_secs_f64() / self.done as f64 * (self.total - self.done) as f64;
            eprintln!("{}/{} images  {}:{:02} left", self.done, self.total, left as u64 / 60, left as u64 % 60);
        }
    }

    /// Writes to standard output without tearing the bar.
    pub fn aside<R>(&self, write: impl FnOnce() -> R) -> R {
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// All is done, after so many seconds.
    pub fn finish(self) -> f64 {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.started.elapsed().as_secs_f64()
    }
}
