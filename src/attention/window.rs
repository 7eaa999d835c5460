//! `attention.window`: (shifted) window attention (Swin, arXiv 2103.14030), and `attention.group_window`: the same over visible
//! tokens only (GreenMIM, arXiv 2205.13515).
//!
//! In every window `softmax(Q Kᵀ/√d + A) V` with `A[head, i, j] = table[index(i − j), head]`. A shifted window that wraps around
//! the border is two or four independent attentions: the −100 that the papers add between them leaves less than 1e-40, so they
//! are run apart, without a mask, a roll or a copy. Visible tokens of a window attend among themselves the same way (the
//! *ragged* form); GreenMIM's groups, padding and masks only batch this for a GPU.
//!
//! `dtable[index(i − j), head] = Σ dS[head, i, j]` over windows and images.

use super::softmax::{self, Attention, Settings};
use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::grouping::Windows;
use crate::kernel::attention::{Bias, Groups, Side};
use crate::nn::{Init, Layout, Names, Param, Params, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Tensor};

/// Attends inside the windows of an `height × width` map, rolled by `shift` (rows, columns).
///
/// With `pad`, incomplete windows are filled with zero tokens after the roll, as timm does; they are keys like any other, and
/// the border strips of the mask fall on them. Without, an error unless the windows divide the map.
pub fn shifted_windows([height, width]: [usize; 2], window: [usize; 2], shift: [usize; 2], pad: bool) -> Result<Groups> {
    let map = [height, width];
    for axis in 0..2 {
        if window[axis] == 0 || shift[axis] >= window[axis] {
            return Err(Error::config("shift_size", format!("expected less than the window {window:?}, found {shift:?}")));
        }
        if !pad && !map[axis].is_multiple_of(window[axis]) {
            return Err(Error::config(
                "window_size",
                format!("expected a divisor of the map {height}×{width} (or `pad`), found {window:?}"),
            ));
        }
    }
    let padded: [usize; 2] = std::array::from_fn(|axis| map[axis].next_multiple_of(window[axis]));
    // The label of a rolled position along one axis: main part, last window before the seam, after the seam.
    let strip = |axis: usize, at: usize| match shift[axis] {
        0 => 0,
        _ if at < padded[axis] - window[axis] => 0,
        s if at < padded[axis] - s => 1,
        _ => 2,
    };
    let mut groups = Groups::default();
    for side in [&mut groups.queries, &mut groups.keys] {
        side.offsets.push(0);
    }
    let zero_token = (height * width) as u32;
    for wy in 0..padded[0] / window[0] {
        for wx in 0..padded[1] / window[1] {
            for label in 0..9 {
                for a in 0..window[0] {
                    for b in 0..window[1] {
                        let (r, c) = (wy * window[0] + a, wx * window[1] + b);
                        if 3 * strip(0, r) + strip(1, c) != label {
                            continue;
                        }
                        let position = (a * window[1] + b) as u32;
                        let real = r < height && c < width;
                        let token = if real { ((r + shift[0]) % height * width + (c + shift[1]) % width) as u32 } else { zero_token };
                        groups.keys.tokens.push(token);
                        groups.keys.positions.push(position);
                        if real {
                            groups.queries.tokens.push(token);
                            groups.queries.positions.push(position);
                        }
                    }
                }
                close_group(&mut groups);
            }
        }
    }
    groups.zero_tokens = usize::from(groups.keys.tokens.len() > groups.queries.tokens.len());
    Ok(groups)
}

/// Ends the group under construction; one without queries is dropped.
fn close_group(groups: &mut Groups) {
    let before = *groups.queries.offsets.last().unwrap_or(&0) as usize;
    if groups.queries.tokens.len() == before {
        let keep = *groups.keys.offsets.last().unwrap_or(&0) as usize;
        groups.keys.tokens.truncate(keep);
        groups.keys.positions.truncate(keep);
    } else {
        groups.queries.offsets.push(groups.queries.tokens.len() as u32);
        groups.keys.offsets.push(groups.keys.tokens.len() as u32);
    }
}

/// Attends inside the windows of visible tokens at `coords` (row, column).
pub fn visible_windows(coords: &[[usize; 2]], window: usize, shift: usize) -> Result<Groups> {
    let windows = Windows::new(coords, (window, window), (shift, shift))?;
    let side = Side { offsets: windows.offsets, tokens: windows.tokens, positions: windows.positions };
    Ok(Groups { queries: side.clone(), keys: side, zero_tokens: 0 })
}

/// The rows of an integer tensor `[N, 2]` as (row, column) pairs.
pub fn coordinates(coords: &IntTensor) -> Result<Vec<[usize; 2]>> {
    let [_, two] = coords.shape.dims("coords")?;
    let negative = coords.data.iter().any(|&c| !(0..1 << 31).contains(&c));
    if two != 2 || negative {
        return Err(Error::value(
            "input `coords`",
            format!("expected [N, 2] non-negative (row, column) pairs, found shape {:?}", coords.shape),
        ));
    }
    Ok(coords.data.chunks_exact(2).map(|c| [c[0] as usize, c[1] as usize]).collect())
}

/// A relative position bias: `relative_position_bias_table` `[(2My−1)(2Mx−1), h]`.
#[derive(Clone, Debug)]
pub struct RelativeBias {
    table: Param,
    window: [usize; 2],
    heads: usize,
}

impl RelativeBias {
    /// Registers the table.
    pub fn new(names: &mut Names, window: [usize; 2], heads: usize) -> Self {
        let rows = (2 * window[0] - 1) * (2 * window[1] - 1);
        RelativeBias { table: names.param("relative_position_bias_table", [rows, heads], Init::NORMAL_02), window, heads }
    }

    /// Positions in a window.
    fn side(&self) -> usize {
        self.window[0] * self.window[1]
    }

    fn row(&self, query: usize, key: usize) -> usize {
        let [my, mx] = self.window;
        (query / mx + my - 1 - key / mx) * (2 * mx - 1) + query % mx + mx - 1 - key % mx
    }

    /// The logits `[h, M², M²]`.
    pub fn logits<T: Float>(&self, p: &Params<T>) -> Tensor<T> {
        let (side, table) = (self.side(), p.get(self.table));
        Tensor::from_fn([self.heads, side, side], |i| table[self.row(i / side % side, i % side) * self.heads + i / (side * side)])
    }

    /// Adds the gradient of the logits to the table's.
    pub fn backward<T: Float>(&self, g: &mut Params<T>, d_logits: &[T]) {
        let (side, table) = (self.side(), g.get_mut(self.table));
        for (i, &d) in d_logits.iter().enumerate() {
            table[self.row(i / side % side, i % side) * self.heads + i / (side * side)] += d;
        }
    }

    /// The logits as the core reads them.
    pub fn view<'a, T: Float>(&self, logits: &'a Tensor<T>) -> Bias<'a, T> {
        Bias { data: logits.data(), side: self.side() }
    }
}

/// Window attention with its projections and, usually, a relative position bias.
struct WindowAttention {
    bias: Option<RelativeBias>,
    attn: Attention,
}

impl WindowAttention {
    fn new(names: &mut Names, settings: Settings, window: usize, rel_pos: bool) -> Result<Self> {
        let bias = rel_pos.then(|| RelativeBias::new(names, [window, window], settings.num_heads));
        Ok(WindowAttention { bias, attn: Attention::new(names.here(), settings, normal_02)? })
    }

    fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, groups: &Groups) -> Result<(Tensor<T>, softmax::Saved<T>)> {
        let logits = self.bias.as_ref().map(|bias| bias.logits(p));
        let bias = self.bias.as_ref().zip(logits.as_ref()).map(|(bias, logits)| bias.view(logits));
        self.attn.forward(p, x, groups, bias, None)
    }

    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: softmax::Saved<T>,
        groups: &Groups,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let Some(bias) = &self.bias else { return self.attn.backward(p, g, x, saved, groups, None, dy) };
        let logits = bias.logits(p);
        let mut d_logits = Tensor::zeros(logits.shape());
        let dx = self.attn.backward(p, g, x, saved, groups, Some((bias.view(&logits), d_logits.data_mut())), dy)?;
        bias.backward(g, d_logits.data());
        Ok(dx)
    }
}

/// `dim`, `num_heads`, `qkv_bias` and `qk_scale` of a window attention.
pub fn settings(config: &Config) -> Result<Settings> {
    Ok(Settings {
        qkv_bias: config.bool("qkv_bias")?,
        scale: qk_scale(config)?,
        ..Settings::new(config.usize("dim")?, config.usize("num_heads")?)
    })
}

/// `qk_scale`: absent, `null` and 0 mean the default.
pub fn qk_scale(config: &Config) -> Result<Option<f64>> {
    Ok(Some(config.f64_or("qk_scale", 0.0)?).filter(|&s| s != 0.0))
}

/// Random `dim`, `num_heads`, `qkv_bias`, `qk_scale`.
pub fn sample_settings(rng: &mut Rng, config: &mut Config) {
    let heads = rng.between(1, 3);
    config.set("dim", heads * rng.between(1, 5)).set("num_heads", heads).set("qkv_bias", rng.chance(0.7));
    config.set("qk_scale", if rng.chance(0.3) { serde_json::json!(rng.range(0.2, 1.0)) } else { serde_json::Value::Null });
}

/// Coordinates of a random non-empty set of visible tokens, in raster order: of as many as `visible` says where that size is fixed.
pub fn draw_coords(draw: &mut Draw, height: usize, width: usize) -> Result<usize> {
    let mut seen: Vec<usize> = match draw.sizes.get("visible") {
        Some(&count) => draw.rng.permutation(height * width)[..count.min(height * width)].to_vec(),
        None => {
            let share = draw.rng.uniform();
            (0..height * width).filter(|_| draw.rng.chance(share)).collect()
        }
    };
    seen.sort_unstable();
    if seen.is_empty() {
        seen.push(draw.rng.below(height * width));
    }
    let data = seen.iter().flat_map(|&t| [(t / width) as i64, (t % width) as i64]).collect();
    draw.ints("coords", [seen.len(), 2], data)?;
    Ok(seen.len())
}

/// Runs a window attention over `groups` of `x`.
fn run_layer<T: Float>(run: &mut Run<T>, window: usize, rel_pos: bool, groups: &Groups) -> Result<()> {
    let settings = settings(run.config())?;
    let (layer, layout) = Layout::build(|names| WindowAttention::new(names, settings, window, rel_pos))?;
    let x = run.input("x")?;
    run.unary(&layout, |p, x| layer.forward(p, x, groups), |p, g, saved, dy| layer.backward(p, g, &x, saved, groups, dy))
}

/// `attention.window`.
pub struct Window;

impl Window {
    fn groups(config: &Config) -> Result<Groups> {
        let map = [config.positive("height")?, config.positive("width")?];
        shifted_windows(map, [config.positive("window_size")?; 2], [config.usize("shift_size")?; 2], config.bool("pad")?)
    }
}

impl Operation for Window {
    const NAME: &'static str = "attention.window";
    const PAPER: &'static str = "2103.14030 Swin";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_settings(rng, &mut config);
        let (window, pad) = (rng.between(1, 5), rng.chance(0.5));
        let mut side = || if pad { rng.between(1, 9) } else { window * rng.between(1, 3) };
        config.set("height", side()).set("width", side());
        config.set("window_size", window).set("shift_size", rng.below(window)).set("pad", pad);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let batch = draw.size("batch", 1, 3);
        draw.normal("x", [batch, config.positive("height")? * config.positive("width")?, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, n, _], groups) = (inputs.dims("x")?, Self::groups(config)?);
        Ok(Some(Attention::cost(settings(config)?, b, n, &groups)))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        // Windows of 7, of 8 where 7 does not divide the map; without shift, as in every other block.
        let side = size.side()?;
        let window = [7, 8].into_iter().find(|window| side.is_multiple_of(*window))?;
        let bench = Benchmark::new(size).set("height", side).set("width", side).set("window_size", window).set("shift_size", 0);
        Some(bench.set("pad", false).set("qkv_bias", true).set("qk_scale", serde_json::Value::Null))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (height, width, x) = (config.positive("height")?, config.positive("width")?, run.input("x")?);
        if height.checked_mul(width) != Some(x.dims::<3>("input `x`")?[1]) {
            return Err(Error::shape("input `x`", format!("[batch, {height}·{width}, dim]"), x.shape()));
        }
        run_layer(run, config.positive("window_size")?, true, &Self::groups(config)?)
    }
}

/// `attention.group_window`. The configuration's `mode` and `group_size` choose a batching, never the result: the ragged form runs.
pub struct GroupWindow;

impl Operation for GroupWindow {
    const NAME: &'static str = "attention.group_window";
    const PAPER: &'static str = "2205.13515 GreenMIM";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_settings(rng, &mut config);
        let window = rng.between(1, 5);
        config.set("window_size", window).set("shift_size", rng.below(window)).set("rel_pos", rng.chance(0.7));
        config.set("mode", rng.pick(&["auto", "masking", "grouping"])).set("group_size", rng.pick(&["max", "paper"]));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, height, width) = (draw.size("batch", 1, 3), draw.size("height", 1, 9), draw.size("width", 1, 9));
        let tokens = draw_coords(draw, height, width)?;
        draw.normal("x", [batch, tokens, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        let coords = coordinates(inputs.ints("coords")?)?;
        let groups = visible_windows(&coords, config.positive("window_size")?, config.usize("shift_size")?)?;
        Ok(Some(Attention::cost(settings(config)?, b, n, &groups)))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        // A quarter of the tokens is visible, any of them; windows of 7 without shift, with the released grouping where it matters.
        let side = size.side()?;
        let bench = Benchmark::new(size).set("window_size", 7).set("shift_size", 0).set("rel_pos", true).set("qkv_bias", true);
        let bench = bench.set("qk_scale", serde_json::Value::Null).set("mode", "grouping").set("group_size", "max");
        Some(bench.size("height", side).size("width", side).size("visible", size.tokens / 4))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        config.choice("mode", &["auto", "masking", "grouping"])?;
        config.choice("group_size", &["max", "paper"])?;
        let coords = coordinates(run.ints("coords")?)?;
        let [_, tokens, _] = run.input("x")?.dims("x")?;
        if tokens != coords.len() {
            return Err(Error::shape("input `coords`", [tokens, 2], [coords.len(), 2]));
        }
        let window = config.positive("window_size")?;
        let groups = visible_windows(&coords, window, config.usize("shift_size")?)?;
        run_layer(run, window, config.bool("rel_pos")?, &groups)
    }
}
