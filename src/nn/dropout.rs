//! Dropout: `y = x ∘ mask / (1 − rate)`; the gradient passes the same mask.
//!
//! The mask is drawn from counters (seed, step, layer, place), so the backward pass, and a block that is run again, draw it again instead
//! of keeping it, and it does not depend on the number of threads.

use rayon::prelude::*;

use crate::case::Config;
use crate::error::{Error, Result};
use crate::nn::{Params, Pass};
use crate::tensor::Float;
use crate::tensor::random::{Purpose, Rng};

/// Elements per stream of random numbers.
const CHUNK: usize = 4096;

/// Which elements are dropped.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    rate: f64,
    seed: u64,
    /// The first layer's number.
    first: u64,
    /// On outside training steps too.
    always: bool,
}

impl Dropout {
    /// From the keys `dropout` (default `rate`), `training` and `seed` (default 0); `None` where nothing is ever dropped. In training steps
    /// it draws from their key; with `training`, an operation's switch, it is on in any pass and draws from `seed`.
    pub fn from_config(config: &Config, rate: f64) -> Result<Option<Dropout>> {
        let rate = config.f64_or("dropout", rate)?;
        if !(0.0..1.0).contains(&rate) {
            return Err(Error::config("dropout", format!("expected a rate of at least 0 and less than 1, found {rate}")));
        }
        let (always, seed) = (config.bool_or("training", false)?, config.usize_or("seed", 0)? as u64);
        Ok((rate > 0.0).then_some(Dropout { rate, seed, first: 0, always }))
    }

    /// The same for another block, whose layers count from `first`.
    pub fn from_layer(self, first: u64) -> Dropout {
        Dropout { first, ..self }
    }

    /// Masks `x`, or its gradient; `layer` tells the uses of one seed apart.
    pub fn apply<T: Float>(&self, p: &Params<T>, x: &mut [T], layer: u64) {
        let layer = self.first + layer;
        let (seed, step) = match p.pass() {
            Pass::Train { key, .. } => (key.seed ^ (1 + layer).wrapping_mul(0xD1B5_4A32_D192_ED03), key.step),
            _ if self.always => (self.seed, layer),
            _ => return,
        };
        let keep = T::from_f64(1.0 / (1.0 - self.rate));
        x.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, x)| {
            let mut rng = Rng::new(seed, Purpose::DropPath, step, chunk as u64);
            for x in x {
                *x = if rng.uniform() < self.rate { T::ZERO } else { *x * keep };
            }
        });
    }
}
