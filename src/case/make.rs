//! Makes golden cases: karat in f64 answers a random question.

use std::collections::{BTreeMap, BTreeSet};

use super::config::Config;
use super::format::Case;
use super::op::{Draw, Op, Tensors, Value};
use super::verify::execute;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use crate::tensor::random::{Purpose, Rng};

/// A gradient no larger than this times the largest of the case (at least 1) is zero in exact arithmetic.
const ZERO: f64 = 1e-11;

/// Makes a case for an operation: a configuration (drawn if none is given), inputs, parameters and cotangents from `seed`,
/// outputs and gradients from an f64 run. `sizes` fixes sizes that the configuration leaves open (`batch`, `tokens`).
///
/// Every float output gets a random normal cotangent, but a scalar `loss`, whose cotangent is 1 unsaid. An operation that hands in
/// no gradient at all (a measurement, a fixed table) gets neither cotangents nor gradients.
///
/// # Errors
/// `sizes` names a size that is not open; the operation refuses the configuration or sizes, gives NaN, or leaves out the gradient of an input or parameter.
pub fn new_case(op: &Op, config: Option<Config>, seed: u64, sizes: BTreeMap<String, usize>) -> Result<Case> {
    let config = config.unwrap_or_else(|| (op.sample)(&mut Rng::new(seed, Purpose::Case, 0, 0)));
    let mut rng = Rng::new(seed, Purpose::Case, 0, 1);
    let mut draw = Draw { rng: &mut rng, sizes, asked: BTreeSet::new(), inputs: Tensors::new() };
    (op.inputs)(&config, &mut draw)?;
    let Draw { sizes, asked, inputs, .. } = draw;
    if let Some(unknown) = sizes.keys().find(|name| !asked.contains(*name)) {
        let open = if asked.is_empty() { "none".into() } else { asked.into_iter().collect::<Vec<_>>().join(", ") };
        return Err(Error::usage(format!("{}: no open size `{unknown}`; open with this configuration: {open}", op.name)));
    }
    let mut question: Tensors<f64> = inputs.into_iter().map(|(name, value)| (format!("input.{name}"), value)).collect();

    // The first pass makes up the parameters and shows which outputs there are.
    let first = execute(op.run_f64, &config, &question, false, Some(seed))?;
    question.extend(
        first.iter().filter(|(name, _)| name.starts_with("param.") || name.starts_with("buffer.")).map(|(n, v)| (n.clone(), v.clone())),
    );
    let outputs = first.iter().filter_map(|(name, value)| match value {
        Value::Float(t) => name.strip_prefix("output.").map(|name| (name, t)),
        Value::Int(_) => None,
    });
    let mut cotangents = Tensors::new();
    let mut differentiable = false;
    for (index, (name, output)) in outputs.enumerate() {
        differentiable = true;
        if name != "loss" || !output.shape().is_empty() {
            let mut rng = Rng::new(seed, Purpose::Case, 2, index as u64);
            cotangents.insert(format!("cotangent.{name}"), Value::Float(Tensor::from_fn(output.shape(), |_| rng.normal())));
        }
    }

    let with_cotangents: Tensors<f64> = question.iter().chain(&cotangents).map(|(n, v)| (n.clone(), v.clone())).collect();
    let results = execute(op.run_f64, &config, &with_cotangents, differentiable, None)?;
    let has_gradients = results.keys().any(|name| name.starts_with("grad."));
    let mut tensors = if has_gradients { with_cotangents } else { question };
    for (name, value) in &results {
        if matches!(value, Value::Float(t) if t.data().iter().any(|x| x.is_nan())) {
            return Err(Error::value(format!("{} of operation {}", name, op.name), "has NaN; try another configuration or seed"));
        }
        if name.starts_with("output.") || name.starts_with("after.") {
            tensors.insert(name.clone(), value.clone());
        }
    }
    let zero_grads = if has_gradients { gradients(op, &mut tensors, &results)? } else { Vec::new() };
    let source = format!("karat {} f64", env!("CARGO_PKG_VERSION"));
    Ok(Case { op: op.name.into(), config, source, zero_grads, tensors })
}

/// Adds the gradients of all parameters and of the inputs that are not data; returns the names of those that vanish.
fn gradients(op: &Op, tensors: &mut Tensors<f64>, results: &Tensors<f64>) -> Result<Vec<String>> {
    let is_data = |name: &str| name.strip_prefix("input.").is_some_and(|name| op.data.contains(&name));
    let mut gradients = Vec::new();
    for (name, value) in tensors.iter() {
        let learns = name.starts_with("input.") || name.starts_with("param.");
        if !learns || is_data(name) || matches!(value, Value::Int(_)) {
            continue;
        }
        match results.get(&format!("grad.{name}")) {
            Some(Value::Float(grad)) => gradients.push((name.clone(), grad.clone())),
            _ => return Err(Error::missing(format!("operation {}: the gradient of {name}", op.name))),
        }
    }
    let norm = |grad: &Tensor<f64>| grad.data().iter().fold(0.0f64, |m, g| m.max(g.abs()));
    let largest = gradients.iter().map(|(_, grad)| norm(grad)).fold(1.0, f64::max);
    let mut zeros = Vec::new();
    for (name, grad) in gradients {
        if norm(&grad) <= ZERO * largest && !grad.data().is_empty() {
            zeros.push(name);
        } else {
            tensors.insert(format!("grad.{name}"), Value::Float(grad));
        }
    }
    Ok(zeros)
}
