//! `block.um_swin`: the block of UM-MAE's Swin (arXiv 2205.10063), and the encoder that UM-MAE pre-trains.
//!
//! A block knows the true position of each of its tokens; the bias of its windows is a function of their offsets. The first block of a
//! later stage starts with LayerNorm and a 2×2 convolution of stride 2 (not Swin's concatenation), which keeps the position of the
//! top-left token of each 2×2, halved.
//!
//! Tokens are put into the order of their windows once per block, between norm and `qkv`, and back after `proj`. In a shifted window that
//! lies across the border, the −100 between tokens that are no neighbours stands in place of their bias, which would be lost in it.

use super::pre_norm::{self, PreNorm};
use super::stack::{self, Kept};
use crate::attention::um_window::{self, Offsets, Settings, UmWindow, draw_positions, positions, settings, window_order};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::{elementwise, rows};
use crate::nn::{CellConv, Cells, DropPath, Init, LayerNorm, Layout, Names, Params, Stats, xavier};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The positions of the tokens of square maps, of one that all images share or of every image: (row, column), one map after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct Positions {
    /// Rows and columns R of a map.
    pub side: usize,
    /// `R²` pairs per map.
    pub pairs: Vec<[f64; 2]>,
}

impl Positions {
    /// The positions of a regular map.
    pub fn regular(side: usize) -> Self {
        Positions { side, pairs: (0..side * side).map(|i| [(i / side) as f64, (i % side) as f64]).collect() }
    }

    /// Those of the top-left token of every 2×2, halved.
    fn halved(&self) -> Self {
        let (side, half) = (self.side, self.side / 2);
        let of =
            |map: &[[f64; 2]]| (0..half * half).map(|i| map[2 * (i / half) * side + 2 * (i % half)].map(|x| x / 2.0)).collect::<Vec<_>>();
        Positions { side: half, pairs: self.pairs.chunks_exact((side * side).max(1)).flat_map(of).collect() }
    }
}

/// The window and shift on a map of R×R: the whole map where it fits into one window.
fn clip(side: usize, window: usize, shift: usize) -> Result<(usize, usize)> {
    if side <= window {
        return Ok((side, 0));
    }
    if window == 0 || !side.is_multiple_of(window) {
        return Err(Error::config(
            "window_size",
            format!("expected a divisor of the map's side {side}, or no less than it, found {window}"),
        ));
    }
    if shift >= window {
        return Err(Error::config("shift_size", format!("expected less than the window {window}, found {shift}")));
    }
    Ok((window, shift))
}

/// Which tokens attend to each other, and from what offsets.
#[derive(Clone, Debug)]
pub struct Plan {
    /// For every token in window order, its token on the map; and the inverse. None where both orders are the same.
    order: Option<[Vec<u32>; 2]>,
    offsets: Offsets,
    window: usize,
    side: usize,
    /// The 2×2 cells of a map of twice the side, for a block that starts with a convolution.
    cells: Cells,
}

impl Plan {
    /// The windows of `window` tokens per side over maps with these positions, shifted by `shift`.
    pub fn new(at: &Positions, window: usize, shift: usize) -> Result<Self> {
        let side = at.side;
        let (window, shift) = clip(side, window, shift)?;
        let cells = Cells::dense([2 * side; 2], 2);
        if window == side {
            return Ok(Plan { order: None, offsets: Offsets::new(&at.pairs, side * side, None), window, side, cells });
        }
        let rolled = window_order([side; 2], window);
        let token = |t: u32| (t as usize / side + shift) % side * side + (t as usize % side + shift) % side;
        let order: Vec<u32> = rolled.iter().map(|&t| token(t) as u32).collect();
        let mut inverse = vec![0; order.len()];
        order.iter().enumerate().for_each(|(i, &t)| inverse[t as usize] = i as u32);
        let strip = |i: usize| if i < side - window { 0 } else { 1 + u8::from(i >= side - shift) };
        let maps = at.pairs.len() / (side * side);
        let labels = (shift > 0)
            .then(|| rolled.iter().map(|&t| 3 * strip(t as usize / side) + strip(t as usize % side)).collect::<Vec<u8>>().repeat(maps));
        let in_order: Vec<[f64; 2]> = at.pairs.chunks_exact(side * side).flat_map(|map| order.iter().map(|&t| map[t as usize])).collect();
        Ok(Plan { order: Some([order, inverse]), offsets: Offsets::new(&in_order, window * window, labels), window, side, cells })
    }

    /// `[B, N, C]` in window order, `[B·windows, window², C]`; or back.
    fn reordered<T: Float>(&self, x: &Tensor<T>, shape: [usize; 3], back: bool) -> Result<Tensor<T>> {
        let Some(order) = &self.order else { return x.reshape(shape) };
        let c = shape[2];
        let mut y = Tensor::scratch(shape);
        let order = &order[usize::from(back)];
        rows::gather_batch(y.data_mut(), x.data(), order, x.data().len() / (order.len() * c), c);
        Ok(y)
    }
}

/// What a block is made of.
#[derive(Clone, Copy, Debug)]
pub struct BlockSettings {
    /// The attention.
    pub attention: Settings,
    /// Hidden width of the MLP over C, truncated.
    pub mlp_ratio: f64,
    /// ε of `norm1` and `norm2`.
    pub norm_eps: f64,
    /// Channels that the leading convolution reads, if there is one, and ε of the norm before it.
    pub downsample_from: Option<(usize, f64)>,
    /// Rows and columns R of the map that the attention sees.
    pub side: usize,
    /// Window side.
    pub window: usize,
    /// Shift.
    pub shift: usize,
    /// Probability that a residual branch is left out in training.
    pub drop_path: f64,
}

/// A block: `downsample.norm`, `downsample.proj`, `norm1`, `attn`, `norm2`, `mlp`.
#[derive(Clone, Debug)]
pub struct Block {
    downsample: Option<(LayerNorm, CellConv)>,
    attn: UmWindow,
    pre_norm: PreNorm,
}

/// What the backward pass needs: the input of the downsampling and its norm's statistics, and the rest.
pub struct Saved<T: Float> {
    input: Option<(Tensor<T>, Stats<T>)>,
    block: pre_norm::Saved<T, um_window::Saved<T>>,
}

impl BlockSettings {
    /// The cost for `b` images.
    fn cost(&self, b: usize) -> Result<Cost> {
        let n = self.side * self.side;
        let (window, _) = clip(self.side, self.window, self.shift)?;
        let attention = UmWindow::cost(self.attention, b * (n / (window * window)), window * window);
        let mut cost = attention + PreNorm::cost(self.attention.dim, self.mlp_ratio, b, n)?;
        if let Some((from, _)) = self.downsample_from {
            cost = cost + CellConv::cost(from, self.attention.dim, 2, b, n);
            cost.activation_bytes += 4 * b * 4 * n * 2;
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
            Some((from, eps)) => {
                let norm = LayerNorm::new(names.at("downsample.norm"), from, eps);
                let init = Init::Normal((2.0 / (4 * attention.dim) as f64).sqrt());
                Some((norm, CellConv::new(names.at("downsample.proj"), from, attention.dim, 2, init)?))
            }
        };
        Ok(Block {
            downsample,
            attn: UmWindow::new(&mut names.at("attn"), attention, xavier)?,
            pre_norm: PreNorm::new(names, attention.dim, mlp_ratio, norm_eps, drop_path, xavier)?,
        })
    }

    /// The block's output for the plan of its own map.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>, plan: &Plan) -> Result<(Tensor<T>, Saved<T>)> {
        let (x, input) = match &self.downsample {
            None => (x, None),
            Some((norm, conv)) => {
                let (normed, stats) = norm.forward(p, &x)?;
                (conv.forward(p, &normed, &plan.cells)?, Some((x, stats)))
            }
        };
        let shape @ [batch, n, c] = x.dims("input of a block")?;
        if n != plan.side * plan.side {
            return Err(Error::shape("input of a block", [batch, plan.side * plan.side, c], x.shape()));
        }
        let windows = Self::windows(shape, plan);
        let (y, block) = self.pre_norm.forward(p, x, |normed, residual| {
            let (y, saved) = self.attn.forward(p, &plan.reordered(normed, windows, false)?, &plan.offsets, None)?;
            let mut y = plan.reordered(&y, shape, true)?;
            if let Some(residual) = residual {
                elementwise::add(y.data_mut(), residual.data());
            }
            Ok((y, saved))
        })?;
        Ok((y, Saved { input, block }))
    }

    fn windows([batch, n, c]: [usize; 3], plan: &Plan) -> [usize; 3] {
        let each = plan.window * plan.window;
        [batch * (n / each), each, c]
    }

    /// `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, plan: &Plan, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let Saved { input, block } = saved;
        let shape = dy.dims("gradient of a block")?;
        let windows = Self::windows(shape, plan);
        let dx = self.pre_norm.backward(p, g, block, dy, |g, normed, saved, d| {
            let [normed, d] = [plan.reordered(normed, windows, false)?, plan.reordered(d, windows, false)?];
            plan.reordered(&self.attn.backward(p, g, &normed, saved, &plan.offsets, None, &d)?, shape, true)
        })?;
        match (&self.downsample, input) {
            (Some((norm, conv)), Some((x, stats))) => {
                let d_normed = conv.backward(p, g, &norm.again(p, &x, &stats), &plan.cells, &dx)?;
                norm.backward(p, g, &x, &stats, &d_normed, None)
            }
            _ => Ok(dx),
        }
    }
}

/// What an encoder is made of.
#[derive(Clone, Debug)]
pub struct EncoderSettings {
    /// Width of the first stage; it doubles from stage to stage.
    pub embed_dim: usize,
    /// Blocks per stage.
    pub depths: Vec<usize>,
    /// Heads per stage.
    pub num_heads: Vec<usize>,
    /// Hidden width of the MLPs over the width.
    pub mlp_ratio: f64,
    /// Window side.
    pub window_size: usize,
    /// Hidden width of the position MLPs.
    pub posmlp_dim: usize,
    /// Drop path of the last block; it grows linearly from 0 over all blocks.
    pub drop_path: f64,
}

impl EncoderSettings {
    /// From the keys of `model.um_swin`.
    pub fn from_config(config: &Config) -> Result<Self> {
        let settings = EncoderSettings {
            embed_dim: config.positive("embed_dim")?,
            depths: config.usizes("depths")?,
            num_heads: config.usizes("num_heads")?,
            mlp_ratio: config.f64_or("mlp_ratio", 4.0)?,
            window_size: config.positive("window_size")?,
            posmlp_dim: config.usize_or("posmlp_dim", 32)?,
            drop_path: config.f64_or("drop_path_rate", 0.0)?,
        };
        let count = settings.depths.len();
        if count == 0 || count > 16 || settings.num_heads.len() != count || settings.embed_dim > 1 << 24 {
            let found = format!("expected as many entries as num_heads {:?} has, found {:?}", settings.num_heads, settings.depths);
            return Err(Error::config("depths", found));
        }
        Ok(settings)
    }

    /// The width of the last stage.
    pub fn width(&self) -> usize {
        self.embed_dim << (self.depths.len() - 1)
    }
}

/// What [`Encoder::backward`] needs: of each block, what the pass keeps.
pub type EncoderSaved<T> = Vec<Kept<T, Saved<T>>>;

/// The blocks of all stages.
#[derive(Clone, Debug)]
pub struct Encoder {
    /// Stage of every block, whether it is shifted, and the block.
    blocks: Vec<(usize, bool, Block)>,
    window: usize,
    stages: usize,
}

/// Two plans per stage: without shift and with.
pub type Plans = Vec<[Plan; 2]>;

impl Encoder {
    /// Registers `blocks.{b}`.
    pub fn new(names: &mut Names, settings: &EncoderSettings) -> Result<Self> {
        let EncoderSettings { embed_dim, depths, num_heads, mlp_ratio, window_size, posmlp_dim, drop_path } = settings;
        let mut blocks = Vec::new();
        for (stage, (&depth, &num_heads)) in depths.iter().zip(num_heads).enumerate() {
            if stage > 0 && depth == 0 {
                return Err(Error::config("depths", "expected at least one block per stage: the first one downsamples"));
            }
            let dim = embed_dim << stage;
            for b in 0..depth {
                let settings = BlockSettings {
                    attention: Settings { dim, num_heads, posmlp_dim: *posmlp_dim, qkv_bias: true },
                    mlp_ratio: *mlp_ratio,
                    norm_eps: 1e-5,
                    downsample_from: (stage > 0 && b == 0).then_some((dim / 2, 1e-6)),
                    side: 0,
                    window: *window_size,
                    shift: 0,
                    drop_path: DropPath::linear(*drop_path, blocks.len(), depths.iter().sum()),
                };
                let block = Block::new(&mut names.at(format!("blocks.{}", blocks.len())), settings)?;
                blocks.push((stage, b % 2 == 1, block));
            }
        }
        Ok(Encoder { blocks, window: *window_size, stages: depths.len() })
    }

    /// The plans of all stages for the positions of the first.
    pub fn plans(&self, at: Positions) -> Result<Plans> {
        let mut at = at;
        let mut plans = Vec::with_capacity(self.stages);
        for stage in 0..self.stages {
            if stage > 0 {
                if at.side == 0 || at.side % 2 == 1 {
                    return Err(Error::config(
                        "depths",
                        format!("expected a map that halves evenly from stage to stage, found {} a side", at.side),
                    ));
                }
                at = at.halved();
            }
            let plain = Plan::new(&at, self.window, 0)?;
            let shifted = if plain.order.is_none() { plain.clone() } else { Plan::new(&at, self.window, self.window / 2)? };
            plans.push([plain, shifted]);
        }
        Ok(plans)
    }

    /// The tokens after the last block.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>, plans: &Plans) -> Result<(Tensor<T>, EncoderSaved<T>)> {
        let mut current = 0;
        let (y, saved) = stack::forward(p, &self.blocks, x, |(stage, shifted, block), _, x| {
            if *stage > current {
                p.show(format!("stages.{current}"), &x);
                current = *stage;
            }
            block.forward(p, x, &plans[*stage][usize::from(*shifted)])
        })?;
        p.show(format!("stages.{current}"), &y);
        Ok((y, saved))
    }

    /// The gradient of the tokens that went in.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: EncoderSaved<T>,
        plans: &Plans,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let plan = |stage: usize, shifted: bool| &plans[stage][usize::from(shifted)];
        stack::backward(
            &self.blocks,
            saved,
            dy.clone(),
            |(stage, shifted, block), _, x| block.forward(p, x, plan(*stage, *shifted)),
            |(stage, shifted, block), _, saved, d| block.backward(p, g, saved, plan(*stage, *shifted), d),
        )
    }
}

/// `block.um_swin`.
pub struct UmSwinBlock;

impl UmSwinBlock {
    fn settings(config: &Config) -> Result<BlockSettings> {
        let merge_eps = config.f64_or("merge_ln_eps", 1e-6)?;
        Ok(BlockSettings {
            attention: settings(config)?,
            mlp_ratio: config.f64_or("mlp_ratio", 4.0)?,
            norm_eps: config.f64_or("ln_eps", 1e-5)?,
            downsample_from: Some((config.usize_or("downsample_from", 0)?, merge_eps)).filter(|(from, _)| *from > 0),
            side: config.positive("resolution")?,
            window: config.positive("window_size")?,
            shift: config.usize("shift_size")?,
            drop_path: 0.0,
        })
    }
}

impl Operation for UmSwinBlock {
    const NAME: &'static str = "block.um_swin";
    const PAPER: &'static str = "2205.10063 UM-MAE";
    const DATA: &'static [&'static str] = &["pos_hw"];

    fn sample(rng: &mut Rng) -> Config {
        let (heads, window) = (rng.between(1, 2), rng.between(1, 3));
        let mut config = Config::default();
        config.set("dim", heads * rng.between(2, 3)).set("num_heads", heads).set("window_size", window);
        config.set("resolution", if rng.chance(0.3) { rng.between(1, window) } else { window * rng.between(1, 3) });
        config.set("shift_size", rng.below(window)).set("mlp_ratio", rng.range(1.0, 2.0)).set("posmlp_dim", rng.between(1, 5));
        config.set("qkv_bias", rng.chance(0.7)).set("downsample_from", if rng.chance(0.4) { rng.between(2, 4) } else { 0 });
        config.set("ln_eps", 1e-5).set("merge_ln_eps", 1e-6);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, from) = (draw.size("batch", 1, 2), config.usize("downsample_from")?);
        let (side, chans) = match from {
            0 => (config.positive("resolution")?, config.positive("dim")?),
            _ => (2 * config.positive("resolution")?, from),
        };
        let shared = draw.rng.chance(0.5);
        draw.normal("x", [batch, side * side, chans]);
        draw_positions(draw, [if shared { 1 } else { batch }, side, side]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, _, _] = inputs.dims("x")?;
        Ok(Some(Self::settings(config)?.cost(b)?))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Self::settings(run.config())?;
        let x = run.input("x")?;
        let [batch, tokens, _] = x.dims("input `x`")?;
        let ([samples, height, width], pairs) = positions(&run.input("pos_hw")?)?;
        if height != width || (samples != 1 && samples != batch) {
            return Err(Error::shape("input `pos_hw`", "[1 or batch, R, R, 2]", [samples, height, width, 2]));
        }
        let (scale, chans) = settings.downsample_from.map_or((1, settings.attention.dim), |(from, _)| (2, from));
        if settings.side.checked_mul(scale) != Some(height) || height * width != tokens {
            return Err(Error::shape("input `x`", format!("[batch, ({scale}·{})², channels], as in `pos_hw`", settings.side), x.shape()));
        }
        x.expect_shape("input `x`", [batch, tokens, chans])?;
        let at = Positions { side: height, pairs };
        let at = if scale == 2 { at.halved() } else { at };
        let plan = Plan::new(&at, settings.window, settings.shift)?;
        let (block, layout) = Layout::build(|names| Block::new(names, settings))?;
        let side = settings.side;
        run.output("pos_hw", &Tensor::from_fn([samples, side, side, 2], |i| T::from_f64(at.pairs[i / 2][i % 2])));
        run.unary(&layout, |p, x| block.forward(p, x.clone(), &plan), |p, g, saved, dy| block.backward(p, g, saved, &plan, dy))
    }
}
