//! A pre-trained encoder in a classifier: parameters load by name.
//!
//! In checkpoints of pre-training the encoder's names may stand behind `encoder.` or `backbone.`; decoder, mask token and the like have no
//! place in a classifier and are left out. What a classifier has beyond its encoder stays as initialised: its head, and the norms around
//! pooling. A relative position table that all blocks share becomes the table of each (BEiT, arXiv 2106.08254).

use std::collections::BTreeMap;

use crate::case::Config;
use crate::error::Result;
use crate::model::weights::Loaded;
use crate::model::zoo::Model;
use crate::nn::{Checkpoint, Params};

/// BEiT's table of relative positions: of all blocks while it is pre-trained, then of each.
const SHARED_TABLE: &str = "rel_pos_bias.relative_position_bias_table";
const OWN_TABLE: &str = ".attn.relative_position_bias_table";

/// Norms outside of the blocks: methods differ in whether the encoder has one.
const NORMS: [&str; 2] = ["norm.", "fc_norm."];

/// Names in an error.
const SHOWN: usize = 3;

/// The classifier that is fine-tuned after `method` has pre-trained `model`, and what it has other than published. MAE averages the tokens
/// and norms the mean (He et al., arXiv 2111.06377, A.1); the plain ViTs of SimMIM and A²MIM are BEiT's, the latter with absolute positions
/// as well.
pub fn finetuning_network(method: &str, model: &str) -> (String, Config) {
    let mut config = Config::default();
    if method == "mae" {
        config.set("global_pool", "avg").set("fc_norm", true);
    }
    let Some(size) = model.strip_prefix("vit_").filter(|_| ["simmim", "a2mim"].contains(&method)) else {
        return (model.into(), config);
    };
    if method == "a2mim" {
        config.set("abs_pos_emb", true);
    }
    (format!("beit_{size}"), config)
}

/// What the classifier calls an encoder's tensor. Behind `backbone.` are the names of A²MIM's code base.
fn encoder_name(name: &str) -> Option<String> {
    let Some(name) = name.strip_prefix("backbone.") else { return name.strip_prefix("encoder.").map(String::from) };
    let pairs = [(".ffn.layers.0.0.", ".mlp.fc1."), (".ffn.layers.1.", ".mlp.fc2."), (".ln1.", ".norm1."), (".ln2.", ".norm2.")];
    let starts = [("layers.", "blocks."), ("ln1.", "norm."), ("patch_embed.projection.", "patch_embed.proj.")];
    let renamed = starts.iter().find_map(|(old, new)| Some(format!("{new}{}", name.strip_prefix(old)?))).unwrap_or(name.into());
    Some(pairs.iter().fold(renamed, |name, (old, new)| name.replace(old, new)))
}

/// Fills the encoder of `model` in `params` from the checkpoint of a pre-training run.
///
/// # Errors
/// If the encoder is of another architecture or size; the message says what is missing or misshapen.
pub fn transfer(file: &Checkpoint, model: &Model, params: &mut Params<f32>) -> Result<Loaded> {
    let rules = &model.family.rules;
    let fresh_by_rule = |name: &str| {
        let head = rules.heads.iter().any(|head| name.strip_prefix(head).is_some_and(|rest| rest.starts_with('.')));
        head || NORMS.iter().any(|norm| name.starts_with(norm))
    };
    let names = file.names();
    let mut found: BTreeMap<String, &str> = names.iter().map(|name| (name.clone(), name.as_str())).collect();
    found.extend(names.iter().filter_map(|name| Some((encoder_name(name)?, name.as_str()))));
    let source = |name: &str| found.get(name).or_else(|| found.get(SHARED_TABLE).filter(|_| name.ends_with(OWN_TABLE)));
    let (mut loaded, mut used) = (Loaded::default(), Vec::new());
    let (mut missing, mut wrong) = (Vec::new(), Vec::new());
    let layout = params.layout().clone();
    let entries = layout.params().iter().map(|e| (e, false)).chain(layout.buffers().iter().map(|e| (e, true)));
    for (entry, is_buffer) in entries {
        let Some(published) = source(&entry.name).filter(|_| !rules.heads.iter().any(|h| entry.name.starts_with(h))) else {
            if fresh_by_rule(&entry.name) {
                loaded.fresh.push(entry.name.clone());
            } else {
                missing.push(entry.name.clone());
            }
            continue;
        };
        let mut tensor = file.tensor(published)?;
        if tensor.shape() != entry.param.shape() {
            match (rules.resize)(&entry.name, &tensor, entry.param.shape(), &model.config)? {
                Some(resized) => {
                    loaded.resized.push(entry.name.clone());
                    tensor = resized;
                }
                None => {
                    wrong.push(format!("{published} {:?} (expected {:?})", tensor.shape(), entry.param.shape()));
                    continue;
                }
            }
        }
        params.load(entry, is_buffer, &tensor)?;
        used.push(*published);
    }
    if !missing.is_empty() || !wrong.is_empty() {
        let list = |what: &str, names: &[String]| format!("{} {what}: {}", names.len(), names[..names.len().min(SHOWN)].join(", "));
        let lists: Vec<String> =
            [("missing", &missing), ("of the wrong shape", &wrong)].iter().filter(|l| !l.1.is_empty()).map(|l| list(l.0, l.1)).collect();
        let message = format!("no pre-trained encoder of `{}` at {} pixels: {}", model.variant.name, model.size, lists.join("; "));
        return Err(file.error(message));
    }
    loaded.dropped = names.iter().filter(|name| !used.contains(&name.as_str())).cloned().collect();
    Ok(loaded)
}
