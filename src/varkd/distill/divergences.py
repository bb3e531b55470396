"""Divergences between two rows of log-probabilities: `(student_NK, teacher_NK, rows) -> value_N`, in nats.

p is the teacher, q the student; directions are named in words (`ForwardKL` = KL(p || q)). The same objects serve as
training losses and as evaluation metrics. Outcomes with log-probability -inf (masked ids) contribute exactly 0 and get
no gradient. Mixtures are formed by logaddexp, never by log of a sum that may underflow.
Weights that depend on p and q (AKL, ToDi) are constants of the gradient, as in their papers. With log q as the
variable, each outcome by itself, `gradient` is the derivative; the space carries it on to the logits.
Sources: Hinton et al. 2015; GKD (Agarwal et al. 2023, 2306.13649); DistiLLM (Ko et al. 2024, 2402.03898);
f-DISTILL (Wen et al. 2023, 2307.15190); ImitKD (Lin et al. 2020, 2009.07253); AKL (Wu et al. 2024, 2404.02657);
ToDi (2025, 2505.16297); TAID (Shing et al. 2025, 2501.16937); TIE-KD (2023, 2305.08096); ATKD (Zhong et al. 2024,
2402.11890); DistiLLM-2 (Ko et al. 2025, 2503.07067). `needs_support`: infinite where the teacher excludes a code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from varkd.distill.divergence_rule import DivergenceRule, TargetRows
from varkd.distill.logspace import log_mass, log_mixture, renormalized
from varkd.distill.schedule import Schedule, TaidTime, bounds, check_range, value_of, words
from varkd.distill.skew import SequenceSkew
from varkd.errors import VarkdError


class _Reverse(DivergenceRule):
    """Divergences with q log(q / p) in them."""

    @property
    def needs_support(self) -> bool:
        return True


@dataclass(frozen=True)
class CrossEntropy(DivergenceRule):
    """-log q(code): learning from the data (or from a teacher sample) alone."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    needs_teacher: ClassVar[bool] = False

    @property
    def summary(self) -> str:
        return "cross-entropy with the codes themselves, -log q(x_t)"

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor | None, rows: TargetRows) -> Tensor:
        del teacher_NK
        return -student_NK.gather(1, rows.target_N.unsqueeze(1)).squeeze(1)

    def gradient(self, student_NK: Tensor, teacher_NK: Tensor | None, rows: TargetRows) -> Tensor:
        del teacher_NK
        return torch.zeros_like(student_NK).scatter_(1, rows.target_N.unsqueeze(1), -1.0)


@dataclass(frozen=True)
class ForwardKL(DivergenceRule):
    """KL(p || q) = sum p (log p - log q). Gradient with respect to the student's logits: q - p."""

    kind: Literal["forward_kl"] = "forward_kl"

    @property
    def summary(self) -> str:
        return "forward KL, KL(p || q) = sum p (log p - log q)"

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        return _kl(teacher_NK, student_NK)

    def gradient(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        return teacher_NK.exp().neg_()


@dataclass(frozen=True)
class ReverseKL(_Reverse):
    """KL(q || p) = sum q (log q - log p)."""

    kind: Literal["reverse_kl"] = "reverse_kl"

    @property
    def summary(self) -> str:
        return "reverse KL, KL(q || p) = sum q (log q - log p)"

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        return _kl(student_NK, teacher_NK)

    def gradient(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        return _reverse_gradient(student_NK, teacher_NK)


@dataclass(frozen=True)
class JSD(DivergenceRule):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, eq. 1: beta weighs the teacher).

    It tends to 0 at both ends; `normalize="ends"` divides by beta (1 - beta), which is continuous with forward KL at
    beta = 0 and reverse KL at beta = 1.
    """

    beta: Schedule = 0.5
    normalize: Literal["none", "ends"] = "none"
    kind: Literal["jsd"] = "jsd"

    def __post_init__(self) -> None:
        check_range("jsd", "beta", self.beta, 0, 1)

    @property
    def needs_support(self) -> bool:
        return self.normalize == "ends" and bounds(self.beta)[1] == 1  # the reverse KL

    @property
    def summary(self) -> str:
        ends = ", divided by b (1 - b)" if self.normalize == "ends" else ""
        return f"Jensen-Shannon, b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = {words(self.beta)}{ends}"

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        beta = value_of(self.beta)
        if beta in (0.0, 1.0):
            if self.normalize == "none":
                return (student_NK.exp() * 0).sum(1)  # the limit itself, with a graph
            return _kl(teacher_NK, student_NK) if beta == 0 else _kl(student_NK, teacher_NK)
        mixture = log_mixture(teacher_NK, student_NK, beta)
        value = beta * _kl(teacher_NK, mixture) + (1 - beta) * _kl(student_NK, mixture)
        return value / (beta * (1 - beta)) if self.normalize == "ends" else value

    def gradient(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        beta, scale = value_of(self.beta), 1.0
        if beta in (0.0, 1.0):
            if self.normalize == "none":
                return torch.zeros_like(student_NK)
            return teacher_NK.exp().neg_() if beta == 0 else _reverse_gradient(student_NK, teacher_NK)
        if self.normalize == "ends":
            scale = 1 / (beta * (1 - beta))
        mixture = log_mixture(teacher_NK, student_NK, beta)
        return student_NK.exp().mul_(_gap(student_NK, mixture)).mul_(scale * (1 - beta))


class _Skewed(DivergenceRule):
    """Divergences from a mixture of both models; `alpha` is a number, or differs between sequences."""

    alpha: Schedule | SequenceSkew

    @property
    def skew(self) -> SequenceSkew | None:
        return self.alpha if isinstance(self.alpha, SequenceSkew) else None

    @property
    def number(self) -> Schedule | None:
        """`alpha`, where it is one number for all."""
        return None if isinstance(self.alpha, SequenceSkew) else self.alpha

    def _check_alpha(self, owner: str) -> None:
        if self.number is not None:
            check_range(owner, "alpha", self.number, 0, 1)

    @property
    def _alpha_words(self) -> str:
        return self.skew.summary if self.skew else words(self.number or 0.0)

    def _share(self, rows: TargetRows) -> float | Tensor:
        """The skew as one number, or as one per row (N, 1)."""
        if self.number is not None:
            return float(value_of(self.number))
        if rows.alpha_N is None:
            raise ValueError("a sequence skew needs the skew of every row (Rows.alpha_N)")
        return rows.alpha_N.unsqueeze(1)


@dataclass(frozen=True)
class SkewKL(_Skewed):
    """KL(p || alpha p + (1 - alpha) q), at most -log alpha (DistiLLM, eq. 4)."""

    alpha: Schedule | SequenceSkew = 0.1
    kind: Literal["skew_kl"] = "skew_kl"

    def __post_init__(self) -> None:
        self._check_alpha("skew_kl")

    @property
    def summary(self) -> str:
        return f"skewed forward KL, KL(p || a p + (1 - a) q), a = {self._alpha_words}"

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        alpha = self._share(rows)
        if isinstance(alpha, float) and alpha == 1:
            return (student_NK.exp() * 0).sum(1)  # the limit itself, with a graph
        return _kl(teacher_NK, log_mixture(teacher_NK, student_NK, alpha))

    def gradient(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        alpha = self._share(rows)
        if isinstance(alpha, float) and alpha == 1:
            return torch.zeros_like(student_NK)
        # p (1 - a) q / m: how much of the mixture is the student's
        kept = 1 - torch.as_tensor(alpha, dtype=student_NK.dtype, device=student_NK.device)
        ratio = _gap(student_NK, log_mixture(teacher_NK, student_NK, alpha))
        mine = torch.where(torch.isneginf(student_NK), 0.0, ratio.exp_().mul_(kept))
        return mine.mul_(teacher_NK.exp()).neg_()


@dataclass(frozen=True)
class SkewReverseKL(_Skewed):
    """KL(q || (1 - alpha) p + alpha q), at most -log alpha (DistiLLM, eq. 6).

    `detached` treats the mixture as a constant of the gradient (DistiLLM-2).
    """

    alpha: Schedule | SequenceSkew = 0.1
    detached: bool = False
    kind: Literal["skew_reverse_kl"] = "skew_reverse_kl"

    def __post_init__(self) -> None:
        self._check_alpha("skew_reverse_kl")

    @property
    def needs_support(self) -> bool:
        return self.number is not None and bounds(self.number)[0] == 0

    @property
    def summary(self) -> str:
        held = "; the mixture is a constant of the gradient" if self.detached else ""
        return f"skewed reverse KL, KL(q || (1 - a) p + a q), a = {self._alpha_words}{held}"

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        mixture = log_mixture(student_NK, teacher_NK, self._share(rows))
        return _kl(student_NK, mixture.detach() if self.detached else mixture)

    def gradient(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        alpha = self._share(rows)
        gap = _gap(student_NK, log_mixture(student_NK, teacher_NK, alpha))  # log q / m
        factor = gap + 1 if self.detached else gap + 1 - gap.exp() * alpha
        return factor.mul_(student_NK.exp())


@dataclass(frozen=True)
class TotalVariation(DivergenceRule):
    """1/2 sum |p - q|, in [0, 1]; 1 - TV is the acceptance rate of speculative decoding. Subgradient 0 at ties."""

    kind: Literal["total_variation"] = "total_variation"

    @property
    def summary(self) -> str:
        return "total variation, 1/2 sum |p - q|"

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        return 0.5 * (teacher_NK.exp() - student_NK.exp()).abs().sum(1)

    def gradient(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        student = student_NK.exp()
        return (teacher_NK.exp() - student).sign_().mul_(student).mul_(-0.5)


@dataclass(frozen=True)
class TeacherArgmax(DivergenceRule):
    """-log q(argmax p): the teacher's likeliest code as if it were data (ImitKD's label)."""

    kind: Literal["teacher_argmax"] = "teacher_argmax"

    @property
    def summary(self) -> str:
        return "cross-entropy with the teacher's likeliest code, -log q(argmax p)"

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        return -student_NK.gather(1, teacher_NK.argmax(1, keepdim=True)).squeeze(1)

    def gradient(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        return torch.zeros_like(student_NK).scatter_(1, teacher_NK.argmax(1, keepdim=True), -1.0)


@dataclass(frozen=True)
class AdaptiveKL(_Reverse):
    """g_H / g KL(p || q) + g_L / g KL(q || p), g_H and g_L = sum |p - q| over the teacher's head and its tail (AKL).

    The head is the longest prefix of the codes in order of p whose mass is at most `head`, and always the first code.
    Rows with p = q count 0.
    """

    head: Schedule = 0.5
    kind: Literal["adaptive_kl"] = "adaptive_kl"

    def __post_init__(self) -> None:
        check_range("adaptive_kl", "head", self.head, 0, 1)

    @property
    def summary(self) -> str:
        return (
            f"forward KL as far as p and q differ in the teacher's head (its first codes, of mass "
            f"{words(self.head)}), reverse KL as far as they differ in its tail"
        )

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        forward_N, reverse_N = self._weights(student_NK, teacher_NK)
        return forward_N * _kl(teacher_NK, student_NK) + reverse_N * _kl(student_NK, teacher_NK)

    def gradient(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        forward_N, reverse_N = self._weights(student_NK, teacher_NK)
        reverse = _reverse_gradient(student_NK, teacher_NK).mul_(reverse_N.unsqueeze(1))
        return reverse.sub_(teacher_NK.exp().mul_(forward_N.unsqueeze(1)))

    @torch.no_grad()
    def _weights(self, student_NK: Tensor, teacher_NK: Tensor) -> tuple[Tensor, Tensor]:
        """The shares (N,) of the forward and of the reverse KL: constants of the gradient."""
        teacher, order = teacher_NK.exp().sort(dim=1, descending=True, stable=True)
        gap = (teacher - student_NK.exp().gather(1, order)).abs()
        in_head = teacher.cumsum(1) <= value_of(self.head)
        in_head[:, 0] = True
        total = gap.sum(1)
        share = (gap * in_head).sum(1) / total.clamp_min(torch.finfo(gap.dtype).tiny)
        return share, torch.where(total > 0, 1 - share, 0.0)


@dataclass(frozen=True)
class ToDi(_Reverse):
    """sum_v a p log(p / q) + (1 - a) q log(q / p), a = sigmoid(sharpness * log(p / q)) per code (ToDi).

    At sharpness 1 the value is the sum of both KL, but not its gradient: a is a constant of it.
    """

    sharpness: float = 1.0
    kind: Literal["todi"] = "todi"

    def __post_init__(self) -> None:
        if not self.sharpness >= 0:
            raise VarkdError(f"todi: sharpness must be at least 0, got {self.sharpness}")

    @property
    def summary(self) -> str:
        return (
            "forward KL for the codes that the student underrates, reverse KL for those that it overrates: "
            f"the share of the first is sigmoid({words(self.sharpness)} log(p / q)) for each code"
        )

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        weight, ratio = self._weight(student_NK, teacher_NK)
        return ((weight * teacher_NK.exp() - (1 - weight) * student_NK.exp()) * ratio).sum(1)

    def gradient(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        weight, ratio = self._weight(student_NK, teacher_NK)
        student = student_NK.exp()
        reverse = torch.where(student == 0, 0.0, student * (1 - ratio)).mul_(1 - weight)
        return reverse.sub_(weight * teacher_NK.exp())

    def _weight(self, student_NK: Tensor, teacher_NK: Tensor) -> tuple[Tensor, Tensor]:
        """The share of the forward KL for each code, a constant of the gradient, and log p / q."""
        excluded = torch.isneginf(student_NK) & torch.isneginf(teacher_NK)
        ratio = torch.where(excluded, 0.0, teacher_NK) - torch.where(excluded, 0.0, student_NK)
        return torch.sigmoid(self.sharpness * ratio).detach(), ratio


@dataclass(frozen=True)
class TAID(DivergenceRule):
    """KL(p_t || q), p_t = softmax((1 - t) log q + t log p) with q held fixed: a target on the way to the teacher.

    The interpolation is geometric (of logits). At t = 1 it is the forward KL, at t = 0 it has no gradient.
    """

    time: Schedule = TaidTime()
    kind: Literal["taid"] = "taid"

    def __post_init__(self) -> None:
        check_range("taid", "time", self.time, 0, 1)

    @property
    def summary(self) -> str:
        return (
            "forward KL to a target on the way from student to teacher, softmax((1 - t) log q + t log p), "
            f"t = {words(self.time)}"
        )

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        return _kl(self._between(student_NK, teacher_NK), student_NK)

    def gradient(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        return self._between(student_NK, teacher_NK).exp_().neg_()

    @torch.no_grad()
    def _between(self, student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
        """The target on the way, as log-probabilities."""
        time = value_of(self.time)
        excluded = torch.isneginf(student_NK) | torch.isneginf(teacher_NK)
        student, teacher = (torch.where(excluded, 0.0, logp) for logp in (student_NK, teacher_NK))
        return renormalized(torch.where(excluded, -torch.inf, (1 - time) * student + time * teacher))


@dataclass(frozen=True)
class Ranking(DivergenceRule):
    """TIE-KD's ranking loss: the student must put the teacher's likeliest code first, and keep its order (2305.08096).

    With T_1.. and S_1.. the `top_k` likeliest codes of teacher and student: sum_j max(0, q(T_j) - q(T_1)) +
    sum_ij [p(T_i) > p(S_j)] max(0, q(S_j) - q(T_i)).
    """

    top_k: int = 5
    kind: Literal["ranking"] = "ranking"

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise VarkdError(f"ranking: top_k must be at least 1, got {self.top_k}")

    @property
    def summary(self) -> str:
        return (
            f"a ranking loss: the student must put the teacher's likeliest code first and keep the order of its "
            f"first {self.top_k}"
        )

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        del rows
        count = min(self.top_k, student_NK.shape[1])
        of_teacher, of_student = (logp.topk(count, dim=1).indices for logp in (teacher_NK, student_NK.detach()))
        q_teacher, q_student = (student_NK.exp().gather(1, codes) for codes in (of_teacher, of_student))
        first = (q_teacher - q_teacher[:, :1]).clamp_min(0).sum(1)
        # Compared as log-probabilities: probabilities that underflow would tie.
        wrong_Nij = teacher_NK.gather(1, of_teacher).unsqueeze(2) > teacher_NK.gather(1, of_student).unsqueeze(1)
        gap_Nij = (q_student.unsqueeze(1) - q_teacher.unsqueeze(2)).clamp_min(0)
        return first + (gap_Nij * wrong_Nij).sum((1, 2))


@dataclass(frozen=True)
class Decoupled(DivergenceRule):
    """One half of KL(p || q) = KL_b(p(g) || q(g)) + (1 - p(g)) KL(p without g || q without g) (ATKD; Zhao et al. 2022).

    `part="target"` is the binary KL of "g or not", `"rest"` the KL among the other codes, without its factor. g is the
    target code of the row, or with `of="argmax"` the teacher's likeliest code.
    """

    part: Literal["target", "rest"] = "rest"
    of: Literal["code", "argmax"] = "code"
    kind: Literal["decoupled"] = "decoupled"
    shown: ClassVar[tuple[str, ...]] = ("part", "of")

    @property
    def summary(self) -> str:
        g = "the code x_t" if self.of == "code" else "the teacher's likeliest code"
        if self.part == "target":
            return f"the half of KL(p || q) that asks for g or not g, g = {g}"
        return f"the half of KL(p || q) among the codes other than g, without its factor 1 - p(g), g = {g}"

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        g_N1, student, teacher = self._parted(student_NK, teacher_NK, rows)
        if self.part == "rest":
            return _kl(renormalized(teacher), renormalized(student))
        student, teacher = (
            torch.cat([logp.gather(1, g_N1), log_mass(others)], dim=1)
            for logp, others in ((student_NK, student), (teacher_NK, teacher))
        )
        return _kl(teacher, student)

    def gradient(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> Tensor:
        g_N1, student, teacher = self._parted(student_NK, teacher_NK, rows)
        if self.part == "rest":
            return renormalized(student).exp_().sub_(renormalized(teacher).exp_())
        gradient = renormalized(student).exp_().mul_(log_mass(teacher).exp_().neg_())
        return gradient.scatter_(1, g_N1, teacher_NK.gather(1, g_N1).exp_().neg_())

    def _parted(self, student_NK: Tensor, teacher_NK: Tensor, rows: TargetRows) -> tuple[Tensor, Tensor, Tensor]:
        """g (N, 1), and both sides without it."""
        g_N1 = teacher_NK.argmax(1, keepdim=True) if self.of == "argmax" else rows.target_N.unsqueeze(1)
        # The others are renormalized from their own logits, never by log(1 - p(g)), which cancels when p(g) nears 1.
        student, teacher = (logp.scatter(1, g_N1, -torch.inf) for logp in (student_NK, teacher_NK))
        return g_N1, student, teacher


Divergence = (
    CrossEntropy
    | ForwardKL
    | ReverseKL
    | JSD
    | SkewKL
    | SkewReverseKL
    | TotalVariation
    | TeacherArgmax
    | AdaptiveKL
    | ToDi
    | TAID
    | Ranking
    | Decoupled
)


def _kl(first_NK: Tensor, second_NK: Tensor) -> Tensor:
    """KL(first || second) row by row; outcomes that `first` excludes count 0."""
    return (first_NK.exp() * _gap(first_NK, second_NK)).sum(1)


def _reverse_gradient(student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """Of KL(q || p): q (log q - log p + 1)."""
    return (_gap(student_NK, teacher_NK) + 1).mul_(student_NK.exp())


def _gap(first_NK: Tensor, second_NK: Tensor) -> Tensor:
    """log first - log second, and 0 where `first` excludes an outcome."""
    excluded = torch.isneginf(first_NK)
    if not (first_NK.requires_grad or second_NK.requires_grad):
        return (first_NK - second_NK).masked_fill_(excluded, 0.0)
    # Masked before the product: 0 * inf would already be NaN, and NaN gradients survive a `where` after it.
    return torch.where(excluded, 0.0, first_NK) - torch.where(excluded, 0.0, second_NK)
