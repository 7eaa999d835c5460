//! What an operation is to the rest of karat: something that runs forward and backward on named tensors.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use super::config::Config;
use crate::error::{Error, Result};
use crate::linalg::flops_so_far;
use crate::nn::{Layout, Param, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Shape, Tensor, pool};

/// A named tensor of a case: floats of the precision in use, or integers.
#[derive(Clone, Debug)]
pub enum Value<T: Float> {
    /// Floats.
    Float(Tensor<T>),
    /// Integers.
    Int(IntTensor),
}

impl<T: Float> Value<T> {
    /// The shape.
    pub fn shape(&self) -> Shape {
        match self {
            Value::Float(t) => t.shape(),
            Value::Int(t) => t.shape,
        }
    }
}

/// Named tensors, in order of name.
pub type Tensors<T> = BTreeMap<String, Value<T>>;

/// The shapes of an operation's inputs, by name without the `input.` prefix, and those of parameters by full name; of integer inputs
/// (coordinates, masks) the values too, for they can say how much there is to do.
#[derive(Clone, Debug, Default)]
pub struct Shapes {
    shapes: BTreeMap<String, Shape>,
    ints: BTreeMap<String, IntTensor>,
}

impl Shapes {
    /// The shapes of the `input.*` and `param.*` among named tensors.
    pub fn of<T: Float>(tensors: &Tensors<T>) -> Self {
        let mut of = Shapes::default();
        for (name, value) in tensors.iter().filter(|(name, _)| name.starts_with("input.") || name.starts_with("param.")) {
            let name = name.strip_prefix("input.").unwrap_or(name);
            of.shapes.insert(name.into(), value.shape());
            if let Value::Int(t) = value {
                of.ints.insert(name.into(), t.clone());
            }
        }
        of
    }

    /// The dimensions of a parameter, if it is given: for an operation whose configuration leaves them open.
    pub fn param_dims<const R: usize>(&self, name: &str) -> Result<Option<[usize; R]>> {
        let name = format!("param.{name}");
        self.shapes.get(&name).map(|shape| shape.dims(&name)).transpose()
    }

    /// The dimensions of an input: `let [b, n, c] = shapes.dims("x")?`.
    pub fn dims<const R: usize>(&self, name: &str) -> Result<[usize; R]> {
        let shape = self.shapes.get(name).ok_or_else(|| Error::missing(format!("input `{name}`")))?;
        shape.dims(&format!("input `{name}`"))
    }

    /// An integer input.
    pub fn ints(&self, name: &str) -> Result<&IntTensor> {
        self.ints.get(name).ok_or_else(|| Error::missing(format!("input `{name}`")))
    }
}

/// What a forward pass costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating-point operations, two for each multiply-add of a matrix product, convolution or other contraction. Element-wise work
    /// (norms, softmax, activations) is not counted.
    pub flops: usize,
    /// Bytes in f32 that stay allocated from the forward to the backward pass, beside inputs and parameters: what is saved, and the
    /// outputs.
    pub activation_bytes: usize,
}

impl std::ops::Add for Cost {
    type Output = Cost;
    fn add(self, other: Cost) -> Cost {
        Cost { flops: self.flops + other.flops, activation_bytes: self.activation_bytes + other.activation_bytes }
    }
}

/// The size at which `karat bench attention` compares mechanisms: one image of `tokens` tokens of width `dim`, `heads` heads.
#[derive(Clone, Copy, Debug)]
pub struct BenchSize {
    /// Tokens N.
    pub tokens: usize,
    /// Width C.
    pub dim: usize,
    /// Heads h.
    pub heads: usize,
}

impl BenchSize {
    /// The side of the token grid, if the tokens form a square.
    pub fn side(&self) -> Option<usize> {
        let side = self.tokens.isqrt();
        (side * side == self.tokens).then_some(side)
    }
}

/// How an operation runs at a [`BenchSize`].
#[derive(Clone, Debug, Default)]
pub struct Benchmark {
    /// The configuration.
    pub config: Config,
    /// The sizes that the configuration leaves open, as [`Draw::size`] names them.
    pub sizes: BTreeMap<String, usize>,
}

impl Benchmark {
    /// A configuration with `dim` and `num_heads`, for one image (`batch` 1) of `tokens` tokens.
    pub fn new(size: BenchSize) -> Self {
        let mut config = Config::default();
        config.set("dim", size.dim).set("num_heads", size.heads);
        Benchmark { config, sizes: BTreeMap::new() }.size("batch", 1).size("tokens", size.tokens)
    }

    /// Sets a key of the configuration.
    pub fn set(mut self, key: &str, value: impl Into<serde_json::Value>) -> Self {
        self.config.set(key, value);
        self
    }

    /// Fixes an open size.
    pub fn size(mut self, name: &str, value: usize) -> Self {
        self.sizes.insert(name.into(), value);
        self
    }
}

/// An operation of the registry. Implemented by a unit struct beside the code it runs.
///
/// The registry's tests walk all operations: golden cases, gradients of `sample`d configurations against central differences,
/// adjointness, completeness of gradients. `karat case new` and `karat bench` use the same four functions.
pub trait Operation {
    /// The name, as the sheets have it: `attention.window`.
    const NAME: &'static str;
    /// The paper, as `arXiv number, short title`.
    const PAPER: &'static str;
    /// The names of the inputs that are data: their gradients are not part of the operation.
    const DATA: &'static [&'static str] = &[];

    /// A random small configuration with every key that the operation uses: odd sizes, edges, every switch.
    fn sample(rng: &mut Rng) -> Config;

    /// Random inputs for a configuration. Sizes that the configuration leaves open (batch, tokens) are drawn too.
    fn inputs(config: &Config, draw: &mut Draw) -> Result<()>;

    /// What the forward pass costs for these inputs, by formula; `None` for an operation without arithmetic to speak of. A test holds
    /// it to what is counted.
    fn cost(_config: &Config, _inputs: &Shapes) -> Result<Option<Cost>> {
        Ok(None)
    }

    /// How the operation runs in `karat bench attention`, if it takes part at this size.
    fn bench(_size: BenchSize) -> Option<Benchmark> {
        None
    }

    /// Runs the operation forward and, if [`Run::backward`] says so, backward.
    fn run<T: Float>(run: &mut Run<T>) -> Result<()>;
}

/// Random inputs under construction.
pub struct Draw<'a> {
    /// The source of randomness.
    pub rng: &'a mut Rng,
    /// Sizes that the caller fixes by name (`batch`, `tokens`).
    pub sizes: BTreeMap<String, usize>,
    /// The open sizes that the operation has asked for.
    pub asked: BTreeSet<String>,
    /// The inputs so far, without the `input.` prefix.
    pub inputs: Tensors<f64>,
}

impl Draw<'_> {
    /// An open size: what the caller fixed, else uniform in `low..=high`.
    pub fn size(&mut self, name: &str, low: usize, high: usize) -> usize {
        self.asked.insert(name.into());
        self.sizes.get(name).copied().unwrap_or_else(|| self.rng.between(low, high))
    }

    /// A standard normal input.
    pub fn normal(&mut self, name: &str, shape: impl Into<Shape>) {
        let tensor = Tensor::from_fn(shape, |_| self.rng.normal());
        self.inputs.insert(name.into(), Value::Float(tensor));
    }

    /// An input uniform in `[0, 1)`: noise.
    pub fn uniform(&mut self, name: &str, shape: impl Into<Shape>) {
        let tensor = Tensor::from_fn(shape, |_| self.rng.uniform());
        self.inputs.insert(name.into(), Value::Float(tensor));
    }

    /// An integer input.
    pub fn ints(&mut self, name: &str, shape: impl Into<Shape>, data: Vec<i64>) -> Result<()> {
        self.inputs.insert(name.into(), Value::Int(IntTensor::new(shape, data)?));
        Ok(())
    }
}

/// One execution of an operation: the question going in, the answer coming out.
pub struct Run<'a, T: Float> {
    config: &'a Config,
    /// `input.*`, `param.*`, `buffer.*`, `cotangent.*`.
    given: &'a Tensors<T>,
    /// `output.*`, `grad.*`, `after.*`.
    results: Tensors<T>,
    /// Fills parameters that are not given (to make a case), from this seed.
    init_seed: Option<u64>,
    /// The parameters that the operation got.
    used: Option<Params<T>>,
    /// Parameters of an earlier run, used instead of those given: nothing is copied between layer and case.
    prepared: Option<Params<T>>,
    backward: bool,
    middle: Cell<Option<Middle>>,
}

/// The moment between the forward and the backward pass of a [`Run`].
#[derive(Clone, Copy, Debug)]
pub struct Middle {
    /// When it was.
    pub at: Instant,
    /// Bytes of tensor memory in use.
    pub live_bytes: usize,
    /// Operations counted so far, inside [`counted`](crate::linalg::counted).
    pub flops: u64,
}

impl<'a, T: Float> Run<'a, T> {
    /// A run on the given tensors. With `init_seed`, parameters that are not given are made up instead of missed.
    pub fn new(config: &'a Config, given: &'a Tensors<T>, backward: bool, init_seed: Option<u64>) -> Self {
        Run { config, given, results: Tensors::new(), init_seed, used: None, prepared: None, backward, middle: Cell::new(None) }
    }

    /// A run to be measured: with the parameters of an earlier run, nothing copied between layer and case, results thrown away.
    pub fn measured(config: &'a Config, given: &'a Tensors<T>, backward: bool, params: Params<T>) -> Self {
        Run { prepared: Some(params), ..Run::new(config, given, backward, None) }
    }

    /// The configuration.
    pub fn config(&self) -> &'a Config {
        self.config
    }

    /// Whether gradients are asked for. An operation asks once, between its forward and its backward pass: a measured run notes the
    /// moment.
    pub fn backward(&self) -> bool {
        if self.middle.get().is_none() {
            self.middle.set(Some(Middle { at: Instant::now(), live_bytes: pool::stats().live_bytes, flops: flops_so_far() }));
        }
        self.backward
    }

    /// The parameters that the operation ran with, for [`measured`](Run::measured); none if it has none.
    pub fn take_params(&mut self) -> Option<Params<T>> {
        self.used.take()
    }

    /// The moment at which the forward pass had ended.
    pub fn middle(&self) -> Option<Middle> {
        self.middle.get()
    }

    /// A float input.
    pub fn input(&self, name: &str) -> Result<Tensor<T>> {
        match self.given.get(&format!("input.{name}")) {
            Some(Value::Float(t)) => Ok(t.clone()),
            Some(Value::Int(_)) => Err(Error::value(format!("input `{name}`"), "expected floats, found integers")),
            None => Err(Error::missing(format!("input `{name}`"))),
        }
    }

    /// The names of all inputs.
    pub fn input_names(&self) -> Vec<&'a str> {
        self.given.keys().filter_map(|name| name.strip_prefix("input.")).collect()
    }

    /// Whether an input is there.
    pub fn has_input(&self, name: &str) -> bool {
        self.given.contains_key(&format!("input.{name}"))
    }

    /// The shape of a buffer that the case brings, for one that is optional.
    pub fn buffer_shape(&self, name: &str) -> Option<Shape> {
        self.given.get(&format!("buffer.{name}")).map(Value::shape)
    }

    /// An integer input.
    pub fn ints(&self, name: &str) -> Result<&'a IntTensor> {
        match self.given.get(&format!("input.{name}")) {
            Some(Value::Int(t)) => Ok(t),
            Some(Value::Float(_)) => Err(Error::value(format!("input `{name}`"), "expected integers, found floats")),
            None => Err(Error::missing(format!("input `{name}`"))),
        }
    }

    /// The parameters and buffers of a model with this layout. Tensors of the case that the layout does not know take no part.
    pub fn params(&mut self, layout: &Arc<Layout>) -> Result<Params<T>> {
        if let Some(prepared) = &self.prepared {
            return Ok(prepared.under(layout));
        }
        let mut params = match self.init_seed {
            Some(seed) => {
                let mut params = Params::init(layout, seed);
                // Zeros and ones would hide mistakes: every parameter is moved off its start.
                for (index, entry) in layout.params().iter().enumerate() {
                    let mut rng = Rng::new(seed, crate::tensor::random::Purpose::Case, 1, index as u64);
                    for x in params.get_mut(entry.param) {
                        *x += T::from_f64(0.2 * rng.normal());
                    }
                }
                params
            }
            None => Params::zeros(layout),
        };
        for (prefix, entries, is_buffer) in [("param", layout.params(), false), ("buffer", layout.buffers(), true)] {
            for entry in entries {
                match self.given.get(&format!("{prefix}.{}", entry.name)) {
                    Some(Value::Float(t)) => params.load(entry, is_buffer, t)?,
                    Some(Value::Int(_)) => return Err(Error::value(format!("{prefix}.{}", entry.name), "expected floats, found integers")),
                    None if self.init_seed.is_some() => {}
                    None => return Err(Error::missing(format!("{prefix}.{}", entry.name))),
                }
            }
        }
        if self.init_seed.is_some() {
            for entry in layout.params() {
                self.results.insert(format!("param.{}", entry.name), Value::Float(params.tensor(entry.param)));
            }
            for entry in layout.buffers() {
                let data = params.buffer(entry.param);
                self.results.insert(format!("buffer.{}", entry.name), Value::Float(Tensor::from_fn(entry.param.shape(), |i| data[i])));
            }
        }
        self.used = Some(params.clone());
        Ok(params)
    }

    /// The dimensions of a parameter, if it is given: for an operation whose configuration leaves them open.
    pub fn param_dims<const R: usize>(&self, name: &str) -> Result<Option<[usize; R]>> {
        let name = format!("param.{name}");
        self.given.get(&name).map(|value| value.shape().dims(&name)).transpose()
    }

    /// Gradients of the right layout, all zero.
    pub fn zero_grads(&self, params: &Params<T>) -> Params<T> {
        Params::zeros(params.layout())
    }

    /// Hands in a float output.
    pub fn output(&mut self, name: &str, value: &Tensor<T>) {
        if self.prepared.is_some() {
            return;
        }
        self.results.insert(format!("output.{name}"), Value::Float(value.clone()));
    }

    /// Hands in an integer output.
    pub fn output_ints(&mut self, name: &str, value: IntTensor) {
        self.results.insert(format!("output.{name}"), Value::Int(value));
    }

    /// The upstream gradient of an output of this shape: what the case gives, 1 for a scalar `loss`, else zeros.
    pub fn cotangent(&self, name: &str, shape: Shape) -> Result<Tensor<T>> {
        match self.given.get(&format!("cotangent.{name}")) {
            Some(Value::Float(t)) => {
                t.expect_shape(&format!("cotangent.{name}"), shape)?;
                Ok(t.clone())
            }
            Some(Value::Int(_)) => Err(Error::value(format!("cotangent.{name}"), "expected floats, found integers")),
            None if name == "loss" => Ok(Tensor::from_fn(shape, |_| T::ONE)),
            None => Ok(Tensor::zeros(shape)),
        }
    }

    /// Hands in the gradient of an input.
    pub fn grad_input(&mut self, name: &str, grad: &Tensor<T>) {
        if self.prepared.is_some() {
            return;
        }
        self.results.insert(format!("grad.input.{name}"), Value::Float(grad.clone()));
    }

    /// Hands in the gradients of all parameters.
    pub fn grad_params(&mut self, grads: &Params<T>) {
        if self.prepared.is_some() {
            return;
        }
        for entry in grads.layout().params() {
            self.results.insert(format!("grad.param.{}", entry.name), Value::Float(grads.tensor(entry.param)));
        }
    }

    /// The whole of an operation with one input `x` and one output `y`: `forward(params, x) → (y, saved)`,
    /// `backward(params, grads, saved, dy) → dx`.
    pub fn unary<S>(
        &mut self,
        layout: &Arc<Layout>,
        forward: impl FnOnce(&Params<T>, &Tensor<T>) -> Result<(Tensor<T>, S)>,
        backward: impl FnOnce(&Params<T>, &mut Params<T>, S, &Tensor<T>) -> Result<Tensor<T>>,
    ) -> Result<()> {
        let p = self.params(layout)?;
        let x = self.input("x")?;
        let (y, saved) = forward(&p, &x)?;
        self.output("y", &y);
        if self.backward() {
            let mut g = self.zero_grads(&p);
            let dy = self.cotangent("y", y.shape())?;
            let dx = backward(&p, &mut g, saved, &dy)?;
            self.grad_input("x", &dx);
            self.grad_params(&g);
        }
        Ok(())
    }

    /// Hands in the value of a buffer after the call.
    pub fn after(&mut self, name: &str, value: Value<T>) {
        self.results.insert(format!("after.{name}"), value);
    }

    /// Hands in new values of buffers of `layout`: running statistics. Where the case counts batches, the count goes up.
    pub fn after_buffers(&mut self, layout: &Layout, updates: Vec<(Param, Tensor<T>)>) {
        if self.prepared.is_some() {
            return;
        }
        for (buffer, value) in updates {
            let Some(entry) = layout.buffers().iter().find(|entry| entry.param.offset() == buffer.offset()) else { continue };
            self.after(&entry.name, Value::Float(value));
            // PyTorch counts the batches; nothing reads the count, so layers don't know it.
            let counter = entry.name.strip_suffix("running_mean").map(|norm| format!("{norm}num_batches_tracked"));
            if let Some(name) = counter
                && let Some(Value::Int(count)) = self.given.get(&format!("buffer.{name}"))
            {
                let mut count = count.clone();
                count.data.iter_mut().for_each(|n| *n = n.saturating_add(1));
                self.after(&name, Value::Int(count));
            }
        }
    }

    /// Everything that was handed in.
    pub fn into_results(self) -> Tensors<T> {
        self.results
    }
}

/// An [`Operation`] as the registry holds it: its functions for both precisions.
#[derive(Clone, Copy)]
pub struct Op {
    /// See [`Operation::NAME`].
    pub name: &'static str,
    /// See [`Operation::PAPER`].
    pub paper: &'static str,
    /// See [`Operation::DATA`].
    pub data: &'static [&'static str],
    /// See [`Operation::sample`].
    pub sample: fn(&mut Rng) -> Config,
    /// See [`Operation::inputs`].
    pub inputs: fn(&Config, &mut Draw) -> Result<()>,
    /// See [`Operation::cost`].
    pub cost: fn(&Config, &Shapes) -> Result<Option<Cost>>,
    /// See [`Operation::bench`].
    pub bench: fn(BenchSize) -> Option<Benchmark>,
    /// [`Operation::run`] in f32.
    pub run_f32: fn(&mut Run<f32>) -> Result<()>,
    /// [`Operation::run`] in f64.
    pub run_f64: fn(&mut Run<f64>) -> Result<()>,
}

impl Op {
    /// The registry's entry for `O`.
    pub const fn of<O: Operation>() -> Op {
        Op {
            name: O::NAME,
            paper: O::PAPER,
            data: O::DATA,
            sample: O::sample,
            inputs: O::inputs,
            cost: O::cost,
            bench: O::bench,
            run_f32: O::run::<f32>,
            run_f64: O::run::<f64>,
        }
    }
}
