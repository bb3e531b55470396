"""What an optimizer step says of itself, and when a person should be told that a part of the method is misconfigured.

Means are sums over the whole step and all ranks. An *audit* asks for numbers that cost a pass more, so only updates
that are logged have them; neither the loss nor its gradient sees whether one was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from varkd.distill.method import Term
from varkd.distill.scores import Entropy, ScoreInputs, TeacherLogp, position_scores
from varkd.types import Part
from varkd.world import World

LEAST_KEPT = 0.1


@dataclass
class Stats:
    """Sums over micro-batches: `sums[name]` is (numerator, denominator); `observed[key]` holds numbers per sequence.

    Keys of `observed` are those of the method's state (`Term.memories`).
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    observed: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, name: str, numerator: Tensor | float, denominator: Tensor | float) -> None:
        pair = torch.stack([torch.as_tensor(value, dtype=torch.float64).cpu() for value in (numerator, denominator)])
        self.sums[name] = self.sums.get(name, torch.zeros(2, dtype=torch.float64)) + pair

    def declare(self, terms: tuple[Term, ...], part: Part, audit: bool) -> None:
        """Enter every name with nothing: a rank without rows of some source must still join the collectives."""
        more = ("teacher_nll", "teacher_surprise") if audit else ()
        for name in ("age", "accepted", *more):
            self.add(f"{name}/student", 0.0, 0.0)
        for term in terms:
            for name in ("kept", "reward", "skew", *term.selection.statistic_names, *(("kept_kl",) if audit else ())):
                self.add(f"{name}/{term.name}", 0.0, 0.0)
            for key, each in term.memories.items():
                self.observe(key, torch.zeros(0, each.width(part.codes_BL.shape[1]), device=part.codes_BL.device))

    def observe(self, key: str, value_BX: Tensor) -> None:
        self.observed.setdefault(key, []).append(value_BX)

    def merge(self, other: Stats) -> None:
        for name, pair in other.sums.items():
            self.add(name, pair[0], pair[1])
        for name, parts in other.observed.items():
            self.observed.setdefault(name, []).extend(parts)

    def collect(self, world: World) -> StepStats:
        """The means and the observed numbers of the whole step, of all ranks. Every rank must call it."""
        return StepStats(self._means(world), self._gathered(world))

    def _means(self, world: World) -> dict[str, float]:
        """Each name's numerator over its denominator, summed over ranks (names are the same on every rank)."""
        names = sorted(self.sums)
        if not names:
            return {}
        total = world.sum(torch.stack([self.sums[name] for name in names]))
        return {name: float(top / bottom) for name, (top, bottom) in zip(names, total, strict=True) if bottom > 0}

    def _gathered(self, world: World) -> dict[str, Tensor]:
        """What was observed in this step on all ranks, by key."""
        return {key: world.gather_varied(torch.cat(parts)) for key, parts in sorted(self.observed.items())}


@dataclass(frozen=True)
class StepStats(Mapping[str, float]):
    """The means of a step by name, and what the method's state learns from it (`Method.update`)."""

    means: dict[str, float]
    observed: dict[str, Tensor]

    def __getitem__(self, name: str) -> float:
        return self.means[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.means)

    def __len__(self) -> int:
        return len(self.means)


def sequence_stats(part: Part, stats: Stats) -> None:
    """Age and acceptance of student rows."""
    if part.source != "student":
        return
    stats.add("age/student", part.age_B.sum(), len(part))
    if part.accept_BL is not None:
        stats.add("accepted/student", part.accept_BL.double().sum(), part.accept_BL.numel())


def teacher_drift(part: Part, logits: Callable[[slice], Tensor], chunk_rows: int, stats: Stats) -> None:
    """How likely the teacher finds the codes of student rows, and how much less than it expects of its own samples."""
    if part.source != "student" or not len(part):
        return
    scores = position_scores((TeacherLogp(), Entropy()), ScoreInputs(part.codes_BL.flatten(), logits), {}, chunk_rows)
    nll_N = -scores[TeacherLogp()].double()
    vocab_size = logits(slice(0, 1)).shape[-1]
    entropy_N = -scores[Entropy()].double() * math.log(vocab_size)
    stats.add("teacher_nll/student", nll_N.sum(), len(nll_N))
    stats.add("teacher_surprise/student", (nll_N - entropy_N).sum(), len(nll_N))


def kept_divergence(term: Term, value_N: Tensor, kept_N: Tensor, stats: Stats) -> None:
    """The share of a term's divergence that stands where its selection lets it count; `kept_N` < 0: not its row."""
    mine_N = (kept_N >= 0) & value_N.isfinite()
    value_M, kept_M = value_N[mine_N].double(), kept_N[mine_N].double()
    stats.add(f"kept_kl/{term.name}", (value_M * kept_M).sum(), value_M.sum())


def guard_rails(values: Mapping[str, float], warm: bool) -> dict[str, str]:
    """What is out of bounds among the means of a logged update, by its name: text for a person.

    `warm`: whether the warm-up of the learning rate is over; before that a student's divergences say little.
    """
    found = {}
    for name, value in values.items():
        kind, _, term = name.partition("/")
        if kind == "kept_kl" and warm and value < LEAST_KEPT:
            found[name] = (
                f"the selection of term '{term}' keeps {value:.1%} of its divergence (less than {LEAST_KEPT:.0%}): it "
                "picks positions where there is nothing to learn; loosen it, raise its floor or take another score"
            )
    return found
