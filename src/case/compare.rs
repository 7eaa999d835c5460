//! How far a result is from its answer, and whether that is too far (the rule of `specs/README.md`).
//!
//! A float result `a` is measured against its answer `r` by `err = max|a − r| / max(max|r|, 1e-30)`; integers must be equal.

use serde_json::{Value as Json, json};

use super::config::Config;
use super::format::Element;
use super::op::Value;
use super::triage;
use crate::tensor::Float;

/// How large an error may be, and why.
#[derive(Clone, Debug)]
pub struct Bound {
    /// The largest error that passes: normwise relative, or absolute for a gradient that has to be zero.
    pub value: f64,
    /// Where the number comes from.
    pub origin: String,
}

impl Bound {
    /// The bound of the format for one tensor of the answer.
    pub fn of_format(name: &str, element: Element) -> Bound {
        let (value, what) = match (element, name.starts_with("grad.")) {
            (Element::F64, _) => (1e-9, "f64"),
            (_, false) => (2e-5, "f32 outputs"),
            (_, true) => (1e-4, "f32 gradients"),
        };
        Bound { value, origin: format!("the format's bound for {what}") }
    }

    /// The bound of the format for gradients that are zero in exact arithmetic; `largest` is the largest gradient of the case.
    pub fn of_zero_gradient(element: Element, largest: f64) -> Bound {
        let factor = if element == Element::F64 { 1e-11 } else { 1e-5 };
        let origin = format!("a gradient that is zero in exact arithmetic: {factor:e} of the largest gradient, at least 1");
        Bound { value: factor * largest.max(1.0), origin }
    }
}

/// The element with the largest error.
#[derive(Clone, Debug)]
pub struct Worst {
    /// Its index.
    pub index: Vec<usize>,
    /// The answer.
    pub expected: f64,
    /// The result.
    pub got: f64,
}

/// What the comparison of one tensor found.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The tensor, as the case names it.
    pub name: String,
    /// Whether the result is good.
    pub passed: bool,
    /// `max|a − r|`; NaN if there is nothing to compare or a result is not a number.
    pub max_abs: f64,
    /// `max|a − r| / max|r|`, which the bound limits (for gradients that have to be zero, `max|a|`).
    pub error: f64,
    /// The error of the worst element in units in the last place of the answer, in the precision compared.
    pub ulps: f64,
    /// The worst element, if any element differs.
    pub worst: Option<Worst>,
    /// What the error is allowed to be.
    pub bound: Bound,
    /// What keeps the two from being compared: a missing tensor, another shape.
    pub problem: Option<String>,
    /// A guess at the cause of a failure.
    pub cause: Option<String>,
}

impl Finding {
    fn new(name: &str, bound: Bound) -> Finding {
        Finding { name: name.into(), passed: true, max_abs: 0.0, error: 0.0, ulps: 0.0, worst: None, bound, problem: None, cause: None }
    }

    fn fail(mut self, problem: impl Into<String>) -> Finding {
        self.problem = Some(problem.into());
        (self.passed, self.max_abs, self.error, self.ulps) = (false, f64::NAN, f64::NAN, f64::NAN);
        self
    }

    /// How bad the finding is: the error in units of the bound; infinite where nothing could be compared.
    pub fn severity(&self) -> f64 {
        match self.error / self.bound.value {
            _ if self.problem.is_some() => f64::INFINITY,
            ratio if ratio.is_nan() => {
                if self.passed {
                    0.0
                } else {
                    f64::INFINITY
                }
            }
            ratio => ratio,
        }
    }

    /// As JSON; numbers that JSON lacks are `null`.
    pub fn to_json(&self) -> Json {
        json!({
            "tensor": self.name, "passed": self.passed, "max_abs": self.max_abs, "error": self.error, "ulps": self.ulps,
            "bound": self.bound.value, "bound_origin": self.bound.origin,
            "worst": self.worst.as_ref().map(|w| json!({ "index": w.index, "expected": w.expected, "got": w.got })),
            "problem": self.problem, "cause": self.cause,
        })
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: ", self.name)?;
        if let Some(problem) = &self.problem {
            f.write_str(problem)?;
        } else {
            write!(
                f,
                "error {:.2e}, bound {:.1e} ({}); max abs {:.2e}, {:.3e} ULP",
                self.error, self.bound.value, self.bound.origin, self.max_abs, self.ulps
            )?;
        }
        if let Some(w) = &self.worst {
            write!(f, "; worst at {:?}: expected {:e}, got {:e}", w.index, w.expected, w.got)?;
        }
        if let Some(cause) = &self.cause {
            write!(f, "; {cause}")?;
        }
        Ok(())
    }
}

/// Compares one tensor of the answer with what was computed in the precision `element`.
///
/// Floats and integers may stand in for each other if their values agree: an integer answer has to be met exactly by either.
pub fn compare<T: Float>(
    name: &str,
    expected: &Value<f64>,
    got: Option<&Value<T>>,
    element: Element,
    bound: Bound,
    config: &Config,
) -> Finding {
    let exact = Bound { value: 0.0, origin: "integers have to be equal".into() };
    let finding = Finding::new(name, if matches!(expected, Value::Int(_)) { exact } else { bound });
    let Some(got) = got else { return finding.fail("no result") };
    if got.shape() != expected.shape() {
        let mut finding = finding.fail(format!("expected shape {:?}, found {:?}", expected.shape(), got.shape()));
        finding.cause = triage::shape_cause(&floats(expected), &expected.shape(), &floats(got), &got.shape());
        return finding;
    }
    let shape = expected.shape();
    let (expected_floats, got_floats) = (floats(expected), floats(got));
    match expected {
        Value::Float(_) => measure(finding, &expected_floats, &got_floats, &shape, element, config),
        Value::Int(answer) => {
            // As integers where both are: above 2^53 floats would hide a difference.
            let differs = |i: usize| match got {
                Value::Int(t) => t.data[i] != answer.data[i],
                Value::Float(t) => t.data()[i].to_f64() != answer.data[i] as f64,
            };
            count(finding, &expected_floats, &got_floats, &shape, differs)
        }
    }
}

/// Checks a gradient that is zero in exact arithmetic: `max|g|` may be as large as the bound.
pub fn compare_zero<T: Float>(name: &str, shape: &[usize], got: Option<&Value<T>>, bound: Bound) -> Finding {
    let mut finding = Finding::new(name, bound);
    let Some(got) = got else { return finding.fail("no result (a gradient of zeros is expected)") };
    if got.shape()[..] != *shape {
        return finding.fail(format!("expected shape {shape:?}, found {:?}", got.shape()));
    }
    let got = floats(got);
    if let Some(worst) = largest(got.iter().map(|x| x.abs())) {
        finding.max_abs = got[worst].abs();
        finding.error = finding.max_abs;
        finding.ulps = f64::NAN;
        finding.worst = (got[worst] != 0.0).then(|| Worst { index: unravel(worst, shape), expected: 0.0, got: got[worst] });
        finding.passed = finding.error <= finding.bound.value;
    }
    finding
}

fn measure(mut finding: Finding, expected: &[f64], got: &[f64], shape: &[usize], element: Element, config: &Config) -> Finding {
    let scale = expected.iter().filter(|r| r.is_finite()).fold(0.0f64, |m, r| m.max(r.abs())).max(1e-30);
    // An infinity in the answer (a score that is masked out) has to be met exactly.
    let differences = expected.iter().zip(got).map(|(&r, &a)| if a == r { 0.0 } else { (a - r).abs() });
    let Some(worst) = largest(differences.clone()) else { return finding };
    finding.max_abs = differences.clone().nth(worst).unwrap_or(f64::NAN);
    finding.error = finding.max_abs / scale;
    finding.ulps = if finding.max_abs == 0.0 { 0.0 } else { finding.max_abs / element.ulp(expected[worst]) };
    // A comparison with NaN is false: NaN fails.
    finding.passed = finding.error <= finding.bound.value;
    if finding.max_abs != 0.0 {
        finding.worst = Some(Worst { index: unravel(worst, shape), expected: expected[worst], got: got[worst] });
    }
    if !finding.passed {
        finding.cause = triage::cause(expected, got, shape, finding.bound.value * scale, config);
    }
    finding
}

fn count(mut finding: Finding, expected: &[f64], got: &[f64], shape: &[usize], differs: impl Fn(usize) -> bool) -> Finding {
    let wrong: Vec<usize> = (0..expected.len()).filter(|&i| differs(i)).collect();
    let Some(&first) = wrong.first() else { return finding };
    let worst = largest(wrong.iter().map(|&i| (got[i] - expected[i]).abs())).map_or(first, |at| wrong[at]);
    finding.passed = false;
    finding.max_abs = (got[worst] - expected[worst]).abs();
    finding.error = finding.max_abs / expected.iter().fold(1e-30f64, |m, r| m.max(r.abs()));
    finding.ulps = f64::NAN;
    finding.worst = Some(Worst { index: unravel(worst, shape), expected: expected[worst], got: got[worst] });
    let place = triage::confinement(shape, &wrong, &Config::default()).map(|text| format!(", {text}")).unwrap_or_default();
    finding.cause = Some(format!("{} of {} integers differ, the first at {:?}{place}", wrong.len(), expected.len(), unravel(first, shape)));
    finding
}

/// The values as f64.
fn floats<T: Float>(value: &Value<T>) -> Vec<f64> {
    match value {
        Value::Float(t) => t.data().iter().map(|x| x.to_f64()).collect(),
        Value::Int(t) => t.data.iter().map(|&x| x as f64).collect(),
    }
}

/// Where the largest value is; the first NaN, if there is one.
fn largest(values: impl Iterator<Item = f64>) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for (i, x) in values.enumerate() {
        match best {
            Some((_, b)) if b.is_nan() || (!x.is_nan() && x <= b) => {}
            _ => best = Some((i, x)),
        }
    }
    best.map(|(i, _)| i)
}

/// The index of the element at a row-major position.
pub(super) fn unravel(mut position: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (i, &dim) in index.iter_mut().zip(shape).rev() {
        *i = position % dim;
        position /= dim;
    }
    index
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{IntTensor, Tensor};

    fn float(data: &[f64]) -> Value<f64> {
        Value::Float(Tensor::new([data.len()], data).unwrap())
    }

    fn ints(data: &[i64]) -> Value<f64> {
        Value::Int(IntTensor::new([data.len()], data.to_vec()).unwrap())
    }

    fn check(expected: &Value<f64>, got: &Value<f64>, element: Element) -> Finding {
        compare("output.y", expected, Some(got), element, Bound::of_format("output.y", element), &Config::default())
    }

    #[test]
    fn the_error_is_normwise_and_the_bound_inclusive() {
        let r = float(&[4.0, -8.0, 1e-3]);
        let f = check(&r, &float(&[4.0, -8.0 + 8e-5, 1e-3 + 1e-4]), Element::F32);
        assert!(f.passed && (f.error - 1.25e-5).abs() < 1e-12 && (f.max_abs - 1e-4).abs() < 1e-12, "{f}");
        let worst = f.worst.unwrap();
        assert_eq!((worst.index, worst.expected), (vec![2], 1e-3));
        assert!((f.ulps - 1e-4 / libm::ldexp(1.0, -10 - 23)).abs() < 1.0, "{}", f.ulps);
        assert!(!check(&r, &float(&[4.0, -8.0 + 1.7e-4, 1e-3]), Element::F32).passed);
        assert!(!check(&r, &float(&[4.0, -8.0 + 8e-5, 1e-3]), Element::F64).passed);
        assert!(check(&r, &float(&[4.0 + 7.9e-9, -8.0, 1e-3]), Element::F64).passed);
        let gradient = Bound::of_format("grad.input.x", Element::F32);
        assert_eq!(gradient.value, 1e-4);
        assert!(check(&float(&[0.0]), &float(&[0.0]), Element::F64).passed);
        assert!(!check(&float(&[0.0]), &float(&[1e-20]), Element::F64).passed, "an answer of zeros has the scale 1e-30");
    }

    #[test]
    fn what_cannot_be_measured_fails() {
        let r = float(&[1.0, 2.0]);
        assert!(!check(&r, &float(&[1.0, f64::NAN]), Element::F32).passed);
        assert!(!check(&r, &float(&[f64::INFINITY, 2.0]), Element::F32).passed);
        assert!(!check(&float(&[f64::NAN, 2.0]), &float(&[f64::NAN, 2.0]), Element::F32).passed);
        let f = check(&r, &float(&[1.0]), Element::F32);
        assert!(!f.passed && f.problem.as_deref() == Some("expected shape [2], found [1]") && f.severity() == f64::INFINITY);
        let f = compare::<f32>("output.y", &r, None, Element::F32, Bound::of_format("output.y", Element::F32), &Config::default());
        assert!(!f.passed && f.to_string() == "output.y: no result");
    }

    #[test]
    fn infinities_of_the_answer_are_met_exactly() {
        let r = float(&[f64::NEG_INFINITY, 2.0]);
        assert!(check(&r, &r, Element::F64).passed);
        assert!(!check(&r, &float(&[f64::INFINITY, 2.0]), Element::F64).passed);
        assert!(!check(&r, &float(&[-1e30, 2.0]), Element::F64).passed);
    }

    #[test]
    fn empty_tensors_agree() {
        let empty = Value::Float(Tensor::zeros([0, 3]));
        assert!(check(&empty, &empty, Element::F64).passed);
        assert!(!check(&empty, &Value::Float(Tensor::zeros([3, 0])), Element::F64).passed);
    }

    #[test]
    fn integers_are_exact_whatever_type_holds_them() {
        let r = ints(&[1, 0, 1 << 54]);
        assert!(check(&r, &r, Element::F32).passed);
        assert!(check(&r, &float(&[1.0, 0.0, (1u64 << 54) as f64]), Element::F32).passed);
        let f = check(&r, &ints(&[1, 0, (1 << 54) + 1]), Element::F32);
        assert!(!f.passed && f.cause.as_deref().unwrap().starts_with("1 of 3 integers differ, the first at [2]"), "{f}");
        assert!(!check(&r, &float(&[1.0, 1e-9, (1u64 << 54) as f64]), Element::F32).passed);
        assert!(check(&float(&[1.0, 2.0]), &ints(&[1, 2]), Element::F32).passed);
        assert!(!check(&float(&[1.0, 2.5]), &ints(&[1, 2]), Element::F32).passed);
    }

    #[test]
    fn gradients_that_have_to_vanish() {
        let bound = Bound::of_zero_gradient(Element::F64, 100.0);
        assert!((bound.value - 1e-9).abs() < 1e-20);
        assert!((Bound::of_zero_gradient(Element::F32, 0.01).value - 1e-5).abs() < 1e-18);
        assert!(compare_zero("grad.param.b", &[2], Some(&float(&[1e-10, -9e-10])), bound.clone()).passed);
        assert!(!compare_zero("grad.param.b", &[2], Some(&float(&[1e-10, -2e-9])), bound.clone()).passed);
        assert!(!compare_zero("grad.param.b", &[2], Some(&float(&[0.0, f64::NAN])), bound.clone()).passed);
        assert!(!compare_zero("grad.param.b", &[3], Some(&float(&[0.0, 0.0])), bound.clone()).passed);
        assert!(!compare_zero::<f64>("grad.param.b", &[2], None, bound).passed);
    }
}
