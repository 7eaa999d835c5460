//! A golden case on disk: one safetensors file with the question, the answer and where it comes from (`specs/README.md`).

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Read};
use std::path::Path;

use safetensors::tensor::Dtype as Stored;
use safetensors::{SafeTensors, View};
use serde_json::{Map, Value as Json, json};

use super::config::Config;
use super::op::{Tensors, Value};
use crate::data::{MAX_FILE_BYTES, npy};
use crate::error::{Error, Result};
use crate::fs::write_atomic;
use crate::tensor::{IntTensor, Shape, Tensor, f16_to_f64};

/// The version of the format that this karat reads and writes.
const VERSION: &str = "1";

/// What the name of every tensor of a case starts with.
const PREFIXES: [&str; 8] = ["input.", "param.", "buffer.", "output.", "cotangent.", "grad.input.", "grad.param.", "after."];

/// No shape may name more elements than this, not even one with a dimension 0: products of its other dimensions stay safe.
const MOST_ELEMENTS: usize = 1 << 40;

/// A golden case: the configuration, inputs and parameters of an operation, with its outputs and gradients.
#[derive(Clone, Debug)]
pub struct Case {
    /// The name of the operation.
    pub op: String,
    /// The configuration of the operation.
    pub config: Config,
    /// What computed the answer.
    pub source: String,
    /// Inputs and parameters (`input.x`, `param.weight`) whose gradient is identically zero in exact arithmetic.
    pub zero_grads: Vec<String>,
    /// All tensors, with their prefixes, floats in f64.
    pub tensors: Tensors<f64>,
}

/// How the floats of a tensor are stored in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Element {
    /// IEEE binary64.
    F64,
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of binary32.
    Bf16,
}

impl Element {
    /// The usual short name.
    pub fn name(self) -> &'static str {
        match self {
            Element::F64 => "f64",
            Element::F32 => "f32",
            Element::F16 => "f16",
            Element::Bf16 => "bf16",
        }
    }

    /// Bits of the significand, the implicit one counted: the spacing of floats at 1 is `2^(1 − bits)`.
    pub fn significand_bits(self) -> i32 {
        match self {
            Element::F64 => 53,
            Element::F32 => 24,
            Element::F16 => 11,
            Element::Bf16 => 8,
        }
    }

    /// The spacing of floats at 1.
    pub fn epsilon(self) -> f64 {
        libm::ldexp(1.0, 1 - self.significand_bits())
    }

    /// The exponent of the smallest normal float, `2^e`.
    fn smallest_exponent(self) -> i32 {
        match self {
            Element::F64 => -1022,
            Element::F32 | Element::Bf16 => -126,
            Element::F16 => -14,
        }
    }

    /// The distance between neighbouring floats of this precision around `x`; NaN if `x` is not finite.
    pub fn ulp(self, x: f64) -> f64 {
        if !x.is_finite() {
            return f64::NAN;
        }
        let exponent = if x == 0.0 { self.smallest_exponent() } else { libm::ilogb(x).max(self.smallest_exponent()) };
        libm::ldexp(1.0, exponent + 1 - self.significand_bits())
    }

    /// `x` rounded to this precision, ties to even; beyond the largest float, infinity.
    pub fn round(self, x: f64) -> f64 {
        match self {
            Element::F64 => x,
            Element::F32 => f64::from(x as f32),
            _ if !x.is_finite() => x,
            Element::F16 | Element::Bf16 => {
                let ulp = self.ulp(x);
                // Dividing by a power of two is exact, so this rounds once.
                let rounded = libm::rint(x / ulp) * ulp;
                let limit = if self == Element::F16 { 65504.0 } else { libm::ldexp(255.0, 120) };
                if rounded.abs() > limit { f64::INFINITY.copysign(x) } else { rounded }
            }
        }
    }
}

/// The named tensors of any safetensors file, and how each one's floats were stored (integers: `None`).
#[derive(Clone, Debug)]
pub struct Stock {
    /// The tensors, floats widened to f64.
    pub tensors: Tensors<f64>,
    /// The stored precision of each float tensor.
    pub elements: BTreeMap<String, Element>,
}

impl Case {
    /// Reads a case.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read; [`Error::Format`], naming the file and what is wrong in it, if it is no
    /// case: no safetensors file, another version, no operation, broken configuration, unknown prefix, no answer, …
    pub fn read(path: impl AsRef<Path>) -> Result<Case> {
        let path = path.as_ref();
        let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
        Self::decode(path, &bytes)
    }

    fn decode(path: &Path, bytes: &[u8]) -> Result<Case> {
        let bad = |message: String| Error::format(path, message);
        let (metadata, stock) = decode(path, bytes)?;
        let text = |key: &str| metadata.get(key).ok_or_else(|| bad(format!("no `{key}` in the metadata: not a golden case")));
        let version = text("karat.case")?;
        if version != VERSION {
            return Err(bad(format!("golden case of version `{version}`; this karat reads version {VERSION}")));
        }
        let op = text("op")?.clone();
        if op.is_empty() {
            return Err(bad("the metadata names no operation (`op` is empty)".into()));
        }
        let config = Config::parse(text("config")?).map_err(|e| bad(e.to_string()))?;
        let source = metadata.get("source").cloned().unwrap_or_default();
        let zero_grads: Vec<String> = match metadata.get("zero_grads") {
            None => Vec::new(),
            Some(list) => serde_json::from_str(list).map_err(|_| bad(format!("`zero_grads` is no JSON list of names: {list}")))?,
        };
        let case = Case { op, config, source, zero_grads, tensors: stock.tensors };
        case.check().map_err(bad)?;
        Ok(case)
    }

    /// The rules that a case obeys; the message says which one is broken.
    fn check(&self) -> Result<(), String> {
        let known = |name: &String| self.tensors.contains_key(name);
        for (name, value) in &self.tensors {
            let Some(prefix) = PREFIXES.iter().find(|p| name.len() > p.len() && name.starts_with(**p)) else {
                return Err(format!("tensor `{name}` starts with none of {}", PREFIXES.join(", ")));
            };
            let of = match *prefix {
                "cotangent." => Some(name.replacen("cotangent.", "output.", 1)),
                "grad.input." | "grad.param." => Some(name["grad.".len()..].to_string()),
                "after." => Some(name.replacen("after.", "buffer.", 1)),
                _ => None,
            };
            let Some(of) = of else { continue };
            let Some(origin) = self.tensors.get(&of) else { return Err(format!("`{name}` without `{of}`")) };
            if origin.shape() != value.shape() {
                return Err(format!("`{name}` has shape {:?}, `{of}` has {:?}", value.shape(), origin.shape()));
            }
            if *prefix != "after." && (matches!(value, Value::Int(_)) || matches!(origin, Value::Int(_))) {
                return Err(format!("`{name}` and `{of}` have to be floats"));
            }
        }
        for name in &self.zero_grads {
            if !(name.starts_with("input.") || name.starts_with("param.")) || !known(name) {
                return Err(format!("`zero_grads` names `{name}`, which is no input or parameter of the case"));
            }
            if known(&format!("grad.{name}")) {
                return Err(format!("`{name}` is in `zero_grads` and has a gradient"));
            }
        }
        if self.answers().next().is_none() && self.zero_grads.is_empty() {
            return Err("holds no answer: no tensor `output.…`, `grad.…` or `after.…`".into());
        }
        Ok(())
    }

    /// The tensors of the question: inputs, parameters, buffers and cotangents.
    pub fn question(&self) -> Tensors<f64> {
        self.tensors.iter().filter(|(name, _)| !is_answer(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// The tensors of the answer: outputs, gradients, buffers after the call.
    pub fn answers(&self) -> impl Iterator<Item = (&str, &Value<f64>)> {
        self.tensors.iter().filter(|(name, _)| is_answer(name)).map(|(name, value)| (name.as_str(), value))
    }

    /// Whether the answer has gradients.
    pub fn has_gradients(&self) -> bool {
        !self.zero_grads.is_empty() || self.answers().any(|(name, _)| name.starts_with("grad."))
    }

    /// Writes the case; the same case gives the same bytes on every machine. The file appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written; [`Error::Format`] if the case breaks a rule of the format.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        self.check().map_err(|message| Error::format(path, message))?;
        write_atomic(path, &self.encode())
    }

    fn encode(&self) -> Vec<u8> {
        let mut metadata = Map::new();
        metadata.insert("config".into(), self.config.to_json().into());
        metadata.insert("karat.case".into(), VERSION.into());
        metadata.insert("op".into(), self.op.clone().into());
        metadata.insert("source".into(), self.source.clone().into());
        if !self.zero_grads.is_empty() {
            metadata.insert("zero_grads".into(), json!(self.zero_grads).to_string().into());
        }
        // The safetensors crate keeps metadata in a hash map, whose order changes from run to run.
        let mut header = Map::new();
        header.insert("__metadata__".into(), Json::Object(metadata));
        let mut data = Vec::new();
        for (name, value) in &self.tensors {
            let start = data.len();
            let dtype = match value {
                Value::Float(t) => {
                    data.extend(t.data().iter().flat_map(|x| x.to_le_bytes()));
                    "F64"
                }
                Value::Int(t) => {
                    data.extend(t.data.iter().flat_map(|x| x.to_le_bytes()));
                    "I64"
                }
            };
            header.insert(name.clone(), json!({ "dtype": dtype, "shape": value.shape().to_vec(), "data_offsets": [start, data.len()] }));
        }
        let mut header = Json::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.extend(data);
        bytes
    }
}

/// Whether a tensor of this name belongs to the answer.
pub(super) fn is_answer(name: &str) -> bool {
    ["output.", "grad.", "after."].iter().any(|prefix| name.starts_with(prefix))
}

impl Stock {
    /// Reads the tensors of any safetensors file, or the arrays of an npz file.
    ///
    /// # Errors
    /// As [`Case::read`], without the rules of golden cases.
    pub fn read(path: impl AsRef<Path>) -> Result<Stock> {
        let path = path.as_ref();
        let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
        if bytes.starts_with(b"PK") { decode_npz(path, bytes) } else { Ok(decode(path, &bytes)?.1) }
    }
}

/// The arrays of an npz file, as `numpy.savez` and `numpy.savez_compressed` write it: a zip archive of `NAME.npy`.
fn decode_npz(path: &Path, bytes: Vec<u8>) -> Result<Stock> {
    let bad = |message: String| Error::format(path, message);
    let broken = |e: zip::result::ZipError| bad(format!("not a whole npz file: {}", e.to_string().replace('\n', " ")));
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).map_err(broken)?;
    let mut stock = Stock { tensors: Tensors::new(), elements: BTreeMap::new() };
    for index in 0..archive.len() {
        let entry = archive.by_index(index).map_err(broken)?;
        let name = entry.name().map_err(broken)?.into_owned();
        let Some(name) = name.strip_suffix(".npy").map(String::from) else { return Err(bad(format!("`{name}` is no npy array"))) };
        let mut data = Vec::new();
        // The size that the archive claims is not to be trusted.
        entry.take(MAX_FILE_BYTES).read_to_end(&mut data).map_err(|e| bad(format!("array `{name}`: {e}")))?;
        let of = |message: String| bad(format!("array `{name}`: {message}"));
        let array = npy::parse(&data).map_err(of)?;
        let shape = Shape::try_new(&array.shape).map_err(|_| of(format!("shape {:?} has more than 6 dimensions", array.shape)))?;
        let (floats, element) = match array.data {
            npy::Data::F64(data) => (data, Element::F64),
            npy::Data::F32(data) => (data.into_iter().map(f64::from).collect(), Element::F32),
            npy::Data::F16(data) => (data.into_iter().map(f16_to_f64).collect(), Element::F16),
            npy::Data::I64(data) => {
                stock.tensors.insert(name, Value::Int(IntTensor::new(shape, data)?));
                continue;
            }
        };
        stock.tensors.insert(name.clone(), Value::Float(Tensor::new(shape, &floats)?));
        stock.elements.insert(name, element);
    }
    Ok(stock)
}

fn decode(path: &Path, bytes: &[u8]) -> Result<(BTreeMap<String, String>, Stock)> {
    let bad = |message: String| Error::format(path, message);
    let broken = |e: safetensors::SafeTensorError| bad(format!("not a whole safetensors file: {}", e.to_string().replace('\n', " ")));
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
    let file = SafeTensors::deserialize(bytes).map_err(broken)?;
    let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
    let mut stock = Stock { tensors: Tensors::new(), elements: BTreeMap::new() };
    for (name, view) in file.iter() {
        let of = |message: String| bad(format!("tensor `{name}`: {message}"));
        let dims = View::shape(&view).to_vec();
        let product = dims.iter().filter(|&&d| d > 0).try_fold(1usize, |n, &d| n.checked_mul(d)).filter(|&n| n <= MOST_ELEMENTS);
        if product.is_none() {
            return Err(of(format!("shape {dims:?} is beyond all use (more than 2^40 elements)")));
        }
        let shape = Shape::try_new(&dims).map_err(|_| of(format!("shape {dims:?} has more than 6 dimensions")))?;
        let (value, element) = widen(view.dtype(), shape, view.data()).map_err(of)?;
        stock.tensors.insert(name.to_string(), value);
        if let Some(element) = element {
            stock.elements.insert(name.to_string(), element);
        }
    }
    Ok((metadata, stock))
}

fn widen(stored: Stored, shape: Shape, data: &[u8]) -> Result<(Value<f64>, Option<Element>), String> {
    fn each<const N: usize, R>(data: &[u8], f: impl Fn([u8; N]) -> R) -> Vec<R> {
        data.chunks_exact(N).map(|bytes| f(bytes.try_into().expect("a chunk has its size"))).collect()
    }
    let floats = |element, data: Vec<f64>| Ok((Value::Float(Tensor::new(shape, &data).map_err(|e| e.to_string())?), Some(element)));
    let ints = |data: Vec<i64>| Ok((Value::Int(IntTensor::new(shape, data).map_err(|e| e.to_string())?), None));
    match stored {
        Stored::F64 => floats(Element::F64, each(data, f64::from_le_bytes)),
        Stored::F32 => floats(Element::F32, each(data, |b| f32::from_le_bytes(b).into())),
        Stored::F16 => floats(Element::F16, each(data, |b| f16_to_f64(u16::from_le_bytes(b)))),
        Stored::BF16 => floats(Element::Bf16, each(data, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16).into())),
        Stored::I64 => ints(each(data, i64::from_le_bytes)),
        Stored::I32 => ints(each(data, |b| i32::from_le_bytes(b).into())),
        Stored::I16 => ints(each(data, |b| i16::from_le_bytes(b).into())),
        Stored::I8 => ints(each(data, |b| i8::from_le_bytes(b).into())),
        Stored::U32 => ints(each(data, |b| u32::from_le_bytes(b).into())),
        Stored::U16 => ints(each(data, |b| u16::from_le_bytes(b).into())),
        Stored::U8 => ints(each(data, |[b]| b.into())),
        Stored::BOOL => ints(each(data, |[b]| (b != 0).into())),
        other => Err(format!("elements of type {other}; expected F64, F32, F16, BF16, a signed integer, U8, U16, U32 or BOOL")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Case {
        let float =
            |shape: &[usize], scale: f64| Value::Float(Tensor::from_fn(Shape::try_new(shape).unwrap(), |i| scale * (i as f64 - 1.5)));
        let mut tensors = Tensors::new();
        tensors.insert("input.x".into(), float(&[2, 3], 1.0));
        tensors.insert("input.index".into(), Value::Int(IntTensor::vector([3, 1, 2])));
        tensors.insert("param.weight".into(), float(&[3], 0.1));
        tensors.insert("param.bias".into(), float(&[3], 0.1));
        tensors.insert("output.y".into(), float(&[2, 3], -0.7));
        tensors.insert("output.none".into(), float(&[0, 5], 1.0));
        tensors.insert("cotangent.y".into(), float(&[2, 3], 0.3));
        tensors.insert("grad.input.x".into(), float(&[2, 3], std::f64::consts::PI));
        tensors.insert("grad.param.weight".into(), float(&[3], 1e-300));
        let mut config = Config::default();
        config.set("dim", 3).set("name", "ü \"quoted\"");
        Case { op: "test.op".into(), config, source: "by hand".into(), zero_grads: vec!["param.bias".into()], tensors }
    }

    fn same(a: &Case, b: &Case) -> bool {
        a.encode() == b.encode()
    }

    #[test]
    fn written_cases_read_back_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let case = sample();
        case.write(&path).unwrap();
        let back = Case::read(&path).unwrap();
        assert!(same(&case, &back));
        assert_eq!((back.op.as_str(), back.source.as_str(), &back.config), ("test.op", "by hand", &case.config));
        assert_eq!(back.zero_grads, ["param.bias"]);
        assert_eq!(back.question().len(), 5);
        assert_eq!(back.answers().count(), 4);
    }

    /// A file of one's own making: any header, any data.
    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn damaged_files_are_errors_that_name_the_file() {
        let whole = sample().encode();
        let path = Path::new("some/case.safetensors");
        assert!(Case::decode(path, &whole).is_ok());
        for len in (0..whole.len()).step_by(7) {
            let error = Case::decode(path, &whole[..len]).expect_err("a truncated file");
            assert!(error.to_string().starts_with("some/case.safetensors: "), "{error}");
        }
        // A flipped bit in the header is an error or another valid case; never a panic, never the same case.
        let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        let mut rejected = 0;
        for position in 0..header {
            for bit in 0..8 {
                let mut flipped = whole.clone();
                flipped[position] ^= 1 << bit;
                match Case::decode(path, &flipped) {
                    Ok(other) => assert_ne!(other.encode(), whole, "byte {position} bit {bit}"),
                    Err(_) => rejected += 1,
                }
            }
        }
        assert!(rejected > header * 4, "{rejected} of {} flips were seen", header * 8);
    }

    #[test]
    fn broken_rules_are_named() {
        let meta = |extra: &str| format!(r#"{{"__metadata__":{{{extra}}},"output.y":{{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}}}"#);
        let good = r#""karat.case":"1","op":"a.b","config":"{}""#;
        let table = [
            (meta(good), ""),
            (meta(r#""karat.case":"2","op":"a.b","config":"{}""#), "version `2`"),
            (meta(r#""op":"a.b","config":"{}""#), "`karat.case`"),
            (meta(r#""karat.case":"1","config":"{}""#), "`op`"),
            (meta(r#""karat.case":"1","op":"","config":"{}""#), "no operation"),
            (meta(r#""karat.case":"1","op":"a.b""#), "`config`"),
            (meta(r#""karat.case":"1","op":"a.b","config":"{""#), "JSON object"),
            (meta(r#""karat.case":"1","op":"a.b","config":"[1]""#), "JSON object"),
            (meta(&format!(r#"{good},"zero_grads":"x""#)), "zero_grads"),
            (meta(&format!(r#"{good},"zero_grads":"[\"input.x\"]""#)), "`input.x`"),
            (meta(good).replace("output.y", "outptu.y"), "`outptu.y`"),
            (meta(good).replace("output.y", "output."), "`output.`"),
            (meta(good).replace("output.y", "grad.y"), "`grad.y`"),
            (meta(good).replace("output.y", "grad.input.y"), "without `input.y`"),
            (meta(good).replace("output.y", "input.y"), "no answer"),
            (meta(good).replace("F64", "F8_E4M3").replace("[1]", "[8]"), "F8_E4M3"),
            (meta(good).replace("[1]", "[1,1,1,1,1,1,1]"), "more than 6"),
            (meta(good).replace("[1]", "[0,1152921504606846976]").replace("[0,8]", "[0,0]"), "shape"),
            (meta(good).replace("[1]", "[9223372036854775807,9223372036854775807]"), "safetensors"),
            (meta(good).replace("[0,8]", "[0,80000000000]"), "safetensors"),
        ];
        for (header, want) in table {
            let data: &[u8] = if header.contains("[0,0]") { &[] } else { &[0; 8] };
            match Case::decode(Path::new("c.st"), &file(&header, data)) {
                Ok(_) => assert_eq!(want, "", "accepted {header}"),
                Err(e) => {
                    let line = e.to_string();
                    assert!(
                        !want.is_empty() && line.starts_with("c.st: ") && line.contains(want) && !line.contains('\n'),
                        "{header}: {line}"
                    );
                }
            }
        }
    }

    /// What NumPy writes, plain and compressed, in several types.
    #[test]
    fn npz_files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let [path, array] = ["a.npz", "a.npy"].map(|name| folder.path().join(name));
        npy::write(&array, &[2, 1], &[1.5f32, -2.0]).unwrap();
        let half = b"\x93NUMPY\x01\x00\x38\x00{'descr': '<f2', 'fortran_order': False, 'shape': (1,)}\n\x00\x3e";
        let bytes = |method| {
            let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
            let options = zip::write::SimpleFileOptions::default().compression_method(method);
            for (name, data) in [("output.y.npy", fs::read(&array).unwrap()), ("half.npy", half.to_vec())] {
                archive.start_file(name, options).unwrap();
                std::io::Write::write_all(&mut archive, &data).unwrap();
            }
            archive.finish().unwrap().into_inner()
        };
        for method in [zip::CompressionMethod::Stored, zip::CompressionMethod::Deflated] {
            let whole = bytes(method);
            fs::write(&path, &whole).unwrap();
            let stock = Stock::read(&path).unwrap();
            assert_eq!(stock.elements["output.y"], Element::F32);
            assert_eq!(stock.elements["half"], Element::F16);
            let Value::Float(y) = &stock.tensors["output.y"] else { panic!("floats") };
            let Value::Float(half) = &stock.tensors["half"] else { panic!("floats") };
            assert_eq!((y.data(), &y.shape()[..], half.data()), (&[1.5, -2.0][..], &[2, 1][..], &[1.5][..]));
            for cut in (2..whole.len()).step_by(5) {
                fs::write(&path, &whole[..cut]).unwrap();
                let error = Stock::read(&path).unwrap_err().to_string();
                assert!(error.contains("a.npz") && !error.contains('\n'), "{error}");
            }
        }
    }

    #[test]
    fn narrow_floats_widen_and_round() {
        for (bits, want) in
            [(0x3c00, 1.0), (0xc000, -2.0), (0x7bff, 65504.0), (0x0001, libm::ldexp(1.0, -24)), (0x8400, -libm::ldexp(1.0, -14))]
        {
            assert_eq!(f16_to_f64(bits), want);
        }
        assert!(f16_to_f64(0x7c00) == f64::INFINITY && f16_to_f64(0x7e00).is_nan());
        // Every finite binary16 is its own rounding, and numbers between two go to the nearer, ties to even.
        for bits in 0..0x7bffu16 {
            let (low, high) = (f16_to_f64(bits), f16_to_f64(bits + 1));
            assert_eq!(Element::F16.round(low), low);
            assert_eq!(Element::F16.round(low + 0.49 * (high - low)), low);
            assert_eq!(Element::F16.round(low + 0.51 * (high - low)), high);
            assert_eq!(Element::F16.round(low + 0.5 * (high - low)), if bits % 2 == 0 { low } else { high });
        }
        assert_eq!(Element::F16.round(65520.0), f64::INFINITY);
        assert_eq!(Element::Bf16.round(1.0 + 1.0 / 256.0), 1.0);
        assert_eq!(Element::Bf16.round(-1e39), f64::NEG_INFINITY);
        assert_eq!(Element::F32.ulp(1.0), f64::from(f32::EPSILON));
        assert_eq!(Element::F64.ulp(0.0), f64::from_bits(1));
    }
}
