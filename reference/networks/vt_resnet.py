"""ResNets with visual tokens (arXiv 2006.03677)."""

from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from .parts import bare, tokens


class VisualTokens(nn.Module):
    """A block of the paper's equations: tokens, their transformer and, but for the last, the way back into the map."""

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


class VtResnet(nn.Module):
    """arXiv 2006.03677: ResNet-18 whose last stage is two blocks of visual tokens."""

    def __init__(self, layers, blocks=2, width=1024, count=16, classes=1000):
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
        self.vt = nn.ModuleList(VisualTokens(inputs, width, count, j > 0, j + 1 < blocks) for j in range(blocks))
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for s in range(self.stages):
            x = getattr(self, f"layer{s + 1}")(x)
        x, t = tokens(x), None
        for block in self.vt:
            x, t = block(x, t)
        return self.fc(t.mean(1))
