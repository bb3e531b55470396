"""Image sets: what each source yields, how it is split and resized, and how bad input is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from varkd.data import images as images_module
from varkd.data.images import _held_out, _resize, open_images
from varkd.errors import VarkdError

ImageFile = Callable[..., Path]
ParquetFile = Callable[..., Path]


def test_digits_are_exact_and_held_out_by_class() -> None:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    train, validation = open_images("digits", "train"), open_images("digits", "validation")
    assert (len(train), len(validation)) == (1617, 180)
    assert train.image_shape == (1, 8, 8) and train.class_names == tuple("0123456789")
    pixels = np.concatenate([images.batch(range(len(images))).numpy()[:, 0] for images in (train, validation)])
    expected = np.round(digits.images * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, pixels)) == sorted(map(bytes, expected))
    total, held = (np.bincount(labels, minlength=10) for labels in (digits.target, validation.labels))
    assert (np.abs(held - total * 180 / 1797) <= 1).all()
    assert train.batch(torch.tensor([5, 0])).equal(train.batch(np.array([0, 5])).flip(0))


def test_fingerprint_names_the_split() -> None:
    base = open_images("digits", "train").fingerprint
    assert open_images("digits", "train").fingerprint == base
    others = [
        open_images("digits", "validation"), open_images("digits", "train", seed=1),
        open_images("digits", "train", validation=0.2), open_images("digits", "train", image_size=4),
    ]  # fmt: skip
    assert len({base, *(images.fingerprint for images in others)}) == 5


@given(st.lists(st.integers(0, 6), min_size=2, max_size=200), st.floats(0.01, 0.99), st.integers(0, 5))
def test_held_out_is_exact_stratified_and_deterministic(labels: list[int], fraction: float, seed: int) -> None:
    label_N = np.array(labels)
    held_N = _held_out(label_N, fraction, seed)
    assert held_N.sum() == min(max(round(fraction * len(labels)), 1), len(labels) - 1)
    assert (held_N == _held_out(label_N, fraction, seed)).all()
    # The threshold that gives the exact total is the same for all classes, so two shares differ by one image each.
    low = max((held_N[label_N == c].sum() - 1) / (label_N == c).sum() for c in set(labels))
    high = min((held_N[label_N == c].sum() + 1) / (label_N == c).sum() for c in set(labels))
    assert low <= high


def test_folder_of_classes(tmp_path: Path, image_file: ImageFile) -> None:
    for number in range(10):
        image_file(tmp_path / "b" / f"test_{number}.png", seed=number)  # a name that is no split
        image_file(tmp_path / "a" / "deep" / f"{number}.JPG", seed=100 + number)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    train = open_images(str(tmp_path), "train", validation=0.2)
    assert train.class_names == ("a", "b") and train.image_shape == (3, 6, 8)
    assert len(train) + len(open_images(str(tmp_path), "validation", validation=0.2)) == 20
    first_b = int(np.flatnonzero(train.labels == 1)[0])
    sources = [np.asarray(Image.open(tmp_path / "b" / f"test_{n}.png")).transpose(2, 0, 1) for n in range(10)]
    assert any((train.batch([first_b])[0].numpy() == pixels).all() for pixels in sources)


def test_images_that_come_or_go_move_no_others(tmp_path: Path, image_file: ImageFile) -> None:
    def held_out() -> set[bytes]:
        images = open_images(str(tmp_path), "validation", validation=0.3)
        return {images.batch([index]).numpy().tobytes() for index in range(len(images))}

    for number in range(40):
        image_file(tmp_path / "b" / f"{number}.png", seed=number)
    before = held_out()
    assert 5 <= len(before) <= 20
    for number in range(10):
        image_file(tmp_path / "a" / f"{number}.png", seed=100 + number)
        image_file(tmp_path / "b" / f"new-{number}.png", seed=200 + number)
    assert before < held_out()
    lost = tmp_path / "b" / "7.png"
    pixels_HWC = np.asarray(Image.open(lost))
    lost.unlink()
    assert before - {pixels_HWC.transpose(2, 0, 1).tobytes()} <= held_out()


@pytest.mark.parametrize("own", ["val", "validation", "test"])
def test_folder_with_its_own_validation(tmp_path: Path, image_file: ImageFile, own: str) -> None:
    for name in ("x", "y"):
        for number in range(3):
            image_file(tmp_path / "train" / name / f"{number}.png", seed=number)
    held = image_file(tmp_path / own / "y" / "0.png", seed=9)
    assert len(open_images(str(tmp_path), "train")) == 6
    validation = open_images(str(tmp_path), "validation")
    assert validation.labels.tolist() == [1] and validation.class_names == ("x", "y")
    assert (validation.batch([0])[0].numpy() == np.asarray(Image.open(held)).transpose(2, 0, 1)).all()


def test_flat_folder_is_one_class_and_grey_stays_gray(tmp_path: Path, image_file: ImageFile) -> None:
    for number in range(4):
        image_file(tmp_path / "flat" / f"{number}.png", mode="L", seed=number)
    train = open_images(str(tmp_path / "flat"), "train", validation=0.25)
    assert train.class_names == ("flat",) and train.image_shape == (1, 6, 8) and 1 <= len(train) <= 3


def test_grey_images_among_color_become_rgb(tmp_path: Path, image_file: ImageFile) -> None:
    image_file(tmp_path / "0.png", mode="L")
    image_file(tmp_path / "1.png", mode="RGBA", seed=1)
    image_file(tmp_path / "2.png", mode="P", seed=2)
    train, validation = (open_images(str(tmp_path), split, validation=0.34) for split in ("train", "validation"))
    assert train.image_shape == validation.image_shape == (3, 6, 8)
    assert len(train.batch(range(len(train)))) + len(validation.batch(range(len(validation)))) == 3


def test_parquet_pixels_names_and_labels(tmp_path: Path, parquet_file: ParquetFile) -> None:
    labels = [0, 1, 2] * 10
    path = parquet_file(tmp_path / "a.parquet", labels, ["cat", "dog", "owl"])
    train, validation = open_images(str(path), "train"), open_images(str(path), "validation")
    assert train.class_names == ("cat", "dog", "owl") and np.bincount(validation.labels).tolist() == [1, 1, 1]
    expected = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8).transpose(0, 3, 1, 2)
    pixels = np.concatenate([train.batch(range(27)).numpy(), validation.batch(range(3)).numpy()])
    assert sorted(map(bytes, pixels)) == sorted(map(bytes, expected))


def test_two_parquet_files_are_two_splits(tmp_path: Path, parquet_file: ParquetFile) -> None:
    train = parquet_file(tmp_path / "train.parquet", [0, 3, 0, 1])
    validation = parquet_file(tmp_path / "test.parquet", [1, 2], seed=1)
    source = f"{train},{validation}"
    assert open_images(source, "train").labels.tolist() == [0, 3, 0, 1]
    opened = open_images(source, "validation")
    assert opened.labels.tolist() == [1, 2] and opened.class_names == ("0", "1", "2", "3")
    expected = np.random.default_rng(1).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8).transpose(0, 3, 1, 2)
    assert (opened.batch([0, 1]).numpy() == expected).all()


def test_large_sets_are_decoded_on_access(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = open_images("digits", "train").batch([3, 1, 1000])
    monkeypatch.setattr(images_module, "_KEEP_BYTES", 1000)
    images = open_images("digits", "train")
    assert images.batch([3, 1, 1000]).equal(kept)
    assert images._kept_NCHW is None


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (64, 40), (100, 33)])
def test_resize_gives_a_centered_square(size: tuple[int, int]) -> None:
    # A horizontal ramp: the center crop of a resize keeps its middle value in the middle.
    ramp = np.tile(np.linspace(0, 255, size[0]), (size[1], 1)).astype(np.uint8)
    resized = np.asarray(_resize(Image.fromarray(ramp), 8), dtype=float)
    assert resized.shape == (8, 8)
    assert abs(resized.mean() - 127.5) < 16
    assert (np.diff(resized.mean(0)) >= 0).all()


def test_resize_halves_by_box_first() -> None:
    checkers = Image.fromarray((np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8))
    assert set(np.asarray(_resize(checkers, 8)).ravel()) <= {127, 128}


def test_image_size_makes_mixed_sizes_one(tmp_path: Path, image_file: ImageFile) -> None:
    image_file(tmp_path / "0.png", size=(20, 11))
    image_file(tmp_path / "1.png", size=(9, 30), seed=1)
    image_file(tmp_path / "2.png", size=(10, 10), seed=2)
    train, validation = (open_images(str(tmp_path), split, image_size=8) for split in ("train", "validation"))
    assert [len(train.batch(range(len(train)))), *validation.batch([0]).shape] == [2, 1, 3, 8, 8]


# -- bad input: one line each ------------------------------------------------------------------------------------


def refused(match: str, source: str | Path, **options: object) -> None:
    """`open_images` fails with one line that matches."""
    with pytest.raises(VarkdError, match=match) as caught:
        open_images(str(source), "train", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_missing_paths(tmp_path: Path) -> None:
    refused("no such folder or file", tmp_path / "missing")
    refused("no such file: .*missing.parquet", tmp_path / "missing.parquet")
    (tmp_path / "a.zip").write_text("")
    refused("neither a folder of images nor", tmp_path / "a.zip")


def test_folders_without_images(tmp_path: Path, image_file: ImageFile) -> None:
    refused("no images in", tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "cat").mkdir()
    refused("no images in", tmp_path)
    image_file(tmp_path / "cat" / "0.png")
    image_file(tmp_path / "1.png")
    refused("1.png lies beside class folders", tmp_path)


def test_class_that_only_validation_has(tmp_path: Path, image_file: ImageFile) -> None:
    image_file(tmp_path / "train" / "cat" / "0.png")
    image_file(tmp_path / "val" / "dog" / "0.png")
    refused("class 'dog'", tmp_path)


def test_corrupt_and_truncated_images_are_named(tmp_path: Path, image_file: ImageFile) -> None:
    for number in range(4):
        image_file(tmp_path / f"{number}.png", size=(40, 40), seed=number)
    whole = tmp_path / "2.png"
    whole.write_bytes(whole.read_bytes()[:-2000])
    _refused_in_some_split(r"2\.png: it is corrupt or truncated", tmp_path)
    whole.write_text("not a picture")
    _refused_in_some_split(r"2\.png: it is corrupt or truncated", tmp_path)


def _refused_in_some_split(match: str, folder: Path) -> None:
    with pytest.raises(VarkdError, match=match) as caught:
        for split in ("train", "validation"):
            open_images(str(folder), split, validation=0.5).batch([0])
    assert "\n" not in str(caught.value)


def test_size_and_channels_that_differ_are_named(tmp_path: Path, image_file: ImageFile) -> None:
    for number in range(2):
        image_file(tmp_path / "size" / f"{number}.png", size=(8, 8 + number))
    _refused_in_some_split(r"1\.png is 8x9 pixels but the first image is 8x8", tmp_path / "size")
    for number in range(200):
        image_file(tmp_path / "color" / f"{number:03d}.png", mode="RGB" if number == 1 else "L", size=(2, 2))
    _refused_in_some_split(r"001\.png is in color", tmp_path / "color")


def test_deep_images_are_refused(tmp_path: Path) -> None:
    for number in range(2):
        Image.fromarray(np.full((4, 4), 60_000, np.uint16)).save(tmp_path / f"{number}.png")
    refused("more than 8 bits", tmp_path)


def test_truncated_parquet(tmp_path: Path, parquet_file: ParquetFile) -> None:
    path = parquet_file(tmp_path / "a.parquet", [0, 1] * 5)
    path.write_bytes(path.read_bytes()[:-40])
    refused("cannot read .*a.parquet", path)


def test_parquet_without_images_or_with_odd_labels(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_parquet(tmp_path / "text.parquet")
    refused(r"no image column \(columns: text, label\)", tmp_path / "text.parquet")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("float32")})
    rows = {"image": [{"bytes": b"", "path": None}], "label": [0.5]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "float.parquet")
    refused("does not hold integers or texts", tmp_path / "float.parquet")


def test_labels_out_of_range(tmp_path: Path, parquet_file: ParquetFile) -> None:
    refused("label -1 of row 1", parquet_file(tmp_path / "negative.parquet", [0, -1, 1]))
    refused("label -1 of row 1", parquet_file(tmp_path / "unnamed.parquet", [0, -1, 1], ["a", "b"]))
    refused("greater than configured num_classes|outside 0..1", _too_large(tmp_path))


def _too_large(folder: Path) -> Path:
    """The library does not write such a file, so Arrow does: label 7 of two classes."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": b"", "path": None}] * 2, "label": [0, 7]}
    table = pyarrow.Table.from_pydict(rows, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, folder / "large.parquet")
    return folder / "large.parquet"


def test_hub_loads_its_own_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str) -> datasets.DatasetDict:
        asked.append(name)
        features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a", "b"])})
        image = Image.new("RGB", (4, 4), (200, 0, 0))
        rows = {"img": [image] * 3, "fine": [0, 1, 1]}
        split = datasets.Dataset.from_dict(rows, features=features)
        return datasets.DatasetDict({"train": split, "test": split.select([0]).flatten_indices()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("varkd.data.tables.hub_answers", lambda: True)
    validation = open_images("org/name", "validation")
    assert asked == ["org/name"] and validation.labels.tolist() == [0] and validation.class_names == ("a", "b")
    assert validation.batch([0])[0, :, 0, 0].tolist() == [200, 0, 0]


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (ConnectionError("no route to host"), r"no route to host\): check the name and the network and run it again"),
        (
            OSError("connection reset while reading"),
            r"connection reset while reading\): check the name and the network",
        ),
        (RuntimeError("odd\nlong story"), r"\(odd\): check the name, or run it again"),
        (FileNotFoundError("404"), "no folder org/name here and no such dataset"),
    ],
)
def test_hub_failures(monkeypatch: pytest.MonkeyPatch, error: Exception, match: str) -> None:
    import datasets

    def load(name: str) -> datasets.DatasetDict:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("varkd.data.tables.hub_answers", lambda: True)
    refused(match, "org/name")


def test_bad_settings(tmp_path: Path, image_file: ImageFile) -> None:
    refused("validation=0 must be", "digits", validation=0)
    image_file(tmp_path / "0.png")
    refused("holds one image", tmp_path)
    refused("image_size=0 must be", "digits", image_size=0)
