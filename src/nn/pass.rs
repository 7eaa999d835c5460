//! How a network is being run: what is kept for the backward pass, and what is random.

use std::sync::{Arc, Mutex, PoisonError};

use crate::tensor::{Float, Tensor};

/// What one training step needs to be reproducible: everything random in it depends on these numbers alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepKey {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step, counted from 0 (or any number for a picture).
    pub step: u64,
}

/// How a network is being run. It travels with the parameters ([`Params::run_as`](super::Params::run_as)), so that layers which don't
/// care need no argument for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pass {
    /// Forward and backward as the equations have it: nothing is random, running statistics are as given.
    #[default]
    Plain,
    /// Forward alone: networks keep nothing for a backward pass.
    Infer,
    /// A training step: drop path draws from the key, batch norms use the batch. With `recompute`, each block keeps its input alone and
    /// runs once more in the backward pass.
    Train {
        /// The step.
        key: StepKey,
        /// Trade time for memory.
        recompute: bool,
    },
}

/// A name and the tensor under it.
pub type Named<T> = (String, Tensor<T>);

/// Collects the tensors that a network shows on its way: `pooled`, what the head sees, and the output of each stage.
#[derive(Clone, Debug)]
pub struct Watch<T: Float>(Arc<Mutex<Vec<Named<T>>>>);

impl<T: Float> Default for Watch<T> {
    fn default() -> Self {
        Watch(Arc::default())
    }
}

impl<T: Float> Watch<T> {
    pub(super) fn see(&self, name: String, x: &Tensor<T>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((name, x.clone()));
    }

    /// What was shown since the last call, in order.
    pub fn take(&self) -> Vec<Named<T>> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
