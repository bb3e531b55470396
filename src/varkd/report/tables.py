"""Tables as values: columns that know their unit and direction, cells that know their interval and mark.

The HTML page and the terminal print the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Literal

Mark = Literal["", "best", "tied"]
Role = Literal["teacher", "student", "model"]
TERMINAL_WIDTH = 110
_NARROWEST = 8
MISSING = "–"


@dataclass(frozen=True)
class Column:
    """One column: `scale` turns the stored number into the printed unit, `better` says which way is good.

    A "text" column holds words; its cells are sorted by their text.
    """

    key: str
    title: str
    short: str
    meaning: str
    better: Literal["lower", "higher"] | None = None
    scale: float = 1.0
    kind: Literal["real", "whole", "compact", "text"] = "real"

    @property
    def arrow(self) -> str:
        return {"lower": "↓", "higher": "↑", None: ""}[self.better]


@dataclass(frozen=True)
class Cell:
    """A number as printed and as sorted (`value`, None when missing); `interval` is "[low, high]" or ""."""

    text: str = MISSING
    value: float | None = None
    low: float | None = None
    high: float | None = None
    interval: str = ""
    mark: Mark = ""


@dataclass(frozen=True)
class Row:
    """One run: `cells` by the key of their column."""

    name: str
    method: str
    role: Role
    cells: dict[str, Cell]


COLUMNS = (
    Column("num_samples", "Samples N", "N", "generated samples that the run was judged by", kind="whole"),
    Column("parameters", "Parameters", "params", "weights of the model", "lower", kind="compact"),
    Column("updates", "Updates", "steps", "optimizer steps of training", kind="whole"),
    Column("seconds", "Training (s)", "train s", "wall-clock seconds of training", "lower"),
    Column("samples_per_second", "Samples/s", "img/s", "sequences of codes sampled per second", "higher"),
    Column(
        "fd", "FD", "FD",
        "Fréchet distance between the features of the samples and those of the reference images; it falls with N, "
        "so compare equal N only", "lower",
    ),
    Column("precision", "Precision (%)", "prec%", "samples that lie among the reference images", "higher", 100),
    Column("recall", "Recall (%)", "rec%", "reference images that lie among the samples", "higher", 100),
    Column("accuracy", "Accuracy (%)", "acc%", "samples that the feature network takes for their label", "higher", 100),
    Column(
        "class_entropy", "Class entropy", "entr",
        "entropy of the mean predicted class, in nats; at most the logarithm of the number of classes", "higher",
    ),
    Column(
        "nearest", "Nearest", "near",
        "root-mean-square pixel difference (pixels in [0, 1]) to the nearest training image, averaged; neither a low "
        "nor a high value is good in itself",
    ),
    Column(
        "copies", "Copies (%)", "copy%",
        "samples as near to a training image as the nearest 1 % of unseen real images: real images score about 1 %",
        "lower", 100,
    ),
)  # fmt: skip
_PLAIN = frozenset({"num_samples", "parameters", "updates", "seconds", "samples_per_second"})


def comparison_table(metrics: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row per `metrics.json` in the given order, with the best student of every column marked.

    "tied" marks students whose interval overlaps the best one's: N samples do not tell the two apart. Losing
    rows stay; a missing number is a cell without a value.
    """
    rows = []
    for run, role in zip(metrics, roles(metrics), strict=True):
        cells = {}
        for column in COLUMNS:
            plain = {"value": run.get(column.key)}
            number = plain if column.key in _PLAIN else run["metrics"].get(column.key) or {}
            cells[column.key] = make_cell(column, *(number.get(end) for end in ("value", "low", "high")))
        rows.append(Row(run["name"], run["method"], role, cells))
    return mark_best(rows, COLUMNS)


def roles(metrics: Sequence[Mapping[str, Any]]) -> list[Role]:
    """Who taught whom: a run with a teacher is a student; a run that one of them names is the teacher.

    The protocol names the teacher by path. Where no path holds a run's name, the only run without one is it.
    """
    taught_by = [(run.get("protocol") or {}).get("teacher") for run in metrics]
    names = {part for path in taught_by if path for part in PurePath(str(path)).parts}
    alone = [index for index, path in enumerate(taught_by) if path is None]
    named = [index for index in alone if metrics[index]["name"] in names]
    if not named and len(alone) == 1 and len(metrics) > 1:
        named = alone
    return [
        "student" if path is not None else "teacher" if index in named else "model"
        for index, path in enumerate(taught_by)
    ]


def make_cell(column: Column, value: float | None = None, low: float | None = None, high: float | None = None) -> Cell:
    """Print a number as finely as its interval deserves, else to three significant digits."""
    if value is None or not math.isfinite(value):
        return Cell()
    if column.kind != "real":
        return Cell(f"{value:,.0f}" if column.kind == "whole" else compact(value), value)
    if low is None or high is None:
        return Cell(significant(value * column.scale), value)
    half = column.scale * (high - low) / 2
    decimals = _decimals(half, 2 if f"{half:e}"[0] in "12" else 1) if half > 0 else 3
    text, start, end = (f"{number * column.scale:,.{decimals}f}" for number in (value, low, high))
    return Cell(text, value, low, high, f"[{start}, {end}]")


def significant(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits, never in powers of ten: 12.345 -> "12.3", 1234.5 -> "1,234"."""
    return f"{value:,.{_decimals(value, digits) if value else digits - 1}f}"


def compact(value: float) -> str:
    """A count to three significant digits: 213,400 -> "213 k"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{significant(value / size)} {unit}"
    return f"{value:,.0f}"


def _decimals(value: float, digits: int) -> int:
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    return min(4, max(0, digits - 1 - exponent))


def mark_best(rows: Sequence[Row], columns: Sequence[Column]) -> list[Row]:
    """Mark the best of the competitors, column by column, where the printed numbers differ."""
    rows, names = list(rows), {row.name for row in competitors(rows)}
    for column in columns:
        rivals = [
            index for index, row in enumerate(rows) if row.name in names and row.cells[column.key].value is not None
        ]
        cells = {index: rows[index].cells[column.key] for index in rivals}
        if column.better is None or len({cell.text for cell in cells.values()}) < 2:
            continue
        choose = min if column.better == "lower" else max
        best = choose(cells.values(), key=lambda cell: cell.value or 0.0)
        for index, cell in cells.items():
            mark: Mark = "best" if cell.text == best.text else "tied" if _overlap(cell, best) else ""
            rows[index] = replace(rows[index], cells=rows[index].cells | {column.key: replace(cell, mark=mark)})
    return rows


def competitors(rows: Sequence[Row]) -> list[Row]:
    """The rows that are compared for the best: the students, or without any all rows but the teacher's."""
    students = [row for row in rows if row.role == "student"]
    return students or [row for row in rows if row.role != "teacher"]


def _overlap(a: Cell, b: Cell) -> bool:
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.low <= b.high and b.low <= a.high


def format_text_table(rows: Sequence[Row]) -> str:
    """The rows for a terminal, aligned, at most 110 characters wide, with a legend below."""
    used = [column for column in COLUMNS if any(row.cells[column.key].value is not None for row in rows)]
    counts = {row.cells["num_samples"].text for row in rows}
    if len(counts) == 1:
        used = [column for column in used if column.key != "num_samples"]
    numbers = [[_terminal_text(row.cells[column.key], column) for column in used] for row in rows]
    table = [["run", "method", *(f"{column.short}{column.arrow}" for column in used)]]
    table += [[row.name, row.method, *cells] for row, cells in zip(rows, numbers, strict=True)]
    return "\n".join([*aligned(table), *_legend(rows, counts)])


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a terminal table: two columns of text on the left, numbers on the right, a rule below the header."""
    widths = _fit([max(len(line[index]) for line in table) for index in range(len(table[0]))])
    lines = [_line(line, widths) for line in table]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _terminal_text(cell: Cell, column: Column) -> str:
    interval = f" {cell.interval}" if column.key == "fd" and cell.interval else ""
    return cell.text + interval + {"": "", "best": "*", "tied": "~"}[cell.mark]


def _fit(widths: list[int]) -> list[int]:
    """Take the characters that are too many from the two text columns, the wider one first."""
    widths = list(widths)
    while sum(widths) + len(widths) - 1 > TERMINAL_WIDTH and max(widths[:2]) > _NARROWEST:
        widths[0 if widths[0] >= widths[1] else 1] -= 1
    return widths


def _line(cells: Sequence[str], widths: list[int]) -> str:
    texts = [
        cell if len(cell) <= width else f"{cell[: width - 1]}…"
        for cell, width in zip(cells[:2], widths[:2], strict=True)
    ]
    left = [text.ljust(width) for text, width in zip(texts, widths[:2], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return " ".join(left + right).rstrip()


def _legend(rows: Sequence[Row], counts: set[str]) -> list[str]:
    lines = []
    if len(counts) == 1 and rows:
        lines.append(f"N = {next(iter(counts))} samples for every run. ↓ lower is better, ↑ higher is better.")
    else:
        lines.append("Runs were judged by different N: compare with care. ↓ lower is better, ↑ higher is better.")
    marks = {cell.mark for row in rows for cell in row.cells.values()}
    if "best" in marks:
        best = "* best student" if any(row.role == "student" for row in rows) else "* best run"
        lines.append(best + (", ~ its interval overlaps the best one's" if "tied" in marks else ""))
    return lines
