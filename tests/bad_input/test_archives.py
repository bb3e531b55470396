"""Images that were put away, codes that may not be written to: what is there is enough, or what to do is said first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mistakes import Refused, encode, folder_of

from tiny_runs import quicken, train
from varkd import files
from varkd.cli import main
from varkd.errors import VarkdError
from varkd.files import check_writable
from varkd.run import evaluation

STEPS = ("train.updates=2", "train.checkpoint_every=1")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    quicken(monkeypatch)
    folder_of(tmp_path / "images", num=20)
    assert main([str(part) for part in encode(tmp_path / "images", tmp_path / "codes")]) == 0
    train(tmp_path / "run", tmp_path / "codes", *STEPS)
    return tmp_path


def evaluate(home: Path, *more: object) -> dict:
    command = ["evaluate", home / "run", "--num", "8", "--device", "cpu", *more]
    assert main([str(part) for part in command]) == 0
    found = json.loads((home / "run" / "metrics.json").read_text())
    return {name: found[name] for name in ("metrics", "floors", "validation_ce")}


def test_archived_images_are_not_needed_again(home: Path, refused: Refused):
    before = evaluate(home)
    (home / "images").rename(home / "archive")
    assert evaluate(home) == before
    shutil.rmtree(home / "codes" / "features")
    line = refused(["evaluate", home / "run", "--num", "8"], "no images at", str(home / "images"), "put them back")
    assert "delete" not in line
    (home / "archive").rename(home / "images")
    assert evaluate(home)["floors"].keys() == before["floors"].keys()


def test_other_images_make_other_floors(home: Path):
    """The cache of the floors is of these codes."""
    first = evaluate(home)["floors"]
    (cache,) = (home / "codes").glob("floors-*.json")
    kept = json.loads(cache.read_text())
    cache.write_text(json.dumps({**kept, "key": "0", "floors": {}}))
    assert evaluate(home)["floors"] == first


def test_a_feature_network_of_former_codes(home: Path, refused: Refused):
    """The codes were made anew, and only what `encode` writes was taken away before."""
    evaluate(home)
    for path in (*(home / "codes").glob("*.npy"), home / "codes" / "manifest.json"):
        path.unlink()
    shutil.rmtree(home / "codes" / "tokenizer")
    folder_of(home / "images", num=25)
    shutil.move(home / "codes", home / "old")
    assert main([str(part) for part in encode(home / "images", home / "codes")]) == 0
    shutil.move(home / "old" / "features", home / "codes" / "features")
    train(home / "new", home / "codes", *STEPS)
    refused(["evaluate", home / "new", "--num", "8"], "fitted on other images", "move it away")


def read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As a mounted archive: root may write anywhere else."""
    import errno
    import tempfile

    temporary = tempfile.TemporaryFile

    def refuse(*arguments: object, dir: Path, **options: object):
        if Path(dir).resolve() == folder.resolve():
            raise OSError(errno.EROFS, "Read-only file system")
        return temporary(*arguments, dir=dir, **options)

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)


def test_codes_that_may_not_be_written_to(home: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch):
    read_only(monkeypatch, home / "codes")

    def fit(*arguments: object, **options: object) -> None:
        raise AssertionError("fitted for nothing")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "fit_features", fit)
        refused(["evaluate", home / "run", "--num", "8"], "cannot write into", "Read-only", "--features DIR/features")
    before = sorted((home / "codes").iterdir())
    evaluate(home, "--features", home / "caches" / "features")
    assert sorted((home / "codes").iterdir()) == before
    assert sorted(path.name.split("-")[0] for path in (home / "caches").iterdir()) == [
        "features",
        "floors",
        "reference",
    ]


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(VarkdError, match="do that"):
        check_writable(tmp_path / "file" / "x", "do that")
