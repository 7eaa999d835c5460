//! Confusion matrices: which class is taken for which, as SVG or PNG.

use std::fmt::Write;
use std::path::Path;

use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};

use super::chart::{escape, open_svg};
use super::font;
use crate::{Error, Result};

/// A confusion matrix to be drawn. Each cell's shade is its share of its row.
#[derive(Clone, Debug)]
pub struct Confusion {
    /// Above the matrix.
    pub title: String,
    /// The true classes, one per row.
    pub names: Vec<String>,
    /// Images by row and predicted class: `names.len()` columns in the order of the rows, then one for all other classes.
    pub counts: Vec<Vec<usize>>,
}

/// Side of the matrix, about, and the largest side of a cell.
const SIDE: usize = 640;
const CELL: usize = 32;
/// From this side on, rows and columns have labels; from the second one on, cells have numbers.
const LABELLED: usize = 10;
const NUMBERED: usize = 20;
/// Longest class name.
const NAME: usize = 24;
/// Width of a letter in small type.
const LETTER: usize = 6;
const MARGIN: usize = 12;
const TOP: usize = 74;
const BOTTOM: usize = 40;
/// Pixels of a PNG per unit.
const SCALE: usize = 2;
/// No PNG has more pixels than this (2²⁷).
const MAX_PIXELS: usize = 1 << 27;

type Color = [u8; 3];
const INK: Color = [40; 3];
/// Blue and vermilion stay apart for colour-blind readers.
const RIGHT: Color = [0, 114, 178];
const WRONG: Color = [213, 94, 0];

/// White to `full`; the root lets rare mistakes show.
fn shade(share: f64, full: Color) -> Color {
    let strength = share.clamp(0.0, 1.0).sqrt();
    full.map(|c| (255.0 - strength * (255.0 - f64::from(c))).round() as u8)
}

#[derive(Clone, Copy)]
enum Anchor {
    Start,
    Middle,
    End,
}

struct Text {
    x: usize,
    /// The line on which the letters stand.
    y: usize,
    anchor: Anchor,
    large: bool,
    color: Color,
    text: String,
}

/// `[x, y, width, height]` and colour.
type Rect = ([usize; 4], Color);

/// Rectangles and words in whole units, from which both formats are made.
struct Drawing {
    size: [usize; 2],
    rects: Vec<Rect>,
    texts: Vec<Text>,
}

impl Confusion {
    /// Writes the picture to `path`, atomically; the extension, `.svg` or `.png`, chooses the format.
    ///
    /// # Errors
    /// If the extension is another one, the rows and columns do not fit the names, the PNG gets too large, or the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let n = self.names.len();
        if n == 0 || self.counts.len() != n || self.counts.iter().any(|row| row.len() != n + 1) {
            return Err(Error::value("confusion matrix", format!("expected {n} rows of {} counts, at least one", n + 1)));
        }
        let bytes = match path.extension().and_then(|e| e.to_str()) {
            Some("svg") => self.drawing().svg().into_bytes(),
            Some("png") => self.drawing().png(path)?,
            _ => return Err(Error::format(path, "expected a picture called .svg or .png")),
        };
        crate::fs::write_atomic(path, &bytes)
    }

    fn drawing(&self) -> Drawing {
        let n = self.names.len();
        let others = self.counts.iter().any(|row| row[n] > 0);
        let columns = n + usize::from(others);
        let cell = (SIDE / columns).clamp(1, CELL);
        let labels: Vec<String> = match cell >= LABELLED {
            true => self.names.iter().enumerate().map(|(i, name)| format!("{} {i}", name.chars().take(NAME).collect::<String>())).collect(),
            false => Vec::new(),
        };
        let longest = labels.iter().map(|label| label.chars().count()).max().unwrap_or(0);
        let left = MARGIN + longest * LETTER + 6;
        let bottom = TOP + n * cell;
        let other = if others { ", +: any other class" } else { "" };
        let caption = format!("rows: true class, columns: predicted{other}, shade: share of the row");
        let widest = (left + columns * cell).max(MARGIN + LETTER * caption.len()).max(MARGIN + 9 * self.title.chars().count());
        let mut drawing = Drawing { size: [widest + MARGIN, bottom + BOTTOM], rects: Vec::new(), texts: Vec::new() };
        drawing.text([MARGIN, 24], Anchor::Start, true, INK, &self.title);
        drawing.text([MARGIN, 42], Anchor::Start, false, INK, &caption);
        for (row, label) in labels.iter().enumerate() {
            drawing.text([left - 4, TOP + row * cell + (cell + 8) / 2], Anchor::End, false, INK, label);
        }
        // As many column numbers as there is room for.
        let step = ((n.to_string().len() + 1) * LETTER).div_ceil(cell);
        for column in (0..n).step_by(step).filter(|_| !labels.is_empty()) {
            drawing.text([left + column * cell + cell / 2, TOP - 5], Anchor::Middle, false, INK, &column.to_string());
        }
        if others && !labels.is_empty() {
            drawing.text([left + n * cell + cell / 2, TOP - 5], Anchor::Middle, false, INK, "+");
        }
        for (row, counts) in self.counts.iter().enumerate() {
            let total: usize = counts.iter().sum();
            for (column, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
                let share = count as f64 / total as f64;
                let corner = [left + column * cell, TOP + row * cell];
                let color = shade(share, if row == column { RIGHT } else { WRONG });
                drawing.rects.push(([corner[0], corner[1], cell, cell], color));
                if cell >= NUMBERED {
                    let ink = if share > 0.4 { [255; 3] } else { INK };
                    drawing.text([corner[0] + cell / 2, corner[1] + (cell + 8) / 2], Anchor::Middle, false, ink, &count.to_string());
                }
            }
        }
        let frame = [(left, TOP, columns * cell, 1), (left, bottom, columns * cell + 1, 1)];
        let sides = [(left, TOP, 1, n * cell), (left + columns * cell, TOP, 1, n * cell)];
        drawing.rects.extend(frame.into_iter().chain(sides).map(|(x, y, w, h)| ([x, y, w, h], [120; 3])));
        for (row, (name, color)) in [("right", RIGHT), ("wrong", WRONG)].into_iter().enumerate() {
            let y = bottom + 10 + 13 * row;
            drawing.rects.extend((0..=10).map(|i| ([MARGIN + 12 * i, y, 12, 10], shade(i as f64 / 10.0, color))));
            drawing.text([MARGIN + 12 * 11 + 6, y + 9], Anchor::Start, false, INK, &format!("{name}, 0 to 100 %"));
        }
        drawing
    }
}

impl Drawing {
    fn text(&mut self, [x, y]: [usize; 2], anchor: Anchor, large: bool, color: Color, text: &str) {
        self.texts.push(Text { x, y, anchor, large, color, text: text.to_string() });
    }

    fn svg(&self) -> String {
        let hex = |[r, g, b]: Color| format!("#{r:02x}{g:02x}{b:02x}");
        let [width, height] = self.size;
        let mut svg = open_svg(width, height, 11);
        for ([x, y, w, h], color) in &self.rects {
            let _ = writeln!(svg, "<rect x=\"{x}\" y=\"{y}\" width=\"{w}\" height=\"{h}\" fill=\"{}\"/>", hex(*color));
        }
        for Text { x, y, anchor, large, color, text } in &self.texts {
            let anchor = match anchor {
                Anchor::Start => "",
                Anchor::Middle => " text-anchor=\"middle\"",
                Anchor::End => " text-anchor=\"end\"",
            };
            let size = if *large { " font-size=\"15\"" } else { "" };
            let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\"{anchor}{size} fill=\"{}\">{}</text>", hex(*color), escape(text));
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn png(&self, path: &Path) -> Result<Vec<u8>> {
        let [width, height] = self.size.map(|side| side * SCALE);
        if width.checked_mul(height).is_none_or(|pixels| pixels > MAX_PIXELS) {
            return Err(Error::format(path, format!("{} classes are too many for a PNG: expected .svg", self.size[1])));
        }
        let mut rgb = vec![255u8; width * height * 3];
        let mut paint = |x: usize, y: usize, color: Color| {
            if x < width && y < height {
                rgb[(y * width + x) * 3..][..3].copy_from_slice(&color);
            }
        };
        for (rect, color) in &self.rects {
            let [x, y, w, h] = rect.map(|v| v * SCALE);
            (y..y + h).for_each(|v| (x..x + w).for_each(|u| paint(u, v, *color)));
        }
        for Text { x, y, anchor, large, color, text } in &self.texts {
            let zoom = if *large { SCALE + 1 } else { SCALE };
            let length = text.chars().count() * zoom * (font::WIDTH + 1);
            let start = match anchor {
                Anchor::Start => x * SCALE,
                Anchor::Middle => (x * SCALE).saturating_sub(length / 2),
                Anchor::End => (x * SCALE).saturating_sub(length),
            };
            for (i, letter) in text.chars().enumerate() {
                let corner = [start + i * zoom * (font::WIDTH + 1), (y * SCALE).saturating_sub(font::HEIGHT * zoom)];
                for (row, bits) in font::glyph(letter).into_iter().enumerate() {
                    for column in (0..font::WIDTH).filter(|column| bits >> (font::WIDTH - 1 - column) & 1 == 1) {
                        for (v, u) in (0..zoom).flat_map(|v| (0..zoom).map(move |u| (v, u))) {
                            paint(corner[0] + column * zoom + u, corner[1] + row * zoom + v, *color);
                        }
                    }
                }
            }
        }
        let mut bytes = Vec::new();
        PngEncoder::new(&mut bytes)
            .write_image(&rgb, width as u32, height as u32, ExtendedColorType::Rgb8)
            .map_err(|e| Error::format(path, format!("cannot encode the picture: {e}")))?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Confusion {
        let counts = vec![vec![8, 2, 0, 0], vec![0, 3, 0, 1], vec![0, 0, 5, 0]];
        Confusion { title: "a < b".into(), names: ["cat", "dog & wolf", "newt"].map(String::from).to_vec(), counts }
    }

    /// Both formats show every count: a cell in its colour, at its place.
    #[test]
    fn cells_are_in_place() {
        let folder = tempfile::tempdir().unwrap();
        let (svg, png) = (folder.path().join("a.svg"), folder.path().join("a.png"));
        three().save(&svg).unwrap();
        three().save(&png).unwrap();
        let text = std::fs::read_to_string(svg).unwrap();
        assert!(text.contains("a &lt; b") && text.contains("dog &amp; wolf 1"), "{text}");
        for word in [">8</text>", ">2</text>", ">3</text>", ">1</text>", ">5</text>", ">+</text>"] {
            assert!(text.contains(word), "{word} in {text}");
        }
        let picture = image::open(png).unwrap().to_rgb8();
        let left = MARGIN + "dog & wolf 1".len() * LETTER + 6;
        // Below the numbers in the cells.
        let at = |row: usize, column: usize| {
            picture.get_pixel(((left + column * CELL + 5) * SCALE) as u32, ((TOP + row * CELL + 3) * SCALE) as u32).0
        };
        assert_eq!([at(0, 0), at(0, 1), at(0, 2)], [shade(0.8, RIGHT), shade(0.2, WRONG), [255; 3]]);
        assert_eq!([at(1, 1), at(1, 3), at(2, 2)], [shade(0.75, RIGHT), shade(0.25, WRONG), RIGHT]);
    }

    /// A thousand classes fit; so does one.
    #[test]
    fn many_and_one() {
        let n = 1000;
        let counts = (0..n).map(|i| (0..=n).map(|j| usize::from(j == i || j == (i * 7) % n)).collect()).collect();
        let many = Confusion { title: "many".into(), names: vec!["x".into(); n], counts };
        let folder = tempfile::tempdir().unwrap();
        many.save(folder.path().join("many.png")).unwrap();
        let size = image::image_dimensions(folder.path().join("many.png")).unwrap();
        assert_eq!(size.1 as usize, (TOP + n + BOTTOM) * SCALE);
        Confusion { title: String::new(), names: vec!["x".into()], counts: vec![vec![0, 0]] }.save(folder.path().join("one.svg")).unwrap();
    }

    #[test]
    fn bad_values() {
        let mut wrong = three();
        assert!(wrong.save("a.gif").unwrap_err().to_string().contains(".svg or .png"));
        wrong.counts[1].pop();
        assert!(wrong.save("a.svg").unwrap_err().to_string().contains("3 rows of 4"));
    }
}
