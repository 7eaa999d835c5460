//! `attention.pb_relax`.

use std::collections::BTreeMap;

use karat::case::{Config, Dtype, Run, Tensors, Value, find, new_case, verify_case};
use serde_json::json;

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds, softmax, value};

const OP: &str = "attention.pb_relax";

/// Memory and then `x` of one image, row by row.
pub fn joined(q: &Question, image: usize) -> Vec<Vec<f64>> {
    let dims = q.dims("input.x");
    let (n, c) = (dims[1], dims[2]);
    let rows =
        |name: &str, rows: usize| q.get(name)[image * rows * c..(image + 1) * rows * c].chunks_exact(c).map(<[f64]>::to_vec).collect();
    let mut z: Vec<Vec<f64>> = if q.has("input.mem") { rows("input.mem", q.dims("input.mem")[1]) } else { Vec::new() };
    z.extend::<Vec<Vec<f64>>>(rows("input.x", n));
    z
}

/// One query after the other: `weigh(image, query, score of a key)` gives the weights of all keys.
pub fn attend(q: &Question, weigh: impl Fn(usize, usize, &dyn Fn(usize) -> f64) -> Vec<(usize, f64)>) -> Vec<f64> {
    let (dims, h) = (q.dims("input.x"), q.usize("num_heads"));
    let (batch, n, c) = (dims[0], dims[1], dims[2]);
    let d = c / h;
    let mut y = Vec::new();
    for image in 0..batch {
        let qkv: Vec<Vec<f64>> = joined(q, image).iter().map(|token| q.linear("query_key_value", token)).collect();
        let memory = qkv.len() - n;
        let part = |token: usize, part: usize, head: usize| &qkv[token][part * c + head * d..part * c + (head + 1) * d];
        for i in 0..n {
            let mut out = vec![0.0; c];
            for head in 0..h {
                let score = |j: usize| dot(part(memory + i, 0, head), part(j, 1, head)) / (d as f64).sqrt();
                for (j, p) in weigh(image, i, &score) {
                    out[head * d..(head + 1) * d].iter_mut().zip(part(j, 2, head)).for_each(|(o, v)| *o += p * v);
                }
            }
            y.extend(q.linear("dense", &out));
        }
    }
    y
}

fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let n = q.dims("input.x")[1];
    let memory = if q.has("input.mem") { q.dims("input.mem")[1] } else { 0 };
    let keys = memory + n;
    let visible = |image: usize, i: usize, j: usize| match q.config.str("mask").unwrap() {
        "causal" => j <= memory + i,
        "prefix" => j <= memory + i || j < memory + q.usize("sep"),
        _ => q.ints("input.mask")[(image * n + i) * keys + j] == 1,
    };
    let y = attend(q, |image, i, score| {
        let scores: Vec<f64> = (0..keys).map(|j| if visible(image, i, j) { score(j) } else { -10_000.0 }).collect();
        softmax(&scores).into_iter().enumerate().collect()
    });
    vec![("y", y)]
}

#[test]
fn agrees_with_plain_loops() {
    against_oracle(OP, oracle);
}

/// More tokens than one block of queries, one block of keys and one run of scores hold.
#[test]
fn agrees_with_plain_loops_over_many_blocks() {
    for (mask, memory, n) in [("causal", 0, 700), ("prefix", 70, 130), ("explicit", 3, 600)] {
        let mut config = Config::default();
        config.set("dim", 6).set("num_heads", 2).set("alpha", 32.0).set("mask", mask).set("sep", 100);
        let sizes = BTreeMap::from([("batch".into(), 1), ("tokens".into(), n), ("memory".into(), memory)]);
        let case = new_case(find(OP).unwrap(), Some(config.clone()), 1, sizes).unwrap();
        assert!(verify_case(&case, Dtype::F32).findings.iter().all(|f| f.passed), "{mask} in f32");
        let q = Question { config, case };
        assert_close(mask, q.get("output.y"), &oracle(&q)[0].1);
    }
}

/// Rows whose visible scores all lie below −10000 attend to what they must not see, as the release's finite mask has it.
#[test]
fn scores_below_the_mask_lose_to_it() {
    let mut deep = 0;
    for_seeds(OP, |q, at| {
        let x: Vec<f64> = q.get("input.x").iter().map(|x| x * 300.0).collect();
        let mut case = q.case.clone();
        case.tensors.insert("input.x".into(), value(&q.dims("input.x"), &x));
        let large = Question { config: q.config.clone(), case };
        let Value::Float(y) = &answer(OP, &q.config, &large.case.question())["output.y"] else { panic!("{at}: y holds integers") };
        assert_close(at, y.data(), &oracle(&large)[0].1);
    });
    // A first token sees itself alone: a negative score makes it look ahead.
    for seed in 0..40 {
        let mut config = Config::default();
        config.set("dim", 3).set("num_heads", 1).set("alpha", 32.0).set("mask", "causal");
        let sizes = BTreeMap::from([("batch".into(), 1), ("tokens".into(), 5), ("memory".into(), 0)]);
        let case = new_case(find(OP).unwrap(), Some(config.clone()), seed, sizes).unwrap();
        let mut question = case.question();
        let Value::Float(x) = &case.tensors["input.x"] else { panic!() };
        let scaled: Vec<f64> = x.data().iter().map(|x| x * 1e4).collect();
        question.insert("input.x".into(), value(&[1, 5, 3], &scaled));
        let Value::Float(before) = answer(OP, &config, &question)["output.y"].clone() else { panic!() };
        let ahead: Vec<f64> = scaled.iter().enumerate().map(|(i, x)| if i < 12 { *x } else { x + 1e3 }).collect();
        question.insert("input.x".into(), value(&[1, 5, 3], &ahead));
        let Value::Float(after) = answer(OP, &config, &question)["output.y"].clone() else { panic!() };
        deep += usize::from(before.data()[..3] != after.data()[..3]);
    }
    assert!(deep > 5, "no row looked ahead: the finite mask went untested");
}

#[test]
fn alpha_means_nothing_in_exact_arithmetic() {
    for_seeds(OP, |q, at| {
        for alpha in [1.0, 7.0, 500.0] {
            let mut config = q.config.clone();
            config.set("alpha", alpha);
            let results = answer(OP, &config, &q.case.question());
            let Value::Float(y) = &results["output.y"] else { panic!("{at}: y holds integers") };
            assert_close(at, y.data(), q.get("output.y"));
        }
    });
}

#[test]
fn the_future_changes_nothing() {
    for_seeds(OP, |q, at| {
        if q.config.str("mask").unwrap() != "causal" {
            return;
        }
        let dims = q.dims("input.x");
        let (n, c) = (dims[1], dims[2]);
        let x: Vec<f64> = q.get("input.x").iter().enumerate().map(|(i, x)| if i / c % n < n - 1 { *x } else { x + 1.0 }).collect();
        let mut tensors = q.case.question();
        tensors.insert("input.x".into(), value(&dims, &x));
        let Value::Float(y) = &answer(OP, &q.config, &tensors)["output.y"] else { panic!("{at}: y holds integers") };
        for (y, before) in y.data().chunks_exact(n * c).zip(q.get("output.y").chunks_exact(n * c)) {
            assert_eq!(y[..(n - 1) * c], before[..(n - 1) * c], "{at}");
        }
    });
}

/// Scores of some 5e39, beyond f32: the order of PB-relax still gives the one-hot answer and finite gradients.
#[test]
fn scores_beyond_the_range_of_f32() {
    let config = Config::parse(&json!({"dim": 4, "num_heads": 1, "alpha": 32.0, "mask": "causal"}).to_string()).unwrap();
    let (n, c) = (5, 4);
    // q = k = 1e20 x, v = x: the score of a token with itself is the largest, as all rows have the same length.
    let row = |i: usize| [(0.8 * i as f64).cos(), (0.8 * i as f64).sin(), 0.1, 0.2];
    let x: Vec<f64> = (0..n).flat_map(row).collect();
    let weight: Vec<f64> = (0..3 * c * c).map(|i| if (i / c) % c == i % c { [1e20, 1e20, 1.0][i / (c * c)] } else { 0.0 }).collect();
    let eye: Vec<f64> = (0..c * c).map(|i| f64::from(u8::from(i / c == i % c))).collect();
    let mut given = Tensors::new();
    for (name, shape, data) in [
        ("input.x", vec![1, n, c], x.clone()),
        ("cotangent.y", vec![1, n, c], x.iter().map(|x| 1.0 - x).collect()),
        ("param.query_key_value.weight", vec![3 * c, c], weight),
        ("param.query_key_value.bias", vec![3 * c], vec![0.0; 3 * c]),
        ("param.dense.weight", vec![c, c], eye),
        ("param.dense.bias", vec![c], vec![0.0; c]),
    ] {
        given.insert(name.into(), value(&shape, &data));
    }
    let single: Tensors<f32> = given
        .iter()
        .map(|(name, v)| match v {
            Value::Float(t) => (name.clone(), Value::Float(t.cast())),
            Value::Int(t) => (name.clone(), Value::Int(t.clone())),
        })
        .collect();
    let mut run = Run::new(&config, &single, true, None);
    (find(OP).unwrap().run_f32)(&mut run).unwrap();
    let mut double = Run::new(&config, &given, true, None);
    (find(OP).unwrap().run_f64)(&mut double).unwrap();
    let (results, expected) = (run.into_results(), double.into_results());
    for (name, got) in &results {
        let (Value::Float(got), Value::Float(want)) = (got, &expected[name]) else { panic!("{name} holds integers") };
        let size = want.data().iter().fold(1e-30f64, |m, x| m.max(x.abs()));
        for (a, b) in got.data().iter().zip(want.data()) {
            assert!((f64::from(*a) - b).abs() <= 1e-4 * size, "{name}: {a} instead of {b}");
        }
    }
    let Value::Float(y) = &results["output.y"] else { panic!() };
    assert!(y.data().iter().zip(&x).all(|(y, x)| (f64::from(*y) - x).abs() < 1e-6), "one-hot: every token is its own value");
}
