"""Exact enumeration of a toy model (3 codes, 3 positions): what the loss is, as an expectation over sequences.

KL(q || p) over sequences has a per-step part (what training on fixed student samples sees) and a future-credit part
(what the stop-gradient through sampling drops); KL(p || q) has only the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.distill.divergences import Divergence, ForwardKL, ReverseKL, TotalVariation
from varkd.distill.loss import LossInputs, distill_loss
from varkd.distill.method import Method, Term
from varkd.distill.reweighted import log_ratio
from varkd.distill.scene import Scene as _Scene
from varkd.types import Condition, Context, Part, Source
from varkd.world import Rng

CODES_BL = torch.tensor(list(product(range(3), repeat=3)))
CONDITION = Condition(torch.ones(27, dtype=torch.long))


@pytest.fixture
def models(make_model: Callable[..., Backbone]) -> tuple[Backbone, Backbone]:
    return make_model(1, 3, (1, 3), scale=0.3), make_model(2, 3, (1, 3), scale=0.3).requires_grad_(False)


def logp(model: Backbone) -> tuple[Tensor, Tensor]:
    """log p(. | x_<t) (27, 3, 3) and log p(x_t | x_<t) (27, 3) of all sequences."""
    all_BLV = model.head(model(CODES_BL, CONDITION, model.plan(27))).log_softmax(-1)
    return all_BLV, all_BLV.gather(2, CODES_BL.unsqueeze(2)).squeeze(2)


def gradient(value: Tensor, model: Backbone) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])


def distilled(
    divergence: Divergence, source: Source, probability_B: Tensor, models: tuple[Backbone, Backbone]
) -> Tensor:
    """sum_x probability(x) sum_t D_t, by the training loss on the enumerated sequences."""
    student, teacher = models
    part = Part.of(source, CODES_BL, CONDITION, student.plan(27), torch.arange(27))
    context = Context((replace(part, weight_B=probability_B.detach()),))
    inputs = LossInputs(Method((Term("d", divergence),)), student, teacher, {}, {}, Rng(0), chunk_rows=10)
    return distill_loss(inputs, context, {"d": 1.0})[0]


def test_enumeration_is_complete(models):
    for model in models:
        torch.testing.assert_close(logp(model)[1].sum(1).exp().sum(), torch.ones((), dtype=torch.float64))


def test_forward_kl_on_teacher_sequences_is_the_sequence_kl(models):
    (q_BLV, lq_BL), (_, lp_BL) = logp(models[0]), logp(models[1])
    del q_BLV
    p_B = lp_BL.sum(1).exp()
    sequence_kl = (p_B * (lp_BL.sum(1) - lq_BL.sum(1))).sum()
    ours = distilled(ForwardKL(), "teacher", p_B, models)
    assert sequence_kl > 0.05
    torch.testing.assert_close(ours, sequence_kl)
    torch.testing.assert_close(gradient(ours, models[0]), gradient(sequence_kl, models[0]))


def test_reverse_kl_on_student_sequences_is_the_per_step_part_of_the_sequence_kl(models):
    (lq_BLV, lq_BL), (lp_BLV, lp_BL) = logp(models[0]), logp(models[1])
    q_B = lq_BL.sum(1).exp()
    sequence_kl = (q_B * (lq_BL.sum(1) - lp_BL.sum(1))).sum()  # differentiated through q(x) too
    ours = distilled(ReverseKL(), "student", q_B, models)
    torch.testing.assert_close(ours, sequence_kl)

    step_kl_BL = (lq_BLV.exp() * (lq_BLV - lp_BLV)).sum(2).detach()
    future_BL = step_kl_BL.sum(1, keepdim=True) - step_kl_BL.cumsum(1)  # sum over j > t
    credit = gradient((q_B.detach() * (future_BL * lq_BL).sum(1)).sum(), models[0])
    torch.testing.assert_close(gradient(ours, models[0]) + credit, gradient(sequence_kl, models[0]))
    assert credit.norm() > 1e-2 * gradient(ours, models[0]).norm()  # the case tells the two apart


def test_total_variation_of_steps_bounds_that_of_sequences(models):
    lq_B, lp_B = (logp(model)[1].sum(1) for model in models)
    sequence_tv = 0.5 * (lq_B.exp() - lp_B.exp()).abs().sum()
    for source, probability_B in (("teacher", lp_B.exp()), ("student", lq_B.exp())):
        assert sequence_tv <= distilled(TotalVariation(), source, probability_B, models) + 1e-12


def test_full_importance_weights_turn_student_sequences_into_teacher_sequences(models):
    """kappa = L in `Reweighted` is self-normalised importance weighting: E_q[w f] = E_p[f]."""
    student, teacher = models
    part = Part.of("student", CODES_BL, CONDITION, student.plan(27), torch.arange(27))
    ratio_B = log_ratio(part, _Scene(student, teacher, {}, Rng(0))).double()
    lq_B, lp_B = (logp(model)[1].sum(1) for model in models)
    torch.testing.assert_close(lq_B.exp() * (3 * ratio_B).exp(), lp_B.exp(), rtol=1e-5, atol=1e-8)
