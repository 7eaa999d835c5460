//! `nn.pos_embed_sincos2d`: the fixed 2-D sine-cosine table of MAE (arXiv 2111.06377); `nn.sinusoid_position`: the 1-D table of
//! T2T-ViT (arXiv 2101.11986).
//!
//! 2-D: `ω_k = 10000^{−k/(D/4)}`; the row of the token at (row y, column x) is `[sin xω, cos xω, sin yω, cos yω]`: columns first.
//! 1-D: with `a = p / 10000^{2⌊j/2⌋/d}`, `sin a` in even columns j and `cos a` in odd ones; d may be odd.

use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// An error unless a table of this width exists.
pub fn check_dim(dim: usize) -> Result<()> {
    if dim == 0 || !dim.is_multiple_of(4) {
        return Err(Error::config("embed_dim", format!("expected a positive multiple of 4, found {dim}")));
    }
    Ok(())
}

/// One element of the table: `channel` of the row of `token` (row-major) on a grid of `grid` columns.
pub fn sincos2d_at(dim: usize, grid: usize, token: usize, channel: usize) -> f64 {
    let quarter = dim / 4;
    let (part, k) = (channel / quarter, channel % quarter);
    let position = if part < 2 { token % grid } else { token / grid };
    let angle = position as f64 / libm::pow(10_000.0, k as f64 / quarter as f64);
    if part % 2 == 0 { libm::sin(angle) } else { libm::cos(angle) }
}

/// The table `[g² (+1), D]`, with a row of zeros in front if `class_row`.
pub fn sincos2d<T: Float>(dim: usize, grid: usize, class_row: bool) -> Result<Tensor<T>> {
    check_dim(dim)?;
    let prefix = usize::from(class_row);
    Ok(Tensor::from_fn([grid * grid + prefix, dim], |i| match (i / dim).checked_sub(prefix) {
        None => T::ZERO,
        Some(token) => T::from_f64(sincos2d_at(dim, grid, token, i % dim)),
    }))
}

/// `nn.pos_embed_sincos2d`.
pub struct PosEmbedSinCos2d;

impl Operation for PosEmbedSinCos2d {
    const NAME: &'static str = "nn.pos_embed_sincos2d";
    const PAPER: &'static str = "2111.06377 MAE";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("embed_dim", 4 * rng.between(1, 5)).set("grid_size", rng.between(1, 5)).set("cls_token", rng.chance(0.5));
        config
    }

    fn inputs(_: &Config, _: &mut Draw) -> Result<()> {
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let table = sincos2d(config.usize("embed_dim")?, config.usize("grid_size")?, config.bool("cls_token")?)?;
        run.output("pos_embed", &table);
        Ok(())
    }
}

/// One element of the 1-D table of width `dim`.
pub fn sinusoid_at(dim: usize, position: usize, channel: usize) -> f64 {
    let angle = position as f64 / libm::pow(10_000.0, (2 * (channel / 2)) as f64 / dim as f64);
    if channel.is_multiple_of(2) { libm::sin(angle) } else { libm::cos(angle) }
}

/// `nn.sinusoid_position`. The authors round to f32; `float32_rounded` does the same.
pub struct SinusoidPosition;

impl Operation for SinusoidPosition {
    const NAME: &'static str = "nn.sinusoid_position";
    const PAPER: &'static str = "2101.11986 T2T-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("n_position", rng.between(1, 20)).set("d_hid", rng.between(1, 9)).set("float32_rounded", rng.chance(0.5));
        config
    }

    fn inputs(_: &Config, _: &mut Draw) -> Result<()> {
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (n, dim, rounded) = (config.usize("n_position")?, config.positive("d_hid")?, config.bool_or("float32_rounded", false)?);
        if n.saturating_mul(dim) > 1 << 28 {
            return Err(Error::config("n_position", format!("expected a table of at most 2²⁸ values, found {n} × {dim}")));
        }
        let at = |i: usize| sinusoid_at(dim, i / dim, i % dim);
        let table = Tensor::from_fn([1, n, dim], |i| T::from_f64(if rounded { f64::from(at(i) as f32) } else { at(i) }));
        run.output("table", &table);
        Ok(())
    }
}
