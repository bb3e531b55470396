"""Codes and a teacher for tiny runs; see `tiny_runs`."""

from tiny_runs import codes, teacher

__all__ = ["codes", "teacher"]
