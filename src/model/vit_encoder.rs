//! What ViT, DeiT, T2T-ViT, MAE and UM-MAE share: patches with learned tokens and positions, and a trunk of pre-norm blocks.
//!
//! MAE's encoder is [`Encoder`] with fixed positions, run on the visible patches only: positions are added first.
//!
//! Backward: `dpos_embed = Σ_batch dX₀`, `dcls = Σ_batch dX₀[0]`.

use rayon::prelude::*;

use super::stack::{self, Kept};
use super::vit_block::{self, Block, BlockSettings};
use crate::attention::softmax::Settings;
use crate::error::{Error, Result};
use crate::kernel::attention::Groups;
use crate::kernel::{elementwise, reduce, rows};
use crate::nn::{DropPath, Init, LayerNorm, Names, Param, Params, Pass, PatchEmbed, Stats, patch_embed};
use crate::tensor::{Float, Tensor};

/// Pre-norm blocks over all tokens and, where there is one, the norm after them.
#[derive(Clone, Debug)]
pub struct Trunk {
    blocks: Vec<Block>,
    norm: Option<LayerNorm>,
}

/// What [`Trunk::backward`] needs.
pub struct TrunkSaved<T: Float> {
    groups: Groups,
    blocks: Vec<Kept<T, vit_block::Saved<T>>>,
    last: Option<(Tensor<T>, Stats<T>)>,
}

impl Trunk {
    /// Registers `{prefix}blocks.{i}` and, if asked for, `{prefix}norm`.
    pub fn new(names: &mut Names, prefix: &str, depth: usize, settings: BlockSettings, norm: bool) -> Result<Self> {
        let block = |i| {
            let settings = BlockSettings { drop_path: DropPath::linear(settings.drop_path, i, depth), ..settings };
            Block::new(&mut names.at(format!("{prefix}blocks.{i}")), settings)
        };
        let blocks = (0..depth).map(block).collect::<Result<_>>()?;
        let norm = norm.then(|| LayerNorm::new(names.at(format!("{prefix}norm")), settings.attention.dim, settings.norm_eps));
        Ok(Trunk { blocks, norm })
    }

    /// The tokens `[B, N, C]` after all blocks and the norm.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>) -> Result<(Tensor<T>, TrunkSaved<T>)> {
        let [_, tokens, _] = x.dims("tokens")?;
        let groups = Groups::all(tokens, tokens);
        let (x, blocks) = stack::forward(p, &self.blocks, x, |block, i, x| {
            let run = block.forward(p, x, &groups, None)?;
            p.show(format!("blocks.{i}"), &run.0);
            Ok(run)
        })?;
        match &self.norm {
            None => {
                p.show("tokens", &x);
                Ok((x, TrunkSaved { groups, blocks, last: None }))
            }
            Some(norm) => {
                let (y, stats) = norm.forward(p, &x)?;
                p.show("tokens", &y);
                Ok((y, TrunkSaved { groups, blocks, last: Some((x, stats)) }))
            }
        }
    }

    /// The gradient of the tokens that went in.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: TrunkSaved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let TrunkSaved { groups, blocks, last } = saved;
        let d = match (&self.norm, last) {
            (Some(norm), Some((x, stats))) => norm.backward(p, g, &x, &stats, dy, None)?,
            _ => dy.clone(),
        };
        stack::backward(
            &self.blocks,
            blocks,
            d,
            |block, _, x| block.forward(p, x, &groups, None),
            |block, _, saved, d| block.backward(p, g, saved, &groups, None, d),
        )
    }
}

/// What an [`Encoder`] is made of.
#[derive(Clone, Copy, Debug)]
pub struct EncoderSettings {
    /// Rows and columns of the images, in pixels.
    pub image: [usize; 2],
    /// Side of a patch.
    pub patch: usize,
    /// Channels of the images.
    pub chans: usize,
    /// The number of blocks.
    pub depth: usize,
    /// The blocks.
    pub block: BlockSettings,
    /// Names of the learned tokens in front of the patches.
    pub tokens: &'static [&'static str],
    /// `pos_embed` is MAE's fixed sine-cosine table (a buffer) instead of learned.
    pub fixed_positions: bool,
    /// A norm follows the blocks.
    pub norm: bool,
    /// Initialisation of the patch embedding.
    pub patch_init: Init,
}

/// Patches, learned tokens, positions, blocks, norm.
#[derive(Clone, Debug)]
pub struct Encoder {
    embed: PatchEmbed,
    tokens: Vec<Param>,
    positions: Param,
    fixed_positions: bool,
    trunk: Trunk,
    /// Width C.
    pub(super) dim: usize,
}

/// What [`Encoder::backward`] needs.
pub struct EncoderSaved<T: Float> {
    embed: patch_embed::Saved<T>,
    keep: Option<Vec<u32>>,
    trunk: TrunkSaved<T>,
}

impl Encoder {
    /// Registers the tokens, `pos_embed`, `patch_embed`, `blocks` and `norm`.
    pub fn new(names: &mut Names, settings: EncoderSettings) -> Result<Self> {
        let EncoderSettings { image, patch, chans, depth, block, tokens, fixed_positions, norm, patch_init } = settings;
        let dim = block.attention.dim;
        if dim == 0 {
            return Err(Error::config("embed_dim", "expected a positive width, found 0"));
        }
        let embed = PatchEmbed::new(names.at("patch_embed"), image, patch, chans, dim, None, patch_init)?;
        let [rows, cols] = embed.grid();
        let prefix = tokens.len();
        let tokens = tokens.iter().map(|name| names.param(name, [1, 1, dim], Init::NORMAL_02)).collect();
        let shape = [1, prefix + rows * cols, dim];
        let positions = if fixed_positions {
            if rows != cols {
                return Err(Error::config("img_size", format!("expected a square for sine-cosine positions, found {image:?}")));
            }
            names.buffer("pos_embed", shape, Init::sincos2d(dim, rows, prefix)?)
        } else {
            names.param("pos_embed", shape, Init::NORMAL_02)
        };
        let trunk = Trunk::new(names, "", depth, block, norm)?;
        Ok(Encoder { embed, tokens, positions, fixed_positions, trunk, dim })
    }

    /// Rows and columns of patches.
    pub fn grid(&self) -> [usize; 2] {
        self.embed.grid()
    }

    /// The number of tokens in front of the patches.
    pub fn prefix(&self) -> usize {
        self.tokens.len()
    }

    fn positions<'a, T: Float>(&self, p: &'a Params<T>) -> &'a [T] {
        if self.fixed_positions { p.buffer(self.positions) } else { p.get(self.positions) }
    }

    /// `X₀`: tokens and (kept) patches with their positions.
    fn embed<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, keep: Option<&[u32]>) -> Result<(Tensor<T>, patch_embed::Saved<T>)> {
        let (mut x, saved) = self.embed.forward(p, image, None)?;
        let [b, n, c] = x.dims("patches")?;
        let (front, rest) = self.positions(p).split_at(self.prefix() * c);
        rows::add_table(x.data_mut(), rest);
        let mut head = Tensor::new([self.prefix(), c], front)?;
        for (row, &token) in head.data_mut().chunks_exact_mut(c).zip(&self.tokens) {
            elementwise::add(row, p.get(token));
        }
        let kept = match keep {
            Some(keep) if b > 0 => keep.len() / b,
            _ => n,
        };
        let mut out = Tensor::scratch([b, self.prefix() + kept, c]);
        out.data_mut().par_chunks_mut(((self.prefix() + kept) * c).max(1)).zip(x.data().par_chunks(n * c)).enumerate().for_each(
            |(i, (out, x))| {
                let (first, rest) = out.split_at_mut(self.prefix() * c);
                first.copy_from_slice(head.data());
                match keep {
                    None => rest.copy_from_slice(x),
                    Some(keep) => rows::gather(rest, x, &keep[i * kept..(i + 1) * kept], c),
                }
            },
        );
        Ok((out, saved))
    }

    /// The tokens after the norm: `[B, tokens + N, C]`. With `keep` (K patch indices per image, `B·K` in all), only those patches,
    /// in that order.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, keep: Option<&[u32]>) -> Result<(Tensor<T>, EncoderSaved<T>)> {
        let (x, embed) = self.embed(p, image, keep)?;
        let (y, trunk) = self.trunk.forward(p, x)?;
        Ok((y, EncoderSaved { embed, keep: keep.map(<[u32]>::to_vec), trunk }))
    }

    /// [`forward`](Self::forward) of whole images without keeping anything for a backward pass.
    pub fn infer<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<Tensor<T>> {
        Ok(self.forward(&p.run_as(Pass::Infer), image, None)?.0)
    }

    /// Adds the gradients of the parameters; the gradient of the image if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: EncoderSaved<T>,
        dy: &Tensor<T>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let EncoderSaved { embed, keep, trunk } = saved;
        let dx = self.trunk.backward(p, g, trunk, dy)?;
        let [b, all, c] = dx.dims("gradient of the tokens")?;
        let (prefix, [rows, cols]) = (self.prefix(), self.grid());
        let (n, kept) = (rows * cols, all - prefix);
        let mut d_patches = Tensor::zeros([b, n, c]);
        d_patches.data_mut().par_chunks_mut(n * c).zip(dx.data().par_chunks((all * c).max(1))).enumerate().for_each(|(i, (out, dx))| {
            let dx = &dx[prefix * c..];
            match &keep {
                None => out.copy_from_slice(dx),
                Some(keep) => rows::scatter(out, dx, &keep[i * kept..(i + 1) * kept], c),
            }
        });
        // The tokens and their positions are added: they share one gradient.
        let mut front = Tensor::zeros([prefix, c]);
        for dx in dx.data().chunks_exact((all * c).max(1)) {
            elementwise::add(front.data_mut(), &dx[..prefix * c]);
        }
        for (row, &token) in front.data().chunks_exact(c).zip(&self.tokens) {
            elementwise::add(g.get_mut(token), row);
        }
        if !self.fixed_positions {
            let (d_front, d_rest) = g.get_mut(self.positions).split_at_mut(prefix * c);
            elementwise::add(d_front, front.data());
            reduce::add_column_sums(d_rest, d_patches.data());
        }
        if want_image {
            Ok(Some(self.embed.backward(p, g, &embed, &d_patches, None)?))
        } else {
            self.embed.backward_params(p, g, &embed, &d_patches)?;
            Ok(None)
        }
    }

    /// The mean of the patch tokens of [`forward`](Self::forward)'s output: `[B, C]`.
    pub fn mean<T: Float>(&self, tokens: &Tensor<T>) -> Result<Tensor<T>> {
        let [b, n, c] = tokens.dims("tokens")?;
        let mut mean = Tensor::zeros([b, c]);
        let share = T::ONE / T::of(n - self.prefix());
        for (mean, x) in mean.data_mut().chunks_exact_mut(c).zip(tokens.data().chunks_exact(n * c)) {
            reduce::add_column_sums(mean, &x[self.prefix() * c..]);
            mean.iter_mut().for_each(|x| *x *= share);
        }
        Ok(mean)
    }
}

/// The settings of MAE's blocks: Xavier-uniform weights, biases, no layer scale.
pub fn mae_block_settings(dim: usize, heads: usize, mlp_ratio: f64, norm_eps: f64) -> BlockSettings {
    BlockSettings { attention: Settings::new(dim, heads), mlp_ratio, norm_eps, layer_scale: None, drop_path: 0.0, init: crate::nn::xavier }
}
