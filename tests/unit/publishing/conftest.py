"""Runs to publish: the digits as pixel codes, a teacher, a student that was evaluated for a moment."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import codes, quicken, teacher, train
from varkd.cli import main

__all__ = ["codes", "teacher"]


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory, codes: Path, teacher: Path) -> Path:
    """A student of a teacher, with its numbers."""
    run = tmp_path_factory.mktemp("evaluated") / "small-student"
    train(run, codes, "method=kd", f"teacher={teacher}", f"init={teacher}", "evaluation.sampler.temperature=0.8",
          "evaluation.sampler.guidance=1.5")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        assert main(["evaluate", str(run), "--features", str(run.parent / "features"), "--device", "cpu"]) == 0
    return run


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    """A copy that a test may change; its codes and teacher are found where they were."""
    copy = evaluated.parent / tmp_path.name / evaluated.name
    shutil.copytree(evaluated, copy)
    return copy


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model folder and its tokenizer beside it."""
    tokenizer = tiny_tokenizer("llamagen")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tiny_model("llamagen", tokenizer).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"
