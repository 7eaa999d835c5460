//! `nn.dilate_patch_embed` and `nn.dilate_patch_merging`: DilateFormer's convolutions at the start and between stages (arXiv 2302.01791).
//!
//! Stem: convolution, BatchNorm, GELU three times, then a convolution: a quarter of the image's side; or one convolution per patch.
//! Merging: a convolution with stride 2 and BatchNorm, and sometimes `x + pos_embed(x)`, a depthwise 3×3 convolution.
//!
//! Only the outputs of convolutions are kept; BatchNorm and GELU are computed again.

use super::batch_norm::{self, BatchNorm2d, Updates};
use super::conv::{Conv2d, ConvSettings};
use super::conv_norm::{self, NormInput, Then, gelu};
use super::maps::{channels_first, channels_last};
use super::param::{Layout, Names, Params};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// A convolution with PyTorch's default initialisation.
pub fn conv(names: Names, settings: ConvSettings) -> Result<Conv2d> {
    Conv2d::new(names, settings, settings.default_init())
}

/// `x + depthwise 3×3 (x)`: a conditional position encoding.
#[derive(Clone, Debug)]
pub struct PositionConv(Conv2d);

impl PositionConv {
    /// Registers `weight` and `bias`.
    pub fn new(names: Names, channels: usize) -> Result<Self> {
        Ok(PositionConv(conv(names, ConvSettings::depthwise(channels, 3))?))
    }

    /// `x + conv(x)`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<Tensor<T>> {
        let mut y = self.0.forward(p, x)?;
        elementwise::add(y.data_mut(), x.data());
        Ok(y)
    }

    /// `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, x: &Tensor<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let mut dx = self.0.backward(p, g, x, dy)?;
        elementwise::add(dx.data_mut(), dy.data());
        Ok(dx)
    }

    /// What a forward pass on `[b, h, w]` costs.
    pub fn cost(&self, map: [usize; 3]) -> Result<Cost> {
        self.0.cost(map)
    }
}

/// Convolutions with BatchNorm and GELU in between.
#[derive(Clone, Debug)]
struct Stem {
    stages: Vec<(Conv2d, BatchNorm2d)>,
    last: Conv2d,
}

/// DilateFormer's patch embedding.
#[derive(Clone, Debug)]
pub struct DilatePatchEmbed(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Stem(Stem),
    Patches(Conv2d),
}

/// What [`DilatePatchEmbed::backward`] needs.
pub struct EmbedSaved<T: Float> {
    x: Tensor<T>,
    /// The outputs of the convolutions before a BatchNorm, and its statistics.
    stages: Vec<NormInput<T>>,
}

/// What a patch embedding is made of.
#[derive(Clone, Debug)]
pub struct EmbedSettings {
    /// Channels of the image.
    pub in_chans: usize,
    /// Width D of the first convolution; it doubles twice.
    pub hidden_dim: usize,
    /// Width of the output.
    pub embed_dim: usize,
    /// Side of a patch, for `nonoverlaping` alone.
    pub patch_size: usize,
    /// `overlaping`, `pointconv` or `nonoverlaping` (the published spelling).
    pub patch_way: String,
}

impl EmbedSettings {
    /// From a configuration.
    pub fn from_config(config: &Config) -> Result<Self> {
        Ok(EmbedSettings {
            in_chans: config.usize_or("in_chans", 3)?,
            hidden_dim: config.usize_or("hidden_dim", 16)?,
            embed_dim: config.positive("embed_dim")?,
            patch_size: config.usize_or("patch_size", 4)?,
            patch_way: config.str_or("patch_way", "overlaping")?.into(),
        })
    }
}

const EPS: f64 = 1e-5;
const MOMENTUM: f64 = 0.1;

impl DilatePatchEmbed {
    /// Registers `proj.*`.
    pub fn new(mut names: Names, settings: &EmbedSettings) -> Result<Self> {
        let EmbedSettings { in_chans, hidden_dim: d, embed_dim, patch_size, ref patch_way } = *settings;
        if d == 0 || d > 1 << 20 {
            return Err(Error::config("hidden_dim", format!("expected a positive width, found {d}")));
        }
        // Side and stride of each convolution.
        let shapes = match patch_way.as_str() {
            "overlaping" => [(3, 1), (3, 2), (3, 1), (3, 2)],
            "pointconv" => [(3, 2), (1, 1), (3, 2), (1, 1)],
            "nonoverlaping" => {
                let settings = ConvSettings { stride: [patch_size; 2], ..ConvSettings::new(in_chans, embed_dim, patch_size) };
                return Ok(DilatePatchEmbed(Kind::Patches(conv(names.at("proj"), settings)?)));
            }
            other => {
                let expected = "expected \"overlaping\", \"pointconv\" or \"nonoverlaping\"";
                return Err(Error::config("patch_way", format!("{expected}, found \"{other}\"")));
            }
        };
        let widths = [in_chans, d, 2 * d, 4 * d, embed_dim];
        let mut proj = names.at("proj");
        let settings = |i: usize| {
            let (side, stride) = shapes[i];
            let new = ConvSettings::new(widths[i], widths[i + 1], side);
            ConvSettings { stride: [stride; 2], padding: [side / 2; 2], bias: false, ..new }
        };
        let mut stages = Vec::new();
        for i in 0..3 {
            let conv = conv(proj.at((3 * i).to_string()), settings(i))?;
            stages.push((conv, BatchNorm2d::new(proj.at((3 * i + 1).to_string()), widths[i + 1], EPS, MOMENTUM)));
        }
        let last = conv(proj.at("9"), settings(3))?;
        Ok(DilatePatchEmbed(Kind::Stem(Stem { stages, last })))
    }

    /// `[B, H, W, in]` → `[B, H', W', E]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>, training: bool) -> Result<(Tensor<T>, EmbedSaved<T>)> {
        match &self.0 {
            Kind::Patches(conv) => Ok((conv.forward(p, &x)?, EmbedSaved { x, stages: Vec::new() })),
            Kind::Stem(stem) => {
                let (mut active, mut stages) = (x.clone(), Vec::new());
                for (conv, norm) in &stem.stages {
                    let (y, saved) = conv_norm::forward((conv, p), (norm, p), &active, training, Then::Gelu)?;
                    stages.push(saved);
                    active = y;
                }
                Ok((stem.last.forward(p, &active)?, EmbedSaved { x, stages }))
            }
        }
    }

    /// `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: EmbedSaved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let (first, x, d) = self.backward_to_first(p, g, saved, dy)?;
        first.backward(p, g, &x, &d)
    }

    /// The gradients of the parameters alone.
    pub fn backward_params<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: EmbedSaved<T>, dy: &Tensor<T>) -> Result<()> {
        let (first, x, d) = self.backward_to_first(p, g, saved, dy)?;
        first.backward_params(g, &x, &d)
    }

    /// The first convolution, its input and the gradient of its output.
    fn backward_to_first<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: EmbedSaved<T>,
        dy: &Tensor<T>,
    ) -> Result<(&Conv2d, Tensor<T>, Tensor<T>)> {
        let EmbedSaved { x, mut stages } = saved;
        let stem = match &self.0 {
            Kind::Patches(conv) => return Ok((conv, x, dy.clone())),
            Kind::Stem(stem) => stem,
        };
        let (mut d, mut conv) = (dy.clone(), &stem.last);
        for (before, norm) in stem.stages.iter().rev() {
            let Some((h, saved)) = stages.pop() else { break };
            let normed = norm.again(p, &h, &saved, false);
            d = conv.backward(p, g, &gelu(&normed), &d)?;
            elementwise::gelu_backward(d.data_mut(), normed.data(), T::ONE);
            drop(normed);
            d = norm.backward(p, g, &h, &saved, &d)?;
            conv = before;
        }
        Ok((conv, x, d))
    }

    /// What a forward pass on `[b, h, w]` costs, and the size of its output.
    pub fn cost(&self, [b, mut h, mut w]: [usize; 3], training: bool) -> Result<(Cost, [usize; 2])> {
        let (stages, last) = match &self.0 {
            Kind::Patches(conv) => (&[][..], conv),
            Kind::Stem(stem) => (&stem.stages[..], &stem.last),
        };
        let mut cost = Cost::default();
        for (conv, norm) in stages {
            let statistics = Cost { flops: 0, activation_bytes: norm.saved_bytes(training) };
            cost = cost + conv.cost([b, h, w])? + statistics;
            [h, w] = conv.output_size([h, w])?;
        }
        Ok((cost + last.cost([b, h, w])?, last.output_size([h, w])?))
    }
}

impl<T: Float> EmbedSaved<T> {
    /// Takes the running statistics after the call.
    pub fn take_updates(&mut self) -> Updates<T> {
        self.stages.iter_mut().flat_map(|(_, saved)| saved.take_updates()).collect()
    }
}

/// DilateFormer's patch merging.
#[derive(Clone, Debug)]
pub struct DilateMerging {
    conv: Conv2d,
    norm: BatchNorm2d,
    pos_embed: Option<PositionConv>,
}

/// What [`DilateMerging::backward`] needs.
pub struct MergingSaved<T: Float> {
    x: Tensor<T>,
    h: Tensor<T>,
    norm: batch_norm::Saved<T>,
}

impl<T: Float> MergingSaved<T> {
    /// Takes the running statistics after the call.
    pub fn take_updates(&mut self) -> Updates<T> {
        self.norm.take_updates()
    }
}

impl DilateMerging {
    /// Registers `proj.0`, `proj.1` and, with `cpe`, `pos_embed`. `way` is `conv3_2` or `conv2_2`; the poolings that the published code
    /// names do not run there.
    pub fn new(mut names: Names, inputs: usize, outputs: usize, way: &str, cpe: bool) -> Result<Self> {
        let (side, padding) = match way {
            "conv3_2" => (3, 1),
            "conv2_2" => (2, 0),
            other => return Err(Error::config("merging_way", format!("expected \"conv3_2\" or \"conv2_2\", found \"{other}\""))),
        };
        let settings = ConvSettings { stride: [2; 2], padding: [padding; 2], ..ConvSettings::new(inputs, outputs, side) };
        let mut proj = names.at("proj");
        let conv = conv(proj.at("0"), settings)?;
        let norm = BatchNorm2d::new(proj.at("1"), outputs, EPS, MOMENTUM);
        let pos_embed = if cpe { Some(PositionConv::new(names.at("pos_embed"), outputs)?) } else { None };
        Ok(DilateMerging { conv, norm, pos_embed })
    }

    /// `[B, H, W, Ci]` → `[B, H', W', Co]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>, training: bool) -> Result<(Tensor<T>, MergingSaved<T>)> {
        let (mut y, (h, norm)) = conv_norm::forward((&self.conv, p), (&self.norm, p), &x, training, Then::Identity)?;
        if let Some(pos_embed) = &self.pos_embed {
            y = pos_embed.forward(p, &y)?;
        }
        Ok((y, MergingSaved { x, h, norm }))
    }

    /// `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: MergingSaved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let MergingSaved { x, h, norm } = saved;
        let mut d = dy.clone();
        if let Some(pos_embed) = &self.pos_embed {
            d = pos_embed.backward(p, g, &self.norm.again(p, &h, &norm, false), &d)?;
        }
        d = self.norm.backward(p, g, &h, &norm, &d)?;
        self.conv.backward(p, g, &x, &d)
    }

    /// What a forward pass on `[b, h, w]` costs, and the size of its output.
    pub fn cost(&self, [b, h, w]: [usize; 3], training: bool) -> Result<(Cost, [usize; 2])> {
        let [oh, ow] = self.conv.output_size([h, w])?;
        // The convolution's output and the norm's, or what the position encoding makes of it.
        let mut cost = self.conv.cost([b, h, w])?;
        cost.activation_bytes = 2 * cost.activation_bytes + self.norm.saved_bytes(training);
        if let Some(pos_embed) = &self.pos_embed {
            cost.flops += pos_embed.cost([b, oh, ow])?.flops;
        }
        Ok((cost, [oh, ow]))
    }
}

/// `nn.dilate_patch_embed`.
pub struct PatchEmbedOp;

impl PatchEmbedOp {
    fn layer(names: &mut Names, config: &Config) -> Result<DilatePatchEmbed> {
        DilatePatchEmbed::new(names.here(), &EmbedSettings::from_config(config)?)
    }
}

impl Operation for PatchEmbedOp {
    const NAME: &'static str = "nn.dilate_patch_embed";
    const PAPER: &'static str = "2302.01791 DilateFormer";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("in_chans", rng.between(1, 3)).set("hidden_dim", rng.between(1, 3)).set("embed_dim", rng.between(1, 6));
        config.set("patch_size", rng.between(1, 5)).set("patch_way", rng.pick(&["overlaping", "pointconv", "nonoverlaping"]));
        config.set("training", rng.chance(0.5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let batch = draw.size("batch", 1, 2);
        let shape = [batch, config.positive("in_chans")?, draw.rng.between(5, 12), draw.rng.between(5, 12)];
        draw.normal("x", shape);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, c, h, w] = inputs.dims("x")?;
        let (layer, _) = Layout::build(|names| Self::layer(names, config))?;
        let input = Cost { flops: 0, activation_bytes: 4 * b * c * h * w };
        Ok(Some(input + layer.cost([b, h, w], config.bool_or("training", false)?)?.0))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let training = run.config().bool_or("training", false)?;
        let (layer, layout) = Layout::build(|names| Self::layer(names, run.config()))?;
        let mut updates = Vec::new();
        run.unary(
            &layout,
            |p, x| {
                let (y, mut saved) = layer.forward(p, channels_last(x)?, training)?;
                updates = saved.take_updates();
                Ok((channels_first(&y)?, saved))
            },
            |p, g, saved, dy| channels_first(&layer.backward(p, g, saved, &channels_last(dy)?)?),
        )?;
        run.after_buffers(&layout, updates);
        Ok(())
    }
}

/// `nn.dilate_patch_merging`.
pub struct PatchMergingOp;

impl PatchMergingOp {
    fn layer(names: &mut Names, config: &Config) -> Result<DilateMerging> {
        let (inputs, outputs) = (config.positive("in_channels")?, config.positive("out_channels")?);
        let (way, cpe) = (config.str_or("merging_way", "conv3_2")?, config.bool_or("cpe_per_stage", false)?);
        DilateMerging::new(names.here(), inputs, outputs, way, cpe)
    }
}

impl Operation for PatchMergingOp {
    const NAME: &'static str = "nn.dilate_patch_merging";
    const PAPER: &'static str = "2302.01791 DilateFormer";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("in_channels", rng.between(1, 5)).set("out_channels", rng.between(1, 6));
        config.set("merging_way", rng.pick(&["conv3_2", "conv2_2"])).set("cpe_per_stage", rng.chance(0.5));
        config.set("training", rng.chance(0.5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let batch = draw.size("batch", 1, 3);
        let shape = [batch, config.positive("in_channels")?, draw.rng.between(4, 8), draw.rng.between(4, 8)];
        draw.normal("x", shape);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, c, h, w] = inputs.dims("x")?;
        let (layer, _) = Layout::build(|names| Self::layer(names, config))?;
        let input = Cost { flops: 0, activation_bytes: 4 * b * c * h * w };
        Ok(Some(input + layer.cost([b, h, w], config.bool_or("training", false)?)?.0))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let training = run.config().bool_or("training", false)?;
        let (layer, layout) = Layout::build(|names| Self::layer(names, run.config()))?;
        let mut updates = Vec::new();
        run.unary(
            &layout,
            |p, x| {
                let (y, mut saved) = layer.forward(p, channels_last(x)?, training)?;
                updates = saved.take_updates();
                Ok((channels_first(&y)?, saved))
            },
            |p, g, saved, dy| channels_first(&layer.backward(p, g, saved, &channels_last(dy)?)?),
        )?;
        run.after_buffers(&layout, updates);
        Ok(())
    }
}
