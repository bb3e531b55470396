"""The figures of one family: where every method stands, against the best baseline, against its cost, and over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varkd.report.dots import SHAPES, Dot, forest, scatter
from varkd.report.figures import NUM_COLORS, TEACHER, Line, dash, lines
from varkd.report.images import Picture, pictures_of
from varkd.report.runs import read_log
from varkd.report.study.results import ROLES, Family, Study

_STYLES = {"varkd": 0, "baseline": 1, "ablation": 2, "control": 3, "method": 6}
_NAMED = 24  # more labels than this cover each other
_LINES = 6  # of a group of curves, beside the best baseline
_OUTLINES = {
    "o": "M1 5a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "s": "M1 1h8v8h-8z",
    "D": "M5 0l5 5l-5 5l-5-5z",
    "^": "M5 0l5 9h-10z",
    "v": "M0 1h10l-5 9z",
}
Drawn = tuple[str, str]


def role_legend(family: Family) -> list[tuple[str, str, str]]:
    """(role, CSS color, SVG path of its shape) per role that occurs."""
    seen = {entry["role"] for entry in family.summary}
    return [
        (text, f"var(--run-{_STYLES[role]})", _OUTLINES[SHAPES[_STYLES[role]]])
        for role, text in ROLES.items()
        if role in seen
    ]


def figures_of(family: Family, budget: str, prefix: str) -> list[Drawn]:
    """Captioned drawings of one budget; a figure without a number to draw is left out. `prefix` makes ids unique."""
    entries = [entry for entry in family.methods(budget) if entry["fd"]["value"] is not None]
    if not entries:
        return []
    drawn = [_standing(family, entries, f"{prefix}-fd"), _cost(entries, f"{prefix}-cost")]
    paired = _differences(family, budget, f"{prefix}-difference")
    return [figure for figure in (drawn[0], paired, drawn[1]) if figure]


def _standing(family: Family, entries: Sequence[Mapping[str, Any]], name: str) -> Drawn:
    dots = [Dot(entry["method"], _STYLES[entry["role"]], *_ends(entry["fd"])) for entry in entries]
    marks = [(who, family.facts[who]["fd"]) for who in ("teacher", "start") if family.facts[who]["fd"] is not None]
    caption = "Mean FD over training seeds with its interval, lowest first; teacher and start as lines."
    return caption, forest(name, dots, marks, "FD (lower is better)")


def _differences(family: Family, budget: str, name: str) -> Drawn | None:
    entries = [
        entry for entry in family.methods(budget) if entry["difference"] and entry["difference"]["value"] is not None
    ]
    if not entries:
        return None
    entries.sort(key=lambda entry: entry["difference"]["value"])
    dots = [Dot(entry["method"], _STYLES[entry["role"]], *_ends(entry["difference"])) for entry in entries]
    baseline = family.best_baseline(budget)
    caption = f"Difference of FD to the best baseline, {baseline}, paired by seed. Left of 0 is better than {baseline}."
    return caption, forest(name, dots, [(str(baseline), 0.0)], f"FD minus FD of {baseline}")


def _cost(entries: Sequence[Mapping[str, Any]], name: str) -> Drawn | None:
    entries = [entry for entry in entries if entry["seconds"] is not None]
    if not entries:
        return None
    dots = [Dot(e["method"], _STYLES[e["role"]], e["seconds"], y=e["fd"]["value"]) for e in entries]
    named = {dot.label for dot in dots}
    caption = "Quality against cost: down and to the left is better."
    if len(dots) > _NAMED:
        frontier = [a for a in dots if not any(b.x <= a.x and b.y <= a.y and b is not a for b in dots)]
        important = [e["method"] for e in entries if e["role"] in ("baseline", "varkd")]
        named = {dot.label for dot in frontier} | set(important)
        caption += " Named: baselines, VarKD, and what no other method beats in both; the table has all."
    return caption, scatter(name, dots, named, "seconds of training, mean over seeds", "mean FD")


def _ends(spread: Mapping[str, Any]) -> tuple[float, float | None, float | None]:
    return spread["value"], spread["low"], spread["high"]


@dataclass(frozen=True)
class Curves:
    """One small multiple: a drawing and the key of its lines."""

    drawing: str
    legend: list[tuple[str, str, str]]


def first_seed_runs(study: Study, family: Family) -> list[Mapping[str, Any]]:
    """One run per method: at equal updates and the first seed, in the order of the summary."""
    seeds = study.facts["seeds"]
    runs = {
        row["method"]: row
        for row in family.rows
        if row["budget"] == "updates" and (not seeds or row["seed"] == seeds[0])
    }
    ordered = [entry["method"] for entry in family.methods("updates")]
    return [runs[method] for method in dict.fromkeys([*ordered, *runs]) if method in runs]


def curves(folder: Path, study: Study, family: Family, prefix: str) -> list[Curves]:
    """Validation cross-entropy over updates, a few methods a drawing, the best baseline in each of them."""
    points: dict[str, dict[float, float]] = {}
    for run in first_seed_runs(study, family):
        found = _validation(folder / run["run"]) if run["run"] else {}
        if found:
            points[run["method"]] = found
    if not points:
        return []
    baseline = family.best_baseline("updates")
    others = _by_role(family, [method for method in points if method != baseline])
    size = math.ceil(len(others) / max(1, math.ceil(len(others) / _LINES))) or 1  # groups of about the same size
    groups = [others[first : first + size] for first in range(0, len(others), size)] or [[]]
    return [_group(f"{prefix}-curves-{number}", group, baseline, points) for number, group in enumerate(groups)]


def _by_role(family: Family, methods: Sequence[str]) -> list[str]:
    """VarKD's relatives together, then the baselines and the others, each from the lowest FD."""
    role = {entry["method"]: entry["role"] for entry in family.summary}
    order = ["varkd", "ablation", "control", "baseline", "method"]
    return sorted(methods, key=lambda method: order.index(role.get(method, "method")))


def _group(name: str, group: Sequence[str], baseline: str | None, points: Mapping[str, dict[float, float]]) -> Curves:
    styles = {baseline: TEACHER} if baseline is not None and baseline in points else {}
    styles |= {method: number for number, method in enumerate(group)}
    drawn = [
        Line(method, style, list(points[method]), list(points[method].values())) for method, style in styles.items()
    ]
    key = [
        (
            method,
            "currentColor" if style == TEACHER else f"var(--run-{style % NUM_COLORS})",
            " ".join(str(length) for length in dash(style)),
        )
        for method, style in styles.items()
    ]
    svg = lines(name, drawn, "update", "validation cross-entropy", _limits(points))
    return Curves(svg, key)


def _limits(points: Mapping[str, dict[float, float]]) -> tuple[float, float]:
    """One axis for all groups: without the steep start, where methods look alike, and without what diverges."""
    late = sorted(y for found in points.values() for y in list(found.values())[1 if len(found) > 3 else 0 :])
    low, usual = late[0], late[len(late) * 3 // 4]
    high = min(late[-1], usual + 4 * (usual - low)) if usual > low else late[-1]
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _validation(run: Path) -> dict[float, float]:
    found = {}
    for entry in read_log(run / "log.jsonl"):
        step, ce = entry.get("step"), entry.get("ce")
        numbers = all(isinstance(number, int | float) and math.isfinite(number) for number in (step, ce))
        if entry.get("split") == "validation" and numbers:
            found[step] = ce
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Sample:
    """One model's samples, or none with the reason."""

    label: str
    role: str
    picture: Picture | None


def samples(folder: Path, study: Study, family: Family, share: int) -> list[Sample]:
    """Teacher, start, and every method at the first seed; `share` is how many pictures the whole page has."""
    shown = [(who, "reference", family.facts[who]["samples"]) for who in ("teacher", "start")]
    role = {entry["method"]: ROLES[entry["role"]] for entry in family.summary}
    shown += [(run["method"], role.get(run["method"], ""), run["samples"]) for run in first_seed_runs(study, family)]
    return [Sample(label, kind, _picture(folder, path, share)) for label, kind, path in shown]


def _picture(folder: Path, path: str | None, share: int) -> Picture | None:
    if path is None or not (folder / path).is_file():
        return None
    return pictures_of([folder / path], share, share=0.9)[0]
