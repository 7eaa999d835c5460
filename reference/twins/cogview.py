"""CogView: PB-relax, which in float32 range is plain causal attention, and windows with pivots in their training form."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class PbRelax(nn.Module):
    """The order of PB-relax changes the range, not the result: the fused kernel applies."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.dense = nn.Linear(dim, dim)

    def split(self, x):
        b, n, c = x.shape
        return self.query_key_value(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)

    def join(self, o):
        b, h, n, d = o.shape
        return self.dense(o.transpose(1, 2).reshape(b, n, h * d))

    def forward(self, x):
        q, k, v = self.split(x)
        return self.join(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Sparse(PbRelax):
    """Windows as strided views of padded keys, pivots gathered, one softmax over both."""

    def __init__(self, tokens, dim, heads, window, times, pivots):
        super().__init__(dim, heads)
        self.window, self.times = window, times
        index = torch.randperm(tokens)[:pivots].sort().values
        self.register_buffer("pivots", index)
        place = torch.arange(tokens)
        first = (place // window + 1 - times).clamp(min=0) * window
        bias = torch.full((tokens, pivots), -math.inf)
        bias[index[None, :] < first[:, None]] = math.log(tokens // pivots)
        self.register_buffer("pivot_bias", bias.view(tokens // window, window, pivots))
        keys = torch.arange(tokens // window)[:, None] * window + torch.arange(times * window) - (times - 1) * window
        seen = (keys[:, None, :] >= 0) & (keys[:, None, :] <= place.view(-1, window, 1))
        self.register_buffer("window_bias", torch.zeros(seen.shape).masked_fill(~seen, -math.inf))

    def forward(self, x):
        q, k, v = self.split(x)
        b, h, n, d = q.shape
        w, t = self.window, self.times
        q = (q * d**-0.5).view(b, h, n // w, w, d)
        near_k, near_v = (F.pad(z, (0, 0, (t - 1) * w, 0)).unfold(2, t * w, w) for z in (k, v))
        far_k, far_v = (z.index_select(2, self.pivots).unsqueeze(2) for z in (k, v))
        far = q @ far_k.transpose(-1, -2) + self.pivot_bias
        near = q @ near_k + self.window_bias
        p = torch.cat([far, near], -1).softmax(-1)
        count = self.pivots.numel()
        o = p[..., :count] @ far_v + p[..., count:] @ near_v.transpose(-1, -2)
        return self.join(o.reshape(b, h, n, d))


def inputs(tokens, dim):
    return (torch.randn(1, tokens, dim, requires_grad=True),)


def sparse(tokens, dim, heads):
    window = next(w for w in range(128, 0, -1) if tokens % w == 0)
    return Sparse(tokens, dim, heads, window, 6, min(tokens // 4, 768)), inputs(tokens, dim)


TWINS = {
    "attention.pb_relax": lambda tokens, dim, heads: (PbRelax(dim, heads), inputs(tokens, dim)),
    "attention.cogview_sparse": sparse,
}
