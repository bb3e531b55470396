"""Intervals for sample metrics: Wilson's for a share, a centered bootstrap for everything else.

Statistics that are biased at finite N (a Fréchet distance, an entropy, recall) are biased once more on a resample, so
the plain percentile bootstrap (Efron & Tibshirani 1993) can miss its own point estimate altogether. Here the resamples
are shifted so that their median is the estimate: the interval contains it by construction and says how far the number
would move with *other samples of the same model and the same N*. It does not remove the bias of N itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from varkd.errors import VarkdError
from varkd.world import Rng

_CONFIDENCE = 0.95
_DRAWS_AT_ONCE = 4_000_000


class Estimate(NamedTuple):
    """A number and its 95 % interval: low <= value <= high."""

    value: float
    low: float
    high: float


class Curve(NamedTuple):
    """Many numbers of one shape and their pointwise 95 % intervals."""

    value: Tensor
    low: Tensor
    high: Tensor


def centered_bootstrap(
    statistic: Callable[[Tensor], Tensor],
    num: int,
    resamples: int = 200,
    seed: int = 0,
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """The statistic of `num` samples and its centered bootstrap interval.

    `statistic` maps counts (R, num) float64, how often each sample occurs in each of R resamples, to R numbers; all
    counts one is the data itself. `bounds` are the values that the statistic can take: the interval is cut there.

    Raises:
        VarkdError: fewer than 2 samples or resamples.
    """
    return interval(*bootstrap(statistic, num, resamples, seed), bounds=bounds)


def bootstrap(
    statistic: Callable[[Tensor], Tensor], num: int, resamples: int = 200, seed: int = 0
) -> tuple[float, Tensor]:
    """The statistic of the data, and its values on the resamples, float64 (R,), shifted so that their median is it.

    Resample r draws the same samples whenever `num` and `seed` are the same: runs that share their noise can be
    compared draw by draw.
    """
    value, draw_R = _bootstrap(statistic, num, resamples, seed)
    return value.item(), draw_R


def interval(value: float, draw_R: Tensor, *, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Estimate:
    """`value` with the 95 % interval of what `bootstrap` drew."""
    return Estimate(*(part.item() for part in _limits(torch.tensor(value, dtype=torch.float64), draw_R, bounds)))


def centered_curve(
    statistic: Callable[[Tensor], Tensor],
    num: int,
    resamples: int = 200,
    seed: int = 0,
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Curve:
    """`centered_bootstrap` for a statistic that gives (R, ...) numbers: every one of them gets its own interval.

    Raises:
        VarkdError: fewer than 2 samples or resamples.
    """
    return _limits(*_bootstrap(statistic, num, resamples, seed), bounds)


def mean_curve(value_N: Tensor, resamples: int = 200, seed: int = 0) -> Curve:
    """The mean over the first axis of (N, ...) numbers."""
    flat_NM = value_N.double().flatten(1)
    curve = centered_curve(lambda counts_RN: counts_RN @ flat_NM / len(flat_NM), len(flat_NM), resamples, seed)
    return Curve(*(part.view(value_N.shape[1:]) for part in curve))


def _bootstrap(statistic: Callable[[Tensor], Tensor], num: int, resamples: int, seed: int) -> tuple[Tensor, Tensor]:
    """`bootstrap` for numbers of any shape: (...) and (R, ...)."""
    if num < 2 or resamples < 2:
        raise VarkdError(f"an interval needs at least 2 samples and 2 resamples, not {num} and {resamples}")
    value = statistic(torch.ones(1, num, dtype=torch.float64)).double()[0]
    generator = Rng(seed).generator("bootstrap")
    rows = max(1, _DRAWS_AT_ONCE // num)
    blocks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    drawn = torch.cat([statistic(_counts(block, num, generator)).double() for block in blocks])
    return value, drawn - drawn.quantile(0.5, dim=0) + value


def _limits(value: Tensor, drawn: Tensor, bounds: tuple[float, float]) -> Curve:
    tail = (1 - _CONFIDENCE) / 2
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0).clamp(*bounds)
    return Curve(value, torch.minimum(low, value), torch.maximum(high, value))


def share(successes: int, num: int) -> Estimate:
    """`successes / num` with Wilson's score interval (1927), which stays honest at 0 and 1."""
    if num < 2 or not 0 <= successes <= num:
        raise VarkdError(f"a share needs at least 2 samples and 0 to all of them counted, not {successes} of {num}")
    value, z = successes / num, NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    center = (value + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(value * (1 - value) / num + z * z / (4 * num * num))
    return Estimate(value, max(0.0, min(value, center - half)), min(1.0, max(value, center + half)))


def _counts(resamples: int, num: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(num, (resamples, num), generator=generator)
    one = torch.ones((), dtype=torch.float64).expand(resamples, num)
    return torch.zeros(resamples, num, dtype=torch.float64).scatter_add_(1, drawn, one)
