"""Selections: thresholds by generation rank, moving averages, kept fractions, acceptance, and the control."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from varkd.backbones.protocol import Backbone
from varkd.distill import loss as loss_module
from varkd.distill.divergences import CrossEntropy, ForwardKL
from varkd.distill.inputs import StepInputs
from varkd.distill.loss import Stats, distill_loss
from varkd.distill.method import Method, Term
from varkd.distill.scores import CodeProb, Entropy, MaxProb, ProposalAccepted, TopKAgrees
from varkd.distill.selection import Accepted, All, Confidence, Random
from varkd.distill.spaces import Clusters, Full
from varkd.errors import VarkdError
from varkd.types import Condition, Context, Part, Plan
from varkd.world import Rng, World

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
    weight_BL = selection({MaxProb(): score_BL}, part(reverse=reverse), Full(), threshold_L, RNG)
    for row in range(4):
        for position in range(6):
            rank = 5 - position if reverse else position
            confident = score_BL[row, position] >= threshold_L[rank]
            assert weight_BL[row, position] == (1.0 if confident else 0.25)
    assert len(weight_BL.unique()) == 2


def test_the_threshold_itself_counts_as_confident_and_the_first_step_keeps_everything():
    score_BL = torch.full((4, 6), 0.5)
    selection = Confidence(score="max_prob")
    assert (selection({MaxProb(): score_BL}, part(), Full(), torch.full((6,), 0.5), RNG) == 1).all()
    assert (selection({MaxProb(): score_BL}, part(), Full(), None, RNG) == 1).all()


def test_threshold_is_a_moving_average_of_quantiles():
    selection = Confidence(quantile=0.25, score="max_prob", decay=0.9)
    first, second = torch.rand(2, 8, 3, generator=torch.Generator().manual_seed(1))
    quantile = lambda scores: torch.tensor([sorted(column)[1] * 0.25 + sorted(column)[2] * 0.75 for column in scores.T])
    threshold_L = selection.updated(None, first)  # 0.25 of 8 values lies at index 1.75
    torch.testing.assert_close(threshold_L, quantile(first))
    threshold_L = selection.updated(threshold_L, second)
    torch.testing.assert_close(threshold_L, 0.9 * quantile(first) + 0.1 * quantile(second))


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.9])
def test_the_kept_fraction_converges_to_one_minus_the_quantile_at_every_position(quantile: float):
    selection = Confidence(quantile=quantile, score="max_prob", floor=0.0)
    generator, threshold_L, kept = torch.Generator().manual_seed(0), None, []
    rank_offset = torch.tensor([0.0, 5.0, -3.0, 1.0])  # positions of very different confidence
    for step in range(200):
        score_BL = torch.randn(64, 4, generator=generator) + rank_offset
        if step >= 100:
            kept.append(selection({MaxProb(): score_BL}, part(64, 4), Full(), threshold_L, RNG).mean(0))
        threshold_L = selection.updated(threshold_L, score_BL)
    fraction_L = torch.stack(kept).mean(0)
    assert (fraction_L - (1 - quantile)).abs().max() < 0.03


def test_method_update_writes_one_threshold_per_confidence_term():
    term = Term("kd", ForwardKL(), selection=Confidence(quantile=0.5, score="max_prob"))
    method = Method((term, Term("ce", CrossEntropy())))
    scores = torch.tensor([[0.1, 0.9], [0.3, 0.5], [0.2, 0.7]])
    state = method.update({}, Context(()), {term.key(term.selection): scores}, RNG)
    assert set(state) == {term.key(term.selection)}
    torch.testing.assert_close(state[term.key(term.selection)], torch.tensor([0.2, 0.7]))
    none = {term.key(term.selection): scores[:0]}
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


# ---- the other side, one threshold for all positions, the target code


def test_the_low_side_keeps_what_the_high_side_does_not():
    score_BL = torch.rand(4, 6, generator=torch.Generator().manual_seed(2))
    threshold_L = torch.full((6,), 0.5)
    high, low = (Confidence(score="entropy", side=side, floor=0.25) for side in ("high", "low"))  # type: ignore[arg-type]
    kept_high, kept_low = (each({Entropy(): score_BL}, part(), Full(), threshold_L, RNG) for each in (high, low))
    assert torch.equal(kept_low == 1, score_BL <= 0.5) and torch.equal(kept_high == 1, score_BL >= 0.5)
    assert torch.equal(kept_high + kept_low, torch.full((4, 6), 1.25))
    tie = torch.full((4, 6), 0.5)  # the threshold itself belongs to both sides
    for each in (high, low):
        assert (each({Entropy(): tie}, part(), Full(), threshold_L, RNG) == 1).all()
    assert (low({Entropy(): score_BL}, part(), Full(), None, RNG) == 1).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_one_threshold_may_serve_all_positions(reverse: bool):
    selection = Confidence(quantile=0.25, score="code_prob", per_position=False, decay=0.5, floor=0.0)
    first = torch.arange(24.0).view(4, 6)
    threshold = selection.updated(None, first)
    assert threshold.shape == (1,) and threshold.item() == pytest.approx(5.75)  # 0.25 of 24 values lies at index 5.75
    threshold = selection.updated(threshold, first + 2)
    assert threshold.shape == (1,) and threshold.item() == pytest.approx(6.75)
    weight_BL = selection({CodeProb(): first}, part(reverse=reverse), Full(), threshold, RNG)
    assert torch.equal(weight_BL, (first >= 6.75).float())
    per_position = replace(selection, per_position=True).updated(None, first)
    assert per_position.shape == (6,)


def test_the_state_of_one_threshold_has_shape_one():
    term = Term("kd", ForwardKL(), selection=Confidence(score="code_prob", per_position=False))
    scores = torch.tensor([[0.1, 0.9], [0.3, 0.5], [0.2, 0.7]])
    state = Method((term,)).update({}, Context(()), {term.key(term.selection): scores}, RNG)
    torch.testing.assert_close(state[term.key(term.selection)], torch.tensor([0.4]))  # the median of all six


# ---- acceptance


def test_accepted_reads_its_score_and_nothing_else():
    passed_BL = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    expected = torch.tensor([[1.0, 0.2, 1.0], [0.2, 0.2, 1.0]])
    for selection, name in (
        (Accepted("top_k", 7, 0.2), TopKAgrees(7)),
        (Accepted("speculative", floor=0.2), ProposalAccepted()),
    ):
        assert selection.reads(Full()) == (name,)
        assert torch.equal(selection({name: passed_BL}, part(2, 3), Full(), None, RNG), expected)
        assert torch.equal(selection({name: passed_BL}, part(2, 3, True), Full(), torch.rand(3), Rng(9, 9)), expected)


@pytest.mark.parametrize("values", [{"top_k": 0}, {"floor": 1.2}])
def test_accepted_refuses_nonsense(values: dict):
    with pytest.raises(VarkdError, match="accepted"):
        Accepted(**values)


# ---- in the loss, on whole models


def inputs_of(term: Term, student: Backbone, teacher: Backbone, state: dict[str, Tensor] | None = None) -> StepInputs:
    return StepInputs(Method((term,)), student, teacher, state or {}, RNG, chunk_rows=7)


def outcome(inputs: StepInputs, whole: Part) -> tuple[Tensor, list[Tensor], Stats]:
    value, stats = distill_loss(inputs, Context((whole,)), {"kd": 1.0, "ce": 1.0})
    gradients = torch.autograd.grad(value, list(inputs.student.parameters()))
    return value.detach(), list(gradients), stats


@pytest.fixture
def data(batch, student) -> Part:
    return Part.of("data", batch.codes_BL, batch.condition, student.plan(8), batch.row_B)


def whole_logits(model: Backbone, whole: Part) -> Tensor:
    return model.head(model(whole.codes_BL, whole.condition, whole.plan)).detach()


@pytest.mark.parametrize("top_k", [3, 6])
def test_top_k_acceptance_in_the_loss(student, teacher, data, top_k: int):
    _, _, stats = outcome(inputs_of(Term("kd", ForwardKL(), selection=Accepted(top_k=top_k)), student, teacher), data)
    q_BLV, p_BLV = whole_logits(student, data), whole_logits(teacher, data)
    first = p_BLV.topk(top_k, dim=-1).indices
    expected = (first == q_BLV.argmax(-1, keepdim=True)).any(-1).double().mean()
    assert stats.collect(World()).means["kept/kd"] == pytest.approx(float(expected)) and 0.05 < expected < 0.95


def test_speculative_acceptance_in_the_loss_is_a_matter_of_chance_and_of_rows(student, teacher, data):
    inputs = inputs_of(Term("kd", ForwardKL(), selection=Accepted("speculative", floor=0.0)), student, teacher)
    rate = (
        torch.minimum(whole_logits(student, data).softmax(-1), whole_logits(teacher, data).softmax(-1)).sum(-1).mean()
    )
    kept = [outcome(replace(inputs, rng=Rng(0, step)), data)[2].collect(World()).means["kept/kd"] for step in range(30)]
    assert len(set(kept)) > 5
    error = float(rate * (1 - rate) / (30 * 48)) ** 0.5
    assert abs(sum(kept) / 30 - float(rate)) < 4 * error
    value, gradients, _ = outcome(inputs, data)  # and of nothing else: any split of the rows chooses alike
    halves = [outcome(inputs, data.select(rows)) for rows in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(halves[0][0] + halves[1][0], value)
    for one, other, both in zip(halves[0][1], halves[1][1], gradients, strict=True):
        torch.testing.assert_close(one + other, both)


@pytest.mark.parametrize("side", ["high", "low"])
def test_code_prob_is_about_the_target_code(student, teacher, data, side):
    """Also where other codes were put into the prefix: confidence in what the position is asked to predict."""
    spliced = torch.where(
        torch.rand(8, 6, generator=torch.Generator().manual_seed(3)) < 0.5, 11 - data.codes_BL, data.codes_BL
    )
    whole = replace(data, codes_BL=spliced)
    term = Term("kd", CrossEntropy(), selection=Confidence(score="code_prob", side=side, floor=0.0, per_position=False))
    value, _, stats = outcome(inputs_of(term, student, teacher, {"threshold/kd": torch.tensor([0.05])}), whole)
    p_BL = whole_logits(teacher, whole).softmax(-1).gather(2, data.codes_BL.unsqueeze(2)).squeeze(2)
    q_BL = whole_logits(student, whole).log_softmax(-1).gather(2, data.codes_BL.unsqueeze(2)).squeeze(2)
    kept_BL = p_BL >= 0.05 if side == "high" else p_BL <= 0.05
    assert 0.2 < kept_BL.double().mean() < 0.8
    torch.testing.assert_close(value, -(q_BL * kept_BL).sum())
    torch.testing.assert_close(stats.collect(World()).observed["threshold/kd"], p_BL.float())


@pytest.mark.parametrize(
    "selection",
    [Random(0.5, floor=0.0), Confidence(score="code_prob", floor=0.0), Accepted(top_k=6, floor=0.0)],
    ids=repr,
)
@pytest.mark.parametrize("garbage", [torch.nan, 1e3])
def test_garbage_where_the_weight_is_zero_changes_nothing(
    student, teacher, data, selection, garbage: float, monkeypatch: pytest.MonkeyPatch
):
    """Polarity: a loss that averages over the positions that were masked out (a peer's) would see it."""
    state = {"threshold/kd": torch.full((6,), 0.05)}
    inputs = inputs_of(Term("kd", ForwardKL(), selection=selection), student, teacher, state)
    if garbage == 1e3:  # another term keeps the rows themselves in the batch
        inputs = replace(inputs, method=Method((*inputs.method.terms, Term("ce", CrossEntropy()))))
    honest, clean_rows = loss_module._teacher_rows(inputs, data), loss_module._term_rows
    weights: list[dict[str, loss_module.TermRows]] = []
    monkeypatch.setattr(loss_module, "_term_rows", lambda *a: weights.append(clean_rows(*a)) or weights[-1])
    value, gradients, _ = outcome(inputs, data)
    counts_N = weights[0]["kd"].weight_N != 0
    assert honest is not None and 0.1 < counts_N.double().mean() < 0.9
    # The selection stands; now the teacher goes mad where it does not count, and then where it does.
    monkeypatch.setattr(loss_module, "_term_rows", lambda *a: weights[0])
    for mad_N in (~counts_N, counts_N):
        hidden_ND = honest.hidden_ND.masked_fill(mad_N.unsqueeze(1), garbage)
        monkeypatch.setattr(loss_module, "_teacher_rows", lambda *a, h=hidden_ND: replace(honest, hidden_ND=h))
        other_value, other_gradients, _ = outcome(inputs, data)
        if mad_N is counts_N:
            assert not abs(other_value - value) < 1e-3
        else:
            torch.testing.assert_close((other_value, other_gradients), (value, gradients))
