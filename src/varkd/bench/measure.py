"""Two sides of one problem, measured by turns: medians of seconds, peaks of memory, and what became of each side.

Memory is what a run takes on top of what stood before it (weights, inputs): the allocator's peak on CUDA, the growth of
the resident set on Linux (None elsewhere). The highest of all runs counts, for a cache that stays is paid for once.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from varkd.errors import missing_extra

_WARM_UPS = {"cuda": 2}
"""Runs before the ones that count: on CUDA a decode is captured on its second use (`varkd.graphs`). Elsewhere one."""
_WARM_SECONDS = 2.0
"""On a CPU a first run that took longer counts as a repeat: what is loaded on first use no longer shows in it."""

Run = Callable[[], Any]


@dataclass(frozen=True)
class Side:
    """`make` builds what a run needs and returns the run; it may fail, and then only this side is missing."""

    name: str
    make: Callable[[], Run]


@dataclass(frozen=True)
class Verdict:
    """Whether both sides computed the same, and what was compared."""

    same: bool
    text: str


@dataclass(frozen=True)
class Problem:
    """What is measured. `verify` gets the last result of each side.

    `bound_s` is the shortest time that the machine's bandwidth and arithmetic allow; with `mfu` it is all FLOPs, and
    the share of the peak that a run reaches is noted.
    """

    ours: Side
    theirs: Side | None = None
    bound_s: float | None = None
    mfu: bool = False
    verify: Callable[[Any, Any], Verdict] | None = None


@dataclass(frozen=True)
class Case:
    """A problem that is not built yet, so that only one stands in memory."""

    group: str
    what: str
    build: Callable[[], Problem]


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds, bytes, and ratios of them. What could not be measured is None; `note` says why.

    Ratios of time and memory are theirs / ours (above 1: ours is faster or smaller), `bound_ratio` is ours / bound (1
    is the best that this machine can do).
    """

    group: str
    what: str
    ours_s: float | None = None
    theirs: str | None = None
    theirs_s: float | None = None
    ours_peak: int | None = None
    theirs_peak: int | None = None
    bound_s: float | None = None
    repeats: int = 0
    same: bool | None = None
    left_out: bool = False
    note: str = ""

    @property
    def time_ratio(self) -> float | None:
        return _ratio(self.theirs_s, self.ours_s)

    @property
    def peak_ratio(self) -> float | None:
        return _ratio(self.theirs_peak, self.ours_peak)

    @property
    def bound_ratio(self) -> float | None:
        return _ratio(self.ours_s, self.bound_s)

    @property
    def failed(self) -> bool:
        """Ours did not run, or the two sides differ."""
        return (self.ours_s is None and not self.left_out) or self.same is False

    def as_json(self) -> dict[str, Any]:
        ratios = {name: getattr(self, name) for name in ("time_ratio", "peak_ratio", "bound_ratio")}
        return {**asdict(self), **ratios}


def measure(case: Case, device: torch.device, repeats: int, seconds: float) -> Row:
    """Build a case and run its sides by turns, `repeats` times each, or fewer where that takes over `seconds`."""
    try:
        problem = case.build()
    except Exception as error:
        return Row(case.group, case.what, note=reason(error))
    sides = [side for side in (problem.ours, problem.theirs) if side is not None]
    trials = [_Trial(side, device) for side in sides]
    for trial in trials:
        trial.warm_up()
    begun = time.perf_counter()
    for done in range(repeats):
        if done and time.perf_counter() - begun > seconds:
            break
        for trial in trials:
            trial.repeat(done)
    ours, theirs = trials[0], trials[1] if len(trials) > 1 else None
    row = _row(case, problem, ours, theirs)
    del problem, trials, ours, theirs
    tidy(device)
    return row


def _row(case: Case, problem: Problem, ours: _Trial, theirs: _Trial | None) -> Row:
    notes = [f"{trial.side.name}: {trial.failure}" for trial in (ours, theirs) if trial is not None and trial.failure]
    same = None
    if problem.verify is not None and theirs is not None and not notes:
        try:
            verdict = problem.verify(ours.result, theirs.result)
            same = verdict.same
            notes.append(verdict.text if same else f"DIFFERENT: {verdict.text}")
        except Exception as error:
            notes.append(f"not compared: {reason(error)}")
    if problem.mfu and ours.median and problem.bound_s:
        notes.append(f"{problem.bound_s / ours.median:.0%} of the measured peak (MFU)")
    return Row(
        case.group,
        case.what,
        ours_s=ours.median,
        theirs=theirs.side.name if theirs else None,
        theirs_s=theirs.median if theirs else None,
        ours_peak=ours.peak,
        theirs_peak=theirs.peak if theirs else None,
        bound_s=problem.bound_s,
        repeats=len(ours.seconds),
        same=same,
        note="; ".join(notes),
    )


class _Trial:
    """The runs of one side. A side that has failed is not run again."""

    def __init__(self, side: Side, device: torch.device) -> None:
        self.side, self.device = side, device
        self.seconds: list[float] = []
        self.peak: int | None = None
        self.failure = ""
        self.result: Any = None
        self.run: Run | None = None
        self.early = False

    def warm_up(self) -> None:
        def first() -> None:
            self.run = run = self.side.make()
            taken = [self._timed(run) for _ in range(_WARM_UPS.get(self.device.type, 1))]
            self.early = self.device.type == "cpu" and taken[0] > _WARM_SECONDS
            if self.early:
                self.seconds.append(taken[0])

        self._attempt(first)

    def repeat(self, index: int) -> None:
        if index == 0 and self.early:
            return  # its warm-up was the first repeat
        run = self.run
        if run is not None and not self.failure:
            self._attempt(lambda: self.seconds.append(self._timed(run)))

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds and not self.failure else None

    def _timed(self, run: Run) -> float:
        self.result = None
        before = _begin_peak(self.device)
        _wait(self.device)
        begun = time.perf_counter()
        self.result = run()
        _wait(self.device)
        taken = time.perf_counter() - begun
        if before is not None:
            self.peak = max(self.peak or 0, _peak(self.device) - before)
        return taken

    def _attempt(self, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:  # whatever the other code raises: the rest of the table goes on
            self.failure, self.run, self.peak = reason(error), None, None
        if self.failure:
            tidy(self.device)


def reason(error: Exception) -> str:
    """One line for a person."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return missing_extra(error) or f"needs the package {error.name}, which is not installed: pip install it"
    text = " ".join(str(error).split())
    return (text[:200] if text else type(error).__name__).rstrip(".")


def tidy(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _begin_peak(device: torch.device) -> int | None:
    """Forget the peak so far; the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        return None
    _trim()
    forget.write_text("5")
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _trim() -> None:
    """Let the C library hand freed pages back (glibc), else the next run reuses them and seems to take nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None
