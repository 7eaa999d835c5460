"""ViT with Gaussian mixture masks (arXiv 2309.05375)."""

import torch
from torch import nn

from twins.gmm_retnet import GaussianMixture

from .parts import bare


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
