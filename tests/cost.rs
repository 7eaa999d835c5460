//! The cost model of every operation says what its forward pass really computes and keeps.
//!
//! One test: both counters belong to the whole process.

use std::collections::BTreeMap;

use karat::case::{Prepared, new_case, operations};
use karat::linalg::counted;

const CASES: u64 = 64;

#[test]
fn cost_models_agree_with_what_is_counted() {
    let mut failures = Vec::new();
    for op in operations() {
        for seed in 0..CASES {
            let case = new_case(op, None, seed, BTreeMap::new()).unwrap_or_else(|e| panic!("{}@{seed}: {e}", op.name));
            let prepared = Prepared::of_case(op, &case).unwrap_or_else(|e| panic!("{}@{seed}: {e}", op.name));
            let cost = match prepared.cost() {
                Ok(Some(cost)) => cost,
                Ok(None) => break,
                Err(e) => panic!("{}@{seed}: {e}", op.name),
            };
            let (passes, _) = counted(|| prepared.run(true));
            let passes = passes.unwrap_or_else(|e| panic!("{}@{seed}: {e}", op.name));
            if passes.forward_flops != cost.flops as u64 {
                failures.push(format!(
                    "{}@{seed} {}: {} flops, counted {}",
                    op.name,
                    case.config.to_json(),
                    cost.flops,
                    passes.forward_flops
                ));
            }
            // Blocks are rounded up: to 64 bytes, and by at most an eighth.
            let kept = passes.kept_bytes;
            let (least, most) = (cost.activation_bytes, cost.activation_bytes + cost.activation_bytes / 8 + 64 * 64);
            if !(least..=most).contains(&kept) {
                failures.push(format!("{}@{seed} {}: {least} bytes kept, counted {kept}", op.name, case.config.to_json()));
            }
        }
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}
