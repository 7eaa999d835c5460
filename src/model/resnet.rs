//! `model.resnet`: ResNet v1.5 (arXiv 1512.03385): 7×7 stem, maximum pool, stages of residual blocks, mean, `fc`.
//!
//! Names are torchvision's and timm's: `conv1`, `bn1`, `layer{1…}.{j}.*`, `fc`.

use std::ops::Range;

use super::network::{Built, Classifier};
use super::resnet_block::{self, Block, BlockSettings, ConvNorm, Kind};
use super::stack::{self, Kept};
use super::swin_ops::{mean_tokens, mean_tokens_backward};
use super::weights::{self, Key, Rules};
use super::zoo::{Eval, Family, Variant};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::kernel::pool::Window;
use crate::nn::batch_norm::Updates;
use crate::nn::conv_norm::{NormInput, Then};
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::pool::{max_pool, max_pool_backward};
use crate::nn::{ConvSettings, DropPath, Init, Layout, Linear, Names, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Shape, Tensor};

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
    /// Drop path of the last block; it grows linearly from 0 over all blocks.
    pub drop_path: f64,
}

/// Stem, pool and stages.
#[derive(Clone, Debug)]
pub struct Trunk {
    stem: ConvNorm,
    blocks: Vec<Block>,
    /// The blocks of each stage.
    stages: Vec<Range<usize>>,
    outputs: usize,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    image: Tensor<T>,
    training: bool,
    stem: NormInput<T>,
    stages: Vec<Vec<Kept<T, resnet_block::Saved<T>>>>,
    updates: Updates<T>,
}

impl<T: Float> Saved<T> {
    /// Takes the running statistics after the call.
    pub fn take_updates(&mut self) -> Updates<T> {
        std::mem::take(&mut self.updates)
    }
}

impl Trunk {
    /// Registers `conv1`, `bn1`, `layer1.0.*`, ….
    pub fn new(names: &mut Names, settings: &TrunkSettings) -> Result<Self> {
        let TrunkSettings { kind, chans, stem, layers, widths, strides, expansion, norm, drop_path } = settings;
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
        let (mut blocks, mut stages, mut inputs) = (Vec::new(), Vec::new(), *stem);
        let depth = layers.iter().sum();
        for (stage, &count) in layers.iter().enumerate() {
            stages.push(blocks.len()..blocks.len() + count);
            for j in 0..count {
                let stride = if j == 0 { strides[stage] } else { 1 };
                let outputs = widths[stage];
                let drop_path = DropPath::linear(*drop_path, blocks.len(), depth);
                let settings = BlockSettings { kind: *kind, inputs, outputs, expansion: *expansion, stride, norm: *norm, drop_path };
                blocks.push(Block::new(&mut names.at(format!("layer{}.{j}", stage + 1)), settings)?);
                inputs = outputs;
            }
        }
        Ok(Trunk { stem: stem_layer, blocks, stages, outputs: inputs })
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
        let (a, (z, mut norm)) = self.stem.forward(p, &image, training, Then::Relu)?;
        let mut x = max_pool(&a, POOL)?;
        drop(a);
        let mut updates = norm.take_updates();
        let mut stages = Vec::with_capacity(self.stages.len());
        for (i, blocks) in self.stages.iter().enumerate() {
            x = paint(i, x)?;
            let (y, kept) = stack::forward(p, &self.blocks[blocks.clone()], x, |block, _, x| {
                let (y, mut saved) = block.forward(p, x, training)?;
                updates.extend(saved.take_updates());
                Ok((y, saved))
            })?;
            p.show(format!("stages.{i}"), &y);
            stages.push(kept);
            x = y;
        }
        Ok((x, Saved { image, training, stem: (z, norm), stages, updates }))
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
        paint_backward: impl FnMut(&mut Params<T>, usize, Tensor<T>) -> Result<Tensor<T>>,
    ) -> Result<Tensor<T>> {
        let (image, dz) = self.backward_to_stem(p, g, saved, dy, paint_backward)?;
        channels_first(&self.stem.conv.backward(p, g, &image, &dz)?)
    }

    /// [`backward`](Self::backward) without the gradient of the image.
    pub fn backward_params<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, dy: Tensor<T>) -> Result<()> {
        let (image, dz) = self.backward_to_stem(p, g, saved, dy, |_, _, d| Ok(d))?;
        self.stem.conv.backward_params(g, &image, &dz)
    }

    /// The stem's input and the gradient of its convolution's output.
    fn backward_to_stem<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        dy: Tensor<T>,
        mut paint_backward: impl FnMut(&mut Params<T>, usize, Tensor<T>) -> Result<Tensor<T>>,
    ) -> Result<(Tensor<T>, Tensor<T>)> {
        let Saved { image, training, stem: (z, norm), stages, .. } = saved;
        let mut dx = dy;
        for ((i, blocks), kept) in self.stages.iter().enumerate().zip(stages).rev() {
            let again = |block: &Block, _, x| block.forward(p, x, training);
            let back = |block: &Block, _, saved, d: &Tensor<T>| block.backward(p, g, saved, d.clone());
            dx = stack::backward(&self.blocks[blocks.clone()], kept, dx, again, back)?;
            dx = paint_backward(g, i, dx)?;
        }
        let a = self.stem.norm.again(p, &z, &norm, true);
        let mut da = max_pool_backward(&a, POOL, &dx)?;
        elementwise::relu_backward(da.data_mut(), a.data(), T::ONE);
        Ok((image, self.stem.norm.backward(p, g, &z, &norm, &da)?))
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
        p.show("pooled", &pooled);
        Ok((self.fc.forward(p, &pooled)?, pooled))
    }

    /// The gradient of `x`, of shape `shape`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        pooled: &Tensor<T>,
        shape: Shape,
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
        drop_path: config.f64_or("drop_path_rate", 0.0)?,
    })
}

impl Classifier for ResNet {
    type Saved = (Saved<f32>, Shape, Option<Tensor<f32>>);

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Self::Saved)> {
        let (map, saved) = self.trunk.forward(p, images, p.training())?;
        let Some(head) = &self.head else { return Err(Error::config("num_classes", "expected at least one class, found 0")) };
        let (logits, pooled) = head.forward(p, &map)?;
        Ok((vec![logits], (saved, map.shape(), Some(pooled))))
    }

    fn updates(saved: &mut Self::Saved) -> Updates<f32> {
        saved.0.take_updates()
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Self::Saved, d: &[Tensor<f32>]) -> Result<()> {
        let (Some(head), (saved, shape, Some(pooled))) = (&self.head, saved) else { return Ok(()) };
        let d_map = head.backward(p, g, &pooled, shape, &d[0])?;
        self.trunk.backward_params(p, g, saved, d_map)
    }
}

/// Names of timm and torchvision; openmmlab's have a prefix, and weights pre-trained by A²MIM bring its mask.
fn key(name: &str) -> Key {
    let plain = name.strip_prefix("backbone.").unwrap_or(name);
    let plain = if name.starts_with("head.fc.") { &name["head.".len()..] } else { plain };
    match plain {
        "mask_token" | "mask_gamma" => Key::Drop,
        _ if plain.ends_with(".num_batches_tracked") => Key::Drop,
        _ if plain.len() < name.len() => Key::Rename(plain.into()),
        _ => Key::Keep,
    }
}

/// ResNet v1.5.
pub static FAMILY: Family = Family {
    op: "model.resnet",
    common: r#"{"block": "bottleneck", "stem_channels": 64, "base_channels": 64, "strides": [1, 2, 2, 2], "in_chans": 3}"#,
    build: |config| Built::new(|names| ResNet::new(names, config)),
    at_size: |_, _| (),
    macs: |config, size| {
        let (model, _) = Layout::build(|names| ResNet::new(names, config))?;
        let cost = model.trunk.cost([1, size, size], false)?.0;
        Ok((cost.flops / 2 + model.trunk.outputs() * config.usize("num_classes")?) as f64)
    },
    rules: Rules { key, resize: weights::fixed, heads: &["fc"] },
    variants: &[
        Variant {
            name: "resnet18",
            also: &[],
            config: r#"{"block": "basic", "layers": [2, 2, 2, 2]}"#,
            eval: Eval::IMAGENET.crop(0.95),
            params: Some(11_689_512),
            gmacs: Some(1.814),
        },
        Variant {
            name: "resnet34",
            also: &[],
            config: r#"{"block": "basic", "layers": [3, 4, 6, 3]}"#,
            eval: Eval::IMAGENET.crop(0.95),
            params: Some(21_797_672),
            gmacs: Some(3.664),
        },
        Variant {
            name: "resnet50",
            also: &[],
            config: r#"{"layers": [3, 4, 6, 3]}"#,
            eval: Eval::IMAGENET.crop(0.95),
            params: Some(25_557_032),
            gmacs: Some(4.089),
        },
        Variant {
            name: "resnet101",
            also: &[],
            config: r#"{"layers": [3, 4, 23, 3]}"#,
            eval: Eval::IMAGENET.crop(0.95),
            params: Some(44_549_160),
            gmacs: Some(7.801),
        },
        Variant {
            name: "resnet152",
            also: &[],
            config: r#"{"layers": [3, 8, 36, 3]}"#,
            eval: Eval::IMAGENET.crop(0.95),
            params: Some(60_192_808),
            gmacs: Some(11.514),
        },
        Variant {
            name: "resnet200",
            also: &[],
            config: r#"{"layers": [3, 24, 36, 3]}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(64_673_832),
            gmacs: Some(15.01),
        },
        Variant {
            name: "resnet_micro",
            also: &[],
            config: r#"{"block": "basic", "layers": [2, 2, 2], "stem_channels": 32, "base_channels": 32}"#,
            eval: Eval::SMALL,
            params: None,
            gmacs: None,
        },
    ],
};

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

#[cfg(test)]
mod tests {
    use super::*;

    /// Names of openmmlab and of A²MIM's checkpoints become torchvision's; what is no weight of the network is dropped.
    #[test]
    fn other_names() {
        let renamed = |name| match key(name) {
            Key::Keep => Some(name.to_string()),
            Key::Rename(to) => Some(to),
            _ => None,
        };
        assert_eq!(renamed("layer1.0.conv1.weight").as_deref(), Some("layer1.0.conv1.weight"));
        assert_eq!(renamed("backbone.layer1.0.conv1.weight").as_deref(), Some("layer1.0.conv1.weight"));
        assert_eq!(renamed("head.fc.bias").as_deref(), Some("fc.bias"));
        for dropped in ["bn1.num_batches_tracked", "backbone.bn1.num_batches_tracked", "backbone.mask_token", "mask_gamma"] {
            assert_eq!(renamed(dropped), None, "{dropped}");
        }
    }
}
