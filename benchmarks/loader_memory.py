"""Resident memory and open files of the loader on codes of ImageNet's size: 1.28M images x 2 views x 256 (1.3 GB).

Writes a synthetic codes folder, then reads random batches and prints what Linux says of the process: anonymous memory
(labels, permutations, batches) apart from pages of the mapped shards, which the system takes back when it needs them.

python benchmarks/loader_memory.py FOLDER [--images 1281167] [--steps 2000]
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np

from varkd.data.codes import CodeDataset
from varkd.data.loader import DataLoader
from varkd.data.writer import CodeWriter, plan_manifest
from varkd.world import World


def write(folder: Path, images: int) -> None:
    planned = plan_manifest(
        tokenizer={"path": "none", "hash": "a" * 64, "kind": "vq", "vocab_size": 16384},
        grid=(16, 16),
        image_shape=(3, 256, 256),
        class_names=tuple(str(number) for number in range(1000)),
        views=("identity", "flip"),
        source={"fingerprints": {"train": "a", "validation": "b"}},
        nums={"train": images, "validation": 50},
        shard_size=4096,
    )
    writer, generator = CodeWriter(folder, planned, World()), np.random.default_rng(0)
    for split, shard in writer.todo():
        shape = (shard["num"], 2 if split == "train" else 1, 256)
        codes_NvL = generator.integers(0, 16384, shape, dtype=np.uint16)
        writer.write(split, shard, codes_NvL, generator.integers(0, 1000, shard["num"]))
    if not writer.is_finished:
        writer.finish({"psnr": 0.0, "num": 0})


def memory() -> str:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kinds = {"anonymous": "RssAnon", "of files": "RssFile"}
    held = ", ".join(f"{name} {int(lines[key].split()[0]) / 1024:.0f} MiB" for name, key in kinds.items())
    maps = len({line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".npy" in line})
    return f"{held}, {maps} shards mapped"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1281167)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    write(arguments.folder, arguments.images)
    print(f"start: {memory()}")
    codes = CodeDataset(arguments.folder)
    print(f"opened {len(codes)} images x {codes.num_views} views: {memory()}")
    loader = DataLoader(codes, 256)
    for end in (arguments.steps // 4, arguments.steps // 2, arguments.steps):
        begun, first = time.perf_counter(), loader.start
        for _ in range(first, end):
            loader.batch(loader.start)
            loader.start += 1
        print(f"{end} batches of 256: {memory()}, {(end - first) / (time.perf_counter() - begun):.0f} batches/s")
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
