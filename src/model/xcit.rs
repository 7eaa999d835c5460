//! `model.xcit`: XCiT (arXiv 2106.09681): convolutional stem, Fourier positions, XCA blocks, a class stage, a head.
//!
//! `t = stem(x) + positions(H', W')`, blocks over the patches without a class token, `logits = head(class_stage(t))`. Nothing depends on
//! the image size: the same weights serve every resolution. State names are the released code's (`pos_embeder` is spelled so).
//!
//! Backward: the parts in turn; the positions receive the sum over the images.

use crate::attention::xca;
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::Result;
use crate::kernel::{reduce, rows};
use crate::nn::batch_norm::Updates;
use crate::nn::{ConvStem, FourierPosition, Init, Layout, Linear, Names, Params, conv_stem};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

use super::network::{Built, Classifier};
use super::stack::{self, Kept};
use super::weights::{self, Key, Rules};
use super::xcit_block::{self, Block, Mixing};
use super::xcit_class::{self, ClassStage};
use super::zoo::{Eval, Family, Variant};

/// The network.
#[derive(Clone, Debug)]
pub struct Xcit {
    stem: ConvStem,
    positions: Option<FourierPosition>,
    blocks: Vec<Block>,
    stage: ClassStage,
    head: Option<Linear>,
}

/// What [`Xcit::backward`] needs.
pub struct Saved<T: Float> {
    stem: conv_stem::Saved<T>,
    /// The features of the positions.
    features: Option<Tensor<T>>,
    blocks: Vec<Kept<T, xcit_block::Saved<T>>>,
    stage: xcit_class::StageSaved<T>,
    class: Tensor<T>,
    map: [usize; 2],
    training: bool,
    updates: Updates<T>,
}

impl<T: Float> Saved<T> {
    /// Takes the running statistics after the call: none in evaluation.
    pub fn take_updates(&mut self) -> Updates<T> {
        std::mem::take(&mut self.updates)
    }
}

/// Start of the gains of residual branches by depth: 1 for 12 blocks, 1e-5 for 24.
pub fn gain_start(depth: usize) -> f64 {
    if depth < 18 { 1.0 } else { 1e-5 }
}

impl Xcit {
    /// Registers the parameters from the keys of `model.xcit`. `layer_scale` false takes the gains from the class blocks, and from the
    /// others if `block_gains` is false too: the released code cannot do without those.
    pub fn new(names: &mut Names, config: &Config, block_gains: bool) -> Result<Self> {
        let (depth, classes) = (config.usize("depth")?, config.usize_or("num_classes", 1000)?);
        let (stem, dim) = (conv_stem::Settings::from_config(config)?, config.positive("embed_dim")?);
        let mixing =
            Mixing::Xca(xca::Settings { qkv_bias: config.bool_or("qkv_bias", true)?, ..xca::Settings::from_config(config, "embed_dim")? });
        let mut class = xcit_class::Settings::from_config(config, "embed_dim")?;
        class.attention.qkv_bias = config.bool_or("qkv_bias", true)?;
        class.layer_scale = class.layer_scale.map(|_| gain_start(depth));
        let block = xcit_block::Settings::from_config(config, mixing, block_gains.then(|| gain_start(depth)))?;
        let stem = ConvStem::new(names.at("patch_embed"), stem)?;
        let positions =
            if config.bool_or("use_pos", true)? { Some(FourierPosition::new(names.at("pos_embeder"), dim, 32, 10_000.0)?) } else { None };
        let blocks = (0..depth).map(|i| Block::new(&mut names.at(format!("blocks.{i}")), block)).collect::<Result<_>>()?;
        let stage = ClassStage::new(names, class, config.usize_or("cls_attn_layers", 2)?)?;
        let head = (classes > 0).then(|| Linear::new(names.at("head"), dim, classes, true, Init::NORMAL_02));
        Ok(Xcit { stem, positions, blocks, stage, head })
    }

    /// What the forward pass for images `[b, in, h, w]`, of `map` tokens each, costs.
    pub fn cost(&self, size: [usize; 4], map: [usize; 2], training: bool) -> Result<Cost> {
        let b = size[0];
        let mut cost = self.stem.cost(size, training)? + self.stage.cost(b, map[0] * map[1])?;
        if let Some(positions) = &self.positions {
            // The table itself is added and forgotten.
            let all = positions.cost(map);
            cost = cost + Cost { flops: all.flops, activation_bytes: positions.feature_bytes(map) };
        }
        for block in &self.blocks {
            cost = cost + block.cost([b, map[0], map[1]], training)?;
        }
        // Without blocks nobody keeps the stem's tokens; without a head the class vector is the output.
        if self.blocks.is_empty() {
            cost.activation_bytes -= 4 * b * map[0] * map[1] * self.stage.dim();
        }
        if let Some(head) = &self.head {
            let flops = 2 * b * head.weight().numel();
            cost = cost + Cost { flops, activation_bytes: 4 * b * head.outputs() };
        }
        Ok(cost)
    }

    /// Logits `[B, classes]`, or the class vector `[B, C]` without a head, of `[B, in, H, W]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, training: bool) -> Result<(Tensor<T>, Saved<T>)> {
        let (mut x, map, mut stem) = self.stem.forward(p, image, training)?;
        let mut updates = stem.take_updates();
        let features = match &self.positions {
            None => None,
            Some(positions) => {
                let (table, features) = positions.forward(p, map)?;
                rows::add_table(x.data_mut(), table.data());
                Some(features)
            }
        };
        let (x, blocks) = stack::forward(p, &self.blocks, x, |block, _, x| {
            let (y, mut saved) = block.forward(p, x, map, training)?;
            updates.extend(saved.take_updates());
            Ok((y, saved))
        })?;
        p.show("tokens", &x);
        let (class, stage) = self.stage.forward(p, &x)?;
        p.show("pooled", &class);
        let logits = self.head.as_ref().map_or(Ok(class.clone()), |head| head.forward(p, &class))?;
        Ok((logits, Saved { stem, features, blocks, stage, class, map, training, updates }))
    }

    /// Adds the gradients of the parameters; the gradient of the images if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        dy: &Tensor<T>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let Saved { stem, features, blocks, stage, class, map, training, .. } = saved;
        let d_class = self.head.as_ref().map_or(Ok(dy.clone()), |head| head.backward(p, g, &class, dy))?;
        let d = self.stage.backward(p, g, stage, &d_class)?;
        let d = stack::backward(
            &self.blocks,
            blocks,
            d,
            |block, _, x| block.forward(p, x, map, training),
            |block, _, saved, d| block.backward(p, g, saved, d),
        )?;
        if let (Some(positions), Some(features)) = (&self.positions, &features) {
            let [_, n, c] = d.dims("gradient of the tokens")?;
            let mut d_table = Tensor::zeros([n, c]);
            reduce::add_column_sums(d_table.data_mut(), d.data());
            positions.backward(g, features, &d_table)?;
        }
        if want_image {
            return self.stem.backward(p, g, stem, &d).map(Some);
        }
        self.stem.backward_params(p, g, stem, &d)?;
        Ok(None)
    }
}

impl Classifier for Xcit {
    type Saved = Saved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Saved<f32>)> {
        let (logits, saved) = self.forward(p, images, p.training())?;
        Ok((vec![logits], saved))
    }

    fn updates(saved: &mut Saved<f32>) -> Updates<f32> {
        saved.take_updates()
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Saved<f32>, d: &[Tensor<f32>]) -> Result<()> {
        self.backward(p, g, saved, &d[0], false).map(drop)
    }
}

/// timm spells `pos_embed` and stores the class blocks' q, k and v one by one.
fn key(name: &str) -> Key {
    if name.ends_with("num_batches_tracked") {
        return Key::Drop;
    }
    if let Some(rest) = name.strip_prefix("pos_embed.") {
        return Key::Rename(format!("pos_embeder.{rest}"));
    }
    if name.starts_with("cls_attn_blocks.") {
        for (part, letter) in ["q", "k", "v"].into_iter().enumerate() {
            if let Some((block, rest)) = name.split_once(&format!(".attn.{letter}.")) {
                return Key::Part { name: format!("{block}.attn.qkv.{rest}"), part, parts: 3 };
            }
        }
    }
    Key::Keep
}

/// Multiply-adds for one image; the class blocks project all tokens to q, k and v, as released.
fn macs(config: &Config, size: usize) -> Result<f64> {
    let [c, heads, depth, classes, layers] =
        ["embed_dim", "num_heads", "depth", "num_classes", "cls_attn_layers"].map(|key| config.usize(key));
    let (c, heads, depth, classes, layers) = (c? as f64, heads?.max(1) as f64, depth? as f64, classes? as f64, layers? as f64);
    let (stem, map) = stem_macs(config, size)?;
    let (n, ratio) = ((map[0] * map[1]) as f64, config.f64("mlp_ratio")?);
    let block = n * (4.0 * c * c + 2.0 * c * c / heads + 2.0 * ratio * c * c + 18.0 * c);
    let class = (n + 1.0) * (3.0 * c * c + 2.0 * c) + (1.0 + 2.0 * ratio) * c * c;
    let positions = if config.bool_or("use_pos", true)? { n * 64.0 * c } else { 0.0 };
    Ok(stem + positions + depth * block + layers * class + c * classes)
}

/// Multiply-adds of the convolutional stem, and the map that it makes.
pub(super) fn stem_macs(config: &Config, size: usize) -> Result<(f64, [usize; 2])> {
    let settings = conv_stem::Settings::from_config(config)?;
    let (stem, _) = Layout::build(|names| ConvStem::new(names.here(), settings))?;
    Ok((stem.cost([1, settings.chans, size, size], false)?.flops as f64 / 2.0, settings.grid([size; 2])?))
}

/// Four networks for each width and depth: patches of 16 and 8 pixels, images of 224 and 384.
macro_rules! variants {
    ($($name:literal $sizes:literal [$params16:literal $gmacs16:literal $gmacs16_384:literal]
        [$params8:literal $gmacs8:literal $gmacs8_384:literal];)*) => {
        &[
            $(
                Variant {
                    name: concat!("xcit_", $name, "_p16_224"),
                    also: &[concat!("xcit_", $name, "_p16")],
                    config: concat!("{\"patch_size\": 16, ", $sizes, "}"),
                    eval: Eval::IMAGENET.crop(1.0),
                    params: Some($params16),
                    gmacs: Some($gmacs16),
                },
                Variant {
                    name: concat!("xcit_", $name, "_p16_384"),
                    also: &[],
                    config: concat!("{\"patch_size\": 16, ", $sizes, "}"),
                    eval: Eval::IMAGENET.crop(1.0).at(384),
                    params: Some($params16),
                    gmacs: Some($gmacs16_384),
                },
                Variant {
                    name: concat!("xcit_", $name, "_p8_224"),
                    also: &[concat!("xcit_", $name, "_p8")],
                    config: concat!("{\"patch_size\": 8, ", $sizes, "}"),
                    eval: Eval::IMAGENET.crop(1.0),
                    params: Some($params8),
                    gmacs: Some($gmacs8),
                },
                Variant {
                    name: concat!("xcit_", $name, "_p8_384"),
                    also: &[],
                    config: concat!("{\"patch_size\": 8, ", $sizes, "}"),
                    eval: Eval::IMAGENET.crop(1.0).at(384),
                    params: Some($params8),
                    gmacs: Some($gmacs8_384),
                },
            )*
            Variant {
                name: "xcit_micro",
                also: &[],
                config: r#"{"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4, "cls_attn_layers": 1}"#,
                eval: Eval::SMALL,
                params: None,
                gmacs: None,
            },
        ]
    };
}

/// XCiT.
pub static FAMILY: Family = Family {
    op: "model.xcit",
    common: r#"{"in_chans": 3, "mlp_ratio": 4.0, "qkv_bias": true, "cls_attn_layers": 2, "use_pos": true, "tokens_norm": true,
        "layer_scale": true, "ln_eps": 1e-6, "bn_eps": 1e-5, "bn_momentum": 0.1}"#,
    build: |config| Built::new(|names| Xcit::new(names, config, true)),
    // Nothing depends on it.
    at_size: |_, _| {},
    macs,
    rules: Rules { key, resize: weights::fixed, heads: &["head"] },
    variants: variants! {
        "nano_12" r#""embed_dim": 128, "depth": 12, "num_heads": 4, "tokens_norm": false"# [3_053_224 0.56 1.64] [3_049_016 2.16 6.34];
        "tiny_12" r#""embed_dim": 192, "depth": 12, "num_heads": 4"# [6_716_272 1.24 3.66] [6_706_504 4.83 14.19];
        "tiny_24" r#""embed_dim": 192, "depth": 24, "num_heads": 4"# [12_116_896 2.34 6.86] [12_107_128 9.20 27.02];
        "small_12" r#""embed_dim": 384, "depth": 12, "num_heads": 8"# [26_253_304 4.85 14.26] [26_213_032 18.85 55.39];
        "small_24" r#""embed_dim": 384, "depth": 24, "num_heads": 8"# [47_671_384 9.12 26.79] [47_631_112 35.91 105.52];
        "medium_24" r#""embed_dim": 512, "depth": 24, "num_heads": 8"# [84_395_752 16.19 47.55] [84_323_624 63.76 187.35];
        "large_24" r#""embed_dim": 768, "depth": 24, "num_heads": 16"# [189_096_136 36.02 105.82] [188_932_648 141.88 416.93];
    },
};

/// `model.xcit`.
pub struct ModelXcit;

/// Whether the blocks have gains: always with `layer_scale`, without it if the case holds any.
fn block_gains(config: &Config, given: impl Fn(&str) -> bool) -> Result<bool> {
    let named = |name: &str| given(&format!("blocks.0.{name}"));
    let any = ["gamma1", "gamma2", "gamma3"].into_iter().any(named);
    Ok(config.bool_or("layer_scale", true)? || any || !named("norm1.weight"))
}

impl Operation for ModelXcit {
    const NAME: &'static str = "model.xcit";
    const PAPER: &'static str = "2106.09681 XCiT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let heads = rng.between(1, 3);
        sample_sizes(rng, &mut config);
        config.set("embed_dim", heads * rng.between(8usize.div_ceil(heads), 9)).set("num_heads", heads);
        config.set("use_pos", rng.chance(0.7)).set("tokens_norm", rng.chance(0.5)).set("layer_scale", rng.chance(0.7));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, patch) = (draw.size("batch", 2, 3), config.positive("patch_size")?);
        let shape =
            [batch, config.positive("in_chans")?, draw.rng.between(patch + 1, 2 * patch + 2), draw.rng.between(patch + 1, patch + 3)];
        draw.normal("x", shape);
        Ok(())
    }

    fn cost(config: &Config, shapes: &Shapes) -> Result<Option<Cost>> {
        let size @ [_, _, h, w] = shapes.dims("x")?;
        let gains = block_gains(config, |name| matches!(shapes.param_dims::<1>(name), Ok(Some(_))))?;
        let (model, _) = Layout::build(|names| Xcit::new(names, config, gains))?;
        let map = conv_stem::Settings::from_config(config)?.grid([h, w])?;
        model.cost(size, map, config.bool_or("training", false)?).map(Some)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (config, x) = (run.config(), run.input("x")?);
        let training = config.bool_or("training", false)?;
        let gains = block_gains(config, |name| matches!(run.param_dims::<1>(name), Ok(Some(_))))?;
        let (model, layout) = Layout::build(|names| Xcit::new(names, config, gains))?;
        let p = run.params(&layout)?;
        let (logits, mut saved) = model.forward(&p, &x, training)?;
        run.output("logits", &logits);
        let updates = saved.take_updates();
        if run.backward() {
            let mut g = run.zero_grads(&p);
            if let Some(dx) = model.backward(&p, &mut g, saved, &run.cotangent("logits", logits.shape())?, true)? {
                run.grad_input("x", &dx);
            }
            run.grad_params(&g);
        }
        run.after_buffers(&layout, updates);
        Ok(())
    }
}

/// Random keys that XCiT and X-ViT share.
pub(super) fn sample_sizes(rng: &mut Rng, config: &mut Config) {
    config.set("patch_size", if rng.chance(0.5) { 16 } else { 8 }).set("in_chans", rng.between(1, 3)).set("num_classes", rng.below(4));
    config.set("depth", rng.between(0, 2)).set("mlp_ratio", rng.range(0.5, 2.0)).set("qkv_bias", rng.chance(0.7));
    config.set("cls_attn_layers", rng.between(0, 2)).set("ln_eps", 1e-6).set("bn_eps", 1e-5).set("bn_momentum", 0.1);
    config.set("training", rng.chance(0.5));
}
