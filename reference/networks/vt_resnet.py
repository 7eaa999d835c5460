"""ResNets with visual tokens (arXiv 2006.03677)."""

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from .parts import bare, tokens


class VisualTokens(nn.Module):
    """A block of the paper's equations: tokens `[B, L, C_T]`, their transformer and, but for the last, the way back into the map."""

    token_axis = 1

    def __init__(self, channels, width, count, recurrent, projector):
        super().__init__()
        first = {"w_t2r": bare(width, channels)} if recurrent else {"w_a": bare(channels, count)}
        self.tokenizer = nn.ModuleDict(first | {"w_v": bare(channels, width)})
        parts = {"key": (width, width // 2), "query": (width, width // 2), "fc1": (width, width), "fc2": (width, width)}
        self.transformer = nn.ModuleDict({name: bare(*shape) for name, shape in parts.items()})
        if projector:
            parts = {"w_q": (channels, channels), "w_k": (width, channels), "w_v": (width, channels)}
            self.projector = nn.ModuleDict({name: bare(*shape) for name, shape in parts.items()})

    def forward(self, x, t):
        rows = self.tokenizer["w_a"].weight if t is None else self.tokenizer["w_t2r"](t)
        attn = (x @ rows.transpose(-2, -1)).softmax(1)
        t = self.tokenizer["w_v"](attn.transpose(1, 2) @ x)
        part = self.transformer
        t = t + F.scaled_dot_product_attention(part["key"](t), part["query"](t), t, scale=1.0)
        t = t + part["fc2"](F.relu(part["fc1"](t)))
        if hasattr(self, "projector"):
            part = self.projector
            x = x + F.scaled_dot_product_attention(part["w_q"](x), part["w_k"](t), part["w_v"](t), scale=1.0)
        return x, t


class MultiheadTokens(nn.Module):
    """A block of the appendix's pseudo-code: heads, grouped maps with biases, and the positions of the tokens as channels."""

    token_axis = 2

    def __init__(self, channels, width, count, recurrent, projector, heads=16, groups=16, token_groups=8, side=14):
        super().__init__()
        self.heads = heads
        one, maps = (lambda a, b, g=1: nn.Conv1d(a, b, 1, groups=g)), (lambda a, b, g=1: nn.Conv2d(a, b, 1, groups=g))
        if recurrent:
            first = {"conv_query": one(width, channels), "conv_key": maps(channels, channels, groups)}
        else:
            first = {"conv_token_coef": maps(channels, count)}
        kinds, places = heads if recurrent else 1, side**2 // 4
        position = {"ds_conv": nn.Sequential(nn.Conv2d(kinds, kinds, 3, 2, 1), maps(kinds, 1)), "pos_conv": one(places, places)}
        rest = {"conv_value": maps(channels, channels, groups), "pos_encoding": nn.ModuleDict(position)}
        self.tokenizer = nn.ModuleDict(first | rest | {"conv_token": one(channels + places, width)})
        half = width // 2
        parts = {"k_conv": one(width, half, token_groups), "q_conv": one(width, half, token_groups)}
        self.transformer = nn.ModuleDict(parts | {"v_conv": one(width, width, token_groups), "ff_conv": one(width, width)})
        if projector:
            parts = {"proj_value_conv": one(width, channels), "proj_key_conv": one(width, channels)}
            self.projector = nn.ModuleDict(parts | {"proj_query_conv": maps(channels, channels, groups)})

    def forward(self, x, t):
        """`x` `[B, HW, C]`, `t` `[B, C_T, L]`."""
        b, n, c = x.shape
        apart = lambda y: y.unflatten(1, (self.heads, -1)).flatten(3)
        x, part = x.transpose(1, 2).unflatten(2, (round(n**0.5), -1)), self.tokenizer
        kept = None
        if t is None:
            coef = (part["conv_token_coef"](x).flatten(2) / c**0.5).softmax(-1)[:, None]
        else:
            mixed, kept = t.tensor_split((t.shape[-1] // 2,), -1)
            query = apart(part["conv_query"](mixed))
            coef = (query.transpose(2, 3) @ apart(part["conv_key"](x)) / (c / self.heads) ** 0.5).softmax(-1)
        pooled = (apart(part["conv_value"](x)) @ coef.transpose(2, 3)).flatten(1, 2)
        places = coef.transpose(1, 2).flatten(0, 1).unflatten(2, x.shape[2:])
        places = part["pos_encoding"]["ds_conv"](places).view(b, coef.shape[2], -1).transpose(1, 2)
        new = part["conv_token"](torch.cat((pooled, part["pos_encoding"]["pos_conv"](places)), 1))
        t = new if kept is None else torch.cat((kept, new), -1)
        part = self.transformer
        key, query, value = (apart(part[f"{name}_conv"](t)) for name in "kqv")
        mixture = (key.transpose(2, 3) @ query / t.shape[-1] ** 0.5).softmax(2)
        t = t + (value @ mixture).flatten(1, 2)
        t = t + part["ff_conv"](t)
        if hasattr(self, "projector"):
            part = self.projector
            query, key, value = (apart(part[f"proj_{name}_conv"](y)) for name, y in (("query", x), ("key", t), ("value", t)))
            x = x + F.scaled_dot_product_attention(*(y.transpose(2, 3) for y in (query, key, value))).transpose(2, 3).reshape(x.shape)
        return tokens(x), t


class VtResnet(nn.Module):
    """arXiv 2006.03677: ResNet-18 whose last stage is two blocks of visual tokens."""

    def __init__(self, layers, block=VisualTokens, blocks=2, width=1024, count=16, classes=1000):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for s, depth in enumerate(layers):
            stage = nn.Sequential()
            for j in range(depth):
                outputs, stride = 64 << s, 2 if s and j == 0 else 1
                down = None
                if stride > 1 or inputs != outputs:
                    down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
                stage.append(BasicBlock(inputs, outputs, stride, down))
                inputs = outputs
            self.add_module(f"layer{s + 1}", stage)
        self.stages = len(layers)
        self.vt = nn.ModuleList(block(inputs, width, count, j > 0, j + 1 < blocks) for j in range(blocks))
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for s in range(self.stages):
            x = getattr(self, f"layer{s + 1}")(x)
        x, t = tokens(x), None
        for block in self.vt:
            x, t = block(x, t)
        return self.fc(t.mean(self.vt[-1].token_axis))
