//! `model.gmm_vit`: a Vision Transformer whose attention logits carry a learned factor (arXiv 2309.05375), and `block.gaussian_mask`, its
//! block: `x ← x + attn(norm x)`, `x ← x + mlp(norm x)`.
//!
//! Patches are flattened (row, column, channel). With a factor ("gmm", "elm") there is no class token: positions, blocks, mean over
//! tokens, head. Without ("none"): class token, positions, blocks, token 0, head. The head is a LayerNorm and a linear map.
//!
//! The published states also hold the fixed distances as `mask`, `…fn.mask.mask`: they take no part.

use crate::attention::gaussian_mask::{GaussianMaskAttention, HeadsSaved, Settings, sample_heads, sample_mask};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::data::transform::Normalization;
use crate::error::{Error, Result};
use crate::kernel::{elementwise, reduce, rows};
use crate::model::network::{Built, Classifier};
use crate::model::stack::{self, Kept};
use crate::model::swin_ops::{mean_tokens, mean_tokens_backward};
use crate::model::weights::{self, Key, Rules};
use crate::model::zoo::{self, Eval, Family, Variant};
use crate::nn::patch_embed::{patchify, unpatchify};
use crate::nn::{DropPath, Init, LayerNorm, Layout, Linear, Mlp, Names, Param, Params, Stats, mlp, xavier_normal};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Shape, Tensor};

const NORM_EPS: f64 = 1e-5;

/// A pre-norm block: `0.norm`, `0.fn` (the attention), `1.norm`, `1.fn.net.0`, `1.fn.net.3`.
#[derive(Clone, Debug)]
pub struct Block {
    norm1: LayerNorm,
    attn: GaussianMaskAttention,
    norm2: LayerNorm,
    mlp: Mlp,
    drops: [DropPath; 2],
}

/// What [`Block::backward`] needs.
pub struct BlockSaved<T: Float> {
    x: Tensor<T>,
    stats1: Stats<T>,
    attn: HeadsSaved<T>,
    middle: Tensor<T>,
    stats2: Stats<T>,
    mlp: mlp::Saved<T>,
}

/// The hidden width of the MLP.
fn hidden(config: &Config, dim: usize) -> Result<usize> {
    let ratio = config.f64("mlp_ratio")?;
    crate::model::vit_block::hidden_width(dim, ratio)
}

impl Block {
    /// Registers the parameters; `drop_path` is the probability that a residual branch is left out in training.
    pub fn new(names: &mut Names, settings: &Settings, hidden: usize, drop_path: f64) -> Result<Self> {
        let dim = settings.dim;
        let norm1 = LayerNorm::new(names.at("0.norm"), dim, NORM_EPS);
        let attn = GaussianMaskAttention::new(&mut names.at("0.fn"), settings)?;
        let norm2 = LayerNorm::new(names.at("1.norm"), dim, NORM_EPS);
        let inits = [xavier_normal(dim, hidden), xavier_normal(hidden, dim)];
        let drops = [DropPath::new(names, drop_path)?, DropPath::new(names, drop_path)?];
        Ok(Block { norm1, attn, norm2, mlp: Mlp::named(names.at("1.fn.net"), ["0", "3"], dim, hidden, inits), drops })
    }

    /// The block's output.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, BlockSaved<T>)> {
        let (normed, stats1) = self.norm1.forward(p, x)?;
        let (middle, attn) = self.drops[0].residual(p, x, |residual| self.attn.forward(p, &normed, residual))?;
        let (normed, stats2) = self.norm2.forward(p, &middle)?;
        let (y, mlp) = self.drops[1].residual(p, &middle, |residual| self.mlp.forward(p, &normed, residual))?;
        Ok((y, BlockSaved { x: x.clone(), stats1, attn, middle, stats2, mlp }))
    }

    /// `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: BlockSaved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let BlockSaved { x, stats1, attn, middle, stats2, mlp } = saved;
        let normed = self.norm2.again(p, &middle, &stats2);
        let d_normed = self.drops[1].backward(p, dy, |d| self.mlp.backward(p, g, &normed, mlp, d))?;
        drop(normed);
        let d_middle = self.norm2.backward(p, g, &middle, &stats2, &d_normed, Some(dy))?;
        drop((d_normed, middle));
        let normed = self.norm1.again(p, &x, &stats1);
        let d_normed = self.drops[0].backward(p, &d_middle, |d| self.attn.backward(p, g, &normed, attn, d))?;
        drop(normed);
        self.norm1.backward(p, g, &x, &stats1, &d_normed, Some(&d_middle))
    }

    /// What a block costs, beside its input.
    pub fn cost(settings: &Settings, hidden: usize, b: usize) -> Result<Cost> {
        let (n, c) = (settings.tokens()?, settings.dim);
        // Kept beside the attention: statistics of both norms, the hidden units, the output. The middle is the attention's output, or a
        // tensor of its own where that is not projected.
        let middle = if settings.heads == 1 && settings.dim_head == c { c } else { 0 };
        let rest = Cost { flops: 4 * b * n * c * hidden, activation_bytes: 4 * b * n * (4 + hidden + c + middle) };
        Ok(settings.cost(b)? + rest)
    }
}

/// `block.gaussian_mask`.
pub struct GaussianMaskBlock;

impl Operation for GaussianMaskBlock {
    const NAME: &'static str = "block.gaussian_mask";
    const PAPER: &'static str = "2309.05375 GMM-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_heads(rng, &mut config);
        // A norm over one channel is constant: nothing to differentiate.
        if config.usize("dim").is_ok_and(|dim| dim < 2) {
            config.set("dim", 3);
        }
        sample_mask(rng, &mut config);
        config.set("mlp_ratio", rng.between(1, 3));
        if rng.chance(0.5) {
            config.set("cls_token", rng.chance(0.5));
        }
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let settings = Settings::from_config(config)?;
        let batch = draw.size("batch", 1, 2);
        draw.normal("x", [batch, settings.tokens()?, settings.dim]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, _, _], settings) = (inputs.dims("x")?, Settings::from_config(config)?);
        Ok(Some(Block::cost(&settings, hidden(config, settings.dim)?, b)?))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (x, settings) = (run.input("x")?, Settings::from_config(run.config())?);
        crate::attention::gaussian_mask::check_tokens(&x, settings.tokens()?)?;
        let hidden = hidden(run.config(), settings.dim)?;
        let (block, layout) = Layout::build(|names| Block::new(names, &settings, hidden, 0.0))?;
        run.unary(&layout, |p, x| block.forward(p, x), |p, g, saved, dy| block.backward(p, g, saved, dy))
    }
}

/// The classifier.
pub struct GmmVit {
    embed: Linear,
    patch: usize,
    image: [usize; 3],
    cls_token: Option<Param>,
    positions: Param,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Linear,
    dim: usize,
}

/// What [`GmmVit::backward`] needs.
pub struct Saved<T: Float> {
    patches: Tensor<T>,
    blocks: Vec<Kept<T, BlockSaved<T>>>,
    pooled: Tensor<T>,
    stats: Stats<T>,
    normed: Tensor<T>,
}

/// The keys of `model.gmm_vit`.
struct ModelSettings {
    block: Settings,
    hidden: usize,
    depth: usize,
    patch: usize,
    image: [usize; 3],
    classes: usize,
    /// Of all layers alike.
    drop_path: f64,
}

impl ModelSettings {
    fn from_config(config: &Config) -> Result<Self> {
        let (side, patch) = (config.positive("img_size")?, config.positive("patch_size")?);
        if !side.is_multiple_of(patch) {
            return Err(Error::config("img_size", format!("expected a multiple of patch_size {patch}, found {side}")));
        }
        let mut block = Settings::from_config(&config.clone().set("grid", vec![side / patch; 2]).clone())?;
        // Without a factor there is a class token.
        block.cls_token = block.mask.kind == "none";
        Ok(ModelSettings {
            hidden: hidden(config, block.dim)?,
            depth: config.usize("depth")?,
            patch,
            image: [config.usize_or("channels", 3)?, side, side],
            classes: config.positive("num_classes")?,
            drop_path: config.f64_or("drop_path_rate", 0.0)?,
            block,
        })
    }
}

impl GmmVit {
    fn new(names: &mut Names, settings: &ModelSettings) -> Result<Self> {
        let ModelSettings { block, hidden, depth, patch, image, classes, drop_path } = settings;
        let (dim, inputs) = (block.dim, Shape::try_new(&[*patch, *patch, image[0]])?.numel());
        let cls_token = block.cls_token.then(|| names.param("cls_token", [1, 1, dim], Init::Normal(1.0)));
        let positions = names.param("pos_embedding", [1, block.tokens()?, dim], Init::Normal(1.0));
        let embed = Linear::new(names.at("to_patch_embedding.1"), inputs, dim, true, xavier_normal(inputs, dim));
        let layer = |i| Block::new(&mut names.at(format!("transformer.layers.{i}")), block, *hidden, *drop_path);
        let blocks = (0..*depth).map(layer).collect::<Result<_>>()?;
        let norm = LayerNorm::new(names.at("mlp_head.0"), dim, NORM_EPS);
        let head = Linear::new(names.at("mlp_head.1"), dim, *classes, true, xavier_normal(dim, *classes));
        Ok(GmmVit { embed, patch: *patch, image: *image, cls_token, positions, blocks, norm, head, dim })
    }

    /// The logits of images `[B, channels, S, S]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let [_, chans, height, width] = x.dims("input `x`")?;
        if [chans, height, width] != self.image {
            let [c, h, w] = self.image;
            return Err(Error::shape("input `x`", format!("[batch, {c}, {h}, {w}]"), x.shape()));
        }
        let patches = patchify(x, self.patch)?;
        let [b, n, _] = patches.dims("patches")?;
        let mut x = self.embed.forward(p, &patches)?;
        if let Some(cls_token) = self.cls_token {
            let mut all = Tensor::scratch([b, n + 1, self.dim]);
            for (to, from) in all.data_mut().chunks_exact_mut((n + 1) * self.dim).zip(x.data().chunks_exact(n * self.dim)) {
                to[..self.dim].copy_from_slice(p.get(cls_token));
                to[self.dim..].copy_from_slice(from);
            }
            x = all;
        }
        rows::add_table(x.data_mut(), p.get(self.positions));
        let (x, blocks) = stack::forward(p, &self.blocks, x, |block, _, x| block.forward(p, &x))?;
        p.show("tokens", &x);
        let pooled = match self.cls_token {
            None => mean_tokens(&x)?,
            Some(_) => {
                let mut first = Tensor::scratch([b, self.dim]);
                for (to, from) in first.data_mut().chunks_exact_mut(self.dim).zip(x.data().chunks_exact((n + 1) * self.dim)) {
                    to.copy_from_slice(&from[..self.dim]);
                }
                first
            }
        };
        let (normed, stats) = self.norm.forward(p, &pooled)?;
        p.show("pooled", &normed);
        Ok((self.head.forward(p, &normed)?, Saved { patches, blocks, pooled, stats, normed }))
    }

    /// Adds the gradients of the parameters; the gradient of the images if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_logits: &Tensor<T>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let Saved { patches, blocks, pooled, stats, normed } = saved;
        let ([b, n, _], c) = (patches.dims::<3>("patches")?, self.dim);
        let d_normed = self.head.backward(p, g, &normed, d_logits)?;
        let d_pooled = self.norm.backward(p, g, &pooled, &stats, &d_normed, None)?;
        let d = match self.cls_token {
            None => mean_tokens_backward(&d_pooled, n)?,
            Some(_) => {
                let mut d = Tensor::zeros([b, n + 1, c]);
                for (to, from) in d.data_mut().chunks_exact_mut((n + 1) * c).zip(d_pooled.data().chunks_exact(c)) {
                    to[..c].copy_from_slice(from);
                }
                d
            }
        };
        let again = |block: &Block, _, x: Tensor<T>| block.forward(p, &x);
        let mut d = stack::backward(&self.blocks, blocks, d, again, |block, _, saved, d| block.backward(p, g, saved, d))?;
        reduce::add_column_sums(g.get_mut(self.positions), d.data());
        if let Some(cls_token) = self.cls_token {
            let mut rest = Tensor::scratch([b, n, c]);
            for (to, from) in rest.data_mut().chunks_exact_mut(n * c).zip(d.data().chunks_exact((n + 1) * c)) {
                elementwise::add(g.get_mut(cls_token), &from[..c]);
                to.copy_from_slice(&from[c..]);
            }
            d = rest;
        }
        self.embed.backward_params(g, &patches, &d)?;
        want_image.then(|| unpatchify(&self.embed.backward_input(p, &d)?, self.image, self.patch)).transpose()
    }
}

impl Classifier for GmmVit {
    type Saved = Saved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Saved<f32>)> {
        let (logits, saved) = self.forward(p, images)?;
        Ok((vec![logits], saved))
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Saved<f32>, d: &[Tensor<f32>]) -> Result<()> {
        self.backward(p, g, saved, &d[0], false).map(drop)
    }
}

/// Multiply-adds for one image: linear maps and attention's two products.
fn macs(config: &Config, _: usize) -> Result<f64> {
    let ModelSettings { block, hidden, depth, patch, image, classes, .. } = ModelSettings::from_config(config)?;
    let (n, c, inner) = (block.tokens()?, block.dim, block.heads * block.dim_head);
    let patches = (image[1] / patch).pow(2) * image[0] * patch * patch * c;
    Ok((patches + depth * n * (4 * inner * c + 2 * n * inner + 2 * c * hidden) + c * classes) as f64)
}

fn build(config: &Config) -> Result<Built> {
    Built::new(|names| GmmVit::new(names, &ModelSettings::from_config(config)?))
}

/// As the authors evaluate on CIFAR-10.
const CIFAR: Eval =
    Eval { size: 32, crop: 1.0, normalization: Normalization { mean: [0.4914, 0.4822, 0.4465], std: [0.2470, 0.2435, 0.2616] } };

/// The networks for images of 32 pixels with Gaussian mixtures, and without. The counts are those of 10 classes and the rows of a head for
/// 990 more.
pub static FAMILY: Family = Family {
    op: "model.gmm_vit",
    common: r#"{"channels": 3, "mlp_ratio": 2, "mask": "gmm", "num_kernels": 5}"#,
    build,
    at_size: zoo::img_size,
    macs,
    // The fixed distances that the mixtures are made of.
    rules: Rules {
        key: |name| if name == "mask" || name.ends_with(".fn.mask.mask") { Key::Drop } else { Key::Keep },
        resize: weights::fixed,
        heads: &["mlp_head.1"],
    },
    variants: &[
        Variant {
            name: "gmm_vit",
            also: &[],
            config: r#"{"dim": 192, "depth": 9, "heads": 12, "dim_head": 16, "patch_size": 4}"#,
            eval: CIFAR,
            params: Some(2_884_192),
            gmacs: Some(0.1848),
        },
        Variant {
            name: "gmm_vit_plain",
            also: &[],
            config: r#"{"dim": 192, "depth": 9, "heads": 12, "dim_head": 16, "patch_size": 4, "mask": "none"}"#,
            eval: CIFAR,
            params: Some(2_883_496),
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_base",
            also: &[],
            config: r#"{"dim": 256, "depth": 8, "heads": 4, "dim_head": 64, "patch_size": 2}"#,
            eval: CIFAR,
            params: Some(4_537_384),
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_base_plain",
            also: &[],
            config: r#"{"dim": 256, "depth": 8, "heads": 4, "dim_head": 64, "patch_size": 2, "mask": "none"}"#,
            eval: CIFAR,
            params: Some(4_537_576),
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_heat",
            also: &[],
            config: r#"{"dim": 192, "depth": 8, "heads": 6, "dim_head": 32, "patch_size": 2}"#,
            eval: CIFAR,
            params: Some(2_617_096),
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_heat_plain",
            also: &[],
            config: r#"{"dim": 192, "depth": 8, "heads": 6, "dim_head": 32, "patch_size": 2, "mask": "none"}"#,
            eval: CIFAR,
            params: Some(2_617_000),
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_d6",
            also: &[],
            config: r#"{"dim": 252, "depth": 6, "heads": 12, "dim_head": 21, "patch_size": 4}"#,
            eval: CIFAR,
            params: Some(3_342_988),
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_d6_plain",
            also: &[],
            config: r#"{"dim": 252, "depth": 6, "heads": 12, "dim_head": 21, "patch_size": 4, "mask": "none"}"#,
            eval: CIFAR,
            params: Some(3_342_772),
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_d15",
            also: &[],
            config: r#"{"dim": 144, "depth": 15, "heads": 12, "dim_head": 12, "patch_size": 4}"#,
            eval: CIFAR,
            params: Some(2_668_960),
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_d15_plain",
            also: &[],
            config: r#"{"dim": 144, "depth": 15, "heads": 12, "dim_head": 12, "patch_size": 4, "mask": "none"}"#,
            eval: CIFAR,
            params: Some(2_667_448),
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_d30",
            also: &[],
            config: r#"{"dim": 72, "depth": 30, "heads": 12, "dim_head": 6, "patch_size": 4}"#,
            eval: CIFAR,
            params: Some(1_346_320),
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_d30_plain",
            also: &[],
            config: r#"{"dim": 72, "depth": 30, "heads": 12, "dim_head": 6, "patch_size": 4, "mask": "none"}"#,
            eval: CIFAR,
            params: Some(1_342_864),
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_d30_w108",
            also: &[],
            config: r#"{"dim": 108, "depth": 30, "heads": 12, "dim_head": 9, "patch_size": 4}"#,
            eval: CIFAR,
            params: None,
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_d30_w108_plain",
            also: &[],
            config: r#"{"dim": 108, "depth": 30, "heads": 12, "dim_head": 9, "patch_size": 4, "mask": "none"}"#,
            eval: CIFAR,
            params: None,
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_d30_w192",
            also: &[],
            config: r#"{"dim": 192, "depth": 30, "heads": 12, "dim_head": 16, "patch_size": 4}"#,
            eval: CIFAR,
            params: None,
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_d30_w192_plain",
            also: &[],
            config: r#"{"dim": 192, "depth": 30, "heads": 12, "dim_head": 16, "patch_size": 4, "mask": "none"}"#,
            eval: CIFAR,
            params: None,
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_d60",
            also: &[],
            config: r#"{"dim": 72, "depth": 60, "heads": 12, "dim_head": 6, "patch_size": 4}"#,
            eval: CIFAR,
            params: None,
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_d60_plain",
            also: &[],
            config: r#"{"dim": 72, "depth": 60, "heads": 12, "dim_head": 6, "patch_size": 4, "mask": "none"}"#,
            eval: CIFAR,
            params: None,
            gmacs: None,
        },
        Variant {
            name: "gmm_vit_micro",
            also: &[],
            config: r#"{"dim": 96, "depth": 5, "heads": 6, "dim_head": 16, "patch_size": 4}"#,
            eval: Eval::SMALL,
            params: None,
            gmacs: None,
        },
    ],
};

/// The same with a learned factor for every pair of tokens.
pub static ELM_FAMILY: Family = Family {
    op: "model.gmm_vit",
    common: r#"{"channels": 3, "mlp_ratio": 2, "mask": "elm", "num_kernels": 5}"#,
    build,
    at_size: zoo::img_size,
    macs,
    rules: Rules { key: |name| if name == "mask" { Key::Drop } else { Key::Keep }, resize: weights::fixed, heads: &["mlp_head.1"] },
    variants: &[
        Variant {
            name: "elm_vit",
            also: &[],
            config: r#"{"dim": 192, "depth": 9, "heads": 12, "dim_head": 16, "patch_size": 4}"#,
            eval: CIFAR,
            params: Some(2_919_976),
            gmacs: None,
        },
        Variant {
            name: "elm_vit_base",
            also: &[],
            config: r#"{"dim": 256, "depth": 8, "heads": 4, "dim_head": 64, "patch_size": 2}"#,
            eval: CIFAR,
            params: Some(5_061_352),
            gmacs: None,
        },
        Variant {
            name: "elm_vit_heat",
            also: &[],
            config: r#"{"dim": 192, "depth": 8, "heads": 6, "dim_head": 32, "patch_size": 2}"#,
            eval: CIFAR,
            params: Some(3_140_904),
            gmacs: None,
        },
        Variant {
            name: "elm_vit_micro",
            also: &[],
            config: r#"{"dim": 96, "depth": 5, "heads": 6, "dim_head": 16, "patch_size": 4}"#,
            eval: Eval::SMALL,
            params: None,
            gmacs: None,
        },
    ],
};

/// `model.gmm_vit`.
pub struct ModelGmmVit;

impl Operation for ModelGmmVit {
    const NAME: &'static str = "model.gmm_vit";
    const PAPER: &'static str = "2309.05375 GMM-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let (heads, patch) = (rng.between(1, 2), rng.between(1, 2));
        config.set("img_size", patch * rng.between(1, 3)).set("patch_size", patch).set("num_classes", rng.between(1, 3));
        config.set("dim", rng.between(2, 4)).set("depth", rng.between(0, 2)).set("heads", heads).set("dim_head", rng.between(1, 3));
        config.set("mlp_ratio", rng.between(1, 2)).set("num_kernels", rng.between(1, 3)).set("mask", rng.pick(&["gmm", "elm", "none"]));
        config.set("channels", rng.between(1, 3));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let [chans, height, width] = ModelSettings::from_config(config)?.image;
        let batch = draw.size("batch", 1, 2);
        draw.normal("x", [batch, chans, height, width]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (x, settings) = (run.input("x")?, ModelSettings::from_config(run.config())?);
        let (model, layout) = Layout::build(|names| GmmVit::new(names, &settings))?;
        let p = run.params(&layout)?;
        let (logits, saved) = model.forward(&p, &x)?;
        run.output("logits", &logits);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let d_logits = run.cotangent("logits", logits.shape())?;
            if let Some(dx) = model.backward(&p, &mut g, saved, &d_logits, true)? {
                run.grad_input("x", &dx);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
