r"""Judge a kernel of your own: `attention.softmax` in PyTorch, answered for a golden case.

    karat case new attention.softmax --size tokens=17 -o case.safetensors \
        --config '{"dim": 64, "num_heads": 4, "qkv_bias": true, "proj_bias": true, "qk_norm": false}'
    python verify_kernel.py case.safetensors right.safetensors
    python verify_kernel.py case.safetensors wrong.safetensors --wrong
    karat verify case.safetensors --actual right.safetensors
    karat verify case.safetensors --actual wrong.safetensors

`--wrong` divides the scores by the root of the model's width instead of the head's: every shape fits, only the numbers are off.
`--fused` asks for PyTorch's fused kernel, `--device cuda --dtype bfloat16` for a GPU's in half precision, `--tf32` for products of ten bits.
"""

import argparse
import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, scaled_dot_product_attention


def attention(t: dict[str, torch.Tensor], heads: int, wrong: bool, fused: bool) -> torch.Tensor:
    """The kernel under test; put yours here."""
    x = t["input.x"]
    qkv = linear(x, t["param.qkv.weight"], t.get("param.qkv.bias"))
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    width = x.shape[-1] if wrong else q.shape[-1]
    if fused:
        y = scaled_dot_product_attention(q, k, v, scale=width**-0.5)
    else:
        y = (q @ k.transpose(-2, -1) * width**-0.5).softmax(-1) @ v
    return linear(y.transpose(1, 2).flatten(2), t["param.proj.weight"], t.get("param.proj.bias"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", help="a golden case of attention.softmax without qk_norm")
    parser.add_argument("output", help="the results to write, for `karat verify CASE --actual OUTPUT`")
    parser.add_argument("--wrong", action="store_true", help="scale by the model's width instead of the head's")
    parser.add_argument("--fused", action="store_true", help="scaled_dot_product_attention")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tf32", action="store_true", help="let matrix products of a GPU round their operands to ten bits")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    with safe_open(args.case, "pt") as file:
        meta = file.metadata()
    config = json.loads(meta["config"])
    if meta["op"] != "attention.softmax" or config.get("qk_norm"):
        parser.error(f"{args.case}: expected a case of attention.softmax without qk_norm, found {meta['op']} {meta['config']}")

    t = {name: x.to(args.device, getattr(torch, args.dtype)) for name, x in load_file(args.case).items()}
    leaves = [name for name in t if name.startswith(("input.", "param."))]
    for name in leaves:
        t[name].requires_grad_()
    y = attention(t, config["num_heads"], args.wrong, args.fused)
    grads = torch.autograd.grad(y, [t[name] for name in leaves], t["cotangent.y"])
    results = {"output.y": y.detach()} | {f"grad.{name}": g for name, g in zip(leaves, grads)}
    save_file({name: x.cpu().contiguous() for name, x in results.items()}, args.output)


if __name__ == "__main__":
    main()
