//! The few pictures that karat draws: line and bar charts (SVG), confusion matrices (SVG, PNG) and grids of image tiles (PNG).

mod bars;
mod chart;
mod confusion;
mod font;
mod grid;
pub mod grouping;

pub use bars::{Bars, bar_chart_svg};
pub use chart::{Chart, Series, charts_svg, line_chart_svg};
pub use confusion::Confusion;
pub use grid::{Grid, Tile, image_grid_png};

use std::path::Path;

use crate::Result;

/// Writes a chart to an SVG file, atomically.
///
/// # Errors
/// If the file cannot be written.
pub fn save_line_chart(path: impl AsRef<Path>, chart: &Chart) -> Result<()> {
    crate::fs::write_atomic(path, line_chart_svg(chart).as_bytes())
}
