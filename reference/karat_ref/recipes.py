"""Configurations and inputs of generated cases: deliberately awkward sizes.

`RECIPES[op]` lists (name, configuration, inputs); `inputs(draw)` builds the inputs from a `Draw`.
"""

import torch
from torch import Tensor


class Draw:
    """Random inputs from one generator."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def subset(self, n: int, k: int) -> Tensor:
        """`k` of `n`, ascending."""
        return torch.randperm(n, generator=self.generator)[:k].sort().values

    def coords(self, height: int, width: int, k: int) -> Tensor:
        cells = self.subset(height * width, k)
        return torch.stack([cells // width, cells % width], 1)

    def mask(self, n: int, ones: int) -> Tensor:
        return torch.zeros(n, dtype=torch.long).index_fill(0, self.subset(n, ones), 1)

    def perms(self, batch: int, n: int) -> Tensor:
        return torch.stack([torch.randperm(n, generator=self.generator) for _ in range(batch)])


RECIPES: dict[str, list[tuple]] = {}


def recipe(op: str, name: str, config: dict, inputs=lambda draw: {}):
    RECIPES.setdefault(op, []).append((name, config, inputs))


def tokens(batch: int, n: int, dim: int):
    return lambda draw: {"x": draw.normal(batch, n, dim)}


def image(batch: int, chans: int, height: int, width: int | None = None):
    return lambda draw: {"image": draw.normal(batch, chans, height, width or height)}


# vit


def softmax(name, batch, n, dim, heads, qkv_bias=True, proj_bias=True, qk_norm=False):
    config = dict(dim=dim, num_heads=heads, qkv_bias=qkv_bias, proj_bias=proj_bias, qk_norm=qk_norm, norm_eps=1e-6)
    recipe("attention.softmax", name, config, tokens(batch, n, dim))


softmax("n1-c15-h5", 2, 1, 15, 5)
softmax("n33-c7-h7-nobias", 1, 33, 7, 7, qkv_bias=False, proj_bias=False)
softmax("n17-c15-h3-qknorm", 2, 17, 15, 3, qk_norm=True)


def vit_block(name, batch, n, **config):
    config = dict(dim=15, num_heads=5, mlp_ratio=2.5, qkv_bias=True, qk_norm=False, layer_scale=False, norm_eps=1e-6) | config
    recipe("block.vit", name, config, tokens(batch, n, config["dim"]))


vit_block("n1-c15-h5-mr2.5", 3, 1)
vit_block("n13-c9-h3-qknorm-ls-nobias", 1, 13, dim=9, num_heads=3, mlp_ratio=1.5, qkv_bias=False, qk_norm=True, layer_scale=True)


def vit(name, batch, height, width, **config):
    base = dict(img_size=[height, width], patch_size=3, in_chans=3, num_classes=5, embed_dim=9, depth=2, num_heads=3, mlp_ratio=2.5)
    base |= dict(qkv_bias=True, qk_norm=False, layer_scale=False, class_token=True, global_pool="token", fc_norm=False, norm_eps=1e-6)
    config = base | config
    recipe("model.vit", name, config, image(batch, config["in_chans"], height, width))


vit("1chan-9x15-p3-no-class-token", 1, 9, 15, in_chans=1, class_token=False, global_pool="avg", num_classes=1)
vit("5chan-7x14-p7-qknorm-ls-no-head", 2, 7, 14, patch_size=7, in_chans=5, num_classes=0, qk_norm=True, layer_scale=True, depth=1)
vit("one-patch-avg-fcnorm", 2, 5, 5, patch_size=5, global_pool="avg", fc_norm=True, qkv_bias=False, depth=1, embed_dim=15, num_heads=5)


def distilled(name, batch, **config):
    base = dict(img_size=10, patch_size=5, num_classes=3, embed_dim=9, depth=1, num_heads=3, mlp_ratio=1.5, qkv_bias=True, norm_eps=1e-6)
    config = base | config
    recipe("model.vit_distilled", name, config, image(batch, 3, config["img_size"]))


distilled("train-p5-c9-h3", 3, training=True)
distilled("eval-one-patch-nobias", 1, img_size=7, patch_size=7, qkv_bias=False, depth=2, training=False)

recipe("nn.pos_embed_sincos2d", "d4-g1-cls", dict(embed_dim=4, grid_size=1, cls_token=True))
recipe("nn.pos_embed_sincos2d", "d20-g7", dict(embed_dim=20, grid_size=7, cls_token=False))

# swin


def window(name, batch, height, width, window_size, shift_size, dim=9, heads=3, qkv_bias=True, qk_scale=None, pad=False):
    config = dict(height=height, width=width, dim=dim, num_heads=heads, window_size=window_size, shift_size=shift_size)
    config |= dict(qkv_bias=qkv_bias, qk_scale=qk_scale, pad=pad)
    recipe("attention.window", name, config, tokens(batch, height * width, dim))


window("pad-window7-on-3x5-s3", 1, 3, 5, 7, 3, pad=True)
window("10x5-w5-s2-nobias-scale", 2, 10, 5, 5, 2, dim=15, heads=5, qkv_bias=False, qk_scale=0.3)
window("window1", 2, 2, 3, 1, 0, dim=6, heads=2)


def swin_block(name, batch, height, width, **config):
    base = dict(height=height, width=width, dim=9, num_heads=3, window_size=4, shift_size=2, mlp_ratio=1.5)
    config = base | dict(qkv_bias=True, qk_scale=None, norm_eps=1e-5, pad=False) | config
    recipe("block.swin", name, config, tokens(batch, height * width, 9))


swin_block("pad-rectangular-3x9-w5-s2", 1, 3, 9, window_size=5, pad=True)
swin_block("clip-6x3-w7-s3-scale-nobias", 2, 6, 3, window_size=7, shift_size=3, qk_scale=0.7, qkv_bias=False)
swin_block("one-token", 2, 1, 1, window_size=7, shift_size=3)


def merging(name, batch, height, width, dim, pad):
    config = dict(height=height, width=width, dim=dim, norm_eps=1e-5, pad=pad)
    recipe("nn.patch_merging", name, config, tokens(batch, height * width, dim))


merging("2x6-c7", 3, 2, 6, 7, False)
merging("pad-1x5-c5", 2, 1, 5, 5, True)
merging("pad-9x2-c3", 1, 9, 2, 3, True)

SWIN = dict(patch_size=2, in_chans=3, embed_dim=3, depths=[2, 1], num_heads=[1, 2], window_size=3, mlp_ratio=2.5)
SWIN |= dict(qkv_bias=True, qk_scale=None, ape=False, patch_norm=True)


def swin(name, batch, height, width, **config):
    config = dict(img_size=[height, width]) | SWIN | dict(num_classes=3, norm_eps=1e-5, pad=False) | config
    recipe("model.swin", name, config, image(batch, config["in_chans"], height, width))


swin("1chan-12x24-ape-no-patch-norm", 1, 12, 24, in_chans=1, ape=True, patch_norm=False)
swin("pad-14x6-window-larger-than-map", 2, 14, 6, window_size=5, pad=True, qkv_bias=False, qk_scale=0.4, depths=[2, 2])
swin("three-stages-24x24-w6-no-head", 1, 24, 24, num_classes=0, window_size=6, depths=[2, 1, 1], num_heads=[3, 1, 4])

# greenmim

for name, capacity, weights in [
    ("nothing-fits", 2, [3, 5, 4]),
    ("all-equal", 9, [4, 4, 4, 4, 4]),
    ("one-exact", 7, [7]),
    ("everything-fits", 100, [9, 1, 30, 2, 11]),
]:
    recipe("group.knapsack", name, dict(capacity=capacity), lambda draw, w=weights: {"weights": torch.tensor(w)})

PACKINGS = [
    ("one-window", 5, [5]),
    ("ones", 4, [1] * 11),
    ("descending-cap3", 3, [2, 2, 2, 1, 1, 1]),
    ("cap10-greedy-loses-one", 10, [1, 2, 3, 7, 8, 8]),
    ("cap23-l2-beats-l1", 23, [12, 13, 12, 14, 5, 9, 3, 11]),
    ("cap50-two-twins", 50, [25, 25, 26, 24, 17, 33, 49, 1, 8, 8, 8, 8, 9]),
]
for name, capacity, sizes in PACKINGS:
    for op in ("group.windows", "group.optimal"):
        recipe(op, name, dict(group_size=capacity), lambda draw, s=sizes: {"sizes": torch.tensor(s)})

for name, channels, sizes in [
    ("one-window", 3, [6]),
    ("c1-ones", 1, [1] * 7),
    ("c5-uneven", 5, [13, 1, 9, 2, 2, 7, 1, 11, 5]),
    ("c128-swin-b-like", 128, [7, 21, 49, 3, 28, 14, 35, 6, 12, 42, 9, 24]),
]:
    recipe("group.sweep", name, dict(channels=channels), lambda draw, s=sizes: {"sizes": torch.tensor(s)})


def plan(name, height, width, k, window_size, shift_size, mode="auto", group_size="max", channels=0):
    config = dict(window_size=window_size, shift_size=shift_size, mode=mode, group_size=group_size, channels=channels)
    recipe("group.plan", name, config, lambda draw: {"coords": draw.coords(height, width, k)})


plan("one-token-grouping", 5, 5, 1, 3, 1, mode="grouping")
plan("7x11-k31-w3-s2-paper-c5", 7, 11, 31, 3, 2, mode="grouping", group_size="paper", channels=5)
plan("all-visible-5x7-w2-s1", 5, 7, 35, 2, 1)
plan("masking-forced-9x4-k20-w2", 9, 4, 20, 2, 1, mode="masking")


def group_window(name, batch, height, width, k, dim, heads, window_size, shift_size, **config):
    base = dict(dim=dim, num_heads=heads, window_size=window_size, shift_size=shift_size, qkv_bias=True, qk_scale=None)
    config = base | dict(rel_pos=True, mode="auto", group_size="max") | config
    inputs = lambda draw: {"x": draw.normal(batch, k, dim), "coords": draw.coords(height, width, k)}
    recipe("attention.group_window", name, config, inputs)


group_window("one-token", 3, 5, 5, 1, 15, 5, 4, 1)
group_window("7x11-k31-w3-s2-paper", 2, 7, 11, 31, 9, 3, 3, 2, mode="grouping", group_size="paper", qk_scale=0.6)
group_window("all-visible-6x10-w5-norel-nobias", 1, 6, 10, 60, 5, 1, 5, 0, rel_pos=False, qkv_bias=False)


def green_block(name, batch, height, width, k, **config):
    base = dict(height=height, width=width, dim=9, num_heads=3, window_size=3, shift_size=1, mlp_ratio=1.5)
    config = base | dict(qkv_bias=True, qk_scale=None, norm_eps=1e-6, mode="auto", group_size="max") | config
    recipe("block.green_swin", name, config, lambda draw: {"x": draw.normal(batch, k, 9), "coords": draw.coords(height, width, k)})


green_block("clip-3x9-k11-w5-s2", 2, 3, 9, 11, window_size=5, shift_size=2)
green_block("all-visible-8x6-paper-scale-nobias", 1, 8, 6, 48, qk_scale=0.4, qkv_bias=False, mode="grouping", group_size="paper")
green_block("one-token-masking", 2, 7, 7, 1, mode="masking")


def merging_visible(name, batch, height, width, k, dim):
    def inputs(draw):
        cells = draw.mask(height * width // 4, k).reshape(height // 2, width // 2)
        mask = cells.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
        return {"x": draw.normal(batch, 4 * k, dim), "mask": mask}

    recipe("nn.patch_merging_visible", name, dict(height=height, width=width, dim=dim, norm_eps=1e-6), inputs)


merging_visible("one-cell-of-2x10", 3, 2, 10, 1, 5)
merging_visible("all-visible-4x6", 1, 4, 6, 6, 7)


def gsa(name, batch, height, width, k, dim, heads, ratio, qkv_bias=True):
    config = dict(height=height, width=width, dim=dim, num_heads=heads, sr_ratio=ratio, qkv_bias=qkv_bias, norm_eps=1e-6)
    inputs = lambda draw: {"x": draw.normal(batch, k, dim), "coords": draw.coords(height, width, k)}
    recipe("attention.gsa", name, config, inputs)


gsa("7x11-sr3-leftover-rows", 2, 7, 11, 29, 9, 3, 3)
gsa("one-key-4x4-sr4-nobias", 1, 4, 4, 5, 6, 2, 4, qkv_bias=False)
gsa("all-visible-3x5-sr1", 2, 3, 5, 15, 5, 5, 1)


def peg(name, batch, height, width, k, dim):
    inputs = lambda draw: {"x": draw.normal(batch, k, dim), "coords": draw.coords(height, width, k)}
    recipe("nn.peg_visible", name, dict(height=height, width=width, dim=dim), inputs)


peg("1x7-k4-c5", 3, 1, 7, 4, 5)
peg("all-visible-4x3-c7", 1, 4, 3, 12, 7)

GREEN = dict(img_size=12) | SWIN | dict(norm_eps=1e-6)


def green_swin(name, batch, masked, **config):
    config = GREEN | config
    cells = (config["img_size"] // (config["patch_size"] * 2 ** (len(config["depths"]) - 1))) ** 2
    size, chans = config["img_size"], config["in_chans"]
    inputs = lambda draw: {"image": draw.normal(batch, chans, size, size), "mask": draw.mask(cells, masked)}
    recipe("model.green_swin", name, config, inputs)


green_swin("1chan-one-cell-w3", 2, 8, in_chans=1)
green_swin("all-visible-ape-no-patch-norm", 1, 0, ape=True, patch_norm=False, qk_scale=0.5, qkv_bias=False, depths=[2, 2])
green_swin("three-stages-window-larger-than-map", 1, 6, img_size=24, window_size=16, depths=[1, 2, 1], num_heads=[1, 3, 4])


def green_twins(name, batch, masked, **config):
    base = dict(img_size=12, patch_size=2, in_chans=3, embed_dims=[3, 5], num_heads=[1, 5], mlp_ratios=[2, 1.5], depths=[2, 1])
    config = base | dict(window_size=4, sr_ratios=[2, 1], qkv_bias=True, norm_eps=1e-6) | config
    cells = (config["img_size"] // (config["patch_size"] * 2 ** (len(config["depths"]) - 1))) ** 2
    size, chans = config["img_size"], config["in_chans"]
    inputs = lambda draw: {"image": draw.normal(batch, chans, size, size), "mask": draw.mask(cells, masked)}
    recipe("model.green_twins", name, config, inputs)


green_twins("1chan-one-cell", 2, 8, in_chans=1)
green_twins("all-visible-sr3-nobias", 1, 0, sr_ratios=[3, 1], qkv_bias=False, depths=[2, 2])

# mae


def random_mask(name, batch, n, ratio):
    recipe("mask.random", name, dict(mask_ratio=ratio), lambda draw: {"noise": draw.uniform(batch, n)})


random_mask("1-r50-keeps-zero", 3, 1, 0.5)
random_mask("49-r75", 2, 49, 0.75)
random_mask("10-r0-keeps-all", 1, 10, 0.0)
random_mask("7-r100", 2, 7, 1.0)


def mae(name, batch, **config):
    base = dict(img_size=9, patch_size=3, in_chans=3, embed_dim=12, depth=1, num_heads=3)
    base |= dict(decoder_embed_dim=4, decoder_depth=1, decoder_num_heads=1, mlp_ratio=1.5, norm_eps=1e-6)
    config = base | dict(mask_ratio=0.75, norm_pix_loss=True) | config
    size, cells = config["img_size"], (config["img_size"] // config["patch_size"]) ** 2
    recipe("mim.mae", name, config, lambda draw: {"image": draw.normal(batch, 3, size, size), "noise": draw.uniform(batch, cells)})


mae("9-p3-keep2-c12-h3", 3)
mae("all-removed-4-r90", 2, img_size=10, patch_size=5, mask_ratio=0.9, norm_pix_loss=False)
mae("one-removed-p1", 1, img_size=3, patch_size=1, mask_ratio=0.1, decoder_depth=2, depth=2)

# simmim


def simmim_mask(name, batch, size, mask_patch, model_patch, ratio):
    config = dict(input_size=size, mask_patch_size=mask_patch, model_patch_size=model_patch, mask_ratio=ratio)
    recipe("mask.simmim", name, config, lambda draw: {"perm": draw.perms(batch, (size // mask_patch) ** 2)})


simmim_mask("30-3-3-r7-ceils-to-eight", 2, 30, 3, 3, 0.07)
simmim_mask("21-7-7-r0", 1, 21, 7, 7, 0.0)
simmim_mask("40-8-2-r100", 1, 40, 8, 2, 1.0)


def simmim(name, batch, ones, **config):
    size, grid = config["img_size"], config["img_size"] // config["patch_size"]

    def inputs(draw):
        mask = torch.stack([draw.mask(grid * grid, ones).reshape(grid, grid) for _ in range(batch)])
        return {"image": draw.normal(batch, 3, size, size), "mask": mask}

    recipe("mim.simmim", name, config, inputs)


def simmim_swin(name, batch, ones, **config):
    base = dict(encoder="swin", img_size=12) | SWIN | dict(norm_eps=1e-5, norm_target=0, encoder_stride=4)
    simmim(name, batch, ones, **base | config)


def simmim_vit(name, batch, ones, **config):
    base = dict(encoder="vit", img_size=9, patch_size=3, in_chans=3, embed_dim=9, depth=2, num_heads=3, mlp_ratio=1.5, qkv_bias=True)
    base |= dict(layer_scale=False, use_ape=True, use_rpb=True, use_shared_rpb=False, use_mean_pooling=False, norm_eps=1e-6)
    simmim(name, batch, ones, **base | dict(norm_target=0, encoder_stride=3) | config)


simmim_swin("swin-ape-no-patch-norm-normtarget5", 1, 20, ape=True, patch_norm=False, norm_target=5, qkv_bias=False, qk_scale=0.5)
simmim_swin("swin-all-masked-window-larger-than-map", 2, 36, window_size=7, depths=[1, 2])
simmim_vit("vit-ape-rpb-nobias", 2, 5, qkv_bias=False)
simmim_vit("vit-mean-pooling-no-positions", 1, 1, use_ape=False, use_rpb=False, use_mean_pooling=True, layer_scale=True, norm_target=3)


def greenmim(name, batch, **config):
    base = GREEN | dict(decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=3)
    config = base | dict(mask_ratio=0.75, norm_pix_loss=True, decoder_order="row_major") | config
    size, cells = config["img_size"], (config["img_size"] // (config["patch_size"] * 2 ** (len(config["depths"]) - 1))) ** 2
    recipe("mim.greenmim", name, config, lambda draw: {"image": draw.normal(batch, 3, size, size), "noise": draw.uniform(cells)})


greenmim("released-order-ape-no-pix-norm", 1, decoder_order="noise_rank", ape=True, norm_pix_loss=False, mask_ratio=0.4)
greenmim("one-visible-cell-no-patch-norm", 2, patch_norm=False, mask_ratio=0.85, qkv_bias=False, qk_scale=0.5)
greenmim("one-masked-cell", 1, mask_ratio=0.1, depths=[1, 1], window_size=4)
