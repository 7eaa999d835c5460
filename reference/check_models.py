"""Compares karat's networks with timm's, or where timm has none with `networks/`, at their real sizes, in float32.

python check_models.py [NAME…] [--karat COMMAND] [--full]

For every name of the table: timm (or PyTorch) builds the network, all of its parameters and running statistics are perturbed (so that no zero
or one hides a mistake), its state_dict is saved as it is, karat loads it by name and answers the same image; the logits
have to agree. Networks are cut to a few blocks unless `--full` is given: the example program is slow without optimisation. SPViTs are always whole.

COMMAND runs the example `logits`; by default `cargo run --quiet --example logits --`.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, NamedTuple

import timm
import torch
from networks import NETWORKS
from safetensors.torch import load_file, save_file

# max |a − r| / max |r| of the logits: both sides compute in float32.
TOLERANCE = 1e-4


class Check(NamedTuple):
    """One comparison: timm's name, or one of `networks/` (karat's as well, unless given), and what both sides change to be small."""

    timm: str
    timm_args: dict[str, Any] = {}
    config: dict[str, Any] = {}
    karat: str = ""
    # The size of the image, and of karat's network, if it is not the published one.
    size: int | None = None
    # From timm's state_dict to that of another publication of the same weights.
    rename: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda state: state


def swin_official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' names: merging belongs to the stage before it, `head` is the classifier, two constants are stored."""
    out = {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    for name, value in state.items():
        parts = name.split(".")
        if parts[:2] == ["head", "fc"]:
            parts = ["head", parts[2]]
        elif parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        out[".".join(parts)] = value
        if name.endswith("relative_position_bias_table"):
            out[name.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
    return out


def xcit_official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' names: `pos_embeder`, and one `qkv` in the class blocks."""
    out = {}
    for name, value in state.items():
        if ".attn.q." in name:
            value = torch.cat([state[name.replace(".q.", f".{part}.")] for part in "qkv"])
        if ".attn.k." not in name and ".attn.v." not in name:
            out[name.replace(".attn.q.", ".attn.qkv.").replace("pos_embed.", "pos_embeder.")] = value
    return out


def cait_official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As saved by the authors' distributed training."""
    return {f"module.{name}": value for name, value in state.items()}


def coat_official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the second names of shared modules, with the authors' norms that nothing uses."""
    shared = (".cpe.", ".crpe.", ".mlp3.", ".mlp4.")
    out = {name: value for name, value in state.items() if not any(part in name for part in shared)}
    return out | {f"norm{s}.{part}": torch.ones(64) for s in (1, 2, 3) for part in ("weight", "bias")}


CHECKS = {
    "swin": Check("swin_tiny_patch4_window7_224", {"depths": (2, 2, 2, 1)}, {"depths": [2, 2, 2, 1]}),
    "swin_official": Check("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 2)}, {"depths": [1, 1, 1, 2]}, rename=swin_official),
    # 100 pixels: 25, 13, 7 and 4 tokens a side; windows and cells are padded.
    "swin_odd": Check("swin_tiny_patch4_window7_224", {"depths": (2, 2, 2, 1), "img_size": 100}, {"depths": [2, 2, 2, 1]}, size=100),
    "xcit": Check("xcit_nano_12_p16_224", {"depth": 3}, {"depth": 3}),
    "xcit_official": Check("xcit_tiny_12_p8_224", {"depth": 1}, {"depth": 1}, rename=xcit_official),
    "cait": Check("cait_xxs24_224", {"depth": 3}, {"depth": 3}),
    "cait_official": Check("cait_xxs36_224", {"depth": 1}, {"depth": 1}, rename=cait_official),
    "coat": Check(
        "coat_tiny",
        {"serial_depths": (1, 1, 1, 1), "parallel_depth": 2},
        {"serial_depths": [1, 1, 1, 1], "parallel_depth": 2},
    ),
    "coat_lite": Check("coat_lite_tiny"),
    "coat_official": Check(
        "coat_lite_tiny",
        {"serial_depths": (1, 1, 1, 1)},
        {"serial_depths": [1, 1, 1, 1]},
        rename=coat_official,
    ),
    "beit": Check("beit_base_patch16_224", {"depth": 2}, {"depth": 2}),
    "vit": Check("deit_tiny_patch16_224", {"depth": 3}, {"depth": 3}),
    "deit_distilled": Check("deit_tiny_distilled_patch16_224", {"depth": 3}, {"depth": 3}),
    "resnet50": Check("resnet50", {"layers": (1, 1, 1, 1)}, {"layers": [1, 1, 1, 1]}),
    "resnet18": Check("resnet18", {"layers": (1, 1, 1, 1)}, {"layers": [1, 1, 1, 1]}),
    "dilateformer": Check("dilateformer_tiny", {"depths": (1, 1, 1, 1)}, {"depths": [1, 1, 1, 1]}),
    "coc": Check("coc_tiny", {"depths": (1, 1, 1, 1)}, {"layers": [1, 1, 1, 1]}),
    "t2t": Check("t2t_vit_14", {"depths": 2}, {"depth": 2}),
    "t2t_transformer": Check("t2t_vit_t_14", {"depths": 2}, {"depth": 2}),
    "xvit": Check("xvit_tiny", {"depths": 2}, {"depth": 2}),
    "pvt": Check("pvt_tiny", {"depths": (1, 1, 1, 1)}, {"depths": [1, 1, 1, 1]}),
    "pvt_um": Check("pvt_small_256", {"depths": (1, 1, 1, 1)}, {"depths": [1, 1, 1, 1]}, size=256),
    "um_swin": Check("um_swin_tiny_256", {"depths": (2, 2, 1, 1)}, {"depths": [2, 2, 1, 1]}, size=256),
    "hpvit": Check("hpvit_base", {"depths": (1, 1, 1, 1)}, {"depths": [1, 1, 1, 1]}),
    "vt_resnet": Check("vt_resnet18", {"depths": (1, 1, 1)}, {"layers": [1, 1, 1]}),
    "vt_multihead": Check("vt_resnet18_multihead", {"depths": (1, 1, 1)}, {"layers": [1, 1, 1]}),
    "gmm_vit": Check("gmm_vit", {"depths": 2}, {"depth": 2}, size=32),
    "spvit": Check("spvit_deit_b_l008_t60"),
    "spvit_swin": Check("spvit_swin_t_l28_t32"),
}


def perturb(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Moves every parameter and running statistic away from its start."""
    with torch.no_grad():
        running = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
        for tensor in [*model.parameters(), *running]:
            tensor.mul_(1.0 + 0.2 * torch.rand(tensor.shape, generator=generator))
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))


def compare(name: str, check: Check, command: list[str], full: bool) -> bool:
    """Runs both sides; prints and returns whether they agree."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    build = NETWORKS.get(check.timm) or (lambda **args: timm.create_model(check.timm, **args))
    # The size of the images stays, whatever the depth.
    model = build(**{key: value for key, value in check.timm_args.items() if not full or key == "img_size"}).eval()
    perturb(model, generator)
    side = check.size or (224 if check.timm in NETWORKS else model.default_cfg["input_size"][-1])
    images = torch.randn(1, 3, side, side, generator=generator)
    with torch.no_grad():
        expected = model(images)
    with tempfile.TemporaryDirectory() as folder:
        weights, inputs, out = (str(Path(folder) / f"{file}.safetensors") for file in ("weights", "images", "out"))
        save_file({k: v.clone().contiguous() for k, v in check.rename(model.state_dict()).items()}, weights)
        save_file({"images": images}, inputs)
        words = ["--model", check.karat or check.timm, "--weights", weights, "--images", inputs, "--out", out]
        words += ["--size", str(check.size)] if check.size else []
        words += ["--config", json.dumps(check.config)] if check.config and not full else []
        done = subprocess.run(command + words, capture_output=True, text=True)
        if done.returncode:
            print(f"FAIL  {name}: {done.stderr.strip()}")
            return False
        logits = load_file(out)["logits"].mean(0)
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    ok = error <= TOLERANCE
    print(f"{'ok   ' if ok else 'FAIL '} {name} {check.timm}: {error:.1e} ({done.stdout.strip()})", flush=True)
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CHECKS))
    parser.add_argument("--karat", default="cargo run --quiet --example logits --")
    parser.add_argument("--full", action="store_true", help="all blocks")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in CHECKS]
    if unknown:
        parser.error(f"no check {unknown[0]}; known: {', '.join(CHECKS)}")
    names = args.names or list(CHECKS)
    results = [compare(name, CHECKS[name], shlex.split(args.karat), args.full) for name in names]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
