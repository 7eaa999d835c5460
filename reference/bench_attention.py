"""karat against PyTorch on every attention mechanism: same shapes, same threads, by turns.

    cargo build --release
    python reference/bench_attention.py [--tokens 196 784 3136 12544] [--threads 2] [--names attention.xca ...] [--json FILE]

Every mechanism and size gets `--rounds` turns of `--seconds` each of `karat bench attention` and of its twin in `twins/`, so that what
else the machine does hits both. Printed: medians in milliseconds and PyTorch's time over karat's, forward and backward. The last lines
are geometric means over all rows.
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time

import torch

from twins import TWINS

KARAT = pathlib.Path(__file__).resolve().parent.parent / "target" / "release" / "karat"


def karat(name: str, args, tokens: int) -> dict:
    """One turn of karat: lists of seconds."""
    sizes = ["--tokens", str(tokens), "--dim", str(args.dim), "--heads", str(args.heads), "--seconds", str(args.seconds)]
    command = [str(args.karat), "--threads", str(args.threads), "bench", "attention", name, *sizes, "--json", "-"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    point = json.loads(run.stdout)["points"][0]
    return dict(forward=point["forward_seconds"], backward=point["backward_seconds"])


class Twin:
    """The PyTorch side of one mechanism and size."""

    def __init__(self, name: str, args, tokens: int):
        torch.manual_seed(0)
        self.module, self.inputs = TWINS[name](tokens, args.dim, args.heads)
        self.leaves = [x for x in self.inputs if x.is_floating_point() and x.requires_grad] + list(self.module.parameters())
        self.cotangent = None
        self.step()

    def step(self) -> tuple[float, float]:
        """Seconds of a forward and a backward pass."""
        for leaf in self.leaves:
            leaf.grad = None
        start = time.perf_counter()
        y = self.module(*self.inputs)
        middle = time.perf_counter()
        y = y[0] if isinstance(y, tuple) else y
        if self.cotangent is None:
            self.cotangent = torch.randn_like(y)
            middle = time.perf_counter()
        y.backward(self.cotangent)
        return middle - start, time.perf_counter() - middle

    def turn(self, seconds: float) -> dict:
        self.step()
        times, start = [], time.perf_counter()
        while len(times) < 3 or time.perf_counter() - start < seconds:
            times.append(self.step())
        return dict(forward=[t[0] for t in times], backward=[t[1] for t in times])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[196, 784, 3136, 12544])
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--names", nargs="+", default=sorted(TWINS), metavar="NAME")
    parser.add_argument("--karat", type=pathlib.Path, default=KARAT)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, skipped = [], []
    print(f"PyTorch {torch.__version__}, {args.threads} threads, C = {args.dim}, {args.heads} heads; ms, and PyTorch's time over karat's")
    print(f"{'mechanism':<30}{'tokens':>8}{'karat fwd':>11}{'torch fwd':>11}{'ratio':>7}{'karat bwd':>11}{'torch bwd':>11}{'ratio':>7}")
    for name in args.names:
        for tokens in args.tokens:
            try:
                twin = Twin(name, args, tokens)
            except (RuntimeError, MemoryError) as error:
                skipped.append(f"{name} at {tokens} tokens: PyTorch: {str(error).splitlines()[0]}")
                continue
            ours, theirs = dict(forward=[], backward=[]), dict(forward=[], backward=[])
            for _ in range(args.rounds):
                for side, turn in [(ours, karat(name, args, tokens)), (theirs, twin.turn(args.seconds))]:
                    for key in side:
                        side[key] += turn[key]
            del twin
            middle = {key: (statistics.median(ours[key]), statistics.median(theirs[key])) for key in ours}
            row = dict(name=name, tokens=tokens)
            line = f"{name:<30}{tokens:>8}"
            for key, (a, b) in middle.items():
                row |= {f"{key}_karat": a, f"{key}_torch": b, f"{key}_ratio": b / a}
                line += f"{a * 1e3:>11.3f}{b * 1e3:>11.3f}{b / a:>7.2f}"
            rows.append(row)
            print(line, flush=True)
    for line in skipped:
        print(line)
    if rows:
        for key in ("forward", "backward"):
            mean = math.exp(statistics.fmean(math.log(row[f"{key}_ratio"]) for row in rows))
            behind = [f"{row['name']}@{row['tokens']}" for row in rows if row[f"{key}_ratio"] < 1]
            print(f"{key}: geometric mean {mean:.2f}; behind PyTorch: {', '.join(behind) or 'none'}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
