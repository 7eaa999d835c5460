//! Every registered operation: the gradients of random configurations are complete, and agree with central differences in f64.
//!
//! `KARAT_SOAK_CASES=1000` tries that many configurations per operation. A failure prints the seed.

use std::collections::BTreeMap;

use karat::Result;
use karat::case::{Case, Op, Run, Tensors, Value, new_case, operations};
use karat::tensor::Tensor;
use karat::tensor::random::{Purpose, Rng};
use rayon::prelude::*;

/// Tensors checked one by one per configuration (which ones is drawn); all together are checked always.
const ALONE: usize = 16;

/// Whether the sheet defines this gradient as something else than the derivative: hard decisions with the gradient of soft ones, and
/// factors that count as constants. Differences say nothing about those; their golden cases do.
fn is_surrogate(case: &Case, tensor: &str) -> bool {
    let flag = |key| case.config.bool(key).unwrap_or(false);
    let text = |key| case.config.str(key).unwrap_or("");
    let fourier = case.config.f64("fft_weight").unwrap_or(0.0) > 0.0;
    case.op == "mim.focal_frequency_loss"
        || tensor.contains("thresholds")
        || flag("hard")
        || flag("detach")
        || text("normalize") == "torchscale"
        || text("mask_mode") == "mean"
        || matches!(text("ln_relax"), "tensor" | "token")
        || !matches!(text("quantizer"), "" | "gumbel_soft") && !matches!(text("mode"), "encode" | "decode")
        || fourier && (flag("fft_focal") || flag("fft_reweight") || matches!(text("fft_unmask_replace"), "prediction" | "mixed"))
}

/// 256 for every mechanism and layer, 64 for whole networks, which are made of them.
fn cases_of(op: &Op) -> u64 {
    let network = ["model.", "mim.", "lm."].iter().any(|room| op.name.starts_with(room));
    std::env::var("KARAT_SOAK_CASES").map_or(if network { 64 } else { 256 }, |n| n.parse().expect("KARAT_SOAK_CASES is a number"))
}

/// Runs `check` on random cases of every operation and fails with all that it said.
fn for_random_cases(check: impl Fn(&Op, &Case, u64) -> Vec<String> + Sync) {
    let of_operation = |op: &'static Op| {
        let mut failures = Vec::new();
        for seed in 0..cases_of(op) {
            match new_case(op, None, seed, BTreeMap::new()) {
                Ok(case) => {
                    failures.extend(check(op, &case, seed).iter().map(|f| format!("{}@{seed} {}: {f}", op.name, case.config.to_json())))
                }
                Err(e) => failures.push(format!("{}@{seed}: no case: {e}", op.name)),
            }
        }
        failures
    };
    let failures: Vec<String> = operations().par_iter().flat_map_iter(of_operation).collect();
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

/// The inputs and parameters that have a gradient, with it; `None` for one that vanishes.
fn gradients(case: &Case) -> Vec<(String, Option<&Tensor<f64>>)> {
    let stored = case.tensors.iter().filter_map(|(name, value)| match value {
        Value::Float(grad) => name.strip_prefix("grad.").map(|of| (of.to_string(), Some(grad))),
        Value::Int(_) => None,
    });
    stored.chain(case.zero_grads.iter().map(|name| (name.clone(), None))).collect()
}

/// `Σ ⟨cotangent, output⟩`, and the sum of the magnitudes that went into it.
fn objective(op: &Op, case: &Case, question: &Tensors<f64>) -> Result<(f64, f64)> {
    let mut run = Run::new(&case.config, question, false, None);
    (op.run_f64)(&mut run)?;
    let (mut sum, mut size) = (0.0, 0.0);
    for (name, value) in run.into_results() {
        let (Some(name), Value::Float(y)) = (name.strip_prefix("output."), value) else { continue };
        match question.get(&format!("cotangent.{name}")) {
            Some(Value::Float(c)) => {
                for (c, y) in c.data().iter().zip(y.data()) {
                    sum += c * y;
                    size += (c * y).abs();
                }
            }
            _ if name == "loss" => {
                sum += y.data()[0];
                size += y.data()[0].abs();
            }
            _ => {}
        }
    }
    Ok((sum, size))
}

/// The derivative of the objective along a direction, by the five-point formula with steps of `h`, and the objective's magnitude.
fn quotient(op: &Op, case: &Case, direction: &[(&str, Vec<f64>)], h: f64) -> Result<(f64, f64)> {
    let question = case.question();
    let mut size = 0.0f64;
    let mut at = |t: f64| -> Result<f64> {
        let mut moved = question.clone();
        for (name, v) in direction {
            if let Some(Value::Float(x)) = moved.get_mut(*name) {
                x.data_mut().iter_mut().zip(v).for_each(|(x, v)| *x += t * v);
            }
        }
        let (sum, magnitude) = objective(op, case, &moved)?;
        size = size.max(magnitude);
        Ok(sum)
    };
    let measured = (8.0 * (at(h)? - at(-h)?) - (at(2.0 * h)? - at(-2.0 * h)?)) / (12.0 * h);
    Ok((measured, size))
}

/// The derivative of the objective along a random direction in the space of `tensors`, from the gradient and by differences.
///
/// Three directions and step sizes: the quotient may straddle a kink (a ReLU, a maximum) with one; a wrong gradient fails with all. Its
/// quotients do not depend on the step either: where a smaller step moves the last one by more than a tenth of what separates it from
/// the gradient, it has not settled (a kink close by, the norm of two nearly equal numbers, rounding) and says nothing.
fn check_direction(op: &Op, case: &Case, tensors: &[(String, Option<&Tensor<f64>>)], rng: &mut Rng) -> Result<Option<String>> {
    let mut last = (Vec::new(), 0.0, 0.0, String::new());
    for h in [1e-4, 1e-5, 1e-6] {
        let mut direction: Vec<(&str, Vec<f64>)> = Vec::new();
        let (mut slope, mut square) = (0.0, 0.0);
        for (name, grad) in tensors {
            let Some(Value::Float(x)) = case.tensors.get(name) else { continue };
            let mean_square = x.data().iter().map(|x| x * x).sum::<f64>() / x.data().len().max(1) as f64;
            let scale = mean_square.sqrt().clamp(0.1, 1e3);
            let v: Vec<f64> = x.data().iter().map(|_| scale * rng.normal()).collect();
            for (g, v) in grad.iter().flat_map(|grad| grad.data()).zip(&v) {
                slope += g * v;
                square += (g * scale) * (g * scale);
            }
            direction.push((name, v));
        }
        let (measured, size) = quotient(op, case, &direction, h)?;
        // The error of the five-point formula is of order h⁴; rounding adds the objective's error over h.
        let tolerance = 1e-6 * square.sqrt() + 50.0 * f64::EPSILON * size / h;
        if (measured - slope).abs() <= tolerance {
            return Ok(None);
        }
        let said = format!("slope {slope:e} by the gradient, {measured:e} by differences (tolerance {tolerance:.1e}, step {h:e})");
        last = (direction, slope, measured, said);
    }
    let (direction, slope, measured, said) = last;
    let (finer, _) = quotient(op, case, &direction, 2.5e-7)?;
    Ok(((finer - measured).abs() <= 0.1 * (measured - slope).abs()).then_some(said))
}

#[test]
fn gradients_are_the_slope_of_the_output() {
    for_random_cases(|op, case, seed| {
        let mut tensors = gradients(case);
        tensors.retain(|(name, _)| !is_surrogate(case, name));
        let mut rng = Rng::new(seed, Purpose::Case, 10, 0);
        let mut failures = Vec::new();
        let mut check = |names: &str, some: &[(String, Option<&Tensor<f64>>)], rng: &mut Rng| match check_direction(op, case, some, rng) {
            Ok(None) => {}
            Ok(Some(said)) => failures.push(format!("{names}: {said}")),
            Err(e) => failures.push(format!("{names}: {e}")),
        };
        for index in rng.permutation(tensors.len()).into_iter().take(ALONE) {
            check(&tensors[index].0, &tensors[index..=index], &mut rng);
        }
        if !tensors.is_empty() {
            check("all together", &tensors, &mut rng);
        }
        failures
    });
}

#[test]
fn gradients_are_complete_and_of_the_right_shape() {
    for_random_cases(|op, case, _| {
        // An operation that has no gradient at all (a measurement, a fixed table) makes cases without.
        if !case.has_gradients() {
            return Vec::new();
        }
        let known: BTreeMap<String, Option<&Tensor<f64>>> = gradients(case).into_iter().collect();
        let mut failures = Vec::new();
        for (name, value) in &case.tensors {
            let data = name.strip_prefix("input.").is_some_and(|name| op.data.contains(&name));
            let learns = (name.starts_with("input.") || name.starts_with("param.")) && !data && matches!(value, Value::Float(_));
            match known.get(name) {
                None if learns => failures.push(format!("{name} has no gradient")),
                Some(_) if !learns => failures.push(format!("{name} has a gradient although it is data")),
                Some(Some(grad)) if grad.shape() != value.shape() => {
                    failures.push(format!("the gradient of {name} has shape {:?} instead of {:?}", grad.shape(), value.shape()));
                }
                _ => {}
            }
        }
        failures
    });
}
