//! How far a training run is: a bar on a terminal, a line now and then elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::train::StepReport;

/// The progress of a run on standard error.
pub struct Progress {
    bar: Option<ProgressBar>,
    first: u64,
    started: Instant,
    said: Instant,
    loss: f64,
    rate: f64,
}

impl Progress {
    pub fn new(done: u64, steps: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(steps).with_position(done);
            if let Ok(style) = ProgressStyle::with_template("{wide_bar} step {pos}/{len}  {msg}") {
                bar.set_style(style);
            }
            bar
        });
        Progress { bar, first: done, started: Instant::now(), said: Instant::now(), loss: 0.0, rate: 0.0 }
    }

    pub fn step(&mut self, report: &StepReport) {
        const KEEP: f64 = 0.95;
        let done = report.step - self.first;
        // Exponential means, without the pull of their start.
        let start = 1.0 - KEEP.powf(done as f64);
        self.loss = KEEP * self.loss + (1.0 - KEEP) * report.loss;
        self.rate = KEEP * self.rate + (1.0 - KEEP) * report.images_per_second();
        let left = self.started.elapsed().as_secs_f64() / done as f64 * (report.steps - report.step) as f64;
        let clock = format!("{}:{:02}", left as u64 / 60, left as u64 % 60);
        let message = format!("loss {:.4}  {:.0} images/s  {clock} left", self.loss / start, self.rate / start);
        match &self.bar {
            Some(bar) => {
                bar.set_position(report.step);
                bar.set_message(message);
            }
            None if done == 1 || report.step == report.steps || self.said.elapsed() > Duration::from_secs(10) => {
                self.said = Instant::now();
                eprintln!("step {}/{}  epoch {}  {message}", report.step, report.steps, report.epoch + 1);
            }
            None => {}
        }
    }

    /// A line that stays.
    pub fn say(&self, line: String) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}
