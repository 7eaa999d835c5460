//! The objectives and the networks they serve, by name.

use serde_json::json;

use super::MaskedModel;
use super::greenmim::GreenMim;
use super::mae::Mae;
use super::simmim::SimMim;
use crate::case::Config;
use crate::error::{Error, Result};

/// A pre-training method.
pub struct Method {
    /// Its name on the command line.
    pub name: &'static str,
    /// The paper.
    pub paper: &'static str,
    /// The names of the networks that it serves.
    pub models: &'static [&'static str],
}

/// The Swin networks: name, width, depths, heads, patch side, decoder width, depth and heads (GreenMIM).
struct SwinSize {
    name: &'static str,
    embed_dim: usize,
    depths: &'static [usize],
    num_heads: &'static [usize],
    patch_size: usize,
    decoder: [usize; 3],
}

const SWIN: [&str; 6] = ["swin_nano", "swin_micro", "swin_tiny", "swin_small", "swin_base", "swin_large"];

const SWIN_SIZES: [SwinSize; 6] = [
    SwinSize { name: SWIN[0], embed_dim: 32, depths: &[2, 2], num_heads: &[2, 4], patch_size: 2, decoder: [64, 1, 4] },
    SwinSize { name: SWIN[1], embed_dim: 48, depths: &[2, 2, 2], num_heads: &[3, 6, 12], patch_size: 2, decoder: [96, 1, 6] },
    SwinSize { name: SWIN[2], embed_dim: 96, depths: &[2, 2, 6, 2], num_heads: &[3, 6, 12, 24], patch_size: 4, decoder: [512, 1, 16] },
    SwinSize { name: SWIN[3], embed_dim: 96, depths: &[2, 2, 18, 2], num_heads: &[3, 6, 12, 24], patch_size: 4, decoder: [512, 1, 16] },
    SwinSize { name: SWIN[4], embed_dim: 128, depths: &[2, 2, 18, 2], num_heads: &[4, 8, 16, 32], patch_size: 4, decoder: [512, 1, 16] },
    SwinSize { name: SWIN[5], embed_dim: 192, depths: &[2, 2, 18, 2], num_heads: &[6, 12, 24, 48], patch_size: 4, decoder: [512, 1, 16] },
];

/// The plain ViTs of MAE: name, width, depth, heads, patch side, decoder width, depth and heads.
struct VitSize {
    name: &'static str,
    embed_dim: usize,
    depth: usize,
    num_heads: usize,
    patch_size: usize,
    decoder: [usize; 3],
}

const VIT: [&str; 4] = ["vit_micro", "vit_base", "vit_large", "vit_huge"];

const VIT_SIZES: [VitSize; 4] = [
    VitSize { name: VIT[0], embed_dim: 144, depth: 6, num_heads: 6, patch_size: 4, decoder: [96, 2, 6] },
    VitSize { name: VIT[1], embed_dim: 768, depth: 12, num_heads: 12, patch_size: 16, decoder: [512, 8, 16] },
    VitSize { name: VIT[2], embed_dim: 1024, depth: 24, num_heads: 16, patch_size: 16, decoder: [512, 8, 16] },
    VitSize { name: VIT[3], embed_dim: 1280, depth: 32, num_heads: 16, patch_size: 14, decoder: [512, 8, 16] },
];

/// All methods.
pub static METHODS: &[Method] = &[
    Method { name: "greenmim", paper: "2205.13515 GreenMIM", models: &SWIN },
    Method { name: "mae", paper: "2111.06377 MAE", models: &VIT },
    Method { name: "simmim", paper: "2111.09886 SimMIM", models: &SWIN },
];

/// The configuration of `method` on `model` for images of `image_size` pixels, as `mim.*` cases spell it.
pub fn config(method: &str, model: &str, image_size: usize, mask_ratio: Option<f64>) -> Result<Config> {
    let found =
        METHODS.iter().find(|m| m.name == method).ok_or_else(|| Error::unknown("method", method, METHODS.iter().map(|m| m.name)))?;
    if !found.models.contains(&model) {
        return Err(Error::unknown("model for this method", model, found.models.iter().copied()));
    }
    let mut config = Config::default();
    config.set("img_size", image_size).set("in_chans", 3).set("mlp_ratio", 4.0).set("qkv_bias", true);
    if let Some(size) = VIT_SIZES.iter().find(|s| s.name == model) {
        let [dim, depth, heads] = size.decoder;
        config
            .set("patch_size", size.patch_size)
            .set("embed_dim", size.embed_dim)
            .set("depth", size.depth)
            .set("num_heads", size.num_heads);
        config.set("decoder_embed_dim", dim).set("decoder_depth", depth).set("decoder_num_heads", heads);
        config.set("norm_eps", 1e-6).set("mask_ratio", mask_ratio.unwrap_or(0.75)).set("norm_pix_loss", true);
        return Ok(config);
    }
    let size = SWIN_SIZES.iter().find(|s| s.name == model).ok_or_else(|| Error::unknown("model", model, SWIN))?;
    let cell = size.patch_size << (size.depths.len() - 1);
    if image_size == 0 || !image_size.is_multiple_of(cell) {
        return Err(Error::config("image_size", format!("{model} needs a multiple of {cell}, found {image_size}")));
    }
    config.set("patch_size", size.patch_size).set("embed_dim", size.embed_dim);
    config.set("depths", json!(size.depths)).set("num_heads", json!(size.num_heads)).set("window_size", image_size / cell);
    config.set("qk_scale", json!(null)).set("ape", false).set("patch_norm", true);
    if method == "greenmim" {
        let [dim, depth, heads] = size.decoder;
        config.set("decoder_embed_dim", dim).set("decoder_depth", depth).set("decoder_num_heads", heads);
        config
            .set("norm_eps", 1e-6)
            .set("mask_ratio", mask_ratio.unwrap_or(0.75))
            .set("norm_pix_loss", true)
            .set("decoder_order", "row_major");
    } else {
        config.set("encoder", "swin").set("encoder_stride", cell).set("norm_target", 0).set("norm_eps", 1e-5);
        config.set("mask_ratio", mask_ratio.unwrap_or(0.6));
    }
    Ok(config)
}

/// The image size that a network is published at: 32 pixels for the small ones made for the built-in images, else 224.
pub fn default_image_size(model: &str) -> Result<usize> {
    let known = || SWIN.iter().chain(&VIT).copied();
    if !known().any(|name| name == model) {
        return Err(Error::unknown("model", model, known()));
    }
    Ok(if model.ends_with("_micro") || model.ends_with("_nano") { 32 } else { 224 })
}

/// The objective `method` on `model`; `mask_ratio` is the method's own where it is not given.
pub fn build(method: &str, model: &str, image_size: usize, mask_ratio: Option<f64>) -> Result<Box<dyn MaskedModel>> {
    let config = config(method, model, image_size, mask_ratio)?;
    Ok(match method {
        "greenmim" => Box::new(GreenMim::new(&config)?),
        "simmim" => Box::new(SimMim::new(&config)?),
        _ => Box::new(Mae::new(&config)?),
    })
}
