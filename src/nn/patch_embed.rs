//! Patch embedding: a convolution whose kernel is its stride.

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
    pub fn new(
        mut names: Names,
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
        let proj = Linear::shaped(&mut names.at("proj"), [dim, chans, patch, patch].into(), inputs, dim, true, init);
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
