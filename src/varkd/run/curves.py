"""From (N, L) values to rows of CSV files: means by position, differences between contexts, maps, calibration."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from varkd.evaluate.calibration import calibration, expected_error
from varkd.evaluate.diagnostics import Values
from varkd.evaluate.exposure import accumulated, difference, excess_accumulated
from varkd.evaluate.intervals import Curve, mean_curve
from varkd.files import write_text

Cell = str | int | float | None
TABLES = ("positions", "maps", "accumulated", "calibration", "prefix_swap", "risks", "cost", "selection",
          "selection_training")  # fmt: skip
PAIRS = (("student", "data"), ("student", "teacher"), ("teacher", "data"))


@dataclass(frozen=True)
class Table:
    """One CSV file."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def write_tables(out: Path, tables: Mapping[str, Table]) -> None:
    """`out`/<name>.csv for each table; numbers in six digits, None is empty. Former tables (`TABLES`) of `out` go."""
    for name, table in tables.items():
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows([_text(cell) for cell in row] for row in table.rows)
        write_text(out / f"{name}.csv", buffer.getvalue())
    for name in set(TABLES) - set(tables):
        (out / f"{name}.csv").unlink(missing_ok=True)


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)


def positions(values: Mapping[str, Values], scale_sizes: Sequence[int] | None, seed: int) -> Table:
    """Every quantity under every context, and its differences between contexts, each with its interval.

    `values` are by generation rank. The axis `rank` counts codes from 1 in the order of generation, `scale` the maps of
    a next-scale model; `all` is the mean over all positions.
    """
    columns = ("context", "quantity", "axis", "position", "value", "low", "high", "num")
    rows: list[tuple[Cell, ...]] = []
    for context, found in values.items():
        for quantity, value_NL in found.items():
            for axis, parts_NP in _axes(value_NL, scale_sizes):
                rows += _rows(context, quantity, axis, mean_curve(parts_NP, seed=seed), len(value_NL))
    for first, second in PAIRS:
        for quantity in values[first]:
            both = zip(*(_axes(values[name][quantity], scale_sizes) for name in (first, second)), strict=True)
            for (axis, first_NP), (_, second_NP) in both:
                curve = difference(first_NP, second_NP, seed=seed)
                rows += _rows(f"{first} - {second}", quantity, axis, curve, len(first_NP))
    return Table(columns, tuple(rows))


def _axes(value_NL: Tensor, scale_sizes: Sequence[int] | None) -> Iterator[tuple[str, Tensor]]:
    yield "rank", value_NL
    if scale_sizes is not None:
        yield "scale", torch.stack([part.double().mean(1) for part in value_NL.split(list(scale_sizes), dim=1)], dim=1)
    yield "all", value_NL.double().mean(1, keepdim=True)


def _rows(context: str, quantity: str, axis: str, curve: Curve, num: int) -> list[tuple[Cell, ...]]:
    numbers = zip(*(part.tolist() for part in curve), strict=True)
    return [(context, quantity, axis, place, *each, num) for place, each in enumerate(numbers, 1)]


def maps(values: Mapping[str, Values], grid: tuple[int, int], scales: Sequence[int] | None) -> Table:
    """Means over the code grid (of the last scale, where there are several). `values` are in raster order."""
    height, width = (scales[-1], scales[-1]) if scales else grid
    rows: list[tuple[Cell, ...]] = []
    for context, found in values.items():
        for quantity, value_NL in found.items():
            mean_L = value_NL.double().mean(0)[-height * width :]
            rows += [(context, quantity, i // width, i % width, mean) for i, mean in enumerate(mean_L.tolist())]
    return Table(("context", "quantity", "row", "column", "value"), tuple(rows))


def accumulated_error(ranked: Mapping[str, Values], seed: int) -> Table:
    """R(l) on both contexts and the excess, for l = 1 .. L codes."""
    student, data = ranked["student"]["reverse_kl"], ranked["data"]["reverse_kl"]
    curves = {
        "student": accumulated(student, seed=seed),
        "data": accumulated(data, seed=seed),
        "excess": excess_accumulated(student, data, seed=seed),
    }
    rows: list[tuple[Cell, ...]] = []
    for name, curve in curves.items():
        numbers = zip(*(part.tolist() for part in curve), strict=True)
        rows += [(name, place, *each, len(student)) for place, each in enumerate(numbers, 1)]
    return Table(("curve", "codes", "value", "low", "high", "num"), tuple(rows))


def calibrations(values: Mapping[str, Values], seed: int) -> tuple[Table, dict[str, float]]:
    """Bins of two confidences: accuracy on data; on student sequences the KL to a second teacher, or the surprise.

    Beside the table stands the expected calibration error of each confidence on data.
    """
    outcomes = {"data": {"max_prob": "correct", "cluster_mass": "correct_cluster"}}
    reliability = "second_forward_kl" if "second_forward_kl" in values["student"] else "ce_teacher"
    outcomes["student"] = dict.fromkeys(outcomes["data"], reliability)
    rows: list[tuple[Cell, ...]] = []
    errors = {}
    for context, chosen in outcomes.items():
        for confidence, quantity in chosen.items():
            bins = calibration(values[context][confidence], values[context][quantity], seed=seed)
            if context == "data":
                errors[confidence] = expected_error(bins)
            for each in bins:
                about = (each.low, each.high, each.num, each.confidence)
                rows.append((context, confidence, quantity, *about, *each.value))
    columns = (
        "context",
        "confidence",
        "quantity",
        "bin_low",
        "bin_high",
        "codes",
        "mean_confidence",
        "value",
        "low",
        "high",
    )
    return Table(columns, tuple(rows)), errors
