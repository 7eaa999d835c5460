//! Patch embedding: a convolution whose kernel is its stride.

use rayon::prelude::*;

use super::linear::Linear;
use super::norm::{LayerNorm, Stats};
use super::param::{Init, Names, Params};
use crate::error::{Error, Result};
use crate::kernel::rows;
use crate::tensor::{Float, Tensor};

/// Splits images into patches and maps each to a token: `proj.weight` `[C, in, P, P]`, `proj.bias`, optionally `norm.*`.
#[derive(Clone, Debug)]
pub struct PatchEmbed {
    proj: Linear,
    norm: Option<LayerNorm>,
    chans: usize,
    patch: usize,
    image: [usize; 2],
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    patches: Tensor<T>,
    norm: Option<(Tensor<T>, Stats<T>)>,
}

impl PatchEmbed {
    /// Registers the parameters. An error unless the image is a whole number of patches.
    pub fn new(names: Names, image: [usize; 2], patch: usize, chans: usize, dim: usize, norm_eps: Option<f64>, init: Init) -> Result<Self> {
        Self::named(names, "proj", image, patch, chans, dim, norm_eps, init)
    }

    /// [`new`](Self::new) with another name of the convolution.
    #[allow(clippy::too_many_arguments)]
    pub fn named(
        mut names: Names,
        name: &str,
        image: [usize; 2],
        patch: usize,
        chans: usize,
        dim: usize,
        norm_eps: Option<f64>,
        init: Init,
    ) -> Result<Self> {
        if patch == 0 || image.iter().any(|&side| side == 0 || !side.is_multiple_of(patch)) {
            return Err(Error::config("img_size", format!("expected a positive multiple of patch_size {patch}, found {image:?}")));
        }
        let inputs = chans * patch * patch;
        let proj = Linear::shaped(&mut names.at(name), [dim, chans, patch, patch].into(), inputs, dim, true, init);
        let norm = norm_eps.map(|eps| LayerNorm::new(names.at("norm"), dim, eps));
        Ok(PatchEmbed { proj, norm, chans, patch, image })
    }

    /// Rows and columns of patches.
    pub fn grid(&self) -> [usize; 2] {
        self.image.map(|side| side / self.patch)
    }

    fn image_dims<T: Float>(&self, image: &Tensor<T>) -> Result<[usize; 4]> {
        let dims @ [_, c, h, w] = image.dims("image")?;
        if [c, h, w] != [self.chans, self.image[0], self.image[1]] {
            return Err(Error::shape("image", format!("[batch, {}, {}, {}]", self.chans, self.image[0], self.image[1]), image.shape()));
        }
        Ok(dims)
    }

    /// The norm.
    pub fn norm(&self) -> Option<&LayerNorm> {
        self.norm.as_ref()
    }

    /// Tokens `[B, N, C]`. With `keep`, only those patches, in that order: `[B, K, C]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, keep: Option<&[u32]>) -> Result<(Tensor<T>, Saved<T>)> {
        let dims = self.image_dims(image)?;
        let [gh, gw] = self.grid();
        let len = self.chans * self.patch * self.patch;
        let mut patches = Tensor::scratch([dims[0], gh * gw, len]);
        rows::patches(patches.data_mut(), image.data(), dims, [self.patch; 2]);
        if let Some(keep) = keep {
            let mut kept = Tensor::scratch([dims[0], keep.len(), len]);
            for (out, x) in kept.data_mut().chunks_exact_mut((keep.len() * len).max(1)).zip(patches.data().chunks_exact(gh * gw * len)) {
                rows::gather(out, x, keep, len);
            }
            patches = kept;
        }
        self.tokens(p, patches)
    }

    /// [`forward`](Self::forward) with patches to keep of every image by itself: `keep` is `[B, K]`.
    pub fn forward_each<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, keep: &[u32]) -> Result<(Tensor<T>, Saved<T>)> {
        let dims @ [batch, ..] = self.image_dims(image)?;
        let [gh, gw] = self.grid();
        let (n, len, each) = (gh * gw, self.chans * self.patch * self.patch, keep.len().checked_div(batch).unwrap_or(0));
        let mut patches = Tensor::scratch([batch, n, len]);
        rows::patches(patches.data_mut(), image.data(), dims, [self.patch; 2]);
        let mut kept = Tensor::scratch([batch, each, len]);
        let index: Vec<u32> = keep.iter().enumerate().map(|(i, &patch)| (i / each * n) as u32 + patch).collect();
        rows::gather(kept.data_mut(), patches.data(), &index, len);
        self.tokens(p, kept)
    }

    fn tokens<T: Float>(&self, p: &Params<T>, patches: Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let x = self.proj.forward(p, &patches)?;
        match &self.norm {
            None => Ok((x, Saved { patches, norm: None })),
            Some(norm) => {
                let (y, stats) = norm.forward(p, &x)?;
                Ok((y, Saved { patches, norm: Some((x, stats)) }))
            }
        }
    }

    /// Gradients of the parameters.
    pub fn backward_params<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: &Saved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let dx = match (&self.norm, &saved.norm) {
            (Some(norm), Some((x, stats))) => norm.backward(p, g, x, stats, dy, None)?,
            _ => dy.clone(),
        };
        self.proj.backward_params(g, &saved.patches, &dx)?;
        Ok(dx)
    }

    /// Gradients of the parameters and of the image `[B, in, H, W]`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: &Saved<T>,
        dy: &Tensor<T>,
        keep: Option<&[u32]>,
    ) -> Result<Tensor<T>> {
        let dx = self.backward_params(p, g, saved, dy)?;
        let mut d_patches = self.proj.backward_input(p, &dx)?;
        let [batch, _, len] = d_patches.dims("patches")?;
        let [gh, gw] = self.grid();
        if let Some(keep) = keep {
            let mut all = Tensor::zeros([batch, gh * gw, len]);
            for (out, x) in all.data_mut().chunks_exact_mut(gh * gw * len).zip(d_patches.data().chunks_exact((keep.len() * len).max(1))) {
                rows::scatter(out, x, keep, len);
            }
            d_patches = all;
        }
        let dims = [batch, self.chans, self.image[0], self.image[1]];
        let mut image = Tensor::scratch(dims);
        rows::patches_backward(image.data_mut(), d_patches.data(), dims, [self.patch; 2]);
        Ok(image)
    }
}

/// The place in an image `[C, H, W]` of every element of its patch vectors, in the order (row, column, channel).
fn patch_index([c, h, w]: [usize; 3], patch: usize) -> impl Fn(usize, usize) -> usize {
    let across = w / patch;
    move |cell, i| {
        let (y, x) = (cell / across * patch + i / c / patch, cell % across * patch + i / c % patch);
        (i % c * h + y) * w + x
    }
}

/// The number of patches of an image, and of elements in each; an error unless they are whole.
pub(crate) fn patch_count(image: [usize; 4], patch: usize) -> Result<(usize, usize)> {
    let [_, c, h, w] = image;
    if patch == 0 || c == 0 || h == 0 || w == 0 || !h.is_multiple_of(patch) || !w.is_multiple_of(patch) {
        return Err(Error::shape("image", format!("[batch, channels, rows, columns] in whole patches of {patch}"), image));
    }
    Ok((h / patch * (w / patch), patch * patch * c))
}

/// The patches of `image` `[B, C, H, W]` as vectors in the order (row, column, channel): `[B, L, P²·C]`.
pub fn patchify<T: Float>(image: &Tensor<T>, patch: usize) -> Result<Tensor<T>> {
    let dims @ [b, c, h, w] = image.dims("image")?;
    let (l, n) = patch_count(dims, patch)?;
    let at = patch_index([c, h, w], patch);
    let mut out = Tensor::scratch([b, l, n]);
    out.data_mut().par_chunks_mut(l * n).zip(image.data().par_chunks(c * h * w)).for_each(|(out, image)| {
        for (cell, out) in out.chunks_exact_mut(n).enumerate() {
            out.iter_mut().enumerate().for_each(|(i, x)| *x = image[at(cell, i)]);
        }
    });
    Ok(out)
}

/// The image `[B, C, H, W]` of patch vectors `[B, L, P²·C]`: the inverse of [`patchify`], and its backward pass.
pub fn unpatchify<T: Float>(patches: &Tensor<T>, [c, h, w]: [usize; 3], patch: usize) -> Result<Tensor<T>> {
    let [b, _, _] = patches.dims("patches")?;
    let (l, n) = patch_count([b, c, h, w], patch)?;
    patches.expect_shape("patches", [b, l, n])?;
    let at = patch_index([c, h, w], patch);
    let mut image = Tensor::scratch([b, c, h, w]);
    image.data_mut().par_chunks_mut(c * h * w).zip(patches.data().par_chunks(l * n)).for_each(|(image, patches)| {
        for (cell, patch) in patches.chunks_exact(n).enumerate() {
            patch.iter().enumerate().for_each(|(i, &x)| image[at(cell, i)] = x);
        }
    });
    Ok(image)
}
