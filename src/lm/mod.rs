//! Autoregressive modeling of captions and pictures (CogView, arXiv 2105.13290): sequences, training loss, sampling, re-ranking.

pub mod generate;
pub mod layout;
pub mod loss;
pub mod sample;
