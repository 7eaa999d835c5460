//! `mim.beit`: BEiT's pre-training (arXiv 2106.08254): a tokenizer's visual tokens are predicted at masked patches.
//!
//! `logits = lm_head(norm(encoder(x(1 − m) + mask_token·m)))` at the M masked positions of the batch only, in order of image and position;
//! `loss = (1/M) Σ (logsumexp(logits) − logits[token])`, so images with more masked patches weigh more.
//!
//! Backward: `dlogits = (softmax − onehot)/M`, scattered back to the masked rows.

use std::sync::Arc;

use rayon::prelude::*;

use super::mask::read_mask;
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::{categorical, elementwise, rows};
use crate::model::beit::{Encoder, EncoderSaved, sample_encoder, settings, without_class_token};
use crate::model::swin_ops::mean_tokens;
use crate::nn::{Init, Layout, Linear, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The network.
pub struct BeitMim {
    layout: Arc<Layout>,
    encoder: Encoder,
    head: Linear,
}

/// What [`BeitMim::backward`] needs, and the outputs.
pub struct Saved<T: Float> {
    encoder: EncoderSaved<T>,
    /// Rows of masked positions among all tokens, and those tokens.
    index: Vec<u32>,
    features: Tensor<T>,
    batch: usize,
    /// `[M, V]`.
    pub logits: Tensor<T>,
    /// The visual tokens at the masked positions.
    labels: Vec<usize>,
    /// Log of the sum of exponentials of every row of logits.
    log_sums: Vec<f64>,
    /// The mean cross-entropy.
    pub loss: T,
    /// The share of masked positions whose largest logit is the token's.
    pub accuracy: T,
}

impl<T: Float> Saved<T> {
    /// The token of the largest logit (the first of several) at every masked position.
    pub fn predicted(&self) -> Vec<u32> {
        let [rows, vocab] = [self.labels.len(), self.logits.shape().rows_cols().1];
        let mut index = vec![0; rows];
        categorical::first_largest(&mut index, self.logits.data(), None, vocab);
        index
    }
}

impl BeitMim {
    /// The network from the keys of `mim.beit`.
    pub fn new(config: &Config) -> Result<Self> {
        let vocab = config.positive("vocab_size")?;
        let ((encoder, head), layout) = Layout::build(|names| {
            let encoder = Encoder::new(names, settings(config, true, true)?)?;
            let head = Linear::new(names.at("lm_head"), encoder.features(), vocab, true, Init::NORMAL_02);
            Ok((encoder, head))
        })?;
        Ok(BeitMim { layout, encoder, head })
    }

    /// Names, shapes and initialisation of the parameters.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Patches N of an image.
    pub fn patches(&self) -> usize {
        self.encoder.grid().iter().product()
    }

    /// The mean of the patches' tokens of whole images, `[B, C]`.
    pub fn features<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<Tensor<T>> {
        mean_tokens(&without_class_token(&self.encoder.infer(p, image)?)?)
    }

    /// Loss, logits and accuracy of `image` with the patches `hidden` `[B, N]`, whose visual tokens stand in `tokens` `[B, N]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, hidden: &[bool], tokens: &[i64]) -> Result<Saved<T>> {
        let n = self.patches();
        let masked: Vec<usize> = (0..hidden.len()).filter(|&i| hidden[i]).collect();
        if masked.is_empty() {
            return Err(Error::value("mask", "expected at least one masked patch in the batch, found none"));
        }
        let vocab = self.head.outputs();
        let label = |&i: &usize| {
            let token = tokens.get(i).copied().unwrap_or(-1);
            usize::try_from(token)
                .ok()
                .filter(|&token| token < vocab)
                .ok_or_else(|| Error::value("input `tokens`", format!("expected numbers below {vocab} at masked patches, found {token}")))
        };
        let labels: Vec<usize> = masked.iter().map(label).collect::<Result<_>>()?;
        let (y, encoder) = self.encoder.forward(p, image, Some(hidden))?;
        let [batch, _, c] = y.dims("tokens")?;
        let index: Vec<u32> = masked.iter().map(|&i| (i / n * (1 + n) + 1 + i % n) as u32).collect();
        let mut features = Tensor::scratch([index.len(), c]);
        rows::gather(features.data_mut(), y.data(), &index, c);
        drop(y);
        let logits = self.head.forward(p, &features)?;
        // Per row: log of the sum, loss, whether the first maximum is the label.
        let row = |(row, &label): (&[T], &usize)| {
            let best = (1..vocab).fold(0, |best, k| if row[k] > row[best] { k } else { best });
            let max = row[best].to_f64();
            let log_sum = max + libm::log(row.iter().fold(0.0, |sum, z| sum + libm::exp(z.to_f64() - max)));
            (log_sum, log_sum - row[label].to_f64(), best == label)
        };
        let all: Vec<(f64, f64, bool)> = logits.data().par_chunks(vocab).zip(labels.par_iter()).map(row).collect();
        let m = labels.len() as f64;
        let loss = T::from_f64(all.iter().fold(0.0, |sum, row| sum + row.1) / m);
        let accuracy = T::from_f64(all.iter().filter(|row| row.2).count() as f64 / m);
        let log_sums = all.iter().map(|row| row.0).collect();
        Ok(Saved { encoder, index, features, batch, logits, labels, log_sums, loss, accuracy })
    }

    /// Adds the gradients of the parameters, for the gradient of the loss and, where there is one, a further gradient of the logits. The
    /// gradient of the image if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_loss: T,
        d_logits_too: Option<&Tensor<T>>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let Saved { encoder, index, features, batch, logits: mut d, labels, log_sums, .. } = saved;
        let (vocab, share) = (self.head.outputs(), d_loss.to_f64() / labels.len() as f64);
        d.data_mut().par_chunks_mut(vocab).zip(labels.par_iter().zip(&log_sums)).for_each(|(row, (&label, &log_sum))| {
            for (k, z) in row.iter_mut().enumerate() {
                let hit = if k == label { 1.0 } else { 0.0 };
                *z = T::from_f64(share * (libm::exp(z.to_f64() - log_sum) - hit));
            }
        });
        if let Some(more) = d_logits_too {
            more.expect_shape("gradient of the logits", d.shape())?;
            elementwise::add(d.data_mut(), more.data());
        }
        let d_features = self.head.backward(p, g, &features, &d)?;
        drop((d, features));
        let c = self.encoder.features();
        let mut d_tokens = Tensor::zeros([batch, 1 + self.patches(), c]);
        rows::scatter(d_tokens.data_mut(), d_features.data(), &index, c);
        self.encoder.backward(p, g, encoder, &d_tokens, want_image)
    }
}

/// `mim.beit`.
pub struct MimBeit;

impl Operation for MimBeit {
    const NAME: &'static str = "mim.beit";
    const PAPER: &'static str = "2106.08254 BEiT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = sample_encoder(rng);
        config.set("vocab_size", rng.between(1, 9));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (h, w, patch) = (config.positive("img_h")?, config.positive("img_w")?, config.positive("patch_size")?);
        let (batch, n, vocab) = (draw.size("batch", 1, 3), (h / patch) * (w / patch), config.positive("vocab_size")?);
        draw.normal("image", [batch, config.positive("in_chans")?, h, w]);
        let mut mask: Vec<i64> = (0..batch * n).map(|_| i64::from(draw.rng.chance(0.5))).collect();
        mask[draw.rng.below(batch * n)] = 1;
        draw.ints("mask", [batch, n], mask)?;
        let tokens = (0..batch * n).map(|_| draw.rng.below(vocab) as i64).collect();
        draw.ints("tokens", [batch, n], tokens)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let model = BeitMim::new(run.config())?;
        let p = run.params(&model.layout)?;
        let (image, mask, tokens) = (run.input("image")?, run.ints("mask")?, run.ints("tokens")?);
        let [batch, ..] = image.dims::<4>("image")?;
        let shape = [batch, model.patches()];
        for (name, given) in [("mask", mask), ("tokens", tokens)] {
            if given.shape != shape[..] {
                return Err(Error::shape(format!("input `{name}`"), shape, given.shape));
            }
        }
        let cells = crate::tensor::IntTensor::new([batch, 1, shape[1]], mask.data.clone())?;
        let hidden = read_mask(&cells, [batch, 1, shape[1]])?;
        let saved = model.forward(&p, &image, &hidden, &tokens.data)?;
        run.output("logits", &saved.logits);
        run.output("loss", &Tensor::scalar(saved.loss));
        run.output("accuracy", &Tensor::scalar(saved.accuracy));
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let d_loss = run.cotangent("loss", [].into())?.data()[0];
            let d_logits = run.cotangent("logits", saved.logits.shape())?;
            if let Some(d_image) = model.backward(&p, &mut g, saved, d_loss, Some(&d_logits), true)? {
                run.grad_input("image", &d_image);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
