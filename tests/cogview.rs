//! Language modeling of pictures: generation with cached keys and values gives what recomputing gives, losses and scores are those of
//! the model's logits, and the quantizer takes the nearest code.

use std::collections::BTreeMap;

use karat::case::{Case, Config, Run, Tensors, Value, find, new_case};
use karat::tensor::{IntTensor, Tensor};

fn questions(op: &str, count: u64) -> impl Iterator<Item = Case> + '_ {
    (0..count).map(move |seed| new_case(find(op).unwrap(), None, seed, BTreeMap::new()).unwrap_or_else(|e| panic!("{op} seed {seed}: {e}")))
}

fn answer(op: &str, config: &Config, given: &Tensors<f64>) -> Tensors<f64> {
    let mut run = Run::new(config, given, false, None);
    (find(op).unwrap().run_f64)(&mut run).unwrap_or_else(|e| panic!("{op} {}: {e}", config.to_json()));
    run.into_results()
}

fn floats<'a>(tensors: &'a Tensors<f64>, name: &str) -> &'a Tensor<f64> {
    match &tensors[name] {
        Value::Float(t) => t,
        Value::Int(_) => panic!("{name} holds integers"),
    }
}

fn ints<'a>(tensors: &'a Tensors<f64>, name: &str) -> &'a IntTensor {
    match &tensors[name] {
        Value::Int(t) => t,
        Value::Float(_) => panic!("{name} holds floats"),
    }
}

fn close(at: &str, found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-10 * expected.abs().max(1.0), "{at}: {found} instead of {expected}");
}

/// The logits `[B, N, V]` of the model for these rows of tokens.
fn logits(case: &Case, tokens: &[i64], n: usize) -> Tensor<f64> {
    let mut given: Tensors<f64> =
        case.tensors.iter().filter(|(name, _)| name.starts_with("param.")).map(|(n, v)| (n.clone(), v.clone())).collect();
    given.insert("input.tokens".into(), Value::Int(IntTensor::new([tokens.len() / n, n], tokens.to_vec()).unwrap()));
    floats(&answer("model.cogview", &case.config, &given), "output.logits").clone()
}

fn log_softmax(row: &[f64]) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = row.iter().map(|x| (x - max).exp()).sum();
    row.iter().map(|x| x - max - sum.ln()).collect()
}

#[test]
fn generation_is_that_of_the_whole_sequence() {
    for case in questions("lm.cogview_generate", 60) {
        let at = case.config.to_json();
        let (tokens, last) = (ints(&case.tensors, "output.tokens"), floats(&case.tensors, "output.last_logits"));
        let n = tokens.shape[1];
        let before: Vec<i64> = tokens.data.chunks_exact(n).flat_map(|row| row[..n - 1].to_vec()).collect();
        let whole = logits(&case, &before, n - 1);
        let v = last.shape()[1];
        for (rows, last) in whole.data().chunks_exact((n - 1) * v).zip(last.data().chunks_exact(v)) {
            rows[(n - 2) * v..].iter().zip(last).for_each(|(a, b)| close(&at, *b, *a));
        }
        let new = case.config.usize("new_tokens").unwrap();
        let codes = case.config.usize("num_image_tokens").unwrap() as i64;
        assert!(
            tokens.data.chunks_exact(n).all(|row| row[n - new..].iter().all(|t| (0..codes).contains(t))),
            "{at}: an id that is no image code"
        );
    }
}

#[test]
fn the_loss_is_that_of_the_logits() {
    for case in questions("lm.cogview", 60) {
        let at = case.config.to_json();
        let (tokens, mask) = (ints(&case.tensors, "input.tokens"), ints(&case.tensors, "input.loss_mask"));
        let (t, codes) = (tokens.shape[1], case.config.usize("num_image_tokens").unwrap() as i64);
        let scale = case.config.f64("txt_loss_scale").unwrap();
        let inputs: Vec<i64> = tokens.data.chunks_exact(t).flat_map(|row| row[..t - 1].to_vec()).collect();
        let all = logits(&case, &inputs, t - 1);
        let v = all.shape()[2];
        let (mut sum, mut weights) = (0.0, 0.0);
        for (i, row) in all.data().chunks_exact(v).enumerate() {
            let (b, j) = (i / (t - 1), i % (t - 1));
            let ce = -log_softmax(row)[tokens.data[b * t + j + 1] as usize];
            close(&at, floats(&case.tensors, "output.token_losses").data()[i], ce);
            let w = mask.data[b * t + j + 1] as f64 * if inputs[i] >= codes { scale } else { 1.0 };
            sum += ce * w;
            weights += w;
        }
        close(&at, floats(&case.tensors, "output.loss").data()[0], sum / weights);
    }
}

#[test]
fn a_caption_scores_what_its_tokens_score() {
    for case in questions("lm.caption_score", 60) {
        let at = case.config.to_json();
        let tokens = ints(&case.tensors, "input.tokens");
        let (n, codes, start) = (tokens.shape[1], case.config.usize("num_image_tokens").unwrap(), case.config.usize("text_start").unwrap());
        let all = logits(&case, &tokens.data, n);
        let v = all.shape()[2];
        for (b, row) in tokens.data.chunks_exact(n).enumerate() {
            let score: f64 = (start + 1..n)
                .map(|j| log_softmax(&all.data()[(b * n + j - 1) * v + codes..(b * n + j) * v])[row[j] as usize - codes])
                .sum();
            close(&at, floats(&case.tensors, "output.score").data()[b], score);
        }
        let ranked: Vec<f64> =
            ints(&case.tensors, "output.ranking").data.iter().map(|&i| floats(&case.tensors, "output.score").data()[i as usize]).collect();
        assert!(ranked.is_sorted_by(|a, b| a >= b), "{at}: {ranked:?}");
    }
}

#[test]
fn sampling_keeps_what_it_may() {
    for case in questions("lm.sample_token", 200) {
        let at = case.config.to_json();
        let (logits, probs) = (floats(&case.tensors, "input.logits"), floats(&case.tensors, "output.probs"));
        let v = logits.shape()[1];
        let (lo, hi) = (case.config.usize("allow_lo").unwrap(), case.config.usize("allow_hi").unwrap());
        for (i, (l, p)) in logits.data().chunks_exact(v).zip(probs.data().chunks_exact(v)).enumerate() {
            close(&at, p.iter().sum(), 1.0);
            let kept: Vec<usize> = (0..v).filter(|&j| p[j] > 0.0).collect();
            assert!(kept.iter().all(|j| (lo..hi).contains(j)), "{at}: a forbidden id");
            let k = case.config.usize("top_k").unwrap();
            assert!(k == 0 || kept.len() <= k, "{at}: {} ids of {k}", kept.len());
            // What is left out is never likelier than what is kept.
            let least = kept.iter().map(|&j| l[j]).fold(f64::INFINITY, f64::min);
            assert!((lo..hi.min(v)).all(|j| p[j] > 0.0 || l[j] <= least), "{at}");
            let token = ints(&case.tensors, "output.token").data[i] as usize;
            let u = floats(&case.tensors, "input.u").data()[i];
            let below: f64 = p[..token].iter().sum();
            assert!(below <= u + 1e-12 && u <= below + p[token] + 1e-12, "{at}: token {token} at {u}");
        }
    }
}

/// More vectors and codes than a block holds, with ties: the first nearest code.
#[test]
fn the_nearest_code_is_found() {
    let (rows, k, d) = (150, 1100, 3);
    let mut config = Config::default();
    config.set("dim", d).set("n_embed", k).set("quantizer", "fixed").set("training", false);
    let code = |j: usize, i: usize| ((j % 700) * (7 + i) % 23) as f64 - 11.0;
    let z = |r: usize, i: usize| ((r * (5 + i)) % 25) as f64 - 12.0;
    let mut given = Tensors::new();
    given.insert("input.z".into(), Value::Float(Tensor::from_fn([rows, d], |x| z(x / d, x % d))));
    given.insert("buffer.embed".into(), Value::Float(Tensor::from_fn([d, k], |x| code(x % k, x / k))));
    let results = answer("nn.vector_quantize", &config, &given);
    for r in 0..rows {
        let distance = |j: usize| (0..d).map(|i| (z(r, i) - code(j, i)).powi(2)).sum::<f64>();
        let nearest = (1..k).fold(0, |best, j| if distance(j) < distance(best) { j } else { best });
        assert_eq!(ints(&results, "output.indices").data[r] as usize, nearest, "vector {r}");
        (0..d).for_each(|i| assert_eq!(floats(&results, "output.quantize").data()[r * d + i], code(nearest, i)));
    }
}
