"""Twins of DilateFormer's attention: neighbourhoods by `unfold`, as the released code has them; global attention by SDPA."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def neighbourhoods(q, k, v, heads, kernel, dilation):
    """`[B, C, H, W]` each → `[B, H, W, C]`; zero padding takes part in the softmax."""
    b, c, h, w = q.shape
    d, n = c // heads, h * w
    pad = dilation * (kernel - 1) // 2

    def unfold(x):  # [B, heads, d, slots, N] → [B, heads, N, slots, d] or its transpose, by the product that reads it
        return F.unfold(x, kernel, dilation=dilation, padding=pad).view(b, heads, d, kernel * kernel, n)

    q = (q * d**-0.5).view(b, heads, d, n).permute(0, 1, 3, 2).unsqueeze(3)  # [B, heads, N, 1, d]
    p = (q @ unfold(k).permute(0, 1, 4, 2, 3)).softmax(-1)
    return (p @ unfold(v).permute(0, 1, 4, 3, 2)).transpose(1, 2).reshape(b, h, w, c)


class Swda(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, q, k, v):
        return neighbourhoods(q, k, v, self.heads, 3, 1)


class Dilated(nn.Module):
    def __init__(self, dim, heads, dilations):
        super().__init__()
        self.heads, self.dilations = heads, dilations
        self.qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Linear(dim, dim)

    def forward(self, x):
        b, h, w, c = x.shape
        groups = len(self.dilations)
        # [part, group, B, C/groups, H, W]
        qkv = self.qkv(x.permute(0, 3, 1, 2)).view(b, 3, groups, c // groups, h, w).permute(1, 2, 0, 3, 4, 5)
        q, k, v = (part.unbind() for part in qkv)
        out = [neighbourhoods(q[i], k[i], v[i], self.heads // groups, 3, r) for i, r in enumerate(self.dilations)]
        return self.proj(torch.cat(out, -1))


class Global(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, h, w, c = x.shape
        q, k, v = self.qkv(x).view(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind()
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h, w, c))


def side(tokens):
    side = math.isqrt(tokens)
    assert side * side == tokens, "a square map"
    return side


def swda(tokens, dim, heads):
    shape = (1, dim, side(tokens), side(tokens))
    return Swda(heads), tuple(torch.randn(shape, requires_grad=True) for _ in range(3))


def dilated(tokens, dim, heads):
    count = next(n for n in (3, 2, 1) if heads % n == 0)
    x = torch.randn(1, side(tokens), side(tokens), dim, requires_grad=True)
    return Dilated(dim, heads, range(1, count + 1)), (x,)


def dilate_global(tokens, dim, heads):
    return Global(dim, heads), (torch.randn(1, side(tokens), side(tokens), dim, requires_grad=True),)


TWINS = {"attention.swda": swda, "attention.dilated": dilated, "attention.dilate_global": dilate_global}
