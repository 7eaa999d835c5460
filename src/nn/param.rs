//! Parameters live flat: one buffer of values per model, gradients and optimizer moments in buffers of the same layout.
//!
//! A layer holds [`Param`] handles, registered under the published name while the model is built.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use super::pass::{Pass, Watch};
use crate::error::{Error, Result};
use crate::linalg::Packed;
use crate::simd::{self, Isa};
use crate::tensor::random::{Purpose, Rng};
use crate::tensor::{Buffer, Float, Shape, Tensor};

/// How a parameter starts out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All the same.
    Constant(f64),
    /// Normal with this standard deviation (what the field writes as `trunc_normal_(std=0.02)` truncates at ±2, that is, never).
    Normal(f64),
    /// Normal around another mean than 0.
    NormalAround {
        /// The mean.
        mean: f64,
        /// The standard deviation.
        std: f64,
    },
    /// Uniform in plus or minus this.
    Uniform(f64),
    /// Uniform in `±√(6 / (fan_in + fan_out))`.
    XavierUniform {
        /// Inputs of the linear map.
        fan_in: usize,
        /// Outputs of the linear map.
        fan_out: usize,
    },
    /// Uniform in `±1/√fan_in`: PyTorch's default for linear and convolution weights and their biases.
    FanIn(usize),
    /// A random matrix with orthonormal rows, times `√rows`; if it has more rows than columns, with orthonormal columns.
    Orthogonal {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
    },
    /// The table of [`sinusoid_at`](super::positions::sinusoid_at), rounded to f32 as published.
    Sinusoid {
        /// Width of a row.
        dim: usize,
    },
    /// The sine-cosine table of a square grid, see [`sincos2d`](Init::sincos2d).
    SinCos2d {
        /// Width of a row.
        dim: usize,
        /// Rows and columns of the grid.
        grid: usize,
        /// Rows of zeros in front.
        prefix: usize,
    },
}

impl Init {
    /// All zero.
    pub const ZEROS: Init = Init::Constant(0.0);
    /// All one.
    pub const ONES: Init = Init::Constant(1.0);
    /// The usual initialisation of transformer weights.
    pub const NORMAL_02: Init = Init::Normal(0.02);

    /// The fixed table of [`sincos2d`](super::positions::sincos2d) after `prefix` rows of zeros; an error unless 4 divides `dim`.
    pub fn sincos2d(dim: usize, grid: usize, prefix: usize) -> Result<Init> {
        super::positions::check_dim(dim)?;
        Ok(Init::SinCos2d { dim, grid, prefix })
    }
}

/// A handle on one parameter (or buffer): where it lies in the flat store, and its shape.
#[derive(Clone, Copy, Debug)]
pub struct Param {
    offset: usize,
    shape: Shape,
}

impl Param {
    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }
    /// The number of elements.
    pub fn numel(&self) -> usize {
        self.shape.numel()
    }
    /// The position of the first element in the flat store.
    pub fn offset(&self) -> usize {
        self.offset
    }
}

/// One entry of a [`Layout`].
#[derive(Clone, Debug)]
pub struct Entry {
    /// The published name.
    pub name: String,
    /// Where it lies.
    pub param: Param,
    /// How it starts out.
    pub init: Init,
}

/// Names, shapes and places of all parameters and buffers of a model.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    params: Vec<Entry>,
    buffers: Vec<Entry>,
    params_len: usize,
    buffers_len: usize,
    streams: u64,
}

/// Every parameter starts on a cache line.
const ALIGN: usize = 16;

impl Layout {
    /// Builds a model: `build` registers its parameters and returns it.
    pub fn build<M>(build: impl FnOnce(&mut Names) -> Result<M>) -> Result<(M, Arc<Layout>)> {
        let mut layout = Layout::default();
        let model = build(&mut Names { layout: &mut layout, prefix: String::new() })?;
        Ok((model, Arc::new(layout)))
    }

    /// The trainable parameters, in order of registration.
    pub fn params(&self) -> &[Entry] {
        &self.params
    }

    /// The tensors that belong to the state but are not trained: running statistics, fixed tables.
    pub fn buffers(&self) -> &[Entry] {
        &self.buffers
    }

    /// The same with Xavier-uniform matrices in place of normal ones of deviation 0.02.
    pub fn with_xavier(&self) -> Layout {
        let mut layout = self.clone();
        for entry in &mut layout.params {
            if let (Init::NORMAL_02, &[fan_out, fan_in], true) = (entry.init, &*entry.param.shape, entry.name.ends_with(".weight")) {
                entry.init = Init::XavierUniform { fan_in, fan_out };
            }
        }
        layout
    }

    /// The number of trainable parameters.
    pub fn numel(&self) -> usize {
        self.params.iter().map(|e| e.param.numel()).sum()
    }
}

/// A [`Layout`] under construction, seen from inside one module: names are relative to its prefix.
pub struct Names<'a> {
    layout: &'a mut Layout,
    prefix: String,
}

impl Names<'_> {
    /// The sub-module `name`.
    pub fn at(&mut self, name: impl AsRef<str>) -> Names<'_> {
        Names { prefix: self.full(name.as_ref()) + ".", layout: self.layout }
    }

    /// This module itself, for a layer that takes its names by value.
    pub fn here(&mut self) -> Names<'_> {
        Names { layout: self.layout, prefix: self.prefix.clone() }
    }

    /// Registers a trainable parameter.
    pub fn param(&mut self, name: &str, shape: impl Into<Shape>, init: Init) -> Param {
        let (name, shape) = (self.full(name), shape.into());
        register(&mut self.layout.params, &mut self.layout.params_len, name, shape, init)
    }

    /// Registers a tensor that belongs to the state but is not trained.
    pub fn buffer(&mut self, name: &str, shape: impl Into<Shape>, init: Init) -> Param {
        let (name, shape) = (self.full(name), shape.into());
        register(&mut self.layout.buffers, &mut self.layout.buffers_len, name, shape, init)
    }

    /// A number that no other layer of this model gets: what tells its random numbers apart from theirs.
    pub fn stream(&mut self) -> u64 {
        self.layout.streams += 1;
        self.layout.streams
    }

    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

fn register(entries: &mut Vec<Entry>, len: &mut usize, name: String, shape: Shape, init: Init) -> Param {
    debug_assert!(entries.iter().all(|e| e.name != name), "parameter {name} registered twice");
    let param = Param { offset: *len, shape };
    *len += shape.numel().next_multiple_of(ALIGN);
    entries.push(Entry { name, param, init });
    param
}

/// Weights packed by their offset and the back end, see [`Params::packing`].
type PackedWeights<T> = Arc<RwLock<BTreeMap<(usize, Isa), Arc<Packed<T>>>>>;

/// The values of all parameters and buffers of a model; also the type of its gradients (whose buffers stay unused).
///
/// Cloning shares the memory; writing to shared parameters copies them first.
#[derive(Clone)]
pub struct Params<T: Float> {
    layout: Arc<Layout>,
    values: Arc<Buffer<T>>,
    buffers: Arc<Buffer<T>>,
    pass: Pass,
    watch: Option<Watch<T>>,
    packed: Option<PackedWeights<T>>,
}

impl<T: Float> Params<T> {
    /// All zero: where gradients and moments start.
    pub fn zeros(layout: &Arc<Layout>) -> Self {
        let (values, buffers) = (Arc::new(Buffer::zeros(layout.params_len)), Arc::new(Buffer::zeros(layout.buffers_len)));
        Params { layout: Arc::clone(layout), values, buffers, pass: Pass::Plain, watch: None, packed: None }
    }

    /// Initialised as the layers ask, from `seed`; a parameter's numbers depend on its place in the layout alone.
    pub fn init(layout: &Arc<Layout>, seed: u64) -> Self {
        let mut params = Self::zeros(layout);
        for (index, entry) in layout.params.iter().enumerate() {
            let mut rng = Rng::new(seed, Purpose::Init, 0, index as u64);
            fill(params.get_mut(entry.param), entry.init, &mut rng);
        }
        for (index, entry) in layout.buffers.iter().enumerate() {
            let mut rng = Rng::new(seed, Purpose::Init, 1, index as u64);
            fill(params.buffer_mut(entry.param), entry.init, &mut rng);
        }
        params
    }

    /// The same values under a layout of the same sizes: one built anew.
    pub(crate) fn under(&self, layout: &Arc<Layout>) -> Self {
        debug_assert!(self.values.len() == layout.params_len && self.buffers.len() == layout.buffers_len);
        Params { layout: Arc::clone(layout), ..self.clone() }
    }

    /// The same parameters for a network that is run as `pass`.
    pub fn run_as(&self, pass: Pass) -> Self {
        Params { pass, ..self.clone() }
    }

    /// How the network is being run.
    pub fn pass(&self) -> Pass {
        self.pass
    }

    /// Whether this is a training step.
    pub fn training(&self) -> bool {
        matches!(self.pass, Pass::Train { .. })
    }

    /// The same parameters for a network whose stages `watch` wants to see.
    pub fn watched(&self, watch: &Watch<T>) -> Self {
        Params { watch: Some(watch.clone()), ..self.clone() }
    }

    /// Whether somebody wants to see the stages.
    pub fn is_watched(&self) -> bool {
        self.watch.is_some()
    }

    /// Shows `x` to whoever watches; a copy is made only then.
    pub fn show(&self, name: impl AsRef<str>, x: &Tensor<T>) {
        if let Some(watch) = &self.watch {
            watch.see(name.as_ref().to_string(), x);
        }
    }

    /// The layout.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The same parameters for a network that only infers, many times: weights are packed the first time that a product reads them, and
    /// kept so beside the parameters.
    pub fn packing(&self) -> Self {
        Params { packed: Some(PackedWeights::default()), ..self.clone() }
    }

    /// What `pack` makes of one parameter, kept if these parameters are [`packing`](Self::packing). It may depend on other parameters, too,
    /// but not on anything else, and is the same in every call.
    pub(super) fn packed(&self, param: Param, pack: impl FnOnce() -> Packed<T>) -> Option<Arc<Packed<T>>> {
        let kept = self.packed.as_ref()?;
        let key = (param.offset, simd::isa());
        if let Some(found) = kept.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Some(Arc::clone(found));
        }
        // Two threads may pack the same weights; both get the same numbers.
        let packed = Arc::new(pack());
        kept.write().unwrap_or_else(PoisonError::into_inner).insert(key, Arc::clone(&packed));
        Some(packed)
    }

    /// The values of one parameter.
    pub fn get(&self, param: Param) -> &[T] {
        &self.values[param.offset..param.offset + param.numel()]
    }

    /// The values of one parameter, to be changed.
    pub fn get_mut(&mut self, param: Param) -> &mut [T] {
        &mut self.flat_mut()[param.offset..param.offset + param.numel()]
    }

    /// The values of one buffer.
    pub fn buffer(&self, buffer: Param) -> &[T] {
        &self.buffers[buffer.offset..buffer.offset + buffer.numel()]
    }

    /// The values of one buffer, to be changed.
    pub fn buffer_mut(&mut self, buffer: Param) -> &mut [T] {
        self.forget_packed();
        &mut Arc::make_mut(&mut self.buffers)[buffer.offset..buffer.offset + buffer.numel()]
    }

    /// Sets buffers to new values: running statistics after a step.
    pub fn update(&mut self, updates: &[(Param, Tensor<T>)]) {
        for (buffer, value) in updates {
            self.buffer_mut(*buffer).copy_from_slice(value.data());
        }
    }

    /// All trainable values, with the padding between parameters (which is and stays zero).
    pub fn flat(&self) -> &[T] {
        &self.values
    }

    /// All trainable values, to be changed.
    pub fn flat_mut(&mut self) -> &mut [T] {
        self.forget_packed();
        let values: &mut Buffer<T> = Arc::make_mut(&mut self.values);
        values
    }

    /// What was packed is out of date.
    fn forget_packed(&mut self) {
        if let Some(packed) = &mut self.packed {
            *packed = PackedWeights::default();
        }
    }

    /// A copy of one parameter as a tensor.
    pub fn tensor(&self, param: Param) -> Tensor<T> {
        Tensor::from_fn(param.shape, |i| self.get(param)[i])
    }

    /// Fills the parameter or buffer `entry` from `data`; an error that names it unless the shape agrees.
    pub fn load(&mut self, entry: &Entry, is_buffer: bool, data: &Tensor<T>) -> Result<()> {
        if data.shape() != entry.param.shape {
            return Err(Error::shape(&entry.name, entry.param.shape, data.shape()));
        }
        let target = if is_buffer { self.buffer_mut(entry.param) } else { self.get_mut(entry.param) };
        target.copy_from_slice(data.data());
        Ok(())
    }
}

fn fill<T: Float>(values: &mut [T], init: Init, rng: &mut Rng) {
    if let Init::Orthogonal { rows, cols } = init {
        let matrix = orthogonal(rows, cols, rng);
        return values.iter_mut().zip(matrix).for_each(|(x, q)| *x = T::from_f64(q));
    }
    for (i, x) in values.iter_mut().enumerate() {
        *x = T::from_f64(match init {
            Init::Constant(c) => c,
            Init::Normal(std) => std * rng.normal(),
            Init::NormalAround { mean, std } => mean + std * rng.normal(),
            Init::Uniform(bound) => rng.range(-bound, bound),
            Init::XavierUniform { fan_in, fan_out } => {
                let bound = (6.0 / (fan_in + fan_out) as f64).sqrt();
                rng.range(-bound, bound)
            }
            Init::FanIn(fan_in) => {
                let bound = 1.0 / (fan_in as f64).sqrt();
                rng.range(-bound, bound)
            }
            Init::Sinusoid { dim } => f64::from(super::positions::sinusoid_at(dim, i / dim, i % dim) as f32),
            Init::Orthogonal { .. } => unreachable!("filled above"),
            Init::SinCos2d { dim, grid, prefix } => match (i / dim).checked_sub(prefix) {
                None => 0.0,
                Some(token) => super::positions::sincos2d_at(dim, grid, token, i % dim),
            },
        });
    }
}

/// [`Init::Orthogonal`]: Gram-Schmidt over the shorter side of a normal matrix, twice, so that nothing is left of rounding.
fn orthogonal(rows: usize, cols: usize, rng: &mut Rng) -> Vec<f64> {
    let (count, len) = (rows.min(cols), rows.max(cols));
    let mut vectors: Vec<f64> = (0..count * len).map(|_| rng.normal()).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).fold(0.0, |sum, (a, b)| sum + a * b);
    for i in 0..count {
        let (before, rest) = vectors.split_at_mut(i * len);
        let v = &mut rest[..len];
        for q in before.chunks_exact(len).chain(before.chunks_exact(len)) {
            let overlap = dot(q, v);
            v.iter_mut().zip(q).for_each(|(v, q)| *v -= overlap * q);
        }
        let norm = dot(v, v).sqrt();
        v.iter_mut().for_each(|v| *v /= norm);
    }
    let scale = (rows as f64).sqrt();
    let at = |i: usize, j: usize| if rows <= cols { vectors[i * len + j] } else { vectors[j * len + i] };
    (0..rows * cols).map(|k| scale * at(k / cols, k % cols)).collect()
}
