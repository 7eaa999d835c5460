//! `karat reconstruct`: what a pre-trained network sees behind the mask.

use std::io::Write;
use std::path::PathBuf;

use super::picture;
use crate::data::read_image;
use crate::mim::{Objective, StepKey, methods};
use crate::nn::Params;
use crate::tensor::Tensor;
use crate::tensor::random::{Purpose, Rng};
use crate::train::{CHECKPOINT, Checkpoint, saved_config};
use crate::{Error, Result};

/// Draw what a pre-trained network makes of masked images
///
/// One column per image; rows: original, masked, reconstructed (visible pixels pasted in).
#[derive(clap::Args)]
#[command(after_help = "Example: karat reconstruct --from runs/mine cat.png dog.jpg -o seen.png")]
pub struct Args {
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

/// Runs the command; the name of the picture goes to `out`.
///
/// # Errors
/// A missing or damaged checkpoint, an unreadable image.
pub fn run(args: Args, out: &mut dyn Write) -> Result<()> {
    let file = Checkpoint::open(args.from.join(CHECKPOINT))?;
    let config = saved_config(&file)?;
    let objective = methods::build(&config.method, &config.model, config.image_size, config.mask_ratio)?;
    let mut params = Params::zeros(objective.layout());
    file.load(&mut params)?;

    let (size, channels) = objective.image_shape();
    let transform = config.test_transform((size, channels))?;
    let mut images = Tensor::zeros([args.images.len(), channels, size, size]);
    for (path, pixels) in args.images.iter().zip(images.data_mut().chunks_exact_mut(transform.len())) {
        // The centre crop draws nothing from the stream.
        transform.apply(&read_image(path)?, &mut Rng::new(args.seed, Purpose::Augment, 0, 0), pixels)?;
    }
    let key = StepKey { seed: args.seed, step: 0 };
    picture::reconstructions(&args.output, &objective, &params, &images, key, config.normalization())?;
    writeln!(out, "wrote {}", args.output.display()).map_err(|e| Error::io("standard output", e))
}
