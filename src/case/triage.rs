//! A guess at why a result is wrong, from the shape of its error.

use serde_json::Value as Json;

use super::compare::unravel;
use super::config::Config;

/// Whether a guess at the result (a function of the position) leaves next to nothing of the error.
type Fits<'a> = dyn Fn(&dyn Fn(usize) -> f64) -> bool + 'a;

/// The likely cause of the difference between an answer and a result of the same shape; `tolerance` is the absolute error
/// that would have passed. `None` if nothing fits.
pub fn cause(expected: &[f64], got: &[f64], shape: &[usize], tolerance: f64, config: &Config) -> Option<String> {
    let wrong: Vec<usize> = (0..expected.len()).filter(|&i| !close(got[i], expected[i], tolerance)).collect();
    let infinite = got.iter().zip(expected).filter(|(a, r)| !a.is_finite() && r.is_finite()).count();
    let place = confinement(shape, &wrong, config);
    if infinite > 0 {
        let place = place.map(|text| format!("; errors {text}")).unwrap_or_default();
        return Some(format!("{infinite} of {} elements are NaN or infinite{place}", got.len()));
    }
    if expected.iter().any(|r| !r.is_finite()) {
        return place.map(|text| format!("errors {text}"));
    }
    if got.iter().all(|&a| a == 0.0) {
        return Some("all zero: nothing was computed or added up here".into());
    }
    let largest = expected.iter().zip(got).fold(0.0f64, |m, (r, a)| m.max((a - r).abs()));
    // A simple cause leaves next to nothing of the error.
    let rest = (2.0 * tolerance).max(0.005 * largest);
    let fits = |f: &dyn Fn(usize) -> f64| (0..expected.len()).all(|i| close(got[i], f(i), rest));
    // Few elements fit too much, and a small error anything.
    if expected.len() >= 2 && largest > rest {
        if let Some(text) = factor(expected, got, shape, &fits, config) {
            return Some(text);
        }
        if let Some((i, j)) = swapped_axes(expected, got, shape, rest) {
            return Some(format!("axes {i} and {j} are swapped"));
        }
        if let Some((axis, by)) = shifted(expected, got, shape, rest) {
            return Some(format!("shifted by {by} along axis {axis}"));
        }
        if let Some(text) = offset(expected, got, shape, &fits) {
            return Some(text);
        }
    }
    if let Some(text) = place {
        return Some(format!("errors {text}"));
    }
    if expected.len() >= 4 && same_values(expected, got, rest) {
        return Some("the right values in another order".into());
    }
    let relative = largest / expected.iter().fold(1e-30f64, |m, r| m.max(r.abs()));
    match relative {
        r if r < 1e-6 && tolerance / largest < 0.5 => {
            Some("the size of f32 rounding: something was computed in single precision, or another eps".into())
        }
        r if r < 2e-3 && tolerance > 0.0 => Some("small everywhere: an approximation (GELU by tanh, bf16) or another eps".into()),
        _ => None,
    }
}

/// The likely cause of a result with another shape than its answer.
pub fn shape_cause(expected: &[f64], expected_shape: &[usize], got: &[f64], got_shape: &[usize]) -> Option<String> {
    if expected.len() != got.len() || expected.is_empty() {
        return None;
    }
    let tolerance = 1e-4 * expected.iter().filter(|r| r.is_finite()).fold(0.0f64, |m, r| m.max(r.abs()));
    if expected.iter().zip(got).all(|(&r, &a)| close(a, r, tolerance)) {
        return Some("the right values in the right order, under another shape".into());
    }
    let (i, j) = swapped_axes(expected, got, expected_shape, tolerance)?;
    let mut swapped = expected_shape.to_vec();
    swapped.swap(i, j);
    (swapped == got_shape).then(|| format!("axes {i} and {j} are swapped"))
}

fn close(a: f64, r: f64, tolerance: f64) -> bool {
    a == r || (a - r).abs() <= tolerance
}

/// A constant factor, by name if it has one.
fn factor(expected: &[f64], got: &[f64], shape: &[usize], fits: &Fits, config: &Config) -> Option<String> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let square = dot(expected, expected);
    let c = dot(expected, got) / square;
    if square == 0.0 || c.abs() < 1e-6 || (c - 1.0).abs() < 1e-6 || !fits(&|i| c * expected[i]) {
        return None;
    }
    let near = |x: f64| (c.abs() / x - 1.0).abs() < 1e-3;
    let sign = if c < 0.0 { "the sign is wrong, " } else { "" };
    if c < 0.0 && near(1.0) {
        return Some("the sign is wrong".into());
    }
    for (value, text) in [(2.0, "twice what it should be"), (0.5, "half of what it should be")] {
        if near(value) {
            return Some(format!("{sign}{text}"));
        }
    }
    for (n, name) in sizes(shape, config) {
        let root = n.sqrt();
        for (value, text) in
            [(root, format!("√{name}")), (1.0 / root, format!("1/√{name}")), (n, name.clone()), (1.0 / n, format!("1/{name}"))]
        {
            if near(value) {
                return Some(format!("{sign}a constant factor {c:.6}, which is {text} = {value:.6}"));
            }
        }
    }
    Some(format!("{sign}a constant factor {c:.6}"))
}

/// The sizes that a forgotten factor may come from: a head width, integers of the configuration, the shape.
fn sizes(shape: &[usize], config: &Config) -> Vec<(f64, String)> {
    let mut named = Vec::new();
    for key in config.keys() {
        match config.get(key) {
            Some(Json::Array(list)) => named.extend(list.iter().filter_map(Json::as_u64).map(|n| (n, key.to_string()))),
            Some(one) => named.extend(one.as_u64().map(|n| (n, key.to_string()))),
            None => {}
        }
    }
    named.retain(|(n, _)| *n > 1);
    // A head width is the usual suspect, so it comes first.
    let mut all = Vec::new();
    for (a, a_name) in named.iter().filter(|(_, name)| ["dim", "channels", "width"].iter().any(|kind| name.contains(kind))) {
        for (b, b_name) in named.iter().filter(|(_, name)| name.contains("heads")) {
            if a > b && a % b == 0 {
                all.push((a / b, format!("({a_name}/{b_name})")));
            }
        }
    }
    named.extend(shape.iter().enumerate().map(|(axis, &n)| (n as u64, format!("(size of axis {axis})"))));
    named.push((shape.iter().product::<usize>() as u64, "(number of elements)".into()));
    all.into_iter().chain(named).filter(|(n, _)| *n > 1).map(|(n, name)| (n as f64, name)).collect()
}

/// Two axes whose exchange turns the answer into the result, or a result that was reshaped where it should have been transposed.
fn swapped_axes(expected: &[f64], got: &[f64], shape: &[usize], tolerance: f64) -> Option<(usize, usize)> {
    for i in 0..shape.len() {
        for j in i + 1..shape.len() {
            if shape[i] < 2 || shape[j] < 2 {
                continue;
            }
            let mut swapped = shape.to_vec();
            swapped.swap(i, j);
            let source = |position: usize| {
                let mut index = unravel(position, &swapped);
                index.swap(i, j);
                index.iter().zip(shape).fold(0, |p, (&x, &dim)| p * dim + x)
            };
            if (0..expected.len()).all(|p| close(got[p], expected[source(p)], tolerance)) {
                return Some((i, j));
            }
        }
    }
    None
}

/// An axis along which the result is the answer moved by one place. The ends are not looked at: they may wrap or not.
fn shifted(expected: &[f64], got: &[f64], shape: &[usize], tolerance: f64) -> Option<(usize, i64)> {
    for (axis, &dim) in shape.iter().enumerate() {
        let stride: usize = shape[axis + 1..].iter().product();
        if dim < 3 || got.len() < 6 {
            continue;
        }
        let inner = |p: &usize| p / stride % dim >= 1;
        let moved = |to: usize, from: usize| close(got[to], expected[from], tolerance);
        if (0..got.len()).filter(inner).all(|p| moved(p, p - stride)) {
            return Some((axis, 1));
        }
        if (0..got.len()).filter(inner).all(|p| moved(p - stride, p)) {
            return Some((axis, -1));
        }
    }
    None
}

/// A constant that was added to all elements, or to every row alike: a bias.
fn offset(expected: &[f64], got: &[f64], shape: &[usize], fits: &Fits) -> Option<String> {
    let by = got[0] - expected[0];
    if fits(&|i| expected[i] + by) {
        return Some(format!("a constant {by:.6} too much everywhere"));
    }
    let &columns = shape.last()?;
    let rows = expected.len() / columns.max(1);
    (rows >= 3 && fits(&|i| expected[i] + got[i % columns] - expected[i % columns]))
        .then(|| "every row is off by the same vector: a bias".to_string())
}

fn same_values(expected: &[f64], got: &[f64], tolerance: f64) -> bool {
    let sorted = |values: &[f64]| {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        values
    };
    sorted(expected).iter().zip(sorted(got)).all(|(&r, a)| close(a, r, tolerance))
}

/// Where the wrong elements (row-major positions) lie, if that is one part of an axis: a head, a tail, some rows.
pub(super) fn confinement(shape: &[usize], wrong: &[usize], config: &Config) -> Option<String> {
    let total: usize = shape.iter().product();
    if wrong.is_empty() || wrong.len() == total {
        return None;
    }
    // How many of the elements of each slice are wrong.
    let slices: Vec<Vec<usize>> = shape
        .iter()
        .enumerate()
        .map(|(axis, &dim)| {
            let stride: usize = shape[axis + 1..].iter().product();
            let mut counts = vec![0; dim];
            for &p in wrong {
                counts[p / stride % dim] += 1;
            }
            counts
        })
        .collect();
    let touched = |axis: usize| -> Vec<usize> { (0..shape[axis]).filter(|&i| slices[axis][i] > 0).collect() };
    if wrong.len() == 1 {
        return Some(format!("only at {:?}", unravel(wrong[0], shape)));
    }
    let last = shape.len() - 1;
    for axis in 0..shape.len() {
        if let ([only], true) = (&touched(axis)[..], shape[axis] > 1) {
            let hint = match axis {
                a if a == last => "one channel",
                0 => "one sample or window",
                1 if shape.len() == 4 => "one head",
                _ if *only == 0 => "the first token",
                _ => "one head, window or token",
            };
            return Some(format!("only at index {only} of axis {axis} ({hint})"));
        }
    }
    let columns = touched(last);
    if let Some((heads, block)) = config
        .get("num_heads")
        .or(config.get("heads"))
        .and_then(Json::as_u64)
        .and_then(|h| Some((h as usize, shape[last].checked_div(h as usize)?)))
        && heads > 1
        && block * heads == shape[last]
        && columns[0] / block == columns[columns.len() - 1] / block
    {
        return Some(format!("only in columns of head {} of {heads}", columns[0] / block));
    }
    for axis in (0..shape.len()).rev() {
        let (touched, dim) = (touched(axis), shape[axis]);
        let (first, end) = (touched[0], touched[touched.len() - 1] + 1);
        let dense = end - first == touched.len();
        if touched.len() == dim {
            continue;
        }
        let what = if axis == last { "columns".into() } else { format!("slices along axis {axis}") };
        return Some(match (first, end) {
            _ if dense && end == dim => format!("only in the last {} of {dim} {what}: a tail", touched.len()),
            (0, _) if dense => format!("only in the first {end} of {dim} {what}"),
            _ if dense => format!("only in {what} {first}..{end} of {dim}"),
            _ => format!("only in {} of {dim} {what}", touched.len()),
        });
    }
    // Whole rows, scattered over the leading axes: masked or padded tokens.
    let rows = total / shape[last];
    let mut touched_rows: Vec<usize> = wrong.iter().map(|p| p / shape[last]).collect();
    touched_rows.dedup();
    (touched_rows.len() * 2 <= rows).then(|| format!("only in {} of {rows} rows (masked or padded tokens?)", touched_rows.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::random::{Purpose, Rng};

    fn answer(shape: &[usize]) -> Vec<f64> {
        let mut rng = Rng::new(5, Purpose::Case, 0, 0);
        (0..shape.iter().product()).map(|_| rng.normal()).collect()
    }

    /// What triage says about `spoil(answer)`.
    fn guess(shape: &[usize], spoil: impl Fn(&mut Vec<f64>)) -> String {
        let expected = answer(shape);
        let mut got = expected.clone();
        // Rounding noise must not hide the cause.
        got.iter_mut().enumerate().for_each(|(i, x)| *x *= 1.0 + 1e-7 * (i as f64).sin());
        spoil(&mut got);
        let config = Config::parse(r#"{"dim": 32, "num_heads": 4}"#).unwrap();
        cause(&expected, &got, shape, 1e-5, &config).unwrap_or_default()
    }

    #[test]
    fn factors_and_signs() {
        let shape = [3, 7, 5];
        assert_eq!(guess(&shape, |a| a.iter_mut().for_each(|x| *x = -*x)), "the sign is wrong");
        assert!(guess(&shape, |a| a.iter_mut().for_each(|x| *x *= 8f64.sqrt())).contains("√(dim/num_heads)"));
        assert!(guess(&shape, |a| a.iter_mut().for_each(|x| *x /= 32f64.sqrt())).contains("1/√dim"));
        assert!(guess(&shape, |a| a.iter_mut().for_each(|x| *x /= -7.0)).contains("1/(size of axis 1)"));
        assert_eq!(guess(&shape, |a| a.iter_mut().for_each(|x| *x *= -2.0)), "the sign is wrong, twice what it should be");
        assert_eq!(guess(&shape, |a| a.iter_mut().for_each(|x| *x *= 0.5)), "half of what it should be");
        assert!(guess(&shape, |a| a.iter_mut().for_each(|x| *x *= 1.2345)).contains("1.2345"));
        assert_eq!(guess(&shape, |a| a.iter_mut().for_each(|x| *x *= 1.0005)), "a constant factor 1.000500");
        assert!(guess(&shape, |a| a.fill(0.0)).starts_with("all zero"));
    }

    #[test]
    fn order_of_elements() {
        let shape = [2, 5, 5];
        let swap = |a: &mut Vec<f64>| {
            let old = a.clone();
            for (b, i, j) in (0..2).flat_map(|b| (0..5).flat_map(move |i| (0..5).map(move |j| (b, i, j)))) {
                a[b * 25 + i * 5 + j] = old[b * 25 + j * 5 + i];
            }
        };
        assert_eq!(guess(&shape, swap), "axes 1 and 2 are swapped");
        assert_eq!(guess(&[6, 4], |a| a.rotate_right(4)), "shifted by 1 along axis 0");
        assert_eq!(guess(&[6, 4], |a| a.chunks_mut(4).for_each(|row| row.rotate_left(1))), "shifted by -1 along axis 1");
        assert_eq!(guess(&[6, 4], |a| a.reverse()), "the right values in another order");
        let (r, shape) = (answer(&[3, 4]), [3, 4]);
        let transposed: Vec<f64> = (0..12).map(|p| r[p % 3 * 4 + p / 3]).collect();
        assert_eq!(shape_cause(&r, &shape, &transposed, &[4, 3]).unwrap(), "axes 0 and 1 are swapped");
        assert_eq!(cause(&r, &transposed, &shape, 1e-6, &Config::default()).unwrap(), "axes 0 and 1 are swapped");
        assert!(shape_cause(&r, &shape, &r, &[12]).unwrap().contains("another shape"));
        assert_eq!(shape_cause(&r, &shape, &r[..6], &[6]), None);
    }

    #[test]
    fn parts_that_are_wrong() {
        let bump = |which: fn(usize) -> bool| {
            move |a: &mut Vec<f64>| (0..a.len()).filter(|&i| which(i)).for_each(|i| a[i] += (i as f64 + 0.3).cos())
        };
        assert_eq!(guess(&[2, 4, 3, 8], bump(|i| i / 24 % 4 == 2)), "errors only at index 2 of axis 1 (one head)");
        assert_eq!(guess(&[2, 5, 32], bump(|i| (8..16).contains(&(i % 32)))), "errors only in columns of head 1 of 4");
        assert_eq!(guess(&[9, 19], bump(|i| i % 19 >= 16)), "errors only in the last 3 of 19 columns: a tail");
        assert_eq!(guess(&[9, 19], bump(|i| matches!(i / 19, 2 | 5))), "errors only in 2 of 9 slices along axis 0");
        assert_eq!(guess(&[3, 4, 7], bump(|i| matches!(i / 7, 1 | 6 | 8 | 11))), "errors only in 4 of 12 rows (masked or padded tokens?)");
        assert_eq!(guess(&[9, 19], bump(|i| i == 20)), "errors only at [1, 1]");
        assert!(guess(&[9, 19], |a| a[3] = f64::NAN).starts_with("1 of 171 elements are NaN"));
        assert!(guess(&[9, 19], |a| a.iter_mut().enumerate().for_each(|(i, x)| *x += (i % 19) as f64)).ends_with("a bias"));
        assert!(guess(&[9, 19], |a| a.iter_mut().for_each(|x| *x += 0.25)).contains("0.25"));
    }

    #[test]
    fn no_cause_is_made_up() {
        assert_eq!(guess(&[9, 19], |a| a.iter_mut().enumerate().for_each(|(i, x)| *x += (7.3 * i as f64).sin())), "");
        assert_eq!(cause(&[2.0], &[5.0], &[1], 1e-9, &Config::default()), None);
        assert_eq!(cause(&[2.0], &[5.0], &[], 1e-9, &Config::default()), None);
        // Just beyond what passes: a factor next to 1 would fit, as anything does.
        let r = answer(&[9, 19]);
        let error = |i: usize, x: f64| 1.4e-5 * (0.7 * (7.3 * i as f64).sin() + 0.3 * x.signum());
        let a: Vec<f64> = r.iter().enumerate().map(|(i, x)| x + error(i, *x)).collect();
        let said = cause(&r, &a, &[9, 19], 1e-5, &Config::default()).unwrap_or_default();
        assert!(!said.contains("factor") && !said.contains("sign"), "{said}");
    }
}
