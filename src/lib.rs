//! karat: the verifiable CPU baseline for efficient vision transformers.
//!
//! Rooms stack; imports point downward only.
//!
//! - [`tensor`]: contiguous tensors on pooled memory, `f32` and `f64`, counter-based random numbers.
//! - [`simd`]: sixteen-lane vectors over AVX-512, AVX2 and portable code, chosen at run time; exp, erf, tanh, GELU.
//! - [`linalg`]: matrix products with packing and epilogues; the same bits on every machine.
//! - [`kernel`]: slices in, slices out: norms, softmax attention, patches, optimizer steps, each with its backward pass.
//! - [`nn`]: layers: named parameters in one flat store, and kernels.
//! - [`attention`]: one file per mechanism.
//! - [`case`]: golden cases: the registry of operations, verification, comparison with derived tolerances.
//! - [`grouping`]: window grouping: knapsack, optimal partition with certificate, plans.
//! - [`model`]: one file per architecture.
//! - [`tokenizer`]: pictures and text to integers and back: discrete VAEs, VQ-VAE, byte pairs.
//! - [`lm`]: autoregressive modeling of captions and pictures: sequences, loss, sampling, re-ranking.
//! - [`mim`]: masked image modeling: masks, objectives.
//! - [`train`]: optimizer, schedule, checkpoints, the training loop, linear probes.
//! - [`plot`]: the few pictures that karat draws.
//! - [`data`]: built-in images, image folders, IDX, CIFAR, npy; augmentation; batches.

pub mod attention;
pub mod case;
#[cfg(feature = "cli")]
pub mod cli;
pub mod data;
pub mod error;
mod fs;
pub mod grouping;
pub mod kernel;
pub mod linalg;
pub mod lm;
pub mod mim;
pub mod model;
pub mod nn;
#[cfg(feature = "cli")]
pub mod plot;
pub mod simd;
pub mod tensor;
pub mod threads;
pub mod tokenizer;
pub mod train;

pub use error::{Error, Result};
