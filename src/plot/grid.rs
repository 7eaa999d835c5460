//! Grids of small images as PNG: originals, masked images, reconstructions, windows.

use std::path::Path;

use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};

use super::font;
use crate::{Error, Result};

/// No picture has more pixels than this (2²⁷).
const MAX_PIXELS: usize = 1 << 27;
/// White around the tiles, dark grey letters.
const BACKGROUND: u8 = 255;
const INK: u8 = 40;

/// One image of a grid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tile {
    height: usize,
    width: usize,
    /// `[height, width, 3]`
    rgb: Vec<u8>,
}

impl Tile {
    /// A tile of 8-bit pixels `[height, width, channels]`, grey (1) or RGB (3).
    ///
    /// # Errors
    /// If the sizes are not positive or don't fit the pixels.
    pub fn from_pixels(height: usize, width: usize, channels: usize, pixels: &[u8]) -> Result<Self> {
        check(height, width, channels, pixels.len())?;
        let rgb = if channels == 3 { pixels.to_vec() } else { pixels.iter().flat_map(|&v| [v; 3]).collect() };
        Ok(Tile { height, width, rgb })
    }

    /// A tile of floats `[channels, height, width]`, grey (1) or RGB (3); 0 is black, 1 is full; what lies outside is clipped, NaN is black.
    ///
    /// # Errors
    /// As [`Tile::from_pixels`].
    pub fn from_planes(height: usize, width: usize, channels: usize, planes: &[f32]) -> Result<Self> {
        check(height, width, channels, planes.len())?;
        let n = height * width;
        let byte = |v: f32| (v * 255.0).round() as u8;
        let rgb = (0..n).flat_map(|i| [0, 1, 2].map(|c| byte(planes[c.min(channels - 1) * n + i]))).collect();
        Ok(Tile { height, width, rgb })
    }
}

fn check(height: usize, width: usize, channels: usize, len: usize) -> Result<()> {
    let size = height.checked_mul(width).and_then(|n| n.checked_mul(channels));
    if height == 0 || width == 0 || !matches!(channels, 1 | 3) || size != Some(len) {
        return Err(Error::shape(
            "tile",
            "positive height and width, 1 or 3 channels",
            format!("{height}×{width}×{channels} of {len} values"),
        ));
    }
    Ok(())
}

/// What [`image_grid_png`] draws.
#[derive(Clone, Debug)]
pub struct Grid {
    /// Captions above the columns; empty for none. Longer ones are cut to the width of a tile.
    pub captions: Vec<String>,
    /// Rows of tiles, all of one size; shorter rows leave the rest blank.
    pub rows: Vec<Vec<Tile>>,
    /// Each pixel becomes `scale`×`scale` (nearest), at least 1.
    pub scale: usize,
    /// Blank pixels around and between the tiles.
    pub gap: usize,
}

/// Draws a grid and writes it to `path`, atomically.
///
/// # Errors
/// If there is no tile, the tiles differ in size, the picture gets too large, or the file cannot be written.
pub fn image_grid_png(path: impl AsRef<Path>, grid: &Grid) -> Result<()> {
    let path = path.as_ref();
    let (height, width, rgb) = draw(grid)?;
    let mut bytes = Vec::new();
    PngEncoder::new(&mut bytes)
        .write_image(&rgb, width as u32, height as u32, ExtendedColorType::Rgb8)
        .map_err(|e| Error::format(path, format!("cannot encode the picture: {e}")))?;
    crate::fs::write_atomic(path, &bytes)
}

/// Height, width and pixels `[height, width, 3]` of a grid.
fn draw(grid: &Grid) -> Result<(usize, usize, Vec<u8>)> {
    let Grid { captions, rows, scale, gap } = grid;
    let first = rows.iter().flatten().next().ok_or_else(|| Error::value("image grid", "no tiles, expected at least one"))?;
    let (h, w) = (first.height, first.width);
    if let Some(other) = rows.iter().flatten().find(|t| (t.height, t.width) != (h, w)) {
        return Err(Error::shape("image grid: every tile", [h, w], [other.height, other.width]));
    }
    // Letters are doubled where the tiles leave room.
    let zoom = if w.saturating_mul(*scale) >= 24 * font::WIDTH { 2 } else { 1 };
    let header = if captions.is_empty() { 0 } else { zoom * font::HEIGHT + 4 };
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let extent = |count: usize, size: usize, extra: usize| {
        let cell = size.checked_mul(*scale)?.checked_add(*gap)?;
        cell.checked_mul(count)?.checked_add(*gap)?.checked_add(extra)
    };
    let (height, width) = match (extent(rows.len(), h, header), extent(columns, w, 0)) {
        (Some(y), Some(x)) if *scale > 0 && y.checked_mul(x).is_some_and(|n| n <= MAX_PIXELS) => (y, x),
        _ => return Err(Error::value("image grid", format!("scale {scale}, gap {gap}: expected 1 to {MAX_PIXELS} pixels in all"))),
    };
    let mut rgb = vec![BACKGROUND; height * width * 3];
    for (column, caption) in captions.iter().take(columns).enumerate() {
        let left = gap + column * (w * scale + gap);
        // A letter and the blank after it; the last one needs no blank.
        let fits = (w * scale + zoom) / (zoom * (font::WIDTH + 1));
        let text: Vec<char> = caption.chars().take(fits).collect();
        let indent = (w * scale).saturating_sub(text.len() * zoom * (font::WIDTH + 1)) / 2;
        for (i, &c) in text.iter().enumerate() {
            let x0 = left + indent + i * zoom * (font::WIDTH + 1);
            for (y, bits) in font::glyph(c).iter().enumerate().flat_map(|(y, bits)| (0..zoom).map(move |z| (y * zoom + z, bits))) {
                for x in (0..font::WIDTH * zoom).filter(|x| bits >> (font::WIDTH - 1 - x / zoom) & 1 == 1) {
                    let at = ((gap + y) * width + x0 + x) * 3;
                    rgb[at..at + 3].fill(INK);
                }
            }
        }
    }
    for (row, tiles) in rows.iter().enumerate() {
        for (column, tile) in tiles.iter().enumerate() {
            let (top, left) = (header + gap + row * (h * scale + gap), gap + column * (w * scale + gap));
            for y in 0..h * scale {
                let start = ((top + y) * width + left) * 3;
                let source = tile.rgb.chunks_exact(3).skip(y / scale * w).take(w).flat_map(|p| std::iter::repeat_n(p, *scale));
                for (to, from) in rgb[start..start + w * scale * 3].chunks_exact_mut(3).zip(source) {
                    to.copy_from_slice(from);
                }
            }
        }
    }
    Ok((height, width, rgb))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tile(level: u8) -> Tile {
        Tile::from_pixels(2, 3, 3, &(0..18).map(|i| level + i).collect::<Vec<u8>>()).unwrap()
    }

    /// Every pixel of a file read back: tiles where they belong, white elsewhere.
    #[test]
    fn tiles_are_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("grid.png");
        let grid = Grid { captions: vec![], rows: vec![vec![tile(0), tile(50)], vec![tile(100)]], scale: 2, gap: 3 };
        image_grid_png(&path, &grid).unwrap();
        let picture = image::open(&path).unwrap().to_rgb8();
        assert_eq!(picture.dimensions(), (3 * 3 + 2 * 6, 3 * 3 + 2 * 4));
        for (x, y, pixel) in picture.enumerate_pixels() {
            let (column, row, dx, dy) = (x / 9, y / 7, x % 9, y % 7);
            let level = [[0, 50], [100, 255]].get(row as usize).and_then(|r| r.get(column as usize)).copied();
            let inside = dx >= 3 && dy >= 3 && level.is_some_and(|l| l != 255);
            let want = |c: u32| if inside { level.unwrap() + (((dy - 3) / 2 * 3 + (dx - 3) / 2) * 3 + c) as u8 } else { 255 };
            assert_eq!(pixel.0, [want(0), want(1), want(2)], "{x} {y}");
        }
    }

    #[test]
    fn floats_are_rounded_and_clipped() {
        let tile = Tile::from_planes(1, 4, 1, &[-1.0, 0.5, 7.0, f32::NAN]).unwrap();
        assert_eq!(tile.rgb, [0, 0, 0, 128, 128, 128, 255, 255, 255, 0, 0, 0]);
        let planes: Vec<f32> = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0].iter().map(|v| v / 255.0).collect();
        assert_eq!(Tile::from_planes(2, 1, 3, &planes).unwrap().rgb, [10, 30, 50, 20, 40, 60]);
    }

    /// Captions stay inside their column, also when they are too long.
    #[test]
    fn captions_stay_in_their_column() {
        let rows = vec![vec![Tile::from_pixels(20, 20, 1, &[255; 400]).unwrap(); 2]];
        let with = |caption: &str| draw(&Grid { captions: vec!["".into(), caption.into()], rows: rows.clone(), scale: 1, gap: 4 }).unwrap();
        let (height, width, blank) = with("");
        assert_eq!((height, width), (4 + 11 + 20 + 4, 4 + 20 + 4 + 20 + 4));
        assert!(blank.iter().all(|&v| v == 255));
        let columns = |rgb: &[u8]| {
            let inked = |x: &usize| (0..height).any(|y| rgb[(y * width + x) * 3] == INK);
            let all: Vec<usize> = (0..width).filter(inked).collect();
            (all[0], all[all.len() - 1])
        };
        assert_eq!(columns(&with("HH").2), (28 + 4, 28 + 4 + 6 + 4));
        let (low, high) = columns(&with("HHHHHHHHHHHH").2);
        assert!(low >= 28 && high < 48, "{low} {high}");
        assert_eq!(with("mask").2, with("MASK").2);
    }

    #[test]
    fn bad_values() {
        let grid = |rows, scale, gap| draw(&Grid { captions: vec![], rows, scale, gap }).unwrap_err().to_string();
        assert!(grid(vec![vec![]], 1, 1).contains("no tiles"));
        let other = Tile::from_pixels(3, 2, 1, &[0; 6]).unwrap();
        assert!(grid(vec![vec![tile(0)], vec![other]], 1, 1).contains("[3, 2]"));
        assert!(grid(vec![vec![tile(0)]], 0, 1).contains("scale 0"));
        assert!(grid(vec![vec![tile(0)]], usize::MAX, 1).contains("expected 1 to"));
        assert!(grid(vec![vec![tile(0)]], 1, usize::MAX).contains("expected 1 to"));
        assert!(Tile::from_pixels(2, 2, 2, &[0; 8]).is_err());
        assert!(Tile::from_planes(2, 2, 3, &[0.0; 11]).unwrap_err().to_string().contains("tile"));
    }
}
