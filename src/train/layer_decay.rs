//! Layer-wise learning rates (Clark et al., *ELECTRA*, arXiv 2003.10555; BEiT and MAE fine-tune so): the head learns at the full rate, each
//! layer before it at `decay` times the rate of the next.
//!
//! The number of a parameter's layer comes from its name and its place in the layout:
//!
//! - the **blocks** are counted 1, 2, … in the order of the layout. A block's name ends at the number, or numbers, behind a component
//!   that contains `block`: `blocks.3`, `layers.1.blocks.0`, `block2.1`, `blocks.0.1`, `cls_attn_blocks.0`;
//! - in a network without blocks the **stages** are counted: numbers behind a component that begins with `layer`, `stage` or `network`,
//!   such as `layer3.1` in a ResNet;
//! - **0** is what comes before the first block, and position tables and tokens wherever they are;
//! - what lies **between** blocks learns like the block before it;
//! - what comes after the last block, norm and head, is the **top**: the number of blocks plus 1.
//!
//! The rate of layer l is `decay^(top − l)`.

use std::collections::BTreeMap;

use crate::nn::Layout;

/// The factor on the learning rate of each parameter, by name.
pub fn layer_rates(layout: &Layout, decay: f64) -> BTreeMap<String, f64> {
    let names: Vec<&str> = layout.params().iter().map(|e| e.name.as_str()).collect();
    let mut kind = is_block as fn(&str) -> bool;
    if !names.iter().any(|name| unit(name, kind).is_some()) {
        kind = is_stage;
    }
    let mut units: Vec<&str> = Vec::new();
    let mut last = None;
    for (index, name) in names.iter().enumerate() {
        if let Some(unit) = unit(name, kind) {
            last = Some(index);
            if !units.contains(&unit) {
                units.push(unit);
            }
        }
    }
    let top = units.len() + 1;
    let mut before = 0;
    let mut rates = BTreeMap::new();
    for (index, name) in names.iter().enumerate() {
        let layer = match unit(name, kind).and_then(|unit| units.iter().position(|u| *u == unit)) {
            Some(position) => {
                before = position + 1;
                before
            }
            None if name.contains("pos_embed") || name.ends_with("_token") => 0,
            None if last.is_none_or(|last| index > last) => top,
            None => before,
        };
        // Repeated products: the same bits on every machine.
        let rate = (layer..top).fold(1.0, |rate, _| rate * decay);
        rates.insert((*name).to_string(), rate);
    }
    rates
}

fn is_block(component: &str) -> bool {
    component.contains("block") && !component.starts_with("pos_")
}

fn is_stage(component: &str) -> bool {
    ["layer", "stage", "network"].iter().any(|begin| component.starts_with(begin))
}

/// The beginning of `name` up to the numbers behind its first component of this kind.
fn unit(name: &str, kind: fn(&str) -> bool) -> Option<&str> {
    let (mut at, mut end, mut wanted) = (0, None, false);
    for component in name.split('.') {
        let number = component.bytes().all(|b| b.is_ascii_digit());
        if wanted && number {
            end = Some(at + component.len());
        } else if end.is_some() {
            break;
        }
        wanted = kind(component) || (wanted && number);
        at += component.len() + 1;
    }
    end.map(|end| &name[..end])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Init;

    /// The layer of each name, read off its rate.
    fn layers(names: &[&str]) -> Vec<usize> {
        let ((), layout) = Layout::build(|n| {
            for name in names {
                n.param(name, [1], Init::ZEROS);
            }
            Ok(())
        })
        .unwrap();
        let rates = layer_rates(&layout, 0.5);
        let top = rates.values().map(|r| -r.log2()).fold(0.0, f64::max);
        names.iter().map(|name| (top + rates[*name].log2()) as usize).collect()
    }

    #[test]
    fn names_of_many_architectures() {
        let swin = [
            "patch_embed.proj.weight",
            "layers.0.blocks.0.mlp.fc1.weight",
            "layers.0.blocks.1.norm1.bias",
            "layers.0.downsample.reduction.weight",
            "layers.1.blocks.0.norm1.bias",
            "norm.weight",
            "head.weight",
        ];
        assert_eq!(layers(&swin), [0, 1, 2, 2, 3, 4, 4]);
        let pvt =
            ["patch_embed1.proj.weight", "pos_embed1", "block1.0.a", "patch_embed2.proj.bias", "pos_embed2", "block2.0.a", "cls_token"];
        assert_eq!(layers(&pvt), [0, 0, 1, 1, 0, 2, 0]);
        let cait = [
            "cls_token",
            "pos_embed",
            "patch_embed.0.weight",
            "blocks.0.gamma_1",
            "blocks.1.mlp.0.weight",
            "blocks_token_only.0.a",
            "head.bias",
        ];
        assert_eq!(layers(&cait), [0, 0, 0, 1, 2, 3, 4]);
        let resnet = ["conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.downsample.0.weight", "fc.weight"];
        assert_eq!(layers(&resnet), [0, 1, 2, 3, 4]);
        let twins =
            ["patch_embeds.0.proj.weight", "blocks.0.0.a", "blocks.0.1.a", "pos_block.0.proj.0.weight", "blocks.1.0.mlp.0.b", "head.bias"];
        assert_eq!(layers(&twins), [0, 1, 2, 2, 3, 4]);
        let coc = ["patch_embed.proj.weight", "network.0.0.norm1.weight", "network.0.1.norm1.weight", "network.1.proj.weight", "norm.bias"];
        assert_eq!(layers(&coc), [0, 1, 2, 3, 4]);
        assert_eq!(layers(&["a.weight", "b.weight"]), [0, 0], "no blocks: the top is all there is");
    }
}
