//! One set of weights as attention, as a convolution, or as a choice between them (SPViT, arXiv 2111.11802); the operations
//! `attention.single_path` and `attention.single_path_window` are in [`single_path_ops`](super::single_path_ops).
//!
//! "msa": attention with `qk` (q, k) beside `v`. "conv1x1", "conv3x3": the bottleneck that [`spvit_fold`](crate::nn::spvit_fold) makes of
//! `v` and `proj`, `y = conv₁(ReLU(BN(conv_k(t))))`; a class token passes unchanged. "skip": the input. "search": binary gates k decide,
//! `y = k₂ MSA + k₁(1 − k₂) CONV3 + k₀(1 − k₁)(1 − k₂) CONV1`.
//!
//! Backward: each branch receives dy times its factor, and `∂k₂ = ⟨dy, MSA − k₁ CONV3 − k₀(1 − k₁) CONV1⟩`,
//! `∂k₁ = (1 − k₂)⟨dy, CONV3 − k₀ CONV1⟩`, `∂k₀ = (1 − k₁)(1 − k₂)⟨dy, CONV1⟩`. A branch behind a closed gate is not run backward.

use super::window::RelativeBias;
use crate::case::Cost;
use crate::error::{Error, Result};
use crate::kernel::attention::{self as core, Groups, Mask, Operand, Sizes, TermGradients, Terms};
use crate::kernel::{elementwise, reduce};
use crate::linalg::ColumnsMut;
use crate::nn::batch_norm::{self, BatchNorm2d, Updates};
use crate::nn::conv_norm::{self, Then};
use crate::nn::spvit_fold::{Bottleneck, Fold, Folded, KernelLayout};
use crate::nn::spvit_gate::{GateKind, Gates, START};
use crate::nn::{Init, Linear, Names, Param, Params, normal_02};
use crate::tensor::{Float, Tensor};

/// What a layer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Gates decide.
    Search,
    /// Nothing.
    Skip,
    /// A bottleneck of this kernel size.
    Conv(usize),
    /// Attention.
    Msa,
}

impl Mode {
    /// From its name.
    pub fn named(name: &str) -> Option<Mode> {
        Some(match name {
            "search" => Mode::Search,
            "skip" => Mode::Skip,
            "conv1x1" => Mode::Conv(1),
            "conv3x3" => Mode::Conv(3),
            "msa" => Mode::Msa,
            _ => return None,
        })
    }

    /// From published indicators: (0,0,0) skip, (1,0,0) 1×1, (1,1,0) 3×3, (1,1,1) attention.
    pub fn indicated(indicators: [usize; 3]) -> Option<Mode> {
        Some(match indicators {
            [0, 0, 0] => Mode::Skip,
            [1, 0, 0] => Mode::Conv(1),
            [1, 1, 0] => Mode::Conv(3),
            [1, 1, 1] => Mode::Msa,
            _ => return None,
        })
    }

    /// The kernels of its convolutions.
    fn kernels(self) -> &'static [usize] {
        match self {
            Mode::Search => &[1, 3],
            Mode::Conv(1) => &[1],
            Mode::Conv(_) => &[3],
            Mode::Skip | Mode::Msa => &[],
        }
    }

    fn attends(self) -> bool {
        matches!(self, Mode::Search | Mode::Msa)
    }
}

/// What a layer is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width C.
    pub dim: usize,
    /// Heads h.
    pub heads: usize,
    /// What it does.
    pub mode: Mode,
    /// Temperature of the mixture of heads.
    pub alpha: f64,
    /// `qk` and `v` have biases.
    pub qkv_bias: bool,
    /// Token 0 is a class token, which convolutions leave alone.
    pub class: bool,
    /// Side of the windows, for a relative position bias; the layer is Swin's.
    pub window: Option<usize>,
    /// Convolutions have their own weights, `bconv.*`.
    pub own_conv: bool,
}

/// Where the tokens of a call stand.
#[derive(Clone, Copy)]
pub struct Place<'a, T> {
    /// Images and tokens per image, as attention sees them.
    pub attend: [usize; 2],
    /// Who attends to whom.
    pub groups: &'a Groups,
    /// Additive logits.
    pub mask: Option<Mask<'a, T>>,
    /// Images, rows and columns, as convolutions see them.
    pub map: [usize; 3],
}

#[derive(Clone, Debug)]
struct Msa {
    qk: Linear,
    v: Linear,
    proj: Linear,
    table: Option<RelativeBias>,
    heads: usize,
    dim: usize,
}

struct MsaSaved<T: Float> {
    qk: Tensor<T>,
    v: Tensor<T>,
    out: Tensor<T>,
    stats: Tensor<T>,
}

impl Msa {
    fn sizes(&self, [batch, n]: [usize; 2]) -> Sizes {
        let d = self.dim / self.heads;
        Sizes { batch, heads: self.heads, dim: d, value_dim: d, queries: n, keys: n, scale: 1.0 / (d as f64).sqrt() }
    }

    fn operands<'a, T: Float>(&self, qk: &'a Tensor<T>, v: &'a Tensor<T>) -> [Operand<'a, T>; 3] {
        let part = |offset: usize| Operand { data: qk.data(), stride: 2 * self.dim, offset };
        [part(0), part(self.dim), Operand { data: v.data(), stride: self.dim, offset: 0 }]
    }

    fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, place: &Place<T>) -> Result<(Tensor<T>, MsaSaved<T>)> {
        let (qk, v) = (self.qk.forward(p, x)?, self.v.forward(p, x)?);
        let (mut out, mut stats) = (Tensor::scratch(x.shape()), Tensor::scratch([place.attend[0], self.heads, place.attend[1], 2]));
        let logits = self.table.as_ref().map(|table| table.logits(p));
        let bias = self.table.as_ref().zip(logits.as_ref()).map(|(table, logits)| table.view(logits));
        let terms = Terms { bias, mask: place.mask, factor: None };
        let operands = self.operands(&qk, &v);
        core::forward_with(out.data_mut(), stats.data_mut(), operands, terms, place.groups, self.sizes(place.attend));
        Ok((self.proj.forward(p, &out)?, MsaSaved { qk, v, out, stats }))
    }

    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: MsaSaved<T>,
        place: &Place<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let MsaSaved { qk, v, out, stats } = saved;
        let d_out = self.proj.backward(p, g, &out, dy)?;
        let (mut d_qk, mut d_v) = (Tensor::zeros(qk.shape()), Tensor::zeros(v.shape()));
        let (dq, dk) = ColumnsMut::new(d_qk.data_mut(), 2 * self.dim).split_at(self.dim);
        let dv = ColumnsMut::new(d_v.data_mut(), self.dim);
        let logits = self.table.as_ref().map(|table| table.logits(p));
        let mut d_logits = Tensor::zeros(logits.as_ref().map_or([0].into(), |logits| logits.shape()));
        let bias = self.table.as_ref().zip(logits.as_ref()).map(|(table, logits)| table.view(logits));
        let term_grads = TermGradients { bias: bias.is_some().then(|| d_logits.data_mut()), factor: None };
        let (operands, results) = (self.operands(&qk, &v), [d_out.data(), out.data(), stats.data()]);
        let terms = Terms { bias, mask: place.mask, factor: None };
        core::backward_with([dq, dk, dv], term_grads, results, operands, terms, place.groups, self.sizes(place.attend));
        if let Some(table) = &self.table {
            table.backward(g, d_logits.data());
        }
        drop((qk, v, out, d_out));
        let mut dx = self.qk.backward(p, g, x, &d_qk)?;
        self.v.backward_params(g, x, &d_v)?;
        self.v.add_backward_input(p, &mut dx, &d_v)?;
        Ok(dx)
    }
}

#[derive(Clone, Debug)]
enum Weights {
    Folded(Box<Fold>),
    Own(Box<Bottleneck>),
}

#[derive(Clone, Debug)]
struct ConvBranch {
    weights: Weights,
    norm: BatchNorm2d,
}

struct ConvSaved<T: Float> {
    folded: Option<Folded<T>>,
    /// Before the norm.
    middle: Tensor<T>,
    norm: batch_norm::Saved<T>,
}

impl ConvBranch {
    fn bottleneck(&self) -> &Bottleneck {
        match &self.weights {
            Weights::Folded(fold) => fold.bottleneck(),
            Weights::Own(bottleneck) => bottleneck,
        }
    }

    fn forward<T: Float>(&self, p: &Params<T>, t: &Tensor<T>, training: bool) -> Result<(Tensor<T>, ConvSaved<T>)> {
        let folded = match &self.weights {
            Weights::Folded(fold) => Some(fold.forward(p)),
            Weights::Own(_) => None,
        };
        let (bottleneck, weights) = (self.bottleneck(), folded.as_ref().map_or(p, |folded| &folded.params));
        let (active, (middle, norm)) = conv_norm::forward((&bottleneck.conv, weights), (&self.norm, p), t, training, Then::Relu)?;
        Ok((bottleneck.out.forward(weights, &active)?, ConvSaved { folded, middle, norm }))
    }

    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        t: &Tensor<T>,
        saved: ConvSaved<T>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let ConvSaved { folded, middle, norm } = saved;
        let bottleneck = self.bottleneck();
        let active = self.norm.again(p, &middle, &norm, true);
        let Weights::Folded(fold) = &self.weights else {
            let mut d = bottleneck.out.backward(p, g, &active, dy)?;
            elementwise::relu_backward(d.data_mut(), active.data(), T::ONE);
            let d = self.norm.backward(p, g, &middle, &norm, &d)?;
            return bottleneck.conv.backward(p, g, t, &d);
        };
        let folded = folded.ok_or_else(|| Error::missing("folded weights"))?.params;
        let mut d_folded = fold.zero_grads();
        let mut d = bottleneck.out.backward(&folded, &mut d_folded, &active, dy)?;
        elementwise::relu_backward(d.data_mut(), active.data(), T::ONE);
        let d = self.norm.backward(p, g, &middle, &norm, &d)?;
        let dt = bottleneck.conv.backward(&folded, &mut d_folded, t, &d)?;
        fold.backward(p, g, &d_folded);
        Ok(dt)
    }
}

/// The layer.
#[derive(Clone, Debug)]
pub struct SinglePath {
    msa: Option<Msa>,
    convs: Vec<ConvBranch>,
    thresholds: Option<Param>,
    settings: Settings,
}

/// What the backward pass needs beside the input.
pub struct Saved<T: Float> {
    msa: Option<MsaSaved<T>>,
    convs: Vec<ConvSaved<T>>,
    /// In a search: the gates, and the outputs of the convolutions and of the attention.
    search: Option<(Gates, [T; 3], [Tensor<T>; 3])>,
    updates: Updates<T>,
}

impl<T: Float> Saved<T> {
    /// The gates of a search.
    pub fn gates(&self) -> Option<&Gates> {
        self.search.as_ref().map(|(gates, ..)| gates)
    }

    /// Takes the running statistics after the call.
    pub fn take_updates(&mut self) -> Updates<T> {
        std::mem::take(&mut self.updates)
    }
}

impl SinglePath {
    /// Registers the parameters that the mode needs.
    pub fn new(names: &mut Names, settings: Settings) -> Result<Self> {
        let Settings { dim, heads, mode, alpha, qkv_bias, window, own_conv, .. } = settings;
        if dim == 0 || heads == 0 || !dim.is_multiple_of(heads) {
            return Err(Error::config("num_heads", format!("expected a divisor of the width {dim}, found {heads}")));
        }
        let mut layer = SinglePath { msa: None, convs: Vec::new(), thresholds: None, settings };
        let width = dim / heads;
        if mode == Mode::Search {
            let name = if window.is_some() { "kernel_thresholds_full" } else { "kernel_thresholds" };
            layer.thresholds = Some(names.param(name, [3], Init::Constant(START)));
        }
        let own_conv = own_conv && !mode.attends();
        if mode == Mode::Skip {
            return Ok(layer);
        }
        if own_conv {
            for &kernel in mode.kernels() {
                let bottleneck = Bottleneck::new(&mut names.at("bconv"), dim, width, kernel)?;
                let norm = BatchNorm2d::new(names.at("bconv.1"), width, 1e-5, 0.1);
                layer.convs.push(ConvBranch { weights: Weights::Own(Box::new(bottleneck)), norm });
            }
            return Ok(layer);
        }
        let qk = mode.attends().then(|| Linear::new(names.at("qk"), dim, 2 * dim, qkv_bias, normal_02(dim, dim)));
        let v = Linear::new(names.at("v"), dim, dim, qkv_bias, normal_02(dim, dim));
        let proj = Linear::new(names.at("proj"), dim, dim, true, normal_02(dim, dim));
        if !mode.kernels().is_empty() {
            let head_probs = names.param("head_probs", [heads, 9], Init::ONES);
            let layout = if window.is_some() { KernelLayout::Swin } else { KernelLayout::Deit };
            for &kernel in mode.kernels() {
                let norm = BatchNorm2d::new(names.at(format!("bn_{kernel}x{kernel}")), width, 1e-5, 0.1);
                let fold = Fold::new(&v, &proj, head_probs, heads, kernel, layout, alpha)?;
                layer.convs.push(ConvBranch { weights: Weights::Folded(Box::new(fold)), norm });
            }
        }
        if let Some(qk) = qk {
            let table = window.map(|side| RelativeBias::new(names, [side; 2], heads));
            layer.msa = Some(Msa { qk, v, proj, table, heads, dim });
        }
        Ok(layer)
    }

    /// The patch tokens as a map `[B, H, W, C]`.
    fn as_map<T: Float>(&self, x: &Tensor<T>, [b, h, w]: [usize; 3]) -> Result<Tensor<T>> {
        let c = self.settings.dim;
        if !self.settings.class {
            return x.reshape([b, h, w, c]);
        }
        let mut map = Tensor::scratch([b, h, w, c]);
        for (to, from) in map.data_mut().chunks_exact_mut(h * w * c).zip(x.data().chunks_exact((h * w + 1) * c)) {
            to.copy_from_slice(&from[c..]);
        }
        Ok(map)
    }

    /// The adjoint of [`as_map`](Self::as_map), with the class tokens of `x`, in the shape of `x`.
    fn as_tokens<T: Float>(&self, map: &Tensor<T>, x: &Tensor<T>) -> Result<Tensor<T>> {
        let c = self.settings.dim;
        if !self.settings.class {
            return map.reshape(x.shape());
        }
        let [_, h, w, _] = map.dims("map")?;
        let mut y = Tensor::scratch(x.shape());
        let images = x.data().chunks_exact((h * w + 1) * c).zip(map.data().chunks_exact(h * w * c));
        for (to, (class, patches)) in y.data_mut().chunks_exact_mut((h * w + 1) * c).zip(images) {
            to[..c].copy_from_slice(&class[..c]);
            to[c..].copy_from_slice(patches);
        }
        Ok(y)
    }

    /// The output; `u` is the noise of a search in training.
    pub fn forward<T: Float>(
        &self,
        p: &Params<T>,
        x: &Tensor<T>,
        place: &Place<T>,
        training: bool,
        u: Option<&[T]>,
    ) -> Result<(Tensor<T>, Saved<T>)> {
        let mut saved = Saved { msa: None, convs: Vec::new(), search: None, updates: Vec::new() };
        let mut outputs = Vec::with_capacity(3);
        if !self.convs.is_empty() {
            let t = self.as_map(x, place.map)?;
            for conv in &self.convs {
                let (y, mut own) = conv.forward(p, &t, training)?;
                saved.updates.extend(own.norm.take_updates());
                saved.convs.push(own);
                outputs.push(self.as_tokens(&y, x)?);
            }
        }
        if let Some(msa) = &self.msa {
            let [b, n] = place.attend;
            let (y, own) = msa.forward(p, &x.reshape([b, n, self.settings.dim])?, place)?;
            saved.msa = Some(own);
            outputs.push(y.reshape(x.shape())?);
        }
        let Some(thresholds) = self.thresholds else {
            return Ok((outputs.pop().unwrap_or_else(|| x.clone()), saved));
        };
        let outputs = <[Tensor<T>; 3]>::try_from(outputs).map_err(|_| Error::missing("a branch of a search"))?;
        let gates = Gates::new(GateKind::Kernel, p.get(thresholds), u);
        let k = gates.gates::<T>();
        let [k0, k1, k2] = [k.data()[0], k.data()[1], k.data()[2]];
        let factors = [k0 * (T::ONE - k1) * (T::ONE - k2), k1 * (T::ONE - k2), k2];
        let mut out = Tensor::zeros(x.shape());
        for (&factor, y) in factors.iter().zip(&outputs).filter(|(factor, _)| **factor != T::ZERO) {
            elementwise::add_scaled(out.data_mut(), y.data(), factor);
        }
        saved.search = Some((gates, factors, outputs));
        Ok((out, saved))
    }

    /// `dx`; `d_expected` is the gradient of the expected gates of a search.
    #[allow(clippy::too_many_arguments)]
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: Saved<T>,
        place: &Place<T>,
        dy: &Tensor<T>,
        d_expected: Option<&[T]>,
    ) -> Result<Tensor<T>> {
        let Saved { msa, convs, search, .. } = saved;
        let mut factors = [T::ONE; 3];
        if let (Some((gates, own, outputs)), Some(thresholds)) = (search, self.thresholds) {
            factors = own;
            let k = gates.gates::<f64>();
            let [k0, k1, k2] = [k.data()[0], k.data()[1], k.data()[2]];
            let [conv1, conv3, attention] = [0, 1, 2].map(|i| reduce::dot(dy.data(), outputs[i].data()));
            let d = [(1.0 - k1) * (1.0 - k2) * conv1, (1.0 - k2) * (conv3 - k0 * conv1), attention - k1 * conv3 - k0 * (1.0 - k1) * conv1];
            gates.backward(g.get_mut(thresholds), Some(&d.map(T::from_f64)), d_expected);
        } else if self.settings.mode == Mode::Skip {
            return Ok(dy.clone());
        }
        let mut dx: Option<Tensor<T>> = None;
        let mut add = |part: Tensor<T>| match &mut dx {
            None => dx = Some(part),
            Some(dx) => elementwise::add(dx.data_mut(), part.data()),
        };
        let scaled = |factor: T| {
            let mut dy = dy.clone();
            if factor != T::ONE {
                dy.data_mut().iter_mut().for_each(|d| *d *= factor);
            }
            dy
        };
        let open = |factor: T| factor != T::ZERO;
        if !self.convs.is_empty() {
            let t = self.as_map(x, place.map)?;
            for ((conv, saved), &factor) in self.convs.iter().zip(convs).zip(&factors).filter(|(_, factor)| open(**factor)) {
                let dy = scaled(factor);
                let dt = conv.backward(p, g, &t, saved, &self.as_map(&dy, place.map)?)?;
                add(self.as_tokens(&dt, &dy)?);
            }
        }
        if let (Some(msa), Some(saved), true) = (&self.msa, msa, open(factors[2])) {
            let [b, n] = place.attend;
            let shape = [b, n, self.settings.dim];
            let part = msa.backward(p, g, &x.reshape(shape)?, saved, place, &scaled(factors[2]).reshape(shape)?)?;
            add(part.reshape(x.shape())?);
        }
        Ok(dx.unwrap_or_else(|| Tensor::zeros(x.shape())))
    }

    /// What a call costs on `rows` tokens of which `pixels` are patches, in groups that make `pairs` of queries and keys.
    pub fn cost(settings: &Settings, rows: usize, pixels: usize, pairs: usize, training: bool) -> Cost {
        let Settings { dim, heads, mode, own_conv, .. } = *settings;
        let (d, output) = (dim / heads, Cost { flops: 0, activation_bytes: 4 * rows * dim });
        let mut cost = Cost::default();
        for &kernel in mode.kernels() {
            let statistics = 4 * d * if training { 4 } else { 2 };
            let branch = Cost { flops: Bottleneck::flops(pixels, dim, d, kernel), activation_bytes: 4 * pixels * d + statistics };
            cost = cost + branch + output;
            if !own_conv || mode.attends() {
                cost = cost + Fold::cost(dim, heads, kernel);
            }
        }
        if mode.attends() {
            let kept = 4 * rows * (4 * dim + 2 * heads);
            cost = cost + output + Cost { flops: 8 * rows * dim * dim + 4 * pairs * dim, activation_bytes: kept };
        }
        if mode == Mode::Search { cost + output } else { cost }
    }
}
