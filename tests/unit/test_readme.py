"""The README's library example runs as it stands, and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from varkd.cli import parser
from varkd.demo import demo

README = Path(__file__).parents[2] / "README.md"
TINY = (
    "train.updates=3", "train.batch_size=8", "train.validate_every=3", "train.checkpoint_every=3",
    "train.optim.warmup=1", "model.num_layers=1", "model.dim=16", "model.num_heads=2",
    "evaluation.num_samples=20", "evaluation.resamples=5",
)  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_library_example_is_short_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    assert len(code.strip().splitlines()) <= 24
    monkeypatch.chdir(tmp_path)
    demo(Path("runs/demo"), overrides=TINY)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs/my-student/model.safetensors").is_file()


def test_every_varkd_command_of_the_readme_parses() -> None:
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("varkd ")]
    assert len(commands) >= 8
    for command in commands:
        parser().parse_args(shlex.split(command)[1:])
