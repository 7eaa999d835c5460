//! `karat compare`: runs side by side.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::{Outcome, say};
use crate::plot::{Chart, Series, save_line_chart};
use crate::train::{CHECKPOINT, Checkpoint, METRICS, PROBE, SUMMARY, TRANSFER, TrainConfig, saved_config};
use crate::{Error, Result};

/// Compare runs: one table, and their loss curves in one chart
///
/// Time and speed come from the runs' metrics, memory is the peak of the buffers for tensors in the run's last part, the loss is the mean
/// over the last twentieth of the steps, and the accuracies what `karat probe` and `karat transfer` (fine-tuned) found, where they were
/// asked. Losses of different methods measure different things.
#[derive(Args)]
#[command(after_help = "Example: karat compare runs/greenmim-swin_micro runs/simmim-swin_micro -o compare.svg")]
pub struct Compare {
    /// Folders of runs
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The SVG file to write
    #[arg(short, long, value_name = "FILE", default_value = "compare.svg")]
    output: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

struct Read {
    name: String,
    config: TrainConfig,
    /// Steps and losses.
    losses: Vec<(f64, f64)>,
    seconds: f64,
    peak_bytes: Option<u64>,
    probe: Option<f64>,
    tuned: Option<f64>,
}

/// A JSON file, if it is there.
fn optional(path: &Path) -> Result<Value> {
    if !path.exists() {
        return Ok(Value::Null);
    }
    let text = fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_str(&text).map_err(|e| Error::format(path, format!("expected JSON: {e}")))
}

impl Read {
    fn open(folder: &Path) -> Result<Self> {
        let config = saved_config(&Checkpoint::open(folder.join(CHECKPOINT))?)?;
        let path = folder.join(METRICS);
        let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let (mut losses, mut seconds) = (Vec::new(), 0.0);
        // A run that was killed may have torn its last line.
        for line in text.lines().map_while(|line| serde_json::from_str::<Value>(line).ok()) {
            if let (Some(step), Some(loss), Some(speed)) =
                (line["step"].as_f64(), line["loss"].as_f64(), line["images_per_second"].as_f64())
            {
                losses.push((step, loss));
                seconds += config.batch as f64 / speed.max(1e-9);
            }
        }
        if losses.is_empty() {
            return Err(Error::format(&path, "expected the metrics of at least one step, found none"));
        }
        Ok(Read {
            name: folder.display().to_string(),
            config,
            losses,
            seconds,
            peak_bytes: optional(&folder.join(SUMMARY))?["peak_bytes"].as_u64(),
            probe: optional(&folder.join(PROBE))?["accuracy"].as_f64(),
            tuned: optional(&folder.join(TRANSFER))?["finetuned"]["mean"].as_f64(),
        })
    }

    fn final_loss(&self) -> f64 {
        let last = self.losses.len().div_ceil(20);
        self.losses[self.losses.len() - last..].iter().fold(0.0, |sum, l| sum + l.1) / last as f64
    }

    fn images_per_second(&self) -> f64 {
        (self.losses.len() * self.config.batch) as f64 / self.seconds
    }

    /// Means of the losses over a hundredth of the run each.
    fn smooth(&self) -> Vec<(f64, f64)> {
        let each = self.losses.len().div_ceil(100);
        let mean = |part: &[(f64, f64)]| {
            let sum = part.iter().fold((0.0, 0.0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
            (sum.0 / part.len() as f64, sum.1 / part.len() as f64)
        };
        self.losses.chunks(each).map(mean).collect()
    }
}

impl Compare {
    /// Runs the command; the table goes to `out`.
    ///
    /// # Errors
    /// A folder without a run, a damaged file.
    pub(super) fn run(self, out: &mut dyn Write) -> Result<Outcome> {
        let runs = self.runs.iter().map(|folder| Read::open(folder)).collect::<Result<Vec<_>>>()?;
        let series = |run: &Read| Series { name: run.name.clone(), points: run.smooth() };
        let chart = Chart {
            title: "loss".into(),
            x_label: "step".into(),
            y_label: "loss".into(),
            log_y: true,
            series: runs.iter().map(series).collect(),
            ..Chart::default()
        };
        save_line_chart(&self.output, &chart)?;
        if self.json {
            let row = |run: &Read| {
                json!({
                    "run": run.name, "method": run.config.method, "model": run.config.model, "steps": run.losses.len(),
                    "batch": run.config.batch, "seconds": run.seconds, "images_per_second": run.images_per_second(),
                    "peak_bytes": run.peak_bytes, "loss": run.final_loss(), "probe_accuracy": run.probe,
                    "finetune_accuracy": run.tuned,
                })
            };
            say(out, Value::Array(runs.iter().map(row).collect()))?;
            return Ok(Outcome::Good);
        }
        let width = runs.iter().map(|run| run.name.chars().count()).max().unwrap_or(0).max(3);
        let head = format!(
            "{:<10}{:<20}{:>8}{:>10}{:>10}{:>9}{:>10}{:>8}{:>12}",
            "method", "network", "steps", "s", "images/s", "peak MB", "loss", "probe", "fine-tuned"
        );
        say(out, format!("{:<width$}  {head}", "run"))?;
        for run in &runs {
            let peak = run.peak_bytes.map_or("".into(), |bytes| format!("{:.0}", bytes as f64 / 1e6));
            let percent = |share: Option<f64>| share.map_or("".into(), |share| format!("{:.1} %", 100.0 * share));
            let (probe, tuned) = (percent(run.probe), percent(run.tuned));
            let (method, model, steps) = (&run.config.method, &run.config.model, run.losses.len());
            let (seconds, speed, loss) = (run.seconds, run.images_per_second(), run.final_loss());
            let row = format!(
                "{:<width$}  {method:<10}{model:<20}{steps:>8}{seconds:>10.1}{speed:>10.1}{peak:>9}{loss:>10.4}{probe:>8}{tuned:>12}",
                run.name
            );
            say(out, row.trim_end())?;
        }
        say(out, format!("wrote {}", self.output.display()))?;
        Ok(Outcome::Good)
    }
}
