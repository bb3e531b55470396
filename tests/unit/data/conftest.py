"""Tiny image folders, parquet files and codes folders."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the library's copies of parquet files out of the user's cache, and each test's apart."""
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture
def image_file() -> Callable[..., Path]:
    """Write a noise image; `seed` decides its pixels."""

    def write(path: Path, size: tuple[int, int] = (8, 6), mode: str = "RGB", seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
        return path

    return write


@pytest.fixture
def parquet_file() -> Callable[..., Path]:
    """Write an image parquet file in the Hugging Face layout."""
    import datasets

    def write(path: Path, labels: list[int], names: list[str] | None = None, seed: int = 0) -> Path:
        pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 4, 4, 3), dtype=np.uint8)
        kind = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        rows = {"image": [{"bytes": png(image), "path": None} for image in pixels], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
        return path

    return write


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def codes_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a codes folder: the code at position 0 is the image's number, at position 1 its view."""
    from varkd.data.writer import CodeWriter, plan_manifest
    from varkd.world import World

    def write(num: int = 23, views: int = 3, shard_size: int = 5, name: str = "codes", vocab_size: int = 4096) -> Path:
        planned = plan_manifest(
            tokenizer={"path": "t", "hash": "a" * 64, "kind": "fake", "vocab_size": vocab_size},
            grid=(2, 3),
            image_shape=(1, 4, 6),
            class_names=("cat", "dog", "owl"),
            views=("identity", "flip", "shift(0,1)", "shift(1,0)")[:views],
            source={"name": "fake", "fingerprints": {"train": "f0", "validation": "f1"}},
            nums={"train": num, "validation": 4},
            shard_size=shard_size,
        )
        writer = CodeWriter(tmp_path / name, planned, World())
        for split, shard in writer.todo():
            image_n = np.arange(shard["num"]) + shard["start"]
            codes = np.zeros((shard["num"], views if split == "train" else 1, 6), np.uint16)
            codes[:, :, 0], codes[:, :, 1] = image_n[:, None], np.arange(codes.shape[1])
            writer.write(split, shard, codes, image_n % 3)
        writer.finish({"psnr": 30.0, "num": 4})
        return tmp_path / name

    return write
