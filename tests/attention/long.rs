//! Inputs so long, and layers so wide, that linear mechanisms cut their work into pieces, blocks and bands: the same answers, the
//! right gradients, and the same bits for any number of threads.

use std::collections::BTreeMap;

use karat::case::{Config, Run, Tensors, Value, find, new_case};
use karat::tensor::Tensor;
use karat::tensor::random::{Purpose, Rng};

use crate::common::{Question, assert_close};
use crate::{factorized_conv, performer};

fn long(op: &str, config: &str, sizes: &[(&str, usize)]) -> Question {
    let sizes: BTreeMap<String, usize> = sizes.iter().map(|&(name, size)| (name.to_string(), size)).collect();
    let config = Config::parse(config).unwrap();
    Question { case: new_case(find(op).unwrap(), Some(config.clone()), 5, sizes).unwrap(), config }
}

/// The derivative of `Σ ⟨cotangent, output⟩` along a random direction, from the gradients and by a central difference.
fn check_slope(q: &Question) {
    let op = find(&q.case.op).unwrap();
    let (question, mut rng) = (q.case.question(), Rng::new(1, Purpose::Case, 3, 0));
    let mut slope = 0.0;
    let mut direction: Vec<(&String, Vec<f64>)> = Vec::new();
    for (name, value) in &q.case.tensors {
        let (Some(of), Value::Float(grad)) = (name.strip_prefix("grad."), value) else { continue };
        let (name, _) = question.get_key_value(of).unwrap();
        let v: Vec<f64> = grad.data().iter().map(|_| rng.normal()).collect();
        slope += grad.data().iter().zip(&v).map(|(g, v)| g * v).sum::<f64>();
        direction.push((name, v));
    }
    let at = |t: f64| -> f64 {
        let mut moved = question.clone();
        for (name, v) in &direction {
            let Some(Value::Float(x)) = moved.get_mut(*name) else { continue };
            x.data_mut().iter_mut().zip(v).for_each(|(x, v)| *x += t * v);
        }
        let mut run = Run::new(&q.config, &moved, false, None);
        (op.run_f64)(&mut run).unwrap();
        let Value::Float(y) = &run.into_results()["output.y"] else { panic!("integers") };
        y.data().iter().zip(q.get("cotangent.y")).map(|(y, c)| y * c).sum()
    };
    let h = 1e-4;
    let measured = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
    assert!((measured - slope).abs() <= 1e-6 * slope.abs().max(1.0), "{}: {slope} by the gradient, {measured} by differences", q.case.op);
}

/// All results in f32, with 1 and with 3 threads.
fn check_bits(q: &Question) {
    let given: Tensors<f32> = (q.case.question().iter())
        .filter_map(|(name, value)| match value {
            Value::Float(t) => Some((name.clone(), Value::Float(t.cast()))),
            Value::Int(_) => None,
        })
        .collect();
    let results = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut run = Run::new(&q.config, &given, true, None);
            (find(&q.case.op).unwrap().run_f32)(&mut run).unwrap();
            run.into_results()
        })
    };
    let (one, three) = (results(1), results(3));
    for (name, value) in &one {
        let (Value::Float(a), Value::Float(b)) = (value, &three[name]) else { continue };
        let bits = |t: &Tensor<f32>| t.data().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(bits(a) == bits(b), "{}: {name} depends on the number of threads", q.case.op);
    }
}

/// Plain loops: the outputs by name.
type Oracle = fn(&Question) -> Vec<(&'static str, Vec<f64>)>;

fn check(q: &Question, oracle: Option<Oracle>) {
    for (name, expected) in oracle.map_or(Vec::new(), |oracle| oracle(q)) {
        assert_close(&format!("{} {name}", q.case.op), q.get(&format!("output.{name}")), &expected);
    }
    check_slope(q);
    check_bits(q);
}

#[test]
fn performer_of_many_tokens() {
    let config = r#"{"dim":3,"in_dim":4,"head_cnt":1,"kernel_ratio":0.8,"epsilon":1e-8,"training":false}"#;
    check(&long("attention.performer", config, &[("batch", 2), ("tokens", 16 * 128 + 77)]), Some(performer::oracle));
}

#[test]
fn performer_of_many_features() {
    let config = r#"{"dim":3,"in_dim":130,"head_cnt":1,"kernel_ratio":1.0,"epsilon":1e-8,"training":false}"#;
    check(&long("attention.performer", config, &[("batch", 2), ("tokens", 71)]), Some(performer::oracle));
}

#[test]
fn factorized_attention_of_a_large_map() {
    let config =
        r#"{"dim":6,"num_heads":2,"qkv_bias":true,"qk_scale":null,"crpe_windows":[3,5],"crpe_head_splits":[1,1],"height":41,"width":29}"#;
    check(&long("attention.factorized_conv", config, &[("batch", 2)]), Some(factorized_conv::oracle));
}

#[test]
fn t2t_module_of_large_images() {
    for tokens in ["performer", "transformer"] {
        let config = format!(
            r#"{{"tokens_type":"{tokens}","in_chans":2,"embed_dim":3,"token_dim":4,"kernel_ratio":0.5,"performer_eps":1e-8,"norm_eps":1e-5,"training":false}}"#
        );
        check(&long("nn.t2t_module", &config, &[("batch", 3), ("height", 70), ("width", 110)]), None);
    }
}
