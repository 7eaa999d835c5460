//! `block.vt_fpn`: Visual Transformers for segmentation (arXiv 2006.03677): every level of a feature pyramid gives tokens, one transformer
//! mixes all of them, every level reads all of them back.
//!
//! `T = transformers([tokenizer_i(X_i)]_i)`, `X_i' = lateral_i(X_i) + softmax((X_i W_Q)(T W_K)ᵀ) T W_V`.

use crate::attention::visual_tokens::Widths;
use crate::attention::visual_tokens::equations::{Projector, ProjectorSaved, Tokenizer, TokenizerSaved, Transformer, TransformerSaved};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::elementwise;
use crate::nn::maps::{channels_first, channels_last};
use crate::nn::{Layout, Names, Params};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Shape, Tensor};

/// More levels, tokens or layers than any network has.
const MOST: usize = 4096;

/// The block.
#[derive(Clone, Debug)]
pub struct VtFpn {
    levels: Vec<(Tokenizer, Projector)>,
    transformers: Vec<Transformer>,
    channels: Vec<usize>,
    token_channels: usize,
    /// L of a level.
    tokens: usize,
}

/// What a level keeps for the backward pass: its pixels and what its tokenizer and projector saved.
struct LevelSaved<T: Float> {
    x: Tensor<T>,
    tokenizer: TokenizerSaved<T>,
    projector: ProjectorSaved<T>,
}

/// What the backward pass needs.
pub struct Saved<T: Float> {
    levels: Vec<LevelSaved<T>>,
    transformers: Vec<TransformerSaved<T>>,
    /// All tokens after the transformers.
    tokens: Tensor<T>,
}

/// Maps, tokens, and what the backward pass needs.
pub type Outputs<T> = (Vec<Tensor<T>>, Tensor<T>, Saved<T>);

impl VtFpn {
    /// Registers `levels.{i}.tokenizer`, `transformer.{j}`, `levels.{i}.projector`.
    pub fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let number = |key: &str, default: usize| if config.get(key).is_none() { Ok(default) } else { config.positive(key) };
        let channels = config.usizes("level_channels")?;
        let (token_channels, tokens, outputs) =
            (config.positive("token_channels")?, config.positive("num_tokens")?, config.positive("out_channels")?);
        let depth = config.usize("depth")?;
        if channels.is_empty() || channels.contains(&0) || channels.len() > MOST || tokens > MOST || depth > MOST {
            let found = format!("{channels:?} with {tokens} tokens and {depth} layers");
            return Err(Error::config("level_channels", format!("expected at least one positive width, found {found}")));
        }
        let [attn_dim, ffn_dim] = [number("attn_dim", token_channels / 2)?, number("ffn_dim", token_channels)?];
        let proj_dim = number("proj_dim", outputs)?;
        let tokenizers = (channels.iter().enumerate())
            .map(|(i, &c)| {
                let widths = Widths { channels: c, token_channels, tokens };
                Tokenizer::new(&mut names.at(format!("levels.{i}.tokenizer")), widths, false, true, false)
            })
            .collect::<Result<Vec<_>>>()?;
        let transformers = (0..depth)
            .map(|j| Transformer::new(&mut names.at(format!("transformer.{j}")), token_channels, attn_dim, ffn_dim, false))
            .collect::<Result<_>>()?;
        let levels = (channels.iter().enumerate().zip(tokenizers))
            .map(|((i, &c), tokenizer)| {
                let widths = [c, token_channels, outputs, proj_dim];
                Ok((tokenizer, Projector::new(&mut names.at(format!("levels.{i}.projector")), widths, true, false)?))
            })
            .collect::<Result<_>>()?;
        Ok(VtFpn { levels, transformers, channels, token_channels, tokens })
    }

    /// What it costs for maps `[b, h, w]`, beside the maps that go in.
    pub fn cost(&self, sizes: &[[usize; 3]]) -> Cost {
        let (all, batch) = (self.tokens * self.levels.len(), sizes.first().map_or(0, |size| size[0]));
        let mut cost = Cost::default();
        for ((tokenizer, projector), &[b, h, w]) in self.levels.iter().zip(sizes) {
            cost = cost + tokenizer.cost(b, h * w) + projector.cost(b, h * w, all, self.token_channels);
        }
        self.transformers.iter().fold(cost, |cost, transformer| cost + transformer.cost(batch, all))
    }

    /// The maps `[B, HW, C_o]` and all tokens, from pixels `[B, HW, C_i]`.
    pub fn forward<T: Float>(&self, p: &Params<T>, pixels: Vec<Tensor<T>>) -> Result<Outputs<T>> {
        let (mut parts, mut tokenizers) = (Vec::new(), Vec::new());
        for ((tokenizer, _), x) in self.levels.iter().zip(&pixels) {
            let (tokens, saved) = tokenizer.forward(p, x, None)?;
            parts.push(tokens);
            tokenizers.push(saved);
        }
        let mut tokens = self.concat(&parts)?;
        drop(parts);
        let mut transformers = Vec::new();
        for transformer in &self.transformers {
            let (next, saved) = transformer.forward(p, tokens)?;
            transformers.push(saved);
            tokens = next;
        }
        let (mut maps, mut levels) = (Vec::new(), Vec::new());
        for (((_, projector), x), tokenizer) in self.levels.iter().zip(pixels).zip(tokenizers) {
            let (y, projector) = projector.forward(p, &x, &tokens)?;
            maps.push(y);
            levels.push(LevelSaved { x, tokenizer, projector });
        }
        Ok((maps, tokens.clone(), Saved { levels, transformers, tokens }))
    }

    /// The gradients of the pixels.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: Saved<T>,
        d_maps: &[Tensor<T>],
        mut d_tokens: Tensor<T>,
    ) -> Result<Vec<Tensor<T>>> {
        let Saved { levels, transformers, tokens } = saved;
        let (mut grads, mut rest) = (Vec::new(), Vec::new());
        for (((_, projector), level), dy) in self.levels.iter().zip(levels).zip(d_maps) {
            let LevelSaved { x, tokenizer, projector: saved } = level;
            let (dx, more) = projector.backward(p, g, &x, &tokens, saved, dy)?;
            elementwise::add(d_tokens.data_mut(), more.data());
            grads.push(dx);
            rest.push((x, tokenizer));
        }
        for (transformer, saved) in self.transformers.iter().zip(transformers).rev() {
            d_tokens = transformer.backward(p, g, saved, &d_tokens)?;
        }
        for (i, (((tokenizer, _), (x, saved)), dx)) in self.levels.iter().zip(rest).zip(&mut grads).enumerate() {
            let (more, _) = tokenizer.backward(p, g, &x, None, saved, &self.level(&d_tokens, i)?, None)?;
            elementwise::add(dx.data_mut(), more.data());
        }
        Ok(grads)
    }

    /// `[B, L, C_T]` of every level → `[B, ΣL, C_T]`.
    fn concat<T: Float>(&self, parts: &[Tensor<T>]) -> Result<Tensor<T>> {
        let (batch, len) = (parts[0].shape()[0], self.tokens * self.token_channels);
        let mut all = Tensor::scratch([batch, self.tokens * parts.len(), self.token_channels]);
        for (index, out) in all.data_mut().chunks_exact_mut(len).enumerate() {
            let (image, level) = (index / parts.len(), index % parts.len());
            out.copy_from_slice(&parts[level].data()[image * len..(image + 1) * len]);
        }
        Ok(all)
    }

    /// The tokens of one level.
    fn level<T: Float>(&self, all: &Tensor<T>, level: usize) -> Result<Tensor<T>> {
        let ([batch, _, c], len) = (all.dims("tokens")?, self.tokens * self.token_channels);
        let mut part = Tensor::scratch([batch, self.tokens, c]);
        for (image, out) in part.data_mut().chunks_exact_mut(len).enumerate() {
            let from = (image * self.levels.len() + level) * len;
            out.copy_from_slice(&all.data()[from..from + len]);
        }
        Ok(part)
    }
}

/// `block.vt_fpn`.
pub struct BlockVtFpn;

impl Operation for BlockVtFpn {
    const NAME: &'static str = "block.vt_fpn";
    const PAPER: &'static str = "2006.03677 Visual transformers";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let levels = rng.between(1, 3);
        config.set("level_channels", (0..levels).map(|_| rng.between(1, 5)).collect::<Vec<_>>()).set("token_channels", rng.between(2, 6));
        config.set("num_tokens", rng.between(1, 3)).set("out_channels", rng.between(1, 5)).set("depth", rng.between(0, 2));
        config.set("attn_dim", rng.between(1, 4)).set("ffn_dim", rng.between(1, 6)).set("proj_dim", rng.between(1, 5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let batch = draw.size("batch", 1, 2);
        for (i, c) in config.usizes("level_channels")?.into_iter().enumerate() {
            let shape = [batch, c, draw.rng.between(1, 5), draw.rng.between(1, 5)];
            draw.normal(&format!("feat.{i}"), shape);
        }
        Ok(())
    }

    fn cost(config: &Config, shapes: &Shapes) -> Result<Option<Cost>> {
        let (block, _) = Layout::build(|names| VtFpn::new(names, config))?;
        let (mut sizes, mut bytes) = (Vec::new(), 0);
        for i in 0..block.levels.len() {
            let [b, c, h, w] = shapes.dims(&format!("feat.{i}"))?;
            sizes.push([b, h, w]);
            bytes += 4 * b * c * h * w;
        }
        Ok(Some(block.cost(&sizes) + Cost { flops: 0, activation_bytes: bytes }))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (block, layout) = Layout::build(|names| VtFpn::new(names, run.config()))?;
        let p = run.params(&layout)?;
        let (mut pixels, mut maps) = (Vec::new(), Vec::new());
        for (i, &channels) in block.channels.iter().enumerate() {
            let name = format!("feat.{i}");
            let x = run.input(&name)?;
            let [b, c, h, w] = x.dims(&format!("input `{name}`"))?;
            let batch = maps.first().map_or(b, |&[batch, ..]: &[usize; 3]| batch);
            if c != channels || h * w == 0 || b != batch {
                return Err(Error::shape(format!("input `{name}`"), format!("[{batch}, {channels}, height, width]"), x.shape()));
            }
            pixels.push(channels_last(&x)?.reshape([b, h * w, c])?);
            maps.push([b, h, w]);
        }
        let (ys, tokens, saved) = block.forward(&p, pixels)?;
        run.output("tokens", &tokens);
        let mut outputs = Vec::new();
        for (i, (y, &[b, h, w])) in ys.into_iter().zip(&maps).enumerate() {
            let y = channels_first(&y.reshape([b, h, w, y.shape()[2]])?)?;
            run.output(&format!("feat.{i}"), &y);
            outputs.push(y);
        }
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let mut d_maps = Vec::new();
            for (i, y) in outputs.iter().enumerate() {
                let [b, c, h, w] = y.dims("output")?;
                d_maps.push(channels_last(&run.cotangent(&format!("feat.{i}"), y.shape())?)?.reshape(Shape::from([b, h * w, c]))?);
            }
            let d_tokens = run.cotangent("tokens", tokens.shape())?;
            let grads = block.backward(&p, &mut g, saved, &d_maps, d_tokens)?;
            for (i, (dx, &[b, h, w])) in grads.into_iter().zip(&maps).enumerate() {
                run.grad_input(&format!("feat.{i}"), &channels_first(&dx.reshape([b, h, w, block.channels[i]])?)?);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
