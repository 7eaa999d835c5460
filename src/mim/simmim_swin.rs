//! SimMIM's Swin encoder (arXiv 2111.09886): every token is encoded; the masked ones start as `mask_token`.

use crate::case::Config;
use crate::error::Result;
use crate::model::swin::{Encoder, EncoderSaved, Plan, Settings};
use crate::nn::mask_token::{mix_token, mix_token_backward};
use crate::nn::{Init, Names, Param, Params, patch_embed};
use crate::tensor::{Float, Tensor};

/// A dense Swin encoder with a mask token: parameters as `model.swin`'s without head, and `mask_token`.
#[derive(Clone, Debug)]
pub struct SimMimSwin {
    encoder: Encoder,
    mask_token: Param,
    plan: Plan,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    embed: patch_embed::Saved<T>,
    encoder: EncoderSaved<T>,
    hidden: Option<Vec<bool>>,
}

impl SimMimSwin {
    /// The encoder of a configuration (keys of `mim.simmim` with `encoder: "swin"`).
    pub fn new(config: &Config, names: &mut Names) -> Result<Self> {
        let encoder = Encoder::new(names, Settings::from_config(config, 1e-5)?)?;
        let mask_token = names.param("mask_token", [1, 1, encoder.settings().embed_dim], Init::NORMAL_02);
        Ok(SimMimSwin { plan: encoder.dense_plan()?, mask_token, encoder })
    }

    /// Rows and columns of the output.
    pub fn grid(&self) -> [usize; 2] {
        self.encoder.grids().last().copied().unwrap_or_default()
    }

    /// The width of the output.
    pub fn features(&self) -> usize {
        self.encoder.width()
    }

    /// Tokens `[B, N, F]` of the last stage; `hidden` names masked tokens of the first, `[B, H/P, W/P]`; without it whole
    /// images are encoded.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, hidden: Option<&[bool]>) -> Result<(Tensor<T>, Saved<T>)> {
        let (mut x, embed) = self.encoder.embed(p, image, None)?;
        if let Some(hidden) = hidden {
            mix_token(p, self.mask_token, &mut x, hidden)?;
        }
        let (y, encoder) = self.encoder.forward(p, x, &self.plan, None)?;
        Ok((y, Saved { embed, encoder, hidden: hidden.map(<[bool]>::to_vec) }))
    }

    /// Adds the gradients of the parameters; returns the image's, if it is wanted.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        dy: &Tensor<T>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let mut dx = self.encoder.backward(p, g, saved.encoder, &self.plan, None, dy)?;
        if let Some(hidden) = &saved.hidden {
            mix_token_backward(g, self.mask_token, &mut dx, hidden)?;
        }
        if want_image {
            return Ok(Some(self.encoder.patch_embed().backward(p, g, &saved.embed, &dx, None)?));
        }
        self.encoder.patch_embed().backward_params(p, g, &saved.embed, &dx)?;
        Ok(None)
    }
}
