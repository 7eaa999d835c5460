//! The `karat` program: one file per command.
//!
//! Exit codes: 0 all good, 1 a check failed, 2 bad usage or unreadable input (with one line on standard error).

mod analyze;
mod bench;
mod case;
mod compare;
mod eval;
mod features;
mod finetune;
mod group;
mod list;
mod network;
mod picture;
mod predict;
mod pretrain;
mod probe;
mod progress;
mod reconstruct;
mod tokenizer;
mod transfer;
mod verify;

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

use crate::error::{Error, Result};
use crate::mim::{MaskedModel, methods};
use crate::threads;
use crate::train::{STATE, TrainConfig, prepare_folder};

/// What a command that ran to its end found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Good,
    CheckFailed,
}

/// The verifiable CPU baseline for efficient vision transformers.
#[derive(Parser)]
#[command(name = "karat", version, arg_required_else_help = false, after_help = "Example: karat verify fixtures/cases --dtype f64")]
struct Cli {
    /// Threads to compute with [default: one per core]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Verify(verify::Verify),
    #[command(subcommand)]
    Case(case::Case),
    List(list::List),
    Pretrain(Box<pretrain::Pretrain>),
    Finetune(Box<finetune::Finetune>),
    Probe(probe::Probe),
    Reconstruct(reconstruct::Reconstruct),
    Predict(predict::Predict),
    Eval(eval::Eval),
    Features(features::Features),
    #[command(subcommand)]
    Tokenizer(Box<tokenizer::Tokenizer>),
    #[command(subcommand)]
    Analyze(analyze::Analyze),
    Compare(compare::Compare),
    Transfer(transfer::Transfer),
    Group(group::Group),
    #[command(subcommand)]
    Bench(bench::Bench),
}

/// Of each thread: commands run on one of the pool's.
const STACK: usize = 8 << 20;

/// Runs the program on the arguments of the process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version go to standard output and are no mistake.
        Err(e) if !e.use_stderr() => {
            let _ = e.print();
            return ExitCode::SUCCESS;
        }
        Err(e) => return complain(&usage_line(&e.to_string())),
    };
    match cli.run() {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::CheckFailed) => ExitCode::from(1),
        // The reader of our output has seen enough (`karat … | head`).
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => ExitCode::from(2),
        Err(e) => complain(&e.to_string()),
    }
}

fn complain(line: &str) -> ExitCode {
    eprintln!("karat: {}", line.replace('\n', " "));
    ExitCode::from(2)
}

/// The first paragraph of what clap says, in one line.
fn usage_line(message: &str) -> String {
    let paragraph: Vec<&str> = message.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    paragraph.join(" ").trim_start_matches("error: ").to_string() + " (see --help)"
}

impl Cli {
    fn run(self) -> Result<Outcome> {
        crate::simd::init()?;
        // 0 is one per core.
        let threads = self.threads.map_or(0, usize::from);
        let pool = rayon::ThreadPoolBuilder::new().stack_size(STACK).num_threads(threads).build_global();
        pool.map_err(|e| Error::usage(format!("--threads {threads}: {e}")))?;
        // Locked there: the lock belongs to the thread that takes it.
        threads::awake(|| self.command.run(&mut io::stdout().lock(), self.threads))
    }
}

impl Command {
    fn run(self, out: &mut dyn Write, threads: Option<u16>) -> Result<Outcome> {
        match self {
            Command::Verify(command) => command.run(out),
            Command::Case(command) => command.run(out),
            Command::List(command) => command.run(out),
            Command::Pretrain(command) => command.run(out),
            Command::Finetune(command) => command.run(out),
            Command::Probe(command) => command.run(out),
            Command::Reconstruct(command) => command.run(out),
            Command::Predict(command) => command.run(out),
            Command::Eval(command) => command.run(out),
            Command::Features(command) => command.run(out),
            Command::Tokenizer(command) => command.run(out),
            Command::Analyze(command) => command.run(out),
            Command::Compare(command) => command.run(out),
            Command::Transfer(command) => command.run(out),
            Command::Group(command) => command.run(out),
            Command::Bench(command) => command.run(out, threads),
        }
    }
}

/// Refuses to start a run in a folder that holds one.
fn new_run(folder: &Path) -> Result<()> {
    let name = folder.display();
    match folder.join(STATE).exists() {
        false => Ok(()),
        true => Err(Error::usage(format!("{name} already holds a run: continue it with --resume {name}, or choose another --out"))),
    }
}

/// Makes the folder of a run, with its configuration in it.
fn write_config(folder: &Path, config: &TrainConfig) -> Result<()> {
    prepare_folder(folder)?;
    let path = folder.join("config.toml");
    let toml = toml::to_string(&config.to_json()).map_err(|e| Error::format(&path, e.to_string()))?;
    crate::fs::write_atomic(&path, toml.as_bytes())
}

/// A bar on standard error for work of `steps` steps: shown on a terminal only.
fn progress(steps: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(steps).with_prefix(what);
    if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len}  {msg}  {eta} left") {
        bar.set_style(style);
    }
    bar
}

/// Writes one line.
fn say(out: &mut dyn Write, line: impl std::fmt::Display) -> Result<()> {
    writeln!(out, "{line}").map_err(|e| Error::io("standard output", e))
}

/// The objective of a pre-training run.
fn objective(config: &TrainConfig) -> Result<Box<dyn MaskedModel>> {
    let tokenizer = config.tokenizer.as_ref().map(Path::new);
    let TrainConfig { method, model, image_size, mask_ratio, drop_path, .. } = config;
    methods::build_run(method, model, *image_size, *mask_ratio, *drop_path, tokenizer, config.normalization())
}
