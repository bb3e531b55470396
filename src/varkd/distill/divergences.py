"""Divergences between two rows of log-probabilities: `(student_NK, teacher_NK, rows) -> value_N`, in nats.

p is the teacher, q the student; directions are named in words (`ForwardKL` = KL(p || q)). The same objects serve as
training losses and as evaluation metrics. Outcomes with log-probability -inf (masked ids) contribute exactly 0 and get
no gradient. Mixtures are formed by logaddexp, never by log of a sum that may underflow.
Sources: Hinton et al. 2015; GKD (Agarwal et al. 2023, 2306.13649); DistiLLM (Ko et al. 2024, 2402.03898);
f-DISTILL (Wen et al. 2023, 2307.15190).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from varkd.distill.schedule import Scalar, check_range, number


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


Divergence = CrossEntropy | ForwardKL | ReverseKL | JSD | SkewKL | SkewReverseKL | TotalVariation


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
