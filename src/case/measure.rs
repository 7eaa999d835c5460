//! Runs an operation to be measured: parameters prepared, nothing copied between layer and case, forward and backward told apart.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::config::Config;
use super::format::Case;
use super::op::{Benchmark, Cost, Draw, Op, Run, Shapes, Tensors, Value};
use crate::error::{Error, Result};
use crate::nn::Params;
use crate::tensor::random::{Purpose, Rng};
use crate::tensor::{Float, Tensor, pool};

/// An operation with its inputs, parameters and cotangents in f32.
pub struct Prepared {
    op: Op,
    config: Config,
    given: Tensors<f32>,
    params: Option<Params<f32>>,
}

/// What one run took.
#[derive(Clone, Copy, Debug)]
pub struct Passes {
    /// Seconds of the forward pass.
    pub forward: f64,
    /// Seconds of the backward pass; 0 where it did not run.
    pub backward: f64,
    /// Operations counted up to the middle, inside [`counted`](crate::linalg::counted).
    pub forward_flops: u64,
    /// Bytes that stay allocated from the forward to the backward pass, as the pool rounds them up.
    pub kept_bytes: usize,
    /// The most bytes allocated at one time.
    pub peak_bytes: usize,
}

impl Prepared {
    /// Random inputs, parameters and cotangents for a configuration and sizes.
    ///
    /// # Errors
    /// The operation refuses them.
    pub fn new(op: &Op, benchmark: &Benchmark, seed: u64) -> Result<Self> {
        let mut prepared = Self::with(op, benchmark.config.clone(), &Self::inputs(op, benchmark, seed)?, Some(seed))?;
        if let Some(params) = &mut prepared.params {
            // Near a network's start, where a softmax is soft: golden cases are far from it on purpose.
            const NEAR: f32 = 0.1;
            let start = Params::<f32>::init(params.layout(), seed);
            params.flat_mut().iter_mut().zip(start.flat()).for_each(|(p, start)| *p = start + NEAR * (*p - start));
        }
        Ok(prepared)
    }

    /// The shapes of the inputs that [`new`](Self::new) would make, which is what a cost model wants to know.
    ///
    /// # Errors
    /// The operation refuses the configuration or sizes.
    pub fn shapes(op: &Op, benchmark: &Benchmark) -> Result<Shapes> {
        Ok(Shapes::of(&Self::inputs(op, benchmark, 0)?))
    }

    fn inputs(op: &Op, benchmark: &Benchmark, seed: u64) -> Result<Tensors<f64>> {
        let mut rng = Rng::new(seed, Purpose::Case, 0, 1);
        let sizes = benchmark.sizes.clone();
        let mut draw = Draw { rng: &mut rng, sizes, asked: BTreeSet::new(), inputs: Tensors::new() };
        (op.inputs)(&benchmark.config, &mut draw)?;
        Ok(draw.inputs.into_iter().map(|(name, value)| (format!("input.{name}"), value)).collect())
    }

    /// The question of a case.
    ///
    /// # Errors
    /// The operation refuses it.
    pub fn of_case(op: &Op, case: &Case) -> Result<Self> {
        Self::with(op, case.config.clone(), &case.question(), None)
    }

    fn with(op: &Op, config: Config, given: &Tensors<f64>, init_seed: Option<u64>) -> Result<Self> {
        let narrow = |value: &Value<f64>| match value {
            Value::Float(t) => Value::Float(t.cast()),
            Value::Int(t) => Value::Int(t.clone()),
        };
        let mut given: Tensors<f32> = given.iter().map(|(name, value)| (name.clone(), narrow(value))).collect();
        let mut run = Run::new(&config, &given, false, init_seed);
        (op.run_f32)(&mut run)?;
        let params = run.take_params();
        let mut rng = Rng::new(init_seed.unwrap_or(0), Purpose::Case, 2, 0);
        let mut cotangents = BTreeMap::new();
        for (name, value) in run.into_results() {
            if let (Some(name), Value::Float(y)) = (name.strip_prefix("output."), &value) {
                cotangents.insert(format!("cotangent.{name}"), Value::Float(Tensor::from_fn(y.shape(), |_| f32::from_f64(rng.normal()))));
            }
        }
        for (name, value) in cotangents {
            given.entry(name).or_insert(value);
        }
        Ok(Prepared { op: *op, config, given, params })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What the operation's cost model says.
    ///
    /// # Errors
    /// The model refuses the configuration.
    pub fn cost(&self) -> Result<Option<Cost>> {
        (self.op.cost)(&self.config, &Shapes::of(&self.given))
    }

    /// One run.
    ///
    /// # Errors
    /// The operation fails, or never says that its forward pass has ended.
    pub fn run(&self, backward: bool) -> Result<Passes> {
        pool::start_peak();
        let before = pool::stats().live_bytes;
        let mut run = match &self.params {
            Some(params) => Run::measured(&self.config, &self.given, backward, params.clone()),
            None => Run::new(&self.config, &self.given, backward, None),
        };
        let start = Instant::now();
        (self.op.run_f32)(&mut run)?;
        let end = Instant::now();
        let middle = run.middle().ok_or_else(|| Error::value(self.op.name, "does not ask whether to run backward"))?;
        Ok(Passes {
            forward: (middle.at - start).as_secs_f64(),
            backward: if backward { (end - middle.at).as_secs_f64() } else { 0.0 },
            forward_flops: middle.flops,
            kept_bytes: middle.live_bytes.saturating_sub(before),
            peak_bytes: pool::stats().peak_bytes.saturating_sub(before),
        })
    }
}
