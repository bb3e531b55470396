"""A method in words, made from the value itself: the table of `varkd methods`, the explanation of `varkd show`.

A phrase names a part and the settings that tell it apart. The sentences of `explain` are the parts' own (`summary`),
each beside its formula, so a changed setting changes the words and there is no second table to keep in step.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Protocol

import torch

from varkd.backbones.store import FAMILIES
from varkd.distill.credit import NoCredit
from varkd.distill.filtering import AllImages
from varkd.distill.inputs import told
from varkd.distill.method import COSTS, Method, Term
from varkd.distill.schedule import adaptives, schedules, words
from varkd.distill.selection import All
from varkd.distill.spaces import Full
from varkd.distill.target import Plain

_WIDTH = 110


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
    """One JSON object per preset: name, source, equation, summary, its parts axis by axis, schedules and cost."""
    return [
        {
            "name": name,
            "source": preset.source,
            "equation": preset.equation,
            "summary": preset.summary,
            "contexts": phrase(preset.method.contexts),
            "target": phrase(preset.method.target),
            "images": phrase(preset.method.images),
            "terms": [_term(term, preset.method) for term in preset.method.terms],
            "schedule": _schedules(preset.method),
            "cost": {name: between.phrase() for name, between in update_cost(preset.method).items()},
        }
        for name, preset in presets.items()
    ]


def format_presets(rows: list[dict[str, Any]]) -> str:
    """The table as text for a terminal: one block for each preset."""
    return "\n".join("\n".join(_block(row)) for row in rows)


def _block(row: dict[str, Any]) -> Iterator[str]:
    yield row["name"]
    yield f"  {row['summary']}"
    axes = {"equation": row["equation"], "source": row["source"], "contexts": row["contexts"]}
    for axis, usual in (("target", Plain()), ("images", AllImages())):
        if row[axis] != phrase(usual):
            axes[axis] = row[axis]
    for name, text in axes.items():
        yield f"  {name:<10}{text}"
    for index, term in enumerate(row["terms"]):
        yield f"  {'' if index else 'terms':<10}{format_term(term)}"


def format_term(term: dict[str, Any]) -> str:
    """A term of `describe_presets` on one line, without what most terms share."""
    weight = "" if term["weight"] == "1" else f"{term['weight']} x "
    usual = {"selection": phrase(All()), "space": phrase(Full()), "credit": phrase(NoCredit())}
    extras = [term[axis] for axis, text in usual.items() if term[axis] != text]
    if term["generated_only"]:
        extras.append("generated codes only")
    if term["normalizer"] == "selected":
        extras.append("mean over what is selected")
    return "; ".join([f"{weight}{term['divergence']} on {' and '.join(term['on'])} rows", *extras])


def _term(term: Term, method: Method) -> dict[str, Any]:
    axes = ("divergence", "space", "selection", "credit", "weight")
    about = {axis: phrase(getattr(term, axis)) for axis in axes}
    return {
        "name": term.name,
        "on": _rows(term, method),
        "normalizer": term.normalizer,
        "generated_only": term.generated_only,
        **about,
    }


def _rows(term: Term, method: Method) -> list[str]:
    """The sources that the term is on and that the contexts make."""
    return [source for source in method.contexts.sources if source in term.on] or ["nothing"]


def phrase(value: Any) -> str:
    """A number, a schedule or a part of a method in few words."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case str() | int():
            return str(value)
        case tuple():
            return " + ".join(map(phrase, value))
        case _ if hasattr(value, "label"):
            return _with_settings(value, value.label)
        case _ if hasattr(value, "kind") and not hasattr(value, "at"):
            return _with_settings(value, re.sub(r"(kl|jsd|taid)\b", lambda found: found[0].upper(), value.kind))
    return words(value)


def _with_settings(value: Any, label: str) -> str:
    """The part's label, and in brackets the settings that it always shows (its first one, if it does not say which) and
    those that differ from the default, without what is off by default (none, 0, no) and what the label tells."""
    in_label = {name: phrase(getattr(value, name)) for name in re.findall(r"{(\w+)}", label)}
    changed, shown, found = _changed(value), getattr(value, "shown", ()), []
    for field in fields(value) if hasattr(value, "kind") else ():
        setting = getattr(value, field.name)
        off = setting is None or setting is False or setting == 0
        always = field.name in shown if shown else not found
        if field.name in ("kind", *in_label) or not (field in changed or (always and not off)):
            continue
        if field.name != "sampler":
            found.append(f"{field.name} {phrase(setting)}")
        elif field in changed:
            found.append(told(value.sampler)[2:-1])
    name = label.replace("_", " ").format(**in_label)
    return f"{name} ({', '.join(found)})" if found else name


def _changed(value: Any) -> list[Field[Any]]:
    """The fields of a part that differ from their defaults."""

    def default(field: Field[Any]) -> Any:
        return field.default if field.default_factory is MISSING else field.default_factory()

    return [field for field in fields(value) if field.name != "kind" and getattr(value, field.name) != default(field)]


def explain(method: Method) -> list[str]:
    """The method in sentences, as lines of at most 110 characters."""
    return [
        *_item("prefixes", method.contexts.summaries),
        *_item("target", [_target(method)]),
        *(line for term in method.terms for line in _item(f"term {term.name}", _term_sentences(term, method))),
        *_item("images", [] if method.images == AllImages() else [method.images.summary]),
        *_item("adapts", _adapting(method)),
        *_item("cost", _cost_sentences(method)),
        *_item("families", [_families(method)]),
    ]


def _item(name: str, texts: list[str]) -> list[str]:
    """A heading and its sentences, wrapped and indented below it; nothing where there is nothing to say."""
    lines = [line for text in texts for line in textwrap.wrap(text, _WIDTH - 2, subsequent_indent="  ")]
    return [f"{name}:", *(f"  {line}" for line in lines)] if texts else []


def _target(method: Method) -> str:
    if not any(term.divergence.needs_teacher for term in method.terms):
        return "no divergence looks at the teacher's distribution"
    return method.target.summary


def _term_sentences(term: Term, method: Method) -> list[str]:
    over = "all their positions" if term.normalizer == "total" else "what is selected there (one more pass finds it)"
    if term.generated_only:
        over += "; of a continued data sequence only what was generated counts"
    texts = [
        f"weight {words(term.weight)}, mean on {' and '.join(_rows(term, method))} rows over {over}",
        f"compares: {term.divergence.summary}",
        f"positions: {term.selection.summary}",
        f"outcomes: {term.space.summary}",
    ]
    return [*texts, f"times: {term.credit.summary}"] if term.credit.sampled else texts


def _adapting(method: Method) -> list[str]:
    found = [f"method.{path}: {text}" for path, text in _schedules(method).items()]
    found += [f"{key.replace('adaptive.', 'method.')} is {value.rule}" for key, value in adaptives(method)]
    found += [
        f"the {key.split('/')[0]} of term {term.name}, after every update"
        for term in method.terms
        for key in term.memories
    ]
    return found or ["nothing"]


def _families(method: Method) -> str:
    barred = [name for name, family in FAMILIES.items() if method.contexts.splices and family.residual_codes]
    fit = ", ".join(name for name in FAMILIES if name not in barred)
    if not barred:
        return fit
    return (
        f"{fit}; not {', '.join(barred)}: single codes are exchanged in data sequences, and later codes of a "
        "next-scale image encode what the earlier ones left over"
    )


def _schedules(method: Method) -> dict[str, str]:
    """Every schedule inside a method, by its path."""
    return {path.removeprefix("."): value.summary for path, value in schedules(method)}


@dataclass(frozen=True)
class Between:
    """The least and the most over training."""

    least: float
    most: float

    def phrase(self) -> str:
        least, most = words(round(self.least, 4)), words(round(self.most, 4))
        return least if least == most else f"{least} to {most}"


def update_cost(method: Method) -> dict[str, Between]:
    """By the names of `COSTS`: the least and the most over training, adaptive numbers at either end."""
    started, ended = (
        {key: torch.tensor([end(value)]) for key, value in adaptives(method)}
        for end in (lambda value: value.start, lambda value: value.end)
    )
    over_training = [method.at(tenth / 10, state).cost for tenth in range(11) for state in (started, ended)]
    return {
        name: Between(min(costs[name] for costs in over_training), max(costs[name] for costs in over_training))
        for name in COSTS
    }


def _cost_sentences(method: Method) -> list[str]:
    cost = {name: between.phrase() for name, between in update_cost(method).items()}
    once = ["once, before training: both models read every image"] if method.images.needs_teacher else []
    return [
        "of an update, in batches of B sequences of L codes; a decode takes one cached step per step of the plan",
        f"student: {cost['student_train']} trained, {cost['student_read']} read without gradient, "
        f"{cost['student_decode']} decoded",
        f"teacher: {cost['teacher_read']} read, {cost['teacher_decode']} decoded",
        *once,
    ]
