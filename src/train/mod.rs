//! Training: optimizer, schedule, checkpoints, metrics, the loop, classifiers, and the linear probe. The loop is generic over
//! [`crate::nn::Objective`].

mod classification;
mod classifier_run;
mod config;
mod evaluation;
mod finetune;
mod gain;
mod layer_decay;
mod metrics;
mod mixing;
mod optimizer;
mod probe;
mod schedule;
mod trainer;
mod transfer;

pub use classification::{Classification, Teacher};
pub use classifier_run::{Start, evaluation, fit};
pub use config::{BUILTIN, Length, TrainConfig};
pub use evaluation::{Accuracy, Evaluation};
pub use finetune::{CLASSIFICATION, FineTune, TeacherConfig};
pub use gain::{Gain, Spread, TRANSFER};
pub use layer_decay::layer_rates;
pub use metrics::{METRICS, StepReport, read as read_metrics, read_accuracies};
pub use mixing::{Mix, Mixing};
pub use optimizer::{Optimizer, clip, decay_runs, decays};
pub use probe::{Classifier, Features, ProbeResult, extract, pixels, probe};
pub use schedule::Schedule;
#[cfg(feature = "cli")]
pub(crate) use trainer::prepare_folder;
pub use trainer::{BEST, CHECKPOINT, Event, PROBE, STATE, SUMMARY, Trainer, saved_config};
pub use transfer::{finetuning_network, transfer};

pub use crate::nn::Checkpoint;
