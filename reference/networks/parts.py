"""What several networks are made of."""

from torch import nn
from torch.nn import functional as F


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Softmax(nn.Module):
    """Multi-head attention; queries and keys from one `qkv`."""

    def __init__(self, dim: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    """`x + attn(norm1 x)`, then `x + mlp(norm2 x)`."""

    def __init__(self, attn: nn.Module, dim: int, ratio: float, eps: float):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim, eps=eps), attn, nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def tokens(x):
    """`[B, C, H, W]` → `[B, HW, C]`."""
    return x.flatten(2).transpose(1, 2)


def smaller(downsample, x):
    """A convolution on tokens of a square map."""
    return tokens(downsample(x.transpose(1, 2).unflatten(2, (round(x.shape[1] ** 0.5),) * 2)))


def bare(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)
