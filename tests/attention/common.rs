//! What the oracles share: random questions, named arrays, plain loops.

use std::collections::BTreeMap;

use karat::case::{Case, Config, Run, Tensors, Value, find, new_case};
use karat::tensor::Tensor;

/// Largest difference over largest magnitude between an oracle and karat, both in float64.
const TOLERANCE: f64 = 1e-11;

/// A question of one operation, with plain arrays by name.
pub struct Question {
    pub config: Config,
    pub case: Case,
}

impl Question {
    /// The values of a tensor by its full name: `input.x`, `param.qkv.weight`.
    pub fn get(&self, name: &str) -> &[f64] {
        match &self.case.tensors[name] {
            Value::Float(t) => t.data(),
            Value::Int(_) => panic!("{name} holds integers"),
        }
    }

    /// The integers of a tensor.
    pub fn ints(&self, name: &str) -> &[i64] {
        match &self.case.tensors[name] {
            Value::Int(t) => &t.data,
            Value::Float(_) => panic!("{name} holds floats"),
        }
    }

    pub fn has(&self, name: &str) -> bool {
        self.case.tensors.contains_key(name)
    }

    pub fn dims(&self, name: &str) -> Vec<usize> {
        self.case.tensors[name].shape().to_vec()
    }

    pub fn usize(&self, key: &str) -> usize {
        self.config.usize(key).unwrap()
    }

    /// `W x + b` with the parameters `name.weight` (of any rank: rows are outputs) and, if there is one, `name.bias`.
    pub fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let weight = self.get(&format!("param.{name}.weight"));
        let bias = format!("param.{name}.bias");
        let mut y: Vec<f64> = weight.chunks_exact(x.len()).map(|row| dot(row, x)).collect();
        if self.has(&bias) {
            y.iter_mut().zip(self.get(&bias)).for_each(|(y, b)| *y += b);
        }
        y
    }

    /// LayerNorm of one row with the parameters `name.weight`, `name.bias`.
    pub fn layer_norm(&self, name: &str, x: &[f64], eps: f64) -> Vec<f64> {
        let (gamma, beta) = (self.get(&format!("param.{name}.weight")), self.get(&format!("param.{name}.bias")));
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
        x.iter().zip(gamma).zip(beta).map(|((x, g), b)| (x - mean) / (variance + eps).sqrt() * g + b).collect()
    }
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|e| e / sum).collect()
}

/// A random question; the seed decides everything.
pub fn question(op: &str, seed: u64) -> Question {
    let case = new_case(find(op).unwrap(), None, seed, BTreeMap::new()).unwrap_or_else(|e| panic!("{op} seed {seed}: {e}"));
    Question { config: case.config.clone(), case }
}

/// Asks karat again, with another configuration or other tensors: forward in float64.
pub fn answer(op: &str, config: &Config, tensors: &Tensors<f64>) -> Tensors<f64> {
    let mut run = Run::new(config, tensors, false, None);
    (find(op).unwrap().run_f64)(&mut run).unwrap_or_else(|e| panic!("{op} {}: {e}", config.to_json()));
    run.into_results()
}

/// A float tensor to ask with.
pub fn value(shape: &[usize], data: &[f64]) -> Value<f64> {
    Value::Float(Tensor::new(karat::tensor::Shape::try_new(shape).unwrap(), data).unwrap())
}

/// Fails unless the arrays agree, relative to the largest magnitude.
pub fn assert_close(what: &str, found: &[f64], expected: &[f64]) {
    assert_within(TOLERANCE, what, found, expected);
}

/// [`assert_close`] with a tolerance of one's own.
pub fn assert_within(tolerance: f64, what: &str, found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}: number of elements");
    let size = expected.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * size, "{what}, element {i}: {a} instead of {b}");
    }
}

/// Compares karat's outputs with those of `oracle` (name and values) on random questions: 256, or as many as `KARAT_SOAK_CASES` says.
pub fn against_oracle(op: &str, oracle: impl Fn(&Question) -> Vec<(&'static str, Vec<f64>)> + Sync) {
    for_seeds(op, |q, at| {
        for (name, expected) in oracle(q) {
            assert_close(&format!("{at}: {name}"), q.get(&format!("output.{name}")), &expected);
        }
    });
}

/// Calls `check` with random questions and a text that names the problem.
pub fn for_seeds(op: &str, check: impl Fn(&Question, &str)) {
    let count = std::env::var("KARAT_SOAK_CASES").map_or(256, |n| n.parse().expect("KARAT_SOAK_CASES is a number"));
    for seed in 0..count {
        let q = question(op, seed);
        check(&q, &format!("{op}@{seed} {}", q.config.to_json()));
    }
}
