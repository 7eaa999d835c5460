//! `karat bench report`: the standard set of networks, in a table and two pictures.

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::super::progress;
use super::{Outcome, say};
use crate::error::{Error, Result};
use crate::fs::write_atomic;
use crate::plot::{Bars, bar_chart_svg};
use crate::train::prepare_folder;

/// Name and batch: those that `reference/bench_models.py` compares with PyTorch.
const STANDARD: [(&str, usize); 8] = [
    ("vit_tiny_patch16_224", 8),
    ("deit_small_patch16_224", 8),
    ("xcit_nano_12_p16_224", 8),
    ("xcit_tiny_12_p16_224", 8),
    ("cait_xxs24_224", 8),
    ("coat_lite_tiny", 8),
    ("swin_tiny_patch4_window7_224", 8),
    ("beit_base_patch16_224", 4),
];
const MODES: [&str; 2] = ["infer", "train"];

/// Measure the standard networks: a table, and pictures of speed and memory
///
/// Each network and mode is a process of its own (`karat bench model`), so that memory is its own. Writes report.md, report.json,
/// speed.svg (fraction of the FMA peak) and memory.svg (largest resident set).
#[derive(Args)]
#[command(after_help = "Example: karat bench report --out report")]
pub struct BenchReport {
    /// The networks [default: eight that stand for all]
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Images per step [default: 8; 4 for BEiT-B]
    #[arg(long, value_name = "B")]
    batch: Option<usize>,
    /// Measured steps
    #[arg(long, default_value_t = 5, value_name = "R")]
    repeat: usize,
    /// The folder to write
    #[arg(short, long, default_value = "bench-report", value_name = "DIR")]
    out: PathBuf,
}

impl BenchReport {
    pub(super) fn run(&self, out: &mut dyn Write, threads: Option<u16>) -> Result<Outcome> {
        let mut set: Vec<(&str, usize)> = self.names.iter().map(|name| (name.as_str(), self.batch.unwrap_or(8))).collect();
        if set.is_empty() {
            set = STANDARD.iter().map(|&(name, batch)| (name, self.batch.unwrap_or(batch))).collect();
        }
        prepare_folder(&self.out)?;
        let bar = progress((set.len() * MODES.len()) as u64, "networks");
        let rows = set.iter().map(|&(name, batch)| self.row(name, batch, threads, &bar)).collect::<Result<Vec<_>>>()?;
        bar.finish_and_clear();
        let table = table(&rows);
        say(out, &table)?;
        let file = |name: &str, text: &str| write_atomic(self.out.join(name), text.as_bytes());
        file("report.md", &(table + "\n"))?;
        file("report.json", &(json!(rows).to_string() + "\n"))?;
        let of = |key: &str, factor: f64| {
            let values = |row: &[Value; 2]| row.each_ref().map(|run| run[key].as_f64().map(|x| x * factor)).to_vec();
            rows.iter().map(|row| (text(&row[0]["name"]), values(row))).collect()
        };
        let names: Vec<String> = vec!["inference".into(), "training step".into()];
        let machine = format!("{} threads, {}", rows[0][0]["threads"], text(&rows[0][0]["simd"]));
        let speed = Bars {
            title: format!("Speed ({machine})"),
            label: "fraction of the FMA peak".into(),
            names: names.clone(),
            groups: of("fraction_of_peak", 1.0),
        };
        let memory = Bars {
            title: format!("Memory ({machine})"),
            label: "largest resident set, MB".into(),
            names,
            groups: of("peak_rss_bytes", 1e-6),
        };
        file("speed.svg", &bar_chart_svg(&speed))?;
        file("memory.svg", &bar_chart_svg(&memory))?;
        Ok(Outcome::Good)
    }

    /// Inference and training of one network.
    fn row(&self, name: &str, batch: usize, threads: Option<u16>, bar: &ProgressBar) -> Result<[Value; 2]> {
        let program = std::env::current_exe().map_err(|e| Error::io("the path of this program", e))?;
        let run = |mode: &str| -> Result<Value> {
            let mut command = Command::new(&program);
            command.args(["bench", "model", name, "--mode", mode, "--json", "-"]);
            command.args(["--batch", &batch.to_string(), "--repeat", &self.repeat.to_string()]);
            threads.iter().for_each(|threads| _ = command.args(["--threads", &threads.to_string()]));
            bar.set_message(format!("{name} {mode}"));
            let done = command.output().map_err(|e| Error::io(program.display().to_string(), e))?;
            bar.inc(1);
            if !done.status.success() {
                let said = String::from_utf8_lossy(&done.stderr);
                return Err(Error::usage(said.trim().trim_start_matches("karat: ")));
            }
            serde_json::from_slice(&done.stdout).map_err(|e| Error::format("karat bench model", format!("expected JSON: {e}")))
        };
        Ok([run(MODES[0])?, run(MODES[1])?])
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_string()
}

/// One row per network, in Markdown.
fn table(rows: &[[Value; 2]]) -> String {
    let mut table = "| network | batch | inference, images/s | of the peak | MB | training, images/s | of the peak | MB |\n\
                     | --- | --- | --- | --- | --- | --- | --- | --- |"
        .to_string();
    for row in rows {
        let cells = row.each_ref().map(|run| {
            let number = |key: &str| run[key].as_f64().unwrap_or(f64::NAN);
            format!("{:.1} | {:.2} | {:.0}", number("images_per_second"), number("fraction_of_peak"), number("peak_rss_bytes") * 1e-6)
        });
        table += &format!("\n| {} | {} | {} | {} |", text(&row[0]["name"]), row[0]["batch"], cells[0], cells[1]);
    }
    table
}
