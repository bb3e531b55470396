"""Improved precision and recall (Kynkäänniemi et al. 2019): fidelity and coverage, told apart.

A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbor in the
set. Precision is the share of samples in the real manifold, recall the share of real images in the samples' manifold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from varkd.errors import VarkdError
from varkd.evaluate.fid import check_features
from varkd.evaluate.intervals import Estimate, centered_bootstrap, share
from varkd.world import Rng

NEIGHBORS = 3
MAX_POINTS = 5000
_CHUNK = 1024


class PrecisionRecall(NamedTuple):
    """The two estimates and how many points of each set they were computed on (after the cap)."""

    precision: Estimate
    recall: Estimate
    num: int
    num_reference: int


def precision_recall(
    features_NF: Tensor,
    reference_MF: Tensor,
    *,
    neighbors: int = NEIGHBORS,
    max_points: int = MAX_POINTS,
    resamples: int = 200,
    seed: int = 0,
) -> PrecisionRecall:
    """Precision and recall of samples' features against real ones; sets above `max_points` are subsampled by `seed`.

    The intervals are over the samples; the reference is held fixed, and in resamples the radii are too.

    Raises:
        VarkdError: a set has no more points than `neighbors`, or features that are not finite or of another width.
    """
    samples = _capped(check_features(features_NF), max_points, seed, "samples")
    real = _capped(check_features(reference_MF), max_points, seed, "reference")
    if min(len(samples), len(real)) <= neighbors:
        raise VarkdError(
            f"precision and recall need more than {neighbors} samples and real images each, "
            f"not {len(samples)} and {len(real)}"
        )
    if samples.shape[1] != real.shape[1]:
        raise VarkdError(f"features of width {samples.shape[1]} and {real.shape[1]} come from two networks")
    inside = _covered(samples, real, radii(real, neighbors)).any(1)
    covered_MN = _covered(real, samples, radii(samples, neighbors)).float()

    def recall(counts_RN: Tensor) -> Tensor:
        return (covered_MN @ (counts_RN > 0).float().T > 0).double().mean(0)

    return PrecisionRecall(
        share(int(inside.sum()), len(samples)),
        centered_bootstrap(recall, len(samples), resamples, seed, bounds=(0.0, 1.0)),
        len(samples),
        len(real),
    )


def radii(points_NF: Tensor, neighbors: int = NEIGHBORS) -> Tensor:
    """Each point's distance to its k-th nearest other point: (N,)."""
    chunks = [_distances(chunk, points_NF) for chunk in points_NF.split(_CHUNK)]
    return torch.cat([chunk.kthvalue(neighbors + 1, dim=1).values for chunk in chunks])  # the 1st is the point itself


def _covered(points: Tensor, centers: Tensor, radius: Tensor) -> Tensor:
    """Whether each point lies in each ball: bool (points, centers)."""
    return torch.cat([_distances(chunk, centers) <= radius for chunk in points.split(_CHUNK)])


def _distances(a_NF: Tensor, b_MF: Tensor) -> Tensor:
    # Not by |a|^2 + |b|^2 - 2ab: its rounding would make the distance between equal points, and hence a collapsed set's
    # radius, differ from 0.
    return torch.cdist(a_NF, b_MF, compute_mode="donot_use_mm_for_euclid_dist")


def _capped(features_NF: Tensor, max_points: int, seed: int, stream: str) -> Tensor:
    if len(features_NF) <= max_points:
        return features_NF
    chosen = torch.randperm(len(features_NF), generator=Rng(seed).generator(f"precision_recall/{stream}"))
    return features_NF[chosen[:max_points]]
