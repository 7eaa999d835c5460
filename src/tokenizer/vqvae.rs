//! `tokenizer.vqvae`: CogView's image tokenizer (arXiv 2105.13290), a convolutional VQ-VAE.
//!
//! Encoder `enc_b.blocks.{k}` (every layer counts): three halving convolutions (`stride` 6) or two and a 3×3 (`stride` 4) with ReLU
//! between, residual blocks, ReLU, 1×1 to D channels. Decoder `dec.blocks.{k}`: transposed convolutions back. The ReLU that opens a
//! residual block works in place in the release, so the skip carries it, too: `y = r + conv1×1(ReLU(conv3×3(r)))`, `r = ReLU(x)`.
//! Codebook `quantize_t`: see [`vector_quantize`].
//!
//! Training: `loss = mean (recon − image)² + commitment · diff`. The release ignores its argument `decay` (always 0.99); here the key
//! counts. As there, `channel` 2048 means no residual blocks.

use super::simple::{conv, doubling};
use super::stack::{Layer, Stack};
use super::{codes_below, codes_tensor};
use crate::case::{Config, Draw, Operation, Run, Value};
use crate::error::{Error, Result};
use crate::kernel::{elementwise, reduce};
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::vector_quantize::{self, Quantized, Quantizer, Upstream, VectorQuantize};
use crate::nn::{ConvSettings, ConvTranspose2d, Layout, Names};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The sizes.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Channels of the image.
    pub in_chans: usize,
    /// Width of the convolutions.
    pub channel: usize,
    /// Residual blocks.
    pub n_res_block: usize,
    /// Width inside a residual block.
    pub n_res_channel: usize,
    /// Width D of a code.
    pub embed_dim: usize,
    /// 6 = three halvings, 4 = two.
    pub stride: usize,
    /// With `stride` 6: all layers of the full width.
    pub simple: bool,
}

impl Sizes {
    /// From a configuration.
    pub fn of(config: &Config) -> Result<Self> {
        let (stride, channel) = (config.usize("stride")?, config.positive("channel")?);
        if ![4, 6].contains(&stride) {
            return Err(Error::config("stride", format!("expected 4 or 6, found {stride}")));
        }
        let simple = config.bool("simple")?;
        let least = if stride == 4 { 2 } else { 4 };
        if channel < least && !(stride == 6 && simple) {
            return Err(Error::config("channel", format!("expected at least {least}, found {channel}")));
        }
        let n_res_block = config.usize("n_res_block")?;
        if n_res_block > 1000 {
            return Err(Error::config("n_res_block", format!("expected at most 1000, found {n_res_block}")));
        }
        Ok(Sizes {
            in_chans: config.positive("in_chans")?,
            channel,
            n_res_block: if channel == 2048 { 0 } else { n_res_block },
            n_res_channel: config.positive("n_res_channel")?,
            embed_dim: config.positive("embed_dim")?,
            stride,
            simple,
        })
    }

    /// Pixels per code along a side.
    pub fn reduction(&self) -> usize {
        if self.stride == 6 { 8 } else { 4 }
    }
}

/// The residual blocks and a ReLU.
fn residuals(names: &mut Names, stack: &mut Blocks, sizes: Sizes) -> Result<()> {
    for _ in 0..sizes.n_res_block {
        let mut names = names.at(stack.next().to_string());
        let mut names = names.at("conv");
        let mut inner = Stack::default();
        inner.push(conv(names.at("1"), sizes.channel, sizes.n_res_channel, 3)?).push(Layer::Relu);
        inner.push(conv(names.at("3"), sizes.n_res_channel, sizes.channel, 1)?);
        stack.layers.push(Layer::Relu).push(Layer::Residual { skip: None, inner, scale: 1.0 });
    }
    stack.relu();
    Ok(())
}

/// A stack whose layers are numbered as published.
#[derive(Default)]
struct Blocks {
    layers: Stack,
    number: usize,
}

impl Blocks {
    /// The number of the next layer.
    fn next(&mut self) -> usize {
        self.number += 1;
        self.number - 1
    }

    fn relu(&mut self) {
        self.next();
        self.layers.push(Layer::Relu);
    }

    fn add(&mut self, names: &mut Names, layer: impl FnOnce(Names) -> Result<Layer>) -> Result<()> {
        let number = self.next();
        self.layers.push(layer(names.at(number.to_string()))?);
        Ok(())
    }
}

/// Images `[B, H, W, C]` to vectors `[B, h, w, D]`.
pub fn encoder(mut names: Names, sizes: Sizes) -> Result<Stack> {
    let mut names = names.at("enc_b.blocks");
    let (mut blocks, ch) = (Blocks::default(), sizes.channel);
    let widths = match (sizes.stride, sizes.simple) {
        (6, true) => [ch; 3],
        (6, false) => [ch / 4, ch / 2, ch],
        _ => [ch / 2, ch, ch],
    };
    let mut width = sizes.in_chans;
    for (i, next) in widths.into_iter().enumerate() {
        if i > 0 {
            blocks.relu();
        }
        let kernel = if sizes.stride == 4 && i == 2 { 3 } else { 4 };
        blocks.add(&mut names, |names| conv(names, width, next, kernel))?;
        width = next;
    }
    residuals(&mut names, &mut blocks, sizes)?;
    blocks.add(&mut names, |names| conv(names, ch, sizes.embed_dim, 1))?;
    Ok(blocks.layers)
}

/// Vectors `[B, h, w, D]` to images `[B, H, W, C]`.
pub fn decoder(mut names: Names, sizes: Sizes) -> Result<Stack> {
    let mut names = names.at("dec.blocks");
    let (mut blocks, ch, chans) = (Blocks::default(), sizes.channel, sizes.in_chans);
    blocks.add(&mut names, |names| doubling(names, sizes.embed_dim, ch))?;
    residuals(&mut names, &mut blocks, sizes)?;
    if sizes.stride == 4 {
        blocks.add(&mut names, |names| doubling(names, ch, chans))?;
        return Ok(blocks.layers);
    }
    blocks.add(&mut names, |names| doubling(names, ch, ch))?;
    blocks.relu();
    if sizes.simple {
        blocks.add(&mut names, |names| doubling(names, ch, ch))?;
        blocks.relu();
        blocks.add(&mut names, |names| conv(names, ch, chans, 1))?;
    } else {
        let pointwise = ConvSettings::new(ch, ch / 2, 1);
        blocks.add(&mut names, |names| Ok(Layer::Transposed(ConvTranspose2d::new(names, pointwise)?)))?;
        blocks.relu();
        blocks.add(&mut names, |names| doubling(names, ch / 2, chans))?;
    }
    Ok(blocks.layers)
}

fn quantizer(names: &mut Names, config: &Config, sizes: Sizes, training: bool) -> Result<VectorQuantize> {
    let kind = Quantizer::of(config)?;
    if ![Quantizer::Ema, Quantizer::Fixed].contains(&kind) {
        return Err(Error::config("quantizer", "expected \"ema\" or \"fixed\""));
    }
    let settings = vector_quantize::Settings {
        dim: sizes.embed_dim,
        n_embed: config.positive("n_embed")?,
        quantizer: kind,
        training,
        decay: config.f64_or("decay", 0.99)?,
        eps: config.f64_or("eps", 1e-5)?,
        tau: 1.0,
    };
    VectorQuantize::new(names.at("quantize_t"), settings)
}

fn encode<T: Float>(run: &mut Run<T>, sizes: Sizes) -> Result<()> {
    let config = run.config();
    let ((encoder, codebook), layout) =
        Layout::build(|names| Ok((encoder(names.here(), sizes)?, quantizer(names, config, sizes, false)?)))?;
    let p = run.params(&layout)?;
    let image = run.input("image")?;
    let (z, saved) = encoder.forward(&p, channels_last(&image)?)?;
    run.output("z", &z);
    run.output_ints("codes", codes_tensor(&codebook.nearest(&p, &z)?, image.shape()[0])?);
    if run.backward() {
        let mut g = run.zero_grads(&p);
        let dx = encoder.backward(&p, &mut g, saved, run.cotangent("z", z.shape())?)?;
        run.grad_input("image", &channels_first(&dx)?);
        run.grad_params(&g);
    }
    Ok(())
}

fn decode<T: Float>(run: &mut Run<T>, sizes: Sizes) -> Result<()> {
    let config = run.config();
    let ((decoder, codebook), layout) =
        Layout::build(|names| Ok((decoder(names.here(), sizes)?, quantizer(names, config, sizes, false)?)))?;
    let p = run.params(&layout)?;
    let codes = run.ints("codes")?;
    let [b, h, w] = codes.shape.dims("input `codes`")?;
    let numbers = codes_below("input `codes`", codes, config.positive("n_embed")?)?;
    let (y, saved) = decoder.forward(&p, codebook.look_up(&p, &numbers, [b, h, w, sizes.embed_dim].into()))?;
    let recon = channels_first(&y)?;
    run.output("recon", &recon);
    if run.backward() {
        let mut g = run.zero_grads(&p);
        decoder.backward(&p, &mut g, saved, channels_last(&run.cotangent("recon", recon.shape())?)?)?;
        run.grad_params(&g);
    }
    Ok(())
}

fn train<T: Float>(run: &mut Run<T>, sizes: Sizes) -> Result<()> {
    let config = run.config();
    let (training, commitment) = (config.bool("training")?, config.f64_or("commitment", 0.25)?);
    let ((encoder, decoder, codebook), layout) = Layout::build(|names| {
        Ok((encoder(names.here(), sizes)?, decoder(names.here(), sizes)?, quantizer(names, config, sizes, training)?))
    })?;
    let mut p = run.params(&layout)?;
    let image = run.input("image")?;
    let [b, _, h, w] = image.dims("input `image`")?;
    if !h.is_multiple_of(sizes.reduction()) || !w.is_multiple_of(sizes.reduction()) {
        return Err(Error::shape("input `image`", format!("sides that are multiples of {}", sizes.reduction()), image.shape()));
    }
    let (z, encoded) = encoder.forward(&p, channels_last(&image)?)?;
    let (Quantized { quantize, diff, indices, .. }, saved) = codebook.forward(&p, &z, None)?;
    let shape = quantize.shape();
    let (y, decoded) = decoder.forward(&p, quantize)?;
    let recon = channels_first(&y)?;
    let mut error = recon.clone();
    elementwise::add_scaled(error.data_mut(), image.data(), T::from_f64(-1.0));
    let n = image.data().len() as f64;
    let recon_loss = reduce::dot(error.data(), error.data()) / n;
    for (name, value) in [("loss", recon_loss + commitment * diff), ("recon_loss", recon_loss), ("diff", diff)] {
        run.output(name, &Tensor::scalar(T::from_f64(value)));
    }
    run.output("recon", &recon);
    run.output_ints("codes", codes_tensor(&indices, b)?);
    if run.backward() {
        let mut g = run.zero_grads(&p);
        let upstream = |name: &str| Ok::<f64, Error>(run.cotangent(name, [].into())?.data()[0].to_f64());
        let (d_loss, d_recon_loss, d_diff) = (upstream("loss")?, upstream("recon_loss")?, upstream("diff")?);
        // d error = 2 error/n; the image is the target, too.
        error.data_mut().iter_mut().for_each(|e| *e *= T::from_f64((d_loss + d_recon_loss) * 2.0 / n));
        let mut d_recon = run.cotangent("recon", recon.shape())?;
        elementwise::add(d_recon.data_mut(), error.data());
        let dq = decoder.backward(&p, &mut g, decoded, channels_last(&d_recon)?)?;
        dq.expect_shape("gradient of the codes", shape)?;
        let upstream = Upstream { quantize: &dq, diff: d_diff + d_loss * commitment, codebook_loss: 0.0 };
        let (dz, _) = codebook.backward(&p, &mut g, &z, &saved, upstream)?;
        let mut d_image = channels_first(&encoder.backward(&p, &mut g, encoded, dz)?)?;
        elementwise::add_scaled(d_image.data_mut(), error.data(), T::from_f64(-1.0));
        run.grad_input("image", &d_image);
        run.grad_params(&g);
    }
    codebook.update(&mut p, &z, &indices, |name, value| run.after(&format!("quantize_t.{name}"), Value::Float(value)));
    Ok(())
}

/// `tokenizer.vqvae`.
pub struct VqVae;

impl Operation for VqVae {
    const NAME: &'static str = "tokenizer.vqvae";
    const PAPER: &'static str = "2105.13290 CogView";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let mode = rng.pick(&["encode", "decode", "train"]);
        config.set("mode", mode).set("in_chans", rng.between(1, 3)).set("channel", rng.between(4, 6));
        config.set("n_res_block", rng.below(3)).set("n_res_channel", rng.between(1, 3));
        config.set("embed_dim", rng.between(1, 4)).set("n_embed", rng.between(1, 9));
        config.set("stride", if rng.chance(0.5) { 4 } else { 6 }).set("simple", rng.chance(0.5));
        config.set("decay", 0.99).set("eps", 1e-5).set("quantizer", if rng.chance(0.8) { "ema" } else { "fixed" });
        if mode == "train" {
            config.set("training", rng.chance(0.7)).set("commitment", 0.25);
        }
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, sizes) = (draw.size("batch", 1, 2), Sizes::of(config)?);
        let (h, w) = (draw.size("height", 1, 2), draw.size("width", 1, 2));
        let (r, mode) = (sizes.reduction(), config.str("mode")?);
        if mode == "decode" {
            let k = config.positive("n_embed")?;
            let codes = (0..batch * h * w).map(|_| draw.rng.below(k) as i64).collect();
            return draw.ints("codes", [batch, h, w], codes);
        }
        let mut side = |n: usize| n * r + if mode == "encode" { draw.rng.below(r) } else { 0 };
        let size = [batch, sizes.in_chans, side(h), side(w)];
        draw.normal("image", size);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let sizes = Sizes::of(run.config())?;
        match run.config().choice("mode", &["encode", "decode", "train"])? {
            "encode" => encode(run, sizes),
            "decode" => decode(run, sizes),
            _ => train(run, sizes),
        }
    }
}
