"""Does confidence predict reliability? A value at every position, averaged over bins of the teacher's confidence.

With the value "the likeliest code is the one in the data" this is a reliability diagram (Guo et al. 2017, 1706.04599),
and `expected_error` its summary, ECE = sum over bins of the share of positions times |accuracy - mean confidence|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varkd.evaluate.intervals import Estimate, centered_curve

NUM_BINS = 10


@dataclass(frozen=True)
class Bin:
    """Positions whose confidence lies in [low, high), and the mean of the value there."""

    low: float
    high: float
    num: int
    confidence: float
    value: Estimate


def calibration(
    confidence_NL: Tensor, value_NL: Tensor, bins: int = NUM_BINS, resamples: int = 200, seed: int = 0
) -> list[Bin]:
    """Bins of equal width over [0, 1]; those without a position are left out. Intervals are over sequences."""
    index_NL = (confidence_NL.double() * bins).long().clamp(0, bins - 1)
    member_BNL = index_NL == torch.arange(bins)[:, None, None]
    sums_NB = (member_BNL * value_NL.double()).sum(2).T
    count_NB = member_BNL.double().sum(2).T
    confidence_B = (member_BNL * confidence_NL.double()).sum((1, 2))

    def statistic(counts_RN: Tensor) -> Tensor:
        drawn_RB = counts_RN @ count_NB
        # A resample may miss a rare bin altogether; then it says nothing new of it.
        whole_B = sums_NB.sum(0) / count_NB.sum(0).clamp_min(1)
        return torch.where(drawn_RB > 0, counts_RN @ sums_NB / drawn_RB.clamp_min(1), whole_B)

    curve, total_B = centered_curve(statistic, len(value_NL), resamples, seed), count_NB.sum(0)
    return [
        Bin(
            b / bins,
            (b + 1) / bins,
            int(total_B[b]),
            float(confidence_B[b] / total_B[b]),
            Estimate(*(float(part[b]) for part in curve)),
        )
        for b in range(bins)
        if total_B[b] > 0
    ]


def expected_error(found: list[Bin]) -> float:
    """ECE of the bins of an accuracy."""
    total = sum(each.num for each in found)
    return sum(each.num * abs(each.value.value - each.confidence) for each in found) / total
