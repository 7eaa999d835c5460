//! `model.pvt`: Pyramid Vision Transformers (arXiv 2102.12122) in two styles.
//!
//! Style `um_mae` (2205.10063): patches, learned positions, the blocks of [`Encoder`]; mean over tokens, `fc_norm`, `head`. Style `pvt_v1`:
//! every stage has its own patch embedding (with norm) and positions; the last one also a class token, which the head reads after `norm`.

use super::network::{Built, Classifier};
use super::pre_norm::{MeanHead, MeanSaved};
use super::pvt::{Block, Encoder, EncoderSaved, Plan, Stages, he};
use super::stack;
use super::vit::{resize_pos_embed, token_row};
use super::vit_block::hidden_width;
use super::weights::{self, Rules};
use super::zoo::{self, Eval, Family, Variant};
use crate::attention::spatial_reduction::Mode;
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::resize::Axis;
use crate::kernel::{elementwise, reduce, rows};
use crate::nn::resize::resize_map;
use crate::nn::{CellConv, Cells, Init, LayerNorm, Layout, Linear, Names, Param, Params, PatchEmbed, Stats, patch_embed, xavier};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Shape, Tensor};

/// What a patch embedding saved, and the gradient of its output.
type Embedded<T> = (patch_embed::Saved<T>, Tensor<T>);

/// The classifier in the style of UM-MAE.
struct UmMae {
    embed: PatchEmbed,
    positions: Param,
    encoder: Encoder,
    plans: Vec<Plan>,
    head: MeanHead,
}

/// What [`UmMae::backward`] needs.
struct UmMaeSaved<T: Float> {
    embed: patch_embed::Saved<T>,
    blocks: EncoderSaved<T>,
    head: MeanSaved<T>,
}

impl UmMae {
    fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let (stages, image, patch, chans) =
            (Stages::from_config(config)?, config.positive("img_size")?, config.positive("patch_size")?, config.positive("in_chans")?);
        let dim = stages.embed_dims[0];
        let embed = PatchEmbed::new(names.at("patch_embed"), [image; 2], patch, chans, dim, None, xavier(chans * patch * patch, dim))?;
        let [side, _] = embed.grid();
        let encoder = Encoder::new(names, &stages)?;
        Ok(UmMae {
            embed,
            plans: encoder.plans(side)?,
            positions: names.param("pos_embed", [1, side * side, dim], Init::ZEROS),
            encoder,
            head: MeanHead::new(names, stages.width(), config.usize("num_classes")?, 1e-6, xavier),
        })
    }

    fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<(Tensor<T>, UmMaeSaved<T>)> {
        let (mut x, embed) = self.embed.forward(p, image, None)?;
        rows::add_table(x.data_mut(), p.get(self.positions));
        let (x, blocks) = self.encoder.forward(p, x, &self.plans)?;
        let (y, head) = self.head.forward(p, &x)?;
        Ok((y, UmMaeSaved { embed, blocks, head }))
    }

    /// What the patch embedding saved, and the gradient of its output.
    fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: UmMaeSaved<T>, dy: &Tensor<T>) -> Result<Embedded<T>> {
        let UmMaeSaved { embed, blocks, head } = saved;
        let d = self.head.backward(p, g, head, dy)?;
        let d = self.encoder.backward(p, g, blocks, &self.plans, &d)?;
        reduce::add_column_sums(g.get_mut(self.positions), d.data());
        Ok((embed, d))
    }
}

/// One stage of PVT v1 behind its patch embedding.
struct StageV1 {
    /// From the tokens of the stage before, with its norm; the first stage embeds the image.
    embed: Option<(CellConv, Cells, LayerNorm)>,
    positions: Param,
    class: Option<Param>,
    blocks: Vec<Block>,
    plan: Plan,
}

struct StageSaved<T: Float> {
    /// What the stage before gave, the convolution's output and the norm's statistics.
    embed: Option<(Tensor<T>, Tensor<T>, Stats<T>)>,
    blocks: EncoderSaved<T>,
}

/// The classifier in the style of PVT v1.
struct V1 {
    embed: PatchEmbed,
    stages: Vec<StageV1>,
    norm: LayerNorm,
    head: Option<Linear>,
}

/// What [`V1::backward`] needs.
struct V1Saved<T: Float> {
    embed: patch_embed::Saved<T>,
    stages: Vec<StageSaved<T>>,
    /// The shape of the last tokens, and the class tokens of the images before the norm and after it.
    tokens: Shape,
    class: Tensor<T>,
    stats: Stats<T>,
    normed: Tensor<T>,
}

impl V1 {
    fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let (of, image, patch, chans) =
            (Stages::from_config(config)?, config.positive("img_size")?, config.positive("patch_size")?, config.positive("in_chans")?);
        let last = of.count() - 1;
        if of.sr_ratios[last] != 1 {
            return Err(Error::config("sr_ratios", "expected 1 in the last stage: with a class token its tokens are no map"));
        }
        let init = xavier(chans * patch * patch, of.embed_dims[0]);
        let embed = PatchEmbed::new(names.at("patch_embed1"), [image; 2], patch, chans, of.embed_dims[0], Some(1e-5), init)?;
        let (mut map, mut stages) = (embed.grid(), Vec::new());
        for i in 0..of.count() {
            let dim = of.embed_dims[i];
            let embed = if i == 0 {
                None
            } else {
                let mut names = names.at(format!("patch_embed{}", i + 1));
                let cells = Cells::dense(map, 2);
                map = map.map(|side| side / 2);
                let conv = CellConv::new(names.at("proj"), of.embed_dims[i - 1], dim, 2, he(2, dim))?;
                Some((conv, cells, LayerNorm::new(names.at("norm"), dim, 1e-5)))
            };
            if map[0] == 0 {
                return Err(Error::config("img_size", format!("expected room for {} stages, found {image}", of.count())));
            }
            let class = (i == last).then(|| names.param("cls_token", [1, 1, dim], Init::NORMAL_02));
            let rows = map[0] * map[1] + usize::from(class.is_some());
            let positions = names.param(&format!("pos_embed{}", i + 1), [1, rows, dim], Init::NORMAL_02);
            let settings = |b| of.block([i, b], Mode::Conv, 1e-6, map, None);
            let block = |b| Block::new(&mut names.at(format!("block{}.{b}", i + 1)), settings(b));
            let blocks = (0..of.depths[i]).map(block).collect::<Result<_>>()?;
            stages.push(StageV1 { embed, positions, class, blocks, plan: settings(0).plan()? });
        }
        let norm = LayerNorm::new(names.at("norm"), of.width(), 1e-6);
        let classes = config.usize("num_classes")?;
        let head = (classes > 0).then(|| Linear::new(names.at("head"), of.width(), classes, true, Init::NORMAL_02));
        Ok(V1 { embed, stages, norm, head })
    }

    fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<(Tensor<T>, V1Saved<T>)> {
        let (mut x, embed) = self.embed.forward(p, image, None)?;
        let mut stages = Vec::with_capacity(self.stages.len());
        for (i, stage) in self.stages.iter().enumerate() {
            let embed = match &stage.embed {
                None => None,
                Some((conv, cells, norm)) => {
                    let c = conv.forward(p, &x, cells)?;
                    let (y, stats) = norm.forward(p, &c)?;
                    Some((std::mem::replace(&mut x, y), c, stats))
                }
            };
            if let Some(class) = stage.class {
                x = with_class(&x, p.get(class))?;
            }
            rows::add_table(x.data_mut(), p.get(stage.positions));
            let (y, blocks) = stack::forward(p, &stage.blocks, x, |block, _, x| block.forward(p, x, &stage.plan))?;
            p.show(format!("stages.{i}"), &y);
            x = y;
            stages.push(StageSaved { embed, blocks });
        }
        // The norm works on every token by itself: that of the class token is enough.
        let (tokens, class) = (x.shape(), token_row(&x, 0)?);
        drop(x);
        let (normed, stats) = self.norm.forward(p, &class)?;
        p.show("pooled", &normed);
        let y = self.head.as_ref().map_or(Ok(normed.clone()), |head| head.forward(p, &normed))?;
        Ok((y, V1Saved { embed, stages, tokens, class, stats, normed }))
    }

    /// What the patch embedding saved, and the gradient of its output.
    fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: V1Saved<T>, dy: &Tensor<T>) -> Result<Embedded<T>> {
        let V1Saved { embed, stages, tokens, class, stats, normed } = saved;
        let d_normed = self.head.as_ref().map_or(Ok(dy.clone()), |head| head.backward(p, g, &normed, dy))?;
        let d_class = self.norm.backward(p, g, &class, &stats, &d_normed, None)?;
        let mut d = Tensor::zeros(tokens);
        let (n, dim) = (tokens[1], tokens[2]);
        d.data_mut().chunks_exact_mut(n * dim).zip(d_class.data().chunks_exact(dim)).for_each(|(x, y)| x[..dim].copy_from_slice(y));
        for (stage, saved) in self.stages.iter().zip(stages).rev() {
            let again = |block: &Block, _, x| block.forward(p, x, &stage.plan);
            let back = |block: &Block, _, saved, d: &Tensor<T>| block.backward(p, g, saved, &stage.plan, d);
            d = stack::backward(&stage.blocks, saved.blocks, d, again, back)?;
            reduce::add_column_sums(g.get_mut(stage.positions), d.data());
            if let Some(class) = stage.class {
                d = without_class(&d, g.get_mut(class))?;
            }
            if let (Some((conv, cells, norm)), Some((x, c, stats))) = (&stage.embed, saved.embed) {
                let dc = norm.backward(p, g, &c, &stats, &d, None)?;
                d = conv.backward(p, g, &x, cells, &dc)?;
            }
        }
        Ok((embed, d))
    }
}

/// `[B, N, C]` → `[B, 1 + N, C]`.
fn with_class<T: Float>(x: &Tensor<T>, class: &[T]) -> Result<Tensor<T>> {
    let [batch, n, c] = x.dims("tokens")?;
    let mut y = Tensor::scratch([batch, 1 + n, c]);
    for (y, x) in y.data_mut().chunks_exact_mut((1 + n) * c).zip(x.data().chunks_exact(n * c)) {
        y[..c].copy_from_slice(class);
        y[c..].copy_from_slice(x);
    }
    Ok(y)
}

/// Backward of [`with_class`]: adds to `d_class`, returns the gradient of the other tokens.
fn without_class<T: Float>(dy: &Tensor<T>, d_class: &mut [T]) -> Result<Tensor<T>> {
    let [batch, n, c] = dy.dims("tokens")?;
    let mut dx = Tensor::scratch([batch, n - 1, c]);
    for (dy, dx) in dy.data().chunks_exact(n * c).zip(dx.data_mut().chunks_exact_mut((n - 1) * c)) {
        elementwise::add(d_class, &dy[..c]);
        dx.copy_from_slice(&dy[c..]);
    }
    Ok(dx)
}

impl Classifier for UmMae {
    type Saved = UmMaeSaved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Self::Saved)> {
        let (logits, saved) = self.forward(p, images)?;
        Ok((vec![logits], saved))
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Self::Saved, d: &[Tensor<f32>]) -> Result<()> {
        let (embed, d) = self.backward(p, g, saved, &d[0])?;
        self.embed.backward_params(p, g, &embed, &d).map(drop)
    }
}

impl Classifier for V1 {
    type Saved = V1Saved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Self::Saved)> {
        let (logits, saved) = self.forward(p, images)?;
        Ok((vec![logits], saved))
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Self::Saved, d: &[Tensor<f32>]) -> Result<()> {
        let (embed, d) = self.backward(p, g, saved, &d[0])?;
        self.embed.backward_params(p, g, &embed, &d).map(drop)
    }
}

fn is_v1(config: &Config) -> Result<bool> {
    Ok(config.choice("style", &["um_mae", "pvt_v1"])? == "pvt_v1")
}

/// Multiply-adds for one image: convolutions, linear maps and attention's two products.
fn macs(config: &Config, size: usize) -> Result<f64> {
    let (of, v1, patch) = (Stages::from_config(config)?, is_v1(config)?, config.positive("patch_size")?);
    let mut side = size / patch;
    let mut macs = side * side * of.embed_dims[0] * config.positive("in_chans")? * patch * patch;
    for i in 0..of.count() {
        let c = of.embed_dims[i];
        if i > 0 {
            side /= 2;
            macs += side * side * 4 * of.embed_dims[i - 1] * c;
        }
        let (r, last) = (of.sr_ratios[i].max(1), i + 1 == of.count());
        // The class token is one more, and reduction then none.
        let n = side * side + usize::from(v1 && last);
        let keys = if r == 1 { n } else { (side / r).pow(2) };
        let reduction = match v1 {
            true if r == 1 => 0,
            true => keys * r * r * c * c,
            false => keys * c * c,
        };
        let linear = 2 * n * c * c + 2 * keys * c * c + 2 * n * c * hidden_width(c, of.mlp_ratios[i])?;
        macs += of.depths[i] * (linear + reduction + 2 * n * keys * c);
    }
    Ok((macs + of.width() * config.usize("num_classes")?) as f64)
}

/// Tables of positions for other grids: bicubic as in MAE's fine-tuning, or bilinear as in PVT's own code, whose last stage has a row for
/// the class token.
fn resize(name: &str, table: &Tensor<f32>, wanted: Shape, config: &Config) -> Result<Option<Tensor<f32>>> {
    if !name.starts_with("pos_embed") {
        return Ok(None);
    }
    if !is_v1(config)? {
        return resize_pos_embed(0, table, wanted);
    }
    let prefix = usize::from(name == format!("pos_embed{}", Stages::from_config(config)?.count()));
    let ([_, rows, c], [_, wanted_rows, wanted_c]) = (table.dims::<3>("pos_embed")?, wanted.dims::<3>("pos_embed")?);
    let side = |rows: usize| rows.checked_sub(prefix).map(usize::isqrt).filter(|s| s * s + prefix == rows && *s > 0);
    let (Some(old), Some(new), true) = (side(rows), side(wanted_rows), c == wanted_c) else { return Ok(None) };
    let (class, map) = table.data().split_at(prefix * c);
    let axis = Axis::bilinear(old, new, false);
    let resized = resize_map(&Tensor::new([1, old, old, c], map)?, &axis, &axis)?;
    Tensor::new(wanted, &[class, resized.data()].concat()).map(Some)
}

/// PVT v1 and the one that UM-MAE fine-tunes.
pub static FAMILY: Family = Family {
    op: "model.pvt",
    common: r#"{"style": "pvt_v1", "patch_size": 4, "in_chans": 3, "embed_dims": [64, 128, 320, 512], "num_heads": [1, 2, 5, 8],
        "mlp_ratios": [8, 8, 4, 4], "sr_ratios": [8, 4, 2, 1]}"#,
    build: |config| match is_v1(config)? {
        true => Built::new(|names| V1::new(names, config)),
        false => Built::new(|names| UmMae::new(names, config)),
    },
    at_size: zoo::img_size,
    macs,
    rules: Rules { key: weights::keep, resize, heads: &["head"] },
    variants: &[
        Variant {
            name: "pvt_tiny",
            also: &[],
            config: r#"{"depths": [2, 2, 2, 2]}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(13_229_288),
            gmacs: Some(1.93),
        },
        Variant {
            name: "pvt_small",
            also: &[],
            config: r#"{"depths": [3, 4, 6, 3]}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(24_485_864),
            gmacs: Some(3.82),
        },
        Variant {
            name: "pvt_medium",
            also: &[],
            config: r#"{"depths": [3, 4, 18, 3]}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(44_208_104),
            gmacs: Some(6.66),
        },
        Variant {
            name: "pvt_large",
            also: &[],
            config: r#"{"depths": [3, 8, 27, 3]}"#,
            eval: Eval::IMAGENET.crop(0.875),
            params: Some(61_369_320),
            gmacs: Some(9.81),
        },
        Variant {
            name: "pvt_small_256",
            also: &[],
            config: r#"{"style": "um_mae", "depths": [3, 4, 6, 3]}"#,
            eval: Eval::IMAGENET.at(256).crop(1.0),
            params: Some(21_546_728),
            gmacs: Some(4.85),
        },
        Variant {
            name: "pvt_micro",
            also: &[],
            config: r#"{"style": "um_mae", "patch_size": 2, "embed_dims": [32, 64, 128], "depths": [2, 2, 2], "num_heads": [1, 2, 4],
                "mlp_ratios": [4, 4, 4], "sr_ratios": [4, 2, 1]}"#,
            eval: Eval::SMALL,
            params: None,
            gmacs: None,
        },
    ],
};

/// `model.pvt`.
pub struct ModelPvt;

impl Operation for ModelPvt {
    const NAME: &'static str = "model.pvt";
    const PAPER: &'static str = "2102.12122 PVT";

    fn sample(rng: &mut Rng) -> Config {
        let (stages, patch) = (rng.between(1, 3), rng.between(1, 2));
        let style = rng.pick(&["um_mae", "pvt_v1"]);
        let mut config = Config::default();
        let side = (1 << (stages - 1)) * rng.between(1, 2) + rng.below(2);
        config.set("style", style).set("img_size", side * patch).set("patch_size", patch).set("in_chans", rng.between(1, 3));
        config.set("num_classes", rng.below(4));
        let heads: Vec<usize> = (0..stages).map(|_| rng.between(1, 2)).collect();
        config.set("embed_dims", heads.iter().map(|heads| heads * rng.between(2, 3)).collect::<Vec<_>>()).set("num_heads", heads);
        config.set("depths", (0..stages).map(|_| rng.between(1, 2)).collect::<Vec<_>>());
        config.set("mlp_ratios", (0..stages).map(|_| rng.between(1, 2)).collect::<Vec<_>>());
        let ratio = |i: usize, rng: &mut Rng| if style == "pvt_v1" && i + 1 == stages { 1 } else { rng.between(1, side >> i) };
        config.set("sr_ratios", (0..stages).map(|i| ratio(i, rng)).collect::<Vec<_>>());
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, side) = (draw.size("batch", 1, 2), config.positive("img_size")?);
        draw.normal("x", [batch, config.positive("in_chans")?, side, side]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (config, x) = (run.config(), run.input("x")?);
        let [batch, _, _, _] = x.dims("input `x`")?;
        let side = config.positive("img_size")?;
        x.expect_shape("input `x`", [batch, config.positive("in_chans")?, side, side])?;
        macro_rules! run {
            ($model:ident) => {{
                let (model, layout) = Layout::build(|names| $model::new(names, config))?;
                run.unary(
                    &layout,
                    |p, x| model.forward(p, x),
                    |p, g, saved, dy| {
                        let (embed, d) = model.backward(p, g, saved, dy)?;
                        model.embed.backward(p, g, &embed, &d, None)
                    },
                )
            }};
        }
        if is_v1(config)? { run!(V1) } else { run!(UmMae) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PVT's tables grow bilinearly: linear in the rows of the grid, clamped at the border; the class token's row of the last one stays.
    #[test]
    fn positions_for_other_sizes() {
        let mut config = Config::parse(FAMILY.common).unwrap();
        config.set("depths", vec![1; 4]);
        let table = Tensor::from_fn([1, 5, 1], |i| [9.0, 0.0, 0.0, 2.0, 2.0][i]);
        let resized = |name: &str, table: &Tensor<f32>, rows: usize| resize(name, table, [1, rows, 1].into(), &config).unwrap();
        let last = resized("pos_embed4", &table, 17).unwrap();
        let rows: Vec<f32> = last.data()[1..].chunks(4).map(|row| row[0]).collect();
        assert_eq!((last.data()[0], rows), (9.0, vec![0.0, 0.5, 1.5, 2.0]));
        assert!(resized("pos_embed1", &table, 16).is_none(), "five rows are no square");
        assert!(resized("head.weight", &table, 16).is_none());
        config.set("style", "um_mae");
        let cubic = resize("pos_embed", &Tensor::from_fn([1, 4, 1], |i| (i / 2 * 2) as f32), [1, 16, 1].into(), &config).unwrap().unwrap();
        assert!(cubic.data()[0] < -0.01, "bicubic interpolation overshoots");
    }
}
