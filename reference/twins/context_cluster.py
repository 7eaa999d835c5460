"""Twin of CoC's clustering, with the dense `[centres, points]` tables of the released code."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Cluster(nn.Module):
    def __init__(self, dim, heads, fold):
        super().__init__()
        self.heads, self.fold = heads, fold
        self.f, self.v, self.proj = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.sim_alpha, self.sim_beta = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def regions(self, x):
        """`[B, C, H, W]` → `[B · heads · regions, d, R, S]`."""
        b, c, h, w = x.shape
        fold, d = self.fold, c // self.heads
        x = x.view(b * self.heads, d, fold, h // fold, fold, w // fold)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, d, h // fold, w // fold)

    def forward(self, x):
        b, c, h, w = x.shape
        fold, d = self.fold, c // self.heads
        f, v = self.regions(self.f(x)), self.regions(self.v(x))
        centers = F.adaptive_avg_pool2d(f, 2).flatten(2).transpose(1, 2)
        value_centers = F.adaptive_avg_pool2d(v, 2).flatten(2).transpose(1, 2)
        values = v.flatten(2).transpose(1, 2)  # [B', N, d]
        cosines = F.normalize(centers, dim=-1) @ F.normalize(f.flatten(2), dim=1)
        sim = torch.sigmoid(self.sim_beta + self.sim_alpha * cosines)  # [B', M, N]
        best, index = sim.max(dim=1, keepdim=True)
        sim = torch.zeros_like(sim).scatter(1, index, best)
        gathered = (sim @ values + value_centers) / (sim.sum(-1, keepdim=True) + 1)
        out = sim.transpose(1, 2) @ gathered  # [B', N, d]
        out = out.view(b * self.heads, fold, fold, h // fold, w // fold, d).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
        return self.proj(out)


def cluster(tokens, dim, heads):
    side = math.isqrt(tokens)
    assert side * side == tokens, "a square map"
    fold = side // 7 if side % 7 == 0 else 1
    return Cluster(dim, heads, fold), (torch.randn(1, dim, side, side, requires_grad=True),)


TWINS = {"attention.cluster": cluster}
