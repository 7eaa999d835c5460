//! `block.pvt`: the block of the Pyramid Vision Transformer (arXiv 2102.12122), its stages, and the encoder that UM-MAE (2205.10063)
//! pre-trains: blocks numbered through all stages, of which the first of every later stage starts with a 2×2 convolution of stride 2.

use super::pre_norm::{self, PreNorm};
use super::stack::{self, Kept};
use crate::attention::spatial_reduction::{self, Mode, Settings, SpatialReduction, check_reduction};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::nn::{CellConv, Cells, DropPath, Init, Layout, Names, Params, xavier};
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
    /// Probability that a residual branch is left out in training.
    pub drop_path: f64,
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
pub(super) fn he(side: usize, outputs: usize) -> Init {
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
        let BlockSettings { attention, mlp_ratio, norm_eps, downsample_from, drop_path, .. } = settings;
        let downsample = match downsample_from {
            None => None,
            Some(from) => Some(CellConv::new(names.at("downsample.proj"), from, attention.dim, 2, he(2, attention.dim))?),
        };
        let attn = SpatialReduction::new(&mut names.at("attn"), attention, xavier)?;
        Ok(Block { downsample, attn, pre_norm: PreNorm::new(names, attention.dim, mlp_ratio, norm_eps, drop_path, xavier)? })
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
    /// Drop path of the last block; it grows linearly from 0 over all blocks.
    pub drop_path: f64,
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
            drop_path: config.f64_or("drop_path_rate", 0.0)?,
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

    /// Block `b` of a stage.
    pub(super) fn block(&self, [stage, b]: [usize; 2], mode: Mode, norm_eps: f64, map: [usize; 2], down: Option<usize>) -> BlockSettings {
        let attention = Settings {
            dim: self.embed_dims[stage],
            num_heads: self.num_heads[stage],
            sr_ratio: self.sr_ratios[stage],
            mode,
            qkv_bias: true,
            norm_eps: 1e-5,
        };
        let index = self.depths[..stage].iter().sum::<usize>() + b;
        let drop_path = DropPath::linear(self.drop_path, index, self.depths.iter().sum());
        BlockSettings { attention, mlp_ratio: self.mlp_ratios[stage], norm_eps, downsample_from: down, map, drop_path }
    }
}

/// What [`Encoder::backward`] needs: of each block, what the pass keeps.
pub type EncoderSaved<T> = Vec<Kept<T, Saved<T>>>;

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
                let settings = stages.block([stage, b], Mode::AvgPool, 1e-5, [0; 2], from);
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
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>, plans: &[Plan]) -> Result<(Tensor<T>, EncoderSaved<T>)> {
        let mut stage = 0;
        let (y, saved) = stack::forward(p, &self.blocks, x, |(settings, block), i, x| {
            if settings.downsample_from.is_some() {
                p.show(format!("stages.{stage}"), &x);
                stage += 1;
            }
            block.forward(p, x, &plans[i])
        })?;
        p.show(format!("stages.{stage}"), &y);
        Ok((y, saved))
    }

    /// The gradient of the tokens that went in.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: EncoderSaved<T>,
        plans: &[Plan],
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        stack::backward(
            &self.blocks,
            saved,
            dy.clone(),
            |(_, block), i, x| block.forward(p, x, &plans[i]),
            |(_, block), i, saved, d| block.backward(p, g, saved, &plans[i], d),
        )
    }
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
            drop_path: 0.0,
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
