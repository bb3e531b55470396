"""Exact enumeration of a toy model (3 codes, 3 positions): what the loss is, as an expectation over sequences.

KL(q || p) over sequences has a per-step part (what training on fixed student samples sees) and a future-credit part
(what the stop-gradient through sampling drops); KL(p || q) has only the first. Policy gradients are checked twice:
exactly, over all sequences with their probabilities, and over sequences that the library sampled, within their standard
error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from reference import step_inputs
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import build
from varkd.distill.credit import FutureReturn, Importance, Reward
from varkd.distill.divergences import CrossEntropy, Divergence, ForwardKL, ReverseKL, TotalVariation
from varkd.distill.inputs import Prefixes, StepInputs
from varkd.distill.loss import distill_loss
from varkd.distill.method import Method, Term
from varkd.distill.prefixes import MixtureSampling, Rollout
from varkd.methods import METHODS
from varkd.rollout import Sampler
from varkd.types import Batch, Condition, Context, Part, Source
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


def trained(method: Method, parts: tuple[Part, ...], models: tuple[Backbone, Backbone]) -> Tensor:
    """The training loss as a plain sum: every denominator is 1."""
    inputs = StepInputs(method, *models, {}, Rng(0), codebook_tables={}, chunk_rows=10)
    return distill_loss(inputs, Context(parts), {term.name: 1.0 for term in method.terms})[0]


def enumerated(source: Source, probability_B: Tensor, student: Backbone, logp_BL: Tensor | None = None) -> Part:
    """Every sequence once, weighted by its probability; `logp_BL` is what its codes were drawn with."""
    part = Part.of(source, CODES_BL, CONDITION, student.plan(27), torch.arange(27))
    # Float64 on purpose: the weights of a run are float32, which would hide differences.
    behavior_BL = None if logp_BL is None else logp_BL.detach()
    return replace(part, weight_B=probability_B.detach(), behavior_logp_BL=behavior_BL)


def distilled(
    divergence: Divergence, source: Source, probability_B: Tensor, models: tuple[Backbone, Backbone]
) -> Tensor:
    """sum_x probability(x) sum_t D_t, by the training loss on the enumerated sequences."""
    return trained(Method((Term("d", divergence),)), (enumerated(source, probability_B, models[0]),), models)


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


# ---- policy gradients: MiniLLM and OPD

CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # scores and their credits are float32
FUTURE = Term("future", CrossEntropy(), credit=FutureReturn(mean=False, clip=None))
MINILLM = Method((Term("step", ReverseKL(), credit=Importance()), FUTURE), Rollout())
"""MiniLLM (2306.08543, eq. 9) with plain summed returns: no length norm, no clipping, no scale."""
OPD = Method((Term("opd", CrossEntropy(), credit=Reward(clip=None)),), Rollout())


def sequence_reverse_kl(models: tuple[Backbone, Backbone]) -> Tensor:
    """KL(q || p) over whole sequences, differentiated through q(x) too."""
    lq_B, lp_B = (logp(model)[1].sum(1) for model in models)
    return (lq_B.exp() * (lq_B - lp_B)).sum()


def tempered(model: Backbone, temperature: float) -> Tensor:
    """log b(x_t | x_<t) of the codes at another temperature, (27, 3)."""
    all_BLV = (logp(model)[0].detach() / temperature).log_softmax(-1)
    return all_BLV.gather(2, CODES_BL.unsqueeze(2)).squeeze(2)


def guided(model: Backbone, scale: float) -> Tensor:
    """log b(x_t | x_<t) of the codes under guidance, (27, 3)."""
    with torch.no_grad():
        logits, null = (
            model.head(model(CODES_BL, condition, model.plan(27)))
            for condition in (CONDITION, CONDITION.null(model.null_label))
        )
    return (null + scale * (logits - null)).log_softmax(-1).gather(2, CODES_BL.unsqueeze(2)).squeeze(2)


def mixed(models: tuple[Backbone, Backbone], alpha: float) -> Tensor:
    """log(alpha p + (1 - alpha) q) of the codes, (27, 3)."""
    lq_BL, lp_BL = (logp(model)[1].detach() for model in models)
    return (alpha * lp_BL.exp() + (1 - alpha) * lq_BL.exp()).log()


def test_minillm_is_the_gradient_of_the_sequence_reverse_kl(models):
    """w = 1: the student's own samples. Exact single steps and summed future rewards, nothing counted twice."""
    lq_BL = logp(models[0])[1]
    part = enumerated("student", lq_BL.sum(1).exp(), models[0], lq_BL)
    expected = gradient(sequence_reverse_kl(models), models[0])
    torch.testing.assert_close(gradient(trained(MINILLM, (part,), models), models[0]), expected, **CLOSE)
    alone = gradient(trained(replace(MINILLM, terms=MINILLM.terms[:1]), (part,), models), models[0])
    assert (alone - expected).norm() > 1e-2 * expected.norm()  # the returns are needed


def test_rewards_and_returns_together_are_the_same_gradient(models):
    """`Reward` in place of the exact single step: the score-function estimate of the whole."""
    lq_BL = logp(models[0])[1]
    part = enumerated("student", lq_BL.sum(1).exp(), models[0], lq_BL)
    sampled = Method((*OPD.terms, FUTURE), Rollout())
    expected = gradient(sequence_reverse_kl(models), models[0])
    torch.testing.assert_close(gradient(trained(sampled, (part,), models), models[0]), expected, **CLOSE)


@pytest.mark.parametrize("alpha", [0.2, 0.6])
def test_full_products_make_token_mix_unbiased(models, alpha: float):
    """E_b[prod(q / b) g(x)] = E_q[g(x)]: the products enter as sequence weights, the ratio of one code is then 1."""
    lq_BL, lb_BL = logp(models[0])[1].detach(), mixed(models, alpha)
    product_B = (lq_BL - lb_BL).sum(1).exp()
    part = enumerated("student", lb_BL.sum(1).exp() * product_B, models[0], lq_BL)
    expected = gradient(sequence_reverse_kl(models), models[0])
    torch.testing.assert_close(gradient(trained(MINILLM, (part,), models), models[0]), expected, **CLOSE)
    # MiniLLM's own weight is the ratio of one code: cheaper, and biased.
    cut = gradient(trained(MINILLM, (enumerated("student", lb_BL.sum(1).exp(), models[0], lb_BL),), models), models[0])
    assert (cut - expected).norm() > 1e-3 * expected.norm()


def behaviors(models: tuple[Backbone, Backbone]) -> dict[str, tuple[Tensor, Prefixes]]:
    """log b of every code, and the context that samples so."""
    student = models[0]
    return {
        "plain": (logp(student)[1].detach(), Rollout()),
        "tempered": (tempered(student, 0.7), Rollout(sampler=Sampler(temperature=0.7))),
        "guided": (guided(student, 1.5), Rollout(sampler=Sampler(guidance=1.5))),
        "mixture_sampling": (mixed(models, 0.3), MixtureSampling(alpha=0.3)),
        "teacher": (logp(models[1])[1].detach(), Rollout("teacher")),
    }


BEHAVIORS = ["plain", "tempered", "guided", "mixture_sampling", "teacher"]


@pytest.mark.parametrize("name", BEHAVIORS)
def test_opd_is_the_reverse_kl_of_each_step_on_the_prefixes_that_it_sees(models, name: str):
    """E_b[-(q / b) r log q(x)] has the gradient of sum_t KL(q_t || p_t), whatever b drew the prefixes and the codes."""
    lb_BL, contexts = behaviors(models)[name]
    probability_B, source = lb_BL.sum(1).exp(), contexts.sources[0]
    ours = trained(OPD, (enumerated(source, probability_B, models[0], lb_BL),), models)
    expected = gradient(distilled(ReverseKL(), source, probability_B, models), models[0])
    torch.testing.assert_close(gradient(ours, models[0]), expected, **CLOSE)
    if name != "plain":  # without the ratio it would be another gradient
        lq_BL = logp(models[0])[1]
        blind = trained(OPD, (enumerated(source, probability_B, models[0], lq_BL),), models)
        assert (gradient(blind, models[0]) - expected).norm() > 1e-2 * expected.norm()


def sampled_part(contexts: Prefixes, models: tuple[Backbone, Backbone], count: int) -> Part:
    batch = Batch(torch.zeros(count, 3, dtype=torch.long), torch.ones(count, dtype=torch.long), torch.arange(count))
    return contexts(batch, step_inputs(*models, {}, Rng(0))).parts[0]


def once_each(part: Part, student: Backbone, weight_B: Tensor) -> Part:
    """The same sequences, each of the 27 once: its weight is the sum of the weights of its copies."""
    number_B = part.codes_BL @ torch.tensor([9, 3, 1])
    weight = torch.zeros(27, dtype=torch.float64).index_add(0, number_B, weight_B.double())
    assert part.behavior_logp_BL is not None
    logp_BL = torch.zeros(27, 3).index_put((number_B,), part.behavior_logp_BL)
    return enumerated(part.source, weight, student, logp_BL)


def per_sequence(method: Method, part: Part, models: tuple[Backbone, Backbone]) -> Tensor:
    """The gradient of each of the 27 sequences alone, at weight 1: (27, number of parameters)."""
    one = replace(part, weight_B=torch.ones(27))
    return torch.stack(
        [gradient(trained(method, (one.select(slice(n, n + 1)),), models), models[0]) for n in range(27)]
    )


def assert_within_standard_errors(gradient_BP: Tensor, weight_B: Tensor, number_B: Tensor, expected_P: Tensor) -> None:
    """The mean of weight * gradient over samples, parameter by parameter and in length."""
    num = len(number_B)
    share_B = torch.zeros(27, dtype=torch.float64).index_add(0, number_B, weight_B.double()) / num
    square_B = torch.zeros(27, dtype=torch.float64).index_add(0, number_B, weight_B.double().square()) / num
    mean_P = share_B @ gradient_BP
    error_P = ((square_B @ gradient_BP.square() - mean_P.square()).clamp_min(0) / num).sqrt()
    off_P = (mean_P - expected_P).abs() / (error_P + 1e-6)
    assert off_P.max() < 5 and off_P.square().mean() < 4
    assert error_P.norm() < 0.2 * expected_P.norm()  # the case can tell


@pytest.mark.parametrize("name", BEHAVIORS)
def test_opd_by_the_librarys_own_samples(models, name: str):
    """20,000 sequences from `rollout` with the log-probabilities that it stored, against the exact gradient."""
    lb_BL, contexts = behaviors(models)[name]
    part = sampled_part(contexts, models, 20_000)
    one_each = once_each(part, models[0], torch.ones(20_000))
    gradient_BP = per_sequence(OPD, one_each, models)
    expected = gradient(distilled(ReverseKL(), part.source, lb_BL.sum(1).exp(), models), models[0])
    number_B = part.codes_BL @ torch.tensor([9, 3, 1])
    assert_within_standard_errors(gradient_BP, torch.ones(20_000), number_B, expected)
    # Each sequence's copies at once: the same mean, by the training loss.
    whole = gradient(trained(OPD, (replace(one_each, weight_B=one_each.weight_B / 20_000),), models), models[0])
    share_B = torch.bincount(number_B, minlength=27).double() / 20_000
    torch.testing.assert_close(whole, share_B @ gradient_BP, **CLOSE)


def test_full_products_of_the_librarys_token_mix(models):
    """Weights from the stored log-probabilities: 20,000 sequences against the sequence reverse KL."""
    part = sampled_part(MixtureSampling(alpha=0.3), models, 20_000)
    number_B, lq_BL = part.codes_BL @ torch.tensor([9, 3, 1]), logp(models[0])[1].detach()
    assert part.behavior_logp_BL is not None
    weight_B = (lq_BL[number_B] - part.behavior_logp_BL).sum(1).exp()
    assert float(weight_B.mean()) == pytest.approx(1, abs=4 * float(weight_B.std()) / 20_000**0.5)
    gradient_BP = per_sequence(MINILLM, enumerated("student", torch.ones(27), models[0], lq_BL), models)
    expected = gradient(sequence_reverse_kl(models), models[0])
    assert_within_standard_errors(gradient_BP, weight_B, number_B, expected)


# ---- f-DISTILL's Jensen-Shannon


def test_stepwise_js_bounds_that_of_sequences(models):
    """With 1/2-1/2 mixtures in every step; with the mixtures' own posterior weights it is exact."""
    (lq_BLV, lq_BL), (lp_BLV, lp_BL) = ([each.detach() for each in logp(model)] for model in models)
    q_B, p_B = lq_BL.sum(1).exp(), lp_BL.sum(1).exp()
    m_B = (p_B + q_B) / 2
    true_js = 0.5 * (p_B * (p_B / m_B).log()).sum() + 0.5 * (q_B * (q_B / m_B).log()).sum()
    method = METHODS["fdistill_js"].method
    parts = (enumerated("teacher", p_B, models[0]), enumerated("student", q_B, models[0]))
    ours = trained(method, parts, models).detach()
    assert 0 < true_js * 1.005 < ours  # above, and not only by rounding
    # KL of sequences to any mixture law is the sum of the steps' KL: take m(x_t | x_<t) itself.
    weight_BL1 = torch.cat([torch.zeros(27, 1), (lp_BL - lq_BL).cumsum(1)[:, :-1]], dim=1).sigmoid().unsqueeze(2)
    lm_BLV = (weight_BL1 * lp_BLV.exp() + (1 - weight_BL1) * lq_BLV.exp()).log()
    steps = [
        0.5 * (law_B * (l_BLV.exp() * (l_BLV - lm_BLV)).sum((1, 2))).sum()
        for law_B, l_BLV in ((p_B, lp_BLV), (q_B, lq_BLV))
    ]
    torch.testing.assert_close(sum(steps), true_js)


def test_the_tvd_preset_is_above_the_total_variation_of_sequences(models):
    q_B, p_B = (logp(model)[1].detach().sum(1).exp() for model in models)
    parts = (enumerated("teacher", p_B, models[0]), enumerated("student", q_B, models[0]))
    ours = trained(METHODS["fdistill_tvd"].method, parts, models) / 2  # the preset is a mean over both halves
    assert 0.5 * (p_B - q_B).abs().sum() <= ours + 1e-12


# ---- several codes a step

TWO_SCALES = {
    "vocab_size": 2,
    "num_classes": 3,
    "scales": (1, 2),
    "code_dim": 4,
    "num_layers": 2,
    "dim": 16,
    "num_heads": 2,
    "ffn_dim": 24,
}


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()], ids=lambda divergence: divergence.kind)
def test_the_codes_of_a_scale_together_have_the_sum_of_their_kls(divergence: Divergence):
    """Two codes, a scale of one position and one of four: 2 coarse maps times 16 fine ones."""
    student, teacher = (build("var", TWO_SCALES, seed=seed).double().eval() for seed in (1, 2))
    for seed, model in enumerate((student, teacher)):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3, generator=generator)
    codes_BL = torch.tensor(list(product(range(2), repeat=5)))
    condition, plan = Condition(torch.ones(32, dtype=torch.long)), student.plan(32)
    assert plan.sizes == (1, 4)
    with torch.no_grad():
        lq_BLV, lp_BLV = (m.head(m(codes_BL, condition, plan)).log_softmax(-1) for m in (student, teacher))
    first, second = (lp_BLV, lq_BLV) if isinstance(divergence, ForwardKL) else (lq_BLV, lp_BLV)
    of_codes = [each.gather(2, codes_BL.unsqueeze(2)).squeeze(2) for each in (first, second)]
    method, part = Method((Term("d", divergence),)), Part.of("data", codes_BL, condition, plan, torch.arange(32))
    coarse_kl = (first[0, 0].exp() * (first[0, 0] - second[0, 0])).sum()
    for coarse in range(2):
        rows = codes_BL[:, 0] == coarse
        joint = [each[rows, 1:].sum(1) for each in of_codes]  # log-probability of all 16 fine maps
        torch.testing.assert_close(joint[0].exp().sum(), torch.ones((), dtype=torch.float64))
        joint_kl = (joint[0].exp() * (joint[0] - joint[1])).sum()
        one = part.select(rows.nonzero()[0])  # any fine map: its own codes are not seen
        ours = trained(method, (one,), (student, teacher))
        assert joint_kl > 1e-3
        torch.testing.assert_close(ours - coarse_kl, joint_kl, rtol=1e-5, atol=1e-9)
    # And so over whole images: the sum over steps is the KL of the 32 of them.
    law = [each.sum(1) for each in of_codes]
    whole = trained(method, (replace(part, weight_B=law[0].exp()),), (student, teacher))
    torch.testing.assert_close(whole, (law[0].exp() * (law[0] - law[1])).sum(), rtol=1e-5, atol=1e-9)
