//! Uniform masking (UM-MAE, arXiv 2205.10063): `mask.uniform`, `mask.secondary`, `nn.um_compact`.
//!
//! **Uniform.** Of every 2×2 block of patches exactly one stays, position `j ∈ {0, 1, 2, 3}` (row `⌊j/2⌋`, column `j mod 2`), so the kept
//! patches make up a dense map of a quarter of the size, on which windows and pooling work unchanged. `pool` (the released code)
//! draws the choices without replacement from a balanced pool of about twice their number: the t-th entry of the ascending order of
//! the noise, mod 4. `iid` (the paper) draws each by itself: `min(⌊4·noise⌋, 3)`.
//!
//! **Secondary.** `V − ⌊V(1 − ratio)⌋` of the V kept patches are masked too. `pyramid`: those of most noise. `vit` (the released code,
//! which takes the sorting order for its inverse): kept patch i is masked iff the i-th *smallest noise* stands at an index `≥ keep`;
//! statistically the same.
//!
//! **Compact.** Token `(r, c)` of the compact map lies in block `(⌊r/K⌋, ⌊c/K⌋)`, K tokens per patch side, and is the token at
//! `(r mod K, c mod K)` of the block's kept patch, or the learned `vis_mask_token` where that patch is secondarily masked.
//! Backward: a scatter, and `dtoken = Σ g` over the masked ones.

use super::mask::{mask_tensor, mix_token, mix_token_backward};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::rows;
use crate::nn::{Init, Layout, Param};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Tensor};

/// The number of 2×2 blocks of a grid of patches; an error unless both sides are even.
fn blocks([height, width]: [usize; 2]) -> Result<usize> {
    let even = height.is_multiple_of(2) && width.is_multiple_of(2) && height * width > 0;
    match height.checked_mul(width) {
        Some(patches) if even && patches <= u32::MAX as usize => Ok(patches / 4),
        _ => Err(Error::config("height", format!("expected an even number of patches per side, found {height}×{width}"))),
    }
}

/// The patch at position `j` of block `t`.
fn patch_of([_, width]: [usize; 2], t: usize, j: usize) -> usize {
    let across = width / 2;
    (2 * (t / across) + j / 2) * width + 2 * (t % across) + j % 2
}

/// Indices of `noise` in ascending order; equal noise keeps its order.
fn ascending<T: Float>(noise: &[T]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..noise.len()).collect();
    order.sort_by(|&i, &j| noise[i].partial_cmp(&noise[j]).unwrap_or(std::cmp::Ordering::Equal));
    order
}

fn check_noise<T: Float>(noise: &Tensor<T>, shape: [usize; 2]) -> Result<()> {
    noise.expect_shape("input `noise`", shape)?;
    if noise.data().iter().any(|x| x.to_f64().is_nan()) {
        return Err(Error::value("input `noise`", "expected numbers in [0, 1), found NaN"));
    }
    Ok(())
}

/// The uniform masks of `noise` over a `grid` (rows, columns) of patches, `[B, patches]`, true where a patch is removed. `iid` draws
/// every block by itself; else the choices come from the released code's pool, and noise has `4⌈patches/8⌉` columns.
pub fn uniform_mask<T: Float>(noise: &Tensor<T>, grid: [usize; 2], iid: bool) -> Result<Vec<bool>> {
    let count = blocks(grid)?;
    let [batch, columns] = noise.dims("input `noise`")?;
    check_noise(noise, [batch, if iid { count } else { 4 * count.div_ceil(2) }])?;
    if iid && noise.data().iter().any(|&x| x < T::ZERO) {
        return Err(Error::value("input `noise`", "expected numbers in [0, 1), found one below 0"));
    }
    let mut removed = vec![true; batch * count * 4];
    for (removed, noise) in removed.chunks_exact_mut(4 * count).zip(noise.data().chunks_exact(columns)) {
        let choices: Vec<usize> = match iid {
            true => noise.iter().map(|x| ((4.0 * x.to_f64()) as usize).min(3)).collect(),
            false => ascending(noise).into_iter().map(|entry| entry % 4).collect(),
        };
        for (t, &j) in choices[..count].iter().enumerate() {
            removed[patch_of(grid, t, j)] = false;
        }
    }
    Ok(removed)
}

/// How [`secondary_mask`] reads its noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecondaryRule {
    /// Noise of all patches; those of most noise are masked.
    Pyramid,
    /// Noise of the kept patches; the released code's test of the sorting order.
    Vit,
}

impl SecondaryRule {
    /// `"pyramid"` or `"vit"`.
    pub fn from_config(config: &Config) -> Result<Self> {
        Ok(if config.choice("rule", &["pyramid", "vit"])? == "vit" { SecondaryRule::Vit } else { SecondaryRule::Pyramid })
    }
}

/// The kept patches of every image, in raster order, `[B, V]`; an error unless every image keeps as many.
pub fn kept_patches(removed: &[bool], batch: usize) -> Result<Vec<u32>> {
    let len = removed.len().checked_div(batch).unwrap_or(0);
    let of = |row: &[bool]| (0..len as u32).filter(|&i| !row[i as usize]).collect::<Vec<_>>();
    let rows: Vec<Vec<u32>> = removed.chunks_exact(len.max(1)).map(of).collect();
    match rows.iter().find(|row| row.len() != rows[0].len()) {
        Some(row) => {
            Err(Error::value("input `mask`", format!("expected {} kept patches in every image, found {}", rows[0].len(), row.len())))
        }
        None => Ok(rows.concat()),
    }
}

/// Which of the kept patches (`[B, V]`, as [`kept_patches`] returns them) are secondarily masked.
pub fn secondary_mask<T: Float>(kept: &[u32], noise: &Tensor<T>, patches: usize, ratio: f64, rule: SecondaryRule) -> Result<Vec<bool>> {
    if !(0.0..=1.0).contains(&ratio) {
        return Err(Error::config("ratio", format!("expected a number from 0 to 1, found {ratio}")));
    }
    let [batch, _] = noise.dims("input `noise`")?;
    let count = kept.len().checked_div(batch).unwrap_or(0);
    if batch > 0 {
        check_noise(noise, [batch, if rule == SecondaryRule::Vit { count } else { patches }])?;
    }
    let keep = (count as f64 * (1.0 - ratio)) as usize;
    let mut masked = vec![false; kept.len()];
    for b in 0..if count == 0 { 0 } else { batch } {
        let at = b * count..(b + 1) * count;
        match rule {
            SecondaryRule::Pyramid => {
                let noise: Vec<T> = kept[at.clone()].iter().map(|&i| noise.data()[b * patches + i as usize]).collect();
                ascending(&noise)[keep..].iter().for_each(|&i| masked[at.start + i] = true);
            }
            SecondaryRule::Vit => {
                let order = ascending(&noise.data()[at.clone()]);
                masked[at].iter_mut().zip(order).for_each(|(masked, index)| *masked = index >= keep);
            }
        }
    }
    Ok(masked)
}

/// The compact map of a uniform mask: which token of the full map each of its tokens is.
#[derive(Clone, Debug)]
pub struct Compact {
    /// Images B.
    pub batch: usize,
    /// Tokens per side of the compact map, `M·K/2`.
    pub side: usize,
    /// For every compact token, its token of the full map, `[B, side²]`.
    pub tokens: Vec<u32>,
    /// For every block of patches, in raster order, its kept patch: `[B, M²/4]`.
    pub patches: Vec<u32>,
    per: usize,
}

impl Compact {
    /// The compact map of `removed` `[B, M²]`, M patches per side of `per` tokens per side each. An error unless every 2×2 block
    /// keeps one patch.
    pub fn new(removed: &[bool], batch: usize, grid: usize, per: usize) -> Result<Self> {
        let count = blocks([grid, grid])?;
        if per == 0 || removed.len() != 4 * count * batch {
            return Err(Error::shape("input `mask`", [batch, 4 * count], [removed.len()]));
        }
        let (side, full) = (grid / 2 * per, grid * per);
        if full.checked_mul(full).is_none_or(|tokens| tokens > u32::MAX as usize) {
            return Err(Error::config("tokens_per_patch", format!("expected fewer than 2³² tokens, found {full}×{full}")));
        }
        let mut patches = Vec::with_capacity(batch * count);
        for removed in removed.chunks_exact(4 * count) {
            for t in 0..count {
                let mut kept = (0..4).map(|j| patch_of([grid, grid], t, j)).filter(|&patch| !removed[patch]);
                match (kept.next(), kept.next()) {
                    (Some(patch), None) => patches.push(patch as u32),
                    _ => {
                        return Err(Error::value(
                            "input `mask`",
                            format!("expected one kept patch in every 2×2 block, not so in block {t}"),
                        ));
                    }
                }
            }
        }
        let tokens = (0..batch * side * side).map(|i| {
            let (b, r, c) = (i / (side * side), i / side % side, i % side);
            let patch = patches[b * count + r / per * (grid / 2) + c / per] as usize;
            ((patch / grid * per + r % per) * full + patch % grid * per + c % per) as u32
        });
        Ok(Compact { batch, side, tokens: tokens.collect(), patches, per })
    }

    /// For every compact token whether its patch is among `masked` patches, `[B, side²]`, from one truth value per block, `[B, M²/4]`.
    pub fn masked_tokens(&self, masked: &[bool]) -> Vec<bool> {
        let (side, across) = (self.side, self.side / self.per);
        (0..self.tokens.len())
            .map(|i| {
                let (b, r, c) = (i / (side * side), i / side % side, i % side);
                masked[b * across * across + r / self.per * across + c / self.per]
            })
            .collect()
    }

    /// Row of every compact token among the tokens of all images.
    fn rows(&self) -> Vec<u32> {
        let full = 4 * self.side * self.side;
        self.tokens.iter().enumerate().map(|(i, &token)| (i / (self.side * self.side) * full) as u32 + token).collect()
    }

    /// `[B, full map, C]` → `[B, side², C]`.
    pub fn gather<T: Float>(&self, x: &Tensor<T>) -> Result<Tensor<T>> {
        let [batch, n, c] = x.dims("input `x`")?;
        if [batch, n] != [self.batch, 4 * self.side * self.side] {
            return Err(Error::shape("input `x`", format!("[{}, {}, channels]", self.batch, 4 * self.side * self.side), x.shape()));
        }
        let mut y = Tensor::scratch([batch, self.side * self.side, c]);
        rows::gather(y.data_mut(), x.data(), &self.rows(), c);
        Ok(y)
    }

    /// The adjoint of [`gather`](Self::gather).
    pub fn scatter<T: Float>(&self, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let [batch, n, c] = dy.dims("gradient of compact tokens")?;
        let mut dx = Tensor::zeros([batch, 4 * n, c]);
        rows::scatter(dx.data_mut(), dy.data(), &self.rows(), c);
        Ok(dx)
    }
}

/// Reads `[B, L]` zeros and ones: true where 1.
pub fn read_mask_rows(name: &str, mask: &IntTensor) -> Result<(usize, Vec<bool>)> {
    let [batch, _] = mask.shape.dims(&format!("input `{name}`"))?;
    if let Some(other) = mask.data.iter().find(|m| **m != 0 && **m != 1) {
        return Err(Error::value(format!("input `{name}`"), format!("expected zeros and ones, found {other}")));
    }
    Ok((batch, mask.data.iter().map(|&m| m == 1).collect()))
}

/// `mask.uniform`.
pub struct MaskUniform;

impl Operation for MaskUniform {
    const NAME: &'static str = "mask.uniform";
    const PAPER: &'static str = "2205.10063 UM-MAE";
    const DATA: &'static [&'static str] = &["noise"];

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("height", 2 * rng.between(1, 5)).set("width", 2 * rng.between(1, 5)).set("mode", rng.pick(&["pool", "iid"]));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let count = config.positive("height")? * config.positive("width")? / 4;
        let columns = if config.str("mode")? == "iid" { count } else { 4 * count.div_ceil(2) };
        let batch = draw.size("batch", 1, 3);
        draw.uniform("noise", [batch, columns]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let grid = [config.usize_or("height", 16)?, config.usize_or("width", 16)?];
        let iid = config.get("mode").is_some() && config.choice("mode", &["pool", "iid"])? == "iid";
        let noise = run.input("noise")?;
        let removed = uniform_mask(&noise, grid, iid)?;
        run.output_ints("mask", mask_tensor([noise.shape()[0], grid[0] * grid[1]], &removed)?);
        Ok(())
    }
}

/// A random uniform mask `[B, M²]`, drawn as a test input.
pub fn draw_uniform(draw: &mut Draw, batch: usize, grid: usize) -> Vec<bool> {
    let mut removed = vec![true; batch * grid * grid];
    for image in removed.chunks_exact_mut(grid * grid) {
        for t in 0..grid * grid / 4 {
            image[patch_of([grid, grid], t, draw.rng.below(4))] = false;
        }
    }
    removed
}

/// `mask.secondary`.
pub struct MaskSecondary;

impl Operation for MaskSecondary {
    const NAME: &'static str = "mask.secondary";
    const PAPER: &'static str = "2205.10063 UM-MAE";
    const DATA: &'static [&'static str] = &["noise"];

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("ratio", [0.0, 0.25, 0.3, 0.5, 1.0][rng.below(5)]).set("rule", rng.pick(&["pyramid", "vit"]));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, len) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 40));
        let count = draw.rng.between(0, len);
        let mut mask = vec![1; batch * len];
        for row in mask.chunks_exact_mut(len) {
            draw.rng.permutation(len)[..count].iter().for_each(|&i| row[i] = 0);
        }
        draw.ints("mask", [batch, len], mask)?;
        draw.uniform("noise", [batch, if config.str("rule")? == "vit" { count } else { len }]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let mask = run.ints("mask")?;
        let (batch, mut removed) = read_mask_rows("mask", mask)?;
        let noise = run.input("noise")?;
        if noise.shape().first() != Some(&batch) {
            return Err(Error::shape("input `noise`", format!("[{batch}, …]"), noise.shape()));
        }
        let (kept, len) = (kept_patches(&removed, batch)?, removed.len().checked_div(batch).unwrap_or(0));
        let masked = secondary_mask(&kept, &noise, len, config.f64_or("ratio", 0.25)?, SecondaryRule::from_config(config)?)?;
        let mut token_mask = vec![false; removed.len()];
        for (i, _) in masked.iter().enumerate().filter(|(_, masked)| **masked) {
            let at = i / (kept.len() / batch) * len + kept[i] as usize;
            (removed[at], token_mask[at]) = (true, true);
        }
        run.output_ints("new_mask", mask_tensor(mask.shape, &removed)?);
        run.output_ints("token_mask", mask_tensor(mask.shape, &token_mask)?);
        Ok(())
    }
}

/// `nn.um_compact`.
pub struct UmCompact;

impl Operation for UmCompact {
    const NAME: &'static str = "nn.um_compact";
    const PAPER: &'static str = "2205.10063 UM-MAE";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("grid", 2 * rng.between(1, 3)).set("tokens_per_patch", rng.between(1, 3));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (grid, per) = (config.positive("grid")?, config.positive("tokens_per_patch")?);
        let (batch, dim) = (draw.size("batch", 1, 3), draw.size("dim", 1, 5));
        let removed = draw_uniform(draw, batch, grid);
        let new: Vec<bool> = removed.iter().map(|&m| m || draw.rng.chance(0.3)).collect();
        for (name, mask) in [("mask", &removed), ("new_mask", &new)] {
            draw.ints(name, [batch, grid * grid], mask.iter().map(|&m| i64::from(m)).collect())?;
        }
        draw.normal("x", [batch, grid * per * grid * per, dim]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (grid, per) = (config.positive("grid")?, config.positive("tokens_per_patch")?);
        let x = run.input("x")?;
        let [batch, _, dim] = x.dims("input `x`")?;
        let (mask, new) = (run.ints("mask")?, run.ints("new_mask")?);
        for (name, mask) in [("mask", mask), ("new_mask", new)] {
            if *mask.shape != [batch, blocks([grid, grid])? * 4] {
                return Err(Error::shape(format!("input `{name}`"), [batch, grid * grid], mask.shape));
            }
        }
        let ((_, removed), (_, new)) = (read_mask_rows("mask", mask)?, read_mask_rows("new_mask", new)?);
        if removed.iter().zip(&new).any(|(removed, new)| *removed && !new) {
            return Err(Error::value("input `new_mask`", "expected 1 wherever `mask` has 1"));
        }
        let compact = Compact::new(&removed, batch, grid, per)?;
        let patches = grid * grid;
        let masked: Vec<bool> =
            compact.patches.iter().enumerate().map(|(i, &patch)| new[i / (patches / 4) * patches + patch as usize]).collect();
        let masked = compact.masked_tokens(&masked);
        let (token, layout): (Param, _) = Layout::build(|names| Ok(names.param("vis_mask_token", [1, 1, dim], Init::NORMAL_02)))?;
        run.unary(
            &layout,
            |p, x| {
                let mut y = compact.gather(x)?;
                mix_token(p, token, &mut y, &masked)?;
                Ok((y, ()))
            },
            |_, g, (), dy| {
                let mut dy = dy.clone();
                mix_token_backward(g, token, &mut dy, &masked)?;
                compact.scatter(&dy)
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both modes keep one patch of every block; the pool never offers more than its quarter of one choice.
    #[test]
    fn one_patch_of_every_block_stays() {
        let mut rng = Rng::new(3, crate::tensor::random::Purpose::Case, 0, 0);
        for iid in [true, false] {
            let noise = Tensor::<f64>::from_fn([5, if iid { 35 } else { 72 }], |_| rng.uniform());
            let removed = uniform_mask(&noise, [10, 14], iid).unwrap();
            for image in removed.chunks_exact(140) {
                for t in 0..35 {
                    assert_eq!((0..4).filter(|&j| !image[patch_of([10, 14], t, j)]).count(), 1);
                }
            }
        }
        assert!(uniform_mask(&Tensor::<f64>::zeros([1, 1]), [2, 3], true).is_err());
    }
}
