"""The summary of a study for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from varkd.report.study.results import BUDGETS, Family, Study, parse_study
from varkd.report.study.tables import summary_columns, summary_rows
from varkd.report.study.words import findings, statement, warnings
from varkd.report.tables import TERMINAL_WIDTH, Cell, Column, Row, aligned

_SHOWN = ("fd", "difference", "won", "gap_closed", "accuracy", "recall", "precision", "seconds", "student_kl")
_FEWEST = 4
_MARKS = {"": "", "best": "*", "tied": "~"}


def format_study(results: Mapping[str, Any]) -> str:
    """The contents of a results.json as tables, a budget of a family each, at most 110 characters wide.

    Raises:
        VarkdError: `results` is not what a results.json should hold.
    """
    study = parse_study(results)
    return "\n\n".join(_family(study, family) for family in study.families)


def _family(study: Study, family: Family) -> str:
    parts = [_budget(study, family, budget) for budget in family.budgets()]
    text = _wrapped([f"{family.name}:", *statement(study, family), *findings(family)])
    text += [line for warning in warnings(study, family) for line in _wrapped([f"warning: {warning}"])]
    return "\n\n".join([*parts, "\n".join(text)])


def _budget(study: Study, family: Family, budget: str) -> str:
    columns = summary_columns(family, budget, study.facts["gap_baseline"])
    rows = summary_rows(family, budget, columns)
    by_key = {column.key: column for column in columns}
    title = f"{family.name}: {BUDGETS[budget].lower()}"
    return "\n".join([*_wrapped([title]), *_table(rows, by_key), *_legend(rows, family, budget)])


def _table(rows: Sequence[Row], columns: Mapping[str, Column]) -> list[str]:
    """As many of `_SHOWN` from the left as leave the names whole; with the fewest of them names are cut."""
    table: list[list[str]] = []
    for count in range(len(_SHOWN), _FEWEST - 1, -1):
        keys = _SHOWN[:count]
        header = ["method", "role", *(_title(key, columns) for key in keys)]
        table = [header, *([row.name, row.method.split()[0], *(_text(row, key) for key in keys)] for row in rows)]
        widths = [max(len(line[index]) for line in table) for index in range(len(header))]
        if sum(widths) + len(widths) - 1 <= TERMINAL_WIDTH:
            break
    return [line[:TERMINAL_WIDTH] for line in aligned(table)]


def _title(key: str, columns: Mapping[str, Column]) -> str:
    if key == "won":
        return "won-lost"
    column = columns[key]
    return (column.short if len(column.short) <= 20 else f"{column.short[:19]}…") + column.arrow


def _text(row: Row, key: str) -> str:
    if key == "won":
        wins, losses = row.cells["wins"], row.cells["losses"]
        return Cell().text if wins.value is None or losses.value is None else f"{wins.text}-{losses.text}"
    cell = row.cells[key]
    with_interval = key in ("fd", "difference") and cell.interval
    return cell.text + (f" {cell.interval}" if with_interval else "") + _MARKS[cell.mark]


def _legend(rows: Sequence[Row], family: Family, budget: str) -> list[str]:
    marks = {cell.mark for row in rows for cell in row.cells.values()}
    parts = ["↓ lower is better, ↑ higher is better"]
    parts += ["* best method"] if "best" in marks else []
    parts += ["~ its interval overlaps the best one's"] if "tied" in marks else []
    baseline = family.best_baseline(budget)
    parts += [f"to {baseline}: FD minus that of {baseline}, paired by seed"] if baseline else []
    return _wrapped(["; ".join(parts) + "."])


def _wrapped(sentences: Sequence[str]) -> list[str]:
    return textwrap.wrap(" ".join(sentences), TERMINAL_WIDTH)
