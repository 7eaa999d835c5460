//! `model.um_swin`: the Swin that UM-MAE (arXiv 2205.10063) pre-trains, as a classifier: patches with their norm, the blocks of [`Encoder`]
//! over a regular map, mean over tokens, `fc_norm`, `head`.

use super::network::{Built, Classifier};
use super::pre_norm::{MeanHead, MeanSaved};
use super::um_swin::{Encoder, EncoderSaved, EncoderSettings, Plans, Positions};
use super::vit_block::hidden_width;
use super::weights::{self, Rules};
use super::zoo::{self, Eval, Family, Variant};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::Result;
use crate::nn::{Layout, Names, Params, PatchEmbed, patch_embed, xavier};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The classifier.
struct UmSwin {
    embed: PatchEmbed,
    encoder: Encoder,
    plans: Plans,
    head: MeanHead,
}

struct UmSwinSaved<T: Float> {
    embed: patch_embed::Saved<T>,
    blocks: EncoderSaved<T>,
    head: MeanSaved<T>,
}

impl UmSwin {
    fn new(names: &mut Names, config: &Config) -> Result<Self> {
        let (settings, patch, chans) =
            (EncoderSettings::from_config(config)?, config.positive("patch_size")?, config.positive("in_chans")?);
        let (image, dim) = ([config.positive("img_size")?; 2], settings.embed_dim);
        let init = xavier(chans * patch * patch, dim);
        let embed = PatchEmbed::new(names.at("patch_embed"), image, patch, chans, dim, Some(1e-6), init)?;
        let [side, _] = embed.grid();
        let encoder = Encoder::new(names, &settings)?;
        let head = MeanHead::new(names, settings.width(), config.usize("num_classes")?, 1e-6, xavier);
        Ok(UmSwin { embed, plans: encoder.plans(Positions::regular(side))?, encoder, head })
    }

    fn forward<T: Float>(&self, p: &Params<T>, image: &Tensor<T>) -> Result<(Tensor<T>, UmSwinSaved<T>)> {
        let (x, embed) = self.embed.forward(p, image, None)?;
        let (x, blocks) = self.encoder.forward(p, x, &self.plans)?;
        let (y, head) = self.head.forward(p, &x)?;
        Ok((y, UmSwinSaved { embed, blocks, head }))
    }

    /// What the patch embedding saved, and the gradient of its output.
    fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        saved: UmSwinSaved<T>,
        dy: &Tensor<T>,
    ) -> Result<(patch_embed::Saved<T>, Tensor<T>)> {
        let UmSwinSaved { embed, blocks, head } = saved;
        let d = self.head.backward(p, g, head, dy)?;
        Ok((embed, self.encoder.backward(p, g, blocks, &self.plans, &d)?))
    }
}

impl Classifier for UmSwin {
    type Saved = UmSwinSaved<f32>;

    fn forward(&self, p: &Params<f32>, images: &Tensor<f32>) -> Result<(Vec<Tensor<f32>>, Self::Saved)> {
        let (logits, saved) = self.forward(p, images)?;
        Ok((vec![logits], saved))
    }

    fn backward(&self, p: &Params<f32>, g: &mut Params<f32>, saved: Self::Saved, d: &[Tensor<f32>]) -> Result<()> {
        let (embed, d) = self.backward(p, g, saved, &d[0])?;
        self.embed.backward_params(p, g, &embed, &d).map(drop)
    }
}

/// Multiply-adds for one image: convolutions, linear maps, attention's two products, and the position MLP for every pair of tokens in a
/// window (karat evaluates it once per offset).
fn macs(config: &Config, size: usize) -> Result<f64> {
    let (of, patch) = (EncoderSettings::from_config(config)?, config.positive("patch_size")?);
    let mut side = size / patch;
    let mut macs = side * side * of.embed_dim * config.positive("in_chans")? * patch * patch;
    for (i, depth) in of.depths.iter().enumerate() {
        let c = of.embed_dim << i;
        if i > 0 {
            side /= 2;
            macs += side * side * 4 * (c / 2) * c;
        }
        let (n, window) = (side * side, side.min(of.window_size));
        let positions = window * window * of.posmlp_dim * (2 + of.num_heads[i]);
        macs += depth * n * (c * (4 * c + 2 * hidden_width(c, of.mlp_ratio)? + 2 * window * window) + positions);
    }
    Ok((macs + of.width() * config.usize("num_classes")?) as f64)
}

/// The networks that UM-MAE fine-tunes.
pub static FAMILY: Family = Family {
    op: "model.um_swin",
    common: r#"{"patch_size": 4, "in_chans": 3, "mlp_ratio": 4.0, "window_size": 16, "posmlp_dim": 32}"#,
    build: |config| Built::new(|names| UmSwin::new(names, config)),
    at_size: zoo::img_size,
    macs,
    // Positions are computed: weights fit any size.
    rules: Rules { key: weights::keep, resize: weights::fixed, heads: &["head"] },
    variants: &[
        Variant {
            name: "um_swin_tiny_256",
            also: &[],
            config: r#"{"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}"#,
            eval: Eval::IMAGENET.at(256).crop(1.0),
            params: Some(28_268_050),
            gmacs: Some(7.25),
        },
        Variant {
            name: "um_swin_large_256",
            also: &[],
            config: r#"{"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "posmlp_dim": 64}"#,
            eval: Eval::IMAGENET.at(256).crop(1.0),
            params: Some(196_473_052),
            gmacs: Some(51.0),
        },
        Variant {
            name: "um_swin_micro",
            also: &[],
            config: r#"{"patch_size": 2, "embed_dim": 48, "depths": [2, 2, 2], "num_heads": [3, 6, 12], "window_size": 4}"#,
            eval: Eval::SMALL,
            params: None,
            gmacs: None,
        },
    ],
};

/// `model.um_swin`.
pub struct ModelUmSwin;

impl Operation for ModelUmSwin {
    const NAME: &'static str = "model.um_swin";
    const PAPER: &'static str = "2205.10063 UM-MAE";

    fn sample(rng: &mut Rng) -> Config {
        let (stages, window, patch) = (rng.between(1, 2), rng.between(1, 3), rng.between(1, 2));
        let mut config = Config::default();
        config.set("img_size", window * rng.between(1, 2) * (1 << (stages - 1)) * patch).set("patch_size", patch);
        config.set("in_chans", rng.between(1, 3)).set("num_classes", rng.below(4)).set("embed_dim", 2 * rng.between(1, 2));
        config.set("depths", (0..stages).map(|_| rng.between(1, 2)).collect::<Vec<_>>());
        config.set("num_heads", (0..stages).map(|_| rng.between(1, 2)).collect::<Vec<_>>());
        config.set("mlp_ratio", rng.range(1.0, 2.0)).set("window_size", window).set("posmlp_dim", rng.between(1, 4));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, side) = (draw.size("batch", 1, 2), config.positive("img_size")?);
        draw.normal("x", [batch, config.positive("in_chans")?, side, side]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (config, image) = (run.config(), run.input("x")?);
        let [batch, _, _, _] = image.dims("input `x`")?;
        let side = config.positive("img_size")?;
        image.expect_shape("input `x`", [batch, config.positive("in_chans")?, side, side])?;
        let (model, layout) = Layout::build(|names| UmSwin::new(names, config))?;
        run.unary(
            &layout,
            |p, x| model.forward(p, x),
            |p, g, saved, dy| {
                let (embed, d) = model.backward(p, g, saved, dy)?;
                model.embed.backward(p, g, &embed, &d, None)
            },
        )
    }
}
