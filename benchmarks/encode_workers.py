"""`varkd encode --workers`: images/s with processes that decode ahead against the single process, by turns.

The images are noise with the sizes and file sizes of ImageNet's (500x375, about 110 KB of JPEG); views are LlamaGen's
ten crops. "decoding" is what a machine does whose GPU runs the tokenizer: read, decode, resize, cut, and hand over
batches. "whole job" is `varkd encode` with a small VQ tokenizer on this CPU, checks and files included.

python benchmarks/encode_workers.py [--images 400] [--size 256] [--workers 2] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from varkd.data.images import open_images
from varkd.data.shards import cut
from varkd.data.views import ten_crop_names
from varkd.tokenizers.vq import VQ, VQConfig
from varkd.train.encode import _batches, encode_images


def photos(folder: Path, count: int) -> Path:
    """Smooth noise: it compresses as photos do."""
    generator = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(generator.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        path = folder / f"{number % 4}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)
    return folder


def decoding(source: Path, size: int, workers: int) -> float:
    images = open_images(str(source), "train", image_size=int(size * 1.1))
    images._kept_NCHW = None
    shards = [{"start": start, "num": num} for start, num in cut(len(images), 4096)]
    begun = time.perf_counter()
    if workers:
        for _ in _batches({"train": images}, [("train", shard) for shard in shards], 64, workers):
            pass
    else:  # `batch` would keep a set as small as this one
        for start in range(0, len(images), 64):
            images.decoded(np.arange(start, min(start + 64, len(images))))
    return len(images) / (time.perf_counter() - begun)


def whole_job(source: Path, size: int, workers: int, tokenizer: VQ) -> float:
    with tempfile.TemporaryDirectory() as out:
        begun = time.perf_counter()
        views = ten_crop_names(size, 1.1)
        encode_images(
            str(source), tokenizer, None, Path(out) / "codes", image_size=size, views=views, batch_size=64,
            workers=workers, quiet=True,
        )  # fmt: skip
        return sum(1 for _ in source.rglob("*.jpg")) / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--whole", action="store_true", help="time the whole job too (the tokenizer dominates on a CPU)"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = VQ(VQConfig.small(arguments.size, 3, 512, 16))
    with tempfile.TemporaryDirectory() as folder:
        source = photos(Path(folder) / "photos", arguments.images)
        size = sum(path.stat().st_size for path in source.rglob("*.jpg")) / arguments.images / 1000
        print(f"{arguments.images} images of {size:.0f} KB, {torch.get_num_threads()} thread(s) for PyTorch")
        jobs = {"decoding": decoding}
        if arguments.whole:
            jobs["whole job"] = lambda source, size, workers: whole_job(source, size, workers, tokenizer)
        for name, job in jobs.items():
            speeds: dict[int, list[float]] = {0: [], arguments.workers: []}
            for _ in range(arguments.rounds):
                for workers, found in speeds.items():
                    found.append(job(source, arguments.size, workers))
            one, more = (statistics.median(found) for found in speeds.values())
            print(
                f"{name}: workers=0 {one:.0f} images/s, workers={arguments.workers} {more:.0f} images/s: "
                f"{more / one:.2f} times (median of {arguments.rounds})"
            )


if __name__ == "__main__":
    main()
