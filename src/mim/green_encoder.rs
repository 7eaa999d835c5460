//! The encoders that GreenMIM pre-trains on visible tokens: Swin (the default), or Twins (`encoder: "twins"`).

use crate::case::Config;
use crate::error::{Error, Result};
use crate::model::{green_swin, green_twins, swin};
use crate::nn::{Names, Params, patch_embed, xavier};
use crate::tensor::{Float, Tensor};

/// A hierarchical network over the visible tokens of a coarse mask.
#[derive(Clone, Debug)]
pub enum GreenEncoder {
    /// Swin.
    Swin(swin::Encoder),
    /// Twins.
    Twins(green_twins::Encoder),
}

/// The visible tokens of all stages.
pub enum Visible {
    /// Swin's.
    Swin(green_swin::Visible),
    /// Those of Twins.
    Twins(green_twins::Plan),
}

/// What the backward pass needs.
pub enum Saved<T: Float> {
    /// Swin's.
    Swin(patch_embed::Saved<T>, swin::EncoderSaved<T>),
    /// Those of Twins.
    Twins(green_twins::Saved<T>),
}

fn mixed_up() -> Error {
    Error::usage("an encoder got what belongs to another one")
}

impl GreenEncoder {
    /// Registers the parameters from the keys of `model.green_swin` or `model.green_twins`.
    pub fn new(names: &mut Names, config: &Config) -> Result<Self> {
        if config.get("encoder").is_some() && config.choice("encoder", &["swin", "twins"])? == "twins" {
            return Ok(GreenEncoder::Twins(green_twins::Encoder::new(names, green_twins::EncoderSettings::from_config(config)?)?));
        }
        let settings = swin::Settings { init: xavier, ..swin::Settings::from_config(config, 1e-6)? };
        let encoder = swin::Encoder::new(names, settings)?;
        let (grids, settings) = (encoder.grids(), encoder.settings());
        let [side, width] = *grids.last().unwrap_or(&[0, 0]);
        let cell = settings.patch_size << (grids.len() - 1);
        if side != width || side * cell != settings.img_size[0] {
            let message = format!("expected a square of whole {cell}-pixel cells, found {:?}", settings.img_size);
            return Err(Error::config("img_size", message));
        }
        Ok(GreenEncoder::Swin(encoder))
    }

    /// The width of the output.
    pub fn width(&self) -> usize {
        match self {
            GreenEncoder::Swin(encoder) => encoder.width(),
            GreenEncoder::Twins(encoder) => encoder.settings().embed_dims.last().copied().unwrap_or(0),
        }
    }

    /// Side of the images and their channels.
    pub fn image(&self) -> (usize, usize) {
        match self {
            GreenEncoder::Swin(encoder) => (encoder.settings().img_size[0], encoder.settings().in_chans),
            GreenEncoder::Twins(encoder) => (encoder.settings().img_size, encoder.settings().in_chans),
        }
    }

    /// Cells per side: tokens of the last stage.
    pub fn cells(&self) -> usize {
        match self {
            GreenEncoder::Swin(encoder) => encoder.grids().last().map_or(0, |grid| grid[0]),
            GreenEncoder::Twins(encoder) => encoder.settings().cells(),
        }
    }

    /// ε of all norms.
    pub fn norm_eps(&self) -> f64 {
        match self {
            GreenEncoder::Swin(encoder) => encoder.settings().norm_eps,
            GreenEncoder::Twins(encoder) => encoder.settings().norm_eps,
        }
    }

    /// The visible tokens under a mask over the cells (`true` = hidden).
    pub fn visible(&self, hidden: &[bool]) -> Result<Visible> {
        Ok(match self {
            GreenEncoder::Swin(encoder) => Visible::Swin(green_swin::visible(encoder, hidden)?),
            GreenEncoder::Twins(encoder) => Visible::Twins(encoder.plan(hidden)?),
        })
    }

    /// The normed tokens of the visible cells, in raster order: `[B, K, width]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, seen: &Visible) -> Result<(Tensor<T>, Saved<T>)> {
        match (self, seen) {
            (GreenEncoder::Swin(encoder), Visible::Swin(seen)) => {
                let (tokens, embed) = encoder.embed(p, image, Some(&seen.keep))?;
                let (y, saved) = encoder.forward(p, tokens, &seen.plan, Some(&seen.keep))?;
                Ok((y, Saved::Swin(embed, saved)))
            }
            (GreenEncoder::Twins(encoder), Visible::Twins(plan)) => {
                let (y, saved) = encoder.forward(p, image, plan)?;
                Ok((y, Saved::Twins(saved)))
            }
            _ => Err(mixed_up()),
        }
    }

    /// Adds the gradients of the parameters; the gradient of the image if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        seen: &Visible,
        dy: &Tensor<T>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let (d, embed, layer, keep) = match (self, saved, seen) {
            (GreenEncoder::Swin(encoder), Saved::Swin(embed, saved), Visible::Swin(seen)) => {
                let d = encoder.backward(p, g, saved, &seen.plan, Some(&seen.keep), dy)?;
                (d, embed, encoder.patch_embed(), &seen.keep)
            }
            (GreenEncoder::Twins(encoder), Saved::Twins(saved), Visible::Twins(plan)) => {
                let (d, embed) = encoder.backward(p, g, saved, plan, dy)?;
                (d, embed, encoder.patch_embed(), &plan.keep)
            }
            _ => return Err(mixed_up()),
        };
        if want_image {
            return layer.backward(p, g, &embed, &d, Some(keep)).map(Some);
        }
        layer.backward_params(p, g, &embed, &d)?;
        Ok(None)
    }
}
