"""PyTorch twin of CaiT's talking-heads attention (arXiv 2103.17239).

As the released code computes them, q scaled first, mixes as linear maps over the head axis; nothing fused by hand.
"""

import torch
from torch import nn


class TalkingHeads(nn.Module):
    """Heads are mixed before and after the softmax."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj_l = nn.Linear(heads, heads)
        self.proj_w = nn.Linear(heads, heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        logits = self.proj_l(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.proj_w(logits.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


def tokens_of(tokens, dim):
    return (torch.randn(1, tokens, dim, requires_grad=True),)


def talking_heads(tokens, dim, heads):
    return TalkingHeads(dim, heads), tokens_of(tokens, dim)


TWINS = {"attention.talking_heads": talking_heads}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, build in TWINS.items():
        module, inputs = build(196, 384, 8)
        y = module(*inputs)
        y.sum().backward()
        print(name, tuple(y.shape))
