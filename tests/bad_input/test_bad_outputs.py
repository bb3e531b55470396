"""Output folders that are somebody else's: exit code 2, one line, and everything in them stays as it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from mistakes import Refused, encode, snapshot

from tiny_runs import arguments, train
from varkd.cli import main
from varkd.errors import VarkdError
from varkd.folders import Own, json_with
from varkd.tokenizers.pixels import Pixels, PixelsConfig
from varkd.tokenizers.store import save_tokenizer


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder of the user's, with names that verbs of varkd also use."""
    (tmp_path / "mine").mkdir()
    for name in ("thesis.tex", "grid.png", "index.html", "results.json", "data.csv", "config.json"):
        (tmp_path / "mine" / name).write_text("years of work")
    return tmp_path / "mine"


def commands(run: Path, codes: Path, out: Path) -> dict[str, list[object]]:
    return {
        "sample": ["sample", run, "--num", "4", "--device", "cpu", "--out", out],
        "encode": encode("digits", out),
        "teach": ["teach", run, "--data", codes, "--out", out],
        "tokenizer": ["tokenizer", "fit", "digits", "--overwrite", "--out", out],
        "import": ["tokenizer", "import", run, "--overwrite", "--out", out],
        "export": ["export", run, "--out", out],
        "convert": ["convert", run, "--out", out],
        "report": ["report", run, "--out", out],
        "analyze": ["analyze", run, "--teacher", run, "--out", out],
        "demo": ["demo", "--out", out],
        "study": ["study", "study-smoke", f"out={out}"],
        "train": arguments(out, codes),
        "anew": [*arguments(out, codes), "--overwrite"],
        "features": ["evaluate", run, "--features", out],
    }


VERBS = ("sample", "encode", "teach", "tokenizer", "import", "export", "convert", "report", "analyze", "demo", "study",
         "train", "anew")  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, mine: Path, teacher: Path, codes: Path, refused: Refused, verb: str
):
    refused(commands(teacher, codes, mine)[verb], str(mine), untouched=tmp_path)


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_is_no_place_for_anything_else(tmp_path: Path, teacher: Path, codes: Path, refused: Refused, verb: str):
    run = Path(shutil.copytree(teacher, tmp_path / "run"))
    if verb not in ("train", "anew"):  # those answer for their own folder
        refused(commands(run, codes, run)[verb], str(run), untouched=tmp_path)


def test_a_feature_network_does_not_replace_a_folder(mine: Path, teacher: Path, refused: Refused):
    (mine / "config.json").unlink()
    refused(commands(teacher, mine, mine)["features"], str(mine), "--features", untouched=mine)


def test_the_working_directory_is_not_replaced(
    tmp_path: Path, teacher: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    refused(["sample", teacher, "--num", "4", "--device", "cpu", "--out", "."], "working directory", untouched=tmp_path)


def test_a_link_stays_and_its_folder_is_filled(tmp_path: Path, teacher: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for num in ("4", "5"):  # its own samples may be replaced
        assert main(["sample", str(teacher), "--num", num, "--device", "cpu", "--out", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real" / "samples.json").read_text())["num"] == 5


def test_samples_beside_something_else_are_not_replaced(tmp_path: Path, teacher: Path, refused: Refused):
    command = ["sample", teacher, "--num", "4", "--device", "cpu", "--out", tmp_path / "out"]
    assert main([str(part) for part in command]) == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused(command, "notes.txt", "no part of samples", untouched=tmp_path)


def test_a_model_is_no_tokenizer(tmp_path: Path, teacher: Path):
    """Both are a config.json beside a model.safetensors."""
    assert main(["export", str(teacher), "--out", str(tmp_path / "model")]) == 0
    before = snapshot(tmp_path)
    with pytest.raises(VarkdError, match="other things than a tokenizer"):
        save_tokenizer(Pixels(PixelsConfig()), tmp_path / "model")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["teacher", "init"])
@pytest.mark.parametrize("place", ["itself", "above", "below", "link"])
def test_a_run_may_not_write_where_it_reads(
    tmp_path: Path, teacher: Path, codes: Path, refused: Refused, name: str, place: str
):
    model = Path(shutil.copytree(teacher, tmp_path / "home" / "model"))
    (tmp_path / "link").symlink_to(model)
    out = {"itself": model, "above": model.parent, "below": model / "kd", "link": tmp_path / "link"}[place]
    command = [*arguments(out, codes, "method=kd", f"teacher={teacher}", f"{name}={model}"), "--overwrite"]
    refused(command, "which the run reads", f"{name}=", "choose another out=", untouched=tmp_path)


def test_a_run_may_not_write_into_its_data(tmp_path: Path, codes: Path, refused: Refused):
    own = Path(shutil.copytree(codes, tmp_path / "codes"))
    for out in (own, own / "run"):
        refused([*arguments(out, own), "--overwrite"], "which the run reads", untouched=tmp_path)
    assert train(tmp_path, own, "train.updates=1"), "codes may stand in the folder of their run"


def test_overwriting_leaves_what_others_put_there(tmp_path: Path, codes: Path):
    run = train(tmp_path / "run", codes, "train.updates=1")
    kept = [run / "checkpoints" / "mine.pt", run / "samples" / "poster.png", run / "evaluation" / "notes.txt"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert main([*arguments(run, codes, "train.updates=1", "seed=3"), "--overwrite"]) == 0
    assert [path.read_text() for path in kept] == ["mine"] * 3


def test_a_recipe_of_somebody_else_is_no_run(tmp_path: Path, codes: Path, refused: Refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("kubernetes: true")
    refused([*arguments(tmp_path / "run", codes), "--overwrite"], "run.yaml", untouched=tmp_path)


OWN = Own("a test", ("mark.json",), json_with("a", kind=("x", "y")), ("*.npy",))


@pytest.mark.parametrize("content", ['{"a": 1, "kind": "z"}', '{"kind": "x"}', "[]", "{", "\xff"])
def test_a_marker_must_say_whose_it_is(tmp_path: Path, content: str):
    (tmp_path / "mark.json").write_bytes(content.encode("latin1"))
    with pytest.raises(VarkdError, match="other things than a test"):
        OWN.check(tmp_path)
    (tmp_path / "mark.json").write_text('{"a": 1, "kind": "y"}')
    OWN.check(tmp_path)


def test_what_a_killed_process_left_does_not_block(tmp_path: Path):
    (tmp_path / ".mark.json.0123abcd.tmp").write_text("half")
    OWN.check(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_listed(tmp_path: Path):
    (tmp_path / "shut").mkdir(mode=0)
    with pytest.raises(VarkdError, match="cannot look into"):
        OWN.check(tmp_path / "shut")


def test_long_names(tmp_path: Path, teacher: Path, refused: Refused):
    """What the system takes is written, what it refuses is refused at once."""
    command = ["sample", str(teacher), "--num", "4", "--device", "cpu", "--out"]
    refused([*command, tmp_path / ("x" * 300)], "File name too long", untouched=tmp_path)
    assert main([*command, str(tmp_path / ("x" * 250))]) == 0
