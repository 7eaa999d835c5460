//! Pooling by spatial attention: per image and head `A = softmax over pixels of (s R Kᵀ)`, `Z = A V`, with `A` stored
//! `[tokens, pixels]`, so that the softmax runs along rows.
//!
//! Backward: `dV = Aᵀ dZ`, `dA = dZ Vᵀ + dA₀`, `D = s A ⊙ (dA − Σ_pixels A dA)`, `dK = Dᵀ R`, `dR = D K`.

use rayon::prelude::*;

use crate::kernel::softmax::{softmax, softmax_backward};
use crate::linalg::{Epilogue, Mat, MatMut, gemm};
use crate::tensor::{Buffer, Float};

/// The sizes of a pooling.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Images.
    pub batch: usize,
    /// Heads: blocks of the widths of keys and values.
    pub heads: usize,
    /// Tokens per image.
    pub tokens: usize,
    /// Pixels per image.
    pub pixels: usize,
    /// Width of queries and keys, all heads.
    pub keys: usize,
    /// Width of values, all heads.
    pub values: usize,
    /// The factor s on the logits.
    pub scale: f64,
}

impl Sizes {
    /// Operations of the forward pass.
    pub fn flops(&self) -> usize {
        2 * self.batch * self.tokens * self.pixels * (self.keys + self.values)
    }

    fn map(&self) -> usize {
        self.tokens * self.pixels
    }

    /// The queries of an image: all images share them if there is one set.
    fn queries<'a, T>(&self, queries: &'a [T], image: usize) -> &'a [T] {
        let len = self.tokens * self.keys;
        let first = if queries.len() == len { 0 } else { image * len };
        &queries[first..first + len]
    }
}

/// Columns of one head.
fn head<T>(data: &[T], rows: usize, width: usize, head: usize, heads: usize) -> Mat<'_, T> {
    Mat::new(data, rows, width).cols_from(head * (width / heads), width / heads)
}

fn head_mut<T>(data: &mut [T], rows: usize, width: usize, head: usize, heads: usize) -> MatMut<'_, T> {
    let each = width / heads;
    MatMut::strided(&mut data[head * each..], rows, each, width)
}

/// Writes `attn` `[batch, heads, tokens, pixels]` and `pooled` `[batch, tokens, values]` from queries `[batch or 1, tokens, keys]`, keys
/// and values `[batch, pixels, …]`.
pub fn forward<T: Float>(attn: &mut [T], pooled: &mut [T], queries: &[T], keys: &[T], values: &[T], sizes: Sizes) {
    let Sizes { heads, tokens, pixels, keys: kw, values: vw, scale, .. } = sizes;
    (attn.par_chunks_mut(heads * sizes.map()).zip(pooled.par_chunks_mut(tokens * vw)))
        .zip(keys.par_chunks(pixels * kw).zip(values.par_chunks(pixels * vw)))
        .enumerate()
        .for_each(|(image, ((attn, pooled), (keys, values)))| {
            let queries = sizes.queries(queries, image);
            for (h, attn) in attn.chunks_exact_mut(sizes.map()).enumerate() {
                let (r, k) = (head(queries, tokens, kw, h, heads), head(keys, pixels, kw, h, heads));
                gemm(r, k.t(), MatMut::new(attn, tokens, pixels), Epilogue::default());
                softmax(attn, pixels, scale);
                let z = head_mut(pooled, tokens, vw, h, heads);
                gemm(Mat::new(attn, tokens, pixels), head(values, pixels, vw, h, heads), z, Epilogue::default());
            }
        });
}

/// What the backward pass writes.
pub struct Gradients<'a, T> {
    /// `[batch, tokens, keys]`, also where the images share their queries.
    pub queries: &'a mut [T],
    /// `[batch, pixels, keys]`; `None` where keys and values are the same: then their gradients are added.
    pub keys: Option<&'a mut [T]>,
    /// `[batch, pixels, values]`.
    pub values: &'a mut [T],
}

/// Backward, given `attn` and the gradients of `pooled` and, if there is one, of `attn`.
#[allow(clippy::too_many_arguments)]
pub fn backward<T: Float>(
    grads: Gradients<T>,
    d_pooled: &[T],
    d_attn: Option<&[T]>,
    attn: &[T],
    queries: &[T],
    keys: &[T],
    values: &[T],
    sizes: Sizes,
) {
    let Sizes { heads, tokens, pixels, keys: kw, values: vw, scale, .. } = sizes;
    let separate = grads.keys.is_some();
    assert!(separate || kw == vw);
    let all_attn = heads * sizes.map();
    // Where there are no separate keys, nobody writes to this.
    let mut nothing = Buffer::<T>::scratch(if separate { 0 } else { sizes.batch });
    let (d_keys, each) = match grads.keys {
        Some(keys) => (keys, pixels * kw),
        None => (&mut nothing[..], 1),
    };
    (grads.queries.par_chunks_mut(tokens * kw).zip(grads.values.par_chunks_mut(pixels * vw)).zip(d_keys.par_chunks_mut(each)))
        .zip(d_pooled.par_chunks(tokens * vw).zip(attn.par_chunks(all_attn)))
        .enumerate()
        .for_each(|(image, (((dq, dv), dk), (d_pooled, attn)))| {
            let queries = sizes.queries(queries, image);
            let keys = &keys[image * pixels * kw..(image + 1) * pixels * kw];
            let values = &values[image * pixels * vw..(image + 1) * pixels * vw];
            let mut d = Buffer::<T>::scratch(sizes.map());
            for (h, a) in attn.chunks_exact(sizes.map()).enumerate() {
                let (dz, a_mat) = (head(d_pooled, tokens, vw, h, heads), Mat::new(a, tokens, pixels));
                let residual = d_attn.map(|d| Mat::new(&d[image * all_attn + h * sizes.map()..][..sizes.map()], tokens, pixels));
                let epilogue = Epilogue { residual, ..Epilogue::default() };
                gemm(dz, head(values, pixels, vw, h, heads).t(), MatMut::new(&mut d, tokens, pixels), epilogue);
                softmax_backward(&mut d, a, pixels, scale);
                let d_mat = Mat::new(&d, tokens, pixels);
                gemm(a_mat.t(), dz, head_mut(dv, pixels, vw, h, heads), Epilogue::default());
                let (target, accumulate) = if separate { (&mut *dk, false) } else { (&mut *dv, true) };
                let epilogue = Epilogue { accumulate, ..Epilogue::default() };
                gemm(d_mat.t(), head(queries, tokens, kw, h, heads), head_mut(target, pixels, kw, h, heads), epilogue);
                gemm(d_mat, head(keys, pixels, kw, h, heads), head_mut(dq, tokens, kw, h, heads), Epilogue::default());
            }
        });
}
