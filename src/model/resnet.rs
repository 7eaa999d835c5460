//! `model.resnet`: ResNet v1.5 (arXiv 1512.03385): 7×7 stem, maximum pool, stages of residual blocks, mean, `fc`.
//!
//! Names are torchvision's and timm's: `conv1`, `bn1`, `layer{1…}.{j}.*`, `fc`.

use super::resnet_block::{self, Block, BlockSettings, ConvNorm, Kind};
use super::swin_ops::{mean_tokens, mean_tokens_backward};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::kernel::pool::Window;
use crate::nn::batch_norm::{self, Updates};
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::pool::{max_pool, max_pool_backward};
use crate::nn::{ConvSettings, Init, Layout, Linear, Names, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The pool after the stem.
const POOL: Window = Window { kernel: 3, stride: 2, padding: 1 };
/// More blocks than any network has.
const MOST_BLOCKS: usize = 4096;

/// What a trunk is made of.
#[derive(Clone, Debug)]
pub struct TrunkSettings {
    /// Which blocks.
    pub kind: Kind,
    /// Channels of the image.
    pub chans: usize,
    /// Channels of the stem.
    pub stem: usize,
    /// Blocks of each stage.
    pub layers: Vec<usize>,
    /// Channels out of each stage.
    pub widths: Vec<usize>,
    /// Stride of the first block of each stage.
    pub strides: Vec<usize>,
    /// Channels out over inner channels.
    pub expansion: usize,
    /// ε and momentum of all norms.
    pub norm: [f64; 2],
}

/// Stem, pool and stages.
#[derive(Clone, Debug)]
pub struct Trunk {
    stem: ConvNorm,
    blocks: Vec<Block>,
    /// The first block of each stage.
    starts: Vec<usize>,
    outputs: usize,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    image: Tensor<T>,
    stem: (Tensor<T>, batch_norm::Saved<T>),
    blocks: Vec<resnet_block::Saved<T>>,
}

impl<T: Float> Saved<T> {
    /// Takes the running statistics after the call.
    pub fn take_updates(&mut self) -> Updates<T> {
        let mut updates = self.stem.1.take_updates();
        updates.extend(self.blocks.iter_mut().flat_map(resnet_block::Saved::take_updates));
        updates
    }
}

impl Trunk {
    /// Registers `conv1`, `bn1`, `layer1.0.*`, ….
    pub fn new(names: &mut Names, settings: &TrunkSettings) -> Result<Self> {
        let TrunkSettings { kind, chans, stem, layers, widths, strides, expansion, norm } = settings;
        if layers.is_empty()
            || layers.iter().any(|&n| n == 0 || n > MOST_BLOCKS)
            || widths.len() < layers.len()
            || strides.len() < layers.len()
        {
            let found = format!("{layers:?} with {} widths and {} strides", widths.len(), strides.len());
            return Err(Error::config("layers", format!("expected positive numbers of blocks, a stride for each stage, found {found}")));
        }
        let conv = ConvSettings { stride: [2; 2], padding: [3; 2], ..ConvSettings::new(*chans, *stem, 7) };
        let stem_layer = ConvNorm::new(names, ["conv1", "bn1"], conv, *norm)?;
        let (mut blocks, mut starts, mut inputs) = (Vec::new(), Vec::new(), *stem);
        for (stage, &count) in layers.iter().enumerate() {
            starts.push(blocks.len());
            for j in 0..count {
                let stride = if j == 0 { strides[stage] } else { 1 };
                let outputs = widths[stage];
                let settings = BlockSettings { kind: *kind, inputs, outputs, expansion: *expansion, stride, norm: *norm };
                blocks.push(Block::new(&mut names.at(format!("layer{}.{j}", stage + 1)), settings)?);
                inputs = outputs;
            }
        }
        Ok(Trunk { stem: stem_layer, blocks, starts, outputs: inputs })
    }

    /// Channels out.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// What the trunk costs on an image `[b, h, w]`, with the image in its own layout, and the size of its output.
    pub fn cost(&self, [b, h, w]: [usize; 3], training: bool) -> Result<(Cost, [usize; 3])> {
        let (mut cost, [_, h2, w2]) = self.stem.cost([b, h, w], training)?;
        let (Some(h4), Some(w4)) = (POOL.outputs(h2), POOL.outputs(w2)) else {
            return Err(Error::shape("image", "at least one pixel", [h, w]));
        };
        let settings = self.stem.conv.settings();
        cost.activation_bytes += 4 * b * (settings.inputs * h * w + settings.outputs * h4 * w4);
        let mut at = [b, h4, w4];
        for block in &self.blocks {
            let (more, next) = block.cost(at, training)?;
            (cost, at) = (cost + more, next);
        }
        Ok((cost, at))
    }

    /// `[B, C, H, W]` → the last map, channels last.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, training: bool) -> Result<(Tensor<T>, Saved<T>)> {
        self.forward_with(p, image, training, |_, x| Ok(x))
    }

    /// [`forward`](Self::forward) with `paint(stage, map)` between the stages: the map that goes into a stage is what it returns.
    pub fn forward_with<T: Float>(
        &self,
        p: &Params<T>,
        image: &Tensor<T>,
        training: bool,
        mut paint: impl FnMut(usize, Tensor<T>) -> Result<Tensor<T>>,
    ) -> Result<(Tensor<T>, Saved<T>)> {
        let image = channels_last(image)?;
        let z = self.stem.conv.forward(p, &image)?;
        let (a, norm) = self.stem.norm.forward_relu(p, &z, training)?;
        let mut x = max_pool(&a, POOL)?;
        drop(a);
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (i, block) in self.blocks.iter().enumerate() {
            if let Ok(stage) = self.starts.binary_search(&i) {
                x = paint(stage, x)?;
            }
            let (y, saved) = block.forward(p, x, training)?;
            blocks.push(saved);
            x = y;
            if let (Ok(stage), _) | (Err(stage), true) = (self.starts.binary_search(&(i + 1)), i + 1 == self.blocks.len()) {
                p.show(format!("stage.{}", stage - 1), &x);
            }
        }
        Ok((x, Saved { image, stem: (z, norm), blocks }))
    }

    /// All gradients; returns that of the image, `[B, C, H, W]`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, dy: Tensor<T>) -> Result<Tensor<T>> {
        self.backward_with(p, g, saved, dy, |_, _, d| Ok(d))
    }

    /// Backward of [`forward_with`](Self::forward_with): `paint_backward(grads, stage, gradient)` is the adjoint of `paint`.
    pub fn backward_with<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        dy: Tensor<T>,
        mut paint_backward: impl FnMut(&mut Params<T>, usize, Tensor<T>) -> Result<Tensor<T>>,
    ) -> Result<Tensor<T>> {
        let Saved { image, stem: (z, norm), blocks } = saved;
        let mut dx = dy;
        for (i, (block, saved)) in self.blocks.iter().zip(blocks).enumerate().rev() {
            dx = block.backward(p, g, saved, dx)?;
            if let Ok(stage) = self.starts.binary_search(&i) {
                dx = paint_backward(g, stage, dx)?;
            }
        }
        let a = self.stem.norm.again(p, &z, &norm, true);
        let mut da = max_pool_backward(&a, POOL, &dx)?;
        elementwise::relu_backward(da.data_mut(), a.data(), T::ONE);
        let dz = self.stem.norm.backward(p, g, &z, &norm, &da)?;
        channels_first(&self.stem.conv.backward(p, g, &image, &dz)?)
    }
}

/// `fc` on the mean over a map (or over tokens).
#[derive(Clone, Debug)]
pub struct MeanHead {
    fc: Linear,
}

impl MeanHead {
    /// Registers `fc`.
    pub fn new(names: &mut Names, inputs: usize, classes: usize) -> Self {
        MeanHead { fc: Linear::new(names.at("fc"), inputs, classes, true, Init::FanIn(inputs)) }
    }

    /// Logits, and the pooled features that the backward pass needs.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, Tensor<T>)> {
        let (b, c) = (x.shape()[0], x.shape()[x.shape().len() - 1]);
        let pooled = mean_tokens(&x.reshape([b, x.shape()[1..x.shape().len() - 1].iter().product(), c])?)?;
        Ok((self.fc.forward(p, &pooled)?, pooled))
    }

    /// The gradient of `x`, of shape `shape`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        pooled: &Tensor<T>,
        shape: crate::tensor::Shape,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let d_pooled = self.fc.backward(p, g, pooled, dy)?;
        mean_tokens_backward(&d_pooled, shape[1..shape.len() - 1].iter().product())?.reshape(shape)
    }

    /// Operations and bytes (pooled features and logits) for `batch` images.
    pub fn cost(&self, inputs: usize, batch: usize) -> Cost {
        let classes = self.fc.outputs();
        Cost { flops: 2 * batch * inputs * classes, activation_bytes: 4 * batch * (inputs + classes) }
    }
}

struct ResNet {
    trunk: Trunk,
    head: Option<MeanHead>,
}

impl ResNet {
    fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let trunk = Trunk::new(names, &settings(config)?)?;
        let classes = config.usize_or("num_classes", 1000)?;
        let head = (classes > 0).then(|| MeanHead::new(names, trunk.outputs(), classes));
        Ok(ResNet { trunk, head })
    }
}

/// The trunk from the keys of `model.resnet`.
pub fn settings(config: &Config) -> Result<TrunkSettings> {
    let list = |key: &str, default: [usize; 4]| if config.get(key).is_none() { Ok(default.to_vec()) } else { config.usizes(key) };
    let number = |key: &str, default: usize| if config.get(key).is_none() { Ok(default) } else { config.positive(key) };
    let kind = Kind::parse(config.str_or("block", "bottleneck")?)?;
    let expansion = number("expansion", kind.expansion())?;
    let (layers, base) = (list("layers", [3, 4, 6, 3])?, number("base_channels", 64)?);
    if !(1..=4).contains(&layers.len()) {
        return Err(Error::config("layers", format!("expected one to four stages, found {layers:?}")));
    }
    let width = base.checked_mul(expansion).filter(|&w| w < 1 << 20);
    let width =
        width.ok_or_else(|| Error::config("base_channels", format!("expected at most 2^20 channels, found {base} · {expansion}")))?;
    Ok(TrunkSettings {
        kind,
        chans: number("in_chans", 3)?,
        stem: number("stem_channels", 64)?,
        widths: (0..layers.len()).map(|i| width << i).collect(),
        layers,
        strides: list("strides", [1, 2, 2, 2])?,
        expansion,
        norm: [config.f64_or("bn_eps", 1e-5)?, config.f64_or("bn_momentum", 0.1)?],
    })
}

/// Random sides of a map: in training, at least six values per channel after `shrink`, below which gradients cancel.
pub fn sample_sides(rng: &mut Rng, training: bool, shrink: usize, batch: usize) -> [usize; 2] {
    if !training {
        return [rng.between(1, 2 * shrink + 3), rng.between(1, 2 * shrink + 3)];
    }
    let least = 6usize.div_ceil(batch);
    let (rows, cols) = if rng.chance(0.5) { (2, least.div_ceil(2)) } else { (least.div_ceil(2), 2) };
    let mut side = |n: usize| shrink * (n - 1) + 1 + rng.below(shrink + 2);
    [side(rows), side(cols)]
}

/// `model.resnet`.
pub struct ModelResNet;

impl Operation for ModelResNet {
    const NAME: &'static str = "model.resnet";
    const PAPER: &'static str = "1512.03385 ResNet";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let basic = rng.chance(0.5);
        let stages = rng.between(1, 3);
        config.set("block", if basic { "basic" } else { "bottleneck" }).set("expansion", if basic { 1 } else { rng.between(1, 4) });
        config.set("layers", (0..stages).map(|_| rng.between(1, if stages == 1 { 2 } else { 1 })).collect::<Vec<_>>());
        config.set("strides", (0..stages).map(|i| if i == 0 { 1 } else { rng.between(1, 2) }).collect::<Vec<_>>());
        config.set("stem_channels", rng.between(1, 4)).set("base_channels", rng.between(1, 2)).set("in_chans", rng.between(1, 3));
        config.set("num_classes", rng.below(4)).set("training", rng.chance(0.5)).set("bn_eps", 1e-5).set("bn_momentum", 0.1);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let training = config.bool("training")?;
        let batch = if training { draw.size("batch", 2, 3) } else { draw.size("batch", 1, 2) };
        let shrink = 4 * config.usizes("strides")?.iter().product::<usize>();
        let [h, w] = sample_sides(draw.rng, training, shrink, batch);
        draw.normal("x", [batch, config.positive("in_chans")?, h, w]);
        Ok(())
    }

    fn cost(config: &Config, shapes: &Shapes) -> Result<Option<Cost>> {
        let [b, _, h, w] = shapes.dims("x")?;
        let (model, _) = Layout::build(|names| ResNet::new(names, config))?;
        let (cost, [_, oh, ow]) = model.trunk.cost([b, h, w], config.bool("training")?)?;
        let outputs = model.trunk.outputs();
        Ok(Some(match &model.head {
            Some(head) => cost + head.cost(outputs, b),
            None => cost + Cost { flops: 0, activation_bytes: 4 * b * oh * ow * outputs },
        }))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let training = config.bool("training")?;
        let (model, layout) = Layout::build(|names| ResNet::new(names, config))?;
        let mut updates = Vec::new();
        run.unary(
            &layout,
            |p, x| {
                let (map, mut saved) = model.trunk.forward(p, x, training)?;
                updates = saved.take_updates();
                let shape = map.shape();
                match &model.head {
                    None => Ok((channels_first(&map)?, (saved, shape, None))),
                    Some(head) => {
                        let (y, pooled) = head.forward(p, &map)?;
                        Ok((y, (saved, shape, Some(pooled))))
                    }
                }
            },
            |p, g, (saved, shape, pooled), dy| {
                let dy = match (&model.head, pooled) {
                    (Some(head), Some(pooled)) => head.backward(p, g, &pooled, shape, dy)?,
                    _ => channels_last(dy)?,
                };
                model.trunk.backward(p, g, saved, dy)
            },
        )?;
        run.after_buffers(&layout, updates);
        Ok(())
    }
}
