"""Makes fixtures/resize/pil.json: small images and what Pillow's bicubic resize makes of them; and the usual evaluation
transform (shorter side resized, centre cut out, with torchvision's rounding), in colour and as luma.

    python3 reference/make_resize_fixtures.py     # needs Pillow
"""

import json
import pathlib
import random

import PIL
from PIL import Image

# (height, width) of the image, (height, width) of the result, channels
CASES = [
    ((13, 17), (8, 8), 1),
    ((13, 17), (8, 8), 3),
    ((28, 28), (32, 32), 1),
    ((30, 40), (24, 24), 3),
    ((9, 9), (9, 20), 3),
    ((20, 7), (3, 7), 1),
    ((1, 1), (5, 3), 3),
    ((2, 50), (6, 1), 1),
]

# (height, width) of the image, its shorter side after resizing, side of the centre, mode of the result
CENTERS = [((37, 50), 24, 20, "RGB"), ((37, 50), 24, 19, "L"), ((21, 10), 10, 7, "RGB"), ((16, 11), 13, 13, "L")]


def main():
    rng = random.Random(1)
    cases = []
    for (h, w), (oh, ow), channels in CASES:
        # Half of the pixels are saturated, so that overshoot has to be clipped.
        data = bytes(rng.choice((0, 255, rng.randrange(256), rng.randrange(256))) for _ in range(h * w * channels))
        image = Image.frombytes("L" if channels == 1 else "RGB", (w, h), data)
        out = image.resize((ow, oh), Image.Resampling.BICUBIC).tobytes()
        cases.append({"channels": channels, "from": [h, w], "to": [oh, ow], "input": data.hex(), "output": out.hex()})
    centers = []
    for (h, w), short, side, mode in CENTERS:
        data = bytes(rng.randrange(256) for _ in range(h * w * 3))
        image = Image.frombytes("RGB", (w, h), data).convert(mode)
        size = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
        out = image.crop((left, top, left + side, top + side)).tobytes()
        centers.append({"channels": len(mode), "from": [h, w], "resize": short, "size": side, "input": data.hex(), "output": out.hex()})
    path = pathlib.Path(__file__).parent.parent / "fixtures/resize/pil.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"source": f"Pillow {PIL.__version__}, Image.resize, BICUBIC", "cases": cases, "centers": centers}, indent=1)
    path.write_text(text + "\n")


if __name__ == "__main__":
    main()
