//! `nn.t2t_module` and `model.t2t_vit`: Tokens-to-Token ViT (arXiv 2101.11986).
//!
//! The module makes tokens of an image in three overlapping soft splits with a token block after each of the first two:
//! `split(7, 4, 2)` → `attention1` → map → `split(3, 2, 1)` → `attention2` → map → `split(3, 2, 1)` → `project`. Token `(y, x)` is pixel
//! `(y, x)` of the next map, so "to map" moves nothing.
//!
//! The model: `X₀ = [cls; tokens] + pos_embed` (a fixed 1-D sinusoid table, a buffer), pre-norm ViT blocks, `norm`, class token, `head`.
//!
//! The released code keeps the grid as the square root of the number of tokens and scrambles other grids silently; here the module
//! tracks rows and columns, and the model refuses what does not fit its table.

use super::network::{Built, Classifier};
use super::stack::{self, Kept};
use super::t2t_block::{BlockSettings, TokenBlock, Windows};
use super::vit::resize_pos_embed;
use super::vit_block::hidden_width;
use super::vit_encoder::{Trunk, TrunkSaved};
use super::weights::{self, Rules};
use super::zoo::{self, Eval, Family, Variant};
use super::{t2t_block, vit_block};
use crate::attention::performer::sample_dropout;
use crate::attention::window::qk_scale;
use crate::attention::{performer, softmax, token_transformer};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::unfold::Order;
use crate::kernel::{elementwise, rows};
use crate::nn::dropout::Dropout;
use crate::nn::soft_split::{SoftSplit, SplitLinear};
use crate::nn::{Init, Layout, Linear, Names, Param, Params, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

const FIRST: Windows = Windows { split: SoftSplit { kernel: 7, stride: 4, padding: 2 }, order: Order::Planes };
const NEXT: Windows = Windows { split: SoftSplit { kernel: 3, stride: 2, padding: 1 }, order: Order::Pixels };
/// What the token blocks read.
const WINDOWS: [Windows; 2] = [FIRST, NEXT];

/// The Tokens-to-Token module.
#[derive(Clone, Debug)]
pub struct T2tModule {
    /// `attention1` and `attention2`.
    blocks: [TokenBlock; 2],
    project: Linear,
    chans: usize,
    width: usize,
}

/// What the backward pass needs.
pub struct ModuleSaved<T: Float> {
    grids: [[usize; 2]; 3],
    blocks: Vec<Kept<T, t2t_block::Saved<T>>>,
    map: Tensor<T>,
}

impl T2tModule {
    /// Registers `attention1`, `attention2` and `project` from the keys of `nn.t2t_module`.
    pub fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let (chans, width, dim) = (config.usize_or("in_chans", 3)?, config.positive("token_dim")?, config.positive("embed_dim")?);
        if !(1..1 << 16).contains(&chans) {
            return Err(Error::config("in_chans", format!("expected 1 to 65535, found {chans}")));
        }
        let eps = config.f64_or("norm_eps", 1e-5)?;
        let performer = config.choice("tokens_type", &["performer", "transformer"])? == "performer";
        let settings = |dim: usize, first_layer: u64| -> Result<BlockSettings> {
            Ok(if performer {
                let (kernel_ratio, eps) = (config.f64_or("kernel_ratio", 0.5)?, config.f64_or("performer_eps", 1e-8)?);
                let dropout = Dropout::from_config(config, 0.1)?.map(|dropout| dropout.from_layer(first_layer));
                BlockSettings::Performer { attention: performer::Settings { dim, in_dim: width, kernel_ratio, eps }, dropout }
            } else {
                let attention = token_transformer::Settings { dim, in_dim: width, qkv_bias: false, scale: None };
                BlockSettings::Transformer { attention, mlp_ratio: 1.0 }
            })
        };
        let attention1 = TokenBlock::new(&mut names.at("attention1"), settings(49 * chans, 0)?, eps)?;
        let attention2 = TokenBlock::new(&mut names.at("attention2"), settings(9 * width, 2)?, eps)?;
        let project = Linear::new(names.at("project"), 9 * width, dim, true, normal_02(9 * width, dim));
        Ok(T2tModule { blocks: [attention1, attention2], project, chans, width })
    }

    /// Rows and columns after each of the three splits.
    pub fn grids(&self, image: [usize; 2]) -> Result<[[usize; 2]; 3]> {
        let first = FIRST.split.grid(image)?;
        let second = NEXT.split.grid(first)?;
        Ok([first, second, NEXT.split.grid(second)?])
    }

    fn project(&self) -> SplitLinear<'_> {
        SplitLinear { split: NEXT.split, norm: None, linear: &self.project, order: NEXT.order }
    }

    /// Tokens `[B, L, embed_dim]` of `[B, in, H, W]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<(Tensor<T>, ModuleSaved<T>)> {
        let [_, c, h, w] = image.dims("image")?;
        if c != self.chans {
            return Err(Error::shape("image", format!("[batch, {}, height, width]", self.chans), image.shape()));
        }
        let grids = self.grids([h, w])?;
        let (map, blocks) = stack::forward(p, &self.blocks, image.clone(), |block, i, x| self.run(p, block, i, x, grids))?;
        let (y, _) = self.project().forward(p, &map)?;
        Ok((y, ModuleSaved { grids, blocks, map }))
    }

    /// Token block `i` on a map, and its tokens as the next map.
    fn run<T: Float>(
        &self,
        p: &Params<T>,
        block: &TokenBlock,
        i: usize,
        x: Tensor<T>,
        grids: [[usize; 2]; 3],
    ) -> Result<(Tensor<T>, t2t_block::Saved<T>)> {
        let (batch, [rows, cols]) = (x.shape()[0], grids[i]);
        let (y, saved) = block.forward(p, x, Some(WINDOWS[i]))?;
        Ok((y.reshape([batch, rows, cols, self.width])?, saved))
    }

    /// The gradient of the image.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: ModuleSaved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let ModuleSaved { grids, blocks, map } = saved;
        let d = self.project().backward(p, g, &map, None, dy)?;
        drop(map);
        let back = |block: &TokenBlock, i, saved, d: &Tensor<T>| {
            let [b, rows, cols, c] = d.dims("gradient of a map")?;
            block.backward(p, g, saved, Some(WINDOWS[i]), &d.reshape([b, rows * cols, c])?)
        };
        stack::backward(&self.blocks, blocks, d, |block, i, x| self.run(p, block, i, x, grids), back)
    }

    /// What [`forward`](Self::forward) costs.
    pub fn cost(&self, b: usize, image: [usize; 2]) -> Result<Cost> {
        let [first, second, _] = self.grids(image)?;
        let blocks = self.blocks[0].cost(b, first[0] * first[1]) + self.blocks[1].cost(b, second[0] * second[1]);
        Ok(blocks + self.project().cost(b, second)?)
    }
}

/// Random keys of the module.
fn sample_module(rng: &mut Rng) -> Config {
    let mut config = Config::default();
    config.set("tokens_type", rng.pick(&["performer", "transformer"])).set("in_chans", rng.between(1, 2));
    config.set("embed_dim", rng.between(1, 6)).set("token_dim", rng.between(2, 4)).set("kernel_ratio", rng.range(0.51, 1.2));
    config.set("performer_eps", if rng.chance(0.5) { 1e-8 } else { 1e-3 }).set("norm_eps", 1e-5);
    sample_dropout(rng, &mut config);
    config
}

/// `nn.t2t_module`. `dropout` (in training only; default 0.1, the published constant) and `seed` are optional keys.
pub struct T2tModuleOp;

impl Operation for T2tModuleOp {
    const NAME: &'static str = "nn.t2t_module";
    const PAPER: &'static str = "2101.11986 T2T-ViT";

    fn sample(rng: &mut Rng) -> Config {
        sample_module(rng)
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, height, width) = (draw.size("batch", 1, 2), draw.size("height", 3, 24), draw.size("width", 3, 24));
        draw.normal("image", [batch, config.positive("in_chans")?, height, width]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, _, h, w] = inputs.dims("image")?;
        let (module, _) = Layout::build(|names| T2tModule::new(names, config))?;
        Ok(Some(module.cost(b, [h, w])?))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let image = run.input("image")?;
        let (module, layout) = Layout::build(|names| T2tModule::new(names, run.config()))?;
        let p = run.params(&layout)?;
        let (y, saved) = module.forward(&p, &image)?;
        run.output("y", &y);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let dy = run.cotangent("y", y.shape())?;
            run.grad_input("image", &module.backward(&p, &mut g, saved, &dy)?);
            run.grad_params(&g);
        }
        Ok(())
    }
}

/// T2T-ViT: the module, a fixed position table, a deep narrow ViT.
#[derive(Clone, Debug)]
pub struct T2tVit {
    module: T2tModule,
    cls_token: Param,
    positions: Param,
    trunk: Trunk,
    head: Option<Linear>,
    dim: usize,
    /// Rows and columns of the table.
    side: usize,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    module: ModuleSaved<T>,
    trunk: TrunkSaved<T>,
    pooled: Tensor<T>,
}

impl T2tVit {
    /// Registers `tokens_to_token`, `cls_token`, `pos_embed`, `blocks`, `norm`, `head` from the keys of `model.t2t_vit`.
    pub fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let (dim, image) = (config.positive("embed_dim")?, config.positive("img_size")?);
        let side = image / 16;
        if !(1..1 << 12).contains(&side) {
            return Err(Error::config("img_size", format!("expected 16 to 65535, found {image}")));
        }
        let module = T2tModule::new(&mut names.at("tokens_to_token"), config)?;
        let cls_token = names.param("cls_token", [1, 1, dim], Init::NORMAL_02);
        let positions = names.buffer("pos_embed", [1, 1 + side * side, dim], Init::Sinusoid { dim });
        let attention = softmax::Settings {
            qkv_bias: config.bool_or("qkv_bias", false)?,
            scale: qk_scale(config)?,
            ..softmax::Settings::new(dim, config.positive("num_heads")?)
        };
        let settings = vit_block::BlockSettings {
            attention,
            mlp_ratio: config.f64_or("mlp_ratio", 4.0)?,
            norm_eps: config.f64_or("norm_eps", 1e-5)?,
            layer_scale: None,
            drop_path: config.f64_or("drop_path_rate", 0.0)?,
            init: normal_02,
        };
        let trunk = Trunk::new(names, "", config.usize("depth")?, settings, true)?;
        let classes = config.usize("num_classes")?;
        let head = (classes > 0).then(|| Linear::new(names.at("head"), dim, classes, true, normal_02(dim, classes)));
        Ok(T2tVit { module, cls_token, positions, trunk, head, dim, side })
    }

    /// Logits `[B, classes]`, or the class token without a head, of `[B, in, S, S]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let [b, _, h, w] = image.dims("image")?;
        let [_, _, [rows, cols]] = self.module.grids([h, w])?;
        if h != w || [rows, cols] != [self.side; 2] {
            let said = format!("square, of {0}×{0} tokens (16·{0} to 16·{0} + 2 pixels)", self.side);
            return Err(Error::shape("image", said, image.shape()));
        }
        let (tokens, module) = self.module.forward(p, image)?;
        let (n, c) = (rows * cols, self.dim);
        let mut x = Tensor::scratch([b, 1 + n, c]);
        for (x, tokens) in x.data_mut().chunks_exact_mut((1 + n) * c).zip(tokens.data().chunks_exact(n * c)) {
            x[..c].copy_from_slice(p.get(self.cls_token));
            x[c..].copy_from_slice(tokens);
        }
        drop(tokens);
        rows::add_table(x.data_mut(), p.buffer(self.positions));
        let (y, trunk) = self.trunk.forward(p, x)?;
        let mut pooled = Tensor::scratch([b, c]);
        for (out, y) in pooled.data_mut().chunks_exact_mut(c).zip(y.data().chunks_exact((1 + n) * c)) {
            out.copy_from_slice(&y[..c]);
        }
        p.show("pooled", &pooled);
        let logits = self.head.as_ref().map_or(Ok(pooled.clone()), |head| head.forward(p, &pooled))?;
        Ok((logits, Saved { module, trunk, pooled }))
    }

    /// The gradient of the image.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let Saved { module, trunk, pooled } = saved;
        let d = self.head.as_ref().map_or(Ok(dy.clone()), |head| head.backward(p, g, &pooled, dy))?;
        let (b, n, c) = (pooled.shape()[0], self.side * self.side, self.dim);
        let mut d_y = Tensor::zeros([b, 1 + n, c]);
        for (out, d) in d_y.data_mut().chunks_exact_mut((1 + n) * c).zip(d.data().chunks_exact(c)) {
            out[..c].copy_from_slice(d);
        }
        let dx = self.trunk.backward(p, g, trunk, &d_y)?;
        let mut d_tokens = Tensor::scratch([b, n, c]);
        for (out, dx) in d_tokens.data_mut().chunks_exact_mut(n * c).zip(dx.data().chunks_exact((1 + n) * c)) {
            elementwise::add(g.get_mut(self.cls_token), &dx[..c]);
            out.copy_from_slice(&dx[c..]);
        }
        self.module.backward(p, g, module, &d_tokens)
    }
}

impl Classifier for T2tVit {
    type Saved = Saved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Saved<f32>)> {
        let (logits, saved) = self.forward(p, images)?;
        Ok((vec![logits], saved))
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Saved<f32>, d: &[Tensor<f32>]) -> Result<()> {
        self.backward(p, g, saved, &d[0]).map(drop)
    }
}

/// Multiply-adds for one image: linear maps and attention's products.
fn macs(config: &Config, size: usize) -> Result<f64> {
    let (module, _) = Layout::build(|names| T2tModule::new(names, config))?;
    let [_, _, [rows, cols]] = module.grids([size; 2])?;
    let (n, c, depth) = (1 + rows * cols, config.positive("embed_dim")?, config.usize("depth")?);
    let hidden = hidden_width(c, config.f64_or("mlp_ratio", 4.0)?)?;
    let block = n * c * (4 * c + 2 * hidden + 2 * n);
    Ok((module.cost(1, [size; 2])?.flops / 2 + depth * block + c * config.usize("num_classes")?) as f64)
}

/// The released networks. Their sizes as published count the frozen table of positions and the Performers' frozen features too.
pub static FAMILY: Family = Family {
    op: "model.t2t_vit",
    common: r#"{"tokens_type": "performer", "in_chans": 3, "token_dim": 64, "kernel_ratio": 0.5, "performer_eps": 1e-8, "norm_eps": 1e-5,
        "qkv_bias": false}"#,
    build: |config| Built::new(|names| T2tVit::new(names, config)),
    at_size: zoo::img_size,
    macs,
    rules: Rules {
        key: weights::keep,
        resize: |name, table, wanted, _| if name == "pos_embed" { resize_pos_embed(1, table, wanted) } else { Ok(None) },
        heads: &["head"],
    },
    variants: &[
        Variant {
            name: "t2t_vit_7",
            also: &[],
            config: r#"{"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2}"#,
            eval: Eval::IMAGENET,
            params: Some(4_255_694),
            gmacs: Some(1.15),
        },
        Variant {
            name: "t2t_vit_10",
            also: &[],
            config: r#"{"embed_dim": 256, "depth": 10, "num_heads": 4, "mlp_ratio": 2}"#,
            eval: Eval::IMAGENET,
            params: Some(5_834_702),
            gmacs: Some(1.52),
        },
        Variant {
            name: "t2t_vit_12",
            also: &[],
            config: r#"{"embed_dim": 256, "depth": 12, "num_heads": 4, "mlp_ratio": 2}"#,
            eval: Eval::IMAGENET,
            params: Some(6_887_374),
            gmacs: Some(1.76),
        },
        Variant {
            name: "t2t_vit_14",
            also: &[],
            config: r#"{"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3}"#,
            eval: Eval::IMAGENET,
            params: Some(21_465_806),
            gmacs: Some(4.78),
        },
        Variant {
            name: "t2t_vit_14_384",
            also: &[],
            config: r#"{"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3}"#,
            eval: Eval::IMAGENET.at(384),
            params: Some(21_465_806),
            gmacs: Some(16.4),
        },
        Variant {
            name: "t2t_vit_19",
            also: &[],
            config: r#"{"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3}"#,
            eval: Eval::IMAGENET,
            params: Some(39_085_070),
            gmacs: Some(8.48),
        },
        Variant {
            name: "t2t_vit_24",
            also: &[],
            config: r#"{"embed_dim": 512, "depth": 24, "num_heads": 8, "mlp_ratio": 3}"#,
            eval: Eval::IMAGENET,
            params: Some(64_000_974),
            gmacs: Some(13.66),
        },
        Variant {
            name: "t2t_vit_t_14",
            also: &[],
            config: r#"{"tokens_type": "transformer", "embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3}"#,
            eval: Eval::IMAGENET,
            params: Some(21_465_422),
            gmacs: Some(6.09),
        },
        Variant {
            name: "t2t_vit_t_19",
            also: &[],
            config: r#"{"tokens_type": "transformer", "embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3}"#,
            eval: Eval::IMAGENET,
            params: Some(39_084_686),
            gmacs: Some(9.79),
        },
        Variant {
            name: "t2t_vit_t_24",
            also: &[],
            config: r#"{"tokens_type": "transformer", "embed_dim": 512, "depth": 24, "num_heads": 8, "mlp_ratio": 3}"#,
            eval: Eval::IMAGENET,
            params: Some(64_000_590),
            gmacs: Some(14.97),
        },
        Variant {
            name: "t2t_vit_14_resnext",
            also: &[],
            config: r#"{"embed_dim": 384, "depth": 14, "num_heads": 32, "mlp_ratio": 3}"#,
            eval: Eval::IMAGENET,
            params: Some(21_465_806),
            gmacs: Some(4.78),
        },
        Variant {
            name: "t2t_vit_14_wide",
            also: &[],
            config: r#"{"embed_dim": 768, "depth": 4, "num_heads": 12, "mlp_ratio": 3}"#,
            eval: Eval::IMAGENET,
            params: Some(25_000_910),
            gmacs: Some(5.23),
        },
        Variant {
            name: "t2t_vit_micro",
            also: &[],
            config: r#"{"embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 2}"#,
            eval: Eval::SMALL,
            params: None,
            gmacs: None,
        },
    ],
};

/// `model.t2t_vit`. `qk_scale` acts on the backbone alone, and stays `d^{−1/2}` unless given: the published weights are loaded that way.
pub struct ModelT2tVit;

impl Operation for ModelT2tVit {
    const NAME: &'static str = "model.t2t_vit";
    const PAPER: &'static str = "2101.11986 T2T-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = sample_module(rng);
        let heads = rng.between(1, 2);
        config.set("img_size", if rng.chance(0.8) { 16 + rng.below(3) } else { 32 + rng.below(3) });
        config.set("num_classes", rng.below(4)).set("embed_dim", heads * rng.between(2, 3)).set("num_heads", heads);
        config.set("depth", rng.below(3)).set("mlp_ratio", rng.range(0.6, 2.0)).set("qkv_bias", rng.chance(0.5));
        config.set("qk_scale", if rng.chance(0.3) { serde_json::json!(rng.range(0.2, 1.0)) } else { serde_json::Value::Null });
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, side) = (draw.size("batch", 1, 2), config.positive("img_size")?);
        draw.normal("image", [batch, config.positive("in_chans")?, side, side]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let image = run.input("image")?;
        let (model, layout) = Layout::build(|names| T2tVit::new(names, run.config()))?;
        let p = run.params(&layout)?;
        let (logits, saved) = model.forward(&p, &image)?;
        run.output("logits", &logits);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let d_logits = run.cotangent("logits", logits.shape())?;
            run.grad_input("image", &model.backward(&p, &mut g, saved, &d_logits)?);
            run.grad_params(&g);
        }
        Ok(())
    }
}
