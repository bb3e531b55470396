"""Sampled rewards against plain loops over positions, for every kind of plan, and as gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import reference
from varkd.distill.credit import (
    Credit,
    FutureReturn,
    Importance,
    NoCredit,
    PrefixDiscrepancy,
    Reward,
)
from varkd.distill.divergences import CrossEntropy, Divergence, ReverseKL
from varkd.distill.inputs import StepInputs
from varkd.distill.loss import distill_loss
from varkd.distill.method import Method, Term
from varkd.distill.prefixes import Rollout
from varkd.distill.scores import StudentLogp, TeacherLogp
from varkd.errors import VarkdError
from varkd.types import Condition, Context, Part, Plan
from varkd.world import Rng

ROWS = 4


def order(length: int, shuffled: bool) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    one = lambda: torch.randperm(length, generator=generator) if shuffled else torch.arange(length)
    return torch.stack([one() for _ in range(ROWS)])


PLANS = {
    "raster": Plan(order(6, False), (1,) * 6),
    "next scale": Plan(order(14, False), (1, 4, 9)),
    "parallel random": Plan(order(8, True), (1, 3, 2, 2)),
    "random": Plan(order(5, True), (1,) * 5),
    "all at once": Plan(order(5, True), (5,)),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
REWARDED: list[Credit] = [Importance(), Reward(), FutureReturn(), PrefixDiscrepancy()]


def case(plan: Plan, seed: int = 0, drift: float = 0.4) -> tuple[dict[str, Tensor], Part]:
    """Random log-probabilities: of the teacher, of the student, and of a student that is some updates older."""
    generator = torch.Generator().manual_seed(seed)
    teacher_BL, student_BL, noise_BL = torch.randn(3, *plan.order_BL.shape, generator=generator, dtype=torch.float64)
    scores = {TeacherLogp(): -3 + teacher_BL, StudentLogp(): -3 + student_BL}
    codes_BL = torch.zeros_like(plan.order_BL)
    part = Part.of("student", codes_BL, Condition(torch.zeros(ROWS)), plan, torch.arange(ROWS))
    return scores, replace(part, behavior_logp_BL=scores[StudentLogp()] + drift * noise_BL)


def steps_of(plan: Plan, row: int) -> list[int]:
    """The step of every raster position, by walking through the order."""
    walk = iter(plan.order_BL[row].tolist())
    step_of = {next(walk): step for step, size in enumerate(plan.sizes) for _ in range(size)}
    return [step_of[position] for position in range(plan.order_BL.shape[1])]


def by_hand(credit: Credit, scores: dict[str, Tensor], part: Part) -> Tensor:
    """The coefficient of every position, from the formulas and in plain Python."""
    assert part.behavior_logp_BL is not None
    table = []
    for row in range(len(part)):
        lp, lq, lb = (x[row].tolist() for x in (scores[TeacherLogp()], scores[StudentLogp()], part.behavior_logp_BL))
        step = steps_of(part.plan, row)
        reward = [p - q for p, q in zip(lp, lq, strict=True)]
        found = []
        for here in range(len(step)):
            ratio = math.exp(lq[here] - lb[here])
            if isinstance(credit, Importance):
                found.append(min(ratio, credit.largest))
                continue
            assert isinstance(credit, Reward | FutureReturn | PrefixDiscrepancy)
            advantage, factor = reward[here], 1.0
            if isinstance(credit, FutureReturn):
                later = [reward[j] / credit.scale for j in range(len(step)) if step[j] > step[here]]
                advantage = sum(later) / (max(len(later), 1) if credit.mean else 1)
            if isinstance(credit, PrefixDiscrepancy):
                earlier = sum(abs(reward[j]) for j in range(len(step)) if step[j] < step[here])
                factor = 1 + credit.gamma * (1 - earlier / sum(map(abs, reward)))  # type: ignore[operator]
            up, down = (1 + credit.clip, 1 - credit.clip) if credit.clip else (math.inf, -math.inf)
            flat = (advantage > 0 and ratio > up) or (advantage < 0 and ratio < down)
            found.append(0.0 if flat else factor * ratio * advantage)
        table.append(found)
    return torch.tensor(table, dtype=torch.float64)


@every_plan
@pytest.mark.parametrize(
    "credit",
    [
        Importance(), Importance(1.1), Reward(), Reward(None), Reward(0.5), FutureReturn(), FutureReturn(mean=False),
        FutureReturn(scale=0.5, clip=None), FutureReturn(mean=False, scale=2.0, clip=0.1), PrefixDiscrepancy(),
        PrefixDiscrepancy(-0.5, clip=None), PrefixDiscrepancy(1.0, clip=0.6), PrefixDiscrepancy(0.0),
    ],
    ids=repr,
)  # fmt: skip
def test_coefficients_are_those_of_plain_loops(plan: Plan, credit: Credit):
    for seed in range(3):
        scores, part = case(plan, seed)
        torch.testing.assert_close(credit(scores, part), by_hand(credit, scores, part))


@every_plan
def test_no_credit_is_one_everywhere(plan: Plan):
    scores, part = case(plan)
    assert torch.equal(NoCredit()(scores, part), torch.ones(plan.order_BL.shape))
    assert torch.equal(NoCredit()({}, replace(part, behavior_logp_BL=None)), torch.ones(plan.order_BL.shape))


@every_plan
def test_a_reward_reaches_strictly_earlier_steps_only(plan: Plan):
    """Exhaustively: change the reward of one position and see whose return moves, and whose prefix."""
    scores, part = case(plan)
    future, discrepancy = FutureReturn(mean=False, clip=None), PrefixDiscrepancy(0.5, clip=None)
    before = {credit: credit(scores, part) for credit in (future, discrepancy)}
    for row in range(ROWS):
        step = steps_of(plan, row)
        for changed in range(len(step)):
            other = scores[TeacherLogp()].clone()
            other[row, changed] += 1.5
            moved_BL = future({**scores, TeacherLogp(): other}, part) - before[future]
            moved = [bool(each.abs() > 1e-9) for each in moved_BL[row]]
            assert moved == [step[here] < step[changed] for here in range(len(step))]
            assert moved_BL.abs().sum() == pytest.approx(moved_BL[row].abs().sum().item())  # no other row
    # The first step has no prefix: its factor is 1 + gamma, whatever the rewards are.
    reward_BL = scores[TeacherLogp()] - scores[StudentLogp()]
    assert part.behavior_logp_BL is not None
    plain_BL = (scores[StudentLogp()] - part.behavior_logp_BL).exp() * reward_BL
    first_BL = torch.tensor([[each == 0 for each in steps_of(plan, row)] for row in range(ROWS)])
    torch.testing.assert_close(before[discrepancy][first_BL], 1.5 * plain_BL[first_BL])
    assert (before[discrepancy] / plain_BL >= 1 - 1e-9).all() and (before[discrepancy] / plain_BL <= 1.5 + 1e-9).all()


def test_codes_of_the_last_step_have_no_future():
    for plan in PLANS.values():
        scores, part = case(plan)
        last_BL = torch.tensor([[each == len(plan.sizes) - 1 for each in steps_of(plan, row)] for row in range(ROWS)])
        for credit in (FutureReturn(), FutureReturn(mean=False)):
            assert credit(scores, part)[last_BL].abs().max() < 1e-12


def test_equal_models_give_no_reward_and_no_nan():
    scores, part = case(PLANS["next scale"])
    scores[TeacherLogp()] = scores[StudentLogp()].clone()
    for credit in (Reward(), FutureReturn(), PrefixDiscrepancy()):
        assert (credit(scores, part) == 0).all()


# ---- PPO


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.5])
def test_clipping_has_the_gradient_of_the_clipped_objective(clip: float):
    """d/d log q of min(r A, clip(r, 1 - e, 1 + e) A), r = q / b, by autograd."""
    scores, part = case(PLANS["next scale"], seed=5, drift=1.5)
    assert part.behavior_logp_BL is not None
    advantage_BL = scores[TeacherLogp()] - scores[StudentLogp()]
    logp_BL = scores[StudentLogp()].clone().requires_grad_()
    ratio_BL = (logp_BL - part.behavior_logp_BL).exp()
    objective_BL = torch.minimum(ratio_BL * advantage_BL, ratio_BL.clamp(1 - clip, 1 + clip) * advantage_BL)
    (expected,) = torch.autograd.grad(objective_BL.sum(), logp_BL)
    torch.testing.assert_close(Reward(clip)(scores, part), expected)
    up, down = (expected[(advantage_BL > 0) == positive] == 0 for positive in (True, False))
    assert up.any() and down.any() and not up.all() and not down.all()  # both sides clip, and not everything


def test_fresh_samples_are_never_clipped():
    scores, part = case(PLANS["raster"], drift=0.0)
    torch.testing.assert_close(Reward(1e-6)(scores, part), scores[TeacherLogp()] - scores[StudentLogp()])


def test_importance_weights_are_capped():
    scores, part = case(PLANS["raster"], drift=3.0)
    free, capped = Importance(1e9)(scores, part), Importance(2.0)(scores, part)
    assert free.max() > 2 and torch.equal(capped, free.clamp(max=2.0)) and (free > 0).all()


# ---- as expectations: one step, every code once


@pytest.mark.parametrize("drift", [0.0, 0.7])
def test_the_mean_gradient_of_the_reward_is_that_of_the_reverse_kl(drift: float):
    """sum_v b(v) (q / b)(v) r(v) grad(-log q(v)), also where b is not q."""
    generator = torch.Generator().manual_seed(6)
    s, z, noise = torch.randn(3, 1, 7, generator=generator, dtype=torch.float64)
    lb = (s + drift * noise).log_softmax(1)[0]
    s = s.requires_grad_()
    lq, lp = s.log_softmax(1)[0], z.log_softmax(1)[0]
    plan = Plan(torch.zeros(7, 1, dtype=torch.long), (1,))
    part = Part.of("student", torch.arange(7).view(7, 1), Condition(torch.zeros(7)), plan, torch.arange(7))
    part = replace(part, behavior_logp_BL=lb.unsqueeze(1))
    scores = {TeacherLogp(): lp.unsqueeze(1), StudentLogp(): lq.detach().unsqueeze(1)}
    (expected,) = reference.reverse_kl(s.detach(), z)[1]
    surrogate = (lb.exp() * Reward(None)(scores, part).squeeze(1) * -lq).sum()
    torch.testing.assert_close(torch.autograd.grad(surrogate, s, retain_graph=True)[0][0], expected)
    weights = lb.exp() * Importance(1e9)(scores, part).squeeze(1)
    torch.testing.assert_close(weights, lq.detach().exp())  # what makes b's samples count as q's


# ---- in the loss


@pytest.mark.parametrize("divergence", [CrossEntropy(), ReverseKL()], ids=repr)
@pytest.mark.parametrize("credit", REWARDED, ids=repr)
def test_the_loss_holds_the_coefficient_fixed(student, teacher, batch, credit: Credit, divergence: Divergence):
    """The gradient is sum coefficient * grad D: nothing flows through rewards, ratios or returns."""
    plan = student.plan(8)
    logp = [m.head(m(batch.codes_BL, batch.condition, plan)).log_softmax(-1) for m in (student, teacher)]
    of_code = [each.detach().gather(2, batch.codes_BL.unsqueeze(2)).squeeze(2) for each in logp]
    noise_BL = 0.3 * torch.randn(8, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    part = Part.of("student", batch.codes_BL, batch.condition, plan, batch.row_B)
    part = replace(part, behavior_logp_BL=of_code[0] + noise_BL)
    method = Method((Term("d", divergence, credit=credit),), Rollout())
    inputs = StepInputs(method, student, teacher, {}, Rng(0), codebook_tables={}, chunk_rows=7)
    value, stats = distill_loss(inputs, Context((part,)), {"d": 10.0})

    coefficient_BL = by_hand(credit, {StudentLogp(): of_code[0], TeacherLogp(): of_code[1]}, part)
    q_BLV, p_BLV = logp[0], logp[1].detach()
    if isinstance(divergence, CrossEntropy):
        d_BL = -q_BLV.gather(2, batch.codes_BL.unsqueeze(2)).squeeze(2)
    else:
        d_BL = (q_BLV.exp() * (q_BLV - p_BLV)).sum(2)
    expected = (coefficient_BL * d_BL).sum() / 10
    assert expected.abs() > 1e-3
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    parameters = list(student.parameters())
    ours, theirs = (torch.autograd.grad(each, parameters) for each in (value, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # scores are float32
    if not isinstance(credit, Importance):
        (total, count) = stats.sums["reward/d"].tolist()
        assert count == 48 and total == pytest.approx(float((of_code[1] - of_code[0]).sum()), rel=1e-4)


@pytest.mark.parametrize("credit", REWARDED, ids=repr)
def test_codes_without_a_stored_probability_are_refused(credit: Credit):
    scores, part = case(PLANS["raster"])
    with pytest.raises(VarkdError, match="fresh student samples"):
        credit(scores, replace(part, behavior_logp_BL=None))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Reward(0.0),
        lambda: Reward(-0.2),
        lambda: FutureReturn(clip=0.0),
        lambda: FutureReturn(scale=0.0),
        lambda: PrefixDiscrepancy(-2.0),
        lambda: PrefixDiscrepancy(clip=-1.0),
        lambda: Importance(0.0),
        lambda: Importance(math.nan),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(VarkdError, match=r"reward|future_return|prefix_discrepancy|importance"):
        make()
