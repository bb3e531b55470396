"""Improved precision and recall (Kynkäänniemi et al. 2019, 1904.06991) as ADM's evaluator computes them.

A set's manifold is the union of balls around its points, each reaching to the k-th nearest other point. Distances are
squared, |u|^2 - 2 u.v + |v|^2, and in mode "adm" every step of that is rounded to float16, as published numbers have
it; a block of 10,000 x 10,000 pairs where float16 overflows is done again in float32. Mode "float32" takes the features
as they are and loses no digits in the subtraction; it gives slightly lower numbers on real data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varkd.errors import VarkdError
from varkd.evaluate.inception import full_precision
from varkd.evaluate.intervals import Estimate, share
from varkd.world import Rng, World

Mode = Literal["adm", "float32"]
MODES: tuple[Mode, ...] = ("adm", "float32")
NEIGHBORS = 3
_BLOCK = 10_000
_ROWS = 512
_HALF_MAX = 65504.0
_SAME = 1e-12
_NARROW = 100


@dataclass(frozen=True)
class Manifolds:
    """Precision and recall with their 95 % intervals over the samples, and the sizes of the sets."""

    precision: Estimate
    recall: Estimate
    num_reference: int
    num_samples: int


def precision_recall(
    reference_MF: Tensor,
    samples_NF: Tensor,
    k: int = NEIGHBORS,
    mode: Mode = "adm",
    *,
    resamples: int = 0,
    seed: int = 0,
    world: World | None = None,
) -> Manifolds:
    """Precision (share of samples in the reference's manifold) and recall (the other way round).

    Args:
        reference_MF, samples_NF: float features; all of them are used, on the device of the samples. Every rank must
            hold all of both; the work is shared out.
        resamples: bootstrap draws for recall's interval (radii held fixed); 0 leaves Wilson's intervals, which see
            the finite number of samples (precision) or of reference points (recall) only.

    Raises:
        VarkdError: no more than k points in a set, features of different widths or not finite, or an unknown mode.
    """
    if mode not in MODES:
        raise VarkdError(f"unknown mode '{mode}' of precision and recall: known: {', '.join(MODES)}")
    reference_MF = reference_MF.to(samples_NF.device)
    for name, points in (("reference", reference_MF), ("samples", samples_NF)):
        if points.ndim != 2 or len(points) <= k:
            raise VarkdError(
                f"precision and recall with k = {k} need at least {k + 1} points in each set: the {name} "
                f"have shape {tuple(points.shape)}"
            )
        if not all(bool(rows.isfinite().all()) for rows in points.split(_BLOCK)):
            raise VarkdError(f"some features of the {name} are not finite")
    if reference_MF.shape[1] != samples_NF.shape[1]:
        raise VarkdError(f"features of width {reference_MF.shape[1]} and {samples_NF.shape[1]} come from two networks")
    world = world or World()
    reference, samples = _Points.of(reference_MF, mode), _Points.of(samples_NF, mode)
    if not (reference.safe and samples.safe):
        world = World()  # where float16 may overflow, whole blocks decide: every rank does all of them
    begin, end = (len(samples_NF) * (world.rank + step) // world.size for step in (0, 1))
    radius_M = radii(reference, k)
    radius_N = world.gather_varied(radii(samples, k, begin, end))
    inside_N = torch.zeros(end - begin, dtype=torch.bool, device=samples_NF.device)
    covered_M = torch.zeros(len(reference_MF), dtype=torch.int64, device=samples_NF.device)
    packed = np.zeros((end - begin, -(-len(reference_MF) // 8)), dtype=np.uint8) if resamples else None
    for rows, columns, distances in blocks(samples, reference, begin, end, columns_first=True):
        own = slice(rows.start - begin, rows.stop - begin)
        inside_N[own] |= (distances <= radius_M[columns]).any(1)
        within = distances <= radius_N[rows, None]
        covered_M[columns] |= within.any(0)
        if packed is not None:  # blocks of reference points start at multiples of 8
            bits = np.packbits(within.cpu().numpy(), axis=1)
            packed[own, columns.start // 8 : columns.start // 8 + bits.shape[1]] = bits
    inside_N, covered_M = world.gather_varied(inside_N.byte()).bool(), world.sum(covered_M) > 0
    precision = share(int(inside_N.sum()), len(samples_NF))
    recall = share(int(covered_M.sum()), len(reference_MF))
    if packed is not None:
        whole = world.gather_varied(torch.from_numpy(packed)).numpy()
        recall = _recall_interval(whole, recall.value, len(reference_MF), resamples, seed)
    return Manifolds(precision, recall, len(reference_MF), len(samples_NF))


@dataclass(frozen=True)
class _Points:
    """A set of points, cast as the mode asks; `safe` says that no float16 distance to such a set can overflow."""

    original_NF: Tensor
    cast_NF: Tensor
    norm_N: Tensor
    mode: Mode
    safe: bool

    @classmethod
    def of(cls, points_NF: Tensor, mode: Mode) -> _Points:
        if mode == "float32":
            cast = points_NF.double()
            return cls(points_NF, cast, cast.square().sum(1), mode, True)
        cast, norm = torch.empty_like(points_NF, dtype=torch.float32), []
        for rows, target in zip(points_NF.split(_ROWS), cast.split(_ROWS), strict=True):
            target.copy_(rows.half())
            norm.append(target.square().half().float().sum(1))
        norm = torch.cat(norm)
        # |u|^2 + 2 |u.v| + |v|^2 <= 4 max |u|^2, with room for the rounding
        safe = bool(norm.max() * 4.1 < _HALF_MAX)
        return cls(points_NF, cast, norm.half(), mode, safe)


def radii(points: _Points, k: int = NEIGHBORS, begin: int = 0, end: int | None = None) -> Tensor:
    """Squared distance of points `begin` to `end` to their k-th nearest other point: (end - begin,)."""
    end = len(points.cast_NF) if end is None else end
    dtype = torch.float64 if points.mode == "float32" else torch.float32
    # One tensor from the beginning: small ones kept between the large pieces would hold the freed memory of those.
    nearest = torch.full((end - begin, k + 1), torch.inf, dtype=dtype, device=points.cast_NF.device)
    for rows, _, distances in blocks(points, points, begin, end):
        own = nearest[rows.start - begin : rows.stop - begin]
        own.copy_(torch.cat([own, _smallest(distances, k + 1).to(dtype)], 1).sort(1).values[:, : k + 1])
    return nearest[:, k].clone()


def _smallest(distances_RC: Tensor, count: int) -> Tensor:
    """The `count` smallest of each row, in float32 or float64: those stand in the `count` chunks of smallest minima."""
    num, width = distances_RC.shape
    if width < _NARROW * (count + 1):
        wide = distances_RC if distances_RC.dtype == torch.float64 else distances_RC.float()
        return wide.topk(min(count, width), dim=1, largest=False).values
    whole = width // _NARROW * _NARROW
    chunks = distances_RC[:, :whole].unflatten(1, (-1, _NARROW))
    # Non-negative float16 numbers are ordered as their bits are, and integers are compared many times faster.
    ordered = chunks.view(torch.int16) if chunks.dtype == torch.float16 else chunks
    best = ordered.amin(2).topk(count, dim=1, largest=False).indices
    candidates = chunks.gather(1, best[:, :, None].expand(num, count, _NARROW)).flatten(1)
    candidates = torch.cat([candidates, distances_RC[:, whole:]], 1)
    return _smallest(candidates, count) if candidates.shape[1] < width else candidates.topk(count, 1, False).values


def blocks(
    a: _Points, b: _Points, begin: int, end: int, columns_first: bool = False
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Distances of a's points `begin` to `end` to b's, a piece at a time: (rows of a, columns of b, (rows, columns)).

    ADM computes (|u|^2 - 2 u.v) + |v|^2 in float16, which is not symmetric: u is a's point, or b's with
    `columns_first`.
    """
    for top in range(begin, end, _BLOCK):
        bottom = min(top + _BLOCK, end)
        for left in range(0, len(b.cast_NF), _BLOCK):
            columns = slice(left, min(left + _BLOCK, len(b.cast_NF)))
            pieces = [slice(row, min(row + _ROWS, bottom)) for row in range(top, bottom, _ROWS)]
            distances = _half if a.mode == "adm" else _exact
            if not (a.safe and b.safe):
                finite = (_half(a, b, rows, columns, columns_first).isfinite().all() for rows in pieces)
                distances = distances if all(map(bool, finite)) else _wide
            for rows in pieces:
                yield rows, columns, distances(a, b, rows, columns, columns_first)


def _half(a: _Points, b: _Points, rows: slice, columns: slice, columns_first: bool) -> Tensor:
    # Accumulated in float32, rounded once; TF32 would change nothing, its numbers are as fine as float16's.
    product = (a.cast_NF[rows] @ b.cast_NF[columns].T).half()
    first, second = a.norm_N[rows, None], b.norm_N[None, columns]
    if columns_first:
        first, second = second, first
    return (first - 2 * product).add_(second).clamp_(min=0)


def _wide(a: _Points, b: _Points, rows: slice, columns: slice, columns_first: bool) -> Tensor:
    first, second = a.original_NF[rows].float(), b.original_NF[columns].float()
    norm, other = first.square().sum(1)[:, None], second.square().sum(1)[None]
    if columns_first:
        norm, other = other, norm
    with full_precision():
        return (norm - 2 * (first @ second.T) + other).clamp_(min=0)


def _exact(a: _Points, b: _Points, rows: slice, columns: slice, columns_first: bool) -> Tensor:
    del columns_first
    norms = a.norm_N[rows, None] + b.norm_N[None, columns]
    distances = norms - 2 * (a.cast_NF[rows] @ b.cast_NF[columns].T)
    return distances.masked_fill_(distances < _SAME * norms, 0)  # equal points are at 0, whatever the rounding


def _recall_interval(packed_NM: NDArray[np.uint8], value: float, num: int, resamples: int, seed: int) -> Estimate:
    """Bootstrap over the samples, centered as all our intervals are: a resample covers what any of its samples does."""
    generator = Rng(seed).generator("recall")
    drawn = []
    for _ in range(resamples):
        chosen = torch.randint(len(packed_NM), (len(packed_NM),), generator=generator).unique().numpy()
        covered = np.zeros(packed_NM.shape[1], dtype=np.uint8)
        for start in range(0, len(chosen), 4096):
            covered |= np.bitwise_or.reduce(packed_NM[chosen[start : start + 4096]], axis=0)
        drawn.append(int(np.bitwise_count(covered).sum()) / num)
    low, high = np.quantile(np.array(drawn) - np.median(drawn) + value, (0.025, 0.975))
    return Estimate(value, max(0.0, min(value, float(low))), min(1.0, max(value, float(high))))
