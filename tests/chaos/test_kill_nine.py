"""Kill -9 at random moments, again and again: what comes out is what an undisturbed job writes, bit by bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tiny_runs import arguments, assert_same_state, log, process, train
from varkd.cli import main
from varkd.train import loop

KILLS = 3


def killed_again_and_again(command: list[str], begun: Path, seed: int) -> None:
    """Run the command, kill it a moment after `begun` stands, go on until it ends by itself after some kills."""
    generator = random.Random(seed)
    for _ in range(KILLS):
        running = process(command)
        while running.poll() is None and not begun.exists():
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.3))
        running.send_signal(signal.SIGKILL)
        running.communicate()
    assert main(command) == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_encode(tmp_path: Path, seed: int):
    options = ["--tokenizer", "pixels", "--shifts", "2", "--flip", "--shard-size", "20", "--device", "cpu"]
    assert main(["encode", "digits", *options, "--out", str(tmp_path / "straight")]) == 0
    command = ["encode", "digits", *options, "--out", str(tmp_path / "killed")]
    killed_again_and_again(command, tmp_path / "killed" / "partial.json", seed)
    left = {name: text for name, text in contents(tmp_path / "killed").items() if not name.endswith(".tmp")}
    assert left == contents(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2])
def test_teach(tmp_path: Path, codes: Path, teacher: Path, seed: int):
    options = ["--data", str(codes), "--top-k", "4", "--shard-size", "10", "--device", "cpu"]
    assert main(["teach", str(teacher), *options, "--out", str(tmp_path / "straight")]) == 0
    command = ["teach", str(teacher), *options, "--out", str(tmp_path / "killed")]
    killed_again_and_again(command, tmp_path / "killed" / "train-00003-logp.npy", seed)
    left = {name: text for name, text in contents(tmp_path / "killed").items() if not name.endswith(".tmp")}
    assert left == contents(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3])
def test_teach_samples(tmp_path: Path, codes: Path, teacher: Path, seed: int):
    options = ["--data", str(codes), "--samples", "600", "--shard-size", "15", "--device", "cpu"]
    assert main(["teach", str(teacher), *options, "--out", str(tmp_path / "straight")]) == 0
    command = ["teach", str(teacher), *options, "--out", str(tmp_path / "killed")]
    killed_again_and_again(command, tmp_path / "killed" / "train-00003.npy", seed)
    left = {name: text for name, text in contents(tmp_path / "killed").items() if not name.endswith(".tmp")}
    assert left == contents(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_train(tmp_path: Path, codes: Path, teacher: Path, seed: int):
    settings = ("method=gkd", f"teacher={teacher}", "train.updates=150", "train.checkpoint_every=5")
    train(tmp_path / "straight", codes, *settings)
    command = arguments(tmp_path / "killed", codes, *settings)
    killed_again_and_again(command, tmp_path / "killed" / "checkpoints" / "selected.json", seed)
    assert_same_state(tmp_path / "killed", tmp_path / "straight", 150)
    assert log(tmp_path / "killed") == log(tmp_path / "straight")


def test_a_gradient_that_is_no_number(tmp_path: Path, codes: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing of the bad update is kept, and the run goes on from before it as if it had not been."""
    train(tmp_path / "straight", codes)
    clip, calls = loop.clip_gradients, []

    def poisoned(*values: object) -> torch.Tensor:
        calls.append(0)
        return torch.tensor(float("nan")) if len(calls) == 5 else clip(*values)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "clip_gradients", poisoned)
        assert main(arguments(tmp_path / "run", codes)) == 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000003"]
    train(tmp_path / "run", codes)
    assert_same_state(tmp_path / "run", tmp_path / "straight", 6)
