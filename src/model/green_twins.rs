//! Twins over visible tokens (GreenMIM, arXiv 2205.13515): `nn.peg_visible`.

use crate::attention::spatial_reduction::{draw_visible, visible_input};
use crate::case::{Config, Cost, Draw, Operation, Run, Shapes};
use crate::error::Result;
use crate::kernel::neighbours;
use crate::nn::{Layout, Peg};
use crate::tensor::Float;
use crate::tensor::random::Rng;

/// `nn.peg_visible`.
pub struct PegVisible;

impl Operation for PegVisible {
    const NAME: &'static str = "nn.peg_visible";
    const PAPER: &'static str = "2205.13515 GreenMIM";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("height", rng.between(1, 7)).set("width", rng.between(1, 7)).set("dim", rng.between(1, 20));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        draw_visible(config, draw)
    }

    fn cost(_: &Config, inputs: &Shapes) -> Result<Option<Cost>> {
        let [b, n, dim] = inputs.dims("x")?;
        Ok(Some(Peg::cost(dim, b, n)))
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (_, coords, x) = visible_input(run)?;
        let near = neighbours::of_coords(&coords);
        let (layer, layout) = Layout::build(|names| Ok(Peg::new(names.at("proj.0"), x.shape()[2])))?;
        run.unary(&layout, |p, x| Ok((layer.forward(p, x, &near)?, ())), |p, g, (), dy| layer.backward(p, g, &x, &near, dy))
    }
}
