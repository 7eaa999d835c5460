//! `nn.bilinear_resize`, and position tables for other grids: `nn.resize_pos_embed`, `nn.hpvit_pos_embed`.

use super::maps::{channels_first, channels_last};
use super::param::Layout;
use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::kernel::maps::{Map, MapMut};
use crate::kernel::resize::{Axis, resize};
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// `[B, H, W, C]` through `rows` and `cols`.
pub fn resize_map<T: Float>(x: &Tensor<T>, rows: &Axis, cols: &Axis) -> Result<Tensor<T>> {
    let size @ [b, h, w, c] = x.dims("input of a resize")?;
    if [h, w] != [rows.inputs(), cols.inputs()] {
        return Err(Error::shape("input of a resize", [b, rows.inputs(), cols.inputs(), c], x.shape()));
    }
    let out = [b, rows.outputs(), cols.outputs(), c];
    let mut y = Tensor::scratch(crate::tensor::Shape::try_new(&out)?);
    resize(MapMut::new(y.data_mut(), out), Map::new(x.data(), size), rows, cols, false);
    Ok(y)
}

/// The largest side that a configuration may ask for.
const LARGEST: usize = 1 << 16;

fn side(config: &Config, key: &str) -> Result<usize> {
    let side = config.positive(key)?;
    if side <= LARGEST { Ok(side) } else { Err(Error::config(key, format!("expected at most {LARGEST}, found {side}"))) }
}

/// `nn.bilinear_resize`: bilinear interpolation as in PyTorch.
pub struct BilinearResize;

impl Operation for BilinearResize {
    const NAME: &'static str = "nn.bilinear_resize";
    const PAPER: &'static str = "2104.06399 CoaT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("out_height", rng.between(1, 12)).set("out_width", rng.between(1, 12)).set("align_corners", rng.chance(0.5));
        config
    }

    fn inputs(_: &Config, draw: &mut Draw) -> Result<()> {
        let batch = draw.size("batch", 1, 2);
        let shape = [batch, draw.rng.between(1, 20), draw.rng.between(1, 8), draw.rng.between(1, 8)];
        draw.normal("x", shape);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (height, width) = (side(config, "out_height")?, side(config, "out_width")?);
        let align = config.bool_or("align_corners", false)?;
        let [_, _, h, w] = run.input("x")?.dims("input `x`")?;
        if h == 0 || w == 0 {
            return Err(Error::shape("input `x`", "a map with pixels", [h, w]));
        }
        let (rows, cols) = (Axis::bilinear(h, height, align), Axis::bilinear(w, width, align));
        let ((), layout) = Layout::build(|_| Ok(()))?;
        run.unary(
            &layout,
            |_, x| Ok((channels_first(&resize_map(&channels_last(x)?, &rows, &cols)?)?, ())),
            |_, _, (), dy| channels_first(&resize_map(&channels_last(dy)?, &rows.transposed(), &cols.transposed())?),
        )
    }
}

/// A position table `[1, prefix + h w, C]` for another grid, by bicubic interpolation (a = −0.75, no anti-aliasing): the `prefix` rows are
/// kept (or dropped), the others are resized as a map. Equal grids give a copy.
pub struct PosEmbedResize {
    prefix: usize,
    keep_prefix: bool,
    rows: Axis,
    cols: Axis,
}

impl PosEmbedResize {
    /// From grid `old` to grid `new`.
    pub fn new(prefix: usize, keep_prefix: bool, old: [usize; 2], new: [usize; 2]) -> Result<Self> {
        for (key, grid) in [("old grid", old), ("new grid", new)] {
            if grid.iter().any(|side| !(1..=LARGEST).contains(side)) {
                return Err(Error::value(key, format!("expected sides of 1 to {LARGEST}, found {grid:?}")));
            }
        }
        Ok(PosEmbedResize { prefix, keep_prefix, rows: Axis::bicubic(old[0], new[0]), cols: Axis::bicubic(old[1], new[1]) })
    }

    fn apply<T: Float>(&self, x: &Tensor<T>, rows: &Axis, cols: &Axis, [prefix_in, prefix_out]: [usize; 2]) -> Result<Tensor<T>> {
        let [one, tokens, c] = x.dims("position table")?;
        let (h, w) = (rows.inputs(), cols.inputs());
        if one != 1 || prefix_in.checked_add(h * w) != Some(tokens) || c == 0 {
            return Err(Error::shape("position table", format!("[1, {prefix_in} + {h} · {w}, width]"), x.shape()));
        }
        let (front, map) = x.data().split_at(prefix_in * c);
        let out = [1, rows.outputs(), cols.outputs(), c];
        let mut y = Tensor::zeros(crate::tensor::Shape::try_new(&[1, prefix_out + out[1] * out[2], c])?);
        let (kept, resized) = y.data_mut().split_at_mut(prefix_out * c);
        if self.keep_prefix {
            kept.copy_from_slice(front);
        }
        resize(MapMut::new(resized, out), Map::new(map, [1, h, w, c]), rows, cols, false);
        Ok(y)
    }

    /// The table for the new grid.
    pub fn forward<T: Float>(&self, table: &Tensor<T>) -> Result<Tensor<T>> {
        self.apply(table, &self.rows, &self.cols, [self.prefix, if self.keep_prefix { self.prefix } else { 0 }])
    }

    /// The gradient of the old table; zero for prefix rows that were dropped.
    pub fn backward<T: Float>(&self, dy: &Tensor<T>) -> Result<Tensor<T>> {
        let prefix = if self.keep_prefix { self.prefix } else { 0 };
        self.apply(dy, &self.rows.transposed(), &self.cols.transposed(), [prefix, self.prefix])
    }
}

/// `nn.resize_pos_embed`: T2T's table with its class row.
pub struct ResizePosEmbed;

impl Operation for ResizePosEmbed {
    const NAME: &'static str = "nn.resize_pos_embed";
    const PAPER: &'static str = "2101.11986 T2T-ViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("old_grid", rng.between(1, 7)).set("new_grid", rng.between(1, 9));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let grid = side(config, "old_grid")?;
        let shape = [1, 1 + grid * grid, draw.rng.between(1, 9)];
        draw.normal("x", shape);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (old, new) = (side(run.config(), "old_grid")?, side(run.config(), "new_grid")?);
        let table = PosEmbedResize::new(1, true, [old; 2], [new; 2])?;
        let ((), layout) = Layout::build(|_| Ok(()))?;
        run.unary(&layout, |_, x| Ok((table.forward(x)?, ())), |_, _, (), dy| table.backward(dy))
    }
}

/// `nn.hpvit_pos_embed`: a plain ViT's table for a finer grid, without class tokens.
pub struct HpvitPosEmbed;

impl Operation for HpvitPosEmbed {
    const NAME: &'static str = "nn.hpvit_pos_embed";
    const PAPER: &'static str = "HPViT";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let mut two = |high: usize| vec![rng.between(1, high), rng.between(1, high)];
        config.set("grid_old", two(5)).set("grid_new", two(9)).set("prefix_tokens", rng.between(0, 2)).set("embed_dim", rng.between(1, 9));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let [h, w] = config.pair("grid_old")?;
        draw.normal("pos_embed", [1, config.usize("prefix_tokens")? + h * w, config.positive("embed_dim")?]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (old, new) = (config.pair("grid_old")?, config.pair("grid_new")?);
        let table = PosEmbedResize::new(config.usize_or("prefix_tokens", 1)?, false, old, new)?;
        let x = run.input("pos_embed")?;
        let [_, _, width] = x.dims("input `pos_embed`")?;
        if width != config.positive("embed_dim")? {
            return Err(Error::shape("input `pos_embed`", format!("[…, {}]", config.usize("embed_dim")?), x.shape()));
        }
        let y = table.forward(&x)?;
        run.output("pos_embed", &y);
        if run.backward() {
            let dx = table.backward(&run.cotangent("pos_embed", y.shape())?)?;
            run.grad_input("pos_embed", &dx);
        }
        Ok(())
    }
}
