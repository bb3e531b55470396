"""`varkd bench`: which cases run, in what time, and how the rows look."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal

from varkd.bench.loss import loss_cases
from varkd.bench.machine import Machine
from varkd.bench.measure import Case, Row, measure
from varkd.bench.official import Checkout
from varkd.bench.rollouts import Bench, rollout_cases
from varkd.bench.sizes import SizeName, sizes_for
from varkd.bench.steps import step_cases
from varkd.errors import VarkdError, did_you_mean
from varkd.files import check_writable, write_json
from varkd.run.data import pick_device

Group = Literal["loss", "rollout", "step"]
GROUPS: tuple[Group, ...] = ("loss", "rollout", "step")
_BUDGET = 100.0
"""Seconds that a bench on CUDA may take by default."""
_SHARES = {"loss": 0.25, "rollout": 0.5, "step": 0.25}
"""Of the budget, by group; what a group leaves is the next one's."""
_CASE_SHARE = 0.03
"""Of the budget: after that long a case is not repeated any more."""


def bench(
    groups: Sequence[str] = GROUPS,
    *,
    device: str = "auto",
    size: SizeName | None = None,
    repeats: int = 3,
    budget: float | None = None,
    llamagen: Path | None = None,
    llamagen_compile: bool = False,
    var: Path | None = None,
    json: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measure, say every row as soon as it is there, and return them all.

    Args:
        size: by default full on CUDA, small on a CPU.
        budget: seconds after which no further case begins (default: 100 on CUDA, none on a CPU).
        llamagen, var: checkouts of the official code, which is imported from there.
        json: file for machine and rows, written anew after every row.

    Raises:
        VarkdError: no such device or checkout, or nothing to do.
    """
    chosen = pick_device(device)
    for group in groups:
        if group not in GROUPS:
            raise VarkdError(f"varkd bench knows no '{group}': {did_you_mean(group, GROUPS)}")
    if repeats < 1:
        raise VarkdError(f"--repeats {repeats}: give at least 1")
    if budget is not None and budget <= 0:
        raise VarkdError(f"--budget {budget:g}: give a number of seconds above 0")
    if llamagen_compile and llamagen is None:
        raise VarkdError("--llamagen-compile compiles the official LlamaGen: give --llamagen PATH too")
    checkouts = (llamagen and Checkout.of_llamagen(llamagen), var and Checkout.of_var(var))
    if json is not None:
        check_writable(json.resolve().parent, "give another --json FILE")
    cuda = chosen.type == "cuda"
    name: SizeName = size or ("full" if cuda else "small")
    limit = budget or (_BUDGET if cuda else float("inf"))
    begun = time.perf_counter()
    sizes = sizes_for(name, chosen)
    machine = Machine.measure(chosen, sizes.copied_bytes, sizes.matrix_side)
    for line in header(machine, name):
        say(line)
    made = Bench(machine, chosen, sizes, checkouts[0], llamagen_compile, checkouts[1])
    rows: list[Row] = []
    ends = _ends(groups, limit)
    for case in _cases(groups, made):
        spent = time.perf_counter() - begun
        late = spent > ends[case.group]
        row = _left_out(case, ends[case.group]) if late else measure(case, chosen, repeats, _CASE_SHARE * limit)
        if not rows or rows[-1].group != row.group:
            say(f"\n{row.group}\n{TITLES}")
        rows.append(row)
        for line in format_row(row):
            say(line)
        if json is not None:
            told = {"size": name, "machine": asdict(machine), "seconds": time.perf_counter() - begun}
            write_json(json, {**told, "rows": [row.as_json() for row in rows]})
    return rows


def _cases(groups: Sequence[str], made: Bench) -> Iterator[Case]:
    by_group: dict[Group, Callable[[], Iterator[Case]]] = {
        "loss": lambda: loss_cases(made.machine, made.device, made.sizes),
        "rollout": lambda: rollout_cases(made),
        "step": lambda: step_cases(made.machine, made.device, made.sizes),
    }
    return chain.from_iterable(by_group[group]() for group in GROUPS if group in groups)


def _ends(groups: Sequence[str], limit: float) -> dict[str, float]:
    """The seconds from the start after which no case of a group begins."""
    present = [group for group in GROUPS if group in groups]
    shares = list(accumulate(_SHARES[group] for group in present))
    return {group: limit * share / shares[-1] for group, share in zip(present, shares, strict=True)}


def _left_out(case: Case, limit: float) -> Row:
    return Row(case.group, case.what, left_out=True, note=f"left out: {limit:.3g} s were over (--budget)")


def header(machine: Machine, size: str) -> list[str]:
    """What the machine can do."""
    rates = (
        f"copies {machine.bandwidth / 1e9:,.0f} GB/s, multiplies {machine.peak_fp32 / 1e12:,.2f} TFLOP/s in fp32, "
        f"{machine.peak_bf16 / 1e12:,.2f} in bf16"
    )
    return [f"{machine.device}, {machine.threads} threads, torch {machine.torch}, size {size}", rates]


_WIDTHS = (48, 11, 20, 11, 7, 9, 9, 7, 11, 7)
_NAMES = ("", "ours", "theirs is", "theirs", "ratio", "memory", "theirs", "ratio", "bound", "x bound")


def _line(cells: Sequence[str]) -> str:
    first, *others = zip(cells, _WIDTHS, strict=True)
    return f"{first[0]:<{first[1]}}" + " ".join(f"{cell:>{width}}" for cell, width in others)


TITLES = _line(_NAMES)


def format_row(row: Row) -> list[str]:
    """A line of the table, and what there is to note below it."""
    cells = (
        row.what,
        _seconds(row.ours_s),
        row.theirs or "-",
        _seconds(row.theirs_s),
        _number(row.time_ratio),
        _memory(row.ours_peak),
        _memory(row.theirs_peak),
        _number(row.peak_ratio),
        _seconds(row.bound_s),
        _number(row.bound_ratio),
    )
    return [_line(cells), *([f"    {row.note}"] if row.note else [])]


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _memory(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}"
