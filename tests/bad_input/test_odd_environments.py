"""Homes, terminals, seeds and process groups that are not what is expected: right, or refused by one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mistakes import Refused

from tiny_runs import arguments, train
from varkd.cli import main
from varkd.config import load_run
from varkd.errors import VarkdError
from varkd.folders import expand
from varkd.world import World


def test_a_tilde_is_the_home_folder(tmp_path: Path, codes: Path, monkeypatch: pytest.MonkeyPatch):
    """Shells expand `--out ~/x`, but neither `out=~/x` nor what a recipe says."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "codes").symlink_to(codes)
    monkeypatch.chdir(tmp_path)
    assert main([*arguments(Path("~/run"), Path("~/codes"), "train.updates=1")]) == 0
    assert main(["sample", "~/run", "--num", "4", "--device", "cpu", "--out", "~/samples"]) == 0
    assert main(["encode", "digits", "--tokenizer", "~/codes/tokenizer", "--out", "~/again", "--device", "cpu"]) == 0
    assert not (tmp_path / "~").exists() and (tmp_path / "samples" / "grid.png").is_file()
    (tmp_path / "recipe.yaml").write_text("data: ~/codes\nteacher: ~/run\n")
    run = load_run(tmp_path / "recipe.yaml")
    assert (run.data, run.teacher) == (str(tmp_path / "codes"), str(tmp_path / "run"))
    assert expand("~nobody-of-this-name/x") == "~nobody-of-this-name/x"


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**30])
def test_seeds_that_no_generator_takes(tmp_path: Path, codes: Path, teacher: Path, refused: Refused, seed: int):
    refused(["sample", teacher, "--out", tmp_path / "out", "--seed", seed], "--seed", "too large", untouched=tmp_path)
    refused(arguments(tmp_path / "run", codes, f"seed={seed}"), f"seed={seed}", "too large", untouched=tmp_path)
    refused(arguments(tmp_path / "run", codes, f"evaluation.seed={seed}"), "evaluation.seed", untouched=tmp_path)


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_the_largest_seeds(tmp_path: Path, codes: Path, seed: int):
    run = train(tmp_path / "run", codes, "train.updates=1", f"seed={seed}")
    assert (
        main(["sample", str(run), "--num", "2", "--device", "cpu", "--out", str(tmp_path / "s"), f"--seed={seed}"]) == 0
    )


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "without RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "without MASTER_ADDR"),
        ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK=x"),
    ],
)
def test_half_a_process_group(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(VarkdError, match=said) as caught:
        World.from_environment()
    assert "torchrun" in str(caught.value)


def test_half_a_process_group_is_one_line(tmp_path: Path, codes: Path):
    command = [sys.executable, "-m", "varkd", *arguments(tmp_path / "run", codes)]
    ended = subprocess.run(command, env={**os.environ, "WORLD_SIZE": "2"}, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "torchrun" in ended.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_our_signs(encoding: str, tmp_path: Path, codes: Path):
    command = [sys.executable, "-m", "varkd", "methods"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    ended = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert ended.returncode == 0 and b"Traceback" not in ended.stderr
    run = train(tmp_path / "läuft→", codes, "train.updates=1")
    command = [sys.executable, "-m", "varkd", "sample", str(run), "--num", "2", "--out", str(tmp_path / "→"),
               "--device", "cpu"]  # fmt: skip
    ended = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert ended.returncode == 0 and b"\\u2192" in ended.stdout, ended.stderr
