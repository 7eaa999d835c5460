//! Line charts as SVG text.

use std::fmt::{Display, Write};

/// One line of a chart.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// Its entry in the legend.
    pub name: String,
    /// `(x, y)` in the order they are joined. Points that cannot be shown (not finite, or not positive on a logarithmic axis) break
    /// the line.
    pub points: Vec<(f64, f64)>,
}

/// What a line chart shows.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    /// Above the chart.
    pub title: String,
    /// Below the horizontal axis.
    pub x_label: String,
    /// Beside the vertical axis.
    pub y_label: String,
    /// Logarithmic horizontal axis.
    pub log_x: bool,
    /// Logarithmic vertical axis.
    pub log_y: bool,
    /// The lines.
    pub series: Vec<Series>,
}

/// Colours that stay apart for colour-blind readers (Okabe and Ito, *Color universal design*, 2008; yellow is left out, black comes last).
pub(super) const COLORS: [&str; 7] = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"];
/// Once the colours are used up, the lines are dashed.
const DASHES: [&str; 5] =
    ["", " stroke-dasharray=\"7 4\"", " stroke-dasharray=\"2 3\"", " stroke-dasharray=\"9 3 2 3\"", " stroke-dasharray=\"14 5\""];

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 78.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 58.0;
const RIGHT: f64 = 20.0;
/// Lines with no more points than this have each of them marked.
const MARKED: usize = 40;

/// Draws a chart. The same chart gives the same text.
pub fn line_chart_svg(chart: &Chart) -> String {
    let shown = |&(x, y): &(f64, f64)| Axis::shows(x, chart.log_x) && Axis::shows(y, chart.log_y);
    let points = || chart.series.iter().flat_map(|s| &s.points).filter(|p| shown(p));
    let x_axis = Axis::new(points().map(|p| p.0), chart.log_x);
    let y_axis = Axis::new(points().map(|p| p.1), chart.log_y);
    let x_of = |x: f64| LEFT + x_axis.place(x) * WIDTH;
    let y_of = |y: f64| TOP + (1.0 - y_axis.place(y)) * HEIGHT;

    let [width, height] = chart.size();
    let mut svg = open_svg(width, height, 12);
    // Writing to a string cannot fail.
    let mut line = |text: std::fmt::Arguments| writeln!(svg, "{text}").expect("write to a string");
    let (middle, bottom, right) = (LEFT + WIDTH / 2.0, TOP + HEIGHT, LEFT + WIDTH);
    line(format_args!("<text x=\"{middle}\" y=\"26\" text-anchor=\"middle\" font-size=\"15\">{}</text>", escape(&chart.title)));
    for (x, label) in x_axis.ticks(8) {
        let at = x_of(x);
        line(format_args!("<path d=\"M{at:.1} {TOP}V{:.1}\" stroke=\"#ddd\"/>", bottom + 5.0));
        line(format_args!("<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>", bottom + 19.0));
    }
    for (y, label) in y_axis.ticks(7) {
        let at = y_of(y);
        line(format_args!("<path d=\"M{} {at:.1}H{right}\" stroke=\"#ddd\"/>", LEFT - 5.0));
        line(format_args!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>", LEFT - 9.0, at + 4.0));
    }
    line(format_args!("<rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"none\" stroke=\"#444\"/>"));
    line(format_args!(
        "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\" font-size=\"13\">{}</text>",
        bottom + 42.0,
        escape(&chart.x_label)
    ));
    let y = TOP + HEIGHT / 2.0;
    line(format_args!(
        "<text transform=\"translate(18 {y}) rotate(-90)\" text-anchor=\"middle\" font-size=\"13\">{}</text>",
        escape(&chart.y_label)
    ));
    for (i, series) in chart.series.iter().enumerate() {
        let (color, dash) = (COLORS[i % COLORS.len()], DASHES[i / COLORS.len() % DASHES.len()]);
        let mut path = String::new();
        for piece in series.points.split(|p| !shown(p)) {
            for (j, &(x, y)) in piece.iter().enumerate() {
                write!(path, "{}{:.1} {:.1}", if j == 0 { 'M' } else { 'L' }, x_of(x), y_of(y)).expect("write to a string");
            }
        }
        line(format_args!("<path d=\"{path}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.8\" stroke-linejoin=\"round\"{dash}/>"));
        if series.points.len() <= MARKED {
            for &(x, y) in series.points.iter().filter(|p| shown(p)) {
                line(format_args!("<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.6\" fill=\"{color}\"/>", x_of(x), y_of(y)));
            }
        }
        let (x, y) = (right + RIGHT, TOP + 10.0 + 20.0 * i as f64);
        line(format_args!("<path d=\"M{x} {y}h26\" stroke=\"{color}\" stroke-width=\"2.4\"{dash}/>"));
        line(format_args!("<text x=\"{}\" y=\"{}\">{}</text>", x + 33.0, y + 4.0, escape(&series.name)));
    }
    line(format_args!("</svg>"));
    svg
}

/// Draws several charts below each other.
pub fn charts_svg(charts: &[Chart]) -> String {
    let drawn: Vec<(String, [f64; 2])> = charts.iter().map(|chart| (line_chart_svg(chart), chart.size())).collect();
    let width = drawn.iter().map(|(_, [width, _])| *width).fold(0.0, f64::max);
    let height: f64 = drawn.iter().map(|(_, [_, height])| *height).sum();
    let mut svg =
        format!("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\">\n");
    svg += "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n";
    let mut y = 0.0;
    for (chart, [_, height]) in drawn {
        svg += &format!("<g transform=\"translate(0 {y})\">\n{chart}</g>\n");
        y += height;
    }
    svg + "</svg>\n"
}

impl Chart {
    /// Width and height of the picture.
    fn size(&self) -> [f64; 2] {
        // About 7 pixels per character: SVG has no way to measure text.
        let legend = self.series.iter().map(|s| s.name.chars().count()).max().map_or(0.0, |n| 50.0 + 7.0 * n as f64);
        let legend_height = 20.0 * self.series.len() as f64;
        [LEFT + WIDTH + RIGHT + legend, TOP + HEIGHT.max(legend_height) + BOTTOM]
    }
}

/// The start of a picture: its size, its type, white ground.
pub(super) fn open_svg(width: impl Display, height: impl Display, font_size: usize) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"Helvetica, Arial, sans-serif\" font-size=\"{font_size}\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    )
}

/// Text inside an SVG element; characters that XML forbids are left out.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\u{FFFE}' | '\u{FFFF}' => {}
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

/// The range of an axis: of the values, or of their decimal logarithms.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    /// Whether an axis can show the value. The largest numbers are left out too: differences between them overflow.
    fn shows(value: f64, log: bool) -> bool {
        value.abs() < 1e300 && (!log || value > 0.0)
    }

    /// An axis that shows all values, with a little room on both sides.
    fn new(values: impl Iterator<Item = f64>, log: bool) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.map(|v| if log { v.log10() } else { v }) {
            (low, high) = (low.min(value), high.max(value));
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        // Equal (or indistinguishable) values get an axis around them.
        let least = if log { 0.1 } else { (low.abs().max(high.abs()) * 1e-9).max(1e-290) };
        if high - low < least {
            let around = if log {
                0.5
            } else if low.abs() < 1e-280 {
                1.0
            } else {
                low.abs() * 0.5
            };
            (low, high) = (low - around, high + around);
        }
        let room = 0.03 * (high - low);
        Axis { low: low - room, high: high + room, log }
    }

    /// Where the value lies, from 0 (low end) to 1 (high end).
    fn place(&self, value: f64) -> f64 {
        ((if self.log { value.log10() } else { value }) - self.low) / (self.high - self.low)
    }

    /// About `wanted` round values with their labels.
    fn ticks(&self, wanted: usize) -> Vec<(f64, String)> {
        let span = self.high - self.low;
        // Less than a factor of 5 has too few round logarithms: linear ticks, placed on the logarithmic axis.
        if self.log && span >= 0.7 {
            return self.log_ticks(wanted);
        }
        let (low, high) = if self.log { (10f64.powf(self.low), 10f64.powf(self.high)) } else { (self.low, self.high) };
        let raw = (high - low) / wanted as f64;
        let decade = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * decade).into_iter().find(|s| *s >= 0.7 * raw).unwrap_or(10.0 * decade);
        let (first, last) = ((low / step).ceil(), (high / step).floor());
        (0..=(last - first) as usize).map(|i| (first + i as f64) * step).map(|v| (v, label(v, step))).collect()
    }

    /// Powers of ten, thinned out if there are many; with 2 and 5 in between if there are few.
    fn log_ticks(&self, wanted: usize) -> Vec<(f64, String)> {
        let (first, last) = (self.low.floor() as i32, self.high.ceil() as i32);
        let every = (self.high - self.low + 1.0) as usize / (wanted + 1) + 1;
        let factors: &[f64] = if self.high - self.low < 3.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let powers = (first..=last).filter(|p| p.rem_euclid(every as i32) == 0);
        let values = powers.flat_map(|p| factors.iter().map(move |f| f * 10f64.powi(p)));
        let shown = values.filter(|v| (0.0..=1.0).contains(&self.place(*v)));
        shown.map(|v| (v, label(v, v))).collect()
    }
}

/// A number with as many digits as tell it from its neighbour `step` away.
fn label(value: f64, step: f64) -> String {
    let digits = step.abs().log10().floor();
    if value.abs() < step / 2.0 {
        return "0".into();
    }
    if (1e-4..1e6).contains(&value.abs()) {
        return format!("{value:.*}", (-digits).max(0.0) as usize);
    }
    let precision = (value.abs().log10().floor() - digits).clamp(0.0, 12.0) as usize;
    format!("{value:.precision$e}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(values: &[f64], log: bool) -> Vec<String> {
        Axis::new(values.iter().copied(), log).ticks(7).into_iter().map(|t| t.1).collect()
    }

    #[test]
    fn round_ticks() {
        assert_eq!(labels(&[0.0, 100.0], false), ["0", "20", "40", "60", "80", "100"]);
        assert_eq!(labels(&[-0.1, 0.25], false), ["-0.10", "-0.05", "0", "0.05", "0.10", "0.15", "0.20", "0.25"]);
        assert_eq!(labels(&[1e-7, 4e-7], false), ["1.0e-7", "1.5e-7", "2.0e-7", "2.5e-7", "3.0e-7", "3.5e-7", "4.0e-7"]);
        assert_eq!(labels(&[1.0, 10.0], true), ["1", "2", "5", "10"]);
        assert_eq!(labels(&[1e-6, 1.0], true), ["1e-6", "1e-5", "0.0001", "0.001", "0.01", "0.1", "1"]);
        assert_eq!(labels(&[2.3, 2.9], true), ["2.3", "2.4", "2.5", "2.6", "2.7", "2.8", "2.9"]);
        assert!(labels(&[1e-200, 1e200], true).len() <= 9);
    }

    /// Whatever the numbers are, the text holds only finite coordinates and at most a dozen ticks.
    #[test]
    fn odd_numbers() {
        let odd = [f64::NAN, f64::INFINITY, -1.0, 0.0, 5.0, 1e308, 5e-324, 1e16, 1e16 + 2.0];
        for log in [false, true] {
            for a in odd {
                for b in odd {
                    let series = vec![Series { name: "<a & b>\u{1}".into(), points: vec![(a, b), (b, a), (a, a)] }];
                    let svg = line_chart_svg(&Chart { log_x: log, log_y: log, series, ..Chart::default() });
                    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{a} {b} {svg}");
                    assert!(svg.contains("&lt;a &amp; b&gt;</text>"));
                    assert!(svg.matches("stroke=\"#ddd\"").count() <= 24, "{a} {b}");
                }
            }
        }
        let empty = line_chart_svg(&Chart::default());
        assert!(empty.starts_with("<svg") && empty.ends_with("</svg>\n"));
    }

    /// Points that cannot be shown break the line; the ends of the data lie inside the frame.
    #[test]
    fn lines() {
        let points = vec![(1.0, 1.0), (2.0, 2.0), (3.0, f64::NAN), (4.0, 4.0), (5.0, 5.0)];
        let svg = line_chart_svg(&Chart { series: vec![Series { name: "s".into(), points }], ..Chart::default() });
        let path = svg.lines().find(|l| l.contains("stroke-linejoin")).unwrap();
        assert_eq!((path.matches('M').count(), path.matches('L').count(), svg.matches("<circle").count()), (2, 2, 4));
        let (x, y) = (LEFT + WIDTH * 0.03 / 1.06, TOP + HEIGHT * 1.03 / 1.06);
        assert!(path.contains(&format!("M{x:.1} {y:.1}L")), "{path}");
    }
}
