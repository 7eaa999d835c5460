//! `attention.xnorm`.

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds, value};
use karat::case::Value;

const OP: &str = "attention.xnorm";

/// `γ a / max(‖a‖, ε)`.
fn xn(a: &[f64], gamma: f64, eps: f64) -> Vec<f64> {
    let norm = dot(a, a).sqrt().max(eps);
    a.iter().map(|a| gamma * a / norm).collect()
}

/// One head's γ for q and for `KᵀV`.
fn gammas(q: &Question, head: usize) -> [f64; 2] {
    let names = if q.config.bool("shared_gamma").unwrap() { ["gamma"; 2] } else { ["gamma_q", "gamma_kv"] };
    names.map(|name| q.get(&format!("param.{name}"))[head])
}

/// What a query gets from all keys and values, all of them of one head.
pub fn mix(q: &Question, head: usize, query: &[f64], keys: &[&[f64]], values: &[&[f64]]) -> Vec<f64> {
    let (d, eps, [gamma_q, gamma_kv]) = (query.len(), q.config.f64("eps").unwrap(), gammas(q, head));
    let z = |i: usize, j: usize| -> f64 { keys.iter().zip(values).map(|(k, v)| k[i] * v[j]).sum() };
    let query = xn(query, gamma_q, eps);
    (0..d)
        .map(|j| {
            let column: Vec<f64> = match q.config.str("kv_norm_axis").unwrap() {
                "key" => xn(&(0..d).map(|i| z(i, j)).collect::<Vec<_>>(), gamma_kv, eps),
                _ => (0..d).map(|i| xn(&(0..d).map(|j| z(i, j)).collect::<Vec<_>>(), gamma_kv, eps)[j]).collect(),
            };
            dot(&query, &column)
        })
        .collect()
}

fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (x, n, c) = (q.get("input.x"), q.dims("input.x")[1], q.usize("dim"));
    let (e, h) = (q.usize("attn_dim"), q.usize("num_heads"));
    let d = e / h;
    let mut y = Vec::new();
    for image in x.chunks_exact(n * c) {
        let qkv: Vec<Vec<f64>> = image.chunks_exact(c).map(|token| q.linear("qkv", token)).collect();
        for token in &qkv {
            let out: Vec<f64> = (0..h)
                .flat_map(|head| {
                    let of =
                        |part: usize| -> Vec<&[f64]> { qkv.iter().map(|t| &t[part * e + head * d..part * e + (head + 1) * d]).collect() };
                    mix(q, head, &token[head * d..(head + 1) * d], &of(1), &of(2))
                })
                .collect();
            y.extend(q.linear("proj", &out));
        }
    }
    vec![("y", y)]
}

#[test]
fn agrees_with_plain_loops() {
    against_oracle(OP, oracle);
}

fn ask(q: &Question, change: impl Fn(&str, &[usize], &mut Vec<f64>) -> Vec<usize>) -> Vec<f64> {
    let mut tensors = q.case.question();
    for name in ["input.x", "param.qkv.weight"] {
        let mut data = q.get(name).to_vec();
        let dims = change(name, &q.dims(name), &mut data);
        tensors.insert(name.into(), value(&dims, &data));
    }
    match &answer(OP, &q.config, &tensors)["output.y"] {
        Value::Float(y) => y.data().to_vec(),
        Value::Int(_) => panic!("y holds integers"),
    }
}

/// Where no norm can fall below ε, and nothing but the weight makes q, k and v.
fn scale_free(q: &Question) -> bool {
    q.config.f64("eps").unwrap() < 1e-3 && !q.config.bool("qkv_bias").unwrap()
}

#[test]
fn scaling_all_keys_and_queries_or_one_value_channel_changes_nothing() {
    for_seeds(OP, |q, at| {
        if !scale_free(q) || q.config.str("kv_norm_axis").unwrap() != "key" {
            return;
        }
        let (c, e) = (q.usize("dim"), q.usize("attn_dim"));
        let y = ask(q, |name, dims, data| {
            if name == "param.qkv.weight" {
                data[..e * c].iter_mut().for_each(|w| *w *= 3.0);
                data[e * c..2 * e * c].iter_mut().for_each(|w| *w *= 0.02);
                data[2 * e * c..(2 * e + 1) * c].iter_mut().for_each(|w| *w *= 11.0);
            }
            dims.to_vec()
        });
        assert_close(at, &y, q.get("output.y"));
    });
}

#[test]
fn duplicated_and_reversed_tokens() {
    for_seeds(OP, |q, at| {
        let (n, c) = (q.dims("input.x")[1], q.usize("dim"));
        let each = |x: &[f64], f: &dyn Fn(&[f64]) -> Vec<f64>| x.chunks_exact(n * c).flat_map(f).collect::<Vec<f64>>();
        let reverse = |image: &[f64]| image.chunks_exact(c).rev().flatten().copied().collect::<Vec<_>>();
        let y = ask(q, |name, dims, data| {
            if name == "input.x" {
                *data = each(data, &reverse);
            }
            dims.to_vec()
        });
        assert_close(at, &y, &each(q.get("output.y"), &reverse));
        if q.config.f64("eps").unwrap() > 1e-3 {
            return;
        }
        let twice = |image: &[f64]| [image, image].concat();
        let y = ask(q, |name, dims, data| {
            if name != "input.x" {
                return dims.to_vec();
            }
            *data = each(data, &twice);
            vec![dims[0], 2 * dims[1], dims[2]]
        });
        assert_close(at, &y, &each(q.get("output.y"), &twice));
    });
}
