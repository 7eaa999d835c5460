//! `nn.beit_rel_pos_bias`: BEiT's relative position bias (arXiv 2106.08254), a class token in front of a grid of patches.
//!
//! `bias[a, i, j] = table[index(i, j), a]`. Patch to patch `index = (Δy + H − 1)(2W − 1) + Δx + W − 1`, Δ = query − key; the last three
//! rows of the table are class → patch, patch → class, class → class.
//!
//! Backward: `dtable[t, a] = Σ dbias[a, i, j]` over all pairs with `index(i, j) = t`.
//!
//! The keys of one grid row read a run of the table backwards: it is mirrored first, then runs are copied.

use rayon::prelude::*;

use super::param::{Init, Layout, Names, Param, Params};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::tensor::random::Rng;
use crate::tensor::{Buffer, Float, IntTensor, Tensor};

/// Tokens whose pairs are still counted in 32 bits, with room to spare.
const MOST_TOKENS: usize = 1 << 15;

/// A table `relative_position_bias_table` `[(2H − 1)(2W − 1) + 3, h]`.
#[derive(Clone, Copy, Debug)]
pub struct RelativeTable {
    table: Param,
    window: [usize; 2],
    heads: usize,
}

impl RelativeTable {
    /// Registers the table for a grid of `window` patches.
    pub fn new(names: &mut Names, window: [usize; 2], heads: usize) -> Result<Self> {
        let [h, w] = window;
        if heads == 0 || h == 0 || w == 0 || h.checked_mul(w).is_none_or(|n| n >= MOST_TOKENS) {
            let message = format!("expected from 1 to {MOST_TOKENS} patches and at least one head, found {h}×{w} and {heads}");
            return Err(Error::config("window_h", message));
        }
        let rows = (2 * h - 1) * (2 * w - 1) + 3;
        Ok(RelativeTable { table: names.param("relative_position_bias_table", [rows, heads], Init::ZEROS), window, heads })
    }

    /// Tokens N, the class token included.
    pub fn tokens(&self) -> usize {
        1 + self.window[0] * self.window[1]
    }

    /// The row of the table for every pair, `[N, N]`.
    pub fn index(&self) -> Vec<u32> {
        let ([h, w], n, last) = (self.window, self.tokens(), self.table.shape()[0] - 1);
        let index = |i: usize| match (i / n, i % n) {
            (0, 0) => last,
            (0, _) => last - 2,
            (_, 0) => last - 1,
            (query, key) => {
                let (q, k) = (query - 1, key - 1);
                (q / w + h - 1 - k / w) * (2 * w - 1) + q % w + w - 1 - k % w
            }
        };
        (0..n * n).map(|i| index(i) as u32).collect()
    }

    /// The entry of the mirrored table that keys `(ky, 0..W)` read from on, for a query.
    fn run(&self, query: usize, ky: usize) -> usize {
        let [h, w] = self.window;
        (query / w + h - 1 - ky) * (2 * w - 1) + w - 1 - query % w
    }

    /// Calls `f(first entry in dense, first entry in the mirrored table)` for all runs of W keys.
    fn visit(&self, mut f: impl FnMut(usize, usize)) {
        let ([h, w], n) = (self.window, self.tokens());
        for query in 0..h * w {
            for ky in 0..h {
                f((1 + query) * n + 1 + ky * w, self.run(query, ky));
            }
        }
    }

    /// Where entry `i` of the table lies in the mirrored one.
    fn mirrored(&self, i: usize) -> usize {
        let span = 2 * self.window[1] - 1;
        if i < self.table.shape()[0] - 3 { i / span * span + span - 1 - i % span } else { i }
    }

    /// Adds the bias to dense logits `[h, N, N]`.
    pub fn add_to<T: Float>(&self, p: &Params<T>, dense: &mut Tensor<T>) {
        let ([_, w], n, rows, table) = (self.window, self.tokens(), self.table.shape()[0], p.get(self.table));
        dense.data_mut().par_chunks_mut(n * n).enumerate().for_each(|(a, dense)| {
            let mut runs = Buffer::<T>::scratch(rows);
            (0..rows).for_each(|i| runs[self.mirrored(i)] = table[i * self.heads + a]);
            self.visit(|to, from| dense[to..to + w].iter_mut().zip(&runs[from..from + w]).for_each(|(x, &bias)| *x += bias));
            let [to_patches, to_class, class] = [runs[rows - 3], runs[rows - 2], runs[rows - 1]];
            dense[0] += class;
            dense[1..n].iter_mut().for_each(|x| *x += to_patches);
            dense[n..].chunks_exact_mut(n).for_each(|row| row[0] += to_class);
        });
    }

    /// The bias `[h, N, N]`.
    pub fn dense<T: Float>(&self, p: &Params<T>) -> Tensor<T> {
        let mut dense = Tensor::zeros([self.heads, self.tokens(), self.tokens()]);
        self.add_to(p, &mut dense);
        dense
    }

    /// Adds the gradient of the table, given that of the bias.
    pub fn backward<T: Float>(&self, g: &mut Params<T>, d_dense: &Tensor<T>) {
        let ([_, w], n, rows) = (self.window, self.tokens(), self.table.shape()[0]);
        let mut sums = Buffer::<T>::zeros(self.heads * rows);
        sums.par_chunks_mut(rows).zip(d_dense.data().par_chunks(n * n)).for_each(|(sums, d)| {
            self.visit(|from, to| sums[to..to + w].iter_mut().zip(&d[from..from + w]).for_each(|(sum, &d)| *sum += d));
            sums[rows - 1] += d[0];
            d[1..n].iter().for_each(|&d| sums[rows - 3] += d);
            d[n..].chunks_exact(n).for_each(|row| sums[rows - 2] += row[0]);
        });
        let table = g.get_mut(self.table);
        for (a, sums) in sums.chunks_exact(rows).enumerate() {
            (0..rows).for_each(|i| table[i * self.heads + a] += sums[self.mirrored(i)]);
        }
    }
}

/// `window_h` and `window_w`.
pub fn window(config: &Config) -> Result<[usize; 2]> {
    Ok([config.positive("window_h")?, config.positive("window_w")?])
}

/// `nn.beit_rel_pos_bias`.
pub struct RelPosBias;

impl Operation for RelPosBias {
    const NAME: &'static str = "nn.beit_rel_pos_bias";
    const PAPER: &'static str = "2106.08254 BEiT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("window_h", rng.between(1, 5)).set("window_w", rng.between(1, 5)).set("num_heads", rng.between(1, 4));
        config
    }

    fn inputs(_: &Config, _: &mut Draw) -> Result<()> {
        Ok(())
    }

    fn cost(config: &Config, _: &Shapes) -> Result<Option<Cost>> {
        let ([h, w], n) = (window(config)?, config.positive("num_heads")?);
        Ok(Some(Cost { flops: 0, activation_bytes: 4 * n * (1 + h * w) * (1 + h * w) }))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (window, heads) = (window(run.config())?, run.config().positive("num_heads")?);
        let (layer, layout) = Layout::build(|names| RelativeTable::new(names, window, heads))?;
        let p = run.params(&layout)?;
        let (bias, n) = (layer.dense(&p), layer.tokens());
        run.output("bias", &bias);
        run.output_ints("index", IntTensor::new([n, n], layer.index().into_iter().map(i64::from).collect())?);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            layer.backward(&mut g, &run.cotangent("bias", bias.shape())?);
            run.grad_params(&g);
        }
        Ok(())
    }
}
