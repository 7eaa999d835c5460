"""Sheet `swin`: (shifted) window attention and the Swin Transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Op, Scope
from .vit import attention_shapes, conv_shapes, layer_norm, linear, linear_shapes, mlp, mlp_shapes
from .vit import norm_shapes, pair, patch_embed, self_attention, under

Pair = tuple[int, int]


def table_shape(window: Pair, heads: int) -> tuple[int, int]:
    return ((2 * window[0] - 1) * (2 * window[1] - 1), heads)


def relative_index(coords: Tensor, window: Pair) -> Tensor:
    """Row of the bias table for every (query, key) pair of `coords` [..., n, 2] -> [..., n, n]."""
    delta = coords.unsqueeze(-2) - coords.unsqueeze(-3)
    return (delta[..., 0] + window[0] - 1) * (2 * window[1] - 1) + delta[..., 1] + window[1] - 1


def to_windows(x: Tensor, window: Pair) -> Tensor:
    """[..., H, W, C] -> [..., nW, My*Mx, C], everything row-major."""
    x = x.unflatten(-3, (-1, window[0])).unflatten(-2, (-1, window[1]))
    return x.transpose(-4, -3).flatten(-3, -2).flatten(-4, -3)


def from_windows(x: Tensor, window: Pair, height: int, width: int) -> Tensor:
    """The inverse of `to_windows`."""
    x = x.unflatten(-3, (height // window[0], width // window[1])).unflatten(-2, window)
    return x.transpose(-4, -3).flatten(-3, -2).flatten(-4, -3)


def shift_mask(height: int, width: int, window: Pair, shift: Pair) -> Tensor:
    """[nW, n, n]: -100 between tokens that only the cyclic roll made neighbours, else 0."""

    def label(size, m, s):
        r = torch.arange(size)
        return (r >= size - m).long() + (r >= size - s).long() if s else torch.zeros(size, dtype=torch.long)

    rows, columns = label(height, window[0], shift[0]), label(width, window[1], shift[1])
    labels = to_windows((3 * rows[:, None] + columns)[..., None], window).squeeze(-1)
    return torch.where(labels[:, :, None] == labels[:, None, :], 0.0, -100.0)


def window_attention(x: Tensor, p: Scope, grid: Pair, heads: int, window: Pair, shift: Pair, scale=None, pad=False) -> Tensor:
    """Attention inside the windows of a row-major map [B, H*W, C]."""
    (height, width), (my, mx), (sy, sx) = grid, window, shift
    if not pad and (height % my or width % mx):
        raise ValueError(f"map {height}x{width} is not divisible into windows {my}x{mx}")
    x = x.unflatten(1, grid).roll((-sy, -sx), (1, 2))
    x = F.pad(x, (0, 0, 0, -width % mx, 0, -height % my))
    full = x.shape[1:3]
    local = torch.cartesian_prod(torch.arange(my), torch.arange(mx))
    bias = p["relative_position_bias_table"][relative_index(local, window)].permute(2, 0, 1)
    if sy or sx:
        bias = bias + shift_mask(*full, window, shift).to(x.dtype)[:, None]
    x = self_attention(to_windows(x, window), p, heads, scale, bias)
    x = from_windows(x, window, *full)[:, :height, :width]
    return x.roll((sy, sx), (1, 2)).flatten(1, 2)


def clip(grid: Pair, window: int, shift: int, pad: bool) -> tuple[Pair, Pair]:
    """Window and shift of a block: the official rule, or timm's (per axis) in `pad` mode."""
    if not pad:
        side = min(grid)
        return (pair(side), (0, 0)) if side <= window else (pair(window), pair(shift))
    windows = tuple(min(size, window) for size in grid)
    return windows, tuple(0 if size <= m else shift for size, m in zip(grid, windows))


def window_attention_shapes(dim: int, heads: int, window: Pair, qkv_bias: bool) -> dict:
    return {"relative_position_bias_table": table_shape(window, heads)} | attention_shapes(dim, heads, qkv_bias)


def block_shapes(dim, heads, window: Pair, mlp_ratio, qkv_bias) -> dict:
    attn = under("attn", window_attention_shapes(dim, heads, window, qkv_bias))
    return norm_shapes("norm1", dim) | attn | norm_shapes("norm2", dim) | mlp_shapes(dim, mlp_ratio)


def block(x, p: Scope, grid: Pair, heads: int, window: Pair, shift: Pair, eps: float, scale=None, pad=False) -> Tensor:
    x = x + window_attention(layer_norm(x, p.at("norm1"), eps), p.at("attn"), grid, heads, window, shift, scale, pad)
    return x + mlp(layer_norm(x, p.at("norm2"), eps), p.at("mlp"))


def merging_shapes(dim: int) -> dict:
    return norm_shapes("norm", 4 * dim) | linear_shapes("reduction", 4 * dim, 2 * dim, bias=False)


def patch_merging(x: Tensor, p: Scope, grid: Pair, eps: float, pad: bool = False) -> Tensor:
    """[B, HW, C] -> [B, ceil(H/2) ceil(W/2), 2C]; a 2x2 cell is read down first."""
    if not pad and (grid[0] % 2 or grid[1] % 2):
        raise ValueError(f"map {grid[0]}x{grid[1]} has an odd side")
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
    x = torch.cat([x[:, dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)], -1).flatten(1, 2)
    return linear(layer_norm(x, p.at("norm"), eps), p.at("reduction"))


def encoder_shapes(cfg) -> dict:
    """Parameters of a Swin without its head."""
    dim, patch, pad = cfg["embed_dim"], cfg["patch_size"], cfg.get("pad", False)
    grid = tuple(size // patch for size in pair(cfg["img_size"]))
    shapes = conv_shapes("patch_embed.proj", cfg["in_chans"], dim, patch)
    shapes |= norm_shapes("patch_embed.norm", dim) if cfg["patch_norm"] else {}
    shapes |= {"absolute_pos_embed": (1, grid[0] * grid[1], dim)} if cfg["ape"] else {}
    for i, (depth, heads) in enumerate(zip(cfg["depths"], cfg["num_heads"])):
        window, _ = clip(grid, cfg["window_size"], 0, pad)
        for j in range(depth):
            args = (dim, heads, window, cfg["mlp_ratio"], cfg["qkv_bias"])
            shapes |= under(f"layers.{i}.blocks.{j}", block_shapes(*args))
        if i + 1 < len(cfg["depths"]):
            shapes |= under(f"layers.{i}.downsample", merging_shapes(dim))
            grid, dim = tuple((size + 1) // 2 for size in grid), 2 * dim
    return shapes | norm_shapes("norm", dim)


def encode(cfg, p: Scope, image: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Pair]:
    """Tokens after the final norm and their grid; `masked` [B, N] puts `mask_token` in place of patch embeddings."""
    patch, eps, pad = cfg["patch_size"], cfg["norm_eps"], cfg.get("pad", False)
    grid = tuple(size // patch for size in image.shape[-2:])
    x = patch_embed(image, p.at("patch_embed"), patch, eps)
    if masked is not None:
        w = masked.unsqueeze(-1).to(x.dtype)
        x = x * (1 - w) + p["mask_token"] * w
    if cfg["ape"]:
        x = x + p["absolute_pos_embed"]
    for i, (depth, heads) in enumerate(zip(cfg["depths"], cfg["num_heads"])):
        for j in range(depth):
            window, shift = clip(grid, cfg["window_size"], cfg["window_size"] // 2 if j % 2 else 0, pad)
            x = block(x, p.at("layers", i, "blocks", j), grid, heads, window, shift, eps, cfg["qk_scale"], pad)
        if i + 1 < len(cfg["depths"]):
            x = patch_merging(x, p.at("layers", i, "downsample"), grid, eps, pad)
            grid = tuple((size + 1) // 2 for size in grid)
    return layer_norm(x, p.at("norm"), eps), grid


# Operations


def attention_window(cfg, inputs, p, buffers):
    grid, window, shift = (cfg["height"], cfg["width"]), pair(cfg["window_size"]), pair(cfg["shift_size"])
    return {"y": window_attention(inputs["x"], p, grid, cfg["num_heads"], window, shift, cfg["qk_scale"], cfg["pad"])}


def block_window(cfg) -> tuple[Pair, Pair]:
    return clip((cfg["height"], cfg["width"]), cfg["window_size"], cfg["shift_size"], cfg["pad"])


def block_swin(cfg, inputs, p, buffers):
    args = ((cfg["height"], cfg["width"]), cfg["num_heads"], *block_window(cfg), cfg["norm_eps"], cfg["qk_scale"], cfg["pad"])
    return {"y": block(inputs["x"], p, *args)}


def nn_patch_merging(cfg, inputs, p, buffers):
    return {"y": patch_merging(inputs["x"], p, (cfg["height"], cfg["width"]), cfg["norm_eps"], cfg["pad"])}


def swin_shapes(cfg) -> dict:
    width = cfg["embed_dim"] * 2 ** (len(cfg["depths"]) - 1)
    return encoder_shapes(cfg) | (linear_shapes("head", width, cfg["num_classes"]) if cfg["num_classes"] else {})


def model_swin(cfg, inputs, p, buffers):
    x = encode(cfg, p, inputs["image"])[0].mean(1)
    return {"logits": linear(x, p.at("head")) if cfg["num_classes"] else x}


OPS = {
    "attention.window": Op(
        attention_window,
        lambda c: window_attention_shapes(c["dim"], c["num_heads"], pair(c["window_size"]), c["qkv_bias"]),
    ),
    "block.swin": Op(
        block_swin,
        lambda c: block_shapes(c["dim"], c["num_heads"], block_window(c)[0], c["mlp_ratio"], c["qkv_bias"]),
    ),
    "nn.patch_merging": Op(nn_patch_merging, lambda c: merging_shapes(c["dim"])),
    "model.swin": Op(model_swin, swin_shapes),
}
