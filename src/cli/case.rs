//! `karat case`: makes golden cases and shows what is in them.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::verify::cases;
use super::{Outcome, progress, say};
use crate::case::{self, Config, Dtype, Problem, Value, Verdict};
use crate::error::{Error, Result};

/// Make golden cases, or show what is in one
#[derive(Subcommand)]
#[command(arg_required_else_help = false, after_help = "Example: karat case new attention.window --seed 3 -o window.safetensors")]
pub enum Case {
    New(New),
    Show(Show),
    Audit(Audit),
}

/// Ask whether golden cases are strong enough: which mistakes that people make would they not notice?
#[derive(Args)]
#[command(
    after_help = "Computations are perturbed (scale dropped, q and k swapped, a bias skipped, mask or window shifted, unbiased variance, \
                  tanh GELU, a projection transposed, the last tile dropped, a gradient zeroed, …) and judged as `karat verify` judges f32.\n\
                  Example: karat case audit fixtures/cases"
)]
pub struct Audit {
    /// Golden cases, folders to search for them, or problems
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// List every mistake, caught or not
    #[arg(long)]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Make a golden case: random inputs and parameters, outputs and gradients from an f64 run
#[derive(Args)]
#[command(
    after_help = "Example: karat case new attention.softmax --config '{\"dim\": 12, \"num_heads\": 3, \"qkv_bias\": true, \"proj_bias\": true, \"qk_norm\": false}' --size batch=2 -o case.safetensors"
)]
pub struct New {
    /// The operation (see `karat list ops`), or a problem such as attention.window:b2,h3,w7,d32,shift3@17
    #[arg(value_name = "OP")]
    operation: String,
    /// The configuration, a JSON object [default: drawn at random]
    #[arg(long, value_name = "JSON")]
    config: Option<String>,
    /// Where the random numbers start [default: 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Fix a size that the configuration leaves open, such as batch=2 (again for more)
    #[arg(long, value_name = "NAME=VALUE", value_parser = size)]
    size: Vec<(String, usize)>,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

fn size(text: &str) -> Result<(String, usize), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_string(), value.parse().map_err(|_| format!("`{value}` is no size"))?))
}

/// Show operation, configuration and tensors of a golden case
#[derive(Args)]
#[command(after_help = "Example: karat case show fixtures/cases/attention.window/shift-8x8-w4.safetensors")]
pub struct Show {
    /// The golden case, or a problem
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Case {
    pub(super) fn run(&self, out: &mut dyn Write) -> Result<Outcome> {
        match self {
            Case::New(command) => command.run(out),
            Case::Show(command) => command.run(out),
            Case::Audit(command) => command.run(out),
        }
    }
}

impl New {
    fn run(&self, out: &mut dyn Write) -> Result<Outcome> {
        let made = if self.operation.contains([':', '@']) { self.problem()? } else { self.configured()? };
        made.write(&self.output)?;
        say(out, format!("{}: {} {}", self.output.display(), made.op, made.config.to_json()))?;
        // An ill-conditioned question makes a bad case: better known now.
        let single = case::verify_case(&made, Dtype::F32);
        if single.verdict != Verdict::Ok {
            say(out, format!("note: karat's own f32 run misses the bounds of this case; another seed may do: {}", single.line("")))?;
        }
        Ok(Outcome::Good)
    }

    fn problem(&self) -> Result<case::Case> {
        if self.config.is_some() || self.seed.is_some() || !self.size.is_empty() {
            return Err(Error::usage(format!("problem `{}` says it all: no --config, --seed or --size beside it", self.operation)));
        }
        self.operation.parse::<Problem>()?.case()
    }

    fn configured(&self) -> Result<case::Case> {
        let operation = case::find(&self.operation)?;
        let config = self.config.as_deref().map(Config::parse).transpose()?;
        let mut sizes = BTreeMap::new();
        for (name, value) in &self.size {
            if sizes.insert(name.clone(), *value).is_some() {
                return Err(Error::usage(format!("--size {name} is given twice")));
            }
        }
        case::new_case(operation, config, self.seed.unwrap_or(0), sizes)
    }
}

impl Audit {
    fn run(&self, out: &mut dyn Write) -> Result<Outcome> {
        let mut by_operation: BTreeMap<String, Vec<case::Case>> = BTreeMap::new();
        for file in cases(&self.paths)? {
            let case = case::open(file)?;
            by_operation.entry(case.op.clone()).or_default().push(case);
        }
        let bar = progress(by_operation.len() as u64, "auditing");
        let mut audits = Vec::new();
        for (op, cases) in &by_operation {
            bar.set_message(op.clone());
            let audit = case::audit(op, cases)?;
            if !self.json {
                bar.suspend(|| self.show(&audit, out))?;
            }
            audits.push(audit);
            bar.inc(1);
        }
        bar.finish_and_clear();
        if self.json {
            say(out, serde_json::Value::Array(audits.iter().map(case::Audit::to_json).collect()))?;
        } else {
            let slips: usize = audits.iter().map(|audit| audit.slips().count()).sum();
            let caught: usize = audits.iter().map(|audit| audit.caught().0).sum();
            say(out, format!("{caught} mistakes caught, {slips} would slip through"))?;
        }
        let good = audits.iter().all(|audit| audit.slips().next().is_none() && audit.failed == 0);
        Ok(if good { Outcome::Good } else { Outcome::CheckFailed })
    }

    fn show(&self, audit: &case::Audit, out: &mut dyn Write) -> Result<()> {
        let (caught, all) = audit.caught();
        let failed = if audit.failed > 0 { format!("; {} cases are failed by karat itself", audit.failed) } else { String::new() };
        say(out, format!("{:<34} {caught} of {all} mistakes caught by {} cases{failed}", audit.op, audit.cases))?;
        for (mistake, outcome) in audit.mistakes.iter().filter(|(_, o)| self.all || **o == case::Outcome::Slips) {
            let word = match outcome {
                case::Outcome::Caught => "caught",
                case::Outcome::Slips => "SLIPS",
                case::Outcome::Harmless => "harmless",
            };
            say(out, format!("    {word:<9}{mistake}"))?;
        }
        Ok(())
    }
}

impl Show {
    fn run(&self, out: &mut dyn Write) -> Result<Outcome> {
        let case = case::open(&self.file)?;
        say(out, format!("operation  {}", case.op))?;
        say(out, format!("config     {}", case.config.to_json()))?;
        say(out, format!("source     {}", case.source))?;
        if !case.zero_grads.is_empty() {
            say(out, format!("zero grads {}", case.zero_grads.join(", ")))?;
        }
        let width = case.tensors.keys().map(String::len).max().unwrap_or(0);
        for (name, value) in &case.tensors {
            let about = match value {
                Value::Float(t) => {
                    let norm = t.data().iter().fold(0.0f64, |m, x| if x.is_nan() || m.is_nan() { f64::NAN } else { m.max(x.abs()) });
                    format!("f64 {:<20} max abs {norm:.4e}", format!("{:?}", t.shape()))
                }
                Value::Int(t) => {
                    let range = t.data.iter().min().zip(t.data.iter().max()).map(|(low, high)| format!(" {low} to {high}"));
                    format!("int {:<20}{}", format!("{:?}", t.shape), range.unwrap_or_default())
                }
            };
            say(out, format!("{name:<width$}  {}", about.trim_end()))?;
        }
        Ok(Outcome::Good)
    }
}
