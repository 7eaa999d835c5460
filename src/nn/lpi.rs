//! `nn.local_patch_interaction`: depthwise convolutions that let neighbouring tokens talk (XCiT, arXiv 2106.09681).
//!
//! On the map of the tokens, with 3×3 (or other odd) depthwise convolutions and zero padding: XCiT's `conv1 → GELU → BN → conv2`, the
//! activation before the norm and nothing behind; or, as X-ViT (arXiv 2205.13805) words it, `conv1 → BN1 → GELU → conv2 → BN2 → GELU`.
//!
//! Backward: the parts in turn. Kept are the outputs of the convolutions; GELU and the norms are computed again.

use super::batch_norm::{self, BatchNorm2d, Updates};
use super::conv::{Conv2d, ConvSettings};
use super::conv_norm::{self, Then, gelu};
use super::param::{Layout, Names, Params};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The order of the parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Convolution, GELU, norm, convolution: XCiT's released code.
    Xcit,
    /// Twice convolution, norm, GELU: the words of X-ViT's paper.
    ConvBnGelu,
}

impl Order {
    /// From the key `lpi`.
    pub fn from_config(config: &Config) -> Result<Self> {
        if config.get("lpi").is_none() {
            return Ok(Order::Xcit);
        }
        Ok(if config.choice("lpi", &["xcit", "conv_bn_gelu"])? == "xcit" { Order::Xcit } else { Order::ConvBnGelu })
    }
}

/// What the layer is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width C.
    pub dim: usize,
    /// Side of the kernels, odd.
    pub kernel: usize,
    /// The order of the parts.
    pub order: Order,
    /// ε of the norms.
    pub eps: f64,
    /// The share of a batch in the running statistics.
    pub momentum: f64,
}

impl Settings {
    /// From the keys `kernel_size`, `lpi`, `bn_eps` and `bn_momentum`.
    pub fn from_config(config: &Config, dim: usize) -> Result<Self> {
        let kernel = config.usize_or("kernel_size", 3)?;
        if kernel.is_multiple_of(2) {
            return Err(Error::config("kernel_size", format!("expected an odd number, found {kernel}")));
        }
        let (eps, momentum) = (config.f64_or("bn_eps", 1e-5)?, config.f64_or("bn_momentum", 0.1)?);
        Ok(Settings { dim, kernel, order: Order::from_config(config)?, eps, momentum })
    }
}

/// Two depthwise convolutions and their norms: parameters `conv1`, `bn`, `conv2`, or `conv1`, `bn1`, `conv2`, `bn2`.
#[derive(Clone, Debug)]
pub struct LocalPatchInteraction {
    convs: [Conv2d; 2],
    /// One norm in XCiT's order, else two.
    norms: Vec<BatchNorm2d>,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    /// The output of the first convolution and, unless it is the last step, of the second.
    maps: Vec<Tensor<T>>,
    norms: Vec<batch_norm::Saved<T>>,
}

impl<T: Float> Saved<T> {
    /// Takes the running statistics after the call: none in evaluation.
    pub fn take_updates(&mut self) -> Updates<T> {
        self.norms.iter_mut().flat_map(batch_norm::Saved::take_updates).collect()
    }
}

impl LocalPatchInteraction {
    /// Registers the parameters.
    pub fn new(mut names: Names, settings: Settings) -> Result<Self> {
        let Settings { dim, kernel, order, eps, momentum } = settings;
        let conv = ConvSettings::depthwise(dim, kernel);
        let mut conv = |name| Conv2d::new(names.at(name), conv, conv.default_init());
        let convs = [conv("conv1")?, conv("conv2")?];
        let bn: &[&str] = if order == Order::Xcit { &["bn"] } else { &["bn1", "bn2"] };
        let norms = bn.iter().map(|name| BatchNorm2d::new(names.at(name), dim, eps, momentum)).collect();
        Ok(LocalPatchInteraction { convs, norms })
    }

    /// What the forward pass for maps `[b, h, w]` costs.
    pub fn cost(&self, size: [usize; 3], training: bool) -> Result<Cost> {
        let norms: usize = self.norms.iter().map(|norm| norm.saved_bytes(training)).sum();
        let [b, h, w] = size;
        // In the literal order the second convolution's output is kept beside y.
        let map = (self.norms.len() - 1) * 4 * b * h * w * self.convs[0].settings().inputs;
        Ok(self.convs[0].cost(size)? + self.convs[1].cost(size)? + Cost { flops: 0, activation_bytes: norms + map })
    }

    /// Tokens `[B, N, C]` of a map of `map` rows and columns, in row-major order.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, map: [usize; 2], training: bool) -> Result<(Tensor<T>, Saved<T>)> {
        let shape = x.shape();
        let x = as_map(x, map)?;
        let (y, saved) = match &self.norms[..] {
            // No one convolution does what a norm in front of zero padding does: its shift ends at the border.
            [norm] => {
                let first = self.convs[0].forward(p, &x)?;
                let (normed, saved) = norm.forward(p, &gelu(&first), training)?;
                (self.convs[1].forward(p, &normed)?, Saved { maps: vec![first], norms: vec![saved] })
            }
            norms => {
                let part = |i: usize, x: &Tensor<T>| conv_norm::forward((&self.convs[i], p), (&norms[i], p), x, training, Then::Gelu);
                let (middle, (first, saved1)) = part(0, &x)?;
                let (y, (second, saved2)) = part(1, &middle)?;
                (y, Saved { maps: vec![first, second], norms: vec![saved1, saved2] })
            }
        };
        Ok((y.reshape(shape)?, saved))
    }

    /// `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        map: [usize; 2],
        saved: Saved<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let (x, dy) = (as_map(x, map)?, as_map(dy, map)?);
        let Saved { maps, norms: saved } = saved;
        let first = &maps[0];
        let d_first = match &self.norms[..] {
            [norm] => {
                let active = gelu(first);
                let normed = norm.again(p, &active, &saved[0], false);
                let d_normed = self.convs[1].backward(p, g, &normed, &dy)?;
                drop(normed);
                let mut d = norm.backward(p, g, &active, &saved[0], &d_normed)?;
                elementwise::gelu_backward(d.data_mut(), first.data(), T::ONE);
                d
            }
            norms => {
                let mut d = dy;
                elementwise::gelu_backward(d.data_mut(), norms[1].again(p, &maps[1], &saved[1], false).data(), T::ONE);
                let d_second = norms[1].backward(p, g, &maps[1], &saved[1], &d)?;
                let normed = norms[0].again(p, first, &saved[0], false);
                let mut d = self.convs[1].backward(p, g, &gelu(&normed), &d_second)?;
                elementwise::gelu_backward(d.data_mut(), normed.data(), T::ONE);
                norms[0].backward(p, g, first, &saved[0], &d)?
            }
        };
        let [b, h, w, c] = x.dims("map")?;
        self.convs[0].backward(p, g, &x, &d_first)?.reshape([b, h * w, c])
    }
}

/// `[B, N, C]` → `[B, H, W, C]`.
fn as_map<T: Float>(x: &Tensor<T>, [h, w]: [usize; 2]) -> Result<Tensor<T>> {
    let [b, n, c] = x.dims("tokens")?;
    if h.checked_mul(w) != Some(n) {
        return Err(Error::shape("tokens of a map", format!("[batch, {h}·{w}, width]"), x.shape()));
    }
    x.reshape([b, h, w, c])
}

/// `nn.local_patch_interaction`.
pub struct Lpi;

impl Operation for Lpi {
    const NAME: &'static str = "nn.local_patch_interaction";
    const PAPER: &'static str = "2106.09681 XCiT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("dim", rng.between(1, 20)).set("height", rng.between(1, 5)).set("width", rng.between(2, 5));
        config.set("kernel_size", 2 * rng.between(0, 2) + 1).set("lpi", rng.pick(&["xcit", "conv_bn_gelu"]));
        config.set("bn_eps", 1e-5).set("bn_momentum", 0.1).set("training", rng.chance(0.5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        // Two values per channel normalise to ±1 whatever they are: in training there are more.
        let batch = draw.size("batch", 2, 3);
        let map = [config.positive("height")?, config.positive("width")?];
        draw.normal("x", [batch, map[0] * map[1], config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, _, _] = inputs.dims("x")?;
        let (layer, _) =
            Layout::build(|names| LocalPatchInteraction::new(names.here(), Settings::from_config(config, config.usize("dim")?)?))?;
        layer.cost([b, config.positive("height")?, config.positive("width")?], config.bool("training")?).map(Some)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (map, training) = ([config.positive("height")?, config.positive("width")?], config.bool("training")?);
        let settings = Settings::from_config(config, config.positive("dim")?)?;
        let (layer, layout) = Layout::build(|names| LocalPatchInteraction::new(names.here(), settings))?;
        let x = run.input("x")?;
        let mut updates = Vec::new();
        run.unary(
            &layout,
            |p, x| {
                let (y, mut saved) = layer.forward(p, x, map, training)?;
                updates = saved.take_updates();
                Ok((y, saved))
            },
            |p, g, saved, dy| layer.backward(p, g, &x, map, saved, dy),
        )?;
        run.after_buffers(&layout, updates);
        Ok(())
    }
}
