//! The pictures of a training run: the curves of loss and accuracy (SVG) and reconstructions (PNG).

use std::fmt::Write;
use std::path::Path;

use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};

use crate::data::transform::Normalization;
use crate::fs::write_atomic;
use crate::mim::MaskedModel;
use crate::nn::{Params, StepKey};
use crate::plot::{Chart, Series, save_line_chart};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Side of one image in the picture, about.
const CELL: usize = 128;
const GAP: usize = 4;

/// Writes a PNG with one column per image of `images` `[B, C, S, S]` and three rows: the original, what the network sees (hidden pixels
/// grey), and its reconstruction with the visible pixels pasted in.
pub fn reconstructions(
    path: &Path,
    objective: &dyn MaskedModel,
    params: &Params<f32>,
    images: &Tensor<f32>,
    key: StepKey,
    normalization: Normalization,
) -> Result<()> {
    let [b, c, s, _] = images.dims("images")?;
    let result = objective.reconstruct(params, images, key)?;
    for (what, tensor) in [("reconstruction", &result.predicted), ("mask", &result.hidden)] {
        tensor.expect_shape(what, images.shape())?;
    }
    let (x, y, hidden) = (images.data(), result.predicted.data(), result.hidden.data());
    let scale = (CELL / s).max(1);
    let pitch = s * scale + GAP;
    let (width, height) = (b * pitch + GAP, 3 * pitch + GAP);
    let mut rgb = vec![255u8; width * height * 3];
    for (row, column) in (0..3).flat_map(|row| (0..b).map(move |column| (row, column))) {
        for (v, u) in (0..s * scale).flat_map(|v| (0..s * scale).map(move |u| (v, u))) {
            let pixel = ((GAP + row * pitch + v) * width + GAP + column * pitch + u) * 3;
            for channel in 0..3 {
                let plane = if c == 3 { channel } else { 0 };
                let at = ((column * c + plane) * s + v / scale) * s + u / scale;
                let color =
                    |value: f32| ((value * normalization.std[plane] + normalization.mean[plane]).clamp(0.0, 1.0) * 255.0).round() as u8;
                rgb[pixel + channel] = match row {
                    0 => color(x[at]),
                    1 if hidden[at] > 0.5 => 128,
                    2 if hidden[at] > 0.5 => color(y[at]),
                    _ => color(x[at]),
                };
            }
        }
    }
    let mut bytes = Vec::new();
    PngEncoder::new(&mut bytes)
        .write_image(&rgb, width as u32, height as u32, ExtendedColorType::Rgb8)
        .map_err(|e| Error::format(path, e.to_string()))?;
    write_atomic(path, &bytes)
}

/// Writes the loss over the steps as an SVG: every step thin, a moving average bold, on a logarithmic scale.
pub fn loss_curve(path: &Path, losses: &[(u64, f64)], title: &str) -> Result<()> {
    const SIZE: (f64, f64) = (720.0, 400.0);
    const MARGIN: (f64, f64, f64, f64) = (64.0, 36.0, 20.0, 44.0); // left, top, right, bottom
    let points: Vec<(f64, f64)> =
        losses.iter().filter(|(_, loss)| *loss > 0.0).map(|&(step, loss)| (step as f64, libm::log10(loss))).collect();
    let last = points.last().map_or(1.0, |p| p.0);
    let (mut low, mut high) = points.iter().fold((f64::MAX, f64::MIN), |(l, h), p| (l.min(p.1), h.max(p.1)));
    if points.is_empty() {
        (low, high) = (-1.0, 0.0);
    }
    let pad = (0.05 * (high - low)).max(0.01);
    (low, high) = (low - pad, high + pad);
    let px = |step: f64| MARGIN.0 + step / last * (SIZE.0 - MARGIN.0 - MARGIN.2);
    let py = |y: f64| MARGIN.1 + (high - y) / (high - low) * (SIZE.1 - MARGIN.1 - MARGIN.3);

    let mut svg = String::new();
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" font-size=\"12\">",
        SIZE.0, SIZE.1
    );
    let _ = writeln!(svg, "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>");
    let title = title.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "<text x=\"{}\" y=\"22\" font-size=\"14\">{title}</text>", MARGIN.0);
    for i in 0..=4 {
        let y = low + (high - low) * f64::from(i) / 4.0;
        let (x2, at) = (SIZE.0 - MARGIN.2, py(y));
        let _ = writeln!(svg, "<line x1=\"{}\" y1=\"{at:.1}\" x2=\"{x2}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>", MARGIN.0);
        let label = match libm::pow(10.0, y) {
            small if small < 0.01 => format!("{small:.1e}"),
            large => format!("{large:.3}"),
        };
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>", MARGIN.0 - 6.0, at + 4.0);
        let step = last * f64::from(i) / 4.0;
        let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{step:.0}</text>", px(step), SIZE.1 - MARGIN.3 + 18.0);
    }
    let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">step</text>", SIZE.0 / 2.0, SIZE.1 - 8.0);
    let window = (points.len() / 50).max(1);
    let smooth: Vec<(f64, f64)> =
        points.windows(window).map(|w| (w[w.len() / 2].0, w.iter().map(|p| p.1).sum::<f64>() / w.len() as f64)).collect();
    for (line, style) in [(&points, "stroke=\"#9bd\" stroke-width=\"1\""), (&smooth, "stroke=\"#036\" stroke-width=\"2\"")] {
        // A curve needs no more points than the picture has columns.
        let stride = line.len().div_ceil(1440).max(1);
        let path: Vec<String> = line.iter().step_by(stride).map(|p| format!("{:.1},{:.1}", px(p.0), py(p.1))).collect();
        let _ = writeln!(svg, "<polyline fill=\"none\" {style} points=\"{}\"/>", path.join(" "));
    }
    svg.push_str("</svg>\n");
    write_atomic(path, svg.as_bytes())
}

/// Writes the accuracies (top-1 and top-5, fractions) over the steps as an SVG, in per cent.
pub fn accuracy_curve(path: &Path, accuracies: &[(u64, [f64; 2])], title: &str) -> Result<()> {
    let series = ["top-1", "top-5"].iter().enumerate().map(|(i, name)| Series {
        name: (*name).into(),
        points: accuracies.iter().map(|(step, top)| (*step as f64, 100.0 * top[i])).collect(),
    });
    let (x_label, y_label) = ("step".into(), "accuracy on the test images, %".into());
    save_line_chart(path, &Chart { title: title.into(), x_label, y_label, series: series.collect(), ..Chart::default() })
}
