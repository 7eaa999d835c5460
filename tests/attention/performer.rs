//! `attention.performer`, against its quadratic form.

use karat::tensor::random::{Purpose, Rng};

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds, value};

const OP: &str = "attention.performer";

/// `e^{w_i·x − |x|²/2} / √m`.
fn features(q: &Question, x: &[f64]) -> Vec<f64> {
    let w = q.get("buffer.w");
    let m = w.len() / x.len();
    w.chunks_exact(x.len()).map(|w| (dot(w, x) - dot(x, x) / 2.0).exp() / (m as f64).sqrt()).collect()
}

/// The dropout factors of `count` elements: 0 or 1/(1 − rate), drawn in runs of 4096.
fn mask(q: &Question, count: usize) -> Vec<f64> {
    if !q.config.bool("training").unwrap() {
        return vec![1.0; count];
    }
    let (rate, seed) = (q.config.f64("dropout").unwrap(), q.usize("seed") as u64);
    let run = |i: usize| {
        let mut rng = Rng::new(seed, Purpose::DropPath, 0, i as u64);
        (0..4096).map(move |_| if rng.uniform() < rate { 0.0 } else { 1.0 / (1.0 - rate) })
    };
    (0..count.div_ceil(4096)).flat_map(run).take(count).collect()
}

/// Every pair of tokens: weight `φ(q_i)·φ(k_j)`, over the sum of the weights plus ε.
pub fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (x, dims, e, eps) = (q.get("input.x"), q.dims("input.x"), q.usize("in_dim"), q.config.f64("epsilon").unwrap());
    let (n, dim) = (dims[1], dims[2]);
    let mask = mask(q, dims[0] * n * e);
    let mut out = Vec::new();
    for image in x.chunks_exact(n * dim) {
        let kqv: Vec<Vec<f64>> = image.chunks_exact(dim).map(|token| q.linear("kqv", token)).collect();
        let keys: Vec<Vec<f64>> = kqv.iter().map(|row| features(q, &row[..e])).collect();
        for i in 0..n {
            let phi = features(q, &kqv[i][e..2 * e]);
            let weights: Vec<f64> = keys.iter().map(|key| dot(&phi, key)).collect();
            let total: f64 = weights.iter().sum();
            let mixed: Vec<f64> = (0..e).map(|c| (0..n).map(|j| weights[j] * kqv[j][2 * e + c]).sum::<f64>() / (total + eps)).collect();
            for (y, v) in q.linear("proj", &mixed).iter().zip(&kqv[i][2 * e..]) {
                out.push(v + y * mask[out.len()]);
            }
        }
    }
    vec![("y", out)]
}

#[test]
fn agrees_with_the_quadratic_form() {
    against_oracle(OP, oracle);
}

/// Reversing the tokens of every image reverses those of the output.
pub fn reversing_the_tokens_reverses_the_output(op: &str) {
    for_seeds(op, |q, at| {
        if q.config.bool("training").unwrap_or(false) {
            return;
        }
        let reversed = |x: &[f64], n: usize, c: usize| -> Vec<f64> {
            x.chunks_exact(n * c).flat_map(|image| image.chunks_exact(c).rev().flatten().copied().collect::<Vec<_>>()).collect()
        };
        let (dims, n) = (q.dims("input.x"), q.dims("input.x")[1]);
        let mut tensors = q.case.question();
        tensors.insert("input.x".into(), value(&dims, &reversed(q.get("input.x"), n, dims[2])));
        let results = answer(op, &q.config, &tensors);
        let karat::case::Value::Float(y) = &results["output.y"] else { panic!("{at}: y holds integers") };
        assert_close(at, y.data(), &reversed(q.get("output.y"), n, y.shape()[2]));
    });
}

#[test]
fn permuting_the_tokens_permutes_the_output() {
    reversing_the_tokens_reverses_the_output(OP);
}

/// Far from the origin all features vanish: nothing is mixed, `y = v + b_proj`, and nothing is NaN.
#[test]
fn features_that_underflow_leave_the_skip() {
    for_seeds(OP, |q, at| {
        let (e, dims, dim) = (q.usize("in_dim"), q.dims("input.x"), q.usize("dim"));
        let mut tensors = q.case.question();
        let mut bias = q.get("param.kqv.bias").to_vec();
        bias[..2 * e].fill(1e3);
        tensors.insert("param.kqv.bias".into(), value(&[3 * e], &bias));
        let results = answer(OP, &q.config, &tensors);
        let karat::case::Value::Float(y) = &results["output.y"] else { panic!("{at}: y holds integers") };
        let mask = mask(q, dims[0] * dims[1] * e);
        let expected: Vec<f64> = (q.get("input.x").chunks_exact(dim))
            .flat_map(|token| q.linear("kqv", token)[2 * e..].to_vec())
            .zip(q.get("param.proj.bias").iter().cycle())
            .zip(mask)
            .map(|((v, b), mask)| v + b * mask)
            .collect();
        assert_close(at, y.data(), &expected);
    });
}
