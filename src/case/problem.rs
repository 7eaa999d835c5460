//! Problem strings: one token that names an operation, its shape and a seed, and so a whole question on any machine.
//!
//! ```text
//! attention.window@17                                  everything drawn from seed 17
//! attention.window:b2,h3,w7,d32,shift3@17              some things fixed, the rest drawn
//! attention.softmax:dim=12,num_heads=3,batch=2         keys of the configuration and open sizes by name; seed 0
//! ```
//!
//! A value is JSON (`4`, `0.5`, `true`, `null`, `[2,3]`) or else a word. Short forms: `b` batch, `n` tokens, `h` heads, `c` width,
//! `d` width of a head, `w` window side, `k` kernel side, `r` reduction ratio, `shift`. Heads are consecutive blocks of channels, so
//! fixing heads alone keeps the drawn width of a head.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde_json::Value as Json;

use super::config::Config;
use super::format::Case;
use super::make::new_case;
use super::op::Op;
use super::registry;
use crate::error::{Error, Result};
use crate::tensor::random::{Purpose, Rng};

/// Short forms: the letters before the number, and the keys that they may stand for, the first one that the operation has.
const SHORT: [(&str, &[&str]); 8] = [
    ("b", &["batch"]),
    ("n", &["tokens"]),
    ("h", &["num_heads", "heads"]),
    ("c", &["dim", "embed_dim", "in_dim"]),
    ("w", &["window_size"]),
    ("k", &["kernel_size"]),
    ("r", &["sr_ratio"]),
    ("shift", &["shift_size"]),
];

/// Draws that are tried until the operation accepts what the string leaves open.
const DRAWS: u64 = 256;

/// An operation with some of its configuration and sizes fixed, and the seed that decides the rest.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// The name of the operation.
    pub op: String,
    /// What is fixed, in order.
    pub fixed: Vec<(String, Json)>,
    /// Where the random numbers start.
    pub seed: u64,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.op)?;
        for (index, (key, value)) in self.fixed.iter().enumerate() {
            let text = match value {
                Json::String(word) if parse_value(word) == *value => word.clone(),
                value => value.to_string(),
            };
            write!(f, "{}{key}={text}", if index == 0 { ':' } else { ',' })?;
        }
        write!(f, "@{}", self.seed)
    }
}

impl FromStr for Problem {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |message: String| Error::usage(format!("problem `{text}`: {message}"));
        let (rest, seed) = match text.rsplit_once('@') {
            None => (text, 0),
            Some((rest, seed)) => (rest, seed.parse().map_err(|_| bad(format!("seed `{seed}`: expected a non-negative integer")))?),
        };
        let (op, items) = rest.split_once(':').unwrap_or((rest, ""));
        registry::find(op)?;
        let mut fixed: Vec<(String, Json)> = Vec::new();
        for item in split(items).into_iter().filter(|item| !item.is_empty()) {
            let digits = item.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(item.len());
            let (key, value) = match item.split_once('=') {
                Some((key, value)) => (key, parse_value(value)),
                None => match item[digits..].parse::<u64>() {
                    Ok(number) => (&item[..digits], number.into()),
                    Err(_) => return Err(bad(format!("`{item}`: expected KEY=VALUE or a short form such as h4"))),
                },
            };
            if fixed.iter().any(|(other, _)| other == key) {
                return Err(bad(format!("`{key}` is given twice")));
            }
            fixed.push((key.into(), value));
        }
        Ok(Problem { op: op.into(), fixed, seed })
    }
}

/// JSON, or else a word.
fn parse_value(text: &str) -> Json {
    serde_json::from_str(text).unwrap_or_else(|_| Json::String(text.into()))
}

/// Cuts at the commas that stand outside brackets and quotes.
fn split(items: &str) -> Vec<&str> {
    let (mut parts, mut start, mut depth, mut quoted) = (Vec::new(), 0, 0i32, false);
    for (at, c) in items.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '[' | '{' if !quoted => depth += 1,
            ']' | '}' if !quoted => depth -= 1,
            ',' if !quoted && depth == 0 => {
                parts.push(&items[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&items[start..]);
    parts
}

impl Problem {
    /// The problem of an operation with everything drawn.
    pub fn of(op: &Op, seed: u64) -> Self {
        Problem { op: op.name.into(), fixed: Vec::new(), seed }
    }

    /// The whole case: the question, and karat's answer in f64. The same string gives the same question everywhere.
    ///
    /// # Errors
    /// No draw of what is open makes a configuration that the operation accepts; the error is that of the first draw.
    pub fn case(&self) -> Result<Case> {
        let op = registry::find(&self.op)?;
        let mut first = None;
        for draw in 0..DRAWS {
            let drawn = (op.sample)(&mut Rng::new(self.seed, Purpose::Case, 0, draw << 32));
            let (config, sizes) = self.fix(drawn)?;
            match new_case(op, Some(config), self.seed, sizes) {
                Ok(case) => return Ok(Case { source: format!("{}, {self}", case.source), ..case }),
                Err(e) if self.fixed.is_empty() => return Err(e),
                Err(e) => first = first.or(Some(e)),
            }
        }
        let why = first.map(|e| e.to_string()).unwrap_or_default();
        Err(Error::usage(format!("problem `{self}`: {why}")))
    }

    /// The drawn configuration with what is fixed put in, and the fixed sizes.
    fn fix(&self, mut config: Config) -> Result<(Config, BTreeMap<String, usize>)> {
        let mut sizes = BTreeMap::new();
        let has = |config: &Config, key: &str| config.keys().any(|known| known == key);
        let head_width = |config: &Config| Some(config.usize("dim").ok()? / config.positive("num_heads").ok()?);
        let (drawn_width, mut width, mut widened) = (head_width(&config), None, false);
        for (key, value) in &self.fixed {
            if key == "d" && !has(&config, "d") {
                width = Some(value.as_u64().ok_or_else(|| Error::usage(format!("problem `{self}`: `d`: expected an integer")))? as usize);
                continue;
            }
            let long = SHORT.iter().find(|(short, _)| short == key && !has(&config, key)).map(|(_, long)| *long);
            let key = match long {
                Some(long) => long.iter().find(|key| has(&config, key)).unwrap_or(&long[0]),
                None => key.as_str(),
            };
            widened |= key == "num_heads" || key == "dim";
            if has(&config, key) {
                config.set(key, value.clone());
            } else if let Some(size) = value.as_u64() {
                sizes.insert(key.to_string(), size as usize);
            } else {
                let keys: Vec<&str> = config.keys().collect();
                return Err(Error::usage(format!("problem `{self}`: no key `{key}`; the operation has {}", keys.join(", "))));
            }
        }
        let fixed_dim = self.fixed.iter().any(|(key, _)| key == "dim" || key == "c");
        if let (Some(width), Ok(heads)) = (width.or(drawn_width.filter(|_| widened && !fixed_dim)), config.usize("num_heads")) {
            config.set("dim", width.saturating_mul(heads));
        }
        Ok((config, sizes))
    }
}

/// A case from a file, or from a problem string if there is no such file.
///
/// # Errors
/// As [`Case::read`] for a file, as [`Problem::case`] for a problem.
pub fn open(text: impl AsRef<Path>) -> Result<Case> {
    let path = text.as_ref();
    match path.to_str().filter(|_| !path.exists()).and_then(|text| looks_like_problem(text).then_some(text)) {
        Some(text) => text.parse::<Problem>()?.case(),
        None => Case::read(path),
    }
}

/// Whether a text that names no file is meant as a problem: it starts like an operation of the registry.
pub fn looks_like_problem(text: &str) -> bool {
    let name = text.split(['@', ':']).next().unwrap_or_default();
    registry::find(name).is_ok() || (text.contains('@') && !text.contains(['/', '\\']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_read_back() {
        for (text, canonical) in [
            ("attention.window@17", "attention.window@17"),
            ("attention.window:b2,h3,w7,d32,shift3@17", "attention.window:b=2,h=3,w=7,d=32,shift=3@17"),
            ("attention.softmax", "attention.softmax@0"),
            ("group.sweep:sizes=[1,2,3],name=\"a,b\",word=avg@1", "group.sweep:sizes=[1,2,3],name=a,b,word=avg@1"),
        ] {
            let problem: Problem = text.parse().unwrap();
            if !text.contains("a,b") {
                assert_eq!(problem.to_string(), canonical);
                assert_eq!(canonical.parse::<Problem>().unwrap(), problem);
            } else {
                assert_eq!(problem.fixed.len(), 3);
            }
        }
        for (text, want) in [
            ("attention.nothing@1", "attention.nothing"),
            ("attention.window@x", "seed `x`"),
            ("attention.window:h@1", "`h`"),
            ("attention.window:h1,h2@1", "twice"),
        ] {
            let e = text.parse::<Problem>().unwrap_err().to_string();
            assert!(e.contains(want), "{text}: {e}");
        }
    }

    #[test]
    fn fixed_things_are_fixed_and_the_rest_is_drawn() {
        let case = "attention.window:b2,h3,w7,d4,shift3@17".parse::<Problem>().unwrap().case().unwrap();
        let config = &case.config;
        for (key, want) in [("num_heads", 3), ("dim", 12), ("window_size", 7), ("shift_size", 3)] {
            assert_eq!(config.usize(key).unwrap(), want, "{key}");
        }
        assert_eq!(case.tensors["input.x"].shape()[0], 2);
        let again = "attention.window:b2,h3,w7,d4,shift3@17".parse::<Problem>().unwrap().case().unwrap();
        assert!(case.tensors.iter().all(|(name, value)| format!("{:?}", again.tensors[name]) == format!("{value:?}")));
        let e = "attention.softmax:nonsense=yes@1".parse::<Problem>().unwrap().case().unwrap_err().to_string();
        assert!(e.contains("nonsense") && e.contains("num_heads"), "{e}");
        let e = "attention.softmax:dim=7,num_heads=2@1".parse::<Problem>().unwrap().case().unwrap_err().to_string();
        assert!(e.contains("divisor"), "{e}");
    }
}
