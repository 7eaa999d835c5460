//! `attention.token_transformer`.

use crate::common::{Question, against_oracle, dot, softmax};
use crate::performer::reversing_the_tokens_reverses_the_output;

const OP: &str = "attention.token_transformer";

/// One query after the other.
fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (x, n, dim, e) = (q.get("input.x"), q.dims("input.x")[1], q.usize("dim"), q.usize("in_dim"));
    let scale = q.config.f64("qk_scale").unwrap_or(1.0 / (dim as f64).sqrt());
    let mut out = Vec::new();
    for image in x.chunks_exact(n * dim) {
        let qkv: Vec<Vec<f64>> = image.chunks_exact(dim).map(|token| q.linear("qkv", token)).collect();
        for i in 0..n {
            let scores: Vec<f64> = (0..n).map(|j| scale * dot(&qkv[i][..e], &qkv[j][e..2 * e])).collect();
            let p = softmax(&scores);
            let mixed: Vec<f64> = (0..e).map(|c| (0..n).map(|j| p[j] * qkv[j][2 * e + c]).sum()).collect();
            out.extend(q.linear("proj", &mixed).iter().zip(&qkv[i][2 * e..]).map(|(y, v)| y + v));
        }
    }
    vec![("y", out)]
}

#[test]
fn agrees_with_plain_loops() {
    against_oracle(OP, oracle);
}

#[test]
fn permuting_the_tokens_permutes_the_output() {
    reversing_the_tokens_reverses_the_output(OP);
}
