//! Making, running and judging cases, on a small operation and broken versions of it.

use std::collections::BTreeMap;

use super::*;
use crate::error::{Error, Result};
use crate::nn::{Init, Layout};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Tensor};

/// `y = x[index] Wᵀ + 0·ghost` by plain loops; `count` counts the calls.
struct Linear;

impl Operation for Linear {
    const NAME: &'static str = "test.linear";
    const PAPER: &'static str = "none";
    const DATA: &'static [&'static str] = &["noise"];

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("dim_in", rng.between(3, 6)).set("dim_out", rng.between(3, 6));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let n = draw.size("tokens", 4, 7);
        draw.normal("x", [n, config.positive("dim_in")?]);
        draw.uniform("noise", [n]);
        let index = draw.rng.permutation(n).into_iter().map(|i| i as i64).collect();
        draw.ints("index", [n], index)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (i, o) = (run.config().positive("dim_in")?, run.config().positive("dim_out")?);
        let ((weight, count), layout) = Layout::build(|names| {
            names.param("ghost", [2], Init::ONES);
            Ok((names.param("weight", [o, i], Init::NORMAL_02), names.buffer("count", [], Init::ZEROS)))
        })?;
        let params = run.params(&layout)?;
        let (x, index) = (run.input("x")?, run.ints("index")?.data.clone());
        let [n, width] = x.dims("input `x`")?;
        x.expect_shape("input `x`", [n, i])?;
        assert!(width < 1000, "a bug that panics");
        let w = params.get(weight);
        let y = Tensor::from_fn([n, o], |p| {
            let row = index[p / o] as usize;
            (0..i).fold(T::ZERO, |sum, k| x.data()[row * i + k].fused(w[p % o * i + k], sum))
        });
        run.output("y", &y);
        run.output_ints("rows", IntTensor::vector([n]));
        run.after("count", Value::Float(Tensor::scalar(params.buffer(count)[0] + T::ONE)));
        if !run.backward() {
            return Ok(());
        }
        let dy = run.cotangent("y", y.shape())?;
        let mut dx = Tensor::zeros(x.shape());
        let mut grads = run.zero_grads(&params);
        for (p, &g) in dy.data().iter().enumerate() {
            let row = index[p / o] as usize;
            for k in 0..i {
                dx.data_mut()[row * i + k] += g * w[p % o * i + k];
                grads.get_mut(weight)[p % o * i + k] += g * x.data()[row * i + k];
            }
        }
        run.grad_input("x", &dx);
        run.grad_params(&grads);
        Ok(())
    }
}

static LINEAR: Op = Op::of::<Linear>();

fn made() -> Case {
    let case = new_case(&LINEAR, None, 7, BTreeMap::new()).unwrap();
    assert_eq!(case.zero_grads, ["param.ghost"]);
    case
}

fn names(case: &Case) -> Vec<&str> {
    case.tensors.keys().map(String::as_str).collect()
}

#[test]
fn cases_are_made_complete_and_by_seed() {
    let case = made();
    assert_eq!(
        names(&case),
        [
            "after.count",
            "buffer.count",
            "cotangent.y",
            "grad.input.x",
            "grad.param.weight",
            "input.index",
            "input.noise",
            "input.x",
            "output.rows",
            "output.y",
            "param.ghost",
            "param.weight"
        ]
    );
    assert_eq!(case.source, format!("karat {} f64", env!("CARGO_PKG_VERSION")));
    let folder = tempfile::tempdir().unwrap();
    let write = |case: &Case, name: &str| {
        case.write(folder.path().join(name)).unwrap();
        std::fs::read(folder.path().join(name)).unwrap()
    };
    let first = write(&case, "a");
    assert_eq!(first, write(&made(), "b"));
    assert_eq!(first, write(&Case::read(folder.path().join("a")).unwrap(), "c"));
    assert_ne!(first, write(&new_case(&LINEAR, None, 8, BTreeMap::new()).unwrap(), "d"));
    let sized =
        new_case(&LINEAR, Some(Config::parse(r#"{"dim_in":2,"dim_out":3}"#).unwrap()), 7, BTreeMap::from([("tokens".into(), 5)])).unwrap();
    assert_eq!(sized.tensors["output.y"].shape()[..], [5, 3]);
    assert!(new_case(&LINEAR, Some(Config::default()), 7, BTreeMap::new()).unwrap_err().to_string().contains("dim_in"));
}

#[test]
fn both_precisions_pass_and_say_so() {
    for dtype in Dtype::ALL {
        let report = verify_with(&LINEAR, &made(), dtype);
        assert_eq!(report.verdict, Verdict::Ok, "{}", report.line("made"));
        assert_eq!(report.findings.len(), 6);
        assert!(report.line("made").starts_with("ok ") && report.details().is_empty());
    }
    assert_eq!(verify_case(&made(), Dtype::F64).verdict, Verdict::Unsupported);
}

#[test]
fn every_spoiled_tensor_fails_alone() {
    let case = made();
    for name in names(&case).into_iter().filter(|n| ["output", "grad", "after"].iter().any(|p| n.starts_with(p))) {
        let mut spoiled = case.clone();
        match spoiled.tensors.get_mut(name).unwrap() {
            Value::Float(t) => t.data_mut()[0] += 0.01,
            Value::Int(t) => t.data[0] += 1,
        }
        for dtype in Dtype::ALL {
            let report = verify_with(&LINEAR, &spoiled, dtype);
            assert_eq!(report.verdict, Verdict::Fail);
            assert_eq!(report.worst().unwrap().name, name);
            assert!(report.findings.iter().all(|f| f.passed != (f.name == name)));
            assert!(report.line("c").starts_with("FAIL") && report.line("c").contains(name));
            assert_eq!(report.to_json("c")["verdict"], "fail");
        }
    }
    // A gradient that ought to be zero and is not.
    let mut spoiled = case.clone();
    spoiled.tensors.remove("grad.param.weight");
    spoiled.zero_grads.push("param.weight".into());
    let report = verify_with(&LINEAR, &spoiled, Dtype::F64);
    assert_eq!((report.verdict, report.worst().unwrap().name.as_str()), (Verdict::Fail, "grad.param.weight"));
}

fn forgetful(run: &mut Run<f64>) -> Result<()> {
    let x = run.input("x")?;
    run.output("y", &x);
    run.grad_input("noise", &x);
    Ok(())
}

fn panicking(_: &mut Run<f64>) -> Result<()> {
    panic!("index out\nof bounds")
}

#[test]
fn results_that_are_missing_errors_and_panics_fail() {
    let case = made();
    let report = verify_with(&Op { run_f64: forgetful, ..LINEAR }, &case, Dtype::F64);
    let missing: Vec<&str> = report
        .findings
        .iter()
        .filter(|f| f.problem.as_deref().is_some_and(|p| p.starts_with("no result")))
        .map(|f| f.name.as_str())
        .collect();
    assert_eq!(missing, ["after.count", "grad.input.x", "grad.param.weight", "output.rows", "grad.param.ghost"]);
    assert!(matches!(new_case(&Op { run_f64: forgetful, ..LINEAR }, None, 1, BTreeMap::new()), Err(Error::Missing { .. })));

    let report = verify_with(&Op { run_f64: panicking, ..LINEAR }, &case, Dtype::F64);
    assert_eq!(report.verdict, Verdict::Fail);
    assert!(report.line("c").contains("karat bug") && report.line("c").contains("index out of bounds") && !report.line("c").contains('\n'));

    let mut broken = case;
    broken.tensors.remove("param.weight");
    let report = verify_with(&LINEAR, &broken, Dtype::F32);
    assert!(report.verdict == Verdict::Fail && report.line("c").contains("param.weight is missing"), "{}", report.line("c"));
}

/// Results of the operation as another program would store them in this precision.
fn theirs(case: &Case, element: Element) -> Stock {
    let mut stock = Stock { tensors: Tensors::new(), elements: BTreeMap::new() };
    let mut answers: Vec<(String, Value<f64>)> = case.answers().map(|(n, v)| (n.to_string(), v.clone())).collect();
    answers.push(("grad.param.ghost".into(), Value::Float(Tensor::zeros([2]))));
    for (name, mut value) in answers {
        if let Value::Float(t) = &mut value {
            t.data_mut().iter_mut().for_each(|x| *x = element.round(*x));
            stock.elements.insert(name.clone(), element);
        }
        stock.tensors.insert(name, value);
    }
    stock
}

#[test]
fn other_programs_are_judged_by_what_their_precision_allows() {
    let case = made();
    for (element, error) in [(Element::F64, 2e-9), (Element::F32, 4e-6), (Element::F16, 0.05), (Element::Bf16, 0.4)] {
        let mut stock = theirs(&case, element);
        let report = judge_with(Some(&LINEAR), &case, &stock).unwrap();
        assert_eq!((report.verdict, report.dtype), (Verdict::Ok, element.name()), "{:?}", report.details());
        let bound = &report.findings.iter().find(|f| f.name == "output.y").unwrap().bound;
        assert!(
            bound.value >= if element == Element::F64 { 1e-9 } else { 4.0 * element.epsilon() } && bound.value < error,
            "{element:?} {bound:?}"
        );
        let Some(Value::Float(y)) = stock.tensors.get_mut("output.y") else { panic!() };
        let scale = y.data().iter().fold(0.0f64, |m, x| m.max(x.abs()));
        y.data_mut()[1] += error * scale;
        assert_eq!(judge_with(Some(&LINEAR), &case, &stock).unwrap().verdict, Verdict::Fail, "{element:?}");
    }
    let report = judge_with(None, &case, &theirs(&case, Element::F32)).unwrap();
    assert_eq!(report.findings.iter().find(|f| f.name == "output.y").unwrap().bound.value, 2e-5);
    assert_eq!(judge(&case, &theirs(&case, Element::Bf16)).unwrap().verdict, Verdict::Ok);
}

/// Two large terms that cancel: rounding them to f32 is a large error, whatever comes after.
#[test]
fn ill_conditioned_questions_are_called_so() {
    let mut case = made();
    for (name, row) in [("input.x", [1000.1, 1000.1]), ("param.weight", [1.0 / 3.0, 1e-5 - 1.0 / 3.0])] {
        let Some(Value::Float(t)) = case.tensors.get_mut(name) else { panic!() };
        let width = t.shape()[1];
        *t = Tensor::from_fn(t.shape(), |i| row.get(i % width).copied().unwrap_or(0.0));
    }
    let right = verify::execute(LINEAR.run_f64, &case.config, &case.question(), true, None).unwrap();
    case.tensors.extend(right.into_iter().filter(|(name, _)| name.starts_with("output.") || name.starts_with("grad.input.")));
    case.tensors.retain(|name, _| !name.starts_with("grad.param."));
    assert_eq!(verify_with(&LINEAR, &case, Dtype::F64).verdict, Verdict::Ok);
    let report = verify_with(&LINEAR, &case, Dtype::F32);
    let y = report.findings.iter().find(|f| f.name == "output.y").unwrap();
    assert!(!y.passed && y.cause.as_ref().is_some_and(|cause| cause.starts_with("ill-conditioned")), "{y}");

    // Somebody else's f32 run may miss as much, but not a hundred times as much.
    let mut stock = theirs(&case, Element::F32);
    let mut judged = |factor: f64| {
        let Some(Value::Float(t)) = stock.tensors.get_mut("output.y") else { panic!() };
        t.data_mut().iter_mut().for_each(|x| *x *= 1.0 + factor * y.error);
        judge_with(Some(&LINEAR), &case, &stock).unwrap().verdict
    };
    assert_eq!((judged(1.0), judged(100.0)), (Verdict::Ok, Verdict::Fail));

    // Nor is a wrong answer excused.
    let Some(Value::Float(t)) = case.tensors.get_mut("output.y") else { panic!() };
    t.data_mut()[0] *= 2.0;
    let report = verify_with(&LINEAR, &case, Dtype::F32);
    let y = report.findings.iter().find(|f| f.name == "output.y").unwrap();
    assert!(!y.passed && !y.cause.as_ref().is_some_and(|cause| cause.starts_with("ill-conditioned")), "{y}");
}

/// A gradient that f32 loses, in a case with larger ones.
#[test]
fn cancellation_is_called_so() {
    let mut case = made();
    for (name, values) in [("param.weight", [1e8, 1.0, -1e8]), ("cotangent.y", [1.0; 3]), ("input.x", [1e6; 3])] {
        let Some(Value::Float(t)) = case.tensors.get_mut(name) else { panic!() };
        let width = t.shape()[1];
        // By rows for the weight: they are summed with `dy` as factors.
        let column = |i: usize| if name == "param.weight" { i / width } else { i % width };
        *t = Tensor::from_fn(t.shape(), |i| values.get(column(i)).copied().unwrap_or(0.0));
    }
    let right = verify::execute(LINEAR.run_f64, &case.config, &case.question(), true, None).unwrap();
    case.tensors.extend(right.into_iter().filter(|(name, _)| case.zero_grads.iter().all(|zero| *name != format!("grad.{zero}"))));
    let report = verify_with(&LINEAR, &case, Dtype::F32);
    let dx = report.findings.iter().find(|f| f.name == "grad.input.x").unwrap();
    assert!(!dx.passed && dx.cause.as_ref().is_some_and(|cause| cause.starts_with("cancellation")), "{dx}");
}

#[test]
fn names_of_other_programs() {
    let case = made();
    let full = theirs(&case, Element::F64);
    let rename = |from: &[&str], to: &str| {
        let mut stock = Stock { tensors: Tensors::new(), elements: BTreeMap::new() };
        for (name, value) in &full.tensors {
            let name = if from.contains(&name.as_str()) { to } else { name };
            stock.tensors.insert(name.into(), value.clone());
            stock.elements.insert(name.into(), Element::F64);
        }
        judge_with(Some(&LINEAR), &case, &stock)
    };
    assert_eq!(rename(&["output.y"], "y").unwrap().verdict, Verdict::Ok);
    assert_eq!(rename(&["grad.param.weight"], "weight").unwrap().verdict, Verdict::Ok);
    let report = rename(&["output.y"], "prediction").unwrap();
    assert!(report.verdict == Verdict::Fail && report.line("c").contains("output.y: no result"));
    let report = rename(&["grad.param.ghost"], "prediction").unwrap();
    assert!(report.verdict == Verdict::Fail && report.line("c").contains("grad.param.ghost: no result"));

    // One name for two tensors, and two names for one.
    let mut twins = case.clone();
    let y = twins.tensors["output.y"].clone();
    twins.tensors.insert("after.y".into(), y.clone());
    let bare = Stock { tensors: Tensors::from([("y".into(), y.clone())]), elements: BTreeMap::new() };
    let error = judge_with(Some(&LINEAR), &twins, &bare).unwrap_err().to_string();
    assert!(error.contains("`y` may mean any of after.y, output.y"), "{error}");
    let both = Stock { tensors: Tensors::from([("y".into(), y.clone()), ("output.y".into(), y)]), elements: BTreeMap::new() };
    assert!(judge_with(Some(&LINEAR), &case, &both).unwrap_err().to_string().contains("both stand for `output.y`"));

    // No gradients: judged on the outputs, and it says so. Nothing at all: failed.
    let mut forward = full.clone();
    forward.tensors.retain(|name, _| !name.starts_with("grad."));
    let report = judge_with(Some(&LINEAR), &case, &forward).unwrap();
    assert!(report.verdict == Verdict::Ok && report.line("c").contains("outputs only"), "{}", report.line("c"));
    let nothing = Stock { tensors: Tensors::new(), elements: BTreeMap::new() };
    assert_eq!(judge_with(Some(&LINEAR), &case, &nothing).unwrap().verdict, Verdict::Fail);
}
