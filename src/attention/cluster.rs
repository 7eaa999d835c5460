//! `attention.cluster`: the context clusters of CoC (*Image as Set of Points*, arXiv 2303.01494), on maps with channels last.
//!
//! `F = f(x)`, `V = v(x)` (1×1 convolutions), per head and region the clustering of [`kernel::cluster`](crate::kernel::cluster),
//! `y = proj(O)`. Regions exist only if there are several along rows *and* columns; keys that end in `_w` count along rows.
//!
//! `denominator`: `"sim"` (default: the paper, and the code since May 2023) divides a cluster by its summed similarities, `"count"` by the
//! number of its points, as older checkpoints were trained. `return_center` gives the centres instead of the points.
//!
//! Backward: the convolutions as linear layers, in between the kernel's.

use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::cluster::{self as core, Sizes, Upstream};
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::{Init, Layout, Linear, Names, Param, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Tensor};

/// The most centres of a region.
const MOST_CENTERS: usize = 4096;

/// What the layer is made of. Proposals and folds are no parameters: a checkpoint loads under any of them.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width of the input.
    pub dim: usize,
    /// Width of the output.
    pub out_dim: usize,
    /// Centres of a region along rows and columns.
    pub proposals: [usize; 2],
    /// Regions along rows and columns.
    pub folds: [usize; 2],
    /// Heads e.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The centres are the output.
    pub return_center: bool,
    /// Divide by the number of points.
    pub count: bool,
}

impl Settings {
    /// From a configuration, with the sheet's defaults. `dim` is given: `out_dim` is the same unless the key is there.
    pub fn from_config(config: &Config, dim: usize) -> Result<Self> {
        let or = |key, default| config.usize_or(key, default);
        let denominator = config.str_or("denominator", "sim")?;
        if !["sim", "count"].contains(&denominator) {
            return Err(Error::config("denominator", format!("expected \"sim\" or \"count\", found \"{denominator}\"")));
        }
        Ok(Settings {
            dim,
            out_dim: or("out_dim", dim)?,
            proposals: [or("proposal_w", 2)?, or("proposal_h", 2)?],
            folds: [or("fold_w", 2)?, or("fold_h", 2)?],
            heads: or("heads", 4)?,
            head_dim: or("head_dim", 24)?,
            return_center: config.bool_or("return_center", false)?,
            count: denominator == "count",
        })
    }

    /// Width of all heads.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// The regions of a map.
    fn sizes(&self, batch: usize, map: [usize; 2]) -> Result<Sizes> {
        // One fold of 1 switches both off.
        let folds = if self.folds.iter().all(|&fold| fold > 1) { self.folds } else { [1; 2] };
        for (axis, key) in ["fold_w", "fold_h"].into_iter().enumerate() {
            if !map[axis].is_multiple_of(folds[axis]) {
                return Err(Error::config(key, format!("expected a divisor of the map {}×{}, found {}", map[0], map[1], folds[axis])));
            }
        }
        let Settings { heads, head_dim: dim, proposals: centers, count, .. } = *self;
        Ok(Sizes { batch, map, heads, dim, folds, centers, alpha: 1.0, beta: 0.0, count })
    }

    /// Rows and columns of the output.
    fn output_map(&self, sizes: Sizes) -> [usize; 2] {
        if self.return_center { std::array::from_fn(|axis| sizes.folds[axis] * sizes.centers[axis]) } else { sizes.map }
    }

    /// What a forward pass on maps with channels last costs.
    pub fn cost(&self, batch: usize, map: [usize; 2]) -> Result<Cost> {
        let sizes = self.sizes(batch, map)?;
        let (points, [rows, cols]) = (sizes.points(), self.output_map(sizes));
        let places = batch * rows * cols;
        let flops = 2 * self.inner() * (2 * self.dim * points + self.out_dim * places) + sizes.flops(self.return_center);
        // f, v, what proj reads, y; similarity and index of every point and head; the clusters.
        let kept = 2 * points * self.inner() + places * (self.inner() + self.out_dim) + 2 * points * self.heads + sizes.clusters_len();
        Ok(Cost { flops, activation_bytes: 4 * kept })
    }
}

/// Context clustering with parameters `f`, `v`, `proj`, `sim_alpha`, `sim_beta`, on `[B, H, W, C]`.
#[derive(Clone, Debug)]
pub struct Cluster {
    f: Linear,
    v: Linear,
    proj: Linear,
    alpha: Param,
    beta: Param,
    settings: Settings,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    f: Tensor<T>,
    v: Tensor<T>,
    out: Tensor<T>,
    assigned: Tensor<T>,
    clusters: Tensor<T>,
    sizes: Sizes,
}

impl<T: Float> Saved<T> {
    /// The cluster of every point and head, to look at: `[B, H, W, heads]`.
    pub fn assignment(&self) -> IntTensor {
        let Sizes { batch, map: [height, width], heads, .. } = self.sizes;
        let data = self.assigned.data().chunks_exact(2).map(|pair| pair[1].to_f64() as i64).collect();
        IntTensor { shape: [batch, height, width, heads].into(), data }
    }
}

impl Cluster {
    /// Registers the parameters.
    pub fn new(mut names: Names, settings: Settings) -> Result<Self> {
        let Settings { dim, out_dim, proposals, folds, heads, head_dim, .. } = settings;
        let positive = [("dim", dim), ("out_dim", out_dim), ("heads", heads), ("head_dim", head_dim), ("fold_w", folds[0])];
        for (key, value) in positive.into_iter().chain([("fold_h", folds[1])]) {
            if value == 0 || value > 1 << 24 {
                return Err(Error::config(key, format!("expected a positive integer below 2^24, found {value}")));
            }
        }
        if !(1..=MOST_CENTERS).contains(&proposals[0].saturating_mul(proposals[1])) {
            let found = format!("{}·{}", proposals[0], proposals[1]);
            return Err(Error::config("proposal_w", format!("expected proposal_w · proposal_h from 1 to {MOST_CENTERS}, found {found}")));
        }
        let inner = settings.inner();
        Ok(Cluster {
            f: Linear::pointwise(names.at("f"), dim, inner, true),
            v: Linear::pointwise(names.at("v"), dim, inner, true),
            proj: Linear::pointwise(names.at("proj"), inner, out_dim, true),
            alpha: names.param("sim_alpha", [1], Init::ONES),
            beta: names.param("sim_beta", [1], Init::ZEROS),
            settings,
        })
    }

    fn sizes<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<Sizes> {
        let [batch, height, width, c] = x.dims("input of a context cluster")?;
        if c != self.settings.dim || height * width == 0 {
            let expected = format!("[batch, height, width, {}] with a point at least", self.settings.dim);
            return Err(Error::shape("input of a context cluster", expected, x.shape()));
        }
        let [alpha, beta] = [self.alpha, self.beta].map(|param| p.get(param)[0].to_f64());
        Ok(Sizes { alpha, beta, ..self.settings.sizes(batch, [height, width])? })
    }

    /// The points (or centres) after clustering.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let sizes = self.sizes(p, x)?;
        let Sizes { batch, map, heads, .. } = sizes;
        let (f, v) = (self.f.forward(p, x)?, self.v.forward(p, x)?);
        let [rows, cols] = self.settings.output_map(sizes);
        let mut out = Tensor::scratch([batch, rows, cols, self.settings.inner()]);
        let mut assigned = Tensor::scratch([batch, map[0], map[1], 2 * heads]);
        let mut clusters = Tensor::scratch([sizes.clusters_len()]);
        let return_center = self.settings.return_center;
        core::forward(out.data_mut(), assigned.data_mut(), clusters.data_mut(), f.data(), v.data(), sizes, return_center);
        let y = self.proj.forward(p, &out)?;
        Ok((y, Saved { f, v, out, assigned, clusters, sizes }))
    }

    /// `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: Saved<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let Saved { f, v, out, assigned, clusters, sizes } = saved;
        let d_out = self.proj.backward(p, g, &out, dy)?;
        drop(out);
        let upstream = if self.settings.return_center { Upstream::Centers(d_out.data()) } else { Upstream::Points(d_out.data()) };
        let (mut df, mut dv) = (Tensor::scratch(f.shape()), Tensor::scratch(v.shape()));
        let sums = core::backward(df.data_mut(), dv.data_mut(), upstream, assigned.data(), clusters.data(), f.data(), v.data(), sizes);
        drop((d_out, f, v));
        for (param, sum) in [self.alpha, self.beta].into_iter().zip(sums) {
            g.get_mut(param)[0] += sum;
        }
        let mut dx = self.f.backward(p, g, x, &df)?;
        self.v.backward_params(g, x, &dv)?;
        self.v.add_backward_input(p, &mut dx, &dv)?;
        Ok(dx)
    }
}

/// Random proposals, folds, heads.
pub fn sample_settings(rng: &mut Rng, config: &mut Config) {
    config.set("proposal_w", rng.between(1, 3)).set("proposal_h", rng.between(1, 3));
    config.set("fold_w", rng.between(1, 3)).set("fold_h", rng.between(1, 3));
    let wide = rng.chance(0.1);
    config.set("heads", rng.between(1, 3)).set("head_dim", if wide { [16, 19, 33][rng.below(3)] } else { rng.between(2, 5) });
}

/// A random map `x` `[batch, dim, height, width]` that the folds divide.
pub fn draw_map(config: &Config, draw: &mut Draw) -> Result<()> {
    let folds = [config.positive("fold_w")?, config.positive("fold_h")?];
    let [down, across] = if folds.iter().all(|&f| f > 1) { folds } else { [1, 1] };
    let (batch, height, width) = (draw.size("batch", 1, 2), down * draw.rng.between(1, 4), across * draw.rng.between(1, 4));
    let (height, width) = (draw.size("height", height, height), draw.size("width", width, width));
    draw.normal("x", [batch, config.positive("dim")?, height, width]);
    Ok(())
}

/// `attention.cluster`.
pub struct ClusterAttention;

impl Operation for ClusterAttention {
    const NAME: &'static str = "attention.cluster";
    const PAPER: &'static str = "2303.01494 CoC";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("dim", rng.between(1, 6)).set("out_dim", rng.between(1, 6));
        sample_settings(rng, &mut config);
        config.set("return_center", rng.chance(0.3)).set("denominator", rng.pick(&["sim", "count"]));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_map(config, draw)
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [batch, dim, height, width] = inputs.dims("x")?;
        // The map with channels last stays for the weight gradients.
        let input = Cost { flops: 0, activation_bytes: 4 * batch * dim * height * width };
        Ok(Some(input + Settings::from_config(config, dim)?.cost(batch, [height, width])?))
    }

    /// Regions of 7×7 points, as in all published networks, where they divide the map.
    fn bench(size: BenchSize) -> Option<Benchmark> {
        let side = size.side()?;
        let fold = if side.is_multiple_of(7) { side / 7 } else { 1 };
        let mut config = Config::default();
        config.set("dim", size.dim).set("out_dim", size.dim).set("proposal_w", 2).set("proposal_h", 2);
        config.set("fold_w", fold).set("fold_h", fold).set("heads", size.heads).set("head_dim", size.dim / size.heads);
        config.set("return_center", false).set("denominator", "sim");
        Some(Benchmark { config, ..Benchmark::default() }.size("batch", 1).size("height", side).size("width", side))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config(), run.config().positive("dim")?)?;
        let (layer, layout) = Layout::build(|names| Cluster::new(names.here(), settings))?;
        let x = channels_last(&run.input("x")?)?;
        run.unary(
            &layout,
            |p, _| {
                let (y, saved) = layer.forward(p, &x)?;
                Ok((channels_first(&y)?, saved))
            },
            |p, g, saved, dy| channels_first(&layer.backward(p, g, &x, saved, &channels_last(dy)?)?),
        )
    }
}
