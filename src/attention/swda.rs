//! `attention.swda`: sliding-window dilated attention (DilateFormer, arXiv 2302.01791), without parameters: q, k, v `[B, C, H, W]` to
//! `[B, H, W, C]`, all heads of one dilation. The equations stand in [`kernel::dilated`](crate::kernel::dilated).

use super::dilated::{check_neighbourhood, draw_distance, draw_kernel, sample_scale};
use super::window::qk_scale;
use crate::case::{BenchSize, Benchmark, Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::attention::Operand;
use crate::kernel::dilated::{self as core, Sizes};
use crate::linalg::ColumnsMut;
use crate::nn::maps::{channels_first, channels_last};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// The three inputs.
const INPUTS: [&str; 3] = ["q", "k", "v"];

/// Width of a head, `[kernel_size, dilation]` and scale.
fn settings(config: &Config) -> Result<(usize, [usize; 2], f64)> {
    let dim = config.positive("head_dim")?;
    let (kernel, dilation) = (config.usize_or("kernel_size", 3)?, config.usize_or("dilation", 1)?);
    check_neighbourhood(kernel, dilation)?;
    Ok((dim, [kernel, dilation], qk_scale(config)?.unwrap_or_else(|| 1.0 / (dim as f64).sqrt())))
}

/// `attention.swda`.
pub struct Swda;

impl Operation for Swda {
    const NAME: &'static str = "attention.swda";
    const PAPER: &'static str = "2302.01791 DilateFormer";

    fn sample(rng: &mut Rng) -> Config {
        let kernel = draw_kernel(rng);
        let mut config = Config::default();
        // Some heads fill one to four vectors, or more.
        let wide = rng.chance(0.3);
        let head_dim = if wide { [16, 17, 32, 40, 48, 63, 64, 70][rng.below(8)] } else { rng.between(1, 5) };
        config.set("head_dim", head_dim).set("kernel_size", kernel).set("dilation", draw_distance(rng, kernel));
        sample_scale(rng, &mut config);
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, heads) = (draw.size("batch", 1, 3), draw.size("heads", 1, 3));
        let shape = [batch, heads * config.positive("head_dim")?, draw.size("height", 1, 8), draw.size("width", 1, 8)];
        INPUTS.into_iter().for_each(|name| draw.normal(name, shape));
        Ok(())
    }

    fn cost(config: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let (_, [kernel, _], _) = settings(config)?;
        let numel = inputs.dims::<4>("q")?.iter().product::<usize>();
        // Kept: q, k and v with channels last, and y.
        Ok(Some(Cost { flops: 4 * kernel * kernel * numel, activation_bytes: 4 * 4 * numel }))
    }

    fn bench(size: BenchSize) -> Option<Benchmark> {
        let side = size.side()?;
        let mut config = Config::default();
        config.set("head_dim", size.dim / size.heads).set("kernel_size", 3).set("dilation", 1);
        let benchmark = Benchmark { config, ..Benchmark::default() };
        Some(benchmark.size("batch", 1).size("heads", size.heads).size("height", side).size("width", side))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (dim, [kernel, dilation], scale) = settings(run.config())?;
        let given = [run.input("q")?, run.input("k")?, run.input("v")?];
        let shape @ [batch, c, height, width] = given[0].dims("input `q`")?;
        if c == 0 || !c.is_multiple_of(dim) {
            return Err(Error::shape("input `q`", format!("[batch, a multiple of {dim}, height, width]"), given[0].shape()));
        }
        for (name, x) in INPUTS.iter().zip(&given) {
            x.expect_shape(&format!("input `{name}`"), shape)?;
        }
        let [q, k, v] = [channels_last(&given[0])?, channels_last(&given[1])?, channels_last(&given[2])?];
        drop(given);
        let operand = |x| Operand { data: Tensor::data(x), stride: c, offset: 0 };
        let sizes = Sizes { batch, map: [height, width], heads: c / dim, dim, kernel, dilations: &[dilation], scale };
        let mut y = Tensor::scratch([batch, height, width, c]);
        core::forward(y.data_mut(), operand(&q), operand(&k), operand(&v), sizes);
        run.output("y", &y);
        if run.backward() {
            let dy = run.cotangent("y", y.shape())?;
            let mut grads = [0; 3].map(|_| Tensor::scratch(y.shape()));
            let columns = grads.each_mut().map(|grad| ColumnsMut::new(grad.data_mut(), c));
            core::backward(columns, dy.data(), operand(&q), operand(&k), operand(&v), sizes);
            for (name, grad) in INPUTS.iter().zip(&grads) {
                run.grad_input(name, &channels_first(grad)?);
            }
        }
        Ok(())
    }
}
