"""Which positions count, and how much: `(scores, part, space, state, rng) -> weight_BL` in [0, 1], detached.

A selection reads scores and thresholds that were fixed before the step, never the step's own batch: so the loss does
not depend on how the batch is split. Thresholds adapt in `update`, once per optimiser step, from all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from varkd.distill.schedule import Scalar, check_range, number
from varkd.distill.scores import Scores, cluster_mass_name
from varkd.distill.spaces import Clusters, Space
from varkd.errors import VarkdError
from varkd.types import Part
from varkd.world import Rng


@dataclass(frozen=True)
class All:
    """Every position, fully."""

    kind: Literal["all"] = "all"

    def score_names(self, space: Space) -> tuple[str, ...]:
        del space
        return ()

    def __call__(self, scores: Scores, part: Part, space: Space, threshold_L: Tensor | None, rng: Rng) -> Tensor:
        del scores, space, threshold_L, rng
        return torch.ones(part.codes_BL.shape, device=part.codes_BL.device)


@dataclass(frozen=True)
class Confidence:
    """Trust the teacher where it is confident: weight 1 at and above the `quantile` of its score, `floor` below.

    The quantile is taken per position (generation rank), as a moving average over batches, so that no part of the image
    is dropped as a whole; `per_position=False` pools all positions. Until the first update every position is kept.
    `cluster_mass` measures confidence in the term's own clusters, `code_prob` is the teacher's probability of the
    target code. `side="low"` keeps the positions at and below the quantile instead.
    """

    quantile: Scalar = 0.5
    score: Literal["max_prob", "entropy", "margin", "cluster_mass", "code_prob"] = "max_prob"
    floor: float = 0.1
    decay: float = 0.9
    side: Literal["high", "low"] = "high"
    per_position: bool = True
    kind: Literal["confidence"] = "confidence"

    def __post_init__(self) -> None:
        check_range("confidence", "quantile", self.quantile, 0, 1)
        check_range("confidence", "floor", self.floor, 0, 1)
        check_range("confidence", "decay", self.decay, 0, 1)

    def score_names(self, space: Space) -> tuple[str, ...]:
        return (self.score_name(space),)

    def score_name(self, space: Space) -> str:
        """The score that is compared with its quantile."""
        if self.score != "cluster_mass":
            return self.score
        if not isinstance(space, Clusters):
            raise VarkdError("confidence: score 'cluster_mass' needs a term whose space is 'clusters'")
        return cluster_mass_name(space)

    def __call__(self, scores: Scores, part: Part, space: Space, threshold_L: Tensor | None, rng: Rng) -> Tensor:
        del rng
        score_BL = scores[self.score_name(space)]
        if threshold_L is None:
            return torch.ones_like(score_BL)
        threshold = threshold_L[part.plan.rank_BL] if self.per_position else threshold_L
        kept = score_BL >= threshold if self.side == "high" else score_BL <= threshold
        return torch.where(kept, 1.0, self.floor)

    def updated_threshold(self, threshold_L: Tensor | None, score_by_rank_BL: Tensor) -> Tensor:
        """Move the threshold, (L,) or (1,), towards the quantile of this step's scores (all rows of all ranks)."""
        scores = score_by_rank_BL if self.per_position else score_by_rank_BL.reshape(-1, 1)
        fresh_L = scores.quantile(number(self.quantile), dim=0)
        return fresh_L if threshold_L is None else self.decay * threshold_L + (1 - self.decay) * fresh_L


@dataclass(frozen=True)
class Random:
    """The control of `Confidence`: the same kept fraction (1 - quantile), chosen by chance."""

    quantile: Scalar = 0.5
    floor: float = 0.1
    kind: Literal["random"] = "random"

    def __post_init__(self) -> None:
        check_range("random", "quantile", self.quantile, 0, 1)
        check_range("random", "floor", self.floor, 0, 1)

    def score_names(self, space: Space) -> tuple[str, ...]:
        del space
        return ()

    def __call__(self, scores: Scores, part: Part, space: Space, threshold_L: Tensor | None, rng: Rng) -> Tensor:
        del scores, space, threshold_L
        uniform_BL = rng.uniform("select", part.row_B, part.codes_BL.shape[1])
        return torch.where(uniform_BL >= number(self.quantile), 1.0, self.floor)


@dataclass(frozen=True)
class Accepted:
    """SelecTKD, 2510.24021: weight 1 where the teacher accepts what the student proposes, `floor` elsewhere.

    `top_k`: the student's likeliest code is among the teacher's `top_k` likeliest. `speculative`: y ~ q passes with
    probability min(1, p(y) / q(y)) (our reading of "non-greedy propose-and-verify").
    """

    rule: Literal["top_k", "speculative"] = "top_k"
    top_k: int = 5
    floor: float = 0.1
    kind: Literal["accepted"] = "accepted"

    def __post_init__(self) -> None:
        check_range("accepted", "floor", self.floor, 0, 1)
        if self.top_k < 1:
            raise VarkdError(f"accepted: top_k must be at least 1, got {self.top_k}")

    def score_names(self, space: Space) -> tuple[str, ...]:
        del space
        return (f"top_k_agrees:{self.top_k}",) if self.rule == "top_k" else ("accepted",)

    def __call__(self, scores: Scores, part: Part, space: Space, threshold_L: Tensor | None, rng: Rng) -> Tensor:
        del part, threshold_L, rng
        (name,) = self.score_names(space)
        return torch.where(scores[name] > 0, 1.0, self.floor)


Selection = All | Confidence | Random | Accepted
