"""The method table in words: what each preset is made of, axis by axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Protocol

from varkd.distill.method import Method, Term
from varkd.distill.schedule import SCHEDULES, Decay, Ramp


class Described(Protocol):
    """What `describe_presets` reads of a preset."""

    @property
    def source(self) -> str: ...
    @property
    def equation(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def method(self) -> Method: ...


def describe_presets(presets: Mapping[str, Described]) -> list[dict[str, Any]]:
    """One JSON object per preset: name, source, equation, summary, contexts, target, terms, schedule."""
    return [
        {
            "name": name,
            "source": preset.source,
            "equation": preset.equation,
            "summary": preset.summary,
            "contexts": phrase(preset.method.contexts),
            "target": phrase(preset.method.target),
            "images": phrase(preset.method.images),
            "terms": [_term(term) for term in preset.method.terms],
            "schedule": _schedules(preset.method),
        }
        for name, preset in presets.items()
    ]


def format_presets(rows: list[dict[str, Any]]) -> str:
    """The table as text for a terminal."""
    blocks = []
    for row in rows:
        terms = "; ".join(
            f"{t['weight']} x {t['divergence']} on {'+'.join(t['on'])}, {t['selection']}, {t['space']}"
            for t in row["terms"]
        )
        blocks.append(
            f"{row['name']}\n  {row['summary']}\n  equation  {row['equation']}\n  contexts  {row['contexts']}\n"
            f"  terms     {terms}\n  source    {row['source']}"
        )
    return "\n".join(blocks)


def phrase(value: Any) -> str:
    """A part of a method as `kind(field value, ...)`, leaving out fields at their defaults."""
    if isinstance(value, Ramp):
        return f"{value.start:g}->{value.end:g} over {value.begin:.0%}-{value.until:.0%} of training"
    if isinstance(value, Decay):
        return f"{value.start:g}->{value.end:g} by {value.base:g}^-progress"
    if isinstance(value, tuple):
        return " + ".join(phrase(item) for item in value)
    if not is_dataclass(value) or isinstance(value, type):
        return f"{value:g}" if isinstance(value, float) else str(value)
    changed = [field for field in fields(value) if field.name != "kind" and _differs(value, field)]
    inner = ", ".join(f"{field.name} {phrase(getattr(value, field.name))}" for field in changed)
    name = getattr(value, "kind", type(value).__name__.lower())
    return f"{name}({inner})" if inner else name


def _differs(value: Any, field: Any) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return getattr(value, field.name) != default


def _term(term: Term) -> dict[str, Any]:
    return {
        "name": term.name, "on": list(term.on), "divergence": phrase(term.divergence), "space": phrase(term.space),
        "selection": phrase(term.selection), "credit": phrase(term.credit),
        "weight": phrase(term.weight), "normaliser": term.normaliser,
    }  # fmt: skip


def _schedules(value: Any, where: str = "") -> dict[str, str]:
    """Every schedule inside a method, by its path."""
    if isinstance(value, SCHEDULES):
        return {where: phrase(value)}
    if isinstance(value, tuple):
        return {key: text for i, item in enumerate(value) for key, text in _schedules(item, f"{where}.{i}").items()}
    if is_dataclass(value) and not isinstance(value, type):
        found: dict[str, str] = {}
        for field in fields(value):
            path = f"{where}.{field.name}" if where else field.name
            found.update(_schedules(getattr(value, field.name), path))
        return found
    return {}
