//! `attention.cogview_sparse`.

use std::collections::BTreeMap;

use karat::case::{Config, Dtype, Value, find, new_case, verify_case};

use crate::common::{Question, against_oracle, answer, assert_close, for_seeds, softmax};
use crate::pb_relax::attend;

const OP: &str = "attention.cogview_sparse";

/// One query after the other: all keys that it sees, with what is added to their scores.
fn oracle(q: &Question) -> Vec<(&'static str, Vec<f64>)> {
    let n = q.dims("input.x")[1];
    let train = q.config.str("mode").unwrap() == "train";
    let index = if train { "input.pivot_idx" } else { "input.pivot_window_idx" };
    let count = q.dims(index)[1];
    let y = attend(q, |image, i, score| {
        let listed = || q.ints(index)[image * count..(image + 1) * count].iter().map(|&j| j as usize);
        let seen: Vec<(usize, f64)> = if train {
            let (w, t) = (q.usize("query_window"), q.usize("key_window_times"));
            let near = |j: usize| (j / w) as i64 > (i / w) as i64 - t as i64;
            let pivots = listed().filter(|&j| !near(j)).map(|j| (j, ((n / count) as f64).ln()));
            (0..=i).filter(|&j| near(j)).map(|j| (j, 0.0)).chain(pivots).collect()
        } else {
            listed().take(count - n + i + 1).map(|j| (j, 0.0)).collect()
        };
        let scores: Vec<f64> = seen.iter().map(|&(j, extra)| score(j) + extra).collect();
        seen.into_iter().map(|(j, _)| j).zip(softmax(&scores)).collect()
    });
    vec![("y", y)]
}

#[test]
fn agrees_with_plain_loops() {
    against_oracle(OP, oracle);
}

/// Windows above and below the size of a block, and lists longer than one run of scores.
#[test]
fn agrees_with_plain_loops_over_many_blocks() {
    for (window, times, tokens, pivots) in [(128, 2, 640, 150), (100, 3, 500, 70), (150, 1, 450, 130), (7, 4, 700, 600), (40, 30, 720, 5)] {
        let mut config = Config::default();
        config.set("dim", 4).set("num_heads", 2).set("mode", "train").set("query_window", window).set("key_window_times", times);
        let sizes = BTreeMap::from([("batch".into(), 2), ("tokens".into(), tokens), ("pivots".into(), pivots)]);
        let case = new_case(find(OP).unwrap(), Some(config.clone()), 1, sizes).unwrap();
        let at = format!("w {window}, t {times}, {tokens} tokens, {pivots} pivots");
        assert!(verify_case(&case, Dtype::F32).findings.iter().all(|f| f.passed), "{at} in f32");
        let q = Question { config, case };
        assert_close(&at, q.get("output.y"), &oracle(&q)[0].1);
    }
}

/// Windows that reach back to the beginning, or a list of all keys: nothing but causal attention.
#[test]
fn without_gaps_it_is_causal_attention() {
    for_seeds(OP, |q, at| {
        let (mut question, mut config) = (q.case.question(), q.config.clone());
        let (batch, n) = (q.dims("input.x")[0], q.dims("input.x")[1]);
        if config.str("mode").unwrap() == "train" {
            config.set("key_window_times", n);
        } else {
            let keys = q.dims("input.mem")[1] + n;
            let all = (0..batch * keys).map(|i| (i % keys) as i64).collect();
            question.insert("input.pivot_window_idx".into(), Value::Int(karat::tensor::IntTensor::new([batch, keys], all).unwrap()));
        }
        let sparse = answer(OP, &config, &question);
        config.set("mask", "causal").set("alpha", 1.0);
        let dense = answer("attention.pb_relax", &config, &question);
        let (Value::Float(sparse), Value::Float(dense)) = (&sparse["output.y"], &dense["output.y"]) else { panic!("{at}") };
        assert_close(at, sparse.data(), dense.data());
    });
}

#[test]
fn the_order_of_pivots_means_nothing() {
    for_seeds(OP, |q, at| {
        if q.config.str("mode").unwrap() != "train" || q.dims("input.pivot_idx")[1] == 0 {
            return;
        }
        let (mut question, dims) = (q.case.question(), q.dims("input.pivot_idx"));
        let reversed = q.ints("input.pivot_idx").chunks_exact(dims[1]).flat_map(|row| row.iter().rev().copied()).collect();
        let index = karat::tensor::IntTensor::new([dims[0], dims[1]], reversed).unwrap();
        question.insert("input.pivot_idx".into(), Value::Int(index));
        let Value::Float(y) = &answer(OP, &q.config, &question)["output.y"] else { panic!("{at}") };
        assert_close(at, y.data(), q.get("output.y"));
    });
}
