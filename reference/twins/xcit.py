"""Twins of xcit.md: cross-covariance attention and class attention."""

import torch
from torch import nn
from torch.nn import functional as F


class CrossCovariance(nn.Module):
    """Softmax over the channels of a head; q and k are unit vectors over the tokens."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 4, 1)
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        mixed = (cosines * self.temperature).softmax(-1) @ v
        return self.proj(mixed.permute(0, 3, 1, 2).reshape(b, n, c))


class ClassAttention(nn.Module):
    """The first token asks all tokens; its row alone comes back."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        b, n, c = x.shape
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(split(self.q(x[:, :1])), split(self.k(x)), split(self.v(x)))
        return self.proj(y.transpose(1, 2).reshape(b, 1, c))


def _tokens(tokens: int, dim: int) -> tuple[torch.Tensor]:
    return (torch.randn(1, tokens, dim, requires_grad=True),)


TWINS = {
    "attention.xca": lambda tokens, dim, heads: (CrossCovariance(dim, heads), _tokens(tokens, dim)),
    "attention.class": lambda tokens, dim, heads: (ClassAttention(dim, heads), _tokens(tokens, dim)),
}
