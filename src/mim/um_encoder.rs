//! The encoders of UM-MAE (arXiv 2205.10063): a pyramid (PVT or Swin) on the compact map of kept patches, or a plain ViT on the kept
//! patches. Secondarily masked tokens are `vis_mask_token` (in Swin after the norm of the patch embedding, which so learns from it too).
//!
//! Only kept patches are embedded.

use rayon::prelude::*;

use super::mask::{mix_row, mix_row_backward};
use super::uniform::Compact;
use crate::case::Config;
use crate::error::{Error, Result};
use crate::kernel::{elementwise, rows};
use crate::model::pvt;
use crate::model::um_swin::{self, Positions};
use crate::model::vit_encoder::{Trunk, TrunkSaved, mae_block_settings};
use crate::nn::{Init, LayerNorm, Names, Param, Params, Pass, PatchEmbed, Stats, patch_embed, xavier};
use crate::tensor::{Float, Tensor};

/// What the encoder works on: the kept patches of every image, and which of them are secondarily masked.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Images B.
    pub batch: usize,
    /// Kept patches `[B, V]`: of a pyramid by block, of a ViT in raster order.
    pub kept: Vec<u32>,
    /// Secondarily masked ones among them, `[B, V]`.
    pub masked: Vec<bool>,
    /// The compact map of a pyramid.
    pub compact: Option<Compact>,
}

#[derive(Clone, Debug)]
enum Pyramid {
    /// With its fixed positions.
    Pvt(pvt::Encoder, Param),
    Swin(um_swin::Encoder),
}

enum PyramidPlans {
    Pvt(Vec<pvt::Plan>),
    Swin(um_swin::Plans),
}

enum PyramidSaved<T: Float> {
    Pvt(pvt::EncoderSaved<T>),
    Swin(um_swin::EncoderSaved<T>),
}

impl Pyramid {
    /// The plans for maps of `side × side` tokens at `positions` (row, column).
    fn plans(&self, side: usize, positions: Vec<[f64; 2]>) -> Result<PyramidPlans> {
        Ok(match self {
            Pyramid::Pvt(encoder, _) => PyramidPlans::Pvt(encoder.plans(side)?),
            Pyramid::Swin(encoder) => PyramidPlans::Swin(encoder.plans(Positions { side, pairs: positions })?),
        })
    }

    fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>, plans: &PyramidPlans) -> Result<(Tensor<T>, PyramidSaved<T>)> {
        match (self, plans) {
            (Pyramid::Pvt(encoder, _), PyramidPlans::Pvt(plans)) => {
                let (y, saved) = encoder.forward(p, x, plans)?;
                Ok((y, PyramidSaved::Pvt(saved)))
            }
            (Pyramid::Swin(encoder), PyramidPlans::Swin(plans)) => {
                let (y, saved) = encoder.forward(p, x, plans)?;
                Ok((y, PyramidSaved::Swin(saved)))
            }
            _ => Err(Error::usage("an encoder got the plan of another one")),
        }
    }

    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: PyramidSaved<T>,
        plans: &PyramidPlans,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        match (self, saved, plans) {
            (Pyramid::Pvt(encoder, _), PyramidSaved::Pvt(saved), PyramidPlans::Pvt(plans)) => encoder.backward(p, g, saved, plans, dy),
            (Pyramid::Swin(encoder), PyramidSaved::Swin(saved), PyramidPlans::Swin(plans)) => encoder.backward(p, g, saved, plans, dy),
            _ => Err(Error::usage("an encoder got what another one saved")),
        }
    }
}

/// The network behind the patch embedding.
#[derive(Clone, Debug)]
enum Net {
    /// With the norm after the last block.
    Pyramid(Pyramid, LayerNorm),
    /// Blocks and norm; `cls_token` and `pos_embed`.
    Vit { trunk: Trunk, class: Param, positions: Param },
}

/// An encoder with its patch embedding and, if patches are secondarily masked, `vis_mask_token`.
#[derive(Clone, Debug)]
pub struct Encoder {
    embed: PatchEmbed,
    token: Option<Param>,
    net: Net,
    width: usize,
    dim: usize,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    embed: patch_embed::Saved<T>,
    /// The statistics of the norm of `vis_mask_token`.
    token: Option<Stats<T>>,
    masked: Vec<bool>,
    net: NetSaved<T>,
}

enum NetSaved<T: Float> {
    Pyramid { plans: PyramidPlans, blocks: PyramidSaved<T>, last: Tensor<T>, stats: Stats<T> },
    Vit(TrunkSaved<T>),
}

/// ε of all norms outside the blocks of a pyramid.
const EPS: f64 = 1e-6;

impl Encoder {
    /// Registers the parameters from the keys of `mim.um_mae`; `masks` says whether there is a `vis_mask_token`.
    pub fn new(names: &mut Names, config: &Config, masks: bool) -> Result<Self> {
        let (image, patch, chans) = (config.positive("img_size")?, config.positive("patch_size")?, config.positive("in_chans")?);
        let kind = config.choice("encoder", &["pvt", "swin", "vit"])?;
        let stages = if kind == "pvt" { Some(pvt::Stages::from_config(config)?) } else { None };
        let dim = match &stages {
            Some(stages) => stages.embed_dims[0],
            None => config.positive("embed_dim")?,
        };
        let norm_eps = (kind == "swin").then_some(EPS);
        let init = xavier(chans * patch * patch, dim);
        let embed = PatchEmbed::new(names.at("patch_embed"), [image; 2], patch, chans, dim, norm_eps, init)?;
        let [side, _] = embed.grid();
        let token = masks.then(|| names.param("vis_mask_token", [1, 1, dim], Init::NORMAL_02));
        let (net, width) = match (kind, stages) {
            ("pvt", Some(stages)) => {
                let positions = names.buffer("pos_embed", [1, side * side, dim], Init::sincos2d(dim, side, 0)?);
                let encoder = pvt::Encoder::new(names, &stages)?;
                let norm = LayerNorm::new(names.at("norm"), stages.width(), EPS);
                (Net::Pyramid(Pyramid::Pvt(encoder, positions), norm), stages.width())
            }
            ("swin", _) => {
                let settings = um_swin::EncoderSettings::from_config(config)?;
                let encoder = um_swin::Encoder::new(names, &settings)?;
                let norm = LayerNorm::new(names.at("norm"), settings.width(), EPS);
                (Net::Pyramid(Pyramid::Swin(encoder), norm), settings.width())
            }
            _ => {
                let class = names.param("cls_token", [1, 1, dim], Init::NORMAL_02);
                let positions = names.buffer("pos_embed", [1, 1 + side * side, dim], Init::sincos2d(dim, side, 1)?);
                let block = mae_block_settings(dim, config.positive("num_heads")?, config.f64_or("mlp_ratio", 4.0)?, EPS);
                (Net::Vit { trunk: Trunk::new(names, "", config.usize("depth")?, block, true)?, class, positions }, dim)
            }
        };
        Ok(Encoder { embed, token, net, width, dim })
    }

    /// The number of stages a pyramid has by its configuration; 0 for a ViT.
    pub fn stages(config: &Config) -> Result<usize> {
        Ok(if config.str("encoder")? == "vit" { 0 } else { config.usizes("depths")?.len() })
    }

    /// The width of the output.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Tokens per side of the full map.
    pub fn side(&self) -> usize {
        self.embed.grid()[0]
    }

    /// The normed tokens: of a pyramid its last map `[B, N', width]`; of a ViT the class token and the kept patches `[B, 1 + V, width]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, seen: &Seen) -> Result<(Tensor<T>, Saved<T>)> {
        let (tokens, masked) = match &seen.compact {
            Some(compact) => (&compact.tokens, compact.masked_tokens(&seen.masked)),
            None => (&seen.kept, seen.masked.clone()),
        };
        let (mut x, embed) = self.embed.forward_each(p, image, tokens)?;
        let mut token = None;
        if let Some(param) = self.token {
            let row = Tensor::new([1, self.dim], p.get(param))?;
            match self.embed.norm() {
                None => mix_row(row.data(), &mut x, &masked)?,
                Some(norm) => {
                    let (row, stats) = norm.forward(p, &row)?;
                    mix_row(row.data(), &mut x, &masked)?;
                    token = Some(stats);
                }
            }
        }
        let side = self.side();
        let (y, net) = match &self.net {
            Net::Pyramid(pyramid, norm) => {
                let compact = seen.compact.as_ref().ok_or_else(|| Error::usage("a pyramid needs a compact map"))?;
                if let Pyramid::Pvt(_, positions) = pyramid {
                    self.add_positions(&mut x, p.buffer(*positions), tokens);
                }
                let at = tokens.iter().map(|&t| [(t as usize / side) as f64, (t as usize % side) as f64]).collect();
                let plans = pyramid.plans(compact.side, at)?;
                let (last, blocks) = pyramid.forward(p, x, &plans)?;
                let (y, stats) = norm.forward(p, &last)?;
                (y, NetSaved::Pyramid { plans, blocks, last, stats })
            }
            Net::Vit { trunk, class, positions } => {
                let (front, rest) = p.buffer(*positions).split_at(self.dim);
                self.add_positions(&mut x, rest, tokens);
                let mut class = Tensor::new([self.dim], p.get(*class))?;
                elementwise::add(class.data_mut(), front);
                let (y, saved) = trunk.forward(p, with_row(&x, class.data())?)?;
                (y, NetSaved::Vit(saved))
            }
        };
        Ok((y, Saved { embed, token, masked, net }))
    }

    /// Adds to every token the row of `table` of its place.
    fn add_positions<T: Float>(&self, x: &mut Tensor<T>, table: &[T], tokens: &[u32]) {
        let mut rows = Tensor::scratch([tokens.len(), self.dim]);
        rows::gather(rows.data_mut(), table, tokens, self.dim);
        elementwise::add(x.data_mut(), rows.data());
    }

    /// Adds the gradients of the parameters.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, dy: &Tensor<T>) -> Result<()> {
        let Saved { embed, token, masked, net } = saved;
        let mut d = match (&self.net, net) {
            (Net::Pyramid(pyramid, norm), NetSaved::Pyramid { plans, blocks, last, stats }) => {
                let d = norm.backward(p, g, &last, &stats, dy, None)?;
                drop(last);
                pyramid.backward(p, g, blocks, &plans, &d)?
            }
            (Net::Vit { trunk, class, .. }, NetSaved::Vit(saved)) => {
                let d = trunk.backward(p, g, saved, dy)?;
                without_row(&d, g.get_mut(*class))?
            }
            _ => return Err(Error::usage("an encoder got what another one saved")),
        };
        if let Some(param) = self.token {
            let mut d_row = Tensor::zeros([1, self.dim]);
            mix_row_backward(d_row.data_mut(), &mut d, &masked)?;
            if let (Some(norm), Some(stats)) = (self.embed.norm(), &token) {
                d_row = norm.backward(p, g, &Tensor::new([1, self.dim], p.get(param))?, stats, &d_row, None)?;
            }
            elementwise::add(g.get_mut(param), d_row.data());
        }
        self.embed.backward_params(p, g, &embed, &d)?;
        Ok(())
    }

    /// The normed tokens of whole images, without a class token.
    pub fn whole<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<Tensor<T>> {
        let (mut x, _) = self.embed.forward(p, image, None)?;
        let side = self.side();
        match &self.net {
            Net::Pyramid(pyramid, norm) => {
                if let Pyramid::Pvt(_, positions) = pyramid {
                    rows::add_table(x.data_mut(), p.buffer(*positions));
                }
                let plans = pyramid.plans(side, Positions::regular(side).pairs)?;
                Ok(norm.forward(p, &pyramid.forward(p, x, &plans)?.0)?.0)
            }
            Net::Vit { trunk, class, positions } => {
                let (front, rest) = p.buffer(*positions).split_at(self.dim);
                rows::add_table(x.data_mut(), rest);
                let mut class = Tensor::new([self.dim], p.get(*class))?;
                elementwise::add(class.data_mut(), front);
                without_row(&trunk.forward(&p.run_as(Pass::Infer), with_row(&x, class.data())?)?.0, &mut vec![T::ZERO; self.dim])
            }
        }
    }
}

/// `[B, N, C]` → `[B, 1 + N, C]`, the new row first.
pub fn with_row<T: Float>(x: &Tensor<T>, row: &[T]) -> Result<Tensor<T>> {
    let [batch, n, c] = x.dims("tokens")?;
    let mut y = Tensor::scratch([batch, 1 + n, c]);
    y.data_mut().par_chunks_mut((1 + n) * c).enumerate().for_each(|(b, y)| {
        y[..c].copy_from_slice(row);
        y[c..].copy_from_slice(&x.data()[b * n * c..(b + 1) * n * c]);
    });
    Ok(y)
}

/// Backward of [`with_row`]: adds the first rows to `d_row`, returns the others.
pub fn without_row<T: Float>(dy: &Tensor<T>, d_row: &mut [T]) -> Result<Tensor<T>> {
    let [batch, n, c] = dy.dims("tokens")?;
    let mut dx = Tensor::scratch([batch, n - 1, c]);
    for b in 0..batch {
        let dy = &dy.data()[b * n * c..(b + 1) * n * c];
        elementwise::add(d_row, &dy[..c]);
        dx.data_mut()[b * (n - 1) * c..(b + 1) * (n - 1) * c].copy_from_slice(&dy[c..]);
    }
    Ok(dx)
}
