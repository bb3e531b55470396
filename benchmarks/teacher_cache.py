"""Seconds of an update of KD with a live teacher and from a teacher cache, in one run; LlamaGen, random weights.

    python benchmarks/teacher_cache.py [--layers 2 6] [--dims 48 192] [--grid 16] [--batch 32] [--top-k 64]

Both sides make the same updates on the same batches, one after the other. Codes are drawn at random: what is measured
is time and disk, which do not depend on what the codes say. The cache is read from files that were just written, so
from memory as a rule: the time of a disk is not in it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import varkd
from varkd.data.writer import CodeWriter, plan_manifest
from varkd.world import World

IMAGES = 256
CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, nargs=2, default=(2, 6), metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--dims", type=int, nargs=2, default=(48, 192), metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--vocabs", type=int, nargs="+", default=(256, 4096))
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    for name, default in {"grid": 16, "batch": 32, "top-k": 64, "updates": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    (layers, teacher_layers), (dim, teacher_dim) = args.layers, args.dims
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.grid}x{args.grid} "
          f"codes, batch {args.batch}, top-k {args.top_k} in {args.dtype}")  # fmt: skip
    print(f"student {layers}x{dim}, teacher {teacher_layers}x{teacher_dim}")
    print("codes  live s/update  cache s/update  live/cache  CE s/update  teach s/sequence  KiB/sequence  pays after")
    for vocab in args.vocabs:
        with tempfile.TemporaryDirectory() as folder:
            measure(vocab, Path(folder), args)


def measure(vocab: int, folder: Path, args: argparse.Namespace) -> None:
    codes = write_codes(folder / "codes", vocab, args.grid)
    sizes = {"vocab_size": vocab, "num_classes": CLASSES, "grid": (args.grid, args.grid)}
    student, teacher = (
        varkd.build("llamagen", {**sizes, "num_layers": layers, "dim": dim, "num_heads": max(1, dim // 32)})
        for layers, dim in zip(args.layers, args.dims, strict=True)
    )
    torch.nn.init.normal_(teacher.head.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    teacher.save(folder / "teacher")
    begun = time.perf_counter()
    varkd.teach(folder / "teacher", codes.folder, folder / "cache", top_k=args.top_k, dtype=args.dtype,
                device=args.device, quiet=True)  # fmt: skip
    teaching = (time.perf_counter() - begun) / IMAGES
    taken = sum(path.stat().st_size for path in (folder / "cache").glob("*.npy")) / IMAGES
    student, teacher = student.to(args.device), teacher.to(args.device).eval().requires_grad_(False)
    codebook_VE = torch.randn(vocab, 8, generator=torch.Generator().manual_seed(1))
    sides = {"live": ("kd", teacher), "cache": ("kd", varkd.load_teacher_cache(folder / "cache", codes)),
             "none": ("ce", None)}  # fmt: skip
    distillers = {
        name: varkd.Distiller(method, student, each, codebook_VE, updates=100) for name, (method, each) in sides.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for batch in varkd.DataLoader(codes, args.batch, updates=args.updates + 1, device=args.device):
        for name, distiller in distillers.items():
            seconds[name].append(update(distiller, batch))
    live, cache, alone = (statistics.median(seconds[name][1:]) for name in sides)  # the first one warms up
    epochs = teaching * args.batch / (live - cache) if live > cache else float("inf")
    print(f"{vocab:5} {live:14.3f} {cache:15.3f} {live / cache:11.2f} {alone:12.3f} {teaching:17.4f} "
          f"{taken / 2**10:13.1f} {epochs:6.1f} epochs")  # fmt: skip


def update(distiller: varkd.Distiller, batch: varkd.Batch) -> float:
    """Forward, loss and backward: what an optimizer adds is the same on all sides."""
    begun = time.perf_counter()
    loss, stats = distiller(batch)
    loss.backward()
    distiller.student.zero_grad(set_to_none=True)
    distiller.update(loss, stats)
    if batch.codes_BL.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def write_codes(folder: Path, vocab: int, side: int) -> varkd.CodeDataset:
    """Random codes of `IMAGES` images."""
    planned = plan_manifest(
        tokenizer={"path": "none", "hash": "0" * 64, "kind": "none", "vocab_size": vocab}, grid=(side, side),
        image_shape=(3, 8 * side, 8 * side), class_names=tuple(map(str, range(CLASSES))), views=("identity",),
        source={"name": "chance", "fingerprints": {"train": "0", "validation": "0"}},
        nums={"train": IMAGES, "validation": 1}, shard_size=IMAGES,
    )  # fmt: skip
    writer, draw = CodeWriter(folder, planned, World()), np.random.default_rng(0)
    for split, shard in writer.todo():
        codes_N1L = draw.integers(vocab, size=(shard["num"], 1, side**2)).astype(np.uint16)
        writer.write(split, shard, codes_N1L, np.arange(shard["num"]) % CLASSES)
    writer.finish({"psnr": 0.0, "num": 1})
    return varkd.CodeDataset(folder)


if __name__ == "__main__":
    main()
