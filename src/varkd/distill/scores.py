"""Scalars per position that selections, credits and skews read, from one no-grad pass over chunks of rows.

A score is a value, `(rows) -> float (N,)`, that says which models it reads. Confidence is higher where the teacher is
surer. A part that remembers something between steps is a `Remembers`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from varkd.distill.logspace import cluster_logp, log_mass, log_softmax
from varkd.rollout import filter_logits, sample_inverse_cdf
from varkd.types import Part

if TYPE_CHECKING:
    from varkd.distill.spaces import Space

_LEAST_SPREAD = 1e-3  # nats: below it a standard deviation of log p is rounding


@dataclass(frozen=True)
class ScoreRows:
    """What the scores of some rows are made of: log-probabilities of both models, the codes, chance, the codebook.

    `code_N` are the targets, `seen_N` the codes that stand in the sequence (the same unless data were spliced).
    """

    code_N: Tensor
    seen_N: Tensor
    teacher: Tensor | None = None
    student: Tensor | None = None
    uniform_N2: Tensor | None = None
    codebook_tables: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def teacher_NV(self) -> Tensor:
        assert self.teacher is not None
        return self.teacher

    @property
    def student_NV(self) -> Tensor:
        assert self.student is not None
        return self.student

    @property
    def teacher_seen_N(self) -> Tensor:
        """log p of the codes that stand in the sequence."""
        return _of_code(self.teacher_NV, self.seen_N)

    @property
    def student_seen_N(self) -> Tensor:
        """log q of the codes that stand in the sequence."""
        return _of_code(self.student_NV, self.seen_N)


class Score(ABC):
    """Base of all scores; frozen dataclasses, so that equal ones are computed once."""

    reads_teacher: ClassVar[bool] = True
    reads_student: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    """Whether it needs two random numbers for each row."""

    @abstractmethod
    def __call__(self, rows: ScoreRows) -> Tensor: ...


Scores = Mapping[Score, Tensor]


class Remembers(ABC):
    """A part that keeps a number or a few between steps: what it observed on all ranks moves them afterwards."""

    memory: ClassVar[str]
    """What its entry of the state is called."""

    def width(self, length: int) -> int:
        """How many numbers it observes of a sequence of `length` codes."""
        del length
        return 1

    @abstractmethod
    def observed(self, scores: Scores, part: Part, space: Space) -> Tensor:
        """What it observes of the rows of a part, (B, width)."""

    @abstractmethod
    def updated(self, memory: Tensor | None, observed_BX: Tensor) -> Tensor:
        """The memory after a step in which all rows of all ranks were observed."""


@dataclass(frozen=True)
class MaxProb(Score):
    """max p."""

    def __call__(self, rows: ScoreRows) -> Tensor:
        return rows.teacher_NV.max(-1).values.exp()


@dataclass(frozen=True)
class Entropy(Score):
    """-H(p) / ln V, in [-1, 0]."""

    def __call__(self, rows: ScoreRows) -> Tensor:
        return -_entropy(rows.teacher_NV) / math.log(rows.teacher_NV.shape[-1])


@dataclass(frozen=True)
class Margin(Score):
    """p_(1) - p_(2)."""

    def __call__(self, rows: ScoreRows) -> Tensor:
        return -rows.teacher_NV.exp().topk(2).values.diff(dim=-1).squeeze(-1)


@dataclass(frozen=True)
class ClusterMass(Score):
    """The mass of the likeliest cluster, which is robust to mass split among near-duplicates; `key` names the map."""

    key: str

    def __call__(self, rows: ScoreRows) -> Tensor:
        return cluster_logp(rows.teacher_NV, rows.codebook_tables[f"{self.key}/members"]).max(-1).values.exp()


@dataclass(frozen=True)
class TeacherLogp(Score):
    """log p of the target code, in nats."""

    def __call__(self, rows: ScoreRows) -> Tensor:
        return _of_code(rows.teacher_NV, rows.code_N)


@dataclass(frozen=True)
class CodeProb(Score):
    """p of the target code."""

    def __call__(self, rows: ScoreRows) -> Tensor:
        return _of_code(rows.teacher_NV, rows.code_N).exp()


@dataclass(frozen=True)
class StudentLogp(Score):
    """log q of the target code, in nats."""

    reads_teacher: ClassVar[bool] = False
    reads_student: ClassVar[bool] = True

    def __call__(self, rows: ScoreRows) -> Tensor:
        return _of_code(rows.student_NV, rows.code_N)


@dataclass(frozen=True)
class Surprise(Score):
    """(-log p - H(p)) / sd_p(log p) of the code in the sequence: it has mean 0 and variance 1 under p itself."""

    def __call__(self, rows: ScoreRows) -> Tensor:
        entropy_N1 = _entropy(rows.teacher_NV).unsqueeze(1)
        finite_NV = torch.where(torch.isneginf(rows.teacher_NV), 0.0, rows.teacher_NV)
        variance_N = (rows.teacher_NV.exp() * (finite_NV + entropy_N1).square()).sum(1)
        return (-rows.teacher_seen_N - entropy_N1.squeeze(1)) / variance_N.sqrt().clamp_min(_LEAST_SPREAD)


@dataclass(frozen=True)
class InNucleus(Score):
    """1 where the code in the sequence lies in the teacher's nucleus of this mass."""

    mass: float

    def __call__(self, rows: ScoreRows) -> Tensor:
        allowed_NV = ~torch.isneginf(filter_logits(rows.teacher_NV, top_p=self.mass))
        return _of_code(allowed_NV, rows.seen_N).float()


class _OfBoth(Score):
    reads_student: ClassVar[bool] = True


@dataclass(frozen=True)
class TopKAgrees(_OfBoth):
    """1 where the student's likeliest code is among the teacher's `top_k` likeliest."""

    top_k: int

    def __call__(self, rows: ScoreRows) -> Tensor:
        best_N1 = _of_code(rows.teacher_NV, rows.student_NV.argmax(1)).unsqueeze(1)
        return ((rows.teacher_NV > best_N1).sum(1) < self.top_k).float()


@dataclass(frozen=True)
class ProposalAccepted(_OfBoth):
    """1 where a proposal y ~ q passes with probability min(1, p(y) / q(y))."""

    draws: ClassVar[bool] = True

    def __call__(self, rows: ScoreRows) -> Tensor:
        if rows.uniform_N2 is None:
            raise ValueError(f"the score {self} needs random numbers")
        propose_N, verify_N = rows.uniform_N2.unbind(1)
        proposed_N = sample_inverse_cdf(rows.student_NV.unsqueeze(1), propose_N.unsqueeze(1))[0].squeeze(1)
        ratio_N = (_of_code(rows.teacher_NV, proposed_N) - _of_code(rows.student_NV, proposed_N)).exp()
        return (verify_N < ratio_N).float()


@dataclass(frozen=True)
class CodeRatio(_OfBoth):
    """min(1, p / q) of the code in the sequence."""

    def __call__(self, rows: ScoreRows) -> Tensor:
        return (rows.teacher_seen_N - rows.student_seen_N).exp().clamp_max(1)


@dataclass(frozen=True)
class NearRatio(_OfBoth):
    """`CodeRatio` with the teacher's mass over the codes nearest to it; `key` names their table."""

    key: str

    def __call__(self, rows: ScoreRows) -> Tensor:
        near_N = log_mass(rows.teacher_NV.gather(1, rows.codebook_tables[self.key][rows.seen_N])).squeeze(1)
        return (near_N - rows.student_seen_N).exp().clamp_max(1)


@dataclass(frozen=True)
class ScoreInputs:
    """What scores are made of: the logits of both models chunk by chunk, the codes, and chance (see `ScoreRows`)."""

    code_N: Tensor
    teacher: Callable[[slice], Tensor] | None = None
    student: Callable[[slice], Tensor] | None = None
    uniform_N2: Tensor | None = None
    seen_N: Tensor | None = None


@torch.no_grad()
def position_scores(
    scores: Iterable[Score], sides: ScoreInputs, codebook_tables: Mapping[str, Tensor], chunk_rows: int
) -> dict[Score, Tensor]:
    """Each score of every row, float32 (N,), without gradient."""
    found: dict[Score, list[Tensor]] = {score: [] for score in scores}
    for score in found:
        if (score.reads_teacher and not sides.teacher) or (score.reads_student and not sides.student):
            raise ValueError(f"the score {score} needs a model that is not there")
    teacher = sides.teacher if any(score.reads_teacher for score in found) else None
    student = sides.student if any(score.reads_student for score in found) else None
    seen_N = sides.code_N if sides.seen_N is None else sides.seen_N
    for chunk in chunks(len(sides.code_N), chunk_rows) if found else ():
        rows = ScoreRows(
            sides.code_N[chunk],
            seen_N[chunk],
            None if teacher is None else log_softmax(teacher(chunk)),
            None if student is None else log_softmax(student(chunk)),
            None if sides.uniform_N2 is None else sides.uniform_N2[chunk],
            codebook_tables,
        )
        for score, parts in found.items():
            parts.append(score(rows).float())
    empty = torch.zeros(0, device=sides.code_N.device)
    return {score: torch.cat(parts) if parts else empty for score, parts in found.items()}


@torch.no_grad()
def code_logp(head: nn.Linear, hidden_BLD: Tensor, codes_BL: Tensor, chunk_rows: int) -> Tensor:
    """log-probability (nats, float32 (B, L)) that a model gives to each code."""
    hidden_ND, code_N = hidden_BLD.flatten(0, 1), codes_BL.flatten()
    parts = [
        log_softmax(head(hidden_ND[rows])).gather(1, code_N[rows].unsqueeze(1)).squeeze(1).float()
        for rows in chunks(len(code_N), chunk_rows)
    ]
    return torch.cat(parts).view(codes_BL.shape)


def affordable_rows(vocab_size: int) -> int:
    """Rows of V logits whose chunk takes about 256 MiB: eight float32 tensors of 2^23 numbers; at most 2,048 rows."""
    return max(64, min(2048, 2**23 // vocab_size))


def chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Slices of at most `chunk_rows` rows."""
    for begin in range(0, num_rows, chunk_rows):
        yield slice(begin, min(begin + chunk_rows, num_rows))


def _of_code(value_NV: Tensor, code_N: Tensor) -> Tensor:
    return value_NV.gather(1, code_N.unsqueeze(1)).squeeze(1)


def _entropy(logp_NV: Tensor) -> Tensor:
    """H of every row, in nats."""
    return torch.special.entr(logp_NV.exp()).sum(-1)
