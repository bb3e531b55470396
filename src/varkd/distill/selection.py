"""Which positions count, and how much: `(scores, part, space, memory, rng) -> weight_BL` in [0, 1], detached.

A selection reads scores and thresholds that were fixed before the step, never the step's own batch: so the loss does
not depend on how the batch is split. Thresholds adapt once per optimizer step, from all ranks (`Remembers`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from varkd.distill.neighbors import nearest_codes
from varkd.distill.schedule import Schedule, check_range, value_of, words
from varkd.distill.scores import (
    ClusterMass,
    CodeProb,
    CodeRatio,
    Entropy,
    InNucleus,
    Margin,
    MaxProb,
    NearRatio,
    ProposalAccepted,
    Remembers,
    Score,
    Scores,
    TopKAgrees,
)
from varkd.distill.spaces import CodebookTables, Space
from varkd.errors import VarkdError
from varkd.types import Part
from varkd.world import Rng

ScoreName = Literal["max_prob", "entropy", "margin", "cluster_mass", "code_prob"]
_SCORES = {"max_prob": MaxProb(), "entropy": Entropy(), "margin": Margin(), "code_prob": CodeProb()}


class SelectionRule(ABC):
    """Base of all selections. Most read no score, need nothing of the codebook, and keep `floor` of what they drop."""

    floor: float = 0.0
    keeps_all: ClassVar[bool] = False
    """Whether every position counts fully, so that there is nothing to audit."""
    statistic_names: ClassVar[tuple[str, ...]] = ()
    """What `statistics` reports beside the share of positions of weight 1."""

    @property
    def remembers(self) -> Remembers | None:
        """Itself where it remembers something between steps."""
        return None

    def statistics(self, weight_BL: Tensor, part: Part) -> dict[str, tuple[Tensor, float]]:
        """Numerators and denominators for the log, by name."""
        del weight_BL, part
        return {}

    @property
    @abstractmethod
    def summary(self) -> str:
        """Which positions count, and how much, in words and with its settings."""

    @abstractmethod
    def __call__(self, scores: Scores, part: Part, space: Space, memory: Tensor | None, rng: Rng) -> Tensor:
        """The weight of every position, (B, L); `memory` is what it remembers from former steps."""

    def reads(self, space: Space) -> tuple[Score, ...]:
        """The scores that it reads; raises `VarkdError` where `space` does not have one of them."""
        del space
        return ()

    def kept_share(self, weight_BL: Tensor) -> Tensor:
        """How far each weight stands above the floor: 1 where a position counts fully, 0 where it has the floor."""
        return torch.where(weight_BL == 1, 1.0, (weight_BL - self.floor) / max(1 - self.floor, 1e-12))

    def prepare(self, codebook_VE: Tensor) -> CodebookTables:
        """What it needs of the tokenizer, made once before training."""
        del codebook_VE
        return {}


@dataclass(frozen=True)
class All(SelectionRule):
    """Every position, fully."""

    kind: Literal["all"] = "all"
    keeps_all: ClassVar[bool] = True

    @property
    def summary(self) -> str:
        return "every position"

    def __call__(self, scores: Scores, part: Part, space: Space, memory: Tensor | None, rng: Rng) -> Tensor:
        del scores, space, memory, rng
        return torch.ones(part.codes_BL.shape, device=part.codes_BL.device)


@dataclass(frozen=True)
class Confidence(SelectionRule, Remembers):
    """Trust the teacher where it is confident: weight 1 at and above the `quantile` of its score, `floor` below.

    The quantile is taken per position (generation rank), as a moving average over batches, so that no part of the image
    is dropped as a whole; `per_position=False` pools all positions. Until the first update every position is kept.
    `cluster_mass` measures confidence in the term's own clusters, `code_prob` is the teacher's probability of the
    target code. `side="low"` keeps the positions at and below the quantile instead.
    """

    quantile: Schedule = 0.5
    score: ScoreName = "max_prob"
    floor: float = 0.1
    decay: float = 0.9
    side: Literal["high", "low"] = "high"
    per_position: bool = True
    kind: Literal["confidence"] = "confidence"
    shown: ClassVar[tuple[str, ...]] = ("quantile", "score", "floor")
    memory: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        check_range("confidence", "quantile", self.quantile, 0, 1)
        check_range("confidence", "floor", self.floor, 0, 1)
        check_range("confidence", "exponential", self.decay, 0, 1)

    @property
    def summary(self) -> str:
        where = "at or above" if self.side == "high" else "at or below"
        pooled = "taken at each position apart" if self.per_position else "taken over all positions"
        return (
            f"weight 1 where the teacher's {self.score} is {where} its quantile {words(self.quantile)}, {pooled} and "
            f"averaged over former steps (decay {words(self.decay)}), {words(self.floor)} elsewhere"
        )

    @property
    def remembers(self) -> Remembers:
        return self

    def reads(self, space: Space) -> tuple[Score, ...]:
        return (self._score(space),)

    def _score(self, space: Space) -> Score:
        """The score that is compared with its quantile."""
        if self.score != "cluster_mass":
            return _SCORES[self.score]
        if space.clusters is None:
            raise VarkdError("confidence: score 'cluster_mass' needs a term whose space is 'clusters'")
        return ClusterMass(space.clusters.key)

    def __call__(self, scores: Scores, part: Part, space: Space, memory: Tensor | None, rng: Rng) -> Tensor:
        del rng
        score_BL = scores[self._score(space)]
        if memory is None:
            return torch.ones_like(score_BL)
        threshold = memory[part.plan.rank_BL] if self.per_position else memory
        kept = score_BL >= threshold if self.side == "high" else score_BL <= threshold
        return torch.where(kept, 1.0, self.floor)

    def width(self, length: int) -> int:
        return length

    def observed(self, scores: Scores, part: Part, space: Space) -> Tensor:
        """The score by generation rank, (B, L)."""
        return scores[self._score(space)].gather(1, part.plan.order_BL)

    def updated(self, memory: Tensor | None, observed_BX: Tensor) -> Tensor:
        """The threshold, (L,) or (1,), moved towards the quantile of this step's scores (all rows of all ranks)."""
        scores = observed_BX if self.per_position else observed_BX.reshape(-1, 1)
        fresh_L = scores.quantile(value_of(self.quantile), dim=0)
        return fresh_L if memory is None else self.decay * memory + (1 - self.decay) * fresh_L


@dataclass(frozen=True)
class EntropyWeight(SelectionRule):
    """VarKD's entropy weight (2606.06078): a_t = 1 - H(p) / log V, and 0 once the teacher is lost.

    Equations 8 and 9 of the paper.
    H is the teacher's entropy over the full codebook. At the first generated position, in generation order, where a_t
    falls below `threshold` (0.1 in the paper), all strictly later decoding steps get 0; None never truncates. Data rows
    hold no generated position, so they are weighed but not truncated. `permuted` is the control: the same weights,
    randomly permuted over the positions of each sequence.
    """

    threshold: float | None = 0.1
    permuted: bool = False
    kind: Literal["entropy_weight"] = "entropy_weight"
    statistic_names: ClassVar[tuple[str, ...]] = (
        "confidence",
        *(f"confidence_q{quarter}" for quarter in range(1, 5)),
        "truncated",
        "truncated_sequences",
    )

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_range("entropy_weight", "threshold", self.threshold, 0, 1)

    @property
    def summary(self) -> str:
        cut = (
            ""
            if self.threshold is None
            else (f"; nothing counts after the first generated position with a_t < {words(self.threshold)}")
        )
        control = "; the weights permuted at random over the positions of a sequence" if self.permuted else ""
        return f"each position counts a_t = 1 - H(p) / log V, the teacher's confidence{cut}{control}"

    def reads(self, space: Space) -> tuple[Score, ...]:
        del space
        return (Entropy(),)

    def __call__(self, scores: Scores, part: Part, space: Space, memory: Tensor | None, rng: Rng) -> Tensor:
        del space, memory
        weight_BL = (1 + scores[Entropy()]).clamp(0, 1)  # the score is -H / log V
        weight_BL = weight_BL.masked_fill(self._lost_BL(weight_BL, part), 0.0)
        return _permuted(weight_BL, part, rng) if self.permuted else weight_BL

    def _lost_BL(self, confidence_BL: Tensor, part: Part) -> Tensor:
        """Bool (B, L): strictly later than the first generated position with too little confidence."""
        if self.threshold is None or part.source == "data":
            return torch.zeros_like(confidence_BL, dtype=torch.bool)
        low_BL = confidence_BL < self.threshold
        if part.generated_BL is not None:
            low_BL = low_BL & part.generated_BL
        step_BL = part.plan.step_BL
        first_B1 = torch.where(low_BL, step_BL, len(part.plan.sizes)).amin(1, keepdim=True)
        return step_BL > first_B1

    def statistics(self, weight_BL: Tensor, part: Part) -> dict[str, tuple[Tensor, float]]:
        """Of the generated positions: the mean weight, by quarter of the generation order too, and what was cut."""
        if part.source == "data":
            return {}
        counts_BL = torch.ones_like(weight_BL) if part.generated_BL is None else part.generated_BL.to(weight_BL.dtype)
        by_rank_BL, counted_BL = (value.gather(1, part.plan.order_BL) for value in (weight_BL * counts_BL, counts_BL))
        quarters = zip(by_rank_BL.tensor_split(4, 1), counted_BL.tensor_split(4, 1), strict=True)
        cut_BL = (weight_BL == 0) * counts_BL
        return {
            "confidence": (by_rank_BL.sum(), float(counted_BL.sum())),
            **{f"confidence_q{n}": (w.sum(), float(c.sum())) for n, (w, c) in enumerate(quarters, 1)},
            "truncated": (cut_BL.sum(), float(counts_BL.sum())),
            "truncated_sequences": ((cut_BL.sum(1) > 0).sum(), float(len(cut_BL))),
        }


def _permuted(weight_BL: Tensor, part: Part, rng: Rng) -> Tensor:
    """The weights of each row, moved to other positions that count (the generated ones in a mixed rollout)."""
    counts_BL = torch.ones_like(weight_BL, dtype=torch.bool) if part.generated_BL is None else part.generated_BL
    noise_BL = rng.uniform("permute", part.row_B, weight_BL.shape[1])
    here_BL = torch.arange(weight_BL.shape[1], device=weight_BL.device).expand_as(weight_BL)
    source_BL = torch.where(counts_BL, here_BL, here_BL.shape[1] + here_BL).argsort(1)
    target_BL = torch.where(counts_BL, noise_BL, 1.0 + here_BL).argsort(1)
    return weight_BL.scatter(1, target_BL, weight_BL.gather(1, source_BL))


@dataclass(frozen=True)
class Random(SelectionRule):
    """The control of `Confidence`: the same kept fraction (1 - quantile), chosen by chance."""

    quantile: Schedule = 0.5
    floor: float = 0.1
    kind: Literal["random"] = "random"
    shown: ClassVar[tuple[str, ...]] = ("quantile", "floor")

    def __post_init__(self) -> None:
        check_range("random", "quantile", self.quantile, 0, 1)
        check_range("random", "floor", self.floor, 0, 1)

    @property
    def summary(self) -> str:
        share = f"a share {words(self.quantile)} of the positions, drawn by chance,"
        return f"{share} counts {words(self.floor)}, the others 1"

    def __call__(self, scores: Scores, part: Part, space: Space, memory: Tensor | None, rng: Rng) -> Tensor:
        del scores, space, memory
        uniform_BL = rng.uniform("select", part.row_B, part.codes_BL.shape[1])
        return torch.where(uniform_BL >= value_of(self.quantile), 1.0, self.floor)


@dataclass(frozen=True)
class Accepted(SelectionRule):
    """SelecTKD, 2510.24021: weight 1 where the teacher accepts what the student proposes, `floor` elsewhere.

    `top_k`: the student's likeliest code is among the teacher's `top_k` likeliest. `speculative`: y ~ q passes with
    probability min(1, p(y) / q(y)) (our reading of "non-greedy propose-and-verify"). The others judge the code that
    stands in the sequence, so they ask whether the prefix goes on plausibly: `nucleus`, it lies in the teacher's
    nucleus of mass `top_p`; `code`, the weight rises from `floor` to 1 with min(1, p / q); `neighbors`, the same with
    the teacher's mass over the codes nearest to it (`neighbors` of them, itself included: LANTERN, 2410.03355).
    """

    rule: Literal["top_k", "speculative", "code", "nucleus", "neighbors"] = "top_k"
    top_k: int = 5
    floor: float = 0.1
    top_p: float = 0.9
    neighbors: int = 8
    kind: Literal["accepted"] = "accepted"
    shown: ClassVar[tuple[str, ...]] = ("rule", "floor")

    def __post_init__(self) -> None:
        check_range("accepted", "floor", self.floor, 0, 1)
        check_range("accepted", "top_p", self.top_p, 0, 1)
        for name in ("top_k", "neighbors"):
            if getattr(self, name) < 1:
                raise VarkdError(f"accepted: {name} must be at least 1, got {getattr(self, name)}")

    @property
    def nearest_key(self) -> str:
        """Where the products keep the nearest codes."""
        return f"nearest/{self.neighbors}"

    def prepare(self, codebook_VE: Tensor) -> CodebookTables:
        if self.rule != "neighbors":
            return {}
        return {self.nearest_key: nearest_codes(codebook_VE, self.neighbors)[0]}

    @property
    def summary(self) -> str:
        passes = {
            "top_k": f"the student's likeliest code is among the teacher's first {self.top_k}",
            "speculative": "a code drawn by the student passes with probability min(1, p / q)",
            "nucleus": f"the code lies in the teacher's nucleus of mass {words(self.top_p)}",
        }
        if self.rule in passes:
            return f"weight 1 where {passes[self.rule]}, {words(self.floor)} elsewhere"
        p = "p" if self.rule == "code" else f"the teacher's mass over the {self.neighbors} codes nearest to it"
        return f"the weight of a code rises from {words(self.floor)} to 1 with min(1, P / q), P = {p}"

    def reads(self, space: Space) -> tuple[Score, ...]:
        del space
        return (self._score,)

    @property
    def _score(self) -> Score:
        return {
            "top_k": TopKAgrees(self.top_k),
            "speculative": ProposalAccepted(),
            "code": CodeRatio(),
            "nucleus": InNucleus(self.top_p),
            "neighbors": NearRatio(self.nearest_key),
        }[self.rule]

    def __call__(self, scores: Scores, part: Part, space: Space, memory: Tensor | None, rng: Rng) -> Tensor:
        del part, space, memory, rng
        score_BL = scores[self._score]
        if self.rule in ("code", "neighbors"):
            return self.floor + (1 - self.floor) * score_BL
        return torch.where(score_BL > 0, 1.0, self.floor)


Selection = All | Confidence | EntropyWeight | Random | Accepted
