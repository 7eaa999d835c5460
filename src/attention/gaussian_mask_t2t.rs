//! `attention.gaussian_mask_t2t`: T2T's token attention with the factor of [`gaussian_mask`](super::gaussian_mask) (GMM-T2T, arXiv
//! 2309.05375).
//!
//! `[Q|K|V] = x W_qkvᵀ (+ b)`, heads of width `in_dim/h`, `Z = G ∘ (s Q Kᵀ)` with `s = (dim div h)^{−1/2}`, of the width of the *input*;
//! `O = softmax(Z) V`, `y = O W_projᵀ + b + V` with one head, `… + x` with more.

use super::gaussian_mask::{Heads, HeadsSaved, MaskSettings, TokenMask, check_tokens, sample_mask};
use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::{Groups, TermGradients, Terms};
use crate::kernel::{elementwise, rows};
use crate::linalg::Mat;
use crate::nn::{Layout, Linear, Names, Params, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// What the layer is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    dim: usize,
    heads: Heads,
    qkv_bias: bool,
    mask: MaskSettings,
}

impl Settings {
    /// From `dim`, `in_dim`, `num_heads`, `qkv_bias` and the mask's keys.
    pub fn from_config(config: &Config) -> Result<Self> {
        let (dim, in_dim, heads) = (config.positive("dim")?, config.positive("in_dim")?, config.positive("num_heads")?);
        if !in_dim.is_multiple_of(heads) || dim < heads || (heads > 1 && in_dim != dim) {
            let message = format!("expected a divisor of in_dim {in_dim} (and dim = in_dim for more than one), found {heads}");
            return Err(Error::config("num_heads", message));
        }
        Ok(Settings {
            dim,
            heads: Heads { heads, width: in_dim / heads, scale: 1.0 / ((dim / heads) as f64).sqrt() },
            qkv_bias: config.bool_or("qkv_bias", false)?,
            mask: MaskSettings::from_config(config, config.pair("grid")?)?,
        })
    }
}

/// Token attention with a factor: `qkv`, `proj`, `mask.*`.
pub struct TokenAttention {
    qkv: Linear,
    proj: Linear,
    mask: TokenMask,
    heads: Heads,
    tokens: usize,
}

impl TokenAttention {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: &Settings) -> Result<Self> {
        let (dim, inner) = (settings.dim, settings.heads.inner());
        let qkv = Linear::new(names.at("qkv"), dim, 3 * inner, settings.qkv_bias, normal_02(dim, inner));
        let proj = Linear::new(names.at("proj"), inner, inner, true, normal_02(inner, inner));
        let mask = TokenMask::new(&mut names.at("mask"), settings.heads.heads, &settings.mask)?;
        Ok(TokenAttention { qkv, proj, mask, heads: settings.heads, tokens: settings.mask.tokens()? })
    }

    /// `y`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, HeadsSaved<T>)> {
        check_tokens(x, self.tokens)?;
        let values = self.mask.values(p);
        let terms = Terms { factor: self.mask.factor(&values, 0), ..Terms::default() };
        let saved = self.heads.forward(self.qkv.forward(p, x)?, terms, &Groups::all(self.tokens, self.tokens))?;
        let y = if self.heads.heads == 1 {
            let (rows, e) = (saved.out().shape().rows_cols().0, self.heads.inner());
            let qkv = saved.qkv().data();
            self.proj.forward_onto_rows(p, saved.out(), Some(Mat::strided(&qkv[(2 * e).min(qkv.len())..], rows, e, 3 * e, 1)))?
        } else {
            self.proj.forward_onto(p, saved.out(), Some(x))?
        };
        Ok((y, saved))
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
        let d_out = self.proj.backward(p, g, saved.out(), dy)?;
        let values = self.mask.values(p);
        let mut d_values = Tensor::zeros([values.data().len()]);
        let factor = self.mask.factor(&values, 0);
        let grads = TermGradients { factor: factor.is_some().then(|| d_values.data_mut()), bias: None };
        let groups = Groups::all(self.tokens, self.tokens);
        let mut d_qkv = self.heads.backward(saved, Terms { factor, ..Terms::default() }, grads, &groups, &d_out)?;
        self.mask.backward(p, g, d_values.data());
        let e = self.heads.inner();
        if self.heads.heads == 1 {
            rows::add_to_columns(d_qkv.data_mut(), 3 * e, 2 * e, dy.data(), e);
        }
        let mut dx = self.qkv.backward(p, g, x, &d_qkv)?;
        if self.heads.heads > 1 {
            elementwise::add(dx.data_mut(), dy.data());
        }
        Ok(dx)
    }
}

/// `attention.gaussian_mask_t2t`.
pub struct GaussianMaskT2t;

impl Operation for GaussianMaskT2t {
    const NAME: &'static str = "attention.gaussian_mask_t2t";
    const PAPER: &'static str = "2309.05375 GMM-T2T";

    fn sample(rng: &mut Rng) -> Config {
        let (heads, mut config) = (rng.between(1, 3), Config::default());
        let inner = heads * rng.between(1, 4);
        config.set("dim", if heads == 1 { rng.between(1, 9) } else { inner }).set("in_dim", inner).set("num_heads", heads);
        sample_mask(rng, &mut config);
        config.set("qkv_bias", rng.chance(0.5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let settings = Settings::from_config(config)?;
        let batch = draw.size("batch", 1, 3);
        draw.normal("x", [batch, settings.mask.tokens()?, settings.dim]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, n, _], settings) = (inputs.dims("x")?, Settings::from_config(config)?);
        let inner = settings.heads.inner();
        let linear = Cost { flops: 2 * b * n * (3 * settings.dim * inner + inner * inner), activation_bytes: 4 * b * n * inner };
        Ok(Some(settings.heads.cost(b, n) + linear))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        let side = size.side()?;
        let mut bench = Benchmark::new(size);
        bench.sizes.remove("tokens");
        let bench = bench.set("in_dim", size.dim).set("qkv_bias", false).set("mask", "gmm").set("num_kernels", 5);
        Some(bench.set("grid", vec![side, side]))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (x, settings) = (run.input("x")?, Settings::from_config(run.config())?);
        check_tokens(&x, settings.mask.tokens()?)?;
        let (layer, layout) = Layout::build(|names| TokenAttention::new(names, &settings))?;
        run.unary(&layout, |p, x| layer.forward(p, x), |p, g, saved, dy| layer.backward(p, g, &x, saved, dy))
    }
}
