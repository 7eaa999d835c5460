//! `tokenizer.dvae`: the discrete VAE (DALL-E, arXiv 2102.12092), whose codes BEiT (arXiv 2106.08254) predicts.
//!
//! Two architectures: [`dalle`], [`simple`]. An image becomes logits over V codes for every 8×8 (or
//! 2^L×2^L) pixels; codes, or distributions over codes, become an image again. DALL-E's networks see `0.8 x + 0.1` and their
//! answer is undone by `clamp((sigmoid(raw) − 0.1)/0.8, 0, 1)`; both happen inside.
//!
//! Training: `y = gumbel_softmax(l, g, τ)`, `q = softmax(l)` without noise and temperature.
//! - `dalle`: `loss = Σ nll/n + β KL/n` with the logit-Laplace nll of the mapped image, n the number of its values,
//!   `KL = Σ q (ln q + ln V)` over all positions (the output `kl` is its mean over positions).
//! - `simple`: `loss = recon_loss + kl_weight · kl` with the mean squared error or `smooth_l1`, and
//!   `kl = Σ (q + 1e-10)(ln(q + 1e-10) + ln V)`, summed over batch and positions as the release has it: scale the weight accordingly.

use super::simple_vae::{Relaxation, Vae};
use super::{codes_below, codes_tensor, dalle, most_likely, probabilities, simple, stack};
use crate::case::{Config, Draw, Operation, Run, Value};
use crate::error::{Error, Result};
use crate::kernel::categorical::Divergence;
use crate::kernel::elementwise;
use crate::nn::gumbel_softmax::{self, Sample, check_tau};
use crate::nn::logit_laplace;
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::{Layout, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// ε of `map_pixels`: `(1 − 2ε) x + ε`.
const EPS: f64 = 0.1;

/// Draws standard Gumbel noise.
fn draw_gumbel(draw: &mut Draw, shape: [usize; 4]) {
    let noise = Tensor::from_fn(shape, |_| {
        let u = draw.rng.uniform().clamp(1e-12, 1.0 - 1e-12);
        -libm::log(-libm::log(u))
    });
    draw.inputs.insert("gumbel".into(), Value::Float(noise));
}

/// `unmap_pixels(sigmoid(raw[:, :C]))` and, given its gradient, that of `raw`.
fn unmapped<T: Float>(raw: &Tensor<T>, d_recon: Option<&Tensor<T>>) -> Result<(Tensor<T>, Tensor<T>)> {
    let [b, c2, h, w] = raw.dims("raw")?;
    let plane = c2 / 2 * h * w;
    let mut recon = Tensor::scratch([b, c2 / 2, h, w]);
    let mut d_raw = Tensor::zeros(raw.shape());
    for i in 0..b * plane {
        let at = i / plane * 2 * plane + i % plane;
        let (y, slope) = logit_laplace::unmap(raw.data()[at].to_f64(), EPS);
        recon.data_mut()[i] = T::from_f64(y);
        if let Some(d) = d_recon {
            d_raw.data_mut()[at] = T::from_f64(d.data()[i].to_f64() * slope);
        }
    }
    Ok((recon, d_raw))
}

/// An image of so many channels, channels last.
fn image_of<T: Float>(run: &Run<T>, in_chans: usize, side: Option<usize>) -> Result<(Tensor<T>, Tensor<T>)> {
    let image = run.input("image")?;
    let [b, c, h, w] = image.dims("input `image`")?;
    if c != in_chans || b * h * w == 0 || side.is_some_and(|side| [h, w] != [side, side]) {
        let size = side.map_or("height, width".into(), |side| format!("{side}, {side}"));
        return Err(Error::shape("input `image`", format!("[batch, {in_chans}, {size}]"), image.shape()));
    }
    Ok((channels_last(&image)?, image))
}

/// `x ← 0.8 x + 0.1`.
fn map_pixels<T: Float>(mut x: Tensor<T>) -> Tensor<T> {
    let (scale, shift) = (T::from_f64(1.0 - 2.0 * EPS), T::from_f64(EPS));
    x.data_mut().iter_mut().for_each(|x| *x = *x * scale + shift);
    x
}

/// `x ← factor · x`.
fn times<T: Float>(mut x: Tensor<T>, factor: f64) -> Tensor<T> {
    let factor = T::from_f64(factor);
    x.data_mut().iter_mut().for_each(|x| *x *= factor);
    x
}

fn scalar<T: Float>(run: &mut Run<T>, name: &str, value: f64) {
    run.output(name, &Tensor::scalar(T::from_f64(value)));
}

/// The upstream gradient of a scalar output.
fn upstream<T: Float>(run: &Run<T>, name: &str) -> Result<f64> {
    Ok(run.cotangent(name, [].into())?.data()[0].to_f64())
}

/// `encode`, which both architectures share.
fn encode<T: Float>(
    run: &mut Run<T>,
    in_chans: usize,
    side: Option<usize>,
    mapped: bool,
    build: impl FnOnce(&mut crate::nn::Names) -> Result<stack::Stack>,
) -> Result<()> {
    let (encoder, layout) = Layout::build(build)?;
    let p = run.params(&layout)?;
    let (x, _) = image_of(run, in_chans, side)?;
    let batch = x.shape()[0];
    let (logits, saved) = encoder.forward(&p, if mapped { map_pixels(x) } else { x })?;
    let shown = channels_first(&logits)?;
    run.output("logits", &shown);
    run.output_ints("tokens", codes_tensor(&most_likely(&logits), batch)?);
    if run.backward() {
        let mut g = run.zero_grads(&p);
        let d = channels_last(&run.cotangent("logits", shown.shape())?)?;
        let dx = channels_first(&encoder.backward(&p, &mut g, saved, d)?)?;
        run.grad_input("image", &if mapped { times(dx, 1.0 - 2.0 * EPS) } else { dx });
        run.grad_params(&g);
    }
    Ok(())
}

/// Hands in `raw` and `recon`; returns the gradient of raw, channels last, where gradients are asked for.
fn finish_decoding<T: Float>(run: &mut Run<T>, raw: &Tensor<T>) -> Result<Option<Tensor<T>>> {
    let raw = channels_first(raw)?;
    let (recon, _) = unmapped(&raw, None)?;
    run.output("raw", &raw);
    run.output("recon", &recon);
    if !run.backward() {
        return Ok(None);
    }
    let (_, mut d_raw) = unmapped(&raw, Some(&run.cotangent("recon", recon.shape())?))?;
    elementwise::add(d_raw.data_mut(), run.cotangent("raw", raw.shape())?.data());
    channels_last(&d_raw).map(Some)
}

fn decode_dalle<T: Float>(run: &mut Run<T>, sizes: dalle::Sizes) -> Result<()> {
    let (decoder, layout) = Layout::build(|names| dalle::Decoder::new(names.here(), sizes))?;
    let p = run.params(&layout)?;
    let mut g = run.zero_grads(&p);
    if run.config().str("mode")? == "decode" {
        let tokens = run.ints("tokens")?;
        let map = tokens.shape.dims("input `tokens`")?;
        let codes = codes_below("input `tokens`", tokens, sizes.vocab_size)?;
        let (raw, saved) = decoder.decode(&p, &codes, map)?;
        if let Some(d_raw) = finish_decoding(run, &raw)? {
            decoder.decode_backward(&p, &mut g, &codes, saved, d_raw)?;
            run.grad_params(&g);
        }
        return Ok(());
    }
    let probs = channels_last(&run.input("probs")?)?;
    let (raw, saved) = decoder.forward(&p, &probs)?;
    if let Some(d_raw) = finish_decoding(run, &raw)? {
        let d = decoder.backward(&p, &mut g, &probs, saved, d_raw)?;
        run.grad_input("probs", &channels_first(&d)?);
        run.grad_params(&g);
    }
    Ok(())
}

/// The distributions that the decoder gets in training.
fn sample<T: Float>(run: &Run<T>, logits: &Tensor<T>) -> Result<(Sample<T>, f64)> {
    let (tau, hard) = (check_tau(run.config().f64("tau")?)?, run.config().bool("hard")?);
    let gumbel = run.input("gumbel")?;
    gumbel.expect_shape("input `gumbel`", channels_first(logits)?.shape())?;
    Ok((gumbel_softmax::forward(logits, &channels_last(&gumbel)?, tau, hard)?, tau))
}

/// From the gradient of y to that of the encoder's input: noise, divergence, encoder; hands in the noise's gradient.
#[allow(clippy::too_many_arguments)]
fn encoder_backward<T: Float>(
    run: &mut Run<T>,
    p: &Params<T>,
    g: &mut Params<T>,
    encoder: &stack::Stack,
    saved: stack::Saved<T>,
    soft: &Tensor<T>,
    dy: Tensor<T>,
    tau: f64,
    (divergence, q, factor): (Divergence, &Tensor<T>, f64),
) -> Result<Tensor<T>> {
    let mut dl = gumbel_softmax::backward(soft, dy, tau);
    run.grad_input("gumbel", &channels_first(&dl)?);
    divergence.add_gradient(dl.data_mut(), q.data(), q.shape().rows_cols().1, factor);
    channels_first(&encoder.backward(p, g, saved, dl)?)
}

fn train_dalle<T: Float>(run: &mut Run<T>, sizes: dalle::Sizes) -> Result<()> {
    const KL: Divergence = Divergence { a: 0.0, b: 0.0 };
    let ((encoder, decoder), layout) =
        Layout::build(|names| Ok((dalle::encoder(names.here(), sizes)?, dalle::Decoder::new(names.here(), sizes)?)))?;
    let weight = run.config().f64("kl_weight")?;
    let p = run.params(&layout)?;
    let (x, image) = image_of(run, sizes.in_chans, None)?;
    let n = image.data().len() as f64;
    let (logits, encoded) = encoder.forward(&p, map_pixels(x))?;
    let (Sample { soft, y, .. }, tau) = sample(run, &logits)?;
    let (raw, decoded) = decoder.forward(&p, &y)?;
    let raw = channels_first(&raw)?;
    if raw.shape()[2..] != image.shape()[2..] {
        return Err(Error::shape("input `image`", "sides that are multiples of 8", image.shape()));
    }
    let q = probabilities(&logits);
    let (codes, positions) = (most_likely(&logits), (q.data().len() / sizes.vocab_size) as f64);
    let kl = KL.sum(q.data(), sizes.vocab_size);
    let (nll, recon) = logit_laplace::forward(&image, &raw, EPS)?;
    let recon_loss = logit_laplace::mean(&nll);
    scalar(run, "loss", recon_loss + weight * kl / n);
    scalar(run, "recon_loss", recon_loss);
    scalar(run, "kl", kl / positions);
    run.output("recon", &recon);
    run.output_ints("tokens", codes_tensor(&codes, image.shape()[0])?);
    drop((logits, nll));
    if run.backward() {
        let mut g = run.zero_grads(&p);
        let (d_loss, d_recon) = (upstream(run, "loss")?, run.cotangent("recon", recon.shape())?);
        let each = (d_loss + upstream(run, "recon_loss")?) / n;
        let d = logit_laplace::backward(&image, &raw, EPS, None, each, &d_recon)?;
        let dy = decoder.backward(&p, &mut g, &y, decoded, channels_last(&d.raw)?)?;
        let factor = d_loss * weight / n + upstream(run, "kl")? / positions;
        let dx = encoder_backward(run, &p, &mut g, &encoder, encoded, &soft, dy, tau, (KL, &q, factor))?;
        let mut d_image = d.image;
        elementwise::add_scaled(d_image.data_mut(), dx.data(), T::from_f64(1.0 - 2.0 * EPS));
        run.grad_input("image", &d_image);
        run.grad_params(&g);
    }
    Ok(())
}

fn decode_simple<T: Float>(run: &mut Run<T>, sizes: simple::Sizes) -> Result<()> {
    let ((decoder, codebook), layout) = Layout::build(|names| simple::decoder(names, sizes))?;
    let p = run.params(&layout)?;
    let tokens = run.ints("tokens")?;
    let [b, n] = tokens.shape.dims("input `tokens`")?;
    let side = n.isqrt();
    if side * side != n {
        return Err(Error::shape("input `tokens`", "[batch, a square]", tokens.shape));
    }
    let codes = codes_below("input `tokens`", tokens, sizes.vocab_size)?;
    let mut x = Tensor::scratch([b, side, side, sizes.codebook_dim]);
    crate::kernel::rows::gather(x.data_mut(), p.get(codebook), &codes, sizes.codebook_dim);
    let (y, saved) = decoder.forward(&p, x)?;
    let recon = channels_first(&y)?;
    run.output("recon", &recon);
    if run.backward() {
        let mut g = run.zero_grads(&p);
        let dx = decoder.backward(&p, &mut g, saved, channels_last(&run.cotangent("recon", recon.shape())?)?)?;
        let d = sizes.codebook_dim;
        let table = g.get_mut(codebook);
        for (row, &code) in dx.data().chunks_exact(d).zip(&codes) {
            table[code as usize * d..][..d].iter_mut().zip(row).for_each(|(a, &b)| *a += b);
        }
        run.grad_params(&g);
    }
    Ok(())
}

fn train_simple<T: Float>(run: &mut Run<T>, sizes: simple::Sizes) -> Result<()> {
    let (vae, layout) = Layout::build(|names| Vae::new(names, sizes))?;
    let (weight, kind) = (run.config().f64_or("kl_weight", 0.0)?, run.config().choice("recon", &["mse", "smooth_l1"])?.to_string());
    let relaxation = Relaxation { tau: check_tau(run.config().f64("tau")?)?, hard: run.config().bool("hard")? };
    let p = run.params(&layout)?;
    let (_, image) = image_of(run, sizes.in_chans, Some(sizes.image_size))?;
    let (batch, side) = (image.shape()[0], sizes.grid());
    let gumbel = run.input("gumbel")?;
    gumbel.expect_shape("input `gumbel`", [batch, sizes.vocab_size, side, side])?;
    let trained = vae.train(&p, &image, &channels_last(&gumbel)?, relaxation, kind == "mse")?;
    scalar(run, "loss", trained.recon_loss + weight * trained.kl);
    scalar(run, "recon_loss", trained.recon_loss);
    scalar(run, "kl", trained.kl);
    run.output("recon", &trained.recon);
    run.output_ints("tokens", codes_tensor(&trained.codes, batch)?);
    if run.backward() {
        let mut g = run.zero_grads(&p);
        let (d_loss, d_recon) = (upstream(run, "loss")?, run.cotangent("recon", image.shape())?);
        let d = [d_loss + upstream(run, "recon_loss")?, d_loss * weight + upstream(run, "kl")?];
        let [d_gumbel, d_image] = vae.train_backward(&p, &mut g, trained, d, Some(&d_recon))?;
        run.grad_input("gumbel", &channels_first(&d_gumbel)?);
        run.grad_input("image", &d_image);
        run.grad_params(&g);
    }
    Ok(())
}

/// `tokenizer.dvae`.
pub struct Dvae;

impl Operation for Dvae {
    const NAME: &'static str = "tokenizer.dvae";
    const PAPER: &'static str = "2102.12092 DALL-E";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("vocab_size", rng.between(2, 7)).set("in_chans", rng.between(1, 3));
        let modes: &[&str] = if rng.chance(0.5) {
            config.set("arch", "dalle").set("n_hid", rng.between(4, 5)).set("n_blk_per_group", 1 + usize::from(rng.chance(0.2)));
            config.set("n_init", rng.between(2, 5));
            &["encode", "decode", "decode_probs", "train"]
        } else {
            let layers = rng.between(1, 2);
            // Few units: each is a kink that differences may straddle.
            config.set("arch", "simple").set("num_layers", layers).set("image_size", (1 << layers) * rng.between(1, 3 - layers));
            config.set("codebook_dim", rng.between(1, 4)).set("hidden_dim", rng.between(1, 3));
            &["encode", "decode", "train"]
        };
        let mode = rng.pick(modes);
        config.set("mode", mode);
        if mode == "train" {
            config.set("tau", rng.range(0.5, 1.5)).set("kl_weight", rng.range(0.0, 2.0)).set("hard", rng.chance(0.3));
            if modes.len() == 3 {
                config.set("recon", rng.pick(&["mse", "smooth_l1"]));
            }
        }
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (mode, simple) = (config.str("mode")?, config.str("arch")? == "simple");
        let most = if mode == "train" { 1 } else { 2 };
        let (batch, v, c) = (draw.size("batch", 1, most), config.positive("vocab_size")?, config.positive("in_chans")?);
        let [h, w] = if simple {
            let sizes = simple::Sizes::of(config)?;
            [sizes.image_size >> sizes.num_layers; 2]
        } else {
            [draw.size("height", 1, most), draw.size("width", 1, 2)]
        };
        match mode {
            "decode" => {
                let codes = (0..batch * h * w).map(|_| draw.rng.below(v) as i64).collect();
                if simple { draw.ints("tokens", [batch, h * w], codes) } else { draw.ints("tokens", [batch, h, w], codes) }
            }
            "decode_probs" => {
                draw.uniform("probs", [batch, v, h, w]);
                Ok(())
            }
            _ => {
                let side = |n: usize, rng: &mut Rng| match config.usize("image_size") {
                    Ok(size) => size,
                    Err(_) => 8 * n + if mode == "encode" { rng.below(8) } else { 0 },
                };
                let size = [batch, c, side(h, draw.rng), side(w, draw.rng)];
                draw.uniform("image", size);
                if mode == "train" {
                    draw_gumbel(draw, [batch, v, h, w]);
                }
                Ok(())
            }
        }
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        if config.choice("arch", &["dalle", "simple"])? == "dalle" {
            let sizes = dalle::Sizes::of(config)?;
            match config.choice("mode", &["encode", "decode", "decode_probs", "train"])? {
                "encode" => encode(run, sizes.in_chans, None, true, |names| dalle::encoder(names.here(), sizes)),
                "train" => train_dalle(run, sizes),
                _ => decode_dalle(run, sizes),
            }
        } else {
            let sizes = simple::Sizes::of(config)?;
            match config.choice("mode", &["encode", "decode", "train"])? {
                "encode" => encode(run, sizes.in_chans, Some(sizes.image_size), false, |names| simple::encoder(names.here(), sizes)),
                "train" => train_simple(run, sizes),
                _ => decode_simple(run, sizes),
            }
        }
    }
}
