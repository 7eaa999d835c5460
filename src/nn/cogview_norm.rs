//! `nn.cogview_layernorm`: LayerNorm after division by the largest magnitude (CogView, arXiv 2105.13290).
//!
//! `y = LN(r x)` with `r = 8 / max|x|`, a constant in the backward pass. Which maximum: of the whole tensor (`tensor`, the
//! release), of the token (`token`, ours), or none, r = 1 (`none`). With one for the whole tensor, a token's norm depends on
//! every other token and image; only the others are exactly causal.
//!
//! LN(r x) is LN(x) with ε/r² in place of ε. Backward, with x̂ and 1/σ of that norm and `g = dy ∘ γ`:
//! `dx = (g − mean g − x̂ mean(g ∘ x̂))/σ`, `dγ = Σ dy ∘ x̂`, `dβ = Σ dy`.

use super::norm::{LayerNorm, Stats};
use super::param::{Layout, Names, Params};
use crate::case::{Config, Draw, Operation, Run};
use crate::error::Result;
use crate::kernel::norm::Relax;
use crate::tensor::random::Rng;
use crate::tensor::{Float, Tensor};

/// LayerNorm with `weight` and `bias` over the last axis, of x over its maximum.
#[derive(Clone, Debug)]
pub struct CogViewNorm {
    norm: LayerNorm,
    relax: Option<Relax>,
}

/// The key `ln_relax`.
pub fn relax_of(config: &Config) -> Result<Option<Relax>> {
    Ok(match config.choice("ln_relax", &["tensor", "token", "none"])? {
        "tensor" => Some(Relax::Tensor),
        "token" => Some(Relax::Row),
        _ => None,
    })
}

impl CogViewNorm {
    /// Registers `weight` (ones) and `bias` (zeros).
    pub fn new(names: Names, width: usize, eps: f64, relax: Option<Relax>) -> Self {
        CogViewNorm { norm: LayerNorm::new(names, width, eps), relax }
    }

    /// The normalised rows and their statistics.
    pub fn forward<T: Float>(&self, p: &Params<T>, x: &Tensor<T>) -> Result<(Tensor<T>, Stats<T>)> {
        self.norm.forward_relaxed(p, x, self.relax)
    }

    /// The output of an earlier [`forward`](Self::forward), from its statistics.
    pub fn again<T: Float>(&self, p: &Params<T>, x: &Tensor<T>, stats: &Stats<T>) -> Tensor<T> {
        self.norm.again(p, x, stats)
    }

    /// `dx`, plus `residual` if there is one.
    pub fn backward<T: Float>(
        &self,
        p: &Params<T>,
        g: &mut Params<T>,
        x: &Tensor<T>,
        stats: &Stats<T>,
        dy: &Tensor<T>,
        residual: Option<&Tensor<T>>,
    ) -> Result<Tensor<T>> {
        self.norm.backward(p, g, x, stats, dy, residual)
    }
}

/// `nn.cogview_layernorm`.
pub struct CogViewLayerNorm;

impl Operation for CogViewLayerNorm {
    const NAME: &'static str = "nn.cogview_layernorm";
    const PAPER: &'static str = "2105.13290 CogView";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("dim", rng.between(2, 40)).set("ln_eps", if rng.chance(0.7) { 1e-5 } else { 1e-2 });
        config.set("ln_relax", rng.pick(&["tensor", "token", "none"]));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        let (batch, tokens) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 20));
        draw.normal("x", [batch, tokens, config.positive("dim")?]);
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let (dim, eps, relax) = (config.positive("dim")?, config.f64_or("ln_eps", 1e-5)?, relax_of(config)?);
        let (norm, layout) = Layout::build(|names| Ok(CogViewNorm::new(names.here(), dim, eps, relax)))?;
        let x = run.input("x")?;
        run.unary(&layout, |p, x| norm.forward(p, x), |p, g, stats, dy| norm.backward(p, g, &x, &stats, dy, None))
    }
}
