//! `nn.layer_scale`: LayerScale (CaiT, arXiv 2103.17239): `y = x + γ ⊙ f`, a learned gain per channel on a residual branch.
//!
//! Backward: `dx = dy`, `df = γ ⊙ dy`, `dγ = Σ dy ⊙ f`.

use super::param::{Init, Layout, Names, Param, Params};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::layer_scale;
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// A gain per channel on a residual branch.
#[derive(Clone, Copy, Debug)]
pub struct LayerScale {
    gamma: Param,
}

impl LayerScale {
    /// Registers the gains under `name`, all `start` at first.
    pub fn new(names: &mut Names, name: &str, width: usize, start: f64) -> Self {
        LayerScale { gamma: names.param(name, [width], Init::Constant(start)) }
    }

    fn check<T: Float>(&self, what: &str, x: &Tensor<T>) -> Result<()> {
        let width = self.gamma.numel();
        if x.shape().rows_cols().1 == width { Ok(()) } else { Err(Error::shape(what, format!("[…, {width}]"), x.shape())) }
    }

    /// `x + γ ⊙ f`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, f: &Tensor<T>) -> Result<Tensor<T>> {
        self.check("residual branch", f)?;
        x.expect_shape("residual stream", f.shape())?;
        let mut y = Tensor::scratch(x.shape());
        layer_scale::layer_scale(y.data_mut(), x.data(), f.data(), p.get(self.gamma));
        Ok(y)
    }

    /// `df`; `dx` is `dy`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, f: &Tensor<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        self.check("residual branch", f)?;
        dy.expect_shape("gradient of a layer scale", f.shape())?;
        let mut df = Tensor::scratch(f.shape());
        layer_scale::layer_scale_backward(df.data_mut(), g.get_mut(self.gamma), dy.data(), f.data(), p.get(self.gamma));
        Ok(df)
    }
}

/// `nn.layer_scale`.
pub struct LayerScaleOp;

impl Operation for LayerScaleOp {
    const NAME: &'static str = "nn.layer_scale";
    const PAPER: &'static str = "2103.17239 CaiT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("dim", rng.between(1, 40));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, tokens) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 20));
        for name in ["x", "f"] {
            draw.normal(name, [batch, tokens, config.positive("dim")?]);
        }
        Ok(())
    }

    fn cost(_: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, c] = inputs.dims("x")?;
        Ok(Some(Cost { flops: 0, activation_bytes: 4 * b * n * c }))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let dim = run.config().positive("dim")?;
        let (layer, layout) = Layout::build(|names| Ok(LayerScale::new(names, "gamma", dim, 1e-5)))?;
        let p = run.params(&layout)?;
        let (x, f) = (run.input("x")?, run.input("f")?);
        x.dims::<3>("input `x`")?;
        let y = layer.forward(&p, &x, &f)?;
        run.output("y", &y);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let dy = run.cotangent("y", y.shape())?;
            let df = layer.backward(&p, &mut g, &f, &dy)?;
            run.grad_input("x", &dy);
            run.grad_input("f", &df);
            run.grad_params(&g);
        }
        Ok(())
    }
}
