//! The golden cases in `fixtures/cases` notice every mistake of `karat case audit`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use karat::case::{Case, audit};

/// One test: the audit switches GELU for the whole process.
#[test]
fn no_mistake_slips_through() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/cases");
    let mut by_operation: BTreeMap<String, Vec<Case>> = BTreeMap::new();
    for operation in fs::read_dir(folder).expect("fixtures/cases") {
        for file in fs::read_dir(operation.expect("a folder").path()).expect("a folder of cases") {
            let case = Case::read(file.expect("a file").path()).unwrap_or_else(|e| panic!("{e}"));
            by_operation.entry(case.op.clone()).or_default().push(case);
        }
    }
    let mut slips = Vec::new();
    for (op, cases) in &by_operation {
        let audit = audit(op, cases).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(audit.failed, 0, "{op}: karat fails its own golden cases");
        slips.extend(audit.slips().map(|mistake| format!("{op}: {mistake}")));
    }
    assert!(slips.is_empty(), "{} mistakes would slip through\n{}", slips.len(), slips.join("\n"));
}
