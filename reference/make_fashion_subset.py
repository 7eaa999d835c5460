"""Makes the data set that is built into karat: a class-balanced subset of Fashion-MNIST.

    python3 reference/make_fashion_subset.py FOLDER [OUTPUT]

FOLDER holds the four original files (Debian: package dataset-fashion-mnist, /usr/share/datasets/fashion-mnist).
The first 600 training and the first 100 test images of each class are kept, in file order. The images and labels
are the same on every machine; the compressed bytes depend on the zlib version.
"""

import gzip
import io
import pathlib
import struct
import sys

PER_CLASS = {"train": 600, "t10k": 100}
CLASSES = 10


def read(path, magic, dims):
    data = gzip.decompress(path.read_bytes())
    head = struct.unpack_from(f">{1 + dims}I", data)
    if head[0] != magic:
        raise SystemExit(f"{path}: magic number {head[0]}, expected {magic}")
    return head[1:], data[4 * (1 + dims) :]


def write(path, magic, shape, body):
    buffer = io.BytesIO()
    # No file name and no time in the gzip header: the same input gives the same bytes.
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as f:
        f.write(struct.pack(f">{1 + len(shape)}I", magic, *shape) + body)
    path.write_bytes(buffer.getvalue())
    print(f"{path}: shape {shape}, {path.stat().st_size} bytes")


def main():
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    source = pathlib.Path(sys.argv[1])
    output = pathlib.Path(sys.argv[2]) if len(sys.argv) == 3 else pathlib.Path(__file__).parent.parent / "fixtures/fashion-mnist"
    output.mkdir(parents=True, exist_ok=True)
    for split, per_class in PER_CLASS.items():
        (count, height, width), pixels = read(source / f"{split}-images-idx3-ubyte.gz", 0x803, 3)
        (labelled,), labels = read(source / f"{split}-labels-idx1-ubyte.gz", 0x801, 1)
        if not count == labelled == len(labels) or len(pixels) != count * height * width:
            raise SystemExit(f"{source}: images and labels of {split} do not match")
        left = [per_class] * CLASSES
        keep = []
        for index, label in enumerate(labels):
            if left[label]:
                left[label] -= 1
                keep.append(index)
        if any(left):
            raise SystemExit(f"{source}: too few images in {split}: {left} missing per class")
        size = height * width
        body = b"".join(pixels[i * size : (i + 1) * size] for i in keep)
        write(output / f"{split}-images-idx3-ubyte.gz", 0x803, (len(keep), height, width), body)
        write(output / f"{split}-labels-idx1-ubyte.gz", 0x801, (len(keep),), bytes(labels[i] for i in keep))


if __name__ == "__main__":
    main()
