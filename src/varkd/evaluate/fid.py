"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017), in float64 and without SciPy.

    d^2 = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^(1/2) C_b C_a^(1/2))^(1/2))

Symmetric eigenvalues replace the general matrix square root, so singular covariances are no special case.
The distance of a finite sample is biased upwards by about a constant over N: compare it only at equal N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varkd.errors import VarkdError
from varkd.evaluate.intervals import Estimate, bootstrap, interval

_ROWS = 1024


def gaussian(features_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and unbiased covariance (F, F) of features, float64.

    Raises:
        VarkdError: not a matrix, fewer than 2 rows, or a value that is not finite.
    """
    features_NF = check_features(features_NF)
    mean_F = features_NF.mean(0)
    centered_NF = features_NF - mean_F
    return mean_F, centered_NF.T @ centered_NF / (len(features_NF) - 1)


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """The (squared) Fréchet distance of two Gaussians: 0 when they are equal, never negative."""
    return _distance(mean_a, covariance_a, mean_b, covariance_b, _root(covariance_b)).item()


def frechet_estimate(
    features_NF: Tensor, mean_b: Tensor, covariance_b: Tensor, resamples: int = 200, seed: int = 0
) -> Estimate:
    """The distance of N samples' features to a fixed Gaussian, with the bootstrap's interval over the samples."""
    return interval(*frechet_draws(features_NF, mean_b, covariance_b, resamples, seed), bounds=(0.0, float("inf")))


def frechet_draws(
    features_NF: Tensor, mean_b: Tensor, covariance_b: Tensor, resamples: int = 200, seed: int = 0
) -> tuple[float, Tensor]:
    """The distance of N samples' features to a fixed Gaussian, and its bootstrap draws (see `bootstrap`)."""
    mean_a, covariance_a = gaussian(features_NF)
    centered_NF = features_NF.double() - mean_a
    num, root_b = len(centered_NF), _root(covariance_b)

    def statistic(counts_RN: Tensor) -> Tensor:
        if (counts_RN == 1).all():  # the data itself: the very number that `frechet_distance` gives
            return _distance(mean_a, covariance_a, mean_b, covariance_b, root_b)[None]
        shift_RF = counts_RN @ centered_NF / num
        outer_RFF = shift_RF[:, :, None] * shift_RF[:, None, :]
        covariance_RFF = (_second_moments(counts_RN, centered_NF) - num * outer_RFF) / (num - 1)
        return _distance(mean_a + shift_RF, covariance_RFF, mean_b, covariance_b, root_b)

    return bootstrap(statistic, num, resamples, seed)


def _second_moments(counts_RN: Tensor, centered_NF: Tensor) -> Tensor:
    """The sums of counts * x x^T for every resample, (R, F, F): one large matrix product over the pairs of features."""
    width = centered_NF.shape[1]
    first, second = torch.triu_indices(width, width)
    sums_RP = counts_RN.new_zeros(len(counts_RN), len(first))
    for counts, rows in zip(counts_RN.split(_ROWS, dim=1), centered_NF.split(_ROWS), strict=True):
        sums_RP += counts @ (rows[:, first] * rows[:, second])
    moments_RFF = sums_RP.new_empty(len(counts_RN), width, width)
    moments_RFF[:, first, second] = sums_RP
    moments_RFF[:, second, first] = sums_RP
    return moments_RFF


def check_features(features_NF: Tensor) -> Tensor:
    """The features in float64, or a `VarkdError` when no statistics can be had of them."""
    if features_NF.ndim != 2 or len(features_NF) < 2:
        raise VarkdError(f"statistics need at least 2 samples as (N, F), not shape {tuple(features_NF.shape)}")
    if not features_NF.isfinite().all():
        raise VarkdError("some features are not finite: the images or the feature network hold NaN or infinity")
    return features_NF.double()


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor, root_b: Tensor) -> Tensor:
    """`frechet_distance` over leading axes of a, given the square root of b's covariance."""
    cross = torch.linalg.eigvalsh(root_b @ covariance_a @ root_b).clamp(min=0).sqrt().sum(-1)
    trace_a = covariance_a.diagonal(dim1=-2, dim2=-1).sum(-1)
    return ((mean_a - mean_b).square().sum(-1) + trace_a + covariance_b.trace() - 2 * cross).clamp(min=0)
