//! `karat features`: what a network makes of images, as files.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::network::{Choice, Meter, batch_size};
use super::{Outcome, say};
use crate::data::{npy, read_image};
use crate::error::{Error, Result};
use crate::nn::{Named, write_tensors};
use crate::tensor::{Shape, Tensor};

/// What the head sees.
const POOLED: &str = "pooled";

/// Write a network's features of images to a file
///
/// A safetensors file has `pooled` (what the classifier sees), `logits` and the output of each stage, the images along the first axis; an
/// npy file has `pooled` alone.
#[derive(Args)]
#[command(
    after_help = "Example: karat features --model deit_tiny_patch16_224 --weights deit_tiny.safetensors *.jpg -o features.safetensors"
)]
pub struct Features {
    #[command(flatten)]
    network: Choice,
    /// PNG or JPEG files
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Images at a time
    #[arg(long, value_name = "B", default_value_t = 16, value_parser = batch_size())]
    batch: u32,
    /// The file to write (.safetensors or .npy)
    #[arg(short, long, value_name = "FILE", value_parser = output)]
    output: PathBuf,
}

fn output(path: &str) -> Result<PathBuf, String> {
    match Path::new(path).extension().and_then(|e| e.to_str()) {
        Some("safetensors" | "npy") => Ok(path.into()),
        _ => Err("expected a file called .safetensors or .npy".into()),
    }
}

impl Features {
    /// Runs the command; what was written goes to `out`.
    ///
    /// # Errors
    /// A network without weights, weights of another one, an unreadable image, a file that cannot be written.
    pub(super) fn run(&self, out: &mut dyn Write) -> Result<Outcome> {
        let trained = self.network.open()?;
        let only_pooled = self.output.extension().is_some_and(|e| e == "npy");
        let wanted = |name: &str| if only_pooled { name == POOLED } else { name != "logits" || !self.network.new_head };
        let mut meter = Meter::new(self.images.len());
        let mut all: Vec<(String, Rows)> = Vec::new();
        for paths in self.images.chunks(self.batch as usize) {
            let images = trained.prepare(paths.len(), |i| read_image(&paths[i]))?;
            for (name, tensor) in trained.features(&images)?.into_iter().filter(|(name, _)| wanted(name)) {
                match all.iter_mut().find(|(known, _)| *known == name) {
                    Some((name, rows)) => rows.push(name, &tensor)?,
                    None => all.push((name, Rows { shape: tensor.shape(), values: tensor.data().to_vec() })),
                }
            }
            meter.advance(paths.len());
        }
        meter.finish();
        let n = self.images.len();
        let tensors: Vec<Named<f32>> =
            all.into_iter().map(|(name, rows)| rows.tensor(&name, n).map(|t| (name, t))).collect::<Result<_>>()?;
        if only_pooled {
            let (_, pooled) = tensors.first().ok_or_else(|| Error::missing("pooled output of the network"))?;
            npy::write(&self.output, &pooled.shape(), pooled.data())?;
        } else {
            let images: Vec<String> = self.images.iter().map(|path| path.display().to_string()).collect();
            let metadata = [
                ("karat", env!("CARGO_PKG_VERSION").to_string()),
                ("model", trained.model.variant.name.to_string()),
                ("image_size", trained.model.size.to_string()),
                ("images", json!(images).to_string()),
            ];
            write_tensors(&self.output, &tensors, &metadata)?;
        }
        let list: Vec<String> = tensors.iter().map(|(name, tensor)| format!("{name} {:?}", tensor.shape())).collect();
        say(out, format!("wrote {}: {}", self.output.display(), list.join(", ")))?;
        Ok(Outcome::Good)
    }
}

/// One feature of the images so far.
struct Rows {
    /// Of one batch.
    shape: Shape,
    values: Vec<f32>,
}

impl Rows {
    fn push(&mut self, name: &str, tensor: &Tensor<f32>) -> Result<()> {
        if tensor.shape().get(1..) != self.shape.get(1..) {
            return Err(Error::shape(name, self.shape, tensor.shape()));
        }
        self.values.extend_from_slice(tensor.data());
        Ok(())
    }

    /// All images along the first axis.
    fn tensor(self, name: &str, images: usize) -> Result<Tensor<f32>> {
        let mut shape = self.shape.to_vec();
        match shape.first_mut() {
            Some(first) => *first = images,
            None => return Err(Error::shape(name, "one row per image", self.shape)),
        }
        Tensor::new(Shape::try_new(&shape)?, &self.values)
    }
}
