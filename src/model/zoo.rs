//! The published networks by name, each family's beside its architecture, and small ones for small images.

use super::network::{Built, weight_init};
use super::weights::Rules;
use crate::case::{self, Config};
use crate::data::Transform;
use crate::data::transform::Normalization;
use crate::error::{Error, Result};

/// The networks of one architecture.
pub struct Family {
    /// The operation that computes it, which knows paper and cost.
    pub op: &'static str,
    /// The configuration that all variants share, as JSON.
    pub common: &'static str,
    /// Builds the network.
    pub build: fn(&Config) -> Result<Built>,
    /// Sets the image size, in pixels.
    pub at_size: fn(&mut Config, usize),
    /// Multiply-adds of a forward pass over one image of so many pixels a side, as the papers count them: matrix products and
    /// convolutions in their textbook form (karat may need fewer).
    pub macs: fn(&Config, usize) -> Result<f64>,
    /// How published state_dicts become ours.
    pub rules: Rules,
    /// The networks.
    pub variants: &'static [Variant],
}

/// One published (or small) network.
pub struct Variant {
    /// timm's name, where timm has it; else the authors'.
    pub name: &'static str,
    /// Other names that it goes by.
    pub also: &'static [&'static str],
    /// The configuration beside the family's, as JSON.
    pub config: &'static str,
    /// How images are prepared.
    pub eval: Eval,
    /// Parameters with 1000 classes, where they are published: a test holds the network to them.
    pub params: Option<usize>,
    /// Multiply-adds in units of 10⁹ at the default size, likewise.
    pub gmacs: Option<f64>,
}

/// The evaluation transform: the shorter side is resized to `size / crop` (bicubic, anti-aliased), then the centre is cut out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Eval {
    /// Side of the images in pixels.
    pub size: usize,
    /// Part of the shorter side that is kept.
    pub crop: f64,
    /// Mean and deviation.
    pub normalization: Normalization,
}

impl Eval {
    /// As most networks on ImageNet: 224 pixels, 0.9.
    pub const IMAGENET: Eval = Eval { size: 224, crop: 0.9, normalization: Normalization::IMAGENET };
    /// The small networks for the built-in images: the whole image in 32 pixels.
    pub const SMALL: Eval = Eval { size: 32, crop: 1.0, normalization: Normalization::FASHION_MNIST };

    /// The same at another size.
    pub const fn at(self, size: usize) -> Eval {
        Eval { size, ..self }
    }

    /// The same with another part kept.
    pub const fn crop(self, crop: f64) -> Eval {
        Eval { crop, ..self }
    }

    /// The transform of RGB images: the shorter side becomes `⌊size / crop⌋` pixels, as in timm.
    ///
    /// # Errors
    /// If the size is 0 or too large.
    pub fn transform(&self) -> Result<Transform> {
        Transform::evaluation(self.size, 3, (self.size as f64 / self.crop).floor() as usize, self.normalization)
    }
}

/// Every family.
pub static FAMILIES: &[&Family] = &[
    &super::vit::FAMILY,
    &super::vit::DISTILLED_FAMILY,
    &super::swin::FAMILY,
    &super::xcit::FAMILY,
    &super::cait::FAMILY,
    &super::coat::FAMILY,
    &super::beit::FAMILY,
    &super::xvit::FAMILY,
    &super::coc::FAMILY,
    &super::dilateformer::FAMILY,
    &super::resnet::FAMILY,
    &super::t2t::FAMILY,
    &super::pvt_model::FAMILY,
    &super::um_swin_model::FAMILY,
    &super::hpvit::FAMILY,
    &super::gmm_vit::FAMILY,
    &super::gmm_vit::ELM_FAMILY,
    &super::vt_resnet::FAMILY,
    &super::spvit::FAMILY,
    &super::spvit_swin::FAMILY,
];

/// Every family's variants, with their family.
pub fn variants() -> impl Iterator<Item = (&'static Family, &'static Variant)> {
    FAMILIES.iter().flat_map(|family| family.variants.iter().map(|variant| (*family, variant)))
}

/// Sets `img_size`: what most architectures need to know of the image size.
pub fn img_size(config: &mut Config, size: usize) {
    config.set("img_size", size);
}

/// A network as it was asked for.
pub struct Model {
    /// Its family.
    pub family: &'static Family,
    /// Its variant.
    pub variant: &'static Variant,
    /// The whole configuration.
    pub config: Config,
    /// Side of its images in pixels.
    pub size: usize,
}

impl Model {
    /// The network `name` with so many classes, for images of `size` pixels (as published, if not given).
    ///
    /// # Errors
    /// If there is no such network, with the names that come closest.
    pub fn named(name: &str, classes: usize, size: Option<usize>) -> Result<Model> {
        let found = variants().find(|(_, v)| v.name == name || v.also.contains(&name));
        let (family, variant) = found.ok_or_else(|| Error::unknown("model", name, nearest(name)))?;
        let mut config = Config::parse(family.common)?;
        let own = Config::parse(variant.config)?;
        for key in own.keys() {
            if let Some(value) = own.get(key) {
                config.set(key, value.clone());
            }
        }
        let size = size.unwrap_or(variant.eval.size);
        (family.at_size)(&mut config, size);
        config.set("num_classes", classes);
        Ok(Model { family, variant, config, size })
    }

    /// Replaces keys of the configuration.
    pub fn set(&mut self, keys: &Config) {
        for key in keys.keys() {
            self.config.set(key, keys.get(key).cloned());
        }
    }

    /// Builds it, with the [`weight_init`] of its configuration.
    ///
    /// # Errors
    /// If the architecture does not allow the image size, or `weight_init` is not known.
    pub fn build(&self) -> Result<Built> {
        let Built { network, layout } = (self.family.build)(&self.config)?;
        Ok(Built { network, layout: weight_init(layout, &self.config)? })
    }

    /// Multiply-adds of a forward pass over one image.
    ///
    /// # Errors
    /// As [`Model::build`].
    pub fn macs(&self) -> Result<f64> {
        (self.family.macs)(&self.config, self.size)
    }

    /// The paper.
    pub fn paper(&self) -> &'static str {
        case::find(self.family.op).map_or("", |op| op.paper)
    }
}

/// The names that share the longest beginning with `name`.
fn nearest(name: &str) -> Vec<&'static str> {
    let common = |other: &str| name.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
    let best = variants().map(|(_, v)| common(v.name)).max().unwrap_or(0);
    variants().map(|(_, v)| v.name).filter(|other| common(other) == best).take(12).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Init;

    /// Narrow networks start wider than published ones, their tables and biases as those.
    #[test]
    fn weight_init() {
        let init = |name: &str, param: &str| {
            let layout = Model::named(name, 10, None).unwrap().build().unwrap().layout;
            layout.params().iter().find(|e| e.name.ends_with(param)).unwrap().init
        };
        assert_eq!(init("swin_micro", "attn.qkv.weight"), Init::XavierUniform { fan_in: 48, fan_out: 144 });
        assert_eq!(init("swin_micro", "attn.qkv.bias"), Init::ZEROS);
        assert_eq!(init("swin_micro", "relative_position_bias_table"), Init::NORMAL_02);
        assert_eq!(init("swin_tiny_patch4_window7_224", "attn.qkv.weight"), Init::NORMAL_02);
        let mut model = Model::named("cait_micro", 10, None).unwrap();
        model.config.set("weight_init", "jax");
        assert!(model.build().err().unwrap().to_string().contains("weight_init"));
    }
}
