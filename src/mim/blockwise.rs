//! `mask.blockwise`: BEiT's block-wise mask (arXiv 2106.08254), as a function of a stream of uniform numbers.
//!
//! The rule `code` is that of the released generator: until `num_masking_patches` patches are hidden, up to ten attempts at a block of
//! random area (at least `min_num_patches`) and log-uniform aspect that fits and hides something new, but no more than is left. The count
//! never exceeds the target and can fall short. The rule `paper` is Algorithm 1: uniform aspect, no attempts, overshoots; its rounding and
//! clamping are our completion.

use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor, Tensor};

/// The largest number of patches of a mask.
const MOST_PATCHES: usize = 1 << 24;

/// A rule for drawing blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Blockwise {
    /// Rows and columns of patches.
    pub grid: [usize; 2],
    /// Patches to hide.
    pub target: usize,
    /// Smallest area of a block.
    pub least: usize,
    /// Largest number of new patches of a block.
    pub most: usize,
    /// Range of the ratio of height to width.
    pub aspect: [f64; 2],
    /// The rule of the paper instead of the code's.
    pub paper: bool,
}

/// A mask and the uniform numbers that it took.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockMask {
    /// True where a patch is hidden, row by row.
    pub hidden: Vec<bool>,
    /// Hidden patches.
    pub count: usize,
    /// Numbers taken from the stream.
    pub consumed: usize,
}

/// Uniform numbers, taken in order.
struct Stream<'a, F> {
    next: &'a mut F,
    taken: usize,
}

impl<F: FnMut() -> Option<f64>> Stream<'_, F> {
    fn real(&mut self, a: f64, b: f64) -> Result<f64> {
        let u = (self.next)().ok_or_else(|| Error::value("input `u`", format!("{} numbers are too few", self.taken)))?;
        self.taken += 1;
        Ok(a + (b - a) * u)
    }

    /// An integer from 0 to `b`, both included.
    fn int(&mut self, b: usize) -> Result<usize> {
        Ok((self.real(0.0, b as f64 + 1.0)?.floor() as usize).min(b))
    }
}

impl Blockwise {
    /// From the keys of `mask.blockwise`.
    pub fn from_config(config: &Config) -> Result<Self> {
        let grid = [config.positive("height")?, config.positive("width")?];
        if grid[0].checked_mul(grid[1]).is_none_or(|n| n > MOST_PATCHES) {
            return Err(Error::config("height", format!("expected at most {MOST_PATCHES} patches, found {}×{}", grid[0], grid[1])));
        }
        let low = config.f64_or("min_aspect", 0.3)?;
        let high = config.f64_or("max_aspect", 1.0 / low)?;
        if !(low > 0.0 && high > 0.0 && low.is_finite() && high.is_finite()) {
            return Err(Error::config("min_aspect", format!("expected positive ratios, found {low} to {high}")));
        }
        let target = config.usize("num_masking_patches")?;
        Ok(Blockwise {
            grid,
            target,
            least: config.usize_or("min_num_patches", 4)?,
            most: config.usize_or("max_num_patches", target)?,
            aspect: [low, high],
            paper: config.choice("rule", &["code", "paper"])? == "paper",
        })
    }

    /// The mask that `next` numbers in [0, 1) give; an error if there are too few.
    pub fn mask(&self, mut next: impl FnMut() -> Option<f64>) -> Result<BlockMask> {
        let mut mask = BlockMask { hidden: vec![false; self.grid[0] * self.grid[1]], count: 0, consumed: 0 };
        let mut stream = Stream { next: &mut next, taken: 0 };
        while if self.paper { self.paper_block(&mut mask, &mut stream)? } else { self.code_block(&mut mask, &mut stream)? } {}
        mask.consumed = stream.taken;
        Ok(mask)
    }

    /// Hides a block.
    fn set(&self, mask: &mut BlockMask, [top, left]: [usize; 2], [rows, cols]: [usize; 2]) {
        for y in top..top + rows {
            for hidden in &mut mask.hidden[y * self.grid[1] + left..][..cols] {
                mask.count += usize::from(!*hidden);
                *hidden = true;
            }
        }
    }

    /// One block of the code's rule; false at the end.
    fn code_block<F: FnMut() -> Option<f64>>(&self, mask: &mut BlockMask, stream: &mut Stream<F>) -> Result<bool> {
        if mask.count >= self.target {
            return Ok(false);
        }
        let [height, width] = self.grid;
        let most = (self.target - mask.count).min(self.most);
        for _ in 0..10 {
            let area = stream.real(self.least as f64, most as f64)?;
            let aspect = libm::exp(stream.real(libm::log(self.aspect[0]), libm::log(self.aspect[1]))?);
            let (rows, cols) = ((area * aspect).sqrt().round_ties_even(), (area / aspect).sqrt().round_ties_even());
            if !(cols < width as f64 && rows < height as f64) {
                continue;
            }
            let (rows, cols) = (rows as usize, cols as usize);
            let (top, left) = (stream.int(height - rows)?, stream.int(width - cols)?);
            let shown = |y: usize| mask.hidden[y * width + left..][..cols].iter().filter(|&&hidden| !hidden).count();
            let fresh: usize = (top..top + rows).map(shown).sum();
            if (1..=most).contains(&fresh) {
                self.set(mask, [top, left], [rows, cols]);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// One block of the paper's rule; false at the end.
    fn paper_block<F: FnMut() -> Option<f64>>(&self, mask: &mut BlockMask, stream: &mut Stream<F>) -> Result<bool> {
        if mask.count > self.target || mask.count == mask.hidden.len() {
            return Ok(false);
        }
        let least = self.least as f64;
        let area = stream.real(least, ((self.target - mask.count) as f64).max(least))?;
        let ratio = stream.real(self.aspect[0], self.aspect[1])?;
        let side = |x: f64, most: usize| (x.sqrt().round_ties_even() as usize).clamp(1, most);
        let size @ [rows, cols] = [side(area * ratio, self.grid[0]), side(area / ratio, self.grid[1])];
        let place = [stream.int(self.grid[0] - rows)?, stream.int(self.grid[1] - cols)?];
        self.set(mask, place, size);
        Ok(true)
    }
}

/// `mask.blockwise`.
pub struct MaskBlockwise;

impl Operation for MaskBlockwise {
    const NAME: &'static str = "mask.blockwise";
    const PAPER: &'static str = "2106.08254 BEiT";
    const DATA: &'static [&'static str] = &["u"];

    fn sample(rng: &mut Rng) -> Config {
        let (height, width) = (rng.between(1, 9), rng.between(1, 9));
        let mut config = Config::default();
        config.set("height", height).set("width", width).set("num_masking_patches", rng.between(0, height * width));
        config.set("min_num_patches", rng.between(0, 8)).set("min_aspect", rng.range(0.2, 0.9)).set("rule", rng.pick(&["code", "paper"]));
        if rng.chance(0.3) {
            config.set("max_num_patches", rng.between(1, 20)).set("max_aspect", rng.range(1.0, 4.0));
        }
        config
    }

    fn inputs(_: &Config, draw: &mut Draw) -> Result<()> {
        draw.uniform("u", [20_000]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let rule = Blockwise::from_config(run.config())?;
        let u: Tensor<T> = run.input("u")?;
        let [_] = u.dims("input `u`")?;
        let mut stream = u.data().iter().map(|u| u.to_f64());
        let mask = rule.mask(|| stream.next())?;
        run.output_ints("mask", super::mask::mask_tensor(rule.grid, &mask.hidden)?);
        for (name, n) in [("count", mask.count), ("consumed", mask.consumed)] {
            run.output_ints(name, IntTensor::new([], vec![n as i64])?);
        }
        Ok(())
    }
}
