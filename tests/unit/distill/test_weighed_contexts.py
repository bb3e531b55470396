"""Weights of positions by their prefix, and the best of several samples: by hand, over any split, and in mixtures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference import step_inputs
from varkd.backbones.store import build
from varkd.distill.bestof import FAR, BestOf
from varkd.distill.credit import DiscrepancyDecay, Reward
from varkd.distill.describe import cost_at, explain, phrase
from varkd.distill.divergences import CrossEntropy, ForwardKL
from varkd.distill.inputs import StepInputs, in_row_order, merge
from varkd.distill.method import Method, Term
from varkd.distill.mixture import Mixture, Share
from varkd.distill.prefixes import Data, MixedRollout, MixtureSampling, Rollout, SpeculativeSampling
from varkd.distill.replay import Replay
from varkd.distill.reweighted import PrefixReweighted, Reweighted, code_log_ratios, prefix_weights
from varkd.errors import VarkdError
from varkd.rollout import Sampler
from varkd.types import Context, Part
from varkd.world import Rng

MIXTURE = Mixture((Share(Data(), 0.5), Share(Rollout(), 0.5)))


@pytest.fixture
def inputs(student, teacher, make_model) -> StepInputs:
    return step_inputs(student, teacher, {}, Rng(0, 2), chunk_rows=5, reference=make_model(3))


@torch.no_grad()
def code_logp(model, part: Part) -> Tensor:
    logp = model.head(model(part.codes_BL, part.condition, part.plan)).log_softmax(-1)
    return logp.gather(2, part.codes_BL.unsqueeze(2)).squeeze(2)


# ---- weights of positions by their prefix


def by_hand(ratio_BL: Tensor, part: Part, kappa: float, clip: float) -> Tensor:
    """Loops over rows and steps: weights by raster position."""
    raw_BL = torch.zeros_like(ratio_BL)
    for row in range(len(part)):
        begin, total = 0, 0.0
        for size in part.plan.sizes:
            here = part.plan.order_BL[row, begin : begin + size]
            raw_BL[row, here] = min(math.exp(kappa * total), clip)
            total, begin = total + float(ratio_BL[row, here].sum()), begin + size
    found_BL = torch.zeros_like(raw_BL)
    for rank in range(raw_BL.shape[1]):
        at = torch.arange(len(part)), part.plan.order_BL[:, rank]
        found_BL[at] = raw_BL[at] / raw_BL[at].mean()
    return found_BL


@pytest.mark.parametrize("family", ["llamagen", "randar", "parallel"])
@pytest.mark.parametrize(("kappa", "clip"), [(0.0, 4.0), (0.3, 4.0), (1.0, 1.5)])
def test_prefix_weights_by_hand(student, teacher, batch, family: str, kappa: float, clip: float):
    sampler = Sampler(steps=3) if family == "parallel" else Sampler()
    if family != "llamagen":
        sizes = {"vocab_size": 12, "num_classes": 3, "grid": (2, 3), "num_layers": 1, "dim": 16, "num_heads": 2}
        student, teacher = (build("randar", sizes, seed=seed) for seed in (1, 2))
        for seed, model in enumerate((student, teacher)):
            torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(seed))
    inputs = step_inputs(student, teacher, {}, Rng(0, 2), chunk_rows=5)
    (part,) = PrefixReweighted(Rollout(sampler=sampler), kappa, clip)(batch, inputs).parts
    expected_BL = by_hand(code_log_ratios(part, inputs), part, kappa, clip)
    assert part.position_weight_BL is not None
    torch.testing.assert_close(part.position_weight_BL, expected_BL, rtol=1e-4, atol=1e-5)
    by_rank_BL = part.position_weight_BL.gather(1, part.plan.order_BL)
    torch.testing.assert_close(by_rank_BL.mean(0), torch.ones(6))
    assert (by_rank_BL[:, : part.plan.sizes[0]] == 1).all(), "no prefix, no weight"
    assert (by_rank_BL.std(0)[-1] > 0.01) == (kappa > 0)
    assert (part.weight_B == 1).all()
    torch.testing.assert_close(part.weight_BL, part.position_weight_BL)


def test_prefix_weights_do_not_underflow_together():
    sums = torch.tensor([[-5000.0, 0.0], [-5001.0, 900.0]])
    expected = 2 * torch.tensor([1.0, 0.0]).softmax(0)
    torch.testing.assert_close(prefix_weights(sums, 1.0, 4.0)[:, 0], expected)
    torch.testing.assert_close(prefix_weights(sums, 1.0, 4.0)[:, 1], torch.tensor([0.4, 1.6]))
    assert prefix_weights(sums[:0], 1.0, 4.0).shape == (0, 2)


def test_only_student_rows_are_weighed_and_the_rest_of_the_step_counts(inputs, batch):
    context = PrefixReweighted(MIXTURE, 0.5)(batch, inputs)
    data, student = context.parts
    assert data.position_weight_BL is None and (data.weight_BL == 1).all()
    assert student.position_weight_BL is not None and student.weight_BL.std() > 0.05
    for count in (2, 3, 8):
        chunks = [part for micro in context.micro_batches(count) for part in micro.parts if part.source == "student"]
        assert torch.equal(merge(chunks).weight_BL, student.weight_BL)
    (half,) = PrefixReweighted(Rollout(), 0.5)(batch.select(torch.arange(4)), inputs).parts
    (whole,) = PrefixReweighted(Rollout(), 0.5)(batch, inputs).parts
    assert torch.equal(half.codes_BL, whole.codes_BL[:4]) and not torch.allclose(half.weight_BL, whole.weight_BL[:4])


def test_merging_keeps_position_weights(batch, inputs):
    (part,) = Rollout()(batch, inputs).parts
    weighed = replace(part, position_weight_BL=torch.full((8, 6), 2.0))
    both = merge([part, weighed])
    assert both.position_weight_BL is not None
    assert torch.equal(both.position_weight_BL.mean(1), torch.tensor([1.0] * 8 + [2.0] * 8))
    assert merge([part, part]).position_weight_BL is None
    back = in_row_order([weighed.select(torch.tensor([1, 3])), weighed.select(torch.tensor([0, 2]))])
    assert back.row_B.tolist() == [0, 1, 2, 3] and back.weight_BL.shape == (4, 6)


@pytest.mark.parametrize("settings", [{"kappa": -1.0}, {"clip": 0.0}])
def test_nonsense_is_refused(settings: dict[str, float]):
    with pytest.raises(VarkdError, match="prefix_reweighted: need"):
        PrefixReweighted(Rollout(), **settings)


# ---- the best of several samples


@pytest.mark.parametrize("score", ["difference", "teacher"])
@pytest.mark.parametrize(
    "rollout",
    [Rollout(), Rollout("teacher"), MixtureSampling(), SpeculativeSampling(), MixedRollout(0.0, 1.0)],
    ids=lambda r: r.kind,
)
def test_the_best_by_hand(inputs, batch, rollout, score):
    (best,) = BestOf(rollout, 4, score)(batch, inputs).parts
    tries = []
    for nth in range(4):
        tries += rollout(replace(batch, row_B=batch.row_B + nth * FAR), inputs).parts  # one after the other
    points = []
    for part in tries:
        logp = code_logp(inputs.teacher, part)
        points.append((logp - code_logp(inputs.reference, part) if score == "difference" else logp).mean(1))
    winner = torch.stack(points).argmax(0)
    assert len(winner.unique()) > 1
    for row, nth in enumerate(winner.tolist()):
        assert torch.equal(best.codes_BL[row], tries[nth].codes_BL[row])
        assert torch.equal(best.behavior_logp_BL[row], tries[nth].behavior_logp_BL[row])
    assert torch.equal(best.condition.label_B, batch.label_B), "the label is kept"
    assert torch.equal(best.row_B, batch.row_B) and best.source == rollout.sources[0]


def test_one_of_one_is_the_plain_rollout_and_rows_are_independent(inputs, batch):
    (plain,) = Rollout()(batch, inputs).parts
    (one,) = BestOf(Rollout(), 1)(batch, inputs).parts
    assert torch.equal(one.codes_BL, plain.codes_BL)
    (whole,) = BestOf()(batch, inputs).parts
    for rows in (torch.tensor([5]), torch.tensor([7, 0, 3])):
        assert torch.equal(BestOf()(batch.select(rows), inputs).parts[0].codes_BL, whole.codes_BL[rows])
    later = BestOf()(batch, replace(inputs, rng=Rng(0, 3))).parts[0]
    assert not torch.equal(later.codes_BL, whole.codes_BL)


def test_more_tries_score_higher(inputs, batch):
    means = []
    for count in (1, 4, 16):
        (part,) = BestOf(Rollout(), count)(batch, inputs).parts
        means.append(float((code_logp(inputs.teacher, part) - code_logp(inputs.reference, part)).mean()))
    assert means == sorted(means) and means[2] > means[0] + 0.1


def test_in_a_replay_the_rings_hold_the_chosen_ones(inputs, batch):
    replay = Replay(BestOf(count=3), every=2, capacity=2)
    first = replay(batch, inputs)
    (chosen,) = BestOf(count=3)(batch, inputs).parts
    assert torch.equal(first.parts[0].codes_BL, chosen.codes_BL)
    state = replay.update(first, {}, inputs.rng)
    (again,) = replay(batch, replace(inputs, state=state, rng=Rng(0, 3))).parts
    assert torch.equal(again.codes_BL, chosen.codes_BL) and (again.age_B == 1).all()
    assert Mixture((Share(Data(), 0.5), Share(replay, 0.5))).needs_reference
    assert Reweighted(BestOf()).needs_reference and PrefixReweighted(replay).needs_reference
    assert not Reweighted(BestOf(score="teacher")).needs_reference and not MIXTURE.needs_reference
    assert Method((Term("ce", CrossEntropy()),), replay).needs_reference


def test_weights_go_around_the_best(inputs, batch):
    for contexts in (Reweighted(BestOf(count=2), kappa=20), PrefixReweighted(Replay(BestOf(count=2)), 0.5)):
        (part,) = contexts(batch, inputs).parts
        assert part.weight_BL.std() > 0.01
        torch.testing.assert_close(part.weight_BL.mean(), torch.tensor(1.0))


def test_what_is_missing_or_makes_no_sense_is_named(inputs, batch):
    with pytest.raises(VarkdError, match="student at its start"):
        BestOf()(batch, replace(inputs, reference=None))
    BestOf(score="teacher", count=2)(batch, replace(inputs, reference=None))
    with pytest.raises(VarkdError, match="best_of: count"):
        BestOf(count=0)


def test_rewards_need_a_known_probability_but_the_decay_does_not():
    term = Term("pg", CrossEntropy(), on=("student",), credit=Reward())
    for contexts in (BestOf(), Replay(BestOf()), Mixture((Share(BestOf(), 1.0),)), PrefixReweighted(BestOf())):
        with pytest.raises(VarkdError, match="best of several"):
            Method((term,), contexts)
        Method((replace(term, credit=DiscrepancyDecay()),), contexts)


def test_words_and_cost():
    method = Method((Term("kd", ForwardKL()),), PrefixReweighted(Replay(BestOf(count=3), every=4)))
    assert phrase(method.contexts) == (
        "student samples, best of 3 (score difference), replayed (every 4, max_age 20); "
        "student rows prefix reweighted (kappa 0.05)"
    )
    text = " ".join(" ".join(explain(method)).split())
    assert "of 3 for each label, the one with the largest log p - log r" in text and "weights: Position weights" in text
    cost = cost_at(method)
    assert cost["student_decode"] == 3 / 4 and cost["teacher_read"] == 1 + 3 / 4 + 1
    assert cost["student_read"] == 3 / 4 + 1
    alone = cost_at(Method((Term("kd", ForwardKL()),), BestOf(MixtureSampling(), 2, "teacher")))
    assert (alone["student_decode"], alone["teacher_decode"]) == (2, 2)
    assert (alone["student_read"], alone["teacher_read"]) == (0, 3)


@pytest.mark.parametrize("score", ["difference", "teacher"])
def test_the_reads_are_those_that_the_cost_tells(inputs, batch, score):
    """The reference counts as a student that is read."""
    rows = {"teacher": 0, "reference": 0}

    def counting(name: str):
        def count(_module, inputs, _output) -> None:
            rows[name] += len(inputs[0])

        return count

    for name in rows:
        getattr(inputs, name).register_forward_hook(counting(name))
    contexts = BestOf(count=3, score=score)
    contexts(batch, inputs)
    made = cost_at(Method((Term("ce", CrossEntropy()),), contexts))
    assert rows == {"teacher": 8 * made["teacher_read"], "reference": 8 * made["student_read"]}
    assert made["teacher_read"] == 3 and made["student_decode"] == 3


def test_an_empty_share_of_best_of_makes_nothing(inputs, batch):
    context = PrefixReweighted(Mixture((Share(Data(), 1.0), Share(BestOf(), 0.0))))(batch, inputs)
    assert isinstance(context, Context) and [part.source for part in context.parts] == ["data"]
