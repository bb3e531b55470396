"""Bugs that other distillation code has had, one test each; the docstring is the symptom that a user saw.

Of the same list, tested elsewhere:
a loss that depends on the split into micro-batches or ranks: test_loss.py, `..._micro_batches_...`, `..._two_ranks_...`
a detached zero (no gradient, a hanging rank) or NaN where nothing is selected: test_loss.py, `..._nothing_selected_...`
the mean taken over the masked-out positions: test_loss.py, `test_garbage_at_positions_that_do_not_count_...`
a fused loss that is another objective than the plain one: test_loss.py, `test_chunked_equals_plain_...`
KL the wrong way round: test_divergences.py, `test_argument_order`
JSD measured from the mixture: test_divergences.py, `test_jsd_measures_both_sides_against_the_mixture`
a gradient of total variation at ties: test_divergences.py, `test_total_variation_has_no_gradient_at_ties`
student share 0 still generates, share 1 still reads the data: test_contexts.py, `test_without_student_rows_...`,
`test_without_data_rows_...`
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reference import step_inputs
from varkd.distill.credit import FutureReturn, PrefixDiscrepancy, Reward
from varkd.distill.divergences import JSD, CrossEntropy, ForwardKL, SkewKL, SkewReverseKL, TargetRows
from varkd.distill.inputs import StepInputs
from varkd.distill.loss import denominators, distill_loss
from varkd.distill.method import Method, Term
from varkd.distill.prefixes import Data, Rollout
from varkd.distill.scores import StudentLogp, TeacherLogp
from varkd.distill.spaces import Full, TopK
from varkd.methods import METHODS
from varkd.rollout import Sampler
from varkd.types import Batch, Condition, Part
from varkd.world import Rng


def loss_of(method: Method, student, teacher, batch: Batch) -> tuple[Tensor, Part]:
    """The loss of one step, and the (only) part of its context."""
    rng = Rng(0, 3)
    context = method.contexts(batch, step_inputs(student, teacher, {}, rng))
    inputs = StepInputs(method, student, teacher, {}, rng, codebook_tables={})
    value, _ = distill_loss(inputs, context, denominators(inputs, context))
    return value, context.parts[0]


@pytest.mark.parametrize("divergence", [JSD(0.5), SkewKL(0.1), SkewReverseKL(0.1)], ids=lambda each: each.kind)
def test_a_mixture_of_two_probabilities_that_underflow(divergence):
    """NaN gradients once both models are sure: log(p/2 + q/2) is log 0 where p and q are below 1e-45."""
    s = torch.tensor([[0.0, -150.0, -200.0]], requires_grad=True)
    z = torch.tensor([[0.0, -160.0, -210.0]])
    assert s.softmax(1)[0, 1] == z.softmax(1)[0, 1] == 0
    value = divergence(s.log_softmax(1), z.log_softmax(1), TargetRows(torch.tensor([0])))
    value.sum().backward()
    assert value.isfinite().all() and s.grad is not None and s.grad.isfinite().all()


def test_a_truncated_top_k_is_not_a_divergence_and_ours_is():
    """A negative loss: sum over the teacher's first k codes of p (log p - log q), left as it is, can go below 0."""
    z, s = torch.tensor([[2.0, 1.0, 0.0, 0.0]]), torch.tensor([[4.0, 3.0, 0.0, 0.0]])
    lp, lq = z.log_softmax(1)[:, :2], s.log_softmax(1)[:, :2]
    assert (lp.exp() * (lp - lq)).sum() < 0
    for tail in (True, False):
        (view,) = TopK(2, tail=tail)(s.log_softmax(1), z.log_softmax(1), TargetRows(torch.tensor([0])), {})
        assert view.teacher_NK is not None
        torch.testing.assert_close(view.student_NK.exp().sum(1), torch.ones(1))
        assert float(ForwardKL()(view.student_NK, view.teacher_NK, view.rows)) >= 0


def test_the_temperature_of_the_samples_is_not_that_of_the_loss(student, teacher, batch):
    """Changing the sampling temperature changed the loss: one key for both."""

    def run(sampling: float, loss: float) -> tuple[Tensor, Part]:
        term = Term("kd", ForwardKL(), space=Full(loss))
        return loss_of(Method((term,), Rollout(sampler=Sampler(temperature=sampling))), student, teacher, batch)

    def expected(part: Part, temperature: float) -> Tensor:
        logits = [model.head(model(part.codes_BL, part.condition, part.plan)) for model in (student, teacher)]
        lq, lp = ((each / temperature).log_softmax(-1).flatten(0, 1) for each in logits)
        return temperature**2 * F.kl_div(lq, lp, log_target=True, reduction="batchmean")

    base, hot_samples, hot_loss = run(1.0, 1.0), run(0.5, 1.0), run(1.0, 2.0)
    assert torch.equal(base[1].codes_BL, hot_loss[1].codes_BL)
    assert not torch.equal(base[1].codes_BL, hot_samples[1].codes_BL)
    for (value, part), temperature in ((base, 1.0), (hot_samples, 1.0), (hot_loss, 2.0)):
        torch.testing.assert_close(value, expected(part, temperature), rtol=1e-9, atol=0)


def test_rewards_are_numbers(student, teacher, batch):
    """Training diverged: the advantage kept its graph, so the student was also taught to raise log p - log q."""
    value, part = loss_of(METHODS["opd"].method, student, teacher, batch)
    lq, lp = (
        model.head(model(part.codes_BL, part.condition, part.plan))
        .log_softmax(-1)
        .gather(2, part.codes_BL.unsqueeze(2))
        for model in (student, teacher)
    )
    weight = student.head.weight
    (found,) = torch.autograd.grad(value, weight)
    (held,) = torch.autograd.grad(-((lp - lq).detach() * lq).mean(), weight, retain_graph=True)
    (leaking,) = torch.autograd.grad(-((lp - lq) * lq).mean(), weight)
    torch.testing.assert_close(found, held, rtol=0, atol=1e-5 * float(held.abs().max()))
    assert (held - leaking).abs().max() > 0.1 * held.abs().max()


def part_and_scores(student) -> tuple[Part, dict[str, Tensor]]:
    """Two sequences drawn by the student itself: the ratio is 1."""
    draw = torch.Generator().manual_seed(0)
    codes_BL, row_B = torch.randint(12, (2, 6), generator=draw), torch.arange(2)
    part = Part.of("student", codes_BL, Condition(torch.zeros(2, dtype=torch.long)), student.plan(2), row_B)
    teacher_BL, student_BL = -3 * torch.rand(2, 2, 6, generator=draw)
    return replace(part, behavior_logp_BL=student_BL), {TeacherLogp(): teacher_BL, StudentLogp(): student_BL}


@pytest.mark.parametrize("mean", [True, False])
def test_the_return_of_a_code_leaves_out_its_own_reward(student, mean: bool):
    """Beside the exact single-step term r_t counted twice: the released returns run from t, not from t + 1."""
    part, scores = part_and_scores(student)
    credit = FutureReturn(mean=mean, clip=None)
    before_BL = credit(scores, part)
    other = {**scores, TeacherLogp(): scores[TeacherLogp()].clone()}
    other[TeacherLogp()][:, 3] += 1.0
    moved_BL = credit(other, part) - before_BL
    expected = torch.tensor([1 / 5, 1 / 4, 1 / 3, 0, 0, 0]) if mean else torch.tensor([1.0, 1, 1, 0, 0, 0])
    torch.testing.assert_close(moved_BL, expected.expand(2, 6), rtol=0, atol=1e-5)
    assert before_BL[:, -1].abs().max() < 1e-5  # nothing comes after the last code


def test_the_drift_of_a_prefix_leaves_out_the_code_itself(student):
    """The first code's weight was not 1 + gamma: the sum ran up to t instead of up to t - 1."""
    part, scores = part_and_scores(student)
    weight_BL = PrefixDiscrepancy(0.5)(scores, part) / Reward()(scores, part)
    torch.testing.assert_close(weight_BL[:, 0], torch.full((2,), 1.5))
    assert (weight_BL[:, -1] > 1).all()


def test_logits_are_those_of_their_own_code(student, batch):
    """A loss near that of guessing: logits and labels one position apart. The last code is nobody's prefix."""
    method = Method((Term("ce", CrossEntropy()),), Data())
    value, part = loss_of(method, student, None, batch)
    logits = student.head(student(part.codes_BL, part.condition, part.plan))
    other_BL = part.codes_BL.clone()
    other_BL[:, -1] = (other_BL[:, -1] + 1) % 12
    moved, _ = loss_of(method, student, None, replace(batch, codes_BL=other_BL))
    last = [F.cross_entropy(logits[:, -1], codes_BL[:, -1], reduction="sum") for codes_BL in (part.codes_BL, other_BL)]
    torch.testing.assert_close(moved - value, (last[1] - last[0]) / part.codes_BL.numel(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_a_first_step_needs_no_memory(name: str, student, teacher, batch):
    """TypeError in the first update: a threshold was still None where another mode would have set it."""
    method = METHODS[name].method.at(0.0, {})
    codebook_tables = method.prepare(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)))
    rng = Rng(0, 0)
    context = method.contexts(
        batch, step_inputs(student, teacher, {}, rng, codebook_tables=codebook_tables, reference=teacher)
    )
    inputs = StepInputs(method, student, teacher, {}, rng, codebook_tables=codebook_tables)
    value, _ = distill_loss(inputs, context, denominators(inputs, context))
    assert value.isfinite() and value.requires_grad


def test_a_student_that_is_its_teacher_has_nothing_to_learn(student, batch):
    """A loss that is not 0 at p = q: the constant sum of p log p was left out of the skewed divergence."""
    for name in ("distillm", "distillm2", "gkd", "imitkd_full", "todi", "akl", "taid", "eopd", "atkd"):
        method = METHODS[name].method.at(0.5, {"adaptive.contexts.shares.1.fraction": torch.tensor([0.5])})
        assert abs(loss_of(method, student, student, batch)[0].item()) < 1e-9, name
