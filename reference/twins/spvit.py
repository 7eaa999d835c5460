"""PyTorch twins of SPViT's layers (arXiv 2111.11802): the folded 3×3 bottleneck of a finished DeiT layer, in training, and Swin's window
attention with `qk` beside `v`. The folding is part of a step, as in fine-tuning.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Folded(nn.Module):
    """Attention weights whose heads are mixed for every place of a convolution's kernel."""

    def __init__(self, dim, heads, alpha):
        super().__init__()
        self.heads, self.alpha = heads, alpha
        self.v, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.head_probs = nn.Parameter(torch.ones(heads, 9))

    def weights(self, columns):
        """The weight of convolution k×k, its bias, and the weight of the 1×1 after it.

        `columns` of `head_probs`, one for each place 3 · column + row of the kernel.
        """
        heads, k = self.heads, math.isqrt(len(columns))
        mixture = (self.head_probs / self.alpha).softmax(0)[:, columns]
        share = mixture.sum(1)
        weight = torch.einsum("np,njc->jcp", mixture, self.v.weight.unflatten(0, (heads, -1)))
        out = torch.einsum("n,cnj->cj", share, self.proj.weight.unflatten(1, (heads, -1)))
        return weight.unflatten(2, (k, k)).transpose(2, 3), share @ self.v.bias.unflatten(0, (heads, -1)), out[:, :, None, None]


class SinglePathConv(Folded):
    """The class token passes; patches go through conv 3×3, BatchNorm, ReLU, conv 1×1 with folded weights."""

    def __init__(self, dim, heads, side):
        super().__init__(dim, heads, 0.01)
        self.side = side
        self.bn_3x3 = nn.BatchNorm2d(dim // heads)

    def forward(self, x):
        b, _, c = x.shape
        weight, bias, out = self.weights(range(9))
        t = x[:, 1:].transpose(1, 2).reshape(b, c, self.side, self.side)
        y = F.conv2d(F.relu(self.bn_3x3(F.conv2d(t, weight, bias, padding=1))), out, self.proj.bias)
        return torch.cat((x[:, :1], y.flatten(2).transpose(1, 2)), 1)


class SinglePathWindow(nn.Module):
    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.qk, self.v, self.proj = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        offset = at[:, :, None] - at[:, None] + window - 1
        self.register_buffer("relative_position_index", (offset[0] * (2 * window - 1) + offset[1]).flatten())

    def forward(self, x, apart=None):
        """`apart` `[windows, n, n]`: further logits for the windows of an image."""
        n = self.window**2
        q, k = self.qk(x).unflatten(-1, (2, self.heads, -1)).movedim(-3, 0).transpose(-3, -2).unbind(0)
        v = self.v(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        bias = self.relative_position_bias_table[self.relative_position_index].view(n, n, -1).permute(2, 0, 1)
        bias = bias[None] if apart is None else (bias + apart[:, None]).repeat(len(x) // len(apart), 1, 1, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(-3, -2).flatten(-2))


def single_path(tokens, dim, heads):
    side = math.isqrt(tokens)
    return SinglePathConv(dim, heads, side), (torch.randn(1, 1 + tokens, dim, requires_grad=True),)


def single_path_window(tokens, dim, heads, window=7):
    return SinglePathWindow(dim, heads, window), (torch.randn(tokens // window**2, window**2, dim, requires_grad=True),)


TWINS = {"attention.single_path": single_path, "attention.single_path_window": single_path_window}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, build in TWINS.items():
        module, inputs = build(196, 384, 8)
        y = module(*inputs)
        y.sum().backward()
        print(name, tuple(y.shape))
