//! The formulation of the appendix's pseudo-code: heads, grouped 1×1 convolutions with biases, encoded positions.
//!
//! Tokenizer: `A = softmax over pixels`, of `W x / √C` (filter: one map per token, shared by the heads) or of `k · q / √(C/h)` with queries
//! from the first ⌊L/2⌋ tokens (recurrent, per head). Pooled values, and the maps `A` themselves (resized to S×S, convolved down,
//! flattened), go through `conv_token`. The recurrent tokenizer puts its new tokens behind the other ⌈L/2⌉.
//!
//! Transformer: `T ← T + softmax_i(k_i · q_j / √L) v`, `T ← T + ff_conv(T)`. Projector: `x + softmax_L(q k / √(C/h)) v`.
//!
//! Biases that shift all logits of a softmax cancel: their gradients are zero, and the filter's is not even added.

use super::equations::Widths;
use super::spatial::{self, Gradients, Sizes};
use crate::case::Cost;
use crate::error::{Error, Result};
use crate::kernel::attention::{self as core, Groups, Operand};
use crate::kernel::elementwise;
use crate::kernel::rows;
use crate::linalg::ColumnsMut;
use crate::nn::{Conv2d, ConvSettings, GroupedLinear, Names, Params};
use crate::tensor::{Float, Tensor};

/// The largest side of encoded positions.
const LARGEST: usize = 1 << 12;

/// Keys of the configuration beside the widths.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// h.
    pub heads: usize,
    /// g.
    pub groups: usize,
    /// Groups of the token side.
    pub kqv_groups: usize,
    /// S, 0 = no positions.
    pub pos_size: usize,
    /// n.
    pub pos_downsample: usize,
}

impl Heads {
    fn divides(&self, what: &str, width: usize) -> Result<()> {
        if self.heads == 0 || !width.is_multiple_of(self.heads) {
            return Err(Error::config("heads", format!("expected a divisor of {what} {width}, found {}", self.heads)));
        }
        Ok(())
    }
}

/// Positions from attention maps: `[B·L', S, S, h']` → `[B·L', C_p]`.
#[derive(Clone, Debug)]
struct Positions {
    size: usize,
    convs: Vec<Conv2d>,
    last: GroupedLinear,
}

struct PositionsSaved<T: Float> {
    /// What goes into each convolution, and into the last layer.
    inputs: Vec<Tensor<T>>,
    flat: Tensor<T>,
}

impl Positions {
    fn new(names: &mut Names, heads: usize, size: usize, downsample: usize) -> Result<Option<Self>> {
        if size == 0 {
            return Ok(None);
        }
        if size > LARGEST || downsample > 12 || !size.is_multiple_of(1 << downsample) {
            let text = format!("expected a multiple of 2^pos_downsample (2^{downsample}) up to {LARGEST}, found {size}");
            return Err(Error::config("pos_size", text));
        }
        let side = size >> downsample;
        let mut names = names.at("pos_encoding");
        let half = ConvSettings { stride: [2; 2], padding: [1; 2], ..ConvSettings::new(heads, heads, 3) };
        let all = (0..downsample).map(|_| half).chain([ConvSettings::new(heads, 1, 1)]);
        let convs =
            all.enumerate().map(|(i, s)| Conv2d::new(names.at(format!("ds_conv.{i}")), s, s.default_init())).collect::<Result<_>>()?;
        Ok(Some(Positions { size, convs, last: GroupedLinear::new(names.at("pos_conv"), [side * side; 2], 1, 1)? }))
    }

    /// C_p.
    fn outputs(&self) -> usize {
        let side = self.size >> (self.convs.len() - 1);
        side * side
    }

    fn cost(&self, maps: usize, heads: usize) -> Result<Cost> {
        let mut cost = Cost { flops: maps * self.last.flops(), activation_bytes: 4 * maps * self.size * self.size * heads };
        let mut side = self.size;
        for conv in &self.convs {
            cost = cost + conv.cost([maps, side, side])?;
            [side, _] = conv.output_size([side, side])?;
        }
        Ok(cost)
    }

    /// The element of `attn` `[B, h', L', HW]` that element `i` of the resized maps `[B·L', S, S, h']` is.
    fn source(&self, i: usize, sizes: Sizes, [h, w]: [usize; 2]) -> usize {
        let (s, heads) = (self.size, sizes.heads);
        let (head, x, y, map) = (i % heads, i / heads % s, i / heads / s % s, i / heads / s / s);
        let (image, token) = (map / sizes.tokens, map % sizes.tokens);
        ((image * heads + head) * sizes.tokens + token) * sizes.pixels + (y * h / s) * w + x * w / s
    }

    fn forward<T: Float>(&self, p: &Params<T>, attn: &Tensor<T>, sizes: Sizes, map: [usize; 2]) -> Result<(Tensor<T>, PositionsSaved<T>)> {
        let (maps, s) = (sizes.batch * sizes.tokens, self.size);
        let mut x = Tensor::from_fn([maps, s, s, sizes.heads], |i| attn.data()[self.source(i, sizes, map)]);
        let mut inputs = Vec::with_capacity(self.convs.len());
        for conv in &self.convs {
            let y = conv.forward(p, &x)?;
            inputs.push(x);
            x = y;
        }
        let flat = x.reshape([maps, self.outputs()])?;
        Ok((self.last.forward(p, &flat)?, PositionsSaved { inputs, flat }))
    }

    /// Adds the gradient of the maps to `d_attn`.
    #[allow(clippy::too_many_arguments)]
    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        d_attn: &mut Tensor<T>,
        saved: PositionsSaved<T>,
        sizes: Sizes,
        map: [usize; 2],
        dy: &Tensor<T>,
    ) -> Result<()> {
        let side = self.size >> (self.convs.len() - 1);
        let mut d = self.last.backward(p, g, &saved.flat, dy)?.reshape([saved.flat.shape()[0], side, side, 1])?;
        for (conv, x) in self.convs.iter().zip(&saved.inputs).rev() {
            d = conv.backward(p, g, x, &d)?;
        }
        let d_attn = d_attn.data_mut();
        for (i, &d) in d.data().iter().enumerate() {
            d_attn[self.source(i, sizes, map)] += d;
        }
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Filters {
    /// `conv_token_coef`.
    Learned(GroupedLinear),
    /// `conv_query` of tokens and `conv_key` of the map.
    Tokens(GroupedLinear, GroupedLinear),
}

/// Filter or recurrent tokenizer.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    filters: Filters,
    value: GroupedLinear,
    positions: Option<Positions>,
    token: GroupedLinear,
    widths: Widths,
    heads: usize,
}

/// What a tokenizer's backward pass needs.
pub struct TokenizerSaved<T: Float> {
    /// Queries, and keys.
    filters: Option<[Tensor<T>; 2]>,
    value: Tensor<T>,
    /// `[B, h', L', HW]`.
    pub attn: Tensor<T>,
    positions: Option<PositionsSaved<T>>,
    /// What goes into `conv_token`.
    joined: Tensor<T>,
}

impl Tokenizer {
    /// Registers the parameters.
    pub fn new(names: &mut Names, widths: Widths, recurrent: bool, heads: Heads) -> Result<Self> {
        let Widths { channels, token_channels, tokens } = widths;
        heads.divides("channels", channels)?;
        if recurrent && tokens < 2 {
            return Err(Error::config("num_tokens", format!("a recurrent tokenizer needs at least 2, found {tokens}")));
        }
        let filters = if recurrent {
            let query = GroupedLinear::new(names.at("conv_query"), [token_channels, channels], 1, 1)?;
            Filters::Tokens(query, GroupedLinear::new(names.at("conv_key"), [channels; 2], heads.groups, 2)?)
        } else {
            Filters::Learned(GroupedLinear::new(names.at("conv_token_coef"), [channels, tokens], 1, 2)?)
        };
        let value = GroupedLinear::new(names.at("conv_value"), [channels; 2], heads.groups, 2)?;
        let maps = if recurrent { heads.heads } else { 1 };
        let positions = Positions::new(names, maps, heads.pos_size, heads.pos_downsample)?;
        let joined = channels + positions.as_ref().map_or(0, Positions::outputs);
        let token = GroupedLinear::new(names.at("conv_token"), [joined, token_channels], 1, 1)?;
        Ok(Tokenizer { filters, value, positions, token, widths, heads: maps })
    }

    fn sizes(&self, batch: usize, pixels: usize) -> Sizes {
        let Widths { channels, tokens, .. } = self.widths;
        let tokens = if matches!(self.filters, Filters::Tokens(..)) { tokens / 2 } else { tokens };
        let scale = 1.0 / ((channels / self.heads) as f64).sqrt();
        Sizes { batch, heads: self.heads, tokens, pixels, keys: channels, values: channels, scale }
    }

    /// Operations, and bytes of the tokens and what is saved.
    pub fn cost(&self, batch: usize, pixels: usize) -> Result<Cost> {
        let (sizes, c) = (self.sizes(batch, pixels), self.widths.channels);
        let positions = self.positions.as_ref().map_or(0, Positions::outputs);
        let mut cost = Cost {
            flops: sizes.flops() + batch * (pixels * self.value.flops() + sizes.tokens * self.token.flops()),
            activation_bytes: 4 * batch * (pixels * c + sizes.tokens * (sizes.heads * pixels + c + positions)),
        };
        cost.activation_bytes += 4 * batch * self.widths.tokens * self.widths.token_channels;
        if let Filters::Tokens(query, key) = &self.filters {
            cost.flops += batch * (sizes.tokens * query.flops() + pixels * key.flops());
            cost.activation_bytes += 4 * batch * (sizes.tokens + pixels) * c;
        }
        match &self.positions {
            Some(positions) => Ok(cost + positions.cost(batch * sizes.tokens, self.heads)?),
            None => Ok(cost),
        }
    }

    fn front(&self, previous: Option<&Tensor<impl Float>>) -> Result<usize> {
        let Widths { tokens, token_channels, .. } = self.widths;
        let previous = previous.ok_or_else(|| Error::missing("input `tokens` of a recurrent tokenizer"))?;
        let [_, l, c] = previous.dims("input `tokens`")?;
        if [l, c] != [tokens, token_channels] {
            return Err(Error::shape("input `tokens`", format!("[batch, {tokens}, {token_channels}]"), previous.shape()));
        }
        Ok(tokens / 2)
    }

    /// Tokens `[B, L, C_T]` of `x` `[B, HW, C]`, a map of this size.
    pub fn forward<T: Float>(
        &self,
        p: &Params<T>,
        x: &Tensor<T>,
        map: [usize; 2],
        previous: Option<&Tensor<T>>,
    ) -> Result<(Tensor<T>, TokenizerSaved<T>)> {
        let [batch, pixels, c] = x.dims("map")?;
        let sizes = self.sizes(batch, pixels);
        let filters = match (&self.filters, previous) {
            (Filters::Learned(_), _) => None,
            (Filters::Tokens(query, key), previous) => {
                let front = self.front(previous)?;
                let tokens = some_tokens(previous, 0, front)?;
                Some([query.forward(p, &tokens)?, key.forward(p, x)?])
            }
        };
        let value = self.value.forward(p, x)?;
        let (mut attn, mut pooled) =
            (Tensor::scratch([batch, sizes.heads, sizes.tokens, pixels]), Tensor::scratch([batch, sizes.tokens, c]));
        let [queries, keys] = self.operands(p, x, &filters);
        spatial::forward(attn.data_mut(), pooled.data_mut(), queries, keys, value.data(), sizes);
        let (joined, positions) = match &self.positions {
            None => (pooled, None),
            Some(positions) => {
                let (extra, saved) = positions.forward(p, &attn, sizes, map)?;
                (join(&pooled, &extra, positions.outputs())?, Some(saved))
            }
        };
        let mut tokens = self.token.forward(p, &joined)?;
        if let Filters::Tokens(..) = self.filters {
            let front = self.front(previous)?;
            let kept = some_tokens(previous, front, self.widths.tokens - front)?;
            tokens = stack(&kept, &tokens)?;
        }
        Ok((tokens, TokenizerSaved { filters, value, attn, positions, joined }))
    }

    fn operands<'a, T: Float>(&self, p: &'a Params<T>, x: &'a Tensor<T>, filters: &'a Option<[Tensor<T>; 2]>) -> [&'a [T]; 2] {
        match (&self.filters, filters) {
            (Filters::Learned(coef), _) => [p.get(coef.weight()), x.data()],
            (_, Some([query, key])) => [query.data(), key.data()],
            (_, None) => [&[], &[]],
        }
    }

    /// `dx` and, of a recurrent tokenizer, the gradient of the previous tokens. `d_attn` is `[B, h', L', HW]`.
    #[allow(clippy::too_many_arguments)]
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        map: [usize; 2],
        previous: Option<&Tensor<T>>,
        saved: TokenizerSaved<T>,
        d_tokens: &Tensor<T>,
        d_attn: Option<&Tensor<T>>,
    ) -> Result<(Tensor<T>, Option<Tensor<T>>)> {
        let TokenizerSaved { filters, value, attn, positions, joined } = saved;
        let ([batch, pixels, c], recurrent) = (x.dims("map")?, matches!(self.filters, Filters::Tokens(..)));
        let sizes = self.sizes(batch, pixels);
        let kept = self.widths.tokens - sizes.tokens;
        let d_new = if recurrent { some_tokens(Some(d_tokens), kept, sizes.tokens)? } else { d_tokens.clone() };
        let d_joined = self.token.backward(p, g, &joined, &d_new)?;
        let mut d_attn = d_attn.cloned();
        let d_pooled = match (&self.positions, positions) {
            (Some(positions), Some(saved)) => {
                let (d_pooled, d_extra) = split(&d_joined, c)?;
                let mut d = d_attn.unwrap_or_else(|| Tensor::zeros(attn.shape()));
                positions.backward(p, g, &mut d, saved, sizes, map, &d_extra)?;
                d_attn = Some(d);
                d_pooled
            }
            _ => d_joined,
        };
        let (mut dq, mut dk) = (Tensor::scratch([batch, sizes.tokens, c]), Tensor::scratch(x.shape()));
        let mut dv = Tensor::scratch(x.shape());
        let grads = Gradients { queries: dq.data_mut(), keys: Some(dk.data_mut()), values: dv.data_mut() };
        let [queries, keys] = self.operands(p, x, &filters);
        spatial::backward(grads, d_pooled.data(), d_attn.as_ref().map(Tensor::data), attn.data(), queries, keys, value.data(), sizes);
        let mut dx = self.value.backward(p, g, x, &dv)?;
        match &self.filters {
            Filters::Learned(coef) => {
                crate::kernel::reduce::add_column_sums(g.get_mut(coef.weight()), dq.data());
                elementwise::add(dx.data_mut(), dk.data());
                Ok((dx, None))
            }
            Filters::Tokens(query, key) => {
                elementwise::add(dx.data_mut(), key.backward(p, g, x, &dk)?.data());
                let front = some_tokens(previous, 0, sizes.tokens)?;
                let d_front = query.backward(p, g, &front, &dq)?;
                Ok((dx, Some(stack(&d_front, &some_tokens(Some(d_tokens), 0, kept)?)?)))
            }
        }
    }
}

/// Tokens `from..from + count` of every image.
fn some_tokens<T: Float>(x: Option<&Tensor<T>>, from: usize, count: usize) -> Result<Tensor<T>> {
    let x = x.ok_or_else(|| Error::missing("input `tokens` of a recurrent tokenizer"))?;
    let [b, _, c] = x.dims("tokens")?;
    let index: Vec<u32> = (from as u32..(from + count) as u32).collect();
    let mut y = Tensor::scratch([b, count, c]);
    rows::gather_batch(y.data_mut(), x.data(), &index, b, c);
    Ok(y)
}

/// `[a ; b]` along tokens.
fn stack<T: Float>(a: &Tensor<T>, b: &Tensor<T>) -> Result<Tensor<T>> {
    let ([batch, m, c], [_, n, _]) = (a.dims("tokens")?, b.dims("tokens")?);
    let mut y = Tensor::scratch([batch, m + n, c]);
    for (i, y) in y.data_mut().chunks_exact_mut(((m + n) * c).max(1)).enumerate() {
        y[..m * c].copy_from_slice(&a.data()[i * m * c..(i + 1) * m * c]);
        y[m * c..].copy_from_slice(&b.data()[i * n * c..(i + 1) * n * c]);
    }
    Ok(y)
}

/// `[a | b]` along channels; `b` has `width` of them.
fn join<T: Float>(a: &Tensor<T>, b: &Tensor<T>, width: usize) -> Result<Tensor<T>> {
    let [batch, n, c] = a.dims("tokens")?;
    let mut y = Tensor::scratch([batch, n, c + width]);
    for (i, y) in y.data_mut().chunks_exact_mut(c + width).enumerate() {
        y[..c].copy_from_slice(&a.data()[i * c..(i + 1) * c]);
        y[c..].copy_from_slice(&b.data()[i * width..(i + 1) * width]);
    }
    Ok(y)
}

/// The first `c` channels, and the others.
fn split<T: Float>(x: &Tensor<T>, c: usize) -> Result<(Tensor<T>, Tensor<T>)> {
    let [batch, n, all] = x.dims("tokens")?;
    let (mut a, mut b) = (Tensor::scratch([batch, n, c]), Tensor::scratch([batch * n, all - c]));
    for ((x, a), b) in x.data().chunks_exact(all).zip(a.data_mut().chunks_exact_mut(c)).zip(b.data_mut().chunks_exact_mut(all - c)) {
        a.copy_from_slice(&x[..c]);
        b.copy_from_slice(&x[c..]);
    }
    Ok((a, b))
}

/// `softmax(s q kᵀ) v` per image and head, all operands dense.
#[derive(Clone, Copy)]
struct Mix(core::Sizes);

impl Mix {
    fn operands<'a, T: Float>(&self, [q, k, v]: [&'a Tensor<T>; 3]) -> [Operand<'a, T>; 3] {
        let dense = |data: &'a Tensor<T>, dim: usize| Operand { data: data.data(), stride: self.0.heads * dim, offset: 0 };
        [dense(q, self.0.dim), dense(k, self.0.dim), dense(v, self.0.value_dim)]
    }

    fn flops(&self) -> usize {
        let core::Sizes { batch, heads, dim, value_dim, queries, keys, .. } = self.0;
        2 * batch * heads * queries * keys * (dim + value_dim)
    }

    /// The mixed values and the statistics of the softmax.
    fn forward<T: Float>(&self, qkv: [&Tensor<T>; 3]) -> [Tensor<T>; 2] {
        let s = self.0;
        let mut out = Tensor::scratch([s.batch, s.queries, s.heads * s.value_dim]);
        let mut stats = Tensor::scratch([s.batch, s.heads, s.queries, 2]);
        let [q, k, v] = self.operands(qkv);
        core::forward(out.data_mut(), stats.data_mut(), q, k, v, None, &Groups::all(s.queries, s.keys), s);
        [out, stats]
    }

    /// dq, dk, dv.
    fn backward<T: Float>(&self, qkv: [&Tensor<T>; 3], [out, stats]: [&Tensor<T>; 2], dy: &Tensor<T>) -> [Tensor<T>; 3] {
        let s = self.0;
        let mut grads = qkv.map(|x| Tensor::zeros(x.shape()));
        let [dq, dk, dv] = &mut grads;
        let to = core::Gradients {
            q: ColumnsMut::new(dq.data_mut(), s.heads * s.dim),
            k: ColumnsMut::new(dk.data_mut(), s.heads * s.dim),
            v: ColumnsMut::new(dv.data_mut(), s.heads * s.value_dim),
            bias: None,
        };
        let [q, k, v] = self.operands(qkv);
        core::backward(to, dy.data(), out.data(), stats.data(), q, k, v, None, &Groups::all(s.queries, s.keys), s);
        grads
    }
}

/// The transformer over tokens.
#[derive(Clone, Debug)]
pub struct Transformer {
    key: GroupedLinear,
    query: GroupedLinear,
    value: GroupedLinear,
    feed: GroupedLinear,
    width: usize,
    heads: usize,
}

/// What the transformer's backward pass needs.
pub struct TransformerSaved<T: Float> {
    tokens: Tensor<T>,
    qkv: [Tensor<T>; 3],
    mixed: [Tensor<T>; 2],
    middle: Tensor<T>,
}

impl Transformer {
    /// Registers `k_conv`, `q_conv`, `v_conv`, `ff_conv`.
    pub fn new(names: &mut Names, width: usize, heads: Heads) -> Result<Self> {
        let half = width / 2;
        if half == 0 {
            return Err(Error::config("token_channels", format!("expected at least 2, found {width}")));
        }
        heads.divides("half of token_channels", half)?;
        heads.divides("token_channels", width)?;
        Ok(Transformer {
            key: GroupedLinear::new(names.at("k_conv"), [width, half], heads.kqv_groups, 1)?,
            query: GroupedLinear::new(names.at("q_conv"), [width, half], heads.kqv_groups, 1)?,
            value: GroupedLinear::new(names.at("v_conv"), [width, width], heads.kqv_groups, 1)?,
            feed: GroupedLinear::new(names.at("ff_conv"), [width, width], 1, 1)?,
            width,
            heads: heads.heads,
        })
    }

    /// Column j of the mixing matrix is a softmax: query j looks at all keys.
    fn mix(&self, batch: usize, tokens: usize) -> Mix {
        let (dim, value_dim, scale) = (self.width / 2 / self.heads, self.width / self.heads, 1.0 / (tokens as f64).sqrt());
        Mix(core::Sizes { batch, heads: self.heads, dim, value_dim, queries: tokens, keys: tokens, scale })
    }

    /// Operations, and bytes of the tokens that come out and what is saved beside those that go in.
    pub fn cost(&self, batch: usize, tokens: usize) -> Cost {
        let (n, c) = (batch * tokens, self.width);
        let layers = self.key.flops() + self.query.flops() + self.value.flops() + self.feed.flops();
        let saved = 2 * (c / 2) + c + c + 2 * self.heads + c + c;
        Cost { flops: n * layers + self.mix(batch, tokens).flops(), activation_bytes: 4 * n * saved }
    }

    /// `[B, L, C_T]` → the same.
    pub fn forward<T: Float>(&self, p: &Params<T>, tokens: Tensor<T>) -> Result<(Tensor<T>, TransformerSaved<T>)> {
        let [b, l, _] = tokens.dims("tokens")?;
        let qkv = [self.query.forward(p, &tokens)?, self.key.forward(p, &tokens)?, self.value.forward(p, &tokens)?];
        let mixed = self.mix(b, l).forward([&qkv[0], &qkv[1], &qkv[2]]);
        let mut middle = tokens.clone();
        elementwise::add(middle.data_mut(), mixed[0].data());
        let mut out = self.feed.forward(p, &middle)?;
        elementwise::add(out.data_mut(), middle.data());
        Ok((out, TransformerSaved { tokens, qkv, mixed, middle }))
    }

    /// The gradient of the tokens that went in.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: TransformerSaved<T>, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let TransformerSaved { tokens, qkv: [q, k, v], mixed: [mixed, stats], middle } = saved;
        let [b, l, _] = tokens.dims("tokens")?;
        let mut d = self.feed.backward(p, g, &middle, dy)?;
        elementwise::add(d.data_mut(), dy.data());
        let [dq, dk, dv] = self.mix(b, l).backward([&q, &k, &v], [&mixed, &stats], &d);
        for (layer, grad) in [(&self.query, dq), (&self.key, dk), (&self.value, dv)] {
            let part = layer.backward(p, g, &tokens, &grad)?;
            elementwise::add(d.data_mut(), part.data());
        }
        Ok(d)
    }
}

/// The projector: tokens back onto the map.
#[derive(Clone, Debug)]
pub struct Projector {
    value: GroupedLinear,
    key: GroupedLinear,
    query: GroupedLinear,
    lateral: Option<GroupedLinear>,
    heads: usize,
    channels: usize,
    outputs: usize,
}

/// What the projector's backward pass needs.
pub struct ProjectorSaved<T: Float> {
    qkv: [Tensor<T>; 3],
    mixed: [Tensor<T>; 2],
}

impl Projector {
    /// Registers `proj_value_conv`, `proj_key_conv`, `proj_query_conv` and, if widths differ, `lateral_conv`.
    pub fn new(names: &mut Names, [channels, token_channels, outputs]: [usize; 3], heads: Heads) -> Result<Self> {
        heads.divides("channels", channels)?;
        heads.divides("out_channels", outputs)?;
        let value = GroupedLinear::new(names.at("proj_value_conv"), [token_channels, outputs], 1, 1)?;
        let key = GroupedLinear::new(names.at("proj_key_conv"), [token_channels, channels], 1, 1)?;
        let query = GroupedLinear::new(names.at("proj_query_conv"), [channels; 2], heads.groups, 2)?;
        let lateral = if outputs == channels {
            None
        } else {
            Some(GroupedLinear::new(names.at("lateral_conv"), [channels, outputs], heads.groups, 2)?)
        };
        Ok(Projector { value, key, query, lateral, heads: heads.heads, channels, outputs })
    }

    fn mix(&self, batch: usize, pixels: usize, tokens: usize) -> Mix {
        let (dim, value_dim) = (self.channels / self.heads, self.outputs / self.heads);
        let scale = 1.0 / (dim as f64).sqrt();
        Mix(core::Sizes { batch, heads: self.heads, dim, value_dim, queries: pixels, keys: tokens, scale })
    }

    /// Operations, and bytes of the map that comes out and what is saved beside map and tokens.
    pub fn cost(&self, batch: usize, pixels: usize, tokens: usize) -> Cost {
        let (c, o) = (self.channels, self.outputs);
        let on_map = self.query.flops() + self.lateral.as_ref().map_or(0, GroupedLinear::flops);
        let layers = tokens * (self.value.flops() + self.key.flops()) + pixels * on_map;
        let bytes = 4 * batch * (pixels * (c + o + 2 * self.heads + o) + tokens * (c + o));
        Cost { flops: batch * layers + self.mix(batch, pixels, tokens).flops(), activation_bytes: bytes }
    }

    /// `[B, HW, C]` and `[B, L, C_T]` → `[B, HW, C_o]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, tokens: &Tensor<T>) -> Result<(Tensor<T>, ProjectorSaved<T>)> {
        let ([b, n, _], [_, l, _]) = (x.dims("map")?, tokens.dims("tokens")?);
        let qkv = [self.query.forward(p, x)?, self.key.forward(p, tokens)?, self.value.forward(p, tokens)?];
        let mixed = self.mix(b, n, l).forward([&qkv[0], &qkv[1], &qkv[2]]);
        let mut y = match &self.lateral {
            Some(lateral) => lateral.forward(p, x)?,
            None => x.clone(),
        };
        elementwise::add(y.data_mut(), mixed[0].data());
        Ok((y, ProjectorSaved { qkv, mixed }))
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
        let ProjectorSaved { qkv: [q, k, v], mixed: [mixed, stats] } = saved;
        let ([b, n, _], [_, l, _]) = (x.dims("map")?, tokens.dims("tokens")?);
        dy.expect_shape("gradient of a projector", [b, n, self.outputs])?;
        let [dq, dk, dv] = self.mix(b, n, l).backward([&q, &k, &v], [&mixed, &stats], dy);
        let mut dx = match &self.lateral {
            Some(lateral) => lateral.backward(p, g, x, dy)?,
            None => dy.clone(),
        };
        elementwise::add(dx.data_mut(), self.query.backward(p, g, x, &dq)?.data());
        let mut d_tokens = self.key.backward(p, g, tokens, &dk)?;
        elementwise::add(d_tokens.data_mut(), self.value.backward(p, g, tokens, &dv)?.data());
        Ok((dx, d_tokens))
    }
}
