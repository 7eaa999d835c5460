//! `attention.retention`: the three forms from their definitions, with and without rescaling, and what relates them.

use karat::case::{Config, Tensors, Value};

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds, value};

const OP: &str = "attention.retention";

struct Head {
    q: Vec<Vec<f64>>,
    k: Vec<Vec<f64>>,
    v: Vec<Vec<f64>>,
    gamma: f64,
    state: Vec<Vec<f64>>,
}

fn turned(x: &[f64], position: usize, rotary: bool) -> Vec<f64> {
    let pairs = x.len() / 2;
    let mut y = x.to_vec();
    for j in 0..if rotary { pairs } else { 0 } {
        let theta = if pairs == 1 { 1.0 } else { 10_000f64.powf(-(j as f64) / (pairs as f64 - 1.0)) };
        let (sin, cos) = (position as f64 * theta).sin_cos();
        (y[2 * j], y[2 * j + 1]) = (x[2 * j] * cos - x[2 * j + 1] * sin, x[2 * j + 1] * cos + x[2 * j] * sin);
    }
    y
}

/// `q S`.
fn read(q: &[f64], state: &[Vec<f64>]) -> Vec<f64> {
    (0..state[0].len()).map(|c| q.iter().zip(state).map(|(q, row)| q * row[c]).sum()).collect()
}

/// `S ← decay S + scale k vᵀ`.
fn write(state: &mut [Vec<f64>], decay: f64, k: &[f64], v: &[f64], scale: f64) {
    for (row, k) in state.iter_mut().zip(k) {
        row.iter_mut().zip(v).for_each(|(s, v)| *s = decay * *s + scale * k * v);
    }
}

fn axpy(to: &mut [f64], scale: f64, x: &[f64]) {
    to.iter_mut().zip(x).for_each(|(y, x)| *y += scale * x);
}

impl Head {
    fn parallel(&mut self, rescale: bool) -> Vec<Vec<f64>> {
        let n = self.q.len();
        let mut out = Vec::new();
        for i in 0..n {
            let rho: f64 = (0..=i).map(|m| self.gamma.powi((i - m) as i32)).sum();
            let d = |m: usize| self.gamma.powi((i - m) as i32) / if rescale { rho.sqrt() } else { 1.0 };
            let a: Vec<f64> = (0..=i).map(|m| dot(&self.q[i], &self.k[m]) * d(m)).collect();
            let r = if rescale { a.iter().map(|a| a.abs()).sum::<f64>().clamp(1.0, 5e4) } else { 1.0 };
            let mut o = read(&self.q[i], &self.state);
            o.iter_mut().for_each(|o| *o *= self.gamma.powi(i as i32 + 1));
            (0..=i).for_each(|m| axpy(&mut o, a[m] / r, &self.v[m]));
            out.push(o);
        }
        for m in 0..n {
            write(&mut self.state, self.gamma, &self.k[m], &self.v[m], 1.0);
        }
        out
    }

    fn recurrent(&mut self, rescale: bool) -> Vec<Vec<f64>> {
        let (mut out, mut rho) = (Vec::new(), 0.0);
        for n in 0..self.q.len() {
            write(&mut self.state, self.gamma, &self.k[n], &self.v[n], 1.0);
            rho = self.gamma * rho + 1.0;
            let mut o = read(&self.q[n], &self.state);
            o.iter_mut().for_each(|o| *o /= if rescale { rho.sqrt() } else { 1.0 });
            out.push(o);
        }
        out
    }

    fn chunkwise(&mut self, c: usize, rescale: bool) -> Vec<Vec<f64>> {
        if !rescale {
            let mut out = Vec::new();
            for from in (0..self.q.len()).step_by(c) {
                let to = (from + c).min(self.q.len());
                let part = |x: &[Vec<f64>]| x[from..to].to_vec();
                let mut chunk = Head { q: part(&self.q), k: part(&self.k), v: part(&self.v), gamma: self.gamma, state: self.state.clone() };
                out.extend(chunk.parallel(false));
                self.state = chunk.state;
            }
            return out;
        }
        let powers: Vec<f64> = (0..c).map(|t| self.gamma.powi(t as i32)).collect();
        let total: f64 = powers.iter().sum();
        let (mut out, mut kappa) = (Vec::new(), 1.0f64);
        for from in (0..self.q.len()).step_by(c) {
            for i in 0..c {
                let root = powers[..=i].iter().sum::<f64>().sqrt();
                let a: Vec<f64> = (0..=i).map(|m| dot(&self.q[from + i], &self.k[from + m]) * powers[i - m] / root).collect();
                let m = a.iter().map(|a| a.abs()).sum::<f64>().max(1.0).max(kappa);
                let mut o = vec![0.0; self.v[0].len()];
                a.iter().enumerate().for_each(|(j, a)| axpy(&mut o, a / m, &self.v[from + j]));
                axpy(&mut o, self.gamma.powi(i as i32 + 1) * total / root / m, &read(&self.q[from + i], &self.state));
                out.push(o);
            }
            let decay = self.gamma.powi(c as i32);
            self.state.iter_mut().flatten().for_each(|s| *s *= decay);
            for m in 0..c {
                write(&mut self.state, 1.0, &self.k[from + m], &self.v[from + m], powers[c - 1 - m] / total);
            }
            let column = |j: usize| self.state.iter().map(|row| row[j].abs()).sum::<f64>();
            kappa = (0..self.v[0].len()).map(column).fold(1.0, f64::max);
        }
        out
    }
}

fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (dims, h) = (q.dims("input.x"), q.usize("heads"));
    let (n, c, e) = (dims[1], q.usize("dim"), q.usize("value_dim"));
    let (dk, dv, eps) = (c / h, e / h, q.config.f64("eps").unwrap());
    let text = |key| q.config.str(key).unwrap();
    let (rotary, rescale) = (q.config.bool("rotary").unwrap(), text("normalize") == "torchscale");
    let (mut y, mut states) = (Vec::new(), Vec::new());
    for (b, image) in q.get("input.x").chunks_exact(n * c).enumerate() {
        let project = |name: &str| -> Vec<Vec<f64>> { image.chunks_exact(c).map(|x| q.linear(name, x)).collect() };
        let (qs, ks, vs, gs) = (project("q_proj"), project("k_proj"), project("v_proj"), project("g_proj"));
        let mut z = vec![vec![0.0; e]; n];
        for head in 0..h {
            let cut = |x: &[Vec<f64>], width: usize| -> Vec<Vec<f64>> {
                x.iter().map(|x| x[head * width..(head + 1) * width].to_vec()).collect()
            };
            let turn = |x: Vec<Vec<f64>>| -> Vec<Vec<f64>> {
                x.iter().enumerate().map(|(i, x)| turned(x, q.usize("offset") + i, rotary)).collect()
            };
            let mut keys = turn(cut(&ks, dk));
            keys.iter_mut().flatten().for_each(|k| *k /= (dk as f64).sqrt());
            let state = if q.has("input.state") {
                let from = (b * h + head) * dk * dv;
                q.get("input.state")[from..from + dk * dv].chunks_exact(dv).map(<[f64]>::to_vec).collect()
            } else {
                vec![vec![0.0; dv]; dk]
            };
            let gamma = 1.0 - 2f64.powi(-5 - head as i32);
            let mut one = Head { q: turn(cut(&qs, dk)), k: keys, v: cut(&vs, dv), gamma, state };
            let out = match text("form") {
                "parallel" => one.parallel(rescale),
                "recurrent" => one.recurrent(rescale),
                _ => one.chunkwise(q.usize("chunk_size"), rescale),
            };
            states.extend(one.state.into_iter().flatten());
            for (i, o) in out.iter().enumerate() {
                let mean = if text("norm") == "layer" { o.iter().sum::<f64>() / dv as f64 } else { 0.0 };
                let size = (o.iter().map(|o| (o - mean).powi(2)).sum::<f64>() / dv as f64 + eps).sqrt();
                for (j, o) in o.iter().enumerate() {
                    let g = gs[i][head * dv + j];
                    let act = match text("gate") {
                        "gelu" => g / 2.0 * (1.0 + libm::erf(g / 2f64.sqrt())),
                        _ => g / (1.0 + (-g).exp()),
                    };
                    z[i][head * dv + j] = act * (o - mean) / size;
                }
            }
        }
        z.iter().for_each(|z| y.extend(q.linear("out_proj", z)));
    }
    if rescale { vec![("y", y)] } else { vec![("y", y), ("state", states)] }
}

#[test]
fn agrees_with_plain_loops() {
    against_oracle(OP, oracle);
}

fn ask(config: &Config, tensors: &Tensors<f64>) -> Vec<(String, Vec<f64>)> {
    let outputs = answer(OP, config, tensors).into_iter().filter_map(|(name, value)| match value {
        Value::Float(t) => Some((name, t.data().to_vec())),
        Value::Int(_) => None,
    });
    outputs.collect()
}

fn assert_same(at: &str, found: &[(String, Vec<f64>)], expected: &[(String, Vec<f64>)]) {
    for ((name, found), (_, expected)) in found.iter().zip(expected) {
        assert_close(&format!("{at}: {name}"), found, expected);
    }
}

/// Tokens `from..to` of every sequence.
fn tokens_of(x: &[f64], [n, c]: [usize; 2], from: usize, to: usize) -> Vec<f64> {
    x.chunks_exact(n * c).flat_map(|image| image[from * c..to * c].to_vec()).collect()
}

#[test]
fn forms_agree_without_rescaling_and_sequences_split_anywhere() {
    for_seeds(OP, |q, at| {
        if q.config.str("normalize").unwrap() == "torchscale" {
            return;
        }
        let all = ask(&q.config, &q.case.question());
        for (form, chunk) in [("parallel", 1), ("recurrent", 1), ("chunkwise", 1), ("chunkwise", 3), ("chunkwise", 100)] {
            let mut config = q.config.clone();
            config.set("form", form).set("chunk_size", chunk);
            assert_same(&format!("{at} as {form} {chunk}"), &ask(&config, &q.case.question()), &all);
        }
        let dims = q.dims("input.x");
        let (n, c) = (dims[1], dims[2]);
        if n < 2 {
            return;
        }
        let (cut, x) = (1 + n % (n - 1), q.get("input.x"));
        let (mut config, mut tensors) = (q.config.clone(), q.case.question());
        let part = |from: usize, to: usize| value(&[dims[0], to - from, c], &tokens_of(x, [n, c], from, to));
        tensors.insert("input.x".into(), part(0, cut));
        let first = answer(OP, &config, &tensors);
        tensors.insert("input.x".into(), part(cut, n));
        tensors.insert("input.state".into(), first["output.state"].clone());
        config.set("offset", q.usize("offset") + cut).set("form", "recurrent");
        let second = ask(&config, &tensors);
        let rest = tokens_of(&all[1].1, [n, c], cut, n);
        assert_close(&format!("{at}: second part"), &second[1].1, &rest);
        assert_close(&format!("{at}: state after both"), &second[0].1, &all[0].1);
    });
}

#[test]
fn rescaling_and_the_size_of_v_cancel_in_an_exact_norm() {
    for_seeds(OP, |q, at| {
        if q.has("input.state") || q.config.str("norm").unwrap() == "layer" {
            return;
        }
        let (mut config, mut tensors) = (q.config.clone(), q.case.question());
        config.set("eps", 0.0).set("normalize", "none").set("form", "parallel");
        let plain = ask(&config, &tensors);
        let y = |results: &[(String, Vec<f64>)]| results.last().map(|(_, y)| y.clone()).unwrap_or_default();
        let n = q.dims("input.x")[1];
        config.set("normalize", "torchscale");
        for (form, chunk) in [("parallel", 1), ("recurrent", 1), ("chunkwise", n), ("chunkwise", 1)] {
            config.set("form", form).set("chunk_size", chunk);
            assert_close(&format!("{at} rescaled, {form}"), &y(&ask(&config, &tensors)), &y(&plain));
        }
        let larger: Vec<f64> = q.get("param.v_proj.weight").iter().map(|w| 3.0 * w).collect();
        tensors.insert("param.v_proj.weight".into(), value(&q.dims("param.v_proj.weight"), &larger));
        assert_close(&format!("{at}: three times v"), &y(&ask(&config, &tensors)), &y(&plain));
    });
}

/// Several blocks per chunk, chunks per segment, segments per head.
#[test]
fn long_sequences_agree_with_plain_loops() {
    for (seed, form, chunk, normalize) in [
        (1, "chunkwise", 64, "none"),
        (2, "chunkwise", 150, "none"),
        (3, "parallel", 1, "none"),
        (4, "chunkwise", 10, "torchscale"),
        (5, "parallel", 1, "torchscale"),
        (6, "recurrent", 1, "torchscale"),
    ] {
        let mut q = crate::common::question(OP, seed);
        q.config.set("form", form).set("chunk_size", chunk).set("normalize", normalize);
        let length = if (form, normalize) == ("chunkwise", "torchscale") { ("chunks", 19) } else { ("tokens", 190) };
        let sizes = [("batch", 1), length].map(|(name, n)| (name.to_string(), n)).into();
        let op = karat::case::find(OP).unwrap();
        q.case = karat::case::new_case(op, Some(q.config.clone()), seed, sizes).unwrap();
        for (name, expected) in oracle(&q) {
            assert_close(&format!("{form} {chunk} {normalize}: {name}"), q.get(&format!("output.{name}")), &expected);
        }
    }
}

/// Gradients of the recurrent form, which runs backward in chunks, against differences along the sequence's own direction.
#[test]
fn long_sequences_have_the_right_slope() {
    let op = karat::case::find(OP).unwrap();
    for seed in 0..4u64 {
        let mut config = crate::common::question(OP, seed).config;
        config.set("normalize", "none").set("form", "chunkwise").set("chunk_size", 16 + seed as usize);
        let sizes = [("batch".to_string(), 1), ("tokens".to_string(), 200)].into();
        let case = karat::case::new_case(op, Some(config), seed, sizes).unwrap();
        let float = |name: &str| match &case.tensors[name] {
            Value::Float(t) => t.data().to_vec(),
            Value::Int(_) => panic!("{name} holds integers"),
        };
        for name in ["input.x", "param.q_proj.weight", "param.k_proj.weight", "param.v_proj.weight"] {
            let (x, grad) = (float(name), float(&format!("grad.{name}")));
            let direction: Vec<f64> = (0..x.len()).map(|i| ((i * 7919 + 13) % 101) as f64 / 50.0 - 1.0).collect();
            let objective = |t: f64| -> f64 {
                let mut tensors = case.question();
                let moved: Vec<f64> = x.iter().zip(&direction).map(|(x, d)| x + t * d).collect();
                tensors.insert(name.into(), value(&case.tensors[name].shape(), &moved));
                ask(&case.config, &tensors).iter().map(|(n, y)| dot(y, &float(&n.replace("output", "cotangent")))).sum()
            };
            let h = 1e-5;
            let slope = (8.0 * (objective(h) - objective(-h)) - (objective(2.0 * h) - objective(-2.0 * h))) / (12.0 * h);
            let expected = dot(&grad, &direction);
            assert!((slope - expected).abs() < 1e-5 * expected.abs().max(1.0), "{name}, seed {seed}: {slope} by differences, {expected}");
        }
    }
}
