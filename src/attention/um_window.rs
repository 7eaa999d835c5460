//! `attention.um_window`: window attention with a bias from an MLP of the tokens' true positions (UM-MAE, arXiv 2205.10063).
//!
//! After uniform sampling the tokens of a window no longer stand on a regular grid. With `Δ = pos(key) − pos(query)` (rows, columns),
//! `z = sign(Δ) ln(1 + |Δ|)`, `A = W₂ ReLU(W₁ z + b₁) + b₂` (`posmlp.0`, `posmlp.2`), per head
//! `O = softmax(Q Kᵀ/√d + A (+ mask)) V`, `y = O W_projᵀ + b`.
//!
//! Positions are integers over a power of two, so there are far fewer offsets than pairs: the MLP runs once per distinct offset, and
//! A is looked up. Entry of the pair (i, j) is `query(i) + key(j)`: with the row-major number of a position on the (fine) grid of
//! offsets as its code, the difference of two codes. Positions that are no such grid get one entry per pair.
//!
//! Backward: attention as always; `dS` of all pairs with an offset is added up in the table's gradient, which then goes through the MLP
//! once. `db₂ = Σ dS = 0`; positions are data.

use rayon::prelude::*;

use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::{self as core, Bias, Gradients, Groups, Operand, Sizes};
use crate::kernel::position_mlp::{self, CHUNK, Weights};
use crate::linalg::ColumnsMut;
use crate::nn::{Init, Layout, Linear, Names, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Buffer, Float, Tensor};

/// What is added to the logits of tokens that the shift of the windows brought together.
pub const SEAM: f64 = -100.0;

/// The offsets between the tokens of every window: entries of the bias table.
#[derive(Clone, Debug)]
pub struct Offsets {
    /// `z` of every entry, rows first: `[2, entries]`, entries a multiple of [`CHUNK`].
    z: Vec<f64>,
    /// The entry of a pair is `query[i] + key[j]`; one number per token of every window.
    query: Vec<i64>,
    key: Vec<i64>,
    /// For every window of a shifted map that lies across the border: a label per token. Tokens of different labels are not neighbours
    /// on the map.
    labels: Option<Vec<u8>>,
    windows: usize,
}

/// Positions as multiples of the finest `2^{−k}` among them; `None` if some are no such number or too large.
fn on_grid(positions: &[[f64; 2]]) -> Option<(f64, Vec<[i64; 2]>)> {
    let step = (0..=8).map(|k| f64::from(1u32 << k)).find(|step| positions.iter().flatten().all(|x| (x * step).fract() == 0.0))?;
    let scaled = |x: f64| Some(x * step).filter(|x| x.abs() < 1e6).map(|x| x as i64);
    let whole: Option<Vec<[i64; 2]>> = positions.iter().map(|[r, c]| Some([scaled(*r)?, scaled(*c)?])).collect();
    Some((step, whole?))
}

impl Offsets {
    /// From the positions (row, column) of the tokens of all windows of `n` tokens, one window after the other, and their `labels`.
    pub fn new(positions: &[[f64; 2]], n: usize, labels: Option<Vec<u8>>) -> Self {
        let windows = positions.len() / n;
        let label = |token: usize| labels.as_ref().map_or(0, |labels| labels[token]);
        let pairs = windows * n * n;
        let grid = on_grid(positions).and_then(|(step, whole)| {
            // The widest offsets between tokens that see each other.
            let mut span = [0i64; 2];
            for w in 0..windows {
                let mut seen: [Option<[[i64; 2]; 2]>; 256] = [None; 256];
                for token in w * n..(w + 1) * n {
                    let at = whole[token];
                    let [low, high] = seen[usize::from(label(token))].get_or_insert([at; 2]);
                    for axis in 0..2 {
                        low[axis] = low[axis].min(at[axis]);
                        high[axis] = high[axis].max(at[axis]);
                        span[axis] = span[axis].max(high[axis] - low[axis]);
                    }
                }
            }
            let [rows, columns] = span.map(|s| 2 * s as usize + 1);
            (rows * columns <= pairs.max(4096)).then_some((step, whole, span, columns))
        });
        let (mut z, query, key);
        match grid {
            Some((step, whole, [rows, columns], width)) => {
                let code = |token: &[i64; 2]| token[0] * width as i64 + token[1];
                let middle = rows * width as i64 + columns;
                query = whole.iter().map(|token| middle - code(token)).collect();
                key = whole.iter().map(code).collect();
                z = vec![[0.0; 2]; (2 * rows as usize + 1) * width];
                for (entry, z) in z.iter_mut().enumerate() {
                    *z = [(entry / width) as i64 - rows, (entry % width) as i64 - columns].map(|x| x as f64 / step);
                }
            }
            None => {
                query = (0..windows * n).map(|token| (token * n) as i64).collect();
                key = (0..windows * n).map(|token| (token % n) as i64).collect();
                let offset = |pair: usize| {
                    let (i, j) = (pair / n, pair / (n * n) * n + pair % n);
                    [positions[j][0] - positions[i][0], positions[j][1] - positions[i][1]]
                };
                z = (0..pairs).map(offset).collect();
            }
        }
        z.resize(z.len().next_multiple_of(CHUNK), [0.0; 2]);
        let log = |x: f64| libm::log1p(x.abs()).copysign(x);
        let z = (0..2).flat_map(|axis| z.iter().map(move |z| log(z[axis]))).collect();
        Offsets { z, query, key, labels, windows }
    }

    fn entries(&self) -> usize {
        self.z.len() / 2
    }

    /// The codes of the queries and keys of a window (of `n` tokens), and its labels if it has more than one.
    fn window(&self, index: usize, n: usize) -> (&[i64], &[i64], Option<&[u8]>) {
        let at = index % self.windows * n..(index % self.windows + 1) * n;
        let labels = self.labels.as_ref().map(|labels| &labels[at.clone()]).filter(|labels| labels.iter().any(|l| *l != labels[0]));
        (&self.query[at.clone()], &self.key[at], labels)
    }
}

/// What the layer is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Width C.
    pub dim: usize,
    /// Heads h, a divisor of C.
    pub num_heads: usize,
    /// Hidden width of the position MLP.
    pub posmlp_dim: usize,
    /// `qkv` has a bias.
    pub qkv_bias: bool,
}

/// Window attention with parameters `posmlp.{0,2}`, `qkv`, `proj`.
#[derive(Clone, Debug)]
pub struct UmWindow {
    posmlp: [Linear; 2],
    qkv: Linear,
    proj: Linear,
    dim: usize,
    heads: usize,
}

/// What the backward pass needs beside the input; the bias is computed again.
pub struct Saved<T: Float> {
    qkv: Tensor<T>,
    out: Tensor<T>,
    stats: Tensor<T>,
}

impl UmWindow {
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: Settings, init: fn(usize, usize) -> Init) -> Result<Self> {
        let Settings { dim, num_heads, posmlp_dim, qkv_bias } = settings;
        if num_heads == 0 || dim == 0 || !dim.is_multiple_of(num_heads) {
            return Err(Error::config("num_heads", format!("expected a divisor of the width {dim}, found {num_heads}")));
        }
        if posmlp_dim == 0 {
            return Err(Error::config("posmlp_dim", "expected a positive width, found 0"));
        }
        let he = |outputs: usize| Init::Normal((2.0 / outputs as f64).sqrt());
        let first = Linear::shaped(&mut names.at("posmlp.0"), [posmlp_dim, 2, 1, 1].into(), 2, posmlp_dim, true, he(posmlp_dim));
        let second =
            Linear::shaped(&mut names.at("posmlp.2"), [num_heads, posmlp_dim, 1, 1].into(), posmlp_dim, num_heads, true, he(num_heads));
        let qkv = Linear::new(names.at("qkv"), dim, 3 * dim, qkv_bias, init(dim, 3 * dim));
        let proj = Linear::new(names.at("proj"), dim, dim, true, init(dim, dim));
        Ok(UmWindow { posmlp: [first, second], qkv, proj, dim, heads: num_heads })
    }

    /// The cost for `windows` windows of `n` tokens. The position MLP is not in it: how many offsets there are depends on the positions,
    /// not on the shapes, and they are few.
    pub fn cost(settings: Settings, windows: usize, n: usize) -> Cost {
        let (c, h) = (settings.dim, settings.num_heads);
        Cost { flops: 2 * windows * n * (4 * c * c + 2 * n * c), activation_bytes: 4 * windows * n * (3 * c + c + c + 2 * h) }
    }

    fn sizes<T: Float>(&self, x: &Tensor<T>, offsets: &Offsets) -> Result<Sizes> {
        let [windows, n, c] = x.dims("input of a window attention")?;
        if c != self.dim || n * offsets.windows != offsets.key.len() || (windows > 0 && !windows.is_multiple_of(offsets.windows)) {
            let expected =
                format!("[a multiple of {} windows, {} tokens, {}]", offsets.windows, offsets.key.len() / offsets.windows, self.dim);
            return Err(Error::shape("input of a window attention", expected, x.shape()));
        }
        let dim = self.dim / self.heads;
        let scale = 1.0 / (dim as f64).sqrt();
        Ok(Sizes { batch: 1, heads: self.heads, dim, value_dim: dim, queries: n, keys: n, scale })
    }

    fn weights<'a, T: Float>(&self, p: &'a Params<T>) -> Weights<'a, T> {
        let bias = |layer: &Linear| layer.bias().map_or(&[][..], |b| p.get(b));
        let [first, second] = &self.posmlp;
        Weights { first: p.get(first.weight()), first_bias: bias(first), second: p.get(second.weight()), second_bias: bias(second) }
    }

    fn z<T: Float>(offsets: &Offsets) -> Tensor<T> {
        Tensor::from_fn([offsets.z.len()], |i| T::from_f64(offsets.z[i]))
    }

    /// The bias of every entry, `[h, entries]`.
    fn table<T: Float>(&self, p: &Params<T>, offsets: &Offsets) -> Tensor<T> {
        let mut table = Tensor::scratch([self.heads, offsets.entries()]);
        position_mlp::forward(table.data_mut(), Self::z(offsets).data(), self.weights(p));
        table
    }

    /// The logits of window `index`, `[h, n, n]`: table, seam and mask.
    fn logits<T: Float>(out: &mut [T], table: &Tensor<T>, offsets: &Offsets, mask: Option<&[T]>, index: usize, n: usize) {
        let (query, key, labels) = offsets.window(index, n);
        let (seam, windows) = (T::from_f64(SEAM), mask.map_or(1, |mask| mask.len() / (n * n)));
        for (table, out) in table.data().chunks_exact(offsets.entries()).zip(out.chunks_exact_mut(n * n)) {
            for (i, out) in out.chunks_exact_mut(n).enumerate() {
                let start = query[i];
                match labels {
                    None => out.iter_mut().zip(key).for_each(|(x, k)| *x = table[(start + k) as usize]),
                    Some(labels) => out.iter_mut().zip(key).zip(labels).for_each(|((x, k), label)| {
                        *x = if *label == labels[i] { table[(start + k) as usize] } else { seam };
                    }),
                }
            }
            if let Some(mask) = mask {
                let from = index % windows * n * n;
                out.iter_mut().zip(&mask[from..from + n * n]).for_each(|(x, m)| *x += *m);
            }
        }
    }

    /// Adds the gradient of a window's logits to the table's.
    fn logits_backward<T: Float>(d_table: &mut [T], d_logits: &[T], offsets: &Offsets, index: usize, n: usize) {
        let (query, key, labels) = offsets.window(index, n);
        for (table, d) in d_table.chunks_exact_mut(offsets.entries()).zip(d_logits.chunks_exact(n * n)) {
            for (i, d) in d.chunks_exact(n).enumerate() {
                for (j, &d) in d.iter().enumerate() {
                    if labels.is_none_or(|labels| labels[i] == labels[j]) {
                        table[(query[i] + key[j]) as usize] += d;
                    }
                }
            }
        }
    }

    fn operands<'a, T: Float>(&self, qkv: &'a Tensor<T>, index: usize, n: usize) -> [Operand<'a, T>; 3] {
        let data = &qkv.data()[index * n * 3 * self.dim..(index + 1) * n * 3 * self.dim];
        [0, 1, 2].map(|part| Operand { data, stride: 3 * self.dim, offset: part * self.dim })
    }

    /// `proj(attention(x))` of windows `[windows, n, C]`, those of an image one after the other. `mask` `[windows of an image, n, n]` is
    /// added to the logits.
    pub fn forward<T: Float>(
        &self,
        p: &Params<T>,
        x: &Tensor<T>,
        offsets: &Offsets,
        mask: Option<&Tensor<T>>,
    ) -> Result<(Tensor<T>, Saved<T>)> {
        let sizes = self.sizes(x, offsets)?;
        let (n, h, mask) = (sizes.keys, self.heads, mask.map(Tensor::data));
        let qkv = self.qkv.forward(p, x)?;
        let table = self.table(p, offsets);
        let mut out = Tensor::scratch(x.shape());
        let mut stats = Tensor::scratch([x.shape()[0], h, n, 2]);
        let groups = Groups::all(n, n);
        let each = out.data_mut().par_chunks_mut(n * self.dim).zip(stats.data_mut().par_chunks_mut(h * n * 2)).enumerate();
        each.for_each(|(index, (out, stats))| {
            let mut logits = Buffer::<T>::scratch(h * n * n);
            Self::logits(&mut logits, &table, offsets, mask, index, n);
            let [q, k, v] = self.operands(&qkv, index, n);
            core::forward(out, stats, q, k, v, Some(Bias { data: &logits, side: n }), &groups, sizes);
        });
        Ok((self.proj.forward(p, &out)?, Saved { qkv, out, stats }))
    }

    /// `dx`.
    #[allow(clippy::too_many_arguments)]
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: Saved<T>,
        offsets: &Offsets,
        mask: Option<&Tensor<T>>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let sizes = self.sizes(x, offsets)?;
        let (n, h, c, mask) = (sizes.keys, self.heads, self.dim, mask.map(Tensor::data));
        let Saved { qkv, out, stats } = saved;
        let d_out = self.proj.backward(p, g, &out, dy)?;
        let table = self.table(p, offsets);
        let mut d_qkv = Tensor::zeros(qkv.shape());
        let (windows, entries, groups) = (x.shape()[0], offsets.entries(), Groups::all(n, n));
        // Runs of windows, each with a gradient of the table of its own: as many as shape and memory suggest.
        let runs = windows.min(16).min(((1 << 22) / (h * entries)).max(1)).max(1);
        let run = windows.div_ceil(runs).max(1);
        let mut d_tables = Buffer::<T>::zeros(windows.div_ceil(run).max(1) * h * entries);
        let each = d_qkv.data_mut().par_chunks_mut(run * n * 3 * c).zip(d_tables.par_chunks_mut(h * entries)).enumerate();
        each.for_each(|(part, (d_qkv, d_table))| {
            let (mut logits, mut d_logits) = (Buffer::<T>::scratch(h * n * n), Buffer::<T>::scratch(h * n * n));
            for (i, d_qkv) in d_qkv.chunks_exact_mut(n * 3 * c).enumerate() {
                let index = part * run + i;
                Self::logits(&mut logits, &table, offsets, mask, index, n);
                d_logits.fill(T::ZERO);
                let [q, k, v] = self.operands(&qkv, index, n);
                let (dq, rest) = ColumnsMut::new(d_qkv, 3 * c).split_at(c);
                let (dk, dv) = rest.split_at(c);
                let rows = index * n * c..(index + 1) * n * c;
                core::backward(
                    Gradients { q: dq, k: dk, v: dv, bias: Some(&mut d_logits) },
                    &d_out.data()[rows.clone()],
                    &out.data()[rows],
                    &stats.data()[index * h * n * 2..(index + 1) * h * n * 2],
                    q,
                    k,
                    v,
                    Some(Bias { data: &logits, side: n }),
                    &groups,
                    sizes,
                );
                Self::logits_backward(d_table, &d_logits, offsets, index, n);
            }
        });
        drop((d_out, out, qkv));
        let mut d_table = Buffer::<T>::zeros(h * entries);
        crate::kernel::reduce::add_column_sums(&mut d_table, &d_tables);
        let [first, first_bias, second] = position_mlp::backward(&d_table, Self::z(offsets).data(), self.weights(p));
        let [one, two] = &self.posmlp;
        for (param, grad) in [(Some(one.weight()), first), (one.bias(), first_bias), (Some(two.weight()), second)] {
            if let Some(param) = param {
                crate::kernel::elementwise::add(g.get_mut(param), &grad);
            }
        }
        self.qkv.backward(p, g, x, &d_qkv)
    }
}

/// Reads `pos_hw` `[B or 1, H, W, 2]`: (rows, columns) and the pairs.
pub fn positions<T: Float>(pos: &Tensor<T>) -> Result<([usize; 3], Vec<[f64; 2]>)> {
    let [batch, height, width, two] = pos.dims("input `pos_hw`")?;
    if two != 2 || batch * height * width == 0 {
        return Err(Error::shape("input `pos_hw`", "[batch, rows, columns, 2]", pos.shape()));
    }
    if pos.data().iter().any(|x| !x.to_f64().is_finite()) {
        return Err(Error::value("input `pos_hw`", "expected finite numbers"));
    }
    Ok(([batch, height, width], pos.data().chunks_exact(2).map(|at| [at[0].to_f64(), at[1].to_f64()]).collect()))
}

/// For every token of the windows of side `window`, one window after the other, its token on the `height × width` map.
pub fn window_order([height, width]: [usize; 2], window: usize) -> Vec<u32> {
    let across = width / window;
    (0..height * width)
        .map(|i| {
            let (w, a, b) = (i / (window * window), i / window % window, i % window);
            ((w / across * window + a) * width + w % across * window + b) as u32
        })
        .collect()
}

/// A random map of positions, drawn as a test input: regular, sampled (one of each 2×2), in halves, or anything.
pub fn draw_positions(draw: &mut Draw, [batch, height, width]: [usize; 3]) {
    let kind = draw.size("positions", 0, 3);
    let mut data = Vec::with_capacity(batch * height * width * 2);
    for i in 0..batch * height * width {
        for x in [i / width % height, i % width] {
            data.push(match kind {
                0 => x as f64,
                1 => (2 * x + draw.rng.below(2)) as f64,
                2 => x as f64 + 0.5 * draw.rng.below(2) as f64,
                _ => draw.rng.normal(),
            });
        }
    }
    let tensor = Tensor::from_fn([batch, height, width, 2], |i| data[i]);
    draw.inputs.insert("pos_hw".into(), crate::case::Value::Float(tensor));
}

/// The settings from a configuration.
pub fn settings(config: &Config) -> Result<Settings> {
    Ok(Settings {
        dim: config.positive("dim")?,
        num_heads: config.positive("num_heads")?,
        posmlp_dim: config.usize_or("posmlp_dim", 32)?,
        qkv_bias: config.bool_or("qkv_bias", true)?,
    })
}

/// `attention.um_window`.
pub struct UmWindowAttention;

impl Operation for UmWindowAttention {
    const NAME: &'static str = "attention.um_window";
    const PAPER: &'static str = "2205.10063 UM-MAE";
    const DATA: &'static [&'static str] = &["pos_hw", "mask"];

    fn sample(rng: &mut Rng) -> Config {
        let (heads, width) = (rng.between(1, 3), rng.between(1, 4));
        let mut config = Config::default();
        config.set("dim", heads * width).set("num_heads", heads).set("window_size", rng.between(1, 4));
        config.set("posmlp_dim", rng.between(1, 6)).set("qkv_bias", rng.chance(0.7));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let side = config.positive("window_size")?;
        let (batch, rows, columns) = (draw.size("batch", 1, 3), draw.size("window_rows", 1, 2), draw.size("window_columns", 1, 3));
        let (shared, masked) = (draw.size("shared_positions", 0, 1) == 1, draw.size("masked", 0, 1) == 1);
        draw.normal("x", [batch * rows * columns, side * side, config.positive("dim")?]);
        draw_positions(draw, [if shared { 1 } else { batch }, rows * side, columns * side]);
        if masked {
            let n = side * side;
            let mask = Tensor::from_fn([rows * columns, n, n], |_| if draw.rng.chance(0.3) { SEAM } else { 0.0 });
            draw.inputs.insert("mask".into(), crate::case::Value::Float(mask));
        }
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [windows, n, _] = inputs.dims("x")?;
        Ok(Some(UmWindow::cost(settings(config)?, windows, n)))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        // Windows of 8, as in pre-training; of 7 where 8 does not divide the map.
        let side = size.side()?;
        let window = [8, 7].into_iter().find(|window| side.is_multiple_of(*window))?;
        let bench = Benchmark::new(size).set("window_size", window).set("posmlp_dim", 32).set("qkv_bias", true);
        Some(bench.size("window_rows", side / window).size("window_columns", side / window).size("positions", 1).size("masked", 0))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (settings, side) = (settings(config)?, config.positive("window_size")?);
        let x = run.input("x")?;
        let [windows, n, _] = x.dims("input `x`")?;
        if side.checked_mul(side) != Some(n) {
            return Err(Error::shape("input `x`", format!("[windows, {side}², dim]"), x.shape()));
        }
        let ([samples, height, width], pos) = positions(&run.input("pos_hw")?)?;
        let of_image = height * width / n;
        let fits = height.is_multiple_of(side) && width.is_multiple_of(side) && windows.is_multiple_of(of_image);
        if !fits || (samples != 1 && samples != windows / of_image) {
            let expected = format!("[1 or batch, H, W, 2] in whole windows of {side}, for {windows} windows");
            return Err(Error::shape("input `pos_hw`", expected, [samples, height, width, 2]));
        }
        let mask = if run.has_input("mask") { Some(run.input("mask")?) } else { None };
        if let Some(mask) = &mask {
            mask.expect_shape("input `mask`", [of_image, n, n])?;
        }
        let order = window_order([height, width], side);
        let pos: Vec<[f64; 2]> = pos.chunks_exact(height * width).flat_map(|image| order.iter().map(|&t| image[t as usize])).collect();
        let offsets = Offsets::new(&pos, n, None);
        let (layer, layout) = Layout::build(|names| UmWindow::new(names, settings, crate::nn::xavier))?;
        run.unary(
            &layout,
            |p, x| layer.forward(p, x, &offsets, mask.as_ref()),
            |p, g, saved, dy| layer.backward(p, g, &x, saved, &offsets, mask.as_ref(), dy),
        )
    }
}
