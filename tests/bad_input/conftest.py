"""Fixtures of the tests of bad input: codes, a teacher, and a command that must be refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from mistakes import Refused, snapshot

from tiny_runs import codes, scale_codes, teacher
from varkd.cli import main

__all__ = ["codes", "scale_codes", "teacher"]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the library's copies of parquet files out of the user's cache."""
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must be refused by one line holding all `words`; `untouched` must be as it was."""

    def run(command: list[object], *words: str, untouched: Path | None = None) -> str:
        before = snapshot(untouched) if untouched else {}
        capfd.readouterr()
        code = main([str(part) for part in command])
        captured = capfd.readouterr()
        lines = captured.err.splitlines()
        assert code == 2, captured
        assert len(lines) == 1 and lines[0].startswith("varkd: error: "), captured.err
        assert captured.out == ""
        assert [word for word in words if word not in lines[0]] == [], lines[0]
        if untouched:
            assert snapshot(untouched) == before
        return lines[0]

    return run
