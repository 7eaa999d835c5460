"""Sheet `simmim`: mask generator and SimMIM with Swin and BEiT-style ViT encoders."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import swin
from .case import Op, Scope
from .swin import relative_index
from .vit import attend, conv_shapes, layer_norm, linear, linear_shapes, mlp, mlp_shapes, norm_shapes, patch_embed, split_heads, under


def norm_target(image: Tensor, window: int) -> Tensor:
    """Every pixel normalised by mean and unbiased variance of the clipped window around it, per channel."""
    if window % 2 == 0:
        raise ValueError(f"norm_target {window}: not odd")

    def box_mean(x):
        return F.avg_pool2d(x, window, 1, window // 2, count_include_pad=False)

    ones = F.pad(torch.ones_like(image[:1, :1]), (window // 2,) * 4)
    count = F.avg_pool2d(ones, window, 1) * window**2
    mean = box_mean(image)
    var = ((box_mean(image.square()) - mean.square()) * (count / (count - 1))).clamp(min=0)
    return (image - mean) / (var + 1e-6).sqrt()


# ViT encoder, BEiT style


def beit_bias(table: Tensor, grid: int) -> Tensor:
    """Bias [h, 1+N, 1+N]; the table's last three rows: class to patch, patch to class, class to class."""
    rows, tokens = len(table), grid * grid + 1
    coords = torch.cartesian_prod(torch.arange(grid), torch.arange(grid))
    index = torch.empty(tokens, tokens, dtype=torch.long)
    index[1:, 1:] = relative_index(coords, (grid, grid))
    index[0, :], index[:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
    return table[index].permute(2, 0, 1)


def vit_shapes(cfg) -> dict:
    dim, patch, heads = cfg["embed_dim"], cfg["patch_size"], cfg["num_heads"]
    grid = cfg["img_size"] // patch
    table = ((2 * grid - 1) ** 2 + 3, heads)
    shapes = {"cls_token": (1, 1, dim), "mask_token": (1, 1, dim)} | conv_shapes("patch_embed.proj", cfg["in_chans"], dim, patch)
    shapes |= {"pos_embed": (1, grid * grid + 1, dim)} if cfg["use_ape"] else {}
    shapes |= {"rel_pos_bias.relative_position_bias_table": table} if cfg["use_shared_rpb"] else {}
    attn = linear_shapes("qkv", dim, 3 * dim, bias=False) | linear_shapes("proj", dim, dim)
    attn |= {"q_bias": (dim,), "v_bias": (dim,)} if cfg["qkv_bias"] else {}
    attn |= {"relative_position_bias_table": table} if cfg["use_rpb"] else {}
    block = norm_shapes("norm1", dim) | under("attn", attn) | norm_shapes("norm2", dim) | mlp_shapes(dim, cfg["mlp_ratio"])
    block |= {"gamma_1": (dim,), "gamma_2": (dim,)} if cfg["layer_scale"] else {}
    for i in range(cfg["depth"]):
        shapes |= under(f"blocks.{i}", block)
    return shapes | norm_shapes("fc_norm" if cfg["use_mean_pooling"] else "norm", dim)


def beit_attention(x: Tensor, p: Scope, heads: int, bias: Tensor | None) -> Tensor:
    qkv_bias = None
    if p.get("q_bias") is not None:
        qkv_bias = torch.cat([p["q_bias"], torch.zeros_like(p["q_bias"]), p["v_bias"]])
    q, k, v = split_heads(F.linear(x, p["qkv.weight"], qkv_bias), 3, heads)
    return linear(attend(q, k, v, bias=bias), p.at("proj"))


def encode_vit(cfg, p: Scope, image: Tensor, masked: Tensor) -> tuple[Tensor, tuple[int, int]]:
    eps, grid = cfg["norm_eps"], cfg["img_size"] // cfg["patch_size"]
    w = masked.unsqueeze(-1).to(image.dtype)
    x = patch_embed(image, p.at("patch_embed"), cfg["patch_size"]) * (1 - w) + p["mask_token"] * w
    x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x], 1)
    if cfg["use_ape"]:
        x = x + p["pos_embed"]
    tables = [p.get("rel_pos_bias.relative_position_bias_table")]
    for i in range(cfg["depth"]):
        b = p.at("blocks", i)
        biases = [beit_bias(t, grid) for t in [*tables, b.get("attn.relative_position_bias_table")] if t is not None]
        branch = beit_attention(layer_norm(x, b.at("norm1"), eps), b.at("attn"), cfg["num_heads"], sum(biases) if biases else None)
        x = x + (b["gamma_1"] * branch if cfg["layer_scale"] else branch)
        branch = mlp(layer_norm(x, b.at("norm2"), eps), b.at("mlp"))
        x = x + (b["gamma_2"] * branch if cfg["layer_scale"] else branch)
    # Mean pooling moves the norm into `fc_norm`, which nothing reads here.
    x = x if cfg["use_mean_pooling"] else layer_norm(x, p.at("norm"), eps)
    return x[:, 1:], (grid, grid)


# Operations


def mask_simmim(cfg, inputs, p, buffers):
    side, rest = divmod(cfg["input_size"], cfg["mask_patch_size"])
    factor, rest_model = divmod(cfg["mask_patch_size"], cfg["model_patch_size"])
    if rest or rest_model:
        raise ValueError("input_size, mask_patch_size and model_patch_size must divide each other in this order")
    perm = inputs["perm"]
    count = math.ceil(side * side * cfg["mask_ratio"])
    mask = torch.zeros_like(perm).scatter(1, perm[:, :count], 1).unflatten(1, (side, side))
    mask = mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return {"mask_count": torch.tensor([count]), "mask": mask}


def simmim_shapes(cfg) -> dict:
    if cfg["encoder"] == "swin":
        encoder = {"mask_token": (1, 1, cfg["embed_dim"])} | swin.encoder_shapes(cfg)
        width = cfg["embed_dim"] * 2 ** (len(cfg["depths"]) - 1)
    else:
        encoder, width = vit_shapes(cfg), cfg["embed_dim"]
    return under("encoder", encoder) | conv_shapes("decoder.0", width, 3 * cfg["encoder_stride"] ** 2, 1)


def mim_simmim(cfg, inputs, p, buffers):
    image, mask = inputs["image"], inputs["mask"]
    encode = swin.encode if cfg["encoder"] == "swin" else encode_vit
    x, grid = encode(cfg, p.at("encoder"), image, mask.flatten(1))
    x = x.transpose(1, 2).unflatten(2, grid)
    pred = F.pixel_shuffle(F.conv2d(x, p["decoder.0.weight"], p["decoder.0.bias"]), cfg["encoder_stride"])
    target = norm_target(image, cfg["norm_target"]) if cfg["norm_target"] else image
    pixels = mask.repeat_interleave(cfg["patch_size"], 1).repeat_interleave(cfg["patch_size"], 2)[:, None].to(pred.dtype)
    loss = ((target - pred).abs() * pixels).sum() / (pixels.sum() + 1e-5) / 3
    return {"loss": loss, "pred": pred}


OPS = {
    "mask.simmim": Op(mask_simmim),
    "mim.simmim": Op(mim_simmim, simmim_shapes, seeds=("loss",)),
}
