//! SimMIM's plain encoder (arXiv 2111.09886): a ViT in the style of BEiT (2106.08254), which sees all tokens.
//!
//! `X₀ = [cls; patches(1 − w) + mask_token·w] (+ pos_embed)`; blocks `x + γ₁⊙attn(norm1 x)`, `x + γ₂⊙mlp(norm2 x)`; `norm`; the class
//! token is dropped. `qkv` has no bias of its own: q and v get `q_bias` and `v_bias`, k gets none. Logits get a relative position bias
//! from a table `[(2g − 1)² + 3, h]`: patch to patch by `(Δy + g − 1)(2g − 1) + Δx + g − 1`, Δ = query − key; the last three rows
//! are class → patch, patch → class, class → class.
//!
//! With mean pooling the norm is missing and `fc_norm` exists without being used: so the authors' code has it.

use super::mask::{mix_token, mix_token_backward};
use crate::case::Config;
use crate::error::{Error, Result};
use crate::kernel::attention::{self as core, Bias, Gradients, Groups, Operand, Sizes};
use crate::kernel::{elementwise, reduce, rows};
use crate::linalg::ColumnsMut;
use crate::model::vit_block::hidden_width;
use crate::nn::{Init, LayerNorm, Linear, Mlp, Names, Param, Params, PatchEmbed, Stats, mlp, patch_embed};
use crate::tensor::{Float, Tensor};

/// Attention with biases on q and v only, over all tokens.
#[derive(Clone, Debug)]
struct BiasedAttention {
    qkv: Linear,
    /// `q_bias` and `v_bias`.
    biases: Option<[Param; 2]>,
    proj: Linear,
    heads: usize,
    dim: usize,
}

struct AttentionSaved<T: Float> {
    qkv: Tensor<T>,
    out: Tensor<T>,
    stats: Tensor<T>,
}

impl BiasedAttention {
    fn new(mut names: Names, dim: usize, heads: usize, bias: bool, proj_init: Init) -> Self {
        let qkv = Linear::new(names.at("qkv"), dim, 3 * dim, false, Init::NORMAL_02);
        let biases = bias.then(|| ["q_bias", "v_bias"].map(|name| names.param(name, [dim], Init::ZEROS)));
        let proj = Linear::new(names.at("proj"), dim, dim, true, proj_init);
        BiasedAttention { qkv, biases, proj, heads, dim }
    }

    fn sizes<T: Float>(&self, x: &Tensor<T>) -> Result<Sizes> {
        let [batch, n, _] = x.dims("input of an attention")?;
        let dim = self.dim / self.heads;
        Ok(Sizes { batch, heads: self.heads, dim, value_dim: dim, queries: n, keys: n, scale: 1.0 / (dim as f64).sqrt() })
    }

    fn operands<'a, T: Float>(&self, qkv: &'a Tensor<T>) -> [Operand<'a, T>; 3] {
        [0, 1, 2].map(|i| Operand { data: qkv.data(), stride: 3 * self.dim, offset: i * self.dim })
    }

    fn forward<T: Float>(
        &self,
        p: &Params<T>,
        x: &Tensor<T>,
        groups: &Groups,
        bias: Option<Bias<T>>,
    ) -> Result<(Tensor<T>, AttentionSaved<T>)> {
        let sizes = self.sizes(x)?;
        let mut qkv = self.qkv.forward(p, x)?;
        if let Some([q_bias, v_bias]) = self.biases {
            let mut row = Tensor::zeros([3 * self.dim]);
            row.data_mut()[..self.dim].copy_from_slice(p.get(q_bias));
            row.data_mut()[2 * self.dim..].copy_from_slice(p.get(v_bias));
            rows::add_table(qkv.data_mut(), row.data());
        }
        let mut out = Tensor::scratch(x.shape());
        let mut stats = Tensor::scratch([sizes.batch, sizes.heads, sizes.queries, 2]);
        let [q, k, v] = self.operands(&qkv);
        core::forward(out.data_mut(), stats.data_mut(), q, k, v, bias, groups, sizes);
        let y = self.proj.forward(p, &out)?;
        Ok((y, AttentionSaved { qkv, out, stats }))
    }

    #[allow(clippy::too_many_arguments)]
    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        saved: AttentionSaved<T>,
        groups: &Groups,
        bias: Option<(Bias<T>, &mut [T])>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let sizes = self.sizes(x)?;
        let AttentionSaved { qkv, out, stats } = saved;
        let d_out = self.proj.backward(p, g, &out, dy)?;
        let mut d_qkv = Tensor::zeros(qkv.shape());
        let (bias, d_bias) = bias.unzip();
        let [q, k, v] = self.operands(&qkv);
        let (dq, rest) = ColumnsMut::new(d_qkv.data_mut(), 3 * self.dim).split_at(self.dim);
        let (dk, dv) = rest.split_at(self.dim);
        core::backward(
            Gradients { q: dq, k: dk, v: dv, bias: d_bias },
            d_out.data(),
            out.data(),
            stats.data(),
            q,
            k,
            v,
            bias,
            groups,
            sizes,
        );
        drop((d_out, out, qkv));
        if let Some([q_bias, v_bias]) = self.biases {
            let mut sums = Tensor::zeros([3 * self.dim]);
            reduce::add_column_sums(sums.data_mut(), d_qkv.data());
            elementwise::add(g.get_mut(q_bias), &sums.data()[..self.dim]);
            elementwise::add(g.get_mut(v_bias), &sums.data()[2 * self.dim..]);
        }
        self.qkv.backward(p, g, x, &d_qkv)
    }
}

/// The row of the relative position table for every pair of `[class; patches]` on a square grid: `[1 + g², 1 + g²]`.
pub fn relative_index(grid: usize) -> Vec<u32> {
    let (side, span) = (1 + grid * grid, 2 * grid - 1);
    let last = (span * span + 2) as u32;
    let index = |i: usize| match (i / side, i % side) {
        (0, 0) => last,
        (0, _) => last - 2,
        (_, 0) => last - 1,
        (query, key) => {
            let (q, k) = (query - 1, key - 1);
            ((q / grid + grid - 1 - k / grid) * span + q % grid + grid - 1 - k % grid) as u32
        }
    };
    (0..side * side).map(index).collect()
}

/// A table of relative positions `[rows, h]` and where its rows go.
#[derive(Clone, Debug)]
struct RelativeTable(Param);

impl RelativeTable {
    fn new(names: &mut Names, grid: usize, heads: usize) -> Self {
        let span = 2 * grid - 1;
        RelativeTable(names.param("relative_position_bias_table", [span * span + 3, heads], Init::ZEROS))
    }

    /// Adds the table to dense logits `[h, side, side]`.
    fn add_to<T: Float>(&self, p: &Params<T>, dense: &mut [T], index: &[u32], heads: usize) {
        let table = p.get(self.0);
        for (a, dense) in dense.chunks_exact_mut(index.len()).enumerate() {
            dense.iter_mut().zip(index).for_each(|(x, &row)| *x += table[row as usize * heads + a]);
        }
    }

    fn backward<T: Float>(&self, g: &mut Params<T>, d_dense: &[T], index: &[u32], heads: usize) {
        let d_table = g.get_mut(self.0);
        for (a, d) in d_dense.chunks_exact(index.len()).enumerate() {
            d.iter().zip(index).for_each(|(&x, &row)| d_table[row as usize * heads + a] += x);
        }
    }
}

#[derive(Clone, Debug)]
struct Block {
    norm1: LayerNorm,
    attn: BiasedAttention,
    table: Option<RelativeTable>,
    gammas: Option<[Param; 2]>,
    norm2: LayerNorm,
    mlp: Mlp,
}

struct BlockSaved<T: Float> {
    x: Tensor<T>,
    stats1: Stats<T>,
    attn: AttentionSaved<T>,
    branch1: Tensor<T>,
    middle: Tensor<T>,
    stats2: Stats<T>,
    mlp: mlp::Saved<T>,
    branch2: Tensor<T>,
}

impl Block {
    /// `x + γ⊙f`.
    fn join<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, f: &Tensor<T>, which: usize) -> Tensor<T> {
        let mut y = f.clone();
        if let Some(gammas) = self.gammas {
            rows::multiply_table(y.data_mut(), p.get(gammas[which]));
        }
        elementwise::add(y.data_mut(), x.data());
        y
    }

    /// `df = dy⊙γ`, `dγ += Σ dy⊙f`.
    fn join_backward<T: Float>(&self, p: &Params<T>, g: &mut Params<T>, mut f: Tensor<T>, dy: &Tensor<T>, which: usize) -> Tensor<T> {
        let mut df = dy.clone();
        if let Some(gammas) = self.gammas {
            elementwise::multiply(f.data_mut(), dy.data(), T::ONE);
            reduce::add_column_sums(g.get_mut(gammas[which]), f.data());
            rows::multiply_table(df.data_mut(), p.get(gammas[which]));
        }
        df
    }

    fn forward<T: Float>(&self, p: &Params<T>, x: Tensor<T>, groups: &Groups, bias: Option<Bias<T>>) -> Result<(Tensor<T>, BlockSaved<T>)> {
        let (normed, stats1) = self.norm1.forward(p, &x)?;
        let (branch1, attn) = self.attn.forward(p, &normed, groups, bias)?;
        let middle = self.join(p, &x, &branch1, 0);
        let (normed, stats2) = self.norm2.forward(p, &middle)?;
        let (branch2, mlp) = self.mlp.forward(p, &normed, None)?;
        let y = self.join(p, &middle, &branch2, 1);
        Ok((y, BlockSaved { x, stats1, attn, branch1, middle, stats2, mlp, branch2 }))
    }

    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: BlockSaved<T>,
        groups: &Groups,
        bias: Option<(Bias<T>, &mut [T])>,
        dy: &Tensor<T>,
    ) -> Result<Tensor<T>> {
        let BlockSaved { x, stats1, attn, branch1, middle, stats2, mlp, branch2 } = saved;
        let df = self.join_backward(p, g, branch2, dy, 1);
        let normed = self.norm2.again(p, &middle, &stats2);
        let d_normed = self.mlp.backward(p, g, &normed, mlp, &df)?;
        let d_middle = self.norm2.backward(p, g, &middle, &stats2, &d_normed, Some(dy))?;
        drop((df, normed, d_normed, middle));
        let df = self.join_backward(p, g, branch1, &d_middle, 0);
        let normed = self.norm1.again(p, &x, &stats1);
        let d_normed = self.attn.backward(p, g, &normed, attn, groups, bias, &df)?;
        self.norm1.backward(p, g, &x, &stats1, &d_normed, Some(&d_middle))
    }
}

/// The encoder. All parameters are registered under the names that it is given (`encoder.*` in SimMIM).
#[derive(Clone, Debug)]
pub struct SimMimVit {
    embed: PatchEmbed,
    cls_token: Param,
    mask_token: Param,
    positions: Option<Param>,
    shared: Option<RelativeTable>,
    index: Vec<u32>,
    blocks: Vec<Block>,
    norm: Option<LayerNorm>,
    dim: usize,
    heads: usize,
}

/// What [`SimMimVit::backward`] needs.
pub struct Saved<T: Float> {
    embed: patch_embed::Saved<T>,
    hidden: Option<Vec<bool>>,
    groups: Groups,
    blocks: Vec<BlockSaved<T>>,
    last: Option<(Tensor<T>, Stats<T>)>,
}

impl SimMimVit {
    /// Registers the parameters from the keys of `mim.simmim` with `encoder` `"vit"`.
    pub fn new(config: &Config, names: &mut Names) -> Result<Self> {
        let (patch, chans, dim) = (config.positive("patch_size")?, config.positive("in_chans")?, config.positive("embed_dim")?);
        let (heads, eps, depth) = (config.positive("num_heads")?, config.f64_or("norm_eps", 1e-6)?, config.usize("depth")?);
        if !dim.is_multiple_of(heads) {
            return Err(Error::config("num_heads", format!("expected a divisor of embed_dim {dim}, found {heads}")));
        }
        let hidden = hidden_width(dim, config.f64_or("mlp_ratio", 4.0)?)?;
        let (qkv_bias, own_tables, scale) = (config.bool("qkv_bias")?, config.bool("use_rpb")?, config.bool("layer_scale")?);
        let image = [config.positive("img_size")?; 2];
        let embed = PatchEmbed::new(names.at("patch_embed"), image, patch, chans, dim, None, Init::NORMAL_02)?;
        let [grid, _] = embed.grid();
        let cls_token = names.param("cls_token", [1, 1, dim], Init::NORMAL_02);
        let mask_token = names.param("mask_token", [1, 1, dim], Init::NORMAL_02);
        let positions = config.bool("use_ape")?.then(|| names.param("pos_embed", [1, 1 + grid * grid, dim], Init::NORMAL_02));
        let shared = config.bool("use_shared_rpb")?.then(|| RelativeTable::new(&mut names.at("rel_pos_bias"), grid, heads));
        let block = |i: usize, mut names: Names| {
            // Deep residual branches start smaller: the authors divide these weights by √(2(l + 1)).
            let deep = Init::Normal(0.02 / (2.0 * (i + 1) as f64).sqrt());
            let norm1 = LayerNorm::new(names.at("norm1"), dim, eps);
            let attn = BiasedAttention::new(names.at("attn"), dim, heads, qkv_bias, deep);
            let table = own_tables.then(|| RelativeTable::new(&mut names.at("attn"), grid, heads));
            let gammas = scale.then(|| ["gamma_1", "gamma_2"].map(|name| names.param(name, [dim], Init::Constant(0.1))));
            let norm2 = LayerNorm::new(names.at("norm2"), dim, eps);
            let mlp = Mlp::with_inits(names.at("mlp"), dim, hidden, [Init::NORMAL_02, deep]);
            Block { norm1, attn, table, gammas, norm2, mlp }
        };
        let blocks = (0..depth).map(|i| block(i, names.at(format!("blocks.{i}")))).collect();
        let norm = if config.bool("use_mean_pooling")? {
            LayerNorm::new(names.at("fc_norm"), dim, eps);
            None
        } else {
            Some(LayerNorm::new(names.at("norm"), dim, eps))
        };
        Ok(SimMimVit { embed, cls_token, mask_token, positions, shared, index: relative_index(grid), blocks, norm, dim, heads })
    }

    /// Rows and columns of tokens.
    pub fn grid(&self) -> [usize; 2] {
        self.embed.grid()
    }

    /// The width F of the tokens.
    pub fn features(&self) -> usize {
        self.dim
    }

    fn has_bias(&self, block: &Block) -> bool {
        block.table.is_some() || self.shared.is_some()
    }

    /// The dense logits of a block, `[h, side, side]`.
    fn dense_bias<T: Float>(&self, p: &Params<T>, block: &Block) -> Option<Tensor<T>> {
        self.has_bias(block).then(|| {
            let mut dense = Tensor::zeros([self.heads, self.index.len()]);
            for table in [&block.table, &self.shared].into_iter().flatten() {
                table.add_to(p, dense.data_mut(), &self.index, self.heads);
            }
            dense
        })
    }

    /// Tokens `[B, N, C]` of `image`, after the norm and without the class token; `hidden` `[B, N]` says where the mask token stands.
    pub fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, hidden: Option<&[bool]>) -> Result<(Tensor<T>, Saved<T>)> {
        let mut blocks = Vec::with_capacity(self.blocks.len());
        self.run(p, image, hidden, |saved| blocks.push(saved))
            .map(|(y, embed, groups, last)| (y, Saved { embed, hidden: hidden.map(<[bool]>::to_vec), groups, blocks, last }))
    }

    /// [`forward`](Self::forward) of whole images without keeping anything for a backward pass.
    pub fn infer<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<Tensor<T>> {
        Ok(self.run(p, image, None, drop)?.0)
    }

    #[allow(clippy::type_complexity)]
    fn run<T: Float>(
        &self,
        p: &Params<T>,
        image: &Tensor<T>,
        hidden: Option<&[bool]>,
        mut keep: impl FnMut(BlockSaved<T>),
    ) -> Result<(Tensor<T>, patch_embed::Saved<T>, Groups, Option<(Tensor<T>, Stats<T>)>)> {
        let (mut patches, embed) = self.embed.forward(p, image, None)?;
        if let Some(hidden) = hidden {
            mix_token(p, self.mask_token, &mut patches, hidden)?;
        }
        let [b, n, c] = patches.dims("patches")?;
        let mut x = Tensor::scratch([b, 1 + n, c]);
        for (out, patches) in x.data_mut().chunks_exact_mut((1 + n) * c).zip(patches.data().chunks_exact(n * c)) {
            out[..c].copy_from_slice(p.get(self.cls_token));
            out[c..].copy_from_slice(patches);
        }
        drop(patches);
        if let Some(positions) = self.positions {
            rows::add_table(x.data_mut(), p.get(positions));
        }
        let groups = Groups::all(1 + n, 1 + n);
        for block in &self.blocks {
            let dense = self.dense_bias(p, block);
            let bias = dense.as_ref().map(|dense| Bias { data: dense.data(), side: 1 + n });
            let (y, saved) = block.forward(p, x, &groups, bias)?;
            keep(saved);
            x = y;
        }
        let (y, last) = match &self.norm {
            None => (x, None),
            Some(norm) => {
                let (y, stats) = norm.forward(p, &x)?;
                (y, Some((x, stats)))
            }
        };
        let mut tokens = Tensor::scratch([b, n, c]);
        for (out, y) in tokens.data_mut().chunks_exact_mut(n * c).zip(y.data().chunks_exact((1 + n) * c)) {
            out.copy_from_slice(&y[c..]);
        }
        Ok((tokens, embed, groups, last))
    }

    /// Adds the gradients of the parameters; the gradient of the image if `want_image`.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_tokens: &Tensor<T>,
        want_image: bool,
    ) -> Result<Option<Tensor<T>>> {
        let Saved { embed, hidden, groups, blocks, last } = saved;
        let [b, n, c] = d_tokens.dims("gradient of the tokens")?;
        let mut d = Tensor::zeros([b, 1 + n, c]);
        for (out, d) in d.data_mut().chunks_exact_mut((1 + n) * c).zip(d_tokens.data().chunks_exact(n * c)) {
            out[c..].copy_from_slice(d);
        }
        if let (Some(norm), Some((x, stats))) = (&self.norm, last) {
            d = norm.backward(p, g, &x, &stats, &d, None)?;
        }
        for (block, saved) in self.blocks.iter().zip(blocks).rev() {
            let dense = self.dense_bias(p, block);
            let mut d_dense = Tensor::zeros(dense.as_ref().map_or([0, 0].into(), Tensor::shape));
            let bias = dense.as_ref().map(|dense| (Bias { data: dense.data(), side: 1 + n }, d_dense.data_mut()));
            d = block.backward(p, g, saved, &groups, bias, &d)?;
            for table in [&block.table, &self.shared].into_iter().flatten() {
                table.backward(g, d_dense.data(), &self.index, self.heads);
            }
        }
        if let Some(positions) = self.positions {
            reduce::add_column_sums(g.get_mut(positions), d.data());
        }
        let mut d_patches = Tensor::scratch([b, n, c]);
        for (out, d) in d_patches.data_mut().chunks_exact_mut(n * c).zip(d.data().chunks_exact((1 + n) * c)) {
            elementwise::add(g.get_mut(self.cls_token), &d[..c]);
            out.copy_from_slice(&d[c..]);
        }
        if let Some(hidden) = &hidden {
            mix_token_backward(g, self.mask_token, &mut d_patches, hidden)?;
        }
        if want_image {
            Ok(Some(self.embed.backward(p, g, &embed, &d_patches, None)?))
        } else {
            self.embed.backward_params(p, g, &embed, &d_patches)?;
            Ok(None)
        }
    }
}
