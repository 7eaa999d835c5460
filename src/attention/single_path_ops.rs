//! `attention.single_path` and `attention.single_path_window`: the layer of [`single_path`](super::single_path) on DeiT's tokens (class
//! token first) and on a batch of Swin's windows.
//!
//! Window b of a batch reads mask `b mod nW`; the windows run as groups of one image. Convolutions stay inside a window, but the
//! finished "conv3x3" takes its input for one square map, as the network calls it with the whole map.

use super::gaussian_mask_swin::window_groups;
use super::single_path::{Mode, Place, Settings, SinglePath};
use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::{Groups, Mask};
use crate::nn::Layout;
use crate::nn::spvit_gate::noise;
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

fn settings(config: &Config, window: Option<usize>) -> Result<Settings> {
    let name = config.choice("mode", &["search", "skip", "conv1x1", "conv3x3", "msa"])?;
    let mode = Mode::named(name).ok_or_else(|| Error::config("mode", format!("unknown: {name}")))?;
    let (dim, heads) = (config.positive("dim")?, config.positive("num_heads")?);
    if !dim.is_multiple_of(heads) {
        return Err(Error::config("num_heads", format!("expected a divisor of the width {dim}, found {heads}")));
    }
    let (alpha, qkv_bias) = (config.f64_or("alpha", if window.is_some() { 100.0 } else { 0.01 })?, config.bool_or("qkv_bias", true)?);
    Ok(Settings { dim, heads, mode, alpha, qkv_bias, class: window.is_none(), window, own_conv: false })
}

fn training(config: &Config) -> Result<bool> {
    config.bool_or("training", false)
}

/// Forward and backward with inputs `x`, `u`, outputs `out`, `kernel_indicators`.
fn run_layer<T: Float>(run: &mut Run<T>, settings: Settings, x: &Tensor<T>, place: &Place<T>) -> Result<()> {
    let (training, search) = (training(run.config())?, settings.mode == Mode::Search);
    let u = noise(run, "u", [3], training && search)?;
    let (layer, layout) = Layout::build(|names| SinglePath::new(names, settings))?;
    let p = run.params(&layout)?;
    let (y, mut saved) = layer.forward(&p, x, place, training, u.as_ref().map(Tensor::data))?;
    run.output("out", &y);
    if let Some(gates) = saved.gates() {
        run.output("kernel_indicators", &gates.expected());
    }
    run.after_buffers(&layout, saved.take_updates());
    if run.backward() {
        let (mut g, dy) = (run.zero_grads(&p), run.cotangent("out", y.shape())?);
        let d_expected = if search { Some(run.cotangent("kernel_indicators", [3].into())?) } else { None };
        let dx = layer.backward(&p, &mut g, x, saved, place, &dy, d_expected.as_ref().map(Tensor::data))?;
        run.grad_input("x", &dx);
        run.grad_params(&g);
    }
    Ok(())
}

fn sample_layer(rng: &mut Rng, config: &mut Config) {
    let heads = rng.between(1, 3);
    config.set("dim", heads * rng.between(1, 4)).set("num_heads", heads);
    let mode = rng.pick(&["search", "search", "skip", "conv1x1", "conv3x3", "msa"]);
    config.set("mode", mode).set("training", rng.chance(0.5)).set("qkv_bias", mode != "msa" || rng.chance(0.5));
}

/// `attention.single_path`.
pub struct SinglePathDeit;

impl Operation for SinglePathDeit {
    const NAME: &'static str = "attention.single_path";
    const PAPER: &'static str = "2111.11802 SPViT";
    const DATA: &'static [&'static str] = &["u"];

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_layer(rng, &mut config);
        config.set("alpha", rng.range(0.1, 2.0)).set("grid", vec![rng.between(1, 4), rng.between(2, 4)]);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (settings, [h, w]) = (settings(config, None)?, config.pair("grid")?);
        let batch = draw.size("batch", 1, 3);
        draw.normal("x", [batch, 1 + h * w, settings.dim]);
        if settings.mode == Mode::Search && training(config)? {
            draw.uniform("u", [3]);
        }
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, _] = inputs.dims("x")?;
        Ok(Some(SinglePath::cost(&settings(config, None)?, b * n, b * (n - 1), b * n * n, training(config)?)))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        let side = size.side()?;
        let bench = Benchmark::new(size).set("mode", "conv3x3").set("training", true).set("qkv_bias", true).set("alpha", 0.01);
        Some(bench.set("grid", vec![side, side]))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (x, settings, [h, w]) = (run.input("x")?, settings(run.config(), None)?, run.config().pair("grid")?);
        let [b, n, c] = x.dims("input `x`")?;
        if h == 0 || w == 0 || h.checked_mul(w).and_then(|hw| hw.checked_add(1)) != Some(n) || c != settings.dim {
            return Err(Error::shape("input `x`", format!("[batch, 1 + {h}·{w}, {}]", settings.dim), x.shape()));
        }
        let groups = Groups::all(n, n);
        run_layer(run, settings, &x, &Place { attend: [b, n], groups: &groups, mask: None, map: [b, h, w] })
    }
}

/// `attention.single_path_window`.
pub struct SinglePathWindow;

/// The settings, the window and nW.
fn window_settings(config: &Config) -> Result<(Settings, usize, usize)> {
    let window = config.positive("window_size")?;
    if window > 1 << 12 {
        return Err(Error::config("window_size", format!("expected at most {}, found {window}", 1 << 12)));
    }
    Ok((settings(config, Some(window))?, window, config.usize_or("num_windows", 0)?))
}

impl Operation for SinglePathWindow {
    const NAME: &'static str = "attention.single_path_window";
    const PAPER: &'static str = "2111.11802 SPViT";
    const DATA: &'static [&'static str] = &["u", "mask"];

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        sample_layer(rng, &mut config);
        config.set("alpha", rng.range(0.1, 100.0)).set("window_size", rng.between(2, 4)).set("num_windows", rng.below(4));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (settings, window, masks) = window_settings(config)?;
        let (windows, n) = (draw.size("batch", 1, 5), window * window);
        let tokens = draw.sizes.get("tokens").copied().unwrap_or(n);
        draw.normal("x", [windows, tokens, settings.dim]);
        if masks > 0 {
            let hidden: Vec<f64> = (0..masks * n * n).map(|_| if draw.rng.chance(0.3) { -100.0 } else { 0.0 }).collect();
            draw.inputs.insert("mask".into(), crate::case::Value::Float(Tensor::new([masks, n, n], &hidden)?));
        }
        if settings.mode == Mode::Search && training(config)? {
            draw.uniform("u", [3]);
        }
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let ([b, n, _], (settings, ..)) = (inputs.dims("x")?, window_settings(config)?);
        Ok(Some(SinglePath::cost(&settings, b * n, b * n, b * n * n, training(config)?)))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        const WINDOW: usize = 7;
        let side = size.side().filter(|side| side.is_multiple_of(WINDOW))?;
        let mut bench = Benchmark::new(size).set("mode", "msa").set("training", true).set("qkv_bias", true).set("alpha", 100.0);
        bench.sizes.remove("tokens");
        Some(bench.set("window_size", WINDOW).set("num_windows", 0).size("batch", (side / WINDOW).pow(2)))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (x, (settings, window, masks)) = (run.input("x")?, window_settings(run.config())?);
        let ([b, n, c], side) = (x.dims("input `x`")?, window * window);
        let mask = if masks > 0 { Some(run.input("mask")?) } else { None };
        if let Some(mask) = &mask {
            mask.expect_shape("input `mask`", [masks, side, side])?;
        }
        let attends = matches!(settings.mode, Mode::Search | Mode::Msa);
        let map = match settings.mode {
            Mode::Conv(3) => n.isqrt(),
            _ => window,
        };
        // Outside "conv3x3" only the attention cares about the shape of a window.
        let fits = if settings.mode == Mode::Conv(3) { map * map == n } else { !attends || n == side };
        if !fits || n == 0 || c != settings.dim {
            return Err(Error::shape("input `x`", format!("[windows, tokens of a square, {}]", settings.dim), x.shape()));
        }
        let map = if map * map == n { [b, map, map] } else { [b, 1, n] };
        let groups = if attends { window_groups(b, n) } else { Groups::default() };
        let mask = mask.as_ref().map(|mask| Mask { data: mask.data(), count: masks, side });
        run_layer(run, settings, &x, &Place { attend: [1, b * n], groups: &groups, mask, map })
    }
}
