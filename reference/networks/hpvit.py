"""HPViT: a plain ViT as a pyramid."""

import torch
from torch import nn
from torch.nn import functional as F

from .parts import Block, Softmax, tokens


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
