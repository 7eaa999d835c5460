//! The block of both SPViTs (arXiv 2111.11802), `x ← x + attn(norm1 x)`, `x ← x + mlp(norm2 x)`, and what else
//! [`spvit`](super::spvit) and [`spvit_swin`](super::spvit_swin) share: their keys, the loss of a search, multiply-adds, released names.
//!
//! A finished "skip" layer returns its input, so that the block adds `norm1 x`, as released; so does a convolution for the class token.

use super::weights::Key;
use crate::attention::single_path::{self, Mode, Place, Settings, SinglePath};
use crate::case::{Config, Run};
use crate::error::{Error, Result};
use crate::kernel::attention::{Groups, Mask};
use crate::kernel::{elementwise, rows};
use crate::nn::batch_norm::Updates;
use crate::nn::spvit_gate::{FlopsLoss, Gates};
use crate::nn::spvit_mlp::{self, SpvitMlp};
use crate::nn::{DropPath, LayerNorm, Names, Params, Stats};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Shape, Tensor};

/// A pre-norm block: `norm1`, `attn`, `norm2`, `mlp`.
pub struct Block {
    norm1: LayerNorm,
    attn: SinglePath,
    norm2: LayerNorm,
    mlp: SpvitMlp,
    drops: [DropPath; 2],
}

/// How a block's tokens reach its layer.
pub struct Arrangement<T: Float> {
    /// The order in which an image's tokens are handed to the layer; as they are if there is none.
    pub index: Option<Vec<u32>>,
    /// See [`Place::attend`].
    pub attend: [usize; 2],
    /// Who attends to whom.
    pub groups: Groups,
    /// Additive logits `[count, side, side]`.
    pub mask: Option<Tensor<T>>,
    /// See [`Place::map`].
    pub map: [usize; 3],
}

impl<T: Float> Arrangement<T> {
    fn place(&self) -> Result<Place<'_, T>> {
        let mask = match &self.mask {
            None => None,
            Some(mask) => {
                let [count, side, _] = mask.dims("shift mask")?;
                Some(Mask { data: mask.data(), count, side })
            }
        };
        Ok(Place { attend: self.attend, groups: &self.groups, mask, map: self.map })
    }

    fn arrange(&self, x: &Tensor<T>) -> Result<Tensor<T>> {
        let Some(index) = &self.index else { return Ok(x.clone()) };
        let [batch, _, c] = x.dims("tokens")?;
        let mut y = Tensor::scratch(x.shape());
        rows::gather_batch(y.data_mut(), x.data(), index, batch, c);
        Ok(y)
    }

    fn arrange_back(&self, x: Tensor<T>) -> Result<Tensor<T>> {
        let Some(index) = &self.index else { return Ok(x) };
        let [batch, _, c] = x.dims("tokens")?;
        let mut y = Tensor::scratch(x.shape());
        rows::scatter_batch(y.data_mut(), x.data(), index, batch, c);
        Ok(y)
    }
}

/// What [`Block::backward`] needs.
pub struct BlockSaved<T: Float> {
    x: Tensor<T>,
    stats1: Stats<T>,
    attn: single_path::Saved<T>,
    middle: Tensor<T>,
    stats2: Stats<T>,
    mlp: spvit_mlp::Saved<T>,
}

impl<T: Float> BlockSaved<T> {
    /// The gates of a search, of the attention and of the MLP.
    pub fn gates(&self) -> Option<(Gates, Gates)> {
        self.attn.gates().cloned().zip(self.mlp.gates().cloned())
    }

    /// Takes the running statistics after the call.
    pub fn take_updates(&mut self) -> Updates<T> {
        self.attn.take_updates()
    }
}

/// The noise of a block in a search: of the kernel gates and of the hidden units.
pub type Noise<'a, T> = [Option<&'a [T]>; 2];

impl Block {
    /// Registers the parameters; `drop_path` is the probability that a residual branch is left out in training.
    pub fn new(names: &mut Names, settings: Settings, hidden: usize, norm_eps: f64, drop_path: f64) -> Result<Self> {
        let dim = settings.dim;
        let norm1 = LayerNorm::new(names.at("norm1"), dim, norm_eps);
        let attn = SinglePath::new(&mut names.at("attn"), settings)?;
        let norm2 = LayerNorm::new(names.at("norm2"), dim, norm_eps);
        let mlp = SpvitMlp::new(&mut names.at("mlp"), dim, hidden, settings.mode == Mode::Search);
        let drops = [DropPath::new(names, drop_path)?, DropPath::new(names, drop_path)?];
        Ok(Block { norm1, attn, norm2, mlp, drops })
    }

    /// The block's output.
    pub fn forward<T: Float>(
        &self,
        p: &Params<T>,
        x: &Tensor<T>,
        arrangement: &Arrangement<T>,
        training: bool,
        [u_kernel, u_ffn]: Noise<T>,
    ) -> Result<(Tensor<T>, BlockSaved<T>)> {
        let (normed, stats1) = self.norm1.forward(p, x)?;
        let (y, attn) = self.attn.forward(p, &arrangement.arrange(&normed)?, &arrangement.place()?, training, u_kernel)?;
        let mut middle = self.drops[0].apply(p, arrangement.arrange_back(y)?);
        elementwise::add(middle.data_mut(), x.data());
        let (normed, stats2) = self.norm2.forward(p, &middle)?;
        let (y, mlp) = self.drops[1].residual(p, &middle, |residual| self.mlp.forward(p, &normed, u_ffn, residual))?;
        Ok((y, BlockSaved { x: x.clone(), stats1, attn, middle, stats2, mlp }))
    }

    /// `dx`, given what [`forward`](Self::forward) got; `d_expected` are the gradients of the expected gates.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: BlockSaved<T>,
        arrangement: &Arrangement<T>,
        dy: &Tensor<T>,
        d_expected: Option<&([T; 3], Vec<T>)>,
    ) -> Result<Tensor<T>> {
        let BlockSaved { x, stats1, attn, middle, stats2, mlp } = saved;
        let normed = self.norm2.again(p, &middle, &stats2);
        let d_units = d_expected.map(|(_, units)| &units[..]);
        let d_normed = self.drops[1].backward(p, dy, |d| self.mlp.backward(p, g, &normed, mlp, d, d_units))?;
        let d_middle = self.norm2.backward(p, g, &middle, &stats2, &d_normed, Some(dy))?;
        drop((normed, d_normed, middle));
        let normed = arrangement.arrange(&self.norm1.again(p, &x, &stats1))?;
        let (place, d) = (arrangement.place()?, arrangement.arrange(&self.drops[0].apply(p, d_middle.clone()))?);
        let d_normed = self.attn.backward(p, g, &normed, attn, &place, &d, d_expected.map(|(kernel, _)| &kernel[..]))?;
        self.norm1.backward(p, g, &x, &stats1, &arrangement.arrange_back(d_normed)?, Some(&d_middle))
    }
}

/// What a SPViT does as a whole: the keys that DeiT and Swin share.
pub struct Search {
    /// Gates decide; else the network is finished.
    pub search: bool,
    /// Batch norms take their own statistics, gates are sampled.
    pub training: bool,
    /// Finished convolutions have their own weights.
    pub own_conv: bool,
    /// Temperature of the mixture of heads.
    pub alpha: f64,
    /// ε of the layer norms.
    pub norm_eps: f64,
    /// Drop path of the last block; it grows linearly from 0 over all blocks.
    pub drop_path: f64,
}

impl Search {
    /// From a configuration.
    pub fn from_config(config: &Config, alpha: f64, norm_eps: f64) -> Result<Self> {
        Ok(Search {
            search: config.choice("mode", &["search", "finetune"])? == "search",
            training: config.bool_or("training", false)?,
            own_conv: config.bool_or("param_opt", false)?,
            alpha: config.f64_or("alpha", alpha)?,
            norm_eps: config.f64_or("norm_eps", norm_eps)?,
            drop_path: config.f64_or("drop_path_rate", 0.0)?,
        })
    }

    /// Whether batch norms take their own statistics: as the configuration or the pass says.
    pub fn trains<T: Float>(&self, p: &Params<T>) -> bool {
        self.training || p.training()
    }

    /// An error unless the network is finished: classifiers have no noise for a search, nor its loss.
    pub fn finished(&self) -> Result<()> {
        if self.search { Err(Error::config("mode", "expected \"finetune\" for a classifier, found \"search\"")) } else { Ok(()) }
    }

    /// The mode of a layer from its indicators.
    pub fn mode(&self, indicators: Option<&serde_json::Value>) -> Result<Mode> {
        if self.search {
            return Ok(Mode::Search);
        }
        let bit = |value: &serde_json::Value| value.as_f64().filter(|x| *x == 0.0 || *x == 1.0).map(|x| x as usize);
        let bits: Option<Vec<usize>> = indicators.and_then(serde_json::Value::as_array).and_then(|list| list.iter().map(bit).collect());
        let mode = bits.and_then(|bits| <[usize; 3]>::try_from(bits).ok()).and_then(Mode::indicated);
        mode.ok_or_else(|| {
            let found = indicators.map_or("nothing".into(), serde_json::Value::to_string);
            Error::config("msa_indicators", format!("expected [0,0,0], [1,0,0], [1,1,0] or [1,1,1] for every layer, found {found}"))
        })
    }
}

/// The expected FLOPs and their loss, as outputs, and their gradients in the backward pass.
pub struct SearchLoss {
    loss: FlopsLoss,
    gates: Vec<(Gates, Gates)>,
    hidden: Vec<usize>,
}

impl SearchLoss {
    /// Hands in `flops_loss` and `flops` of the gates that a forward pass used.
    pub fn output<T: Float>(run: &mut Run<T>, loss: FlopsLoss, gates: Vec<(Gates, Gates)>, hidden: Vec<usize>) -> Self {
        let value = loss.value(&gates);
        run.output("flops_loss", &Tensor::scalar(T::from_f64(value.loss)));
        run.output("flops", &Tensor::scalar(T::from_f64(value.flops)));
        SearchLoss { loss, gates, hidden }
    }

    /// The gradients of every block's expected gates.
    pub fn backward<T: Float>(&self, run: &Run<T>) -> Result<Vec<([T; 3], Vec<T>)>> {
        let d_loss = run.cotangent("flops_loss", Shape::from([]))?;
        let grads = self.loss.backward(self.loss.value(&self.gates), d_loss.data()[0]);
        Ok(grads.into_iter().zip(&self.hidden).map(|((kernel, unit), &hidden)| (kernel, vec![unit; hidden])).collect())
    }
}

/// Multiply-adds of a finished network, as the search counts them: its MLPs forget the class token.
pub fn finished_macs(loss: &FlopsLoss, layers: impl Iterator<Item = (Mode, usize)>) -> f64 {
    (loss.layers.iter().zip(layers)).fold(loss.fixed, |sum, (layer, (mode, hidden))| {
        let [one, three, attention] = layer.choices;
        let choice = match mode {
            Mode::Skip => 0.0,
            Mode::Conv(1) => one,
            Mode::Conv(_) => three,
            Mode::Search | Mode::Msa => attention,
        };
        sum + choice + layer.unit * hidden as f64
    })
}

/// Names as released, without what a search leaves behind and what follows from the sizes.
pub fn key(name: &str) -> Key {
    let left_out = ["num_batches_tracked", "assigned_indicator_index", "relative_position_index", "attn_mask"];
    if name.rsplit('.').next().is_some_and(|last| left_out.contains(&last)) { Key::Drop } else { Key::Keep }
}

/// Random indicators and widths for layers of a finished network.
pub fn sample_layer(rng: &mut Rng) -> (Vec<usize>, usize) {
    let kinds = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]];
    (kinds[rng.below(4)].to_vec(), rng.between(1, 4))
}
