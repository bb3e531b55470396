"""Over which outcomes two distributions are compared: `(student_NV, teacher_NV, rows, codebook_tables) -> comparisons`.

Both sides are log-probabilities of all codes. A comparison has a weight, and carries gradients back to the codes.
`Full` gives one comparison, of all codes; `Clusters` compresses the code space: near-equal codes count as one outcome,
so the student is not asked to copy the teacher's arbitrary split of mass between them. `TopK` keeps the likeliest codes
apart and counts all others as one outcome.
The loss of a space is the sum over its comparisons of weight * D(comparison), for any divergence D.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from varkd.distill.clustering import Assignment, assign_clusters
from varkd.distill.divergences import TargetRows
from varkd.distill.logspace import cluster_logp, log_mass, log_softmax, renormalized, to_logits
from varkd.distill.schedule import Schedule, check_range, value_of, words
from varkd.errors import VarkdError

CodebookTables = dict[str, Tensor]
"""What a method makes once, before training, from the tokenizer: cluster maps by the key of the space."""
CODEBOOK = "codebook"
"""The key of the codebook itself, for contexts that compare vectors."""


def _as_it_is(gradient_NV: Tensor) -> Tensor:
    return gradient_NV


class Comparison(NamedTuple):
    """Log-probabilities over K outcomes for both sides, and the rows in this space's numbering.

    `back` turns a gradient with respect to `student_NK` into one with respect to the student's log-probabilities of all
    codes (N, V); it may write into what it is given.
    """

    weight: float
    student_NK: Tensor
    teacher_NK: Tensor | None
    rows: TargetRows
    back: Callable[[Tensor], Tensor] = _as_it_is


class SpaceRule(ABC):
    """Base of all spaces."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """Which outcomes are compared, in words and with its settings."""

    @abstractmethod
    def __call__(
        self, student_NV: Tensor, teacher_NV: Tensor | None, rows: TargetRows, codebook_tables: CodebookTables
    ) -> list[Comparison]:
        """What is compared, of the log-probabilities (N, V) of both sides."""

    @property
    def clusters(self) -> Clusters | None:
        """The clusters that it compares, where it has some."""
        return None

    def prepare(self, codebook_VE: Tensor) -> CodebookTables:
        """What it needs of the tokenizer, made once before training."""
        del codebook_VE
        return {}


@dataclass(frozen=True)
class Full(SpaceRule):
    """Every code, at a temperature: softmax(logits / T) on both sides, scaled by T^2 (Hinton et al. 2015)."""

    temperature: Schedule = 1.0
    kind: Literal["full"] = "full"

    def __post_init__(self) -> None:
        check_range("full", "temperature", self.temperature, 1e-3, 1e3)

    @property
    def summary(self) -> str:
        sharp = "" if self.temperature == 1 else f", both sides at temperature T = {words(self.temperature)}, times T^2"
        return f"every code{sharp}"

    def __call__(
        self, student_NV: Tensor, teacher_NV: Tensor | None, rows: TargetRows, codebook_tables: CodebookTables
    ) -> list[Comparison]:
        del codebook_tables
        temperature = value_of(self.temperature)
        if temperature == 1:
            return [Comparison(1.0, student_NV, teacher_NV, rows)]
        teacher = None if teacher_NV is None else log_softmax(teacher_NV, temperature)
        student = log_softmax(student_NV, temperature)

        def back(gradient_NV: Tensor) -> Tensor:
            return to_logits(gradient_NV, student).div_(temperature)

        return [Comparison(temperature**2, student, teacher, rows, back)]


@dataclass(frozen=True)
class Clusters(SpaceRule):
    """Groups of near-equal codes: `within` D(all codes) + (1 - within) D(cluster masses).

    For KL, `within` is the weight of the within-cluster term of the chain rule KL = KL_cluster + sum_k P_k KL(.|k):
    1 is the full divergence and 0 leaves the split inside a cluster free. `kmeans` clusters have equal sizes, those of
    `plain` k-means and of `agglomerative` clustering (Ward) the sizes that the codebook gives them. `random` keeps the
    sizes of `kmeans` and forgets the geometry (the control: it must not help). `count=None` is the square root of V,
    rounded up (128 for 16,384 codes); `factor` asks for V / factor groups instead.

    VarKD (2606.06078, eq. 11 and 12) is `Clusters(factor=4, within=0, assignment="plain")`: D over
    the group masses only. `permuted` is its control, random groups of the same sizes.
    """

    count: int | None = None
    within: Schedule = 0.3
    assignment: Assignment = "kmeans"
    seed: int = 0
    factor: int | None = None
    kind: Literal["clusters"] = "clusters"

    def __post_init__(self) -> None:
        check_range("clusters", "within", self.within, 0, 1)
        if self.count is not None and self.factor is not None:
            raise VarkdError(f"clusters: give count or factor, not both (got {self.count} and {self.factor})")
        if self.count is not None and self.count < 2:
            raise VarkdError(f"clusters: count must be at least 2, got {self.count}")
        if self.factor is not None and self.factor < 2:
            raise VarkdError(f"clusters: factor must be at least 2, got {self.factor}")

    @property
    def summary(self) -> str:
        many = f"V / {self.factor}" if self.factor else str(self.count) if self.count else "sqrt(V)"
        how = {
            "kmeans": "look-alike codes (balanced k-means of the codebook)",
            "plain": "look-alike codes (k-means of the codebook)",
            "agglomerative": "look-alike codes (Ward's clustering of the codebook)",
            "random": "codes drawn by chance, all of one size",
            "permuted": "codes drawn by chance, of the sizes that k-means gives",
        }
        weights = (
            ""
            if self.within == 0
            else (f"; the divergence over codes counts {words(self.within)}, that over groups the rest")
        )
        seed = f", seed {self.seed}" if self.seed else ""
        return f"the masses of {many} groups of {how[self.assignment]}{seed}{weights}"

    @property
    def clusters(self) -> Clusters:
        return self

    @property
    def key(self) -> str:
        size = f"factor{self.factor}" if self.factor else self.count or "sqrt"
        return f"clusters/{self.assignment}-{size}-seed{self.seed}"

    def prepare(self, codebook_VE: Tensor) -> CodebookTables:
        """The cluster of each code, int64 (V,), and the codes of each cluster, from the tokenizer's codebook."""
        vocab_size = len(codebook_VE)
        count = -(-vocab_size // self.factor) if self.factor else self.count or math.isqrt(vocab_size - 1) + 1
        cluster_V = assign_clusters(codebook_VE, count, self.assignment, self.seed)
        return {self.key: cluster_V, f"{self.key}/members": cluster_members(cluster_V)}

    def __call__(
        self, student_NV: Tensor, teacher_NV: Tensor | None, rows: TargetRows, codebook_tables: CodebookTables
    ) -> list[Comparison]:
        if self.key not in codebook_tables:
            raise VarkdError(f"no cluster map '{self.key}': call method.prepare(codebook) before training")
        cluster_V, members, within = (
            codebook_tables[self.key],
            codebook_tables[f"{self.key}/members"],
            value_of(self.within),
        )
        comparisons = []
        if within > 0:
            comparisons.append(Comparison(within, student_NV, teacher_NV, rows))
        if within < 1:
            coarse = replace(rows, code_N=cluster_V[rows.target_N])
            student_NK, teacher_NK = (
                None if each is None else cluster_logp(each, members) for each in (student_NV, teacher_NV)
            )
            assert student_NK is not None

            def back(gradient_NK: Tensor) -> Tensor:
                # d log mass / d log q of a code: its share of the mass, 0 where the code is excluded
                share_NV = student_NV - torch.where(torch.isneginf(student_NK), 0.0, student_NK)[:, cluster_V]
                return share_NV.exp_().mul_(gradient_NK[:, cluster_V])

            comparisons.append(Comparison(1 - within, student_NK, teacher_NK, coarse, back))
        return comparisons


@dataclass(frozen=True)
class TopK(SpaceRule):
    """The `count` likeliest codes of one side, and one bucket with the mass of all others.

    Merging the others leaves a true divergence, on `count` + 1 outcomes and at most the full one; a sum of
    p (log p - log q) over the likeliest codes alone is none, for it can fall below 0. `tail=False` renormalizes both
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
            raise VarkdError(
                f"top_k: count must be at least {smallest} with tail={str(self.tail).lower()}, got {self.count}"
            )

    @property
    def summary(self) -> str:
        rest = "and all others as one" if self.tail else "renormalized without the others"
        return f"the {self.of}'s {self.count} likeliest codes, {rest}"

    def __call__(
        self, student_NV: Tensor, teacher_NV: Tensor | None, rows: TargetRows, codebook_tables: CodebookTables
    ) -> list[Comparison]:
        del codebook_tables
        judge = student_NV if self.of == "student" else teacher_NV
        if judge is None:
            raise VarkdError(
                "top_k: the teacher's likeliest codes need a teacher: give teacher=RUN and a divergence "
                "that looks at it, or set space.of=student"
            )
        code_NK = judge.detach().topk(min(self.count, judge.shape[1]), dim=1).indices
        teacher_NK = None if teacher_NV is None else self._merged(teacher_NV, code_NK)
        student_NK = self._merged(student_NV, code_NK)

        def back(gradient_NK: Tensor) -> Tensor:
            if not self.tail:
                return torch.zeros_like(student_NV).scatter_(1, code_NK, to_logits(gradient_NK, student_NK))
            tail_N1 = student_NK[:, -1:]
            share_NV = (student_NV - torch.where(torch.isneginf(tail_N1), 0.0, tail_N1)).exp_()
            return share_NV.mul_(gradient_NK[:, -1:]).scatter_(1, code_NK, gradient_NK[:, :-1])

        return [Comparison(1.0, student_NK, teacher_NK, self._places(rows, code_NK), back)]

    def _merged(self, logp_NV: Tensor, code_NK: Tensor) -> Tensor:
        """Log-probabilities of the codes `code_NK`, and of the tail behind them (N, K + 1)."""
        kept_NK = logp_NV.gather(1, code_NK)
        if not self.tail:
            return renormalized(kept_NK)
        # Summed over the others themselves: log(1 - sum) has no digits left where the likeliest codes hold nearly all.
        return torch.cat([kept_NK, log_mass(logp_NV.scatter(1, code_NK, -torch.inf))], dim=1)

    def _places(self, rows: TargetRows, code_NK: Tensor) -> TargetRows:
        """The rows in this space's numbering: the place of the target code among `code_NK`, or the tail, K."""
        if not self.tail:
            return replace(rows, code_N=None)
        hit_NK = code_NK == rows.target_N.unsqueeze(1)
        place_N = torch.where(hit_NK.any(1), hit_NK.int().argmax(1), code_NK.shape[1])
        return replace(rows, code_N=place_N)


Space = Full | Clusters | TopK


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
