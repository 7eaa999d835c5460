//! `karat reconstruct`: what a pre-trained network sees behind the mask.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::{Outcome, objective, picture, say};
use crate::Result;
use crate::data::read_image;
use crate::nn::{Params, StepKey};
use crate::tensor::Tensor;
use crate::tensor::random::{Purpose, Rng};
use crate::train::{CHECKPOINT, Checkpoint, saved_config};

/// Draw what a pre-trained network makes of masked images
///
/// One column per image; rows: original, masked, reconstructed (visible pixels pasted in).
#[derive(Args)]
#[command(after_help = "Example: karat reconstruct --from runs/mine cat.png dog.jpg -o seen.png")]
pub struct Reconstruct {
    /// The folder of a pre-training run
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// PNG or JPEG files
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Seed of the masks
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// The PNG file to write
    #[arg(short, long, value_name = "FILE", default_value = "reconstruction.png")]
    output: PathBuf,
}

impl Reconstruct {
    /// Runs the command; the name of the picture goes to `out`.
    ///
    /// # Errors
    /// A missing or damaged checkpoint, an unreadable image.
    pub(super) fn run(self, out: &mut dyn Write) -> Result<Outcome> {
        let file = Checkpoint::open(self.from.join(CHECKPOINT))?;
        let config = saved_config(&file)?;
        let objective = objective(&config)?;
        let mut params = Params::zeros(objective.layout());
        file.load(&mut params)?;

        let (size, channels) = objective.image_shape();
        let transform = config.test_transform((size, channels))?;
        let mut images = Tensor::zeros([self.images.len(), channels, size, size]);
        for (path, pixels) in self.images.iter().zip(images.data_mut().chunks_exact_mut(transform.len())) {
            // The centre crop draws nothing from the stream.
            transform.apply(&read_image(path)?, &mut Rng::new(self.seed, Purpose::Augment, 0, 0), pixels)?;
        }
        let key = StepKey { seed: self.seed, step: 0 };
        picture::reconstructions(&self.output, &*objective, &params, &images, key, config.normalization())?;
        say(out, format!("wrote {}", self.output.display()))?;
        Ok(Outcome::Good)
    }
}
