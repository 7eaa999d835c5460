//! `nn.fourier_position`: positions from sines and cosines of rows and columns, through a learned 1×1 convolution (XCiT, arXiv
//! 2106.09681).
//!
//! With `ω_j = T^{2⌊j/2⌋/P}`, `θ = 2π (i + 1)/(n + 1e-6)` for row (or column) i of n, `φ_j(θ) = sin(θ/ω_j)` for even j, `cos(θ/ω_j)` for
//! odd: the feature is `[φ(θ^y), φ(θ^x)]`, rows first, and `y = W feature + b`. The table depends on the size of the map alone, so
//! one set of weights serves all sizes. Features are computed in double precision.
//!
//! Backward: `dW = Σ dy featureᵀ`, `db = Σ dy`.

use super::linear::Linear;
use super::param::{Init, Layout, Names, Param, Params};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::{maps::transpose, reduce, rows};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Shape, Tensor};

/// Parameters `token_projection`.
#[derive(Clone, Debug)]
pub struct FourierPosition {
    /// Without its bias, which starts uniform like the weight.
    weight: Linear,
    bias: Param,
    hidden: usize,
    temperature: f64,
}

impl FourierPosition {
    /// Registers the parameters, for `hidden` features per axis.
    pub fn new(mut names: Names, dim: usize, hidden: usize, temperature: f64) -> Result<Self> {
        if hidden == 0 || !hidden.is_multiple_of(2) {
            return Err(Error::config("hidden_dim", format!("expected a positive even number, found {hidden}")));
        }
        if dim == 0 {
            return Err(Error::config("dim", "expected a positive width, found 0"));
        }
        if !(temperature > 0.0 && temperature.is_finite()) {
            return Err(Error::config("temperature", format!("expected a positive number, found {temperature}")));
        }
        let mut names = names.at("token_projection");
        let init = Init::FanIn(2 * hidden);
        let weight = Linear::shaped(&mut names, Shape::try_new(&[dim, 2 * hidden, 1, 1])?, 2 * hidden, dim, false, init);
        Ok(FourierPosition { weight, bias: names.param("bias", [dim], init), hidden, temperature })
    }

    /// What the table for a map costs.
    pub fn cost(&self, [h, w]: [usize; 2]) -> Cost {
        let (dim, features) = (self.weight.outputs(), 2 * self.hidden);
        Cost { flops: 2 * h * w * features * dim, activation_bytes: 4 * h * w * (features + dim) }
    }

    /// Bytes of the features alone, which the backward pass needs.
    pub fn feature_bytes(&self, [h, w]: [usize; 2]) -> usize {
        4 * h * w * 2 * self.hidden
    }

    fn features<T: Float>(&self, [h, w]: [usize; 2]) -> Result<Tensor<T>> {
        let hidden = self.hidden;
        let shape = Shape::try_new(&[h, w, 2 * hidden])?;
        let axis = |n: usize| -> Vec<T> {
            let theta = |i: usize| std::f64::consts::TAU * (i + 1) as f64 / (n as f64 + 1e-6);
            let omega = |j: usize| libm::pow(self.temperature, (2 * (j / 2)) as f64 / hidden as f64);
            let phi =
                |i: usize, j: usize| if j.is_multiple_of(2) { libm::sin(theta(i) / omega(j)) } else { libm::cos(theta(i) / omega(j)) };
            (0..n * hidden).map(|k| T::from_f64(phi(k / hidden, k % hidden))).collect()
        };
        let (by_row, by_col) = (axis(h), axis(w));
        let mut features = Tensor::scratch(shape);
        for (i, feature) in features.data_mut().chunks_exact_mut(2 * hidden).enumerate() {
            let (y, x) = (i / w, i % w);
            feature[..hidden].copy_from_slice(&by_row[y * hidden..(y + 1) * hidden]);
            feature[hidden..].copy_from_slice(&by_col[x * hidden..(x + 1) * hidden]);
        }
        features.reshape([h * w, 2 * hidden])
    }

    /// The table `[N, C]` for a map of `[rows, columns]`, and its features.
    pub fn forward<T: Float>(&self, p: &Params<T>, map: [usize; 2]) -> Result<(Tensor<T>, Tensor<T>)> {
        let features = self.features(map)?;
        let mut table = self.weight.forward(p, &features)?;
        rows::add_table(table.data_mut(), p.get(self.bias));
        Ok((table, features))
    }

    /// Adds the gradients of the parameters, of the gradient of the table.
    pub fn backward<T: Float>(&self, g: &mut Params<T>, features: &Tensor<T>, d_table: &Tensor<T>) -> Result<()> {
        reduce::add_column_sums(g.get_mut(self.bias), d_table.data());
        self.weight.backward_params(g, features, d_table)
    }
}

/// The operation makes no more positions than this.
const MOST_POSITIONS: usize = 1 << 22;

/// `nn.fourier_position`.
pub struct Fourier;

fn layer(config: &Config) -> Result<(FourierPosition, std::sync::Arc<Layout>)> {
    let (hidden, temperature) = (config.usize_or("hidden_dim", 32)?, config.f64_or("temperature", 10_000.0)?);
    Layout::build(|names| FourierPosition::new(names.here(), config.usize("dim")?, hidden, temperature))
}

fn sizes(config: &Config) -> Result<[usize; 3]> {
    let [b, h, w] = [config.usize_or("batch", 1)?, config.positive("height")?, config.positive("width")?];
    // No input vouches for these sizes.
    if b.saturating_mul(h).saturating_mul(w) > MOST_POSITIONS {
        return Err(Error::config("height", format!("expected at most {MOST_POSITIONS} positions, found {b} maps of {h}×{w}")));
    }
    Ok([b, h, w])
}

impl Operation for Fourier {
    const NAME: &'static str = "nn.fourier_position";
    const PAPER: &'static str = "2106.09681 XCiT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("batch", rng.between(1, 3)).set("height", rng.between(1, 6)).set("width", rng.between(1, 6));
        config.set("dim", rng.between(1, 9)).set("hidden_dim", 2 * rng.between(1, 5)).set("temperature", rng.range(1.0, 20_000.0));
        config
    }

    fn inputs(_: &Config, _: &mut Draw) -> Result<()> {
        Ok(())
    }

    fn cost(config: &Config, _: &Shapes) -> Result<Option<Cost>> {
        let ([b, h, w], (layer, _)) = (sizes(config)?, layer(config)?);
        let dim = layer.weight.outputs();
        let mut cost = layer.cost([h, w]);
        // The table is handed out once per image, channels first.
        cost.activation_bytes = 4 * h * w * (2 * layer.hidden + b * dim);
        Ok(Some(cost))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let ([b, h, w], (layer, layout)) = (sizes(run.config())?, layer(run.config())?);
        let p = run.params(&layout)?;
        let (table, features) = layer.forward(&p, [h, w])?;
        let [n, c] = table.dims("table")?;
        let mut y = Tensor::scratch(Shape::try_new(&[b, c, h, w])?);
        for image in y.data_mut().chunks_exact_mut(n * c) {
            transpose(image, table.data(), 1, n, c);
        }
        drop(table);
        run.output("y", &y);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let dy = run.cotangent("y", y.shape())?;
            let mut sum = Tensor::zeros([c, n]);
            reduce::add_column_sums(sum.data_mut(), dy.data());
            let mut d_table = Tensor::scratch([n, c]);
            transpose(d_table.data_mut(), sum.data(), 1, c, n);
            layer.backward(&mut g, &features, &d_table)?;
            run.grad_params(&g);
        }
        Ok(())
    }
}
