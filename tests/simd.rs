//! Vectors: every operation against scalar IEEE arithmetic on every back end, the same bits of exp, erf, tanh and GELU from
//! each, and the accuracy of these functions over all f32.
//!
//! The accuracy sweep visits all 2³² bit patterns with `KARAT_SOAK=1` (minutes), else every 61st. Run it with
//! `--nocapture` for the errors found.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use karat::simd::{Isa, Kernel, LANES, Vector, force};
use karat::tensor::Float;
use rayon::prelude::*;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Any bit pattern; one in four is special, one in four of moderate size, so that rounding and cancellation happen.
    fn float(&mut self) -> f32 {
        const SPECIAL: [f32; 10] = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.5, -2.5, f32::MIN_POSITIVE, 1e-45, f32::MAX];
        let bits = self.next();
        match bits >> 62 {
            0 => SPECIAL[(bits % 10) as usize],
            1 => (bits as u32 as f32 / 2f32.powi(28)) - 8.0,
            _ => f32::from_bits(bits as u32),
        }
    }

    fn lanes(&mut self) -> [f32; LANES] {
        std::array::from_fn(|_| self.float())
    }

    /// Whole numbers from `-limit` to `limit`.
    fn whole(&mut self, limit: u64) -> [f32; LANES] {
        std::array::from_fn(|_| (self.next() % (2 * limit + 1)) as f32 - limit as f32)
    }
}

/// The bits, with one pattern for all NaN.
fn bits(x: f32) -> u32 {
    if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }
}

type Operation = (&'static str, [f32; LANES]);

/// Every lane-wise operation, on three operands, whole numbers for `pow2` and for `ldexp`, and moderate lanes for `ldexp`.
#[derive(Clone)]
struct Operands {
    a: [f32; LANES],
    b: [f32; LANES],
    c: [f32; LANES],
    power: [f32; LANES],
    scale: [f32; LANES],
    moderate: [f32; LANES],
}

impl Operands {
    fn random(random: &mut Random) -> Self {
        let moderate = random.whole(1 << 24).map(|x| (x + 0.5) / 256.0);
        let (a, b, c) = (random.lanes(), random.lanes(), random.lanes());
        Operands { a, b, c, power: random.whole(126), scale: random.whole(200), moderate }
    }

    fn expected(&self) -> Vec<Operation> {
        let (a, b, c) = (self.a, self.b, self.c);
        let each = |f: &dyn Fn(usize) -> f32| std::array::from_fn(f);
        vec![
            ("add", each(&|i| a[i] + b[i])),
            ("sub", each(&|i| a[i] - b[i])),
            ("mul", each(&|i| a[i] * b[i])),
            ("div", each(&|i| a[i] / b[i])),
            ("neg", each(&|i| -a[i])),
            ("mul_add", each(&|i| a[i].mul_add(b[i], c[i]))),
            ("max", each(&|i| if a[i] > b[i] { a[i] } else { b[i] })),
            ("min", each(&|i| if a[i] < b[i] { a[i] } else { b[i] })),
            ("sqrt", each(&|i| a[i].sqrt())),
            ("abs", each(&|i| a[i].abs())),
            ("round", each(&|i| a[i].round_ties_even())),
            ("copysign", each(&|i| a[i].copysign(b[i]))),
            ("less", each(&|i| if a[i] < b[i] { c[i] } else { a[i] })),
            ("pow2", each(&|i| 2f32.powi(self.power[i] as i32))),
            ("ldexp", each(&|i| (f64::from(self.moderate[i]) * 2f64.powi(self.scale[i] as i32)) as f32)),
            ("splat", [a[3]; LANES]),
            ("load_ptr", a),
        ]
    }
}

impl Kernel<f32> for Operands {
    type Output = Vec<Operation>;
    #[inline(always)]
    fn run<V: Vector<f32>>(self) -> Vec<Operation> {
        let (a, b, c) = (V::load(&self.a), V::load(&self.b), V::load(&self.c));
        vec![
            ("add", (a + b).to_array()),
            ("sub", (a - b).to_array()),
            ("mul", (a * b).to_array()),
            ("div", (a / b).to_array()),
            ("neg", (-a).to_array()),
            ("mul_add", a.mul_add(b, c).to_array()),
            ("max", a.max(b).to_array()),
            ("min", a.min(b).to_array()),
            ("sqrt", a.sqrt().to_array()),
            ("abs", a.abs().to_array()),
            ("round", a.round().to_array()),
            ("copysign", a.copysign(b).to_array()),
            ("less", a.less(b, c, a).to_array()),
            ("pow2", V::load(&self.power).pow2().to_array()),
            ("ldexp", V::load(&self.moderate).ldexp(V::load(&self.scale)).to_array()),
            ("splat", V::splat(self.a[3]).to_array()),
            // SAFETY: the array has sixteen elements.
            ("load_ptr", unsafe { V::load_ptr(self.a.as_ptr()) }.to_array()),
        ]
    }
}

/// Partial loads and stores of every length, the store, and the horizontal operations.
struct Edges<'a>(&'a [f32; LANES]);

impl Kernel<f32> for Edges<'_> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<f32>>(self) {
        let a = self.0;
        for n in 0..=LANES {
            let lanes = V::load_partial(&a[..n], 7.0).to_array();
            assert!((0..LANES).all(|i| bits(lanes[i]) == bits(if i < n { a[i] } else { 7.0 })), "load_partial of {n}");
            let mut out = [3.0; LANES + 1];
            V::load(a).store_partial(&mut out[..n]);
            assert!((0..=LANES).all(|i| bits(out[i]) == bits(if i < n { a[i] } else { 3.0 })), "store_partial of {n}");
        }
        let mut out = [3.0; LANES + 1];
        V::load(a).store(&mut out);
        assert!((0..=LANES).all(|i| bits(out[i]) == bits(if i < LANES { a[i] } else { 3.0 })), "store");

        let mut fold = a.to_vec();
        while fold.len() > 1 {
            let half = fold.len() / 2;
            fold = (0..half).map(|i| fold[i] + fold[i + half]).collect();
        }
        assert_eq!(bits(V::load(a).sum()), bits(fold[0]), "sum of {a:?}");
        let ordered = a.map(|x| if x.is_nan() { 0.0 } else { x });
        assert_eq!(V::load(&ordered).largest(), ordered.into_iter().fold(f32::NEG_INFINITY, f32::max), "largest of {ordered:?}");
    }
}

#[derive(Clone, Copy, Debug)]
enum Function {
    Exp,
    Erf,
    Tanh,
    Gelu,
}

impl Function {
    const ALL: [Function; 4] = [Function::Exp, Function::Erf, Function::Tanh, Function::Gelu];
}

/// `y = f(x)`; GELU's derivative goes to `slope`.
struct Apply<'a> {
    function: Function,
    x: &'a [f32],
    y: &'a mut [f32],
    slope: &'a mut [f32],
}

impl Kernel<f32> for Apply<'_> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<f32>>(self) {
        let chunks = self.x.chunks_exact(LANES).zip(self.y.chunks_exact_mut(LANES)).zip(self.slope.chunks_exact_mut(LANES));
        for ((x, y), slope) in chunks {
            let x = V::load(x);
            match self.function {
                Function::Exp => x.exp().store(y),
                Function::Erf => x.erf().store(y),
                Function::Tanh => x.tanh().store(y),
                Function::Gelu => {
                    let (value, derivative) = x.gelu_with_grad();
                    value.store(y);
                    derivative.store(slope);
                    let alone = x.gelu().to_array();
                    assert!((0..LANES).all(|i| bits(alone[i]) == bits(y[i])), "gelu and gelu_with_grad differ near {}", alone[0]);
                }
            }
        }
    }
}

fn apply(function: Function, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
    assert_eq!(x.len() % LANES, 0);
    let (mut y, mut slope) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    f32::dispatch(Apply { function, x, y: &mut y, slope: &mut slope });
    (y, slope)
}

/// The one test that forces back ends: the choice is global to the process.
#[test]
fn every_back_end_gives_the_same_bits() {
    let available: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| isa.available()).collect();
    // A prime stride through all bit patterns.
    let sweep: Vec<f32> = (0..1 << 20).map(|i: u32| f32::from_bits(i.wrapping_mul(4093))).collect();
    let mut first: Option<Vec<(Vec<f32>, Vec<f32>)>> = None;
    for &isa in &available {
        force(isa).unwrap();
        let mut random = Random(11);
        for _ in 0..20_000 {
            let operands = Operands::random(&mut random);
            for ((name, got), (_, want)) in f32::dispatch(operands.clone()).into_iter().zip(operands.expected()) {
                for i in 0..LANES {
                    let (a, b, c) = (operands.a[i], operands.b[i], operands.c[i]);
                    assert_eq!(bits(got[i]), bits(want[i]), "{isa:?} {name}: {} for {}, lane {i} of {a:e} {b:e} {c:e}", got[i], want[i]);
                }
            }
            f32::dispatch(Edges(&operands.a));
        }
        let outputs: Vec<_> = Function::ALL.iter().map(|&f| apply(f, &sweep)).collect();
        let reference = first.get_or_insert_with(|| outputs.clone());
        for ((function, got), want) in Function::ALL.iter().zip(&outputs).zip(reference.iter()) {
            for (i, x) in sweep.iter().enumerate() {
                assert_eq!(bits(got.0[i]), bits(want.0[i]), "{isa:?} and {:?}: {function:?}({x:e})", available[0]);
                assert_eq!(bits(got.1[i]), bits(want.1[i]), "{isa:?} and {:?}: derivative of {function:?} at {x:e}", available[0]);
            }
        }
    }
}

/// The distance of `y` from `exact` in units of the last place of an f32 as large as `exact`; infinite where an infinity or its
/// absence is wrong.
fn ulp(y: f32, exact: f64) -> f64 {
    let nearest = exact as f32;
    if !nearest.is_finite() || !y.is_finite() {
        return if bits(y) == bits(nearest) { 0.0 } else { f64::INFINITY };
    }
    let exponent = ((exact.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    let unit = f64::from_bits(((exponent.max(-126) - 23 + 1023) as u64) << 52);
    (f64::from(y) - exact).abs() / unit
}

/// f(a), f(−a), and for GELU the derivatives, in f64. Series below 2⁻¹³, whose next term is below 2⁻³⁸ of the whole, and limits
/// where f32 cannot tell the difference, for speed.
fn exact(function: Function, a: f64) -> [f64; 4] {
    let tiny = a < 1.0 / 8192.0;
    match function {
        Function::Exp => {
            let at = |x: f64| if tiny { 1.0 + x + 0.5 * x * x } else { libm::exp(x.clamp(-110.0, 100.0)) };
            [at(a), at(-a), 0.0, 0.0]
        }
        Function::Erf => {
            let y = if tiny { FRAC_2_SQRT_PI * (a - a * a * a / 3.0) } else { libm::erf(a.min(6.0)) };
            [y, -y, 0.0, 0.0]
        }
        Function::Tanh => {
            let y = if tiny { a - a * a * a / 3.0 } else { libm::tanh(a.min(20.0)) };
            [y, -y, 0.0, 0.0]
        }
        Function::Gelu => {
            let peak = 0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
            let end = a.min(16.0);
            let upper = if tiny { 0.5 - peak * a } else { 0.5 * libm::erfc(end * FRAC_1_SQRT_2) };
            let slope = if tiny { peak * a } else { end * peak * libm::exp(-0.5 * end * end) };
            [a * (1.0 - upper), -end * upper, 1.0 - upper + slope, upper - slope]
        }
    }
}

/// The worst found: an error and where.
#[derive(Clone, Copy, Debug, Default)]
struct Worst {
    error: f64,
    at: f32,
}

impl Worst {
    fn see(&mut self, error: f64, at: f32) {
        if error > self.error || error.is_nan() {
            *self = Worst { error, at };
        }
    }
    fn merge(mut self, other: Worst) -> Worst {
        self.see(other.error, other.at);
        self
    }
}

/// Worst ULP of the value, worst absolute error of the slope, worst ULP of the slope where it exceeds 1/16 in magnitude.
type Report = [Worst; 3];

fn examine(function: Function, patterns: impl Iterator<Item = u32>) -> Report {
    let mut x: Vec<f32> = patterns.map(f32::from_bits).collect();
    let mut report = Report::default();
    while !x.len().is_multiple_of(LANES) {
        x.push(1.0);
    }
    let minus: Vec<f32> = x.iter().map(|x| -x).collect();
    let (plus, minus) = (apply(function, &x), apply(function, &minus));
    for (i, &a) in x.iter().enumerate() {
        if a.is_nan() {
            assert!(plus.0[i].is_nan() && minus.0[i].is_nan(), "{function:?} of NaN");
            assert!(!matches!(function, Function::Gelu) || (plus.1[i].is_nan() && minus.1[i].is_nan()), "slope at NaN");
            continue;
        }
        if matches!(function, Function::Erf | Function::Tanh) {
            assert_eq!(plus.0[i].to_bits() ^ (1 << 31), minus.0[i].to_bits(), "{function:?} is odd at {a:e}");
        }
        let exact = exact(function, f64::from(a));
        report[0].see(ulp(plus.0[i], exact[0]), a);
        report[0].see(ulp(minus.0[i], exact[1]), -a);
        for (slope, exact, x) in [(plus.1[i], exact[2], a), (minus.1[i], exact[3], -a)] {
            report[1].see((f64::from(slope) - exact).abs(), x);
            if exact.abs() > 1.0 / 16.0 {
                report[2].see(ulp(slope, exact), x);
            }
        }
    }
    report
}

#[test]
fn elementary_functions_are_accurate() {
    let soak = std::env::var("KARAT_SOAK").is_ok_and(|v| v == "1");
    let stride: u32 = if soak { 1 } else { 61 };
    // Patterns of non-negative numbers and NaN; `examine` sees to the sign.
    const BLOCK: u32 = 1 << 18;
    for function in Function::ALL {
        let merge = |a: Report, b: Report| [a[0].merge(b[0]), a[1].merge(b[1]), a[2].merge(b[2])];
        let report = (0..(1u32 << 31) / BLOCK)
            .into_par_iter()
            .map(|block| examine(function, (block * BLOCK..(block + 1) * BLOCK).step_by(stride as usize)))
            .collect::<Vec<_>>()
            .into_iter()
            .fold(Report::default(), merge);
        println!("{function:?}, every {stride}: {report:?}");
        assert!(report[0].error <= 2.0, "{function:?}: {:?} ULP", report[0]);
        assert!(report[1].error <= 3e-7, "slope of {function:?}: {:?}", report[1]);
        assert!(report[2].error <= 16.0, "slope of {function:?}: {:?} ULP", report[2]);
    }
}

#[test]
fn limits_and_signed_zeros() {
    let at = |function, x: f32| {
        let (y, slope) = apply(function, &[x; LANES]);
        (y[0], slope[0])
    };
    let (inf, least) = (f32::INFINITY, f32::from_bits(1));
    for (x, y) in [(0.0, 1.0), (-0.0, 1.0), (inf, inf), (-inf, 0.0), (89.0, inf), (-104.0, 0.0), (-103.0, least)] {
        assert_eq!(at(Function::Exp, x).0.to_bits(), f32::to_bits(y), "exp {x}");
    }
    for function in [Function::Erf, Function::Tanh] {
        for (x, y) in [(0.0, 0.0), (-0.0, -0.0), (inf, 1.0), (-inf, -1.0), (least, least), (-least, -least)] {
            assert_eq!(at(function, x).0.to_bits(), f32::to_bits(y), "{function:?} {x}");
        }
    }
    assert_eq!(at(Function::Gelu, inf), (inf, 1.0));
    assert_eq!(at(Function::Gelu, -inf), (0.0, 0.0));
    assert_eq!(at(Function::Gelu, 0.0), (0.0, 0.5));
    assert_eq!(at(Function::Gelu, -0.0), (0.0, 0.5));
}
