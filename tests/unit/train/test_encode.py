"""Encoding: exact codes, resume, several ranks, the reconstruction check, refusals."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from varkd.data import images as images_module
from varkd.data.codes import CodeDataset
from varkd.data.images import open_images
from varkd.data.views import apply_view, ten_crop_names, view_names
from varkd.errors import VarkdError
from varkd.tokenizers.pixels import Pixels, PixelsConfig
from varkd.tokenizers.protocol import to_unit
from varkd.tokenizers.store import load_tokenizer
from varkd.train.encode import PSNR_CAP, encode_images, psnr
from varkd.world import World

VIEWS = view_names(flip=True, shifts=1)


class Killed(Exception):
    pass


class Fragile(Pixels):
    """Stops after so many calls of `encode`, as a job does that runs out of time."""

    calls_left = 10**9

    def encode(self, images_BCHW: Tensor) -> Tensor:
        if self.calls_left == 0:
            raise Killed
        self.calls_left -= 1
        return super().encode(images_BCHW)


@dataclass(frozen=True)
class ThreadWorld(World):
    """A rank whose peers are threads."""

    meeting: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def barrier(self) -> None:
        self.meeting.wait(timeout=60)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        self.meeting.wait(timeout=60)
        return value  # of what is zero on all ranks: no digit is corrupt


def encode(out: Path, tokenizer: Pixels | None = None, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"shard_size": 400, "batch_size": 150, "quiet": True, **options}
    return encode_images("digits", tokenizer or Pixels(PixelsConfig()), None, out, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ten_crops_are_cut_from_larger_images(tmp_path: Path) -> None:
    names = ten_crop_names(8, 1.5)
    manifest = encode(tmp_path / "codes", views=names, image_size=8)
    codes = CodeDataset(tmp_path / "codes")
    assert codes.num_views == 10 and manifest["image_shape"] == [1, 8, 8]
    large = open_images("digits", "train", image_size=12)
    index = np.array([0, 400, 1616])
    for view, name in enumerate(names):
        expected_BL = codes.tokenizer.encode(to_unit(apply_view(name, large.batch(index))))
        assert codes.codes(index, np.full(3, view)).equal(expected_BL)
    assert CodeDataset(tmp_path / "codes", "validation").num_views == 1


def test_codes_of_digits_are_exact_in_every_view(tmp_path: Path) -> None:
    manifest = encode(tmp_path / "codes", views=VIEWS)
    tokenizer = load_tokenizer(tmp_path / "codes" / manifest["tokenizer"]["path"])
    codes = CodeDataset(tmp_path / "codes", tokenizer_hash=tokenizer.hash)
    images = open_images("digits", "train")
    assert (len(codes), codes.num_views, codes.num_classes) == (1617, 18, 10)
    assert (codes.labels == images.labels).all()
    index = np.array([0, 399, 400, 1616])
    for view, name in enumerate(VIEWS):
        expected_BL = tokenizer.encode(to_unit(apply_view(name, images.batch(index))))
        assert codes.codes(index, np.full(4, view)).equal(expected_BL)
    assert CodeDataset(tmp_path / "codes", "validation").num_views == 1
    assert manifest["reconstruction"] == {"psnr": PSNR_CAP, "num": 180}  # nothing is lost on 17 levels
    with Image.open(tmp_path / "codes" / "reconstruction.png") as picture:
        assert picture.size == (16 * 48 + 15 * 2, 2 * 48 + 2)


def test_manifest_is_as_documented(tmp_path: Path) -> None:
    manifest = encode(tmp_path, views=("identity", "flip"), seed=3)
    assert list(manifest) == [
        "format", "version", "tokenizer", "image_shape", "grid", "class_names", "views", "source", "splits",
        "reconstruction", "sha256",
    ]  # fmt: skip
    assert set(manifest["sha256"]) == {path.name for path in tmp_path.glob("*.npy")}
    assert manifest["format"] == "varkd-codes" and manifest["version"] == 1
    assert set(manifest["tokenizer"]) == {"path", "hash", "kind", "vocab_size"}
    assert manifest["image_shape"] == [1, 8, 8] and manifest["grid"] == [8, 8]
    source = manifest["source"]
    assert (source["name"], source["image_size"], source["seed"], source["validation"]) == ("digits", None, 3, 0.1)
    assert [shard["start"] for shard in manifest["splits"]["train"]["shards"]] == [0, 400, 800, 1200, 1600]
    shard = manifest["splits"]["train"]["shards"][4]
    assert shard == {"file": "train-00004.npy", "labels": "train-00004-labels.npy", "start": 1600, "num": 17}
    assert not (tmp_path / "partial.json").exists()


@pytest.mark.parametrize("calls", [0, 4, 11, 12])
def test_a_killed_job_goes_on_to_the_same_bytes(tmp_path: Path, calls: int) -> None:
    encode(tmp_path / "straight")
    fragile = Fragile(PixelsConfig())
    fragile.calls_left = calls
    with pytest.raises(Killed):
        encode(tmp_path / "killed", fragile)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    kept = {path: path.stat().st_ino for path in (tmp_path / "killed").glob("*.npy")}
    assert len(kept) == 2 * (calls // 3)  # three batches a shard
    encode(tmp_path / "killed")
    assert all(path.stat().st_ino == inode for path, inode in kept.items())
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_a_finished_job_does_nothing(tmp_path: Path) -> None:
    first = encode(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    fragile = Fragile(PixelsConfig())
    fragile.calls_left = 0
    assert encode(tmp_path, fragile) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_two_ranks_write_what_one_does(tmp_path: Path) -> None:
    encode(tmp_path / "one")
    meeting, results = threading.Barrier(2), {}

    def run(rank: int) -> None:
        results[rank] = encode(tmp_path / "two", world=ThreadWorld(rank, 2, meeting))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert results[0] == results[1]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """120 gray photos of two classes, no two of the same size."""
    generator = np.random.default_rng(0)
    for number in range(120):
        pixels = generator.integers(0, 256, (20 + number % 7, 30 + number % 5), dtype=np.uint8)
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize("is_kept", [True, False])
def test_workers_write_the_same_bytes(
    tmp_path: Path, photos: Path, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_kept:  # as of a set that is too large for memory
        monkeypatch.setattr(images_module, "_KEEP_BYTES", 0)
    options: dict[str, Any] = {"image_size": 8, "views": ten_crop_names(8, 1.5), "shard_size": 50, "batch_size": 40}
    for out, workers in (("none", 0), ("two", 2)):
        tokenizer = Pixels(PixelsConfig())
        encode_images(str(photos), tokenizer, None, tmp_path / out, workers=workers, quiet=True, **options)
    assert contents(tmp_path / "two") == contents(tmp_path / "none")


def test_workers_report_bad_images_as_one_process_does(tmp_path: Path, photos: Path) -> None:
    whole = (photos / "b" / "001.png").read_bytes()
    (photos / "b" / "001.png").write_bytes(whole[: len(whole) // 2])
    (photos / "a" / "100.png").write_bytes(b"no image")
    said = []
    for workers in (0, 2):
        with pytest.raises(VarkdError, match=r"2 images cannot be used: .*100\.png.*001\.png") as caught:
            encode_images(str(photos), Pixels(PixelsConfig()), None, tmp_path / "codes", image_size=8, workers=workers)
        said.append(str(caught.value))
        assert not (tmp_path / "codes").exists()
    assert said[0] == said[1]
    for workers in (0, 2):
        options: dict[str, Any] = {"image_size": 8, "workers": workers, "skip_corrupt": True, "quiet": True}
        manifest = encode_images(str(photos), Pixels(PixelsConfig()), None, tmp_path / str(workers), **options)
        assert sum(entry["num"] for entry in manifest["splits"].values()) == 118
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


def test_an_image_that_went_bad_after_the_check(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process says arrives as the one line that it is."""
    monkeypatch.setattr(images_module, "_KEEP_BYTES", 0)
    first = Fragile(PixelsConfig())
    first.calls_left = 1
    options: dict[str, Any] = {"image_size": 8, "shard_size": 30, "batch_size": 30, "quiet": True}
    with pytest.raises(Killed):
        encode_images(str(photos), first, None, tmp_path / "codes", **options)
    names = sorted(path for path in photos.rglob("*.png"))
    gone = names[60]
    gone.write_bytes(b"no image")
    with pytest.raises(VarkdError) as caught:
        encode_images(str(photos), Pixels(PixelsConfig()), None, tmp_path / "codes", workers=2, **options)
    assert str(caught.value).startswith(f"cannot decode {gone}: it is corrupt or truncated")


def test_a_process_that_dies_is_one_line(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "_KEEP_BYTES", 0)
    here, whole = os.getpid(), images_module.ImageSet.decoded

    def dying(self: Any, index_B: Any) -> Any:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, index_B)

    monkeypatch.setattr(images_module.ImageSet, "decoded", dying)
    options: dict[str, Any] = {"image_size": 8, "shard_size": 30, "quiet": True}
    with pytest.raises(VarkdError, match=r"a process that decodes images died .* fewer workers than 2"):
        encode_images(str(photos), Pixels(PixelsConfig()), None, tmp_path / "codes", workers=2, **options)
    monkeypatch.undo()
    encode_images(str(photos), Pixels(PixelsConfig()), None, tmp_path / "codes", **options)  # and goes on


def test_a_number_of_workers_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(VarkdError, match="workers=-1 must be 0 or more"):
        encode(tmp_path / "codes", workers=-1)


def test_each_rank_encodes_its_own_shards(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    @dataclass(frozen=True)
    class Alone(World):
        def barrier(self) -> None:
            raise Stop

        def sum(self, value: torch.Tensor) -> torch.Tensor:
            return value

    with pytest.raises(Stop):
        encode(tmp_path, world=Alone(1, 2))
    assert {path.name for path in tmp_path.glob("*.npy")} == {
        name
        for stem in ("train-00001", "train-00003", "validation-00000")
        for name in (f"{stem}.npy", f"{stem}-labels.npy")
    }


def test_folder_of_another_job_is_refused_before_any_work(tmp_path: Path) -> None:
    fragile = Fragile(PixelsConfig())
    fragile.calls_left = 4
    with pytest.raises(Killed):
        encode(tmp_path, fragile)
    before = contents(tmp_path)
    for match, options in {
        "another views": {"views": ("identity", "flip")},
        "another source": {"seed": 1},
        "another shard size": {"shard_size": 300},
        "another tokenizer": {"tokenizer": Pixels(PixelsConfig(levels=16))},
    }.items():
        with pytest.raises(VarkdError, match=match):
            encode(tmp_path, **options)
    assert contents(tmp_path) == before


def test_images_that_the_tokenizer_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(VarkdError, match=r"images of 1x8x8 \(.*\) but the tokenizer takes 1x16x16"):
        encode(tmp_path / "codes", Pixels(PixelsConfig(height=16, width=16)))
    with pytest.raises(VarkdError, match="unknown view"):
        encode(tmp_path / "codes", views=("identity", "spin"))
    with pytest.raises(VarkdError, match="batch_size=0"):
        encode(tmp_path / "codes", batch_size=0)
    assert not (tmp_path / "codes").exists()


def test_psnr() -> None:
    zeros = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    others = zeros.clone()
    others[1], others[2, 0, 0, 0] = 255, 10
    expected = torch.tensor([PSNR_CAP, 0.0, 10 * np.log10(255**2 / 25)], dtype=torch.float64)
    torch.testing.assert_close(psnr(zeros, others), expected)
