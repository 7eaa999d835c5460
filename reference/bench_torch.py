"""PyTorch twin of `karat bench`: one JSON line per model and mode.

    python bench_torch.py [--threads N] [--batch B] [--repeat R] [--warmup W] [--modes inference train] [--names NAME...]

`train` is forward, backward and AdamW in float32; `inference` the forward pass of the timm models. The masked-image-modeling
twins are the formulas of `karat_ref`: SimMIM on all tokens; GreenMIM in its grouped form with the released rules (groups of the
fullest window, the whole block on padded groups). Their masks and grouping plans are made anew, and timed, in every step. Every
measurement has its own process, so that the peak memory is its own; `base_rss_bytes` is the peak before the first step
(libraries, parameters).
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time

import torch

from karat_ref import OPS, greenmim
from karat_ref.case import Scope, draw_parameter

SWIN_B = dict(patch_size=4, in_chans=3, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], mlp_ratio=4.0)
SWIN_B |= dict(qkv_bias=True, qk_scale=None, ape=False, patch_norm=True)
SIMMIM = SWIN_B | dict(encoder="swin", norm_eps=1e-5, norm_target=0, encoder_stride=32)
GREENMIM = SWIN_B | dict(norm_eps=1e-6, decoder_embed_dim=512, decoder_depth=1, decoder_num_heads=16)
GREENMIM |= dict(mask_ratio=0.75, norm_pix_loss=True, decoder_order="noise_rank")

MIM = {
    "simmim_swin_base_192_w6": ("mim.simmim", SIMMIM | dict(img_size=192, window_size=6)),
    "simmim_swin_base_224_w7": ("mim.simmim", SIMMIM | dict(img_size=224, window_size=7)),
    "greenmim_swin_base_224_w7": ("mim.greenmim", GREENMIM | dict(img_size=224, window_size=7)),
}
TIMM = [
    "vit_tiny_patch16_224",
    "deit_small_patch16_224",
    "xcit_nano_12_p16_224",
    "xcit_tiny_12_p16_224",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "swin_tiny_patch4_window7_224",
    "beit_base_patch16_224",
]


def mim_step(name: str, batch: int):
    """(parameters, loss function) of a MIM twin."""
    op_name, config = MIM[name]
    op, generator = OPS[op_name], torch.Generator().manual_seed(0)
    params = {k: (0.1 * draw_parameter(k, s, generator)).requires_grad_() for k, s in op.shapes(config).items()}
    buffers = {k: v.float() for k, v in op.buffers(config).items()}
    image = torch.randn(batch, 3, config["img_size"], config["img_size"])

    def simmim():
        cells = (config["img_size"] // 32) ** 2
        perm = torch.stack([torch.randperm(cells) for _ in range(batch)])
        sizes = dict(input_size=config["img_size"], mask_patch_size=32, model_patch_size=4, mask_ratio=0.6)
        mask = OPS["mask.simmim"].forward(sizes, {"perm": perm}, None, {})["mask"]
        return op.forward(config, {"image": image, "mask": mask}, Scope(params), buffers)["loss"]

    def green():
        noise = torch.rand(buffers["decoder_pos_embed"].shape[1])
        return greenmim.mim_greenmim(config, {"image": image, "noise": noise}, Scope(params), buffers, "grouped")["loss"]

    return list(params.values()), simmim if op_name == "mim.simmim" else green


def timm_step(name: str, batch: int, train: bool):
    """(parameters, function) of a timm model: its loss, or its logits."""
    import timm

    model = timm.create_model(name, pretrained=False).train(train)
    image, target = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    forward = lambda: torch.nn.functional.cross_entropy(model(image), target) if train else model(image)
    return list(model.parameters()), forward


def peak_rss() -> int:
    """Bytes; Linux reports KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(name: str, mode: str, batch: int, threads: int, repeat: int, warmup: int) -> dict:
    """One measurement; runs in a process of its own."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    params, forward = mim_step(name, batch) if name in MIM else timm_step(name, batch, mode == "train")
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.05) if mode == "train" else None

    def step():
        if optimizer is None:
            with torch.inference_mode():
                forward()
            return
        optimizer.zero_grad(set_to_none=True)
        forward().backward()
        optimizer.step()

    base, seconds = peak_rss(), []
    for _ in range(warmup + repeat):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    seconds = seconds[warmup:]
    result = dict(name=name, mode=mode, batch=batch, threads=threads, parameters=sum(p.numel() for p in params))
    result |= dict(seconds=seconds, images_per_second=batch / statistics.median(seconds), peak_rss_bytes=peak_rss(), base_rss_bytes=base)
    return result | dict(torch=torch.__version__)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--modes", nargs="+", default=["inference", "train"], choices=["inference", "train"])
    parser.add_argument("--names", nargs="+", default=[*MIM, *TIMM], metavar="NAME", help="MIM twins, or any timm model")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for name in args.names:
        for mode in args.modes:
            if name in MIM and mode == "inference":
                continue
            with context.Pool(1) as pool:
                job = (name, mode, args.batch, args.threads, args.repeat, args.warmup)
                print(json.dumps(pool.apply(measure, job)), flush=True)


if __name__ == "__main__":
    main()
