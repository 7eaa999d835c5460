//! `attention.xca`: cross-covariance attention (XCiT, arXiv 2106.09681): softmax attention between the channels of a head.
//!
//! `[Q K V] = x W_qkvᵀ + b`. Per head, with the norms over the tokens `m_i = max(‖q_:,i‖, ε)` (k likewise),
//! `G = diag(1/m^q) QᵀK diag(1/m^k)`, `A = softmax_j(τ G)`, `O = V Aᵀ`; `y = O W_projᵀ + b`. G is `d × d`: time and memory are linear
//! in N.
//!
//! Backward: `dA = dOᵀV`, `dV = dO A`, `dL = A ⊙ (dA − rowsum(dA ⊙ A))`, `dτ = Σ dL ⊙ G`, `dG = τ dL`, and with
//! `M = diag(1/m^q) dG diag(1/m^k)`, `r^q_i = Σ_j dG_ij G_ij / m_i²`, `r^k_j = Σ_i dG_ij G_ij / m_j²` (0 where the norm is below ε):
//! `dQ = K Mᵀ − Q diag(r^q)`, `dK = Q M − K diag(r^k)`. No normalised copy of q or k exists.
//!
//! Many tokens take another way to the same numbers, `covariance.rs`: through `xᵀx` instead of q, k and v.

mod covariance;

use rayon::prelude::*;

use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::Operand;
use crate::kernel::gram::{self, Maps, Tokens};
use crate::kernel::{elementwise, get, put};
use crate::nn::{Init, Layout, Linear, Names, Param, Params};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// ε: norms below count as this.
const EPS: f64 = 1e-12;

/// What the layer is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width C.
    pub dim: usize,
    /// Heads h, a divisor of C.
    pub num_heads: usize,
    /// `qkv` has a bias.
    pub qkv_bias: bool,
}

impl Settings {
    /// From the keys `num_heads` and `qkv_bias`, and that of the width.
    pub fn from_config(config: &Config, dim: &str) -> Result<Self> {
        Ok(Settings { dim: config.usize(dim)?, num_heads: config.usize("num_heads")?, qkv_bias: config.bool_or("qkv_bias", false)? })
    }

    /// What the forward pass for `batch` images of `tokens` tokens costs.
    pub fn cost(&self, batch: usize, tokens: usize) -> Cost {
        let (c, d) = (self.dim, self.dim / self.num_heads.max(1));
        // G, A and the norms.
        let shared = 2 * c * d + 2 * c;
        if covariance::pays(tokens, c) {
            let kept = tokens * c + shared + covariance::kept(c);
            return Cost { flops: 2 * batch * covariance::forward_products(tokens, c, d), activation_bytes: 4 * batch * kept };
        }
        // qkv and proj: 4 C² per token; QᵀK and V Aᵀ: 2 C d.
        let flops = 2 * batch * tokens * (4 * c * c + 2 * c * d);
        // qkv, O, y.
        Cost { flops, activation_bytes: 4 * batch * (5 * tokens * c + shared) }
    }
}

/// Cross-covariance attention with parameters `temperature`, `qkv`, `proj`.
#[derive(Clone, Debug)]
pub struct Xca {
    temperature: Param,
    qkv: Linear,
    proj: Linear,
    heads: usize,
    dim: usize,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    mixing: Mixing<T>,
    way: Way<T>,
}

/// How the numbers came about.
enum Way<T: Float> {
    /// Through q, k and v.
    Plain {
        /// `[B, N, 3C]`.
        qkv: Tensor<T>,
        out: Tensor<T>,
    },
    /// Through `xᵀx`.
    Covariance(covariance::Products<T>, covariance::Outer<T>),
}

/// How the channels of every image are mixed.
struct Mixing<T: Float> {
    /// Norms over the tokens of all channels of q, then of k, not clamped: `[B, 2C]`.
    norms: Tensor<T>,
    /// G, `[B, h, d, d]`.
    cosines: Tensor<T>,
    /// A, `[B, h, d, d]`.
    weights: Tensor<T>,
}

impl Xca {
    /// Registers the parameters.
    pub fn new(mut names: Names, settings: Settings, init: fn(usize, usize) -> Init) -> Result<Self> {
        let Settings { dim, num_heads, qkv_bias } = settings;
        if num_heads == 0 || dim == 0 || !dim.is_multiple_of(num_heads) {
            return Err(Error::config("num_heads", format!("expected a divisor of the width {dim}, found {num_heads}")));
        }
        let temperature = names.param("temperature", [num_heads, 1, 1], Init::ONES);
        let qkv = Linear::new(names.at("qkv"), dim, 3 * dim, qkv_bias, init(dim, 3 * dim));
        let proj = Linear::new(names.at("proj"), dim, dim, true, init(dim, dim));
        Ok(Xca { temperature, qkv, proj, heads: num_heads, dim })
    }

    fn sizes<T: Float>(&self, x: &Tensor<T>) -> Result<Tokens> {
        let [batch, tokens, c] = x.dims("input of a cross-covariance attention")?;
        if c != self.dim || tokens == 0 {
            let expected = format!("[batch, tokens ≥ 1, {}]", self.dim);
            return Err(Error::shape("input of a cross-covariance attention", expected, x.shape()));
        }
        Ok(Tokens { batch, tokens, heads: self.heads })
    }

    /// Part 0 (q), 1 (k) or 2 (v).
    fn part<'a, T: Float>(&self, qkv: &'a Tensor<T>, part: usize) -> Operand<'a, T> {
        Operand { data: qkv.data(), stride: 3 * self.dim, offset: part * self.dim }
    }

    fn weights<'a, T: Float>(&self, p: &'a Params<T>) -> covariance::Weights<'a, T> {
        let bias = |layer: &Linear| layer.bias().map(|bias| p.get(bias));
        covariance::Weights {
            qkv: p.get(self.qkv.weight()),
            qkv_bias: bias(&self.qkv),
            proj: p.get(self.proj.weight()),
            proj_bias: bias(&self.proj),
        }
    }

    fn head_sizes(&self) -> covariance::Heads {
        covariance::Heads { count: self.heads, width: self.dim / self.heads }
    }

    /// `proj(attention(x))`, plus `residual`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, residual: Option<&Tensor<T>>) -> Result<(Tensor<T>, Saved<T>)> {
        let (sizes, c, h) = (self.sizes(x)?, self.dim, self.heads);
        residual.map_or(Ok(()), |residual| residual.expect_shape("residual", x.shape()))?;
        let d = c / h;
        let (mut cosines, mut norms) = (Tensor::scratch([sizes.batch, h, d, d]), Tensor::scratch([sizes.batch, 2 * c]));
        if covariance::pays(sizes.tokens, c) {
            let (weights, heads) = (self.weights(p), self.head_sizes());
            if let Some(products) = covariance::forward(&mut cosines, &mut norms, x, weights, heads, sizes.tokens) {
                let mixing = self.mixing(p, cosines, norms);
                let (y, outer) = covariance::mix(x, &mixing.weights, weights, heads, residual);
                return Ok((y, Saved { mixing, way: Way::Covariance(products, outer) }));
            }
        }
        let qkv = self.qkv.forward(p, x)?;
        let [q, k, v] = [0, 1, 2].map(|part| self.part(&qkv, part));
        gram::products(cosines.data_mut(), Some(norms.data_mut()), q, k, None, [d, d], sizes);
        let mixing = self.mixing(p, cosines, norms);
        let maps = Maps::new(mixing.weights.data(), h, [d, d], true);
        let mut out = Tensor::scratch(x.shape());
        gram::par_rows(out.data_mut(), c, sizes.tokens, |image, first, rows| maps.apply(image, v, first, rows, c, 0, false));
        let y = self.proj.forward_onto(p, &out, residual)?;
        Ok((y, Saved { mixing, way: Way::Plain { qkv, out } }))
    }

    /// From QᵀK and the squared norms.
    fn mixing<T: Float>(&self, p: &Params<T>, mut cosines: Tensor<T>, mut norms: Tensor<T>) -> Mixing<T> {
        let (c, h) = (self.dim, self.heads);
        let d = c / h;
        let mut weights = Tensor::scratch(cosines.shape());
        norms.data_mut().iter_mut().for_each(|m| *m = m.root());
        let tau = p.get(self.temperature);
        (weights.data_mut().par_chunks_mut(d * d)).zip(cosines.data_mut().par_chunks_mut(d * d)).enumerate().for_each(|(i, (a, g))| {
            let (image, head) = (i / h, i % h);
            let (q, k) = norms.data()[2 * c * image..2 * c * (image + 1)].split_at(c);
            T::dispatch(Attend { g, a, norms: [&q[head * d..(head + 1) * d], &k[head * d..(head + 1) * d]], tau: tau[head] });
        });
        Mixing { norms, cosines, weights }
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
        let (sizes, c, h) = (self.sizes(x)?, self.dim, self.heads);
        let d = c / h;
        let Saved { mixing, way } = saved;
        let (qkv, out) = match way {
            Way::Plain { qkv, out } => (qkv, out),
            Way::Covariance(products, outer) => return self.covariance_backward(p, g, x, (mixing, products, outer), dy),
        };
        let d_out = self.proj.backward(p, g, &out, dy)?;
        drop(out);
        let [q, k, v] = [0, 1, 2].map(|part| self.part(&qkv, part));
        let d_rows = Operand { data: d_out.data(), stride: c, offset: 0 };
        // O = V Aᵀ: dA = dOᵀ V, dV = dO A
        let mut d_weights = Tensor::scratch(mixing.weights.shape());
        gram::products(d_weights.data_mut(), None, d_rows, v, None, [d, d], sizes);
        let (m, shrink) = self.mixing_backward(p, g, &mixing, d_weights);
        let [to_v, to_k, to_q] = [(&mixing.weights, false), (&m, false), (&m, true)].map(|(m, t)| Maps::new(m.data(), h, [d, d], t));
        let mut d_qkv = Tensor::scratch(qkv.shape());
        gram::par_rows(d_qkv.data_mut(), 3 * c, sizes.tokens, |image, first, rows| {
            // dQ = K Mᵀ − Q diag(r^q), dK = Q M − K diag(r^k)
            let x = &qkv.data()[first * 3 * c..][..rows.len()];
            T::dispatch(Shrink { out: rows, x, stride: 3 * c, r: &shrink.data()[2 * c * image..2 * c * (image + 1)] });
            to_q.apply(image, k, first, rows, 3 * c, 0, true);
            to_k.apply(image, q, first, rows, 3 * c, c, true);
            to_v.apply(image, d_rows, first, rows, 3 * c, 2 * c, false);
        });
        drop((qkv, d_out));
        self.qkv.backward(p, g, x, &d_qkv)
    }

    fn covariance_backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        (mixing, products, outer): (Mixing<T>, covariance::Products<T>, covariance::Outer<T>),
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        dy.expect_shape("gradient of a cross-covariance attention", x.shape())?;
        let (weights, heads) = (self.weights(p), self.head_sizes());
        let add = |g: &mut Params<T>, layer: &Linear, [weight, bias]: [Tensor<T>; 2]| {
            elementwise::add(g.get_mut(layer.weight()), weight.data());
            layer.bias().into_iter().for_each(|param| elementwise::add(g.get_mut(param), bias.data()));
        };
        let zeros = |layer: &Linear| [Tensor::zeros(layer.weight().shape()), Tensor::zeros([layer.outputs()])];
        let [mut weight, mut bias] = zeros(&self.proj);
        let to = covariance::Gradients { weight: weight.data_mut(), bias: bias.data_mut() };
        let (d_weights, pulled) = covariance::mix_backward(to, x, dy, &outer, weights, heads);
        add(g, &self.proj, [weight, bias]);
        let (m, shrink) = self.mixing_backward(p, g, &mixing, d_weights);
        let given = covariance::Given { x, dy, products, outer, pulled, mixing: &mixing.weights, m: &m, shrink: &shrink };
        let [mut weight, mut bias] = zeros(&self.qkv);
        let to = covariance::Gradients { weight: weight.data_mut(), bias: bias.data_mut() };
        let dx = covariance::backward(to, given, weights, heads);
        add(g, &self.qkv, [weight, bias]);
        Ok(dx)
    }

    /// dA → M `[B, h, d, d]` and r `[B, 2C]`; adds dτ.
    fn mixing_backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, mixing: &Mixing<T>, mut d: Tensor<T>) -> (Tensor<T>, Tensor<T>) {
        let (c, h) = (self.dim, self.heads);
        let width = c / h;
        let Mixing { norms, cosines, weights } = mixing;
        let tau = p.get(self.temperature);
        // Of every image and head: r^q, r^k, dτ.
        let mut parts = Tensor::scratch([norms.shape()[0] * h, 2 * width + 1]);
        let at = |i: usize| i * width * width..(i + 1) * width * width;
        (d.data_mut().par_chunks_mut(width * width)).zip(parts.data_mut().par_chunks_mut(2 * width + 1)).enumerate().for_each(
            |(i, (d, part))| {
                let (image, head) = (i / h, i % h);
                let (q, k) = norms.data()[2 * c * image..2 * c * (image + 1)].split_at(c);
                let norms = [&q[head * width..(head + 1) * width], &k[head * width..(head + 1) * width]];
                let (shrink, d_tau) = part.split_at_mut(2 * width);
                d_tau[0] =
                    T::dispatch(AttendBackward { d, g: &cosines.data()[at(i)], a: &weights.data()[at(i)], norms, tau: tau[head], shrink });
            },
        );
        let mut shrink = Tensor::scratch(norms.shape());
        let d_tau = g.get_mut(self.temperature);
        for (i, part) in parts.data().chunks_exact(2 * width + 1).enumerate() {
            let (image, head) = (i / h, i % h);
            for side in 0..2 {
                let to = (2 * image + side) * c + head * width;
                shrink.data_mut()[to..to + width].copy_from_slice(&part[side * width..(side + 1) * width]);
            }
            d_tau[head] += part[2 * width];
        }
        (d, shrink)
    }
}

/// `QᵀK` → G, and A.
struct Attend<'a, T> {
    g: &'a mut [T],
    a: &'a mut [T],
    norms: [&'a [T]; 2],
    tau: T,
}

impl<T: Float> Kernel<T> for Attend<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let [q, k] = self.norms;
        let (d, eps, tau) = (q.len(), V::splat(T::from_f64(EPS)), V::splat(self.tau));
        for ((g, a), &norm) in self.g.chunks_exact_mut(d).zip(self.a.chunks_exact_mut(d)).zip(q) {
            let norm = V::splat(norm).max(eps);
            let mut max = V::splat(T::NEG_INFINITY);
            let mut j = 0;
            while j < d {
                let cosine = get::<T, V>(g, j, T::ZERO) / norm / get::<T, V>(k, j, T::ONE).max(eps);
                put(cosine, g, j);
                put(cosine * tau, a, j);
                max = get::<T, V>(a, j, T::NEG_INFINITY).max(max);
                j += LANES;
            }
            let (max, mut sum) = (V::splat(max.largest()), V::splat(T::ZERO));
            j = 0;
            while j < d {
                let e = (get::<T, V>(a, j, T::NEG_INFINITY) - max).exp();
                sum = sum + e;
                put(e, a, j);
                j += LANES;
            }
            let sum = V::splat(sum.sum());
            j = 0;
            while j < d {
                put(get::<T, V>(a, j, T::ZERO) / sum, a, j);
                j += LANES;
            }
        }
    }
}

/// dA → M, with r^q and r^k one after the other in `shrink`; returns dτ.
struct AttendBackward<'a, T> {
    d: &'a mut [T],
    g: &'a [T],
    a: &'a [T],
    norms: [&'a [T]; 2],
    tau: T,
    shrink: &'a mut [T],
}

impl<T: Float> Kernel<T> for AttendBackward<'_, T> {
    type Output = T;
    #[inline(always)]
    fn run<V: Vector<T>>(self) -> T {
        let ([q, k], eps, zero) = (self.norms, T::from_f64(EPS), V::splat(T::ZERO));
        let (n, lowest) = (q.len(), V::splat(eps));
        let (q_shrink, k_shrink) = self.shrink.split_at_mut(n);
        k_shrink.fill(T::ZERO);
        let mut d_tau = zero;
        for (i, d) in self.d.chunks_exact_mut(n).enumerate() {
            let (g, a) = (&self.g[i * n..(i + 1) * n], &self.a[i * n..(i + 1) * n]);
            // dL = A ⊙ (dA − rowsum(dA ⊙ A)), dτ = Σ dL ⊙ G, dG = τ dL
            let center = V::splat(crate::kernel::reduce::dot_lanes::<T, V>(d, a).sum());
            let norm = V::splat(q[i].larger(eps));
            let mut row = zero;
            let mut j = 0;
            while j < n {
                let dl = get::<T, V>(a, j, T::ZERO) * (get::<T, V>(d, j, T::ZERO) - center);
                let dlg = dl * get(g, j, T::ZERO);
                row = row + dlg;
                put(get::<T, V>(k_shrink, j, T::ZERO) + dlg, k_shrink, j);
                let dg = dl * V::splat(self.tau);
                put(dg / norm / get::<T, V>(k, j, T::ONE).max(lowest), d, j);
                j += LANES;
            }
            d_tau = d_tau + row;
            // r^q_i = Σ_j dG_ij G_ij / m_i²
            q_shrink[i] = if q[i] < eps { T::ZERO } else { self.tau * row.sum() / q[i] / q[i] };
        }
        for (r, &norm) in k_shrink.iter_mut().zip(k) {
            *r = if norm < eps { T::ZERO } else { self.tau * *r / norm / norm };
        }
        d_tau.sum()
    }
}

/// `out ← −x ⊙ r` in the first columns of every row, as many as `r` has.
struct Shrink<'a, T> {
    out: &'a mut [T],
    x: &'a [T],
    stride: usize,
    r: &'a [T],
}

impl<T: Float> Kernel<T> for Shrink<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.r.len();
        for (out, x) in self.out.chunks_exact_mut(self.stride).zip(self.x.chunks_exact(self.stride)) {
            let (out, x) = (&mut out[..width], &x[..width]);
            let mut j = 0;
            while j < width {
                put(-(get::<T, V>(x, j, T::ZERO) * get(self.r, j, T::ZERO)), out, j);
                j += LANES;
            }
        }
    }
}

/// `attention.xca`.
pub struct CrossCovariance;

impl Operation for CrossCovariance {
    const NAME: &'static str = "attention.xca";
    const PAPER: &'static str = "2106.09681 XCiT";

    fn sample(rng: &mut Rng) -> Config {
        let (heads, width) = (rng.between(1, 4), rng.between(1, 7));
        let mut config = Config::default();
        config.set("dim", heads * width).set("num_heads", heads).set("qkv_bias", rng.chance(0.7));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        // From 64 tokens on through their covariance.
        let most = if draw.rng.chance(0.4) { 150 } else { 20 };
        let (batch, tokens) = (draw.size("batch", 1, 3), draw.size("tokens", 1, most));
        draw.normal("x", [batch, tokens, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        Ok(Some(Settings::from_config(config, "dim")?.cost(b, n)))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        Some(Benchmark::new(size).set("qkv_bias", true))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config(), "dim")?;
        let (layer, layout) = Layout::build(|names| Xca::new(names.here(), settings, crate::nn::normal_02))?;
        let x = run.input("x")?;
        run.unary(&layout, |p, x| layer.forward(p, x, None), |p, g, saved, dy| layer.backward(p, g, &x, saved, dy))
    }
}
