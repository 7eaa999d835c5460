//! `nn.hpvit_load`: the parameters of an HPViT (arXiv 2211.01785) from those of a plain ViT: patch embedding and blocks as they are, the
//! table of positions for the finer grid, new poolings, the head if it fits.

use super::hpvit::{Hpvit, Settings, sample_settings};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::nn::Layout;
use crate::nn::resize::PosEmbedResize;
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// What becomes of a parameter of HPViT.
enum Source {
    /// The plain network's, unchanged.
    Copied,
    /// The plain network's table for another grid.
    Resized,
    /// The plain network's, if it is there; else this value, or none at all.
    IfThere(Option<f64>),
    /// A new layer.
    New(f64),
}

fn source(name: &str) -> Source {
    match name {
        "pos_embed" => Source::Resized,
        "fc_norm.weight" => Source::IfThere(Some(1.0)),
        "fc_norm.bias" => Source::IfThere(Some(0.0)),
        _ if name.starts_with("head.") => Source::IfThere(None),
        _ if name.starts_with("pools.") => Source::New(if name.ends_with("weight") { 0.25 } else { 0.0 }),
        _ => Source::Copied,
    }
}

/// The parameters of HPViT, by name, from those of a plain ViT. `get` returns a tensor of the checkpoint, `names` are all that it has.
/// Class and mask tokens, decoder and final norm are left out; `head` is only taken over if it fits.
pub fn load<T: Float>(settings: &Settings, names: &[&str], get: impl Fn(&str) -> Result<Tensor<T>>) -> Result<Vec<(String, Tensor<T>)>> {
    let (_, layout) = Layout::build(|names| Hpvit::new(names, settings.clone()))?;
    let known = |name: &str| layout.params().iter().any(|entry| entry.name == name);
    if let Some(extra) = names.iter().find(|name| name.starts_with("blocks.") && !known(name)) {
        let message = format!("expected the blocks of depths {:?} and no others", settings.depths);
        return Err(Error::value(format!("input `{extra}`"), message));
    }
    let fits = |name: &str, shape| names.contains(&name) && get(name).is_ok_and(|t| t.shape() == shape);
    let head = (layout.params().iter()).filter(|e| e.name.starts_with("head.")).all(|e| fits(&e.name, e.param.shape()));
    let mut out = Vec::new();
    for entry in layout.params() {
        let (name, shape) = (entry.name.as_str(), entry.param.shape());
        let there = names.contains(&name);
        let tensor = match source(name) {
            Source::New(value) => Tensor::from_fn(shape, |_| T::from_f64(value)),
            Source::IfThere(None) if !head => continue,
            Source::IfThere(Some(value)) if !there => Tensor::from_fn(shape, |_| T::from_f64(value)),
            Source::Resized => {
                let table = get(name)?;
                let [_, tokens, width] = table.dims("input `pos_embed`")?;
                let side = tokens.saturating_sub(1).isqrt();
                if side == 0 || side * side + 1 != tokens || width != settings.embed_dim {
                    let expected = format!("[1, 1 + a square number, {}]", settings.embed_dim);
                    return Err(Error::shape("input `pos_embed`", expected, table.shape()));
                }
                PosEmbedResize::new(1, false, [side; 2], settings.grid())?.forward(&table)?
            }
            Source::Copied | Source::IfThere(_) => {
                let tensor = get(name)?;
                tensor.expect_shape(&format!("input `{name}`"), shape)?;
                tensor
            }
        };
        out.push((entry.name.clone(), tensor));
    }
    Ok(out)
}

/// `nn.hpvit_load`.
pub struct HpvitLoad;

impl Operation for HpvitLoad {
    const NAME: &'static str = "nn.hpvit_load";
    const PAPER: &'static str = "2211.01785 HPViT";
    // A rule for names and shapes, not a layer: it has no gradients.

    fn sample(rng: &mut Rng) -> Config {
        // A tensor that is needed comes first: those that are left out may have any shape.
        sample_settings(rng, 1)
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let settings = Settings::from_config(config)?;
        let (_, layout) = Layout::build(|names| Hpvit::new(names, settings))?;
        let dim = config.positive("embed_dim")?;
        let [norm, classes] = [draw.rng.chance(0.5), draw.rng.chance(0.5)];
        for entry in layout.params() {
            match source(&entry.name) {
                Source::Resized => {
                    let side = draw.rng.between(1, 4);
                    draw.normal("pos_embed", [1, 1 + side * side, dim]);
                }
                Source::IfThere(Some(_)) if !norm => {}
                Source::IfThere(None) if !classes => {}
                Source::New(_) => {}
                _ => draw.normal(&entry.name, entry.param.shape()),
            }
        }
        for name in ["cls_token", "mask_token"] {
            draw.normal(name, [1, 1, dim]);
        }
        draw.normal("norm.weight", [dim]);
        draw.normal("decoder_pred.bias", [dim + 1]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = Settings::from_config(run.config())?;
        let names = run.input_names();
        for (name, tensor) in load(&settings, &names, |name| run.input(name))? {
            run.output(&name, &tensor);
        }
        Ok(())
    }
}
