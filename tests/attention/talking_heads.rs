//! `attention.talking_heads`.

use karat::case::Value;

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds, softmax, value};

const OP: &str = "attention.talking_heads";

/// All N×N scores of all heads, mixed one pair of query and key at a time.
fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (x, n, c, h) = (q.get("input.x"), q.dims("input.x")[1], q.usize("dim"), q.usize("num_heads"));
    let d = c / h;
    let mut y = Vec::new();
    for image in x.chunks_exact(n * c) {
        let qkv: Vec<Vec<f64>> = image.chunks_exact(c).map(|token| q.linear("qkv", token)).collect();
        let part = |token: usize, part: usize, head: usize| &qkv[token][part * c + head * d..part * c + (head + 1) * d];
        for i in 0..n {
            let logits: Vec<Vec<f64>> = (0..n)
                .map(|j| {
                    let scores: Vec<f64> = (0..h).map(|a| dot(part(i, 0, a), part(j, 1, a)) / (d as f64).sqrt()).collect();
                    q.linear("proj_l", &scores)
                })
                .collect();
            let attention: Vec<Vec<f64>> = (0..h).map(|a| softmax(&logits.iter().map(|l| l[a]).collect::<Vec<_>>())).collect();
            let mut out = vec![0.0; c];
            for j in 0..n {
                let mixed = q.linear("proj_w", &attention.iter().map(|row| row[j]).collect::<Vec<_>>());
                for (k, out) in out.iter_mut().enumerate() {
                    *out += mixed[k / d] * part(j, 2, k / d)[k % d];
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

/// With identities for both mixes and no biases, this is plain attention.
#[test]
fn heads_that_do_not_talk_are_softmax_attention() {
    for_seeds(OP, |q, at| {
        let h = q.usize("num_heads");
        let mut tensors = q.case.question();
        let identity: Vec<f64> = (0..h * h).map(|i| if i / h == i % h { 1.0 } else { 0.0 }).collect();
        for name in ["proj_l", "proj_w"] {
            tensors.insert(format!("param.{name}.weight"), value(&[h, h], &identity));
            tensors.insert(format!("param.{name}.bias"), value(&[h], &vec![0.0; h]));
        }
        let talking = answer(OP, &q.config, &tensors);
        let mut config = q.config.clone();
        config.set("proj_bias", true).set("qk_norm", false);
        let silent = answer("attention.softmax", &config, &tensors);
        let [Value::Float(a), Value::Float(b)] = [&talking["output.y"], &silent["output.y"]] else { panic!("{at}: y holds integers") };
        assert_close(at, a.data(), b.data());
    });
}

/// The bias before the softmax has no effect, the one after it adds its share of the column sum of v.
#[test]
fn a_bias_before_the_softmax_has_no_effect() {
    for_seeds(OP, |q, at| {
        let mut tensors = q.case.question();
        let h = q.usize("num_heads");
        tensors.insert("param.proj_l.bias".into(), value(&[h], &(0..h).map(|i| i as f64 - 3.0).collect::<Vec<_>>()));
        let Value::Float(y) = &answer(OP, &q.config, &tensors)["output.y"] else { panic!("{at}: y holds integers") };
        assert_close(at, y.data(), q.get("output.y"));
    });
}
