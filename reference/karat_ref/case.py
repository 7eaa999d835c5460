"""Golden cases: reading, writing and answering them (format: the specification's README)."""

import json
import struct
from dataclasses import dataclass, field
from typing import Callable

import torch
from torch import Tensor

#: A gradient below this, relative to the largest one of its case (at least 1), is recorded as identically zero.
ZERO = 1e-13


class Scope:
    """Named tensors seen from a prefix: `p.at("blocks", 0)["norm1.weight"]` is `blocks.0.norm1.weight`."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str = ""):
        self.tensors, self.prefix = tensors, prefix

    def at(self, *parts) -> "Scope":
        return Scope(self.tensors, self.prefix + "".join(f"{part}." for part in parts))

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(self.prefix + name)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]


@dataclass(frozen=True)
class Op:
    """One operation of a sheet.

    `forward(config, inputs, params, buffers)` returns the outputs by name; `shapes(config)` gives the parameters' shapes and
    `buffers(config)` the buffers. Inputs named in `data` have no gradient, integer inputs never have. `seeds` names the outputs
    that get a cotangent (default: all floating-point ones). `other` is a second formula for `forward`, for cross-checks.
    """

    forward: Callable
    shapes: Callable = lambda config: {}
    buffers: Callable = lambda config: {}
    data: tuple[str, ...] = ()
    seeds: tuple[str, ...] | None = None
    other: Callable | None = None


@dataclass
class Case:
    """Everything a case file holds, by kind; gradients are keyed `input.<name>` or `param.<name>`."""

    op: str
    config: dict
    inputs: dict[str, Tensor]
    params: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    cotangents: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    zero_grads: list[str] = field(default_factory=list)


def leaf_names(op: Op, case: Case) -> list[str]:
    """The differentiable inputs and parameters of a case."""
    inputs = [f"input.{k}" for k, v in case.inputs.items() if v.is_floating_point() and k not in op.data]
    return inputs + [f"param.{k}" for k in case.params]


def evaluate(op: Op, case: Case, forward: Callable | None = None, generator: torch.Generator | None = None):
    """Outputs, cotangents and gradients of a case. With a generator, cotangents are drawn (a scalar `loss` gets 1)."""
    names = leaf_names(op, case)
    inputs, params = dict(case.inputs), dict(case.params)
    leaves = []
    for name in names:
        kind, key = name.split(".", 1)
        table = inputs if kind == "input" else params
        table[key] = table[key].detach().clone().requires_grad_()
        leaves.append(table[key])
    outputs = (forward or op.forward)(case.config, inputs, Scope(params), case.buffers)
    cotangents = dict(case.cotangents)
    if generator is not None:
        for name, y in outputs.items():
            if y.requires_grad and (op.seeds is None or name in op.seeds):
                is_loss = name == "loss" and y.dim() == 0
                cotangents[name] = torch.ones(()) if is_loss else torch.randn(y.shape, generator=generator)
    elif "loss" in outputs and "loss" not in cotangents:
        cotangents["loss"] = torch.ones(())
    grads = {}
    roots = [name for name in cotangents if outputs[name].requires_grad]
    if roots:
        # A cotangent is kept contiguous: PyTorch's CPU BatchNorm backward misreads a permuted one at batch 1.
        seeds = [cotangents[name].contiguous() for name in roots]
        got = torch.autograd.grad([outputs[name] for name in roots], leaves, seeds, allow_unused=True)
        grads = {n: torch.zeros_like(x) if g is None else g for n, x, g in zip(names, leaves, got)}
    return {k: v.detach() for k, v in outputs.items()}, cotangents, grads


def draw_parameter(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random parameter of a size that keeps activations near 1 and no gradient negligible."""
    x = torch.randn(shape, generator=generator)
    if len(shape) <= 1:
        is_gain = name.endswith("weight") or "gamma" in name
        return 1 + 0.2 * x if is_gain else 0.3 * x
    if any(word in name for word in ("table", "token", "pos_embed")):
        return 0.5 * x
    return x / max(1, x[0].numel()) ** 0.5


def answer(op_name: str, op: Op, config: dict, inputs: dict[str, Tensor], generator: torch.Generator) -> Case:
    """Draws parameters and cotangents, computes the answer."""
    params = {k: draw_parameter(k, s, generator) for k, s in op.shapes(config).items()}
    case = Case(op_name, config, inputs, params, op.buffers(config))
    case.outputs, case.cotangents, grads = evaluate(op, case, generator=generator)
    bound = ZERO * max([1.0] + [g.abs().max().item() for g in grads.values() if g.numel()])
    for name, g in grads.items():
        if g.abs().max() <= bound:
            case.zero_grads.append(name)
        else:
            case.grads[name] = g
    return case


KINDS = {
    "input": "inputs",
    "param": "params",
    "buffer": "buffers",
    "output": "outputs",
    "cotangent": "cotangents",
    "grad": "grads",
    "after": "after",
}
DTYPES = {"F64": (torch.float64, "d"), "I64": (torch.int64, "q")}


def write_case(path, case: Case, source: str) -> int:
    """Writes a case file, byte for byte reproducible; returns its size."""
    tensors = {f"{kind}.{k}": v for kind, attr in KINDS.items() for k, v in getattr(case, attr).items()}
    meta = {"karat.case": "1", "op": case.op, "config": json.dumps(case.config), "source": source}
    if case.zero_grads:
        meta["zero_grads"] = json.dumps(case.zero_grads)
    header, body = {"__metadata__": meta}, b""
    for name in sorted(tensors):
        x = tensors[name].detach().contiguous()
        dtype = "F64" if x.is_floating_point() else "I64"
        assert x.dtype == DTYPES[dtype][0], f"{name}: {x.dtype}"
        data = struct.pack(f"<{x.numel()}{DTYPES[dtype][1]}", *x.flatten().tolist())
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head + body)
    return 8 + len(head) + len(body)


def read_case(path) -> Case:
    """Reads a case file."""
    with open(path, "rb") as file:
        raw = file.read()
    (size,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + size])
    meta = header.pop("__metadata__")
    case = Case(meta["op"], json.loads(meta["config"]), {}, zero_grads=json.loads(meta.get("zero_grads", "[]")))
    for name, entry in header.items():
        dtype, code = DTYPES[entry["dtype"]]
        start, end = entry["data_offsets"]
        values = struct.unpack_from(f"<{(end - start) // 8}{code}", raw, 8 + size + start)
        kind, key = name.split(".", 1)
        getattr(case, KINDS[kind])[key] = torch.tensor(values, dtype=dtype).reshape(entry["shape"])
    return case
