//! Context clusters (arXiv 2303.01494): points of a region gather at centres by cosine similarity and hear the mean of their cluster.
//!
//! Per image, head and region, points `n` with features `f_n` and values `v_n`; centres `c = P f`, `c^v = P v` by adaptive average
//! pooling, `m = i · columns + j`:
//!
//! `u_n = f_n/‖f_n‖`, `w_m = c_m/‖c_m‖`, `s_mn = σ(β + α w_m·u_n)`, `a(n) = argmax_m s_mn` (the first on ties), `ŝ_n = s_{a(n) n}`,
//! `g_m = (c^v_m + Σ_{a(n)=m} ŝ_n v_n) / Z_m`, `Z_m = 1 + Σ_{a(n)=m} ŝ_n` (or 1 + their number), `o_n = ŝ_n g_{a(n)}`.
//!
//! Norms below 1e-12 count as 1e-12. Points meet their own centre alone: time is linear in points and no `[centres, points]` mask exists.
//!
//! Backward; the assignment is constant, nothing else is. With `ō = do` (or `ḡ = dg` directly, where the centres are the output):
//!
//! `ḡ_m = Σ ŝ_n ō_n`, `r_m = ḡ_m/Z_m`, `v̄_n = ŝ_n r_a + Σ_m P_mn r_m`, `ŝ̄_n = g_a·ō_n + (v_n − g_a)·r_a` (`v_n·r_a` if Z counts),
//! `t̄_n = ŝ̄_n ŝ_n (1 − ŝ_n)`, `β̄ = Σ t̄`, `ᾱ = Σ t̄_n w_a·u_n`, `κ_n = α t̄_n`, `w̄_m = Σ κ_n u_n`,
//! `f̄_n = κ_n (w_a − u_n (u_n·w_a))/‖f_n‖ + Σ_m P_mn c̄_m`, `c̄_m = (w̄_m − w_m (w_m·w̄_m))/‖c_m‖`.
//!
//! One task is one head of one row of regions.

use super::reduce::dot_lanes;
use super::{get, put};
use crate::linalg::{ColumnsMut, count_flops, par_blocks};
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

/// The sizes and the two learned numbers of a clustering.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Images.
    pub batch: usize,
    /// Rows and columns of the map.
    pub map: [usize; 2],
    /// Heads.
    pub heads: usize,
    /// Width d of a head.
    pub dim: usize,
    /// Regions along rows and columns; divisors of the map.
    pub folds: [usize; 2],
    /// Centres of a region along rows and columns.
    pub centers: [usize; 2],
    /// The factor on similarities.
    pub alpha: f64,
    /// The shift of similarities.
    pub beta: f64,
    /// `Z` counts the points of a cluster instead of adding up their similarities.
    pub count: bool,
}

const EPS: f64 = 1e-12;

impl Sizes {
    /// Centres of a region.
    pub fn clusters(&self) -> usize {
        self.centers[0] * self.centers[1]
    }

    /// Points of all images.
    pub fn points(&self) -> usize {
        self.batch * self.map[0] * self.map[1]
    }

    /// The length of what [`forward`] keeps of the clusters: `g` and `Z` of every image, row of regions, head, region.
    pub fn clusters_len(&self) -> usize {
        self.batch * self.folds[0] * self.heads * self.folds[1] * self.clusters() * (self.dim + 1)
    }

    /// Floating-point operations of a forward pass: similarities, aggregation and, unless the centres are the output, dispatch.
    pub fn flops(&self, return_centers: bool) -> usize {
        2 * self.points() * self.heads * self.dim * (self.clusters() + if return_centers { 1 } else { 2 })
    }

    fn is_empty(&self) -> bool {
        self.points() * self.heads * self.dim * self.clusters() == 0
    }
}

/// One head of one row of regions. Points are numbered from the first of the band.
#[derive(Clone, Copy)]
struct Band<'a, T> {
    sizes: Sizes,
    f: &'a [T],
    v: &'a [T],
    /// The band's first point.
    first: usize,
    head: usize,
}

impl<'a, T: Float> Band<'a, T> {
    fn new(sizes: Sizes, f: &'a [T], v: &'a [T], band: usize, head: usize) -> Self {
        Band { sizes, f, v, first: band * (sizes.map[0] / sizes.folds[0]) * sizes.map[1], head }
    }

    /// The head's part of point `n`.
    #[inline(always)]
    fn part<'b>(&self, x: &'b [T], n: usize) -> &'b [T] {
        let Sizes { heads, dim, .. } = self.sizes;
        &x[((self.first + n) * heads + self.head) * dim..][..dim]
    }

    /// Rows and columns of a region.
    fn region(&self) -> [usize; 2] {
        std::array::from_fn(|axis| self.sizes.map[axis] / self.sizes.folds[axis])
    }

    /// The points of region `q`, in raster order.
    fn points(&self, q: usize) -> impl Iterator<Item = usize> + use<T> {
        let ([rows, cols], width) = (self.region(), self.sizes.map[1]);
        (0..rows).flat_map(move |r| (0..cols).map(move |c| r * width + q * cols + c))
    }

    /// The points of region `q` that centre `m` averages, and their number.
    fn cell(&self, q: usize, m: usize) -> (impl Iterator<Item = usize> + use<T>, usize) {
        let (region, width, centers) = (self.region(), self.sizes.map[1], self.sizes.centers);
        let at = [m / centers[1], m % centers[1]];
        let from: [usize; 2] = std::array::from_fn(|axis| at[axis] * region[axis] / centers[axis]);
        let to: [usize; 2] = std::array::from_fn(|axis| ((at[axis] + 1) * region[axis]).div_ceil(centers[axis]));
        let points = (from[0]..to[0]).flat_map(move |r| (from[1]..to[1]).map(move |c| r * width + q * region[1] + c));
        (points, (to[0] - from[0]) * (to[1] - from[1]))
    }
}

/// `y ← y + w x`.
#[inline(always)]
fn add<T: Float, V: Vector<T>>(y: &mut [T], x: &[T], w: T) {
    let w = V::splat(w);
    for j in (0..y.len()).step_by(LANES) {
        put(get::<T, V>(x, j, T::ZERO).mul_add(w, get(y, j, T::ZERO)), y, j);
    }
}

/// `y ← w x`.
#[inline(always)]
fn scaled<T: Float, V: Vector<T>>(y: &mut [T], x: &[T], w: T) {
    let w = V::splat(w);
    for j in (0..y.len()).step_by(LANES) {
        put(get::<T, V>(x, j, T::ZERO) * w, y, j);
    }
}

#[inline(always)]
fn product<T: Float, V: Vector<T>>(x: &[T], y: &[T]) -> T {
    dot_lanes::<T, V>(x, y).sum()
}

/// `‖x‖`, but at least [`EPS`].
#[inline(always)]
fn norm<T: Float, V: Vector<T>>(x: &[T]) -> T {
    product::<T, V>(x, x).root().larger(T::from_f64(EPS))
}

/// The centres of a region, `[M, d]` each: `w` and, per centre, `‖c‖`.
struct Centers<T: Float> {
    w: Buffer<T>,
    norms: Buffer<T>,
}

impl<T: Float> Centers<T> {
    fn new(sizes: Sizes) -> Self {
        Centers { w: Buffer::scratch(sizes.clusters() * sizes.dim), norms: Buffer::scratch(sizes.clusters()) }
    }

    #[inline(always)]
    fn find<V: Vector<T>>(&mut self, band: &Band<T>, q: usize) {
        for (m, (w, norm_m)) in self.w.chunks_exact_mut(band.sizes.dim).zip(self.norms.iter_mut()).enumerate() {
            mean::<T, V>(w, band, band.f, q, m);
            *norm_m = norm::<T, V>(w);
            let norm_m = V::splat(*norm_m);
            for j in (0..w.len()).step_by(LANES) {
                put(get::<T, V>(w, j, T::ZERO) / norm_m, w, j);
            }
        }
    }
}

/// `out ← Σ_n P_mn x_n`.
#[inline(always)]
fn mean<T: Float, V: Vector<T>>(out: &mut [T], band: &Band<T>, x: &[T], q: usize, m: usize) {
    let (points, count) = band.cell(q, m);
    out.fill(T::ZERO);
    for n in points {
        add::<T, V>(out, band.part(x, n), T::ONE);
    }
    let count = V::splat(T::of(count));
    for j in (0..out.len()).step_by(LANES) {
        put(get::<T, V>(out, j, T::ZERO) / count, out, j);
    }
}

struct Forward<'a, T> {
    band: Band<'a, T>,
    /// The points of the band or, if `return_centers`, its centres.
    out: ColumnsMut<'a, T>,
    return_centers: bool,
    /// `(ŝ, a)` of every point.
    assigned: ColumnsMut<'a, T>,
    /// `(g, Z)` of every centre of every region.
    clusters: ColumnsMut<'a, T>,
}

impl<T: Float> Kernel<T> for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let Forward { band, mut out, return_centers, mut assigned, mut clusters } = self;
        let (sizes, m, dim) = (band.sizes, band.sizes.clusters(), band.sizes.dim);
        let (alpha, beta, one) = (T::from_f64(sizes.alpha), T::from_f64(sizes.beta), V::splat(T::ONE));
        let [rows, cols] = band.region();
        let mut centers = Centers::new(sizes);
        let mut similar = Buffer::<T>::scratch(rows * cols * m);
        for q in 0..sizes.folds[1] {
            centers.find::<V>(&band, q);
            // t_mn = β + α w_m·u_n, s = σ(t)
            for (n, t) in band.points(q).zip(similar.chunks_exact_mut(m)) {
                let f = band.part(band.f, n);
                let norm = norm::<T, V>(f);
                for (t, w) in t.iter_mut().zip(centers.w.chunks_exact(dim)) {
                    *t = alpha.fused(product::<T, V>(f, w) / norm, beta);
                }
            }
            for j in (0..similar.len()).step_by(LANES) {
                let t = get::<T, V>(&similar, j, T::ZERO);
                put(one / (one + (-t).exp()), &mut similar, j);
            }
            // g = c^v + Σ ŝ v, Z = 1 + Σ ŝ
            for i in 0..m {
                let (g, z) = clusters.row(q * m + i).split_at_mut(dim);
                mean::<T, V>(g, &band, band.v, q, i);
                z[0] = T::ONE;
            }
            for (n, s) in band.points(q).zip(similar.chunks_exact(m)) {
                let (mut a, mut best) = (0, s[0]);
                for (i, &s) in s.iter().enumerate().skip(1) {
                    if s > best {
                        (a, best) = (i, s);
                    }
                }
                assigned.row(n).copy_from_slice(&[best, T::of(a)]);
                let (g, z) = clusters.row(q * m + a).split_at_mut(dim);
                add::<T, V>(g, band.part(band.v, n), best);
                z[0] += if sizes.count { T::ONE } else { best };
            }
            for i in 0..m {
                let (g, z) = clusters.row(q * m + i).split_at_mut(dim);
                let z = V::splat(z[0]);
                for j in (0..dim).step_by(LANES) {
                    put(get::<T, V>(g, j, T::ZERO) / z, g, j);
                }
                if return_centers {
                    out.row(center_row(sizes, q, i)).copy_from_slice(g);
                }
            }
            if return_centers {
                continue;
            }
            // o = ŝ g
            for n in band.points(q) {
                let (s, a) = chosen(assigned.row(n));
                scaled::<T, V>(out.row(n), &clusters.row(q * m + a)[..dim], s);
            }
        }
    }
}

/// Where centre `i` of region `q` lies among the centres of its band, the regions side by side.
fn center_row(sizes: Sizes, q: usize, i: usize) -> usize {
    let [_, across] = sizes.centers;
    (i / across * sizes.folds[1] + q) * across + i % across
}

/// `(ŝ, a)`, the second as an index.
#[inline(always)]
fn chosen<T: Float>(pair: &[T]) -> (T, usize) {
    (pair[0], pair[1].to_f64() as usize)
}

/// Forward: `out` is `[points, heads · d]`, or with `return_centers` the same for the map of all centres. `assigned` `[points, 2 · heads]`
/// gets `(ŝ, a)` and `clusters` ([`Sizes::clusters_len`]) `(g, Z)`.
pub fn forward<T: Float>(out: &mut [T], assigned: &mut [T], clusters: &mut [T], f: &[T], v: &[T], sizes: Sizes, return_centers: bool) {
    let Sizes { batch, heads, dim, folds, .. } = sizes;
    let regions = batch * folds[0] * folds[1];
    let places = if return_centers { regions * sizes.clusters() } else { sizes.points() };
    assert!(out.len() == places * heads * dim && assigned.len() == sizes.points() * 2 * heads);
    assert!(f.len() == sizes.points() * heads * dim && v.len() == f.len() && clusters.len() == sizes.clusters_len());
    if sizes.is_empty() {
        return;
    }
    count_flops(sizes.flops(return_centers));
    let (out, assigned) = (ColumnsMut::new(out, heads * dim), ColumnsMut::new(assigned, 2 * heads));
    par_blocks([out, assigned], [ColumnsMut::new(clusters, dim + 1)], batch * folds[0], heads, |b, head, [out, assigned], [clusters]| {
        T::dispatch(Forward { band: Band::new(sizes, f, v, b, head), out, return_centers, assigned, clusters });
    });
}

/// The gradient of the output: of the points, or of the centres.
#[derive(Clone, Copy)]
pub enum Upstream<'a, T> {
    /// `do` of every point.
    Points(&'a [T]),
    /// `dg` of every centre.
    Centers(&'a [T]),
}

struct Backward<'a, T> {
    band: Band<'a, T>,
    index: usize,
    df: ColumnsMut<'a, T>,
    dv: ColumnsMut<'a, T>,
    /// `ᾱ`, `β̄`.
    sums: &'a mut [T],
    upstream: Upstream<'a, T>,
    assigned: &'a [T],
    clusters: &'a [T],
}

impl<T: Float> Kernel<T> for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let Backward { band, index, mut df, mut dv, sums, upstream, assigned, clusters } = self;
        let (sizes, m, dim) = (band.sizes, band.sizes.clusters(), band.sizes.dim);
        let alpha = T::from_f64(sizes.alpha);
        let at = |n: usize| chosen(&assigned[((band.first + n) * sizes.heads + band.head) * 2..][..2]);
        let own = sizes.folds[1] * m * (dim + 1);
        let clusters = &clusters[(index * sizes.heads + band.head) * own..][..own];
        let mut centers = Centers::new(sizes);
        let mut grads = [0; 2].map(|_| Buffer::<T>::scratch(m * dim));
        let [r, dc] = &mut grads;
        let (mut d_alpha, mut d_beta) = (0.0, 0.0);
        for q in 0..sizes.folds[1] {
            centers.find::<V>(&band, q);
            let cluster = |i: usize| clusters[(q * m + i) * (dim + 1)..][..dim + 1].split_at(dim);
            // ḡ_m = Σ ŝ_n ō_n, r_m = ḡ_m/Z_m
            r.fill(T::ZERO);
            match upstream {
                Upstream::Points(d) => {
                    for n in band.points(q) {
                        let (s, a) = at(n);
                        add::<T, V>(&mut r[a * dim..(a + 1) * dim], band.part(d, n), s);
                    }
                }
                Upstream::Centers(d) => {
                    for (i, r) in r.chunks_exact_mut(dim).enumerate() {
                        let row = index * sizes.folds[1] * m + center_row(sizes, q, i);
                        r.copy_from_slice(&d[(row * sizes.heads + band.head) * dim..][..dim]);
                    }
                }
            }
            for (i, r) in r.chunks_exact_mut(dim).enumerate() {
                let z = V::splat(cluster(i).1[0]);
                for j in (0..dim).step_by(LANES) {
                    put(get::<T, V>(r, j, T::ZERO) / z, r, j);
                }
            }
            dc.fill(T::ZERO);
            for n in band.points(q) {
                let (s, a) = at(n);
                let (r, w, g) = (&r[a * dim..(a + 1) * dim], &centers.w[a * dim..(a + 1) * dim], cluster(a).0);
                // v̄_n = ŝ_n r_a + …
                scaled::<T, V>(dv.row(n), r, s);
                // ŝ̄_n = g_a·ō_n + (v_n − g_a)·r_a
                let mut ds = product::<T, V>(band.part(band.v, n), r);
                if !sizes.count {
                    ds -= product::<T, V>(g, r);
                }
                if let Upstream::Points(d) = upstream {
                    ds += product::<T, V>(g, band.part(d, n));
                }
                let dt = ds * s * (T::ONE - s);
                let f = band.part(band.f, n);
                let size = norm::<T, V>(f);
                let cosine = product::<T, V>(f, w) / size;
                d_beta += dt.to_f64();
                d_alpha += (dt * cosine).to_f64();
                // f̄_n = κ (w_a − u_n (u_n·w_a))/‖f_n‖ + …, w̄_a += κ u_n
                let kappa = alpha * dt;
                let to_f = df.row(n);
                scaled::<T, V>(to_f, w, kappa / size);
                if size > T::from_f64(EPS) {
                    add::<T, V>(to_f, f, T::ZERO - kappa * cosine / (size * size));
                }
                add::<T, V>(&mut dc[a * dim..(a + 1) * dim], f, kappa / size);
            }
            for i in 0..m {
                // c̄_m = (w̄_m − w_m (w_m·w̄_m))/‖c_m‖
                let (dc, w, norm) = (&mut dc[i * dim..(i + 1) * dim], &centers.w[i * dim..(i + 1) * dim], centers.norms[i]);
                if norm > T::from_f64(EPS) {
                    let along = product::<T, V>(w, dc);
                    add::<T, V>(dc, w, T::ZERO - along);
                }
                // … + Σ_m P_mn r_m, … + Σ_m P_mn c̄_m
                let (points, count) = band.cell(q, i);
                let share = T::ONE / T::of(count);
                for n in points {
                    add::<T, V>(dv.row(n), &r[i * dim..(i + 1) * dim], share);
                    add::<T, V>(df.row(n), dc, share / norm);
                }
            }
        }
        sums.copy_from_slice(&[T::from_f64(d_alpha), T::from_f64(d_beta)]);
    }
}

/// Backward: writes `df` and `dv` `[points, heads · d]`; returns `ᾱ` and `β̄`.
#[allow(clippy::too_many_arguments)]
pub fn backward<T: Float>(
    df: &mut [T],
    dv: &mut [T],
    upstream: Upstream<T>,
    assigned: &[T],
    clusters: &[T],
    f: &[T],
    v: &[T],
    sizes: Sizes,
) -> [T; 2] {
    let Sizes { batch, heads, dim, folds, .. } = sizes;
    assert!(df.len() == sizes.points() * heads * dim && dv.len() == df.len() && f.len() == df.len() && v.len() == df.len());
    assert!(assigned.len() == sizes.points() * 2 * heads && clusters.len() == sizes.clusters_len());
    if sizes.is_empty() {
        return [T::ZERO; 2];
    }
    let mut sums = Buffer::<T>::scratch(batch * folds[0] * heads * 2);
    let stack = ColumnsMut::new(&mut sums, 2);
    let (df, dv) = (ColumnsMut::new(df, heads * dim), ColumnsMut::new(dv, heads * dim));
    par_blocks([df, dv], [stack], batch * folds[0], heads, |index, head, [df, dv], [mut sums]| {
        let band = Band::new(sizes, f, v, index, head);
        T::dispatch(Backward { band, index, df, dv, sums: sums.row(0), upstream, assigned, clusters });
    });
    let total = |i: usize| T::from_f64(sums.chunks_exact(2).fold(0.0, |sum, pair| sum + pair[i].to_f64()));
    [total(0), total(1)]
}
