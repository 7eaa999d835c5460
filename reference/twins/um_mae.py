"""UM-MAE: window attention with a bias from an MLP of all pairs of positions, spatial-reduction attention on a pooled map (PVT);
and GreenMIM's Twins attention, whose keys come from a convolution over cells with visible tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .vit_swin import heads_apart, heads_together, tokens_in, visible


class UmWindow(nn.Module):
    """Windows of one image with the positions of uniformly sampled tokens."""

    def __init__(self, dim: int, heads: int, hidden: int = 32):
        super().__init__()
        self.heads = heads
        self.posmlp = nn.Sequential(nn.Conv2d(2, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, heads, 1))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, positions):
        """x [windows, n, C], positions [windows, n, 2]."""
        offset = (positions[:, None] - positions[:, :, None]).permute(0, 3, 1, 2)
        bias = self.posmlp(offset.sign() * offset.abs().log1p())
        q, k, v = heads_apart(self.qkv(x), 3, self.heads)
        return self.proj(heads_together(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


class SpatialReduction(nn.Module):
    def __init__(self, dim: int, heads: int, side: int, ratio: int):
        super().__init__()
        self.heads, self.side = heads, side
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.pool, self.sr, self.norm = nn.AvgPool2d(ratio), nn.Conv2d(dim, dim, 1), nn.LayerNorm(dim)

    def forward(self, x):
        image = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        z = self.norm(self.sr(self.pool(image)).flatten(2).transpose(1, 2))
        (q,), (k, v) = heads_apart(self.q(x), 1, self.heads), heads_apart(self.kv(z), 2, self.heads)
        return self.proj(heads_together(F.scaled_dot_product_attention(q, k, v)))


class GlobalSubsampled(nn.Module):
    """The sparse convolution gathers the tokens of every cell, a zero row standing for those that are hidden."""

    def __init__(self, dim: int, heads: int, coords, side: int, ratio: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.sr, self.norm = nn.Linear(ratio * ratio * dim, dim), nn.LayerNorm(dim, eps=1e-6)
        across, cells = side // ratio, coords // ratio
        cells, owner = (cells[:, 0] * across + cells[:, 1]).unique(return_inverse=True)
        rows = torch.full((len(cells), ratio * ratio), len(coords))
        rows[owner, coords[:, 0] % ratio * ratio + coords[:, 1] % ratio] = torch.arange(len(coords))
        self.register_buffer("rows", rows)

    def forward(self, x):
        z = self.norm(self.sr(F.pad(x, (0, 0, 0, 1))[:, self.rows].flatten(2)))
        (q,), (k, v) = heads_apart(self.q(x), 1, self.heads), heads_apart(self.kv(z), 2, self.heads)
        return self.proj(heads_together(F.scaled_dot_product_attention(q, k, v)))


def um_window(tokens: int, dim: int, heads: int):
    side = math.isqrt(tokens)
    window = 8 if side % 8 == 0 else 7
    across = side // window
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1)
    positions = 2 * place + torch.randint(2, place.shape)
    positions = positions.view(across, window, across, window, 2).transpose(1, 2).reshape(-1, window * window, 2)
    x = torch.randn(across * across, window * window, dim, requires_grad=True)
    return UmWindow(dim, heads), (x, positions.float())


def spatial_reduction(tokens: int, dim: int, heads: int):
    side = math.isqrt(tokens)
    return SpatialReduction(dim, heads, side, max(side // 7, 1)), tokens_in(tokens, dim)


def gsa(tokens: int, dim: int, heads: int):
    side = math.isqrt(tokens)
    return GlobalSubsampled(dim, heads, visible(tokens), side, min(max(side // 7, 1), 8)), tokens_in(tokens // 4, dim)


TWINS = {"attention.um_window": um_window, "attention.spatial_reduction": spatial_reduction, "attention.gsa": gsa}
