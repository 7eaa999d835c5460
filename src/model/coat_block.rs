//! `block.coat_serial` and `block.coat_parallel`: the blocks of CoaT (arXiv 2104.06399).
//!
//! Serial: `x ← CPE(x)`, `x ← x + FactAtt(LN₁ x)`, `x ← x + MLP(LN₂ x)`; the residual of the attention starts after CPE.
//!
//! Parallel, on scales s = 2, 3, 4: `x_s ← CPE_s(x_s)`, `c_s = FactAtt_s(LN₁ x_s)`, `x_s ← x_s + Σ_t R_{t→s}(c_t)`,
//! `x_s ← x_s + MLP(LN₂ x_s)` with one MLP for all scales. `R_{t→s}` resizes the map bilinearly (centres of cells) and leaves the class
//! token as it is; `R_{s→s}` is the identity. Backward: `dc_t = Σ_s R_{t→s}ᵀ(m_s)` with m_s the gradient before the MLP.
//!
//! Drop path takes a scale's merged update and its MLP as two branches.
//!
//! CPE and CRPE are handed in: CoaT shares one of each among all blocks of a scale, and their gradients add up.

use crate::attention::factorized_conv::{self, FactorizedAttention, Settings, sample_settings};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::kernel::maps::{Map, MapMut};
use crate::kernel::resize::{Axis, resize};
use crate::linalg::ColumnsMut;
use crate::model::vit_block::hidden_width;
use crate::nn::conv_position::{PositionEncoding, RelativePosition, check_tokens, map_size};
use crate::nn::{DropPath, LayerNorm, Layout, Mlp, Names, Params, Stats, mlp, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// What the blocks are made of.
#[derive(Clone, Copy, Debug)]
pub struct BlockSettings {
    /// The attention.
    pub attention: Settings,
    /// Hidden width of the MLP over C, truncated.
    pub mlp_ratio: f64,
    /// ε of the norms.
    pub norm_eps: f64,
    /// Probability that a branch is left out in training: the same in all blocks.
    pub drop_path: f64,
}

impl BlockSettings {
    /// From the keys that all blocks share, for width `dim`.
    pub fn from_config(config: &Config, dim: usize, mlp_ratio: f64) -> Result<Self> {
        Ok(BlockSettings {
            attention: Settings::from_config(config, dim)?,
            mlp_ratio,
            norm_eps: config.f64_or("norm_eps", 1e-6)?,
            drop_path: config.f64_or("drop_path_rate", 0.0)?,
        })
    }
}

/// The two position modules of a scale.
#[derive(Clone, Debug)]
pub struct Positions {
    /// Convolutional position encoding.
    pub cpe: PositionEncoding,
    /// Convolutional relative positions.
    pub crpe: RelativePosition,
}

/// CPE, norm and attention of one scale: what serial and parallel blocks have in common.
#[derive(Clone, Debug)]
struct Mixer {
    cpe: PositionEncoding,
    norm: LayerNorm,
    attention: FactorizedAttention,
}

struct MixerSaved<T: Float> {
    x: Tensor<T>,
    encoded: Tensor<T>,
    stats: Stats<T>,
    attention: factorized_conv::Saved<T>,
}

impl Mixer {
    /// Registers the norm and the attention under these names.
    fn new(names: &mut Names, [norm, attention]: [&str; 2], settings: BlockSettings, positions: Positions) -> Result<Self> {
        let Positions { cpe, crpe } = positions;
        let norm = LayerNorm::new(names.at(norm), settings.attention.dim, settings.norm_eps);
        Ok(Mixer { cpe, norm, attention: FactorizedAttention::new(names.at(attention), settings.attention, crpe, normal_02)? })
    }

    /// `FactAtt(LN(CPE x))`; with `drop`, that is a residual branch beside `CPE x`.
    fn forward<T: Float>(
        &self,
        p: &Params<T>,
        x: Tensor<T>,
        map: [usize; 2],
        drop: Option<DropPath>,
    ) -> Result<(Tensor<T>, MixerSaved<T>)> {
        let encoded = self.cpe.forward(p, &x, map)?;
        let (normed, stats) = self.norm.forward(p, &encoded)?;
        let attend = |residual: Option<&Tensor<T>>| self.attention.forward(p, &normed, map, residual);
        let (y, attention) = match drop {
            Some(drop) => drop.residual(p, &encoded, attend)?,
            None => attend(None)?,
        };
        Ok((y, MixerSaved { x, encoded, stats, attention }))
    }

    /// `dx` from the gradient `dy` of the attention's output and that of `CPE x` beside it.
    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: MixerSaved<T>,
        map: [usize; 2],
        dy: &Tensor<T>,
        beside: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let MixerSaved { x, encoded, stats, attention } = saved;
        let normed = self.norm.again(p, &encoded, &stats);
        let d_normed = self.attention.backward(p, g, &normed, map, attention, dy)?;
        drop(normed);
        let d_encoded = self.norm.backward(p, g, &encoded, &stats, &d_normed, Some(beside))?;
        drop((d_normed, encoded));
        self.cpe.backward(p, g, &x, map, &d_encoded)
    }

    fn cost(&self, b: usize, map: [usize; 2]) -> Cost {
        let stats = Cost { flops: 0, activation_bytes: 4 * 2 * b * (1 + map[0] * map[1]) };
        self.cpe.cost(b, map) + self.attention.cost(b, map) + stats
    }
}

struct FeedSaved<T: Float> {
    middle: Tensor<T>,
    stats: Stats<T>,
    mlp: mlp::Saved<T>,
}

/// A norm and the MLP behind it, with the residual.
fn feed<T: Float>(p: &Params<T>, norm: &LayerNorm, mlp: &Mlp, drop: DropPath, middle: Tensor<T>) -> Result<(Tensor<T>, FeedSaved<T>)> {
    let (normed, stats) = norm.forward(p, &middle)?;
    let (y, mlp) = drop.residual(p, &middle, |residual| mlp.forward(p, &normed, residual))?;
    Ok((y, FeedSaved { middle, stats, mlp }))
}

fn feed_backward<T: Float>(
    p: &Params<T>,
    g: &mut Params<T>,
    norm: &LayerNorm,
    mlp: &Mlp,
    drop_path: DropPath,
    saved: FeedSaved<T>,
    dy: &Tensor<T>,
) -> Result<Tensor<T>> {
    let FeedSaved { middle, stats, mlp: hidden } = saved;
    let normed = norm.again(p, &middle, &stats);
    let d_normed = drop_path.backward(p, dy, |d| mlp.backward(p, g, &normed, hidden, d))?;
    drop(normed);
    norm.backward(p, g, &middle, &stats, &d_normed, Some(dy))
}

fn feed_cost(dim: usize, hidden: usize, rows: usize) -> Cost {
    // Hidden units, statistics, the output.
    Cost { flops: 2 * rows * 2 * dim * hidden, activation_bytes: 4 * rows * (hidden + 2 + dim) }
}

/// A serial block.
#[derive(Clone, Debug)]
pub struct SerialBlock {
    mixer: Mixer,
    norm2: LayerNorm,
    mlp: Mlp,
    widths: [usize; 2],
    drops: [DropPath; 2],
}

/// What the backward pass of a serial block needs.
pub struct SerialSaved<T: Float> {
    mixer: MixerSaved<T>,
    feed: FeedSaved<T>,
}

impl SerialBlock {
    /// Registers `norm1`, `factoratt_crpe`, `norm2`, `mlp`.
    pub fn new(names: &mut Names, settings: BlockSettings, positions: Positions) -> Result<Self> {
        let dim = settings.attention.dim;
        let hidden = hidden_width(dim, settings.mlp_ratio)?;
        let mixer = Mixer::new(names, ["norm1", "factoratt_crpe"], settings, positions)?;
        let norm2 = LayerNorm::new(names.at("norm2"), dim, settings.norm_eps);
        let mlp = Mlp::new(names.at("mlp"), dim, hidden, normal_02);
        let drops = [DropPath::new(names, settings.drop_path)?, DropPath::new(names, settings.drop_path)?];
        Ok(SerialBlock { mixer, norm2, mlp, widths: [dim, hidden], drops })
    }

    /// `[B, 1 + HW, C]` → the same.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>, map: [usize; 2]) -> Result<(Tensor<T>, SerialSaved<T>)> {
        let (middle, mixer) = self.mixer.forward(p, x, map, Some(self.drops[0]))?;
        let (y, feed) = feed(p, &self.norm2, &self.mlp, self.drops[1], middle)?;
        Ok((y, SerialSaved { mixer, feed }))
    }

    /// `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: SerialSaved<T>,
        map: [usize; 2],
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let SerialSaved { mixer, feed } = saved;
        let d_middle = feed_backward(p, g, &self.norm2, &self.mlp, self.drops[1], feed, dy)?;
        self.drops[0].backward(p, &d_middle, |d| self.mixer.backward(p, g, mixer, map, d, &d_middle))
    }

    /// What [`forward`](Self::forward) costs.
    pub fn cost(&self, b: usize, map: [usize; 2]) -> Cost {
        self.mixer.cost(b, map) + feed_cost(self.widths[0], self.widths[1], b * (1 + map[0] * map[1]))
    }
}

/// A parallel block over three scales of one width.
#[derive(Clone, Debug)]
pub struct ParallelBlock {
    mixers: Vec<Mixer>,
    norms2: [LayerNorm; 3],
    mlp: Mlp,
    widths: [usize; 2],
    /// Of the attention and of the MLP, by scale.
    drops: [[DropPath; 3]; 2],
}

/// What the backward pass of a parallel block needs, by scale.
pub struct ParallelSaved<T: Float> {
    mixers: Vec<MixerSaved<T>>,
    feeds: Vec<FeedSaved<T>>,
}

/// `to += R(from)`: the class tokens as they are, the maps resized from `sizes[0]` to `sizes[1]`; or the adjoint of R from the second
/// to the first.
fn add_resized<T: Float>(to: &mut Tensor<T>, from: &Tensor<T>, sizes: [[usize; 2]; 2], adjoint: bool) -> Result<()> {
    let [b, n, c] = from.dims("tokens")?;
    let axes = [0, 1].map(|axis| {
        let axis = Axis::bilinear(sizes[0][axis], sizes[1][axis], false);
        if adjoint { axis.transposed() } else { axis }
    });
    let [[h, w], [to_h, to_w]] = if adjoint { [sizes[1], sizes[0]] } else { sizes };
    let to_image = (1 + to_h * to_w) * c;
    for (to, from) in to.data_mut().chunks_exact_mut(to_image).zip(from.data().chunks_exact(n * c)) {
        elementwise::add(&mut to[..c], &from[..c]);
    }
    let out = MapMut::within(ColumnsMut::new(to.data_mut(), c), [b, to_h, to_w, c], 1);
    resize(out, Map::within(from.data(), [b, h, w, c], 1, c, 0), &axes[0], &axes[1], true);
    Ok(())
}

impl ParallelBlock {
    /// Registers `norm12..14`, `factoratt_crpe2..4`, `norm22..24` and the shared `mlp2`. `positions` are those of scales 2, 3 and 4.
    pub fn new(names: &mut Names, settings: BlockSettings, positions: Vec<Positions>) -> Result<Self> {
        let dim = settings.attention.dim;
        let hidden = hidden_width(dim, settings.mlp_ratio)?;
        let mut mixer = |(i, positions)| {
            let [norm, attention] = [format!("norm1{}", i + 2), format!("factoratt_crpe{}", i + 2)];
            Mixer::new(names, [&norm, &attention], settings, positions)
        };
        let mixers = positions.into_iter().enumerate().map(&mut mixer).collect::<Result<_>>()?;
        let norms2 = [2, 3, 4].map(|s| LayerNorm::new(names.at(format!("norm2{s}")), dim, settings.norm_eps));
        let mlp = Mlp::new(names.at("mlp2"), dim, hidden, normal_02);
        let mut drop = || DropPath::new(names, settings.drop_path);
        let drops = [[drop()?, drop()?, drop()?], [drop()?, drop()?, drop()?]];
        Ok(ParallelBlock { mixers, norms2, mlp, widths: [dim, hidden], drops })
    }

    /// Three times `[B, 1 + HW, C]` → the same.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Vec<Tensor<T>>, maps: [[usize; 2]; 3]) -> Result<(Vec<Tensor<T>>, ParallelSaved<T>)> {
        let mixed = x.into_iter().zip(&self.mixers).zip(maps).map(|((x, mixer), map)| mixer.forward(p, x, map, None));
        let (mixed, mixers): (Vec<_>, Vec<_>) = mixed.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let (mut outputs, mut feeds) = (Vec::new(), Vec::new());
        for (s, mixer) in mixers.iter().enumerate() {
            let merge = |residual: Option<&Tensor<T>>| {
                let mut sum = mixed[s].clone();
                if let Some(residual) = residual {
                    elementwise::add(sum.data_mut(), residual.data());
                }
                for t in (0..3).filter(|&t| t != s) {
                    add_resized(&mut sum, &mixed[t], [maps[t], maps[s]], false)?;
                }
                Ok((sum, ()))
            };
            let (x, ()) = self.drops[0][s].residual(p, &mixer.encoded, merge)?;
            let (y, saved) = feed(p, &self.norms2[s], &self.mlp, self.drops[1][s], x)?;
            outputs.push(y);
            feeds.push(saved);
        }
        Ok((outputs, ParallelSaved { mixers, feeds }))
    }

    /// The three gradients of the inputs.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: ParallelSaved<T>,
        maps: [[usize; 2]; 3],
        dy: &[Tensor<T>],
    ) -> Result<Vec<Tensor<T>>> {
        let ParallelSaved { mixers, feeds } = saved;
        let feeds = feeds.into_iter().zip(&self.norms2).zip(self.drops[1]).zip(dy);
        let back = |(((saved, norm), drop), dy)| feed_backward(p, g, norm, &self.mlp, drop, saved, dy);
        let d_merged: Vec<_> = feeds.map(back).collect::<Result<_>>()?;
        let d_updates: Vec<_> = d_merged.iter().zip(self.drops[0]).map(|(d, drop)| drop.apply(p, d.clone())).collect();
        let mut dx = Vec::new();
        for (t, saved) in mixers.into_iter().enumerate() {
            let mut dc = d_updates[t].clone();
            for s in (0..3).filter(|&s| s != t) {
                add_resized(&mut dc, &d_updates[s], [maps[t], maps[s]], true)?;
            }
            dx.push(self.mixers[t].backward(p, g, saved, maps[t], &dc, &d_merged[t])?);
        }
        Ok(dx)
    }

    /// What [`forward`](Self::forward) costs.
    pub fn cost(&self, b: usize, maps: [[usize; 2]; 3]) -> Cost {
        let scale =
            |mixer: &Mixer, map: [usize; 2]| mixer.cost(b, map) + feed_cost(self.widths[0], self.widths[1], b * (1 + map[0] * map[1]));
        self.mixers.iter().zip(maps).map(|(mixer, map)| scale(mixer, map)).fold(Cost::default(), |sum, cost| sum + cost)
    }
}

/// Random keys that both blocks share.
fn sample_block(rng: &mut Rng) -> Config {
    let mut config = Config::default();
    // A norm over one channel is constant: nothing to differentiate.
    sample_settings(rng, &mut config, 2);
    config.set("mlp_ratio", rng.range(0.6, 2.5)).set("norm_eps", 1e-6);
    config
}

/// `block.coat_serial`.
pub struct CoatSerial;

impl CoatSerial {
    fn build(config: &Config) -> Result<(SerialBlock, std::sync::Arc<Layout>, [usize; 2])> {
        let dim = config.positive("dim")?;
        let (block, layout) = Layout::build(|names| {
            let cpe = PositionEncoding::new(names.at("cpe"), dim, 3)?;
            let crpe = RelativePosition::from_config(names.at("factoratt_crpe.crpe"), config, dim)?;
            let settings = BlockSettings::from_config(config, dim, config.f64_or("mlp_ratio", 4.0)?)?;
            SerialBlock::new(names, settings, Positions { cpe, crpe })
        })?;
        Ok((block, layout, map_size(config, "height", "width")?))
    }
}

impl Operation for CoatSerial {
    const NAME: &'static str = "block.coat_serial";
    const PAPER: &'static str = "2104.06399 CoaT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = sample_block(rng);
        config.set("height", rng.between(1, 5)).set("width", rng.between(1, 5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let ([h, w], batch) = (map_size(config, "height", "width")?, draw.size("batch", 1, 2));
        draw.normal("x", [batch, 1 + h * w, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, ..], (block, _, map)) = (inputs.dims::<3>("x")?, Self::build(config)?);
        Ok(Some(block.cost(b, map)))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (block, layout, map) = Self::build(run.config())?;
        check_tokens("input `x`", &run.input("x")?, map, block.widths[0])?;
        run.unary(&layout, |p, x| block.forward(p, x.clone(), map), |p, g, saved, dy| block.backward(p, g, saved, map, dy))
    }
}

/// `block.coat_parallel`.
pub struct CoatParallel;

const SCALES: [&str; 3] = ["x2", "x3", "x4"];

impl CoatParallel {
    fn maps(config: &Config) -> Result<[[usize; 2]; 3]> {
        let map = |s: usize| map_size(config, &format!("height{s}"), &format!("width{s}"));
        Ok([map(2)?, map(3)?, map(4)?])
    }

    fn build(config: &Config) -> Result<(ParallelBlock, std::sync::Arc<Layout>, [[usize; 2]; 3])> {
        let dim = config.positive("dim")?;
        let (block, layout) = Layout::build(|names| {
            let positions = (2..5).map(|s| {
                let cpe = PositionEncoding::new(names.at(format!("cpe{s}")), dim, 3)?;
                let crpe = RelativePosition::from_config(names.at(format!("factoratt_crpe{s}.crpe")), config, dim)?;
                Ok(Positions { cpe, crpe })
            });
            let positions = positions.collect::<Result<_>>()?;
            let settings = BlockSettings::from_config(config, dim, config.f64_or("mlp_ratio", 4.0)?)?;
            ParallelBlock::new(names, settings, positions)
        })?;
        Ok((block, layout, Self::maps(config)?))
    }
}

impl Operation for CoatParallel {
    const NAME: &'static str = "block.coat_parallel";
    const PAPER: &'static str = "2104.06399 CoaT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = sample_block(rng);
        for s in 2..5 {
            config.set(&format!("height{s}"), rng.between(1, 4)).set(&format!("width{s}"), rng.between(1, 4));
        }
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, dim) = (draw.size("batch", 1, 2), config.positive("dim")?);
        for (name, [h, w]) in SCALES.into_iter().zip(Self::maps(config)?) {
            draw.normal(name, [batch, 1 + h * w, dim]);
        }
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, ..], (block, _, maps)) = (inputs.dims::<3>("x2")?, Self::build(config)?);
        Ok(Some(block.cost(b, maps)))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (block, layout, maps) = Self::build(run.config())?;
        let x: Vec<Tensor<T>> = SCALES.iter().map(|name| run.input(name)).collect::<Result<_>>()?;
        for ((name, x_s), map) in SCALES.iter().zip(&x).zip(maps) {
            let batch = check_tokens(&format!("input `{name}`"), x_s, map, block.widths[0])?;
            if batch != x[0].shape()[0] {
                return Err(Error::shape(format!("input `{name}`"), format!("[{}, …]", x[0].shape()[0]), x_s.shape()));
            }
        }
        let p = run.params(&layout)?;
        let (y, saved) = block.forward(&p, x, maps)?;
        for (name, y) in SCALES.into_iter().zip(&y) {
            run.output(name, y);
        }
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let dy: Vec<_> = SCALES.iter().zip(&y).map(|(name, y)| run.cotangent(name, y.shape())).collect::<Result<_>>()?;
            let dx = block.backward(&p, &mut g, saved, maps, &dy)?;
            for (name, dx) in SCALES.into_iter().zip(&dx) {
                run.grad_input(name, dx);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
