"""Images and codes behind URLs, here in fsspec's memory: the same as the ones on disk."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiny_runs import SETTINGS, log, train
from varkd.cli import main
from varkd.config import read_run
from varkd.data.images import open_images
from varkd.data.remote import fetch_codes
from varkd.data.sources import load_source
from varkd.errors import VarkdError
from varkd.files import read_json, write_json
from varkd.run.data import encode
from varkd.run.models import load_trained

fsspec = pytest.importorskip("fsspec")
BUCKET = "memory://bucket"


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An empty store, and a cache of the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def upload(fs: Any, folder: Path, name: str) -> str:
    fs.put(str(folder), f"/bucket/{name}", recursive=True)
    return f"{BUCKET}/{name}"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 8)):
        for number in range(count):
            path = tmp_path / "photos" / split / ("2", "10")[number % 2] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def same_images(url: str, folder: Path) -> None:
    for split in ("train", "validation"):
        there, here = open_images(url, split), open_images(str(folder), split)
        assert there.fingerprint == here.fingerprint and there.class_names == here.class_names
        assert there.batch(np.arange(len(there))).equal(here.batch(np.arange(len(here))))


def test_folders_are_read_with_the_rules_of_the_disk(bucket: Any, photos: Path):
    same_images(upload(bucket, photos, "photos"), photos)
    (photos / "train" / "2" / ".hidden.png").write_bytes(b"")
    (photos / "train" / "2" / "notes.txt").write_text("no image")
    same_images(upload(bucket, photos / "train", "classes"), photos / "train")
    assert load_source(f"{BUCKET}/classes").skipped == {".txt": 1}
    same_images(upload(bucket, photos / "train" / "2", "loose/2"), photos / "train" / "2")


def test_workers_read_them_too(bucket: Any, photos: Path, tmp_path: Path):
    url = upload(bucket, photos, "photos")
    encode(url, "pixels", tmp_path / "there", workers=2, quiet=True)
    encode(str(photos), "pixels", tmp_path / "here", quiet=True)
    for path in (tmp_path / "here").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()
    assert read_json(tmp_path / "there" / "manifest.json")["source"]["path"] == url


def test_tables(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "tables").mkdir()
    for name, count in (("train-0", 6), ("train-1", 5), ("test-0", 4)):
        rows = []
        for number in range(count):
            Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / "one.png")
            rows.append({"bytes": (tmp_path / "one.png").read_bytes(), "path": None})
        table = pa.table({"image": rows, "label": [number % 2 for number in range(count)]})
        pq.write_table(table, tmp_path / "tables" / f"{name}.parquet")
    url = upload(bucket, tmp_path / "tables", "tables")
    for form in ("", "/*.parquet"):
        same_images(url + form, tmp_path / "tables")
    found = load_source(f"{url}/train-0.parquet,{url}/test-0.parquet")
    assert found.validation is not None and (len(found.train), len(found.validation)) == (6, 4)


def test_a_run_on_codes_behind_a_url(bucket: Any, codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    url = upload(bucket, codes, "codes")
    assert main(["train", "digits-student", f"out={tmp_path / 'there'}", f"data={url}", *SETTINGS]) == 0
    assert log(tmp_path / "there") == log(train(tmp_path / "here", codes))
    assert read_run(tmp_path / "there").data == url
    folder = fetch_codes(url)
    assert folder.is_relative_to(tmp_path / "cache" / "varkd")
    read: list[str] = []
    monkeypatch.setattr(type(bucket), "get_file", lambda *arguments, **_: read.append(arguments[1]))
    assert fetch_codes(url) == folder and not read  # once
    assert load_trained(tmp_path / "there", "cpu")[1].hash == load_trained(tmp_path / "here", "cpu")[1].hash


def test_what_was_changed_on_the_way_is_refused(bucket: Any, codes: Path):
    url = upload(bucket, codes, "codes")
    name = "/bucket/codes/train-00000.npy"
    whole = bucket.cat_file(name)
    bucket.pipe_file(name, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(VarkdError, match=r"train-00000\.npy is not what was written"):
        fetch_codes(url)
    bucket.pipe_file(name, whole)
    assert (fetch_codes(url) / "train-00000.npy").read_bytes() == whole


@pytest.mark.parametrize("name", ["../outside.npy", "/etc/passwd", "unknown.npy"])
def test_names_that_lead_elsewhere(bucket: Any, codes: Path, tmp_path: Path, name: str):
    manifest = read_json(codes / "manifest.json")
    manifest["splits"]["train"]["shards"][0]["file"] = name
    write_json(tmp_path / "m" / "manifest.json", manifest)
    with pytest.raises(VarkdError, match="without a hash or outside its folder"):
        fetch_codes(upload(bucket, tmp_path / "m", "m"))


def test_one_line_for_what_is_missing(bucket: Any, monkeypatch: pytest.MonkeyPatch):
    for call in (load_source, fetch_codes):
        with pytest.raises(VarkdError, match="memory://bucket/none"):
            call(f"{BUCKET}/none")
        with pytest.raises(VarkdError, match=r"nope://x.*Protocol not known: nope"):
            call("nope://x/y")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(VarkdError, match=r"s3://bucket/x.* needs another package \(Install s3fs to access S3\)"):
        fetch_codes("s3://bucket/x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(VarkdError, match=r"pip install 'varkd\[remote\]'"):
        load_source(f"{BUCKET}/photos")
