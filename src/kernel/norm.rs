//! LayerNorm over rows: `y = γ ⊙ x̂ + β`, `x̂ = (x − μ) r`, `r = 1/√(σ² + ε)`, biased variance.

use rayon::prelude::*;

use super::{chunk_rows, get, put};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

/// The two learned vectors; without them the norm is plain `x̂`.
pub type Affine<'a, T> = Option<(&'a [T], &'a [T])>;

struct Forward<'a, T> {
    y: &'a mut [T],
    stats: &'a mut [T],
    x: &'a [T],
    affine: Affine<'a, T>,
    width: usize,
    eps: T,
    /// Statistics are given, not computed.
    reuse: bool,
}

impl<T: Float> Kernel<T> for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.width;
        let n = T::of(width);
        for ((y, x), stats) in self.y.chunks_exact_mut(width).zip(self.x.chunks_exact(width)).zip(self.stats.chunks_exact_mut(2)) {
            if !self.reuse {
                let mut sum = V::splat(T::ZERO);
                let mut j = 0;
                while j < width {
                    sum = sum + get::<T, V>(x, j, T::ZERO);
                    j += LANES;
                }
                let mean = sum.sum() / n;
                let (mut squares, center) = (V::splat(T::ZERO), V::splat(mean));
                j = 0;
                while j < width {
                    let d = get::<T, V>(x, j, mean) - center;
                    squares = d.mul_add(d, squares);
                    j += LANES;
                }
                stats[0] = mean;
                stats[1] = T::ONE / (squares.sum() / n + self.eps).root();
            }
            let (center, r) = (V::splat(stats[0]), V::splat(stats[1]));
            let mut j = 0;
            while j < width {
                let mut v = (get::<T, V>(x, j, T::ZERO) - center) * r;
                if let Some((gamma, beta)) = self.affine {
                    v = v.mul_add(get(gamma, j, T::ZERO), get(beta, j, T::ZERO));
                }
                put(v, y, j);
                j += LANES;
            }
        }
    }
}

/// Normalises every row of `x`; `stats` receives `(μ, r)` per row.
pub fn layer_norm<T: Float>(y: &mut [T], stats: &mut [T], x: &[T], affine: Affine<T>, width: usize, eps: f64) {
    run(y, stats, x, affine, width, eps, false);
}

/// [`layer_norm`] with the statistics of an earlier call: cheaper than keeping `y`.
pub fn layer_norm_again<T: Float>(y: &mut [T], stats: &mut [T], x: &[T], affine: Affine<T>, width: usize) {
    run(y, stats, x, affine, width, 0.0, true);
}

fn run<T: Float>(y: &mut [T], stats: &mut [T], x: &[T], affine: Affine<T>, width: usize, eps: f64, reuse: bool) {
    assert!(width > 0 && y.len() == x.len() && stats.len() * width == 2 * x.len());
    let (chunk, eps) = (chunk_rows(width), T::from_f64(eps));
    y.par_chunks_mut(chunk * width)
        .zip(stats.par_chunks_mut(chunk * 2))
        .zip(x.par_chunks(chunk * width))
        .for_each(|((y, stats), x)| T::dispatch(Forward { y, stats, x, affine, width, eps, reuse }));
}

/// Mean and `1/√(σ² + ε/r²)` of every row, taken on `r x` so that no square overflows.
struct RelaxedStats<'a, T> {
    stats: &'a mut [T],
    x: &'a [T],
    width: usize,
    eps: T,
    /// `max |x|` for all rows; else each row's own.
    max: Option<T>,
}

impl<T: Float> Kernel<T> for RelaxedStats<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let n = T::of(self.width);
        for (x, stats) in self.x.chunks_exact(self.width).zip(self.stats.chunks_exact_mut(2)) {
            let max = self.max.unwrap_or_else(|| {
                let mut max = V::splat(T::ZERO);
                let mut j = 0;
                while j < x.len() {
                    max = get::<T, V>(x, j, T::ZERO).abs().max(max);
                    j += LANES;
                }
                max.largest()
            });
            let r = if max == T::ZERO { T::ONE } else { T::of(8) / max };
            let (scale, mut sum) = (V::splat(r), V::splat(T::ZERO));
            let mut j = 0;
            while j < x.len() {
                sum = sum + get::<T, V>(x, j, T::ZERO) * scale;
                j += LANES;
            }
            let mean = sum.sum() / n / r;
            let (mut squares, center) = (V::splat(T::ZERO), V::splat(mean));
            j = 0;
            while j < x.len() {
                let d = (get::<T, V>(x, j, mean) - center) * scale;
                squares = d.mul_add(d, squares);
                j += LANES;
            }
            stats[0] = mean;
            stats[1] = r / (squares.sum() / n + self.eps).root();
        }
    }
}

/// What the rows are divided by before their norm, `max |x| / 8`: it only changes ε.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relax {
    /// The maximum of everything.
    Tensor,
    /// The maximum of the row.
    Row,
}

/// [`layer_norm`] of `8 x / max |x|`: of `x` itself with `ε (max/8)²` in place of ε. A maximum of 0 counts as 8.
pub fn layer_norm_relaxed<T: Float>(y: &mut [T], stats: &mut [T], x: &[T], affine: Affine<T>, width: usize, eps: f64, relax: Relax) {
    assert!(width > 0 && y.len() == x.len() && stats.len() * width == 2 * x.len());
    let (chunk, eps) = (chunk_rows(width), T::from_f64(eps));
    let max = (relax == Relax::Tensor).then(|| super::reduce::max_abs(x));
    stats
        .par_chunks_mut(chunk * 2)
        .zip(x.par_chunks(chunk * width))
        .for_each(|(stats, x)| T::dispatch(RelaxedStats { stats, x, width, eps, max }));
    layer_norm_again(y, stats, x, affine, width);
}

struct Backward<'a, T> {
    dx: &'a mut [T],
    dgamma: &'a mut [T],
    dbeta: &'a mut [T],
    x: &'a [T],
    dy: &'a [T],
    stats: &'a [T],
    gamma: Option<&'a [T]>,
    residual: Option<&'a [T]>,
    width: usize,
}

impl<T: Float> Kernel<T> for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.width;
        let n = T::of(width);
        for (i, (dx, stats)) in self.dx.chunks_exact_mut(width).zip(self.stats.chunks_exact(2)).enumerate() {
            let at = i * width..(i + 1) * width;
            let (x, dy) = (&self.x[at.clone()], &self.dy[at.clone()]);
            let (center, r) = (V::splat(stats[0]), V::splat(stats[1]));
            let (mut sum_g, mut sum_gx) = (V::splat(T::ZERO), V::splat(T::ZERO));
            let mut j = 0;
            while j < width {
                let d = get::<T, V>(dy, j, T::ZERO);
                let hat = (get::<T, V>(x, j, stats[0]) - center) * r;
                // dγ = Σ dy ⊙ x̂, dβ = Σ dy
                let g = match self.gamma {
                    Some(gamma) => {
                        put(d.mul_add(hat, get::<T, V>(self.dgamma, j, T::ZERO)), self.dgamma, j);
                        put(get::<T, V>(self.dbeta, j, T::ZERO) + d, self.dbeta, j);
                        d * get(gamma, j, T::ZERO)
                    }
                    None => d,
                };
                sum_g = sum_g + g;
                sum_gx = g.mul_add(hat, sum_gx);
                j += LANES;
            }
            // dx = r (g − mean(g) − x̂ mean(g ⊙ x̂))
            let (mean_g, mean_gx) = (V::splat(sum_g.sum() / n), V::splat(sum_gx.sum() / n));
            j = 0;
            while j < width {
                let d = get::<T, V>(dy, j, T::ZERO);
                let g = self.gamma.map_or(d, |gamma| d * get(gamma, j, T::ZERO));
                let hat = (get::<T, V>(x, j, T::ZERO) - center) * r;
                let mut v = r * ((g - mean_g) - hat * mean_gx);
                if let Some(residual) = self.residual {
                    v = v + get(&residual[at.clone()], j, T::ZERO);
                }
                put(v, dx, j);
                j += LANES;
            }
        }
    }
}

/// The gradient of [`layer_norm`]: `dx` (plus `residual`, if any) is written, `dgamma` and `dbeta` are added to.
#[allow(clippy::too_many_arguments)]
pub fn layer_norm_backward<T: Float>(
    dx: &mut [T],
    affine: Option<(&mut [T], &mut [T])>,
    x: &[T],
    dy: &[T],
    stats: &[T],
    gamma: Option<&[T]>,
    residual: Option<&[T]>,
    width: usize,
) {
    assert!(width > 0 && dx.len() == x.len() && dy.len() == x.len() && stats.len() * width == 2 * x.len());
    let chunk = chunk_rows(width).min(256);
    let parts = x.len().div_ceil(chunk * width);
    let mut partial = Buffer::<T>::zeros(parts * 2 * width);
    dx.par_chunks_mut(chunk * width).zip(partial.par_chunks_mut(2 * width)).enumerate().for_each(|(i, (dx, partial))| {
        let at = i * chunk * width..i * chunk * width + dx.len();
        let (dgamma, dbeta) = partial.split_at_mut(width);
        let stats = &stats[2 * i * chunk..2 * i * chunk + 2 * (dx.len() / width)];
        let residual = residual.map(|r| &r[at.clone()]);
        T::dispatch(Backward { dx, dgamma, dbeta, x: &x[at.clone()], dy: &dy[at], stats, gamma, residual, width });
    });
    if let Some((dgamma, dbeta)) = affine {
        for part in partial.chunks_exact(2 * width) {
            for (total, &p) in dgamma.iter_mut().zip(&part[..width]) {
                *total += p;
            }
            for (total, &p) in dbeta.iter_mut().zip(&part[width..]) {
                *total += p;
            }
        }
    }
}
