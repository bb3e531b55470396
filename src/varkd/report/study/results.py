"""Reading results.json, the one file that a study ends in: what `varkd study` wrote in, checked values out.

`SHAPE` is the format, version 1. A number may be null anywhere; what is not finite is read as null. Paths of what the
page reads are relative to the study folder and stay inside it; a teacher's run may be elsewhere and is not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from varkd.errors import VarkdError
from varkd.files import read_json

FORMAT, VERSION = "varkd-study", 1
RESULTS = "results.json"
BUDGETS: dict[str, str] = {"updates": "At equal updates", "time": "At equal time"}
ROLES: dict[str, str] = {
    "baseline": "baseline",
    "varkd": "VarKD",
    "ablation": "ablation of VarKD",
    "control": "control of VarKD",
    "method": "method",
}

PARTS = ("rows", "summary", "controls", "sweeps", "samplers")

Kind = Literal["text", "number", "flag", "path", "any"]


@dataclass(frozen=True)
class Maybe:
    """A part that may be null or absent; it is then read as `otherwise`."""

    shape: Any
    otherwise: Any


_NUMBERS = lambda *names: dict.fromkeys(names, "number")
_QUALITY = _NUMBERS("fd", "fd_low", "fd_high", "precision", "recall", "accuracy")
_SAMPLER = Maybe(_NUMBERS("temperature", "guidance"), {"temperature": None, "guidance": None})
_SAMPLES = {"samples": Maybe("path", None)}
_MODEL = _QUALITY | _SAMPLES | _NUMBERS("parameters", "seconds") | {"sampler": _SAMPLER}
_SPREAD = Maybe(_NUMBERS("value", "low", "high"), {"value": None, "low": None, "high": None})
_SPREADS = dict.fromkeys(("fd", "precision", "recall", "accuracy", "student_kl", "gap_closed"), _SPREAD)
_KEY = {"family": "text", "method": "text"}
_SETTING = Maybe(["text"], [])

SHAPE: dict[str, Any] = {
    "name": "text", "finished": "flag", "updates": "number", "seeds": ["number"], "validation_seed": "number",
    "num_samples": "number", "gap_baseline": Maybe("text", None),
    "starts": Maybe("text", "shared"), "failures": Maybe("any", {}),
    "families": [{
        "family": "text", "data": "text", "teacher": _MODEL, "start": _MODEL,
        "floors": Maybe(_NUMBERS("num", "fd_validation", "fd_reconstruction"), {}),
        "time_budget": "number", "verdict": Maybe("text", ""), "distinguishable": "flag",
    }],
    "rows": [_KEY | _QUALITY | _SAMPLES
             | {"run": Maybe("path", None), "budget": "text", "sampler": _SAMPLER, "setting": _SETTING}
             | _NUMBERS("seed", "updates", "seconds", "ce", "student_kl", "acceptance", "gap_closed")],
    "summary": [_KEY | _SPREADS | _NUMBERS("num_seeds", "updates", "seconds", "wins", "losses") | {
        "budget": "text", "role": "text", "warnings": Maybe(["text"], []),
        "difference": Maybe({"to": "text"} | _NUMBERS("value", "low", "high"), None),
    }],
    "controls": Maybe([_KEY | {"budget": "text", "control": "text"}
                       | _NUMBERS("value", "low", "high", "wins", "losses")], []),
    "sweeps": Maybe([_KEY | {"settings": [{"setting": _SETTING, "fd": "number"}], "chosen": "number"}], []),
    "samplers": Maybe([_KEY | {"choices": [_NUMBERS("temperature", "guidance", "fd")], "chosen": "number"}], []),
    "machine": Maybe(_NUMBERS("cores", "workers", "seconds") | {"versions": Maybe("any", {})}, {}),
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Everything about one family: `facts` is its entry in "families", the rest the entries that name it."""

    name: str
    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    controls: list[dict[str, Any]]
    sweeps: list[dict[str, Any]]
    samplers: list[dict[str, Any]]

    def budgets(self) -> list[str]:
        """The budgets with results, equal updates first."""
        return [budget for budget in BUDGETS if any(entry["budget"] == budget for entry in self.summary)]

    def methods(self, budget: str) -> list[dict[str, Any]]:
        """The summary under one budget, lowest mean FD first, methods without one last."""
        entries = [entry for entry in self.summary if entry["budget"] == budget]
        return sorted(entries, key=lambda entry: (entry["fd"]["value"] is None, entry["fd"]["value"] or 0.0))

    def best_baseline(self, budget: str) -> str | None:
        """The baseline that the differences are taken to; without any, the one with the lowest mean FD."""
        entries = self.methods(budget)
        named = [entry["difference"]["to"] for entry in entries if entry["difference"]]
        measured = [entry for entry in entries if entry["role"] == "baseline" and entry["fd"]["value"] is not None]
        return named[0] if named else measured[0]["method"] if measured else None


@dataclass(frozen=True)
class Study:
    """A checked results.json: `facts` is the whole of it."""

    facts: dict[str, Any]
    families: list[Family]


def read_study(folder: Path) -> Study:
    """Read `folder`/results.json.

    Raises:
        VarkdError: there is none, it is truncated, or it is not what `SHAPE` says.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise VarkdError(f"no {RESULTS} in {folder}: it is what `varkd study` writes; check the path")
    return parse_study(read_json(path), str(path))


def parse_study(results: Any, where: str = RESULTS) -> Study:
    """Check the contents of a results.json; `where` names it in complaints.

    Raises:
        VarkdError: it is not what `SHAPE` says.
    """
    if not isinstance(results, Mapping) or results.get("format") != FORMAT:
        raise VarkdError(f"{where} is not a study: its 'format' should be \"{FORMAT}\"")
    if results.get("version") != VERSION:
        raise VarkdError(f"{where} has version {results.get('version')!r}, this varkd reads version {VERSION}")
    facts = _checked(results, SHAPE, where, "")
    names = [entry["family"] for entry in facts["families"]]
    if len(set(names)) < len(names):
        raise VarkdError(f"{where}: 'families' names a family twice; run the study again")
    for part in PARTS:
        for index, entry in enumerate(facts[part]):
            _require(entry["family"] in names, where, f"{part}[{index}].family", "one of 'families'")
            _require(entry.get("budget", "time") in BUDGETS, where, f"{part}[{index}].budget", " or ".join(BUDGETS))
            _require(entry.get("role", "method") in ROLES, where, f"{part}[{index}].role", "one of " + ", ".join(ROLES))
    own = lambda part, name: [entry for entry in facts[part] if entry["family"] == name]
    families = [
        Family(entry["family"], entry, *(own(part, entry["family"]) for part in PARTS)) for entry in facts["families"]
    ]
    return Study(facts, families)


def _checked(value: Any, shape: Any, where: str, name: str) -> Any:
    if isinstance(shape, Maybe):
        return shape.otherwise if value is None else _checked(value, shape.shape, where, name)
    if isinstance(shape, dict):
        _require(isinstance(value, Mapping), where, name, "an object")
        at = f"{name}." if name else ""
        return dict(value) | {key: _checked(value.get(key), part, where, at + key) for key, part in shape.items()}
    if isinstance(shape, list):
        _require(isinstance(value, list | tuple), where, name, "a list")
        return [_checked(item, shape[0], where, f"{name}[{index}]") for index, item in enumerate(value)]
    return _checked_leaf(value, shape, where, name)


def _checked_leaf(value: Any, kind: Kind, where: str, name: str) -> Any:
    if kind == "number":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _require(value is None or number, where, name, "a number or null")
        return value if value is not None and math.isfinite(value) else None
    if kind == "flag":
        _require(isinstance(value, bool), where, name, "true or false")
    elif kind == "text":
        _require(isinstance(value, str), where, name, "text")
    elif kind == "path":
        inside = isinstance(value, str) and not PurePosixPath(value).is_absolute() and ".." not in Path(value).parts
        _require(inside, where, name, "a path inside the study folder")
    return value


def _require(good: bool, where: str, name: str, what: str) -> None:
    if not good:
        raise VarkdError(f"{where}: '{name}' should be {what}; run the study again")
