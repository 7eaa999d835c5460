//! `nn.conv2d`: two-dimensional convolution of channels-last maps.
//!
//! `y[b, i, j, o] = bias[o] + Σ_{c,u,v} weight[o, c, u, v] x[b, i s − p + u d, j s − p + v d, g(o) C/groups + c]`, zero outside the map.
//!
//! 1×1 with stride 1 is a matrix product. Else the windows of the output pixels are rows of a matrix `[pixels, (u, v, c)]`, times the weight
//! in the same order; the product makes a few of them at a time. `dx` is, with stride 1, the convolution of `dy` by the kernel turned around,
//! else `dy W` put back; `dWᵀ = windowsᵀ dy`, `db = Σ dy`. Groups are done one by one on strided operands; one channel per group goes to
//! [`depthwise`].

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::maps::{channels_first, channels_last};
use super::param::{Init, Layout, Names, Param, Params};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::im2col::{Geometry, Lines, Windows, col2im, im2col};
use crate::kernel::maps::{Map, MapMut, transpose};
use crate::kernel::reduce::add_column_sums;
use crate::kernel::{depthwise, elementwise};
use crate::linalg::{Activation, Epilogue, Mat, MatMut, Packed, gemm, gemm_packed, gemm_rows};
use crate::tensor::random::Rng;
use crate::tensor::{Buffer, Float, Tensor};

/// Elements of the windows that exist at a time.
const BLOCK: usize = 1 << 20;

/// What a convolution is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvSettings {
    /// Channels in.
    pub inputs: usize,
    /// Channels out.
    pub outputs: usize,
    /// Rows and columns of the kernel.
    pub kernel: [usize; 2],
    /// Steps.
    pub stride: [usize; 2],
    /// Zeros around the map.
    pub padding: [usize; 2],
    /// Distances between kernel positions.
    pub dilation: [usize; 2],
    /// Groups: output channels see the input channels of their own group.
    pub groups: usize,
    /// Whether there is a bias.
    pub bias: bool,
}

impl ConvSettings {
    /// A square kernel, stride 1, no padding, no dilation, one group, with bias.
    pub fn new(inputs: usize, outputs: usize, kernel: usize) -> Self {
        ConvSettings { inputs, outputs, kernel: [kernel; 2], stride: [1; 2], padding: [0; 2], dilation: [1; 2], groups: 1, bias: true }
    }

    /// A depthwise convolution of odd `kernel` that keeps the map's size, with bias.
    pub fn depthwise(channels: usize, kernel: usize) -> Self {
        ConvSettings { groups: channels, padding: [kernel / 2; 2], ..Self::new(channels, channels, kernel) }
    }

    /// Inputs that go into one output: `C/groups · kh · kw`.
    pub fn fan_in(&self) -> usize {
        self.inputs / self.groups.max(1) * self.kernel[0] * self.kernel[1]
    }

    /// PyTorch's default initialisation.
    pub fn default_init(&self) -> Init {
        Init::FanIn(self.fan_in())
    }

    /// Kaiming-normal by fan-out: deviation `√(2 / (kh kw C_out))`.
    pub fn kaiming(&self) -> Init {
        Init::Normal((2.0 / (self.kernel[0] * self.kernel[1] * self.outputs) as f64).sqrt())
    }

    fn geometry(&self) -> Geometry {
        Geometry { kernel: self.kernel, stride: self.stride, padding: self.padding, dilation: self.dilation }
    }
}

/// What follows a convolution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Then {
    /// Nothing.
    #[default]
    Identity,
    /// `max(y, 0)`.
    Relu,
    /// GELU.
    Gelu,
}

/// What is done to a convolution's output: `then(y + bias + residual)`.
pub(super) struct Tail<'a, T: Float> {
    pub bias: Option<&'a [T]>,
    pub residual: Option<&'a Tensor<T>>,
    pub then: Then,
}

impl<T: Float> Default for Tail<'_, T> {
    fn default() -> Self {
        Tail { bias: None, residual: None, then: Then::Identity }
    }
}

/// A convolution: `weight` `[out, in/groups, kh, kw]`, `bias` `[out]`.
#[derive(Clone, Debug)]
pub struct Conv2d {
    weight: Param,
    bias: Option<Param>,
    settings: ConvSettings,
    geometry: Geometry,
}

impl Conv2d {
    /// Registers `weight` and, if there is one, `bias` (zero, but uniform like the weight under [`Init::FanIn`]).
    pub fn new(names: Names, settings: ConvSettings, init: Init) -> Result<Self> {
        Self::named(names, settings, init, ["weight", "bias"])
    }

    /// [`new`](Self::new) with other names for weight and bias, as some releases have them.
    pub fn named(mut names: Names, settings: ConvSettings, init: Init, [weight_name, bias_name]: [&str; 2]) -> Result<Self> {
        let ConvSettings { inputs, outputs, kernel, stride, dilation, groups, bias, .. } = settings;
        for (key, pair) in [("kernel_size", kernel), ("stride", stride), ("dilation", dilation)] {
            if pair.contains(&0) {
                return Err(Error::config(key, format!("expected positive numbers, found {pair:?}")));
            }
        }
        if groups == 0 || inputs == 0 || outputs == 0 || !inputs.is_multiple_of(groups) || !outputs.is_multiple_of(groups) {
            return Err(Error::config("groups", format!("expected a divisor of {inputs} and {outputs} channels, found {groups}")));
        }
        let weight = names.param(weight_name, crate::tensor::Shape::try_new(&[outputs, inputs / groups, kernel[0], kernel[1]])?, init);
        let start = if matches!(init, Init::FanIn(_)) { init } else { Init::ZEROS };
        let bias = bias.then(|| names.param(bias_name, [outputs], start));
        Ok(Conv2d { weight, bias, settings, geometry: settings.geometry() })
    }

    /// What it is.
    pub fn settings(&self) -> ConvSettings {
        self.settings
    }

    /// The weight.
    pub fn weight(&self) -> Param {
        self.weight
    }

    /// The bias.
    pub fn bias(&self) -> Option<Param> {
        self.bias
    }

    /// The geometry, for kernels that share the weights.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The size of the output for a map of this size; an error unless there is one.
    pub fn output_size(&self, map: [usize; 2]) -> Result<[usize; 2]> {
        self.geometry.outputs(map)
    }

    /// Operations and output bytes for `[b, h, w]`.
    pub fn cost(&self, [b, h, w]: [usize; 3]) -> Result<Cost> {
        let [oh, ow] = self.output_size([h, w])?;
        let outputs = b * oh * ow * self.settings.outputs;
        Ok(Cost { flops: 2 * outputs * self.settings.fan_in(), activation_bytes: 4 * outputs })
    }

    pub(super) fn is_depthwise(&self) -> bool {
        let ConvSettings { inputs, outputs, groups, .. } = self.settings;
        groups > 1 && groups == inputs && outputs == inputs
    }

    fn sizes<T: Float>(&self, x: &Tensor<T>) -> Result<([usize; 4], [usize; 4])> {
        let size @ [b, h, w, c] = x.dims("input of a convolution [B, H, W, C]")?;
        if c != self.settings.inputs {
            return Err(Error::shape("input of a convolution", format!("[…, {}] (channels last)", self.settings.inputs), x.shape()));
        }
        let [oh, ow] = self.output_size([h, w])?;
        let out = [b, oh, ow, self.settings.outputs];
        crate::tensor::Shape::try_new(&[b, oh, ow, self.settings.outputs.max(self.settings.fan_in())])?;
        Ok((size, out))
    }

    /// The stretches of output rows whose windows exist together.
    fn blocks(&self, [b, oh, ow, _]: [usize; 4]) -> impl Iterator<Item = Lines> {
        let lines = b * oh;
        let each = (BLOCK / (ow * self.settings.fan_in()).max(1)).max(1);
        (0..lines).step_by(each).map(move |first| Lines { first, count: each.min(lines - first) })
    }

    /// Channels of a group, in and out.
    fn per_group(&self) -> [usize; 2] {
        [self.settings.inputs / self.settings.groups, self.settings.outputs / self.settings.groups]
    }

    /// For each group: its number, the rows of its weight, its first input channel.
    fn groups(&self) -> impl Iterator<Item = (usize, Range<usize>, usize)> {
        let [inputs, outputs] = self.per_group();
        let len = outputs * self.settings.fan_in();
        (0..self.settings.groups).map(move |g| (g, g * len..(g + 1) * len, g * inputs))
    }

    /// `[B, H, W, in]` → `[B, H', W', out]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<Tensor<T>> {
        let bias = self.bias.map(|b| p.get(b));
        if self.is_depthwise() {
            return self.forward_depthwise(p.get(self.weight), bias, x);
        }
        self.forward_dense(&self.operands(p.get(self.weight)), Tail { bias, ..Tail::default() }, x)
    }

    /// [`forward`](Self::forward) of one channel per group, with another weight and bias.
    pub(super) fn forward_depthwise<T: Float>(&self, weight: &[T], bias: Option<&[T]>, x: &Tensor<T>) -> Result<Tensor<T>> {
        let (size, out) = self.sizes(x)?;
        let mut y = Tensor::scratch(out);
        depthwise::forward(MapMut::new(y.data_mut(), out), Map::new(x.data(), size), weight, bias, self.geometry);
        Ok(y)
    }

    /// Whole groups of the weight, as `[out, (u, v, c)]`.
    fn by_window<T: Float>(&self, weight: &[T]) -> Buffer<T> {
        let mut out = Buffer::scratch(weight.len());
        transpose(&mut out, weight, weight.len() / self.settings.fan_in(), self.per_group()[0], self.geometry.taps());
        out
    }

    /// What the windows of one group are multiplied by: its weight as `[(u, v, c), out]`.
    pub(super) fn operand<T: Float>(&self, weight: &[T]) -> Packed<T> {
        let ([_, outputs], len) = (self.per_group(), self.settings.fan_in());
        if self.geometry.taps() == 1 {
            return Packed::new(Mat::new(weight, outputs, len).t());
        }
        Packed::new(Mat::new(&self.by_window(weight), outputs, len).t())
    }

    /// The [`operand`](Self::operand) of each group.
    pub(super) fn operands<T: Float>(&self, weight: &[T]) -> Vec<Arc<Packed<T>>> {
        self.groups().map(|(_, w, _)| Arc::new(self.operand(&weight[w]))).collect()
    }

    /// [`forward`](Self::forward) with other [`operands`](Self::operands), and what comes after.
    pub(super) fn forward_dense<T: Float>(&self, operands: &[Arc<Packed<T>>], tail: Tail<T>, x: &Tensor<T>) -> Result<Tensor<T>> {
        let (size, out @ [b, oh, ow, all]) = self.sizes(x)?;
        if let Some(residual) = tail.residual {
            residual.expect_shape("what is added to a convolution", out)?;
        }
        let mut y = Tensor::scratch(out);
        let [inputs, outputs] = self.per_group();
        let pixels = b * oh * ow;
        for (g, _, from) in self.groups() {
            let columns = (g * outputs).min(y.data().len());
            let c = MatMut::strided(&mut y.data_mut()[columns..], pixels, outputs, all);
            let epilogue = Epilogue {
                bias: tail.bias.map(|b| &b[g * outputs..(g + 1) * outputs]),
                residual: tail.residual.map(|r| Mat::strided(&r.data()[columns..], pixels, outputs, all, 1)),
                activation: match tail.then {
                    Then::Identity => Activation::None,
                    Then::Relu => Activation::Relu,
                    Then::Gelu => Activation::GeluOnly,
                },
                ..Epilogue::default()
            };
            if self.geometry.is_pointwise() {
                gemm_packed(Mat::new(x.data(), pixels, self.settings.inputs).cols_from(from, inputs), &operands[g], c, epilogue);
            } else {
                let windows = Windows::new(Map::new(x.data(), size), [from, inputs], self.geometry, [oh, ow]);
                gemm_rows(&windows, &operands[g], c, epilogue);
            }
        }
        Ok(y)
    }

    /// `dx` for the input size `size` `[B, H, W, in]`.
    pub fn backward_input<T: Float>(&self, p: &Params<T>, size: [usize; 4], dy: &Tensor<T>) -> Result<Tensor<T>> {
        let [oh, ow] = self.output_size([size[1], size[2]])?;
        let out @ [b, .., all] = [size[0], oh, ow, self.settings.outputs];
        dy.expect_shape("gradient of a convolution", out)?;
        if self.is_depthwise() {
            let mut dx = Tensor::scratch(size);
            depthwise::backward_input(MapMut::new(dx.data_mut(), size), Map::new(dy.data(), out), p.get(self.weight), self.geometry);
            return Ok(dx);
        }
        if let Some((adjoint, operands)) = self.adjoint(p, [oh, ow], [size[1], size[2]]) {
            return adjoint.forward_dense(&operands, Tail::default(), dy);
        }
        let ([inputs, outputs], len) = (self.per_group(), self.settings.fan_in());
        let weight = self.by_window(p.get(self.weight));
        let mut dx = Tensor::zeros(size);
        for lines in self.blocks(out) {
            let rows = lines.count * ow;
            let mut windows = Buffer::scratch(rows * len);
            for (g, w, from) in self.groups() {
                let a = Mat::new(dy.data(), b * oh * ow, all).rows_from(lines.first * ow, rows).cols_from(g * outputs, outputs);
                gemm(a, Mat::new(&weight[w], outputs, len), MatMut::new(&mut windows, rows, len), Epilogue::default());
                col2im(dx.data_mut(), size, &windows, [from, inputs], self.geometry, lines, [oh, ow]);
            }
        }
        Ok(dx)
    }

    /// With stride 1, `dx` is a convolution of `dy` by the kernel turned around: that convolution and its operands.
    fn adjoint<T: Float>(&self, p: &Params<T>, from: [usize; 2], to: [usize; 2]) -> Option<(Conv2d, Vec<Arc<Packed<T>>>)> {
        let ConvSettings { kernel, stride, padding, dilation, .. } = self.settings;
        let pad = |axis: usize| (dilation[axis] * (kernel[axis] - 1)).checked_sub(padding[axis]);
        let settings =
            ConvSettings { inputs: self.settings.outputs, outputs: self.settings.inputs, padding: [pad(0)?, pad(1)?], ..self.settings };
        let adjoint = Conv2d { settings, geometry: settings.geometry(), bias: None, weight: self.weight };
        if stride != [1, 1] || adjoint.output_size(from).ok()? != to {
            return None;
        }
        let ([inputs, outputs], taps) = (self.per_group(), self.geometry.taps());
        let operand = |w: Range<usize>| {
            let weight = &p.get(self.weight)[w];
            if taps == 1 {
                return Arc::new(Packed::new(Mat::new(weight, outputs, inputs)));
            }
            let by_window = self.by_window(weight);
            let mut turned = Buffer::scratch(by_window.len());
            turned.par_chunks_exact_mut(inputs).enumerate().for_each(|(i, row)| {
                let (tap, o) = (i / outputs, i % outputs);
                row.copy_from_slice(&by_window[(o * taps + taps - 1 - tap) * inputs..][..inputs]);
            });
            Arc::new(Packed::new(Mat::new(&turned, taps * outputs, inputs)))
        };
        Some((adjoint, self.groups().map(|(_, w, _)| operand(w)).collect()))
    }

    /// `dW` and `db`, added to.
    pub fn backward_params<T: Float>(&self, g: &mut Params<T>, x: &Tensor<T>, dy: &Tensor<T>) -> Result<()> {
        let (size, out @ [b, oh, ow, all]) = self.sizes(x)?;
        dy.expect_shape("gradient of a convolution", out)?;
        if self.is_depthwise() {
            let mut db = Buffer::zeros(all);
            let (x, dy) = (Map::new(x.data(), size), Map::new(dy.data(), out));
            depthwise::backward_params(g.get_mut(self.weight), Some(&mut db), x, dy, self.geometry);
            if let Some(bias) = self.bias {
                g.get_mut(bias).iter_mut().zip(db.iter()).for_each(|(a, &b)| *a += b);
            }
            return Ok(());
        }
        if let Some(bias) = self.bias {
            add_column_sums(g.get_mut(bias), dy.data());
        }
        let ([inputs, outputs], len, pixels) = (self.per_group(), self.settings.fan_in(), b * oh * ow);
        let accumulate = || Epilogue { accumulate: true, ..Epilogue::default() };
        let dy = Mat::new(dy.data(), pixels, all);
        if self.geometry.is_pointwise() {
            let dw = g.get_mut(self.weight);
            for (group, w, from) in self.groups() {
                let x = Mat::new(x.data(), pixels, self.settings.inputs).cols_from(from, inputs);
                gemm(dy.cols_from(group * outputs, outputs).t(), x, MatMut::new(&mut dw[w], outputs, len), accumulate());
            }
            return Ok(());
        }
        // `windowsᵀ dy`: what the product packs is `dy`, a kernel's size smaller than the windows.
        let mut dw = Buffer::zeros(self.weight.numel());
        for lines in self.blocks(out) {
            let rows = lines.count * ow;
            let mut windows = Buffer::scratch(rows * len);
            for (group, w, from) in self.groups() {
                let x = Windows::new(Map::new(x.data(), size), [from, inputs], self.geometry, [oh, ow]);
                im2col(&mut windows, x, lines);
                let dy = dy.rows_from(lines.first * ow, rows).cols_from(group * outputs, outputs);
                gemm(Mat::new(&windows, rows, len).t(), dy, MatMut::new(&mut dw[w], len, outputs), accumulate());
            }
        }
        let [mut by_window, mut as_published] = [Buffer::scratch(dw.len()), Buffer::scratch(dw.len())];
        transpose(&mut by_window, &dw, self.settings.groups, len, outputs);
        transpose(&mut as_published, &by_window, self.settings.outputs, self.geometry.taps(), inputs);
        elementwise::add(g.get_mut(self.weight), &as_published);
        Ok(())
    }

    /// All gradients; returns `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, x: &Tensor<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        self.backward_params(g, x, dy)?;
        self.backward_input(p, x.dims("input of a convolution")?, dy)
    }
}

/// `nn.conv2d`.
pub struct Conv2dOp;

/// The settings for an input of `inputs` channels: widths are those of the weight; to make a case, of `out_channels` and `kernel_size`.
fn settings(config: &Config, inputs: usize, weight: Option<[usize; 4]>) -> Result<ConvSettings> {
    let pair = |key: &str, default: usize| if config.get(key).is_none() { Ok([default; 2]) } else { config.pair(key) };
    let groups = if config.get("groups").is_none() { 1 } else { config.positive("groups")? };
    let [outputs, per_group, kh, kw] = match weight {
        Some(shape) => shape,
        None => {
            let [kh, kw] = config.pair("kernel_size")?;
            [config.positive("out_channels")?, inputs / groups, kh, kw]
        }
    };
    if per_group * groups != inputs {
        return Err(Error::shape("param.weight", format!("[…, {inputs} / {groups}, …]"), [outputs, per_group, kh, kw]));
    }
    Ok(ConvSettings {
        inputs,
        outputs,
        kernel: [kh, kw],
        stride: pair("stride", 1)?,
        padding: pair("padding", 0)?,
        dilation: pair("dilation", 1)?,
        groups,
        bias: config.bool_or("bias", true)?,
    })
}

impl Operation for Conv2dOp {
    const NAME: &'static str = "nn.conv2d";
    const PAPER: &'static str = "1512.03385 ResNet";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let groups = if rng.chance(0.5) { 1 } else { rng.between(1, 4) };
        let multiplier = rng.between(1, 3);
        let kernel = [rng.between(1, 4), rng.between(1, 4)];
        let kernel = if rng.chance(0.3) { [1, 1] } else { kernel };
        let mut two = |low: usize, high: usize| vec![rng.between(low, high), rng.between(low, high)];
        config.set("kernel_size", kernel.to_vec()).set("stride", two(1, 3)).set("padding", two(0, 2)).set("dilation", two(1, 2));
        if rng.chance(0.3) {
            config.set("stride", 1).set("padding", 0);
        }
        config.set("groups", groups).set("out_channels", groups * multiplier).set("bias", rng.chance(0.7));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let groups = config.positive("groups")?;
        let per_group = if draw.rng.chance(0.4) { 1 } else { draw.rng.between(1, 3) };
        let batch = draw.size("batch", 1, 3);
        let shape = [batch, groups * per_group, draw.rng.between(7, 11), draw.rng.between(7, 11)];
        draw.normal("x", shape);
        Ok(())
    }

    fn cost(config: &Config, shapes: &Shapes) -> Result<Option<Cost>> {
        let [b, c, h, w] = shapes.dims("x")?;
        let (conv, _) = Layout::build(|names| {
            let settings = settings(config, c, shapes.param_dims("weight")?)?;
            Conv2d::new(names.here(), settings, settings.default_init())
        })?;
        Ok(Some(conv.cost([b, h, w])? + Cost { flops: 0, activation_bytes: 4 * b * c * h * w }))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let [_, inputs, _, _] = run.input("x")?.dims("input `x`")?;
        let settings = settings(run.config(), inputs, run.param_dims("weight")?)?;
        let (conv, layout) = Layout::build(|names| Conv2d::new(names.here(), settings, settings.default_init()))?;
        run.unary(
            &layout,
            |p, x| {
                let x = channels_last(x)?;
                Ok((channels_first(&conv.forward(p, &x)?)?, x))
            },
            |p, g, x, dy| channels_first(&conv.backward(p, g, &x, &channels_last(dy)?)?),
        )
    }
}
