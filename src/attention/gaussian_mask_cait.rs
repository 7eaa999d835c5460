//! `attention.gaussian_mask_cait`: talking heads with the factor of [`gaussian_mask`](super::gaussian_mask) (GMM-CaiT, arXiv 2309.05375).
//!
//! `Q = x W_qᵀ`, `[K|V] = x W_kvᵀ`, `Z = G ∘ (s Q Kᵀ)`, `Z′_g = Σ_h Z_h pre_hg`, `P = softmax Z′`, `P′_g = Σ_h P_h post_hg`, `O = P′ V`,
//! `y = O W_outᵀ + b`: the factor first, the mixing after. The rest in [`kernel::talking_heads`](crate::kernel::talking_heads), whose
//! mixing matrices are the transposes of `mix_heads_pre_attn`, `mix_heads_post_attn`.

use super::gaussian_mask::{MaskSettings, TokenMask, check_tokens, sample_heads, sample_mask};
use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::Result;
use crate::kernel::talking_heads::{self as core, Mixing, MixingMut, Sizes};
use crate::linalg::{Epilogue, Mat, MatMut, gemm};
use crate::nn::{Init, Layout, Linear, Names, Param, Params, xavier_normal};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Shape, Tensor};

/// What the layer is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    dim: usize,
    heads: usize,
    dim_head: usize,
    mask: MaskSettings,
}

impl Settings {
    /// From `dim`, `heads`, `dim_head` and the mask's keys.
    pub fn from_config(config: &Config) -> Result<Self> {
        Ok(Settings {
            dim: config.positive("dim")?,
            heads: config.positive("heads")?,
            dim_head: config.positive("dim_head")?,
            mask: MaskSettings::from_config(config, config.pair("grid")?)?,
        })
    }

    fn inner(&self) -> usize {
        self.heads * self.dim_head
    }

    fn sizes(&self, batch: usize) -> Result<Sizes> {
        Ok(Sizes { batch, tokens: self.mask.tokens()?, heads: self.heads, dim: self.dim_head })
    }
}

/// Talking heads with a factor: `to_q`, `to_kv`, `mix_heads_pre_attn`, `mix_heads_post_attn`, `to_out.0`, `mask.*`.
pub struct MaskedTalkingHeads {
    to_q: Linear,
    to_kv: Linear,
    pre: Param,
    post: Param,
    to_out: Linear,
    mask: TokenMask,
    settings: Settings,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    qkv: Tensor<T>,
    out: Tensor<T>,
    stats: Tensor<T>,
}

fn transposed<T: Float>(w: &[T], heads: usize) -> Tensor<T> {
    Tensor::from_fn([heads, heads], |i| w[i % heads * heads + i / heads])
}

impl MaskedTalkingHeads {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: &Settings) -> Result<Self> {
        let (dim, heads) = (settings.dim, settings.heads);
        Shape::try_new(&[3, heads, settings.dim_head, dim])?;
        let inner = settings.inner();
        let to_q = Linear::new(names.at("to_q"), dim, inner, false, xavier_normal(dim, inner));
        let to_kv = Linear::new(names.at("to_kv"), dim, 2 * inner, false, xavier_normal(dim, 2 * inner));
        let [pre, post] = ["mix_heads_pre_attn", "mix_heads_post_attn"].map(|name| names.param(name, [heads, heads], Init::Normal(1.0)));
        let to_out = Linear::new(names.at("to_out.0"), inner, dim, true, xavier_normal(inner, dim));
        let mask = TokenMask::new(&mut names.at("mask"), heads, &settings.mask)?;
        Ok(MaskedTalkingHeads { to_q, to_kv, pre, post, to_out, mask, settings: settings.clone() })
    }

    /// The two projections, and the columns of `[Q|K|V]` that they make.
    fn projections(&self) -> [(&Linear, usize); 2] {
        [(&self.to_q, 0), (&self.to_kv, self.settings.inner())]
    }

    fn sizes<T: Float>(&self, x: &Tensor<T>) -> Result<Sizes> {
        let [batch, _, _] = x.dims("input of an attention")?;
        self.settings.sizes(batch)
    }

    /// `y`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let (sizes, inner, dim, (rows, _)) = (self.sizes(x)?, self.settings.inner(), self.settings.dim, x.shape().rows_cols());
        let mut qkv = Tensor::scratch(x.shape().with_last(3 * inner));
        for (linear, from) in self.projections() {
            let weight = Mat::new(p.get(linear.weight()), linear.outputs(), dim).t();
            let from = from.min(qkv.data().len());
            let to = MatMut::strided(&mut qkv.data_mut()[from..], rows, linear.outputs(), 3 * inner);
            gemm(Mat::new(x.data(), rows, dim), weight, to, Epilogue::default());
        }
        let mut out = Tensor::scratch(x.shape().with_last(inner));
        let mut stats = Tensor::scratch([sizes.batch, sizes.tokens, sizes.heads, 2]);
        let [before, after] = [self.pre, self.post].map(|mix| transposed(p.get(mix), sizes.heads));
        let zeros = Tensor::zeros([sizes.heads]);
        let mixing = Mixing { before: before.data(), after: after.data(), after_bias: zeros.data() };
        let values = self.mask.values(p);
        core::forward_with(out.data_mut(), stats.data_mut(), qkv.data(), mixing, self.mask.factor(&values, 0), sizes);
        Ok((self.to_out.forward(p, &out)?, Saved { qkv, out, stats }))
    }

    /// `dx`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: Saved<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let Saved { qkv, out, stats } = saved;
        let (sizes, inner, dim, (rows, _)) = (self.sizes(x)?, self.settings.inner(), self.settings.dim, x.shape().rows_cols());
        let (h, d_out) = (sizes.heads, self.to_out.backward(p, g, &out, dy)?);
        drop(out);
        let mut d_qkv = Tensor::scratch(qkv.shape());
        let [before, after] = [self.pre, self.post].map(|mix| transposed(p.get(mix), h));
        let mut sums = Tensor::zeros([2 * h * h + 2 * h]);
        let (d_before, rest) = sums.data_mut().split_at_mut(h * h);
        let (d_after, rest) = rest.split_at_mut(h * h);
        let (d_bias, zeros) = rest.split_at_mut(h);
        let mixing = Mixing { before: before.data(), after: after.data(), after_bias: zeros };
        let grads = MixingMut { before: d_before, after: d_after, after_bias: d_bias };
        let values = self.mask.values(p);
        let mut d_values = Tensor::zeros([values.data().len()]);
        let factor = self.mask.factor(&values, 0).map(|factor| (factor, d_values.data_mut()));
        core::backward_with(d_qkv.data_mut(), grads, d_out.data(), qkv.data(), stats.data(), mixing, factor, sizes);
        drop((qkv, d_out, stats));
        self.mask.backward(p, g, d_values.data());
        for (mix, part) in [self.pre, self.post].into_iter().zip(sums.data().chunks_exact(h * h)) {
            g.get_mut(mix).iter_mut().zip(transposed(part, h).data()).for_each(|(total, &x)| *total += x);
        }
        let mut dx = Tensor::scratch(x.shape());
        for (linear, from) in self.projections() {
            let d = Mat::strided(&d_qkv.data()[from.min(d_qkv.data().len())..], rows, linear.outputs(), 3 * inner, 1);
            let accumulate = |accumulate: bool| Epilogue { accumulate, ..Epilogue::default() };
            let weight = Mat::new(p.get(linear.weight()), linear.outputs(), dim);
            gemm(d, weight, MatMut::new(dx.data_mut(), rows, dim), accumulate(from > 0));
            let dw = MatMut::new(g.get_mut(linear.weight()), linear.outputs(), dim);
            gemm(d.t(), Mat::new(x.data(), rows, dim), dw, accumulate(true));
        }
        Ok(dx)
    }
}

/// `attention.gaussian_mask_cait`.
pub struct GaussianMaskCait;

impl Operation for GaussianMaskCait {
    const NAME: &'static str = "attention.gaussian_mask_cait";
    const PAPER: &'static str = "2309.05375 GMM-CaiT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_heads(rng, &mut config);
        sample_mask(rng, &mut config);
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
        let (c, inner) = (settings.dim, settings.inner());
        let flops = 2 * b * n * 4 * c * inner + settings.sizes(b)?.flops();
        Ok(Some(Cost { flops, activation_bytes: 4 * b * n * (4 * inner + c + 2 * settings.heads) }))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        let side = size.side()?;
        let mut bench = Benchmark::new(size).set("heads", size.heads).set("dim_head", size.dim / size.heads);
        bench.sizes.remove("tokens");
        Some(bench.set("mask", "gmm").set("num_kernels", 5).set("grid", vec![side, side]))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (x, settings) = (run.input("x")?, Settings::from_config(run.config())?);
        check_tokens(&x, settings.mask.tokens()?)?;
        let [_, _, c] = x.dims("input `x`")?;
        if c != settings.dim {
            return Err(crate::error::Error::shape("input `x`", format!("[batch, tokens, {}]", settings.dim), x.shape()));
        }
        let (layer, layout) = Layout::build(|names| MaskedTalkingHeads::new(names, &settings))?;
        run.unary(&layout, |p, x| layer.forward(p, x), |p, g, saved, dy| layer.backward(p, g, &x, saved, dy))
    }
}
