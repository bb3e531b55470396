"""What was moved is found again; what was changed under its old path is noticed before a number is made of it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from mistakes import Refused, encode, folder_of, picture

from tiny_runs import SETTINGS, arguments, quicken, train
from varkd.cli import main
from varkd.data.codes import codes_hash, read_manifest
from varkd.run.data import Codes

STEPS = ("train.updates=2", "train.checkpoint_every=1")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Images, codes, a teacher and its student in one folder."""
    home = tmp_path / "home"
    folder_of(home / "images", num=12)
    assert main([str(part) for part in encode(home / "images", home / "codes")]) == 0
    train(home / "teacher", home / "codes", *STEPS)
    train(home / "student", home / "codes", *STEPS, "method=kd", f"teacher={home / 'teacher'}")
    return home


def remade(project: Path) -> None:
    """Other codes at the old path: pictures were added and the folder was encoded anew."""
    for index in range(4):
        picture(project / "images" / "a" / f"new-{index}.png", seed=100 + index)
    shutil.rmtree(project / "codes")
    assert main([str(part) for part in encode(project / "images", project / "codes")]) == 0


def change_image(images: Path, what: str) -> None:
    if what == "added":
        picture(images / "a" / "new.png", seed=99)
    if what == "renamed":
        (images / "b").rename(images / "c")
    if what == "removed":
        (images / "a" / "3.png").unlink()
    if what == "exchanged":
        (images / "a" / "3.png").rename(images / "a" / "33.png")


@pytest.mark.parametrize("what", ["added", "renamed", "removed", "exchanged"])
def test_images_that_are_no_longer_those_of_the_codes(project: Path, refused: Refused, what: str):
    change_image(project / "images", what)
    before = sorted(project.rglob("*"))
    refused(["evaluate", project / "student"], "no longer holds the images", str(project / "images"), "put them back")
    assert sorted(project.rglob("*")) == before, "and no feature network of other images beside the codes"


@pytest.mark.parametrize("verb", ["train", "sample", "evaluate", "analyze"])
def test_codes_that_were_made_anew(project: Path, refused: Refused, verb: str):
    remade(project)
    run = project / "student"
    command = {
        "train": arguments(run, project / "codes", *STEPS, "method=kd", f"teacher={project / 'teacher'}"),
        "sample": ["sample", run, "--out", project / "samples"],
        "evaluate": ["evaluate", run],
        "analyze": ["analyze", run, "--out", project / "analysis"],
    }[verb]
    words = ["begun with another codes"] if verb == "train" else ["trained on other codes", "put them back"]
    refused(command, *words, untouched=project)


def test_the_hash_of_codes_is_of_what_they_are(project: Path):
    manifest = read_manifest(project / "codes")
    moved = {**manifest, "source": {**manifest["source"], "name": "elsewhere"}}
    assert codes_hash(moved) == codes_hash(manifest)
    remade(project)
    assert codes_hash(read_manifest(project / "codes")) != codes_hash(manifest)


def test_a_moved_project_is_used_as_before(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    quicken(monkeypatch)
    new = project.rename(tmp_path / "new")
    monkeypatch.chdir(new / "images")
    assert main(["sample", "../student", "--num", "4", "--device", "cpu", "--out", str(new / "samples")]) == 0
    assert main(["evaluate", "../student", "--num", "8", "--device", "cpu"]) == 0
    found = json.loads((new / "student" / "metrics.json").read_text())
    assert found["agreement"]["data"]["num"] > 0
    command = ["train", "digits-student", "out=../student", "data=../codes/", *SETTINGS, *STEPS, "method=kd"]
    assert main([*command, "teacher=../teacher"]) == 0, "other words for the same places are no other run"


def test_a_folder_that_moved_alone(project: Path, tmp_path: Path):
    """Then the paths as they were given still lead to the rest."""
    moved = [project / name for name in ("codes", "student")]
    codes, student = (Path(shutil.move(path, tmp_path / f"moved-{path.name}")) for path in moved)
    assert len(Codes(codes).images("train")) > 0
    codes.rename(project / "codes")
    assert main(["sample", str(student), "--num", "4", "--device", "cpu", "--out", str(tmp_path / "samples")]) == 0


def test_project_paths_are_recorded_as_seen_from_the_recording_file(project: Path):
    manifest = read_manifest(project / "codes")
    assert manifest["source"]["path"] == "../images" and manifest["tokenizer"]["path"] == "tokenizer"
    recorded = json.loads((project / "student" / "environment.json").read_text())
    assert [recorded[name] for name in ("codes", "teacher", "init")] == ["../codes", "../teacher", None]


@pytest.mark.parametrize("path", ["imgs/trian", "./trian", "/no/where", "no-such.parquet"])
def test_a_mistyped_path_is_not_looked_for_on_the_hub(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, path: str
):
    import datasets

    def download(*arguments: object, **options: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(datasets, "load_dataset", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imgs").mkdir()
    refused(encode(path, tmp_path / "codes"), "no such", path, untouched=tmp_path)


def test_without_a_network_the_answer_comes_at_once(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch):
    """The library alone tries six times, for half a minute."""
    monkeypatch.setattr("varkd.data.tables.hub_answers", lambda: False)
    monkeypatch.chdir(tmp_path)
    begun = time.monotonic()
    refused(encode("no-such/images", tmp_path / "codes"), "no folder no-such/images here", untouched=tmp_path)
    assert time.monotonic() - begun < 8
