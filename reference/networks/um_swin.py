"""UM-MAE's Swin (arXiv 2205.10063)."""

import torch
from torch import nn
from torch.nn import functional as F

from .parts import Block, smaller, tokens


def partition(x, w):
    """`[B, R, R, C]` → `[B · windows, w², C]`."""
    r = x.shape[1]
    return x.unflatten(2, (r // w, w)).unflatten(1, (r // w, w)).transpose(2, 3).reshape(-1, w * w, x.shape[3])


def unpartition(y, b, r):
    """The inverse of `partition`."""
    w = round(y.shape[1] ** 0.5)
    return y.view(b, r // w, r // w, w, w, -1).transpose(2, 3).reshape(b, r, r, -1)


class UmWindow(nn.Module):
    """Windows of a regular map, shifted by rolling; the bias is an MLP of the distance of two tokens."""

    def __init__(self, dim, heads, window, shift, hidden=32):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.posmlp = nn.Sequential(nn.Conv2d(2, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, heads, 1))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, positions):
        b, n, c = x.shape
        r, w, s = round(n**0.5), self.window, self.shift
        roll = lambda y, by: y.roll((by, by), (1, 2))
        x, pos = (partition(roll(y, -s), w) for y in (x.view(b, r, r, c), positions))
        offset = (pos[:, None] - pos[:, :, None]).permute(0, 3, 1, 2)
        bias = self.posmlp(offset.sign() * offset.abs().log1p())
        if s:
            stripe = torch.bucketize(torch.arange(r), torch.tensor([r - w, r - s]), right=True)
            region = partition((3 * stripe[:, None] + stripe)[None, :, :, None], w)[..., 0]
            bias = bias - 100.0 * (region[:, None] != region[:, :, None])[:, None]
        q, k, v = self.qkv(x).view(len(x), w * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias.repeat(b, 1, 1, 1)).transpose(1, 2).flatten(2))
        return roll(unpartition(y, b, r), s).reshape(b, n, c)


class UmSwin(nn.Module):
    """UM-MAE's Swin-T (arXiv 2205.10063) for 256-pixel images."""

    def __init__(self, depths, dim=96, heads=(3, 6, 12, 24), window=16, classes=1000):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 4, 4), "norm": nn.LayerNorm(dim, eps=1e-6)})
        self.blocks = nn.ModuleList()
        for s, depth in enumerate(depths):
            c, side = dim << s, 64 >> s
            for j in range(depth):
                shift = window // 2 if j % 2 and side > window else 0
                block = Block(UmWindow(c, heads[s], min(window, side), shift), c, 4, 1e-5)
                if s and j == 0:
                    block.downsample = nn.ModuleDict({"norm": nn.LayerNorm(c // 2, eps=1e-6), "proj": nn.Conv2d(c // 2, c, 2, 2)})
                self.blocks.append(block)
        self.fc_norm, self.head = nn.LayerNorm(c, eps=1e-6), nn.Linear(c, classes)

    def forward(self, x):
        x = self.patch_embed["norm"](tokens(self.patch_embed["proj"](x)))
        at = torch.arange(64.0)
        positions = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1)[None]
        for block in self.blocks:
            if hasattr(block, "downsample"):
                x = smaller(block.downsample["proj"], block.downsample["norm"](x))
                positions = positions[:, ::2, ::2] / 2
            x = x + block.attn(block.norm1(x), positions)
            x = x + block.mlp(block.norm2(x))
        return self.head(self.fc_norm(x.mean(1)))
