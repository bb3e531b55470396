"""Analyses that cannot be: exit code 2, one line that says what to do, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mistakes import Refused

from tiny_runs import train
from varkd.cli import main


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, codes: Path, teacher: Path) -> Path:
    return train(tmp_path_factory.mktemp("student") / "kd", codes, "method=kd", f"teacher={teacher}")


def test_a_run_without_a_teacher(tmp_path: Path, teacher: Path, refused: Refused):
    refused(["analyze", teacher, "--out", tmp_path / "out"], str(teacher), "give --teacher MODEL", untouched=tmp_path)


@pytest.mark.parametrize("what", ["missing", "empty", "file"])
def test_what_is_not_a_model(tmp_path: Path, refused: Refused, what: str):
    place = tmp_path / what
    if what == "empty":
        place.mkdir()
    if what == "file":
        place.write_text("")
    refused(["analyze", place, "--out", tmp_path / "out"], str(place), untouched=tmp_path)


def test_a_model_folder_without_codes(tmp_path: Path, student: Path, refused: Refused):
    assert main(["export", str(student), "--out", str(tmp_path / "model")]) == 0
    refused(["analyze", tmp_path / "model", "--out", tmp_path / "out"], "--data", untouched=tmp_path)


@pytest.mark.parametrize("option", ["--teacher", "--second"])
def test_a_teacher_of_another_tokenizer(tmp_path: Path, student: Path, teacher: Path, refused: Refused, option: str):
    other = Path(shutil.copytree(teacher, tmp_path / "other"))
    info = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**info, "tokenizer_hash": "f" * 64}))
    command = ["analyze", student, "--out", tmp_path / "out", option, other]
    refused(command, option, str(other), "tokenizer ffffffffffff", untouched=tmp_path)


def test_a_second_model_of_other_sizes(tmp_path: Path, student: Path, refused: Refused):
    from varkd.backbones.store import build, save_backbone

    sizes = {"vocab_size": 5, "num_classes": 10, "grid": (8, 8), "num_layers": 1, "dim": 16, "num_heads": 1}
    save_backbone(build("llamagen", sizes), tmp_path / "small")
    command = ["analyze", student, "--out", tmp_path / "out", "--second", tmp_path / "small"]
    refused(command, "--second", "5 codes", untouched=tmp_path)


def test_a_teacher_that_cannot_follow_the_students_order(tmp_path: Path, codes: Path, teacher: Path, refused: Refused):
    """A raster teacher and a student that decodes in random orders."""
    run = train(tmp_path / "run", codes, "model.family=randar", "model.num_heads=1", "train.updates=1")
    refused(["analyze", run, "--out", tmp_path / "out", "--teacher", teacher], "--teacher", "raster")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "words"), [
    (["--num", "1"], ["--num 1"]), (["--device", "tpu"], ["device=tpu"]),
    (["--data", "nowhere"], ["nowhere"]),
], ids=lambda value: value[0].strip("-"))  # fmt: skip
def test_options_that_cannot_be(tmp_path: Path, student: Path, refused: Refused, options: list[str], words: list[str]):
    refused(["analyze", student, "--out", tmp_path / "out", *options], *words, untouched=tmp_path)


def test_a_folder_of_something_else(tmp_path: Path, student: Path, refused: Refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    refused(["analyze", student, "--out", tmp_path / "out"], "thesis.tex", "choose another --out", untouched=tmp_path)
    refused(["analyze", student, "--out", tmp_path / "out" / "thesis.tex"], "is a file", untouched=tmp_path)
