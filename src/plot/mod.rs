//! The few pictures that karat draws, as plain SVG.

pub mod grouping;
