//! `nn.maxpool2d`: the maximum over square windows, padding never wins.

use super::maps::{channels_first, channels_last};
use super::param::Layout;
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::{Error, Result};
use crate::kernel::maps::{Map, MapMut};
use crate::kernel::pool::{self, Window};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

fn outputs(window: Window, [h, w]: [usize; 2]) -> Result<[usize; 2]> {
    match (window.outputs(h), window.outputs(w)) {
        (Some(oh), Some(ow)) => Ok([oh, ow]),
        _ => Err(Error::shape("input of a maximum pool", format!("a map that {window:?} fits"), [h, w])),
    }
}

/// `[B, H, W, C]` → the maximum over every window.
pub fn max_pool<T: Float>(x: &Tensor<T>, window: Window) -> Result<Tensor<T>> {
    let size @ [b, h, w, c] = x.dims("input of a maximum pool")?;
    let [oh, ow] = outputs(window, [h, w])?;
    let mut y = Tensor::scratch([b, oh, ow, c]);
    pool::max(MapMut::new(y.data_mut(), [b, oh, ow, c]), Map::new(x.data(), size), window);
    Ok(y)
}

/// `dx`: each gradient goes to the first maximum of its window.
pub fn max_pool_backward<T: Float>(x: &Tensor<T>, window: Window, dy: &Tensor<T>) -> Result<Tensor<T>> {
    let size @ [b, h, w, c] = x.dims("input of a maximum pool")?;
    let [oh, ow] = outputs(window, [h, w])?;
    dy.expect_shape("gradient of a maximum pool", [b, oh, ow, c])?;
    let mut dx = Tensor::scratch(size);
    pool::max_backward(MapMut::new(dx.data_mut(), size), Map::new(x.data(), size), Map::new(dy.data(), [b, oh, ow, c]), window);
    Ok(dx)
}

/// `nn.maxpool2d`.
pub struct MaxPool2d;

impl Operation for MaxPool2d {
    const NAME: &'static str = "nn.maxpool2d";
    const PAPER: &'static str = "1512.03385 ResNet";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let kernel = rng.between(1, 4);
        config.set("kernel_size", kernel).set("stride", rng.between(1, 3)).set("padding", rng.between(0, kernel / 2));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, least) = (draw.size("batch", 1, 3), config.positive("kernel_size")?);
        let shape = [batch, draw.rng.between(1, 20), draw.rng.between(least, 8), draw.rng.between(least, 8)];
        draw.normal("x", shape);
        Ok(())
    }

    fn cost(config: &Config, shapes: &Shapes) -> Result<Option<Cost>> {
        let [b, c, h, w] = shapes.dims("x")?;
        let [oh, ow] = outputs(window(config)?, [h, w])?;
        Ok(Some(Cost { flops: 0, activation_bytes: 4 * b * c * (h * w + oh * ow) }))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let window = window(run.config())?;
        let ((), layout) = Layout::build(|_| Ok(()))?;
        run.unary(
            &layout,
            |_, x| {
                let x = channels_last(x)?;
                Ok((channels_first(&max_pool(&x, window)?)?, x))
            },
            |_, _, x, dy| channels_first(&max_pool_backward(&x, window, &channels_last(dy)?)?),
        )
    }
}

fn window(config: &Config) -> Result<Window> {
    let kernel = config.positive("kernel_size")?;
    let stride = config.usize_or("stride", kernel)?;
    let padding = config.usize_or("padding", 0)?;
    if stride == 0 {
        return Err(Error::config("stride", "expected a positive integer, found 0"));
    }
    if padding > kernel / 2 {
        return Err(Error::config("padding", format!("expected at most half of kernel_size {kernel}, found {padding}")));
    }
    Ok(Window { kernel, stride, padding })
}
