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
    /// Our name for it, unless the file has the tensor `unless`: there the name stays, and means another thing.
    RenameUnless {
        /// Our name.
        name: String,
        /// What the other kind of file has.
        unless: &'static str,
    },
    /// Block `part` of `parts` along the first axis of our tensor.
    Part {
        /// Our name.
        name: String,
        /// Which block, from 0.
        part: usize,
        /// How many there are.
        parts: usize,
    },
    /// A second name of our tensor, which has to agree with the first if the file has both.
    Alias(String),
    /// The same name, if the network has such a parameter; else not wanted.
    Optional,
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

/// Keeps every name but the counters of batch norms, which take no part.
pub fn without_counters(name: &str) -> Key {
    if name.ends_with(".num_batches_tracked") { Key::Drop } else { Key::Keep }
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
    let layout = params.layout().clone();
    let known = |name: &str| layout.params().iter().chain(layout.buffers()).any(|e| e.name == name);
    let published_names = file.names();
    let mut loaded = Loaded::default();
    let mut found: BTreeMap<String, Sources> = BTreeMap::new();
    for published in &published_names {
        let (name, place) = match (rules.key)(published) {
            Key::Keep => (published.clone(), Place::Part(0, 1)),
            Key::Rename(name) => (name, Place::Part(0, 1)),
            Key::RenameUnless { name, unless } => {
                let other = published_names.iter().any(|n| n == unless);
                (if other { published.clone() } else { name }, Place::Part(0, 1))
            }
            Key::Part { name, part, parts } => (name, Place::Part(part, parts)),
            Key::Alias(name) => (name, Place::Alias),
            Key::Optional if known(published) => (published.clone(), Place::Part(0, 1)),
            Key::Optional | Key::Drop => {
                loaded.dropped.push(published.clone());
                continue;
            }
        };
        if let Err(other) = found.entry(name.clone()).or_default().add(published, place) {
            return Err(file.error(format!("tensors `{other}` and `{published}` are both `{name}`")));
        }
    }
    let (mut missing, mut wrong) = (Vec::new(), Vec::new());
    let entries = layout.params().iter().map(|e| (e, false)).chain(layout.buffers().iter().map(|e| (e, true)));
    for (entry, is_buffer) in entries {
        let Entry { name, param, .. } = entry;
        let sources = found.remove(name);
        if new_head && is_head(name) {
            loaded.dropped.extend(sources.into_iter().flat_map(Sources::names));
            loaded.fresh.push(name.clone());
            continue;
        }
        let Some(sources) = sources else {
            missing.push(name.clone());
            continue;
        };
        let Some(mut tensor) = sources.read(file, &mut missing)? else { continue };
        if tensor.shape() != param.shape() {
            match (rules.resize)(name, &tensor, param.shape(), &model.config)? {
                Some(resized) => {
                    loaded.resized.push(name.clone());
                    tensor = resized;
                }
                None => {
                    let published = sources.names().next().unwrap_or_default();
                    wrong.push(format!("{published} {:?} (expected {:?})", tensor.shape(), param.shape()));
                    continue;
                }
            }
        }
        params.load(entry, is_buffer, &tensor)?;
    }
    let unexpected: Vec<String> = found.into_values().flat_map(Sources::names).collect();
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

/// Where a tensor of the file belongs in ours.
enum Place {
    /// Block of so many along the first axis.
    Part(usize, usize),
    /// All of it, once more.
    Alias,
}

/// The tensors of a file that make one of ours.
#[derive(Default)]
struct Sources {
    /// By block; all of it is one block of one.
    parts: Vec<Option<String>>,
    aliases: Vec<String>,
}

impl Sources {
    /// Takes `published`; an error with the name of the tensor whose place it is.
    fn add(&mut self, published: &str, place: Place) -> std::result::Result<(), String> {
        match place {
            Place::Alias => self.aliases.push(published.into()),
            Place::Part(part, parts) => {
                if self.parts.is_empty() {
                    self.parts.resize(parts, None);
                }
                let taken = if self.parts.len() == parts { self.parts[part].clone() } else { self.parts.iter().flatten().next().cloned() };
                if let Some(taken) = taken {
                    return Err(taken);
                }
                self.parts[part] = Some(published.into());
            }
        }
        Ok(())
    }

    /// All names in the file.
    fn names(self) -> impl Iterator<Item = String> {
        self.parts.into_iter().flatten().chain(self.aliases)
    }

    /// The tensor; none if a block is missing, which is then listed.
    fn read(&self, file: &Checkpoint, missing: &mut Vec<String>) -> Result<Option<Tensor<f32>>> {
        let mut blocks = Vec::new();
        for (i, part) in self.parts.iter().enumerate() {
            let Some(name) = part else {
                let beside = self.parts.iter().flatten().next().map_or("", String::as_str);
                missing.push(format!("block {i} of {} beside {beside}", self.parts.len()));
                return Ok(None);
            };
            blocks.push((name, file.tensor(name)?));
        }
        let mut whole = if blocks.len() > 1 { Some((blocks[0].0, joined(file, &blocks)?)) } else { blocks.pop() };
        for name in &self.aliases {
            let tensor = file.tensor(name)?;
            match &whole {
                None => whole = Some((name, tensor)),
                Some((first, other)) if other.shape() != tensor.shape() || other.data() != tensor.data() => {
                    return Err(file.error(format!("tensors `{first}` and `{name}` are one parameter, but differ")));
                }
                Some(_) => {}
            }
        }
        Ok(whole.map(|(_, tensor)| tensor))
    }
}

/// Blocks of one shape, one after another along the first axis.
fn joined(file: &Checkpoint, blocks: &[(&String, Tensor<f32>)]) -> Result<Tensor<f32>> {
    let (first, shape) = (blocks[0].0, blocks[0].1.shape());
    for (name, block) in blocks {
        if block.shape() != shape || shape.is_empty() {
            return Err(file.error(format!("tensors `{first}` {shape:?} and `{name}` {:?}: expected one shape", block.shape())));
        }
    }
    let mut whole = shape.to_vec();
    whole[0] *= blocks.len();
    let data: Vec<f32> = blocks.iter().flat_map(|(_, block)| block.data()).copied().collect();
    Tensor::new(Shape::try_new(&whole)?, &data)
}

fn listed(what: &str, names: &[String]) -> String {
    let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
    format!("{} {what}: {}{more}", names.len(), names[..names.len().min(SHOWN)].join(", "))
}
