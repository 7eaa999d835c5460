//! Every registered operation answers bad input with an error, never with a panic.

use std::collections::BTreeMap;

use karat::case::{Case, Config, Dtype, Op, Value, new_case, operations, verify_with};
use karat::tensor::{Float, IntTensor, Shape, Tensor};
use rayon::prelude::*;
use serde_json::{Value as Json, json};

/// What an operation did with a question.
#[derive(Debug, PartialEq)]
enum Answer {
    Ran,
    Refused,
    Panicked(String),
}

fn ask(op: &Op, case: &Case) -> Answer {
    match verify_with(op, case, Dtype::F64).problem {
        None => Answer::Ran,
        Some(said) if said.contains("karat bug") => Answer::Panicked(said),
        Some(_) => Answer::Refused,
    }
}

/// Collects complaints about one operation.
struct Trial<'a> {
    op: &'a Op,
    seed: u64,
    failures: Vec<String>,
}

impl Trial<'_> {
    /// Whether the operation refused; panics are noted.
    fn refuses(&mut self, what: &str, case: &Case) -> bool {
        match ask(self.op, case) {
            Answer::Panicked(said) => {
                self.failures.push(format!("{}@{}: {what}: {said}", self.op.name, self.seed));
                true
            }
            answer => answer == Answer::Refused,
        }
    }

    fn must_refuse(&mut self, what: &str, case: &Case) {
        if !self.refuses(what, case) {
            self.failures.push(format!("{}@{} {}: {what} is accepted", self.op.name, self.seed, case.config.to_json()));
        }
    }
}

fn for_operations(check: impl Fn(&mut Trial, &Case) + Sync) {
    let of_operation = |op: &'static Op| {
        let mut failures = Vec::new();
        for seed in 100..103 {
            match new_case(op, None, seed, BTreeMap::new()) {
                Ok(case) => {
                    let mut trial = Trial { op, seed, failures: Vec::new() };
                    check(&mut trial, &case);
                    failures.extend(trial.failures);
                }
                Err(e) => failures.push(format!("{}@{seed}: no case: {e}", op.name)),
            }
        }
        failures
    };
    let failures: Vec<String> = operations().par_iter().flat_map_iter(of_operation).collect();
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

fn names(case: &Case, prefixes: &[&str]) -> Vec<String> {
    case.tensors.keys().filter(|name| prefixes.iter().any(|p| name.starts_with(p))).cloned().collect()
}

/// The same values under (or cut to, or filled up to) another shape.
fn reshaped(value: &Value<f64>, dims: &[usize]) -> Value<f64> {
    fn take<T: Copy + Default>(data: &[T], i: usize) -> T {
        if data.is_empty() { T::default() } else { data[i % data.len()] }
    }
    let shape = Shape::try_new(dims).expect("few dimensions");
    match value {
        Value::Float(t) => Value::Float(Tensor::from_fn(shape, |i| take(t.data(), i))),
        Value::Int(t) => {
            Value::Int(IntTensor::new(shape, (0..shape.numel()).map(|i| take(&t.data, i)).collect()).expect("as many as the shape says"))
        }
    }
}

#[test]
fn missing_tensors_are_refused() {
    for_operations(|trial, case| {
        let inputs = names(case, &["input."]);
        let mut refused = inputs.is_empty();
        for name in &inputs {
            let mut without = case.clone();
            without.tensors.remove(name);
            // Some inputs are optional; not all of them can be.
            refused |= trial.refuses(&format!("{name} missing"), &without);
        }
        if !refused {
            trial.failures.push(format!("{}: none of its inputs is needed", trial.op.name));
        }
        for name in names(case, &["param.", "buffer."]) {
            let mut without = case.clone();
            without.tensors.remove(&name);
            trial.must_refuse(&format!("{name} missing"), &without);
        }
    });
}

#[test]
fn wrong_shapes_are_refused() {
    for_operations(|trial, case| {
        for (index, name) in names(case, &["input.", "param.", "buffer.", "cotangent."]).into_iter().enumerate() {
            let value = &case.tensors[&name];
            let dims = value.shape().to_vec();
            let mut shapes = vec![vec![], vec![0], vec![dims.iter().product()]];
            for axis in 0..dims.len() {
                for size in [0, dims[axis] + 1, dims[axis].saturating_sub(1)] {
                    shapes.push(dims.clone());
                    shapes.last_mut().expect("just pushed")[axis] = size;
                }
            }
            for shape in shapes {
                let mut wrong = case.clone();
                wrong.tensors.insert(name.clone(), reshaped(value, &shape));
                trial.refuses(&format!("{name} of shape {shape:?} instead of {dims:?}"), &wrong);
            }
            if dims.len() < 6 {
                let longer = [&dims[..], &[2]].concat();
                let mut wrong = case.clone();
                wrong.tensors.insert(name.clone(), reshaped(value, &longer));
                let what = format!("{name} of shape {longer:?} instead of {dims:?}");
                if index == 0 || !name.starts_with("input.") {
                    // A cotangent of an output that takes no part may have any shape.
                    if name.starts_with("cotangent.") {
                        trial.refuses(&what, &wrong);
                    } else {
                        trial.must_refuse(&what, &wrong);
                    }
                } else {
                    trial.refuses(&what, &wrong);
                }
            }
        }
    });
}

#[test]
fn wild_values_do_no_harm() {
    for_operations(|trial, case| {
        for name in names(case, &["input.", "param.", "buffer."]) {
            let value = &case.tensors[&name];
            let mut try_one = |what: &str, value: Value<f64>| {
                let mut wild = case.clone();
                wild.tensors.insert(name.clone(), value);
                trial.refuses(&format!("{name} {what}"), &wild);
            };
            match value {
                Value::Float(t) => {
                    for x in [f64::NAN, f64::INFINITY, f64::MAX, 0.0] {
                        try_one(&format!("all {x}"), Value::Float(Tensor::from_fn(t.shape(), |_| x)));
                    }
                    let ints = vec![1; t.data().len()];
                    try_one("as integers", Value::Int(IntTensor::new(t.shape(), ints).expect("as many as the shape says")));
                }
                Value::Int(t) => {
                    for x in [-1, 0, 1_000_000, i64::MAX, i64::MIN] {
                        try_one(&format!("all {x}"), Value::Int(IntTensor { shape: t.shape, data: vec![x; t.data.len()] }));
                    }
                    try_one("as floats", Value::Float(Tensor::from_fn(t.shape, f64::of)));
                }
            }
        }
    });
}

#[test]
fn odd_configurations_do_no_harm() {
    let odd = [
        json!(0),
        json!(1),
        json!(7),
        json!(-1),
        json!(0.5),
        json!("?"),
        json!([]),
        json!([0]),
        json!([3, 0]),
        json!([1, 2, 3]),
        json!(true),
        Json::Null,
    ];
    for_operations(|trial, case| {
        let keys: Vec<String> = case.config.keys().map(String::from).collect();
        for key in keys {
            for value in &odd {
                let mut config = case.config.clone();
                config.set(&key, value.clone());
                trial.refuses(&format!("`{key}` = {value}"), &Case { config, ..case.clone() });
            }
        }
        trial.refuses("no configuration", &Case { config: Config::default(), ..case.clone() });
    });
}
