"""Scalars per position that selections, credits and reweighting read, from one no-grad pass over chunks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varkd.distill.spaces import Clusters, cluster_logp, log_softmax
from varkd.rollout import pick

Scores = dict[str, Tensor]


def chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Slices of at most `chunk_rows` rows."""
    for begin in range(0, num_rows, chunk_rows):
        yield slice(begin, min(begin + chunk_rows, num_rows))


@dataclass(frozen=True)
class Sides:
    """What scores are made of: the logits of both models chunk by chunk, the target codes, and chance.

    `uniform_N2` holds two numbers per row, for the score that proposes and verifies.
    """

    code_N: Tensor
    teacher: Callable[[slice], Tensor] | None = None
    student: Callable[[slice], Tensor] | None = None
    uniform_N2: Tensor | None = None


def of_student(name: str) -> bool:
    """Whether a score looks at the student."""
    return name.split(":")[0] in ("student_logp", "top_k_agrees", "accepted")


def of_teacher(name: str) -> bool:
    """Whether a score looks at the teacher."""
    return name != "student_logp"


@torch.no_grad()
def position_scores(names: Iterable[str], sides: Sides, products: Mapping[str, Tensor], chunk_rows: int) -> Scores:
    """Scores of every row, float32 (N,) each, without gradient.

    The teacher's confidence, higher = surer: `max_prob`: max p; `entropy`: -H(p) / ln V, in [-1, 0]; `margin`:
    p_(1) - p_(2); `cluster_mass:<key>`: the mass of the likeliest cluster, which is robust to mass split among
    near-duplicates. What it thinks of a code: `code_prob`, and `teacher_logp` (nats). The student: `student_logp`.
    Of both: `top_k_agrees:<k>`, 1 where the student's likeliest code is among the teacher's k likeliest; `accepted`, 1
    where a proposal y ~ q passes with probability min(1, p(y) / q(y)).
    """
    names = sorted(set(names))
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for rows in chunks(len(sides.code_N), chunk_rows) if names else ():
        teacher = log_softmax(sides.teacher(rows)) if sides.teacher and any(map(of_teacher, names)) else None
        student = log_softmax(sides.student(rows)) if sides.student and any(map(of_student, names)) else None
        uniform_N2 = None if sides.uniform_N2 is None else sides.uniform_N2[rows]
        for name in names:
            found[name].append(_score(name, teacher, student, sides.code_N[rows], uniform_N2, products).float())
    empty = torch.zeros(0, device=sides.code_N.device)
    return {name: torch.cat(parts) if parts else empty for name, parts in found.items()}


def _score(
    name: str, teacher: Tensor | None, student: Tensor | None, code_N: Tensor, uniform_N2: Tensor | None,
    products: Mapping[str, Tensor],
) -> Tensor:  # fmt: skip
    if name == "student_logp":
        return _of_code(_given(student, name), code_N)
    if name == "teacher_logp":
        return _of_code(_given(teacher, name), code_N)
    if name == "code_prob":
        return _of_code(_given(teacher, name), code_N).exp()
    if name.startswith("top_k_agrees:"):
        teacher, likeliest_N = _given(teacher, name), _given(student, name).argmax(1)
        above_N = (teacher > _of_code(teacher, likeliest_N).unsqueeze(1)).sum(1)
        return (above_N < int(name.removeprefix("top_k_agrees:"))).float()
    if name == "accepted":
        return _accepted(_given(teacher, name), _given(student, name), _given(uniform_N2, name))
    return _confidence(name, products)(_given(teacher, name))


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"the score '{name}' needs a model that is not there")
    return value


def _of_code(logp_NV: Tensor, code_N: Tensor) -> Tensor:
    return logp_NV.gather(1, code_N.unsqueeze(1)).squeeze(1)


def _accepted(teacher: Tensor, student: Tensor, uniform_N2: Tensor) -> Tensor:
    propose_N, verify_N = uniform_N2.unbind(1)
    proposed_N = pick(student.unsqueeze(1), propose_N.unsqueeze(1))[0].squeeze(1)
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


def _confidence(name: str, products: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    if name == "max_prob":
        return lambda logp: logp.max(-1).values.exp()
    if name == "entropy":
        return lambda logp: -torch.special.entr(logp.exp()).sum(-1) / math.log(logp.shape[-1])
    if name == "margin":
        return lambda logp: -logp.exp().topk(2).values.diff(dim=-1).squeeze(-1)
    if name.startswith("cluster_mass:"):
        members = products[name.removeprefix("cluster_mass:") + "/members"]
        return lambda logp: cluster_logp(logp, members).max(-1).values.exp()
    raise ValueError(f"unknown score '{name}'")
