//! A picture of a window grouping: the token grid with its hidden tokens, windows, and groups.

use std::fmt::Write;

use crate::grouping::{Grouping, Windows};

/// What is drawn.
pub struct Picture<'a> {
    /// One line above the grid.
    pub title: &'a str,
    /// Side of the square token grid.
    pub grid: usize,
    /// Side M of a window, and its shift.
    pub window: (usize, usize),
    /// `(y, x)` of each visible token.
    pub coords: &'a [[usize; 2]],
    /// The windows of these tokens.
    pub windows: &'a Windows,
    /// The groups of these windows.
    pub grouping: &'a Grouping,
}

const LEFT: f64 = 16.0;
const TOP: f64 = 40.0;
/// Side of the grid in the picture.
const SIDE: f64 = 616.0;
const LEGEND_ROW: f64 = 22.0;
const LEGEND_COLUMN: f64 = 168.0;
const HIDDEN: &str = "#d9d9d9";

/// Colour of group `i`: hues a golden angle apart never come close for neighbours; three lightnesses separate the rest.
fn colour(i: usize) -> String {
    format!("hsl({:.1},{}%,{}%)", (i as f64 * 137.508) % 360.0, [72, 58, 80][i % 3], [62, 48, 74][i % 3])
}

impl Picture<'_> {
    /// The picture as an SVG document: hidden tokens grey, visible ones in the colour of their group, window borders as lines,
    /// the number of the group in every window, and a legend of how full each group is.
    pub fn svg(&self) -> String {
        let cell = SIDE / self.grid.max(1) as f64;
        let per_column = ((SIDE / LEGEND_ROW) as usize - 2).max(1);
        let columns = self.grouping.num_groups().div_ceil(per_column).max(1);
        let (width, height) = (LEFT * 3.0 + SIDE + columns as f64 * LEGEND_COLUMN, TOP + SIDE + LEFT);
        let mut svg = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(
            svg,
            r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif">
<rect width="{width}" height="{height}" fill="white"/>
<text x="{LEFT}" y="26" font-size="16">{}</text>
<rect x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="{HIDDEN}"/>"#,
            escape(self.title)
        );
        self.tokens(&mut svg, cell);
        self.borders(&mut svg, cell);
        self.labels(&mut svg, cell);
        self.legend(&mut svg, per_column);
        svg.push_str("</svg>\n");
        svg
    }

    fn group_of_windows(&self) -> Vec<usize> {
        let mut group_of = vec![0; self.windows.len()];
        for (group, members) in self.grouping.groups.iter().enumerate() {
            members.iter().for_each(|&window| group_of[window] = group);
        }
        group_of
    }

    /// Visible tokens: one rectangle for each run of neighbours in a row of a window.
    fn tokens(&self, svg: &mut String, cell: f64) {
        let group_of = self.group_of_windows();
        for (window, &group) in group_of.iter().enumerate() {
            let tokens = &self.windows.tokens[self.windows.range(window)];
            let mut runs: Vec<[usize; 3]> = Vec::new();
            for &token in tokens {
                let [y, x] = self.coords[token as usize];
                match runs.last_mut() {
                    Some([row, start, length]) if *row == y && *start + *length == x => *length += 1,
                    _ => runs.push([y, x, 1]),
                }
            }
            let _ = write!(svg, r#"<path fill="{}" d=""#, colour(group));
            for [y, x, length] in runs {
                let (left, top, wide) = (LEFT + x as f64 * cell, TOP + y as f64 * cell, length as f64 * cell);
                let _ = write!(svg, "M{left:.2} {top:.2}h{wide:.2}v{cell:.2}h-{wide:.2}z");
            }
            svg.push_str("\"/>\n");
        }
    }

    /// Thin lines between tokens, thick ones between windows.
    fn borders(&self, svg: &mut String, cell: f64) {
        let (side, shift) = self.window;
        let offset = (side - shift) % side;
        let lines = |svg: &mut String, at: &mut dyn Iterator<Item = usize>, stroke: &str| {
            let _ = write!(svg, r#"<path fill="none" {stroke} d=""#);
            for i in at {
                let d = i as f64 * cell;
                let _ = write!(svg, "M{LEFT} {:.2}h{SIDE}M{:.2} {TOP}v{SIDE}", TOP + d, LEFT + d);
            }
            svg.push_str("\"/>\n");
        };
        if cell >= 5.0 {
            lines(svg, &mut (1..self.grid), r#"stroke="white" stroke-width="0.6""#);
        }
        lines(
            svg,
            &mut (0..=self.grid).filter(|&i| i == 0 || i == self.grid || (i + offset) % side == 0),
            r##"stroke="#222" stroke-width="1.6""##,
        );
    }

    /// The number of its group in the middle of each window's tokens.
    fn labels(&self, svg: &mut String, cell: f64) {
        let size = (cell * self.window.0 as f64 * 0.3).clamp(5.0, 16.0);
        let _ = writeln!(svg, r#"<g font-size="{size:.1}" text-anchor="middle" font-weight="bold">"#);
        for (window, group) in self.group_of_windows().into_iter().enumerate() {
            let range = self.windows.range(window);
            let middle = |axis: usize| {
                let sum: f64 = self.windows.tokens[range.clone()].iter().map(|&t| self.coords[t as usize][axis] as f64 + 0.5).sum();
                sum / range.len() as f64 * cell
            };
            let _ = writeln!(svg, r#"<text x="{:.1}" y="{:.1}">{}</text>"#, LEFT + middle(1), TOP + middle(0) + 0.36 * size, group + 1);
        }
        svg.push_str("</g>\n");
    }

    /// Number, fill bar and tokens of each group.
    fn legend(&self, svg: &mut String, per_column: usize) {
        let left = LEFT * 2.0 + SIDE;
        let g = self.grouping.group_size;
        let _ = writeln!(
            svg,
            r#"<g font-size="13"><rect x="{left}" y="{TOP}" width="14" height="14" fill="{HIDDEN}"/><text x="{}" y="{}">hidden token</text>"#,
            left + 22.0,
            TOP + 12.0
        );
        let _ = writeln!(svg, r#"<text x="{left}" y="{}">group: tokens of {g}</text>"#, TOP + LEGEND_ROW + 14.0);
        for (i, &tokens) in self.grouping.tokens.iter().enumerate() {
            let (x, y) = (left + (i / per_column) as f64 * LEGEND_COLUMN, TOP + (i % per_column + 2) as f64 * LEGEND_ROW);
            let full = 70.0 * tokens as f64 / g.max(1) as f64;
            let _ = writeln!(
                svg,
                r##"<text x="{}" y="{}" text-anchor="end">{}</text><rect x="{}" y="{y}" width="70" height="14" fill="white" stroke="#888"/><rect x="{}" y="{y}" width="{full:.1}" height="14" fill="{}"/><text x="{}" y="{}">{tokens}</text>"##,
                x + 24.0,
                y + 12.0,
                i + 1,
                x + 30.0,
                x + 30.0,
                colour(i),
                x + 106.0,
                y + 12.0
            );
        }
        svg.push_str("</g>\n");
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grouping::group_windows;

    #[test]
    fn every_visible_token_is_drawn_once() {
        let coords = [[0, 0], [0, 1], [1, 0], [3, 2], [3, 3]];
        let windows = Windows::new(&coords, (2, 2), (1, 1)).unwrap();
        let sizes = windows.sizes();
        let grouping = group_windows(&sizes, 2).unwrap();
        let picture = Picture { title: "a < b", grid: 4, window: (2, 1), coords: &coords, windows: &windows, grouping: &grouping };
        let svg = picture.svg();
        assert_eq!(svg.matches("hsl(").count(), windows.len() + grouping.num_groups());
        // The shift cuts every token from its neighbours here.
        let tokens: usize = svg.lines().filter(|line| line.starts_with(r#"<path fill="hsl"#)).map(|line| line.matches('M').count()).sum();
        assert_eq!(tokens, coords.len());
        assert!(svg.contains("a &lt; b") && svg.ends_with("</svg>\n"));
        assert_eq!(svg.matches("<g").count(), svg.matches("</g>").count());
    }

    #[test]
    fn nothing_visible_is_still_a_picture() {
        let windows = Windows::new(&[], (2, 2), (0, 0)).unwrap();
        let grouping = group_windows(&[], 0).unwrap();
        let svg = Picture { title: "", grid: 2, window: (2, 0), coords: &[], windows: &windows, grouping: &grouping }.svg();
        assert!(svg.contains("hidden token") && !svg.contains("hsl(") && !svg.contains("NaN"));
    }
}
