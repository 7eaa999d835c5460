//! `attention.cluster`.

use karat::case::Value;

use crate::common::{Question, against_oracle, answer, assert_close, dot, for_seeds};

const OP: &str = "attention.cluster";

fn map(q: &Question) -> ([usize; 4], [usize; 2]) {
    let dims = q.dims("input.x");
    let folds = [q.usize("fold_w"), q.usize("fold_h")];
    ([dims[0], dims[1], dims[2], dims[3]], if folds[0] > 1 && folds[1] > 1 { folds } else { [1, 1] })
}

/// `x[b, :, i, j]`.
fn pixel(x: &[f64], [_, c, h, w]: [usize; 4], b: usize, i: usize, j: usize) -> Vec<f64> {
    (0..c).map(|e| x[((b * c + e) * h + i) * w + j]).collect()
}

fn unit(x: &[f64]) -> Vec<f64> {
    let norm = dot(x, x).sqrt().max(1e-12);
    x.iter().map(|x| x / norm).collect()
}

/// The definition, with the dense `[centres, points]` table of similarities.
fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (dims @ [batch, _, height, width], folds) = map(q);
    let (heads, d, proposals) = (q.usize("heads"), q.usize("head_dim"), [q.usize("proposal_w"), q.usize("proposal_h")]);
    let (alpha, beta) = (q.get("param.sim_alpha")[0], q.get("param.sim_beta")[0]);
    let return_center = q.config.bool("return_center").unwrap();
    let region = [height / folds[0], width / folds[1]];
    let out_map = if return_center { [folds[0] * proposals[0], folds[1] * proposals[1]] } else { [height, width] };
    let mut inner = vec![vec![0.0; heads * d]; batch * out_map[0] * out_map[1]];
    for b in 0..batch {
        for (fy, fx) in (0..folds[0]).flat_map(|fy| (0..folds[1]).map(move |fx| (fy, fx))) {
            let places: Vec<[usize; 2]> = (0..region[0])
                .flat_map(|r| (0..region[1]).map(move |c| [r, c]))
                .map(|[r, c]| [fy * region[0] + r, fx * region[1] + c])
                .collect();
            for head in 0..heads {
                let of = |name: &str| -> Vec<Vec<f64>> {
                    let all = places.iter().map(|&[i, j]| q.linear(name, &pixel(q.get("input.x"), dims, b, i, j)));
                    all.map(|row| row[head * d..(head + 1) * d].to_vec()).collect()
                };
                let (f, v) = (of("f"), of("v"));
                let mut centers = Vec::new();
                for (i, j) in (0..proposals[0]).flat_map(|i| (0..proposals[1]).map(move |j| (i, j))) {
                    let within = |k: usize, cell: usize, axis: usize| {
                        let edge = |c: f64| c * region[axis] as f64 / proposals[axis] as f64;
                        (k as f64) >= edge(cell as f64).floor() && (k as f64) < edge(cell as f64 + 1.0).ceil()
                    };
                    let members: Vec<usize> = (0..f.len()).filter(|n| within(n / region[1], i, 0) && within(n % region[1], j, 1)).collect();
                    let mean = |x: &[Vec<f64>]| -> Vec<f64> {
                        (0..d).map(|e| members.iter().map(|&n| x[n][e]).sum::<f64>() / members.len() as f64).collect()
                    };
                    centers.push((mean(&f), mean(&v)));
                }
                let similar = |m: usize, n: usize| 1.0 / (1.0 + (-(beta + alpha * dot(&unit(&centers[m].0), &unit(&f[n])))).exp());
                let best: Vec<usize> =
                    (0..f.len()).map(|n| (1..centers.len()).fold(0, |a, m| if similar(m, n) > similar(a, n) { m } else { a })).collect();
                let mut gathered = Vec::new();
                for (m, (_, value)) in centers.iter().enumerate() {
                    let (mut sum, mut z) = (value.clone(), 1.0);
                    for n in (0..f.len()).filter(|&n| best[n] == m) {
                        sum.iter_mut().zip(&v[n]).for_each(|(s, v)| *s += similar(m, n) * v);
                        z += if q.config.str("denominator").unwrap() == "sim" { similar(m, n) } else { 1.0 };
                    }
                    gathered.push(sum.iter().map(|s| s / z).collect::<Vec<f64>>());
                }
                let mut put = |i: usize, j: usize, x: &[f64], factor: f64| {
                    let row = &mut inner[(b * out_map[0] + i) * out_map[1] + j][head * d..(head + 1) * d];
                    row.iter_mut().zip(x).for_each(|(o, x)| *o = factor * x);
                };
                if return_center {
                    for (m, g) in gathered.iter().enumerate() {
                        put(fy * proposals[0] + m / proposals[1], fx * proposals[1] + m % proposals[1], g, 1.0);
                    }
                } else {
                    for (n, &[i, j]) in places.iter().enumerate() {
                        put(i, j, &gathered[best[n]], similar(best[n], n));
                    }
                }
            }
        }
    }
    let (out_dim, places) = (q.usize("out_dim"), out_map[0] * out_map[1]);
    let mut y = vec![0.0; batch * out_dim * places];
    for (k, row) in inner.iter().enumerate() {
        for (c, x) in q.linear("proj", row).into_iter().enumerate() {
            y[(k / places * out_dim + c) * places + k % places] = x;
        }
    }
    vec![("y", y)]
}

#[test]
fn agrees_with_plain_loops() {
    against_oracle(OP, oracle);
}

fn y(q: &Question, config: &karat::case::Config) -> Vec<f64> {
    let Value::Float(y) = &answer(OP, config, &q.case.question())["output.y"] else { panic!("y holds integers") };
    y.data().to_vec()
}

#[test]
fn one_fold_of_one_is_no_fold_at_all() {
    for_seeds(OP, |q, at| {
        let (mut one, mut none) = (q.config.clone(), q.config.clone());
        one.set("fold_w", 7).set("fold_h", 1);
        none.set("fold_w", 1).set("fold_h", 1);
        assert_close(at, &y(q, &one), &y(q, &none));
    });
}

/// Every point is its own centre: `o = σ(α + β) v`.
#[test]
fn a_centre_per_point_returns_the_values() {
    for_seeds(OP, |q, at| {
        let ([batch, _, height, width], _) = map(q);
        if q.get("param.sim_alpha")[0] <= 0.0 {
            return;
        }
        let mut config = q.config.clone();
        config.set("fold_w", 1).set("fold_h", 1).set("proposal_w", height).set("proposal_h", width);
        config.set("return_center", false).set("denominator", "sim");
        let s = 1.0 / (1.0 + (-q.get("param.sim_alpha")[0] - q.get("param.sim_beta")[0]).exp());
        let (dims, n, out) = (map(q).0, height * width, q.usize("out_dim"));
        let mut expected = vec![0.0; batch * out * n];
        for (b, i) in (0..batch).flat_map(|b| (0..n).map(move |i| (b, i))) {
            let v = q.linear("v", &pixel(q.get("input.x"), dims, b, i / width, i % width));
            let o: Vec<f64> = v.iter().map(|v| s * v).collect();
            for (c, x) in q.linear("proj", &o).into_iter().enumerate() {
                expected[(b * out + c) * n + i] = x;
            }
        }
        assert_close(at, &y(q, &config), &expected);
    });
}
