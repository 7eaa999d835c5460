"""Whole networks that timm lacks, in plain PyTorch under the published parameter names: what `check_models.py` compares karat with.

Written from the specifications on top of the attention of `twins`; each takes the sizes of its published variants.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from twins.context_cluster import Cluster
from twins.dilateformer import Dilated, Global
from twins.gmm_retnet import GaussianMixture
from twins.spvit import SinglePathConv
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


def smaller(downsample, x):
    """A convolution on tokens of a square map."""
    return tokens(downsample(x.transpose(1, 2).unflatten(2, (round(x.shape[1] ** 0.5),) * 2)))


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


class UmWindow(nn.Module):
    """Windows of a regular map, shifted by rolling; the bias is an MLP of the distance of two tokens."""

    def __init__(self, dim, heads, window, shift, hidden=32):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.posmlp = nn.Sequential(nn.Conv2d(2, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, heads, 1))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def windows(self, x):
        """`[B, R, R, …]` → `[B · windows, w², …]`."""
        b, r, w = len(x), x.shape[1], self.window
        return x.unflatten(2, (r // w, w)).unflatten(1, (r // w, w)).transpose(2, 3).reshape(b * (r // w) ** 2, w * w, *x.shape[3:])

    def forward(self, x, positions):
        b, n, c = x.shape
        r, w, s = round(n**0.5), self.window, self.shift
        roll = lambda y, by: y.roll((by, by), (1, 2))
        x, pos = (self.windows(roll(y, -s)) for y in (x.view(b, r, r, c), positions))
        offset = (pos[:, None] - pos[:, :, None]).permute(0, 3, 1, 2)
        bias = self.posmlp(offset.sign() * offset.abs().log1p())
        if s:
            stripe = torch.bucketize(torch.arange(r), torch.tensor([r - w, r - s]), right=True)
            region = self.windows((3 * stripe[:, None] + stripe)[None, :, :, None].float())[..., 0]
            bias = bias - 100.0 * (region[:, None] != region[:, :, None])[:, None]
        q, k, v = self.qkv(x).view(len(x), w * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias.repeat(b, 1, 1, 1)).transpose(1, 2).flatten(2))
        y = y.view(b, r // w, r // w, w, w, c).transpose(2, 3).reshape(b, r, r, c)
        return roll(y, s).reshape(b, n, c)


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


class Hpvit(nn.Module):
    """A plain ViT on a map of a quarter of the image's side, with windows and pooling between stages; 224-pixel images."""

    def __init__(self, depths, dim=768, heads=12, windows=(14, 14, 0, 0), classes=1000):
        super().__init__()
        self.depths, self.windows = depths, windows
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 16, 4, 6)})
        self.pos_embed = nn.Parameter(torch.randn(1, 56 * 56, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(Softmax(dim, heads, bias=True), dim, 4, 1e-6) for _ in range(sum(depths)))
        self.fc_norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)

    def forward(self, x):
        x = tokens(self.patch_embed["proj"](x)) + self.pos_embed
        blocks = iter(self.blocks)
        for s, depth in enumerate(self.depths):
            b, n, c = x.shape
            side = round(n**0.5)
            if s:
                side //= 2
                x = tokens(F.avg_pool2d(x.transpose(1, 2).unflatten(2, (2 * side,) * 2), 2))
            w = self.windows[s] if 0 < self.windows[s] < side else side
            # Windows of all images are the batch of the blocks of a stage: the maps here divide into them.
            x = x.view(b, side // w, w, side // w, w, c).transpose(2, 3).reshape(-1, w * w, c)
            for _ in range(depth):
                x = next(blocks)(x)
            x = x.view(b, side // w, side // w, w, w, c).transpose(2, 3).reshape(b, side * side, c)
        return self.head(self.fc_norm(x.mean(1)))


def bare(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class VisualTokens(nn.Module):
    """A block of the paper's equations: tokens, their transformer and, but for the last, the way back into the map."""

    def __init__(self, channels, width, count, recurrent, projector):
        super().__init__()
        first = {"w_t2r": bare(width, channels)} if recurrent else {"w_a": bare(channels, count)}
        self.tokenizer = nn.ModuleDict(first | {"w_v": bare(channels, width)})
        parts = {"key": (width, width // 2), "query": (width, width // 2), "fc1": (width, width), "fc2": (width, width)}
        self.transformer = nn.ModuleDict({name: bare(*shape) for name, shape in parts.items()})
        if projector:
            parts = {"w_q": (channels, channels), "w_k": (width, channels), "w_v": (width, channels)}
            self.projector = nn.ModuleDict({name: bare(*shape) for name, shape in parts.items()})

    def forward(self, x, t):
        rows = self.tokenizer["w_a"].weight if t is None else self.tokenizer["w_t2r"](t)
        attn = (x @ rows.transpose(-2, -1)).softmax(1)
        t = self.tokenizer["w_v"](attn.transpose(1, 2) @ x)
        part = self.transformer
        t = t + F.scaled_dot_product_attention(part["key"](t), part["query"](t), t, scale=1.0)
        t = t + part["fc2"](F.relu(part["fc1"](t)))
        if hasattr(self, "projector"):
            part = self.projector
            x = x + F.scaled_dot_product_attention(part["w_q"](x), part["w_k"](t), part["w_v"](t), scale=1.0)
        return x, t


class VtResnet(nn.Module):
    """arXiv 2006.03677: ResNet-18 whose last stage is two blocks of visual tokens."""

    def __init__(self, layers, blocks=2, width=1024, count=16, classes=1000):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for s, depth in enumerate(layers):
            stage = nn.Sequential()
            for j in range(depth):
                outputs, stride = 64 << s, 2 if s and j == 0 else 1
                down = None
                if stride > 1 or inputs != outputs:
                    down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
                stage.append(BasicBlock(inputs, outputs, stride, down))
                inputs = outputs
            self.add_module(f"layer{s + 1}", stage)
        self.stages = len(layers)
        self.vt = nn.ModuleList(VisualTokens(inputs, width, count, j > 0, j + 1 < blocks) for j in range(blocks))
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for s in range(self.stages):
            x = getattr(self, f"layer{s + 1}")(x)
        x, t = tokens(x), None
        for block in self.vt:
            x, t = block(x, t)
        return self.fc(t.mean(1))


class Normed(nn.Module):
    """`fn(norm x)`, with the names of GMM-ViT's code."""

    def __init__(self, dim, fn):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x):
        return self.fn(self.norm(x))


class GaussianAttention(nn.Module):
    def __init__(self, dim, heads, width, side):
        super().__init__()
        self.heads, self.scale = heads, width**-0.5
        self.to_qkv, self.to_out = bare(dim, 3 * heads * width), nn.Sequential(nn.Linear(heads * width, dim))
        self.mask = GaussianMixture(heads, (side, side))

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = self.mask() * ((q * self.scale) @ k.transpose(-2, -1))
        return self.to_out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class GmmMlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, dim))

    def forward(self, x):
        return self.net(x)


class GmmVit(nn.Module):
    """arXiv 2309.05375, for 32-pixel images."""

    def __init__(self, depth, dim=192, heads=12, width=16, patch=4, classes=1000):
        super().__init__()
        self.patch, side = patch, 32 // patch
        self.to_patch_embedding = nn.Sequential(nn.Identity(), nn.Linear(3 * patch * patch, dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, side * side, dim))
        pair = lambda: nn.ModuleList([Normed(dim, GaussianAttention(dim, heads, width, side)), Normed(dim, GmmMlp(dim, 2 * dim))])
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(pair() for _ in range(depth))})
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, x):
        p = self.patch
        b, c, h, w = x.shape
        x = x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)
        x = self.to_patch_embedding(x) + self.pos_embedding
        for attn, mlp in self.transformer["layers"]:
            x = x + attn(x)
            x = x + mlp(x)
        return self.mlp_head(x.mean(1))

    def state_dict(self, *args, **kwargs):
        # The tables that the twin's mask keeps are not the published ones.
        return {name: x for name, x in super().state_dict(*args, **kwargs).items() if not name.endswith((".squares", ".index"))}


class PointConv(SinglePathConv):
    """The folded 1×1 bottleneck: the kernel's centre alone."""

    def __init__(self, dim, heads, side):
        super().__init__(dim, heads, side)
        self.bn_1x1 = self.bn_3x3
        del self.bn_3x3

    def forward(self, x):
        b, _, c = x.shape
        heads, d = self.heads, c // self.heads
        share = (self.head_probs / self.alpha).softmax(0)[:, 4]
        weight = torch.einsum("n,njc->jc", share, self.v.weight.view(heads, d, c))
        out = torch.einsum("n,cnj->cj", share, self.proj.weight.view(c, heads, d))
        y = F.linear(x[:, 1:], weight, share @ self.v.bias.view(heads, d))
        y = F.relu(self.bn_1x1(y.transpose(1, 2)[..., None]))[..., 0].transpose(1, 2)
        return torch.cat((x[:, :1], F.linear(y, out, self.proj.bias)), 1)


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
        build = {"1": lambda: PointConv(dim, heads, 14), "3": lambda: SinglePathConv(dim, heads, 14), "M": lambda: QkAttention(dim, heads)}
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

#: karat's name -> how to build it, for `depths` if it is to be cut.
NETWORKS = {
    "dilateformer_tiny": lambda depths=(2, 2, 6, 2): DilateFormer(depths),
    "coc_tiny": lambda depths=(3, 4, 5, 2): ContextCluster(depths, (32, 64, 196, 320), (4, 4, 8, 8), 24),
    "t2t_vit_14": lambda depths=14: T2t(384, depths, 6, 3),
    "t2t_vit_t_14": lambda depths=14: T2t(384, depths, 6, 3, performer=False),
    "xvit_tiny": lambda depths=24: Xvit(192, 96, depths),
    "pvt_tiny": lambda depths=(2, 2, 2, 2): Pvt(depths),
    "pvt_small_256": lambda depths=(3, 4, 6, 3): UmPvt(depths),
    "um_swin_tiny_256": lambda depths=(2, 2, 6, 2): UmSwin(depths),
    "hpvit_base": lambda depths=(2, 2, 6, 2): Hpvit(depths),
    "vt_resnet18": lambda depths=(2, 2, 2): VtResnet(depths),
    "gmm_vit": lambda depths=9: GmmVit(depths),
    "spvit_deit_b_l008_t60": lambda: Spvit("11133MMMMMMM", DEIT_B_HIDDEN, 768, 12),
}
