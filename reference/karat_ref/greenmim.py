"""Sheet `greenmim`: attention over visible tokens only, green Swin and Twins encoders, GreenMIM.

Group attention has two formulas with one result: `ragged` attends inside every window separately; `grouped` packs windows
into padded groups and masks the rest, as the paper does.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import grouping, mae, swin
from .case import Op, Scope
from .swin import Pair, relative_index
from .vit import attend, attention_shapes, conv_shapes, layer_norm, linear, linear_shapes, mlp, mlp_shapes, norm_shapes
from .vit import pair, patch_embed, self_attention, sincos_2d, split_heads, under

# Grouping


@dataclass
class Plan:
    """A grouping of visible tokens (`group.plan`) as tensors."""

    grouped: int
    size: int
    count: int
    window_yx: Tensor
    shuffle: Tensor
    unshuffle: Tensor
    mask: Tensor
    rel_pos: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, G, g, C]."""
        return x[:, self.shuffle].unflatten(1, (self.count, self.size))

    def scatter(self, x: Tensor) -> Tensor:
        """[B, G, g, C] -> [B, N, C]."""
        return x.flatten(1, 2)[:, self.unshuffle]


def make_plan(coords: Tensor, window: int, shift: int, mode: str, group_size: str, channels: int) -> Plan:
    n = len(coords)
    windows = list(grouping.window_lists(coords.tolist(), window, shift).values())
    owner = torch.empty(n, dtype=torch.long)
    for i, tokens in enumerate(windows):
        owner[tokens] = i
    grouped = mode == "grouping" or (mode == "auto" and n > 2 * window**2)
    if grouped:
        sizes = [len(tokens) for tokens in windows]
        size = grouping.sweep(sizes, channels)[0] if group_size == "paper" else min(window**2, max(sizes))
        groups = [[t for w in group for t in windows[w]] for group in grouping.greedy_groups(sizes, size)]
    else:
        size, groups = n, [list(range(n))]
    slots = [tokens + [-1] * (size - len(tokens)) for tokens in groups]
    slot = torch.tensor(slots)
    shuffle, real = slot.clamp(min=0), slot >= 0
    unshuffle = torch.empty(n, dtype=torch.long)
    unshuffle[slot[real]] = real.flatten().nonzero().flatten()
    label = torch.where(real, owner[shuffle], -1)
    same = (label[:, :, None] == label[:, None, :]) & real[:, :, None]
    index = torch.where(same, relative_index(coords[shuffle], pair(window)), 0)
    mask = torch.where(same, 0.0, -100.0)
    window_yx = (coords + (window - shift) % window) // window
    return Plan(int(grouped), size, len(groups), window_yx, shuffle.flatten(), unshuffle, mask, index)


# Attention over visible tokens


def ragged_attention(x: Tensor, coords: Tensor, p: Scope, heads: int, window: int, shift: int, scale=None) -> Tensor:
    """Attention inside every window over its visible tokens."""
    q, k, v = split_heads(linear(x, p.at("qkv")), 3, heads)
    table, y = p.get("relative_position_bias_table"), torch.empty_like(x)
    for tokens in grouping.window_lists(coords.tolist(), window, shift).values():
        bias = None if table is None else table[relative_index(coords[tokens], pair(window))].permute(2, 0, 1)
        y[:, tokens] = attend(*(t[..., tokens, :] for t in (q, k, v)), scale, bias)
    return linear(y, p.at("proj"))


def attend_group(x: Tensor, plan: Plan, p: Scope, heads: int, scale=None) -> Tensor:
    """Masked attention over groups [B, G, g, C]."""
    bias, table = plan.mask.to(x.dtype)[:, None], p.get("relative_position_bias_table")
    if table is not None:
        bias = bias + torch.where(bias == 0, table[plan.rel_pos].permute(0, 3, 1, 2), 0.0)
    return self_attention(x, p, heads, scale, bias)


def green_block(x: Tensor, p: Scope, eps: float, attention) -> Tensor:
    x = x + attention(layer_norm(x, p.at("norm1"), eps), p.at("attn"))
    return x + mlp(layer_norm(x, p.at("norm2"), eps), p.at("mlp"))


def ragged_block(x, coords, p: Scope, heads, window, shift, eps, scale=None) -> Tensor:
    return green_block(x, p, eps, lambda z, q: ragged_attention(z, coords, q, heads, window, shift, scale))


def grouped_block(x, plan: Plan, p: Scope, heads, eps, scale=None) -> Tensor:
    """The whole block runs on the padded groups, as in the released code."""
    return plan.scatter(green_block(plan.gather(x), p, eps, lambda z, q: attend_group(z, plan, q, heads, scale)))


def clip(grid: Pair, window: int, shift: int) -> Pair:
    return (min(grid), 0) if min(grid) <= window else (window, shift)


def visible_coords(visible: Tensor, grid: Pair) -> Tensor:
    """Row-major coordinates [N, 2] of the nonzero cells of a flat mask."""
    return visible.reshape(grid).nonzero()


def merge_visible(x: Tensor, visible: Tensor, p: Scope, grid: Pair, eps: float) -> tuple[Tensor, Tensor]:
    """2x2 merging of visible tokens; returns the tokens and the flat mask (1 = visible) of the next grid."""
    rank = (visible.cumsum(0) - 1).reshape(grid)
    cells = visible.reshape(grid).unfold(0, 2, 2).unfold(1, 2, 2).sum((2, 3))
    if grid[0] % 2 or grid[1] % 2 or not ((cells == 0) | (cells == 4)).all():
        raise ValueError("every 2x2 cell must be entirely visible or entirely hidden")
    y, x_ = (2 * cells.nonzero()).T
    x = torch.cat([x[:, rank[y + dy, x_ + dx]] for dx in (0, 1) for dy in (0, 1)], -1)
    return linear(layer_norm(x, p.at("norm"), eps), p.at("reduction")), (cells == 4).long().flatten()


# Green Swin


def upsample_mask(mask: Tensor, factor: int) -> Tensor:
    """Coarse mask [L] (1 = masked) -> flat visibility of the `factor` times finer grid."""
    side = round(len(mask) ** 0.5)
    fine = (1 - mask).reshape(side, side).repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    return fine.flatten()


def encode(cfg, p: Scope, image: Tensor, mask: Tensor, form: str = "ragged") -> Tensor:
    """Green Swin encoder: [B, in, S, S] and a coarse mask -> visible tokens [B, K, C_last]."""
    eps, stages, patch = cfg["norm_eps"], len(cfg["depths"]), cfg["patch_size"]
    side = cfg["img_size"] // patch
    visible = upsample_mask(mask, 2 ** (stages - 1))
    x = patch_embed(image, p.at("patch_embed"), patch, eps)
    x = (x + p["absolute_pos_embed"] if cfg["ape"] else x)[:, visible.bool()]
    for i, (depth, heads) in enumerate(zip(cfg["depths"], cfg["num_heads"])):
        grid, plans = (side, side), {}
        coords = visible_coords(visible, grid)
        for j in range(depth):
            window, shift = clip(grid, cfg["window_size"], cfg["window_size"] // 2 if j % 2 else 0)
            b = p.at("layers", i, "blocks", j)
            if form == "ragged":
                x = ragged_block(x, coords, b, heads, window, shift, eps, cfg["qk_scale"])
            else:
                if shift not in plans:
                    plans[shift] = make_plan(coords, window, shift, "auto", "max", 0)
                x = grouped_block(x, plans[shift], b, heads, eps, cfg["qk_scale"])
        if i + 1 < stages:
            x, visible = merge_visible(x, visible, p.at("layers", i, "downsample"), grid, eps)
            side //= 2
    return layer_norm(x, p.at("norm"), eps)


# GreenMIM


def greenmim_shapes(cfg) -> dict:
    stages = len(cfg["depths"])
    cell = cfg["patch_size"] * 2 ** (stages - 1)
    width = cfg["embed_dim"] * 2 ** (stages - 1)
    return under("encoder", swin.encoder_shapes(cfg)) | mae.decoder_shapes(cfg, width, cell * cell * 3)


def greenmim_buffers(cfg) -> dict:
    side = cfg["img_size"] // (cfg["patch_size"] * 2 ** (len(cfg["depths"]) - 1))
    return {"decoder_pos_embed": sincos_2d(cfg["decoder_embed_dim"], side, False)[None]}


def mim_greenmim(cfg, inputs, p, buffers, form: str = "ragged"):
    image = inputs["image"]
    keep, _, rank, mask = (t[0] if isinstance(t, Tensor) else t for t in mae.random_mask(inputs["noise"][None], cfg["mask_ratio"]))
    latent = linear(encode(cfg, p.at("encoder"), image, mask, form), p.at("decoder_embed"))
    if cfg["decoder_order"] == "row_major":
        rank = (1 - mask).cumsum(0) - 1
    row = torch.where(mask == 0, rank, keep)
    x = torch.cat([latent, p["mask_token"].expand(len(latent), -1, -1)], 1)[:, row]
    pred = mae.decode(cfg, p, x + buffers["decoder_pos_embed"])
    cell = cfg["patch_size"] * 2 ** (len(cfg["depths"]) - 1)
    return {"loss": mae.pixel_loss(image, pred, mask, cell, cfg["norm_pix_loss"]), "pred": pred, "mask": mask}


# Twins


def to_map(x: Tensor, coords: Tensor, grid: Pair) -> Tensor:
    """Visible tokens on a zero-filled map [B, C, H, W]."""
    dense = x.new_zeros(len(x), *grid, x.shape[-1])
    dense[:, coords[:, 0], coords[:, 1]] = x
    return dense.permute(0, 3, 1, 2)


def at_coords(x: Tensor, coords: Tensor) -> Tensor:
    """The inverse of `to_map`."""
    return x[:, :, coords[:, 0], coords[:, 1]].transpose(1, 2)


def gsa_shapes(dim: int, ratio: int, qkv_bias: bool) -> dict:
    reduction = conv_shapes("sr", dim, dim, ratio) | norm_shapes("norm", dim) if ratio > 1 else {}
    return (
        linear_shapes("q", dim, dim, qkv_bias) | linear_shapes("kv", dim, 2 * dim, qkv_bias) | linear_shapes("proj", dim, dim) | reduction
    )


def global_attention(x: Tensor, coords: Tensor, p: Scope, grid: Pair, heads: int, ratio: int, eps: float) -> Tensor:
    """Every visible token attends to the strided convolution of the visible map, where that has visible input."""
    keys = x
    if ratio > 1:
        reduced = F.conv2d(to_map(x, coords, grid), p["sr.weight"], p["sr.bias"], stride=ratio)
        cells = coords // ratio
        cells = cells[(cells < torch.tensor(reduced.shape[-2:])).all(1)].unique(dim=0)
        keys = layer_norm(at_coords(reduced, cells), p.at("norm"), eps)
    (q,) = split_heads(linear(x, p.at("q")), 1, heads)
    k, v = split_heads(linear(keys, p.at("kv")), 2, heads)
    return linear(attend(q, k, v), p.at("proj"))


def peg(x: Tensor, coords: Tensor, p: Scope, grid: Pair) -> Tensor:
    y = F.conv2d(to_map(x, coords, grid), p["proj.0.weight"], p["proj.0.bias"], padding=1, groups=x.shape[-1])
    return at_coords(y, coords)


def twins_shapes(cfg) -> dict:
    shapes, before, kernel = {}, cfg["in_chans"], cfg["patch_size"]
    for i, (dim, heads, ratio) in enumerate(zip(cfg["embed_dims"], cfg["num_heads"], cfg["mlp_ratios"])):
        shapes |= conv_shapes(f"patch_embeds.{i}.proj", before, dim, kernel) | norm_shapes(f"patch_embeds.{i}.norm", dim)
        shapes |= {f"pos_block.{i}.proj.0.weight": (dim, 1, 3, 3), f"pos_block.{i}.proj.0.bias": (dim,)}
        for j in range(cfg["depths"][i]):
            local = attention_shapes(dim, heads, cfg["qkv_bias"])
            attn = gsa_shapes(dim, cfg["sr_ratios"][i], cfg["qkv_bias"]) if j % 2 else local
            norms = norm_shapes("norm1", dim) | norm_shapes("norm2", dim)
            shapes |= under(f"blocks.{i}.{j}", norms | under("attn", attn) | mlp_shapes(dim, ratio))
        before, kernel = dim, 2
    return shapes | norm_shapes("norm", before)


def model_green_twins(cfg, inputs, p, buffers):
    eps, stages, kernel = cfg["norm_eps"], len(cfg["depths"]), cfg["patch_size"]
    x, coords = inputs["image"], None
    for i in range(stages):
        e, side = p.at("patch_embeds", i), cfg["img_size"] // (cfg["patch_size"] * 2**i)
        grid, heads, previous = (side, side), cfg["num_heads"][i], coords
        coords = visible_coords(upsample_mask(inputs["mask"], 2 ** (stages - 1 - i)), grid)
        if i:
            x, kernel = to_map(x, previous, (2 * side, 2 * side)), 2
        x = layer_norm(at_coords(F.conv2d(x, e["proj.weight"], e["proj.bias"], stride=kernel), coords), e.at("norm"), eps)
        for j in range(cfg["depths"][i]):
            if j % 2:
                args = (grid, heads, cfg["sr_ratios"][i], eps)
                x = green_block(x, p.at("blocks", i, j), eps, lambda z, q: global_attention(z, coords, q, *args))
            else:
                x = ragged_block(x, coords, p.at("blocks", i, j), heads, cfg["window_size"], 0, eps)
            x = peg(x, coords, p.at("pos_block", i), grid) if j == 0 else x
    return {"y": layer_norm(x, p.at("norm"), eps)}


# Operations


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def group_knapsack(cfg, inputs, p, buffers):
    best, index = grouping.knapsack(inputs["weights"].tolist(), cfg["capacity"])
    return {"best": ints(best), "index": ints(*index)}


def group_windows(cfg, inputs, p, buffers):
    sizes = inputs["sizes"].tolist()
    groups = grouping.greedy_groups(sizes, cfg["group_size"])
    return {
        "num_groups": ints(len(groups)),
        "group_len": ints(*map(len, groups)),
        "group_index": ints(*(i for group in groups for i in group)),
        "num_ele_group": ints(*(sum(sizes[i] for i in group) for group in groups)),
    }


def group_optimal(cfg, inputs, p, buffers):
    args = (inputs["sizes"].tolist(), cfg["group_size"])
    l1, l2 = grouping.lower_bounds(*args)
    count, greedy = grouping.optimal_count(*args), len(grouping.greedy_groups(*args))
    return {"num_groups": ints(count), "greedy_num_groups": ints(greedy), "lower_bound_l1": ints(l1), "lower_bound_l2": ints(l2)}


def group_sweep(cfg, inputs, p, buffers):
    sizes, channels = inputs["sizes"].tolist(), cfg["channels"]
    names = ("group_size", "num_groups", "cost")
    out = dict(zip(names, grouping.sweep(sizes, channels)))
    out |= {f"opt_{k}": v for k, v in zip(names, grouping.sweep(sizes, channels, grouping.optimal_count))}
    out["ragged_cost"] = sum(grouping.cost(1, w, channels) for w in sizes)
    out["max_rule_cost"] = grouping.cost(len(grouping.greedy_groups(sizes, max(sizes))), max(sizes), channels)
    return {k: ints(v) for k, v in out.items()}


def group_plan(cfg, inputs, p, buffers):
    plan = make_plan(inputs["coords"], *(cfg[k] for k in ("window_size", "shift_size", "mode", "group_size", "channels")))
    return {
        "grouped": ints(plan.grouped),
        "group_size": ints(plan.size),
        "num_groups": ints(plan.count),
        "window_yx": plan.window_yx,
        "idx_shuffle": plan.shuffle,
        "idx_unshuffle": plan.unshuffle,
        "attn_mask": plan.mask,
        "rel_pos_idx": plan.rel_pos,
    }


def group_window_shapes(cfg) -> dict:
    args = (cfg["dim"], cfg["num_heads"])
    return (
        swin.window_attention_shapes(*args, pair(cfg["window_size"]), cfg["qkv_bias"])
        if cfg["rel_pos"]
        else attention_shapes(*args, cfg["qkv_bias"])
    )


def group_window_ragged(cfg, inputs, p, buffers):
    args = (cfg["num_heads"], cfg["window_size"], cfg["shift_size"], cfg["qk_scale"])
    return {"y": ragged_attention(inputs["x"], inputs["coords"], p, *args)}


def group_window_grouped(cfg, inputs, p, buffers):
    plan = make_plan(inputs["coords"], *(cfg[k] for k in ("window_size", "shift_size", "mode", "group_size", "dim")))
    return {"y": plan.scatter(attend_group(plan.gather(inputs["x"]), plan, p, cfg["num_heads"], cfg["qk_scale"]))}


def block_window(cfg) -> Pair:
    return clip((cfg["height"], cfg["width"]), cfg["window_size"], cfg["shift_size"])


def block_ragged(cfg, inputs, p, buffers):
    args = (cfg["num_heads"], *block_window(cfg), cfg["norm_eps"], cfg["qk_scale"])
    return {"y": ragged_block(inputs["x"], inputs["coords"], p, *args)}


def block_grouped(cfg, inputs, p, buffers):
    plan = make_plan(inputs["coords"], *block_window(cfg), cfg["mode"], cfg["group_size"], cfg["dim"])
    return {"y": grouped_block(inputs["x"], plan, p, cfg["num_heads"], cfg["norm_eps"], cfg["qk_scale"])}


def patch_merging_visible(cfg, inputs, p, buffers):
    grid = (cfg["height"], cfg["width"])
    y, mask = merge_visible(inputs["x"], inputs["mask"], p, grid, cfg["norm_eps"])
    return {"y": y, "coords": visible_coords(mask, (grid[0] // 2, grid[1] // 2)), "mask_out": mask}


def attention_gsa(cfg, inputs, p, buffers):
    args = ((cfg["height"], cfg["width"]), cfg["num_heads"], cfg["sr_ratio"], cfg["norm_eps"])
    return {"y": global_attention(inputs["x"], inputs["coords"], p, *args)}


def peg_visible(cfg, inputs, p, buffers):
    return {"y": peg(inputs["x"], inputs["coords"], p, (cfg["height"], cfg["width"]))}


def model_green_swin(cfg, inputs, p, buffers, form: str = "ragged"):
    return {"y": encode(cfg, p, inputs["image"], inputs["mask"], form)}


def in_groups(forward):
    return lambda cfg, inputs, p, buffers: forward(cfg, inputs, p, buffers, "grouped")


OPS = {
    "group.knapsack": Op(group_knapsack),
    "group.windows": Op(group_windows),
    "group.optimal": Op(group_optimal),
    "group.sweep": Op(group_sweep),
    "group.plan": Op(group_plan),
    "attention.group_window": Op(group_window_ragged, group_window_shapes, other=group_window_grouped),
    "block.green_swin": Op(
        block_ragged,
        lambda c: swin.block_shapes(c["dim"], c["num_heads"], pair(block_window(c)[0]), c["mlp_ratio"], c["qkv_bias"]),
        other=block_grouped,
    ),
    "nn.patch_merging_visible": Op(patch_merging_visible, lambda c: swin.merging_shapes(c["dim"])),
    "attention.gsa": Op(attention_gsa, lambda c: gsa_shapes(c["dim"], c["sr_ratio"], c["qkv_bias"])),
    "nn.peg_visible": Op(peg_visible, lambda c: {"proj.0.weight": (c["dim"], 1, 3, 3), "proj.0.bias": (c["dim"],)}),
    "model.green_swin": Op(model_green_swin, swin.encoder_shapes, other=in_groups(model_green_swin)),
    "model.green_twins": Op(model_green_twins, twins_shapes),
    "mim.greenmim": Op(mim_greenmim, greenmim_shapes, greenmim_buffers, data=("noise",), seeds=("loss",), other=in_groups(mim_greenmim)),
}
