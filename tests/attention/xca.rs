//! `attention.xca`.

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds, softmax, value};
use karat::case::Value;

const OP: &str = "attention.xca";

/// Channel by channel, with normalised copies of q and k.
fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (x, n, c, h) = (q.get("input.x"), q.dims("input.x")[1], q.usize("dim"), q.usize("num_heads"));
    let (d, tau) = (c / h, q.get("param.temperature"));
    let mut y = Vec::new();
    for image in x.chunks_exact(n * c) {
        let qkv: Vec<Vec<f64>> = image.chunks_exact(c).map(|token| q.linear("qkv", token)).collect();
        // One channel of q, k or v at all tokens.
        let channel = |part: usize, i: usize| -> Vec<f64> { qkv.iter().map(|token| token[part * c + i]).collect() };
        let unit = |x: Vec<f64>| {
            let norm = dot(&x, &x).sqrt().max(1e-12);
            x.into_iter().map(|x| x / norm).collect::<Vec<_>>()
        };
        let mut out = vec![vec![0.0; c]; n];
        for head in 0..h {
            let keys: Vec<Vec<f64>> = (0..d).map(|j| unit(channel(1, head * d + j))).collect();
            for i in 0..d {
                let query = unit(channel(0, head * d + i));
                let logits: Vec<f64> = keys.iter().map(|key| tau[head] * dot(&query, key)).collect();
                for (j, a) in softmax(&logits).into_iter().enumerate() {
                    out.iter_mut().zip(channel(2, head * d + j)).for_each(|(out, v)| out[head * d + i] += a * v);
                }
            }
        }
        out.iter().for_each(|token| y.extend(q.linear("proj", token)));
    }
    vec![("y", y)]
}

#[test]
fn agrees_with_plain_loops() {
    against_oracle(OP, oracle);
}

/// Asks again with `change` applied to one tensor.
fn changed(q: &Question, name: &str, change: impl Fn(&mut [f64])) -> Vec<f64> {
    let mut tensors = q.case.question();
    let mut data = q.get(name).to_vec();
    change(&mut data);
    tensors.insert(name.into(), value(&q.dims(name), &data));
    match &answer(OP, &q.config, &tensors)["output.y"] {
        Value::Float(y) => y.data().to_vec(),
        Value::Int(_) => panic!("y holds integers"),
    }
}

#[test]
fn permuting_the_tokens_permutes_the_output() {
    for_seeds(OP, |q, at| {
        let (n, c) = (q.dims("input.x")[1], q.usize("dim"));
        let reverse = |x: &mut [f64]| {
            for image in x.chunks_exact_mut(n * c) {
                let turned: Vec<f64> = image.chunks_exact(c).rev().flatten().copied().collect();
                image.copy_from_slice(&turned);
            }
        };
        let mut expected = q.get("output.y").to_vec();
        reverse(&mut expected);
        assert_close(at, &changed(q, "input.x", reverse), &expected);
    });
}

/// Queries and keys count by direction alone.
#[test]
fn scaling_the_queries_and_keys_changes_nothing() {
    for_seeds(OP, |q, at| {
        let c = q.usize("dim");
        if q.config.bool("qkv_bias").unwrap() {
            return;
        }
        let y = changed(q, "param.qkv.weight", |w| {
            w[..c * c].iter_mut().for_each(|w| *w *= 7.5);
            w[c * c..2 * c * c].iter_mut().for_each(|w| *w *= 0.03);
        });
        assert_close(at, &y, q.get("output.y"));
    });
}

/// A channel that is zero at all tokens has cosine 0 with every other: its row of A is uniform, and nothing is NaN.
#[test]
fn dead_channels_mix_evenly() {
    for_seeds(OP, |q, at| {
        let (c, h) = (q.usize("dim"), q.usize("num_heads"));
        if q.config.bool("qkv_bias").unwrap() {
            return;
        }
        let dead = changed(q, "param.qkv.weight", |w| w[..c * c].fill(0.0));
        let cold = changed(q, "param.temperature", |tau| tau.fill(0.0));
        assert_close(&format!("{at}, {h} heads"), &dead, &cold);
    });
}

/// Cosines do not see how often all tokens are repeated; enough of them take the way through their covariance.
#[test]
fn repeated_tokens_get_the_same_output() {
    for_seeds(OP, |q, at| {
        let (dims, c) = (q.dims("input.x"), q.usize("dim"));
        let times = 64usize.div_ceil(dims[1]).max(2);
        let repeat = |x: &[f64]| -> Vec<f64> { x.chunks_exact(dims[1] * c).flat_map(|image| image.repeat(times)).collect() };
        let mut tensors = q.case.question();
        tensors.insert("input.x".into(), value(&[dims[0], times * dims[1], c], &repeat(q.get("input.x"))));
        let Value::Float(y) = &answer(OP, &q.config, &tensors)["output.y"] else { panic!("y holds integers") };
        assert_close(at, y.data(), &repeat(q.get("output.y")));
    });
}

/// A large mean, and queries across the direction in which the tokens vary most: their norms would be lost in the covariance.
#[test]
fn cancelling_channels() {
    for_seeds(OP, |q, at| {
        let (dims, c) = (q.dims("input.x"), q.usize("dim"));
        if c < 2 || dims[1] < 64 {
            return;
        }
        let (mut x, mut w) = (q.get("input.x").to_vec(), q.get("param.qkv.weight").to_vec());
        for token in x.chunks_exact_mut(c) {
            let along = 1e4 * token[0];
            token.iter_mut().for_each(|x| *x += along + 300.0);
        }
        for row in w[..c * c].chunks_exact_mut(c) {
            let mean = row.iter().sum::<f64>() / c as f64;
            row.iter_mut().for_each(|w| *w -= mean);
        }
        let mut case = q.case.clone();
        case.tensors.insert("input.x".into(), value(&dims, &x));
        case.tensors.insert("param.qkv.weight".into(), value(&[3 * c, c], &w));
        let Value::Float(y) = &answer(OP, &q.config, &case.question())["output.y"] else { panic!("y holds integers") };
        let (_, expected) = oracle(&Question { config: q.config.clone(), case }).remove(0);
        let size = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        assert!(y.data().iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-8 * size), "{at}");
    });
}
