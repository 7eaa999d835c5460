//! What pre-training is worth: accuracies of a network that starts from pre-trained parameters against the same network from scratch.

use serde_json::{Value, json};

/// What `karat transfer` found of a run.
pub const TRANSFER: &str = "transfer.json";

/// Accuracies with several seeds, in pairs that share seed, images and settings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gain {
    /// From scratch.
    pub scratch: Vec<f64>,
    /// From pre-trained parameters.
    pub tuned: Vec<f64>,
}

/// Mean and standard deviation of a few measurements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// `√(Σ (x − mean)²/(n − 1))`; none of a single measurement.
    pub deviation: Option<f64>,
}

impl Spread {
    /// Of at least one measurement.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|x| (x - mean) * (x - mean)).sum();
        Spread { mean, deviation: (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt()) }
    }
}

impl Gain {
    /// What pre-training adds, seed by seed.
    pub fn differences(&self) -> Vec<f64> {
        self.tuned.iter().zip(&self.scratch).map(|(tuned, scratch)| tuned - scratch).collect()
    }

    /// All accuracies, their means and deviations.
    pub fn to_json(&self) -> Value {
        let part = |values: &[f64]| {
            let Spread { mean, deviation } = Spread::of(values);
            json!({ "mean": mean, "spread": deviation, "seeds": values })
        };
        json!({ "scratch": part(&self.scratch), "finetuned": part(&self.tuned), "difference": part(&self.differences()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        assert_eq!(Spread::of(&[0.25]), Spread { mean: 0.25, deviation: None });
        let Spread { mean, deviation } = Spread::of(&[1.0, 2.0, 6.0]);
        assert_eq!(mean, 3.0);
        assert!((deviation.unwrap() - 7f64.sqrt()).abs() < 1e-12);
        let gain = Gain { scratch: vec![0.5, 0.25], tuned: vec![0.75, 1.0] };
        assert_eq!(gain.differences(), [0.25, 0.75]);
        assert_eq!(gain.to_json()["difference"]["mean"], 0.5);
    }
}
