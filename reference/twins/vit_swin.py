"""ViT's multi-head attention, Swin's window attention, and GreenMIM's group attention as released: padded groups of windows with a mask.

The grouping plan, which all blocks of a stage share, is made beforehand.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from karat_ref.greenmim import make_plan


def heads_apart(x, parts: int, heads: int):
    """[..., N, parts·C] -> parts tensors [..., heads, N, C / heads]."""
    return x.unflatten(-1, (parts, heads, -1)).movedim(-3, 0).transpose(-3, -2).unbind(0)


def heads_together(x):
    return x.transpose(-3, -2).flatten(-2)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, bias=None):
        q, k, v = heads_apart(self.qkv(x), 3, self.heads)
        return self.proj(heads_together(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


def relative_index(side: int):
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    offset = at[:, :, None] - at[:, None, :] + side - 1
    return offset[0] * (2 * side - 1) + offset[1]


class WindowAttention(Attention):
    def __init__(self, dim: int, heads: int, side: int, window: int):
        super().__init__(dim, heads)
        self.side, self.window = side, window
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)
        self.register_buffer("index", relative_index(window))

    def forward(self, x):
        b, n, c = x.shape
        m, across = self.window, self.side // self.window
        windows = x.view(b, across, m, across, m, c).transpose(2, 3).reshape(-1, m * m, c)
        bias = self.relative_position_bias_table[self.index.flatten()].view(m * m, m * m, -1).permute(2, 0, 1)[None]
        y = super().forward(windows, bias)
        return y.view(b, across, across, m, m, c).transpose(2, 3).reshape(b, n, c)


class GroupAttention(Attention):
    def __init__(self, dim: int, heads: int, coords, window: int):
        super().__init__(dim, heads)
        self.plan = make_plan(coords, window, 0, "grouping", "max", dim)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)

    def forward(self, x):
        plan = self.plan
        bias = self.relative_position_bias_table[plan.rel_pos.flatten()].view(*plan.rel_pos.shape, -1)
        masked = (plan.mask != 0)[..., None]
        bias = bias.masked_fill(masked, 0.0).permute(0, 3, 1, 2) + plan.mask.to(x.dtype)[:, None]
        return plan.scatter(super().forward(plan.gather(x), bias[None]))


def tokens_in(tokens: int, dim: int):
    return (torch.randn(1, tokens, dim, requires_grad=True),)


def softmax(tokens: int, dim: int, heads: int):
    return Attention(dim, heads), tokens_in(tokens, dim)


def window(tokens: int, dim: int, heads: int):
    side = math.isqrt(tokens)
    return WindowAttention(dim, heads, side, 7 if side % 7 == 0 else 8), tokens_in(tokens, dim)


def visible(tokens: int):
    """The coordinates of a random quarter of the tokens of a square map, in raster order."""
    side = math.isqrt(tokens)
    seen = torch.randperm(tokens)[: tokens // 4].sort().values
    return torch.stack([seen // side, seen % side], dim=1)


def group_window(tokens: int, dim: int, heads: int):
    return GroupAttention(dim, heads, visible(tokens), 7), tokens_in(tokens // 4, dim)


TWINS = {"attention.softmax": softmax, "attention.window": window, "attention.group_window": group_window}
