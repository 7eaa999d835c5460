//! `nn.logit_laplace`: the reconstruction loss of DALL-E's discrete VAE (arXiv 2102.12092, appendix A.3): the negative log-likelihood
//! of pixels in (0, 1) whose logit has a Laplace distribution.
//!
//! With `x = (1 − 2ε) image + ε`, `t = ln(x/(1 − x)) − μ`, `σ = ln b`: `nll = ln 2 + σ + ln x + ln(1 − x) + |t| e^{−σ}`,
//! `recon = clamp((sigmoid(μ) − ε)/(1 − 2ε), 0, 1)`.
//!
//! Backward, G the gradient of nll (with `sign(0) = 0`): `dμ = −G sign(t) e^{−σ}`, `dσ = G (1 − |t| e^{−σ})`,
//! `dimage = (1 − 2ε) G (1/x − 1/(1 − x) + sign(t) e^{−σ}/(x (1 − x)))`; recon, where it is not clamped,
//! `dμ += drecon · sigmoid(μ)(1 − sigmoid(μ))/(1 − 2ε)`.

use rayon::prelude::*;

use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// `sigmoid(x)`.
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + libm::exp(-x))
}

/// One pixel: `(nll, ∂/∂image, ∂/∂μ, ∂/∂σ)`.
pub fn pixel(image: f64, mu: f64, sigma: f64, eps: f64) -> (f64, [f64; 3]) {
    let x = (1.0 - 2.0 * eps) * image + eps;
    let t = libm::log(x / (1.0 - x)) - mu;
    let (b, sign) = (libm::exp(-sigma), if t == 0.0 { 0.0 } else { t.signum() });
    let nll = std::f64::consts::LN_2 + sigma + libm::log(x) + libm::log(1.0 - x) + t.abs() * b;
    let d_image = (1.0 - 2.0 * eps) * (1.0 / x - 1.0 / (1.0 - x) + sign * b / (x * (1.0 - x)));
    (nll, [d_image, -sign * b, 1.0 - t.abs() * b])
}

/// The reconstruction of one pixel, and its derivative by μ.
pub fn unmap(mu: f64, eps: f64) -> (f64, f64) {
    let (s, scale) = (sigmoid(mu), 1.0 / (1.0 - 2.0 * eps));
    let y = (s - eps) * scale;
    if (0.0..=1.0).contains(&y) { (y, s * (1.0 - s) * scale) } else { (y.clamp(0.0, 1.0), 0.0) }
}

/// The gradients of the image and of `raw`, from those of nll and recon; image, nll and recon are maps `[B, C, …]`, raw `[B, 2C, …]`.
pub struct Gradients<T: Float> {
    /// Of the image.
    pub image: Tensor<T>,
    /// Of raw.
    pub raw: Tensor<T>,
}

/// Checks the shapes and gives the number of pixels of all channels of an image.
fn plane<T: Float>(image: &Tensor<T>, raw: &Tensor<T>) -> Result<usize> {
    let [b, c, h, w] = image.dims("input `image`")?;
    raw.expect_shape("input `raw`", [b, 2 * c, h, w])?;
    if b * c * h * w == 0 {
        return Err(Error::shape("input `image`", "at least one pixel", image.shape()));
    }
    Ok(c * h * w)
}

/// `nll` and `recon`.
pub fn forward<T: Float>(image: &Tensor<T>, raw: &Tensor<T>, eps: f64) -> Result<(Tensor<T>, Tensor<T>)> {
    let plane = plane(image, raw)?;
    let (mut nll, mut recon) = (Tensor::scratch(image.shape()), Tensor::scratch(image.shape()));
    let raws = raw.data().par_chunks(2 * plane);
    let outs = nll.data_mut().par_chunks_mut(plane).zip(recon.data_mut().par_chunks_mut(plane));
    outs.zip(image.data().par_chunks(plane)).zip(raws).for_each(|(((nll, recon), image), raw)| {
        for i in 0..plane {
            let (mu, sigma) = (raw[i].to_f64(), raw[plane + i].to_f64());
            nll[i] = T::from_f64(pixel(image[i].to_f64(), mu, sigma, eps).0);
            recon[i] = T::from_f64(unmap(mu, eps).0);
        }
    });
    Ok((nll, recon))
}

/// The gradients; `each` is added to that of every nll.
pub fn backward<T: Float>(
    image: &Tensor<T>,
    raw: &Tensor<T>,
    eps: f64,
    d_nll: Option<&Tensor<T>>,
    each: f64,
    d_recon: &Tensor<T>,
) -> Result<Gradients<T>> {
    let plane = plane(image, raw)?;
    let (mut d_image, mut d_raw) = (Tensor::scratch(image.shape()), Tensor::scratch(raw.shape()));
    let outs = d_image.data_mut().par_chunks_mut(plane).zip(d_raw.data_mut().par_chunks_mut(2 * plane));
    outs.enumerate().for_each(|(b, (d_image, d_raw))| {
        let (image, raw) = (&image.data()[b * plane..], &raw.data()[2 * b * plane..]);
        let (d_nll, d_recon) = (d_nll.map(|d| &d.data()[b * plane..]), &d_recon.data()[b * plane..]);
        for i in 0..plane {
            let (mu, sigma) = (raw[i].to_f64(), raw[plane + i].to_f64());
            let g = each + d_nll.map_or(0.0, |d| d[i].to_f64());
            let (_, [by_image, by_mu, by_sigma]) = pixel(image[i].to_f64(), mu, sigma, eps);
            d_image[i] = T::from_f64(g * by_image);
            d_raw[i] = T::from_f64(g * by_mu + d_recon[i].to_f64() * unmap(mu, eps).1);
            d_raw[plane + i] = T::from_f64(g * by_sigma);
        }
    });
    Ok(Gradients { image: d_image, raw: d_raw })
}

/// The mean of all elements, added in f64 chunk by chunk.
pub fn mean<T: Float>(x: &Tensor<T>) -> f64 {
    let sums: Vec<f64> = x.data().par_chunks(4096).map(|x| x.iter().map(|x| x.to_f64()).sum()).collect();
    sums.iter().sum::<f64>() / x.data().len() as f64
}

/// `nn.logit_laplace`.
pub struct LogitLaplace;

impl Operation for LogitLaplace {
    const NAME: &'static str = "nn.logit_laplace";
    const PAPER: &'static str = "2102.12092 DALL-E";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("channels", rng.between(1, 4)).set("eps", rng.range(0.05, 0.2));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (b, c) = (draw.size("batch", 1, 3), config.positive("channels")?);
        let (h, w) = (draw.size("height", 1, 5), draw.size("width", 1, 5));
        draw.uniform("image", [b, c, h, w]);
        draw.normal("raw", [b, 2 * c, h, w]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (channels, eps) = (config.usize("channels")?, config.f64_or("eps", 0.1)?);
        if !(0.0..0.5).contains(&eps) {
            return Err(Error::config("eps", format!("expected a number from 0 to below ½, found {eps}")));
        }
        let (image, raw) = (run.input("image")?, run.input("raw")?);
        let [_, c, ..] = image.dims::<4>("input `image`")?;
        if c != channels {
            return Err(Error::shape("input `image`", format!("[batch, {channels}, height, width]"), image.shape()));
        }
        let (nll, recon) = forward(&image, &raw, eps)?;
        run.output("nll", &nll);
        run.output("loss", &Tensor::scalar(T::from_f64(mean(&nll))));
        run.output("recon", &recon);
        if run.backward() {
            let d_loss = run.cotangent("loss", [].into())?.data()[0].to_f64();
            let (d_nll, d_recon) = (run.cotangent("nll", nll.shape())?, run.cotangent("recon", recon.shape())?);
            let d = backward(&image, &raw, eps, Some(&d_nll), d_loss / nll.data().len() as f64, &d_recon)?;
            run.grad_input("image", &d.image);
            run.grad_input("raw", &d.raw);
        }
        Ok(())
    }
}
