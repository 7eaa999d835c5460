//! `nn.vector_quantize`: vectors replaced by codes (VQ-VAE, arXiv 1711.00937), in the variants of CogView (arXiv 2105.13290, §2.2).
//!
//! The codebook `embed` `[D, K]` has codes as columns. Nearest-neighbour kinds take the code with the smallest `‖f − e‖²`, the first
//! of several; gradients go straight through, `diff = mean (z − sg e)²` pulls z towards its code.
//!
//! | kind | quantize | gradient of z | codebook |
//! | --- | --- | --- | --- |
//! | `ema` | e | straight through | moving averages, when training |
//! | `fixed` | e | straight through | stays |
//! | `ste` | e | straight through | `codebook_loss = mean (sg z − e)²` |
//! | `gumbel_ste` | e of argmax(l + g) | of `y embedᵀ`, `y = softmax((l + g)/τ)` | the same, with the one-hot y |
//! | `gumbel_soft` | `y embedᵀ` | the same | stays |
//! | `gumbel_hard_code` | e of argmax(l + g) | none (a bug of the release, kept) | moving averages, when training |
//!
//! `l = −‖f − e‖²` without the ‖f‖² that no softmax sees. The Gumbel kinds' `diff` is the mean over vectors of
//! `Σ_k p ln(p K + 1e-20)`, `p = softmax(l)`, without noise and temperature. From `dl` follow `dz = 2 Σ_k dl_k e_k` (`Σ_k dl_k = 0`)
//! and `dembed_k = 2 Σ_r dl_rk (z_r − e_k)`.
//!
//! Moving averages, after the outputs, with n_k the count and S_k the sum of the vectors of code k: `N ← γN + (1−γ)n`,
//! `A ← γA + (1−γ)S`, `embed_k ← A_k / ((N_k+ε)/(ΣN+Kε) ΣN)`.

use super::gumbel_softmax::{self, Sample, check_tau};
use super::param::{Init, Layout, Names, Param, Params};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes, Value};
use crate::error::{Error, Result};
use crate::kernel::categorical::{self, Divergence};
use crate::kernel::{elementwise, reduce};
use crate::linalg::{Epilogue, Mat, MatMut, gemm};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Shape, Tensor};

const KL: Divergence = Divergence { a: 0.0, b: 1e-20 };
const KINDS: [&str; 6] = ["ema", "fixed", "ste", "gumbel_ste", "gumbel_soft", "gumbel_hard_code"];

/// How vectors become codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantizer {
    /// Nearest code, moving averages.
    Ema,
    /// Nearest code, codebook fixed.
    Fixed,
    /// Nearest code, codebook learned.
    Ste,
    /// Sampled code, gradient of the soft one, codebook learned.
    GumbelSte,
    /// Soft code.
    GumbelSoft,
    /// Sampled code without gradient, moving averages.
    GumbelHardCode,
}

impl Quantizer {
    /// The key `quantizer`.
    pub fn of(config: &Config) -> Result<Self> {
        use Quantizer::*;
        let all = [Ema, Fixed, Ste, GumbelSte, GumbelSoft, GumbelHardCode];
        let name = config.choice("quantizer", &KINDS)?;
        Ok(KINDS.iter().zip(all).find(|(kind, _)| **kind == name).map_or(Ema, |(_, kind)| kind))
    }

    fn is_gumbel(self) -> bool {
        matches!(self, Quantizer::GumbelSte | Quantizer::GumbelSoft | Quantizer::GumbelHardCode)
    }

    fn learns(self) -> bool {
        matches!(self, Quantizer::Ste | Quantizer::GumbelSte)
    }

    fn averages(self) -> bool {
        matches!(self, Quantizer::Ema | Quantizer::GumbelHardCode)
    }
}

/// What a quantizer is.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width D of a code.
    pub dim: usize,
    /// Codes K.
    pub n_embed: usize,
    /// The kind.
    pub quantizer: Quantizer,
    /// Whether moving averages move.
    pub training: bool,
    /// γ.
    pub decay: f64,
    /// ε of the moving averages.
    pub eps: f64,
    /// τ of the Gumbel kinds.
    pub tau: f64,
}

/// A codebook and how it is used. `embed` is a parameter where it is learned by gradients, else a buffer; `cluster_size` `[K]` and
/// `embed_avg` `[D, K]` are buffers of those that move.
#[derive(Clone, Debug)]
pub struct VectorQuantize {
    settings: Settings,
    embed: Param,
    averages: Option<[Param; 2]>,
}

/// The outputs.
pub struct Quantized<T: Float> {
    /// The codes in place of the vectors.
    pub quantize: Tensor<T>,
    /// Commitment, or divergence from the uniform distribution.
    pub diff: f64,
    /// `mean (sg z − e)²`, for learned nearest codes.
    pub codebook_loss: f64,
    /// The number of the code of each vector.
    pub indices: Vec<u32>,
}

/// What the backward pass needs beside z.
pub struct Saved<T: Float> {
    /// `z − e`, for nearest codes.
    error: Option<Tensor<T>>,
    indices: Vec<u32>,
    /// Of the Gumbel kinds: p, y.
    soft: Option<(Tensor<T>, Tensor<T>)>,
}

/// The upstream gradients.
pub struct Upstream<'a, T: Float> {
    /// Of `quantize`.
    pub quantize: &'a Tensor<T>,
    /// Of `diff`.
    pub diff: f64,
    /// Of `codebook_loss`.
    pub codebook_loss: f64,
}

impl VectorQuantize {
    /// Registers the codebook. The release starts it Xavier-uniform with `cluster_size` 0, with which nearly all codes die in the
    /// first update; here `cluster_size` starts at 1, and [`start`](Self::start) makes `embed_avg` agree with `embed`.
    pub fn new(mut names: Names, settings: Settings) -> Result<Self> {
        let Settings { dim, n_embed, quantizer, training, .. } = settings;
        if dim == 0 || n_embed == 0 || n_embed > 1 << 24 {
            return Err(Error::config("n_embed", format!("expected positive sizes, found {n_embed} codes of width {dim}")));
        }
        let (shape, init) = (Shape::try_new(&[dim, n_embed])?, Init::XavierUniform { fan_in: dim, fan_out: n_embed });
        let embed = if quantizer.learns() { names.param("embed", shape, init) } else { names.buffer("embed", shape, init) };
        let averages = (training && quantizer.averages())
            .then(|| [names.buffer("cluster_size", [n_embed], Init::ONES), names.buffer("embed_avg", shape, init)]);
        Ok(VectorQuantize { settings, embed, averages })
    }

    /// Makes the moving average of the codes agree with the codes: how training should begin.
    pub fn start<T: Float>(&self, p: &mut Params<T>) {
        if let Some([_, average]) = self.averages {
            let codes = p.buffer(self.embed).to_vec();
            p.buffer_mut(average).copy_from_slice(&codes);
        }
    }

    /// The codebook `[D, K]`.
    pub fn codes<'a, T: Float>(&self, p: &'a Params<T>) -> &'a [T] {
        if self.settings.quantizer.learns() { p.get(self.embed) } else { p.buffer(self.embed) }
    }

    /// The codes of these numbers, row by row.
    pub fn look_up<T: Float>(&self, p: &Params<T>, indices: &[u32], shape: Shape) -> Tensor<T> {
        let (codes, Settings { dim, n_embed, .. }) = (self.codes(p), self.settings);
        let mut y = Tensor::scratch(shape);
        for (row, &k) in y.data_mut().chunks_exact_mut(dim).zip(indices) {
            row.iter_mut().enumerate().for_each(|(d, y)| *y = codes[d * n_embed + k as usize]);
        }
        y
    }

    fn rows<T: Float>(&self, z: &Tensor<T>) -> Result<usize> {
        let (rows, cols) = z.shape().rows_cols();
        if z.shape().is_empty() || cols != self.settings.dim || rows == 0 {
            return Err(Error::shape("input `z`", format!("[at least one, {}]", self.settings.dim), z.shape()));
        }
        Ok(rows)
    }

    /// The number of the nearest code of every vector.
    pub fn nearest<T: Float>(&self, p: &Params<T>, z: &Tensor<T>) -> Result<Vec<u32>> {
        let mut indices = vec![0; self.rows(z)?];
        categorical::nearest(&mut indices, z.data(), self.codes(p), self.settings.dim, self.settings.n_embed);
        Ok(indices)
    }

    /// Quantizes the vectors `z` `[…, D]`; `gumbel` `[vectors, K]` is the noise of the Gumbel kinds.
    pub fn forward<T: Float>(&self, p: &Params<T>, z: &Tensor<T>, gumbel: Option<&Tensor<T>>) -> Result<(Quantized<T>, Saved<T>)> {
        let (rows, Settings { dim, n_embed, quantizer, tau, .. }) = (self.rows(z)?, self.settings);
        if !quantizer.is_gumbel() {
            let indices = self.nearest(p, z)?;
            let quantize = self.look_up(p, &indices, z.shape());
            let mut error = z.clone();
            elementwise::add_scaled(error.data_mut(), quantize.data(), T::from_f64(-1.0));
            let diff = reduce::dot(error.data(), error.data()) / (rows * dim) as f64;
            let quantized = Quantized { quantize, diff, codebook_loss: diff, indices: indices.clone() };
            return Ok((quantized, Saved { error: Some(error), indices, soft: None }));
        }
        let gumbel = gumbel.ok_or_else(|| Error::missing("input `gumbel`"))?;
        gumbel.expect_shape("input `gumbel`", [rows, n_embed])?;
        let codes = Mat::new(self.codes(p), dim, n_embed);
        // l = 2 f·e − ‖e‖²
        let mut logits = Tensor::scratch([rows, n_embed]);
        gemm(Mat::new(z.data(), rows, dim), codes, MatMut::new(logits.data_mut(), rows, n_embed), Epilogue::default());
        let squares = categorical::column_squares(self.codes(p), n_embed);
        for row in logits.data_mut().chunks_exact_mut(n_embed) {
            row.iter_mut().zip(squares.iter()).for_each(|(l, &s)| *l = T::of(2) * *l - s);
        }
        let mut plain = Tensor::scratch(logits.shape());
        categorical::softmax(plain.data_mut(), logits.data(), None, 1.0, n_embed);
        let diff = KL.sum(plain.data(), n_embed) / rows as f64;
        let Sample { soft, index, .. } = gumbel_softmax::forward(&logits, gumbel, tau, false)?;
        drop(logits);
        let quantize = if quantizer == Quantizer::GumbelSoft {
            let mut y = Tensor::scratch(z.shape());
            gemm(Mat::new(soft.data(), rows, n_embed), codes.t(), MatMut::new(y.data_mut(), rows, dim), Epilogue::default());
            y
        } else {
            self.look_up(p, &index, z.shape())
        };
        let quantized = Quantized { quantize, diff, codebook_loss: 0.0, indices: index.clone() };
        Ok((quantized, Saved { error: None, indices: index, soft: Some((plain, soft)) }))
    }

    /// `dz`, and the gradient of the noise of the Gumbel kinds.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        z: &Tensor<T>,
        saved: &Saved<T>,
        upstream: Upstream<T>,
    ) -> Result<(Tensor<T>, Option<Tensor<T>>)> {
        let (rows, Settings { dim, n_embed, quantizer, tau, .. }) = (self.rows(z)?, self.settings);
        upstream.quantize.expect_shape("gradient of `quantize`", z.shape())?;
        let Some((plain, soft)) = &saved.soft else {
            let error = saved.error.as_ref().ok_or_else(|| Error::missing("the error of the codes"))?;
            let factor = 2.0 / (rows * dim) as f64;
            // dz = dquantize + 2 (z − e)/(R D) ddiff
            let mut dz = upstream.quantize.clone();
            elementwise::add_scaled(dz.data_mut(), error.data(), T::from_f64(factor * upstream.diff));
            if quantizer == Quantizer::Ste {
                let factor = T::from_f64(-factor * upstream.codebook_loss);
                self.scatter(g.get_mut(self.embed), error.data(), &saved.indices, factor);
            }
            return Ok((dz, None));
        };
        let codes = Mat::new(self.codes(p), dim, n_embed);
        let dq = Mat::new(upstream.quantize.data(), rows, dim);
        let mut dl = Tensor::zeros([rows, n_embed]);
        if quantizer != Quantizer::GumbelHardCode {
            gemm(dq, codes, MatMut::new(dl.data_mut(), rows, n_embed), Epilogue::default());
            dl = gumbel_softmax::backward(soft, dl, tau);
        }
        let d_gumbel = dl.clone();
        KL.add_gradient(dl.data_mut(), plain.data(), n_embed, upstream.diff / rows as f64);
        let mut dz = Tensor::scratch(z.shape());
        gemm(Mat::new(dl.data(), rows, n_embed), codes.t(), MatMut::new(dz.data_mut(), rows, dim), Epilogue::default());
        dz.data_mut().iter_mut().for_each(|x| *x *= T::of(2));
        if quantizer.learns() {
            // dembed_k = Σ_{r of k} dquantize_r + 2 Σ_r dl_rk (z_r − e_k)
            self.scatter(g.get_mut(self.embed), upstream.quantize.data(), &saved.indices, T::ONE);
            let mut d = Tensor::scratch([dim, n_embed]);
            gemm(
                Mat::new(z.data(), rows, dim).t(),
                Mat::new(dl.data(), rows, n_embed),
                MatMut::new(d.data_mut(), dim, n_embed),
                Epilogue::default(),
            );
            let mut sums = Tensor::zeros([n_embed]);
            reduce::add_column_sums(sums.data_mut(), dl.data());
            let codes = self.codes(p);
            for (i, (total, &d)) in g.get_mut(self.embed).iter_mut().zip(d.data()).enumerate() {
                *total += T::of(2) * (d - sums.data()[i % n_embed] * codes[i]);
            }
        }
        Ok((dz, Some(d_gumbel)))
    }

    /// `out[:, index[r]] += factor · x[r, :]`.
    fn scatter<T: Float>(&self, out: &mut [T], x: &[T], index: &[u32], factor: T) {
        for (row, &k) in x.chunks_exact(self.settings.dim).zip(index) {
            row.iter().enumerate().for_each(|(d, &x)| out[d * self.settings.n_embed + k as usize] += factor * x);
        }
    }

    /// Moves the averages and the codes, if they move, and hands them to `after` by name.
    pub fn update<T: Float>(&self, p: &mut Params<T>, z: &Tensor<T>, indices: &[u32], mut after: impl FnMut(&str, Tensor<T>)) {
        let Some([size, average]) = self.averages else { return };
        let Settings { dim, n_embed, decay, eps, .. } = self.settings;
        let (keep, add) = (T::from_f64(decay), T::from_f64(1.0 - decay));
        let (mut counts, mut sums) = (Tensor::<T>::zeros([n_embed]), Tensor::<T>::zeros([dim, n_embed]));
        indices.iter().for_each(|&k| counts.data_mut()[k as usize] += T::ONE);
        self.scatter(sums.data_mut(), z.data(), indices, T::ONE);
        for (buffer, fresh) in [(size, &counts), (average, &sums)] {
            p.buffer_mut(buffer).iter_mut().zip(fresh.data()).for_each(|(x, &new)| *x = keep * *x + add * new);
        }
        let total = p.buffer(size).iter().fold(T::ZERO, |sum, &n| sum + n);
        let scale = |n: T| (n + T::from_f64(eps)) / (total + T::from_f64(n_embed as f64 * eps)) * total;
        let smoothed: Vec<T> = p.buffer(size).iter().map(|&n| scale(n)).collect();
        let codes: Vec<T> = p.buffer(average).iter().enumerate().map(|(i, &a)| a / smoothed[i % n_embed]).collect();
        p.buffer_mut(self.embed).copy_from_slice(&codes);
        for (name, buffer) in [("embed", self.embed), ("cluster_size", size), ("embed_avg", average)] {
            let data = p.buffer(buffer);
            after(name, Tensor::from_fn(buffer.shape(), |i| data[i]));
        }
    }
}

/// `nn.vector_quantize`.
pub struct VectorQuantizeOp;

fn settings(config: &Config) -> Result<Settings> {
    let quantizer = Quantizer::of(config)?;
    Ok(Settings {
        dim: config.positive("dim")?,
        n_embed: config.positive("n_embed")?,
        quantizer,
        training: config.bool("training")?,
        decay: config.f64_or("decay", 0.99)?,
        eps: config.f64_or("eps", 1e-5)?,
        tau: if quantizer.is_gumbel() { check_tau(config.f64_or("tau", 1.0)?)? } else { 1.0 },
    })
}

impl Operation for VectorQuantizeOp {
    const NAME: &'static str = "nn.vector_quantize";
    const PAPER: &'static str = "2105.13290 CogView";

    fn sample(rng: &mut Rng) -> Config {
        let quantizer = rng.pick(&KINDS);
        let mut config = Config::default();
        config.set("dim", rng.between(1, 20)).set("n_embed", rng.between(1, 40)).set("quantizer", quantizer);
        config.set("training", rng.chance(0.6));
        if matches!(quantizer, "ema" | "gumbel_hard_code") {
            config.set("decay", rng.range(0.5, 0.99)).set("eps", 1e-5);
        }
        if quantizer.starts_with("gumbel") {
            config.set("tau", rng.range(0.3, 2.0));
        }
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (b, h, w) = (draw.size("batch", 1, 3), draw.size("height", 1, 5), draw.size("width", 1, 5));
        draw.normal("z", [b, h, w, config.positive("dim")?]);
        if Quantizer::of(config)?.is_gumbel() {
            let noise = Tensor::from_fn([b * h * w, config.positive("n_embed")?], |_| {
                let u = draw.rng.uniform().clamp(1e-12, 1.0 - 1e-12);
                -libm::log(-libm::log(u))
            });
            draw.inputs.insert("gumbel".into(), Value::Float(noise));
        }
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, h, w, d], k, quantizer) = (inputs.dims("z")?, config.positive("n_embed")?, Quantizer::of(config)?);
        let rows = b * h * w;
        // Distances, and the mean of soft codes.
        let products = 1 + usize::from(quantizer == Quantizer::GumbelSoft);
        // The codes, and either z − e or two distributions.
        let kept = rows * d + if quantizer.is_gumbel() { 2 * rows * k } else { rows * d };
        Ok(Some(Cost { flops: 2 * rows * d * k * products, activation_bytes: 4 * kept }))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = settings(run.config())?;
        let (layer, layout) = Layout::build(|names| VectorQuantize::new(names.here(), settings))?;
        let mut p = run.params(&layout)?;
        let z = run.input("z")?;
        let gumbel = if settings.quantizer.is_gumbel() { Some(run.input("gumbel")?) } else { None };
        let (Quantized { quantize, diff, codebook_loss, indices }, saved) = layer.forward(&p, &z, gumbel.as_ref())?;
        run.output("quantize", &quantize);
        run.output("diff", &Tensor::scalar(T::from_f64(diff)));
        let ste = settings.quantizer == Quantizer::Ste;
        if ste {
            run.output("codebook_loss", &Tensor::scalar(T::from_f64(codebook_loss)));
        }
        let vectors = Shape::try_new(&z.shape()[..z.shape().len() - 1])?;
        run.output_ints("indices", IntTensor::new(vectors, indices.iter().map(|&i| i64::from(i)).collect())?);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let scalar = |name: &str| Ok::<f64, Error>(run.cotangent(name, [].into())?.data()[0].to_f64());
            let upstream = Upstream {
                quantize: &run.cotangent("quantize", quantize.shape())?,
                diff: scalar("diff")?,
                codebook_loss: if ste { scalar("codebook_loss")? } else { 0.0 },
            };
            let (dz, d_gumbel) = layer.backward(&p, &mut g, &z, &saved, upstream)?;
            run.grad_input("z", &dz);
            if let Some(d_gumbel) = d_gumbel {
                run.grad_input("gumbel", &d_gumbel);
            }
            run.grad_params(&g);
        }
        layer.update(&mut p, &z, &indices, |name, value| run.after(name, Value::Float(value)));
        Ok(())
    }
}
