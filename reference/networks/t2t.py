"""T2T-ViT (arXiv 2101.11986)."""

import torch
from torch import nn
from torch.nn import functional as F

from twins.t2t import Performer, TokenTransformer

from .parts import Block, Mlp, Softmax


class TokenBlock(nn.Module):
    """The token transformer: no skip around the attention but its own."""

    def __init__(self, dim, width):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), TokenTransformer(dim, width)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, width)

    def forward(self, x):
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PerformerBlock(Performer):
    """The token Performer, whose parts the authors keep in one module."""

    def __init__(self, dim, width):
        super().__init__(dim, width)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        x = super().forward(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class T2t(nn.Module):
    """arXiv 2101.11986."""

    def __init__(self, dim, depth, heads, ratio, performer=True, width=64, side=14, classes=1000):
        super().__init__()
        kind = PerformerBlock if performer else TokenBlock
        parts = {"attention1": kind(3 * 49, width), "attention2": kind(9 * width, width), "project": nn.Linear(9 * width, dim)}
        self.tokens_to_token = nn.ModuleDict(parts)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # A fixed table of the authors: any numbers will do.
        self.register_buffer("pos_embed", torch.randn(1, 1 + side * side, dim))
        self.blocks = nn.ModuleList(Block(Softmax(dim, heads, bias=False), dim, ratio, 1e-5) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        parts = self.tokens_to_token
        x = parts["attention1"](F.unfold(x, 7, stride=4, padding=2).transpose(1, 2))
        again = lambda x: F.unfold(x.transpose(1, 2).unflatten(2, (round(x.shape[1] ** 0.5),) * 2), 3, stride=2, padding=1).transpose(1, 2)
        x = parts["project"](again(parts["attention2"](again(x))))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
