"""Odd but good images, folders and tables are read right; what was not read is said; bad ones are named all at once."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from mistakes import Refused, encode, folder_of, parquet, picture
from PIL import Image

from varkd.cli import main
from varkd.data.codes import CodeDataset, read_manifest
from varkd.data.images import open_images
from varkd.errors import VarkdError
from varkd.run.data import Codes


def run(capfd: pytest.CaptureFixture[str], command: list[object]) -> str:
    """The output of a command that succeeds."""
    capfd.readouterr()
    assert main([str(part) for part in command]) == 0
    return capfd.readouterr().out


def classes(source: object, **options) -> tuple[str, ...]:
    return open_images(str(source), "train", **options).class_names


# -- folders -----------------------------------------------------------------------------------------------------


def test_numbers_sort_as_numbers(tmp_path: Path):
    for name in map(str, range(12)):
        picture(tmp_path / "folder" / name / "0.png", seed=int(name))
    assert classes(tmp_path / "folder") == tuple(map(str, range(12)))
    assert classes(parquet(tmp_path / "a.parquet", list(range(12)) * 2)) == tuple(map(str, range(12)))


@pytest.mark.parametrize(("train", "held_out"), [("train", "val"), ("Train", "Val"), ("TRAIN", "test")])
def test_splits_in_any_case(tmp_path: Path, train: str, held_out: str):
    folder_of(tmp_path / train)
    picture(tmp_path / held_out / "b" / "0.png")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "readme.txt").write_text("")
    assert classes(tmp_path) == ("a", "b")
    assert open_images(str(tmp_path), "validation").labels.tolist() == [1]


def test_images_beside_the_splits(tmp_path: Path, refused: Refused):
    folder_of(tmp_path / "images" / "train")
    folder_of(tmp_path / "images" / "val")
    picture(tmp_path / "images" / "extra" / "0.png")
    refused(encode(tmp_path / "images", tmp_path / "codes"), "extra", "beside", untouched=tmp_path)


def test_a_class_without_images_keeps_its_label(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder_of(tmp_path / "images")
    (tmp_path / "images" / "aa").mkdir()
    (tmp_path / "images" / "aa" / "0.heic").write_text("")
    said = run(capfd, encode(tmp_path / "images", tmp_path / "codes"))
    assert "3 class(es): a 6, aa 0, b 6" in said
    assert "no train images in 1 class(es): aa" in said and "not read as images: 1 .heic" in said
    assert set(CodeDataset(tmp_path / "codes").labels.tolist()) == {0, 2}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_class_that_cannot_be_listed(tmp_path: Path, refused: Refused):
    (folder_of(tmp_path / "images") / "a").chmod(0)
    refused(encode(tmp_path / "images", tmp_path / "codes"), "no permission to read")


def test_links_are_followed_and_hidden_folders_are_not(tmp_path: Path):
    images = folder_of(tmp_path / "images", num=2)
    folder_of(tmp_path / "elsewhere", num=3)
    (images / "a" / "more").symlink_to(tmp_path / "elsewhere" / "a")
    (images / "a" / "loop").symlink_to(images / "a")
    picture(images / "a" / ".thumbnails" / "0.png")
    splits = [open_images(str(images), split).labels for split in ("train", "validation")]
    assert np.bincount(np.concatenate(splits)).tolist() == [5, 2]


@pytest.mark.parametrize("ending", ["jfif", "jpe", "JPEG", "tga", "dib"])
def test_endings(tmp_path: Path, ending: str):
    for index in range(4):
        image = Image.open(picture(tmp_path / "png" / f"{index}.png", mode="RGB", seed=index))
        (tmp_path / "images").mkdir(exist_ok=True)
        image.save(tmp_path / "images" / f"{index}.{ending}", format={"jpe": "jpeg"}.get(ending))
    assert len(open_images(str(tmp_path / "images"), "train")) >= 1


# -- tables ------------------------------------------------------------------------------------------------------


def table(path: Path, columns: dict[str, list], num: int = 12) -> Path:
    """A parquet file of gray images with these columns beside them."""
    import datasets

    plain = datasets.load_dataset("parquet", data_files=str(parquet(path.with_name("plain.parquet"), [0] * num)))
    rows = plain["train"].remove_columns("label")
    for name, values in columns.items():
        rows = rows.add_column(name, (values * num)[:num])
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(path)
    path.with_name("plain.parquet").unlink()
    return path


@pytest.mark.parametrize("name", ["target", "category_id", "cls"])
def test_a_label_column_of_another_name_is_asked_for(tmp_path: Path, refused: Refused, name: str):
    data = table(tmp_path / "a.parquet", {name: [3, 5]})
    refused(encode(data, tmp_path / "codes"), name, "--label NAME", untouched=tmp_path)
    assert classes(data, label=name) == ("3", "5")
    assert classes(data, label="none") == ("all",)
    refused([*encode(data, tmp_path / "codes"), "--label", "clas"], "no column 'clas'", untouched=tmp_path)
    assert main([str(part) for part in [*encode(data, tmp_path / "codes"), "--label", name]]) == 0
    assert len(Codes(tmp_path / "codes").images("train")) == len(CodeDataset(tmp_path / "codes"))


def test_two_label_columns_are_asked_about(tmp_path: Path, refused: Refused):
    data = table(tmp_path / "a.parquet", {"label": [0, 1], "labels": [1, 2]})
    refused(encode(data, tmp_path / "codes"), "label, labels", "--label NAME", untouched=tmp_path)


def test_labels_that_count_from_one(tmp_path: Path):
    images = open_images(str(parquet(tmp_path / "a.parquet", list(range(1, 11)) * 2)), "train")
    assert images.class_names == tuple(map(str, range(1, 11)))
    assert (images.labels.min(), images.labels.max()) == (0, 9)


def test_texts_as_labels(tmp_path: Path):
    assert classes(table(tmp_path / "a.parquet", {"label": ["dog", "cat"]})) == ("cat", "dog")


def test_an_image_folder_has_no_columns(tmp_path: Path, refused: Refused):
    data = folder_of(tmp_path / "images")
    refused([*encode(data, tmp_path / "codes"), "--label", "x"], "no columns", untouched=tmp_path)


@pytest.mark.parametrize("source", ["shards", "shards/*.parquet", "shards/**/*.parquet"])
def test_parquet_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str):
    (tmp_path / "shards").mkdir()
    for index in range(2):
        parquet(tmp_path / "shards" / f"train-0000{index}-of-00002.parquet", [0, 1] * 3)
    parquet(tmp_path / "shards" / "test-00000-of-00001.parquet", [1] * 2)
    monkeypatch.chdir(tmp_path)
    assert [len(open_images(source, split)) for split in ("train", "validation")] == [12, 2]
    assert main([str(part) for part in encode(source, tmp_path / "codes")]) == 0
    monkeypatch.chdir("/")
    assert len(Codes(tmp_path / "codes").images("validation")) == 2


@pytest.mark.parametrize(
    "name", ["a[1].parquet", "50% *.parquet", "a,b.parquet", "my file #1.parquet", "ünïcode.parquet"]
)
def test_special_characters(tmp_path: Path, name: str):
    data = shutil.move(parquet(tmp_path / "plain.parquet", [0, 1] * 4), tmp_path / name)
    assert len(open_images(str(data), "train")) == 7


def test_shards_of_several_kinds(tmp_path: Path, refused: Refused):
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "a.parquet", [0, 1])
    (tmp_path / "data" / "b.tar").write_bytes(b"")
    refused(encode(tmp_path / "data" / "*", tmp_path / "codes"), "several kinds", untouched=tmp_path)


def test_webdataset_shards(tmp_path: Path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"data-{shard:06}.tar", "w") as archive:
            for index in range(6):
                buffer = io.BytesIO()
                Image.fromarray(np.full((8, 8), 20 * index, np.uint8)).save(buffer, format="PNG")
                label = f"{index % 3}".encode()
                for ending, content in (("png", buffer.getvalue()), ("cls", label)):
                    entry = tarfile.TarInfo(f"{shard}{index}.{ending}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    for source in (tmp_path, tmp_path / "data-*.tar"):
        images = [open_images(str(source), split, validation=0.25) for split in ("train", "validation")]
        assert [len(split) for split in images] == [9, 3] and images[0].class_names == ("0", "1", "2")
    assert {int(pixels) // 20 % 3 for pixels in images[0].batch([0])[:, 0, 0, 0]} == {int(images[0].labels[0])}


# -- bad images --------------------------------------------------------------------------------------------------


@pytest.fixture
def half_bad(tmp_path: Path) -> Path:
    """Three images of 24 that cannot be decoded."""
    images = folder_of(tmp_path / "images", num=12)
    for name in ("a/3.png", "b/7.png"):
        (images / name).write_bytes((images / name).read_bytes()[:-40])
    (images / "b" / "8.png").write_bytes(b"")
    return images


def test_all_bad_images_are_named_before_the_first_shard(tmp_path: Path, half_bad: Path, refused: Refused):
    command = encode(half_bad, tmp_path / "codes")
    refused(command, "3 images", "a/3.png", "b/7.png", "b/8.png", "--skip-corrupt", untouched=tmp_path)
    refused(["tokenizer", "fit", half_bad, "--out", tmp_path / "t"], "3 images", "--skip-corrupt", untouched=tmp_path)


def test_bad_images_can_be_left_out(tmp_path: Path, half_bad: Path, capfd: pytest.CaptureFixture[str]):
    said = run(capfd, [*encode(half_bad, tmp_path / "codes"), "--skip-corrupt"])
    assert "left out as corrupt: 3 (" in said
    manifest = read_manifest(tmp_path / "codes")
    assert sorted(manifest["source"]["skipped"]["train"]) == ["a/3.png", "b/7.png", "b/8.png"]
    assert sum(entry["num"] for entry in manifest["splits"].values()) == 21
    images = Codes(tmp_path / "codes").images("train")
    assert len(images.batch(range(len(images)))) == len(CodeDataset(tmp_path / "codes"))
    before = run(capfd, [*encode(half_bad, tmp_path / "codes"), "--skip-corrupt"])
    assert before == said, "a finished job finds the same ones left out"


def test_the_others_stay_where_they_were(tmp_path: Path, half_bad: Path, capfd: pytest.CaptureFixture[str]):
    """Leaving out and removing a bad image come to the same split."""
    run(capfd, [*encode(half_bad, tmp_path / "skipped"), "--skip-corrupt"])
    for name in ("a/3.png", "b/7.png", "b/8.png"):
        (half_bad / name).unlink()
    run(capfd, encode(half_bad, tmp_path / "removed"))
    shards = [np.load(tmp_path / name / "validation-00000.npy") for name in ("skipped", "removed")]
    assert np.array_equal(*shards)


def test_one_bad_row_of_a_table(tmp_path: Path, refused: Refused, capfd: pytest.CaptureFixture[str]):
    import datasets

    good = Image.open(picture(tmp_path / "0.png"))
    buffer = io.BytesIO()
    good.save(buffer, format="PNG")
    contents = [buffer.getvalue()] * 9 + [buffer.getvalue()[:60]] + [buffer.getvalue()] * 2
    rows = {"image": [{"bytes": each, "path": None} for each in contents], "label": [0, 1] * 6}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    refused(encode(tmp_path / "a.parquet", tmp_path / "codes"), "row 9", "--skip-corrupt")
    run(capfd, [*encode(tmp_path / "a.parquet", tmp_path / "codes"), "--skip-corrupt"])
    assert json.loads((tmp_path / "codes" / "manifest.json").read_text())["source"]["skipped"] == {"train": ["9"]}


# -- what the system says is not the image's fault -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "words"),
    [(24, "too many open files"), (13, "no permission"), (5, "may be good"), (116, "may be good")],
)
def test_the_system_refuses(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, number: int, words: str):
    images = folder_of(tmp_path / "images")
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "3.png":
            raise OSError(number, os.strerror(number), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    for more in ([], ["--skip-corrupt"]):
        line = refused([*encode(images, tmp_path / "codes"), *more], words, "3.png")
        assert not {"remove", "delete", "corrupt", "repair"} & set(line.split())
    assert not (tmp_path / "codes").exists()


def test_a_link_to_nothing(tmp_path: Path, refused: Refused):
    images = folder_of(tmp_path / "images")
    (images / "a" / "9.png").symlink_to(tmp_path / "gone.png")
    refused(encode(images, tmp_path / "codes"), "link to nothing", "9.png", untouched=tmp_path)


def test_more_pixels_than_are_safe(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch):
    images = folder_of(tmp_path / "images")
    picture(images / "a" / "9.png", size=(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    refused([*encode(images, tmp_path / "codes"), "--image-size", "8"], "more pixels", "9.png", untouched=tmp_path)


# -- pixels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str):
    image = Image.new("RGBA", (4, 4), (10, 200, 30, 0))
    image.putpixel((0, 0), (10, 10, 10, 255))
    for index in range(2):
        (tmp_path / "images").mkdir(exist_ok=True)
        (image.quantize() if mode == "PA" else image.convert(mode)).save(tmp_path / "images" / f"{index}.png")
    pixels_CHW = open_images(str(tmp_path / "images"), "train").batch([0])[0]
    assert (pixels_CHW[:, 1:, 1:] == 255).all() and (pixels_CHW[:, 0, 0] <= 12).all()


def test_a_strip_needs_no_gigabytes(tmp_path: Path):
    import tracemalloc

    for index in range(2):
        picture(tmp_path / "images" / f"{index}.png", size=(6000, 2), seed=index)
    tracemalloc.start()
    images = open_images(str(tmp_path / "images"), "train", image_size=256)
    assert images.batch([0]).shape == (1, 1, 256, 256)
    largest = np.asarray(Image.open(tmp_path / "images" / "0.png").resize((2, 2))).size
    assert tracemalloc.get_traced_memory()[1] < 50e6 and largest
    tracemalloc.stop()


def test_ordinary_images_are_resized_as_before(tmp_path: Path):
    """Up to four times longer than wide, the order is ADM's: resize, then crop."""
    path = picture(tmp_path / "images" / "0.png", size=(40, 10))
    picture(tmp_path / "images" / "1.png", size=(40, 10), seed=1)
    whole = np.asarray(Image.open(path).resize((64, 16), Image.Resampling.BICUBIC))[:, 24:40]
    found = [open_images(str(tmp_path / "images"), split, image_size=16).batch([0])[0, 0].numpy()
             for split in ("train", "validation")]  # fmt: skip
    assert any(np.array_equal(pixels, whole) for pixels in found)


def test_a_folder_called_digits(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "digits")
    refused(encode("digits", tmp_path / "codes"), "./digits", "builtin:digits", untouched=tmp_path)
    assert classes("./digits") == ("a", "b") and len(classes("builtin:digits")) == 10


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder_of(tmp_path / "images")
    assert classes("~/images") == ("a", "b")
    with pytest.raises(VarkdError, match="no such"):
        open_images("~/nothing", "train")
