//! The discrete VAE of BEiT's release for own data (`DiscreteVAE`, after DALLE-pytorch).
//!
//! Encoder: L times { convolution 4×4 stride 2, ReLU; residual block }, then 1×1 to V logits. Decoder: codebook vectors, L times
//! { transposed convolution 4×4 stride 2, ReLU; residual block }, then 1×1 to the image. A residual block is
//! `x + conv1×1(ReLU(conv3×3(ReLU(conv3×3(x)))))`.

use super::stack::{Layer, Stack};
use crate::case::Config;
use crate::error::{Error, Result};
use crate::nn::{Conv2d, ConvSettings, ConvTranspose2d, Init, Names, Param};

/// The sizes.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Side of the image.
    pub image_size: usize,
    /// Halvings L.
    pub num_layers: usize,
    /// Codes V.
    pub vocab_size: usize,
    /// Width of a code.
    pub codebook_dim: usize,
    /// Width of the convolutions.
    pub hidden_dim: usize,
    /// Channels of the image.
    pub in_chans: usize,
}

impl Sizes {
    /// From a configuration.
    pub fn of(config: &Config) -> Result<Self> {
        let sizes = Sizes {
            image_size: config.positive("image_size")?,
            num_layers: config.positive("num_layers")?,
            vocab_size: config.positive("vocab_size")?,
            codebook_dim: config.positive("codebook_dim")?,
            hidden_dim: config.positive("hidden_dim")?,
            in_chans: config.positive("in_chans")?,
        };
        if sizes.num_layers > 20 || !sizes.image_size.is_multiple_of(1 << sizes.num_layers) {
            let message = format!("expected a multiple of 2^{}, found {}", sizes.num_layers, sizes.image_size);
            return Err(Error::config("image_size", message));
        }
        Ok(sizes)
    }
}

impl Sizes {
    /// Rows (and columns) of codes.
    pub fn grid(&self) -> usize {
        self.image_size >> self.num_layers
    }
}

/// A convolution that keeps the size, or halves it with a kernel of 4.
pub fn conv(names: Names, inputs: usize, outputs: usize, kernel: usize) -> Result<Layer> {
    let halves = kernel == 4;
    let settings =
        ConvSettings { stride: [1 + usize::from(halves); 2], padding: [(kernel - 1) / 2; 2], ..ConvSettings::new(inputs, outputs, kernel) };
    Ok(Layer::Conv(Conv2d::new(names, settings, settings.default_init())?))
}

/// A transposed convolution that doubles the size.
pub fn doubling(names: Names, inputs: usize, outputs: usize) -> Result<Layer> {
    let settings = ConvSettings { stride: [2; 2], padding: [1; 2], ..ConvSettings::new(inputs, outputs, 4) };
    Ok(Layer::Transposed(ConvTranspose2d::new(names, settings)?))
}

fn residual(mut names: Names, width: usize) -> Result<Layer> {
    let mut inner = Stack::default();
    let mut net = names.at("net");
    inner.push(conv(net.at("0"), width, width, 3)?).push(Layer::Relu);
    inner.push(conv(net.at("2"), width, width, 3)?).push(Layer::Relu);
    inner.push(conv(net.at("4"), width, width, 1)?);
    Ok(Layer::Residual { skip: None, inner, scale: 1.0 })
}

/// Images `[B, S, S, C]` to logits.
pub fn encoder(mut names: Names, sizes: Sizes) -> Result<Stack> {
    let (mut names, mut stack, mut width) = (names.at("encoder"), Stack::default(), sizes.in_chans);
    for i in 0..sizes.num_layers {
        stack.push(conv(names.at(format!("{}.0", 2 * i)), width, sizes.hidden_dim, 4)?).push(Layer::Relu);
        stack.push(residual(names.at(format!("{}", 2 * i + 1)), sizes.hidden_dim)?);
        width = sizes.hidden_dim;
    }
    stack.push(conv(names.at(format!("{}", 2 * sizes.num_layers)), width, sizes.vocab_size, 1)?);
    Ok(stack)
}

/// Codebook vectors to images, and the codebook `[V, D]`.
pub fn decoder(names: &mut Names, sizes: Sizes) -> Result<(Stack, Param)> {
    let shape = crate::tensor::Shape::try_new(&[sizes.vocab_size, sizes.codebook_dim])?;
    let codebook = names.param("codebook.weight", shape, Init::Normal(1.0));
    let (mut names, mut stack, mut width) = (names.at("decoder"), Stack::default(), sizes.codebook_dim);
    for i in 0..sizes.num_layers {
        stack.push(doubling(names.at(format!("{}.0", 2 * i)), width, sizes.hidden_dim)?).push(Layer::Relu);
        stack.push(residual(names.at(format!("{}", 2 * i + 1)), sizes.hidden_dim)?);
        width = sizes.hidden_dim;
    }
    stack.push(conv(names.at(format!("{}", 2 * sizes.num_layers)), width, sizes.in_chans, 1)?);
    Ok((stack, codebook))
}
