//! The operations of Visual Transformers' blocks and tokenizers.

use super::{Formulation, Settings, Tokenizer, VisualTokens, Widths, pixels};
use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::maps::transpose;
use crate::nn::Layout;
use crate::nn::maps::{channels_first, channels_last};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Shape, Tensor};

const PAPER: &str = "2006.03677 Visual transformers";

fn widths(config: &Config) -> Result<Widths> {
    Ok(Widths {
        channels: config.positive("channels")?,
        token_channels: config.positive("token_channels")?,
        tokens: config.positive("num_tokens")?,
    })
}

/// A random formulation and the widths that suit it. `block`: with the keys of transformer and projector.
pub fn sample_formulation(rng: &mut Rng, config: &mut Config, recurrent: bool, block: bool) {
    if rng.chance(0.5) {
        let (value, channels) = (rng.chance(0.7), rng.between(1, 6));
        let token_channels = if value { rng.between(2, 7) } else { channels.max(2) };
        config.set("formulation", "equations").set("channels", if value { channels } else { token_channels });
        config.set("token_channels", token_channels).set("num_tokens", rng.between(1, 5));
        config.set("value_proj", value).set("scaled", rng.chance(0.5));
        if block {
            config.set("attn_dim", rng.between(1, 5)).set("ffn_dim", rng.between(1, 6)).set("proj_dim", rng.between(1, 6));
        }
    } else {
        let (heads, groups) = (rng.between(1, 2), rng.between(1, 2));
        let (down, kqv) = (rng.below(3), rng.between(1, 2));
        config
            .set("formulation", "multihead")
            .set("channels", heads * groups * rng.between(1, 2))
            .set("heads", heads)
            .set("groups", groups);
        config.set("token_channels", if block { 2 * heads * kqv * rng.between(1, 2) } else { rng.between(1, 6) });
        config.set("num_tokens", rng.between(if recurrent { 2 } else { 1 }, 5));
        config.set("pos_size", if rng.chance(0.3) { 0 } else { (1 << down) * rng.between(1, 3) }).set("pos_downsample", down);
        if block {
            config.set("kqv_groups", kqv);
        }
    }
}

fn draw_inputs(config: &Config, draw: &mut Draw, recurrent: bool) -> Result<()> {
    let Widths { channels, token_channels, tokens } = widths(config)?;
    let (batch, height, width) = (draw.size("batch", 1, 2), draw.size("height", 1, 6), draw.size("width", 1, 6));
    draw.normal("x", [batch, channels, height, width]);
    if recurrent {
        draw.normal("tokens", [batch, tokens, token_channels]);
    }
    Ok(())
}

/// The input `tokens` of the right shape.
fn previous<T: Float>(run: &Run<T>, batch: usize, widths: Widths, recurrent: bool) -> Result<Option<Tensor<T>>> {
    if !recurrent {
        return Ok(None);
    }
    let tokens = run.input("tokens")?;
    tokens.expect_shape("input `tokens`", Shape::try_new(&[batch, widths.tokens, widths.token_channels])?)?;
    Ok(Some(tokens))
}

/// `[…, L, HW]` ↔ `[…, HW, L]`.
fn swapped<T: Float>(x: &Tensor<T>) -> Result<Tensor<T>> {
    let shape = x.shape();
    let (rows, cols) = (shape[shape.len() - 2], shape[shape.len() - 1]);
    let mut dims = shape.to_vec();
    let rank = dims.len();
    dims.swap(rank - 2, rank - 1);
    let mut y = Tensor::scratch(Shape::try_new(&dims)?);
    transpose(y.data_mut(), x.data(), shape[..rank - 2].iter().product(), rows, cols);
    Ok(y)
}

fn tokenizer_cost(config: &Config, shapes: &Shapes, recurrent: bool) -> Result<Option<Cost>> {
    let [b, c, h, w] = shapes.dims("x")?;
    let widths = widths(config)?;
    let formulation = Formulation::from_config(config, widths.token_channels)?;
    let (tokenizer, _) = Layout::build(|names| Tokenizer::new(names, widths, recurrent, formulation))?;
    let mut cost = tokenizer.cost([b, h, w])?;
    // The map in its own layout, and the attention maps as they are published.
    let maps = match (formulation, recurrent) {
        (Formulation::Multihead(heads), true) => heads.heads * (widths.tokens / 2),
        _ => widths.tokens,
    };
    cost.activation_bytes += 4 * b * h * w * (c + maps);
    Ok(Some(cost))
}

fn run_tokenizer<T: Float>(run: &mut Run<T>, recurrent: bool) -> Result<()> {
    let config = run.config();
    let widths = widths(config)?;
    let formulation = Formulation::from_config(config, widths.token_channels)?;
    let (tokenizer, layout) = Layout::build(|names| Tokenizer::new(names, widths, recurrent, formulation))?;
    let p = run.params(&layout)?;
    let (x, map) = pixels(&channels_last(&run.input("x")?)?, widths.channels)?;
    let previous = previous(run, x.shape()[0], widths, recurrent)?;
    let (tokens, saved) = tokenizer.forward(&p, &x, map, previous.as_ref())?;
    let attn = swapped(saved.attn())?;
    run.output("tokens", &tokens);
    run.output("attn", &attn);
    if run.backward() {
        let mut g = run.zero_grads(&p);
        let d_tokens = run.cotangent("tokens", tokens.shape())?;
        let d_attn = swapped(&run.cotangent("attn", attn.shape())?)?;
        let (dx, d_previous) = tokenizer.backward(&p, &mut g, &x, map, previous.as_ref(), saved, &d_tokens, Some(&d_attn))?;
        let [b, _, c] = x.dims("map")?;
        run.grad_input("x", &channels_first(&dx.reshape([b, map[0], map[1], c])?)?);
        if let Some(d) = d_previous {
            run.grad_input("tokens", &d);
        }
        run.grad_params(&g);
    }
    Ok(())
}

macro_rules! tokenizer {
    ($(#[$doc:meta])* $name:ident, $text:literal, $recurrent:literal) => {
        $(#[$doc])*
        pub struct $name;

        impl Operation for $name {
            const NAME: &'static str = $text;
            const PAPER: &'static str = PAPER;

            fn sample(rng: &mut Rng) -> Config {
                let mut config = Config::default();
                sample_formulation(rng, &mut config, $recurrent, false);
                config
            }

            fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
                draw_inputs(config, draw, $recurrent)
            }

            fn cost(config: &Config, shapes: &Shapes) -> Result<Option<Cost>> {
                tokenizer_cost(config, shapes, $recurrent)
            }

            fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
                run_tokenizer(run, $recurrent)
            }
        }
    };
}

tokenizer!(
    /// `tokenizer.filter`.
    TokenizerFilter,
    "tokenizer.filter",
    false
);
tokenizer!(
    /// `tokenizer.recurrent`.
    TokenizerRecurrent,
    "tokenizer.recurrent",
    true
);

/// `attention.visual_tokens`.
pub struct VisualTokensOp;

fn settings(config: &Config) -> Result<Settings> {
    let widths = widths(config)?;
    let outputs = if config.get("out_channels").is_none() { widths.channels } else { config.positive("out_channels")? };
    Ok(Settings {
        widths,
        recurrent: match config.str("tokenizer")? {
            "filter" => false,
            "recurrent" => true,
            other => return Err(Error::config("tokenizer", format!("expected \"filter\" or \"recurrent\", found \"{other}\""))),
        },
        projector: config.bool_or("projector", true)?.then_some(outputs),
        formulation: Formulation::from_config(config, widths.token_channels)?,
    })
}

impl Operation for VisualTokensOp {
    const NAME: &'static str = "attention.visual_tokens";
    const PAPER: &'static str = PAPER;

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let recurrent = rng.chance(0.5);
        sample_formulation(rng, &mut config, recurrent, true);
        config.set("tokenizer", if recurrent { "recurrent" } else { "filter" }).set("projector", rng.chance(0.8));
        let channels = config.usize("channels").unwrap_or(1);
        // Without W_V the map must be as wide as the tokens; heads and groups must divide the width.
        let lateral = config.bool_or("value_proj", true).unwrap_or(true) && rng.chance(0.5);
        let step = config.usize_or("heads", 1).unwrap_or(1) * config.usize_or("groups", 1).unwrap_or(1);
        config.set("out_channels", if lateral { step * rng.between(1, 5) } else { channels });
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_inputs(config, draw, config.str("tokenizer")? == "recurrent")
    }

    fn cost(config: &Config, shapes: &Shapes) -> Result<Option<Cost>> {
        let [b, c, h, w] = shapes.dims("x")?;
        let settings = settings(config)?;
        let (block, _) = Layout::build(|names| VisualTokens::new(names, settings))?;
        // The map in its own layout.
        Ok(Some(block.cost([b, h, w])? + Cost { flops: 0, activation_bytes: 4 * b * h * w * c }))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        let side = size.side()?;
        let all = ["channels", "token_channels", "out_channels", "ffn_dim", "proj_dim"];
        let bench = all.iter().fold(Benchmark::new(size), |bench, key| bench.set(key, size.dim));
        let bench = bench.set("formulation", "equations").set("tokenizer", "filter").set("projector", true).set("value_proj", true);
        Some(bench.set("num_tokens", 16).set("attn_dim", size.dim / 2).set("scaled", false).size("height", side).size("width", side))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let settings = settings(run.config())?;
        let (block, layout) = Layout::build(|names| VisualTokens::new(names, settings))?;
        let p = run.params(&layout)?;
        let x = channels_last(&run.input("x")?)?;
        let previous = previous(run, x.shape()[0], settings.widths, settings.recurrent)?;
        let (tokens, y, saved) = block.forward(&p, &x, previous)?;
        drop(x);
        run.output("tokens", &tokens);
        let y = y.map(|y| channels_first(&y)).transpose()?;
        if let Some(y) = &y {
            run.output("x", y);
        }
        if run.backward() {
            let mut g = run.zero_grads(&p);
            let d_tokens = run.cotangent("tokens", tokens.shape())?;
            let dy = y.map(|y| channels_last(&run.cotangent("x", y.shape())?)).transpose()?;
            let (dx, d_previous) = block.backward(&p, &mut g, saved, d_tokens, dy.as_ref())?;
            run.grad_input("x", &channels_first(&dx)?);
            if let Some(d) = d_previous {
                run.grad_input("tokens", &d);
            }
            run.grad_params(&g);
        }
        Ok(())
    }
}
