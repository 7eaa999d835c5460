//! `attention.gaussian_mask_swin`: window attention with the factor of [`gaussian_mask`](super::gaussian_mask) (GMM-Swin, arXiv
//! 2309.05375).
//!
//! `Z = G ∘ (s Q Kᵀ) + A[query − key] + M[window]`, `O = softmax(Z) V`, `y = O W_projᵀ + b`: the relative position bias A and the shift
//! mask M (0 or −100, a constant; window b of the batch reads mask `b mod nW`) are not multiplied.
//!
//! The windows run as groups of one image, so that the gradients of G and A are sums inside a task.

use super::gaussian_mask::{Heads, HeadsSaved, MaskSettings, TokenMask};
use super::window::RelativeBias;
use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::{Groups, Mask, Side, TermGradients, Terms};
use crate::nn::{Init, Layout, Linear, Names, Param, Params, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// What the layer is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    dim: usize,
    heads: Heads,
    window: usize,
    qkv_bias: bool,
    mask: MaskSettings,
    /// Shift masks nW.
    masks: usize,
}

impl Settings {
    /// From `dim`, `num_heads`, `window_size`, `qkv_bias`, the mask's keys and, if there are shift masks, `num_windows` of them.
    pub fn from_config(config: &Config) -> Result<Self> {
        let (dim, heads, window) = (config.positive("dim")?, config.positive("num_heads")?, config.positive("window_size")?);
        if !dim.is_multiple_of(heads) {
            return Err(Error::config("num_heads", format!("expected a divisor of the width {dim}, found {heads}")));
        }
        if window > 1 << 12 {
            return Err(Error::config("window_size", format!("expected at most {}, found {window}", 1 << 12)));
        }
        let width = dim / heads;
        Ok(Settings {
            dim,
            heads: Heads { heads, width, scale: 1.0 / (width as f64).sqrt() },
            window,
            qkv_bias: config.bool("qkv_bias")?,
            mask: MaskSettings::from_config(config, [window; 2])?,
            masks: config.usize_or("num_windows", 0)?,
        })
    }
}

/// Window attention with a factor and a relative position bias: `qkv`, `proj`, `relative_position_bias_table`, `mask.*`.
pub struct WindowAttention {
    qkv: Linear,
    proj: Linear,
    bias: RelativeBias,
    mask: TokenMask,
    shift: Option<Param>,
    settings: Settings,
}

/// `windows` groups of `n` tokens.
pub fn window_groups(windows: usize, n: usize) -> Groups {
    let side = Side {
        offsets: (0..=windows).map(|w| (w * n) as u32).collect(),
        tokens: (0..windows * n).map(|t| t as u32).collect(),
        positions: (0..windows * n).map(|t| (t % n) as u32).collect(),
    };
    Groups { queries: side.clone(), keys: side, zero_tokens: 0 }
}

impl WindowAttention {
    /// Registers the parameters and, if there are shift masks, the buffer `attn_mask` `[nW, w², w²]`.
    pub fn new(names: &mut Names, settings: &Settings) -> Result<Self> {
        let Settings { dim, heads, window, qkv_bias, ref mask, masks } = *settings;
        let n = window * window;
        let qkv = Linear::new(names.at("qkv"), dim, 3 * dim, qkv_bias, normal_02(dim, dim));
        let proj = Linear::new(names.at("proj"), dim, dim, true, normal_02(dim, dim));
        let bias = RelativeBias::new(names, [window; 2], heads.heads);
        let shape = crate::tensor::Shape::try_new(&[masks, n, n])?;
        let shift = (masks > 0).then(|| names.buffer("attn_mask", shape, Init::Normal(1.0)));
        let mask = TokenMask::new(&mut names.at("mask"), heads.heads, mask)?;
        Ok(WindowAttention { qkv, proj, bias, mask, shift, settings: settings.clone() })
    }

    /// All windows as one image, and their grouping.
    fn as_one_image<T: Float>(&self, x: &Tensor<T>) -> Result<(Tensor<T>, Groups)> {
        let [windows, n, c] = x.dims("windows")?;
        Ok((x.reshape([1, windows * n, c])?, window_groups(windows, n)))
    }

    fn shift_masks<'a, T: Float>(&self, p: &'a Params<T>) -> Option<Mask<'a, T>> {
        let side = self.settings.window * self.settings.window;
        self.shift.map(|shift| Mask { data: p.buffer(shift), count: self.settings.masks, side })
    }

    /// The attention of windows `x` `[B nW, w², dim]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, HeadsSaved<T>)> {
        let (one, groups) = self.as_one_image(x)?;
        let (logits, values) = (self.bias.logits(p), self.mask.values(p));
        let terms = Terms { factor: self.mask.factor(&values, 0), bias: Some(self.bias.view(&logits)), mask: self.shift_masks(p) };
        let saved = self.settings.heads.forward(self.qkv.forward(p, &one)?, terms, &groups)?;
        Ok((self.proj.forward(p, saved.out())?.reshape(x.shape())?, saved))
    }

    /// `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: HeadsSaved<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let (one, groups) = self.as_one_image(x)?;
        let d_out = self.proj.backward(p, g, saved.out(), &dy.reshape(one.shape())?)?;
        let (logits, values) = (self.bias.logits(p), self.mask.values(p));
        let (mut d_logits, mut d_values) = (Tensor::zeros(logits.shape()), Tensor::zeros([values.data().len()]));
        let factor = self.mask.factor(&values, 0);
        let terms = Terms { factor, bias: Some(self.bias.view(&logits)), mask: self.shift_masks(p) };
        let grads = TermGradients { factor: factor.is_some().then(|| d_values.data_mut()), bias: Some(d_logits.data_mut()) };
        let d_qkv = self.settings.heads.backward(saved, terms, grads, &groups, &d_out)?;
        drop(d_out);
        self.mask.backward(p, g, d_values.data());
        self.bias.backward(g, d_logits.data());
        self.qkv.backward(p, g, &one, &d_qkv)?.reshape(x.shape())
    }
}

/// `attention.gaussian_mask_swin`.
pub struct GaussianMaskSwin;

impl Operation for GaussianMaskSwin {
    const NAME: &'static str = "attention.gaussian_mask_swin";
    const PAPER: &'static str = "2309.05375 GMM-Swin";

    fn sample(rng: &mut Rng) -> Config {
        let (heads, mut config) = (rng.between(1, 3), Config::default());
        config.set("dim", heads * rng.between(1, 4)).set("num_heads", heads).set("window_size", rng.between(1, 4));
        config.set("qkv_bias", rng.chance(0.7)).set("mask", rng.pick(&["gmm", "gmm", "gmm", "elm", "none"]));
        config.set("num_kernels", rng.between(1, 4)).set("num_windows", rng.below(4));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let settings = Settings::from_config(config)?;
        let windows = draw.size("batch", 1, 5);
        draw.normal("x", [windows, settings.window * settings.window, settings.dim]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, n, c], settings) = (inputs.dims("x")?, Settings::from_config(config)?);
        Ok(Some(settings.heads.cost(b, n) + Cost { flops: 2 * b * n * 4 * c * c, activation_bytes: 4 * b * n * c }))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        const WINDOW: usize = 7;
        let side = size.side().filter(|side| side.is_multiple_of(WINDOW))?;
        let windows = (side / WINDOW).pow(2);
        Some(
            Benchmark::new(size)
                .set("window_size", WINDOW)
                .set("qkv_bias", true)
                .set("mask", "gmm")
                .set("num_kernels", 5)
                .size("batch", windows),
        )
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (x, mut settings) = (run.input("x")?, Settings::from_config(run.config())?);
        let ([_, tokens, c], n) = (x.dims("input `x`")?, settings.window * settings.window);
        if tokens != n || c != settings.dim {
            return Err(Error::shape("input `x`", format!("[windows, {n}, {}] (whole windows)", settings.dim), x.shape()));
        }
        if let (0, Some(shape)) = (settings.masks, run.buffer_shape("attn_mask")) {
            let [masks, _, _] = shape.dims("buffer `attn_mask`")?;
            if masks == 0 {
                return Err(Error::shape("buffer `attn_mask`", format!("[windows, {n}, {n}]"), shape));
            }
            settings.masks = masks;
        }
        let (layer, layout) = Layout::build(|names| WindowAttention::new(names, &settings))?;
        run.unary(&layout, |p, x| layer.forward(p, x), |p, g, saved, dy| layer.backward(p, g, &x, saved, dy))
    }
}
