//! The cost model of every operation says what its forward pass really computes and keeps.
//!
//! One test: both counters belong to the whole process.

use std::collections::BTreeMap;

use karat::case::{Run, Shapes, Tensors, Value, new_case, operations};
use karat::linalg::counted;
use karat::tensor::pool;

const CASES: u64 = 64;

#[test]
fn cost_models_agree_with_what_is_counted() {
    let mut failures = Vec::new();
    for op in operations() {
        for seed in 0..CASES {
            let case = new_case(op, None, seed, BTreeMap::new()).unwrap_or_else(|e| panic!("{} seed {seed}: {e}", op.name));
            let given: Tensors<f32> = (case.question().iter())
                .map(|(name, value)| match value {
                    Value::Float(t) => (name.clone(), Value::Float(t.cast())),
                    Value::Int(t) => (name.clone(), Value::Int(t.clone())),
                })
                .collect();
            let cost = match (op.cost)(&case.config, &Shapes::of(&given)) {
                Ok(Some(cost)) => cost,
                Ok(None) => break,
                Err(e) => panic!("{} seed {seed}: {e}", op.name),
            };
            // Parameters are copied from the case once; the second run finds them prepared and so measures activations alone.
            let mut first = Run::new(&case.config, &given, false, None);
            (op.run_f32)(&mut first).unwrap_or_else(|e| panic!("{} seed {seed}: {e}", op.name));
            let params = first.take_params();
            drop(first);
            let before = pool::stats().live_bytes;
            let mut run = match params {
                Some(params) => Run::measured(&case.config, &given, true, params),
                None => Run::new(&case.config, &given, true, None),
            };
            let (result, _) = counted(|| (op.run_f32)(&mut run));
            result.unwrap_or_else(|e| panic!("{} seed {seed}: {e}", op.name));
            let middle = run.middle().unwrap_or_else(|| panic!("{}: does not ask whether to run backward", op.name));
            if middle.flops != cost.flops as u64 {
                failures.push(format!("{}@{seed} {}: {} flops, counted {}", op.name, case.config.to_json(), cost.flops, middle.flops));
            }
            // Blocks are rounded up: to 64 bytes, and by at most an eighth.
            let kept = middle.live_bytes - before;
            let (least, most) = (cost.activation_bytes, cost.activation_bytes + cost.activation_bytes / 8 + 64 * 64);
            if !(least..=most).contains(&kept) {
                failures.push(format!("{}@{seed} {}: {least} bytes kept, counted {kept}", op.name, case.config.to_json()));
            }
        }
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}
