//! `attention.group_window`. GreenMIM's promise: grouped, ragged and masked-dense attention are one function.
//!
//! karat runs the ragged form. Here the other two are written out from the definition, in plain loops, and must agree with it in float64 on
//! random visible sets; with all tokens visible it must also agree with Swin's windows.

use karat::case::{Value, find};
use karat::grouping::{Mode, Plan, Rule, plan};
use karat::tensor::IntTensor;

use crate::common::{Question, against_oracle, answer, assert_close, for_seeds};
use crate::window::Windowed;

const OP: &str = "attention.group_window";

fn coords(q: &Question) -> Vec<[usize; 2]> {
    q.ints("input.coords").chunks(2).map(|c| [c[0] as usize, c[1] as usize]).collect()
}

/// Every token over all tokens of its image, those of other windows left out.
fn masked_dense(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let (w, coords) = (Windowed::new(q), coords(q));
    let window = |t: usize| coords[t].map(|x| (x + (w.window - w.shift) % w.window) / w.window);
    let y = w.all(|b, i| {
        let seen = (0..w.tokens).filter(|&j| window(i) == window(j));
        w.attend(b, i, &seen.map(|j| (Some(j), w.bias(w.offset(coords[i], coords[j])))).collect::<Vec<_>>())
    });
    vec![("y", y)]
}

#[test]
fn masked_dense_agrees_with_ragged() {
    against_oracle(OP, masked_dense);
}

/// The paper's batching: groups of windows of equal length, padding, −100 between windows.
#[test]
fn grouped_agrees_with_ragged() {
    for (mode, rule) in [(Mode::Grouping, Rule::Max), (Mode::Grouping, Rule::Paper), (Mode::Masking, Rule::Max)] {
        against_oracle(OP, |q| {
            let w = Windowed::new(q);
            let plan: Plan = plan(&coords(q), w.window, w.shift, mode, rule, q.usize("dim")).unwrap();
            let g = plan.grouping.group_size;
            let y = w.all(|b, i| {
                let position = plan.idx_unshuffle[i] as usize;
                assert_eq!(plan.idx_shuffle[position] as usize, i, "{}", q.config.to_json());
                let (group, row) = (position / g, position % g);
                let key = |k: usize| {
                    let (pair, token) = ((group * g + row) * g + k, plan.idx_shuffle[group * g + k] as usize);
                    let mask = plan.attn_mask[pair];
                    let logit = if mask == 0.0 { w.bias(i64::from(plan.rel_pos_idx[pair])) } else { vec![mask; w.heads] };
                    (Some(token), logit)
                };
                w.attend(b, i, &(0..g).map(key).collect::<Vec<_>>())
            });
            vec![("y", y)]
        });
    }
}

/// Swin's windows on a whole map, asked as visible windows of all its tokens.
#[test]
fn all_tokens_visible_are_shifted_windows() {
    for_seeds("attention.window", |q, at| {
        if q.config.bool("pad").unwrap() {
            return;
        }
        let (height, width) = (q.usize("height"), q.usize("width"));
        let (mut config, mut tensors) = (q.config.clone(), q.case.question());
        let places = (0..height * width).flat_map(|t| [(t / width) as i64, (t % width) as i64]).collect();
        tensors.insert("input.coords".into(), Value::Int(IntTensor::new([height * width, 2], places).unwrap()));
        config.set("rel_pos", true).set("mode", "auto").set("group_size", "max");
        assert!(find(OP).is_ok());
        let results = answer(OP, &config, &tensors);
        let Value::Float(y) = &results["output.y"] else { panic!("{at}: y holds integers") };
        assert_close(at, y.data(), q.get("output.y"));
    });
}
