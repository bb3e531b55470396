"""Progress bars with an ETA for people, and a line now and then for log files."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
_LINE_EVERY_SECONDS = 10.0

console = Console(stderr=True, highlight=False)


class Bar(Protocol):
    """What a running task reports to."""

    def update(self, done: int, note: str = "") -> None: ...


@contextmanager
def bar(description: str, total: int, quiet: bool = False) -> Iterator[Bar]:
    """A live bar on a terminal; plain lines (at most one in ten seconds) elsewhere; nothing when `quiet`."""
    if quiet:
        yield _Quiet()
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(description, total=total, note="")
            yield _Live(progress, task)
    else:
        yield _Lines(description, total)


def track(items: Iterable[T], description: str, total: int, quiet: bool = False) -> Iterator[T]:
    """Iterate `items` behind a `bar`."""
    with bar(description, total, quiet) as running:
        for done, item in enumerate(items, 1):
            yield item
            running.update(done)


class _Quiet:
    def update(self, done: int, note: str = "") -> None:
        del done, note


class _Live:
    def __init__(self, progress: Progress, task) -> None:
        self.progress, self.task = progress, task

    def update(self, done: int, note: str = "") -> None:
        self.progress.update(self.task, completed=done, note=note)


class _Lines:
    def __init__(self, description: str, total: int) -> None:
        self.description, self.total = description, total
        self.begun = self.last = time.monotonic()
        self.first: int | None = None

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done - 1
        if now - self.last < _LINE_EVERY_SECONDS and done < self.total:
            return
        self.last = now
        left = (now - self.begun) / max(1, done - self.first) * (self.total - done)
        eta = "done" if done >= self.total else f"ETA {left:.0f} s"
        console.print(f"{self.description} {done}/{self.total} {now - self.begun:.0f} s {eta} {note}".rstrip())
