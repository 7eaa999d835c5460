//! `nn.beit_rel_pos_resize`: a relative position table for another grid (BEiT, arXiv 2106.08254), at load time.
//!
//! Near offsets keep their scale, far ones are stretched geometrically: the old offsets are put at 0, ±1, ±(1 + q), ±(1 + q + q²), …,
//! with q such that the last one reaches the border of the new grid; between them a tensor-product cubic spline with not-a-knot ends
//! (FITPACK's without smoothing) is evaluated at the new integral offsets, which are clamped to the range of the old. The three entries
//! of the class token are copied. q is bisected between 1.01 and 1.5 as the released code does it, last midpoint included.

use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// Largest side of a grid.
const MOST: usize = 256;

/// The places of `count` old offsets on each side of 0, stretched to reach `border`; in ascending order.
fn places(count: usize, border: usize) -> Vec<f64> {
    let (mut left, mut right, mut q) = (1.01, 1.5, 1.5);
    while right - left > 1e-6 {
        q = (left + right) / 2.0;
        let reach = (1.0 - libm::pow(q, count as f64)) / (1.0 - q);
        if reach > border as f64 { right = q } else { left = q }
    }
    let (mut at, mut step) = (0.0, 1.0);
    let mut places = vec![0.0];
    for _ in 0..count {
        at += step;
        step *= q;
        places.push(at);
        places.insert(0, -at);
    }
    places
}

/// The matrix `[targets, places]` of cubic spline interpolation with not-a-knot ends: at least 4 places, ascending.
fn spline(places: &[f64], targets: &[f64]) -> Vec<f64> {
    let n = places.len();
    let h: Vec<f64> = places.windows(2).map(|w| w[1] - w[0]).collect();
    // Rows [A | B]: A M = B y for the second derivatives M.
    let mut rows = vec![vec![0.0; 2 * n]; n];
    for i in 1..n - 1 {
        let row = &mut rows[i];
        (row[i - 1], row[i], row[i + 1]) = (h[i - 1], 2.0 * (h[i - 1] + h[i]), h[i]);
        (row[n + i - 1], row[n + i + 1]) = (6.0 / h[i - 1], 6.0 / h[i]);
        row[n + i] = -row[n + i - 1] - row[n + i + 1];
    }
    (rows[0][0], rows[0][1], rows[0][2]) = (h[1], -h[0] - h[1], h[0]);
    let (a, b) = (h[n - 3], h[n - 2]);
    (rows[n - 1][n - 3], rows[n - 1][n - 2], rows[n - 1][n - 1]) = (b, -a - b, a);
    // Gauss-Jordan with pivots: the right half becomes A⁻¹ B.
    for k in 0..n {
        let pivot = (k..n).max_by(|&i, &j| rows[i][k].abs().total_cmp(&rows[j][k].abs())).unwrap_or(k);
        rows.swap(k, pivot);
        let lead = rows[k][k];
        rows[k].iter_mut().for_each(|x| *x /= lead);
        let row = rows[k].clone();
        for (i, other) in rows.iter_mut().enumerate() {
            let factor = other[k];
            if i != k && factor != 0.0 {
                other.iter_mut().zip(&row).for_each(|(x, y)| *x -= factor * y);
            }
        }
    }
    let mut matrix = vec![0.0; targets.len() * n];
    for (out, &t) in matrix.chunks_exact_mut(n).zip(targets) {
        let t = t.clamp(places[0], places[n - 1]);
        let i = places[1..n - 1].iter().filter(|&&p| p <= t).count();
        let (a, b) = ((places[i + 1] - t) / h[i], (t - places[i]) / h[i]);
        out[i] += a;
        out[i + 1] += b;
        let (ca, cb) = ((a * a * a - a) * h[i] * h[i] / 6.0, (b * b * b - b) * h[i] * h[i] / 6.0);
        for (j, x) in out.iter_mut().enumerate() {
            *x += ca * rows[i][n + j] + cb * rows[i + 1][n + j];
        }
    }
    matrix
}

/// The table `[(2·new − 1)² + 3, h]` made of `table` `[(2·old − 1)² + 3, h]`.
pub fn resize<T: Float>(table: &Tensor<T>, old: usize, new: usize) -> Result<Tensor<T>> {
    for (key, side) in [("old_window", old), ("new_window", new)] {
        if !(3..=MOST).contains(&side) {
            return Err(Error::config(key, format!("expected a side from 3 to {MOST}, found {side}")));
        }
    }
    let [rows, heads] = table.dims("table")?;
    let (s, d) = (2 * old - 1, 2 * new - 1);
    if rows != s * s + 3 {
        return Err(Error::shape("table", format!("[{}, heads]", s * s + 3), table.shape()));
    }
    if s == d {
        return Ok(table.clone());
    }
    let border = (d / 2) as isize;
    let targets: Vec<f64> = (-border..=border).map(|t| t as f64).collect();
    let matrix = spline(&places(s / 2, d / 2), &targets);
    let mut out = Tensor::scratch([d * d + 3, heads]);
    for a in 0..heads {
        let at = |i: usize| table.data()[i * heads + a].to_f64();
        let along = |x: &dyn Fn(usize) -> f64, weights: &[f64]| weights.iter().enumerate().fold(0.0, |sum, (i, w)| sum + w * x(i));
        // Along x, then along y.
        let lines: Vec<f64> = (0..s * d).map(|k| along(&|i| at(k / d * s + i), &matrix[k % d * s..(k % d + 1) * s])).collect();
        for k in 0..d * d {
            let (y, x) = (k / d, k % d);
            out.data_mut()[k * heads + a] = T::from_f64(along(&|i| lines[i * d + x], &matrix[y * s..(y + 1) * s]));
        }
        for class in 0..3 {
            out.data_mut()[(d * d + class) * heads + a] = table.data()[(s * s + class) * heads + a];
        }
    }
    Ok(out)
}

/// `nn.beit_rel_pos_resize`.
pub struct RelPosResize;

impl Operation for RelPosResize {
    const NAME: &'static str = "nn.beit_rel_pos_resize";
    const PAPER: &'static str = "2106.08254 BEiT";
    const DATA: &'static [&'static str] = &["table"];

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("old_window", rng.between(3, 7)).set("new_window", rng.between(3, 9));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (span, heads) = (2 * config.positive("old_window")? - 1, draw.rng.between(1, 3));
        draw.normal("table", [span * span + 3, heads]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let table = resize(&run.input("table")?, config.positive("old_window")?, config.positive("new_window")?)?;
        run.output("table", &table);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cubic is its own spline, at any places.
    #[test]
    fn cubics_are_kept() {
        let places = places(4, 9);
        let cubic = |x: f64| 0.3 * x * x * x - x * x + 2.0 * x - 5.0;
        let targets: Vec<f64> = (-8..=8).map(|t| f64::from(t) * 0.9).collect();
        let matrix = spline(&places, &targets);
        for (row, t) in matrix.chunks_exact(places.len()).zip(&targets) {
            let found: f64 = row.iter().zip(&places).map(|(w, &p)| w * cubic(p)).sum();
            let t = t.clamp(places[0], places[places.len() - 1]);
            assert!((found - cubic(t)).abs() < 1e-9, "{found} instead of {}", cubic(t));
        }
    }
}
