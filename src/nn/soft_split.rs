//! `nn.soft_split`: overlapping windows of a map as tokens (T2T-ViT, arXiv 2101.11986).
//!
//! `y[b, oy·W′ + ox, c·k² + i·k + j] = x[b, c, oy·s + i − p, ox·s + j − p]`, 0 outside the map, with
//! `H′ = ⌊(H + 2p − k)/s⌋ + 1`. Backward: every window adds its gradient to the pixels it was read from.
//!
//! [`SplitLinear`] is what T2T does with the tokens: `LN(split(x)) Wᵀ + b`, or without the norm. The tokens, which hold every pixel
//! `(k/s)²` times, exist for a band of windows at a time: each band is gathered, normalised and multiplied while it is in cache, and
//! is gathered again in the backward pass.

use rayon::prelude::*;

use super::Layout;
use super::linear::Linear;
use super::norm::{LayerNorm, Stats};
use super::param::{Param, Params};
use crate::case::{Config, Cost, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::maps::transpose;
use crate::kernel::unfold::{Order, Unfold};
use crate::kernel::{norm, reduce};
use crate::linalg::{Mat, MatMut};
use crate::tensor::random::Rng;
use crate::tensor::{Buffer, Float, Tensor};

/// Square windows: side, distance, zero padding.
#[derive(Clone, Copy, Debug)]
pub struct SoftSplit {
    /// Side k.
    pub kernel: usize,
    /// Distance s (the paper writes k minus the overlap).
    pub stride: usize,
    /// Zeros p on all four sides.
    pub padding: usize,
}

impl SoftSplit {
    /// Windows of side `kernel`, `stride` apart.
    pub fn new(kernel: usize, stride: usize, padding: usize) -> Result<Self> {
        for (key, value, least) in [("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0)] {
            if !(least..1 << 16).contains(&value) {
                return Err(Error::config(key, format!("expected {least} to 65535, found {value}")));
            }
        }
        Ok(SoftSplit { kernel, stride, padding })
    }

    /// Rows and columns of windows over a map.
    pub fn grid(&self, map: [usize; 2]) -> Result<[usize; 2]> {
        if map.iter().any(|&side| side == 0 || side + 2 * self.padding < self.kernel) {
            let SoftSplit { kernel, padding, .. } = self;
            return Err(Error::config(
                "kernel",
                format!("expected at most the map {map:?} with padding {padding} on each side, found {kernel}"),
            ));
        }
        Ok(map.map(|side| (side + 2 * self.padding - self.kernel) / self.stride + 1))
    }

    fn unfold(&self, map: [usize; 2], chans: usize, order: Order) -> Result<Unfold> {
        let SoftSplit { kernel, stride, padding } = *self;
        let [rows, cols] = self.grid(map)?;
        // Far more padding than map would make any number of windows of nothing.
        if rows.saturating_mul(cols).saturating_mul(kernel * kernel).saturating_mul(chans) > 1 << 30 {
            return Err(Error::config(
                "padding",
                format!("expected windows of at most 2³⁰ values, found {rows}×{cols} of {kernel}×{kernel}"),
            ));
        }
        Ok(Unfold { kernel, stride, padding, chans, map, grid: self.grid(map)?, order })
    }

    /// `[B, C, H, W]` → `[B, H′W′, C k²]`.
    pub fn forward<T: Float>(&self, x: &Tensor<T>) -> Result<Tensor<T>> {
        let [b, c, h, w] = x.dims("map of a soft split")?;
        let unfold = self.unfold([h, w], c, Order::Planes)?;
        let mut y = Tensor::scratch([b, unfold.windows(), unfold.width()]);
        unfold.unfold(y.data_mut(), x.data(), b);
        Ok(y)
    }

    /// The gradient of the map `[B, C, H, W]`.
    pub fn backward<T: Float>(&self, [b, c, h, w]: [usize; 4], dy: &Tensor<T>) -> Result<Tensor<T>> {
        let unfold = self.unfold([h, w], c, Order::Planes)?;
        dy.expect_shape("gradient of a soft split", [b, unfold.windows(), unfold.width()])?;
        let mut dx = Tensor::scratch([b, c, h, w]);
        unfold.fold(dx.data_mut(), dy.data(), b);
        Ok(dx)
    }
}

/// Parts that the bands of a batch are dealt to, each with its own sum of parameter gradients.
const PARTS: usize = 16;

/// A map whose windows are the input of a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct SplitLinear<'a> {
    /// The windows.
    pub split: SoftSplit,
    /// The norm over the values of a window, if there is one.
    pub norm: Option<&'a LayerNorm>,
    /// The layer, over (channel, row, column).
    pub linear: &'a Linear,
    /// How the maps lie: `[B, C, H, W]`, or `[B, H, W, C]` (tokens).
    pub order: Order,
}

/// Weight, bias and norm in the order of the windows.
struct Operands<T: Float> {
    weight: Buffer<T>,
    norm: Option<[Buffer<T>; 2]>,
}

impl SplitLinear<'_> {
    /// Batch and windows of maps `[B, C, H, W]` or `[B, H, W, C]`.
    pub fn unfold<T: Float>(&self, x: &Tensor<T>) -> Result<(usize, Unfold)> {
        let dims: [usize; 4] = x.dims("map of a soft split")?;
        let (map, chans) = match self.order {
            Order::Planes => ([dims[2], dims[3]], dims[1]),
            Order::Pixels => ([dims[1], dims[2]], dims[3]),
        };
        let unfold = self.split.unfold(map, chans, self.order)?;
        if unfold.width() != self.linear.inputs() {
            return Err(Error::shape("map of a soft split", format!("windows of {} values", self.linear.inputs()), x.shape()));
        }
        Ok((dims[0], unfold))
    }

    /// A parameter over windows, in the order in which they are gathered.
    fn ordered<T: Float>(unfold: &Unfold, values: &[T]) -> Buffer<T> {
        let mut out = Buffer::scratch(values.len());
        match unfold.order {
            Order::Planes => out.copy_from_slice(values),
            Order::Pixels => transpose(&mut out, values, values.len() / unfold.width(), unfold.chans, unfold.kernel * unfold.kernel),
        }
        out
    }

    /// Adds a gradient in the order of the windows to that of the parameter.
    fn add_ordered<T: Float>(unfold: &Unfold, total: &mut [T], d: &[T]) {
        let mut back = Buffer::scratch(d.len());
        match unfold.order {
            Order::Planes => back.copy_from_slice(d),
            Order::Pixels => transpose(&mut back, d, d.len() / unfold.width(), unfold.kernel * unfold.kernel, unfold.chans),
        }
        crate::kernel::elementwise::add(total, &back);
    }

    fn operands<T: Float>(&self, p: &Params<T>, unfold: &Unfold) -> Operands<T> {
        let of = |param: Param| Self::ordered(unfold, p.get(param));
        Operands { weight: of(self.linear.weight()), norm: self.norm.map(|norm| norm.params().map(of)) }
    }

    /// `LN(split(x)) Wᵀ + b`, `[B, L, outputs]`, and the statistics of the norm.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, Option<Stats<T>>)> {
        let (b, unfold) = self.unfold(x)?;
        let (n, width, outputs) = (unfold.windows(), unfold.width(), self.linear.outputs());
        let mut y = Tensor::scratch([b, n, outputs]);
        let mut stats = self.norm.map(|_| Tensor::scratch([b * n, 2]));
        if b == 0 {
            return Ok((y, stats));
        }
        let Operands { weight, norm: affine } = self.operands(p, &unfold);
        let mut packed = Buffer::<T>::scratch(T::packed_len(width, outputs));
        T::pack(Mat::new(&weight, outputs, width).t(), &mut packed);
        let bias = self.linear.bias().map(|bias| p.get(bias));
        let per = unfold.band_windows(0).len();
        // A tensor without a norm has no statistics; rows of none then.
        let mut nothing = Buffer::<T>::scratch(if stats.is_some() { 0 } else { 2 * b * n });
        let stats_rows: &mut [T] = stats.as_mut().map_or(&mut nothing, Tensor::data_mut);
        y.data_mut().par_chunks_mut(n * outputs).zip(stats_rows.par_chunks_mut(2 * n)).zip(x.data().par_chunks(unfold.image())).for_each(
            |((y, stats), image)| {
                y.par_chunks_mut(per * outputs).zip(stats.par_chunks_mut(2 * per)).enumerate().for_each(|(band, (y, stats))| {
                    let count = y.len() / outputs;
                    let mut tokens = Buffer::<T>::scratch(count * width);
                    unfold.gather(&mut tokens, image, band);
                    if let (Some([gamma, beta]), Some(norm)) = (&affine, self.norm) {
                        let mut normed = Buffer::<T>::scratch(count * width);
                        norm::layer_norm(&mut normed, stats, &tokens, Some((gamma, beta)), width, norm.eps());
                        tokens = normed;
                    }
                    if let Some(bias) = bias {
                        y.chunks_exact_mut(outputs).for_each(|row| row.copy_from_slice(bias));
                    }
                    T::multiply_packed(Mat::new(&tokens, count, width), &packed, MatMut::new(y, count, outputs), bias.is_some());
                });
            },
        );
        Ok((y, stats))
    }

    /// The gradient of the map; adds those of the parameters.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        stats: Option<&Stats<T>>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let (b, unfold) = self.unfold(x)?;
        let (n, width, outputs) = (unfold.windows(), unfold.width(), self.linear.outputs());
        dy.expect_shape("gradient of a soft split", [b, n, outputs])?;
        let mut dx = Tensor::scratch(x.shape());
        if b == 0 {
            return Ok(dx);
        }
        let Operands { weight, norm: affine } = self.operands(p, &unfold);
        let mut packed = Buffer::<T>::scratch(T::packed_len(outputs, width));
        T::pack(Mat::new(&weight, outputs, width), &mut packed);
        let (bands, len) = (unfold.bands(), unfold.band_len());
        let per_part = (b * bands).div_ceil(PARTS);
        let parts = (b * bands).div_ceil(per_part);
        let mut maps = Buffer::<T>::scratch(b * bands * len);
        // Weight, γ and β of each part.
        let grads_len = outputs * width + 2 * width;
        let mut grads = Buffer::<T>::zeros(parts * grads_len);
        maps.par_chunks_mut(per_part * len).zip(grads.par_chunks_mut(grads_len)).enumerate().for_each(|(part, (maps, grads))| {
            let (d_weight, d_norm) = grads.split_at_mut(outputs * width);
            let (d_gamma, d_beta) = d_norm.split_at_mut(width);
            for (index, map) in maps.chunks_exact_mut(len).enumerate() {
                let (b, band) = ((part * per_part + index) / bands, (part * per_part + index) % bands);
                let windows = unfold.band_windows(band);
                let (first, count) = (b * n + windows.start, windows.len());
                let scratch = || Buffer::<T>::scratch(count * width);
                let dy = Mat::new(&dy.data()[first * outputs..(first + count) * outputs], count, outputs);
                let (mut tokens, mut d_tokens) = (scratch(), scratch());
                unfold.gather(&mut tokens, &x.data()[b * unfold.image()..(b + 1) * unfold.image()], band);
                let mut operand = Buffer::<T>::scratch(T::packed_len(count, width));
                let stats = stats.map(|stats| &stats.data()[2 * first..2 * (first + count)]);
                match (&affine, stats) {
                    (Some([gamma, beta]), Some(stats)) => {
                        let mut normed = scratch();
                        let mut again = Buffer::<T>::scratch(stats.len());
                        again.copy_from_slice(stats);
                        norm::layer_norm_again(&mut normed, &mut again, &tokens, Some((gamma, beta)), width);
                        T::pack(Mat::new(&normed, count, width), &mut operand);
                        T::multiply_packed(dy, &packed, MatMut::new(&mut normed, count, width), false);
                        let d_affine = Some((&mut *d_gamma, &mut *d_beta));
                        norm::layer_norm_backward(&mut d_tokens, d_affine, &tokens, &normed, stats, Some(gamma), None, width);
                    }
                    _ => {
                        T::pack(Mat::new(&tokens, count, width), &mut operand);
                        T::multiply_packed(dy, &packed, MatMut::new(&mut d_tokens, count, width), false);
                    }
                }
                T::multiply_packed(dy.t(), &operand, MatMut::new(d_weight, outputs, width), true);
                unfold.scatter(map, &d_tokens, band);
            }
        });
        unfold.join(dx.data_mut(), &maps, b);
        let mut total = Buffer::<T>::zeros(grads_len);
        for part in grads.chunks_exact(grads_len) {
            crate::kernel::elementwise::add(&mut total, part);
        }
        let (d_weight, d_norm) = total.split_at(outputs * width);
        Self::add_ordered(&unfold, g.get_mut(self.linear.weight()), d_weight);
        if let Some(norm) = self.norm {
            for (param, d) in norm.params().into_iter().zip(d_norm.chunks_exact(width)) {
                Self::add_ordered(&unfold, g.get_mut(param), d);
            }
        }
        if let Some(bias) = self.linear.bias() {
            reduce::add_column_sums(g.get_mut(bias), dy.data());
        }
        Ok(dx)
    }

    /// What [`forward`](Self::forward) costs for `b` maps: the product, its output and the statistics.
    pub fn cost(&self, b: usize, map: [usize; 2]) -> Result<Cost> {
        let [rows, cols] = self.split.grid(map)?;
        let (n, outputs) = (b * rows * cols, self.linear.outputs());
        let stats = if self.norm.is_some() { 2 } else { 0 };
        Ok(Cost { flops: 2 * n * self.linear.inputs() * outputs, activation_bytes: 4 * n * (outputs + stats) })
    }
}

/// `nn.soft_split`.
pub struct SoftSplitOp;

impl Operation for SoftSplitOp {
    const NAME: &'static str = "nn.soft_split";
    const PAPER: &'static str = "2101.11986 T2T-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("kernel", rng.between(1, 7)).set("stride", rng.between(1, 5)).set("padding", rng.between(0, 4));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let least = config.positive("kernel")?.saturating_sub(2 * config.usize("padding")?).max(1);
        let (batch, chans) = (draw.size("batch", 1, 3), draw.size("channels", 1, 5));
        let (height, width) = (draw.size("height", least, least + 20), draw.size("width", least, least + 20));
        draw.normal("x", [batch, chans, height, width]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let split = SoftSplit::new(config.positive("kernel")?, config.positive("stride")?, config.usize("padding")?)?;
        let ((), layout) = Layout::build(|_| Ok(()))?;
        run.unary(&layout, |_, x| Ok((split.forward(x)?, x.dims("x")?)), |_, _, dims, dy| split.backward(dims, dy))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::maps::{channels_first, channels_last};
    use crate::nn::normal_02;
    use crate::tensor::random::Purpose;

    /// In bands and from either layout, what the soft split, the norm and the layer give one after the other.
    #[test]
    fn bands_agree_with_whole_tokens() {
        let split = SoftSplit::new(3, 2, 1).expect("a legal split");
        let (chans, outputs) = (3, 5);
        let width = chans * 9;
        let ((norm, linear), layout) = Layout::build(|names| {
            Ok((LayerNorm::new(names.at("norm"), width, 1e-5), Linear::new(names.at("fc"), width, outputs, true, normal_02(0, 0))))
        })
        .expect("a layout");
        let mut p = Params::<f64>::init(&layout, 1);
        let mut rng = Rng::new(2, Purpose::Case, 0, 0);
        p.flat_mut().iter_mut().for_each(|x| *x += 0.3 * rng.normal());
        let x = Tensor::from_fn([3, chans, 43, 61], |_| rng.normal());
        let tokens = split.forward(&x).expect("tokens");
        let dy = Tensor::from_fn(tokens.shape().with_last(outputs), |_| rng.normal());
        let close = |what: &str, a: &[f64], b: &[f64]| {
            assert!(a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-11 * (1.0 + b.abs())), "{what}");
        };
        for normed in [true, false] {
            let mut g = Params::zeros(&layout);
            let (middle, stats) = if normed { norm.forward(&p, &tokens).expect("a norm") } else { (tokens.clone(), Tensor::zeros([0, 2])) };
            let y = linear.forward(&p, &middle).expect("a layer");
            let mut d = linear.backward(&p, &mut g, &middle, &dy).expect("a gradient");
            if normed {
                d = norm.backward(&p, &mut g, &tokens, &stats, &d, None).expect("a gradient");
            }
            let dx = split.backward([3, chans, 43, 61], &d).expect("a gradient");
            for order in [Order::Planes, Order::Pixels] {
                let layer = SplitLinear { split, norm: normed.then_some(&norm), linear: &linear, order };
                let x = if order == Order::Planes { x.clone() } else { channels_last(&x).expect("a map") };
                let (unfold, mut found) = (layer.unfold(&x).expect("windows").1, Params::zeros(&layout));
                assert!(3 * unfold.bands() > PARTS, "several bands per part");
                let (found_y, stats) = layer.forward(&p, &x).expect("tokens");
                let found_dx = layer.backward(&p, &mut found, &x, stats.as_ref(), &dy).expect("a gradient");
                let found_dx = if order == Order::Planes { found_dx } else { channels_first(&found_dx).expect("a map") };
                close("y", found_y.data(), y.data());
                close("dx", found_dx.data(), dx.data());
                close("parameters", found.flat(), g.flat());
            }
        }
    }
}
