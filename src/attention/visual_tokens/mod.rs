//! `attention.visual_tokens`, `tokenizer.filter`, `tokenizer.recurrent`: Visual Transformers (arXiv 2006.03677).
//!
//! A tokenizer pools a map into L tokens by spatial attention, a transformer mixes them, a projector writes them back into the map by
//! cross-attention: `T = tokenizer(X)`, `T_out = transformer(T)`, `X_out = projector(X, T_out)`. Two formulations:
//! [`equations`] (the paper's, the reference) and [`multihead`] (the appendix's pseudo-code).

pub mod equations;
pub mod multihead;
mod ops;
pub mod spatial;

pub use equations::Widths;
pub use multihead::Heads;
pub use ops::{TokenizerFilter, TokenizerRecurrent, VisualTokensOp};

use crate::case::{Config, Cost};
use crate::error::{Error, Result};
use crate::nn::{Names, Params};
use crate::tensor::{Float, Tensor};

/// Which formulation, with what only it knows.
#[derive(Clone, Copy, Debug)]
pub enum Formulation {
    /// The paper's equations.
    Equations {
        /// D, the width of the transformer's keys and queries.
        attn_dim: usize,
        /// F, the hidden width of the transformer.
        ffn_dim: usize,
        /// D_p, the width of the projector's keys and queries; `None` = C.
        proj_dim: Option<usize>,
        /// Whether W_V exist.
        value_proj: bool,
        /// Whether logits are divided by the root of their width.
        scaled: bool,
    },
    /// The appendix's pseudo-code.
    Multihead(Heads),
}

impl Formulation {
    /// From a configuration, for tokens of this width.
    pub fn from_config(config: &Config, token_channels: usize) -> Result<Self> {
        let number = |key: &str, default: usize| if config.get(key).is_none() { Ok(default) } else { config.positive(key) };
        match config.str_or("formulation", "equations")? {
            "equations" => Ok(Formulation::Equations {
                attn_dim: number("attn_dim", token_channels / 2)?,
                ffn_dim: number("ffn_dim", token_channels)?,
                proj_dim: if config.get("proj_dim").is_none() { None } else { Some(config.positive("proj_dim")?) },
                value_proj: config.bool_or("value_proj", true)?,
                scaled: config.bool_or("scaled", false)?,
            }),
            "multihead" => Ok(Formulation::Multihead(Heads {
                heads: config.positive("heads")?,
                groups: config.positive("groups")?,
                kqv_groups: number("kqv_groups", 1)?,
                pos_size: config.usize("pos_size")?,
                pos_downsample: config.usize("pos_downsample")?,
            })),
            other => Err(Error::config("formulation", format!("expected \"equations\" or \"multihead\", found \"{other}\""))),
        }
    }
}

/// Pools a map into tokens.
#[derive(Clone, Debug)]
pub enum Tokenizer {
    /// The paper's.
    Equations(Box<equations::Tokenizer>),
    /// The appendix's.
    Multihead(Box<multihead::Tokenizer>),
}

/// What a tokenizer's backward pass needs.
pub enum TokenizerSaved<T: Float> {
    /// The paper's.
    Equations(equations::TokenizerSaved<T>),
    /// The appendix's.
    Multihead(Box<multihead::TokenizerSaved<T>>),
}

impl<T: Float> TokenizerSaved<T> {
    /// The attention maps, `[B, L, HW]` or `[B, h', L', HW]`.
    pub fn attn(&self) -> &Tensor<T> {
        match self {
            TokenizerSaved::Equations(saved) => &saved.attn,
            TokenizerSaved::Multihead(saved) => &saved.attn,
        }
    }
}

/// `[B, H, W, C]` as `[B, HW, C]`, and the map's size.
fn pixels<T: Float>(x: &Tensor<T>, channels: usize) -> Result<(Tensor<T>, [usize; 2])> {
    let [b, h, w, c] = x.dims("map [B, H, W, C]")?;
    if c != channels || h * w == 0 {
        return Err(Error::shape("map", format!("[batch, height, width, {channels}] (channels last)"), x.shape()));
    }
    Ok((x.reshape([b, h * w, c])?, [h, w]))
}

impl Tokenizer {
    /// Registers the parameters.
    pub fn new(names: &mut Names, widths: Widths, recurrent: bool, formulation: Formulation) -> Result<Self> {
        if widths.channels == 0 || widths.token_channels == 0 || widths.tokens == 0 {
            return Err(Error::config("num_tokens", format!("expected positive widths and tokens, found {widths:?}")));
        }
        Ok(match formulation {
            Formulation::Equations { value_proj, scaled, .. } => {
                Tokenizer::Equations(Box::new(equations::Tokenizer::new(names, widths, recurrent, value_proj, scaled)?))
            }
            Formulation::Multihead(heads) => Tokenizer::Multihead(Box::new(multihead::Tokenizer::new(names, widths, recurrent, heads)?)),
        })
    }

    /// What it costs on maps `[b, h, w]`: tokens and what is saved.
    pub fn cost(&self, [b, h, w]: [usize; 3]) -> Result<Cost> {
        match self {
            Tokenizer::Equations(tokenizer) => Ok(tokenizer.cost(b, h * w)),
            Tokenizer::Multihead(tokenizer) => tokenizer.cost(b, h * w),
        }
    }

    /// Tokens `[B, L, C_T]` of pixels `[B, HW, C]`.
    fn forward<T: Float>(
        &self,
        p: &Params<T>,
        x: &Tensor<T>,
        map: [usize; 2],
        previous: Option<&Tensor<T>>,
    ) -> Result<(Tensor<T>, TokenizerSaved<T>)> {
        match self {
            Tokenizer::Equations(tokenizer) => {
                let (tokens, saved) = tokenizer.forward(p, x, previous)?;
                Ok((tokens, TokenizerSaved::Equations(saved)))
            }
            Tokenizer::Multihead(tokenizer) => {
                let (tokens, saved) = tokenizer.forward(p, x, map, previous)?;
                Ok((tokens, TokenizerSaved::Multihead(Box::new(saved))))
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        map: [usize; 2],
        previous: Option<&Tensor<T>>,
        saved: TokenizerSaved<T>,
        d_tokens: &Tensor<T>,
        d_attn: Option<&Tensor<T>>,
    ) -> Result<(Tensor<T>, Option<Tensor<T>>)> {
        match (self, saved) {
            (Tokenizer::Equations(layer), TokenizerSaved::Equations(saved)) => layer.backward(p, g, x, previous, saved, d_tokens, d_attn),
            (Tokenizer::Multihead(layer), TokenizerSaved::Multihead(saved)) => {
                layer.backward(p, g, x, map, previous, *saved, d_tokens, d_attn)
            }
            _ => Err(Error::usage("what another formulation saved")),
        }
    }
}

#[derive(Clone, Debug)]
enum Rest {
    Equations(equations::Transformer, Option<equations::Projector>),
    Multihead(multihead::Transformer, Option<multihead::Projector>),
}

/// What a projector's backward pass needs, if there is one: and the tokens that it read.
enum RestSaved<T: Float> {
    Equations(equations::TransformerSaved<T>, Option<(equations::ProjectorSaved<T>, Tensor<T>)>),
    Multihead(multihead::TransformerSaved<T>, Option<(multihead::ProjectorSaved<T>, Tensor<T>)>),
}

/// What a block is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// C, C_T, L.
    pub widths: Widths,
    /// Whether the tokenizer reads the previous tokens.
    pub recurrent: bool,
    /// C_o of the projector, if there is one.
    pub projector: Option<usize>,
    /// Which formulation.
    pub formulation: Formulation,
}

/// One VT block.
#[derive(Clone, Debug)]
pub struct VisualTokens {
    tokenizer: Tokenizer,
    rest: Rest,
    settings: Settings,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    x: Tensor<T>,
    map: [usize; 2],
    previous: Option<Tensor<T>>,
    tokenizer: TokenizerSaved<T>,
    rest: RestSaved<T>,
}

/// Tokens, the map if there is a projector, and what the backward pass needs.
pub type Outputs<T> = (Tensor<T>, Option<Tensor<T>>, Saved<T>);

impl VisualTokens {
    /// Registers `tokenizer.*`, `transformer.*` and, if there is one, `projector.*`.
    pub fn new(names: &mut Names, settings: Settings) -> Result<Self> {
        let Settings { widths, recurrent, projector, formulation } = settings;
        let Widths { channels, token_channels, .. } = widths;
        let tokenizer = Tokenizer::new(&mut names.at("tokenizer"), widths, recurrent, formulation)?;
        let rest = match formulation {
            Formulation::Equations { attn_dim, ffn_dim, proj_dim, value_proj, scaled } => {
                let transformer = equations::Transformer::new(&mut names.at("transformer"), token_channels, attn_dim, ffn_dim, scaled)?;
                let projector = projector.map(|outputs| {
                    let widths = [channels, token_channels, outputs, proj_dim.unwrap_or(channels)];
                    equations::Projector::new(&mut names.at("projector"), widths, value_proj, scaled)
                });
                Rest::Equations(transformer, projector.transpose()?)
            }
            Formulation::Multihead(heads) => {
                let transformer = multihead::Transformer::new(&mut names.at("transformer"), token_channels, heads)?;
                let projector = projector
                    .map(|outputs| multihead::Projector::new(&mut names.at("projector"), [channels, token_channels, outputs], heads));
                Rest::Multihead(transformer, projector.transpose()?)
            }
        };
        Ok(VisualTokens { tokenizer, rest, settings })
    }

    /// What it costs on maps `[b, h, w]`: tokens, the map that comes out and what is saved, beside the inputs.
    pub fn cost(&self, size @ [b, h, w]: [usize; 3]) -> Result<Cost> {
        let (n, Widths { tokens, token_channels, .. }) = (h * w, self.settings.widths);
        let mut cost = self.tokenizer.cost(size)?;
        match &self.rest {
            Rest::Equations(transformer, projector) => {
                cost = cost + transformer.cost(b, tokens);
                if let Some(projector) = projector {
                    cost = cost + projector.cost(b, n, tokens, token_channels);
                }
            }
            Rest::Multihead(transformer, projector) => {
                cost = cost + transformer.cost(b, tokens);
                if let Some(projector) = projector {
                    cost = cost + projector.cost(b, n, tokens);
                }
            }
        }
        Ok(cost)
    }

    fn check_previous<T: Float>(&self, batch: usize, previous: Option<&Tensor<T>>) -> Result<()> {
        let Widths { tokens, token_channels, .. } = self.settings.widths;
        match previous {
            Some(previous) => previous.expect_shape("input `tokens`", [batch, tokens, token_channels]),
            None => Ok(()),
        }
    }

    /// Tokens `[B, L, C_T]` and, with a projector, the map `[B, H, W, C_o]`. `previous` are the tokens of the previous block.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, previous: Option<Tensor<T>>) -> Result<Outputs<T>> {
        let (x, map @ [h, w]) = pixels(x, self.settings.widths.channels)?;
        let batch = x.shape()[0];
        self.check_previous(batch, previous.as_ref())?;
        let (tokens, tokenizer) = self.tokenizer.forward(p, &x, map, previous.as_ref())?;
        let as_map = |y: Tensor<T>| y.reshape([batch, h, w, y.shape()[2]]);
        macro_rules! rest {
            ($variant:path, $transformer:expr, $projector:expr) => {{
                let (tokens, transformer) = $transformer.forward(p, tokens)?;
                match $projector {
                    None => (tokens, None, $variant(transformer, None)),
                    Some(projector) => {
                        let (y, saved) = projector.forward(p, &x, &tokens)?;
                        (tokens.clone(), Some(as_map(y)?), $variant(transformer, Some((saved, tokens))))
                    }
                }
            }};
        }
        let (tokens, y, rest) = match &self.rest {
            Rest::Equations(transformer, projector) => rest!(RestSaved::Equations, transformer, projector),
            Rest::Multihead(transformer, projector) => rest!(RestSaved::Multihead, transformer, projector),
        };
        Ok((tokens, y, Saved { x, map, previous, tokenizer, rest }))
    }

    /// `dx` `[B, H, W, C]` and, of a recurrent tokenizer, the gradient of the previous tokens.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_tokens: Tensor<T>,
        dy: Option<&Tensor<T>>,
    ) -> Result<(Tensor<T>, Option<Tensor<T>>)> {
        let Saved { x, map, previous, tokenizer, rest } = saved;
        let [b, n, c] = x.dims("map")?;
        let (mut d_tokens, mut dx) = (d_tokens, None);
        macro_rules! rest {
            ($layer:expr, $transformer:expr, $projector:expr, $saved:expr, $read:expr) => {{
                if let (Some(projector), Some((saved, tokens)), Some(dy)) = ($projector, $read, dy) {
                    let dy = dy.reshape([b, n, dy.shape()[dy.shape().len() - 1]])?;
                    let (d_map, more) = projector.backward(p, g, &x, &tokens, saved, &dy)?;
                    crate::kernel::elementwise::add(d_tokens.data_mut(), more.data());
                    dx = Some(d_map);
                }
                $transformer.backward(p, g, $saved, &d_tokens)?
            }};
        }
        let d_tokens = match (&self.rest, rest) {
            (Rest::Equations(t, j), RestSaved::Equations(saved, read)) => rest!(self, t, j, saved, read),
            (Rest::Multihead(t, j), RestSaved::Multihead(saved, read)) => rest!(self, t, j, saved, read),
            _ => return Err(Error::usage("what another formulation saved")),
        };
        let (mut d_map, d_previous) = self.tokenizer.backward(p, g, &x, map, previous.as_ref(), tokenizer, &d_tokens, None)?;
        if let Some(dx) = dx {
            crate::kernel::elementwise::add(d_map.data_mut(), dx.data());
        }
        Ok((d_map.reshape([b, map[0], map[1], c])?, d_previous))
    }
}
