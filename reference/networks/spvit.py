"""SPViT-DeiT (arXiv 2111.11802)."""

import torch
from torch import nn
from torch.nn import functional as F

from twins.spvit import Folded, SinglePathConv

from .parts import Block, tokens


class PointConv(Folded):
    """The folded 1×1 bottleneck: the kernel's centre alone."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads, 0.01)
        self.bn_1x1 = nn.BatchNorm2d(dim // heads)

    def forward(self, x):
        weight, bias, out = self.weights([4])
        y = F.conv2d(x[:, 1:].transpose(1, 2)[..., None], weight, bias)
        y = F.conv2d(F.relu(self.bn_1x1(y)), out, self.proj.bias)
        return torch.cat((x[:, :1], y[..., 0].transpose(1, 2)), 1)


class QkAttention(nn.Module):
    """Softmax attention with v beside q and k."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qk, self.v, self.proj = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k = self.qk(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        v = self.v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Spvit(nn.Module):
    """A finished SPViT-DeiT (arXiv 2111.11802) for 224-pixel images; `kinds`: `1`, `3` (convolutions) or `M` for each block."""

    def __init__(self, kinds, hidden, dim, heads, classes=1000):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 16, 16)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 197, dim) * 0.02)
        build = {"1": lambda: PointConv(dim, heads), "3": lambda: SinglePathConv(dim, heads, 14), "M": lambda: QkAttention(dim, heads)}
        # Half a unit more, so that the hidden width survives the division.
        self.blocks = nn.ModuleList(Block(build[kind](), dim, (width + 0.5) / dim, 1e-6) for kind, width in zip(kinds, hidden))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)

    def forward(self, x):
        x = tokens(self.patch_embed["proj"](x))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


DEIT_B_HIDDEN = (1118, 489, 1050, 1345, 1336, 1326, 1431, 1564, 1606, 1702, 1290, 190)
