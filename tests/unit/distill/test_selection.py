"""Selections: thresholds by generation rank, moving averages, kept fractions, and the control."""

from __future__ import annotations

import pytest
import torch

from varkd.distill.divergences import CrossEntropy, ForwardKL
from varkd.distill.method import Method, Term, threshold_key
from varkd.distill.selection import All, Confidence, Random
from varkd.distill.spaces import Clusters, Full
from varkd.errors import VarkdError
from varkd.types import Condition, Context, Part, Plan
from varkd.world import Rng

RNG = Rng(0, 5)


def part(num_rows: int = 4, length: int = 6, reverse: bool = False) -> Part:
    order = torch.arange(length).flip(0) if reverse else torch.arange(length)
    plan = Plan(order.expand(num_rows, -1), (1,) * length)
    codes_BL = torch.zeros(num_rows, length, dtype=torch.long)
    return Part.of("student", codes_BL, Condition(torch.zeros(num_rows)), plan, torch.arange(num_rows))


def test_all_keeps_everything():
    assert torch.equal(All()({}, part(), Full(), None, RNG), torch.ones(4, 6))


@pytest.mark.parametrize("reverse", [False, True])
def test_thresholds_belong_to_generation_ranks(reverse: bool):
    score_BL = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    threshold_L = torch.tensor([0.1, 0.2, 0.4, 0.6, 0.8, 0.9])
    selection = Confidence(score="max_prob", floor=0.25)
    weight_BL = selection({"max_prob": score_BL}, part(reverse=reverse), Full(), threshold_L, RNG)
    for row in range(4):
        for position in range(6):
            rank = 5 - position if reverse else position
            confident = score_BL[row, position] >= threshold_L[rank]
            assert weight_BL[row, position] == (1.0 if confident else 0.25)
    assert len(weight_BL.unique()) == 2


def test_the_threshold_itself_counts_as_confident_and_the_first_step_keeps_everything():
    score_BL = torch.full((4, 6), 0.5)
    selection = Confidence(score="max_prob")
    assert (selection({"max_prob": score_BL}, part(), Full(), torch.full((6,), 0.5), RNG) == 1).all()
    assert (selection({"max_prob": score_BL}, part(), Full(), None, RNG) == 1).all()


def test_threshold_is_a_moving_average_of_quantiles():
    selection = Confidence(quantile=0.25, score="max_prob", decay=0.9)
    first, second = torch.rand(2, 8, 3, generator=torch.Generator().manual_seed(1))
    quantile = lambda scores: torch.tensor([sorted(column)[1] * 0.25 + sorted(column)[2] * 0.75 for column in scores.T])
    threshold_L = selection.updated_threshold(None, first)  # 0.25 of 8 values lies at index 1.75
    torch.testing.assert_close(threshold_L, quantile(first))
    threshold_L = selection.updated_threshold(threshold_L, second)
    torch.testing.assert_close(threshold_L, 0.9 * quantile(first) + 0.1 * quantile(second))


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.9])
def test_the_kept_fraction_converges_to_one_minus_the_quantile_at_every_position(quantile: float):
    selection = Confidence(quantile=quantile, score="max_prob", floor=0.0)
    generator, threshold_L, kept = torch.Generator().manual_seed(0), None, []
    rank_offset = torch.tensor([0.0, 5.0, -3.0, 1.0])  # positions of very different confidence
    for step in range(200):
        score_BL = torch.randn(64, 4, generator=generator) + rank_offset
        if step >= 100:
            kept.append(selection({"max_prob": score_BL}, part(64, 4), Full(), threshold_L, RNG).mean(0))
        threshold_L = selection.updated_threshold(threshold_L, score_BL)
    fraction_L = torch.stack(kept).mean(0)
    assert (fraction_L - (1 - quantile)).abs().max() < 0.03


def test_method_update_writes_one_threshold_per_confidence_term():
    term = Term("kd", ForwardKL(), selection=Confidence(quantile=0.5, score="max_prob"))
    method = Method((term, Term("ce", CrossEntropy())))
    scores = torch.tensor([[0.1, 0.9], [0.3, 0.5], [0.2, 0.7]])
    state = method.update({}, Context(()), {threshold_key(term): scores}, RNG)
    assert set(state) == {threshold_key(term)}
    torch.testing.assert_close(state[threshold_key(term)], torch.tensor([0.2, 0.7]))
    none = {threshold_key(term): scores[:0]}
    assert method.update(state, Context(()), none, RNG) == state  # no rows: nothing to learn from


def test_random_keeps_its_fraction_and_belongs_to_rows():
    selection = Random(quantile=0.3, floor=0.1)
    whole = part(400, 16)
    weight_BL = selection({}, whole, Full(), None, RNG)
    assert set(weight_BL.unique().tolist()) == {torch.tensor(0.1).item(), 1.0}
    assert abs(float((weight_BL == 1).double().mean()) - 0.7) < 0.02
    assert torch.equal(selection({}, whole.select(slice(100, 250)), Full(), None, RNG), weight_BL[100:250])
    assert not torch.equal(selection({}, whole, Full(), None, Rng(0, 6)), weight_BL)
    assert (selection({}, whole, Full(), None, Rng(1, 5)) != weight_BL).any()


def test_random_at_the_ends():
    assert (Random(quantile=0.0)({}, part(), Full(), None, RNG) == 1).all()
    assert (Random(quantile=1.0, floor=0.2)({}, part(), Full(), None, RNG) == torch.tensor(0.2)).all()


def test_cluster_mass_needs_clusters():
    with pytest.raises(VarkdError, match="clusters"):
        Term("kd", ForwardKL(), selection=Confidence(score="cluster_mass"))
    Term("kd", ForwardKL(), selection=Confidence(score="cluster_mass"), space=Clusters())


@pytest.mark.parametrize("values", [{"quantile": 1.5}, {"floor": -0.1}, {"decay": 2.0}])
def test_values_out_of_range_are_refused(values: dict):
    with pytest.raises(VarkdError, match="must lie in"):
        Confidence(**values)
