"""Reading an analysis folder: CSV files and `analysis.json` in, checked values out."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from varkd.errors import VarkdError
from varkd.files import read_json
from varkd.report.figures import Line

Row = dict[str, str]
Key = tuple[str, str, str]


class Number(NamedTuple):
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies on one side of 0, else 0: nothing is seen."""
        return (self.low > 0) - (self.high < 0)


@dataclass(frozen=True)
class Analysis:
    """What stands in an analysis folder."""

    folder: Path
    info: Mapping[str, Any]
    tables: Mapping[str, list[Row]]

    @cached_property
    def axis(self) -> str:
        """Next-scale models are read by scale, all others by the order of generation."""
        return "scale" if self.info["scales"] else "rank"

    @property
    def xlabel(self) -> str:
        return "scale (side of its map)" if self.axis == "scale" else "code in the order of generation"

    @cached_property
    def _curves(self) -> dict[Key, list[Row]]:
        found: dict[Key, list[Row]] = {}
        for row in self.tables.get("positions", ()):
            found.setdefault((row["context"], row["quantity"], row["axis"]), []).append(row)
        return found

    def has(self, context: str, quantity: str) -> bool:
        return (context, quantity, "all") in self._curves

    def mean(self, context: str, quantity: str) -> Number:
        """The mean over all positions."""
        (row,) = self._curves[context, quantity, "all"]
        return number(row)

    def curve(self, context: str, quantity: str, label: str, style: int) -> Line:
        """A quantity by position."""
        rows = self._curves[context, quantity, self.axis]
        sides = self.info["scales"] if self.axis == "scale" else None
        x = [float(sides[i]) if sides else float(row["position"]) for i, row in enumerate(rows)]
        value, low, high = (list(parts) for parts in zip(*map(number, rows), strict=True))
        return Line(label, style, x, value, low, high)

    def map(self, context: str, quantity: str) -> NDArray[np.floating] | None:
        """A quantity over the code grid."""
        rows = [row for row in self.tables["maps"] if row["context"] == context and row["quantity"] == quantity]
        if not rows:
            return None
        height, width = (1 + max(int(row[side]) for row in rows) for side in ("row", "column"))
        return np.array([float(row["value"]) for row in rows]).reshape(height, width)

    def rows(self, table: str, **wanted: str) -> list[Row]:
        """The rows of a table with these values."""
        return [row for row in self.tables.get(table, ()) if all(row[key] == value for key, value in wanted.items())]


def number(row: Row) -> Number:
    return Number(*(float(row[name]) for name in ("value", "low", "high")))


def read_analysis(folder: Path) -> Analysis:
    """Read what `varkd analyze` wrote.

    Raises:
        VarkdError: no analysis there, or a damaged file.
    """
    info = read_json(folder / "analysis.json")
    if not isinstance(info, dict) or "num" not in info:
        raise VarkdError(f"{folder / 'analysis.json'} is no analysis: run `varkd analyze` again")
    tables = {}
    for path in sorted(folder.glob("*.csv")):
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), strict=True)
        rows = list(reader)
        if any(None in row or None in row.values() for row in rows):
            raise VarkdError(f"{path} is damaged: run `varkd analyze` again")
        tables[path.stem] = rows
    return Analysis(folder, info, tables)
