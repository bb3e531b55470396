"""Means and covariances of features that arrive in batches, and the Fréchet distance as ADM's evaluator defines it.

    d^2 = |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a C_b)^(1/2)        (Heusel et al. 2017, 1706.08500)

Everything is float64. The trace of the root is the nuclear norm of C_a^(1/2) C_b^(1/2), which keeps its digits where
covariances are singular (2,048 features of fewer samples), and nothing is clamped: as in ADM, equal sets may give
-1e-9.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varkd.errors import VarkdError
from varkd.evaluate.intervals import Estimate

_ROWS = 2048
_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Gaussian:
    """Mean (F,), covariance (F, F; divisor N - 1), both float64, and how many samples they are of (None: unknown).

    `factor_FN` (F, N) with covariance = factor factor^T saves a decomposition where there are fewer samples than
    features.
    """

    mean_F: Tensor
    covariance_FF: Tensor
    num: int | None = None
    factor_FN: Tensor | None = None

    def __post_init__(self) -> None:
        width = len(self.mean_F)
        if self.mean_F.shape != (width,) or self.covariance_FF.shape != (width, width):
            raise VarkdError(
                f"statistics of shapes {tuple(self.mean_F.shape)} and {tuple(self.covariance_FF.shape)} "
                f"are no mean and covariance"
            )


def gaussian_of(features_NF: Tensor) -> Gaussian:
    """The moments of features (N, F): float64 sums in blocks, whatever the dtype of the features.

    Raises:
        VarkdError: not a matrix, fewer than 2 rows, or a value that is not finite.
    """
    if features_NF.ndim != 2 or len(features_NF) < 2:
        raise VarkdError(f"statistics need at least 2 samples as (N, F), not shape {tuple(features_NF.shape)}")
    if not all(bool(rows.isfinite().all()) for rows in features_NF.split(_ROWS)):
        raise VarkdError("some features are not finite: the images or the feature network hold NaN or infinity")
    num, width = features_NF.shape
    mean_F = sum(rows.double().sum(0) for rows in features_NF.split(_ROWS)) / num
    outer_FF = torch.zeros(width, width, dtype=torch.float64, device=features_NF.device)
    for rows in features_NF.split(_ROWS):
        centered = rows.double() - mean_F
        outer_FF.addmm_(centered.T, centered)
    mean_F = torch.as_tensor(mean_F)
    factor_FN = (features_NF.double() - mean_F).T / (num - 1) ** 0.5 if num < width else None
    return Gaussian(mean_F, outer_FF / (num - 1), num, factor_FN)


def frechet(a: Gaussian, b: Gaussian) -> float:
    """The squared Fréchet distance of two Gaussians, not clamped.

    Raises:
        VarkdError: they are of features of different widths.
    """
    _check_widths(a, b)
    device = a.mean_F.device
    # The roots up to a rotation, which no singular value sees.
    cross = torch.linalg.svdvals(_factor(a).T @ _factor(b).to(device)).sum()
    traces = a.covariance_FF.trace() + b.covariance_FF.to(device).trace()
    return float((a.mean_F - b.mean_F.to(device)).square().sum() + traces - 2 * cross)


def frechet_interval(features_NF: Tensor, a: Gaussian, b: Gaussian, value: float) -> Estimate | None:
    """A 95 % interval of `frechet(a, b)` over the samples (`a` is the Gaussian of `features_NF`), b held fixed.

    By the infinitesimal jackknife (Efron 1982): with T the optimal transport map's matrix between the Gaussians, the
    distance moves with one more sample x by 2 (m_a - m_b).c + c^T (I - T) c - mean, c = x - m_a; the variance of that
    over N is the distance's. A bootstrap agrees where N is well above F and costs a decomposition a resample. None
    where N < 2 F: there the covariance is nearly singular and neither is valid.
    """
    num, width = features_NF.shape
    if num < 2 * width:
        return None
    values, vectors = torch.linalg.eigh(a.covariance_FF)
    kept = values > values.max() * 1e-10
    root = values.clamp(min=0).sqrt()
    inverse = torch.where(kept, 1 / root.clamp(min=1e-300), 0.0)
    root_FF, inverse_FF = (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T
    transport = inverse_FF @ _root(root_FF @ b.covariance_FF.to(root_FF) @ root_FF) @ inverse_FF
    slope = torch.eye(width, dtype=torch.float64, device=root_FF.device) - transport
    shift_F = 2 * (a.mean_F - b.mean_F.to(a.mean_F))
    influence = []
    for rows in features_NF.split(_ROWS):
        centered = rows.double() - a.mean_F
        influence.append(centered @ shift_F + ((centered @ slope) * centered).sum(1))
    half = _NORMAL_95 * float(torch.cat(influence).std()) / num**0.5
    return Estimate(value, value - half, value + half)


def _factor(gaussian: Gaussian) -> Tensor:
    """F with F F^T = C, without the columns of eigenvalues that are zero to the last digit."""
    if gaussian.factor_FN is not None:
        return gaussian.factor_FN
    values, vectors = torch.linalg.eigh(gaussian.covariance_FF)
    kept = values > values.max().clamp(min=0) * 1e-15
    return vectors[:, kept] * values[kept].sqrt()


def _root(covariance_FF: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance_FF)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _check_widths(a: Gaussian, b: Gaussian) -> None:
    if len(a.mean_F) != len(b.mean_F):
        raise VarkdError(f"features of width {len(a.mean_F)} and {len(b.mean_F)} come from two networks")
