//! `karat predict`: the likeliest classes of images.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value as Json, json};

use super::network::{Choice, Meter, batch_size};
use super::{Outcome, say};
use crate::Result;
use crate::data::read_image;
use crate::model::trained::{softmax, top};

/// Say what is in images: the likeliest classes, with their probabilities
///
/// Images are prepared as for the published accuracies: shorter side resized (bicubic, anti-aliased), centre cut out, normalised.
#[derive(Args)]
#[command(after_help = "Example: karat predict --model deit_tiny_patch16_224 --weights deit_tiny.safetensors cat.jpg dog.png")]
pub struct Predict {
    #[command(flatten)]
    network: Choice,
    /// PNG or JPEG files
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// How many classes to name
    #[arg(long, value_name = "K", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    top: u32,
    /// Images at a time
    #[arg(long, value_name = "B", default_value_t = 16, value_parser = batch_size())]
    batch: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Predict {
    /// Runs the command; predictions go to `out` in the order of the images.
    ///
    /// # Errors
    /// A network without weights, weights of another one, an unreadable image.
    pub(super) fn run(&self, out: &mut dyn Write) -> Result<Outcome> {
        let trained = self.network.open_classifier()?;
        let name = |class: usize| trained.class_name(class).map_or_else(|| format!("class {class}"), String::from);
        let mut meter = Meter::new(self.images.len());
        let mut all = Vec::new();
        for paths in self.images.chunks(self.batch as usize) {
            let logits = trained.logits(&trained.prepare(paths.len(), |i| read_image(&paths[i]))?)?;
            meter.advance(paths.len());
            for (path, logits) in paths.iter().zip(logits.data().chunks_exact(trained.classes())) {
                let probabilities = softmax(logits);
                let best = top(logits, self.top as usize);
                if self.json {
                    let best =
                        best.iter().map(|&class| json!({ "class": class, "name": name(class), "probability": probabilities[class] }));
                    all.push(json!({ "image": path.display().to_string(), "top": best.collect::<Json>() }));
                    continue;
                }
                meter.aside(|| {
                    say(out, path.display())?;
                    best.iter().try_for_each(|&class| say(out, format!("{:>8.2} %  {}", 100.0 * probabilities[class], name(class))))
                })?;
            }
        }
        meter.finish();
        if self.json {
            say(out, Json::Array(all))?;
        }
        Ok(Outcome::Good)
    }
}
