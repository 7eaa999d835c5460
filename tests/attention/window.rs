//! `attention.window`: karat cuts shifted windows apart at the border; the papers roll the map and mask.

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds, softmax};

const OP: &str = "attention.window";

/// The parts that window attentions share: projections of all tokens, offsets in a window, the bias table.
pub struct Windowed<'a> {
    q: &'a Question,
    qkv: Vec<Vec<f64>>,
    pub tokens: usize,
    pub window: usize,
    pub shift: usize,
    pub heads: usize,
}

impl<'a> Windowed<'a> {
    pub fn new(q: &'a Question) -> Self {
        let qkv = q.get("input.x").chunks_exact(q.usize("dim")).map(|token| q.linear("qkv", token)).collect();
        let (window, shift) = (q.usize("window_size"), q.usize("shift_size"));
        Windowed { q, qkv, tokens: q.dims("input.x")[1], window, shift, heads: q.usize("num_heads") }
    }

    /// Query row `i` of image `b` over keys, each a row of the image (none: a padded zero token) and a logit per head to add.
    pub fn attend(&self, b: usize, i: usize, keys: &[(Option<usize>, Vec<f64>)]) -> Vec<f64> {
        let c = self.q.usize("dim");
        let d = c / self.heads;
        let scale = self.q.config.f64_or("qk_scale", 0.0).unwrap();
        let scale = if scale == 0.0 { (d as f64).powf(-0.5) } else { scale };
        let zero = self.q.linear("qkv", &vec![0.0; c]);
        let row = |token: Option<usize>| token.map_or(&zero, |t| &self.qkv[b * self.tokens + t]);
        let mut out = vec![0.0; c];
        for h in 0..self.heads {
            let part = |token, part: usize| &row(token)[part * c + h * d..part * c + (h + 1) * d];
            let scores: Vec<f64> = keys.iter().map(|(k, logit)| dot(part(Some(i), 0), part(*k, 1)) * scale + logit[h]).collect();
            for (p, (k, _)) in softmax(&scores).into_iter().zip(keys) {
                out[h * d..(h + 1) * d].iter_mut().zip(part(*k, 2)).for_each(|(o, v)| *o += p * v);
            }
        }
        self.q.linear("proj", &out)
    }

    /// The logits of one row of the bias table: zeros where there is no table.
    pub fn bias(&self, row: i64) -> Vec<f64> {
        let name = "param.relative_position_bias_table";
        if !self.q.has(name) {
            return vec![0.0; self.heads];
        }
        self.q.get(name)[row as usize * self.heads..(row as usize + 1) * self.heads].to_vec()
    }

    /// The table's row for a query and a key (row, column) of one window.
    pub fn offset(&self, query: [usize; 2], key: [usize; 2]) -> i64 {
        let m = self.window as i64;
        (query[0] as i64 - key[0] as i64 + m - 1) * (2 * m - 1) + query[1] as i64 - key[1] as i64 + m - 1
    }

    /// The outputs of all tokens of all images, one after the other.
    pub fn all(&self, output: impl Fn(usize, usize) -> Vec<f64>) -> Vec<f64> {
        (0..self.q.dims("input.x")[0]).flat_map(|b| (0..self.tokens).flat_map(|i| output(b, i)).collect::<Vec<_>>()).collect()
    }
}

/// Rolled by the shift, cut into windows, −100 between tokens that the roll brought together. With `pad`, zero tokens fill up the rolled
/// map first, and the strips of the mask fall on them.
fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let w = Windowed::new(q);
    let (height, width, m, s) = (q.usize("height"), q.usize("width"), w.window, w.shift);
    let padded = [height, width].map(|side| side.next_multiple_of(m));
    let label = |at: usize, n: usize| if s == 0 || at < n - m { 0 } else { 1 + usize::from(at >= n - s) };
    // The token at a place of the rolled and padded map.
    let token = |[r, c]: [usize; 2]| (r < height && c < width).then(|| (r + s) % height * width + (c + s) % width);
    let places: Vec<[usize; 2]> = (0..padded[0] * padded[1]).map(|p| [p / padded[1], p % padded[1]]).collect();
    let y = w.all(|b, i| {
        let at = *places.iter().find(|at| token(**at) == Some(i)).expect("every token has a place");
        let seen = places.iter().filter(|k| k.map(|x| x / m) == at.map(|x| x / m));
        let keys = seen.map(|key| {
            let labels = |at: &[usize; 2]| [label(at[0], padded[0]), label(at[1], padded[1])];
            let mask = if labels(&at) == labels(key) { 0.0 } else { -100.0 };
            (token(*key), w.bias(w.offset(at, *key)).iter().map(|x| x + mask).collect())
        });
        w.attend(b, i, &keys.collect::<Vec<_>>())
    });
    vec![("y", y)]
}

#[test]
fn rolled_and_masked_windows_agree_with_cut_windows() {
    against_oracle(OP, oracle);
}

/// A window over the whole map without bias is plain attention.
#[test]
fn one_window_is_softmax_attention() {
    for_seeds(OP, |q, at| {
        if [q.usize("height"), q.usize("width")] != [q.usize("window_size"); 2] || q.config.get("qk_scale").is_some() {
            return;
        }
        let (mut config, mut tensors) = (q.config.clone(), q.case.question());
        config.set("shift_size", 0);
        let table = tensors.get_mut("param.relative_position_bias_table").expect("a table");
        let karat::case::Value::Float(t) = table else { panic!("{at}: the table holds integers") };
        t.data_mut().fill(0.25);
        let windowed = answer(OP, &config, &tensors);
        config.set("proj_bias", true).set("qk_norm", false);
        let plain = answer("attention.softmax", &config, &tensors);
        let [a, b] = [&windowed["output.y"], &plain["output.y"]].map(|y| match y {
            karat::case::Value::Float(y) => y.data().to_vec(),
            karat::case::Value::Int(_) => panic!("{at}: y holds integers"),
        });
        assert_close(at, &a, &b);
    });
}
