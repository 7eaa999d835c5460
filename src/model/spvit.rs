//! `model.spvit`: a DeiT whose layers are attention, convolutions or nothing, searched or finished (SPViT, arXiv 2111.11802).
//!
//! A search also gives its expected FLOPs and their loss, which is part of the objective.

use super::spvit_block::{Arrangement, Block, BlockSaved, Noise, Search, SearchLoss, finished_macs, key, sample_layer};
use crate::attention::single_path::{Mode, Settings};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::attention::Groups;
use crate::kernel::{elementwise, reduce, rows};
use crate::model::network::{Built, Classifier};
use crate::model::stack::{self, Kept};
use crate::model::vit::{resize_pos_embed, token_row};
use crate::model::vit_block::hidden_width;
use crate::model::weights::Rules;
use crate::model::zoo::{Eval, Family, Variant};
use crate::nn::batch_norm::Updates;
use crate::nn::spvit_gate::{FlopsLoss, Gates, noise};
use crate::nn::{DropPath, Init, LayerNorm, Layout, Linear, Names, Param, Params, PatchEmbed, Stats, normal_02, patch_embed};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The keys of `model.spvit`.
struct ModelSettings {
    search: Search,
    image: usize,
    patch: usize,
    chans: usize,
    classes: usize,
    dim: usize,
    heads: usize,
    modes: Vec<Mode>,
    hidden: Vec<usize>,
    qkv_bias: bool,
}

impl ModelSettings {
    fn from_config(config: &Config) -> Result<Self> {
        let search = Search::from_config(config, 0.01, 1e-6)?;
        let (dim, depth, heads) = (config.positive("embed_dim")?, config.usize("depth")?, config.positive("num_heads")?);
        if depth > 1 << 10 || !dim.is_multiple_of(heads) {
            return Err(Error::config("depth", format!("expected at most 1024 layers and whole heads, found {depth}, {dim} over {heads}")));
        }
        let indicators = config.get("msa_indicators").and_then(serde_json::Value::as_array);
        let modes = (0..depth).map(|i| search.mode(indicators.and_then(|list| list.get(i)))).collect::<Result<Vec<_>>>()?;
        let hidden = if search.search { vec![hidden_width(dim, config.f64("mlp_ratio")?)?; depth] } else { config.usizes("ffn_hidden")? };
        if hidden.len() != depth || hidden.contains(&0) {
            return Err(Error::config("ffn_hidden", format!("expected {depth} positive widths, found {hidden:?}")));
        }
        Ok(ModelSettings {
            search,
            image: config.positive("image_size")?,
            patch: config.positive("patch_size")?,
            chans: config.positive("in_chans")?,
            classes: config.positive("num_classes")?,
            dim,
            heads,
            modes,
            hidden,
            qkv_bias: config.bool_or("qkv_bias", true)?,
        })
    }

    fn layer(&self, mode: Mode) -> Settings {
        let Search { alpha, own_conv, .. } = self.search;
        Settings { dim: self.dim, heads: self.heads, mode, alpha, qkv_bias: self.qkv_bias, class: true, window: None, own_conv }
    }
}

/// SPViT-DeiT.
struct Spvit {
    embed: PatchEmbed,
    cls_token: Param,
    positions: Param,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Linear,
    settings: ModelSettings,
}

struct Saved<T: Float> {
    embed: patch_embed::Saved<T>,
    blocks: Vec<Kept<T, BlockSaved<T>>>,
    updates: Updates<T>,
    gates: Vec<(Gates, Gates)>,
    first: Tensor<T>,
    stats: Stats<T>,
    normed: Tensor<T>,
}

impl Spvit {
    fn new(names: &mut Names, settings: ModelSettings) -> Result<Self> {
        let (dim, eps) = (settings.dim, settings.search.norm_eps);
        let embed =
            PatchEmbed::new(names.at("patch_embed"), [settings.image; 2], settings.patch, settings.chans, dim, None, Init::NORMAL_02)?;
        let [h, w] = embed.grid();
        let drop_path = |i| DropPath::linear(settings.search.drop_path, i, settings.modes.len());
        let blocks = (settings.modes.iter().zip(&settings.hidden).enumerate())
            .map(|(i, (&mode, &hidden))| Block::new(&mut names.at(format!("blocks.{i}")), settings.layer(mode), hidden, eps, drop_path(i)))
            .collect::<Result<_>>()?;
        Ok(Spvit {
            embed,
            cls_token: names.param("cls_token", [1, 1, dim], Init::NORMAL_02),
            positions: names.param("pos_embed", [1, 1 + h * w, dim], Init::NORMAL_02),
            blocks,
            norm: LayerNorm::new(names.at("norm"), dim, eps),
            head: Linear::new(names.at("head"), dim, settings.classes, true, normal_02(dim, dim)),
            settings,
        })
    }

    fn arrangement<T: Float>(&self, batch: usize) -> Arrangement<T> {
        let [h, w] = self.embed.grid();
        let n = 1 + h * w;
        Arrangement { index: None, attend: [batch, n], groups: Groups::all(n, n), mask: None, map: [batch, h, w] }
    }

    fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, noises: &[Noise<T>]) -> Result<(Tensor<T>, Saved<T>)> {
        let (patches, embed) = self.embed.forward(p, image, None)?;
        let [batch, n, c] = patches.dims("patches")?;
        let mut x = Tensor::scratch([batch, n + 1, c]);
        for (to, from) in x.data_mut().chunks_exact_mut((n + 1) * c).zip(patches.data().chunks_exact(n * c)) {
            to[..c].copy_from_slice(p.get(self.cls_token));
            to[c..].copy_from_slice(from);
        }
        rows::add_table(x.data_mut(), p.get(self.positions));
        let arrangement = self.arrangement(batch);
        let (training, mut updates, mut gates) = (self.settings.search.trains(p), Vec::new(), Vec::new());
        let (x, blocks) = stack::forward(p, &self.blocks, x, |block, i, x| {
            let noise = noises.get(i).copied().unwrap_or_default();
            let (y, mut saved) = block.forward(p, &x, &arrangement, training, noise)?;
            updates.extend(saved.take_updates());
            gates.extend(saved.gates());
            Ok((y, saved))
        })?;
        p.show("tokens", &x);
        // Only the class token reaches the head, and the norm sees tokens one by one.
        let first = token_row(&x, 0)?;
        let (normed, stats) = self.norm.forward(p, &first)?;
        p.show("pooled", &normed);
        Ok((self.head.forward(p, &normed)?, Saved { embed, blocks, updates, gates, first, stats, normed }))
    }

    /// What the patch embedding saved, and the gradient of its output.
    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_logits: &Tensor<T>,
        d_expected: &[([T; 3], Vec<T>)],
    ) -> Result<(patch_embed::Saved<T>, Tensor<T>)> {
        let Saved { embed, blocks, first, stats, normed, .. } = saved;
        let d_normed = self.head.backward(p, g, &normed, d_logits)?;
        let d_first = self.norm.backward(p, g, &first, &stats, &d_normed, None)?;
        let [batch, c] = d_first.dims("class tokens")?;
        let [h, w] = self.embed.grid();
        let n = h * w;
        let mut d = Tensor::zeros([batch, n + 1, c]);
        for (to, from) in d.data_mut().chunks_exact_mut((n + 1) * c).zip(d_first.data().chunks_exact(c)) {
            to[..c].copy_from_slice(from);
        }
        let arrangement = self.arrangement(batch);
        // Only finished networks are recomputed: they have no noise.
        let again = |block: &Block, _, x: Tensor<T>| block.forward(p, &x, &arrangement, self.settings.search.trains(p), [None, None]);
        let back = |block: &Block, i, saved, d: &Tensor<T>| block.backward(p, g, saved, &arrangement, d, d_expected.get(i));
        d = stack::backward(&self.blocks, blocks, d, again, back)?;
        reduce::add_column_sums(g.get_mut(self.positions), d.data());
        let mut d_patches = Tensor::scratch([batch, n, c]);
        for (to, from) in d_patches.data_mut().chunks_exact_mut(n * c).zip(d.data().chunks_exact((n + 1) * c)) {
            elementwise::add(g.get_mut(self.cls_token), &from[..c]);
            to.copy_from_slice(&from[c..]);
        }
        Ok((embed, d_patches))
    }
}

impl Classifier for Spvit {
    type Saved = Saved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Saved<f32>)> {
        let (logits, saved) = self.forward(p, images, &[])?;
        Ok((vec![logits], saved))
    }

    fn updates(saved: &mut Saved<f32>) -> Updates<f32> {
        std::mem::take(&mut saved.updates)
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Saved<f32>, d: &[Tensor<f32>]) -> Result<()> {
        let (embed, d) = self.backward(p, g, saved, &d[0], &[])?;
        self.embed.backward_params(p, g, &embed, &d).map(drop)
    }
}

/// The finished DeiTs, as fine-tuned and (`_folded`) with their convolutions made plain.
pub static FAMILY: Family = Family {
    op: "model.spvit",
    common: r#"{"patch_size": 16, "in_chans": 3, "depth": 12, "mlp_ratio": 4.0, "qkv_bias": true, "mode": "finetune"}"#,
    build: |config| {
        let settings = ModelSettings::from_config(config)?;
        settings.search.finished()?;
        Built::new(|names| Spvit::new(names, settings))
    },
    at_size: |config, size| {
        config.set("image_size", size);
    },
    macs: |config, _| {
        let s = ModelSettings::from_config(config)?;
        let loss = FlopsLoss::deit([s.image, s.patch, s.chans], s.classes, [s.dim, s.modes.len(), s.heads], 0.0, 0.0)?;
        Ok(finished_macs(&loss, s.modes.into_iter().zip(s.hidden)))
    },
    rules: Rules {
        key,
        resize: |name, table, wanted, _| if name == "pos_embed" { resize_pos_embed(1, table, wanted) } else { Ok(None) },
        heads: &["head"],
    },
    variants: &[
        Variant {
            name: "spvit_deit_ti_l200_t10",
            also: &[],
            config: r#"{"embed_dim": 192, "num_heads": 3,
                "msa_indicators": [[1,0,0], [1,0,0], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1]],
                "ffn_hidden": [744, 758, 764, 767, 766, 764, 756, 659, 633, 473, 179, 145]}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(4_873_422),
            gmacs: Some(1.037),
        },
        Variant {
            name: "spvit_deit_ti_l200_t10_folded",
            also: &[],
            config: r#"{"embed_dim": 192, "num_heads": 3,
                "msa_indicators": [[1,0,0], [1,0,0], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1]],
                "ffn_hidden": [744, 758, 764, 767, 766, 764, 756, 659, 633, 473, 179, 145], "param_opt": true}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(4_774_808),
            gmacs: Some(1.037),
        },
        Variant {
            name: "spvit_deit_s_l30_t32",
            also: &[],
            config: r#"{"embed_dim": 384, "num_heads": 6,
                "msa_indicators": [[1,0,0], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1]],
                "ffn_hidden": [1304, 1399, 1344, 1214, 1251, 1183, 1140, 925, 742, 391, 104, 103]}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(16_116_858),
            gmacs: Some(3.347),
        },
        Variant {
            name: "spvit_deit_s_l30_t32_folded",
            also: &[],
            config: r#"{"embed_dim": 384, "num_heads": 6,
                "msa_indicators": [[1,0,0], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1]],
                "ffn_hidden": [1304, 1399, 1344, 1214, 1251, 1183, 1140, 925, 742, 391, 104, 103], "param_opt": true}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(15_870_724),
            gmacs: Some(3.347),
        },
        Variant {
            name: "spvit_deit_b_l008_t60",
            also: &[],
            config: r#"{"embed_dim": 768, "num_heads": 12,
                "msa_indicators": [[1,0,0], [1,0,0], [1,0,0], [1,1,0], [1,1,0], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1]],
                "ffn_hidden": [1118, 489, 1050, 1345, 1336, 1326, 1431, 1564, 1606, 1702, 1290, 190]}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(46_207_987),
            gmacs: Some(8.391),
        },
        Variant {
            name: "spvit_deit_b_l008_t60_folded",
            also: &[],
            config: r#"{"embed_dim": 768, "num_heads": 12,
                "msa_indicators": [[1,0,0], [1,0,0], [1,0,0], [1,1,0], [1,1,0], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1]],
                "ffn_hidden": [1118, 489, 1050, 1345, 1336, 1326, 1431, 1564, 1606, 1702, 1290, 190], "param_opt": true}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(41_583_639),
            gmacs: Some(8.391),
        },
        Variant {
            name: "spvit_deit_b_l006_t100",
            also: &[],
            config: r#"{"embed_dim": 768, "num_heads": 12,
                "msa_indicators": [[1,0,0], [1,0,0], [1,0,0], [1,1,0], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1]],
                "ffn_hidden": [1253, 610, 1343, 1912, 2354, 2306, 2483, 2753, 2869, 2860, 2443, 934]}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(62_256_336),
            gmacs: Some(11.73),
        },
        Variant {
            name: "spvit_deit_b_l006_t100_folded",
            also: &[],
            config: r#"{"embed_dim": 768, "num_heads": 12,
                "msa_indicators": [[1,0,0], [1,0,0], [1,0,0], [1,1,0], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1], [1,1,1]],
                "ffn_hidden": [1253, 610, 1343, 1912, 2354, 2306, 2483, 2753, 2869, 2860, 2443, 934], "param_opt": true}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(58_320_928),
            gmacs: Some(11.73),
        },
        Variant {
            name: "spvit_deit_micro",
            also: &[],
            config: r#"{"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3,
                "msa_indicators": [[1,0,0], [1,1,0], [1,1,1], [1,1,1], [0,0,0], [1,1,1]],
                "ffn_hidden": [192, 192, 192, 192, 192, 192]}"#,
            eval: Eval::SMALL,
            params: None,
            gmacs: None,
        },
    ],
};

/// `model.spvit`.
pub struct ModelSpvit;

impl Operation for ModelSpvit {
    const NAME: &'static str = "model.spvit";
    const PAPER: &'static str = "2111.11802 SPViT";
    const DATA: &'static [&'static str] = &["u_kernel", "u_ffn"];

    fn sample(rng: &mut Rng) -> Config {
        let (heads, patch, depth, mut config) = (rng.between(1, 2), rng.between(1, 2), rng.between(1, 2), Config::default());
        config.set("image_size", patch * rng.between(2, 3)).set("patch_size", patch).set("in_chans", rng.between(1, 2));
        config.set("num_classes", rng.between(1, 3)).set("embed_dim", heads * rng.between(2, 3)).set("depth", depth);
        config.set("num_heads", heads).set("mlp_ratio", rng.between(1, 2)).set("qkv_bias", true).set("alpha", rng.range(0.1, 1.0));
        config.set("norm_eps", 1e-6).set("training", rng.chance(0.5)).set("param_opt", rng.chance(0.4));
        if rng.chance(0.5) {
            config.set("mode", "search").set("target_flops", rng.range(0.0, 1e-4)).set("loss_lambda", 1e5);
        } else {
            let (indicators, hidden): (Vec<_>, Vec<_>) = (0..depth).map(|_| sample_layer(rng)).unzip();
            config.set("mode", "finetune").set("msa_indicators", indicators).set("ffn_hidden", hidden);
        }
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let settings = ModelSettings::from_config(config)?;
        let batch = draw.size("batch", 1, 2);
        draw.normal("x", [batch, settings.chans, settings.image, settings.image]);
        if settings.search.search && settings.search.training {
            draw.uniform("u_kernel", [settings.modes.len(), 3]);
            draw.uniform("u_ffn", [settings.hidden.len(), settings.hidden.first().copied().unwrap_or(0)]);
        }
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (x, config) = (run.input("x")?, run.config());
        let settings = ModelSettings::from_config(config)?;
        let (search, depth, hidden) = (settings.search.search, settings.modes.len(), settings.hidden.clone());
        let width = hidden.first().copied().unwrap_or(0);
        let loss = if search {
            let sizes = [settings.image, settings.patch, settings.chans];
            let (target, lambda) = (config.f64("target_flops")?, config.f64("loss_lambda")?);
            Some(FlopsLoss::deit(sizes, settings.classes, [settings.dim, depth, settings.heads], target, lambda)?)
        } else {
            None
        };
        let noisy = search && settings.search.training;
        let (u_kernel, u_ffn) = (noise(run, "u_kernel", [depth, 3], noisy)?, noise(run, "u_ffn", [depth, width], noisy)?);
        let row = |u: &'_ Option<Tensor<T>>, i: usize, width: usize| u.as_ref().map(|u| u.data()[i * width..(i + 1) * width].to_vec());
        let rows: Vec<[Option<Vec<T>>; 2]> = (0..depth).map(|i| [row(&u_kernel, i, 3), row(&u_ffn, i, width)]).collect();
        let noises: Vec<Noise<T>> = rows.iter().map(|pair| [pair[0].as_deref(), pair[1].as_deref()]).collect();
        let (model, layout) = Layout::build(|names| Spvit::new(names, settings))?;
        let p = run.params(&layout)?;
        let (logits, mut saved) = model.forward(&p, &x, &noises)?;
        run.output("logits", &logits);
        run.after_buffers(&layout, std::mem::take(&mut saved.updates));
        let gates = std::mem::take(&mut saved.gates);
        let loss = loss.map(|loss| SearchLoss::output(run, loss, gates, hidden));
        if run.backward() {
            let (mut g, d_logits) = (run.zero_grads(&p), run.cotangent("logits", logits.shape())?);
            let d_expected = loss.map_or(Ok(Vec::new()), |loss| loss.backward(run))?;
            let (embed, d) = model.backward(&p, &mut g, saved, &d_logits, &d_expected)?;
            run.grad_input("x", &model.embed.backward(&p, &mut g, &embed, &d, None)?);
            run.grad_params(&g);
        }
        Ok(())
    }
}
