//! Masks drawn cell by cell: MAE's and GreenMIM's random mask (`mask.random`, arXiv 2111.06377), SimMIM's coarse one
//! (`mask.simmim`, 2111.09886), and the mixing of a learned token into masked positions.
//!
//! Random: the `⌊L(1 − ratio)⌋` patches of least noise stay visible, in the order of their noise. Coarse: the first
//! `⌈T·ratio⌉` cells of a permutation of the `T = (input/mask patch)²` cells are hidden, each repeated over the patches it covers.
//! Both counts are evaluated in f64 exactly as written.

use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::tensor::random::{Purpose, Rng};
use crate::tensor::{Float, IntTensor, Tensor};

use super::StepKey;
pub use crate::nn::mask_token::{mix_row, mix_row_backward, mix_token, mix_token_backward};

/// Which patches of every image stay visible.
#[derive(Clone, Debug, PartialEq)]
pub struct RandomMask {
    /// Images B.
    pub batch: usize,
    /// Patches L per image.
    pub len: usize,
    /// Visible patches K per image.
    pub len_keep: usize,
    /// `[B, K]`: the visible patches, in the order of their noise.
    pub ids_keep: Vec<u32>,
    /// `[B, L]`: the rank of every patch's noise.
    pub ids_restore: Vec<u32>,
}

/// `⌊len · (1 − ratio)⌋`; an error unless `0 ≤ ratio ≤ 1`.
pub fn len_keep(len: usize, ratio: f64) -> Result<usize> {
    check_ratio(ratio)?;
    Ok((len as f64 * (1.0 - ratio)) as usize)
}

fn check_ratio(ratio: f64) -> Result<()> {
    if (0.0..=1.0).contains(&ratio) {
        Ok(())
    } else {
        Err(Error::config("mask_ratio", format!("expected a number from 0 to 1, found {ratio}")))
    }
}

/// The random mask of `noise` `[B, L]`. Equal noise keeps the order of the patches; an error if any is not a number.
pub fn random_mask<T: Float>(noise: &Tensor<T>, ratio: f64) -> Result<RandomMask> {
    let [batch, len] = noise.dims("noise")?;
    let len_keep = len_keep(len, ratio)?;
    if noise.data().iter().any(|x| x.to_f64().is_nan()) {
        return Err(Error::value("noise", "expected numbers, found NaN"));
    }
    let (mut ids_keep, mut ids_restore) = (Vec::with_capacity(batch * len_keep), vec![0; batch * len]);
    for b in 0..batch {
        let noise = &noise.data()[b * len..(b + 1) * len];
        let mut order: Vec<u32> = (0..len as u32).collect();
        order.sort_by(|&i, &j| noise[i as usize].partial_cmp(&noise[j as usize]).unwrap_or(std::cmp::Ordering::Equal));
        for (rank, &i) in order.iter().enumerate() {
            ids_restore[b * len + i as usize] = rank as u32;
        }
        ids_keep.extend_from_slice(&order[..len_keep]);
    }
    Ok(RandomMask { batch, len, len_keep, ids_keep, ids_restore })
}

impl RandomMask {
    /// The mask of a training step: image `b` of the batch takes its noise from the stream of sample `b`.
    pub fn draw(batch: usize, len: usize, ratio: f64, key: StepKey) -> Result<Self> {
        let mut noise = Tensor::<f64>::scratch([batch, len]);
        for (b, row) in noise.data_mut().chunks_exact_mut(len.max(1)).enumerate() {
            let mut rng = Rng::new(key.seed, Purpose::Mask, key.step, b as u64);
            row.iter_mut().for_each(|x| *x = rng.uniform());
        }
        random_mask(&noise, ratio)
    }

    /// `[B, L]`: true where a patch is hidden.
    pub fn hidden(&self) -> Vec<bool> {
        self.ids_restore.iter().map(|&rank| rank as usize >= self.len_keep).collect()
    }
}

/// SimMIM's mask generator: square cells of `mask_patch_size` pixels on an image of `input_size`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CoarseMask {
    cells: usize,
    repeat: usize,
    count: usize,
}

impl CoarseMask {
    /// From the sizes in pixels. An error unless the mask patch divides the input and the model patch divides the mask patch.
    pub fn new(input_size: usize, mask_patch_size: usize, model_patch_size: usize, ratio: f64) -> Result<Self> {
        check_ratio(ratio)?;
        if mask_patch_size == 0 || !input_size.is_multiple_of(mask_patch_size) {
            return Err(Error::config(
                "mask_patch_size",
                format!("expected a divisor of the image size {input_size}, found {mask_patch_size}"),
            ));
        }
        if model_patch_size == 0 || !mask_patch_size.is_multiple_of(model_patch_size) {
            let message = format!("expected a divisor of mask_patch_size {mask_patch_size}, found {model_patch_size}");
            return Err(Error::config("model_patch_size", message));
        }
        let cells = input_size / mask_patch_size;
        Ok(CoarseMask { cells, repeat: mask_patch_size / model_patch_size, count: ((cells * cells) as f64 * ratio).ceil() as usize })
    }

    /// From the keys `input_size`, `mask_patch_size`, `model_patch_size`, `mask_ratio`.
    pub fn from_config(config: &Config) -> Result<Self> {
        let size = |key| config.positive(key);
        CoarseMask::new(size("input_size")?, size("mask_patch_size")?, size("model_patch_size")?, config.f64("mask_ratio")?)
    }

    /// Cells T of an image.
    pub fn cells(&self) -> usize {
        self.cells * self.cells
    }

    /// Side of the mask in model patches.
    pub fn side(&self) -> usize {
        self.cells * self.repeat
    }

    /// `[side, side]`, true where a patch is hidden, from a permutation of the cells.
    pub fn hidden(&self, permutation: &[usize]) -> Vec<bool> {
        let mut cells = vec![false; self.cells()];
        permutation[..self.count].iter().for_each(|&cell| cells[cell] = true);
        let side = self.side();
        (0..side * side).map(|i| cells[i / side / self.repeat * self.cells + i % side / self.repeat]).collect()
    }

    /// The masks of a training step, `[B, side, side]`: image `b` takes its permutation from the stream of sample `b`.
    pub fn draw(&self, batch: usize, key: StepKey) -> Vec<bool> {
        let image = |b| self.hidden(&Rng::new(key.seed, Purpose::Mask, key.step, b as u64).permutation(self.cells()));
        (0..batch).flat_map(image).collect()
    }
}

/// Reads a mask of zeros and ones with this shape: true where it is 1.
pub fn read_mask(mask: &IntTensor, shape: [usize; 3]) -> Result<Vec<bool>> {
    if mask.shape != shape[..] {
        return Err(Error::shape("mask", shape, mask.shape));
    }
    let read = |&m: &i64| match m {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Error::value("mask", format!("expected 0 or 1, found {other}"))),
    };
    mask.data.iter().map(read).collect()
}

/// `mask.random`.
pub struct MaskRandom;

impl Operation for MaskRandom {
    const NAME: &'static str = "mask.random";
    const PAPER: &'static str = "2111.06377 MAE";
    const DATA: &'static [&'static str] = &["noise"];

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("mask_ratio", [0.0, 0.25, 0.5, 0.75, 0.9, 1.0][rng.below(6)]);
        config
    }

    fn inputs(_: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, len) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 50));
        draw.uniform("noise", [batch, len]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let mask = random_mask(&run.input("noise")?, run.config().f64("mask_ratio")?)?;
        let rows = |n: usize, ids: &[u32]| IntTensor::new([mask.batch, n], ids.iter().map(|&i| i64::from(i)).collect());
        run.output_ints("ids_keep", rows(mask.len_keep, &mask.ids_keep)?);
        run.output_ints("ids_restore", rows(mask.len, &mask.ids_restore)?);
        run.output_ints("len_keep", IntTensor::vector([mask.len_keep]));
        run.output_ints("mask", mask_tensor([mask.batch, mask.len], &mask.hidden())?);
        Ok(())
    }
}

/// A mask as zeros and ones.
pub fn mask_tensor(shape: impl Into<crate::tensor::Shape>, hidden: &[bool]) -> Result<IntTensor> {
    IntTensor::new(shape, hidden.iter().map(|&m| i64::from(m)).collect())
}

/// `mask.simmim`.
pub struct MaskSimMim;

impl Operation for MaskSimMim {
    const NAME: &'static str = "mask.simmim";
    const PAPER: &'static str = "2111.09886 SimMIM";
    const DATA: &'static [&'static str] = &["perm"];

    fn sample(rng: &mut Rng) -> Config {
        let (model, factor, cells) = (rng.between(1, 4), rng.between(1, 4), rng.between(1, 7));
        let mut config = Config::default();
        config.set("input_size", model * factor * cells).set("mask_patch_size", model * factor).set("model_patch_size", model);
        config.set("mask_ratio", rng.uniform());
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (cells, batch) = (CoarseMask::from_config(config)?.cells(), draw.size("batch", 1, 3));
        let perm = (0..batch).flat_map(|_| draw.rng.permutation(cells)).map(|cell| cell as i64).collect();
        draw.ints("perm", [batch, cells], perm)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let generator = CoarseMask::from_config(run.config())?;
        let (cells, side) = (generator.cells(), generator.side());
        let perm = run.ints("perm")?;
        let [batch, found] = perm.shape.dims("perm")?;
        if found != cells {
            return Err(Error::shape("perm", [batch, cells], perm.shape));
        }
        let mut hidden = Vec::with_capacity(batch * side * side);
        for row in perm.data.chunks_exact(cells) {
            let mut seen = vec![false; cells];
            let mut permutation = Vec::with_capacity(cells);
            for &cell in row {
                match usize::try_from(cell).ok().filter(|&cell| cell < cells && !seen[cell]) {
                    Some(cell) => {
                        seen[cell] = true;
                        permutation.push(cell);
                    }
                    None => {
                        return Err(Error::value(
                            "perm",
                            format!("expected permutations of 0..{cells}, found {cell} twice or out of range"),
                        ));
                    }
                }
            }
            hidden.extend(generator.hidden(&permutation));
        }
        run.output_ints("mask", mask_tensor([batch, side, side], &hidden)?);
        run.output_ints("mask_count", IntTensor::vector([generator.count]));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts that round the other way in exact arithmetic.
    #[test]
    fn counts_are_those_of_double_arithmetic() {
        assert_eq!(len_keep(10, 0.9).unwrap(), 0);
        assert_eq!(len_keep(100, 0.9).unwrap(), 9);
        assert_eq!(len_keep(196, 0.75).unwrap(), 49);
        assert!(len_keep(4, 1.1).is_err() && len_keep(4, f64::NAN).is_err());
        assert_eq!(CoarseMask::new(40, 4, 4, 0.07).unwrap().count, 8);
    }

    #[test]
    fn equal_noise_keeps_the_order_and_nan_is_refused() {
        let mask = random_mask(&Tensor::<f32>::zeros([1, 5]), 0.4).unwrap();
        assert_eq!((mask.ids_keep, mask.ids_restore), (vec![0, 1, 2], vec![0, 1, 2, 3, 4]));
        assert!(random_mask(&Tensor::from_fn([1, 3], |_| f64::NAN), 0.5).is_err());
    }

    /// A step's masks depend on its key alone, differ between images and steps, and don't depend on the batch's size.
    #[test]
    fn drawn_masks_are_reproducible() {
        let key = StepKey { seed: 5, step: 9 };
        let all = RandomMask::draw(4, 64, 0.75, key).unwrap();
        let two = RandomMask::draw(2, 64, 0.75, key).unwrap();
        assert_eq!(all.ids_restore[..128], two.ids_restore[..]);
        assert_ne!(all.ids_restore[..64], all.ids_restore[64..128]);
        assert_ne!(all, RandomMask::draw(4, 64, 0.75, StepKey { seed: 5, step: 10 }).unwrap());
        let coarse = CoarseMask::new(64, 8, 4, 0.6).unwrap();
        let (four, one) = (coarse.draw(4, key), coarse.draw(1, key));
        assert_eq!(four[..256], one[..]);
        // ⌈64 · 0.6⌉ cells of 2 × 2 patches in every image.
        assert!(four.chunks_exact(256).all(|image| image.iter().filter(|&&m| m).count() == 39 * 4));
    }
}
