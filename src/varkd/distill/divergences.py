"""Divergences between two rows of log-probabilities: `(student_NK, teacher_NK, rows) -> value_N`, in nats.

p is the teacher, q the student; directions are named in words (`ForwardKL` = KL(p || q)). The same objects serve as
training losses and as evaluation metrics. Outcomes with log-probability -inf (masked ids) contribute exactly 0 and get
no gradient. Mixtures are formed by logaddexp, never by log of a sum that may underflow.
Weights that depend on p and q (AKL, ToDi) are constants of the gradient, as in their papers.
Sources: Hinton et al. 2015; GKD (Agarwal et al. 2023, 2306.13649); DistiLLM (Ko et al. 2024, 2402.03898);
f-DISTILL (Wen et al. 2023, 2307.15190); ImitKD (Lin et al. 2020, 2009.07253); AKL (Wu et al. 2024, 2404.02657);
ToDi (2025, 2505.16297).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from varkd.distill.schedule import Scalar, check_range, number
from varkd.errors import VarkdError


@dataclass(frozen=True)
class Rows:
    """What a divergence may know of its rows beside the two distributions: the target code of each (in the space's
    own numbering), a detached coefficient, and the log-probability under which the code was drawn."""

    code_N: Tensor
    coefficient_N: Tensor | None = None
    behaviour_logp_N: Tensor | None = None


@dataclass(frozen=True)
class CrossEntropy:
    """-log q(code): learning from the data (or from a teacher sample) alone."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    needs_teacher: ClassVar[bool] = False

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor | None, rows: Rows) -> Tensor:
        del teacher_NK
        return -student_NK.gather(1, rows.code_N.unsqueeze(1)).squeeze(1)


@dataclass(frozen=True)
class ForwardKL:
    """KL(p || q) = sum p (log p - log q). Gradient with respect to the student's logits: q - p."""

    kind: Literal["forward_kl"] = "forward_kl"
    needs_teacher: ClassVar[bool] = True

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: Rows) -> Tensor:
        del rows
        return _kl(teacher_NK, student_NK)


@dataclass(frozen=True)
class ReverseKL:
    """KL(q || p) = sum q (log q - log p)."""

    kind: Literal["reverse_kl"] = "reverse_kl"
    needs_teacher: ClassVar[bool] = True

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: Rows) -> Tensor:
        del rows
        return _kl(student_NK, teacher_NK)


@dataclass(frozen=True)
class JSD:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, eq. 1: beta weighs the teacher).

    It tends to 0 at both ends; `normalise="ends"` divides by beta (1 - beta), which is continuous with forward KL at
    beta = 0 and reverse KL at beta = 1.
    """

    beta: Scalar = 0.5
    normalise: Literal["none", "ends"] = "none"
    kind: Literal["jsd"] = "jsd"
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("jsd", "beta", self.beta, 0, 1)

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: Rows) -> Tensor:
        del rows
        beta = number(self.beta)
        if beta in (0.0, 1.0):
            if self.normalise == "none":
                return (student_NK.exp() * 0).sum(1)  # the limit itself, with a graph
            return _kl(teacher_NK, student_NK) if beta == 0 else _kl(student_NK, teacher_NK)
        mixture = _log_mixture(teacher_NK, student_NK, beta)
        value = beta * _kl(teacher_NK, mixture) + (1 - beta) * _kl(student_NK, mixture)
        return value / (beta * (1 - beta)) if self.normalise == "ends" else value


@dataclass(frozen=True)
class SkewKL:
    """KL(p || alpha p + (1 - alpha) q), at most -log alpha (DistiLLM, eq. 4)."""

    alpha: Scalar = 0.1
    kind: Literal["skew_kl"] = "skew_kl"
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("skew_kl", "alpha", self.alpha, 0, 1)

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: Rows) -> Tensor:
        del rows
        if number(self.alpha) == 1:
            return (student_NK.exp() * 0).sum(1)  # the limit itself, with a graph
        return _kl(teacher_NK, _log_mixture(teacher_NK, student_NK, number(self.alpha)))


@dataclass(frozen=True)
class SkewReverseKL:
    """KL(q || (1 - alpha) p + alpha q), at most -log alpha (DistiLLM, eq. 6)."""

    alpha: Scalar = 0.1
    kind: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("skew_reverse_kl", "alpha", self.alpha, 0, 1)

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: Rows) -> Tensor:
        del rows
        return _kl(student_NK, _log_mixture(student_NK, teacher_NK, number(self.alpha)))


@dataclass(frozen=True)
class TotalVariation:
    """1/2 sum |p - q|, in [0, 1]; 1 - TV is the acceptance rate of speculative decoding. Subgradient 0 at ties."""

    kind: Literal["total_variation"] = "total_variation"
    needs_teacher: ClassVar[bool] = True

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: Rows) -> Tensor:
        del rows
        return 0.5 * (teacher_NK.exp() - student_NK.exp()).abs().sum(1)


@dataclass(frozen=True)
class TeacherArgmax:
    """-log q(argmax p): the teacher's likeliest code as if it were data (ImitKD's label)."""

    kind: Literal["teacher_argmax"] = "teacher_argmax"
    needs_teacher: ClassVar[bool] = True

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: Rows) -> Tensor:
        del rows
        return -student_NK.gather(1, teacher_NK.argmax(1, keepdim=True)).squeeze(1)


@dataclass(frozen=True)
class AdaptiveKL:
    """g_H / g KL(p || q) + g_L / g KL(q || p), g_H and g_L = sum |p - q| over the teacher's head and its tail (AKL).

    The head is the longest prefix of the codes in order of p whose mass is at most `head`, and always the first code.
    Rows with p = q count 0.
    """

    head: Scalar = 0.5
    kind: Literal["adaptive_kl"] = "adaptive_kl"
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("adaptive_kl", "head", self.head, 0, 1)

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: Rows) -> Tensor:
        del rows
        with torch.no_grad():
            teacher, order = teacher_NK.exp().sort(dim=1, descending=True, stable=True)
            gap = (teacher - student_NK.exp().gather(1, order)).abs()
            in_head = teacher.cumsum(1) <= number(self.head)
            in_head[:, 0] = True
            total = gap.sum(1)
            share = (gap * in_head).sum(1) / total.clamp_min(torch.finfo(gap.dtype).tiny)
            rest = torch.where(total > 0, 1 - share, 0.0)
        return share * _kl(teacher_NK, student_NK) + rest * _kl(student_NK, teacher_NK)


@dataclass(frozen=True)
class ToDi:
    """sum_v a p log(p / q) + (1 - a) q log(q / p), a = sigmoid(sharpness * log(p / q)) per code (ToDi).

    At sharpness 1 the value is the sum of both KL, but not its gradient: a is a constant of it.
    """

    sharpness: float = 1.0
    kind: Literal["todi"] = "todi"
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.sharpness >= 0:
            raise VarkdError(f"todi: sharpness must be at least 0, got {self.sharpness}")

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: Rows) -> Tensor:
        del rows
        excluded = torch.isneginf(student_NK) & torch.isneginf(teacher_NK)
        ratio = torch.where(excluded, 0.0, teacher_NK) - torch.where(excluded, 0.0, student_NK)
        weight = torch.sigmoid(self.sharpness * ratio).detach()
        return ((weight * teacher_NK.exp() - (1 - weight) * student_NK.exp()) * ratio).sum(1)


Divergence = (
    CrossEntropy | ForwardKL | ReverseKL | JSD | SkewKL | SkewReverseKL | TotalVariation
    | TeacherArgmax | AdaptiveKL | ToDi
)  # fmt: skip


def _kl(first_NK: Tensor, second_NK: Tensor) -> Tensor:
    """KL(first || second) row by row; outcomes that `first` excludes count 0."""
    excluded = torch.isneginf(first_NK)
    # Masked before the product: 0 * inf would already be NaN, and NaN gradients survive a `where` after it.
    gap = torch.where(excluded, 0.0, first_NK) - torch.where(excluded, 0.0, second_NK)
    return (first_NK.exp() * gap).sum(1)


def _log_mixture(first_NK: Tensor, second_NK: Tensor, share: float) -> Tensor:
    """log(share first + (1 - share) second)."""
    if share in (0.0, 1.0):
        return first_NK if share else second_NK
    excluded = torch.isneginf(first_NK) & torch.isneginf(second_NK)
    first_NK, second_NK = (torch.where(excluded, 0.0, logp) for logp in (first_NK, second_NK))
    mixture = torch.logaddexp(first_NK + math.log(share), second_NK + math.log1p(-share))
    return torch.where(excluded, -torch.inf, mixture)
