"""Makes fixtures/preprocess/*.safetensors: decoded pixels, what timm's evaluation transform cuts out of them (8-bit), and its result.

    python3 reference/make_preprocess_fixtures.py     # needs timm, torchvision, Pillow, safetensors
"""

import pathlib
import random

import numpy
import PIL
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
HALF = ((0.5,) * 3, (0.5,) * 3)

# name, (height, width), mode, side of the result, part kept, (mean, deviation)
CASES = [
    ("wide", (37, 53), "RGB", 24, 0.9, IMAGENET),
    ("tall", (53, 37), "RGB", 23, 0.875, IMAGENET),
    ("enlarged", (20, 61), "RGB", 28, 0.95, HALF),
    ("square", (45, 45), "RGB", 32, 1.0, IMAGENET),
    ("cut", (26, 41), "RGB", 24, 0.9, IMAGENET),
    ("grey", (29, 31), "L", 16, 0.7, HALF),
    ("strip", (83, 5), "RGB", 16, 0.875, IMAGENET),
]


def main():
    folder = pathlib.Path(__file__).parent.parent / "fixtures/preprocess"
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(2)
    for name, (h, w), mode, size, crop, (mean, std) in CASES:
        channels = len(mode)
        # Half of the pixels are saturated, so that overshoot has to be clipped.
        data = bytes(rng.choice((0, 255, rng.randrange(256), rng.randrange(256))) for _ in range(h * w * channels))
        image = Image.frombytes(mode, (w, h), data).convert("RGB")
        transform = create_transform((3, size, size), is_training=False, interpolation="bicubic", crop_pct=crop, mean=mean, std=std)
        resize, cut, *_ = transform.transforms
        tensors = {
            "image": torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(h, w, channels),
            "cut": torch.from_numpy(numpy.array(cut(resize(image)))),
            "output": transform(image),
        }
        versions = f"timm {timm.__version__}, torchvision {torchvision.__version__.split('+')[0]}, Pillow {PIL.__version__}"
        metadata = {"source": versions, "size": str(size), "crop": repr(crop), "normalization": "half" if mean == HALF[0] else "imagenet"}
        save_file(tensors, folder / f"{name}.safetensors", metadata)


if __name__ == "__main__":
    main()
