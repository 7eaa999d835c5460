//! `block.cluster`: CoC's block (arXiv 2303.01494), on maps with channels last: `x ← x + λ₁ ⊙ cluster(norm1 x)`, `x ← x + λ₂ ⊙ mlp(norm2 x)`,
//! the norms GroupNorms with one group, λ per channel or absent.

use crate::attention::cluster::{self, Cluster, draw_map, sample_settings};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::Result;
use crate::kernel::elementwise;
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::{DropPath, GroupNorm, LayerScale, Layout, Mlp, Names, Params, group_norm, mlp, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

use super::vit_block::hidden_width;

/// ε of all GroupNorms.
pub const NORM_EPS: f64 = 1e-5;
/// Where λ starts.
const SCALE: f64 = 1e-5;

/// What a block is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The clustering.
    pub cluster: cluster::Settings,
    /// Hidden width of the MLP over C, truncated.
    pub mlp_ratio: f64,
    /// Branches are scaled per channel.
    pub layer_scale: bool,
    /// Probability that a residual branch is left out in training.
    pub drop_path: f64,
}

impl Settings {
    fn from_config(config: &Config) -> Result<Self> {
        let dim = config.positive("dim")?;
        Ok(Settings {
            cluster: cluster::Settings { out_dim: dim, return_center: false, ..cluster::Settings::from_config(config, dim)? },
            mlp_ratio: config.f64_or("mlp_ratio", 4.0)?,
            layer_scale: config.bool_or("use_layer_scale", true)?,
            drop_path: 0.0,
        })
    }

    /// What a forward pass on `[b, h, w]` costs, beside the input, which stays.
    pub fn cost(&self, [b, h, w]: [usize; 3]) -> Result<Cost> {
        let (c, n) = (self.cluster.dim, b * h * w);
        let hidden = hidden_width(c, self.mlp_ratio)?;
        // The MLP; the statistics of both norms, the hidden units, y; without scales the cluster's output is not kept, but the middle is.
        let scales = if self.layer_scale { 2 * n * c } else { 0 };
        let kept = 2 * 2 * b * c + n * hidden + n * c + scales;
        Ok(self.cluster.cost(b, [h, w])? + Cost { flops: 4 * n * c * hidden, activation_bytes: 4 * kept })
    }
}

/// A block with parameters `norm1`, `token_mixer`, `norm2`, `mlp`, `layer_scale_1`, `layer_scale_2`.
#[derive(Clone, Debug)]
pub struct ClusterBlock {
    norm1: GroupNorm,
    token_mixer: Cluster,
    norm2: GroupNorm,
    mlp: Mlp,
    scales: Option<[LayerScale; 2]>,
    drops: [DropPath; 2],
}

/// What [`ClusterBlock::backward`] needs.
pub struct Saved<T: Float> {
    x: Tensor<T>,
    stats1: group_norm::Stats<T>,
    cluster: cluster::Saved<T>,
    middle: Tensor<T>,
    stats2: group_norm::Stats<T>,
    mlp: mlp::Saved<T>,
    /// The outputs of both branches, where they are scaled.
    branches: Option<[Tensor<T>; 2]>,
}

impl<T: Float> Saved<T> {
    /// What the clustering kept: the assignment of points, to look at.
    pub fn cluster(&self) -> &cluster::Saved<T> {
        &self.cluster
    }
}

impl ClusterBlock {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: Settings) -> Result<Self> {
        let dim = settings.cluster.dim;
        let norm1 = GroupNorm::new(names.at("norm1"), 1, dim, NORM_EPS)?;
        let token_mixer = Cluster::new(names.at("token_mixer"), settings.cluster)?;
        let norm2 = GroupNorm::new(names.at("norm2"), 1, dim, NORM_EPS)?;
        let mlp = Mlp::new(names.at("mlp"), dim, hidden_width(dim, settings.mlp_ratio)?, normal_02);
        let scales = settings.layer_scale.then(|| ["layer_scale_1", "layer_scale_2"].map(|name| LayerScale::new(names, name, dim, SCALE)));
        let drops = [DropPath::new(names, settings.drop_path)?, DropPath::new(names, settings.drop_path)?];
        Ok(ClusterBlock { norm1, token_mixer, norm2, mlp, scales, drops })
    }

    /// `[B, H, W, C]` → the same.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let (normed, stats1) = self.norm1.forward(p, &x)?;
        let (branch1, cluster) = self.token_mixer.forward(p, &normed)?;
        drop(normed);
        let mut branch1 = self.drops[0].apply(p, branch1);
        let middle = match &self.scales {
            Some([scale, _]) => scale.forward(p, &x, &branch1)?,
            None => {
                elementwise::add(branch1.data_mut(), x.data());
                branch1.clone()
            }
        };
        let (normed, stats2) = self.norm2.forward(p, &middle)?;
        let (y, mlp, branches) = match &self.scales {
            Some([_, scale]) => {
                let (branch2, mlp) = self.mlp.forward(p, &normed, None)?;
                let branch2 = self.drops[1].apply(p, branch2);
                (scale.forward(p, &middle, &branch2)?, mlp, Some([branch1, branch2]))
            }
            None => {
                let (y, mlp) = self.drops[1].residual(p, &middle, |residual| self.mlp.forward(p, &normed, residual))?;
                (y, mlp, None)
            }
        };
        Ok((y, Saved { x, stats1, cluster, middle, stats2, mlp, branches }))
    }

    /// `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let Saved { x, stats1, cluster, middle, stats2, mlp, branches } = saved;
        let scaled = |g: &mut Params<T>, i: usize, d: &Tensor<T>| -> Result<Tensor<T>> {
            let df = match (&self.scales, &branches) {
                (Some(scales), Some(branches)) => scales[i].backward(p, g, &branches[i], d)?,
                _ => d.clone(),
            };
            Ok(self.drops[i].apply(p, df))
        };
        let df = scaled(g, 1, dy)?;
        let normed = self.norm2.again(p, &middle, &stats2);
        let d_normed = self.mlp.backward(p, g, &normed, mlp, &df)?;
        drop((df, normed));
        let mut d_middle = self.norm2.backward(p, g, &middle, &stats2, &d_normed)?;
        elementwise::add(d_middle.data_mut(), dy.data());
        drop((d_normed, middle));
        let df = scaled(g, 0, &d_middle)?;
        let normed = self.norm1.again(p, &x, &stats1);
        let d_normed = self.token_mixer.backward(p, g, &normed, cluster, &df)?;
        drop((df, normed));
        let mut dx = self.norm1.backward(p, g, &x, &stats1, &d_normed)?;
        elementwise::add(dx.data_mut(), d_middle.data());
        Ok(dx)
    }
}

/// `block.cluster`.
pub struct BlockCluster;

impl Operation for BlockCluster {
    const NAME: &'static str = "block.cluster";
    const PAPER: &'static str = "2303.01494 CoC";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("dim", rng.between(1, 6)).set("mlp_ratio", rng.range(1.0, 3.0)).set("use_layer_scale", rng.chance(0.5));
        sample_settings(rng, &mut config);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_map(config, draw)
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, c, h, w] = inputs.dims("x")?;
        let input = Cost { flops: 0, activation_bytes: 4 * b * c * h * w };
        Ok(Some(input + Settings::from_config(config)?.cost([b, h, w])?))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config())?;
        let (block, layout) = Layout::build(|names| ClusterBlock::new(names, settings))?;
        run.unary(
            &layout,
            |p, x| {
                let (y, saved) = block.forward(p, channels_last(x)?)?;
                Ok((channels_first(&y)?, saved))
            },
            |p, g, saved, dy| channels_first(&block.backward(p, g, saved, &channels_last(dy)?)?),
        )
    }
}
