"""Methods in words: they follow the value, cost what is counted, and stand in docs/methods.md for every preset."""

from __future__ import annotations

import re
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reference import step_inputs
from varkd.backbones.llamagen import LlamaGen
from varkd.distill.credit import FutureReturn, NoCredit, Reward
from varkd.distill.describe import describe_presets, explain, format_term, phrase
from varkd.distill.divergences import CrossEntropy, DivergenceRule, ForwardKL, ReverseKL
from varkd.distill.inputs import State, StepInputs
from varkd.distill.loss import Stats, denominators, distill_loss
from varkd.distill.method import COSTS, Method, Term
from varkd.distill.mixture import Mixture, Share
from varkd.distill.prefixes import Completions, Data, Rollout
from varkd.distill.replay import Replay
from varkd.distill.schedule import ExponentialSchedule, LinearSchedule, Plateau, TaidTime, adaptives
from varkd.distill.selection import Accepted, Confidence
from varkd.distill.skew import SequenceSkew
from varkd.distill.target import Guided, Truncated
from varkd.methods import METHODS
from varkd.rollout import Sampler
from varkd.types import Batch
from varkd.world import Rng, World

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "methods.md").read_text()
ROWS, STEPS = 16, 8


def parts_of(kind: Any) -> Iterator[type]:
    """Every dataclass that a method can be made of."""
    if is_dataclass(kind) and isinstance(kind, type):
        yield kind
        hints = typing.get_type_hints(kind)
        for field in fields(kind):
            yield from parts_of(hints[field.name])
    for argument in typing.get_args(kind):
        if not isinstance(argument, str | int | float | bool):
            yield from parts_of(argument)


PARTS = sorted(set(parts_of(Method)), key=lambda kind: kind.__name__)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.5, "1/2"), (0.75, "3/4"), (0.125, "1/8"), (0.1, "0.1"), (0.49, "0.49"), (1.0, "1"), (2.5, "2.5"),
        (0.0, "0"), (10**6, "1000000"), (True, "yes"), (None, "none"),
        (LinearSchedule(1.0, 0.5, 0.1, 0.4), "1 -> 1/2 over 10%-40% of training"),
        (LinearSchedule(0.0, 1.0), "0 -> 1 over training"),
        (ExponentialSchedule(1.0, 0.0, 20.0), "1 -> 0 by 20^-progress"),
        (TaidTime(alpha=0.01), "0.4 -> 1, adaptive: TAID time (alpha 0.01)"),
        (Plateau(step=0.25), "0 -> 1, adaptive: plateau (step 1/4, tolerance 0.1)"),
        (Rollout(by="teacher", sampler=Sampler(guidance=1.5)), "teacher samples (guidance 1.5)"),
        (Mixture((Share(Data(), 0.5), Share(Rollout(), 0.5))), "data 1/2 + student samples 1/2"),
        (Mixture((Share(Data(), "rest"), Share(Replay(every=2), LinearSchedule(0.0, 0.5)))),
         "data [the rest] + student samples, replayed (every 2, max_age 20) [0 -> 1/2 over training]"),
        (Completions(count=3), "completions (count 3, prefix 1/2)"),
        (Confidence(0.5, side="low", per_position=False),
         "confidence (quantile 1/2, score max_prob, floor 0.1, side low, per_position no)"),
        (Accepted("top_k", top_k=5), "accepted (rule top_k, floor 0.1)"),
        (Reward(None), "reward (clip none)"),
        (FutureReturn(scale=0.5), "future return (mean yes, scale 1/2)"),
        (Truncated(), "truncated (top_p 0.95)"), (Guided(1.5, 3.0), "guided (scale 1.5, highest 3)"),
        (ReverseKL(), "reverse KL"), (NoCredit(), "no credit"),
    ],
)  # fmt: skip
def test_phrases(value: Any, words: str):
    assert phrase(value) == words


def test_a_term_on_one_line():
    (row,) = describe_presets({"eopd": METHODS["eopd"]})
    assert [format_term(term) for term in row["terms"]] == [
        "reverse KL on student rows",
        "forward KL on student rows; confidence (quantile 1/2, score entropy, floor 0, side low)",
    ]
    (row,) = describe_presets({"atkd": METHODS["atkd"]})
    assert format_term(row["terms"][0]).startswith("0.2 x decoupled (part rest, of code) on data rows; confidence (")
    assert all(format_term(term).endswith("; mean over what is selected") for term in row["terms"])


OTHERS: dict[str, Any] = {
    "rollout": Rollout("teacher"), "sampler": Sampler(temperature=0.7), "fresh": 0.3, "highest": 3.0, "clip": None,
    "threshold": None, "alpha": 0.3, "time": 0.3, "shares": (Share(Data(), 0.25), Share(Rollout(), 0.75)),
    "contexts": Rollout(), "fraction": 0.75, "count": 9, "factor": 7,
}  # fmt: skip
"""Another value of a setting, by its name, where its type does not say one."""
MADE = {
    "TopK": {"count": 5},
    "Mixture": {"shares": (Share(Data(), 0.5), Share(Rollout(), 0.5))},
    "LinearSchedule": {"start": 0.2, "end": 0.9},
    "ExponentialSchedule": {"start": 0.2, "end": 0.9},
    "SkewKL": {"alpha": SequenceSkew()},
}
RULES = {"top_k": "top_k", "top_p": "nucleus", "neighbors": "neighbors"}


def other(kind: type, name: str, value: Any) -> Any:
    hint = typing.get_type_hints(kind)[name]
    if name in OTHERS and OTHERS[name] != value:
        return OTHERS[name]
    if typing.get_origin(hint) is typing.Literal:
        return next(each for each in typing.get_args(hint) if each != value)
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2 + 0.01


@pytest.mark.parametrize("kind", [kind for kind in PARTS if hasattr(kind, "summary")], ids=lambda kind: kind.__name__)
def test_every_part_says_what_it_is_and_every_setting_shows(kind: Any):
    part = kind(**MADE.get(kind.__name__, {}))
    said = lambda part: (
        f"{part.summary} {part.rule}" if hasattr(part, "rule") and kind is not Accepted else part.summary
    )
    assert 5 < len(said(part)) < 300 or part == NoCredit()
    assert "`" not in said(part) and said(part).count("(") == said(part).count(")")
    for field in fields(part):
        if field.name == "kind":
            continue
        asked = replace(part, rule=RULES[field.name]) if kind is Accepted and field.name in RULES else part
        asked = replace(asked, count=None) if field.name == "factor" else asked
        changed = replace(asked, **{field.name: other(kind, field.name, getattr(asked, field.name))})
        assert said(changed) != said(asked), field.name


def test_an_unknown_part_must_say_what_it_is():
    class Silent(DivergenceRule):
        pass

    with pytest.raises(TypeError, match="summary"):
        Silent()  # type: ignore[abstract]


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_is_explained_whole(name: str):
    method = METHODS[name].method
    lines = explain(method)
    assert all(len(line) <= 110 for line in lines)
    headings = [line for line in lines if not line.startswith(" ")]
    terms = [f"term {term.name}:" for term in method.terms]
    assert [head for head in headings if head != "images:"] == [
        "prefixes:",
        "target:",
        *terms,
        "adapts:",
        "cost:",
        "families:",
    ]
    assert ("images:" in headings) == (name == "miniplm")


def test_the_words_follow_the_value():
    """Each of these changes moves the lines about it, and no others."""

    def moved(method: Method) -> list[str]:
        before, after = explain(METHODS["kd"].method), explain(method)
        return [line.strip() for line in after if line not in before]

    kd = METHODS["kd"].method
    term = kd.terms[0]
    assert moved(kd) == []
    assert moved(replace(kd, terms=(replace(term, divergence=ReverseKL()),))) == [
        "compares: reverse KL, KL(q || p) = sum q (log q - log p)"
    ]
    assert moved(replace(kd, terms=(replace(term, weight=LinearSchedule(1.0, 0.0)),))) == [
        "weight 1 -> 0 over training, mean on data rows over all their positions",
        "method.terms.0.weight: 1 -> 0 over training",
    ]
    sampled = " ".join(moved(replace(kd, contexts=Rollout(sampler=Sampler(temperature=0.7)))))
    assert "sequences that the student samples now" in sampled and "temperature 0.7" in sampled
    assert "on student rows" in sampled and "1 decoded" in sampled
    low = " ".join(moved(replace(kd, terms=(replace(term, selection=Confidence(side="low")),))))
    assert "at or below its quantile 1/2" in low and "the threshold of term kd" in low
    guided = " ".join(moved(replace(kd, target=Guided(2.5))))
    assert "the guided teacher" in guided and "scale 2.5" in guided and "teacher: 2 read" in guided


def test_varkd_is_told_as_the_paper_has_it():
    """Mixed rollouts, the entropy weight with its truncation, groups of look-alike codes."""
    said = " ".join(line.strip() for line in explain(METHODS["varkd"].method))
    for words in (
        "10 % of the rows: mixed rollouts: the first part of a data sequence, between 1/4 and 3/4 of it, continued by",
        "all other rows: the images' own codes",
        "only what was generated counts",
        "compares: reverse KL, KL(q || p)",
        "a_t = 1 - H(p) / log V, the teacher's confidence; nothing counts after the first generated position with a_t",
        "outcomes: the masses of V / 4 groups of look-alike codes (k-means of the codebook)",
    ):
        assert words in said


def test_a_term_without_rows_is_shown_to_have_none():
    lines = explain(Method((Term("ce", CrossEntropy()), Term("kd", ForwardKL(), on=("student",)))))
    assert "  weight 1, mean on nothing rows over all their positions" in lines


def test_adaptive_numbers_are_explained():
    said = " ".join(line.strip() for line in explain(METHODS["distillm"].method))
    assert "method.contexts.shares.1.fraction is DistiLLM's phi" in said and "tolerance 0.1" in said
    said = " ".join(line.strip() for line in explain(METHODS["taid"].method))
    assert "method.terms.0.divergence.time is TAID's t" in said and "momentum 0.99" in said
    said = " ".join(line.strip() for line in explain(METHODS["distillm2"].method))
    assert said.count("the skew of term") == 2 and said.count("one number for each sequence in [0.01, 0.1]") == 2


def test_families_that_cannot_be_trained_are_named():
    for name, preset in METHODS.items():
        said = explain(preset.method)[-2:]
        barred = name in ("scheduled_sampling", "scheduled_sampling_parallel", "tiekd")
        assert ("not var" in " ".join(said)) == barred, name


class Counted:
    """Counts what two models are asked for: sequences passed with and without gradient, and decoded."""

    def __init__(self, student: LlamaGen, teacher: LlamaGen) -> None:
        self.counts: Counter[str] = Counter()
        for name, model in (("student", student), ("teacher", teacher)):
            self._watch(name, model)

    def _watch(self, name: str, model: LlamaGen) -> None:
        forward, start, step = model.forward, model.start, model.step

        def counted_forward(codes_BL: torch.Tensor, *rest: Any) -> torch.Tensor:
            trained = name == "student" and torch.is_grad_enabled()
            self.counts[f"{name}_{'train' if trained else 'read'}"] += len(codes_BL)
            return forward(codes_BL, *rest)

        def counted_start(condition: Any, *rest: Any) -> Any:
            self.counts[f"{name}_decode"] += len(condition)
            return start(condition, *rest)

        def counted_step(state: Any, codes_Bn: torch.Tensor) -> torch.Tensor:
            self.counts[f"{name}_decode"] += len(codes_Bn)
            return step(state, codes_Bn)

        for attribute, watched in (("forward", counted_forward), ("start", counted_start), ("step", counted_step)):
            object.__setattr__(model, attribute, watched)

    def per_update(self, length: int) -> dict[str, float]:
        whole = ROWS * STEPS
        return {name: self.counts[name] / whole / (length if name.endswith("decode") else 1) for name in COSTS}


@pytest.mark.parametrize("name", METHODS)
def test_the_cost_is_what_is_counted(name: str, make_model: Callable[..., LlamaGen], make_batch: Callable[..., Batch]):
    """Eight updates on counted models. Shares are met to within a row, so costs are to within a row of the batch."""
    student = make_model(1, dtype=torch.float32)
    teacher = make_model(2, dtype=torch.float32).eval().requires_grad_(False)
    counted = Counted(student, teacher)
    whole = METHODS[name].method
    state: State = {key: torch.tensor([0.5]) for key, _ in adaptives(whole)}
    progress = {"distillm": 0.0, "dagger": 0.25}.get(name, 0.5)  # where no coin decides what is sampled
    method = whole.at(progress, state)
    codebook_tables = method.prepare(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)))
    for step in range(STEPS):
        rng = Rng(0, step)
        inputs = step_inputs(student, teacher, state, rng, codebook_tables=codebook_tables, reference=student)
        context = method.contexts(make_batch(ROWS, seed=step), inputs)
        inputs = StepInputs(method, student, teacher, state, rng, codebook_tables=codebook_tables)
        totals, stats = denominators(inputs, context), Stats()
        for micro in context.micro_batches(2):
            loss, found = distill_loss(inputs, micro, totals)
            stats.merge(found)
            assert torch.isfinite(loss)
        state = method.update(state, context, stats.collect(World()).observed, rng)
    measured, told = counted.per_update(length=6), method.cost
    for key in COSTS:
        assert measured[key] == pytest.approx(told[key], abs=1 / ROWS), (key, measured, told)


def test_the_cost_over_training_is_a_range():
    (row,) = describe_presets({"dagger": METHODS["dagger"]})
    assert row["cost"] == {
        "student_train": "1",
        "student_read": "0",
        "student_decode": "0 to 1/2",
        "teacher_read": "1",
        "teacher_decode": "0 to 1",
    }


def table_row(row: dict[str, Any]) -> str:
    """A preset's line in docs/methods.md."""
    target = "" if row["target"] == "plain" else f"; target {row['target']}"
    images = "" if row["images"] == "all images" else f"; images: {row['images']}"
    terms = "<br>".join(format_term(term) for term in row["terms"])
    return f"| `{row['name']}` | {row['contexts']}{target}{images} | {terms} | {' / '.join(row['cost'].values())} |"


def test_the_page_has_the_table():
    """When this fails, the line on the left belongs into docs/methods.md."""
    lines = PAGE.splitlines()
    for row in describe_presets(METHODS):
        assert table_row(row) in lines
    named = [found[1] for line in lines if (found := re.match(r"\| `(\w+)` \|", line)) and found[1] in METHODS]
    assert named == list(METHODS), "one row each, in the order of the table"


def test_the_page_has_a_paragraph_on_every_preset():
    found = re.findall(r"^### `(\w+)`\n\n(.+?)(?=\n\n)", PAGE, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in found] == list(METHODS)
    short = [name for name, text in found if len(text.split()) < 25]
    assert short == []


@pytest.mark.parametrize("kind", PARTS, ids=lambda kind: kind.__name__)
def test_the_page_names_every_part(kind: type):
    assert re.search(rf"`{kind.__name__}\b", PAGE)
