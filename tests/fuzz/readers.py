"""Every reader of a file from outside, a small good file for it, and ways to damage one.

`python tests/fuzz/readers.py --minutes 20` searches on from where the test suite stops, and prints a table.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import varkd
from varkd.config import read_run
from varkd.containers import read_state
from varkd.data.classes import read_class_map
from varkd.data.codes import CodeDataset
from varkd.data.images import open_images
from varkd.errors import VarkdError
from varkd.evaluate.image_files import open_image_files
from varkd.evaluate.inception_files import read_inception_state
from varkd.report.runs import read_run as read_run_of_report
from varkd.tokenizers.store import load_tokenizer, save_tokenizer
from varkd.tokenizers.vq import VQ, VQConfig

SECONDS = 10
"""What one input may take at most."""


@dataclass(frozen=True)
class Reader:
    """`open` reads what stands around the file at `path`, which is damaged; `make` writes the good folder.

    `good` is how the good file ends: the TensorFlow graph is refused, for it is only the beginning of a network.
    """

    name: str
    path: str
    make: Callable[[Path], None]
    open: Callable[[Path], object]
    good: str = "read"


def _model(folder: Path) -> None:
    model = varkd.build("llamagen", {"vocab_size": 8, "num_classes": 2, "grid": (2, 2), "num_layers": 1, "dim": 8,
                                     "num_heads": 1, "ffn_dim": 8})  # fmt: skip
    model.class_names = ("a", "b")
    model.save(folder / "model")
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1.0)}, folder / "official.pt")


def _tokenizer(folder: Path) -> None:
    sizes = {"image_size": 8, "channels": 1, "ch": 8, "ch_mult": (1, 1), "z_channels": 8, "num_res_blocks": 1}
    config = VQConfig(**sizes, decoder_res_blocks=1, vocab_size=8, codebook_dim=4, norm_groups=4)
    save_tokenizer(VQ(config), folder / "tokenizer")


def _codes(folder: Path) -> None:
    from varkd.run.data import encode

    _images(folder)
    encode(str(folder / "images"), "pixels", folder / "codes", image_size=4, validation=0.25, quiet=True)


def _images(folder: Path) -> None:
    for label in "ab":
        (folder / "images" / label).mkdir(parents=True)
        for index in range(4):
            pixels = np.random.default_rng(index).integers(0, 256, (6, 7), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{index}.png")


def _picture(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _images(folder)
        pixels = np.random.default_rng(9).integers(0, 256, (6, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / "a" / f"x.{kind}")

    return make


def _parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(file, format="PNG")
    column = [{"bytes": file.getvalue(), "path": None}] * 6
    pq.write_table(pa.table({"image": column, "label": [0, 1] * 3}), folder / "images.parquet")


def _npz(folder: Path) -> None:
    np.savez(folder / "samples.npz", arr_0=np.zeros((5, 4, 4, 3), np.uint8), label=np.arange(5))


def _graph(folder: Path) -> None:
    """A TensorFlow graph of one node, written by hand."""
    tensor = bytes([8, 1, 18, 4, 18, 2, 8, 2, 34, 8]) + np.ones(2, np.float32).tobytes()
    value = bytes([10, 5]) + b"value" + bytes([18, len(tensor) + 2, 66, len(tensor)]) + tensor
    node = bytes([10, 1]) + b"w" + bytes([18, 5]) + b"Const" + bytes([42, len(value)]) + value
    (folder / "graph.pb").write_bytes((bytes([10, len(node)]) + node) * 3)


def _class_map(folder: Path) -> None:
    (folder / "map.json").write_text(json.dumps({"a": 3, "b": 1}))


def _run(folder: Path) -> None:
    from varkd.config import dump, load_run

    run = folder / "run"
    run.mkdir()
    (run / "run.yaml").write_text(dump(load_run("digits-student", ["method=varkd", "out=x"])))
    interval = {"value": 1.0, "low": 0.5, "high": 1.5}
    metrics = {"name": "x", "method": "kd", "updates": 1, "seconds": 1.0, "parameters": 2, "samples_per_second": 1.0,
               "num_samples": 3, "metrics": {"fd": interval}, "floors": {}, "protocol": {}, "agreement": None,
               "agreement_by_position": None, "grid": [2, 2]}  # fmt: skip
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "log.jsonl").write_text('{"split": "train", "step": 1, "loss": 1.0}\n' * 3)


def _read_codes(folder: Path) -> object:
    return [CodeDataset(folder / "codes", split).codes(np.arange(2), np.zeros(2, np.int64))
            for split in ("train", "validation")]  # fmt: skip


def _read_images(folder: Path) -> object:
    sets = [
        open_images(str(folder / "images"), split, image_size=4, validation=0.25) for split in ("train", "validation")
    ]
    return [images.batch(np.arange(len(images))) for images in sets]


def _read_parquet(folder: Path) -> object:
    images = open_images(str(folder / "images.parquet"), "train", validation=0.5)
    return images.batch(np.arange(len(images)))


def _read_npz(folder: Path) -> object:
    images = open_image_files(folder / "samples.npz")
    return list(images.batches(0, images.num, 2)), images.statistics(), images.hash()


READERS = [
    Reader("model weights", "model/model.safetensors", _model, lambda folder: varkd.load(folder / "model")),
    Reader("model config", "model/config.json", _model, lambda folder: varkd.load(folder / "model")),
    Reader("official .pt", "official.pt", _model, lambda folder: read_state(folder / "official.pt")),
    Reader("tokenizer weights", "tokenizer/model.safetensors", _tokenizer,
           lambda folder: load_tokenizer(folder / "tokenizer")),
    Reader("tokenizer config", "tokenizer/config.json", _tokenizer,
           lambda folder: load_tokenizer(folder / "tokenizer")),
    Reader("codes manifest", "codes/manifest.json", _codes, _read_codes),
    Reader("code shard", "codes/train-00000.npy", _codes, _read_codes),
    Reader("labels", "codes/train-00000-labels.npy", _codes, _read_codes),
    *(Reader(f"image .{kind}", f"images/a/x.{kind}", _picture(kind), _read_images)
      for kind in ("png", "jpg", "gif", "bmp", "webp", "tif")),
    Reader("parquet", "images.parquet", _parquet, _read_parquet),
    Reader("samples .npz", "samples.npz", _npz, _read_npz),
    Reader("TensorFlow graph", "graph.pb", _graph, lambda folder: read_inception_state(folder / "graph.pb"),
           good="refused"),
    Reader("class map", "map.json", _class_map, lambda folder: read_class_map(folder / "map.json", ["a", "b"])),
    Reader("recipe", "run/run.yaml", _run, lambda folder: read_run(folder / "run")),
    Reader("metrics", "run/metrics.json", _run, lambda folder: read_run_of_report(folder / "run")),
    Reader("log", "run/log.jsonl", _run, lambda folder: read_run_of_report(folder / "run")),
]  # fmt: skip


def damaged(content: bytes, chance: random.Random) -> bytes:
    """A few random changes: bits, bytes, cuts, copies, numbers and, in text, other values."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        if not data:
            break
        at = chance.randrange(len(data))
        kind = chance.randrange(7)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + chance.randrange(1, 32)]
        elif kind == 4:
            data[at:at] = data[at : at + chance.randrange(1, 64)]
        elif kind == 5:
            data[at : at + 8] = chance.choice((-1, 0, 2**31, 2**40, 2**63 - 1)).to_bytes(8, "little", signed=True)
        else:
            words = (b"null", b"-1", b"1e999", b"[]", b"{}", b'""', b"9" * 30, b"true", b"\xff\xfe", b"\x00" * 9)
            data[at : at + chance.randrange(0, 6)] = chance.choice(words)
    return bytes(data)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(reader: Reader, folder: Path, content: bytes) -> str:
    """Read damaged content: "read" or "refused".

    Raises:
        Exception: anything but a `VarkdError` of one line.
    """
    (folder / reader.path).write_bytes(content)
    with limited(SECONDS):
        try:
            reader.open(folder)
        except VarkdError as error:
            assert str(error).strip() and "\n" not in str(error).strip(), f"not one line: {error}"
            return "refused"
    return "read"


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz every reader.")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    end, share = time.time() + 60 * options.minutes, 60 * options.minutes / len(READERS)
    print(f"seed {options.seed}\n| reader | inputs | refused | read | findings |\n|---|---|---|---|---|")
    for reader in READERS:
        chance, found = random.Random(f"{options.seed}/{reader.name}"), {"refused": 0, "read": 0}
        findings: dict[str, bytes] = {}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            reader.make(folder)
            good = (folder / reader.path).read_bytes()
            stop = min(end, time.time() + share)
            while time.time() < stop:
                content = damaged(good, chance)
                try:
                    found[attempt(reader, folder, content)] += 1
                except Exception as error:
                    last = traceback.extract_tb(error.__traceback__)[-1]
                    findings[
                        f"{type(error).__name__}: {str(error)[:80]} ({Path(last.filename).name}:{last.lineno})"
                    ] = content
        total = sum(found.values())
        print(
            f"| {reader.name} | {total} | {found['refused']} | {found['read']} | {'; '.join(findings) or 'none'} |",
            flush=True,
        )
        for index, (what, content) in enumerate(findings.items()):
            path = Path(f"finding-{reader.path.replace('/', '-')}-{index}")
            path.write_bytes(content)
            print(f"  {path}: {what}", file=sys.stderr)


if __name__ == "__main__":
    main()
