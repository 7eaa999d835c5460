//! The positive random features of Performer: `φ(x)_j = e^{w_j·x − |x|²/2} / √m`, and what goes with them row by row.

use super::reduce::dot_lanes;
use super::{get, put};
use crate::linalg::Mat;
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::Float;

/// What is summed while the features are in registers.
pub enum Sums<'a, T> {
    /// Nothing.
    None,
    /// `σ_j += Σ_i φ_ij`.
    Columns(&'a mut [T]),
    /// `out_i = Σ_j φ_ij σ_j`.
    Rows {
        /// σ.
        sigma: &'a [T],
        /// One per row.
        out: &'a mut [T],
    },
}

/// Row `i` of a matrix whose columns follow each other.
#[inline(always)]
fn row<'a, T>(x: &Mat<'a, T>, i: usize) -> &'a [T] {
    let from = i * x.row_stride();
    &x.data()[from..from + x.cols()]
}

struct Features<'a, T> {
    z: &'a mut [T],
    x: Mat<'a, T>,
    scale: T,
    sums: Sums<'a, T>,
}

impl<T: Float> Kernel<T> for Features<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let m = self.z.len() / self.x.rows();
        let scale = V::splat(self.scale);
        for (i, z) in self.z.chunks_exact_mut(m).enumerate() {
            let x = row(&self.x, i);
            let half = V::splat(dot_lanes::<T, V>(x, x).sum() * T::from_f64(0.5));
            let mut dot = V::splat(T::ZERO);
            let mut j = 0;
            while j < m {
                let phi = (get::<T, V>(z, j, T::ZERO) - half).exp() * scale;
                put(phi, z, j);
                match &mut self.sums {
                    Sums::None => {}
                    Sums::Columns(sigma) => put(get::<T, V>(sigma, j, T::ZERO) + phi, sigma, j),
                    Sums::Rows { sigma, .. } => dot = phi.mul_add(get(sigma, j, T::ZERO), dot),
                }
                j += LANES;
            }
            if let Sums::Rows { out, .. } = &mut self.sums {
                out[i] = dot.sum();
            }
        }
    }
}

/// `z = x wᵀ` `[rows, m]` → `φ(x)`, in place.
pub fn features<T: Float>(z: &mut [T], x: Mat<T>, sums: Sums<T>) {
    if z.is_empty() {
        return;
    }
    assert!(z.len().is_multiple_of(x.rows()) && x.col_stride() == 1);
    let scale = T::ONE / T::of(z.len() / x.rows()).root();
    T::dispatch(Features { z, x, scale, sums });
}

/// An addition to the gradient of features that has rank one: `row_i column_j`.
#[derive(Clone, Copy)]
pub struct RankOne<'a, T> {
    /// One per row; all 1 if there are none.
    pub rows: Option<&'a [T]>,
    /// One per column.
    pub columns: &'a [T],
}

struct FeaturesBackward<'a, T> {
    d: &'a mut [T],
    phi: &'a [T],
    extra: Option<RankOne<'a, T>>,
    row_sums: &'a mut [T],
    d_sigma: Option<&'a mut [T]>,
}

impl<T: Float> Kernel<T> for FeaturesBackward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let m = self.d.len() / self.row_sums.len();
        for (i, (d, phi)) in self.d.chunks_exact_mut(m).zip(self.phi.chunks_exact(m)).enumerate() {
            let factor = V::splat(self.extra.and_then(|extra| extra.rows).map_or(T::ONE, |rows| rows[i]));
            let mut sum = V::splat(T::ZERO);
            let mut j = 0;
            while j < m {
                let (mut dphi, phi) = (get::<T, V>(d, j, T::ZERO), get::<T, V>(phi, j, T::ZERO));
                if let Some(extra) = self.extra {
                    dphi = factor.mul_add(get(extra.columns, j, T::ZERO), dphi);
                }
                let t = dphi * phi;
                put(t, d, j);
                sum = sum + t;
                if let Some(d_sigma) = &mut self.d_sigma {
                    put(phi.mul_add(factor, get(d_sigma, j, T::ZERO)), d_sigma, j);
                }
                j += LANES;
            }
            self.row_sums[i] = sum.sum();
        }
    }
}

/// `d = dΦ` → `T = (dΦ + extra) ∘ Φ`, in place, and `T·1`; `d_sigma`, if any, is added `Φᵀ rows`.
pub fn features_backward<T: Float>(d: &mut [T], phi: &[T], extra: Option<RankOne<T>>, row_sums: &mut [T], d_sigma: Option<&mut [T]>) {
    assert!(d.len() == phi.len());
    if !d.is_empty() {
        T::dispatch(FeaturesBackward { d, phi, extra, row_sums, d_sigma });
    }
}

struct MinusScaled<'a, T> {
    out: &'a mut [T],
    stride: usize,
    x: Mat<'a, T>,
    factors: &'a [T],
}

impl<T: Float> Kernel<T> for MinusScaled<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        for (i, (out, &factor)) in self.out.chunks_mut(self.stride).zip(self.factors).enumerate() {
            let (x, factor) = (row(&self.x, i), V::splat(-factor));
            let out = &mut out[..x.len()];
            let mut j = 0;
            while j < x.len() {
                put(factor.mul_add(get(x, j, T::ZERO), get(out, j, T::ZERO)), out, j);
                j += LANES;
            }
        }
    }
}

/// `out_i −= factor_i x_i` for rows of `out` that are `stride` apart: the last step of the gradient, `dX = T w − (T·1) ∘ X`.
pub fn minus_scaled<T: Float>(out: &mut [T], stride: usize, x: Mat<T>, factors: &[T]) {
    assert!(x.rows() == factors.len() && x.col_stride() == 1);
    T::dispatch(MinusScaled { out, stride, x, factors });
}

struct Divide<'a, T> {
    y: &'a mut [T],
    d: &'a [T],
    eps: T,
}

impl<T: Float> Kernel<T> for Divide<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.y.len() / self.d.len();
        for (y, &d) in self.y.chunks_exact_mut(width).zip(self.d) {
            let d = V::splat(d + self.eps);
            let mut j = 0;
            while j < width {
                put(get::<T, V>(y, j, T::ZERO) / d, y, j);
                j += LANES;
            }
        }
    }
}

/// `y_i ← y_i / (d_i + ε)`, row by row.
pub fn divide<T: Float>(y: &mut [T], d: &[T], eps: T) {
    if !y.is_empty() {
        assert!(y.len().is_multiple_of(d.len()));
        T::dispatch(Divide { y, d, eps });
    }
}

struct DivideBackward<'a, T> {
    r: &'a mut [T],
    dd: &'a mut [T],
    y: &'a [T],
    dy: &'a [T],
    d: &'a [T],
    eps: T,
}

impl<T: Float> Kernel<T> for DivideBackward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let width = self.y.len() / self.d.len();
        for (i, &d) in self.d.iter().enumerate() {
            let at = i * width..(i + 1) * width;
            let (r, y, dy) = (&mut self.r[at.clone()], &self.y[at.clone()], &self.dy[at]);
            let (d, mut sum) = (V::splat(d + self.eps), V::splat(T::ZERO));
            let mut j = 0;
            while j < width {
                let v = get::<T, V>(dy, j, T::ZERO) / d;
                put(v, r, j);
                sum = v.mul_add(get(y, j, T::ZERO), sum);
                j += LANES;
            }
            self.dd[i] = -sum.sum();
        }
    }
}

/// For `y = n / (d + ε)`: `r = dn = dy / (d + ε)` and `dd_i = −r_i·y_i`.
pub fn divide_backward<T: Float>(r: &mut [T], dd: &mut [T], y: &[T], dy: &[T], d: &[T], eps: T) {
    assert!(r.len() == y.len() && dy.len() == y.len() && dd.len() == d.len());
    if !y.is_empty() {
        T::dispatch(DivideBackward { r, dd, y, dy, d, eps });
    }
}
