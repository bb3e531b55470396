"""Fixtures of the chaos tests: codes and a teacher."""

from __future__ import annotations

from tiny_runs import codes, teacher

__all__ = ["codes", "teacher"]
