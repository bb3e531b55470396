"""`log.jsonl`: strict JSON lines, cut back on resume to what the checkpoint knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from varkd.errors import VarkdError
from varkd.train.log import Log
from varkd.world import World


def write(folder: Path, steps: range, resume: int = 0, world: World | None = None, tensorboard: bool = False) -> None:
    log = Log(folder, world or World(), resume or None, ("tensorboard",) if tensorboard else ())
    for step in steps:
        log.write("train", step, {"loss": 1.0 / (step + 1)})
    log.close()


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_lines_are_appended_and_cut_on_resume(tmp_path: Path):
    write(tmp_path, range(6))
    write(tmp_path, range(4, 6), resume=3)
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_the_half_line_of_a_killed_run_is_dropped(tmp_path: Path):
    write(tmp_path, range(3))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"split": "train", "st')
    write(tmp_path, range(3, 5), resume=2)
    assert steps(tmp_path) == [0, 1, 2, 3, 4]


def test_lines_that_are_no_records_are_dropped(tmp_path: Path):
    (tmp_path / "log.jsonl").write_text('3\n[]\n{"step": "x"}\n{"step": 1}\n')
    write(tmp_path, range(2, 3), resume=1)
    assert steps(tmp_path) == [1, 2]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path):
    log = Log(tmp_path, World(), None)
    log.write("train", 1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 1.0})
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {
        "split": "train", "step": 1, "loss": None, "grad_norm": None, "lr": 1.0
    }  # fmt: skip


def test_a_warning_is_written_once_also_over_a_resume(tmp_path: Path):
    log = Log(tmp_path, World(), None)
    assert log.warn(2, "kept_kl/student", "few count") and not log.warn(3, "kept_kl/student", "fewer count")
    assert log.warn(4, "kept_kl/kd", "nothing to learn")
    again = Log(tmp_path, World(), 3)
    assert not again.warn(4, "kept_kl/student", "few count"), "it was said at a step that was kept"
    assert again.warn(4, "kept_kl/kd", "nothing to learn"), "that line was cut, so it is said again"
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [
        {"split": "warning", "step": 2, "rule": "kept_kl/student", "text": "few count"},
        {"split": "warning", "step": 4, "rule": "kept_kl/kd", "text": "nothing to learn"},
    ]
    assert not Log(tmp_path, World(rank=1, size=2), None).warn(1, "x", "y")


def test_only_the_first_rank_writes(tmp_path: Path):
    write(tmp_path, range(3), world=World(rank=1, size=2), tensorboard=True)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_holds_the_same_numbers(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(4), tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx({step: 1 / (step + 1) for step in range(4)}, rel=1e-6)


def test_an_unwritable_log_is_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    log = Log(tmp_path / "file", World(), None)
    with pytest.raises(VarkdError, match="cannot write"):
        log.write("train", 1, {"loss": 1.0})
