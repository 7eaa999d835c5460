//! Linear probe: softmax regression on frozen features.
//!
//! Features are standardised with the training set's mean and deviation. The loss is `mean cross-entropy + λ/2 ‖W‖²` (the bias is free),
//! convex, minimised by L-BFGS on all images. λ comes from a fixed grid, from strong to weak until it is no better twice: the best
//! accuracy on every sixth training image after training on the others; then the probe is trained on all of them. The same protocol for every kind of features.

use std::collections::VecDeque;

use rayon::prelude::*;

use crate::data::{Dataset, Loader, LoaderOptions, Transform};
use crate::linalg::{Epilogue, Mat, MatMut, gemm};
use crate::mim::MaskedModel;
use crate::nn::Params;
use crate::tensor::Tensor;
use crate::{Error, Result};

const GRID: [f64; 6] = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5];
const VALIDATION: usize = 6;
const ITERATIONS: usize = 150;
const BATCH: usize = 64;

/// Features of labelled images.
#[derive(Clone, Debug)]
pub struct Features {
    /// `[labels.len(), width]`.
    pub values: Vec<f32>,
    /// Numbers per image.
    pub width: usize,
    /// One class per image.
    pub labels: Vec<usize>,
}

/// What a probe found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProbeResult {
    /// Fraction of the test images that are classified right.
    pub accuracy: f64,
    /// The weight decay λ that was chosen.
    pub lambda: f64,
}

/// The pixels themselves, as the network sees them.
///
/// # Errors
/// If an image cannot be read.
pub fn pixels(dataset: &Dataset, transform: Transform) -> Result<Features> {
    collect(dataset, transform, |images| Ok(images.clone()))
}

/// The features that `objective` computes with `params`.
///
/// # Errors
/// If an image cannot be read or has the wrong shape.
pub fn extract(objective: &dyn MaskedModel, params: &Params<f32>, dataset: &Dataset, transform: Transform) -> Result<Features> {
    collect(dataset, transform, |images| objective.features(params, images))
}

fn collect(dataset: &Dataset, transform: Transform, mut features: impl FnMut(&Tensor<f32>) -> Result<Tensor<f32>>) -> Result<Features> {
    let (c, s) = (transform.channels(), transform.size());
    let loader = Loader::new(dataset, transform, LoaderOptions { batch: BATCH, seed: 0, shuffle: false, drop_last: false })?;
    let mut all = Features { values: Vec::new(), width: 0, labels: Vec::new() };
    let epoch = loader.epoch(0);
    for step in 0..epoch.steps() {
        let batch = epoch.batch(step)?;
        let out = features(&Tensor::new([batch.labels.len(), c, s, s], &batch.images)?)?;
        all.width = out.data().len() / batch.labels.len();
        all.values.extend_from_slice(out.data());
        all.labels.extend_from_slice(&batch.labels);
    }
    if all.values.iter().any(|x| !x.is_finite()) {
        return Err(Error::value("features", "not all finite"));
    }
    Ok(all)
}

/// Trains a linear classifier on `train` and measures it on `test`.
///
/// # Errors
/// If there are fewer than two classes or the widths differ.
pub fn probe(train: &Features, test: &Features) -> Result<ProbeResult> {
    if train.width != test.width || train.width == 0 {
        return Err(Error::shape("test features", train.width, test.width));
    }
    let classes = train.labels.iter().chain(&test.labels).max().map_or(0, |m| m + 1);
    if classes < 2 {
        return Err(Error::value("labels", "a linear probe needs images of at least two classes"));
    }
    let (weights, lambda) = fit(train, classes);
    Ok(ProbeResult { accuracy: Problem::new(test, train, classes, |_| true).accuracy(&weights), lambda })
}

/// The weights of a classifier of standardised features, and the λ that was chosen.
fn fit(train: &Features, classes: usize) -> (Vec<f64>, f64) {
    let held_out = |i: usize| i % VALIDATION == VALIDATION - 1;
    let (fit, validate) = (Problem::new(train, train, classes, |i| !held_out(i)), Problem::new(train, train, classes, held_out));
    let mut best = (-1.0, GRID[0]);
    // From strong to weak decay, each from the solution before it: a fraction of the iterations.
    let mut weights = vec![0.0; fit.len()];
    let mut worse = 0;
    for lambda in GRID.iter().copied().filter(|_| !validate.labels.is_empty()) {
        fit.minimise(&mut weights, lambda);
        let accuracy = validate.accuracy(&weights);
        if accuracy > best.0 {
            (best, worse) = ((accuracy, lambda), 0);
        } else {
            worse += 1;
        }
        // Accuracy has its peak in λ behind it; the weakest decays take the most iterations.
        if worse == 2 {
            break;
        }
    }
    let lambda = best.1;
    let all = Problem::new(train, train, classes, |_| true);
    let mut weights = vec![0.0; all.len()];
    all.minimise(&mut weights, lambda);
    (weights, lambda)
}

/// A linear classifier of features.
#[derive(Clone, Debug)]
pub struct Classifier {
    /// `[classes, width]`.
    weights: Vec<f32>,
    bias: Vec<f32>,
}

impl Classifier {
    /// Trained on `train` as [`probe`] does.
    ///
    /// # Errors
    /// If there are fewer than two classes or no features.
    pub fn train(train: &Features) -> Result<Self> {
        let classes = train.labels.iter().max().map_or(0, |m| m + 1);
        if classes < 2 || train.width == 0 {
            return Err(Error::value("labels", "a linear classifier needs features of at least two classes"));
        }
        let ((weights, _), (mean, scale)) = (fit(train, classes), standard(train));
        let mut classifier = Classifier { weights: Vec::with_capacity(classes * train.width), bias: Vec::with_capacity(classes) };
        // Σ w (x − mean) scale + b, as weights of x itself.
        for row in weights.chunks_exact(train.width + 1) {
            let own = || row.iter().zip(&scale).map(|(w, scale)| w * scale);
            classifier.weights.extend(own().map(|w| w as f32));
            classifier.bias.push((row[train.width] - dot(&own().collect::<Vec<_>>(), &mean)) as f32);
        }
        Ok(classifier)
    }

    /// The logits `[n, classes]` of features `[n, width]`.
    ///
    /// # Errors
    /// If the features have another width.
    pub fn logits(&self, features: &Tensor<f32>) -> Result<Tensor<f32>> {
        let ([n, width], classes) = (features.dims("features")?, self.bias.len());
        if width * classes != self.weights.len() {
            return Err(Error::shape("features", [n, self.weights.len() / classes], features.shape()));
        }
        let mut logits = Tensor::scratch([n, classes]);
        let (x, w) = (Mat::new(features.data(), n, width), Mat::new(&self.weights, classes, width));
        gemm(x, w.t(), MatMut::new(logits.data_mut(), n, classes), Epilogue { bias: Some(&self.bias), ..Epilogue::default() });
        Ok(logits)
    }
}

/// Mean and reciprocal deviation of every feature.
fn standard(features: &Features) -> (Vec<f64>, Vec<f64>) {
    let (w, n) = (features.width, features.labels.len() as f64);
    let (mut mean, mut square) = (vec![0.0f64; w], vec![0.0f64; w]);
    for row in features.values.chunks_exact(w) {
        mean.iter_mut().zip(row).for_each(|(m, &x)| *m += f64::from(x) / n);
    }
    for row in features.values.chunks_exact(w) {
        square.iter_mut().zip(row).zip(&mean).for_each(|((s, &x), m)| *s += (f64::from(x) - m).powi(2) / n);
    }
    // A feature that never changes says nothing; dividing by its rounding errors would.
    let scale = |(s, m): (&f64, &f64)| if s.sqrt() > 1e-6 * (m.abs() + 1e-6) { 1.0 / s.sqrt() } else { 0.0 };
    let scale = square.iter().zip(&mean).map(scale).collect();
    (mean, scale)
}

/// Standardised features with a column of ones, and labels.
struct Problem {
    x: Vec<f32>,
    labels: Vec<usize>,
    /// Columns of `x`.
    d: usize,
    classes: usize,
}

impl Problem {
    /// The images of `features` that `keep` accepts, standardised with the statistics of all of `reference`.
    fn new(features: &Features, reference: &Features, classes: usize, keep: impl Fn(usize) -> bool) -> Self {
        let w = features.width;
        let (mean, scale) = standard(reference);
        let chosen: Vec<usize> = (0..features.labels.len()).filter(|&i| keep(i)).collect();
        let mut x = Vec::with_capacity(chosen.len() * (w + 1));
        for &i in &chosen {
            let row = &features.values[i * w..(i + 1) * w];
            x.extend(row.iter().zip(mean.iter().zip(&scale)).map(|(&x, (m, s))| ((f64::from(x) - m) * s) as f32));
            x.push(1.0);
        }
        Problem { x, labels: chosen.iter().map(|&i| features.labels[i]).collect(), d: w + 1, classes }
    }

    /// The number of weights, `[classes, d]`.
    fn len(&self) -> usize {
        self.classes * self.d
    }

    /// `X Wᵀ`: `[n, classes]`.
    fn scores(&self, weights: &[f64]) -> Vec<f32> {
        let w: Vec<f32> = weights.iter().map(|&w| w as f32).collect();
        let (n, c) = (self.labels.len(), self.classes);
        let mut scores = vec![0.0; n * c];
        gemm(Mat::new(&self.x, n, self.d), Mat::new(&w, c, self.d).t(), MatMut::new(&mut scores, n, c), Epilogue::default());
        scores
    }

    fn accuracy(&self, weights: &[f64]) -> f64 {
        let scores = self.scores(weights);
        let right = scores.chunks_exact(self.classes).zip(&self.labels).filter(|(row, label)| row.iter().all(|s| *s <= row[**label]));
        right.count() as f64 / self.labels.len() as f64
    }

    /// The loss, and its gradient in `grad`.
    fn loss(&self, weights: &[f64], lambda: f64, grad: &mut [f64]) -> f64 {
        let (n, c, d) = (self.labels.len(), self.classes, self.d);
        let mut scores = self.scores(weights);
        let mut losses = vec![0.0f64; n];
        scores.par_chunks_exact_mut(c).zip(&mut losses).zip(&self.labels).for_each(|((row, loss), &label)| {
            let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let own = row[label] - top;
            row.iter_mut().for_each(|s| *s = libm::expf(*s - top));
            let sum: f32 = row.iter().sum();
            *loss = libm::log(f64::from(sum)) - f64::from(own);
            row.iter_mut().for_each(|s| *s /= sum);
            row[label] -= 1.0;
        });
        let mut dw = vec![0.0f32; c * d];
        gemm(Mat::new(&scores, n, c).t(), Mat::new(&self.x, n, d), MatMut::new(&mut dw, c, d), Epilogue::default());
        let mut decay = 0.0;
        for (i, (g, &s)) in grad.iter_mut().zip(&dw).enumerate() {
            let w = if i % d + 1 == d { 0.0 } else { weights[i] };
            decay += w * w;
            *g = f64::from(s) / n as f64 + lambda * w;
        }
        losses.iter().sum::<f64>() / n as f64 + 0.5 * lambda * decay
    }

    /// L-BFGS with backtracking (Nocedal & Wright, *Numerical Optimization*, algorithms 7.4 and 3.1).
    fn minimise(&self, weights: &mut Vec<f64>, lambda: f64) {
        const MEMORY: usize = 10;
        let mut grad = vec![0.0; self.len()];
        let mut loss = self.loss(weights, lambda, &mut grad);
        let mut history: VecDeque<(Vec<f64>, Vec<f64>, f64)> = VecDeque::new();
        let (mut next, mut next_grad) = (weights.clone(), grad.clone());
        for _ in 0..ITERATIONS {
            let mut direction: Vec<f64> = grad.iter().map(|g| -g).collect();
            let mut alphas = Vec::with_capacity(MEMORY);
            for (s, y, rho) in history.iter().rev() {
                let alpha = rho * dot(s, &direction);
                add(&mut direction, -alpha, y);
                alphas.push(alpha);
            }
            let first = history.back().map_or(1.0 / dot(&grad, &grad).sqrt().max(1e-12), |(_, y, rho)| 1.0 / (rho * dot(y, y)));
            direction.iter_mut().for_each(|x| *x *= first);
            for ((s, y, rho), alpha) in history.iter().zip(alphas.iter().rev()) {
                let beta = rho * dot(y, &direction);
                add(&mut direction, alpha - beta, s);
            }
            let slope = dot(&grad, &direction);
            let mut length = 1.0;
            let next_loss = loop {
                next.copy_from_slice(weights);
                add(&mut next, length, &direction);
                let trial = self.loss(&next, lambda, &mut next_grad);
                if trial <= loss + 1e-4 * length * slope {
                    break trial;
                }
                length *= 0.5;
                // Rounding of the f32 products hides any further progress.
                if length < 1e-4 {
                    return;
                }
            };
            let s: Vec<f64> = next.iter().zip(&*weights).map(|(a, b)| a - b).collect();
            let y: Vec<f64> = next_grad.iter().zip(&grad).map(|(a, b)| a - b).collect();
            let curvature = dot(&s, &y);
            if curvature > 1e-12 {
                if history.len() == MEMORY {
                    history.pop_front();
                }
                history.push_back((s, y, 1.0 / curvature));
            }
            std::mem::swap(weights, &mut next);
            std::mem::swap(&mut grad, &mut next_grad);
            let gain = loss - next_loss;
            loss = next_loss;
            if gain < 1e-6 * loss {
                return;
            }
        }
    }
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn add(x: &mut [f64], factor: f64, y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += factor * y);
}
