//! `attention.softmax`.

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds, softmax, value};

const OP: &str = "attention.softmax";

/// One query after the other.
fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (x, n, c, h) = (q.get("input.x"), q.dims("input.x")[1], q.usize("dim"), q.usize("num_heads"));
    let d = c / h;
    let mut y = Vec::new();
    for image in x.chunks_exact(n * c) {
        let qkv: Vec<Vec<f64>> = image.chunks_exact(c).map(|token| q.linear("qkv", token)).collect();
        let part = |token: usize, part: usize, head: usize| {
            let row = &qkv[token][part * c + head * d..part * c + (head + 1) * d];
            match (part, q.config.bool("qk_norm").unwrap()) {
                (0, true) => q.layer_norm("q_norm", row, 1e-6),
                (1, true) => q.layer_norm("k_norm", row, 1e-6),
                _ => row.to_vec(),
            }
        };
        for i in 0..n {
            let mut out = vec![0.0; c];
            for head in 0..h {
                let scores: Vec<f64> = (0..n).map(|j| dot(&part(i, 0, head), &part(j, 1, head)) / (d as f64).sqrt()).collect();
                for (j, p) in softmax(&scores).into_iter().enumerate() {
                    out[head * d..(head + 1) * d].iter_mut().zip(part(j, 2, head)).for_each(|(o, v)| *o += p * v);
                }
            }
            y.extend(q.linear("proj", &out));
        }
    }
    vec![("y", y)]
}

#[test]
fn agrees_with_plain_loops() {
    against_oracle(OP, oracle);
}

#[test]
fn permuting_the_tokens_permutes_the_output() {
    for_seeds(OP, |q, at| {
        let dims = q.dims("input.x");
        let (n, c) = (dims[1], dims[2]);
        let reversed = |x: &[f64]| -> Vec<f64> {
            x.chunks_exact(n * c).flat_map(|image| image.chunks_exact(c).rev().flatten().copied().collect::<Vec<_>>()).collect()
        };
        let mut tensors = q.case.question();
        tensors.insert("input.x".into(), value(&dims, &reversed(q.get("input.x"))));
        let results = answer(OP, &q.config, &tensors);
        let karat::case::Value::Float(y) = &results["output.y"] else { panic!("{at}: y holds integers") };
        assert_close(at, y.data(), &reversed(q.get("output.y")));
    });
}
