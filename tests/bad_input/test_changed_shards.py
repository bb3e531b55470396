"""A byte that flipped in a codes folder is found, and said, before anything is trained on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tiny_runs import SETTINGS, codes
from varkd.cli import main

__all__ = ["codes"]


@pytest.fixture
def copy(codes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(codes, tmp_path / "codes"))


def flip(path: Path) -> None:
    """One bit of the last byte, which no shape or range check sees."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train-00000.npy", "train-00000-labels.npy", "validation-00000.npy"])
def test_a_flipped_bit_is_one_line(copy: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flip(copy / name)
    assert main(["train", "digits-student", f"out={tmp_path / 'run'}", f"data={copy}", "method=ce", *SETTINGS]) == 2
    said = capsys.readouterr().err
    assert f"{name} is not what was written" in said and "run the same `varkd encode` again" in said


def test_the_advice_puts_it_right(copy: Path, tmp_path: Path):
    before = json.loads((copy / "manifest.json").read_text())["sha256"]
    flip(copy / "train-00000.npy")
    (copy / "train-00000.npy").rename(tmp_path / "away.npy")
    assert main(["encode", "digits", "--tokenizer", "pixels", "--out", str(copy)]) == 0
    assert json.loads((copy / "manifest.json").read_text())["sha256"] == before
    assert main(["train", "digits-student", f"out={tmp_path / 'run'}", f"data={copy}", "method=ce", *SETTINGS]) == 0


def test_older_manifests_are_read(copy: Path, tmp_path: Path):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert main(["train", "digits-student", f"out={tmp_path / 'run'}", f"data={copy}", "method=ce", *SETTINGS]) == 0
