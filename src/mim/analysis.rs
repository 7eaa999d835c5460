//! Two looks at a trained network that A²MIM (arXiv 2205.13943) takes: multi-order interactions of patches, and the Fourier spectrum of
//! features (Park and Kim, arXiv 2202.06709).
//!
//! Interactions: [`interaction`](super::interaction) over random pairs of near patches and random contexts, with a curve of mean 1 over the
//! orders. Fourier: `Δ(r) = mean ln|F(u, v)| − mean ln|F(0, 0)|` over images, channels and the frequencies whose distance from the centre
//! rounds to r; r = 1 is the highest frequency along an axis.

use std::collections::BTreeSet;

use super::frequency::Dft;
use super::interaction::{context, four_images, interaction, strength};
use crate::error::{Error, Result};
use crate::nn::maps::channels_first;
use crate::tensor::Tensor;
use crate::tensor::random::{Purpose, Rng};

/// The orders of the published curve, as shares of the patches.
pub const RATIOS: [f64; 13] = [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0];

/// How interactions are sampled.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// Patches per side; divides the side of the images.
    pub grid: usize,
    /// Orders, as shares of the patches.
    pub ratios: Vec<f64>,
    /// Pairs of patches per image.
    pub pairs: usize,
    /// Contexts per pair and order.
    pub contexts: usize,
    /// How the true class is scored, one of [`REWARDS`](super::interaction::REWARDS).
    pub reward: String,
    /// Seed of pairs and contexts.
    pub seed: u64,
}

impl Sampling {
    fn check(&self, side: usize) -> Result<()> {
        let range = |key: &str, ok: bool, message: String| if ok { Ok(()) } else { Err(Error::config(key, message)) };
        let grid = self.grid;
        range("grid", grid >= 3 && side.is_multiple_of(grid), format!("expected at least 3 and a divisor of {side}, found {grid}"))?;
        // A patch has at least eight partners within two rows and columns; each pair is drawn once.
        let most = 4 * grid * grid;
        range("pairs", (1..=most).contains(&self.pairs), format!("expected 1 to {most}, found {}", self.pairs))?;
        range("contexts", self.contexts > 0, "expected at least 1".into())?;
        let orders = &self.ratios;
        range("ratios", !orders.is_empty() && orders.iter().all(|r| (0.0..=1.0).contains(r)), "expected numbers from 0 to 1".into())?;
        range(
            "reward",
            super::interaction::REWARDS.contains(&self.reward.as_str()),
            format!("expected one of {:?}, found \"{}\"", super::interaction::REWARDS, self.reward),
        )
    }

    /// Different unordered pairs: the first patch anywhere, the second at most two rows and columns away.
    fn draw_pairs(&self, rng: &mut Rng) -> Vec<[usize; 2]> {
        let (g, mut seen, mut pairs) = (self.grid, BTreeSet::new(), Vec::with_capacity(self.pairs));
        while pairs.len() < self.pairs {
            let i = rng.below(g * g);
            let shift = |x: usize, rng: &mut Rng| (x + rng.below(5)).saturating_sub(2).min(g - 1);
            let j = shift(i / g, rng) * g + shift(i % g, rng);
            if i != j && seen.insert((i.min(j), i.max(j))) {
                pairs.push([i, j]);
            }
        }
        pairs
    }
}

/// The strength of each order's interactions over `images` `[X, C, S, S]` of the classes `labels`; `logits` maps `[B, C, S, S]` to
/// `[B, K]`. `progress` hears of every image and order.
///
/// # Errors
/// If the sampling makes no sense or `logits` fails.
pub fn interactions(
    sampling: &Sampling,
    images: &Tensor<f32>,
    labels: &[usize],
    logits: &mut dyn FnMut(&Tensor<f32>) -> Result<Tensor<f32>>,
    progress: &mut dyn FnMut(),
) -> Result<Vec<f64>> {
    let [x, c, side, width] = images.dims("images")?;
    if side != width || x == 0 || labels.len() != x {
        return Err(Error::shape("images", format!("[{}, channels, side, side], one or more", labels.len()), images.shape()));
    }
    sampling.check(side)?;
    let Sampling { grid, pairs, contexts, .. } = *sampling;
    let size = c * side * side;
    let mut all = Vec::with_capacity(x * sampling.ratios.len() * pairs * contexts);
    let mut sets = Tensor::scratch([4 * contexts, c, side, side]);
    for (image, (pixels, &label)) in images.data().chunks_exact(size).zip(labels).enumerate() {
        let chosen = sampling.draw_pairs(&mut Rng::new(sampling.seed, Purpose::Probe, 0, image as u64));
        for (order, &ratio) in sampling.ratios.iter().enumerate() {
            for (k, &pair) in chosen.iter().enumerate() {
                let stream = ((image * sampling.ratios.len() + order) * pairs + k) as u64;
                let mut rng = Rng::new(sampling.seed, Purpose::Probe, 1, stream);
                for four in sets.data_mut().chunks_exact_mut(4 * size) {
                    let noise: Vec<f64> = (0..grid * grid).map(|_| rng.uniform()).collect();
                    four_images(four, pixels, side, grid, pair, &context(&noise, pair, ratio));
                }
                let scores = logits(&sets)?;
                let [_, classes] = scores.dims("logits")?;
                if label >= classes || classes < 2 {
                    return Err(Error::value("labels", format!("class {label}, expected less than {classes}, the logits; at least two")));
                }
                for four in scores.data().chunks_exact(4 * classes) {
                    let four: Vec<f64> = four.iter().map(|&z| f64::from(z)).collect();
                    all.push(interaction(&four, label, &sampling.reward));
                }
            }
            progress();
        }
    }
    Ok(strength(&all, [x, sampling.ratios.len(), pairs, contexts]))
}

/// The spectrum of one feature map.
#[derive(Clone, Debug, PartialEq)]
pub struct Spectrum {
    /// The name under which the network shows the map.
    pub name: String,
    /// Rows (and columns) of the map.
    pub side: usize,
    /// `(r, Δ(r))`, from 0.
    pub curve: Vec<(f64, f64)>,
}

/// A square map `[B, C, n, n]` of what a network shows: a map `[B, n, n, C]`, or tokens `[B, n², C]`, a class token in front dropped.
fn as_map(x: &Tensor<f32>) -> Option<Tensor<f32>> {
    if let Ok([_, h, w, _]) = x.dims::<4>("map") {
        return if h == w { channels_first(x).ok() } else { None };
    }
    let [b, n, c] = x.dims::<3>("tokens").ok()?;
    let prefix = [0, 1].into_iter().find(|prefix| n > *prefix && (n - prefix).isqrt().pow(2) == n - prefix)?;
    let (side, data) = ((n - prefix).isqrt(), x.data());
    let map = Tensor::from_fn([b, side, side, c], |i| data[i / (side * side * c) * n * c + prefix * c + i % (side * side * c)]);
    channels_first(&map).ok()
}

/// The spectra of stages or blocks, whichever a network shows; of its last tokens if neither. Maps of one position have none.
///
/// # Errors
/// If it shows no map of several positions.
pub fn spectra(shown: &[(String, Tensor<f32>)]) -> Result<Vec<Spectrum>> {
    let of = |prefixes: &[&str]| -> Vec<Spectrum> {
        let wanted = shown.iter().filter(|(name, _)| prefixes.iter().any(|prefix| name.starts_with(prefix)));
        wanted.filter_map(|(name, x)| spectrum(name, x)).collect()
    };
    let mut found = of(&["stages.", "blocks."]);
    if found.is_empty() {
        found = of(&["tokens"]);
    }
    if found.is_empty() { Err(Error::value("features", "the network shows no map of several positions")) } else { Ok(found) }
}

fn spectrum(name: &str, x: &Tensor<f32>) -> Option<Spectrum> {
    let map = as_map(x)?;
    let [b, c, n, _] = map.dims("map").ok()?;
    if n < 2 || b * c == 0 {
        return None;
    }
    let [re, im] = Dft::new([n, n]).forward(&map);
    let mut logs = vec![0.0; n * n];
    for (re, im) in re.data().chunks_exact(n * n).zip(im.data().chunks_exact(n * n)) {
        for ((log, &re), &im) in logs.iter_mut().zip(re).zip(im) {
            // An amplitude of 0 has no logarithm.
            let power = f64::from(re).powi(2) + f64::from(im).powi(2);
            *log += libm::log(power.sqrt().max(1e-12)) / (b * c) as f64;
        }
    }
    let square = |k: usize| (k.min(n - k) as f64).powi(2);
    let mut rings = vec![(0.0, 0usize); n + 1];
    for (i, log) in logs.iter().enumerate() {
        let ring = &mut rings[(square(i / n) + square(i % n)).sqrt().round() as usize];
        *ring = (ring.0 + log, ring.1 + 1);
    }
    let at = |(r, &(sum, count)): (usize, &(f64, usize))| (count > 0).then(|| (2.0 * r as f64 / n as f64, sum / count as f64 - logs[0]));
    Some(Spectrum { name: name.into(), side: n, curve: rings.iter().enumerate().filter_map(at).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling() -> Sampling {
        Sampling { grid: 4, ratios: vec![0.0, 0.5, 1.0], pairs: 6, contexts: 3, reward: "yi".into(), seed: 1 }
    }

    fn images() -> Tensor<f32> {
        let mut rng = Rng::new(2, Purpose::Case, 0, 0);
        Tensor::from_fn([2, 1, 8, 8], |_| rng.uniform() as f32 + 0.5)
    }

    /// A score that is a sum over patches has no interactions; the square of the sum has the same at every order; a score that asks for
    /// all patches together has them at the highest order alone.
    #[test]
    fn orders_that_are_known() {
        let run = |f: fn(&[f32]) -> f32| {
            let mut logits = |x: &Tensor<f32>| -> Result<Tensor<f32>> {
                let scores: Vec<f32> = x.data().chunks_exact(64).flat_map(|image| [f(image), 0.0]).collect();
                Tensor::new([scores.len() / 2, 2], &scores)
            };
            let mut heard = 0;
            let found = interactions(&sampling(), &images(), &[0, 0], &mut logits, &mut || heard += 1).unwrap();
            assert_eq!(heard, 6);
            found
        };
        let square = run(|x| x.iter().sum::<f32>().powi(2) / 100.0);
        assert!(square.iter().all(|j| (j - 1.0).abs() < 1e-3), "{square:?}");
        let all = run(|x| if x.iter().all(|&x| x > 0.0) { 1.0 } else { 0.0 });
        assert!(all[..2] == [0.0, 0.0] && (all[2] - 3.0).abs() < 1e-9, "{all:?}");
        // Some order must differ, or the curve would have no meaning.
        assert!(run(|x| x.iter().sum::<f32>().sqrt()).iter().any(|j| (j - 1.0).abs() > 0.1));
    }

    #[test]
    fn bad_sampling_is_refused() {
        let mut logits = |x: &Tensor<f32>| Ok(Tensor::zeros([x.shape()[0], 2]));
        let mut error = |change: fn(&mut Sampling)| {
            let mut sampling = sampling();
            change(&mut sampling);
            interactions(&sampling, &images(), &[0, 1], &mut logits, &mut || ()).unwrap_err().to_string()
        };
        assert!(error(|s| s.grid = 3).contains("`grid`"));
        assert!(error(|s| s.pairs = 1000).contains("`pairs`"));
        assert!(error(|s| s.contexts = 0).contains("`contexts`"));
        assert!(error(|s| s.ratios = vec![1.5]).contains("`ratios`"));
        assert!(error(|s| s.reward = "no".into()).contains("`reward`"));
    }

    /// One wave has its energy at its own radius; a class token is left out; other shapes are passed over.
    #[test]
    fn a_wave_is_a_peak() {
        let wave = Tensor::<f32>::from_fn([1, 8, 8, 1], |i| 1.0 + (std::f64::consts::TAU * 2.0 * (i % 8) as f64 / 8.0).cos() as f32);
        let found = spectra(&[("stages.0".into(), wave.clone()), ("pooled".into(), Tensor::zeros([1, 1]))]).unwrap();
        assert_eq!((found.len(), found[0].side), (1, 8));
        let peak = found[0].curve.iter().skip(1).max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
        assert!(peak.0 == 0.5 && found[0].curve[0] == (0.0, 0.0), "{found:?}");
        let tokens = Tensor::from_fn([1, 65, 1], |i| if i == 0 { 99.0 } else { wave.data()[i - 1] });
        assert_eq!(spectra(&[("blocks.0".into(), tokens)]).unwrap()[0].curve, found[0].curve);
        assert!(spectra(&[("tokens".into(), Tensor::zeros([1, 3, 2]))]).is_err());
    }
}
