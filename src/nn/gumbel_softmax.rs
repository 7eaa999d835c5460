//! `nn.gumbel_softmax`: samples of a categorical distribution that have gradients (arXiv 1611.01144), as in the discrete VAE of
//! DALL-E (arXiv 2102.12092).
//!
//! `s = softmax((l + g)/τ)` over an axis, g standard Gumbel noise. With `hard`, y is the one-hot vector of the largest s in the
//! forward pass and s in the backward pass (straight-through). `dl = dg = s ∘ (dy − Σ s ∘ dy)/τ`.

use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::categorical;
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Shape, Tensor};

/// An error unless τ is positive and finite.
pub fn check_tau(tau: f64) -> Result<f64> {
    if tau > 0.0 && tau.is_finite() { Ok(tau) } else { Err(Error::config("tau", format!("expected a positive number, found {tau}"))) }
}

/// Rows of probabilities, what is handed on (the same, or one-hot), and the place of the largest of each row.
pub struct Sample<T: Float> {
    /// s.
    pub soft: Tensor<T>,
    /// y.
    pub y: Tensor<T>,
    /// Where y is largest.
    pub index: Vec<u32>,
}

/// Over the last axis.
pub fn forward<T: Float>(logits: &Tensor<T>, gumbel: &Tensor<T>, tau: f64, hard: bool) -> Result<Sample<T>> {
    gumbel.expect_shape("input `gumbel`", logits.shape())?;
    let (rows, width) = logits.shape().rows_cols();
    let (mut soft, mut index) = (Tensor::scratch(logits.shape()), vec![0; rows]);
    if rows > 0 && width == 0 {
        return Err(Error::shape("input `logits`", "an axis that is not empty", logits.shape()));
    }
    if rows > 0 {
        categorical::softmax(soft.data_mut(), logits.data(), Some(gumbel.data()), tau, width);
        categorical::first_largest(&mut index, logits.data(), Some(gumbel.data()), width);
    }
    let y = if hard { one_hot(&index, width, logits.shape()) } else { soft.clone() };
    Ok(Sample { soft, y, index })
}

/// The gradient of logits and of noise.
pub fn backward<T: Float>(soft: &Tensor<T>, mut dy: Tensor<T>, tau: f64) -> Tensor<T> {
    if !dy.data().is_empty() {
        let width = soft.shape().rows_cols().1;
        categorical::softmax_backward(dy.data_mut(), soft.data(), tau, width);
    }
    dy
}

fn one_hot<T: Float>(index: &[u32], width: usize, shape: Shape) -> Tensor<T> {
    let mut y = Tensor::zeros(shape);
    for (row, &i) in y.data_mut().chunks_exact_mut(width.max(1)).zip(index) {
        row[i as usize] = T::ONE;
    }
    y
}

/// `[outer, axis, inner]` → `[outer, inner, axis]`; the sizes given are those of the result to undo it.
pub fn swap_last<T: Float>(x: &Tensor<T>, [outer, a, b]: [usize; 3]) -> Tensor<T> {
    let mut y = Tensor::scratch([outer, b, a]);
    for (y, x) in y.data_mut().chunks_exact_mut((a * b).max(1)).zip(x.data().chunks_exact((a * b).max(1))) {
        for (j, row) in y.chunks_exact_mut(a.max(1)).enumerate() {
            row.iter_mut().enumerate().for_each(|(i, y)| *y = x[i * b + j]);
        }
    }
    y
}

/// `nn.gumbel_softmax`.
pub struct GumbelSoftmax;

impl Operation for GumbelSoftmax {
    const NAME: &'static str = "nn.gumbel_softmax";
    const PAPER: &'static str = "2102.12092 DALL-E";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("tau", rng.range(0.3, 2.0)).set("hard", rng.chance(0.4)).set("axis", rng.below(3));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let shape: [usize; 3] = std::array::from_fn(|i| draw.rng.between(1, if Some(i) == config.usize("axis").ok() { 20 } else { 4 }));
        draw.normal("logits", shape);
        let noise = Tensor::from_fn(shape, |_| {
            let u = draw.rng.uniform().clamp(1e-12, 1.0 - 1e-12);
            -libm::log(-libm::log(u))
        });
        draw.inputs.insert("gumbel".into(), crate::case::Value::Float(noise));
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (tau, hard) = (check_tau(config.f64("tau")?)?, config.bool("hard")?);
        let logits = run.input("logits")?;
        let shape = logits.shape();
        let rank = shape.len();
        // A negative axis counts from the end.
        let axis = config.f64("axis")?;
        let place = if axis < 0.0 { axis + rank as f64 } else { axis };
        if !(place >= 0.0 && place < rank as f64 && place.fract() == 0.0) {
            return Err(Error::config("axis", format!("expected an axis of a tensor of {rank} dimensions, found {axis}")));
        }
        let axis = place as usize;
        let (outer, width, inner) = (shape[..axis].iter().product(), shape[axis], shape[axis + 1..].iter().product());
        let gumbel = run.input("gumbel")?;
        gumbel.expect_shape("input `gumbel`", shape)?;
        let rows = |x: &Tensor<T>| swap_last(x, [outer, width, inner]);
        let back = |x: &Tensor<T>| swap_last(x, [outer, inner, width]).reshape(shape);
        let Sample { soft, y, index } = forward(&rows(&logits), &rows(&gumbel), tau, hard)?;
        run.output("y", &back(&y)?);
        let others = Shape::try_new(&[&shape[..axis], &shape[axis + 1..]].concat())?;
        run.output_ints("index", IntTensor::new(others, index.iter().map(|&i| i64::from(i)).collect())?);
        if run.backward() {
            let dy = run.cotangent("y", shape)?;
            let d = back(&backward(&soft, rows(&dy), tau))?;
            run.grad_input("logits", &d);
            run.grad_input("gumbel", &d);
        }
        Ok(())
    }
}
