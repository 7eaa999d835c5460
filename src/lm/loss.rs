//! `lm.cogview`: the training loss of CogView (arXiv 2105.13290).
//!
//! Input `tokens[:, :−1]`, label y = `tokens[:, 1:]`, w = `loss_mask[:, 1:]`; `ce = ln Σ e^logits − logits[y]`,
//! `loss = Σ ce w / Σ w` over the batch. By its *input* token a place belongs to the text (≥ n_img, and w > 0) or to the image
//! (< n_img); weights of the text are multiplied by `txt_loss_scale`. Logged: `img_loss = Σ_img ce w / max(|img|, 1)`,
//! `txt_loss = Σ_txt ce w / max(|txt|, 1) / txt_loss_scale`.
//!
//! Backward: `dlogits = dce (softmax − onehot)`. Logits exist for a block of rows at a time, in the forward and again in the
//! backward pass: never all of them.

use std::ops::Range;

use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::categorical;
use crate::model::cogview::{CogView, draw_ids, sample_model};
use crate::nn::{Layout, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Tensor};

/// Logits that exist at a time.
const BLOCK: usize = 1 << 21;

/// Blocks of rows whose logits exist together.
fn blocks(rows: usize, vocab: usize) -> impl Iterator<Item = Range<usize>> {
    let each = (BLOCK / vocab.max(1)).max(1);
    (0..rows).step_by(each).map(move |start| start..(start + each).min(rows))
}

/// The cross-entropy of every row of `hidden` with its label, among the tokens from `first` on (the others cannot come).
pub fn cross_entropy<T: Float>(model: &CogView, p: &Params<T>, hidden: &Tensor<T>, labels: &[u32], first: usize) -> Vec<f64> {
    let mut losses = Vec::with_capacity(labels.len());
    for rows in blocks(labels.len(), model.vocab_size()) {
        let logits = model.logits(p, hidden, rows.clone());
        for (row, &label) in logits.data().chunks_exact(model.vocab_size()).zip(&labels[rows]) {
            let possible = label as usize >= first;
            let chosen = if possible { row[label as usize].to_f64() } else { f64::NEG_INFINITY };
            losses.push(categorical::log_sum_exp(&row[first..]) - chosen);
        }
    }
    losses
}

/// The gradient of `hidden` from those of the [`cross_entropy`]s; adds the output's share to dE.
pub fn cross_entropy_backward<T: Float>(
    model: &CogView,
    p: &Params<T>,
    g: &mut Params<T>,
    hidden: &Tensor<T>,
    labels: &[u32],
    d: &[f64],
) -> Tensor<T> {
    let mut d_hidden = Tensor::scratch(hidden.shape());
    for rows in blocks(labels.len(), model.vocab_size()) {
        let logits = model.logits(p, hidden, rows.clone());
        let mut d_logits = Tensor::scratch(logits.shape());
        categorical::softmax(d_logits.data_mut(), logits.data(), None, 1.0, model.vocab_size());
        drop(logits);
        let lines = d_logits.data_mut().chunks_exact_mut(model.vocab_size());
        for ((row, &label), &d) in lines.zip(&labels[rows.clone()]).zip(&d[rows.clone()]) {
            row[label as usize] -= T::ONE;
            let d = T::from_f64(d);
            row.iter_mut().for_each(|x| *x *= d);
        }
        model.logits_backward(p, g, hidden, rows, &d_logits, &mut d_hidden);
    }
    d_hidden
}

/// The weights of all places, and which set each belongs to.
struct Weights {
    weight: Vec<f64>,
    is_text: Vec<bool>,
    is_image: Vec<bool>,
    scale: f64,
}

impl Weights {
    fn new(inputs: &IntTensor, mask: &[i64], image_tokens: usize, scale: f64) -> Self {
        let is_image: Vec<bool> = inputs.data.iter().map(|&t| t < image_tokens as i64).collect();
        let is_text: Vec<bool> = is_image.iter().zip(mask).map(|(image, &w)| !image && w > 0).collect();
        let weight = mask.iter().zip(&is_text).map(|(&w, &text)| w as f64 * if text { scale } else { 1.0 }).collect();
        Weights { weight, is_text, is_image, scale }
    }

    /// The factors on every cross-entropy in `loss`, `img_loss` and `txt_loss`.
    fn factors(&self) -> [Vec<f64>; 3] {
        let total: f64 = self.weight.iter().sum();
        let count = |set: &[bool]| set.iter().filter(|&&x| x).count().max(1) as f64;
        let of = |set: &[bool], divisor: f64| self.weight.iter().zip(set).map(|(w, &x)| if x { w / divisor } else { 0.0 }).collect();
        let loss = self.weight.iter().map(|w| w / total).collect();
        [loss, of(&self.is_image, count(&self.is_image)), of(&self.is_text, count(&self.is_text) * self.scale)]
    }
}

/// Columns `from..to` of an integer tensor of two dimensions.
fn columns(x: &IntTensor, from: usize, to: usize) -> Result<IntTensor> {
    let [b, t] = x.shape.dims("tokens")?;
    IntTensor::new([b, to - from], x.data.chunks_exact(t).flat_map(|row| row[from..to].iter().copied()).collect())
}

/// `lm.cogview`.
pub struct LmCogView;

impl Operation for LmCogView {
    const NAME: &'static str = "lm.cogview";
    const PAPER: &'static str = "2105.13290 CogView";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_model(rng, &mut config);
        config.set("num_image_tokens", rng.between(1, 10)).set("txt_loss_scale", rng.range(0.5, 5.0));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let shape @ [b, t] = [draw.size("batch", 1, 2), 1 + draw.size("tokens", 1, config.positive("max_positions")?)];
        draw_ids(draw, "tokens", shape, config.positive("vocab_size")?)?;
        let mask = (0..b * t).map(|i| i64::from(i == 1 || draw.rng.chance(0.8))).collect();
        draw.ints("loss_mask", shape, mask)
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, t] = inputs.dims("tokens")?;
        let (model, _) = Layout::build(|names| CogView::new(names.here(), config))?;
        let rows = b * t.saturating_sub(1);
        let head = Cost { flops: 2 * rows * model.settings().dim * model.vocab_size(), activation_bytes: 4 * rows };
        Ok(Some(model.cost([b, t.saturating_sub(1)]) + head))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (model, layout) = Layout::build(|names| CogView::new(names.here(), config))?;
        let (image_tokens, scale) = (config.usize("num_image_tokens")?, config.f64_or("txt_loss_scale", 1.0)?);
        let (tokens, mask) = (run.ints("tokens")?, run.ints("loss_mask")?);
        let [b, t] = tokens.shape.dims("input `tokens`")?;
        if mask.shape != tokens.shape {
            return Err(Error::shape("input `loss_mask`", tokens.shape, mask.shape));
        }
        if t < 2 || b == 0 {
            return Err(Error::shape("input `tokens`", "[at least 1, at least 2]", tokens.shape));
        }
        if mask.data.iter().any(|w| !(0..=1).contains(w)) {
            return Err(Error::value("input `loss_mask`", "expected 0 and 1 alone"));
        }
        let inputs = columns(tokens, 0, t - 1)?;
        let labels = model.sequence(&columns(tokens, 1, t)?, None)?.tokens;
        let weights = Weights::new(&inputs, &columns(mask, 1, t)?.data, image_tokens, scale);
        if !weights.weight.iter().any(|&w| w != 0.0) {
            return Err(Error::value("input `loss_mask`", "expected a token that counts"));
        }
        let sequence = model.sequence(&inputs, None)?;
        let p = run.params(&layout)?;
        let (hidden, saved) = model.forward(&p, &sequence)?;
        let losses = cross_entropy(&model, &p, &hidden, &labels, 0);
        let factors = weights.factors();
        for (name, factors) in ["loss", "img_loss", "txt_loss"].into_iter().zip(&factors) {
            // Places with weight 0 take no part, whatever their loss.
            let terms = losses.iter().zip(factors).filter(|(_, f)| **f != 0.0).map(|(ce, f)| ce * f);
            run.output(name, &Tensor::scalar(T::from_f64(terms.fold(0.0, |sum, x| sum + x))));
        }
        let each = Tensor::from_fn([b, t - 1], |i| T::from_f64(losses[i]));
        run.output("token_losses", &each);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let mut d: Vec<f64> = run.cotangent("token_losses", each.shape())?.data().iter().map(|x| x.to_f64()).collect();
            for (name, factors) in ["loss", "img_loss", "txt_loss"].into_iter().zip(&factors) {
                let upstream = run.cotangent(name, [].into())?.data()[0].to_f64();
                d.iter_mut().zip(factors).filter(|(_, f)| **f != 0.0).for_each(|(d, f)| *d += upstream * f);
            }
            let d_hidden = cross_entropy_backward(&model, &p, &mut g, &hidden, &labels, &d);
            model.backward(&p, &mut g, &sequence, saved, &d_hidden)?;
            run.grad_params(&g);
        }
        Ok(())
    }
}
