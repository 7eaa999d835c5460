//! The smallest objective that exercises everything: a linear masked autoencoder on pixels, with exact gradients.
//!
//! `z = x + hidden·(token − x)`, `h = z Wᵀ`, `y = h Vᵀ + b`, `loss = Σ hidden (y − x)² / Σ hidden`.

use std::sync::Arc;

use karat::linalg::{Epilogue, Mat, MatMut, gemm};
use karat::mim::{MaskedModel, Reconstruction};
use karat::nn::{Batch, Init, Layout, Loss, Objective, Param, Params, StepKey};
use karat::tensor::Tensor;
use karat::tensor::random::{Purpose, Rng};
use karat::{Error, Result};

pub struct Tiny {
    layout: Arc<Layout>,
    side: usize,
    channels: usize,
    width: usize,
    encoder: Param,
    token: Param,
    decoder: Param,
    bias: Param,
}

impl Tiny {
    pub fn new(side: usize, channels: usize, width: usize) -> Result<Self> {
        let d = side * side * channels;
        let ((encoder, token, decoder, bias), layout) = Layout::build(|names| {
            let encoder = names.at("encoder").param("weight", [width, d], Init::FanIn(d));
            let token = names.param("mask_token", [1, 1, d], Init::NORMAL_02);
            let decoder = names.at("decoder").param("weight", [d, width], Init::FanIn(width));
            Ok((encoder, token, decoder, names.at("decoder").param("bias", [d], Init::ZEROS)))
        })?;
        Ok(Tiny { layout, side, channels, width, encoder, token, decoder, bias })
    }

    fn d(&self) -> usize {
        self.side * self.side * self.channels
    }

    fn batch(&self, images: &Tensor<f32>) -> Result<usize> {
        let [b, c, h, w] = images.dims("images")?;
        if [c, h, w] != [self.channels, self.side, self.side] {
            return Err(Error::shape("images", [b, self.channels, self.side, self.side], images.shape()));
        }
        Ok(b)
    }

    /// 1 where a pixel (all its channels) is hidden: half of them.
    fn hidden(&self, b: usize, key: StepKey) -> Tensor<f32> {
        let area = self.side * self.side;
        let mut hidden = Tensor::scratch([b, self.channels, self.side, self.side]);
        for (i, image) in hidden.data_mut().chunks_exact_mut(self.d()).enumerate() {
            let mut rng = Rng::new(key.seed, Purpose::Mask, key.step, i as u64);
            for pixel in 0..area {
                let value = if rng.chance(0.5) { 1.0 } else { 0.0 };
                (0..self.channels).for_each(|c| image[c * area + pixel] = value);
            }
        }
        hidden
    }

    /// `z`, `h` and `y`.
    fn forward(&self, params: &Params<f32>, images: &Tensor<f32>, hidden: &Tensor<f32>) -> [Tensor<f32>; 3] {
        let (d, w, b) = (self.d(), self.width, images.shape()[0]);
        let token = params.get(self.token);
        let (x, m) = (images.data(), hidden.data());
        let z = Tensor::from_fn([b, d], |i| x[i] + m[i] * (token[i % d] - x[i]));
        let mut h = Tensor::scratch([b, w]);
        gemm(Mat::new(z.data(), b, d), Mat::new(params.get(self.encoder), w, d).t(), MatMut::new(h.data_mut(), b, w), Epilogue::default());
        let mut y = Tensor::scratch([b, d]);
        let epilogue = Epilogue { bias: Some(params.get(self.bias)), ..Epilogue::default() };
        gemm(Mat::new(h.data(), b, w), Mat::new(params.get(self.decoder), d, w).t(), MatMut::new(y.data_mut(), b, d), epilogue);
        [z, h, y]
    }
}

impl Objective for Tiny {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn image_shape(&self) -> (usize, usize) {
        (self.side, self.channels)
    }

    fn loss(&self, params: &Params<f32>, grads: Option<&mut Params<f32>>, batch: Batch) -> Result<Loss> {
        let Batch { images, key, .. } = batch;
        let (d, w, b) = (self.d(), self.width, self.batch(images)?);
        let hidden = self.hidden(b, key);
        let [z, h, mut y] = self.forward(params, images, &hidden);
        let count = hidden.data().iter().fold(0.0, |sum, &m| sum + m).max(1.0);
        let mut loss = 0.0;
        for ((y, &x), &m) in y.data_mut().iter_mut().zip(images.data()).zip(hidden.data()) {
            let e = m * (*y - x);
            loss += e * e;
            *y = (e + e) / count;
        }
        let Some(grads) = grads else { return Ok((loss / count).into()) };
        let dy = y;
        let more = || Epilogue { accumulate: true, ..Epilogue::default() };
        for row in dy.data().chunks_exact(d) {
            grads.get_mut(self.bias).iter_mut().zip(row).for_each(|(g, &dy)| *g += dy);
        }
        gemm(Mat::new(dy.data(), b, d).t(), Mat::new(h.data(), b, w), MatMut::new(grads.get_mut(self.decoder), d, w), more());
        let mut dh = Tensor::scratch([b, w]);
        gemm(Mat::new(dy.data(), b, d), Mat::new(params.get(self.decoder), d, w), MatMut::new(dh.data_mut(), b, w), Epilogue::default());
        gemm(Mat::new(dh.data(), b, w).t(), Mat::new(z.data(), b, d), MatMut::new(grads.get_mut(self.encoder), w, d), more());
        let mut dz = Tensor::scratch([b, d]);
        gemm(Mat::new(dh.data(), b, w), Mat::new(params.get(self.encoder), w, d), MatMut::new(dz.data_mut(), b, d), Epilogue::default());
        for (row, m) in dz.data().chunks_exact(d).zip(hidden.data().chunks_exact(d)) {
            grads.get_mut(self.token).iter_mut().zip(row).zip(m).for_each(|((g, &dz), &m)| *g += m * dz);
        }
        Ok((loss / count).into())
    }
}

impl MaskedModel for Tiny {
    fn reconstruct(&self, params: &Params<f32>, images: &Tensor<f32>, key: StepKey) -> Result<Reconstruction> {
        let hidden = self.hidden(self.batch(images)?, key);
        let [_, _, y] = self.forward(params, images, &hidden);
        Ok(Reconstruction { predicted: y.reshape(images.shape())?, hidden })
    }

    fn features(&self, params: &Params<f32>, images: &Tensor<f32>) -> Result<Tensor<f32>> {
        let b = self.batch(images)?;
        let [_, h, _] = self.forward(params, images, &Tensor::zeros(images.shape()));
        h.reshape([b, self.width])
    }
}
