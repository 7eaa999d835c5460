"""Golden answers in float64: formulas written from the specification sheets, one module per sheet."""

from . import greenmim, mae, simmim, swin, vit

#: Operation name -> `case.Op`.
OPS = {**vit.OPS, **swin.OPS, **greenmim.OPS, **mae.OPS, **simmim.OPS}
