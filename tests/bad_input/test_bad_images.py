"""Images that cannot be read or do not fit: exit code 2, one line that says what to do, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
from mistakes import Refused, encode, folder_of, parquet, picture

from varkd.tokenizers.store import save_tokenizer


def test_a_missing_folder(tmp_path: Path, refused: Refused):
    refused(encode(tmp_path / "none", tmp_path / "codes"), "no such folder or file", untouched=tmp_path)


def test_an_empty_folder(tmp_path: Path, refused: Refused):
    (tmp_path / "images").mkdir()
    refused(
        encode(tmp_path / "images", tmp_path / "codes"), "no images in", "one folder for each class", untouched=tmp_path
    )


def test_a_folder_with_one_image(tmp_path: Path, refused: Refused):
    picture(tmp_path / "images" / "a" / "0.png")
    refused(encode(tmp_path / "images", tmp_path / "codes"), "one image", untouched=tmp_path)


@pytest.mark.parametrize("content", [b"", b"this is no picture", None], ids=["empty", "text", "truncated"])
def test_a_corrupt_image(tmp_path: Path, refused: Refused, content: bytes | None):
    bad = folder_of(tmp_path / "images") / "b" / "3.png"
    bad.write_bytes(bad.read_bytes()[:-40] if content is None else content)
    line = refused(encode(tmp_path / "images", tmp_path / "codes"), str(bad))
    assert "corrupt" in line or "truncated" in line
    assert not (tmp_path / "codes" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"mode": "RGB"}, ["gray images", "3 channels"]), ({"size": (9, 8)}, ["1x8x9", "image_size"])],
    ids=["color", "size"],
)
def test_images_that_the_tokenizer_does_not_take(tmp_path: Path, refused: Refused, options: dict, words: list[str]):
    data = folder_of(tmp_path / "images", **options)
    tokenizer = "pixels" if "mode" in options else pixels_8x8(tmp_path / "tokenizer")
    refused(encode(data, tmp_path / "codes", tokenizer), *words, untouched=tmp_path)


def pixels_8x8(folder: Path) -> Path:
    from varkd.tokenizers.pixels import Pixels, PixelsConfig

    save_tokenizer(Pixels(PixelsConfig(height=8, width=8)), folder)
    return folder


def test_images_of_different_sizes(tmp_path: Path, refused: Refused):
    data = folder_of(tmp_path / "images")
    picture(data / "b" / "5.png", size=(8, 10))
    refused(encode(data, tmp_path / "codes"), "8x10", "8x8", str(data / "b" / "5.png"))
    assert not (tmp_path / "codes" / "manifest.json").exists()


@pytest.mark.parametrize("cut", [0, 10, 400])
def test_a_truncated_parquet_file(tmp_path: Path, refused: Refused, cut: int):
    path = parquet(tmp_path / "a.parquet", [0, 1] * 8)
    path.write_bytes(path.read_bytes()[:cut] if cut < 400 else path.read_bytes()[:-cut])
    refused(encode(path, tmp_path / "codes"), str(path), untouched=tmp_path)


def test_a_missing_parquet_file(tmp_path: Path, refused: Refused):
    refused(encode(tmp_path / "a.parquet", tmp_path / "codes"), "no such file", untouched=tmp_path)


@pytest.mark.parametrize(("labels", "classes"), [([0, -3] * 6, None), ([0, 1, 7] * 4, 3)], ids=["negative", "large"])
def test_a_label_out_of_range(tmp_path: Path, refused: Refused, labels: list[int], classes: int | None):
    import pyarrow.parquet

    path = parquet(tmp_path / "a.parquet", [label % 3 for label in labels] if classes else labels, classes)
    if classes:  # the library does not write such a file: change the numbers below its schema
        table = pyarrow.parquet.read_table(path)
        column = table.schema.get_field_index("label")
        table = table.set_column(column, table.schema.field("label"), pyarrow.array(labels, pyarrow.int64()))
        pyarrow.parquet.write_table(table, path)
    refused(encode(path, tmp_path / "codes"), "label", untouched=tmp_path)


def test_an_interrupted_download(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch):
    import datasets

    def interrupted(*arguments: object, **options: object) -> None:
        raise ConnectionError("connection reset by peer\nwhile reading shard 3")

    monkeypatch.setattr(datasets, "load_dataset", interrupted)
    monkeypatch.setattr("varkd.data.tables.hub_answers", lambda: True)
    refused(
        encode("org/name", tmp_path / "codes"),
        "no folder org/name here",
        "could not download",
        "run it again",
        untouched=tmp_path,
    )
