//! `mim.a2mim_loss`: A²MIM's loss (arXiv 2205.13943): masked pixels, and their completion in the Fourier domain.
//!
//! `d = pred − target`, `a = |d|`, `ρ` = a, a², `a s^γ` or `a² s^γ` with `s = tanh(αa)` or `tanh(αa/2)` (plus the plain loss with
//! `focal_residual`). With M = 1 on masked pixels, `W = M + (1 − M)·unmask_weight`:
//! `L_spa = Σ W ρ / ((Σ W + 1e-5) C)`. With `F = M + (1 − M)·fft_unmask_weight`: `q = pred F + R (1 − F)`, R without gradient, and
//! `L_fft` = [`FocalFrequency`] of q and target, or the mean of `ℓ = ρ(|DFT(q − target)|)` (of `sg(ℓ) ℓ` with `fft_reweight`).
//! `loss = L_spa + fft_weight L_fft`.
//!
//! Backward: `∂pred = W ρ′(d) / ((Σ W + 1e-5) C) + fft_weight F ⊙ ∂q`; the focal factor is not a constant. Without the focal Fourier loss
//! `∂q = Re(Fᴴ G)`, `G = ρ′(z) [ℓ] E / (z n)`.

use super::a2mim_paint::PixelMask;
use super::frequency::{Dft, FocalFrequency, same_images};
use super::mask::read_mask;
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The element loss ρ.
#[derive(Clone, Copy, Debug)]
struct Element {
    square: bool,
    /// α (halved for the sigmoid), γ.
    focal: Option<[f64; 2]>,
    residual: bool,
}

impl Element {
    /// ρ and dρ/da at `a ≥ 0`.
    fn at(&self, a: f64) -> (f64, f64) {
        let (plain, slope) = if self.square { (a * a, 2.0 * a) } else { (a, 1.0) };
        let Some([alpha, gamma]) = self.focal else { return (plain, slope) };
        let s = libm::tanh(alpha * a);
        let (power, d_power) = if gamma == 1.0 { (s, 1.0) } else { (libm::pow(s, gamma), gamma * libm::pow(s, gamma - 1.0)) };
        let d_power = if a > 0.0 { d_power * alpha * (1.0 - s * s) } else { 0.0 };
        let more = if self.residual { (plain, slope) } else { (0.0, 0.0) };
        (plain * power + more.0, slope * power + plain * d_power + more.1)
    }
}

/// R: what stands in the place of visible pixels in the Fourier loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Replace {
    Target,
    Prediction,
    Mean,
    Mixed,
}

/// The loss.
#[derive(Clone, Copy, Debug)]
pub struct A2mimLoss {
    element: Element,
    unmask_weight: f64,
    fft_weight: f64,
    fft_focal: bool,
    fft_reweight: bool,
    fft_unmask_weight: f64,
    replace: Replace,
}

const MODES: [&str; 4] = ["l1_loss", "mse_loss", "focal_l1_loss", "focal_mse_loss"];

impl A2mimLoss {
    /// From the keys of `mim.a2mim_loss`.
    pub fn from_config(config: &Config) -> Result<Self> {
        let choice = |key: &str, among: &[&str], default: &'static str| -> Result<String> {
            if config.get(key).is_none() { Ok(default.into()) } else { Ok(config.choice(key, among)?.into()) }
        };
        let share = |key: &str| match config.f64_or(key, 0.0)? {
            x if (0.0..=1.0).contains(&x) => Ok(x),
            x => Err(Error::config(key, format!("expected a number from 0 to 1, found {x}"))),
        };
        let mode = choice("loss_mode", &MODES, "l1_loss")?;
        let (alpha, gamma) = (config.f64_or("focal_alpha", 0.2)?, config.f64_or("focal_gamma", 1.0)?);
        let alpha = if choice("focal_activate", &["sigmoid", "tanh"], "sigmoid")? == "sigmoid" { alpha / 2.0 } else { alpha };
        let element = Element {
            square: mode.ends_with("mse_loss"),
            focal: mode.starts_with("focal").then_some([alpha, gamma]),
            residual: config.bool_or("focal_residual", false)?,
        };
        let (fft_weight, fft_focal) = (config.f64_or("fft_weight", 0.0)?, config.bool_or("fft_focal", false)?);
        if fft_weight > 0.0 && !fft_focal && element.square {
            return Err(Error::config(
                "loss_mode",
                format!("expected \"l1_loss\" or \"focal_l1_loss\" without `fft_focal`, found \"{mode}\""),
            ));
        }
        let replace = match choice("fft_unmask_replace", &["target", "prediction", "mean", "mixed"], "target")?.as_str() {
            "target" => Replace::Target,
            "prediction" => Replace::Prediction,
            "mean" => Replace::Mean,
            _ => Replace::Mixed,
        };
        Ok(A2mimLoss {
            element,
            unmask_weight: share("unmask_weight")?,
            fft_weight,
            fft_focal,
            fft_reweight: config.bool_or("fft_reweight", false)?,
            fft_unmask_weight: share("fft_unmask_weight")?,
            replace,
        })
    }

    /// The loss and the gradient of `pred`; `hidden` `[B, h, w]` says which cells are masked.
    pub fn run<T: Float>(&self, pred: &Tensor<T>, target: &Tensor<T>, hidden: &[bool], cells: [usize; 3]) -> Result<(T, Tensor<T>)> {
        let dims @ [b, c, h, w] = same_images(pred, target)?;
        let mask = PixelMask::new(hidden, cells, dims)?;
        let plane = h * w;
        let masked: Vec<bool> = (0..b * plane).map(|i| mask.at(i / plane, i % plane)).collect();
        let at = |i: usize| masked[i / (c * plane) * plane + i % plane];
        let weight = |i: usize| if at(i) { 1.0 } else { self.unmask_weight };
        let total: f64 = masked.iter().fold(0.0, |sum, &m| sum + if m { 1.0 } else { self.unmask_weight });
        let normaliser = (total + 1e-5) * c as f64;
        let mut loss = 0.0;
        let mut d = Tensor::from_fn(pred.shape(), |i| {
            let d = pred.data()[i].to_f64() - target.data()[i].to_f64();
            let (rho, slope) = self.element.at(d.abs());
            loss += weight(i) * rho;
            T::from_f64(if d == 0.0 { 0.0 } else { weight(i) * slope * d.signum() / normaliser })
        });
        loss /= normaliser;
        if self.fft_weight > 0.0 {
            let share = |i: usize| if at(i) { 1.0 } else { self.fft_unmask_weight };
            let q = self.complete(pred, target, share)?;
            let (value, dq) = if self.fft_focal { FocalFrequency::A2MIM.run(&q, target)? } else { self.frequencies(&q, target)? };
            loss += self.fft_weight * value;
            for (i, (d, dq)) in d.data_mut().iter_mut().zip(dq.data()).enumerate() {
                *d += T::from_f64(self.fft_weight * share(i) * dq.to_f64());
            }
        }
        Ok((T::from_f64(loss), d))
    }

    /// `q = pred F + R (1 − F)`.
    fn complete<T: Float>(&self, pred: &Tensor<T>, target: &Tensor<T>, share: impl Fn(usize) -> f64) -> Result<Tensor<T>> {
        if self.fft_unmask_weight >= 1.0 {
            return Ok(pred.clone());
        }
        let [_, _, h, w] = pred.dims("pred")?;
        let means: Vec<f64> = match self.replace {
            Replace::Mean => {
                target.data().chunks_exact(h * w).map(|x| x.iter().fold(0.0, |sum, x| sum + x.to_f64()) / (h * w) as f64).collect()
            }
            _ => Vec::new(),
        };
        Ok(Tensor::from_fn(pred.shape(), |i| {
            let (f, p, t) = (share(i), pred.data()[i].to_f64(), target.data()[i].to_f64());
            let r = match self.replace {
                Replace::Target => t,
                Replace::Prediction => p,
                Replace::Mean => means[i / (h * w)],
                Replace::Mixed => 0.5 * p + 0.5 * t,
            };
            T::from_f64(p * f + r * (1.0 - f))
        }))
    }

    /// The Fourier loss without focal weights, and the gradient of `q`.
    fn frequencies<T: Float>(&self, q: &Tensor<T>, target: &Tensor<T>) -> Result<(f64, Tensor<T>)> {
        let [_, _, h, w] = q.dims("pred")?;
        let n = q.data().len();
        let e = Tensor::from_fn(q.shape(), |i| q.data()[i] - target.data()[i]);
        let dft = Dft::new([h, w]);
        let [mut re, mut im] = dft.forward(&e);
        let mut loss = 0.0;
        for (re, im) in re.data_mut().iter_mut().zip(im.data_mut()) {
            let z = (re.to_f64().powi(2) + im.to_f64().powi(2)).sqrt();
            let (rho, slope) = self.element.at(z);
            let constant = if self.fft_reweight { rho } else { 1.0 };
            loss += constant * rho;
            let factor = if z > 0.0 { slope * constant / (z * n as f64) } else { 0.0 };
            *re *= T::from_f64(factor);
            *im *= T::from_f64(factor);
        }
        Ok((loss / n as f64, dft.inverse([&re, &im])))
    }
}

/// Random keys of `mim.a2mim_loss`.
pub fn sample_loss(rng: &mut Rng, config: &mut Config) {
    let focal = rng.chance(0.6);
    let mode = if focal { rng.pick(&MODES) } else { rng.pick(&["l1_loss", "focal_l1_loss"]) };
    config.set("loss_mode", mode).set("focal_alpha", rng.range(0.1, 1.0)).set("focal_gamma", [1.0, 0.5, 2.0][rng.below(3)]);
    config.set("focal_activate", rng.pick(&["sigmoid", "tanh"])).set("focal_residual", rng.chance(0.3));
    config.set("unmask_weight", [0.0, 0.3, 1.0][rng.below(3)]).set("fft_weight", [0.0, 0.1, 0.5][rng.below(3)]);
    config.set("fft_focal", focal).set("fft_reweight", rng.chance(0.3)).set("fft_unmask_weight", [0.0, 0.001, 0.4, 1.0][rng.below(4)]);
    config.set("fft_unmask_replace", rng.pick(&["target", "prediction", "mean", "mixed"]));
    if rng.chance(0.2) {
        config.set("fft_unmask_replace", serde_json::Value::Null);
    }
}

/// `mim.a2mim_loss`.
pub struct A2mimLossOp;

impl Operation for A2mimLossOp {
    const NAME: &'static str = "mim.a2mim_loss";
    const PAPER: &'static str = "2205.13943 A2MIM";
    const DATA: &'static [&'static str] = &["target"];

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_loss(rng, &mut config);
        config
    }

    fn inputs(_: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, h, w) = (draw.size("batch", 1, 3), draw.rng.between(1, 4), draw.rng.between(1, 4));
        let shape = [batch, draw.rng.between(1, 3), h * draw.rng.between(1, 3), w * draw.rng.between(1, 3)];
        draw.normal("pred", shape);
        draw.normal("target", shape);
        let mask = (0..batch * h * w).map(|_| i64::from(draw.rng.chance(0.6))).collect();
        draw.ints("mask", [batch, h, w], mask)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let loss = A2mimLoss::from_config(run.config())?;
        let mask = run.ints("mask")?;
        let cells = mask.shape.dims("mask")?;
        let (value, mut d) = loss.run(&run.input("pred")?, &run.input("target")?, &read_mask(mask, cells)?, cells)?;
        run.output("loss", &Tensor::scalar(value));
        if run.backward() {
            let d_loss = run.cotangent("loss", [].into())?.data()[0];
            d.data_mut().iter_mut().for_each(|x| *x *= d_loss);
            run.grad_input("pred", &d);
        }
        Ok(())
    }
}
