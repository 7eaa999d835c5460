//! The softmax core with every term, grouping and division of work, forward and backward.

use karat::kernel::attention::{
    Bias, Factor, FactorTable, Groups, Mask, Operand, Side, Sizes, TermGradients, Terms, backward_with, forward_with,
};
use karat::linalg::ColumnsMut;
use karat::tensor::random::{Purpose, Rng};

use crate::common::{assert_close, dot, softmax};

/// Groups of random sizes over shuffled tokens, or one group of all in order.
fn groups(rng: &mut Rng, queries: usize, keys: usize, count: usize) -> Groups {
    if count == 1 {
        return Groups::all(queries, keys);
    }
    let side = |rng: &mut Rng, n: usize| {
        let mut offsets: Vec<u32> = (0..count - 1).map(|_| rng.below(n + 1) as u32).chain([0, n as u32]).collect();
        offsets.sort_unstable();
        let mut list = || rng.permutation(n).into_iter().map(|t| t as u32).collect();
        Side { offsets, tokens: list(), positions: list() }
    };
    Groups { queries: side(rng, queries), keys: side(rng, keys), zero_tokens: 0 }
}

/// `(image, group, query, keys)` of every query.
fn each_query(groups: &Groups, batch: usize, mut visit: impl FnMut(usize, usize, usize, std::ops::Range<usize>)) {
    let range = |side: &Side, g: usize| side.offsets[g] as usize..side.offsets[g + 1] as usize;
    for b in 0..batch {
        for g in 0..groups.queries.offsets.len() - 1 {
            range(&groups.queries, g).for_each(|i| visit(b, g, i, range(&groups.keys, g)));
        }
    }
}

fn check(seed: u64, [batch, heads, dim, value_dim]: [usize; 4], [gh, gw]: [usize; 2], prefix: usize, group_count: usize) {
    let mut rng = Rng::new(seed, Purpose::Case, 77, 0);
    let n = gh * gw + prefix;
    let at = format!("seed {seed}: {batch} images, {heads} heads, {dim} and {value_dim} wide, {n} tokens, {group_count} groups");
    let groups = groups(&mut rng, n, n, group_count);
    let mut normal = |len: usize| -> Vec<f64> { (0..len).map(|_| rng.normal()).collect() };
    let scale = 0.7;
    let (q, k, v) = (normal(batch * n * heads * dim), normal(batch * n * heads * dim), normal(batch * n * heads * value_dim));
    let d_out = normal(batch * n * heads * value_dim);
    let (bias, mask) = (normal(heads * n * n), normal(3 * n * n));
    let kind = seed % 4;
    let side = gh * gw;
    let factor = normal(match kind {
        0 => heads * side * side,
        1 => side * side,
        _ => heads * side,
    });
    let (with_bias, with_mask, with_factor) = (seed.is_multiple_of(3), seed.is_multiple_of(2), kind < 3);
    let terms = Terms {
        factor: with_factor.then(|| Factor {
            prefix,
            table: match kind {
                0 => FactorTable::Dense { data: &factor, side, shared: false },
                1 => FactorTable::Dense { data: &factor, side, shared: true },
                _ => FactorTable::Distance { data: &factor, grid: [gh, gw] },
            },
        }),
        bias: with_bias.then_some(Bias { data: &bias, side: n }),
        mask: with_mask.then_some(Mask { data: &mask, count: 3, side: n }),
    };
    let factor_index = |a: usize, i: usize, j: usize| -> Option<usize> {
        let (i, j) = (i.checked_sub(prefix)?, j.checked_sub(prefix)?);
        Some(match kind {
            0 => (a * side + i) * side + j,
            1 => i * side + j,
            _ => (a * gh + (i / gw).abs_diff(j / gw)) * gw + (i % gw).abs_diff(j % gw),
        })
    };
    let sizes = Sizes { batch, heads, dim, value_dim, queries: n, keys: n, scale };
    let operand = |data, width| Operand { data, stride: heads * width, offset: 0 };
    let qkv = [operand(&q[..], dim), operand(&k, dim), operand(&v, value_dim)];
    let (mut out, mut stats) = (vec![0.0; d_out.len()], vec![0.0; batch * heads * n * 2]);
    forward_with(&mut out, &mut stats, qkv, terms, &groups, sizes);
    let [mut dq, mut dk, mut dv, mut d_bias, mut d_factor] = [&q, &k, &v, &bias, &factor].map(|x| vec![0.0; x.len()]);
    let grads = [ColumnsMut::new(&mut dq, heads * dim), ColumnsMut::new(&mut dk, heads * dim), ColumnsMut::new(&mut dv, heads * value_dim)];
    let term_grads = TermGradients { factor: Some(&mut d_factor), bias: Some(&mut d_bias) };
    backward_with(grads, term_grads, [&d_out, &out, &stats], qkv, terms, &groups, sizes);

    // One query after the other.
    let [mut out_, mut dq_, mut dk_, mut dv_, mut d_bias_, mut d_factor_] =
        [&d_out, &q, &k, &v, &bias, &factor].map(|x| vec![0.0; x.len()]);
    let group_total = groups.queries.offsets.len() - 1;
    each_query(&groups, batch, |b, g, i, keys| {
        let (i, qi) = (groups.queries.tokens[i] as usize, groups.queries.positions[i] as usize);
        for a in 0..heads {
            let row = |token: usize, width: usize| {
                let from = ((b * n + token) * heads + a) * width;
                from..from + width
            };
            let pairs: Vec<(usize, usize)> =
                keys.clone().map(|j| (groups.keys.tokens[j] as usize, groups.keys.positions[j] as usize)).collect();
            let f = |kj: usize| if with_factor { factor_index(a, qi, kj).map_or(1.0, |at| factor[at]) } else { 1.0 };
            let raw: Vec<f64> = pairs.iter().map(|&(j, _)| scale * dot(&q[row(i, dim)], &k[row(j, dim)])).collect();
            let logits: Vec<f64> = (pairs.iter().zip(&raw))
                .map(|(&(_, kj), s)| {
                    let bias = if with_bias { bias[(a * n + qi) * n + kj] } else { 0.0 };
                    let mask = if with_mask { mask[((b * group_total + g) % 3 * n + qi) * n + kj] } else { 0.0 };
                    f(kj) * s + bias + mask
                })
                .collect();
            let p = softmax(&logits);
            let d_o = &d_out[row(i, value_dim)];
            for (&(j, _), p) in pairs.iter().zip(&p) {
                for (c, (o, dv)) in out_[row(i, value_dim)].iter_mut().zip(&mut dv_[row(j, value_dim)]).enumerate() {
                    *o += p * v[row(j, value_dim)][c];
                    *dv += p * d_o[c];
                }
            }
            let delta = dot(&out_[row(i, value_dim)], d_o);
            for ((&(j, kj), p), raw) in pairs.iter().zip(&p).zip(&raw) {
                let dz = p * (dot(d_o, &v[row(j, value_dim)]) - delta);
                d_bias_[(a * n + qi) * n + kj] += if with_bias { dz } else { 0.0 };
                if let (Some(at), true) = (factor_index(a, qi, kj), with_factor) {
                    d_factor_[at] += dz * raw;
                }
                for c in 0..dim {
                    dq_[row(i, dim)][c] += scale * dz * f(kj) * k[row(j, dim)][c];
                    dk_[row(j, dim)][c] += scale * dz * f(kj) * q[row(i, dim)][c];
                }
            }
        }
    });
    let all = [("out", out, out_), ("dq", dq, dq_), ("dk", dk, dk_), ("dv", dv, dv_), ("d_bias", d_bias, d_bias_)];
    for (name, mut found, mut expected) in all.into_iter().chain([("d_factor", d_factor, d_factor_)]) {
        // Something to be relative to where all gradients vanish.
        found.push(1.0);
        expected.push(1.0);
        assert_close(&format!("{at}: {name}"), &found, &expected);
    }
}

#[test]
fn agrees_with_plain_loops() {
    let cases = std::env::var("KARAT_SOAK_CASES").map_or(128, |n| n.parse().expect("KARAT_SOAK_CASES is a number"));
    for seed in 0..cases {
        let mut rng = Rng::new(seed, Purpose::Case, 78, 0);
        let sizes = [rng.between(1, 3), rng.between(1, 10), rng.between(1, 6), rng.between(1, 6)];
        let (grid, prefix, count) = ([rng.between(1, 6), rng.between(1, 6)], rng.below(3), rng.between(1, 9));
        check(seed, sizes, grid, prefix, if rng.chance(0.5) { 1 } else { count });
    }
}

/// Several blocks of queries and keys, few heads: the work of a head is shared out.
#[test]
fn agrees_with_plain_loops_for_many_tokens() {
    for seed in 0..4 {
        check(seed, [1, 1 + seed as usize % 3, 3, 2], [23, 25 - seed as usize], seed as usize % 2, 1 + seed as usize / 3 * 4);
    }
}
