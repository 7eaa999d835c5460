//! `karat list`: what there is.

use std::io::Write;

use clap::{Args, ValueEnum};
use serde_json::{Value as Json, json};

use super::{Outcome, say};
use crate::case::operations;
use crate::error::Result;

/// List what karat has: operations with their papers
#[derive(Args)]
#[command(after_help = "Example: karat list ops --json")]
pub struct List {
    /// What to list
    #[arg(default_value = "ops")]
    what: What,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    Ops,
}

impl List {
    pub(super) fn run(&self, out: &mut dyn Write) -> Result<Outcome> {
        match self.what {
            What::Ops if self.json => {
                let ops: Vec<Json> = operations().iter().map(|op| json!({ "name": op.name, "paper": op.paper, "data": op.data })).collect();
                say(out, Json::Array(ops))?;
            }
            What::Ops => {
                let width = operations().iter().map(|op| op.name.len()).max().unwrap_or(0);
                for op in operations() {
                    say(out, format!("{:<width$}  {}", op.name, op.paper))?;
                }
            }
        }
        Ok(Outcome::Good)
    }
}
