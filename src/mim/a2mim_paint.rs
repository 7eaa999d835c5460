//! What A²MIM does to images and feature maps (arXiv 2205.13943): `nn.mean_fill`, `nn.a2mim_mask_token`, and its mask `mask.a2mim`.
//!
//! Mean fill: `y = image(1 − M) + μM`, μ the mean of each image and channel over all pixels, masked ones included.
//! Backward: `dimage = g(1 − M) + (1/HW) Σ g M`.
//!
//! Mask token t, at the positions of a feature map whose mask m is 1: `y = x(1 − m) + t m` if it replaces, else
//! `y = x(1 − m) + γ x m + t m` (γ = 1 if there is none). Backward: `dt = Σ g m`, `dγ = Σ g m x`, `dx = g(1 − m) + g m γ`, of which
//! the second part is dropped where the token replaces, or where masked features are detached. t is learned; or a constant (random,
//! zero, or the mean of x in this very call); or the mean of each image and channel, through which `(1/HW) Σ g m` flows to all positions.

use rayon::prelude::*;

use super::mask::{CoarseMask, mask_tensor, read_mask};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::reduce;
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::{Init, Layout, Names, Param, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The pixels of a mask `[B, h, w]` on images of `height × width`: an error unless the image is a whole number of cells.
pub struct PixelMask<'a> {
    hidden: &'a [bool],
    cells: [usize; 2],
    size: [usize; 2],
}

impl<'a> PixelMask<'a> {
    /// A mask `hidden` of `[batch, h, w]` cells for images `[batch, channels, H, W]`.
    pub fn new(hidden: &'a [bool], [batch, h, w]: [usize; 3], image: [usize; 4]) -> Result<Self> {
        let [images, _, height, width] = image;
        let fits = |pixels: usize, cells: usize| cells > 0 && pixels > 0 && pixels.is_multiple_of(cells);
        if images != batch || !fits(height, h) || !fits(width, w) || hidden.len() != batch * h * w {
            return Err(Error::shape("mask", format!("[{images}, divisor of {height}, divisor of {width}]"), [batch, h, w]));
        }
        Ok(PixelMask { hidden, cells: [h, w], size: [height, width] })
    }

    /// Whether pixel `i` (row-major) of image `b` is masked.
    #[inline]
    pub fn at(&self, b: usize, i: usize) -> bool {
        let ([h, w], [height, width]) = (self.cells, self.size);
        self.hidden[(b * h + i / width / (height / h)) * w + i % width / (width / w)]
    }

    /// Zeros and ones for image `b`, `[H, W]`.
    pub fn plane<T: Float>(&self, b: usize) -> Tensor<T> {
        Tensor::from_fn(self.size, |i| if self.at(b, i) { T::ONE } else { T::ZERO })
    }
}

/// `y = image(1 − M) + μM`.
pub fn mean_fill<T: Float>(image: &Tensor<T>, mask: &PixelMask) -> Result<Tensor<T>> {
    let [_, chans, h, w] = image.dims("image")?;
    let mut y = Tensor::scratch(image.shape());
    y.data_mut().par_chunks_mut(h * w).zip(image.data().par_chunks(h * w)).enumerate().for_each(|(plane, (y, image))| {
        let mean = T::from_f64(image.iter().fold(0.0, |sum, x| sum + x.to_f64()) / (h * w) as f64);
        for (i, (y, &x)) in y.iter_mut().zip(image).enumerate() {
            *y = if mask.at(plane / chans, i) { mean } else { x };
        }
    });
    Ok(y)
}

/// The gradient of [`mean_fill`].
pub fn mean_fill_backward<T: Float>(g: &Tensor<T>, mask: &PixelMask) -> Result<Tensor<T>> {
    let [_, chans, h, w] = g.dims("gradient of the filled image")?;
    let mut d = Tensor::scratch(g.shape());
    d.data_mut().par_chunks_mut(h * w).zip(g.data().par_chunks(h * w)).enumerate().for_each(|(plane, (d, g))| {
        let hidden = g.iter().enumerate().filter(|(i, _)| mask.at(plane / chans, *i));
        let share = T::from_f64(hidden.fold(0.0, |sum, (_, x)| sum + x.to_f64()) / (h * w) as f64);
        for (i, (d, &x)) in d.iter_mut().zip(g).enumerate() {
            *d = if mask.at(plane / chans, i) { share } else { x + share };
        }
    });
    Ok(d)
}

/// Where the mask token comes from.
#[derive(Clone, Copy, Debug)]
enum Token {
    /// A parameter.
    Learned(Param),
    /// A buffer: random or zero.
    Frozen(Param),
    /// The mean of x over batch and positions, constant for the gradient.
    Mean,
    /// The mean of each image and channel.
    InstanceMean,
    /// There is none, and nothing happens.
    None,
}

/// A²MIM's mask token.
#[derive(Clone, Debug)]
pub struct MaskToken {
    token: Token,
    gamma: Option<Param>,
    replace: bool,
    detach: bool,
    width: usize,
}

const MODES: [&str; 5] = ["learnable", "randn", "zero", "mean", "instance_mean"];

impl MaskToken {
    /// Registers `mask_token` and `mask_gamma` for features of `width` channels from the keys of `nn.a2mim_mask_token`; the parameters of
    /// a `map` have shape `[1, C, 1, 1]`, those of tokens `[1, 1, C]` and `[C]`.
    pub fn new(names: &mut Names, config: &Config, width: usize, map: bool) -> Result<Self> {
        if width == 0 {
            return Err(Error::value("features", "expected at least one channel, found none"));
        }
        let mode = match config.get("mask_mode") {
            Some(_) => Some(config.choice("mask_mode", &MODES)?),
            // Here `null` is a value of its own.
            None => config.keys().all(|key| key != "mask_mode").then_some("learnable"),
        };
        let (replace, gamma) = (config.bool_or("replace", true)?, config.bool_or("mask_gamma", false)?);
        let shape: crate::tensor::Shape = if map { [1, width, 1, 1].into() } else { [1, 1, width].into() };
        let token = match mode {
            None => Token::None,
            Some("learnable") => Token::Learned(names.param("mask_token", shape, Init::NORMAL_02)),
            Some("randn") => Token::Frozen(names.buffer("mask_token", shape, Init::Normal(1.0))),
            Some("zero") => Token::Frozen(names.buffer("mask_token", shape, Init::ZEROS)),
            Some("mean") => Token::Mean,
            Some(_) if map => Token::InstanceMean,
            Some(_) => return Err(Error::config("mask_mode", "expected a map for \"instance_mean\", found tokens")),
        };
        let gamma = (gamma && !replace && mode.is_some())
            .then(|| names.param("mask_gamma", if map { shape } else { [width].into() }, Init::Constant(1e-6)));
        Ok(MaskToken { token, gamma, replace, detach: config.bool_or("detach", false)? && !replace, width })
    }

    /// Rows and the first masked row of an image; an error unless there are as many positions in `hidden`, with or without a class token.
    fn positions<T: Float>(&self, x: &Tensor<T>, hidden: &[bool]) -> Result<[usize; 3]> {
        let [b, n, c] = x.dims("features")?;
        let prefix = match hidden.len() {
            len if len == b * n => 0,
            len if n > 0 && len == b * (n - 1) => 1,
            _ => return Err(Error::shape("mask", format!("{n} positions (or one fewer) for each of {b} images"), hidden.len())),
        };
        if c != self.width || c == 0 {
            return Err(Error::shape("features", format!("[batch, positions, {}], at least one channel", self.width), x.shape()));
        }
        Ok([b, n, prefix])
    }

    /// The token of every image, `[B, C]`.
    fn tokens<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<Tensor<T>> {
        let [b, n, c] = x.dims("features")?;
        let row = |data: &[T]| Tensor::from_fn([b, c], |i| data[i % c]);
        let mean = |x: &[T], rows: usize| -> Tensor<T> {
            let mut mean = Tensor::zeros([c]);
            reduce::add_column_sums(mean.data_mut(), x);
            mean.data_mut().iter_mut().for_each(|x| *x = *x / T::of(rows.max(1)));
            mean
        };
        Ok(match self.token {
            Token::Learned(token) => row(p.get(token)),
            Token::Frozen(token) => row(p.buffer(token)),
            Token::Mean => row(mean(x.data(), b * n).data()),
            Token::InstanceMean => {
                let mut all = Tensor::zeros([b, c]);
                for (out, x) in all.data_mut().chunks_exact_mut(c).zip(x.data().chunks_exact((n * c).max(1))) {
                    out.copy_from_slice(mean(x, n).data());
                }
                all
            }
            Token::None => Tensor::zeros([b, c]),
        })
    }

    /// `y` of features `x` `[B, N, C]` with `hidden` `[B, N]`, or `[B, N − 1]` if the first is a class token, which passes.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, hidden: &[bool]) -> Result<Tensor<T>> {
        let ([b, n, prefix], c) = (self.positions(x, hidden)?, self.width);
        if matches!(self.token, Token::None) || b * n == 0 {
            return Ok(x.clone());
        }
        let (tokens, gamma, m) = (self.tokens(p, x)?, self.gamma.map(|gamma| p.get(gamma)), n - prefix);
        let mut y = x.clone();
        y.data_mut().par_chunks_mut(n * c).enumerate().for_each(|(i, y)| {
            let token = &tokens.data()[i * c..(i + 1) * c];
            let rows = y[prefix * c..].chunks_exact_mut(c).zip(&hidden[i * m..(i + 1) * m]);
            for (row, _) in rows.filter(|(_, hidden)| **hidden) {
                if self.replace {
                    row.copy_from_slice(token);
                    continue;
                }
                if let Some(gamma) = gamma {
                    row.iter_mut().zip(gamma).for_each(|(x, &gamma)| *x *= gamma);
                }
                row.iter_mut().zip(token).for_each(|(x, &t)| *x += t);
            }
        });
        Ok(y)
    }

    /// `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        hidden: &[bool],
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let ([b, n, prefix], c) = (self.positions(x, hidden)?, self.width);
        dy.expect_shape("gradient of the features", x.shape())?;
        if matches!(self.token, Token::None) || b * n == 0 {
            return Ok(dy.clone());
        }
        let (mut dx, m, gamma) = (dy.clone(), n - prefix, self.gamma.map(|gamma| p.get(gamma)));
        // Per image: Σ g m and Σ g m x.
        let mut sums = Tensor::<T>::zeros([b, 2, c]);
        let images = dx.data_mut().par_chunks_mut(n * c).zip(sums.data_mut().par_chunks_mut(2 * c)).zip(x.data().par_chunks(n * c));
        images.enumerate().for_each(|(i, ((dx, sums), x))| {
            let (d_token, d_gamma) = sums.split_at_mut(c);
            let rows = dx[prefix * c..].chunks_exact_mut(c).zip(x[prefix * c..].chunks_exact(c)).zip(&hidden[i * m..(i + 1) * m]);
            for ((d, x), _) in rows.filter(|(_, hidden)| **hidden) {
                for j in 0..c {
                    d_token[j] += d[j];
                    d_gamma[j] = d[j].fused(x[j], d_gamma[j]);
                    d[j] = match gamma {
                        _ if self.replace || self.detach => T::ZERO,
                        Some(gamma) => d[j] * gamma[j],
                        None => d[j],
                    };
                }
            }
            if matches!(self.token, Token::InstanceMean) {
                d_token.iter_mut().for_each(|d| *d = *d / T::of(n));
                dx.chunks_exact_mut(c).for_each(|row| row.iter_mut().zip(d_token.iter()).for_each(|(x, &d)| *x += d));
            }
        });
        for sums in sums.data().chunks_exact(2 * c) {
            let mut add = |param: Param, sums: &[T]| g.get_mut(param).iter_mut().zip(sums).for_each(|(total, &x)| *total += x);
            if let Token::Learned(token) = self.token {
                add(token, &sums[..c]);
            }
            if let Some(gamma) = self.gamma {
                add(gamma, &sums[c..]);
            }
        }
        Ok(dx)
    }
}

/// `nn.mean_fill`.
pub struct MeanFill;

impl Operation for MeanFill {
    const NAME: &'static str = "nn.mean_fill";
    const PAPER: &'static str = "2205.13943 A2MIM";

    fn sample(_: &mut Rng) -> Config {
        Config::default()
    }

    fn inputs(_: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, h, w) = (draw.size("batch", 1, 3), draw.rng.between(1, 4), draw.rng.between(1, 4));
        let image = [batch, draw.rng.between(1, 3), h * draw.rng.between(1, 4), w * draw.rng.between(1, 4)];
        draw.normal("image", image);
        let mask = (0..batch * h * w).map(|_| i64::from(draw.rng.chance(0.6))).collect();
        draw.ints("mask", [batch, h, w], mask)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (image, mask) = (run.input("image")?, run.ints("mask")?);
        let cells = mask.shape.dims("mask")?;
        let hidden = read_mask(mask, cells)?;
        let mask = PixelMask::new(&hidden, cells, image.dims("image")?)?;
        let y = mean_fill(&image, &mask)?;
        run.output("y", &y);
        if run.backward() {
            run.grad_input("image", &mean_fill_backward(&run.cotangent("y", y.shape())?, &mask)?);
        }
        Ok(())
    }
}

/// `nn.a2mim_mask_token`.
pub struct MaskTokenOp;

impl Operation for MaskTokenOp {
    const NAME: &'static str = "nn.a2mim_mask_token";
    const PAPER: &'static str = "2205.13943 A2MIM";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let map = rng.chance(0.5);
        let modes = MODES.map(|mode| serde_json::json!(mode));
        let mode = modes.get(rng.below(if map { 6 } else { 4 })).cloned().unwrap_or(serde_json::Value::Null);
        config.set("layout", if map { "nchw" } else { "tokens" }).set("mask_mode", mode);
        config.set("replace", rng.chance(0.4)).set("mask_gamma", rng.chance(0.5)).set("detach", rng.chance(0.3));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, h, w, c) = (draw.size("batch", 1, 3), draw.rng.between(1, 4), draw.rng.between(1, 4), draw.rng.between(1, 5));
        if config.choice("layout", &["nchw", "tokens"])? == "nchw" {
            draw.normal("x", [batch, c, h, w]);
        } else {
            let class = draw.rng.below(2);
            draw.normal("x", [batch, h * w + class, c]);
        }
        let mask = (0..batch * h * w).map(|_| i64::from(draw.rng.chance(0.6))).collect();
        draw.ints("mask", [batch, h, w], mask)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (x, mask) = (run.input("x")?, run.ints("mask")?);
        let map = run.config().choice("layout", &["nchw", "tokens"])? == "nchw";
        let cells @ [b, h, w] = mask.shape.dims("mask")?;
        let hidden = read_mask(mask, cells)?;
        let dims = x.shape();
        let features = if map {
            let [_, c, ..] = x.dims::<4>("input `x`")?;
            x.expect_shape("input `x`", [b, c, h, w])?;
            channels_last(&x)?.reshape([b, h * w, c])?
        } else {
            if x.dims::<3>("input `x`")?[0] != b {
                return Err(Error::shape("mask", format!("[{}, h, w]", dims[0]), mask.shape));
            }
            x
        };
        let width = features.shape()[2];
        let back = |y: &Tensor<T>| if map { channels_first(&y.reshape([b, h, w, width])?) } else { Ok(y.clone()) };
        let (layer, layout) = Layout::build(|names| MaskToken::new(names, run.config(), width, map))?;
        let p = run.params(&layout)?;
        let y = layer.forward(&p, &features, &hidden)?;
        run.output("y", &back(&y)?);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let dy = run.cotangent("y", dims)?;
            let dy = if map { channels_last(&dy)?.reshape(features.shape())? } else { dy };
            let dx = layer.backward(&p, &mut g, &features, &hidden, &dy)?;
            run.grad_input("x", &back(&dx)?);
            run.grad_params(&g);
        }
        Ok(())
    }
}

/// `mask.a2mim`.
pub struct MaskA2mim;

/// The masks `[B, side, side]` of noise `[B, T]`: of equal noise the first cells are hidden.
pub fn noise_mask<T: Float>(generator: &CoarseMask, noise: &Tensor<T>) -> Result<Vec<bool>> {
    let [batch, cells] = noise.dims("noise")?;
    if cells != generator.cells() {
        return Err(Error::shape("noise", [batch, generator.cells()], noise.shape()));
    }
    if noise.data().iter().any(|x| x.to_f64().is_nan()) {
        return Err(Error::value("noise", "expected numbers, found NaN"));
    }
    let mut hidden = Vec::with_capacity(batch * generator.side() * generator.side());
    for noise in noise.data().chunks_exact(cells) {
        let mut order: Vec<usize> = (0..cells).collect();
        order.sort_by(|&i, &j| noise[i].partial_cmp(&noise[j]).unwrap_or(std::cmp::Ordering::Equal));
        hidden.extend(generator.hidden(&order));
    }
    Ok(hidden)
}

impl Operation for MaskA2mim {
    const NAME: &'static str = "mask.a2mim";
    const PAPER: &'static str = "2205.13943 A2MIM";
    const DATA: &'static [&'static str] = &["noise"];

    fn sample(rng: &mut Rng) -> Config {
        super::mask::MaskSimMim::sample(rng)
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (cells, batch) = (CoarseMask::from_config(config)?.cells(), draw.size("batch", 1, 3));
        draw.uniform("noise", [batch, cells]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let generator = CoarseMask::from_config(run.config())?;
        let noise: Tensor<T> = run.input("noise")?;
        let hidden = noise_mask(&generator, &noise)?;
        run.output_ints("mask", mask_tensor([noise.shape()[0], generator.side(), generator.side()], &hidden)?);
        Ok(())
    }
}
