//! Golden cases: a question with its answer.

mod config;
mod op;
mod registry;

pub use config::Config;
pub use op::{Draw, Op, Operation, Run, Tensors, Value};
pub use registry::{find, operations};
