//! Between `[B, C, H, W]`, the layout of images at the border of an operation, and `[B, H, W, C]`, the layout inside.

use crate::error::Result;
use crate::kernel::maps::transpose;
use crate::tensor::{Float, Tensor};

/// `[B, C, H, W]` → `[B, H, W, C]`.
pub fn channels_last<T: Float>(x: &Tensor<T>) -> Result<Tensor<T>> {
    let [b, c, h, w] = x.dims("map [B, C, H, W]")?;
    let mut y = Tensor::scratch([b, h, w, c]);
    transpose(y.data_mut(), x.data(), b, c, h * w);
    Ok(y)
}

/// `[B, H, W, C]` → `[B, C, H, W]`.
pub fn channels_first<T: Float>(x: &Tensor<T>) -> Result<Tensor<T>> {
    let [b, h, w, c] = x.dims("map [B, H, W, C]")?;
    let mut y = Tensor::scratch([b, c, h, w]);
    transpose(y.data_mut(), x.data(), b, h * w, c);
    Ok(y)
}
