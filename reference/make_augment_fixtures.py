"""Makes fixtures/augment/pil.json: small pictures, grey and in colour, and what Pillow makes of them by each operation of random
augmentation.

    python3 reference/make_augment_fixtures.py     # needs Pillow
"""

import json
import pathlib
import random

import PIL
from PIL import Image, ImageEnhance, ImageOps

FILL = (124, 116, 104)
BILINEAR = Image.Resampling.BILINEAR

AMOUNTS = {
    "Identity": [0],
    "AutoContrast": [0],
    "Equalize": [0],
    "Rotate": [30.0, -13.5, 0.0, 90.0],
    "Solarize": [256, 100, 0],
    "Color": [0.1, 1.9, 1.0],
    "Posterize": [8, 5, 1],
    "Contrast": [0.19, 1.63],
    "Brightness": [0.55, 1.9],
    "Sharpness": [0.1, 1.9],
    "ShearX": [0.3, -0.17],
    "ShearY": [0.21, -0.3],
    "TranslateX": [3.15, -5.0],
    "TranslateY": [2.0, -4.27],
}


def apply(image, op, amount):
    fill = FILL[0] if image.mode == "L" else FILL

    def affine(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=BILINEAR, fillcolor=fill)

    return {
        "Identity": lambda: image,
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Rotate": lambda: image.rotate(amount, resample=BILINEAR, fillcolor=fill),
        "Solarize": lambda: ImageOps.solarize(image, amount),
        "Color": lambda: ImageEnhance.Color(image).enhance(amount),
        "Posterize": lambda: ImageOps.posterize(image, amount),
        "Contrast": lambda: ImageEnhance.Contrast(image).enhance(amount),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(amount),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(amount),
        "ShearX": lambda: affine(1, amount, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, amount, 1, 0),
        "TranslateX": lambda: affine(1, 0, amount, 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, amount),
    }[op]()


def main():
    rng = random.Random(3)
    pictures, images = [], []
    # The last two: too few pixels to equalise or smooth; a single value.
    for h, w, channels, values in [(17, 23, 3, None), (28, 28, 1, None), (9, 2, 3, None), (5, 6, 1, 77)]:
        low, span = (30, 190) if values is None else (values, 1)
        data = bytes(low + min(rng.randrange(span), rng.randrange(span)) for _ in range(h * w * channels))
        images.append(Image.frombytes("L" if channels == 1 else "RGB", (w, h), data))
        pictures.append({"height": h, "width": w, "channels": channels, "pixels": data.hex()})
    cases = [
        {"picture": i, "op": op, "amount": amount, "output": apply(image, op, amount).tobytes().hex()}
        for op, amounts in AMOUNTS.items()
        for amount in amounts
        for i, image in enumerate(images)
    ]
    path = pathlib.Path(__file__).parent.parent / "fixtures/augment/pil.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = {"source": f"Pillow {PIL.__version__}", "fill": bytes(FILL).hex(), "pictures": pictures, "cases": cases}
    path.write_text(json.dumps(file, indent=1) + "\n")


if __name__ == "__main__":
    main()
