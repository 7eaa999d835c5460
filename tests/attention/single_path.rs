//! `attention.single_path` and `attention.single_path_window`: every branch head by head and offset by offset, and what relates them.

use crate::common::{Question, against_oracle, dot, softmax};

/// Row and column offset of the kernel position that column `p` of `head_probs` builds.
fn offset(p: usize, swin: bool) -> [isize; 2] {
    let q = match (swin, p) {
        (false, p) => p,
        (true, 0) => 4,
        (true, p) if p < 5 => p - 1,
        (true, p) => p,
    };
    [(q % 3) as isize - 1, (q / 3) as isize - 1]
}

/// The gates of a search: 1×1, 3×3, attention.
fn gates(q: &Question, name: &str) -> ([f64; 3], [f64; 3]) {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let (mut sampled, mut expected) = ([1.0; 3], [1.0; 3]);
    let (mut open, mut open_expected) = (true, true);
    for j in 0..3 {
        let p = sigmoid(q.get(&format!("param.{name}"))[j]);
        open_expected &= p > 0.5;
        open &= if q.has("input.u") {
            let u = q.get("input.u")[j];
            (u / (1.0 - u)).ln() + (p / (1.0 - p)).ln() > 0.0
        } else {
            p > 0.5
        };
        sampled[j] = f64::from(u8::from(open));
        expected[j] = f64::from(u8::from(open_expected));
    }
    (sampled, expected)
}

/// A bottleneck over maps of tokens.
fn convolution(q: &Question, kernel: usize, maps: &[Vec<f64>], [height, width]: [usize; 2], swin: bool) -> Vec<Vec<f64>> {
    let (c, h) = (q.usize("dim"), q.usize("num_heads"));
    let d = c / h;
    let columns: Vec<usize> = if kernel == 3 { (0..9).collect() } else { vec![if swin { 0 } else { 4 }] };
    let alpha = q.config.f64("alpha").unwrap();
    let probs = q.get("param.head_probs");
    let shares: Vec<Vec<f64>> = columns.iter().map(|p| softmax(&(0..h).map(|n| probs[n * 9 + p] / alpha).collect::<Vec<_>>())).collect();
    let (v, vb) = (q.get("param.v.weight"), q.get("param.v.bias"));
    let (proj, pb) = (q.get("param.proj.weight"), q.get("param.proj.bias"));
    // Before the norm: `[map][token][channel]`.
    let mut middle: Vec<Vec<Vec<f64>>> = Vec::new();
    for map in maps {
        let token = |t: usize| &map[t * c..(t + 1) * c];
        let of_token = |t: usize| -> Vec<f64> {
            let channel = |j: usize| {
                let mut sum = 0.0;
                for (&p, share) in columns.iter().zip(&shares) {
                    let [dy, dx] = offset(p, swin);
                    let (y, x) = ((t / width) as isize + dy, (t % width) as isize + dx);
                    let inside = (0..height as isize).contains(&y) && (0..width as isize).contains(&x);
                    for (n, s) in share.iter().enumerate() {
                        let row = n * d + j;
                        let seen = if inside { dot(&v[row * c..(row + 1) * c], token(y as usize * width + x as usize)) } else { 0.0 };
                        sum += s * (seen + vb[row]);
                    }
                }
                sum
            };
            (0..d).map(channel).collect()
        };
        middle.push((0..height * width).map(of_token).collect());
    }
    let norm = format!("bn_{kernel}x{kernel}");
    let (gamma, beta) = (q.get(&format!("param.{norm}.weight")), q.get(&format!("param.{norm}.bias")));
    for j in 0..d {
        let all: Vec<f64> = middle.iter().flatten().map(|row| row[j]).collect();
        let (mean, variance) = if q.config.bool("training").unwrap() {
            let mean = all.iter().sum::<f64>() / all.len() as f64;
            (mean, all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / all.len() as f64)
        } else {
            (q.get(&format!("buffer.{norm}.running_mean"))[j], q.get(&format!("buffer.{norm}.running_var"))[j])
        };
        for row in middle.iter_mut().flatten() {
            row[j] = ((row[j] - mean) / (variance + 1e-5).sqrt() * gamma[j] + beta[j]).max(0.0);
        }
    }
    let out_of = |row: &Vec<f64>| -> Vec<f64> {
        let channel = |k: usize| {
            let mut sum = pb[k];
            for share in &shares {
                for (n, s) in share.iter().enumerate() {
                    sum += s * dot(&proj[k * c + n * d..k * c + (n + 1) * d], row);
                }
            }
            sum
        };
        (0..c).map(channel).collect()
    };
    middle.iter().map(|rows| rows.iter().flat_map(out_of).collect()).collect()
}

/// Attention among the tokens of one group.
fn attention(q: &Question, tokens: &[f64], extra: impl Fn(usize, usize, usize) -> f64) -> Vec<f64> {
    let (c, h) = (q.usize("dim"), q.usize("num_heads"));
    let (n, d) = (tokens.len() / c, c / h);
    let qk: Vec<Vec<f64>> = tokens.chunks_exact(c).map(|x| q.linear("qk", x)).collect();
    let v: Vec<Vec<f64>> = tokens.chunks_exact(c).map(|x| q.linear("v", x)).collect();
    let mut y = Vec::new();
    for i in 0..n {
        let mut out = vec![0.0; c];
        for a in 0..h {
            let own = a * d..(a + 1) * d;
            let logit = |j: usize| dot(&qk[i][own.clone()], &qk[j][c + own.start..c + own.end]) / (d as f64).sqrt() + extra(a, i, j);
            for (j, p) in softmax(&(0..n).map(logit).collect::<Vec<_>>()).into_iter().enumerate() {
                out[own.clone()].iter_mut().zip(&v[j][own.clone()]).for_each(|(o, v)| *o += p * v);
            }
        }
        y.extend(q.linear("proj", &out));
    }
    y
}

fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let swin = q.config.get("window_size").is_some();
    let (dims, c, mode) = (q.dims("input.x"), q.usize("dim"), q.config.str("mode").unwrap());
    let (n, class) = (dims[1], usize::from(!swin));
    let map = match (swin, mode) {
        (false, _) => q.config.pair("grid").unwrap(),
        (true, "conv3x3") => [n.isqrt(); 2],
        (true, _) => [q.usize("window_size"); 2],
    };
    let images: Vec<&[f64]> = q.get("input.x").chunks_exact(n * c).collect();
    let maps: Vec<Vec<f64>> = images.iter().map(|x| x[class * c..].to_vec()).collect();
    let with_class =
        |maps: Vec<Vec<f64>>| -> Vec<f64> { maps.iter().zip(&images).flat_map(|(map, x)| [&x[..class * c], map].concat()).collect() };
    let conv = |kernel: usize| with_class(convolution(q, kernel, &maps, map, swin));
    let attend = || -> Vec<f64> {
        let group = |(b, x): (usize, &&[f64])| {
            attention(q, x, |a, i, j| {
                if !swin {
                    return 0.0;
                }
                let (w, h) = (map[0], q.usize("num_heads"));
                let row = (i / w + w - 1 - j / w) * (2 * w - 1) + i % w + w - 1 - j % w;
                let mask = match q.usize("num_windows") {
                    0 => 0.0,
                    count => q.get("input.mask")[(b % count * n + i) * n + j],
                };
                q.get("param.relative_position_bias_table")[row * h + a] + mask
            })
        };
        images.iter().enumerate().flat_map(group).collect()
    };
    match mode {
        "skip" => vec![("out", q.get("input.x").to_vec())],
        "conv1x1" => vec![("out", conv(1))],
        "conv3x3" => vec![("out", conv(3))],
        "msa" => vec![("out", attend())],
        _ => {
            let ([k0, k1, k2], expected) = gates(q, if swin { "kernel_thresholds_full" } else { "kernel_thresholds" });
            let (one, three, msa) = (conv(1), conv(3), attend());
            let mixed = (0..one.len()).map(|i| k2 * msa[i] + k1 * (1.0 - k2) * three[i] + k0 * (1.0 - k1) * (1.0 - k2) * one[i]).collect();
            vec![("out", mixed), ("kernel_indicators", expected.to_vec())]
        }
    }
}

#[test]
fn deit_layers_agree_with_plain_loops() {
    against_oracle("attention.single_path", oracle);
}

#[test]
fn window_layers_agree_with_plain_loops() {
    against_oracle("attention.single_path_window", oracle);
}
