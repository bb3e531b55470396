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

    def score_name(self, space: Space) -> str | None:
        del space
        return None

    def __call__(self, scores: Scores, part: Part, space: Space, threshold_L: Tensor | None, rng: Rng) -> Tensor:
        del scores, space, threshold_L, rng
        return torch.ones(part.codes_BL.shape, device=part.codes_BL.device)


@dataclass(frozen=True)
class Confidence:
    """Trust the teacher where it is confident: weight 1 at and above the `quantile` of its score, `floor` below.

    The quantile is taken per position (generation rank), as a moving average over batches, so that no part of the image
    is dropped as a whole. Until the first update every position is kept. `cluster_mass` measures confidence in the
    term's own clusters.
    """

    quantile: Scalar = 0.5
    score: Literal["max_prob", "entropy", "margin", "cluster_mass"] = "max_prob"
    floor: float = 0.1
    decay: float = 0.9
    kind: Literal["confidence"] = "confidence"

    def __post_init__(self) -> None:
        check_range("confidence", "quantile", self.quantile, 0, 1)
        check_range("confidence", "floor", self.floor, 0, 1)
        check_range("confidence", "decay", self.decay, 0, 1)

    def score_name(self, space: Space) -> str:
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
        kept = score_BL >= threshold_L[part.plan.rank_BL]
        return torch.where(kept, 1.0, self.floor)

    def updated_threshold(self, threshold_L: Tensor | None, score_by_rank_BL: Tensor) -> Tensor:
        """Move the per-position threshold towards the quantile of this step's scores (all rows of all ranks)."""
        fresh_L = score_by_rank_BL.quantile(number(self.quantile), dim=0)
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

    def score_name(self, space: Space) -> str | None:
        del space
        return None

    def __call__(self, scores: Scores, part: Part, space: Space, threshold_L: Tensor | None, rng: Rng) -> Tensor:
        del scores, space, threshold_L
        uniform_BL = rng.uniform("select", part.row_B, part.codes_BL.shape[1])
        return torch.where(uniform_BL >= number(self.quantile), 1.0, self.floor)


Selection = All | Confidence | Random
