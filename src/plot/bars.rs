//! Bar charts as SVG text.

use std::fmt::Write;

use super::chart::{COLORS, escape, open_svg};

/// A chart of horizontal bars, which start at 0.
#[derive(Clone, Debug, Default)]
pub struct Bars {
    /// Above the chart.
    pub title: String,
    /// Below the axis.
    pub label: String,
    /// What the bars of each group stand for.
    pub names: Vec<String>,
    /// A name, and a bar for each of `names`; what is missing is left out.
    pub groups: Vec<(String, Vec<Option<f64>>)>,
}

const LEFT: f64 = 230.0;
const WIDTH: f64 = 460.0;
const RIGHT: f64 = 70.0;
const TOP: f64 = 70.0;
const BAR: f64 = 14.0;
const GAP: f64 = 12.0;
const BOTTOM: f64 = 50.0;

/// Draws a chart. The same chart gives the same text.
pub fn bar_chart_svg(chart: &Bars) -> String {
    let shown = |value: &Option<f64>| value.filter(|v| v.is_finite() && *v > 0.0);
    let largest = chart.groups.iter().flat_map(|(_, values)| values).filter_map(shown).fold(0.0, f64::max);
    let scale = if largest > 0.0 { WIDTH / largest } else { 0.0 };
    let group = BAR * chart.names.len() as f64 + GAP;
    let (width, bottom) = (LEFT + WIDTH + RIGHT, TOP + group * chart.groups.len() as f64);
    let height = bottom + BOTTOM;
    let mut svg = open_svg(width, height, 12);
    // Writing to a string cannot fail.
    let mut line = |text: std::fmt::Arguments| writeln!(svg, "{text}").expect("write to a string");
    line(format_args!("<text x=\"{}\" y=\"24\" text-anchor=\"middle\" font-size=\"15\">{}</text>", width / 2.0, escape(&chart.title)));
    let mut x = LEFT;
    for (i, name) in chart.names.iter().enumerate() {
        line(format_args!("<rect x=\"{x}\" y=\"40\" width=\"12\" height=\"12\" fill=\"{}\"/>", COLORS[i % COLORS.len()]));
        line(format_args!("<text x=\"{}\" y=\"50\">{}</text>", x + 18.0, escape(name)));
        // About 7 pixels per character: SVG has no way to measure text.
        x += 40.0 + 7.0 * name.chars().count() as f64;
    }
    for (g, (name, values)) in chart.groups.iter().enumerate() {
        let top = TOP + group * g as f64;
        let middle = top + (group - GAP) / 2.0 + 4.0;
        line(format_args!("<text x=\"{}\" y=\"{middle:.1}\" text-anchor=\"end\">{}</text>", LEFT - 9.0, escape(name)));
        for (i, value) in values.iter().enumerate() {
            let Some(value) = shown(value) else { continue };
            let (y, length) = (top + BAR * i as f64, value * scale);
            let color = COLORS[i % COLORS.len()];
            line(format_args!("<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{length:.1}\" height=\"{}\" fill=\"{color}\"/>", BAR - 2.0));
            let digits = if value >= 10.0 { 0 } else { 2 };
            line(format_args!("<text x=\"{:.1}\" y=\"{:.1}\" font-size=\"11\">{value:.digits$}</text>", LEFT + length + 5.0, y + 10.0));
        }
    }
    line(format_args!("<path d=\"M{LEFT} {}V{bottom}\" stroke=\"#444\"/>", TOP - 6.0));
    let middle = LEFT + WIDTH / 2.0;
    line(format_args!(
        "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\" font-size=\"13\">{}</text>",
        bottom + 24.0,
        escape(&chart.label)
    ));
    line(format_args!("</svg>"));
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_values() {
        let groups = vec![("a & b".to_string(), vec![Some(0.5), None]), ("c".to_string(), vec![Some(1.0), Some(f64::NAN)])];
        let svg = bar_chart_svg(&Bars { title: "t".into(), label: "l".into(), names: vec!["x".into(), "y".into()], groups });
        let lengths: Vec<&str> = svg.lines().filter(|l| l.contains("height=\"12\"") && l.contains("x=\"230\" y=\"")).collect();
        // The first one is the legend's.
        assert_eq!(lengths.len(), 3, "{svg}");
        assert!(lengths[1].contains("width=\"230.0\"") && lengths[2].contains("width=\"460.0\""), "{svg}");
        assert!(svg.contains("a &amp; b") && !svg.contains("NaN"));
        assert!(bar_chart_svg(&Bars::default()).ends_with("</svg>\n"));
    }
}
