//! Runs golden cases, or judges results that somebody else computed.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::{Value as Json, json};

use super::audit::diagnose;
use super::compare::{Bound, Finding, compare, compare_zero};
use super::config::Config;
use super::format::{Case, Element, Stock, is_answer};
use super::op::{Op, Run, Tensors, Value};
use super::registry;
use crate::error::{Error, Result};
use crate::tensor::{Float, Shape};

/// Another implementation may be this much worse than karat in the same precision, or than what rounding does to the case …
const MULTIPLE: f64 = 4.0;
/// … and always this many units in the last place of the largest element, whatever karat reaches.
const FEW_ULPS: f64 = 4.0;
/// The bound in units in the last place where karat cannot run the operation in the precision at hand.
const MANY_ULPS: f64 = 64.0;

/// A precision that karat runs operations in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// The oracle.
    F64,
    /// The product.
    F32,
}

impl Dtype {
    /// Both, the oracle first.
    pub const ALL: [Dtype; 2] = [Dtype::F64, Dtype::F32];

    fn element(self) -> Element {
        match self {
            Dtype::F64 => Element::F64,
            Dtype::F32 => Element::F32,
        }
    }
}

/// The outcome of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every tensor of the answer was met.
    Ok,
    /// A tensor was not, or the operation refused to run.
    Fail,
    /// This karat has no such operation.
    Unsupported,
}

/// What came of one case in one precision.
#[derive(Clone, Debug)]
pub struct Report {
    /// The operation.
    pub op: String,
    /// The precision compared.
    pub dtype: &'static str,
    /// The outcome.
    pub verdict: Verdict,
    /// Why there is nothing to compare: an error of the operation, no such operation.
    pub problem: Option<String>,
    /// What limits the verdict: gradients that were not handed in.
    pub note: Option<String>,
    /// What explains a failure: a known mistake that gives these very results.
    pub cause: Option<String>,
    /// One per tensor of the answer.
    pub findings: Vec<Finding>,
}

impl Report {
    fn new(op: &str, dtype: &'static str, findings: Vec<Finding>) -> Report {
        let verdict = if findings.iter().all(|f| f.passed) { Verdict::Ok } else { Verdict::Fail };
        Report { op: op.into(), dtype, verdict, problem: None, note: None, cause: None, findings }
    }

    fn without_findings(op: &str, dtype: &'static str, verdict: Verdict, problem: String) -> Report {
        Report { op: op.into(), dtype, verdict, problem: Some(problem), note: None, cause: None, findings: Vec::new() }
    }

    /// The tensor that is worst in units of its bound.
    pub fn worst(&self) -> Option<&Finding> {
        self.findings.iter().max_by(|a, b| a.severity().total_cmp(&b.severity()))
    }

    /// One line: verdict, precision, operation, case, worst tensor, error, bound.
    pub fn line(&self, case: &str) -> String {
        let verdict = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Fail => "FAIL",
            Verdict::Unsupported => "unsupported",
        };
        let mut line = format!("{verdict:<11} {:<4} {} {case}", self.dtype, self.op);
        if let Some(problem) = &self.problem {
            line += &format!(": {problem}");
        } else if let Some(worst) = self.worst() {
            line += &match &worst.problem {
                Some(problem) => format!(": {}: {problem}", worst.name),
                None => format!(": {} error {:.2e} bound {:.1e}", worst.name, worst.error, worst.bound.value),
            };
        }
        if let Some(note) = &self.note {
            line += &format!(" ({note})");
        }
        line
    }

    /// The likely cause, then one indented line for every tensor that failed, worst first.
    pub fn details(&self) -> Vec<String> {
        let mut failed: Vec<&Finding> = self.findings.iter().filter(|f| !f.passed).collect();
        failed.sort_by(|a, b| b.severity().total_cmp(&a.severity()));
        let cause = self.cause.iter().map(|cause| format!("    likely cause: {cause}"));
        cause.chain(failed.iter().map(|finding| format!("    {finding}"))).collect()
    }

    /// As JSON.
    pub fn to_json(&self, case: &str) -> Json {
        let verdict = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Fail => "fail",
            Verdict::Unsupported => "unsupported",
        };
        json!({
            "case": case, "op": self.op, "dtype": self.dtype, "verdict": verdict, "problem": self.problem, "note": self.note, "cause": self.cause,
            "worst": self.worst().map(|f| f.name.as_str()),
            "tensors": self.findings.iter().map(Finding::to_json).collect::<Vec<_>>(),
        })
    }
}

/// Runs the case's operation in one precision and compares what it hands in with the answer.
pub fn verify_case(case: &Case, dtype: Dtype) -> Report {
    match registry::find(&case.op) {
        Ok(op) => verify_with(op, case, dtype),
        Err(_) => {
            Report::without_findings(&case.op, dtype.element().name(), Verdict::Unsupported, "this karat has no such operation".into())
        }
    }
}

/// [`verify_case`] for an operation that need not be in the registry.
///
/// An f32 run that misses a bound says why that may be no mistake: rounding the question to f32, all else exact, makes an error as large
/// as a quarter of the one found; or a gradient is what is left where terms as large as other gradients cancel, and the error within the
/// bound of those. No order of summation can be relied on to keep the bound then.
pub fn verify_with(op: &Op, case: &Case, dtype: Dtype) -> Report {
    let findings = match dtype {
        Dtype::F64 => run::<f64>(op.run_f64, case, &case.question()).map(|results| findings(case, &results, Element::F64)),
        Dtype::F32 => run::<f32>(op.run_f32, case, &cast(&case.question())).map(|results| {
            let mut findings = findings(case, &results, Element::F32);
            excuse(op, case, &mut findings);
            findings
        }),
    };
    let name = dtype.element().name();
    match findings {
        Ok(findings) => Report::new(&case.op, name, findings),
        Err(e) => Report::without_findings(&case.op, name, Verdict::Fail, e.to_string()),
    }
}

/// Names the cause where an f32 run misses a bound for want of digits.
fn excuse(op: &Op, case: &Case, findings: &mut [Finding]) {
    let (mut own, rounding, largest) = (Own::new(Some(op), case), Source::Rounded(Element::F32), largest_gradient(case));
    for finding in findings.iter_mut().filter(|finding| !finding.passed && case.tensors.contains_key(&finding.name)) {
        let share = finding.max_abs / largest;
        if let Some(error) = own.error(rounding, &finding.name).filter(|error| MULTIPLE * error >= finding.error) {
            finding.cause = Some(format!("ill-conditioned: {error:.1e} is the error {rounding}"));
        } else if finding.name.starts_with("grad.") && share <= finding.bound.value {
            finding.cause = Some(format!("cancellation: the error is {share:.1e} of the largest gradient"));
        }
    }
}

fn run<T: Float>(run: fn(&mut Run<T>) -> Result<()>, case: &Case, question: &Tensors<T>) -> Result<Tensors<T>> {
    execute(run, &case.config, question, case.has_gradients(), None)
}

/// Runs an operation. A panic, which no input should be able to cause, comes back as an error that says so.
pub(super) fn execute<T: Float>(
    run: fn(&mut Run<T>) -> Result<()>,
    config: &Config,
    given: &Tensors<T>,
    backward: bool,
    init_seed: Option<u64>,
) -> Result<Tensors<T>> {
    let attempt = || {
        let mut execution = Run::new(config, given, backward, init_seed);
        run(&mut execution).map(|()| execution.into_results())
    };
    catch_unwind(AssertUnwindSafe(attempt)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(Error::value("karat bug: the operation panicked", said.replace('\n', " ")))
    })
}

fn cast<S: Float, T: Float>(tensors: &Tensors<S>) -> Tensors<T> {
    let cast = |value: &Value<S>| match value {
        Value::Float(t) => Value::Float(t.cast()),
        Value::Int(t) => Value::Int(t.clone()),
    };
    tensors.iter().map(|(name, value)| (name.clone(), cast(value))).collect()
}

/// The largest gradient of the answer.
fn largest_gradient(case: &Case) -> f64 {
    case.answers().filter(|(name, _)| name.starts_with("grad.")).map(|(_, value)| largest(value)).fold(0.0, f64::max)
}

fn largest<T: Float>(value: &Value<T>) -> f64 {
    match value {
        Value::Float(t) => t.data().iter().fold(0.0, |m, x| m.max(x.to_f64().abs())),
        Value::Int(t) => t.data.iter().fold(0.0, |m, &x| m.max(x.unsigned_abs() as f64)),
    }
}

fn findings<T: Float>(case: &Case, results: &Tensors<T>, element: Element) -> Vec<Finding> {
    let of_answer = |(name, expected): (&str, &Value<f64>)| {
        compare(name, expected, results.get(name), element, Bound::of_format(name, element), &case.config)
    };
    let mut findings: Vec<Finding> = case.answers().map(of_answer).collect();
    let scale = largest_gradient(case);
    for (name, shape) in zero_gradients(case) {
        findings.push(compare_zero(&name, &shape, results.get(&name), Bound::of_zero_gradient(element, scale)));
    }
    findings
}

/// The gradients that have to vanish: name and shape.
fn zero_gradients(case: &Case) -> impl Iterator<Item = (String, Shape)> {
    case.zero_grads.iter().filter_map(|of| case.tensors.get(of).map(|value| (format!("grad.{of}"), value.shape())))
}

/// Judges somebody else's results for a case.
///
/// The tensors of `actual` are named as in the case (`output.y`, `grad.input.x`) or, where only one is meant, without the prefix
/// (`y`). What else the file holds is left alone. A file without any gradient is judged on its outputs, and the report says so.
///
/// The bound follows from the precision that a tensor is stored in:
/// - f64: the format's. The answer itself is f64, so its own error cannot be measured against it.
/// - f16, bf16: inputs, parameters and results of karat's f64 run are rounded to that precision, which shows what the case does to
///   rounding errors of that size; four times that error, at least 4 ULP of the largest element.
/// - f32: the same, or four times the error of karat's own f32 run on this case if that is larger. (One run may be lucky.)
///
/// Where karat cannot run the operation, f32 gets the format's bound, f16 and bf16 get 64 ULP.
///
/// # Errors
/// A name in `actual` that may mean more than one tensor, or two names for one tensor.
pub fn judge(case: &Case, actual: &Stock) -> Result<Report> {
    judge_with(registry::find(&case.op).ok(), case, actual)
}

/// [`judge`] for an operation that need not be in the registry.
pub fn judge_with(op: Option<&Op>, case: &Case, actual: &Stock) -> Result<Report> {
    let zeros: Vec<(String, Shape)> = zero_gradients(case).collect();
    let wanted: Vec<&str> = case.answers().map(|(name, _)| name).chain(zeros.iter().map(|(name, _)| name.as_str())).collect();
    let given = assign(&wanted, actual)?;
    let forward_only = case.has_gradients() && !given.keys().any(|name| name.starts_with("grad."));
    let mut own = Own::new(op, case);
    let element_of = |name: &str| given.get(name).and_then(|theirs| actual.elements.get(*theirs)).copied().unwrap_or(Element::F32);
    let result_of = |name: &str| given.get(name).and_then(|theirs| actual.tensors.get(*theirs));
    let scale = largest_gradient(case);
    let mut findings = Vec::new();
    for (name, expected) in case.answers().filter(|(name, _)| !(forward_only && name.starts_with("grad."))) {
        let element = element_of(name);
        findings.push(compare(name, expected, result_of(name), element, own.bound(name, element), &case.config));
    }
    for (name, shape) in zeros.iter().filter(|_| !forward_only) {
        let bound = own.zero_bound(name, element_of(name), scale);
        findings.push(compare_zero(name, shape, result_of(name), bound));
    }
    let mut used: Vec<&'static str> =
        given.values().filter_map(|theirs| actual.elements.get(*theirs)).map(|element| element.name()).collect();
    used.sort_unstable();
    used.dedup();
    let dtype = match used[..] {
        [] => "int",
        [one] => one,
        _ => "mixed",
    };
    let mut report = Report::new(&case.op, dtype, findings);
    report.note = forward_only.then(|| "outputs only: no gradients were handed in".into());
    if let (Verdict::Fail, Some(op)) = (report.verdict, op) {
        let theirs = given.iter().filter_map(|(name, theirs)| Some((name.to_string(), actual.tensors.get(*theirs)?.clone()))).collect();
        let coarsest = given.values().filter_map(|theirs| actual.elements.get(*theirs)).map(|e| e.epsilon()).fold(0.0, f64::max);
        report.cause = diagnose(op, case, &theirs, (MANY_ULPS * coarsest).max(1e-4));
    }
    if given.is_empty() {
        report.verdict = Verdict::Fail;
        report.problem = Some(format!("no tensor of the results is named like one of the answer: {}", wanted.join(", ")));
    }
    Ok(report)
}

/// Which tensor of `actual` stands for which tensor of the answer.
fn assign<'a, 'b>(wanted: &[&'a str], actual: &'b Stock) -> Result<BTreeMap<&'a str, &'b str>> {
    let bare =
        |name: &'a str| ["output.", "after.", "grad.input.", "grad.param."].iter().find_map(|p| name.strip_prefix(p)).unwrap_or(name);
    let mut given: BTreeMap<&str, &str> = BTreeMap::new();
    for theirs in actual.tensors.keys() {
        let exact = wanted.iter().find(|name| *name == theirs);
        let meant: Vec<&&str> = match exact {
            Some(name) => vec![name],
            None if is_answer(theirs) => continue,
            None => wanted.iter().filter(|name| bare(name) == theirs).collect(),
        };
        match meant[..] {
            [] => {}
            [name] => {
                if let Some(other) = given.insert(name, theirs) {
                    return Err(Error::usage(format!("results `{other}` and `{theirs}` both stand for `{name}`")));
                }
            }
            _ => {
                let names: Vec<&str> = meant.iter().map(|name| **name).collect();
                return Err(Error::usage(format!("result `{theirs}` may mean any of {}: write out which", names.join(", "))));
            }
        }
    }
    Ok(given)
}

/// A run of karat.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    /// In f64.
    Exact,
    /// In f32.
    Native,
    /// In f64, with question and answer rounded.
    Rounded(Element),
}

impl std::fmt::Display for Source {
    /// What an error comes from.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Exact => f.write_str("of karat's f64 run on this case"),
            Source::Native => f.write_str("of karat's own f32 run on this case"),
            Source::Rounded(element) => write!(f, "that rounding question and answer to {} makes on this case", element.name()),
        }
    }
}

/// Karat's own runs of a case, each made once and when it is asked for.
struct Own<'a> {
    op: Option<&'a Op>,
    case: &'a Case,
    runs: BTreeMap<Source, Option<Tensors<f64>>>,
}

impl<'a> Own<'a> {
    fn new(op: Option<&'a Op>, case: &'a Case) -> Self {
        Own { op, case, runs: BTreeMap::new() }
    }

    fn results(&mut self, source: Source) -> Option<&Tensors<f64>> {
        let (op, case) = (self.op, self.case);
        let run = || -> Option<Tensors<f64>> {
            let (op, question) = (op?, case.question());
            match source {
                Source::Exact => run::<f64>(op.run_f64, case, &question).ok(),
                Source::Native => run::<f32>(op.run_f32, case, &cast(&question)).ok().map(|results| cast(&results)),
                Source::Rounded(element) => {
                    run::<f64>(op.run_f64, case, &rounded(&question, element)).ok().map(|results| rounded(&results, element))
                }
            }
        };
        self.runs.entry(source).or_insert_with(run).as_ref()
    }

    /// How far one tensor of a run is from the f64 run: a mistake in the answer is nobody's error.
    fn error(&mut self, source: Source, name: &str) -> Option<f64> {
        let exact = self.results(Source::Exact)?.get(name)?.clone();
        let (config, element) = (&self.case.config, Element::F32);
        let finding = compare(name, &exact, self.results(source)?.get(name), element, Bound::of_format(name, element), config);
        finding.error.is_finite().then_some(finding.error)
    }

    fn bound(&mut self, name: &str, element: Element) -> Bound {
        let sources: &[Source] = match element {
            Element::F64 => return Bound::of_format(name, element),
            Element::F32 => &[Source::Native, Source::Rounded(Element::F32)],
            Element::F16 | Element::Bf16 => &[Source::Rounded(element)],
        };
        let errors = sources.iter().filter_map(|&source| Some((self.error(source, name)?, source)));
        match errors.max_by(|a, b| a.0.total_cmp(&b.0)) {
            Some((error, source)) => measured(error, source, FEW_ULPS * element.epsilon(), element),
            None if element == Element::F32 => Bound::of_format(name, element),
            None => {
                let origin = format!("{MANY_ULPS} ULP of {}: karat cannot run this case", element.name());
                Bound { value: MANY_ULPS * element.epsilon(), origin }
            }
        }
    }

    fn zero_bound(&mut self, name: &str, element: Element, scale: f64) -> Bound {
        if matches!(element, Element::F64 | Element::F32) {
            return Bound::of_zero_gradient(element, scale);
        }
        let source = Source::Rounded(element);
        let error =
            self.results(source).and_then(|results| results.get(name)).map(largest).filter(|error| error.is_finite()).unwrap_or(0.0);
        measured(error, source, MANY_ULPS * element.epsilon() * scale.max(1.0), element)
    }
}

/// A multiple of an error, but not below `floor`.
fn measured(error: f64, source: Source, floor: f64, element: Element) -> Bound {
    let value = MULTIPLE * error;
    if value >= floor {
        Bound { value, origin: format!("{MULTIPLE} × the error {error:.1e} {source}") }
    } else {
        Bound { value: floor, origin: format!("the least for {}; the error {source} is {error:.1e}", element.name()) }
    }
}

fn rounded(tensors: &Tensors<f64>, element: Element) -> Tensors<f64> {
    let mut tensors = tensors.clone();
    for value in tensors.values_mut() {
        if let Value::Float(t) = value {
            t.data_mut().iter_mut().for_each(|x| *x = element.round(*x));
        }
    }
    tensors
}
