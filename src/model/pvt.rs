//! Pyramid Vision Transformer (arXiv 2102.12122) in two styles: `block.pvt`, `model.pvt`; and the encoder that UM-MAE (2205.10063)
//! pre-trains.
//!
//! Style `um_mae`: patches, learned positions, blocks numbered through all stages, of which the first of every later stage starts with a
//! 2×2 convolution of stride 2; mean over tokens, `fc_norm`, `head`. Style `pvt_v1`: every stage has its own patch embedding (with norm)
//! and positions; the last one also a class token, which the head reads after `norm`.

use super::pre_norm::{self, MeanHead, PreNorm};
use crate::attention::spatial_reduction::{self, Mode, Settings, SpatialReduction, check_reduction};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::{elementwise, reduce, rows};
use crate::nn::{CellConv, Cells, Init, LayerNorm, Layout, Linear, Names, Param, Params, PatchEmbed, Stats, xavier};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// What a block is made of.
#[derive(Clone, Copy, Debug)]
pub struct BlockSettings {
    /// The attention.
    pub attention: Settings,
    /// Hidden width of the MLP over C, truncated.
    pub mlp_ratio: f64,
    /// ε of `norm1` and `norm2`.
    pub norm_eps: f64,
    /// Channels that the leading convolution reads, if there is one.
    pub downsample_from: Option<usize>,
    /// Rows and columns of the block's input.
    pub map: [usize; 2],
}

/// A block: `downsample.proj`, `norm1`, `attn`, `norm2`, `mlp`.
#[derive(Clone, Debug)]
pub struct Block {
    downsample: Option<CellConv>,
    attn: SpatialReduction,
    pre_norm: PreNorm,
}

/// The cells of a block on a map: of its leading convolution, and of its reduction.
#[derive(Clone, Debug)]
pub struct Plan {
    downsample: Cells,
    reduced: Cells,
}

/// What the backward pass needs: the input of the convolution, and the rest.
pub struct Saved<T: Float> {
    input: Option<Tensor<T>>,
    block: pre_norm::Saved<T, spatial_reduction::Saved<T>>,
}

/// The initialisation of a 2×2 convolution.
fn he(side: usize, outputs: usize) -> Init {
    Init::Normal((2.0 / (side * side * outputs) as f64).sqrt())
}

impl BlockSettings {
    /// The map that the attention sees.
    pub fn grid(&self) -> [usize; 2] {
        if self.downsample_from.is_some() { self.map.map(|side| side / 2) } else { self.map }
    }

    /// The cells on the block's map.
    pub fn plan(&self) -> Result<Plan> {
        check_reduction(self.grid(), self.attention.sr_ratio)?;
        Ok(Plan { downsample: Cells::dense(self.map, 2), reduced: Cells::dense(self.grid(), self.attention.sr_ratio) })
    }

    /// The cost for `b` images.
    fn cost(&self, b: usize) -> Result<Cost> {
        let (dim, r, [height, width]) = (self.attention.dim, self.attention.sr_ratio.max(1), self.grid());
        let n = height * width;
        let mut cost = SpatialReduction::cost(self.attention, b, n, height / r * (width / r)) + PreNorm::cost(dim, self.mlp_ratio, b, n)?;
        if let Some(from) = self.downsample_from {
            cost = cost + CellConv::cost(from, dim, 2, b, n);
        }
        Ok(cost)
    }
}

impl Block {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: BlockSettings) -> Result<Self> {
        let BlockSettings { attention, mlp_ratio, norm_eps, downsample_from, .. } = settings;
        let downsample = match downsample_from {
            None => None,
            Some(from) => Some(CellConv::new(names.at("downsample.proj"), from, attention.dim, 2, he(2, attention.dim))?),
        };
        let attn = SpatialReduction::new(&mut names.at("attn"), attention, xavier)?;
        Ok(Block { downsample, attn, pre_norm: PreNorm::new(names, attention.dim, mlp_ratio, norm_eps, 0.0, xavier)? })
    }

    /// The block's output.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>, plan: &Plan) -> Result<(Tensor<T>, Saved<T>)> {
        let (x, input) = match &self.downsample {
            None => (x, None),
            Some(conv) => (conv.forward(p, &x, &plan.downsample)?, Some(x)),
        };
        let (y, block) = self.pre_norm.forward(p, x, |x, residual| self.attn.forward(p, x, &plan.reduced, residual))?;
        Ok((y, Saved { input, block }))
    }

    /// `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, plan: &Plan, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let Saved { input, block } = saved;
        let attend = |g: &mut Params<T>, x: &Tensor<T>, saved, d: &Tensor<T>| self.attn.backward(p, g, x, saved, &plan.reduced, d);
        let dx = self.pre_norm.backward(p, g, block, dy, attend)?;
        match (&self.downsample, input) {
            (Some(conv), Some(x)) => conv.backward(p, g, &x, &plan.downsample, &dx),
            _ => Ok(dx),
        }
    }
}

/// The stages of a PVT.
#[derive(Clone, Debug)]
pub struct Stages {
    /// Widths.
    pub embed_dims: Vec<usize>,
    /// Blocks.
    pub depths: Vec<usize>,
    /// Heads.
    pub num_heads: Vec<usize>,
    /// Hidden widths of the MLPs over the width.
    pub mlp_ratios: Vec<f64>,
    /// Reductions of the keys' map.
    pub sr_ratios: Vec<usize>,
}

impl Stages {
    /// From the keys of `model.pvt`.
    pub fn from_config(config: &Config) -> Result<Self> {
        let stages = Stages {
            embed_dims: config.usizes("embed_dims")?,
            depths: config.usizes("depths")?,
            num_heads: config.usizes("num_heads")?,
            mlp_ratios: config.f64s("mlp_ratios")?,
            sr_ratios: config.usizes("sr_ratios")?,
        };
        let count = stages.count();
        let same = [stages.depths.len(), stages.num_heads.len(), stages.mlp_ratios.len(), stages.sr_ratios.len()] == [count; 4];
        if !same || count == 0 || count > 16 || stages.embed_dims.contains(&0) {
            return Err(Error::config(
                "embed_dims",
                format!("expected a width per stage, and as many entries in every list, found {stages:?}"),
            ));
        }
        Ok(stages)
    }

    /// The number of stages.
    pub fn count(&self) -> usize {
        self.embed_dims.len()
    }

    /// The width of the last stage.
    pub fn width(&self) -> usize {
        self.embed_dims[self.count() - 1]
    }

    fn block(&self, stage: usize, mode: Mode, norm_eps: f64, map: [usize; 2], downsample_from: Option<usize>) -> BlockSettings {
        let attention = Settings {
            dim: self.embed_dims[stage],
            num_heads: self.num_heads[stage],
            sr_ratio: self.sr_ratios[stage],
            mode,
            qkv_bias: true,
            norm_eps: 1e-5,
        };
        BlockSettings { attention, mlp_ratio: self.mlp_ratios[stage], norm_eps, downsample_from, map }
    }
}

/// UM-MAE's PVT from the embedded patches to the last block.
#[derive(Clone, Debug)]
pub struct Encoder {
    blocks: Vec<(BlockSettings, Block)>,
}

impl Encoder {
    /// Registers `blocks.{b}`.
    pub fn new(names: &mut Names, stages: &Stages) -> Result<Self> {
        let mut blocks = Vec::new();
        for stage in 0..stages.count() {
            if stage > 0 && stages.depths[stage] == 0 {
                return Err(Error::config("depths", "expected at least one block per stage: the first one downsamples"));
            }
            for b in 0..stages.depths[stage] {
                let from = (stage > 0 && b == 0).then(|| stages.embed_dims[stage - 1]);
                let settings = stages.block(stage, Mode::AvgPool, 1e-5, [0; 2], from);
                let block = Block::new(&mut names.at(format!("blocks.{}", blocks.len())), settings)?;
                blocks.push((settings, block));
            }
        }
        Ok(Encoder { blocks })
    }

    /// The plans of all blocks where the first stage sees a map of `side × side` tokens.
    pub fn plans(&self, side: usize) -> Result<Vec<Plan>> {
        let mut map = [side; 2];
        let plan = |(settings, _): &(BlockSettings, Block)| {
            let settings = BlockSettings { map, ..*settings };
            map = settings.grid();
            settings.plan()
        };
        self.blocks.iter().map(plan).collect()
    }

    /// The tokens after the last block.
    pub fn forward<T: Float>(&self, p: &Params<T>, mut x: Tensor<T>, plans: &[Plan]) -> Result<(Tensor<T>, Vec<Saved<T>>)> {
        let mut saved = Vec::with_capacity(self.blocks.len());
        for (i, ((_, block), plan)) in self.blocks.iter().zip(plans).enumerate() {
            let (y, s) = block.forward(p, x, plan)?;
            x = y;
            saved.push(s);
            p.show(format!("block.{i}"), &x);
        }
        Ok((x, saved))
    }

    /// The gradient of the tokens that went in.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Vec<Saved<T>>,
        plans: &[Plan],
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let mut d = dy.clone();
        for (((_, block), plan), saved) in self.blocks.iter().zip(plans).zip(saved).rev() {
            d = block.backward(p, g, saved, plan, &d)?;
        }
        Ok(d)
    }
}

/// The classifier in the style of UM-MAE.
struct UmMae {
    embed: PatchEmbed,
    positions: Param,
    encoder: Encoder,
    plans: Vec<Plan>,
    head: MeanHead,
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

    fn run<T: Float>(&self, run: &mut Run<T>, p: &Params<T>, image: &Tensor<T>) -> Result<()> {
        let (mut x, embed) = self.embed.forward(p, image, None)?;
        rows::add_table(x.data_mut(), p.get(self.positions));
        let (x, blocks) = self.encoder.forward(p, x, &self.plans)?;
        let (y, head) = self.head.forward(p, &x)?;
        run.output("y", &y);
        if run.backward() {
            let mut g = run.zero_grads(p);
            let d = self.head.backward(p, &mut g, head, &run.cotangent("y", y.shape())?)?;
            let d = self.encoder.backward(p, &mut g, blocks, &self.plans, &d)?;
            reduce::add_column_sums(g.get_mut(self.positions), d.data());
            let d_image = self.embed.backward(p, &mut g, &embed, &d, None)?;
            run.grad_input("x", &d_image);
            run.grad_params(&g);
        }
        Ok(())
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
    blocks: Vec<Saved<T>>,
}

/// The classifier in the style of PVT v1.
struct V1 {
    embed: PatchEmbed,
    stages: Vec<StageV1>,
    norm: LayerNorm,
    head: Option<Linear>,
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
            let settings = of.block(i, Mode::Conv, 1e-6, map, None);
            let blocks =
                (0..of.depths[i]).map(|b| Block::new(&mut names.at(format!("block{}.{b}", i + 1)), settings)).collect::<Result<_>>()?;
            stages.push(StageV1 { embed, positions, class, blocks, plan: settings.plan()? });
        }
        let norm = LayerNorm::new(names.at("norm"), of.width(), 1e-6);
        let classes = config.usize("num_classes")?;
        let head = (classes > 0).then(|| Linear::new(names.at("head"), of.width(), classes, true, Init::NORMAL_02));
        Ok(V1 { embed, stages, norm, head })
    }

    fn run<T: Float>(&self, run: &mut Run<T>, p: &Params<T>, image: &Tensor<T>) -> Result<()> {
        let (mut x, embed) = self.embed.forward(p, image, None)?;
        let mut saved = Vec::with_capacity(self.stages.len());
        for stage in &self.stages {
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
            let mut blocks = Vec::with_capacity(stage.blocks.len());
            for block in &stage.blocks {
                let (y, s) = block.forward(p, x, &stage.plan)?;
                x = y;
                blocks.push(s);
            }
            saved.push(StageSaved { embed, blocks });
        }
        let [batch, tokens, dim] = x.dims("tokens")?;
        // The norm works on every token by itself: that of the class token is enough.
        let mut class = Tensor::scratch([batch, dim]);
        class.data_mut().chunks_exact_mut(dim).zip(x.data().chunks_exact(tokens * dim)).for_each(|(y, x)| y.copy_from_slice(&x[..dim]));
        drop(x);
        let (normed, stats) = self.norm.forward(p, &class)?;
        let y = self.head.as_ref().map_or(Ok(normed.clone()), |head| head.forward(p, &normed))?;
        run.output("y", &y);
        if !run.backward() {
            return Ok(());
        }
        let mut g = run.zero_grads(p);
        let dy = run.cotangent("y", y.shape())?;
        let d_normed = self.head.as_ref().map_or(Ok(dy.clone()), |head| head.backward(p, &mut g, &normed, &dy))?;
        let d_class = self.norm.backward(p, &mut g, &class, &stats, &d_normed, None)?;
        let mut d = Tensor::zeros([batch, tokens, dim]);
        d.data_mut().chunks_exact_mut(tokens * dim).zip(d_class.data().chunks_exact(dim)).for_each(|(x, y)| x[..dim].copy_from_slice(y));
        for (stage, saved) in self.stages.iter().zip(saved).rev() {
            for (block, saved) in stage.blocks.iter().zip(saved.blocks).rev() {
                d = block.backward(p, &mut g, saved, &stage.plan, &d)?;
            }
            reduce::add_column_sums(g.get_mut(stage.positions), d.data());
            if let Some(class) = stage.class {
                d = without_class(&d, g.get_mut(class))?;
            }
            if let (Some((conv, cells, norm)), Some((x, c, stats))) = (&stage.embed, saved.embed) {
                let dc = norm.backward(p, &mut g, &c, &stats, &d, None)?;
                d = conv.backward(p, &mut g, &x, cells, &dc)?;
            }
        }
        let d_image = self.embed.backward(p, &mut g, &embed, &d, None)?;
        run.grad_input("x", &d_image);
        run.grad_params(&g);
        Ok(())
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

/// `block.pvt`.
pub struct PvtBlock;

impl PvtBlock {
    fn settings(config: &Config) -> Result<BlockSettings> {
        Ok(BlockSettings {
            attention: spatial_reduction::settings(config)?,
            mlp_ratio: config.f64("mlp_ratio")?,
            norm_eps: config.f64_or("ln_eps", 1e-5)?,
            downsample_from: Some(config.usize_or("downsample_from", 0)?).filter(|&from| from > 0),
            map: [config.positive("height")?, config.positive("width")?],
        })
    }
}

impl Operation for PvtBlock {
    const NAME: &'static str = "block.pvt";
    const PAPER: &'static str = "2102.12122 PVT";

    fn sample(rng: &mut Rng) -> Config {
        let (heads, ratio, down) = (rng.between(1, 2), rng.between(1, 3), rng.chance(0.5));
        let side = if down { 2 * ratio } else { ratio };
        let mut config = Config::default();
        config.set("dim", heads * rng.between(2, 4)).set("num_heads", heads).set("sr_ratio", ratio);
        config.set("mode", rng.pick(&["avgpool", "conv"])).set("mlp_ratio", rng.range(1.0, 3.0)).set("qkv_bias", rng.chance(0.7));
        config.set("height", rng.between(side, 8)).set("width", rng.between(side, 8)).set("ln_eps", 1e-5);
        config.set("downsample_from", if down { rng.between(1, 4) } else { 0 });
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let chans = if config.usize("downsample_from")? > 0 { config.usize("downsample_from")? } else { config.positive("dim")? };
        let batch = draw.size("batch", 1, 2);
        draw.normal("x", [batch, config.positive("height")? * config.positive("width")?, chans]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, _, _] = inputs.dims("x")?;
        Ok(Some(Self::settings(config)?.cost(b)?))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Self::settings(run.config())?;
        let [batch, tokens, _] = run.input("x")?.dims("input `x`")?;
        let [height, width] = settings.map;
        if height.checked_mul(width) != Some(tokens) {
            return Err(Error::shape("input `x`", format!("[batch, {height}·{width}, channels]"), run.input("x")?.shape()));
        }
        let chans = settings.downsample_from.unwrap_or(settings.attention.dim);
        run.input("x")?.expect_shape("input `x`", [batch, tokens, chans])?;
        let plan = settings.plan()?;
        let (block, layout) = Layout::build(|names| Block::new(names, settings))?;
        run.unary(&layout, |p, x| block.forward(p, x.clone(), &plan), |p, g, saved, dy| block.backward(p, g, saved, &plan, dy))
    }
}

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
        let (config, image) = (run.config(), run.input("x")?);
        let [batch, _, _, _] = image.dims("input `x`")?;
        let side = config.positive("img_size")?;
        image.expect_shape("input `x`", [batch, config.positive("in_chans")?, side, side])?;
        if config.choice("style", &["um_mae", "pvt_v1"])? == "um_mae" {
            let (model, layout) = Layout::build(|names| UmMae::new(names, config))?;
            let p = run.params(&layout)?;
            model.run(run, &p, &image)
        } else {
            let (model, layout) = Layout::build(|names| V1::new(names, config))?;
            let p = run.params(&layout)?;
            model.run(run, &p, &image)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(style: &str, image: usize, depths: [usize; 4], sr_ratios: [usize; 4]) -> usize {
        let mut config = Config::default();
        config.set("img_size", image).set("patch_size", 4).set("in_chans", 3).set("num_classes", 1000);
        config.set("embed_dims", vec![64, 128, 320, 512]).set("num_heads", vec![1, 2, 5, 8]).set("mlp_ratios", vec![8, 8, 4, 4]);
        config.set("depths", depths.to_vec()).set("sr_ratios", sr_ratios.to_vec());
        let layout = match style {
            "um_mae" => Layout::build(|names| UmMae::new(names, &config)).unwrap().1,
            _ => Layout::build(|names| V1::new(names, &config)).unwrap().1,
        };
        layout.numel()
    }

    #[test]
    fn published_sizes() {
        assert_eq!(parameters("um_mae", 256, [3, 4, 6, 3], [8, 4, 2, 1]), 21_546_728);
        assert_eq!(parameters("pvt_v1", 224, [2, 2, 2, 2], [8, 4, 2, 1]), 13_229_288);
        assert_eq!(parameters("pvt_v1", 224, [3, 4, 6, 3], [8, 4, 2, 1]), 24_485_864);
        assert_eq!(parameters("pvt_v1", 224, [3, 4, 18, 3], [8, 4, 2, 1]), 44_208_104);
        assert_eq!(parameters("pvt_v1", 224, [3, 8, 27, 3], [8, 4, 2, 1]), 61_369_320);
    }
}
