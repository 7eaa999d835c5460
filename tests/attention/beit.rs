//! `attention.beit`.

use karat::case::Value;

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds, softmax, value};

const OP: &str = "attention.beit";

/// The row of the table for a pair of tokens, class token first.
fn row(query: usize, key: usize, (h, w): (usize, usize)) -> usize {
    let rows = (2 * h - 1) * (2 * w - 1) + 3;
    match (query, key) {
        (0, 0) => rows - 1,
        (0, _) => rows - 3,
        (_, 0) => rows - 2,
        (i, j) => {
            let ((yi, xi), (yj, xj)) = (((i - 1) / w, (i - 1) % w), ((j - 1) / w, (j - 1) % w));
            (yi + h - 1 - yj) * (2 * w - 1) + (xi + w - 1 - xj)
        }
    }
}

/// One query after the other.
fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (x, n, c, h) = (q.get("input.x"), q.dims("input.x")[1], q.usize("dim"), q.usize("num_heads"));
    let d = q.config.usize_or("head_dim", c / h).unwrap();
    let scale = match q.config.f64_or("qk_scale", 0.0).unwrap() {
        0.0 => 1.0 / (d as f64).sqrt(),
        scale => scale,
    };
    let table = q.config.bool("rel_pos_bias").unwrap().then(|| q.get("param.relative_position_bias_table"));
    let mut y = Vec::new();
    for image in x.chunks_exact(n * c) {
        let qkv: Vec<Vec<f64>> = (image.chunks_exact(c))
            .map(|token| {
                let mut row = q.linear("qkv", token);
                if q.has("param.q_bias") {
                    row[..h * d].iter_mut().zip(q.get("param.q_bias")).for_each(|(x, b)| *x += b);
                    row[2 * h * d..].iter_mut().zip(q.get("param.v_bias")).for_each(|(x, b)| *x += b);
                }
                row
            })
            .collect();
        let part = |token: usize, part: usize, head: usize| &qkv[token][(part * h + head) * d..(part * h + head + 1) * d];
        for i in 0..n {
            let mut out = vec![0.0; h * d];
            for a in 0..h {
                let logit = |j: usize| {
                    let own = table.map_or(0.0, |table| table[row(i, j, (q.usize("window_h"), q.usize("window_w"))) * h + a]);
                    let outer = if q.has("input.rel_pos_bias") { q.get("input.rel_pos_bias")[(a * n + i) * n + j] } else { 0.0 };
                    scale * dot(part(i, 0, a), part(j, 1, a)) + own + outer
                };
                for (j, p) in softmax(&(0..n).map(logit).collect::<Vec<_>>()).into_iter().enumerate() {
                    out[a * d..(a + 1) * d].iter_mut().zip(part(j, 2, a)).for_each(|(o, v)| *o += p * v);
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

/// An own table of zeros and no biases but that of `proj`: plain attention.
#[test]
fn without_positions_it_is_softmax_attention() {
    for_seeds(OP, |q, at| {
        if q.config.get("head_dim").is_some() || q.has("input.rel_pos_bias") || q.config.get("qk_scale").is_some() {
            return;
        }
        let mut tensors = q.case.question();
        let zero = |tensors: &mut karat::case::Tensors<f64>, name: &str| {
            if q.has(name) {
                let dims = q.dims(name);
                tensors.insert(name.into(), value(&dims, &vec![0.0; dims.iter().product()]));
            }
        };
        for name in ["param.relative_position_bias_table", "param.q_bias", "param.v_bias"] {
            zero(&mut tensors, name);
        }
        let beit = answer(OP, &q.config, &tensors);
        let mut config = q.config.clone();
        config.set("qkv_bias", false).set("proj_bias", true).set("qk_norm", false);
        let plain = answer("attention.softmax", &config, &tensors);
        let [Value::Float(a), Value::Float(b)] = [&beit["output.y"], &plain["output.y"]] else { panic!("{at}: y holds integers") };
        assert_close(at, a.data(), b.data());
    });
}
