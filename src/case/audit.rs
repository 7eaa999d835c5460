//! Is an answer key strong enough? The computation is perturbed the way people get it wrong, and a set of cases must notice.
//!
//! Most mistakes are made by asking another question: a kernel that forgets the scale computes what a right one computes for queries
//! that are `√d` larger; one that skips a bias, what a right one computes for a bias of zero. The wrong answers are compared with the
//! right ones as `karat verify` does it, at the bounds for f32: what passes there would go unnoticed.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value as Json, json};

use super::compare::{Bound, compare, compare_zero};
use super::config::Config;
use super::format::{Case, Element, is_answer};
use super::make::new_case;
use super::op::{Op, Tensors, Value};
use super::registry;
use super::verify::execute;
use crate::error::Result;
use crate::simd::with_tanh_gelu;
use crate::tensor::Tensor;

/// Random problems that show whether a mistake can matter at all.
const PROBLEMS: u64 = 24;

/// One way to get an operation wrong.
struct Mistake {
    /// What is wrong.
    name: String,
    wrong: Wrong,
}

/// Changes results in place.
type Spoil = Box<dyn Fn(&mut Tensors<f64>)>;

enum Wrong {
    /// A right kernel with this question computes what the wrong one does with the case's; the gradients of what was changed say
    /// nothing.
    Question(Config, Tensors<f64>, BTreeSet<String>),
    /// The right answer, then spoilt.
    Answer(Spoil),
    /// GELU by its tanh approximation.
    TanhGelu,
}

impl Wrong {
    /// What the wrong kernel computes, and the tensors whose gradients say nothing; `None` if the operation refuses the question.
    fn results(self, op: &Op, case: &Case, right: &Tensors<f64>) -> Option<(Tensors<f64>, BTreeSet<String>)> {
        let backward = case.has_gradients();
        match self {
            Wrong::Question(config, question, changed) => {
                execute(op.run_f64, &config, &question, backward, None).ok().map(|results| (results, changed))
            }
            Wrong::Answer(spoil) => {
                let mut results = right.clone();
                spoil(&mut results);
                Some((results, BTreeSet::new()))
            }
            Wrong::TanhGelu => {
                let run = || execute(op.run_f64, &case.config, &case.question(), backward, None);
                with_tanh_gelu(run).ok().map(|results| (results, BTreeSet::new()))
            }
        }
    }
}

/// The mistake, if one explains results that were found wrong: a kernel that makes it computes the same within `close` times the
/// largest element of each tensor.
pub(super) fn diagnose(op: &Op, case: &Case, wrong: &Tensors<f64>, close: f64) -> Option<String> {
    let right = execute(op.run_f64, &case.config, &case.question(), case.has_gradients(), None).ok()?;
    let distance = |a: &Tensors<f64>, changed: &BTreeSet<String>| {
        let of_one = |(name, theirs): (&String, &Value<f64>)| match (a.get(name), theirs) {
            (Some(Value::Float(a)), Value::Float(b)) if a.shape() == b.shape() => {
                let size = a.data().iter().fold(1e-30f64, |m, x| m.max(x.abs()));
                a.data()
                    .iter()
                    .zip(b.data())
                    .fold(0.0, |m: f64, (a, b)| if (a - b).is_nan() { f64::INFINITY } else { m.max((a - b).abs()) })
                    / size
            }
            _ => f64::INFINITY,
        };
        wrong.iter().filter(|(name, _)| name.strip_prefix("grad.").is_none_or(|of| !changed.contains(of))).map(of_one).fold(0.0, f64::max)
    };
    let explains = |mistake: Mistake| {
        let (results, changed) = mistake.wrong.results(op, case, &right)?;
        (distance(&results, &changed) <= close && distance(&right, &changed) > close).then_some(mistake.name)
    };
    mistakes(case, &right).into_iter().find_map(explains)
}

/// How a mistake fares with a set of cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Some case notices.
    Caught,
    /// No case notices, though a random problem of the operation does.
    Slips,
    /// It changes nothing or too little to tell at the bound, in no case and no random problem: not a mistake for this operation (a
    /// constant on all logits of a softmax, the scale of a scale-invariant attention).
    Harmless,
}

/// What the audit of one operation found.
#[derive(Clone, Debug)]
pub struct Audit {
    /// The operation.
    pub op: String,
    /// The number of cases.
    pub cases: usize,
    /// Every mistake that was tried.
    pub mistakes: BTreeMap<String, Outcome>,
    /// Cases that karat itself fails, which say nothing about mistakes.
    pub failed: usize,
}

impl Audit {
    /// The mistakes that go unnoticed.
    pub fn slips(&self) -> impl Iterator<Item = &str> {
        self.mistakes.iter().filter(|(_, outcome)| **outcome == Outcome::Slips).map(|(name, _)| name.as_str())
    }

    /// How many mistakes were caught, and how many could be.
    pub fn caught(&self) -> (usize, usize) {
        let count = |wanted| self.mistakes.values().filter(|&&outcome| outcome == wanted).count();
        (count(Outcome::Caught), count(Outcome::Caught) + count(Outcome::Slips))
    }

    /// As JSON.
    pub fn to_json(&self) -> Json {
        let outcomes = self.mistakes.iter().map(|(name, outcome)| (name.clone(), json!(format!("{outcome:?}").to_lowercase())));
        json!({ "op": self.op, "cases": self.cases, "failed": self.failed, "mistakes": outcomes.collect::<serde_json::Map<_, _>>() })
    }
}

/// Audits the cases of one operation. `cases` must all be of it.
///
/// # Errors
/// An operation that karat does not have.
pub fn audit(op: &str, cases: &[Case]) -> Result<Audit> {
    let op = registry::find(op)?;
    let mut found = Audit { op: op.name.into(), cases: cases.len(), mistakes: BTreeMap::new(), failed: 0 };
    for case in cases {
        if !try_all(op, case, &mut found.mistakes) {
            found.failed += 1;
        }
    }
    // What no case noticed: is it the function, or the cases?
    if found.mistakes.values().any(|&outcome| outcome != Outcome::Caught) {
        for seed in 0..PROBLEMS {
            let Ok(problem) = new_case(op, None, seed, BTreeMap::new()) else { continue };
            let mut random = BTreeMap::new();
            try_all(op, &problem, &mut random);
            for (name, outcome) in found.mistakes.iter_mut().filter(|(_, outcome)| **outcome != Outcome::Caught) {
                if random.get(name) == Some(&Outcome::Caught) {
                    *outcome = Outcome::Slips;
                }
            }
        }
    }
    Ok(found)
}

/// Tries every mistake on one case and keeps the best outcome of each; false if karat's own answer is not right to begin with.
fn try_all(op: &Op, case: &Case, outcomes: &mut BTreeMap<String, Outcome>) -> bool {
    let question = case.question();
    let backward = case.has_gradients();
    let Ok(right) = execute(op.run_f64, &case.config, &question, backward, None) else { return false };
    if verdict(case, &right, &BTreeSet::new()) == Outcome::Caught {
        return false;
    }
    for Mistake { name, wrong } in mistakes(case, &right) {
        let Some((results, changed)) = wrong.results(op, case, &right) else { continue };
        let outcome = verdict(case, &results, &changed);
        let best = outcomes.entry(any_block(&name)).or_insert(outcome);
        *best = outcome.min(*best);
    }
    true
}

/// The name with `*` for the numbers of blocks, layers and stages: they all run the same code.
fn any_block(name: &str) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut inside = false;
    for part in name.split('.') {
        let word = part.trim_end_matches(|c: char| c.is_ascii_digit());
        let repeated = ["block", "blocks", "layer", "layers", "stage", "stages", "network"].iter().any(|end| word.ends_with(end));
        let number = word.is_empty() && inside;
        parts.push(if number || repeated && word.len() < part.len() { format!("{word}*") } else { part.to_string() });
        inside = repeated || number;
    }
    parts.join(".")
}

/// Whether the results would be found wrong: caught, or harmless so far.
fn verdict(case: &Case, results: &Tensors<f64>, changed: &BTreeSet<String>) -> Outcome {
    let mut worst = Outcome::Harmless;
    let mut note = |passed: bool| {
        if !passed {
            worst = Outcome::Caught;
        }
    };
    for (name, expected) in case.answers() {
        if name.strip_prefix("grad.").is_some_and(|of| changed.contains(of)) {
            continue;
        }
        let finding = compare(name, expected, results.get(name), Element::F32, Bound::of_format(name, Element::F32), &Config::default());
        note(finding.passed);
    }
    let scale = case.answers().filter(|(name, _)| name.starts_with("grad.")).map(|(_, value)| norm(value)).fold(1.0, f64::max);
    for of in case.zero_grads.iter().filter(|of| !changed.contains(*of)) {
        let name = format!("grad.{of}");
        let shape = case.tensors[of].shape();
        let finding = compare_zero(&name, &shape, results.get(&name), Bound::of_zero_gradient(Element::F32, scale));
        note(finding.passed);
    }
    worst
}

fn norm(value: &Value<f64>) -> f64 {
    match value {
        Value::Float(t) => t.data().iter().fold(0.0, |m, x| m.max(x.abs())),
        Value::Int(_) => 0.0,
    }
}

/// The ways to get this case wrong.
fn mistakes(case: &Case, right: &Tensors<f64>) -> Vec<Mistake> {
    let mut all = Vec::new();
    let question = case.question();
    let mut ask = |name: String, config: Option<Config>, tensors: Vec<(String, Value<f64>)>| {
        let changed = tensors.iter().map(|(name, _)| name.clone()).collect();
        let mut question = question.clone();
        question.extend(tensors);
        all.push(Mistake { name, wrong: Wrong::Question(config.unwrap_or_else(|| case.config.clone()), question, changed) });
    };
    let params = || question.iter().filter_map(|(name, value)| Some((name.strip_prefix("param.")?, as_float(value)?)));
    let heads = ["num_heads", "heads"].iter().find_map(|key| case.config.positive(key).ok()).unwrap_or(1);

    for (name, weight) in params() {
        let Some(layer) = name.strip_suffix(".weight") else {
            if name.contains("bias") {
                ask(format!("{name} skipped"), None, vec![(format!("param.{name}"), zeros(weight))]);
            }
            continue;
        };
        let bias_name = format!("param.{layer}.bias");
        let bias = question.get(&bias_name).and_then(as_float);
        let shape = weight.shape();
        // Rows of q and of k in a fused projection.
        if let Some((q, k)) = query_and_key_rows(layer, shape.first().copied().unwrap_or(0)) {
            let with_rows = |map: &dyn Fn(usize, f64) -> (usize, f64)| {
                let mut changed = vec![(format!("param.{name}"), rows_mapped(weight, map))];
                changed.extend(bias.filter(|b| b.shape()[..] == shape[..1]).map(|b| (bias_name.clone(), rows_mapped(b, map))));
                changed
            };
            if q.len() == k.len() {
                let (from, to) = (q.start, k.start);
                let swap = move |row: usize, x| match row {
                    row if (from..from + q.len()).contains(&row) => (row - from + to, x),
                    row if (to..to + k.len()).contains(&row) => (row - to + from, x),
                    row => (row, x),
                };
                ask(format!("{layer}: q and k swapped"), None, with_rows(&swap));
            }
            let (start, len) = (from_start(layer, shape[0]), query_and_key_rows(layer, shape[0]).map_or(0, |(q, _)| q.len()));
            let width = len / heads;
            let scale = (width as f64).sqrt();
            let rows = start..start + len;
            let within = rows.clone();
            ask(format!("{layer}: scale dropped"), None, with_rows(&|row, x| (row, if within.contains(&row) { x * scale } else { x })));
            let (within, share) = (rows.clone(), (heads as f64).powf(-0.5));
            let scaled = |row, x| (row, if within.contains(&row) { x * share } else { x });
            ask(format!("{layer}: scale of the whole width instead of the head's"), None, with_rows(&scaled));
            // Channel j of head a is taken from row j·h + a instead of a·d + j.
            let interleave = |row: usize, x: f64| {
                if !rows.contains(&row) || width == 0 {
                    return (row, x);
                }
                let at = row - start;
                (start + at % width * heads + at / width, x)
            };
            ask(format!("{layer}: channels and heads interleaved"), None, with_rows(&interleave));
        }
        if let Some(key) = key_beside(layer) {
            let (other, of_key) = (format!("param.{key}.weight"), format!("param.{key}.bias"));
            if let Some(key_weight) = question.get(&other).and_then(as_float).filter(|k| k.shape() == shape) {
                let mut changed = vec![(format!("param.{name}"), key_weight.clone()), (other, weight.clone())];
                if let (Some(q), Some(k)) = (bias, question.get(&of_key).and_then(as_float)) {
                    changed.extend([(bias_name.clone(), k.clone()), (of_key, q.clone())]);
                }
                let changed = changed.into_iter().map(|(name, t)| (name, Value::Float(t))).collect();
                ask(format!("{layer}: q and k swapped"), None, changed);
            }
            let scale = (shape[0] as f64 / heads as f64).sqrt();
            let larger = |t: &Tensor<f64>| Value::Float(Tensor::from_fn(t.shape(), |i| t.data()[i] * scale));
            let mut changed = vec![(format!("param.{name}"), larger(weight))];
            changed.extend(bias.map(|b| (bias_name.clone(), larger(b))));
            ask(format!("{layer}: scale dropped"), None, changed);
        }
        if let [rows, cols] = shape[..]
            && rows == cols
            && rows > 1
        {
            let transposed = Tensor::from_fn(shape, |i| weight.data()[i % rows * rows + i / rows]);
            ask(format!("{layer}: transposed"), None, vec![(format!("param.{name}"), Value::Float(transposed))]);
        }
        // LayerNorm with the unbiased variance: every row shrinks by √((n − 1)/n).
        if shape.len() == 1 && layer.contains("norm") && bias.is_some() && shape[0] > 1 {
            let factor = ((shape[0] - 1) as f64 / shape[0] as f64).sqrt();
            let smaller = Tensor::from_fn(shape, |i| weight.data()[i] * factor);
            ask(format!("{layer}: unbiased variance"), None, vec![(format!("param.{name}"), Value::Float(smaller))]);
        }
    }
    if let (Ok(shift), Ok(window)) = (case.config.usize("shift_size"), case.config.positive("window_size")) {
        let mut config = case.config.clone();
        config.set("shift_size", (shift + 1) % window);
        ask("window shifted by one".into(), Some(config), Vec::new());
    }
    for (name, value) in question.iter().filter(|(name, _)| name.starts_with("input.") && name.contains("mask")) {
        ask(format!("{name} shifted by one"), None, vec![(name.clone(), rolled(value))]);
    }
    all.push(Mistake { name: "tanh GELU for erf".into(), wrong: Wrong::TanhGelu });

    for (name, value) in right.iter().filter(|(name, _)| is_answer(name)) {
        let (spoilt, shape) = (name.clone(), value.shape());
        let mut spoil = |what: String, wrong: Box<dyn Fn(usize, f64) -> f64>| {
            let name = spoilt.clone();
            let change = move |results: &mut Tensors<f64>| {
                if let Some(Value::Float(t)) = results.get_mut(&name) {
                    t.data_mut().iter_mut().enumerate().for_each(|(i, x)| *x = wrong(i, *x));
                }
            };
            all.push(Mistake { name: what, wrong: Wrong::Answer(Box::new(change)) });
        };
        if name.starts_with("grad.") {
            spoil(format!("{name} zeroed"), Box::new(|_, _| 0.0));
        } else if name.starts_with("output.") && shape.len() >= 2 {
            let (cols, rows) = (shape[shape.len() - 1], shape[shape.len() - 2]);
            // What a kernel leaves undone that handles whole tiles of 16 only; a single row or column of whole tiles.
            let tail = |n: usize| if n.is_multiple_of(16) { n.saturating_sub(1) } else { n / 16 * 16 };
            let (first_row, first_col) = (tail(rows), tail(cols));
            spoil(format!("{name}: last tile of rows dropped"), Box::new(move |i, x| if i / cols % rows >= first_row { 0.0 } else { x }));
            spoil(format!("{name}: last tile of columns dropped"), Box::new(move |i, x| if i % cols >= first_col { 0.0 } else { x }));
        } else if case.op.starts_with("nn.") && name.starts_with("after.") && name.ends_with("running_var") {
            spoil(format!("{name}: biased variance"), biased(case, &name["after.".len()..]));
        }
    }
    all
}

/// `running_var` as an update with the biased variance leaves it (the published one divides by n − 1).
fn biased(case: &Case, buffer: &str) -> Box<dyn Fn(usize, f64) -> f64> {
    let before = case.tensors.get(&format!("buffer.{buffer}")).and_then(as_float).map(|t| t.data().to_vec()).unwrap_or_default();
    let momentum = case.config.f64_or("momentum", 0.1).unwrap_or(0.1);
    let elements = case.tensors.values().filter_map(as_float).map(|t| t.data().len()).max().unwrap_or(1);
    let n = (elements / before.len().max(1)).max(2) as f64;
    Box::new(move |i, x| {
        let kept = (1.0 - momentum) * before.get(i).copied().unwrap_or(0.0);
        kept + (x - kept) * (n - 1.0) / n
    })
}

fn as_float(value: &Value<f64>) -> Option<&Tensor<f64>> {
    match value {
        Value::Float(t) => Some(t),
        Value::Int(_) => None,
    }
}

fn zeros(t: &Tensor<f64>) -> Value<f64> {
    Value::Float(Tensor::zeros(t.shape()))
}

/// The rows of q and of k in a fused projection of this name with so many rows.
fn query_and_key_rows(layer: &str, rows: usize) -> Option<(std::ops::Range<usize>, std::ops::Range<usize>)> {
    let third = rows / 3;
    match layer.rsplit('.').next()? {
        "qkv" | "to_qkv" | "query_key_value" => Some((0..third, third..2 * third)),
        "kqv" => Some((third..2 * third, 0..third)),
        "qk" => Some((0..rows / 2, rows / 2..rows)),
        _ => None,
    }
}

fn from_start(layer: &str, rows: usize) -> usize {
    query_and_key_rows(layer, rows).map_or(0, |(q, _)| q.start)
}

/// The key projection that stands beside a query projection of this name.
fn key_beside(layer: &str) -> Option<String> {
    let (prefix, last) = layer.rsplit_once('.').map_or((String::new(), layer), |(p, last)| (format!("{p}."), last));
    let key = match last {
        "q" => "k",
        "to_q" => "to_k",
        "q_proj" => "k_proj",
        "q_conv" => "k_conv",
        "w_q" => "w_k",
        "query" => "key",
        _ => return None,
    };
    Some(prefix + key)
}

/// Every row `r` of the first axis taken from `map(r, x)`: the row to read, and what becomes of its elements.
fn rows_mapped(t: &Tensor<f64>, map: &dyn Fn(usize, f64) -> (usize, f64)) -> Value<f64> {
    let shape = t.shape();
    let width = shape[1..].iter().product::<usize>().max(1);
    Value::Float(Tensor::from_fn(shape, |i| {
        let (row, col) = (i / width, i % width);
        let from = map(row, 0.0).0;
        map(row, t.data()[from * width + col]).1
    }))
}

/// Shifted by one along the last axis, cyclically.
fn rolled(value: &Value<f64>) -> Value<f64> {
    let shape = value.shape();
    let cols = shape.last().copied().unwrap_or(1).max(1);
    let from = |i: usize| i / cols * cols + (i % cols + cols - 1) % cols;
    match value {
        Value::Float(t) => Value::Float(Tensor::from_fn(shape, |i| t.data()[from(i)])),
        Value::Int(t) => {
            let mut rolled = t.clone();
            rolled.data.iter_mut().enumerate().for_each(|(i, x)| *x = t.data[from(i)]);
            Value::Int(rolled)
        }
    }
}
