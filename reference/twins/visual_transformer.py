"""Visual Transformers: one block of the paper's equations, filter tokenizer, 16 tokens as wide as the map."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class VisualTokens(nn.Module):
    def __init__(self, channels: int, tokens: int):
        super().__init__()
        linear = lambda a, b: nn.Linear(a, b, bias=False)
        self.w_a, self.w_v = linear(channels, tokens), linear(channels, channels)
        self.key, self.query = linear(channels, channels // 2), linear(channels, channels // 2)
        self.fc1, self.fc2 = linear(channels, channels), linear(channels, channels)
        self.proj_q, self.proj_k, self.proj_v = (linear(channels, channels) for _ in range(3))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x):
        pixels = x.flatten(2).transpose(1, 2)
        attn = self.w_a(pixels).softmax(dim=1)
        tokens = self.w_v(attn.transpose(1, 2) @ pixels)
        key, query = self.key(tokens), self.query(tokens)
        tokens = tokens + F.scaled_dot_product_attention(key, query, tokens, scale=1.0)
        tokens = tokens + self.fc2(F.relu(self.fc1(tokens)))
        out = F.scaled_dot_product_attention(self.proj_q(pixels), self.proj_k(tokens), self.proj_v(tokens), scale=1.0)
        return (pixels + out).transpose(1, 2).reshape(x.shape)


def visual_tokens(tokens: int, dim: int, heads: int):
    side = math.isqrt(tokens)
    return VisualTokens(dim, 16), (torch.randn(1, dim, side, side, requires_grad=True),)


TWINS = {"attention.visual_tokens": visual_tokens}
