//! Counter-based random numbers: Philox4x32-10.
//!
//! A number depends only on its key `(seed, purpose)` and its counter `(step, sample, index)`, never on what was drawn
//! before or by which thread: the same run gives the same numbers for any thread count and after a resume.
//!
//! Salmon, Moraes, Dror, Shaw, *Parallel random numbers: as easy as 1, 2, 3*, SC 2011.

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten rounds of Philox4x32: 128 random bits from a 128-bit counter and a 64-bit key.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let p0 = u64::from(MULTIPLIER[0]) * u64::from(counter[0]);
        let p1 = u64::from(MULTIPLIER[1]) * u64::from(counter[2]);
        counter = [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
    }
    counter
}

/// What a stream of random numbers is for; streams of different purpose are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Parameter initialisation; `sample` is the parameter.
    Init = 1,
    /// The order of the samples in an epoch; `step` is the epoch.
    Shuffle = 2,
    /// Crops, flips and other augmentation.
    Augment = 3,
    /// Masks of masked image modeling.
    Mask = 4,
    /// Drop path and dropout.
    DropPath = 5,
    /// Golden cases, property tests, benchmarks.
    Case = 6,
    /// Linear probes.
    Probe = 7,
    /// Mixup and cutmix.
    Mix = 8,
    /// The noise of a tokenizer's training.
    Noise = 9,
}

/// A stream of random numbers for one `(seed, purpose, step, sample)`.
#[derive(Clone, Debug)]
pub struct Rng {
    key: [u32; 2],
    step: u32,
    sample: u32,
    index: u64,
    block: [u32; 4],
    used: usize,
}

impl Rng {
    /// The stream of `(seed, purpose, step, sample)`, from its beginning.
    pub fn new(seed: u64, purpose: Purpose, step: u64, sample: u64) -> Self {
        // `step` and `sample` above 32 bits fold into the key, so that no two streams of a real run coincide.
        let high = (step >> 32) as u32 ^ ((sample >> 32) as u32).rotate_left(16);
        let key = [seed as u32, (seed >> 32) as u32 ^ (purpose as u32).wrapping_mul(0x9E37_79B9) ^ high];
        Rng { key, step: step as u32, sample: sample as u32, index: 0, block: [0; 4], used: 4 }
    }

    /// 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            let counter = [self.index as u32, (self.index >> 32) as u32, self.step, self.sample];
            self.block = philox4x32(counter, self.key);
            self.index += 1;
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) | u64::from(self.next_u32()) << 32
    }

    /// Uniform in `[0, 1)` with 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in `[low, high)`.
    pub fn range(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// A uniform integer in `0..n`, without modulo bias (Lemire's rejection). `n` must be positive.
    pub fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        loop {
            let wide = u128::from(self.next_u64()) * u128::from(n);
            if (wide as u64) >= n.wrapping_neg() % n {
                return (wide >> 64) as usize;
            }
        }
    }

    /// A uniform integer in `low..=high`.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    /// One of `items`, uniformly. `items` must not be empty.
    pub fn pick<'a, T: ?Sized>(&mut self, items: &[&'a T]) -> &'a T {
        items[self.below(items.len())]
    }

    /// A coin that shows true with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.uniform() < p
    }

    /// Standard normal (Box–Muller; `libm`, so the same bits on every machine).
    pub fn normal(&mut self) -> f64 {
        let radius = libm::sqrt(-2.0 * libm::log(1.0 - self.uniform()));
        radius * libm::cos(std::f64::consts::TAU * self.uniform())
    }

    /// A random permutation of `0..n` (Fisher–Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors published with Random123.
    #[test]
    fn published_vectors() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, want) in cases {
            assert_eq!(philox4x32(counter, key), want);
        }
    }

    #[test]
    fn moments_and_ranges() {
        let mut rng = Rng::new(3, Purpose::Case, 0, 0);
        let n = 100_000;
        let (mut sum, mut squares, mut counts) = (0.0, 0.0, [0usize; 7]);
        for _ in 0..n {
            let z = rng.normal();
            sum += z;
            squares += z * z;
            counts[rng.below(7)] += 1;
        }
        assert!((sum / n as f64).abs() < 0.02 && (squares / n as f64 - 1.0).abs() < 0.03);
        assert!(counts.iter().all(|&c| c.abs_diff(n / 7) < 700), "{counts:?}");
        let mut seen = rng.permutation(101);
        seen.sort_unstable();
        assert!(seen.iter().copied().eq(0..101));
    }

    #[test]
    fn streams_differ() {
        let first = |p, step, sample| Rng::new(1, p, step, sample).next_u64();
        let all = [
            first(Purpose::Mask, 0, 0),
            first(Purpose::Init, 0, 0),
            first(Purpose::Mask, 1, 0),
            first(Purpose::Mask, 0, 1),
            first(Purpose::Mask, 1 << 32, 0),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b));
        }
    }
}
