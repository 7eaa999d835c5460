//! Published weights: a state_dict in a safetensors file, by name, through a memory map.
//!
//! Every tensor must be used and every parameter filled, or the error lists what is missing, unexpected or of the wrong shape.

use std::collections::BTreeMap;

use super::zoo::Model;
use crate::case::Config;
use crate::error::Result;
use crate::nn::{Checkpoint, Entry, Params};
use crate::tensor::{Shape, Tensor};

/// What a published name becomes.
pub enum Key {
    /// The same name.
    Keep,
    /// Our name for it.
    Rename(String),
    /// Not wanted: a constant that karat computes, a counter.
    Drop,
}

/// The tensor for another image size: `resize(name, tensor, wanted shape, configuration)`, `None` if `name` is no table of positions.
pub type Resize = fn(&str, &Tensor<f32>, Shape, &Config) -> Result<Option<Tensor<f32>>>;

/// How the state_dicts of an architecture become karat's parameters.
pub struct Rules {
    /// Renames, where timm and the authors differ.
    pub key: fn(&str) -> Key,
    /// Tables of positions for another image size.
    pub resize: Resize,
    /// Names of the classifiers' modules: what `--new-head` leaves out.
    pub heads: &'static [&'static str],
}

/// Keeps every name.
pub fn keep(_: &str) -> Key {
    Key::Keep
}

/// Nothing depends on the image size.
pub fn fixed(_: &str, _: &Tensor<f32>, _: Shape, _: &Config) -> Result<Option<Tensor<f32>>> {
    Ok(None)
}

/// What [`load`] did beside copying.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Tensors resized for the image size.
    pub resized: Vec<String>,
    /// Tensors of the file that were not wanted.
    pub dropped: Vec<String>,
    /// Parameters that stay as they were initialised: the new head.
    pub fresh: Vec<String>,
}

/// Names in an error: the first few, and how many more.
const SHOWN: usize = 5;

/// Fills `params` from `file`; with `new_head`, the classifiers stay as they are.
///
/// # Errors
/// One that lists the tensors that are missing, unexpected, or of the wrong shape; `params` may then be partly filled.
pub fn load(file: &Checkpoint, model: &Model, params: &mut Params<f32>, new_head: bool) -> Result<Loaded> {
    let rules = &model.family.rules;
    let is_head = |name: &str| rules.heads.iter().any(|head| name.strip_prefix(head).is_some_and(|rest| rest.starts_with('.')));
    let mut loaded = Loaded::default();
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    for published in file.names() {
        let name = match (rules.key)(&published) {
            Key::Keep => published.clone(),
            Key::Rename(name) => name,
            Key::Drop => {
                loaded.dropped.push(published);
                continue;
            }
        };
        if let Some(other) = found.insert(name.clone(), published.clone()) {
            return Err(file.error(format!("tensors `{other}` and `{published}` are both `{name}`")));
        }
    }
    let layout = params.layout().clone();
    let (mut missing, mut wrong) = (Vec::new(), Vec::new());
    let entries = layout.params().iter().map(|e| (e, false)).chain(layout.buffers().iter().map(|e| (e, true)));
    for (entry, is_buffer) in entries {
        let Entry { name, param, .. } = entry;
        let published = found.remove(name);
        if new_head && is_head(name) {
            loaded.dropped.extend(published);
            loaded.fresh.push(name.clone());
            continue;
        }
        let Some(published) = published else {
            missing.push(name.clone());
            continue;
        };
        let mut tensor = file.tensor(&published)?;
        if tensor.shape() != param.shape() {
            match (rules.resize)(name, &tensor, param.shape(), &model.config)? {
                Some(resized) => {
                    loaded.resized.push(name.clone());
                    tensor = resized;
                }
                None => {
                    wrong.push(format!("{published} {:?} (expected {:?})", tensor.shape(), param.shape()));
                    continue;
                }
            }
        }
        params.load(entry, is_buffer, &tensor)?;
    }
    let unexpected: Vec<String> = found.into_values().collect();
    let lists = [("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong)];
    let complaints: Vec<String> = lists.iter().filter(|(_, names)| !names.is_empty()).map(|(what, names)| listed(what, names)).collect();
    if complaints.is_empty() {
        return Ok(loaded);
    }
    let name = model.variant.name;
    let advice = if lists[2].1.iter().any(|wrong| is_head(wrong)) {
        "; --classes N for a classifier of N classes, --new-head to leave it out"
    } else {
        ""
    };
    Err(file.error(format!("not the weights of `{name}`: {}{advice}", complaints.join("; "))))
}

fn listed(what: &str, names: &[String]) -> String {
    let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
    format!("{} {what}: {}{more}", names.len(), names[..names.len().min(SHOWN)].join(", "))
}
