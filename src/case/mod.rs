//! Golden cases: a question with its answer.
//!
//! A [`Case`] is one file with an operation, its configuration, inputs, parameters and cotangents, and the outputs and gradients that
//! have to come out. [`verify_case`] runs it, [`judge`] checks somebody else's results, [`new_case`] makes one.

mod audit;
mod compare;
mod config;
mod format;
mod make;
mod measure;
mod op;
mod problem;
mod registry;
mod triage;
mod verify;

#[cfg(test)]
mod tests;

pub use audit::{Audit, Outcome, audit};
pub use compare::{Bound, Finding, Worst};
pub use config::Config;
pub use format::{Case, Element, Stock};
pub use make::new_case;
pub use measure::{Passes, Prepared};
pub use op::{BenchSize, Benchmark, Cost, Draw, Middle, Op, Operation, Run, Shapes, Tensors, Value};
pub use problem::{Problem, looks_like_problem, open};
pub use registry::{find, operations};
pub use verify::{Dtype, Report, Verdict, judge, judge_with, verify_case, verify_with};
