//! Decoding PNG and JPEG.

use std::borrow::Cow;
use std::fs;
use std::io::Cursor;
use std::path::Path;

use image::{ColorType, DynamicImage, ImageDecoder, ImageFormat, ImageReader};

use super::{Image, MAX_FILE_BYTES, MAX_PIXELS};
use crate::{Error, Result};

/// Decodes a file. See [`super::read_image`].
pub(super) fn read(path: &Path) -> Result<Image<'static>> {
    let meta = fs::metadata(path).map_err(|e| Error::io(path, e))?;
    let size = meta.len();
    if meta.is_dir() {
        return Err(Error::format(path, "a folder, expected a PNG or JPEG image"));
    }
    if size == 0 {
        return Err(Error::format(path, "empty file, expected a PNG or JPEG image"));
    }
    if size > MAX_FILE_BYTES {
        return Err(Error::format(path, format!("{size} bytes, expected at most {MAX_FILE_BYTES}")));
    }
    let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
    decode(path, &bytes)
}

fn decode(path: &Path, bytes: &[u8]) -> Result<Image<'static>> {
    let bad = |e: image::ImageError| Error::format(path, format!("not a readable PNG or JPEG image: {}", one_line(&e.to_string())));
    // The contents decide, not the extension: misnamed files are common.
    let format = match image::guess_format(bytes).ok() {
        Some(format @ (ImageFormat::Png | ImageFormat::Jpeg)) => format,
        Some(other) => {
            let name = format!("{other:?}").to_uppercase();
            return Err(Error::format(path, format!("{name}, neither a PNG nor a JPEG image: expected one of these")));
        }
        None => return Err(Error::format(path, "neither a PNG nor a JPEG image: expected one of their signatures in the first bytes")),
    };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = image::Limits::no_limits();
    // Four channels of 16 bits for every pixel, and the same again for the decoder's own work.
    limits.max_alloc = Some(16 * MAX_PIXELS as u64);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(bad)?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 || u64::from(width) * u64::from(height) > MAX_PIXELS as u64 {
        return Err(Error::format(path, format!("{height}×{width} pixels, expected 1 to {MAX_PIXELS} pixels")));
    }
    // The JPEG decoder paints over what is missing at the end of a file.
    if format == ImageFormat::Jpeg && !jpeg_ends(bytes) {
        return Err(Error::format(path, "cut short: expected an end-of-image marker after the JPEG data"));
    }
    let grey = matches!(decoder.color_type(), ColorType::L8 | ColorType::La8 | ColorType::L16 | ColorType::La16);
    let image = DynamicImage::from_decoder(decoder).map_err(bad)?;
    let (channels, pixels) = if grey { (1, image.into_luma8().into_raw()) } else { (3, image.into_rgb8().into_raw()) };
    Ok(Image { height: height as usize, width: width as usize, channels, pixels: Cow::Owned(pixels) })
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether the JPEG has an end-of-image marker where its segments say that one can be (a thumbnail inside a segment has its own).
fn jpeg_ends(bytes: &[u8]) -> bool {
    const START: u8 = 0xD8;
    const END: u8 = 0xD9;
    let mut at = 0;
    while let Some(offset) = bytes.get(at..).and_then(|rest| rest.iter().position(|&b| b == 0xFF)) {
        let Some(&marker) = bytes.get(at + offset + 1) else { return false };
        at += offset + 2;
        match marker {
            END => return true,
            // Fill: the next byte may be the marker.
            0xFF => at -= 1,
            // A stuffed zero, markers without a segment: restart, temporary.
            0 | 1 | START | 0xD0..=0xD7 => {}
            _ => match bytes.get(at..at + 2) {
                Some(length) => at += usize::from(u16::from_be_bytes([length[0], length[1]])),
                None => return false,
            },
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    fn gradient(height: u32, width: u32) -> DynamicImage {
        DynamicImage::ImageRgb8(image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8 * 7, y as u8 * 5, (x * y) as u8])))
    }

    #[test]
    fn every_pixel_layout() {
        let path = Path::new("a.png");
        let rgb = gradient(5, 9);
        let want = rgb.to_rgb8().into_raw();
        let rgba = DynamicImage::ImageRgba8(image::RgbaImage::from_fn(9, 5, |x, y| {
            let p = rgb.to_rgb8().get_pixel(x, y).0;
            image::Rgba([p[0], p[1], p[2], x as u8 * 20])
        }));
        let wide = DynamicImage::ImageRgb16(image::ImageBuffer::from_fn(9, 5, |x, y| {
            image::Rgb(rgb.to_rgb8().get_pixel(x, y).0.map(|v| u16::from(v) * 257))
        }));
        for source in [&rgb, &rgba, &wide] {
            let got = decode(path, &encode(source, ImageFormat::Png)).unwrap();
            assert_eq!((got.height, got.width, got.channels), (5, 9, 3));
            assert_eq!(*got.pixels, *want, "{:?}", source.color());
        }
        let level = |x: u32, y: u32| (x * 20 + y) as u8;
        let grey = DynamicImage::ImageLuma8(image::GrayImage::from_fn(9, 5, |x, y| image::Luma([level(x, y)])));
        let grey_alpha = DynamicImage::ImageLumaA8(image::GrayAlphaImage::from_fn(9, 5, |x, y| image::LumaA([level(x, y), 3])));
        let grey_wide = DynamicImage::ImageLuma16(image::ImageBuffer::from_fn(9, 5, |x, y| image::Luma([u16::from(level(x, y)) * 257])));
        for source in [&grey, &grey_alpha, &grey_wide] {
            let got = decode(path, &encode(source, ImageFormat::Png)).unwrap();
            assert_eq!(got.channels, 1);
            assert_eq!(*got.pixels, *grey.to_luma8().into_raw(), "{:?}", source.color());
        }
    }

    /// No prefix of an image decodes, and no single flipped byte makes the decoder panic.
    #[test]
    fn cut_and_flipped() {
        for format in [ImageFormat::Png, ImageFormat::Jpeg] {
            let whole = encode(&gradient(20, 30), format);
            assert_eq!(decode(Path::new("whole"), &whole).unwrap().width, 30);
            // The last chunk of a PNG (12 bytes) carries nothing.
            let needed = if format == ImageFormat::Png { whole.len() - 12 } else { whole.len() };
            for cut in 0..needed {
                let error = decode(Path::new("cut.img"), &whole[..cut]).expect_err("cut").to_string();
                assert!(error.starts_with("cut.img: ") && !error.contains('\n'), "{error}");
            }
            for at in 0..whole.len() {
                let mut bytes = whole.clone();
                bytes[at] ^= 0x55;
                if let Err(e) = decode(Path::new("flip.img"), &bytes) {
                    assert!(e.to_string().starts_with("flip.img: "));
                }
            }
        }
    }

    /// A header of 60000×60000 pixels and nothing behind it must not reserve 10 GB.
    #[test]
    fn huge_header() {
        let mut bytes = encode(&gradient(4, 4), ImageFormat::Png);
        bytes[16..20].copy_from_slice(&60_000u32.to_be_bytes());
        bytes[20..24].copy_from_slice(&60_000u32.to_be_bytes());
        let mut crc = flate2::Crc::new();
        crc.update(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.sum().to_be_bytes());
        let error = decode(Path::new("huge.png"), &bytes).unwrap_err().to_string();
        assert!(error.starts_with("huge.png: ") && error.contains("60000×60000"), "{error}");
    }
}
