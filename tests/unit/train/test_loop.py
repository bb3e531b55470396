"""The loop: stopping changes nothing, splitting a batch changes nothing, and numbers that are not finite end it."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_runs import (
    FROM_THE_START,
    OTHER_PARTS,
    arguments,
    assert_same_state,
    checkpoint,
    largest_difference,
    log,
    process,
    stop_after,
    train,
)
from varkd.cli import main
from varkd.errors import VarkdError
from varkd.train.loop import TrainConfig
from varkd.train.optim import OptimizerConfig

SLOW_TO_STOP = 60  # seconds; far more than a tiny run takes


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory, codes: Path, teacher: Path) -> Path:
    """Six updates of VarKD in one go."""
    return train(tmp_path_factory.mktemp("loop") / "whole", codes, *FROM_THE_START, f"teacher={teacher}")


def test_the_method_has_a_state_worth_resuming(never_stopped: Path):
    """Else the tests below would pass for lack of anything to lose."""
    state = {name.removeprefix("method/"): value for name, value in checkpoint(never_stopped, 3).items()}
    assert state["rows/replay_row"].tolist() == [0, 2, 4, 6] or len(state["rows/replay_row"]) == 4
    assert set(state["rows/replay_born"].flatten().tolist()) - {-(10**9)} == {0, 2}
    assert state["threshold/student"].shape == (64,) and state["threshold/student"].std() > 0
    lines = [line for line in log(never_stopped) if line["split"] == "train"]
    assert {line["age/student"] for line in lines} > {0.0} and min(line["kept/student"] for line in lines) < 0.9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [3, 4])
def test_resuming_is_as_if_never_stopped(
    never_stopped: Path, tmp_path: Path, codes: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], number: int, step: int,
):  # fmt: skip
    command = arguments(tmp_path / "run", codes, *FROM_THE_START, f"teacher={teacher}")
    with monkeypatch.context() as patch:
        stop_after(patch, step, number)
        assert main(command) == 128 + number
    assert capsys.readouterr().err.splitlines() == [
        f"varkd: stopped at update {step} of 6; run the same command again to resume"
    ]
    assert checkpoint(tmp_path / "run", step)
    assert main(command) == 0
    assert_same_state(tmp_path / "run", never_stopped, 6)
    assert log(tmp_path / "run") == log(never_stopped)


@pytest.fixture(scope="module")
def other_parts(tmp_path_factory: pytest.TempPathFactory, codes: Path, teacher: Path) -> Path:
    """Six updates with the other parts of VarKD, two of which are not logged."""
    return train(tmp_path_factory.mktemp("parts") / "whole", codes, *OTHER_PARTS, f"teacher={teacher}")


def test_the_other_parts_are_at_work(other_parts: Path):
    lines = [line for line in log(other_parts) if line["split"] == "train"]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert {"kept_kl/student", "kept_kl/anchor", "teacher_nll/student", "teacher_surprise/student"} <= set(line)
        assert 0 < line["kept/student"] < 1 and 0 < line["kept_kl/student"] < 1
        assert line["terms/anchor"] > 0 and 0.01 <= line["skew/anchor"] <= 0.1


def test_resuming_the_other_parts_is_as_if_never_stopped(
    other_parts: Path, tmp_path: Path, codes: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
):
    """The reference is made again from the settings, and updates that are audited are the same ones."""
    command = arguments(tmp_path / "run", codes, *OTHER_PARTS, f"teacher={teacher}")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert main(command) == 143
    assert not [name for name in checkpoint(tmp_path / "run", 3) if "reference" in name]
    assert main(command) == 0
    assert_same_state(tmp_path / "run", other_parts, 6)
    assert log(tmp_path / "run") == log(other_parts)


def test_logging_more_often_changes_no_weight(other_parts: Path, tmp_path: Path, codes: Path, teacher: Path):
    often = train(tmp_path / "run", codes, *OTHER_PARTS, f"teacher={teacher}", "train.log_every=1")
    assert_same_state(often, other_parts, 6)


def test_a_guard_rail_speaks_once_a_run(
    tmp_path: Path, codes: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """On the terminal and in the log, after the warm-up, and not again after a resume."""
    none = "method.terms.student.selection={kind: random, quantile: 1, floor: 0}"
    hopeless = (*FROM_THE_START[:-1], none, f"teacher={teacher}")
    command = arguments(tmp_path / "run", codes, *hopeless)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert main(command) == 143
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning at update 3: the selection of term 'student' keeps") == 1
    assert main(command) == 0
    assert "warning" not in capsys.readouterr().err
    warnings = [line for line in log(tmp_path / "run") if line["split"] == "warning"]
    assert [(line["step"], line["rule"]) for line in warnings] == [(3, "kept_kl/student")]
    assert "keeps 0.0% of its divergence" in warnings[0]["text"]


def test_clusters_are_recorded_once_a_run(never_stopped: Path, other_parts: Path):
    about = json.loads((never_stopped / "environment.json").read_text())["clusters"]
    assert list(about) == ["clusters/kmeans-sqrt-seed0"]
    found = about["clusters/kmeans-sqrt-seed0"]
    assert (found["count"], found["smallest"], found["largest"]) == (5, 3, 4) and 0 < found["within_variance"] < 0.1
    assert "clusters" not in json.loads((other_parts / "environment.json").read_text())


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, codes: Path):
    run = train(tmp_path / "run", codes)
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    lines = log(run)
    train(run, codes)
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")} == before
    assert log(run) == lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_was_killed_resumes(
    never_stopped: Path, tmp_path: Path, codes: Path, teacher: Path, number: int
):
    """From outside, at an update that nobody chose: SIGTERM saves first, after SIGKILL the last checkpoint counts."""
    overrides = (*FROM_THE_START, f"teacher={teacher}", "train.updates=600")
    killed = process(arguments(tmp_path / "killed", codes, *overrides))
    _wait_for(lambda: len(_checkpoints(tmp_path / "killed")) > 1, killed)
    killed.send_signal(number)
    _, said = killed.communicate(timeout=SLOW_TO_STOP)
    reached = int(_checkpoints(tmp_path / "killed")[-1].removeprefix("step-"))
    assert 6 <= reached < 600
    if number == signal.SIGTERM:
        assert killed.returncode == 143
        assert said.splitlines()[-1] == (
            f"varkd: stopped at update {reached} of 600; run the same command again to resume"
        )
    else:
        assert killed.returncode == -signal.SIGKILL and reached % 3 == 0
    # 600 updates would take long: both runs end by the same signal at the same update.
    end = reached + 2
    for name in ("killed", "whole"):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, end)
            assert main(arguments(tmp_path / name, codes, *overrides)) == 143
    assert_same_state(tmp_path / "killed", tmp_path / "whole", end)
    assert log(tmp_path / "killed") == log(tmp_path / "whole")


def _checkpoints(run: Path) -> list[str]:
    found = (run / "checkpoints").glob("step-*/state.json") if run.exists() else []
    return sorted(path.parent.name for path in found)


def _wait_for(condition, started) -> None:
    end = time.monotonic() + SLOW_TO_STOP
    while not condition():
        assert started.poll() is None and time.monotonic() < end, started.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("method", ["ce", "kd", "varkd"])
@pytest.mark.parametrize("count", [3, 4])
def test_micro_batches_do_not_change_the_update(tmp_path: Path, codes: Path, teacher: Path, method: str, count: int):
    overrides = FROM_THE_START if method == "varkd" else (f"method={method}",)
    shared = (*overrides, f"teacher={teacher}", "train.updates=3", "train.batch_size=12")
    whole = train(tmp_path / "whole", codes, *shared)
    split = train(tmp_path / "split", codes, *shared, f"train.micro_batches={count}")
    assert largest_difference(whole, split, 3) < 1e-5
    if method == "varkd":
        assert largest_difference(whole, split, 3, "method") < 1e-5
    for one, other in zip(log(whole), log(split), strict=True):
        assert one.pop("split") == other.pop("split")
        assert one == pytest.approx(other, abs=2e-6, rel=2e-6)


def test_micro_batches_in_bf16_stay_close(tmp_path: Path, codes: Path, teacher: Path):
    """bfloat16 has 8 bits: two orders of the same sum differ by some 1 % of a step, and a step moves weights by lr."""
    shared = ("method=kd", f"teacher={teacher}", "train.updates=3", "train.precision=bf16", "train.optim.lr=0.001")
    whole = train(tmp_path / "whole", codes, *shared)
    split = train(tmp_path / "split", codes, *shared, "train.micro_batches=4")
    full = train(tmp_path / "fp32", codes, *shared, "train.precision=fp32")
    moved = largest_difference(whole, split, 3)
    assert moved < 3 * 0.001  # three AdamW steps of at most lr each, had they nothing in common
    losses = [[line["loss"] for line in log(run) if line["split"] == "train"] for run in (whole, split, full)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert losses[0] == pytest.approx(losses[2], abs=1e-2)
    assert losses[0] != losses[2], "autocast did nothing"


def test_a_spike_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, codes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command = arguments(
        tmp_path / "run", codes, "train.updates=8", "train.checkpoint_every=2", "train.validate_every=8"
    )
    with monkeypatch.context() as patch:
        lr_at = OptimizerConfig.lr_at
        patch.setattr(
            OptimizerConfig, "lr_at", lambda self, step, updates: 1e30 if step == 4 else lr_at(self, step, updates)
        )
        assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("varkd: error: the loss is not finite at update 6 (loss ")
    assert "last good checkpoint: update 4" in line and "train.optim.lr" in line
    assert '"failed"' in (tmp_path / "run" / "status.json").read_text()
    assert all(value.isfinite().all() for value in checkpoint(tmp_path / "run", 4).values())
    assert main(command) == 0
    assert_same_state(tmp_path / "run", train(tmp_path / "calm", codes, *command[4:]), 8)


def test_weights_that_blow_up_before_a_checkpoint_do_not_become_one(
    tmp_path: Path, codes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The update that spoils the weights has a finite loss itself: the validation before the checkpoint tells."""
    lr_at = OptimizerConfig.lr_at
    monkeypatch.setattr(
        OptimizerConfig, "lr_at", lambda self, step, updates: math.nan if step == 5 else lr_at(self, step, updates)
    )
    assert main(arguments(tmp_path / "run", codes, "train.updates=9", "train.optim.ema=0")) == 2
    assert "the validation loss is not finite after update 6; last good checkpoint: update 3" in capsys.readouterr().err
    assert _checkpoints(tmp_path / "run") == ["step-00000003"]


def test_the_best_checkpoint_is_selected_and_kept(tmp_path: Path, codes: Path, monkeypatch: pytest.MonkeyPatch):
    from varkd.run import training

    losses = iter([9.0, 3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(training, "cross_entropy", lambda *_: next(losses))
    run = train(
        tmp_path / "run", codes, "train.updates=4", "train.select=best", "train.validate_every=1", "train.keep=1"
    )
    assert '"step-00000002"' in (run / "checkpoints" / "selected.json").read_text()
    assert _checkpoints(run) == ["step-00000002", "step-00000004"]


def test_dropout_resumes_too(tmp_path: Path, codes: Path, monkeypatch: pytest.MonkeyPatch):
    """Dropout draws from the global generator, which the loop seeds as a function of the step."""
    whole = train(tmp_path / "whole", codes, "train.dropout=0.3")
    torch.manual_seed(99)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert main(arguments(tmp_path / "run", codes, "train.dropout=0.3")) == 143
    train(tmp_path / "run", codes, "train.dropout=0.3")
    assert_same_state(whole, tmp_path / "run", 6)
    assert largest_difference(whole, train(tmp_path / "without", codes), 6) > 1e-4


def test_the_evaluated_weights_are_the_average(tmp_path: Path, codes: Path):
    from varkd.run.models import load

    run = train(tmp_path / "run", codes)
    saved = checkpoint(run, 6)
    for name, value in load(run).state_dict().items():
        assert torch.equal(value, saved[f"ema/{name}"])
    assert largest_difference(run, run, 6) == 0
    assert any(not torch.equal(saved[f"ema/{name}"], saved[f"student/{name}"]) for name in load(run).state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates": 0}, "updates must be at least 1"),
        ({"batch_size": 8, "micro_batches": 3}, "must divide into 3"),
        ({"label_drop": 1.5}, "label_drop"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], message: str):
    with pytest.raises(VarkdError, match=message):
        TrainConfig(**settings)  # type: ignore[arg-type]


def test_the_grid_of_samples(tmp_path: Path, codes: Path):
    run = train(tmp_path / "run", codes, "train.updates=2", "train.grid_every=2")
    (picture,) = (run / "samples").iterdir()
    assert picture.name == "step-00000002.png"
    with Image.open(picture) as image:
        shown = np.asarray(image)
    assert len(np.unique(shown)) > 8, "samples, not a blank page"
