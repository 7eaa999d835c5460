//! `attention.um_window`.

use karat::case::Value;
use karat::tensor::Tensor;

use crate::common::{Question, against_oracle, answer, assert_close, assert_within, dot, for_seeds, softmax, value};

const OP: &str = "attention.um_window";

/// One query after the other; the MLP anew for every pair.
fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (c, h, side) = (q.usize("dim"), q.usize("num_heads"), q.usize("window_size"));
    let (n, d, pos) = (side * side, c / h, q.dims("input.pos_hw"));
    let (samples, across, per_image) = (pos[0], pos[2] / side, pos[1] * pos[2] / n);
    let at = |window: usize, i: usize| {
        let (image, w) = (window / per_image % samples, window % per_image);
        let (row, column) = (w / across * side + i / side, w % across * side + i % side);
        let from = ((image * pos[1] + row) * pos[2] + column) * 2;
        &q.get("input.pos_hw")[from..from + 2]
    };
    let mut y = Vec::new();
    for (window, x) in q.get("input.x").chunks_exact(n * c).enumerate() {
        let qkv: Vec<Vec<f64>> = x.chunks_exact(c).map(|token| q.linear("qkv", token)).collect();
        for i in 0..n {
            let bias: Vec<Vec<f64>> = (0..n)
                .map(|j| {
                    let delta = at(window, j).iter().zip(at(window, i)).map(|(key, query)| key - query);
                    let z: Vec<f64> = delta.map(|x| x.signum() * (1.0 + x.abs()).ln()).collect();
                    let hidden: Vec<f64> = q.linear("posmlp.0", &z).into_iter().map(|a| a.max(0.0)).collect();
                    q.linear("posmlp.2", &hidden)
                })
                .collect();
            let mut out = vec![0.0; c];
            for head in 0..h {
                let part = |token: usize, part: usize| &qkv[token][part * c + head * d..part * c + (head + 1) * d];
                let mask = |j: usize| if q.has("input.mask") { q.get("input.mask")[(window % per_image * n + i) * n + j] } else { 0.0 };
                let score = |j: usize| dot(part(i, 0), part(j, 1)) / (d as f64).sqrt() + bias[j][head] + mask(j);
                for (j, p) in softmax(&(0..n).map(score).collect::<Vec<_>>()).into_iter().enumerate() {
                    out[head * d..(head + 1) * d].iter_mut().zip(part(j, 2)).for_each(|(o, v)| *o += p * v);
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

/// Only offsets count; positions shared by the batch are positions repeated.
#[test]
fn positions_may_move_and_be_shared() {
    for_seeds(OP, |q, at| {
        let (dims, per_image) = (q.dims("input.pos_hw"), q.dims("input.pos_hw")[1..3].iter().product::<usize>());
        let batch = q.dims("input.x")[0] * q.dims("input.x")[1] / per_image;
        let moved: Vec<f64> = q.get("input.pos_hw").iter().map(|x| x + 8.0).collect::<Vec<_>>().repeat(batch / dims[0]);
        let mut tensors = q.case.question();
        tensors.insert("input.pos_hw".into(), value(&[batch, dims[1], dims[2], 2], &moved));
        let results = answer(OP, &q.config, &tensors);
        let Value::Float(y) = &results["output.y"] else { panic!("{at}: y holds integers") };
        assert_close(at, y.data(), q.get("output.y"));
    });
}

/// Whether offsets are found on a grid or pair by pair must not matter: a tenth of a position off every grid moves y by little.
#[test]
fn off_the_grid_the_answer_is_continuous() {
    for_seeds(OP, |q, at| {
        let mut tensors = q.case.question();
        let nudged = Tensor::from_fn(q.case.tensors["input.pos_hw"].shape(), |i| q.get("input.pos_hw")[i] + 1e-12 * (i % 7) as f64);
        tensors.insert("input.pos_hw".into(), Value::Float(nudged));
        let results = answer(OP, &q.config, &tensors);
        let Value::Float(y) = &results["output.y"] else { panic!("{at}: y holds integers") };
        // The nudges themselves move the answer: by some 1e-12 times the slope of the position MLP.
        assert_within(1e-10, at, y.data(), q.get("output.y"));
    });
}
