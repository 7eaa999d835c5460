//! `attention.swda`, `attention.dilated`, `attention.dilate_global`.

use karat::case::Value;

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds, softmax};

/// One position and head: all `k²` slots, those outside the map with a key and a value of zeros.
fn attend(
    at: [usize; 2],
    [height, width]: [usize; 2],
    [kernel, dilation]: [usize; 2],
    query: &[f64],
    scale: f64,
    key_and_value: impl Fn(usize, usize) -> (Vec<f64>, Vec<f64>),
) -> Vec<f64> {
    let zeros = || vec![0.0; query.len()];
    let reach = (dilation * (kernel - 1) / 2) as i64;
    let mut slots = Vec::new();
    for a in 0..kernel {
        for b in 0..kernel {
            let y = at[0] as i64 + (a * dilation) as i64 - reach;
            let x = at[1] as i64 + (b * dilation) as i64 - reach;
            let inside = (0..height as i64).contains(&y) && (0..width as i64).contains(&x);
            slots.push(if inside { key_and_value(y as usize, x as usize) } else { (zeros(), zeros()) });
        }
    }
    let scores: Vec<f64> = slots.iter().map(|(key, _)| scale * dot(query, key)).collect();
    let mut out = zeros();
    for (p, (_, value)) in softmax(&scores).into_iter().zip(&slots) {
        out.iter_mut().zip(value).for_each(|(o, v)| *o += p * v);
    }
    out
}

fn scale(q: &Question, head_dim: usize) -> f64 {
    match q.config.f64_or("qk_scale", 0.0).unwrap() {
        0.0 => 1.0 / (head_dim as f64).sqrt(),
        s => s,
    }
}

fn dilated(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let dims = q.dims("input.x");
    let ([height, width, c], h) = ([dims[1], dims[2], dims[3]], q.usize("num_heads"));
    let (d, kernel, dilation) = (c / h, q.usize("kernel_size"), q.config.usizes("dilation").unwrap());
    let mut y = Vec::new();
    for image in q.get("input.x").chunks_exact(height * width * c) {
        let qkv: Vec<Vec<f64>> = image.chunks_exact(c).map(|token| q.linear("qkv", token)).collect();
        for i in 0..height {
            for j in 0..width {
                let mut out = Vec::new();
                for head in 0..h {
                    let part = |y: usize, x: usize, part: usize| qkv[y * width + x][part * c + head * d..][..d].to_vec();
                    let r = dilation[head / (h / dilation.len())];
                    let query = part(i, j, 0);
                    out.extend(attend([i, j], [height, width], [kernel, r], &query, scale(q, d), |y, x| (part(y, x, 1), part(y, x, 2))));
                }
                y.extend(q.linear("proj", &out));
            }
        }
    }
    vec![("y", y)]
}

/// Every position sees the whole map.
fn global(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let dims = q.dims("input.x");
    let (n, c, h) = (dims[1] * dims[2], dims[3], q.usize("num_heads"));
    let d = c / h;
    let mut y = Vec::new();
    for image in q.get("input.x").chunks_exact(n * c) {
        let qkv: Vec<Vec<f64>> = image.chunks_exact(c).map(|token| q.linear("qkv", token)).collect();
        for i in 0..n {
            let mut out = vec![0.0; c];
            for head in 0..h {
                let part = |token: usize, part: usize| &qkv[token][part * c + head * d..][..d];
                let scores: Vec<f64> = (0..n).map(|j| scale(q, d) * dot(part(i, 0), part(j, 1))).collect();
                for (j, p) in softmax(&scores).into_iter().enumerate() {
                    out[head * d..][..d].iter_mut().zip(part(j, 2)).for_each(|(o, v)| *o += p * v);
                }
            }
            y.extend(q.linear("proj", &out));
        }
    }
    vec![("y", y)]
}

/// Channels first in, channels last out.
fn swda(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let dims = q.dims("input.q");
    let ([batch, c, height, width], d) = ([dims[0], dims[1], dims[2], dims[3]], q.usize("head_dim"));
    let sizes = [q.config.usize_or("kernel_size", 3).unwrap(), q.config.usize_or("dilation", 1).unwrap()];
    let at = |name: &str, b: usize, head: usize, y: usize, x: usize| -> Vec<f64> {
        (0..d).map(|e| q.get(name)[((b * c + head * d + e) * height + y) * width + x]).collect()
    };
    let mut out = Vec::new();
    for b in 0..batch {
        for i in 0..height {
            for j in 0..width {
                for head in 0..c / d {
                    let query = at("input.q", b, head, i, j);
                    out.extend(attend([i, j], [height, width], sizes, &query, scale(q, d), |y, x| {
                        (at("input.k", b, head, y, x), at("input.v", b, head, y, x))
                    }));
                }
            }
        }
    }
    vec![("y", out)]
}

#[test]
fn dilated_agrees_with_plain_loops() {
    against_oracle("attention.dilated", dilated);
}

#[test]
fn swda_agrees_with_plain_loops() {
    against_oracle("attention.swda", swda);
}

#[test]
fn global_agrees_with_plain_loops() {
    against_oracle("attention.dilate_global", global);
}

#[test]
fn one_slot_returns_the_values() {
    for_seeds("attention.swda", |q, at| {
        let mut config = q.config.clone();
        config.set("kernel_size", 1);
        let results = answer("attention.swda", &config, &q.case.question());
        let Value::Float(y) = &results["output.y"] else { panic!("{at}: y holds integers") };
        let (dims, v) = (q.dims("input.v"), q.get("input.v"));
        let (c, n) = (dims[1], dims[2] * dims[3]);
        let expected: Vec<f64> = (0..v.len()).map(|i| v[(i / (n * c) * c + i % c) * n + i / c % n]).collect();
        assert_close(at, y.data(), &expected);
    });
}

#[test]
fn a_dilation_named_twice_is_the_same_dilation() {
    for_seeds("attention.dilated", |q, at| {
        let (h, distance) = (q.usize("num_heads"), q.config.usizes("dilation").unwrap()[0]);
        let ask = |list: Vec<usize>| {
            let mut config = q.config.clone();
            config.set("dilation", list);
            let results = answer("attention.dilated", &config, &q.case.question());
            let Value::Float(y) = &results["output.y"] else { panic!("{at}: y holds integers") };
            y.data().to_vec()
        };
        assert_close(at, &ask(vec![distance; h]), &ask(vec![distance]));
    });
}
