//! CoaT's positions (arXiv 2104.06399), both by depthwise convolutions of the map that tokens `[B, 1 + HW, C]` hold behind a class token.
//!
//! `nn.conv_position_encoding` (CPE): `y₀ = x₀`, `ŷ = x̂ + DW(x̂)`. The sum is the same convolution with 1 added to the centre of every
//! kernel: one pass. Backward: `dx̂ = ĝ + DWᵀ(ĝ)`, the same way; `dW`, `db` of DW.
//!
//! `nn.conv_relative_position` (CRPE): `y₀ = 0`, `ŷ = q̂ ∘ U` with `U = DW(v̂)`, where groups of heads have kernels of different
//! windows. Backward: `dq̂ = ĝ ∘ U`, `dU = ĝ ∘ q̂`, `dv̂ = DWᵀ(dU)`.
//!
//! Nothing is transposed: channels of tokens are head-major, which is what the convolutions want.

use super::{Conv2d, ConvSettings, Layout, Names, Params};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::depthwise;
use crate::kernel::factorized::products;
use crate::kernel::maps::{Map, MapMut};
use crate::linalg::{ColumnsMut, Mat};
use crate::tensor::random::Rng;
use crate::tensor::{Buffer, Float, Tensor};

/// The largest window or kernel.
const LARGEST: usize = 1023;

/// An odd window, so that the map keeps its size.
fn odd(key: &str, window: usize) -> Result<usize> {
    if window % 2 == 1 && window <= LARGEST {
        Ok(window)
    } else {
        Err(Error::config(key, format!("expected odd numbers of at most {LARGEST}, found {window}")))
    }
}

/// The keys `{height}` and `{width}` of a token map.
pub fn map_size(config: &Config, height: &str, width: &str) -> Result<[usize; 2]> {
    let map = [config.positive(height)?, config.positive(width)?];
    match map.iter().all(|&side| side < 1 << 24) {
        true => Ok(map),
        false => Err(Error::config(height, format!("expected a map of sides below 2²⁴, found {map:?}"))),
    }
}

/// An error unless `x` is `[B, 1 + HW, C]`; returns B.
pub fn check_tokens<T: Float>(what: &str, x: &Tensor<T>, map: [usize; 2], dim: usize) -> Result<usize> {
    let [b, n, c] = x.dims(what)?;
    if n == 1 + map[0] * map[1] && c == dim {
        Ok(b)
    } else {
        Err(Error::shape(what, format!("[batch, 1 + {} · {}, {dim}]", map[0], map[1]), x.shape()))
    }
}

/// CPE: a depthwise convolution with parameters `proj.weight` `[C, 1, k, k]` and `proj.bias`, and its input.
#[derive(Clone, Debug)]
pub struct PositionEncoding {
    proj: Conv2d,
    dim: usize,
}

impl PositionEncoding {
    /// Registers `proj`.
    pub fn new(mut names: Names, dim: usize, kernel: usize) -> Result<Self> {
        let settings = ConvSettings::depthwise(dim, odd("kernel_size", kernel)?);
        Ok(PositionEncoding { proj: Conv2d::new(names.at("proj"), settings, settings.default_init())?, dim })
    }

    /// The kernels with 1 added at their centres.
    fn weight<T: Float>(&self, p: &Params<T>) -> Buffer<T> {
        let weight = p.get(self.proj.weight());
        let mut out = Buffer::scratch(weight.len());
        out.copy_from_slice(weight);
        let taps = self.proj.geometry().taps();
        out.chunks_exact_mut(taps).for_each(|kernel| kernel[taps / 2] += T::ONE);
        out
    }

    /// `[B, 1 + HW, C]` → the same.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, map: [usize; 2]) -> Result<Tensor<T>> {
        let (size, mut y) = (self.size(x, map)?, Tensor::scratch(x.shape()));
        let out = MapMut::within(ColumnsMut::new(y.data_mut(), self.dim), size, 1);
        let bias = self.proj.bias().map(|bias| p.get(bias));
        depthwise::forward(out, Map::within(x.data(), size, 1, self.dim, 0), &self.weight(p), bias, self.proj.geometry());
        copy_class_rows(&mut y, x);
        Ok(y)
    }

    /// `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        map: [usize; 2],
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let (size, mut dx) = (self.size(x, map)?, Tensor::scratch(x.shape()));
        dy.expect_shape("gradient of a position encoding", x.shape())?;
        let dy_map = Map::within(dy.data(), size, 1, self.dim, 0);
        let out = MapMut::within(ColumnsMut::new(dx.data_mut(), self.dim), size, 1);
        depthwise::backward_input(out, dy_map, &self.weight(p), self.proj.geometry());
        copy_class_rows(&mut dx, dy);
        add_params(g, &self.proj, Map::within(x.data(), size, 1, self.dim, 0), dy_map);
        Ok(dx)
    }

    fn size<T: Float>(&self, x: &Tensor<T>, map: [usize; 2]) -> Result<[usize; 4]> {
        Ok([check_tokens("input of a position encoding", x, map, self.dim)?, map[0], map[1], self.dim])
    }

    /// What [`forward`](Self::forward) costs.
    pub fn cost(&self, b: usize, map: [usize; 2]) -> Cost {
        let pixels = b * map[0] * map[1];
        Cost { flops: 2 * pixels * self.dim * self.proj.geometry().taps(), activation_bytes: 4 * (pixels + b) * self.dim }
    }
}

fn copy_class_rows<T: Float>(to: &mut Tensor<T>, from: &Tensor<T>) {
    let shape = from.shape();
    let (image, c) = ((shape[1] * shape[2]).max(1), shape[2]);
    for (to, from) in to.data_mut().chunks_exact_mut(image).zip(from.data().chunks_exact(image)) {
        to[..c].copy_from_slice(&from[..c]);
    }
}

/// Adds the gradients of a depthwise convolution's parameters.
fn add_params<T: Float>(g: &mut Params<T>, conv: &Conv2d, x: Map<T>, dy: Map<T>) {
    let mut db = Buffer::zeros(conv.settings().outputs);
    depthwise::backward_params(g.get_mut(conv.weight()), Some(&mut db), x, dy, conv.geometry());
    if let Some(bias) = conv.bias() {
        g.get_mut(bias).iter_mut().zip(db.iter()).for_each(|(total, &part)| *total += part);
    }
}

/// v inside rows of something wider: `[B, 1 + HW, stride]`, C columns from `column` on.
#[derive(Clone, Copy)]
pub struct Values<'a, T> {
    /// All rows.
    pub data: &'a [T],
    /// The length of a row.
    pub stride: usize,
    /// The first column.
    pub column: usize,
}

/// CRPE: depthwise convolutions `conv_list.{i}` with their own window for each group of heads.
#[derive(Clone, Debug)]
pub struct RelativePosition {
    convs: Vec<Conv2d>,
    dim: usize,
}

impl RelativePosition {
    /// Registers `conv_list`: heads of width `dim / heads` in groups of `splits`, with `windows`.
    pub fn new(mut names: Names, dim: usize, heads: usize, windows: &[usize], splits: &[usize]) -> Result<Self> {
        if heads == 0 || dim == 0 || !dim.is_multiple_of(heads) {
            return Err(Error::config("num_heads", format!("expected a divisor of the width {dim}, found {heads}")));
        }
        let sum = splits.iter().try_fold(0usize, |sum, &split| sum.checked_add(split));
        if windows.len() != splits.len() || sum != Some(heads) || splits.contains(&0) {
            let said =
                format!("expected positive numbers that sum to {heads} heads, one for each of the windows {windows:?}, found {splits:?}");
            return Err(Error::config("crpe_head_splits", said));
        }
        let conv = |(i, (&window, &split)): (usize, (&usize, &usize))| {
            let settings = ConvSettings::depthwise(split * (dim / heads), odd("crpe_windows", window)?);
            Conv2d::new(names.at(format!("conv_list.{i}")), settings, settings.default_init())
        };
        Ok(RelativePosition { convs: windows.iter().zip(splits).enumerate().map(conv).collect::<Result<_>>()?, dim })
    }

    /// From the keys `num_heads`, `crpe_windows`, `crpe_head_splits`.
    pub fn from_config(names: Names, config: &Config, dim: usize) -> Result<Self> {
        let (windows, splits) = (config.usizes("crpe_windows")?, config.usizes("crpe_head_splits")?);
        Self::new(names, dim, config.usize_or("num_heads", 8)?, &windows, &splits)
    }

    /// Convolution, first channel, channels.
    fn groups(&self) -> impl Iterator<Item = (&Conv2d, usize, usize)> {
        self.convs.iter().scan(0, |first, conv| {
            let channels = conv.settings().outputs;
            *first += channels;
            Some((conv, *first - channels, channels))
        })
    }

    /// `U = DW(v̂)`, `[B, HW, C]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, v: Values<T>, batch: usize, [h, w]: [usize; 2]) -> Tensor<T> {
        let mut u = Tensor::scratch([batch, h * w, self.dim]);
        let mut rest = ColumnsMut::new(u.data_mut(), self.dim);
        for (conv, first, channels) in self.groups() {
            let (out, right) = rest.split_at(channels);
            rest = right;
            let size = [batch, h, w, channels];
            let x = Map::within(v.data, size, 1, v.stride, v.column + first);
            let bias = conv.bias().map(|bias| p.get(bias));
            depthwise::forward(MapMut::within(out, size, 0), x, p.get(conv.weight()), bias, conv.geometry());
        }
        u
    }

    /// `dv̂ = DWᵀ(dU)`, written to the rows behind the class tokens of `dv` `[B (1 + HW), C]`; adds the gradients of the parameters.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        v: Values<T>,
        du: &Tensor<T>,
        dv: ColumnsMut<T>,
        [h, w]: [usize; 2],
    ) {
        let (batch, mut rest) = (du.shape()[0], dv);
        for (conv, first, channels) in self.groups() {
            let (out, right) = rest.split_at(channels);
            rest = right;
            let size = [batch, h, w, channels];
            let du = Map::within(du.data(), size, 0, self.dim, first);
            depthwise::backward_input(MapMut::within(out, size, 1), du, p.get(conv.weight()), conv.geometry());
            add_params(g, conv, Map::within(v.data, size, 1, v.stride, v.column + first), du);
        }
    }

    /// What [`forward`](Self::forward) costs.
    pub fn cost(&self, b: usize, map: [usize; 2]) -> Cost {
        let pixels = b * map[0] * map[1];
        let per_pixel: usize = self.convs.iter().map(|conv| conv.settings().outputs * conv.geometry().taps()).sum();
        Cost { flops: 2 * pixels * per_pixel, activation_bytes: 4 * pixels * self.dim }
    }
}

/// Random `dim`, `num_heads`, `crpe_windows`, `crpe_head_splits`.
pub fn sample_heads(rng: &mut Rng, config: &mut Config, narrowest: usize) {
    let groups = rng.between(1, 3);
    let splits: Vec<usize> = (0..groups).map(|_| rng.between(1, 2)).collect();
    let windows: Vec<usize> = (0..groups).map(|_| 2 * rng.between(0, 3) + 1).collect();
    let heads: usize = splits.iter().sum();
    config.set("dim", heads * rng.between(narrowest, 3)).set("num_heads", heads);
    config.set("crpe_windows", windows).set("crpe_head_splits", splits);
}

/// `nn.conv_position_encoding`.
pub struct ConvPositionEncoding;

impl ConvPositionEncoding {
    fn build(config: &Config) -> Result<(PositionEncoding, std::sync::Arc<Layout>, [usize; 2])> {
        let (dim, kernel) = (config.positive("dim")?, config.usize_or("kernel_size", 3)?);
        let (cpe, layout) = Layout::build(|names| PositionEncoding::new(names.here(), dim, kernel))?;
        Ok((cpe, layout, map_size(config, "height", "width")?))
    }
}

impl Operation for ConvPositionEncoding {
    const NAME: &'static str = "nn.conv_position_encoding";
    const PAPER: &'static str = "2104.06399 CoaT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("dim", rng.between(1, 20)).set("kernel_size", 2 * rng.between(0, 3) + 1);
        config.set("height", rng.between(1, 7)).set("width", rng.between(1, 7));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let ([h, w], batch) = (map_size(config, "height", "width")?, draw.size("batch", 1, 3));
        draw.normal("x", [batch, 1 + h * w, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, ..], (cpe, _, map)) = (inputs.dims::<3>("x")?, Self::build(config)?);
        Ok(Some(cpe.cost(b, map)))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (cpe, layout, map) = Self::build(run.config())?;
        let x = run.input("x")?;
        check_tokens("input `x`", &x, map, cpe.dim)?;
        run.unary(&layout, |p, x| Ok((cpe.forward(p, x, map)?, ())), |p, g, (), dy| cpe.backward(p, g, &x, map, dy))
    }
}

/// `[B, h, N, d]` → `[B, N, h d]`; or back, if `split`.
fn regroup<T: Float>(x: &Tensor<T>, [b, h, n, d]: [usize; 4], split: bool) -> Tensor<T> {
    let mut y = if split { Tensor::scratch([b, h, n, d]) } else { Tensor::scratch([b, n, h * d]) };
    let out = y.data_mut();
    for i in 0..b * h * n {
        let (image, head, token) = (i / (h * n), i / n % h, i % n);
        let (apart, together) = (i * d, ((image * n + token) * h + head) * d);
        let (to, from) = if split { (apart, together) } else { (together, apart) };
        out[to..to + d].copy_from_slice(&x.data()[from..from + d]);
    }
    y
}

/// `nn.conv_relative_position`.
pub struct ConvRelativePosition;

impl ConvRelativePosition {
    fn build(config: &Config) -> Result<(RelativePosition, std::sync::Arc<Layout>, [usize; 2])> {
        let dim = config.positive("dim")?;
        let (crpe, layout) = Layout::build(|names| RelativePosition::from_config(names.here(), config, dim))?;
        Ok((crpe, layout, map_size(config, "height", "width")?))
    }
}

/// Rows 1.. of an image of tokens.
fn behind_class<T: Float>(x: &Tensor<T>, image: usize, pixels: usize, c: usize) -> Mat<'_, T> {
    let from = (image * (1 + pixels) + 1) * c;
    Mat::new(&x.data()[from..from + pixels * c], pixels, c)
}

impl Operation for ConvRelativePosition {
    const NAME: &'static str = "nn.conv_relative_position";
    const PAPER: &'static str = "2104.06399 CoaT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_heads(rng, &mut config, 1);
        config.set("height", rng.between(1, 7)).set("width", rng.between(1, 7));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let ([h, w], batch, heads) = (map_size(config, "height", "width")?, draw.size("batch", 1, 3), config.positive("num_heads")?);
        for name in ["q", "v"] {
            draw.normal(name, [batch, heads, 1 + h * w, config.positive("dim")? / heads]);
        }
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, heads, n, d], (crpe, _, map)) = (inputs.dims("q")?, Self::build(config)?);
        // U, the output, and q and v as tokens.
        Ok(Some(crpe.cost(b, map) + Cost { flops: 0, activation_bytes: 4 * 3 * b * heads * n * d }))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (crpe, layout, map) = Self::build(run.config())?;
        let (heads, pixels, c) = (run.config().usize_or("num_heads", 8)?, map[0] * map[1], crpe.dim);
        let (q, v) = (run.input("q")?, run.input("v")?);
        let dims @ [b, _, _, _] = q.dims("input `q`")?;
        q.expect_shape("input `q`", [b, heads, 1 + pixels, c / heads])?;
        v.expect_shape("input `v`", q.shape())?;
        let p = run.params(&layout)?;
        let (q, v) = (regroup(&q, dims, false), regroup(&v, dims, false));
        let values = Values { data: v.data(), stride: c, column: 0 };
        let u = crpe.forward(&p, values, b, map);
        let y = {
            let mut y = Tensor::zeros(q.shape());
            for (image, y) in y.data_mut().chunks_exact_mut((1 + pixels) * c).enumerate() {
                let u = Mat::new(&u.data()[image * pixels * c..(image + 1) * pixels * c], pixels, c);
                products(&mut y[c..], c, behind_class(&q, image, pixels, c), u);
            }
            regroup(&y, dims, true)
        };
        run.output("y", &y);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let dy = regroup(&run.cotangent("y", y.shape())?, dims, false);
            let (mut dq, mut dv, mut du) = (Tensor::zeros(q.shape()), Tensor::zeros(q.shape()), Tensor::scratch(u.shape()));
            let images = dq.data_mut().chunks_exact_mut((1 + pixels) * c).zip(du.data_mut().chunks_exact_mut(pixels * c));
            for (image, (dq, du)) in images.enumerate() {
                let dy = behind_class(&dy, image, pixels, c);
                products(&mut dq[c..], c, dy, Mat::new(&u.data()[image * pixels * c..(image + 1) * pixels * c], pixels, c));
                products(du, c, dy, behind_class(&q, image, pixels, c));
            }
            crpe.backward(&p, &mut g, values, &du, ColumnsMut::new(dv.data_mut(), c), map);
            run.grad_input("q", &regroup(&dq, dims, true));
            run.grad_input("v", &regroup(&dv, dims, true));
            run.grad_params(&g);
        }
        Ok(())
    }
}
