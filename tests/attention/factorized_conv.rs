//! `attention.factorized_conv`, against its quadratic form.

use karat::case::Value;

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds, softmax, value};

const OP: &str = "attention.factorized_conv";

/// `[head][token][channel]` of part 0 (q), 1 (k) or 2 (v).
fn heads(q: &Question, qkv: &[Vec<f64>], part: usize) -> Vec<Vec<Vec<f64>>> {
    let (c, h) = (q.usize("dim"), q.usize("num_heads"));
    let d = c / h;
    let of = |head: usize| qkv.iter().map(|row| row[part * c + head * d..part * c + (head + 1) * d].to_vec()).collect();
    (0..h).map(of).collect()
}

/// The depthwise convolution of channel `channel` at pixel (y, x), pixel by pixel.
fn relative_position(q: &Question, v: &[Vec<f64>], head: usize, channel: usize, (y, x): (usize, usize)) -> f64 {
    let (height, width, d) = (q.usize("height") as isize, q.usize("width") as isize, q.usize("dim") / q.usize("num_heads"));
    let (windows, splits) = (q.config.usizes("crpe_windows").unwrap(), q.config.usizes("crpe_head_splits").unwrap());
    let (mut group, mut first) = (0, 0);
    while head >= first + splits[group] {
        first += splits[group];
        group += 1;
    }
    let (k, row) = (windows[group], (head - first) * d + channel);
    let weight = &q.get(&format!("param.crpe.conv_list.{group}.weight"))[row * k * k..(row + 1) * k * k];
    let mut sum = q.get(&format!("param.crpe.conv_list.{group}.bias"))[row];
    for i in 0..k {
        for j in 0..k {
            let (r, s) = (y as isize + i as isize - k as isize / 2, x as isize + j as isize - k as isize / 2);
            if (0..height).contains(&r) && (0..width).contains(&s) {
                sum += weight[i * k + j] * v[1 + (r * width + s) as usize][channel];
            }
        }
    }
    sum
}

/// Token i takes `s q_i·S_j` of token j's value, with S the softmax of k over the tokens, channel by channel.
pub fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (x, n, c, h) = (q.get("input.x"), q.dims("input.x")[1], q.usize("dim"), q.usize("num_heads"));
    let (d, width) = (c / h, q.usize("width"));
    let scale = q.config.f64("qk_scale").unwrap_or(1.0 / (d as f64).sqrt());
    let mut out = Vec::new();
    for image in x.chunks_exact(n * c) {
        let qkv: Vec<Vec<f64>> = image.chunks_exact(c).map(|token| q.linear("qkv", token)).collect();
        let [queries, keys, values] = [0, 1, 2].map(|part| heads(q, &qkv, part));
        let mut rows = vec![vec![0.0; c]; n];
        for head in 0..h {
            let columns: Vec<Vec<f64>> = (0..d).map(|a| softmax(&keys[head].iter().map(|k| k[a]).collect::<Vec<_>>())).collect();
            for (i, row) in rows.iter_mut().enumerate() {
                for j in 0..n {
                    let s: Vec<f64> = columns.iter().map(|column| column[j]).collect();
                    let weight = scale * dot(&queries[head][i], &s);
                    row[head * d..(head + 1) * d].iter_mut().zip(&values[head][j]).for_each(|(o, v)| *o += weight * v);
                }
                if i > 0 {
                    for a in 0..d {
                        let u = relative_position(q, &values[head], head, a, ((i - 1) / width, (i - 1) % width));
                        row[head * d + a] += queries[head][i][a] * u;
                    }
                }
            }
        }
        out.extend(rows.iter().flat_map(|row| q.linear("proj", row)));
    }
    vec![("y", out)]
}

#[test]
fn agrees_with_the_quadratic_form() {
    against_oracle(OP, oracle);
}

/// The softmax runs over tokens: a constant added to a channel of k everywhere changes nothing, nor does a large one overflow.
#[test]
fn keys_may_be_shifted() {
    for_seeds(OP, |q, at| {
        if !q.config.bool("qkv_bias").unwrap() {
            return;
        }
        let c = q.usize("dim");
        let mut bias = q.get("param.qkv.bias").to_vec();
        bias[c..2 * c].iter_mut().enumerate().for_each(|(i, b)| *b += 100.0 * (i as f64 - 3.0));
        let mut tensors = q.case.question();
        tensors.insert("param.qkv.bias".into(), value(&[3 * c], &bias));
        let results = answer(OP, &q.config, &tensors);
        let Value::Float(y) = &results["output.y"] else { panic!("{at}: y holds integers") };
        assert_close(at, y.data(), q.get("output.y"));
    });
}

/// With kernels and their biases zero, nothing knows where a token is: reversing the tokens reverses the output.
#[test]
fn without_positions_the_order_does_not_matter() {
    for_seeds(OP, |q, at| {
        let (dims, n, c) = (q.dims("input.x"), q.dims("input.x")[1], q.usize("dim"));
        let mut tensors = q.case.question();
        for (name, tensor) in tensors.iter_mut().filter(|(name, _)| name.contains("conv_list")) {
            let shape = tensor.shape();
            assert!(name.starts_with("param."));
            *tensor = value(&shape, &vec![0.0; shape.numel()]);
        }
        let ask = |tensors: &karat::case::Tensors<f64>| {
            let Value::Float(y) = answer(OP, &q.config, tensors).remove("output.y").unwrap() else { panic!("{at}: integers") };
            y.data().to_vec()
        };
        let reversed = |x: &[f64]| -> Vec<f64> {
            x.chunks_exact(n * c).flat_map(|image| image.chunks_exact(c).rev().flatten().copied().collect::<Vec<_>>()).collect()
        };
        let y = ask(&tensors);
        tensors.insert("input.x".into(), value(&dims, &reversed(q.get("input.x"))));
        assert_close(at, &ask(&tensors), &reversed(&y));
    });
}
