//! `nn.spvit_fold`: the weights of an attention layer as a bottleneck convolution (SPViT, arXiv 2111.11802).
//!
//! A head whose attention looks at one offset computes `O_n V_n x_{t+δ}`; heads are mixed for every kernel position p by
//! `S = softmax over heads of head_probs/α`: `V⁽ᵖ⁾ = Σ_n S_np V_n`, `b = Σ_p Σ_n S_np b_n`, `O = Σ_p Σ_n S_np O_n`. Then
//! `bconv.0` = `V⁽ᵖ⁾` at the kernel position of p with bias b, `bconv.3` = O with the bias of `proj`. A 1×1 convolution has the centre
//! only. Positions run down columns first ("deit"), with the centre in front for "swin".
//!
//! Backward, `r_n = Σ_p S_np`: `∂V_n = Σ_p S_np G_p`, `∂b_n = r_n g_b`, `∂O_n = r_n G_O`, `∂S_np = ⟨V_n, G_p⟩ + ⟨b_n, g_b⟩ + ⟨O_n, G_O⟩`,
//! `∂head_probs = S (∂S − Σ_m S_m ∂S_m)/α`.

use std::sync::Arc;

use crate::case::{Config, Cost, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::linalg::{Epilogue, Mat, MatMut, count_flops, gemm};
use crate::nn::{Conv2d, ConvSettings, Init, Layout, Linear, Names, Param, Params, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// Which kernel position is the column of `head_probs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelLayout {
    /// Column-major.
    Deit,
    /// The centre, then the others column-major.
    Swin,
}

impl KernelLayout {
    fn column(self, row: usize, col: usize) -> usize {
        let q = 3 * col + row;
        match self {
            KernelLayout::Deit => q,
            KernelLayout::Swin => [1, 2, 3, 4, 0, 5, 6, 7, 8][q],
        }
    }

    /// The columns of the positions of a kernel, row-major.
    fn columns(self, kernel: usize) -> Vec<usize> {
        if kernel == 1 {
            return vec![self.column(1, 1)];
        }
        (0..9).map(|i| self.column(i / 3, i % 3)).collect()
    }
}

/// The two convolutions of a bottleneck: `0` (k×k, C → d) and `3` (1×1, d → C).
#[derive(Clone, Debug)]
pub struct Bottleneck {
    /// `0`.
    pub conv: Conv2d,
    /// `3`.
    pub out: Linear,
}

impl Bottleneck {
    /// Registers both.
    pub fn new(names: &mut Names, dim: usize, width: usize, kernel: usize) -> Result<Self> {
        let settings = ConvSettings { padding: [kernel / 2; 2], ..ConvSettings::new(dim, width, kernel) };
        let conv = Conv2d::new(names.at("0"), settings, Init::NORMAL_02)?;
        Ok(Bottleneck { conv, out: Linear::pointwise(names.at("3"), width, dim, true) })
    }

    /// Operations on `pixels`.
    pub fn flops(pixels: usize, dim: usize, width: usize, kernel: usize) -> usize {
        2 * pixels * dim * width * (kernel * kernel + 1)
    }
}

/// Attention weights that become a bottleneck.
#[derive(Clone, Debug)]
pub struct Fold {
    v: [Param; 2],
    proj: [Param; 2],
    head_probs: Param,
    dim: usize,
    heads: usize,
    columns: Vec<usize>,
    alpha: f64,
    bottleneck: Bottleneck,
    /// Of the folded weights.
    layout: Arc<Layout>,
}

/// The folded weights.
pub struct Folded<T: Float> {
    /// Under the layout of [`Fold::bottleneck`].
    pub params: Params<T>,
}

impl Fold {
    /// Of `v` and `proj` (with biases, `[C, C]`) and `head_probs` `[h, 9]`.
    pub fn new(
        v: &Linear,
        proj: &Linear,
        head_probs: Param,
        heads: usize,
        kernel: usize,
        layout: KernelLayout,
        alpha: f64,
    ) -> Result<Self> {
        let dim = v.inputs();
        let with_bias = |linear: &Linear| -> Result<[Param; 2]> {
            let bias = linear.bias().ok_or_else(|| Error::config("qkv_bias", "expected true: convolutions need the bias of v"))?;
            Ok([linear.weight(), bias])
        };
        if alpha.is_nan() || alpha <= 0.0 {
            return Err(Error::config("alpha", format!("expected a positive number, found {alpha}")));
        }
        let (bottleneck, folded) = Layout::build(|names| Bottleneck::new(names, dim, dim / heads, kernel))?;
        Ok(Fold {
            v: with_bias(v)?,
            proj: with_bias(proj)?,
            head_probs,
            dim,
            heads,
            columns: layout.columns(kernel),
            alpha,
            bottleneck,
            layout: folded,
        })
    }

    /// The convolutions that run on the folded weights.
    pub fn bottleneck(&self) -> &Bottleneck {
        &self.bottleneck
    }

    /// What folding costs; the folded weights are kept.
    pub fn cost(dim: usize, heads: usize, kernel: usize) -> Cost {
        let (taps, d) = (kernel * kernel, dim / heads);
        let kept = d * dim * taps + d + dim * d + dim;
        Cost { flops: 2 * (dim * dim * taps + dim * dim), activation_bytes: 4 * kept }
    }

    /// S `[h, 9]`.
    fn mixture<T: Float>(&self, p: &Params<T>) -> Vec<f64> {
        let probs = p.get(self.head_probs);
        let mut s = vec![0.0; self.heads * 9];
        for column in 0..9 {
            let logit = |n: usize| probs[n * 9 + column].to_f64() / self.alpha;
            let max = (0..self.heads).map(logit).fold(f64::NEG_INFINITY, f64::max);
            let sum = (0..self.heads).fold(0.0, |sum, n| sum + libm::exp(logit(n) - max));
            (0..self.heads).for_each(|n| s[n * 9 + column] = libm::exp(logit(n) - max) / sum);
        }
        s
    }

    /// S at the kernel's positions `[h, k²]`, and its sums over them.
    fn at_positions<T: Float>(&self, s: &[f64]) -> (Tensor<T>, Vec<T>) {
        let taps = self.columns.len();
        let kernel = Tensor::from_fn([self.heads, taps], |i| T::from_f64(s[i / taps * 9 + self.columns[i % taps]]));
        let sums = (0..self.heads).map(|n| T::from_f64(self.columns.iter().fold(0.0, |sum, &c| sum + s[n * 9 + c]))).collect();
        (kernel, sums)
    }

    /// The folded weights.
    pub fn forward<T: Float>(&self, p: &Params<T>) -> Folded<T> {
        let (c, heads, taps) = (self.dim, self.heads, self.columns.len());
        let d = c / heads;
        let (kernel, sums) = self.at_positions::<T>(&self.mixture(p));
        let mut folded = Params::zeros(&self.layout);
        let (conv, out) = (&self.bottleneck.conv, &self.bottleneck.out);
        // Rows (channel of the head, input channel), columns kernel positions.
        let v = Mat::new(p.get(self.v[0]), heads, d * c).t();
        let weight = MatMut::new(folded.get_mut(conv.weight()), d * c, taps);
        gemm(v, Mat::new(kernel.data(), heads, taps), weight, Epilogue::default());
        count_flops(2 * c * c);
        for (n, &r) in sums.iter().enumerate() {
            if let Some(bias) = conv.bias() {
                let from = &p.get(self.v[1])[n * d..(n + 1) * d];
                folded.get_mut(bias).iter_mut().zip(from).for_each(|(b, &x)| *b += r * x);
            }
            let rows = folded.get_mut(out.weight()).chunks_exact_mut(d);
            for (row, from) in rows.zip(p.get(self.proj[0]).chunks_exact(c)) {
                row.iter_mut().zip(&from[n * d..(n + 1) * d]).for_each(|(o, &x)| *o += r * x);
            }
        }
        if let Some(bias) = out.bias() {
            folded.get_mut(bias).copy_from_slice(p.get(self.proj[1]));
        }
        Folded { params: folded }
    }

    /// Gradients of the folded weights, all zero.
    pub fn zero_grads<T: Float>(&self) -> Params<T> {
        Params::zeros(&self.layout)
    }

    /// Adds the gradients of `v`, `proj` and `head_probs`, from those of the folded weights.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, d: &Params<T>) {
        let (c, heads, taps) = (self.dim, self.heads, self.columns.len());
        let width = c / heads;
        let s = self.mixture(p);
        let (kernel, sums) = self.at_positions::<T>(&s);
        let (conv, out) = (&self.bottleneck.conv, &self.bottleneck.out);
        let dw = Mat::new(d.get(conv.weight()), width * c, taps);
        let accumulate = || Epilogue { accumulate: true, ..Epilogue::default() };
        // ∂V_n = Σ_p S_np G_p, and ⟨V_n, G_p⟩
        let dv = MatMut::new(g.get_mut(self.v[0]), heads, width * c);
        gemm(Mat::new(kernel.data(), heads, taps), dw.t(), dv, accumulate());
        let mut ds = Tensor::zeros([heads, taps]);
        let v = Mat::new(p.get(self.v[0]), heads, width * c);
        gemm(v, dw, MatMut::new(ds.data_mut(), heads, taps), Epilogue::default());
        // Their differences count: no rounding of the sums.
        let mut ds: Vec<f64> = ds.data().iter().map(|x| x.to_f64()).collect();
        let d_bias: &[T] = conv.bias().map_or(&[], |bias| d.get(bias));
        let d_out = d.get(out.weight());
        for (n, &r) in sums.iter().enumerate() {
            let own = n * width..(n + 1) * width;
            let mut dot = 0.0;
            for (&x, &y) in p.get(self.v[1])[own.clone()].iter().zip(d_bias) {
                dot += x.to_f64() * y.to_f64();
            }
            g.get_mut(self.v[1])[own.clone()].iter_mut().zip(d_bias).for_each(|(b, &y)| *b += r * y);
            for (from, dy) in p.get(self.proj[0]).chunks_exact(c).zip(d_out.chunks_exact(width)) {
                dot += from[own.clone()].iter().zip(dy).fold(0.0, |sum, (x, y)| sum + x.to_f64() * y.to_f64());
            }
            for (to, dy) in g.get_mut(self.proj[0]).chunks_exact_mut(c).zip(d_out.chunks_exact(width)) {
                to[own.clone()].iter_mut().zip(dy).for_each(|(o, &y)| *o += r * y);
            }
            ds[n * taps..(n + 1) * taps].iter_mut().for_each(|x| *x += dot);
        }
        if let Some(bias) = out.bias() {
            g.get_mut(self.proj[1]).iter_mut().zip(d.get(bias)).for_each(|(b, &y)| *b += y);
        }
        let probs = g.get_mut(self.head_probs);
        for (tap, &column) in self.columns.iter().enumerate() {
            let share = |n: usize| s[n * 9 + column];
            let mean = (0..heads).fold(0.0, |sum, n| sum + share(n) * ds[n * taps + tap]);
            for n in 0..heads {
                probs[n * 9 + column] += T::from_f64(share(n) * (ds[n * taps + tap] - mean) / self.alpha);
            }
        }
    }
}

/// `nn.spvit_fold`.
pub struct SpvitFold;

impl Operation for SpvitFold {
    const NAME: &'static str = "nn.spvit_fold";
    const PAPER: &'static str = "2111.11802 SPViT";

    fn sample(rng: &mut Rng) -> Config {
        let (heads, mut config) = (rng.between(1, 4), Config::default());
        config.set("dim", heads * rng.between(1, 5)).set("num_heads", heads).set("kernel", *[1, 3, 3].get(rng.below(3)).unwrap_or(&3));
        config.set("layout", rng.pick(&["deit", "swin"])).set("alpha", if rng.chance(0.5) { 0.1 } else { 100.0 });
        config
    }

    fn inputs(_: &Config, _: &mut Draw) -> Result<()> {
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (dim, heads, kernel) = (config.positive("dim")?, config.positive("num_heads")?, config.usize("kernel")?);
        if !dim.is_multiple_of(heads) || !matches!(kernel, 1 | 3) {
            let message = format!("expected a divisor of the width {dim} and a kernel of 1 or 3, found {heads} and {kernel}");
            return Err(Error::config("num_heads", message));
        }
        let kinds = if config.choice("layout", &["deit", "swin"])? == "deit" { KernelLayout::Deit } else { KernelLayout::Swin };
        let alpha = config.f64("alpha")?;
        let (fold, layout) = Layout::build(|names| {
            let v = Linear::new(names.at("v"), dim, dim, true, normal_02(dim, dim));
            let proj = Linear::new(names.at("proj"), dim, dim, true, normal_02(dim, dim));
            let head_probs = names.param("head_probs", [heads, 9], Init::ONES);
            Fold::new(&v, &proj, head_probs, heads, kernel, kinds, alpha)
        })?;
        let p = run.params(&layout)?;
        let folded = fold.forward(&p).params;
        for entry in folded.layout().params() {
            run.output(&format!("bconv.{}", entry.name), &folded.tensor(entry.param));
        }
        if run.backward() {
            let (mut g, mut d) = (run.zero_grads(&p), fold.zero_grads());
            for entry in folded.layout().params() {
                let cotangent = run.cotangent(&format!("bconv.{}", entry.name), entry.param.shape())?;
                d.get_mut(entry.param).copy_from_slice(cotangent.data());
            }
            fold.backward(&p, &mut g, &d);
            run.grad_params(&g);
        }
        Ok(())
    }
}
