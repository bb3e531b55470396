"""Going on with a run: by one process at a time, longer than planned, past a checkpoint that is damaged or gone."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mistakes import Refused, snapshot

from tiny_runs import arguments, assert_same_state, checkpoint, log, process, train
from varkd.backbones.store import load_backbone
from varkd.errors import VarkdError
from varkd.folders import LOCK, locked

CONSTANT = ("train.optim.min_lr_ratio=1", "train.checkpoint_every=3", "train.keep=9")


# -- one process at a time ------------------------------------------------------------------------------------------


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.is_file():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


def test_a_second_process_is_refused_and_a_killed_one_holds_nothing(tmp_path: Path, codes: Path, refused: Refused):
    long = arguments(tmp_path / "run", codes, "train.updates=100000", "train.keep=3")
    first = process(long)
    try:
        wait_for(tmp_path / "run" / "checkpoints" / "selected.json")
        line = refused(long, f"process {first.pid} on {platform.node()} is at work", str(tmp_path / "run"))
        assert "choose another" in line
        anew = refused([*long, "--overwrite"], "is at work")
        assert anew and (tmp_path / "run" / "log.jsonl").is_file(), "nothing was emptied"
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (tmp_path / "run" / LOCK).is_file(), "it could not clean up"
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    second = process([*long, f"train.updates={100000 + 1}"])
    try:
        wait_for(tmp_path / "run" / "checkpoints" / f"step-{steps[-1] + 9:08}" / "state.json")
    finally:
        second.send_signal(signal.SIGKILL)
        second.wait()


def test_a_lock_is_for_the_block_and_for_one(tmp_path: Path):
    with locked(tmp_path / "run"):
        with pytest.raises(VarkdError, match=f"process {os.getpid()} on"), locked(tmp_path / "run"):
            pass
        assert json.loads((tmp_path / "run" / LOCK).read_text())["host"] == platform.node()
    assert not (tmp_path / "run" / LOCK).exists()
    with locked(tmp_path / "run"):
        pass


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that knows none."""
    import errno
    import fcntl

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize(
    ("holder", "free"),
    [
        ({}, True),
        ({"host": platform.node(), "pid": 2**22 + 1, "begun": "1"}, True),
        ({"host": platform.node(), "pid": os.getpid(), "begun": "1"}, True),  # the number was given out again
        ({"host": "elsewhere", "pid": 1, "begun": "1"}, False),
        ("own", False),
    ],
)
def test_without_locks_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder, free: bool):
    without_locks(monkeypatch)
    if holder == "own":
        with locked(tmp_path), pytest.raises(VarkdError, match="is at work"), locked(tmp_path):
            pass
        return
    (tmp_path / LOCK).write_text(json.dumps(holder))
    if free:
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    else:
        with pytest.raises(VarkdError, match="process 1 on elsewhere is at work"), locked(tmp_path):
            pass


def test_many_take_turns(tmp_path: Path):
    """Twelve processes count in one file; without a lock, or with a lock that two get, counts are lost."""
    program = """
import sys, time
from pathlib import Path
from varkd.errors import VarkdError
from varkd.folders import locked
folder, done = Path(sys.argv[1]), 0
while done < 20:
    try:
        with locked(folder):
            count = int((folder / "count").read_text())
            time.sleep(0.001)
            (folder / "count").write_text(str(count + 1))
            done += 1
    except VarkdError:
        time.sleep(0.002)
"""
    (tmp_path / "count").write_text("0")
    running = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(4)]
    assert [each.wait() for each in running] == [0] * 4
    assert (tmp_path / "count").read_text() == "80"


# -- longer, and with other settings that change no number -------------------------------------------------------------


def test_a_longer_run_without_schedules_is_the_run_from_the_start(
    tmp_path: Path, codes: Path, capfd: pytest.CaptureFixture[str]
):
    train(tmp_path / "straight", codes, *CONSTANT, "train.updates=12")
    run = train(tmp_path / "run", codes, *CONSTANT)
    capfd.readouterr()
    train(run, codes, *CONSTANT, "train.updates=12")
    assert "no schedule depends on it" in " ".join(capfd.readouterr().err.split())
    assert_same_state(run, tmp_path / "straight", 12)
    assert log(run) == log(tmp_path / "straight")


def test_schedules_say_what_a_longer_run_means(tmp_path: Path, codes: Path, capfd: pytest.CaptureFixture[str]):
    run = train(tmp_path / "run", codes, "train.keep=9")
    before = checkpoint(run, 6)
    capfd.readouterr()
    train(run, codes, "train.keep=9", "train.updates=12")
    said = " ".join(capfd.readouterr().err.split())
    assert "train.updates 6 -> 12" in said and "the learning rate goes from" in said and "not a run of 12" in said
    assert all(torch.equal(value, checkpoint(run, 6)[name]) for name, value in before.items())
    rates = {line["step"]: line["lr"] for line in log(run) if line["split"] == "train"}
    assert rates[7] > rates[6] and rates[12] == min(rates[step] for step in range(7, 13))


def test_a_shorter_run_is_another_run(tmp_path: Path, codes: Path, refused: Refused):
    run = train(tmp_path / "run", codes)
    refused(arguments(run, codes, "train.updates=3"), "train.updates: 6 -> 3", untouched=run)


@pytest.mark.parametrize("setting", [
    "train.keep=1", "train.log_every=2", "train.checkpoint_every=2", "train.grid_every=3", "evaluation.num_samples=9",
    "evaluation.sampler.temperature=0.5", "name=other",
])  # fmt: skip
def test_settings_that_change_no_number_do_not_block(tmp_path: Path, codes: Path, setting: str):
    train(tmp_path / "straight", codes, "train.updates=12", *CONSTANT[:1])
    run = train(tmp_path / "run", codes, *CONSTANT[:1])
    train(run, codes, *CONSTANT[:1], "train.updates=12", setting)
    assert_same_state(run, tmp_path / "straight", 12)


@pytest.mark.parametrize("setting", ["train.validate_every=2", "train.batch_size=4", "seed=3", "train.select=best"])
def test_settings_that_change_numbers_block(tmp_path: Path, codes: Path, refused: Refused, setting: str):
    run = train(tmp_path / "run", codes, "train.updates=1")
    refused(arguments(run, codes, "train.updates=1", setting), setting.split("=")[0], untouched=run)


# -- damaged checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["student", "ema", "optimizer"])
@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_obeying_the_message_helps(tmp_path: Path, codes: Path, refused: Refused, name: str, damage: str):
    run = train(tmp_path / "run", codes, "train.keep=3")
    train(tmp_path / "straight", codes, "train.keep=3")
    newest = run / "checkpoints" / "step-00000006"
    path = newest / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content[:-7] if damage == "cut" else content)
    before = snapshot(run)
    line = refused(arguments(run, codes, "train.keep=3", "train.updates=9"), str(path), f"move {newest} away")
    assert "delete" not in line and snapshot(run) == before, "the refused command has not made it a run of nine"
    shutil.move(newest, tmp_path / "aside")
    refused(["sample", run, "--out", tmp_path / "out"], "is gone", "run the same `varkd train` again")
    train(run, codes, "train.keep=3")
    assert_same_state(run, tmp_path / "straight", 6)
    load_backbone(run)


def test_a_best_checkpoint_that_is_gone(tmp_path: Path, codes: Path):
    best = ("train.select=best", "train.keep=1", "train.updates=9", "train.optim.min_lr_ratio=1")
    run = train(tmp_path / "run", codes, *best)
    state = json.loads((run / "checkpoints" / "step-00000009" / "state.json").read_text())
    state |= {"best_step": 3, "best_value": 0.0}
    (run / "checkpoints" / "step-00000009" / "state.json").write_text(json.dumps(state))
    shutil.rmtree(run / "checkpoints" / "step-00000003", ignore_errors=True)
    train(run, codes, *best[:2], best[3], "train.updates=12")
    chosen = json.loads((run / "checkpoints" / "selected.json").read_text())["checkpoint"]
    assert chosen == "step-00000012" and load_backbone(run)


def test_a_flipped_bit_in_a_teacher(tmp_path: Path, codes: Path, teacher: Path, refused: Refused):
    own = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    (path,) = own.glob("checkpoints/*/ema.safetensors")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    refused(arguments(tmp_path / "run", codes, "method=kd", f"teacher={own}"), "its hash differs", untouched=tmp_path)
