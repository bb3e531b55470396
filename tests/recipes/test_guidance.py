"""Guidance distillation from the command line: a student is told the scale, and samples in one pass."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tiny_runs import FROM_THE_START, arguments, assert_same_state, checkpoint, log, stop_after, train
from varkd.backbones.llamagen import LlamaGen
from varkd.backbones.store import FAMILIES, load_backbone
from varkd.cli import main
from varkd.run.models import load

QUICK = ("train.updates=4", "train.validate_every=4", "train.checkpoint_every=4")
TOLD = ("model.guidance_conditioned=true", "method.target.highest=3")
KD, VARKD = (*TOLD, "method=kd_guided"), (*FROM_THE_START, *TOLD, "method=best_of_n_guided")


def codes_of(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz", allow_pickle=False) as found:
        return found["codes"]


def sample(run: Path, guidance: float, out: Path) -> np.ndarray:
    command = ["sample", str(run), "--guidance", str(guidance), "--num", "12", "--out", str(out), "--device", "cpu"]
    assert main(command) == 0
    return codes_of(out)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, codes: Path) -> Path:
    return train(tmp_path_factory.mktemp("guidance") / "start", codes, *QUICK, "seed=5")


@pytest.mark.parametrize("method", [KD, VARKD], ids=["kd_guided", "best_of_n_guided"])
def test_a_student_is_taught_and_sampled_at_any_scale(
    tmp_path: Path, codes: Path, teacher: Path, method: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    run = train(tmp_path / "run", codes, *QUICK, *method, f"teacher={teacher}", "train.optim.lr=0.05")
    assert json.loads((run / "config.json").read_text())["guidance_conditioned"] is True
    lines = [line for line in log(run) if line["split"] == "train"]
    assert len(lines) == 4
    assert all(math.isfinite(value) for line in lines for key, value in line.items() if key != "split")
    assert checkpoint(run, 4)["student/guidance_embedding.linear.weight"].any()
    if method is VARKD:
        replayed = checkpoint(run, 4)["method/rows/replay_scale"][checkpoint(run, 4)["method/rows/replay_born"] >= 0]
        assert 1.5 <= replayed.min() < replayed.max() <= 3

    rows, begin = [], LlamaGen.start
    monkeypatch.setattr(LlamaGen, "start", lambda self, condition, *rest: rows.append(len(condition))
                        or begin(self, condition, *rest))  # fmt: skip
    drawn = [sample(run, scale, tmp_path / f"at-{scale}") for scale in (1, 2, 3)]
    assert rows == [12, 12, 12], "the student decodes one row for each image"
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[1], drawn[2])
    sample(teacher, 2, tmp_path / "teacher")
    assert rows[3:] == [24], "the teacher decodes two"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_plain_start_becomes_a_student_that_is_told(
    family: str, tmp_path: Path, codes: Path, request: pytest.FixtureRequest
):
    """Every weight of the start, and an embedding that adds nothing yet; then both learn."""
    data = request.getfixturevalue("scale_codes") if family == "var" else codes
    quick = ("train.updates=2", "train.validate_every=2", "train.checkpoint_every=2", "model.num_layers=2")
    plain = train(tmp_path / "start", data, f"model.family={family}", *quick)
    places = (f"init={plain}", f"teacher={plain}")
    still = train(tmp_path / "still", data, *quick, *KD, *places, "train.optim.lr=1e-30", "train.optim.weight_decay=0")
    student = train(tmp_path / "student", data, *quick, *KD, *places)
    before, unmoved, after = (checkpoint(run, 2) for run in (plain, still, student))
    name = "ema/guidance_embedding.linear.weight"
    assert unmoved[name].abs().max() < 1e-20 and after[name].abs().max() > 1e-4
    theirs = {key for key in unmoved if key.startswith("ema/")}
    assert theirs == {key for key in before if key.startswith("ema/")} | {name}
    for key in theirs - {name}:
        torch.testing.assert_close(unmoved[key], before[key], rtol=1e-6, atol=1e-12)
    assert load_backbone(student)[0].guidance_conditioned and not load_backbone(plain)[0].guidance_conditioned
    first = next(line["ce"] for line in log(student) if line["split"] == "validation")
    assert first == pytest.approx([line["ce"] for line in log(plain) if line["split"] == "validation"][-1], abs=1e-6)


def test_a_start_that_is_told_stays_so(tmp_path: Path, codes: Path, teacher: Path, capsys: pytest.CaptureFixture[str]):
    told = train(tmp_path / "told", codes, *QUICK, *KD, f"teacher={teacher}")
    more = train(tmp_path / "more", codes, *QUICK, f"init={told}", "train.updates=1")
    assert load(more, "cpu").guidance_conditioned
    capsys.readouterr()
    assert main(arguments(tmp_path / "run", codes, f"init={told}", "model.guidance_conditioned=false")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "leave model.guidance_conditioned=false out" in error


def test_a_stop_changes_nothing(tmp_path: Path, codes: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch):
    """Bit by bit, with the scales of replayed samples."""
    settings = (*VARKD, f"teacher={teacher}", "train.updates=4")
    whole = train(tmp_path / "whole", codes, *settings)
    command = arguments(tmp_path / "resumed", codes, *settings)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert main(command) == 128 + 15
    assert main(command) == 0
    assert_same_state(tmp_path / "resumed", whole, 4)
    assert log(tmp_path / "resumed") == log(whole)
    assert np.array_equal(sample(whole, 2, tmp_path / "a"), sample(tmp_path / "resumed", 2, tmp_path / "b"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("method=kd_guided", "method.target.highest=3"), "model.guidance_conditioned=true"),
        (("method=kd_guided", "model.guidance_conditioned=true"), "method.target.highest"),
        (("method=kd_guided", "model.guidance_conditioned=true", "method.target.highest=1"), "highest"),
        (("method=kd_guided", "model.guidance_conditioned=perhaps"), "model.guidance_conditioned"),
    ],
)
def test_impossible_settings_have_one_clear_line(
    tmp_path: Path,
    codes: Path,
    teacher: Path,
    settings: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
):
    assert main(arguments(tmp_path / "run", codes, *settings, f"teacher={teacher}")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and not (tmp_path / "run").exists()


def test_a_teacher_that_is_told_cannot_be_guided(
    tmp_path: Path, codes: Path, start: Path, capsys: pytest.CaptureFixture[str]
):
    told = train(tmp_path / "told", codes, *QUICK, "model.guidance_conditioned=true")
    assert main(arguments(tmp_path / "run", codes, *KD, f"teacher={told}", f"init={start}")) == 2
    assert "target plain" in capsys.readouterr().err
    train(tmp_path / "kd", codes, *QUICK, "method=kd", f"teacher={told}", f"init={start}")


def test_official_files_have_no_place_for_the_scale(
    tmp_path: Path, codes: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
):
    told = train(tmp_path / "told", codes, *QUICK, *KD, f"teacher={teacher}")
    capsys.readouterr()
    assert main(["export", str(told), "--official", "--out", str(tmp_path / "student.pt")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "guidance scale" in error and not (tmp_path / "student.pt").exists()
    assert main(["export", str(told), "--out", str(tmp_path / "model")]) == 0
    assert load(tmp_path / "model", "cpu").guidance_conditioned
    assert "guidance_embedding.linear.weight" in load_file(tmp_path / "model" / "model.safetensors")
