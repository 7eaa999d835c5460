"""PVT (arXiv 2102.12122), and UM-MAE's (2205.10063)."""

import torch
from torch import nn
from torch.nn import functional as F

from .parts import Block, smaller, tokens


class Reduction(nn.Module):
    """PVT's attention: keys and values from a map that a convolution with its stride makes smaller."""

    def __init__(self, dim, heads, ratio):
        super().__init__()
        self.heads, self.ratio = heads, ratio
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if ratio > 1:
            self.sr, self.norm = nn.Conv2d(dim, dim, ratio, ratio), nn.LayerNorm(dim)

    def forward(self, x):
        b, n, c = x.shape
        z = x
        if self.ratio > 1:
            z = self.norm(tokens(self.sr(x.transpose(1, 2).unflatten(2, (round(n**0.5),) * 2))))
        q = self.q(x).view(b, n, self.heads, -1).transpose(1, 2)
        k, v = self.kv(z).view(b, z.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class PatchNorm(nn.Module):
    def __init__(self, inputs, dim, patch):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(inputs, dim, patch, patch), nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(tokens(self.proj(x)))


class Pvt(nn.Module):
    """arXiv 2102.12122, for 224-pixel images."""

    def __init__(self, depths, dims=(64, 128, 320, 512), heads=(1, 2, 5, 8), ratios=(8, 8, 4, 4), reductions=(8, 4, 2, 1), classes=1000):
        super().__init__()
        for s, (depth, dim) in enumerate(zip(depths, dims)):
            self.add_module(f"patch_embed{s + 1}", PatchNorm(dims[s - 1] if s else 3, dim, 2 if s else 4))
            count = (56 >> s) ** 2 + (s == 3)
            self.register_parameter(f"pos_embed{s + 1}", nn.Parameter(torch.randn(1, count, dim) * 0.02))
            blocks = (Block(Reduction(dim, heads[s], reductions[s]), dim, ratios[s], 1e-6) for _ in range(depth))
            self.add_module(f"block{s + 1}", nn.ModuleList(blocks))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[-1]))
        self.norm, self.head = nn.LayerNorm(dims[-1], eps=1e-6), nn.Linear(dims[-1], classes)

    def forward(self, x):
        for s in range(1, 5):
            x = getattr(self, f"patch_embed{s}")(x)
            if s == 4:
                x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
            x = x + getattr(self, f"pos_embed{s}")
            for block in getattr(self, f"block{s}"):
                x = block(x)
            if s < 4:
                x = x.transpose(1, 2).unflatten(2, (56 >> (s - 1),) * 2)
        return self.head(self.norm(x)[:, 0])


class UmReduction(Reduction):
    """UM-MAE's: the mean of every cell, then a 1×1 convolution; also where the ratio is 1."""

    def __init__(self, dim, heads, ratio):
        super().__init__(dim, heads, 1)
        self.pool, self.sr, self.norm = nn.AvgPool2d(ratio), nn.Conv2d(dim, dim, 1), nn.LayerNorm(dim)

    def forward(self, x):
        b, n, c = x.shape
        z = self.norm(tokens(self.sr(self.pool(x.transpose(1, 2).unflatten(2, (round(n**0.5),) * 2)))))
        q = self.q(x).view(b, n, self.heads, -1).transpose(1, 2)
        k, v = self.kv(z).view(b, z.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class UmPvt(nn.Module):
    """UM-MAE's PVT-S (arXiv 2205.10063) for 256-pixel images."""

    def __init__(self, depths, dims=(64, 128, 320, 512), heads=(1, 2, 5, 8), ratios=(8, 8, 4, 4), reductions=(8, 4, 2, 1), classes=1000):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dims[0], 4, 4)})
        self.pos_embed = nn.Parameter(torch.randn(1, 64 * 64, dims[0]) * 0.02)
        self.blocks = nn.ModuleList()
        for s, depth in enumerate(depths):
            for j in range(depth):
                block = Block(UmReduction(dims[s], heads[s], reductions[s]), dims[s], ratios[s], 1e-5)
                if s and j == 0:
                    block.downsample = nn.ModuleDict({"proj": nn.Conv2d(dims[s - 1], dims[s], 2, 2)})
                self.blocks.append(block)
        self.fc_norm, self.head = nn.LayerNorm(dims[-1], eps=1e-6), nn.Linear(dims[-1], classes)

    def forward(self, x):
        x = tokens(self.patch_embed["proj"](x)) + self.pos_embed
        for block in self.blocks:
            x = block(smaller(block.downsample["proj"], x) if hasattr(block, "downsample") else x)
        return self.head(self.fc_norm(x.mean(1)))
