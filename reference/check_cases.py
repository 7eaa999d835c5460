"""Answers existing golden cases again with the formulas of `karat_ref` and compares outputs and gradients.

python check_cases.py PATH...        (case files, or folders searched recursively)
"""

import argparse
import sys
from pathlib import Path

import torch

from karat_ref import OPS
from karat_ref.case import Case, Op, evaluate, read_case

TOLERANCE = 1e-9
ZERO_TOLERANCE = 1e-11


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max|a - r| / max|r|; infinite for a different shape, type or integer."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if not actual.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    if not actual.numel():
        return 0.0
    worst = (actual - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)
    return worst if worst == worst else float("inf")


def compare(op: Op, case: Case, forward) -> tuple[float, str]:
    """Worst error of a case and where it is; 0 when everything agrees exactly."""
    outputs, _, grads = evaluate(op, case, forward)
    worst = [(error(outputs[k], r), f"output.{k}") if k in outputs else (float("inf"), f"output.{k}") for k, r in case.outputs.items()]
    worst += [(float("inf"), f"output.{k} is not in the case") for k in outputs.keys() - case.outputs.keys()]
    shapes = {k: tuple(v.shape) for k, v in case.params.items()}
    worst += [(float("inf"), f"parameters {name}") for name, _ in shapes.items() ^ op.shapes(case.config).items()]
    worst += [(error(grads[k], r), f"grad.{k}") for k, r in case.grads.items()]
    scale = max([1.0] + [g.abs().max().item() for g in grads.values()])
    for name in case.zero_grads:
        if grads[name].abs().max() > ZERO_TOLERANCE * scale:
            worst.append((float("inf"), f"{name} has a gradient"))
    return max(worst)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    passed = failed = skipped = 0
    for path in parser.parse_args().paths:
        for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
            case = read_case(file)
            op = OPS.get(case.op)
            if op is None:
                skipped += 1
                continue
            for form in filter(None, (op.forward, op.other)):
                worst, where = compare(op, case, form)
                ok = worst <= TOLERANCE
                passed, failed = passed + ok, failed + (not ok)
                print(f"{'ok   ' if ok else 'FAIL '} {case.op} {file.stem} {form.__name__}: {worst:.1e} {where}")
    print(f"{passed} passed, {failed} failed, {skipped} cases of other operations skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
