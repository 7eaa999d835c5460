//! `attention.gaussian_mask`, its variants and `mask.gaussian_mixture`.

use karat::case::{Config, Tensors, Value};

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds, softmax, value};

const OP: &str = "attention.gaussian_mask";

fn grid(config: &Config) -> [usize; 2] {
    config.pair("grid").unwrap()
}

/// The factor of head `g` for patches `i` and `j`.
fn factor(q: &Question, prefix: &str, [height, width]: [usize; 2], heads: usize, g: usize, i: usize, j: usize) -> f64 {
    match q.config.str("mask").unwrap_or("gmm") {
        "none" => 1.0,
        "elm" => q.get(&format!("param.{prefix}mask"))[i * height * width + j],
        _ => {
            let (sigma, alpha) = (q.get(&format!("param.{prefix}sigma")), q.get(&format!("param.{prefix}alpha")));
            let d2 = ((i / width).abs_diff(j / width).pow(2) + (i % width).abs_diff(j % width).pow(2)) as f64;
            let cutoff = q.config.f64("cutoff_d2").unwrap_or(f64::INFINITY);
            let term = |k: usize| alpha[k * heads + g] * (-d2 / (2.0 * (sigma[k * heads + g].powi(2) + 1e-5))).exp();
            if d2 > cutoff { 0.0 } else { (0..sigma.len() / heads).map(term).sum() }
        }
    }
}

fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (n, c, h, d) = (q.dims("input.x")[1], q.usize("dim"), q.usize("heads"), q.usize("dim_head"));
    let cls = usize::from(q.config.bool("cls_token").unwrap());
    let mut y = Vec::new();
    for image in q.get("input.x").chunks_exact(n * c) {
        let qkv: Vec<Vec<f64>> = image.chunks_exact(c).map(|token| q.linear("to_qkv", token)).collect();
        let part = |token: usize, part: usize, head: usize| &qkv[token][(part * h + head) * d..(part * h + head + 1) * d];
        for i in 0..n {
            let mut out = vec![0.0; h * d];
            for head in 0..h {
                let logit = |j: usize| {
                    let g = if i < cls || j < cls { 1.0 } else { factor(q, "mask.", grid(&q.config), h, head, i - cls, j - cls) };
                    g * dot(part(i, 0, head), part(j, 1, head)) / (d as f64).sqrt()
                };
                for (j, p) in softmax(&(0..n).map(logit).collect::<Vec<_>>()).into_iter().enumerate() {
                    out[head * d..(head + 1) * d].iter_mut().zip(part(j, 2, head)).for_each(|(o, v)| *o += p * v);
                }
            }
            y.extend(if h == 1 && d == c { out } else { q.linear("to_out.0", &out) });
        }
    }
    vec![("y", y)]
}

#[test]
fn agrees_with_plain_loops() {
    against_oracle(OP, oracle);
}

#[test]
fn mixture_agrees_with_plain_loops() {
    against_oracle("mask.gaussian_mixture", |q| {
        let (h, [height, width]) = (q.usize("heads"), grid(&q.config));
        let n = height * width;
        let entry = |i: usize| factor(q, "", [height, width], h, i / (n * n), i / n % n, i % n);
        vec![("mask", (0..h * n * n).map(entry).collect())]
    });
}

/// The output with another parameter or configuration.
fn with(q: &Question, change: impl FnOnce(&mut Config, &mut Tensors<f64>)) -> Vec<f64> {
    let (mut config, mut tensors) = (q.config.clone(), q.case.question());
    change(&mut config, &mut tensors);
    let Value::Float(y) = &answer(OP, &config, &tensors)["output.y"] else { panic!("y holds integers") };
    y.data().to_vec()
}

fn for_mixtures(check: impl Fn(&Question, &str)) {
    for_seeds(OP, |q, at| {
        if q.has("param.mask.sigma") {
            check(q, at);
        }
    });
}

#[test]
fn the_sign_of_sigma_does_not_matter() {
    for_mixtures(|q, at| {
        let negative: Vec<f64> = q.get("param.mask.sigma").iter().map(|s| -s).collect();
        let y = with(q, |_, t| _ = t.insert("param.mask.sigma".into(), value(&q.dims("param.mask.sigma"), &negative)));
        assert_close(at, &y, q.get("output.y"));
    });
}

#[test]
fn kernels_of_equal_width_are_one_kernel() {
    for_mixtures(|q, at| {
        let (h, k) = (q.usize("heads"), q.usize("num_kernels"));
        let (sigma, alpha) = (q.get("param.mask.sigma"), q.get("param.mask.alpha"));
        let equal: Vec<f64> = (0..k * h).map(|i| sigma[i % h]).collect();
        let sums: Vec<f64> = (0..h).map(|g| (0..k).map(|k| alpha[k * h + g]).sum()).collect();
        let many = with(q, |_, t| _ = t.insert("param.mask.sigma".into(), value(&[k, h, 1, 1], &equal)));
        let one = with(q, |config, t| {
            config.set("num_kernels", 1);
            t.insert("param.mask.sigma".into(), value(&[1, h, 1, 1], &sigma[..h]));
            t.insert("param.mask.alpha".into(), value(&[1, h, 1, 1], &sums));
        });
        assert_close(at, &many, &one);
    });
}

#[test]
fn no_amplitude_is_uniform_attention_and_wide_kernels_scale_the_logits() {
    for_mixtures(|q, at| {
        let (h, k) = (q.usize("heads"), q.usize("num_kernels"));
        let constant = |x: f64| value(&[k, h, 1, 1], &vec![x; k * h]);
        if !q.config.bool("cls_token").unwrap() {
            let (n, c) = (q.dims("input.x")[1], q.usize("dim"));
            let uniform = with(q, |_, t| _ = t.insert("param.mask.alpha".into(), constant(0.0)));
            for image in uniform.chunks_exact(n * c) {
                image.chunks_exact(c).for_each(|token| assert_close(at, token, &image[..c]));
            }
        }
        let wide = |config: &mut Config, t: &mut Tensors<f64>| {
            config.set("cutoff_d2", serde_json::Value::Null);
            t.insert("param.mask.sigma".into(), constant(1e9));
            t.insert("param.mask.alpha".into(), constant(1.0 / k as f64));
        };
        let plain = with(q, |config, _| _ = config.set("mask", "none"));
        assert_close(at, &with(q, wide), &plain);
    });
}

#[test]
fn a_free_mask_of_ones_is_plain_attention() {
    for_seeds(OP, |q, at| {
        let [height, width] = grid(&q.config);
        let n = height * width;
        let ones = with(q, |config, t| {
            config.set("mask", "elm");
            t.insert("param.mask.mask".into(), value(&[n, n], &vec![1.0; n * n]));
        });
        assert_close(at, &ones, &with(q, |config, _| _ = config.set("mask", "none")));
    });
}

/// Window by window.
fn swin_oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (c, h, w) = (q.usize("dim"), q.usize("num_heads"), q.usize("window_size"));
    let (n, d, span) = (w * w, c / h, 2 * w - 1);
    let bias = q.get("param.relative_position_bias_table");
    let mut y = Vec::new();
    for (b, window) in q.get("input.x").chunks_exact(n * c).enumerate() {
        let qkv: Vec<Vec<f64>> = window.chunks_exact(c).map(|token| q.linear("qkv", token)).collect();
        let part = |token: usize, part: usize, head: usize| &qkv[token][part * c + head * d..part * c + (head + 1) * d];
        for i in 0..n {
            let mut out = vec![0.0; c];
            for head in 0..h {
                let logit = |j: usize| {
                    let row = (i / w + w - 1 - j / w) * span + i % w + w - 1 - j % w;
                    let shift = match q.usize("num_windows") {
                        0 => 0.0,
                        count => q.get("buffer.attn_mask")[(b % count * n + i) * n + j],
                    };
                    let g = factor(q, "mask.", [w, w], h, head, i, j);
                    g * dot(part(i, 0, head), part(j, 1, head)) / (d as f64).sqrt() + bias[row * h + head] + shift
                };
                for (j, p) in softmax(&(0..n).map(logit).collect::<Vec<_>>()).into_iter().enumerate() {
                    out[head * d..(head + 1) * d].iter_mut().zip(part(j, 2, head)).for_each(|(o, v)| *o += p * v);
                }
            }
            y.extend(q.linear("proj", &out));
        }
    }
    vec![("y", y)]
}

#[test]
fn windows_agree_with_plain_loops() {
    against_oracle("attention.gaussian_mask_swin", swin_oracle);
}

fn t2t_oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (n, c, e, h) = (q.dims("input.x")[1], q.usize("dim"), q.usize("in_dim"), q.usize("num_heads"));
    let d = e / h;
    let mut y = Vec::new();
    for image in q.get("input.x").chunks_exact(n * c) {
        let qkv: Vec<Vec<f64>> = image.chunks_exact(c).map(|token| q.linear("qkv", token)).collect();
        let part = |token: usize, part: usize, head: usize| &qkv[token][part * e + head * d..part * e + (head + 1) * d];
        for i in 0..n {
            let mut out = vec![0.0; e];
            for head in 0..h {
                let logit = |j: usize| {
                    let g = factor(q, "mask.", grid(&q.config), h, head, i, j);
                    g * dot(part(i, 0, head), part(j, 1, head)) / ((c / h) as f64).sqrt()
                };
                for (j, p) in softmax(&(0..n).map(logit).collect::<Vec<_>>()).into_iter().enumerate() {
                    out[head * d..(head + 1) * d].iter_mut().zip(part(j, 2, head)).for_each(|(o, v)| *o += p * v);
                }
            }
            let skip = if h == 1 { &qkv[i][2 * e..] } else { &image[i * c..(i + 1) * c] };
            y.extend(q.linear("proj", &out).iter().zip(skip).map(|(y, s)| y + s));
        }
    }
    vec![("y", y)]
}

#[test]
fn token_transformers_agree_with_plain_loops() {
    against_oracle("attention.gaussian_mask_t2t", t2t_oracle);
}

fn cait_oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (n, c, h, d) = (q.dims("input.x")[1], q.usize("dim"), q.usize("heads"), q.usize("dim_head"));
    let (pre, post) = (q.get("param.mix_heads_pre_attn"), q.get("param.mix_heads_post_attn"));
    let mut y = Vec::new();
    for image in q.get("input.x").chunks_exact(n * c) {
        let qs: Vec<Vec<f64>> = image.chunks_exact(c).map(|token| q.linear("to_q", token)).collect();
        let kv: Vec<Vec<f64>> = image.chunks_exact(c).map(|token| q.linear("to_kv", token)).collect();
        for (i, query) in qs.iter().enumerate() {
            let own = |head: usize| head * d..(head + 1) * d;
            let z = |head: usize, j: usize| {
                let g = factor(q, "mask.", grid(&q.config), h, head, i, j);
                g * dot(&query[own(head)], &kv[j][own(head)]) / (d as f64).sqrt()
            };
            let weights: Vec<Vec<f64>> =
                (0..h).map(|g| softmax(&(0..n).map(|j| (0..h).map(|a| z(a, j) * pre[a * h + g]).sum()).collect::<Vec<f64>>())).collect();
            let mut out = vec![0.0; h * d];
            for g in 0..h {
                for j in 0..n {
                    let weight: f64 = (0..h).map(|a| weights[a][j] * post[a * h + g]).sum();
                    let v = &kv[j][h * d + g * d..h * d + (g + 1) * d];
                    out[own(g)].iter_mut().zip(v).for_each(|(o, v)| *o += weight * v);
                }
            }
            y.extend(q.linear("to_out.0", &out));
        }
    }
    vec![("y", y)]
}

#[test]
fn talking_heads_agree_with_plain_loops() {
    against_oracle("attention.gaussian_mask_cait", cait_oracle);
}
