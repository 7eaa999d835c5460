//! The configuration of an operation: a JSON object with typed access and errors that name the key.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The configuration of an operation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config(Map<String, Value>);

impl Config {
    /// Parses a JSON object.
    pub fn parse(json: &str) -> Result<Self> {
        match serde_json::from_str(json) {
            Ok(Value::Object(map)) => Ok(Config(map)),
            Ok(_) => Err(Error::config("config", format!("expected a JSON object, found {json}"))),
            Err(e) => Err(Error::config("config", format!("expected a JSON object: {e}"))),
        }
    }

    /// The configuration as JSON, keys in order.
    pub fn to_json(&self) -> String {
        Value::Object(self.0.clone()).to_string()
    }

    /// All keys.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The value of `key`; absent and `null` are both `None`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    /// Sets a key.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        self.0.insert(key.into(), value.into());
        self
    }

    fn need<R>(&self, key: &str, kind: &str, value: Option<R>) -> Result<R> {
        value.ok_or_else(|| match self.0.get(key) {
            None => Error::config(key, format!("missing; expected {kind}")),
            Some(found) => Error::config(key, format!("expected {kind}, found {found}")),
        })
    }

    fn optional<R>(&self, key: &str, default: R, read: impl Fn(&Self, &str) -> Result<R>) -> Result<R> {
        if self.get(key).is_none() { Ok(default) } else { read(self, key) }
    }

    /// A non-negative integer.
    pub fn usize(&self, key: &str) -> Result<usize> {
        self.need(key, "a non-negative integer", self.get(key).and_then(as_usize))
    }

    /// A positive integer.
    pub fn positive(&self, key: &str) -> Result<usize> {
        self.need(key, "a positive integer", self.get(key).and_then(as_usize).filter(|&n| n > 0))
    }

    /// A number.
    pub fn f64(&self, key: &str) -> Result<f64> {
        self.need(key, "a number", self.get(key).and_then(Value::as_f64))
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.need(key, "true or false", self.get(key).and_then(Value::as_bool))
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<&str> {
        self.need(key, "a string", self.get(key).and_then(Value::as_str))
    }

    /// One of a few strings.
    pub fn choice<'a>(&'a self, key: &str, among: &[&str]) -> Result<&'a str> {
        let found = self.str(key)?;
        if among.contains(&found) { Ok(found) } else { Err(Error::config(key, format!("expected one of {among:?}, found \"{found}\""))) }
    }

    /// A list of non-negative integers.
    pub fn usizes(&self, key: &str) -> Result<Vec<usize>> {
        let list = self.get(key).and_then(Value::as_array).and_then(|list| list.iter().map(as_usize).collect());
        self.need(key, "a list of non-negative integers", list)
    }

    /// A list of numbers.
    pub fn f64s(&self, key: &str) -> Result<Vec<f64>> {
        let list = self.get(key).and_then(Value::as_array).and_then(|list| list.iter().map(Value::as_f64).collect());
        self.need(key, "a list of numbers", list)
    }

    /// `[rows, columns]`, or one integer for both.
    pub fn pair(&self, key: &str) -> Result<[usize; 2]> {
        let pair = match self.get(key) {
            Some(Value::Array(list)) if list.len() == 2 => as_usize(&list[0]).zip(as_usize(&list[1])).map(|(a, b)| [a, b]),
            Some(one) => as_usize(one).map(|n| [n, n]),
            None => None,
        };
        self.need(key, "an integer or [rows, columns]", pair)
    }

    /// A non-negative integer, or `default` where the key is absent or `null`.
    pub fn usize_or(&self, key: &str, default: usize) -> Result<usize> {
        self.optional(key, default, Self::usize)
    }

    /// A number, or `default`.
    pub fn f64_or(&self, key: &str, default: f64) -> Result<f64> {
        self.optional(key, default, Self::f64)
    }

    /// A truth value, or `default`.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        self.optional(key, default, Self::bool)
    }

    /// A string, or `default`.
    pub fn str_or<'a>(&'a self, key: &str, default: &'a str) -> Result<&'a str> {
        if self.get(key).is_none() { Ok(default) } else { self.str(key) }
    }
}

fn as_usize(value: &Value) -> Option<usize> {
    // JSON writers of other languages may turn 4 into 4.0.
    value.as_u64().or_else(|| value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..9e15).contains(x)).map(|x| x as u64)).map(|n| n as usize)
}
