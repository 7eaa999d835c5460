//! `attention.visual_tokens`, `tokenizer.filter`, `tokenizer.recurrent`: pixel by pixel, token by token, from the sheet's equations.

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds, softmax, value};

type Rows = Vec<Vec<f64>>;

/// One image of a question: its pixels as rows, the map's size, its incoming tokens.
struct Image {
    pixels: Rows,
    map: [usize; 2],
    tokens: Rows,
}

fn images(q: &Question) -> Vec<Image> {
    let dims = q.dims("input.x");
    let (b, c, h, w) = (dims[0], dims[1], dims[2], dims[3]);
    let x = q.get("input.x");
    (0..b)
        .map(|b| {
            let pixels = (0..h * w).map(|p| (0..c).map(|c_at| x[(b * c + c_at) * h * w + p]).collect()).collect();
            let tokens = if q.has("input.tokens") {
                let (l, t) = (q.dims("input.tokens")[1], q.dims("input.tokens")[2]);
                q.get("input.tokens")[b * l * t..(b + 1) * l * t].chunks_exact(t).map(<[f64]>::to_vec).collect()
            } else {
                Vec::new()
            };
            Image { pixels, map: [h, w], tokens }
        })
        .collect()
}

fn flag(q: &Question, key: &str) -> bool {
    q.config.bool(key).unwrap_or(false)
}

fn multihead(q: &Question) -> bool {
    q.config.str("formulation").unwrap() == "multihead"
}

/// `W x + b` with a block-diagonal weight.
fn grouped(q: &Question, name: &str, x: &[f64]) -> Vec<f64> {
    let dims = q.dims(&format!("param.{name}.weight"));
    let (outputs, per_group) = (dims[0], dims[1]);
    let groups = x.len() / per_group;
    let (weight, bias) = (q.get(&format!("param.{name}.weight")), q.get(&format!("param.{name}.bias")));
    (0..outputs)
        .map(|o| {
            let g = o / (outputs / groups);
            dot(&weight[o * per_group..(o + 1) * per_group], &x[g * per_group..(g + 1) * per_group]) + bias[o]
        })
        .collect()
}

fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn part(row: &[f64], head: usize, heads: usize) -> &[f64] {
    let d = row.len() / heads;
    &row[head * d..(head + 1) * d]
}

/// `Σ_i p_i v_i`.
fn mean(p: &[f64], v: &[&[f64]]) -> Vec<f64> {
    let mut out = vec![0.0; v[0].len()];
    for (p, v) in p.iter().zip(v) {
        out.iter_mut().zip(*v).for_each(|(o, v)| *o += p * v);
    }
    out
}

/// Tokens, and `attn` as maps `[head][token][pixel]`.
fn tokenizer(q: &Question, at: &str, image: &Image, recurrent: bool) -> (Rows, Vec<Rows>) {
    let c = q.usize("channels");
    if !multihead(q) {
        let scale = if flag(q, "scaled") { (c as f64).sqrt() } else { 1.0 };
        let filters: Rows = if recurrent {
            image.tokens.iter().map(|t| q.linear(&format!("{at}w_t2r"), t)).collect()
        } else {
            q.get(&format!("param.{at}w_a.weight")).chunks_exact(c).map(<[f64]>::to_vec).collect()
        };
        let maps: Rows = filters.iter().map(|r| softmax(&image.pixels.iter().map(|x| dot(r, x) / scale).collect::<Vec<_>>())).collect();
        let pixels: Vec<&[f64]> = image.pixels.iter().map(Vec::as_slice).collect();
        let tokens = maps.iter().map(|a| {
            let z = mean(a, &pixels);
            if flag(q, "value_proj") { q.linear(&format!("{at}w_v"), &z) } else { z }
        });
        return (tokens.collect(), vec![maps]);
    }
    let (heads, front) = (if recurrent { q.usize("heads") } else { 1 }, q.usize("num_tokens") / 2);
    let root = ((c / heads) as f64).sqrt();
    let maps: Vec<Rows> = if recurrent {
        let queries: Rows = image.tokens[..front].iter().map(|t| grouped(q, &format!("{at}conv_query"), t)).collect();
        let keys: Rows = image.pixels.iter().map(|x| grouped(q, &format!("{at}conv_key"), x)).collect();
        let logits = |r: &[f64], h: usize| keys.iter().map(|k| dot(part(r, h, heads), part(k, h, heads)) / root).collect::<Vec<_>>();
        (0..heads).map(|h| queries.iter().map(|r| softmax(&logits(r, h))).collect()).collect()
    } else {
        let coefs: Rows = image.pixels.iter().map(|x| grouped(q, &format!("{at}conv_token_coef"), x)).collect();
        vec![(0..q.usize("num_tokens")).map(|l| softmax(&coefs.iter().map(|c| c[l] / root).collect::<Vec<_>>())).collect()]
    };
    let values: Rows = image.pixels.iter().map(|x| grouped(q, &format!("{at}conv_value"), x)).collect();
    let new = (0..maps[0].len()).map(|l| {
        let mut row = Vec::new();
        for (h, maps) in maps.iter().enumerate() {
            let v: Vec<&[f64]> = values.iter().map(|v| part(v, h, heads)).collect();
            row.extend(mean(&maps[l], &v));
        }
        if q.usize("pos_size") > 0 {
            row.extend(positions(q, at, &maps.iter().map(|maps| maps[l].clone()).collect::<Vec<_>>(), image.map));
        }
        grouped(q, &format!("{at}conv_token"), &row)
    });
    let tokens = if recurrent { image.tokens[front..].iter().cloned().chain(new).collect() } else { new.collect() };
    (tokens, maps)
}

/// The encoded positions of one token from its maps, one per head.
fn positions(q: &Question, at: &str, maps: &[Vec<f64>], [h, w]: [usize; 2]) -> Vec<f64> {
    let (mut s, n) = (q.usize("pos_size"), q.usize("pos_downsample"));
    let mut x: Vec<Vec<f64>> = maps.iter().map(|map| (0..s * s).map(|i| map[(i / s * h / s) * w + i % s * w / s]).collect()).collect();
    for i in 0..=n {
        let name = format!("{at}pos_encoding.ds_conv.{i}");
        let (weight, bias) = (q.get(&format!("param.{name}.weight")), q.get(&format!("param.{name}.bias")));
        let (k, stride, pad) = if i < n { (3, 2, 1) } else { (1, 1, 0) };
        let out = (s + 2 * pad - k) / stride + 1;
        x = (0..bias.len())
            .map(|o| {
                let pixel = |y: usize, x_at: usize| {
                    let mut sum = bias[o];
                    for (c, map) in x.iter().enumerate() {
                        for (u, v) in (0..k * k).map(|t| (t / k, t % k)) {
                            let (r, t) = (y * stride + u, x_at * stride + v);
                            if r >= pad && t >= pad && r - pad < s && t - pad < s {
                                sum += weight[(o * x.len() + c) * k * k + u * k + v] * map[(r - pad) * s + t - pad];
                            }
                        }
                    }
                    sum
                };
                (0..out * out).map(|p| pixel(p / out, p % out)).collect()
            })
            .collect();
        s = out;
    }
    grouped(q, &format!("{at}pos_encoding.pos_conv"), &x[0])
}

fn transformer(q: &Question, tokens: &Rows) -> Rows {
    let name = |layer: &str| format!("transformer.{layer}");
    if multihead(q) {
        let heads = q.usize("heads");
        let all = |layer: &str| -> Rows { tokens.iter().map(|t| grouped(q, &name(layer), t)).collect() };
        let (k, query, v) = (all("k_conv"), all("q_conv"), all("v_conv"));
        return (0..tokens.len())
            .map(|j| {
                let mut out = Vec::new();
                for h in 0..heads {
                    let logits: Vec<f64> =
                        k.iter().map(|k| dot(part(k, h, heads), part(&query[j], h, heads)) / (tokens.len() as f64).sqrt()).collect();
                    out.extend(mean(&softmax(&logits), &v.iter().map(|v| part(v, h, heads)).collect::<Vec<_>>()));
                }
                let t = sum(&tokens[j], &out);
                sum(&t, &grouped(q, &name("ff_conv"), &t))
            })
            .collect();
    }
    let scale = if flag(q, "scaled") { (q.usize("attn_dim") as f64).sqrt() } else { 1.0 };
    let queries: Rows = tokens.iter().map(|t| q.linear(&name("query"), t)).collect();
    let all: Vec<&[f64]> = tokens.iter().map(Vec::as_slice).collect();
    (tokens.iter())
        .map(|t| {
            let k = q.linear(&name("key"), t);
            let s = softmax(&queries.iter().map(|query| dot(&k, query) / scale).collect::<Vec<_>>());
            let t = sum(t, &mean(&s, &all));
            let hidden: Vec<f64> = q.linear(&name("fc1"), &t).into_iter().map(|u| u.max(0.0)).collect();
            sum(&t, &q.linear(&name("fc2"), &hidden))
        })
        .collect()
}

fn projector(q: &Question, image: &Image, tokens: &Rows) -> Rows {
    let name = |layer: &str| format!("projector.{layer}");
    let multihead = multihead(q);
    let layer = |one: &str, other: &str, x: &[f64]| if multihead { grouped(q, &name(other), x) } else { q.linear(&name(one), x) };
    let heads = if multihead { q.usize("heads") } else { 1 };
    let has = |layer: &str| q.has(&format!("param.{}.weight", name(layer)));
    let keys: Rows = tokens.iter().map(|t| layer("w_k", "proj_key_conv", t)).collect();
    let plain = !multihead && !has("w_v");
    let values: Rows = tokens.iter().map(|t| if plain { t.clone() } else { layer("w_v", "proj_value_conv", t) }).collect();
    let root = if multihead || flag(q, "scaled") { ((keys[0].len() / heads) as f64).sqrt() } else { 1.0 };
    (image.pixels.iter())
        .map(|x| {
            let query = layer("w_q", "proj_query_conv", x);
            let mut out = Vec::new();
            for h in 0..heads {
                let p = softmax(&keys.iter().map(|k| dot(part(k, h, heads), part(&query, h, heads)) / root).collect::<Vec<_>>());
                out.extend(mean(&p, &values.iter().map(|v| part(v, h, heads)).collect::<Vec<_>>()));
            }
            let base = if has("lateral") || has("lateral_conv") { layer("lateral", "lateral_conv", x) } else { x.clone() };
            sum(&base, &out)
        })
        .collect()
}

fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (mut all_tokens, mut map) = (Vec::new(), Vec::new());
    for image in images(q) {
        let (tokens, _) = tokenizer(q, "tokenizer.", &image, q.config.str("tokenizer").unwrap() == "recurrent");
        let tokens = transformer(q, &tokens);
        if flag(q, "projector") {
            let y = projector(q, &image, &tokens);
            map.extend((0..y[0].len()).flat_map(|c| y.iter().map(move |pixel| pixel[c]).collect::<Vec<_>>()));
        }
        all_tokens.extend(tokens.concat());
    }
    let mut answers = vec![("tokens", all_tokens)];
    if flag(q, "projector") {
        answers.push(("x", map));
    }
    answers
}

fn tokenizer_oracle(q: &Question, recurrent: bool) -> Vec<(&'static str, Vec<f64>)> {
    let (mut all_tokens, mut attn) = (Vec::new(), Vec::new());
    for image in images(q) {
        let (tokens, maps) = tokenizer(q, "", &image, recurrent);
        all_tokens.extend(tokens.concat());
        for maps in maps {
            attn.extend((0..image.pixels.len()).flat_map(|p| maps.iter().map(move |map| map[p]).collect::<Vec<_>>()));
        }
    }
    vec![("tokens", all_tokens), ("attn", attn)]
}

#[test]
fn agrees_with_plain_loops() {
    against_oracle("attention.visual_tokens", oracle);
}

#[test]
fn tokenizers_agree_with_plain_loops() {
    against_oracle("tokenizer.filter", |q| tokenizer_oracle(q, false));
    against_oracle("tokenizer.recurrent", |q| tokenizer_oracle(q, true));
}

/// Pixels have no order but for encoded positions: permuting them permutes the projected map and leaves the tokens.
#[test]
fn permuting_the_pixels_leaves_the_tokens() {
    for_seeds("attention.visual_tokens", |q, at| {
        if q.config.usize("pos_size").unwrap_or(0) > 0 {
            return;
        }
        let dims = q.dims("input.x");
        let pixels = dims[2] * dims[3];
        let reversed = |x: &[f64]| -> Vec<f64> { x.chunks_exact(pixels).flat_map(|plane| plane.iter().rev().copied()).collect() };
        let mut tensors = q.case.question();
        tensors.insert("input.x".into(), value(&dims, &reversed(q.get("input.x"))));
        let results = answer("attention.visual_tokens", &q.config, &tensors);
        let get = |name: &str| match &results[name] {
            karat::case::Value::Float(t) => t.data().to_vec(),
            karat::case::Value::Int(_) => panic!("{at}: {name} holds integers"),
        };
        assert_close(at, &get("output.tokens"), q.get("output.tokens"));
        if flag(q, "projector") {
            assert_close(at, &get("output.x"), &reversed(q.get("output.x")));
        }
    });
}
