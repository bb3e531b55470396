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


GUIDES = (README, *sorted((README.parent / "docs").glob("*.md")))


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_library_example_is_short_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    assert len(code.strip().splitlines()) <= 24
    monkeypatch.chdir(tmp_path)
    demo(Path("runs/demo"), overrides=TINY)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs/my-student/model.safetensors").is_file()


def test_the_readme_is_for_a_minute() -> None:
    assert len(README.read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", GUIDES, ids=lambda path: path.stem)
def test_every_varkd_command_parses(page: Path) -> None:
    """Of the README and of every page."""
    text = "\n".join(blocks("sh", page)).replace("\\\n", " ")
    for line in text.splitlines():
        _, found, command = line.partition("varkd ")
        if found and line.startswith(("varkd ", "torchrun ", "python -m varkd ")):
            words = shlex.split(command, comments=True)
            words = [word for word in words if word != "..." and not word.startswith("[")]
            parser().parse_args(words)
