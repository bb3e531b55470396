"""The best of several samples: by hand, over any split, and in mixtures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference import step_inputs
from varkd.distill.bestof import FAR, BestOf
from varkd.distill.credit import Reward
from varkd.distill.describe import explain, phrase
from varkd.distill.divergences import CrossEntropy, ForwardKL
from varkd.distill.inputs import StepInputs
from varkd.distill.method import Method, Term
from varkd.distill.mixture import Mixture, Share
from varkd.distill.prefixes import Data, MixedRollout, MixtureSampling, Rollout, SpeculativeSampling
from varkd.distill.replay import Replay
from varkd.errors import VarkdError
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
    assert not BestOf(score="teacher").needs_reference and not MIXTURE.needs_reference
    assert Method((Term("ce", CrossEntropy()),), replay).needs_reference


def test_what_is_missing_or_makes_no_sense_is_named(inputs, batch):
    with pytest.raises(VarkdError, match="student at its start"):
        BestOf()(batch, replace(inputs, reference=None))
    BestOf(score="teacher", count=2)(batch, replace(inputs, reference=None))
    with pytest.raises(VarkdError, match="best_of: count"):
        BestOf(count=0)


def test_rewards_need_a_known_probability():
    term = Term("pg", CrossEntropy(), on=("student",), credit=Reward())
    for contexts in (BestOf(), Replay(BestOf()), Mixture((Share(BestOf(), 1.0),))):
        with pytest.raises(VarkdError, match="best of several"):
            Method((term,), contexts)


def test_words_and_cost():
    method = Method((Term("kd", ForwardKL()),), Replay(BestOf(count=3), every=4))
    assert phrase(method.contexts) == "student samples, best of 3 (score difference), replayed (every 4, max_age 20)"
    text = " ".join(" ".join(explain(method)).split())
    assert "of 3 for each label, the one with the largest log p - log r" in text
    cost = method.cost
    assert cost["student_decode"] == 3 / 4 and cost["teacher_read"] == 1 + 3 / 4
    assert cost["student_read"] == 3 / 4
    alone = Method((Term("kd", ForwardKL()),), BestOf(MixtureSampling(), 2, "teacher")).cost
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
    made = Method((Term("ce", CrossEntropy()),), contexts).cost
    assert rows == {"teacher": 8 * made["teacher_read"], "reference": 8 * made["student_read"]}
    assert made["teacher_read"] == 3 and made["student_decode"] == 3


def test_an_empty_share_of_best_of_makes_nothing(inputs, batch):
    context = Mixture((Share(Data(), 1.0), Share(BestOf(), 0.0)))(batch, inputs)
    assert isinstance(context, Context) and [part.source for part in context.parts] == ["data"]
