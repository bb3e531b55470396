"""Reading run folders: files in, checked values out. The formats are those of docs/architecture.md.

What an unfinished run lacks (metrics, samples) is None or empty; what is damaged is refused with one line.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from varkd.errors import VarkdError
from varkd.files import read_errors, read_json


@dataclass(frozen=True)
class RunFolder:
    """What stands in one run folder. `label` names it in the report and is unique there."""

    path: Path
    label: str
    recipe: str
    metrics: dict[str, Any] | None
    log: list[dict[str, Any]]
    status: dict[str, Any] | None
    environment: dict[str, Any] | None
    samples: Path | None
    progress: tuple[Path, ...]


def read_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """Read the folders in the given order; runs that share a name are told apart by their folders.

    Raises:
        VarkdError: no folder, one given twice, or one that `read_run` refuses.
    """
    if not folders:
        raise VarkdError("a report needs at least one run folder")
    twice = [path for path, count in Counter(Path(folder).resolve() for folder in folders).items() if count > 1]
    if twice:
        raise VarkdError(f"{twice[0]} is given twice: name each run folder once")
    runs = [read_run(Path(folder)) for folder in folders]
    labels = Counter(run.label for run in runs)
    return [_relabel(run, f"{run.label} ({run.path})") if labels[run.label] > 1 else run for run in runs]


def read_run(folder: Path) -> RunFolder:
    """Read one run folder.

    Raises:
        VarkdError: it does not exist, is no run folder, or holds a damaged file.
    """
    if not folder.is_dir():
        raise VarkdError(f"no run folder at {folder}: check the path, or train the run first")
    if not (folder / "run.yaml").is_file():
        raise VarkdError(f"{folder} is not a run folder: it has no run.yaml")
    metrics = _optional_object(folder / "metrics.json")
    if metrics is not None:
        _check_metrics(metrics, folder / "metrics.json")
    samples = folder / "evaluation" / "samples.png"
    return RunFolder(
        path=folder,
        label=metrics["name"] if metrics else folder.resolve().name,
        recipe=_text(folder / "run.yaml"),
        metrics=metrics,
        log=read_log(folder / "log.jsonl"),
        status=_optional_object(folder / "status.json"),
        environment=_optional_object(folder / "environment.json"),
        samples=samples if samples.is_file() else None,
        progress=tuple(sorted((folder / "samples").glob("step-*.png"))),
    )


def _relabel(run: RunFolder, label: str) -> RunFolder:
    return replace(run, label=label, metrics=None if run.metrics is None else {**run.metrics, "name": label})


def _text(path: Path) -> str:
    with read_errors(path, "is not UTF-8 text: it may be damaged"):
        return path.read_text(encoding="utf-8")


def _optional_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    value = read_json(path)
    if not isinstance(value, dict):
        raise VarkdError(f"{path} should hold one JSON object, not {type(value).__name__}")
    return value


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl; an unfinished last line (a run that is still writing) is left out."""
    if not path.is_file():
        return []
    *lines, unfinished = _text(path).split("\n")
    del unfinished
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        if not isinstance(entry, dict):
            raise VarkdError(f"{path} line {number} is not a JSON object: the log is damaged")
        entries.append(entry)
    return entries


_NUMBERS = ("updates", "seconds", "parameters", "samples_per_second", "num_samples")


def _check_metrics(metrics: dict[str, Any], path: Path) -> None:
    """Refuse what the tables could not print, before anything is drawn."""

    def require(good: bool, what: str) -> None:
        if not good:
            raise VarkdError(f"{path}: {what}; evaluate the run again")

    for key in ("name", "method"):
        require(isinstance(metrics.get(key), str), f"'{key}' should be a string")
    for key in _NUMBERS:
        require(_is_number(metrics.get(key)), f"'{key}' should be a number or null")
    require(isinstance(metrics.get("metrics"), dict), "'metrics' should be an object")
    for key, metric in metrics["metrics"].items():
        good = isinstance(metric, dict) and all(_is_number(metric.get(end)) for end in ("value", "low", "high"))
        require(good, f"'metrics.{key}' should hold the numbers value, low and high")
    for key in ("floors", "protocol"):
        require(isinstance(metrics.get(key, {}), dict), f"'{key}' should be an object")
    floors = metrics.get("floors", {})
    require(all(_is_number(value) for value in floors.values()), "'floors' should hold numbers")
    for key in ("agreement", "agreement_by_position"):
        for source, values in (metrics.get(key) or {}).items():
            require(isinstance(values, dict | None), f"'{key}.{source}' should be an object or null")
            many = key == "agreement_by_position"
            good = all(_are_numbers(value) if many else _is_number(value) for value in (values or {}).values())
            require(good, f"'{key}.{source}' should hold {'lists of ' if many else ''}numbers")
    grid = metrics.get("grid")
    require(grid is None or (_are_numbers(grid) and len(grid) == 2), "'grid' should be [rows, columns]")


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(item) for item in value)
