"""Two distances beside FID whose bias does not grow as samples get fewer: KID and FID-infinity.

KID is the squared maximum mean discrepancy under (x.y / F + 1)^3, unbiased (Binkowski et al. 2018, 1801.01401), as a
mean over random subsets. FID-infinity extrapolates FID over 1/N to infinitely many samples (Chong and Forsyth 2020,
1911.07023); it is taken from the samples at hand, not from quasi-random ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varkd.errors import VarkdError
from varkd.evaluate.intervals import Estimate
from varkd.evaluate.moments import Gaussian, frechet, gaussian_of
from varkd.world import Rng

SUBSETS, SUBSET_SIZE = 100, 1000
POINTS = 15
_NORMAL_95 = 1.959963984540054


def kid(
    reference_MF: Tensor, samples_NF: Tensor, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> Estimate:
    """The mean over random subset pairs, with the interval of that mean (it may be slightly negative).

    Raises:
        VarkdError: fewer than 2 points, or features of different widths.
    """
    size = min(size, len(reference_MF), len(samples_NF))
    if size < 2 or reference_MF.shape[1] != samples_NF.shape[1]:
        raise VarkdError(
            f"KID needs 2 points in each set and one width, not {tuple(reference_MF.shape)} and "
            f"{tuple(samples_NF.shape)}"
        )
    generator, found = Rng(seed).generator("kid"), []
    for _ in range(subsets):
        x, y = (
            points[torch.randperm(len(points), generator=generator)[:size].to(points.device)].double()
            for points in (samples_NF, reference_MF)
        )
        within = sum(_kernel(part, part).fill_diagonal_(0).sum() for part in (x, y)) / (size * (size - 1))
        found.append(float(within - 2 * _kernel(x, y.to(x.device)).mean()))
    values = torch.tensor(found, dtype=torch.float64)
    half = _NORMAL_95 * float(values.std()) / subsets**0.5 if subsets > 1 else 0.0
    return Estimate(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half)


def fid_infinity(samples_NF: Tensor, reference: Gaussian, points: int = POINTS, seed: int = 0) -> float:
    """The intercept of a line through FID over 1/n, for `points` sizes n between N/10 (at least 2 F) and N.

    Raises:
        VarkdError: too few samples: below 2 F the line is none.
    """
    num, width = samples_NF.shape
    least = max(num // 10, 2 * width)
    if num < 2 * least:
        raise VarkdError(f"FID-infinity needs at least {4 * width} samples, not {num}")
    generator = Rng(seed).generator("fid infinity")
    sizes = torch.linspace(least, num, points).round().long()
    values = []
    for size in sizes.tolist():
        chosen = torch.randperm(num, generator=generator)[:size].to(samples_NF.device)
        values.append(frechet(gaussian_of(samples_NF[chosen]), reference))
    inverse, value = 1 / sizes.double(), torch.tensor(values, dtype=torch.float64)
    slope = ((inverse - inverse.mean()) * (value - value.mean())).sum() / (inverse - inverse.mean()).square().sum()
    return float(value.mean() - slope * inverse.mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
