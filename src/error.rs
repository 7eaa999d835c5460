//! One error type for the whole crate: every message names the thing that is wrong and what was expected.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// What every fallible function of karat returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can be wrong with what a caller handed in.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has another shape than the operation needs.
    Shape {
        /// The tensor or operand.
        what: String,
        /// The shape or rule that was expected.
        expected: String,
        /// The shape that was found.
        found: String,
    },
    /// A configuration key is missing, of the wrong type, or has a value that cannot be served.
    Config {
        /// The key.
        key: String,
        /// What is wrong and what was expected.
        message: String,
    },
    /// An input value (not a shape, not a key) breaks a rule of the operation.
    Value {
        /// The input.
        what: String,
        /// What is wrong and what was expected.
        message: String,
    },
    /// A tensor that has to be there is not.
    Missing {
        /// The tensor.
        what: String,
    },
    /// The operating system refused to read or write.
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file was read but is not what it should be.
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong and what was expected.
        message: String,
    },
    /// An unknown name: an operation, a model, a method, a back end.
    Unknown {
        /// The kind of thing.
        kind: &'static str,
        /// The name that was asked for.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// A command was called in a way that makes no sense.
    Usage(String),
}

impl Error {
    /// A shape error.
    pub fn shape(what: impl Into<String>, expected: impl fmt::Debug, found: impl fmt::Debug) -> Self {
        let unquote = |s: String| s.trim_matches('"').to_string();
        Error::Shape {
            what: what.into(),
            expected: unquote(format!("{expected:?}")),
            found: unquote(format!("{found:?}")),
        }
    }

    /// A configuration error.
    pub fn config(key: impl Into<String>, message: impl Into<String>) -> Self {
        Error::Config { key: key.into(), message: message.into() }
    }

    /// A value error.
    pub fn value(what: impl Into<String>, message: impl Into<String>) -> Self {
        Error::Value { what: what.into(), message: message.into() }
    }

    /// A missing tensor.
    pub fn missing(what: impl Into<String>) -> Self {
        Error::Missing { what: what.into() }
    }

    /// An operating-system error on `path`.
    pub fn io(path: impl AsRef<Path>, source: io::Error) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// A file that is not what it should be.
    pub fn format(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::Format { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// An unknown name, with the ones that exist.
    pub fn unknown<'a>(kind: &'static str, name: &str, known: impl IntoIterator<Item = &'a str>) -> Self {
        let known = known.into_iter().collect::<Vec<_>>().join(", ");
        Error::Unknown { kind, name: name.into(), known }
    }

    /// A usage error.
    pub fn usage(message: impl Into<String>) -> Self {
        Error::Usage(message.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Shape { what, expected, found } => write!(f, "{what}: expected shape {expected}, found {found}"),
            Error::Config { key, message } => write!(f, "configuration key `{key}`: {message}"),
            Error::Value { what, message } => write!(f, "{what}: {message}"),
            Error::Missing { what } => write!(f, "{what} is missing"),
            Error::Io { path, source } => write!(f, "{}: {source}", path.display()),
            Error::Format { path, message } => write!(f, "{}: {message}", path.display()),
            Error::Unknown { kind, name, known } => write!(f, "unknown {kind} `{name}`; known: {known}"),
            Error::Usage(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
