"""Codes and a teacher for tiny runs; see `tiny_runs`."""

from tiny_runs import codes, scale_codes, teacher

__all__ = ["codes", "scale_codes", "teacher"]
