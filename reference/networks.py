"""Whole networks that timm lacks, in plain PyTorch under the published parameter names: what `check_models.py` compares karat with.

Written from the specifications on top of the attention of `twins`; each takes the sizes of its published variants.
"""

import torch
from torch import nn
from torch.nn import functional as F

from twins.context_cluster import Cluster
from twins.dilateformer import Dilated, Global
from twins.t2t import Performer, TokenTransformer
from twins.xvit import ClassXNorm, XNorm


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Softmax(nn.Module):
    """Multi-head attention; queries and keys from one `qkv`."""

    def __init__(self, dim: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    """`x + attn(norm1 x)`, then `x + mlp(norm2 x)`."""

    def __init__(self, attn: nn.Module, dim: int, ratio: float, eps: float):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim, eps=eps), attn, nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def tokens(x):
    """`[B, C, H, W]` → `[B, HW, C]`."""
    return x.flatten(2).transpose(1, 2)


class DilateBlock(Block):
    """On channels-last maps, with a depthwise convolution in front."""

    def __init__(self, attn: nn.Module, dim: int, ratio: float):
        super().__init__(attn, dim, ratio, 1e-6)
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x):
        return super().forward(x + self.pos_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class DilateFormer(nn.Module):
    """arXiv 2302.01791."""

    def __init__(self, depths, dim=72, heads=(3, 6, 12, 24), hidden=16, classes=1000):
        super().__init__()
        conv = lambda a, b, stride: nn.Conv2d(a, b, 3, stride, 1, bias=False)
        widths, layers = [3, hidden, 2 * hidden, 4 * hidden, dim], []
        for i, stride in enumerate((1, 2, 1)):
            layers += [conv(widths[i], widths[i + 1], stride), nn.BatchNorm2d(widths[i + 1]), nn.GELU()]
        self.patch_embed = nn.ModuleDict({"proj": nn.Sequential(*layers, conv(widths[3], dim, 2))})
        self.stages = nn.ModuleList()
        for s, depth in enumerate(depths):
            c = dim << s
            attn = (lambda: Dilated(c, heads[s], (1, 2, 3))) if s < 2 else (lambda: Global(c, heads[s]))
            stage = nn.ModuleDict({"blocks": nn.ModuleList(DilateBlock(attn(), c, 4) for _ in range(depth))})
            if s < 3:
                down = nn.Sequential(nn.Conv2d(c, 2 * c, 3, 2, 1), nn.BatchNorm2d(2 * c))
                stage["downsample"] = nn.ModuleDict({"proj": down})
            self.stages.append(stage)
        self.norm, self.head = nn.LayerNorm(c, eps=1e-6), nn.Linear(c, classes)

    def forward(self, x):
        x = self.patch_embed["proj"](x)
        for stage in self.stages:
            x = x.permute(0, 2, 3, 1)
            for block in stage["blocks"]:
                x = block(x)
            x = x.permute(0, 3, 1, 2)
            if "downsample" in stage:
                x = stage["downsample"]["proj"](x)
        return self.head(self.norm(tokens(x)).mean(1))


class Clusters(Cluster):
    """The twin's clustering with heads whose width is not that of the map's."""

    def __init__(self, dim: int, heads: int, width: int, fold: int):
        super().__init__(heads * width, heads, fold)
        self.f, self.v = nn.Conv2d(dim, heads * width, 1), nn.Conv2d(dim, heads * width, 1)
        self.proj = nn.Conv2d(heads * width, dim, 1)
        self.width = heads * width

    def forward(self, x):
        # The twin cuts its own input into heads; the number of channels is that of f and v.
        b, _, h, w = x.shape
        f, v, fold, d = self.f(x), self.v(x), self.fold, self.width // self.heads
        f, v = self.regions(f), self.regions(v)
        centers, value_centers = (F.adaptive_avg_pool2d(y, 2).flatten(2).transpose(1, 2) for y in (f, v))
        cosines = F.normalize(centers, dim=-1) @ F.normalize(f.flatten(2), dim=1)
        sim = torch.sigmoid(self.sim_beta + self.sim_alpha * cosines)
        best, index = sim.max(dim=1, keepdim=True)
        sim = torch.zeros_like(sim).scatter(1, index, best)
        gathered = (sim @ v.flatten(2).transpose(1, 2) + value_centers) / (sim.sum(-1, keepdim=True) + 1)
        out = (sim.transpose(1, 2) @ gathered).view(b * self.heads, fold, fold, h // fold, w // fold, d)
        return self.proj(out.permute(0, 5, 1, 3, 2, 4).reshape(b, self.width, h, w))


class ClusterBlock(nn.Module):
    def __init__(self, dim, ratio, heads, width, fold):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, dim), nn.GroupNorm(1, dim)
        self.token_mixer, self.mlp = Clusters(dim, heads, width, fold), Mlp(dim, int(dim * ratio))
        self.layer_scale_1, self.layer_scale_2 = (nn.Parameter(torch.full((dim,), 1e-5)) for _ in range(2))

    def forward(self, x):
        x = x + self.layer_scale_1[:, None, None] * self.token_mixer(self.norm1(x))
        y = self.mlp(self.norm2(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.layer_scale_2[:, None, None] * y


class ContextCluster(nn.Module):
    """arXiv 2303.01494."""

    def __init__(self, layers, dims, heads, width, ratios=(8, 8, 4, 4), folds=(8, 4, 2, 1), classes=1000):
        super().__init__()
        reducer = lambda a, b, side, stride, pad: nn.ModuleDict({"proj": nn.Conv2d(a, b, side, stride, pad)})
        self.patch_embed = reducer(5, dims[0], 4, 4, 0)
        self.network = nn.ModuleList()
        for s, depth in enumerate(layers):
            blocks = (ClusterBlock(dims[s], ratios[s], heads[s], width, folds[s]) for _ in range(depth))
            self.network.append(nn.Sequential(*blocks))
            if s + 1 < len(layers):
                self.network.append(reducer(dims[s], dims[s + 1], 3, 2, 1))
        self.norm, self.head = nn.GroupNorm(1, dims[-1]), nn.Linear(dims[-1], classes)

    def forward(self, x):
        b, _, h, w = x.shape
        rows, cols = torch.arange(h) / (h - 1) - 0.5, torch.arange(w) / (w - 1) - 0.5
        place = torch.stack(torch.meshgrid(rows, cols, indexing="ij")).expand(b, 2, h, w)
        x = self.patch_embed["proj"](torch.cat([x, place], 1))
        for part in self.network:
            x = part["proj"](x) if isinstance(part, nn.ModuleDict) else part(x)
        return self.head(self.norm(x).mean((2, 3)))


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


#: karat's name -> how to build it, for `depths` if it is to be cut.
NETWORKS = {
    "dilateformer_tiny": lambda depths=(2, 2, 6, 2): DilateFormer(depths),
    "coc_tiny": lambda depths=(3, 4, 5, 2): ContextCluster(depths, (32, 64, 196, 320), (4, 4, 8, 8), 24),
    "t2t_vit_14": lambda depths=14: T2t(384, depths, 6, 3),
    "t2t_vit_t_14": lambda depths=14: T2t(384, depths, 6, 3, performer=False),
    "xvit_tiny": lambda depths=24: Xvit(192, 96, depths),
    "pvt_tiny": lambda depths=(2, 2, 2, 2): Pvt(depths),
}
