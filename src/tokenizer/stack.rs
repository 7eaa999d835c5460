//! Layers in a row: what encoders and decoders of image tokenizers are made of. All maps are channels-last.

use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::kernel::pool::Window;
use crate::kernel::resize::Axis;
use crate::nn::pool::{max_pool, max_pool_backward};
use crate::nn::resize::resize_map;
use crate::nn::{Conv2d, ConvTranspose2d, Params};
use crate::tensor::{Float, Tensor};

/// The pooling of DALL-E's encoder.
const HALVES: Window = Window { kernel: 2, stride: 2, padding: 0 };

/// A layer of a [`Stack`].
#[derive(Clone, Debug)]
pub enum Layer {
    /// A convolution.
    Conv(Conv2d),
    /// A transposed convolution.
    Transposed(ConvTranspose2d),
    /// `max(x, 0)`.
    Relu,
    /// The maximum of 2×2 pixels; an odd last row or column is dropped.
    Pool,
    /// Every pixel four times.
    Double,
    /// `skip(x) + scale · inner(x)`; no `skip` is the identity.
    Residual {
        /// A convolution of the skip connection.
        skip: Option<Conv2d>,
        /// The branch.
        inner: Stack,
        /// The factor on the branch.
        scale: f64,
    },
}

/// Layers in a row.
#[derive(Clone, Debug, Default)]
pub struct Stack {
    layers: Vec<Layer>,
}

/// What the backward pass needs: one entry per layer.
pub struct Saved<T: Float>(Vec<Kept<T>>);

enum Kept<T: Float> {
    /// The input; of a ReLU the output, which the next layer keeps anyway.
    Map(Tensor<T>),
    Size([usize; 4]),
    Branch(Tensor<T>, Saved<T>),
}

impl Stack {
    /// Appends a layer.
    pub fn push(&mut self, layer: Layer) -> &mut Self {
        self.layers.push(layer);
        self
    }

    /// Appends the layers of another.
    pub fn append(&mut self, mut other: Stack) -> &mut Self {
        self.layers.append(&mut other.layers);
        self
    }

    /// The number of layers.
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// `[B, H, W, in]` → `[B, H', W', out]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, mut x: Tensor<T>) -> Result<(Tensor<T>, Saved<T>)> {
        let mut saved = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let (y, kept) = match layer {
                Layer::Conv(conv) => (conv.forward(p, &x)?, Kept::Map(x)),
                Layer::Transposed(conv) => (conv.forward(p, &x)?, Kept::Map(x)),
                Layer::Relu => {
                    let mut y = Tensor::scratch(x.shape());
                    elementwise::relu(y.data_mut(), x.data(), T::ONE);
                    (y.clone(), Kept::Map(y))
                }
                Layer::Pool => (max_pool(&x, HALVES)?, Kept::Map(x)),
                Layer::Double => {
                    let size @ [_, h, w, _] = x.dims("map [B, H, W, C]")?;
                    (resize_map(&x, &Axis::nearest(h, 2 * h), &Axis::nearest(w, 2 * w))?, Kept::Size(size))
                }
                Layer::Residual { skip, inner, scale } => {
                    let (branch, saved) = inner.forward(p, x.clone())?;
                    let mut y = match skip {
                        None => x.clone(),
                        Some(conv) => conv.forward(p, &x)?,
                    };
                    branch.expect_shape("branch of a residual block", y.shape())?;
                    elementwise::add_scaled(y.data_mut(), branch.data(), T::from_f64(*scale));
                    (y, Kept::Branch(x, saved))
                }
            };
            saved.push(kept);
            x = y;
        }
        Ok((x, Saved(saved)))
    }

    /// `dx`.
    pub fn backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, saved: Saved<T>, mut dy: Tensor<T>) -> Result<Tensor<T>> {
        for (layer, kept) in self.layers.iter().zip(saved.0).rev() {
            dy = match (layer, kept) {
                (Layer::Conv(conv), Kept::Map(x)) => conv.backward(p, g, &x, &dy)?,
                (Layer::Transposed(conv), Kept::Map(x)) => conv.backward(p, g, &x, &dy)?,
                (Layer::Relu, Kept::Map(y)) => {
                    dy.expect_shape("gradient of a ReLU", y.shape())?;
                    elementwise::relu_backward(dy.data_mut(), y.data(), T::ONE);
                    dy
                }
                (Layer::Pool, Kept::Map(x)) => max_pool_backward(&x, HALVES, &dy)?,
                (Layer::Double, Kept::Size([_, h, w, _])) => {
                    resize_map(&dy, &Axis::nearest(h, 2 * h).transposed(), &Axis::nearest(w, 2 * w).transposed())?
                }
                (Layer::Residual { skip, inner, scale }, Kept::Branch(x, saved)) => {
                    let mut d_branch = Tensor::scratch(dy.shape());
                    elementwise::scale(d_branch.data_mut(), dy.data(), T::from_f64(*scale));
                    let mut dx = inner.backward(p, g, saved, d_branch)?;
                    let past = match skip {
                        None => dy,
                        Some(conv) => conv.backward(p, g, &x, &dy)?,
                    };
                    elementwise::add(dx.data_mut(), past.data());
                    dx
                }
                _ => return Err(Error::value("a stack of layers", "what was saved belongs to another stack")),
            };
        }
        Ok(dy)
    }
}
