//! Files of named `f32` tensors with checksums: `checkpoint.safetensors` (the parameters under their published names) and
//! `state.safetensors` (all that a run needs to go on: parameters, both moments of AdamW, step, configuration).
//!
//! Both are plain safetensors files. The metadata key `checksum`, first in the header, holds one 64-bit number (16 hexadecimal
//! digits) for the header itself, taken with those 16 digits as zeros, then one for each tensor in the order of the file.

use std::fmt::Write;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use serde_json::Value;

use super::pass::Named;
use super::{Entry, Params};
use crate::tensor::{Shape, Tensor, f16_to_f64};
use crate::{Error, Result};

const PREFIX: &str = "{\"__metadata__\":{\"checksum\":\"";
const DIGITS: usize = 16;

/// FNV-1a, eight bytes at a time: every step is a bijection of the state, so one wrong word always shows.
fn checksum(bytes: &[u8]) -> u64 {
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ bytes.len() as u64;
    for word in bytes.chunks(8) {
        let mut padded = [0; 8];
        padded[..word.len()].copy_from_slice(word);
        hash = (hash ^ u64::from_le_bytes(padded)).wrapping_mul(PRIME).rotate_left(29);
    }
    hash
}

/// One tensor to be written.
pub(crate) struct Item<'a> {
    name: String,
    shape: Shape,
    values: &'a [f32],
}

/// The parameters of `params`, and its untrained buffers if asked, under `prefix`.
pub(crate) fn items<'a>(prefix: &'a str, params: &'a Params<f32>, buffers: bool) -> impl Iterator<Item = Item<'a>> {
    let layout = params.layout();
    let item =
        move |(entry, values): (&'a Entry, &'a [f32])| Item { name: format!("{prefix}{}", entry.name), shape: entry.param.shape(), values };
    let extra = if buffers { layout.buffers() } else { &[] };
    layout.params().iter().map(|e| (e, params.get(e.param))).chain(extra.iter().map(|e| (e, params.buffer(e.param)))).map(item)
}

/// The bytes of a file of `items` with `metadata`; the same for the same input.
pub(crate) fn encode(items: &[Item], metadata: &[(&str, String)]) -> Vec<u8> {
    let quote = |s: &str| Value::from(s).to_string();
    let digits = DIGITS * (items.len() + 1);
    let mut header = format!("{PREFIX}{}\"", "0".repeat(digits));
    for (key, value) in metadata {
        let _ = write!(header, ",{}:{}", quote(key), quote(value));
    }
    header.push('}');
    let mut end = 0;
    for item in items {
        let start = end;
        end += size_of_val(item.values);
        let _ = write!(header, ",{}:{{\"dtype\":\"F32\",\"shape\":{:?},\"data_offsets\":[{start},{end}]}}", quote(&item.name), item.shape);
    }
    header.push('}');
    let padding = header.len().next_multiple_of(8) - header.len();
    header.push_str(&" ".repeat(padding));

    let body = 8 + header.len();
    let mut bytes = Vec::with_capacity(body + end);
    bytes.extend_from_slice(&(header.len() as u64).to_le_bytes());
    bytes.extend_from_slice(header.as_bytes());
    let mut sums = String::with_capacity(digits);
    for item in items {
        let start = bytes.len();
        bytes.extend(item.values.iter().flat_map(|x| x.to_le_bytes()));
        let _ = write!(sums, "{:016x}", checksum(&bytes[start..]));
    }
    let sums_at = 8 + PREFIX.len() + DIGITS;
    bytes[sums_at..sums_at + sums.len()].copy_from_slice(sums.as_bytes());
    let own = format!("{:016x}", checksum(&bytes[8..body]));
    bytes[sums_at - DIGITS..sums_at].copy_from_slice(own.as_bytes());
    bytes
}

/// Writes `tensors` and `metadata` to `path`, atomically: a safetensors file with checksums.
///
/// # Errors
/// If the file cannot be written.
pub fn write_tensors(path: impl AsRef<Path>, tensors: &[Named<f32>], metadata: &[(&str, String)]) -> Result<()> {
    let items: Vec<Item> =
        tensors.iter().map(|(name, tensor)| Item { name: name.clone(), shape: tensor.shape(), values: tensor.data() }).collect();
    crate::fs::write_atomic(path, &encode(&items, metadata))
}

/// Whether a file begins as `torch.save` writes it: a zip archive, or a bare pickle of protocol 2 to 5.
fn is_torch(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || matches!(bytes, [0x80, 2..=5, ..])
}

/// A file of tensors, mapped into memory; its structure and checksums are verified.
pub struct Checkpoint {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    body: usize,
}

impl Checkpoint {
    /// Opens and verifies a file. Files of other programs, which have no checksums, are accepted.
    ///
    /// # Errors
    /// If there is no such file, it is no whole safetensors file, or a checksum is wrong; the message names the tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let meta = file.metadata().map_err(|e| Error::io(path, e))?;
        if !meta.is_file() || meta.len() < 8 {
            return Err(Error::format(path, format!("expected a safetensors file, found {} bytes", meta.len())));
        }
        // SAFETY: the map is only read. karat replaces such files by renaming, never by writing into them, so the mapped one stays whole.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        let broken = |e: safetensors::SafeTensorError| {
            if is_torch(&map) {
                return Error::format(path, "a PyTorch file, expected safetensors: convert it with reference/convert.py");
            }
            let message = e.to_string().replace('\n', " ");
            Error::format(path, format!("not a whole safetensors file ({message}); damaged or cut short"))
        };
        SafeTensors::deserialize(&map).map_err(broken)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(broken)?;
        let checkpoint = Checkpoint { path: path.to_path_buf(), body: 8 + header, map, metadata };
        checkpoint.verify()?;
        Ok(checkpoint)
    }

    fn verify(&self) -> Result<()> {
        let header = &self.map[8..self.body];
        if !header.starts_with(PREFIX.as_bytes()) {
            return match self.meta("karat") {
                Some(_) => Err(self.error("the header is damaged: no checksums")),
                None => Ok(()),
            };
        }
        let names = self.metadata.offset_keys();
        let sums = self.meta("checksum").unwrap_or_default();
        if sums.len() != DIGITS * (names.len() + 1) || !sums.is_ascii() {
            return Err(self.error("the header is damaged: checksums of the wrong length"));
        }
        let mut blank = header.to_vec();
        blank[PREFIX.len()..PREFIX.len() + DIGITS].fill(b'0');
        let agrees = |index: usize, bytes: &[u8]| sums[index * DIGITS..(index + 1) * DIGITS] == format!("{:016x}", checksum(bytes));
        if !agrees(0, &blank) {
            return Err(self.error("the header is damaged: its checksum is wrong"));
        }
        for (index, name) in names.iter().enumerate() {
            let Some(info) = self.metadata.info(name) else { continue };
            if !agrees(index + 1, &self.map[self.body + info.data_offsets.0..self.body + info.data_offsets.1]) {
                return Err(self.error(format!("tensor `{name}` is damaged: its checksum is wrong")));
            }
        }
        Ok(())
    }

    /// An error about this file.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::format(&self.path, message)
    }

    /// The names of the tensors, in the order of the file.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// The tensor `name`, from F64, F32, F16 or BF16.
    ///
    /// # Errors
    /// If it is missing or of another type.
    pub fn tensor(&self, name: &str) -> Result<Tensor<f32>> {
        let Some(info) = self.metadata.info(name) else {
            return Err(self.error(format!("tensor `{name}` is missing")));
        };
        let bytes = &self.map[self.body + info.data_offsets.0..self.body + info.data_offsets.1];
        let data: Vec<f32> = match info.dtype {
            Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::F64 => {
                bytes.chunks_exact(8).map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32).collect()
            }
            Dtype::F16 => bytes.chunks_exact(2).map(|b| f16_to_f64(u16::from_le_bytes([b[0], b[1]])) as f32).collect(),
            Dtype::BF16 => bytes.chunks_exact(2).map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)).collect(),
            other => return Err(self.error(format!("tensor `{name}`: expected F64, F32, F16 or BF16, found {other:?}"))),
        };
        Tensor::new(Shape::try_new(&info.shape)?, &data)
    }

    /// A metadata value.
    pub fn meta(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// A metadata value that has to be there.
    ///
    /// # Errors
    /// If it is not.
    pub fn need_meta(&self, key: &str) -> Result<&str> {
        self.meta(key).ok_or_else(|| self.error(format!("no `{key}` in the metadata; expected a file that `karat pretrain` wrote")))
    }

    /// Fills `sets`, each the parameters (and buffers, if its flag says so) under a prefix, from the file, which must hold just these.
    ///
    /// # Errors
    /// If a tensor is missing, of another shape or type, or unexpected; the message names file and tensor.
    pub(crate) fn fill(&self, sets: &mut [(&str, &mut Params<f32>, bool)]) -> Result<()> {
        let mut known = 0;
        for (prefix, params, buffers) in sets.iter_mut() {
            let layout = params.layout().clone();
            let extra = if *buffers { layout.buffers() } else { &[] };
            for (entry, is_buffer) in layout.params().iter().map(|e| (e, false)).chain(extra.iter().map(|e| (e, true))) {
                let target = if is_buffer { params.buffer_mut(entry.param) } else { params.get_mut(entry.param) };
                self.read(&format!("{prefix}{}", entry.name), &entry.param.shape(), target)?;
                known += 1;
            }
        }
        let names = self.metadata.offset_keys();
        if names.len() > known {
            let expected = |name: &String| {
                let of = |e: &Entry, prefix: &str| name.strip_prefix(prefix) == Some(&e.name);
                sets.iter().any(|(prefix, p, b)| {
                    p.layout().params().iter().any(|e| of(e, prefix)) || *b && p.layout().buffers().iter().any(|e| of(e, prefix))
                })
            };
            let stranger = names.iter().find(|name| !expected(name)).map_or("", String::as_str);
            return Err(self.error(format!("unexpected tensor `{stranger}`: the network has no such parameter")));
        }
        Ok(())
    }

    fn read(&self, name: &str, shape: &[usize], target: &mut [f32]) -> Result<()> {
        let Some(info) = self.metadata.info(name) else {
            return Err(self.error(format!("tensor `{name}` is missing")));
        };
        if info.dtype != Dtype::F32 || info.shape != shape {
            return Err(self.error(format!("tensor `{name}`: expected F32 {shape:?}, found {:?} {:?}", info.dtype, info.shape)));
        }
        let bytes = &self.map[self.body + info.data_offsets.0..self.body + info.data_offsets.1];
        for (x, b) in target.iter_mut().zip(bytes.chunks_exact(4)) {
            *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }
        Ok(())
    }

    /// The parameters, for a network of `params`' layout.
    ///
    /// # Errors
    /// If a tensor is missing, of another shape or type, or unexpected; `params` may then be partly filled.
    pub fn load(&self, params: &mut Params<f32>) -> Result<()> {
        self.fill(&mut [("", params, true)])
    }
}
