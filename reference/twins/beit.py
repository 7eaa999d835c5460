"""PyTorch twin of BEiT's attention (arXiv 2106.08254): q and v biases, relative position bias, a class token before a square grid."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def relative_index(h, w):
    """Rows of the table for every pair of [class; patches]: query minus key; the last three rows belong to the class token."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    y, x = y.flatten(), x.flatten()
    inner = (y[:, None] - y[None] + h - 1) * (2 * w - 1) + x[:, None] - x[None] + w - 1
    rows = (2 * h - 1) * (2 * w - 1) + 3
    index = torch.empty(1 + h * w, 1 + h * w, dtype=torch.long)
    index[1:, 1:], index[0, :], index[:, 0], index[0, 0] = inner, rows - 3, rows - 2, rows - 1
    return index


class BeitAttention(nn.Module):
    """The bias is gathered once per call and handed to the fused attention as its mask."""

    def __init__(self, dim, heads, side):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("zeros", torch.zeros(dim))
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, heads))
        self.register_buffer("index", relative_index(side, side))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.zeros, self.v_bias)))
        q, k, v = qkv.view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(n, n, self.heads).permute(2, 0, 1).unsqueeze(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


def beit(tokens, dim, heads):
    side = math.isqrt(tokens)
    return BeitAttention(dim, heads, side), (torch.randn(1, 1 + side * side, dim, requires_grad=True),)


TWINS = {"attention.beit": beit}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, build in TWINS.items():
        module, inputs = build(196, 384, 8)
        y = module(*inputs)
        y.sum().backward()
        print(name, tuple(y.shape))
