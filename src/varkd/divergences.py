"""The divergences between teacher and student as functions of plain logits.

Each takes logits (..., V) of the student and the teacher and returns one divergence per position, float32 (...) in
nats (float64 for float64 logits), differentiable with respect to the student. The same values are what
`varkd.distill.divergences` adds up in a loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varkd.distill import divergences as kinds
from varkd.distill.divergences import Divergence, TargetRows
from varkd.distill.logspace import log_softmax


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student): covers all modes of the teacher (Hinton et al. 2015)."""
    return _positions(kinds.ForwardKL(), student_logits, teacher_logits)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(student || teacher): seeks modes of the teacher (MiniLLM, 2306.08543)."""
    return _positions(kinds.ReverseKL(), student_logits, teacher_logits)


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student (GKD, 2306.13649)."""
    return _positions(kinds.JSD(beta), student_logits, teacher_logits)


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student) (DistiLLM, 2402.03898)."""
    return _positions(kinds.SkewKL(alpha), student_logits, teacher_logits)


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(student || alpha student + (1 - alpha) teacher) (DistiLLM, 2402.03898)."""
    return _positions(kinds.SkewReverseKL(alpha), student_logits, teacher_logits)


def total_variation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """1/2 sum |teacher - student|, in [0, 1] (DistillSpec, 2310.08461)."""
    return _positions(kinds.TotalVariation(), student_logits, teacher_logits)


def _positions(divergence: Divergence, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"logits of shapes {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)} differ")
    student_NV, teacher_NV = (log_softmax(logits.flatten(0, -2)) for logits in (student_logits, teacher_logits))
    rows = TargetRows(torch.zeros(len(student_NV), dtype=torch.long, device=student_NV.device))
    return divergence(student_NV, teacher_NV, rows).view(student_logits.shape[:-1])
