"""What people give `varkd teach`, or as a cached teacher, by mistake: one line, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mistakes import Refused, encode

from tiny_runs import arguments, train
from varkd.cli import main
from varkd.methods import METHODS
from varkd.run.data import encode as encode_data

ON_DATA = {"ce", "kd", "kd_ce", "kd_reverse", "akl", "todi", "taid", "atkd", "scheduled_sampling",
           "scheduled_sampling_parallel"}  # fmt: skip


def teach(teacher: object, codes: object, out: object, *options: object) -> list[object]:
    return ["teach", teacher, "--data", codes, "--out", out, "--device", "cpu", *options]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path, codes: Path) -> Path:
    out = tmp_path_factory.mktemp("caches") / "cache"
    assert main([str(part) for part in teach(teacher, codes, out, "--top-k", 8)]) == 0
    return out


@pytest.mark.parametrize("name", sorted(set(METHODS) - ON_DATA))
def test_methods_that_need_a_live_teacher(tmp_path: Path, codes: Path, cache: Path, refused: Refused, name: str):
    words = ["teach --guidance 1.5"] if name == "kd_guided" else ["teacher cache", "give a live teacher"]
    refused(arguments(tmp_path / "run", codes, f"method={name}", f"teacher={cache}"), str(cache), *words)
    assert not (tmp_path / "run").exists()


def test_settings_of_teach(tmp_path: Path, codes: Path, teacher: Path, refused: Refused):
    out = tmp_path / "cache"
    for options, words in {
        ("--top-k", 0): ("top_k=0", "between 1 and the 17 codes"),
        ("--top-k", 18): ("top_k=18", "between 1 and the 17 codes"),
        ("--batch-size", 0): ("batch_size=0",),
        ("--shard-size", 0): ("shard_size=0",),
        ("--guidance", -1): ("guided", "0 <= scale"),
        ("--device", "tpu"): ("device=tpu",),
    }.items():
        refused(teach(teacher, codes, out, *options), *words)
    refused(teach(tmp_path / "nothing", codes, out), "no model at", "nothing")
    refused(teach(teacher, teacher, out), "is not a codes folder")
    assert not out.exists()


def test_folders_that_are_something_else(tmp_path: Path, codes: Path, teacher: Path, cache: Path, refused: Refused):
    own = Path(shutil.copytree(codes, tmp_path / "codes"))
    refused(teach(teacher, codes, own), "holds other things than a teacher cache", untouched=tmp_path)
    refused(encode("digits", cache), "holds other things than codes", untouched=cache)
    refused(teach(teacher, codes, cache, "--top-k", 9), "another top_k (8, now 9)", untouched=cache)
    (cache / "notes.txt").write_text("mine")
    refused(teach(teacher, codes, cache, "--top-k", 8), "notes.txt", "no part of a teacher cache", untouched=cache)
    (cache / "notes.txt").unlink()


def test_another_teacher_and_other_codes(tmp_path: Path, codes: Path, teacher: Path, cache: Path, refused: Refused):
    other = train(tmp_path / "other", codes, "train.updates=1", "seed=5")
    refused(teach(other, codes, cache, "--top-k", 8), "another teacher", untouched=cache)
    encode_data("digits", "pixels", tmp_path / "flipped", flip=True, quiet=True)
    refused(teach(teacher, tmp_path / "flipped", cache, "--top-k", 8), "another codes", untouched=cache)
    command = arguments(tmp_path / "run", tmp_path / "flipped", "method=kd", f"teacher={cache}")
    refused(command, "made of other codes", "data=")
    assert not (tmp_path / "run").exists()


def test_a_model_of_other_codes(tmp_path: Path, codes: Path, scale_codes: Path, teacher: Path, refused: Refused):
    refused(teach(teacher, scale_codes, tmp_path / "cache"), "codes of tokenizer")
    assert not (tmp_path / "cache").exists()


def test_damaged_caches(tmp_path: Path, codes: Path, teacher: Path, cache: Path, refused: Refused):
    """Refused by training; the same `varkd teach` mends them."""
    mine = Path(shutil.copytree(cache, tmp_path / "cache"))
    command = arguments(tmp_path / "run", codes, "method=kd", f"teacher={mine}")
    shard = mine / "train-00001-logp.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    refused(command, "train-00001-logp.npy", "truncated", "varkd teach")
    shard.unlink()
    refused(command, "train-00001-logp.npy is missing")
    assert main([str(part) for part in teach(teacher, codes, mine, "--top-k", 8)]) == 0
    assert shard.read_bytes() == whole
    (mine / "manifest.json").rename(mine / "partial.json")
    refused(command, "is not complete", "varkd teach")
    (mine / "partial.json").write_text("{")
    refused(command, "config.json")
    assert not (tmp_path / "run").exists()


def test_codes_of_a_larger_vocabulary(tmp_path: Path, codes: Path, cache: Path, capfd: pytest.CaptureFixture[str]):
    """Seen as they are read: the run stops with the line."""
    mine = Path(shutil.copytree(cache, tmp_path / "cache"))
    for path in mine.glob("*-codes.npy"):
        np.save(path, np.full_like(np.load(path), 17))
    manifest = json.loads((mine / "manifest.json").read_text())
    (mine / "manifest.json").write_text(json.dumps({**manifest, "sha256": {}}))
    command = arguments(tmp_path / "run", codes, "method=kd", f"teacher={mine}")
    assert main([str(part) for part in command]) == 2
    assert "holds code 17 but the tokenizer has 17: teach again" in capfd.readouterr().err


def test_students_that_it_does_not_fit(
    tmp_path: Path, codes: Path, teacher: Path, cache: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    for family in ("arpg", "randar", "rar"):
        more = (f"model.family={family}", "model.num_layers=2", "model.order=random", "method=kd", f"teacher={cache}")
        refused(arguments(run, codes, *more), f"{family} student draws a new one for every row", "model.order=raster")
    without = tmp_path / "no-null"
    assert main([str(part) for part in teach(teacher, codes, without, "--top-k", 4, "--no-null")]) == 0
    command = arguments(run, codes, "method=kd", f"teacher={without}")
    refused(command, "without the null branch", "train.label_drop=0", "--no-null")
    assert not run.exists()
    assert main([*command, "train.label_drop=0", "train.updates=1"]) == 0


def test_a_run_does_not_go_on_with_another_cache(
    tmp_path: Path, codes: Path, teacher: Path, cache: Path, refused: Refused
):
    """Nor with the live teacher, whose numbers are others."""
    run = train(tmp_path / "run", codes, "method=kd", f"teacher={cache}", "train.updates=3")
    longer = (codes, "method=kd", "train.updates=6")
    refused(arguments(run, *longer, f"teacher={teacher}"), "another teacher cache", untouched=run)
    assert main([str(part) for part in teach(teacher, codes, tmp_path / "nine", "--top-k", 9)]) == 0
    refused(arguments(run, *longer, f"teacher={tmp_path / 'nine'}"), "another teacher cache", untouched=run)
    cache = Path(shutil.copytree(cache, tmp_path / "moved"))
    assert main(arguments(run, *longer, f"teacher={cache}")) == 0


def test_analyze_says_who_is_missing(tmp_path: Path, codes: Path, teacher: Path, refused: Refused):
    model = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    out = tmp_path / "cache"
    assert main([str(part) for part in teach(model, codes, out, "--top-k", 2)]) == 0
    run = train(tmp_path / "run", codes, "method=kd", f"teacher={out}", "train.updates=1")
    shutil.rmtree(model)
    refused(["analyze", run, "--out", tmp_path / "page", "--num", 4, "--device", "cpu"], "give --teacher MODEL")
