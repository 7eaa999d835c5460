//! Every attention mechanism against an oracle: plain loops in float64, written from the definition; and the identities that its
//! sheet names. Shapes are random, small and odd.
//!
//! `KARAT_SOAK_CASES=5000` tries that many configurations per mechanism. A failure prints the seed.

mod common;

mod beit;
mod class;
mod class_xnorm;
mod cluster;
mod cogview_sparse;
mod core;
mod dilated;
mod factorized_conv;
mod gaussian_mask;
mod group_window;
mod long;
mod pb_relax;
mod performer;
mod retention;
mod single_path;
mod softmax;
mod spatial_reduction;
mod talking_heads;
mod token_transformer;
mod um_window;
mod visual_tokens;
mod window;
mod xca;
mod xnorm;
