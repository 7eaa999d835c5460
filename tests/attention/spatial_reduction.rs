//! `attention.spatial_reduction` and `attention.gsa`.

use karat::case::{Config, Tensors, Value};
use karat::tensor::IntTensor;

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds, softmax, value};

const DENSE: &str = "attention.spatial_reduction";
const VISIBLE: &str = "attention.gsa";

/// Attention of `tokens` to what `keys` makes of them.
fn attend(q: &Question, tokens: &[&[f64]], keys: &[Vec<f64>]) -> Vec<f64> {
    let (c, h) = (q.usize("dim"), q.usize("num_heads"));
    let d = c / h;
    let kv: Vec<Vec<f64>> = keys.iter().map(|z| q.linear("kv", z)).collect();
    let of = |token: &&[f64]| {
        let (query, mut out) = (q.linear("q", token), vec![0.0; c]);
        for head in (0..c).step_by(d) {
            let scores: Vec<f64> = kv.iter().map(|kv| dot(&query[head..head + d], &kv[head..head + d]) / (d as f64).sqrt()).collect();
            for (p, kv) in softmax(&scores).into_iter().zip(&kv) {
                out[head..head + d].iter_mut().zip(&kv[c + head..c + head + d]).for_each(|(o, v)| *o += p * v);
            }
        }
        q.linear("proj", &out)
    };
    tokens.iter().flat_map(of).collect()
}

/// A cell's rows (none: zeros) in the order of a convolution weight.
fn unfolded(cell: &[Option<&[f64]>], c: usize) -> Vec<f64> {
    (0..c).flat_map(|channel| cell.iter().map(move |token| token.map_or(0.0, |t| t[channel]))).collect()
}

fn dense(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (c, r, height, width) = (q.usize("dim"), q.usize("sr_ratio"), q.usize("height"), q.usize("width"));
    let pool = q.config.str("mode").unwrap() == "avgpool";
    let mut y = Vec::new();
    for image in q.get("input.x").chunks_exact(height * width * c) {
        let tokens: Vec<&[f64]> = image.chunks_exact(c).collect();
        let cells = (0..height / r).flat_map(|cy| (0..width / r).map(move |cx| (cy, cx)));
        let keys: Vec<Vec<f64>> = cells
            .map(|(cy, cx)| {
                let cell: Vec<&[f64]> = (0..r * r).map(|k| tokens[(cy * r + k / r) * width + cx * r + k % r]).collect();
                if pool {
                    let mean: Vec<f64> = (0..c).map(|j| cell.iter().map(|t| t[j]).sum::<f64>() / (r * r) as f64).collect();
                    q.layer_norm("norm", &q.linear("sr", &mean), 1e-5)
                } else if r > 1 {
                    let cell: Vec<Option<&[f64]>> = cell.into_iter().map(Some).collect();
                    q.layer_norm("norm", &q.linear("sr", &unfolded(&cell, c)), 1e-5)
                } else {
                    cell[0].to_vec()
                }
            })
            .collect();
        y.extend(attend(q, &tokens, &keys));
    }
    vec![("y", y)]
}

fn visible(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (c, r) = (q.usize("dim"), q.usize("sr_ratio"));
    let coords: Vec<[usize; 2]> = q.ints("input.coords").chunks(2).map(|at| [at[0] as usize, at[1] as usize]).collect();
    let mut y = Vec::new();
    for image in q.get("input.x").chunks_exact((coords.len() * c).max(1)) {
        let tokens: Vec<&[f64]> = image.chunks_exact(c).collect();
        let at = |y: usize, x: usize| coords.iter().position(|c| *c == [y, x]).map(|i| tokens[i]);
        let mut keys = Vec::new();
        for (cy, cx) in (0..q.usize("height") / r).flat_map(|cy| (0..q.usize("width") / r).map(move |cx| (cy, cx))) {
            let cell: Vec<Option<&[f64]>> = (0..r * r).map(|k| at(cy * r + k / r, cx * r + k % r)).collect();
            if cell.iter().all(Option::is_none) {
                continue;
            }
            keys.push(if r > 1 { q.layer_norm("norm", &q.linear("sr", &unfolded(&cell, c)), 1e-6) } else { cell[0].unwrap().to_vec() });
        }
        y.extend(attend(q, &tokens, &keys));
    }
    vec![("y", y)]
}

#[test]
fn agrees_with_plain_loops() {
    against_oracle(DENSE, dense);
}

#[test]
fn gsa_agrees_with_plain_loops() {
    against_oracle(VISIBLE, visible);
}

fn y(op: &str, config: &Config, tensors: &Tensors<f64>) -> Vec<f64> {
    match &answer(op, config, tensors)["output.y"] {
        Value::Float(y) => y.data().to_vec(),
        Value::Int(_) => panic!("{op}: y holds integers"),
    }
}

/// With every token visible, Twins' attention is PVT's.
#[test]
fn gsa_of_a_whole_map_is_spatial_reduction() {
    for_seeds(DENSE, |q, at| {
        let (height, width) = (q.usize("height"), q.usize("width"));
        if q.config.str("mode").unwrap() == "avgpool" {
            return;
        }
        let (mut config, mut tensors) = (q.config.clone(), q.case.question());
        let places = (0..height * width).flat_map(|t| [(t / width) as i64, (t % width) as i64]).collect();
        tensors.insert("input.coords".into(), Value::Int(IntTensor::new([height * width, 2], places).unwrap()));
        config.set("norm_eps", 1e-5);
        assert_close(at, &y(VISIBLE, &config, &tensors), q.get("output.y"));
    });
}

/// Without reduction, PVT's attention is the plain one.
#[test]
fn without_reduction_it_is_softmax_attention() {
    for_seeds(DENSE, |q, at| {
        if q.config.str("mode").unwrap() == "avgpool" || q.usize("sr_ratio") > 1 {
            return;
        }
        let (mut config, mut tensors, c) = (q.config.clone(), q.case.question(), q.usize("dim"));
        for (part, dims) in [("weight", vec![3 * c, c]), ("bias", vec![3 * c])] {
            if q.has(&format!("param.q.{part}")) {
                let stacked = [q.get(&format!("param.q.{part}")), q.get(&format!("param.kv.{part}"))].concat();
                tensors.insert(format!("param.qkv.{part}"), value(&dims, &stacked));
            }
        }
        config.set("proj_bias", true).set("qk_norm", false);
        assert_close(at, &y("attention.softmax", &config, &tensors), q.get("output.y"));
    });
}

/// The order of the visible tokens is only that of the rows.
#[test]
fn permuting_visible_tokens_permutes_the_output() {
    for_seeds(VISIBLE, |q, at| {
        let (dims, c) = (q.dims("input.x"), q.usize("dim"));
        let reversed = |x: &[f64]| -> Vec<f64> {
            x.chunks_exact((dims[1] * c).max(1))
                .flat_map(|image| image.chunks_exact(c).rev().flatten().copied().collect::<Vec<_>>())
                .collect()
        };
        let mut tensors = q.case.question();
        let coords = q.ints("input.coords").chunks(2).rev().flatten().copied().collect();
        tensors.insert("input.coords".into(), Value::Int(IntTensor::new([dims[1], 2], coords).unwrap()));
        tensors.insert("input.x".into(), value(&dims, &reversed(q.get("input.x"))));
        assert_close(at, &y(VISIBLE, &q.config, &tensors), &reversed(q.get("output.y")));
    });
}
