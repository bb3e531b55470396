"""What the tests of bad input share: tiny sources of images, and what a folder holds."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Refused = Callable[..., str]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def picture(path: Path, size: tuple[int, int] = (8, 8), mode: str = "L", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def folder_of(root: Path, num: int = 6, **options) -> Path:
    """`num` pictures in each of two classes."""
    for name in ("a", "b"):
        for index in range(num):
            picture(root / name / f"{index}.png", seed=index, **options)
    return root


def parquet(path: Path, labels: list[int], classes: int | None = None, size: int = 8) -> Path:
    import datasets

    def encoded(seed: int) -> bytes:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, format="PNG")
        return buffer.getvalue()

    kind = datasets.Value("int64") if classes is None else datasets.ClassLabel(num_classes=classes)
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def encode(data: object, out: Path, tokenizer: object = "pixels") -> list[object]:
    return ["encode", data, "--tokenizer", tokenizer, "--out", out, "--device", "cpu"]
