//! GreenMIM's promise: grouped, ragged and masked-dense attention are one function.
//!
//! karat runs the ragged form. Here the other two are written out from the definition, in plain loops, and must agree with it in
//! float64 on random visible sets; with all tokens visible they must also agree with Swin's rolled and masked windows.

use std::collections::BTreeMap;

use karat::case::{Case, Value, find, new_case};
use karat::grouping::{Mode, Plan, Rule, plan};

struct Question {
    x: Vec<f64>,
    y: Vec<f64>,
    batch: usize,
    tokens: usize,
    dim: usize,
    heads: usize,
    scale: f64,
    window: usize,
    shift: usize,
    params: BTreeMap<String, Vec<f64>>,
}

impl Question {
    fn new(case: &Case) -> Question {
        let floats = |name: &str| match &case.tensors[name] {
            Value::Float(t) => t.data().to_vec(),
            Value::Int(t) => t.data.iter().map(|&x| x as f64).collect(),
        };
        let shape = case.tensors["input.x"].shape();
        let config = &case.config;
        let (dim, heads) = (config.usize("dim").unwrap(), config.usize("num_heads").unwrap());
        let params = case.tensors.keys().filter_map(|n| n.strip_prefix("param.")).map(|n| (n.to_string(), floats(&format!("param.{n}"))));
        Question {
            x: floats("input.x"),
            y: floats("output.y"),
            batch: shape[0],
            tokens: shape[1],
            dim,
            heads,
            scale: config.f64_or("qk_scale", ((dim / heads) as f64).powf(-0.5)).unwrap(),
            window: config.usize("window_size").unwrap(),
            shift: config.usize("shift_size").unwrap(),
            params: params.collect(),
        }
    }

    fn linear(&self, name: &str, x: &[f64], outputs: usize) -> Vec<f64> {
        let weight = &self.params[&format!("{name}.weight")];
        let bias = self.params.get(&format!("{name}.bias"));
        let row = |o: usize| {
            let dot: f64 = x.iter().zip(&weight[o * x.len()..]).map(|(a, b)| a * b).sum();
            dot + bias.map_or(0.0, |b| b[o])
        };
        (0..outputs).map(row).collect()
    }

    /// Attention of query row `i` of image `b` over keys `(row, additive logit per head)`; then the output projection.
    fn attend(&self, b: usize, i: usize, keys: &[(usize, Vec<f64>)]) -> Vec<f64> {
        let (c, d) = (self.dim, self.dim / self.heads);
        let qkv = |row: usize| self.linear("qkv", &self.x[(b * self.tokens + row) * c..(b * self.tokens + row + 1) * c], 3 * c);
        let query = qkv(i);
        let others: Vec<Vec<f64>> = keys.iter().map(|k| qkv(k.0)).collect();
        let mut out = vec![0.0; c];
        for h in 0..self.heads {
            let scores: Vec<f64> = keys
                .iter()
                .zip(&others)
                .map(|((_, logit), k)| (0..d).map(|j| query[h * d + j] * k[c + h * d + j]).sum::<f64>() * self.scale + logit[h])
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (w, k) in weights.iter().zip(&others) {
                for j in 0..d {
                    out[h * d + j] += w / total * k[2 * c + h * d + j];
                }
            }
        }
        self.linear("proj", &out, c)
    }

    fn bias(&self, row: i64) -> Vec<f64> {
        match self.params.get("relative_position_bias_table") {
            Some(table) => table[row as usize * self.heads..(row as usize + 1) * self.heads].to_vec(),
            None => vec![0.0; self.heads],
        }
    }

    /// The table's row for a query and a key `(row, column)` of one window.
    fn offset(&self, query: [usize; 2], key: [usize; 2]) -> i64 {
        let m = self.window as i64;
        (query[0] as i64 - key[0] as i64 + m - 1) * (2 * m - 1) + query[1] as i64 - key[1] as i64 + m - 1
    }

    fn check(&self, what: &str, seed: u64, answer: impl Fn(usize, usize) -> Vec<f64>) {
        for b in 0..self.batch {
            for i in 0..self.tokens {
                let at = (b * self.tokens + i) * self.dim;
                for (j, (want, got)) in answer(b, i).iter().zip(&self.y[at..at + self.dim]).enumerate() {
                    assert!(
                        (want - got).abs() <= 1e-11 * (1.0 + want.abs()),
                        "{what}, seed {seed}, element [{b}, {i}, {j}]: {want} ≠ {got}"
                    );
                }
            }
        }
    }
}

fn cases() -> u64 {
    std::env::var("KARAT_SOAK_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(256)
}

#[test]
fn grouped_and_masked_dense_agree_with_ragged() {
    let op = find("attention.group_window").unwrap();
    for seed in 0..cases() {
        let case = new_case(op, None, seed, BTreeMap::new()).unwrap();
        let q = Question::new(&case);
        let Value::Int(coords) = &case.tensors["input.coords"] else { panic!("coords are integers") };
        let coords: Vec<[usize; 2]> = coords.data.chunks(2).map(|c| [c[0] as usize, c[1] as usize]).collect();
        let (m, o) = (q.window, (q.window - q.shift) % q.window);
        let window = |t: usize| coords[t].map(|x| (x + o) / m);

        // Every token over all tokens, those of other windows masked out.
        q.check("masked dense", seed, |b, i| {
            let seen = (0..q.tokens).filter(|&j| window(i) == window(j));
            q.attend(b, i, &seen.map(|j| (j, q.bias(q.offset(coords[i], coords[j])))).collect::<Vec<_>>())
        });

        // The paper's batching: groups of windows of equal length, padding, −100 between windows.
        for (mode, rule) in [(Mode::Grouping, Rule::Max), (Mode::Grouping, Rule::Paper), (Mode::Masking, Rule::Max)] {
            let plan: Plan = plan(&coords, m, q.shift, mode, rule, q.dim).unwrap();
            let g = plan.grouping.group_size;
            q.check("grouped", seed, |b, i| {
                let position = plan.idx_unshuffle[i] as usize;
                assert_eq!(plan.idx_shuffle[position] as usize, i, "seed {seed}");
                let (group, row) = (position / g, position % g);
                let keys: Vec<_> = (0..g)
                    .map(|k| {
                        let (pair, token) = ((group * g + row) * g + k, plan.idx_shuffle[group * g + k] as usize);
                        let mask = plan.attn_mask[pair];
                        let logit = if mask == 0.0 { q.bias(i64::from(plan.rel_pos_idx[pair])) } else { vec![mask; q.heads] };
                        (token, logit)
                    })
                    .collect();
                q.attend(b, i, &keys)
            });
        }
    }
}

#[test]
fn rolled_and_masked_windows_agree_with_cut_windows() {
    let op = find("attention.window").unwrap();
    let mut checked = 0;
    for seed in 0..2 * cases() {
        let case = new_case(op, None, seed, BTreeMap::new()).unwrap();
        if case.config.bool("pad").unwrap() {
            continue;
        }
        checked += 1;
        let q = Question::new(&case);
        let (height, width) = (case.config.usize("height").unwrap(), case.config.usize("width").unwrap());
        let (m, s) = (q.window, q.shift);
        let label = |at: usize, n: usize| if s == 0 || at < n - m { 0 } else { 1 + usize::from(at >= n - s) };
        let rolled = |t: usize| [(t / width + height - s) % height, (t % width + width - s) % width];
        q.check("rolled", seed, |b, i| {
            let [r, c] = rolled(i);
            let seen = (0..q.tokens).filter(|&j| rolled(j).map(|x| x / m) == [r / m, c / m]);
            let keys = seen.map(|j| {
                let [kr, kc] = rolled(j);
                let mask = if (label(r, height), label(c, width)) == (label(kr, height), label(kc, width)) { 0.0 } else { -100.0 };
                (j, q.bias(q.offset([r, c], [kr, kc])).iter().map(|x| x + mask).collect())
            });
            q.attend(b, i, &keys.collect::<Vec<_>>())
        });
    }
    assert!(checked > 0);
}
