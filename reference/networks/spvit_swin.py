"""SPViT-Swin (arXiv 2111.11802), finished."""

import torch
from torch import nn
from torch.nn import functional as F

from twins.spvit import Folded, SinglePathWindow

from .parts import Block, tokens
from .um_swin import partition, unpartition

# The column of `head_probs` for place 3 · column + row of the kernel: the centre comes first.
COLUMNS = [1, 2, 3, 4, 0, 5, 6, 7, 8]


class FoldedConv(Folded):
    """Convolution k×k, BatchNorm, ReLU, convolution 1×1 on a whole map."""

    def __init__(self, dim, heads, kernel):
        super().__init__(dim, heads, 100.0)
        self.kernel = kernel
        self.add_module(f"bn_{kernel}x{kernel}", nn.BatchNorm2d(dim // heads))

    def forward(self, x):
        weight, bias, out = self.weights(COLUMNS if self.kernel == 3 else COLUMNS[4:5])
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=self.kernel // 2)
        y = F.relu(getattr(self, f"bn_{self.kernel}x{self.kernel}")(y))
        return F.conv2d(y, out, self.proj.bias).permute(0, 2, 3, 1)


class ShiftedWindows(SinglePathWindow):
    """Attention in windows of a map rolled by `shift`."""

    def __init__(self, dim, heads, side, window, shift):
        super().__init__(dim, heads, window)
        self.shift = shift
        stripe = torch.bucketize(torch.arange(side), torch.tensor([side - window, side - shift]), right=True)
        region = partition((3 * stripe[:, None] + stripe)[None, :, :, None], window)[..., 0]
        self.apart = -100.0 * (region[:, None] != region[:, :, None]) if shift else None

    def forward(self, x):
        rolled = x.roll((-self.shift, -self.shift), (1, 2))
        y = super().forward(partition(rolled, self.window), self.apart)
        return unpartition(y, len(x), x.shape[1]).roll((self.shift, self.shift), (1, 2))


class Merging(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        return self.reduction(self.norm(torch.cat([x[:, row::2, col::2] for col in (0, 1) for row in (0, 1)], -1)))


class SpvitSwin(nn.Module):
    """`stages`: for every stage its blocks, `s` (skip), `1`, `3` (convolutions) or `M` (windows); `hidden`: the width of every MLP."""

    def __init__(self, stages, hidden, dim=96, heads=(3, 6, 12, 24), image=224, window=7, classes=1000):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 4, 4), "norm": nn.LayerNorm(dim)})
        self.layers, widths = nn.ModuleList(), iter(hidden)
        for l, kinds in enumerate(stages):
            c, side = dim << l, image // 4 >> l
            own = min(window, side)
            build = {"s": nn.Identity, "1": lambda: FoldedConv(c, heads[l], 1), "3": lambda: FoldedConv(c, heads[l], 3)}
            blocks = nn.ModuleList()
            for j, kind in enumerate(kinds):
                shift = window // 2 if j % 2 and side > window else 0
                attn = build[kind]() if kind in build else ShiftedWindows(c, heads[l], side, own, shift)
                # Half a unit more, so that the hidden width survives the division.
                blocks.append(Block(attn, c, (next(widths) + 0.5) / c, 1e-5))
            stage = nn.ModuleDict({"blocks": blocks})
            if l + 1 < len(stages):
                stage["downsample"] = Merging(c)
            self.layers.append(stage)
        self.norm, self.head = nn.LayerNorm(c), nn.Linear(c, classes)

    def forward(self, x):
        x = self.patch_embed["proj"](x).permute(0, 2, 3, 1)
        x = self.patch_embed["norm"](x)
        for stage in self.layers:
            for block in stage["blocks"]:
                x = block(x)
            x = stage["downsample"](x) if "downsample" in stage else x
        return self.head(self.norm(x).mean((1, 2)))


SWIN_T_HIDDEN = (186, 152, 646, 504, 1350, 1319, 1289, 1249, 1234, 1082, 3041, 2994)
