//! `karat list`: what there is.

use std::io::Write;

use clap::{Args, ValueEnum};
use serde_json::{Value as Json, json};

use super::{Outcome, say};
use crate::case::operations;
use crate::error::Result;
use crate::mim::Objective;
use crate::mim::methods::{METHODS, build, default_image_size};

/// List what karat has: operations with their papers, pre-training methods, networks
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
    Methods,
    Models,
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
            What::Methods if self.json => {
                let methods = METHODS.iter().map(|m| json!({ "name": m.name, "paper": m.paper, "models": m.models }));
                say(out, Json::Array(methods.collect()))?;
            }
            What::Methods => {
                for m in METHODS {
                    say(out, format!("{:<10}{:<22}{}", m.name, m.paper, m.models.join(" ")))?;
                }
            }
            What::Models => {
                let mut rows = Vec::new();
                for (m, &model) in METHODS.iter().flat_map(|m| m.models.iter().map(move |model| (m, model))) {
                    let size = default_image_size(model)?;
                    let parameters = build(m.name, model, size, None)?.layout().numel();
                    if !self.json {
                        say(out, format!("{:<12}{:<10}{size:>4} pixels{:>10.2} M parameters", model, m.name, parameters as f64 / 1e6))?;
                    }
                    rows.push(json!({ "name": model, "method": m.name, "image_size": size, "parameters": parameters }));
                }
                if self.json {
                    say(out, Json::Array(rows))?;
                }
            }
        }
        Ok(Outcome::Good)
    }
}
