//! `block.basic` and `block.bottleneck`: the residual blocks of ResNet v1.5 (arXiv 1512.03385).
//!
//! `y = max(branch(x) + shortcut(x), 0)`. The branch is a chain of convolutions without bias, each with its BatchNorm, a ReLU between
//! them: 3×3 (stride), 3×3; or 1×1, 3×3 (stride), 1×1. The shortcut is the identity or, where width or size change, a 1×1 convolution
//! with BatchNorm.
//!
//! Kept for the backward pass: the input, what goes into each norm, the output. Normalised maps are computed again, ReLU masks are
//! read off them. Both paths' gradients are gated by `y > 0` and added.

use super::resnet::sample_sides;
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::nn::batch_norm::Updates;
use crate::nn::conv_norm::{self, NormInput, Then};
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::{BatchNorm2d, Conv2d, ConvSettings, DropPath, Layout, Names, Params, Pass};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// Which block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Two 3×3 convolutions.
    Basic,
    /// 1×1, 3×3, 1×1.
    Bottleneck,
}

impl Kind {
    /// From `"basic"` or `"bottleneck"`.
    pub fn parse(name: &str) -> Result<Kind> {
        match name {
            "basic" => Ok(Kind::Basic),
            "bottleneck" => Ok(Kind::Bottleneck),
            _ => Err(Error::config("block", format!("expected \"basic\" or \"bottleneck\", found \"{name}\""))),
        }
    }

    /// The usual ratio of a block's output width to its inner width.
    pub fn expansion(self) -> usize {
        match self {
            Kind::Basic => 1,
            Kind::Bottleneck => 4,
        }
    }
}

/// What a block is made of.
#[derive(Clone, Copy, Debug)]
pub struct BlockSettings {
    /// Which.
    pub kind: Kind,
    /// Channels in.
    pub inputs: usize,
    /// Channels out.
    pub outputs: usize,
    /// Channels out over inner channels.
    pub expansion: usize,
    /// The stride of the 3×3 convolution (the first one).
    pub stride: usize,
    /// ε and momentum of all norms.
    pub norm: [f64; 2],
    /// Probability that the branch is left out in training.
    pub drop_path: f64,
}

/// A convolution without bias and its norm.
#[derive(Clone, Debug)]
pub struct ConvNorm {
    pub(super) conv: Conv2d,
    pub(super) norm: BatchNorm2d,
}

impl ConvNorm {
    /// Registers both under their names.
    pub fn new(names: &mut Names, [conv, norm]: [&str; 2], settings: ConvSettings, [eps, momentum]: [f64; 2]) -> Result<Self> {
        let settings = ConvSettings { bias: false, ..settings };
        let conv = Conv2d::new(names.at(conv), settings, settings.kaiming())?;
        Ok(ConvNorm { conv, norm: BatchNorm2d::new(names.at(norm), settings.outputs, eps, momentum) })
    }

    /// Both in turn, or, in inference, at once.
    pub(super) fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, training: bool, then: Then) -> Result<(Tensor<T>, NormInput<T>)> {
        conv_norm::forward((&self.conv, p), (&self.norm, p), x, training, then)
    }

    /// What it costs on `[b, h, w]`, kept: what goes into the norm and its statistics; and the size of its output.
    pub fn cost(&self, [b, h, w]: [usize; 3], training: bool) -> Result<(Cost, [usize; 3])> {
        let [oh, ow] = self.conv.output_size([h, w])?;
        let norm = Cost { flops: 0, activation_bytes: self.norm.saved_bytes(training) };
        Ok((self.conv.cost([b, h, w])? + norm, [b, oh, ow]))
    }
}

/// A residual block.
#[derive(Clone, Debug)]
pub struct Block {
    branch: Vec<ConvNorm>,
    shortcut: Option<ConvNorm>,
    outputs: usize,
    drop: DropPath,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    x: Tensor<T>,
    branch: Vec<NormInput<T>>,
    shortcut: Option<NormInput<T>>,
    y: Tensor<T>,
}

impl<T: Float> Saved<T> {
    /// Takes the running statistics after the call.
    pub fn take_updates(&mut self) -> Updates<T> {
        self.branch.iter_mut().chain(&mut self.shortcut).flat_map(|(_, norm)| norm.take_updates()).collect()
    }
}

impl Block {
    /// Registers `conv1`, `bn1`, …, `downsample.0`, `downsample.1`.
    pub fn new(names: &mut Names, settings: BlockSettings) -> Result<Self> {
        let BlockSettings { kind, inputs, outputs, expansion, stride, norm, drop_path } = settings;
        if stride == 0 {
            return Err(Error::config("stride", "expected a positive integer, found 0"));
        }
        if expansion == 0 || outputs == 0 || !outputs.is_multiple_of(expansion) {
            return Err(Error::config("expansion", format!("expected a divisor of {outputs} channels, found {expansion}")));
        }
        let middle = outputs / expansion;
        let conv = |inputs, outputs, kernel, stride| ConvSettings {
            stride: [stride; 2],
            padding: [kernel / 2; 2],
            ..ConvSettings::new(inputs, outputs, kernel)
        };
        let chain = match kind {
            Kind::Basic => vec![conv(inputs, middle, 3, stride), conv(middle, outputs, 3, 1)],
            Kind::Bottleneck => vec![conv(inputs, middle, 1, 1), conv(middle, middle, 3, stride), conv(middle, outputs, 1, 1)],
        };
        let branch = (chain.into_iter().enumerate())
            .map(|(i, conv)| ConvNorm::new(names, [&format!("conv{}", i + 1), &format!("bn{}", i + 1)], conv, norm))
            .collect::<Result<_>>()?;
        let shortcut = (stride != 1 || inputs != outputs)
            .then(|| ConvNorm::new(names, ["downsample.0", "downsample.1"], conv(inputs, outputs, 1, stride), norm))
            .transpose()?;
        Ok(Block { branch, shortcut, outputs, drop: DropPath::new(names, drop_path)? })
    }

    /// Channels out.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// What the block costs on `[b, h, w]`, beside its input, and the size of its output.
    pub fn cost(&self, size: [usize; 3], training: bool) -> Result<(Cost, [usize; 3])> {
        let (mut cost, mut at) = (Cost::default(), size);
        for part in &self.branch {
            let (more, next) = part.cost(at, training)?;
            (cost, at) = (cost + more, next);
        }
        if let Some(shortcut) = &self.shortcut {
            cost = cost + shortcut.cost(size, training)?.0;
        }
        let output = 4 * at.iter().product::<usize>() * self.outputs;
        Ok((cost + Cost { flops: 0, activation_bytes: output }, at))
    }

    /// `[B, H, W, in]` → `[B, H', W', out]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>, training: bool) -> Result<(Tensor<T>, Saved<T>)> {
        if p.pass() == Pass::Infer && !training {
            let nothing = || Tensor::zeros([0]);
            return Ok((self.infer(p, &x)?, Saved { x: nothing(), branch: Vec::new(), shortcut: None, y: nothing() }));
        }
        let mut branch = Vec::with_capacity(self.branch.len());
        let mut at = None;
        for (i, part) in self.branch.iter().enumerate() {
            let then = if i + 1 < self.branch.len() { Then::Relu } else { Then::Identity };
            let (next, saved) = part.forward(p, at.as_ref().unwrap_or(&x), training, then)?;
            branch.push(saved);
            at = Some(next);
        }
        let mut y = self.drop.apply(p, at.unwrap_or_else(|| x.clone()));
        let shortcut = match &self.shortcut {
            None => {
                elementwise::add_relu(y.data_mut(), x.data(), T::ONE);
                None
            }
            Some(part) => {
                let (shortcut, saved) = part.forward(p, &x, training, Then::Identity)?;
                elementwise::add_relu(y.data_mut(), shortcut.data(), T::ONE);
                Some(saved)
            }
        };
        Ok((y.clone(), Saved { x, branch, shortcut, y }))
    }

    /// The output, where every norm is part of its convolution, and sum and ReLU are part of the last one.
    fn infer<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<Tensor<T>> {
        let run = |part: &ConvNorm, x: &Tensor<T>, residual: Option<&Tensor<T>>, then| {
            conv_norm::infer((&part.conv, p), (&part.norm, p), x, residual, then)
        };
        let shortcut = self.shortcut.as_ref().map(|part| run(part, x, None, Then::Identity)).transpose()?;
        let mut at = None;
        for (i, part) in self.branch.iter().enumerate() {
            let last = i + 1 == self.branch.len();
            at = Some(run(part, at.as_ref().unwrap_or(x), last.then_some(shortcut.as_ref().unwrap_or(x)), Then::Relu)?);
        }
        Ok(at.unwrap_or_else(|| x.clone()))
    }

    /// All gradients; returns `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, mut dy: Tensor<T>) -> Result<Tensor<T>> {
        let Saved { x, mut branch, shortcut, y } = saved;
        dy.expect_shape("gradient of a residual block", y.shape())?;
        elementwise::relu_backward(dy.data_mut(), y.data(), T::ONE);
        drop(y);
        let mut at = self.drop.apply(p, dy.clone());
        for (i, part) in self.branch.iter().enumerate().rev() {
            let Some((z, norm)) = branch.pop() else { break };
            let dz = part.norm.backward(p, g, &z, &norm, &at)?;
            drop((z, norm));
            at = match (i.checked_sub(1).map(|i| &self.branch[i]), branch.last()) {
                (Some(before), Some((z, norm))) => {
                    let input = before.norm.again(p, z, norm, true);
                    let mut dx = part.conv.backward(p, g, &input, &dz)?;
                    elementwise::relu_backward(dx.data_mut(), input.data(), T::ONE);
                    dx
                }
                _ => part.conv.backward(p, g, &x, &dz)?,
            };
        }
        match (&self.shortcut, shortcut) {
            (Some(part), Some((z, norm))) => {
                let dz = part.norm.backward(p, g, &z, &norm, &dy)?;
                let dx = part.conv.backward(p, g, &x, &dz)?;
                elementwise::add(at.data_mut(), dx.data());
            }
            _ => elementwise::add(at.data_mut(), dy.data()),
        }
        Ok(at)
    }
}

fn settings(config: &Config, kind: Kind) -> Result<BlockSettings> {
    Ok(BlockSettings {
        kind,
        inputs: config.positive("in_channels")?,
        outputs: config.positive("out_channels")?,
        expansion: if config.get("expansion").is_none() { kind.expansion() } else { config.positive("expansion")? },
        stride: config.usize_or("stride", 1)?,
        norm: [1e-5, 0.1],
        drop_path: 0.0,
    })
}

fn sample(rng: &mut Rng, kind: Kind) -> Config {
    let expansion = if kind == Kind::Basic { 1 } else { rng.between(1, 4) };
    let outputs = expansion * rng.between(1, 3);
    let mut config = Config::default();
    config.set("in_channels", if rng.chance(0.4) { outputs } else { rng.between(1, 6) }).set("out_channels", outputs);
    config.set("expansion", expansion).set("stride", rng.between(1, 2)).set("training", rng.chance(0.5));
    config
}

fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
    let batch = draw.size("batch", 1, 2);
    let [h, w] = sample_sides(draw.rng, config.bool("training")?, config.positive("stride")?, batch);
    draw.normal("x", [batch, config.positive("in_channels")?, h, w]);
    Ok(())
}

fn cost(config: &Config, shapes: &Shapes, kind: Kind) -> Result<Option<Cost>> {
    let [b, c, h, w] = shapes.dims("x")?;
    let (block, _) = Layout::build(|names| Block::new(names, settings(config, kind)?))?;
    let (cost, out) = block.cost([b, h, w], config.bool("training")?)?;
    // Input and output in both layouts.
    let bytes = 4 * (b * c * h * w + out.iter().product::<usize>() * block.outputs());
    Ok(Some(cost + Cost { flops: 0, activation_bytes: bytes }))
}

fn run<T: Float>(run: &mut Run<T>, kind: Kind) -> Result<()> {
    let training = run.config().bool("training")?;
    let (block, layout) = Layout::build(|names| Block::new(names, settings(run.config(), kind)?))?;
    let mut updates = Vec::new();
    run.unary(
        &layout,
        |p, x| {
            let (y, mut saved) = block.forward(p, channels_last(x)?, training)?;
            updates = saved.take_updates();
            Ok((channels_first(&y)?, saved))
        },
        |p, g, saved, dy| channels_first(&block.backward(p, g, saved, channels_last(dy)?)?),
    )?;
    run.after_buffers(&layout, updates);
    Ok(())
}

macro_rules! operation {
    ($(#[$doc:meta])* $name:ident, $text:literal, $kind:expr) => {
        $(#[$doc])*
        pub struct $name;

        impl Operation for $name {
            const NAME: &'static str = $text;
            const PAPER: &'static str = "1512.03385 ResNet";

            fn sample(rng: &mut Rng) -> Config {
                sample(rng, $kind)
            }

            fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
                inputs(config, draw)
            }

            fn cost(config: &Config, shapes: &Shapes) -> Result<Option<Cost>> {
                cost(config, shapes, $kind)
            }

            fn run<T: Float>(r: &mut Run<T>) -> Result<()> {
                run(r, $kind)
            }
        }
    };
}

operation!(
    /// `block.basic`.
    Basic,
    "block.basic",
    Kind::Basic
);
operation!(
    /// `block.bottleneck`.
    Bottleneck,
    "block.bottleneck",
    Kind::Bottleneck
);
