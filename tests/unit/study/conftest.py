"""Codes and a teacher for tiny studies; the judge looks for a moment only."""

from __future__ import annotations

import pytest

from tiny_runs import codes, quicken, teacher

__all__ = ["codes", "teacher"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)
