"""Two sides by turns: medians, ratios of them, what a side that fails leaves behind, and peaks of memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from varkd.bench.measure import Case, Problem, Row, Side, Verdict, measure

CPU = torch.device("cpu")


def row_of(problem: Problem, repeats: int = 3, seconds: float = 60.0) -> Row:
    return measure(Case("loss", "a case", lambda: problem), CPU, repeats, seconds)


def side(name: str, run: Callable[[], object]) -> Side:
    return Side(name, lambda: run)


def test_ratios_are_those_of_the_seconds_and_the_bytes():
    row = Row("loss", "x", 2.0, "other", 5.0, ours_peak=100, theirs_peak=250, bound_s=0.5)
    assert (row.time_ratio, row.peak_ratio, row.bound_ratio) == (2.5, 2.5, 4.0)
    told = row.as_json()
    assert (told["time_ratio"], told["peak_ratio"], told["bound_ratio"]) == (2.5, 2.5, 4.0)
    assert Row("loss", "x", 2.0).time_ratio is None and Row("loss", "x", theirs_s=2.0).time_ratio is None


def test_sides_run_by_turns_after_a_warm_up_each():
    order: list[str] = []
    row = row_of(Problem(side("a", lambda: order.append("a")), side("b", lambda: order.append("b"))), repeats=3)
    assert order == ["a", "b", "a", "b", "a", "b", "a", "b"]
    assert row.repeats == 3 and row.theirs == "b" and not row.failed


class Clock:
    """Time that passes only where a run says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def taking(self, *seconds: float) -> Callable[[], object]:
        pauses = iter(seconds)

        def run() -> None:
            self.now += next(pauses)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("varkd.bench.measure.time", clock)
    return clock


def test_the_median_without_the_warm_up_is_told(clock: Clock):
    row = row_of(Problem(side("ours", clock.taking(1.5, 0.5, 4.0, 1.0)), side("theirs", clock.taking(1, 2, 9, 3))))
    assert (row.ours_s, row.theirs_s, row.time_ratio, row.repeats) == (1.0, 3.0, 3.0, 3)


def test_a_long_first_run_counts_on_a_cpu(clock: Clock):
    row = row_of(Problem(side("ours", clock.taking(8.0, 4.0, 3.0)), side("theirs", clock.taking(1.0, 5.0, 6.0, 7.0))))
    assert (row.ours_s, row.theirs_s, row.repeats) == (4.0, 6.0, 3)


def test_a_case_is_not_repeated_for_ever(clock: Clock):
    row = row_of(Problem(side("ours", clock.taking(*[0.25] * 50))), repeats=50, seconds=1.0)
    assert row.repeats == 5  # the fifth begins at 1.0


def broken() -> object:
    raise RuntimeError("it\nbroke.")


@pytest.mark.parametrize("where", ["making", "warm-up", "repeat"])
def test_a_side_that_fails_leaves_the_other_one(where: str):
    def make() -> Callable[[], object]:
        if where == "making":
            raise RuntimeError("it\nbroke.")
        runs = iter([broken] if where == "warm-up" else [int, broken])
        return lambda: next(runs)()

    row = row_of(Problem(side("ours", lambda: 1), Side("theirs", make), verify=lambda a, b: Verdict(a == b, "")))
    assert row.ours_s is not None and row.theirs_s is None and row.time_ratio is None and row.theirs_peak is None
    assert row.note == "theirs: it broke" and row.same is None and not row.failed


def test_ours_may_fail_too_and_so_may_the_problem():
    row = row_of(Problem(side("ours", broken), side("theirs", int)))
    assert row.ours_s is None and row.theirs_s is not None and row.failed and row.note == "ours: it broke"

    def build() -> Problem:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    row = measure(Case("loss", "a case", build), CPU, 1, 1.0)
    assert row.failed and row.note == "out of memory"


def test_what_is_missing_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "trl", None)

    def make() -> Callable[[], object]:
        import trl  # type: ignore[import-not-found]

        return trl.run

    row = row_of(Problem(side("ours", int), Side("TRL", make)))
    assert row.note == "TRL: this needs trl, which is not installed: pip install 'varkd[bench]'"


def test_sides_that_differ_fail_the_row():
    different = row_of(
        Problem(side("ours", lambda: 1), side("theirs", lambda: 2), verify=lambda a, b: Verdict(a == b, f"{a}, {b}"))
    )
    assert different.same is False and different.failed and different.note == "DIFFERENT: 1, 2"
    alike = row_of(
        Problem(side("ours", lambda: 1), side("theirs", lambda: 1), verify=lambda a, b: Verdict(a == b, "both 1"))
    )
    assert alike.same is True and not alike.failed and alike.note == "both 1"


def test_a_share_of_the_peak_is_noted(clock: Clock):
    row = row_of(Problem(side("ours", clock.taking(*[0.5] * 4)), bound_s=0.125, mfu=True))
    assert row.bound_ratio == 4.0 and row.note == "25% of the measured peak (MFU)"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux")
def test_the_peak_is_what_a_run_takes_on_top():
    kept = torch.ones(2**24)  # stands there before

    def run() -> float:
        return float((kept[: 2**23] + 1).sum())  # 32 MiB for a moment

    row = row_of(Problem(side("ours", run), side("theirs", lambda: (run(), torch.ones(2**25).sum())[1])))
    assert row.ours_peak is not None and row.theirs_peak is not None
    assert 31 * 2**20 <= row.ours_peak < 48 * 2**20 and 127 * 2**20 <= row.theirs_peak < 144 * 2**20
