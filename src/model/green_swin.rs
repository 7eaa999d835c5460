//! GreenMIM's Swin encoder over visible tokens only (arXiv 2205.13515): `block.green_swin`, `nn.patch_merging_visible`,
//! `model.green_swin`.
//!
//! Masked patches are dropped before the first block. What is left stays in raster order of each stage's grid; a coarse cell (one
//! token of the last stage) is visible or hidden as a whole, so merging always finds four tokens. The network is
//! [`swin::Encoder`](super::swin::Encoder) on another [`Plan`].

use super::swin::{Encoder, PatchMerging, Plan, Settings, StagePlan, clip_window};
use super::swin_ops::{block_settings, map_size, run_block, run_merging, sample_encoder};
use super::vit_block;
use crate::attention::window::{coordinates, draw_coords, sample_settings, visible_windows};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::Groups;
use crate::nn::{Layout, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Tensor};

/// The visible cells of a coarse mask, cut into the tokens of every stage.
pub struct Visible {
    /// Visible tokens of the first stage: rows of the dense patch embedding.
    pub keep: Vec<u32>,
    /// Visible coarse cells, in raster order.
    pub cells: Vec<u32>,
    /// The groupings and merges of every stage.
    pub plan: Plan,
}

/// The visible tokens of `encoder` under a mask over the grid of its last stage (`true` = hidden).
pub fn visible(encoder: &Encoder, hidden: &[bool]) -> Result<Visible> {
    let grids = encoder.grids();
    let last = *grids.last().unwrap_or(&[0, 0]);
    if hidden.len() != last[0] * last[1] {
        return Err(Error::shape("input `mask`", [last[0] * last[1]], [hidden.len()]));
    }
    let Settings { window_size, .. } = *encoder.settings();
    let mut plan = Vec::with_capacity(grids.len());
    let mut keep = Vec::new();
    for (i, &[height, width]) in grids.iter().enumerate() {
        let factor = 1 << (grids.len() - 1 - i);
        if [height, width] != last.map(|side| side * factor) {
            return Err(Error::config("img_size", format!("visible cells need a grid that halves evenly, found {grids:?}")));
        }
        let coords: Vec<[usize; 2]> =
            (0..height * width).map(|t| [t / width, t % width]).filter(|[y, x]| !hidden[y / factor * last[1] + x / factor]).collect();
        let (window, shift) = clip_window([height, width], window_size, window_size / 2, false);
        let plain = visible_windows(&coords, window[0], 0)?;
        let shifted = if shift[0] == 0 { plain.clone() } else { visible_windows(&coords, window[0], shift[0])? };
        let cells = if i + 1 < grids.len() { visible_cells(&coords, [height, width])?.0 } else { Vec::new() };
        if i == 0 {
            keep = coords.iter().map(|[y, x]| (y * width + x) as u32).collect();
        }
        plan.push(StagePlan { plain, shifted, cells });
    }
    let cells = (0..hidden.len() as u32).filter(|&c| !hidden[c as usize]).collect();
    Ok(Visible { keep, cells, plan })
}

/// For every 2×2 cell with visible tokens, in raster order: its four tokens (0,0), (1,0), (0,1), (1,1), and its coordinates.
fn visible_cells(coords: &[[usize; 2]], [height, width]: [usize; 2]) -> Result<(Vec<u32>, Vec<[usize; 2]>)> {
    if height % 2 == 1 || width % 2 == 1 {
        return Err(Error::config("height", format!("patch merging needs an even map, found {height}×{width}")));
    }
    let mut index = vec![u32::MAX; height * width];
    for (i, [y, x]) in coords.iter().enumerate() {
        index[y * width + x] = i as u32;
    }
    let (mut cells, mut merged) = (Vec::new(), Vec::new());
    for y in 0..height / 2 {
        for x in 0..width / 2 {
            let four = [(0, 0), (1, 0), (0, 1), (1, 1)].map(|(dy, dx)| index[(2 * y + dy) * width + 2 * x + dx]);
            match four.iter().filter(|&&t| t != u32::MAX).count() {
                0 => {}
                4 => {
                    cells.extend(four);
                    merged.push([y, x]);
                }
                _ => return Err(Error::value("input `mask`", format!("the 2×2 cell at ({y}, {x}) must be visible or hidden as a whole"))),
            }
        }
    }
    Ok((cells, merged))
}

/// A mask of zeros and ones as truth values.
pub fn mask_values(mask: &IntTensor) -> Result<Vec<bool>> {
    if mask.data.iter().any(|&m| m != 0 && m != 1) {
        return Err(Error::value("input `mask`", "expected zeros and ones"));
    }
    Ok(mask.data.iter().map(|&m| m == 1).collect())
}

/// `block.green_swin`.
pub struct Block;

impl Operation for Block {
    const NAME: &'static str = "block.green_swin";
    const PAPER: &'static str = "2205.13515 GreenMIM";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_settings(rng, &mut config);
        let (heads, window) = (rng.between(1, 2), rng.between(1, 4));
        config.set("dim", heads * rng.between(2, 4)).set("num_heads", heads);
        config
            .set("height", rng.between(1, 9))
            .set("width", rng.between(1, 9))
            .set("window_size", window)
            .set("shift_size", rng.below(window));
        config.set("mlp_ratio", rng.range(1.0, 3.0)).set("norm_eps", 1e-6);
        config.set("mode", rng.pick(&["auto", "masking", "grouping"])).set("group_size", rng.pick(&["max", "paper"]));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let [height, width] = map_size(config)?;
        let batch = draw.size("batch", 1, 2);
        let tokens = draw_coords(draw, height, width)?;
        draw.normal("x", [batch, tokens, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        let (_, groups) = Self::windows(config, &coordinates(inputs.ints("coords")?)?)?;
        vit_block::Block::cost(&block_settings(config)?, b, n, &groups).map(Some)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        config.choice("mode", &["auto", "masking", "grouping"])?;
        config.choice("group_size", &["max", "paper"])?;
        let map = map_size(config)?;
        let coords = coordinates(run.ints("coords")?)?;
        let x = run.input("x")?;
        let [_, tokens, _] = x.dims("input `x`")?;
        if tokens != coords.len() || coords.iter().any(|c| c[0] >= map[0] || c[1] >= map[1]) {
            return Err(Error::value("input `coords`", format!("expected {tokens} positions on the {}×{} map", map[0], map[1])));
        }
        let (window, groups) = Self::windows(config, &coords)?;
        run_block(run, window, &groups)
    }
}

impl Block {
    /// The window, clipped to the map, and the groups of tokens that attend to each other.
    fn windows(config: &Config, coords: &[[usize; 2]]) -> Result<([usize; 2], Groups)> {
        let (window, shift) = clip_window(map_size(config)?, config.positive("window_size")?, config.usize("shift_size")?, false);
        Ok((window, visible_windows(coords, window[0], shift[0])?))
    }
}

/// `nn.patch_merging_visible`; `mask` is 1 where a token is **visible**.
pub struct Merging;

impl Operation for Merging {
    const NAME: &'static str = "nn.patch_merging_visible";
    const PAPER: &'static str = "2205.13515 GreenMIM";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("height", 2 * rng.between(1, 4)).set("width", 2 * rng.between(1, 4)).set("dim", rng.between(1, 6)).set("norm_eps", 1e-6);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let [height, width] = map_size(config)?;
        let cells: Vec<bool> = (0..height * width / 4).map(|i| i == 0 || draw.rng.chance(0.4)).collect();
        let mask: Vec<i64> = (0..height * width).map(|t| i64::from(cells[t / width / 2 * (width / 2) + t % width / 2])).collect();
        let tokens = mask.iter().sum::<i64>() as usize;
        let batch = draw.size("batch", 1, 3);
        draw.ints("mask", [height * width], mask)?;
        draw.normal("x", [batch, tokens, config.positive("dim")?]);
        Ok(())
    }

    fn cost(_: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, c] = inputs.dims("x")?;
        Ok(Some(PatchMerging::cost(c, b, n / 4)))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (map @ [height, width], dim) = (map_size(config)?, config.positive("dim")?);
        let mask = run.ints("mask")?;
        if height.checked_mul(width) != Some(mask.data.len()) {
            return Err(Error::shape("input `mask`", format!("[{height}·{width}]"), mask.shape));
        }
        let coords: Vec<[usize; 2]> =
            mask_values(mask)?.iter().enumerate().filter(|(_, seen)| **seen).map(|(t, _)| [t / width, t % width]).collect();
        let x = run.input("x")?;
        let [_, tokens, c] = x.dims("input `x`")?;
        if tokens != coords.len() || c != dim {
            return Err(Error::shape("input `x`", format!("[batch, {}, {dim}]", coords.len()), x.shape()));
        }
        let (cells, merged) = visible_cells(&coords, map)?;
        let mut mask_out = vec![0; height * width / 4];
        for [y, x] in &merged {
            mask_out[y * (width / 2) + x] = 1;
        }
        let data = merged.iter().flat_map(|&[y, x]| [y as i64, x as i64]).collect();
        run.output_ints("coords", IntTensor::new([merged.len(), 2], data)?);
        run.output_ints("mask_out", IntTensor::new([mask_out.len()], mask_out)?);
        run_merging(run, dim, &cells)
    }
}

/// `model.green_swin`.
pub struct Model;

impl Operation for Model {
    const NAME: &'static str = "model.green_swin";
    const PAPER: &'static str = "2205.13515 GreenMIM";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = sample_encoder(rng);
        config.set("norm_eps", 1e-6);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let side = config.positive("img_size")?;
        let cells = (side / config.positive("patch_size")?) >> (config.usizes("depths")?.len() - 1);
        let batch = draw.size("batch", 1, 2);
        let mut mask: Vec<i64> = (0..cells * cells).map(|_| i64::from(draw.rng.chance(0.5))).collect();
        mask[0] = 0;
        draw.ints("mask", [cells * cells], mask)?;
        draw.normal("image", [batch, config.positive("in_chans")?, side, side]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config(), 1e-6)?;
        let (encoder, layout) = Layout::build(|names| Encoder::new(names, settings))?;
        let p: Params<T> = run.params(&layout)?;
        let seen = visible(&encoder, &mask_values(run.ints("mask")?)?)?;
        let image: Tensor<T> = run.input("image")?;
        let (tokens, embed) = encoder.embed(&p, &image, Some(&seen.keep))?;
        let (y, saved) = encoder.forward(&p, tokens, &seen.plan, Some(&seen.keep))?;
        run.output("y", &y);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let d_tokens = encoder.backward(&p, &mut g, saved, &seen.plan, Some(&seen.keep), &run.cotangent("y", y.shape())?)?;
            let d_image = encoder.patch_embed().backward(&p, &mut g, &embed, &d_tokens, Some(&seen.keep))?;
            run.grad_input("image", &d_image);
            run.grad_params(&g);
        }
        Ok(())
    }
}
