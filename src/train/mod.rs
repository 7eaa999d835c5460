//! Training: optimizer, schedule, checkpoints, metrics, the loop, and the linear probe. Generic over [`crate::nn::Objective`].

mod config;
mod metrics;
mod optimizer;
mod probe;
mod schedule;
mod trainer;

pub use config::{BUILTIN, Length, TrainConfig};
pub use metrics::{METRICS, StepReport, read as read_metrics};
pub use optimizer::{Optimizer, clip, decay_runs, decays};
pub use probe::{Classifier, Features, ProbeResult, extract, pixels, probe};
pub use schedule::Schedule;
#[cfg(feature = "cli")]
pub(crate) use trainer::prepare_folder;
pub use trainer::{CHECKPOINT, PROBE, STATE, SUMMARY, Trainer, saved_config};

pub use crate::nn::Checkpoint;
