//! The operations of Swin: `block.swin`, `nn.patch_merging`, `model.swin`.

use super::swin::{PatchMerging, Swin, SwinBlock, clip_window, dense_cells};
use super::vit_block::{self, BlockSettings};
use crate::attention::window::{sample_settings, settings, shifted_windows};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::Groups;
use crate::nn::{Layout, normal_02};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The settings of a Swin block from a configuration.
pub fn block_settings(config: &Config) -> Result<BlockSettings> {
    Ok(BlockSettings {
        attention: settings(config)?,
        mlp_ratio: config.f64("mlp_ratio")?,
        norm_eps: config.f64("norm_eps")?,
        layer_scale: None,
        drop_path: 0.0,
        init: normal_02,
    })
}

/// `height` and `width`.
pub fn map_size(config: &Config) -> Result<[usize; 2]> {
    Ok([config.positive("height")?, config.positive("width")?])
}

/// The input `x` of a map operation, `[batch, height·width, dim]`.
pub fn map_input<T: Float>(run: &Run<T>, map: [usize; 2], dim: usize) -> Result<Tensor<T>> {
    let x = run.input("x")?;
    let [_, tokens, c] = x.dims("input `x`")?;
    if map[0].checked_mul(map[1]) == Some(tokens) && c == dim {
        Ok(x)
    } else {
        Err(Error::shape("input `x`", format!("[batch, {}·{}, {dim}]", map[0], map[1]), x.shape()))
    }
}

/// `block.swin`.
pub struct Block;

impl Operation for Block {
    const NAME: &'static str = "block.swin";
    const PAPER: &'static str = "2103.14030 Swin";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_settings(rng, &mut config);
        let (window, pad) = (rng.between(1, 4), rng.chance(0.5));
        // Without padding: a map of whole windows, or one that clips the window to its shorter side.
        let (height, width) = match (pad, rng.chance(0.3)) {
            (true, _) => (rng.between(1, 8), rng.between(1, 8)),
            (false, true) => {
                let side = rng.between(1, window);
                (side, side * rng.between(1, 3))
            }
            (false, false) => (window * rng.between(1, 3), window * rng.between(1, 3)),
        };
        config.set("height", height).set("width", width).set("window_size", window).set("shift_size", rng.below(window)).set("pad", pad);
        config.set("mlp_ratio", rng.range(1.0, 3.0)).set("norm_eps", 1e-5);
        // A norm over one channel is constant: nothing to differentiate.
        let heads = rng.between(1, 2);
        config.set("dim", heads * rng.between(2, 4)).set("num_heads", heads);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let [height, width] = map_size(config)?;
        let batch = draw.size("batch", 1, 2);
        draw.normal("x", [batch, height * width, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, n, _], (_, groups)) = (inputs.dims("x")?, Self::windows(config)?);
        vit_block::Block::cost(&block_settings(config)?, b, n, &groups).map(Some)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        map_input(run, map_size(config)?, config.usize("dim")?)?;
        let (window, groups) = Self::windows(config)?;
        run_block(run, window, &groups)
    }
}

impl Block {
    /// The window, clipped to the map, and the groups of tokens that attend to each other.
    fn windows(config: &Config) -> Result<([usize; 2], Groups)> {
        let (map, pad) = (map_size(config)?, config.bool("pad")?);
        let (window, shift) = clip_window(map, config.positive("window_size")?, config.usize("shift_size")?, pad);
        Ok((window, shifted_windows(map, window, shift, pad)?))
    }
}

/// Runs a block with windows of `window` over `groups` of `x`.
pub fn run_block<T: Float>(run: &mut Run<T>, window: [usize; 2], groups: &Groups) -> Result<()> {
    let settings = block_settings(run.config())?;
    let (block, layout) = Layout::build(|names| SwinBlock::new(names, settings, window))?;
    run.unary(&layout, |p, x| block.forward(p, x.clone(), groups), |p, g, saved, dy| block.backward(p, g, saved, groups, dy))
}

/// `nn.patch_merging`.
pub struct Merging;

impl Operation for Merging {
    const NAME: &'static str = "nn.patch_merging";
    const PAPER: &'static str = "2103.14030 Swin";

    fn sample(rng: &mut Rng) -> Config {
        let pad = rng.chance(0.5);
        let mut side = || if pad { rng.between(1, 7) } else { 2 * rng.between(1, 4) };
        let mut config = Config::default();
        config.set("height", side()).set("width", side()).set("dim", rng.between(1, 6)).set("norm_eps", 1e-5).set("pad", pad);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let [height, width] = map_size(config)?;
        let batch = draw.size("batch", 1, 3);
        draw.normal("x", [batch, height * width, config.positive("dim")?]);
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, _, c], map, pad) = (inputs.dims("x")?, map_size(config)?, config.bool("pad")?);
        Ok(Some(PatchMerging::cost(c, b, dense_cells(map, pad)?.len() / 4)))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (map, dim) = (map_size(config)?, config.positive("dim")?);
        map_input(run, map, dim)?;
        let cells = dense_cells(map, config.bool("pad")?)?;
        run_merging(run, dim, &cells)
    }
}

/// Runs patch merging over `cells` of `x`.
pub fn run_merging<T: Float>(run: &mut Run<T>, dim: usize, cells: &[u32]) -> Result<()> {
    let eps = run.config().f64("norm_eps")?;
    let (layer, layout) = Layout::build(|names| Ok(PatchMerging::new(names, dim, eps, normal_02)))?;
    run.unary(&layout, |p, x| layer.forward(p, x, cells), |p, g, saved, dy| layer.backward(p, g, saved, cells, dy))
}

/// `[B, N, C]` → `[B, C]`: the mean over tokens.
pub fn mean_tokens<T: Float>(x: &Tensor<T>) -> Result<Tensor<T>> {
    let [batch, n, c] = x.dims("tokens")?;
    let mut y = Tensor::zeros([batch, c]);
    for (out, image) in y.data_mut().chunks_exact_mut(c).zip(x.data().chunks_exact((n * c).max(1))) {
        crate::kernel::reduce::add_column_sums(out, image);
        out.iter_mut().for_each(|v| *v = *v / T::of(n));
    }
    Ok(y)
}

/// The adjoint of [`mean_tokens`] for `n` tokens.
pub fn mean_tokens_backward<T: Float>(dy: &Tensor<T>, n: usize) -> Result<Tensor<T>> {
    let [batch, c] = dy.dims("pooled tokens")?;
    Ok(Tensor::from_fn([batch, n, c], |i| dy.data()[i / (n * c) * c + i % c] / T::of(n)))
}

/// `model.swin`.
pub struct Model;

impl Operation for Model {
    const NAME: &'static str = "model.swin";
    const PAPER: &'static str = "2103.14030 Swin";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = sample_encoder(rng);
        config.set("num_classes", rng.below(4)).set("pad", rng.chance(0.5));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let [height, width] = config.pair("img_size")?;
        let batch = draw.size("batch", 1, 2);
        draw.normal("image", [batch, config.positive("in_chans")?, height, width]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (model, layout) = Layout::build(|names| Swin::new(names, run.config()))?;
        let p = run.params(&layout)?;
        let (logits, saved) = model.forward(&p, &run.input("image")?)?;
        run.output("logits", &logits);
        if run.backward() {
            let mut g = run.zero_grads(&p);
            if let Some(d_image) = model.backward(&p, &mut g, saved, &run.cotangent("logits", logits.shape())?, true)? {
                run.grad_input("image", &d_image);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}

/// A random small encoder whose map suits its windows at every stage.
pub fn sample_encoder(rng: &mut Rng) -> Config {
    let (stages, window, patch) = (rng.between(1, 2), rng.between(1, 3), rng.between(1, 2));
    let side = window * (1 << (stages - 1)) * rng.between(1, 2) * patch;
    let mut config = Config::default();
    config.set("img_size", side).set("patch_size", patch).set("in_chans", rng.between(1, 3)).set("embed_dim", 2 * rng.between(1, 2));
    config.set("depths", (0..stages).map(|_| rng.between(1, 2)).collect::<Vec<_>>());
    config.set("num_heads", (0..stages).map(|_| rng.between(1, 2)).collect::<Vec<_>>());
    config
        .set("window_size", window)
        .set("mlp_ratio", rng.range(1.0, 2.0))
        .set("qkv_bias", rng.chance(0.7))
        .set("qk_scale", serde_json::Value::Null);
    config.set("ape", rng.chance(0.5)).set("patch_norm", rng.chance(0.5)).set("norm_eps", 1e-5);
    config
}
