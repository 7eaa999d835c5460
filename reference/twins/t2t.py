"""T2T-ViT (arXiv 2101.11986): the attention of its token transformer and of its token Performer."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class TokenTransformer(nn.Module):
    """One head, scale by the input's width, skip from v."""

    def __init__(self, dim: int, in_dim: int):
        super().__init__()
        self.scale = dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * in_dim, bias=False), nn.Linear(in_dim, in_dim)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=self.scale)
        return v + self.proj(mixed[:, 0])


class Performer(nn.Module):
    """Linear attention by positive random features, skip from v."""

    def __init__(self, dim: int, in_dim: int, ratio: float = 0.5, eps: float = 1e-8):
        super().__init__()
        self.features, self.eps = int(in_dim * ratio), eps
        self.kqv, self.proj = nn.Linear(dim, 3 * in_dim), nn.Linear(in_dim, in_dim)
        self.register_buffer("w", nn.init.orthogonal_(torch.empty(self.features, in_dim)) * math.sqrt(self.features))

    def phi(self, x):
        return torch.exp(x @ self.w.T - x.square().sum(dim=-1, keepdim=True) / 2) / math.sqrt(self.features)

    def forward(self, x):
        k, q, v = self.kqv(x).chunk(3, dim=-1)
        k, q = self.phi(k), self.phi(q)
        normaliser = q @ k.sum(dim=1).unsqueeze(-1)
        mixed = (q @ (k.transpose(-2, -1) @ v)) / (normaliser + self.eps)
        return v + self.proj(mixed)


def inputs(tokens: int, dim: int):
    return (torch.randn(1, tokens, dim, requires_grad=True),)


TWINS = {
    "attention.token_transformer": lambda tokens, dim, heads: (TokenTransformer(dim, dim), inputs(tokens, dim)),
    "attention.performer": lambda tokens, dim, heads: (Performer(dim, dim), inputs(tokens, dim)),
}
