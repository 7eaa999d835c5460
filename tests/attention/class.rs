//! `attention.class`.

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds, softmax, value};
use karat::case::Value;

const OP: &str = "attention.class";

/// With K and V in full, as the papers write it.
fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (x, n, c, h) = (q.get("input.x"), q.dims("input.x")[1], q.usize("dim"), q.usize("num_heads"));
    let (d, all_rows) = (c / h, q.config.str("variant").unwrap() == "xcit");
    let project = |token: &[f64], part: usize| {
        if all_rows { q.linear("qkv", token)[part * c..(part + 1) * c].to_vec() } else { q.linear(["q", "k", "v"][part], token) }
    };
    let mut y = Vec::new();
    for image in x.chunks_exact(n * c) {
        let query = project(&image[..c], 0);
        let [keys, values] = [1, 2].map(|part| image.chunks_exact(c).map(|token| project(token, part)).collect::<Vec<_>>());
        let mut out = vec![0.0; c];
        for head in 0..h {
            let at = head * d..(head + 1) * d;
            let scores: Vec<f64> = keys.iter().map(|k| dot(&query[at.clone()], &k[at.clone()]) / (d as f64).sqrt()).collect();
            for (a, v) in softmax(&scores).into_iter().zip(&values) {
                out[at.clone()].iter_mut().zip(&v[at.clone()]).for_each(|(o, v)| *o += a * v);
            }
        }
        y.extend(q.linear("proj", &out));
        if all_rows {
            y.extend(&image[c..]);
        }
    }
    vec![("y", y)]
}

#[test]
fn agrees_with_plain_loops() {
    against_oracle(OP, oracle);
}

#[test]
fn the_order_of_the_patches_does_not_matter() {
    for_seeds(OP, |q, at| {
        let dims = q.dims("input.x");
        let (n, c) = (dims[1], dims[2]);
        let reversed = q.get("input.x").chunks_exact(n * c).flat_map(|image| {
            let (first, rest) = image.split_at(c);
            [first, &rest.chunks_exact(c).rev().flatten().copied().collect::<Vec<_>>()].concat()
        });
        let mut tensors = q.case.question();
        tensors.insert("input.x".into(), value(&dims, &reversed.collect::<Vec<_>>()));
        let results = answer(OP, &q.config, &tensors);
        let Value::Float(y) = &results["output.y"] else { panic!("{at}: y holds integers") };
        let rows = q.dims("output.y")[1];
        for (found, expected) in y.data().chunks_exact(rows * c).zip(q.get("output.y").chunks_exact(rows * c)) {
            assert_close(at, &found[..c], &expected[..c]);
        }
    });
}
