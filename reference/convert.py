"""Turns a PyTorch checkpoint into a safetensors file that karat reads.

    python3 reference/convert.py IN.pth OUT.safetensors     # needs torch, safetensors

Looks inside the usual wrappers (`ema` first, then `model`, `state_dict`, …), takes `module.` off the names, keeps tensors only and says
what it left out. Nothing in the file is executed (`weights_only=True`); of objects beside tensors, only argparse.Namespace is
accepted, in which many authors keep their options.
"""

import argparse
import os
import pathlib
import pickle
import sys
import tempfile

import torch
from safetensors.torch import save_file

# Averaged weights first: they are what the papers report.
WRAPPERS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "model", "state_dict", "model_state_dict", "module", "network", "net")
PREFIXES = ("module.", "_orig_mod.")


def holds_tensors(value):
    return isinstance(value, torch.Tensor) or isinstance(value, dict) and any(holds_tensors(inside) for inside in value.values())


def unwrap(checkpoint):
    """The state_dict inside a checkpoint, and the keys that lead to it."""
    path = []
    while isinstance(checkpoint, dict):
        inside = next((key for key in WRAPPERS if isinstance(checkpoint.get(key), dict) and holds_tensors(checkpoint[key])), None)
        if inside is None:
            return checkpoint, path
        for key in checkpoint:
            if key != inside:
                print(f"left out: {'.'.join(path + [str(key)])}")
        path.append(inside)
        checkpoint = checkpoint[inside]
    raise ValueError(f"expected a dictionary of tensors, found {type(checkpoint).__name__}")


def tensors(state):
    """The tensors of a state_dict under their plain names, each with memory of its own."""
    kept = {}
    for key, value in state.items():
        name = str(key)
        while (prefix := next((p for p in PREFIXES if name.startswith(p)), None)) is not None:
            name = name.removeprefix(prefix)
        if not isinstance(value, torch.Tensor):
            print(f"left out: {key} ({type(value).__name__})")
        elif name in kept:
            raise ValueError(f"two tensors are called `{name}`")
        else:
            kept[name] = value.detach().cpu().contiguous().clone()
    if not kept:
        raise ValueError("no tensors in it")
    return kept


def load(source):
    """What is in a file, tensors and plain containers only."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own advice, to run the file's code, is not for files from elsewhere.
        message = "not a whole PyTorch file, or one that holds more than tensors and plain containers"
        raise ValueError(f"{message}{refused(source)}") from error


def refused(source):
    """The classes and functions that a checkpoint would have to call."""
    try:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(source)) - {"argparse.Namespace"}
    except Exception:  # not readable at all
        return ""
    return f": {', '.join(sorted(names))}" if names else ""


def convert(source, target):
    checkpoint = load(source)
    state, path = unwrap(checkpoint)
    kept = tensors(state)
    target = pathlib.Path(target)
    # Into a file beside it, then renamed: never half a file.
    handle, beside = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file(kept, beside)
        os.chmod(beside, 0o644)  # temporary files are their owner's alone
        os.replace(beside, target)
    except BaseException:
        os.unlink(beside)
        raise
    inside = f" (from `{'.'.join(path)}`)" if path else ""
    print(f"{target}: {len(kept)} tensors, {sum(t.numel() for t in kept.values())} numbers{inside}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN.pth")
    parser.add_argument("target", metavar="OUT.safetensors")
    arguments = parser.parse_args()
    try:
        convert(arguments.source, arguments.target)
    except Exception as error:  # a damaged file raises anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        sys.exit(f"{arguments.source}: {first}")


if __name__ == "__main__":
    main()
