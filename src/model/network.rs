//! What the trainer and the command line need of a network with class logits, whichever it is.

use std::sync::Arc;

use rayon::prelude::*;

use crate::case::Config;
use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::nn::batch_norm::Updates;
use crate::nn::{Layout, Names, Params, Pass};
use crate::tensor::Tensor;

/// A network that ends in class logits. Its passes follow [`Params::pass`]; the stages and the vector that the head sees (`pooled`) are
/// shown with [`Params::show`].
pub trait Classifier: Send + Sync {
    /// What [`backward`](Self::backward) needs.
    type Saved;

    /// The logits of each head, `[B, classes]`, of `images` `[B, C, H, W]`. Where there are several heads, their mean is the prediction.
    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Self::Saved)>;

    /// Takes the running statistics after a training step.
    fn updates(_: &mut Self::Saved) -> Updates<f32> {
        Vec::new()
    }

    /// Adds the gradients of the parameters, from those of each head's logits.
    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Self::Saved, d: &[Tensor<f32>]) -> Result<()>;
}

/// The prediction: the mean of the heads' logits.
///
/// # Errors
/// If there is no head, or the shapes differ.
pub fn mean_logits(heads: &[Tensor<f32>]) -> Result<Tensor<f32>> {
    let (first, others) = heads.split_first().ok_or_else(|| Error::missing("the network's classifier"))?;
    let mut logits = first.clone();
    for head in others {
        head.expect_shape("logits", first.shape())?;
        elementwise::add(logits.data_mut(), head.data());
    }
    if !others.is_empty() {
        let share = 1.0 / heads.len() as f32;
        logits.data_mut().iter_mut().for_each(|x| *x *= share);
    }
    Ok(logits)
}

/// Images are inferred in parts of about this many pixels: two of the size that most networks are published for.
const PIXELS_TOGETHER: usize = 2 * 224 * 224;

/// The gradient of a loss by each head's logits.
pub type Judge<'a> = &'a mut dyn FnMut(&[Tensor<f32>]) -> Result<Vec<Tensor<f32>>>;

/// Any [`Classifier`].
pub trait Network: Send + Sync {
    /// The logits of each head; nothing is kept.
    fn infer(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<Vec<Tensor<f32>>>;

    /// A forward pass, `judge` on its logits, and a backward pass that adds to `g`. Returns the running statistics after the step.
    fn learn(&self, p: &Params<f32>, g: &mut Params<f32>, images: &Tensor<f32>, judge: Judge) -> Result<Updates<f32>>;
}

impl<N: Classifier> Network for N {
    fn infer(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<Vec<Tensor<f32>>> {
        let p = p.run_as(Pass::Infer);
        let [b, c, h, w] = images.dims("images")?;
        let (pixels, together) = (c * h * w, PIXELS_TOGETHER.div_ceil((h * w).max(1)));
        if b <= together || p.is_watched() {
            return Ok(self.forward(&p, images)?.0);
        }
        // A few images at a time stay in the caches, and threads need not wait for each other.
        let part = |part: &[f32]| {
            let images = Tensor::new([part.len() / pixels, c, h, w], part)?;
            Ok(self.forward(&p, &images)?.0)
        };
        let parts = images.data().par_chunks(together * pixels).map(part).collect::<Result<Vec<_>>>()?;
        let heads = parts.first().map_or(0, Vec::len);
        let stitch = |head: usize| {
            let rows: Vec<f32> = parts.iter().flat_map(|part| part[head].data()).copied().collect();
            Tensor::new([b, rows.len() / b], &rows)
        };
        (0..heads).map(stitch).collect()
    }

    fn learn(&self, p: &Params<f32>, g: &mut Params<f32>, images: &Tensor<f32>, judge: Judge) -> Result<Updates<f32>> {
        let (logits, mut saved) = self.forward(p, images)?;
        let updates = N::updates(&mut saved);
        let d = judge(&logits)?;
        drop(logits);
        self.backward(p, g, saved, &d)?;
        Ok(updates)
    }
}

/// A network and the layout of its parameters.
pub struct Built {
    /// The network.
    pub network: Box<dyn Network>,
    /// Its parameters.
    pub layout: Arc<Layout>,
}

impl Built {
    /// Builds a network.
    pub fn new<N: Classifier + 'static>(make: impl FnOnce(&mut Names) -> Result<N>) -> Result<Self> {
        let (network, layout) = Layout::build(make)?;
        Ok(Built { network: Box::new(network), layout })
    }
}

/// The layout as the key `weight_init` has it. `xavier` is for narrow networks that start from scratch: the published deviation of 0.02
/// (`published`, the default) is made for widths of many hundreds, with 100 the branches begin as almost nothing.
///
/// # Errors
/// If `weight_init` is something else.
pub fn weight_init(layout: Arc<Layout>, config: &Config) -> Result<Arc<Layout>> {
    match config.str_or("weight_init", "published")? {
        "published" => Ok(layout),
        "xavier" => Ok(Arc::new(layout.with_xavier())),
        other => Err(Error::config("weight_init", format!("expected published or xavier, found `{other}`"))),
    }
}
