"""The cluster of each code: made once, before training, from the tokenizer's codebook, and deterministic in a seed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from varkd.errors import VarkdError
from varkd.world import Rng

Assignment = Literal["kmeans", "random", "plain", "permuted", "agglomerative"]


_POINTS_AT_ONCE = 1024


def assign_clusters(codebook_VE: Tensor, count: int, assignment: Assignment, seed: int) -> Tensor:
    """Assign V codes to `count` clusters, none of them empty. Deterministic in `seed`.

    `kmeans` is Lloyd's algorithm with balanced assignment (every cluster has a capacity, codes propose to their nearest
    cluster with room, the nearest proposals win): sizes differ by at most one, as those of `random` do. `plain` is
    Lloyd's algorithm itself, `permuted` are its groups with the codes randomly permuted (random groups of the same
    sizes), and `agglomerative` merges by Ward's rule (one half of a V x V matrix in memory): their
    sizes follow the codebook.

    Raises:
        VarkdError: more clusters than codes.
    """
    vocab_size = len(codebook_VE)
    if count > vocab_size:
        raise VarkdError(f"clusters: {count} clusters but the tokenizer has only {vocab_size} codes; lower count")
    points = codebook_VE.detach().double().cpu()
    if assignment == "agglomerative":
        return _merge_by_ward(points, count)
    generator = Rng(seed).generator("clusters")
    capacity_K = torch.full((count,), vocab_size // count)
    capacity_K[: vocab_size % count] += 1
    shuffled_V = torch.randperm(vocab_size, generator=generator)
    if assignment == "random":
        cluster_V = torch.empty(vocab_size, dtype=torch.long)
        cluster_V[shuffled_V] = torch.repeat_interleave(torch.arange(count), capacity_K)
        return cluster_V
    centers = _spread_centers(points, count, generator)
    if assignment == "kmeans":
        return _lloyd(points, centers, capacity_K)
    cluster_V = _lloyd(points, centers, None)
    return cluster_V[shuffled_V] if assignment == "permuted" else cluster_V


def _lloyd(points: Tensor, centers: Tensor, capacity_K: Tensor | None) -> Tensor:
    count = len(centers)
    cluster_V, spread = torch.empty(0), float("inf")
    for _ in range(50):
        if capacity_K is None:
            updated, distance_V = _assign_nearest(points, centers)
        else:
            distance_VK = torch.cdist(points, centers)
            updated = _assign_with_capacity(distance_VK, capacity_K)
            distance_V = distance_VK.gather(1, updated.unsqueeze(1)).squeeze(1)
        former, spread = spread, float(distance_V.square().sum())
        if spread >= 0.999 * former:  # with capacities it may never come to rest: leave the last tenth of a percent
            break
        cluster_V = updated
        sums = torch.zeros_like(centers).index_add(0, cluster_V, points)
        centers = sums / torch.bincount(cluster_V, minlength=count).unsqueeze(1)
    return cluster_V


def cluster_statistics(codebook_VE: Tensor, cluster_V: Tensor) -> dict[str, float]:
    """How many clusters, the smallest and the largest size, and the mean squared distance within over that of all."""
    points, cluster_V = codebook_VE.detach().double().cpu(), cluster_V.cpu()
    size_K = torch.bincount(cluster_V)
    centers = torch.zeros(len(size_K), points.shape[1], dtype=points.dtype).index_add(0, cluster_V, points)
    within = (points - (centers / size_K.unsqueeze(1))[cluster_V]).square().sum()
    total = (points - points.mean(0)).square().sum()
    ratio = float(within / total) if total > 0 else 0.0
    sizes = {"count": len(size_K), "smallest": int(size_K.min()), "largest": int(size_K.max())}
    return {**sizes, "within_variance": ratio}


def _merge_by_ward(points: Tensor, count: int) -> Tensor:
    from sklearn.cluster import AgglomerativeClustering  # heavy, and few runs need it

    labels = torch.from_numpy(AgglomerativeClustering(count, linkage="ward").fit_predict(points.numpy())).long()
    # Numbered by their first code, so that the map does not hang on the library's way of numbering.
    first_K = torch.full((count,), len(points)).scatter_reduce(0, labels, torch.arange(len(points)), "amin")
    return torch.argsort(torch.argsort(first_K))[labels]


def _assign_nearest(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest cluster of each point and its distance; a cluster that would be empty takes the worst placed point.

    Distances are made for some points at a time: a whole 16,384 x 4,096 matrix would be half a gigabyte.
    """
    nearest = [torch.cdist(some, centers).min(1) for some in points.split(_POINTS_AT_ONCE)]
    distance_V, cluster_V = (torch.cat(values) for values in zip(*nearest, strict=True))
    size_K = torch.bincount(cluster_V, minlength=len(centers))
    for empty in (size_K == 0).nonzero().flatten().tolist():
        worst = int(distance_V.masked_fill(size_K[cluster_V] == 1, -1.0).argmax())
        size_K[cluster_V[worst]] -= 1
        cluster_V[worst], distance_V[worst] = empty, torch.linalg.vector_norm(points[worst] - centers[empty])
        size_K[empty] = 1
    return cluster_V, distance_V


def _spread_centers(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeding: each next center is drawn with probability proportional to its squared distance."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = (points - points[chosen]).square().sum(1)
    for _ in range(count - 1):
        nearest[chosen] = 0
        # Duplicated codes have distance 0 everywhere; any unused one will do then.
        odds = nearest if nearest.sum() > 0 else torch.ones_like(nearest).index_fill(0, torch.tensor(chosen), 0)
        chosen.append(int(torch.multinomial(odds, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1:]]).square().sum(1))
    return points[chosen].clone()


def _assign_with_capacity(distance_VK: Tensor, capacity_K: Tensor) -> Tensor:
    """Deferred acceptance: unassigned points propose to the nearest cluster that has not turned them down."""
    vocab_size, count = distance_VK.shape
    preference = distance_VK.argsort(dim=1)
    tried_V = torch.zeros(vocab_size, dtype=torch.long)
    cluster_V = preference[:, 0].clone()
    while True:
        crowded_K = torch.bincount(cluster_V, minlength=count) > capacity_K
        order = crowded_K[cluster_V].nonzero().squeeze(1)
        if not len(order):
            return cluster_V
        order = order[torch.argsort(distance_VK[order, cluster_V[order]], stable=True)]
        order = order[torch.argsort(cluster_V[order], stable=True)]  # by cluster, nearest first
        size_K = torch.bincount(cluster_V[order], minlength=count)
        place = torch.arange(len(order)) - (size_K.cumsum(0) - size_K)[cluster_V[order]]
        rejected = order[place >= capacity_K[cluster_V[order]]]
        tried_V[rejected] += 1
        cluster_V[rejected] = preference[rejected, tried_V[rejected]]
