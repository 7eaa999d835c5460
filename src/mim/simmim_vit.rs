//! SimMIM's plain encoder (arXiv 2111.09886): BEiT's [`Encoder`], which sees all tokens; its class token is dropped in the end.
//!
//! With mean pooling the norm is missing and `fc_norm` exists without being used: so the authors' code has it.

use crate::attention::beit::{self, Biases};
use crate::case::Config;
use crate::error::{Error, Result};
use crate::model::beit::{Encoder, EncoderSaved, Settings, without_class_token, without_class_token_backward};
use crate::model::beit_block::{self, BEIT_NAMES};
use crate::model::vit_block::hidden_width;
use crate::nn::{Init, LayerNorm, Names, Params};
use crate::tensor::{Float, Tensor};

/// The encoder. All parameters are registered under the names that it is given (`encoder.*` in SimMIM).
#[derive(Clone, Debug)]
pub struct SimMimVit {
    encoder: Encoder,
}

/// What [`SimMimVit::backward`] needs.
pub type Saved<T> = EncoderSaved<T>;

impl SimMimVit {
    /// Registers the parameters from the keys of `mim.simmim` with `encoder` `"vit"`.
    pub fn new(config: &Config, names: &mut Names) -> Result<Self> {
        let (dim, heads, eps) = (config.positive("embed_dim")?, config.positive("num_heads")?, config.f64_or("norm_eps", 1e-6)?);
        if !dim.is_multiple_of(heads) {
            return Err(Error::config("num_heads", format!("expected a divisor of embed_dim {dim}, found {heads}")));
        }
        let biases = if config.bool("qkv_bias")? { Biases::QueryValue } else { Biases::None };
        let mean = config.bool("use_mean_pooling")?;
        let settings = Settings {
            image: [config.positive("img_size")?; 2],
            patch: config.positive("patch_size")?,
            chans: config.positive("in_chans")?,
            depth: config.usize("depth")?,
            block: beit_block::Settings {
                attention: beit::Settings { biases, ..beit::Settings::new(dim, heads) },
                hidden: hidden_width(dim, config.f64_or("mlp_ratio", 4.0)?)?,
                eps,
                layer_scale: config.bool("layer_scale")?.then_some(0.1),
                drop_path: config.f64_or("drop_path_rate", 0.0)?,
                names: BEIT_NAMES,
            },
            mask_token: true,
            positions: config.bool("use_ape")?,
            own_tables: config.bool("use_rpb")?,
            shared_table: config.bool("use_shared_rpb")?,
            norm: !mean,
            patch_init: Init::NORMAL_02,
        };
        let encoder = Encoder::new(names, settings)?;
        if mean {
            LayerNorm::new(names.at("fc_norm"), dim, eps);
        }
        Ok(SimMimVit { encoder })
    }

    /// Rows and columns of tokens.
    pub fn grid(&self) -> [usize; 2] {
        self.encoder.grid()
    }

    /// The width F of the tokens.
    pub fn features(&self) -> usize {
        self.encoder.features()
    }

    /// Tokens `[B, N, C]` of `image`, after the norm and without the class token; `hidden` `[B, N]` says where the mask token stands.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, hidden: Option<&[bool]>) -> Result<(Tensor<T>, Saved<T>)> {
        let (y, saved) = self.encoder.forward(p, image, hidden)?;
        Ok((without_class_token(&y)?, saved))
    }

    /// [`forward`](Self::forward) of whole images without keeping anything for a backward pass.
    pub fn infer<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<Tensor<T>> {
        without_class_token(&self.encoder.infer(p, image)?)
    }

    /// Adds the gradients of the parameters; the gradient of the image if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_tokens: &Tensor<T>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        self.encoder.backward(p, g, saved, &without_class_token_backward(d_tokens)?, want_image)
    }
}
