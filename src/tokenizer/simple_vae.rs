//! The discrete VAE of [`simple`] as a whole: encoder, codebook, decoder.
//!
//! `l = encoder(x)`, `y = gumbel_softmax(l, g, τ)`, `e = Σ_v y_v codebook_v`, `recon = decoder(e)`; the reconstruction loss is the mean of
//! `ρ(recon − x)`, and `kl = Σ (q + 1e-10)(ln(q + 1e-10) + ln V)` over all positions, `q = softmax(l)`.

use super::simple::{self, Sizes};
use super::stack::{self, Stack};
use super::{most_likely, probabilities};
use crate::error::{Error, Result};
use crate::kernel::categorical::Divergence;
use crate::kernel::{elementwise, rows};
use crate::linalg::{Epilogue, Mat, MatMut, gemm};
use crate::nn::gumbel_softmax::{self, Sample};
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::{Names, Param, Params};
use crate::tensor::{Float, Tensor};

const KL: Divergence = Divergence { a: 1e-10, b: 0.0 };

/// The network.
#[derive(Clone, Debug)]
pub struct Vae {
    encoder: Stack,
    decoder: Stack,
    codebook: Param,
    sizes: Sizes,
}

/// How the decoder gets its codes in training.
#[derive(Clone, Copy, Debug)]
pub struct Relaxation {
    /// The temperature τ.
    pub tau: f64,
    /// One-hot codes forward, their relaxation backward.
    pub hard: bool,
}

/// What [`Vae::train`] found, and what [`Vae::train_backward`] needs.
pub struct Trained<T: Float> {
    /// The reconstruction, `[B, C, S, S]`.
    pub recon: Tensor<T>,
    /// The most likely code at every position, `[B, h·w]`.
    pub codes: Vec<u32>,
    /// The mean reconstruction error.
    pub recon_loss: f64,
    /// The divergence, summed over batch and positions.
    pub kl: f64,
    encoded: stack::Saved<T>,
    decoded: stack::Saved<T>,
    soft: Tensor<T>,
    y: Tensor<T>,
    q: Tensor<T>,
    slope: Tensor<T>,
    tau: f64,
}

/// The mean reconstruction error, and its derivative by each value of the reconstruction.
fn reconstruction<T: Float>(squares: bool, recon: &Tensor<T>, image: &Tensor<T>) -> (f64, Tensor<T>) {
    let n = image.data().len() as f64;
    let error = |d: f64| match squares {
        true => (d * d, 2.0 * d),
        _ if d.abs() < 1.0 => (0.5 * d * d, d),
        _ => (d.abs() - 0.5, d.signum()),
    };
    let mut sum = 0.0;
    let slope = Tensor::from_fn(image.shape(), |i| {
        let (value, slope) = error(recon.data()[i].to_f64() - image.data()[i].to_f64());
        sum += value;
        T::from_f64(slope / n)
    });
    (sum / n, slope)
}

impl Vae {
    /// Registers the parameters.
    pub fn new(names: &mut Names, sizes: Sizes) -> Result<Self> {
        let encoder = simple::encoder(names.here(), sizes)?;
        let (decoder, codebook) = simple::decoder(names, sizes)?;
        Ok(Vae { encoder, decoder, codebook, sizes })
    }

    /// The sizes.
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    fn expect<T: Float>(&self, image: &Tensor<T>) -> Result<usize> {
        let [batch, ..] = image.dims::<4>("image")?;
        let Sizes { image_size, in_chans, .. } = self.sizes;
        image.expect_shape("image", [batch, in_chans, image_size, image_size])?;
        Ok(batch)
    }

    /// The most likely codes of `image` `[B, C, S, S]`: `[B, h·w]`.
    pub fn encode<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<Vec<u32>> {
        self.expect(image)?;
        Ok(most_likely(&self.encoder.forward(p, channels_last(image)?)?.0))
    }

    /// The images `[B, C, S, S]` of codes `[B, h·w]`.
    pub fn decode<T: Float>(&self, p: &Params<T>, codes: &[u32]) -> Result<Tensor<T>> {
        let Sizes { codebook_dim: d, vocab_size, .. } = self.sizes;
        let side = self.sizes.grid();
        if !codes.len().is_multiple_of(side * side) || codes.iter().any(|&code| code as usize >= vocab_size) {
            let expected = format!("whole images of {} codes below {vocab_size}", side * side);
            return Err(Error::value("codes", format!("expected {expected}, found {} codes", codes.len())));
        }
        let mut x = Tensor::scratch([codes.len() / (side * side), side, side, d]);
        rows::gather(x.data_mut(), p.get(self.codebook), codes, d);
        channels_first(&self.decoder.forward(p, x)?.0)
    }

    /// The losses of `image` `[B, C, S, S]` with Gumbel noise `[B, h, w, V]`; the error is squared, or else smooth ℓ₁.
    pub fn train<T: Float>(
        &self,
        p: &Params<T>,
        image: &Tensor<T>,
        gumbel: &Tensor<T>,
        relaxation: Relaxation,
        squares: bool,
    ) -> Result<Trained<T>> {
        self.expect(image)?;
        let Relaxation { tau, hard } = relaxation;
        let (logits, encoded) = self.encoder.forward(p, channels_last(image)?)?;
        let Sample { soft, y, .. } = gumbel_softmax::forward(&logits, gumbel, tau, hard)?;
        let Sizes { vocab_size: v, codebook_dim: d, .. } = self.sizes;
        let n = y.data().len() / v;
        let mut e = Tensor::scratch(y.shape().with_last(d));
        let (weights, table) = (Mat::new(y.data(), n, v), Mat::new(p.get(self.codebook), v, d));
        gemm(weights, table, MatMut::new(e.data_mut(), n, d), Epilogue::default());
        let (shown, decoded) = self.decoder.forward(p, e)?;
        let recon = channels_first(&shown)?;
        let (q, codes) = (probabilities(&logits), most_likely(&logits));
        let (recon_loss, slope) = reconstruction(squares, &recon, image);
        Ok(Trained { recon, codes, recon_loss, kl: KL.sum(q.data(), v), encoded, decoded, soft, y, q, slope, tau })
    }

    /// Adds the gradients of the parameters, for those of `recon_loss` and `kl` and, where there is one, a further gradient of `recon`.
    /// Returns the gradients of the noise, `[B, h, w, V]`, and of the image, which is the target too.
    pub fn train_backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        trained: Trained<T>,
        [d_recon_loss, d_kl]: [f64; 2],
        d_recon_too: Option<&Tensor<T>>,
    ) -> Result<[Tensor<T>; 2]> {
        let Trained { encoded, decoded, soft, y, q, mut slope, tau, .. } = trained;
        let Sizes { vocab_size: v, codebook_dim: d, .. } = self.sizes;
        let (n, factor) = (y.data().len() / v, T::from_f64(d_recon_loss));
        slope.data_mut().iter_mut().for_each(|x| *x *= factor);
        let mut d_recon = slope.clone();
        if let Some(more) = d_recon_too {
            more.expect_shape("gradient of recon", d_recon.shape())?;
            elementwise::add(d_recon.data_mut(), more.data());
        }
        let de = self.decoder.backward(p, g, decoded, channels_last(&d_recon)?)?;
        let (de, weights) = (Mat::new(de.data(), n, d), Mat::new(y.data(), n, v));
        let accumulate = Epilogue { accumulate: true, ..Epilogue::default() };
        gemm(weights.t(), de, MatMut::new(g.get_mut(self.codebook), v, d), accumulate);
        let mut dy = Tensor::scratch(y.shape());
        gemm(de, Mat::new(p.get(self.codebook), v, d).t(), MatMut::new(dy.data_mut(), n, v), Epilogue::default());
        let mut dl = gumbel_softmax::backward(&soft, dy, tau);
        let d_gumbel = dl.clone();
        KL.add_gradient(dl.data_mut(), q.data(), v, d_kl);
        let mut d_image = channels_first(&self.encoder.backward(p, g, encoded, dl)?)?;
        elementwise::add_scaled(d_image.data_mut(), slope.data(), T::from_f64(-1.0));
        Ok([d_gumbel, d_image])
    }
}
