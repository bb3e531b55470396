"""A method in words, made from the value itself: the table of `varkd methods`, the explanation of `varkd show`.

A phrase names a part and the settings that tell it apart. A sentence is the first one of the part's docstring, with all
its settings in brackets. So a changed setting changes the words, and there is no second table to keep in step. Only
`_making` knows something that stands nowhere else: what it costs to make the prefixes; a test counts it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from fractions import Fraction
from inspect import getdoc
from typing import Any, Protocol

import torch

from varkd.backbones.store import FAMILIES
from varkd.distill.bestof import BestOf
from varkd.distill.credit import NoCredit
from varkd.distill.filtering import AllImages
from varkd.distill.method import Method, Term
from varkd.distill.mixture import Contexts, Mixture, Share
from varkd.distill.prefixes import (
    Completions,
    MixedRollout,
    MixtureSampling,
    ParallelSampling,
    Rollout,
    SpeculativeSampling,
)
from varkd.distill.replay import Replay
from varkd.distill.schedule import SCHEDULES, Adaptive, ExponentialSchedule, LinearSchedule, adaptives, value_of
from varkd.distill.scores import of_student
from varkd.distill.selection import Accepted, All, Confidence
from varkd.distill.spaces import Full
from varkd.distill.target import Guided, Plain
from varkd.rollout import Sampler

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
    axes |= {axis: row[axis] for axis, usual in (("target", Plain()), ("images", AllImages()))
             if row[axis] != phrase(usual)}  # fmt: skip
    for name, text in axes.items():
        yield f"  {name:<10}{text}"
    for index, term in enumerate(row["terms"]):
        yield f"  {'' if index else 'terms':<10}{format_term(term)}"


def format_term(term: dict[str, Any]) -> str:
    """A term of `describe_presets` on one line, without what most terms share."""
    weight = "" if term["weight"] == "1" else f"{term['weight']} x "
    extras = [term[axis] for axis, usual in (("selection", All()), ("space", Full()), ("credit", NoCredit()))
              if term[axis] != phrase(usual)]  # fmt: skip
    if term["normalizer"] == "selected":
        extras.append("mean over what is selected")
    return "; ".join([f"{weight}{term['divergence']} on {' and '.join(term['on'])} rows", *extras])


def explain(method: Method) -> list[str]:
    """The method in sentences, as lines of at most 110 characters."""
    return [
        *_item("prefixes", _prefixes(method.contexts)),
        *_item("target", [_target(method)]),
        *(line for term in method.terms for line in _item(f"term {term.name}", _term_sentences(term, method))),
        *_item("images", [] if method.images == AllImages() else [sentence(method.images)]),
        *_item("adapts", _adapting(method)),
        *_item("cost", _cost_sentences(method)),
        *_item("families", [_families(method)]),
    ]


def _item(name: str, texts: list[str]) -> list[str]:
    """A heading and its sentences, wrapped and indented below it; nothing where there is nothing to say."""
    lines = [line for text in texts for line in textwrap.wrap(text, _WIDTH - 2, subsequent_indent="  ")]
    return [f"{name}:", *(f"  {line}" for line in lines)] if texts else []


def phrase(value: Any) -> str:
    """A number, a schedule or a part of a method in few words."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return _number(value)
        case LinearSchedule() | ExponentialSchedule() | Adaptive():
            return f"{_number(value.start)} -> {_number(value.end)}{_course(value)}"
        case tuple():
            return " + ".join(map(phrase, value))
        case Share():
            fraction = _fraction(value)
            return f"{phrase(value.contexts)} {f'[{fraction}]' if ' ' in fraction else fraction}"
        case Mixture():
            return phrase(value.shares)
        case Sampler():
            return ", ".join(f"{field.name} {phrase(getattr(value, field.name))}" for field in _changed(value))
        case Rollout():
            return _with_settings(value, ("by",), f"{value.by} samples")
        case Replay():
            skip = ("rollout", "every" if value.fresh is not None else "fresh")
            return _with_settings(value, skip, f"{phrase(value.rollout)}, replayed")
        case BestOf():
            return _with_settings(value, ("rollout", "count"), f"{phrase(value.rollout)}, best of {value.count}")
    return _with_settings(value) if is_dataclass(value) else str(value)


def _course(value: LinearSchedule | ExponentialSchedule | Adaptive) -> str:
    """How a schedule gets from its start to its end."""
    if isinstance(value, Adaptive):
        return f", adaptive: {_with_settings(value, ('start', 'end'))}"
    if isinstance(value, ExponentialSchedule):
        return f" by {value.base:g}^-progress"
    when = "" if (value.begin, value.until) == (0, 1) else f"{value.begin:.0%}-{value.until:.0%} of "
    return f" over {when}training"


def sentence(value: Any) -> str:
    """A part of a method in one sentence, with all its settings in brackets."""
    match value:
        case Rollout():
            text, told = f"Sequences that the {value.by} samples now, for the labels of the batch", ("by",)
        case Replay():
            often = f"every {value.every} steps" if value.fresh is None else f"at a rate of {phrase(value.fresh)}"
            return (f"{sentence(value.rollout)}; each row keeps its last {value.capacity} and draws one at most "
                    f"{value.max_age} steps old, or samples anew {often}")  # fmt: skip
        case BestOf():
            best = "log p - log r, r the student at its start" if value.score == "difference" else "log p"
            dealt = ", the scores dealt out by chance" if value.shuffle else ""
            return f"{sentence(value.rollout)}; of {value.count} for each label, the one with the largest {best}{dealt}"
        case Accepted():
            asks = {"top_k": "top_k", "top_p": "nucleus", "neighbors": "neighbors"}
            text, told = first_sentence(value), tuple(name for name, rule in asks.items() if rule != value.rule)
        case Confidence():
            where = f"at or {'above' if value.side == 'high' else 'below'} its quantile"
            text = f"Weight 1 where the teacher's score is {where} (a moving average of former steps), floor elsewhere"
            told = ("side",)
        case _:
            text, told = first_sentence(value), ("contexts", "shares")
    settings = _settings(value, told, everything=True)
    return f"{text} [{settings}]" if settings else text


def first_sentence(value: Any) -> str:
    """The first sentence of a part's docstring, without its full stop and its backquotes."""
    opening = " ".join((getdoc(type(value)) or "").split("\n\n")[0].split()).replace("`", "")
    return re.split(r"(?<! al)(?<! eq)\.(?: |$)", opening)[0]


def _with_settings(value: Any, told: tuple[str, ...] = (), name: str | None = None) -> str:
    name = name or re.sub(r"\b(kl|jsd|taid)\b", lambda found: found[0].upper(), value.kind.replace("_", " "))
    settings = _settings(value, told)
    return f"{name} ({settings})" if settings else name


def _settings(value: Any, told: tuple[str, ...] = (), everything: bool = False) -> str:
    """The settings that are not `told` already: those that differ from the default, that the first sentence speaks of,
    and the first one that is on; with `everything` all of them. What is off by default (none, 0, no) is left out."""
    named, changed, found = [item for item in fields(value) if item.name not in ("kind", *told)], _changed(value), []
    for field in named:
        setting = getattr(value, field.name)
        spoken_of = everything or not found or re.search(rf"\b{field.name}\b", first_sentence(value))
        off = setting is None or setting is False or (setting == 0 and isinstance(setting, int))
        if field in changed or (spoken_of and not off and not isinstance(setting, Sampler)):
            found.append(phrase(setting) if isinstance(setting, Sampler) else f"{field.name} {phrase(setting)}")
    return ", ".join(found)


def _changed(value: Any) -> list[Field[Any]]:
    """The fields of a part that differ from their defaults."""

    def default(field: Field[Any]) -> Any:
        return field.default if field.default_factory is MISSING else field.default_factory()

    return [field for field in fields(value) if field.name != "kind" and getattr(value, field.name) != default(field)]


def _number(value: float) -> str:
    """Halves to sixteenths as fractions, below 1."""
    part = Fraction(value).limit_denominator(10**6)
    return str(part) if 0 < value < 1 and part.denominator in (2, 4, 8, 16) else f"{value:g}"


def _term(term: Term, method: Method) -> dict[str, Any]:
    return {
        "name": term.name, "on": _rows(term, method), "divergence": phrase(term.divergence),
        "space": phrase(term.space), "selection": phrase(term.selection), "credit": phrase(term.credit),
        "weight": phrase(term.weight), "normalizer": term.normalizer,
    }  # fmt: skip


def _rows(term: Term, method: Method) -> list[str]:
    """The sources that the term is on and that the contexts make."""
    return [source for source in method.contexts.sources if source in term.on] or ["nothing"]


def _prefixes(contexts: Contexts) -> list[str]:
    if isinstance(contexts, Mixture):
        return [f"share {_fraction(share)}: {text}" for share in contexts.shares for text in _prefixes(share.contexts)]
    targets = "; the data's codes stay the targets everywhere" if contexts.splices else ""
    return [f"{sentence(contexts)}{targets}"]


def _fraction(share: Share) -> str:
    return "the rest" if share.fraction == "rest" else phrase(share.fraction)


def _target(method: Method) -> str:
    if not any(term.divergence.needs_teacher for term in method.terms):
        return "no divergence looks at the teacher's distribution"
    return sentence(method.target)


def _term_sentences(term: Term, method: Method) -> list[str]:
    over = "all their positions" if term.normalizer == "total" else "what is selected there (one more pass finds it)"
    rows = " and ".join(_rows(term, method))
    texts = [f"weight {phrase(term.weight)}, mean on {rows} rows over {over}",
             f"compares: {sentence(term.divergence)}", f"positions: {sentence(term.selection)}",
             f"outcomes: {'Every code' if term.space == Full() else sentence(term.space)}"]  # fmt: skip
    if term.skew:
        texts.append(f"alpha: {sentence(term.skew)}")
    return texts if isinstance(term.credit, NoCredit) else [*texts, f"times: {sentence(term.credit)}"]


def _adapting(method: Method) -> list[str]:
    found = [f"method.{path}: {text}" for path, text in _schedules(method).items()]
    found += [f"{key.replace('adaptive.', 'method.')} is {sentence(value)}" for key, value in adaptives(method)]
    learnt = [(term, key) for term in method.terms for key in term.observed(1)]
    found += [f"the {key.split('/')[0]} of term {term.name}, after every update" for term, key in learnt]
    return found or ["nothing"]


def _families(method: Method) -> str:
    barred = [name for name, family in FAMILIES.items() if method.contexts.splices and family.residual_codes]
    fit = ", ".join(name for name in FAMILIES if name not in barred)
    if not barred:
        return fit
    return (f"{fit}; not {', '.join(barred)}: single codes are exchanged in data sequences, and later codes of a "
            "next-scale image encode what the earlier ones left over")  # fmt: skip


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


COSTS = ("student_train", "student_read", "student_decode", "teacher_read", "teacher_decode")
"""What an update asks for, in units of the batch: passes with and without gradient, and sequences decoded."""


@dataclass(frozen=True)
class Between:
    """The least and the most over training."""

    least: float
    most: float

    def phrase(self) -> str:
        least, most = _number(round(self.least, 4)), _number(round(self.most, 4))
        return least if least == most else f"{least} to {most}"


def update_cost(method: Method) -> dict[str, Between]:
    """By the names of `COSTS`: the least and the most over training, adaptive numbers at either end."""
    started, ended = ({key: torch.tensor([end(value)]) for key, value in adaptives(method)}
                      for end in (lambda value: value.start, lambda value: value.end))  # fmt: skip
    over_training = [cost_at(method.at(tenth / 10, state)) for tenth in range(11) for state in (started, ended)]
    return {
        name: Between(min(costs[name] for costs in over_training), max(costs[name] for costs in over_training))
        for name in COSTS
    }


def cost_at(method: Method) -> dict[str, float]:
    """The cost of one update by a method whose schedules are numbers. A guided row counts twice."""
    made = _making(method.contexts)
    passes = made["rows"] * (2 if isinstance(method.target, Guided) else 1)
    whole_step_first = [term for term in method.terms if term.normalizer == "selected"]
    teacher = any(term.needs_teacher for term in method.terms) + sum(term.needs_teacher for term in whole_step_first)
    student = sum(any(map(of_student, term.score_names)) for term in whole_step_first)
    return {
        "student_train": made["rows"],
        "student_read": made["student_read"] + student * made["rows"],
        "student_decode": made["student_decode"],
        "teacher_read": made["teacher_read"] + teacher * passes,
        "teacher_decode": made["teacher_decode"],
    }


def _making(contexts: Contexts) -> dict[str, float]:
    """What it takes to make the prefixes of one row of the batch; how many `rows`, and `student` rows, come of it."""
    cost = dict.fromkeys(("student_read", "student_decode", "teacher_read", "teacher_decode"), 0.0)
    cost |= {"rows": 1.0, "student": float("student" in contexts.sources)}
    decode = max((2.0 if sampler.guidance != 1 else 1.0 for sampler in contexts.samplers), default=0.0)
    match contexts:
        case Mixture():
            shares, total = contexts.fractions(), sum(contexts.fractions())
            makings = [_making(share.contexts) for share in contexts.shares]
            parts = list(zip(shares, makings, strict=True))
            return {name: sum(share / total * making[name] for share, making in parts) for name in cost}
        case BestOf():
            # The reference reads like a student, for it has the student's size.
            reads = {"teacher_read": 1.0, "student_read": float(contexts.needs_reference)}
            made = _making(contexts.rollout)
            return cost | {name: contexts.count * (made[name] + reads.get(name, 0)) for name in made if "_" in name}
        case Replay():
            often = 1 / contexts.every if contexts.fresh is None else value_of(contexts.fresh)
            return cost | {name: often * each for name, each in _making(contexts.rollout).items() if "_" in name}
        case ParallelSampling():
            rows = contexts.rounds + 1.0 if contexts.with_data else 1.0
            student = float(contexts.rounds) if contexts.with_data else 1.0
            return cost | {"rows": rows, "student": student, "student_read": float(contexts.rounds)}
        case Completions():
            return cost | {"teacher_decode": decode * contexts.count * (1 - value_of(contexts.prefix))}
        case MixtureSampling() | SpeculativeSampling():
            return cost | {"student_decode": decode, "teacher_decode": decode}
        case MixedRollout():  # what every row keeps is read in one pass
            return cost | {f"{contexts.by}_decode": decode * (1 - value_of(contexts.low))}
        case Rollout():
            return cost | {f"{contexts.by}_decode": decode}
    return cost | {"student_decode": decode}


def _cost_sentences(method: Method) -> list[str]:
    cost = {name: between.phrase() for name, between in update_cost(method).items()}
    once = [] if isinstance(method.images, AllImages) else ["once, before training: both models read every image"]
    return [
        "of an update, in batches of B sequences of L codes; a decode takes one cached step per step of the plan",
        f"student: {cost['student_train']} trained, {cost['student_read']} read without gradient, "
        f"{cost['student_decode']} decoded",
        f"teacher: {cost['teacher_read']} read, {cost['teacher_decode']} decoded",
        *once,
    ]
