"""Sheet `mae`: random masks and the masked autoencoder."""

import torch
from torch import Tensor

from .case import Op
from .vit import block, block_shapes, conv_shapes, layer_norm, linear, linear_shapes, norm_shapes, patch_embed, sincos_2d, under


def random_mask(noise: Tensor, ratio: float) -> tuple[int, Tensor, Tensor, Tensor]:
    """Noise [B, L] -> number kept, ids_keep (in noise order), ids_restore (ranks), mask (1 = removed)."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"mask_ratio {ratio}: not in [0, 1]")
    keep = int(noise.shape[1] * (1 - ratio))
    order = noise.argsort(dim=1, stable=True)
    rank = order.argsort(1)
    return keep, order[:, :keep], rank, (rank >= keep).long()


def patchify(image: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, L, P*P*C], a patch in order (row, column, channel)."""
    x = image.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def pixel_loss(image: Tensor, pred: Tensor, mask: Tensor, patch: int, normalize: bool) -> Tensor:
    """Mean squared error over the masked patches of the batch; mask [B, L] or [L]."""
    target = patchify(image, patch)
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    weight = mask.to(pred.dtype).expand(pred.shape[:2])
    return ((pred - target).square().mean(-1) * weight).sum() / weight.sum()


def decoder_shapes(cfg, n_in: int, n_out: int) -> dict:
    dim = cfg["decoder_embed_dim"]
    shapes = {"mask_token": (1, 1, dim)} | linear_shapes("decoder_embed", n_in, dim)
    for i in range(cfg["decoder_depth"]):
        shapes |= under(f"decoder_blocks.{i}", block_shapes(dim, cfg["decoder_num_heads"], cfg["mlp_ratio"], True))
    return shapes | norm_shapes("decoder_norm", dim) | linear_shapes("decoder_pred", dim, n_out)


def decode(cfg, p, x: Tensor) -> Tensor:
    """Decoder blocks, norm and prediction, positions already added."""
    for i in range(cfg["decoder_depth"]):
        x = block(x, p.at("decoder_blocks", i), cfg["decoder_num_heads"], cfg["norm_eps"])
    return linear(layer_norm(x, p.at("decoder_norm"), cfg["norm_eps"]), p.at("decoder_pred"))


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` [B, K] of x [B, N, C]."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


# Operations


def mask_random(cfg, inputs, p, buffers):
    keep, ids_keep, ids_restore, mask = random_mask(inputs["noise"], cfg["mask_ratio"])
    return {"len_keep": torch.tensor([keep]), "ids_keep": ids_keep, "ids_restore": ids_restore, "mask": mask}


def mae_shapes(cfg) -> dict:
    dim, patch, chans = cfg["embed_dim"], cfg["patch_size"], cfg["in_chans"]
    shapes = {"cls_token": (1, 1, dim)} | conv_shapes("patch_embed.proj", chans, dim, patch)
    for i in range(cfg["depth"]):
        shapes |= under(f"blocks.{i}", block_shapes(dim, cfg["num_heads"], cfg["mlp_ratio"], True))
    return shapes | norm_shapes("norm", dim) | decoder_shapes(cfg, dim, patch * patch * chans)


def mae_buffers(cfg) -> dict:
    grid = cfg["img_size"] // cfg["patch_size"]
    widths = {"pos_embed": cfg["embed_dim"], "decoder_pos_embed": cfg["decoder_embed_dim"]}
    return {name: sincos_2d(dim, grid, True)[None] for name, dim in widths.items()}


def mim_mae(cfg, inputs, p, buffers):
    image, pos = inputs["image"], buffers["pos_embed"]
    keep, ids_keep, ids_restore, mask = random_mask(inputs["noise"], cfg["mask_ratio"])
    x = patch_embed(image, p.at("patch_embed"), cfg["patch_size"]) + pos[:, 1:]
    cls = (p["cls_token"] + pos[:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls, take(x, ids_keep)], 1)
    for i in range(cfg["depth"]):
        x = block(x, p.at("blocks", i), cfg["num_heads"], cfg["norm_eps"])
    x = linear(layer_norm(x, p.at("norm"), cfg["norm_eps"]), p.at("decoder_embed"))
    hidden = p["mask_token"].expand(len(x), mask.shape[1] - keep, -1)
    tokens = take(torch.cat([x[:, 1:], hidden], 1), ids_restore)
    pred = decode(cfg, p, torch.cat([x[:, :1], tokens], 1) + buffers["decoder_pos_embed"])[:, 1:]
    loss = pixel_loss(image, pred, mask, cfg["patch_size"], cfg["norm_pix_loss"])
    return {"loss": loss, "pred": pred, "mask": mask}


OPS = {
    "mask.random": Op(mask_random, data=("noise",)),
    "mim.mae": Op(mim_mae, mae_shapes, mae_buffers, data=("noise",), seeds=("loss",)),
}
