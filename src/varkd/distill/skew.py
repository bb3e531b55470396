"""A skew that differs between sequences, of DistiLLM-2 (Ko et al. 2025, 2503.07067)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from varkd.distill.schedule import check_range, words
from varkd.distill.scores import Remembers, Score, Scores, StudentLogp, TeacherLogp
from varkd.errors import VarkdError
from varkd.types import Part

if TYPE_CHECKING:
    from varkd.distill.spaces import Space


@dataclass(frozen=True)
class SequenceSkew(Remembers):
    """DistiLLM-2's skew: larger where the teacher likes a sequence much better than the student does.

    alpha = clip(1 - (1 - largest) m / (p - q + 1e-5), smallest, largest), p and q being exp of the mean log-probability
    of the codes and m a moving average of p - q over sequences; before the first step `largest`.
    """

    largest: float = 0.1
    smallest: float = 0.01
    decay: float = 0.9
    kind: Literal["sequence_skew"] = "sequence_skew"
    memory: ClassVar[str] = "skew"
    reads: ClassVar[tuple[Score, ...]] = (TeacherLogp(), StudentLogp())

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.largest < 1:
            raise VarkdError(f"sequence_skew: need 0 < smallest <= largest < 1, got {self.smallest}, {self.largest}")
        check_range("sequence_skew", "exponential", self.decay, 0, 1)

    @property
    def summary(self) -> str:
        return (
            f"one number for each sequence in [{words(self.smallest)}, {words(self.largest)}], larger where the "
            f"teacher likes it much better than the student (against a mean that decays by {words(self.decay)})"
        )

    def observed(self, scores: Scores, part: Part, space: Space) -> Tensor:
        """p - q of every sequence, (B, 1)."""
        del part, space
        return (scores[TeacherLogp()].mean(1).exp() - scores[StudentLogp()].mean(1).exp()).unsqueeze(1)

    def alpha(self, gap_B1: Tensor, mean_gap: Tensor | None) -> Tensor:
        """The skew of every sequence, (B, 1)."""
        if mean_gap is None:
            return torch.full_like(gap_B1, self.largest)
        return (1 - (1 - self.largest) * mean_gap / (gap_B1 + 1e-5)).clamp(self.smallest, self.largest)

    def updated(self, memory: Tensor | None, observed_BX: Tensor) -> Tensor:
        """The moving average of the gaps, (1,)."""
        fresh = observed_BX.mean(0)
        return fresh if memory is None else self.decay * memory + (1 - self.decay) * fresh
