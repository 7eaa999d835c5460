//! `attention.retention`: multi-scale retention with a gate (RetNet, arXiv 2307.08621).
//!
//! `q = x W_qᵀ`, `k = d^{−1/2} x W_kᵀ`, both turned by their positions; `v`, `g`; per head `o = Retention(q, k, v)` with decay
//! `γ_i = 1 − 2^{−5−i}`, `ô` its RMS norm (or LayerNorm without affine), `y = (act(g) ∘ ô) W_outᵀ`.
//!
//! The forms differ in how the forward pass is cut: all tokens at once (quadratic), one by one, or in chunks (linear, the fast one).
//! Their numbers agree but for rounding; only torchscale's rescaling, in which the sheet's released code clamps each form in its own
//! way, shows ε-sized differences. That is why "none" is the default and rescaling a switch. The backward pass runs in chunks for all.
//! See [`kernel::retention`](crate::kernel::retention) and [`kernel::retention_gate`](crate::kernel::retention_gate).

use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::retention::{self as core, Gradients, Inputs, Outputs, Rescale, Sizes};
use crate::kernel::retention_gate::{self, Gate};
use crate::nn::{Init, Layout, Linear, Names, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// How the forward pass is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// All tokens at once.
    Parallel,
    /// One by one.
    Recurrent,
    /// In chunks of so many tokens.
    Chunkwise(usize),
}

/// What the layer is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width of the tokens; q and k have as much.
    pub dim: usize,
    /// Width of v and of the gate.
    pub value_dim: usize,
    /// Heads h.
    pub heads: usize,
    /// How the forward pass is cut.
    pub form: Form,
    /// Rows are rescaled as in torchscale.
    pub rescale: bool,
    /// The norm subtracts the mean.
    pub centre: bool,
    /// The gate is GELU instead of swish.
    pub gelu: bool,
    /// ε of the norm.
    pub eps: f64,
    /// q and k are turned by their positions.
    pub rotary: bool,
    /// Position of the first token.
    pub offset: usize,
}

impl Settings {
    /// From the keys of `attention.retention`.
    pub fn from_config(config: &Config) -> Result<Self> {
        let (dim, value_dim, heads) = (config.positive("dim")?, config.positive("value_dim")?, config.positive("heads")?);
        if !dim.is_multiple_of(heads) || !(dim / heads).is_multiple_of(2) || !value_dim.is_multiple_of(heads) {
            let message = format!("expected a divisor of the widths that leaves dim/heads even, found {heads} for {dim} and {value_dim}");
            return Err(Error::config("heads", message));
        }
        let choice = |key: &str, among: [&'static str; 2]| -> Result<bool> {
            Ok(config.get(key).is_some() && config.choice(key, &among)? == among[1])
        };
        let form =
            if config.get("form").is_none() { "parallel" } else { config.choice("form", &["parallel", "recurrent", "chunkwise"])? };
        Ok(Settings {
            dim,
            value_dim,
            heads,
            form: match form {
                "recurrent" => Form::Recurrent,
                "chunkwise" => Form::Chunkwise(config.positive("chunk_size")?),
                _ => Form::Parallel,
            },
            rescale: choice("normalize", ["none", "torchscale"])?,
            centre: choice("norm", ["rms", "layer"])?,
            gelu: choice("gate", ["swish", "gelu"])?,
            eps: config.f64_or("eps", 1e-6)?,
            rotary: config.bool_or("rotary", true)?,
            offset: config.usize_or("offset", 0)?,
        })
    }

    fn chunk(&self, tokens: usize) -> usize {
        match self.form {
            Form::Parallel => tokens.max(1),
            Form::Recurrent => 1,
            Form::Chunkwise(c) => c,
        }
    }

    fn rescaling(&self) -> Rescale {
        match self.form {
            _ if !self.rescale => Rescale::None,
            Form::Parallel => Rescale::Parallel,
            Form::Recurrent => Rescale::Recurrent,
            Form::Chunkwise(_) => Rescale::Chunkwise,
        }
    }

    fn sizes(&self, batch: usize, tokens: usize) -> Sizes {
        let Settings { dim, value_dim, heads, rotary, offset, .. } = *self;
        Sizes { batch, heads, tokens, dim: dim / heads, value_dim: value_dim / heads, offset, rotary }
    }

    fn gate(&self, tokens: usize) -> Gate {
        let Settings { value_dim, heads, eps, centre, gelu, .. } = *self;
        Gate { heads, width: value_dim / heads, tokens, eps, centre, gelu }
    }

    /// What the layer costs.
    pub fn cost(&self, b: usize, n: usize, state_in: bool) -> Cost {
        let Settings { dim, value_dim, heads, rescale, .. } = *self;
        let sizes = self.sizes(b, n);
        let macs = core::forward_macs(&sizes, self.chunk(n), state_in, !rescale);
        // q, k, y; v, g, o; rescaling keeps a weight per row and head, else there is a state.
        let extra = if rescale { b * n * heads } else { b * dim * value_dim / heads };
        Cost {
            flops: 2 * (b * n * (2 * dim * dim + 3 * dim * value_dim) + macs),
            activation_bytes: 4 * (b * n * (3 * dim + 3 * value_dim) + extra),
        }
    }
}

/// Multi-scale retention: `q_proj`, `k_proj`, `v_proj`, `g_proj`, `out_proj`, none with a bias.
#[derive(Clone, Debug)]
pub struct RetentionLayer {
    /// q, k, v, g.
    projections: [Linear; 4],
    out_proj: Linear,
    settings: Settings,
}

/// Tokens, and a state if there is one.
pub type Step<T> = (Tensor<T>, Option<Tensor<T>>);

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    /// q, k, v, g.
    projected: [Tensor<T>; 4],
    out: Tensor<T>,
    weights: Tensor<T>,
    state: Option<Tensor<T>>,
}

/// Xavier-uniform with a gain of 2 to the power of `exponent`.
fn xavier_gain(fan_in: usize, fan_out: usize, exponent: f64) -> Init {
    Init::Uniform(libm::exp2(exponent) * (6.0 / (fan_in + fan_out) as f64).sqrt())
}

impl RetentionLayer {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: Settings) -> Self {
        let Settings { dim, value_dim, .. } = settings;
        let linear = |names: &mut Names, name: &str, inputs: usize, outputs: usize, exponent: f64| {
            Linear::new(names.at(name), inputs, outputs, false, xavier_gain(inputs, outputs, exponent))
        };
        let projections = [("q_proj", dim), ("k_proj", dim), ("v_proj", value_dim), ("g_proj", value_dim)]
            .map(|(name, outputs)| linear(names, name, dim, outputs, -2.5));
        RetentionLayer { projections, out_proj: linear(names, "out_proj", value_dim, dim, -1.0), settings }
    }

    /// `y` `[B, N, dim]`, and the state after the last token `[B, h, d_k, d_v]` (not with rescaling).
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, state: Option<Tensor<T>>) -> Result<(Step<T>, Saved<T>)> {
        let (settings, [batch, tokens, c]) = (self.settings, x.dims("input of a retention")?);
        let (sizes, rescale) = (settings.sizes(batch, tokens), settings.rescaling());
        if c != settings.dim {
            return Err(Error::shape("input of a retention", format!("[batch, tokens, {}]", settings.dim), x.shape()));
        }
        let state_shape = [batch, sizes.heads, sizes.dim, sizes.value_dim];
        if let Some(state) = &state {
            state.expect_shape("input `state`", state_shape)?;
            if settings.rescale {
                return Err(Error::config("normalize", "expected \"none\" with a state to start from"));
            }
        }
        if let (Rescale::Chunkwise, chunk) = (rescale, settings.chunk(tokens))
            && !tokens.is_multiple_of(chunk)
        {
            return Err(Error::config(
                "chunk_size",
                format!("expected a divisor of {tokens} tokens with torchscale's rescaling, found {chunk}"),
            ));
        }
        let [q, k, v, g] = &self.projections;
        let projected = [q.forward(p, x)?, k.forward(p, x)?, v.forward(p, x)?, g.forward(p, x)?];
        let mut out = Tensor::scratch(x.shape().with_last(settings.value_dim));
        let rows = if rescale == Rescale::None { 0 } else { batch * sizes.heads * tokens };
        let mut weights = Tensor::scratch([rows]);
        let mut after = (!settings.rescale).then(|| Tensor::zeros(state_shape));
        let outputs = Outputs { out: out.data_mut(), weights: weights.data_mut(), state: after.as_mut().map(Tensor::data_mut) };
        core::forward(outputs, inputs(&projected, &state), settings.chunk(tokens), rescale, sizes);
        let mut z = Tensor::scratch(out.shape());
        retention_gate::forward(&settings.gate(tokens), z.data_mut(), out.data(), projected[3].data());
        let y = self.out_proj.forward(p, &z)?;
        Ok(((y, after), Saved { projected, out, weights, state }))
    }

    /// `dx` and the gradient of the state before the first token, if there was one.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: Saved<T>,
        dy: &Tensor<T>,
        d_state: Option<&Tensor<T>>,
    ) -> Result<Step<T>> {
        let Saved { projected, out, weights, state } = saved;
        let (settings, [batch, tokens, _]) = (self.settings, x.dims("input of a retention")?);
        let mut d_out = self.out_proj.backward_input(p, dy)?;
        let [mut d_q, mut d_k, mut d_v, mut d_g] = [0, 1, 2, 3].map(|i| Tensor::scratch(projected[i].shape()));
        let mut z = Tensor::scratch(out.shape());
        let results = [z.data_mut(), d_g.data_mut(), d_out.data_mut()];
        retention_gate::backward(&settings.gate(tokens), results, [out.data(), projected[3].data()], weights.data());
        self.out_proj.backward_params(g, &z, dy)?;
        drop((z, out));
        let mut d_first = state.as_ref().map(|state| Tensor::zeros(state.shape()));
        let grads = Gradients { q: d_q.data_mut(), k: d_k.data_mut(), v: d_v.data_mut(), state: d_first.as_mut().map(Tensor::data_mut) };
        core::backward(grads, d_out.data(), d_state.map(Tensor::data), inputs(&projected, &state), settings.sizes(batch, tokens));
        drop((projected, d_out));
        let mut dx: Option<Tensor<T>> = None;
        for (linear, d) in self.projections.iter().zip([d_q, d_k, d_v, d_g]) {
            linear.backward_params(g, x, &d)?;
            match &mut dx {
                None => dx = Some(linear.backward_input(p, &d)?),
                Some(dx) => linear.add_backward_input(p, dx, &d)?,
            }
        }
        Ok((dx.unwrap_or_else(|| Tensor::zeros(x.shape())), d_first))
    }
}

fn inputs<'a, T: Float>([q, k, v, _]: &'a [Tensor<T>; 4], state: &'a Option<Tensor<T>>) -> Inputs<'a, T> {
    Inputs { q: q.data(), k: k.data(), v: v.data(), state: state.as_ref().map(Tensor::data) }
}

/// `attention.retention`.
pub struct Retention;

impl Operation for Retention {
    const NAME: &'static str = "attention.retention";
    const PAPER: &'static str = "2307.08621 RetNet";

    fn sample(rng: &mut Rng) -> Config {
        let (heads, mut config) = (rng.between(1, 3), Config::default());
        config.set("dim", 2 * heads * rng.between(1, 3)).set("value_dim", heads * rng.between(2, 5)).set("heads", heads);
        config.set("form", rng.pick(&["parallel", "recurrent", "chunkwise"])).set("chunk_size", rng.between(1, 7));
        config.set("normalize", rng.pick(&["none", "none", "torchscale"])).set("norm", rng.pick(&["rms", "rms", "layer"]));
        config.set("gate", rng.pick(&["swish", "swish", "gelu"])).set("eps", rng.range(1e-6, 1e-2)).set("rotary", rng.chance(0.8));
        config.set("offset", rng.below(5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let settings = Settings::from_config(config)?;
        let batch = draw.size("batch", 1, 3);
        let tokens = match settings.rescaling() {
            Rescale::Chunkwise => settings.chunk(1) * draw.size("chunks", 1, 4),
            _ => draw.size("tokens", 1, 20),
        };
        draw.normal("x", [batch, tokens, settings.dim]);
        if !settings.rescale && draw.size("state", 0, 1) > 0 {
            let sizes = settings.sizes(batch, tokens);
            draw.normal("state", [batch, sizes.heads, sizes.dim, sizes.value_dim]);
        }
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        let state_in = inputs.dims::<4>("state").is_ok();
        Ok(Some(Settings::from_config(config)?.cost(b, n, state_in)))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        Some(
            Benchmark::new(size)
                .set("value_dim", size.dim)
                .set("heads", size.heads)
                .set("form", "chunkwise")
                .set("chunk_size", 64)
                .set("normalize", "none")
                .set("norm", "rms")
                .set("gate", "swish")
                .set("eps", 1e-6)
                .set("rotary", true)
                .set("offset", 0)
                .size("state", 0),
        )
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (x, settings) = (run.input("x")?, Settings::from_config(run.config())?);
        let state = if run.has_input("state") { Some(run.input("state")?) } else { None };
        let (layer, layout) = Layout::build(|names| Ok(RetentionLayer::new(names, settings)))?;
        let p = run.params(&layout)?;
        let ((y, after), saved) = layer.forward(&p, &x, state)?;
        run.output("y", &y);
        if let Some(after) = &after {
            run.output("state", after);
        }
        if run.backward() {
            let (mut g, dy) = (run.zero_grads(&p), run.cotangent("y", y.shape())?);
            let d_state = match &after {
                Some(after) => Some(run.cotangent("state", after.shape())?),
                None => None,
            };
            let (dx, d_first) = layer.backward(&p, &mut g, &x, saved, &dy, d_state.as_ref())?;
            run.grad_input("x", &dx);
            if let Some(d_first) = d_first {
                run.grad_input("state", &d_first);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
