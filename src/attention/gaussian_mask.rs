//! `attention.gaussian_mask`: attention whose logits are multiplied by a learned function of the distance between two tokens on the
//! grid, before the softmax (GMM-ViT, arXiv 2309.05375); `mask.gaussian_mixture`: that function alone.
//!
//! `G_g(Δ) = Σ_k α_kg exp(−|Δ|² / 2τ_kg)`, `τ = σ² + 1e-5`, or a free value for every pair of tokens ("elm"), or 1 ("none");
//! `Z = G ∘ (s Q Kᵀ)`, `O = softmax(Z) V`, `y = O W_outᵀ + b`. A factor of 0 makes a logit 0, not −∞. Row and column 0 keep the factor 1
//! if token 0 is a class token. Terms beyond `cutoff_d2` (the released code in float32: 103) are 0; by default there are none.
//!
//! G depends on `|Δy|`, `|Δx|` alone: a table `[h, H, W]`, `E(Δ) = e^{−Δy²/2τ} e^{−Δx²/2τ}`, from `K h (H + W)` exponentials.
//!
//! Backward, with Ḡ summed over images and pairs of equal distance: `dα = Σ Ḡ E`, `dσ = α σ/τ² Σ Ḡ E |Δ|²`; the rest in
//! [`kernel::attention`](crate::kernel::attention).

use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::{self as core, Factor, FactorTable, Groups, Operand, Sizes, TermGradients, Terms};
use crate::linalg::ColumnsMut;
use crate::nn::{Init, Layout, Linear, Names, Param, Params, xavier_normal};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Shape, Tensor};

/// Added to σ².
const TAU_FLOOR: f64 = 1e-5;
/// More elements than anybody means to ask for.
const LARGEST_MASK: usize = 1 << 28;

/// A mixture of Gaussians of the distance per head: `sigma` σ and `alpha` α, `[K, h, 1, 1]`.
#[derive(Clone, Debug)]
pub struct GaussianMixture {
    sigma: Param,
    alpha: Param,
    kernels: usize,
    heads: usize,
    grid: [usize; 2],
    cutoff: Option<f64>,
}

impl GaussianMixture {
    /// Registers σ (around 10) and α (around 0).
    pub fn new(names: &mut Names, heads: usize, kernels: usize, grid: [usize; 2], cutoff: Option<f64>) -> Result<Self> {
        let shape = Shape::try_new(&[kernels, heads, 1, 1])?;
        if kernels == 0 || grid.contains(&0) {
            return Err(Error::config("grid", format!("expected a grid and kernels, found {grid:?} and {kernels} kernels")));
        }
        Shape::try_new(&[heads, grid[0], grid[1]])?;
        let sigma = names.param("sigma", shape, Init::NormalAround { mean: 10.0, std: 10.0 });
        let alpha = names.param("alpha", shape, Init::Normal(2.0));
        Ok(GaussianMixture { sigma, alpha, kernels, heads, grid, cutoff })
    }

    /// For every head and kernel: its number, σ and τ, and `e^{−Δ²/2τ}` for the distances along the rows and the columns.
    fn kernels<T: Float>(&self, p: &Params<T>, mut work: impl FnMut(usize, usize, [f64; 2], &[T], &[T])) {
        let [height, width] = self.grid;
        let mut powers = Tensor::<T>::scratch([height + width]);
        for head in 0..self.heads {
            for k in 0..self.kernels {
                let index = k * self.heads + head;
                let sigma = p.get(self.sigma)[index].to_f64();
                let tau = sigma * sigma + TAU_FLOOR;
                let (down, across) = powers.data_mut().split_at_mut(height);
                for line in [&mut *down, &mut *across] {
                    for (d, e) in line.iter_mut().enumerate() {
                        *e = T::from_f64(libm::exp(-((d * d) as f64) / (2.0 * tau)));
                    }
                }
                work(head, index, [sigma, tau], down, across);
            }
        }
    }

    /// How many columns of row `dy` lie within the cutoff.
    fn within(&self, dy: usize) -> usize {
        let width = self.grid[1];
        let Some(cutoff) = self.cutoff else { return width };
        (0..width).take_while(|dx| (dy * dy + dx * dx) as f64 <= cutoff).count()
    }

    /// `[h, H, W]`: the factor for `|Δy|`, `|Δx|`.
    pub fn table<T: Float>(&self, p: &Params<T>) -> Tensor<T> {
        let [height, width] = self.grid;
        let mut table = Tensor::zeros([self.heads, height, width]);
        let alpha = p.get(self.alpha);
        let within: Vec<usize> = (0..height).map(|dy| self.within(dy)).collect();
        self.kernels(p, |head, index, _, down, across| {
            let rows = table.data_mut()[head * height * width..(head + 1) * height * width].chunks_exact_mut(width);
            for ((row, &e), &within) in rows.zip(down).zip(&within) {
                let scale = alpha[index] * e;
                for (g, &e) in row[..within].iter_mut().zip(across) {
                    *g += scale * e;
                }
            }
        });
        table
    }

    /// From the gradient of the table.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, d_table: &[T]) {
        let [height, width] = self.grid;
        let alpha = p.get(self.alpha);
        let within: Vec<usize> = (0..height).map(|dy| self.within(dy)).collect();
        self.kernels(p, |head, index, [sigma, tau], down, across| {
            // Σ Ḡ E and Σ Ḡ E |Δ|².
            let (mut sum, mut squares) = (0.0, 0.0);
            let rows = d_table[head * height * width..(head + 1) * height * width].chunks_exact(width);
            for (dy, ((row, &e), &within)) in rows.zip(down).zip(&within).enumerate() {
                let (mut line, mut line_squares) = (0.0, 0.0);
                for (dx, (&d, &e)) in row[..within].iter().zip(across).enumerate() {
                    let term = d.to_f64() * e.to_f64();
                    line += term;
                    line_squares += term * (dx * dx) as f64;
                }
                sum += e.to_f64() * line;
                squares += e.to_f64() * (line_squares + line * (dy * dy) as f64);
            }
            g.get_mut(self.alpha)[index] += T::from_f64(sum);
            g.get_mut(self.sigma)[index] += T::from_f64(alpha[index].to_f64() * sigma / (tau * tau) * squares);
        });
    }
}

/// The factor on the logits of an attention.
#[derive(Clone, Debug)]
pub enum TokenMask {
    /// A Gaussian mixture: `sigma`, `alpha`.
    Mixture(GaussianMixture),
    /// A free value for every pair of patch tokens, shared by all heads: `mask` `[N, N]`.
    Table {
        /// The values.
        table: Param,
        /// N.
        side: usize,
    },
    /// 1.
    None,
}

/// The values of a [`TokenMask`]: computed, or a parameter as it is.
pub enum MaskValues<'a, T: Float> {
    /// A table of distances.
    Table(Tensor<T>),
    /// The parameter.
    Param(&'a [T]),
    /// None.
    None,
}

impl<T: Float> MaskValues<'_, T> {
    /// The values.
    pub fn data(&self) -> &[T] {
        match self {
            MaskValues::Table(t) => t.data(),
            MaskValues::Param(p) => p,
            MaskValues::None => &[],
        }
    }
}

/// What a [`TokenMask`] is made of: `mask`, `num_kernels`, `grid`, `cutoff_d2`.
#[derive(Clone, Debug)]
pub struct MaskSettings {
    /// "gmm", "elm" or "none".
    pub kind: String,
    /// Kernels of the mixture.
    pub kernels: usize,
    /// Rows and columns of tokens.
    pub grid: [usize; 2],
    /// Squared distance beyond which the mixture is 0.
    pub cutoff: Option<f64>,
}

impl MaskSettings {
    /// From a configuration.
    pub fn from_config(config: &Config, grid: [usize; 2]) -> Result<Self> {
        let kind = if config.get("mask").is_none() { "gmm" } else { config.choice("mask", &["gmm", "elm", "none"])? };
        let cutoff = if config.get("cutoff_d2").is_none() { None } else { Some(config.f64("cutoff_d2")?) };
        if cutoff.is_some_and(|c| c.is_nan() || c < 0.0) {
            return Err(Error::config("cutoff_d2", format!("expected a squared distance, found {cutoff:?}")));
        }
        Ok(MaskSettings { kind: kind.into(), kernels: config.usize_or("num_kernels", 5)?, grid, cutoff })
    }

    /// The number of patch tokens.
    pub fn tokens(&self) -> Result<usize> {
        let n = self.grid[0].checked_mul(self.grid[1]).filter(|&n| n > 0);
        n.ok_or_else(|| Error::config("grid", format!("expected rows and columns of tokens, found {:?}", self.grid)))
    }
}

impl TokenMask {
    /// Registers the parameters.
    pub fn new(names: &mut Names, heads: usize, settings: &MaskSettings) -> Result<Self> {
        match settings.kind.as_str() {
            "gmm" => Ok(TokenMask::Mixture(GaussianMixture::new(names, heads, settings.kernels, settings.grid, settings.cutoff)?)),
            "elm" => {
                let side = settings.tokens()?;
                Ok(TokenMask::Table { table: names.param("mask", Shape::try_new(&[side, side])?, Init::ZEROS), side })
            }
            _ => Ok(TokenMask::None),
        }
    }

    /// The values, for [`factor`](Self::factor).
    pub fn values<'a, T: Float>(&self, p: &'a Params<T>) -> MaskValues<'a, T> {
        match self {
            TokenMask::Mixture(mixture) => MaskValues::Table(mixture.table(p)),
            TokenMask::Table { table, .. } => MaskValues::Param(p.get(*table)),
            TokenMask::None => MaskValues::None,
        }
    }

    /// The factor as the attention core reads it, after `prefix` class tokens.
    pub fn factor<'a, T: Float>(&self, values: &'a MaskValues<T>, prefix: usize) -> Option<Factor<'a, T>> {
        let data = values.data();
        let table = match self {
            TokenMask::Mixture(mixture) => FactorTable::Distance { data, grid: mixture.grid },
            TokenMask::Table { side, .. } => FactorTable::Dense { data, side: *side, shared: true },
            TokenMask::None => return None,
        };
        Some(Factor { table, prefix })
    }

    /// From the gradient of the values.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, d_values: &[T]) {
        match self {
            TokenMask::Mixture(mixture) => mixture.backward(p, g, d_values),
            TokenMask::Table { table, .. } => crate::kernel::elementwise::add(g.get_mut(*table), d_values),
            TokenMask::None => {}
        }
    }
}

/// The heads of an attention over `[B, N, 3 h d]` (q, k, v).
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Heads h.
    pub heads: usize,
    /// Width d of a head.
    pub width: usize,
    /// The factor on the scores.
    pub scale: f64,
}

/// What [`Heads::backward`] needs.
pub struct HeadsSaved<T: Float> {
    qkv: Tensor<T>,
    out: Tensor<T>,
    stats: Tensor<T>,
}

impl<T: Float> HeadsSaved<T> {
    /// The attention's output.
    pub fn out(&self) -> &Tensor<T> {
        &self.out
    }

    /// q, k and v.
    pub fn qkv(&self) -> &Tensor<T> {
        &self.qkv
    }
}

impl Heads {
    /// `h d`.
    pub fn inner(&self) -> usize {
        self.heads * self.width
    }

    fn sizes<T: Float>(&self, qkv: &Tensor<T>) -> Result<Sizes> {
        let [batch, n, _] = qkv.dims("q, k and v")?;
        Ok(Sizes { batch, heads: self.heads, dim: self.width, value_dim: self.width, queries: n, keys: n, scale: self.scale })
    }

    fn operands<'a, T: Float>(&self, qkv: &'a Tensor<T>) -> [Operand<'a, T>; 3] {
        [0, 1, 2].map(|i| Operand { data: qkv.data(), stride: 3 * self.inner(), offset: i * self.inner() })
    }

    /// The attention's output `[B, N, h d]`, in what is saved.
    pub fn forward<T: Float>(&self, qkv: Tensor<T>, terms: Terms<T>, groups: &Groups) -> Result<HeadsSaved<T>> {
        let sizes = self.sizes(&qkv)?;
        let mut out = Tensor::scratch(qkv.shape().with_last(self.inner()));
        let mut stats = Tensor::scratch([sizes.batch, sizes.heads, sizes.queries, 2]);
        core::forward_with(out.data_mut(), stats.data_mut(), self.operands(&qkv), terms, groups, sizes);
        Ok(HeadsSaved { qkv, out, stats })
    }

    /// The gradient of q, k and v; those of the terms are added to `term_grads`.
    pub fn backward<T: Float>(
        &self,
        saved: HeadsSaved<T>,
        terms: Terms<T>,
        term_grads: TermGradients<T>,
        groups: &Groups,
        d_out: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let HeadsSaved { qkv, out, stats } = saved;
        let sizes = self.sizes(&qkv)?;
        let mut d_qkv = Tensor::zeros(qkv.shape());
        let (dq, rest) = ColumnsMut::new(d_qkv.data_mut(), 3 * self.inner()).split_at(self.inner());
        let (dk, dv) = rest.split_at(self.inner());
        let results = [d_out.data(), out.data(), stats.data()];
        core::backward_with([dq, dk, dv], term_grads, results, self.operands(&qkv), terms, groups, sizes);
        Ok(d_qkv)
    }

    /// Scores and weighted values of `b` groups of `n` tokens; kept: q, k, v, the output, two statistics.
    pub fn cost(&self, b: usize, n: usize) -> Cost {
        let inner = self.inner();
        Cost { flops: 4 * b * n * n * inner, activation_bytes: 4 * b * n * (4 * inner + 2 * self.heads) }
    }
}

/// What a [`GaussianMaskAttention`] is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Width of the tokens.
    pub dim: usize,
    /// Heads h.
    pub heads: usize,
    /// Width d of a head.
    pub dim_head: usize,
    /// The factor on the logits.
    pub mask: MaskSettings,
    /// Token 0 is a class token.
    pub cls_token: bool,
}

impl Settings {
    /// From `dim`, `heads`, `dim_head`, the mask's keys and `cls_token`.
    pub fn from_config(config: &Config) -> Result<Self> {
        Ok(Settings {
            dim: config.positive("dim")?,
            heads: config.positive("heads")?,
            dim_head: config.positive("dim_head")?,
            mask: MaskSettings::from_config(config, config.pair("grid")?)?,
            cls_token: config.bool_or("cls_token", false)?,
        })
    }

    /// N.
    pub fn tokens(&self) -> Result<usize> {
        Ok(self.mask.tokens()? + usize::from(self.cls_token))
    }

    /// The output is projected.
    fn projects(&self) -> bool {
        self.heads != 1 || self.dim_head != self.dim
    }

    /// The parts of the attention: heads without parameters.
    fn parts(&self) -> Heads {
        Heads { heads: self.heads, width: self.dim_head, scale: 1.0 / (self.dim_head as f64).sqrt() }
    }

    /// What the attention costs.
    pub fn cost(&self, b: usize) -> Result<Cost> {
        let (n, inner) = (self.tokens()?, self.heads * self.dim_head);
        let qkv = Cost { flops: 2 * b * n * self.dim * 3 * inner, activation_bytes: 0 };
        let out = Cost { flops: 2 * b * n * inner * self.dim, activation_bytes: 4 * b * n * self.dim };
        Ok(self.parts().cost(b, n) + qkv + if self.projects() { out } else { Cost::default() })
    }
}

/// Multi-head attention with a factor on the logits: `to_qkv` (no bias), `mask.*`, `to_out.0`.
#[derive(Clone, Debug)]
pub struct GaussianMaskAttention {
    to_qkv: Linear,
    mask: TokenMask,
    to_out: Option<Linear>,
    heads: Heads,
    tokens: usize,
    prefix: usize,
}

impl GaussianMaskAttention {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: &Settings) -> Result<Self> {
        let (dim, heads) = (settings.dim, settings.parts());
        let inner = Shape::try_new(&[3, heads.heads, heads.width, dim])?.numel() / 3 / dim;
        let to_qkv = Linear::new(names.at("to_qkv"), dim, 3 * inner, false, xavier_normal(dim, 3 * inner));
        let to_out = settings.projects().then(|| Linear::new(names.at("to_out.0"), inner, dim, true, xavier_normal(inner, dim)));
        let mask = TokenMask::new(&mut names.at("mask"), settings.heads, &settings.mask)?;
        Ok(GaussianMaskAttention { to_qkv, mask, to_out, heads, tokens: settings.tokens()?, prefix: settings.cls_token.into() })
    }

    /// The attention of `x` `[B, N, dim]`, plus `residual`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, residual: Option<&Tensor<T>>) -> Result<(Tensor<T>, HeadsSaved<T>)> {
        check_tokens(x, self.tokens)?;
        let qkv = self.to_qkv.forward(p, x)?;
        let values = self.mask.values(p);
        let terms = Terms { factor: self.mask.factor(&values, self.prefix), ..Terms::default() };
        let saved = self.heads.forward(qkv, terms, &Groups::all(self.tokens, self.tokens))?;
        let y = match (&self.to_out, residual) {
            (Some(to_out), _) => to_out.forward_onto(p, &saved.out, residual)?,
            (None, None) => saved.out.clone(),
            (None, Some(residual)) => {
                let mut y = saved.out.clone();
                crate::kernel::elementwise::add(y.data_mut(), residual.data());
                y
            }
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
        let d_out = match &self.to_out {
            Some(to_out) => to_out.backward(p, g, &saved.out, dy)?,
            None => dy.clone(),
        };
        let values = self.mask.values(p);
        let mut d_values = Tensor::zeros([values.data().len()]);
        let factor = self.mask.factor(&values, self.prefix);
        let term_grads = TermGradients { factor: factor.is_some().then(|| d_values.data_mut()), bias: None };
        let groups = Groups::all(self.tokens, self.tokens);
        let d_qkv = self.heads.backward(saved, Terms { factor, ..Terms::default() }, term_grads, &groups, &d_out)?;
        drop(d_out);
        self.mask.backward(p, g, d_values.data());
        self.to_qkv.backward(p, g, x, &d_qkv)
    }
}

/// An error unless `x` has `tokens` tokens.
pub fn check_tokens<T: Float>(x: &Tensor<T>, tokens: usize) -> Result<()> {
    let [_, n, c] = x.dims("input `x`")?;
    if n == tokens { Ok(()) } else { Err(Error::shape("input `x`", format!("[batch, {tokens}, {c}] (the tokens of the grid)"), x.shape())) }
}

/// `mask.gaussian_mixture`.
pub struct MaskGaussianMixture;

impl Operation for MaskGaussianMixture {
    const NAME: &'static str = "mask.gaussian_mixture";
    const PAPER: &'static str = "2309.05375 GMM-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config
            .set("heads", rng.between(1, 4))
            .set("num_kernels", rng.between(1, 6))
            .set("grid", vec![rng.between(1, 5), rng.between(1, 5)]);
        if rng.chance(0.3) {
            config.set("cutoff_d2", rng.between(0, 20));
        }
        config
    }

    fn inputs(_: &Config, _: &mut Draw) -> Result<()> {
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (heads, settings) = (config.positive("heads")?, MaskSettings::from_config(config, config.pair("grid")?)?);
        let (n, [height, width]) = (settings.tokens()?, settings.grid);
        if heads.checked_mul(n).and_then(|x| x.checked_mul(n)).is_none_or(|x| x > LARGEST_MASK) {
            return Err(Error::config("grid", format!("expected a mask of at most {LARGEST_MASK} elements, found {heads}×{n}×{n}")));
        }
        let (mixture, layout) =
            Layout::build(|names| GaussianMixture::new(names, heads, settings.kernels, settings.grid, settings.cutoff))?;
        let p = run.params(&layout)?;
        let table = mixture.table(&p);
        let at = |i: usize| {
            let (head, query, key) = (i / (n * n), i / n % n, i % n);
            (head * height + (query / width).abs_diff(key / width)) * width + (query % width).abs_diff(key % width)
        };
        let mask = Tensor::from_fn([heads, n, n], |i| table.data()[at(i)]);
        run.output("mask", &mask);
        if run.backward() {
            let (mut g, d_mask) = (run.zero_grads(&p), run.cotangent("mask", mask.shape())?);
            let mut d_table = Tensor::zeros(table.shape());
            d_mask.data().iter().enumerate().for_each(|(i, &d)| d_table.data_mut()[at(i)] += d);
            mixture.backward(&p, &mut g, d_table.data());
            run.grad_params(&g);
        }
        Ok(())
    }
}

/// Random `mask`, `num_kernels`, `grid`, `cutoff_d2`.
pub fn sample_mask(rng: &mut Rng, config: &mut Config) {
    config.set("mask", rng.pick(&["gmm", "gmm", "elm", "none"])).set("num_kernels", rng.between(1, 4));
    config.set("grid", vec![rng.between(1, 4), rng.between(1, 4)]);
    if rng.chance(0.3) {
        config.set("cutoff_d2", rng.between(0, 12));
    }
}

/// Random `dim`, `heads`, `dim_head`, with and without a projection.
pub fn sample_heads(rng: &mut Rng, config: &mut Config) {
    let (heads, width) = (rng.between(1, 4), rng.between(1, 4));
    let dim = if rng.chance(0.5) { heads * width } else { rng.between(2, 9) };
    config.set("dim", dim).set("heads", heads).set("dim_head", width);
}

/// `attention.gaussian_mask`.
pub struct GaussianMask;

impl Operation for GaussianMask {
    const NAME: &'static str = "attention.gaussian_mask";
    const PAPER: &'static str = "2309.05375 GMM-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_heads(rng, &mut config);
        sample_mask(rng, &mut config);
        config.set("cls_token", rng.chance(0.4));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let settings = Settings::from_config(config)?;
        let batch = draw.size("batch", 1, 3);
        draw.normal("x", [batch, settings.tokens()?, settings.dim]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, _, _] = inputs.dims("x")?;
        Ok(Some(Settings::from_config(config)?.cost(b)?))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        let side = size.side()?;
        Some(
            Benchmark::new(size)
                .set("heads", size.heads)
                .set("dim_head", size.dim / size.heads)
                .set("mask", "gmm")
                .set("num_kernels", 5)
                .set("grid", vec![side, side])
                .set("cls_token", false),
        )
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (x, settings) = (run.input("x")?, Settings::from_config(run.config())?);
        check_tokens(&x, settings.tokens()?)?;
        let (layer, layout) = Layout::build(|names| GaussianMaskAttention::new(names, &settings))?;
        run.unary(&layout, |p, x| layer.forward(p, x, None), |p, g, saved, dy| layer.backward(p, g, &x, saved, dy))
    }
}
