//! Batches, each a function of (seed, epoch, step): any batch can be made at any time, so a resumed run sees what an
//! uninterrupted one would have seen, for any thread count.

use rayon::prelude::*;

use super::{Dataset, Transform};
use crate::tensor::random::{Purpose, Rng};
use crate::{Error, Result};

/// How a [`Loader`] cuts a data set into batches.
#[derive(Clone, Copy, Debug)]
pub struct LoaderOptions {
    /// Images per batch, at least 1.
    pub batch: usize,
    /// Seed of the order and of the augmentation.
    pub seed: u64,
    /// A new random order in each epoch, or file order.
    pub shuffle: bool,
    /// Leave out the last batch of an epoch if it is not full.
    pub drop_last: bool,
}

/// Makes the batches of a data set.
#[derive(Clone, Debug)]
pub struct Loader<'a> {
    dataset: &'a Dataset,
    transform: Transform,
    options: LoaderOptions,
}

/// One epoch of a [`Loader`]: the order of its samples.
#[derive(Clone, Debug)]
pub struct Epoch<'l> {
    loader: &'l Loader<'l>,
    epoch: u64,
    order: Vec<usize>,
}

/// One batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// `[labels.len(), channels, size, size]`.
    pub images: Vec<f32>,
    /// One class per image.
    pub labels: Vec<usize>,
}

impl<'a> Loader<'a> {
    /// A loader of `dataset`.
    ///
    /// # Errors
    /// If the batch is 0, or larger than the data set under `drop_last` (there would be no batch).
    pub fn new(dataset: &'a Dataset, transform: Transform, options: LoaderOptions) -> Result<Self> {
        let n = dataset.len();
        if options.batch == 0 || n == 0 || (options.drop_last && options.batch > n) {
            let message = format!("{}, expected 1 to {n}, the number of images in `{}`", options.batch, dataset.name());
            return Err(Error::config("batch", message));
        }
        Ok(Loader { dataset, transform, options })
    }

    /// The data set.
    pub fn dataset(&self) -> &'a Dataset {
        self.dataset
    }

    /// The transform.
    pub fn transform(&self) -> &Transform {
        &self.transform
    }

    /// Batches per epoch, at least 1.
    pub fn steps(&self) -> usize {
        let (n, batch) = (self.dataset.len(), self.options.batch);
        if self.options.drop_last { n / batch } else { n.div_ceil(batch) }
    }

    /// The order of epoch `epoch`.
    pub fn epoch(&self, epoch: u64) -> Epoch<'_> {
        let n = self.dataset.len();
        let order = match self.options.shuffle {
            true => Rng::new(self.options.seed, Purpose::Shuffle, epoch, 0).permutation(n),
            false => (0..n).collect(),
        };
        Epoch { loader: self, epoch, order }
    }

    /// Transforms the images `indices` as epoch `epoch` shows them, in parallel, into `images`
    /// `[indices.len(), channels, size, size]`, and their classes into `labels`. The pixels of a sample depend on
    /// (seed, epoch, index) alone.
    ///
    /// # Errors
    /// If a buffer has the wrong length or an image cannot be decoded; of several, the first in the order of `indices`.
    pub fn fill(&self, epoch: u64, indices: &[usize], images: &mut [f32], labels: &mut [usize]) -> Result<()> {
        let (b, len) = (indices.len(), self.transform.len());
        if images.len() != b * len || labels.len() != b {
            let (c, s) = (self.transform.channels(), self.transform.size());
            return Err(Error::shape("batch", [b, c, s, s], format!("{} floats and {} labels", images.len(), labels.len())));
        }
        let work = images.par_chunks_exact_mut(len).zip(labels).zip(indices).map(|((out, label), &index)| {
            let image = self.dataset.image(index)?;
            *label = self.dataset.label(index);
            let mut rng = Rng::new(self.options.seed, Purpose::Augment, epoch, index as u64);
            self.transform.apply(&image, &mut rng, out)
        });
        // Which error is reported must not depend on the threads either.
        work.find_map_first(Result::err).map_or(Ok(()), Err)
    }
}

impl Epoch<'_> {
    /// Batches in the epoch, at least 1.
    pub fn steps(&self) -> usize {
        self.loader.steps()
    }

    /// The images of batch `step`.
    ///
    /// # Errors
    /// If there is no such batch.
    pub fn indices(&self, step: usize) -> Result<&[usize]> {
        if step >= self.steps() {
            return Err(Error::value("step", format!("{step}, expected less than {}: the batches of an epoch", self.steps())));
        }
        let start = step * self.loader.options.batch;
        Ok(&self.order[start..(start + self.loader.options.batch).min(self.order.len())])
    }

    /// Makes batch `step` in the memory of `batch`, which is resized.
    ///
    /// # Errors
    /// As [`Epoch::indices`] and [`Loader::fill`].
    pub fn load(&self, step: usize, batch: &mut Batch) -> Result<()> {
        let indices = self.indices(step)?;
        batch.images.resize(indices.len() * self.loader.transform.len(), 0.0);
        batch.labels.resize(indices.len(), 0);
        self.loader.fill(self.epoch, indices, &mut batch.images, &mut batch.labels)
    }

    /// Batch `step` in new memory.
    ///
    /// # Errors
    /// As [`Epoch::load`].
    pub fn batch(&self, step: usize) -> Result<Batch> {
        let mut batch = Batch::default();
        self.load(step, &mut batch)?;
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Split;
    use crate::data::transform::Normalization;

    fn options() -> LoaderOptions {
        LoaderOptions { batch: 64, seed: 9, shuffle: true, drop_last: true }
    }

    fn training() -> Transform {
        Transform::training(32, 3, (0.2, 1.0), Normalization::IMAGENET).unwrap()
    }

    /// An epoch shows every image once; epochs and seeds differ; the ragged last batch is kept or dropped as asked.
    #[test]
    fn epochs_are_permutations() {
        let data = Dataset::builtin(Split::Test).unwrap();
        let keep = Loader::new(&data, training(), LoaderOptions { drop_last: false, ..options() }).unwrap();
        assert_eq!((keep.steps(), Loader::new(&data, training(), options()).unwrap().steps()), (16, 15));
        let epoch = keep.epoch(3);
        let mut seen: Vec<usize> = (0..keep.steps()).flat_map(|s| epoch.indices(s).unwrap().to_vec()).collect();
        assert_ne!(seen, (0..1000).collect::<Vec<_>>());
        assert_ne!(epoch.indices(0).unwrap(), keep.epoch(4).indices(0).unwrap());
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..1000));
        assert_eq!(epoch.batch(15).unwrap().labels.len(), 1000 - 15 * 64);
        assert!(epoch.batch(16).unwrap_err().to_string().contains("less than 16"));
        let in_order = Loader::new(&data, training(), LoaderOptions { shuffle: false, ..options() }).unwrap();
        assert!(in_order.epoch(7).indices(1).unwrap().iter().copied().eq(64..128));
        assert_eq!(in_order.epoch(0).batch(0).unwrap().labels[..], (0..64).map(|i| data.label(i)).collect::<Vec<_>>());
    }

    /// The promise behind exact resume: one thread or many, from the start or out of the blue, the bits are the same.
    #[test]
    fn batches_depend_on_seed_epoch_and_step_alone() {
        let data = Dataset::builtin(Split::Test).unwrap();
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let loader = Loader::new(&data, training(), options()).unwrap();
        let mut straight = Vec::new();
        let mut batch = Batch::default();
        for epoch in 0..2 {
            let epoch = loader.epoch(epoch);
            for step in 0..3 {
                pool(1).install(|| epoch.load(step, &mut batch)).unwrap();
                straight.push(batch.clone());
            }
        }
        let again = Loader::new(&data, training(), options()).unwrap();
        assert_eq!(pool(5).install(|| again.epoch(1).batch(2)).unwrap(), straight[5]);
        let other = Loader::new(&data, training(), LoaderOptions { seed: 10, ..options() }).unwrap();
        assert_ne!(other.epoch(1).batch(2).unwrap(), straight[5]);
        // A slice of a batch, as a rank of a parallel run asks for it.
        let epoch = loader.epoch(0);
        let (mut images, mut labels) = (vec![0.0; 10 * training().len()], vec![0; 10]);
        loader.fill(0, &epoch.indices(1).unwrap()[20..30], &mut images, &mut labels).unwrap();
        assert_eq!(images[..], straight[1].images[20 * training().len()..30 * training().len()]);
        assert_eq!(labels[..], straight[1].labels[20..30]);
    }

    #[test]
    fn bad_values() {
        let data = Dataset::builtin(Split::Test).unwrap();
        let new = |batch, drop_last| Loader::new(&data, training(), LoaderOptions { batch, drop_last, ..options() });
        assert!(new(0, false).unwrap_err().to_string().contains("`batch`"));
        assert!(new(1001, true).unwrap_err().to_string().contains("1 to 1000"));
        assert_eq!(new(1001, false).unwrap().steps(), 1);
        let loader = new(10, true).unwrap();
        assert!(loader.fill(0, &[1], &mut [0.0; 5], &mut [0]).unwrap_err().to_string().contains("batch"));
        let mut images = vec![0.0; training().len()];
        assert!(loader.fill(0, &[1000], &mut images, &mut [0]).unwrap_err().to_string().contains("1000"));
    }
}
