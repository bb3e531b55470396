"""Scalars per position that selections, credits and skews read, from one no-grad pass over chunks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varkd.distill.divergences import log_mass
from varkd.distill.spaces import Clusters, cluster_logp, log_softmax
from varkd.rollout import filter_logits, sample_inverse_cdf

Scores = dict[str, Tensor]


def chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Slices of at most `chunk_rows` rows."""
    for begin in range(0, num_rows, chunk_rows):
        yield slice(begin, min(begin + chunk_rows, num_rows))


@dataclass(frozen=True)
class ScoreInputs:
    """What scores are made of: the logits of both models chunk by chunk, the codes, and chance.

    `code_N` are the targets, `seen_N` the codes that stand in the sequence (the same unless data were spliced).
    `uniform_N2` holds two numbers per row, for the score that proposes and verifies.
    """

    code_N: Tensor
    teacher: Callable[[slice], Tensor] | None = None
    student: Callable[[slice], Tensor] | None = None
    uniform_N2: Tensor | None = None
    seen_N: Tensor | None = None


_OF_BOTH = ("top_k_agrees", "accepted", "code_ratio", "near_ratio")
_LEAST_SPREAD = 1e-3  # nats: below it a standard deviation of log p is rounding


def of_student(name: str) -> bool:
    """Whether a score looks at the student."""
    return name.split(":")[0] in ("student_logp", *_OF_BOTH)


def of_teacher(name: str) -> bool:
    """Whether a score looks at the teacher."""
    return name != "student_logp"


@torch.no_grad()
def position_scores(
    names: Iterable[str], sides: ScoreInputs, codebook_tables: Mapping[str, Tensor], chunk_rows: int
) -> Scores:
    """Scores of every row, float32 (N,) each, without gradient.

    The teacher's confidence, higher = surer: `max_prob`: max p; `entropy`: -H(p) / ln V, in [-1, 0]; `margin`:
    p_(1) - p_(2); `cluster_mass:<key>`: the mass of the likeliest cluster, which is robust to mass split among
    near-duplicates. What it thinks of the target code: `code_prob`, and `teacher_logp` (nats); of the code that stands
    in the sequence: `surprise`, (-log p - H(p)) / sd_p(log p), which has mean 0 and variance 1 under p itself, and
    `in_nucleus:<mass>`, 1 where it lies in the nucleus of that mass. The student: `student_logp` of the target code.
    Of both: `top_k_agrees:<k>`, 1 where the student's likeliest code is among the teacher's k likeliest; `accepted`, 1
    where a proposal y ~ q passes with probability min(1, p(y) / q(y)); of the code in the sequence `code_ratio`,
    min(1, p / q), and `near_ratio:<key>`, the same with the teacher's mass over its nearest codes.
    """
    names = sorted(set(names))
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for rows in chunks(len(sides.code_N), chunk_rows) if names else ():
        teacher = log_softmax(sides.teacher(rows)) if sides.teacher and any(map(of_teacher, names)) else None
        student = log_softmax(sides.student(rows)) if sides.student and any(map(of_student, names)) else None
        uniform_N2 = None if sides.uniform_N2 is None else sides.uniform_N2[rows]
        seen_N = sides.code_N if sides.seen_N is None else sides.seen_N
        chunk = _Chunk(teacher, student, sides.code_N[rows], seen_N[rows], uniform_N2)
        for name in names:
            found[name].append(_score(name, chunk, codebook_tables).float())
    empty = torch.zeros(0, device=sides.code_N.device)
    return {name: torch.cat(parts) if parts else empty for name, parts in found.items()}


@dataclass(frozen=True)
class _Chunk:
    """`Sides` of some rows, as log-probabilities."""

    teacher_NV: Tensor | None
    student_NV: Tensor | None
    code_N: Tensor
    seen_N: Tensor
    uniform_N2: Tensor | None


def _score(name: str, rows: _Chunk, codebook_tables: Mapping[str, Tensor]) -> Tensor:
    kind, _, setting = name.partition(":")
    if kind == "student_logp":
        return _of_code(_given(rows.student_NV, name), rows.code_N)
    teacher = _given(rows.teacher_NV, name)
    match kind:
        case "teacher_logp":
            return _of_code(teacher, rows.code_N)
        case "code_prob":
            return _of_code(teacher, rows.code_N).exp()
        case "surprise":
            return _surprise(teacher, rows.seen_N)
        case "in_nucleus":
            allowed = ~torch.isneginf(filter_logits(teacher, top_p=float(setting)))
            return _of_code(allowed, rows.seen_N).float()
    return (
        _of_both(name, teacher, rows, codebook_tables)
        if kind in _OF_BOTH
        else _confidence(name, codebook_tables)(teacher)
    )


def _of_both(name: str, teacher: Tensor, rows: _Chunk, codebook_tables: Mapping[str, Tensor]) -> Tensor:
    kind, _, setting = name.partition(":")
    student = _given(rows.student_NV, name)
    match kind:
        case "top_k_agrees":
            return top_k_agrees(teacher, student, int(setting))
        case "accepted":
            return _accepted(teacher, student, _given(rows.uniform_N2, name))
        case "code_ratio":
            return (_of_code(teacher, rows.seen_N) - _of_code(student, rows.seen_N)).exp().clamp_max(1)
        case "near_ratio":
            near_N = log_mass(teacher.gather(1, codebook_tables[setting][rows.seen_N])).squeeze(1)
            return (near_N - _of_code(student, rows.seen_N)).exp().clamp_max(1)
    raise ValueError(f"unknown score '{name}'")


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"the score '{name}' needs a model that is not there")
    return value


def _of_code(logp_NV: Tensor, code_N: Tensor) -> Tensor:
    return logp_NV.gather(1, code_N.unsqueeze(1)).squeeze(1)


def top_k_agrees(teacher: Tensor, student: Tensor, top_k: int) -> Tensor:
    """1 where the student's likeliest code is among the teacher's `top_k` likeliest."""
    above_N = (teacher > _of_code(teacher, student.argmax(1)).unsqueeze(1)).sum(1)
    return (above_N < top_k).float()


def _entropy(logp_NV: Tensor) -> Tensor:
    """H of every row, in nats."""
    return torch.special.entr(logp_NV.exp()).sum(-1)


def _surprise(teacher: Tensor, code_N: Tensor) -> Tensor:
    """How many standard deviations the code is less likely than the teacher expects of its own samples."""
    entropy_N1 = _entropy(teacher).unsqueeze(1)
    finite_NV = torch.where(torch.isneginf(teacher), 0.0, teacher)
    variance_N = (teacher.exp() * (finite_NV + entropy_N1).square()).sum(1)
    spread_N = variance_N.sqrt().clamp_min(_LEAST_SPREAD)
    return (-_of_code(teacher, code_N) - entropy_N1.squeeze(1)) / spread_N


def _accepted(teacher: Tensor, student: Tensor, uniform_N2: Tensor) -> Tensor:
    propose_N, verify_N = uniform_N2.unbind(1)
    proposed_N = sample_inverse_cdf(student.unsqueeze(1), propose_N.unsqueeze(1))[0].squeeze(1)
    ratio_N = (_of_code(teacher, proposed_N) - _of_code(student, proposed_N)).exp()
    return (verify_N < ratio_N).float()


def cluster_mass_name(space: Clusters) -> str:
    """The name of the score that measures confidence in the clusters of `space`."""
    return f"cluster_mass:{space.key}"


@torch.no_grad()
def code_logp(head: nn.Linear, hidden_BLD: Tensor, codes_BL: Tensor, chunk_rows: int) -> Tensor:
    """log-probability (nats, float32 (B, L)) that a model gives to each code."""
    hidden_ND, code_N = hidden_BLD.flatten(0, 1), codes_BL.flatten()
    parts = [
        log_softmax(head(hidden_ND[rows])).gather(1, code_N[rows].unsqueeze(1)).squeeze(1).float()
        for rows in chunks(len(code_N), chunk_rows)
    ]
    return torch.cat(parts).view(codes_BL.shape)


def _confidence(name: str, codebook_tables: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    if name == "max_prob":
        return lambda logp: logp.max(-1).values.exp()
    if name == "entropy":
        return lambda logp: -_entropy(logp) / math.log(logp.shape[-1])
    if name == "margin":
        return lambda logp: -logp.exp().topk(2).values.diff(dim=-1).squeeze(-1)
    if name.startswith("cluster_mass:"):
        members = codebook_tables[name.removeprefix("cluster_mass:") + "/members"]
        return lambda logp: cluster_logp(logp, members).max(-1).values.exp()
    raise ValueError(f"unknown score '{name}'")
