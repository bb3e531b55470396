"""Two updates of both stages of a row of the paper's table, at full model size, on random weights and a few images.

python benchmarks/imagenet_smoke.py llamagen-b-from-l-256 FOLDER       # FOLDER receives files, codes and runs
python benchmarks/imagenet_smoke.py llamagen-b-from-xxl FOLDER         # 24 x 24 codes, a teacher of 1.4 B parameters

Official-layout files of student, teacher and tokenizer are made with random weights; then the commands of
`varkd reproduce ROW` run as they are printed, on one process, with a batch of 2 and 2 updates.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import varkd
from varkd.backbones import zoo
from varkd.run.reproduce import Places, already_made, commands, row
from varkd.tokenizers.vq import VQ, VQConfig

SHORT = ("train.updates=2", "train.batch_size=2", "train.micro_batches=1", "train.validate_every=2",
         "train.checkpoint_every=2", "train.log_every=1", "train.trackers=[]", "device=cpu")  # fmt: skip
CLASSES = {"n01440764": 0, "n01443537": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    chosen = row(args.row)
    places = Places(args.folder / "images", args.folder / "downloads", args.folder / "runs", gpus=1, overrides=SHORT)
    make_images(places.images, chosen.image_size)
    (args.folder / "classes.json").write_text(json.dumps(CLASSES))
    make_tokenizer(places.downloads, chosen.image_size)
    for name in (chosen.student, chosen.teacher):
        make_model(zoo.entry(name), places.downloads)
    for command in commands(args.row, places):
        if "evaluate" in command or already_made(command):
            continue
        words = command[command.index("varkd") + 1 :]
        if words[0] == "encode":
            words = [word for word in words if word not in ("--ten-crop", "1.1")]  # ten passes of a CPU show no more
            words += ["--class-map", str(args.folder / "classes.json"), "--device", "cpu", "--batch-size", "2"]
        begun = time.monotonic()
        subprocess.run([sys.executable, "-m", "varkd", *words], check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(
            f"{' '.join(words[:2])}: {time.monotonic() - begun:.0f} s, largest command so far {peak:.1f} GiB",
            flush=True,
        )


def make_images(folder: Path, size: int) -> None:
    random = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(4):
            pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.JPEG")


def make_tokenizer(folder: Path, size: int) -> None:
    path = folder / "vq_ds16_c2i.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        torch.manual_seed(0)
        torch.save({"model": VQ(VQConfig(image_size=size)).state_dict()}, path)


def make_model(known: zoo.Entry, folder: Path) -> None:
    """An official-layout file of random weights."""
    path = folder / known.file
    if path.is_file():
        return
    model = varkd.build(known.family, known.config)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    state = model.official_state()
    torch.save({known.container: state} if known.container in ("model", "state_dict") else state, path)
    print(f"{path}: {sum(value.numel() for value in model.parameters()) / 1e6:.0f}M parameters, "
          f"{shutil.disk_usage(folder).free / 2**30:.0f} GiB of disk free", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
