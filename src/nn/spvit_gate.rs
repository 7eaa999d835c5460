//! `nn.spvit_gate`: binary gates with the gradient of a soft decision (SPViT, arXiv 2111.11802), and `nn.spvit_flops_loss`: what the
//! network they choose is expected to cost.
//!
//! `p = σ(θ)`. In training, with uniform noise u: `ℓ = logit(u) + logit(p)` (both clipped to `ε … 1 − ε`), `i = 1[ℓ > 0]` with the gradient
//! of `y = σ(ℓ)`; else `i = 1[p > ½]` without one. Expected: `e = 1[p > ½]` with the gradient of `s = σ(p − ½)`. Gates of an attention
//! layer ("kernel") are cumulative products: at least 1×1, at least 3×3, attention.
//!
//! Backward: the product rule with the hard values, `∂θ += ∂i y(1 − y)` (0 where p was clipped), `∂θ += ∂e s(1 − s) p(1 − p)`. As released,
//! gates 0 and 1 of (1, 1, ·) lose their own gradient to the highest open one.
//!
//! The loss is `λ (target − F/10⁹)²`, `F` linear in the expected gates: `Σ_b k_0 c_1 + k_1 (c_3 − c_1) + k_2 (c_m − c_3) + 2NC Σ_j f_j` and a
//! constant. For DeiT the class token is forgotten in the MLPs, as released.

use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::nn::{Init, Layout, Names, Param, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Shape, Tensor};

/// Where thresholds start in every published search.
pub const START: f64 = 1.5;

/// What gates decide about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateKind {
    /// An attention layer: three gates, each implying the one before.
    Kernel,
    /// Hidden units: gates on their own.
    Ffn,
}

/// Gates and expected gates, with the slopes of their soft versions.
#[derive(Clone, Debug)]
pub struct Gates {
    kind: GateKind,
    /// i and the slope `dy/dθ`.
    sampled: Vec<(bool, f64)>,
    /// e and the slope `ds/dθ`.
    expected: Vec<(bool, f64)>,
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + libm::exp(-x))
}

impl Gates {
    /// The gates of thresholds θ, sampled with the noise `u` in training.
    pub fn new<T: Float>(kind: GateKind, thresholds: &[T], u: Option<&[T]>) -> Self {
        let eps = if T::NAME == "f32" { f64::from(f32::EPSILON) } else { f64::EPSILON };
        let logit = |p: f64| libm::log(p) - libm::log1p(-p);
        let (mut sampled, mut expected) = (Vec::with_capacity(thresholds.len()), Vec::with_capacity(thresholds.len()));
        for (j, theta) in thresholds.iter().enumerate() {
            let p = sigmoid(theta.to_f64());
            let s = sigmoid(p - 0.5);
            expected.push((p > 0.5, s * (1.0 - s) * p * (1.0 - p)));
            sampled.push(match u {
                None => (p > 0.5, 0.0),
                Some(u) => {
                    let clip = |x: f64| x.clamp(eps, 1.0 - eps);
                    let l = logit(clip(u[j].to_f64())) + logit(clip(p));
                    let y = sigmoid(l);
                    (l > 0.0, if clip(p) == p { y * (1.0 - y) } else { 0.0 })
                }
            });
        }
        Gates { kind, sampled, expected }
    }

    fn values<T: Float>(&self, of: &[(bool, f64)]) -> Tensor<T> {
        let mut open = true;
        Tensor::from_fn([of.len()], |j| {
            open = of[j].0 && (open || self.kind == GateKind::Ffn);
            if open { T::ONE } else { T::ZERO }
        })
    }

    /// The gates: exact zeros and ones.
    pub fn gates<T: Float>(&self) -> Tensor<T> {
        self.values(&self.sampled)
    }

    /// The expected gates.
    pub fn expected<T: Float>(&self) -> Tensor<T> {
        self.values(&self.expected)
    }

    /// Adds the gradient of the thresholds, from those of the gates and of the expected gates (either may be missing).
    pub fn backward<T: Float>(&self, d_thresholds: &mut [T], d_gates: Option<&[T]>, d_expected: Option<&[T]>) {
        if let Some(d) = d_gates {
            let mut d: Vec<f64> = d.iter().map(|d| d.to_f64()).collect();
            if self.kind == GateKind::Kernel {
                let gates = self.gates::<f64>();
                let open = gates.data().iter().take_while(|&&k| k != 0.0).count();
                d[..open.saturating_sub(1)].fill(0.0);
            }
            self.add(d_thresholds, &self.sampled, &d);
        }
        if let Some(d) = d_expected {
            let d: Vec<f64> = d.iter().map(|d| d.to_f64()).collect();
            self.add(d_thresholds, &self.expected, &d);
        }
    }

    fn add<T: Float>(&self, d_thresholds: &mut [T], of: &[(bool, f64)], d: &[f64]) {
        for (m, total) in d_thresholds.iter_mut().enumerate() {
            let grad = match self.kind {
                GateKind::Ffn => d[m],
                // d/di_m Π_{l ≤ j} i_l = Π_{l ≤ j, l ≠ m} i_l for j ≥ m.
                GateKind::Kernel => (m..d.len()).filter(|&j| (0..=j).all(|l| l == m || of[l].0)).map(|j| d[j]).sum(),
            };
            *total += T::from_f64(grad * of[m].1);
        }
    }
}

/// The noise `u` of `n` gates, in training.
pub fn noise<T: Float>(run: &Run<T>, name: &str, shape: impl Into<Shape>, training: bool) -> Result<Option<Tensor<T>>> {
    if !training {
        return Ok(None);
    }
    let u = run.input(name)?;
    u.expect_shape(&format!("input `{name}`"), shape)?;
    Ok(Some(u))
}

/// `nn.spvit_gate`.
pub struct SpvitGate;

fn kind(config: &Config) -> Result<(GateKind, usize)> {
    let n = config.positive("n")?;
    match config.choice("kind", &["kernel", "ffn"])? {
        "kernel" if n != 3 => Err(Error::config("n", format!("expected 3 gates of kind \"kernel\", found {n}"))),
        "kernel" => Ok((GateKind::Kernel, n)),
        _ => Ok((GateKind::Ffn, n)),
    }
}

impl Operation for SpvitGate {
    const NAME: &'static str = "nn.spvit_gate";
    const PAPER: &'static str = "2111.11802 SPViT";
    const DATA: &'static [&'static str] = &["u"];

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let kernel = rng.chance(0.5);
        config.set("kind", if kernel { "kernel" } else { "ffn" }).set("n", if kernel { 3 } else { rng.between(1, 20) });
        config.set("training", rng.chance(0.7));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        if config.bool("training")? {
            draw.uniform("u", [config.positive("n")?]);
        }
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let ((kind, n), training) = (kind(run.config())?, run.config().bool("training")?);
        let u = noise(run, "u", [n], training)?;
        let (thresholds, layout) = Layout::build(|names| Ok(names.param("thresholds", [n], Init::Constant(START))))?;
        let p = run.params(&layout)?;
        let gates = Gates::new(kind, p.get(thresholds), u.as_ref().map(Tensor::data));
        run.output("gates", &gates.gates());
        run.output("expected", &gates.expected());
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let (d_gates, d_expected) = (run.cotangent("gates", [n].into())?, run.cotangent("expected", [n].into())?);
            gates.backward(g.get_mut(thresholds), Some(d_gates.data()), Some(d_expected.data()));
            run.grad_params(&g);
        }
        Ok(())
    }
}

/// What one layer costs for each of its choices, in multiply-adds: `c_1`, `c_3`, `c_m`, and `2NC` per hidden unit.
#[derive(Clone, Copy, Debug)]
pub struct LayerFlops {
    /// The 1×1 bottleneck, the 3×3 bottleneck, attention.
    pub choices: [f64; 3],
    /// A hidden unit of the MLP.
    pub unit: f64,
}

impl LayerFlops {
    /// A DeiT layer of `n` patches, width `c` and `heads`.
    pub fn deit(n: usize, c: usize, heads: usize) -> Self {
        let (n, c, d) = (n as f64, c as f64, (c / heads) as f64);
        let tokens = n + 1.0;
        LayerFlops { choices: [2.0 * c * d * n, 10.0 * c * d * n, 4.0 * tokens * c * c + 2.0 * c * tokens * tokens], unit: 2.0 * n * c }
    }

    /// A Swin layer on `n` tokens in windows of `window` tokens.
    pub fn swin(n: usize, c: usize, heads: usize, window: usize) -> Self {
        let (n, c, d, w) = (n as f64, c as f64, (c / heads) as f64, window as f64);
        LayerFlops { choices: [2.0 * c * d * n, 10.0 * c * d * n, (n / w) * (4.0 * w * c * c + 2.0 * w * w * c)], unit: 2.0 * n * c }
    }

    /// `c_1`, `c_3 − c_1`, `c_m − c_3`: what each expected gate adds.
    fn steps(&self) -> [f64; 3] {
        let [one, three, attention] = self.choices;
        [one, three - one, attention - three]
    }
}

/// `λ (target − F/10⁹)²` over layers of gates.
#[derive(Clone, Debug)]
pub struct FlopsLoss {
    /// The layers.
    pub layers: Vec<LayerFlops>,
    /// What is spent whatever the gates say.
    pub fixed: f64,
    /// In 10⁹.
    pub target: f64,
    /// λ.
    pub lambda: f64,
}

/// The loss and its parts.
#[derive(Clone, Copy, Debug)]
pub struct FlopsValue {
    /// `λ (target − F/10⁹)²`.
    pub loss: f64,
    /// F.
    pub flops: f64,
    /// The part of the attention layers.
    pub attention: f64,
    /// The part of the MLPs.
    pub ffn: f64,
}

impl FlopsLoss {
    /// The loss for the expected gates of every layer's attention and MLP.
    pub fn value(&self, gates: &[(Gates, Gates)]) -> FlopsValue {
        let (mut attention, mut ffn) = (0.0, 0.0);
        for (layer, (kernel, units)) in self.layers.iter().zip(gates) {
            let expected = kernel.expected::<f64>();
            attention += layer.steps().iter().zip(expected.data()).fold(0.0, |sum, (c, k)| sum + c * k);
            ffn += layer.unit * units.expected::<f64>().data().iter().fold(0.0, |sum, f| sum + f);
        }
        let flops = self.fixed + attention + ffn;
        FlopsValue { loss: self.lambda * (self.target - flops / 1e9).powi(2), flops, attention, ffn }
    }

    /// For every layer the gradients of its expected gates (three of the attention, one for every hidden unit), for that of the loss.
    pub fn backward<T: Float>(&self, value: FlopsValue, d_loss: T) -> Vec<([T; 3], T)> {
        let d_flops = d_loss.to_f64() * -2.0 * self.lambda * (self.target - value.flops / 1e9) / 1e9;
        self.layers.iter().map(|layer| (layer.steps().map(|c| T::from_f64(c * d_flops)), T::from_f64(layer.unit * d_flops))).collect()
    }

    /// For DeiT.
    #[allow(clippy::too_many_arguments)]
    pub fn deit(
        [image, patch, chans]: [usize; 3],
        classes: usize,
        [width, depth, heads]: [usize; 3],
        target: f64,
        lambda: f64,
    ) -> Result<Self> {
        if patch == 0 || !image.is_multiple_of(patch) || heads == 0 || !width.is_multiple_of(heads) || depth > 1 << 16 {
            return Err(Error::config(
                "patch_size",
                format!(
                    "expected whole patches and heads, found image {image}, patch {patch}, width {width}, {heads} heads, depth {depth}"
                ),
            ));
        }
        let n = (image / patch).saturating_mul(image / patch);
        let (tokens, c) = (n as f64, width as f64);
        let fixed = tokens * c * (chans as f64) * (patch as f64).powi(2) + c * classes as f64 + depth as f64 * 2.0 * c * (tokens + 1.0);
        Ok(FlopsLoss { layers: vec![LayerFlops::deit(n, width, heads); depth], fixed, target, lambda })
    }
}

/// `nn.spvit_flops_loss`.
pub struct SpvitFlopsLoss;

struct LossParams {
    kernel: Param,
    ffn: Param,
}

impl LossParams {
    fn new(names: &mut Names, depth: usize, hidden: usize) -> Result<Self> {
        let shape = Shape::try_new(&[depth, hidden])?;
        let kernel = names.param("kernel_thresholds", [depth, 3], Init::Constant(START));
        Ok(LossParams { kernel, ffn: names.param("ffn_thresholds", shape, Init::Constant(START)) })
    }

    fn gates<T: Float>(&self, p: &Params<T>, hidden: usize) -> Vec<(Gates, Gates)> {
        let kernel = p.get(self.kernel).chunks_exact(3).map(|t| Gates::new(GateKind::Kernel, t, None));
        let ffn = p.get(self.ffn).chunks_exact(hidden).map(|t| Gates::new(GateKind::Ffn, t, None));
        kernel.zip(ffn).collect()
    }
}

impl Operation for SpvitFlopsLoss {
    const NAME: &'static str = "nn.spvit_flops_loss";
    const PAPER: &'static str = "2111.11802 SPViT";

    fn sample(rng: &mut Rng) -> Config {
        let (heads, patch, mut config) = (rng.between(1, 3), rng.between(1, 4), Config::default());
        config.set("arch", "deit").set("image_size", patch * rng.between(1, 4)).set("patch_size", patch).set("in_chans", rng.between(1, 3));
        config.set("num_classes", rng.between(1, 9)).set("embed_dim", heads * rng.between(1, 5)).set("depth", rng.between(1, 3));
        config.set("num_heads", heads).set("hidden", rng.between(1, 12)).set("target_flops", rng.range(0.0, 1e-4));
        config.set("loss_lambda", 1e6);
        config
    }

    fn inputs(_: &Config, _: &mut Draw) -> Result<()> {
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        config.choice("arch", &["deit"])?;
        let sizes = |keys: [&str; 3]| -> Result<[usize; 3]> {
            Ok([config.positive(keys[0])?, config.positive(keys[1])?, config.positive(keys[2])?])
        };
        let [width, depth, heads] = sizes(["embed_dim", "depth", "num_heads"])?;
        let loss = FlopsLoss::deit(
            sizes(["image_size", "patch_size", "in_chans"])?,
            config.positive("num_classes")?,
            [width, depth, heads],
            config.f64("target_flops")?,
            config.f64("loss_lambda")?,
        )?;
        let hidden = config.positive("hidden")?;
        let (params, layout) = Layout::build(|names| LossParams::new(names, depth, hidden))?;
        let p = run.params(&layout)?;
        let gates = params.gates(&p, hidden);
        let value = loss.value(&gates);
        for (name, x) in [("loss", value.loss), ("flops", value.flops), ("att_flops", value.attention), ("ffn_flops", value.ffn)] {
            run.output(name, &Tensor::scalar(T::from_f64(x)));
        }
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let d_loss = run.cotangent("loss", Shape::from([]))?;
            for (b, (d_kernel, d_unit)) in loss.backward(value, d_loss.data()[0]).into_iter().enumerate() {
                gates[b].0.backward(&mut g.get_mut(params.kernel)[3 * b..3 * b + 3], None, Some(&d_kernel));
                let d_units = vec![d_unit; hidden];
                gates[b].1.backward(&mut g.get_mut(params.ffn)[b * hidden..(b + 1) * hidden], None, Some(&d_units));
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
