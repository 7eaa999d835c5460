//! `model.spvit`: a DeiT whose layers are attention, convolutions or nothing, searched or finished (SPViT, arXiv 2111.11802), and the block
//! that it shares with [`spvit_swin`](super::spvit_swin): `x ← x + attn(norm1 x)`, `x ← x + mlp(norm2 x)`.
//!
//! A finished "skip" layer returns its input, so that the block adds `norm1 x`, as released; so does a convolution for the class token.
//! A search also gives its expected FLOPs and their loss, which is part of the objective.

use crate::attention::single_path::{self, Mode, Place, Settings, SinglePath};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::attention::{Groups, Mask};
use crate::kernel::{elementwise, reduce, rows};
use crate::model::vit_block::hidden_width;
use crate::nn::batch_norm::Updates;
use crate::nn::spvit_gate::{FlopsLoss, Gates, noise};
use crate::nn::spvit_mlp::{self, SpvitMlp};
use crate::nn::{Init, LayerNorm, Layout, Linear, Names, Param, Params, PatchEmbed, Stats, normal_02, patch_embed};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Shape, Tensor};

/// A pre-norm block: `norm1`, `attn`, `norm2`, `mlp`.
pub struct Block {
    norm1: LayerNorm,
    attn: SinglePath,
    norm2: LayerNorm,
    mlp: SpvitMlp,
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
    /// Registers the parameters.
    pub fn new(names: &mut Names, settings: Settings, hidden: usize, norm_eps: f64) -> Result<Self> {
        let dim = settings.dim;
        let norm1 = LayerNorm::new(names.at("norm1"), dim, norm_eps);
        let attn = SinglePath::new(&mut names.at("attn"), settings)?;
        let norm2 = LayerNorm::new(names.at("norm2"), dim, norm_eps);
        Ok(Block { norm1, attn, norm2, mlp: SpvitMlp::new(&mut names.at("mlp"), dim, hidden, settings.mode == Mode::Search) })
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
        let mut middle = arrangement.arrange_back(y)?;
        elementwise::add(middle.data_mut(), x.data());
        let (normed, stats2) = self.norm2.forward(p, &middle)?;
        let (y, mlp) = self.mlp.forward(p, &normed, u_ffn, Some(&middle))?;
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
        let d_normed = self.mlp.backward(p, g, &normed, mlp, dy, d_expected.map(|(_, units)| &units[..]))?;
        let d_middle = self.norm2.backward(p, g, &middle, &stats2, &d_normed, Some(dy))?;
        drop((normed, d_normed, middle));
        let normed = arrangement.arrange(&self.norm1.again(p, &x, &stats1))?;
        let (place, d) = (arrangement.place()?, arrangement.arrange(&d_middle)?);
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
        })
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
    pub fn output<T: Float>(run: &mut Run<T>, loss: FlopsLoss, blocks: &[BlockSaved<T>], hidden: Vec<usize>) -> Self {
        let gates: Vec<_> = blocks.iter().filter_map(BlockSaved::gates).collect();
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

/// The keys of `model.spvit`.
struct ModelSettings {
    search: Search,
    image: usize,
    patch: usize,
    chans: usize,
    classes: usize,
    dim: usize,
    heads: usize,
    modes: Vec<Mode>,
    hidden: Vec<usize>,
    qkv_bias: bool,
}

impl ModelSettings {
    fn from_config(config: &Config) -> Result<Self> {
        let search = Search::from_config(config, 0.01, 1e-6)?;
        let (dim, depth, heads) = (config.positive("embed_dim")?, config.usize("depth")?, config.positive("num_heads")?);
        if depth > 1 << 10 || !dim.is_multiple_of(heads) {
            return Err(Error::config("depth", format!("expected at most 1024 layers and whole heads, found {depth}, {dim} over {heads}")));
        }
        let indicators = config.get("msa_indicators").and_then(serde_json::Value::as_array);
        let modes = (0..depth).map(|i| search.mode(indicators.and_then(|list| list.get(i)))).collect::<Result<Vec<_>>>()?;
        let hidden = if search.search { vec![hidden_width(dim, config.f64("mlp_ratio")?)?; depth] } else { config.usizes("ffn_hidden")? };
        if hidden.len() != depth || hidden.contains(&0) {
            return Err(Error::config("ffn_hidden", format!("expected {depth} positive widths, found {hidden:?}")));
        }
        Ok(ModelSettings {
            search,
            image: config.positive("image_size")?,
            patch: config.positive("patch_size")?,
            chans: config.positive("in_chans")?,
            classes: config.positive("num_classes")?,
            dim,
            heads,
            modes,
            hidden,
            qkv_bias: config.bool_or("qkv_bias", true)?,
        })
    }

    fn layer(&self, mode: Mode) -> Settings {
        let Search { alpha, own_conv, .. } = self.search;
        Settings { dim: self.dim, heads: self.heads, mode, alpha, qkv_bias: self.qkv_bias, class: true, window: None, own_conv }
    }
}

/// SPViT-DeiT.
struct Spvit {
    embed: PatchEmbed,
    cls_token: Param,
    positions: Param,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Linear,
    settings: ModelSettings,
}

struct Saved<T: Float> {
    embed: patch_embed::Saved<T>,
    blocks: Vec<BlockSaved<T>>,
    first: Tensor<T>,
    stats: Stats<T>,
    normed: Tensor<T>,
}

impl Spvit {
    fn new(names: &mut Names, settings: ModelSettings) -> Result<Self> {
        let (dim, eps) = (settings.dim, settings.search.norm_eps);
        let embed =
            PatchEmbed::new(names.at("patch_embed"), [settings.image; 2], settings.patch, settings.chans, dim, None, Init::NORMAL_02)?;
        let [h, w] = embed.grid();
        let blocks = (settings.modes.iter().zip(&settings.hidden).enumerate())
            .map(|(i, (&mode, &hidden))| Block::new(&mut names.at(format!("blocks.{i}")), settings.layer(mode), hidden, eps))
            .collect::<Result<_>>()?;
        Ok(Spvit {
            embed,
            cls_token: names.param("cls_token", [1, 1, dim], Init::NORMAL_02),
            positions: names.param("pos_embed", [1, 1 + h * w, dim], Init::NORMAL_02),
            blocks,
            norm: LayerNorm::new(names.at("norm"), dim, eps),
            head: Linear::new(names.at("head"), dim, settings.classes, true, normal_02(dim, dim)),
            settings,
        })
    }

    fn arrangement<T: Float>(&self, batch: usize) -> Arrangement<T> {
        let [h, w] = self.embed.grid();
        let n = 1 + h * w;
        Arrangement { index: None, attend: [batch, n], groups: Groups::all(n, n), mask: None, map: [batch, h, w] }
    }

    /// The first token of every image.
    fn first<T: Float>(x: &Tensor<T>) -> Result<Tensor<T>> {
        let [batch, n, c] = x.dims("tokens")?;
        Ok(Tensor::from_fn([batch, c], |i| x.data()[i / c * n * c + i % c]))
    }

    fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>, noises: &[Noise<T>]) -> Result<(Tensor<T>, Saved<T>)> {
        let (patches, embed) = self.embed.forward(p, image, None)?;
        let [batch, n, c] = patches.dims("patches")?;
        let mut x = Tensor::scratch([batch, n + 1, c]);
        for (to, from) in x.data_mut().chunks_exact_mut((n + 1) * c).zip(patches.data().chunks_exact(n * c)) {
            to[..c].copy_from_slice(p.get(self.cls_token));
            to[c..].copy_from_slice(from);
        }
        rows::add_table(x.data_mut(), p.get(self.positions));
        let arrangement = self.arrangement(batch);
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (block, &noise) in self.blocks.iter().zip(noises) {
            let (y, saved) = block.forward(p, &x, &arrangement, self.settings.search.training, noise)?;
            blocks.push(saved);
            x = y;
        }
        // Only the class token reaches the head, and the norm sees tokens one by one.
        let first = Self::first(&x)?;
        let (normed, stats) = self.norm.forward(p, &first)?;
        Ok((self.head.forward(p, &normed)?, Saved { embed, blocks, first, stats, normed }))
    }

    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_logits: &Tensor<T>,
        d_expected: &[([T; 3], Vec<T>)],
    ) -> Result<Tensor<T>> {
        let Saved { embed, blocks, first, stats, normed } = saved;
        let d_normed = self.head.backward(p, g, &normed, d_logits)?;
        let d_first = self.norm.backward(p, g, &first, &stats, &d_normed, None)?;
        let [batch, c] = d_first.dims("class tokens")?;
        let [h, w] = self.embed.grid();
        let n = h * w;
        let mut d = Tensor::zeros([batch, n + 1, c]);
        for (to, from) in d.data_mut().chunks_exact_mut((n + 1) * c).zip(d_first.data().chunks_exact(c)) {
            to[..c].copy_from_slice(from);
        }
        let arrangement = self.arrangement(batch);
        for (i, (block, saved)) in self.blocks.iter().zip(blocks).enumerate().rev() {
            d = block.backward(p, g, saved, &arrangement, &d, d_expected.get(i))?;
        }
        reduce::add_column_sums(g.get_mut(self.positions), d.data());
        let mut d_patches = Tensor::scratch([batch, n, c]);
        for (to, from) in d_patches.data_mut().chunks_exact_mut(n * c).zip(d.data().chunks_exact((n + 1) * c)) {
            elementwise::add(g.get_mut(self.cls_token), &from[..c]);
            to.copy_from_slice(&from[c..]);
        }
        self.embed.backward(p, g, &embed, &d_patches, None)
    }
}

/// `model.spvit`.
pub struct ModelSpvit;

/// Random indicators and widths for layers of a finished network.
pub fn sample_layer(rng: &mut Rng) -> (Vec<usize>, usize) {
    let kinds = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]];
    (kinds[rng.below(4)].to_vec(), rng.between(1, 4))
}

impl Operation for ModelSpvit {
    const NAME: &'static str = "model.spvit";
    const PAPER: &'static str = "2111.11802 SPViT";
    const DATA: &'static [&'static str] = &["u_kernel", "u_ffn"];

    fn sample(rng: &mut Rng) -> Config {
        let (heads, patch, depth, mut config) = (rng.between(1, 2), rng.between(1, 2), rng.between(1, 2), Config::default());
        config.set("image_size", patch * rng.between(2, 3)).set("patch_size", patch).set("in_chans", rng.between(1, 2));
        config.set("num_classes", rng.between(1, 3)).set("embed_dim", heads * rng.between(2, 3)).set("depth", depth);
        config.set("num_heads", heads).set("mlp_ratio", rng.between(1, 2)).set("qkv_bias", true).set("alpha", rng.range(0.1, 1.0));
        config.set("norm_eps", 1e-6).set("training", rng.chance(0.5)).set("param_opt", rng.chance(0.4));
        if rng.chance(0.5) {
            config.set("mode", "search").set("target_flops", rng.range(0.0, 1e-4)).set("loss_lambda", 1e5);
        } else {
            let (indicators, hidden): (Vec<_>, Vec<_>) = (0..depth).map(|_| sample_layer(rng)).unzip();
            config.set("mode", "finetune").set("msa_indicators", indicators).set("ffn_hidden", hidden);
        }
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let settings = ModelSettings::from_config(config)?;
        let batch = draw.size("batch", 1, 2);
        draw.normal("x", [batch, settings.chans, settings.image, settings.image]);
        if settings.search.search && settings.search.training {
            draw.uniform("u_kernel", [settings.modes.len(), 3]);
            draw.uniform("u_ffn", [settings.hidden.len(), settings.hidden.first().copied().unwrap_or(0)]);
        }
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (x, config) = (run.input("x")?, run.config());
        let settings = ModelSettings::from_config(config)?;
        let (search, depth, hidden) = (settings.search.search, settings.modes.len(), settings.hidden.clone());
        let width = hidden.first().copied().unwrap_or(0);
        let loss = if search {
            let sizes = [settings.image, settings.patch, settings.chans];
            let (target, lambda) = (config.f64("target_flops")?, config.f64("loss_lambda")?);
            Some(FlopsLoss::deit(sizes, settings.classes, [settings.dim, depth, settings.heads], target, lambda)?)
        } else {
            None
        };
        let noisy = search && settings.search.training;
        let (u_kernel, u_ffn) = (noise(run, "u_kernel", [depth, 3], noisy)?, noise(run, "u_ffn", [depth, width], noisy)?);
        let row = |u: &'_ Option<Tensor<T>>, i: usize, width: usize| u.as_ref().map(|u| u.data()[i * width..(i + 1) * width].to_vec());
        let rows: Vec<[Option<Vec<T>>; 2]> = (0..depth).map(|i| [row(&u_kernel, i, 3), row(&u_ffn, i, width)]).collect();
        let noises: Vec<Noise<T>> = rows.iter().map(|pair| [pair[0].as_deref(), pair[1].as_deref()]).collect();
        let (model, layout) = Layout::build(|names| Spvit::new(names, settings))?;
        let p = run.params(&layout)?;
        let (logits, mut saved) = model.forward(&p, &x, &noises)?;
        run.output("logits", &logits);
        let updates = saved.blocks.iter_mut().flat_map(BlockSaved::take_updates).collect();
        run.after_buffers(&layout, updates);
        let loss = loss.map(|loss| SearchLoss::output(run, loss, &saved.blocks, hidden));
        if run.backward() {
            let (mut g, d_logits) = (run.zero_grads(&p), run.cotangent("logits", logits.shape())?);
            let d_expected = loss.map_or(Ok(Vec::new()), |loss| loss.backward(run))?;
            let dx = model.backward(&p, &mut g, saved, &d_logits, &d_expected)?;
            run.grad_input("x", &dx);
            run.grad_params(&g);
        }
        Ok(())
    }
}
