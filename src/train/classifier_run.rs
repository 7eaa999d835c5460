//! What every training of a classifier does before its first step: where its parameters come from, what it is measured on.

use super::classification::Classification;
use super::config::TrainConfig;
use super::evaluation::{Accuracy, Evaluation};
use super::metrics::StepReport;
use super::trainer::Trainer;
use super::transfer::transfer;
use crate::data::{Dataset, Transform};
use crate::model::weights::{self, Loaded};
use crate::model::zoo::Model;
use crate::nn::Checkpoint;
use crate::{Error, Result};

/// Where a new classifier's parameters come from.
pub enum Start {
    /// Its initialisation.
    Scratch,
    /// A checkpoint of pre-training.
    Pretrained(Checkpoint),
    /// A classifier's parameters, but for the last layer if `new_head`.
    Classifier {
        /// The parameters.
        file: Checkpoint,
        /// Other classes: leave the last layer out.
        new_head: bool,
    },
}

impl Start {
    /// Loads the parameters into `trainer` of the classifier `model`; what was loaded, if anything.
    ///
    /// # Errors
    /// As [`transfer`](super::transfer()) and [`weights::load`].
    pub fn load(&self, model: &Model, trainer: &mut Trainer) -> Result<Option<Loaded>> {
        let mut params = trainer.params().clone();
        let loaded = match self {
            Start::Scratch => return Ok(None),
            Start::Pretrained(file) => transfer(file, model, &mut params)?,
            Start::Classifier { file, new_head } => weights::load(file, model, &mut params, *new_head)?,
        };
        trainer.start_from(params)?;
        Ok(Some(loaded))
    }
}

/// `classification` of `model` on the images `test`, resized and cropped as the network's authors evaluate it.
///
/// # Errors
/// As [`Evaluation::new`].
pub fn evaluation<'a>(
    classification: &'a Classification,
    model: &Model,
    test: &'a Dataset,
    config: &TrainConfig,
) -> Result<Evaluation<'a>> {
    let size = config.image_size;
    let resize = ((size as f64 / model.variant.eval.crop).floor() as usize).max(size);
    Evaluation::new(classification, test, Transform::evaluation(size, 3, resize, config.normalization())?)
}

/// Trains the classifier of `config` from `start` on `train` without writing files; its accuracy on `test` after the last step.
///
/// # Errors
/// If `config` is of pre-training, or does not fit the images or `start`; as [`Trainer::step`].
pub fn fit(config: &TrainConfig, start: &Start, [train, test]: [&Dataset; 2], progress: &mut dyn FnMut(&StepReport)) -> Result<Accuracy> {
    let settings = config.finetune.as_ref().ok_or_else(|| Error::config("method", "expected the training of a classifier"))?;
    let model = settings.model(&config.model, config.image_size)?;
    let classification = Classification::new(&model, settings)?;
    let evaluation = evaluation(&classification, &model, test, config)?;
    let mut trainer = Trainer::new(&classification, train, config.clone())?;
    start.load(&model, &mut trainer)?;
    let (mut done, steps) = trainer.progress();
    while done < steps {
        progress(&trainer.step()?);
        done += 1;
    }
    evaluation.run(trainer.averaged())
}
