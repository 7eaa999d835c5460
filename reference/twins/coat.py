"""CoaT (arXiv 2104.06399): factorised attention with convolutional relative positions."""

import torch
import torch.nn.functional as F
from torch import nn


class FactorizedConv(nn.Module):
    """Softmax down the tokens of k, KᵀV first; a depthwise convolution of v, times q. A class token stands in front of the map."""

    def __init__(self, dim: int, heads: int, windows: list[int], splits: list[int], side: int):
        super().__init__()
        self.heads, self.side, self.scale = heads, side, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.channels = [split * (dim // heads) for split in splits]
        self.convs = nn.ModuleList(nn.Conv2d(c, c, w, padding=w // 2, groups=c) for c, w in zip(self.channels, windows))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = q @ (k.softmax(dim=2).transpose(-2, -1) @ v)
        image = v[:, :, 1:].transpose(-2, -1).reshape(b, c, self.side, self.side)
        parts = torch.split(image, self.channels, dim=1)
        u = torch.cat([conv(part) for conv, part in zip(self.convs, parts)], dim=1)
        u = u.view(b, self.heads, c // self.heads, n - 1).transpose(-2, -1)
        relative = F.pad(q[:, :, 1:] * u, (0, 0, 1, 0))
        return self.proj((self.scale * mixed + relative).transpose(1, 2).reshape(b, n, c))


def factorized_conv(tokens: int, dim: int, heads: int):
    side = round(tokens**0.5)
    windows, splits = ([3, 5, 7], [2, 3, 3]) if heads == 8 else ([3], [heads])
    module = FactorizedConv(dim, heads, windows, splits, side)
    return module, (torch.randn(1, 1 + side * side, dim, requires_grad=True),)


TWINS = {"attention.factorized_conv": factorized_conv}
