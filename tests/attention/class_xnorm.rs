//! `attention.class_xnorm`.

use crate::common::{Question, against_oracle};
use crate::xnorm::mix;

fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (x, n, c) = (q.get("input.x"), q.dims("input.x")[1], q.usize("dim"));
    let (e, h) = (q.usize("attn_dim"), q.usize("num_heads"));
    let d = e / h;
    let mut y = Vec::new();
    for image in x.chunks_exact(n * c) {
        let query = q.linear("q", &image[..c]);
        let [keys, values] = ["k", "v"].map(|name| image.chunks_exact(c).map(|token| q.linear(name, token)).collect::<Vec<_>>());
        let out: Vec<f64> = (0..h)
            .flat_map(|head| {
                let at = head * d..(head + 1) * d;
                let of = |rows: &'_ [Vec<f64>]| rows.iter().map(|row| row[at.clone()].to_vec()).collect::<Vec<_>>();
                let (k, v) = (of(&keys), of(&values));
                let (k, v): (Vec<&[f64]>, Vec<&[f64]>) = (k.iter().map(|k| &k[..]).collect(), v.iter().map(|v| &v[..]).collect());
                mix(q, head, &query[at.clone()], &k, &v)
            })
            .collect();
        y.extend(q.linear("proj", &out));
    }
    vec![("y", y)]
}

#[test]
fn agrees_with_plain_loops() {
    against_oracle("attention.class_xnorm", oracle);
}
