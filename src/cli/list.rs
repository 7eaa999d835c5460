//! `karat list`: what there is.

use std::io::Write;

use clap::{Args, ValueEnum};
use serde_json::{Value as Json, json};

use super::{Outcome, say};
use crate::case::{BenchSize, Op, Prepared, operations};
use crate::error::Result;
use crate::mim::methods::{METHODS, Method, build};
use crate::model::zoo::{self, Model};

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

/// The cost of an attention mechanism at the size of a small ViT's layer.
fn cost(op: &Op) -> Option<crate::case::Cost> {
    let benchmark = (op.bench)(BenchSize { tokens: 196, dim: 384, heads: 8 })?;
    Prepared::shapes(op, &benchmark).and_then(|shapes| (op.cost)(&benchmark.config, &shapes)).ok()?
}

/// The networks that a method serves.
fn names(method: &Method) -> Vec<&'static str> {
    method.networks.iter().map(|n| n.name).collect()
}

impl List {
    pub(super) fn run(&self, out: &mut dyn Write) -> Result<Outcome> {
        match self.what {
            What::Ops if self.json => {
                let ops = operations().iter().map(|op| {
                    let cost = cost(op).map(|cost| json!({ "flops": cost.flops, "activation_bytes": cost.activation_bytes }));
                    json!({ "name": op.name, "paper": op.paper, "data": op.data, "cost": cost })
                });
                say(out, Json::Array(ops.collect()))?;
            }
            What::Ops => {
                let width = operations().iter().map(|op| op.name.len()).max().unwrap_or(0);
                say(out, format!("{:<width$}  {:>8}{:>8}  paper", "operation", "MFLOPs", "MB kept"))?;
                for op in operations() {
                    let [flops, bytes] = match cost(op) {
                        Some(cost) => [cost.flops, cost.activation_bytes].map(|n| format!("{:.1}", n as f64 / 1e6)),
                        None => ["", ""].map(String::from),
                    };
                    say(out, format!("{:<width$}  {flops:>8}{bytes:>8}  {}", op.name, op.paper))?;
                }
                say(out, "costs: forward pass of attention mechanisms for one image of 196 tokens, width 384, 8 heads, in f32")?;
            }
            What::Methods if self.json => {
                let methods = METHODS.iter().map(|m| json!({ "name": m.name, "paper": m.paper, "models": names(m) }));
                say(out, Json::Array(methods.collect()))?;
            }
            What::Methods => {
                for m in METHODS {
                    say(out, format!("{:<10}{:<22}{}", m.name, m.paper, names(m).join(" ")))?;
                }
            }
            What::Models => {
                let mut rows = Vec::new();
                if !self.json {
                    say(out, format!("{:<34}{:>7}{:>11}{:>9}  paper", "network", "pixels", "M params", "GMACs"))?;
                }
                for (family, variant) in zoo::variants() {
                    let model = Model::named(variant.name, 1000, None)?;
                    let (parameters, macs) = (model.build()?.layout.numel(), model.macs()?);
                    if !self.json {
                        let (m, g, paper) = (parameters as f64 / 1e6, macs / 1e9, model.paper());
                        say(out, format!("{:<34}{:>7}{m:>11.2}{g:>9.2}  {paper}", variant.name, model.size))?;
                    }
                    rows.push(json!({
                        "name": variant.name, "also": variant.also, "operation": family.op, "paper": model.paper(),
                        "image_size": model.size, "parameters": parameters, "macs": macs,
                    }));
                }
                if !self.json {
                    say(out, format!("\n{:<34}{:>7}{:>11}  method", "network to pre-train", "pixels", "M params"))?;
                }
                for (m, network) in METHODS.iter().flat_map(|m| m.networks.iter().map(move |network| (m, network))) {
                    let (model, size) = (network.name, network.size);
                    let parameters = build(m.name, model, size, None)?.layout().numel();
                    if !self.json {
                        say(out, format!("{model:<34}{size:>7}{:>11.2}  {}", parameters as f64 / 1e6, m.name))?;
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
