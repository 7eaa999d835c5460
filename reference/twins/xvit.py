"""Twins of xvit.md: XNorm attention and its class attention."""

import torch
from torch import nn
from torch.nn import functional as F


class XNorm(nn.Module):
    """`XN(q) XN(kᵀv)`: rows of q and columns of `kᵀv` are unit vectors times a gain per head."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.gamma = nn.Parameter(torch.ones(1, heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        kv = k.transpose(-2, -1) @ v
        y = (self.gamma * F.normalize(q, dim=-1)) @ (self.gamma * F.normalize(kv, dim=-2))
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class ClassXNorm(nn.Module):
    """The same for the first token alone, with separate q, k, v."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.gamma = nn.Parameter(torch.ones(1, heads, 1, 1))
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        b, n, c = x.shape
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = split(self.q(x[:, :1])), split(self.k(x)), split(self.v(x))
        kv = k.transpose(-2, -1) @ v
        y = (self.gamma * F.normalize(q, dim=-1)) @ (self.gamma * F.normalize(kv, dim=-2))
        return self.proj(y.transpose(1, 2).reshape(b, 1, c))


def _tokens(tokens: int, dim: int) -> tuple[torch.Tensor]:
    return (torch.randn(1, tokens, dim, requires_grad=True),)


TWINS = {
    "attention.xnorm": lambda tokens, dim, heads: (XNorm(dim, heads), _tokens(tokens, dim)),
    "attention.class_xnorm": lambda tokens, dim, heads: (ClassXNorm(dim, heads), _tokens(tokens, dim)),
}
