//! The npy format of NumPy, version 1.0: one array, little-endian, in C order. Written: f32, f64, i64; read: these, f16, and narrower
//! integers and truth values, widened.

use std::io::Read;
use std::path::Path;

use byteorder::{ByteOrder, LittleEndian};

use super::MAX_FILE_BYTES;
use crate::{Error, Result};

const MAGIC: &[u8; 8] = b"\x93NUMPY\x01\x00";

/// An array as read from a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Lengths of the axes; empty for a scalar.
    pub shape: Vec<usize>,
    /// The elements, last axis fastest.
    pub data: Data,
}

/// The elements of an [`Array`].
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// `<f4`
    F32(Vec<f32>),
    /// `<f8`
    F64(Vec<f64>),
    /// `<f2`, as bits
    F16(Vec<u16>),
    /// `<i8`; narrower integers and truth values are widened
    I64(Vec<i64>),
}

/// A type of element that npy files can hold here.
pub trait Element: Copy + sealed::Sealed {
    /// NumPy's name of the type.
    const DESCR: &'static str;
    /// Bytes per element.
    const SIZE: usize;
    /// Writes the elements to `SIZE` bytes each.
    fn to_bytes(values: &[Self], bytes: &mut [u8]);
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! element {
    ($type:ty, $descr:literal, $write:path) => {
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const DESCR: &'static str = $descr;
            const SIZE: usize = size_of::<$type>();
            fn to_bytes(values: &[Self], bytes: &mut [u8]) {
                $write(values, bytes);
            }
        }
    };
}
element!(f32, "<f4", LittleEndian::write_f32_into);
element!(f64, "<f8", LittleEndian::write_f64_into);
element!(i64, "<i8", LittleEndian::write_i64_into);

/// Writes an array, atomically.
///
/// # Errors
/// If the number of values is not the product of `shape`, or the file cannot be written.
pub fn write<T: Element>(path: impl AsRef<Path>, shape: &[usize], values: &[T]) -> Result<()> {
    let path = path.as_ref();
    if product(shape) != Some(values.len()) {
        return Err(Error::shape(path.display().to_string(), shape, [values.len()]));
    }
    let comma = if shape.len() == 1 { "," } else { "" };
    let dims: Vec<String> = shape.iter().map(usize::to_string).collect();
    let mut header = format!("{{'descr': '{}', 'fortran_order': False, 'shape': ({}{comma}), }}", T::DESCR, dims.join(", "));
    // Spaces and a line feed bring the data to a multiple of 64 bytes.
    let padding = 63 - (MAGIC.len() + 2 + header.len()) % 64;
    header.extend(std::iter::repeat_n(' ', padding));
    header.push('\n');
    let Ok(header_len) = u16::try_from(header.len()) else {
        return Err(Error::shape(path.display().to_string(), "fewer dimensions", format!("{} dimensions", shape.len())));
    };
    let mut bytes = Vec::with_capacity(MAGIC.len() + 2 + header.len() + values.len() * T::SIZE);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&header_len.to_le_bytes());
    bytes.extend_from_slice(header.as_bytes());
    let start = bytes.len();
    bytes.resize(start + values.len() * T::SIZE, 0);
    T::to_bytes(values, &mut bytes[start..]);
    crate::fs::write_atomic(path, &bytes)
}

/// Reads an array.
///
/// # Errors
/// If the file cannot be read, is not npy 1.0, holds another type or order, or another number of bytes than its header says.
pub fn read(path: impl AsRef<Path>) -> Result<Array> {
    let path = path.as_ref();
    let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
    let size = file.metadata().map_err(|e| Error::io(path, e))?.len();
    if size > MAX_FILE_BYTES {
        return Err(Error::format(path, format!("{size} bytes, expected at most {MAX_FILE_BYTES}")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    parse(&bytes).map_err(|message| Error::format(path, message))
}

/// The array in the bytes of an npy file; the message says what is wrong with them.
pub fn parse(bytes: &[u8]) -> Result<Array, String> {
    let rest = bytes.strip_prefix(MAGIC).ok_or("expected an npy file of version 1.0")?;
    let (length, rest) = rest.split_first_chunk::<2>().ok_or("cut short in the header")?;
    let (header, body) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length))).ok_or("cut short in the header")?;
    let header = std::str::from_utf8(header).map_err(|_| "header is not text")?;
    let descr = value(header, "descr")?.split(['\'', '"']).nth(1).unwrap_or_default();
    if !value(header, "fortran_order")?.starts_with("False") {
        return Err("expected C order ('fortran_order': False)".into());
    }
    let shape = parse_shape(value(header, "shape")?).ok_or_else(|| format!("header has no readable shape: {}", header.trim()))?;
    let size = match descr {
        "|b1" | "|i1" | "|u1" => 1,
        "<f2" | "<i2" | "<u2" => 2,
        "<f4" | "<i4" | "<u4" => 4,
        "<f8" | "<i8" => 8,
        other => return Err(format!("element type `{other}`, expected <f2, <f4, <f8, <i8 or a narrower integer")),
    };
    let count = product(&shape).filter(|n| n.checked_mul(size) == Some(body.len()));
    let count = count.ok_or_else(|| format!("{} bytes of data, expected shape {shape:?} of {size} bytes each", body.len()))?;
    let data = match descr {
        "<f4" => Data::F32(convert(count, body, LittleEndian::read_f32_into)),
        "<f8" => Data::F64(convert(count, body, LittleEndian::read_f64_into)),
        "<f2" => Data::F16(convert(count, body, LittleEndian::read_u16_into)),
        "|b1" | "|u1" => Data::I64(body.iter().map(|&x| x.into()).collect()),
        "|i1" => Data::I64(body.iter().map(|&x| (x as i8).into()).collect()),
        "<i2" => widen(convert(count, body, LittleEndian::read_i16_into)),
        "<u2" => widen(convert(count, body, LittleEndian::read_u16_into)),
        "<i4" => widen(convert(count, body, LittleEndian::read_i32_into)),
        "<u4" => widen(convert(count, body, LittleEndian::read_u32_into)),
        _ => Data::I64(convert(count, body, LittleEndian::read_i64_into)),
    };
    Ok(Array { shape, data })
}

fn widen<T: Into<i64>>(values: Vec<T>) -> Data {
    Data::I64(values.into_iter().map(Into::into).collect())
}

fn convert<T: Clone + Default>(count: usize, bytes: &[u8], read: impl Fn(&[u8], &mut [T])) -> Vec<T> {
    let mut values = vec![T::default(); count];
    read(bytes, &mut values);
    values
}

/// What follows `'key':` in the header, a Python dictionary.
fn value<'a>(header: &'a str, key: &str) -> Result<&'a str, String> {
    let quoted = [format!("'{key}'"), format!("\"{key}\"")];
    let after = quoted.iter().find_map(|q| header.split_once(q.as_str())).and_then(|(_, after)| after.trim_start().strip_prefix(':'));
    after.map(str::trim_start).ok_or_else(|| format!("header has no `{key}`: {}", header.trim()))
}

/// A tuple of lengths at the start of the text.
fn parse_shape(text: &str) -> Option<Vec<usize>> {
    let inside = text.strip_prefix('(')?.split_once(')')?.0.trim();
    let inside = inside.strip_suffix(',').unwrap_or(inside);
    if inside.is_empty() {
        return Some(Vec::new());
    }
    inside.split(',').map(|d| d.trim().parse().ok()).collect()
}

fn product(shape: &[usize]) -> Option<usize> {
    // A zero makes the product zero, whatever overflows before it.
    if shape.contains(&0) { Some(0) } else { shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npy");
        write(&path, &[2, 3], &[1.5f32, -0.0, f32::MAX, 3.0, f32::MIN_POSITIVE, 5.0]).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 128 + 24);
        let read_back = read(&path).unwrap();
        assert_eq!(read_back.shape, [2, 3]);
        assert_eq!(read_back.data, Data::F32(vec![1.5, -0.0, f32::MAX, 3.0, f32::MIN_POSITIVE, 5.0]));
        write(&path, &[], &[std::f64::consts::PI]).unwrap();
        assert_eq!(read(&path).unwrap(), Array { shape: vec![], data: Data::F64(vec![std::f64::consts::PI]) });
        write(&path, &[1], &[i64::MIN]).unwrap();
        assert_eq!(read(&path).unwrap(), Array { shape: vec![1], data: Data::I64(vec![i64::MIN]) });
        write::<i64>(&path, &[4, 0], &[]).unwrap();
        assert_eq!(read(&path).unwrap().shape, [4, 0]);
        assert!(write(&path, &[2, 2], &[1.0f32]).unwrap_err().to_string().contains("a.npy"));
    }

    /// The bytes that `numpy.save` writes for `numpy.arange(3, dtype="f4")`.
    #[test]
    fn same_bytes_as_numpy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npy");
        write(&path, &[3], &[0.0f32, 1.0, 2.0]).unwrap();
        let mut want = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }".to_vec();
        want.resize(127, b' ');
        want.extend_from_slice(b"\n\0\0\0\0\0\0\x80\x3f\0\0\0\x40");
        assert_eq!(std::fs::read(&path).unwrap(), want);
    }

    #[test]
    fn bad_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bad.npy");
        write(&path, &[2, 3], &[0i64; 6]).unwrap();
        let good = std::fs::read(&path).unwrap();
        let refused = |bytes: &[u8], expected: &str| {
            std::fs::write(&path, bytes).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("bad.npy") && error.contains(expected) && !error.contains('\n'), "{error}");
        };
        for cut in 0..good.len() {
            refused(&good[..cut], "");
        }
        let edited = |from: &str, to: &str| {
            assert_eq!(from.len(), to.len());
            let at = good.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
            let mut bytes = good.clone();
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
            bytes
        };
        refused(&edited("<i8", ">i8"), "element type");
        refused(&edited("False", "True "), "C order");
        refused(&edited("(2, 3)", "(9, 9)"), "48 bytes");
        refused(&edited("shape", "shapf"), "shape");
        // 2⁶⁴ elements, and a product that wraps to 6.
        let header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (4294967296, 4294967296), }\n";
        let huge = [MAGIC.as_slice(), &(header.len() as u16).to_le_bytes(), header].concat();
        refused(&huge, "0 bytes of data");
    }
}
