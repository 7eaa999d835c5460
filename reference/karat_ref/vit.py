"""Sheet `vit`: plain ViT / DeiT, and the primitives that the other sheets of the family share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Op, Scope

# Shapes of parameters, by published name


def under(prefix: str, shapes: dict) -> dict:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def linear_shapes(name: str, n_in: int, n_out: int, bias: bool = True) -> dict:
    return {f"{name}.weight": (n_out, n_in)} | ({f"{name}.bias": (n_out,)} if bias else {})


def norm_shapes(name: str, n: int) -> dict:
    return {f"{name}.weight": (n,), f"{name}.bias": (n,)}


def conv_shapes(name: str, n_in: int, n_out: int, kernel: int) -> dict:
    return {f"{name}.weight": (n_out, n_in, kernel, kernel), f"{name}.bias": (n_out,)}


def mlp_shapes(dim: int, ratio: float) -> dict:
    hidden = int(dim * ratio)
    return linear_shapes("mlp.fc1", dim, hidden) | linear_shapes("mlp.fc2", hidden, dim)


def attention_shapes(dim: int, heads: int, qkv_bias: bool, proj_bias: bool = True, qk_norm: bool = False) -> dict:
    norms = norm_shapes("q_norm", dim // heads) | norm_shapes("k_norm", dim // heads) if qk_norm else {}
    return linear_shapes("qkv", dim, 3 * dim, qkv_bias) | norms | linear_shapes("proj", dim, dim, proj_bias)


def block_shapes(dim, heads, mlp_ratio, qkv_bias, qk_norm=False, layer_scale=False) -> dict:
    attn = under("attn", attention_shapes(dim, heads, qkv_bias, qk_norm=qk_norm))
    scales = {"ls1.gamma": (dim,), "ls2.gamma": (dim,)} if layer_scale else {}
    return norm_shapes("norm1", dim) | attn | norm_shapes("norm2", dim) | mlp_shapes(dim, mlp_ratio) | scales


# Primitives


def linear(x: Tensor, p: Scope) -> Tensor:
    return F.linear(x, p["weight"], p.get("bias"))


def layer_norm(x: Tensor, p: Scope, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p["weight"], p["bias"], eps)


def mlp(x: Tensor, p: Scope) -> Tensor:
    return linear(F.gelu(linear(x, p.at("fc1"))), p.at("fc2"))


def patch_embed(image: Tensor, p: Scope, patch: int, eps: float = 1e-6) -> Tensor:
    """[B, in, H, W] -> row-major tokens [B, N, C]; with a norm if there are parameters for one."""
    x = F.conv2d(image, p["proj.weight"], p["proj.bias"], stride=patch).flatten(2).transpose(1, 2)
    return x if p.get("norm.weight") is None else layer_norm(x, p.at("norm"), eps)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[..., N, parts*C] -> `parts` tensors [..., h, N, d]; columns are part-major, then head, then channel."""
    x = x.unflatten(-1, (parts, heads, -1))
    return tuple(x.select(-3, i).transpose(-2, -3) for i in range(parts))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """softmax(s q kᵀ + A) v per head, heads concatenated: [..., h, N, d] -> [..., N, C]."""
    logits = (q * (scale or q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    return (logits.softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def self_attention(x: Tensor, p: Scope, heads: int, scale=None, bias=None, norm_eps: float = 1e-6) -> Tensor:
    q, k, v = split_heads(linear(x, p.at("qkv")), 3, heads)
    if p.get("q_norm.weight") is not None:
        q, k = layer_norm(q, p.at("q_norm"), norm_eps), layer_norm(k, p.at("k_norm"), norm_eps)
    return linear(attend(q, k, v, scale, bias), p.at("proj"))


def block(x: Tensor, p: Scope, heads: int, eps: float) -> Tensor:
    branch = self_attention(layer_norm(x, p.at("norm1"), eps), p.at("attn"), heads, norm_eps=eps)
    x = x + (branch if p.get("ls1.gamma") is None else p["ls1.gamma"] * branch)
    branch = mlp(layer_norm(x, p.at("norm2"), eps), p.at("mlp"))
    return x + (branch if p.get("ls2.gamma") is None else p["ls2.gamma"] * branch)


def sincos_2d(dim: int, grid: int, cls_token: bool) -> Tensor:
    """Fixed table [g² (+1), D]: sine and cosine of the column, then of the row."""
    if dim % 4:
        raise ValueError(f"embed_dim {dim}: not a multiple of 4")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    wave = torch.cat([angles.sin(), angles.cos()], -1)
    table = torch.cat([wave.repeat(grid, 1), wave.repeat_interleave(grid, 0)], -1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table]) if cls_token else table


def pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


# Operations


def attention_softmax(cfg, inputs, p, buffers):
    return {"y": self_attention(inputs["x"], p, cfg["num_heads"], norm_eps=cfg["norm_eps"])}


def block_vit(cfg, inputs, p, buffers):
    return {"y": block(inputs["x"], p, cfg["num_heads"], cfg["norm_eps"])}


def vit_shapes(cfg) -> dict:
    dim, (height, width), patch = cfg["embed_dim"], pair(cfg["img_size"]), cfg["patch_size"]
    tokens = (height // patch) * (width // patch) + cfg["class_token"]
    shapes = {"cls_token": (1, 1, dim)} if cfg["class_token"] else {}
    shapes |= {"pos_embed": (1, tokens, dim)} | conv_shapes("patch_embed.proj", cfg["in_chans"], dim, patch)
    for i in range(cfg["depth"]):
        args = (cfg[key] for key in ("num_heads", "mlp_ratio", "qkv_bias", "qk_norm", "layer_scale"))
        shapes |= under(f"blocks.{i}", block_shapes(dim, *args))
    shapes |= norm_shapes("fc_norm" if cfg["fc_norm"] else "norm", dim)
    return shapes | (linear_shapes("head", dim, cfg["num_classes"]) if cfg["num_classes"] else {})


def model_vit(cfg, inputs, p, buffers):
    image, eps = inputs["image"], cfg["norm_eps"]
    x = patch_embed(image, p.at("patch_embed"), cfg["patch_size"])
    if cfg["class_token"]:
        x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + p["pos_embed"]
    for i in range(cfg["depth"]):
        x = block(x, p.at("blocks", i), cfg["num_heads"], eps)
    if not cfg["fc_norm"]:
        x = layer_norm(x, p.at("norm"), eps)
    x = x[:, 0] if cfg["global_pool"] == "token" else x[:, int(cfg["class_token"]) :].mean(1)
    if cfg["fc_norm"]:
        x = layer_norm(x, p.at("fc_norm"), eps)
    return {"logits": linear(x, p.at("head")) if cfg["num_classes"] else x}


def distilled_shapes(cfg) -> dict:
    dim, (height, width), patch = cfg["embed_dim"], pair(cfg["img_size"]), cfg["patch_size"]
    tokens = (height // patch) * (width // patch) + 2
    shapes = {"cls_token": (1, 1, dim), "dist_token": (1, 1, dim), "pos_embed": (1, tokens, dim)}
    shapes |= conv_shapes("patch_embed.proj", 3, dim, patch)
    for i in range(cfg["depth"]):
        shapes |= under(f"blocks.{i}", block_shapes(dim, cfg["num_heads"], cfg["mlp_ratio"], cfg["qkv_bias"]))
    heads = linear_shapes("head", dim, cfg["num_classes"]) | linear_shapes("head_dist", dim, cfg["num_classes"])
    return shapes | norm_shapes("norm", dim) | heads


def model_vit_distilled(cfg, inputs, p, buffers):
    x = patch_embed(inputs["image"], p.at("patch_embed"), cfg["patch_size"])
    tokens = torch.cat([p["cls_token"], p["dist_token"]], 1).expand(len(x), -1, -1)
    x = torch.cat([tokens, x], 1) + p["pos_embed"]
    for i in range(cfg["depth"]):
        x = block(x, p.at("blocks", i), cfg["num_heads"], cfg["norm_eps"])
    x = layer_norm(x, p.at("norm"), cfg["norm_eps"])
    logits, logits_dist = linear(x[:, 0], p.at("head")), linear(x[:, 1], p.at("head_dist"))
    return {"logits": logits, "logits_dist": logits_dist} if cfg["training"] else {"logits": (logits + logits_dist) / 2}


def pos_embed_sincos2d(cfg, inputs, p, buffers):
    return {"pos_embed": sincos_2d(cfg["embed_dim"], cfg["grid_size"], cfg["cls_token"])}


OPS = {
    "attention.softmax": Op(
        attention_softmax,
        lambda c: attention_shapes(c["dim"], c["num_heads"], c["qkv_bias"], c["proj_bias"], c["qk_norm"]),
    ),
    "block.vit": Op(
        block_vit,
        lambda c: block_shapes(*(c[k] for k in ("dim", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm", "layer_scale"))),
    ),
    "model.vit": Op(model_vit, vit_shapes),
    "model.vit_distilled": Op(model_vit_distilled, distilled_shapes),
    "nn.pos_embed_sincos2d": Op(pos_embed_sincos2d),
}
