//! The pre-training methods by name. A method is one entry of [`METHODS`]: its paper, its configuration, how it is built, and the
//! networks that it serves.

use std::path::Path;

use super::MaskedModel;
use super::a2mim::A2mim;
use super::beit_pretrain::BeitPretraining;
use super::greenmim::GreenMim;
use super::mae::Mae;
use super::simmim::SimMim;
use super::um_mae::UmMae;
use crate::case::Config;
use crate::data::transform::Normalization;
use crate::error::{Error, Result};
use crate::tokenizer::image::ImageTokenizer;

/// A pre-training method.
pub struct Method {
    /// Its name on the command line.
    pub name: &'static str,
    /// The paper.
    pub paper: &'static str,
    /// The networks that it serves.
    pub networks: &'static [Network],
    /// The configuration that they share, as JSON. A method whose mask has a ratio has the key `mask_ratio`.
    common: &'static str,
    /// Sets what depends on the size of the images, in pixels.
    at_size: fn(&mut Config, usize) -> Result<()>,
    /// Predicts the codes of an image tokenizer.
    pub tokens: bool,
    /// Its encoders can drop paths.
    drops: bool,
    build: fn(&Config, Setting) -> Result<Box<dyn MaskedModel>>,
}

/// What an objective works with, beside its configuration.
struct Setting {
    tokenizer: Option<ImageTokenizer>,
    normalization: Normalization,
}

/// A network that a method serves.
pub struct Network {
    /// Its name on the command line.
    pub name: &'static str,
    /// Side of its images in pixels, as published; 32 for the small ones made for the built-in images.
    pub size: usize,
    /// Its configuration, as JSON objects of which a later one overrides.
    parts: &'static [&'static str],
}

const fn network(name: &'static str, size: usize, parts: &'static [&'static str]) -> Network {
    Network { name, size, parts }
}

const SWIN_NANO: &str = r#"{"patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}"#;
const SWIN_MICRO: &str = r#"{"patch_size": 2, "embed_dim": 48, "depths": [2, 2, 2], "num_heads": [3, 6, 12]}"#;
const SWIN_TINY: &str = r#"{"patch_size": 4, "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}"#;
const SWIN_SMALL: &str = r#"{"patch_size": 4, "embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]}"#;
const SWIN_BASE: &str = r#"{"patch_size": 4, "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}"#;
const SWIN_LARGE: &str = r#"{"patch_size": 4, "embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]}"#;

const TWINS_MICRO: &str = r#"{"encoder": "twins", "patch_size": 2, "embed_dims": [48, 96, 192], "depths": [2, 2, 2],
    "num_heads": [3, 6, 12], "mlp_ratios": [4, 4, 4], "sr_ratios": [4, 2, 1], "window_size": 4}"#;
const TWINS_LARGE: &str = r#"{"encoder": "twins", "patch_size": 4, "embed_dims": [128, 256, 512, 1024], "depths": [2, 2, 18, 2],
    "num_heads": [4, 8, 16, 32], "mlp_ratios": [4, 4, 4, 4], "sr_ratios": [8, 4, 2, 1], "window_size": 7}"#;

const VIT_MICRO: &str = r#"{"encoder": "vit", "patch_size": 4, "embed_dim": 144, "depth": 6, "num_heads": 6, "mlp_hidden": 576}"#;
const DEIT_SMALL: &str = r#"{"encoder": "vit", "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_hidden": 1536}"#;
const VIT_SMALL: &str = r#"{"encoder": "vit", "patch_size": 16, "embed_dim": 768, "depth": 8, "num_heads": 8, "mlp_hidden": 2304}"#;
const VIT_BASE: &str = r#"{"encoder": "vit", "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_hidden": 3072}"#;
const VIT_LARGE: &str = r#"{"encoder": "vit", "patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_hidden": 4096}"#;
const VIT_HUGE: &str = r#"{"encoder": "vit", "patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16, "mlp_hidden": 5120}"#;

const PVT_MICRO: &str = r#"{"encoder": "pvt", "patch_size": 2, "stride": 4, "embed_dims": [32, 64, 128], "depths": [2, 2, 2],
    "num_heads": [1, 2, 4], "mlp_ratios": [4, 4, 4], "sr_ratios": [2, 1, 1], "decoder_mlp_ratio": 4}"#;
const PVT_SMALL: &str = r#"{"encoder": "pvt", "patch_size": 4, "stride": 16, "embed_dims": [64, 128, 320, 512], "depths": [3, 4, 6, 3],
    "num_heads": [1, 2, 5, 8], "mlp_ratios": [8, 8, 4, 4], "sr_ratios": [4, 2, 1, 1], "decoder_mlp_ratio": 4}"#;
const UM_SWIN_MICRO: &str = r#"{"encoder": "swin", "stride": 4, "window_size": 4, "posmlp_dim": 32}"#;
const UM_SWIN_TINY: &str = r#"{"encoder": "swin", "stride": 16, "window_size": 8, "posmlp_dim": 32}"#;
const UM_SWIN_LARGE: &str = r#"{"encoder": "swin", "stride": 16, "window_size": 8, "posmlp_dim": 64}"#;

const RESNET_MICRO: &str = r#"{"encoder": "resnet", "block": "basic", "layers": [2, 2, 2], "stem_channels": 32, "base_channels": 32,
    "expansion": 1, "strides": [1, 2, 2], "mask_layer": 2}"#;
const RESNET_50: &str = r#"{"encoder": "resnet", "block": "bottleneck", "layers": [3, 4, 6, 3], "mask_layer": 3}"#;
const RESNET_101: &str = r#"{"encoder": "resnet", "block": "bottleneck", "layers": [3, 4, 23, 3], "mask_layer": 3}"#;
const RESNET_152: &str = r#"{"encoder": "resnet", "block": "bottleneck", "layers": [3, 8, 36, 3], "mask_layer": 3}"#;
const RESNET_200: &str = r#"{"encoder": "resnet", "block": "bottleneck", "layers": [3, 24, 36, 3], "mask_layer": 3}"#;
/// What A²MIM does otherwise with convolutions.
const A2MIM_CNN: &str = r#"{"stem_channels": 64, "base_channels": 64, "expansion": 4, "strides": [1, 2, 2, 2], "mask_gamma": true,
    "loss_mode": "focal_l1_loss", "fft_weight": 0.5, "fft_unmask_weight": 1e-3}"#;

/// For what the papers start with a deviation of 0.02: too small for these widths.
const NARROW: &str = r#"{"weight_init": "xavier"}"#;

/// Decoders: width, blocks, heads.
const DECODER_64: &str = r#"{"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 4}"#;
const DECODER_96: &str = r#"{"decoder_embed_dim": 96, "decoder_depth": 1, "decoder_num_heads": 6}"#;
const DECODER_96_2: &str = r#"{"decoder_embed_dim": 96, "decoder_depth": 2, "decoder_num_heads": 6}"#;
const DECODER_512: &str = r#"{"decoder_embed_dim": 512, "decoder_depth": 1, "decoder_num_heads": 16}"#;
const DECODER_512_2: &str = r#"{"decoder_embed_dim": 512, "decoder_depth": 2, "decoder_num_heads": 16}"#;
const DECODER_512_8: &str = r#"{"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}"#;

const GREENMIM: Method = Method {
    name: "greenmim",
    paper: "2205.13515 GreenMIM",
    // `row_major` puts every latent on its own cell, which the released code does not.
    common: r#"{"in_chans": 3, "mlp_ratio": 4, "qkv_bias": true, "qk_scale": null, "ape": false, "patch_norm": true, "norm_eps": 1e-6,
        "mask_ratio": 0.75, "norm_pix_loss": true, "decoder_order": "row_major"}"#,
    at_size: |config, size| {
        if config.get("encoder").is_none() {
            swin_window(config, size)?;
        }
        Ok(())
    },
    tokens: false,
    drops: false,
    build: |config, _| Ok(Box::new(GreenMim::new(config)?)),
    networks: &[
        network("swin_nano", 32, &[SWIN_NANO, DECODER_64]),
        network("swin_micro", 32, &[SWIN_MICRO, DECODER_96]),
        network("swin_tiny", 224, &[SWIN_TINY, DECODER_512]),
        network("swin_small", 224, &[SWIN_SMALL, DECODER_512]),
        network("swin_base", 224, &[SWIN_BASE, DECODER_512]),
        network("swin_large", 224, &[SWIN_LARGE, DECODER_512]),
        network("green_twins_micro", 32, &[TWINS_MICRO, DECODER_96]),
        network("green_twins_large", 224, &[TWINS_LARGE, DECODER_512]),
    ],
};

const MAE: Method = Method {
    name: "mae",
    paper: "2111.06377 MAE",
    common: r#"{"in_chans": 3, "mlp_ratio": 4, "norm_eps": 1e-6, "mask_ratio": 0.75, "norm_pix_loss": true}"#,
    at_size: |_, _| Ok(()),
    tokens: false,
    drops: false,
    build: |config, _| Ok(Box::new(Mae::new(config)?)),
    networks: &[
        network("vit_micro", 32, &[VIT_MICRO, DECODER_96_2]),
        network("vit_base", 224, &[VIT_BASE, DECODER_512_8]),
        network("vit_large", 224, &[VIT_LARGE, DECODER_512_8]),
        network("vit_huge", 224, &[VIT_HUGE, DECODER_512_8]),
    ],
};

/// SimMIM's plain ViT is BEiT's.
const SIMMIM_VIT: &str = r#"{"norm_eps": 1e-6, "layer_scale": true, "use_ape": false, "use_rpb": false, "use_shared_rpb": true,
    "use_mean_pooling": false}"#;

const SIMMIM: Method = Method {
    name: "simmim",
    paper: "2111.09886 SimMIM",
    common: r#"{"encoder": "swin", "in_chans": 3, "mlp_ratio": 4, "qkv_bias": true, "qk_scale": null, "ape": false, "patch_norm": true,
        "norm_eps": 1e-5, "norm_target": 0, "mask_ratio": 0.6}"#,
    at_size: |config, size| {
        let patch = config.positive("patch_size")?;
        let stride = if config.str("encoder")? == "swin" { swin_window(config, size)? } else { patch };
        config.set("encoder_stride", stride).set("mask_patch_size", coarse_patch(size, patch, stride.max(2 * patch)));
        Ok(())
    },
    tokens: false,
    drops: true,
    build: |config, _| Ok(Box::new(SimMim::new(config)?)),
    networks: &[
        network("swin_nano", 32, &[SWIN_NANO, NARROW]),
        network("swin_micro", 32, &[SWIN_MICRO, NARROW]),
        network("swin_tiny", 224, &[SWIN_TINY]),
        network("swin_small", 224, &[SWIN_SMALL]),
        network("swin_base", 224, &[SWIN_BASE]),
        network("swin_large", 224, &[SWIN_LARGE]),
        network("vit_micro", 32, &[VIT_MICRO, SIMMIM_VIT, NARROW]),
        network("vit_base", 224, &[VIT_BASE, SIMMIM_VIT]),
    ],
};

const UM_MAE: Method = Method {
    name: "um-mae",
    paper: "2205.10063 UM-MAE",
    // `block` gives every visible token its own position, which the released code does not.
    common: r#"{"in_chans": 3, "mlp_ratio": 4, "vis_mask_ratio": 0.25, "norm_pix_loss": true, "vis_pos_order": "block"}"#,
    at_size: |_, _| Ok(()),
    tokens: false,
    drops: false,
    build: |config, _| Ok(Box::new(UmMae::new(config)?)),
    networks: &[
        network("um_swin_micro", 32, &[SWIN_MICRO, UM_SWIN_MICRO, DECODER_96_2]),
        network("um_swin_tiny", 256, &[SWIN_TINY, UM_SWIN_TINY, DECODER_512_2]),
        network("um_swin_large", 256, &[SWIN_LARGE, UM_SWIN_LARGE, DECODER_512_8]),
        network("pvt_micro", 32, &[PVT_MICRO, DECODER_96_2]),
        network("pvt_small", 256, &[PVT_SMALL, DECODER_512_2]),
        network("vit_micro", 32, &[VIT_MICRO, DECODER_96_2]),
        network("vit_base", 224, &[VIT_BASE, DECODER_512_2]),
    ],
};

const A2MIM: Method = Method {
    name: "a2mim",
    paper: "2205.13943 A2MIM",
    common: r#"{"in_chans": 3, "mask_layer": 0, "mask_mode": "learnable", "replace": false, "mask_gamma": false, "fill": "mean",
        "rel_pos_bias": true, "layer_scale": true, "final_norm": true, "loss_mode": "l1_loss", "fft_weight": 0.1, "fft_focal": true,
        "fft_unmask_weight": 0, "fft_unmask_replace": "mixed", "mask_ratio": 0.6}"#,
    at_size: |config, size| {
        let (stride, cell) = if config.str("encoder")? == "vit" {
            let patch = config.positive("patch_size")?;
            (patch, patch)
        } else {
            // The stem and the pool after it halve the map twice; the mask lies on the map in front of a stage.
            let (strides, layer) = (config.usizes("strides")?, config.usize("mask_layer")?);
            (4 * strides.iter().product::<usize>(), 4 * strides.iter().take(layer).product::<usize>())
        };
        config.set("encoder_stride", stride).set("mask_patch_size", coarse_patch(size, cell, if stride > cell { cell } else { 2 * cell }));
        Ok(())
    },
    tokens: false,
    drops: true,
    build: |config, _| Ok(Box::new(A2mim::new(config)?)),
    networks: &[
        network("vit_micro", 32, &[VIT_MICRO, NARROW]),
        network("deit_small", 224, &[DEIT_SMALL]),
        network("vit_small", 224, &[VIT_SMALL]),
        network("vit_base", 224, &[VIT_BASE]),
        network("vit_large", 224, &[VIT_LARGE]),
        network("resnet_micro", 32, &[A2MIM_CNN, RESNET_MICRO]),
        network("resnet50", 224, &[A2MIM_CNN, RESNET_50]),
        network("resnet101", 224, &[A2MIM_CNN, RESNET_101]),
        network("resnet152", 224, &[A2MIM_CNN, RESNET_152]),
        network("resnet200", 224, &[A2MIM_CNN, RESNET_200]),
    ],
};

const BEIT: Method = Method {
    name: "beit",
    paper: "2106.08254 BEiT",
    // 75 of 196 patches.
    common: r#"{"in_chans": 3, "mlp_ratio": 4, "qkv_bias": true, "ln_eps": 1e-6, "layer_scale": true, "abs_pos_emb": false,
        "rel_pos_bias": false, "shared_rel_pos_bias": true, "vocab_size": 8192, "mask_ratio": 0.3826530612244898}"#,
    at_size: |config, size| {
        let (patch, dim, ratio) = (config.positive("patch_size")?, config.positive("embed_dim")?, config.f64("mask_ratio")?);
        if !(0.0..=1.0).contains(&ratio) {
            return Err(Error::config("mask_ratio", format!("expected a number from 0 to 1, found {ratio}")));
        }
        let patches = (size / patch).pow(2);
        config.set("img_h", size).set("img_w", size).set("dim", dim);
        // A block has at least 16 of 196 patches.
        config.set("num_masking_patches", (patches as f64 * ratio).round() as usize).set("min_num_patches", (16 * patches).div_ceil(196));
        Ok(())
    },
    tokens: true,
    drops: true,
    build: |config, setting| Ok(Box::new(BeitPretraining::new(config, setting.tokenizer, setting.normalization)?)),
    // Not [`NARROW`], which did worse here.
    networks: &[network("beit_micro", 32, &[VIT_MICRO]), network("beit_base", 224, &[VIT_BASE]), network("beit_large", 224, &[VIT_LARGE])],
};

/// All methods.
pub static METHODS: &[Method] = &[GREENMIM, MAE, SIMMIM, UM_MAE, A2MIM, BEIT];

/// Sets the window of a Swin to the map of its last stage (7 at 224 pixels); returns the side of a cell of that map in pixels.
fn swin_window(config: &mut Config, size: usize) -> Result<usize> {
    let cell = config.positive("patch_size")? << (config.usizes("depths")?.len() - 1);
    if size == 0 || !size.is_multiple_of(cell) {
        return Err(Error::config("image_size", format!("expected a multiple of {cell}, found {size}")));
    }
    config.set("window_size", size / cell);
    Ok(cell)
}

/// The side of a coarse mask's cells: the published 32 pixels where at least 3 × 3 of them make the image, else `small`, else one patch.
fn coarse_patch(size: usize, patch: usize, small: usize) -> usize {
    let fits = |side: &usize| size.is_multiple_of(*side) && side.is_multiple_of(patch) && size / side >= 3;
    [32, small].into_iter().find(fits).unwrap_or(patch)
}

/// The method `name`.
///
/// # Errors
/// If there is none, with the names that there are.
pub fn find(name: &str) -> Result<&'static Method> {
    METHODS.iter().find(|m| m.name == name).ok_or_else(|| Error::unknown("method", name, METHODS.iter().map(|m| m.name)))
}

impl Method {
    /// The network `name`.
    ///
    /// # Errors
    /// If the method does not serve it, with those that it does.
    pub fn network(&self, name: &str) -> Result<&'static Network> {
        self.networks.iter().find(|n| n.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.networks.iter().map(|n| n.name).collect();
            Error::config("model", format!("{} does not serve `{name}`; it serves {}", self.name, names.join(", ")))
        })
    }

    /// The network for who names none: a small one for the built-in images.
    pub fn default_network(&self) -> &'static Network {
        self.networks.iter().find(|n| n.name.ends_with("_micro")).unwrap_or(&self.networks[0])
    }

    /// The configuration for `network` on images of `image_size` pixels, as `mim.*` cases spell it, with the keys that training needs.
    ///
    /// # Errors
    /// If the network does not allow the image size, or the method's mask has no ratio to set.
    pub fn config(&self, network: &Network, image_size: usize, mask_ratio: Option<f64>) -> Result<Config> {
        let mut config = Config::parse(self.common)?;
        for part in network.parts {
            let part = Config::parse(part)?;
            for key in part.keys() {
                if let Some(value) = part.get(key) {
                    config.set(key, value.clone());
                }
            }
        }
        config.set("img_size", image_size);
        if let Some(ratio) = mask_ratio {
            if config.get("mask_ratio").is_none() {
                return Err(Error::config("mask_ratio", format!("{} hides a fixed share of the patches; leave it out", self.name)));
            }
            config.set("mask_ratio", ratio);
        }
        (self.at_size)(&mut config, image_size)?;
        Ok(config)
    }
}

/// The objective `method` on `model`; `mask_ratio` is the method's own where it is not given. A method that predicts tokens has the
/// published number of them and no tokenizer: it can be looked at, not trained.
///
/// # Errors
/// If there is no such method, it does not serve the network, or the network does not allow the image size.
pub fn build(method: &str, model: &str, image_size: usize, mask_ratio: Option<f64>) -> Result<Box<dyn MaskedModel>> {
    let method = find(method)?;
    let setting = Setting { tokenizer: None, normalization: Normalization::IMAGENET };
    (method.build)(&method.config(method.network(model)?, image_size, mask_ratio)?, setting)
}

/// [`build`], for a run: with the probability that the last block's branches are dropped, with the tokenizer in a folder, for a method that
/// predicts tokens, on images normalised by `normalization`.
///
/// # Errors
/// As [`build`]; if a tokenizer is missing, cannot be read, or is of no use to the method.
pub fn build_run(
    method: &str,
    model: &str,
    image_size: usize,
    mask_ratio: Option<f64>,
    drop_path: f64,
    tokenizer: Option<&Path>,
    normalization: Normalization,
) -> Result<Box<dyn MaskedModel>> {
    let method = find(method)?;
    let mut config = method.config(method.network(model)?, image_size, mask_ratio)?;
    if drop_path > 0.0 {
        if !method.drops {
            return Err(Error::config("drop_path", format!("{} trains without drop path; leave it out", method.name)));
        }
        config.set("drop_path_rate", drop_path);
    }
    let tokenizer = match tokenizer {
        Some(folder) if method.tokens => Some(ImageTokenizer::open(folder)?),
        Some(_) => return Err(Error::config("tokenizer", format!("{} predicts no tokens; leave it out", method.name))),
        None if method.tokens => {
            let message = format!("missing; {} predicts the codes of a tokenizer, which `karat tokenizer train` makes", method.name);
            return Err(Error::config("tokenizer", message));
        }
        None => None,
    };
    (method.build)(&config, Setting { tokenizer, normalization })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The trainable parameters of published models, and the side of a masked cell.
    #[test]
    fn published_sizes() {
        for (method, model, parameters) in [
            ("greenmim", "swin_base", 92_022_968 - 25_088),
            ("greenmim", "green_twins_large", 103_526_144 - 25_088),
            ("mae", "vit_base", 111_655_680),
            ("simmim", "swin_base", 89_892_152),
            ("simmim", "vit_base", 86_256_720),
            ("um-mae", "pvt_small", 28_522_560),
            ("um-mae", "um_swin_tiny", 35_774_346),
            ("um-mae", "um_swin_large", 223_698_612),
            ("um-mae", "vit_base", 92_742_144),
            ("a2mim", "vit_small", 48_648_192),
            ("a2mim", "vit_base", 86_504_640),
            ("a2mim", "deit_small", 22_019_040),
            ("a2mim", "resnet50", 29_804_608),
            ("a2mim", "resnet200", 68_921_408),
            ("beit", "beit_base", 91_965_776),
            ("beit", "beit_large", 311_534_016),
        ] {
            let found = find(method).unwrap();
            let size = found.network(model).unwrap().size;
            let count = build(method, model, size, None).unwrap().layout().numel();
            assert_eq!(count, parameters, "{method} {model}");
        }
        for (method, model, side) in [("simmim", "swin_base", 32), ("simmim", "swin_micro", 8), ("a2mim", "resnet50", 32)] {
            let found = find(method).unwrap();
            let network = found.network(model).unwrap();
            assert_eq!(found.config(network, network.size, None).unwrap().positive("mask_patch_size").unwrap(), side);
        }
    }

    /// Every method serves a small network, and every network is built at its size; what cannot be served is refused.
    #[test]
    fn names() {
        for method in METHODS {
            assert_eq!(method.default_network().size, 32, "{}", method.name);
            for network in method.networks.iter().filter(|n| n.size == 32) {
                let built = build(method.name, network.name, 32, None).unwrap();
                assert_eq!(built.image_shape(), (32, 3));
            }
        }
        let error = |method, model, size, ratio| build(method, model, size, ratio).err().unwrap().to_string();
        assert!(error("mae", "swin_micro", 32, None).contains("it serves vit_micro, vit_base"));
        assert!(error("mea", "swin_micro", 32, None).contains("um-mae"));
        assert!(error("um-mae", "pvt_micro", 32, Some(0.5)).contains("mask_ratio"));
        assert!(error("greenmim", "swin_micro", 30, None).contains("image_size"));
        let run = |method, model, tokenizer| build_run(method, model, 32, None, 0.0, tokenizer, Normalization::IMAGENET);
        let drops = |method, model| build_run(method, model, 32, None, 0.1, None, Normalization::IMAGENET).map(|_| ());
        assert!(drops("mae", "vit_micro").unwrap_err().to_string().contains("drop_path"));
        for (method, model) in [("simmim", "swin_micro"), ("simmim", "vit_micro"), ("a2mim", "vit_micro"), ("a2mim", "resnet_micro")] {
            drops(method, model).unwrap();
        }
        assert!(run("beit", "beit_micro", None).err().unwrap().to_string().contains("karat tokenizer train"));
        assert!(run("mae", "vit_micro", Some(Path::new("x"))).err().unwrap().to_string().contains("no tokens"));
        assert!(run("beit", "beit_micro", Some(Path::new("nowhere"))).err().unwrap().to_string().contains("nowhere"));
    }
}
