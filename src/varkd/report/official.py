"""The numbers that papers print, where runs have them: what `varkd evaluate RUN --reference` left in `evaluation/`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from varkd.files import read_json
from varkd.report.runs import RunFolder
from varkd.report.tables import Cell, Column, Role, Row, make_cell, mark_best

COLUMNS = [
    Column("protocol", "Protocol", "", "whose evaluation drew the samples, and how many", kind="text"),
    Column("fid", "FID", "", "Fréchet distance in features of the 2015 Inception network", "lower"),
    Column("sfid", "sFID", "", "the same in spatial features", "lower"),
    Column("is", "IS", "", "Inception Score", "higher"),
    Column("precision", "Precision (%)", "", "samples that lie among the reference images", "higher", 100),
    Column("recall", "Recall (%)", "", "reference images that lie among the samples", "higher", 100),
]
_NUMBERS = [column for column in COLUMNS if column.kind != "text"]


def official(runs: Sequence[RunFolder], rows: Sequence[Row]) -> tuple[list[Row], bool]:
    """A row for every result, and whether all were obtained under one protocol: only then the best are marked."""
    role: dict[str, Role] = {row.name: row.role for row in rows}
    found: list[Row] = []
    protocols = set()
    for run in runs:
        for name, result in _results(run.path):
            told = result["protocol"].get("drawn", {})
            cells = {column.key: _cell(column, result) for column in _NUMBERS}
            words = f"{name}, N = {told.get('num', 0):,}" if told.get("num") else name
            method = (run.metrics or {}).get("method", "")
            found.append(Row(run.label, method, role.get(run.label, "model"), {"protocol": Cell(words), **cells}))
            protocols.add(json.dumps(result["protocol"], sort_keys=True))
    same = len(protocols) <= 1
    return (mark_best(found, _NUMBERS) if same else found), same


def _results(folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Protocol name -> result; other JSON files that stand there are passed over."""
    results = []
    for path in sorted((folder / "evaluation").glob("*.json")):
        result = read_json(path)
        if isinstance(result, dict) and isinstance(result.get("protocol"), dict) and "fid" in result:
            results.append((path.stem, result))
    return results


def _cell(column: Column, result: Mapping[str, Any]) -> Cell:
    low, high = (result.get("intervals") or {}).get(column.key) or (None, None)
    return make_cell(column, result.get(column.key), low, high)
