//! The networks of OpenAI's discrete VAE (DALL-E, arXiv 2102.12092): what BEiT's image tokens come from.
//!
//! A block is `id(x) + post · res(x)`, `post = 1/(4 n_blk_per_group)²`, `res` four times ReLU and convolution to a quarter of the
//! width; a 2×2 maximum after each of the first three of four groups of the encoder, twice the size after those of the decoder.
//! Convolutions keep the size; their parameters are called `w` and `b`.

use super::stack::{Layer, Saved, Stack};
use crate::case::Config;
use crate::error::{Error, Result};
use crate::nn::{Conv2d, ConvSettings, Init, Names, Params};
use crate::tensor::{Float, Tensor};

/// The sizes.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Width of the first group.
    pub n_hid: usize,
    /// Blocks in a group.
    pub n_blk_per_group: usize,
    /// Width of the decoder's first layer.
    pub n_init: usize,
    /// Codes V.
    pub vocab_size: usize,
    /// Channels of the image.
    pub in_chans: usize,
}

impl Sizes {
    /// From a configuration.
    pub fn of(config: &Config) -> Result<Self> {
        let sizes = Sizes {
            n_hid: config.positive("n_hid")?,
            n_blk_per_group: config.positive("n_blk_per_group")?,
            n_init: config.positive("n_init")?,
            vocab_size: config.positive("vocab_size")?,
            in_chans: config.positive("in_chans")?,
        };
        // A block works at a quarter of its width.
        if sizes.n_hid < 4 { Err(Error::config("n_hid", format!("expected at least 4, found {}", sizes.n_hid))) } else { Ok(sizes) }
    }
}

fn conv(names: Names, inputs: usize, outputs: usize, kernel: usize) -> Result<Conv2d> {
    let settings = ConvSettings { padding: [kernel / 2; 2], ..ConvSettings::new(inputs, outputs, kernel) };
    Conv2d::named(names, settings, Init::Normal(1.0 / (settings.fan_in() as f64).sqrt()), ["w", "b"])
}

fn block(mut names: Names, inputs: usize, outputs: usize, kernels: [usize; 4], scale: f64) -> Result<Layer> {
    let middle = outputs / 4;
    let skip = if inputs == outputs { None } else { Some(conv(names.at("id_path"), inputs, outputs, 1)?) };
    let mut inner = Stack::default();
    let mut res = names.at("res_path");
    for (i, kernel) in kernels.into_iter().enumerate() {
        let (from, to) = (if i == 0 { inputs } else { middle }, if i == 3 { outputs } else { middle });
        inner.push(Layer::Relu).push(Layer::Conv(conv(res.at(format!("conv_{}", i + 1)), from, to, kernel)?));
    }
    Ok(Layer::Residual { skip, inner, scale })
}

/// Four groups of blocks and the output layer.
fn groups(
    names: &mut Names,
    mut width: usize,
    sizes: Sizes,
    widths: [usize; 4],
    kernels: [usize; 4],
    between: Layer,
    outputs: usize,
) -> Result<Stack> {
    let mut stack = Stack::default();
    let scale = 1.0 / (4 * sizes.n_blk_per_group).pow(2) as f64;
    for (i, factor) in widths.into_iter().enumerate() {
        let mut group = names.at(format!("group_{}", i + 1));
        for j in 1..=sizes.n_blk_per_group {
            stack.push(block(group.at(format!("block_{j}")), width, factor * sizes.n_hid, kernels, scale)?);
            width = factor * sizes.n_hid;
        }
        if i < 3 {
            stack.push(between.clone());
        }
    }
    stack.push(Layer::Relu).push(Layer::Conv(conv(names.at("output.conv"), width, outputs, 1)?));
    Ok(stack)
}

/// The encoder: mapped images `[B, H, W, C]` to logits `[B, H/8, W/8, V]`.
pub fn encoder(mut names: Names, sizes: Sizes) -> Result<Stack> {
    let mut names = names.at("encoder.blocks");
    let input = conv(names.at("input"), sizes.in_chans, sizes.n_hid, 7)?;
    let rest = groups(&mut names, sizes.n_hid, sizes, [1, 2, 4, 8], [3, 3, 3, 1], Layer::Pool, sizes.vocab_size)?;
    let mut stack = Stack::default();
    stack.push(Layer::Conv(input)).append(rest);
    Ok(stack)
}

/// The decoder: codes or distributions over codes to `raw` `[B, 8h, 8w, 2C]`.
#[derive(Clone, Debug)]
pub struct Decoder {
    input: Conv2d,
    rest: Stack,
    sizes: Sizes,
}

impl Decoder {
    /// Registers the parameters.
    pub fn new(mut names: Names, sizes: Sizes) -> Result<Self> {
        let mut names = names.at("decoder.blocks");
        let input = conv(names.at("input"), sizes.vocab_size, sizes.n_init, 1)?;
        let rest = groups(&mut names, sizes.n_init, sizes, [8, 4, 2, 1], [1, 3, 3, 3], Layer::Double, 2 * sizes.in_chans)?;
        Ok(Decoder { input, rest, sizes })
    }

    /// From codes `[B, h, w]`: the first layer is a look-up.
    pub fn decode<T: Float>(&self, p: &Params<T>, codes: &[u32], [b, h, w]: [usize; 3]) -> Result<(Tensor<T>, Saved<T>)> {
        let (n, v, weight) = (self.sizes.n_init, self.sizes.vocab_size, p.get(self.input.weight()));
        let bias = self.input.bias().map(|bias| p.get(bias));
        let mut x = Tensor::scratch([b, h, w, n]);
        for (row, &code) in x.data_mut().chunks_exact_mut(n).zip(codes) {
            for (o, x) in row.iter_mut().enumerate() {
                *x = weight[o * v + code as usize] + bias.map_or(T::ZERO, |bias| bias[o]);
            }
        }
        self.rest.forward(p, x)
    }

    /// The gradients for [`decode`](Self::decode).
    pub fn decode_backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        codes: &[u32],
        saved: Saved<T>,
        d_raw: Tensor<T>,
    ) -> Result<()> {
        let dx = self.rest.backward(p, g, saved, d_raw)?;
        let (n, v) = (self.sizes.n_init, self.sizes.vocab_size);
        if let Some(bias) = self.input.bias() {
            crate::kernel::reduce::add_column_sums(g.get_mut(bias), dx.data());
        }
        let weight = g.get_mut(self.input.weight());
        for (row, &code) in dx.data().chunks_exact(n).zip(codes) {
            row.iter().enumerate().for_each(|(o, &d)| weight[o * v + code as usize] += d);
        }
        Ok(())
    }

    /// From distributions `[B, h, w, V]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, probs: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        self.rest.forward(p, self.input.forward(p, probs)?)
    }

    /// The gradient of the distributions.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        probs: &Tensor<T>,
        saved: Saved<T>,
        d_raw: Tensor<T>,
    ) -> Result<Tensor<T>> {
        let dx = self.rest.backward(p, g, saved, d_raw)?;
        self.input.backward(p, g, probs, &dx)
    }
}
