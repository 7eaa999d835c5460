"""PyTorch twins of attention with a Gaussian mixture mask (arXiv 2309.05375; ViT, CaiT, Swin, T2T) and of retention (arXiv 2307.08621).

The mask is a table of distances expanded by index (the released code raises an N×N matrix to K·h powers); it multiplies the logits, so no
fused attention applies. Retention runs in chunks of 64, all heads at once, the states of all chunks by one scan.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 64


def tokens_of(tokens, dim):
    return (torch.randn(1, tokens, dim, requires_grad=True),)


class GaussianMixture(nn.Module):
    def __init__(self, heads, grid, kernels=5):
        super().__init__()
        self.sigma = nn.Parameter(10 + 10 * torch.randn(kernels, heads, 1, 1))
        self.alpha = nn.Parameter(2 * torch.randn(kernels, heads, 1, 1))
        h, w = grid
        y, x = torch.arange(h), torch.arange(w)
        self.register_buffer("squares", (y[:, None] ** 2 + x[None] ** 2).float())
        at = torch.stack(torch.meshgrid(y, x, indexing="ij")).flatten(1)
        offset = (at[:, :, None] - at[:, None]).abs()
        self.register_buffer("index", (offset[0] * w + offset[1]).flatten())

    def forward(self):
        tau = self.sigma**2 + 1e-5
        table = (self.alpha * torch.exp(-self.squares / (2 * tau))).sum(0)
        n = self.squares.numel()
        return table.flatten(1)[:, self.index].view(-1, n, n)


def heads_apart(x, parts, heads):
    return x.unflatten(-1, (parts, heads, -1)).movedim(-3, 0).transpose(-3, -2).unbind(0)


def heads_together(x):
    return x.transpose(-3, -2).flatten(-2)


class GaussianMask(nn.Module):
    """With ViT's or T2T's names; `skip` is what T2T adds."""

    def __init__(self, dim, heads, grid, skip=False):
        super().__init__()
        self.heads, self.scale, self.skip = heads, (dim // heads) ** -0.5, skip
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.mask = GaussianMixture(heads, grid)

    def forward(self, x):
        q, k, v = heads_apart(self.qkv(x), 3, self.heads)
        logits = self.mask() * ((q * self.scale) @ k.transpose(-2, -1))
        y = self.proj(heads_together(logits.softmax(-1) @ v))
        return y + x if self.skip else y


class GaussianMaskCait(nn.Module):
    def __init__(self, dim, heads, grid):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q, self.to_kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.pre, self.post = nn.Parameter(torch.randn(heads, heads)), nn.Parameter(torch.randn(heads, heads))
        self.to_out, self.mask = nn.Linear(dim, dim), GaussianMixture(heads, grid)

    def forward(self, x):
        (q,), (k, v) = heads_apart(self.to_q(x), 1, self.heads), heads_apart(self.to_kv(x), 2, self.heads)
        logits = self.mask() * ((q * self.scale) @ k.transpose(-2, -1))
        weights = torch.einsum("bhij,hg->bgij", logits, self.pre).softmax(-1)
        weights = torch.einsum("bhij,hg->bgij", weights, self.post)
        return self.to_out(heads_together(weights @ v))


class GaussianMaskSwin(nn.Module):
    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads, self.window, self.scale = heads, window, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        offset = at[:, :, None] - at[:, None] + window - 1
        self.register_buffer("index", (offset[0] * (2 * window - 1) + offset[1]).flatten())
        self.mask = GaussianMixture(heads, (window, window))

    def forward(self, x):
        q, k, v = heads_apart(self.qkv(x), 3, self.heads)
        n = self.window**2
        bias = self.relative_position_bias_table[self.index].view(n, n, -1).permute(2, 0, 1)
        logits = torch.addcmul(bias, self.mask(), (q * self.scale) @ k.transpose(-2, -1))
        return self.proj(heads_together(logits.softmax(-1) @ v))


class Retention(nn.Module):
    def __init__(self, dim, value_dim, heads, eps=1e-6):
        super().__init__()
        self.heads, self.width, self.eps = heads, dim // heads, eps
        self.q_proj, self.k_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.v_proj, self.g_proj = nn.Linear(dim, value_dim, bias=False), nn.Linear(dim, value_dim, bias=False)
        self.out_proj = nn.Linear(value_dim, dim, bias=False)
        self.register_buffer("log_gamma", torch.log1p(-torch.exp2(-5.0 - torch.arange(heads))))
        self.register_buffer("theta", 10_000.0 ** -torch.linspace(0, 1, self.width // 2))

    def turn(self, x):
        angle = torch.arange(x.shape[-2])[:, None] * self.theta
        sin, cos = angle.sin(), angle.cos()
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)

    def forward(self, x):
        b, n, _ = x.shape
        apart = lambda x: x.view(b, n, self.heads, -1).transpose(1, 2)
        q, k = self.turn(apart(self.q_proj(x))), self.turn(apart(self.k_proj(x))) * self.width**-0.5
        v, g = apart(self.v_proj(x)), self.g_proj(x)
        count = math.ceil(n / CHUNK)
        q, k, v = (F.pad(t, (0, 0, 0, count * CHUNK - n)).unflatten(2, (count, CHUNK)) for t in (q, k, v))
        steps = torch.arange(CHUNK)
        decay = torch.exp(self.log_gamma[:, None, None] * (steps[:, None] - steps).clamp(min=0)).tril()[:, None]
        out = ((q @ k.transpose(-2, -1)) * decay) @ v
        to_end = torch.exp(self.log_gamma[:, None] * (CHUNK - 1 - steps))[:, None, :, None]
        from_start = torch.exp(self.log_gamma[:, None] * (steps + 1))[:, None, :, None]
        # States before every chunk: a lower-triangular mix of the chunks' own contributions.
        own = (k * to_end).transpose(-2, -1) @ v
        chunks = torch.arange(count)
        apart_by = (chunks[:, None] - 1 - chunks) * CHUNK
        mix = torch.exp(self.log_gamma[:, None, None] * apart_by.clamp(min=0)) * (apart_by >= 0)
        states = torch.einsum("hij,bhjkv->bhikv", mix, own)
        out = (out + from_start * (q @ states)).flatten(2, 3)[:, :, :n]
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + self.eps)
        return self.out_proj(F.silu(g) * out.transpose(1, 2).flatten(2))


def side_of(tokens):
    side = math.isqrt(tokens)
    assert side * side == tokens
    return side


def gaussian_mask(tokens, dim, heads):
    side = side_of(tokens)
    return GaussianMask(dim, heads, (side, side)), tokens_of(tokens, dim)


def gaussian_mask_t2t(tokens, dim, heads):
    side = side_of(tokens)
    return GaussianMask(dim, heads, (side, side), skip=True), tokens_of(tokens, dim)


def gaussian_mask_cait(tokens, dim, heads):
    side = side_of(tokens)
    return GaussianMaskCait(dim, heads, (side, side)), tokens_of(tokens, dim)


def gaussian_mask_swin(tokens, dim, heads, window=7):
    return GaussianMaskSwin(dim, heads, window), (torch.randn(tokens // window**2, window**2, dim, requires_grad=True),)


def retention(tokens, dim, heads):
    return Retention(dim, dim, heads), tokens_of(tokens, dim)


TWINS = {
    "attention.gaussian_mask": gaussian_mask,
    "attention.gaussian_mask_cait": gaussian_mask_cait,
    "attention.gaussian_mask_swin": gaussian_mask_swin,
    "attention.gaussian_mask_t2t": gaussian_mask_t2t,
    "attention.retention": retention,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, build in TWINS.items():
        module, inputs = build(196, 384, 8)
        y = module(*inputs)
        y.sum().backward()
        print(name, tuple(y.shape))
