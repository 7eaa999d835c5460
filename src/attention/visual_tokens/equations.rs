//! The formulation of the paper's equations (1) to (5): one head, no biases.
//!
//! Tokenizer: `R = W_A` (filter) or `T_in W_{T→R}ᵀ` (recurrent), `A = softmax over pixels of s X Rᵀ`, `T = Aᵀ X W_Vᵀ`: pooled first,
//! projected after.
//!
//! Transformer: `T' = T + softmax_j(c k_i · q_j) T`, `T_out = T' + ReLU(T' F₁) F₂`: keys look at queries, there are no values but T.
//!
//! Projector: `X_out = lateral(X) + softmax_L(c (X W_Qᵀ)(T W_Kᵀ)ᵀ) T W_Vᵀ`. The map is never projected: the L keys are, back into the map's
//! channels, `K' = T W_Kᵀ W_Q`, and the logits are `X K'ᵀ`. So `HW·C·D` multiply-adds become `L·C·D`. Backward, upstream G: `dV = Pᵀ G`,
//! `D = c P ⊙ (G Vᵀ − rowsum)`, `dK' = Dᵀ X`, `dX = lateralᵀ(G) + D K'`; with `k = T W_Kᵀ`: `dk = dK' W_Qᵀ`, `dW_Q = kᵀ dK'`.

use rayon::prelude::*;

use super::spatial::{self, Gradients, Sizes};
use crate::case::Cost;
use crate::error::{Error, Result};
use crate::kernel::attention::{self as core, Groups, Operand};
use crate::kernel::elementwise;
use crate::kernel::reduce::add_column_sums;
use crate::kernel::softmax::{softmax, softmax_backward};
use crate::linalg::{ColumnsMut, Epilogue, Mat, MatMut, gemm};
use crate::nn::{Init, Linear, Names, Param, Params};
use crate::tensor::{Buffer, Float, Tensor};

fn linear(names: &mut Names, name: &str, inputs: usize, outputs: usize) -> Linear {
    // Xavier-normal.
    let init = Init::Normal((2.0 / (inputs + outputs).max(1) as f64).sqrt());
    Linear::new(names.at(name), inputs, outputs, false, init)
}

/// Where the spatial filters come from.
#[derive(Clone, Debug)]
enum Filters {
    /// `w_a`: the same for every image.
    Learned(Param),
    /// `w_t2r` of the previous tokens.
    Tokens(Linear),
}

/// The sizes that all parts share.
#[derive(Clone, Copy, Debug)]
pub struct Widths {
    /// C.
    pub channels: usize,
    /// C_T.
    pub token_channels: usize,
    /// L.
    pub tokens: usize,
}

/// Filter or recurrent tokenizer.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    filters: Filters,
    value: Option<Linear>,
    widths: Widths,
    scale: f64,
}

/// What a tokenizer's backward pass needs.
pub struct TokenizerSaved<T: Float> {
    filters: Option<Tensor<T>>,
    /// `[B, L, HW]`.
    pub attn: Tensor<T>,
    pooled: Tensor<T>,
}

impl Tokenizer {
    /// Registers `w_a` or `w_t2r`, and `w_v` if `value_proj`.
    pub fn new(names: &mut Names, widths: Widths, recurrent: bool, value_proj: bool, scaled: bool) -> Result<Self> {
        let Widths { channels, token_channels, tokens } = widths;
        if !value_proj && channels != token_channels {
            return Err(Error::config("value_proj", format!("false needs token_channels {token_channels} = channels {channels}")));
        }
        let filters = if recurrent {
            Filters::Tokens(linear(names, "w_t2r", token_channels, channels))
        } else {
            let std = (2.0 / (channels + tokens) as f64).sqrt();
            Filters::Learned(names.at("w_a").param("weight", [tokens, channels], Init::Normal(std)))
        };
        let value = value_proj.then(|| linear(names, "w_v", channels, token_channels));
        let scale = if scaled { 1.0 / (channels as f64).sqrt() } else { 1.0 };
        Ok(Tokenizer { filters, value, widths, scale })
    }

    fn sizes(&self, batch: usize, pixels: usize) -> Sizes {
        let Widths { channels, tokens, .. } = self.widths;
        Sizes { batch, heads: 1, tokens, pixels, keys: channels, values: channels, scale: self.scale }
    }

    /// Operations, and bytes of the tokens and what is saved.
    pub fn cost(&self, batch: usize, pixels: usize) -> Cost {
        let Widths { channels: c, token_channels: t, tokens: l } = self.widths;
        let (recurrent, value) = (matches!(self.filters, Filters::Tokens(_)) as usize, self.value.is_some() as usize);
        Cost {
            flops: self.sizes(batch, pixels).flops() + 2 * batch * l * c * t * (recurrent + value),
            activation_bytes: 4 * batch * l * (pixels + c + recurrent * c + value * t),
        }
    }

    /// Tokens `[B, L, C_T]` of `x` `[B, HW, C]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, previous: Option<&Tensor<T>>) -> Result<(Tensor<T>, TokenizerSaved<T>)> {
        let [batch, pixels, c] = x.dims("map")?;
        let filters = match (&self.filters, previous) {
            (Filters::Learned(_), _) => None,
            (Filters::Tokens(layer), Some(previous)) => Some(layer.forward(p, previous)?),
            (Filters::Tokens(_), None) => return Err(Error::missing("input `tokens` of a recurrent tokenizer")),
        };
        let (mut attn, mut pooled) =
            (Tensor::scratch([batch, self.widths.tokens, pixels]), Tensor::scratch([batch, self.widths.tokens, c]));
        let queries = self.queries(p, filters.as_ref());
        spatial::forward(attn.data_mut(), pooled.data_mut(), queries, x.data(), x.data(), self.sizes(batch, pixels));
        let tokens = match &self.value {
            Some(value) => value.forward(p, &pooled)?,
            None => pooled.clone(),
        };
        Ok((tokens, TokenizerSaved { filters, attn, pooled }))
    }

    fn queries<'a, T: Float>(&self, p: &'a Params<T>, filters: Option<&'a Tensor<T>>) -> &'a [T] {
        match (&self.filters, filters) {
            (Filters::Learned(weight), _) => p.get(*weight),
            (Filters::Tokens(_), filters) => filters.map_or(&[], Tensor::data),
        }
    }

    /// `dx` and, of a recurrent tokenizer, the gradient of the previous tokens. `d_attn` is `[B, L, HW]`.
    #[allow(clippy::too_many_arguments)]
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        previous: Option<&Tensor<T>>,
        saved: TokenizerSaved<T>,
        d_tokens: &Tensor<T>,
        d_attn: Option<&Tensor<T>>,
    ) -> Result<(Tensor<T>, Option<Tensor<T>>)> {
        let TokenizerSaved { filters, attn, pooled } = saved;
        let [batch, pixels, _] = x.dims("map")?;
        let d_pooled = match &self.value {
            Some(value) => value.backward(p, g, &pooled, d_tokens)?,
            None => d_tokens.clone(),
        };
        let (mut dx, mut dr) = (Tensor::scratch(x.shape()), Tensor::scratch(pooled.shape()));
        let grads = Gradients { queries: dr.data_mut(), keys: None, values: dx.data_mut() };
        let queries = self.queries(p, filters.as_ref());
        let sizes = self.sizes(batch, pixels);
        spatial::backward(grads, d_pooled.data(), d_attn.map(Tensor::data), attn.data(), queries, x.data(), x.data(), sizes);
        match (&self.filters, previous) {
            (Filters::Learned(weight), _) => {
                add_column_sums(g.get_mut(*weight), dr.data());
                Ok((dx, None))
            }
            (Filters::Tokens(layer), Some(previous)) => Ok((dx, Some(layer.backward(p, g, previous, &dr)?))),
            (Filters::Tokens(_), None) => Err(Error::missing("input `tokens` of a recurrent tokenizer")),
        }
    }
}

/// The transformer over tokens.
#[derive(Clone, Debug)]
pub struct Transformer {
    key: Linear,
    query: Linear,
    fc1: Linear,
    fc2: Linear,
    width: usize,
    scale: f64,
}

/// What the transformer's backward pass needs.
pub struct TransformerSaved<T: Float> {
    tokens: Tensor<T>,
    key: Tensor<T>,
    query: Tensor<T>,
    mixed: Tensor<T>,
    stats: Tensor<T>,
    middle: Tensor<T>,
    hidden: Tensor<T>,
}

impl Transformer {
    /// Registers `key`, `query`, `fc1`, `fc2`.
    pub fn new(names: &mut Names, width: usize, attn_dim: usize, ffn_dim: usize, scaled: bool) -> Result<Self> {
        if attn_dim == 0 || ffn_dim == 0 {
            return Err(Error::config("attn_dim", format!("expected positive widths, found {attn_dim} and ffn_dim {ffn_dim}")));
        }
        let (key, query) = (linear(names, "key", width, attn_dim), linear(names, "query", width, attn_dim));
        let (fc1, fc2) = (linear(names, "fc1", width, ffn_dim), linear(names, "fc2", ffn_dim, width));
        Ok(Transformer { key, query, fc1, fc2, width, scale: if scaled { 1.0 / (attn_dim as f64).sqrt() } else { 1.0 } })
    }

    /// Operations, and bytes of the tokens that come out and what is saved beside those that go in.
    pub fn cost(&self, batch: usize, tokens: usize) -> Cost {
        let (n, c, d, f) = (batch * tokens, self.width, self.key.outputs(), self.fc1.outputs());
        Cost { flops: 2 * n * (2 * c * d + 2 * c * f + tokens * (d + c)), activation_bytes: 4 * n * (2 * d + c + 2 + c + f + c) }
    }

    fn core_sizes(&self, batch: usize, tokens: usize) -> core::Sizes {
        core::Sizes { batch, heads: 1, dim: self.key.outputs(), value_dim: self.width, queries: tokens, keys: tokens, scale: self.scale }
    }

    /// `[B, L, C_T]` → the same.
    pub fn forward<T: Float>(&self, p: &Params<T>, tokens: Tensor<T>) -> Result<(Tensor<T>, TransformerSaved<T>)> {
        let [b, l, c] = tokens.dims("tokens")?;
        let (key, query) = (self.key.forward(p, &tokens)?, self.query.forward(p, &tokens)?);
        let (mut mixed, mut stats) = (Tensor::scratch([b, l, c]), Tensor::scratch([b, 1, l, 2]));
        let [k, q, v] = [&key, &query, &tokens].map(operand);
        core::forward(mixed.data_mut(), stats.data_mut(), k, q, v, None, &Groups::all(l, l), self.core_sizes(b, l));
        let mut middle = tokens.clone();
        elementwise::add(middle.data_mut(), mixed.data());
        let u = self.fc1.forward(p, &middle)?;
        let mut hidden = Tensor::scratch(u.shape());
        elementwise::relu(hidden.data_mut(), u.data(), T::ONE);
        let out = self.fc2.forward_onto(p, &hidden, Some(&middle))?;
        Ok((out, TransformerSaved { tokens, key, query, mixed, stats, middle, hidden }))
    }

    /// The gradient of the tokens that went in.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: TransformerSaved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let TransformerSaved { tokens, key, query, mixed, stats, middle, hidden } = saved;
        let [b, l, _] = tokens.dims("tokens")?;
        let mut du = self.fc2.backward(p, g, &hidden, dy)?;
        elementwise::relu_backward(du.data_mut(), hidden.data(), T::ONE);
        let mut d_middle = self.fc1.backward(p, g, &middle, &du)?;
        elementwise::add(d_middle.data_mut(), dy.data());
        let (mut dk, mut dq, mut dt) = (Tensor::zeros(key.shape()), Tensor::zeros(query.shape()), Tensor::zeros(tokens.shape()));
        let (d, c) = (self.key.outputs(), self.width);
        let grads = core::Gradients {
            q: ColumnsMut::new(dk.data_mut(), d),
            k: ColumnsMut::new(dq.data_mut(), d),
            v: ColumnsMut::new(dt.data_mut(), c),
            bias: None,
        };
        let [k, q, v] = [&key, &query, &tokens].map(operand);
        let sizes = self.core_sizes(b, l);
        core::backward(grads, d_middle.data(), mixed.data(), stats.data(), k, q, v, None, &Groups::all(l, l), sizes);
        elementwise::add(dt.data_mut(), d_middle.data());
        for (layer, grad) in [(&self.key, dk), (&self.query, dq)] {
            elementwise::add(dt.data_mut(), layer.backward(p, g, &tokens, &grad)?.data());
        }
        Ok(dt)
    }
}

fn operand<T: Float>(x: &Tensor<T>) -> Operand<'_, T> {
    Operand { data: x.data(), stride: x.shape()[x.shape().len() - 1], offset: 0 }
}

/// The projector: tokens back onto the map.
#[derive(Clone, Debug)]
pub struct Projector {
    query: Linear,
    key: Linear,
    value: Option<Linear>,
    lateral: Option<Linear>,
    channels: usize,
    outputs: usize,
    scale: f64,
}

/// What the projector's backward pass needs.
pub struct ProjectorSaved<T: Float> {
    key: Tensor<T>,
    /// `K' = T W_Kᵀ W_Q`.
    turned: Tensor<T>,
    value: Tensor<T>,
    probabilities: Tensor<T>,
}

impl Projector {
    /// Registers `w_q`, `w_k`, `w_v` and `lateral`, those that exist. Settings: C, C_T, C_o, D_p.
    pub fn new(names: &mut Names, [channels, token_channels, outputs, dim]: [usize; 4], value_proj: bool, scaled: bool) -> Result<Self> {
        if dim == 0 || outputs == 0 {
            return Err(Error::config("proj_dim", format!("expected positive widths, found {dim} and out_channels {outputs}")));
        }
        if !value_proj && outputs != token_channels {
            return Err(Error::config("value_proj", format!("false needs out_channels {outputs} = token_channels {token_channels}")));
        }
        let (query, key) = (linear(names, "w_q", channels, dim), linear(names, "w_k", token_channels, dim));
        let value = value_proj.then(|| linear(names, "w_v", token_channels, outputs));
        let lateral = (outputs != channels).then(|| linear(names, "lateral", channels, outputs));
        let scale = if scaled { 1.0 / (dim as f64).sqrt() } else { 1.0 };
        Ok(Projector { query, key, value, lateral, channels, outputs, scale })
    }

    /// Operations, and bytes of the map that comes out and what is saved beside map and tokens.
    pub fn cost(&self, batch: usize, pixels: usize, tokens: usize, token_channels: usize) -> Cost {
        let (c, o, d) = (self.channels, self.outputs, self.query.outputs());
        let value = self.value.is_some() as usize * token_channels * o;
        let lateral = self.lateral.is_some() as usize * c * o;
        Cost {
            flops: 2 * batch * (tokens * (d * (c + token_channels) + value) + pixels * (tokens * (c + o) + lateral)),
            activation_bytes: 4 * batch * (tokens * (d + c + self.value.is_some() as usize * o) + pixels * (tokens + o)),
        }
    }

    /// `[B, HW, C]` and `[B, L, C_T]` → `[B, HW, C_o]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, tokens: &Tensor<T>) -> Result<(Tensor<T>, ProjectorSaved<T>)> {
        let ([b, n, c], [_, l, _], o) = (x.dims("map")?, tokens.dims("tokens")?, self.outputs);
        let key = self.key.forward(p, tokens)?;
        let turned = self.query.backward_input(p, &key)?;
        let value = match &self.value {
            Some(value) => value.forward(p, tokens)?,
            None => tokens.clone(),
        };
        let lateral = self.lateral.as_ref().map(|lateral| lateral.forward(p, x)).transpose()?;
        let base = lateral.as_ref().unwrap_or(x);
        let (mut probabilities, mut y) = (Tensor::scratch([b, n, l]), Tensor::scratch([b, n, o]));
        (probabilities.data_mut().par_chunks_mut(n * l).zip(y.data_mut().par_chunks_mut(n * o))).enumerate().for_each(|(image, (s, y))| {
            let x = Mat::new(&x.data()[image * n * c..], n, c);
            gemm(x, Mat::new(&turned.data()[image * l * c..], l, c).t(), MatMut::new(s, n, l), Epilogue::default());
            softmax(s, l, self.scale);
            let epilogue = Epilogue { residual: Some(Mat::new(&base.data()[image * n * o..], n, o)), ..Epilogue::default() };
            gemm(Mat::new(s, n, l), Mat::new(&value.data()[image * l * o..], l, o), MatMut::new(y, n, o), epilogue);
        });
        Ok((y, ProjectorSaved { key, turned, value, probabilities }))
    }

    /// `dx` and `d_tokens`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        tokens: &Tensor<T>,
        saved: ProjectorSaved<T>,
        dy: &Tensor<T>,
    ) -> Result<(Tensor<T>, Tensor<T>)> {
        let ProjectorSaved { key, turned, value, probabilities } = saved;
        let ([b, n, c], [_, l, _], o) = (x.dims("map")?, tokens.dims("tokens")?, self.outputs);
        dy.expect_shape("gradient of a projector", [b, n, o])?;
        let mut dx = match &self.lateral {
            Some(lateral) => lateral.backward(p, g, x, dy)?,
            None => dy.clone(),
        };
        let (mut d_turned, mut d_value) = (Tensor::scratch([b, l, c]), Tensor::scratch([b, l, o]));
        (dx.data_mut().par_chunks_mut(n * c))
            .zip(d_turned.data_mut().par_chunks_mut(l * c).zip(d_value.data_mut().par_chunks_mut(l * o)))
            .enumerate()
            .for_each(|(image, (dx, (d_turned, d_value)))| {
                let part = |rows: usize, cols: usize| image * rows * cols..(image + 1) * rows * cols;
                let probabilities = &probabilities.data()[part(n, l)];
                let dy = Mat::new(&dy.data()[part(n, o)], n, o);
                // dV = Pᵀ G
                gemm(Mat::new(probabilities, n, l).t(), dy, MatMut::new(d_value, l, o), Epilogue::default());
                // D = c P ⊙ (G Vᵀ − rowsum)
                let mut d = Buffer::scratch(n * l);
                gemm(dy, Mat::new(&value.data()[part(l, o)], l, o).t(), MatMut::new(&mut d, n, l), Epilogue::default());
                softmax_backward(&mut d, probabilities, l, self.scale);
                // dX += D K', dK' = Dᵀ X
                let accumulate = Epilogue { accumulate: true, ..Epilogue::default() };
                gemm(Mat::new(&d, n, l), Mat::new(&turned.data()[part(l, c)], l, c), MatMut::new(dx, n, c), accumulate);
                let x = Mat::new(&x.data()[part(n, c)], n, c);
                gemm(Mat::new(&d, n, l).t(), x, MatMut::new(d_turned, l, c), Epilogue::default());
            });
        let dk = self.query.forward(p, &d_turned)?;
        self.query.backward_params(g, &d_turned, &key)?;
        let mut d_tokens = self.key.backward(p, g, tokens, &dk)?;
        match &self.value {
            Some(value) => elementwise::add(d_tokens.data_mut(), value.backward(p, g, tokens, &d_value)?.data()),
            None => elementwise::add(d_tokens.data_mut(), d_value.data()),
        }
        Ok((dx, d_tokens))
    }
}
