"""Over which outcomes two distributions are compared: `(student_NV, teacher_NV, rows, products) -> views`.

A view is one weighted comparison. `Full` gives one view of all codes; `Clusters` compresses the code space: near-equal
codes count as one outcome, so the student is not asked to copy the teacher's arbitrary split of mass between them.
`TopK` keeps the likeliest codes apart and counts all others as one outcome.
The loss of a space is sum over views of weight * D(view), for any divergence D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from varkd.distill.divergences import Rows, log_mass, renormalised
from varkd.distill.schedule import Scalar, check_range, number
from varkd.errors import VarkdError
from varkd.world import Rng

Products = dict[str, Tensor]
"""What a method makes once, before training, from the tokenizer: cluster maps by the key of the space."""


class View(NamedTuple):
    """Log-probabilities over K outcomes for both sides, and the rows in this space's numbering."""

    weight: float
    student_NK: Tensor
    teacher_NK: Tensor | None
    rows: Rows


@dataclass(frozen=True)
class Full:
    """Every code, at a temperature: softmax(logits / T) on both sides, scaled by T^2 (Hinton et al. 2015)."""

    temperature: Scalar = 1.0
    kind: Literal["full"] = "full"

    def __post_init__(self) -> None:
        check_range("full", "temperature", self.temperature, 1e-3, 1e3)

    def __call__(self, student_NV: Tensor, teacher_NV: Tensor | None, rows: Rows, products: Products) -> list[View]:
        del products
        temperature = number(self.temperature)
        teacher_logp = None if teacher_NV is None else log_softmax(teacher_NV, temperature)
        return [View(temperature**2, log_softmax(student_NV, temperature), teacher_logp, rows)]

    def prepare(self, codebook_VE: Tensor) -> Products:
        del codebook_VE
        return {}


@dataclass(frozen=True)
class Clusters:
    """Groups of near-equal codes: `within` D(all codes) + (1 - within) D(cluster masses).

    For KL, `within` is the weight of the within-cluster term of the chain rule KL = KL_cluster + sum_k P_k KL(.|k):
    1 is the full divergence and 0 leaves the split inside a cluster free. `assignment="random"` keeps the sizes
    and forgets the geometry (the control: it must not help). `count=None` is the square root of V, rounded up
    (128 for 16,384 codes).
    """

    count: int | None = None
    within: Scalar = 0.3
    assignment: Literal["kmeans", "random"] = "kmeans"
    seed: int = 0
    kind: Literal["clusters"] = "clusters"

    def __post_init__(self) -> None:
        check_range("clusters", "within", self.within, 0, 1)
        if self.count is not None and self.count < 2:
            raise VarkdError(f"clusters: count must be at least 2, got {self.count}")

    @property
    def key(self) -> str:
        return f"clusters/{self.assignment}-{self.count or 'sqrt'}-seed{self.seed}"

    def prepare(self, codebook_VE: Tensor) -> Products:
        """The cluster of each code, int64 (V,), and the codes of each cluster, from the tokenizer's codebook."""
        count = self.count or math.isqrt(len(codebook_VE) - 1) + 1
        cluster_V = assign_clusters(codebook_VE, count, self.assignment, self.seed)
        return {self.key: cluster_V, f"{self.key}/members": cluster_members(cluster_V)}

    def __call__(self, student_NV: Tensor, teacher_NV: Tensor | None, rows: Rows, products: Products) -> list[View]:
        if self.key not in products:
            raise VarkdError(f"no cluster map '{self.key}': call method.prepare(codebook) before training")
        cluster_V, members, within = products[self.key], products[f"{self.key}/members"], number(self.within)
        student = log_softmax(student_NV)
        teacher = None if teacher_NV is None else log_softmax(teacher_NV)
        views = []
        if within > 0:
            views.append(View(within, student, teacher, rows))
        if within < 1:
            coarse = replace(rows, code_N=cluster_V[rows.target_N])
            coarse_teacher = None if teacher is None else cluster_logp(teacher, members)
            views.append(View(1 - within, cluster_logp(student, members), coarse_teacher, coarse))
        return views


@dataclass(frozen=True)
class TopK:
    """The `count` likeliest codes of one side, and one bucket with the mass of all others.

    Merging the others leaves a true divergence, on `count` + 1 outcomes and at most the full one; a sum of
    p (log p - log q) over the likeliest codes alone is none, for it can fall below 0. `tail=False` renormalises both
    sides over the likeliest codes instead and does not see the mass outside. Which codes they are is a constant of the
    gradient. There is no default count: the number that holds most of the mass of text may hold little of an image's.
    """

    count: int
    of: Literal["teacher", "student"] = "teacher"
    tail: bool = True
    kind: Literal["top_k"] = "top_k"

    def __post_init__(self) -> None:
        smallest = 1 if self.tail else 2
        if self.count < smallest:
            raise VarkdError(f"top_k: count must be at least {smallest} with tail={str(self.tail).lower()}, "
                             f"got {self.count}")  # fmt: skip

    def __call__(self, student_NV: Tensor, teacher_NV: Tensor | None, rows: Rows, products: Products) -> list[View]:
        del products
        student = log_softmax(student_NV)
        teacher = None if teacher_NV is None else log_softmax(teacher_NV)
        judge = student if self.of == "student" else teacher
        if judge is None:
            raise VarkdError("top_k: the teacher's likeliest codes need a teacher: give teacher=RUN and a divergence "
                             "that looks at it, or set space.of=student")  # fmt: skip
        code_NK = judge.detach().topk(min(self.count, judge.shape[1]), dim=1).indices
        teacher_NK = None if teacher is None else self._merged(teacher, code_NK)
        return [View(1.0, self._merged(student, code_NK), teacher_NK, self._places(rows, code_NK))]

    def prepare(self, codebook_VE: Tensor) -> Products:
        del codebook_VE
        return {}

    def _merged(self, logp_NV: Tensor, code_NK: Tensor) -> Tensor:
        """Log-probabilities of the codes `code_NK`, and of the tail behind them (N, K + 1)."""
        kept_NK = logp_NV.gather(1, code_NK)
        if not self.tail:
            return renormalised(kept_NK)
        # Summed over the others themselves: log(1 - sum) has no digits left where the likeliest codes hold nearly all.
        return torch.cat([kept_NK, log_mass(logp_NV.scatter(1, code_NK, -torch.inf))], dim=1)

    def _places(self, rows: Rows, code_NK: Tensor) -> Rows:
        """The rows in this space's numbering: the place of the target code among `code_NK`, or the tail, K."""
        if not self.tail:
            return replace(rows, code_N=None)
        hit_NK = code_NK == rows.target_N.unsqueeze(1)
        return replace(rows, code_N=torch.where(hit_NK.any(1), hit_NK.int().argmax(1), code_NK.shape[1]))


Space = Full | Clusters | TopK


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities in float32 at least: bfloat16 loses three digits over thousands of codes."""
    return (widened(logits) if temperature == 1 else widened(logits) / temperature).log_softmax(-1)


def widened(logits: Tensor) -> Tensor:
    """Logits in float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()


def cluster_members(cluster_V: Tensor) -> Tensor:
    """The codes of each cluster, int64 (K, M), padded with V."""
    count = int(cluster_V.max()) + 1
    size_K = torch.bincount(cluster_V, minlength=count)
    order_V = torch.argsort(cluster_V, stable=True)
    begin_K = size_K.cumsum(0) - size_K
    slot_V = torch.arange(len(cluster_V), device=cluster_V.device) - begin_K[cluster_V[order_V]]
    members = torch.full((count, int(size_K.max())), len(cluster_V), device=cluster_V.device)
    members[cluster_V[order_V], slot_V] = order_V
    return members


def cluster_logp(logp_NV: Tensor, members_KM: Tensor) -> Tensor:
    """Log-mass of every cluster (N, K): a segment-wise logsumexp, which does not underflow."""
    padded = torch.cat([logp_NV, logp_NV.new_full((len(logp_NV), 1), -torch.inf)], dim=1)
    return log_mass(padded[:, members_KM]).squeeze(-1)


def assign_clusters(codebook_VE: Tensor, count: int, assignment: Literal["kmeans", "random"], seed: int) -> Tensor:
    """Assign V codes to `count` clusters whose sizes differ by at most one.

    `kmeans` is Lloyd's algorithm with balanced assignment (every cluster has a capacity, codes propose to their nearest
    cluster with room, the nearest proposals win). Deterministic in `seed`.

    Raises:
        VarkdError: more clusters than codes.
    """
    vocab_size = len(codebook_VE)
    if count > vocab_size:
        raise VarkdError(f"clusters: {count} clusters but the tokenizer has only {vocab_size} codes; lower count")
    generator = Rng(seed).generator("clusters")
    capacity_K = torch.full((count,), vocab_size // count)
    capacity_K[: vocab_size % count] += 1
    shuffled_V = torch.randperm(vocab_size, generator=generator)
    if assignment == "random":
        cluster_V = torch.empty(vocab_size, dtype=torch.long)
        cluster_V[shuffled_V] = torch.repeat_interleave(torch.arange(count), capacity_K)
        return cluster_V
    points = codebook_VE.detach().double().cpu()
    centres = _spread_centres(points, count, generator)
    cluster_V, spread = torch.empty(0), float("inf")
    for _ in range(50):
        distance_VK = torch.cdist(points, centres)
        updated = _assign_with_capacity(distance_VK, capacity_K)
        former, spread = spread, float(distance_VK.gather(1, updated.unsqueeze(1)).square().sum())
        if spread >= 0.999 * former:  # with capacities it may never come to rest: leave the last tenth of a percent
            break
        cluster_V = updated
        sums = torch.zeros_like(centres).index_add(0, cluster_V, points)
        centres = sums / torch.bincount(cluster_V, minlength=count).unsqueeze(1)
    return cluster_V


def _spread_centres(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeding: each next centre is drawn with probability proportional to its squared distance."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = torch.cdist(points, points[chosen]).square().squeeze(1)
    for _ in range(count - 1):
        nearest[chosen] = 0
        # Duplicated codes have distance 0 everywhere; any unused one will do then.
        odds = nearest if nearest.sum() > 0 else torch.ones_like(nearest).index_fill(0, torch.tensor(chosen), 0)
        chosen.append(int(torch.multinomial(odds, 1, generator=generator)))
        nearest = torch.minimum(nearest, torch.cdist(points, points[chosen[-1:]]).square().squeeze(1))
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
