//! `attention.class_xnorm`: CaiT's class attention made of the XNorm mechanism (X-ViT, arXiv 2205.13805).
//!
//! `q` from token 0 alone, `Z = Σ_n k_n v_nᵀ` over all tokens, the class token included; `y = proj(XN(q) XN(Z))`. Backward as in
//! [`attention.xnorm`](super::xnorm) with one query; `dx` of token 0 collects the ways through q, k and v.

use super::class::first_rows;
use super::xnorm::{Norms, Settings, Unit, sample_settings};
use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::Operand;
use crate::kernel::elementwise;
use crate::kernel::gram::{self, Tokens};
use crate::nn::{Init, Layout, Linear, Names, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// Class attention with parameters `q`, `k`, `v`, `proj`, `gamma`.
#[derive(Clone, Debug)]
pub struct ClassXNorm {
    qkv: [Linear; 3],
    proj: Linear,
    norms: Norms,
    dim: usize,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    first: Tensor<T>,
    q: Tensor<T>,
    k: Tensor<T>,
    v: Tensor<T>,
    out: Tensor<T>,
    norms: Tensor<T>,
    unit: Unit<T>,
}

/// What the forward pass for `batch` images of `tokens` tokens costs.
pub fn cost(settings: &Settings, batch: usize, tokens: usize) -> Cost {
    let (c, e, h) = (settings.dim, settings.attn_dim, settings.num_heads);
    let d = e / h.max(1);
    // k, v and KᵀV for all tokens; q, q Z and proj once.
    let flops = 2 * batch * (tokens * (2 * c * e + e * d) + 2 * c * e + e * d);
    // k and v; x_0, q, O, y, the norms, Ẑ and its norms.
    Cost { flops, activation_bytes: 4 * batch * (2 * tokens * e + 2 * c + 2 * e + h + e * d + e) }
}

impl ClassXNorm {
    /// Registers the parameters.
    pub fn new(mut names: Names, settings: Settings, init: fn(usize, usize) -> Init) -> Result<Self> {
        settings.check()?;
        let Settings { dim, attn_dim, qkv_bias, .. } = settings;
        let qkv = ["q", "k", "v"].map(|name| Linear::new(names.at(name), dim, attn_dim, qkv_bias, init(dim, attn_dim)));
        let proj = Linear::new(names.at("proj"), attn_dim, dim, true, init(attn_dim, dim));
        Ok(ClassXNorm { qkv, proj, norms: Norms::new(&mut names, &settings), dim })
    }

    fn sizes<T: Float>(&self, x: &Tensor<T>) -> Result<Tokens> {
        let [batch, tokens, c] = x.dims("input of an XNorm class attention")?;
        if c != self.dim || tokens == 0 {
            return Err(Error::shape("input of an XNorm class attention", format!("[batch, tokens ≥ 1, {}]", self.dim), x.shape()));
        }
        Ok(Tokens { batch, tokens, heads: self.norms.heads })
    }

    fn whole<'a, T: Float>(&self, x: &'a Tensor<T>) -> Operand<'a, T> {
        Operand { data: x.data(), stride: self.norms.heads * self.norms.width, offset: 0 }
    }

    /// The class token's row `[B, 1, C]`, of tokens `[B, N, C]` of which it is the first.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let sizes = self.sizes(x)?;
        let first = first_rows(x)?;
        let [to_q, to_k, to_v] = &self.qkv;
        let (q, k, v) = (to_q.forward(p, &first)?, to_k.forward(p, x)?, to_v.forward(p, x)?);
        let unit = self.norms.unit(self.whole(&k), self.whole(&v), sizes);
        let (out, norms) = self.norms.attend(p, self.whole(&q), &unit, [sizes.batch, 1]);
        let y = self.proj.forward(p, &out)?;
        Ok((y, Saved { first, q, k, v, out, norms, unit }))
    }

    /// `dx` of the gradient `dy` `[B, 1, C]`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: Saved<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let (sizes, e) = (self.sizes(x)?, self.norms.heads * self.norms.width);
        dy.expect_shape("gradient of an XNorm class attention", [sizes.batch, 1, self.dim])?;
        let Saved { first, q, k, v, out, mut norms, unit } = saved;
        let d_out = self.proj.backward(p, g, &out, dy)?;
        let dz = self.norms.unit_backward(p, g, &unit, self.whole(&q), &norms, &d_out, [sizes.batch, 1]);
        let (maps, gain) = self.norms.backward_maps(p, &unit);
        let mut dq = Tensor::scratch(q.shape());
        gram::par_rows_with([dq.data_mut(), norms.data_mut()], [e, self.norms.heads], 1, |image, first, rows, norms| {
            self.norms.queries_backward(&maps, &gain, [self.whole(&q), self.whole(&d_out)], (image, first), rows, e, norms);
        });
        self.norms.add_gain(p, g, &norms);
        let [to_k, to_v] = self.norms.kv_maps(&dz);
        let (mut dk, mut dv) = (Tensor::scratch(k.shape()), Tensor::scratch(v.shape()));
        gram::par_rows_with([dk.data_mut(), dv.data_mut()], [e; 2], sizes.tokens, |image, first, dk, dv| {
            to_k.apply(image, self.whole(&v), first, dk, e, 0, false);
            to_v.apply(image, self.whole(&k), first, dv, e, 0, false);
        });
        drop((k, v));
        let [of_q, of_k, of_v] = &self.qkv;
        let mut dx = of_k.backward(p, g, x, &dk)?;
        of_v.backward_params(g, x, &dv)?;
        of_v.add_backward_input(p, &mut dx, &dv)?;
        let d_first = of_q.backward(p, g, &first, &dq)?;
        let (n, c) = (sizes.tokens, self.dim);
        for (to, from) in dx.data_mut().chunks_exact_mut(n * c).zip(d_first.data().chunks_exact(c)) {
            elementwise::add(&mut to[..c], from);
        }
        Ok(dx)
    }
}

/// `attention.class_xnorm`.
pub struct ClassXNormAttention;

impl Operation for ClassXNormAttention {
    const NAME: &'static str = "attention.class_xnorm";
    const PAPER: &'static str = "2205.13805 X-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_settings(rng, &mut config);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, tokens) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 20));
        draw.normal("x", [batch, tokens, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        Ok(Some(cost(&Settings::from_config(config, "dim")?, b, n)))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        let all = Benchmark::new(size).set("attn_dim", size.dim).set("qkv_bias", true).set("kv_norm_axis", "key");
        Some(all.set("shared_gamma", true).set("eps", 1e-12))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config(), "dim")?;
        let (layer, layout) = Layout::build(|names| ClassXNorm::new(names.here(), settings, crate::nn::normal_02))?;
        let x = run.input("x")?;
        run.unary(&layout, |p, x| layer.forward(p, x), |p, g, saved, dy| layer.backward(p, g, &x, saved, dy))
    }
}
