"""Checkpoints: complete or absent, never executed, and the disk that fills up while one is written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from tiny_runs import arguments, assert_same_state, checkpoint, stop_after, train
from varkd.cli import main
from varkd.errors import VarkdError
from varkd.train import checkpoint as checkpoints
from varkd.train.checkpoint import Checkpoints, load_tensors
from varkd.world import World


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders that a failed write forgot."""
    return [path.name for path in folder.rglob("*") if ".tmp" in path.name]


@pytest.fixture
def half(tmp_path: Path, codes: Path) -> list[str]:
    """A run whose disk fills up at its second checkpoint; the command that resumes it."""
    return arguments(tmp_path / "run", codes)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ],
    ids=["full", "quota", "safetensors full", "safetensors quota"],
)
def test_a_full_disk_leaves_the_former_checkpoint(
    tmp_path: Path, codes: Path, half: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    failure: Exception,
):  # fmt: skip
    save_file = checkpoints.save_file

    def full(tensors: dict, path: Path) -> None:
        if "step-00000006" in str(path) and path.name == "optimizer.safetensors":
            path.write_bytes(b"half of it")
            raise failure
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        assert main(half) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "varkd: error:" in line]
    assert len(lines) == 1 and "the disk is full" in lines[0]
    assert leftovers(tmp_path / "run") == []
    assert Checkpoints(tmp_path / "run", World(), 2, "last").steps() == [3]
    assert checkpoint(tmp_path / "run", 3)
    assert main(half) == 0
    assert_same_state(tmp_path / "run", train(tmp_path / "whole", codes), 6)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, codes: Path, capsys: pytest.CaptureFixture[str]):
    """At every update a checkpoint, all of them kept: sooner or later one does not fit."""
    command = arguments(small_disk / "run", codes, "train.updates=60", "train.checkpoint_every=1", "train.keep=60")
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("varkd: error: the disk is full while writing ")
    assert leftovers(small_disk) == []
    steps = Checkpoints(small_disk / "run", World(), 60, "last").steps()
    assert 1 < len(steps) < 60 and steps == list(range(1, len(steps) + 1))
    assert all(checkpoint(small_disk / "run", step) for step in steps)
    selected = json.loads((small_disk / "run" / "checkpoints" / "selected.json").read_text())
    assert selected["checkpoint"] == f"step-{steps[-1]:08d}"
    for step in steps[:-1]:  # what a person would do
        for path in (small_disk / "run" / "checkpoints" / f"step-{step:08d}").iterdir():
            path.unlink()
    assert main(command) == 2, "it goes on from there until the disk is full again"
    assert Checkpoints(small_disk / "run", World(), 60, "last").steps()[-1] > steps[-1]


def test_old_checkpoints_go(tmp_path: Path, codes: Path):
    run = train(tmp_path / "run", codes, "train.checkpoint_every=1", "train.keep=2")
    assert Checkpoints(run, World(), 2, "last").steps() == [5, 6]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "selected.json", "step-00000005", "step-00000006"
    ]  # fmt: skip


def test_what_a_killed_process_left_goes(tmp_path: Path, codes: Path):
    left = tmp_path / "run" / "checkpoints" / ".step-00000003.0123abcd.tmp"
    command = arguments(tmp_path / "run", codes)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        assert main(command) == 143
    left.mkdir()
    (left / "student.safetensors").write_bytes(b"half")
    assert main(command) == 0
    assert not left.exists() and leftovers(tmp_path / "run") == []


def test_a_checkpoint_without_its_last_file_does_not_count(tmp_path: Path, codes: Path):
    run = train(tmp_path / "run", codes)
    (run / "checkpoints" / "step-00000006" / "state.json").unlink()
    assert Checkpoints(run, World(), 2, "last").latest() == 3


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", b"PK\x03\x04 not tensors", None])
def test_a_truncated_checkpoint_is_one_line(
    tmp_path: Path, codes: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
):
    run = train(tmp_path / "run", codes, "train.keep=3")
    path = run / "checkpoints" / "step-00000006" / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    capsys.readouterr()
    assert main(arguments(run, codes, "train.keep=3")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("varkd: error: ") and str(path.parent) in line


def test_loading_says_what_is_wrong(tmp_path: Path):
    with pytest.raises(VarkdError, match="no such file"):
        load_tensors(tmp_path / "none.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"garbage that is long enough to hold a header")
    with pytest.raises(VarkdError, match="truncated or not a safetensors file"):
        load_tensors(tmp_path / "a.safetensors")


def test_a_checkpoint_holds_no_teacher_and_no_pickle(tmp_path: Path, codes: Path, teacher: Path):
    run = train(tmp_path / "run", codes, "method=kd", f"teacher={teacher}", "train.updates=2")
    files = sorted(path.name for path in (run / "checkpoints" / "step-00000002").iterdir())
    assert files == [
        "ema.safetensors",
        "method.safetensors",
        "optimizer.safetensors",
        "state.json",
        "student.safetensors",
    ]
    hashes = [json.loads((folder / "environment.json").read_text())["teacher_hash"] for folder in (run, teacher)]
    assert isinstance(hashes[0], str) and hashes[1] is None


def test_the_optimizer_comes_back_whole(tmp_path: Path, codes: Path):
    run = train(tmp_path / "run", codes)
    state = {name: value for name, value in checkpoint(run, 6).items() if name.startswith("optimizer/")}
    weights = [name for name in checkpoint(run, 6) if name.startswith("student/")]
    assert len(state) == 3 * len(weights)
    assert {float(value) for name, value in state.items() if name.endswith("/step")} == {6.0}
    assert all(torch.any(value != 0) for value in state.values())
