"""What was compared, in words: the opening statement, and every difference that makes a comparison unfair."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from varkd.report.runs import RunFolder
from varkd.report.tables import Row, competitors

_SHARED_KEYS = ("num_samples", "grid")
_SHARED_PROTOCOL = ("reference", "tokenizer", "data", "sampler", "seed", "labels", "weights", "versions")


@dataclass(frozen=True)
class Difference:
    """One setting that is not the same everywhere: each printed value with the runs that have it."""

    setting: str
    values: tuple[tuple[str, str], ...]


def differences(runs: Sequence[RunFolder], rows: Sequence[Row]) -> list[Difference]:
    """Settings of the evaluation that differ between runs, and of the training that differ between students.

    `rows` are those of the evaluated runs, in the same order.
    """
    evaluated = [run for run in runs if run.metrics is not None]
    settings = {run.label: _flatten(_select(run.metrics or {})) for run in evaluated}
    found = _compare(settings)
    rivals = {row.name for row in competitors(rows)}
    students = [run for run in evaluated if run.label in rivals]
    return found + _compare({run.label: _student_settings(run.metrics or {}) for run in students})


def _select(metrics: Mapping[str, Any]) -> dict[str, Any]:
    protocol = metrics.get("protocol") or {}
    network = protocol.get("features")
    own = {key: metrics.get(key) for key in _SHARED_KEYS}
    shared = {key: protocol.get(key) for key in _SHARED_PROTOCOL}
    return own | shared | {"feature network": network.get("hash") if isinstance(network, Mapping) else network}


def _student_settings(metrics: Mapping[str, Any]) -> dict[str, Any]:
    protocol = metrics.get("protocol") or {}
    teacher = "teacher" if protocol.get("teacher_hash") is None else "teacher_hash"
    return {"updates": metrics.get("updates"), **{key: protocol.get(key) for key in ("training_seed", teacher)}}


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        parts = [_flatten(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()]
        return {key: item for part in parts for key, item in part.items()}
    return {name: value}


def _compare(settings: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    names = dict.fromkeys(name for values in settings.values() for name in values)
    found = []
    for name in names:
        groups: dict[str, list[str]] = {}
        for label, values in settings.items():
            groups.setdefault(as_text(values.get(name)), []).append(label)
        if len(groups) > 1:
            found.append(Difference(name, tuple((value, ", ".join(labels)) for value, labels in groups.items())))
    return found


def as_text(value: Any) -> str:
    """A value of a protocol for a person: text as it is, the rest as JSON, nothing as "not stated"."""
    if value is None:
        return "not stated"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def statement(runs: Sequence[RunFolder], rows: Sequence[Row]) -> list[str]:
    """The sentences that open the report: who was compared, on what, and what may be concluded."""
    if not rows:
        return [f"{_count(len(runs), 'run')}, none of them evaluated yet."]
    metrics = [run.metrics for run in runs if run.metrics is not None]
    sentences = [f"This page compares {_who(rows)}.", _judged(metrics)]
    students = competitors(rows)
    updates = {row.cells["updates"].text for row in students}
    if len(students) > 1:
        who = "student" if all(row.role == "student" for row in students) else "run"
        equal = f"Every {who} made {next(iter(updates))} updates."
        sentences.append(equal if len(updates) == 1 else f"The {who}s made different numbers of updates.")
    return [*sentences, *_finding(students)]


def _who(rows: Sequence[Row]) -> str:
    count = {role: sum(row.role == role for row in rows) for role in ("student", "teacher", "model")}
    parts = [_count(count["student"], "student")] if count["student"] else []
    if count["model"]:
        parts.append(_count(count["model"], "model") + " that had no teacher")
    if count["teacher"]:
        parts.append(_count(count["teacher"], "teacher"))
    return " and ".join(", ".join(parts).rsplit(", ", 1))


def _judged(metrics: Sequence[Mapping[str, Any]]) -> str:
    counts = sorted({run.get("num_samples") or 0 for run in metrics})
    samples = f"N = {counts[0]:,}" if len(counts) == 1 else f"between N = {counts[0]:,} and {counts[-1]:,}"
    references = {as_text((run.get("protocol") or {}).get("reference")) for run in metrics}
    reference = (metrics[0].get("protocol") or {}).get("reference")
    if len(references) == 1 and isinstance(reference, Mapping) and isinstance(reference.get("num"), int):
        return f"Each run is judged by {samples} samples against {reference['num']:,} reference images."
    return f"Each run is judged by {samples} samples."


def _finding(students: Sequence[Row]) -> list[str]:
    best = [row for row in students if row.cells["fd"].mark == "best"]
    if not best:
        return []
    tied = [row.name for row in students if row.cells["fd"].mark == "tied"]
    cell = best[0].cells["fd"]
    names = " and ".join(row.name for row in best)
    result = f"{names} reached the lowest Fréchet distance, {cell.text}{cell.interval and ' '}{cell.interval}"
    if tied:
        overlaps = f"the interval of {tied[0]} overlaps" if len(tied) == 1 else f"those of {', '.join(tied)} overlap"
        return [f"{result}; {overlaps} its interval, so N samples do not separate them."]
    return [f"{result}{'; no other interval overlaps it' if cell.interval else ''}."]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
