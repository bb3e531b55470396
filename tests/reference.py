"""Float64 closed forms, written from the formulas and not from the code: values and gradients.

Each divergence takes student logits s and teacher logits z, (N, V), and returns its value (N,) and its gradient with
respect to s (N, V). p is the teacher, q the student; m is a mixture. `plain_loss` at the end is not independent: it is
the loss of a context with full logits and autograd.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from varkd.distill import loss as loss_module
from varkd.distill.divergences import TargetRows
from varkd.distill.inputs import Prefixes, StepInputs
from varkd.distill.logspace import log_softmax
from varkd.distill.loss import Group, Stats
from varkd.distill.prefixes import Rollout
from varkd.distill.schedule import value_of
from varkd.distill.selection import SelectionRule
from varkd.methods import METHODS
from varkd.types import Batch, Context, Part

Pair = tuple[Tensor, Tensor]


def step_inputs(*models_state_rng: Any, **others: Any) -> StepInputs:
    """Inputs for a source of sequences, which does not look at the method."""
    return StepInputs(METHODS["ce"].method, *models_state_rng, **others)


@dataclass(frozen=True)
class FirstHalf(SelectionRule):
    """Weight 1 on the first three positions, `floor` on the others: a selection of one's own that is known by hand."""

    floor: float = 0.0
    summary: ClassVar[str] = "the first three positions"  # type: ignore[misc]

    def __call__(self, scores: Any, part: Part, space: Any, threshold_L: Any, rng: Any) -> Tensor:
        return torch.where(torch.arange(part.codes_BL.shape[1]) < 3, 1.0, self.floor).expand(part.codes_BL.shape)


@dataclass(frozen=True)
class Weighed(Prefixes):
    """Student samples with sequence weights, which belong to their global rows: contexts of one's own."""

    summary: ClassVar[str] = "student samples that count differently"  # type: ignore[misc]

    def __call__(self, batch: Batch, inputs: StepInputs) -> Context:
        (part,) = Rollout()(batch, inputs).parts
        return Context((replace(part, weight_B=0.25 + (part.row_B % 4) / 2),))


def log_probs(s: Tensor, z: Tensor) -> Pair:
    s, z = s.double(), z.double()
    return s - s.logsumexp(1, keepdim=True), z - z.logsumexp(1, keepdim=True)


def _mix(log_a: Tensor, log_b: Tensor, share: float | Tensor) -> Tensor:
    """log(share a + (1 - share) b); a share per row is (N, 1)."""
    share = torch.as_tensor(share, dtype=torch.float64)
    return torch.logaddexp(log_a + share.log(), log_b + (1 - share).log())


def _centered(q: Tensor, inner: Tensor) -> Tensor:
    """q (inner - sum q inner): the softmax Jacobian applied to `inner`."""
    return q * (inner - (q * inner).sum(1, keepdim=True))


def forward_kl(s: Tensor, z: Tensor) -> Pair:
    lq, lp = log_probs(s, z)
    return (lp.exp() * (lp - lq)).sum(1), lq.exp() - lp.exp()


def reverse_kl(s: Tensor, z: Tensor) -> Pair:
    lq, lp = log_probs(s, z)
    r = lq - lp
    return (lq.exp() * r).sum(1), _centered(lq.exp(), r)


def jsd(s: Tensor, z: Tensor, beta: float, ends: bool = False) -> Pair:
    lq, lp = log_probs(s, z)
    lm = _mix(lp, lq, beta)
    value = beta * (lp.exp() * (lp - lm)).sum(1) + (1 - beta) * (lq.exp() * (lq - lm)).sum(1)
    gradient = (1 - beta) * _centered(lq.exp(), lq - lm)
    factor = 1 / (beta * (1 - beta)) if ends else 1.0
    return value * factor, gradient * factor


def skew_kl(s: Tensor, z: Tensor, alpha: float | Tensor) -> Pair:
    lq, lp = log_probs(s, z)
    lm = _mix(lp, lq, alpha)
    return (lp.exp() * (lp - lm)).sum(1), -(1 - alpha) * _centered(lq.exp(), (lp - lm).exp())


def skew_reverse_kl(s: Tensor, z: Tensor, alpha: float | Tensor, detached: bool = False) -> Pair:
    """`detached` leaves out what the gradient owes to the mixture."""
    lq, lp = log_probs(s, z)
    lm = _mix(lq, lp, alpha)
    h = lq - lm - (0 if detached else alpha * (lq - lm).exp())
    return (lq.exp() * (lq - lm)).sum(1), _centered(lq.exp(), h)


def adaptive_kl(s: Tensor, z: Tensor, head: float) -> Pair:
    """Row by row and code by code, in plain Python."""
    lq, lp = log_probs(s, z)
    shares = []
    for q, p in zip(lq.exp().tolist(), lp.exp().tolist(), strict=True):
        mass, gap_head, gap_tail, still_head = 0.0, 0.0, 0.0, True
        for place, code in enumerate(sorted(range(len(p)), key=lambda v: -p[v])):
            mass += p[code]
            still_head = still_head and (mass <= head or place == 0)
            if still_head:
                gap_head += abs(p[code] - q[code])
            else:
                gap_tail += abs(p[code] - q[code])
        shares.append(gap_head / (gap_head + gap_tail))
    share = torch.tensor(shares, dtype=torch.float64)
    (forward, forward_gradient), (reverse, reverse_gradient) = forward_kl(s, z), reverse_kl(s, z)
    value = share * forward + (1 - share) * reverse
    return value, share.unsqueeze(1) * forward_gradient + (1 - share).unsqueeze(1) * reverse_gradient


def todi(s: Tensor, z: Tensor, sharpness: float) -> Pair:
    """The gradient of methods.md: -a p + q sum(a p) + q (h - sum q h), h = (1 - a) (log q/p + 1)."""
    lq, lp = log_probs(s, z)
    q, p = lq.exp(), lp.exp()
    a = 1 / (1 + (-sharpness * (lp - lq)).exp())
    value = (a * p * (lp - lq) + (1 - a) * q * (lq - lp)).sum(1)
    return value, -a * p + q * (a * p).sum(1, keepdim=True) + _centered(q, (1 - a) * (lq - lp + 1))


def taid(s: Tensor, z: Tensor, time: float) -> Pair:
    """KL(p_t || q) and q - p_t, p_t = softmax((1 - t) s + t z) as if it did not depend on s."""
    lq, lt = log_probs(s, (1 - time) * s.double() + time * z.double())
    return (lt.exp() * (lt - lq)).sum(1), lq.exp() - lt.exp()


def ranking(s: Tensor, z: Tensor, top_k: int) -> Pair:
    """Row by row and pair by pair, in plain Python: the value, and how often each q(v) is pushed down or up."""
    lq, lp = log_probs(s, z)
    values, pushes = [], torch.zeros_like(lq)
    for row, (q, p) in enumerate(zip(lq.exp().tolist(), lp.tolist(), strict=True)):
        first_of = lambda score: sorted(range(len(score)), key=lambda v: -score[v])[:top_k]
        teacher, student = first_of(p), first_of(lq[row].tolist())
        pairs = [(j, teacher[0]) for j in teacher]
        pairs += [(j, i) for i in teacher for j in student if p[i] > p[j]]
        value = 0.0
        for too_high, too_low in pairs:
            if q[too_high] > q[too_low]:
                value += q[too_high] - q[too_low]
                pushes[row, too_high] += 1
                pushes[row, too_low] -= 1
        values.append(value)
    return torch.tensor(values, dtype=torch.float64), _centered(lq.exp(), pushes)


def decoupled(s: Tensor, z: Tensor, part: str, code: Tensor | None = None) -> Pair:
    """Both halves with the target's column cut out; `code` None is the teacher's likeliest one.

    The gradient of the binary half is q(g) - p(g) at g and shares its negative out among the others by q; that of the
    rest is q - p among the others, both without g.
    """
    code = z.argmax(1) if code is None else code
    is_g = torch.nn.functional.one_hot(code, s.shape[1]).bool()
    lq, lp = log_probs(s, z)
    cut = [logp[~is_g].view(len(s), -1) for logp in (lq, lp)]
    mass_q, mass_p = (logp.logsumexp(1) for logp in cut)
    rest_q, rest_p = (logp - logp.logsumexp(1, keepdim=True) for logp in cut)
    gradient = torch.zeros_like(lq)
    if part == "rest":
        gradient[~is_g] = (rest_q.exp() - rest_p.exp()).flatten()
        return (rest_p.exp() * (rest_p - rest_q)).sum(1), gradient
    g_q, g_p = lq[is_g], lp[is_g]
    gap = g_q.exp() - g_p.exp()
    gradient[is_g] = gap
    gradient[~is_g] = (-gap.unsqueeze(1) * rest_q.exp()).flatten()
    return g_p.exp() * (g_p - g_q) + mass_p.exp() * (mass_p - mass_q), gradient


def teacher_argmax(s: Tensor, z: Tensor) -> Pair:
    return cross_entropy(s, z, code=z.argmax(1))


def total_variation(s: Tensor, z: Tensor) -> Pair:
    lq, lp = log_probs(s, z)
    q, p = lq.exp(), lp.exp()
    return 0.5 * (p - q).abs().sum(1), 0.5 * _centered(q, torch.sign(q - p))


def cross_entropy(s: Tensor, z: Tensor, code: Tensor) -> Pair:
    lq, _ = log_probs(s, z)
    hit = torch.nn.functional.one_hot(code, s.shape[1]).double()
    return -(hit * lq).sum(1), lq.exp() - hit


def cluster_masses(p: Tensor, cluster: Tensor) -> Tensor:
    """P_k = sum of p over the codes of cluster k: (N, K), by a plain sum."""
    return torch.stack([p[:, cluster == k].sum(1) for k in range(int(cluster.max()) + 1)], dim=1)


def top_k_logits(logits: Tensor, codes: Tensor) -> Tensor:
    """Logits of the codes (N, K) and, behind them, of all other codes together: row by row, column by column."""
    rows = []
    for logit, kept in zip(logits.double(), codes.tolist(), strict=True):
        others = [v for v in range(len(logit)) if v not in kept]
        rows.append(torch.cat([logit[kept], logit[others].logsumexp(0, keepdim=True)]))
    return torch.stack(rows)


def plain_loss(inputs: StepInputs, context: Context, denominators: Mapping[str, float]) -> Tensor:
    """The same loss written out with full logits and autograd: what the chunked one must equal."""
    total = torch.zeros((), dtype=torch.float64)
    for group in Group.all_of(context):
        part = group.stacked
        student_NV = inputs.student.head(inputs.student(part.codes_BL, part.condition, part.plan)).flatten(0, 1)
        student_NV = log_softmax(student_NV)
        teacher = loss_module._teacher_rows(inputs, part)
        teacher_NV = None if teacher is None else log_softmax(teacher.logits(slice(None)))
        with torch.no_grad():
            hidden_ND = inputs.student(part.codes_BL, part.condition, part.plan).flatten(0, 1)
        rows = loss_module._term_rows(inputs, group, teacher, hidden_ND, Stats())
        for term in inputs.method.terms:
            about = TargetRows(part.supervision_BL.flatten(), rows[term.name].alpha_N)
            value_N = loss_module._term_value(term, student_NV, teacher_NV, about, inputs.codebook_tables)
            total = total + (rows[term.name].weight_N * value_N).sum() * value_of(term.weight) / denominators[term.name]
    return total
