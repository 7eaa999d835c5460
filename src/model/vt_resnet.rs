//! `model.vt_resnet`: a ResNet whose last stage is replaced by Visual Transformer blocks (arXiv 2006.03677).
//!
//! The first block has the filter tokenizer, the others the recurrent one, which reads the tokens of the block before. The head takes
//! the mean of the last tokens (then the last block has no projector) or of the last map.

use super::network::{Built, Classifier};
use super::resnet::{self, MeanHead, Trunk, TrunkSettings, sample_sides};
use super::resnet_block::Kind;
use super::weights::{self, Rules};
use super::zoo::{Eval, Family, Variant};
use crate::attention::visual_tokens::{self, Formulation, Settings, VisualTokens, Widths};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::nn::batch_norm::Updates;
use crate::nn::{Layout, Names, Params, Pass};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Shape, Tensor};

/// More VT blocks than any network has.
const MOST_BLOCKS: usize = 256;

/// The network.
#[derive(Clone, Debug)]
pub struct VtResNet {
    trunk: Trunk,
    blocks: Vec<VisualTokens>,
    head: MeanHead,
    /// Width of what the head pools.
    pooled: usize,
    from_map: bool,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    trunk: resnet::Saved<T>,
    blocks: Vec<visual_tokens::Saved<T>>,
    pooled: Tensor<T>,
    /// The shapes of the last tokens and, with a projector, of the last map.
    tokens: Shape,
    map: Option<Shape>,
}

fn trunk_settings(config: &Config) -> Result<TrunkSettings> {
    let kind = Kind::parse(config.str("block")?)?;
    let (layers, widths) = (config.usizes("layers")?, config.usizes("widths")?);
    if layers.len() != widths.len() || widths.iter().any(|&w| w == 0 || w >= 1 << 20) {
        return Err(Error::config("widths", format!("expected a positive width for each of {} stages, found {widths:?}", layers.len())));
    }
    Ok(TrunkSettings {
        kind,
        chans: config.positive("in_chans")?,
        stem: config.positive("stem_width")?,
        strides: (0..layers.len()).map(|i| if i == 0 { 1 } else { 2 }).collect(),
        widths: widths.into_iter().map(|w| w * kind.expansion()).collect(),
        layers,
        expansion: kind.expansion(),
        norm: [1e-5, 0.1],
        drop_path: config.f64_or("drop_path_rate", 0.0)?,
    })
}

impl VtResNet {
    /// Registers the trunk's parameters, `vt.{j}.*`, `fc`.
    pub fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let trunk = Trunk::new(names, &trunk_settings(config)?)?;
        let (token_channels, tokens) = (config.positive("token_channels")?, config.positive("num_tokens")?);
        let count = config.positive("vt_blocks")?;
        if count > MOST_BLOCKS {
            return Err(Error::config("vt_blocks", format!("expected at most {MOST_BLOCKS}, found {count}")));
        }
        let from_map = match config.str_or("head_pool", "tokens")? {
            "tokens" => false,
            "map" => true,
            other => return Err(Error::config("head_pool", format!("expected \"tokens\" or \"map\", found \"{other}\""))),
        };
        let outputs = if config.get("vt_channels").is_none() { trunk.outputs() } else { config.positive("vt_channels")? };
        let formulation = Formulation::from_config(config, token_channels)?;
        let mut blocks = Vec::with_capacity(count);
        for j in 0..count {
            let settings = Settings {
                widths: Widths { channels: if j == 0 { trunk.outputs() } else { outputs }, token_channels, tokens },
                recurrent: j > 0,
                projector: (from_map || j + 1 < count).then_some(outputs),
                formulation,
            };
            blocks.push(VisualTokens::new(&mut names.at(format!("vt.{j}")), settings)?);
        }
        let pooled = if from_map { outputs } else { token_channels };
        let head = MeanHead::new(names, pooled, config.positive("num_classes")?);
        Ok(VtResNet { trunk, blocks, head, pooled, from_map })
    }

    /// What it costs on images `[b, h, w]`.
    pub fn cost(&self, size: [usize; 3], training: bool) -> Result<Cost> {
        let (mut cost, at) = self.trunk.cost(size, training)?;
        for block in &self.blocks {
            cost = cost + block.cost(at)?;
        }
        Ok(cost + self.head.cost(self.pooled, size[0]))
    }

    /// Logits, and the running statistics after the call. Drop path is the trunk's: VT blocks are kept.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, training: bool) -> Result<(Tensor<T>, Updates<T>, Saved<T>)> {
        let (map, mut trunk) = self.trunk.forward(p, image, training)?;
        let updates = trunk.take_updates();
        let (mut map, mut tokens) = (Some(map), None);
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let x = map.take().ok_or_else(|| Error::usage("a VT block after one without projector"))?;
            let (next, y, saved) = block.forward(p, &x, tokens.take())?;
            if p.pass() != Pass::Infer {
                blocks.push(saved);
            }
            (map, tokens) = (y, Some(next));
        }
        let tokens = tokens.ok_or_else(|| Error::config("vt_blocks", "expected at least 1"))?;
        p.show("tokens", &tokens);
        let read = if self.from_map { map.as_ref().unwrap_or(&tokens) } else { &tokens };
        let (logits, pooled) = self.head.forward(p, read)?;
        let saved = Saved { trunk, blocks, pooled, tokens: tokens.shape(), map: map.map(|map| map.shape()) };
        Ok((logits, updates, saved))
    }

    /// Adds the gradients of the parameters; the gradient of the image if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        dy: &Tensor<T>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let Saved { trunk, blocks, pooled, tokens, map } = saved;
        let read = map.filter(|_| self.from_map).unwrap_or(tokens);
        let d_read = self.head.backward(p, g, &pooled, read, dy)?;
        let (mut d_tokens, mut d_map) = if self.from_map { (Tensor::zeros(tokens), Some(d_read)) } else { (d_read, None) };
        for (block, saved) in self.blocks.iter().zip(blocks).rev() {
            let (dx, d_previous) = block.backward(p, g, saved, d_tokens, d_map.as_ref())?;
            d_tokens = d_previous.unwrap_or_else(|| Tensor::zeros([0]));
            d_map = Some(dx);
        }
        let d_map = d_map.ok_or_else(|| Error::config("vt_blocks", "expected at least 1"))?;
        if want_image {
            self.trunk.backward(p, g, trunk, d_map).map(Some)
        } else {
            self.trunk.backward_params(p, g, trunk, d_map)?;
            Ok(None)
        }
    }
}

impl Classifier for VtResNet {
    type Saved = (Updates<f32>, Saved<f32>);

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Self::Saved)> {
        let (logits, updates, saved) = self.forward(p, images, p.training())?;
        Ok((vec![logits], (updates, saved)))
    }

    fn updates(saved: &mut Self::Saved) -> Updates<f32> {
        std::mem::take(&mut saved.0)
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Self::Saved, d: &[Tensor<f32>]) -> Result<()> {
        self.backward(p, g, saved.1, &d[0], false).map(drop)
    }
}

/// Multiply-adds for one image. Those of the equations are counted as they are written, though karat multiplies in a cheaper order.
fn macs(config: &Config, size: usize) -> Result<f64> {
    let (model, _) = Layout::build(|names| VtResNet::new(names, config))?;
    if config.str_or("formulation", "equations")? != "equations" {
        return Ok(model.cost([1, size, size], false)?.flops as f64 / 2.0);
    }
    let (trunk, [_, h, w]) = model.trunk.cost([1, size, size], false)?;
    let (pixels, tokens, t) = (h * w, config.positive("num_tokens")?, config.positive("token_channels")?);
    let (attn, ffn, value) = (config.usize_or("attn_dim", t / 2)?, config.usize_or("ffn_dim", t)?, config.bool_or("value_proj", true)?);
    let outputs = config.usize_or("vt_channels", model.trunk.outputs())?;
    let mut macs = trunk.flops / 2 + model.pooled * config.positive("num_classes")?;
    for j in 0..model.blocks.len() {
        let c = if j == 0 { model.trunk.outputs() } else { outputs };
        macs += 2 * pixels * c * tokens + if j > 0 { tokens * t * c } else { 0 } + if value { tokens * c * t } else { 0 };
        macs += 2 * tokens * t * (attn + ffn) + tokens * tokens * (attn + t);
        if model.from_map || j + 1 < model.blocks.len() {
            let keys = config.usize_or("proj_dim", c)?;
            macs += pixels * c * keys + tokens * t * keys + pixels * tokens * (keys + outputs);
            macs += if value { tokens * t * outputs } else { 0 } + if c != outputs { pixels * c * outputs } else { 0 };
        }
    }
    Ok(macs as f64)
}

/// The ResNets whose last stage the paper replaces, in both formulations. There are no published weights: counts are of this construction,
/// multiply-adds those of its linear maps and convolutions and of the products with tokens.
pub static FAMILY: Family = Family {
    op: "model.vt_resnet",
    common: r#"{"block": "bottleneck", "in_chans": 3, "stem_width": 64, "widths": [64, 128, 256], "vt_blocks": 3, "token_channels": 1024,
        "num_tokens": 16, "head_pool": "tokens", "formulation": "equations"}"#,
    build: |config| Built::new(|names| VtResNet::new(names, config)),
    at_size: |config, size| {
        config.set("image_size", size);
    },
    macs,
    rules: Rules { key: weights::without_counters, resize: weights::fixed, heads: &["fc"] },
    variants: &[
        Variant {
            name: "vt_resnet18",
            also: &[],
            config: r#"{"block": "basic", "layers": [2, 2, 2], "vt_blocks": 2}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(11_479_592),
            gmacs: Some(1.544),
        },
        Variant {
            name: "vt_resnet18_multihead",
            also: &[],
            config: r#"{"block": "basic", "layers": [2, 2, 2], "vt_blocks": 2,
                "formulation": "multihead", "heads": 16, "groups": 16, "kqv_groups": 8, "pos_size": 14, "pos_downsample": 1}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(7_878_025),
            gmacs: Some(1.474),
        },
        Variant {
            name: "vt_resnet34",
            also: &[],
            config: r#"{"block": "basic", "layers": [3, 4, 6]}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(21_126_952),
            gmacs: Some(3.246),
        },
        Variant {
            name: "vt_resnet34_multihead",
            also: &[],
            config: r#"{"block": "basic", "layers": [3, 4, 6],
                "formulation": "multihead", "heads": 16, "groups": 16, "kqv_groups": 8, "pos_size": 14, "pos_downsample": 1}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(15_697_724),
            gmacs: Some(3.133),
        },
        Variant {
            name: "vt_resnet50",
            also: &[],
            config: r#"{"layers": [3, 4, 6]}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(30_556_200),
            gmacs: Some(4.025),
        },
        Variant {
            name: "vt_resnet50_multihead",
            also: &[],
            config: r#"{"layers": [3, 4, 6],
                "formulation": "multihead", "heads": 16, "groups": 16, "kqv_groups": 8, "pos_size": 14, "pos_downsample": 1}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(23_600_956),
            gmacs: Some(3.589),
        },
        Variant {
            name: "vt_resnet101",
            also: &[],
            config: r#"{"layers": [3, 4, 23]}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(49_548_328),
            gmacs: Some(7.737),
        },
        Variant {
            name: "vt_resnet101_multihead",
            also: &[],
            config: r#"{"layers": [3, 4, 23],
                "formulation": "multihead", "heads": 16, "groups": 16, "kqv_groups": 8, "pos_size": 14, "pos_downsample": 1}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(42_593_084),
            gmacs: Some(7.301),
        },
        Variant {
            name: "vt_resnet_micro",
            also: &[],
            config: r#"{"block": "basic", "layers": [3, 2], "stem_width": 16, "widths": [48, 96], "vt_blocks": 2, "token_channels": 128, "num_tokens": 8, "scaled": true}"#,
            eval: Eval::SMALL,
            params: None,
            gmacs: None,
        },
    ],
};

/// `model.vt_resnet`.
pub struct ModelVtResNet;

impl Operation for ModelVtResNet {
    const NAME: &'static str = "model.vt_resnet";
    const PAPER: &'static str = "2006.03677 Visual transformers";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let (basic, stages) = (rng.chance(0.6), rng.between(1, 2));
        let expansion = if basic { 1 } else { 4 };
        let equations = rng.chance(0.5);
        // Without W_V everything is as wide as the tokens.
        let value = !equations || rng.chance(0.7);
        let widths: Vec<usize> = (0..stages).map(|_| if equations { rng.between(1, 3) } else { 2 }).collect();
        let trunk = expansion * widths[stages - 1];
        config.set("block", if basic { "basic" } else { "bottleneck" }).set("layers", vec![1; stages]).set("widths", widths);
        config.set("stem_width", rng.between(1, 4)).set("in_chans", rng.between(1, 3)).set("num_classes", rng.between(1, 4));
        config.set("vt_blocks", rng.between(1, 3)).set("training", rng.chance(0.5)).set("image_size", vec![32, 32]);
        config.set("head_pool", if rng.chance(0.5) { "tokens" } else { "map" }).set("num_tokens", rng.between(2, 4));
        if value && rng.chance(0.4) {
            config.set("vt_channels", 2 * rng.between(1, 3));
        }
        if equations {
            config.set("formulation", "equations").set("token_channels", if value { rng.between(2, 6) } else { trunk });
            config
                .set("attn_dim", rng.between(1, 4))
                .set("ffn_dim", rng.between(1, 5))
                .set("value_proj", value)
                .set("scaled", rng.chance(0.5));
        } else {
            let down = rng.below(2);
            config
                .set("formulation", "multihead")
                .set("token_channels", 4 * rng.between(1, 2))
                .set("heads", 2)
                .set("groups", rng.between(1, 2));
            config.set("kqv_groups", rng.between(1, 2)).set("pos_size", 2 * rng.below(2)).set("pos_downsample", down);
        }
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let training = config.bool("training")?;
        let batch = if training { draw.size("batch", 2, 3) } else { draw.size("batch", 1, 2) };
        let shrink = 4 << (config.usizes("layers")?.len() - 1);
        let [h, w] = sample_sides(draw.rng, training, shrink, batch);
        draw.normal("x", [batch, config.positive("in_chans")?, h, w]);
        Ok(())
    }

    fn cost(config: &Config, shapes: &Shapes) -> Result<Option<Cost>> {
        let [b, _, h, w] = shapes.dims("x")?;
        let (model, _) = Layout::build(|names| VtResNet::new(names, config))?;
        Ok(Some(model.cost([b, h, w], config.bool("training")?)?))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let training = run.config().bool("training")?;
        let (model, layout) = Layout::build(|names| VtResNet::new(names, run.config()))?;
        let p = run.params(&layout)?;
        let x = run.input("x")?;
        let (logits, updates, saved) = model.forward(&p, &x, training)?;
        run.output("logits", &logits);
        run.after_buffers(&layout, updates);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            if let Some(dx) = model.backward(&p, &mut g, saved, &run.cotangent("logits", logits.shape())?, true)? {
                run.grad_input("x", &dx);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
