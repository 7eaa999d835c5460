"""DilateFormer (arXiv 2302.01791)."""

from torch import nn

from twins.dilateformer import Dilated, Global

from .parts import Block, tokens


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
