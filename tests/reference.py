"""Float64 closed forms, written from the formulas and not from the code: values and gradients.

Each divergence takes student logits s and teacher logits z, (N, V), and returns its value (N,) and its gradient with
respect to s (N, V). p is the teacher, q the student; m is a mixture. `plain_loss` at the end is not independent: it is
the loss of a context with full logits and autograd.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from varkd.distill import loss as loss_module
from varkd.distill.divergences import Rows
from varkd.distill.loss import Group, LossInputs, Stats
from varkd.distill.schedule import number
from varkd.types import Context

Pair = tuple[Tensor, Tensor]


def log_probs(s: Tensor, z: Tensor) -> Pair:
    s, z = s.double(), z.double()
    return s - s.logsumexp(1, keepdim=True), z - z.logsumexp(1, keepdim=True)


def _mix(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b)."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _centred(q: Tensor, inner: Tensor) -> Tensor:
    """q (inner - sum q inner): the softmax Jacobian applied to `inner`."""
    return q * (inner - (q * inner).sum(1, keepdim=True))


def forward_kl(s: Tensor, z: Tensor) -> Pair:
    lq, lp = log_probs(s, z)
    return (lp.exp() * (lp - lq)).sum(1), lq.exp() - lp.exp()


def reverse_kl(s: Tensor, z: Tensor) -> Pair:
    lq, lp = log_probs(s, z)
    r = lq - lp
    return (lq.exp() * r).sum(1), _centred(lq.exp(), r)


def jsd(s: Tensor, z: Tensor, beta: float, ends: bool = False) -> Pair:
    lq, lp = log_probs(s, z)
    lm = _mix(lp, lq, beta)
    value = beta * (lp.exp() * (lp - lm)).sum(1) + (1 - beta) * (lq.exp() * (lq - lm)).sum(1)
    gradient = (1 - beta) * _centred(lq.exp(), lq - lm)
    factor = 1 / (beta * (1 - beta)) if ends else 1.0
    return value * factor, gradient * factor


def skew_kl(s: Tensor, z: Tensor, alpha: float) -> Pair:
    lq, lp = log_probs(s, z)
    lm = _mix(lp, lq, alpha)
    return (lp.exp() * (lp - lm)).sum(1), -(1 - alpha) * _centred(lq.exp(), (lp - lm).exp())


def skew_reverse_kl(s: Tensor, z: Tensor, alpha: float) -> Pair:
    lq, lp = log_probs(s, z)
    lm = _mix(lq, lp, alpha)
    h = lq - lm - alpha * (lq - lm).exp()
    return (lq.exp() * (lq - lm)).sum(1), _centred(lq.exp(), h)


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
    return value, -a * p + q * (a * p).sum(1, keepdim=True) + _centred(q, (1 - a) * (lq - lp + 1))


def teacher_argmax(s: Tensor, z: Tensor) -> Pair:
    return cross_entropy(s, z, code=z.argmax(1))


def total_variation(s: Tensor, z: Tensor) -> Pair:
    lq, lp = log_probs(s, z)
    q, p = lq.exp(), lp.exp()
    return 0.5 * (p - q).abs().sum(1), 0.5 * _centred(q, torch.sign(q - p))


def cross_entropy(s: Tensor, z: Tensor, code: Tensor) -> Pair:
    lq, _ = log_probs(s, z)
    hit = torch.nn.functional.one_hot(code, s.shape[1]).double()
    return -(hit * lq).sum(1), lq.exp() - hit


def cluster_masses(p: Tensor, cluster: Tensor) -> Tensor:
    """P_k = sum of p over the codes of cluster k: (N, K), by a plain sum."""
    return torch.stack([p[:, cluster == k].sum(1) for k in range(int(cluster.max()) + 1)], dim=1)


def plain_loss(inputs: LossInputs, context: Context, denominators: Mapping[str, float]) -> Tensor:
    """The same loss written out with full logits and autograd: what the chunked one must equal."""
    total = torch.zeros((), dtype=torch.float64)
    for group in Group.all_of(context):
        part = group.stacked
        student_NV = inputs.student.head(inputs.student(part.codes_BL, part.condition, part.plan)).flatten(0, 1)
        teacher = loss_module._teacher_rows(inputs, part)
        teacher_NV = None if teacher is None else teacher.logits(slice(None))
        with torch.no_grad():
            hidden_ND = inputs.student(part.codes_BL, part.condition, part.plan).flatten(0, 1)
        rows = loss_module._term_rows(inputs, group, teacher, hidden_ND, Stats())
        for term in inputs.method.terms:
            about = Rows(part.supervision_BL.flatten(), rows[term.name].alpha_N)
            value_N = loss_module._term_value(term, student_NV, teacher_NV, about, inputs.products)
            total = total + (rows[term.name].weight_N * value_N).sum() * number(term.weight) / denominators[term.name]
    return total
