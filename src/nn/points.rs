//! `nn.point_reducer`, a convolution that makes fewer points, and `nn.coc_embed`, the same on an image with coordinates: the two ways in
//! which CoC (arXiv 2303.01494) changes the grid of points.
//!
//! Coordinates: channel 3 of pixel `(i, j)` is `i/(H − 1) − ½`, channel 4 `j/(W − 1) − ½`, as in the code (the paper divides by W). They
//! are zero in the padding, like the image.

use rayon::prelude::*;

use super::conv::{Conv2d, ConvSettings};
use super::maps::{channels_first, channels_last};
use super::param::{Layout, Names, Params};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// Channels of an image, and with coordinates.
const IMAGE: usize = 3;
const WITH_COORDINATES: usize = 5;

/// A point reducer with `proj`, square.
pub fn point_reducer(mut names: Names, [inputs, outputs]: [usize; 2], [side, stride, padding]: [usize; 3]) -> Result<Conv2d> {
    let settings = ConvSettings { stride: [stride; 2], padding: [padding; 2], ..ConvSettings::new(inputs, outputs, side) };
    Conv2d::new(names.at("proj"), settings, settings.default_init())
}

/// `[B, 3, H, W]` → `[B, H, W, 5]`, with coordinates.
pub fn with_coordinates<T: Float>(image: &Tensor<T>) -> Result<Tensor<T>> {
    let [b, c, h, w] = image.dims("image")?;
    if c != IMAGE || h < 2 || w < 2 {
        return Err(Error::shape("image", format!("[batch, {IMAGE}, height, width] of at least 2×2 pixels"), image.shape()));
    }
    let mut out = Tensor::scratch([b, h, w, WITH_COORDINATES]);
    let at = |i: usize, side: usize| T::from_f64(i as f64 / (side - 1) as f64 - 0.5);
    out.data_mut().par_chunks_mut(w * WITH_COORDINATES).enumerate().for_each(|(row, out)| {
        let (b, i) = (row / h, row % h);
        for (j, pixel) in out.chunks_exact_mut(WITH_COORDINATES).enumerate() {
            for (c, x) in pixel[..IMAGE].iter_mut().enumerate() {
                *x = image.data()[((b * IMAGE + c) * h + i) * w + j];
            }
            pixel[IMAGE..].copy_from_slice(&[at(i, h), at(j, w)]);
        }
    });
    Ok(out)
}

/// The gradient of the image, from that of [`with_coordinates`].
fn without_coordinates<T: Float>(d: &Tensor<T>) -> Result<Tensor<T>> {
    let [b, h, w, _] = d.dims("gradient of an image with coordinates")?;
    let mut out = Tensor::scratch([b, IMAGE, h, w]);
    out.data_mut().par_chunks_mut((h * w).max(1)).enumerate().for_each(|(plane, out)| {
        let from = plane / IMAGE * h * w * WITH_COORDINATES + plane % IMAGE;
        for (x, d) in out.iter_mut().zip(d.data()[from..].iter().step_by(WITH_COORDINATES)) {
            *x = *d;
        }
    });
    Ok(out)
}

/// CoC's embedding: coordinates, then a point reducer `patch_embed`.
#[derive(Clone, Debug)]
pub struct CocEmbed(Conv2d);

impl CocEmbed {
    /// Registers `patch_embed.proj`, with side, stride and padding.
    pub fn new(names: &mut Names, embed_dim: usize, shape: [usize; 3]) -> Result<Self> {
        Ok(CocEmbed(point_reducer(names.at("patch_embed"), [WITH_COORDINATES, embed_dim], shape)?))
    }

    /// `in_patch_size`, `in_stride`, `in_pad` of a configuration.
    pub fn shape(config: &Config) -> Result<[usize; 3]> {
        Ok([config.usize_or("in_patch_size", 4)?, config.usize_or("in_stride", 4)?, config.usize_or("in_pad", 0)?])
    }

    /// `[B, 3, H, W]` → `[B, H', W', C]`, and what the convolution read.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<(Tensor<T>, Tensor<T>)> {
        let x = with_coordinates(image)?;
        Ok((self.0.forward(p, &x)?, x))
    }

    /// The gradient of the image `[B, 3, H, W]`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, x: &Tensor<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        without_coordinates(&self.0.backward(p, g, x, dy)?)
    }

    /// The gradients of the parameters alone.
    pub fn backward_params<T: Float>(&self, g: &mut Params<T>, x: &Tensor<T>, dy: &Tensor<T>) -> Result<()> {
        self.0.backward_params(g, x, dy)
    }

    /// What a forward pass on `[b, h, w]` costs, and the size of its output.
    pub fn cost(&self, [b, h, w]: [usize; 3]) -> Result<(Cost, [usize; 2])> {
        let input = Cost { flops: 0, activation_bytes: 4 * b * h * w * WITH_COORDINATES };
        Ok((input + self.0.cost([b, h, w])?, self.0.output_size([h, w])?))
    }
}

/// `nn.coc_embed`.
pub struct CocEmbedOp;

impl Operation for CocEmbedOp {
    const NAME: &'static str = "nn.coc_embed";
    const PAPER: &'static str = "2303.01494 CoC";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("in_patch_size", rng.between(1, 4)).set("in_stride", rng.between(1, 4)).set("in_pad", rng.between(0, 2));
        config.set("embed_dim", rng.between(1, 6));
        config
    }

    fn inputs(_: &Config, draw: &mut Draw) -> Result<()> {
        let batch = draw.size("batch", 1, 2);
        let shape = [batch, IMAGE, draw.rng.between(4, 10), draw.rng.between(4, 10)];
        draw.normal("x", shape);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, _, h, w] = inputs.dims("x")?;
        let (layer, _) = Layout::build(|names| CocEmbed::new(names, config.positive("embed_dim")?, CocEmbed::shape(config)?))?;
        Ok(Some(layer.cost([b, h, w])?.0))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (layer, layout) = Layout::build(|names| CocEmbed::new(names, config.positive("embed_dim")?, CocEmbed::shape(config)?))?;
        run.unary(
            &layout,
            |p, image| {
                let (y, x) = layer.forward(p, image)?;
                Ok((channels_first(&y)?, x))
            },
            |p, g, x, dy| layer.backward(p, g, &x, &channels_last(dy)?),
        )
    }
}

/// `nn.point_reducer`.
pub struct PointReducerOp;

impl PointReducerOp {
    fn layer(names: &mut Names, config: &Config) -> Result<Conv2d> {
        let widths = [config.positive("in_chans")?, config.positive("embed_dim")?];
        let shape = [config.usize_or("patch_size", 16)?, config.usize_or("stride", 16)?, config.usize_or("padding", 0)?];
        point_reducer(names.here(), widths, shape)
    }
}

impl Operation for PointReducerOp {
    const NAME: &'static str = "nn.point_reducer";
    const PAPER: &'static str = "2303.01494 CoC";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("patch_size", rng.between(1, 4)).set("stride", rng.between(1, 4)).set("padding", rng.between(0, 2));
        config.set("in_chans", rng.between(1, 5)).set("embed_dim", rng.between(1, 6));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let batch = draw.size("batch", 1, 2);
        let shape = [batch, config.positive("in_chans")?, draw.rng.between(4, 9), draw.rng.between(4, 9)];
        draw.normal("x", shape);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, c, h, w] = inputs.dims("x")?;
        let (layer, _) = Layout::build(|names| Self::layer(names, config))?;
        Ok(Some(Cost { flops: 0, activation_bytes: 4 * b * c * h * w } + layer.cost([b, h, w])?))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (layer, layout) = Layout::build(|names| Self::layer(names, run.config()))?;
        run.unary(
            &layout,
            |p, x| {
                let x = channels_last(x)?;
                Ok((channels_first(&layer.forward(p, &x)?)?, x))
            },
            |p, g, x, dy| channels_first(&layer.backward(p, g, &x, &channels_last(dy)?)?),
        )
    }
}
