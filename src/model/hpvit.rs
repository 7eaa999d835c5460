//! `model.hpvit`: a plain, MAE-pre-trained ViT as a pyramid (arXiv 2211.01785), and `nn.hpvit_load`, which makes its parameters of the
//! plain network's.
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

use super::swin_ops::{mean_tokens, mean_tokens_backward};
use super::vit_block::{self, Block, BlockSettings};
use crate::attention::softmax::Settings as AttentionSettings;
use crate::attention::window::shifted_windows;
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::attention::Groups;
use crate::kernel::resize::Axis;
use crate::kernel::{elementwise, reduce, rows};
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::resize::{PosEmbedResize, resize_map};
use crate::nn::{Conv2d, ConvSettings, Init, LayerNorm, Layout, Linear, Names, Param, Params, Stats, xavier};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

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

    fn block(&self) -> BlockSettings {
        let attention = AttentionSettings { qkv_bias: self.qkv_bias, ..AttentionSettings::new(self.embed_dim, self.num_heads) };
        BlockSettings { attention, mlp_ratio: self.mlp_ratio, norm_eps: self.norm_eps, layer_scale: None, drop_path: 0.0, init: xavier }
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
    blocks: Vec<(vit_block::Saved<T>, Groups)>,
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
        let positions = names.param("pos_embed", crate::tensor::Shape::try_new(&[1, rows * cols, c])?, Init::NORMAL_02);
        let (mut stages, mut pools, mut index) = (Vec::new(), Vec::new(), 0);
        for (stage, &depth) in s.depths.iter().enumerate() {
            let block = |i: usize| Block::new(&mut names.at(format!("blocks.{i}")), s.block());
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
            let mut blocks = Vec::with_capacity(layers.len());
            for block in layers {
                let groups = s.groups(stage, index, map)?;
                let (y, saved) = block.forward(p, z, &groups, None)?;
                blocks.push((saved, groups));
                z = y;
                index += 1;
            }
            let feature = z.reshape([batch, map[0], map[1], c])?;
            let mut saved = StageSaved { map, blocks, pooled: None };
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
        let logits = self.head.forward(p, &normed)?;
        Ok((logits, features, Saved { image, stages, mean, stats, normed }))
    }

    /// The gradient of the image, from those of the logits and of the feature maps.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_logits: &Tensor<T>,
        mut d_features: Vec<Tensor<T>>,
    ) -> Result<Tensor<T>> {
        let Saved { image, stages, mean, stats, normed } = saved;
        let d_normed = self.head.backward(p, g, &normed, d_logits)?;
        let d_mean = self.fc_norm.backward(p, g, &mean, &stats, &d_normed, None)?;
        let (batch, c) = (image.shape()[0], self.settings.embed_dim);
        let mut d = Tensor::zeros([batch, 0, c]);
        for (stage, StageSaved { map, blocks, pooled }) in stages.into_iter().enumerate().rev() {
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
            for (block, (saved, groups)) in self.stages[stage].iter().zip(blocks).rev() {
                d = block.backward(p, g, saved, &groups, None, &d)?;
            }
        }
        reduce::add_column_sums(g.get_mut(self.positions), d.data());
        let [rows, cols] = self.settings.grid();
        self.embed.backward(p, g, &image, &d.reshape([batch, rows, cols, c])?)
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

/// Random small settings; the first stage has `least` blocks at least.
fn sample_settings(rng: &mut Rng, least: usize) -> Config {
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
            let d_image = model.backward(&p, &mut g, saved, &run.cotangent("logits", logits.shape())?, d_features)?;
            run.grad_input("x", &channels_first(&d_image)?);
            run.grad_params(&g);
        }
        Ok(())
    }
}

/// What becomes of a parameter of HPViT.
enum Source {
    /// The plain network's, unchanged.
    Copied,
    /// The plain network's table for another grid.
    Resized,
    /// The plain network's, if it is there; else this value, or none at all.
    IfThere(Option<f64>),
    /// A new layer.
    New(f64),
}

fn source(name: &str) -> Source {
    match name {
        "pos_embed" => Source::Resized,
        "fc_norm.weight" => Source::IfThere(Some(1.0)),
        "fc_norm.bias" => Source::IfThere(Some(0.0)),
        _ if name.starts_with("head.") => Source::IfThere(None),
        _ if name.starts_with("pools.") => Source::New(if name.ends_with("weight") { 0.25 } else { 0.0 }),
        _ => Source::Copied,
    }
}

/// The parameters of HPViT, by name, from those of a plain ViT. `get` returns a tensor of the checkpoint, `names` are all that it has.
/// Class and mask tokens, decoder and final norm are left out; `head` is only taken over if it fits.
pub fn load<T: Float>(settings: &Settings, names: &[&str], get: impl Fn(&str) -> Result<Tensor<T>>) -> Result<Vec<(String, Tensor<T>)>> {
    let (_, layout) = Layout::build(|names| Hpvit::new(names, settings.clone()))?;
    let known = |name: &str| layout.params().iter().any(|entry| entry.name == name);
    if let Some(extra) = names.iter().find(|name| name.starts_with("blocks.") && !known(name)) {
        let message = format!("expected the blocks of depths {:?} and no others", settings.depths);
        return Err(Error::value(format!("input `{extra}`"), message));
    }
    let fits = |name: &str, shape| names.contains(&name) && get(name).is_ok_and(|t| t.shape() == shape);
    let head = (layout.params().iter()).filter(|e| e.name.starts_with("head.")).all(|e| fits(&e.name, e.param.shape()));
    let mut out = Vec::new();
    for entry in layout.params() {
        let (name, shape) = (entry.name.as_str(), entry.param.shape());
        let there = names.contains(&name);
        let tensor = match source(name) {
            Source::New(value) => Tensor::from_fn(shape, |_| T::from_f64(value)),
            Source::IfThere(None) if !head => continue,
            Source::IfThere(Some(value)) if !there => Tensor::from_fn(shape, |_| T::from_f64(value)),
            Source::Resized => {
                let table = get(name)?;
                let [_, tokens, width] = table.dims("input `pos_embed`")?;
                let side = tokens.saturating_sub(1).isqrt();
                if side == 0 || side * side + 1 != tokens || width != settings.embed_dim {
                    let expected = format!("[1, 1 + a square number, {}]", settings.embed_dim);
                    return Err(Error::shape("input `pos_embed`", expected, table.shape()));
                }
                PosEmbedResize::new(1, false, [side; 2], settings.grid())?.forward(&table)?
            }
            Source::Copied | Source::IfThere(_) => {
                let tensor = get(name)?;
                tensor.expect_shape(&format!("input `{name}`"), shape)?;
                tensor
            }
        };
        out.push((entry.name.clone(), tensor));
    }
    Ok(out)
}

/// `nn.hpvit_load`.
pub struct HpvitLoad;

impl Operation for HpvitLoad {
    const NAME: &'static str = "nn.hpvit_load";
    const PAPER: &'static str = "2211.01785 HPViT";
    // A rule for names and shapes, not a layer: it has no gradients.

    fn sample(rng: &mut Rng) -> Config {
        // A tensor that is needed comes first: those that are left out may have any shape.
        sample_settings(rng, 1)
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let settings = Settings::from_config(config)?;
        let (_, layout) = Layout::build(|names| Hpvit::new(names, settings))?;
        let dim = config.positive("embed_dim")?;
        let [norm, classes] = [draw.rng.chance(0.5), draw.rng.chance(0.5)];
        for entry in layout.params() {
            match source(&entry.name) {
                Source::Resized => {
                    let side = draw.rng.between(1, 4);
                    draw.normal("pos_embed", [1, 1 + side * side, dim]);
                }
                Source::IfThere(Some(_)) if !norm => {}
                Source::IfThere(None) if !classes => {}
                Source::New(_) => {}
                _ => draw.normal(&entry.name, entry.param.shape()),
            }
        }
        for name in ["cls_token", "mask_token"] {
            draw.normal(name, [1, 1, dim]);
        }
        draw.normal("norm.weight", [dim]);
        draw.normal("decoder_pred.bias", [dim + 1]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config())?;
        let names = run.input_names();
        for (name, tensor) in load(&settings, &names, |name| run.input(name))? {
            run.output(&name, &tensor);
        }
        Ok(())
    }
}
