"""Context Cluster (arXiv 2303.01494)."""

import torch
from torch import nn
from torch.nn import functional as F

from twins.context_cluster import Cluster

from .parts import Mlp


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
