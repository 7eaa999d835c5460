"""PyTorch twins of karat's attention mechanisms: one module per sheet, each with a table `TWINS`.

`TWINS[op](tokens, dim, heads)` returns a module and its inputs: one image, float32, the configuration of `karat bench attention`.
"""

import importlib
import pkgutil

TWINS = {}
for _module in pkgutil.iter_modules(__path__):
    TWINS.update(importlib.import_module(f"{__name__}.{_module.name}").TWINS)
