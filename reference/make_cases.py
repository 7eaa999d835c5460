"""Writes golden cases with awkward sizes, computed in float64 by the formulas of `karat_ref`.

python make_cases.py -o DIR [--op NAME]... [--seed N] [--prefix ref-]
"""

import argparse
import zlib
from pathlib import Path

import torch

from karat_ref import OPS
from karat_ref.case import answer, write_case
from karat_ref.recipes import RECIPES, Draw

SOURCE = "karat reference formulas, PyTorch, float64"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="cases go to OUT/<op>/<prefix><name>.safetensors")
    parser.add_argument("--op", action="append", choices=sorted(RECIPES), help="only this operation (repeatable)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefix", default="ref-")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    total = 0
    for op in args.op or RECIPES:
        (args.out / op).mkdir(parents=True, exist_ok=True)
        for name, config, inputs in RECIPES[op]:
            # Every case has its own stream, so adding one leaves the others as they are.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{args.seed}/{op}/{name}".encode()))
            case = answer(op, OPS[op], config, inputs(Draw(generator)), generator)
            size = write_case(args.out / op / f"{args.prefix}{name}.safetensors", case, SOURCE)
            total += size
            zeros = f"  zero: {' '.join(case.zero_grads)}" if case.zero_grads else ""
            print(f"{size:8d}  {op}  {name}{zeros}")
    print(f"{total:8d}  bytes in all")


if __name__ == "__main__":
    main()
