"""What a teacher and a student say at every position of given sequences: one table of quantities, one pass.

Each quantity is a small function of a `Pair`: the log-probabilities of both models at some rows, the codes that stand
there and what is known of the codebook. `measure` runs both models over whole sequences without gradient, pushes the
rows through their heads in chunks and returns named (B, L) arrays in raster order; `by_rank` turns them to the order in
which the codes were generated. p is the teacher, q the student. docs/diagnostics.md gives formulas and sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.distill.divergences import JSD, CrossEntropy, ForwardKL, ReverseKL, TargetRows, TotalVariation
from varkd.distill.logspace import cluster_logp, log_softmax
from varkd.distill.neighbors import nearest_codes
from varkd.distill.scores import Score, ScoreInputs, Surprise, TopKAgrees, chunks, position_scores
from varkd.distill.spaces import Clusters
from varkd.rollout import Sampler, evaluating, rollout
from varkd.types import Condition, Plan
from varkd.world import Rng

CHUNK_ROWS = 2048
CHUNK_NUMBERS = 2**24  # rows times codes: a dozen such arrays live at once
MASS = 0.9
TOP = 5
MOST_NEIGHBORS = 10
SLACK = 0.1
Values = dict[str, Tensor]


@dataclass(frozen=True)
class CodeSpace:
    """What is known of the codes: the cluster of each, int64 (V,), and for some quantities more.

    `members_KM` are the codes of each cluster (`spaces.cluster_members`), `codebook_VE` the vectors, `neighbor_Vk` the
    nearest other codes of each code, nearest first, and `radius` the distance within which codes count as near.
    """

    cluster_V: Tensor
    members_KM: Tensor | None = None
    codebook_VE: Tensor | None = None
    neighbor_Vk: Tensor | None = None
    radius: float = 0.0

    @classmethod
    def of(cls, codebook_VE: Tensor, clusters: Clusters, device: torch.device) -> CodeSpace:
        """Clusters, and the k = min(10, sqrt V) nearest neighbors; the radius is their mean largest distance."""
        codebook_VE = codebook_VE.detach().float().cpu()
        codebook_tables = clusters.prepare(codebook_VE)
        count = max(1, min(MOST_NEIGHBORS, math.isqrt(len(codebook_VE)), len(codebook_VE) - 1))
        index_Vn, squared_Vn = nearest_codes(codebook_VE, count + 1)  # each code is its own nearest
        members = codebook_tables[f"{clusters.key}/members"]
        return cls(
            codebook_tables[clusters.key].to(device),
            members.to(device),
            codebook_VE.to(device),
            index_Vn[:, 1:].to(device),
            float(squared_Vn[:, -1].sqrt().mean()),
        )


@dataclass(frozen=True)
class Pair:
    """Log-probabilities of student and teacher at N rows, and the codes that stand there."""

    student_NV: Tensor
    teacher_NV: Tensor
    code_N: Tensor
    space: CodeSpace

    @property
    def rows(self) -> TargetRows:
        return TargetRows(self.code_N)

    @cached_property
    def p_NV(self) -> Tensor:
        return self.teacher_NV.exp()

    @cached_property
    def q_NV(self) -> Tensor:
        return self.student_NV.exp()

    @cached_property
    def top_N(self) -> Tensor:
        """The teacher's likeliest code."""
        return self.teacher_NV.argmax(1)

    @cached_property
    def student_top_N(self) -> Tensor:
        return self.student_NV.argmax(1)

    @cached_property
    def teacher_entropy_N(self) -> Tensor:
        return torch.special.entr(self.p_NV).sum(1)

    @cached_property
    def surprise_N(self) -> Tensor:
        """-log p of the codes."""
        return CrossEntropy()(self.teacher_NV, None, self.rows)

    @cached_property
    def cluster_p_NK(self) -> Tensor:
        return cluster_logp(self.teacher_NV, _known(self.space.members_KM)).exp()

    @cached_property
    def means(self) -> tuple[Tensor, Tensor]:
        """Mean codebook vectors under p and q, (N, E) each."""
        codebook_VE = self.codebook_VE
        return self.p_NV @ codebook_VE, self.q_NV @ codebook_VE

    @property
    def codebook_VE(self) -> Tensor:
        return _known(self.space.codebook_VE).to(self.p_NV.dtype)

    def spread(self, probability_NV: Tensor, mean_NE: Tensor) -> Tensor:
        """tr Cov of the codebook vectors: sum p |e|^2 - |mu|^2."""
        return probability_NV @ self.codebook_VE.square().sum(1) - mean_NE.square().sum(1)


def mass_count(probability_NK: Tensor, mass: float = MASS) -> Tensor:
    """How many of the likeliest outcomes hold `mass` together (N90 for 0.9), at least 1."""
    gathered_NK = probability_NK.sort(dim=1, descending=True).values.cumsum(1)
    # Sums that fall short by rounding alone do not ask for one more outcome.
    return (gathered_NK[:, :-1] < mass - 1e-6).sum(1) + 1


def near_mass(probability_NV: Tensor, code_N: Tensor, codebook_VE: Tensor, radius: float) -> Tensor:
    """The mass of all codes within `radius` of the code of each row."""
    distance_NV = torch.cdist(codebook_VE[code_N], codebook_VE, compute_mode="donot_use_mm_for_euclid_dist")
    return (probability_NV * (distance_NV <= radius * (1 + 1e-6))).sum(1)


def neighbor_acceptance(pair: Pair, slack: float = SLACK) -> Tensor:
    """LANTERN's acceptance (Jang et al. 2024, 2410.03355): sum_v min(q(v), sum over A(v) of p).

    A(v) is v and the longest run of its nearest neighbors whose mass is at most `slack`.
    """
    neighbor_Vk = _known(pair.space.neighbor_Vk)
    extra_NV, open_NV = torch.zeros_like(pair.p_NV), torch.ones_like(pair.p_NV, dtype=torch.bool)
    for neighbor_V in neighbor_Vk.unbind(1):
        grown_NV = extra_NV + pair.p_NV[:, neighbor_V]
        open_NV &= grown_NV <= slack
        extra_NV = torch.where(open_NV, grown_NV, extra_NV)
    return torch.minimum(pair.q_NV, pair.p_NV + extra_NV).sum(1)


def _score(pair: Pair, score: Score) -> Tensor:
    """A score that selections read too."""
    sides = ScoreInputs(pair.code_N, lambda rows: pair.teacher_NV[rows], lambda rows: pair.student_NV[rows])
    return position_scores([score], sides, {}, max(1, len(pair.code_N)))[score]


def _mean_gap(pair: Pair) -> Tensor:
    return (pair.means[0] - pair.means[1]).square().sum(1)


def _known(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError("this quantity needs more of the code space than its clusters: use CodeSpace.of")
    return value


QUANTITIES: dict[str, Callable[[Pair], Tensor]] = {
    "ce": lambda pair: CrossEntropy()(pair.student_NV, None, pair.rows),
    "ce_teacher": lambda pair: pair.surprise_N,
    "typicality": lambda pair: _score(pair, Surprise()),
    "teacher_entropy": lambda pair: pair.teacher_entropy_N,
    "student_entropy": lambda pair: torch.special.entr(pair.q_NV).sum(1),
    "forward_kl": lambda pair: ForwardKL()(pair.student_NV, pair.teacher_NV, pair.rows),
    "reverse_kl": lambda pair: ReverseKL()(pair.student_NV, pair.teacher_NV, pair.rows),
    "jsd": lambda pair: JSD(0.5)(pair.student_NV, pair.teacher_NV, pair.rows),
    "total_variation": lambda pair: TotalVariation()(pair.student_NV, pair.teacher_NV, pair.rows),
    "acceptance": lambda pair: 1 - TotalVariation()(pair.student_NV, pair.teacher_NV, pair.rows),
    "acceptance_neighbors": neighbor_acceptance,
    "top1": lambda pair: (pair.student_top_N == pair.top_N).float(),
    "top5": lambda pair: _score(pair, TopKAgrees(TOP)),
    "top1_cluster": lambda pair: (pair.space.cluster_V[pair.student_top_N] == pair.space.cluster_V[pair.top_N]).float(),
    "mean_gap": _mean_gap,
    "embedding_distance": lambda pair: (
        pair.spread(pair.p_NV, pair.means[0]) + pair.spread(pair.q_NV, pair.means[1]) + _mean_gap(pair)
    ),
    "embedding_self": lambda pair: 2 * pair.spread(pair.p_NV, pair.means[0]),
    "n90": lambda pair: mass_count(pair.p_NV),
    "n90_clusters": lambda pair: mass_count(pair.cluster_p_NK),
    "perplexity": lambda pair: pair.teacher_entropy_N.exp(),
    "max_prob": lambda pair: pair.p_NV.amax(1),
    "cluster_mass": lambda pair: pair.cluster_p_NK.amax(1),
    "near_mass": lambda pair: near_mass(pair.p_NV, pair.top_N, pair.codebook_VE, pair.space.radius),
    "correct": lambda pair: (pair.top_N == pair.code_N).float(),
    "correct_cluster": lambda pair: (pair.cluster_p_NK.argmax(1) == pair.space.cluster_V[pair.code_N]).float(),
}


@dataclass(frozen=True)
class Sequences:
    """N sequences under their plan, in raster order: data, or what a model sampled for the same labels."""

    codes_BL: Tensor
    condition: Condition
    plan: Plan

    def __len__(self) -> int:
        return len(self.codes_BL)

    def split(self, size: int) -> list[Sequences]:
        cuts = [slice(begin, begin + size) for begin in range(0, len(self), size)]
        return [Sequences(self.codes_BL[cut], self.condition.select(cut), self.plan.select(cut)) for cut in cuts]


@torch.no_grad()
def measure(
    student: Backbone,
    teacher: Backbone,
    sequences: Sequences,
    space: CodeSpace,
    names: Iterable[str] = QUANTITIES,
    batch_size: int = 128,
    chunk_rows: int | None = None,
) -> Values:
    """The named quantities at every position, (B, L) in raster order on the CPU."""
    names, found = tuple(names), {}
    chunk_rows = chunk_rows or max(1, min(CHUNK_ROWS, CHUNK_NUMBERS // student.vocab_size))
    for part in sequences.split(batch_size):
        with evaluating(student), evaluating(teacher):
            hidden = [model(part.codes_BL, part.condition, part.plan).flatten(0, 1) for model in (student, teacher)]
        code_N = part.codes_BL.flatten()
        for rows in chunks(len(code_N), chunk_rows):
            q_NV, p_NV = (
                log_softmax(model.head(h_ND[rows])) for model, h_ND in zip((student, teacher), hidden, strict=True)
            )
            pair = Pair(q_NV, p_NV, code_N[rows], space)
            for name in names:
                found.setdefault(name, []).append(QUANTITIES[name](pair).cpu())
    return {name: torch.cat(parts).view(sequences.codes_BL.shape) for name, parts in found.items()}


def sampled(model: Backbone, like: Sequences, sampler: Sampler, seed: int, batch_size: int = 250) -> Sequences:
    """Sequences of `model` for the labels and plans of `like`; two models with one seed share their noise."""
    nothing_BL = torch.zeros_like(like.codes_BL, dtype=torch.bool)
    return completed(model, like, nothing_BL, sampler, seed, batch_size)


@torch.no_grad()
def completed(
    model: Backbone, given: Sequences, kept_BL: Tensor, sampler: Sampler, seed: int, batch_size: int = 250
) -> Sequences:
    """`given` with everything outside `kept_BL` sampled anew by `model`; the noise is that of `sampled`."""
    device = given.codes_BL.device
    uniform_BL = Rng(seed).uniform("analyze", torch.arange(len(given)), given.codes_BL.shape[1]).to(device)
    parts = zip(given.split(batch_size), uniform_BL.split(batch_size), kept_BL.split(batch_size), strict=True)
    codes = [
        rollout(model, part.condition, part.plan, sampler, uniform, part.codes_BL, kept).codes_BL
        for part, uniform, kept in parts
    ]
    return Sequences(torch.cat(codes), given.condition, given.plan)


def by_rank(values: Values, plan: Plan) -> Values:
    """Raster order -> the order in which the codes were generated."""
    order_BL = plan.order_BL.cpu()
    return {name: value_BL.gather(1, order_BL) for name, value_BL in values.items()}
