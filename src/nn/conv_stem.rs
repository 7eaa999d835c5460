//! `nn.conv_patch_embed`: patches by a few convolutions of stride 2 (XCiT, arXiv 2106.09681).
//!
//! Every stage is `conv 3×3, stride 2, padding 1, no bias → BN → GELU`, without GELU after the last; four stages for patches of 16
//! pixels, three for 8, the width doubling up to C. Each halves the map, rounding up: any image size goes.
//!
//! Backward: the parts in turn. Kept are the image (channels last) and the outputs of the convolutions; norms and GELU are computed
//! again.

use super::batch_norm::{BatchNorm2d, Updates};
use super::conv::{Conv2d, ConvSettings};
use super::conv_norm::{self, NormInput, Then, gelu};
use super::maps::{channels_first, channels_last};
use super::param::{Layout, Names, Params};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// What the stem is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// 16 or 8.
    pub patch: usize,
    /// Channels of the images.
    pub chans: usize,
    /// Width C.
    pub dim: usize,
    /// ε of the norms.
    pub eps: f64,
    /// The share of a batch in the running statistics.
    pub momentum: f64,
}

impl Settings {
    /// From the keys `patch_size`, `in_chans`, `embed_dim`, `bn_eps`, `bn_momentum`.
    pub fn from_config(config: &Config) -> Result<Self> {
        Ok(Settings {
            patch: config.usize_or("patch_size", 16)?,
            chans: config.usize_or("in_chans", 3)?,
            dim: config.usize("embed_dim")?,
            eps: config.f64_or("bn_eps", 1e-5)?,
            momentum: config.f64_or("bn_momentum", 0.1)?,
        })
    }

    fn stages(&self) -> Result<usize> {
        match self.patch {
            16 => Ok(4),
            8 => Ok(3),
            other => Err(Error::config("patch_size", format!("expected 8 or 16, found {other}"))),
        }
    }

    /// Rows and columns of tokens for an image: half of it, rounded up, for every stage.
    pub fn grid(&self, image: [usize; 2]) -> Result<[usize; 2]> {
        let stages = self.stages()?;
        Ok(image.map(|side| (0..stages).fold(side, |side, _| side.div_ceil(2))))
    }
}

/// Convolutions `proj.{2s}.0` and norms `proj.{2s}.1`.
#[derive(Clone, Debug)]
pub struct ConvStem {
    stages: Vec<(Conv2d, BatchNorm2d)>,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    image: Tensor<T>,
    /// The output of every convolution, and what its norm keeps.
    stages: Vec<NormInput<T>>,
}

impl<T: Float> Saved<T> {
    /// Takes the running statistics after the call: none in evaluation.
    pub fn take_updates(&mut self) -> Updates<T> {
        self.stages.iter_mut().flat_map(|(_, norm)| norm.take_updates()).collect()
    }
}

impl ConvStem {
    /// Registers the parameters.
    pub fn new(mut names: Names, settings: Settings) -> Result<Self> {
        let Settings { chans, dim, eps, momentum, .. } = settings;
        let count = settings.stages()?;
        let least = 1 << (count - 1);
        if dim < least {
            return Err(Error::config(
                "embed_dim",
                format!("expected at least {least} for patches of {} pixels, found {dim}", settings.patch),
            ));
        }
        if chans == 0 {
            return Err(Error::config("in_chans", "expected a positive number, found 0"));
        }
        let mut stages = Vec::with_capacity(count);
        let mut inputs = chans;
        for stage in 0..count {
            let outputs = dim >> (count - 1 - stage);
            let conv = ConvSettings { stride: [2; 2], padding: [1; 2], bias: false, ..ConvSettings::new(inputs, outputs, 3) };
            let mut names = names.at(format!("proj.{}", 2 * stage));
            let conv = Conv2d::new(names.at("0"), conv, conv.default_init())?;
            stages.push((conv, BatchNorm2d::new(names.at("1"), outputs, eps, momentum)));
            inputs = outputs;
        }
        Ok(ConvStem { stages })
    }

    /// What the forward pass for images `[b, in, h, w]` costs.
    pub fn cost(&self, [b, c, h, w]: [usize; 4], training: bool) -> Result<Cost> {
        // The image; y is as large as the last convolution's output.
        let mut cost = Cost { flops: 0, activation_bytes: 4 * b * c * h * w };
        let mut map = [h, w];
        let mut last = 0;
        for (conv, norm) in &self.stages {
            let stage = conv.cost([b, map[0], map[1]])?;
            last = stage.activation_bytes;
            cost = cost + stage + Cost { flops: 0, activation_bytes: norm.saved_bytes(training) };
            map = conv.output_size(map)?;
        }
        Ok(cost + Cost { flops: 0, activation_bytes: last })
    }

    /// Tokens `[B, N, C]` of images `[B, in, H, W]`, and their rows and columns.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, training: bool) -> Result<(Tensor<T>, [usize; 2], Saved<T>)> {
        let image = channels_last(image)?;
        let mut x = image.clone();
        let mut stages = Vec::with_capacity(self.stages.len());
        for (index, (conv, norm)) in self.stages.iter().enumerate() {
            let then = if index + 1 < self.stages.len() { Then::Gelu } else { Then::Identity };
            let (y, saved) = conv_norm::forward((conv, p), (norm, p), &x, training, then)?;
            stages.push(saved);
            x = y;
        }
        let [b, h, w, c] = x.dims("map")?;
        Ok((x.reshape([b, h * w, c])?, [h, w], Saved { image, stages }))
    }

    /// The gradient of the images.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let (image, d) = self.backward_params(p, g, saved, dy)?;
        let [b, h, w, c] = image.dims("image")?;
        channels_first(&self.stages[0].0.backward_input(p, [b, h, w, c], &d)?)
    }

    /// The gradients of the parameters; returns the images, channels last, and the gradient of the first convolution's output.
    pub fn backward_params<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        dy: &Tensor<T>,
    ) -> Result<(Tensor<T>, Tensor<T>)> {
        let Saved { image, stages } = saved;
        let mut d = match stages.last() {
            Some((map, _)) => dy.reshape(map.shape())?,
            None => dy.clone(),
        };
        for (index, ((conv, norm), (map, saved))) in self.stages.iter().zip(&stages).enumerate().rev() {
            let d_map = norm.backward(p, g, map, saved, &d)?;
            match index.checked_sub(1) {
                None => {
                    conv.backward_params(g, &image, &d_map)?;
                    d = d_map;
                }
                Some(before) => {
                    let (map, saved) = &stages[before];
                    let normed = self.stages[before].1.again(p, map, saved, false);
                    d = conv.backward(p, g, &gelu(&normed), &d_map)?;
                    elementwise::gelu_backward(d.data_mut(), normed.data(), T::ONE);
                }
            }
        }
        Ok((image, d))
    }
}

/// `nn.conv_patch_embed`.
pub struct ConvPatchEmbed;

impl Operation for ConvPatchEmbed {
    const NAME: &'static str = "nn.conv_patch_embed";
    const PAPER: &'static str = "2106.09681 XCiT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("patch_size", if rng.chance(0.5) { 16 } else { 8 }).set("in_chans", rng.between(1, 3));
        config.set("embed_dim", rng.between(8, 19)).set("bn_eps", 1e-5).set("bn_momentum", 0.1).set("training", rng.chance(0.5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        // In training a channel needs more than two values: those always normalise to ±1.
        let (batch, patch) = (draw.size("batch", 2, 3), config.positive("patch_size")?);
        let (low, high) = if config.bool("training")? { (patch + 1, 2 * patch + 1) } else { (1, patch + 5) };
        let shape = [batch, config.positive("in_chans")?, draw.rng.between(low, high), draw.rng.between(low, high)];
        draw.normal("x", shape);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let (stem, _) = Layout::build(|names| ConvStem::new(names.here(), Settings::from_config(config)?))?;
        stem.cost(inputs.dims("x")?, config.bool("training")?).map(Some)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let training = run.config().bool("training")?;
        let settings = Settings::from_config(run.config())?;
        let (stem, layout) = Layout::build(|names| ConvStem::new(names.here(), settings))?;
        let mut updates = Vec::new();
        run.unary(
            &layout,
            |p, x| {
                let (y, _, mut saved) = stem.forward(p, x, training)?;
                updates = saved.take_updates();
                Ok((y, saved))
            },
            |p, g, saved, dy| stem.backward(p, g, saved, dy),
        )?;
        run.after_buffers(&layout, updates);
        Ok(())
    }
}
