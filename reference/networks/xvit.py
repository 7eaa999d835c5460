"""X-ViT (arXiv 2205.13805)."""

import torch
from torch import nn
from torch.nn import functional as F

from twins.xvit import ClassXNorm, XNorm

from .parts import Mlp, tokens


def narrow(attn: nn.Module, dim: int, width: int) -> nn.Module:
    """X-ViT's attention with q, k, v of another total width than the tokens'."""
    for name, layer in list(attn.named_children()):
        inputs, outputs = (width, dim) if name == "proj" else (dim, layer.out_features // layer.in_features * width)
        setattr(attn, name, nn.Linear(inputs, outputs))
    return attn


class NarrowXNorm(XNorm):
    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = (self.gamma * F.normalize(q, dim=-1)) @ (self.gamma * F.normalize(k.transpose(-2, -1) @ v, dim=-2))
        return self.proj(y.transpose(1, 2).flatten(2))


class NarrowClassXNorm(ClassXNorm):
    def forward(self, x):
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = split(self.q(x[:, :1])), split(self.k(x)), split(self.v(x))
        y = (self.gamma * F.normalize(q, dim=-1)) @ (self.gamma * F.normalize(k.transpose(-2, -1) @ v, dim=-2))
        return self.proj(y.transpose(1, 2).flatten(2))


class Lpi(nn.Module):
    """XCiT's local patch interaction."""

    def __init__(self, dim: int, side: int):
        super().__init__()
        self.side = side
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2))
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x):
        x = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        return tokens(self.conv2(self.bn(F.gelu(self.conv1(x)))))


class XvitBlock(nn.Module):
    def __init__(self, dim, width, heads, side):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attn, self.local_mp = narrow(NarrowXNorm(dim, heads), dim, width), Lpi(dim, side)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma1, self.gamma2, self.gamma3 = (nn.Parameter(torch.ones(dim)) for _ in range(3))

    def forward(self, x):
        x = x + self.gamma1 * self.attn(self.norm1(x))
        x = x + self.gamma3 * self.local_mp(self.norm3(x))
        return x + self.gamma2 * self.mlp(self.norm2(x))


class XvitClassBlock(nn.Module):
    def __init__(self, dim, width, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = narrow(NarrowClassXNorm(dim, heads), dim, width), Mlp(dim, 4 * dim)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(dim)) for _ in range(2))

    def forward(self, x, cls):
        cls = cls + self.gamma_1 * self.attn(self.norm1(torch.cat([cls, x], 1)))
        return cls + self.gamma_2 * self.mlp(self.norm2(cls))


class Xvit(nn.Module):
    """arXiv 2205.13805, patches of 16 pixels, 224-pixel images."""

    def __init__(self, dim, width, depth, heads=4, side=14, classes=1000):
        super().__init__()
        widths, layers = [3, dim // 8, dim // 4, dim // 2, dim], []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b)), nn.GELU()]
        self.patch_embed = nn.ModuleDict({"proj": nn.Sequential(*layers[:-1])})
        self.pos_embed = nn.Parameter(torch.randn(1, side * side, dim) * 0.02)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(XvitBlock(dim, width, heads, side) for _ in range(depth))
        self.cls_attn_blocks = nn.ModuleList(XvitClassBlock(dim, width, heads) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)

    def forward(self, x):
        x = tokens(self.patch_embed["proj"](x)) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        cls = self.cls_token.expand(len(x), -1, -1)
        for block in self.cls_attn_blocks:
            cls = block(x, cls)
        return self.head(self.norm(cls)[:, 0])
