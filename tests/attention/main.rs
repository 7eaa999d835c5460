//! Every attention mechanism against an oracle: plain loops in float64, written from the definition; and the identities that its
//! sheet names. Shapes are random, small and odd.
//!
//! `KARAT_SOAK_CASES=5000` tries that many configurations per mechanism. A failure prints the seed.

mod common;

mod class;
mod class_xnorm;
mod cluster;
mod cogview_sparse;
mod core;
mod dilated;
mod pb_relax;
mod performer;
mod gaussian_mask;
mod softmax;
mod talking_heads;
mod token_transformer;
mod xca;
mod xnorm;
