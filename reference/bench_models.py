"""karat against PyTorch on whole networks: same batch, threads and image size, by turns, so that noise hits both.

    cargo build --release
    python reference/bench_models.py [--names NAME...] [--modes infer train] [--rounds 3] [--repeat 3] [--batch 8] [--threads 2] [--json FILE]

PyTorch runs timm's networks in every mode that it has: eager, `torch.compile`, and for inference compiled with frozen weights; training
steps are forward, cross-entropy, backward and fused AdamW. The ratio is against the fastest of them. Memory is the peak resident set beyond
that of the process before the network was built.
"""

import argparse
import json
import math
import multiprocessing
import pathlib
import statistics
import subprocess
import sys
import time

from bench_torch import TIMM, peak_rss

# karat's small networks for images of 32 pixels: the timm network that each is a variant of, and how it differs.
SMALL = {
    "vit_micro": ("vit_tiny_patch16_224", dict(patch_size=4, embed_dim=144, depth=6, num_heads=6)),
    "swin_micro": ("swin_tiny_patch4_window7_224", dict(patch_size=2, window_size=4, embed_dim=48, depths=(2, 2, 2), num_heads=(3, 6, 12))),
    "xcit_micro": ("xcit_nano_12_p8_224", dict(embed_dim=96, depth=4, num_heads=4, cls_attn_layers=1)),
    "cait_micro": ("cait_xxs24_224", dict(patch_size=4, embed_dim=96, depth=6, num_heads=4)),
    "beit_micro": ("beit_base_patch16_224", dict(patch_size=4, embed_dim=144, depth=6, num_heads=6)),
}
KARAT = pathlib.Path(__file__).resolve().parent.parent / "target" / "release" / "karat"


def worker(connection, name: str, mode: str, variant: str, batch: int, threads: int):
    """One PyTorch process: builds the network, warms up, then answers each number n with the seconds of n steps and its memory."""
    import timm
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    base = peak_rss()
    if variant == "frozen":
        import torch._inductor.config

        torch._inductor.config.freezing = True
    train = mode == "train"
    timm_name, changes = SMALL.get(name, (name, {}))
    size = 32 if name in SMALL else timm.get_pretrained_cfg(name).input_size[-1]
    model = timm.create_model(timm_name, pretrained=False, **(changes and {"img_size": size, **changes})).train(train)
    images, target = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    run = model if variant == "eager" else torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True) if train else None

    def step():
        if not train:
            with torch.inference_mode() if variant == "eager" else torch.no_grad():
                run(images)
            return
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(run(images), target).backward()
        optimizer.step()

    for _ in range(3):
        step()
    connection.send("ready")
    while (steps := connection.recv()) is not None:
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        connection.send((seconds, peak_rss() - base))


class Torch:
    """A worker, as seen from outside."""

    def __init__(self, *job):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(theirs, *job))
        self.process.start()
        theirs.close()
        self.seconds, self.memory = [], 0
        try:
            self.connection.recv()
        except EOFError:  # no compiler, say: what it wrote to standard error stands there
            self.process.join()
            raise RuntimeError(f"PyTorch failed: {job}") from None

    def turn(self, steps: int):
        self.connection.send(steps)
        seconds, self.memory = self.connection.recv()
        self.seconds += seconds

    def close(self):
        self.connection.send(None)
        self.process.join()


def karat(name: str, mode: str, args) -> dict:
    """One turn of karat."""
    command = [str(args.karat), "--threads", str(args.threads), "bench", "model", name, "--mode", mode]
    run = subprocess.run(command + ["--batch", str(args.batch), "--repeat", str(args.repeat), "--json", "-"], capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=TIMM, metavar="NAME", help="of timm, or " + ", ".join(SMALL))
    parser.add_argument("--modes", nargs="+", default=["infer", "train"], choices=["infer", "train"])
    parser.add_argument("--variants", nargs="+", default=["eager", "compile", "frozen"], choices=["eager", "compile", "frozen"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--karat", type=pathlib.Path, default=KARAT)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    print(f"{'network':<32}{'mode':<7}{'karat':>9}{'PyTorch':>9}  {'its mode':<9}{'ratio':>7}{'of peak':>9}{'MB':>7}{'PyTorch':>9}")
    rows = []
    for name in args.names:
        for mode in args.modes:
            variants = [v for v in args.variants if mode == "infer" or v != "frozen"]
            twins = {}
            for variant in variants:
                try:
                    twins[variant] = Torch(name, mode, variant, args.batch, args.threads)
                except RuntimeError as error:
                    print(error, file=sys.stderr)
            ours = []
            for _ in range(args.rounds):
                ours.append(karat(name, mode, args))
                for twin in twins.values():
                    twin.turn(args.repeat)
            for twin in twins.values():
                twin.close()
            best = min(twins, key=lambda v: statistics.median(twins[v].seconds))
            seconds = statistics.median([s for run in ours for s in run["seconds"]])
            theirs = statistics.median(twins[best].seconds)
            row = dict(name=name, mode=mode, batch=args.batch, threads=args.threads, simd=ours[0]["simd"], ratio=theirs / seconds)
            row |= dict(karat_images_per_second=args.batch / seconds, torch_images_per_second=args.batch / theirs, torch_mode=best)
            row |= dict(fraction_of_peak=statistics.median(run["fraction_of_peak"] for run in ours))
            row |= dict(karat_bytes=max(run["peak_rss_bytes"] - run["base_rss_bytes"] for run in ours), torch_bytes=twins[best].memory)
            rows.append(row)
            print(
                f"{name:<32}{mode:<7}{row['karat_images_per_second']:>9.2f}{row['torch_images_per_second']:>9.2f}  {best:<9}"
                f"{row['ratio']:>7.2f}{row['fraction_of_peak']:>9.2f}{row['karat_bytes'] / 1e6:>7.0f}{row['torch_bytes'] / 1e6:>9.0f}",
                flush=True,
            )
    for mode in args.modes:
        ratios = [row["ratio"] for row in rows if row["mode"] == mode]
        if ratios:
            print(f"geometric mean, {mode}: {math.exp(statistics.fmean(map(math.log, ratios))):.2f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
