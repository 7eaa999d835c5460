//! `model.hpvit`: a plain, MAE-pre-trained ViT as a pyramid (arXiv 2211.01785); `nn.hpvit_load` makes its parameters of the plain network's.
//!
//! The patch embedding keeps its 16×16 kernel but steps by 4 (padding 6), blocks run unchanged, and 2×2 poolings between stages halve the
//! map. Sourced from the abstract: the reuse of the weights, the stride of 4, average or convolution pooling, maps from 1/4 to 1/32. Our
//! own choices, with a switch each where another is plausible: the kernel, windows in the early stages (incomplete ones are filled with
//! zeros, which take part as keys), position tables by bicubic interpolation, the features before pooling, the pooled head.
//!
//! `z = conv(x) + pos_embed`; per stage the pre-norm blocks of ViT, the map as `feat.{s}`, pooling: the mean of what exists of a 2×2 cell, or
//! a depthwise 2×2 convolution (zeros beyond the border); `logits = head(fc_norm(mean z))`.
//!
//! Backward: a stage's gradient is that of its feature map plus what comes back through the pooling; `dpos_embed = Σ_batch dz`.

use super::network::{Built, Classifier};
use super::stack::{self, Kept};
use super::swin_ops::{mean_tokens, mean_tokens_backward};
use super::vit_block::{self, Block, BlockSettings, hidden_width};
use super::weights::{Key, Rules};
use super::zoo::{Eval, Family, Variant};
use crate::attention::softmax::Settings as AttentionSettings;
use crate::attention::window::shifted_windows;
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::attention::Groups;
use crate::kernel::resize::Axis;
use crate::kernel::{elementwise, reduce, rows};
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::resize::{PosEmbedResize, resize_map};
use crate::nn::{Conv2d, ConvSettings, DropPath, Init, LayerNorm, Layout, Linear, Names, Param, Params, Stats, xavier};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Shape, Tensor};

/// The most blocks of a network.
const MOST_BLOCKS: usize = 1024;

/// What an HPViT is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Rows and columns of the image.
    pub image_size: [usize; 2],
    /// Channels of the image.
    pub in_chans: usize,
    /// Width C of all stages.
    pub embed_dim: usize,
    /// Blocks per stage.
    pub depths: Vec<usize>,
    /// Heads.
    pub num_heads: usize,
    /// Hidden width of the MLPs over C.
    pub mlp_ratio: f64,
    /// `qkv` has a bias.
    pub qkv_bias: bool,
    /// ε of all norms.
    pub norm_eps: f64,
    /// Side of the windows of each stage; 0 is global attention.
    pub window_sizes: Vec<usize>,
    /// Blocks with global attention whatever their stage says.
    pub global_blocks: Vec<usize>,
    /// Side of the patch embedding's kernel.
    pub patch_kernel: usize,
    /// Its stride.
    pub patch_stride: usize,
    /// Pooling by convolution instead of averages.
    pub conv_pool: bool,
    /// Classes.
    pub num_classes: usize,
    /// Drop path of the last block; it grows linearly from 0 over all blocks.
    pub drop_path: f64,
}

impl Settings {
    /// From a configuration, with the sheet's defaults.
    pub fn from_config(config: &Config) -> Result<Self> {
        let depths = config.usizes("depths")?;
        let window_sizes = match config.get("window_sizes") {
            None if depths.len() == 4 => vec![14, 14, 0, 0],
            _ => config.usizes("window_sizes")?,
        };
        let pool = config.str_or("pool", "avg")?;
        if !["avg", "conv"].contains(&pool) {
            return Err(Error::config("pool", format!("expected \"avg\" or \"conv\", found \"{pool}\"")));
        }
        let s = Settings {
            image_size: config.pair("image_size")?,
            in_chans: config.usize_or("in_chans", 3)?,
            embed_dim: config.positive("embed_dim")?,
            num_heads: config.positive("num_heads")?,
            mlp_ratio: config.f64_or("mlp_ratio", 4.0)?,
            qkv_bias: config.bool_or("qkv_bias", true)?,
            norm_eps: config.f64_or("norm_eps", 1e-6)?,
            global_blocks: if config.get("global_blocks").is_none() { Vec::new() } else { config.usizes("global_blocks")? },
            patch_kernel: config.usize_or("patch_kernel", 16)?,
            patch_stride: config.usize_or("patch_stride", 4)?,
            conv_pool: pool == "conv",
            num_classes: config.positive("num_classes")?,
            drop_path: config.f64_or("drop_path_rate", 0.0)?,
            depths,
            window_sizes,
        };
        s.check()?;
        Ok(s)
    }

    fn check(&self) -> Result<()> {
        let (k, s) = (self.patch_kernel, self.patch_stride);
        if s == 0 || self.image_size.iter().any(|&side| side == 0 || !side.is_multiple_of(s)) {
            let message = format!("expected positive multiples of patch_stride {s}, found {:?}", self.image_size);
            return Err(Error::config("image_size", message));
        }
        if k < s || !(k - s).is_multiple_of(2) {
            return Err(Error::config("patch_kernel", format!("expected patch_stride {s} plus an even number, found {k}")));
        }
        if self.depths.is_empty() || self.blocks() > MOST_BLOCKS {
            return Err(Error::config("depths", format!("expected 1 to {MOST_BLOCKS} blocks in stages, found {:?}", self.depths)));
        }
        if self.window_sizes.len() != self.depths.len() {
            let message = format!("expected one for each of the {} stages, found {:?}", self.depths.len(), self.window_sizes);
            return Err(Error::config("window_sizes", message));
        }
        Ok(())
    }

    fn blocks(&self) -> usize {
        self.depths.iter().fold(0usize, |sum, &n| sum.saturating_add(n))
    }

    /// Rows and columns of tokens in the first stage.
    pub fn grid(&self) -> [usize; 2] {
        self.image_size.map(|side| side / self.patch_stride)
    }

    fn block(&self, index: usize) -> BlockSettings {
        let attention = AttentionSettings { qkv_bias: self.qkv_bias, ..AttentionSettings::new(self.embed_dim, self.num_heads) };
        let drop_path = DropPath::linear(self.drop_path, index, self.blocks());
        BlockSettings { attention, mlp_ratio: self.mlp_ratio, norm_eps: self.norm_eps, layer_scale: None, drop_path, init: xavier }
    }

    /// Whom block `i` of stage `s` attends to on a map.
    fn groups(&self, s: usize, i: usize, map: [usize; 2]) -> Result<Groups> {
        let window = if self.global_blocks.contains(&i) { 0 } else { self.window_sizes[s] };
        if window == 0 || map.iter().all(|&side| side <= window) {
            Ok(Groups::all(map[0] * map[1], map[0] * map[1]))
        } else if window > 1 << 12 {
            Err(Error::config("window_sizes", format!("expected at most 4096, found {window}")))
        } else {
            shifted_windows(map, [window; 2], [0; 2], true)
        }
    }
}

/// A plain ViT as a pyramid.
#[derive(Clone, Debug)]
pub struct Hpvit {
    settings: Settings,
    embed: Conv2d,
    positions: Param,
    stages: Vec<Vec<Block>>,
    /// Between stages, if by convolution.
    pools: Vec<Conv2d>,
    fc_norm: LayerNorm,
    head: Linear,
}

struct StageSaved<T: Float> {
    map: [usize; 2],
    groups: Vec<Groups>,
    blocks: Vec<Kept<T, vit_block::Saved<T>>>,
    /// What the pooling convolution read.
    pooled: Option<Tensor<T>>,
}

/// Logits `[B, classes]`, the feature maps `[B, H_s, W_s, C]` of all stages, and what the backward pass needs.
pub type Output<T> = (Tensor<T>, Vec<Tensor<T>>, Saved<T>);

/// What [`Hpvit::backward`] needs.
pub struct Saved<T: Float> {
    image: Tensor<T>,
    stages: Vec<StageSaved<T>>,
    mean: Tensor<T>,
    stats: Stats<T>,
    normed: Tensor<T>,
}

impl Hpvit {
    /// Registers `patch_embed.proj`, `pos_embed`, `blocks.{i}`, `pools.{s}`, `fc_norm`, `head`.
    pub fn new(names: &mut Names, settings: Settings) -> Result<Self> {
        let s = &settings;
        s.check()?;
        let (c, k) = (s.embed_dim, s.patch_kernel);
        let padding = [(k - s.patch_stride) / 2; 2];
        let proj = ConvSettings { stride: [s.patch_stride; 2], padding, ..ConvSettings::new(s.in_chans, c, k) };
        let init = Init::XavierUniform { fan_in: proj.fan_in(), fan_out: c };
        let embed = Conv2d::new(names.at("patch_embed").at("proj"), proj, init)?;
        let [rows, cols] = s.grid();
        let positions = names.param("pos_embed", Shape::try_new(&[1, rows * cols, c])?, Init::NORMAL_02);
        let (mut stages, mut pools, mut index) = (Vec::new(), Vec::new(), 0);
        for (stage, &depth) in s.depths.iter().enumerate() {
            let block = |i: usize| Block::new(&mut names.at(format!("blocks.{i}")), s.block(i));
            stages.push((index..index + depth).map(block).collect::<Result<_>>()?);
            index += depth;
            if s.conv_pool && stage + 1 < s.depths.len() {
                let pool = ConvSettings { stride: [2; 2], padding: [0; 2], ..ConvSettings::depthwise(c, 2) };
                pools.push(Conv2d::new(names.at(format!("pools.{stage}")), pool, Init::Constant(0.25))?);
            }
        }
        let fc_norm = LayerNorm::new(names.at("fc_norm"), c, s.norm_eps);
        let head = Linear::new(names.at("head"), c, s.num_classes, true, Init::Normal(2e-5));
        Ok(Hpvit { settings, embed, positions, stages, pools, fc_norm, head })
    }

    /// Logits `[B, classes]` and the feature maps `[B, H_s, W_s, C]` of all stages, of images `[B, H, W, in]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: Tensor<T>) -> Result<Output<T>> {
        let (s, c) = (&self.settings, self.settings.embed_dim);
        let [batch, height, width, _] = image.dims("image [B, H, W, C]")?;
        if [height, width] != s.image_size {
            return Err(Error::shape("image", format!("[batch, {}, {}, {}]", s.image_size[0], s.image_size[1], s.in_chans), image.shape()));
        }
        let mut map = s.grid();
        let mut z = self.embed.forward(p, &image)?.reshape([batch, map[0] * map[1], c])?;
        rows::add_table(z.data_mut(), p.get(self.positions));
        let (mut features, mut stages, mut index) = (Vec::new(), Vec::new(), 0);
        for (stage, layers) in self.stages.iter().enumerate() {
            let groups = (index..index + layers.len()).map(|i| s.groups(stage, i, map)).collect::<Result<Vec<_>>>()?;
            index += layers.len();
            let (y, blocks) = stack::forward(p, layers, z, |block, i, x| block.forward(p, x, &groups[i], None))?;
            z = y;
            let feature = z.reshape([batch, map[0], map[1], c])?;
            p.show(format!("stages.{stage}"), &feature);
            let mut saved = StageSaved { map, groups, blocks, pooled: None };
            if stage + 1 < self.stages.len() {
                let smaller = map.map(|side| side.div_ceil(2));
                let pooled = match self.pools.get(stage) {
                    None => resize_map(&feature, &Axis::tiles(map[0], 2, true), &Axis::tiles(map[1], 2, true))?,
                    Some(conv) => {
                        let even = fit(&feature, map.map(|side| side.next_multiple_of(2)))?;
                        let pooled = conv.forward(p, &even)?;
                        saved.pooled = Some(even);
                        pooled
                    }
                };
                z = pooled.reshape([batch, smaller[0] * smaller[1], c])?;
                map = smaller;
            }
            features.push(feature);
            stages.push(saved);
        }
        let mean = mean_tokens(&z)?;
        let (normed, stats) = self.fc_norm.forward(p, &mean)?;
        p.show("pooled", &normed);
        let logits = self.head.forward(p, &normed)?;
        Ok((logits, features, Saved { image, stages, mean, stats, normed }))
    }

    /// From the gradients of the logits and of the feature maps (those of the last stages, or none): adds those of the parameters;
    /// that of the image if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_logits: &Tensor<T>,
        mut d_features: Vec<Tensor<T>>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let Saved { image, stages, mean, stats, normed } = saved;
        let d_normed = self.head.backward(p, g, &normed, d_logits)?;
        let d_mean = self.fc_norm.backward(p, g, &mean, &stats, &d_normed, None)?;
        let (batch, c) = (image.shape()[0], self.settings.embed_dim);
        let mut d = Tensor::zeros([batch, 0, c]);
        for (stage, StageSaved { map, groups, blocks, pooled }) in stages.into_iter().enumerate().rev() {
            let tokens = map[0] * map[1];
            d = if stage + 1 == self.stages.len() {
                mean_tokens_backward(&d_mean, tokens)?
            } else {
                let dy = d.reshape([batch, map[0].div_ceil(2), map[1].div_ceil(2), c])?;
                let dx = match (self.pools.get(stage), pooled) {
                    (Some(conv), Some(even)) => fit(&conv.backward(p, g, &even, &dy)?, map)?,
                    _ => resize_map(&dy, &Axis::tiles(map[0], 2, true).transposed(), &Axis::tiles(map[1], 2, true).transposed())?,
                };
                dx.reshape([batch, tokens, c])?
            };
            if let Some(of_feature) = d_features.pop() {
                elementwise::add(d.data_mut(), of_feature.data());
            }
            d = stack::backward(
                &self.stages[stage],
                blocks,
                d,
                |block, i, x| block.forward(p, x, &groups[i], None),
                |block, i, saved, d| block.backward(p, g, saved, &groups[i], None, d),
            )?;
        }
        reduce::add_column_sums(g.get_mut(self.positions), d.data());
        let [rows, cols] = self.settings.grid();
        let d = d.reshape([batch, rows, cols, c])?;
        if want_image {
            self.embed.backward(p, g, &image, &d).map(Some)
        } else {
            self.embed.backward_params(g, &image, &d)?;
            Ok(None)
        }
    }
}

impl Classifier for Hpvit {
    type Saved = Saved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Saved<f32>)> {
        let (logits, _, saved) = self.forward(p, channels_last(images)?)?;
        Ok((vec![logits], saved))
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Saved<f32>, d: &[Tensor<f32>]) -> Result<()> {
        self.backward(p, g, saved, &d[0], Vec::new(), false).map(drop)
    }
}

/// `[B, H, W, C]` with zeros added, or rows and columns cut off, at the bottom and the right.
fn fit<T: Float>(x: &Tensor<T>, [rows, cols]: [usize; 2]) -> Result<Tensor<T>> {
    let [b, h, w, c] = x.dims("map [B, H, W, C]")?;
    if [h, w] == [rows, cols] {
        return Ok(x.clone());
    }
    let mut y = Tensor::zeros([b, rows, cols, c]);
    let (both, len) = (h.min(rows), w.min(cols) * c);
    for (i, out) in y.data_mut().chunks_exact_mut(cols * c).enumerate().filter(|(i, _)| i % rows < both) {
        let from = (i / rows * h + i % rows) * w * c;
        out[..len].copy_from_slice(&x.data()[from..from + len]);
    }
    Ok(y)
}

/// Multiply-adds for one image: the embedding, linear maps, and attention's two products over padded windows.
fn macs(config: &Config, _: usize) -> Result<f64> {
    let s = Settings::from_config(config)?;
    let (c, mut map) = (s.embed_dim, s.grid());
    let mut macs = map[0] * map[1] * c * s.in_chans * s.patch_kernel.pow(2);
    let (hidden, mut index) = (hidden_width(c, s.mlp_ratio)?, 0);
    for (stage, &depth) in s.depths.iter().enumerate() {
        for i in index..index + depth {
            let n = map[0] * map[1];
            let window = if s.global_blocks.contains(&i) { 0 } else { s.window_sizes[stage] };
            let (padded, keys) = match window == 0 || map.iter().all(|&side| side <= window) {
                true => (n, n),
                false => (map.iter().map(|side| side.next_multiple_of(window)).product(), window * window),
            };
            macs += n * c * (4 * c + 2 * hidden) + 2 * padded * keys * c;
        }
        index += depth;
        map = map.map(|side| side.div_ceil(2));
    }
    Ok((macs + c * s.num_classes) as f64)
}

/// Names of a plain ViT that MAE pre-trained or timm trained: the blocks are its own, class token, final norm and decoder are not
/// wanted. What it has not (`fc_norm`, convolution pooling) must be in the file: [`hpvit_load`](super::hpvit_load) makes it.
fn key(name: &str) -> Key {
    match name {
        "cls_token" | "mask_token" | "norm.weight" | "norm.bias" => Key::Drop,
        _ if name.starts_with("decoder_") => Key::Drop,
        _ => Key::Keep,
    }
}

/// The table of a plain ViT, with its class token's row, or of another image size, for the grid of the configuration.
fn resize(name: &str, table: &Tensor<f32>, wanted: Shape, config: &Config) -> Result<Option<Tensor<f32>>> {
    if name != "pos_embed" {
        return Ok(None);
    }
    let ([one, rows, c], [_, _, wanted_c]) = (table.dims::<3>("pos_embed")?, wanted.dims::<3>("pos_embed")?);
    let side = |n: usize| Some(n.isqrt()).filter(|side| *side > 0 && side * side == n);
    let found = side(rows).map(|old| (0, old)).or_else(|| rows.checked_sub(1).and_then(side).map(|old| (1, old)));
    match found {
        Some((prefix, old)) if one == 1 && c == wanted_c => {
            PosEmbedResize::new(prefix, false, [old; 2], Settings::from_config(config)?.grid())?.forward(table).map(Some)
        }
        _ => Ok(None),
    }
}

/// The construction for MAE's ViT-B and ViT-L.
pub static FAMILY: Family = Family {
    op: "model.hpvit",
    common: r#"{"in_chans": 3, "mlp_ratio": 4.0, "qkv_bias": true, "norm_eps": 1e-6, "window_sizes": [14, 14, 0, 0], "global_blocks": [],
        "patch_kernel": 16, "patch_stride": 4, "pool": "avg"}"#,
    build: |config| Built::new(|names| Hpvit::new(names, Settings::from_config(config)?)),
    at_size: |config, size| {
        config.set("image_size", size);
    },
    macs,
    rules: Rules { key, resize, heads: &["head"] },
    variants: &[
        Variant {
            name: "hpvit_base",
            also: &[],
            config: r#"{"embed_dim": 768, "depths": [2, 2, 6, 2], "num_heads": 12}"#,
            eval: Eval::IMAGENET,
            params: Some(88_824_040),
            gmacs: Some(69.1),
        },
        Variant {
            name: "hpvit_base_conv",
            also: &[],
            config: r#"{"embed_dim": 768, "depths": [2, 2, 6, 2], "num_heads": 12, "pool": "conv"}"#,
            eval: Eval::IMAGENET,
            params: Some(88_835_560),
            gmacs: Some(69.1),
        },
        Variant {
            name: "hpvit_base_global",
            also: &[],
            config: r#"{"embed_dim": 768, "depths": [2, 2, 6, 2], "num_heads": 12, "window_sizes": [0, 0, 0, 0]}"#,
            eval: Eval::IMAGENET,
            params: Some(88_824_040),
            gmacs: Some(98.8),
        },
        Variant {
            name: "hpvit_large",
            also: &[],
            config: r#"{"embed_dim": 1024, "depths": [2, 2, 18, 2], "num_heads": 16}"#,
            eval: Eval::IMAGENET,
            params: Some(307_335_144),
            gmacs: Some(151.3),
        },
        Variant {
            name: "hpvit_large_conv",
            also: &[],
            config: r#"{"embed_dim": 1024, "depths": [2, 2, 18, 2], "num_heads": 16, "pool": "conv"}"#,
            eval: Eval::IMAGENET,
            params: Some(307_350_504),
            gmacs: Some(151.3),
        },
        Variant {
            name: "hpvit_large_global",
            also: &[],
            config: r#"{"embed_dim": 1024, "depths": [2, 2, 18, 2], "num_heads": 16, "window_sizes": [0, 0, 0, 0]}"#,
            eval: Eval::IMAGENET,
            params: Some(307_335_144),
            gmacs: Some(191.0),
        },
        Variant {
            // The construction for `vit_micro`.
            name: "hpvit_micro",
            also: &[],
            config: r#"{"embed_dim": 144, "depths": [2, 2, 2], "num_heads": 6, "window_sizes": [4, 0, 0], "patch_kernel": 4, "patch_stride": 2, "weight_init": "xavier"}"#,
            eval: Eval::SMALL,
            params: None,
            gmacs: None,
        },
    ],
};

/// Random small settings; the first stage has `least` blocks at least.
pub(super) fn sample_settings(rng: &mut Rng, least: usize) -> Config {
    let (stages, heads, stride) = (rng.between(1, 3), rng.between(1, 2), rng.between(1, 3));
    let mut config = Config::default();
    config.set("image_size", vec![stride * rng.between(1, 5), stride * rng.between(1, 5)]).set("in_chans", rng.between(1, 3));
    config.set("embed_dim", heads * rng.between(2, 3)).set("num_heads", heads).set("qkv_bias", rng.chance(0.7));
    let depths: Vec<usize> = (0..stages).map(|s| rng.between(if s == 0 { least } else { 0 }, 3_usize.div_ceil(stages))).collect();
    let windows: Vec<usize> = (0..stages).map(|_| rng.between(0, 3)).collect();
    let global: Vec<usize> = (0..depths.iter().sum()).filter(|_| rng.chance(0.2)).collect();
    config.set("depths", depths).set("window_sizes", windows).set("global_blocks", global);
    config.set("mlp_ratio", rng.range(0.5, 2.0)).set("norm_eps", 1e-6).set("pool", rng.pick(&["avg", "conv"]));
    config.set("patch_stride", stride).set("patch_kernel", stride + 2 * rng.between(0, 2)).set("num_classes", rng.between(1, 3));
    config
}

/// `model.hpvit`.
pub struct ModelHpvit;

impl Operation for ModelHpvit {
    const NAME: &'static str = "model.hpvit";
    const PAPER: &'static str = "2211.01785 HPViT";

    fn sample(rng: &mut Rng) -> Config {
        sample_settings(rng, 0)
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let ([h, w], batch) = (config.pair("image_size")?, draw.size("batch", 1, 2));
        draw.normal("x", [batch, config.positive("in_chans")?, h, w]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (model, layout) = Layout::build(|names| Hpvit::new(names, Settings::from_config(run.config())?))?;
        let p = run.params(&layout)?;
        let (logits, features, saved) = model.forward(&p, channels_last(&run.input("x")?)?)?;
        run.output("logits", &logits);
        let mut shapes = Vec::new();
        for (s, feature) in features.into_iter().enumerate() {
            let feature = channels_first(&feature)?;
            run.output(&format!("feat.{s}"), &feature);
            shapes.push(feature.shape());
        }
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let of_feature = |(s, &shape)| channels_last(&run.cotangent(&format!("feat.{s}"), shape)?);
            let d_features = shapes.iter().enumerate().map(of_feature).collect::<Result<_>>()?;
            let d_logits = run.cotangent("logits", logits.shape())?;
            if let Some(d_image) = model.backward(&p, &mut g, saved, &d_logits, d_features, true)? {
                run.grad_input("x", &channels_first(&d_image)?);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of a plain ViT loses its class token's row and is spread over the finer grid; a table of this network is resized as it is.
    #[test]
    fn positions_of_a_plain_vit() {
        let mut config = Config::parse(FAMILY.common).unwrap();
        config.set("depths", vec![1; 4]).set("embed_dim", 1).set("num_heads", 1).set("num_classes", 2).set("image_size", 16);
        let resized = |name: &str, rows: usize| {
            resize(name, &Tensor::from_fn([1, rows, 1], |i| if i == 0 { 9.0 } else { 1.0 }), [1, 16, 1].into(), &config).unwrap()
        };
        assert_eq!(resized("pos_embed", 5).unwrap().data(), [1.0; 16]);
        let own = resized("pos_embed", 4).unwrap();
        assert!(own.data()[0] > 5.0 && *own.shape() == [1, 16, 1]);
        assert!(resized("pos_embed", 7).is_none() && resized("head.bias", 4).is_none());
    }
}
